"""Training in two and three processes: whatever the wrapper and the loop, all processes end with one model.

Every training runs in one set of processes, started once; each process writes what it got, and the tests compare.
"""

import contextlib
import functools
import itertools
import warnings

import explainers
import gloo
import pytest
import torch
import torch.nn.functional as F
from networks import relu_net
from strategies import generator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cgc_reg import FullGrad, GradCAM, RandomResizedCropFlip, compile_below, expose_layer

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


def full_grad(model, share, **options):
    return FullGrad()(model, X[share]).heatmap.sum()


LOOPS = {"compute": compute, "call": call, "compute alone": compute_alone, "call alone": call_alone}
WRAPPERS = {
    "default": {},
    "no broadcast": {"broadcast_buffers": False},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
}
SHARDING = hasattr(torch.cpu.Stream, "record_event")  # FSDP2 runs on CPUs from torch 2.7 on
SHARDED_LOOPS = LOOPS if SHARDING else ()
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
                with contextlib.nullcontext() if synchronised else model.no_sync():
                    loop(model, SHARES[rank], **options).backward()
            optimizer.step()
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)}
    return {name: whole(parameter).detach().clone() for name, parameter in inner.named_parameters()}


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def ddp(rank, loop, wrapper, accumulate):
    inner = network(nn.BatchNorm2d)
    model = DistributedDataParallel(inner, **WRAPPERS[wrapper])
    return train(rank, model, inner, ALL_LOOPS[loop], accumulate)


def compiled_ddp(rank):
    inner = network(nn.BatchNorm2d)
    model = DistributedDataParallel(torch.compile(expose_layer(inner, "features"), backend="aot_eager"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The model is compiled")  # and would run as written
        return train(rank, model, inner, call, heatmap="class_activation", steps=2)


def compiled_below_ddp(rank, wrapper, compiles=True):
    inner = network(nn.BatchNorm2d)
    if compiles:
        compile_below(inner, X[SHARES[rank]], "features", backend="aot_eager")
    return train(rank, DistributedDataParallel(inner, **WRAPPERS[wrapper]), inner, compute, steps=2)


def sharded(rank, world, loop, parts=(), **options):
    inner = network()
    mesh = init_device_mesh("cpu", (world,))
    for part in parts:
        fully_shard(inner.get_submodule(part), mesh=mesh, reshard_after_forward=options.pop("reshard", False))
    fully_shard(inner, mesh=mesh)
    options.setdefault("heatmap", "class_activation")
    return train(rank, inner, inner, {**LOOPS, "full_grad": full_grad}[loop], gather_distributed=True, **options)


def unequal(rank, **options):
    share = slice(0, BATCH + (rank == 0))
    try:
        regularizer(share, gather_distributed=True, **options)(network(), X[share])
    except ValueError as error:
        return {"error": str(error)}
    return {}


def work(rank):
    world = torch.distributed.get_world_size()
    results = {training: ddp(rank, *training) for training in OF_WORLD[world]}
    if world == 2:  # what is compiled does not know how many there are
        results["compiled"] = compiled_ddp(rank)
        results["compiled below"] = [
            (compiled_below_ddp(rank, each), compiled_below_ddp(rank, each, False)) for each in WRAPPERS
        ]
    results["unequal"] = unequal(rank)
    results["sharded"] = {loop: sharded(rank, world, loop) for loop in SHARDED_LOOPS}
    parts = ["features.0", "head"]
    results["sharded in parts"] = {loop: sharded(rank, world, loop, parts) for loop in SHARDED_LOOPS}
    results["refused"] = [sharded(rank, world, "compute", heatmap="grad_cam"), sharded(rank, world, "full_grad")]
    if SHARDING:
        results["refused"].append(sharded(rank, world, "compute", ["head"], reshard=True))
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


@worlds
@pytest.mark.parametrize("how", ["sharded", "sharded in parts"])
@pytest.mark.parametrize("loop", SHARDED_LOOPS)
def test_sharded_training_is_that_of_one_process_with_the_whole_batch(results, world, how, loop):
    model = network()
    share = slice(0, BATCH * world)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        LOOPS[loop](model, share, heatmap="class_activation").backward()
        optimizer.step()
    for result in results(world):
        assert "error" not in result[how][loop], result[how][loop]["error"]
        torch.testing.assert_close(result[how][loop], dict(model.named_parameters()))


@worlds
def test_what_a_sharded_model_cannot_do_is_refused_in_every_process(results, world):
    for result in results(world):
        messages = ["got GradCAM", "got FullGrad", "reshard_after_forward=False"]
        for refused, message in zip(result["refused"], messages, strict=False):
            assert message in refused["error"]


@worlds
def test_unequal_batches_are_refused_in_every_process(results, world):
    sizes = ", ".join(["4", *["3"] * (world - 1)])
    for result in results(world):
        assert f"batches of one size in every process; got sizes {sizes}" in result["unequal"]["error"]
