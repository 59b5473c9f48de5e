"""Training in two and three processes: whatever the wrapper and the loop, all processes end with one model.

Every training runs in one set of processes, started once; each process writes what it got, and the tests compare.
"""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import explainers
import gloo
import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import relu_net
from strategies import generator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.convnext import CNBlockConfig

from cgc_reg import (
    CGCRegularizer,
    Explanation,
    FullGrad,
    GradCAM,
    HiResCAM,
    RandomResizedCropFlip,
    TokensToMaps,
    compile_below,
    explain,
    expose_layer,
    suggest_target_layer,
)
from cgc_reg.model.sharded import _groups

WORLDS = [2, 3]
BATCH = 3  # of each process
X = torch.randn(max(WORLDS) * BATCH, 3, 16, 16, generator=generator(0), dtype=torch.float64)
Y = torch.arange(len(X)) % 5
T = RandomResizedCropFlip().sample(len(X), (16, 16), generator=generator(1))
SHARES = [slice(rank * BATCH, (rank + 1) * BATCH) for rank in range(max(WORLDS))]


class Prepared:
    """A sampler that draws what the test prepared."""

    def __init__(self, transform):
        self.transform = transform

    def sample(self, batch_size, image_size, *, device=None, generator=None):
        return self.transform


def regularizer(share, **options):
    return explainers.regularizer("features", transform=Prepared(T[share]), **options)


# ---- the loops: how a process gets the loss of its share


def compute(model, share, **options):
    out = regularizer(share, **options).compute(model, X[share])
    return F.cross_entropy(out.logits, Y[share]) + out.loss


def call(model, share, **options):
    return F.cross_entropy(first(model(X[share])), Y[share]) + regularizer(share, **options)(model, X[share])


def compute_alone(model, share, **options):
    return regularizer(share, **options).compute(model, X[share]).loss


def call_alone(model, share, **options):
    return regularizer(share, **options)(model, X[share])


def heatmap_alone(model, share):
    return GradCAM("features")(model, X[share]).heatmap.square().mean()


def reuse(model, share):
    reg = regularizer(share)
    with reg.reuse(model):
        return F.cross_entropy(model(X[share]), Y[share]) + reg(model, X[share])


def call_first(model, share, **options):
    loss = regularizer(share, **options)(model, X[share])
    return loss + F.cross_entropy(first(model(X[share])), Y[share])


def detached(model, share, **options):
    return compute(model, share, detach_key=True, **options)


def measure_between(model, share, **options):
    loss = regularizer(share, heatmap="grad_cam", **options).compute(model, X[share]).loss
    with torch.no_grad():
        model(X[share])  # after which the weights are freed
    return loss


def two_layers(model, share, **options):
    lower, upper = (HiResCAM(layer)(model, X[share], Y[share]) for layer in ("features.0", "features"))
    return lower.heatmap.square().mean() + upper.heatmap.square().mean() + F.cross_entropy(upper.logits, Y[share])


def theirs(model, share, **options):
    return CGCRegularizer(input_gradient, transform=Prepared(T[share]), **options)(model, X[share])


def input_gradient(model, x, target):
    x = x.detach().requires_grad_()
    logits = model(x)
    target = logits.argmax(dim=1) if target is None else target
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), x, create_graph=True)
    return Explanation(gradient.square().sum(dim=1), logits, target)


def full_grad(model, share, **options):
    return FullGrad()(model, X[share]).heatmap.sum() / (share.stop - share.start)


LOOPS = {"compute": compute, "call": call, "compute alone": compute_alone, "call alone": call_alone}
WRAPPERS = {
    "default": {},
    "no broadcast": {"broadcast_buffers": False},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
}
SHARDING = hasattr(torch.cpu.Stream, "record_event")  # FSDP2 runs on CPUs from torch 2.7 on
RECOVERS = SHARDING and hasattr(FSDPModule, "reset_iter_state")
SHARDED_LOOPS = {
    **{
        f"{name}, {heatmap}": functools.partial(loop, heatmap=heatmap)
        for name, loop in {**LOOPS, "call first": call_first, "detached": detached}.items()
        for heatmap in ("class_activation", "grad_cam")
    },
    "two layers": two_layers,
    "measure between": measure_between,
    "full_grad": full_grad,
    "an explainer of their own": theirs,
}
ACCUMULATED = "compute, grad_cam"
ALL_LOOPS = {**LOOPS, "heatmap alone": heatmap_alone, "reuse": reuse}
TRAININGS = [
    (loop, wrapper, accumulate)
    for loop, wrapper, accumulate in itertools.product(ALL_LOOPS, WRAPPERS, [False, True])
    if not (wrapper == "static graph" and accumulate)  # PyTorch's own training stops at an internal assertion there
]


# With three processes sums have an order of their own, whatever the wrapper.
OF_WORLD = {2: TRAININGS, 3: [training for training in TRAININGS if training[1] == "default"]}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def network(norm=nn.Identity):
    torch.manual_seed(0)
    return relu_net(norm).double()


def train(rank, model, inner, loop, accumulate=False, steps=3, **options):
    """Take some steps; with `accumulate`, each sums the gradients of two backwards, the first one not synchronised."""
    optimizer = torch.optim.SGD(inner.parameters(), 0.1)
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            for synchronised in [False, True] if accumulate else [True]:
                with not_synchronised(model, not synchronised):
                    loop(model, SHARES[rank], **options).backward()
            optimizer.step()
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)}
    return {name: whole(parameter).detach().clone() for name, parameter in inner.named_parameters()}


@contextlib.contextmanager
def not_synchronised(model, on):
    if hasattr(model, "no_sync"):
        with model.no_sync() if on else contextlib.nullcontext():
            yield
    else:
        for option in (model.set_requires_gradient_sync, model.set_is_last_backward) if on else ():
            option(False)
        yield
        for option in (model.set_requires_gradient_sync, model.set_is_last_backward) if on else ():
            option(True)


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def ddp(rank, loop, wrapper, accumulate):
    inner = network(nn.BatchNorm2d)
    model = DistributedDataParallel(inner, **WRAPPERS[wrapper])
    return train(rank, model, inner, ALL_LOOPS[loop], accumulate)


def compiled_ddp(rank):
    inner = network(nn.BatchNorm2d)
    model = DistributedDataParallel(torch.compile(expose_layer(inner, "features"), backend="aot_eager"))
    return train(rank, model, inner, call, heatmap="class_activation", steps=2)  # a warning if it ran as written


def compiled_below_ddp(rank, wrapper, compiles=True):
    inner = network(nn.BatchNorm2d)
    if compiles:
        compile_below(inner, X[SHARES[rank]], "features", backend="aot_eager")
    return train(rank, DistributedDataParallel(inner, **WRAPPERS[wrapper]), inner, compute, steps=2)


def sharded(rank, world, loop, inner, parts=(), reshard=False, **options):
    mesh = init_device_mesh("cpu", (world,))
    for part in parts:
        fully_shard(inner.get_submodule(part), mesh=mesh, reshard_after_forward=reshard)
    fully_shard(inner, mesh=mesh)
    end = train(rank, inner, inner, loop, gather_distributed=True, **options)
    return {"error": f"{gathered(inner)} stayed gathered", **end} if gathered(inner) else end


class Model(NamedTuple):
    """A real network, what is sharded on its own, and the layer of its heatmaps."""

    build: Callable[[], nn.Module]
    parts: list[str]
    g: GradCAM

    def made(self):
        torch.manual_seed(0)
        return self.build().double()

    def step(self, model, share, **options):
        """Have the loop's own pass last: in the backward its modules come first, and their weights would be freed."""
        loss = CGCRegularizer(self.g, transform=Prepared(T[share]), **options)(model, X[share])
        return F.cross_entropy(model(X[share]), Y[share]) + loss


def vision_transformer():
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 16, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # which torchvision begins with zeros
    return model


SHARDED_MODELS = {
    "ConvNeXt": Model(
        lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], stochastic_depth_prob=0.0, num_classes=5
        ),
        ["features.1", "features.3", "classifier"],
        GradCAM("features"),
    ),
    "ViT": Model(
        vision_transformer,
        ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "heads"],
        GradCAM("encoder.layers.encoder_layer_1.ln_1", reshape_transform=TokensToMaps((4, 4))),
    ),
}


def gathered_meanwhile(rank, world):
    """Look at FSDP's groups of weights after an inner gradient, and late in the step's backward."""
    inner, mesh = network(), init_device_mesh("cpu", (world,))
    below, above = (fully_shard(inner.get_submodule(part), mesh=mesh) for part in ("features.0", "head"))
    fully_shard(inner, mesh=mesh)
    (below,), (above,) = (_groups(part._get_fsdp_state()) for part in (below, above))
    x, late = X[SHARES[rank]].clone().requires_grad_(), []
    x.register_hook(lambda gradient: late.append((below.is_sharded, above.is_sharded)))
    heatmap = GradCAM("features")(inner, x).heatmap
    ordered = bool(below._post_forward_indices)  # its place in the order in which weights are gathered ahead
    heatmap.square().sum().backward()
    after = [(below.is_sharded, above.is_sharded)]
    for g in (GradCAM("features"), FullGrad()):
        with torch.no_grad():
            g(inner, X[SHARES[rank]])
        after.append((below.is_sharded, above.is_sharded))
    with torch.no_grad(), pytest.raises(ArithmeticError):
        explain(inner, X[SHARES[rank]], failing)
    after.append((below.is_sharded, above.is_sharded))
    return {"ordered": ordered, "late": late, "after": after}


def gathered(model):
    return [name for name, each in model.named_parameters() if not hasattr(each, "full_tensor")]


def gathered_by_a_look(rank, world):
    """Look at a sharded model before it has an optimizer; return which of its weights that left gathered.

    What the loop's own pass has gathered for its backward stays so.
    """
    mesh, looks = init_device_mesh("cpu", (world,)), {}
    for name, look in {
        "suggest": lambda model: suggest_target_layer(model, X[SHARES[rank]]),
        "compile": lambda model: compile_below(model, X[SHARES[rank]], "features", backend="eager"),
    }.items():
        model = network()
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        look(model)
        looks[name] = gathered(model)
    model = network()
    fully_shard(model, mesh=mesh)
    loss = model(X[SHARES[rank]]).sum()
    before = gathered(model)
    suggest_target_layer(model, X[SHARES[rank]])
    looks["meanwhile"] = [name for name in before if name not in gathered(model)]
    loss.backward()
    model = network()
    fully_shard(model.features[0], mesh=mesh)
    with pytest.raises(ValueError, match=r"not sharded on their own; got 'features', .*part.forward = torch.compile"):
        compile_below(model, X[SHARES[rank]], "features")
    return looks


def failing(model, x, target):
    """Take the inner gradient, and fail."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(model(x).sum(), x, create_graph=True)
    raise ArithmeticError


def after_an_error(rank, world):
    """Take a step with a heatmap, in whose backward something fails, and then one without heatmaps."""
    inner, mesh = network(), init_device_mesh("cpu", (world,))
    for part in ("features.0", "head"):
        fully_shard(inner.get_submodule(part), mesh=mesh)
    fully_shard(inner, mesh=mesh)
    x = X[SHARES[rank]].clone().requires_grad_()
    x.register_hook(fails)
    with pytest.raises(ArithmeticError):
        GradCAM("features")(inner, x).heatmap.square().sum().backward()
    inner.reset_iter_state()
    return train(rank, inner, inner, cross_entropy)


def fails(gradient):
    raise ArithmeticError


def cross_entropy(model, share):
    return F.cross_entropy(model(X[share]), Y[share])


VOLUMES = torch.randn(len(X), 2, 4, 6, 8, generator=generator(2), dtype=torch.float64)
T_OF_VOLUMES = RandomResizedCropFlip().sample(len(X), VOLUMES.shape[2:], generator=generator(3))


def volume_net():
    torch.manual_seed(0)
    layers = (
        nn.Conv3d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    return nn.Sequential(*layers).double()


def volume_step(model, share, **options):
    out = CGCRegularizer("2", transform=Prepared(T_OF_VOLUMES[share]), **options).compute(model, VOLUMES[share])
    return F.cross_entropy(out.logits, Y[share]) + out.loss


def volumes_ddp(rank):
    inner = volume_net()
    return train(rank, DistributedDataParallel(inner), inner, volume_step, gather_distributed=True)


def unequal(rank, **options):
    share = slice(0, BATCH + (rank == 0))
    try:
        regularizer(share, gather_distributed=True, **options)(network(), X[share])
    except ValueError as error:
        return {"error": str(error)}
    return {}


def work(rank):
    warnings.filterwarnings("error", category=UserWarning, module="test_")  # this package's name the caller's line
    world = torch.distributed.get_world_size()
    results = {training: ddp(rank, *training) for training in OF_WORLD[world]}
    if world == 2:  # what is compiled does not know how many there are
        results["compiled"] = compiled_ddp(rank)
        results["compiled below"] = [
            (compiled_below_ddp(rank, each), compiled_below_ddp(rank, each, False)) for each in WRAPPERS
        ]
    results["volumes"] = volumes_ddp(rank)
    results["unequal"] = unequal(rank)
    parts = ["features.0", "head"]
    if SHARDING:
        for how, divided in {"sharded": [], "sharded in parts": parts}.items():
            results[how] = {
                # The closed form reads a head after the forward, which must still be there.
                name: sharded(rank, world, loop, network(), divided, reshard="class_activation" not in name)
                for name, loop in SHARDED_LOOPS.items()
            }
        results["gathered meanwhile"] = gathered_meanwhile(rank, world)
        results["gathered by a look"] = gathered_by_a_look(rank, world)
        if RECOVERS:
            results["after an error"] = after_an_error(rank, world)
        accumulated = SHARDED_LOOPS[ACCUMULATED]
        results["accumulated"] = sharded(rank, world, accumulated, network(), parts, reshard=True, accumulate=True)
        results["sharded models"] = {
            name: sharded(rank, world, of.step, of.made(), of.parts, reshard=True)
            for name, of in SHARDED_MODELS.items()
        }
        loop = SHARDED_LOOPS["compute, class_activation"]
        results["refused"] = sharded(rank, world, loop, network(), ["head"], reshard=True)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a function from the number of processes to what they got, which starts them once."""
    return functools.cache(lambda world: gloo.run(work, world, tmp_path_factory.mktemp(f"{world}-processes")))


worlds = pytest.mark.parametrize("world", WORLDS)


@pytest.mark.parametrize(
    ("world", "training"),
    [*((world, training) for world in WORLDS for training in OF_WORLD[world]), (2, "compiled")],
    ids=str,
)
def test_all_processes_end_with_one_model_that_has_learned(results, world, training):
    ends = [result[training] for result in results(world)]
    assert "error" not in ends[0], ends[0]["error"]
    for end in ends[1:]:
        # Three processes add up in an order of their own.
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(ends[0]["features.0.weight"], network(nn.BatchNorm2d).features[0].weight)


def test_parts_compiled_below_the_layer_train_as_uncompiled(results):
    for result in results(2):
        for compiled, as_written in result["compiled below"]:
            torch.testing.assert_close(compiled, as_written, rtol=1e-12, atol=1e-12)


def trained_alone(model, loop, world, backwards=1):
    """Train on what all processes have together."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(backwards):
            loop(model, slice(0, BATCH * world)).backward()
        optimizer.step()
    return dict(model.named_parameters())


@worlds
def test_volumes_train_as_in_one_process_with_the_whole_batch(results, world):
    expected = trained_alone(volume_net(), volume_step, world)
    for result in results(world):
        assert "error" not in result["volumes"], result["volumes"]["error"]
        torch.testing.assert_close(result["volumes"], expected, rtol=1e-9, atol=1e-12)


needs_sharding = pytest.mark.skipif(not SHARDING, reason="FSDP2 runs on CPUs from torch 2.7 on")


@worlds
@needs_sharding
@pytest.mark.parametrize("how", ["sharded", "sharded in parts"])
@pytest.mark.parametrize("loop", SHARDED_LOOPS)
def test_sharded_training_is_that_of_one_process_with_the_whole_batch(results, world, how, loop):
    expected = trained_alone(network(), SHARDED_LOOPS[loop], world)
    for result in results(world):
        assert "error" not in result[how][loop], result[how][loop]["error"]
        torch.testing.assert_close(result[how][loop], expected)


@worlds
@needs_sharding
def test_a_sharded_model_accumulates_gradients(results, world):
    expected = trained_alone(network(), SHARDED_LOOPS[ACCUMULATED], world, backwards=2)
    for result in results(world):
        assert "error" not in result["accumulated"], result["accumulated"]["error"]
        torch.testing.assert_close(result["accumulated"], expected)


@worlds
@needs_sharding
def test_only_weights_above_the_layer_stay_gathered_until_the_backward_is_over(results, world):
    for result in results(world):
        expected = {"ordered": True, "late": [(True, False)], "after": 4 * [(True, True)]}
        assert result["gathered meanwhile"] == expected


@worlds
@needs_sharding
def test_a_look_leaves_all_weights_sharded_for_the_optimizer(results, world):
    for result in results(world):
        assert result["gathered by a look"] == {"suggest": [], "compile": [], "meanwhile": []}


@worlds
@pytest.mark.skipif(not RECOVERS, reason="older versions of torch cannot go on after a backward that failed")
def test_a_step_after_one_that_failed_is_that_of_one_process(results, world):
    expected = trained_alone(network(), cross_entropy, world)
    for result in results(world):
        torch.testing.assert_close(result["after an error"], expected)


@worlds
@needs_sharding
@pytest.mark.parametrize("name", SHARDED_MODELS)
def test_a_sharded_model_trains_through_attention_and_norms(results, world, name):
    of = SHARDED_MODELS[name]
    expected = trained_alone(of.made(), of.step, world)
    for result in results(world):
        assert "error" not in result["sharded models"][name], result["sharded models"][name]["error"]
        torch.testing.assert_close(result["sharded models"][name], expected, rtol=1e-6, atol=1e-9)


@worlds
@needs_sharding
def test_a_head_that_is_sharded_again_is_refused_for_cam_in_every_process(results, world):
    for result in results(world):
        assert "reshard_after_forward=False" in result["refused"]["error"]


@worlds
def test_unequal_batches_are_refused_in_every_process(results, world):
    sizes = ", ".join(["4", *["3"] * (world - 1)])
    for result in results(world):
        assert f"batches of one size in every process; got sizes {sizes}" in result["unequal"]["error"]
