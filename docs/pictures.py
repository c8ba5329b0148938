"""pictures.py: the two pictures of the README, made from what a run has learned.

    python docs/pictures.py learning
    python docs/pictures.py found --ckpt=out/pictures/demo/ckpt.pt --seed=1
    python docs/pictures.py found --ckpt=out/photos/ckpt.pt --photo=photo.jpg

`learning` runs the demo in stages, in out/pictures/demo, and writes learning.png: the maps of one
held-out scene after 0, 100, 300, 1,000 and 3,000 steps. `found` writes found.png: a scene or a
photo, three pieces of it, and where a pre-trained network says that they come from.
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import crop
import pretrain


def load(path):
    """-> a run's Config and its model, from a ckpt.pt."""
    saved = pretrain.load_checkpoint(path) or sys.exit(f"there is no {path}")
    cfg = pretrain.Config(**saved["config"])
    cim = pretrain.build_model(cfg)
    cim.load_state_dict(saved["model"])
    return cfg, cim.eval()


def predict(cim, pairs):
    """Probabilities [K, m, m] of the maps of the first context."""
    with torch.no_grad():
        return cim(*pairs[:3])[1][0].sigmoid()


def three_boxes(cfg, seed):
    """Uniform numbers [1, 4, 15] of the first three boxes drawn with a seed that have 8 to 20% of
    the context and do not overlap. What the network makes of them is not looked at."""
    u = torch.rand(2000, crop.UNIFORMS, generator=torch.Generator().manual_seed(seed))
    theta = crop.affine_from_boxes(
        crop.sample_boxes(u[:, :6], cfg.scale, cfg.ratio, cfg.rotation, cfg.flip))
    maps, chosen = crop.rasterize_maps(theta, 128), []
    for k, box in enumerate(maps):
        if 0.08 < box.mean() < 0.2 and all((box * maps[j]).sum() == 0 for j in chosen):
            chosen.append(k)
    return u[[*chosen[:3], 0]][None]


def outline(mask, width=2):
    """The border of a boolean mask [h, w], `width` pixels to each side."""
    x, size = mask[None, None].float(), 2 * width + 1
    grown, shrunk = F.max_pool2d(x, size, 1, width), -F.max_pool2d(-x, size, 1, width)
    return (grown > shrunk)[0, 0]


def found(ckpt, photo, seed):
    """A picture: the image with three boxes, the exemplars, the predicted maps as contours."""
    cfg, cim = load(ckpt)
    u, side, big, gap = three_boxes(cfg, seed), 190, 300, 12
    with crop.open_image(photo) if photo else crop.Shapes("val").open(seed) as image:
        context, fine = (crop.cut_centre(image.copy(), None, size, 1.0)[None]
                         for size in (cfg.context_size, big))
    pairs = pretrain.make_pairs(context, u, cfg)
    _, exemplars, _, theta = crop.make_pairs(
        fine, u, 98, cfg.scale, cfg.ratio, cfg.rotation, cfg.flip, transforms=cfg.transforms)
    answers = predict(cim, pairs)  # [3, m, m]
    p = F.interpolate(answers[None], size=(side, side), mode="bilinear")[0]
    back = crop.to_image(fine[0])
    sheet = Image.new("RGB", (big + 3 * (side + gap) + 2 * gap, big + 44), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    sheet.paste(back, (gap, 34))
    for x, text in (gap, "an image, and the boxes of three pieces"), (big + 2 * gap, (
            "the pieces, and where the network says that they were")):
        draw.text((x, 8), text, "black", font)
    square = torch.tensor([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1], [-1, -1, 1.0]])
    for k, colour in enumerate(crop.COLOURS[:3]):
        corners = (square @ theta[0, k].T + 1) / 2
        outer = (corners * big + torch.tensor([gap, 34])).flatten().tolist()
        draw.line(outer, "white", 9)
        draw.line(outer, colour, 4)
        x = big + 2 * gap + k * (side + gap)
        piece = crop.paint(exemplars[0, k])
        draw.rectangle([x - 3, 31, x + 98 + 2, 34 + 98 + 2], colour)
        sheet.paste(piece, (x, 34))
        iou = crop.map_iou(pairs[2][0, k], answers[k] - 0.5)
        draw.text((x + 110, 74), f"overlap\n{iou:.0%}", "black", font)
        panel = np.asarray(back.resize((side, side), Image.BICUBIC)).astype(float)
        inside = (p[k] > 0.5).numpy()
        panel[~inside] = 90 + 0.4 * panel[~inside]  # pale where the network says no
        panel[outline(p[k] > 0.5).numpy()] = rgb(colour)
        panel = Image.fromarray(panel.clip(0, 255).astype(np.uint8))
        line = ImageDraw.Draw(panel)
        line.line((corners * side).flatten().tolist(), "white", 1)
        sheet.paste(panel, (x, 34 + big - side))
    return sheet


def rgb(text):
    """#rrggbb as three numbers."""
    return [int(text[i:i + 2], 16) for i in (1, 3, 5)]


def learning(out, tile=72):
    """A picture: the exemplars of a held-out scene, their maps, the average map, and the maps that
    the demo predicts after some steps."""
    if os.path.exists(f"{out}/ckpt.pt"):
        sys.exit(f"{out} holds a run, whose stages are gone: delete it, or give another --out")
    flags = ["--preset=demo", f"--out={out}"]
    cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, flags)
    machine = pretrain.Machine(torch.device("cpu"), 0, 1, "float32", False)
    context = crop.collate([pretrain.contexts_of(crop.Shapes("val"), [2], cfg)[0, 0]])[0]
    pairs = pretrain.make_pairs(context, pretrain.uniforms(cfg, (6,), 1), cfg)
    average = pretrain.mean_map(cfg, machine)
    rows = [("exemplar", None), ("its true map", pairs[2][0]),
            ("the average map", [average] * cfg.exemplars)]
    for steps in 0, 100, 300, 1000, 3000:
        cim = pretrain.build(cfg, machine)[0]
        if steps:
            pretrain.main([*flags, f"--max_steps={steps}"])
            cim = load(f"{out}/ckpt.pt")[1]
        rows.append((f"after {steps:,} steps", predict(cim.eval(), pairs)))
    sheet = Image.new("RGB", (150 + (tile + 6) * cfg.exemplars, 6 + (tile + 6) * len(rows)),
                      "white")
    draw, font, picture = ImageDraw.Draw(sheet), ImageFont.load_default(16), crop.paint(pairs[0][0])
    for r, (name, maps) in enumerate(rows):
        y = 6 + r * (tile + 6)
        draw.text((6, y + tile // 2), name, "black", font, anchor="lm")
        for k in range(cfg.exemplars):
            panel = crop.paint(pairs[1][0, k]) if maps is None else crop.paint_map(maps[k], picture)
            sheet.paste(panel.resize((tile, tile), Image.BICUBIC), (150 + k * (tile + 6), y))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", choices=["found", "learning"])
    parser.add_argument("--ckpt", default="out/demo/ckpt.pt")
    parser.add_argument("--photo", help="instead of a scene (found)")
    parser.add_argument("--seed", type=int, default=0, help="other boxes (found)")
    parser.add_argument("--out", default="out/pictures", help="the folder of the picture")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    sheet = (found(args.ckpt, args.photo, args.seed) if args.picture == "found"
             else learning(f"{args.out}/demo"))
    sheet.save(f"{args.out}/{args.picture}.png")
