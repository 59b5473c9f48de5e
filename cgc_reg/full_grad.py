"""FullGrad: what the image and every bias of the network give to a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cgc_reg._checked import checked
from cgc_reg._checks import check_function, check_images
from cgc_reg._precision import precision_of, without_autocast
from cgc_reg._targets import Target, as_target, target_of
from cgc_reg._warn import warn_once
from cgc_reg.explanation import Explanation
from cgc_reg.model.biases import kept_biases
from cgc_reg.model.given import ordinary, outside_inference_mode
from cgc_reg.model.gradient import score_gradients
from cgc_reg.model.outputs import find_logits
from cgc_reg.model.state import norms_in_training
from cgc_reg.model.wrappers import unwrap
from cgc_reg.rules import full_grad


@dataclass(frozen=True, kw_only=True)
class FullGrad:
    r"""Explain by :func:`full_grad`: the image's part in the score and that of every bias, in the image's resolution.

    .. math:: y = \sum x \odot \frac{\partial y}{\partial x} + \sum_l \sum b_l \odot \frac{\partial y}{\partial z_l}

    :math:`z_l` is what layer l puts out and :math:`b_l` what it adds there: the bias of a convolution or of a linear
    layer, and BatchNorm's implicit one, :math:`\beta - \gamma \mu / \sigma`. In evaluation mode, for a network of
    these, of ReLU and of pooling, the terms add up to the score exactly. The heatmap adds up their absolute values,
    each layer's scaled to its own range.

    There is no layer to name: all of them count. A step costs more than one of :class:`GradCAM`, since the inner
    gradient goes through the whole network and is differentiated again. That leaves the range of float16: train in
    bfloat16 or float32. A BatchNorm in training makes the score of an image, and so its heatmap, depend on the other
    images of the batch, which is warned of once.

    Terms are missing, and the sum is not the score, where a layer is no affine map: for other activations (a GELU, a
    sigmoid), for the norms that look at an image's own statistics (GroupNorm, LayerNorm), whose bias counts all the
    same, and in training mode, where BatchNorm's statistics follow the batch. Missing too is what a model adds by
    arithmetic of its own, such as ``x + self.bias`` or torchvision's ``FrozenBatchNorm2d``, and the biases inside
    attention, of recurrent layers and of scripted parts. Heatmaps also leave out the terms of layers that see an image
    in parts, such as a clip frame by frame; and they take the last dimension of a linear layer and of a LayerNorm for
    channels.

    Args:
        output_fn: as for :class:`GradCAM`.

    Raises:
        TypeError: ``output_fn`` is no function.

    Example:
        >>> FullGrad()(torchvision.models.resnet18().eval(), torch.rand(2, 3, 64, 64)).heatmap.shape
        torch.Size([2, 64, 64])

    References:
        Srinivas and Fleuret, Full-Gradient Representation for Neural Network Visualization (NeurIPS 2019).
    """

    output_fn: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check_function("output_fn", self.output_fn)

    def __call__(self, model: nn.Module, x: Tensor, target: Target | None = None) -> Explanation:
        """Run the model on x, once, and explain its scores; arguments are those of calling GradCAM.

        Raises:
            ValueError, TypeError: an argument is not as described; or it is to train in float16.
            RuntimeError: the model cuts its images off from the logits, or the heatmap would train nothing.
        """
        return self._explain(model, x, target, [])

    def terms(self, model: nn.Module, x: Tensor, target: Target | None = None) -> list[Tensor]:
        """Return the terms themselves, each of its layer's shape.

        Their sum over all but the first dimension is the score, see above: what is missing of it is what the heatmaps
        do not show.

        Args:
            model, x, target: as for calling it.

        Returns:
            First gradient times image, (n, c, h, w), then gradient times bias of each layer, in the order of the pass.

        Example:
            >>> model, x = torchvision.models.vgg11(num_classes=10).eval(), torch.rand(2, 3, 64, 64)
            >>> terms = FullGrad().terms(model, x, target=3)
            >>> torch.allclose(sum(term.flatten(1).sum(dim=1) for term in terms), model(x)[:, 3], atol=1e-4)
            True
        """
        terms: list[Tensor] = []
        self._explain(model, x, target, terms)
        return terms if torch.is_grad_enabled() else [term.detach() for term in terms]

    def _explain(self, model: nn.Module, x: Tensor, target: Target | None, terms: list[Tensor]) -> Explanation:
        check_images("x", x)
        with outside_inference_mode():
            trains = torch.is_grad_enabled()
            if trains:
                _check_training(model, x)
            target = as_target(ordinary(target), len(x), x.device)
            return checked(partial(self._pass, terms, trains), model, x, target)

    def _pass(
        self, terms: list[Tensor], trains: bool, model: nn.Module, x: Tensor, target: Tensor | None
    ) -> Explanation:
        x = x if x.requires_grad else x.detach().requires_grad_()
        with kept_biases() as biases:
            output = model(x.clone())  # which the model may change in place
            logits = find_logits(output, self.output_fn, len(x))
        target = target_of(target, ordinary(logits))
        places = [bias.place for bias in biases]
        by_image, *by_result = score_gradients(model, logits, [x, *places], target, create_graph=trains)
        if by_image is None:
            raise RuntimeError(
                "`model` must lead from its images to the logits through autograd; got one that cuts them off. Take "
                "`detach`, `no_grad` and reentrant checkpoints out of it, or an explainer of one layer behind the cut, "
                "such as GradCAM."
            )
        with without_autocast(x):
            terms.append(by_image * x)
            maps = terms[:]
            for gradient, bias in zip(by_result, biases, strict=True):
                if gradient is not None:
                    terms.append(gradient * bias.value())
                    maps.append(terms[-1].movedim(-1, 1) if bias.channels_last else terms[-1])
            heatmap = full_grad(maps, x.shape[2:])
        return Explanation(heatmap, logits, target, output)


def _check_training(model: nn.Module, x: Tensor) -> None:
    """Refuse what cannot be trained by a gradient through the whole network, and warn of what mixes images."""
    if precision_of(x) is torch.float16:
        raise ValueError(
            "FullGrad must train in bfloat16 or float32, since its gradient leaves the range of float16; got float16. "
            "Take `torch.autocast(device, torch.bfloat16)`, or an explainer of one layer, such as GradCAM."
        )
    if norms_in_training(unwrap(model)):
        warn_once(
            "FullGrad looks through every BatchNorm, and one in training normalises with the batch's statistics, so "
            "that the score of an image depends on the other images, and its heatmap too. Put them into evaluation "
            "mode with `.eval()`, or take an explainer of one layer behind them.",
            unwrap(model),
        )
