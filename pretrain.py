"""pretrain.py: self-supervised pre-training by Correlational Image Modeling (Table 9).

    python pretrain.py --preset=demo                                  two CPU cores, five minutes
    python pretrain.py --preset=imagenette                            one GPU
    torchrun --nproc_per_node=8 pretrain.py --data=/data/imagenet     the paper's run

In the order in which things happen:

    1. Config      every field is a flag; the defaults are Table 9; PRESETS are other values
    2. the steps   which images and random numbers each step gets, on each process
    3. schedules   learning rate, tau, weight decay
    4. held-out    skill, its control, the IoU of the maps, maps.png
    5. the model   CIM and its optimiser, compiled, wrapped in DDP
    6. main        the loop

What pretrain.py, finetune.py and evaluate.py share and only keeps a run alive; a first reading can
stop here:

    7. command line   8. machine   9. loader   10. checkpoint and log   11. signals   12. --bench

A run is a function of its config and seed: the images, crops and uniform numbers of step s follow
from the seed and s alone. So an interruption and the number of workers change nothing on a CPU,
the number of processes and the micro-batch change the rounding of floats (with BatchNorm its
statistics too), and a checkpoint needs no loader state.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import typing
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
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

def number(text):
    """The type of a flag: a float, or a fraction such as 1/3."""
    return float(Fraction(text))


def pair(text):
    """The type of a flag with two numbers: 1/3,3."""
    low, high = map(number, text.split(","))
    return low, high


def switch(text):
    """The type of a flag that is true or false."""
    return ["false", "true"].index(text.lower()) == 1


@dataclass(frozen=True)
class Config:
    """The paper's recipe, Table 9. A field's type parses its flag, its comment is the flag's line
    in --help."""

    preset: Literal["paper", "imagenette", "demo", "photos"] = "paper"  # values; flags win
    # where
    data: str = "data/imagenet"  # a folder; shapes, imagenette; none: noise to time
    classes: str = ""  # a file with the class folders to keep, one a line (its first word)
    out: str = "out/pretrain"  # the run's folder: config.json, log.jsonl, ckpt.pt, encoder.pt
    # crops (Table 1)
    context_size: int = 160  # side of a context, pixels
    context_scale: pair = (0.5, 1.0)  # area of a context, as a fraction of the image
    context_flip: number = 0.5  # probability of a mirrored context, before exemplars are cut
    exemplar_size: int = 64  # side of an exemplar, pixels
    exemplars: int = 6  # of each context
    scale: pair = (0.05, 1.0)  # area r0 of an exemplar, as a fraction of the context
    ratio: pair = (1 / 3, 3.0)  # aspect r1 = h / w, log-uniform
    rotation: number = 45.0  # largest angle, degrees
    flip: number = 0.5  # probability of a mirrored exemplar
    transforms: Literal["exemplar", "context", "both", "none"] = "exemplar"  # what is recoloured
    jitter: number = 0.8  # probability of colour jitter
    gray: number = 0.2  # probability of gray
    blur: number = 0.5  # probability of Gaussian blur
    solarize: number = 0.2  # probability of solarisation
    # model
    init: str = ""  # weights to begin with, see the README; no fine-tuned ViT
    model: Literal[tuple(ENCODERS)] = "vit_b16"  # the encoder
    freeze_patch_embed: switch = True  # keep a ViT's patch embedding as initialised
    bootstrap: Literal[tuple(BOOTSTRAPS)] = "online_exemplar"  # Table 2; shared weights: no tau
    decoder: Literal[("cim", *TRACKERS)] = "cim"  # trackers (Table 4): no bootstrap, no next five
    decoder_width: int = 512  # channels, a multiple of 32; one head for each 32 (Figure 4d)
    decoder_depth: int = 1  # correlation layers (Figure 4c)
    correlation: Literal[tuple(CORRELATIONS)] = "cross_attention"  # Figure 4a
    predictor: Literal[tuple(PREDICTORS)] = "linear"  # Figure 4b; deconv has three deconvolutions
    loss: Literal[tuple(LOSSES)] = "ce"  # Table 3
    # optimisation
    epochs: int = 300  # passes over the images
    steps: int = 0  # instead of epochs, where --epochs=0
    warmup_epochs: number = 40.0  # of linear warm-up of the learning rate, also with --steps
    batch_size: int = 4096  # contexts a step, over all processes
    lr: number = 2.4e-3  # peak learning rate at a batch of lr_batch
    lr_batch: int = 4096  # the batch that lr is meant for; another one scales it linearly
    weight_decay: number = 0.05  # of matrices; not of biases, norms and the cls token
    beta1: number = 0.9  # AdamW
    beta2: number = 0.95  # AdamW
    clip: number = 1.0  # largest norm of the gradient; 0 does not clip
    tau: number = 0.99  # target decay (Eq. 3) at the start, on its way to 1 by a cosine
    seed: int = 0  # of everything random
    max_steps: int = 0  # end after so many steps, schedules still span epochs; 0: all epochs
    # machine: all but dtype may differ when a run goes on (see FREE)
    micro_batch: int = 256  # contexts a process handles at once, at most
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the chip has it
    compile: Literal["auto", "true", "false"] = "auto"  # auto compiles on CUDA
    workers: int = -1  # loader processes for each training process; -1 uses the cores at hand
    log_every: int = 10  # steps
    eval_every: int = 500  # steps between evaluations on held-out images
    save_every: int = 1000  # steps between checkpoints
    bench: int = 0  # time so many steps and print one JSON line; no log, no checkpoint

    def __post_init__(self):
        """Raise InputError for values that cannot work together, before any work starts."""
        crop.check_crops(self.scale, self.ratio, self.rotation)
        if (self.epochs > 0) == (self.steps > 0):
            raise InputError("--epochs and --steps: one of them is 0, the other one is not")
        stride = ENCODERS[self.model][2] if ENCODERS[self.model] else ResNet50.stride
        for name, unit in (("context_size", stride), ("exemplar_size", stride),
                           ("decoder_width", 32)):
            if getattr(self, name) % unit:
                raise InputError(f"--{name} {getattr(self, name)} is no multiple of {unit}")


PRESETS = {
    "paper": {},
    "imagenette": dict(data="imagenette", out="out/imagenette", model="vit_s16", batch_size=512,
                       eval_every=90, save_every=900),
    "demo": dict(data="shapes", out="out/demo", model="vit_d8", context_size=64, exemplar_size=32,
                 transforms="none", decoder_width=64, freeze_patch_embed=False,
                 epochs=3, warmup_epochs=0.1, batch_size=16, lr=4e-3, lr_batch=16, tau=0.9,
                 workers=0, log_every=50, eval_every=250, save_every=250),
    "photos": dict(data="photos", out="out/photos", model="vit_e8", context_size=64,
                   exemplar_size=32, transforms="none", decoder_width=128,
                   freeze_patch_embed=False, epochs=0, steps=6000, warmup_epochs=1, batch_size=16,
                   lr=2e-3, lr_batch=16, log_every=50, eval_every=500, save_every=500),
}


# ---------------------------------------------------------------------------------- 2. the steps

# Everything random is seeded by (seed, stream, ...). The streams:
#   1 the held-out split        2 (epoch) the order of the images    3 (epoch, image) its crop
#   4 (step) the exemplars      5 the held-out exemplars             6 the boxes of the mean map
#   7 (step, micro-batch, process) MixUp, CutMix, drop path          8 (image) the start of PGD

class Plan(NamedTuple):
    """The arithmetic of a run: how a step is divided, how many steps there are."""

    images: int  # to train on
    share: int  # contexts of a step, for each process
    accumulate: int  # micro-batches a step, for each process
    per_epoch: int  # steps
    total: int  # steps that the schedules span
    stop: int  # the step after which this run ends
    warmup: int  # steps
    peak: float  # learning rate at this batch size


def make_plan(cfg, machine, images):
    """The Plan of a config on this machine, printed. Raises InputError where a batch cannot be
    divided, or has more images than there are."""
    counts = "batch_size", "micro_batch", "log_every", "save_every", "eval_every", "eval_epochs"
    if small := [f"--{name}" for name in counts if getattr(cfg, name, 1) < 1]:
        raise InputError(f"{', '.join(small)}: at least 1")
    share, rest = divmod(cfg.batch_size, machine.world)
    per_epoch = images // cfg.batch_size
    if rest or not per_epoch:
        raise InputError(f"--batch_size {cfg.batch_size} must divide over {machine.world} "
                         f"processes and be at most {images}, the number of images to train on")
    accumulate = math.ceil(share / cfg.micro_batch)
    machine.micro = micro = math.ceil(share / accumulate)  # some may have one less
    total = cfg.epochs * per_epoch or getattr(cfg, "steps", 0)  # fine-tuning counts in epochs
    if total < 1:
        raise InputError("no step to train: --epochs is 0")
    plan = Plan(images, share, accumulate, per_epoch, total, min(total, cfg.max_steps or total),
                round(cfg.warmup_epochs * per_epoch), cfg.lr * cfg.batch_size / cfg.lr_batch)
    machine.say(f"batch    {cfg.batch_size} = {machine.world} x {machine.device}, {machine.dtype}, "
                f"micro-batches: {accumulate}, of up to {micro} images\n"
                f"lr       {cfg.lr:g} x {cfg.batch_size} / {cfg.lr_batch} = {plan.peak:.3g}, after "
                f"{plan.warmup} steps of warm-up\n"
                f"steps    {per_epoch} an epoch, {total} in all")
    return plan


def micro_batches(cfg, plan, rank, steps, repeats=1):
    """The (epoch, index) pairs of each micro-batch of process `rank`, step by step.

    An epoch is a permutation of the images; step s takes its s-th slice of batch_size, each process
    its part of the slice. With repeated augmentation each image comes `repeats` times in a step (at
    the border of a batch its repeats can fall into two steps), each time cropped as in another
    epoch, and an epoch shows 1 / repeats of the images."""
    shuffled = None
    for step in steps:
        epoch, step_of_epoch = divmod(step, plan.per_epoch)
        if epoch != shuffled:
            order = np.random.default_rng((cfg.seed, 2, epoch)).permutation(plan.images).tolist()
            shuffled = epoch
        begin = step_of_epoch * cfg.batch_size
        keys = [(epoch * repeats + j % repeats, order[j // repeats])
                for j in range(begin, begin + cfg.batch_size)]
        keys = [key for k in range(repeats) for key in keys[k::repeats]]  # repeats lie far apart
        mine = keys[rank * plan.share:][:plan.share]
        for part in np.array_split(mine, plan.accumulate):
            yield [*map(tuple, part.tolist())]


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


HELD_OUT = 256  # images to measure on while training, at most


class HeldOut:
    """Fixed images with fixed crops, never trained on.

    skill = 1 - loss / baseline, where baseline is the loss of the average map, the same answer for
    every exemplar. 0: no better than that; 1: perfect. skill_swapped is its control: with the
    exemplars of another image it is negative where the model is confident, and wrong. The loss is
    cross-entropy whatever the model was trained with, so skill does not compare the losses of Table
    3. iou: of the maps at a probability of 0.5, in percent; iou_average is its control, the IoU of
    the average map at the threshold that is best for it."""

    def __init__(self, source, indices, cfg, machine, workers=0, keep=True):
        """keep: hold the images in memory, as training does, or else read them each time."""
        images = Batches(contexts_of(source, indices, cfg, replace=False), machine, workers, 16)
        self.cfg, self.machine, self.images = cfg, machine, list(images) if keep else images
        self.row = {j: i for i, j in enumerate(indices)}
        self.u = uniforms(cfg, (5,), len(indices))
        self.mean_map = mean_map(cfg, machine)

    def predict(self, cim, contexts, numbers):
        """-> the pairs (context, exemplars, maps, theta); the logits; the logits that the exemplars
        of another image of the batch give."""
        u = self.machine.send(self.u[[self.row[j] for j in numbers.tolist()]])
        pairs = make_pairs(contexts, u, self.cfg)
        with measuring(cim, self.machine):
            h_c, h_z = cim.encode(*pairs[:2])
            return pairs, *(cim.decoder(h_c, h, contexts.shape[-1]) for h in (h_z, h_z.roll(1, 0)))

    def evaluate(self, cim):
        """-> a dict of measures, the same for any number of processes."""
        thresholds = torch.linspace(0.02, 0.98, 49, device=self.mean_map.device)
        averages = (self.mean_map > thresholds[:, None, None]).float()  # [T, m, m]
        sums = torch.zeros(5 + len(averages), device=self.mean_map.device)  # n, and means below
        self.machine.share_buffers(cim)
        for contexts, numbers in self.images:
            (_, _, maps, _), logits, swapped = self.predict(cim, contexts, numbers)
            both = maps.flatten(2) @ averages.flatten(1).T  # [B, K, T]: pixels in box and average
            union = (maps.sum((2, 3))[..., None] + averages.sum((1, 2)) - both).clamp(min=1)
            losses = [F.binary_cross_entropy_with_logits(x, maps) for x in (
                logits, swapped, self.mean_map.logit().expand_as(maps))]
            means = [*losses, crop.map_iou(maps, logits).mean(), *(both / union).mean((0, 1))]
            sums += len(maps) * torch.stack([maps.new_ones(()), *means])
        self.machine.sum(sums)
        n, *means = sums.tolist()
        if n < 2 or not math.isfinite(sum(means)):
            raise InputError("held-out images: fewer than two can be read" if n < 2 else
                             "the model's outputs for held-out images are not finite")
        loss, swapped, baseline, iou, *averages = (x / n for x in means)
        return dict(heldout_loss=loss, baseline=baseline, skill=1 - loss / baseline,
                    skill_swapped=1 - swapped / baseline, iou=100 * iou,
                    iou_average=100 * max(averages), n=int(n))

    def paint(self, cim, path, count=4):
        """A contact sheet of the first images with predicted maps (Figures 5, 6)."""
        contexts, numbers = next(iter(self.images))  # 16 images
        pairs, logits, _ = self.predict(cim, contexts[:count], numbers[:count])
        sheet = crop.contact_sheet(*(x.cpu() for x in (*pairs, logits)))
        save_file(path, lambda f: sheet.save(f, "PNG"))


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
    return cim, torch.optim.AdamW(parameter_groups(cim, cfg.weight_decay), lr=cfg.lr,
                                  betas=(cfg.beta1, cfg.beta2), fused=machine.device.type != "mps")


def begin_with(cim, cfg, machine):
    """Put the encoder of --init into the online and the target encoder, and say so."""
    from finetune import load_encoder  # here, since finetune.py imports this file
    weights = load_encoder(cfg.init, cfg.model).encoder.state_dict()
    for encoder in cim.online, cim.target:
        encoder.load_state_dict(weights)
    machine.say(f"model    {cfg.model} from {cfg.init}")


def accelerate(model, machine):
    """Compile what is large where asked; wrap the model in DDP where there are processes. A
    ResNet's BatchNorm sees the micro-batch of its process, as in MoCo, and has the statistics of
    process 0: to exchange them would make a GPU wait 318 times for a micro-batch."""
    if machine.compile:  # in place, so that state-dict keys stay clean
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks where DDP's buckets end
        for part in model.modules():
            if isinstance(part, (Block, CorrelationLayer, ResNet50)):
                part.compile(fullgraph=True, dynamic=False)
    if machine.world == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[machine.device.index] if machine.device.type == "cuda" else None,
        gradient_as_bucket_view=True)


# --------------------------------------------------------------------------------------- 6. main

def main(argv=None):
    """The run of a Config, from the command line to encoder.pt; goes on from out/ckpt.pt."""
    cfg = parse_config(Config, PRESETS, argv, __doc__.split("\n")[0])
    with setup_machine(cfg) as machine, at_work(cfg.out, machine) as signals:
        train(cfg, machine, signals)


def train(cfg, machine, signals):
    """From the images to encoder.pt. signals: a list that grows when the run is asked to stop."""
    with machine.first():  # Imagenette may have to be downloaded
        (source, indices), (val, val_rows), sentence = crop.train_and_val(
            cfg.data, cfg.seed, crop.read_classes(cfg.classes))
    machine.say(f"data     {cfg.data}: {sentence}")
    plan = make_plan(cfg, machine, len(indices))
    if cfg.bench:
        plan = plan._replace(stop=BENCH_WARMUP + cfg.bench)
    held_out = HeldOut(val, val_rows[:HELD_OUT], cfg, machine)
    cim, optimizer = build(cfg, machine)

    def measure(done):
        score = held_out.evaluate(cim)
        if machine.rank == 0:
            held_out.paint(cim, f"{cfg.out}/maps.png")
            held_out.paint(cim, f"{cfg.out}/maps/{done:07d}.png", count=1)
        return score

    data = dict(images=len(source), classes=list(source.classes))
    progress = Progress(cfg, machine, plan, data, cim, optimizer, signals, measure, cfg.eval_every)
    start = 0 if cfg.bench else progress.resume()
    if cfg.init and not start:
        begin_with(cim, cfg, machine)
    wrapped = accelerate(cim, machine)  # what the loop calls; cim has the same weights
    make = torch.compile(make_pairs, fullgraph=True, dynamic=False, disable=not machine.compile)
    parameters = [p for p in cim.parameters() if p.requires_grad]
    loader = iter(make_loader(contexts_of(source, indices, cfg),
                              micro_batches(cfg, plan, machine.rank, range(start, plan.stop)),
                              cfg.workers, machine))
    cim.train()
    u = uniforms(cfg, (4, start), cfg.batch_size)  # each process draws those of the whole step
    for step in range(start, plan.stop):
        lr = learning_rate(step, plan.total, plan.peak, plan.warmup)
        tau = target_decay(step, plan.total, cfg.tau)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]  # which parameter_groups has set
        loss = 0
        mine = u.chunk(machine.world)[machine.rank]
        for k, rows in enumerate(mine.tensor_split(plan.accumulate)):
            contexts, _ = progress.fetch(loader)
            context, exemplars, maps, _ = make(machine.send(contexts), machine.send(rows), cfg)
            with machine.accumulating(wrapped, last=k == plan.accumulate - 1):
                with machine.autocast():
                    part, _ = wrapped(context, exemplars, maps)
                part = part * (len(rows) / plan.share)
                part.backward()
            loss = loss + part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        cim.update_target(tau)
        u = uniforms(cfg, (4, step + 1), cfg.batch_size)  # the next ones, while a GPU is at work
        if cfg.bench:
            progress.tick()
        else:  # log, measure, save, stop where it is time
            progress.after(step + 1, loss, lr, grad_norm, tau=tau)

    if cfg.bench:
        return bench_report(cfg, machine, progress.ticks)
    if machine.rank == 0:
        for name, encoder in (("encoder", cim.online), ("target", cim.target)):
            weights = {key: value.cpu() for key, value in encoder.state_dict().items()}
            save_file(f"{cfg.out}/{name}.pt", lambda f: torch.save(weights, f))
        machine.say(f"{progress.finished(start)}: {cfg.out}/encoder.pt, and its average, "
                    "target.pt. Look at maps.png and curves.png there.")
        if progress.row["skill"] < 0.02:
            machine.say("Its skill is below 0.02: the task is not learned. With another --out, "
                        "give it more time, another --lr, or an easier task (--transforms, "
                        "--rotation)")
        machine.say(f"Next:\n{next_commands(cfg)}")


# =========================================================== what the three scripts share: plumbing

# ------------------------------------------------------------------------------- 7. command line

def parse_config(Config, presets, argv=None, description=None):
    """The command line as a Config: flags win over the preset's values, which win over defaults.
    Exits with status 2 on a wrong name, type or choice."""
    notes = dict(re.findall(r"^    (\w+): [^#]*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS, description=description,
        usage="%(prog)s [--flag=VALUE ...]; --help lists the flags")
    for f in dataclasses.fields(Config):
        how = dict(type=f.type, metavar="VALUE")
        if typing.get_origin(f.type) is Literal:
            how = dict(choices=typing.get_args(f.type))
        parser.add_argument("--" + f.name, help=f"{notes.get(f.name, '')} ({f.default})", **how)
    flags = vars(parser.parse_args(argv))
    chosen = dataclasses.fields(Config)[0]  # preset or recipe
    return Config(**presets.get(flags.get(chosen.name, chosen.default), {}) | flags)


def run(main):
    """Call a script's main. An InputError, which the user can mend, becomes one sentence and
    status 1; anything else keeps its traceback."""
    try:
        main()
    except InputError as error:
        reason = str(error).split("InputError: ")[-1].strip()  # without a worker's traceback
        print(f"{os.path.basename(sys.argv[0])}: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint, if there is one")
    finally:
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would complain
        for worker in multiprocessing.active_children():  # they ignore SIGTERM
            worker.kill()
        if getattr(sys.exc_info()[1], "code", None) == STOPPED:
            os._exit(STOPPED)  # while Python shuts down, a thread of gloo can abort the process


# -------------------------------------------------------------------------------- 8. the machine

@dataclass
class Machine:
    """Where this process runs: its device, its number among `world` processes, its precision."""

    device: torch.device
    rank: int
    world: int
    dtype: str  # float32 or bfloat16
    compile: bool
    micro: int = 0  # images at once in training, once make_plan knows it

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

    def max(self, number):
        """The largest of an integer over the processes, which wait here for each other."""
        if self.world == 1:
            return number
        number = torch.tensor(int(number))  # on the CPU, so that no GPU is waited for
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    @contextlib.contextmanager
    def first(self):
        """Let process 0 do something, a download perhaps, before the others."""
        if self.rank > 0:
            self.max(0)
        yield
        if self.rank == 0:
            self.max(0)

    def say(self, text):
        """Print once, whatever the number of processes, as long as somebody listens."""
        if self.rank == 0:
            try:
                print(text, flush=True)
            except OSError:  # `| head` has gone, or a terminal
                sys.stdout = open(os.devnull, "w")

    def share_buffers(self, model):
        """Give every process the BatchNorm statistics of process 0, as DDP does before a step."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextlib.contextmanager
def setup_machine(cfg):
    """The Machine of a config; inside torchrun its process group is joined, and left at the end.
    `auto` is resolved: a GPU if there is one, bf16 where the hardware multiplies it."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = cfg.device
    if device == "auto":
        found = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator().type if found else "cpu"
    cuda, able = device == "cuda", torch.cpu.get_capabilities()
    native = device == "cpu" and any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16"))
    if cuda:
        if not torch.cuda.is_available():
            raise InputError("--device=cuda: PyTorch sees no such device here")
        torch.cuda.set_device(local)
        native = torch.cuda.get_device_capability() >= (8, 0)
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if native else "float32"
    compile = getattr(cfg, "compile", "false")  # evaluate.py does not compile
    machine = Machine(torch.device(device, local if cuda else None), rank, world, dtype,
                      compile == "true" or compile == "auto" and cuda)
    if world > 1:  # one group for tensors on the CPU and on GPUs
        # torchrun's store outlives a restart, and with it the addresses of dead processes.
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # nodes count restarts each for itself
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                                world_size=world, device_id=machine.device if cuda else None,
                                timeout=timedelta(hours=2))  # for a long scan of a slow disk
    try:
        yield machine
    except torch.OutOfMemoryError as error:
        advice = f": give --micro_batch={machine.micro // 2}" if machine.micro > 1 else ""
        raise InputError(f"the GPU's memory is full{advice}") from error
    if world > 1:  # not after an error: the others may not be there any more
        dist.destroy_process_group()


# --------------------------------------------------------------------------------- 9. the loader

def quiet_worker(_):
    """Loader workers leave signals to the process that trains, which needs them to its last step.
    """
    for number in (signal.SIGINT, *STOPPERS):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, batches, workers, machine):
    """A loader of `batches`: lists of keys of crop.Samples. workers < 0 takes the cores at hand, 16
    at most."""
    if workers < 0:
        able = hasattr(os, "sched_getaffinity")  # on Linux, where Slurm may lend some cores only
        cores = len(os.sched_getaffinity(0)) if able else os.cpu_count()
        workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=crop.collate,
        worker_init_fn=quiet_worker, pin_memory=machine.device.type == "cuda",
        persistent_workers=workers > 0, timeout=600 if workers else 0)  # seconds, for a stuck disk


class Batches:
    """Each image of a data set once, for measuring. Iterating gives this process's batches: (uint8
    images on the device, their numbers in the source on the CPU). The batches are the same for any
    number of processes; unreadable images are left out. It ends early where `signals` is not empty.
    """

    def __init__(self, dataset, machine, workers, batch=64, signals=()):
        parts = np.array_split(np.arange(len(dataset)), max(1, math.ceil(len(dataset) / batch)))
        batches = [[(0, i) for i in part.tolist()] for part in parts]
        self.machine, self.signals = machine, signals
        self.loader = make_loader(dataset, batches[machine.rank::machine.world], workers, machine)

    def __iter__(self):
        for batch in self.loader:
            if batch:
                yield self.machine.send(batch[0]), batch[1]
            if self.signals:
                return


# ------------------------------------------------------------------------ 10. checkpoint and log

# Fields that may differ when a run goes on: they change where and how fast it runs, not what.
FREE = ("out", "micro_batch", "device", "compile", "workers", "log_every", "eval_every",
        "eval_epochs", "save_every", "max_steps", "bench", "preset", "recipe")


def save_file(path, write):
    """Let write(file) fill a temporary file beside `path`, then move it there: all or nothing."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def save_text(path, text):
    """A string as a file."""
    save_file(path, lambda f: f.write(text.encode()))


def load_checkpoint(path):
    """A checkpoint, or None where there is no such file; no pickled code is run."""
    if os.path.exists(path):
        return torch.load(path, map_location="cpu", weights_only=True)


class Progress:
    """What both training scripts do between their steps: go on from a checkpoint, write the next
    one, measure, log, stop early, and keep the time.

    data: what is known of the images, a dict; going on needs the same. signals: of at_work.
    measure(step) -> a dict of measures, every `eval_every` steps and at the end."""

    def __init__(self, cfg, machine, plan, data, model, optimizer, signals, measure, eval_every):
        self.cfg, self.machine, self.plan, self.signals = cfg, machine, plan, signals
        self.model, self.optimizer = model, optimizer
        self.measure, self.eval_every = measure, eval_every
        fields = dict(dataclasses.asdict(cfg), dtype=machine.dtype, **data)
        if cfg.data not in crop.BUILT_IN:
            fields["data"] = os.path.realpath(cfg.data)  # however it is spelled
            train = os.path.join(fields["data"], "train")
            images = train if os.path.isdir(train) else fields["data"]
            if os.path.join(os.path.realpath(cfg.out), "").startswith(os.path.join(images, "")):
                raise InputError(f"--out {cfg.out!r} lies among the images of {cfg.data!r}: the "
                                 "run's pictures would become data")
        fields = {name: value for name, value in fields.items() if name not in FREE}
        self.identity = json.loads(json.dumps(fields))  # what the run is a function of
        self.row, self.ticks, self.path = {}, [], os.path.join(cfg.out, "ckpt.pt")
        self.restart(0)

    def resume(self):
        """Put ckpt.pt, if there is one, into model and optimiser, and cut log.jsonl where it ends.
        A row with measures, or one that is missing, is made again: a run can have ended between
        checkpoint and row. -> the number of steps done. Raises InputError naming the fields in
        which the checkpoint's run is another one, and where processes find different ones."""
        saved, log, rows, done = load_checkpoint(self.path), f"{self.cfg.out}/log.jsonl", [], 0
        if saved:
            mine, theirs = self.identity, saved["identity"]
            differ = [f"{k} ({theirs.get(k)!s:.60} there, {mine.get(k)!s:.60} here)"
                      for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
            if differ:
                raise InputError(f"{self.path!r} belongs to a run that differs in "
                                 f"{', '.join(differ)}: give the same flags and data to go on with "
                                 "it, or another --out")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.row, done = saved["row"], saved["row"]["step"]
        if self.machine.max(done) != -self.machine.max(-done):  # on several machines
            raise InputError(f"the processes found different checkpoints in {self.cfg.out!r}: "
                             "--out has to be a folder that all machines share")
        if self.machine.rank == 0:
            with contextlib.suppress(FileNotFoundError, ValueError):  # no log; a torn row
                for row in map(json.loads, open(log)):
                    if row["step"] < done + (not self.is_measured(done)):
                        rows.append(row)
            save_text(log, "".join(json.dumps(row) + "\n" for row in rows))
            save_text(f"{self.cfg.out}/config.json", json.dumps(dataclasses.asdict(self.cfg)))
        if done and not (rows and rows[-1]["step"] == done):
            self.report()
        self.restart(done)
        return done

    def restart(self, done):
        """Begin a new stretch of steps."""
        self.since, self.waited, self.began = done, 0.0, time.perf_counter()

    def fetch(self, loader):
        """The loader's next batch."""
        began = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - began
        return batch

    def tick(self):
        """For --bench: note the end of a step, once the device has finished it."""
        if self.machine.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ticks.append((time.perf_counter(), self.waited))

    def after(self, done, loss, lr, grad_norm, **more):
        """Do what is due after step `done`. The checkpoint comes first: a run that ends while it
        measures goes on with measuring. Raises InputError where loss or gradient is not finite."""
        machine, cfg = self.machine, self.cfg
        asked = machine.max(len(self.signals))  # whether any process was asked to stop
        saves = asked or done == self.plan.stop or done % cfg.save_every == 0
        if not saves and not self.is_logged(done):
            return
        machine.sum(loss)
        loss, grad_norm = loss.item() / machine.world, grad_norm.item()
        seconds = time.perf_counter() - self.began
        self.row = dict(step=done, epoch=done / self.plan.per_epoch, loss=loss, lr=lr, **more,
                        grad_norm=grad_norm, data_wait=self.waited / seconds,
                        images_per_s=(done - self.since) * cfg.batch_size / seconds)
        if not math.isfinite(loss + grad_norm):
            raise InputError(f"by step {done} the loss or its gradient is not finite. Try a lower "
                             "--lr and another --out")
        if saves:
            self.save()
        if asked:
            self.stop_early()
        self.report()
        self.restart(done)

    def is_measured(self, done):
        return done >= self.plan.stop or done % self.eval_every == 0

    def is_logged(self, done):
        return done == 1 or done % self.cfg.log_every == 0 or self.is_measured(done)

    def report(self):
        """Measure, and write the row of the last step. A signal that comes meanwhile may have cut
        it short: then this is done again when the run goes on."""
        done = self.row["step"]
        if self.is_measured(done):
            score = self.measure(done)
            if self.machine.max(len(self.signals)):
                self.save()
                self.stop_early()
            self.row = self.row | score
        if self.is_logged(done):
            write_row(self.cfg, self.machine, self.plan, self.row)
        if self.is_measured(done) and self.machine.rank == 0:
            with open(f"{self.cfg.out}/log.jsonl") as log:
                picture = crop.curves([json.loads(line) for line in log])
            save_file(f"{self.cfg.out}/curves.png", lambda f: picture.save(f, "PNG"))

    def save(self):
        """Write ckpt.pt: tensors and plain types only, all that going on needs."""
        if self.machine.rank == 0:
            state = dict(step=self.row["step"], row=self.row, identity=self.identity,
                         config=dataclasses.asdict(self.cfg), model=self.model.state_dict(),
                         optimizer=self.optimizer.state_dict())
            save_file(self.path, lambda f: torch.save(state, f))

    def finished(self, start):
        """The first words of a run's last sentence."""
        already = "already " if start == self.plan.stop else ""
        return f"{already}finished after {self.row['step']} steps"

    def stop_early(self):
        """End this process after a signal, when the checkpoint is written."""
        self.machine.max(0)  # torchrun ends all when the first one leaves: wait for process 0
        self.machine.say(f"stopped by a signal after step {self.row['step']} and saved; the same "
                         "command goes on")
        sys.exit(STOPPED)


def write_row(cfg, machine, plan, row):
    """Append a row to log.jsonl and print it. A logger of your own hooks in here."""
    if machine.rank == 0:
        with open(f"{cfg.out}/log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        left = (plan.stop - row["step"]) * cfg.batch_size / row["images_per_s"]
        shown = [f"{name} {x:.4g}" for name, x in row.items() if not isinstance(x, list)]
        machine.say("  ".join([*shown, f"left {timedelta(seconds=round(left))}"]))


def next_commands(cfg):
    """The commands that show what a run has learned: its maps, and the neighbours of images."""
    data = [f"--data={cfg.data}"] + ([f"--classes={cfg.classes}"] if cfg.classes else [])
    return "\n".join(shlex.join(["python", "evaluate.py", *words, *data]) for words in (
        ["--bench=maps", f"--ckpt={cfg.out}/ckpt.pt"],
        ["--bench=features", f"--size={cfg.context_size}", f"--ckpt={cfg.out}/encoder.pt"]))


# ---------------------------------------------------------------------------------- 11. signals

STOPPERS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP")
            if hasattr(signal, name)]  # Windows has SIGTERM alone
STOPPED = 75  # exit status after one of them: EX_TEMPFAIL, the same command should be run again


@contextlib.contextmanager
def at_work(out, machine):
    """Lock the run's folder and catch STOPPERS until the end. -> a list to which a signal is added,
    so that the loop can finish its step. A second signal ends at once, unless it comes within two
    seconds: torchrun passes on what all processes may have got. Raises InputError where another run
    is at work."""
    signals = []

    def note(number, _):
        if signals and time.monotonic() > signals[0] + 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        signals.append(time.monotonic())

    with lock_folder(out) if machine.rank == 0 else contextlib.nullcontext():
        before = [signal.signal(number, note) for number in STOPPERS]
        try:
            yield signals
        finally:
            for number, handler in zip(STOPPERS, before):
                signal.signal(number, handler)


def lock_folder(folder):
    """-> an open file that keeps other processes out of a folder as long as it is open. lockf,
    since loader workers that outlive a killed run for some seconds would inherit a flock."""
    f = open_file(folder, "lock")
    try:
        import fcntl  # not on Windows
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is at work in {folder!r}: name another --out") from None
    except ImportError:
        pass
    return f


def open_file(folder, name):
    """A file to append to, in a folder that is made if need be. Raises InputError where it cannot
    be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        return open(os.path.join(folder, name), "a")
    except OSError as error:
        raise InputError(f"--out={folder!r} is no folder to write to: {error.strerror}") from None


# ----------------------------------------------------------------------------------- 12. --bench

BENCH_WARMUP = 3  # steps before --bench starts its clock


def gflop_per_image(cfg):
    """GFLOP of forward and backward for one context with its exemplars; a multiply-add is two.
    Nothing is computed (the meta device)."""
    m, n, K = cfg.context_size, cfg.exemplar_size, cfg.exemplars
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        shapes = (2, 3, m, m), (2, K, 3, n, n), (2, K, m, m)
        build_model(cfg)(*map(torch.empty, shapes))[0].backward()
    return counter.get_total_flops() / 2 / 1e9


def matmul_tflops(machine):
    """The rate that the chip's matrix product reaches in this precision, in TFLOP/s: the floor that
    a step is measured against."""
    from torch.utils.benchmark import Timer  # here, since it warns where a CUDA toolkit lacks a GPU
    side = 8192 if machine.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=machine.device, dtype=getattr(torch, machine.dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.blocked_autorange(min_run_time=0.5).median / 1e12


def bench_report(cfg, machine, ticks):
    """Print the JSON of --bench and write bench.json: the median step after the warm-up, and the
    most memory that tensors took on a CUDA device, or this process elsewhere."""
    if machine.rank > 0:
        return
    if machine.device.type == "cuda":
        chip, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        import resource  # not on Windows
        chip = f"{machine.device.type}, {torch.get_num_threads()} threads"
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux
    steps = np.diff(np.array(ticks[BENCH_WARMUP - 1:]), axis=0)  # [N, 2]: step, waiting
    step_s = float(np.median(steps[:, 0]))
    tflops = gflop_per_image(cfg) * cfg.batch_size / step_s / 1e3 / machine.world
    report = json.dumps(dict(
        bench="pretrain", n=len(steps), step_s=step_s, images_per_s=cfg.batch_size / step_s,
        data_wait=float(steps[:, 1].sum() / steps[:, 0].sum()), tflops=tflops,
        share_of_matmul=tflops / matmul_tflops(machine), peak_memory_gb=memory / 1e9,
        model=cfg.model, batch_size=cfg.batch_size, processes=machine.world, device=chip,
        dtype=machine.dtype, compile=machine.compile, torch=torch.__version__))
    save_text(f"{cfg.out}/bench.json", report)
    print(report)


if __name__ == "__main__":
    run(main)
