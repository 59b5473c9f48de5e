"""What the benchmark measures: training steps, and the parts of a step that are not the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from torch import Tensor, nn

from cgc_reg import CGCRegularizer, RandomResizedCropFlip, consistency, expose_layer, grad_cam, info_nce

Work = Callable[[], object]
SAMPLER = RandomResizedCropFlip()
LAM = 0.5


def make_steps(args: argparse.Namespace) -> dict[str, Work]:
    """Return one training step for each row, all on one model; the first row is what the others are compared with."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = torchvision.models.get_model(args.model, weights=None, num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.randint(10, (args.batch_size,), device=device)
    small = (round(0.6 * args.image_size),) * 2

    def step(loss: Callable[[], Tensor]) -> Work:
        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext():
                value = loss()
            value.backward()
            optimizer.step()

        return run

    def plain(views: int, model: nn.Module = model) -> Work:
        def loss() -> Tensor:
            images = [x, *(draw(x)(x) for _ in range(views - 1))]
            return torch.stack([F.cross_entropy(model(image), y) for image in images]).sum()

        return step(loss)

    def compute(model: nn.Module = model, **options: object) -> Work:
        reg = CGCRegularizer(args.layer, **options)

        def loss() -> Tensor:
            out = reg.compute(model, x)
            return F.cross_entropy(out.logits, y) + LAM * out.loss

        return step(loss)

    drop_in = CGCRegularizer(args.layer)

    def reused() -> Tensor:
        with drop_in.reuse(model):
            return F.cross_entropy(model(x), y) + LAM * drop_in(model, x)

    steps = {
        "cross-entropy on both views": plain(2),
        "cross-entropy on x": plain(1),
        "cross-entropy on three views": plain(3),
        "`reg.compute`": compute(),
        "`reg(model, x)`": step(lambda: F.cross_entropy(model(x), y) + LAM * drop_in(model, x)),
        "`reg(model, x)` in `reg.reuse(model)`": step(reused),
        **{
            f'`reg.compute`, `"{rule}"`': compute(heatmap=rule)
            for rule in ("hires_cam", "layer_cam", "positive_grad_cam", "class_activation")
        },
        "the authors' recipe": step(lambda: authors_loss(model, args.layer, x, y)),
        "`reg.compute`, views of 0.6 times the side": compute(view_size=small),
        "`reg.compute`, `detach_key`": compute(detach_key=True),
        "`reg.compute`, both of these": compute(view_size=small, detach_key=True),
    }
    if args.compile:
        exposed = torch.compile(expose_layer(model, args.layer))
        steps["compiled: cross-entropy on both views"] = plain(2, torch.compile(model))
        steps["compiled: `reg.compute`, exposed layer"] = compute(exposed, heatmap="class_activation")
    return steps


def draw(x: Tensor) -> Callable[[Tensor], Tensor]:
    return SAMPLER.sample(len(x), (x.shape[2], x.shape[3]), device=x.device)


def authors_loss(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> Tensor:
    """Compute a step's loss as the authors' code does: three views, heatmaps of 224 x 224, a loop over the batch."""
    boxes = [draw_box(image) for image in x]
    view = torch.stack([crop(image, box, x.shape[-1]) for image, box in zip(x, boxes, strict=True)])
    other = torch.stack([crop(image, box, x.shape[-1]) for image, box in zip(x, reversed(boxes), strict=True)])
    losses = [F.cross_entropy(model(other), y)]
    heatmaps = []
    for images in (x, view):
        kept: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(lambda *hooked, kept=kept: kept.append(hooked[2]))
        logits = model(images)
        handle.remove()
        losses.append(F.cross_entropy(logits, y))
        score = logits.gather(1, y[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, kept[0], create_graph=True)
        heatmap = (gradient * kept[0]).sum(dim=1, keepdim=True).relu()
        heatmap = F.interpolate(heatmap, (224, 224), mode="bilinear")
        heatmaps.append(heatmap / (heatmap.sum(dim=(2, 3), keepdim=True) + 1e-8) + 1e-8)
    scale = 224 / x.shape[-1]
    queries = [
        crop(heatmap, [int(side * scale) for side in box], 224) for heatmap, box in zip(heatmaps[0], boxes, strict=True)
    ]
    query, key = (F.normalize(maps.flatten(1)) for maps in (torch.stack(queries), heatmaps[1]))
    similarity = (key @ key.T).diagonal_scatter((query * key).sum(dim=1)) / 0.5
    return torch.stack(losses).sum() + LAM * F.cross_entropy(similarity, torch.arange(len(x), device=x.device))


def draw_box(image: Tensor) -> tuple[int, int, int, int]:
    return torchvision.transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))


def crop(image: Tensor, box: Sequence[int], size: int) -> Tensor:
    top, left, height, width = box
    return TF.resized_crop(image, top, left, height, width, [size, size], antialias=False)


def make_parts(batch_size: int, image_size: int, heatmap_size: int, channels: int, device: str) -> dict[str, Work]:
    """Return what a step does besides running the model, part by part, each with its backward.

    Args:
        batch_size: n.
        image_size, heatmap_size: sides in pixels.
        channels: of the target layer.
        device: where.
    """
    images = torch.rand(batch_size, 3, image_size, image_size, device=device)
    head = nn.Linear(channels, 10, device=device)
    activation = torch.rand(batch_size, channels, heatmap_size, heatmap_size, device=device, requires_grad=True)
    maps = torch.rand(2, batch_size, heatmap_size, heatmap_size, device=device, requires_grad=True)
    transform = draw(images)
    target = torch.zeros(batch_size, dtype=torch.long, device=device)

    def heatmaps() -> None:
        score = head(activation.mean(dim=(2, 3))).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, activation, create_graph=True)
        grad_cam(activation, gradient).sum().backward()

    def warp_heatmaps() -> None:
        (transform(maps[0]) * transform.coverage((heatmap_size, heatmap_size))).sum().backward()

    def loss() -> None:
        info_nce(maps[0], maps[1]).backward()
        consistency(maps[0].detach(), maps[1].detach())

    return {
        "draw T": lambda: draw(images),
        "T(x)": lambda: transform(images),
        "g(x) and g(T(x)), the inner gradient": lambda: (heatmaps(), heatmaps()),
        "T(g(x))": warp_heatmaps,
        "loss and scalars": loss,
    }


def make_transforms(batch_size: int, device: str) -> dict[str, Work]:
    """Return transforms beside what they replace: a loop over images of 224 x 224, and a bare `grid_sample`."""
    images = torch.rand(batch_size, 3, 224, 224, device=device)
    heatmaps, large = (torch.rand(batch_size, side, side, device=device) for side in (7, 224))
    transform = draw(images)
    grid = F.affine_grid(transform.theta, list(images.shape), align_corners=False)
    boxes = [
        torchvision.transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for image in images
    ]
    return {
        "heatmaps of 7 x 7": lambda: transform(heatmaps),
        "heatmaps of 224 x 224, in a loop": lambda: [crop(m[None], b, 224) for m, b in zip(large, boxes, strict=True)],
        "images of 224 x 224": lambda: transform(images),
        "images of 224 x 224, bare `grid_sample`": lambda: F.grid_sample(images, grid, align_corners=False),
    }
