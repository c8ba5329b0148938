"""evaluate.py: how good it is and where it breaks, one command for each number (Tables 7, 8).

    python evaluate.py --bench=top1 --ckpt=out/finetune/model.pt --data=FOLDER
    python evaluate.py --bench=knn --ckpt=out/pretrain/encoder.pt --data=FOLDER
    python evaluate.py --bench=miou --ckpt=out/segment/model.pt --data=FOLDER
    python evaluate.py --bench=maps --ckpt=out/pretrain/ckpt.pt --data=FOLDER
    torchrun --nproc_per_node=8 evaluate.py ...              the same number, sooner

    1. Config      every field is a flag
    2. the model   a classifier, an encoder from any file, or an untrained one
    3. accuracy    top1
    4. k-NN        knn
    5. robustness  fgsm, pgd, imagenet_c, imagenet_a, imagenet_r, imagenet_sketch (Table 8)
    6. mean IoU    miou, of a segmenter (Table 7)
    7. maps        of a pre-trained model (Figures 5 and 6)
    8. curves      of a run's log, and its maps over training
    9. main        one JSON line, kept in the run's folder as BENCH.json or BENCH_target.json
"""

import contextlib
import glob
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import crop
import pretrain
from crop import InputError
from finetune import (Batches, accuracy, centre_crops, check_size, labelled_data, load_weights,
                      match_labels, mean_iou, open_scenes, read_weights, whole_scenes)
from model import ENCODERS, Classifier, Segmenter
from pretrain import (check_values, load_checkpoint, make_folder, parse_config, read_log, refuse,
                      run, save_file, save_picture, setup_machine)


# ------------------------------------------------------------------------------------ 1. Config

@dataclass(frozen=True)
class Config:
    """What to measure. A field's comment is its line in --help."""

    bench: str = "top1"  # top1, knn, fgsm, pgd, imagenet_c, _a, _r, _sketch, miou, maps, curves
    ckpt: str = "out/finetune/model.pt"  # knn: any file of weights, or scratch; maps: ckpt.pt
    use_target: bool = False  # score the moving average of a pre-training checkpoint
    model: str = "auto"  # the encoder, for --ckpt=scratch
    data: str = "data/imagenet"  # val/CLASS/* or CLASS/*, a built-in source; miou: as ADE20K
    classes: str = ""  # a file with the names of the class folders to keep, one a line
    out: str = ""  # where BENCH.json goes; by default the folder of --ckpt
    size: int = 0  # pixels; 0 is what a model was validated at, else 224
    test_crop: float = 0.0  # centre crop over shorter side; 0 is as validated, else 0.95
    k: int = 20  # nearest neighbours that vote (knn)
    temperature: float = 0.07  # of their votes, exp(cosine / temperature) (knn)
    eps: float = 1.0  # largest change of a pixel in 255ths (fgsm, pgd)
    step: float = 0.5  # change of a pixel in one step, in 255ths (pgd)
    steps: int = 5  # steps of the attack (pgd)
    rows: int = 3  # images in the picture (maps)
    pictures: int = 0  # images to paint with truth and prediction, miou_*.png (miou)
    seed: int = 0  # of an untrained encoder, a split without val/ (knn) and random starts (pgd)
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16; auto is bfloat16 where the chip multiplies it
    workers: int = -1  # loader processes for each process; -1 uses the cores at hand

    def __post_init__(self):
        """Raise InputError for values that cannot work, before any work starts."""
        check_values(self, bench=BENCHES, model=("auto", *ENCODERS))
        if self.bench == "miou":
            refuse(self, {}, "--bench miou", "classes", "test_crop", "model")
        if self.bench in ("maps", "curves"):
            refuse(self, {}, f"--bench {self.bench}", "use_target", "size", "test_crop", "model")


# --------------------------------------------------------------------------------- 2. the model

def load_model(cfg, machine):
    """-> (Classifier in evaluation mode on the device, its class names, (pixels, centre crop) that
    it was validated at, the top-1 that it reached there).

    The class names are None for an encoder without a head; its features are then its own tokens,
    pooled. Raises InputError when the file is none, or not what --model says.
    """
    classes, size, ratio, top1 = None, 224, 0.95, None
    if cfg.ckpt == "scratch":
        if cfg.model == "auto" or cfg.use_target:
            raise InputError("--ckpt=scratch needs --model, and has no target")
        torch.manual_seed(cfg.seed)
        model = Classifier(cfg.model, 1, probe=True)
    else:
        name, state, saved = read_weights(cfg.ckpt, cfg.use_target)
        if cfg.model not in ("auto", name):
            raise InputError(f"{cfg.ckpt!r} holds {name}, not {cfg.model}; leave out --model")
        probe = True
        if saved.keys() >= {"weights", "classes", "config"}:  # a model.pt
            classes, config, top1 = saved["classes"], saved["config"], saved.get("top1")
            if config.get("task") == "segment":
                raise InputError(f"{cfg.ckpt!r} segments images: --bench=miou is for that")
            size, ratio, probe = config["test_size"], config["test_crop"], config["frozen"]
        model = Classifier(name, len(classes) if classes else 1, probe=probe)
        load_weights(model, state, cfg.ckpt, head=classes is not None)
    view = cfg.size or size, cfg.test_crop or ratio
    check_size(cfg.model if cfg.ckpt == "scratch" else name, view[0])
    return model.to(machine.device).eval(), classes, view, top1


# ---------------------------------------------------------------------------------- 3. accuracy

def load_classifier(cfg, machine):
    """load_model, where there must be a classifier."""
    model, classes, view, top1 = load_model(cfg, machine)
    if classes is None:
        raise InputError(f"{cfg.ckpt!r} has no classifier: --bench={cfg.bench} takes the model.pt "
                         "that finetune.py writes")
    return model, classes, view, top1


def class_folders(place, known, machine, keep=None):
    """-> (source, labels among the `known` classes, labelled rows) of a folder of class folders or
    a built-in source. Raises InputError: a class that is not known, an empty class folder."""
    with machine.first():
        source = crop.open_images(place, "val", keep)
    labels = match_labels(source, known, place)
    if os.path.isdir(place):
        folders = {f.name for f in os.scandir(place) if f.is_dir() and f.name[0] != "."}
        empty = sorted(folders - set(source.classes)) if keep is None else []
        if empty:
            raise InputError(f"{place!r} has no images in {len(empty)} of its class folders: "
                             f"{', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}")
    rows = [i for i, label in enumerate(labels) if label >= 0]
    if not rows:
        raise InputError(f"{place!r} has no images in class folders")
    return source, torch.tensor(labels), rows


def validation_place(data):
    """val/ if there is one, else the folder itself (or a built-in source)."""
    place = os.path.join(data, "val")
    return place if os.path.isdir(place) else data


def top1(cfg, machine, attack=None):
    """Top-1 and top-5 accuracy of a classifier on centre crops; classes are found by name."""
    model, classes, view, _ = load_classifier(cfg, machine)
    source, labels, rows = class_folders(validation_place(cfg.data), classes, machine,
                                         crop.read_classes(cfg.classes))
    images = Batches(centre_crops(source, rows, *view), cfg.workers, machine)
    score = accuracy(model, images, labels, machine, attack=attack)
    return dict(top1=score["top1"], top5=score["top5"], n=score["n"])


# --------------------------------------------------------------------------------------- 4. k-NN

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
    seen = table.any(1)  # others are nought
    return table if seen.all() else table[seen], seen.nonzero().squeeze(1).cpu()


def vote(queries, bank, labels, classes, k, temperature):
    """Classes [N] for queries [N, D] by the k nearest of bank [M, D] (of unit length) with labels
    [M]: each votes for its own with exp(cosine / temperature)."""
    chosen = []
    for q in queries.split(max(1, 2**26 // len(bank))):  # 256 MB of cosines at a time
        cosine, nearest = (q @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(q), classes, device=q.device)
        weights = ((cosine - 1) / temperature).exp()  # - 1: the same vote, no overflow
        votes.scatter_add_(1, labels[nearest], weights)
        chosen.append(votes.argmax(1))
    return torch.cat(chosen)


def knn(cfg, machine):
    """Weighted k-nearest-neighbour accuracy of frozen features: training images vote."""
    model, _, view, _ = load_model(cfg, machine)
    (train, rows), (val, val_rows), _ = labelled_data(cfg, machine)
    sides = []
    for source, wanted in ((train, rows), (val, val_rows)):
        images = Batches(centre_crops(source, wanted, *view), cfg.workers, machine)
        features, numbers = normalised_features(model, images, len(source), machine)
        sides.append((features, machine.send(torch.tensor(source.labels)[numbers])))
    (bank, bank_labels), (queries, labels) = sides
    mine = slice(machine.rank, None, machine.world)
    chosen = vote(queries[mine], bank, bank_labels, len(train.classes), cfg.k, cfg.temperature)
    hits = (chosen == labels[mine]).sum().float()
    machine.sum(hits)
    return dict(knn=100 * hits.item() / len(labels), n=len(labels), bank=len(bank))


# --------------------------------------------------------------------------- 5. robustness, Table 8

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


def fgsm(cfg, machine):
    """The fast gradient sign method [24]: one step of eps from the clean image."""
    eps = cfg.eps / 255
    return under_attack(cfg, machine, lambda model, x, y, numbers: perturb(
        model, x, y, torch.zeros_like(x), eps, eps, 1))


def pgd(cfg, machine):
    """Projected gradient descent [42]: steps of step from a random start, seeded by the image."""
    def attack(model, x, y, numbers):
        start = [np.random.default_rng((cfg.seed, 8, j)).random(x.shape[1:], dtype=np.float32)
                 for j in numbers.tolist()]
        start = machine.send(torch.from_numpy(np.stack(start))) * 2 - 1
        return perturb(model, x, y, start * cfg.eps / 255, cfg.eps / 255, cfg.step / 255, cfg.steps)

    return under_attack(cfg, machine, attack)


def under_attack(cfg, machine, attack):
    """Top-1 on attacked and on clean images."""
    score, clean = top1(cfg, machine, attack), top1(cfg, machine)
    return {cfg.bench: score["top1"], "clean": clean["top1"], "n": score["n"]}


def subset(cfg, machine):
    """ImageNet-A, -R and -Sketch [29, 30, 60]: folders of some of the model's classes, found by
    name; only these are predicted."""
    model, classes, view, clean = load_classifier(cfg, machine)
    source, labels, rows = class_folders(validation_place(cfg.data), classes, machine)
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
    model, classes, view, clean = load_classifier(cfg, machine)
    errors, missing, n = {}, [], 0
    for name in ALEXNET:
        places = [os.path.join(cfg.data, name), *glob.glob(os.path.join(cfg.data, "*", name))]
        places = [p for p in places if all(os.path.isdir(os.path.join(p, s)) for s in "12345")]
        if not places:
            missing.append(name)
            continue
        errors[name] = []
        for severity in "12345":
            source, labels, rows = class_folders(os.path.join(places[0], severity), classes,
                                                 machine)
            images = Batches(centre_crops(source, rows, view[0], 1.0), cfg.workers, machine)
            score = accuracy(model, images, labels, machine)
            errors[name].append(100 - score["top1"])
            n += score["n"]
        if machine.rank == 0:
            print(f"{name:>18}" + "".join(f"  {e:6.2f}" for e in errors[name]), flush=True)
    if not errors:
        raise InputError(f"{cfg.data!r} has none of the 15 corruptions in five severities each: "
                         "it should hold gaussian_noise/1/CLASS/* to jpeg_compression/5/CLASS/*")
    if missing and machine.rank == 0:
        print(f"no mCE: {', '.join(missing)} missing or without severities 1 to 5",
              file=sys.stderr)
    mce, mean_error = corruption_error(errors)
    return {"mce": mce, "mean_error": mean_error, "clean": clean, "n": n, "errors": errors,
            "missing": missing}


# -------------------------------------------------------------------------- 6. mean IoU, Table 7

PALETTE = torch.tensor([  # of labels 0 to 255, 0 is black: three of a label's bits for each colour
    [sum((label >> 3 * k + c & 1) << 7 - k for k in range(3)) for c in range(3)]
    for label in range(256)], dtype=torch.uint8)


def load_segmenter(cfg, machine):
    """-> (Segmenter in evaluation mode on the device, its class names, pixels of a window)."""
    saved = {}
    if cfg.ckpt != "scratch":
        name, state, saved = read_weights(cfg.ckpt, cfg.use_target)
    recipe = saved.get("config") or {}
    if "classes" not in saved or recipe.get("task") != "segment":
        raise InputError("--bench=miou takes the model.pt of finetune.py --recipe=segment, not "
                         f"{cfg.ckpt!r}")
    model = Segmenter(name, len(saved["classes"]), width=recipe["head_width"])
    load_weights(model, state, cfg.ckpt, head=True)
    size = cfg.size or recipe["test_size"]
    check_size(name, size)
    return model.to(machine.device).eval(), saved["classes"], size


def paint(image, labels, found):
    """Image uint8 [3, h, w], labels and what was found [h, w], of 0 to N -> a PIL image of the
    three side by side."""
    panels = [image, *(PALETTE[x.long()].movedim(2, 0) for x in (labels, found))]
    return crop.to_image(torch.cat(panels, 2))


def miou(cfg, machine):
    """Mean IoU of a segmenter on images/validation at single scale, and pictures from all over."""
    model, classes, size = load_segmenter(cfg, machine)
    (source,), _ = open_scenes(cfg.data, ["validation"], classes, machine)
    rows = list(range(len(source)))
    shown = set(np.linspace(0, len(source) - 1, cfg.pictures).astype(int).tolist())

    def show(number, image, labels, found):
        if number in shown:
            stem = os.path.splitext(os.path.basename(source.name(number)))[0]
            picture = paint(image.cpu(), labels.cpu(), found.cpu() + 1)
            save_picture(os.path.join(folder_of(cfg), f"miou_{number:05d}_{stem}.png"), picture)

    images = Batches(whole_scenes(source, rows), cfg.workers, machine, batch=1)
    score = mean_iou(model, images, len(classes), size, machine, show)
    score["iou"] = dict(zip(classes, score["iou"]))
    for name, iou in score["iou"].items() if machine.rank == 0 else ():
        print(f"{name:>20}  " + ("  none" if iou is None else f"{iou:6.2f}"))
    return score


# --------------------------------------------------------------------------- 7. maps, Figures 5, 6

def maps(cfg, machine):
    """How well a pre-trained model finds exemplars in images: cross-entropy, skill, and the mean
    IoU of its maps at 0.5, over a whole folder, by area and by angle; and figures.png."""
    saved = None
    with contextlib.suppress(InputError):  # said better below
        saved = load_checkpoint(cfg.ckpt)
    if saved is None or "decoder_width" not in saved["config"]:
        raise InputError(f"--bench=maps takes the ckpt.pt of a pre-training run, not {cfg.ckpt!r}")
    recipe = pretrain.Config(**{k: tuple(v) if isinstance(v, list) else v
                                for k, v in saved["config"].items()})
    cim = pretrain.build_model(recipe)
    cim.load_state_dict(saved["model"])
    cim.to(machine.device).eval()
    with machine.first():
        source = crop.open_images(validation_place(cfg.data), "val",
                                  crop.read_classes(cfg.classes))
    dataset = pretrain.contexts_of(source, range(len(source)), recipe, replace=False)
    u, mean = pretrain.uniforms(recipe, (5,), len(source)), pretrain.mean_map(recipe, machine)

    def predict(contexts, numbers):  # -> context, exemplars, maps, theta, logits
        pairs = pretrain.make_pairs(contexts, machine.send(u[numbers]), recipe)
        with pretrain.measuring(cim, machine):
            return *pairs, cim(*pairs[:3])[1].float()

    table = torch.zeros(len(source), recipe.exemplars, 5, device=machine.device)
    for contexts, numbers in Batches(dataset, cfg.workers, machine, batch=16):
        table[machine.send(numbers)] = map_scores(*predict(contexts, numbers)[2:], mean)
    machine.sum(table)
    seen = (table[:, 0, 2] > 0).nonzero().squeeze(1)  # their areas
    if not len(seen):
        raise InputError(f"none of the images in {cfg.data!r} could be read")
    if machine.rank == 0:  # images from all over the folder
        shown = seen[torch.linspace(0, len(seen) - 1, cfg.rows).long()].tolist()
        contexts, numbers = crop.collate([dataset[0, i] for i in shown])[0]
        picture = crop.contact_sheet(*(x.cpu() for x in predict(machine.send(contexts), numbers)))
        save_picture(os.path.join(folder_of(cfg), "figures.png"), picture)
    return map_report(table[seen].cpu().double(), machine)


def map_scores(maps, theta, logits, mean):
    """Of each exemplar: cross-entropy, that of the mean map, area r0, |angle| in degrees and IoU at
    0.5: [B, K, 5]. logits and maps [B, K, m, m], theta [B, K, 2, 3], mean [m, m]."""
    def entropy(x):
        return F.binary_cross_entropy_with_logits(x, maps, reduction="none").mean((2, 3))

    found, true = logits > 0, maps > 0
    iou = (found & true).sum((2, 3)) / (found | true).sum((2, 3)).clamp(min=1)
    area = torch.linalg.det(theta[..., :2]).abs()
    angle = torch.atan2(-theta[..., 0, 1], theta[..., 1, 1]).abs().rad2deg()
    ignoring = entropy(mean.logit().expand_as(maps))
    return torch.stack([entropy(logits), ignoring, area, angle, iou], -1)


def map_report(table, machine):
    """The means over table [n, K, 5] of map_scores: all, by quartile of r0, by third of the angle.
    """
    rows = table.flatten(0, 1)
    loss, baseline, area, angle, iou = rows.unbind(1)

    def score(chosen):
        ce, ignoring = loss[chosen].mean().item(), baseline[chosen].mean().item()
        return dict(skill=1 - ce / ignoring, iou=100 * iou[chosen].mean().item(), loss=ce,
                    baseline=ignoring)

    parts = {}
    for name, value, count in (("r0", area, 4), ("angle", angle, 3)):
        edges = value.quantile(torch.linspace(0, 1, count + 1).double())
        for i in range(count if edges[0] < edges[-1] else 0):
            chosen = (value >= edges[i]) & ((value < edges[i + 1]) | (i == count - 1))
            parts[f"{name} {edges[i]:.3g} to {edges[i + 1]:.3g}"] = score(chosen)
    total = score(torch.ones_like(loss, dtype=torch.bool))
    for name, row in {"all": total, **parts}.items() if machine.rank == 0 else ():
        print(f"{name:>20}  skill {row['skill']:6.3f}  IoU {row['iou']:5.1f}%  loss "
              f"{row['loss']:.4f}  baseline {row['baseline']:.4f}")
    return total | dict(n=len(table), parts=parts)


# ------------------------------------------------------------------------------------ 8. curves

PANELS = {  # title: {column of the log: its name}
    "loss, nats": {"loss": "training", "heldout_loss": "held-out", "val_loss": "validation"},
    "skill": {"skill": "held-out"},
    "accuracy, %": {"top1": "top-1", "top5": "top-5"},
    "IoU, %": {"miou": "mean IoU"}}


def curves(cfg, machine):
    """What a run's log.jsonl holds, drawn over its steps: curves.png; and of pre-training how the
    maps of one held-out image came about: strip.png. --ckpt is any file of the run's folder."""
    folder = os.path.dirname(cfg.ckpt) or "."
    log = list(read_log(folder))
    if len(log) < 2:
        raise InputError(f"{folder!r} has no log.jsonl of two rows or more: --bench=curves takes "
                         "--ckpt=RUN/ckpt.pt of a training run")
    baseline = next((row["baseline"] for row in log if row.get("baseline")), None)
    levels = {"the best that ignores the exemplar": baseline, "ln 2, a coin": math.log(2)}
    panels = []
    for title, columns in PANELS.items():
        lines = {name: [(row["step"], row[key]) for row in log if row.get(key) is not None]
                 for key, name in columns.items()}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            panels.append(draw_panel(title, lines,
                                     levels if baseline and "loss" in columns else {}))
    if machine.rank == 0:
        save_picture(os.path.join(folder_of(cfg), "curves.png"), stack(panels))
        looks = [path for path in sorted(glob.glob(os.path.join(glob.escape(folder), "maps",
                                                                "[0-9]*.png")))
                 if step_of(path) <= log[-1]["step"]]  # later ones are of steps that were lost
        if looks:
            save_picture(os.path.join(folder_of(cfg), "strip.png"), strip(looks))
    return dict(steps=log[-1]["step"], rows=len(log), loss=log[-1]["loss"])


def draw_panel(title, lines, levels, size=(640, 300)):
    """A plot of lines {name: [(x, y)]} and horizontal ones {name: y}, as a PIL image."""
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    left, top, right, bottom = 56, 28, size[0] - 14, size[1] - 30
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + list(levels.values())
    low, high = min(ys), max(ys) + 1e-9
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)

    def at(x, y):
        return (left + (right - left) * x / max(xs),
                bottom - (bottom - top) * (y - low) / (high - low))

    draw.text((left, 6), title, "black", font)
    for k in range(5):
        x, y = max(xs) * k / 4, low + (high - low) * k / 4
        draw.line([at(0, y), at(max(xs), y)], "#e6e6e6")
        draw.text((left - 6, at(0, y)[1]), f"{y:.3g}", "#555555", font, anchor="rm")
        draw.text((at(x, low)[0], bottom + 6), f"{x:g}", "#555555", font,
                  anchor="lt" if k == 0 else "rt" if k == 4 else "mt")
    for colour, (name, y) in zip(("#888888", "#b0b0b0"), levels.items()):
        draw.line([at(0, y), at(max(xs), y)], colour, 2)
        draw.text((right - 4, at(0, y)[1] + 3), name, colour, font, anchor="rt")
    where = right
    for colour, (name, points) in zip((crop.COLOURS[3], crop.COLOURS[0], crop.COLOURS[2]),
                                      lines.items()):
        draw.line([at(*p) for p in points], colour, 2, joint="curve")
        x, y = at(*points[-1])
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], colour)
        draw.text((where, 6), name, colour, font, anchor="ra")
        where -= draw.textlength(name, font) + 16
    return sheet


def stack(pictures):
    """PIL images under each other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)),
                      "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:k])))
    return sheet


def step_of(path):
    """The number that maps/STEP.png is named by."""
    return int(os.path.splitext(os.path.basename(path))[0])


def strip(looks, rows=6):
    """Contact sheets of one image, STEP.png each, as one: the first whole, then the last row, the
    predicted maps, of later ones at about equal ratios of steps."""
    steps = np.array([step_of(path) for path in looks])
    wanted = np.geomspace(steps[0], steps[-1], rows)
    chosen = sorted({int(np.abs(np.log(steps / w)).argmin()) for w in wanted})
    row, pictures = crop.TILE + crop.TILE // 12, []  # a tile and the gap below it
    for k in chosen:
        with Image.open(looks[k]) as sheet:
            sheet.load()
        if pictures:
            sheet = sheet.crop((0, sheet.height - row, sheet.width, sheet.height))
            ImageDraw.Draw(sheet).rectangle([0, 0, 3 * row, row], "white")  # over the context
        ImageDraw.Draw(sheet).text(
            (3 * row + crop.TILE * 3 // 4 - 4, sheet.height - row + crop.TILE // 2 + 16),
            f"step {steps[k]}", "#333333", ImageFont.load_default(13), anchor="rm")
        pictures.append(sheet)
    return stack(pictures)


BENCHES = {"top1": top1, "knn": knn, "fgsm": fgsm, "pgd": pgd, "imagenet_c": imagenet_c,
           "imagenet_a": subset, "imagenet_r": subset, "imagenet_sketch": subset, "miou": miou,
           "maps": maps, "curves": curves}


# -------------------------------------------------------------------------------------- 9. main

FRACTIONS = ("skill", "loss", "baseline")  # other scores are in percent


def folder_of(cfg):
    """Where results go."""
    return cfg.out or ("out/scratch" if cfg.ckpt == "scratch" else os.path.dirname(cfg.ckpt) or ".")


def main(argv=None):
    """Run one bench; print its scores and, as the last line, its JSON."""
    cfg = parse_config(Config, {}, argv, __doc__.split("\n")[0])
    machine = setup_machine(cfg.device, cfg.dtype, "false")
    with machine.first():
        if cfg.ckpt == "scratch" or os.path.isdir(os.path.dirname(cfg.ckpt) or "."):
            make_folder(folder_of(cfg))
    began = time.perf_counter()
    result = BENCHES[cfg.bench](cfg, machine)
    if machine.rank > 0:
        return
    seconds = time.perf_counter() - began
    report = dict(bench=cfg.bench, **result, seconds=seconds, ckpt=cfg.ckpt,
                  use_target=cfg.use_target, processes=machine.world, dtype=machine.dtype)
    if "n" in result:
        images = result["n"] + result.get("bank", 0)
        report |= dict(data=cfg.data, images_per_s=images / seconds)
    report = json.loads(json.dumps(report), parse_float=lambda x: round(float(x), 4))
    for name in result:
        if isinstance(report[name], (int, float)):
            unit = "%" if isinstance(report[name], float) and name not in FRACTIONS else ""
            print(f"{name:>10}  {report[name]:g}{unit}")
    text = json.dumps(report)
    save_file(os.path.join(folder_of(cfg), cfg.bench + "_target" * cfg.use_target + ".json"),
              lambda f: f.write(text.encode()))
    print(text)


if __name__ == "__main__":
    run(main)
