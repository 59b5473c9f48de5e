"""The measures of a data set as metrics of torchmetrics, which Lightning and others log, reset and synchronise.

They need torchmetrics (``pip install "cgc-reg[torchmetrics]"``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from cgc_reg import metrics
from cgc_reg._checks import check_choice
from cgc_reg.energy import Boxes


class _OverSums(Metric):
    """One value of a measure that adds up: the sums are the states, and every process counts them alike."""

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False

    def __init__(self, measure: metrics.Consistency | metrics.ContentHeatmap, value: str, **options: Any) -> None:
        super().__init__(**options)
        check_choice("value", value, measure.result(measure.sums).keys())
        self.measure = measure
        self.value = value
        for name in measure.sums:
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def _tell_apart(self, **settings: float) -> None:
        """Keep settings as states: a MetricCollection takes metrics whose states are equal for one and the same."""
        for name, setting in settings.items():
            self.add_state(name, torch.tensor(float(setting)), dist_reduce_fx="max")

    def _count(self, *maps: Any, **options: Any) -> None:
        # `merge_state` and `load_state_dict` bring sums that this object has not counted itself.
        brought = {name: getattr(self, name) - counted for name, counted in self._counted().items()}
        self.measure.update(*maps, **options)
        for name, counted in self._counted().items():
            setattr(self, name, brought[name] + counted)

    def _counted(self) -> dict[str, Tensor]:
        """Return the measure's own sums, added up in float64 and rounded once."""
        return {
            name: torch.as_tensor(total, dtype=torch.float32, device=self.device)
            for name, total in self.measure.sums.items()
        }

    @override
    def compute(self) -> Tensor:
        total = {name: getattr(self, name).item() for name in self.measure.sums}
        return torch.tensor(self.measure.result(total)[self.value], device=self.device)

    @override
    def forward(self, *maps: Any, **options: Any) -> Tensor:
        """Take in a batch, and return the value of that batch alone."""
        self.update(*maps, **options)
        of_batch = copy.deepcopy(self.measure)
        of_batch.reset()
        of_batch.update(*maps, **options)
        total = {name: float(value) for name, value in of_batch.sums.items()}
        found = torch.tensor(of_batch.result(total)[self.value], device=self.device)
        self._forward_cache = found  # type: ignore[assignment]  # declared as None; Lightning logs it for a step
        return found

    @override
    def reset(self) -> None:
        super().reset()
        self.measure.reset()


class Consistency(_OverSums):
    r"""One value of :class:`cgc_reg.Consistency`, as a metric of torchmetrics.

    Groups of images for the loss are those of a process, and wait for the next update; a call of the object returns the
    value of its batch alone, NaN where that fills no group.

    Args:
        value: ``"loss"``, ``"positive_similarity"``, ``"negative_similarity"``, ``"margin"``, ``"blank_share"``,
            ``"count"`` or ``"groups"``.
        temperature, batch_size: as for :class:`cgc_reg.Consistency`.
        options: of :class:`torchmetrics.Metric`.

    Example:
        >>> from torchmetrics import MetricCollection
        >>> from cgc_reg.torchmetrics import Consistency
        >>> measures = MetricCollection({name: Consistency(name, batch_size=2) for name in ("loss", "margin")})
        >>> measures.update(torch.ones(2, 7, 7), torch.ones(2, 7, 7))  # once for all values
        >>> measures.compute()
        {'loss': tensor(0.6931), 'margin': tensor(0.)}
    """

    def __init__(self, value: str = "loss", *, temperature: float = 0.5, batch_size: int = 64, **options: Any) -> None:
        super().__init__(metrics.Consistency(temperature=temperature, batch_size=batch_size), value, **options)
        self._tell_apart(temperature=temperature, batch_size=batch_size)

    @override
    def update(self, query: Tensor, key: Tensor) -> None:
        """Take in a batch, as :meth:`cgc_reg.Consistency.update` does."""
        self._count(query, key)


class ContentHeatmap(_OverSums):
    r"""One value of :class:`cgc_reg.ContentHeatmap`, as a metric of torchmetrics.

    Args:
        value: ``"content_heatmap"``, ``"object_coverage"``, ``"blank_share"``, ``"no_object_share"`` or ``"count"``.
        options: of :class:`torchmetrics.Metric`.

    Example:
        >>> from cgc_reg.torchmetrics import ContentHeatmap
        >>> metric = ContentHeatmap()
        >>> metric.update(torch.ones(2, 7, 7), boxes=torch.tensor([[0, 0, 56, 224]] * 2), image_size=(224, 224))
        >>> metric.compute()
        tensor(0.2500)
    """

    def __init__(self, value: str = "content_heatmap", **options: Any) -> None:
        super().__init__(metrics.ContentHeatmap(), value, **options)

    @override
    def update(
        self,
        heatmaps: Tensor,
        masks: Tensor | None = None,
        *,
        boxes: Boxes | None = None,
        image_size: tuple[int, ...] | None = None,
    ) -> None:
        """Take in a batch, as :meth:`cgc_reg.ContentHeatmap.update` does."""
        self._count(heatmaps, masks, boxes=boxes, image_size=image_size)
