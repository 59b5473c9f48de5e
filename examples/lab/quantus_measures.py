"""What Quantus measures of a model's heatmaps, by three of its metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cgc_reg import explain


def quantus_measures(model: nn.Module, layer: str, batches: DataLoader[Any], *, device: str) -> dict[str, float]:
    """Measure heatmaps of the predicted class with Quantus, on images whose heatmap is not blank.

    Returns:
        Faithfulness (FaithfulnessCorrelation, higher is better), sensitivity to noise (AvgSensitivity, lower is better)
        and, where batches bring masks, localisation (RelevanceRankAccuracy, higher is better), all as Quantus sets
        them, but for 20 samples of noise instead of 200.

    References:
        Hedstroem et al., Quantus: An Explainable AI Toolkit for Responsible Evaluation of Neural Network Explanations
        and Beyond (JMLR 2023).
    """
    try:
        import quantus
    except ModuleNotFoundError as error:
        raise SystemExit(f'error: --quantus needs {error.name}; run pip install ".[evaluation]".') from None

    def heatmaps(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        x, target = (torch.as_tensor(values, device=device) for values in (inputs, targets))
        shown = explain(model, x, layer, target)
        return F.interpolate(shown[:, None], x.shape[2:], mode="bilinear").cpu().numpy()

    quiet = {"disable_warnings": True}
    metrics = {
        "faithfulness": quantus.FaithfulnessCorrelation(return_aggregate=False, **quiet),
        "sensitivity": quantus.AvgSensitivity(nr_samples=20, **quiet),
        "localisation": quantus.RelevanceRankAccuracy(**quiet),
    }
    np.random.seed(0)  # from which Quantus draws pixels and noise
    scores: dict[str, list[float]] = {}
    for x, _, *mask in tqdm(batches, "Quantus", leave=False):
        with torch.no_grad():
            y = model.eval()(x.to(device)).argmax(dim=1).cpu().numpy()
        arrays = {"x_batch": x.numpy(), "y_batch": y, "a_batch": heatmaps(model, x.numpy(), y)}
        if mask:
            arrays["s_batch"] = mask[0][:, None].numpy()
        seen = arrays["a_batch"].max(axis=(1, 2, 3)) > 0
        arrays = {name: values[seen] for name, values in arrays.items()}
        for name, metric in metrics.items():
            if seen.any() and (mask or name != "localisation"):
                found = metric(model=model, explain_func=heatmaps, device=device, channel_first=True, **arrays)
                scores.setdefault(name, []).extend(map(float, found))
    return {name: float(np.nanmean(values)) for name, values in scores.items()}
