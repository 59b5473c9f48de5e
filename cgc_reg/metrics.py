"""How consistent heatmaps are, and how well they lie on the object: of a batch, and of a whole data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cgc_reg._checks import check_maps, check_pair, check_positive, describe, is_number
from cgc_reg._peaks import highest_points
from cgc_reg._precision import without_autocast
from cgc_reg.energy import Boxes, energies, energy_maps, has_object, object_masks
from cgc_reg.losses import info_nce, unit_maps

Sums = dict[str, Any]  # name -> a scalar tensor on the maps' device, or a Python number

OVER_IMAGES = ("positive_similarity", "blank_share")
OVER_GROUPS = ("loss", "negative_similarity", "margin")
ON_OBJECT = ("content_heatmap", "object_coverage")


def content_heatmap(
    heatmaps: Tensor,
    masks: Tensor | None = None,
    *,
    boxes: Boxes | None = None,
    image_size: tuple[int, ...] | None = None,
) -> Tensor:
    r"""Measure the share of each heatmap's energy that lies on the object.

    .. math:: \frac{\sum_{uv} m_{uv} \, \mathrm{ReLU}(g_{uv})}{\sum_{uv} \mathrm{ReLU}(g_{uv})}

    The heatmap g is first enlarged to the image's size, bilinearly. Where the object is, m, is said by a mask or by a
    box. The authors' code evaluates so too, with TorchRay's masks of annotated boxes, except that it adds 1e-8 to each
    normalised heatmap first: a blank one then is uniform and scores the share of the image that the object takes,
    while here it is counted apart.

    Args:
        heatmaps: g, (n, h, w), at any resolution; of volumes (n, d, h, w), of signals (n, length).
        masks: m, (n, H, W), bool or from 0 to 1; of integers, such as 0 and 255, all but 0 count as 1.
        boxes: one for each image, (n, 4), or a list of n tensors (k, 4), k boxes for an image, as detection targets
            have them; k may be 0. A box is x_min, y_min, x_max, y_max in pixels of the image. m is 1 for the pixels
            whose centre lies inside a box of the image, x_min <= j + 0.5 < x_max. An annotation in whole pixels counted
            from 1, both ends included (Pascal VOC, ImageNet), is the box (x_min - 1, y_min - 1, x_max, y_max).
        image_size: (H, W), with boxes: the image that they are measured in.

    Returns:
        (n,), from 0 to 1; NaN for a blank heatmap, which has no energy to share, and for an image without an object:
        a mask of zeros, or no box with a pixel inside. :class:`ContentHeatmap` averages over the others and reports the
        shares of these.

    Raises:
        ValueError: a shape is wrong; both masks and boxes are given, or neither; or boxes without an image size.

    Example:
        >>> content_heatmap(torch.ones(1, 7, 7), boxes=torch.tensor([[0, 0, 56, 224]]), image_size=(224, 224))
        tensor([0.2500])

    References:
        Pillai and Pirsiavash, Explainable Models with Consistent Interpretations (AAAI 2021); Pillai et al., Consistent
        Explanations by Contrastive Learning (CVPR 2022), section 4.
    """
    return _content(*_energy_and_masks(heatmaps, masks, boxes, image_size))


def object_coverage(
    heatmaps: Tensor,
    masks: Tensor | None = None,
    *,
    boxes: Boxes | None = None,
    image_size: tuple[int, ...] | None = None,
) -> Tensor:
    r"""Measure how much of each object its heatmap covers.

    .. math:: \frac{\sum_{uv} m_{uv} \, \mathrm{ReLU}(g_{uv}) / \max_{pq} g_{pq}}{\sum_{uv} m_{uv}}

    The heatmap g is first enlarged to the image's size, as for :func:`content_heatmap`, and then divided by its highest
    value. The two go together as precision and recall do: a heatmap of one point in the middle of the object has all
    its energy there and covers little, and a uniform one covers all of the object and of everything else.

    Args:
        heatmaps, masks, boxes, image_size: as for :func:`content_heatmap`.

    Returns:
        (n,), from 0 to 1; NaN for a blank heatmap, and for an image without an object. :class:`ContentHeatmap` averages
        over the others.

    Raises:
        ValueError: as for :func:`content_heatmap`.

    Example:
        >>> object_coverage(torch.ones(1, 7, 7), boxes=torch.tensor([[0, 0, 56, 224]]), image_size=(224, 224))
        tensor([1.])
        >>> object_coverage(torch.eye(2)[None], torch.ones(1, 2, 2))
        tensor([0.5000])
    """
    return _coverage(*_energy_and_masks(heatmaps, masks, boxes, image_size))


class ContentHeatmap:
    """Average :func:`content_heatmap` and :func:`object_coverage` over a data set.

    `update` never makes a GPU wait. `compute` returns Python numbers and changes nothing, so that updates may go on.
    Where torch.distributed is initialized it sums over all processes: each of them must call it, with or without an
    update of its own.

    Attributes:
        sums: of this process: name -> a number, or a scalar tensor on the heatmaps' device. :meth:`result` makes of
            them, added up over processes, what :meth:`compute` returns.

    Example:
        >>> metric = ContentHeatmap()
        >>> metric.update(torch.ones(2, 7, 7), boxes=torch.tensor([[0, 0, 56, 224]] * 2), image_size=(224, 224))
        >>> metric.update(torch.zeros(2, 7, 7), torch.ones(2, 224, 224))  # blank heatmaps
        >>> metric.compute()
        {'content_heatmap': 0.25, 'object_coverage': 1.0, 'blank_share': 0.5, 'no_object_share': 0.0, 'count': 4}
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all updates."""
        self.sums: Sums = dict.fromkeys((*ON_OBJECT, "measured", "blank", "no_object", "count"), 0)

    def update(
        self,
        heatmaps: Tensor,
        masks: Tensor | None = None,
        *,
        boxes: Boxes | None = None,
        image_size: tuple[int, ...] | None = None,
    ) -> None:
        """Take in a batch, with the arguments of :func:`content_heatmap`."""
        energy, masks = _energy_and_masks(heatmaps, masks, boxes, image_size)
        no_object = ~has_object(masks)
        blank = energy.flatten(1).sum(dim=1) == 0  # and not NaN, so that a heatmap with NaN shows
        left_out = no_object | blank
        batch: dict[str, Tensor | int] = {
            "content_heatmap": _content(energy, masks).masked_fill(left_out, 0),
            "object_coverage": _coverage(energy, masks).masked_fill(left_out, 0),
            "measured": ~left_out,
            "blank": blank,
            "no_object": no_object,
            "count": len(heatmaps),
        }
        self.sums = _added(self.sums, batch)

    def compute(self) -> dict[str, float]:
        """Return what all updates of all processes come to.

        Returns:
            ``content_heatmap`` and ``object_coverage``, the means over heatmaps that are not blank, of images with an
            object (NaN if there are none), from 0 to 1; ``blank_share``, the share of heatmaps without a positive
            value; ``no_object_share``, the share of images without an object; ``count``, the number of heatmaps.

        Raises:
            RuntimeError: no process has had a heatmap.
        """
        return self.result(_over_processes(self.sums))

    @staticmethod
    def result(total: Mapping[str, float]) -> dict[str, float]:
        """Return what sums come to, which were added up over processes elsewhere; see :meth:`compute`."""
        return {
            **{name: _ratio(total[name], total["measured"]) for name in ON_OBJECT},
            "blank_share": _ratio(total["blank"], total["count"]),
            "no_object_share": _ratio(total["no_object"], total["count"]),
            "count": total["count"],
        }


def pointing_game(
    heatmaps: Tensor,
    masks: Tensor | None = None,
    *,
    boxes: Boxes | None = None,
    image_size: tuple[int, ...] | None = None,
    tolerance: float = 15,
) -> Tensor:
    r"""Tell whether each heatmap's highest point lies on the object, or not farther from it than the tolerance.

    .. math:: \min_{p: \, m_p > 0} \lVert p - \arg\max_q g_q \rVert_2 \le \text{tolerance}

    The point is the centre of the heatmap's highest cell, where a bilinearly enlarged heatmap is highest too; p are the
    centres of the object's pixels. A smaller tolerance than half of a pixel's diagonal counts as that, since the point
    may lie between pixels.

    Args:
        heatmaps, masks, boxes, image_size: as for :func:`content_heatmap`; the object is where a mask is above 0.
        tolerance: in pixels of the image. The customary 15 is for photographs; on images of 64 pixels that is a
            quarter of the side.

    Returns:
        (n,), 1 for a hit and 0 for a miss; NaN for a blank heatmap, which has no highest point, and for an image
        without an object.

    Raises:
        ValueError: as for :func:`content_heatmap`, or the tolerance is negative.

    Example:
        >>> heatmap = torch.zeros(1, 7, 7)
        >>> heatmap[0, 3, 3] = 1
        >>> pointing_game(heatmap, boxes=torch.tensor([[0, 0, 56, 224]]), image_size=(224, 224))
        tensor([0.])
        >>> pointing_game(heatmap, boxes=torch.tensor([[0, 0, 100, 224]]), image_size=(224, 224))
        tensor([1.])

    References:
        Zhang et al., Top-Down Neural Attention by Excitation Backprop (IJCV 126, 2018), section 4.2.
    """
    if not is_number(tolerance) or not tolerance >= 0:
        raise ValueError(f"`tolerance` must be a number of at least 0, in pixels; got {describe(tolerance)}.")
    check_maps("heatmaps", heatmaps)
    with torch.no_grad():
        masks = object_masks(heatmaps, masks, boxes, image_size)
        points = highest_points(heatmaps, masks.shape[1:])
        squared = torch.zeros(1, device=points.device)  # distances from the point, axis by axis
        for axis, side in enumerate(masks.shape[1:]):
            pixels = torch.arange(side, device=points.device) + 0.5
            squared = squared[..., None] + (pixels - points[:, axis, None]).square().view(-1, *[1] * axis, side)
        reach = max(tolerance**2, points.shape[1] / 4)
        hit = ((squared <= reach) & (masks > 0)).flatten(1).any(dim=1)
        highest = heatmaps.flatten(1).amax(dim=1)
        return hit.float().masked_fill(~((highest > 0) & has_object(masks)), float("nan"))


def _energy_and_masks(
    heatmaps: Tensor, masks: Tensor | None, boxes: Boxes | None, image_size: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Return ReLU(g) at the image's size, and m, both (n, H, W)."""
    check_maps("heatmaps", heatmaps)
    with torch.no_grad():
        masks = object_masks(heatmaps, masks, boxes, image_size)
        return energy_maps(heatmaps, masks.shape[1:]), masks


def _content(energy: Tensor, masks: Tensor) -> Tensor:
    """Divide the energy on the object by all energy, which gives NaN where there is none."""
    on_object, everywhere = energies(energy, masks)
    return (on_object / everywhere).masked_fill(~has_object(masks), float("nan"))


def _coverage(energy: Tensor, masks: Tensor) -> Tensor:
    """Average the energy over the object, in units of its peak: NaN where one of them is nothing."""
    places = tuple(range(1, energy.ndim))
    on_object = energy / energy.amax(dim=places, keepdim=True) * masks
    return on_object.sum(dim=places) / masks.sum(dim=places, dtype=on_object.dtype)


def consistency(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    r"""Measure how alike T(g(x)) and g(T(x)) are, and how unlike other images' heatmaps.

    Args:
        query: T(g(x)), heatmaps (n, h, w).
        key: g(T(x)), heatmaps (n, h, w).

    Returns:
        Detached scalars on the maps' device: ``positive_similarity``, the mean of sim(q_i, k_i);
        ``negative_similarity``, the mean of sim(q_i, k_j) over j != i (NaN for a batch of one); ``margin``, the first
        less the second; ``blank_share``, the share of blank maps among all 2n.

    Example:
        >>> consistency(torch.ones(2, 7, 7), torch.ones(2, 7, 7))["positive_similarity"]
        tensor(1.0000)
    """
    check_pair(query, key)
    with torch.no_grad(), without_autocast(query):
        q, k = unit_maps(query), unit_maps(key)
        n = len(q)
        positive = (q * k).sum(dim=1)
        # The sum over all pairs is one product of sums.
        negatives = (q.sum(dim=0) * k.sum(dim=0)).sum() - positive.sum()
        negative = negatives / (n * (n - 1)) if n > 1 else positive.sum() * float("nan")
        blank = torch.cat([q, k]).eq(0).all(dim=1)
        return {
            "positive_similarity": positive.mean(),
            "negative_similarity": negative,
            "margin": positive.mean() - negative,
            "blank_share": blank.float().mean(),
        }


class Consistency:
    r"""Measure CGC over a data set: the loss, and the similarities that :func:`consistency` tells of a batch.

    The loss depends on the number of negatives. It is therefore taken over groups of exactly `batch_size` images that
    follow each other, whatever the batches of the updates were; maps wait until a group is full. At the defaults it
    lies between log(1 + 63 exp(-2)) = 2.254, for pairs that agree perfectly and share nothing with other images, and
    log 64 = 4.159, for maps that are all equal; only maps more like other images' than like their own exceed that.

    `update` and `compute` keep to what :class:`ContentHeatmap` says of its own. A group holds images of one process;
    temperature and batch size must be the same in all processes.

    Args:
        temperature: tau of the loss.
        batch_size: images of a group, at least 2.

    Raises:
        ValueError: the temperature is not positive, or a group has fewer than two images and so no negatives.

    Example:
        >>> metric = Consistency(batch_size=2)
        >>> for _ in range(3):
        ...     metric.update(torch.ones(1, 7, 7), torch.ones(1, 7, 7))
        >>> found = metric.compute()  # maps that are all equal
        >>> found["count"], found["groups"], round(found["loss"], 4)  # log 2
        (3, 1, 0.6931)

    References:
        Pillai et al., Consistent Explanations by Contrastive Learning (CVPR 2022), section 3.
    """

    def __init__(self, *, temperature: float = 0.5, batch_size: int = 64) -> None:
        check_positive("temperature", temperature)
        if not isinstance(batch_size, int) or batch_size < 2:
            raise ValueError(
                "`batch_size` must be an integer of at least 2, so that each image has a negative; got "
                f"{describe(batch_size)}."
            )
        self.temperature = temperature
        self.batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        """Forget all updates."""
        self.sums: Sums = dict.fromkeys((*OVER_GROUPS, "groups", *OVER_IMAGES, "count"), 0)
        self._waiting: tuple[Tensor, Tensor] | None = None

    def update(self, query: Tensor, key: Tensor) -> None:
        """Take in a batch.

        Args:
            query: T(g(x)), heatmaps (n, h, w), as in :class:`CGCOutput`.
            key: g(T(x)), heatmaps (n, h, w).

        Raises:
            ValueError: the maps' shapes differ, from each other or from those of earlier updates.
        """
        check_pair(query, key)
        q, k = self._waiting or (query[:0], key[:0])
        if q.shape[1:] != query.shape[1:]:
            raise ValueError(
                f"`query` and `key` must have one size in all updates; got {describe(query)} after heatmaps of "
                f"{tuple(q.shape[1:])}. Use images of one size, or set `heatmap_size`."
            )
        n = len(query)
        if n == 0:
            return
        with torch.no_grad():
            batch = consistency(query, key)
            sums = _added(self.sums, {name: n * batch[name] for name in OVER_IMAGES} | {"count": n})
            q, k = torch.cat([q, query]), torch.cat([k, key])
            while len(q) >= self.batch_size:
                (group_q, q), (group_k, k) = (maps.tensor_split([self.batch_size]) for maps in (q, k))
                group = consistency(group_q, group_k) | {"loss": info_nce(group_q, group_k, self.temperature)}
                sums = _added(sums, {name: group[name] for name in OVER_GROUPS} | {"groups": 1})
        self.sums, self._waiting = sums, (q, k)

    def compute(self) -> dict[str, float]:
        """Return what all updates of all processes come to.

        Returns:
            ``loss``, ``negative_similarity`` and ``margin``, means over the full groups (NaN if no process filled one);
            ``positive_similarity`` and ``blank_share``, over all images; ``count``, the number of images; ``groups``,
            that of full groups.

        Raises:
            RuntimeError: no process has had a heatmap.
        """
        return self.result(_over_processes(self.sums))

    @staticmethod
    def result(total: Mapping[str, float]) -> dict[str, float]:
        """Return what sums come to, which were added up over processes elsewhere; see :meth:`compute`."""
        return {
            **{name: _ratio(total[name], total["groups"]) for name in OVER_GROUPS},
            **{name: _ratio(total[name], total["count"]) for name in OVER_IMAGES},
            "count": total["count"],
            "groups": total["groups"],
        }


def _added(sums: Sums, values: Mapping[str, Tensor | int]) -> Sums:
    """Add numbers, or a tensor's values, to the sums of their names, in float64 where the device has it."""

    def total(value: Tensor | int) -> Tensor | int:
        if not isinstance(value, Tensor):
            return value
        return value.sum(dtype=torch.float32 if value.device.type == "mps" else torch.float64)

    return sums | {name: sums[name] + total(value) for name, value in values.items()}


def _over_processes(sums: Sums) -> dict[str, Any]:
    """Add up, name by name, the sums of all processes, as Python numbers."""
    own = {name: value.item() if isinstance(value, Tensor) else value for name, value in sums.items()}
    shares: list[Any] = [own]
    if dist.is_available() and dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, own)
    total = {name: sum(share[name] for share in shares) for name in own}
    if total["count"] == 0:
        raise RuntimeError(
            "`compute` must come after an `update`; got no heatmap, in any process. Call `update` for each batch first."
        )
    return total


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
