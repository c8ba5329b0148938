"""finetune.py: what a pre-trained encoder is worth, by fine-tuning it (Tables 5-7, 10 and 11).

    python finetune.py --recipe=demo                       a laptop, after pretrain.py's demo
    python finetune.py --recipe=linear --init=ENCODER      a linear probe of frozen features
    torchrun --nproc_per_node=8 finetune.py --init=out/pretrain/encoder.pt       Table 10, ViT-B/16
    torchrun --nproc_per_node=8 finetune.py --recipe=segment --init=out/finetune/model.pt   Table 7

In the order in which things happen:

    1. Config     every field is a flag; the defaults are Table 10 for ViT-B/16; RECIPES are values
    2. the data   labels, RandAugment, MixUp and CutMix
    3. weights    our files, timm's, torchvision's, the released ones -> an encoder
    4. training   soft targets, learning rates by layer, the model and its optimiser
    5. accuracy   exact for any number of processes
    6. scenes     segmentation: what is different where every pixel has a label (4.4, Table 7)
    7. main       the loop; processes, schedules, checkpoints and the log are pretrain.py's

The images and crops of step s are seeded by (seed, s) as in pretrain.py. MixUp, CutMix, drop path
and dropout draw from (seed, s, process): an interrupted run goes on as if nothing had happened, on
the same number of processes with the same micro-batch.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import crop
from crop import InputError
from model import ENCODERS, Classifier, Segmenter, resize_positions, upsample
from pretrain import (BadImages, Journal, accelerate, bench_report, check_values, count_gflop, due,
                      learning_rate, make_loader, make_plan, measuring, micro_batches,
                      newest_checkpoint, parameter_groups, parse_config, plain, plain_time,
                      read_log, refuse, resume, run, save_file, set_learning_rate, setup_machine)


# ------------------------------------------------------------------------------------ 1. Config

@dataclass(frozen=True)
class Config:
    """The paper's recipe for ViT-B/16, Table 10. A field's comment is its line in --help."""

    recipe: str = "vit_b"  # vit_b, vit_s, resnet50_100, resnet50_300, linear, segment or demo
    task: str = "classify"  # the recipe's: classify images, or segment them
    # where
    init: str = "out/pretrain/encoder.pt"  # a file with the encoder's weights, or scratch
    use_target: bool = False  # take the moving average out of a pre-training checkpoint
    data: str = "data/imagenet"  # train/CLASS/* and val/CLASS/*; a built-in source; none: --bench
    classes: str = ""  # a file with the class folders to keep, or the names of labels 1 to N
    out: str = "out/finetune"  # the run's folder: config.json, log.jsonl, ckpt.pt, model.pt
    model: str = "auto"  # the encoder; auto is the one in --init, from scratch the recipe's
    # images
    image_size: int = 224  # pixels, in training
    test_size: int = 224  # pixels, in validation; segment: the shorter side, and a window's
    test_crop: float = 0.95  # side of the centre crop as a fraction of the shorter side
    scale: tuple = (0.08, 1.0)  # area of a random crop; segment: shorter side over image_size
    flip: float = 0.5  # probability of a mirrored image
    randaugment: float = 9.0  # mean magnitude of RandAugment, on a scale of 0 to 10
    randaugment_std: float = 0.5  # standard deviation of its magnitude
    randaugment_p: float = 0.5  # probability of each of its two operations; 0 turns it off
    erasing: float = 0.0  # probability of erasing a random box (the released code: 0.25)
    mixup: float = 0.8  # alpha of MixUp; 0 turns it off
    cutmix: float = 1.0  # alpha of CutMix; 0 turns it off
    repeats: int = 1  # times that each image comes in a step (repeated augmentation)
    photometric: float = 0.0  # segment: probability of each change of light and colour
    cat_max_ratio: float = 1.0  # segment: largest share of a class in a crop, if ten tries find one
    # optimisation
    loss: str = "ce"  # ce (cross-entropy) or bce (binary cross-entropy of each class)
    smoothing: float = 0.1  # of the labels
    bce_threshold: float = 0.0  # with bce, targets above it become 1, others 0; 0 leaves them soft
    drop_path: float = 0.1  # stochastic depth of a ViT's last block
    layer_decay: float = 0.8  # a layer's learning rate over that of the layer above
    frozen: bool = False  # linear probe: the encoder stays as it is
    head_width: int = 768  # segment: channels of UperNet
    optimizer: str = "adamw"  # adamw or sgd (with momentum beta1)
    epochs: int = 100  # passes over the images
    warmup_epochs: float = 5.0  # of linear warm-up of the learning rate
    schedule: str = "cosine"  # of the learning rate after that: cosine or linear
    batch_size: int = 2048  # images a step, over all processes
    lr: float = 9.6e-3  # peak learning rate at a batch of lr_batch
    lr_batch: int = 2048  # the batch that lr is meant for; another one scales it linearly
    weight_decay: float = 0.05  # of matrices; not of biases, norms and the cls token
    beta1: float = 0.9  # AdamW's, or the momentum
    beta2: float = 0.999  # AdamW's
    clip: float = 0.0  # largest norm of the gradient; 0 does not clip
    seed: int = 0  # of everything random
    max_steps: int = 0  # stop early, schedules still span epochs; 0 does not
    # machine: may differ when a run goes on, but for dtype
    micro_batch: int = 0  # images a process handles at once; 0 picks one that divides
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16; auto is bfloat16 where the chip multiplies it
    compile: str = "auto"  # auto, true or false; auto compiles on CUDA
    workers: int = -1  # loader processes for each training process; -1 uses the cores at hand
    log_every: int = 10  # steps
    eval_epochs: int = 1  # epochs between validations; the end is always validated
    save_every: int = 1000  # steps between checkpoints; 0 goes by save_minutes only
    save_minutes: float = 15.0  # minutes between checkpoints; 0 goes by save_every only
    timeout: float = 30.0  # minutes that a process waits for its images or for the others
    bench: int = 0  # time so many steps: one JSON line, kept as bench.json, and nothing else

    def __post_init__(self):
        """Raise InputError for values that cannot work, before any work starts."""
        check_values(self, recipe=RECIPES, model=("auto", *ENCODERS), loss=("ce", "bce"),
                     optimizer=("adamw", "sgd"), task=TASKS, schedule=("cosine", "linear"))
        refuse(self, RECIPES[self.recipe], f"--recipe {self.recipe}", "task")
        refuse(self, RECIPES[self.recipe], f"a recipe to {self.task}", *TASKS[self.task].unread)
        if self.test_crop == 0:
            raise InputError("--test_crop 0 must be above 0")
        if self.randaugment > 10:
            raise InputError(f"--randaugment {self.randaugment:g}: the scale goes from 0 to 10")
        areas = self.task == "classify"
        if not 0 < self.scale[0] <= self.scale[1] <= (1 if areas else math.inf):
            raise InputError(f"--scale {self.scale} must be 0 < low <= high"
                             f"{' <= 1 (areas)' if areas else ''}")


PLAIN = dict(randaugment_p=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)
RESNET50 = dict(lr=12e-3, weight_decay=0.02, layer_decay=1.0, drop_path=0.0, loss="bce",
                mixup=0.1, cutmix=1.0)  # both columns of Table 11
RECIPES = {  # values only
    "vit_b": {},
    "vit_s": dict(epochs=200, out="out/finetune_vit_s"),
    "resnet50_100": dict(RESNET50, epochs=100, image_size=160, randaugment=6.0,
                         out="out/finetune_resnet50_100"),
    "resnet50_300": dict(RESNET50, epochs=300, randaugment=7.0, smoothing=0.0, repeats=3,
                         out="out/finetune_resnet50_300"),
    "linear": dict(PLAIN, frozen=True, optimizer="sgd", lr=0.1, lr_batch=256, batch_size=1024,
                   epochs=90, warmup_epochs=10.0, weight_decay=0.0, drop_path=0.0,
                   layer_decay=1.0, out="out/linear"),
    # Table 7 as in BEiT. ADE20K's 20,210 images are 1,263 steps of 16 an epoch: 127 epochs are
    # 160,401 steps, 1.1875 epochs 1,500 steps. DEVIATION: BEiT's line to 0 begins at step 0
    "segment": dict(PLAIN, task="segment", data="data/ade20k", init="out/finetune/model.pt",
                    out="out/segment", image_size=512, test_size=512, scale=(0.5, 2.0),
                    photometric=0.5, cat_max_ratio=0.75, layer_decay=0.9, epochs=127,
                    warmup_epochs=1.1875, schedule="linear", batch_size=16, lr=3e-5, lr_batch=16,
                    log_every=50, eval_epochs=13),
    "demo": dict(PLAIN, data="shapes", init="out/demo/encoder.pt", out="out/demo_finetune",
                 image_size=64, test_size=64, scale=(0.8, 1.0), drop_path=0.0, epochs=20,
                 warmup_epochs=1.0, batch_size=64, lr=2e-3, lr_batch=64, workers=0, log_every=75,
                 eval_epochs=5),
}
# The encoder of a recipe without weights.
SCRATCH = {"vit_b": "vit_b16", "vit_s": "vit_s16", "resnet50_100": "resnet50",
           "resnet50_300": "resnet50", "segment": "vit_b16",
           "demo": "vit_d8"}


# ---------------------------------------------------------------------------------- 2. the data

def match_labels(source, classes, place):
    """The labels of a source, its class folders found by name in `classes`; -1 for none. Raises
    InputError naming the folders that are not among them."""
    number = {name: k for k, name in enumerate(classes)}
    strange = [name for name in source.classes if name not in number]
    if strange:
        raise InputError(f"{place!r} has {len(strange)} classes that the {len(classes)} known ones "
                         f"lack: {', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}")
    return [number[source.classes[k]] if k >= 0 else -1 for k in source.labels]


def labelled_data(cfg, machine):
    """-> (training source, its labelled rows), (validation source, its labelled rows), a sentence.
    Both sources number the classes as the first does."""
    with machine.first():
        (train, rows), (val, val_rows), sentence = crop.train_and_val(
            cfg.data, cfg.seed, crop.read_classes(cfg.classes), held_out=None)
    if len(train.classes) < 2:
        raise InputError(f"{cfg.data!r} has {len(train.classes)} class folders: fine-tuning needs "
                         "train/CLASS/* and val/CLASS/* with two classes or more")
    if val is not train:
        val.labels = match_labels(val, train.classes, cfg.data)
    rows, val_rows = ([i for i in r if source.labels[i] >= 0]
                      for source, r in ((train, rows), (val, val_rows)))
    if not rows or not val_rows:
        raise InputError(f"{cfg.data!r} has no labelled images to "
                         f"{'validate' if rows else 'train'} on: they lie in class folders")
    return (train, rows), (val, val_rows), (f"{sentence}; {len(rows)} and {len(val_rows)} of them "
                                            f"labelled, {len(train.classes)} classes")


MEAN_COLOUR = [round(255 * m) for m in crop.MEAN]  # 0 once it is normalised


class RandAugment(v2.RandAugment):
    """timm's "9 / 0.5": two random operations, each with probability p, at a magnitude drawn from
    N(magnitude, std) on a scale of 0 to 10.

    DEVIATION: the operations are torchvision's. timm has Invert and SolarizeAdd besides, and no
    Identity; it takes bilinear or bicubic interpolation at random, here it is bilinear.
    """

    def __init__(self, magnitude, std, p):
        super().__init__(num_ops=1, num_magnitude_bins=1001,  # hundredths of a magnitude
                         interpolation=v2.InterpolationMode.BILINEAR,
                         fill=MEAN_COLOUR)
        self.mean, self.std, self.p = magnitude, std, p

    def augment(self, image, rng):
        """PIL image -> PIL image. torchvision draws from torch's generator, so rng seeds it."""
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        for _ in range(2):
            if rng.random() < self.p:
                self.magnitude = round(100 * min(10, max(0, rng.normal(self.mean, self.std))))
                image = self(image)
        return image


def make_mix(cfg, classes):
    """(images [B, 3, h, w], labels [B]) -> (images, targets [B, classes]): MixUp or CutMix, evenly,
    with the neighbour in the batch; targets sum to 1."""
    kinds = [kind(alpha=alpha, num_classes=classes)
             for kind, alpha in ((v2.MixUp, cfg.mixup), (v2.CutMix, cfg.cutmix)) if alpha > 0]
    if not kinds:
        return lambda images, labels: (images, F.one_hot(labels, classes).float())
    return v2.RandomChoice(kinds)


def training_set(cfg, source, rows):
    """Random crops, mirrored at random, with RandAugment; decoded with draft() in the workers."""
    rand_augment = RandAugment(cfg.randaugment, cfg.randaugment_std, cfg.randaugment_p)
    return crop.Samples(source, rows, cfg.seed, partial(
        crop.cut_context, size=cfg.image_size, scale=cfg.scale, flip=cfg.flip,
        augment=rand_augment.augment if cfg.randaugment_p > 0 else None))


# ----------------------------------------------------------------------------------- 3. weights

HEADS = ("head.", "fc.", "fc_norm.", "norm.",  # of a classifier; a fresh one takes their place
         "pyramid.", "auxiliary.")  # and of a segmenter
OTHERS = ("online.", "target.", "decoder", "mask_token",  # of pre-training: ours, and the released
          "patch_embed_c.", "blocks_c.", "norm_c.")  # code's names for the target


def read_weights(path, use_target=False):
    """-> (the encoder's name, the weights by published names, the file as it was saved).

    path: our encoder.pt, ckpt.pt or model.pt, timm's ViT, torchvision's ResNet-50, or the released
    CIM weights. use_target: the moving average of a pre-training checkpoint instead of the online
    encoder. Raises InputError when the file is something else.
    """
    if not os.path.exists(path):
        raise InputError(f"there is no file {path!r}: wanted is the encoder.pt that pretrain.py "
                         "writes, another file of weights, or the word scratch")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released file has one
            saved = state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on files that are none
        raise InputError(f"{path!r} is not a file of weights ({type(error).__name__})") from error
    for entry in ("model", "weights", "state_dict"):  # checkpoints, model.pt, timm's
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if not isinstance(state, dict) or not all(
            isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise InputError(f"{path!r} is not a state dict, nor a checkpoint with one")
    state = {k.removeprefix("module.").removeprefix("encoder."): v for k, v in state.items()}
    ours, released = ([k for k in state if k.startswith(p)] for p in ("target.", "blocks_c."))
    recipe = saved.get("config") if isinstance(saved.get("config"), dict) else {}
    alone = recipe.get("bootstrap") == "shared" or recipe.get("decoder", "cim") != "cim"
    if use_target and (alone or not ours and not released):
        raise InputError(f"{path!r} holds no target: --use_target takes a pre-training checkpoint")
    if ours:
        side = "target." if use_target else "online."
        state = {k.removeprefix(side): v for k, v in state.items()}
    elif use_target:
        state |= {k.replace("_c.", "."): v for k, v in state.items() if "_c." in k}
    return identify(state, path), state, saved


def identify(state, path):
    """The name of the encoder whose weights these are."""
    if "layer4.2.conv3.weight" in state:
        return "resnet50"
    if "cls_token" not in state or "patch_embed.proj.weight" not in state:
        raise InputError(f"{path!r} holds no encoder known here: neither a ViT by timm's names nor "
                         "a ResNet-50 by torchvision's")
    blocks = {k.split(".")[1] for k in state if k.startswith("blocks.")}
    shape = (state["cls_token"].shape[-1], len(blocks), state["patch_embed.proj.weight"].shape[-1])
    names = [name for name, known in ENCODERS.items() if known == shape]
    if not names:
        raise InputError(f"{path!r} holds a ViT of width {shape[0]}, depth {shape[1]} and patch "
                         f"{shape[2]}; known are {', '.join(ENCODERS)}")
    return names[0]


def load_weights(model, state, path, head=False):
    """Put an encoder's weights into a Classifier or Segmenter, with its head where `head` is true.
    -> a sentence: what is new, what was left out.

    Nothing is loaded in part: raises InputError for any missing weight but the head's, for any
    surplus one but those of other heads and of pre-training, and for shapes that differ.
    """
    wanted = model.names()
    new = {theirs for mine, theirs in wanted.items() if not head and not mine.startswith("encoder.")
           and not (mine.startswith("fc_norm.") and theirs in state)}
    old = {theirs: v for theirs, v in state.items() if theirs in wanted.values()}
    for theirs in wanted.values():  # old files of torchvision lack BatchNorm's counters
        if theirs.endswith("num_batches_tracked"):
            old.setdefault(theirs, torch.tensor(0))
    missing = sorted(set(wanted.values()) - new - old.keys())
    surplus = sorted(k for k in state.keys() - set(wanted.values())
                     if not k.startswith((*HEADS, *OTHERS)))
    if missing or surplus:
        parts = [f"{word} {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}"
                 for word, keys in (("lacks", missing), ("has the unknown", surplus)) if keys]
        raise InputError(f"{path!r} {' and '.join(parts)}; nothing was loaded")
    mine = model.state_dict()
    if "pos_embed" in old and old["pos_embed"].shape != mine["encoder.pos_embed"].shape:
        old["pos_embed"] = resize_table(old["pos_embed"], mine["encoder.pos_embed"].shape[1])
    for key, theirs in wanted.items():
        if theirs in new:
            continue
        if old[theirs].shape != mine[key].shape:
            raise InputError(f"{path!r}: {theirs} has shape {list(old[theirs].shape)} instead of "
                             f"{list(mine[key].shape)}; nothing was loaded")
        mine[key] = old[theirs]
    model.load_state_dict(mine)
    left = state.keys() - (set(wanted.values()) - new)
    return (f"{len(wanted) - len(new)} tensors from {path}; new: {by_part(new)}; left out: "
            f"{by_part(left)}")


def by_part(keys):
    """Keys of a state dict, counted by their first word."""
    counts = Counter(k.split(".")[0] for k in keys)
    return ", ".join(f"{part} ({count})" for part, count in sorted(counts.items())) or "none"


def resize_table(table, count):
    """A position table [1, 1 + N, D], cls token first, for `count` tokens, bicubically."""
    side = math.isqrt(count - 1)
    if math.isqrt(table.shape[1] - 1) ** 2 != table.shape[1] - 1:
        return table  # no square grid: its shape will be named
    return torch.cat([table[:, :1], resize_positions(table[:, 1:], side, side)], 1)


def check_size(name, size):
    """Raise InputError where images of `size` pixels are not whole patches of the encoder."""
    patch = ENCODERS[name][2] if ENCODERS[name] else 1
    if size % patch:
        raise InputError(f"images of {size} pixels are no whole patches of {patch} ({name}): "
                         f"{max(1, round(size / patch)) * patch} would be")


def choose_encoder(cfg, found):
    """The encoder's name: what the file holds (None: scratch), which must suit the recipe.
    Raises InputError when it does not, and when images are not whole patches of it."""
    usual = SCRATCH.get(cfg.recipe)
    name = (found or usual) if cfg.model == "auto" else cfg.model
    if name is None:
        raise InputError(f"--recipe={cfg.recipe} --init=scratch needs --model")
    if cfg.init == "scratch" and cfg.use_target:
        raise InputError("--init=scratch has no target: leave out --use_target")
    if found and name != found:
        raise InputError(f"{cfg.init!r} holds {found}, not {name}; leave out --model")
    if name == "resnet50" and cfg.task == "segment":
        raise InputError("segmentation takes a ViT, whose blocks make UperNet's pyramid: resnet50 "
                         "is none")
    others = "resnet50_100" if name == "resnet50" else "vit_b"
    if cfg.model == "auto" and usual and (usual == "resnet50") != (name == "resnet50"):
        raise InputError(f"--recipe={cfg.recipe} is not for {name}, which {cfg.init!r} holds: take "
                         f"--recipe={others}, or insist with --model={name}")
    if name == "resnet50" and cfg.drop_path > 0:
        raise InputError("resnet50 has no stochastic depth: add --drop_path=0")
    check_size(name, cfg.image_size)
    check_size(name, cfg.test_size)
    return name


# ---------------------------------------------------------------------------------- 4. training

def soft_loss(logits, targets, cfg):
    """Cross-entropy, or the mean binary cross-entropy over the classes, with smoothed targets:
    t (1 - s) + s / classes. DEVIATION: [67] makes mixed targets 0 or 1 at a threshold of 0.2,
    which Table 11 does not say and which undoes the smoothing: a flag, off."""
    targets = targets * (1 - cfg.smoothing) + cfg.smoothing / targets.shape[1]
    if cfg.loss == "ce":
        return F.cross_entropy(logits.float(), targets)
    if cfg.bce_threshold > 0:
        targets = (targets > cfg.bce_threshold).float()
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def classifier_loss(cfg, train, machine):
    """-> loss(model, uint8 images, their numbers in the source): of a micro-batch, mixed."""
    labels = torch.tensor(train.labels)
    mix, erase = make_mix(cfg, len(train.classes)), v2.RandomErasing(cfg.erasing, value="random")

    def loss(model, images, numbers):
        images = crop.normalize(machine.send(images).float() / 255)
        if cfg.erasing > 0:
            images = torch.stack([erase(image) for image in images])
        images, targets = mix(images, machine.send(labels[numbers]))
        with machine.autocast():
            logits = model(images)
        return soft_loss(logits, targets, cfg)

    return loss


def layer_scale(name, depth, decay):
    """decay^(depth + 1 - layer): 1 for the head, decay for the last of `depth` blocks, and so on
    down to the embedding, layer 0. A ResNet has four layers and its stem."""
    block, stage = (re.match(rf"encoder\.{p}(\d+)\.", name) for p in ("blocks\\.", "layer"))
    layer = (int(block[1]) + 1 if block else int(stage[1]) if stage else
             0 if name.startswith("encoder.") else depth + 1)
    return decay ** (depth + 1 - layer)


def build_model(cfg, classes):
    """The classifier or segmenter of a config, freshly initialised."""
    if cfg.task == "segment":
        return Segmenter(cfg.model, classes, cfg.drop_path, cfg.head_width)
    return Classifier(cfg.model, classes, cfg.drop_path, probe=cfg.frozen)


def build(cfg, classes, machine):
    """The model, seeded, on the device, and its optimiser."""
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, classes).to(machine.device)
    if cfg.task == "segment" and machine.syncs_batchnorm:  # a process has but two images or so
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    depth = 4 if cfg.model == "resnet50" else len(model.encoder.blocks)
    groups = parameter_groups(model, cfg.weight_decay,
                              partial(layer_scale, depth=depth, decay=cfg.layer_decay))
    if cfg.optimizer == "sgd":
        return model, torch.optim.SGD(groups, cfg.lr, cfg.beta1)
    return model, torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2),
                                    fused=machine.device.type != "mps")


def gflop_per_image(cfg, classes):
    """GFLOP of a training step for one image."""
    def sum_of_two():
        logits = build_model(cfg, classes)(torch.empty(2, 3, cfg.image_size, cfg.image_size))
        return sum(part.sum() for part in logits)  # of images, or of head and auxiliary head

    return count_gflop(sum_of_two)


# ---------------------------------------------------------------------------------- 5. accuracy

def centre_crops(source, rows, size, ratio):
    """The data set of test images: squares in the middle of some images of a source."""
    cut = partial(crop.cut_centre, size=size, ratio=ratio)
    return crop.Samples(source, rows, 0, cut, replace=False)


class Batches:
    """Each image of a data set once, for measuring. Iterating gives this process's batches: (uint8
    images on the device, their numbers in the source on the CPU). The batches are the same for any
    number of processes; unreadable images are left out with a warning; long work tells how long.
    """

    def __init__(self, dataset, workers, machine, batch=64):
        n = len(dataset)
        batches = [[(0, i) for i in range(b, min(b + batch, n))] for b in range(0, n, batch)]
        self.machine, self.bad = machine, BadImages(n, "it is left out")
        self.loader = make_loader(dataset, batches[machine.rank::machine.world], workers, machine)

    def __iter__(self):
        began = told = time.perf_counter()
        for done, sample in enumerate(self.loader, 1):
            batch = self.bad.check(*sample)
            if batch:
                images, numbers = batch
                yield self.machine.send(images), numbers
            now = time.perf_counter()
            if now - told > 10 and self.machine.rank == 0:
                left = plain_time((now - began) * (len(self.loader) / done - 1))
                print(f"  {done} of {len(self.loader)} batches, {left} left", file=sys.stderr)
                told = now


def look_at_classes(cfg, val, rows, machine, model):
    """-> a function that measures accuracy on the validation images."""
    images = Batches(centre_crops(val, rows, cfg.test_size, cfg.test_crop), cfg.workers, machine)
    labels = torch.tensor(val.labels)
    return lambda step: accuracy(model, images, labels, machine)


def accuracy(model, images, labels, machine, among=None, attack=None):
    """-> top-1 and top-5 in percent, mean cross-entropy and the number of images; labels [source].

    Exact for any number of processes: each image counts once, nothing is padded. among: predict
    only these classes, which the labels then number. attack(model, images, labels, numbers) ->
    images, all in [0, 1], comes first.
    """
    machine.share_buffers(model)
    sums = torch.zeros(4, device=machine.device)  # counts are exact up to 2^24
    for x, numbers in images:
        y = machine.send(labels[numbers])
        x = x.float() / 255
        x = attack(model, x, y, numbers) if attack else x
        with measuring(model, machine):
            logits = model(crop.normalize(x)).float()
        logits = logits if among is None else logits[:, among]
        hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(y))])
    machine.sum(sums)
    top1, top5, loss, n = sums.tolist()
    if not n:
        raise InputError("none of the images could be read")
    return dict(top1=100 * top1 / n, top5=100 * top5 / n, val_loss=loss / n, n=int(n))


# ------------------------------------------------------------------------------------ 6. scenes

class Scenes:
    """ADE20K's layout: images/SPLIT/NAME.* with annotations/SPLIT/NAME.*, masks whose values are 0
    where nothing counts and 1 to N for the classes. A source; open(i) gives (image, mask).

    Both are taken as they are stored, since masks are drawn on that: no EXIF orientation. Raises
    InputError: a missing folder, no images, images without a mask.
    """

    def __init__(self, root, split):
        places = [os.path.join(root, kind, split) for kind in ("images", "annotations")]
        for place in places:
            if not os.path.isdir(place):
                raise InputError(f"there is no folder {place!r}: segmentation needs images/training"
                                 " and images/validation in --data, and the same in annotations/")
        def stem(path):
            return os.path.splitext(path)[0]

        images, masks = crop.find_images(places[0]), {}
        if not images:
            raise InputError(f"no images in {places[0]!r}")
        for path in crop.find_images(places[1]):
            if stem(path) in masks:
                raise InputError(f"{places[1]!r} has several masks by the name of {stem(path)!r}")
            masks[stem(path)] = os.path.join(places[1], path)
        lone = [os.path.join(places[0], path) for path in images if stem(path) not in masks]
        if lone:
            raise InputError(f"{len(lone)} images lack a mask of the same name in {places[1]!r}: "
                             f"{', '.join(lone[:3])}{' ...' if len(lone) > 3 else ''}")
        self.pairs = [(os.path.join(places[0], path), masks[stem(path)]) for path in images]

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return self.pairs[i][0]

    @contextlib.contextmanager
    def open(self, i):
        with Image.open(self.pairs[i][0]) as image, Image.open(self.pairs[i][1]) as mask:
            yield image, mask

    def largest_label(self, i):
        """-> (the largest value of a mask, the mask's name); 0 where a file cannot be read, which
        is the loader's to tell. Raises InputError where the mask is none, or not of its image."""
        path, place = self.pairs[i]
        try:
            with self.open(i) as (image, mask):
                mode, sizes, extrema = mask.mode, image.size + mask.size, mask.getextrema()
        except Exception:  # Pillow raises many kinds on damaged files
            return 0, place
        if mode not in ("L", "P"):
            raise InputError(f"{place!r} is no mask but a picture of kind {mode}: it should have "
                             "one channel of 8 bits, the number of the class")
        if sizes[:2] != sizes[2:]:
            raise InputError("{!r} has {} x {} pixels, its mask {!r} {} x {}".format(
                path, *sizes[:2], place, *sizes[2:]))
        return extrema[1], place


def open_scenes(data, splits, classes, machine):
    """-> the Scenes of each split and the names of their classes: those given, or where that is
    None "1" to the largest label. Process 0 looks at every mask once, before any work starts."""
    largest = 0
    with machine.first():
        sources = [Scenes(data, split) for split in splits]
        if machine.rank == 0:
            with ThreadPoolExecutor() as pool:
                largest, place = max(label for source in sources for label in
                                     pool.map(source.largest_label, range(len(source))))
            if not largest:
                raise InputError(f"no mask of {data!r} has a class: 0 is ignored, 1 to N count")
            if not classes and largest == 255:
                raise InputError(f"{place!r} has label 255, which often means 'unlabelled'; here "
                                 "that is 0. Write 0 in its place, or name 255 --classes")
            if classes and largest > len(classes):
                raise InputError(f"{place!r} has label {largest}; there are {len(classes)} classes,"
                                 f" 1 to {len(classes)}, and 0 is ignored")
    return sources, classes or [str(k + 1) for k in range(machine.max(largest))]


def scene_data(cfg, machine):
    """labelled_data where every pixel has a label."""
    (train, val), classes = open_scenes(cfg.data, ("training", "validation"),
                                        crop.read_classes(cfg.classes), machine)
    train.classes = val.classes = classes
    return (train, list(range(len(train)))), (val, list(range(len(val)))), (
        f"{len(train)} images to train on, {len(val)} to validate, {len(classes)} classes")


def rescaled_size(width, height, size):
    """Width and height of an image whose shorter side is brought to `size`, or its longer one to
    4 times that where this is less (512 and 2048 in mmsegmentation)."""
    factor = min(size / min(width, height), 4 * size / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def photometric_distortion(image, rng, p):
    """mmsegmentation's photometric distortion of an RGB PIL image: brightness, contrast, saturation
    and hue, each with probability p, contrast before or after the colours. (torchvision's
    RandomPhotometricDistort also swaps channels.) DEVIATION: in Pillow's HSV, of 8 bits."""
    brightness, contrast, saturation, hue = rng.random(4) < p
    light, gain, colour, turn = rng.uniform((-32, 0.5, 0.5, -25.6), (32, 1.5, 1.5, 25.6))
    late = contrast and rng.random() < 0.5
    if brightness:
        image = image.point(lambda v: v + light)
    if contrast and not late:
        image = image.point(lambda v: v * gain)
    if saturation or hue:
        h, s, v = image.convert("HSV").split()
        h = h.point(lambda v: (v + turn * hue) % 256)
        s = s.point(lambda v: v * colour if saturation else v)
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    return image.point(lambda v: v * gain) if late else image


def cut_scene(pair, rng, cfg):
    """PIL (image, mask) of any size -> the same random part of both, uint8 [4, size, size], the
    labels last.

    The shorter side is brought to size times a random factor from cfg.scale. Of ten places the
    first counts in which no class has more than cfg.cat_max_ratio of the labelled pixels. Beyond
    the image there is the mean colour, and label 0. DEVIATION: resized with antialiasing, as Pillow
    does it, where mmsegmentation has OpenCV.
    """
    image, mask = pair
    width, height = rescaled_size(*image.size, cfg.image_size * rng.uniform(*cfg.scale))
    w, h = min(width, cfg.image_size), min(height, cfg.image_size)

    def part(whole, resample):  # of an image as large as it is; no more is resized than is kept
        fx, fy = whole.width / width, whole.height / height
        box = x * fx, y * fy, min((x + w) * fx, whole.width), min((y + h) * fy, whole.height)
        return whole.resize((w, h), resample, box)

    for _ in range(10):
        x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
        labels = np.asarray(part(mask, Image.NEAREST))
        counts = np.bincount(labels.ravel(), minlength=2)[1:]
        if 0 < counts.max() <= cfg.cat_max_ratio * counts.sum():
            break
    image.draft("RGB", (width, height))
    colours = photometric_distortion(part(crop.to_rgb(image), Image.BILINEAR), rng, cfg.photometric)
    both = np.dstack([colours, labels])
    if rng.random() < cfg.flip:
        both = both[:, ::-1]
    padded = np.full((cfg.image_size, cfg.image_size, 4), [*MEAN_COLOUR, 0], np.uint8)
    padded[:h, :w] = both
    return crop.to_tensor(padded)


def scene_set(cfg, source, rows):
    """The data set of random crops with their labels."""
    return crop.Samples(source, rows, cfg.seed, partial(cut_scene, cfg=cfg))


def whole_scene(pair, rng):
    """PIL (image, mask) -> both as they are, uint8 [4, height, width]; rng is not used."""
    return crop.to_tensor(np.dstack([crop.to_rgb(pair[0]), pair[1]]))


def whole_scenes(source, rows):
    """The data set of whole images with their labels."""
    return crop.Samples(source, rows, 0, whole_scene, replace=False)


def segmenter_loss(cfg, train, machine):
    """-> loss(model, uint8 images with labels [B, 4, h, w], numbers): of a micro-batch."""
    def loss(model, images, numbers):
        images = machine.send(images)
        with machine.autocast():
            logits, auxiliary = model(crop.normalize(images[:, :3].float() / 255))
        return pixel_loss(logits, images[:, 3]) + 0.4 * pixel_loss(auxiliary, images[:, 3])

    return loss


def pixel_loss(logits, labels):
    """Cross-entropy of float32 logits [B, N, h, w] over the pixels whose label is not 0, divided
    by the number of all pixels, so that each weighs the same however a batch is split."""
    total = F.cross_entropy(logits, labels.long() - 1, ignore_index=-1, reduction="sum")
    return total / labels.numel()


def look_at_pixels(cfg, val, rows, machine, model):
    """-> a function that measures mean IoU on the validation images."""
    images = Batches(whole_scenes(val, rows), cfg.workers, machine, batch=1)
    return lambda step: mean_iou(model, images, len(val.classes), cfg.test_size, machine)


def sliding_window(model, x, size):
    """Normalised images x [B, 3, h, w] -> logits [B, N, h, w]: the mean over windows of size x size
    two thirds of a window apart (341 of 512), the last ones flush with the border. Where x is
    smaller than a window it is padded with the mean colour. DEVIATION: mmsegmentation makes the
    window smaller, which would leave no whole patches."""
    (h, w), stride = x.shape[2:], size * 2 // 3
    x = F.pad(x, (0, max(0, size - w), 0, max(0, size - h)))
    ys, xs = ([min(i * stride, n - size) for i in range(1 + math.ceil((n - size) / stride))]
              for n in x.shape[2:])
    windows = [(slice(None), slice(None), slice(a, a + size), slice(b, b + size))
               for a in ys for b in xs]
    parts = model(torch.cat([x[window] for window in windows])).chunk(len(windows))
    total = x.new_zeros(len(x), parts[0].shape[1], *x.shape[2:])
    count = x.new_zeros(1, 1, *x.shape[2:])
    for window, part in zip(windows, parts):
        total[window] += part
        count[window] += 1
    return (total / count)[:, :, :h, :w]


def predict_labels(model, image, size, machine):
    """uint8 image [3, height, width] -> the class 0 to N - 1 of each of its pixels. It is resized,
    its shorter side to `size`, and the logits are brought back to its own size."""
    shape = image.shape[1:]
    x = F.interpolate(image[None].float() / 255, rescaled_size(*shape, size), mode="bilinear",
                      antialias=True)
    with measuring(model, machine):
        logits = sliding_window(model, crop.normalize(x), size)
    few = [upsample(part, shape).max(1) for part in logits.split(16, 1)]  # photos may be large
    which = torch.stack([part.values for part in few]).argmax(0, keepdim=True)
    return (16 * which + torch.stack([part.indices for part in few]).gather(0, which))[0, 0]


def confusion(labels, found, classes):
    """How many pixels of each class (rows) were found to be each (columns): int64 [N, N]. labels:
    0 is ignored, 1 to N; found: 0 to N - 1."""
    labels, found = labels[labels > 0].long() - 1, found[labels > 0]
    return torch.bincount(labels * classes + found, minlength=classes**2).view(classes, classes)


def iou_scores(matrix):
    """Of a confusion matrix, in percent: mean IoU, mean accuracy (over the classes), accuracy of
    all pixels, and the IoU of each class, None where it is neither there nor found. As in
    mmsegmentation, the means leave out classes without a value."""
    matrix = matrix.cpu().double()
    hits, there, found = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou, recall = 100 * hits / (there + found - hits), 100 * hits / there
    return dict(miou=iou.nanmean().item(), macc=recall.nanmean().item(),
                aacc=100 * (hits.sum() / matrix.sum()).item(),
                iou=[None if math.isnan(x) else x for x in iou.tolist()])


def mean_iou(model, images, classes, size, machine, show=None):
    """-> iou_scores and the number of images, exact for any number of processes. images: batches of
    one, uint8 [1, 4, height, width], the labels last. show(number in the source, image, labels,
    found), all on the device, is called for each."""
    machine.share_buffers(model)
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=machine.device)
    n = torch.zeros(1, dtype=torch.int64, device=machine.device)
    for x, numbers in images:
        image, labels = x[0, :3], x[0, 3]
        found = predict_labels(model, image, size, machine)
        matrix += confusion(labels, found, classes)
        n += 1
        if show:
            show(int(numbers[0]), image, labels, found)
    machine.sum(matrix, n)
    if not matrix.any():
        raise InputError("none of the images could be read" if not n else
                         "none of the pixels has a label")
    return iou_scores(matrix) | dict(n=n.item())


# -------------------------------------------------------------------------------------- 7. main

class Task(NamedTuple):
    """What differs between classification and segmentation; an argument that one of the two does
    not need is there for the other."""

    data: Callable  # (cfg, machine) -> (source, rows) to train, to validate on, a sentence
    dataset: Callable  # (cfg, source, rows) -> the data set of random crops
    loss: Callable  # (cfg, source, machine) -> loss(model, images, numbers)
    look: Callable  # (cfg, source, rows, machine, model) -> a function that measures
    measures: tuple  # what that gives; the first one is the score
    unread: tuple  # fields that mean nothing


TASKS = {
    "classify": Task(labelled_data, training_set, classifier_loss, look_at_classes,
                     ("top1", "top5", "val_loss", "n"),
                     ("photometric", "cat_max_ratio", "head_width")),
    "segment": Task(scene_data, scene_set, segmenter_loss, look_at_pixels,
                    ("miou", "macc", "aacc", "iou", "n"),
                    ("test_crop", "randaugment", "randaugment_std", "randaugment_p", "erasing",
                     "mixup", "cutmix", "repeats", "loss", "smoothing", "bce_threshold", "frozen")),
}


def save_model(path, model, cfg, classes, **score):
    """model.pt: weights by timm's or torchvision's names, class names in order, config, and the
    score that the run ended with where that is known."""
    state = {theirs: model.state_dict()[mine].cpu() for mine, theirs in model.names().items()}
    saved = dict(weights=state, classes=list(classes), config=plain(cfg), **score)
    save_file(path, lambda f: torch.save(saved, f))


def main(argv=None):
    """The run of a Config, from the command line to model.pt; goes on from out/ckpt.pt."""
    cfg = parse_config(Config, RECIPES, argv, __doc__.split("\n")[0])
    machine = setup_machine(cfg.device, cfg.dtype, cfg.compile, cfg.timeout)
    task = TASKS[cfg.task]
    checkpoint, final = (os.path.join(cfg.out, name) for name in ("ckpt.pt", "model.pt"))
    saved = None if cfg.bench else newest_checkpoint(cfg.out, machine)
    found = weights = None
    if saved and cfg.model == "auto":  # the weights are in it
        found = saved["config"]["model"]
    elif not saved and cfg.init != "scratch":
        found, weights, _ = read_weights(cfg.init, cfg.use_target)
    cfg = dataclasses.replace(cfg, model=choose_encoder(cfg, found))
    (train, rows), (val, val_rows), sentence = task.data(cfg, machine)
    classes = train.classes
    plan = make_plan(cfg, machine, len(rows))
    if plan.micro == 1 and (cfg.frozen or cfg.model == "resnet50" or
                            cfg.task == "segment" and not machine.syncs_batchnorm):
        raise InputError(f"--batch_size {cfg.batch_size} leaves a process one image at a time, too "
                         "few for BatchNorm: choose one with more divisors, or --micro_batch")
    model, optimizer = build(cfg, len(classes), machine)
    loaded = (load_weights(model, weights, cfg.init) if weights else
              checkpoint if saved else "none, from scratch")
    start, unlogged = resume(saved, checkpoint, cfg, machine, plan, model, optimizer)
    if start >= plan.stop and not unlogged:
        if machine.rank == 0:
            if not os.path.exists(final):
                save_model(final, model, cfg, classes)
            print(f"finished: {start} of {plan.stop} steps are done; the model is {final}")
        return
    if machine.rank == 0:
        print(f"{plan.describe(cfg, machine, sentence, start, 'images')}\nweights  {loaded}",
              flush=True)

    loader = iter(make_loader(
        task.dataset(cfg, train, rows),
        micro_batches(cfg, plan, machine.rank, range(start, plan.stop), cfg.repeats),
        cfg.workers, machine))
    journal = Journal(cfg, machine, plan, start, unlogged,
                      task.look(cfg, val, val_rows, machine, model), task.measures,
                      partial(gflop_per_image, cfg, len(classes)))
    loss_of = task.loss(cfg, train, machine)
    wrapped = accelerate(model, machine)
    parameters = [p for p in model.parameters() if p.requires_grad]

    model.train()
    for step in range(start, plan.stop):
        lr = learning_rate(step, plan.total, plan.peak, plan.warmup, cfg.schedule)
        set_learning_rate(optimizer, lr)
        loss = 0
        for k in range(plan.accumulate):
            images, numbers = journal.fetch(loader)
            draws = np.random.SeedSequence((cfg.seed, 7, step, k, machine.rank))
            torch.manual_seed(int(draws.generate_state(1, np.uint64)[0]))
            with machine.accumulating(wrapped, last=k == plan.accumulate - 1):
                part = loss_of(wrapped, images, numbers) / plan.accumulate
                part.backward()
            loss = loss + part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        journal.end_step(step + 1, loss, lr, grad_norm,
                         due(step + 1, cfg.eval_epochs * plan.per_epoch), model, optimizer)

    if cfg.bench:
        bench_report("finetune", journal)
    elif machine.rank == 0:
        name, last = task.measures[0], journal.last
        save_model(final, model, cfg, classes, **{name: last[name]})
        best = max((r for r in read_log(cfg.out) if r[name] is not None), key=lambda r: r[name])
        print(f"done: {cfg.out} holds model.pt, log.jsonl and ckpt.pt; on {last['n']} validation "
              f"images {Journal.SHOWN[name].format(last[name])} (the best was {best[name]:.2f}% "
              f"after epoch {best['epoch']:.2f})")
    journal.close()


if __name__ == "__main__":
    run(main)
