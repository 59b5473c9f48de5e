"""Threads: one pass of ours at a time on one model, and interrupts that leave nothing changed."""

import ast
import contextvars
import functools
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from networks import GapNet, assert_same, buffers_of, relu_net, settings_of
from strategies import generator
from torch import nn

import cgc_reg
from cgc_reg import CGCRegularizer, GradCAM, explain, suggest_target_layer

X = torch.randn(4, 3, 16, 16, generator=generator(0))
PACKAGE = Path(cgc_reg.__file__).parent


class Passes:
    """Notes how many passes go on at once; no part of the model's state."""

    def __init__(self):
        self.going, self.most = set(), 0

    def note(self, *_):
        self.going.add(threading.get_ident())
        self.most = max(self.most, len(self.going))
        threading.Event().wait(0.02)  # lets others begin
        self.going.discard(threading.get_ident())


def in_threads(*functions):
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(function) for function in functions]]


def call(model):
    return CGCRegularizer("features", bn_mode="eval")(model, X)


def compute(model):
    return CGCRegularizer("features").compute(model, X).loss


@pytest.mark.parametrize(
    "other",
    [
        call,
        compute,
        lambda model: explain(model, X, "features"),
        lambda model: suggest_target_layer(model, X),
        lambda model: GradCAM("features")(model, X),
    ],
    ids=["call", "compute", "explain", "suggest", "g"],
)
def test_passes_of_ours_take_turns_and_leave_the_model_as_found(other):
    model, passes = relu_net(nn.BatchNorm2d), Passes()
    model.features[0].register_forward_hook(passes.note)
    before = settings_of(model)
    in_threads(*[lambda: call(model), lambda: other(model)] * 3)
    assert passes.most == 1
    assert settings_of(model) == before
    counted = buffers_of(model)["features.1.num_batches_tracked"].clone()
    for _ in range(3):
        model(X)
    assert buffers_of(model)["features.1.num_batches_tracked"] == counted + 3


def test_a_training_pass_of_ours_stays_in_training_mode_while_another_thread_explains():
    model, modes = relu_net(nn.BatchNorm2d), []
    model.features[0].register_forward_hook(Passes().note)
    model.register_forward_hook(lambda *_: modes.append((threading.get_ident(), model.features[1].training)))

    def train():
        for _ in range(3):
            GradCAM("features")(model, X)
        return threading.get_ident()

    def look():
        for _ in range(3):
            explain(model, X, "features")

    trainer, _ = in_threads(train, look)
    assert [mode for thread, mode in modes if thread == trainer] == [True] * 3


def test_two_models_do_not_wait_for_each_other():
    first, second = relu_net(), relu_net()
    meet = threading.Barrier(2, timeout=30)
    for model in (first, second):
        model.head.register_forward_hook(lambda *_: meet.wait() * 0 or None)
    in_threads(lambda: GradCAM("features")(first, X), lambda: GradCAM("features")(second, X))


class InAnotherThread(GapNet):
    """Runs its features in a worker thread."""

    def __init__(self, net, with_context):
        super().__init__(*net.features, head=net.head)
        self.with_context = with_context

    def forward(self, x):
        run = contextvars.copy_context().run if self.with_context else lambda function, x: function(x)
        (features,) = in_threads(lambda: run(self.features, x))
        return self.head(features.mean(dim=(2, 3)))


def test_a_layer_that_runs_in_another_thread_is_said_to():
    with pytest.raises(RuntimeError, match=r"'features', which it did not call\. It ran in another thread"):
        GradCAM("features")(InAnotherThread(relu_net(), with_context=False), X)
    net = relu_net()
    seen = GradCAM("features")(InAnotherThread(net, with_context=True), X)
    assert_same(seen.heatmap, GradCAM("features")(net, X).heatmap)


# ---- interrupts


@functools.cache
def lines_without_interrupts():
    """List the lines inside `finally` in the package, where an interrupt comes too late, and those of `try` and `with`.

    Python tells of these where it heeds no signal: at the end of a block once more, or outside of what guards it.
    """
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.With):
                first, last = node.lineno, node.body[0].lineno - 1
            elif isinstance(node, ast.Try) and node.finalbody:
                found.add((str(path), node.lineno))
                first, last = node.finalbody[0].lineno, node.finalbody[-1].end_lineno
            else:
                continue
            found |= {(str(path), line) for line in range(first, last + 1)}
    return found


class Lines:
    """Notes the lines of the package's `model` folder as they run, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at=None):
        self.at, self.run, self.spared = at, [], lines_without_interrupts()

    def __call__(self, frame, event, arg):
        line = frame.f_code.co_filename, frame.f_lineno
        if not line[0].startswith(str(PACKAGE / "model")):
            return None
        if event == "line" and line not in self.spared:
            self.run.append(line)
            if len(self.run) == self.at:
                raise KeyboardInterrupt
        return self


def traced(function, lines):
    before = sys.gettrace()
    try:
        sys.settrace(lines)
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines.run


def state(model):
    kernels = torch.backends.cuda
    fused = kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()
    identities = {name: id(tensor) for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    return settings_of(model), identities, fused, torch.is_grad_enabled()


@pytest.mark.parametrize("look", [call, lambda model: explain(model, X, "features")], ids=["call", "explain"])
def test_an_interrupt_anywhere_leaves_the_model_as_found(look):
    torch.manual_seed(0)
    model = GapNet(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), head=nn.Linear(4, 3))
    look(model)  # what is looked at once is behind us
    before = state(model)
    run = traced(lambda: look(model), Lines())
    first = {line: at for at, line in reversed(list(enumerate(run, 1)))}
    for at in first.values():
        assert traced(lambda: look(model), Lines(at))[-1] == run[at - 1]
        if state(model) != before:
            gc.collect()  # ends what the interrupted frames held open
        assert state(model) == before, run[at - 1]


@pytest.mark.parametrize("name", ["training", "num_batches_tracked"])
def test_an_interrupt_right_behind_a_change_of_a_setting_leaves_the_model_as_found(name):
    class Interrupted(nn.BatchNorm2d):
        def __setattr__(self, changed, value):
            super().__setattr__(changed, value)
            if changed == name and self.armed:
                vars(self)["armed"] = False
                raise KeyboardInterrupt

        armed = False

    model = relu_net(Interrupted)
    before = state(model)
    vars(model.features[1])["armed"] = True
    with pytest.raises(KeyboardInterrupt):
        call(model)
    del vars(model.features[1])["armed"]
    assert state(model) == before
