"""Heatmap rules: pure functions of a layer's activation A and of the class score's gradient dy/dA.

A rule takes ``(activation, gradient)``, both (n, c, h, w), and returns heatmaps (n, h, w). Any function of that
kind can stand in for the ones here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cgc_reg._checks import check_activation, describe

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
    return (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1).relu()


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
    return (gradient.relu().mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1).relu()


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
    if activation.ndim != 4 or weight.ndim != 2 or weight.shape[1] != activation.shape[1]:
        raise ValueError(
            f"`weight` must be (classes, c) for an activation (n, c, h, w); got {describe(weight)} and "
            f"{describe(activation)}."
        )
    alpha = weight[target] if target.ndim == 1 else target.to(weight.dtype) @ weight
    return (alpha[:, :, None, None] * activation).sum(dim=1).relu()
