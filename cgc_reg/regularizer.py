"""The regularizer: its options, and the equation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from cgc_reg._at_layer import AtLayer
from cgc_reg._checks import (
    check_choice,
    check_flag,
    check_generator,
    check_images,
    check_option,
    check_positive,
    check_sampler,
    check_size,
    describe,
)
from cgc_reg._enlarge import enlarge
from cgc_reg._precision import at_least_float32, without_autocast
from cgc_reg._targets import Target, as_target
from cgc_reg._warn import warn
from cgc_reg.explainers import LayerExplainer, as_explainer, explained
from cgc_reg.explanation import Explainer, Explanation
from cgc_reg.losses import Negatives, Reduction, check_negatives, info_nce, mse_consistency, reduce
from cgc_reg.metrics import consistency
from cgc_reg.model.extra import extra_pass
from cgc_reg.model.given import ordinary, outside_inference_mode
from cgc_reg.model.state import BatchNormMode
from cgc_reg.model.wrappers import inside_data_parallel
from cgc_reg.official import IMAGE_SIZE, official_heatmap, official_mse
from cgc_reg.samplers import RandomResizedCropFlip, TransformSampler
from cgc_reg.transforms import SpatialTransform
from cgc_reg.weightings import Weighting, confidence

PairLoss = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["info_nce", "mse_consistency"]
WeightingName = Literal["uniform", "confidence"]


@dataclass(frozen=True, eq=False)
class CGCOutput:
    """What one call of :meth:`CGCRegularizer.compute` made.

    Attributes:
        loss: L_CGC, weighed, a scalar, or (n,) for ``reduction="none"``.
        logits: of the images x, (n, k), for the cross-entropy.
        view_logits: of the views T(x), (n, k).
        view: T(x), (n, c, H, W).
        transform: T.
        target: what the heatmaps that were compared explain: classes (n,), or weights of the scores (n, k).
        heatmap: g(x), (n, h, w), for looking at and for measures such as :func:`content_heatmap`.
        query: T(g(x)), (n, h, w), zero where T(x) shows nothing of x.
        key: g(T(x)), (n, h, w), zero there too.
        scalars: detached values to log: ``loss``, the mean of L whatever its weights, to compare; ``weight``, their
            mean; and what :func:`cgc_reg.consistency` returns.
        output: what the model returned for x, for a loss that needs more than logits.
    """

    loss: Tensor
    logits: Tensor
    view_logits: Tensor
    view: Tensor
    transform: SpatialTransform
    target: Tensor
    heatmap: Tensor
    query: Tensor
    key: Tensor
    scalars: dict[str, Tensor]
    output: Any


class CGCRegularizer(nn.Module):
    r"""Contrastive Grad-CAM Consistency: a loss that makes a model's heatmaps follow its images.

    .. math::
        q_i = T_i(g(x_i)), \quad k_j = g(T_j(x_j)), \quad
        L_i = -\log \frac{\exp(\mathrm{sim}(q_i, k_i) / \tau)}{\sum_j \exp(\mathrm{sim}(q_i, k_j) / \tau)}

    g gives the heatmap of an image for one class, T_i is a random spatial transform, sim the cosine. Add it to the
    loss of a training step, times a weight lam; the paper uses 0.5, and 0.25 for unlabelled images.

    It has no parameters, and between calls it keeps no tensor and no reference to the model. The model is left as it
    was found, except that :meth:`compute`'s pass over x updates BatchNorm's running statistics, as the step's own.

    Args:
        explainer: g, such as ``GradCAM("layer4")``, or any :class:`Explainer`. A layer's name is short for its
            :class:`GradCAM`; None for that of :func:`suggest_target_layer`, found at the first call.
        transform: draws T: :class:`RandomResizedCropFlip`, :class:`RandomAffine`, :class:`RandomFlip`,
            :class:`RandomQuarterTurn`, several in a :class:`Compose`, or anything with their ``sample``.
        loss: ``"info_nce"`` as above; ``"mse_consistency"``, without negatives; or a function from query and key,
            (n, h, w), masked and not normalised, to a loss: a scalar, or (n,) to be reduced.
        temperature: tau, of ``"info_nce"``.
        negatives: of ``"info_nce"``: ``"keys"`` as above, or ``"official"`` as in the authors' code.
        heatmap_size: (h, w) that both heatmaps are enlarged to first; None: the grid of the view's heatmap.
        view_size: (H, W) of the views; None: as large as x. Smaller views cost less. For volumes (D, H, W), and so for
            ``heatmap_size``.
        detach_key: make the keys constants: the view's pass builds no graph and costs less, and the loss trains through
            the queries alone. The ``view_logits`` train nothing then.
        bn_mode: what extra passes do to BatchNorm in training: ``"preserve"`` normalises with the batch's statistics
            without touching the running ones; ``"update"`` updates them; ``"eval"`` normalises with the running ones.
            Extra are the view's pass and, in ``reg(model, x)``, the pass over x too.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.
        weighting: how much each image counts, w in :math:`\sum_i w_i L_i / n`: ``"uniform"``, all alike, is the
            paper's; ``"confidence"`` is :func:`confidence`, so that CGC sets in as the network learns; or a function
            from logits (n, k) and target to (n,), not negative. It is called without a graph.
        gather_distributed: of ``"info_nce"``: contrast against the keys of all processes.
        generator: source of randomness of T; torch's global one if None.

    Raises:
        ValueError, TypeError: an option is unknown or out of range.

    Example:
        >>> model = torchvision.models.resnet18(num_classes=10)
        >>> x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
        >>> reg = CGCRegularizer("layer4")
        >>> loss = F.cross_entropy(model(x), y) + 0.5 * reg(model, x)
        >>> loss.backward()

    References:
        Pillai, Abbasi Koohpayegani, Ouligian, Fong and Pirsiavash, Consistent Explanations by Contrastive Learning
        (CVPR 2022), section 3.
    """

    def __init__(
        self,
        explainer: Explainer | str | None,
        *,
        transform: TransformSampler | None = None,
        loss: LossName | PairLoss = "info_nce",
        temperature: float = 0.5,
        negatives: Negatives = "keys",
        heatmap_size: tuple[int, ...] | None = None,
        view_size: tuple[int, ...] | None = None,
        detach_key: bool = False,
        bn_mode: BatchNormMode = "preserve",
        reduction: Reduction = "mean",
        weighting: WeightingName | Weighting = "uniform",
        gather_distributed: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        transform = RandomResizedCropFlip() if transform is None else transform
        check_sampler("transform", transform)
        check_option("loss", loss, get_args(LossName))
        check_positive("temperature", temperature)
        check_choice("negatives", negatives, get_args(Negatives))
        check_choice("bn_mode", bn_mode, get_args(BatchNormMode))
        check_choice("reduction", reduction, get_args(Reduction))
        check_option("weighting", weighting, get_args(WeightingName))
        check_flag("detach_key", detach_key)
        check_flag("gather_distributed", gather_distributed)
        check_generator("generator", generator)
        if gather_distributed and loss != "info_nce":
            raise ValueError(
                f"`gather_distributed` must be False unless `loss` is 'info_nce'; got True with loss={describe(loss)}, "
                "which has no negatives to gather."
            )
        self.explainer = as_explainer(explainer)
        self.transform = transform
        self.loss = loss
        self.temperature = temperature
        self.negatives = negatives
        self.heatmap_size = None if heatmap_size is None else check_size("heatmap_size", heatmap_size, dims=None)
        self.view_size = None if view_size is None else check_size("view_size", view_size, dims=None)
        self.detach_key = detach_key
        self.bn_mode = bn_mode
        self.reduction = reduction
        self.weighting = weighting
        self.gather_distributed = gather_distributed
        self.generator = generator
        self._watching = True  # for batches that compare nothing

    @classmethod
    def official(
        cls,
        explainer: Explainer | str | None,
        *,
        temperature: float = 0.5,
        loss: LossName = "info_nce",
        transform: TransformSampler | None = None,
        view_size: tuple[int, int] | None = None,
        bn_mode: BatchNormMode = "preserve",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Make a regularizer that computes what the authors' code computes.

        It differs from the paper's equation: HiResCAM instead of Grad-CAM; negatives seen from the key; heatmaps
        enlarged to 224 x 224 with a floor of 1e-8; and ``"mse_consistency"`` is a mean over pixels. The arguments are
        those of the class, but that a layer's name is short for ``LayerExplainer(name, official_heatmap)``, with the
        rule of ``cgc_reg.official``. It is for images, not for volumes and signals.

        Example:
            >>> reg = CGCRegularizer.official("layer4")
        """
        check_choice("loss", loss, get_args(LossName))
        if explainer is None or isinstance(explainer, str):
            explainer = LayerExplainer(explainer, official_heatmap)
        return cls(
            explainer,
            transform=transform,
            loss=official_mse if loss == "mse_consistency" else loss,
            temperature=temperature,
            negatives="official",
            heatmap_size=IMAGE_SIZE,
            view_size=view_size,
            bn_mode=bn_mode,
            reduction=reduction,
            gather_distributed=gather_distributed,
            generator=generator,
        )

    if TYPE_CHECKING:

        def __call__(self, model: nn.Module, x: Tensor, target: Target | None = None) -> Tensor:
            """Say to type checkers, for whom calling a module takes and returns anything, what forward does."""

    @outside_inference_mode()
    @override
    def forward(self, model: nn.Module, x: Tensor, target: Target | None = None) -> Tensor:
        """Return L_CGC for a loop that runs the model on x itself.

        Args:
            model: the model being trained, wrapped or not.
            x: images (n, c, h, w), as the model takes them, n >= 2; or volumes (n, c, d, h, w), or signals
                (n, c, length), whose heatmaps have one dimension more, or less.
            target: what the heatmaps explain: classes (n,), one for all, or weights of the scores (n, k); the
                predicted class if None.

        Returns:
            A scalar, or (n,) for ``reduction="none"``.

        Raises:
            ValueError, TypeError: an argument is not as described.
            RuntimeError: the layer was not called, or its heatmap cannot be trained on.
        """
        has_pass = isinstance(self.explainer, AtLayer) and self.explainer.reuses(model, x)
        return self._step(self._g if has_pass else self._g_beside_the_loop, model, x, target).loss

    @outside_inference_mode()
    def compute(
        self,
        model: nn.Module,
        x: Tensor,
        target: Target | None = None,
        view: Tensor | None = None,
        transform: SpatialTransform | None = None,
    ) -> CGCOutput:
        """Run the step's forward pass on x, and one on its view: two passes instead of three.

        Args:
            model, x, target: as for calling the regularizer.
            view: T(x), (n, c, H, W), made elsewhere, such as by :class:`ContrastiveTransforms`; drawn here if None.
            transform: the T that made the view; both or neither.

        Returns:
            The loss, the logits for the cross-entropy, and all that lies between.

        Raises:
            ValueError, TypeError, RuntimeError: as for calling the regularizer.

        Example:
            >>> model = torchvision.models.resnet18(num_classes=10)
            >>> x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
            >>> out = CGCRegularizer("layer4").compute(model, x)
            >>> loss = F.cross_entropy(out.logits, y) + 0.5 * out.loss
        """
        return self._step(self._g, model, x, target, view, transform)

    def reuse(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let ``reg(model, x)`` use the loop's own pass over x: two passes a step, with both lines as they are.

        What is reused, and what is computed as ever, stands at :meth:`GradCAM.reuse`.

        Args:
            model: the model being trained, wrapped or not.

        Raises:
            ValueError: the explainer's ``target_layer`` is None, so that the layer is not known before the pass.
            TypeError: the explainer is one of your own, which makes its pass itself.

        Example:
            >>> model = torchvision.models.resnet18(num_classes=10)
            >>> x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
            >>> reg = CGCRegularizer("layer4")
            >>> with reg.reuse(model):
            ...     loss = F.cross_entropy(model(x), y) + 0.5 * reg(model, x)
            >>> loss.backward()
        """
        if not isinstance(self.explainer, AtLayer):
            raise TypeError(
                "`reuse` must be used with an explainer of one layer, such as GradCAM; got "
                f"{describe(self.explainer)}, which makes its passes itself. Call `compute`."
            )
        return self.explainer.reuse(model)

    @override
    def extra_repr(self) -> str:
        """Name the main options in ``repr``."""
        names = "transform", "loss", "weighting", "temperature", "negatives", "view_size", "detach_key", "bn_mode"
        options = {name: getattr(self, name) for name in names}
        return ", ".join([repr(self.explainer), *(f"{name}={value!r}" for name, value in options.items())])

    def _step(
        self,
        g: Callable[[nn.Module, Tensor, Tensor | None], Explanation],
        model: nn.Module,
        x: Tensor,
        target: Target | None,
        view: Tensor | None = None,
        transform: SpatialTransform | None = None,
    ) -> CGCOutput:
        """Compute the equation.

        Args:
            g: makes the pass over x; that over the view is always an extra one.
            model, x, target, view, transform: as for :meth:`compute`.
        """
        view = ordinary(view)
        self._check(model, x, view, transform)
        image = g(model, x, as_target(ordinary(target), len(x), x.device))
        if transform is None:
            transform = self._draw(x)
        if view is None:
            view = transform(ordinary(x), self.view_size)
        seen = self._g_of_view(model, view, image.target)

        size = seen.heatmap.shape[1:]
        coverage = transform.coverage(size)
        query = transform(image.heatmap, size) * coverage
        key = seen.heatmap * coverage
        losses = self._losses(query, key)
        weights = self._weights(image)
        loss = reduce(weights * losses, self.reduction) if losses.ndim else weights.mean() * losses
        scalars = {"loss": losses.detach().mean(), "weight": weights.mean(), **consistency(query, key)}
        self._warn_if_blank(coverage, scalars["blank_share"])
        return CGCOutput(
            loss=loss,
            logits=image.logits,
            view_logits=seen.logits,
            view=view,
            transform=transform,
            target=image.target,
            heatmap=image.heatmap,
            query=query,
            key=key,
            scalars=scalars,
            output=image.output,
        )

    def _check(self, model: nn.Module, x: Tensor, view: Tensor | None, transform: SpatialTransform | None) -> None:
        """Refuse what cannot be compared before the model runs, and let g have its layer."""
        _check_inputs(x, view, transform)
        for name, size in (("heatmap_size", self.heatmap_size), ("view_size", self.view_size)):
            if size is not None:
                check_size(name, size, dims=x.ndim - 2)
        if self.loss == "info_nce" and not self.gather_distributed:
            check_negatives(len(x))
        if isinstance(self.explainer, AtLayer):
            self.explainer = self.explainer.with_layer(model, x)

    def _g(self, model: nn.Module, x: Tensor, target: Tensor | None) -> Explanation:
        """Explain images, on the grid on which heatmaps are compared."""
        images = ordinary(x)  # shares the version, but not with inference tensors, whose copies the model gets
        version = images._version
        seen = explained(self.explainer, model, x, target)
        if images._version != version:
            raise RuntimeError(
                "`model` must leave its images as they are, since views are made of them and each is passed once; got "
                "a forward that changes them in place. Replace its in-place operations, such as `x -= mean` by "
                "`x = x - mean`, or begin it with `x = x.clone()`."
            )
        if seen.heatmap.shape[1:].numel() < 2:
            raise ValueError(
                "`explainer` must give heatmaps of more than one pixel, since a single one has no place to compare; "
                f"got {describe(seen.heatmap)} from images of {tuple(x.shape[2:])}. Name an earlier layer, or pass "
                "larger images."
            )
        if self.heatmap_size is None:
            return seen
        return replace(seen, heatmap=enlarge(seen.heatmap, self.heatmap_size))

    def _g_beside_the_loop(self, model: nn.Module, x: Tensor, target: Tensor | None) -> Explanation:
        """Explain images that the loop passes itself: in DistributedDataParallel this may be its only pass."""
        return extra_pass(lambda running: self._g(running, x, target), model, self.bn_mode, self._target_layer)

    def _g_of_view(self, model: nn.Module, view: Tensor, target: Tensor) -> Explanation:
        """Explain views, without DistributedDataParallel, which has had its pass."""
        with torch.no_grad() if self.detach_key else nullcontext():
            look = partial(self._g, x=view, target=target)
            return extra_pass(look, inside_data_parallel(model), self.bn_mode, self._target_layer)

    @property
    def _target_layer(self) -> str | nn.Module | None:
        """The layer that the explainer looks at; None for one that looks at others."""
        return self.explainer.target_layer if isinstance(self.explainer, AtLayer) else None

    def _warn_if_blank(self, coverage: Tensor, blank_share: Tensor) -> None:
        """Warn once of a batch without anything to compare."""
        if not self._watching or coverage.is_meta:
            return
        self._watching = coverage.device.type == "cpu"  # elsewhere a look makes the device wait: one must do
        if not coverage.any():
            problem = (
                "No view shows anything of its image, so that the loss compares nothing. `transform` must hold maps "
                "from the view's coordinates to the image's, both from -1 to 1, as `affine_grid` takes them, and not "
                "in pixels: make one of those by `SpatialTransform.from_matrix`."
            )
        elif blank_share == 1:
            problem = (
                "All heatmaps of a batch are blank, so that the loss is that of chance and trains nothing. Nothing "
                "speaks for the classes explained, or a ReLU is dead behind the layer: look at the heatmaps with "
                "`explain`, train without CGC for some epochs first, or name another layer."
            )
        else:
            return
        self._watching = False
        warn(problem)

    def _draw(self, x: Tensor) -> SpatialTransform:
        size = tuple(x.shape[2:])
        transform = self.transform.sample(len(x), size, device=x.device, generator=self.generator)
        if not isinstance(transform, SpatialTransform) or transform.theta.shape[:2] != (len(x), len(size)):
            raise TypeError(
                f"`transform.sample` must return a SpatialTransform of {len(x)} maps of {len(size)} dimensions; got "
                f"{describe(getattr(transform, 'theta', transform))}."
            )
        return transform

    def _losses(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the loss of each image, or the scalar that a loss of the user's own may be."""
        if self.loss == "info_nce":
            return info_nce(
                query,
                key,
                self.temperature,
                negatives=self.negatives,
                reduction="none",
                gather_distributed=self.gather_distributed,
            )
        if self.loss == "mse_consistency":
            return mse_consistency(query, key, reduction="none")
        assert callable(self.loss)  # checked in the constructor; says so to the type checker
        with without_autocast(query):
            loss = self.loss(query, key)
        if not isinstance(loss, Tensor) or loss.shape not in ((), (len(query),)):
            raise ValueError(
                f"`loss` must return a scalar tensor, or one of shape ({len(query)},); got {describe(loss)}."
            )
        if query.requires_grad and not loss.requires_grad:
            raise RuntimeError(
                "`loss` must return a tensor in the graph of query and key; got one without, which would train "
                "nothing. Remove `detach`, `no_grad` or conversions to numbers from it; measures such as `consistency` "
                "are detached, and no loss."
            )
        return loss

    def _weights(self, image: Explanation) -> Tensor:
        logits = ordinary(image.logits).detach()
        if self.weighting == "uniform":
            return torch.ones(len(logits), device=logits.device)
        weigh = confidence if self.weighting == "confidence" else self.weighting
        assert callable(weigh)  # checked in the constructor; says so to the type checker
        with torch.no_grad(), without_autocast(logits):
            weights = weigh(logits.clone(), image.target.clone())  # which it may write on
        if not isinstance(weights, Tensor) or weights.shape != (len(logits),):
            raise ValueError(f"`weighting` must return a tensor of shape ({len(logits)},); got {describe(weights)}.")
        if weights.device.type == "cpu" and (weights < 0).any():  # reading them on a GPU would make that wait
            raise ValueError(f"`weighting` must return weights of at least 0; got {weights.min():g}.")
        return at_least_float32(weights.detach())


def _check_inputs(x: Tensor, view: Tensor | None, transform: SpatialTransform | None) -> None:
    check_images("x", x)
    if (view is None) != (transform is None):
        given, missing = ("transform", "view") if view is None else ("view", "transform")
        raise ValueError(
            f"`view` and `transform` must come together; got `{given}` without `{missing}`. Pass both, or neither."
        )
    if view is not None:
        check_images("view", view)
        if len(view) != len(x) or view.ndim != x.ndim:
            raise ValueError(
                f"`view` must hold one image, of {x.ndim - 2} dimensions, for each of the {len(x)} in `x`; got "
                f"{describe(view)}."
            )
    if transform is not None:
        if not isinstance(transform, SpatialTransform):
            raise TypeError(
                f"`transform` must be a SpatialTransform; got {describe(transform)}. Wrap the thetas of a DataLoader: "
                "`SpatialTransform(theta)`."
            )
        if len(transform) != len(x) or transform.dims != x.ndim - 2:
            raise ValueError(
                f"`transform` must hold one map of {x.ndim - 2} dimensions for each of the {len(x)} images in `x`; got "
                f"{len(transform)} of {transform.dims}."
            )
