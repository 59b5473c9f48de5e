"""Parts that are compiled below the layer stay so in every pass, with the numbers of the uncompiled model."""

import copy
import pickle
import warnings
from types import MethodType

import explainers
import pytest
import torch
import torch.nn.functional as F
import torchvision
from inductor import compiles
from model_zoo import CASES, compiled_below, prepare
from networks import assert_same, buffers_of, settings_of
from strategies import generator
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from cgc_reg import CAM, CGCRegularizer, FullGrad, GradCAM, compile_below, explain

X = torch.randn(4, 3, 32, 32, generator=generator(0), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 4])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def net(**options):
    """Build a net with a stem, a body and a head, each with a BatchNorm."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return Net(stem, body, nn.Linear(8, 5), **options).double()


class Net(nn.Module):
    def __init__(self, stem, body, head, saved=()):
        super().__init__()
        self.stem, self.body, self.head = stem, body, head
        self.saved = saved  # what a checkpoint runs again

    def forward(self, x):
        for part in (self.stem, self.body):
            x = checkpoint(part, x, use_reentrant=False) if part in self.saved else part(x)
        return self.head(x.mean(dim=(2, 3)))


class Backend:
    """Counts what is compiled, and notes what runs compiled and whether a hook stands inside."""

    def __init__(self, model):
        self.graphs, self.runs, self.model, self.hooked = 0, 0, model, set()

    def __call__(self, graph, inputs):
        self.graphs += 1
        compiled = lookup_backend("aot_eager")(graph, inputs)

        def run(*inputs):
            self.runs += 1
            parts = (self.model.stem, self.model.body)
            inside = [module for part in parts for module in part.modules() if module is not part]
            self.hooked |= {module for module in inside if module._forward_hooks or module._forward_pre_hooks}
            return compiled(*inputs)

        return run


def by_module(model, backend):
    model.stem.compile(backend=backend)
    model.body.compile(backend=backend)


def by_child(model, backend):
    model.stem = torch.compile(model.stem, backend=backend)
    model.body = torch.compile(model.body, backend=backend)


def by_forward(model, backend):
    for part in (model.stem, model.body):
        part.forward = torch.compile(part.forward, backend=backend)


def by_class(model, backend):
    class Compiled(nn.Sequential):
        forward = torch.compile(nn.Sequential.forward, backend=backend)

    model.stem, model.body = Compiled(*model.stem), Compiled(*model.body)


def below(model, backend):
    compile_below(model, X, "body", backend=backend)


WAYS = [by_module, by_child, by_forward, by_class, below]
ways = pytest.mark.parametrize("way", WAYS)


def call_step(reg, model, x=X, y=Y):
    return F.cross_entropy(model(x), y) + reg(model, x, y)


def compute_step(reg, model, x=X, y=Y):
    out = reg.compute(model, x, y)
    return F.cross_entropy(out.logits, y) + out.loss


def reuse_step(reg, model, x=X, y=Y):
    with reg.reuse(model):
        return call_step(reg, model, x, y)


def train(model, step=compute_step, steps=3, explainer=None, **options):
    """Take some steps; return the losses and what they left, and how much had been compiled after each."""
    reg = CGCRegularizer(explainer or GradCAM("body"), generator=generator(0), **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(reg, model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters()}
    buffers = {name.replace("_orig_mod.", ""): value for name, value in buffers_of(model).items()}
    return {"losses": torch.stack(losses), **{f"gradient of {n}": g for n, g in gradients.items()}, **buffers}


def compiled(way, **options):
    model = net(**options)
    backend = Backend(model)
    way(model, backend)
    return model, backend


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@ways
@pytest.mark.parametrize("bn_mode", ["preserve", "eval", "update"])
def test_a_step_is_the_uncompiled_one_and_both_passes_run_compiled(way, bn_mode):
    model, backend = compiled(way)
    reg_options = {"bn_mode": bn_mode}
    assert_equal(train(model, steps=1, **reg_options), train(net(), steps=1, **reg_options))
    first, runs = backend.graphs, backend.runs
    assert first == (4 if bn_mode == "eval" else 2)
    assert runs == 4  # two parts, in two passes
    train(model, **reg_options)
    assert backend.graphs == first
    assert backend.runs == 4 * runs
    assert not backend.hooked


def test_the_loops_own_pass_is_not_reused_and_a_warning_says_so():
    model, backend = compiled(below)
    with pytest.warns(UserWarning, match="not reused, since hooks would have it compiled anew") as said:
        found = train(model, reuse_step)
    assert_equal(found, train(net(), reuse_step))  # with BatchNorms that preserve, one pass more changes nothing
    assert [each.filename for each in said] == [__file__]
    assert not backend.hooked


@pytest.mark.parametrize("backend", ["inductor"] * compiles)
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # its own, in torch 2.6
def test_inductor_gives_the_step_but_for_rounding(backend):
    model, plain = net().float(), net().float()
    compile_below(model, X.float(), "body", backend=backend)
    for each in (model, plain):
        compute_step(CGCRegularizer("body", generator=generator(0)), each, X.float()).backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("heatmap", sorted(explainers.EXPLAINERS))
def test_each_explainer_of_one_layer_keeps_them(heatmap):
    model, backend = compiled(below)
    explainer = explainers.EXPLAINERS[heatmap]("body")
    assert_equal(train(model, explainer=explainer), train(net(), explainer=explainer))
    assert backend.runs == 12


@pytest.mark.filterwarnings("ignore:The loop.s own pass of a compiled model is not reused")
@pytest.mark.parametrize("step", [call_step, compute_step, reuse_step])
@pytest.mark.parametrize("training", [True, False])
def test_each_loop_trains_as_uncompiled(step, training):
    model, _ = compiled(below)
    assert_equal(train(model.train(training), step), train(net().train(training), step))


def test_a_detached_key_is_that_of_the_uncompiled_model():
    model, backend = compiled(below)
    assert_equal(train(model, detach_key=True), train(net(), detach_key=True))
    assert backend.graphs == 4  # without gradients the parts are others
    assert backend.runs == 12


def test_autocast_is_that_of_the_uncompiled_model():
    results = []
    for model in (compiled(below)[0].float(), net().float()):
        with torch.autocast("cpu", torch.bfloat16):
            compute_step(CGCRegularizer("body", generator=generator(0)), model, X.float()).backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    found, expected = results
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("saved", ["stem", "body"])
@pytest.mark.parametrize("bn_mode", ["preserve", "eval", "update"])
def test_a_checkpoint_changes_nothing(saved, bn_mode):
    results = []
    for model in (net(), net(), net()):
        if len(results) < 2:
            model.saved = [model.get_submodule(saved)]
        if not results:
            compile_below(model, X, "body", backend="aot_eager")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*runs as written")
            results.append(train(model, bn_mode=bn_mode))
    assert_equal(results[0], results[1])


def test_batches_of_any_size_share_what_is_compiled():
    model, backend = compiled(below)
    reg = CGCRegularizer("body", generator=generator(0))
    for count in (4, 3, 2):
        compute_step(reg, model, X[:count], Y[:count]).backward()
        graphs = {count: backend.graphs}
    compute_step(reg, model, X[:3], Y[:3]).backward()
    assert backend.graphs == graphs[2] <= 4  # each part once, and once more for any size


def test_sizes_are_fixed_where_no_call_has_others():
    """The compiler tells functions by name and place, and would take each for one before it with other sizes."""
    model, sizes = net(), []

    def backend(graph, inputs):
        sizes.extend(each for each in inputs if not isinstance(each, torch.Tensor))
        return graph

    compile_below(model, X, "body", backend=backend)
    GradCAM("body")(model, X, Y)
    assert sizes == []


def test_a_measure_runs_what_the_loops_own_pass_has_compiled():
    model, backend = compiled(below)
    with torch.no_grad():
        model(X)
        graphs = backend.graphs
        GradCAM("body")(model, X, Y)
    assert backend.graphs == graphs


def test_looking_keeps_them_too_and_leaves_no_graph():
    model, backend = compiled(below)
    expected = explain(net(), X, "body", Y)
    assert_equal(explain(model, X, "body", Y), expected)
    runs = backend.runs
    with torch.no_grad():
        seen = GradCAM("body")(model.eval(), X, Y)
    assert_equal(seen.heatmap, expected)
    assert not seen.heatmap.requires_grad
    assert backend.runs == runs + 2


# ---- what cannot stay compiled


def lost(model, backend):
    """What is compiled behind the layer."""
    model.stem.compile(backend=backend)
    model.head.compile(backend=backend)


def around(model, backend):
    model.compile(backend=backend)


def by_function(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)


def by_its_class(model, backend):
    model.__class__ = type("Compiled", (Net,), {"forward": torch.compile(Net.forward, backend=backend)})


class WithFeatures(Net):
    """A net as timm's are."""

    def forward_features(self, x):
        return self.body(self.stem(x))

    def forward(self, x):
        return self.head(self.forward_features(x).mean(dim=(2, 3)))


def by_method(model, backend):
    model.__class__ = WithFeatures
    model.forward_features = torch.compile(model.forward_features, backend=backend)
    ran_once(model, backend)


def by_method_of_its_class(model, backend):
    model.__class__ = WithFeatures
    model.forward_features = MethodType(torch.compile(WithFeatures.forward_features, backend=backend), model)
    ran_once(model, backend)


def ran_once(model, backend):
    model.eval()(X)  # what has run compiled once would run so again, past every hook
    model.train()
    backend.runs = 0


@pytest.mark.parametrize(
    ("way", "runs"),
    [(lost, 2), (around, 0), (by_function, 0), (by_its_class, 0), (by_method, 0), (by_method_of_its_class, 0)],
)
def test_what_is_around_the_layer_or_behind_it_runs_as_written_with_one_warning(way, runs):
    model, backend = compiled(way)
    with pytest.warns(UserWarning, match=r"compile_below\(model, x, target_layer\)") as said:
        found = train(model, steps=1)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert said[0].lineno == compute_step.__code__.co_firstlineno + 1
    assert backend.runs == runs
    assert_equal(found, train(net(), steps=1))
    train(model)  # without a further warning


class Answers(dict):
    """A dictionary that has an answer to each name."""

    def __getattr__(self, name):
        return self.get(name, True)


def test_what_is_no_compiled_method_stays_what_it_is():
    compiled_square = torch.compile(torch.Tensor.square, backend="eager")
    results = []
    for square in (torch.no_grad()(compiled_square), torch.no_grad()(torch.Tensor.square)):
        model = net()
        model.square, model.helper, model.settings = square, torch.compiler.disable(torch.square), Answers()

        def forward(x, model=model):
            assert type(model.settings) is Answers
            pooled = model.body(model.stem(x)).mean(dim=(2, 3))
            return model.head(pooled) + model.square(pooled)[:, :5]

        model.forward = forward
        results.append(train(model))
    assert_equal(*results)


def test_a_compiled_function_before_the_layer_is_no_compiled_part():
    model, plain = net(), net()
    for each, function in ((model, torch.compile(torch.relu, backend="eager")), (plain, torch.relu)):
        each.stem[2].forward = lambda x, function=function: function(x)
        each.stem[2].function = function
    assert_equal(train(model, reuse_step), train(plain, reuse_step))  # which a warning would end
    assert compile_below(model, X, "body", backend="eager").names == ["stem", "body"]


def test_a_compiled_head_that_makes_its_weight_anew_shows_it():
    model, plain = net(), net()
    for each in (model, plain):
        prune.l1_unstructured(each.head, "weight", 0.5)
    model.head.compile(backend="aot_eager")
    with pytest.warns(UserWarning, match="runs as written"):
        assert_equal(train(model, explainer=CAM("body")), train(plain, explainer=CAM("body")))


def test_an_explainer_of_all_layers_runs_all_as_written():
    model, backend = compiled(below)
    with pytest.warns(UserWarning, match="runs as written"):
        found = FullGrad()(model.eval(), X, Y).heatmap
    assert_equal(found, FullGrad()(net().eval(), X, Y).heatmap)
    assert backend.runs == 0


def test_a_layer_that_is_called_twice_is_refused_when_it_is_compiled_too():
    model = net()
    model.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()).double()
    model.head = nn.Linear(6, 5).double()
    model.forward = lambda x: model.head(model.body(model.body(model.stem(x))).mean(dim=(2, 3)))
    model.body.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="a layer that the model calls once"):
        GradCAM("body")(model, X, Y)


class Saving(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class WithTail(Net):
    def __init__(self):
        model = net()
        super().__init__(model.stem, model.body, model.head)
        self.tail = Saving(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).double()

    def forward(self, x):
        return self.head(self.tail(self.body(self.stem(x))).mean(dim=(2, 3)))


class Around(nn.Module):
    """Runs two parts in checkpoints, the first of which holds the layer, or both in one."""

    def __init__(self, together):
        super().__init__()
        model = net()
        self.trunk, self.head, self.together = nn.Sequential(model.stem, model.body), model.head, together
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).double()

    def forward(self, x):
        if self.together:
            x = checkpoint(lambda x: self.tail(self.trunk(x)), x, use_reentrant=False)
        else:
            x = checkpoint(self.tail, checkpoint(self.trunk, x, use_reentrant=False), use_reentrant=False)
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(("part", "together"), [("trunk", False), ("tail", False), ("tail", True)])
@pytest.mark.parametrize("by_call", [False, True])
@pytest.mark.filterwarnings("ignore:.*runs as written")
@pytest.mark.filterwarnings("ignore:A BatchNorm behind")
def test_a_checkpoint_around_what_runs_as_written_gives_the_uncompiled_step(together, part, by_call):
    found = []
    for compiles_it in (True, False):
        model = Around(together).double()
        layer = model.get_submodule(part)
        if compiles_it and by_call:
            layer.compile(backend="aot_eager")
        elif compiles_it:
            layer.forward = torch.compile(layer.forward, backend="aot_eager")
        loss = compute_step(CGCRegularizer("trunk.1", generator=generator(0)), model)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert_equal(*found)


@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
def test_a_checkpoint_inside_what_runs_as_written_is_seen(bn_mode):
    results = []
    for way in (lambda part: part.compile(backend="aot_eager"), lambda part: None):
        model = WithTail()
        way(model.tail)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*runs as written")
            warnings.filterwarnings("ignore", "A BatchNorm behind")
            results.append(train(model, bn_mode=bn_mode))
    assert_equal(*results)


# ---- the parts


def test_the_parts_are_the_largest_that_end_with_the_layer():
    model = torchvision.models.resnet18(num_classes=5)
    parts = compile_below(model, torch.rand(2, 3, 64, 64), "layer3", backend="eager")
    assert parts.names == ["conv1", "layer1", "layer2", "layer3"]
    assert repr(parts) == "CompiledParts(conv1, layer1, layer2, layer3)"
    parts.remove()
    inside = compile_below(model, torch.rand(2, 3, 64, 64), model.layer3[0], backend="eager")
    assert inside.names == ["conv1", "layer1", "layer2", "layer3.0"]


def test_parts_are_in_the_order_of_the_pass_and_never_inside_each_other():
    a, b, c = (nn.Conv2d(3, 3, 1) for _ in range(3))
    backwards = nn.ModuleDict({"c": c, "b": b, "a": a})
    backwards.forward = lambda x: c(b(a(x))).mean(dim=(2, 3))
    parts = compile_below(backwards, X.float(), "c", backend="eager")
    assert parts.names == ["a", "b", "c"]
    parts.remove()
    aliased = nn.ModuleDict({"a": a, "encoder": nn.Sequential(a, b, c)})
    aliased.forward = lambda x: aliased.encoder(x).mean(dim=(2, 3))
    assert compile_below(aliased, X.float(), "encoder", backend="eager").names == ["encoder"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_part_stays_what_it_is():
    model = net()
    model.stem = torch.jit.script(model.stem)
    parts = compile_below(model, X, "body", backend="aot_eager")
    assert parts.names == ["body"]
    assert_equal(train(model), train(net()))


def test_removing_leaves_the_model_as_it_was():
    model = net()
    model.stem.append(nn.Dropout())
    random = torch.get_rng_state()
    before, keys = settings_of(model), model.state_dict().keys()
    parts = compile_below(model, X, "body", backend="eager")
    assert torch.equal(torch.get_rng_state(), random)
    assert model.state_dict().keys() == keys
    copy.deepcopy(parts).remove()  # of modules that run as written
    parts.remove()
    assert settings_of(model) == before
    compile_below(model, X, "body", backend="eager").remove()  # and again


def test_copies_and_files_run_as_written():
    model, backend = compiled(below)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(copied(X), net()(X))
    assert backend.runs == 0
    model.load_state_dict(model.state_dict())
    model(X)
    assert backend.runs == 2


def test_the_pass_that_looks_leaves_no_trace():
    model, untouched, x = net(), net(), X.clone()
    model.stem.insert(0, nn.ReLU(inplace=True))  # which writes on the images
    compile_below(model, x, "body", backend="eager")
    assert_same(x, X)
    assert_same([*model.state_dict().values()], [*untouched.state_dict().values()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_compiler_gives_up_on_no_part_however_many_there_are():
    """It compiles a function for eight modules, and in silence leaves the ninth as written."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(10)))
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
    runs = []

    def backend(graph, inputs):
        return lambda *inputs: runs.append(graph) or graph(*inputs)

    parts = compile_below(model, X.float(), "9", backend=backend)
    assert parts.names == [str(i) for i in range(10)]
    GradCAM("9")(model, X.float())
    assert len(runs) == len(set(runs)) == 10


def test_what_cannot_be_compiled_is_refused():
    model = net()
    model.never = nn.Conv2d(3, 3, 1)
    with pytest.raises(RuntimeError, match="'never', which it did not call"):
        compile_below(model, X, "never")
    with pytest.raises(ValueError, match="Do you mean 'body'"):
        compile_below(model, X, "bodi")
    for none in ("", None, 4, nn.Conv2d, GradCAM("body")):
        with pytest.raises(
            ValueError, match="`target_layer` must be the dotted name of a layer, or the layer itself; got"
        ):
            compile_below(model, X, none)
    with pytest.raises(ValueError, match=r"without its batch pass `x\[None\]`"):
        compile_below(model, X[0], "body")
    functions = nn.ModuleDict({"pool": nn.AvgPool2d(2), "head": nn.Linear(6, 5)})
    functions.forward = lambda x: functions.head(functions.pool(F.conv2d(x, torch.ones(6, 3, 1, 1))).mean(dim=(2, 3)))
    with pytest.raises(ValueError, match=r"before the output of 'pool' is complete; got one that runs none"):
        compile_below(functions, X.float(), "pool")
    compile_below(model, X, "body", backend="eager")
    with pytest.raises(ValueError, match=r"not be compiled yet.*`remove\(\)`"):
        compile_below(model, X, "body")


FAMILIES = [
    *("resnet18", "mnasnet0_5", "mobilenet_v3_small", "efficientnet_b0", "regnet_x_400mf", "hrnet_w18_small"),
    *("ConvNeXt, two stages", "DenseNet, three blocks", "Swin, two stages"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_nearly_all_of_a_model_is_inside_the_parts(name):
    case = next(case for case in CASES if case.name == name)
    model, _ = prepare(case)
    _, share = compiled_below(model, torch.randn(1, 3, 224, 224, dtype=torch.float64), case.layer)
    assert share > 0.95
