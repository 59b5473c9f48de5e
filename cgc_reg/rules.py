"""Heatmap rules: pure functions of a layer's activation A and of the class score's gradient dy/dA.

A rule takes ``(activation, gradient)``, both (n, c, h, w), and returns heatmaps (n, h, w); of volumes (n, c, d, h, w)
and (n, d, h, w), of signals (n, c, length) and (n, length). Any function of that kind can stand in for the ones here.
Two are of other kinds: `class_activation` reads the head's weight in place of the gradient, and `full_grad` looks at
all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cgc_reg._checks import check_activation, describe
from cgc_reg._enlarge import enlarge

HeatmapRule = Callable[[Tensor, Tensor], Tensor]


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    r"""Weigh each channel by its mean gradient.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \alpha_c A_c\Big), \qquad
              \alpha_c = \frac{1}{hw} \sum_{uv} \frac{\partial y}{\partial A_{cuv}}

    Args:
        activation: A, (n, c, h, w).
        gradient: of the class score y with respect to A, (n, c, h, w).

    Returns:
        Heatmaps (n, h, w), not negative, in the units of y per pixel.

    Example:
        >>> grad_cam(torch.ones(2, 3, 7, 7), torch.ones(2, 3, 7, 7)).shape
        torch.Size([2, 7, 7])

    References:
        Selvaraju et al., Grad-CAM (ICCV 2017), equations 1 and 2.
    """
    check_activation(activation, gradient)
    return (gradient.mean(dim=_places(gradient), keepdim=True) * activation).sum(dim=1).relu()


def hires_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    r"""Weigh each value by its own gradient.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \frac{\partial y}{\partial A_c} \odot A_c\Big)

    Equal to :func:`grad_cam` where a global average pooling and a linear layer follow, as after a ResNet's
    ``layer4``. The authors of CGC train with this rule. Arguments and result are those of :func:`grad_cam`.

    Example:
        >>> hires_cam(torch.ones(2, 3, 7, 7), torch.ones(2, 3, 7, 7)).shape
        torch.Size([2, 7, 7])

    References:
        Draelos and Carin, HiResCAM (2020, arXiv 2011.08891).
    """
    check_activation(activation, gradient)
    return (gradient * activation).sum(dim=1).relu()


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    r"""Weigh each value by its own gradient where that is positive.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \mathrm{ReLU}\Big(\frac{\partial y}{\partial A_c}\Big) \odot A_c\Big)

    Arguments and result are those of :func:`grad_cam`.

    Example:
        >>> layer_cam(torch.ones(2, 3, 7, 7), torch.ones(2, 3, 7, 7)).shape
        torch.Size([2, 7, 7])

    References:
        Jiang et al., LayerCAM (IEEE Transactions on Image Processing, 2021).
    """
    check_activation(activation, gradient)
    return (gradient.relu() * activation).sum(dim=1).relu()


def positive_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    r"""Weigh each channel by the mean of its positive gradients.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c \alpha_c A_c\Big), \qquad
              \alpha_c = \frac{1}{hw} \sum_{uv} \mathrm{ReLU}\Big(\frac{\partial y}{\partial A_{cuv}}\Big)

    Some tutorials call this Grad-CAM; it ignores evidence against the class. Arguments and result are those of
    :func:`grad_cam`.

    Example:
        >>> positive_grad_cam(torch.ones(2, 3, 7, 7), -torch.ones(2, 3, 7, 7)).sum()
        tensor(0.)
    """
    check_activation(activation, gradient)
    return (gradient.relu().mean(dim=_places(gradient), keepdim=True) * activation).sum(dim=1).relu()


def grad_cam_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    r"""Weigh each channel by its positive gradients, each counted the less the more of the map it speaks for.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c w_c A_c\Big), \qquad
              w_c = \sum_{uv} \alpha_{cuv} \, \mathrm{ReLU}(d_{cuv}), \qquad
              \alpha_{cuv} = \frac{d_{cuv}^2}{2 d_{cuv}^2 + d_{cuv}^3 \sum_{ab} A_{cab}}, \qquad
              d = \frac{\partial y}{\partial A}

    This is the paper's form for the score exp(y), whose higher derivatives are powers of the first where what follows A
    is piecewise linear; the common factor exp(y), of each image, is left out. Where d times the sum is small, alpha is
    near 1/2, and the heatmap that of :func:`positive_grad_cam` up to scale. The paper takes A behind a ReLU: for maps
    with negative values a channel whose sum is near -2 / d has a pole. pytorch-grad-cam computes the same; torch-cam
    sums d^3 A over places, which is something else where d differs from place to place.

    Arguments and result are those of :func:`grad_cam`, but for the unit, which changes with the activation's.

    Example:
        >>> grad_cam_plus_plus(torch.ones(2, 3, 7, 7), torch.ones(2, 3, 7, 7)).shape
        torch.Size([2, 7, 7])

    References:
        Chattopadhay et al., Grad-CAM++ (WACV 2018), section 3.
    """
    check_activation(activation, gradient)
    # Of d^2 / (2 d^2 + d^3 S) a factor d^2 cancels, whose powers would leave the range of float32. Where d is negative,
    # ReLU(d) leaves nothing of alpha, which has its poles there.
    places, positive = _places(activation), gradient.relu()
    alpha = 1 / (2 + positive * activation.sum(dim=places, keepdim=True))
    weight = (alpha * positive).sum(dim=places, keepdim=True)
    return (weight * activation).sum(dim=1).relu()


def xgrad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    r"""Weigh each channel by the mean of its gradients over what is active in it.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c w_c A_c\Big), \qquad
              w_c = \frac{\sum_{uv} d_{cuv} A_{cuv}}{\sum_{uv} A_{cuv}}, \qquad d = \frac{\partial y}{\partial A}

    A channel whose values sum to 0, such as a dead one, has weight 0. The paper takes A behind a ReLU. For maps with
    negative values a channel whose sum is near 0 has a pole. Arguments and result are those of :func:`grad_cam`.

    Example:
        >>> xgrad_cam(torch.ones(2, 3, 7, 7), torch.ones(2, 3, 7, 7)).shape
        torch.Size([2, 7, 7])

    References:
        Fu et al., Axiom-based Grad-CAM (BMVC 2020), section 3.
    """
    check_activation(activation, gradient)
    places = _places(activation)
    total = activation.sum(dim=places, keepdim=True)
    weight = (gradient * activation).sum(dim=places, keepdim=True) / total.masked_fill(total == 0, 1)
    return (weight * activation).sum(dim=1).relu()


def class_activation(activation: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    r"""Weigh each channel by the head's weight for the class: CAM, in closed form.

    .. math:: g = \mathrm{ReLU}\Big(\sum_c w_{kc} A_c\Big)

    Where global average pooling and one linear layer follow A, this is hw times :func:`grad_cam`, with no gradient
    to compute. Elsewhere it is another thing: see :func:`cgc_reg.check_closed_form`.

    Args:
        activation: A, (n, c, h, w).
        weight: w of the linear layer, (classes, c).
        target: k, the class index of each image, (n,); or weights of all classes, (n, classes), whose sum of
            :math:`w_k` counts then.

    Returns:
        Heatmaps (n, h, w), not negative.

    Example:
        >>> class_activation(torch.ones(2, 3, 7, 7), torch.ones(10, 3), torch.tensor([1, 2])).shape
        torch.Size([2, 7, 7])

    References:
        Zhou et al., Learning Deep Features for Discriminative Localization (CVPR 2016), equation 2.
    """
    if activation.ndim not in (3, 4, 5) or weight.ndim != 2 or weight.shape[1] != activation.shape[1]:
        raise ValueError(
            f"`weight` must be (classes, c) for an activation (n, c, h, w); got {describe(weight)} and "
            f"{describe(activation)}."
        )
    alpha = weight[target] if target.ndim == 1 else target.to(weight.dtype) @ weight
    return (alpha.view(*alpha.shape, *[1] * (activation.ndim - 2)) * activation).sum(dim=1).relu()


def full_grad(terms: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    r"""Add up what the image and each layer's biases give to the score, place by place.

    .. math:: g = \sum_l \sum_c \mathrm{enlarge}\big(\psi(t_l)\big)_c, \qquad
              \psi(t) = \frac{|t| - \min |t|}{\max |t| - \min |t|}

    The minimum and the maximum are those of an image's term, over channels and places, so that each layer counts alike.

    Args:
        terms: t, each (n, c, h, w): gradient times image, and gradient times bias of each layer. Terms without places,
            as of a linear layer or of maps of one pixel, are left out.
        size: (height, width) of the result; (depth, height, width) of volumes, (length,) of signals.

    Returns:
        Heatmaps (n, height, width), or what volumes and signals have, not negative.

    Example:
        >>> full_grad([torch.rand(2, 3, 8, 8), torch.rand(2, 16, 4, 4), torch.rand(2, 10)], (8, 8)).shape
        torch.Size([2, 8, 8])

    References:
        Srinivas and Fleuret, Full-Gradient Representation for Neural Network Visualization (NeurIPS 2019), section 4.
    """
    maps = []
    for term in terms:
        if term.ndim == 2 + len(size) and term.shape[2:].numel() > 1:
            size_of_term, of_image = term.abs(), tuple(range(1, term.ndim))
            low, high = size_of_term.amin(dim=of_image, keepdim=True), size_of_term.amax(dim=of_image, keepdim=True)
            span = high - low
            scaled = (size_of_term - low) / span.masked_fill(span == 0, 1)
            # Enlarging is linear: the sum of all channels needs it once.
            maps.append(enlarge(scaled.sum(dim=1), size))
    return sum(maps[1:], maps[0])


def _places(maps: Tensor) -> tuple[int, ...]:
    """List the spatial dimensions of maps (n, c, *space)."""
    return tuple(range(2, maps.ndim))
