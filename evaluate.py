"""evaluate.py: how good a classifier or an encoder is, one command for each number.

    python evaluate.py --bench=top1 --ckpt=out/finetune/model.pt --data=FOLDER
    python evaluate.py --bench=knn --ckpt=out/pretrain/encoder.pt --data=FOLDER
    torchrun --nproc_per_node=8 evaluate.py ...              the same number, sooner

    1. Config     every field is a flag
    2. the model  a classifier, an encoder from any file, or an untrained one
    3. benches    top1, knn; BENCHES
    4. main       one JSON line, kept in the run's folder as BENCH.json
"""

import json
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import crop
from crop import InputError
from finetune import Images, accuracy, labelled_data, load_weights, match_labels, read_weights
from model import ENCODERS, Classifier
from pretrain import check_values, make_folder, parse_config, run, save_file, setup_machine


# ------------------------------------------------------------------------------------ 1. Config

@dataclass(frozen=True)
class Config:
    """What to measure. A field's comment is its line in --help."""

    bench: str = "top1"  # top1 (and top5) of a classifier, or knn of an encoder's features
    ckpt: str = "out/finetune/model.pt"  # model.pt; for knn any file of weights, or scratch
    use_target: bool = False  # score the moving average of a pre-training checkpoint
    model: str = "auto"  # the encoder, for --ckpt=scratch
    data: str = "data/imagenet"  # a folder with val/CLASS/* or CLASS/*, or a built-in source
    classes: str = ""  # a file with the names of the class folders to keep, one a line
    out: str = ""  # where BENCH.json goes; by default the folder of --ckpt
    size: int = 0  # pixels; 0 is the size that a classifier was validated at, else 224
    test_crop: float = 0.95  # side of the centre crop as a fraction of the shorter side
    k: int = 20  # nearest neighbours that vote (knn)
    temperature: float = 0.07  # of their votes, exp(cosine / temperature) (knn)
    seed: int = 0  # of --ckpt=scratch, and of the split where a folder has no val/ (knn)
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16; auto is bfloat16 where the chip multiplies it
    workers: int = -1  # loader processes for each process; -1 uses the cores at hand

    def __post_init__(self):
        """Raise InputError for values that cannot work, before any work starts."""
        check_values(self, bench=BENCHES, model=("auto", *ENCODERS))


# --------------------------------------------------------------------------------- 2. the model

def load_model(cfg, machine):
    """-> (Classifier in evaluation mode on the device, its class names, the pixels it likes).

    The class names are None for an encoder without a head; its features are then its own tokens,
    pooled. Raises InputError when the file is none, or not what --model says.
    """
    classes, size = None, 224
    if cfg.ckpt == "scratch":
        if cfg.model == "auto":
            raise InputError("--ckpt=scratch needs --model")
        torch.manual_seed(cfg.seed)
        model = Classifier(cfg.model, 1, probe=True)
    else:
        name, state, saved = read_weights(cfg.ckpt, cfg.use_target)
        if cfg.model not in ("auto", name):
            raise InputError(f"{cfg.ckpt!r} holds {name}, not {cfg.model}; leave out --model")
        probe = True
        if "classes" in saved:
            classes, size = saved["classes"], saved["config"]["test_size"]
            probe = saved["config"]["frozen"]
        model = Classifier(name, len(classes or "1"), probe=probe)
        load_weights(model, state, cfg.ckpt, head=classes is not None)
    return model.to(machine.device).eval(), classes, cfg.size or size


# ----------------------------------------------------------------------------------- 3. benches

def top1(cfg, machine):
    """Top-1 and top-5 accuracy of a classifier on centre crops; classes are found by name."""
    model, classes, size = load_model(cfg, machine)
    if classes is None:
        raise InputError(f"{cfg.ckpt!r} has no classifier: --bench={cfg.bench} takes the model.pt "
                         "that finetune.py writes")
    place = os.path.join(cfg.data, "val")
    place = place if os.path.isdir(place) else cfg.data
    source = crop.open_images(place, "val", crop.read_classes(cfg.classes))
    labels = match_labels(source, classes, place)
    rows = [i for i, label in enumerate(labels) if label >= 0]
    if not rows:
        raise InputError(f"{place!r} has no images in class folders")
    images = Images(source, rows, size, cfg.test_crop, cfg.workers, machine)
    score = accuracy(model, images, torch.tensor(labels), machine)
    return dict(top1=score["top1"], top5=score["top5"], n=score["n"])


def normalised_features(model, images, count, machine):
    """-> ([n, width] features of unit length on the device, their numbers in the source [n]) of
    the readable images among `count`, on every process."""
    table = torch.zeros(count, model.head.in_features + 1, device=machine.device)
    with torch.no_grad():
        for x, numbers in images:
            with machine.autocast():
                features = model.features(x)
            features = F.normalize(features.float())
            table[machine.send(numbers)] = F.pad(features, (0, 1), value=1)  # and a mark
    machine.sum(table)
    seen = table[:, -1].nonzero().squeeze(1)
    return table[seen, :-1], seen.cpu()


def vote(queries, bank, labels, classes, k, temperature):
    """Classes [N] for queries [N, D] by the k nearest of bank [M, D] (of unit length) with labels
    [M]: each votes for its own with exp(cosine / temperature)."""
    chosen = []
    for q in queries.split(max(1, 2**26 // len(bank))):  # 256 MB of cosines at a time
        cosine, nearest = (q @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(q), classes, device=q.device)
        votes.scatter_add_(1, labels[nearest], ((cosine - 1) / temperature).exp())
        chosen.append(votes.argmax(1))
    return torch.cat(chosen)


def knn(cfg, machine):
    """Weighted k-nearest-neighbour accuracy of frozen features: training images vote."""
    model, _, size = load_model(cfg, machine)
    with machine.first():
        (train, rows), (val, val_rows), _ = labelled_data(cfg)
    sides = []
    for source, wanted in ((train, rows), (val, val_rows)):
        images = Images(source, wanted, size, cfg.test_crop, cfg.workers, machine)
        features, numbers = normalised_features(model, images, len(source), machine)
        sides.append((features, machine.send(torch.tensor(source.labels)[numbers])))
    (bank, bank_labels), (queries, labels) = sides
    mine = slice(machine.rank, None, machine.world)
    hits = torch.zeros(1, device=machine.device)
    if len(queries[mine]):
        chosen = vote(queries[mine], bank, bank_labels, len(train.classes), cfg.k, cfg.temperature)
        hits += (chosen == labels[mine]).sum()
    machine.sum(hits)
    return dict(knn=100 * hits.item() / len(labels), n=len(labels), bank=len(bank))


BENCHES = {"top1": top1, "knn": knn}


# -------------------------------------------------------------------------------------- 4. main

def main(argv=None):
    """Run one bench; print its scores and, as the last line, its JSON."""
    cfg = parse_config(Config, {}, argv, __doc__.split("\n")[0])
    machine = setup_machine(cfg.device, cfg.dtype, "false")
    began = time.perf_counter()
    result = BENCHES[cfg.bench](cfg, machine)
    if machine.rank > 0:
        return
    seconds = time.perf_counter() - began
    scores = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
    report = dict(bench=cfg.bench, **scores, seconds=round(seconds, 2),
                  images_per_s=round((result["n"] + result.get("bank", 0)) / seconds, 2),
                  ckpt=cfg.ckpt, data=cfg.data,
                  use_target=cfg.use_target, processes=machine.world, dtype=machine.dtype)
    out = cfg.out or (os.path.dirname(cfg.ckpt) if cfg.ckpt != "scratch" else "out/scratch")
    make_folder(out)
    text = json.dumps(report)
    for name, value in scores.items():
        print(f"{name:>6}  {value:.2f}%" if isinstance(value, float) else f"{name:>6}  {value}")
    save_file(os.path.join(out, cfg.bench + "_target" * cfg.use_target + ".json"),
              lambda f: f.write(text.encode()))
    print(text)


if __name__ == "__main__":
    run(main)
