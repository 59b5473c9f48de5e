"""On a GPU a step gives what it gives on the CPU, and never waits for it."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from explainers import EXPLAINERS, explainer
from networks import assert_same, relu_net
from strategies import generator
from torch import nn

from cgc_reg import (
    CGCRegularizer,
    Compose,
    RandomAffine,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCropFlip,
    compile_below,
)

pytestmark = pytest.mark.cuda

X = torch.randn(6, 3, 64, 64, generator=generator(0))
Y = torch.tensor([0, 3, 1, 4, 2, 2])
SAMPLERS = [
    RandomResizedCropFlip(),
    RandomAffine(10, (0.1, 0.1), (0.9, 1.1), 5),
    Compose([RandomFlip(), RandomQuarterTurn()]),
]


def step(reg, model, x, y):
    out = reg.compute(model, x)
    return F.cross_entropy(out.logits, y) + out.loss


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5)


@pytest.mark.parametrize("heatmap", EXPLAINERS)
@pytest.mark.parametrize("transform", SAMPLERS, ids=["crop", "affine", "turn"])
def test_loss_and_gradients_are_those_of_the_cpu(heatmap, transform):
    model = relu_net(nn.BatchNorm2d).double()
    # The generator's device decides where T is drawn, so that both devices get one draw.
    losses = {}
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        reg = CGCRegularizer(explainer("features", heatmap), transform=transform, generator=generator(0))
        loss = step(reg, twin, X.double().to(device), Y.to(device))
        loss.backward()
        losses[device] = {"loss": loss.detach(), **{name: p.grad for name, p in twin.named_parameters()}}
    torch.testing.assert_close(losses["cuda"], losses["cpu"], check_device=False)


@pytest.mark.parametrize("heatmap", EXPLAINERS)
@pytest.mark.parametrize("transform", SAMPLERS, ids=["crop", "affine", "turn"])
def test_a_step_never_waits_for_the_gpu(heatmap, transform):
    model, x, y = resnet().cuda(), X.cuda(), Y.cuda()
    reg = CGCRegularizer(explainer("layer4", heatmap), transform=transform)
    step(reg, model, x, y).backward()  # the first one loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(reg, model, x, y).backward()
        reg(model, x, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_never_waits_and_is_the_uncompiled_one(backend):
    losses = {}
    for compiles in (False, True):
        model, x, y = resnet().double().cuda(), X.double().cuda(), Y.cuda()
        if compiles:
            compile_below(model, x, "layer4", backend=backend)
        step(CGCRegularizer("layer4"), model, x, y).backward()  # the first one compiles
        model.zero_grad()
        reg = CGCRegularizer("layer4", generator=torch.Generator("cuda").manual_seed(0))
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = step(reg, model, x, y)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses[compiles] = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transform", SAMPLERS, ids=["crop", "affine", "turn"])
def test_deterministic_algorithms_work_and_repeat(transform, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as PyTorch asks for
    torch.use_deterministic_algorithms(True)
    try:
        ends = []
        for _ in range(2):
            model = resnet().cuda()
            reg = CGCRegularizer("layer4", transform=transform, generator=generator(0))
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            for _ in range(3):
                optimizer.zero_grad()
                step(reg, model, X.cuda(), Y.cuda()).backward()
                optimizer.step()
            ends.append(model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(*ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_with_a_scaler_trains_200_steps(dtype, memory_format):
    model = resnet().cuda().to(memory_format=memory_format)
    x, y = X.cuda().contiguous(memory_format=memory_format), Y.cuda()
    exact = CGCRegularizer("layer4", generator=generator(0))(model, x, y)
    with torch.autocast("cuda", dtype):
        loss = CGCRegularizer("layer4", generator=generator(0))(model, x, y)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    reg, losses = CGCRegularizer("layer4"), []
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = step(reg, model, x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    assert losses.isfinite().all()
    assert losses[-20:].mean() < losses[:20].mean()


def test_memory_does_not_grow():
    model, x, y, reg = resnet().cuda(), X.cuda(), Y.cuda(), CGCRegularizer("layer4")

    def held_after(count):
        for _ in range(count):
            model.zero_grad()
            step(reg, model, x, y).backward()
        return torch.cuda.memory_allocated()

    held_after(5)
    before = held_after(1)
    assert held_after(200) == before
