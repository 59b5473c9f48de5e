"""The model after a call is the model before it, whatever happens in between."""

import copy
import functools
import itertools
import threading
from contextlib import contextmanager, nullcontext

import explainers
import pytest
import torch
import torch.nn.functional as F
from networks import GapNet, assert_same, buffers_of, gradients, relu_net, settings_of
from strategies import generator
from torch import nn
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from cgc_reg import CGCRegularizer, GradCAM, class_activation, explain, suggest_target_layer
from cgc_reg.model import attention
from cgc_reg.model.layers import find_layer

X = torch.randn(4, 3, 16, 16, generator=generator(0))
LAYER = "features.4"


class Stumble(nn.Module):
    """Pass x on, and raise the n-th time."""

    def __init__(self, module, at):
        super().__init__()
        self.module = module
        self.calls, self.at = itertools.count(1), at

    def forward(self, x):
        if next(self.calls) == self.at:
            raise ArithmeticError("stumbled")
        return self.module(x)


class TupleLayer(nn.Module):
    def forward(self, x):
        return x, x


class IntegerLayer(nn.Module):
    def forward(self, x):
        return x.long()


class OddNet(nn.Module):
    """A forward that uses its layers as few do: one twice, one never, others for what is no floating-point tensor."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.never = nn.Conv2d(4, 4, 3)
        self.pair = TupleLayer()
        self.integer = IntegerLayer()
        self.aside = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x, _ = self.pair(self.twice(self.twice(self.stem(x))))
        self.integer(x)
        self.aside(x)
        return self.head(x.mean(dim=(2, 3)))


def batch_norm_net():
    """A net in training whose second norm is frozen, as fine-tuning does, with statistics unlike the fresh ones."""
    net = relu_net(nn.BatchNorm2d)
    net(X)
    net.features[4].eval()
    return net


def instance_norm_net():
    net = relu_net(lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True))
    net(X)
    net.features[4].eval()
    return net


def regularizer(**options):
    return explainers.regularizer(LAYER, generator=generator(0), **options)


def call(reg, model, x=X):
    return reg(model, x)


def compute(reg, model, x=X):
    return reg.compute(model, x).loss


def look(reg, model, x=X):
    return explain(model, x)


def suggest(reg, model, x=X):
    return suggest_target_layer(model, x)


calls = pytest.mark.parametrize("run", [call, compute])
norms = pytest.mark.parametrize("build", [batch_norm_net, instance_norm_net])
modes = pytest.mark.parametrize("bn_mode", ["preserve", "eval", "update"])


@calls
@norms
@modes
def test_hooks_and_flags_are_as_before(run, build, bn_mode):
    model = build()
    before = settings_of(model)
    run(regularizer(bn_mode=bn_mode), model).backward()
    assert settings_of(model) == before


@pytest.mark.parametrize("position", ["before the layer", "at the layer", "behind the layer"])
@pytest.mark.parametrize("at", [1, 2], ids=["first pass", "second pass"])
@calls
@modes
def test_hooks_and_flags_are_as_before_when_the_model_raises(position, at, run, bn_mode):
    model = batch_norm_net()
    index = {"before the layer": 1, "at the layer": 4, "behind the layer": 5}[position]
    model.features[index] = Stumble(model.features[index], at)
    before, grad_enabled = settings_of(model), torch.is_grad_enabled()
    with pytest.raises(ArithmeticError):
        run(regularizer(bn_mode=bn_mode), model)
    assert settings_of(model) == before
    assert torch.is_grad_enabled() == grad_enabled


def stumble(*args):
    raise ArithmeticError("stumbled")


@pytest.mark.parametrize("option", ["heatmap", "loss", "output_fn", "reshape_transform"])
@calls
def test_hooks_and_flags_are_as_before_when_a_users_function_raises(option, run):
    model = batch_norm_net()
    before = settings_of(model)
    with pytest.raises(ArithmeticError):
        run(regularizer(**{option: stumble}), model)
    assert settings_of(model) == before


@pytest.mark.parametrize("at", [1, 2], ids=["first pass", "second pass"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@calls
def test_gradient_mode_is_as_before_when_the_model_raises(at, mode, run):
    model = relu_net()
    model.features[5] = Stumble(model.features[5], at)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with pytest.raises(ArithmeticError):
            run(regularizer(), model, X.clone())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("run", [call, compute, look, suggest])
def test_gradient_mode_is_as_before(mode, run):
    model = relu_net()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        run(regularizer(), model, X.clone())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@norms
@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_running_statistics_are_as_before(build, bn_mode, mode):
    model = build()
    before = buffers_of(model)
    with mode():
        regularizer(bn_mode=bn_mode)(model, X)
    assert_same(buffers_of(model), before)


@norms
@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
def test_compute_updates_running_statistics_as_one_plain_pass(build, bn_mode):
    model = build()
    plain = copy.deepcopy(model)
    regularizer(bn_mode=bn_mode).compute(model, X)
    plain(X)
    assert_same(buffers_of(model), buffers_of(plain))


@norms
@calls
def test_mode_update_updates_running_statistics_as_two_plain_passes(build, run):
    model = build()
    plain = copy.deepcopy(model)
    view = regularizer().compute(copy.deepcopy(model), X).view
    run(regularizer(bn_mode="update"), model)
    plain(X)
    plain(view)
    assert_same(buffers_of(model), buffers_of(plain))


@norms
def test_running_statistics_are_as_before_when_the_model_raises(build):
    model = build()
    model.head = Stumble(model.head, at=2)
    before = buffers_of(model)
    with pytest.raises(ArithmeticError):
        regularizer()(model, X)
    assert_same(buffers_of(model), before)


@norms
def test_mode_preserve_normalises_as_in_any_pass_in_training(build):
    model = build()
    out = regularizer().compute(model, X)
    assert_same(out.view_logits, model(out.view))


@norms
def test_mode_eval_normalises_with_the_running_statistics(build):
    model = build()
    out = regularizer(bn_mode="eval").compute(model, X)
    assert_same(out.view_logits, model.eval()(out.view))


@pytest.mark.parametrize("bn_mode", ["preserve", "eval", "update"])
def test_gradient_is_the_same_before_and_after_the_loops_own_pass(bn_mode):
    model = batch_norm_net()
    twin = copy.deepcopy(model)
    # The loop's own pass writes to the running statistics, which the backward pass may still need.
    loss = regularizer(bn_mode=bn_mode)(model, X)
    model(X)
    torch.testing.assert_close(gradients(loss, model), gradients(regularizer(bn_mode=bn_mode)(twin, X), twin))


@calls
def test_parameters_keep_their_gradients_and_flags(run):
    model, x = batch_norm_net(), X.clone().requires_grad_()
    F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    model.features[0].requires_grad_(False)
    tensors = [x, *model.parameters()]
    before = [(t.grad, t.grad.clone(), t.requires_grad, t._version) for t in tensors]
    run(regularizer(), model, x)
    for tensor, (grad, value, requires_grad, version) in zip(tensors, before, strict=True):
        assert tensor.grad is grad
        assert_same(grad, value)
        assert (tensor.requires_grad, tensor._version) == (requires_grad, version)


@calls
@pytest.mark.parametrize("heatmap", ["grad_cam", "hires_cam", "class_activation"])
def test_in_place_layer_behind_the_target_changes_nothing(run, heatmap):
    def densenet_like(inplace):
        torch.manual_seed(0)
        return GapNet(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=inplace), head=nn.Linear(6, 5)).double()

    reg = explainers.regularizer("features.1", heatmap=heatmap)
    results = []
    for model in (densenet_like(True), densenet_like(False)):
        reg.generator = generator(0)
        loss = run(reg, model, X.double())
        results.append({"loss": loss.detach(), **gradients(loss, model)})
    assert_same(*results)


def test_explain_is_not_fooled_by_an_in_place_layer():
    model = GapNet(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), head=nn.Linear(6, 5))
    fooled = explain(model, X, "features.0")
    model.features[1].inplace = False
    assert_same(fooled, explain(model, X, "features.0"))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("twice", RuntimeError, "calls once.*'twice'"),
        ("never", RuntimeError, "forward calls.*'never'"),
        ("pair", TypeError, "one floating-point tensor; got .*tuple|one floating-point tensor; got \\("),
        ("integer", TypeError, "one floating-point tensor; got a int64 tensor"),
        ("aside", RuntimeError, "must lead to the logits"),
        ("head", ValueError, r"\(n, c, h, w\); got a float32 tensor of shape \(4, 5\)"),
    ],
)
@calls
def test_layer_that_cannot_be_explained_is_refused(layer, error, message, run):
    model = OddNet()
    before = settings_of(model)
    with pytest.raises(error, match=message):
        run(CGCRegularizer(layer), model)
    assert settings_of(model) == before


@pytest.mark.parametrize(
    ("misspelt", "suggestion"), [("faetures.4", "features.4"), ("feature", "features"), ("layer4", "features")]
)
def test_misspelt_layer_gets_close_matches(misspelt, suggestion):
    with pytest.raises(ValueError, match=f"`target_layer`.*{misspelt!r}.*mean.*{suggestion!r}"):
        CGCRegularizer(misspelt)(relu_net(), X)


@pytest.mark.parametrize("name", ["module.features.4", "_orig_mod.features.4", "module._orig_mod.features.4"])
def test_names_from_a_wrapper_are_understood(name):
    model = relu_net()
    assert_same(explain(model, X, name), explain(model, X, "features.4"))


def test_a_part_called_module_is_no_wrapper():
    model = relu_net()
    model.module = relu_net()
    assert find_layer(model, "module.features") == ("module.features", model.module.features)


def test_data_parallel_is_looked_into():
    model = relu_net()
    loss = regularizer()(nn.DataParallel(model), X)
    assert_same(loss, regularizer()(model, X))


@calls
def test_users_hooks_still_run_and_stay(run):
    model, shapes = relu_net(), []
    model.features[4].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    before = settings_of(model)
    run(regularizer(), model)
    assert len(shapes) == 2  # one for each pass
    assert settings_of(model) == before


def sparing_net():
    """A net that keeps no graph in evaluation mode."""

    class Sparing(GapNet):
        def forward(self, x):
            with nullcontext() if self.training else torch.no_grad():
                return super().forward(x)

    net = relu_net()
    return Sparing(*net.features, head=net.head)


@pytest.mark.parametrize("build", [relu_net, sparing_net])
@pytest.mark.parametrize("run", [call, compute, look, suggest])
def test_looking_under_autocast_does_not_cut_weights_from_later_training(run, build):
    # Autocast keeps the weights that it casts; a copy cast without gradients would serve the training pass too.
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            run(regularizer(), model)
        model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("heatmap", ["grad_cam", "class_activation"])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad], ids=["frozen trunk", "no_grad"])
def test_trunk_without_gradients_costs_no_graph(heatmap, mode):
    model, seen = relu_net(), []
    model.features.requires_grad_(mode is torch.no_grad)
    model.features[3].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    with mode():
        regularizer(heatmap=heatmap)(model, X)
    assert seen == [False, False]


@pytest.mark.parametrize("training", [True, False])
def test_a_parametrized_head_is_read_as_the_pass_had_it(training):
    """Spectral norm iterates on its buffers each time that the weight is read in training."""
    model = relu_net().train(training)
    spectral_norm(model.head)
    plain = copy.deepcopy(model)
    reg = regularizer(heatmap="class_activation")
    before = buffers_of(model)
    reg(model, X)
    assert_same(buffers_of(model), before)
    out = reg.compute(model, X)
    plain(X)
    assert_same(buffers_of(model), buffers_of(plain))
    with torch.no_grad():
        weight = plain.eval().head.weight
        expected = class_activation(plain.features[:5](X), weight, out.target)
    torch.testing.assert_close(out.heatmap.detach(), expected)


def test_hooks_on_saved_tensors_may_be_any_callable():
    model = relu_net(nn.BatchNorm2d)
    with torch.autograd.graph.saved_tensors_hooks(
        functools.partial(torch.Tensor.clone), functools.partial(torch.clone)
    ):
        regularizer()(model, X).backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_traced_model_is_refused_as_one_that_does_not_call_its_layers():
    traced = torch.jit.trace(relu_net().eval(), X)
    with pytest.raises(RuntimeError, match="`target_layer` must be a layer that the model's forward calls"):
        CGCRegularizer("features")(traced, X)


def test_an_extra_pass_leaves_the_buffers_of_other_layers_alone():
    """Spectral norm iterates on a buffer in every pass in training."""
    model = relu_net()
    nn.utils.parametrizations.spectral_norm(model.features[3])
    before = buffers_of(model)
    call(regularizer(), model).backward()
    assert_same(buffers_of(model), before)
    model(X)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Measuring(nn.Module):
    """A net that follows its features in buffers, and uses their mean, where gradients are off."""

    def __init__(self):
        super().__init__()
        net = relu_net()
        self.features, self.head = net.features, net.head
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8, 4, 4))

    def forward(self, x):
        with torch.no_grad():
            maps = self.features(x)
            self.mean.mul_(0.9).add_(maps.mean(dim=(0, 2, 3)), alpha=0.1)
            self.last = maps[-1]
        return self.head((maps - self.mean[:, None, None]).mean(dim=(2, 3)))


@calls
def test_a_buffer_that_is_updated_without_gradients_stays_outside_the_graph(run):
    model, reg = Measuring(), regularizer()
    mean = model.mean
    for _ in range(2):
        run(reg, model).backward()
        assert model.mean is mean
        assert not model.mean.requires_grad
        assert not model.last.requires_grad
    copy.deepcopy(model)


def test_a_pass_of_another_thread_is_none_of_ours():
    model, predicted = relu_net(), []
    expected, other = compute(regularizer(), model), model(-X)

    def predict_meanwhile(*args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: predicted.append(model(-X)))
            thread.start()
            thread.join()

    model.features[0].register_forward_hook(predict_meanwhile)
    assert_same(compute(regularizer(), model), expected)
    assert_same(predicted, [other, other])


def test_a_module_in_two_places_is_one_module_in_an_extra_pass():
    model = relu_net()
    model.again = model.features[4]  # a name besides the one that the forward uses
    named_by_either = [CGCRegularizer(name, generator=generator(0))(model, X) for name in ("features.4", "again")]
    assert_same(*named_by_either)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")  # deprecated, and still in users' models
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_scripted_part_runs_as_it_is():
    model, plain = relu_net(), relu_net()
    plain.load_state_dict(model.state_dict())
    model.features[0] = torch.jit.trace(model.features[0], X)
    assert_same(call(regularizer(), model), call(regularizer(), plain))


class StoringNet(GapNet):
    """A net whose hook, bound to the net, stores what its forward reads, and whose forward stores for others."""

    def __init__(self):
        super().__init__(*relu_net().features, head=nn.Linear(8, 5))
        self.gate = nn.Linear(6, 8)
        self.features[2].register_forward_hook(self.store)

    def store(self, module, args, output):
        self.early = output

    def forward(self, x):
        maps = self.features(x)
        self.grid = tuple(maps.shape[2:])
        return self.head(maps.mean(dim=(2, 3)) * self.gate(self.early.mean(dim=(2, 3))))


@modes
def test_what_a_forward_stores_on_the_model_is_of_its_own_pass(bn_mode):
    model, grids = StoringNet(), []
    g = GradCAM("features", reshape_transform=lambda a: grids.append(model.grid) or a)
    out = CGCRegularizer(g, bn_mode=bn_mode, view_size=(8, 12)).compute(model, X)
    assert set(grids) == {(4, 4), (2, 3)}
    assert_same(out.view_logits, model(out.view))


@calls
@modes
def test_users_hooks_get_the_users_modules(run, bn_mode):
    model = batch_norm_net()
    names = {module: name for name, module in model.named_modules()}
    seen = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.add(names[module]))
    run(regularizer(bn_mode=bn_mode), model)
    assert seen == set(names.values())


class GhostNorm(nn.BatchNorm2d):
    """A norm that writes to its statistics itself, whatever `track_running_stats` says."""

    def forward(self, x):
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return torch.cat([F.batch_norm(part, *statistics, self.training, self.momentum) for part in x.chunk(2)])


@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
@pytest.mark.parametrize("patched", [False, True])
def test_a_norm_with_a_forward_of_its_own_keeps_its_statistics_too(bn_mode, patched):
    model = relu_net(nn.BatchNorm2d if patched else GhostNorm)
    for module in model.modules() if patched else ():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = functools.partial(GhostNorm.forward, module)
    before = buffers_of(model)
    call(regularizer(bn_mode=bn_mode), model).backward()
    assert_same(buffers_of(model), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # deprecated, and still in users' models
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
def test_a_scripted_norm_keeps_its_statistics_too(bn_mode):
    model = relu_net(nn.BatchNorm2d)
    twin = relu_net(nn.BatchNorm2d)
    twin.load_state_dict(model.state_dict())
    model.features[1] = torch.jit.script(model.features[1])
    before = buffers_of(model)
    assert_same(call(regularizer(bn_mode=bn_mode), model), call(regularizer(bn_mode=bn_mode), twin))
    assert_same(buffers_of(model), before)
    assert model.features[1].training


def test_a_buffer_of_two_modules_is_one_buffer_in_an_extra_pass():
    class Counting(nn.Module):
        def forward(self, x):
            self.count.add_(1)
            return x * self.other.count

    model = relu_net()
    counting = model.features[2] = Counting()
    counting.register_buffer("count", torch.ones(()))
    counting.other = nn.Module()
    counting.other.register_buffer("count", counting.count)
    out = regularizer().compute(model, X)
    assert counting.count == 2  # of the step's own pass
    assert_same(out.view_logits, relu_twice(model, out.view))


def relu_twice(model, x):
    """Run the net on x with its counter at two, as in the extra pass after the step's own."""
    model.features[2].count.fill_(2)
    return model(x)


@calls
def test_attention_is_fused_again_when_the_model_raises(run):
    model = relu_net()
    model.head = Stumble(model.head, 1)
    with pytest.raises(ArithmeticError):
        run(regularizer(), model)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_attention_stays_unfused_while_another_model_is_looked_at():
    model, seen = relu_net(), []

    def look(*args):
        explain(relu_net(), X, LAYER)

    model.features[5].register_forward_hook(look)
    model.head.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled()))
    compute(regularizer(), model)
    assert seen == [False, False]


def test_what_a_hook_gives_in_the_layers_place_takes_no_gradient():
    model = relu_net().requires_grad_(False)
    given = model.features[:5](X)
    model.features[4].register_forward_hook(lambda *_: given)
    explain(model, X, LAYER)
    assert not given.requires_grad


@calls
def test_images_that_the_layer_hands_on_take_no_gradient(run):
    model, x = GapNet(nn.Identity(), *relu_net().features, head=nn.Linear(8, 5)), X.clone()
    run(CGCRegularizer("features.0"), model, x)
    assert not x.requires_grad


class Remembering(Measuring):
    """A net whose loop reads its last maps from a buffer, and trains on them."""

    def forward(self, x):
        self.last = self.features(x)
        return self.head(self.last.mean(dim=(2, 3)))


def test_a_buffer_that_has_a_graph_in_a_plain_pass_has_one_in_a_step():
    model, plain = Remembering(), Remembering()
    plain.load_state_dict(model.state_dict())
    compute(regularizer(), model)
    plain(X)
    assert_same(gradients(model.last.sum(), model), gradients(plain.last.sum(), plain))


def test_tensors_that_are_saved_on_the_cpu_are_in_no_checkpoint():
    model, seen = relu_net(nn.BatchNorm2d), []
    model.features.register_forward_hook(lambda module, args, output: seen.append(module))
    with torch.autograd.graph.save_on_cpu():
        compute(regularizer(), model).backward()
    assert seen == [model.features] * 2


def test_attention_is_fused_again_after_threads_that_began_at_once(monkeypatch):
    fused, switching = torch.backends.cuda.flash_sdp_enabled(), threading.Event()
    first_is_in, second_is_in = threading.Event(), threading.Event()

    @contextmanager
    def slow_switch(backend):
        if not switching.is_set():
            switching.set()
            second_is_in.wait(0.1)
        with sdpa_kernel(backend):
            yield

    def second():
        switching.wait(1)
        with attention.unfused_attention():
            second_is_in.set()
            first_is_in.wait(1)

    monkeypatch.setattr(attention, "sdpa_kernel", slow_switch)
    thread = threading.Thread(target=second)
    thread.start()
    with attention.unfused_attention():
        first_is_in.set()
        thread.join()
    assert torch.backends.cuda.flash_sdp_enabled() == fused
