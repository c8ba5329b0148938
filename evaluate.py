"""evaluate.py: how good it is and where it breaks, one command for each number (Tables 7, 8).

    python evaluate.py --bench=top1 --ckpt=out/finetune/model.pt --data=FOLDER
    python evaluate.py --bench=knn --ckpt=out/pretrain/encoder.pt --data=FOLDER
    python evaluate.py --bench=miou --ckpt=out/segment/model.pt --data=FOLDER
    python evaluate.py --bench=maps --ckpt=out/pretrain/ckpt.pt --data=FOLDER
    torchrun --nproc_per_node=8 evaluate.py ...              the same number, sooner

    1. Config      every field is a flag
    2. main        one bench, one JSON line, kept in the run's folder as BENCH.json
    3. the model   a classifier, a segmenter, an encoder from any file, or an untrained one
    4. accuracy    top1
    5. k-NN        knn
    6. robustness  fgsm, pgd, imagenet_c, imagenet_a, imagenet_r, imagenet_sketch (Table 8)
    7. mean IoU    miou, of a segmenter (Table 7)
    8. maps        of a pre-trained model (Figures 5 and 6)
"""

import contextlib
import glob
import json
import os
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import crop
import finetune
import pretrain
from crop import InputError
from finetune import (Batches, accuracy, centre_crops, check_outputs, check_size, labelled_data,
                      load_weights, match_labels, mean_iou, open_scenes, read_weights, whole_scenes)
from model import ENCODERS, Classifier, Segmenter
from pretrain import (Count, Positive, Real, Share, Switch, Whole, Workers, load_checkpoint, number,
                      parse_config, restore, run, save_picture, save_text, setup_machine)


# ------------------------------------------------------------------------------------ 1. Config

Side = number(int, lambda x: 0 <= x <= 4096, "from 0 to 4096")


@dataclass(frozen=True)
class Config:
    """What to measure. A field's type parses its flag, its comment is the flag's line in --help."""

    bench: Literal["top1", "knn", "fgsm", "pgd", "imagenet_c", "imagenet_a", "imagenet_r",
                   "imagenet_sketch", "miou", "maps"] = "top1"  # what to measure
    ckpt: str = "out/finetune/model.pt"  # knn: any file of weights, or scratch; maps: ckpt.pt
    use_target: Switch = False  # score the moving average of a pre-training checkpoint
    model: Literal["auto", *ENCODERS] = "auto"  # the encoder, for --ckpt=scratch
    data: str = "data/imagenet"  # val/CLASS/* or CLASS/*, a built-in source; miou: as ADE20K
    classes: str = ""  # a file with the names of the class folders to keep, one a line
    out: str = ""  # where BENCH.json goes; by default the folder of --ckpt
    size: Side = 0  # pixels; 0 is what a model was validated at, else 224
    test_crop: Share = 0.0  # centre crop over shorter side; 0 is as validated, else 0.95
    k: Count = 20  # nearest neighbours that vote (knn)
    temperature: Positive = 0.07  # of their votes, exp(cosine / temperature) (knn)
    eps: Real = 1.0  # largest change of a pixel in 255ths (fgsm, pgd)
    step: Real = 0.5  # change of a pixel in one step, in 255ths (pgd)
    steps: Count = 5  # steps of the attack (pgd)
    rows: Count = 3  # images in the picture (maps)
    pictures: Whole = 0  # images to paint with truth and prediction, miou_*.png (miou)
    seed: Whole = 0  # of an untrained encoder, a split without val/ (knn) and random starts (pgd)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the chip has it
    workers: Workers = -1  # loader processes for each process; -1 uses the cores at hand


# -------------------------------------------------------------------------------------- 2. main

FRACTIONS = ("skill", "loss", "baseline")  # other scores are in percent


def folder_of(cfg):
    """Where results go."""
    return cfg.out or ("out/scratch" if cfg.ckpt == "scratch" else os.path.dirname(cfg.ckpt) or ".")


def main(argv=None):
    """Run one bench; print its scores and, as the last line, its JSON."""
    cfg = parse_config(Config, {}, argv, __doc__.split("\n")[0])
    machine = setup_machine(cfg.device, cfg.dtype, "false")
    began = time.perf_counter()
    result = BENCHES[cfg.bench](cfg, machine)
    if machine.rank > 0:
        return
    seconds = time.perf_counter() - began
    images = result["n"] + result.get("bank", 0)
    report = dict(bench=cfg.bench, **result, seconds=seconds, images_per_s=images / seconds,
                  ckpt=cfg.ckpt, use_target=cfg.use_target, data=cfg.data, processes=machine.world,
                  dtype=machine.dtype)
    report = json.loads(json.dumps(report), parse_float=lambda x: round(float(x), 4))
    for name in result:
        if isinstance(report[name], (int, float)):
            unit = "%" if isinstance(report[name], float) and name not in FRACTIONS else ""
            print(f"{name:>10}  {report[name]:g}{unit}")
    name = cfg.bench + "_target" * cfg.use_target + ".json"
    save_text(os.path.join(folder_of(cfg), name), json.dumps(report))
    print(json.dumps(report))


# --------------------------------------------------------------------------------- 3. the model

def load_model(cfg, machine):
    """-> (the model that --bench needs, in evaluation mode on the device; its class names; (pixels,
    centre crop) that it was validated at; the top-1 that it reached there).

    miou takes a segmenter; knn any encoder, with a head or not, whose features without one are its
    own tokens, pooled; all others a classifier. Raises InputError when the file is none of that."""
    with machine.first():
        torch.manual_seed(cfg.seed)
        name, state, saved = cfg.model, {}, {}
        if cfg.ckpt != "scratch":
            name, state, saved = read_weights(cfg.ckpt, cfg.use_target)
            if cfg.model not in ("auto", name):
                raise InputError(f"{cfg.ckpt!r} holds {name}, not {cfg.model}; leave out --model")
        elif name == "auto" or cfg.use_target:
            raise InputError("--ckpt=scratch needs --model, and has no target")
        recipe, classes = finetune.Config(), saved.get("classes")  # of a model.pt
        if classes is not None:
            recipe = restore(finetune.Config, saved.get("config"), cfg.ckpt)
            if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)
                    and isinstance(saved.get("top1", saved.get("miou")), float)):
                raise InputError(f"{cfg.ckpt!r} lacks the names of its classes, or its score")
        kind = "encoder" if not classes else "segmenter" if recipe.segments else "classifier"
        fitting = {"miou": ["segmenter"], "knn": ["encoder", "classifier"]}
        fitting = fitting.get(cfg.bench, ["classifier"])
        if kind not in fitting:
            raise InputError(f"{cfg.ckpt!r} holds {name} as a {kind}: --bench={cfg.bench} takes a "
                             f"{' or '.join(fitting)}, as finetune.py writes it to model.pt")
        view = cfg.size or recipe.test_size, cfg.test_crop or recipe.test_crop
        check_size(name, view[0])
        if kind == "segmenter":
            model = Segmenter(name, len(classes), width=recipe.head_width)
        else:
            model = Classifier(name, len(classes or "1"), probe=recipe.frozen or not classes)
        if state:
            load_weights(model, state, cfg.ckpt, head=bool(classes))
    return model.to(machine.device).eval(), classes, view, saved.get("top1")


# ---------------------------------------------------------------------------------- 4. accuracy

def class_folders(folder, known, machine, keep=None):
    """-> (source, labels among the `known` classes, labelled rows) of a folder of class folders or
    a built-in source. Raises InputError: a class that is not known, an empty class folder."""
    with machine.first():
        source = crop.open_images(folder, "val", keep)
        labels = match_labels(source, known, folder)
        if folder not in crop.BUILT_IN and keep is None:
            folders = {f.name for f in os.scandir(folder) if f.is_dir() and f.name[0] != "."}
            empty = sorted(folders - set(source.classes))
            if empty:
                raise InputError(f"{folder!r} has no images in {len(empty)} of its class folders: "
                                 f"{', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}")
        rows = [i for i, label in enumerate(labels) if label >= 0]
        if not rows:
            raise InputError(f"{folder!r} has no images in class folders")
    return source, torch.tensor(labels), rows


def validation_folder(data):
    """val/ if there is one, else the folder itself (or a built-in source)."""
    folder = os.path.join(data, "val")
    return folder if data not in crop.BUILT_IN and os.path.isdir(folder) else data


def top1(cfg, machine, attack=None):
    """Top-1 and top-5 accuracy of a classifier on centre crops; classes are found by name."""
    model, classes, view, _ = load_model(cfg, machine)
    source, labels, rows = class_folders(validation_folder(cfg.data), classes, machine,
                                         crop.read_classes(cfg.classes))
    images = Batches(centre_crops(source, rows, *view), cfg.workers, machine)
    score = accuracy(model, images, labels, machine, attack=attack)
    return dict(top1=score["top1"], top5=score["top5"], n=score["n"])


# --------------------------------------------------------------------------------------- 5. k-NN

def normalised_features(model, images, count, machine):
    """-> ([n, width] features of unit length on the device, their numbers in the source [n]) of
    the readable images among `count`, on every process."""
    table = torch.zeros(count, model.head.in_features, device=machine.device)
    with torch.no_grad():
        for x, numbers in images:
            with machine.autocast():
                features = model.features(crop.normalize(x.float() / 255))
            table[machine.send(numbers)] = F.normalize(check_outputs(features.float()))
    machine.sum(table)
    seen = table.any(1)  # the rows of other images are 0
    return table[seen], seen.nonzero().squeeze(1).cpu()


def vote(queries, bank, labels, classes, k, temperature):
    """Classes [N] for queries [N, D] by the k nearest of bank [M, D] (of unit length) with labels
    [M]: each votes for its own with exp(cosine / temperature)."""
    chosen = []
    for q in queries.split(max(1, 2**26 // len(bank))):  # 256 MB of cosines at a time
        cosine, nearest = (q @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(q), classes, device=q.device)
        # Relative to the nearest: the same vote, which neither overflows nor vanishes.
        weights = ((cosine - cosine[:, :1]) / max(temperature, 1e-6)).exp()
        votes.scatter_add_(1, labels[nearest], weights)
        chosen.append(votes.argmax(1))
    return torch.cat(chosen)


def knn(cfg, machine):
    """Weighted k-nearest-neighbour accuracy of frozen features: training images vote."""
    model, _, view, _ = load_model(cfg, machine)
    with machine.first():
        (train, rows), (val, val_rows), _ = labelled_data(cfg)
    sides = []
    for source, wanted in ((train, rows), (val, val_rows)):
        images = Batches(centre_crops(source, wanted, *view), cfg.workers, machine)
        features, numbers = normalised_features(model, images, len(source), machine)
        sides.append((features, machine.send(torch.tensor(source.labels)[numbers])))
    (bank, bank_labels), (queries, labels) = sides
    if not len(bank) or not len(queries):
        raise InputError("none of the images could be read")
    mine = slice(machine.rank, None, machine.world)
    chosen = vote(queries[mine], bank, bank_labels, len(train.classes), cfg.k, cfg.temperature)
    hits = (chosen == labels[mine]).sum().float()
    machine.sum(hits)
    return dict(knn=100 * hits.item() / len(labels), n=len(labels), bank=len(bank))


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
    return {cfg.bench: score["top1"], "clean": top1(cfg, machine)["top1"], "n": score["n"]}


def subset(cfg, machine):
    """ImageNet-A, -R and -Sketch [29, 30, 60]: folders of some of the model's classes, found by
    name; only these are predicted."""
    model, classes, view, clean = load_model(cfg, machine)
    source, labels, rows = class_folders(validation_folder(cfg.data), classes, machine)
    among = sorted(set(labels[rows].tolist()))
    if machine.rank == 0:
        print(f"protocol: {len(among)} of the model's {len(classes)} classes have a folder here; "
              "only they are predicted")
    numbers = torch.full((len(classes),), -1)
    numbers[among] = torch.arange(len(among))
    images = Batches(centre_crops(source, rows, *view), cfg.workers, machine)
    score = accuracy(model, images, numbers[labels], machine, among=among)
    return {cfg.bench: score["top1"], "top5": score["top5"], "clean": clean,
            "classes": len(among), "n": score["n"]}


ALEXNET = {  # mean top-1 error over the five severities, from the benchmark's authors [29]
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500}


def corruption_error(errors):
    """{corruption: five errors in percent} -> (mCE, the plain mean error). mCE: the mean over 15
    corruptions of the error relative to AlexNet's, in percent; None when a corruption is missing.
    """
    means = {name: sum(e) / len(e) for name, e in errors.items()}
    complete = means.keys() == ALEXNET.keys()
    mce = sum(m / ALEXNET[name] for name, m in means.items()) / len(ALEXNET) if complete else None
    return mce, sum(means.values()) / len(means)


def imagenet_c(cfg, machine):
    """ImageNet-C [29]: CORRUPTION/SEVERITY/CLASS/*, as published or one folder deeper. The images
    have the right size already: they are not cropped."""
    model, classes, view, clean = load_model(cfg, machine)
    errors, n, found = {}, 0, None
    for name in ALEXNET:
        deeper = glob.glob(os.path.join(glob.escape(cfg.data), "*", name))
        for folder in (os.path.join(cfg.data, name), *deeper):
            severities = [os.path.join(folder, severity) for severity in "12345"]
            if name in errors or not all(map(os.path.isdir, severities)):
                continue
            errors[name] = []
            for severity in severities:
                source, labels, rows = class_folders(severity, classes, machine)
                found = found or source.classes
                if source.classes != found:
                    some = sorted(set(found) ^ set(source.classes))[:5]
                    raise InputError(f"{severity!r} has other class folders than the first one "
                                     f"that was read: {', '.join(some)}")
                images = Batches(centre_crops(source, rows, view[0], 1.0), cfg.workers, machine)
                score = accuracy(model, images, labels, machine)
                errors[name].append(100 - score["top1"])
                n += score["n"]
            if machine.rank == 0:
                print(f"{name:>18}" + "".join(f"  {e:6.2f}" for e in errors[name]), flush=True)
    if not errors:
        raise InputError(f"{cfg.data!r} has none of the 15 corruptions in five severities each: "
                         "it should hold gaussian_noise/1/CLASS/* to jpeg_compression/5/CLASS/*")
    missing = [name for name in ALEXNET if name not in errors]  # then there is no mCE
    mce, mean_error = corruption_error(errors)
    return {"mce": mce, "mean_error": mean_error, "clean": clean, "n": n, "errors": errors,
            "missing": missing}


# -------------------------------------------------------------------------- 7. mean IoU, Table 7

PALETTE = torch.tensor([  # of labels 0 to 255, 0 is black: three of a label's bits for each colour
    [sum((label >> 3 * k + c & 1) << 7 - k for k in range(3)) for c in range(3)]
    for label in range(256)], dtype=torch.uint8)


def miou(cfg, machine):
    """Mean IoU of a segmenter on images/validation at single scale, and miou_*.png of some images:
    image, truth, prediction."""
    model, classes, (size, _), _ = load_model(cfg, machine)
    with machine.first():
        (source,), _ = open_scenes(cfg.data, ["validation"], classes)
    shown = set(np.linspace(0, len(source) - 1, cfg.pictures).astype(int).tolist())

    def show(number, image, labels, found):
        if number in shown:
            stem = os.path.splitext(os.path.basename(source.name(number)))[0]
            panels = [image.cpu(), *(PALETTE[x.cpu().long()].movedim(2, 0)
                                     for x in (labels, found + 1))]
            save_picture(os.path.join(folder_of(cfg), f"miou_{number:05d}_{stem}.png"),
                         crop.to_image(torch.cat(panels, 2)))

    rows = list(range(len(source)))
    images = Batches(whole_scenes(source, rows), cfg.workers, machine, batch=1)
    score = mean_iou(model, images, len(classes), size, machine, show)
    score["iou"] = dict(zip(classes, score["iou"]))
    for name, iou in score["iou"].items() if machine.rank == 0 else ():
        print(f"{name:>20}  " + ("  none" if iou is None else f"{iou:6.2f}"))
    return score


# --------------------------------------------------------------------------- 8. maps, Figures 5, 6

def maps(cfg, machine):
    """How well a pre-trained model finds exemplars in images: cross-entropy, skill, and the mean
    IoU of its maps at 0.5, over a whole folder; figures.png; and strip.png, how the maps of one
    image came about in the run."""
    with machine.first():
        saved = load_checkpoint(cfg.ckpt)
        if saved is None:
            raise InputError(f"there is no file {cfg.ckpt!r}")
        if "decoder_width" not in saved["config"]:
            raise InputError(f"--bench=maps takes the ckpt.pt of a pre-training run, not "
                             f"{cfg.ckpt!r}")
        recipe = restore(pretrain.Config, saved["config"], cfg.ckpt)
        cim = pretrain.build_model(recipe)
        pretrain.load_states(saved, cfg.ckpt, cim)
        cim.to(machine.device).eval()
        source = crop.open_images(validation_folder(cfg.data), "val",
                                  crop.read_classes(cfg.classes))
    dataset = pretrain.contexts_of(source, range(len(source)), recipe, replace=False)
    u, mean = pretrain.uniforms(recipe, (5,), len(source)), pretrain.mean_map(recipe, machine)

    def predict(contexts, numbers):  # -> context, exemplars, maps, theta, logits
        pairs = pretrain.make_pairs(contexts, machine.send(u[numbers]), recipe)
        with pretrain.measuring(cim, machine):
            return *pairs, check_outputs(cim(*pairs[:3])[1].float())

    table = torch.zeros(len(source), recipe.exemplars, 3, device=machine.device)
    for contexts, numbers in Batches(dataset, cfg.workers, machine, batch=16):
        _, _, truth, _, logits = predict(contexts, numbers)
        table[machine.send(numbers)] = map_scores(truth, logits, mean)
    machine.sum(table)
    seen = (table[:, 0, 1] > 0).nonzero().squeeze(1)  # images that could be read
    if not len(seen):
        raise InputError(f"none of the images in {cfg.data!r} could be read")
    if machine.rank == 0:  # images from all over the folder
        shown = seen[torch.linspace(0, len(seen) - 1, cfg.rows).long()].tolist()
        contexts, numbers = crop.collate([dataset[0, i] for i in shown])
        picture = crop.contact_sheet(*(x.cpu() for x in predict(machine.send(contexts), numbers)))
        save_picture(os.path.join(folder_of(cfg), "figures.png"), picture)
        save_strip(cfg)
    loss, baseline, iou = table[seen].cpu().double().mean((0, 1)).tolist()
    return dict(skill=1 - loss / baseline, iou=100 * iou, loss=loss, baseline=baseline,
                n=len(seen))


def map_scores(maps, logits, mean):
    """Of each exemplar: cross-entropy, that of the mean map, and IoU at 0.5: [B, K, 3]. logits and
    maps [B, K, m, m], mean [m, m]."""
    def entropy(x):
        return F.binary_cross_entropy_with_logits(x, maps, reduction="none").mean((2, 3))

    return torch.stack([entropy(logits), entropy(mean.logit().expand_as(maps)),
                        crop.map_iou(maps, logits)], -1)


def save_strip(cfg, count=6):
    """strip.png from the run's maps/STEP.png: the first whole, below it the predicted maps of later
    ones, up to the last, at about equal ratios of steps."""
    sheets = {}
    for path in glob.glob(os.path.join(glob.escape(os.path.dirname(cfg.ckpt)), "maps", "*.png")):
        with contextlib.suppress(Exception):  # a picture of something else, or a torn one
            sheets[int(os.path.splitext(os.path.basename(path))[0])] = crop.to_rgb(
                crop.open_image(path))
    if not sheets:
        return
    size = sheets[max(sheets)].size
    steps = sorted(step for step in sheets if sheets[step].size == size)
    row = crop.TILE + crop.TILE // 12  # a tile and the gap below it
    font, bands = ImageFont.load_default(crop.TILE // 7), []
    for k in sorted({round(k) - 1 for k in np.geomspace(1, len(steps), count)}):
        band = sheets[steps[k]]
        if bands:  # a later one
            band = band.crop((0, band.height - row, band.width, band.height))
            band.paste("white", (0, 0, 3 * row, row))  # over the context
        edge, middle = 3 * row + crop.TILE * 3 // 4, band.height - row // 2
        band.paste("white", (3 * row, band.height - row, edge, band.height))  # over "predicted"
        ImageDraw.Draw(band).text((edge - 4, middle), f"step {steps[k]}", "#333333", font,
                                  anchor="rm")
        bands.append(band)
    save_picture(os.path.join(folder_of(cfg), "strip.png"), Image.fromarray(np.concatenate(bands)))


BENCHES = {"top1": top1, "knn": knn, "fgsm": attacked, "pgd": attacked, "imagenet_c": imagenet_c,
           "imagenet_a": subset, "imagenet_r": subset, "imagenet_sketch": subset, "miou": miou,
           "maps": maps}


if __name__ == "__main__":
    run(main)
