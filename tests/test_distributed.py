"""Two real processes against one with the whole batch.

Every scenario runs in one pair of processes, started once; each process writes what it got, and the tests compare.
"""

import warnings

import gloo
import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, buffers_of, gradients, relu_net
from strategies import generator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cgc_reg import (
    CGCRegularizer,
    Explanation,
    FullGrad,
    GradCAM,
    LayerCAM,
    RandomResizedCropFlip,
    explain,
    info_nce,
    suggest_target_layer,
)

PROCESSES = 2
X = torch.randn(6, 3, 16, 16, generator=generator(0), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 4, 2, 2])
TRANSFORM = RandomResizedCropFlip().sample(6, (16, 16), generator=generator(1))
SHARE = [slice(0, 3), slice(3, 6)]


class Prepared:
    """A sampler that draws what the test prepared."""

    def __init__(self, transform):
        self.transform = transform

    def sample(self, batch_size, image_size, *, device=None, generator=None):
        return self.transform


def network(norm=nn.Identity):
    torch.manual_seed(0)
    return relu_net(norm).double()


def regularizer(share, **options):
    return CGCRegularizer("features", transform=Prepared(TRANSFORM[share]), **options)


# ---- the scenarios: how a model is wrapped, and how one process gets its loss


def call(model, share, **options):
    return regularizer(share, **options)(model, X[share])


def gathered_call(model, share):
    return call(model, share, gather_distributed=True)


def gathered_official_call(model, share):
    return call(model, share, gather_distributed=True, negatives="official")


def compute_step(model, share):
    out = regularizer(share, gather_distributed=True).compute(model, X[share])
    return F.cross_entropy(out.logits, Y[share]) + out.loss


def call_step(model, share):
    return F.cross_entropy(model(X[share]), Y[share]) + regularizer(share, gather_distributed=True)(model, X[share])


def call_step_of_the_module(model, share):
    module = model.module if isinstance(model, DistributedDataParallel) else model
    cgc = regularizer(share, gather_distributed=True)(module, X[share])
    return F.cross_entropy(model(X[share]), Y[share]) + cgc


def heatmap_alone(model, share):
    return GradCAM("features")(model, X[share], Y[share]).heatmap.square().sum(dim=(1, 2)).mean()


def heatmap_step(model, share):
    seen = GradCAM("features")(model, X[share], Y[share])
    return F.cross_entropy(seen.logits, Y[share]) + seen.heatmap.square().sum(dim=(1, 2)).mean()


def heatmaps_of_two_layers(model, share):
    return heatmap_step(model, share) + LayerCAM("features.2")(model, X[share], Y[share]).heatmap.mean()


def heatmap_of_the_loops_pass(model, share):
    g = GradCAM("features")
    with g.reuse(model):
        logits = model(X[share])
        heatmap = g(model, X[share], Y[share]).heatmap
    return F.cross_entropy(logits, Y[share]) + heatmap.square().sum(dim=(1, 2)).mean()


def plain(model):
    return model


def compiled_outside(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


def compiled_inside(model):
    return DistributedDataParallel(torch.compile(model, backend="eager"))


SCENARIOS = {
    "local": (plain, call),
    "gathered": (plain, gathered_call),
    "gathered official": (plain, gathered_official_call),
    "compute": (DistributedDataParallel, compute_step),
    "call": (DistributedDataParallel, call_step),
    "call of the module": (DistributedDataParallel, call_step_of_the_module),
    "compute, compiled outside": (compiled_outside, compute_step),
    "call, compiled outside": (compiled_outside, call_step),
    "compute, compiled inside": (compiled_inside, compute_step),
    "call, compiled inside": (compiled_inside, call_step),
}
HEATMAP_STEPS = {
    "heatmap alone": heatmap_alone,
    "heatmap": heatmap_step,
    "heatmaps of two layers": heatmaps_of_two_layers,
    "heatmap of the loop's pass": heatmap_of_the_loops_pass,
}


def saliency(model, x, target):
    x = x.detach().requires_grad_()
    logits = model(x)
    target = logits.argmax(dim=1) if target is None else target
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), x, create_graph=True)
    return Explanation(gradient.abs().amax(dim=1), logits, target)


def foreign_call(model, share):
    return CGCRegularizer(saliency, transform=Prepared(TRANSFORM[share]), gather_distributed=True)(
        model, X[share], Y[share]
    )


def static_graph(model):
    return DistributedDataParallel(model, static_graph=True)


SCENARIOS["foreign explainer"] = (DistributedDataParallel, foreign_call)
SCENARIOS["foreign explainer, static graph"] = (static_graph, foreign_call)
SCENARIOS |= {name: (DistributedDataParallel, step) for name, step in HEATMAP_STEPS.items()}
STEPS = [name for name in SCENARIOS if name.startswith(("compute", "call"))]


def outcome(wrap, step, rank):
    model = network()
    wrapped = wrap(model)
    try:
        loss = step(wrapped, SHARE[rank])
        loss.backward()
    except RuntimeError as error:
        return {"error": str(error)}
    # CGC does not depend on a linear head's bias, whose gradient stays None.
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **grads}


def buffers_after(rank, *passes):
    """Run passes of a network with batch normalisation, of whose statistics each process has its own between passes."""
    model = network(nn.BatchNorm2d)
    ddp = DistributedDataParallel(model)
    for run in passes:
        run(ddp, SHARE[rank])
    return buffers_of(model)


def step_in_update_mode(rank):
    """Take a step whose extra passes write running statistics; return the passes that went through the wrapper."""
    ddp, passes = DistributedDataParallel(network(nn.BatchNorm2d)), []
    ddp.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    plain = F.cross_entropy(ddp(X[SHARE[rank]]), Y[SHARE[rank]])
    try:
        (plain + call(ddp, SHARE[rank], bn_mode="update")).backward()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"passes": len(passes)}


def plain_pass(model, share):
    model(X[share])


def compute(model, share):
    regularizer(share).compute(model, X[share])


def look(model, share):
    explain(model, X[share], "features")
    suggest_target_layer(model, X[share])


class Step(nn.Module):
    """A model whose forward is the training step, as Lightning has it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return regularizer(SHARE[0]).compute(self.model, x).loss


def look_without_gradients(model, x):
    with torch.no_grad():
        regularizer(SHARE[0]).compute(model.module, x)


def accumulate(model, x):
    with model.no_sync():
        regularizer(SHARE[0]).compute(model.module, x)


def accumulate_and_step(model, x):
    accumulate(model, x)
    regularizer(SHARE[0]).compute(model.module, x)


BYPASSING = {
    "the module after an accumulation": accumulate_and_step,
    "the module": lambda model, x: regularizer(SHARE[0]).compute(model.module, x),
    "the compiled module": lambda model, x: regularizer(SHARE[0]).compute(
        torch.compile(model.module, backend="eager"), x
    ),
    "the module, by an explainer": lambda model, x: GradCAM("features")(model.module, x),
    "the module, by all of its layers": lambda model, x: FullGrad()(model.module, x),
    "a part of it": lambda model, x: regularizer(SHARE[0]).compute(model.module.model, x),
}
SYNCHRONISED = {
    "the wrapper": lambda model, x: regularizer(SHARE[0]).compute(model, x),
    "the compiled wrapper": lambda model, x: regularizer(SHARE[0]).compute(torch.compile(model, backend="eager"), x),
    "a model without one": lambda model, x: regularizer(SHARE[0]).compute(network(), x),
    "inside its forward": lambda model, x: model(x),
    "without gradients": look_without_gradients,
    "while gradients accumulate": accumulate,
    "beside a pass of the wrapper": lambda model, x: model(x).sum() + regularizer(SHARE[0])(model.module, x),
}


def warnings_of(name):
    """Count the warnings of a pass around DistributedDataParallel that two steps give."""
    stepping = name in ("a part of it", "inside its forward")
    model = DistributedDataParallel(Step(network()) if stepping else network())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            (BYPASSING | SYNCHRONISED)[name](model, X[SHARE[0]])
    return [warning.filename for warning in caught if "goes around" in str(warning.message)]


def work(rank):
    results = {name: outcome(*scenario, rank) for name, scenario in SCENARIOS.items()}
    results["one pass"] = buffers_after(rank, plain_pass)
    results["one pass and extra ones"] = buffers_after(rank, plain_pass, call, look)
    results["two passes"] = buffers_after(rank, plain_pass, plain_pass)
    results["one pass and compute"] = buffers_after(rank, plain_pass, compute)
    results["update"] = step_in_update_mode(rank)
    ddp = DistributedDataParallel(network(nn.BatchNorm2d))
    if rank == 0:  # where a broadcast would wait for the other process
        with torch.no_grad():
            results["measured alone"] = call(ddp, SHARE[rank])
    results["warnings"] = {name: warnings_of(name) for name in BYPASSING | SYNCHRONISED}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return gloo.run(work, PROCESSES, tmp_path_factory.mktemp("processes"))


def mean(results, name):
    first, second = (result[name] for result in results)
    assert "error" not in first, first["error"]
    return {key: (first[key] + second[key]) / 2 for key in first}


def alone(step, share=slice(0, 6)):
    model = network()
    loss = step(model, share)
    return {"loss": loss.detach(), **gradients(loss, model)}


def plain_step(model, share):
    return F.cross_entropy(model(X[share]), Y[share]) + call(model, share)


def test_averaged_gradients_of_gathered_keys_are_those_of_the_global_batch(results):
    torch.testing.assert_close(mean(results, "gathered"), alone(call))


def test_averaged_gradients_hold_for_the_authors_negatives_too(results):
    torch.testing.assert_close(
        mean(results, "gathered official"), alone(lambda model, share: call(model, share, negatives="official"))
    )


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_without_gathering_each_process_has_its_own_batch(results, rank):
    torch.testing.assert_close(results[rank]["local"], alone(call, SHARE[rank]))


def test_gathering_makes_a_difference(results):
    gathered, local = mean(results, "gathered"), mean(results, "local")
    assert gathered["loss"] > local["loss"]  # more negatives, larger denominator
    assert not torch.allclose(gathered["head.weight"], local["head.weight"])


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rank", range(PROCESSES))
def test_data_parallel_training_has_the_gradients_of_the_global_batch(results, name, rank):
    expected = alone(plain_step)
    actual = {**results[rank][name], "loss": expected["loss"]}  # the loss is that of the process's own share
    assert "error" not in actual, actual["error"]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", HEATMAP_STEPS)
@pytest.mark.parametrize("rank", range(PROCESSES))
def test_a_loss_on_the_heatmap_has_the_gradients_of_the_global_batch(results, name, rank):
    expected = alone(HEATMAP_STEPS[name])
    actual = {**results[rank][name], "loss": expected["loss"]}
    assert "error" not in actual, actual["error"]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_a_foreign_explainer_has_the_gradients_of_the_global_batch(results, rank):
    model = network()
    loss = CGCRegularizer(saliency, transform=Prepared(TRANSFORM))(model, X, Y)
    expected = {"loss": loss.detach(), **gradients(loss, model)}
    actual = {**results[rank]["foreign explainer"], "loss": expected["loss"]}
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_a_foreign_explainer_is_refused_where_its_gradient_would_end_the_step(results, rank):
    assert "Leave out `static_graph=True`" in results[rank]["foreign explainer, static graph"]["error"]


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_extra_passes_do_not_broadcast_buffers(results, rank):
    assert_same(results[rank]["one pass and extra ones"], results[rank]["one pass"])
    assert_same(results[rank]["one pass and compute"], results[rank]["two passes"])


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_extra_passes_may_write_statistics_and_the_views_goes_around_the_wrapper(results, rank):
    assert results[rank]["update"] == {"passes": 2}  # the loop's, and that over x


def test_one_process_may_measure_alone(results):
    assert results[0]["measured alone"].isfinite()


def test_running_statistics_differ_between_processes(results):
    # Else the test before shows nothing.
    first, second = (result["one pass"]["features.1.running_mean"] for result in results)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_a_pass_around_the_wrapper_is_warned_of_once(results, rank):
    assert results[rank]["warnings"] == {name: [__file__] * (name in BYPASSING) for name in BYPASSING | SYNCHRONISED}


def test_gathering_needs_a_process_group():
    with pytest.raises(RuntimeError, match=r"`gather_distributed=True`.*init_process_group"):
        info_nce(torch.rand(2, 3, 3), torch.rand(2, 3, 3), gather_distributed=True)
    with pytest.raises(RuntimeError, match=r"`gather_distributed=True`.*init_process_group"):
        gathered_call(network(), SHARE[0])
