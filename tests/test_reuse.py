"""Inside `reuse` the loop's own pass serves the regularizer, for the very tensor that it was given and nothing else."""

import copy
import copyreg
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import explainers
import pytest
import torch
import torch.nn.functional as F
from networks import GapNet, assert_same, buffers_of, gradients, relu_net, settings_of, untouched
from strategies import generator
from torch import nn
from torch.nn.utils import prune

from cgc_reg import CAM, CGCRegularizer, GradCAM, explain, suggest_target_layer
from cgc_reg.model import reuse

X = torch.randn(4, 3, 16, 16, generator=generator(0))
Y = torch.tensor([0, 3, 1, 4])


def regularizer(**options):
    return explainers.regularizer("features", generator=generator(0), **options)


def kept_now():
    return reuse._KEPT.get()


def counted(model):
    """Count the passes through the first layer."""
    passes = []
    model.features[0].register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    return passes


def reused_step(reg, model, x=X):
    with reg.reuse(model):
        return F.cross_entropy(model(x), Y) + reg(model, x)


@pytest.mark.parametrize("bn_mode", ["preserve", "eval", "update"])
def test_two_lines_cost_two_passes(bn_mode):
    model = relu_net(nn.BatchNorm2d)
    passes = counted(model)
    reused_step(regularizer(bn_mode=bn_mode), model)
    assert len(passes) == 2


class Named(nn.Module):
    """Takes images by name, and something else beside."""

    def __init__(self):
        super().__init__()
        self.net = relu_net()

    def forward(self, pixel_values=None, shift=None):
        return self.net(pixel_values if shift is None else pixel_values + shift)


@pytest.mark.parametrize(("given", "count"), [({"pixel_values": X}, 2), ({"pixel_values": X, "shift": X}, 3)])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "data parallel"])
def test_x_by_name_is_the_same_pass_and_what_comes_beside_makes_another(given, count, wrap):
    model = Named()
    passes, reg = counted(model.net), CGCRegularizer("net.features", generator=generator(0))
    wrapped = wrap(model)
    with reg.reuse(wrapped):
        loss = wrapped(**given).sum() + reg(wrapped, X)
    assert len(passes) == count
    assert loss.isfinite()


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, image=None, pixel_values=None: model.net(2 * X if image is None else image),
        lambda model, *pixel_values, **named: model.net(pixel_values[0] if pixel_values else 2 * X),
        lambda model, image=None, *, pixel_values=None: model.net(2 * X if image is None else image),
    ],
    ids=["second", "starred", "keyword"],
)
def test_a_tensor_by_another_name_is_another_pass(forward):
    model = type("Other", (Named,), {"forward": forward})()
    passes, reg = counted(model.net), CGCRegularizer("net.features", generator=generator(0))
    with reg.reuse(model):
        loss = model(pixel_values=X).sum() + reg(model, X)
    assert len(passes) == 3
    assert loss.isfinite()


@pytest.mark.parametrize("heatmap", ["grad_cam", "hires_cam", "class_activation"])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "data parallel"])
def test_loss_gradients_and_buffers_are_those_of_compute(heatmap, wrap):
    model = relu_net(nn.BatchNorm2d)
    twin = copy.deepcopy(model)
    loss = reused_step(regularizer(heatmap=heatmap), wrap(model))
    out = regularizer(heatmap=heatmap).compute(twin, X)
    expected = F.cross_entropy(out.logits, Y) + out.loss
    assert_same(loss, expected)
    assert_same(gradients(loss, model), gradients(expected, twin))
    assert_same(buffers_of(model), buffers_of(twin))


@pytest.mark.parametrize(
    "other",
    [
        lambda model: X.clone(),
        lambda model: X[:],
        lambda model: X.view_as(X),
        lambda model: X + 1,
    ],
    ids=["copy", "slice", "alias", "another"],
)
def test_another_tensor_is_computed(other):
    model = relu_net()
    x, passes = other(model), counted(model)
    reg = regularizer()
    with reg.reuse(model):
        model(X)
        loss = reg(model, x)
    assert len(passes) == 3
    assert_same(loss, regularizer()(model, x))


def test_a_tensor_changed_in_place_is_computed():
    model, x = relu_net(), X.clone()
    passes = counted(model)
    reg = regularizer()
    with reg.reuse(model):
        model(x)
        x += 1
        assert_same(reg(model, x), regularizer()(model, x))
    assert len(passes) == 5


def test_a_pass_without_gradients_or_of_another_model_is_not_reused():
    model, other = relu_net(), relu_net()
    reg = regularizer()
    with reg.reuse(model):
        with torch.no_grad():
            model(X)
        assert_same(gradients(reg(model, X), model), gradients(regularizer()(model, X), model))
        model(X)
        passes = counted(other)
        reg(other, X)
        assert len(passes) == 2
        passes = counted(model)
        with torch.no_grad():
            reg(model, X)
        assert len(passes) == 2


def test_each_of_several_passes_is_found():
    model, reg = relu_net(), regularizer()
    x = X + 1
    with reg.reuse(model):
        model(X), model(x)
        passes = counted(model)
        first, second = reg(model, X), reg(model, x)
    assert len(passes) == 2
    reg = regularizer()
    assert_same((first, second), (reg(model, X), reg(model, x)))


def test_the_regularizers_own_passes_are_not_kept():
    model, reg = relu_net(), regularizer()
    with reg.reuse(model):
        reg.compute(model, X)
        explain(model, X, "features")
        passes = counted(model)
        reg(model, X)
    assert len(passes) == 2


def test_a_pass_that_looks_for_the_layer_is_let_go_at_once():
    model, outputs = relu_net(), []
    model.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    with regularizer().reuse(model):
        suggest_target_layer(model, X)
        gc.collect()
        assert [output() for output in outputs] == [None]


def test_a_frozen_trunk_is_computed_as_ever():
    model = relu_net()
    model.features.requires_grad_(False)
    loss = reused_step(regularizer(), model)
    expected = F.cross_entropy(model(X), Y) + regularizer()(model, X)
    assert_same(gradients(loss, model), gradients(expected, model))


def test_an_in_place_layer_behind_the_target_changes_nothing():
    model = relu_net()
    model.features[5].inplace = True
    losses = []
    for step in (reused_step, lambda reg, model: F.cross_entropy(model(X), Y) + reg(model, X)):
        losses.append(step(CGCRegularizer("features.4", generator=generator(0)), model))
    assert_same(*losses)


@pytest.mark.filterwarnings("ignore:The loop.s own pass of a compiled model is not reused")
def test_a_compiled_model_is_run_uncompiled_as_ever():
    torch.compiler.reset()
    model = relu_net()
    with pytest.warns(UserWarning, match="runs as written"):
        loss = reused_step(regularizer(), torch.compile(model, backend="eager"))
    torch.testing.assert_close(loss, reused_step(regularizer(), model))


def test_everything_is_let_go_and_left_as_found():
    model, x, reg = relu_net(nn.BatchNorm2d), X.clone(), regularizer()
    before = settings_of(model)
    with reg.reuse(model):
        output = model(x)
        reg(model, x)
    assert settings_of(model) == before
    traces = [weakref.ref(item) for item in (model, x, output)]
    del model, x, output
    gc.collect()
    assert [trace() for trace in traces] == [None] * 3


@pytest.mark.parametrize("where", ["model", "block"])
def test_everything_is_left_as_found_when_something_raises(where):
    class Stumbling(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    model, reg = relu_net(), regularizer()
    if where == "model":
        model.head = Stumbling()
    before, flash = settings_of(model), torch.backends.cuda.flash_sdp_enabled()

    def block():
        with reg.reuse(model):
            model(X)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        block()
    assert settings_of(model) == before
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert kept_now() == ()


def test_the_layer_must_be_known():
    with (
        pytest.raises(ValueError, match="`target_layer` must be named to reuse"),
        CGCRegularizer(None).reuse(relu_net()),
    ):
        pass


def test_the_passes_of_another_regularizer_are_not_kept():
    model = relu_net(nn.BatchNorm2d)
    model.features[1].running_mean.normal_()
    other = CGCRegularizer("features.4", bn_mode="eval", generator=generator(1))
    reg = regularizer()
    with reg.reuse(model), other.reuse(model):
        model(X)
        other(model, X)
        loss = reg(model, X)
        assert [len(kept.passes) for kept in kept_now()] == [1, 1]
    assert_same(loss, regularizer()(model, X))


def test_a_regularizer_that_finds_its_layer_computes_its_pass():
    model = relu_net()
    expected = CGCRegularizer(None, generator=generator(0))(model, X)
    with GradCAM("features").reuse(model):
        model(X)
        assert_same(CGCRegularizer(None, generator=generator(0))(model, X), expected)


def evaluated(model):
    model.eval()
    model(X)
    model.train()


def moved(model):
    model(X)
    with torch.no_grad():
        model.head.weight.mul_(2)


def in_half_precision(model):
    with torch.autocast("cpu", torch.bfloat16):
        model(X)


def replaced(model):
    model(X)
    model.head.weight.data = 2 * model.head.weight.detach()


def fused_step(model):
    model(X)
    model(-X).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()


def masked_in_place(model):
    model(X)[:, 1:].fill_(-10.0)


def unfrozen(model):
    model.features[0].requires_grad_(False)
    model(X)
    model.features[0].requires_grad_(True)


@pytest.mark.parametrize(
    "before", [evaluated, moved, replaced, unfrozen, in_half_precision, fused_step, masked_in_place]
)
def test_a_pass_since_which_the_model_has_changed_is_computed(before):
    model = relu_net(nn.BatchNorm2d)
    reg = regularizer()
    with reg.reuse(model):
        before(model)
        passes = counted(model)
        loss = reg(model, X)
    assert len(passes) == 2
    assert_same(loss, regularizer()(model, X))


def test_blocks_that_overlap_give_fused_attention_back():
    model, kernels = relu_net(), torch.backends.cuda
    before = [kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()]
    first, second = CGCRegularizer("features.0"), regularizer()
    with first.reuse(model), second.reuse(model):
        model(X)
        first(model, X)
        second(model, X)
    assert [kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()] == before


def test_copies_made_meanwhile_are_free_of_the_block():
    model, reg = relu_net(), regularizer()
    with reg.reuse(model):
        model(X)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2)
        other(X)
        loss = reg(model, X)
        pickle.dumps(model)
    assert_same(loss, regularizer()(model, X))
    trace = weakref.ref(other(X.clone()))
    gc.collect()
    assert trace() is None


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    # In a process of its own, where nothing has imported this package.
    names = subprocess.run(
        [sys.executable, "-c", READ], input=file.getvalue(), capture_output=True, check=True, env={"PYTHONPATH": TESTS}
    )
    assert names.stdout.decode().split() == ["1", "0", "0", "False"]
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


TESTS = str(Path(__file__).parent)
READ = """
import io, sys, torch
model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
modules = list(model.modules())
for register in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
    print(sum(len(getattr(module, register)) for module in modules))
print("cgc_reg" in sys.modules)
"""


@pytest.mark.parametrize("make", [copied, pickled, saved])
@pytest.mark.parametrize("explainer", [GradCAM("features"), CAM("features")], ids=repr)
def test_copies_made_meanwhile_know_nothing_of_it(make, explainer):
    model = relu_net()
    model.features[0].register_forward_hook(untouched)
    classes = copyreg.dispatch_table.copy()
    with explainer.reuse(model), GradCAM("features.2").reuse(model):
        model(X)
        other = make(model)
    assert copyreg.dispatch_table == classes
    hooks = [hook for module in other.modules() for hook in module._forward_hooks.values()]
    assert hooks == [untouched]  # the user's own
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in other.modules())
    other.features[0]._forward_hooks.clear()
    assert_same(other(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_copy_made_meanwhile_can_be_scripted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with GradCAM("1").reuse(model):
        model(X)
        other = copy.deepcopy(model)
    assert_same(torch.jit.script(other)(X), model(X))


REBUILT = {
    "pruned": lambda head: prune.l1_unstructured(head, "weight", 0.5),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("opener", ["class_activation", "grad_cam"])
@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
def test_the_heads_weight_is_the_one_that_the_pass_used(rebuild, opener):
    model, twin = nets = relu_net(), relu_net()
    twin.load_state_dict(model.state_dict())
    for net in nets:
        torch.manual_seed(0)
        rebuild(net.head)
    reg = regularizer(heatmap="class_activation")
    with regularizer(heatmap=opener).reuse(model):
        logits = model(X)
        with torch.no_grad():
            model.eval()(X + 1)  # where spectral norm moves nothing
        model.train()
        loss = F.cross_entropy(logits, Y) + reg(model, X)
    out = regularizer(heatmap="class_activation").compute(twin, X)
    expected = F.cross_entropy(out.logits, Y) + out.loss
    assert_same(gradients(loss, model), gradients(expected, twin))


class Aside(nn.Module):
    """A net that puts out a tensor of inference mode beside its logits, and None."""

    def __init__(self):
        super().__init__()
        self.net = relu_net()

    def forward(self, x):
        with torch.inference_mode():
            aside = x.mean()
        return self.net(x), aside, None


def test_a_pass_with_an_inference_tensor_beside_the_logits_is_reused():
    model = Aside()
    reg, single = (CGCRegularizer("net.features", generator=generator(0)) for _ in range(2))
    with reg.reuse(model):
        model(X)
        passes = counted(model.net)
        loss = reg(model, X)
    assert len(passes) == 1
    assert_same(loss, single(model, X))


def test_inference_tensors_are_computed():
    model, reg = relu_net(), regularizer()
    with torch.inference_mode():
        x = X + 0
    model.features.insert(0, Centred())
    with reg.reuse(model):
        model(x)
        assert_same(reg(model, x), regularizer()(model, X))


class Centred(nn.Module):
    """Takes inference tensors too, which cannot be saved for a backward."""

    def forward(self, x):
        return x - 0.5


class HalfFrozen(GapNet):
    """A net that runs its first layers without gradients."""

    def forward(self, x):
        with torch.no_grad():
            x = self.features[:3](x)
        return self.head(self.features[3:](x).mean(dim=(2, 3)))


def test_the_pass_that_looks_at_a_block_without_gradients_is_not_kept():
    net = relu_net()
    model = HalfFrozen(*net.features, head=net.head)
    low, high = GradCAM("features.2"), GradCAM("features.4")
    with low.reuse(model), high.reuse(model):
        low(model, X)
        assert [kept.passes for kept in kept_now()] == [[], []]


def test_a_pass_through_another_model_of_the_same_weights_is_not_reused():
    model = relu_net()
    twin = HalfFrozen(*model.features, head=model.head)  # with a forward of its own
    reg = CGCRegularizer("features.4", generator=generator(0))
    with reg.reuse(twin):
        twin(X)
        passes = counted(model)
        reg(model, X)
    assert len(passes) == 2


def test_the_last_of_several_passes_is_reused():
    model, reg = relu_net(), regularizer()
    with reg.reuse(model):
        model(X).sum().backward()  # which frees its graph
        loss = F.cross_entropy(model(X), Y) + reg(model, X)
    assert_same(gradients(loss, model), gradients(reused_step(regularizer(), model), model))


def test_a_pass_that_raised_is_computed():
    def stumble(*args):
        raise ArithmeticError

    model, reg = relu_net(), regularizer()
    with reg.reuse(model):
        with model.head.register_forward_hook(stumble), pytest.raises(ArithmeticError):
            model(X)
        loss = reg(model, X)
    assert_same(loss, regularizer()(model, X))


def test_a_pass_with_one_of_ours_inside_is_computed():
    model, reg = relu_net(), regularizer()
    expected = regularizer()(model, X)

    def look(*args):
        handle.remove()
        GradCAM("features")(model, -X)

    handle = model.features[0].register_forward_hook(look)
    with reg.reuse(model):
        model(X)
        assert_same(reg(model, X), expected)


class Unusual(nn.Module):
    """Takes a list too, and has a layer that puts out a pair, and one that it calls twice."""

    def __init__(self):
        super().__init__()
        self.net, self.pair, self.twice = relu_net(), Pair(), nn.Conv2d(3, 3, 1)

    def forward(self, images):
        first, second = self.pair(images[0] if isinstance(images, list) else images)
        return self.net(self.twice(self.twice(first)) + second)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("given", [X, [X]], ids=["tensor", "list"])
@pytest.mark.parametrize(("layer", "error"), [("pair", TypeError), ("twice", RuntimeError)])
def test_the_loops_pass_runs_and_what_cannot_be_explained_is_refused_as_ever(given, layer, error):
    model, g = Unusual(), GradCAM(layer)
    expected = model(given)
    with g.reuse(model):
        assert_same(model(given), expected)
        with pytest.raises(error, match="`target_layer` must"):
            g(model, X)


def test_blocks_may_end_in_any_order():
    model, other = relu_net(), relu_net()
    first, second = regularizer().reuse(model), regularizer().reuse(other)
    first.__enter__()
    second.__enter__()
    logits = other(X)
    first.__exit__(None, None, None)
    assert GradCAM("features")(other, X).logits is logits
    second.__exit__(None, None, None)
    assert kept_now() == ()


def test_attention_is_unfused_above_the_layer_and_no_longer():
    model, fused, reg = relu_net(), torch.backends.cuda.flash_sdp_enabled(), regularizer()
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled()))
    with reg.reuse(model):
        model(X)
        assert torch.backends.cuda.flash_sdp_enabled() == fused
    assert seen == [False]


def test_a_compiled_model_is_not_compiled_again():
    torch.compiler.reset()
    model, graphs = relu_net(), []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    compiled(X)
    with pytest.warns(UserWarning, match="not reused"), regularizer().reuse(compiled):
        compiled(X)
    assert len(graphs) == 1


def test_a_pass_of_another_thread_is_never_taken():
    model, other = relu_net(), -X
    started, end = threading.Event(), threading.Event()

    def wait(module, args):
        if args[0] is other:
            started.set()
            end.wait(30)
        else:
            end.set()
            thread.join()  # that pass ends after this one has begun

    model.register_forward_pre_hook(wait)
    thread = threading.Thread(target=model, args=(other,))
    g = GradCAM("features")
    with g.reuse(model):
        thread.start()
        started.wait(30)
        logits = model(X)
        seen = g(model, X)
    assert seen.logits is logits
    assert_same(seen.heatmap, g(model, X).heatmap)


@pytest.mark.parametrize("make", [copied, pickled])
def test_a_traced_model_can_be_copied_meanwhile(make):
    model = torch.fx.symbolic_trace(relu_net())
    with GradCAM("features.4").reuse(model):
        model(X)
        other = make(model)
    assert_same(other(X), model(X))


class ByOptions(nn.ReLU):
    """Is made anew from its options where it is copied."""

    def __getstate__(self):
        return {"inplace": self.inplace}

    def __setstate__(self, state):
        self.__init__(**state)


class ByTuple(ByOptions):
    def __getstate__(self):
        return (self.inplace,)

    def __setstate__(self, state):
        self.__init__(*state)


class ByCall(ByOptions):
    def __reduce__(self):
        return type(self), (self.inplace,)


@pytest.mark.parametrize("make", [copied, pickled])
@pytest.mark.parametrize("build", [ByOptions, ByTuple, ByCall])
def test_a_layer_that_takes_itself_apart_in_its_own_way_can_be_copied_meanwhile(build, make):
    model = relu_net()
    model.features[5] = build()
    with GradCAM("features.5").reuse(model):
        model(X)
        other = make(model)
    assert not other.features[5]._forward_hooks
    assert_same(other(X), model(X))
