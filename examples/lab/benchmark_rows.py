"""What the benchmark measures: training steps, and the parts of a step that are not the model."""

from __future__ import annotations

import argparse
import copy
import importlib.util
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
    LayerCAM,
    RandomResizedCropFlip,
    compile_below,
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
    model = torchvision.models.get_model(args.model, weights=None, num_classes=10)
    return model.to(args.device, memory_format=memory_format(args))


def size_of_images(args: argparse.Namespace, side: int) -> tuple[int, ...]:
    """Return (side, side), or that of clips."""
    return (side, side) if args.frames is None else (args.frames, side, side)


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    if not args.channels_last:
        return torch.contiguous_format
    return torch.channels_last if args.frames is None else torch.channels_last_3d


class Steps:
    """Training steps on one model and one batch of random images."""

    def __init__(self, args: argparse.Namespace, model: nn.Module) -> None:
        self.layer, self.model, self.device = args.layer, model, torch.device(args.device)
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        x = torch.rand(args.batch_size, 3, *size_of_images(args, args.image_size), device=self.device)
        self.x = x.contiguous(memory_format=memory_format(args))
        self.y = torch.randint(10, (args.batch_size,), device=self.device)

    def step(
        self, loss: Callable[[], Tensor], amp: bool = False, optimizer: torch.optim.Optimizer | None = None
    ) -> Work:
        optimizer = optimizer or self.optimizer

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
                value = loss()
            value.backward()
            optimizer.step()

        return run

    def plain(self, views: int, model: nn.Module | None = None, *, amp: bool = False) -> Work:
        """Make a step with cross-entropy alone, on so many views."""
        model = self.model if model is None else model  # a compiled one has no truth value

        def loss() -> Tensor:
            images = [self.x, *(draw(self.x)(self.x) for _ in range(views - 1))]
            return torch.stack([F.cross_entropy(model(image), self.y) for image in images]).sum()

        return self.step(loss, amp)

    def compute(
        self,
        model: nn.Module | None = None,
        *,
        amp: bool = False,
        share: float = 1.0,
        optimizer: torch.optim.Optimizer | None = None,
        explainer: Callable[[str], Explainer] = GradCAM,
        **options: object,
    ) -> Work:
        """Make a step with `reg.compute`, on a share of the batch."""
        model = self.model if model is None else model
        reg = CGCRegularizer(explainer(self.layer), **options)
        count = round(share * len(self.x))

        def loss() -> Tensor:
            out = reg.compute(model, self.x[:count])
            logits = out.logits if count == len(self.x) else torch.cat([out.logits, model(self.x[count:])])
            return F.cross_entropy(logits, self.y) + LAM * out.loss

        return self.step(loss, amp, optimizer)

    def heatmap(self) -> Work:
        """Make a step with a loss of one's own on the heatmaps."""
        g, wanted = GradCAM(self.layer), torch.rand(1, device=self.device)

        def loss() -> Tensor:
            seen = g(self.model, self.x, self.y)
            return F.cross_entropy(seen.logits, self.y) + LAM * (seen.heatmap - wanted).square().mean()

        return self.step(loss)

    def drop_in(self) -> Work:
        """Make a step with `reg(model, x)` beside the model's own pass."""
        reg = CGCRegularizer(self.layer)
        return self.step(lambda: F.cross_entropy(self.model(self.x), self.y) + LAM * reg(self.model, self.x))

    def reused(self) -> Work:
        """Make such a step that reuses the model's own pass."""
        reg = CGCRegularizer(self.layer)

        def loss() -> Tensor:
            with reg.reuse(self.model):
                return F.cross_entropy(self.model(self.x), self.y) + LAM * reg(self.model, self.x)

        return self.step(loss)

    def authors(self) -> Work:
        """Make a step as the authors' code does."""
        return self.step(lambda: authors_loss(self.model, self.layer, self.x, self.y))


def make_rows(args: argparse.Namespace, model: nn.Module) -> dict[str, Row]:
    """Return the training steps, all on one model."""
    steps = Steps(args, model)
    one, full = steps.plain(1), steps.compute()
    side = 32 * max(2, round(0.6 * args.image_size / 32))  # a whole number of the heatmap's cells, in most CNNs
    small = size_of_images(args, side)
    rows = {
        ALONE: Row(one, ALONE),
        HEATMAP: Row(steps.heatmap(), ALONE),
        BOTH_VIEWS: Row(steps.plain(2)),
        THREE_VIEWS: Row(steps.plain(3), THREE_VIEWS),
        COMPUTE: Row(full),
        "`reg(model, x)`": Row(steps.drop_in(), THREE_VIEWS),
        "`reg(model, x)` in `reg.reuse(model)`": Row(steps.reused()),
        **{
            f"{COMPUTE}, `{type(g(args.layer)).__name__}`": Row(steps.compute(explainer=g))
            for g in RULES.values()
            if g is not GradCAM
        },
        f'{COMPUTE}, `weighting="confidence"`': Row(steps.compute(weighting="confidence")),
        f"{COMPUTE}, views of {side} x {side}": Row(steps.compute(view_size=small), ALONE),
        f"{COMPUTE}, `detach_key`": Row(steps.compute(detach_key=True), ALONE),
        f"{COMPUTE}, both of these": Row(steps.compute(view_size=small, detach_key=True), ALONE),
        f"{COMPUTE} on half of the batch": Row(steps.compute(share=0.5), ALONE),
        f"{COMPUTE} in every third step": Row(lambda: (full(), one(), one()), ALONE, steps=3),
    }
    if args.frames is None:
        rows["the authors' recipe"] = Row(steps.authors(), THREE_VIEWS)
    if args.amp:
        both = f"bfloat16: {BOTH_VIEWS}"
        rows |= {both: Row(steps.plain(2, amp=True), both), BFLOAT16: Row(steps.compute(amp=True), both)}
    if args.compile:
        rows |= make_compiled_rows(steps, amp=args.amp)
    if dist.is_initialized():
        rows[GATHERED] = Row(steps.compute(gather_distributed=True))
    return rows


def make_compiled_rows(steps: Steps, *, amp: bool) -> dict[str, Row]:
    """Return the steps of a compiled model."""
    how = "compiled, bfloat16" if amp else "compiled"
    both = f"{how}: {BOTH_VIEWS}"
    plain = steps.plain(2, torch.compile(steps.model), amp=amp)
    # A class of its own: the compiler would take the graph of the row above for this one, whose layer is watched.
    other = copy.deepcopy(steps.model)
    other.__class__ = type("Exposed", (type(steps.model),), {})
    exposed = torch.compile(expose_layer(other, steps.layer))
    own = torch.optim.SGD(other.parameters(), 1e-3, momentum=0.9)
    compute = steps.compute(exposed, explainer=CAM, optimizer=own, amp=amp)
    rows = {both: Row(plain, both), f"{how}: {COMPUTE}, layer exposed": Row(compute, both)}
    # Inductor works in `channels_last` inside, and may hand that on from part to part.
    for options, said in (({}, ""), ({"keep_output_stride": False}, ", `keep_output_stride=False`")):
        for g in (GradCAM, LayerCAM):
            model = copy.deepcopy(steps.model)
            compile_below(model, steps.x, steps.layer, options=options)
            own = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
            name = f"{how}: {COMPUTE}, `{g.__name__}`, `compile_below`{said}"
            rows[name] = Row(steps.compute(model, explainer=g, optimizer=own, amp=amp), both)
    return rows


def draw(x: Tensor) -> Callable[[Tensor], Tensor]:
    return SAMPLER.sample(len(x), tuple(x.shape[2:]), device=x.device)


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
    rows: dict[str, Work] = {
        "heatmaps of 7 x 7": lambda: transform(heatmaps),
        "heatmaps of 224 x 224, in a loop": lambda: [crop(m[None], b, 224) for m, b in zip(large, boxes, strict=True)],
        "images of 224 x 224": lambda: transform(images),
        "images of 224 x 224, bare `grid_sample`": lambda: F.grid_sample(images, grid, align_corners=False),
        "images of 224 x 224, torchvision in a loop": lambda: [
            crop(image, box, 224) for image, box in zip(images, boxes, strict=True)
        ],
    }
    if importlib.util.find_spec("kornia") is not None:
        from kornia.augmentation import RandomResizedCrop

        theirs = RandomResizedCrop((224, 224))
        rows["images of 224 x 224, kornia, with its draw"] = lambda: theirs(images)
    return rows
