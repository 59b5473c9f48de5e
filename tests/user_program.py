"""What a user writes, for the type checkers: mypy (strict) and pyright both find nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cgc_reg import (
    CAM,
    CGCOutput,
    CGCRegularizer,
    Compose,
    Consistency,
    Explainer,
    Explanation,
    GradCAM,
    LayerExplainer,
    RandomAffine,
    RandomFlip,
    SpatialTransform,
    content_heatmap,
    energy_loss,
    explain,
)
from cgc_reg.visualization import gallery, overlay, pair_columns


def scores(output: dict[str, Tensor]) -> Tensor:
    return output["out"].mean(dim=(2, 3))


def my_rule(activation: Tensor, gradient: Tensor) -> Tensor:
    return (activation * gradient).sum(dim=1).relu()


def term(reg: CGCRegularizer, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return reg(model, x, target=y)  # an error of mypy's, if this were anything at all


def saliency(model: nn.Module, x: Tensor, target: Tensor | None) -> Explanation:
    x = x.detach().requires_grad_()
    logits: Tensor = model(x)
    target = logits.argmax(dim=1) if target is None else target
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), x, create_graph=True)
    return Explanation(gradient.abs().amax(dim=1), logits, target)


def heatmap_step(model: nn.Module, x: Tensor, y: Tensor, masks: Tensor) -> Tensor:
    g = GradCAM(model.get_submodule("layer4"))
    seen = g(model, x, target=y)
    with g.reuse(model):
        model(x)
        both: Tensor = seen.heatmap + g(model, x, [0, 1]).heatmap + CAM("layer4", head="fc")(model, x, 3).heatmap
    explainers: list[Explainer] = [g, saliency, LayerExplainer(None, my_rule)]
    consistent = [CGCRegularizer(explainer)(model, x) for explainer in explainers]
    boxes = [torch.ones(k, 4) for k in range(len(x))]
    guided = energy_loss(seen.heatmap, masks) + energy_loss(both, boxes=boxes, image_size=(64, 64))
    return cross_entropy(seen.logits, y) + guided + torch.stack(consistent).sum()


def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    transform = Compose([RandomAffine(degrees=10), RandomFlip(vertical=0.0)])
    reg = CGCRegularizer(LayerExplainer("layer4", my_rule, output_fn=scores), transform=transform)
    out: CGCOutput = reg.compute(model, x, target=y)
    loss: Tensor = cross_entropy(out.logits, y) + 0.5 * out.loss
    log: dict[str, float] = {name: float(value) for name, value in out.scalars.items()}
    print(log)
    view = SpatialTransform.identity(len(x))
    view = SpatialTransform.from_matrix(view.matrix((64, 64)), (64, 64))
    loss = loss + reg(model, x) + reg.compute(model, x, view=view(x), transform=view).loss
    with reg.reuse(model):
        loss = loss + cross_entropy(scores(model(x)), y)
        loss = loss + term(reg, model, x, y)
    total = Consistency()
    total.update(out.query, out.key)
    values: dict[str, float] = total.compute()
    print(values, content_heatmap(out.heatmap, torch.ones(len(x), 64, 64, dtype=torch.bool)))
    gallery(pair_columns(x, out)).savefig("pairs.png")
    picture: Tensor = overlay(x, explain(model, x, GradCAM("layer4", output_fn=scores)))
    print(picture.shape)
    return loss
