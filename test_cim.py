"""test_cim.py: the lab book. Each test is one claim, checked against an oracle.

In lecture order: 1. crops (paper 3.2, Figure 3, Table 1); 2. images; 3. the model (Figure 2,
Eqs. 2-7); 4. ablations (Tables 1 to 4, Figure 4); 5. training (Table 9); 6. honesty: does it learn
what it says; 7. transfer (Tables 10, 11); 8. evaluation (Table 8); 9. segmentation (Table 7);
10. survival; 11. files and bad input; 12. compilation and GPUs, skipped where there is no CUDA.
Nothing is downloaded. `pytest -k map` runs the tests with "map" in their name; `pytest -m soak` the
one that takes long.
"""

import argparse
import collections
import dataclasses
import errno
import glob
import json
import math
import operator
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import crop
import evaluate
import finetune
import model
import pretrain
from crop import InputError

HERE = os.path.dirname(os.path.abspath(__file__))
README = "\n".join(open(path).read() for path in (
    os.path.join(HERE, "README.md"), *sorted(glob.glob(os.path.join(HERE, "docs", "*.md")))))
CPU = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
PLAIN = ["--device=cpu", "--dtype=float32", "--workers=0"]
TINY = ["--preset=demo", *PLAIN, "--batch_size=8", "--log_every=1", "--eval_every=1000"]
load = partial(torch.load, weights_only=True)
pretrain.HELD_OUT = 32  # images are enough to measure on here


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def config(*flags, script=pretrain):
    """The Config of pretrain.py, finetune.py or evaluate.py for these flags."""
    presets = getattr(script, "PRESETS", getattr(script, "RECIPES", {}))
    return pretrain.parse_config(script.Config, presets, flags)


def raises(error, *_):
    """partial(raises, ERROR) stands for a function that fails."""
    raise error


def save_images(folder, count, size=(70, 60), ext=".jpg", seed=0):
    """Small smooth pictures, different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.BICUBIC).save(folder / f"{i:03d}{ext}")


def samples(source, count, size, seed=0, **crops):
    """The data set of contexts of the first images of a source."""
    cut = partial(crop.cut_context, size=size, **crops)
    return crop.Samples(source, list(range(count)), seed, cut)


def first_images(source, count, size):
    """Contexts of the first images of a source: uint8 [count, 3, size, size]."""
    dataset = samples(source, count, size)
    return crop.collate([dataset[0, i] for i in range(count)])[0]


def command(*words, **env):
    """Run python as a user would, on one thread."""
    return subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def torchrun(*words):
    """Run a script on two processes; it must succeed. -> the last line of its output."""
    result = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def read_log(out):
    """The rows of log.jsonl, without what the clock says."""
    with open(os.path.join(out, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        del row["images_per_s"], row["data_wait"]
    return rows


def demo(out, *flags):
    """Pre-train in this process; -> the rows of the log."""
    pretrain.main([*TINY, f"--out={out}", *flags])
    return read_log(out)


def tune(out, data, *flags):
    """Fine-tune a small ViT from scratch in this process; -> the rows of the log."""
    finetune.main(["--recipe=demo", *PLAIN, "--log_every=1", "--image_size=32", "--test_size=32",
                   "--batch_size=8", "--init=scratch", f"--data={data}", f"--out={out}", *flags])
    return read_log(out)


def score(out, *flags):
    """Run evaluate.py in this process; -> its JSON."""
    evaluate.main([*PLAIN, f"--out={out}", *flags])
    return json.load(open(max(out.glob("*.json"), key=os.path.getmtime)))


@pytest.fixture(scope="module")
def classes3(tmp_path_factory):
    """Three classes, of each 8 pictures to train on and 23 to validate on: batches of 64 and 5."""
    root = tmp_path_factory.mktemp("classes3")
    for k, name in enumerate(["ant", "bee", "cat"]):
        save_images(root / "train" / name, 8, seed=k)
        save_images(root / "val" / name, 23, seed=10 + k)
    return root


def recipe(name, *flags):
    return config(f"--recipe={name}", *flags, script=finetune)


def process(rank, world):
    """The Machine of one of several processes, each of which runs here alone: nothing is summed."""
    machine = dataclasses.replace(CPU, rank=rank, world=world)
    machine.sum = machine.share_buffers = lambda *values: None
    machine.max = lambda number: number
    return machine


def save_classifier(path, classes, name="vit_d8", seed=0):
    """A model.pt of an untrained classifier that has opinions; -> the model."""
    torch.manual_seed(seed)
    net = model.Classifier(name, len(classes)).eval()
    nn.init.normal_(net.head.weight)
    cfg = recipe("demo", f"--model={name}", "--test_size=32")
    finetune.save_model(str(path), net, cfg, classes, dict(top1=50.0))
    return net


def predictions(net, folder, names, cut=partial(crop.cut_centre, size=32), among=None):
    """By a plain loop over the images of a folder: how often the best of `among` is the class."""
    hits = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image, torch.no_grad():
            logits = net(crop.normalize(cut(image, None)[None].float() / 255))[0]
        best = max(among or names, key=lambda name: logits[names.index(name)])
        hits.append(best == path.parent.name)
    return 100 * np.mean(hits)


# ------------------------------------------------------------------------------------- 1. crops

LIKE_AREAS = (0.05, 0.235)  # of the README's rows of Tables 1b and 1c
TABLE_1 = [  # scale, ratio, rotation: every row of Table 1 a-c, and of b and c with areas up to 1
    *[(s, (1, 1), 0) for s in [(0.16, 0.16), (0.05, 0.16), (0.16, 1.0), (0.05, 1.0)]],
    *[(LIKE_AREAS, (1 / q, q), 0) for q in (1, 4 / 3, 2, 3, 4)],
    *[(LIKE_AREAS, (1 / 3, 3), r) for r in (45, 90, 135, 180)],
    *[((0.05, 1.0), (1 / q, q), 0) for q in (4 / 3, 2, 3, 4)],
    *[((0.05, 1.0), (1 / 3, 3), r) for r in (45, 90, 135, 180)],
    ((0.05, 1.0), (1 / 4, 4), 180),
]


def place(boxes, x, y):
    """Where the point (x, y) of an exemplar, both in [-1, 1], lies in the context [..., 2], in
    fractions of its side: mirrored, stretched, rotated, moved."""
    cx, cy, w, h, angle, flip = boxes.unbind(-1)
    along, down = flip * x * w / 2, y * h / 2
    return torch.stack([cx + along * angle.cos() - down * angle.sin(),
                        cy + along * angle.sin() + down * angle.cos()], -1)


@pytest.mark.parametrize("scale, ratio, rotation", TABLE_1)
def test_boxes_have_the_area_aspect_and_angle_they_were_drawn_with(scale, ratio, rotation):
    """Figure 3: w h = r0, h / w = r1 and alpha hold exactly, and no box leaves the context. The
    largest r0 is that of a box grown in the middle until it sticks out."""
    def corners(boxes):
        square = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        return torch.cat([place(boxes, x, y) for x, y in square], 1)

    u = rand(2000, 6)
    boxes = crop.sample_boxes(u, scale, ratio, rotation)
    cx, cy, w, h, angle, flip = boxes.unbind(-1)
    r1 = ratio[0] * (ratio[1] / ratio[0]) ** u[:, 1]
    torch.testing.assert_close(h / w, r1)
    torch.testing.assert_close(angle, math.radians(rotation) * (2 * u[:, 2] - 1))
    assert (corners(boxes) >= -1e-12).all() and (corners(boxes) <= 1 + 1e-12).all()
    assert torch.equal(flip, torch.where(u[:, 5] < 0.5, -1.0, 1.0).double())
    low, high, middle = (torch.full_like(w, x) for x in (0, 4, 0.5))
    for _ in range(60):  # bisection
        area = (low + high) / 2
        grown = [middle, middle, (area / r1).sqrt(), (area * r1).sqrt(), angle, flip]
        at = corners(torch.stack(grown, -1))
        inside = ((at >= 0) & (at <= 1)).all(1)
        low, high = torch.where(inside, area, low), torch.where(inside, high, area)
    largest = low.clamp(max=scale[1])
    torch.testing.assert_close(w * h, scale[0] + (largest - scale[0]) * u[:, 0])
    assert scale != LIKE_AREAS or (largest == scale[1]).all()  # the same areas in each row


@pytest.mark.parametrize("ratio, rotation, largest", [
    ((1 / 3, 3), 180, 0.300), ((1 / 4, 4), 45, 4 / 17), ((1, 1), 90, 0.5), ((1, 1), 0, 1.0),
    ((0.5, 1), 0, 0.5), ((1 / 3, 3), 5, 1 / (math.sqrt(3) * math.cos(math.pi / 36)
                                             + math.sin(math.pi / 36) / math.sqrt(3)) ** 2)])
def test_a_lower_area_that_cannot_fit_is_refused(ratio, rotation, largest):
    """At ratio q the worst angle leaves an area of q / (1 + q^2), and a smaller rotation leaves
    more. A range of areas that starts above it is an error."""
    assert crop.largest_area(ratio, rotation) == pytest.approx(largest)
    crop.sample_boxes(rand(6), (largest - 1e-6, 1), ratio, rotation)
    with pytest.raises(InputError):
        crop.sample_boxes(rand(6), (largest + 1e-3, 1), ratio, rotation)


@pytest.mark.parametrize("m, n", [(160, 64), (64, 32), (48, 48)])
def test_an_exemplar_shows_the_place_its_box_says(m, n):
    """A context that encodes its own coordinates gives exemplars whose values are the positions
    of their pixels in the mirrored, stretched, rotated box."""
    boxes = crop.sample_boxes(rand(12, 6), rotation=180.0)
    at, to = ((torch.arange(k).double() * 2 + 1) / k - 1 for k in (m, n))
    context = torch.stack([at.expand(m, m), at[:, None].expand(m, m), torch.zeros(m, m)])[None]
    shown = crop.crop_exemplars(context, crop.affine_from_boxes(boxes)[None], n)[0, :, :2]
    expected = 2 * place(boxes[:, None, None], to, to[:, None]).movedim(-1, 1) - 1
    pixel = 2 / m
    assert (shown - expected).abs().max() < pixel / 2  # half a pixel at most, at the very border
    inside = expected.abs().amax(1, keepdim=True).expand_as(shown) < 1 - 3 * pixel
    assert inside.any() and (shown - expected)[inside].abs().max() < 1e-6 * pixel


@pytest.mark.parametrize("scale, ratio, rotation", TABLE_1)
def test_the_map_covers_exactly_the_box_that_was_cut(scale, ratio, rotation):
    """Figure 3: a map is 1 where the pixel's centre lies in the rotated rectangle, else 0; the
    float32 raster equals a float64 point-in-rectangle test of every pixel centre."""
    boxes = crop.sample_boxes(rand(200, 6, dtype=torch.float32), scale, ratio, rotation)
    size = 40
    maps = crop.rasterize_maps(crop.affine_from_boxes(boxes).view(20, 10, 2, 3), size).flatten(0, 1)
    assert maps.unique().tolist() == [0.0, 1.0]
    cx, cy, w, h, angle, _ = boxes.double()[:, None, None].unbind(-1)
    at = (torch.arange(size).double() + 0.5) / size
    dx, dy = at - cx, at[:, None] - cy
    along = (dx * angle.cos() + dy * angle.sin()).abs()
    across = (dy * angle.cos() - dx * angle.sin()).abs()
    clear = torch.minimum((along - w / 2).abs(), (across - h / 2).abs()) > 1e-6
    assert clear.float().mean() > 0.999  # centres nearer to an edge may round either way
    assert (maps.bool() == ((along <= w / 2) & (across <= h / 2)))[clear].all()


@pytest.mark.parametrize("m, n", [(160, 64), (64, 32)])
def test_shrinking_a_large_box_does_not_alias(m, n):
    """Large turned boxes of white noise, the worst picture for aliasing, come within 8% (of the
    noise's deviation) of exact area averaging; one bilinear sample a pixel is off by over 20%."""
    noise = rand(3, 3, m, m) - 0.5
    boxes = torch.tensor([[0.5, 0.5, 0.7, 0.8, 0.35, 1], [0.5, 0.5, 0.95, 0.95, 0.03, -1],
                          [0.5, 0.5, 0.6, 0.9, -0.2, 1]]).double()
    theta = crop.affine_from_boxes(boxes).expand(3, 3, 2, 3)

    def average(k, s, mode):  # s * s samples a pixel; 16 * 16 of the nearest pixel are exact enough
        grid = F.affine_grid(theta[:, k], [3, 3, n * s, n * s], align_corners=False)
        return F.avg_pool2d(F.grid_sample(noise, grid, mode, "border", align_corners=False), s)

    ours = crop.crop_exemplars(noise, theta, n)
    for k in range(3):
        exact = average(k, 16, "nearest")
        assert (ours[:, k] - exact).std() < 0.08 * noise.std()
        assert (average(k, 1, "bilinear") - exact).std() > 0.2 * noise.std()


def test_each_transformation_equals_torchvisions():
    """Table 1d: jitter, gray, blur and solarise equal torchvision's functions called one image at
    a time with the same numbers, and one of probability p touches a share p of the exemplars. The
    blur's sigma of 0.1 to 2 pixels is for exemplars of 64, half of it for exemplars of 32."""
    off = dict(jitter=0, gray=0, blur=0, solarize=0)
    x, u = rand(5, 3, 24, 24, seed=1).float(), rand(5, 9, seed=2).float()
    got = {name: crop.transform(x, u, **off | {name: 1}) for name in off}
    for i, (_, b, c, s, h, _, _, sigma, _) in enumerate(u.tolist()):
        y = TF.adjust_brightness(x[i], 0.6 + 0.8 * b)
        y = TF.adjust_contrast(y, 0.6 + 0.8 * c)
        y = TF.adjust_saturation(y, 0.8 + 0.4 * s)
        y = TF.adjust_hue(y, 0.2 * h - 0.1)
        torch.testing.assert_close(got["jitter"][i], y, atol=2e-3, rtol=0)  # theirs: 0.2989 red
        y = TF.gaussian_blur(x[i], 17, 0.1 + 1.9 * sigma)[:, 8:-8, 8:-8]
        torch.testing.assert_close(got["blur"][i, :, 8:-8, 8:-8], y, atol=1e-4, rtol=0)
        y = TF.gaussian_blur(x[i], 17, 0.05 + 0.95 * sigma)[:, 8:-8, 8:-8]
        half = crop.transform(x, u, **off | {"blur": 1}, exemplar_size=32)
        torch.testing.assert_close(half[i, :, 8:-8, 8:-8], y, atol=1e-4, rtol=0)
    torch.testing.assert_close(got["gray"], TF.rgb_to_grayscale(x, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(got["solarize"], TF.solarize(x, 0.5))
    assert crop.transform(x, u, **off) is x
    x, u = rand(400, 3, 4, 4).float(), rand(400, 9, seed=3).float()
    for name, p in dict(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2).items():
        touched = (crop.transform(x, u, **off | {name: p}) != x).flatten(1).any(1).float().mean()
        assert abs(touched - p) < 0.07, name


@pytest.mark.parametrize("where", ["exemplar", "context", "both", "none"])
def test_transformations_go_where_table_1d_says(where):
    """The context, the exemplars, both or neither are recoloured. Maps and boxes never change, and
    exemplars are cut before the context is recoloured."""
    context, u = (rand(3, 3, 32, 32) * 255).byte(), rand(3, 5, crop.UNIFORMS, dtype=torch.float32)
    u[..., 6:] = 0  # all probabilities hit
    u[:, 0, 6:] = 1  # but none of the first exemplar's: the context has its own row, the last
    plain = crop.make_pairs(context, u, 16, transforms="none")
    got = crop.make_pairs(context, u, 16, transforms=where)
    same = [torch.equal(a, b) for a, b in zip(got, plain)]  # context, exemplars, maps, boxes
    assert same == [where in ("exemplar", "none"), where in ("context", "none"), True, True]


# ------------------------------------------------------------------------------------ 2. images

def test_shapes_are_a_function_of_the_index_and_splits_are_disjoint():
    """Scene i is always the same; no scene of train is in val; labels cover the classes evenly."""
    train, again, val = (crop.Shapes(split) for split in ("train", "train", "val"))
    a, b, c = ([x.open(i).tobytes() for i in range(60)] for x in (train, again, val))
    assert a == b and len(set(a)) == 60 and not set(a) & set(c)
    assert val.labels == 100 * [*range(8)] and train.labels[:81] == 10 * [*range(8)] + [-1]


def test_a_folder_is_read_at_any_depth_through_links_that_may_loop(tmp_path):
    """Extensions count in any case, names that begin with a dot do not; classes are the first
    level, or the first words of a list. Each real folder is read once. A file is opened as one of
    the listed formats or not at all, whatever its name."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    save_images(root / "b" / "deep" / "er", 2, ext=".JPG")
    save_images(root / "a", 1, ext=".png")
    save_images(root / ".hidden", 1)
    save_images(elsewhere, 1)
    for link, end in ("c", elsewhere), ("d", elsewhere), ("b/loop", root), ("a/b", root / "b"):
        (root / link).symlink_to(end)  # images of a/b stay in class b
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / "._000.png").write_text("no image")
    (tmp_path / "list").write_text("c one, two\n\na\nc\n")
    images = crop.Folder(str(root))
    some = crop.Folder(str(root), crop.read_classes(tmp_path / "list"))
    paths = ["a/000.png", "b/deep/er/000.JPG", "b/deep/er/001.JPG", "c/000.jpg"]
    assert images.paths.tolist() == [os.fsencode(root / path) for path in paths]
    assert images.classes == ["a", "b", "c"] and images.labels.tolist() == [0, 1, 1, 2]
    assert some.paths.tolist() == [*images.paths[[0, 3]]] and some.labels.tolist() == [1, 0]
    Image.new("RGB", (9, 9)).save(tmp_path / "eps.jpg", "EPS")
    with pytest.raises(OSError):  # Pillow would start Ghostscript to load it
        crop.open_image(tmp_path / "eps.jpg")


@pytest.mark.parametrize("layout", ["train+val", "train", "flat"])
def test_what_is_held_out_is_never_trained_on(tmp_path, layout):
    """With train/ and val/, val is held out; else a seeded slice, the same one every time."""
    for part in layout.split("+"):
        save_images(tmp_path / part, 5 if part == "val" else 60)
    (train, rows), (val, held), _ = crop.train_and_val(str(tmp_path), seed=1)
    names, out = {train.paths[i] for i in rows}, {val.paths[i] for i in held}
    assert not names & out
    assert (crop.train_and_val(str(tmp_path), seed=1)[1][1] == held).all()
    assert (len(names), len(out)) == ((60, 5) if layout == "train+val" else (45, 15))


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    """A file of any kind and format gives the colour that Pillow shows, and one of 16 bits the gray
    that it means. One pixel is high enough."""
    for mode, colour, ext in [
            ("LA", (128, 255), "png"), ("RGBA", (9, 99, 9, 0), "webp"), ("P", 7, "gif"),
            ("1", 1, "bmp"), ("CMYK", (0, 128, 200, 30), "jpg"), ("I;16", 128 * 257, "png")]:
        Image.new(mode, (500, 1), colour).save(tmp_path / f"x.{ext}")
        image = crop.open_image(tmp_path / f"x.{ext}")
        shown = image.convert("RGB").getpixel((0, 0)) if mode != "I;16" else (128, 128, 128)
        got = crop.cut_context(image, np.random.default_rng(0), 16)
        assert (got.int() - torch.tensor(shown).view(3, 1, 1)).abs().max() <= 2
    with pytest.raises(ValueError, match="floating-point"):  # of an unknown range
        crop.to_rgb(Image.new("F", (4, 4)))


def test_a_context_is_a_random_resized_crop(tmp_path):
    """cut_context equals torchvision's resized_crop of draw_crop's box, and Pillow's to a level or
    two. The box covers half of the photo or more, or is its middle. A large JPEG decoded at a
    fraction of its size (draft) shows the same."""
    picture = crop.to_image((rand(3, 6, 8) * 255).byte()).resize((80, 60))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        got = crop.cut_context(picture, np.random.default_rng(seed), 32)
        left, top, w, h = map(round, crop.draw_crop(rng, 80, 60))
        got = got.flip(-1) if rng.random() < 0.5 else got
        exact, pillow = (TF.resized_crop(x, top, left, h, w, (32, 32), TF.InterpolationMode.BICUBIC)
                         for x in (crop.to_tensor(picture), picture))
        assert torch.equal(got, exact)
        assert (got.int() - TF.pil_to_tensor(pillow).int()).abs().max() <= 2
    boxes = np.array([crop.draw_crop(np.random.default_rng(i), 300, 200) for i in range(2000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= (300, 200)).all()
    assert 0.5 <= (boxes[:, 2] * boxes[:, 3]).min() / 60000 < 0.51
    assert crop.draw_crop(rng, 500, 1) == pytest.approx(((500 - 4 / 3) / 2, 0, 4 / 3, 1))
    save_images(tmp_path, 1, size=(800, 600))
    photo = Image.open(tmp_path / "000.jpg")
    fast, slow = (crop.cut_context(image, np.random.default_rng(1), 64).float()
                  for image in (photo, Image.open(photo.filename).copy()))
    assert photo.width < 800 and (fast - slow).abs().mean() < 2


@pytest.mark.parametrize("ext, tolerance", [("jpg", 6), ("png", 0), ("webp", 0), ("tif", 0)])
def test_a_photo_that_is_stored_turned_is_cut_like_the_upright_one(ext, tolerance, tmp_path):
    """Each of EXIF's eight orientations, in each format that has them. One that is damaged, no
    number or beyond 8 is none."""
    picture = crop.to_image((rand(3, 6, 8) * 255).byte()).resize((80, 60), Image.BICUBIC)
    stored = [None, Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM,
              Image.TRANSPOSE, Image.ROTATE_90, Image.TRANSVERSE, Image.ROTATE_270]
    entry = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"  # a table with the orientation alone
    cases = [(entry + b"\x03\0\x01\0\0\0%c\0\0\0" % k, turn) for k, turn in enumerate(stored, 1)]
    cases += [(entry + b"\x03\0\x01\0\0\0\x09\0\0\0", None), (b"Exif\0\0damaged", None),
              (entry + b"\x02\0\x02\0\0\0" b"6\0\0\0", None)]
    for seed, (exif, turn) in enumerate(cases):
        image = picture if turn is None else picture.transpose(turn)
        if ext == "tif" and seed < 8:  # Pillow writes tags there, and takes no bytes
            exif = Image.Exif()
            exif[0x0112] = seed + 1
        elif ext == "tif":
            continue
        image.save(tmp_path / f"x.{ext}", exif=exif, quality=100, subsampling=0, lossless=True)
        got, expected = (crop.cut_context(x, np.random.default_rng(seed), 32).int()
                         for x in (crop.open_image(tmp_path / f"x.{ext}"), picture))
        assert (got - expected).abs().max() <= tolerance, seed


def test_the_images_of_a_step_do_not_depend_on_the_machine():
    """Any number of workers, processes and micro-batches sees the same contexts in the same order,
    from any step on; another seed sees others. An epoch is a permutation of the images, each time
    another one with other crops; its incomplete batch is dropped."""
    def loaded(world=1, rank=0, workers=0, micro=8, seed=0, steps=range(3, 7)):
        cfg = config(*TINY, f"--micro_batch={micro}", f"--seed={seed}")
        machine = dataclasses.replace(CPU, rank=rank, world=world)
        batches = pretrain.micro_batches(cfg, pretrain.make_plan(cfg, machine, 20), rank, steps)
        dataset = samples(crop.Shapes("val"), 20, 32, seed)
        return torch.cat([x for x, _ in pretrain.make_loader(dataset, batches, workers, machine)])

    whole = loaded()
    assert len(whole) == 32 and torch.equal(whole[16:], loaded(steps=range(5, 7)))
    assert torch.equal(whole, loaded(workers=2)) and torch.equal(whole, loaded(micro=2))
    halves = torch.stack([loaded(world=2, rank=r, micro=4).unflatten(0, (4, 4)) for r in (0, 1)], 1)
    assert torch.equal(whole, halves.flatten(0, 2))
    assert not torch.equal(whole, loaded(seed=1))
    cfg = config(*TINY)
    batches = pretrain.micro_batches(cfg, pretrain.make_plan(cfg, CPU, 20), 0, range(6))
    epochs, numbers = zip(*(key for batch in batches for key in batch))
    assert epochs == (0,) * 16 + (1,) * 16 + (2,) * 16
    assert len(set(zip(epochs, numbers))) == 48 and numbers[:16] != numbers[16:32]
    first, second = (samples(crop.Shapes("val"), 1, 32)[epoch, 0][0] for epoch in (0, 1))
    assert not torch.equal(first, second)


# --------------------------------------------------------------------------------- 3. the model

def tiny_cim(encoder="vit_d8", width=32):
    """-> a CIM for the smallest images, its (context, exemplars, maps)."""
    torch.manual_seed(0)
    n = 2 * (model.ENCODERS[encoder][2] if model.ENCODERS[encoder] else 32)
    pairs = torch.randn(2, 3, 2 * n, 2 * n), torch.randn(2, 3, 3, n, n)
    maps = (torch.rand(2, 3, 2 * n, 2 * n) > 0.7).float()
    return model.CIM(encoder, 2 * n, width), (*pairs, maps)


@pytest.mark.parametrize("n, m", [(17, 17), (101, 101), (100, 17), (9, 300)])
def test_attention_in_bfloat16_is_exact_to_its_rounding(n, m):
    """attend in bf16 on a CPU, written out for few tokens, equals float32's attention to 1% in
    norm, forward and backward (bf16 rounds to 0.4%); otherwise it is PyTorch's own."""
    exact = [torch.randn(2, 3, k, 64) for k in (n, m, m, n)]

    def gradients(attention, dtype):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in exact[:3])
        out = attention(q, k, v)
        out.backward(exact[3].to(dtype))
        return [x.detach().float() for x in (out, q.grad, k.grad, v.grad)]

    torchs = F.scaled_dot_product_attention
    truth, ours = gradients(torchs, torch.float32), gradients(model.attend, torch.bfloat16)
    assert all(map(torch.equal, truth, gradients(model.attend, torch.float32)))
    assert all(map(torch.equal, ours, gradients(torchs, torch.bfloat16))) == (m > 256)
    for got, expected in zip(ours, truth):
        assert 0 < (got - expected).norm() / expected.norm() < 0.01


def test_vit_equals_torchvisions():
    """ViT-B/16 with torchvision's vit_b_16 weights gives its tokens, cls first; keys are timm's."""
    theirs, ours = torchvision.models.vit_b_16(weights=None).eval(), model.build_encoder("vit_b16")
    nn.init.normal_(theirs.class_token)
    names = {"class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.": "",
             "pos_embedding": "pos_embed", "layers.encoder_layer_": "blocks.", "ln_1": "norm1",
             "ln_2": "norm2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "ln.": "norm.",
             "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj"}
    state, x = theirs.state_dict(), torch.randn(1, 3, 224, 224)
    for a, b in names.items():
        state = {k.replace(a, b): v for k, v in state.items() if not k.startswith("heads.")}
    ours.load_state_dict(state)  # strict: every timm key is there and no other
    with torch.no_grad():
        expected = theirs.encoder(torch.cat([theirs.class_token, theirs._process_input(x)], 1))
        torch.testing.assert_close(ours(x), expected, atol=2e-4, rtol=1e-4)


def test_resnet50_equals_torchvisions():
    """ResNet-50 with torchvision's weights gives its last feature map, row by row, in training and
    in evaluation, and updates its BatchNorm statistics in the same way."""
    theirs = torchvision.models.resnet50(weights=None).double()  # another memory layout rounds
    ours, x = model.build_encoder("resnet50").double(), torch.randn(2, 3, 96, 64).double()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    body = nn.Sequential(*list(theirs.children())[:-2])
    for mode in (True, False):
        expected = body.train(mode)(x)  # [2, 2048, 3, 2]
        torch.testing.assert_close(ours.train(mode)(x), expected.permute(0, 2, 3, 1).flatten(1, 2),
                                   atol=1e-9, rtol=1e-9)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], atol=1e-9, rtol=1e-9)


def test_encoders_have_the_published_sizes():
    """The parameter counts of timm and torchvision, without the classifier."""
    for name, count in dict(vit_t16=5_524_416, vit_s16=21_665_664, vit_b16=85_798_656,
                            vit_l16=303_301_632, resnet50=23_508_032).items():
        with torch.device("meta"):
            encoder = model.build_encoder(name)
        assert sum(p.numel() for p in encoder.parameters()) == count


def test_positions_are_the_fixed_sincos_of_row_and_column():
    """The table at (row, column) holds sin and cos of the column, then of the row. Resized to
    another grid, rows and columns are not exchanged; at its own size it is unchanged."""
    table = model.sincos_positions(14, 64)
    for row, column in [(0, 0), (3, 11), (13, 2)]:
        expected = torch.tensor([f(at / 10000 ** (k / 16)) for at in (column, row)
                                 for f in (math.sin, math.cos) for k in range(16)])
        torch.testing.assert_close(table[row * 14 + column], expected, atol=1e-6, rtol=0)
    assert torch.equal(model.resize_positions(table[None], 14, 14)[0], table)
    grid = table.view(14, 14, 64).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(4, 10), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(model.resize_positions(table[None], 4, 10)[0], expected)


def test_cross_attention_equals_multihead_attention():
    """Eqs. 4 and 5: nn.MultiheadAttention of q = f_c(h_c) + PE without a projection after the
    heads, then h = q + a + MLP(LN(q + a)), in every layer of the decoder."""
    torch.manual_seed(0)
    layer = model.CorrelationLayer(48, 40, 64)
    h_c, h_z, positions = torch.randn(2, 1, 9, 48), torch.randn(2, 5, 7, 40), torch.randn(9, 64)
    oracle = nn.MultiheadAttention(64, 2, kdim=40, vdim=40, batch_first=True)
    oracle.load_state_dict({
        "q_proj_weight": torch.eye(64), "k_proj_weight": layer.f_k.weight,
        "v_proj_weight": layer.f_v.weight, "out_proj.weight": torch.eye(64),
        "out_proj.bias": torch.zeros(64),
        "in_proj_bias": torch.cat([torch.zeros(64), layer.f_k.bias, layer.f_v.bias])})
    got, q = layer(h_c, h_z, positions), layer.f_c(h_c[:, 0]) + positions
    for k in range(5):
        a, _ = oracle(q, h_z[:, k], h_z[:, k])
        torch.testing.assert_close(got[:, k], q + a + layer.mlp(layer.norm(q + a)))
    decoder = model.CorrelationDecoder(40, 3, 64, 2, "cross_attention", "linear")
    h_c, (first, second) = torch.randn(2, 9, 40), decoder.layers
    h = second(first(h_c[:, None], h_z, decoder.positions), h_z, decoder.positions)
    expected = model.upsample(decoder.predictor(h).view(2, 5, 3, 3), 12)
    torch.testing.assert_close(decoder(h_c, h_z, 12), expected)


@pytest.mark.parametrize("encoder, width", [("vit_d8", 32), ("vit_s16", 512), ("resnet50", 512)])
def test_the_loss_is_equation_7_and_starts_at_ln_2(encoder, width):
    """Binary cross-entropy, the mean over pixels, exemplars and images, in float64. An untrained
    model says 0.5 everywhere (design 3): ln 2 within 2%."""
    cim, pairs = tiny_cim(encoder, width)
    with torch.no_grad():
        assert cim(*pairs)[0].item() == pytest.approx(math.log(2), rel=0.02)
        nn.init.normal_(cim.decoder.predictor.weight, std=0.3)
        loss, logits = cim(*pairs)
    y, p = pairs[2].double(), logits.double().sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss > 0.75


def test_the_target_is_the_moving_average_of_everything():
    """Eq. 3 in closed form: after n updates the target is tau^n of its start and 1 - tau^n of a
    constant online network, BatchNorm included; counters are copied; tau 1 changes nothing."""
    cim, _ = tiny_cim("resnet50")
    for t in cim.online.state_dict().values():
        t.copy_(torch.randn_like(t) if t.is_floating_point() else torch.full_like(t, 7))
    start = {k: v.clone() for k, v in cim.target.state_dict().items()}
    for tau in (0.9, 0.9, 0.9, 0.9, 0.9, 1.0):
        cim.update_target(tau)
    for key, online in cim.online.state_dict().items():
        share = 1 - 0.9**5 if online.is_floating_point() else 1
        expected = ((1 - share) * start[key] + share * online).to(online)
        torch.testing.assert_close(cim.target.state_dict()[key], expected, atol=1e-6, rtol=1e-5)


def test_batchnorm_keeps_contexts_and_exemplars_apart():
    """In training BatchNorm normalises each side by itself and remembers its statistics, the
    target's too (design 3), and where one set of weights sees both sides: Table 2, shared, and the
    trackers. There `online`, which is what encoder.pt holds, has the statistics of contexts."""
    context, exemplars, _ = tiny_cim("resnet50")[1]
    for cim in (model.CIM("resnet50", 128, 32), model.Tracking("siamfc", "resnet50", 128),
                model.CIM("resnet50", 128, 32, bootstrap="shared")):
        shared = all(map(operator.is_, cim.online.parameters(), cim.target.parameters()))
        assert shared == (cim.bootstrap == "shared")
        f_c, f_z = (cim.online, cim.target) if shared else (cim.target, cim.online)
        cim.encode(context, exemplars)
        cim.update_target(0.5 if shared else 1.0)
        for encoder, images in (f_c, context), (f_z, exemplars.flatten(0, 1)):
            mean = cim.online.conv1(images).mean((0, 2, 3))
            torch.testing.assert_close(encoder.bn1.running_mean, 0.1 * mean)


# -------------------------------------------------------------------------------- 4. ablations

ROWS = dict(re.findall(r"^\| (\w+) \| `(--[^`]*)`", README, re.M))  # of Tables 1-4 and Figure 4


def test_the_readme_has_every_ablation():
    """Tables 1 to 4 and Figure 4: each value that the paper compares is a row of the README."""
    rows = [config(*flags.split()) for flags in ROWS.values()]
    crops = [np.hstack([c.scale, c.ratio, c.rotation]) for c in rows]
    assert all(any(np.allclose(np.hstack(row), c) for c in crops) for row in TABLE_1[:13])
    for name, values in dict(
            transforms=["exemplar", "context", "both", "none"], bootstrap=model.BOOTSTRAPS,
            correlation=model.CORRELATIONS, predictor=model.PREDICTORS, loss=model.LOSSES,
            decoder=["cim", *model.TRACKERS], decoder_depth=[1, 2, 4],
            decoder_width=[256, 512, 1024], freeze_patch_embed=[True, False]).items():
        assert {getattr(c, name) for c in rows} == set(values), name


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_ablations_trains(name):
    """Two steps lower the loss of their batch. Gradients reach what should learn and nothing else.
    Each exemplar has the map that it has alone, and the loss is the mean over contexts."""
    cfg = config("--model=vit_d8", "--context_size=32", "--exemplar_size=16", *ROWS[name].split())
    contexts = first_images(crop.Shapes("train"), 4, cfg.context_size)
    pairs = pretrain.make_pairs(contexts, pretrain.uniforms(cfg, (4, 0), 4), cfg)[:3]
    cim, optimizer = pretrain.build(cfg, CPU)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    assert type(cim.decoder) is {"cim": model.CorrelationDecoder, **model.TRACKERS}[cfg.decoder]
    if cfg.decoder == "cim":  # it is what the flags say
        layers = cim.decoder.layers
        assert cim.bootstrap == cfg.bootstrap and cim.loss is model.LOSSES[cfg.loss]
        assert (layers[0].f_v is None) == (cfg.correlation == "convolution")
        assert isinstance(cim.decoder.predictor, nn.Sequential) == (cfg.predictor == "deconv")
        assert (len(layers), layers[0].f_c.out_features) == (cfg.decoder_depth, cfg.decoder_width)
    loss, logits = cim(*pairs)
    alone = [cim(*(x[b:b + 1] for x in pairs)) for b in range(4)]
    torch.testing.assert_close(sum(loss for loss, _ in alone) / 4, loss, atol=1e-5, rtol=1e-5)
    scale = (logits - logits.roll(1, 1)).abs().max()  # by how much maps differ
    first = cim(pairs[0], *(x[:, :1] for x in pairs[1:]))[1]
    for got, expected in (torch.cat([y for _, y in alone]), logits), (first, logits[:, :1]):
        assert (got - expected).abs().max() < min(1e-4, 1e-2 * scale)
    loss.backward()
    for key, p in cim.named_parameters():
        fixed = key.startswith("target.") or "pos" in key or (
            "patch_embed" in key and cfg.freeze_patch_embed)
        no_effect = key.endswith("f_k.bias") and cfg.correlation == "cross_attention"
        assert p.requires_grad != fixed and (p.grad is None) == fixed, key
        assert fixed or no_effect or p.grad.abs().max() > 1e-9, key
    optimizer.step()
    optimizer.zero_grad()
    cim.update_target(0.99)
    cim(*pairs)[0].backward()
    optimizer.step()
    assert cim(*pairs)[0] < loss


@pytest.mark.parametrize("bootstrap, f_z, f_c", [*zip(
    model.BOOTSTRAPS, ("online", "target", "online"), ("target", "online", "online"))])
def test_bootstrap_says_which_network_sees_what(bootstrap, f_z, f_c):
    """Table 2: which network sees what. Only what the online one saw carries a gradient."""
    cim = model.CIM("vit_d8", 32, 32, bootstrap=bootstrap)
    nn.init.normal_(cim.target.cls_token)
    context, exemplars = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 3, 16, 16)
    h_c, h_z = cim.encode(context, exemplars)
    torch.testing.assert_close(h_c, getattr(cim, f_c)(context)[:, 1:])
    torch.testing.assert_close(h_z[:, 1], getattr(cim, f_z)(exemplars[:, 1]))
    assert (h_c.requires_grad, h_z.requires_grad) == (f_c == "online", f_z == "online")
    before = cim.online.cls_token.clone()
    cim.update_target(0.5)
    assert torch.equal(cim.online.cls_token, before)


def test_the_losses_of_table_3_equal_the_formulas():
    """Cross-entropy, HED's balanced cross-entropy, squared error, and focal loss with gamma 2 and
    alpha 0.25."""
    x, y = 4 * rand(2, 3, 5, 5) - 2, (rand(2, 3, 5, 5, seed=1) > 0.7).double()
    y[0, 0] = 0
    p, inside = 1 / (1 + (-x).exp()), y.sum((2, 3), keepdim=True) / 25
    right = y * p + (1 - y) * (1 - p)  # the probability of what is true
    formulas = {"ce": -right.log(), "mse": (p - y) ** 2,
                "balanced": -(y * (1 - inside) + (1 - y) * inside) * right.log(),
                "focal": -(0.25 * y + 0.75 * (1 - y)) * (1 - right) ** 2 * right.log()}
    for name, loss in model.LOSSES.items():
        torch.testing.assert_close(loss(x, y), formulas[name].mean())


def correlate(x, kernel):
    """x [C, g, g] and kernel [C, n, n] -> [g, g]; x is 0 outside; even n: mean of 4 placements."""
    n = kernel.shape[-1]
    pads = (n // 2, n - 1 - n // 2), (n - 1 - n // 2, n // 2)  # the same one twice if n is odd
    ways = [F.conv2d(F.pad(x, (*a, *b))[None], kernel[None]) for a in pads for b in pads]
    return torch.cat(ways).mean((0, 1))


@pytest.mark.parametrize("n, contexts", [(2, 1), (3, 1), (4, 2)])
def test_convolution_correlates_channel_by_channel(n, contexts):
    """Figure 4a: channel by channel q = f_c(h_c) + PE meets f_k(h_z) without its cls; then Eq. 5.
    """
    layer = model.CorrelationLayer(8, 10, 32, "convolution").double()
    h_c, h_z, positions = rand(2, contexts, 25, 8) - 0.5, rand(2, 2, 1 + n * n, 10), rand(25, 32)
    got = layer(h_c, h_z, positions)
    for b, k in np.ndindex(2, 2):
        q = layer.f_c(h_c[b, k % contexts]) + positions
        grid, kernel = q.T.view(32, 5, 5), layer.f_k(h_z[b, k, 1:]).T.view(32, n, n)
        a = torch.stack([correlate(grid[[c]], kernel[[c]]) for c in range(32)]).flatten(1).T / n**2
        torch.testing.assert_close(got[b, k], q + a + layer.mlp(layer.norm(q + a)))


def test_the_deep_predictor_is_three_deconvolutions():
    """Figure 4b: three transposed convolutions of stride 2 with GELUs between, then bilinear."""
    decoder = model.CorrelationDecoder(8, 3, 32, 1, "cross_attention", "deconv").double()
    h_c, h_z = rand(2, 9, 8), rand(2, 2, 5, 8)
    y = decoder.layers[0](h_c[:, None], h_z, decoder.positions).transpose(2, 3).reshape(4, 32, 3, 3)
    for i in (0, 2, 4):
        layer = decoder.predictor[i]
        y = F.conv_transpose2d(F.gelu(y) if i else y, layer.weight, layer.bias, 2, 1)
    expected = F.interpolate(y.view(2, 2, 24, 24), size=(30, 30), mode="bilinear")
    torch.testing.assert_close(decoder(h_c, h_z, 30), expected)


def test_siamfc_and_siamrpn_correlate_features():
    """Eq. 1: f(z) * f(c) + b. SiamRPN convolves f(z) to a kernel for the map, four for the box."""
    h_c, h_z = rand(2, 25, 6), rand(2, 3, 1 + 4, 6)
    fc, rpn = model.SiamFC(6, 5).double(), model.SiamRPN(6, 5).double()
    nn.init.constant_(fc.bias, 0.3)
    nn.init.normal_(rpn.box.adjust.weight)
    for b, k in np.ndindex(2, 3):
        c, z = h_c[b].T.view(6, 5, 5), h_z[b, k, 1:].T.view(6, 2, 2)
        torch.testing.assert_close(fc.respond(h_c, h_z)[b, k, 0], 9.2 * correlate(c, z) / 24 + 0.3)
        for part, at in ((rpn.map, slice(0, 1)), (rpn.box, slice(1, 5))):
            y = torch.stack([correlate(part.search(c), w) for w in part.kernel(z).split(6)])
            torch.testing.assert_close(rpn.respond(h_c, h_z)[b, k, at], part.adjust(y / 24**0.5))


def test_transt_attends_as_written():
    """TransT: four layers, then a last one. Each norm comes first; self-attention, cross-attention
    and an MLP; positions are added once, to both sides."""
    head, h_c, h_z = model.TransT(64, 3).double(), rand(2, 9, 64), rand(2, 2, 1 + 4, 64)
    for p in head.parameters():
        nn.init.normal_(p, std=0.3)
    p_c, p_z = head.positions, model.resize_positions(head.positions[None], 2, 2)[0]
    assert len(head.layers) == 4 and head.last.self_attn.num_heads == 2  # of 32 channels

    def layer(part, x, y):
        q = part.norm1(x)
        x = x + part.self_attn(q, q, q)[0]
        x = x + part.multihead_attn(part.norm2(x), y, y)[0]
        return x + part.linear2(F.gelu(part.linear1(part.norm3(x))))

    for b, k in np.ndindex(2, 2):
        c, z = head.project(h_c[b]) + p_c, head.project(h_z[b, k, 1:]) + p_z
        for layer_z, layer_c in head.layers:
            z, c = layer(layer_z, z, c), layer(layer_c, c, z)
        c = head.norm(layer(head.last, c, z))
        expected = torch.cat([head.map(c), head.box(c).sigmoid()], 1).T.view(5, 3, 3)
        torch.testing.assert_close(head.respond(h_c, h_z)[b, k], expected)


@pytest.mark.parametrize("name, weight", [("siamfc", 1), ("siamrpn", 1), ("transt", 8.334)])
def test_a_trackers_loss_is_that_of_map_and_box(name, weight):
    """Logistic loss on the map, plus the loss of its tight upright box, the mean over the positions
    whose centre it holds: SiamRPN's smooth L1 relative to an anchor, TransT's L1 and GIoU."""
    _, (context, exemplars, _) = tiny_cim()
    cim, ops = model.Tracking(name, "vit_d8", 32), torchvision.ops
    boxes = crop.sample_boxes(rand(2, 3, 6, dtype=torch.float32))
    maps = crop.rasterize_maps(crop.affine_from_boxes(boxes), 32)
    xyxy = (ops.masks_to_boxes(maps.flatten(0, 1)) + torch.tensor([0, 0, 1, 1])) / 32
    xyxy = xyxy.view(2, 3, 1, 1, 4).expand(2, 3, 4, 4, 4)  # at each position of a 4 x 4 grid
    true = ops.box_convert(xyxy, "xyxy", "cxcywh")
    h_c, h_z = cim.encode(context, exemplars)
    response, losses = cim.decoder.respond(h_c, h_z), torch.zeros(2, 3, 4, 4)
    got, inside = response[:, :, 1:].movedim(2, -1), maps[:, :, 4::8, 4::8]
    if name == "siamrpn":
        at = (torch.stack(torch.meshgrid(*2 * [torch.arange(4)], indexing="xy"), -1) + 0.5) / 4
        off = got - torch.cat([(true[..., :2] - at) / 0.4, (true[..., 2:] / 0.4).log()], -1)
        losses = 1.2 * torch.where(off.abs() < 1, off**2 / 2, off.abs() - 0.5).sum(-1)
    elif name == "transt":
        giou_loss = ops.generalized_box_iou_loss(ops.box_convert(got, "cxcywh", "xyxy"), xyxy)
        losses = 5 * (got - true).abs().sum(-1) + 2 * giou_loss
    per_map = (losses * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
    logits = F.interpolate(response[:, :, 0], size=(32, 32), mode="bilinear")
    loss = per_map.mean() + weight * F.binary_cross_entropy_with_logits(logits, maps)
    torch.testing.assert_close(cim(context, exemplars, maps), (loss, logits))
    torch.testing.assert_close(cim.decoder(h_c, h_z, 32), logits)


# --------------------------------------------------------------------------------- 5. training

@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The flags of a run of 4 steps on 40 pictures, 5 steps an epoch, and the folder with it."""
    root = tmp_path_factory.mktemp("four")
    save_images(root / "train", 40)
    save_images(root / "val", 3, seed=1)
    flags = [f"--data={root}", "--max_steps=4", "--eval_every=2"]
    demo(root / "out", *flags)
    return flags, root / "out"


def test_the_recipes_are_tables_9_10_and_11():
    """The defaults are pre-training's Table 9, value by value; vit_b and vit_s are Table 10,
    resnet50_100 and resnet50_300 the columns of Table 11."""
    expected = dict(epochs=300, lr=2.4e-3, batch_size=4096, lr_batch=4096, weight_decay=0.05,
                    beta1=0.9, beta2=0.95, warmup_epochs=40, clip=1.0, context_size=160,
                    exemplar_size=64, exemplars=6, model="vit_b16", decoder_width=512,
                    decoder_depth=1, scale=(0.05, 1.0), ratio=(1 / 3, 3.0), rotation=45.0, flip=0.5,
                    transforms="exemplar", tau=0.99, bootstrap="online_exemplar", decoder="cim",
                    correlation="cross_attention", predictor="linear", loss="ce")
    assert expected.items() <= vars(config()).items() and config() == pretrain.Config()
    vit = dict(lr=9.6e-3, batch_size=2048, lr_batch=2048, layer_decay=0.8, weight_decay=0.05,
               beta1=0.9, beta2=0.999, warmup_epochs=5, loss="ce", clip=0, drop_path=0.1, mixup=0.8,
               cutmix=1.0, smoothing=0.1, randaugment=9, randaugment_std=0.5, randaugment_p=0.5,
               image_size=224, test_size=224, optimizer="adamw", repeats=1, erasing=0)
    cnn = vit | dict(lr=12e-3, layer_decay=1, weight_decay=0.02, loss="bce", drop_path=0,
                     mixup=0.1, test_crop=0.95)
    columns = {"vit_b": vit | dict(epochs=100), "vit_s": vit | dict(epochs=200),
               "resnet50_100": cnn | dict(epochs=100, randaugment=6, image_size=160),
               "resnet50_300": cnn | dict(epochs=300, randaugment=7, smoothing=0, repeats=3)}
    for name, expected in columns.items():
        assert expected.items() <= vars(recipe(name)).items(), name


def test_learning_rate_and_tau_at_their_hinges():
    """Table 9: linear warm-up, cosine to 0; Eq. 3's tau goes from its start to 1 by a cosine. A
    warm-up longer than the run is its first part."""
    lr = [pretrain.learning_rate(s, 100, 2.0, 10) for s in range(101)]
    assert [lr[s] for s in (0, 4, 9, 10, 55, 100)] == pytest.approx([0.2, 1, 2, 2, 1, 0])
    assert max(lr) == 2.0 and lr[10:] == sorted(lr[10:], reverse=True)
    assert [pretrain.learning_rate(s, 5, 1.0, 10) for s in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [pretrain.target_decay(s, 100, 0.99) for s in (0, 50, 100)] == [0.99, 0.995, 1]


def test_four_steps_equal_the_recipe_written_out(tmp_path, four):
    """The loop is Table 9 and Eqs. 2-7 and nothing else: the same four steps by hand, each in
    micro-batches of 3, 3 and 2 contexts, with every crop probability different and the patch
    embedding frozen, give the same checkpoint."""
    crops = dict(flip=0.4, jitter=0.9, gray=0.3, blur=0.6, solarize=0.1)
    flags = dict(crops, context_flip=0.3, context_scale="0.2,0.6", lr=0.02, clip=0.5, beta1=0.8,
                 beta2=0.9, weight_decay=0.3, tau=0.7, warmup_epochs=0.4, transforms="exemplar",
                 freeze_patch_embed=True)
    demo(tmp_path, *four[0], "--micro_batch=3", *(f"--{k}={v}" for k, v in flags.items()))
    torch.manual_seed(0)
    cim = model.CIM("vit_d8", 64, 64, freeze_patch_embed=True)
    learned = [p for p in cim.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in learned if p.ndim == 2], weight_decay=0.3),
              dict(params=[p for p in learned if p.ndim != 2], weight_decay=0)]  # cls token: 3
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), fused=True)
    images = crop.Folder(str(four[1].parent / "train"))
    contexts = samples(images, 40, 64, scale=(0.2, 0.6), flip=0.3)
    order = np.random.default_rng((0, 2, 0)).permutation(40).tolist()
    for step in range(4):
        batch, _ = crop.collate([contexts[0, i] for i in order[8 * step:8 * step + 8]])
        u = np.random.default_rng((0, 4, step)).random((8, 7, 15), dtype=np.float32)
        optimizer.zero_grad()
        for part in zip(batch.split(3), torch.from_numpy(u).split(3)):
            pairs = crop.make_pairs(*part, exemplar_size=32, **crops)
            (cim(*pairs[:3])[0] * (len(part[0]) / 8)).backward()
        torch.nn.utils.clip_grad_norm_(learned, 0.5)
        for group in optimizer.param_groups:  # batch 8 of lr_batch 16; 2 steps of warm-up of 15
            group["lr"] = 0.01 * [1 / 2, 1, 1, (1 + math.cos(math.pi / 13)) / 2][step]
        optimizer.step()
        tau = 1 - 0.3 * (1 + math.cos(math.pi * step / 15)) / 2
        for t, o in zip(cim.target.parameters(), cim.online.parameters()):
            t.data.lerp_(o, 1 - tau)
    saved = load(tmp_path / "ckpt.pt")["model"]
    torch.testing.assert_close(saved, dict(cim.state_dict()), atol=0, rtol=0)


def test_two_processes_equal_one(tmp_path, four):
    """torchrun with two gloo processes, each accumulating, gives the run of one: losses, gradient,
    held-out measures and weights."""
    torchrun("pretrain.py", *TINY, *four[0], "--micro_batch=2", f"--out={tmp_path}")
    for a, b in zip(*map(read_log, (four[1], tmp_path)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
        assert ("iou" in a) == (a["step"] % 2 == 0)
    one, two = (load(out / "encoder.pt") for out in (four[1], tmp_path))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


def test_four_steps_equal_two_and_resumed_two_bit_for_bit(tmp_path, four):
    """A resumed run is the uninterrupted run, weights, log and all, whatever rows a crash left. The
    same command once more writes encoder.pt and target.pt anew and changes nothing else."""
    demo(tmp_path, *four[0], "--max_steps=2")
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 3, "lost": "in a crash"}\n\0\0}\n{"step": 4, "tor')
    for _ in range(2):
        assert demo(tmp_path, *four[0], "--micro_batch=8", "--workers=1") == read_log(four[1])
        a, b = (load(out / "ckpt.pt") for out in (four[1], tmp_path))
        for part in ("step", "model", "optimizer"):
            torch.testing.assert_close(a[part], b[part], atol=0, rtol=0)
        for name, side in ("encoder", "online"), ("target", "target"):
            got = load(tmp_path / f"{name}.pt")
            assert all(torch.equal(v, a["model"][f"{side}.{k}"]) for k, v in got.items())
            (tmp_path / f"{name}.pt").unlink()


@pytest.mark.parametrize("name, flags", [
    ("vit_d8", ["--decoder=siamrpn", "--dtype=bfloat16"]),
    ("resnet50", ["--exemplars=2", "--batch_size=2"])])
def test_trackers_and_resnet50_are_resumed_and_measured_like_the_default(
        name, flags, tmp_path, four):
    """Table 4's trackers and Table 9's CNN go through the same loop: held-out skill, a resumed run,
    the encoder's file, in float32 also after bf16, evaluate.py's maps."""
    for steps in (1, 2):
        rows = demo(tmp_path, *four[0], f"--model={name}", *flags, f"--max_steps={steps}")
    assert [r["step"] for r in rows] == [1, 2] and math.isfinite(rows[1]["skill"])
    model.build_encoder(name).load_state_dict(load(tmp_path / "encoder.pt"))
    dtypes = {v.dtype for v in load(tmp_path / "encoder.pt").values()}
    assert dtypes <= {torch.float32, torch.int64}
    report = score(tmp_path / "x", "--bench=maps", f"--ckpt={tmp_path / 'ckpt.pt'}", four[0][0])
    assert report["n"] == 3 and math.isfinite(report["skill"])
    assert Image.open(tmp_path / "x" / "figures.png").width > 500


def test_gflop_per_image_equals_the_hand_count():
    """ViT-B/16 takes 17.7 GFLOP in the target and 52.3 in the online encoder, and the decoder the
    products of Eqs. 4-6, within 2%."""
    def encoder(tokens):
        return 12 * (24 * tokens * 768**2 + 4 * tokens**2 * 768) + (tokens - 1) * 2 * 768**2

    target, online = encoder(101), 6 * encoder(17)
    assert (target, 3 * online) == pytest.approx((17.7e9, 52.3e9), rel=0.01)
    shared = 100 * 768 * 512 + 6 * 17 * 2 * 768 * 512  # f_c (its input needs no gradient), f_k, f_v
    each = 6 * (100 * 8 * 512**2 + 2 * 100 * 17 * 512 + 100 * 512)
    hand = target + 3 * online + 2 * (3 * (shared + each))
    assert pretrain.gflop_per_image(pretrain.Config()) * 1e9 == pytest.approx(hand, rel=0.02)


@pytest.mark.parametrize("script", [pretrain, finetune, evaluate])
def test_every_field_is_read(script):
    """No field is a flag that nothing reads."""
    text = "".join(open(module.__file__).read() for module in (script, finetune, pretrain))
    read = {"preset", *re.findall(r'\bcfg(?:\.|, ")(\w+)', text)}  # also by getattr
    assert vars(config(script=script)).keys() <= read


# ---------------------------------------------------------------------------------- 6. honesty

def test_a_few_images_can_be_overfitted():
    """The loss falls well below that of each image's mean map, the best answer that does not tell
    its exemplars apart."""
    torch.manual_seed(0)
    cim = model.CIM("vit_d8", 32, 64, freeze_patch_embed=False)
    contexts = first_images(crop.Shapes("train"), 8, 32)
    pairs = crop.make_pairs(contexts, rand(8, 7, crop.UNIFORMS, dtype=torch.float32), 16)[:3]
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(cim, 0.05), lr=2e-3, fused=True)
    for _ in range(180):
        loss, _ = cim(*pairs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cim.update_target(0.99)
    mean = pairs[2].mean(1, keepdim=True).expand_as(pairs[2])
    assert loss < 0.6 * F.binary_cross_entropy(mean, pairs[2])


def test_skill_is_zero_without_the_exemplar_and_one_with_the_answer():
    """skill = 1 - loss / baseline: the mean map has skill 0; a model that knows each exemplar's map
    has 1, and less than 0 when exemplars are swapped between images. The baseline is near the
    entropy of the mean map of many more boxes, about 0.42 nats."""
    held = pretrain.HeldOut(crop.Shapes("val"), list(range(30)), config(*TINY), CPU)
    contexts = torch.cat([x for x, _ in held.images])
    _, exemplars, maps, _ = pretrain.make_pairs(contexts, held.u, held.cfg)
    colours = exemplars.mean((3, 4)).flatten(0, 1)

    def know(colour):
        nearest = torch.cdist(colour.flatten(0, 1), colours).argmin(1)
        return maps.flatten(0, 1)[nearest].view(*colour.shape[:2], 64, 64)

    def measure(answer):  # of a model to which an exemplar is its mean colour
        cim = nn.Module()
        cim.encode = lambda context, exemplars: (context, exemplars.mean((3, 4)))
        cim.decoder = lambda h_c, h_z, size: answer(h_z).clamp(1e-6, 1 - 1e-6).logit()
        return held.evaluate(cim)

    known, mean = measure(know), measure(lambda h_z: held.mean_map.expand(len(h_z), 6, 64, 64))
    assert mean["skill"] == pytest.approx(0, abs=1e-4) and mean["skill_swapped"] == mean["skill"]
    assert known["skill"] > 0.999 and known["skill_swapped"] < 0 and known["iou"] == 100
    theta = crop.affine_from_boxes(crop.sample_boxes(rand(20000, 6, seed=5).float()))
    p = torch.stack([crop.rasterize_maps(part, 64).mean(0) for part in theta.split(500)]).mean(0)
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).mean().item()
    assert 0.41 < entropy < 0.43 and (held.mean_map - p).abs().max() < 0.04
    assert mean["baseline"] == pytest.approx(entropy, rel=0.06)  # of 180 maps only


def test_held_out_measures_equal_a_float64_loop():
    """Cross-entropy, that of the average map, and the IoU of each map at 0.5; the average map's IoU
    at the threshold that is best for it. The shares of two processes add up to the sums of one."""
    cim, cfg, sums = model.CIM("vit_d8", 64, 64), config(*TINY), []
    nn.init.normal_(cim.decoder.predictor.weight, std=0.3)
    for machine in process(0, 2), process(1, 2), process(0, 1):
        machine.sum = lambda x: sums.append(x.clone())
        held = pretrain.HeldOut(crop.Shapes("val"), list(range(40)), cfg, machine)
        got = held.evaluate(cim)
    torch.testing.assert_close(sums[0] + sums[1], sums[2])
    contexts = torch.cat([x for x, _ in held.images])
    context, exemplars, maps, _ = pretrain.make_pairs(contexts, held.u, cfg)
    with torch.no_grad():
        p, mean, rows = cim(context, exemplars, maps)[1].double().sigmoid(), held.mean_map, []
    thresholds = [0.02 * k for k in range(1, 50)]
    for t, q in zip(maps.flatten(0, 1).double(), p.flatten(0, 1)):
        ious = [(found & (t > 0)).sum() / (found | (t > 0)).sum()
                for found in (q > 0.5, *(mean > x for x in thresholds))]
        rows.append([-(t * x.log() + (1 - t) * (1 - x).log()).mean() for x in (q, mean)] + ious)
    loss, baseline, iou, *averages = torch.tensor(rows).double().mean(0).tolist()
    expected = dict(heldout_loss=loss, baseline=baseline, skill=1 - loss / baseline, iou=100 * iou,
                    iou_average=100 * max(averages), n=40)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert max(averages) > averages[24] + 0.03  # that at 0.5


# --------------------------------------------------------------------------------- 7. transfer

def test_losses_equal_the_formulas():
    """Tables 10 and 11: smoothed soft targets in cross-entropy and in the mean binary cross-entropy
    over the classes; the threshold of [67] makes targets 0 or 1."""
    logits, targets = 4 * rand(2, 4) - 2, torch.tensor([[1, 0, 0, 0], [0.3, 0, 0.7, 0]]).double()
    p, smooth = 1 / (1 + (-logits).exp()), 0.9 * targets + 0.025
    expected = -(smooth * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()
    assert finetune.soft_loss(logits, targets, recipe("vit_b")).item() == pytest.approx(expected)
    for threshold, t in (0, smooth), (0.2, (smooth > 0.2).double()):
        cfg = recipe("resnet50_100", f"--bce_threshold={threshold}")
        expected = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        assert finetune.soft_loss(logits, targets, cfg).item() == pytest.approx(expected)


def test_repeated_augmentation_shows_each_image_three_times_in_a_step():
    """Table 11, 300 epochs: over the processes of a step each image comes three times, each time
    with another crop, never beside itself; an epoch shows a third of the images."""
    cfg, seen = recipe("resnet50_300", "--batch_size=24", "--micro_batch=4"), set()
    plan = pretrain.make_plan(cfg, process(0, 2), 100)
    parts = [sum(pretrain.micro_batches(cfg, plan, rank, range(4), 3), []) for rank in (0, 1)]
    for step in range(plan.per_epoch):
        keys = [key for part in parts for key in part[12 * step:][:12]]
        images = [i for _, i in keys]
        assert len(set(keys)) == 24 and {images.count(i) for i in images} == {3}
        assert all(a != b for a, b in zip(images, images[1:]))
        seen |= set(images)
    assert len(seen) == 32  # 4 steps of 8


def test_drop_path_keeps_the_expectation():
    """Stochastic depth: a branch is left out with probability p, which grows linearly over the
    blocks, and is scaled by 1 / (1 - p) where it stays; in evaluation it always stays."""
    vit = model.build_encoder("vit_t16", drop_path=0.5).train()
    rates = [1 - block.drop_path.keep.item() for block in vit.blocks]
    assert rates == pytest.approx([0.5 * i / 11 for i in range(12)])
    torch.manual_seed(0)
    branch, x = vit.blocks[-1].drop_path, torch.ones(4000, 2, 2)
    assert branch(x).unique(dim=0).tolist() == [[[0, 0], [0, 0]], [[2, 2], [2, 2]]]
    assert abs(branch(x).mean() - 1) < 0.06  # four standard errors
    assert torch.equal(branch.eval()(x), x)


def test_randaugment_is_drawn_as_timm_writes_it():
    """"9 / 0.5": half of all operations are applied, their magnitudes are N(9, 0.5) cut to 10."""
    augment, seen, rng = finetune.RandAugment(9, 0.5, 0.5), [], np.random.default_rng(0)
    augment.forward = lambda image: seen.append(augment.magnitude / 100)
    for _ in range(1000):
        augment.augment(None, rng)
    assert abs(len(seen) / 2000 - 0.5) < 0.05 and max(seen) == 10
    assert abs(np.median(seen) - 9) < 0.06 and abs(np.quantile(seen, 0.16) - 8.5) < 0.1


def test_knn_equals_a_brute_force_loop():
    """Weighted k-NN: the k most similar of the bank vote with exp(cosine / 0.07)."""
    bank, queries = (F.normalize(rand(n, 6, seed=n) - 0.5).float() for n in (50, 20))
    labels = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 80):
        for q, chosen in zip(queries, evaluate.vote(queries, bank, labels, 4, k, 0.07)):
            votes = [0.0] * 4
            for cosine, j in sorted((float(q @ b), j) for j, b in enumerate(bank))[-k:]:
                votes[labels[j]] += math.exp(cosine / 0.07)
            assert votes[chosen] == max(votes)


@pytest.mark.parametrize("released", [False, True])
def test_checkpoints_load_whole(released, tmp_path):
    """Our checkpoints and the released ones: every weight of the online encoder is the file's; the
    target and other heads are left out. A position table of 384 pixels becomes that of 224,
    bicubically. One weight missing or left over is an error."""
    online = model.build_encoder("vit_t16").state_dict()
    grid = rand(1, 192, 24, 24).float()
    online["pos_embed"] = torch.cat([online["pos_embed"][:, :1], grid.flatten(2).mT], 1)
    saved = {f"{side}.{k}": v + (side == "target") for k, v in online.items()
             for side in ("online", "target")}
    if released:  # its two encoders share what has no dot in its name
        saved = online | {k.replace(".", "_c.", 1): v + 1 for k, v in online.items() if "." in k}
    torch.save(dict(model=saved, args=argparse.Namespace(lr=1)), tmp_path / "x.pt")
    name, state, _ = finetune.read_weights(str(tmp_path / "x.pt"))
    net = model.Classifier(name, 3)
    finetune.load_weights(net, state, "x.pt")
    small = F.interpolate(grid, size=14, mode="bicubic").flatten(2).mT
    online["pos_embed"] = torch.cat([online["pos_embed"][:, :1], small], 1)
    for key, value in net.encoder.state_dict().items():
        assert torch.equal(value, online[key]), key
    del state["blocks.3.mlp.fc1.bias"]
    for wrong in state, online | {"blocks.12.norm1.bias": torch.ones(192)}:
        with pytest.raises(InputError, match="blocks"):
            finetune.load_weights(net, wrong, "x.pt")


@pytest.mark.parametrize("name", ["resnet50", "vit_s16"])
def test_torchvision_and_timm_read_our_weights_and_we_theirs(name, tmp_path):
    """Loaded from model.pt, torchvision's resnet50 and (where it is installed) timm's ViT give our
    logits, and so does our model loaded from theirs."""
    if name == "resnet50":
        theirs = torchvision.models.resnet50(num_classes=3).eval()
    else:
        timm = pytest.importorskip("timm")
        theirs = timm.create_model("vit_small_patch16_224", num_classes=3, global_pool="avg").eval()
    ours, x = save_classifier(tmp_path / "x.pt", ["a", "b", "c"], name), torch.randn(1, 3, 224, 224)
    theirs.load_state_dict(load(tmp_path / "x.pt")["weights"])
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    again = model.Classifier(name, 3).eval()
    state = finetune.read_weights(tmp_path / "theirs.pt")[1]
    finetune.load_weights(again, state, "theirs.pt", head=True)
    for net in ours, again:
        torch.testing.assert_close(net(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_a_step_of_fine_tuning_equals_the_recipe_written_out(classes3, tmp_path):
    """Three micro-batches of 3, 3 and 2, smoothed CutMix, the learning rate of each layer (Table
    10), weight decay and clipping by hand give the same weights; the position table stays."""
    tune(tmp_path, classes3, "--max_steps=1", "--micro_batch=3", "--cutmix=1", "--smoothing=0.1",
         "--clip=0.5", "--lr=0.01", "--lr_batch=16", "--warmup_epochs=0", "--weight_decay=0.3",
         "--layer_decay=0.5", "--randaugment_p=1")
    torch.manual_seed(0)
    net, mix = model.Classifier("vit_d8", 3), v2.CutMix(num_classes=3)
    augment = finetune.RandAugment(9, 0.5, 1).augment
    cut = partial(crop.cut_context, size=32, scale=(0.8, 1.0), augment=augment)
    source = crop.Folder(str(classes3 / "train"))
    dataset, labels = crop.Samples(source, range(24), 0, cut), torch.tensor(source.labels)
    order = np.random.default_rng((0, 2, 0)).permutation(24)[:8].tolist()
    for k in range(3):
        images, numbers = crop.collate([dataset[0, i] for i in order[3 * k:][:3]])
        torch.manual_seed(int(np.random.SeedSequence((0, 7, 0, k, 0)).generate_state(1, "u8")[0]))
        torch.multinomial(torch.ones(1), 1)  # RandomChoice among one
        x, y = mix(crop.normalize(images.float() / 255), labels[numbers])
        (F.cross_entropy(net(x), y, label_smoothing=0.1) * len(x) / 8).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    rates = {"encoder.blocks.0": 0.25, "encoder.blocks.1": 0.5, "encoder": 0.125, "": 1}
    for name, p in net.named_parameters():
        if p.requires_grad:
            rate = 0.005 * next(r for start, r in rates.items() if name.startswith(start))
            decay = 0.3 if name.endswith("weight") and p.ndim > 1 else 0
            torch.optim.AdamW([p], lr=rate, weight_decay=decay, fused=True).step()
    got = load(tmp_path / "ckpt.pt")["model"]
    for key, value in net.state_dict().items():
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-5)


def test_a_linear_probe_trains_the_head_alone(classes3, tmp_path):
    """--recipe=linear: the encoder and its BatchNorm statistics stay, features are normalised
    without parameters, and only the linear layer learns, by SGD."""
    tune(tmp_path, classes3, "--recipe=linear", "--model=resnet50", "--max_steps=1")
    torch.manual_seed(0)
    before = model.Classifier("resnet50", 3, probe=True).state_dict()
    after = load(tmp_path / "ckpt.pt")["model"]
    assert {k for k in before if not torch.equal(before[k], after[k])} == {
        "head.weight", "head.bias", "fc_norm.running_mean", "fc_norm.running_var",
        "fc_norm.num_batches_tracked"}


def test_fine_tuning_goes_on_bit_for_bit(classes3, tmp_path, monkeypatch):
    """With everything random on, a run goes on after a signal and equals the whole. One that comes
    during validation saves without finishing it: that is done again, and gives the same row."""
    flags = ["--mixup=0.8", "--cutmix=1", "--drop_path=0.5", "--randaugment_p=0.5",
             "--erasing=0.5", "--repeats=3", "--max_steps=4", "--eval_epochs=1"]
    whole, real, seen = tune(tmp_path / "a", classes3, *flags), crop.cut_centre, []

    def interrupt(*args, **more):  # in the first batch of the validation after step 3
        seen.append(args)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGHUP)
        return real(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(crop, "cut_centre", interrupt)
        tune(tmp_path / "b", classes3, *flags)
    assert stop.value.code == 75 and [row["step"] for row in read_log(tmp_path / "b")] == [1, 2]
    assert tune(tmp_path / "b", classes3, *flags, "--workers=1") == whole
    a, b = (load(tmp_path / x / "model.pt") for x in "ab")
    torch.testing.assert_close(a["weights"], b["weights"], atol=0, rtol=0)


def test_the_three_scripts_one_after_the_other(classes3, tmp_path):
    """A run on two processes ends with the accuracy of a plain loop, and evaluate.py repeats it on
    one; k-NN scores the online encoder, on two processes as on one, the target, and none."""
    pre, fine, data = tmp_path / "pre", tmp_path / "fine", f"--data={classes3}"
    demo(pre, data, "--max_steps=2")
    torchrun("finetune.py", "--recipe=demo", *PLAIN, data, f"--init={pre / 'encoder.pt'}",
             f"--out={fine}", "--image_size=32", "--test_size=32", "--batch_size=8",
             "--micro_batch=2", "--max_steps=4")
    cfg = config(f"--ckpt={fine / 'model.pt'}", script=evaluate)
    net, saved = evaluate.load_model(cfg, CPU)
    last = saved["score"]["top1"]
    assert last == pytest.approx(predictions(net, classes3 / "val", saved["classes"]))
    got = score(fine, f"--ckpt={cfg.ckpt}", data)
    assert got["n"] == 69 and got["top1"] == pytest.approx(last, abs=1e-3)
    knn, online = ["--bench=knn", "--size=32", data], f"--ckpt={pre / 'ckpt.pt'}"
    one, two = score(pre, *knn, online), json.loads(torchrun("evaluate.py", *PLAIN, *knn, online))
    assert one["knn"] == two["knn"] and two["n"] == 69 and two["bank"] == 24
    for flags in [f"--ckpt={pre / 'target.pt'}"], ["--ckpt=scratch", "--model=vit_d8"]:
        assert score(pre, *knn, *flags)["n"] == 69


def test_a_run_is_scored_on_what_it_held_out(tmp_path):
    """A folder without val/: the slice that the run held out is scored, among the run's classes,
    and n and score are the run's. Another folder is scored whole, by k-NN a slice. Other classes
    would change the slice, and so would one more image: errors."""
    for place, count in (("own/ant", 30), ("own/bee", 30), ("own/cat", 30),
                         ("other/ant", 4), ("other/bee", 5)):
        save_images(tmp_path / place, count, seed=count)
    for name, words in ("run's", "ant bee"), ("others", "bee cat"):
        (tmp_path / name).write_text("\n".join(words.split()))
    own, classes = f"--data={tmp_path}/own", f"--classes={tmp_path}/run's"
    row = tune(tmp_path / "fine", tmp_path / "own", classes, "--max_steps=2")[-1]
    pre = demo(tmp_path / "pre", own, classes, "--seed=3", "--max_steps=1")[-1]
    assert (row["n"], pre["n"]) == (15, 15)
    for bench, out, run, same, n in (("knn", "pre/encoder.pt", pre, "n", 2),
                                     ("top1", "fine/model.pt", row, "top1", 9),
                                     ("maps", "pre/ckpt.pt", pre, "skill", 9)):
        flags = [f"--bench={bench}", f"--ckpt={tmp_path / out}", "--size=32"]
        got = score(tmp_path, *flags, f"--data={tmp_path}/fine/../own/")
        assert got["n"] == run["n"] and score(tmp_path, *flags, own, classes)["n"] == run["n"]
        assert got[same] == pytest.approx(run[same])
        assert score(tmp_path, *flags, f"--data={tmp_path}/other")["n"] == n
        with pytest.raises(InputError, match="--classes"):
            score(tmp_path, *flags, own, f"--classes={tmp_path}/others")
    save_images(tmp_path / "own/bee", 31)
    for flags in flags, ["--bench=knn", f"--ckpt={tmp_path}/pre/encoder.pt", "--size=32"]:
        with pytest.raises(InputError, match="other images"):
            score(tmp_path, *flags, own)


def test_the_centre_crop_equals_torchvisions():
    """The shorter side to size / 0.95, then the middle, to three levels of rounding."""
    image = crop.Shapes("val").open(0).resize((600, 400), Image.BICUBIC)  # 95% of 400 is whole
    whole = TF.center_crop(TF.resize(image, 200, TF.InterpolationMode.BICUBIC), 190)
    got = crop.cut_centre(image, None, 190, 0.95).float()
    assert (got - crop.to_tensor(whole).float()).abs().max() <= 3


# ------------------------------------------------------------------------------- 8. evaluation

def test_attacks_on_a_linear_model_have_a_closed_form():
    """FGSM and PGD against two classes that are linear in the pixels end where every pixel moved
    by eps towards the other class, or to the edge of [0, 1], however far off PGD starts."""
    linear, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), torch.tensor([0, 1, 1, 0])
    weight, x = linear[1].weight.detach(), (1.4 * rand(4, 3, 8, 8).float() - 0.2).clamp(0, 1)
    uphill = (weight[1 - y] - weight[y]).sign().view(4, 3, 8, 8)
    for start, step, steps in (torch.zeros_like(x), 1, 1), (torch.randn(x.shape), 0.5, 5):
        got = evaluate.perturb(linear, x, y, start, 1 / 255, step / 255, steps)
        torch.testing.assert_close(got, (x + uphill / 255).clamp(0, 1), atol=1e-7, rtol=0)


def test_attacks_hurt_on_two_processes_as_on_one(tmp_path, classes3, monkeypatch):
    """PGD lowers the score of a plain loop; its start belongs to the image."""
    net = save_classifier(tmp_path / "model.pt", ["ant", "bee", "cat"])
    flags = ["--bench=pgd", "--eps=8", f"--ckpt={tmp_path}/model.pt", f"--data={classes3}"]
    clean = predictions(net, classes3 / "val", ["ant", "bee", "cat"])
    one, cfg, drawn = score(tmp_path, *flags), config(*PLAIN, *flags, script=evaluate), []
    assert one["pgd"] < one["clean"] == pytest.approx(clean, abs=1e-3) and one["n"] == 69
    monkeypatch.setattr(evaluate, "perturb", lambda *args: drawn.append(args[3]) or args[1])
    for machine in CPU, process(0, 2), process(1, 2):  # batches of 64 and 5, 64, 5
        evaluate.attacked(cfg, machine)
    assert torch.equal(torch.cat(drawn[:2]), torch.cat(drawn[2:]))
    assert abs(drawn[0].mean()) < 2e-4


def test_imagenet_c_reads_the_published_layout(tmp_path):
    """CORRUPTION/SEVERITY/CLASS: each error is that of a plain loop over uncropped images, and mCE
    is relative to AlexNet's, whose published mean is 78.8."""
    names, errors = ["bee", "ant"], []  # not in the order of the folders
    net = save_classifier(tmp_path / "model.pt", names)
    for k in range(5):
        for i, name in enumerate(names):
            save_images(tmp_path / str(k) / name, 2, (32, 32), seed=10 * k + i)
        whole = partial(crop.cut_centre, size=32, ratio=1.0)
        errors.append(100 - predictions(net, tmp_path / str(k), names, whole))
    for i, corruption in enumerate(evaluate.ALEXNET):
        (tmp_path / "c" / corruption).mkdir(parents=True)
        for k in range(5):
            (tmp_path / "c" / corruption / str(k + 1)).symlink_to(tmp_path / str((i + k) % 5))
    got = score(tmp_path, "--bench=imagenet_c", f"--ckpt={tmp_path}/model.pt",
                f"--data={tmp_path}/c")
    for i, name in enumerate(evaluate.ALEXNET):
        assert got["errors"][name] == [errors[(i + k) % 5] for k in range(5)]
    relative = [np.mean(got["errors"][name]) / alex for name, alex in evaluate.ALEXNET.items()]
    assert got["mce"] == pytest.approx(np.mean(relative)) and len({*errors}) > 1
    assert 100 * np.mean([*evaluate.ALEXNET.values()]) == pytest.approx(78.8, abs=0.1)


def test_predictions_are_made_among_the_folders_only(tmp_path):
    """ImageNet-A, -R, -Sketch: classes are found by name, those without a folder not predicted, nor
    those that --classes leaves out. An image that cannot be read is left out."""
    names, among = ["dog", "ant", "cow", "bee"], ["bee", "cow", "dog"]
    net = save_classifier(tmp_path / "model.pt", names, seed=3)
    for k, name in enumerate(among):
        save_images(tmp_path / "r" / name, 8, seed=k)
    expected = predictions(net, tmp_path / "r", names, among=among)
    assert expected != predictions(net, tmp_path / "r", names)  # the protocol matters here
    (tmp_path / "r" / "cow" / "zzz.jpg").write_text("no image")
    flags = "--bench=imagenet_r", f"--ckpt={tmp_path}/model.pt", f"--data={tmp_path}/r"
    got = score(tmp_path, *flags)
    assert got["imagenet_r"] == pytest.approx(expected, abs=1e-3) and got["n"] == 24
    (tmp_path / "list").write_text("bee\ndog")
    shutil.rmtree(tmp_path / "r" / "cow")
    expected = predictions(net, tmp_path / "r", names, among=["bee", "dog"])
    save_images(tmp_path / "r" / "cow", 8, seed=1)
    got = score(tmp_path, *flags, f"--classes={tmp_path}/list")
    assert got["imagenet_r"] == pytest.approx(expected, abs=1e-3) and got["n"] == 16


# ------------------------------------------------------------------------------ 9. segmentation

SCENES = ["--recipe=segment", "--model=vit_d8", "--labels=2", "--head_width=16", "--batch_size=4"]


def save_scene(root, name, image, mask):
    """An image and its mask in ADE20K's layout; name: SPLIT/NAME."""
    for path, picture in (f"images/{name}.jpg", image), (f"annotations/{name}.png", mask):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Red ellipses (2) on blue grounds (1) below an unlabelled strip; some masks have a palette."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in ("training", 12), ("validation", 5):
        for i in range(count):
            w, h = [(70, 60), (40, 64), (90, 41)][i % 3]
            (cx, cy), r = rng.uniform(0.3, 0.7, 2) * (w, h), rng.uniform(8, 16)
            y, x = np.mgrid[:h, :w]
            inside = (x - cx) ** 2 + 2 * (y - cy) ** 2 < r * r
            image = np.where(inside[..., None], [200, 60, 50], [50, 80, 180])
            image = (image + rng.normal(0, 20, (h, w, 3))).clip(0, 255).astype(np.uint8)
            mask = Image.fromarray((1 + inside * (y > 2) - (y <= 2)).astype(np.uint8))
            if i % 2:
                mask.putpalette([9, 9, 9, 255, 0, 0, 7, 7, 7])
            save_scene(root, f"{split}/street/{i:02d}", Image.fromarray(image), mask)
    return root


def test_the_recipe_segment_is_beits():
    """Table 7: AdamW, 160,000 steps of 16 on ADE20K's 20,210 images, 1,500 of linear warm-up, then
    a straight line to 0; ViT-B/16 with UperNet for 150 classes has BEiT's 163 M parameters."""
    expected = dict(lr=3e-5, batch_size=16, lr_batch=16, weight_decay=0.05, layer_decay=0.9,
                    drop_path=0.1, beta1=0.9, beta2=0.999, clip=0, optimizer="adamw", flip=0.5,
                    image_size=512, test_size=512, scale=(0.5, 2.0), cat_max_ratio=0.75,
                    photometric=0.5, head_width=768, schedule="linear")
    cfg = recipe("segment", "--model=vit_b16")
    assert expected.items() <= vars(cfg).items()
    plan = pretrain.make_plan(cfg, CPU, 20_210)
    assert plan.warmup == 1500 and 160_000 <= plan.total < 160_500
    lr = [pretrain.learning_rate(step, 100, 2.0, 10, "linear") for step in range(101)]
    assert lr[9] == lr[10] == 2.0 and lr[55] == pytest.approx(1.0) and lr[100] == 0
    with torch.device("meta"):
        net = finetune.build_model(cfg, 150)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 163


@pytest.mark.parametrize("name, patch, taken", [
    ("vit_t16", 16, [4, 6, 8, 12]), ("vit_d8", 8, [1, 1, 2, 2])])
def test_the_pyramid_is_made_of_four_blocks(name, patch, taken):
    """4.4 and BEiT: blocks 4, 6, 8 and 12 without the final norm at strides of 1/4, 1/2, 1 and 2
    patches; logits as large as the image, whatever its sides; every parameter learns."""
    torch.manual_seed(0)
    net, images = model.Segmenter(name, 5, width=16), torch.randn(2, 3, 6 * patch, 2 * patch)
    x, maps = net.encoder.embed(images), net.features(images)
    for got, scale, number, stride in zip(maps, net.pyramid, taken, (0.25, 0.5, 1, 2)):
        tokens = nn.Sequential(*net.encoder.blocks[:number])(x)[:, 1:]
        torch.testing.assert_close(got, scale(tokens.mT.unflatten(2, (6, 2))))
        assert got.shape[2:] == (6 / stride, 2 / stride)
    logits, auxiliary = net(images)
    assert logits.shape == auxiliary.shape == (2, 5, 6 * patch, 2 * patch)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    still = {k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"encoder.pos_embed"}


def test_mean_iou_equals_its_definition():
    """IoU, mean accuracy and pixel accuracy by sets of pixels; unlabelled ones do not count, and a
    class that never occurs is left out."""
    labels, found = np.random.default_rng(0).integers(0, 5, (2, 30, 40))
    labels[labels == 3] = 1  # classes 3 and 5 are found, never there; 6 is neither
    there = [labels == c + 1 for c in range(5)]
    seen = [(found == c) & (labels > 0) for c in range(5)]
    iou = [100 * (t & f).sum() / (t | f).sum() for t, f in zip(there, seen)]
    recall = [100 * (there[c] & seen[c]).sum() / there[c].sum() for c in (0, 1, 3)]
    matrix = finetune.confusion(torch.from_numpy(labels).byte(), torch.from_numpy(found), 6)
    got = finetune.iou_scores(matrix)
    assert got["iou"] == pytest.approx([*iou, None]) and iou[2] == 0
    assert [got["miou"], got["macc"]] == pytest.approx([np.mean(iou), np.mean(recall)])
    assert got["aacc"] == pytest.approx(100 * (found == labels - 1).sum() / (labels > 0).sum())


@pytest.mark.parametrize("h, w", [(24, 24), (24, 96), (57, 24), (10, 31), (7, 5)])
def test_sliding_windows_average_what_covers_a_pixel(h, w):
    """Windows two thirds apart, the last one at the border: each pixel is the mean over the windows
    that cover it, here of a model that also tells where in its window a pixel lies."""
    H, W, x = max(h, 24), max(w, 24), torch.randn(1, 3, h, w)
    padded, ramp = F.pad(x, (0, W - w, 0, H - h)), torch.arange(576.0).view(24, 24)
    total, count = torch.zeros(1, 2, H, W), torch.zeros(H, W)

    def net(x):
        return torch.stack([x.mean(1) + ramp, x[:, 0] * ramp], 1)

    for a in {min(a, H - 24) for a in range(0, H, 16)}:
        for b in {min(b, W - 24) for b in range(0, W, 16)}:
            window = ..., slice(a, a + 24), slice(b, b + 24)
            total[window] += net(padded[window])
            count[window] += 1
    torch.testing.assert_close(finetune.sliding_window(net, x, 24), (total / count)[..., :h, :w])


@pytest.mark.parametrize("w, h", [(200, 160), (90, 200), (800, 600)])
def test_a_random_crop_keeps_image_and_mask_together(w, h, tmp_path):
    """A mask that is a function of the image stays it, at any scale, mirrored or not, shrunk while
    decoding or not; outside there are the mean colour and no label. A seed cuts always the same."""
    y, x = np.mgrid[:h, :w]
    red, green, checks = x * 255 // (w - 1), y * 255 // (h - 1), 255 * ((x // 6 + y // 6) % 2)
    image = Image.fromarray(np.stack([red, green, checks], 2).astype(np.uint8))
    mask = Image.fromarray((1 + red // 32 + 8 * (green // 32)).astype(np.uint8))
    image.save(tmp_path / "x.jpg", quality=98, subsampling=0)
    cfg, kinds = recipe("segment", "--image_size=96", "--photometric=0"), set()

    def cut(image, seed, photometric=0.0):
        other = dataclasses.replace(cfg, photometric=photometric)
        return finetune.cut_scene((image, mask), np.random.default_rng(seed), other)

    for seed in range(30):
        with Image.open(tmp_path / "x.jpg") as photo:
            draft, whole = cut(photo, seed), cut(image, seed)
        assert (whole.float() - draft.float()).abs().mean() < 6
        red, green, _, label = whole.long()
        inside = label > 0
        for channel, number in (red, (label - 1) % 8), (green, (label - 1) // 8):
            away = (channel - (32 * number + 16)).abs()[inside]
            assert (away <= 16 + 6).all() and (away <= 16).float().mean() > 0.9
        assert (whole[:3, ~inside] == torch.tensor(finetune.MEAN_COLOUR)[:, None]).all()
        kinds.add((bool(inside.all()), bool(red[0, 0] < red[0, int(inside[0].sum()) - 1])))
    assert len(kinds) == 4  # with and without padding, mirrored and not
    assert torch.equal(cut(image, 1, 1.0), cut(image, 1, 1.0))
    assert not torch.equal(cut(image, 1, 1.0), cut(image, 1))


def test_the_loss_counts_each_labelled_pixel_alike():
    """Cross-entropy by a float64 loop over the labelled pixels, divided by the number of all, and
    0.4 of the auxiliary head's; where no pixel has a label the gradient is 0."""
    logits, labels = rand(2, 3, 4, 5).requires_grad_(), torch.randint(0, 4, (2, 4, 5)).byte()
    labels[0, 0] = 0
    one, two = (sum(-x[b, :, i, j].log_softmax(0)[labels[b, i, j].long() - 1]
                    for b, i, j in labels.nonzero().tolist()) / 40 for x in (logits, 2 * logits))
    batch = torch.cat([torch.zeros(2, 3, 4, 5).byte(), labels[:, None]], 1)
    got = finetune.segmenter_loss(CPU)(lambda x: (logits, 2 * logits), batch, None)
    torch.testing.assert_close(got, one + 0.4 * two)
    grad, = torch.autograd.grad(finetune.pixel_loss(logits, 0 * labels), logits)
    assert (grad == 0).all()


def test_two_classes_are_learned_and_measured(scenes, tmp_path):
    """In seconds a segmenter, begun with a classifier's weights, tells ellipses from ground. The
    score is that of a plain loop, on two processes too; pictures show truth and prediction."""
    save_classifier(tmp_path / "classifier.pt", ["ant", "bee"])
    rows = tune(tmp_path, scenes, *SCENES, f"--init={tmp_path}/classifier.pt", "--epochs=20",
                "--warmup_epochs=2", "--lr=8e-3", "--layer_decay=1", "--log_every=40",
                "--eval_epochs=20")
    flags = ["--bench=miou", f"--ckpt={tmp_path}/model.pt", f"--data={scenes}", "--pictures=2"]
    got = json.loads(torchrun("evaluate.py", *PLAIN, *flags))
    net, _ = evaluate.load_model(config(*flags, script=evaluate), CPU, segments=True)
    source, matrix = finetune.Scenes(str(scenes), "validation", 2), np.zeros((2, 2))
    for i in range(5):
        with source.open(i) as (image, mask), torch.no_grad():
            x, y = crop.to_tensor(image)[None] / 255, np.array(mask)
            w, h = finetune.rescaled_size(*image.size, 32)
            x = F.interpolate(x, (h, w), mode="bilinear", antialias=True)
            logits = finetune.sliding_window(net, crop.normalize(x), 32)
        best = F.interpolate(logits, y.shape, mode="bilinear").argmax(1)[0].numpy()
        np.add.at(matrix, (y[y > 0] - 1, best[y > 0]), 1)
    iou = 100 * matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert got["miou"] > 85 and got["n"] == 5
    assert got["miou"] == pytest.approx(iou.mean(), abs=1e-3)
    assert got["miou"] == pytest.approx(rows[-1]["miou"], abs=1e-3)
    picture = np.asarray(Image.open(tmp_path / "miou_00004.png"))  # of 40 x 64 pixels
    truth, found = picture[3:, 40:80], picture[3:, 80:]
    assert {tuple(c) for c in truth.reshape(-1, 3).tolist()} == {(128, 0, 0), (0, 128, 0)}
    assert (truth == found).all(2).mean() > 0.9 and len(list(tmp_path.glob("miou_*.png"))) == 2


def test_no_class_fills_a_crop_if_ten_tries_find_another():
    """At most 75% of the labelled pixels are of one class where such a place is easily found."""
    mask = np.ones((64, 256), np.uint8)
    mask[:, 160:] = 2
    mask[:20] = 0
    pair, full = (Image.new("RGB", (256, 64)), Image.fromarray(mask)), []
    for ratio in 0.75, 1:
        cfg = recipe("segment", "--image_size=64", "--scale=1,1", f"--cat_max_ratio={ratio}")
        crops = [finetune.cut_scene(pair, np.random.default_rng(seed), cfg) for seed in range(60)]
        counts = [x[3].flatten().bincount(minlength=3)[1:] for x in crops]
        full.append(sum(n.max() > 0.75 * n.sum() for n in counts))
    # one place in six is good: 60 x (5/6)^10 = 10 crops find none, or 50 without looking
    assert full[0] <= 15 and full[1] > 40


def test_an_images_shorter_side_is_brought_to_512():
    """But never the longer one beyond 2,048 (mmsegmentation)."""
    for sides, fitted in (((683, 512), (683, 512)), ((300, 600), (512, 1024)),
                          ((6000, 1000), (2048, 341)), ((9000, 1), (2048, 1))):
        assert finetune.rescaled_size(*sides, 512) == fitted


def test_upernet_equals_the_figure():
    """UperNet [70] written out: pooling to 1, 2, 3 and 6 places, top-down sums, fusion."""
    torch.manual_seed(0)
    head, up = model.UperNet(8, 3, 4).eval(), partial(F.interpolate, mode="bilinear")
    *finer, x = [torch.randn(2, 8, 24 // 2**k, 16 // 2**k) for k in range(4)]
    pooled = [up(conv(F.adaptive_avg_pool2d(x, n)), (3, 2))
              for conv, n in zip(head.pools, (1, 2, 3, 6))]
    p4 = head.bottleneck(torch.cat([x, *pooled], 1))
    p3 = head.laterals[2](finer[2]) + up(p4, (6, 4))
    p2 = head.laterals[1](finer[1]) + up(p3, (12, 8))
    p1 = head.laterals[0](finer[0]) + up(p2, (24, 16))
    levels = [p4, head.smooth[2](p3), head.smooth[1](p2), head.smooth[0](p1)]
    expected = head.fuse(torch.cat([up(level, (24, 16)) for level in levels], 1))
    torch.testing.assert_close(head([*finer, x]), expected)


# ------------------------------------------------------------------------------- 10. survival

def spawn(*flags, launch=()):
    """Start pretrain.py in the background."""
    return subprocess.Popen([sys.executable, *launch, "pretrain.py", *TINY, *flags], cwd=HERE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(step, out, process, name="log.jsonl"):
    """Wait until a run at work has a file of that name and has logged a step."""
    log, end = out / "log.jsonl", time.monotonic() + 120
    while not (out / name).exists() or f'"step": {step},' not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            process.terminate()
            raise AssertionError(process.communicate()[1])
        time.sleep(0.002)


def finish(out, *flags):
    """End a run in this process, on one thread as in spawn -> its rows and the checksum of its
    encoder: what must not depend on interruptions."""
    torch.set_num_threads(1)
    return demo(out, *flags), zlib.crc32((out / "encoder.pt").read_bytes())


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The flags of a run of 35 steps, its folder, and how it ends when nothing interrupts it."""
    root = tmp_path_factory.mktemp("long")
    save_images(root / "images", 76)
    flags = [f"--data={root / 'images'}", "--epochs=5", "--log_every=3", "--eval_every=8"]
    return flags, root / "out", finish(root / "out", *flags)


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path, long):
    """Ended by kill -9, then by SIGUSR1, a run gives encoder and log of the uninterrupted run bit
    for bit. The signal lets it finish its step, save and leave with status 75. While it is at work
    a second one in its folder refuses."""
    for number, logged in ((signal.SIGKILL, 6), (signal.SIGUSR1, 18)):
        process = spawn(*long[0], f"--out={tmp_path}", "--workers=1", "--save_every=4")
        wait_for(logged, tmp_path, process)
        if number == signal.SIGUSR1:
            with pytest.raises(InputError, match="another run"):
                demo(tmp_path, *long[0])
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
        step = pretrain.load_checkpoint(tmp_path / "ckpt.pt")["step"]
        assert number == signal.SIGKILL or step >= logged
        assert process.returncode == (-9 if number == signal.SIGKILL else os.EX_TEMPFAIL), message
    assert finish(tmp_path, *long[0]) == long[2]


def test_handlers_and_lock_are_given_back(classes3, tmp_path):
    """After main, signals do what they did and the folder is free: two runs fit into a process."""
    stoppers = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
    before = [signal.getsignal(number) for number in stoppers]
    with pretrain.at_work(tmp_path, CPU):
        assert not {signal.getsignal(number) for number in stoppers} & {*before}
    for steps in 1, 2:
        demo(tmp_path, f"--data={classes3}", f"--max_steps={steps}")
        assert [signal.getsignal(number) for number in stoppers] == before
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert command("-c", code, str(tmp_path / "lock")).returncode == 0


def test_a_signal_that_comes_twice_is_one_and_a_later_one_ends_at_once(tmp_path):
    """torchrun passes on what all processes may have got: within two seconds that is one signal."""
    code = ("import pretrain, signal, sys, test_cim\n"
            "with pretrain.at_work(sys.argv[1], test_cim.CPU) as signals:\n"
            "    for wait in 0, 1, 3:\n"
            "        signals[:] = [noted - wait for noted in signals]\n"
            "        signal.raise_signal(signal.SIGTERM)\n"
            "        print(bool(signals), flush=True)\n")
    result = command("-c", code, str(tmp_path))
    assert (result.stdout, result.returncode) == ("True\nTrue\n", -signal.SIGTERM), result.stderr


def test_a_stopped_run_does_not_wait_for_python_to_shut_down():
    """A thread of gloo can abort it then: torchrun would see -6 in place of 75."""
    result = command("-c", "import atexit, pretrain, sys; atexit.register(print, 'too late')\n"
                           "pretrain.run(lambda: sys.exit(pretrain.STOPPED))")
    assert (result.returncode, result.stdout) == (75, ""), result.stderr


@pytest.mark.soak
def test_thirty_kills_at_any_moment(tmp_path, long):
    """The same with 1050 steps and 30 kills, some amid a save: the checkpoint is always whole."""
    flags, out, ends = [*long[0], "--epochs=150"], tmp_path / "out", set()
    for kill in range(30):
        process = spawn(*flags, f"--out={out}", "--save_every=1", f"--workers={kill % 2}")
        time.sleep(random.uniform(0.5, 9))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL), process.stderr.read()
        saved = pretrain.load_checkpoint(out / "ckpt.pt")
        ends.add(saved["step"] if saved else 0)
    assert len(ends) >= 5 and finish(out, *flags) == finish(tmp_path / "whole", *flags)


def test_torchrun_restarts_stops_and_changes_its_size(tmp_path, long):
    """When process 0 of two is killed while it writes a checkpoint, torchrun starts both again from
    the one before. A SIGTERM to process 1 then ends both after the same step. One process ends the
    run of two: equal to float rounding."""
    process = spawn(*long[0], f"--out={tmp_path}", "--save_every=1", launch=[
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"])
    for k, number, logged in ((0, signal.SIGKILL, 6), (1, signal.SIGTERM, 18)):
        wait_for(logged, tmp_path, process, "ckpt.pt.tmp")
        children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        os.kill(int(children[k]), number)
    message = process.communicate(timeout=120)[1]
    assert process.returncode and "exitcode: -9" in message, message
    assert re.search(r"exitcode *: 75", message), message
    losses = [[row["loss"] for row in rows] for rows, _ in (finish(tmp_path, *long[0]), long[2])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (load(out / "encoder.pt") for out in (long[1], tmp_path))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_processes_that_find_different_checkpoints_refuse(tmp_path, long, monkeypatch):
    """Where --out is not shared, one machine would begin anew and another one would go on."""
    monkeypatch.setattr(pretrain.Machine, "max", lambda self, number: max(number, 3))
    with pytest.raises(InputError, match="all machines share"):
        demo(tmp_path, *long[0])


def test_the_log_follows_the_checkpoint(tmp_path, long, monkeypatch):
    """A step's checkpoint precedes its row. A run that ends between the two, while it measures,
    goes on with measuring; a row that was cut short is written again."""
    flags, out = [*long[0], "--log_every=1", "--eval_every=4", "--max_steps=4"], tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pretrain.HeldOut, "evaluate", lambda *_: 1 / 0)
        demo(out, *flags)
    assert pretrain.load_checkpoint(out / "ckpt.pt")["step"] == 4
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 4, "ep')
    assert finish(out, *flags) == finish(tmp_path / "whole", *flags)


# -------------------------------------------------------------------- 11. files and bad input

@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of files and folders that fit nothing."""
    root, image = tmp_path_factory.mktemp("odd"), Image.new("RGB", (5, 7))
    save_classifier(root / "model.pt", ["ant", "bee", "cat"])
    for folder in ("loose", "splits/Train", "splits/Test", "y/ant", "y/bee",
                   "x/train/ant", "x/train/bee", "x/val/ant", "x/val/dog"):
        save_images(root / folder, 8)
    for kind, size, label in (("turned", (7, 5), 1), ("large", (5, 7), 3), ("alone", (5, 7), 1),
                              ("one", (5, 7), 1)):
        for name in "training/0", "training/1", "training/2", "training/3", "validation/0":
            save_scene(root / kind, name, image, Image.new("L", size, label))
    os.remove(root / "alone" / "images" / "training" / "2.jpg")
    return root


@pytest.mark.parametrize("run, flags, words", [
    (demo, "--preset=dmeo", "imagenette"),
    (demo, "--scale=0.5", "--scale"),
    (demo, "--scale=0.4,1", "0.300"),
    (demo, "--batch_size=30000", "at most 16000"),
    (demo, "--data=/no/such", "/no/such"),
    (demo, "--out=", "--out"),
    (demo, "--data={odd}/loose --batch_size=4 --out={odd}/loose/x", "among the images"),
    (demo, "--data={odd}/splits", "call them train and val"),
    (demo, "--steps=5", "--epochs and --steps"),
    (demo, "--rotation=-45", "rotation"),
    (demo, "--eval_every=0 --batch_size=0", "--batch_size, --eval_every: at least 1"),
    (tune, "--recipe=resnet50_100 --init={odd}/model.pt", "is for resnet50"),
    (demo, "--out={odd}/model.pt/x", "no folder to write to"),
    (tune, "--init={odd}/none.pt", "none.pt"),
    (tune, "--data={odd}/y --micro_batch=1 --batch_size=2 --mixup=0.8", "two images"),
    (tune, "--data={odd}/y --micro_batch=1 --batch_size=2 --frozen=true", "two images"),
    (tune, " ".join(SCENES) + " --data={odd}/one --max_steps=1", "fewer than two classes"),
    (score, "--ckpt={odd}/model.pt --bench=knn --data={odd}/x", "is a fine-tuned classifier"),
    (score, "--ckpt={odd}/model.pt --data={odd}/x --out={odd}/model.pt/x", "no folder to write to"),
    (tune, "--init={odd}/model.pt --model=vit_t16", "vit_d8"),
    (tune, "--data={odd}/loose", "loose"),
    (tune, "--data={odd}/x", "dog"),
    *((tune, " ".join(SCENES) + " --data={odd}/" + kind, words)
      for kind, words in dict(alone="training/2", turned=".png", large=".png").items()),
    (score, "--ckpt=/no/model.pt --data={odd}/x", "no/model.pt"),
    (score, "--ckpt={odd}/model.pt --bench=imagenet_r --data={odd}/x", "dog")])
def test_what_cannot_work_is_named(run, flags, words, odd, tmp_path, capsys):
    """A wrong name, type, choice, combination, folder, file or mask is an error that names it.
    argparse's status is 2."""
    data = [odd] if run is tune else []
    with pytest.raises((SystemExit, InputError)) as error:
        run(tmp_path / "out", *data, *flags.format(odd=odd).split())
    assert words in str(error.value) + capsys.readouterr().err
    assert isinstance(error.value, InputError) or error.value.code == 2


def test_batches_are_divided_evenly():
    """A batch is divided over the processes, a process's share into micro-batches of at most
    --micro_batch images, of which some may have one less."""
    three = dataclasses.replace(CPU, world=3)
    for batch, micro, sizes in (96, 256, [32]), (12288, 256, [256] * 16), (96, 9, [8] * 4), (
            111, 16, [13, 12, 12]):
        cfg = config(f"--batch_size={batch}", f"--micro_batch={micro}")
        plan = pretrain.make_plan(cfg, three, 20_000)
        assert [len(b) for b in pretrain.micro_batches(cfg, plan, 0, [0])] == sizes
        assert plan.accumulate == len(sizes)
    with pytest.raises(InputError):
        pretrain.make_plan(config("--batch_size=32"), three, 20_000)


def test_unreadable_images_are_replaced_and_named(tmp_path, capfd, monkeypatch):
    """A torn JPEG and a text are named once each, and the next image is cropped by the random
    numbers of the bad one. After an error of the disk an image is tried again, a second later. Ten
    bad ones in a row are an error, one sentence also from a loader's worker."""
    train, flags = tmp_path / "train", [f"--data={tmp_path}", "--workers=1"]
    save_images(train, 36)
    save_images(tmp_path / "val", 2)
    (train / "003.jpg").write_bytes((train / "003.jpg").read_bytes()[:300])
    (train / "004.jpg").write_text("no image")
    demo(tmp_path / "one", *flags, "--max_steps=9")
    warnings = capfd.readouterr().err
    for name in "003", "004":
        assert warnings.count(f"cannot read '{train / name}.jpg'") == 1, warnings
    source, waits = crop.Folder(str(train)), []

    def busy(i):
        if i == 5 and not waits:
            raise OSError(errno.EIO, "the disk is busy")
        return crop.Folder.open(source, i)

    monkeypatch.setattr(source, "open", busy)
    monkeypatch.setattr(crop.time, "sleep", waits.append)
    context, number = samples(source, 36, 32)[0, 3]
    with Image.open(train / "005.jpg") as image:
        expected = crop.cut_context(image, np.random.default_rng((0, 3, 0, 3)), 32)
    assert number == 5 and torch.equal(context, expected) and waits == [1]
    for path in train.iterdir():
        path.write_text("no image")
    result = command("pretrain.py", *TINY, *flags, f"--out={tmp_path / 'two'}")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("pretrain.py: ten images in a row") == 1, result.stderr


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    """A pickle that would run code is an error, and it is not run."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    demo(tmp_path, "--max_steps=1")
    path = tmp_path / "ckpt.pt"
    torch.save(load(path) | dict(step=Evil()), path)
    with pytest.raises(pickle.UnpicklingError):
        demo(tmp_path)
    with pytest.raises(InputError, match="ckpt.pt"):
        score(tmp_path, "--bench=knn", f"--ckpt={path}", "--data=shapes")
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_of_another_run_names_the_fields(tmp_path, classes3):
    """Other values are an error that names them, and so are another number of images and other
    classes. Flags of the machine may change, and the spelling of the data's folder."""
    photos, out, names = tmp_path / "photos", tmp_path / "out", tmp_path / "names.txt"
    save_images(photos, 20)
    demo(out, f"--data={photos}", "--max_steps=1")
    with pytest.raises(InputError, match=r"lr \(0.004 there, 0.5 here\), model \(vit_d8 there, "):
        demo(out, f"--data={photos}", "--max_steps=2", "--lr=0.5", "--model=vit_t16")
    demo(out, f"--data={tmp_path}/out/../photos/", "--max_steps=2", "--micro_batch=4",
         "--workers=1", "--save_every=7")
    (photos / "003.jpg").unlink()
    with pytest.raises(InputError, match=r"images \(20 there, 19 here\)"):
        demo(out, f"--data={photos}", "--max_steps=3")
    flags = f"--classes={names}", f"--data={classes3}", "--max_steps=1"
    for run in partial(demo, tmp_path / "pre"), partial(tune, tmp_path / "fine", classes3):
        names.write_text("ant\nbee")
        run(*flags)
        names.write_text("bee\ncat")
        with pytest.raises(InputError, match=r"classes \(\['ant', 'bee'\] there, \['bee', "):
            run(*flags)


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    """The next row or checkpoint ends the run and names its step; the checkpoint of a step before
    is not overwritten."""
    with pytest.raises(InputError, match="step 2 .* not finite"):
        demo(tmp_path, "--lr=1e15", "--warmup_epochs=0", "--log_every=7", "--save_every=1")
    assert pretrain.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1
    assert [row["step"] for row in read_log(tmp_path)] == [1]
    assert not (tmp_path / "encoder.pt").exists()


def test_a_full_gpu_memory_is_named_with_half_the_micro_batch(tmp_path, classes3, monkeypatch):
    """And the same command with it goes on: the micro-batch may change."""
    with monkeypatch.context() as patch, pytest.raises(InputError, match="--micro_batch=4$"):
        patch.setattr(model.CIM, "forward", partial(raises, torch.OutOfMemoryError))
        demo(tmp_path, f"--data={classes3}", "--max_steps=1")
    demo(tmp_path, f"--data={classes3}", "--max_steps=1", "--micro_batch=4")


def test_a_run_leaves_what_the_design_says(tmp_path):
    """The first and the last step are logged; measures stand in the rows where held-out images were
    looked at. The first loss is ln 2. config.json names the encoder that is in encoder.pt."""
    rows = demo(tmp_path, "--max_steps=5", "--log_every=3", "--eval_every=4")
    keys = {"step", "epoch", "loss", "lr", "tau", "grad_norm"}
    more = {"heldout_loss", "baseline", "skill", "skill_swapped", "iou", "iou_average", "n"}
    assert [(row["step"], row.keys()) for row in rows] == [
        (1, keys), (3, keys), (4, keys | more), (5, keys | more)]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=0.02)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "config.json", "log.jsonl", "ckpt.pt", "encoder.pt", "target.pt", "maps.png", "curves.png",
        "lock", "maps", "maps/0000004.png", "maps/0000005.png"}
    name = json.loads((tmp_path / "config.json").read_text())["model"]
    model.build_encoder(name).load_state_dict(load(tmp_path / "encoder.pt"))


def test_crop_is_a_command(tmp_path, monkeypatch):
    """`python crop.py PHOTO` writes a contact sheet."""
    save_images(tmp_path, 1, size=(300, 200))
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["crop.py", f"{tmp_path}/000.jpg", f"--out={sheet}"])
    crop.main()
    assert Image.open(sheet).width > 1000


def test_bench_prints_one_json_line(tmp_path, capsys):
    """--bench ends with one JSON object on standard output, kept as bench.json, whose numbers fit
    together; the files of a run in its folder stay."""
    demo(tmp_path, "--max_steps=1")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.*")}
    pretrain.main([*TINY, "--data=none", "--bench=2", f"--out={tmp_path}"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert all(f.read_bytes() == content for f, content in before.items())
    assert (report["bench"], report["n"], report["processes"]) == ("pretrain", 2, 1)
    assert report["images_per_s"] == pytest.approx(8 / report["step_s"])
    gflop = pretrain.gflop_per_image(config(*TINY))
    assert report["tflops"] == pytest.approx(gflop * report["images_per_s"] / 1e3)
    assert report["share_of_matmul"] < 1.5 and 0.1 < report["peak_memory_gb"] < 30
    assert (report["device"][:3], report["dtype"], report["compile"]) == ("cpu", "float32", False)
    assert 0 <= report["data_wait"] < 1


def test_every_command_of_the_readme_parses():
    """Every command in a block or a code span of the README and docs/ is one that its script takes,
    and the flags of every span of flags with values are those of one script."""
    scripts = {"pretrain": pretrain, "finetune": finetune, "evaluate": evaluate}
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    commands = re.findall(r"\b(pretrain|finetune|evaluate)\.py (--[^#&|\n]*)",
                          "\n".join([blocks, *spans]))
    assert {name for name, _ in commands} == scripts.keys()
    for name, flags in commands:
        if flags.strip() != "--help":
            config(*flags.split(), script=scripts[name])
    for flags in spans:
        if re.match(r"--\w+=", flags) and not re.match("--(nproc|nnodes|max_restarts)", flags):
            names = set(re.findall(r"--(\w+)", flags))
            assert any(names <= vars(config(script=s)).keys() for s in scripts.values()), flags


def test_pre_training_begins_with_weights(tmp_path):
    """--init puts the encoder of a file, here under a wrapper's names, into online and target; at a
    rate of 0 it stays. --model has to be that of the file."""
    torch.manual_seed(5)
    state = model.build_encoder("vit_d8").state_dict()
    path = tmp_path / "given.pt"
    torch.save(dict(state_dict={f"module._orig_mod.{k}": v for k, v in state.items()}), path)
    demo(tmp_path, f"--init={path}", "--lr=0", "--max_steps=1")
    for name in "encoder.pt", "target.pt":
        found = torch.load(tmp_path / name, weights_only=True)
        assert all(torch.equal(found[k], v) for k, v in state.items())
    with pytest.raises(InputError, match="--model=vit_d8"):
        demo(tmp_path / "other", f"--init={path}", "--model=vit_t16")


def test_curves_are_drawn_to_scale(tmp_path):
    """The last points of a loss and of a skill lie where they should between 0 and the largest
    value, and a gray line at 0; rows without a score do not count."""
    rows = [dict(step=1, loss=0.8), dict(step=5, loss=0.5, skill=-1),
            dict(step=9, loss=0.4, skill=1)]
    picture = crop.curves(rows)
    for x, y, colour in ((620, 130, crop.COLOURS[0]), (620, 280, crop.COLOURS[1]),
                         (200, 220, "#bbbbbb"), (200, 370, "#bbbbbb")):
        assert picture.getpixel((x, y)) == tuple(bytes.fromhex(colour[1:]))


def test_features_are_the_encoders_and_neighbours_the_nearest(tmp_path):
    """features.npz has the pooled tokens of every readable image, of length 1, by name. A row of
    neighbours.png is the image itself and what is nearest by a plain loop."""
    save_images(tmp_path / "photos", 8, size=(90, 70))
    (tmp_path / "photos" / "bad.jpg").write_text("no photo")
    torch.manual_seed(0)
    encoder = model.build_encoder("vit_d8").eval()
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    got = score(tmp_path, "--bench=features", "--size=32", f"--ckpt={tmp_path}/encoder.pt",
                f"--data={tmp_path}/photos")
    table = np.load(tmp_path / "features.npz")
    images = [crop.cut_centre(Image.open(name), None, 32) for name in table["names"]]
    with torch.no_grad():
        tokens = encoder(crop.normalize(torch.stack(images) / 255))[:, 1:]
    want = F.normalize(tokens.mean(1)).numpy()
    assert (got["n"], got["width"]) == want.shape == (8, 64)
    np.testing.assert_allclose(table["features"], want, atol=1e-5)
    order = np.argsort(-want[0] @ want.T)
    side, sheet = evaluate.TILE, np.asarray(Image.open(tmp_path / "neighbours.png"))
    assert sheet.shape == (6 * side, 6 * side, 3)
    for k, i in enumerate(order[:6]):
        tile = crop.cut_centre(Image.open(table["names"][i]), None, side).permute(1, 2, 0)
        assert (sheet[:side, k * side:(k + 1) * side] == tile.numpy()).all()
    assert Image.open(tmp_path / "pca.png").size == (6 * side, 2 * side)


def follow(commands):
    """Run printed commands in this process, two steps of what trains; -> what they print."""
    for words in map(shlex.split, commands):
        script = dict(pretrain=pretrain, finetune=finetune, evaluate=evaluate)[words[1][:-3]]
        script.main([*words[2:], *PLAIN, *["--max_steps=2"][:script != evaluate]])


@pytest.mark.parametrize("section", ["Quick start", "Your photos"])
def test_a_newcomers_commands_work(section, tmp_path, monkeypatch, capsys):
    """The commands of the README's section, one after the other, and every command that a run
    prints as the next one; the photos are 40, in a flat folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crop.Shapes, "SIZES", {"train": 320, "val": 64})
    save_images(tmp_path / "photos", 40)
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    commands = re.findall(r"^python \w+\.py --.*", text, re.M)
    follow(commands)
    printed = re.findall(r"^python \w+\.py --.*", capsys.readouterr().out, re.M)
    assert len(commands) >= 3 and len(printed) == 2
    follow(printed)
    assert {"curves.png", "maps.png"} <= {path.name for path in tmp_path.rglob("*.png")}


def test_what_a_run_prints_as_next_works_as_printed(tmp_path, classes3, capsys):
    """Also with spaces in the paths; it keeps to the class folders of the run."""
    data, kept = shutil.copytree(classes3, tmp_path / "my data"), tmp_path / "my classes"
    kept.write_text("\n".join(sorted(os.listdir(data / "val"))[:2]))
    demo(tmp_path / "my run", f"--data={data}", f"--classes={kept}", "--max_steps=1")
    printed = re.findall(r"^python .*", capsys.readouterr().out, re.M)
    follow(printed)
    count = sum(len(os.listdir(data / "val" / name)) for name in kept.read_text().split())
    scores = [json.loads((tmp_path / "my run" / name).read_text())["n"]
              for name in ("maps.json", "features.json")]
    assert len(printed) == 2 and scores == [count, count]


def test_a_run_survives_a_closed_output(classes3, tmp_path, monkeypatch):
    """When nobody reads what a run prints (`| head -1`), it goes on to its end."""
    gone = partial(raises, BrokenPipeError)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=gone, flush=gone))
    demo(tmp_path, f"--data={classes3}", "--max_steps=1")
    assert (tmp_path / "encoder.pt").exists()


# ------------------------------------------------------------------- 12. compilation and GPUs

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")


def test_each_block_is_compiled_once(monkeypatch):
    """Blocks of any drop path are one graph, which DDP does not cut where a bucket of 25 MB ends.
    """
    from torch._dynamo.testing import CompileCounter
    counter, compile_ = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(compile_, backend=counter))
    machine = dataclasses.replace(CPU, world=2, compile=True)
    blocks = nn.Sequential(*(model.Block(768) for _ in range(2)))
    for i, block in enumerate(blocks):
        block.drop_path = model.DropPath(0.1 * i)
    x = torch.randn(1, 2, 768, requires_grad=True)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        pretrain.accelerate(blocks, machine)(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert counter.frame_count == 1


def test_upsampling_equals_torchs():
    """Two matrix products equal F.interpolate in float64, to 1e-14, and so does their gradient."""
    for h, size in (10, 160), (8, 64), (5, 12), (6, 4):
        y = rand(2, 3, h, h, seed=h).requires_grad_()
        outs = model.upsample(y, size), F.interpolate(y, size=(size, size), mode="bilinear")
        weights = rand(2, 3, size, size, seed=1)
        grads = [torch.autograd.grad((out * weights).sum(), y)[0] for out in outs]
        for a, b in (outs, grads):
            assert (a - b).abs().max() < 1e-14 * size
    with torch.autocast("cpu", torch.bfloat16):
        assert model.upsample(y.float(), 4).dtype == torch.float32
        torch.testing.assert_close(model.upsample(y.float(), 4), outs[0].float())


def on_fake_gpu(net, device):
    """A module with its tensors replaced by fake ones on the device; shared ones stay shared."""
    memo = {}
    for table in (t for m in net.modules() for t in (m._parameters, m._buffers)):
        for name, old in table.items():
            if old is not None and id(old) not in memo:
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                memo[id(old)] = (nn.Parameter(new, old.requires_grad)
                                 if isinstance(old, nn.Parameter) else new)
            table[name] = None if old is None else memo[id(old)]
    return net


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine whose GPU is pretended: tensors on it have shapes and dtypes, but no values."""
    if not torch.backends.cuda.is_built():
        pytest.skip("PyTorch is built without CUDA here")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    gpu = torch.device("cuda", 0)
    machine = dataclasses.replace(CPU, device=gpu, dtype="bfloat16", compile=True)
    machine.send = lambda x: torch.empty(x.shape, dtype=x.dtype, device=gpu)
    machine.pretending = torch._subclasses.fake_tensor.FakeTensorMode()
    return machine


def fake_batch(cfg, machine):
    """uint8 contexts and uniform numbers of four images on the fake GPU."""
    return (machine.send(torch.empty(4, 3, 64, 64, dtype=torch.uint8)),
            machine.send(torch.empty(4, cfg.exemplars + 1, crop.UNIFORMS)))


@pytest.mark.parametrize("script, flags", [
    *((pretrain, flags) for flags in [
        "--transforms=both --loss=focal", "--bootstrap=shared --correlation=convolution",
        "--predictor=deconv --loss=balanced", "--decoder=siamfc", "--decoder=siamrpn",
        "--decoder=transt", "--model=resnet50 --transforms=context"]),
    *((finetune, flags) for flags in [
        "--recipe=vit_b --model=vit_d8", "--recipe=resnet50_300 --model=resnet50",
        "--recipe=linear --model=vit_d8", "--recipe=segment --model=vit_d8"])])
def test_a_step_stays_on_the_gpu(script, flags, fake_gpu):
    """On fake CUDA tensors what mixes devices raises, and so does what needs a value on the host.
    Pairs, forward pass under bf16 autocast, clipping, fused optimiser and moving average; a
    backward pass would need a driver."""
    small = "--preset=demo" if script == pretrain else "--image_size=64 --mixup=0 --cutmix=0"
    cfg = config(*small.split(), *flags.split(), script=script)
    net = pretrain.build_model(cfg) if script == pretrain else finetune.build_model(cfg, 3)
    with fake_gpu.pretending:
        on_fake_gpu(net, fake_gpu.device)
        if script == pretrain:
            pairs = pretrain.make_pairs(*fake_batch(cfg, fake_gpu), cfg)
            with fake_gpu.autocast():
                loss, logits = net(*pairs[:3])
            assert logits.dtype == torch.float32
        elif cfg.segments:
            images = torch.empty(4, 4, 64, 64, dtype=torch.uint8)
            loss = finetune.segmenter_loss(fake_gpu)(net, images, None)
        else:
            images, numbers = torch.empty(4, 3, 64, 64, dtype=torch.uint8), torch.empty(4).long()
            loss = finetune.classifier_loss(cfg, [0, 1, 2, 1], 3, fake_gpu)(net, images, numbers)
        assert (loss.device, loss.dtype) == (fake_gpu.device, torch.float32)
        parameters = [p for p in net.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.empty_like(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torch.optim.AdamW(parameters, fused=True).step()
        if script == pretrain:
            net.update_target(0.99)


def test_a_step_compiles_into_four_graphs(fake_gpu, monkeypatch):
    """The pairs, a block for exemplars and for contexts, and the decoder's layer are each compiled
    once and whole: not again in later steps, nor after an evaluation."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, compile = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile",
                        lambda part, **how: compile(part, backend=counter, **how))
    make = torch.compile(pretrain.make_pairs, backend=counter, fullgraph=True, dynamic=False)
    cfg = config("--preset=demo", "--transforms=both")
    cim = pretrain.build_model(cfg)
    with fake_gpu.pretending:
        cim = pretrain.accelerate(on_fake_gpu(cim, fake_gpu.device), fake_gpu)
        for _ in range(3):
            pairs = make(*fake_batch(cfg, fake_gpu), cfg)
            with fake_gpu.autocast():
                cim(*pairs[:3])
            cim.update_target(0.9)
            assert counter.frame_count == 4
            with pretrain.measuring(cim, fake_gpu):
                cim(*(x[:3] for x in pairs[:3]))


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}


@pytest.mark.parametrize("run, flags", [
    (demo, ""), (demo, "--decoder=siamrpn"), (demo, "--decoder=transt"),
    (tune, "--data={classes3}"), (tune, " ".join(SCENES) + " --data={scenes}")])
def test_a_step_without_a_row_asks_for_no_value(run, flags, tmp_path, classes3, scenes,
                                                monkeypatch):
    """Steps 1 and 2 of 0 to 3 neither log nor save: no operation, also of the backward pass, may
    need a value on the host, where a GPU would have to finish first. The profiler sees them all."""
    schedule, profile = pretrain.learning_rate, torch.autograd.profiler.profile()

    def learning_rate(step, *rest):  # the first thing that the loops call in a step
        if step == 1:
            profile.__enter__()
        if step == 3:
            profile.__exit__(None, None, None)
        return schedule(step, *rest)

    for script in pretrain, finetune:
        monkeypatch.setattr(script, "learning_rate", learning_rate)
    flags = flags.format(classes3=classes3, scenes=scenes).split()
    args = [tmp_path] if run == demo else [tmp_path, classes3]
    run(*args, *flags, "--max_steps=4", "--log_every=9", "--batch_size=2",
        *["--eval_epochs=9"][:run == tune])
    found = collections.Counter()
    for event in profile.function_events:
        if event.name in WAITS:
            chain, parent = [event.name], event.cpu_parent
            while parent is not None:
                chain, parent = [parent.name, *chain], parent.cpu_parent
            if not re.search("_fused_adamw_|one_hot|DataLoader", " ".join(chain)):  # on CPUs only
                found[" > ".join(chain)] += 1
    assert any(event.name == "aten::addmm" for event in profile.function_events)
    assert not found


@gpu
def test_pairs_on_a_gpu_equal_those_on_the_cpu():
    """The same uniform numbers give the same pairs on CUDA, eager and compiled."""
    contexts, u = first_images(crop.Shapes("val"), 8, 64), rand(8, 7, crop.UNIFORMS).float()
    expected = crop.make_pairs(contexts, u, 32)
    for pairs in crop.make_pairs, torch.compile(crop.make_pairs, fullgraph=True, dynamic=False):
        for got, want in zip(pairs(contexts.cuda(), u.cuda(), 32), expected):
            assert ((got.cpu() - want).abs() > 1e-3).double().mean() < 1e-3


@gpu
@pytest.mark.parametrize("flags, tolerance", [
    ("", 2e-3), ("--compile=true", 2e-3), ("--compile=true --dtype=bfloat16", 2e-2)])
def test_twenty_steps_on_a_gpu_follow_those_on_the_cpu(flags, tolerance, tmp_path):
    """The loss of each step, in float32 (the patch embedding in TF32, cuDNN's default), compiled,
    and in bf16 (its rounding: 4e-3)."""
    rows = (demo(tmp_path / device, "--max_steps=20", f"--device={device}", "--compile=false",
                 *(flags.split() if device == "cuda" else [])) for device in ("cpu", "cuda"))
    cpu, cuda = ([row["loss"] for row in log] for log in rows)
    assert cuda == pytest.approx(cpu, rel=tolerance)


@gpu
def test_one_process_under_nccl_equals_one_without():
    """DDP, accumulation over two micro-batches and compiled blocks give the same gradients."""
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    plain = dataclasses.replace(CPU, device=torch.device("cuda", 0), compile=True)
    cfg, grads = config(*TINY), []
    for machine in plain, dataclasses.replace(plain, world=2):
        cim, _ = pretrain.build(cfg, machine)
        wrapped = pretrain.accelerate(cim, machine)
        for step, last in (0, False), (1, True):
            contexts = machine.send(first_images(crop.Shapes("val"), 8, 64))
            u = machine.send(pretrain.uniforms(cfg, (4, step), 8))
            with machine.accumulating(wrapped, last):
                wrapped(*pretrain.make_pairs(contexts, u, cfg)[:3])[0].backward()
        grads.append([p.grad for p in cim.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    torch.distributed.destroy_process_group()
