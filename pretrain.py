"""pretrain.py: self-supervised pre-training by Correlational Image Modeling (Table 9).

    python pretrain.py --preset=demo                                  a laptop, a minute or two
    python pretrain.py --preset=imagenette                            one GPU
    torchrun --nproc_per_node=8 pretrain.py --data=/data/imagenet     the paper's run

In the order in which things happen:

    1. Config       every field is a flag; the defaults are Table 9; PRESETS are other values
    2. command line parse_config
    3. the machine  processes, device, precision
    4. the data     which image goes into which step, on which process
    5. schedules    learning rate and tau, optimiser groups
    6. files        atomic checkpoints, the log, signals, the folder's lock
    7. measuring    skill on held-out images, maps.png
    8. the model    built, counted, timed, compiled, wrapped
    9. main         the loop

A run is a function of its config and seed: the images, crops and uniform numbers of step s are
seeded by (seed, s) alone, so the number of workers and processes, the micro-batch and
interruptions change nothing but the rounding of floats, and a checkpoint needs no loader state.
"""

import contextlib
import dataclasses
import difflib
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
from argparse import SUPPRESS, ArgumentParser
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction

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

@dataclass(frozen=True)
class Config:
    """The paper's recipe, Table 9. A field's comment is its line in --help."""

    preset: str = "paper"  # paper, imagenette or demo: values only; flags beat them
    # where
    data: str = "data/imagenet"  # a folder; shapes, imagenette, cifar10, stl10; none, for --bench
    classes: str = ""  # a file with the names of the class folders to keep, one a line
    out: str = "out/pretrain"  # the run's folder: config.json, log.jsonl, ckpt.pt, encoder.pt
    # crops (Table 1)
    context_size: int = 160  # pixels
    exemplar_size: int = 64  # pixels
    exemplars: int = 6  # of each context
    scale: tuple = (0.05, 1.0)  # area r0 of an exemplar, as a fraction of the context
    ratio: tuple = (1 / 3, 3.0)  # aspect r1 = h / w, log-uniform
    rotation: float = 45.0  # largest angle, degrees
    flip: float = 0.5  # probability of a mirrored exemplar
    transforms: str = "exemplar"  # what is recoloured: exemplar, context, both or none
    jitter: float = 0.8  # probability of colour jitter
    gray: float = 0.2  # probability of gray
    blur: float = 0.5  # probability of Gaussian blur
    solarize: float = 0.2  # probability of solarisation
    # model
    model: str = "vit_b16"  # the encoder
    freeze_patch_embed: bool = True  # keep a ViT's patch embedding as initialised
    bootstrap: str = "online_exemplar"  # Table 2; or online_context, or shared: one encoder
    decoder: str = "cim"  # or a tracker on a shared encoder: siamfc, siamrpn, transt (Table 4)
    decoder_width: int = 512  # channels, a multiple of 32; one head for each 32 (Figure 4d)
    decoder_depth: int = 1  # correlation layers (Figure 4c)
    correlation: str = "cross_attention"  # or convolution (Figure 4a)
    predictor: str = "linear"  # or deconv: three deconvolutions (Figure 4b)
    loss: str = "ce"  # or balanced, mse, focal (Table 3)
    # optimisation
    epochs: int = 300  # passes over the images
    warmup_epochs: float = 40.0  # of linear warm-up of the learning rate
    batch_size: int = 4096  # contexts a step, over all processes
    lr: float = 2.4e-3  # peak learning rate at a batch of lr_batch
    lr_batch: int = 4096  # the batch that lr is meant for; another one scales it linearly
    weight_decay: float = 0.05  # of matrices; not of biases, norms and the cls token
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    tau: float = 0.99  # target decay (Eq. 3) at the start, on its way to 1 by a cosine
    seed: int = 0  # of everything random
    max_steps: int = 0  # stop early, schedules still span epochs; 0 does not
    # machine: may differ when a run goes on, but for dtype
    micro_batch: int = 0  # contexts a process handles at once; 0 picks one that divides
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16; auto is bfloat16 where the chip multiplies it
    compile: str = "auto"  # auto, true or false; auto compiles on CUDA
    workers: int = -1  # loader processes for each training process; -1 uses the cores at hand
    log_every: int = 10  # steps
    eval_every: int = 500  # steps between looks at held-out images; 0 looks at the end only
    save_every: int = 1000  # steps between checkpoints; 0 goes by save_minutes only
    save_minutes: float = 15.0  # minutes between checkpoints; 0 goes by save_every only
    timeout: float = 30.0  # minutes that a process waits for its images or for the others
    bench: int = 0  # time so many steps: one JSON line, kept as bench.json, and nothing else

    def __post_init__(self):
        """Raise InputError for values that cannot work, before any work starts."""
        check_values(self, preset=PRESETS, model=ENCODERS,
                     transforms=("exemplar", "context", "both", "none"), bootstrap=BOOTSTRAPS,
                     decoder=("cim", *TRACKERS), correlation=CORRELATIONS, predictor=PREDICTORS,
                     loss=LOSSES)
        if self.decoder_width % 32:
            raise InputError(f"--decoder_width {self.decoder_width} is no multiple of 32")
        stride = ENCODERS[self.model][2] if ENCODERS[self.model] else ResNet50.stride
        for name in ("context_size", "exemplar_size"):
            if getattr(self, name) % stride:
                raise InputError(f"--{name} {getattr(self, name)} is no multiple of {stride}, the "
                                 f"stride of {self.model}")
        crop.check_crops(self.scale, self.ratio, self.rotation)
        if self.decoder != "cim":
            refuse(self, PRESETS[self.preset], f"--decoder {self.decoder}, a tracker with one "
                   "encoder", "decoder_width", "decoder_depth", "correlation", "predictor", "loss",
                   "bootstrap", "tau")
        if self.bootstrap == "shared":
            refuse(self, PRESETS[self.preset], "--bootstrap shared, which has no moving average",
                   "tau")


PRESETS = {
    "paper": {},
    "imagenette": dict(data="imagenette", out="out/imagenette", model="vit_s16", batch_size=512,
                       eval_every=90, save_every=900),
    "demo": dict(data="shapes", out="out/demo", model="vit_d8", context_size=64, exemplar_size=32,
                 transforms="none", decoder_width=64, freeze_patch_embed=False, epochs=3,
                 warmup_epochs=0.25, batch_size=16, lr=5e-3, lr_batch=16, workers=0, log_every=50,
                 eval_every=300, save_every=300),
}

BENCH_WARMUP = 3  # steps before --bench starts its clock

# Fields that may differ when a run goes on: they change where and how fast it runs, not what.
FREE = ("out", "micro_batch", "device", "compile", "workers", "log_every", "eval_every",
        "eval_epochs", "save_every", "save_minutes", "timeout", "max_steps", "bench", "preset",
        "recipe")


# ------------------------------------------------------------------------------ 2. command line

# Fields of all three scripts; others may be 0, and have no upper bound.
POSITIVE = ("context_size", "exemplar_size", "exemplars", "decoder_width", "decoder_depth",
            "epochs", "batch_size", "lr", "lr_batch", "log_every", "image_size", "test_size",
            "repeats", "eval_epochs", "layer_decay", "k", "temperature", "steps", "rows",
            "timeout", "head_width", "cat_max_ratio")
BOUNDS = {("flip", "jitter", "gray", "blur", "solarize", "tau", "erasing", "test_crop",
           "randaugment_p", "photometric", "cat_max_ratio"): "at most 1",
          ("beta1", "beta2", "drop_path", "smoothing", "bce_threshold"): "below 1"}


def check_values(cfg, **choices):
    """Raise InputError for a number out of range or a word that is none of its `choices`."""
    choices |= dict(compile=("auto", "true", "false"), device=("auto", "cpu", "cuda", "mps"),
                    dtype=("auto", "float32", "bfloat16"))
    for f in dataclasses.fields(cfg):
        value, name = getattr(cfg, f.name), f"--{f.name}"
        if f.name in choices and value not in choices[f.name]:
            raise InputError(f"{name} {value!r}: choose one of {', '.join(choices[f.name])}")
        if not isinstance(value, (int, float)) or f.name == "workers":
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and f.name in POSITIVE):
            bound = "above 0" if f.name in POSITIVE else "0 or more"
            raise InputError(f"{name} {value} must be {bound}")
        for below, bound in BOUNDS.items():
            if f.name in below and (value > 1 or value == 1 and bound == "below 1"):
                raise InputError(f"{name} {value} must be {bound}")
        if f.name == "seed" and value >= 2**63:
            raise InputError(f"{name} {value} must be below 2**63")
    if cfg.data == "none" and not (isinstance(cfg.bench, int) and cfg.bench):
        raise InputError("--data none is noise to time: it goes with --bench=N of training only")


def refuse(cfg, preset, choice, *names):
    """Raise InputError where a field that the choice leaves unread is not as preset."""
    usual = {f.name: f.default for f in dataclasses.fields(cfg)} | preset
    for name in names:
        if getattr(cfg, name) != usual[name]:
            raise InputError(f"--{name} {getattr(cfg, name)} has no meaning with {choice}: leave "
                             "one of the two out")


def parse_config(Config, presets, argv=None, description=None):
    """The command line as a Config: flags beat the preset's values, which beat the defaults.

    `--name value` and `--name=value` both work; pairs take two numbers, `--ratio 1/3 3` or
    `--ratio=1/3,3`; booleans take true or false. Exits with status 2 and one sentence on a wrong
    name or type; raises InputError for values that cannot work.
    """
    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"

    def number(text):
        try:
            return float(Fraction(text))  # 1/3 is a number too
        except ArithmeticError:
            raise ValueError from None

    names = [f.name for f in dataclasses.fields(Config)]
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = ArgumentParser(allow_abbrev=False, argument_default=SUPPRESS, description=description,
                            usage="%(prog)s [--flag VALUE ...], --help tells the flags")
    for f in dataclasses.fields(Config):
        kind = type(f.default)
        how = {bool: dict(type=boolean, nargs="?", const=True), float: dict(type=number),
               tuple: dict(nargs="+", metavar=("LOW", "HIGH"))}.get(kind, dict(type=kind))
        if f.default == "auto":
            how["type"] = str.lower  # --compile=True
        how.setdefault("metavar", kind.__name__.upper())
        parser.add_argument("--" + f.name, help=f"{notes[f.name]} ({f.default})", **how)
    values, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0]
        near = difflib.get_close_matches(name, ["--" + n for n in names], 1)
        parser.error(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "")
                     if word.startswith("-") else f"{word!r} does not belong to a flag")
    values = vars(values)
    for name, value in values.items():
        if isinstance(value, list):
            try:
                value = tuple(number(x) for x in ",".join(value).split(","))
            except ValueError:
                value = ()
            if len(value) != 2:
                parser.error(f"--{name} takes two numbers, low and high")
            values[name] = value
    chosen = dataclasses.fields(Config)[0]  # preset or recipe
    return Config(**{**presets.get(values.get(chosen.name, chosen.default), {}), **values})


# ------------------------------------------------------------------------------- 3. the machine

@dataclass
class Machine:
    """Where this process runs: its device, its number among `world` processes, its precision."""

    device: torch.device
    rank: int
    world: int
    dtype: str  # float32 or bfloat16
    compile: bool
    timeout: float = 1800.0  # seconds that it waits for images or for the other processes
    hosts: object = None  # the group in which hosts agree: gloo, so that no GPU is waited for

    def autocast(self):
        """bf16 for matrix products and convolutions, fp32 for the weights and sums."""
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == "bfloat16")

    def send(self, tensor):
        """A CPU tensor to the device; from pinned memory, so that CUDA does not make us wait."""
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

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
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX, self.hosts)
        return int(number)

    @property
    def syncs_batchnorm(self):
        """Whether BatchNorm can see the images of all processes; SyncBatchNorm has no CPU backend.
        """
        return self.device.type == "cuda" and self.world > 1

    def share_buffers(self, model):
        """Give every process the BatchNorm statistics of process 0, as DDP does before a step."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def synchronize(self):
        """Wait until the device has done what it was told, for honest timing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @contextlib.contextmanager
    def first(self):
        """Let process 0 do something (a download) before the others, and fail for them all."""
        failed = [None]
        if self.rank > 0:
            dist.broadcast_object_list(failed)
            if failed[0]:
                raise InputError(failed[0])
        try:
            yield
        except InputError as error:
            failed = [str(error)]
            raise
        finally:
            if self.rank == 0 and self.world > 1:
                dist.broadcast_object_list(failed)


def setup_machine(device="auto", dtype="auto", compile="auto", timeout=30.0):
    """Join torchrun's process group, if there is one, and resolve what is `auto`; timeout: minutes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; --device cpu works")
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: PyTorch sees no Apple GPU here; --device cpu works")
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(f"{local + 1} processes on {torch.cuda.device_count()} GPUs: start at "
                             f"most --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    place = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bf16(device) else "float32"
    hosts, limit = None, timedelta(minutes=timeout)
    if world > 1:
        # torchrun's store outlives a restart, and with it the addresses of dead processes
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # nodes count restarts each for itself
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=limit,
                                device_id=place if device == "cuda" else None)
        hosts = dist.new_group(backend="gloo", timeout=limit)
    return Machine(place, rank, world, dtype,
                   device == "cuda" if compile == "auto" else compile == "true",
                   limit.total_seconds(), hosts)


def multiplies_bf16(device):
    """Whether the hardware has bf16 matrix products of its own, so that they are faster."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return device == "cpu" and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu_info()) is not None


def cpu_info():
    """What Linux says of the processor; nothing elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        return f.read()
    return ""


PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 80GB HBM3": 989, "A100": 312, "L40S": 362,
               "4090": 165, "3090": 71}  # dense bf16, from the makers' data sheets


def peak_tflops(machine):
    """The chip's bf16 peak in TFLOP/s, or None where it is not known."""
    if machine.device.type != "cuda" or machine.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for chip, peak in PEAK_TFLOPS.items() if chip in name), None)


# ---------------------------------------------------------------------------------- 4. the data

def split_batch(batch_size, micro_batch, machine):
    """(contexts of a micro-batch, micro-batches a step) for each process.

    Raises InputError when the batch does not divide, naming one that would.
    """
    share, rest = divmod(batch_size, machine.world)
    if rest or not share:
        near = max(1, round(batch_size / machine.world)) * machine.world
        raise InputError(f"--batch_size {batch_size} is not divisible by {machine.world} "
                         f"processes; {near} would be")
    most = micro_batch or (512 if machine.device.type == "cuda" else 32)
    fits = max(k for k in range(1, min(most, share) + 1) if share % k == 0)
    if micro_batch and fits != micro_batch:
        raise InputError(f"--micro_batch {micro_batch} does not divide the {share} images of a "
                         f"process; {fits} would")
    return fits, share // fits


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: what a process handles at once, how many steps there are."""

    images: int  # to train on
    micro: int  # contexts a process handles at once
    accumulate: int  # micro-batches a step, for each process
    per_epoch: int  # steps
    total: int  # steps that the schedules span
    stop: int  # steps that this run does of them
    warmup: int  # steps
    peak: float  # learning rate at this batch size

    @property
    def share(self):
        """Contexts of a step that one process handles."""
        return self.micro * self.accumulate

    def describe(self, cfg, machine, sentence, start, unit):
        """What is about to run, the arithmetic written out; unit: what a batch is made of."""
        return (f"{cfg.model} on {machine.device} x {machine.world}, {machine.dtype}, "
                f"{'compiled' if machine.compile else 'not compiled'}\n"
                f"data     {cfg.data}: {sentence}\n"
                f"batch    {cfg.batch_size} = {machine.world} processes x {self.accumulate} "
                f"micro-batches x {self.micro} {unit}\n"
                f"lr       {cfg.lr:g} x {cfg.batch_size} / {cfg.lr_batch} = {self.peak:.3g}, after "
                f"{self.warmup} steps of warm-up\n"
                f"steps    {self.per_epoch} an epoch x {cfg.epochs} epochs = {self.total}"
                + (f", stopping after {self.stop}" if self.stop < self.total else "")
                + (f", going on after {start}" if start else ""))


def make_plan(cfg, machine, images):
    """The Plan of a config on this machine. Raises InputError: too few images, no even split."""
    micro, accumulate = split_batch(cfg.batch_size, cfg.micro_batch, machine)
    per_epoch = images // cfg.batch_size
    if not per_epoch:
        raise InputError(f"{cfg.data!r} has {images} images to train on, fewer than one batch of "
                         f"{cfg.batch_size}: give more images or a smaller --batch_size")
    total = cfg.epochs * per_epoch
    stop = BENCH_WARMUP + cfg.bench if cfg.bench else min(total, cfg.max_steps or total)
    return Plan(images, micro, accumulate, per_epoch, total, stop,
                round(cfg.warmup_epochs * per_epoch), cfg.lr * cfg.batch_size / cfg.lr_batch)


def micro_batches(cfg, plan, rank, steps, repeats=1):
    """The (epoch, index) pairs of each micro-batch of process `rank`, step by step.

    An epoch is a permutation of the images seeded by (seed, epoch); step s takes its s-th slice of
    batch_size, each process its part of the slice. Repeated augmentation shows each image `repeats`
    times in a step (in two, where a batch ends between its repeats), each time as if in another
    epoch, and 1 / repeats of the images in an epoch.
    """
    shuffled = None
    for step in steps:
        epoch, place = divmod(step, plan.per_epoch)
        if epoch != shuffled:
            order = np.random.default_rng((cfg.seed, 2, epoch)).permutation(plan.images).tolist()
            shuffled = epoch
        begin = place * cfg.batch_size
        keys = [(epoch * repeats + j % repeats, order[j // repeats])
                for j in range(begin, begin + cfg.batch_size)]
        keys = [key for k in range(repeats) for key in keys[k::repeats]]  # repeats lie far apart
        mine = keys[rank * plan.share:][:plan.share]
        for i in range(0, plan.share, plan.micro):
            yield mine[i:i + plan.micro]


def uniforms(cfg, stream, count):
    """The uniform numbers [count, K + 1, 15] of a stream, (4, step) for training, on the CPU."""
    rng = np.random.default_rng((cfg.seed, *stream))
    shape = (count, cfg.exemplars + 1, crop.UNIFORMS)
    return torch.from_numpy(rng.random(shape, dtype=np.float32))


def contexts_of(source, indices, cfg, replace=True):
    """The data set of random contexts."""
    cut = functools.partial(crop.cut_context, size=cfg.context_size)
    return crop.Samples(source, indices, cfg.seed, cut, replace)


def make_pairs(contexts, u, cfg):
    """crop.make_pairs with the config's crops."""
    return crop.make_pairs(contexts, u, cfg.exemplar_size, cfg.scale, cfg.ratio, cfg.rotation,
                           cfg.flip, cfg.transforms, cfg.jitter, cfg.gray, cfg.blur, cfg.solarize)


def quiet_worker(_):
    """Loader workers leave signals to the process that trains, which needs them to its last step.
    """
    for number in (signal.SIGINT, *STOPPERS):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, batches, workers, machine):
    """A loader of `batches` (lists of keys); workers < 0 takes the cores at hand, 16 at most.
    Noise is one batch, loaded once and given for ever."""
    if isinstance(dataset.source, crop.Noise):
        (images, numbers), failures = crop.collate([dataset[key] for key in next(iter(batches))])
        images = images.pin_memory() if machine.device.type == "cuda" else images
        return itertools.repeat(((images, numbers), failures))
    if workers < 0:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(16, len(os.sched_getaffinity(0)) // local
                      if hasattr(os, "sched_getaffinity") else os.cpu_count() // local)
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=crop.collate,
        worker_init_fn=quiet_worker, pin_memory=machine.device.type == "cuda",
        persistent_workers=workers > 0, timeout=machine.timeout if workers > 0 else 0)


class LocalError(InputError):
    """An error that process 0 may not know of."""


class BadImages:
    """Warns once of each unreadable image that this process meets; raises LocalError beyond three
    and beyond 1%, or when no readable one is left."""

    def __init__(self, count, instead="the next image replaces it"):
        self.count, self.instead, self.names = count, instead, set()

    def check(self, batch, failures):
        """Look at what crop.collate gave; -> its batch."""
        for name, reason in failures:
            if name not in self.names:
                self.names.add(name)
                print(f"warning: cannot read {name!r} ({reason}); {self.instead}",
                      file=sys.stderr, flush=True)
        none_left = len(self.names) == self.count
        if none_left or len(self.names) > crop.bad_images_allowed(self.count):
            why = "so none is left" if none_left else "more than three and more than 1%"
            raise LocalError(f"{len(self.names)} of {self.count} images cannot be read, {why}: "
                             "mend or remove the files named above")
        return batch


# -------------------------------------------------------------------------------- 5. schedules

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


def due(done, every):
    """Whether something that happens `every` so many steps happens now; 0 is never."""
    return every > 0 and done % every == 0


def parameter_groups(model, weight_decay, scale=lambda name: 1.0):
    """Matrices decay; biases, norms (one dimension) and the cls token do not. A group's `scale`
    times the learning rate is its own."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim < 2 or name.endswith("cls_token") else weight_decay
            group = dict(params=[], weight_decay=decay, scale=scale(name))
            groups.setdefault((decay, group["scale"]), group)["params"].append(p)
    return list(groups.values())


def set_learning_rate(optimizer, lr):
    """Give each group its share of lr."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


# ------------------------------------------------------------------------------------- 6. files

def save_file(path, write, previous=None):
    """Let write(file) fill a temporary file beside `path`, then move it there: all or nothing.
    previous: where to move what stood there.

    Raises InputError when it cannot be written; what stood at `path` is then there, or at previous.
    """
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # moved for good, where folders can be flushed
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"cannot write {path!r}: {reason}. Older files are untouched: make room, "
                         "then give the same command again, it goes on from the last checkpoint, "
                         "if there is one") from error


def save_picture(path, picture):
    """A PIL image as a PNG file."""
    save_file(path, lambda f: picture.save(f, "PNG"))


def make_folder(path):
    """Make a folder and those above it."""
    try:
        os.makedirs(path or ".", exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path!r}: {error.strerror}") from error


def previous_to(path):
    """Where the checkpoint before the newest one is kept."""
    return path.removesuffix(".pt") + "_previous.pt"


def load_checkpoint(path):
    """Read a checkpoint: tensors and plain types only, no pickled code is run. Raises InputError
    when the file cannot be read, BadCheckpoint when it is no checkpoint of a training script."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "config", "model", "optimizer", "images"} - saved.keys()
    except (OSError, MemoryError) as error:  # may be readable another time
        raise InputError(f"cannot read {path!r}: {error}") from error
    except Exception as error:  # torch.load raises many kinds on files that are none
        raise BadCheckpoint(f"{path!r} is not a checkpoint ({type(error).__name__})") from error
    if missing:
        raise BadCheckpoint(f"{path!r} is not a training checkpoint, it lacks "
                            f"{', '.join(sorted(missing))}")
    return saved


class BadCheckpoint(InputError):
    """A file that is torn or foreign."""


def newest_checkpoint(folder, machine):
    """Lock the run's folder and read ckpt.pt. None: there is none.

    Where it is torn or foreign, or missing since a save was cut in two, the one before it is taken
    with a warning, marked as a `fallback`. Raises InputError when there is none to fall back to.
    """
    if not os.path.isdir(folder):
        return None
    with machine.first():
        if machine.rank == 0:
            lock_folder(folder)
    path, problem = os.path.join(folder, "ckpt.pt"), None
    if os.path.exists(path):
        try:
            return load_checkpoint(path)
        except BadCheckpoint as error:
            problem = error
    previous, saved = previous_to(path), None
    try:
        saved = load_checkpoint(previous) if os.path.exists(previous) else None
    except BadCheckpoint as error:
        problem = problem or error
    if problem and not saved:
        raise InputError(f"{problem}; move it away to start afresh, or name another --out")
    if saved and machine.rank == 0:
        print(f"warning: {problem or f'there is no {path!r}'}; the one before it is taken, of step "
              f"{saved['step']}", file=sys.stderr)
    return saved and saved | {"fallback": True}


def put_aside(path):
    """Rename a bad newest checkpoint, so that no save moves it over the good one before it."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, path + ".bad")


def save_encoder(path, cim):
    """What pre-training is for: the online encoder's plain state dict, on the CPU."""
    weights = {k: v.cpu() for k, v in cim.online.state_dict().items()}
    save_file(path, lambda f: torch.save(weights, f))


def resume(saved, path, cfg, machine, plan, model, optimizer):
    """Put the checkpoint of this very run into model and optimiser, if there is one. -> the steps
    done, and [row, looks] of the last of them where it was saved but never reached the log.

    Raises InputError naming the fields in which its config differs from cfg, FREE ones excepted,
    and when the processes found different checkpoints.
    """
    step = saved["step"] if saved else 0  # alike where the largest is the smallest
    if machine.max(step) != -machine.max(-step):
        raise InputError(f"the processes found different checkpoints in {cfg.out!r}: all nodes "
                         "need to see the same folder")
    if not saved:
        return 0, None
    if machine.rank == 0 and "fallback" in saved:
        put_aside(path)
    theirs = plain(type(cfg)()) | saved["config"] | {"number of images": saved["images"]}
    mine = plain(cfg) | {"dtype": machine.dtype, "number of images": plan.images}
    differ = [f"{k} ({theirs.get(k)} there, {mine.get(k)} here)"
              for k in sorted(mine.keys() | theirs.keys())
              if k not in FREE and mine.get(k) != theirs.get(k)]
    if differ:
        raise InputError(f"{path!r} belongs to a run that differs in {', '.join(differ)}; give the "
                         "same flags to go on with it, or another --out to start afresh")
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{path!r} does not fit this version of the code; name another --out to "
                         "start afresh") from error
    row = saved.get("row")
    lost = machine.rank == 0 and row and all(r["step"] != step for r in read_log(cfg.out))
    return step, row if machine.max(int(bool(lost))) else None


def read_log(folder):
    """The rows of log.jsonl, without those that a crash tore."""
    with contextlib.suppress(FileNotFoundError), \
            open(os.path.join(folder, "log.jsonl"), errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def plain(cfg):
    """A config as JSON's types, so that one read from a file equals one from the command line."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


STOPPERS = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
STOPPED = 75  # exit status after one of them: EX_TEMPFAIL, the same command should be run again


class Journal:
    """What a loop does besides training: the clock, config.json, log.jsonl, checkpoints, signals.

    Every process has one, so that all agree on what is due; process 0 writes. Going on after step
    `start` drops the rows beyond it, which belong to steps that were lost, and adds the `unlogged`
    one of it. look(step) -> a dict of `measures` on held-out images. Raises InputError: another run
    is at work in the folder, or it cannot be written.
    """

    SHOWN = {"skill": "skill {:.3f}", "rank": "feature rank {:.1f}", "top1": "top-1 {:.2f}%",
             "top5": "top-5 {:.2f}%", "miou": "mIoU {:.2f}%", "mfu": "mfu {:.0%}"}

    def __init__(self, cfg, machine, plan, start, unlogged, look, measures, gflop_per_image):
        self.cfg, self.machine, self.plan = cfg, machine, plan
        self.look, self.nothing = look, dict.fromkeys(measures)
        self.logged = self.saved = start
        self.checkpoint, self.path = (os.path.join(cfg.out, n) for n in ("ckpt.pt", "log.jsonl"))
        self.bad = BadImages(plan.images)
        self.clock, self.waited, self.ticks = None, 0.0, []
        self.saved_at = time.perf_counter()
        self.broken = torch.tensor(sys.maxsize, device=machine.device)  # first step not finite
        self.peak = peak_tflops(machine)
        self.gflop = gflop_per_image() if self.peak or cfg.bench else 0
        self.asked = 0  # the signal that asked to stop
        with machine.first():
            if machine.rank == 0:
                self.open()
        if not cfg.bench:
            for number in STOPPERS:
                signal.signal(number, self.ask)
        if unlogged:
            self.add(*unlogged)

    def open(self):
        """Make the folder and lock it, write config.json, keep the log's rows up to the checkpoint.
        """
        make_folder(self.cfg.out)
        if self.cfg.bench:
            return
        lock_folder(self.cfg.out)
        config = json.dumps(plain(self.cfg), indent=1)
        save_file(os.path.join(self.cfg.out, "config.json"), lambda f: f.write(config.encode()))
        kept = "".join(json.dumps(row) + "\n" for row in read_log(self.cfg.out)
                       if row["step"] <= self.saved)
        save_file(self.path, lambda f: f.write(kept.encode()))

    def close(self):
        """Give back the signals and the folder."""
        if not self.cfg.bench:
            for number in STOPPERS:
                signal.signal(number, signal.SIG_DFL)
        if self.cfg.out in LOCKS:
            LOCKS.pop(self.cfg.out).close()

    def ask(self, number, _):
        """A signal asks to stop: after this step, when all processes can."""
        self.asked = number

    def fetch(self, loader):
        """The loader's next batch. The clock of a stretch of steps starts at its first one."""
        began = time.perf_counter()
        self.clock = self.clock or began
        batch = self.bad.check(*next(loader))
        self.waited += time.perf_counter() - began
        return batch

    def end_step(self, done, loss, lr, grad_norm, looks, model, optimizer, **more):
        """What is due after step `done`: its row, a checkpoint, a look at held-out images where
        `looks`, the end where a signal asked for it. Raises InputError at the first row, save or
        stop after a gradient that was not finite; SystemExit(STOPPED) after a signal. loss: of
        this process.
        """
        cfg, machine = self.cfg, self.machine
        if cfg.bench:
            machine.synchronize()
            self.ticks.append((time.perf_counter(), self.waited))
            return
        now = torch.where(grad_norm.isfinite(), sys.maxsize, done)
        self.broken = torch.minimum(self.broken, now)
        stops, last = machine.max(self.asked), done == self.plan.stop
        looks = looks or last
        logs = looks or done == 1 or due(done, cfg.log_every)
        saves = machine.rank == 0 and (  # alone: a clock must not decide what all do together
            looks or stops or due(done, cfg.save_every) or
            0 < 60 * cfg.save_minutes < time.perf_counter() - self.saved_at)
        if (logs or saves or stops) and int(self.broken) <= done:
            good = f"{self.checkpoint!r} of step {self.saved}" if self.saved else "none"
            raise InputError(f"loss or gradient not finite at step {int(self.broken)}, lr "
                             f"{lr:.3g}; the last good checkpoint is {good}. Try a lower --lr and "
                             "another --out")
        row = self.row(done, loss, lr, grad_norm, more) if logs else None
        if saves:  # before the look, which takes its time
            self.save(done, model, optimizer, row and [row, looks])
        if stops and not last:
            machine.max(0)  # all wait for the save
            if machine.rank == 0:
                print(f"stopped after step {done} by {signal.Signals(stops).name} and saved; the "
                      "same command goes on", file=sys.stderr)
            self.close()
            raise SystemExit(STOPPED)
        if logs:
            self.add(row, looks)

    def row(self, done, loss, lr, grad_norm, more):
        """What is logged of step `done`; stops the clock."""
        self.machine.sum(loss)
        seconds = time.perf_counter() - self.clock
        rate = (done - self.logged) * self.cfg.batch_size / seconds
        mfu = rate * self.gflop / self.machine.world / self.peak / 1e3 if self.peak else None
        row = dict(step=done, epoch=done / self.plan.per_epoch,
                   loss=loss.item() / self.machine.world, lr=lr, images_per_s=rate,
                   data_wait=self.waited / seconds, mfu=mfu, grad_norm=grad_norm.item(), **more)
        self.logged, self.clock, self.waited = done, None, 0.0
        return row

    def add(self, row, looks):
        """Look at held-out images, if so; append the row to the file and print it as a line."""
        self.last = row = row | (self.look(row["step"]) if looks else self.nothing)
        if self.machine.rank > 0:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise InputError(f"step {row['step']}: cannot write {self.path!r}: {error.strerror}"
                             ) from error
        shown = "".join(text.format(row[name]) + "  " for name, text in self.SHOWN.items()
                        if row.get(name) is not None)
        left = (self.plan.stop - row["step"]) * self.cfg.batch_size / row["images_per_s"]
        print(f"step {row['step']}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  {shown}"
              f"lr {row['lr']:.2e}  {row['images_per_s']:.0f} images/s  waiting for data "
              f"{row['data_wait']:.0%}  {plain_time(left)} left", flush=True)

    def save(self, done, model, optimizer, row=None):
        """Write the checkpoint of step `done`, plain types and tensors only: all that going on
        needs. row: [the row of that step, whether it looks], in case it never reaches the log."""
        state = dict(step=done, config=plain(self.cfg) | {"dtype": self.machine.dtype}, row=row,
                     images=self.plan.images, model=model.state_dict(),
                     optimizer=optimizer.state_dict())
        try:
            save_file(self.checkpoint, lambda f: torch.save(state, f), previous_to(self.checkpoint))
        except InputError as error:
            raise InputError(f"step {done}: {error}") from error
        self.saved_at, self.saved = time.perf_counter(), done


LOCKS = {}  # the open files whose locks this process holds


def lock_folder(folder):
    """Lock a folder until Journal.close or the end of the process. Raises InputError when another
    process has it. lockf, since loader workers that outlive a killed run for some seconds would
    inherit a flock."""
    if folder in LOCKS:  # a second open file, once closed, would give the lock away
        return
    try:
        import fcntl
        lock = open(os.path.join(folder, "lock"), "a+")
    except (ImportError, OSError):  # Windows; a folder that the first write will complain about
        return
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise InputError(f"another run is at work in {folder!r} ({lock.read().strip()}): wait for "
                         "it, or name another --out") from None
    except OSError:  # a file system without locks
        pass
    LOCKS[folder] = lock
    with contextlib.suppress(OSError):  # only for the other run's message
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()


def plain_time(seconds):
    """Minutes and seconds, hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# --------------------------------------------------------------------------------- 7. measuring

def effective_rank(x):
    """exp of the entropy of the covariance's spectrum of x [N, D], in float64; 1 if x is constant
    to float32's precision."""
    spectrum = torch.linalg.svdvals(x - x.mean(0)) ** 2
    spectrum[spectrum < 1e-12 * x.square().sum()] = 0  # rounding
    p = spectrum / spectrum.sum().clamp(min=1e-300)
    return math.exp(-torch.special.xlogy(p, p).sum())


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


class HeldOut:
    """At most 256 fixed images with fixed crops, never trained on.

    baseline: cross-entropy of the per-pixel mean map of this crop distribution, the best predictor
    that ignores the exemplar. skill = 1 - loss / baseline: how much of the map the model reads
    from the exemplar (of models trained by cross-entropy; other losses of Table 3 do not ask for
    probabilities). skill_swapped: the same with the exemplars of another image, a control that
    must not be above 0. rank: the effective rank of the exemplars' features, near 1 when they
    collapse.
    """

    MEASURES = ("baseline", "skill", "skill_swapped", "heldout_loss", "rank")

    def __init__(self, source, indices, cfg, machine):
        dataset = contexts_of(source, indices, cfg)
        contexts, _ = BadImages(len(dataset)).check(
            *crop.collate([dataset[0, i] for i in range(len(dataset))]))
        self.cfg, self.machine = cfg, machine
        self.contexts = machine.send(contexts)
        self.u = machine.send(uniforms(cfg, (5,), len(contexts)))
        self.mean_map = mean_map(cfg, machine)

    def evaluate(self, cim):
        """-> dict of loss, baseline, skill, skill_swapped and rank; each process does its part."""
        n, shape = len(self.contexts), (self.cfg.exemplars, cim.online.width)
        losses = torch.zeros(3, device=self.machine.device)  # of exemplars true, swapped, ignored
        features = torch.zeros(n, *shape, device=self.machine.device)
        groups = torch.arange(n).tensor_split(max(1, n // 8))  # alike for any number of processes
        for rows in groups[self.machine.rank::self.machine.world]:
            context, exemplars, maps, _ = make_pairs(self.contexts[rows], self.u[rows], self.cfg)
            with measuring(cim, self.machine):
                h_c, h_z = cim.encode(context, exemplars)
                logits = [cim.decoder(h_c, h, maps.shape[-1]) for h in (h_z, h_z.roll(1, 0))]
            logits.append(self.mean_map.logit().expand_as(maps))
            losses += len(rows) * torch.stack([F.binary_cross_entropy_with_logits(x, maps)
                                               for x in logits])
            features[rows] = h_z[:, :, cim.online.prefix:].float().mean(2)
        self.machine.sum(losses, features)
        loss, swapped, baseline = (losses / n).tolist()
        return dict(heldout_loss=loss, baseline=baseline, skill=1 - loss / baseline,
                    skill_swapped=1 - swapped / baseline,
                    rank=effective_rank(features.flatten(0, 1).cpu().double()))

    def look(self, cim, step):
        """evaluate, and contact sheets with predicted maps (Figures 5, 6): of the first images
        maps.png, of the very first maps/STEP.png, to be seen over time."""
        score = self.evaluate(cim)
        if self.machine.rank == 0:
            self.picture(cim, os.path.join(self.cfg.out, "maps.png"), rows=4)
            make_folder(os.path.join(self.cfg.out, "maps"))
            self.picture(cim, os.path.join(self.cfg.out, "maps", f"{step:07d}.png"), rows=1)
        return score

    def picture(self, cim, path, rows):
        """Write the contact sheet to `path`."""
        context, exemplars, maps, theta = make_pairs(self.contexts[:rows], self.u[:rows], self.cfg)
        with measuring(cim, self.machine):
            _, logits = cim(context, exemplars, maps)
        save_picture(path, crop.contact_sheet(*(x.cpu() for x in (context, exemplars, maps, theta,
                                                                  logits))))


# --------------------------------------------------------------------------------- 8. the model

def build_model(cfg):
    """The CIM of a config, or the tracker, freshly initialised."""
    if cfg.decoder != "cim":
        return Tracking(cfg.decoder, cfg.model, cfg.context_size, cfg.freeze_patch_embed)
    return CIM(cfg.model, cfg.context_size, cfg.decoder_width, cfg.decoder_depth,
               cfg.freeze_patch_embed, cfg.bootstrap, cfg.correlation, cfg.predictor, cfg.loss)


def count_gflop(loss_of_two):
    """GFLOP of forward and backward for one image; a multiply-add is two. loss_of_two() builds the
    model and gives the loss of two images; nothing is computed (the meta device)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        loss_of_two().backward()
    return counter.get_total_flops() / 2 / 1e9


def gflop_per_image(cfg):
    """GFLOP of a training step for one image with its exemplars."""
    def loss_of_two():
        context = torch.empty(2, 3, cfg.context_size, cfg.context_size)
        exemplars = torch.empty(2, cfg.exemplars, 3, cfg.exemplar_size, cfg.exemplar_size)
        maps = torch.empty(2, cfg.exemplars, cfg.context_size, cfg.context_size)
        return build_model(cfg)(context, exemplars, maps)[0]

    return count_gflop(loss_of_two)


def matmul_tflops(machine):
    """The rate that the chip's matrix product really reaches in this precision, in TFLOP/s: the
    median of seven products of squares; the floor that a step is measured against."""
    side = 8192 if machine.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=machine.device, dtype=getattr(torch, machine.dtype))
    seconds = []
    for _ in range(8):
        machine.synchronize()
        began = time.perf_counter()
        a @ a
        machine.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / float(np.median(seconds[1:])) / 1e12


def peak_memory_gb(machine):
    """The most memory that tensors took on a CUDA device, else that this process took on the host,
    loader workers not counted."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def chip(machine):
    """The name of the device."""
    if machine.device.type == "cuda":
        return torch.cuda.get_device_name()
    if machine.device.type == "mps":
        return "mps"
    named = re.search(r"model name\s*: (.*)", cpu_info())
    return f"{named[1] if named else platform.machine()}, {torch.get_num_threads()} threads"


def bench_report(name, journal):
    """Print the JSON of --bench and write bench.json: the time of the steps after warm-up."""
    cfg, machine, gflop = journal.cfg, journal.machine, journal.gflop
    memory = peak_memory_gb(machine)
    steps = np.diff(np.array(journal.ticks[BENCH_WARMUP - 1:]), axis=0)  # [N, 2]: step, waiting
    median, spread = float(np.median(steps[:, 0])), np.percentile(steps[:, 0], [10, 90]).tolist()
    tflops = gflop * cfg.batch_size / median / 1e3 / machine.world
    peak, reached = journal.peak, matmul_tflops(machine)
    report = {"bench": name, "n": len(steps), "step_s": round(median, 5),
              "step_s_p10_p90": [round(x, 5) for x in spread],
              "images_per_s": round(cfg.batch_size / median, 2),
              "data_wait": round(float(steps[:, 1].sum() / steps[:, 0].sum()), 4),
              "gflop_per_image": round(gflop, 3), "tflops_per_process": round(tflops, 3),
              "mfu": round(tflops / peak, 4) if peak else None,
              "matmul_tflops": round(reached, 3), "share_of_matmul": round(tflops / reached, 4),
              "peak_memory_gb": memory and round(memory, 2),
              "model": cfg.model, "data": cfg.data, "batch_size": cfg.batch_size,
              "processes": machine.world, "device": chip(machine), "dtype": machine.dtype,
              "compile": machine.compile, "torch": torch.__version__}
    if machine.rank == 0:
        report = json.dumps(report)
        save_file(os.path.join(cfg.out, "bench.json"), lambda f: f.write(report.encode()))
        print(report)


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
        for part in list(model.modules()):
            if isinstance(part, (Block, CorrelationLayer)):
                part.compile(fullgraph=True, dynamic=False)
            elif isinstance(part, ResNet50):  # SyncBatchNorm breaks its graph
                part.compile(dynamic=False)
    if machine.world == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[machine.device.index] if machine.device.type == "cuda" else None,
        gradient_as_bucket_view=True)


# -------------------------------------------------------------------------------------- 9. main

def main(argv=None):
    """The run of a Config, from the command line to encoder.pt; goes on from out/ckpt.pt."""
    cfg = parse_config(Config, PRESETS, argv, __doc__.split("\n")[0])
    machine = setup_machine(cfg.device, cfg.dtype, cfg.compile, cfg.timeout)
    with machine.first():
        (source, indices), validation, sentence = crop.train_and_val(
            cfg.data, cfg.seed, crop.read_classes(cfg.classes))
    plan = make_plan(cfg, machine, len(indices))
    cim, optimizer = build(cfg, machine)
    checkpoint, encoder = (os.path.join(cfg.out, name) for name in ("ckpt.pt", "encoder.pt"))
    saved = None if cfg.bench else newest_checkpoint(cfg.out, machine)
    start, unlogged = resume(saved, checkpoint, cfg, machine, plan, cim, optimizer)
    if start >= plan.stop and not unlogged:
        if machine.rank == 0:
            if not os.path.exists(encoder):
                save_encoder(encoder, cim)
            print(f"finished: {start} of {plan.stop} steps are done; the encoder is {encoder}")
        return
    if machine.rank == 0:
        print(plan.describe(cfg, machine, sentence, start,
                            f"contexts, each with {cfg.exemplars} exemplars"), flush=True)

    held_out = HeldOut(*validation, cfg, machine)
    journal = Journal(cfg, machine, plan, start, unlogged, functools.partial(held_out.look, cim),
                      HeldOut.MEASURES, functools.partial(gflop_per_image, cfg))
    loader = iter(make_loader(contexts_of(source, indices, cfg),
                              micro_batches(cfg, plan, machine.rank, range(start, plan.stop)),
                              cfg.workers, machine))
    model = accelerate(cim, machine)
    parameters = [p for p in cim.parameters() if p.requires_grad]

    cim.train()
    for step in range(start, plan.stop):
        lr = learning_rate(step, plan.total, plan.peak, plan.warmup)
        tau = target_decay(step, plan.total, cfg.tau)
        set_learning_rate(optimizer, lr)
        u = uniforms(cfg, (4, step), cfg.batch_size)[machine.rank * plan.share:][:plan.share]
        loss = 0
        for k, rows in enumerate(u.split(plan.micro)):
            contexts, _ = journal.fetch(loader)
            context, exemplars, maps, _ = make_pairs(
                machine.send(contexts), machine.send(rows), cfg)
            with machine.accumulating(model, last=k == plan.accumulate - 1):
                with machine.autocast():
                    part, _ = model(context, exemplars, maps)
                (part / plan.accumulate).backward()
            loss = loss + part.detach() / plan.accumulate
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        cim.update_target(tau)
        journal.end_step(step + 1, loss, lr, grad_norm, due(step + 1, cfg.eval_every), cim,
                         optimizer, tau=None if cim.target is cim.online else tau)

    if cfg.bench:
        bench_report("pretrain", journal)
    elif machine.rank == 0:
        save_encoder(encoder, cim)
        print(f"done: {cfg.out} holds encoder.pt, maps.png, log.jsonl and ckpt.pt; on held-out "
              "images skill is {skill:.3f}, with swapped exemplars {skill_swapped:.3f} (0: nothing "
              "is read from the exemplar)".format(**journal.last))
    journal.close()


def run(main):
    """Call a script's main: what the user can mend becomes one sentence and status 1."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        main()
        if dist.is_initialized():  # not after an error: others may not be there to part from
            dist.destroy_process_group()
        return
    except InputError as error:
        told = os.environ.get("RANK", "0") != "0" and not isinstance(error, LocalError)
        reason = "" if told else f"{os.path.basename(sys.argv[0])}: {error}"
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: a smaller --micro_batch takes less ({error})"
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        lost = isinstance(error, dist.DistError) or re.search("gloo|nccl|connection", said, re.I)
        if re.search(r"DataLoader (worker \(pid|timed out)", said):
            reason = (f"the images do not come: {said} Fewer --workers take less memory, a longer "
                      "--timeout waits for slow storage")
        elif world > 1 and lost:
            reason = (f"process {os.environ['RANK']} lost the others, or waited for them longer "
                      f"than --timeout ({said}); what ended them is said elsewhere. The same "
                      "command goes on from the last checkpoint")
        else:
            raise
    except KeyboardInterrupt:
        reason = "stopped; the same command goes on from the last checkpoint of a training run"
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would complain
        for worker in multiprocessing.active_children():  # one may hang in its storage
            worker.kill()
    if reason:
        print(reason, file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    run(main)
