"""The heatmap operator g of a model, for training and for looking at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cgc_reg._checks import check_images, check_option, check_target, describe
from cgc_reg._precision import at_least_float32, without_autocast
from cgc_reg.capture import ForwardPass, find_head, forward_pass
from cgc_reg.graph import reentrant_checkpoint
from cgc_reg.heatmaps import RULES, HeatmapRule, class_activation, score_gradient
from cgc_reg.losses import unit_maps
from cgc_reg.modes import evaluation_mode, ordinary, outside_inference_mode
from cgc_reg.suggest import suggest_target_layer
from cgc_reg.wrappers import unwrap

HEATMAPS = [*RULES, "class_activation"]


def heatmaps_of(
    forward: ForwardPass,
    target: Tensor,
    *,
    model: nn.Module,
    heatmap: str | HeatmapRule,
    head: str | None,
    reshape_transform: Callable[[Tensor], Tensor] | None,
    create_graph: bool,
) -> Tensor:
    """Return the heatmaps g(x), (n, h, w), of a finished pass, in at least float32.

    Args:
        forward: what the pass over x left.
        target: class of each image, (n,).
        model: whose pass it was; read only for the head's weight.
        heatmap: the rule.
        head: name of the linear layer, for ``"class_activation"``.
        reshape_transform: layer output -> (n, c, h, w); applied to the gradient too.
        create_graph: whether the heatmaps are to be trained on.
    """
    if forward.channels_last and reshape_transform is None:
        raise ValueError(
            "`target_layer` must put out maps of shape (n, c, h, w); got channels last, "
            f"{describe(forward.layer_output)}. Pass `reshape_transform=channels_last_to_maps`."
        )
    activation = at_least_float32(_as_maps(forward.layer_output, reshape_transform))
    if len(activation) != len(target):
        raise ValueError(
            f"`target_layer` must put out one map for each of the {len(target)} images; got {describe(activation)}. "
            "Name a layer outside of what changes the batch, or do that outside of the model."
        )
    if heatmap == "class_activation":
        classes = forward.logits.shape[1]
        weight = find_head(model, head, channels=activation.shape[1], classes=classes).to(activation.dtype)
        heatmaps = class_activation(activation, weight, target)
    else:
        gradient = score_gradient(forward.inner_logits, forward.layer_output, target, create_graph=create_graph)
        if gradient is None:
            repair = (
                "It lies inside a reentrant checkpoint, which hides it from autograd: checkpoint with "
                "`use_reentrant=False`."
                if reentrant_checkpoint(forward.inner_logits)
                else "Name a layer on the path to them, or pass an `output_fn` that returns the logits it leads to."
            )
            raise RuntimeError(
                f"`target_layer` must lead to the logits; got a layer whose output they do not depend on. {repair}"
            )
        rule = RULES[heatmap] if isinstance(heatmap, str) else heatmap
        with without_autocast(activation):
            heatmaps = rule(activation, _as_maps(gradient, reshape_transform))
    n, _, height, width = activation.shape
    if not isinstance(heatmaps, Tensor) or heatmaps.ndim != 3 or len(heatmaps) != n:
        raise ValueError(
            f"`heatmap` must return heatmaps of shape (n, h, w), here ({n}, {height}, {width}); got "
            f"{describe(heatmaps)}."
        )
    return at_least_float32(heatmaps)


def _as_maps(layer_output: Tensor, reshape_transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    maps = layer_output if reshape_transform is None else reshape_transform(layer_output)
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        whose = "`target_layer` must put out" if reshape_transform is None else "`reshape_transform` must return"
        repair = (
            "Name a layer in front of the pooling."
            if layer_output.ndim == 2
            else "For tokens (n, t, c) pass `reshape_transform=TokensToMaps((h, w))`, for channels last "
            "`reshape_transform=channels_last_to_maps`."
        )
        raise ValueError(f"{whose} maps of shape (n, c, h, w); got {describe(maps)}. {repair}")
    return maps


def explain(
    model: nn.Module,
    x: Tensor,
    target_layer: str | None = None,
    target: Tensor | None = None,
    *,
    heatmap: str | HeatmapRule = "grad_cam",
    head: str | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    reshape_transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute heatmaps for looking at.

    The model runs once, in evaluation mode, and is left as it was found. The heatmaps carry no graph.

    Args:
        model: any image classifier, wrapped or not.
        x: images (n, c, h, w), as the model takes them.
        target_layer: dotted name of the layer; that of :func:`suggest_target_layer` if None.
        target: class to explain in each image, (n,); the predicted one if None.
        heatmap: ``"grad_cam"``, ``"hires_cam"``, ``"layer_cam"``, ``"positive_grad_cam"``, ``"class_activation"``, or a
            function from activation and gradient, (n, c, h, w), to heatmaps.
        head: dotted name of the linear layer that ``"class_activation"`` reads; the only one that fits if None.
        output_fn: from the model's output to logits (n, k).
        reshape_transform: from the layer's output to (n, c, h, w).

    Returns:
        Heatmaps (n, h, w) on the layer's grid, not negative for the built-in rules.

    Raises:
        ValueError, TypeError: an argument is not as described; the message says which, and what to do.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> explain(model, torch.rand(2, 3, 224, 224), "layer4").shape
        torch.Size([2, 7, 7])
    """
    check_images("x", x)
    check_option("heatmap", heatmap, HEATMAPS)
    model = unwrap(model)
    with outside_inference_mode(), torch.no_grad(), evaluation_mode(model):
        x, target = x.clone(), ordinary(target)  # the model may change its images in place
        layer = suggest_target_layer(model, x) if target_layer is None else target_layer
        forward = forward_pass(model, x, layer, output_fn=output_fn)
        if target is None:
            target = forward.logits.argmax(dim=1)
        check_target("target", target, len(x), forward.logits.shape[1])
        return heatmaps_of(
            forward,
            target.long(),
            model=model,
            heatmap=heatmap,
            head=head,
            reshape_transform=reshape_transform,
            create_graph=False,
        ).detach()


def check_closed_form(
    model: nn.Module,
    x: Tensor,
    target_layer: str | None = None,
    *,
    head: str | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    reshape_transform: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-3,
) -> float:
    """Make sure that ``"class_activation"`` and ``"grad_cam"`` agree on this model, as it is now.

    They do where global average pooling and one linear layer follow the target layer. A ReLU, a normalisation or
    another linear layer between them makes the closed form wrong, which nothing else would show. An adapter around the
    head, such as LoRA's, shows only once it has been trained for some steps. The model is in evaluation mode, so that a
    dropout between them does not show: the closed form has no mask.

    Args:
        model, x, target_layer, head, output_fn, reshape_transform: as for :func:`explain`; some real images.
        tolerance: largest distance allowed between the two heatmaps of an image, each scaled to length 1.

    Returns:
        The largest distance found.

    Raises:
        ValueError: the distance is above the tolerance.

    Example:
        >>> check_closed_form(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64), "layer4") < 1e-3
        True
    """
    closed, autograd = (
        explain(
            model, x, target_layer, heatmap=rule, head=head, output_fn=output_fn, reshape_transform=reshape_transform
        )
        for rule in ("class_activation", "grad_cam")
    )
    distance = float((unit_maps(closed) - unit_maps(autograd)).norm(dim=1).max())
    if not distance <= tolerance:
        raise ValueError(
            f"`heatmap='class_activation'` must agree with autograd's Grad-CAM; got a distance of {distance:.2g} "
            f"between unit maps, above {tolerance:g}. Something besides average pooling stands between the layer and "
            "the head: use 'grad_cam', or name the layer right before the pooling."
        )
    return distance
