"""pretrain.py: self-supervised pre-training by Correlational Image Modeling (Table 9).

    python pretrain.py --preset=demo                                  a laptop, four minutes
    python pretrain.py --preset=imagenette                            one GPU
    torchrun --nproc_per_node=8 pretrain.py --data=/data/imagenet     the paper's run

In the order in which things happen:

    1. Config      every field is a flag; the defaults are Table 9; PRESETS are other values
    2. the steps   which images and random numbers each step gets, on each process
    3. schedules   learning rate, tau, weight decay
    4. held-out    skill, its control, the rank of the features, maps.png
    5. the model   CIM and its optimiser, compiled, wrapped in DDP
    6. main        the loop

What pretrain.py, finetune.py and evaluate.py share and only keeps a run alive; a first reading can
stop here:

    7. command line   8. the machine   9. the loader   10. checkpoint and log   11. --bench

A run is a function of its config and seed: the images, crops and uniform numbers of step s are
seeded by (seed, s) alone, so the number of workers and processes, the micro-batch and
interruptions change nothing but the rounding of floats (with BatchNorm its statistics too), and a
checkpoint needs no loader state.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import typing
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import crop
from crop import InputError
from model import (BOOTSTRAPS, CIM, CORRELATIONS, ENCODERS, LOSSES, PREDICTORS, TRACKERS, Block,
                   CorrelationLayer, ResNet50, Tracking)


# ------------------------------------------------------------------------------------ 1. Config

def number(kind, fits, bounds):
    """The type of a flag: text -> a number of `kind` (int or float; 1/3 is one too) for which
    fits(number) is true. bounds: the same in words, for the error."""
    def parse(text):
        try:
            a, *b = text.split("/") if kind is float else [text]
            value = kind(a) / kind(*b) if b else kind(a)
            if not math.isfinite(value):
                raise ValueError
        except (TypeError, ValueError, ArithmeticError):
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


Count = number(int, lambda x: 1 <= x < 2**31, "from 1 to 2**31 - 1")
Pixels = number(int, lambda x: 1 <= x <= 4096, "from 1 to 4096")
Whole = number(int, lambda x: 0 <= x < 2**63, "from 0 to 2**63 - 1")
Workers = number(int, lambda x: x >= -1, "-1 or more")
Positive = number(float, lambda x: x > 0, "above 0")
Real = number(float, lambda x: 0 <= x <= 1e9, "from 0 to 1e9")
Share = number(float, lambda x: 0 <= x <= 1, "between 0 and 1")
Decay = number(float, lambda x: 0 <= x < 1, "0 or more and below 1")


def Pair(text):
    """The type of a flag with two numbers. argparse calls it once per word: `1/3,3` is one word,
    `1/3 3` is two, which parse_config joins."""
    return tuple(Real(part) for part in text.split(","))


def Switch(text):
    """The type of a flag that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


@dataclass(frozen=True)
class Config:
    """The paper's recipe, Table 9. A field's type parses its flag, its comment is the flag's line
    in --help."""

    preset: Literal["paper", "imagenette", "demo"] = "paper"  # values for the fields; flags win
    # where
    data: str = "data/imagenet"  # a folder; shapes, imagenette, cifar10, stl10; none: noise to time
    classes: str = ""  # a file with the class folders to keep, one a line (its first word)
    out: str = "out/pretrain"  # the run's folder: config.json, log.jsonl, ckpt.pt, encoder.pt
    # crops (Table 1)
    context_size: Pixels = 160  # side of a context, pixels
    context_scale: Pair = (0.5, 1.0)  # area of a context, as a fraction of the image
    context_flip: Share = 0.5  # probability of a mirrored context, before exemplars are cut
    exemplar_size: Pixels = 64  # side of an exemplar, pixels
    exemplars: Count = 6  # of each context
    scale: Pair = (0.05, 1.0)  # area r0 of an exemplar, as a fraction of the context
    ratio: Pair = (1 / 3, 3.0)  # aspect r1 = h / w, log-uniform
    rotation: Real = 45.0  # largest angle, degrees
    flip: Share = 0.5  # probability of a mirrored exemplar
    transforms: Literal["exemplar", "context", "both", "none"] = "exemplar"  # what is recoloured
    jitter: Share = 0.8  # probability of colour jitter
    gray: Share = 0.2  # probability of gray
    blur: Share = 0.5  # probability of Gaussian blur
    solarize: Share = 0.2  # probability of solarisation
    # model
    model: Literal[*ENCODERS] = "vit_b16"  # the encoder
    freeze_patch_embed: Switch = True  # keep a ViT's patch embedding as initialised
    bootstrap: Literal[*BOOTSTRAPS] = "online_exemplar"  # Table 2; shared weights: no tau
    decoder: Literal["cim", *TRACKERS] = "cim"  # a tracker (Table 4) reads no other field of these
    decoder_width: Count = 512  # channels, a multiple of 32; one head for each 32 (Figure 4d)
    decoder_depth: Count = 1  # correlation layers (Figure 4c)
    correlation: Literal[*CORRELATIONS] = "cross_attention"  # Figure 4a
    predictor: Literal[*PREDICTORS] = "linear"  # Figure 4b; deconv has three deconvolutions
    loss: Literal[*LOSSES] = "ce"  # Table 3
    # optimisation
    epochs: Count = 300  # passes over the images
    warmup_epochs: Real = 40.0  # of linear warm-up of the learning rate
    batch_size: Count = 4096  # contexts a step, over all processes
    lr: Positive = 2.4e-3  # peak learning rate at a batch of lr_batch
    lr_batch: Count = 4096  # the batch that lr is meant for; another one scales it linearly
    weight_decay: Real = 0.05  # of matrices; not of biases, norms and the cls token
    beta1: Decay = 0.9  # AdamW
    beta2: Decay = 0.95  # AdamW
    clip: Real = 1.0  # largest norm of the gradient; 0 does not clip
    tau: Share = 0.99  # target decay (Eq. 3) at the start, on its way to 1 by a cosine
    seed: Whole = 0  # of everything random
    max_steps: Whole = 0  # end after so many steps, schedules still span epochs; 0: all epochs
    # machine: all but dtype may differ when a run goes on (see FREE)
    micro_batch: Whole = 0  # contexts a process handles at once; 0 picks one that divides
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the chip has it
    compile: Literal["auto", "true", "false"] = "auto"  # auto compiles on CUDA
    workers: Workers = -1  # loader processes for each training process; -1 uses the cores at hand
    log_every: Count = 10  # steps
    eval_every: Whole = 500  # steps between evaluations on held-out images; 0: at the end only
    save_every: Whole = 1000  # steps between checkpoints; 0 goes by save_minutes only
    save_minutes: Real = 15.0  # minutes between checkpoints; 0 goes by save_every only
    bench: Whole = 0  # time so many steps and print one JSON line; no log, no checkpoint

    def __post_init__(self):
        """Raise InputError for values that cannot work together, before any work starts."""
        if self.decoder_width % 32:
            raise InputError(f"--decoder_width {self.decoder_width} is no multiple of 32")
        stride = ENCODERS[self.model][2] if ENCODERS[self.model] else ResNet50.stride
        for name in ("context_size", "exemplar_size"):
            if getattr(self, name) % stride:
                raise InputError(f"--{name} {getattr(self, name)} is no multiple of {stride}, the "
                                 f"stride of {self.model}")
        if not 0 < self.context_scale[0] <= self.context_scale[1] <= 1:
            raise InputError(f"--context_scale {self.context_scale} must be 0 < low <= high <= 1")
        crop.check_crops(self.scale, self.ratio, self.rotation)


PRESETS = {
    "paper": {},
    "imagenette": dict(data="imagenette", out="out/imagenette", model="vit_s16", batch_size=512,
                       eval_every=90, save_every=900),
    "demo": dict(data="shapes", out="out/demo", model="vit_d8", context_size=64, exemplar_size=32,
                 transforms="none", decoder_width=64, decoder_depth=2, freeze_patch_embed=False,
                 epochs=3, warmup_epochs=0.1, batch_size=16, lr=4e-3, lr_batch=16, tau=0.9,
                 workers=0, log_every=50, eval_every=250, save_every=250),
}


# ---------------------------------------------------------------------------------- 2. the steps

# Everything random is seeded by (seed, stream, ...). The streams:
#   1 the held-out split        2 (epoch) the order of the images    3 (epoch, image) its crop
#   4 (step) the exemplars      5 the held-out exemplars             6 the boxes of the mean map
#   7 (step, micro-batch, process) MixUp, CutMix, drop path          8 (image) the start of PGD

class Plan(NamedTuple):
    """The arithmetic of a run: what a process handles at once, how many steps there are."""

    images: int  # to train on
    micro: int  # contexts a process handles at once
    accumulate: int  # micro-batches a step, for each process
    per_epoch: int  # steps
    total: int  # steps that the schedules span
    stop: int  # the step after which this run ends
    warmup: int  # steps
    peak: float  # learning rate at this batch size


def make_plan(cfg, machine, images):
    """The Plan of a config on this machine. Raises InputError: too few images, no even split."""
    share, rest = divmod(cfg.batch_size, machine.world)
    if rest or not share:
        near = max(1, round(cfg.batch_size / machine.world)) * machine.world
        raise InputError(f"--batch_size {cfg.batch_size} is not divisible by {machine.world} "
                         f"processes; {near} would be")
    # A ViT-B/16 takes about 50 MB for a context (an estimate); half of the memory stays free.
    cuda = machine.device.type == "cuda"
    fits = torch.cuda.get_device_properties(machine.device).total_memory // 10**8 if cuda else 32
    most = cfg.micro_batch or min(512, fits)
    micro = max(k for k in range(1, min(most, share) + 1) if share % k == 0)
    if cfg.micro_batch and micro != cfg.micro_batch:
        raise InputError(f"--micro_batch {cfg.micro_batch} does not divide the {share} images of a "
                         f"process; {micro} would")
    per_epoch = images // cfg.batch_size
    if not per_epoch:
        raise InputError(f"{cfg.data!r} has {images} images to train on, fewer than one batch of "
                         f"{cfg.batch_size}: give more images or a smaller --batch_size")
    total = cfg.epochs * per_epoch
    stop = BENCH_WARMUP + cfg.bench if cfg.bench else min(total, cfg.max_steps or total)
    return Plan(images, micro, share // micro, per_epoch, total, stop,
                round(cfg.warmup_epochs * per_epoch), cfg.lr * cfg.batch_size / cfg.lr_batch)


def micro_batches(cfg, plan, rank, steps, repeats=1):
    """The (epoch, index) pairs of each micro-batch of process `rank`, step by step.

    An epoch is a permutation of the images; step s takes its s-th slice of batch_size, each process
    its part of the slice. With repeated augmentation each image comes `repeats` times in a step (at
    the border of a batch its repeats can fall into two steps), each time cropped as in another
    epoch, and an epoch shows 1 / repeats of the images."""
    share, shuffled = plan.micro * plan.accumulate, None
    for step in steps:
        epoch, step_of_epoch = divmod(step, plan.per_epoch)
        if epoch != shuffled:
            order = np.random.default_rng((cfg.seed, 2, epoch)).permutation(plan.images).tolist()
            shuffled = epoch
        begin = step_of_epoch * cfg.batch_size
        keys = [(epoch * repeats + j % repeats, order[j // repeats])
                for j in range(begin, begin + cfg.batch_size)]
        keys = [key for k in range(repeats) for key in keys[k::repeats]]  # repeats lie far apart
        mine = keys[rank * share:][:share]
        for i in range(0, share, plan.micro):
            yield mine[i:i + plan.micro]


def uniforms(cfg, stream, count):
    """The uniform numbers [count, K + 1, 15] of a stream, (4, step) in training, on the CPU."""
    rng = np.random.default_rng((cfg.seed, *stream))
    shape = (count, cfg.exemplars + 1, crop.UNIFORMS)
    return torch.from_numpy(rng.random(shape, dtype=np.float32))


def contexts_of(source, indices, cfg, replace=True):
    """The data set of random contexts."""
    cut = functools.partial(crop.cut_context, size=cfg.context_size, scale=cfg.context_scale,
                            flip=cfg.context_flip)
    return crop.Samples(source, indices, cfg.seed, cut, replace)


def make_pairs(contexts, u, cfg):
    """crop.make_pairs with the config's crops."""
    return crop.make_pairs(contexts, u, cfg.exemplar_size, cfg.scale, cfg.ratio, cfg.rotation,
                           cfg.flip, cfg.transforms, cfg.jitter, cfg.gray, cfg.blur, cfg.solarize)


# ---------------------------------------------------------------------------------- 3. schedules

def learning_rate(step, total, peak, warmup, schedule="cosine"):
    """Linear warm-up to `peak` at step warmup - 1, then a half cosine to 0 at step `total`, or with
    schedule "linear" a straight line."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "linear":
        return peak * (total - step) / (total - warmup)
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def target_decay(step, total, start):
    """tau of Eq. 3: `start` at step 0, a half cosine to 1 at step `total`."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / total)) / 2


def parameter_groups(model, weight_decay, scale=lambda name: 1.0):
    """Matrices decay; biases, norms (one dimension) and the cls token do not. A group's learning
    rate is `scale` times that of the run."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim < 2 or name.endswith("cls_token") else weight_decay
            group = dict(params=[], weight_decay=decay, scale=scale(name))
            groups.setdefault((decay, group["scale"]), group)["params"].append(p)
    return list(groups.values())


def set_learning_rate(optimizer, lr):
    """Give each group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


# ----------------------------------------------------------------------------------- 4. held-out

@contextlib.contextmanager
def measuring(model, machine):
    """Evaluation mode, no gradients, nothing compiled anew for other shapes."""
    training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), machine.autocast():
        yield
    model.train(training)


def mean_map(cfg, machine):
    """The per-pixel mean [m, m] of 4096 maps: the best predictor that ignores the exemplar."""
    u = machine.send(uniforms(cfg, (6,), 4096)[:, 0, :6].contiguous())
    theta = crop.affine_from_boxes(
        crop.sample_boxes(u, cfg.scale, cfg.ratio, cfg.rotation, cfg.flip))
    mean = sum(crop.rasterize_maps(t, cfg.context_size).sum(0) for t in theta.split(256)) / 4096
    return mean.clamp(1e-4, 1 - 1e-4)


def effective_rank(x):
    """exp of the entropy of the covariance's spectrum of x [N, D], in float64; 1 if x is constant
    to float32's precision, nan if it is not finite."""
    if not x.isfinite().all():
        return math.nan
    spectrum = torch.linalg.svdvals(x - x.mean(0)) ** 2
    spectrum[spectrum < 1e-12 * x.square().sum()] = 0  # rounding
    p = spectrum / spectrum.sum().clamp(min=1e-300)
    return math.exp(-torch.special.xlogy(p, p).sum())


class HeldOut:
    """At most 256 fixed images with fixed crops, never trained on.

    skill = 1 - loss / baseline, where baseline is the loss of the average map, the same answer for
    every exemplar. 0: no better than that; 1: perfect. skill_swapped is its control: with the
    exemplars of another image it is negative where the model is confident, and wrong. rank: the
    effective rank of the exemplars' features, near 1 when they collapse. The loss is cross-entropy
    whatever the model was trained with, so skill does not compare the losses of Table 3."""

    MEASURES = ("baseline", "skill", "skill_swapped", "heldout_loss", "rank")

    def __init__(self, source, indices, cfg, machine):
        dataset = contexts_of(source, indices, cfg)
        if len(dataset) < 2:
            raise InputError(f"{cfg.data!r} leaves {len(dataset)} images to hold out: two are "
                             "needed, to swap their exemplars")
        contexts, _ = crop.collate([dataset[0, i] for i in range(len(dataset))])
        self.cfg, self.machine = cfg, machine
        self.contexts = machine.send(contexts)
        self.u = machine.send(uniforms(cfg, (5,), len(contexts)))
        self.mean_map = mean_map(cfg, machine)

    def evaluate(self, cim):
        """-> a dict of MEASURES. Every process does the same; the log has those of process 0."""
        losses, features, n = 0, [], len(self.contexts)
        for rows in torch.arange(n).tensor_split(max(1, n // 8)):
            context, exemplars, maps, _ = make_pairs(self.contexts[rows], self.u[rows], self.cfg)
            with measuring(cim, self.machine):
                h_c, h_z = cim.encode(context, exemplars)
                logits = [cim.decoder(h_c, h, maps.shape[-1]) for h in (h_z, h_z.roll(1, 0))]
            logits.append(self.mean_map.logit().expand_as(maps))
            losses += len(rows) * torch.stack([F.binary_cross_entropy_with_logits(x, maps)
                                               for x in logits])
            features.append(h_z[:, :, cim.online.prefix:].float().mean(2))
        loss, swapped, baseline = (losses / n).tolist()
        return dict(heldout_loss=loss, baseline=baseline, skill=1 - loss / baseline,
                    skill_swapped=1 - swapped / baseline,
                    rank=effective_rank(torch.cat(features).flatten(0, 1).cpu().double()))

    def paint(self, cim, step):
        """Contact sheets with predicted maps (Figures 5, 6): maps.png of the first four images,
        and maps/STEP.png of the first one, to see it change over time."""
        for rows, name in ((4, "maps.png"), (1, os.path.join("maps", f"{step:07d}.png"))):
            pairs = make_pairs(self.contexts[:rows], self.u[:rows], self.cfg)
            with measuring(cim, self.machine):
                _, logits = cim(*pairs[:3])
            save_picture(os.path.join(self.cfg.out, name),
                         crop.contact_sheet(*(x.cpu() for x in (*pairs, logits))))


# ---------------------------------------------------------------------------------- 5. the model

def build_model(cfg):
    """The CIM of a config, or the tracker, freshly initialised."""
    if cfg.decoder != "cim":
        return Tracking(cfg.decoder, cfg.model, cfg.context_size, cfg.freeze_patch_embed)
    return CIM(cfg.model, cfg.context_size, cfg.decoder_width, cfg.decoder_depth,
               cfg.freeze_patch_embed, cfg.bootstrap, cfg.correlation, cfg.predictor, cfg.loss)


def build(cfg, machine):
    """The model and its optimiser, seeded, on the device."""
    torch.manual_seed(cfg.seed)
    cim = build_model(cfg).to(machine.device)
    if machine.syncs_batchnorm:
        cim = torch.nn.SyncBatchNorm.convert_sync_batchnorm(cim)  # changes a ResNet only
    return cim, torch.optim.AdamW(parameter_groups(cim, cfg.weight_decay), lr=cfg.lr,
                                  betas=(cfg.beta1, cfg.beta2), fused=machine.device.type != "mps")


def accelerate(model, machine):
    """Compile what is large where asked; wrap the model in DDP where there are processes."""
    if machine.compile:  # in place, so that state-dict keys stay clean
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks where DDP's buckets end
        compiled = [part for part in model.modules()
                    if isinstance(part, (Block, CorrelationLayer, ResNet50)) and not any(
                        isinstance(m, torch.nn.SyncBatchNorm) for m in part.modules())]
        for part in compiled:
            part.compile(fullgraph=True, dynamic=False)
        if machine.rank == 0:
            counts = Counter(type(part).__name__ for part in compiled)
            print("compiled", ", ".join(f"{n} {name}" for name, n in counts.items())
                  or "nothing: SyncBatchNorm would break the graph", flush=True)
    if machine.world == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[machine.device.index] if machine.device.type == "cuda" else None,
        gradient_as_bucket_view=True)


# --------------------------------------------------------------------------------------- 6. main

def main(argv=None):
    """The run of a Config, from the command line to encoder.pt; goes on from out/ckpt.pt."""
    cfg = parse_config(Config, PRESETS, argv, __doc__.split("\n")[0])
    machine = setup_machine(cfg.device, cfg.dtype, cfg.compile)
    with machine.first():
        (source, indices), validation, sentence = crop.train_and_val(
            cfg.data, cfg.seed, crop.read_classes(cfg.classes))
        plan = make_plan(cfg, machine, len(indices))
        data = crop.describe_data((source, indices), validation, cfg.out)
        held_out = HeldOut(*validation, cfg, machine)
        cim, optimizer = build(cfg, machine)
        saved = None if cfg.bench else load_checkpoint(os.path.join(cfg.out, "ckpt.pt"))
        start = begin_run(cfg, machine, data, cim, optimizer, saved)
    check_same_start(start, cfg, machine)
    describe(cfg, machine, plan, start, sentence,
             f"{cfg.model}, {cfg.exemplars} exemplars of each context")

    wrapped = accelerate(cim, machine)  # what the loop calls; cim has the same weights
    make = make_pairs
    if machine.compile:
        make = torch.compile(make_pairs, fullgraph=True, dynamic=False)
    parameters = [p for p in cim.parameters() if p.requires_grad]
    loader = iter(make_loader(contexts_of(source, indices, cfg),
                              micro_batches(cfg, plan, machine.rank, range(start, plan.stop)),
                              cfg.workers, machine, repeat=cfg.data == "none"))
    clock = Clock(start)
    signals = [] if cfg.bench else catch_signals()
    broken = machine.send(torch.tensor(0))  # the first step whose gradient was not finite
    row = saved["row"] if saved else None  # the last one of the log
    if start == 0 and machine.rank == 0 and not cfg.bench:
        held_out.paint(cim, 0)  # what is known before the first step
    u = uniforms(cfg, (4, start), cfg.batch_size)  # each process draws those of the whole step
    cim.train()
    for step in range(start, plan.stop):
        lr = learning_rate(step, plan.total, plan.peak, plan.warmup)
        tau = target_decay(step, plan.total, cfg.tau)
        set_learning_rate(optimizer, lr)
        loss = 0
        mine = u.chunk(machine.world)[machine.rank]
        for k, rows in enumerate(mine.split(plan.micro)):
            contexts, _ = clock.fetch(loader)
            context, exemplars, maps, _ = make(machine.send(contexts), machine.send(rows), cfg)
            with machine.accumulating(wrapped, last=k == plan.accumulate - 1):
                with machine.autocast():
                    part, _ = wrapped(context, exemplars, maps)
                part = part / plan.accumulate
                part.backward()
            loss = loss + part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        cim.update_target(tau)
        u = uniforms(cfg, (4, step + 1), cfg.batch_size)  # the next ones, while a GPU is at work
        if cfg.bench:
            clock.tick(machine)
            continue

        # Measure, log, save, in this order: a checkpoint stores how long the log is when it is
        # saved. Going on cuts the log to that length; the rows behind it are of lost steps.
        done, last = step + 1, step + 1 == plan.stop
        asked = machine.max(len(signals))  # whether any process was asked to stop
        broken = torch.where((broken == 0) & ~grad_norm.isfinite(), done, broken)
        evaluates = last or (cfg.eval_every and done % cfg.eval_every == 0)
        logs = evaluates or done == 1 or done % cfg.log_every == 0
        saves = last or asked or clock.saves(cfg, done)
        if logs or saves:
            check_finite(broken, done, lr, *cim.state_dict().values())
        if logs:
            row = dict(step=done, epoch=done / plan.per_epoch, loss=machine.mean(loss), lr=lr,
                       tau=None if cim.bootstrap == "shared" else tau,
                       grad_norm=grad_norm.item(), **clock.rates(done, cfg.batch_size))
            row |= held_out.evaluate(cim) if evaluates else dict.fromkeys(HeldOut.MEASURES)
            write_row(cfg, machine, plan, row)
        if evaluates and machine.rank == 0:
            held_out.paint(cim, done)
        if saves:
            save_checkpoint(cfg, machine, data, clock, row, done, cim, optimizer)
        if logs:
            clock.restart(done)
        if asked and not last:
            stop_early(done, machine)

    if cfg.bench:
        bench_report("pretrain", cfg, machine, clock, gflop_per_image(cfg))
    elif machine.rank == 0:
        path = os.path.join(cfg.out, "encoder.pt")
        weights = {k: v.cpu() for k, v in cim.online.state_dict().items()}
        save_file(path, lambda f: torch.save(weights, f))
        print(f"finished after {max(start, plan.stop)} steps. Look at {cfg.out}/maps.png; "
              f"{path} is the encoder, log.jsonl the curves (README, Outputs). Next:\n"
              f"python evaluate.py --bench=maps --ckpt={cfg.out}/ckpt.pt --data={cfg.data}\n"
              f"python finetune.py {'--recipe=demo ' * (cfg.preset == 'demo')}--init={path} "
              f"--data={cfg.data}")


# =========================================================== what the three scripts share: plumbing

# ------------------------------------------------------------------------------- 7. command line

def parse_config(Config, presets, argv=None, description=None):
    """The command line as a Config: flags win over the preset's values, which win over defaults.

    `--name value` and `--name=value` both work; pairs take two numbers, `--ratio 1/3 3` or
    `--ratio=1/3,3`; a switch takes true or false. Exits with status 2 and one sentence on a wrong
    name, type or bound; raises InputError for values that cannot work together."""
    notes = dict(re.findall(r"^    (\w+): [^#]*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS, description=description,
        usage="%(prog)s [--flag VALUE ...]; --help lists the flags")
    for f in dataclasses.fields(Config):
        how = dict(type=f.type, metavar="VALUE")
        if typing.get_origin(f.type) is Literal:
            how = dict(choices=typing.get_args(f.type))
        elif f.type in (Pair, Switch):
            how |= dict(nargs="+") if f.type is Pair else dict(nargs="?", const=True)
        parser.add_argument("--" + f.name, help=f"{notes.get(f.name, '')} ({f.default})", **how)
    values = vars(parser.parse_args(argv))
    for f in dataclasses.fields(Config):
        if f.type is Pair and f.name in values:
            values[f.name] = sum(values[f.name], ())
            if len(values[f.name]) != 2:
                parser.error(f"--{f.name} takes two numbers, low and high")
    chosen = dataclasses.fields(Config)[0]  # preset or recipe
    return Config(**presets.get(values.get(chosen.name, chosen.default), {}) | values)


def describe(cfg, machine, plan, start, data, model):
    """Print what is about to run, the arithmetic written out. data, model: a sentence about each.
    """
    if machine.rank == 0:
        print(f"data     {cfg.data}: {data}\n"
              f"model    {model}\n"
              f"machine  {machine.world} x {machine.device}, {machine.dtype}\n"
              f"batch    {cfg.batch_size} = {machine.world} processes x {plan.accumulate} "
              f"micro-batches x {plan.micro} images\n"
              f"lr       {cfg.lr:g} x {cfg.batch_size} / {cfg.lr_batch} = {plan.peak:.3g}, after "
              f"{plan.warmup} steps of warm-up"
              f"{', which is the whole run' if plan.warmup >= plan.total else ''}\n"
              f"steps    {plan.per_epoch} an epoch x {cfg.epochs} epochs = {plan.total}; from "
              f"{start} to {plan.stop}", flush=True)


def run(main):
    """Call a script's main. An InputError, which the user can mend, becomes one sentence and
    status 1; anything else keeps its traceback."""
    try:
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
        main()
        if dist.is_initialized():  # not after an error: the others may not be there any more
            dist.destroy_process_group()
    except InputError as error:
        # Before the process group exists all processes fail alike and process 0 speaks; later an
        # error is this process's own. That of a loader's worker comes with its traceback.
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized():
            reason = str(error)
            if reason.startswith("Caught "):
                reason = reason.split("crop.InputError: ", 1)[-1].strip()
            print(f"{os.path.basename(sys.argv[0])}: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint of a training run")
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would complain
        for worker in multiprocessing.active_children():  # they ignore SIGTERM
            worker.kill()


# -------------------------------------------------------------------------------- 8. the machine

@dataclass
class Machine:
    """Where this process runs: its device, its number among `world` processes, its precision."""

    device: torch.device
    rank: int
    world: int
    dtype: str  # float32 or bfloat16
    compile: bool

    def autocast(self):
        """bf16 for matrix products and convolutions, fp32 for the weights and sums."""
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == "bfloat16")

    def send(self, tensor):
        """A CPU tensor to the device; from pinned memory, so that CUDA does not make us wait."""
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def accumulating(self, model, last):
        """Gradients of the processes meet at the last micro-batch of a step only."""
        return model.no_sync() if self.world > 1 and not last else contextlib.nullcontext()

    def sum(self, *tensors):
        """Sum each tensor over the processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def mean(self, value):
        """The mean over the processes of a scalar tensor, as a float."""
        self.sum(value)
        return value.item() / self.world

    def max(self, number):
        """The largest of an integer over the processes, which wait here for each other."""
        if self.world == 1:
            return number
        number = torch.tensor(number)  # on the CPU, so that no GPU is waited for
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    @contextlib.contextmanager
    def first(self):
        """Let process 0 do something, a download perhaps, before the others. If it fails there, the
        others never begin, so that an error is printed once; torchrun ends them."""
        if self.rank > 0:
            try:
                self.max(0)
            except RuntimeError:  # process 0 has ended, and has printed why
                sys.exit(1)
        yield
        if self.rank == 0:
            self.max(0)

    @property
    def syncs_batchnorm(self):
        """Whether BatchNorm sees the images of all processes; SyncBatchNorm needs CUDA."""
        return self.device.type == "cuda" and self.world > 1

    def share_buffers(self, model):
        """Give every process the BatchNorm statistics of process 0, as DDP does before a step."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def setup_machine(device="auto", dtype="auto", compile="auto"):
    """Join torchrun's process group, if there is one, and resolve what is `auto`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = found.type if found else "cpu"
    device = found if device == "auto" else device
    if device not in ("cpu", found):
        raise InputError(f"--device {device}: PyTorch sees no such device here; --device {found} "
                         "works")
    index, native = None, False  # whether the hardware multiplies bf16
    if device == "cpu":
        able = torch.cpu.get_capabilities()
        native = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    elif device == "cuda":
        index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > count > 1 or index >= count > 1:
            raise InputError(f"{local} processes on {count} GPUs: start at most "
                             f"--nproc_per_node={count}")
        index = index if count > 1 else 0  # some launchers show each process its own GPU alone
        torch.cuda.set_device(index)
        native = torch.cuda.get_device_capability() >= (8, 0)
    if dtype == "auto":
        dtype = "bfloat16" if native else "float32"
    device = torch.device(device, index)
    if world > 1:  # one group for tensors on the CPU and on GPUs
        cuda = device.type == "cuda"
        # torchrun's store outlives a restart, and with it the addresses of dead processes.
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # nodes count restarts each for itself
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                                    rank=rank, world_size=world, timeout=timedelta(minutes=30),
                                    device_id=device if cuda else None)
        except RuntimeError as error:  # a network interface, two processes on one GPU, ...
            raise InputError(f"process {rank} cannot join the others: {error}") from error
    return Machine(device, rank, world, dtype, can_compile(compile, device))


def can_compile(asked, device):
    """Whether to compile: "auto" does on CUDA, if compiling one addition works there, which finds a
    missing Triton or C compiler. Raises InputError if it is asked for and that fails."""
    if asked == "false" or asked == "auto" and device.type != "cuda":
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"torch.compile does not work here ({reason})"
        if asked == "true":
            raise InputError(f"--compile=true: {reason}") from error
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {reason}; going on without it", file=sys.stderr)
        return False


# --------------------------------------------------------------------------------- 9. the loader

STOPPERS = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
STOPPED = 75  # exit status after one of them: EX_TEMPFAIL, the same command should be run again


def quiet_worker(_):
    """Loader workers leave signals to the process that trains, which needs them to its last step.
    """
    for number in (signal.SIGINT, *STOPPERS):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, batches, workers, machine, repeat=False):
    """A loader of `batches` (lists of keys of crop.Samples); workers < 0 takes the cores at hand,
    16 at most. repeat: load the first batch only and give it for each."""
    if repeat:
        return itertools.repeat(crop.collate([dataset[key] for key in next(batches, [])]))
    if workers < 0:
        able = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if able else os.cpu_count()
        workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=crop.collate,
        worker_init_fn=quiet_worker, pin_memory=machine.device.type == "cuda",
        persistent_workers=workers > 0)


class Clock:
    """When the last row and the last checkpoint were written, how long the loop has waited for
    images since that row, and for --bench the moment at which each step ended."""

    def __init__(self, step):
        self.ticks, self.saved_at = [], time.perf_counter()
        self.restart(step)

    def restart(self, step):
        """Begin a new stretch of steps."""
        self.step, self.waited, self.began = step, 0.0, time.perf_counter()

    def fetch(self, loader):
        """The loader's next batch."""
        began = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - began
        return batch

    def rates(self, step, batch_size):
        """-> images_per_s and data_wait, a fraction of the time, since the last row."""
        seconds = time.perf_counter() - self.began
        return dict(images_per_s=(step - self.step) * batch_size / seconds,
                    data_wait=self.waited / seconds)

    def saves(self, cfg, done):
        """Whether a checkpoint is to be written after step `done`, by the steps or by the clock."""
        seconds = time.perf_counter() - self.saved_at
        return bool(cfg.save_every and done % cfg.save_every == 0
                    or cfg.save_minutes and seconds > 60 * cfg.save_minutes)

    def tick(self, machine):
        """Note the end of a step, once the device has finished it."""
        if machine.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ticks.append((time.perf_counter(), self.waited))


def catch_signals():
    """-> a list to which SIGTERM and SIGUSR1 add their number, so that the loop can stop."""
    came = []
    for number in STOPPERS:
        signal.signal(number, lambda number, _: came.append(number))
    return came


def stop_early(done, machine):
    """End this process after a signal, when the checkpoint is written."""
    machine.max(0)  # torchrun ends all when the first one leaves: wait for process 0
    if machine.rank == 0:
        print(f"stopped by a signal after step {done} and saved; the same command goes on",
              file=sys.stderr)
    sys.exit(STOPPED)


# ------------------------------------------------------------------------ 10. checkpoint and log

# Fields that may differ when a run goes on: they change where and how fast it runs, not what.
FREE = ("out", "micro_batch", "device", "compile", "workers", "log_every", "eval_every",
        "eval_epochs", "save_every", "save_minutes", "max_steps", "bench", "preset", "recipe")


def save_file(path, write):
    """Let write(file) fill a temporary file beside `path`, then move it there: all or nothing.
    Folders are made. Raises InputError when it cannot be written."""
    temporary = path + ".tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"cannot write {path!r}: {reason}. Older files are untouched: make room, "
                         "then give the same command again") from error


def save_text(path, text):
    """A string as a file."""
    save_file(path, lambda f: f.write(text.encode()))


def save_picture(path, picture):
    """A PIL image as a PNG file."""
    save_file(path, lambda f: picture.save(f, "PNG"))


def plain(cfg):
    """A config as JSON's types: tuples become lists, as in a config that was read from a file."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def restore(Config, values, path):
    """The Config that was read from the file `path` as a dict, each field checked as its flag is.
    Raises InputError where there is none."""
    kinds = {f.name: f.type for f in dataclasses.fields(Config)}
    try:
        for name, value in values.items():
            if typing.get_origin(kinds[name]) is not Literal:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                values = values | {name: kinds[name](text)}
            elif value not in typing.get_args(kinds[name]):
                raise ValueError(f"{value!r} is no {name}")
        return Config(**values)
    except (AttributeError, LookupError, ValueError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{path!r} holds no config of this version of the code: {error}"
                         ) from error


CHECKPOINT = dict(step=int, config=dict, data=dict, log_bytes=int, row=dict, model=dict,
                  optimizer=dict)  # what is in it


def save_checkpoint(cfg, machine, data, clock, row, done, model, optimizer):
    """Write ckpt.pt after step `done`: tensors and plain types only, all that going on needs. data:
    from crop.describe_data; row: the last one of the log."""
    if machine.rank == 0:
        state = dict(step=done, config=plain(cfg) | {"dtype": machine.dtype}, data=data,
                     log_bytes=os.path.getsize(os.path.join(cfg.out, "log.jsonl")), row=row,
                     model=model.state_dict(), optimizer=optimizer.state_dict())
        save_file(os.path.join(cfg.out, "ckpt.pt"), lambda f: torch.save(state, f))
    clock.saved_at = time.perf_counter()


def load_checkpoint(path):
    """Read a checkpoint: tensors and plain types only, no pickled code is run. None: there is no
    such file. Raises InputError when it is no checkpoint of a training script."""
    if not os.path.lexists(path):
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("config", "data", "row"):  # plain types only
            saved[name] = json.loads(json.dumps(saved.get(name)))
        wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(saved.get(name), kind)]
        problem = f"it lacks a proper {', '.join(wrong)}" if wrong else None
        if not wrong and min(saved["step"], saved["log_bytes"]) < 0:
            problem = "its step is below 0"
    except Exception as error:  # torch.load raises many kinds on files that are none
        problem = type(error).__name__
    if problem:
        raise InputError(f"{path!r} is not a training checkpoint of this version of the code "
                         f"({problem}); where it stands in the way of a run, move it away or name "
                         "another --out")
    return saved


def load_states(saved, path, model, optimizer=None):
    """Put a checkpoint's weights into the model, and its averages of gradients into the optimiser,
    whose settings stay those of the config. Raises InputError where anything does not fit: the
    fused optimiser would not look at shapes."""
    try:
        model.load_state_dict(saved["model"])
        if not all(x.isfinite().all() for x in model.state_dict().values()):
            raise ValueError("its weights are not finite")
        if optimizer:
            load_averages(optimizer, saved["optimizer"]["state"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]  # PyTorch lists all that differs below it
        raise InputError(f"{path!r} does not fit this version of the code ({reason})") from error


def load_averages(optimizer, state):
    """The optimiser's part of load_states."""
    names = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else (
        {"momentum_buffer"} if optimizer.defaults["momentum"] else set())
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    for p in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        averages = optimizer.state[p]
        shapes = {name: x.shape for name, x in averages.items()}
        if names and shapes != {name: () if name == "step" else p.shape for name in names}:
            raise ValueError("the optimiser's state is of other parameters")
        for name in names - {"step"}:  # laid out in memory as the parameter
            averages[name] = torch.empty_like(p, requires_grad=False).copy_(averages[name])


def begin_run(cfg, machine, data, model, optimizer, saved):
    """Put the checkpoint `saved` (None: there is none) into model and optimiser, and open the run's
    folder. -> the number of steps done.

    Raises InputError naming the fields in which the checkpoint's config differs from cfg, FREE ones
    excepted, or its data from `data`; when the checkpoint does not fit; when another run is at work
    in the folder; when it cannot be written."""
    if saved:
        path = os.path.join(cfg.out, "ckpt.pt")
        theirs = plain(type(cfg)())  # what a field was before an older checkpoint had it
        theirs |= saved["config"] | saved["data"]
        mine = plain(cfg) | {"dtype": machine.dtype} | data
        differ = [f"{k} ({theirs.get(k)} there, {mine.get(k)} here)"
                  for k in sorted(mine.keys() | theirs.keys())
                  if k not in FREE and mine.get(k) != theirs.get(k)]
        if differ:
            raise InputError(f"{path!r} belongs to a run that differs in {', '.join(differ[:9])}"
                             f"{' ...' if len(differ) > 9 else ''}; give the same flags and data "
                             "to go on with it, or another --out to start afresh")
        load_states(saved, path, model, optimizer)
    if machine.rank == 0 and not cfg.bench:
        lock_folder(cfg.out)
        save_text(os.path.join(cfg.out, "config.json"), json.dumps(plain(cfg), indent=1))
        log = os.path.join(cfg.out, "log.jsonl")
        try:
            with open(log, "a+b") as f:  # rows beyond the checkpoint are of steps that were lost
                f.seek(0)
                text, known = f.read(), saved["log_bytes"] if saved else 0
                f.truncate(text.rfind(b"\n", 0, known) + 1)
                if len(text) < known:
                    print(f"warning: {log!r} lacks rows that the checkpoint knows",
                          file=sys.stderr)
        except OSError as error:
            raise InputError(f"cannot write {log!r}: {error}") from error
    return saved["step"] if saved else 0


LOCKS = []  # open files, whose locks end with the process


def lock_folder(folder):
    """Make and lock a folder. Raises InputError when another process has it. lockf, since loader
    workers that outlive a killed run for some seconds would inherit a flock."""
    try:
        import fcntl
        os.makedirs(folder, exist_ok=True)
        LOCKS.append(open(os.path.join(folder, "lock"), "a"))
    except (ImportError, OSError):  # Windows; a folder that the next write will complain about
        return
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"another run is at work in {folder!r}: wait for it, or name another "
                         "--out") from None
    except OSError:  # a file system without locks
        pass


def check_same_start(start, cfg, machine):
    """Raise InputError where the processes found different checkpoints."""
    if start != machine.max(start):
        raise InputError(f"another process goes on from a later checkpoint than the one in "
                         f"{cfg.out!r} here: all nodes need to see the same folder")


def check_finite(broken, step, lr, *numbers):
    """End this process where a gradient was not finite (broken: the first such step, or 0), or one
    of `numbers`, the weights or measures at `step` (or their sum of squares). Raises InputError."""
    numbers = [torch.as_tensor(x).detach() for x in numbers]
    norm = torch.nn.utils.get_total_norm([x for x in numbers if x.is_floating_point()])
    if int(broken) or not norm.isfinite():
        if int(broken) and int(os.environ.get("RANK", 0)) > 0:
            sys.exit(1)  # process 0 says it
        raise InputError(f"training diverged: the loss, a gradient or a weight is not finite at "
                         f"step {int(broken) or step} (learning rate {lr:.3g}); ckpt.pt, if there "
                         "is one, is of a step before. Try a lower --lr and another --out")


SHOWN = {"skill": "skill {:.3f}", "skill_swapped": "swapped {:.3f}", "rank": "rank {:.1f}",
         "top1": "top-1 {:.2f}%", "top5": "top-5 {:.2f}%", "miou": "mIoU {:.2f}%"}


def write_row(cfg, machine, plan, row):
    """Append a row to log.jsonl and print it as a line. A logger of your own hooks in here; columns
    that were not measured at a step are None."""
    check_finite(0, row["step"], row["lr"], *(x for x in row.values() if isinstance(x, float)))
    if machine.rank > 0:
        return
    try:
        with open(os.path.join(cfg.out, "log.jsonl"), "a") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise InputError(f"step {row['step']}: cannot write log.jsonl: {error}") from error
    shown = "".join(text.format(row[name]) + "  " for name, text in SHOWN.items()
                    if row.get(name) is not None)
    left = (plan.stop - row["step"]) * cfg.batch_size / row["images_per_s"]
    print(f"step {row['step']}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  {shown}"
          f"lr {row['lr']:.2e}  {row['images_per_s']:.0f} images/s  waiting for data "
          f"{row['data_wait']:.0%}  {plain_time(left)} left", flush=True)


def plain_time(seconds):
    """Hours, minutes and seconds, as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


# ----------------------------------------------------------------------------------- 11. --bench

BENCH_WARMUP = 3  # steps before --bench starts its clock


def count_gflop(build, *shapes):
    """GFLOP of forward and backward for one image; a multiply-add is two. build() makes the model,
    shapes: of its inputs for one image. Nothing is computed (the meta device)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        outputs = build()(*(torch.empty(2, *shape) for shape in shapes))
        sum(output.sum() for output in outputs).backward()
    return counter.get_total_flops() / 2 / 1e9


def gflop_per_image(cfg):
    """GFLOP of a training step for one context with its exemplars."""
    m, n, K = cfg.context_size, cfg.exemplar_size, cfg.exemplars
    return count_gflop(lambda: build_model(cfg), (3, m, m), (K, 3, n, n), (K, m, m))


def matmul_tflops(machine):
    """The rate that the chip's matrix product reaches in this precision, in TFLOP/s: the floor that
    a step is measured against."""
    from torch.utils.benchmark import Timer  # here, since it warns where a CUDA toolkit lacks a GPU
    side = 8192 if machine.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=machine.device, dtype=getattr(torch, machine.dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.blocked_autorange(min_run_time=0.5).median / 1e12


def bench_report(name, cfg, machine, clock, gflop):
    """Print the JSON of --bench and write bench.json: the time of the steps after warm-up, and the
    most memory that tensors took on a CUDA device, or this process, without workers, elsewhere."""
    if machine.rank > 0:
        return
    if machine.device.type == "cuda":
        chip, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        import resource  # not on Windows
        chip = f"{platform.machine()}, {torch.get_num_threads()} threads"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024)  # in bytes there
    steps = np.diff(np.array(clock.ticks[BENCH_WARMUP - 1:]), axis=0)  # [N, 2]: step, waiting
    low, median, high = np.percentile(steps[:, 0], [10, 50, 90]).tolist()
    tflops, reached = gflop * cfg.batch_size / median / 1e3 / machine.world, matmul_tflops(machine)
    report = dict(bench=name, n=len(steps), step_s=median, step_s_p10=low, step_s_p90=high,
                  images_per_s=cfg.batch_size / median,
                  data_wait=float(steps[:, 1].sum() / steps[:, 0].sum()), gflop_per_image=gflop,
                  tflops_per_process=tflops, matmul_tflops=reached,
                  share_of_matmul=tflops / reached, peak_memory_gb=memory / 1e9,
                  model=cfg.model, data=cfg.data,
                  batch_size=cfg.batch_size, processes=machine.world, device=chip,
                  dtype=machine.dtype, compile=machine.compile, torch=torch.__version__)
    report = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in report.items()})
    save_text(os.path.join(cfg.out, "bench.json"), report)
    print(report)


if __name__ == "__main__":
    run(main)
