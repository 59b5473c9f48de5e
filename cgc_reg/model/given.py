"""What an explainer is given: images and targets as ordinary tensors, outside of inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode``, whose tensors cannot take part in any graph, for ``torch.no_grad``."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(value: Any) -> Any:
    """Return a tensor that autograd can use, of torch's own class: a copy of one that was made in inference mode.

    Subclasses, such as fastai's images, may do other things than a tensor where we need a tensor's. Those that are no
    tensor in memory, such as sharded ones, stay what they are. So does anything but a tensor.
    """
    if not isinstance(value, Tensor):
        return value
    if value.is_inference():
        value = value.clone()
    in_memory = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    return value.as_subclass(Tensor) if type(value) is not Tensor and in_memory else value
