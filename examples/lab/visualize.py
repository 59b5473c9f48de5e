"""Draw heatmaps of a trained model: `python -m lab visualize CHECKPOINT IMAGE_OR_FOLDER... --out heatmaps.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torchvision.transforms import v2

from cgc_reg import explain, folders
from cgc_reg.visualization import gallery, overlay
from lab.checkpoint import load_checkpoint, write_figure
from lab.image_data import DataError, denormalize, normalize, open_image
from lab.models import load_model
from lab.rules import RULES


def main(argv: list[str] | None = None) -> None:
    """Read a checkpoint and images, and write one picture: image, heatmap and overlay in each row."""
    parser = argparse.ArgumentParser(prog="python -m lab visualize", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="last.pt or best.pt of `python -m lab train`")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--layer", help="layer of the heatmaps (default: the one of the training)")
    parser.add_argument("--heatmap", choices=RULES, default="grad_cam", help="rule of the heatmaps")
    parser.add_argument("--most", type=int, default=12, help="how many images to draw at the most")
    parser.add_argument("--out", type=Path, default=Path("heatmaps.png"))
    args = parser.parse_args(argv)

    try:
        paths = find_images(args.images)[: args.most]
        saved = load_checkpoint(args.checkpoint)
        model = load_model(saved)
        size = saved["image_size"]
        prepare = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *normalize()])
        x = torch.stack([prepare(open_image(str(path))) for path in paths])
        with torch.no_grad():
            probability, target = model(x).softmax(dim=1).max(dim=1)
        heatmaps = explain(model, x, RULES[args.heatmap](args.layer or saved["layer"]), target)
    except (DataError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None

    images = denormalize(x)
    write_figure(args.out, gallery({"image": images, "heatmap": heatmaps, "overlay": overlay(images, heatmaps)}))
    for path, index, share in zip(paths, target.tolist(), probability.tolist(), strict=True):
        print(f"{path}: {saved['classes'][index]} ({share:.0%})")
    print(f"Heatmaps: {args.out}")


def find_images(places: list[Path]) -> list[Path]:
    """List the files among the places, and the images in the folders among them."""
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise DataError(f"there is no file or folder {place}.")
        found += folders.find_images(place) if place.is_dir() else [place]
    if not found:
        looked_for = ", ".join(folders.EXTENSIONS)
        raise DataError(f"no images found in {', '.join(map(str, places))}; looked for {looked_for}.")
    return found
