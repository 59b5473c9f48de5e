"""The regularizer: its options, and the order of the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from cgc_reg._checks import (
    check_choice,
    check_flag,
    check_function,
    check_generator,
    check_images,
    check_option,
    check_positive,
    check_sampler,
    check_size,
    check_target,
    describe,
)
from cgc_reg._precision import without_autocast
from cgc_reg.capture import ForwardPass, exposed_pass, forward_pass
from cgc_reg.distributed import is_sharded, reach_all_parameters, warn_if_bypassed
from cgc_reg.explain import HEATMAPS, heatmaps_of
from cgc_reg.graph import check_trainable, warn_if_images_mix
from cgc_reg.heatmaps import HeatmapRule
from cgc_reg.losses import Negatives, Reduction, check_negatives, info_nce, mse_consistency, reduce
from cgc_reg.metrics import consistency
from cgc_reg.modes import BatchNormMode, norms_in_training, ordinary, outside_inference_mode, without_broadcast
from cgc_reg.official import IMAGE_SIZE, official_heatmap, official_mse
from cgc_reg.reuse import KeptPasses, keep_passes
from cgc_reg.suggest import suggest_target_layer
from cgc_reg.transforms import RandomResizedCropFlip, SpatialTransform, TransformSampler
from cgc_reg.wrappers import ExposedLayer, compiled_exposed_layer, unwrap, without_compilation

PairLoss = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["info_nce", "mse_consistency"]

# How many BatchNorms a model had in training when one behind a layer was last looked for.
_NORMS_LOOKED_AT: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class CGCOutput:
    """What one call of :meth:`CGCRegularizer.compute` made.

    Attributes:
        loss: L_CGC, a scalar, or (n,) for ``reduction="none"``.
        logits: of the images x, (n, k), for the cross-entropy.
        view_logits: of the views T(x), (n, k).
        view: T(x), (n, c, H, W).
        transform: T.
        target: class whose heatmaps were compared, (n,).
        heatmap: g(x), (n, h, w), for looking at and for measures such as :func:`content_heatmap`.
        query: T(g(x)), (n, h, w), zero where T(x) shows nothing of x.
        key: g(T(x)), (n, h, w), zero there too.
        scalars: detached values to log: ``loss`` and what :func:`cgc_reg.consistency` returns.
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
        target_layer: dotted name of the layer g looks at, as in ``model.named_modules()``: the last one with a map,
            ``"layer4"`` in a ResNet. None: that of :func:`suggest_target_layer`, found at the first call.
        transform: draws T: :class:`RandomResizedCropFlip`, :class:`RandomAffine`, or anything with their ``sample``.
        heatmap: the rule of g: ``"grad_cam"``, ``"hires_cam"``, ``"layer_cam"``, ``"positive_grad_cam"``,
            ``"class_activation"`` (see :func:`check_closed_form`), or a function from activation and gradient,
            (n, c, h, w), to heatmaps (n, h, w).
        head: dotted name of the linear layer that ``"class_activation"`` reads; None: the only one that fits.
        loss: ``"info_nce"`` as above; ``"mse_consistency"``, without negatives; or a function from query and key,
            (n, h, w), masked and not normalised, to a loss: a scalar, or (n,) to be reduced.
        temperature: tau, of ``"info_nce"``.
        negatives: of ``"info_nce"``: ``"keys"`` as above, or ``"official"`` as in the authors' code.
        heatmap_size: (h, w) that both heatmaps are enlarged to first; None: the grid of the view's heatmap.
        view_size: (H, W) of the views; None: as large as x. Smaller views cost less.
        detach_key: make the keys constants: the view's pass builds no graph and costs less, and the loss trains through
            the queries alone. The ``view_logits`` train nothing then.
        bn_mode: what extra passes do to BatchNorm in training: ``"preserve"`` normalises with the batch's statistics
            without touching the running ones; ``"update"`` updates them; ``"eval"`` normalises with the running ones.
            Extra are the view's pass and, in ``reg(model, x)``, the pass over x too.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the images.
        gather_distributed: of ``"info_nce"``: contrast against the keys of all processes.
        generator: source of randomness of T; torch's global one if None.
        output_fn: from the model's output to logits (n, k); by default the output itself, its ``logits``, or the only
            tensor of that shape in a tuple.
        reshape_transform: from the layer's output to (n, c, h, w), for tokens or channels last.

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
        target_layer: str | None,
        *,
        transform: TransformSampler | None = None,
        heatmap: str | HeatmapRule = "grad_cam",
        head: str | None = None,
        loss: LossName | PairLoss = "info_nce",
        temperature: float = 0.5,
        negatives: Negatives = "keys",
        heatmap_size: tuple[int, int] | None = None,
        view_size: tuple[int, int] | None = None,
        detach_key: bool = False,
        bn_mode: BatchNormMode = "preserve",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        generator: torch.Generator | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if target_layer is not None and (not isinstance(target_layer, str) or not target_layer):
            raise ValueError(
                f"`target_layer` must be the dotted name of a layer, or None; got {describe(target_layer)}. Names: "
                "`dict(model.named_modules())`."
            )
        transform = RandomResizedCropFlip() if transform is None else transform
        check_sampler("transform", transform)
        check_option("heatmap", heatmap, HEATMAPS)
        check_option("loss", loss, get_args(LossName))
        check_positive("temperature", temperature)
        check_choice("negatives", negatives, get_args(Negatives))
        check_choice("bn_mode", bn_mode, get_args(BatchNormMode))
        check_choice("reduction", reduction, get_args(Reduction))
        check_flag("detach_key", detach_key)
        check_flag("gather_distributed", gather_distributed)
        check_generator("generator", generator)
        check_function("output_fn", output_fn)
        check_function("reshape_transform", reshape_transform)
        if gather_distributed and loss != "info_nce":
            raise ValueError(
                f"`gather_distributed` must be False unless `loss` is 'info_nce'; got True with loss={describe(loss)}, "
                "which has no negatives to gather."
            )
        if head is not None and heatmap != "class_activation":
            raise ValueError(
                f"`head` must be None unless `heatmap` is 'class_activation', which alone reads it; got {head!r} with "
                f"heatmap={describe(heatmap)}."
            )
        self.target_layer = target_layer
        self.transform = transform
        self.heatmap = heatmap
        self.head = head
        self.loss = loss
        self.temperature = temperature
        self.negatives = negatives
        self.heatmap_size = None if heatmap_size is None else check_size("heatmap_size", heatmap_size)
        self.view_size = None if view_size is None else check_size("view_size", view_size)
        self.detach_key = detach_key
        self.bn_mode = bn_mode
        self.reduction = reduction
        self.gather_distributed = gather_distributed
        self.generator = generator
        self.output_fn = output_fn
        self.reshape_transform = reshape_transform
        self._kept: list[KeptPasses] = []  # while `reuse` lasts

    @classmethod
    def official(
        cls,
        target_layer: str | None,
        *,
        temperature: float = 0.5,
        loss: LossName = "info_nce",
        transform: TransformSampler | None = None,
        view_size: tuple[int, int] | None = None,
        bn_mode: BatchNormMode = "preserve",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        generator: torch.Generator | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> CGCRegularizer:
        """Make a regularizer that computes what the authors' code computes.

        It differs from the paper's equation: HiResCAM instead of Grad-CAM; negatives seen from the key; heatmaps
        enlarged to 224 x 224 with a floor of 1e-8; and ``"mse_consistency"`` is a mean over pixels. The arguments are
        those of the class.

        Example:
            >>> reg = CGCRegularizer.official("layer4")
        """
        check_choice("loss", loss, get_args(LossName))
        return cls(
            target_layer,
            transform=transform,
            heatmap=official_heatmap,
            loss=official_mse if loss == "mse_consistency" else loss,
            temperature=temperature,
            negatives="official",
            heatmap_size=IMAGE_SIZE,
            view_size=view_size,
            bn_mode=bn_mode,
            reduction=reduction,
            gather_distributed=gather_distributed,
            generator=generator,
            output_fn=output_fn,
            reshape_transform=reshape_transform,
        )

    if TYPE_CHECKING:

        def __call__(self, model: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
            """Say to type checkers, for whom calling a module takes and returns anything, what forward does."""

    def forward(self, model: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Return L_CGC for a loop that runs the model on x itself.

        Args:
            model: the model being trained, wrapped or not.
            x: images (n, c, h, w), as the model takes them, n >= 2.
            target: class whose heatmaps to compare, (n,); the predicted one if None.

        Returns:
            A scalar, or (n,) for ``reduction="none"``.

        Raises:
            ValueError, TypeError: an argument is not as described.
            RuntimeError: the layer was not called, or its heatmap cannot be trained on.
        """
        image_pass = self._kept_pass(model, x)
        if self._exposed(model) is None:
            model = without_compilation(model, stacklevel=4)
        # The pass over x goes through DistributedDataParallel, which arms its synchronisation of gradients.
        with outside_inference_mode(), without_broadcast(model):
            out = self._step(model, x, target, None, None, bn_mode=self.bn_mode, stacklevel=4, image_pass=image_pass)
        return out.loss

    def compute(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | None = None,
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
        with outside_inference_mode():
            if self._exposed(model) is None:
                model = without_compilation(model, stacklevel=2)
            warn_if_bypassed(model, stacklevel=2)
            return self._step(model, x, target, view, transform, bn_mode="update", stacklevel=2)

    @contextmanager
    def reuse(self, model: nn.Module) -> Iterator[None]:
        """Let ``reg(model, x)`` use the loop's own pass over x: two passes a step, with both lines as they are.

        What is reused is a pass of this model over this very tensor alone, ``model(x)`` or ``model(pixel_values=x)``,
        made inside the ``with`` block with gradients on. Everything else is computed as ever: other tensors, copies of
        x; a pass since which x, its output, the weights or what is frozen of them, the training mode or autocast have
        changed, or an optimizer has made a step (``weight.data.copy_`` is a change that PyTorch shows to nobody, and
        buffers are not looked at); compiled models. The passes
        are kept until the block ends, so open one for each step. Both lines share a graph: sum the losses before the
        backward.

        Args:
            model: the model being trained, wrapped or not.

        Raises:
            ValueError: ``target_layer`` is None, so that the layer is not known before the pass.

        Example:
            >>> model = torchvision.models.resnet18(num_classes=10)
            >>> x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
            >>> reg = CGCRegularizer("layer4")
            >>> with reg.reuse(model):
            ...     loss = F.cross_entropy(model(x), y) + 0.5 * reg(model, x)
            >>> loss.backward()
        """
        if self.target_layer is None:
            raise ValueError(
                "`target_layer` must be named to reuse passes, since the layer is watched from the first one on; got "
                "None. Pass `suggest_target_layer(model, x)`."
            )
        with keep_passes(model, self.target_layer) as kept:
            self._kept.append(kept)
            try:
                yield
            finally:
                self._kept.remove(kept)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the passes that `reuse` keeps, for a copy made meanwhile."""
        return {**super().__getstate__(), "_kept": []}  # type: ignore[no-untyped-call]  # of torch

    def extra_repr(self) -> str:
        """Name the main options in ``repr``."""
        options = {
            name: getattr(self, name)
            for name in ("transform", "heatmap", "loss", "temperature", "negatives", "bn_mode")
        }
        return ", ".join([repr(self.target_layer), *(f"{name}={value!r}" for name, value in options.items())])

    def _step(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | None,
        view: Tensor | None,
        transform: SpatialTransform | None,
        *,
        bn_mode: BatchNormMode,
        stacklevel: int,
        image_pass: ForwardPass | None = None,
    ) -> CGCOutput:
        x, target, view = (ordinary(tensor) for tensor in (x, target, view))
        _check_inputs(x, target, view, transform)
        if self.loss == "info_nce" and not self.gather_distributed:
            check_negatives(len(x))  # before the model runs and updates its statistics
        sharded = is_sharded(model)
        if sharded and torch.is_grad_enabled():
            self._check_closed_form()
        layer = self._layer(model, x)

        if image_pass is None:
            image_pass = self._pass(model, x, layer, bn_mode)
        target = _classes(image_pass.logits, target)
        heatmap = self._heatmaps(model, x, image_pass, target)
        looked_at, norms = _NORMS_LOOKED_AT.setdefault(model, {}), norms_in_training(model)
        if torch.is_grad_enabled() and looked_at.get(layer) != norms:
            warn_if_images_mix(image_pass.inner_logits, image_pass.layer_output, stacklevel=stacklevel + 1)
            looked_at[layer] = norms

        if transform is None:
            transform = self._draw(x)
        if view is None:
            view = transform(x, self.view_size)
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        with torch.no_grad() if self.detach_key else nullcontext():
            view_pass = self._pass(inner, view, layer, self.bn_mode)
            key = self._heatmaps(model, view, view_pass, target)

        query = transform(heatmap, (key.shape[1], key.shape[2]))
        coverage = transform.coverage((key.shape[1], key.shape[2]))
        query, key = query * coverage, key * coverage
        loss = self._loss(query, key)

        logits, view_logits, output = image_pass.logits, view_pass.logits, image_pass.output
        trains = torch.is_grad_enabled() and check_trainable(query, image_pass.layer_output, unwrap(model))
        if trains and not self.detach_key:
            check_trainable(key, view_pass.layer_output, unwrap(model))
        if trains and not loss.requires_grad:
            raise RuntimeError(
                "`loss` must return a tensor in the graph of query and key; got one without, which would train "
                "nothing. Remove `detach`, `no_grad` or conversions to numbers from it; measures such as `consistency` "
                "are detached, and no loss."
            )
        if trains and (sharded or isinstance(model, DistributedDataParallel)) and logits.requires_grad:
            loss = reach_all_parameters(loss, logits)
        if not trains:
            # Under `no_grad`, and in a model without anything to train, a pass still builds a graph from the layer
            # upward, for the inner gradient. A loss in it would have a backward that does nothing, in silence.
            loss, logits, heatmap, query = (tensor.detach() for tensor in (loss, logits, heatmap, query))
            output = tree_map_only(Tensor, Tensor.detach, output)
        if not trains or self.detach_key:
            view_logits, key = view_logits.detach(), key.detach()
        scalars = {"loss": loss.detach().mean(), **consistency(query, key)}
        return CGCOutput(loss, logits, view_logits, view, transform, target, heatmap, query, key, scalars, output)

    def _check_closed_form(self) -> None:
        if self.heatmap != "class_activation":
            raise ValueError(
                "`heatmap` must be 'class_activation' to train a model that is sharded by `fully_shard`: the inner "
                f"gradient of other rules makes it free its weights too early; got {describe(self.heatmap)}. Set "
                "that, or use DistributedDataParallel."
            )

    def _exposed(self, model: nn.Module) -> ExposedLayer | None:
        """Return the exposed layer of a model that stays compiled; None for one that does not."""
        return compiled_exposed_layer(model) if self.heatmap == "class_activation" else None

    def _kept_pass(self, model: nn.Module, x: Tensor) -> ForwardPass | None:
        """Return the loop's own pass over x, if it is being kept."""
        if not torch.is_grad_enabled():
            return None
        found = (kept.find(model, x, self.output_fn) for kept in self._kept)
        return next((image_pass for image_pass in found if image_pass is not None), None)

    def _pass(self, model: nn.Module, images: Tensor, layer: str, bn_mode: BatchNormMode) -> ForwardPass:
        exposed, version = self._exposed(model), images._version
        if exposed is not None:
            image_pass = exposed_pass(model, images, exposed, output_fn=self.output_fn, bn_mode=bn_mode)
        else:
            model = model if isinstance(model, DistributedDataParallel) else unwrap(model)
            image_pass = forward_pass(model, images, layer, output_fn=self.output_fn, bn_mode=bn_mode)
        if images._version != version:
            raise RuntimeError(
                "`model` must leave its images as they are, since views are made of them and each is passed once; got "
                "a forward that changes them in place. Replace its in-place operations, such as `x -= mean` by "
                "`x = x - mean`, or begin it with `x = x.clone()`."
            )
        return image_pass

    def _layer(self, model: nn.Module, x: Tensor) -> str:
        exposed = self._exposed(model)
        if self.target_layer is None:
            self.target_layer = suggest_target_layer(model, x) if exposed is None else exposed.target_layer
        if exposed is not None and self.target_layer != exposed.target_layer:
            raise ValueError(
                f"`target_layer` must be the layer that the compiled model exposes, {exposed.target_layer!r}; got "
                f"{self.target_layer!r}. Compile `expose_layer(model, {self.target_layer!r})`."
            )
        return self.target_layer

    def _draw(self, x: Tensor) -> SpatialTransform:
        size = (x.shape[2], x.shape[3])
        transform = self.transform.sample(len(x), size, device=x.device, generator=self.generator)
        if not isinstance(transform, SpatialTransform) or len(transform) != len(x):
            raise TypeError(
                f"`transform.sample` must return a SpatialTransform of {len(x)} maps; got {describe(transform)}."
            )
        return transform

    def _heatmaps(self, model: nn.Module, images: Tensor, forward: ForwardPass, target: Tensor) -> Tensor:
        heatmaps = heatmaps_of(
            forward,
            target,
            model=model,
            heatmap=self.heatmap,
            head=self.head,
            reshape_transform=self.reshape_transform,
            create_graph=torch.is_grad_enabled(),
        )
        if heatmaps.shape[1] * heatmaps.shape[2] < 2:
            raise ValueError(
                "`target_layer` must give heatmaps of more than one pixel, since a single one has no place to "
                f"compare; got {describe(heatmaps)} from images of {tuple(images.shape[-2:])}. Name an earlier layer, "
                "or pass larger images."
            )
        if self.heatmap_size is None:
            return heatmaps
        return F.interpolate(heatmaps[:, None], self.heatmap_size, mode="bilinear", align_corners=False)[:, 0]

    def _loss(self, query: Tensor, key: Tensor) -> Tensor:
        if self.loss == "info_nce":
            return info_nce(
                query,
                key,
                self.temperature,
                negatives=self.negatives,
                reduction=self.reduction,
                gather_distributed=self.gather_distributed,
            )
        if self.loss == "mse_consistency":
            return mse_consistency(query, key, reduction=self.reduction)
        assert callable(self.loss)  # checked in the constructor; says so to the type checker
        with without_autocast(query):
            loss = self.loss(query, key)
        if not isinstance(loss, Tensor) or loss.shape not in ((), (len(query),)):
            raise ValueError(
                f"`loss` must return a scalar tensor, or one of shape ({len(query)},); got {describe(loss)}."
            )
        return loss if loss.ndim == 0 else reduce(loss, self.reduction)


def _classes(logits: Tensor, target: Tensor | None) -> Tensor:
    """Return the class whose heatmap counts for each image, (n,): the one given, or the one predicted."""
    if target is None:
        return logits.detach().argmax(dim=1)
    check_target("target", target, len(logits), logits.shape[1])
    return target.long()


def _check_inputs(x: Tensor, target: Tensor | None, view: Tensor | None, transform: SpatialTransform | None) -> None:
    check_images("x", x)
    if target is not None:
        check_target("target", target, len(x))
    if (view is None) != (transform is None):
        given, missing = ("transform", "view") if view is None else ("view", "transform")
        raise ValueError(
            f"`view` and `transform` must come together; got `{given}` without `{missing}`. Pass both, or neither."
        )
    if view is not None:
        check_images("view", view)
        if len(view) != len(x):
            raise ValueError(f"`view` must hold one image for each of the {len(x)} in `x`; got {describe(view)}.")
    if transform is not None:
        if not isinstance(transform, SpatialTransform):
            raise TypeError(
                f"`transform` must be a SpatialTransform; got {describe(transform)}. Wrap the thetas of a DataLoader: "
                "`SpatialTransform(theta)`."
            )
        if len(transform) != len(x):
            raise ValueError(
                f"`transform` must hold one map for each of the {len(x)} images in `x`; got {len(transform)}."
            )
