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

    6. image sources    folders, generated shapes, torchvision's data sets
    7. command line     `python crop.py PHOTO` and `python crop.py --bench FOLDER`

Uniform numbers in, crops out: sections 1 to 3 hold no random state, so the same numbers give the
same pairs on any machine and on any number of processes. Letters: B contexts, K exemplars of each,
m and n the sides of context and exemplar in pixels. Coordinates are PyTorch's: x to the right,
y down, both in [-1, 1] over the outer edges of the context (align_corners=False).
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps


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
    """Raise InputError unless boxes of these ranges exist at every angle and aspect."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"scale {scale} must be 0 < low <= high <= 1 (areas r0)")
    if not 0 < ratio[0] <= ratio[1]:
        raise InputError(f"ratio {ratio} must be 0 < low <= high (aspects r1 = h / w)")
    if not 0 <= rotation <= 180:
        raise InputError(f"rotation {rotation} must be between 0 and 180 degrees")
    largest = largest_area(ratio, rotation)
    if scale[0] > largest + 1e-9:
        raise InputError(f"scale starts at {scale[0]:.3g}, but with ratio up to "
                         f"{max(ratio[1], 1 / ratio[0]):.3g} and rotation up to {rotation:g} "
                         f"degrees only boxes of area up to {largest:.3f} fit at every angle")


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


def to_rgb(image):
    """Any Pillow mode to 8-bit RGB; 16-bit gray keeps its high byte, transparency shows white.
    Raises ValueError for pixels of 32 bits, since nothing says which of their values is white."""
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # convert would copy it
    if image.mode == "F" or image.mode == "I" and image.format != "PPM":  # 16 bits there
        raise ValueError(f"pixels of 32 bits, mode {image.mode}, whose white is not known")
    if image.mode.startswith("I"):
        gray = np.asarray(image)
        gray = np.where(gray == image.info.get("transparency"), 65535, gray)
        return Image.fromarray((gray >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def cut_box(image, choose, size):
    """PIL image -> the part of the upright photo that choose(width, height) -> (left, top, width,
    height) names, rounded to whole pixels, resized bicubically to uint8 [3, size, size].

    A JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 of its size that still has `size` pixels
    in the part (Pillow's draft), which costs little. PyTorch resizes bytes three times as fast as
    Pillow does, and the values differ by two of 255 levels at most."""
    orientation = image.getexif().get(0x0112)  # 1 to 8; whatever else a file holds is upright
    width, height = image.size
    if orientation in (5, 6, 7, 8):  # the photo is stored lying on its side
        width, height = height, width
    left, top, w, h = choose(width, height)
    shrink = size / min(w, h)
    image.draft("RGB", (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
    image = to_rgb(ImageOps.exif_transpose(image) if orientation in range(2, 9) else image)
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
    rng is not used. It equals resizing that side to size / ratio and cropping the middle."""
    def middle(width, height):
        side = ratio * min(width, height)
        return (width - side) / 2, (height - side) / 2, side, side

    return cut_box(image, middle, size)


class Samples(torch.utils.data.Dataset):
    """(epoch, i) -> (cut(image, rng), j): the data set of crops of source[indices[i]]; j is the
    image's number in the source. rng is seeded by (seed, epoch, i) alone.

    An image that cannot be read is named in a warning and the next one takes its part; ten of them
    in a row are an InputError. With replace=False, for evaluation, its sample is None instead."""

    def __init__(self, source, indices, seed, cut, replace=True):
        self.source, self.indices, self.seed, self.cut = source, indices, seed, cut
        self.replace, self.named = replace, set()

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, i = key
        for k in range(min(10, len(self)) if self.replace else 1):
            j = self.indices[(i + k) % len(self)]
            try:
                with self.source.open(j) as image:
                    rng = np.random.default_rng((self.seed, 3, epoch, i))  # stream 3: crops
                    return self.cut(image, rng), j
            except Exception as error:  # Pillow raises many kinds on damaged files
                name = self.source.name(j)
                if name not in self.named:
                    self.named.add(name)
                    print(f"warning: cannot read {name!r} ({type(error).__name__}: {error}); "
                          + ("the next image replaces it" if self.replace else "it is left out"),
                          file=sys.stderr, flush=True)
        if self.replace:
            raise InputError(f"{k + 1} images in a row cannot be read, the last one is {name!r}: "
                             "repair or remove them, if the warnings are not about your code")


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
    """A picture of normalised pairs: context with its boxes, exemplars, maps, and predicted maps
    with their IoU.

    context [B, 3, m, m], exemplars [B, K, 3, n, n], maps and logits [B, K, m, m], theta
    [B, K, 2, 3], on the CPU -> PIL image, one band for each of the B contexts. The side of a box
    that is the top of its exemplar is drawn thick."""
    rows = ["exemplars", "maps"] + ([] if logits is None else ["predicted"])
    gap, margin = tile // 12, tile * 3 // 4
    big = len(rows) * (tile + gap) - gap  # the side of the context's picture
    first = gap + big + margin  # where the tiles begin
    band = big + 2 * gap
    sheet = Image.new("RGB", (first + theta.shape[1] * (tile + gap), gap + len(theta) * band - gap),
                      "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(tile // 7)
    square = torch.tensor([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1.0]])  # x, y, 1
    for b in range(len(theta)):
        picture, top = paint(context[b]), gap + b * band
        sheet.paste(picture.resize((big, big), Image.BICUBIC), (gap, top))
        for r, name in enumerate(rows):
            middle = top + r * (tile + gap) + tile // 2
            draw.text((first - 4, middle), name, "#333333", font, anchor="rm")
        for k in range(theta.shape[1]):
            colour, x = COLOURS[k % len(COLOURS)], first + k * (tile + gap)
            corners = (square @ theta[b, k].T + 1) / 2 * big + torch.tensor([gap, top])
            corners = [tuple(corner) for corner in corners.tolist()]
            draw.line([*corners, corners[0]], colour, max(1, tile // 48))
            draw.line(corners[:2], colour, tile // 16)
            tiles = [paint(exemplars[b, k]), paint_map(maps[b, k], picture)]
            if logits is not None:
                tiles.append(paint_map(logits[b, k].float().sigmoid(), picture))
            for r, image in enumerate(tiles):
                y = top + r * (tile + gap)
                sheet.paste(image.resize((tile, tile), Image.BICUBIC), (x, y))
                draw.rectangle([x, y, x + tile - 1, y + tile - 1], None, colour, tile // 48)
            if logits is not None:
                draw.text((x + tile // 16, y + tile - tile // 16),
                          f"IoU {100 * map_iou(maps[b, k], logits[b, k]):.0f}%", "white", font,
                          anchor="ls", stroke_width=tile // 32, stroke_fill="black")
            draw.line([x, top, x + tile - 1, top], colour, tile // 16)
    return sheet


# ------------------------------------------------------------------------------ 6. image sources

# A source has len(source), source.open(i) -> PIL image, source.name(i), and for tasks with labels
# source.classes, the names, and source.labels, the number of each image's class.

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # theirs, by Pillow's names
BUILT_IN = ("shapes", "imagenette", "cifar10", "stl10", "none")
DOWNLOADS = "data"  # the folder that torchvision's data sets are downloaded to


def open_image(path):
    """A file as a PIL image of one of FORMATS. Pillow goes by the content, not by the extension,
    and would start another program for some other formats."""
    return Image.open(path, formats=FORMATS)


def find_images(root):
    """Paths of the image files below `root` at any depth, relative to it, sorted.

    Links to folders are followed after all else, and each real folder is visited once, so that
    loops end and a folder's images stay where they really are. Raises InputError where a folder
    cannot be read."""
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
            for name in files:
                path = os.path.join(folder, name)
                if (name.lower().endswith(EXTENSIONS) and not name.startswith(".")
                        and os.path.isfile(path)):  # a pipe would never answer
                    found.append(os.path.relpath(path, root))
    return sorted(found)


class Folder:
    """Images in a folder tree; the first folder level is the class, -1 for images outside any.

    classes: names of the class folders to keep, in label order (None: all of them, sorted). Where
    no folder has the whole name its first word counts, as in `n01443537 goldfish, ...`.
    Raises InputError when the folder or one of the classes is missing, or when no image is found.
    """

    def __init__(self, root, classes=None):
        if not os.path.isdir(root):
            raise InputError(f"there is no folder {root!r}: --data takes a folder of images or "
                             f"one of {', '.join(BUILT_IN)}")
        pairs = [(p, p.split(os.sep)[0] if os.sep in p else None) for p in find_images(root)]
        found = {c for _, c in pairs if c is not None}
        self.root, self.classes = root, sorted(found) if classes is None else [
            name if name in found else name.split()[0] for name in classes]
        if len(set(self.classes)) < len(self.classes):
            raise InputError(f"the class list names a folder of {root!r} twice")
        missing = [c for c in self.classes if c not in found]
        if missing:
            raise InputError(f"{root!r} has no images of {len(missing)} classes: "
                             f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
        number = {c: k for k, c in enumerate(self.classes)} | ({None: -1} if not classes else {})
        self.paths = [p for p, c in pairs if c in number]
        self.labels = [number[c] for _, c in pairs if c in number]
        if not self.paths:
            raise InputError(f"no images in {root!r}: looked at any depth for "
                             f"{' '.join(EXTENSIONS)}")

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return os.path.join(self.root, self.paths[i])

    def open(self, i):
        return open_image(self.name(i))


class Pictures:
    """A data set of torchvision, which gives (PIL image, label), as a source."""

    def __init__(self, title, dataset, labels, classes):
        self.title, self.dataset, self.labels, self.classes = title, dataset, labels, classes

    def __len__(self):
        return len(self.dataset)

    def name(self, i):
        return f"image {i} of {self.title}"

    def open(self, i):
        return self.dataset[i][0]


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
        self.split, self.number = split, list(self.SIZES).index(split)
        self.labels = [i % len(self.classes) if i < self.LABELLED or split == "val" else -1
                       for i in range(self.SIZES[split])]

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"shapes {self.split} scene {i}"

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
        patch = (terms @ factors.astype(np.float32)).argmin(1)
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
    """The class folders named in a file, one a line (None for an empty path: all of them)."""
    if not path:
        return None
    if not os.path.isfile(path):
        raise InputError(f"cannot read the class list {path!r}: it is no file")
    try:
        with open(path, encoding="utf-8-sig") as f:
            names = [line.strip() for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class list {path!r}: {error}") from error
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path!r} should name each class once, one a line")
    return names


def open_images(data, split, classes=None):
    """The source for `data`, a folder or one of BUILT_IN, and a split, 'train' or 'val'.

    A folder is read as it is, whatever the split: its caller knows where train/ and val/ are.
    Raises InputError: no such folder, no images, a class list that does not fit, no download."""
    from torchvision import datasets
    if data not in BUILT_IN:
        return Folder(data, classes)
    if data != "imagenette" and classes is not None:
        raise InputError(f"--classes picks class folders; {data!r} is not a folder")
    if data == "shapes":
        return Shapes(split)
    if data == "none":  # random pixels, to time everything but the loading
        noise = datasets.FakeData(64_000, num_classes=1000)
        return Pictures("noise", noise, [0] * len(noise), [str(k) for k in range(1000)])
    try:
        if data == "imagenette":
            folder = datasets.Imagenette(DOWNLOADS, split, size="320px", download=True)
            return Folder(folder._image_root, classes)
        if data == "cifar10":
            d = datasets.CIFAR10(DOWNLOADS, train=split == "train", download=True)
            return Pictures(f"CIFAR-10 {split}", d, d.targets, d.classes)
        part = "train+unlabeled" if split == "train" else "test"
        d = datasets.STL10(DOWNLOADS, part, download=True)
        return Pictures(f"STL-10 {split}", d, d.labels.tolist(), d.classes)
    except (OSError, RuntimeError) as error:
        raise InputError(f"could not download {data!r} to {DOWNLOADS!r} ({error}); "
                         "--data=shapes needs no download") from error


def train_and_val(data, seed, classes=None, held_out=256):
    """Images to train on and at most `held_out` fixed ones (None: no limit) to measure on.

    Returns ((source, indices), (source, indices), a sentence that says what was chosen)."""
    def part(split):
        return data if data in BUILT_IN else os.path.join(data, split)

    has_train = data in BUILT_IN or os.path.isdir(part("train"))
    train = open_images(part("train") if has_train else data, "train", classes)
    rng = np.random.default_rng((seed, 1))  # stream 1: the split
    if has_train and (data in BUILT_IN or os.path.isdir(part("val"))):
        val = open_images(part("val"), "val", classes)
        rows = rng.permutation(len(val))[:held_out].tolist() if held_out else list(range(len(val)))
        return ((train, list(range(len(train)))), (val, rows),
                f"{len(train)} images of the train split; {len(rows)} of the val split held out")
    order = rng.permutation(len(train)).tolist()
    count = max(2, len(train) // 20)  # 5%, but two at least and one less than all at most
    count = min(count, held_out or count, len(train) - 1)
    return ((train, sorted(order[count:])), (train, order[:count]),
            f"{len(train) - count} images; no val split, so {count} more, drawn with the seed, "
            "are held out")


def describe_data(train, held_out, out, classes=()):
    """What a checkpoint keeps of its data, to know them again: the number of images, a hash of the
    names of all, the classes in order. train, held_out: (source, indices). Raises InputError where
    the run's folder `out` lies among the images, since its pictures would become data."""
    names = hashlib.sha256()
    for source, indices in (train, held_out):
        root = os.path.realpath(getattr(source, "root", os.devnull)) + os.sep
        if (os.path.realpath(out) + os.sep).startswith(root):
            raise InputError(f"--out {out!r} lies among the images of {source.root!r}, and the "
                             "run's pictures would become data: name a folder elsewhere")
        for i in indices:
            names.update(os.fsencode(source.name(i)) + b"\0")
    return {"number of images": len(train[1]), "hash of their names": names.hexdigest()[:16],
            **{f"class {k}": name for k, name in enumerate(classes)}}


# ------------------------------------------------------------------------------- 7. command line

def bench(folder, seconds=3.0, rounds=5):
    """Contexts of 160 pixels a second that one core decodes and crops: a dict with their median."""
    torch.set_num_threads(1)
    source = Folder(folder)
    samples = Samples(source, list(range(len(source))), 0, partial(cut_context, size=160))

    def rate():
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            samples[0, n % len(samples)]
            n += 1
        return round(n / (time.perf_counter() - began), 1)

    rate()  # the first round reads the files from the disk
    rates = sorted(rate() for _ in range(rounds))
    return {"bench": "contexts", "images_per_s": rates[rounds // 2], "slowest": rates[0],
            "fastest": rates[-1], "n": len(source), "context_size": 160}


def main():
    """Write a contact sheet of one photo, or measure one core."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Crops of one photo as a "
                                     "contact sheet: context, six exemplars, six maps.")
    parser.add_argument("photo", nargs="?", help="an image file")
    parser.add_argument("--out", default="crops.png", help="the picture to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=2, help="another seed, other crops")
    parser.add_argument("--bench", metavar="FOLDER", help="contexts/s of one core, as JSON")
    args = parser.parse_args()
    if args.bench:
        return print(json.dumps(bench(args.bench)))
    if not args.photo:
        parser.error("name a photo, or --bench FOLDER")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed is a number from 0 to 2**63 - 1")
    rng = np.random.default_rng(args.seed)
    try:
        with open_image(args.photo) as image:
            context = cut_context(image, rng, size=480)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise InputError(f"cannot read {args.photo!r} as an image: {error}") from error
    u = torch.rand(1, 7, UNIFORMS, generator=torch.Generator().manual_seed(args.seed))
    # 480 and 192 pixels are three times the usual 160 and 64, for a sharper picture.
    sheet = contact_sheet(*make_pairs(context[None], u, exemplar_size=192), tile=192)
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {args.out!r}: {error}") from error
    print(f"wrote {args.out}: the context, its six exemplars and their maps")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"crop.py: {error}")
