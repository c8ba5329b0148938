"""finetune.py: what a pre-trained encoder is worth, by fine-tuning it (Tables 5-7, 10 and 11).

    python finetune.py --recipe=demo                       a laptop, after pretrain.py's demo
    python finetune.py --recipe=linear --init=ENCODER      a linear probe of frozen features
    torchrun --nproc_per_node=8 finetune.py --init=out/pretrain/encoder.pt       Table 10, ViT-B/16
    torchrun --nproc_per_node=8 finetune.py --recipe=segment --init=out/finetune/model.pt   Table 7

In the order in which things happen:

    1. Config        every field is a flag; the defaults are Table 10 for ViT-B/16
    2. the images    labels, RandAugment, MixUp and CutMix
    3. the model     loss, learning rates by layer, optimiser
    4. accuracy      exact for any number of processes
    5. main          the loop; processes, schedules, checkpoints and the log are pretrain.py's

    6. weights       from our files, timm's, torchvision's and the released ones
    7. segmentation  what is different where every pixel has a label (4.4, Table 7)

The images and crops of step s are seeded by (seed, s) as in pretrain.py. MixUp, CutMix, drop path
and dropout are seeded by (seed, s, micro-batch, process): an interrupted run goes on bit for bit on
the same number of processes with the same --micro_batch.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomErasing, v2

import crop
from crop import InputError
from model import ENCODERS, Classifier, Segmenter, resize_positions
from pretrain import (Batches, Progress, accelerate, at_work, learning_rate, load_checkpoint,
                      make_loader, make_plan, measuring, micro_batches, number, pair,
                      parameter_groups, parse_config, run, save_file, setup_machine, switch)


# ------------------------------------------------------------------------------------ 1. Config

@dataclass(frozen=True)
class Config:
    """The paper's recipe for ViT-B/16, Table 10. A field's type parses its flag, its comment is the
    flag's line in --help. Fields marked `segment` are read by that recipe alone; it does not read
    those from test_crop to cutmix, nor classes, loss, smoothing, bce_threshold and frozen."""

    recipe: Literal["vit_b", "vit_s", "resnet50_100", "resnet50_300", "linear", "segment",
                    "demo"] = "vit_b"  # values for the fields; flags win
    # where
    init: str = "out/pretrain/encoder.pt"  # a file with the encoder's weights, or scratch
    data: str = "data/imagenet"  # train/CLASS/* and val/CLASS/*; or shapes, imagenette
    classes: str = ""  # a file with the class folders to keep, one a line
    out: str = "out/finetune"  # the run's folder: config.json, log.jsonl, ckpt.pt, model.pt
    model: Literal[("auto", *ENCODERS)] = "auto"  # auto: the one in --init, else the recipe's
    labels: int = 150  # segment: masks have the numbers 1 to labels, and 0 where nothing counts
    # images
    image_size: int = 224  # pixels, in training
    test_size: int = 224  # pixels, in validation; segment: the shorter side, and a window's
    scale: pair = (0.08, 1.0)  # area of a random crop; segment: shorter side over image_size
    flip: number = 0.5  # probability of a mirrored image
    photometric: number = 0.0  # segment: probability of each change of light and colour
    cat_max_ratio: number = 1.0  # segment: largest share of a class in a crop, if ten tries do
    test_crop: number = 0.95  # side of the centre crop as a fraction of the shorter side
    randaugment: number = 9.0  # mean magnitude of RandAugment, on a scale of 0 to 10
    randaugment_std: number = 0.5  # standard deviation of its magnitude
    randaugment_p: number = 0.5  # probability of each of its two operations; 0 turns it off
    erasing: number = 0.0  # probability of erasing a random box (the released code: 0.25)
    mixup: number = 0.8  # alpha of MixUp; 0 turns it off
    cutmix: number = 1.0  # alpha of CutMix; 0 turns it off
    repeats: int = 1  # times that each image comes in a step (repeated augmentation)
    # optimisation
    loss: Literal["ce", "bce"] = "ce"  # cross-entropy, or binary cross-entropy of each class
    smoothing: number = 0.1  # of the labels
    bce_threshold: number = 0.0  # with bce, targets above it become 1, others 0; 0 leaves them soft
    drop_path: number = 0.1  # stochastic depth of a ViT's last block
    layer_decay: number = 0.8  # a layer's learning rate over that of the layer above
    frozen: switch = False  # linear probe: the encoder stays as it is
    head_width: int = 768  # segment: channels of UperNet
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd has beta1 as its momentum
    epochs: int = 100  # passes over the images
    warmup_epochs: number = 5.0  # of linear warm-up of the learning rate
    schedule: Literal["cosine", "linear"] = "cosine"  # of the learning rate after that
    batch_size: int = 2048  # images a step, over all processes
    lr: number = 9.6e-3  # peak learning rate at a batch of lr_batch
    lr_batch: int = 2048  # the batch that lr is meant for; another one scales it linearly
    weight_decay: number = 0.05  # of matrices; not of biases, norms and the cls token
    beta1: number = 0.9  # AdamW's, or the momentum
    beta2: number = 0.999  # AdamW's
    clip: number = 0.0  # largest norm of the gradient; 0 does not clip
    seed: int = 0  # of everything random
    max_steps: int = 0  # end after so many steps, schedules still span epochs; 0: all epochs
    # machine: all but dtype may differ when a run goes on (see pretrain.FREE)
    micro_batch: int = 256  # images a process handles at once, at most
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the chip has it
    compile: Literal["auto", "true", "false"] = "auto"  # auto compiles on CUDA
    workers: int = -1  # loader processes for each training process; -1 uses the cores at hand
    log_every: int = 10  # steps
    eval_epochs: int = 1  # epochs between validations; the end is always validated
    save_every: int = 1000  # steps between checkpoints

    @property
    def segments(self):
        """Whether every pixel has a label, not every image."""
        return self.recipe == "segment"


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
    "segment": dict(PLAIN, data="data/ade20k", init="out/finetune/model.pt", out="out/segment",
                    image_size=512, test_size=512, scale=(0.5, 2.0), photometric=0.5,
                    cat_max_ratio=0.75, layer_decay=0.9, epochs=127, warmup_epochs=1.1875,
                    schedule="linear", batch_size=16, lr=3e-5, lr_batch=16, log_every=50,
                    eval_epochs=13),
    "demo": dict(PLAIN, data="shapes", init="out/demo/encoder.pt", out="out/demo_finetune",
                 image_size=64, test_size=64, scale=(0.8, 1.0), drop_path=0.0, epochs=300,
                 warmup_epochs=15.0, batch_size=16, lr=2e-3, lr_batch=16, workers=0, log_every=250,
                 eval_epochs=100),
}
SCRATCH = {"vit_b": "vit_b16", "vit_s": "vit_s16", "resnet50_100": "resnet50", "segment": "vit_b16",
           "resnet50_300": "resnet50", "demo": "vit_d8"}  # the encoder of a recipe without weights


# -------------------------------------------------------------------------------- 2. the images

def match_labels(source, classes, where):
    """The labels of a source, its class folders found by name in `classes`; -1 for none. Raises
    InputError naming the folders that are not among them."""
    number = {name: k for k, name in enumerate(classes)}
    strange = [name for name in source.classes if name not in number]
    if strange:
        raise InputError(f"{where!r} has {len(strange)} unknown classes, {', '.join(strange[:5])}")
    return [number[source.classes[k]] if k >= 0 else -1 for k in source.labels]


def labelled_data(cfg):
    """-> (training source, its labelled rows), (validation source, its labelled rows), a sentence.
    Both sources number the classes as the first does."""
    (train, rows), (val, val_rows), sentence = crop.train_and_val(
        cfg.data, cfg.seed, crop.read_classes(cfg.classes))
    val.labels = match_labels(val, train.classes, cfg.data)
    rows, val_rows = (np.asarray(r)[np.asarray(source.labels)[r] >= 0]
                      for source, r in ((train, rows), (val, val_rows)))
    if not len(rows) or not len(val_rows) or len(train.classes) < 2:
        raise InputError(f"{cfg.data!r} needs images of at least two classes, in CLASS/* or in "
                         f"train/CLASS/* and val/CLASS/*, but has {len(rows)} and {len(val_rows)}")
    sentence += f"; {len(rows)} and {len(val_rows)} of {len(train.classes)} classes are labelled"
    return (train, rows), (val, val_rows), sentence


MEAN_COLOUR = [round(255 * m) for m in crop.MEAN]  # 0 once it is normalised


class RandAugment(v2.RandAugment):
    """timm's "9 / 0.5": two random operations, each with probability p, at a magnitude drawn from
    N(magnitude, std) on a scale of 0 to 10.

    DEVIATION: the operations are torchvision's. timm has Invert and SolarizeAdd besides, and no
    Identity; it takes bilinear or bicubic interpolation at random, here it is bilinear."""

    def __init__(self, magnitude, std, p):
        super().__init__(num_ops=1, num_magnitude_bins=1001,  # hundredths of a magnitude
                         interpolation=v2.InterpolationMode.BILINEAR, fill=MEAN_COLOUR)
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


# --------------------------------------------------------------------------------- 3. the model

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


def erase(images, p):
    """Fill a random box of each normalised image with noise, with probability p, in place.
    torchvision's own class would make the noise on the CPU."""
    for image in images:
        if torch.rand(()) < p:
            top, left, h, w, _ = RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])
            image[:, top:top + h, left:left + w].normal_()


def classifier_loss(cfg, labels, classes, machine):
    """-> loss(model, uint8 images, their numbers in the source): of a micro-batch, mixed. labels:
    of the source."""
    labels = torch.tensor(labels)
    mix = make_mix(cfg, classes)

    def loss(model, images, numbers):
        images = crop.normalize(machine.send(images).float() / 255)
        if cfg.erasing > 0:
            erase(images, cfg.erasing)
        images, targets = mix(images, machine.send(labels[numbers]))
        with machine.autocast():
            logits = model(images)
        return soft_loss(logits, targets, cfg)

    return loss


def layer_scale(name, depth, decay):
    """decay^(depth + 1 - layer): 1 for the head, decay for the last of `depth` blocks, and so on
    down to the embedding, layer 0. A ResNet has four layers and its stem."""
    layer = 0 if name.startswith("encoder.") else depth + 1
    if found := re.match(r"encoder\.(blocks\.|layer)(\d+)\.", name):
        layer = int(found[2]) + (found[1] == "blocks.")  # these count from 0
    return decay ** (depth + 1 - layer)


def build_model(cfg, classes):
    """The classifier or segmenter of a config, freshly initialised."""
    if cfg.segments:
        return Segmenter(cfg.model, classes, cfg.drop_path, cfg.head_width)
    return Classifier(cfg.model, classes, cfg.drop_path, probe=cfg.frozen)


def build(cfg, classes, machine, weights=None):
    """The model, seeded, with an encoder's weights, on the device, and its optimiser."""
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, classes)
    if weights:
        load_weights(model, weights, cfg.init)
    model.to(machine.device)
    if cfg.segments and machine.device.type == "cuda" and machine.world > 1:  # of two images each
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    depth = 4 if cfg.model == "resnet50" else len(model.encoder.blocks)
    groups = parameter_groups(model, cfg.weight_decay,
                              partial(layer_scale, depth=depth, decay=cfg.layer_decay))
    if cfg.optimizer == "sgd":
        return model, torch.optim.SGD(groups, cfg.lr, cfg.beta1)
    return model, torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2),
                                    fused=machine.device.type != "mps")


# ---------------------------------------------------------------------------------- 4. accuracy

def centre_crops(source, rows, size, ratio):
    """The data set of test images: squares in the middle of some images of a source."""
    cut = partial(crop.cut_centre, size=size, ratio=ratio)
    return crop.Samples(source, rows, 0, cut, replace=False)


def accuracy(model, images, labels, machine, among=None, attack=None):
    """-> top-1 and top-5 in percent, mean cross-entropy and the number of images; labels [source].

    Exact for any number of processes: each image counts once, nothing is padded. among: predict
    only these classes, which the labels then number. attack(model, images, labels, numbers) ->
    images, all in [0, 1], comes first."""
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
    if not n or not math.isfinite(loss):
        raise InputError("the model's outputs are not finite" if n else "no image could be read")
    return dict(top1=100 * top1 / n, top5=100 * top5 / n, val_loss=loss / n, n=int(n))


# -------------------------------------------------------------------------------------- 5. main

def save_model(path, model, cfg, classes, score, identity=()):
    """model.pt: weights by timm's or torchvision's names, class names in order, config, score, and
    the Progress.identity of the run."""
    weights = {theirs: model.state_dict()[mine].cpu() for mine, theirs in model.names().items()}
    saved = dict(weights=weights, classes=classes, config=dataclasses.asdict(cfg), score=score,
                 identity=dict(identity))
    save_file(path, lambda f: torch.save(saved, f))


def main(argv=None):
    """The run of a Config, from the command line to model.pt; goes on from out/ckpt.pt."""
    cfg = parse_config(Config, RECIPES, argv, __doc__.split("\n")[0])
    with setup_machine(cfg) as machine, at_work(cfg.out, machine) as signals:
        train(cfg, machine, signals)


def train(cfg, machine, signals):
    """signals: a list that grows when the run is asked to stop."""
    cfg, weights = choose_encoder(cfg)
    with machine.first():  # Imagenette may have to be downloaded
        (source, rows), (val, val_rows), sentence = (
            scene_data(cfg) if cfg.segments else labelled_data(cfg))
    machine.say(f"data     {cfg.data}: {sentence}\n"
                f"model    {cfg.model} from {cfg.init}, with the recipe {cfg.recipe} for "
                f"{SCRATCH.get(cfg.recipe, 'any encoder')}, trained at {cfg.image_size} pixels, "
                f"tested at {cfg.test_size}")
    plan = make_plan(cfg, machine, len(rows))
    synchronised = cfg.segments and machine.world > 1 and machine.device.type == "cuda"
    if plan.share // plan.accumulate == 1 and not synchronised and (
            cfg.mixup or cfg.cutmix or cfg.frozen or cfg.segments):
        raise InputError("MixUp, CutMix and BatchNorm need two images in each micro-batch: give a "
                         "larger --batch_size or --micro_batch")
    data = dict(images=len(source), classes=source.classes)
    model, optimizer = build(cfg, len(source.classes), machine, weights)
    if cfg.segments:
        cut, loss_of = partial(cut_scene, cfg=cfg), segmenter_loss(machine)
        scenes = crop.Samples(val, val_rows, 0, whole_scene, replace=False)
        val_batches = Batches(scenes, machine, cfg.workers, 1, signals)
        measure = partial(mean_iou, model, val_batches, len(val.classes), cfg.test_size, machine)
    else:
        augment = RandAugment(cfg.randaugment, cfg.randaugment_std, cfg.randaugment_p).augment
        cut = partial(crop.cut_context, size=cfg.image_size, scale=cfg.scale, flip=cfg.flip,
                      augment=augment if cfg.randaugment_p > 0 else None)
        loss_of = classifier_loss(cfg, source.labels, len(source.classes), machine)
        crops = centre_crops(val, val_rows, cfg.test_size, cfg.test_crop)
        val_batches = Batches(crops, machine, cfg.workers, 64, signals)
        measure = partial(accuracy, model, val_batches, torch.tensor(val.labels), machine)
    progress = Progress(cfg, machine, plan, data, model, optimizer, signals,
                        lambda step: measure(), cfg.eval_epochs * plan.per_epoch)
    start = progress.resume()
    wrapped = accelerate(model, machine)  # what the loop calls; model has the same weights
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = micro_batches(cfg, plan, machine.rank, range(start, plan.stop), cfg.repeats)
    loader = iter(make_loader(crop.Samples(source, rows, cfg.seed, cut), batches, cfg.workers,
                              machine))
    model.train()
    for step in range(start, plan.stop):
        lr = learning_rate(step, plan.total, plan.peak, plan.warmup, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        loss = 0
        for k in range(plan.accumulate):
            images, numbers = progress.fetch(loader)
            draws = np.random.SeedSequence((cfg.seed, 7, step, k, machine.rank))  # stream 7
            torch.manual_seed(int(draws.generate_state(1, np.uint64)[0]))
            with machine.accumulating(wrapped, last=k == plan.accumulate - 1):
                part = loss_of(wrapped, images, numbers) * (len(images) / plan.share)
                part.backward()
            loss = loss + part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        progress.after(step + 1, loss, lr, grad_norm)

    if machine.rank == 0:
        save_model(f"{cfg.out}/model.pt", model, cfg, source.classes, progress.row,
                   progress.identity)
        machine.say(f"{progress.finished(start)}: {cfg.out}/model.pt")


# ----------------------------------------------------------------------------------- 6. weights

# The first words of weights that an encoder may leave behind:
LEFT = ("head.", "fc.", "fc_norm.", "norm.", "pyramid.", "auxiliary.",  # of other heads
        "online.", "target.", "decoder", "mask_token",  # of pre-training: ours, and the released
        "patch_embed_c.", "blocks_c.", "norm_c.")  # code's names for the target


# What wrappers put in front of all names: DDP, torch.compile, backbones, ours.
WRAPPERS = r"^((module|_orig_mod|backbone|encoder|online)\.)*"


def read_weights(path):
    """-> (the encoder's name, the weights by published names, the file as it was saved). path: our
    encoder.pt, ckpt.pt or model.pt, timm's ViT, torchvision's ResNet-50 or the released CIM
    weights; of two encoders the online one. Raises InputError where the file is something else."""
    if not os.path.isfile(path):
        raise InputError(f"there is no file of weights {path!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released file has one
            saved = state = torch.load(path, map_location="cpu", weights_only=True)
        for entry in ("model", "weights", "state_dict"):  # checkpoints, model.pt, timm's
            state = state.get(entry, state)
        state = {re.sub(WRAPPERS, "", k): v for k, v in state.items()}
        if "layer4.2.conv3.weight" in state:
            return "resnet50", state, saved
        width, patch = (state[k].shape[-1] for k in ("cls_token", "patch_embed.proj.weight"))
    except Exception as error:  # torch.load raises many kinds on files that are none
        raise InputError(f"{path!r} is torn, or holds no weights of a ViT or ResNet-50") from error
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    for name, known in ENCODERS.items():
        if known == (width, depth, patch):
            return name, state, saved
    raise InputError(f"{path!r} holds an unknown ViT: width {width}, depth {depth}, patch {patch}")


def load_weights(model, state, path, head=False):
    """Put an encoder's weights into a Classifier or Segmenter, with its head where `head` is true.
    A position table of another size is resized. Raises InputError for any missing weight but the
    head's, and for any surplus one but those of other heads and of pre-training."""
    names = {theirs: mine for mine, theirs in model.names().items()}
    found = {names[k]: v for k, v in state.items() if k in names
             and (head or names[k].startswith(("encoder.", "fc_norm.")))}
    if "encoder.pos_embed" in found:
        table, side = found["encoder.pos_embed"], math.isqrt(len(model.encoder.pos_embed[0]))
        grid = resize_positions(table[:, 1:], side, side)
        found["encoder.pos_embed"] = torch.cat([table[:, :1], grid], 1)
    missing = [k for k in model.load_state_dict(found, strict=False).missing_keys
               if head or k.startswith("encoder.")]
    surplus = [k for k in state if k not in names and not k.startswith(LEFT)]
    if "encoder.norm.weight" in missing and "fc_norm.weight" in state:
        raise InputError(f"{path!r} is a fine-tuned classifier, whose encoder has no norm of its "
                         "own: give the weights that it began with")
    if missing or surplus:
        raise InputError(f"{path!r} lacks {missing[:5]} and has the unknown {surplus[:5]}")


def load_encoder(path, model="auto"):
    """-> a Classifier for linear probing with the encoder of a file of weights. Raises InputError
    where that is another one than `model`."""
    name, state, _ = read_weights(path)
    if model not in ("auto", name):
        raise InputError(f"the weights of {path!r} are of {name}: give --model={name}")
    probe = Classifier(name, 1, probe=True)
    load_weights(probe, state, path)
    probe.fc_norm.reset_running_stats()  # those of another probe would change the features
    return probe


def choose_encoder(cfg):
    """-> (the config with the encoder's name, the weights to begin with): as in out/ckpt.pt, which
    holds them, or in --init, or by the recipe. Raises InputError where --model names another one,
    or where the encoder cannot do what is asked."""
    saved, weights = load_checkpoint(f"{cfg.out}/ckpt.pt"), None
    if saved:
        name = saved["config"]["model"]
    elif cfg.init != "scratch":
        name, weights, _ = read_weights(cfg.init)
    else:
        name = SCRATCH.get(cfg.recipe) if cfg.model == "auto" else cfg.model
        if name is None:
            raise InputError(f"{cfg.init!r} needs --model")
    if cfg.model not in ("auto", name):
        raise InputError(f"the weights are of {name}, not of {cfg.model}")
    if name == "resnet50" and (cfg.drop_path or cfg.segments):
        raise InputError("--recipe: resnet50_100, resnet50_300 and linear are for resnet50")
    if name != "resnet50" and SCRATCH.get(cfg.recipe) == "resnet50":
        raise InputError(f"--recipe={cfg.recipe} is for resnet50, and the weights are of {name}")
    patch = ENCODERS[name][2] if ENCODERS[name] else 1
    if cfg.image_size % patch or cfg.test_size % patch:
        raise InputError(f"--image_size and --test_size are multiples of {patch} for {name}")
    return dataclasses.replace(cfg, model=name), weights


# ------------------------------------------------------------------------------ 7. segmentation

class Scenes:
    """ADE20K's layout: images/SPLIT/NAME.* with annotations/SPLIT/NAME.*, masks of one channel of 8
    bits whose values are 0 where nothing counts and 1 to `labels` for the classes. A source;
    open(i) gives (image, mask), both as they are stored, since masks are drawn on that: no EXIF
    orientation. Raises InputError where images and masks do not go together, in names or in size,
    and for a larger label."""

    def __init__(self, root, split, labels):
        self.paths, self.masks = (crop.find_images(os.path.join(root, kind, split))
                                  for kind in ("images", "annotations"))
        self.classes = [str(k + 1) for k in range(labels)]
        names = [[os.path.splitext(os.path.relpath(path, root).split(os.sep, 1)[1])[0]
                  for path in paths] for paths in (self.paths, self.masks)]
        if names[0] != names[1] or not self.paths:
            raise InputError(f"{root!r} needs images/{split}/NAME.jpg and annotations/{split}/"
                             f"NAME.png, unlike {sorted({*names[0]} ^ {*names[1]})[:3]}")

    __len__ = crop.Folder.__len__

    @contextlib.contextmanager
    def open(self, i):
        with crop.open_image(self.paths[i]) as image, crop.open_image(self.masks[i]) as mask:
            if mask.size != image.size or mask.mode not in "LP" or mask.format == "JPEG" or (
                    mask.getextrema()[1] > len(self.classes)):
                raise InputError(f"the mask {self.masks[i]!r} should be no JPEG, as large as its "
                                 f"image, one channel of 0 to {len(self.classes)} (--labels)")
            yield image, mask


def scene_data(cfg):
    """labelled_data where every pixel has a label."""
    if cfg.labels < 2:
        raise InputError("--labels: at least 2 classes, since the label 0 is ignored")
    train, val = (Scenes(cfg.data, split, cfg.labels) for split in ("training", "validation"))
    return (train, list(range(len(train)))), (val, list(range(len(val)))), (
        f"{len(train)} images to train on, {len(val)} to validate, {cfg.labels} classes")


def rescaled_size(width, height, size):
    """Width and height of an image whose shorter side is brought to `size`, or its longer one to
    4 times that where this is less (512 and 2048 in mmsegmentation)."""
    factor = min(size / min(width, height), 4 * size / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def photometric_distortion(p):
    """PIL image -> PIL image: brightness, contrast, saturation and hue, each changed with
    probability p. DEVIATION: mmsegmentation adds up to 32 of 255 to the brightness, torchvision
    multiplies it."""
    changes = dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: amount})], p)
                       for name, amount in changes.items()])


def cut_scene(pair, rng, cfg):
    """PIL (image, mask) of any size -> the same random part of both, uint8 [4, size, size], the
    labels last.

    The shorter side is brought to size times a random factor from cfg.scale. Of ten positions the
    first is chosen where no class has more than cfg.cat_max_ratio of the labelled pixels. Outside
    the image there is the mean colour, and label 0. DEVIATION: resized with antialiasing, as Pillow
    does it, where mmsegmentation has OpenCV."""
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
    torch.default_generator.manual_seed(int(rng.integers(2**63)))  # torchvision draws from it
    distort = photometric_distortion(cfg.photometric)
    both = np.dstack([distort(part(crop.to_rgb(image), Image.BILINEAR)), labels])
    if rng.random() < cfg.flip:
        both = both[:, ::-1]
    padded = np.full((cfg.image_size, cfg.image_size, 4), [*MEAN_COLOUR, 0], np.uint8)
    padded[:h, :w] = both
    return crop.to_tensor(padded)


def whole_scene(pair, rng):
    """PIL (image, mask) -> both as they are, uint8 [4, height, width]; rng is not used."""
    return crop.to_tensor(np.dstack([crop.to_rgb(pair[0]), pair[1]]))


def pixel_loss(logits, labels):
    """Cross-entropy of float32 logits [B, N, h, w] over the pixels whose label is not 0, divided
    by the number of all pixels, so that each weighs the same however a batch is split."""
    total = F.cross_entropy(logits, labels.long() - 1, ignore_index=-1, reduction="sum")
    return total / labels.numel()


def segmenter_loss(machine):
    """-> loss(model, uint8 images with labels [B, 4, h, w], numbers): of a micro-batch."""
    def loss(model, images, numbers):
        images = machine.send(images)
        with machine.autocast():
            logits, auxiliary = model(crop.normalize(images[:, :3].float() / 255))
        return pixel_loss(logits, images[:, 3]) + 0.4 * pixel_loss(auxiliary, images[:, 3])

    return loss


def sliding_window(model, x, size):
    """Normalised images x [B, 3, h, w] -> logits [B, N, h, w]: the mean over windows of size x size
    two thirds of a window apart (341 of 512), the last ones flush with the border. Where x is
    smaller than a window it is padded with the mean colour. DEVIATION: mmsegmentation makes the
    window smaller, which would leave no whole patches."""
    (h, w), stride = x.shape[2:], size * 2 // 3
    x = F.pad(x, (0, max(0, size - w), 0, max(0, size - h)))
    ys, xs = ([min(i * stride, n - size) for i in range(1 + math.ceil((n - size) / stride))]
              for n in x.shape[2:])
    windows = [(..., slice(a, a + size), slice(b, b + size)) for a in ys for b in xs]
    parts = model(torch.cat([x[window] for window in windows])).chunk(len(windows))
    total = x.new_zeros(len(x), parts[0].shape[1], *x.shape[2:])
    count = torch.zeros_like(total[:, :1])
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
    return F.interpolate(logits, shape, mode="bilinear").argmax(1)[0]


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
    if matrix.any(1).sum() < 2 and not getattr(images, "signals", ()):  # which cut it short
        raise InputError("the masks that could be read have fewer than two classes. Labels count "
                         "from 1; pixels of label 0 are ignored")
    return iou_scores(matrix) | dict(n=n.item())


if __name__ == "__main__":
    run(main)
