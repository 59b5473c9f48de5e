"""Gradient checkpointing saves memory and changes nothing else; where it cannot, an error says how to repair it."""

import copy

import pytest
import timm
import torch
from networks import assert_same, buffers_of
from strategies import generator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from cgc_reg import CGCRegularizer, GradCAM, TokensToMaps, explain, suggest_target_layer

X = torch.randn(6, 3, 16, 16, generator=generator(0), dtype=torch.float64)


class StagedNet(nn.Module):
    """Three stages and a head; the stages in `saved` run in one checkpoint."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
        self.head = nn.Linear(8, 5)
        self.saved, self.reentrant = (), False

    def forward(self, x):
        def run(names, x):
            for name in names:
                x = getattr(self, name)(x)
            return x

        order = ["stem", "body", "neck"]
        first = order.index(self.saved[0]) if self.saved else 3
        x = run(order[:first], x)
        if self.saved:
            x = checkpoint(run, self.saved, x, use_reentrant=self.reentrant)
        return self.head(run(order[first + len(self.saved) :], x).mean(dim=(2, 3)))


def call(reg, model, x):
    return reg(model, x)


def compute(reg, model, x):
    return reg.compute(model, x).loss


def after_backward(run, bn_mode, saved=(), reentrant=False, momentum=0.1):
    """Return the gradients and the buffers that one step leaves."""
    torch.manual_seed(0)
    model = StagedNet().double()
    model.stem[1].momentum = model.body[1].momentum = momentum
    model.saved, model.reentrant = saved, reentrant
    reg = CGCRegularizer("body", bn_mode=bn_mode, generator=generator(0))
    run(reg, model, X.clone().requires_grad_()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, buffers_of(model)


@pytest.mark.parametrize("run", [call, compute])
@pytest.mark.parametrize("bn_mode", ["preserve", "eval", "update"])
@pytest.mark.parametrize(
    ("saved", "reentrant"),
    [(("stem",), False), (("body",), False), (("neck",), False), (("stem", "body", "neck"), False), (("stem",), True)],
)
def test_gradients_are_those_without_checkpointing(run, bn_mode, saved, reentrant):
    # PyTorch's checkpoint runs a training BatchNorm twice on x, so the running statistics are held where they are.
    plain, _ = after_backward(run, bn_mode, momentum=0)
    saving, _ = after_backward(run, bn_mode, saved, reentrant, momentum=0)
    assert_same(saving, plain)


@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_backward_of_an_extra_pass_leaves_running_statistics_alone(bn_mode, reentrant):
    assert_same(after_backward(call, bn_mode, ("stem",), reentrant)[1], buffers_of(StagedNet().double()))


@pytest.mark.parametrize("saved", [("body",), ("neck",)])
@pytest.mark.parametrize("run", [call, compute])
def test_a_reentrant_checkpoint_at_or_behind_the_layer_names_the_repair(run, saved):
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        after_backward(run, "preserve", saved, reentrant=True)


@pytest.mark.parametrize("saved", [("stem",), ("body",), ("neck",)])
def test_heatmaps_for_looking_at_do_not_depend_on_checkpointing(saved):
    model = StagedNet().double()
    expected = explain(model, X, "body")
    model.saved = saved
    assert_same(explain(model, X, "body"), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("saved", [("stem",), ("body",), ("neck",), ("stem", "body", "neck")])
def test_the_suggested_layer_does_not_depend_on_checkpointing(saved, reentrant):
    model = StagedNet().double()
    model.saved, model.reentrant = saved, reentrant
    assert suggest_target_layer(model, X) == "neck"


def test_timm_checkpointing_calls_the_parts_of_a_stage_and_the_error_names_the_last():
    model = timm.create_model("resnet10t", num_classes=5)
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    x = torch.randn(3, 3, 64, 64, generator=generator(0))
    with pytest.raises(RuntimeError, match=r"'layer4\.0'"):
        CGCRegularizer("layer4")(model, x)
    losses = [CGCRegularizer("layer4.0", generator=generator(0))(net, x) for net in (model, plain)]
    for loss in losses:
        loss.backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
def test_a_checkpoint_around_the_tree_is_refused(reentrant, bn_mode):
    """What the model reaches by a patched forward, no replica of its tree can replace."""
    model = StagedNet().double()
    plain = model.stem.forward
    model.stem.forward = lambda x: checkpoint(plain, x, use_reentrant=reentrant)
    reg = CGCRegularizer("body", bn_mode=bn_mode, generator=generator(0))
    with pytest.raises(RuntimeError, match="`bn_mode` must be 'update' for this model"):
        reg(model, X.clone().requires_grad_())


def test_a_trunk_without_gradients_is_no_checkpoint():
    model = StagedNet().double()
    stem = model.stem.forward

    def frozen(x):
        with torch.no_grad():
            return stem(x)

    model.stem.forward = frozen
    CGCRegularizer("body")(model, X).backward()
    assert model.stem[0].weight.grad is None
    assert model.body[0].weight.grad.norm() > 0


def test_attention_inside_a_checkpoint_is_run_again_as_it_was():
    model = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8)
    x = torch.randn(3, 3, 32, 32, generator=generator(0))
    g = GradCAM("blocks.4.norm1", reshape_transform=TokensToMaps((4, 4)))
    maps = explain(model, x, g)
    CGCRegularizer(g, generator=generator(0))(model, x).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    torch.testing.assert_close(explain(model, x, g), maps)
    with sdpa_kernel(SDPBackend.MATH):  # for the backward, as the README says
        CGCRegularizer(g, generator=generator(0))(model, x).backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_only_the_first_step_takes_a_pass_more(wrap):
    model, passes = StagedNet().double(), []
    model.saved = ("stem",)
    model.head.register_forward_hook(lambda *_: passes.append(len(passes)))
    reg, wrapped = CGCRegularizer("body"), wrap(model)
    counts = []
    for _ in range(3):
        passes.clear()
        call(reg, wrapped, X)
        counts.append(len(passes))
    assert counts == [3, 2, 2]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("part", ["scripted", "left out"])
@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
def test_a_checkpointing_model_may_have_any_part(part, bn_mode):
    torch.manual_seed(0)
    model = StagedNet().double()
    if part == "scripted":
        model.neck = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).double().eval())
    elif part == "left out":
        model.aside = nn.Identity()
        model.aside = None  # stays among the model's parts
    plain = copy.deepcopy(model)
    model.saved = ("stem",)
    losses = []
    for net in (model, plain):
        loss = call(CGCRegularizer("body", bn_mode=bn_mode, generator=generator(0)), net, X)
        loss.backward()
        losses.append(loss.detach())
    assert_same(*losses)
    assert_same(model.stem[0].weight.grad, plain.stem[0].weight.grad)


def test_a_checkpoint_around_the_tree_may_hold_norms_in_evaluation_mode():
    model = StagedNet().double().eval()
    plain = model.stem.forward
    expected = call(CGCRegularizer("body", generator=generator(0)), model, X)
    model.stem.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    assert_same(call(CGCRegularizer("body", generator=generator(0)), model, X), expected)


def test_in_update_mode_a_forward_may_replace_buffers():
    class Counting(StagedNet):
        """Counts its passes in a new tensor each time."""

        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.tensor(0))

        def forward(self, x):
            self.passes = self.passes + 1
            return super().forward(x)

    model = Counting().double()
    model.saved = ("stem",)
    call(CGCRegularizer("body"), model, X)  # from here on the model is known to checkpoint
    assert model.passes == 0
    call(CGCRegularizer("body", bn_mode="update"), model, X)
    assert model.passes == 2


def test_a_users_hook_finds_the_layers_that_it_knows():
    model = StagedNet().double()
    model.saved = ("stem",)
    layers = {module: name for name, module in model.named_modules()}
    seen = []
    model.stem[0].register_forward_hook(lambda module, args, output: seen.append(layers[module]))
    call(CGCRegularizer("body"), model, X).backward()
    assert set(seen) == {"stem.0"}
