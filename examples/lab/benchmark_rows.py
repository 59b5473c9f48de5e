"""What the benchmark measures: training steps, and the parts of a step that are not the model."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from torch import Tensor, nn

from cgc_reg import (
    CAM,
    CGCRegularizer,
    Explainer,
    GradCAM,
    RandomResizedCropFlip,
    consistency,
    expose_layer,
    grad_cam,
    info_nce,
)
from lab.benchmark_timing import Work
from lab.rules import RULES

SAMPLER = RandomResizedCropFlip()
LAM = 0.5

# Rows and parts that other files name.
ALONE = "cross-entropy on x"
BOTH_VIEWS = "cross-entropy on both views"
THREE_VIEWS = "cross-entropy on three views"
HEATMAP = "cross-entropy on x and a loss on `g(model, x, y).heatmap`"
COMPUTE = "`reg.compute`"
BFLOAT16 = f"bfloat16: {COMPUTE}"
GATHERED = f"{COMPUTE}, `gather_distributed`"
DRAW, WARP_IMAGES, HEATMAPS = "draw T", "T(x)", "g(x) and g(T(x)), the inner gradient"
WARP_HEATMAPS, LOSS = "T(g(x))", "loss and scalars"


@dataclass(frozen=True)
class Row:
    """A training step, the row whose cross-entropy it shares, and how many steps one call makes."""

    work: Work
    beside: str = BOTH_VIEWS
    steps: int = 1


def make_model(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(args.model, weights=None, num_classes=10).to(args.device)


def make_rows(args: argparse.Namespace, model: nn.Module) -> dict[str, Row]:
    """Return the training steps, all on one model."""
    device = torch.device(args.device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.randint(10, (args.batch_size,), device=device)

    def step(loss: Callable[[], Tensor], amp: bool = False, optimizer: torch.optim.Optimizer = optimizer) -> Work:
        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                value = loss()
            value.backward()
            optimizer.step()

        return run

    def plain(views: int, model: nn.Module = model, *, amp: bool = False) -> Work:
        def loss() -> Tensor:
            images = [x, *(draw(x)(x) for _ in range(views - 1))]
            return torch.stack([F.cross_entropy(model(image), y) for image in images]).sum()

        return step(loss, amp)

    def compute(
        model: nn.Module = model,
        *,
        amp: bool = False,
        share: float = 1.0,
        optimizer: torch.optim.Optimizer = optimizer,
        explainer: Callable[[str], Explainer] = GradCAM,
        **options: object,
    ) -> Work:
        reg = CGCRegularizer(explainer(args.layer), **options)
        count = round(share * len(x))

        def loss() -> Tensor:
            out = reg.compute(model, x[:count])
            logits = out.logits if count == len(x) else torch.cat([out.logits, model(x[count:])])
            return F.cross_entropy(logits, y) + LAM * out.loss

        return step(loss, amp, optimizer)

    g, wanted = GradCAM(args.layer), torch.rand(1, device=device)

    def heatmap() -> Tensor:
        seen = g(model, x, y)
        return F.cross_entropy(seen.logits, y) + LAM * (seen.heatmap - wanted).square().mean()

    drop_in = CGCRegularizer(args.layer)

    def reused() -> Tensor:
        with drop_in.reuse(model):
            return F.cross_entropy(model(x), y) + LAM * drop_in(model, x)

    def every_third() -> None:
        full(), one(), one()

    one, full = plain(1), compute()
    side = 32 * max(2, round(0.6 * args.image_size / 32))  # a whole number of the heatmap's cells, in most CNNs
    small = (side, side)
    rows = {
        ALONE: Row(one, ALONE),
        HEATMAP: Row(step(heatmap), ALONE),
        BOTH_VIEWS: Row(plain(2)),
        THREE_VIEWS: Row(plain(3), THREE_VIEWS),
        COMPUTE: Row(full),
        "`reg(model, x)`": Row(step(lambda: F.cross_entropy(model(x), y) + LAM * drop_in(model, x)), THREE_VIEWS),
        "`reg(model, x)` in `reg.reuse(model)`": Row(step(reused)),
        **{f"{COMPUTE}, `{g.__name__}`": Row(compute(explainer=g)) for g in RULES.values() if g is not GradCAM},
        "the authors' recipe": Row(step(lambda: authors_loss(model, args.layer, x, y)), THREE_VIEWS),
        f"{COMPUTE}, views of {side} x {side}": Row(compute(view_size=small), ALONE),
        f"{COMPUTE}, `detach_key`": Row(compute(detach_key=True), ALONE),
        f"{COMPUTE}, both of these": Row(compute(view_size=small, detach_key=True), ALONE),
        f"{COMPUTE} on half of the batch": Row(compute(share=0.5), ALONE),
        f"{COMPUTE} in every third step": Row(every_third, ALONE, steps=3),
    }
    if args.amp:
        both = f"bfloat16: {BOTH_VIEWS}"
        rows[both] = Row(plain(2, amp=True), both)
        rows[BFLOAT16] = Row(compute(amp=True), both)
    if args.compile:
        both = f"compiled: {BOTH_VIEWS}"
        rows[both] = Row(plain(2, torch.compile(model)), both)
        # A class of its own: the compiler would take the graph of the row above for this one, whose layer is watched.
        other = copy.deepcopy(model)
        other.__class__ = type("Exposed", (type(model),), {})
        exposed = torch.compile(expose_layer(other, args.layer))
        own = torch.optim.SGD(other.parameters(), 1e-3, momentum=0.9)
        step_exposed = compute(exposed, explainer=CAM, optimizer=own)
        rows[f"compiled: {COMPUTE}, layer exposed"] = Row(step_exposed, both)
    if dist.is_initialized():
        rows[GATHERED] = Row(compute(gather_distributed=True))
    return rows


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

    return {
        DRAW: lambda: draw(images),
        WARP_IMAGES: lambda: transform(images),
        HEATMAPS: lambda: (heatmaps(), heatmaps()),
        WARP_HEATMAPS: warp_heatmaps,
        LOSS: make_loss(*maps),
    }


def make_loss(query: Tensor, key: Tensor, *, gather_distributed: bool = False) -> Work:
    def loss() -> None:
        info_nce(query, key, gather_distributed=gather_distributed).backward()
        consistency(query.detach(), key.detach())

    return loss


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
