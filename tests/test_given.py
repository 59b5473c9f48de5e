"""What comes in: images and labels of subclasses of Tensor are as good as plain ones."""

import pytest
import torch
import torch.nn.functional as F
from networks import GapNet, assert_same, gradients, relu_net
from strategies import generator
from torch import nn
from torchvision import tv_tensors

from cgc_reg import CAM, CGCRegularizer, Explanation, GradCAM, check_closed_form, explain, suggest_target_layer

X = torch.randn(4, 3, 16, 16, generator=generator(0))
Y = torch.tensor([0, 3, 1, 4])


class Chained(torch.Tensor):
    """Stays what it is through operations, and returns itself where a tensor's method does something, as fastai's."""

    def requires_grad_(self, requires_grad=True):
        self.requires_grad = requires_grad
        return self


class Metadata(torch.Tensor):
    """Hands its metadata on from argument to result, as MONAI's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            result.meta = next((arg.meta for arg in args if hasattr(arg, "meta")), "none")
        return result


def image(x):
    return tv_tensors.Image(x)


KINDS = {"chained": lambda x: x.as_subclass(Chained), "metadata": lambda x: x.as_subclass(Metadata), "image": image}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def regularizer(explainer="features"):
    return CGCRegularizer(explainer, generator=generator(0))


def call(model, x, y):
    return F.cross_entropy(model(x), y) + regularizer()(model, x, y)


def compute(model, x, y):
    out = regularizer().compute(model, x, y)
    return F.cross_entropy(out.logits, y) + out.loss


def reuse(model, x, y):
    reg = regularizer()
    with reg.reuse(model):
        loss = F.cross_entropy(model(x), y) + reg(model, x, y)
    return loss


def closed_form(model, x, y):
    out = regularizer(CAM("features")).compute(model, x, y)
    return F.cross_entropy(out.logits, y) + out.loss


def saliency(model, x, target):
    x = x.detach().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), x, create_graph=True)
    return Explanation(gradient.abs().sum(dim=1), logits, target)


def foreign(model, x, y):
    out = regularizer(saliency).compute(model, x, y)
    return F.cross_entropy(out.logits, y) + out.loss


def heatmap(model, x, y):
    seen = GradCAM("features")(model, x, y)
    return F.cross_entropy(seen.logits, y) + seen.heatmap.square().mean()


@pytest.mark.parametrize("step", [call, compute, reuse, closed_form, foreign, heatmap])
def test_a_step_is_that_of_plain_tensors(kind, step):
    model = relu_net(nn.BatchNorm2d)
    expected = step(model, X, Y)
    labels = Y.as_subclass(Chained) if kind is not KINDS["metadata"] else Y
    loss = step(model, kind(X.clone()), labels)
    assert_same(torch.Tensor(loss.detach().as_subclass(torch.Tensor)), expected)
    assert_same(gradients(loss.as_subclass(torch.Tensor), model), gradients(expected, model))


def test_a_reused_pass_over_a_subclass_is_one_pass(kind):
    model, passes = relu_net(), []
    model.head.register_forward_hook(lambda *_: passes.append(1))
    g, x = GradCAM("features"), kind(X.clone())
    with g.reuse(model):
        model(x)
        seen = g(model, x)
    assert len(passes) == 1
    assert type(seen.heatmap) is torch.Tensor


def test_looking_takes_them_too(kind):
    model, x = relu_net(), kind(X.clone())
    heatmaps = explain(model, x, "features", Y.as_subclass(Chained))
    assert type(heatmaps) is torch.Tensor
    assert_same(heatmaps, explain(model, X, "features", Y))
    assert suggest_target_layer(model, x) == suggest_target_layer(model, X)
    assert check_closed_form(model, x, "features") < 1e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_may_make_them_itself(frozen):
    class Wrapping(GapNet):
        def forward(self, x):
            return super().forward(x.as_subclass(Chained)).as_subclass(torch.Tensor)

    net = relu_net()
    model = Wrapping(*net.features, head=net.head)
    model.features.requires_grad_(not frozen)
    assert_same(call(model, X, Y), call(net, X, Y))
