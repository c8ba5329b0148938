"""test_cim.py: the lab book. Each test is one claim, checked against an oracle.

In lecture order: 1. crops (paper 3.2, Figure 3, Table 1); 2. images; 3. the model (Figure 2,
Eqs. 2-7); 4. ablations (Tables 1 to 4, Figure 4); 5. training (Table 9); 6. honesty: does it learn
what it says; 7. transfer (Tables 10, 11); 8. evaluation (Table 8); 9. segmentation (Table 7);
10. survival; 11. files and bad input. Nothing is downloaded, no GPU is needed. `pytest -k map` runs
the tests with "map" in their name; `pytest -m soak` the one that takes long.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import zlib
from fractions import Fraction
from functools import partial

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
TINY = ["--preset=demo", "--device=cpu", "--dtype=float32", "--workers=0", "--batch_size=8",
        "--log_every=1", "--eval_every=0"]
README = open(os.path.join(HERE, "README.md")).read()


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uniform_boxes(count=2000, seed=0, **kw):
    u = rand(count, 6, seed=seed)
    return u, crop.sample_boxes(u, **kw)


def corners(boxes):
    """[..., 6] -> the four corners [..., 4, 2] in fractions of the context's side, by rotation."""
    cx, cy, w, h, a, _ = boxes.unbind(-1)
    out = []
    for sx, sy in [(-1, -1), (1, -1), (1, 1), (-1, 1)]:
        x, y = sx * w / 2, sy * h / 2
        out += [cx + x * a.cos() - y * a.sin(), cy + x * a.sin() + y * a.cos()]
    return torch.stack(out, -1).unflatten(-1, (4, 2))


TABLE_1 = [  # scale, ratio, rotation: every row of Table 1 a-c
    *[(s, (1, 1), 0) for s in [(0.16, 0.16), (0.05, 0.16), (0.16, 1.0), (0.05, 1.0)]],
    *[((0.05, 1.0), (1 / q, q), 0) for q in (4 / 3, 2, 3, 4)],
    *[((0.05, 1.0), (1 / 3, 3), r) for r in (45, 90, 135, 180)],
    ((0.05, 1.0), (1 / 4, 4), 180),
]


# ------------------------------------------------------------------------------------- 1. crops

@pytest.mark.parametrize("scale, ratio, rotation", TABLE_1)
def test_boxes_have_the_area_aspect_and_angle_they_were_drawn_with(scale, ratio, rotation):
    """Figure 3: w h = r0, h / w = r1 and alpha hold exactly, and no box leaves the context."""
    u, boxes = uniform_boxes(scale=scale, ratio=ratio, rotation=rotation)
    cx, cy, w, h, angle, flip = boxes.unbind(-1)
    r1 = ratio[0] * (ratio[1] / ratio[0]) ** u[:, 1]
    torch.testing.assert_close(h / w, r1)
    torch.testing.assert_close(angle, math.radians(rotation) * (2 * u[:, 2] - 1))
    assert (corners(boxes) >= -1e-12).all() and (corners(boxes) <= 1 + 1e-12).all()
    # the largest box of that shape and angle, found by growing it in the middle until it sticks out
    low, high = torch.zeros(len(u)).double(), torch.full((len(u),), 4.0).double()
    for _ in range(60):
        area = (low + high) / 2
        middle, sides = torch.full_like(w, 0.5), [(area / r1).sqrt(), (area * r1).sqrt()]
        grown = torch.stack([middle, middle, *sides, angle, flip], -1)
        inside = ((corners(grown) >= 0) & (corners(grown) <= 1)).flatten(1).all(1)
        low, high = torch.where(inside, area, low), torch.where(inside, high, area)
    largest = low.clamp(max=scale[1])
    torch.testing.assert_close(w * h, scale[0] + (largest - scale[0]) * u[:, 0])
    assert ((flip == -1) == (u[:, 5] < 0.5)).all() and ((flip == 1) | (flip == -1)).all()


def test_area_is_uniform_for_upright_squares_and_small_on_average_by_default():
    """Design: r0 is uniform on [0.05, 1) for squares; by default mean 0.26, 95% below 0.50."""
    _, squares = uniform_boxes(20000, ratio=(1, 1), rotation=0)
    area = (squares[:, 2] * squares[:, 3]).sort().values
    expected = torch.linspace(0.05, 1, len(area)).double()
    assert (area - expected).abs().max() < 0.02  # Kolmogorov-Smirnov distance, 2 standard errors
    _, boxes = uniform_boxes(50000)
    area = boxes[:, 2] * boxes[:, 3]
    assert abs(area.mean() - 0.26) < 0.01 and abs(area.quantile(0.95) - 0.50) < 0.015


@pytest.mark.parametrize("ratio, rotation, largest", [
    ((1 / 3, 3), 180, 0.300), ((1 / 4, 4), 45, 4 / 17), ((1, 1), 90, 0.5), ((1, 1), 0, 1.0),
    ((0.5, 1), 0, 0.5), ((1 / 3, 3), 5, 1 / (math.sqrt(3) * math.cos(math.pi / 36)
                                             + math.sin(math.pi / 36) / math.sqrt(3)) ** 2)])
def test_a_lower_area_that_cannot_fit_is_refused(ratio, rotation, largest):
    """Design 3: at ratio q the worst angle leaves q / (1 + q^2); beyond that is an error."""
    assert crop.largest_area(ratio, rotation) == pytest.approx(largest)
    uniform_boxes(scale=(largest - 1e-6, 1), ratio=ratio, rotation=rotation)
    if largest < 1:
        with pytest.raises(InputError, match="only boxes of area up to"):
            uniform_boxes(scale=(largest + 1e-3, 1), ratio=ratio, rotation=rotation)


@pytest.mark.parametrize("m, n", [(160, 64), (64, 32), (48, 48)])
def test_an_exemplar_shows_the_place_its_box_says(m, n):
    """A context that encodes its own coordinates gives exemplars whose values are the positions
    that theta takes their pixels to."""
    at = (torch.arange(m).double() * 2 + 1) / m - 1
    context = torch.stack([at.expand(m, m), at[:, None].expand(m, m), torch.zeros(m, m)])[None]
    theta = crop.affine_from_boxes(crop.sample_boxes(rand(1, 12, 6), rotation=180.0))
    shown = crop.crop_exemplars(context, theta, n)[0, :, :2]
    to = (torch.arange(n).double() * 2 + 1) / n - 1
    e = torch.stack([to.expand(n, n), to[:, None].expand(n, n), torch.ones(n, n)])  # x, y, 1
    expected = torch.einsum("kij,jab->kiab", theta[0], e)
    pixel = 2 / m
    assert (shown - expected).abs().max() < pixel / 2  # half a pixel at most, at the very border
    inside = expected.abs().amax(1, keepdim=True).expand_as(shown) < 1 - 3 * pixel
    assert inside.any() and (shown - expected)[inside].abs().max() < 1e-6 * pixel


def test_theta_takes_the_exemplar_corners_to_the_box_corners():
    """theta maps (-1, -1) to the box's top left corner, or to its top right one when mirrored."""
    _, boxes = uniform_boxes(rotation=180)
    theta = crop.affine_from_boxes(boxes)
    square = torch.tensor([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]).double()
    got = (torch.einsum("bij,cj->bci", theta, square) + 1) / 2
    mirrored = boxes[:, 5, None, None] < 0
    expected = torch.where(mirrored, corners(boxes)[:, [1, 0, 3, 2]], corners(boxes))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale, ratio, rotation", TABLE_1)
def test_the_map_covers_exactly_the_box_that_was_cut(scale, ratio, rotation):
    """Figure 3: a map is 1 where the pixel's centre lies in the rotated rectangle, else 0; the
    float32 raster equals a float64 point-in-rectangle test of every pixel centre."""
    boxes = crop.sample_boxes(rand(200, 6, dtype=torch.float32), scale, ratio, rotation)
    size = 40
    maps = crop.rasterize_maps(crop.affine_from_boxes(boxes).view(20, 10, 2, 3), size).flatten(0, 1)
    assert maps.unique().tolist() == [0.0, 1.0]
    boxes = boxes.double()[:, :, None, None]
    at = (torch.arange(size).double() + 0.5) / size
    dx, dy = at - boxes[:, 0], at[:, None] - boxes[:, 1]
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    along, across = (dx * cos + dy * sin).abs(), (dy * cos - dx * sin).abs()
    edge = torch.minimum((along - boxes[:, 2] / 2).abs(), (across - boxes[:, 3] / 2).abs())
    expected = (along <= boxes[:, 2] / 2) & (across <= boxes[:, 3] / 2)
    clear = edge > 1e-6  # centres within a millionth of an edge may round either way
    assert clear.float().mean() > 0.999
    assert (maps.bool() == expected)[clear].all()


@pytest.mark.parametrize("m, n", [(160, 64), (64, 32)])
def test_shrinking_a_large_box_does_not_alias(m, n):
    """Large turned boxes of white noise, the worst picture for aliasing, come within 8% (of the
    noise's deviation) of exact area averaging; one bilinear sample a pixel is off by over 20%."""
    noise = rand(8, 3, m, m) - 0.5
    boxes = torch.tensor([[0.5, 0.5, 0.7, 0.8, 0.35, 1], [0.5, 0.5, 0.95, 0.95, 0.03, -1],
                          [0.5, 0.5, 0.6, 0.9, -0.2, 1]]).double()
    theta = crop.affine_from_boxes(boxes).expand(8, 3, 2, 3)

    def average(k, s, mode):  # s * s samples a pixel; 16 * 16 of the nearest pixel are exact enough
        grid = F.affine_grid(theta[:, k], [8, 3, n * s, n * s], align_corners=False)
        return F.avg_pool2d(F.grid_sample(noise, grid, mode, "border", align_corners=False), s)

    ours = crop.crop_exemplars(noise, theta, n)
    for k in range(3):
        exact = average(k, 16, "nearest")
        assert (ours[:, k] - exact).std() < 0.08 * noise.std()
        assert (average(k, 1, "bilinear") - exact).std() > 0.2 * noise.std()


def test_each_transformation_equals_torchvisions():
    """Table 1d: jitter, gray, solarise and blur, drawn per exemplar, equal torchvision's functions
    called one image at a time with the same numbers."""
    x = rand(5, 3, 24, 24, seed=1, dtype=torch.float32)
    u = rand(5, 9, seed=2, dtype=torch.float32)
    off = dict(jitter=0, gray=0, blur=0, solarize=0)
    got = crop.transform(x, u, **{**off, "jitter": 1})
    for i, (_, b, c, s, h, *_) in enumerate(u.tolist()):
        y = TF.adjust_brightness(x[i], 0.6 + 0.8 * b)
        y = TF.adjust_contrast(y, 0.6 + 0.8 * c)
        y = TF.adjust_saturation(y, 0.8 + 0.4 * s)
        y = TF.adjust_hue(y, 0.2 * h - 0.1)
        torch.testing.assert_close(got[i], y, atol=2e-3, rtol=0)  # theirs weigh gray by 0.2989
    torch.testing.assert_close(crop.transform(x, u, **{**off, "gray": 1}),
                               TF.rgb_to_grayscale(x, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(crop.transform(x, u, **{**off, "solarize": 1}), TF.solarize(x, 0.5))
    got = crop.transform(x, u, **{**off, "blur": 1})
    for i in range(5):
        y = TF.gaussian_blur(x[i], 17, 0.1 + 1.9 * u[i, 7].item())
        torch.testing.assert_close(got[i, :, 8:-8, 8:-8], y[:, 8:-8, 8:-8], atol=1e-4, rtol=0)
    assert crop.transform(x, u, **off) is x


def test_each_exemplar_draws_its_own_transformation():
    """A transformation of probability p touches a share p of the exemplars, whatever the others."""
    x = rand(400, 3, 4, 4, dtype=torch.float32)
    u = rand(400, 9, seed=3, dtype=torch.float32)
    for name, p in dict(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2).items():
        only = dict(jitter=0, gray=0, blur=0, solarize=0) | {name: p}
        touched = (crop.transform(x, u, **only) != x).flatten(1).any(1).float().mean()
        assert abs(touched - p) < 0.07, name


@pytest.mark.parametrize("where", ["exemplar", "context", "both", "none"])
def test_transformations_go_where_table_1d_says(where):
    """The context, the exemplars, both or neither are recoloured; maps and boxes never change, and
    exemplars are cut before the context is recoloured."""
    context, u = (rand(3, 3, 32, 32) * 255).byte(), rand(3, 5, crop.UNIFORMS, dtype=torch.float32)
    u[..., 6:] = 0  # all probabilities hit
    plain = crop.make_pairs(context, u, 16, transforms="none")
    got = crop.make_pairs(context, u, 16, transforms=where)
    assert torch.equal(got[2], plain[2]) and torch.equal(got[3], plain[3])
    assert torch.equal(got[0], plain[0]) == (where in ("exemplar", "none"))
    assert torch.equal(got[1], plain[1]) == (where in ("context", "none"))


def test_the_same_numbers_give_the_same_pairs_in_any_grouping():
    """Uniform numbers in, crops out: a batch equals its images one by one."""
    context, u = (rand(4, 3, 64, 64) * 255).byte(), rand(4, 7, crop.UNIFORMS, dtype=torch.float32)
    whole = crop.make_pairs(context, u, 32)
    for i in range(4):
        alone = crop.make_pairs(context[i:i + 1], u[i:i + 1], 32)
        for a, b in zip(whole, alone):
            torch.testing.assert_close(a[i:i + 1], b, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------ 2. images

def save_images(folder, count, size=(70, 60), ext=".jpg", seed=0):
    """Small smooth pictures, different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.BICUBIC).save(folder / f"{i:03d}{ext}")


def contexts_of(source, indices, size, seed):
    return crop.Samples(source, indices, seed, partial(crop.cut_context, size=size))


def test_shapes_are_a_function_of_the_index_and_splits_are_disjoint():
    """Scene i is always the same; no scene of train is in val; labels cover the classes evenly."""
    train, val = crop.Shapes("train"), crop.Shapes("val")
    scenes = [np.asarray(train.open(i)).tobytes() for i in range(60)]
    assert scenes == [np.asarray(crop.Shapes("train").open(i)).tobytes() for i in range(60)]
    assert not set(scenes) & {np.asarray(val.open(i)).tobytes() for i in range(60)}
    assert len(set(scenes)) == 60
    assert np.bincount(val.labels).tolist() == [len(val) // 8] * 8 and len(train.classes) == 8


def test_a_folder_is_read_at_any_depth_through_links_that_may_loop(tmp_path):
    """Extensions count in any case, links are followed, loops end, classes are the first level."""
    save_images(tmp_path / "b" / "deep" / "er", 2, ext=".JPG")
    save_images(tmp_path / "a", 1, ext=".png")
    save_images(tmp_path / "elsewhere", 1)
    (tmp_path / "elsewhere").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "c").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images = crop.Folder(str(tmp_path))
    assert images.paths == ["a/000.png", "b/deep/er/000.JPG", "b/deep/er/001.JPG", "c/000.jpg"]
    assert images.classes == ["a", "b", "c"] and images.labels == [0, 1, 1, 2]
    some = crop.Folder(str(tmp_path), ["c", "a"])
    assert some.paths == ["a/000.png", "c/000.jpg"] and some.labels == [1, 0]


@pytest.mark.parametrize("layout", ["train+val", "train", "flat"])
def test_what_is_held_out_is_never_trained_on(tmp_path, layout):
    """With train/ and val/, val is held out; else a seeded slice, the same one every time."""
    for part in layout.split("+") if layout != "flat" else ["x"]:
        save_images(tmp_path / part, 60 if part != "val" else 5)
    (train, rows), (val, held), sentence = crop.train_and_val(str(tmp_path), seed=1)
    names, out = {train.name(i) for i in rows}, {val.name(i) for i in held}
    assert not names & out and str(len(held)) in sentence
    assert (len(names), len(out)) == ((60, 5) if layout == "train+val" else (57, 3))
    assert crop.train_and_val(str(tmp_path), seed=1)[1][1] == held


@pytest.mark.parametrize("mode, colour", [("RGB", (200, 100, 50)), ("L", 128), ("P", 7), ("1", 1),
                                          ("LA", (128, 255)), ("RGBA", (200, 100, 50, 255)),
                                          ("CMYK", (0, 128, 200, 30)), ("I;16", 128 * 257),
                                          ("I", 128 * 257), ("F", 128.0)])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, colour):
    """CMYK, palette, 16-bit, gray, alpha and bilevel files give the colour that they show."""
    path = tmp_path / {"CMYK": "x.jpg", "F": "x.tif", "I": "x.tif"}.get(mode, "x.png")
    Image.new(mode, (40, 30), colour).save(path)
    with Image.open(path) as image:
        got = crop.cut_context(image, np.random.default_rng(0), 16)
        expected = crop.to_rgb(Image.open(path)).getpixel((0, 0))
    assert got.shape == (3, 16, 16) and got.dtype == torch.uint8
    assert (got.float() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2
    if mode in ("L", "LA", "I;16", "I", "F"):
        assert expected == (128, 128, 128)
    if mode in ("RGB", "RGBA"):
        assert expected == (200, 100, 50)
    assert crop.to_rgb(Image.new("RGBA", (2, 2), (9, 9, 9, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(500, 1), (1, 300), (1, 1), (3, 2)])
def test_a_one_pixel_high_image_is_still_a_context(tmp_path, size):
    """RandomResizedCrop's fall-back: the middle of an image too long for any crop."""
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "x.png")
    got = crop.cut_context(Image.open(tmp_path / "x.png"), np.random.default_rng(0), 32)
    assert got[:, 0, 0].tolist() == [9, 8, 7] and got.shape == (3, 32, 32)


def test_a_context_is_the_random_resized_crop_of_the_upright_photo(tmp_path):
    """cut_context equals torchvision's resized_crop of the box that draw_crop names, to whole
    pixels, in the photo as its EXIF orientation shows it, and Pillow's to a level or two; the
    crop's area is uniform in 0.5 to 1 and inside the photo."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture.transpose(Image.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for seed in range(4):
        got = crop.cut_context(Image.open(tmp_path / "turned.png"), np.random.default_rng(seed), 32)
        rng = np.random.default_rng(seed)
        left, top, w, h = map(round, crop.draw_crop(rng, 80, 60))
        mirrored = rng.random() < 0.5
        for image, most in ((crop.to_tensor(picture), 0), (picture, 2)):
            expected = TF.resized_crop(image, top, left, h, w, (32, 32),
                                       TF.InterpolationMode.BICUBIC)
            expected = TF.pil_to_tensor(expected) if most else expected
            expected = expected.flip(-1) if mirrored else expected
            assert (got.int() - expected.int()).abs().max() <= most
    boxes = np.array([crop.draw_crop(np.random.default_rng(i), 300, 200) for i in range(2000)])
    area = boxes[:, 2] * boxes[:, 3] / 60000
    assert 0.5 <= area.min() < 0.51 and area.max() <= 1 and (boxes[:, :2] >= 0).all()
    assert ((boxes[:, 0] + boxes[:, 2]) <= 300).all() and ((boxes[:, 1] + boxes[:, 3]) <= 200).all()


def test_draft_decoding_keeps_the_picture(tmp_path):
    """A large JPEG decoded at a fraction of its size (Pillow's draft) shows the same context."""
    save_images(tmp_path, 1, size=(800, 600))
    fast = crop.cut_context(Image.open(tmp_path / "000.jpg"), np.random.default_rng(1), 64)
    whole = Image.open(tmp_path / "000.jpg")
    whole.load()
    slow = crop.cut_context(whole, np.random.default_rng(1), 64)
    assert (fast.float() - slow.float()).abs().mean() < 2


def loaded(world=1, rank=0, workers=0, micro=8, seed=0, steps=range(3, 7), source=None):
    cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, [*TINY, f"--seed={seed}"])
    machine = pretrain.Machine(torch.device("cpu"), rank, world, "float32", False)
    source = source or crop.Shapes("val")
    dataset = contexts_of(source, list(range(20)), 32, seed)
    plan = pretrain.make_plan(dataclasses.replace(cfg, micro_batch=micro), machine, 20)
    batches = pretrain.micro_batches(cfg, plan, rank, steps)
    return [c for (c, _), _ in pretrain.make_loader(dataset, batches, workers, machine)]


def test_the_images_of_a_step_do_not_depend_on_the_machine():
    """Design 4: any number of workers, processes and micro-batches sees the same contexts in the
    same order, from any step on; another seed sees others."""
    whole = torch.cat(loaded())
    assert whole.shape == (32, 3, 32, 32)
    assert torch.equal(whole, torch.cat(loaded(workers=3)))
    assert torch.equal(whole, torch.cat(loaded(micro=2)))
    assert torch.equal(whole[16:], torch.cat(loaded(steps=range(5, 7))))
    halves = [torch.cat(loaded(world=2, rank=r, micro=4)).unflatten(0, (4, 4)) for r in (0, 1)]
    assert torch.equal(whole, torch.cat(halves, 1).flatten(0, 1))
    assert not torch.equal(whole, torch.cat(loaded(seed=1)))


def test_an_epoch_shows_each_image_once_and_each_epoch_other_crops():
    """Step s of an epoch is the s-th slice of one permutation; the incomplete batch is dropped."""
    cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, TINY)
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    plan = pretrain.make_plan(cfg, machine, 20)
    keys = [k for b in pretrain.micro_batches(cfg, plan, 0, range(6)) for k in b]
    assert [e for e, _ in keys] == [0] * 16 + [1] * 16 + [2] * 16
    for e in range(3):
        seen = [i for epoch, i in keys if epoch == e]
        assert len(set(seen)) == 16 and set(seen) <= set(range(20))
    dataset = contexts_of(crop.Shapes("val"), [0], 32, 0)
    first, second, again = (dataset[epoch, 0][0][0] for epoch in (0, 1, 1))
    assert not torch.equal(first, second) and torch.equal(second, again)


# --------------------------------------------------------------------------------- 3. the model

def tiny_cim(encoder="vit_d8", width=32, depth=1, seed=0):
    torch.manual_seed(seed)
    size = 2 * (model.ENCODERS[encoder][2] if model.ENCODERS[encoder] else 32)
    cim = model.CIM(encoder, 2 * size, width, depth, freeze_patch_embed=False)
    context, exemplars = torch.randn(2, 3, 2 * size, 2 * size), torch.randn(2, 3, 3, size, size)
    maps = (torch.rand(2, 3, 2 * size, 2 * size) > 0.7).float()
    return cim, context, exemplars, maps


@pytest.mark.parametrize("shape", [(2, 3, 17, 17), (1, 3, 101, 101), (2, 3, 100, 17),
                                   (1, 1, 9, 300)])
def test_attention_in_bfloat16_is_exact_to_its_rounding(shape):
    """attend in bf16 on a CPU, written out for few tokens, equals float32's attention to 1% in
    norm, forward and backward (bf16 rounds to 0.4%); all else is PyTorch's own."""
    *batch, n, m = shape
    exact = [torch.randn(*batch, k, 64) for k in (n, m, m, n)]

    def gradients(attention, dtype):
        q, k, v = (x.clone().to(dtype).requires_grad_() for x in exact[:3])
        out = attention(q, k, v)
        out.backward(exact[3].to(dtype))
        return [x.detach().float() for x in (out, q.grad, k.grad, v.grad)]

    truth = gradients(F.scaled_dot_product_attention, torch.float32)
    assert all(map(torch.equal, truth, gradients(model.attend, torch.float32)))
    brief = gradients(model.attend, torch.bfloat16)
    usual = gradients(F.scaled_dot_product_attention, torch.bfloat16)
    assert all(map(torch.equal, brief, usual)) == (m > 256)
    for got, expected in zip(brief, truth):
        assert 0 < (got - expected).norm() / expected.norm() < 0.01


def test_vit_equals_torchvisions():
    """ViT-B/16 with torchvision's vit_b_16 weights gives its tokens, cls first; keys are timm's."""
    theirs = torchvision.models.vit_b_16(weights=None).eval()
    ours = model.build_encoder("vit_b16").eval()
    nn.init.normal_(theirs.class_token)
    old = theirs.state_dict()
    new = {"cls_token": old["class_token"], "pos_embed": old["encoder.pos_embedding"],
           "patch_embed.proj.weight": old["conv_proj.weight"],
           "patch_embed.proj.bias": old["conv_proj.bias"]}
    names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2",
             "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj"}
    for key, value in old.items():
        key = key.removeprefix("encoder.").replace("layers.encoder_layer_", "blocks.")
        for a, b in names.items():
            key = key.replace(a, b)
        if key.startswith(("blocks.", "ln.")):
            new[key.replace("ln.", "norm.")] = value
    ours.load_state_dict(new)  # strict: every timm key is there and no other
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.encoder(torch.cat([theirs.class_token, theirs._process_input(x)], 1))
        torch.testing.assert_close(ours(x), expected, atol=2e-4, rtol=1e-4)


def test_resnet50_equals_torchvisions():
    """ResNet-50 with torchvision's weights gives its last feature map, row by row, in training and
    in evaluation, and moves its BatchNorm statistics alike."""
    theirs, ours = torchvision.models.resnet50(weights=None), model.build_encoder("resnet50")
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)
    body = nn.Sequential(*list(theirs.children())[:-2])
    x = torch.randn(2, 3, 96, 64)
    for mode in (True, False):
        expected = body.train(mode)(x)  # [2, 2048, 3, 2]
        torch.testing.assert_close(ours.train(mode)(x), expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items()
               if "running" in k or "tracked" in k)


@pytest.mark.parametrize("name, width, parameters", [
    ("vit_t16", 192, 5_524_416), ("vit_s16", 384, 21_665_664), ("vit_b16", 768, 85_798_656),
    ("vit_l16", 1024, 303_301_632), ("resnet50", 2048, 23_508_032)])
def test_encoders_have_the_published_sizes(name, width, parameters):
    """timm's and torchvision's parameter counts without the classifier; tables are for 224 px."""
    with torch.device("meta"):
        encoder = model.build_encoder(name)
        tokens = encoder(torch.empty(2, 3, 160, 160))
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert tokens.shape == (2, (1 + 100) if name != "resnet50" else 25, width)
    if name != "resnet50":
        assert encoder.pos_embed.shape == (1, 197, width)


def test_positions_are_the_fixed_sincos_of_row_and_column():
    """The table of grid place (row, column) holds sin and cos of column, then of row; resized to a
    finer grid it still tells rows from columns, and at its own size it is itself."""
    table = model.sincos_positions(14, 64)
    for row, column in [(0, 0), (3, 11), (13, 2)]:
        expected = []
        for at in (column, row):
            angles = [at / 10000 ** (k / 16) for k in range(16)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        expected = torch.tensor(expected)
        torch.testing.assert_close(table[row * 14 + column], expected, atol=1e-6, rtol=0)
    assert torch.equal(model.resize_positions(table[None], 14, 14)[0], table)
    small = model.resize_positions(table[None], 4, 10)[0].view(4, 10, 64)
    grid = table.view(14, 14, 64).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(4, 10), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(small, expected)


def test_cross_attention_equals_multihead_attention():
    """Eqs. 4 and 5: a layer is nn.MultiheadAttention with query f_c(h_c) + PE and no projection
    after the heads, then h = h_c + a + MLP(LN(h_c + a)), with h_c projected by f_c."""
    torch.manual_seed(0)
    layer = model.CorrelationLayer(48, 40, 64)
    h_c, h_z, positions = torch.randn(2, 1, 9, 48), torch.randn(2, 5, 7, 40), torch.randn(9, 64)
    oracle = nn.MultiheadAttention(64, 2, kdim=40, vdim=40, batch_first=True)
    oracle.load_state_dict({
        "q_proj_weight": torch.eye(64), "k_proj_weight": layer.f_k.weight,
        "v_proj_weight": layer.f_v.weight, "out_proj.weight": torch.eye(64),
        "out_proj.bias": torch.zeros(64),
        "in_proj_bias": torch.cat([torch.zeros(64), layer.f_k.bias, layer.f_v.bias])})
    got = layer(h_c, h_z, positions)
    assert got.shape == (2, 5, 9, 64)
    for k in range(5):
        h = layer.f_c(h_c[:, 0])
        a, _ = oracle(h + positions, h_z[:, k], h_z[:, k])
        torch.testing.assert_close(got[:, k], h + a + layer.mlp(layer.norm(h + a)))


@pytest.mark.parametrize("depth", [1, 2])
def test_exemplars_do_not_see_each_other(depth):
    """Permuting the exemplars permutes the maps; each alone gives the map it gives in a batch."""
    cim, context, exemplars, maps = tiny_cim(depth=depth)
    nn.init.normal_(cim.decoder.predictor.weight)
    _, logits = cim(context, exemplars, maps)
    _, permuted = cim(context, exemplars[:, [2, 0, 1]], maps)
    torch.testing.assert_close(permuted, logits[:, [2, 0, 1]])
    for b in range(2):
        for k in range(3):
            _, alone = cim(context[b:b + 1], exemplars[b:b + 1, k:k + 1], maps[:1, :1])
            torch.testing.assert_close(alone[0, 0], logits[b, k])
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", ["vit_d8", "vit_s16", "resnet50"])
def test_the_first_loss_is_ln_2(encoder):
    """Design 3: an untrained model says 0.5 everywhere, so its loss is ln 2 within 2%."""
    cim, context, exemplars, maps = tiny_cim(encoder, width=512 if encoder != "vit_d8" else 32)
    with torch.no_grad():
        loss, _ = cim(context, exemplars, maps)
    assert loss.item() == pytest.approx(math.log(2), rel=0.02)


def test_the_loss_is_equation_7():
    """Eq. 7: binary cross-entropy, the mean over pixels, exemplars and images, in float64."""
    cim, context, exemplars, maps = tiny_cim()
    nn.init.normal_(cim.decoder.predictor.weight)
    loss, logits = cim(context, exemplars, maps)
    y, p = maps.double(), logits.double().sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logits.shape == maps.shape


@pytest.mark.parametrize("encoder", ["vit_d8", "resnet50"])
def test_gradients_reach_the_online_encoder_and_the_decoder_only(encoder):
    """Section 3.2: the online network learns; the target gets no gradient and fixed tables none."""
    cim, context, exemplars, maps = tiny_cim(encoder)
    cim(context, exemplars, maps)[0].backward()
    for name, p in cim.named_parameters():
        fixed = name.startswith("target.") or "pos_embed" in name or name == "decoder.positions"
        if name.endswith("f_k.bias"):  # shifts all scores of a query alike: softmax does not see it
            assert p.grad.abs().max() < 1e-8
        else:
            assert (p.grad is None) if fixed else p.grad.abs().max() > 1e-8, name
    frozen = model.CIM(encoder, 64, 32, freeze_patch_embed=True).online
    still = {n for n, p in frozen.named_parameters() if not p.requires_grad}
    assert still == ({"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
                     if encoder != "resnet50" else set())


def test_the_target_is_the_moving_average_of_everything():
    """Eq. 3 in closed form: after n updates towards a constant online network the target is
    tau^n of its start and 1 - tau^n of the online one, BatchNorm statistics included; counters
    are copied; tau 1 changes nothing."""
    cim, *_ = tiny_cim("resnet50")
    for t in cim.online.state_dict().values():
        t.copy_(torch.randn_like(t) if t.is_floating_point() else torch.full_like(t, 7))
    start = {k: v.clone() for k, v in cim.target.state_dict().items()}
    for _ in range(5):
        cim.update_target(0.9)
    online, target = cim.online.state_dict(), cim.target.state_dict()
    for key, value in target.items():
        if value.is_floating_point():
            expected = 0.9**5 * start[key] + (1 - 0.9**5) * online[key]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        else:
            assert value == 7
    before = {k: v.clone() for k, v in target.items()}
    cim.update_target(1.0)
    assert all(torch.equal(v, before[k]) for k, v in cim.target.state_dict().items())


def test_the_target_normalises_contexts_by_contexts():
    """Design 3: in training the target's BatchNorm uses the statistics of the contexts at hand."""
    cim, context, exemplars, maps = tiny_cim("resnet50")
    cim.train()
    seen = []
    cim.target.bn1.register_forward_hook(lambda m, i, o: seen.append(o))
    cim(context, exemplars, maps)
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-4  # normalised with its own batch


# -------------------------------------------------------------------------------- 4. ablations

ROWS = dict(re.findall(r"^run --out=out/(\S+) ?(.*)", README, re.M))  # of Tables 1-4, Figure 4


def row_of(name):
    """A row of an ablation with the smallest encoder and images -> model, optimiser, pairs."""
    cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, [
        "--model=vit_d8", "--context_size=32", "--exemplar_size=16", *ROWS[name].split()])
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    dataset = pretrain.contexts_of(crop.Shapes("train"), list(range(4)), cfg)
    (contexts, _), _ = crop.collate([dataset[0, i] for i in range(4)])
    pairs = pretrain.make_pairs(contexts, pretrain.uniforms(cfg, (4, 0), 4), cfg)
    cim, optimizer = pretrain.build(cfg, machine)
    pretrain.set_learning_rate(optimizer, 1e-4)
    return cfg, cim, optimizer, pairs[:3]


def test_the_readme_has_every_ablation():
    """Tables 1 to 4 and Figure 4: each value that the paper compares is a row of the README."""
    rows = [dataclasses.asdict(pretrain.parse_config(pretrain.Config, {"paper": {}}, flags.split()))
            for flags in ROWS.values()]
    values = {k: {row[k] for row in rows} for k in rows[0]}
    pairs = {"scale": TABLE_1[:4], "ratio": TABLE_1[3:8], "rotation": TABLE_1[8:12]}
    for i, name in enumerate(pairs):
        for row in pairs[name]:
            assert any(np.allclose(row[i], value, atol=1e-3) for value in values[name]), row
    assert values["transforms"] == {"exemplar", "context", "both", "none"}
    assert values["bootstrap"] == set(model.BOOTSTRAPS) and values["loss"] == set(model.LOSSES)
    assert values["decoder"] == {"cim", *model.TRACKERS}
    assert values["correlation"] == set(model.CORRELATIONS)
    assert values["predictor"] == set(model.PREDICTORS)
    for name in ("decoder_depth", "decoder_width", "exemplars", "context_size", "exemplar_size",
                 "tau", "freeze_patch_embed"):
        assert len(values[name]) > 1, name


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_ablations_trains(name):
    """Two steps lower the loss of the batch they were made on. Gradients reach what should learn
    and nothing else. A batch's loss is the mean over its halves, so that micro-batches and
    processes change nothing, and exemplars do not see each other."""
    cfg, cim, optimizer, pairs = row_of(name)
    first = {k: v.clone() for k, v in cim.target.state_dict().items()}
    decoder = cim.decoder
    if cfg.decoder == "cim":  # it is what the flags say
        assert cim.bootstrap == cfg.bootstrap and cim.loss is model.LOSSES[cfg.loss]
        assert isinstance(decoder.predictor, nn.Linear) == (cfg.predictor == "linear")
        assert {type(layer) for layer in decoder.layers} == {
            {"cross_attention": model.CorrelationLayer,
             "convolution": model.ConvolutionLayer}[cfg.correlation]}
        assert len(decoder.layers) == cfg.decoder_depth
        assert decoder.positions.shape[1] == cfg.decoder_width
    else:
        assert type(decoder) is model.TRACKERS[cfg.decoder]
    loss, logits = cim(*pairs)
    assert logits.shape == pairs[2].shape and logits.dtype == torch.float32
    parts = [cim(*(x[half] for x in pairs))[0] for half in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(parts) / 2, loss, atol=1e-5, rtol=1e-5)
    turned = cim(pairs[0], *(x.roll(1, 1) for x in pairs[1:]))[1]
    torch.testing.assert_close(turned, logits.roll(1, 1), atol=1e-4, rtol=1e-4)
    loss.backward()
    for key, p in cim.named_parameters():
        fixed = key.startswith("target.") or "pos" in key or (
            "patch_embed" in key and cfg.freeze_patch_embed)
        blind = key.endswith("f_k.bias") and cfg.correlation == "cross_attention"  # see above
        assert p.requires_grad != fixed and (p.grad is None) == fixed, key
        assert fixed or blind or p.grad.abs().max() > 1e-9, key
    assert (cim.target is cim.online) == (cfg.bootstrap == "shared" or cfg.decoder != "cim")
    for step in range(2):
        optimizer.step()
        optimizer.zero_grad()
        cim.update_target(0.99)
        after, _ = cim(*pairs)
        after.backward()
    assert after < loss
    if cim.target is not cim.online:  # Eq. 3: a little of the way
        online, key = cim.online.state_dict(), "blocks.0.mlp.fc1.weight"
        way = (cim.target.state_dict()[key] - first[key]).norm() / (online[key] - first[key]).norm()
        assert 0.005 < way < 0.03


def test_bootstrap_says_which_network_sees_what():
    """Table 2: the exemplars are the online network's and the contexts the target's, the other way
    round, or both the one network's; only what the online network saw carries a gradient."""
    for bootstrap in model.BOOTSTRAPS:
        cim = model.CIM("vit_d8", 32, 32, freeze_patch_embed=False, bootstrap=bootstrap)
        nn.init.normal_(cim.target.cls_token)
        context, exemplars = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 3, 16, 16)
        h_c, h_z = cim.encode(context, exemplars)
        f_z, f_c = dict(online_exemplar=(cim.online, cim.target), shared=(cim.online, cim.online),
                        online_context=(cim.target, cim.online))[bootstrap]
        torch.testing.assert_close(h_c, f_c(context)[:, 1:])
        torch.testing.assert_close(h_z[:, 1], f_z(exemplars[:, 1]))
        assert h_z.requires_grad == (f_z is cim.online)
        assert h_c.requires_grad == (f_c is cim.online)
        before = cim.online.cls_token.clone()
        cim.update_target(0.5)
        assert torch.equal(cim.online.cls_token, before)


def test_the_losses_of_table_3_equal_the_formulas():
    """Cross-entropy, HED's balanced cross-entropy, squared error and focal loss, pixel by pixel in
    float64; the focal loss is torchvision's."""
    logits, maps = 4 * rand(2, 3, 5, 5) - 2, (rand(2, 3, 5, 5, seed=1) > 0.7).double()
    maps[0, 0] = 0
    sums = dict.fromkeys(model.LOSSES, 0.0)
    for b in range(2):
        for k in range(3):
            share = maps[b, k].mean().item()  # of the map that is inside
            for x, y in zip(logits[b, k].flatten().tolist(), maps[b, k].flatten().tolist()):
                p = 1 / (1 + math.exp(-x))
                log_p = math.log(p if y else 1 - p)
                sums["ce"] -= log_p
                sums["balanced"] -= ((1 - share) if y else share) * log_p
                sums["mse"] += (p - y) ** 2
                sums["focal"] -= (0.25 if y else 0.75) * (1 - math.exp(log_p)) ** 2 * log_p
    for name, loss in model.LOSSES.items():
        assert loss(logits, maps).item() == pytest.approx(sums[name] / maps.numel()), name
    theirs = torchvision.ops.sigmoid_focal_loss(logits, maps, 0.25, 2, "mean")
    torch.testing.assert_close(model.focal_loss(logits, maps), theirs)


def correlate_by_loop(x, kernel):
    """x [C, g, g] correlated with kernel [C, n, n] -> [g, g], product by product. The kernel's
    middle lies on the place; where n is even, on its four corners in turn, and the mean counts."""
    (_, g, _), n = x.shape, kernel.shape[-1]
    x, out = x.tolist(), torch.zeros(g, g).double()
    starts = [-(n // 2)] if n % 2 else [-(n // 2), 1 - n // 2]
    for y, col in np.ndindex(g, g):
        for top in starts:
            for left in starts:
                for c, i, j in np.ndindex(*kernel.shape):
                    row, at = y + top + i, col + left + j
                    if 0 <= row < g and 0 <= at < g:
                        out[y, col] += kernel[c, i, j].item() * x[c][row][at] / len(starts) ** 2
    return out


@pytest.mark.parametrize("n, contexts", [(2, 1), (3, 1), (4, 2)])
def test_convolution_as_correlation_equals_a_loop(n, contexts):
    """Figure 4a: each channel of f_c(h_c) + PE is correlated with that channel of the exemplar's
    f_k(h_z), its cls token left out; then Eq. 5 as ever."""
    torch.manual_seed(0)
    layer = model.ConvolutionLayer(8, 10, 32).double()
    h_c, h_z, positions = rand(2, contexts, 25, 8) - 0.5, rand(2, 2, 1 + n * n, 10), rand(25, 32)
    got = layer(h_c, h_z, positions)
    for b, k in np.ndindex(2, 2):
        h = layer.f_c(h_c[b, k % contexts])
        q, kernel = (h + positions).T.view(32, 5, 5), layer.f_k(h_z[b, k, 1:]).T.view(32, n, n)
        a = torch.stack([correlate_by_loop(q[c:c + 1], kernel[c:c + 1]) for c in range(32)])
        h = h + a.flatten(1).T / n**2
        torch.testing.assert_close(got[b, k], h + layer.mlp(layer.norm(h)))


def test_the_deep_predictor_is_three_deconvolutions():
    """Figure 4b: three transposed convolutions of stride 2 with GELUs between, on the token grid
    seen as an image, then bilinear to the map."""
    decoder = model.CorrelationDecoder(8, 3, 32, predictor="deconv").double()
    h_c, h_z = rand(2, 9, 8), rand(2, 2, 5, 8)
    y = decoder.layers[0](h_c[:, None], h_z, decoder.positions).unflatten(2, (3, 3))
    y = y.permute(0, 1, 4, 2, 3).flatten(0, 1)  # as images
    for i, last in ((0, False), (2, False), (4, True)):
        layer = decoder.predictor[i]
        y = F.conv_transpose2d(y, layer.weight, layer.bias, stride=2, padding=1)
        y = y if last else F.gelu(y)
    expected = F.interpolate(y.view(2, 2, 24, 24).float(), size=(30, 30), mode="bilinear")
    torch.testing.assert_close(decoder(h_c, h_z, 30), expected)


def test_siamfc_and_siamrpn_correlate_features():
    """Eq. 1: f(z) * f(c) + b over all channels, the exemplar's feature map being the kernel.
    SiamRPN makes one kernel for the map and four for the box of it by a convolution."""
    h_c, h_z = rand(2, 25, 6), rand(2, 3, 1 + 4, 6)
    fc, rpn = model.SiamFC(6, 5).double(), model.SiamRPN(6, 5).double()
    nn.init.constant_(fc.bias, 0.3)
    nn.init.normal_(rpn.box.adjust.weight)
    got_fc, got_rpn = fc.respond(h_c, h_z), rpn.respond(h_c, h_z)
    for b, k in np.ndindex(2, 3):
        c, z = h_c[b].T.view(6, 5, 5), h_z[b, k, 1:].T.view(6, 2, 2)
        torch.testing.assert_close(got_fc[b, k, 0], 9.2 * correlate_by_loop(c, z) / 24 + 0.3)
        maps = []
        for branch in (rpn.map, rpn.box):
            y = torch.stack([correlate_by_loop(branch.search(c[None])[0], kernel) / math.sqrt(24)
                             for kernel in branch.kernel(z[None])[0].split(6)])
            maps.append(branch.adjust(y[None])[0])
        torch.testing.assert_close(got_rpn[b, k], torch.cat(maps))


def test_transt_attends_as_written():
    """Table 4's TransT: in each layer self-attention of both sides, then cross-attention both ways,
    positions in queries and keys but not in values; one more towards the context; two MLPs."""
    torch.manual_seed(0)
    head = model.TransT(64, 3).double()
    for p in head.parameters():
        nn.init.normal_(p, std=0.3)
    h_c, h_z = rand(2, 9, 64), rand(2, 2, 1 + 4, 64)
    got = head.respond(h_c, h_z)
    assert len(head.layers) == 4
    p_z = F.interpolate(head.positions.T.view(1, 64, 3, 3), (2, 2), mode="bicubic")[0].flatten(1).T

    def attend(part, x, p_x, y, p_y):
        x_n, y_n = F.layer_norm(x, (64,), part.norm.weight, part.norm.bias), F.layer_norm(
            y, (64,), part.norm.weight, part.norm.bias)
        at = part.attention
        w, bias = at.in_proj_weight.split(64), at.in_proj_bias.split(64)
        q, k, v = (F.linear(t, w[i], bias[i]).view(-1, 2, 32).transpose(0, 1)
                   for i, t in enumerate((x_n + p_x, y_n + p_y, y_n)))
        a = ((q @ k.mT / math.sqrt(32)).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + F.linear(a, at.out_proj.weight, at.out_proj.bias)
        return x if part.mlp is None else x + part.mlp(part.norm2(x))

    for b, k in np.ndindex(2, 2):
        c, p_c, z = head.project(h_c[b]), head.positions, head.project(h_z[b, k, 1:])
        for self_z, self_c, cross_z, cross_c in head.layers:
            z, c = attend(self_z, z, p_z, z, p_z), attend(self_c, c, p_c, c, p_c)
            z, c = attend(cross_z, z, p_z, c, p_c), attend(cross_c, c, p_c, z, p_z)
        c = head.norm(attend(head.last, c, p_c, z, p_z))
        expected = torch.cat([head.map(c), head.box(c).sigmoid()], 1).T.view(5, 3, 3)
        torch.testing.assert_close(got[b, k], expected)


@pytest.mark.parametrize("name, weight", [("siamfc", 1), ("siamrpn", 1), ("transt", 8.334)])
def test_a_trackers_loss_is_that_of_map_and_box(name, weight):
    """Logistic loss on the map at its full size, plus the loss of this exemplar's box; both sides
    are seen by the one encoder, which learns from both."""
    torch.manual_seed(0)
    cim = model.Tracking(name, "vit_d8", 32, freeze_patch_embed=False)
    context, exemplars = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 3, 16, 16)
    boxes = crop.sample_boxes(rand(2, 3, 6, dtype=torch.float32))
    maps = crop.rasterize_maps(crop.affine_from_boxes(boxes), 32)
    h_c, h_z = cim.encode(context, exemplars)
    assert h_c.requires_grad and h_z.requires_grad
    response = cim.decoder.respond(h_c, h_z)
    logits = F.interpolate(response[:, :, 0], size=(32, 32), mode="bilinear")
    expected = weight * F.binary_cross_entropy_with_logits(logits, maps)
    if name != "siamfc":
        losses = cim.decoder.box_loss(response[:, :, 1:], model.upright_boxes(maps))
        expected = expected + model.mean_inside(losses, maps)
    got, said = cim(context, exemplars, maps)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(said, logits)
    torch.testing.assert_close(cim.decoder(h_c, h_z, 32), logits)


def test_the_box_of_a_map_is_tight_and_upright():
    """The target of the trackers is the upright box of the pixels that are 1, within a pixel of
    that of the rotated box's corners."""
    _, boxes = uniform_boxes(300, rotation=180)
    maps = crop.rasterize_maps(crop.affine_from_boxes(boxes).view(30, 10, 2, 3), 40)
    got = model.upright_boxes(maps)
    at = corners(boxes).view(30, 10, 4, 2)
    low, high = at.amin(2), at.amax(2)
    expected = torch.cat([(low + high) / 2, high - low], -1)
    assert (got - expected).abs().max() <= 2 / 40  # half a pixel or one at either end
    for (i, k), box in zip(np.ndindex(30, 10), got.flatten(0, 1)):
        y, x = np.nonzero(maps[i, k].numpy())
        cx, cy, w, h = (40 * box).tolist()
        assert (x.min(), x.max() + 1) == pytest.approx((cx - w / 2, cx + w / 2))
        assert (y.min(), y.max() + 1) == pytest.approx((cy - h / 2, cy + h / 2))


def test_the_box_losses_equal_the_formulas():
    """SiamRPN: smooth L1 of offset and log-size relative to the anchor; TransT: L1 and GIoU, which
    is torchvision's; both at the places whose middle lies in the map, mean of means over maps."""
    maps = crop.rasterize_maps(crop.affine_from_boxes(uniform_boxes(6)[1]).view(2, 3, 2, 3), 16)
    boxes, said = model.upright_boxes(maps), rand(2, 3, 4, 4, 4, seed=3) + 0.01
    totals, heads = torch.zeros(2, 6).double(), (model.SiamRPN(8, 4), model.TransT(64, 4))
    for i, (b, k) in enumerate(np.ndindex(2, 3)):
        cx, cy, w, h = boxes[b, k].tolist()
        places = [(y, x) for y, x in np.ndindex(4, 4) if maps[b, k, 4 * y + 2, 4 * x + 2]]
        for y, x in places:
            true = [(cx - (x + 0.5) / 4) / 0.4, (cy - (y + 0.5) / 4) / 0.4, math.log(w / 0.4),
                    math.log(h / 0.4)]
            off = [abs(s - t) for s, t in zip(said[b, k, :, y, x].tolist(), true)]
            smooth = sum(d * d / 2 if d < 1 else d - 0.5 for d in off)
            xyxy = torchvision.ops.box_convert(torch.stack([said[b, k, :, y, x], boxes[b, k]]),
                                               "cxcywh", "xyxy")
            giou = torchvision.ops.generalized_box_iou(xyxy[:1], xyxy[1:]).item()
            l1 = (said[b, k, :, y, x] - boxes[b, k]).abs().sum().item()
            totals[:, i] += torch.tensor([1.2 * smooth, 5 * l1 + 2 * (1 - giou)]) / len(places)
    for head, total in zip(heads, totals):
        got = model.mean_inside(head.box_loss(said, boxes), maps)
        torch.testing.assert_close(got, total.mean(), atol=1e-6, rtol=1e-6)


def test_ablations_are_resumed_and_measured_like_the_default(tmp_path):
    """A tracker and a shared encoder go through the same loop: held-out skill, maps.png, a resumed
    run, the encoder's file, evaluate.py's maps."""
    flags = ["--decoder=siamrpn", "--freeze_patch_embed=true"]
    for frozen in (True, False):
        cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, [
            *TINY, "--decoder=siamfc", f"--freeze_patch_embed={frozen}"])
        embed = pretrain.build_model(cfg).online.patch_embed
        assert all(p.requires_grad != frozen for p in embed.parameters())
    demo(tmp_path, "--max_steps=1", *flags)
    rows = demo(tmp_path, "--max_steps=2", *flags)
    assert [r["step"] for r in rows] == [1, 2] and math.isfinite(rows[1]["skill"])
    model.build_encoder("vit_d8").load_state_dict(encoder_of(tmp_path))
    with pytest.raises(InputError, match=r"decoder \(siamrpn there, siamfc here\)"):
        demo(tmp_path, "--max_steps=3", "--decoder=siamfc", *flags[1:])
    save_images(tmp_path / "images", 3)
    with pytest.raises(InputError, match="holds no target"):
        finetune.read_weights(str(tmp_path / "ckpt.pt"), use_target=True)
    report = score(tmp_path / "scores", "--bench=maps", f"--ckpt={tmp_path / 'ckpt.pt'}",
                   f"--data={tmp_path / 'images'}")
    assert report["n"] == 3 and math.isfinite(report["skill"])


# --------------------------------------------------------------------------------- 5. training

def demo(out, *flags):
    """Train in this process; -> the rows of the log."""
    pretrain.main([*TINY, f"--out={out}", *flags])
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]


def encoder_of(out):
    return torch.load(os.path.join(out, "encoder.pt"), weights_only=True)


def test_the_defaults_are_table_9():
    """Config() is the paper's pre-training recipe, value by value."""
    expected = dict(epochs=300, lr=2.4e-3, batch_size=4096, lr_batch=4096, weight_decay=0.05,
                    beta1=0.9, beta2=0.95, warmup_epochs=40, clip=1.0, context_size=160,
                    exemplar_size=64, exemplars=6, model="vit_b16", decoder_width=512,
                    decoder_depth=1, scale=(0.05, 1.0), ratio=(1 / 3, 3.0), rotation=45.0, flip=0.5,
                    transforms="exemplar", tau=0.99, bootstrap="online_exemplar", decoder="cim",
                    correlation="cross_attention", predictor="linear", loss="ce")
    cfg = pretrain.Config()
    assert {k: getattr(cfg, k) for k in expected} == expected
    assert pretrain.parse_config(pretrain.Config, pretrain.PRESETS, []) == cfg
    assert pretrain.PRESETS["paper"] == {}


@pytest.mark.parametrize("script, presets", [
    (pretrain, pretrain.PRESETS), (finetune, finetune.RECIPES), (evaluate, {})])
def test_presets_are_values_only_and_every_field_is_read(script, presets):
    """A preset names fields and nothing else; no field is a flag that nothing reads."""
    names = [f.name for f in dataclasses.fields(script.Config)]
    for preset, values in presets.items():
        assert set(values) < set(names)
        cfg = pretrain.parse_config(script.Config, presets, [f"--{names[0]}={preset}"])
        assert all(getattr(cfg, k) == v for k, v in (values | {names[0]: preset}).items())
    files = {open(module.__file__).read() for module in (script, finetune, pretrain)}
    for name in names[script is not evaluate:]:
        assert any(re.search(rf"\bcfg\.{name}\b", text) for text in files), name


def test_learning_rate_and_tau_at_their_hinges():
    """Table 9: linear warm-up, cosine to 0; Eq. 3's tau goes from its start to 1 by a cosine. A
    warm-up longer than the run is its first part."""
    lr = [pretrain.learning_rate(s, 100, 2.0, 10) for s in range(101)]
    assert lr[0] == 0.2 and lr[9] == lr[10] == 2.0 and lr[55] == pytest.approx(1.0)
    assert lr[100] == pytest.approx(0, abs=1e-15) and max(lr) == 2.0
    assert all(a >= b for a, b in zip(lr[10:], lr[11:]))
    assert [pretrain.learning_rate(s, 5, 1.0, 10) for s in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    tau = [pretrain.target_decay(s, 100, 0.99) for s in range(101)]
    assert tau[0] == 0.99 and tau[50] == pytest.approx(0.995) and tau[100] == 1.0


def test_three_steps_equal_the_recipe_written_out(tmp_path):
    """The loop is Table 9 and Eqs. 2-7 and nothing else: the same three steps by hand, with every
    crop probability different and the patch embedding frozen, give the same checkpoint."""
    flags = dict(lr=0.02, clip=0.5, weight_decay=0.3, tau=0.7, warmup_epochs=0.003, flip=0.4,
                 jitter=0.9, gray=0.3, blur=0.6, solarize=0.1, beta1=0.8, beta2=0.9)
    demo(tmp_path, "--max_steps=3", "--transforms=exemplar", "--freeze_patch_embed=true",
         "--eval_every=2", *(f"--{k}={v}" for k, v in flags.items()))
    torch.manual_seed(0)
    cim = model.CIM("vit_d8", 64, 64, 1, freeze_patch_embed=True)
    first = {k: v.clone() for k, v in cim.state_dict().items()}
    decay = [p for p in cim.parameters() if p.requires_grad and p.ndim == 2]
    still = [p for p in cim.parameters() if p.requires_grad and p.ndim != 2]  # the cls token has 3
    groups = [dict(params=decay, weight_decay=0.3), dict(params=still, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), fused=True)
    source = crop.Shapes("train")
    contexts = contexts_of(source, list(range(len(source))), 64, 0)
    order = np.random.default_rng((0, 2, 0)).permutation(len(source))
    for step in range(3):
        rows = order[8 * step:8 * step + 8].tolist()
        (batch, _), _ = crop.collate([contexts[0, i] for i in rows])
        u = np.random.default_rng((0, 4, step)).random((8, 7, 15), dtype=np.float32)
        pairs = crop.make_pairs(batch, torch.from_numpy(u), exemplar_size=32, flip=0.4, jitter=0.9,
                                gray=0.3, blur=0.6, solarize=0.1)
        loss, _ = cim(*pairs[:3])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cim.parameters(), 0.5)
        for group in optimizer.param_groups:  # batch 8 of lr_batch 16; 2 steps of warm-up of 1800
            group["lr"] = 0.01 * ((step + 1) / 2 if step < 2 else 1)
        optimizer.step()
        tau = 1 - 0.3 * (1 + math.cos(math.pi * step / 1800)) / 2
        for t, o in zip(cim.target.parameters(), cim.online.parameters()):
            t.data.lerp_(o, 1 - tau)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    for key, value in cim.state_dict().items():
        assert torch.equal(saved[key], value), key
    moved = {k for k, v in saved.items() if not torch.equal(v, first[k])}
    fixed = {k for k in saved if "pos_embed" in k or "patch_embed" in k or k == "decoder.positions"}
    assert moved == set(saved) - fixed


def command(*words, **env):
    return subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_two_processes_equal_one(tmp_path):
    """torchrun with two gloo processes, each accumulating, gives the run of one: losses, gradient,
    held-out skill and weights."""
    flags = ["--max_steps=4", "--eval_every=2"]
    one = demo(tmp_path / "one", *flags)
    result = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                     "pretrain.py", *TINY, *flags, "--micro_batch=2", f"--out={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    two = [json.loads(line) for line in open(tmp_path / "two" / "log.jsonl")]
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4]
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for key in ("skill", "skill_swapped", "baseline", "rank"):
        for i in (1, 3):
            assert one[i][key] == pytest.approx(two[i][key], rel=1e-3, abs=1e-5), key
    for a, b in zip(encoder_of(tmp_path / "one").values(), encoder_of(tmp_path / "two").values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_an_error_of_all_processes_is_told_once(tmp_path):
    """An error that all share is told by process 0, without a traceback from our code on others."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py"]
    (tmp_path / "file").write_text("in the way")
    result = command(*launch, *TINY, "--max_steps=2", f"--out={tmp_path / 'file'}")
    assert result.returncode and result.stderr.count("cannot make the folder") == 1, result.stderr
    assert "pretrain.py\", line" not in result.stderr


def test_four_steps_equal_two_and_resumed_two_bit_for_bit(tmp_path):
    """Design 4: a resumed run is the uninterrupted run, weights, log and all."""
    whole = demo(tmp_path / "a", "--max_steps=4")
    demo(tmp_path / "b", "--max_steps=2")
    with open(tmp_path / "b" / "log.jsonl", "a") as f:
        f.write('{"step": 3, "lost": "in a crash"}\n\0\0}\n{"step": 4, "tor')
    parts = demo(tmp_path / "b", "--max_steps=4", "--micro_batch=8", "--workers=1")
    assert [r["step"] for r in parts] == [1, 2, 3, 4]
    for row in whole + parts:
        del row["images_per_s"], row["data_wait"]
    assert [parts[0], *parts[2:]] == [whole[0], *whole[2:]]  # the short run evaluated at step 2
    a, b = (torch.load(tmp_path / x / "ckpt.pt", weights_only=True) for x in "ab")
    for part in ("model", "optimizer"):
        flat_a, flat_b = (torch.utils._pytree.tree_leaves(c[part]) for c in (a, b))
        assert len(flat_a) == len(flat_b) > 10
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y
                   for x, y in zip(flat_a, flat_b))
    assert all(torch.equal(v, encoder_of(tmp_path / "b")[k])
               for k, v in encoder_of(tmp_path / "a").items())


def test_a_finished_run_says_so(tmp_path, capsys):
    """The same command again changes nothing and exits well; a bench leaves its files alone."""
    demo(tmp_path, "--max_steps=1")
    pretrain.main([*TINY, f"--out={tmp_path}", "--bench=1", "--exemplars=1"])
    assert json.load(open(tmp_path / "config.json"))["exemplars"] == 6
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.*")}
    demo(tmp_path, "--max_steps=1")
    assert "finished: 1 of 1 steps" in capsys.readouterr().out
    assert len(before) == 7 and before == {f: f.read_bytes() for f in tmp_path.rglob("*.*")}


def test_resnet50_trains_too(tmp_path):
    """Table 9's note: the same recipe, untuned, runs with the CNN."""
    rows = demo(tmp_path, "--model=resnet50", "--exemplars=2", "--batch_size=2", "--max_steps=2")
    assert len(rows) == 2 and all(math.isfinite(r["loss"]) for r in rows)
    assert set(encoder_of(tmp_path)) == set(model.build_encoder("resnet50").state_dict())


def test_bfloat16_stays_close_to_float32(tmp_path):
    """bf16 autocast changes the loss of the first steps by less than 1% and keeps fp32 weights."""
    plain = demo(tmp_path / "a", "--max_steps=3")
    brief = demo(tmp_path / "b", "--max_steps=3", "--dtype=bfloat16")
    plain, brief = ([row["loss"] for row in rows] for rows in (plain, brief))
    assert plain == pytest.approx(brief, rel=0.01) and plain != brief
    assert {v.dtype for v in encoder_of(tmp_path / "b").values()} == {torch.float32}


def test_gflop_per_image_equals_the_hand_count():
    """Design 5: ViT-B/16 takes 17.7 GFLOP in the target, 52.3 in the online encoder, and the
    decoder the products of Eqs. 4-6, within 2%."""
    def encoder(patches):
        n = patches + 1
        return 12 * (24 * n * 768**2 + 4 * n**2 * 768) + patches * 2 * 768**2

    target, online = encoder(100), 6 * encoder(16)
    assert target == pytest.approx(17.7e9, rel=0.01)
    assert 3 * online == pytest.approx(52.3e9, rel=0.02)
    shared = 100 * 768 * 512 + 6 * 17 * 2 * 768 * 512  # f_c (its input needs no gradient), f_k, f_v
    each = 6 * (100 * 8 * 512**2 + 2 * 100 * 17 * 512 + 100 * 512)
    hand = target + 3 * online + 2 * (3 * (shared + each))
    assert pretrain.gflop_per_image(pretrain.Config()) * 1e9 == pytest.approx(hand, rel=0.02)


# ---------------------------------------------------------------------------------- 6. honesty

def test_eight_images_can_be_overfitted():
    """The model can learn the task at all: on eight fixed images the loss falls to half of what
    the best predictor that ignores the exemplar can reach."""
    torch.manual_seed(0)
    cim = model.CIM("vit_d8", 32, 64, freeze_patch_embed=False)
    dataset = contexts_of(crop.Shapes("train"), list(range(8)), 32, 0)
    (contexts, _), _ = crop.collate([dataset[0, i] for i in range(8)])
    pairs = crop.make_pairs(contexts, rand(8, 7, crop.UNIFORMS, dtype=torch.float32), 16)[:3]
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(cim, 0.05), lr=2e-3, fused=True)
    for _ in range(120):
        loss, _ = cim(*pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cim.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cim.update_target(0.99)
    assert loss.item() < 0.21


def held_out(**kw):
    cfg = dataclasses.replace(pretrain.parse_config(pretrain.Config, pretrain.PRESETS, TINY), **kw)
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    return pretrain.HeldOut(crop.Shapes("val"), list(range(30)), cfg, machine), cfg


class Oracle(nn.Module):
    """Looks like CIM to HeldOut. An exemplar's only feature is its mean colour, and the decoder's
    map for it is what `say` makes of that feature [B, K, 1, 3]."""

    def __init__(self, say):
        super().__init__()
        self.online, self.say = types.SimpleNamespace(prefix=0, width=3), say

    def encode(self, context, exemplars):
        return None, exemplars.mean((3, 4))[:, :, None]

    def decoder(self, h_c, h_z, size):
        return torch.logit(self.say(h_z).clamp(1e-6, 1 - 1e-6))


def test_skill_is_nought_without_the_exemplar_and_one_with_the_answer():
    """skill = 1 - loss / baseline: the mean map has skill 0 and 0.5 everywhere less; a model that
    knows each exemplar's map has 1, and below 0 when exemplars are swapped between images."""
    held, cfg = held_out()
    _, exemplars, maps, _ = pretrain.make_pairs(held.contexts, held.u, cfg)
    colours = exemplars.mean((3, 4)).flatten(0, 1)
    assert len(colours.unique(dim=0)) == 30 * 6

    def know(h_z):
        nearest = torch.cdist(h_z.flatten(0, 2), colours).argmin(1)
        return maps.flatten(0, 1)[nearest].unflatten(0, h_z.shape[:2])

    mean = held.evaluate(Oracle(lambda h_z: held.mean_map.expand(*h_z.shape[:2], 64, 64)))
    assert mean["skill"] == pytest.approx(0, abs=1e-4) and mean["skill_swapped"] == mean["skill"]
    half = held.evaluate(Oracle(lambda h_z: torch.full((*h_z.shape[:2], 64, 64), 0.5)))
    assert half["heldout_loss"] == pytest.approx(math.log(2)) and half["skill"] < -0.5
    known = held.evaluate(Oracle(know))
    assert known["skill"] > 0.999 and known["skill_swapped"] < 0


def test_the_baseline_is_the_best_guess_without_the_exemplar():
    """Design 2: the mean map of 4096 boxes is the mean over many more, and its cross-entropy on
    the held-out maps is near its entropy, about 0.42 nats by default."""
    held, _ = held_out()
    boxes = crop.sample_boxes(rand(20000, 6, seed=5, dtype=torch.float32))
    p = crop.rasterize_maps(crop.affine_from_boxes(boxes), 64).mean(0)
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).mean().item()
    assert 0.41 < entropy < 0.43 and (held.mean_map - p).abs().max() < 0.04
    score = held.evaluate(Oracle(lambda h_z: torch.zeros(*h_z.shape[:2], 64, 64)))
    assert score["baseline"] == pytest.approx(entropy, rel=0.06)  # of 180 maps only


@pytest.mark.parametrize("d", [1, 2, 3])
def test_rank_counts_the_directions_that_features_use(d):
    """The effective rank of features spread alike over d orthogonal directions is d; when they
    collapse onto a line it is 1."""
    held, cfg = held_out()
    oracle = Oracle(lambda h_z: torch.zeros(*h_z.shape[:2], 64, 64))
    axes = torch.eye(3)[torch.arange(6) % d]
    features = iter(torch.cat([axes, -axes]).view(2, 6, 1, 3).repeat(15, 1, 1, 1))
    oracle.encode = lambda c, e: (None, torch.stack([next(features) for _ in c]))
    assert held.evaluate(oracle)["rank"] == pytest.approx(d, rel=1e-4) and oracle.training
    flat = 3 + 1e-4 * rand(500, 1) * rand(1, 64, seed=1)
    assert pretrain.effective_rank(flat) == pytest.approx(1, rel=1e-4)
    constant = torch.full((500, 64), 3.0) * (1 + 1e-7 * torch.randn(500, 64))
    assert pretrain.effective_rank(constant.double()) == 1


# --------------------------------------------------------------------------------- 7. transfer

SMALL = ["--recipe=demo", "--device=cpu", "--dtype=float32", "--log_every=1", "--image_size=32",
         "--test_size=32", "--batch_size=8"]


@pytest.fixture(scope="module")
def classes3(tmp_path_factory):
    """Three classes of generated pictures, 8 to train on and 7 to validate on of each: 21 is not
    divisible by anything that the loader uses."""
    root = tmp_path_factory.mktemp("classes3")
    for k, name in enumerate(["ant", "bee", "cat"]):
        save_images(root / "train" / name, 8, seed=k)
        save_images(root / "val" / name, 7, seed=10 + k)
    return root


def tune(out, data, *flags):
    """Fine-tune in this process; -> the rows of the log."""
    finetune.main([*SMALL, "--init=scratch", f"--data={data}", f"--out={out}", *flags])
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]


def recipe(name, *flags):
    return pretrain.parse_config(finetune.Config, finetune.RECIPES, [f"--recipe={name}", *flags])


def test_the_recipes_are_tables_10_and_11():
    """vit_b and vit_s are Table 10, resnet50_100 and resnet50_300 the columns of Table 11."""
    table10 = dict(lr=9.6e-3, batch_size=2048, layer_decay=0.8, weight_decay=0.05, beta1=0.9,
                   beta2=0.999, warmup_epochs=5, loss="ce", clip=0, drop_path=0.1, mixup=0.8,
                   cutmix=1.0, smoothing=0.1, randaugment=9, randaugment_p=0.5, image_size=224,
                   test_size=224, optimizer="adamw", repeats=1, erasing=0, randaugment_std=0.5)
    table11 = table10 | dict(lr=12e-3, layer_decay=1, weight_decay=0.02, loss="bce", drop_path=0,
                             mixup=0.1, test_crop=0.95)
    columns = {"vit_b": table10 | dict(epochs=100), "vit_s": table10 | dict(epochs=200),
               "resnet50_100": table11 | dict(epochs=100, randaugment=6, image_size=160),
               "resnet50_300": table11 | dict(epochs=300, randaugment=7, smoothing=0, repeats=3)}
    for name, expected in columns.items():
        assert {k: getattr(recipe(name), k) for k in expected} == expected
        assert recipe(name).lr_batch == recipe(name).batch_size
    assert finetune.Config() == recipe("vit_b")


@pytest.mark.parametrize("encoder, expected", [
    ("vit_b16", {"encoder.cls_token": 13, "encoder.patch_embed.proj.weight": 13,
                 "encoder.blocks.0.attn.qkv.weight": 12, "encoder.blocks.11.mlp.fc2.bias": 1,
                 "fc_norm.weight": 0, "head.bias": 0}),
    ("resnet50", {"encoder.conv1.weight": 5, "encoder.bn1.bias": 5, "head.weight": 0,
                  "encoder.layer1.0.conv1.weight": 4, "encoder.layer4.2.bn3.weight": 1})])
def test_layers_learn_at_their_own_rates(encoder, expected):
    """Table 10: the rate of layer l of L is 0.8^(L + 1 - l) of the head's, over 12 blocks and the
    embedding; every parameter is in one group, and biases and norms do not decay."""
    cfg = recipe("vit_b", f"--model={encoder}", "--drop_path=0", "--image_size=32")
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    net, optimizer = finetune.build(cfg, 5, machine)
    pretrain.set_learning_rate(optimizer, 2.0)
    names = {id(p): n for n, p in net.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert set(rates) == {n for n, p in net.named_parameters()} - {"encoder.pos_embed"}
    for name, power in expected.items():
        assert rates[name] == pytest.approx(2 * 0.8**power), name
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.05 if p.ndim == 2 or p.ndim == 4 else 0)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixed_targets_follow_the_mixed_pixels(mixup, cutmix):
    """MixUp and CutMix: targets sum to one, and the share of each of the two labels is the share
    of its image's pixels."""
    torch.manual_seed(0)
    mix = finetune.make_mix(recipe("vit_b", f"--mixup={mixup}", f"--cutmix={cutmix}"), 6)
    images = torch.eye(6)[:, :3, None, None].expand(6, 3, 20, 20) * 1.0
    for _ in range(8):
        x, targets = mix(images, torch.arange(6))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        torch.testing.assert_close(x.mean((2, 3)), targets[:, :3])
        assert (targets > 0).sum(1).max() <= 2


def test_losses_equal_the_formulas():
    """Tables 10 and 11: smoothed soft targets in cross-entropy and in the mean binary
    cross-entropy, in float64 by hand; the threshold of [67] makes them 0 or 1."""
    logits, targets = rand(3, 4) * 4 - 2, torch.tensor([[1, 0, 0, 0], [0.3, 0, 0.7, 0],
                                                        [0.1, 0.9, 0, 0]]).double()
    smooth = 0.9 * targets + 0.025
    cross = -(smooth * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()
    torch.testing.assert_close(finetune.soft_loss(logits, targets, recipe("vit_b")), cross,
                               check_dtype=False)
    for flags, t in (["--smoothing=0.1"], smooth), (["--bce_threshold=0.2"], (smooth > 0.2) * 1.0):
        p = 1 / (1 + (-logits).exp())
        binary = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        got = finetune.soft_loss(logits, targets, recipe("resnet50_100", *flags))
        torch.testing.assert_close(got, binary, check_dtype=False)


def test_repeated_augmentation_shows_each_image_three_times_in_a_step():
    """Table 11, 300 epochs: over the processes of a step each image comes three times, each time
    with another crop, never beside itself; an epoch shows a third of the images."""
    cfg = recipe("resnet50_300", "--batch_size=24", "--micro_batch=4")
    parts = []
    for rank in range(2):
        machine = pretrain.Machine(torch.device("cpu"), rank, 2, "float32", False)
        plan = pretrain.make_plan(cfg, machine, 100)
        batches = pretrain.micro_batches(cfg, plan, rank, range(plan.per_epoch), cfg.repeats)
        parts.append([key for batch in batches for key in batch])
    for step in range(plan.per_epoch):
        keys = [key for part in parts for key in part[12 * step:12 * step + 12]]
        assert len(set(keys)) == 24 and {e for e, _ in keys} == {0, 1, 2}
        images = [i for _, i in keys]
        assert sorted(images.count(i) for i in set(images)) == [3] * 8
        assert all(a != b for a, b in zip(images, images[1:]))
    assert len({i for part in parts for _, i in part}) == 32  # 4 steps of 8


def test_drop_path_keeps_the_expectation():
    """Stochastic depth: a branch is left out with probability p, growing linearly over the blocks,
    and scaled by 1 / (1 - p) where it stays; in evaluation it always stays."""
    vit = model.build_encoder("vit_t16", drop_path=0.5)
    rates = [1 - block.drop_path.keep.item() for block in vit.blocks]
    assert rates == pytest.approx([0.5 * i / 11 for i in range(12)])
    torch.manual_seed(0)
    block, x = vit.blocks[-1], torch.randn(1, 5, 192).expand(4000, 5, 192)
    block.mlp.fc2.weight.data.zero_()  # leaves the attention's branch alone
    with torch.no_grad():
        whole, parts = block.eval()(x)[0] - x[0], block.train()(x) - x
    kept = parts.flatten(1).abs().amax(1) > 1e-6
    assert abs(kept.float().mean() - 0.5) < 0.03  # four standard errors
    torch.testing.assert_close(parts[kept][0], 2 * whole, atol=1e-5, rtol=1e-4)


def test_blocks_of_any_drop_path_are_compiled_once():
    """Table 10 on CUDA compiles each block with fullgraph: twelve rates must be one graph."""
    graphs = []
    vit = model.build_encoder("vit_t16", drop_path=0.1).train()
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in vit.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    vit(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(graphs) == 1


def test_randaugment_is_drawn_as_timm_writes_it():
    """"9 / 0.5": half of all operations are applied, their magnitudes are N(9, 0.5) cut to 10, and
    the same seed gives the same picture."""
    augment = finetune.RandAugment(9, 0.5, 0.5)
    seen = []
    augment.forward = lambda image: seen.append(augment.magnitude / 100) or image
    picture, rng = Image.new("RGB", (8, 8)), np.random.default_rng(0)
    for _ in range(1000):
        augment.augment(picture, rng)
    assert abs(len(seen) / 2000 - 0.5) < 0.05 and max(seen) == 10
    assert abs(np.median(seen) - 9) < 0.06 and abs(np.quantile(seen, 0.16) - 8.5) < 0.1
    scene, augment = crop.Shapes("train").open(0), finetune.RandAugment(9, 0.5, 1.0)
    once, again, other = (np.asarray(augment.augment(scene, np.random.default_rng(s)))
                          for s in (4, 4, 5))
    assert np.array_equal(once, again) and not np.array_equal(once, other)


def test_the_centre_crop_equals_torchvisions():
    """Test images: the shorter side to size / 0.95, then the middle, as torchvision's Resize and
    CenterCrop in two steps, to a level or two of rounding."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    image = small.resize((600, 400), Image.BICUBIC)  # 95% of 400 is a whole number
    got = crop.cut_centre(image, None, 190, 0.95).float()
    whole = TF.center_crop(TF.resize(image, 200, TF.InterpolationMode.BICUBIC), 190)
    assert (got - torch.from_numpy(np.array(whole)).permute(2, 0, 1).float()).abs().max() <= 2


def test_accuracy_counts_each_image_once(classes3, tmp_path):
    """21 images in batches of 4, over one process or three: top-1 and top-5 are those of a plain
    loop, and one unreadable image is left out."""
    source = crop.Folder(str(classes3 / "val"))
    torch.manual_seed(0)
    net = model.Classifier("vit_d8", 3).eval()
    nn.init.normal_(net.head.weight)
    labels, expected = torch.tensor(source.labels), []
    for i in range(21):
        x = crop.normalize(crop.cut_centre(source.open(i), None, 32)[None].float() / 255)
        expected.append(net(x).argmax().item() == source.labels[i])
    sums = np.zeros(2)
    for rank in range(3):
        machine = pretrain.Machine(torch.device("cpu"), rank, 3, "float32", False)
        machine.sum = machine.share_buffers = lambda *_: None
        dataset = finetune.centre_crops(source, list(range(21)), 32, 0.95)
        images = finetune.Batches(dataset, 0, machine, batch=4)
        score = finetune.accuracy(net, images, labels, machine)
        sums += [score["top1"] * score["n"] / 100, score["n"]]
    assert sums.tolist() == pytest.approx([sum(expected), 21])
    shutil.copytree(classes3, tmp_path / "x")
    (tmp_path / "x" / "val" / "bee" / "003.jpg").write_text("nothing")
    source = crop.Folder(str(tmp_path / "x" / "val"))
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    images = finetune.Batches(finetune.centre_crops(source, list(range(21)), 32, 0.95), 0, machine)
    score = finetune.accuracy(net, images, labels, machine)
    rest = [hit for i, hit in enumerate(expected) if i != 10]
    assert score["n"] == 20 and score["top1"] == pytest.approx(100 * np.mean(rest))


def test_knn_equals_a_brute_force_loop():
    """Weighted k-NN: the k most similar of the bank vote with exp(cosine / 0.07)."""
    bank, queries = F.normalize(rand(50, 6, seed=1) - 0.5), F.normalize(rand(20, 6, seed=2) - 0.5)
    labels = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 80):
        got = evaluate.vote(queries.float(), bank.float(), labels, 4, k, 0.07)
        for q, chosen in zip(queries, got):
            votes = [0.0] * 4
            for cosine, j in sorted(((float(q @ b), j) for j, b in enumerate(bank)))[::-1][:k]:
                votes[labels[j]] += math.exp(cosine / 0.07)
            assert votes[chosen] == max(votes)


def published(kind):
    """(a state dict by published names, the encoder it belongs to, flags), as found in the wild."""
    torch.manual_seed(1)
    vit, cnn = model.build_encoder("vit_t16").state_dict(), torchvision.models.resnet50()
    target = {k: v + 1 for k, v in vit.items()}
    released = vit | {f"{a}_c.{b}": v for k, v in target.items() if "." in k
                      for a, b in [k.split(".", 1)]} | {"decoder_embed.weight": torch.zeros(2)}
    side = {f"{s}.{k}": v for s, w in (("online", vit), ("target", target)) for k, v in w.items()}
    big = torch.randn(1, 1 + 24 * 24, 192)
    return {"timm": (vit | {"head.weight": torch.zeros(5, 192)}, vit), "big": (
                vit | {"pos_embed": big}, {k: v for k, v in vit.items() if k != "pos_embed"}),
            "torchvision": (cnn.state_dict(), {k: v for k, v in cnn.state_dict().items()
                                               if not k.startswith("fc.")}),
            "checkpoint": (dict(model=side, step=3), vit),
            "released": (dict(model=released, args=argparse.Namespace(lr=1), epoch=3), vit),
            "checkpoint, target": (dict(model=side), target),
            "released, target": (dict(model=released), target | {"cls_token": vit["cls_token"],
                                                                 "pos_embed": vit["pos_embed"]}),
            }[kind]


@pytest.mark.parametrize("kind", ["timm", "big", "torchvision", "checkpoint", "released",
                                  "checkpoint, target", "released, target"])
def test_published_weights_load_whole(kind, tmp_path):
    """timm's, torchvision's, our checkpoints' and the released files: every weight of the encoder
    is the file's, only the head (and a ViT's norm after the pooling) is new, tables are resized."""
    saved, expected = published(kind)
    torch.save(saved, tmp_path / "x.pt")
    name, state, _ = finetune.read_weights(str(tmp_path / "x.pt"), "target" in kind)
    net = model.Classifier(name, 3)
    said = finetune.load_weights(net, state, "x.pt")
    new = "fc (2)" if name == "resnet50" else "fc_norm (2), head (2)"
    assert re.search("new: (.*?);", said)[1] == new
    got = net.state_dict()
    for key, value in expected.items():
        if not key.startswith("norm."):
            assert torch.equal(got["encoder." + key], value), key
    if kind == "big":
        grid = saved["pos_embed"][:, 1:].unflatten(1, (24, 24)).permute(0, 3, 1, 2)
        small = F.interpolate(grid, size=(14, 14), mode="bicubic").flatten(2).mT
        torch.testing.assert_close(got["encoder.pos_embed"][:, 1:], small)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("blocks.3.mlp.fc1.bias"), "lacks blocks.3.mlp.fc1.bias; nothing was loaded"),
    (lambda s: s.update(extra=torch.zeros(1)), "has the unknown extra; nothing was loaded"),
    (lambda s: s.update({"blocks.0.norm1.bias": torch.zeros(7)}), "has shape [7] instead of [192]"),
    (lambda s: s.update(cls_token=torch.zeros(1, 1, 100)), "a ViT of width 100, depth 12"),
    (lambda s: s.pop("cls_token"), "holds no encoder known here"),
    (lambda s: s.update(blocks=Fraction(1, 3)), "is not a file of weights"),
    (lambda s: s.update(blocks=3), "is not a state dict"),
])
def test_other_weights_are_refused_whole(change, words, tmp_path):
    """A missing key, a surplus one, another shape or size, code: one sentence, nothing loaded."""
    state = model.build_encoder("vit_t16").state_dict()
    change(state)
    torch.save(dict(state), tmp_path / "x.pt")
    with pytest.raises(InputError, match=re.escape(words)):
        name, state, _ = finetune.read_weights(str(tmp_path / "x.pt"))
        finetune.load_weights(model.Classifier(name, 3), state, "x.pt")


def test_published_models_read_our_weights(classes3, tmp_path):
    """model.pt's weights in torchvision's resnet50, and in timm's ViT where timm is installed, give
    the logits of ours."""
    tune(tmp_path, classes3, "--model=resnet50", "--max_steps=1", "--batch_size=4")
    theirs = torchvision.models.resnet50(num_classes=3).eval()
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    theirs.load_state_dict(saved["weights"])
    cfg = pretrain.parse_config(evaluate.Config, {}, [f"--ckpt={tmp_path / 'model.pt'}"])
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    ours, names, view, _ = evaluate.load_model(cfg, machine)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert saved["classes"] == names == ["ant", "bee", "cat"] and view == (32, 0.95)
    timm = pytest.importorskip("timm")
    ours = model.Classifier("vit_s16", 3).eval()
    nn.init.normal_(ours.head.weight)
    theirs = timm.create_model("vit_small_patch16_224", num_classes=3, global_pool="avg").eval()
    theirs.load_state_dict({ours.names()[k]: v for k, v in ours.state_dict().items()})
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_a_step_of_fine_tuning_equals_the_recipe_written_out(classes3, tmp_path):
    """Two micro-batches, smoothed CutMix, layer decay, weight decay and clipping by hand give the
    same weights; the frozen position table stays, everything else moves."""
    tune(tmp_path, classes3, "--max_steps=1", "--micro_batch=4", "--cutmix=1", "--smoothing=0.1",
         "--clip=0.5", "--lr=0.01", "--lr_batch=16", "--warmup_epochs=0", "--weight_decay=0.3",
         "--layer_decay=0.5", "--randaugment_p=1", "--scale=0.3,0.9")
    torch.manual_seed(0)
    net = model.Classifier("vit_d8", 3)
    cut = partial(crop.cut_context, size=32, scale=(0.3, 0.9),
                  augment=finetune.RandAugment(9, 0.5, 1).augment)
    source = crop.Folder(str(classes3 / "train"))
    samples, mix = crop.Samples(source, list(range(24)), 0, cut), v2.CutMix(num_classes=3)
    order = np.random.default_rng((0, 2, 0)).permutation(24)[:8].tolist()
    for k in range(2):
        (images, numbers), _ = crop.collate([samples[0, i] for i in order[4 * k:4 * k + 4]])
        torch.manual_seed(int(np.random.SeedSequence((0, 7, 0, k, 0)).generate_state(1, "u8")[0]))
        torch.multinomial(torch.ones(1), 1)  # RandomChoice among one
        x, y = mix(crop.normalize(images.float() / 255), torch.tensor(source.labels)[numbers])
        (F.cross_entropy(net(x), y, label_smoothing=0.1) / 2).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    rates = {"encoder.blocks.0": 0.25, "encoder.blocks.1": 0.5, "encoder": 0.125, "": 1}
    for name, p in net.named_parameters():
        if p.requires_grad:
            rate = 0.005 * next(r for start, r in rates.items() if name.startswith(start))
            decay = 0.3 if name.endswith("weight") and p.ndim > 1 else 0
            torch.optim.AdamW([p], lr=rate, weight_decay=decay, fused=True).step()
    got = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    for key, value in net.state_dict().items():
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-5)


def test_a_linear_probe_trains_the_head_alone(classes3, tmp_path):
    """--recipe=linear: encoder and its BatchNorm statistics stay, features are normalised without
    parameters, and only the linear layer learns."""
    flags = ["--recipe=linear", f"--data={classes3}", "--init=scratch", "--device=cpu",
             "--dtype=float32", "--workers=0", "--batch_size=8", "--image_size=32",
             "--test_size=32", "--model=resnet50", "--max_steps=2"]
    finetune.main([*flags, f"--out={tmp_path}"])
    torch.manual_seed(0)
    before = model.Classifier("resnet50", 3, probe=True).state_dict()
    after = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"head.weight", "head.bias", "fc_norm.running_mean", "fc_norm.running_var",
                     "fc_norm.num_batches_tracked"}


@pytest.mark.parametrize("name", pretrain.STOPPERS)
def test_fine_tuning_goes_on_bit_for_bit(name, classes3, tmp_path, monkeypatch):
    """A run stopped by a signal in its second step and resumed equals the whole, with everything
    random on; another recipe on the same folder is an error that names what differs."""
    flags = ["--mixup=0.8", "--cutmix=1", "--drop_path=0.5", "--randaugment_p=0.5",
             "--erasing=0.5", "--repeats=3"]
    whole = tune(tmp_path / "a", classes3, *flags, "--max_steps=4")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(finetune, "set_learning_rate", lambda optimizer, lr: (
            pretrain.set_learning_rate(optimizer, lr), lr < 1e-4 or signal.raise_signal(name)))
        tune(tmp_path / "b", classes3, *flags, "--max_steps=4")
    assert stop.value.code == 75
    assert [r["step"] for r in pretrain.read_log(tmp_path / "b")] == [1]
    parts = tune(tmp_path / "b", classes3, *flags, "--max_steps=4", "--workers=1")
    assert [r["loss"] for r in whole] == [r["loss"] for r in parts]
    a, b = (torch.load(tmp_path / x / "model.pt", weights_only=True)["weights"] for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(InputError, match=r"differs in mixup \(0.8 there, 0.0 here\)"):
        tune(tmp_path / "b", classes3, *flags, "--mixup=0")


def test_pretrain_finetune_evaluate_one_after_the_other(classes3, tmp_path):
    """The three scripts on a folder of generated images; two processes give the accuracy of one;
    another class count gives the head another size; online and target, and an untrained encoder,
    are scored by k-NN."""
    def on_two(*words):
        result = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                         *words, *data)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()[-1]

    pre, fine = tmp_path / "pre", tmp_path / "fine"
    data = [f"--data={classes3}", "--device=cpu", "--dtype=float32", "--workers=0"]
    demo(pre, f"--data={classes3}", "--max_steps=2")
    on_two("finetune.py", *SMALL, f"--init={pre / 'encoder.pt'}", f"--out={fine}", "--max_steps=4",
           "--micro_batch=2")
    top1 = ["--bench=top1", f"--ckpt={fine / 'model.pt'}"]
    last = json.loads(open(fine / "log.jsonl").readlines()[-1])
    for got in (score(fine, *top1, *data), json.loads(on_two("evaluate.py", *top1))):
        assert got["n"] == 21 and got["top1"] == pytest.approx(last["top1"], abs=1e-3)
    tune(tmp_path / "eight", "shapes", f"--init={fine / 'model.pt'}", "--max_steps=1")
    saved = torch.load(tmp_path / "eight" / "model.pt", weights_only=True)
    assert saved["weights"]["head.weight"].shape == (8, 64) and saved["classes"][0] == "circle"
    knn = ["--bench=knn", "--size=32"]
    found = [score(pre, *knn, *data, *words) for words in (
        [f"--ckpt={pre / 'encoder.pt'}"], [f"--ckpt={pre / 'ckpt.pt'}", "--use_target"],
        ["--ckpt=scratch", "--model=vit_d8"])]
    found.append(json.loads(on_two("evaluate.py", *knn, f"--ckpt={pre / 'ckpt.pt'}")))
    assert found[0]["knn"] == found[3]["knn"] and all(f["bank"] == 24 for f in found)
    assert (pre / "knn.json").exists() and (pre / "knn_target.json").exists()


@pytest.mark.parametrize("flags, words", [
    (["--recipe=vit_l"], "choose one of vit_b, vit_s, resnet50_100"),
    (["--init=/no/file"], "no file '/no/file': wanted is"),
    (["--init=README.md"], "is not a file of weights"),
    (["--recipe=linear"], "--init=scratch needs --model"),
    (["--model=resnet50", "--drop_path=0.1"], "no stochastic depth"),
    (["--image_size=30"], "no whole patches of 8 (vit_d8): 32 would be"),
    (["--init=scratch", "--use_target"], "has no target"),
    (["--recipe=linear", "--model=vit_d8", "--micro_batch=1"], "too few for BatchNorm"),
    (["--randaugment=11"], "0 to 10"),
    (["--scale=0,1"], "0 < low <= high"),
    (["--drop_path=1"], "below 1"),
    (["--use_target", "--init={tmp}/vit.pt"], "holds no target"),
    (["--init={tmp}/vit.pt", "--model=vit_d8"], "holds vit_t16, not vit_d8"),
    (["--recipe=resnet50_100", "--init={tmp}/vit.pt"], "take --recipe=vit_b, or insist"),
    (["--data={tmp}/loose"], "has 0 class folders"),
    (["--data={tmp}/odd"], "1 classes that the 2 known ones lack: dog"),
])
def test_fine_tuning_that_cannot_work_is_named(flags, words, tmp_path, classes3):
    """Each impossible value, file or folder is one clear sentence, before any work."""
    torch.save(model.build_encoder("vit_t16").state_dict(), tmp_path / "vit.pt")
    save_images(tmp_path / "loose", 5)
    for place in ("train/ant", "train/bee", "val/ant", "val/dog"):
        save_images(tmp_path / "odd" / place, 2)
    with pytest.raises(InputError, match=re.escape(words)):
        tune(tmp_path / "x", classes3, *(flag.format(tmp=tmp_path) for flag in flags))
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------- 8. evaluation

def score(out, *flags):
    """Run evaluate.py in this process; -> its JSON."""
    evaluate.main(["--device=cpu", "--dtype=float32", "--workers=0", f"--out={out}", *flags])
    return json.load(open(max(out.glob("*.json"), key=os.path.getmtime)))


def save_classifier(path, classes, seed=0):
    """A model.pt of a small untrained ViT that has opinions; -> the model."""
    torch.manual_seed(seed)
    net = model.Classifier("vit_d8", len(classes)).eval()
    nn.init.normal_(net.head.weight)
    cfg = recipe("demo", "--model=vit_d8", "--test_size=32")
    finetune.save_model(str(path), net, cfg, classes, top1=50.0)
    return net


def predictions(net, folder, names, cut=partial(crop.cut_centre, size=32), among=None):
    """By a plain loop over the images of a folder: is the best of `among` the image's class?"""
    hits = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image, torch.no_grad():
            logits = net(crop.normalize(cut(image, None)[None].float() / 255))[0]
        best = max(among or names, key=lambda name: logits[names.index(name)])
        hits.append(best == path.parent.name)
    return 100 * np.mean(hits)


def test_attacks_on_a_linear_model_have_a_closed_form():
    """FGSM and PGD against two classes that are linear in the pixels end where every pixel moved
    by eps towards the other class, or to the edge of [0, 1]."""
    weights = torch.randn(2, 192, generator=torch.Generator().manual_seed(0)) / 20
    x, y = rand(4, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 1, 1, 0])
    x[0, :, 0] = 1.0
    uphill = torch.stack([(weights[1 - k] - weights[k]).sign().view(3, 8, 8) for k in y])
    expected = (x + uphill / 255).clamp(0, 1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False))
    linear[1].weight.data = weights
    start = (2 * rand(4, 3, 8, 8, seed=1, dtype=torch.float32) - 1) / 255
    for attack in (torch.zeros_like(x), 1 / 255, 1), (start, 0.5 / 255, 5):
        got = evaluate.perturb(linear, x, y, attack[0], 1 / 255, *attack[1:])
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)


def test_attacks_stay_in_the_ball_and_hurt(tmp_path, classes3):
    """No attacked pixel leaves eps or [0, 1], whatever the start and the number of steps; eps 0 is
    the clean score, and PGD from the same seed is the same for two processes as for one."""
    net = save_classifier(tmp_path / "model.pt", ["ant", "bee", "cat"])
    x, y = rand(4, 3, 32, 32, dtype=torch.float32).round(decimals=1), torch.tensor([0, 1, 2, 0])
    start = 9 * torch.randn(4, 3, 32, 32)
    got = evaluate.perturb(net, x, y, start, 4 / 255, 3 / 255, 7)
    assert (got - x).abs().max() <= 4 / 255 + 1e-7 and got.min() >= 0 and got.max() <= 1
    loss = [F.cross_entropy(net(crop.normalize(z)), y).item() for z in (x, got)]
    assert loss[1] > loss[0] + 0.01
    flags = [f"--ckpt={tmp_path / 'model.pt'}", f"--data={classes3}"]
    clean = predictions(net, classes3 / "val", ["ant", "bee", "cat"])
    none = score(tmp_path, "--bench=fgsm", "--eps=0", *flags)
    assert none["fgsm"] == none["clean"] == pytest.approx(clean, abs=1e-3)
    one = score(tmp_path, "--bench=pgd", "--eps=8", "--step=4", *flags)
    assert one["pgd"] < one["clean"] == pytest.approx(clean, abs=1e-3) and one["n"] == 21
    two = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                  "evaluate.py", "--bench=pgd", "--eps=8", "--step=4", "--device=cpu",
                  "--dtype=float32", "--workers=0", f"--out={tmp_path}", *flags)
    assert json.loads(two.stdout.splitlines()[-1])["pgd"] == one["pgd"], two.stderr


def test_mce_is_relative_to_alexnet():
    """Table 8: AlexNet's own errors have mCE 100 (and a mean error of 78.8); half of them 50; one
    corruption twice as bad adds a fifteenth; without all fifteen there is none."""
    own = {name: [100 * e] * 5 for name, e in evaluate.ALEXNET.items()}
    assert len(own) == 15 and evaluate.corruption_error(own) == pytest.approx((100, 78.8), abs=0.1)
    half = {name: [0, 0, e[0], e[0] * 1.5, 0] for name, e in own.items()}
    assert evaluate.corruption_error(half)[0] == pytest.approx(50)
    worse = own | {"fog": [2 * e for e in own["fog"]]}
    assert evaluate.corruption_error(worse)[0] == pytest.approx(100 + 100 / 15)
    mce, mean = evaluate.corruption_error({"fog": [10, 20, 30, 40, 50]})
    assert mce is None and mean == 30


def test_imagenet_c_reads_the_published_layout(tmp_path, capsys):
    """CORRUPTION/SEVERITY/CLASS, also one folder deeper as in the published archives: each error is
    that of a plain loop over uncropped images; what is missing is named and there is no mCE."""
    names = ["bee", "ant"]  # not in the order of the folders
    net = save_classifier(tmp_path / "model.pt", names)
    for k, place in enumerate(["noise/gaussian_noise", "fog"]):
        for severity in range(1, 6):
            for i, name in enumerate(names):
                save_images(tmp_path / "c" / place / str(severity) / name, 2, (32, 32),
                            seed=100 * k + 10 * severity + i)
    got = score(tmp_path, "--bench=imagenet_c", f"--ckpt={tmp_path / 'model.pt'}",
                f"--data={tmp_path / 'c'}")
    whole = partial(crop.cut_centre, size=32, ratio=1.0)
    for name, place in ("gaussian_noise", "noise/gaussian_noise"), ("fog", "fog"):
        expected = [100 - predictions(net, tmp_path / "c" / place / str(s), names, whole)
                    for s in range(1, 6)]
        assert got["errors"][name] == pytest.approx(expected)
    assert got["mce"] is None and got["n"] == 40 and got["clean"] == 50
    assert len(got["missing"]) == 13 and "no mCE: shot_noise" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "c" / "noise" / "gaussian_noise" / "3")
    again = score(tmp_path, "--bench=imagenet_c", f"--ckpt={tmp_path / 'model.pt'}",
                  f"--data={tmp_path / 'c'}")
    assert again["missing"][0] == "gaussian_noise" and list(again["errors"]) == ["fog"]


def test_predictions_are_made_among_the_folders_only(tmp_path):
    """ImageNet-A, -R, -Sketch: classes are found by name, not by place, and only those that have a
    folder can be predicted; one unreadable image is left out."""
    names = ["dog", "ant", "cow", "bee"]
    net = save_classifier(tmp_path / "model.pt", names, seed=3)
    for k, name in enumerate(["bee", "cow", "dog"]):
        save_images(tmp_path / "r" / name, 8, seed=k)
    expected = predictions(net, tmp_path / "r", names, among=["bee", "cow", "dog"])
    assert expected != predictions(net, tmp_path / "r", names)  # the protocol matters here
    (tmp_path / "r" / "cow" / "zzz.jpg").write_text("no image")
    got = score(tmp_path, "--bench=imagenet_r", f"--ckpt={tmp_path / 'model.pt'}",
                f"--data={tmp_path / 'r'}")
    assert got["imagenet_r"] == pytest.approx(expected, abs=1e-3) and got["n"] == 24
    assert got["classes"] == 3


def test_map_scores_equal_a_float64_loop(tmp_path):
    """Figures 5 and 6 in numbers: cross-entropy, IoU at 0.5, area and angle of each exemplar by a
    plain loop; the total is their mean and skill 1 - loss / baseline."""
    boxes = crop.sample_boxes(rand(2, 3, 6))
    theta = crop.affine_from_boxes(boxes)
    maps, mean = crop.rasterize_maps(theta, 16), rand(16, 16).clamp(0.1, 0.9)
    logits = 4 * rand(2, 3, 16, 16, seed=1) - 2
    got = evaluate.map_scores(maps, theta, logits, mean)
    for b in range(2):
        for k in range(3):
            t, p = maps[b, k], logits[b, k].sigmoid()
            ce, base = (-(t * q.log() + (1 - t) * (1 - q).log()).mean() for q in (p, mean))
            both = sum(bool(x > 0.5 and y) for x, y in zip(p.flatten(), t.flatten()))
            either = sum(bool(x > 0.5 or y) for x, y in zip(p.flatten(), t.flatten()))
            _, _, w, h, angle, _ = boxes[b, k]
            expected = torch.stack([ce, base, w * h, angle.abs().rad2deg(), ce * 0 + both / either])
            torch.testing.assert_close(got[b, k], expected)
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    total = evaluate.map_report(got, machine)
    means = got.mean((0, 1))
    assert total["skill"] == pytest.approx(1 - (means[0] / means[1]).item())
    assert total["iou"] == pytest.approx(100 * means[4].item()) and total["n"] == 2
    assert len(total["parts"]) == 7 and "r0" in list(total["parts"])[0]


def test_maps_are_measured_from_a_checkpoint(tmp_path):
    """--bench=maps takes any pre-training ckpt.pt and any folder of images, however deep."""
    demo(tmp_path / "run", "--max_steps=1")
    save_images(tmp_path / "photos" / "deep" / "er", 20)
    got = score(tmp_path, "--bench=maps", f"--ckpt={tmp_path / 'run' / 'ckpt.pt'}",
                f"--data={tmp_path / 'photos'}")
    assert got["n"] == 20 and got["loss"] == pytest.approx(math.log(2), rel=0.02)
    assert Image.open(tmp_path / "figures.png").width > 600


def test_curves_show_the_log_and_how_the_maps_came_about(tmp_path):
    """--bench=curves draws log.jsonl: a line falls where the numbers fall, between its levels; the
    strip holds one sheet and, below it, the predicted maps of later looks."""
    panel = np.asarray(evaluate.draw_panel("x", {"a": [(0, 1.0), (10, 0.0)]}, {"half": 0.5}))
    line = (panel[30:] == [0, 180, 216]).all(2)  # below the legend, in COLOURS[3]
    first, last = (line[:, np.flatnonzero(line.any(0))[k]].nonzero()[0].mean() for k in (0, -1))
    level = (panel[30:] == 0x88).all(2).sum(1).argmax()
    assert first < level < last and abs((first + last) / 2 - level) < 4
    demo(tmp_path, "--max_steps=6", "--eval_every=2")
    assert len(os.listdir(tmp_path / "maps")) == 3
    report = score(tmp_path, "--bench=curves", f"--ckpt={tmp_path / 'encoder.pt'}")
    assert report["steps"] == 6 and report["rows"] == 6 and "images_per_s" not in report
    sheet, strip = (Image.open(tmp_path / p) for p in ("maps/0000002.png", "strip.png"))
    assert strip.size == (sheet.width, sheet.height + 2 * (crop.TILE + crop.TILE // 12))
    assert Image.open(tmp_path / "curves.png").size == (640, 2 * 300)
    with pytest.raises(InputError, match="has no log.jsonl"):
        score(tmp_path, "--bench=curves", f"--ckpt={tmp_path / 'none' / 'ckpt.pt'}")


@pytest.mark.parametrize("flags, words", [
    (["--bench=top2"], "choose one of top1, knn"),
    (["--ckpt=/no/file"], "there is no file '/no/file'"),
    (["--ckpt={tmp}/vit.pt"], "has no classifier"),
    (["--bench=knn", "--ckpt=scratch"], "needs --model"),
    (["--bench=knn", "--ckpt=scratch", "--model=vit_d8", "--size=30"], "no whole patches of 8"),
    (["--bench=maps"], "takes the ckpt.pt of a pre-training run"),
    (["--bench=maps", "--use_target"], "--use_target True has no meaning with --bench maps"),
    (["--bench=knn", "--ckpt=/no/run/encoder.pt", "--out={tmp}/new"], "there is no file '/no/run"),
    (["--data=/no/folder"], "there is no folder '/no/folder'"),
    (["--data={tmp}/loose"], "has no images in class folders"),
    (["--bench=imagenet_r", "--data={tmp}/odd"], "1 classes that the 3 known ones lack: dog"),
    (["--bench=imagenet_a", "--data={tmp}/empty"], "has no images in 1 of its class folders: bee"),
    (["--bench=imagenet_c", "--data={tmp}/odd"], "has none of the 15 corruptions"),
])
def test_evaluation_that_cannot_work_is_named(flags, words, tmp_path):
    """A wrong layout, an unknown or empty class, another kind of file: one clear sentence."""
    save_classifier(tmp_path / "model.pt", ["ant", "bee", "cat"])
    torch.save(model.build_encoder("vit_t16").state_dict(), tmp_path / "vit.pt")
    save_images(tmp_path / "loose", 2)
    for place in ("odd/ant", "odd/dog", "empty/ant"):
        save_images(tmp_path / place, 2)
    (tmp_path / "empty" / "bee").mkdir()
    with pytest.raises(InputError, match=re.escape(words)):
        score(tmp_path, f"--ckpt={tmp_path / 'model.pt'}", f"--data={tmp_path / 'odd'}",
              *(flag.format(tmp=tmp_path) for flag in flags))
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------ 9. segmentation

SCENES = ["--recipe=segment", "--model=vit_d8", "--init=scratch", "--device=cpu", "--dtype=float32",
          "--workers=0", "--log_every=1", "--image_size=32", "--test_size=32", "--head_width=16",
          "--batch_size=4"]
CPU = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Red ellipses (2) on blue grounds (1) with a strip of unlabelled pixels: 12 to train on, 5 to
    validate on, of several sizes and kinds of file, in ADE20K's layout."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in ("training", 12), ("validation", 5):
        for kind in "images", "annotations":
            (root / kind / split / "street").mkdir(parents=True)
        for i in range(count):
            w, h = [(70, 60), (40, 64), (90, 41)][i % 3]
            y, x = np.mgrid[:h, :w]
            cx, cy, r = rng.uniform(0.3, 0.7) * w, rng.uniform(0.3, 0.7) * h, rng.uniform(8, 16)
            mask = np.where((x - cx) ** 2 + 2 * (y - cy) ** 2 < r * r, 2, 1).astype(np.uint8)
            image = np.where(mask[..., None] == 2, [200, 60, 50], [50, 80, 180])
            image = (image + rng.normal(0, 20, (h, w, 3))).clip(0, 255).astype(np.uint8)
            mask[:3] = 0
            name = f"{split}/street/{i:02d}"
            Image.fromarray(image).save(root / "images" / (name + (".jpg" if i % 2 else ".png")))
            mask = Image.fromarray(mask)
            if i % 2:
                mask.putpalette([9, 9, 9, 255, 0, 0, 7, 7, 7])  # does not change its numbers
            mask.save(root / "annotations" / (name + ".png"))
    return root


def segment(out, data, *flags):
    """Train a segmenter in this process; -> the rows of the log."""
    finetune.main([*SCENES, f"--data={data}", f"--out={out}", *flags])
    return list(pretrain.read_log(str(out)))


def test_the_recipe_segment_is_beits():
    """Table 7: AdamW, 160,000 steps of 16 on ADE20K's 20,210 images, 1,500 of linear warm-up, then
    a straight line to 0."""
    expected = dict(lr=3e-5, batch_size=16, lr_batch=16, weight_decay=0.05, layer_decay=0.9,
                    drop_path=0.1, beta1=0.9, beta2=0.999, clip=0, optimizer="adamw", flip=0.5,
                    image_size=512, test_size=512, scale=(0.5, 2.0), cat_max_ratio=0.75,
                    photometric=0.5, head_width=768, schedule="linear", task="segment")
    cfg = recipe("segment")
    assert {k: getattr(cfg, k) for k in expected} == expected
    plan = pretrain.make_plan(cfg, CPU, 20_210)
    assert plan.warmup == 1500 and 160_000 <= plan.total < 160_500
    lr = [pretrain.learning_rate(s, 100, 2.0, 10, "linear") for s in range(101)]
    assert lr[9] == lr[10] == 2.0 and lr[55] == pytest.approx(1.0) and lr[100] == 0


@pytest.mark.parametrize("name, patch, taken", [
    ("vit_t16", 16, [4, 6, 8, 12]), ("vit_d8", 8, [1, 1, 2, 2])])
def test_the_pyramid_is_made_of_four_blocks(name, patch, taken):
    """4.4 and BEiT: blocks 4, 6, 8 and 12 without the final norm at strides of 1/4, 1/2, 1 and 2
    patches; logits as large as the image, whatever its sides; every parameter learns."""
    torch.manual_seed(0)
    net = model.Segmenter(name, 5, width=16)
    h, w = 6 * patch, 2 * patch
    images = torch.randn(2, 3, h, w)
    maps = net.features(images)
    strides = [(h // f.shape[2], w // f.shape[3]) for f in maps]
    assert strides == [(s, s) for s in (patch // 4, patch // 2, patch, 2 * patch)]
    x = net.encoder.patch_embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([net.encoder.cls_token.expand(2, -1, -1),
                   x + model.resize_positions(net.encoder.pos_embed[:, 1:], 6, 2)], 1)
    outputs = []
    for block in net.encoder.blocks:
        x = block(x)
        outputs.append(x[:, 1:].transpose(1, 2).reshape(2, -1, 6, 2))
    assert [i + 1 for i in net.taken] == taken
    for scale, i, got in zip(net.pyramid, taken, maps):
        torch.testing.assert_close(got, scale(outputs[i - 1]))
    torch.testing.assert_close(maps[3], F.max_pool2d(outputs[-1], 2))
    logits, auxiliary = net(images)
    assert logits.shape == auxiliary.shape == (2, 5, h, w) and logits.dtype == torch.float32
    (logits.square().sum() + auxiliary.square().sum()).backward()
    still = {k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"encoder.pos_embed"}
    assert net.eval()(images[:, :, :patch]).shape == (2, 5, patch, w)
    with pytest.raises(ValueError, match="takes a ViT"):
        model.Segmenter("resnet50", 5)


def test_the_segmenter_has_the_published_size():
    """ViT-B/16 with UperNet of 768 channels and 150 classes: 163 M parameters, as BEiT's."""
    with torch.device("meta"):
        net = finetune.build_model(recipe("segment", "--model=vit_b16"), 150)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 163


def test_upernet_equals_the_figure():
    """UperNet [70] written out: pooling to 1, 2, 3 and 6 places, top-down sums, fusion."""
    torch.manual_seed(0)
    head = model.UperNet(8, 3, 4).eval()
    maps = [torch.randn(2, 8, 24 // 2**k, 16 // 2**k) for k in range(4)]

    def up(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    pooled = [up(pool(F.adaptive_avg_pool2d(maps[3], n)), maps[3])
              for pool, n in zip(head.pools, (1, 2, 3, 6))]
    p = [lateral(x) for lateral, x in zip(head.laterals, maps)]
    p.append(head.bottleneck(torch.cat([maps[3], *pooled], 1)))
    for k in (2, 1, 0):
        p[k] = p[k] + up(p[k + 1], p[k])
    levels = [head.smooth[k](p[k]) for k in range(3)] + [p[3]]
    expected = head.fuse(torch.cat([up(x, levels[0]) for x in reversed(levels)], 1))
    torch.testing.assert_close(head(maps), expected)


def test_mean_iou_equals_a_float64_loop():
    """IoU, mean accuracy and pixel accuracy from the confusion matrix are those of a loop over
    pixels; unlabelled ones do not count, and a class that never occurs is left out."""
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 5, (30, 40)), rng.integers(0, 6, (30, 40))
    labels[labels == 3] = 1  # class 3 is found, never there; 6 is neither
    found[found == 5] = 0
    hits, there, said = (np.zeros(6) for _ in range(3))
    for t, f in zip(labels.ravel().tolist(), found.ravel().tolist()):
        if t > 0:
            hits[f] += t - 1 == f
            there[t - 1] += 1
            said[f] += 1
    matrix = finetune.confusion(torch.from_numpy(labels).byte(), torch.from_numpy(found), 6)
    assert matrix.dtype == torch.int64 and matrix.sum() == (labels > 0).sum()
    got = finetune.iou_scores(matrix)
    iou = [100 * hits[c] / (there[c] + said[c] - hits[c]) for c in range(5)]
    assert got["iou"] == pytest.approx([*iou, None]) and got["iou"][2] == 0
    assert got["miou"] == pytest.approx(np.mean(iou))
    assert got["macc"] == pytest.approx(np.mean([100 * hits[c] / there[c] for c in (0, 1, 3)]))
    assert got["aacc"] == pytest.approx(100 * hits.sum() / there.sum())


@pytest.mark.parametrize("h, w", [(24, 24), (24, 96), (57, 24), (10, 31), (7, 5)])
def test_sliding_windows_average_what_covers_a_pixel(h, w):
    """Windows two thirds apart, the last one at the border: each pixel is the mean over the windows
    that cover it, here of a model that also tells where in its window a pixel lies."""
    size, calls = 24, []
    ramp = torch.arange(size * size).view(size, size).float()

    def net(x):
        calls.append(x)
        return torch.stack([x.mean(1) + ramp, x[:, 0] * ramp], 1)

    x = torch.randn(1, 3, h, w)
    padded = torch.zeros(1, 3, max(h, size), max(w, size))
    padded[:, :, :h, :w] = x
    total, count = torch.zeros(1, 2, *padded.shape[2:]), torch.zeros(padded.shape[2:])
    for a in sorted({min(a, padded.shape[2] - size) for a in range(0, padded.shape[2], 16)}):
        for b in sorted({min(b, padded.shape[3] - size) for b in range(0, padded.shape[3], 16)}):
            total[:, :, a:a + size, b:b + size] += net(padded[:, :, a:a + size, b:b + size])
            count[a:a + size, b:b + size] += 1
    brute = len(calls)
    got = finetune.sliding_window(net, x, size)
    assert count.min() >= 1 and sum(len(c) for c in calls[brute:]) == brute
    torch.testing.assert_close(got, (total / count)[:, :, :h, :w])


def test_images_are_fitted_to_the_shorter_side():
    """512 for the shorter side, but never more than 2,048 for the longer one."""
    for sides, expected in (((683, 512), (683, 512)), ((300, 600), (512, 1024)),
                            ((6000, 1000), (2048, 341)), ((9000, 1), (2048, 1))):
        assert finetune.rescaled_size(*sides, 512) == expected


@pytest.mark.parametrize("size", [(200, 160), (90, 200), (800, 600)])
def test_a_random_crop_keeps_image_and_mask_together(size, tmp_path):
    """A mask that is a function of the image stays it, at any scale, mirrored or not; what is
    outside has the mean colour and no label. The same numbers give the same crop, and shrinking
    while decoding leaves it as sharp."""
    w, h = size
    y, x = np.mgrid[:h, :w]
    red, green = x * 255 // (w - 1), y * 255 // (h - 1)
    checks = 255 * ((x // 6 + y // 6) % 2)
    image = Image.fromarray(np.stack([red, green, checks], 2).astype(np.uint8))
    mask = Image.fromarray((1 + red // 32 + 8 * (green // 32)).astype(np.uint8))
    image.save(tmp_path / "x.jpg", quality=98, subsampling=0)
    cfg, sides = recipe("segment", "--image_size=96", "--photometric=0"), set()
    for seed in range(30):
        cuts = []
        for _ in range(2):
            with Image.open(tmp_path / "x.jpg") as jpeg:  # which draft() may shrink
                cuts.append(finetune.cut_scene((jpeg, mask), np.random.default_rng(seed), cfg))
        assert torch.equal(*cuts) and cuts[0].dtype == torch.uint8
        whole = finetune.cut_scene((image, mask), np.random.default_rng(seed), cfg)
        assert (whole.float() - cuts[0].float()).abs().mean() < 6
        red, green, _, label = cuts[0].long()
        inside = label > 0
        for channel, number in (red, (label - 1) % 8), (green, (label - 1) // 8):
            away = (channel - (32 * number + 16)).abs()[inside]
            assert (away <= 16 + 6).all() and (away <= 16).float().mean() > 0.9
        assert (cuts[0][:3, ~inside] == torch.tensor(finetune.MEAN_COLOUR)[:, None]).all()
        sides.add((bool(inside.all()), bool(red[0, 0] < red[0, int(inside[0].sum()) - 1])))
    assert len(sides) == 4  # with and without padding, mirrored and not


def test_no_class_fills_a_crop_if_ten_tries_find_another():
    """At most 75% of the labelled pixels are of one class where such a place is easily found."""
    mask = np.ones((64, 256), np.uint8)
    mask[:, 160:] = 2
    mask[:20] = 0
    pair = Image.new("RGB", (256, 64)), Image.fromarray(mask)

    def most(**flags):
        cfg = recipe("segment", "--image_size=64", "--scale=1,1",
                     *(f"--{k}={v}" for k, v in flags.items()))
        for seed in range(60):
            label = finetune.cut_scene(pair, np.random.default_rng(seed), cfg)[3]
            counts = label.flatten().bincount(minlength=3)[1:]
            yield (counts.max() / counts.sum()).item()

    # one place in six is good: 60 x (5/6)^10 = 10 crops find none, or 50 without looking
    assert sum(m > 0.75 for m in most()) <= 15 and sum(m > 0.75 for m in most(cat_max_ratio=1)) > 40


def test_photometric_distortion_equals_the_formulas():
    """Brightness adds, contrast multiplies, saturation and hue change those alone; each happens
    with its probability, and nothing else does."""
    image = Image.fromarray(np.random.default_rng(0).integers(60, 120, (8, 8, 3), dtype=np.uint8))
    before, kinds = np.asarray(image).astype(int), set()

    class Draws:  # what happens, and how much
        def __init__(self, *happens):
            self.happens = 1.0 - np.array(happens)

        def random(self, n=None):  # the last one: contrast comes late
            return self.happens[:n] if n else self.happens[4]

        def uniform(self, low, high):
            return np.array([10, 1.5, 0.5, 25.6])

    def changed(*happens):
        return np.asarray(finetune.photometric_distortion(image, Draws(*happens), 0.5)).astype(int)

    assert (changed(0, 0, 0, 0, 1) == before).all()
    assert (changed(1, 0, 0, 0, 0) == before + 10).all()
    assert np.abs(changed(0, 1, 0, 0, 1) - before * 1.5).max() <= 0.5
    assert np.abs(changed(1, 1, 0, 0, 0) - (before + 10) * 1.5).max() <= 0.5
    hsv = [np.asarray(Image.fromarray(x.astype(np.uint8)).convert("HSV")).astype(int)
           for x in (before, changed(0, 0, 1, 0, 0), changed(0, 0, 0, 1, 0))]
    assert np.abs(hsv[1][..., 1] - hsv[0][..., 1] / 2).max() < 4
    turned = (hsv[2][..., 0] - hsv[0][..., 0] - 25.6 + 128) % 256 - 128
    assert np.abs(np.median(turned)) < 3 and np.abs(hsv[2][..., 2] - hsv[0][..., 2]).max() <= 1
    for seed in range(100):
        rng = np.random.default_rng(seed)
        kinds.add(finetune.photometric_distortion(image, rng, 0.5).tobytes() == image.tobytes())
        assert finetune.photometric_distortion(image, rng, 0.0) == image
    assert kinds == {True, False}


def test_the_loss_counts_each_labelled_pixel_alike():
    """Cross-entropy by a float64 loop over the pixels with a label, over the number of all; where
    none has one the loss and its gradient are 0."""
    logits, labels = rand(2, 3, 4, 5).requires_grad_(), torch.randint(0, 4, (2, 4, 5)).byte()
    labels[0, 0] = 0
    terms = [-logits[b, :, y, x].log_softmax(0)[labels[b, y, x].long() - 1]
             for b, y, x in labels.nonzero().tolist()]
    torch.testing.assert_close(finetune.pixel_loss(logits, labels), sum(terms) / labels.numel())
    loss = finetune.pixel_loss(logits, torch.zeros_like(labels))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    batch = torch.cat([torch.zeros(2, 3, 4, 5).byte(), labels[:, None]], 1)
    whole = finetune.segmenter_loss(None, None, CPU)(lambda x: (logits, 2 * logits), batch, None)
    expected = finetune.pixel_loss(logits, labels) + 0.4 * finetune.pixel_loss(2 * logits, labels)
    torch.testing.assert_close(whole, expected)


def test_two_classes_are_learned_and_measured(scenes, tmp_path, capsys):
    """In seconds a small segmenter tells ellipses from ground; evaluate.py gives the run's score, a
    plain loop's, and that of three processes, and paints what was asked for."""
    rows = segment(tmp_path, scenes, "--epochs=40", "--warmup_epochs=2", "--lr=8e-3",
                   "--layer_decay=1", "--eval_epochs=20", "--log_every=40")
    assert rows[-1]["miou"] > 85 and rows[-1]["n"] == 5 and rows[-1]["loss"] < rows[0]["loss"] / 3
    got = score(tmp_path, "--bench=miou", f"--ckpt={tmp_path / 'model.pt'}", f"--data={scenes}",
                "--pictures=2")
    assert got["miou"] == pytest.approx(rows[-1]["miou"], abs=1e-3) and got["n"] == 5
    assert list(got["iou"]) == ["1", "2"]
    cfg = pretrain.parse_config(evaluate.Config, {}, ["--bench=miou",
                                                      f"--ckpt={tmp_path / 'model.pt'}"])
    net, names, size = evaluate.load_segmenter(cfg, CPU)
    source = finetune.Scenes(str(scenes), "validation")
    matrix, parts, painted = torch.zeros(2, 2, dtype=torch.int64), [], []
    for i in range(5):
        with source.open(i) as (image, mask), torch.no_grad():
            x, y = crop.to_tensor(crop.to_rgb(image)), torch.from_numpy(np.array(mask))
        w, h = finetune.rescaled_size(*image.size, size)
        x = F.interpolate(x[None] / 255, (h, w), mode="bilinear", antialias=True)
        with torch.no_grad():
            logits = finetune.sliding_window(net, crop.normalize(x), size)
        best = F.interpolate(logits, y.shape, mode="bilinear").argmax(1)[0]
        for t, f in zip(y.flatten().tolist(), best.flatten().tolist()):
            if t > 0:
                matrix[t - 1, f] += 1
    for rank in range(3):
        machine = pretrain.Machine(torch.device("cpu"), rank, 3, "float32", False)
        machine.share_buffers, machine.sum = lambda _: None, lambda *x: parts.append(x)
        images = finetune.Batches(finetune.whole_scenes(source, list(range(5))), 0, machine, 1)
        finetune.mean_iou(net, images, 2, size, machine, lambda j, *_: painted.append(j))
    assert torch.equal(sum(m for m, _ in parts), matrix) and sorted(painted) == [0, 1, 2, 3, 4]
    assert sum(n for _, n in parts) == 5
    assert got["miou"] == pytest.approx(finetune.iou_scores(matrix)["miou"], abs=1e-3)
    for name, (w, h) in ("00000_00", (70, 60)), ("00004_04", (40, 64)):
        picture = np.asarray(Image.open(tmp_path / f"miou_{name}.png"))
        assert picture.shape == (h, 3 * w, 3) and (picture[:3, w:2 * w] == 0).all()
        truth, found = picture[3:, w:2 * w], picture[3:, 2 * w:]
        assert {tuple(c) for c in truth.reshape(-1, 3).tolist()} == {(128, 0, 0), (0, 128, 0)}
        assert (truth == found).all(2).mean() > 0.9
    assert len(list(tmp_path.glob("miou_*.png"))) == 2
    assert len({tuple(c) for c in evaluate.PALETTE.tolist()}) == 256


def test_segmentation_goes_on_bit_for_bit(scenes, tmp_path):
    """Three steps, then resumed by the same command, equal five at once, with a worker or without;
    the file and a run by another recipe are told apart."""
    whole = segment(tmp_path / "a", scenes, "--max_steps=5", "--drop_path=0.5")
    segment(tmp_path / "b", scenes, "--max_steps=3", "--drop_path=0.5")
    parts = segment(tmp_path / "b", scenes, "--max_steps=5", "--drop_path=0.5", "--workers=1")
    assert [r["loss"] for r in whole] == [r["loss"] for r in parts]
    a, b = (torch.load(tmp_path / x / "model.pt", weights_only=True) for x in "ab")
    assert all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items())
    assert a["classes"] == ["1", "2"] and a["config"]["task"] == "segment"
    with pytest.raises(InputError, match=r"differs in cat_max_ratio \(0.75 there, 0.5 here\)"):
        segment(tmp_path / "b", scenes, "--drop_path=0.5", "--cat_max_ratio=0.5")


def test_masks_that_would_be_misread_are_refused(tmp_path):
    """Label 255, which others write for "unlabelled", and two masks of one name; two images of one
    name share its mask."""
    for split in "training", "validation":
        for kind in "images", "annotations":
            (tmp_path / kind / split).mkdir(parents=True)
        for name in "a.jpg", "a.png":
            Image.new("RGB", (5, 7)).save(tmp_path / "images" / split / name)
        Image.new("L", (5, 7), 255).save(tmp_path / "annotations" / split / "a.png")
    assert len(finetune.Scenes(str(tmp_path), "training")) == 2
    with pytest.raises(InputError, match="has label 255, which often means 'unlabelled'"):
        finetune.open_scenes(str(tmp_path), ["training"], None, CPU)
    names = [str(k) for k in range(255)]
    assert finetune.open_scenes(str(tmp_path), ["training"], names, CPU)[1] == names
    Image.new("L", (5, 7), 1).save(tmp_path / "annotations" / "training" / "a.bmp")
    with pytest.raises(InputError, match="has several masks by the name of 'a'"):
        finetune.open_scenes(str(tmp_path), ["training"], None, CPU)


@pytest.mark.parametrize("classes", [3, 16, 40])
def test_each_pixel_gets_the_class_of_the_largest_logit(classes):
    """However many classes there are, at the image's own size."""
    logits = rand(1, classes, 8, 8).float()

    class Net(nn.Module):
        def forward(self, x):
            return logits

    got = finetune.predict_labels(Net(), torch.zeros(3, 20, 20).byte(), 8, CPU)
    expected = F.interpolate(logits, (20, 20), mode="bilinear").argmax(1)[0]
    assert torch.equal(got, expected)


def test_two_processes_segment(scenes, tmp_path):
    """torchrun: every weight has a gradient to share, and both processes measure."""
    result = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                     "finetune.py", *SCENES, f"--data={scenes}", "--max_steps=1",
                     f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    row, = pretrain.read_log(str(tmp_path))
    assert row["n"] == 5 and 0.5 < row["loss"] / (1.4 * math.log(2)) < 1  # unlabelled


def test_a_segmenter_begins_with_any_encoder(scenes, classes3, tmp_path, capsys):
    """--init: encoder.pt, ckpt.pt (online or target) and a classifier's model.pt give the encoder,
    heads are new; a segmenter's gives a classifier its encoder too."""
    demo(tmp_path / "pre", "--max_steps=1")
    tune(tmp_path / "fine", classes3, "--max_steps=1")
    saved = torch.load(tmp_path / "pre" / "ckpt.pt", weights_only=True)["model"]
    for k, (path, flags, side) in enumerate([
            ("pre/encoder.pt", [], "online."), ("pre/ckpt.pt", [], "online."),
            ("pre/ckpt.pt", ["--use_target"], "target."), ("fine/model.pt", [], None)]):
        segment(tmp_path / str(k), scenes, f"--init={tmp_path / path}", *flags, "--max_steps=1",
                "--lr=1e-12", "--model=auto")
        got = torch.load(tmp_path / str(k) / "model.pt", weights_only=True)["weights"]
        theirs = ({n.removeprefix(side): v for n, v in saved.items() if n.startswith(side)} if side
                  else torch.load(tmp_path / path, weights_only=True)["weights"])
        for name in ("cls_token", "blocks.1.mlp.fc1.weight"):
            torch.testing.assert_close(got[name], theirs[name], atol=1e-6, rtol=0)
    said = capsys.readouterr().out
    assert "new: auxiliary (8), head (" in said and "left out: fc_norm (2), head (2)" in said
    tune(tmp_path / "c", classes3, f"--init={tmp_path / '0' / 'model.pt'}", "--max_steps=1")
    assert "left out: auxiliary (8), head (" in capsys.readouterr().out


@pytest.mark.parametrize("path, flags, words", [
    (None, ["--cat_max_ratio=7"], "--cat_max_ratio 7.0 must be at most 1"),
    ("annotations/training", [], "there is no folder '{tmp}/data/annotations/training': segm"),
    ("images/validation", [], "there is no folder '{tmp}/data/images/validation'"),
    ("annotations/training/street/03.png", [], "1 images lack a mask of the same name in "
     "'{tmp}/data/annotations/training': {tmp}/data/images/training/street/03.jpg"),
    ("images/training/street", [], "no images in '{tmp}/data/images/training'"),
    (None, ["--data={tmp}/turned"], "'{tmp}/turned/images/training/1.png' has 5 x 7 pixels, its "
     "mask '{tmp}/turned/annotations/training/1.png' 7 x 5"),
    (None, ["--data={tmp}/RGB"], "1.png' is no mask but a picture of kind RGB: it should have one"),
    (None, ["--data={tmp}/blank"], "no mask of '{tmp}/blank' has a class: 0 is ignored"),
    (None, ["--classes={tmp}/one"], ".png' has label 2; there are 1 classes, 1 to 1"),
    (None, ["--init={tmp}/cnn.pt", "--model=auto"], "segmentation takes a ViT"),
    (None, ["--micro_batch=1"], "too few for BatchNorm"),
    (None, ["--image_size=36"], "no whole patches of 8 (vit_d8)"),
    (None, ["--test_size=36"], "no whole patches of 8 (vit_d8)"),
    (None, ["--mixup=0.8"], "--mixup 0.8 has no meaning with a recipe to segment"),
    (None, ["--frozen"], "--frozen True has no meaning with a recipe to segment"),
    (None, ["--task=classify"], "--task classify has no meaning with --recipe segment"),
    (None, ["--scale=0,2"], "0 < low <= high"),
    (None, ["--schedule=poly"], "choose one of cosine, linear"),
    (None, ["--head_width=0"], "above 0"),
    (None, ["--recipe=demo"], "--head_width 16 has no meaning with a recipe to classify"),
])
def test_segmentation_that_cannot_work_is_named(path, flags, words, scenes, tmp_path):
    """Each impossible value, missing folder or file, bad mask: one clear sentence, before any work.
    """
    if path:
        shutil.copytree(scenes, tmp_path / "data")
        remove = shutil.rmtree if (tmp_path / "data" / path).is_dir() else os.remove
        remove(tmp_path / "data" / path)
    for name, mode, size in ("turned", "L", (7, 5)), ("RGB", "RGB", (5, 7)), ("blank", "L", (5, 7)):
        for split in "training", "validation":
            for kind in "images", "annotations":
                (tmp_path / name / kind / split).mkdir(parents=True)
            Image.new("RGB", (5, 7)).save(tmp_path / name / "images" / split / "1.png")
            Image.new(mode, size).save(tmp_path / name / "annotations" / split / "1.png")
    (tmp_path / "one").write_text("ground\n")
    torch.save({"layer4.2.conv3.weight": torch.zeros(1)}, tmp_path / "cnn.pt")  # a ResNet-50's
    with pytest.raises(InputError, match=re.escape(words.format(tmp=tmp_path))):
        segment(tmp_path / "x", tmp_path / "data" if path else scenes,
                *(flag.format(tmp=tmp_path) for flag in flags))
    assert not (tmp_path / "x").exists()


def test_segmenters_and_classifiers_are_told_apart(scenes, tmp_path):
    """Each bench refuses the other kind of model.pt, and a data set with more classes."""
    save_classifier(tmp_path / "ants.pt", ["ant", "bee", "cat"])
    cfg = recipe("segment", "--model=vit_d8", "--head_width=16", "--test_size=32")
    finetune.save_model(str(tmp_path / "one.pt"), model.Segmenter("vit_d8", 1, width=16), cfg,
                        ["ground"])
    for flags, words in [
            (["--bench=miou", "--ckpt={tmp}/ants.pt"], "takes the model.pt of finetune.py"),
            (["--bench=miou", "--ckpt=scratch"], "not 'scratch'"),
            (["--bench=top1", "--ckpt={tmp}/one.pt"], "one.pt' segments images: --bench=miou"),
            (["--bench=knn", "--ckpt={tmp}/one.pt"], "one.pt' segments images: --bench=miou"),
            (["--bench=miou", "--ckpt={tmp}/one.pt"], "has label 2; there are 1 classes"),
            (["--bench=miou", "--ckpt={tmp}/one.pt", "--size=30"], "no whole patches of 8"),
            (["--bench=miou", "--test_crop=0.9"], "--test_crop 0.9 has no meaning")]:
        with pytest.raises(InputError, match=re.escape(words)):
            score(tmp_path, f"--data={scenes}", *(flag.format(tmp=tmp_path) for flag in flags))


def test_an_unreadable_scene_is_replaced_and_left_out(scenes, tmp_path, capsys):
    """A damaged image or mask is named; training takes the next one, measuring one less."""
    data = shutil.copytree(scenes, tmp_path / "data")
    (data / "images" / "training" / "street" / "00.png").write_text("nothing")
    (data / "annotations" / "validation" / "street" / "03.png").write_text("nothing")
    rows = segment(tmp_path / "x", data, "--max_steps=3")
    said = capsys.readouterr().err
    assert rows[-1]["n"] == 4 and "00.png" in said and "03.jpg" in said


# ------------------------------------------------------------------------------- 10. survival

LONG = [*TINY, "--max_steps=24", "--log_every=3", "--eval_every=8", "--save_every=2"]


def spawn(out, *flags, launch=()):
    """Start pretrain.py in the background."""
    return subprocess.Popen([sys.executable, *launch, "pretrain.py", *LONG, f"--out={out}", *flags],
                            cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(out, step, process):
    """Wait until the log of a run has reached a step."""
    for _ in range(1200):
        if any(row["step"] >= step for row in pretrain.read_log(str(out))):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise TimeoutError(f"no step {step}")


def outcome(out):
    """What a run leaves that must not depend on what it went through."""
    rows = list(pretrain.read_log(str(out)))
    for row in rows:
        del row["images_per_s"], row["data_wait"]
    return rows, torch.load(out / "encoder.pt", weights_only=True)


def same(a, b):
    return a[0] == b[0] and all(torch.equal(v, b[1][k]) for k, v in a[1].items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The outcome of LONG, one process and one thread as in spawn."""
    out = tmp_path_factory.mktemp("uninterrupted")
    process = spawn(out)
    assert process.wait(240) == 0, process.stderr.read()
    rows, encoder = outcome(out)
    assert [r["step"] for r in rows] == [1, 3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    return rows, encoder


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path, uninterrupted):
    """SIGTERM, as schedulers send it: the step is finished and saved, status 75 says "run me
    again". kill -9: the next run does not wait for loader workers that are still there. Then the
    same command gives the encoder of the uninterrupted run, bit for bit, and its log. While a run
    is at work a second one in its folder refuses."""
    process = spawn(tmp_path, "--save_every=0", "--workers=1")
    wait_for(tmp_path, 6, process)
    with pytest.raises(InputError, match=rf"at work in .* \(process {process.pid} on"):
        pretrain.main([*LONG, f"--out={tmp_path}"])
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == pretrain.STOPPED == os.EX_TEMPFAIL
    step = int(re.search(r"stopped after step (\d+) by SIGTERM and saved", said)[1])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == step >= 6
    process = spawn(tmp_path, "--workers=1")
    wait_for(tmp_path, 15, process)
    process.kill()
    process.wait()
    process = spawn(tmp_path)
    assert process.wait(240) == 0, process.stderr.read()
    assert same(outcome(tmp_path), uninterrupted)


@pytest.mark.soak
def test_thirty_kills_at_any_moment(tmp_path, uninterrupted):
    """The same with 30 kills at random times from start-up to the end, in the midst of saves."""
    kills = done = 0
    ends = set()
    while not done:
        process = spawn(tmp_path, "--save_every=1", f"--workers={kills % 2}")
        try:
            assert process.wait(random.uniform(0.5, 9) if kills < 30 else 240) == 0
            if kills < 30:  # it got through: begin again
                assert same(outcome(tmp_path), uninterrupted)
                shutil.rmtree(tmp_path)
            done = kills >= 30
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            steps = [row["step"] for row in pretrain.read_log(str(tmp_path))]
            print(f"kill {kills} after step {steps[-1:]}")
            ends.add(max(steps, default=0))
            assert steps == sorted(set(steps))
    assert same(outcome(tmp_path), uninterrupted) and len(ends) >= 5


def test_torchrun_stops_restarts_and_changes_its_size(tmp_path, uninterrupted):
    """Under torchrun SIGTERM ends all processes after the same step; one process killed makes it
    restart them all; then one process ends the run of two: equal to float rounding."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = spawn(tmp_path, "--save_minutes=0.005", launch=launch)
    wait_for(tmp_path, 3, process)
    process.terminate()
    process.wait(60)
    said = process.stderr.read()
    assert said.count("by SIGTERM and saved") == 1, said
    process = spawn(tmp_path, "--max_steps=16", launch=(*launch, "--max_restarts=1"))
    wait_for(tmp_path, 6, process)
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0 and "exitcode: -9" in said, said
    process = spawn(tmp_path)
    assert process.wait(240) == 0, process.stderr.read()
    rows, encoder = outcome(tmp_path)
    assert [r["step"] for r in rows] == [r["step"] for r in uninterrupted[0]]
    for a, b in zip(rows, uninterrupted[0]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert (a["skill"] is None) == (b["skill"] is None)
    for key, value in uninterrupted[1].items():
        torch.testing.assert_close(encoder[key], value, atol=1e-4, rtol=1e-3)


def test_a_process_that_starves_ends_all_with_a_reason(tmp_path):
    """Storage that never answers, here a pipe named .jpg: within --timeout each process of two says
    what it waited for, and none hangs."""
    save_images(tmp_path / "train", 15)
    save_images(tmp_path / "val", 4)
    os.mkfifo(tmp_path / "train" / "pipe.jpg")
    process = spawn(tmp_path / "out", f"--data={tmp_path}", "--workers=1", "--timeout=0.15",
                    launch=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    said = process.communicate(timeout=120)[1]
    assert process.returncode and "the images do not come" in said and "lost the others" in said


@pytest.mark.parametrize("harm", ["truncated", "foreign", "missing"])
def test_the_checkpoint_before_the_last_one_is_kept(harm, tmp_path, capsys):
    """A newest checkpoint that is torn, of another program, or missing since a save was cut in two:
    the one before it is taken, with a warning, and it is still there after the next save."""
    demo(tmp_path, "--max_steps=3", "--save_every=2")
    path, before = tmp_path / "ckpt.pt", encoder_of(tmp_path)
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif harm == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.unlink()
    (tmp_path / "encoder.pt").unlink()
    rows = demo(tmp_path, "--max_steps=3", "--save_every=2")
    assert "taken, of step 2" in capsys.readouterr().err and [r["step"] for r in rows] == [1, 2, 3]
    assert all(torch.equal(v, before[k]) for k, v in encoder_of(tmp_path).items())
    kept = [pretrain.load_checkpoint(str(tmp_path / n)) for n in ("ckpt.pt", "ckpt_previous.pt")]
    assert [c["step"] for c in kept] == [3, 2]


@pytest.mark.parametrize("torn", [False, True])
def test_there_is_no_moment_without_a_checkpoint(torn, tmp_path, monkeypatch):
    """Whichever move of whichever save is the last that is done, a good checkpoint is found."""
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    path, names = tmp_path / "ckpt.pt", ("config", "model", "optimizer", "images")

    def save(step):
        state = dict.fromkeys(names, 0) | {"step": step}
        previous = pretrain.previous_to(str(path))
        pretrain.save_file(str(path), lambda f: torch.save(state, f), previous)

    for last in range(6):
        save(1), save(2)
        if torn:
            path.write_bytes(path.read_bytes()[:100])
        calls, move = iter(range(9)), os.replace
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            def replace(a, b):
                if next(calls) == last:
                    raise KeyboardInterrupt
                move(a, b)

            patch.setattr(os, "replace", replace)
            if "fallback" in pretrain.newest_checkpoint(str(tmp_path), machine):
                pretrain.put_aside(str(path))
            for step in (3, 4, 5):
                save(step)
            raise KeyboardInterrupt
        found = pretrain.newest_checkpoint(str(tmp_path), machine)
        assert found["step"] >= (1 if torn else 2)
    path.write_bytes(b"")
    (tmp_path / "ckpt_previous.pt").write_bytes(b"")
    with pytest.raises(InputError, match="is not a checkpoint .* move it away"):
        pretrain.newest_checkpoint(str(tmp_path), machine)
    path.unlink()
    with pytest.raises(InputError, match="ckpt_previous.pt' is not a checkpoint"):
        pretrain.newest_checkpoint(str(tmp_path), machine)


def test_a_row_that_never_reached_the_log_is_added(tmp_path):
    """A checkpoint is saved before held-out images are looked at: a run killed in between makes up
    for the look, even after its last step."""
    whole = demo(tmp_path, "--max_steps=2")
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text(lines[0])
    (tmp_path / "encoder.pt").unlink()
    assert demo(tmp_path, "--max_steps=2") == whole
    assert (tmp_path / "encoder.pt").exists()


def test_absurd_images_and_file_names(tmp_path, capsys):
    """A PNG that claims 30,000 x 30,000 pixels and one with broken EXIF are named or read; spaces,
    umlauts and line breaks in names work."""
    save_images(tmp_path / "a", 40)
    odd = tmp_path / "a" / "b c\n\u00e4.jpg"
    (tmp_path / "a" / "000.jpg").rename(odd)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0), b"IEND"]
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    (tmp_path / "a" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    Image.new("RGB", (30, 30)).save(tmp_path / "a" / "exif.jpg", exif=exif)
    source = crop.Folder(str(tmp_path / "a"))
    data = contexts_of(source, list(range(len(source))), 32, 0)
    failed = [name for i in range(len(data)) for name, _ in data[0, i][1]]
    assert failed == [str(tmp_path / "a" / "bomb.png")] and str(odd) in map(source.name, range(42))
    odd.write_text("no image")
    demo(tmp_path / "out", f"--data={tmp_path}", "--max_steps=5")
    assert r"b c\nä.jpg' (" in capsys.readouterr().err


# -------------------------------------------------------------------- 11. files and bad input

@pytest.mark.parametrize("flags, words", [
    (["--batchsize=4"], "unknown flag --batchsize; did you mean --batch_size"),
    (["demo"], "'demo' does not belong to a flag"),
    (["--epochs=many"], "--epochs: invalid int value"),
    (["--scale=0.5"], "--scale takes two numbers"),
    (["--freeze_patch_embed=maybe"], "invalid boolean value"),
    (["--lr=nan"], "invalid number value"),
    (["--lr=1/0"], "invalid number value"),
    (["--ratio=1/0,3"], "--ratio takes two numbers"),
    (["--lr=1e999"], "invalid number value"),
])
def test_a_misspelt_command_line_is_one_sentence(flags, words, capsys):
    """Wrong names and types end with status 2 and say what is allowed, before any work."""
    with pytest.raises(SystemExit) as stop:
        pretrain.parse_config(pretrain.Config, pretrain.PRESETS, flags)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--preset=dmeo"], "choose one of paper, imagenette, demo"),
    (["--model=vit_b32"], "choose one of vit_d8"),
    (["--context_size=150"], "no multiple of 16"),
    (["--scale=0.4,1"], "only boxes of area up to 0.300 fit"),
    (["--ratio", "0", "3"], "ratio"),
    (["--rotation=200"], "between 0 and 180"),
    (["--transforms=all"], "exemplar, context, both, none"),
    (["--batch_size=0"], "above 0"),
    (["--lr=0"], "above 0"),
    (["--clip=-1"], "0 or more"),
    (["--beta1=1"], "below 1"),
    (["--seed=99999999999999999999"], "below 2**63"),
    (["--flip=1.5"], "at most 1"),
    (["--decoder_width=100"], "no multiple of 32"),
    (["--loss=bce"], "choose one of ce, balanced, mse, focal"),
    (["--decoder=siam"], "choose one of cim, siamfc, siamrpn, transt"),
    *[([f"--decoder={tracker}", f"--{name}={value}"],
       f"--{name} {value} has no meaning with --decoder {tracker}, a tracker with one encoder")
      for tracker, name, value in [
          ("siamfc", "correlation", "convolution"), ("siamrpn", "predictor", "deconv"),
          ("transt", "loss", "mse"), ("siamfc", "decoder_depth", 2), ("siamrpn", "tau", 0.5),
          ("transt", "decoder_width", 64), ("siamfc", "bootstrap", "shared")]],
    (["--decoder=transt", "--preset=demo", "--decoder_width=32"], "--decoder_width 32 has no mean"),
    (["--bootstrap=shared", "--tau=0.9"], "--tau 0.9 has no meaning with --bootstrap shared"),
    (["--data=/no/such"], "no folder '/no/such'"),
    (["--preset=demo", "--batch_size=30000"], "fewer than one batch"),
    (["--preset=demo", "--micro_batch=5"], "does not divide the"),
    (["--preset=demo", "--classes=/no/list"], "class list"),
    (["--preset=demo", "--device=mps"], "no Apple GPU"),
])
def test_values_that_cannot_work_are_named(flags, words, tmp_path):
    """Each impossible value, folder or combination is one clear sentence."""
    with pytest.raises(InputError, match=re.escape(words)):
        pretrain.main([f"--out={tmp_path / 'x'}", *flags])
    assert not (tmp_path / "x").exists()


def test_flags_beat_presets_and_both_spellings_work():
    """Flag, preset, default, in this order; pairs by space or comma, fractions, booleans."""
    cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, [
        "--preset", "demo", "--lr", "0.5", "--ratio", "1/4", "4", "--scale=0.1,0.2",
        "--freeze_patch_embed", "--flip=0"])
    assert (cfg.lr, cfg.ratio, cfg.scale, cfg.flip) == (0.5, (0.25, 4.0), (0.1, 0.2), 0.0)
    assert cfg.freeze_patch_embed is True and cfg.data == "shapes"


def test_batches_that_do_not_divide_name_one_that_would():
    """batch_size over processes, micro_batch over a process's share."""
    machine = pretrain.Machine(torch.device("cpu"), 0, 3, "float32", False)
    with pytest.raises(InputError, match="not divisible by 3 processes; 33 would be"):
        pretrain.split_batch(32, 0, machine)
    assert pretrain.split_batch(96, 0, machine) == (32, 1)
    assert pretrain.split_batch(4096 * 3, 0, machine) == (32, 128)
    assert pretrain.split_batch(96, 8, machine) == (8, 4)


def test_unreadable_images_are_replaced_named_once_and_counted(tmp_path, capsys):
    """A truncated JPEG, text named .jpg and an empty file are replaced by the next readable image
    with one warning each; four of forty are an error."""
    save_images(tmp_path / "a", 40)
    bad = [tmp_path / "a" / f"{i:03d}.jpg" for i in (3, 4, 11)]
    bad[0].write_bytes(bad[0].read_bytes()[:300])
    bad[1].write_text("not an image")
    bad[2].write_bytes(b"")
    flags = [f"--data={tmp_path / 'a'}", "--max_steps=6"]
    rows = demo(tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert len(rows) == 6 and all(said.count(f"read '{path}'") == 1 for path in bad), said
    dataset = contexts_of(crop.Folder(str(tmp_path / "a")), list(range(40)), 32, 0)
    (context, _), failures = dataset[0, 3]
    assert [os.path.basename(n) for n, _ in failures] == ["003.jpg", "004.jpg"]
    with Image.open(tmp_path / "a" / "005.jpg") as image:
        expected = crop.cut_context(image, np.random.default_rng((0, 3, 0, 3)), 32)
    assert torch.equal(context, expected)
    (tmp_path / "a" / "020.jpg").write_text("one too many")
    with pytest.raises(InputError, match="4 of 38 images cannot be read"):
        demo(tmp_path / "out2", *flags)


def test_a_folder_of_unreadable_images_is_an_error(tmp_path):
    """When nothing can be read the run ends with the names, not with a hang."""
    for i in range(30):
        tmp_path.joinpath(f"{i}.jpg").write_text("nothing")
    with pytest.raises(InputError, match="cannot be read"):
        demo(tmp_path / "out", f"--data={tmp_path}")


@pytest.mark.parametrize("content", ["text", "pickle", "empty", "other"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    """Text, a pickle that would run code, an empty file and another program's tensors are named and
    refused; nothing in them is executed."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "ckpt.pt"
    if content == "text":
        path.write_text("hello")
    elif content == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"model": Evil() if content == "pickle" else torch.zeros(3)}, path)
    with pytest.raises(InputError, match="ckpt.pt' is not a"):
        demo(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_another_run_names_the_fields(tmp_path):
    """Resuming with other values is an error that names them; machine flags may change, and a
    field that is newer than the checkpoint had its default value."""
    demo(tmp_path, "--max_steps=1")
    with pytest.raises(InputError, match=r"lr \(0.\d+ there, 0.5 here\), model \(vit_d8 there"):
        demo(tmp_path, "--max_steps=2", "--lr=0.5", "--model=vit_t16")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del saved["config"]["bootstrap"]  # a field that its version did not have
    torch.save(saved, tmp_path / "ckpt.pt")
    demo(tmp_path, "--max_steps=2", "--micro_batch=4", "--workers=1", "--save_every=7")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """A failed save is one sentence naming the file; the checkpoint before it is untouched, and
    training goes on from it."""
    demo(tmp_path, "--max_steps=1")
    before = (tmp_path / "ckpt.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(InputError, match="step 2: cannot write .*No space left on device"):
            demo(tmp_path, "--max_steps=2")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert [r["step"] for r in demo(tmp_path, "--max_steps=2")] == [1, 2]


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    """Divergence ends with step, loss and learning rate, and never overwrites a good checkpoint."""
    with pytest.raises(InputError, match=r"not finite at step \d, lr 5e\+29.* is none"):
        demo(tmp_path, "--lr=1e30", "--warmup_epochs=0", "--max_steps=20", "--log_every=7")
    assert not (tmp_path / "ckpt.pt").exists() and not (tmp_path / "encoder.pt").exists()


def test_the_log_holds_what_the_design_says(tmp_path):
    """First and last step are logged, with the documented fields; skill is null in between."""
    rows = demo(tmp_path, "--max_steps=5", "--log_every=3", "--eval_every=4")
    assert [r["step"] for r in rows] == [1, 3, 4, 5]
    assert [r["skill"] is None for r in rows] == [True, True, False, False]
    assert {"step", "epoch", "loss", "lr", "images_per_s", "tau", "grad_norm", "baseline",
            "skill"} <= set(rows[0])
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=0.02)
    assert {f.name for f in tmp_path.iterdir()} == {
        "config.json", "log.jsonl", "ckpt.pt", "ckpt_previous.pt", "encoder.pt", "maps.png", "maps",
        "lock"}
    assert Image.open(tmp_path / "maps.png").width > 600
    state = encoder_of(tmp_path)
    model.build_encoder("vit_d8").load_state_dict(state)
    assert json.load(open(tmp_path / "config.json"))["model"] == "vit_d8"


def test_the_contact_sheet_is_a_command(tmp_path):
    """`python crop.py PHOTO` writes the picture; a text file named .jpg is one sentence."""
    save_images(tmp_path, 1, size=(300, 200))
    out = tmp_path / "sheet.png"
    result = command("crop.py", str(tmp_path / "000.jpg"), "--out", str(out))
    assert result.returncode == 0 and Image.open(out).width > 1000, result.stderr
    (tmp_path / "fake.jpg").write_text("no image")
    result = command("crop.py", str(tmp_path / "fake.jpg"))
    assert result.returncode == 1 and result.stderr.startswith("crop.py: cannot read")
    assert len(result.stderr.splitlines()) == 1


BENCH = {"bench", "n", "step_s", "step_s_p10_p90", "images_per_s", "data_wait", "gflop_per_image",
         "tflops_per_process", "mfu", "matmul_tflops", "share_of_matmul", "peak_memory_gb", "model",
         "data", "batch_size", "processes", "device", "dtype", "compile", "torch"}


@pytest.mark.parametrize("script, flags", [
    ("pretrain", TINY), ("pretrain", [*TINY, "--data=none"]),
    ("finetune", ["--recipe=demo", "--init=scratch", "--data=none", "--batch_size=8"])])
def test_bench_prints_one_json_line(tmp_path, capsys, script, flags):
    """--bench ends with one JSON object on standard output and saves no checkpoint; --data=none
    feeds noise without waiting for it."""
    flags = [*flags, "--device=cpu", "--bench=2", f"--out={tmp_path}"]
    {"pretrain": pretrain, "finetune": finetune}[script].main(flags)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.keys() == BENCH and report["bench"] == script and report["n"] == 2
    assert report["images_per_s"] == pytest.approx(8 / report["step_s"], rel=0.01)
    flops = report["gflop_per_image"] * report["images_per_s"] / 1e3
    assert flops == pytest.approx(report["tflops_per_process"], rel=0.01, abs=1e-3)
    assert 0 <= report["share_of_matmul"] < 1.5 and 0.1 < report["peak_memory_gb"] < 30
    assert report["data_wait"] < 0.1 or "--data=none" not in flags
    assert os.listdir(tmp_path) == ["bench.json"]
    assert json.load(open(tmp_path / "bench.json")) == report


def test_the_bench_of_crops_names_where_its_time_goes(tmp_path):
    """crop.py --bench FOLDER: contexts/s of one core, their spread, the largest shares of time."""
    save_images(tmp_path, 2, size=(64, 48))
    report = crop.bench(str(tmp_path), seconds=0.05, rounds=3)
    assert report["slowest"] <= report["images_per_s"] <= report["fastest"] and report["n"] == 2
    assert 0.2 < sum(report["share_of_time"].values()) <= 1 and report["context_size"] == 160


@pytest.mark.parametrize("wrong", [dict(bootstrap="Shared"), dict(correlation="conv"),
                                   dict(predictor="mlp"), dict(loss="bce")])
def test_a_misspelt_ablation_is_named(wrong):
    """CIM used from Python: a word that is no choice is a ValueError that tells them."""
    with pytest.raises(ValueError, match="is none of "):
        model.CIM("vit_d8", 64, 64, **wrong)
    with pytest.raises(ValueError, match="12 tokens are no square grid"):
        model.as_grid(torch.zeros(12, 3))


def test_every_rule_is_about_a_field():
    """The lists of what must be above 0, is bounded or may change name fields that exist."""
    fields = {f.name for c in (pretrain.Config, finetune.Config, evaluate.Config)
              for f in dataclasses.fields(c)}
    assert {*pretrain.POSITIVE, *pretrain.FREE, *sum(pretrain.BOUNDS, ())} <= fields


def test_every_command_of_the_readme_parses():
    """The flags of every `python SCRIPT` and `torchrun ... SCRIPT` line in the README exist."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)).replace("\\\n", " ")
    scripts = {"pretrain": (pretrain.Config, pretrain.PRESETS),
               "finetune": (finetune.Config, finetune.RECIPES), "evaluate": (evaluate.Config, {})}
    names = "|".join(scripts)
    lines = re.findall(rf"\b({names})\.py ([^#&|`\"\n]*)", blocks)
    lines += re.findall(rf"`(?:python|torchrun [^`]*?) ({names})\.py ([^`]*)`", README)
    for script in scripts:
        assert sum(name == script for name, _ in lines) >= 2, script
    for script, flags in lines:
        if flags != "--help":
            pretrain.parse_config(*scripts[script], flags.split())
    loose = [f for f in re.findall(r"`(--[^`]*=[^`]*)`", README) if "FILE" not in f]
    assert len(loose) >= 15
    for flags in loose:  # of one script at least
        known = {"--" + f.name for c, _ in scripts.values() for f in dataclasses.fields(c)}
        assert {word.split("=")[0] for word in flags.split()} <= known, flags
    assert "pip install -r requirements.txt && python pretrain.py --preset=demo" in blocks
    assert "pip install -r requirements.txt && pytest" in blocks and "@@" not in README
