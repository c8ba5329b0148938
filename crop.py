"""crop.py: images -> context, exemplars, correlation maps (paper 3.2, Figure 3).

A *context* is a random crop of an image. *Exemplars* are smaller, rotated, stretched and recoloured
crops of the context. The *map* of an exemplar is 1 where its box covers the context, else 0. No
label is needed: the map follows from the numbers that cut the exemplar.

    1. geometry         uniform numbers -> boxes -> affine matrices -> exemplars and maps (Fig. 3)
    2. transformations  colour jitter, gray, blur, solarise, drawn per exemplar (Table 1d)
    3. make_pairs       1 and 2 in one call, batched on the device
    4. the context      an image decoded, cropped and resized to uint8 in the loader's workers
    5. the picture      contact_sheet: a context, its exemplars, their maps

What feeds it; a first reading can stop here:

    6. image sources    folders, generated shapes, Imagenette
    7. command line     `python crop.py PHOTO`

Uniform numbers in, crops out: sections 1 to 3 hold no random state, so the same numbers give the
same pairs on any machine and on any number of processes. Letters: B contexts, K exemplars of each,
m and n the sides of context and exemplar in pixels. Coordinates are PyTorch's: x to the right,
y down, both in [-1, 1] over the outer edges of the context (align_corners=False).
"""

import argparse
import contextlib
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


class InputError(ValueError):
    """Something the user gave cannot work. The message names it and says what would be right."""


# ----------------------------------------------------------------------------------- 1. geometry

# The columns of the uniform numbers u that are drawn for each exemplar:
#   0 area, 1 aspect, 2 angle, 3 and 4 centre, 5 mirror                           -> sample_boxes
#   6 jitter or not, 7 to 10 its strengths, 11 gray, 12 blur, 13 its sigma, 14 solarise -> transform
UNIFORMS = 15


def largest_area(ratio, rotation):
    """The area r0 of the largest box that fits the context at every aspect and angle allowed.

    ratio: (low, high) of r1; rotation: degrees. With q the ratio furthest from 1 the worst angle is
    atan(1/q), which leaves q / (1 + q^2): 0.5 for squares, 0.300 at q = 3, 0.235 at q = 4."""
    q = max(ratio[1], 1 / ratio[0])
    a = min(math.radians(rotation), math.atan(1 / q))
    return 1 / (math.sqrt(q) * math.cos(a) + math.sin(a) / math.sqrt(q)) ** 2


def check_crops(scale, ratio, rotation):
    """Raise InputError unless boxes of these ranges fit the context at every angle and aspect."""
    if ratio[0] <= 0 or rotation < 0:
        raise InputError(f"ratios {ratio} are above 0, and the rotation {rotation} is at least 0")
    largest = largest_area(ratio, rotation)
    if not 0 < scale[0] <= min(scale[1], largest + 1e-9) <= 1 or ratio[0] > ratio[1]:
        raise InputError(f"areas {scale} and ratios {ratio} go from low to high. Areas begin above "
                         f"0, at {largest:.3f} at most, so that a box fits at every angle and "
                         "aspect, and end at 1 at most")


def sample_boxes(u, scale=(0.05, 1.0), ratio=(1 / 3, 3.0), rotation=45.0, flip=0.5):
    """Uniforms u [..., 6] in [0, 1) -> boxes [..., 6] = (cx, cy, w, h, angle, flip). Figure 3.

    cx, cy, w, h: centre and side lengths as fractions of the context's side, origin at its top
    left. angle in radians, positive from x (right) towards y (down). flip: -1 mirrors, else +1.
    scale: range of the area r0 = w h; ratio: range of r1 = h / w, log-uniform; rotation: largest
    |angle| in degrees; flip: probability of a mirrored exemplar.

    Angle and r1 are drawn first, then r0 uniformly up to the largest box that fits at that angle
    and r1, then a centre among those that keep the box inside. This is a closed form, so nothing
    is drawn again. DEVIATION: the paper's r0 in (0, 1) starts at 0.05 here. Raises InputError where
    no such boxes exist."""
    check_crops(scale, ratio, rotation)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    r1 = torch.exp(low + (high - low) * u[..., 1])
    angle = math.radians(rotation) * (2 * u[..., 2] - 1)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    w, h = r1.rsqrt(), r1.sqrt()  # a box of area 1
    extent = torch.stack([w * cos + h * sin, w * sin + h * cos], -1)  # of its upright bounding box
    # A side grows with the root of the area, so an area of 1 / extent^2 just fits.
    largest = extent.amax(-1).pow(-2).clamp(max=scale[1])
    r0 = scale[0] + (largest - scale[0]).clamp(min=0) * u[..., 0]
    side = r0.sqrt()[..., None]
    centre = 0.5 + (1 - side * extent).clamp(min=0) * (u[..., 3:5] - 0.5)
    size = side * torch.stack([w, h], -1)
    sign = torch.where(u[..., 5] < flip, -1.0, 1.0).to(u)
    return torch.cat([centre, size, angle[..., None], sign[..., None]], -1)


def affine_from_boxes(boxes):
    """Boxes [..., 6] -> theta [..., 2, 3], which takes exemplar coordinates to context coordinates,
    both in [-1, 1]."""
    cx, cy, w, h, angle, flip = boxes.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([
        torch.stack([flip * w * cos, -h * sin, 2 * cx - 1], -1),
        torch.stack([flip * w * sin, h * cos, 2 * cy - 1], -1)], -2)


def crop_exemplars(context, theta, size):
    """Cut theta [B, K, 2, 3] out of float contexts [B, 3, m, m] -> [B, K, 3, size, size].

    To squeeze a whole context into `size` pixels would alias, so each exemplar pixel is the mean of
    s x s bilinear samples, s = ceil(m / size / 1.25): even in the largest box the samples lie at
    most 1.4 context pixels apart. At 160 -> 64 this differs from exact area averaging by 1 to 2 of
    255 levels on photographs (root mean square; a single sample: about 3). The K grids of a context
    are stacked along their height, so that no context is copied. Nothing is normalised here."""
    B, K, m = *theta.shape[:2], context.shape[-1]
    s = math.ceil(m / size / 1.25)
    grid = F.affine_grid(theta.flatten(0, 1), [B * K, 3, s * size, s * size], align_corners=False)
    grid = grid.view(B, K * s * size, s * size, 2)
    grid = grid.clamp(1 / m - 1, 1 - 1 / m)  # as border padding, which Apple GPUs may lack
    samples = F.grid_sample(context, grid, "bilinear", "zeros", align_corners=False)
    return F.avg_pool2d(samples, s).unflatten(2, (K, size)).transpose(1, 2)


def rasterize_maps(theta, size):
    """theta [B, K, 2, 3] -> maps [B, K, size, size]: 1 where a pixel's centre lies in the box.

    The inverse affine grid takes each pixel centre of the context to exemplar coordinates, where
    the box is the square [-1, 1] x [-1, 1]."""
    (a, b, x), (c, d, y) = (row.unbind(-1) for row in theta.unbind(-2))
    determinant = a * d - b * c
    inverse = torch.stack([
        torch.stack([d, -b, b * y - d * x], -1),
        torch.stack([-c, a, c * x - a * y], -1)], -2) / determinant[..., None, None]
    shape = [inverse[..., 0, 0].numel(), 1, size, size]
    grid = F.affine_grid(inverse.flatten(0, -3), shape, align_corners=False)
    return (grid.abs().amax(-1) <= 1).to(theta.dtype).view(*theta.shape[:-2], size, size)


# ---------------------------------------------------------------------------- 2. transformations

# torchvision's v2 transforms draw one set of numbers for a whole batch; these take one per image.
# Constants are Python numbers: to copy a tensor to the device here would make the host wait for it.

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as torchvision
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def to_gray(x):
    """[..., 3, n, n] -> luminance [..., 1, n, n]."""
    r, g, b = x.split(1, -3)
    return GRAY[0] * r + GRAY[1] * g + GRAY[2] * b


def shift_hue(x, shift):
    """Turn the hue of x [..., 3, n, n] in [0, 1] by `shift` [..., 1, 1, 1], part of a turn."""
    high, low = x.amax(-3, keepdim=True), x.amin(-3, keepdim=True)
    chroma = high - low
    red, green, _ = (x == high).split(1, -3)  # before the division, which is not exact everywhere
    r, g, b = ((x - low) / chroma.clamp(min=1e-8)).split(1, -3)
    sector = torch.where(red, g - b, torch.where(green, 2 + b - r, 4 + r - g))  # RGB -> HSV
    first = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # of red, green, blue
    k = (first + sector + 6 * shift) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)  # HSV -> RGB in closed form


def gaussian_blur(x, sigma):
    """Blur x [..., n, n] by a Gaussian of `sigma` [..., 1, 1] pixels, its weights renormalised at
    the border: a row and a column matrix for each image, so one batched product each."""
    at = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    weights = (-(at[:, None] - at) ** 2 / (2 * sigma**2)).softmax(-1)  # [..., n, n]
    return weights @ x @ weights.mT


def transform(x, u, jitter=0.8, gray=0.2, blur=0.5, solarize=0.2, exemplar_size=64):
    """Recolour and blur images x [..., 3, n, n] in [0, 1], each by its own uniforms u [..., 9].

    jitter: brightness, contrast, saturation by up to 0.4, 0.4, 0.2 and hue by 0.1 of a turn; gray;
    blur with sigma 0.1 to 2 pixels where exemplars have 64, in proportion at other sizes; solarize:
    invert what is brighter than 0.5. Each of these arguments is the probability of one; 0 turns it
    off. The mirror of Table 1d is the flip of sample_boxes.
    DEVIATION: the four jitters are applied in this order, where torchvision shuffles them."""
    (jitters, brightness, contrast, saturation, hue, grays, blurs, sigma,
     solarizes) = (v[..., None, None, None] for v in u.unbind(-1))
    if jitter > 0:
        y = (x * (1 + 0.4 * (2 * brightness - 1))).clamp(0, 1)
        c = 1 + 0.4 * (2 * contrast - 1)
        y = (c * y + (1 - c) * to_gray(y).mean((-2, -1), keepdim=True)).clamp(0, 1)
        s = 1 + 0.2 * (2 * saturation - 1)
        y = (s * y + (1 - s) * to_gray(y)).clamp(0, 1)
        x = torch.where(jitters < jitter, shift_hue(y, 0.2 * hue - 0.1), x)
    if gray > 0:
        x = torch.where(grays < gray, to_gray(x).expand_as(x), x)
    if blur > 0:
        sigma = (0.1 + 1.9 * sigma) * exemplar_size / 64
        x = torch.where(blurs < blur, gaussian_blur(x, sigma), x)
    if solarize > 0:
        x = torch.where((solarizes < solarize) & (x >= 0.5), 1 - x, x)
    return x


def normalize(x):
    """[..., 3, n, n] in [0, 1] -> zero mean and unit variance by ImageNet's statistics."""
    return torch.stack([(c - m) / s for c, m, s in zip(x.unbind(-3), MEAN, STD)], -3)


# --------------------------------------------------------------------------------- 3. make_pairs

def make_pairs(context, u, exemplar_size=64, scale=(0.05, 1.0), ratio=(1 / 3, 3.0), rotation=45.0,
               flip=0.5, transforms="exemplar", jitter=0.8, gray=0.2, blur=0.5, solarize=0.2):
    """uint8 contexts [B, 3, m, m], uniforms u [B, K + 1, 15] -> context, exemplars, maps, theta.

    Row k < K of u makes exemplar k; row K transforms the context where transforms says so:
    'context', 'exemplar', 'both' or 'none' (Table 1d). Exemplars are cut before the context is
    recoloured. Images come back normalised."""
    context = context.float() / 255
    theta = affine_from_boxes(sample_boxes(u[:, :-1, :6], scale, ratio, rotation, flip))
    exemplars = crop_exemplars(context, theta, exemplar_size)
    maps = rasterize_maps(theta, context.shape[-1])
    options = (jitter, gray, blur, solarize, exemplar_size)
    if transforms in ("exemplar", "both"):
        exemplars = transform(exemplars, u[:, :-1, 6:], *options)
    if transforms in ("context", "both"):
        context = transform(context, u[:, -1, 6:], *options)
    return normalize(context), normalize(exemplars), maps, theta


# -------------------------------------------------------------------------------- 4. the context

def draw_crop(rng, width, height, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's box (left, top, width, height) in pixels, not rounded."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            return rng.uniform(0, width - w), rng.uniform(0, height - h), w, h
    w, h = min(width, height * ratio[1]), min(height, width / ratio[0])  # too long an image
    return (width - w) / 2, (height - h) / 2, w, h


TURNS = dict(enumerate((  # EXIF's orientations; photos from 5 on are stored on their side
    Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
    Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90), start=2))


def orientation(image):
    """A key of TURNS, or None: upright, which is also what damaged EXIF data are taken for."""
    if image.format == "TIFF":
        image.load()  # newer versions of Pillow turn a TIFF then, and call it upright
    with contextlib.suppress(Exception):  # Pillow raises many kinds
        turn = image.getexif().get(0x0112)
        return turn if turn in TURNS else None


def to_rgb(image):
    """Any Pillow mode to 8-bit RGB, as `convert` does it; 16-bit gray keeps its high byte. Raises
    ValueError for floating-point pixels, whose range is unknown."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def cut_box(image, choose, size):
    """PIL image -> the part of the upright photo that choose(width, height) -> (left, top, width,
    height) names, rounded to whole pixels, resized bicubically to uint8 [3, size, size].

    A JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 of its size that still has `size` pixels
    in the part (Pillow's draft). PyTorch resizes bytes faster than Pillow: a worker gives as many
    crops of 64 pixels from small photos, 1.8 times as many of 224 from ImageNet's; values differ by
    two of 255 levels at most."""
    turn = orientation(image)
    width, height = image.size[::-1] if turn and turn > 4 else image.size
    left, top, w, h = choose(width, height)
    shrink = size / min(w, h)
    image.draft("RGB", (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
    image = to_rgb(image.transpose(TURNS[turn]) if turn else image)
    fx, fy = image.width / width, image.height / height
    left, top = min(round(left * fx), image.width - 1), min(round(top * fy), image.height - 1)
    right, bottom = left + max(1, round(w * fx)), top + max(1, round(h * fy))
    part = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
    return F.interpolate(to_tensor(part)[None], size=(size, size), mode="bicubic",
                         antialias=True)[0]


def to_tensor(image):
    """RGB PIL image, or array [height, width, C] of bytes -> uint8 [C, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(x):
    """uint8 [3, height, width] -> RGB PIL image."""
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def cut_context(image, rng, size, scale=(0.5, 1.0), flip=0.5, augment=None):
    """PIL image -> random crop, mirrored with probability `flip`, as uint8 [3, size, size];
    augment(PIL image, rng) -> PIL image comes last."""
    x = cut_box(image, lambda width, height: draw_crop(rng, width, height, scale), size)
    if rng.random() < flip:
        x = x.flip(-1)
    return to_tensor(augment(to_image(x), rng)) if augment else x


def cut_centre(image, rng, size, ratio=0.95):
    """PIL image -> the square in its middle, `ratio` of the shorter side, as uint8 [3, size, size];
    rng is not used. It equals resizing that side to size / ratio and cropping the middle, up to the
    rounding to whole pixels."""
    def middle(width, height):
        side = ratio * min(width, height)
        return (width - side) / 2, (height - side) / 2, side, side

    return cut_box(image, middle, size)


class Samples(torch.utils.data.Dataset):
    """(epoch, i) -> (cut(image, rng), j): the data set of crops of source[indices[i]]; j is the
    image's number in the source. rng is seeded by (seed, epoch, i) alone.

    An image that cannot be read is named once, and the next one takes its part; ten of them in a
    row are an InputError. With replace=False, for evaluation, its sample is None instead."""

    def __init__(self, source, indices, seed, cut, replace=True):
        self.source, self.indices, self.seed, self.cut = source, indices, seed, cut
        self.replace, self.named = replace, set()

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, i = key
        for k in range(10):
            j = self.indices[(i + k) % len(self)]
            sample = self.read(j, (self.seed, 3, epoch, i))  # stream 3: crops
            if sample is not None:
                return sample, j
            if not self.replace:
                return None
        name = os.fsdecode(self.source.paths[j])
        raise InputError(f"ten images in a row cannot be read, up to {name!r}")

    def read(self, j, seed, again=True):
        """The crop of image j, or None, with a warning, where it cannot be read."""
        try:
            with self.source.open(j) as image:
                return self.cut(image, np.random.default_rng(seed))
        except InputError:
            raise
        except Exception as error:  # Pillow raises many kinds on damaged files
            if again and getattr(error, "errno", None):  # of the disk, not of the file
                time.sleep(1)
                return self.read(j, seed, again=False)
            if j not in self.named:
                print(f"warning: cannot read {os.fsdecode(self.source.paths[j])!r} ({error}): "
                      f"{'replaced' if self.replace else 'left out'}", file=sys.stderr)
            self.named.add(j)


def collate(samples):
    """Samples -> (uint8 [B, C, m, m], numbers j [B]), None where none of them could be read."""
    samples = [sample for sample in samples if sample is not None]
    return torch.utils.data.default_collate(samples) if samples else None


# -------------------------------------------------------------------------------- 5. the picture

TILE = 96  # pixels of a small picture in a contact sheet
COLOURS = ["#e6194b", "#ffb000", "#3cb44b", "#00b4d8", "#7b61ff", "#f032e6"]


def paint(x):
    """A normalised image [3, h, w] -> PIL image."""
    x = x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)
    return to_image((x.clamp(0, 1) * 255).byte())


def paint_map(p, picture):
    """Probabilities p [m, m] over a context's picture: gray, lit up where p is high, with a step at
    0.5, so that one sees what the map takes in."""
    back = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] * 0.45
    glow = np.array([255, 196, 0]) * 0.75 + back * 0.55
    p = p.numpy()[..., None]
    light = 0.5 * p + 0.5 * (p > 0.5)
    return Image.fromarray((back * (1 - light) + glow * light).clip(0, 255).astype(np.uint8))


def map_iou(maps, logits):
    """IoU of true maps [..., m, m] and of what logits [..., m, m] say at a probability of 0.5."""
    found, true = logits > 0, maps > 0
    return (found & true).sum((-2, -1)) / (found | true).sum((-2, -1)).clamp(min=1)


def contact_sheet(context, exemplars, maps, theta, logits=None, tile=TILE):
    """A picture of normalised pairs, one band for each of B contexts [B, 3, m, m] with its boxes,
    theta [B, K, 2, 3]: exemplars [B, K, 3, n, n], their maps [B, K, m, m], and below these what
    logits [B, K, m, m] predict, with its IoU. All on the CPU -> PIL image. The side of a box that
    is the top of its exemplar is drawn thick."""
    (B, K), gap, step = theta.shape[:2], tile // 12, tile + tile // 12
    big = (2 if logits is None else 3) * step - gap  # the side of the context's picture
    sheet = Image.new("RGB", (2 * gap + big + K * step, gap + B * (big + 2 * gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(tile // 7)
    square = torch.tensor([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1], [-1, -1, 1.0]])
    for b, k in np.ndindex(B, K):
        picture, top = paint(context[b]), gap + b * (big + 2 * gap)
        if k == 0:
            sheet.paste(picture.resize((big, big), Image.BICUBIC), (gap, top))
        colour, x = COLOURS[k % len(COLOURS)], 2 * gap + big + k * step
        corners = (square @ theta[b, k].T + 1) / 2 * big + torch.tensor([gap, top])  # x, y
        draw.line(corners.flatten().tolist(), colour, max(1, tile // 48))
        draw.line(corners[:2].flatten().tolist(), colour, tile // 16)
        tiles = [paint(exemplars[b, k]), paint_map(maps[b, k], picture)]
        if logits is not None:
            tiles.append(paint_map(logits[b, k].float().sigmoid(), picture))
        for r, image in enumerate(tiles):
            sheet.paste(image.resize((tile, tile), Image.BICUBIC), (x, top + r * step))
        if logits is not None:
            iou = map_iou(maps[b, k], logits[b, k])
            draw.text((x + gap, top + big - gap), f"IoU {iou:.0%}", "white", font, anchor="ls",
                      stroke_width=tile // 32, stroke_fill="black")
        draw.rectangle([x, top, x + tile - 1, top + big - 1], None, colour, max(1, tile // 48))
        draw.line([x, top, x + tile - 1, top], colour, tile // 16)
    return sheet


def curves(rows):
    """Rows of a log -> a picture: its loss and its score by step, and a gray line at 0."""
    names = [name for name in ("loss", "skill", "top1", "miou") if any(name in row for row in rows)]
    picture, font = Image.new("RGB", (640, 240 * len(names)), "white"), ImageFont.load_default(14)
    draw, end = ImageDraw.Draw(picture), max(row["step"] for row in rows)
    for k, name in enumerate(names):
        x, y = zip(*((row["step"], row[name]) for row in rows if name in row))
        top, low, high = 240 * k + 40, min(0, *y), max(0, *y)  # the gray line is at 0
        points = [(20 + 600 * s / end, top + 180 * (high - v) / (high - low or 1))
                  for s, v in zip((0, end, *x), (0, 0, *y))]
        draw.line(points[:2], "#bbbbbb")
        draw.line(points[2:], COLOURS[k], 2)
        draw.ellipse([points[-1][i] + d for d in (-4, 4) for i in (0, 1)], COLOURS[k])
        draw.text((20, top - 30), f"{name}: {y[0]:.4g} at step {x[0]}, {y[-1]:.4g} at step {x[-1]}",
                  "black", font)
    return picture


# ------------------------------------------------------------------------------ 6. image sources

# A source has len(source), source.open(i) -> PIL image, source.paths, the images' names, and for
# tasks with labels source.classes and source.labels, the number of each image's class, -1 for none.

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # by Pillow's names; no HEIC
BUILT_IN = ("shapes", "imagenette", "none")


def open_image(path):
    """A file as a PIL image of one of FORMATS; for some others Pillow would start a program."""
    return Image.open(path, formats=FORMATS)


def find_images(root):
    """Paths of the image files below `root`, sorted. Each real folder is visited once and links to
    folders come last, so that loops end and images stay where they are. Raises InputError where a
    folder is missing or cannot be read."""
    def complain(error):
        raise InputError(f"cannot look into the folder {error.filename!r}: {error.strerror}")

    found, visited, tops = [], set(), [root]
    for top in tops:  # the root, and the links that are met
        for folder, inner, files in os.walk(top, onerror=complain):
            if os.path.realpath(folder) in visited:
                inner.clear()
                continue
            visited.add(os.path.realpath(folder))
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            tops += [path for name in inner if os.path.islink(path := os.path.join(folder, name))]
            found += [os.path.join(folder, name) for name in files
                      if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(found)


class Folder:
    """Images in a folder tree; the first folder level is the class, -1 for images outside any.
    classes: names of the class folders to keep, in label order (None: all of them, sorted). Raises
    InputError where the folder or one of the classes has no images."""

    def __init__(self, root, classes=None):
        paths = find_images(root)
        folders = [os.path.relpath(os.path.dirname(path), root).split(os.sep)[0] for path in paths]
        self.classes = classes or sorted({*folders} - {"."})  # "." is the root itself
        missing = sorted({*self.classes} - {*folders})
        if missing or not paths:
            raise InputError(f"{root!r} has no images of {missing[:5]}" if missing else
                             f"{root!r} has no images of the formats {', '.join(FORMATS)}")
        number = {name: k for k, name in enumerate(self.classes)}
        labels = np.array([number.get(name, -1) for name in folders])
        kept = labels >= (-1 if classes is None else 0)
        # Arrays, since to read a list writes to its pages, which each worker would then copy;
        # bytes, since NumPy takes four for a letter.
        self.paths, self.labels = np.array([*map(os.fsencode, paths)])[kept], labels[kept]

    def __len__(self):
        return len(self.paths)

    def open(self, i):
        return open_image(os.fsdecode(self.paths[i]))


class Noise:
    """The same random pixels for each image, to time everything but the loading."""

    paths, labels, classes = ["noise"] * 64_000, [0, 1] * 32_000, ["one", "two"]
    __len__ = Folder.__len__

    def open(self, i):
        pixels = np.random.default_rng(0).integers(256, size=(192, 192, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


# The inks of the generated scenes, RGB, and their motifs: how far a point lies inside the ink, of x
# and y in repeats from the middle of one.
INKS = np.array([[214, 40, 57], [244, 140, 6], [56, 142, 60], [2, 136, 209], [94, 53, 177],
                 [40, 40, 48]], dtype=np.float32)
MOTIFS = {
    "stripes": lambda x, y: 0.25 - abs(x),
    "checks": lambda x, y: np.sign(x * y) * np.minimum(abs(x), abs(y)),
    "dots": lambda x, y: 0.33 - np.hypot(x, y),
    "rings": lambda x, y: 0.13 - abs(np.hypot(x, y) - 0.29),
    "zigzag": lambda x, y: 0.25 - abs((x + abs(y) + 0.5) % 1 - 0.5),
    "grid": lambda x, y: np.maximum(abs(x), abs(y)) - 0.36,
    "triangles": lambda x, y: np.minimum(0.24 - 0.6 * y, 0.6 * y + 0.21 - 1.2 * abs(x)),
    "crosses": lambda x, y: np.minimum(0.12 - np.minimum(abs(x), abs(y)),
                                       0.42 - np.maximum(abs(x), abs(y))),
}


class Shapes:
    """Generated scenes: quilts whose patches each have a motif, turned and scaled, in one ink, on a
    paper of smoothly changing colour. Most patches have the motif that is the scene's class, the
    others any. Images are many and labels few, as in life: of train the first LABELLED have one.

    Scene i of a split is a function of (split, i) alone, but for the rounding of a matrix product
    at the borders of patches; train and val share no scene."""

    SIDE = 72  # pixels
    SIZES = {"train": 16_000, "val": 800}
    LABELLED = 80
    classes = list(MOTIFS)

    def __init__(self, split):
        self.number = list(self.SIZES).index(split)
        self.paths = [f"scene {i} of {split}" for i in range(self.SIZES[split])]
        self.labels = [i % len(self.classes) if i < self.LABELLED or split == "val" else -1
                       for i in range(self.SIZES[split])]

    __len__ = Folder.__len__

    def open(self, i):
        rng, motifs, S = np.random.default_rng((self.number, i)), len(MOTIFS), self.SIDE
        field = Image.fromarray(rng.integers(125, 256, (3, 3, 3), dtype=np.uint8))
        paper = np.asarray(field.resize((S, S), Image.BICUBIC), np.float32).reshape(S * S, 3)
        n = rng.integers(18, 31)  # patches
        (cx, cy), (ax, ay) = rng.uniform(0, S, (2, n)), rng.uniform(0.4, 1.6, (2, n))
        y, x = np.mgrid[:S, :S].reshape(2, S * S).astype(np.float32)
        # A pixel belongs to the centre with the least ax (x - cx)^2 + ay (y - cy)^2: one product.
        terms = np.stack([x * x, x, y * y, y, np.ones_like(x)], 1)
        factors = np.stack([ax, -2 * ax * cx, ay, -2 * ay * cy, ax * cx * cx + ay * cy * cy])
        factors = torch.from_numpy(factors).float()
        # Not NumPy's product, whose threads spin and would take the cores from the network.
        patch = (torch.from_numpy(terms) @ factors).argmin(1).numpy()
        motif = np.where(rng.random(n) < 0.75, i % motifs, rng.integers(0, motifs, n))
        angle, period = rng.uniform(0, 2 * math.pi, n), rng.uniform(4.5, 7.5, n)
        table = np.stack([np.cos(angle) / period, np.sin(angle) / period, period], 1)
        cos, sin, period = table.astype(np.float32)[patch].T
        x, y = x * cos + y * sin, y * cos - x * sin  # in repeats, turned
        x, y = x - np.rint(x), y - np.rint(y)
        inside = np.empty_like(x)
        for k, formula in enumerate(MOTIFS.values()):
            rows = np.flatnonzero(motif[patch] == k)
            inside[rows] = formula(x[rows], y[rows])
        share = (inside * period + 0.5).clip(0, 1)[:, None]  # of a pixel that is ink
        colours = paper + (INKS[rng.integers(0, len(INKS), n)][patch] - paper) * share
        return Image.fromarray(colours.astype(np.uint8).reshape(S, S, 3))


def read_classes(path):
    """The class folders named in a file, the first word of each line, each once; None for an empty
    path: all of them. Raises InputError where there is no such file."""
    if not path:
        return None
    if not os.path.isfile(path):
        raise InputError(f"there is no class list {path!r}")
    with open(path, encoding="utf-8-sig") as lines:
        return list(dict.fromkeys(line.split()[0] for line in lines if line.strip())) or None


def open_images(data, split, classes=None):
    """The source for a split, 'train' or 'val', of `data`: one of BUILT_IN (Imagenette comes into
    data/), or a folder, which is read as it is where it has no folder of that name."""
    if data in ("shapes", "none"):
        return Shapes(split) if data == "shapes" else Noise()
    if data == "imagenette":
        from torchvision import datasets
        data = datasets.Imagenette("data", split, size="320px", download=True)._image_root
    if not os.path.isdir(data):
        raise InputError(f"there is no folder {data!r}: --data takes a folder of images or one of "
                         f"{', '.join(BUILT_IN)}")
    part = os.path.join(data, split)
    source = Folder(part if os.path.isdir(part) else data, classes)
    splits = {"training", "train", "validation", "valid", "val", "testing", "test"}
    if not os.path.isdir(part) and len(source.classes) > 1 and "train" not in source.classes and (
            {name.lower() for name in source.classes} <= splits) and source.labels.min() >= 0:
        raise InputError(f"{data!r} has the folders {source.classes}: call them train and val")
    return source


def train_and_val(data, seed, classes=None):
    """Images to train on and others to measure on, in random order: those of val/ where there are
    train/ and val/, else 5%, but 16 to 5,000, and of few images a quarter, that are drawn with the
    seed. -> (source, indices) twice, and a sentence that says what was chosen."""
    train = open_images(data, "train", classes)
    rng = np.random.default_rng((seed, 1))  # stream 1: the split
    if data in BUILT_IN or all(os.path.isdir(os.path.join(data, x)) for x in ("train", "val")):
        val = open_images(data, "val", classes)
        return ((train, range(len(train))), (val, rng.permutation(len(val))),
                f"{len(train)} images of train; {len(val)} of val, held out")
    order = rng.permutation(len(train))
    count = min(max(16, len(train) // 20), 5000, max(2, len(train) // 4), len(train) - 1)
    return ((train, np.sort(order[count:])), (train, order[:count]),
            f"{len(train) - count} images; no val/, so {count} more, drawn by the seed, held out")


# ------------------------------------------------------------------------------- 7. command line

def main():
    """Write a contact sheet of one photo: the context, its six exemplars, their maps."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("photo", help="an image file")
    parser.add_argument("--out", default="crops.png", help="the picture to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=2, help="another seed, other crops")
    args = parser.parse_args()
    try:
        with open_image(args.photo) as image:
            context = cut_context(image, np.random.default_rng(args.seed), size=480)
    except OSError as error:
        sys.exit(f"crop.py: cannot read {args.photo!r} as an image: {error}")
    u = torch.rand(1, 7, UNIFORMS, generator=torch.Generator().manual_seed(args.seed))
    # 480 and 192 pixels are three times the usual 160 and 64, for a sharper picture.
    sheet = contact_sheet(*make_pairs(context[None], u, exemplar_size=192), tile=192)
    sheet.save(args.out)
    print(f"wrote {args.out}: the context, its six exemplars and their maps")


if __name__ == "__main__":
    main()
