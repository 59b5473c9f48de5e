"""Losses of heatmaps: how far a pair of them is from being alike, and how far one is from lying on the object."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cgc_reg._checks import check_choice, check_maps, check_pair, check_positive
from cgc_reg._gather import gather
from cgc_reg._precision import at_least_float32, without_autocast
from cgc_reg.energy import Boxes, energies, energy_maps, has_object, object_masks, scaled_to_peak

Negatives = Literal["keys", "official"]
Reduction = Literal["mean", "sum", "none"]


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float = 0.5,
    *,
    negatives: Negatives = "keys",
    reduction: Reduction = "mean",
    gather_distributed: bool = False,
) -> Tensor:
    r"""Contrast each query with its own key against the keys of the other images.

    .. math:: L_i = -\log \frac{\exp(\mathrm{sim}(q_i, k_i) / \tau)}{\sum_j \exp(\mathrm{sim}(q_i, k_j) / \tau)}

    sim is the cosine of the two maps, read as vectors. A blank map has similarity 0 with every map.

    Args:
        query: q, heatmaps (n, h, w).
        key: k, heatmaps (n, h, w); map i belongs to query i, all others are its negatives.
        temperature: tau; smaller weighs the most similar negatives more.
        negatives: ``"keys"``, the equation above, which is the paper's; ``"official"``, as in the authors' code:
            the denominator's other terms are sim(k_i, k_j), j != i, which compare keys with keys.
        reduction: over the images of the batch; ``"none"`` returns L, (n,).
        gather_distributed: take negatives from every process of the default group too. Each process returns the
            mean over its own queries, and the keys' gradients are summed over processes, so that averaging
            gradients as DistributedDataParallel does gives those of the global batch. Local batches must be of
            one size, which each call makes sure of.

    Returns:
        A scalar, or (n,); float32 or wider. Between 0 and log n + 1 / tau for maps that are not negative, over n keys
        in all; log n when all maps are equal.

    Raises:
        ValueError: the maps' shapes differ, also between processes under ``gather_distributed``; an option is
            unknown; or there is only one image and so no negative.

    Example:
        >>> info_nce(torch.ones(4, 7, 7), torch.ones(4, 7, 7))  # log 4
        tensor(1.3863)

    References:
        Pillai et al., Consistent Explanations by Contrastive Learning (CVPR 2022), section 3.
    """
    check_pair(query, key)
    check_positive("temperature", temperature)
    check_choice("negatives", negatives, get_args(Negatives))
    check_choice("reduction", reduction, get_args(Reduction))
    with without_autocast(query):
        q, k = unit_maps(query), unit_maps(key)
        keys, offset = gather(k) if gather_distributed else (k, 0)
        check_negatives(len(keys))
        positive = (q * k).sum(dim=1)
        anchor = q if negatives == "keys" else k
        similarity = (anchor @ keys.T).diagonal_scatter(positive, offset)
        loss = (similarity / temperature).logsumexp(dim=1) - positive / temperature
        return reduce(loss, reduction)


def mse_consistency(query: Tensor, key: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Compare each query with its own key only, with no negatives.

    .. math:: L_i = \Big\lVert \frac{q_i}{\lVert q_i \rVert} - \frac{k_i}{\lVert k_i \rVert} \Big\rVert^2
              = 2 - 2\,\mathrm{sim}(q_i, k_i)

    The second form holds where neither map is blank; a blank map counts as a vector of zeros. The sum over pixels,
    unlike their mean, does not depend on the resolution.

    Args:
        query: q, heatmaps (n, h, w).
        key: k, heatmaps (n, h, w).
        reduction: over the images of the batch; ``"none"`` returns L, (n,).

    Returns:
        A scalar, or (n,); float32 or wider. Between 0 and 2 for maps that are not negative.

    Raises:
        ValueError: the maps' shapes differ, or the reduction is unknown.

    Example:
        >>> mse_consistency(torch.ones(4, 7, 7), torch.ones(4, 7, 7)).abs() < 1e-6
        tensor(True)

    References:
        Pillai et al., Consistent Explanations by Contrastive Learning (CVPR 2022): the non-contrastive baseline.
    """
    check_pair(query, key)
    check_choice("reduction", reduction, get_args(Reduction))
    if not len(query):
        raise ValueError("`mse_consistency` must compare at least one pair of heatmaps; got an empty batch.")
    with without_autocast(query):
        return reduce((unit_maps(query) - unit_maps(key)).square().sum(dim=1), reduction)


def energy_loss(
    heatmap: Tensor,
    masks: Tensor | None = None,
    *,
    boxes: Boxes | None = None,
    image_size: tuple[int, ...] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Keep the energy of each heatmap on the object.

    .. math:: L_i = 1 - \frac{\sum_{uv} m_{uv} \, \mathrm{ReLU}(g_{uv})}{\sum_{uv} \mathrm{ReLU}(g_{uv})}

    The heatmap g is first enlarged to the image's size, bilinearly. m is 1 on the object and 0 elsewhere. L is 1 less
    what :func:`content_heatmap` measures, with a gradient. An image without an object counts for nothing, so that a
    batch may hold images whose objects are not known. Nothing pulls a blank heatmap anywhere: it costs 1, and has a
    gradient of zero.

    Args:
        heatmap: g, (n, h, w), in the graph, at any resolution up to the masks'; of volumes (n, d, h, w), of signals
            (n, length).
        masks: m, (n, H, W), bool or from 0 to 1; of integers, such as 0 and 255, all but 0 count as 1. Zeros
            everywhere for an image without an object, or whose object is not known.
        boxes: in place of masks, as for :func:`content_heatmap`: (n, 4), or a list of n tensors (k, 4); k is 0 for an
            image without an object.
        image_size: (H, W), with boxes: the image that they are measured in.
        reduction: over the images with an object; 0 if there are none. ``"none"`` returns L, (n,), with 0 for an image
            without an object.

    Returns:
        A scalar, or (n,); float32 or wider. Between 0 and 1, but for ``"sum"``.

    Raises:
        ValueError: a shape is wrong; both masks and boxes are given, or neither; boxes without an image size; or the
            reduction is unknown.

    Example:
        >>> energy_loss(torch.ones(1, 7, 7), boxes=torch.tensor([[0, 0, 56, 224]]), image_size=(224, 224))
        tensor(0.7500)

    References:
        Rao et al., Studying How to Efficiently and Effectively Guide Models with Explanations (ICCV 2023): the Energy
        loss. They take it for each class that an image has, with the boxes of that class.
    """
    check_maps("heatmap", heatmap)
    check_choice("reduction", reduction, get_args(Reduction))
    masks = object_masks(heatmap, masks, boxes, image_size)
    there = has_object(masks)
    out = ~there.view(-1, *[1] * (heatmap.ndim - 1))  # before anything is computed, so that no gradient is NaN there
    energy = scaled_to_peak(energy_maps(heatmap.masked_fill(out, 0), masks.shape[1:]))
    on_object, everywhere = energies(energy, masks)
    share = on_object / everywhere.masked_fill(everywhere == 0, 1)
    loss = (1 - share).masked_fill(~there, 0)
    return loss.sum() / there.sum().clamp(min=1) if reduction == "mean" else reduce(loss, reduction)


def check_negatives(keys: int) -> None:
    """Refuse a contrast among too few keys."""
    if keys < 2:
        raise ValueError(
            "`info_nce` must contrast at least two heatmaps, so that each has a negative; got "
            f"{'a batch of one' if keys == 1 else 'an empty batch'}. Use a larger batch (in a DataLoader, "
            "`drop_last=True`), or `mse_consistency`, which has no negatives."
        )


def reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    """Reduce a loss per image, (n,)."""
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def unit_maps(maps: Tensor) -> Tensor:
    """Flatten heatmaps (n, h, w) to unit vectors (n, hw), at least float32; a blank map becomes zeros.

    Dividing by the peak first keeps the squares of very small and very large values in range. A blank map gets a
    finite gradient, where plain division by the norm would have none.
    """
    flat = at_least_float32(maps).flatten(1)
    peak = flat.detach().abs().amax(dim=1, keepdim=True)
    blank = peak < torch.finfo(flat.dtype).tiny
    flat = flat / peak.masked_fill(blank, 1)
    # What is not blank has a norm of at least 1, so this touches blank maps alone.
    return flat / flat.square().sum(dim=1, keepdim=True).masked_fill(blank, 1).sqrt()
