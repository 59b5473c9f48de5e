"""The regularizer in other people's training loops: whatever they do, it trains as it should and leaves no trace."""

import copy
import gc
import io
import pickle

import explainers
import pytest
import torch
import torch.nn.functional as F
import torchvision
from explainers import EXPLAINERS
from networks import GapNet, assert_same, buffers_of, gradients, relu_net, settings_of
from strategies import generator
from torch import nn

from cgc_reg import CGCRegularizer, RandomAffine, explain

X = torch.randn(6, 3, 16, 16, generator=generator(0))
Y = torch.tensor([0, 3, 1, 4, 2, 2])


def regularizer(target_layer="features", **options):
    return explainers.regularizer(target_layer, generator=generator(0), **options)


def call_step(reg, model, x=X, y=Y, lam=0.5):
    return F.cross_entropy(model(x), y) + lam * reg(model, x)


def compute_step(reg, model, x=X, y=Y, lam=0.5):
    out = reg.compute(model, x)
    return F.cross_entropy(out.logits, y) + lam * out.loss


def plain_step(reg, model, x=X, y=Y):
    return F.cross_entropy(model(x), y)


steps = pytest.mark.parametrize("step", [call_step, compute_step])


def train(model, step, count=3, reg=None, optimizer=torch.optim.SGD, **options):
    """Take some steps and return the losses."""
    reg = regularizer() if reg is None else reg
    optimizer = optimizer(model.parameters(), lr=0.05)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = step(reg, model, **options)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- do no harm


@pytest.mark.parametrize("heatmap", EXPLAINERS)
@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_zero_trains_as_without(heatmap, bn_mode, optimizer):
    with_it = relu_net(nn.BatchNorm2d)
    without = copy.deepcopy(with_it)
    reg = regularizer(heatmap=heatmap, bn_mode=bn_mode)
    train(with_it, call_step, reg=reg, lam=0, optimizer=optimizer)
    train(without, plain_step, optimizer=optimizer)
    assert_same(state_of(with_it), state_of(without))


def test_weight_zero_trains_a_resnet_as_without():
    with_it = torchvision.models.resnet18(num_classes=5)
    without = copy.deepcopy(with_it)
    x = torch.randn(6, 3, 64, 64, generator=generator(0))
    train(with_it, call_step, reg=regularizer("layer4"), lam=0, x=x)
    train(without, plain_step, x=x)
    assert_same(state_of(with_it), state_of(without))


@steps
def test_random_state_is_as_before_given_a_generator(step):
    model = relu_net()
    before = torch.get_rng_state()
    step(regularizer(), model)
    assert torch.equal(torch.get_rng_state(), before)


def test_nested_calls_leave_the_model_as_found():
    model = relu_net(nn.BatchNorm2d)
    before, buffers = settings_of(model), buffers_of(model)
    inner = regularizer(heatmap="hires_cam")

    def heatmap(activation, gradient):
        inner(model, X)
        explain(model, X, "features")
        return (activation * gradient).sum(dim=1)

    nested = regularizer(heatmap=heatmap)(model, X)
    assert_same(nested, regularizer(heatmap=lambda a, g: (a * g).sum(dim=1))(model, X))
    assert settings_of(model) == before
    assert_same(buffers_of(model), buffers)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@steps
def test_memory_does_not_grow(step):
    model, reg = relu_net(nn.BatchNorm2d), regularizer()
    train(model, step, 5, reg)
    before = live_tensors()
    train(model, step, 200, reg)
    assert live_tensors() <= before


@pytest.mark.parametrize("transform", [None, RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5)])
def test_deterministic_algorithms_work_and_repeat(transform):
    torch.use_deterministic_algorithms(True)
    try:
        ends = []
        for _ in range(2):
            torch.manual_seed(0)
            model = relu_net(nn.BatchNorm2d)
            train(model, compute_step, reg=regularizer(transform=transform))
            ends.append(state_of(model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(*ends)


# ---- precision


@pytest.mark.parametrize(("step", "dtype"), [(call_step, torch.bfloat16), (compute_step, torch.float16)])
def test_autocast_with_a_scaler_trains_200_steps(step, dtype):
    model, reg = relu_net(nn.BatchNorm2d), regularizer()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses, skipped = [], 0
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = step(reg, model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        losses.append(float(loss.detach()))
    assert torch.tensor(losses).isfinite().all()
    assert skipped < 5  # a scaler begins too high, by design
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_is_that_of_float32(dtype):
    model = torchvision.models.resnet18(num_classes=5)
    x = torch.randn(6, 3, 64, 64, generator=generator(0))
    exact = regularizer("layer4")(model, x, Y)
    with torch.autocast("cpu", dtype):
        loss = regularizer("layer4")(model, x, Y)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_heatmaps_survive_gradients_that_float16_cannot_hold():
    model = relu_net()
    # Per pixel the score's gradient is the weight over 16 pixels: 1e-8, below float16's smallest number.
    nn.init.uniform_(model.head.weight, 0, 3.2e-7)
    exact = regularizer().compute(model, X, Y)
    with torch.autocast("cpu", torch.float16):
        out = regularizer().compute(model, X, Y)
    assert exact.scalars["blank_share"] == out.scalars["blank_share"] == 0
    similarity = F.cosine_similarity(out.key.flatten(1), exact.key.flatten(1))
    assert similarity.min() > 0.98


class ScaledCosines(nn.Module):
    """A head whose logits are the cosines of features and class weights, times a number, as ArcFace's and CLIP's."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.weight = scale, nn.Parameter(torch.randn(5, 8))

    def forward(self, features):
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


@pytest.mark.parametrize("scale", [64, 100])
def test_heads_with_large_gradients_survive_float16(scale):
    model = GapNet(*relu_net().features, head=ScaledCosines(scale))
    exact = regularizer()(model, X, Y)
    with torch.autocast("cpu", torch.float16):
        loss = regularizer()(model, X, Y)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


# ---- situations: each trains, with a gradient for everything that has one in a plain loop


def channels_last(model):
    return model.to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)


def inputs_with_gradients(model):
    return model, X.clone().requires_grad_()


def synchronised_norms(model):
    # Without a process group it normalises as BatchNorm does.
    return nn.SyncBatchNorm.convert_sync_batchnorm(model), X


def copied(model):
    return copy.deepcopy(model), X


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average, X


def pickled(model):
    return pickle.loads(pickle.dumps(model)), X


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False), X


@steps
@pytest.mark.parametrize(
    "situation", [channels_last, inputs_with_gradients, synchronised_norms, copied, averaged, pickled, saved]
)
def test_loss_and_gradients_are_those_of_a_plain_loop(step, situation):
    plain = relu_net(nn.BatchNorm2d)
    train(plain, step, 1)  # a model that the regularizer has seen
    model, x = situation(copy.deepcopy(plain))
    loss, expected = step(regularizer(), model, x), step(regularizer(), plain)
    torch.testing.assert_close(loss, expected)
    found = {name.removeprefix("module."): gradient for name, gradient in gradients(loss, model).items()}
    torch.testing.assert_close(found, gradients(expected, plain))


@steps
def test_inputs_that_require_gradients_get_them(step):
    x = X.clone().requires_grad_()
    step(regularizer(), relu_net(), x).backward()
    assert x.grad.isfinite().all()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()


@steps
@pytest.mark.parametrize("size", [(16, 24), (17, 23), (40, 9)])
@pytest.mark.parametrize("channels", [1, 3, 9])
def test_images_of_any_size_and_number_of_channels_train(step, size, channels):
    model = relu_net(nn.BatchNorm2d)
    model.features[0] = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
    x = torch.randn(6, channels, *size, generator=generator(0))
    assert regularizer().compute(model, x).key.shape[1:] == model.features(x).shape[2:]
    losses = train(model, step, 30, x=x)
    assert losses[-1] < losses[0]


@steps
@pytest.mark.parametrize(
    "norm", [lambda channels: nn.GroupNorm(2, channels), nn.InstanceNorm2d, lambda channels: nn.Dropout(0.2)]
)
def test_other_norms_and_dropout_train(step, norm):
    model = relu_net(norm)
    losses = train(model, step, 30)
    assert losses[-1] < losses[0]
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters())


@steps
def test_accumulated_gradients_are_the_sum_of_each_steps(step):
    model, reg = relu_net(), regularizer()
    for part in (slice(0, 3), slice(3, 6)):
        step(reg, model, X[part], Y[part]).backward()
    reg = regularizer()
    each = [gradients(step(reg, model, X[part], Y[part]), model) for part in (slice(0, 3), slice(3, 6))]
    accumulated = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(accumulated, {name: each[0][name] + each[1][name] for name in each[0]})


@steps
def test_everything_frozen_but_the_head_trains_the_head(step):
    model = relu_net(nn.BatchNorm2d)
    model.features.requires_grad_(False).eval()
    before = state_of(model)
    losses = train(model, step, 30)
    assert losses[-1] < losses[0]
    after = state_of(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_a_compiled_regularizer_can_be_pickled():
    reg = CGCRegularizer("features")
    reg.compile(backend="eager")
    assert pickle.loads(pickle.dumps(reg)).explainer.target_layer == "features"


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda reg: pickle.loads(pickle.dumps(reg))])
def test_a_copied_regularizer_goes_on_as_the_first(copies):
    model = relu_net()
    reg = CGCRegularizer(None, temperature=0.2)
    torch.manual_seed(1)
    reg(model, X)
    twin = copies(reg)
    losses = []
    for each in (reg, twin):
        torch.manual_seed(2)
        losses.append(each(model, X))
    assert_same(*losses)
    assert twin.explainer.target_layer == "features"


def test_a_regularizer_survives_torch_save():
    reg, model = regularizer("features", heatmap="hires_cam"), relu_net()
    reg.generator = None
    file = io.BytesIO()
    torch.save({"reg": reg, "model": model.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["reg"]
    torch.manual_seed(2)
    expected = reg(model, X)
    torch.manual_seed(2)
    assert_same(loaded(model, X), expected)
