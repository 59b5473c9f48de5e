"""An extra pass leaves nothing behind: not in buffers, not in frozen parameters, not in attributes."""

import copy
import warnings
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same
from strategies import generator
from torch import nn

from cgc_reg import CGCRegularizer, GradCAM, check_closed_form, explain, suggest_target_layer

X = torch.randn(4, 3, 16, 16, generator=generator(0), dtype=torch.float64)


def encoder():
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3))


class Moving(nn.Module):
    """Stores in each pass what it can: a teacher's weights, a queue, a counter, a loss beside, a list and a cache."""

    def __init__(self, move):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = encoder(), encoder().requires_grad_(False)
        self.head = nn.Linear(8, 5)
        self.move, self.passes, self.losses, self.cache = move, 0, [], {}
        self.register_buffer("queue", torch.zeros(4, 8))

    def forward(self, x):
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            self.move(own, other)
        pooled, known = (net(x).mean(dim=(2, 3)) for net in (self.student, self.teacher))
        self.queue = torch.cat([known.detach(), self.queue])[:4]
        self.passes += 1
        self.beside = F.mse_loss(pooled, known)
        self.losses.append(self.beside)
        self.cache[self.passes] = pooled
        return self.head(pooled)


def in_place(own, other):
    with torch.no_grad():
        own.mul_(0.9).add_(other, alpha=0.1)


def by_data(own, other):
    own.data.mul_(0.9).add_(other.data, alpha=0.1)


def by_new_data(own, other):
    own.data = 0.9 * own.data + 0.1 * other.data


def stored(model):
    own = {name: value for name, value in vars(model).items() if name in ("passes", "losses", "cache", "beside")}
    return copy.deepcopy({name: detached(value) for name, value in own.items()} | dict(model.state_dict()))


def detached(value):
    if isinstance(value, list):
        return [detached(each) for each in value]
    if isinstance(value, dict):
        return {key: detached(each) for key, each in value.items()}
    return value.detach() if isinstance(value, torch.Tensor) else value


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


@pytest.fixture(params=[in_place, by_data, by_new_data])
def model(request):
    return Moving(request.param).double()


def call(model):
    return CGCRegularizer("student")(model, X)


def measure(model):
    with torch.no_grad():
        return call(model)


@pytest.mark.parametrize("bn_mode", ["preserve", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_an_extra_pass_leaves_no_trace(model, bn_mode, training):
    model.train(training)
    before = stored(model)
    CGCRegularizer("student", bn_mode=bn_mode)(model, X).backward()
    same(stored(model), before)


@pytest.mark.parametrize(
    "look",
    [
        measure,
        lambda model: explain(model, X, "student"),
        lambda model: suggest_target_layer(model, X),
        lambda model: check_closed_form(model, X, "student"),
    ],
    ids=["measure", "explain", "suggest", "check"],
)
def test_looking_leaves_no_trace(model, look):
    before = stored(model)
    look(model)
    same(stored(model), before)
    copy.deepcopy(model)  # keeps no graph


def test_a_step_moves_what_one_pass_moves(model):
    twin = copy.deepcopy(model)
    twin(X)
    CGCRegularizer("student").compute(model, X).loss.backward()
    same(stored(model), stored(twin))


def test_a_loss_that_the_loop_reads_from_the_model_is_that_of_its_own_pass(model):
    model(X)
    beside = model.beside
    call(model)
    assert model.beside is beside


def test_a_pass_is_reused_whose_forward_moves_parameters(model):
    twin, g = copy.deepcopy(model), GradCAM("student")
    logits = twin(X)
    with g.reuse(model):
        assert_same(model(X), logits)
        g(model, X)
    same(stored(model), stored(twin))


@pytest.mark.parametrize("bn_mode", ["preserve", "update", "eval"])
def test_a_forward_that_writes_what_is_trained_is_warned_of_once(bn_mode):
    class Limited(nn.Linear):
        """Holds the norm of its weight, as nets for EEG do."""

        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
            return super().forward(x)

    class Net(nn.Sequential):
        def forward(self, x):
            return self.head(self.features(x).mean(dim=(2, 3)))

    model = Net()
    model.again = model.features = encoder()  # a module under two names
    model.head = Limited(8, 5)
    reg = CGCRegularizer("features", bn_mode=bn_mode)
    with pytest.warns(UserWarning, match=r"writes the parameter 'head\.weight', .*: it is trained"):
        reg(model, X.float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg(model, X.float())


def test_frozen_parameters_are_lent_once_where_they_are_shared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.again = encoder().requires_grad_(False), encoder().requires_grad_(False)
            self.again[0].weight = self.trunk[0].weight
            self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            assert self.again[0].weight is self.trunk[0].weight
            return self.head(self.last(self.trunk(x) + self.again(x)).mean(dim=(2, 3)))

    CGCRegularizer("last")(Net().double(), X).backward()


def test_a_model_whose_lazy_modules_have_not_run_is_refused_and_left_as_found():
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        return model.double()

    looks = [
        call_layer,
        lambda model: explain(model, X, "2"),
        lambda model: suggest_target_layer(model, X),
    ]
    for look in looks:
        model = net()
        with pytest.raises(RuntimeError, match=r"must be initialised by a pass of its own .* Call `model\(x\)` once"):
            look(model)
        torch.manual_seed(1)
        logits, fresh = model(X), net()
        torch.manual_seed(1)
        assert_same(logits, fresh(X))
    model = net()
    CGCRegularizer("2").compute(model, X).loss.backward()  # whose own pass comes first


def call_layer(model):
    return CGCRegularizer("2")(model, X)


def test_a_parameter_of_a_kind_of_its_own_is_not_copied():
    class Quantised(nn.Parameter):
        """Holds beside its numbers what a copy would lack."""

    class Layer(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.scale

    class Net(nn.Sequential):
        def forward(self, x):
            return self.head(self.features(x).mean(dim=(2, 3)))

    model = Net()
    model.features, model.head = encoder(), Layer(8, 5)
    model.head.weight = Quantised(model.head.weight.detach(), requires_grad=False)
    model.head.weight.scale = 2.0
    CGCRegularizer("features")(model, X.float()).backward()


class Adaptive(nn.BatchNorm2d):
    """Normalises with the batch's statistics in evaluation too, and follows them."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


class Storing(nn.Module):
    """Keeps what a forward made in containers of all kinds, in a tensor that is no buffer, and in a late buffer."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Conv2d(3, 6, 3), Adaptive(6)), nn.Linear(6, 5)
        self.ordered, self.default, self.queue, self.seen = OrderedDict(), defaultdict(list), deque(), set()
        self.total = torch.zeros(5, dtype=torch.float64)
        self.register_buffer("centre", None)

    def forward(self, x):
        features = self.features(x).mean(dim=(2, 3))
        logits = self.head(features)
        self.ordered["beside"] = logits.square().mean()
        self.default["logits"].append(logits)
        self.queue.append(logits)
        self.seen.add(len(self.seen))
        self.total += logits.detach().sum(dim=0)
        self.centre = features.detach().mean(dim=0)
        self.register_buffer("late", features.detach().clone())
        return logits


def held(model):
    containers = {name: list(getattr(model, name)) for name in ("ordered", "queue", "seen", "default")}
    return containers, model.total.clone(), {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(
    "look",
    [
        lambda model: CGCRegularizer("features")(model, X),
        lambda model: CGCRegularizer("features")(model.eval(), X),
        lambda model: explain(model, X, "features"),
        lambda model: suggest_target_layer(model, X),
    ],
    ids=["call", "call in evaluation mode", "explain", "suggest"],
)
def test_containers_plain_tensors_and_late_buffers_are_as_before(look):
    model = Storing().double()
    before = held(model)
    look(model)
    assert_same(held(model), before)
    model(X)
    beside = model.ordered["beside"]
    look(model)
    assert model.ordered["beside"] is beside


class Prepared(nn.Module):
    """Prepares evaluation in `train(False)` and undoes it in `train()`, and counts, as LeViT and LoRA layers do."""

    def __init__(self):
        super().__init__()
        self.weight, self.switched = nn.Parameter(torch.randn(8, dtype=torch.float64)), 0

    def train(self, mode=True):
        super().train(mode)
        self.switched += 1
        if not mode:
            self.ready = 2 * self.weight.detach()
        elif hasattr(self, "ready"):
            del self.ready
        return self

    def forward(self, x):
        return x + (2 * self.weight if self.training else self.ready)[:, None, None]


@pytest.mark.parametrize("look", [lambda m: explain(m, X, "0"), lambda m: suggest_target_layer(m, X)])
def test_evaluation_is_prepared_as_the_model_does_it(look):
    model = nn.Sequential(encoder(), Prepared(), nn.Flatten(), nn.LazyLinear(5)).double()
    model(X)
    with torch.no_grad():
        model[1].weight.add_(1)  # what was prepared earlier would be out of date
    before = stored(model), dict(vars(model[1]))
    found = look(model)
    same(stored(model), before[0])
    assert vars(model[1]) == before[1]
    expected = look(copy.deepcopy(model).eval())
    assert found == expected if isinstance(found, str) else assert_same(found, expected) is None


def test_a_frozen_parameter_of_a_kind_of_its_own_that_moves_is_warned_of():
    class Kind(nn.Parameter):
        """Cannot be copied."""

    model = Moving(in_place).double()
    model.teacher[0].weight = Kind(model.teacher[0].weight.detach(), requires_grad=False)
    with pytest.warns(UserWarning, match=r"writes the parameter 'teacher\.0\.weight', .*by another way"):
        call(model)


def test_a_container_that_cannot_be_emptied_is_left_alone():
    class Sealed(dict):
        def clear(self):
            raise TypeError

    model = Storing().double()
    model.output = Sealed(logits=1)
    CGCRegularizer("features")(model, X)
    assert model.output == {"logits": 1}


class Growing(nn.Module):
    """Makes its head in its first forward, as long as a flag says that there is none."""

    def __init__(self):
        super().__init__()
        self.features, self.grown = nn.Sequential(nn.Conv2d(3, 6, 3)), False

    def forward(self, x):
        features = self.features(x).mean(dim=(2, 3))
        if not self.grown:
            self.head, self.scale = nn.Linear(6, 5), nn.Parameter(torch.ones(5))
            self.grown = True
        return self.head(features) * self.scale


@pytest.mark.parametrize(
    "look",
    [
        lambda model: explain(model, X.float(), "features"),
        lambda model: suggest_target_layer(model, X.float()),
        lambda model: CGCRegularizer("features")(model, X.float()),
    ],
    ids=["explain", "suggest", "call"],
)
def test_parts_that_a_forward_makes_are_made_by_the_loops_own_pass(look):
    model = Growing()
    look(model)
    assert dict(model.named_children()).keys() == {"features"}
    assert dict(model.named_parameters()).keys() == {"features.0.weight", "features.0.bias"}
    model(X.float())
    head = model.head
    look(model)
    assert model.head is head
