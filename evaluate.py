"""evaluate.py: how good it is and where it breaks, one command for each number (Tables 7, 8).

    python evaluate.py --bench=top1 --ckpt=out/finetune/model.pt --data=FOLDER
    python evaluate.py --bench=knn --ckpt=out/pretrain/encoder.pt --data=FOLDER
    python evaluate.py --bench=miou --ckpt=out/segment/model.pt --data=FOLDER
    python evaluate.py --bench=maps --ckpt=out/pretrain/ckpt.pt --data=FOLDER
    python evaluate.py --bench=features --ckpt=out/pretrain/encoder.pt --data=FOLDER
    torchrun --nproc_per_node=8 evaluate.py ...              the same number, sooner

    1. Config      every field is a flag
    2. main        one bench, one JSON line, kept in the run's folder as BENCH.json
    3. the model   a classifier, a segmenter, an encoder from any file, or an untrained one
    4. accuracy    top1
    5. k-NN        knn
    6. robustness  fgsm, pgd, imagenet_c, imagenet_a, imagenet_r, imagenet_sketch (Table 8)
    7. mean IoU    miou, of a segmenter (Table 7)
    8. maps        of a pre-trained model (Figures 5 and 6)
    9. features    of any images, their neighbours, their patches in colours; no labels needed
"""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import crop
import pretrain
from crop import InputError
from finetune import (Config as Recipe, Scenes, accuracy, build_model, centre_crops, labelled_data,
                      load_encoder, load_weights, match_labels, mean_iou, read_weights, whole_scene)
from model import ENCODERS, Classifier, as_grid
from pretrain import (Batches, load_checkpoint, number, open_file, parse_config, run, save_file,
                      save_text, setup_machine)


# ------------------------------------------------------------------------------------ 1. Config

@dataclass(frozen=True)
class Config:
    """What to measure. A field's type parses its flag, its comment is the flag's line in --help."""

    bench: Literal["top1", "knn", "fgsm", "pgd", "imagenet_c", "imagenet_a", "imagenet_r",
                   "imagenet_sketch", "miou", "maps", "features"] = "top1"  # what to measure
    ckpt: str = "out/finetune/model.pt"  # knn, features: an encoder, or scratch; maps: ckpt.pt
    model: Literal[("auto", *ENCODERS)] = "auto"  # the encoder, for --ckpt=scratch
    data: str = "data/imagenet"  # val/CLASS/* or CLASS/*, a built-in source; miou: as ADE20K
    classes: str = ""  # a file with the names of the class folders to keep, one a line
    out: str = ""  # where BENCH.json goes; by default the folder of --ckpt
    size: int = 224  # pixels of the centre crop (knn, features); others are as in validation
    k: int = 20  # nearest neighbours that vote (knn)
    temperature: number = 0.07  # of their votes, exp(cosine / temperature) (knn)
    eps: number = 1.0  # largest change of a pixel in 255ths (fgsm, pgd)
    step: number = 0.5  # change of a pixel in one step, in 255ths (pgd)
    steps: int = 5  # steps of the attack (pgd)
    pictures: int = 4  # images to paint (miou; maps: 16 at most)
    seed: int = 0  # of an untrained encoder, random starts (pgd), and a split without config.json
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the chip has it
    workers: int = -1  # loader processes for each process; -1 uses the cores at hand


# -------------------------------------------------------------------------------------- 2. main

def folder_of(cfg):
    """Where results go."""
    return cfg.out or ("out/scratch" if cfg.ckpt == "scratch" else os.path.dirname(cfg.ckpt) or ".")


def main(argv=None):
    """Run one bench; print its scores as JSON, the last line."""
    cfg = parse_config(Config, {}, argv, __doc__.split("\n")[0])
    began = time.perf_counter()
    if cfg.out or os.path.isdir(folder_of(cfg)):  # what cannot be written is found before the work
        open_file(folder_of(cfg), "lock").close()
    with setup_machine(cfg) as machine:
        if cfg.data == "imagenette":
            with machine.first():  # it may have to be downloaded
                crop.open_images(cfg.data, "val")
        result = BENCHES[cfg.bench](cfg, machine)
        report = json.dumps(dict(bench=cfg.bench, **result, ckpt=cfg.ckpt, data=cfg.data,
                                 seconds=time.perf_counter() - began, dtype=machine.dtype))
        machine.say(report)
        if machine.rank == 0:
            save_text(f"{folder_of(cfg)}/{cfg.bench}.json", report)


# --------------------------------------------------------------------------------- 3. the model

def load_model(cfg, machine, segments=False):
    """-> (the classifier, or the segmenter, of a model.pt, ready on the device; the file). Raises
    InputError where the file is none."""
    _, state, saved = read_weights(cfg.ckpt)
    if "classes" not in saved or segments != (saved["config"]["recipe"] == "segment"):
        raise InputError(f"{cfg.ckpt!r} is no model.pt of finetune.py with a "
                         f"{'segmenter' if segments else 'classifier'}, which --bench={cfg.bench} "
                         "takes")
    model = build_model(Recipe(**saved["config"]), len(saved["classes"]))
    load_weights(model, state, cfg.ckpt, head=True)
    return model.to(machine.device).eval(), saved


def frozen_encoder(cfg, machine):
    """A Classifier whose features are those of an encoder: of --ckpt, or untrained."""
    torch.manual_seed(cfg.seed)
    scratch = cfg.ckpt == "scratch"
    if scratch and cfg.model == "auto":
        raise InputError("--ckpt=scratch needs --model")
    model = Classifier(cfg.model, 1, probe=True) if scratch else load_encoder(cfg.ckpt, cfg.model)
    if model.encoder.prefix and cfg.size % model.encoder.stride:
        raise InputError(f"--size {cfg.size} is no multiple of {model.encoder.stride}")
    return model.to(machine.device).eval()


def as_in_run(cfg, saved):
    """-> cfg with the seed and the classes by which the run of a saved file drew its held-out
    images from cfg.data; None where it drew none from there. Raises InputError where the folder has
    other images or classes now: other ones would be drawn."""
    splits = [os.path.isdir(os.path.join(cfg.data, split)) for split in ("train", "val")]
    if not saved or all(splits) or os.path.realpath(cfg.data) != saved["identity"].get("data"):
        return None
    run = saved["config"]
    cfg = dataclasses.replace(cfg, seed=run["seed"], classes=cfg.classes or run["classes"])
    source = crop.open_images(cfg.data, "train", crop.read_classes(cfg.classes))
    if [len(source), source.classes] != [saved["identity"][x] for x in ("images", "classes")]:
        raise InputError(f"{cfg.data!r} has other images or --classes than when the run held some "
                         "of them out")
    return cfg


def rows_to_score(cfg, saved, machine):
    """-> (a source, the numbers of its images to score): val/ of a folder, or where there is none
    the images that the run of the file `saved` held out, if it was trained on this folder, else
    all."""
    if run := as_in_run(cfg, saved):
        _, (source, rows), _ = crop.train_and_val(
            run.data, run.seed, crop.read_classes(run.classes))
        machine.say(f"{len(rows)} images that the run held out of {cfg.data}")
    else:
        source = crop.open_images(cfg.data, "val", crop.read_classes(cfg.classes))
        rows = range(len(source))
        val = "/val" if os.path.isdir(os.path.join(cfg.data, "val")) else ""
        machine.say(f"all {len(rows)} images of {cfg.data}{val}")
    return source, rows


# ---------------------------------------------------------------------------------- 4. accuracy

def labelled_rows(source, rows, classes, folder):
    """-> (labels of a source among the model's classes, found by name; the rows that have one)."""
    labels = torch.tensor(match_labels(source, classes, folder))
    rows = [i for i in rows if labels[i] >= 0]
    if not rows:
        raise InputError(f"{folder!r} has no images in class folders")
    return labels, rows


def top1(cfg, machine, attack=None):
    """Top-1 and top-5 accuracy of a classifier on centre crops as in validation."""
    model, saved = load_model(cfg, machine)
    recipe = saved["config"]
    source, rows = rows_to_score(cfg, saved, machine)
    labels, rows = labelled_rows(source, rows, saved["classes"], cfg.data)
    crops = centre_crops(source, rows, recipe["test_size"], recipe["test_crop"])
    score = accuracy(model, Batches(crops, machine, cfg.workers), labels, machine, attack=attack)
    return score | dict(size=recipe["test_size"])


# --------------------------------------------------------------------------------------- 5. k-NN

def normalised_features(model, images, count, machine):
    """-> ([n, width] features of unit length on the device, their numbers in the source [n]) of
    the readable images among `count`, on every process."""
    table = torch.zeros(count, model.head.in_features, device=machine.device)
    with torch.no_grad():
        for x, numbers in images:
            with machine.autocast():
                features = model.features(crop.normalize(x.float() / 255))
            table[machine.send(numbers)] = F.normalize(features.float())
    machine.sum(table)
    seen = table.any(1)  # the rows of other images are 0
    if not seen.any() or not table.isfinite().all():
        raise InputError("no image can be read" if not seen.any() else "features are not finite")
    return table[seen], seen.nonzero().squeeze(1).cpu()


def vote(queries, bank, labels, classes, k, temperature):
    """Classes [N] for queries [N, D] by the k nearest of bank [M, D] (of unit length) with labels
    [M]: each votes for its own with exp(cosine / temperature)."""
    chosen = []
    for q in queries.split(max(1, 2**26 // len(bank))):  # 256 MB of cosines at a time
        cosine, nearest = (q @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(q), classes, device=q.device)
        # Relative to the nearest: the same vote, which neither overflows nor vanishes.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes.scatter_add_(1, labels[nearest], weights)
        chosen.append(votes.argmax(1))
    return torch.cat(chosen)


def knn(cfg, machine):
    """Weighted k-nearest-neighbour accuracy of an encoder's frozen features: training images vote.
    The features are the encoder's tokens, pooled. Of a folder without val/ a slice is classified:
    the one that the encoder's run held out, which the ckpt.pt beside it tells, else by --seed."""
    model, ckpt = frozen_encoder(cfg, machine), os.path.join(os.path.dirname(cfg.ckpt), "ckpt.pt")
    run = None if cfg.ckpt == "scratch" else as_in_run(cfg, load_checkpoint(ckpt))
    (train, rows), (val, val_rows), sentence = labelled_data(run or cfg)
    machine.say(sentence)
    sides = []
    for source, wanted in ((train, rows), (val, val_rows)):
        images = Batches(centre_crops(source, wanted, cfg.size, 0.95), machine, cfg.workers)
        features, numbers = normalised_features(model, images, len(source), machine)
        sides.append((features, machine.send(torch.tensor(source.labels)[numbers])))
    (bank, bank_labels), (queries, labels) = sides
    chosen = vote(queries, bank, bank_labels, len(train.classes), cfg.k, cfg.temperature)
    return dict(knn=100 * (chosen == labels).float().mean().item(), n=len(labels), bank=len(bank),
                size=cfg.size, k=cfg.k, temperature=cfg.temperature)


# --------------------------------------------------------------------------- 6. robustness, Table 8

def perturb(model, x, y, start, eps, step, steps):
    """`steps` steps of `step` up the gradient's sign from x + start, never further than eps from x
    and never outside [0, 1]; images x [B, 3, h, w] in [0, 1], gradients in float32."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    moved = torch.minimum(torch.maximum(x + start, low), high)
    for _ in range(steps):
        moved.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(crop.normalize(moved)), y, reduction="sum")
        grad, = torch.autograd.grad(loss, moved)
        moved = torch.minimum(torch.maximum(moved.detach() + step * grad.sign(), low), high)
    return moved


def attacked(cfg, machine):
    """Top-1 under the fast gradient sign method [24], one step of eps from the clean image, or
    projected gradient descent [42], steps from a random start seeded by the image; and without."""
    eps = cfg.eps / 255

    def fgsm(model, x, y, numbers):
        return perturb(model, x, y, torch.zeros_like(x), eps, eps, 1)

    def pgd(model, x, y, numbers):
        start = [np.random.default_rng((cfg.seed, 8, j)).random(x.shape[1:], dtype=np.float32)
                 for j in numbers.tolist()]  # stream 8
        start = machine.send(torch.from_numpy(np.stack(start))) * 2 - 1
        return perturb(model, x, y, start * eps, eps, cfg.step / 255, cfg.steps)

    score = top1(cfg, machine, fgsm if cfg.bench == "fgsm" else pgd)
    steps = dict(step=cfg.step, steps=cfg.steps) if cfg.bench == "pgd" else {}
    return {cfg.bench: score["top1"], "clean": top1(cfg, machine)["top1"], "n": score["n"],
            "eps": cfg.eps, **steps}


def folder_accuracy(model, saved, folder, cfg, machine, ratio, only_these=False):
    """-> accuracy on all images of a folder of class folders, and the number of classes there.
    only_these: predict among the classes that have a folder."""
    source, among = crop.open_images(folder, "val", crop.read_classes(cfg.classes)), None
    labels, rows = labelled_rows(source, range(len(source)), saved["classes"], folder)
    if only_these:
        among = labels[rows].unique()
        labels = torch.searchsorted(among, labels)
    crops = centre_crops(source, rows, saved["config"]["test_size"], ratio)
    score = accuracy(model, Batches(crops, machine, cfg.workers), labels, machine, among)
    return score, len(source.classes)


def subset(cfg, machine):
    """ImageNet-A, -R and -Sketch [29, 30, 60]: folders of some of the model's classes, found by
    name; only these are predicted."""
    model, saved = load_model(cfg, machine)
    score, classes = folder_accuracy(model, saved, cfg.data, cfg, machine,
                                     saved["config"]["test_crop"], only_these=True)
    machine.say(f"protocol: {classes} of the model's {len(saved['classes'])} classes have a folder "
                "here; only they are predicted")
    return {cfg.bench: score["top1"], "top5": score["top5"], "clean": saved["score"]["top1"],
            "classes": classes, "n": score["n"]}


ALEXNET = {  # mean top-1 error over the five severities, from the benchmark's authors [29]
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500}


def corruption_error(errors):
    """{corruption: five errors in percent} -> mCE: the mean over the corruptions of the error
    relative to AlexNet's, in percent."""
    return sum(sum(e) / len(e) / ALEXNET[name] for name, e in errors.items()) / len(errors)


def imagenet_c(cfg, machine):
    """ImageNet-C [29]: CORRUPTION/SEVERITY/CLASS/*. The images have the right size already: they
    are not cropped. mCE needs all 15 corruptions."""
    model, saved = load_model(cfg, machine)
    errors, n = {name: [] for name in ALEXNET}, 0
    missing = [name for name in ALEXNET if not os.path.isdir(os.path.join(cfg.data, name))]
    if missing:
        raise InputError(f"{cfg.data!r} has no folder {', '.join(missing)}")
    for name in ALEXNET:
        for severity in "12345":
            folder = os.path.join(cfg.data, name, severity)
            score, _ = folder_accuracy(model, saved, folder, cfg, machine, ratio=1.0)
            errors[name].append(100 - score["top1"])
            n += score["n"]
        machine.say(f"{name:>18}" + "".join(f"  {e:6.2f}" for e in errors[name]))
    return dict(mce=corruption_error(errors), clean=saved["score"]["top1"], n=n, errors=errors)


# -------------------------------------------------------------------------- 7. mean IoU, Table 7

PALETTE = torch.tensor([  # of labels 0 to 255, 0 is black: three of a label's bits for each colour
    [sum((label >> 3 * k + c & 1) << 7 - k for k in range(3)) for c in range(3)]
    for label in range(256)], dtype=torch.uint8)


def miou(cfg, machine):
    """Mean IoU of a segmenter on images/validation at single scale, and miou_*.png of some images:
    image, truth, prediction."""
    model, saved = load_model(cfg, machine, segments=True)
    recipe = saved["config"]
    source = Scenes(cfg.data, "validation", recipe["labels"])
    shown = set(np.linspace(0, len(source) - 1, cfg.pictures).astype(int).tolist())

    def show(number, image, labels, found):
        if number in shown:
            panels = [image.cpu(), *(PALETTE[x.cpu().long()].movedim(2, 0)
                                     for x in (labels, found + 1))]
            picture = crop.to_image(torch.cat(panels, 2))
            save_file(f"{folder_of(cfg)}/miou_{number:05d}.png", lambda f: picture.save(f, "PNG"))

    scenes = crop.Samples(source, range(len(source)), 0, whole_scene, replace=False)
    images = Batches(scenes, machine, cfg.workers, 1)
    return mean_iou(model, images, recipe["labels"], recipe["test_size"], machine, show)


# --------------------------------------------------------------------------- 8. maps, Figures 5, 6

def maps(cfg, machine):
    """How well a pre-trained model finds exemplars in images; figures.png."""
    saved = load_checkpoint(cfg.ckpt)
    if saved is None or "decoder" not in saved.get("config", ()):
        raise InputError(f"--bench=maps takes the ckpt.pt of a pre-training run, not {cfg.ckpt!r}")
    recipe = pretrain.Config(**saved["config"])
    cim = pretrain.build_model(recipe)
    cim.load_state_dict(saved["model"])
    source, rows = rows_to_score(cfg, saved, machine)
    if isinstance(rows, range):  # for varied pictures
        rows = np.random.default_rng(recipe.seed).permutation(rows).tolist()
    held_out = pretrain.HeldOut(source, rows, recipe, machine, cfg.workers, keep=False)
    score = held_out.evaluate(cim.to(machine.device))
    if machine.rank == 0:
        held_out.paint(cim, f"{folder_of(cfg)}/figures.png", max(1, cfg.pictures))
        machine.say(f"wrote figures.png into {folder_of(cfg)}")
    return score


# ---------------------------------------------------------------------------------- 9. features

TILE = 112  # pixels of an image in neighbours.png and pca.png


def features(cfg, machine):
    """Features of the images of a folder, or of its val/: features.npz with `names` and `features`,
    float32 [n, width] of unit length; neighbours.png, six images, each with the five nearest to it;
    pca.png, the six, with the first three principal components of their patch tokens as red, green
    and blue."""
    model = frozen_encoder(cfg, machine)
    source, rows = rows_to_score(cfg, None, machine)  # all of them
    crops = centre_crops(source, rows, cfg.size, 0.95)
    found, numbers = normalised_features(
        model, Batches(crops, machine, cfg.workers), len(source), machine)
    if machine.rank == 0:
        numbers = numbers.tolist()
        names = np.array([os.fsdecode(source.paths[i]) for i in numbers])
        arrays = dict(names=names, features=found.cpu().numpy())
        save_file(f"{folder_of(cfg)}/features.npz", lambda f: np.savez(f, **arrays))
        shown = torch.linspace(0, len(found) - 1, min(6, len(found))).long()
        nearest = (found[shown] @ found.T).topk(min(6, len(found))).indices.cpu()  # itself first
        save_tiles(f"{folder_of(cfg)}/neighbours.png",
                   [[tile(source, numbers[i], TILE) for i in row] for row in nearest])
        images = torch.stack([tile(source, numbers[i], cfg.size) for i in shown])
        with torch.no_grad():
            x = crop.normalize(machine.send(images).float() / 255)
            tokens = model.encoder(x)[:, model.encoder.prefix:]  # [6, N, D]
        tokens = tokens - tokens.mean((0, 1))
        axes = torch.linalg.svd(tokens.flatten(0, 1), full_matrices=False).Vh[:3]
        colours = as_grid(tokens @ axes.T)  # [6, 3, side, side]
        low, high = colours.amin((0, 2, 3), True), colours.amax((0, 2, 3), True)
        colours = (255 * (colours - low) / (high - low)).byte().cpu()
        save_tiles(f"{folder_of(cfg)}/pca.png",
                   [[F.interpolate(x[None], TILE)[0] for x in row] for row in (images, colours)])
        machine.say(f"wrote features.npz, neighbours.png and pca.png into {folder_of(cfg)}")
    return dict(width=found.shape[1], n=len(found), size=cfg.size)


def tile(source, i, size):
    """Image i of a source, its centre: uint8 [3, size, size]."""
    with source.open(i) as image:
        return crop.cut_centre(image, None, size)


def save_tiles(path, rows):
    """Rows of uint8 images of one size as one picture."""
    picture = crop.to_image(torch.cat([torch.cat(row, 2) for row in rows], 1))
    save_file(path, lambda f: picture.save(f, "PNG"))


BENCHES = {"top1": top1, "knn": knn, "fgsm": attacked, "pgd": attacked, "imagenet_c": imagenet_c,
           "imagenet_a": subset, "imagenet_r": subset, "imagenet_sketch": subset, "miou": miou,
           "maps": maps, "features": features}


if __name__ == "__main__":
    run(main)
