"""The whole step: against a slow and obvious version, against finite differences, and option by option."""

import collections
import copy
import dataclasses
import gc
import math
import types
import warnings
import weakref

import explainers
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from explainers import EXPLAINERS, RULES
from networks import (
    GapNet,
    LinearProbe,
    assert_same,
    buffers_of,
    cell_net,
    gradients,
    relu_net,
    settings_of,
    smooth_net,
)
from strategies import generator
from torch import nn

from cgc_reg import (
    CGCOutput,
    CGCRegularizer,
    RandomAffine,
    RandomResizedCropFlip,
    SpatialTransform,
    consistency,
    explain,
    grad_cam,
    info_nce,
    mse_consistency,
    suggest_target_layer,
)

X = torch.randn(4, 3, 16, 16, generator=generator(0))
Y = torch.tensor([0, 3, 1, 4])
CROP, AFFINE = RandomResizedCropFlip(), RandomAffine(degrees=40, translate=(0.3, 0.3), scale=(0.7, 1.3), shear=10)


def regularizer(target_layer="features", **options):
    """Draw the same views in every call of a test that makes one."""
    return explainers.regularizer(target_layer, generator=generator(0), **options)


def drawn(x, sampler=AFFINE):
    """Return a view and its transform, for tests that run one pair many times."""
    transform = sampler.sample(len(x), tuple(x.shape[2:]), generator=generator(1))
    return transform(x), transform


# ---- the step, slowly


def slow_transform(image, theta, size):
    """Read an image (h, w) at T's positions, one output pixel after the other; tell which positions are inside it."""
    height, width = image.shape
    (a, b, c), (d, e, f) = theta.tolist()
    values, inside = [], []
    for i in range(size[0]):
        for j in range(size[1]):
            u, v = (2 * j + 1) / size[1] - 1, (2 * i + 1) / size[0] - 1
            x, y = a * u + b * v + c, d * u + e * v + f
            inside.append(float(abs(x) <= 1 and abs(y) <= 1))
            column = min(max(((x + 1) * width - 1) / 2, 0), width - 1)
            row = min(max(((y + 1) * height - 1) / 2, 0), height - 1)
            left, top = int(column), int(row)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            upper = image[top, left] * (left + 1 - column) + image[top, right] * (column - left)
            lower = image[bottom, left] * (left + 1 - column) + image[bottom, right] * (column - left)
            values.append(upper * (top + 1 - row) + lower * (row - top))
    return torch.stack(values).view(size), torch.tensor(inside, dtype=torch.float64).view(size)


def slow_heatmap(net, image, k, heatmap):
    """Compute the heatmap (h, w) of one image (c, h, w)."""
    a = net.features(image[None])
    (g,) = torch.autograd.grad(net.head(a.mean(dim=(2, 3)))[0, k], a, create_graph=True)
    total = 0
    for c in range(a.shape[1]):
        total = total + a[0, c] * {
            "grad_cam": lambda c: g[0, c].mean(),
            "hires_cam": lambda c: g[0, c],
            "layer_cam": lambda c: g[0, c].clamp(min=0),
            "positive_grad_cam": lambda c: g[0, c].clamp(min=0).mean(),
            "grad_cam_plus_plus": lambda c: sum(
                d * d**2 / (2 * d**2 + d**3 * a[0, c].sum()) for d in g[0, c].flatten() if d > 0
            ),
            "xgrad_cam": lambda c: (g[0, c] * a[0, c]).sum() / a[0, c].sum() if a[0, c].sum() > 0 else 0,
            "class_activation": lambda c: net.head.weight[k, c],
        }[heatmap](c)
    return total.clamp(min=0)


def slow_step(net, x, target, thetas, *, heatmap, negatives="keys", temperature=0.5):
    """Do the step as the paper writes it, image by image and term by term."""
    queries, keys, views = [], [], []
    for image, k, theta in zip(x, target, thetas, strict=True):
        view = torch.stack([slow_transform(channel, theta, channel.shape)[0] for channel in image])
        key = slow_heatmap(net, view, k, heatmap)
        query, inside = slow_transform(slow_heatmap(net, image, k, heatmap), theta, key.shape)
        views.append(view)
        queries.append(query * inside)
        keys.append(key * inside)

    def sim(a, b):
        return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()

    losses = []
    for i in range(len(x)):
        anchor = queries[i] if negatives == "keys" else keys[i]
        positive = (sim(queries[i], keys[i]) / temperature).exp()
        others = sum((sim(anchor, keys[j]) / temperature).exp() for j in range(len(x)) if j != i)
        losses.append(-(positive / (positive + others)).log())
    return sum(losses) / len(x), torch.stack(views), torch.stack(queries), torch.stack(keys)


def deep_head_net():
    net = relu_net()
    net.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    return net


@pytest.mark.parametrize("transform", [CROP, AFFINE], ids=["crop", "affine"])
@pytest.mark.parametrize("negatives", ["keys", "official"])
@pytest.mark.parametrize(
    ("heatmap", "build"), [*((rule, deep_head_net) for rule in RULES), ("class_activation", relu_net)]
)
def test_step_equals_the_slow_one(heatmap, build, negatives, transform):
    net, x = build().double(), X.double()
    reg = regularizer(transform=transform, heatmap=heatmap, negatives=negatives, temperature=0.3)
    out = reg.compute(net, x)
    loss, view, query, key = slow_step(
        net, x, out.target, out.transform.theta, heatmap=heatmap, negatives=negatives, temperature=0.3
    )
    assert out.scalars["blank_share"] == 0
    torch.testing.assert_close((out.view, out.query, out.key, out.loss), (view, query, key, loss))
    torch.testing.assert_close(gradients(out.loss, net), gradients(loss, net))


# ---- the gradient


@pytest.mark.parametrize(
    "heatmap",
    [lambda a, g: (g.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1), "grad_cam", "hires_cam"],
    ids=["smooth", "grad_cam", "hires_cam"],
)
def test_gradient_of_every_parameter_equals_finite_differences(heatmap):
    net, x, target = smooth_net(), X[:3, :, :8, :8].double(), torch.tensor([2, 0, 1])
    view, transform = drawn(x)
    reg = regularizer(heatmap=heatmap)
    assert reg.compute(net, x, target, view, transform).scalars["blank_share"] == 0
    # gradcheck moves its inputs' entries in place: the parameters themselves.
    parameters = tuple(net.parameters())
    assert torch.autograd.gradcheck(lambda *_: reg.compute(net, x, target, view, transform).loss, parameters)


def test_gradient_reaches_the_head_through_the_scores_gradient_alone():
    # A detached inner gradient would leave the head without any: this is the second-order path.
    net = smooth_net()
    found = gradients(regularizer()(net, X.double()), net)
    assert found["head.0.weight"].norm() > 0
    assert found["head.2.weight"].norm() > 0


def bottleneck_resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)


def small_densenet():
    return torchvision.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=5)


def timm_resnet():
    return timm.create_model("test_resnet", num_classes=5)


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: torchvision.models.resnet18(num_classes=5), "layer4"),
        (bottleneck_resnet, "layer4"),
        (small_densenet, "features"),
        (timm_resnet, "layer4"),
    ],
    ids=["resnet18", "bottleneck", "densenet", "timm"],
)
def test_real_network_trains(build, layer):
    # In float64, so that what a tiny step gains is measured and not rounded.
    model, x = build().double(), F.interpolate(X.double(), size=(64, 64), mode="bilinear")
    view, transform = drawn(x, CROP)
    reg = regularizer(layer)
    before = reg.compute(model, x, Y, view, transform).loss
    before.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    moved = [p for p in model.parameters() if p.grad is not None]
    slope = torch.stack([p.grad.norm() for p in moved]).norm()
    step = 1e-6
    with torch.no_grad():
        for p in moved:
            p -= step * p.grad / slope
    after = reg.compute(model, x, Y, view, transform).loss
    # First order: the loss falls by step * slope, to 1 % for a step this small on a surface of ReLUs.
    assert (before - after).item() == pytest.approx((step * slope).item(), rel=0.01)


# ---- one call or two


@pytest.mark.parametrize("heatmap", EXPLAINERS)
def test_regularizer_and_compute_give_one_loss(heatmap):
    model = relu_net(nn.BatchNorm2d)
    called = regularizer(heatmap=heatmap)(model, X)
    computed = regularizer(heatmap=heatmap).compute(model, X).loss
    torch.testing.assert_close(computed, called)
    torch.testing.assert_close(gradients(computed, model), gradients(called, model))


def test_output_holds_what_the_step_made():
    model = relu_net().eval()
    out = regularizer(transform=AFFINE).compute(model, X)
    assert isinstance(out, CGCOutput)
    coverage = out.transform.coverage((4, 4))
    assert 0 < coverage.mean() < 1
    assert_same(out.view, out.transform(X))
    assert_same(out.logits, model(X))
    assert_same(out.view_logits, model(out.view))
    assert_same(out.target, out.logits.argmax(dim=1))
    assert_same(out.heatmap, explain(model, X, "features"))
    torch.testing.assert_close(out.query, out.transform(out.heatmap) * coverage)
    torch.testing.assert_close(out.key, explain(model, out.view, "features", out.target) * coverage)
    torch.testing.assert_close(out.loss, info_nce(out.query, out.key))


def test_logits_of_compute_train_as_those_of_a_plain_pass():
    model = relu_net(nn.BatchNorm2d)
    loss = F.cross_entropy(regularizer().compute(model, X).logits, Y)
    torch.testing.assert_close(gradients(loss, model), gradients(F.cross_entropy(model(X), Y), model))


def test_scalars_are_the_loss_and_the_consistency():
    out = regularizer().compute(relu_net(), X)
    expected = {"loss": out.loss.detach(), "weight": torch.tensor(1.0), **consistency(out.query, out.key)}
    assert_same(out.scalars, expected)
    assert not any(value.requires_grad for value in out.scalars.values())


# ---- classes


def test_given_target_is_the_class_of_both_heatmaps():
    model = relu_net().eval()
    target = (model(X).argmax(dim=1) + 1) % 5
    out = regularizer().compute(model, X, target)
    assert_same(out.target, target)
    torch.testing.assert_close(out.query, out.transform(explain(model, X, "features", target)))
    torch.testing.assert_close(out.key, explain(model, out.view, "features", target))


def test_given_target_counts_in_a_plain_call():
    model = relu_net()
    target = (model(X).argmax(dim=1) + 1) % 5
    assert_same(regularizer()(model, X, target), regularizer().compute(model, X, target).loss)
    assert regularizer()(model, X, target) != regularizer()(model, X)


def test_view_is_explained_for_the_class_of_its_image():
    model = relu_net()
    out = regularizer(transform=RandomAffine(degrees=(90, 180))).compute(model, X)
    assert not out.target.equal(out.view_logits.argmax(dim=1))  # else nothing is shown
    torch.testing.assert_close(
        out.key, explain(model, out.view, "features", out.target) * out.transform.coverage((4, 4))
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("heatmap", ["grad_cam", "class_activation"])
def test_target_may_be_of_any_integer_type(dtype, heatmap):
    model = relu_net()
    loss = regularizer(heatmap=heatmap)(model, X, Y.to(dtype))
    assert_same(loss, regularizer(heatmap=heatmap)(model, X, Y))


# ---- views


def test_view_and_transform_can_come_from_outside():
    model = relu_net()
    drawn_here = regularizer().compute(model, X)
    given = CGCRegularizer("features").compute(model, X, view=drawn_here.view, transform=drawn_here.transform)
    assert given.view is drawn_here.view
    assert given.transform is drawn_here.transform
    assert_same(given.loss, drawn_here.loss)


@pytest.mark.parametrize("own", [True, False], ids=["generator", "global generator"])
def test_seed_decides_the_views(own):
    def theta(seed):
        torch.manual_seed(0 if own else seed)
        reg = CGCRegularizer("features", generator=generator(seed) if own else None)
        return reg.compute(relu_net(), X).transform.theta

    assert theta(1).equal(theta(1))
    assert not theta(1).equal(theta(2))


def test_own_generator_leaves_the_global_one_alone():
    model, before = relu_net(), torch.get_rng_state()
    regularizer()(model, X)
    assert_same(torch.get_rng_state(), before)


def test_sampler_with_the_right_method_will_do():
    class Mirror:
        def sample(self, batch_size, image_size, *, device=None, generator=None):
            mirror = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
            return SpatialTransform(mirror.repeat(batch_size, 1, 1))

    out = regularizer(transform=Mirror()).compute(relu_net(), X)
    torch.testing.assert_close(out.view, X.flip(3))


def shifted_view(net_cell=4):
    """Return 2 x 3 cells of pixels for each of three images, and a shift by one cell to the right."""
    x = torch.randn(3, 3, 2 * net_cell, 3 * net_cell, dtype=torch.float64)
    theta = torch.eye(2, 3, dtype=torch.float64).repeat(3, 1, 1)
    theta[:, 0, 2] = -2 / 3
    transform = SpatialTransform(theta)
    return x, transform(x), transform


@pytest.mark.parametrize("loss", ["info_nce", "mse_consistency"])
def test_uncovered_regions_do_not_count(loss):
    net, (x, view, transform) = cell_net(4), shifted_view()
    target = torch.tensor([0, 1, 2])
    reg = regularizer(loss=loss)
    expected = reg.compute(net, x, target, view, transform).loss
    # The view's left column of cells shows nothing of x, and x's right column is not shown in the view.
    view_beside, x_beside = view.clone(), x.clone()
    view_beside[..., :4] += torch.randn(3, 3, 8, 4)
    x_beside[..., 8:] += torch.randn(3, 3, 8, 4)
    torch.testing.assert_close(reg.compute(net, x, target, view_beside, transform).loss, expected)
    torch.testing.assert_close(reg.compute(net, x_beside, target, view, transform).loss, expected)
    view_beside[..., 4:] += torch.randn(3, 3, 8, 8)
    assert not torch.isclose(reg.compute(net, x, target, view_beside, transform).loss, expected, rtol=1e-4)


def test_heatmap_where_nothing_is_covered_does_not_count():
    net, (x, view, transform) = cell_net(4), shifted_view()
    beside = torch.zeros(2, 3).double()
    beside[:, 0] = 7  # where the view shows nothing of x; from x, it would move into sight

    def only_in_the_view(extra):
        calls = iter([0, extra])
        return lambda a, g: a.sum(dim=1) + next(calls)

    losses = [
        regularizer(heatmap=only_in_the_view(extra)).compute(net, x, view=view, transform=transform).loss
        for extra in (0, beside)
    ]
    assert_same(*losses)


# ---- options


def test_view_size_sets_the_size_of_views_and_of_their_heatmaps():
    out = regularizer(view_size=(8, 12)).compute(relu_net(), X)
    assert out.view.shape == (4, 3, 8, 12)
    assert out.query.shape == out.key.shape == (4, 2, 3)
    torch.testing.assert_close(out.view, out.transform(X, (8, 12)))


@pytest.mark.parametrize("heatmap", EXPLAINERS)
@pytest.mark.parametrize("loss", ["info_nce", "mse_consistency"])
def test_detached_keys_are_constants(heatmap, loss):
    model = relu_net(nn.BatchNorm2d)
    constant = {"info_nce": info_nce, "mse_consistency": mse_consistency}[loss]
    expected = regularizer(heatmap=heatmap, loss=lambda query, key: constant(query, key.detach()))(model, X)
    grown = []
    model.features[3].register_forward_hook(lambda module, args, output: grown.append(output.requires_grad))
    out = regularizer(heatmap=heatmap, loss=loss, detach_key=True).compute(model, X)
    assert grown == [True, False]  # the view's pass builds no graph
    assert not out.key.requires_grad
    assert not out.view_logits.requires_grad
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(out.loss, model), gradients(expected, model))


def test_heatmap_size_enlarges_both_maps_before_the_transform():
    model = relu_net().eval()
    out = regularizer(transform=AFFINE, heatmap_size=(7, 9)).compute(model, X)

    def enlarge(maps):
        return F.interpolate(maps[:, None], (7, 9), mode="bilinear", align_corners=False)[:, 0]

    coverage = out.transform.coverage((7, 9))
    torch.testing.assert_close(out.heatmap, enlarge(explain(model, X, "features")))
    torch.testing.assert_close(out.query, out.transform(out.heatmap) * coverage)
    torch.testing.assert_close(out.key, enlarge(explain(model, out.view, "features", out.target)) * coverage)


def test_reductions_reduce_the_loss_of_each_image():
    model = relu_net()
    each, total, mean = (regularizer(reduction=r)(model, X) for r in ("none", "sum", "mean"))
    assert each.shape == (4,)
    torch.testing.assert_close((total, mean), (each.sum(), each.mean()))


def test_scalars_hold_the_mean_of_an_unreduced_loss():
    out = regularizer(reduction="none").compute(relu_net(), X)
    assert_same(out.scalars["loss"], out.loss.detach().mean())


@pytest.mark.parametrize(
    "options", [{"temperature": 0.1}, {"negatives": "official"}, {"temperature": 2, "negatives": "official"}]
)
def test_options_of_info_nce_reach_it(options):
    out = regularizer(**options).compute(relu_net(), X)
    assert_same(out.loss, info_nce(out.query, out.key, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_without_negatives(reduction):
    out = regularizer(loss="mse_consistency", reduction=reduction).compute(relu_net(), X)
    assert_same(out.loss, mse_consistency(out.query, out.key, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_ones_own_per_image_is_reduced(reduction):
    def distance(query, key):
        return (query - key).abs().amax(dim=(1, 2))

    out = regularizer(loss=distance, reduction=reduction).compute(relu_net(), X)
    assert_same(out.loss, getattr(distance(out.query, out.key), reduction)())


def test_loss_of_ones_own_may_be_a_scalar():
    out = regularizer(loss=F.l1_loss).compute(relu_net(), X)
    assert_same(out.loss, F.l1_loss(out.query, out.key))


def test_loss_of_ones_own_sees_maps_neither_normalised_nor_unmasked():
    seen = []
    model = relu_net()
    regularizer(transform=AFFINE, loss=lambda q, k: seen.extend([q, k]) or q.sum()).compute(model, X)
    out = regularizer(transform=AFFINE).compute(model, X)
    assert_same(seen, [out.query, out.key])


def test_heatmap_of_ones_own_takes_activation_and_gradient():
    model = relu_net()
    assert_same(regularizer(heatmap=grad_cam)(model, X), regularizer(heatmap="grad_cam")(model, X))


def test_heatmap_of_ones_own_may_have_a_grid_of_its_own():
    out = regularizer(heatmap=lambda a, g: F.avg_pool2d(a * g, 2).sum(dim=1)).compute(relu_net(), X)
    assert out.query.shape == out.key.shape == (4, 2, 2)


def test_closed_form_equals_autograd_on_a_linear_head():
    model = relu_net().double()
    closed, autograd = (regularizer(heatmap=h)(model, X.double()) for h in ("class_activation", "grad_cam"))
    torch.testing.assert_close(closed, autograd)
    torch.testing.assert_close(gradients(closed, model), gradients(autograd, model))


class TwoHeads(GapNet):
    """Two linear heads of one shape, of which the second is asked."""

    def forward(self, x):
        return self.head[1](self.features(x).mean(dim=(2, 3)))


def two_heads():
    net = TwoHeads(*relu_net().features, head=nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)]))
    nn.init.zeros_(net.head[1].bias)
    return net


def test_head_names_the_linear_layer_of_the_closed_form():
    model = two_heads()
    closed = regularizer(heatmap="class_activation", head="head.1")(model, X)
    torch.testing.assert_close(closed, regularizer()(model, X))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "one linear layer from 8 channels to 5 classes; got 'head.0', 'head.1'"),
        ("haed.1", "`head`.*'haed.1'.*'head.1'"),
        ("features.0", "`head` must be a linear layer from the 8 channels"),
    ],
)
def test_head_that_is_not_to_be_found_is_asked_for(head, message):
    with pytest.raises(ValueError, match=message):
        regularizer(heatmap="class_activation", head=head)(two_heads(), X)


class ConvHead(GapNet):
    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3), keepdim=True)).flatten(1)


def test_head_may_be_a_convolution_of_one_pixel():
    model = ConvHead(*relu_net().features, head=nn.Conv2d(8, 5, 1, bias=False))
    torch.testing.assert_close(regularizer(heatmap="class_activation")(model, X), regularizer()(model, X))


class Output(collections.OrderedDict):
    """As Hugging Face's: a dictionary whose entries are attributes, and without those that were not given."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


Scores = collections.namedtuple("Scores", ["scores", "aux"])


@dataclasses.dataclass
class DataOutput:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Returning(nn.Module):
    """A net that returns its logits in a form of its own."""

    def __init__(self, form):
        super().__init__()
        self.net, self.form = relu_net(), form

    def forward(self, x):
        return self.form(self.net(x))


@pytest.mark.parametrize(
    ("form", "output_fn"),
    [
        (lambda logits: (logits, None), None),
        (lambda logits: [logits], None),
        (lambda logits: {"logits": logits, "aux": None}, None),
        (lambda logits: types.SimpleNamespace(logits=logits), None),
        (lambda logits: Output(logits=logits), None),
        (lambda logits: Output(loss=logits.sum(), logits=logits), None),
        (lambda logits: DataOutput(logits), None),
        (lambda logits: Scores(logits, None), None),
        (lambda logits: torchvision.models.GoogLeNetOutputs(logits, None, None), None),
        (lambda logits: {"scores": logits}, lambda output: output["scores"]),
        (lambda logits: (None, logits), None),
        (lambda logits: (logits.sum(), logits, X, logits.argsort(dim=1), torch.rand(7, 5)), None),
        (lambda logits: (logits[:, :2], logits), lambda output: output[1]),
    ],
)
def test_logits_are_found_in_what_the_model_returns(form, output_fn):
    model = Returning(form)
    out = regularizer("net.features", output_fn=output_fn).compute(model, X)
    assert_same(out.logits, model.net(X))


class ScoresAndMaps(nn.Module):
    """Returns class scores and a map, as a segmentation network does."""

    def __init__(self):
        super().__init__()
        self.net = relu_net(nn.BatchNorm2d)
        self.to_map = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        features = self.net.features(x)
        return {"scores": self.net.head(features.mean(dim=(2, 3))), "maps": [self.to_map(features)]}


def test_output_is_the_models_own_and_trains_it():
    model = ScoresAndMaps()
    twin = copy.deepcopy(model)
    out = regularizer("net.features", output_fn=lambda output: output["scores"]).compute(model, X)
    assert out.output["scores"] is out.logits
    expected = twin(X)
    assert_same(out.output["maps"][0], expected["maps"][0])
    assert_same(gradients(out.output["maps"][0].sum(), model), gradients(expected["maps"][0].sum(), twin))


def test_output_has_no_graph_where_nothing_is_trained():
    reg = regularizer("net.features", output_fn=lambda output: output["scores"])
    with torch.no_grad():
        measured = reg.compute(ScoresAndMaps().eval(), X)
    frozen = reg.compute(ScoresAndMaps().requires_grad_(False), X)
    for out in (measured, frozen):
        assert not out.output["scores"].requires_grad
        assert not out.output["maps"][0].requires_grad


@pytest.mark.parametrize(
    ("form", "output_fn", "message"),
    [
        (lambda logits: {"scores": logits}, None, "The model's output.*`output_fn`"),
        (lambda logits: logits[:, :, None], None, r"\(4, classes\).*\(4, 5, 1\)"),
        (lambda logits: logits[:2], None, r"\(4, classes\).*\(2, 5\)"),
        (lambda logits: "scores", None, "got 'scores'"),
        (lambda logits: (logits[:, :2], logits), None, r"one tensor of shape \(4, classes\); got 2.*output_fn"),
        (lambda logits: (), None, r"got \(\)"),
        (lambda logits: logits, lambda output: output.sum(), "`output_fn` must return logits"),
    ],
)
def test_output_without_logits_is_refused(form, output_fn, message):
    with pytest.raises(ValueError, match=message):
        regularizer("net.features", output_fn=output_fn)(Returning(form), X)


class Tokens(nn.Module):
    """Put out maps (n, c, h, w) as tokens (n, 1 + hw, c) behind a class token."""

    def forward(self, maps):
        return F.pad(maps.flatten(2).transpose(1, 2), (0, 0, 1, 0))


class TokenNet(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.features, self.tokens, self.head = net.features, Tokens(), net.head

    def forward(self, x):
        return self.head(self.tokens(self.features(x))[:, 1:].mean(dim=1))


@pytest.mark.parametrize("heatmap", EXPLAINERS)
def test_tokens_are_folded_to_maps(heatmap):
    net = relu_net().double()
    reg = regularizer(
        "tokens", heatmap=heatmap, reshape_transform=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    )
    loss, expected = reg(TokenNet(net), X.double()), regularizer(heatmap=heatmap)(net, X.double())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, net), gradients(expected, net))


def test_tokens_without_reshape_transform_are_refused():
    with pytest.raises(ValueError, match=r"`target_layer` must put out maps.*`reshape_transform=TokensToMaps"):
        regularizer("tokens")(TokenNet(relu_net()), X)


def test_layer_is_found_at_the_first_call():
    model, reg = relu_net(), regularizer(None)
    loss = reg(model, X)
    assert reg.explainer.target_layer == "features"
    assert_same(loss, regularizer("features")(model, X))


def test_repr_names_the_options():
    text = repr(regularizer("layer4", temperature=0.25, loss="mse_consistency", weighting="confidence"))
    parts = "'layer4'", "temperature=0.25", "'mse_consistency'", "RandomResizedCropFlip", "weighting='confidence'"
    assert all(part in text for part in parts)


# ---- precision and modes


def test_float64_stays_float64():
    out = regularizer().compute(relu_net().double(), X.double())
    assert {t.dtype for t in (out.loss, out.query, out.key, out.view, out.logits)} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heatmaps_and_loss_are_float32_under_autocast(dtype):
    model = relu_net()
    exact = regularizer().compute(model, X, Y)
    with torch.autocast("cpu", dtype):
        out = regularizer().compute(model, X, Y)
    assert out.logits.dtype == dtype
    assert {t.dtype for t in (out.loss, out.query, out.key)} == {torch.float32}
    # bfloat16 has 8 bits: 0.4 % for each rounding, of which each value has passed a few; similarities divided by tau.
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_get_their_gradients_under_autocast(dtype):
    model = relu_net()
    exact = gradients(regularizer()(model, X, Y), model)
    with torch.autocast("cpu", dtype):
        loss = regularizer()(model, X, Y)
    for name, gradient in gradients(loss, model).items():
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.95 or exact[name].norm() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("heatmap", EXPLAINERS)
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_the_loss_is_a_metric(mode, heatmap, training):
    model = relu_net(nn.BatchNorm2d).train(training)
    expected = regularizer(heatmap=heatmap)(model, X).detach()
    settings, buffers = settings_of(model), buffers_of(model)
    with mode():
        # The tensors of a loop in inference mode are made there.
        x, target = X.clone(), regularizer().compute(model.eval(), X).target.clone()
        model.train(training)
        assert_same(regularizer(heatmap=heatmap)(model, x), expected)
        regularizer(heatmap=heatmap)(model, x, target)
    assert settings_of(model) == settings
    assert_same(buffers_of(model), buffers)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("heatmap", ["grad_cam", "class_activation"])
def test_without_gradients_nothing_carries_a_graph(mode, heatmap):
    model = relu_net()
    with mode():
        x = X.clone()
        view, transform = drawn(x)
        out = regularizer(heatmap=heatmap).compute(model, x, view=view, transform=transform)
    tensors = [value for value in vars(out).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 9  # loss, logits, view_logits, view, target, heatmap, query, key, output
    assert not any(t.requires_grad for t in [*tensors, *out.scalars.values(), out.transform.theta])


def test_frozen_trunk_leaves_the_heads_gradients_as_they_are():
    model = deep_head_net()
    full = gradients(regularizer()(model, X), model)
    model.features.requires_grad_(False)
    frozen = gradients(regularizer()(model, X), model)
    assert set(frozen) == {name for name in full if name.startswith("head")}
    torch.testing.assert_close(frozen, {name: full[name] for name in frozen})


@pytest.mark.parametrize("options", [{}, {"detach_key": True}, {"heatmap": "class_activation"}], ids=str)
def test_loss_of_a_model_with_nothing_to_train_is_a_number_whose_backward_says_so(options):
    model = relu_net().requires_grad_(False)
    out = regularizer(**options).compute(model, X)
    assert out.loss.isfinite()
    assert not any(getattr(out, name).requires_grad for name in ("loss", "logits", "view_logits", "query", "key"))
    with pytest.raises(RuntimeError, match="does not require grad"):
        (F.cross_entropy(out.logits, torch.zeros(len(X), dtype=torch.long)) + out.loss).backward()


def test_images_are_trained_through_a_frozen_model():
    x = X.clone().requires_grad_()
    regularizer()(relu_net().requires_grad_(False), x).backward()
    assert x.grad.abs().max() > 0


def test_frozen_head_leaves_the_trunks_gradients_as_they_are():
    model = deep_head_net()
    full = gradients(regularizer()(model, X), model)
    model.head.requires_grad_(False)
    frozen = gradients(regularizer()(model, X), model)
    assert set(frozen) == {name for name in full if name.startswith("features")}
    torch.testing.assert_close(frozen, {name: full[name] for name in frozen})


def test_trunk_run_without_gradients_is_a_frozen_trunk():
    net = relu_net()
    probe = LinearProbe(*net.features, head=net.head)
    expected = gradients(regularizer()(net, X), net)["head.weight"]
    torch.testing.assert_close(gradients(regularizer()(probe, X), probe)["head.weight"], expected)


class FrozenBlock(nn.Module):
    """A trunk of three stages that its forward freezes up to a point by `no_grad`."""

    def __init__(self, frozen):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.ReLU()) for c in (3, 6, 6))
        self.head, self.frozen = nn.Linear(6, 5), frozen

    def forward(self, x):
        with torch.no_grad():
            for stage in self.stages[: self.frozen]:
                x = stage(x)
        for stage in self.stages[self.frozen :]:
            x = stage(x)
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("frozen", [1, 2, 3])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_the_model_freezes_is_not_trained(layer, frozen):
    model = FrozenBlock(frozen)
    plain = gradients(model(X).sum(), model)
    reg = regularizer(f"stages.{layer}")
    for run in (reg, reg.compute):
        if layer < frozen - 1:
            with pytest.raises(RuntimeError, match=rf"which 'stages\.{layer + 1}\.0\.weight' follows"):
                run(model, X)
            with torch.no_grad():
                assert reg(model, X).isfinite()
        else:
            out = run(model, X)
            loss = out if isinstance(out, torch.Tensor) else out.loss + out.logits.sum()
            assert set(gradients(loss, model)) <= set(plain)
    assert explain(model, X, f"stages.{layer}").isfinite().all()


def test_what_the_model_freezes_is_not_trained_after_another_layer_would_do_either():
    model = FrozenBlock(3)
    regularizer("stages.2")(model, X)
    with pytest.raises(RuntimeError, match=r"which 'stages\.1\.0\.weight' follows"):
        regularizer("stages.0")(model, X)


def test_a_block_without_gradients_is_looked_at_once_and_leaves_no_trace():
    net = relu_net(nn.BatchNorm2d)
    probe, passes = LinearProbe(*net.features, head=net.head), []
    plain = copy.deepcopy(probe)
    probe.head.register_forward_hook(lambda *_: passes.append(1))
    reg, counts = regularizer(), []
    for _ in range(2):
        passes.clear()
        reg.compute(probe, X)
        plain(X)
        counts.append(len(passes))
    assert counts == [3, 2]
    assert_same(buffers_of(probe), buffers_of(plain))


def test_frozen_model_has_a_loss_all_the_same():
    model = relu_net().requires_grad_(False)
    assert regularizer()(model, X).isfinite()


@pytest.mark.parametrize(
    "options",
    [
        {"heatmap": lambda a, g: grad_cam(a, g).detach()},
        {"heatmap": lambda a, g: torch.rand(4, 4, 4)},
        {"heatmap": "class_activation", "reshape_transform": torch.detach},
    ],
    ids=["detached heatmap", "constant heatmap", "detached activation"],
)
def test_heatmap_without_a_graph_is_refused_in_training(options):
    model = relu_net()
    model.head.requires_grad_("reshape_transform" not in options)
    with pytest.raises(RuntimeError, match=r"depend on the model's trainable parameters.*`torch.no_grad\(\)`"):
        regularizer(**options)(model, X)


def test_heatmap_without_a_graph_serves_as_a_metric():
    with torch.no_grad():
        assert regularizer(heatmap=lambda a, g: grad_cam(a, g).detach())(relu_net(), X).isfinite()


def test_a_loss_of_ones_own_runs_outside_of_autocast():
    seen = []

    def loss(query, key):
        seen.append(torch.is_autocast_enabled("cpu"))
        return (query - key).square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        regularizer(loss=loss)(relu_net(), X)
    assert seen == [False]


def test_blank_heatmaps_train_on_and_are_warned_of_once():
    reg, model = regularizer(heatmap=lambda a, g: (0 * a * g).sum(dim=1)), relu_net()
    with pytest.warns(UserWarning, match="All heatmaps of a batch are blank"):
        out = reg.compute(model, X)
    assert out.scalars["blank_share"] == 1
    assert out.loss.item() == pytest.approx(math.log(4))
    out.loss.backward()
    reg.compute(model, X)


def test_a_matrix_in_pixels_is_warned_of_once():
    matrix = SpatialTransform(torch.tensor([[[1.0, 0.0, 40.0], [0.0, 1.0, -25.0]]]).expand(4, 2, 3))
    reg, model = regularizer(), relu_net()
    with pytest.warns(UserWarning, match="No view shows anything of its image.* and not in pixels"):
        reg.compute(model, X, view=X, transform=matrix)
    reg.compute(model, X, view=X, transform=matrix)


def test_data_parallel_over_several_devices_is_warned_of_once():
    model = nn.DataParallel(relu_net())
    regularizer()(model, X)
    model.device_ids = [0, 1]  # as where there are GPUs
    with pytest.warns(UserWarning, match="DataParallel over 2 devices"):
        regularizer()(model, X)
    regularizer()(model, X)


def test_nan_stays_visible():
    x = X.clone()
    x[1, 0, 3, 3] = float("nan")
    assert regularizer()(relu_net(), x).isnan()


def wrapped(model):
    torch.compiler.reset()  # after many compilations of one forward it would fall back to eager mode
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    torch.compiler.reset()
    model.compile(backend="eager")
    return model


def compiled_forward(model):
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def call(reg, model):
    return reg(model, X)


def compute(reg, model):
    return reg.compute(model, X).loss


@pytest.mark.parametrize("run", [call, compute])
@pytest.mark.parametrize("compiled", [wrapped, compiled_in_place, compiled_forward])
def test_compiled_model_is_run_uncompiled_with_one_warning(run, compiled):
    model = relu_net(nn.BatchNorm2d)
    eager = run(regularizer(), model)
    expected = gradients(eager, model)
    fast = compiled(model)
    fast(X)  # from here on it takes no notice of hooks
    with pytest.warns(UserWarning, match=r"runs as written") as caught:
        loss = run(regularizer(), fast)
    assert len(caught) == 1
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(gradients(loss, model), expected)


@pytest.mark.parametrize("run", [call, compute])
def test_warning_about_compilation_points_to_the_call(run):
    compiled = wrapped(relu_net())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(regularizer(), compiled)
    assert [record.filename for record in caught] == [__file__]


def test_a_compiled_block_without_gradients_is_looked_at_as_written():
    net, graphs = relu_net(), []
    probe = LinearProbe(*net.features, head=net.head)
    probe.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with pytest.warns(UserWarning, match="runs as written"):
        compute(regularizer(), probe)
    assert graphs == []


def test_a_model_is_warned_of_once_however_often_it_is_compiled():
    model = relu_net()
    with pytest.warns(UserWarning, match=r"runs as written"):
        call(regularizer(), wrapped(model))
    call(regularizer(), wrapped(model))  # a second warning would be an error


@pytest.mark.parametrize("compiled", [wrapped, compiled_in_place, compiled_forward])
def test_compiled_model_is_explained(compiled):
    model = relu_net()
    expected = explain(model, X, "features")
    fast = compiled(model)
    fast(X)
    assert suggest_target_layer(fast, X) == "features"
    assert_same(explain(fast, X, "features"), expected)


# ---- nothing is kept


@pytest.mark.parametrize("layer", ["features", None])
@pytest.mark.parametrize("heatmap", ["grad_cam", "class_activation"])
def test_regularizer_keeps_neither_model_nor_tensors(layer, heatmap):
    reg, model, x = regularizer(layer, heatmap=heatmap), relu_net(), X.clone()
    out = reg.compute(model, x)
    out.loss.backward()
    loss = reg(model, x)
    traces = [
        weakref.ref(item) for item in (model, x, loss, out, out.loss, out.view, out.query, out.key, out.transform)
    ]
    del model, x, loss, out
    gc.collect()
    assert [trace() for trace in traces] == [None] * len(traces)


@pytest.mark.parametrize("heatmap", EXPLAINERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["written", "compiled"])
def test_a_step_leaves_nothing_to_the_garbage_collector(heatmap, compiled):
    reg, model = regularizer(heatmap=heatmap), relu_net()
    if compiled:
        model.features.compile(backend="eager")

    def step():
        (reg.compute(model, X).loss + reg(model, X)).backward()

    step()
    gc.collect()
    gc.disable()  # which comes late for the memory of a GPU
    try:
        left = []
        for _ in range(3):
            step()
            left.append(gc.collect())
        assert 0 in left  # what a test before this one left may come to light late
    finally:
        gc.enable()


def test_regularizer_has_nothing_to_train_or_save():
    reg = regularizer()
    reg(relu_net(), X)
    assert list(reg.parameters()) == []
    assert reg.state_dict() == {}


def test_calls_do_not_influence_each_other():
    model, reg = relu_net(), regularizer()
    reg(model, X)
    reg.generator = generator(0)
    assert_same(reg(model, X), regularizer()(model, X))


def test_regularizer_can_be_copied():
    model, reg = relu_net(), CGCRegularizer("features", temperature=0.2)
    twin = copy.deepcopy(reg)
    view, transform = drawn(X)
    losses = [r.compute(model, X, view=view, transform=transform).loss for r in (reg, twin)]
    assert_same(*losses)
