"""Volumes, clips and signals: real networks train as the equation says, and every measure is that of a plain loop."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from explainers import EXPLAINERS, explainer
from networks import gradients
from strategies import generator, noise
from torch import nn

from cgc_reg import (
    CGCRegularizer,
    Consistency,
    ContentHeatmap,
    ContrastiveTransforms,
    Explanation,
    FullGrad,
    GradCAM,
    RandomResizedCropFlip,
    SpatialTransform,
    TokensToMaps,
    channels_last_to_maps,
    content_heatmap,
    energy_loss,
    explain,
    object_coverage,
    pointing_game,
    suggest_target_layer,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what is deprecated in the libraries that it uses
    import monai.networks.nets as monai_nets

SIZES = {1: (40,), 2: (16, 24), 3: (8, 12, 16)}
dimensions = pytest.mark.parametrize("dims", SIZES)
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
NORMS = {
    "batch": lambda dims, channels: BATCH_NORM[dims](channels),
    "instance": lambda dims, channels: INSTANCE_NORM[dims](channels, affine=True),
    "group": lambda dims, channels: nn.GroupNorm(2, channels),
}


class Net(nn.Module):
    """Two convolutions to a quarter of the size, global average pooling, and a linear head without a bias."""

    def __init__(self, dims, norm="batch"):
        super().__init__()
        convolution = CONVOLUTION[dims]
        self.features = nn.Sequential(
            convolution(2, 6, 3, stride=2, padding=1),
            NORMS[norm](dims, 6),
            nn.ReLU(),
            convolution(6, 8, 3, stride=2, padding=1),
            NORMS[norm](dims, 8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.head(self.features(x).flatten(2).mean(dim=2))


def net(dims, norm="batch"):
    torch.manual_seed(0)
    return Net(dims, norm).double()


def images(dims, n=4, channels=2):
    return noise(1, n, channels, *SIZES[dims])


def slow_step(model, layer, x, view, transform, target):
    """Compute the equation of CGC, image by image and channel by channel."""

    def heatmaps(inputs):
        kept = []

        def keep(module, args, output):
            kept.append(output)
            return output.clone()  # which the model may change in place

        handle = model.get_submodule(layer).register_forward_hook(keep)
        logits = model(inputs)
        handle.remove()
        score = logits.gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, kept[0], create_graph=True)
        maps = [
            sum(d.mean() * a for a, d in zip(activation, of_score, strict=True)).relu()
            for activation, of_score in zip(kept[0], gradient, strict=True)
        ]
        return torch.stack(maps), logits

    query, logits = heatmaps(x)
    key, _ = heatmaps(view)
    coverage = transform.coverage(key.shape[1:])
    query, key = transform(query, key.shape[1:]) * coverage, key * coverage
    losses = []
    for i, one in enumerate(query):
        similar = torch.stack([F.cosine_similarity(one.flatten(), other.flatten(), dim=0) for other in key]) / 0.5
        losses.append(similar.logsumexp(dim=0) - similar[i])
    return F.cross_entropy(logits, target) + torch.stack(losses).mean()


def assert_step_is_the_slow_one(model, layer, x):
    """In training mode, with one target for all passes, and the running statistics of the step's own pass."""
    transform = RandomResizedCropFlip().sample(len(x), tuple(x.shape[2:]), generator=generator(3))
    transform = SpatialTransform(transform.theta.to(x.dtype))
    view, target = transform(x), torch.arange(len(x)) % 3
    other = copy.deepcopy(model)
    out = CGCRegularizer(layer).compute(model, x, target, view=view, transform=transform)
    loss = F.cross_entropy(out.logits, target) + out.loss
    expected = slow_step(other, layer, x, view, transform, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, other))
    return out


@dimensions
@pytest.mark.parametrize("norm", NORMS)
def test_step_is_the_slow_one(dims, norm):
    out = assert_step_is_the_slow_one(net(dims, norm), "features", images(dims))
    assert out.scalars["blank_share"] < 1
    assert out.heatmap.ndim == dims + 1


@dimensions
def test_the_views_pass_leaves_the_running_statistics_to_the_step(dims):
    model, other = net(dims), net(dims)
    CGCRegularizer("features").compute(model, images(dims))
    other(images(dims))
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_a_network_of_clips_trains_as_the_equation_says(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models.video, name)(num_classes=3).double()
    clips = noise(1, 2, 3, 4, 32, 32)
    assert suggest_target_layer(model, clips) == "layer4"
    with pytest.warns(UserWarning, match="A BatchNorm behind `target_layer`"):  # of layer4, where clips this small end
        assert_step_is_the_slow_one(model, "layer3", clips)


MONAI = {
    "DenseNet121": lambda nets: nets.DenseNet121(3, 2, 3, init_features=8, growth_rate=4),
    "ResNet": lambda nets: nets.ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], n_input_channels=2, num_classes=3),
    "SENet": lambda nets: nets.SENet(
        3, 2, "se_resnet_bottleneck", [1, 1, 1, 1], groups=1, reduction=4, dropout_prob=None, inplanes=16, num_classes=3
    ),
}


@pytest.mark.parametrize("name", MONAI)
def test_a_network_of_monai_trains_as_the_equation_says(name):
    torch.manual_seed(0)
    model = MONAI[name](monai_nets).double()
    volumes = noise(1, 2, 2, 32 if name == "DenseNet121" else 16, 32, 64)
    layer = "features" if name == "DenseNet121" else "layer4"
    assert suggest_target_layer(model, volumes) == layer
    assert_step_is_the_slow_one(model, layer, volumes)


class Residual(nn.Module):
    """A block of a ResNet for signals."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm1d(out),
            nn.ReLU(inplace=True),
            nn.Conv1d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm1d(out),
        )
        self.shortcut = nn.Conv1d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        return (self.body(x) + self.shortcut(x)).relu_()


def test_a_resnet_of_signals_trains_as_the_equation_says():
    torch.manual_seed(0)
    blocks = [Residual(2, 8, 2), Residual(8, 16, 2), Residual(16, 32, 2)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 3)).double()
    signals = noise(1, 4, 2, 200)
    assert suggest_target_layer(model, signals) == "2"
    assert_step_is_the_slow_one(model, "2", signals)


@dimensions
@pytest.mark.parametrize("heatmap", EXPLAINERS)
def test_each_explainer_makes_one_map_for_each(dims, heatmap):
    model, x = net(dims).eval(), images(dims)
    seen = explainer("features", heatmap)(model, x, 1)
    assert seen.heatmap.shape == (4, *model.features(x).shape[2:])
    # The closed form, and Grad-CAM up to the number of places, are the same here.
    if heatmap in ("grad_cam", "class_activation"):
        places = seen.heatmap[0].numel() if heatmap == "grad_cam" else 1
        by_hand = torch.einsum("c,nc...->n...", model.head.weight[1], model.features(x)).relu()
        torch.testing.assert_close(seen.heatmap * places, by_hand)
    seen.heatmap.sum().backward()
    assert model.features[0].weight.grad.abs().sum() > 0


@dimensions
def test_full_grad_is_complete_and_as_large_as_the_images(dims):
    model, x = net(dims).eval(), images(dims)
    seen = FullGrad()(model, x, 1)
    assert seen.heatmap.shape == (4, *SIZES[dims])
    total = sum(term.flatten(1).sum(dim=1) for term in FullGrad().terms(model, x, 1))
    torch.testing.assert_close(total, model(x)[:, 1])
    seen.heatmap.mean().backward()
    assert model.features[0].weight.grad.abs().sum() > 0


@dimensions
def test_options_of_size_hold_in_each_dimension(dims):
    view_size, heatmap_size = (tuple(n // by for n in SIZES[dims]) for by in (2, 1))
    reg = CGCRegularizer(None, view_size=view_size, heatmap_size=heatmap_size)
    out = reg.compute(net(dims), images(dims))
    assert out.view.shape == (4, 2, *view_size)
    assert out.query.shape == out.key.shape == out.heatmap.shape == (4, *heatmap_size)
    with pytest.raises(ValueError, match="`view_size` must be "):
        CGCRegularizer("features", view_size=(8,) * (dims % 3 + 1)).compute(net(dims), images(dims))


@dimensions
def test_explain_and_bfloat16(dims):
    model, x = net(dims).float(), images(dims).float()
    assert explain(model, x, "features").shape == (4, *(n // 4 for n in SIZES[dims]))
    with torch.autocast("cpu", torch.bfloat16):
        out = CGCRegularizer("features").compute(model, x)
    assert out.heatmap.dtype == torch.float32
    (F.cross_entropy(out.logits.float(), torch.zeros(4, dtype=torch.long)) + out.loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- masks, boxes and measures


def enlarged(heatmap, size):
    """Enlarge one heatmap, pixel by pixel."""
    result = torch.zeros(size, dtype=heatmap.dtype)
    for place in itertools.product(*map(range, size)):
        at = [(p + 0.5) * cells / n - 0.5 for p, cells, n in zip(place, heatmap.shape, size, strict=True)]
        at = [min(max(p, 0), cells - 1) for p, cells in zip(at, heatmap.shape, strict=True)]
        for corner in itertools.product(*((math.floor(p), math.floor(p) + 1) for p in at)):
            weight = math.prod(1 - abs(p - c) for p, c in zip(at, corner, strict=True))
            if weight > 0:
                result[place] += weight * heatmap[corner]
    return result


@dimensions
def test_measures_on_masks_are_those_of_a_plain_loop(dims):
    size = (5, 6, 7)[:dims]
    heatmaps, masks = noise(0, 3, *(3, 2, 4)[:dims]) - 0.2, noise(1, 3, *size) > 0.4
    large = torch.stack([enlarged(one, size) for one in heatmaps]).relu()
    on_object = (large * masks).flatten(1).sum(dim=1)
    share = on_object / large.flatten(1).sum(dim=1)
    torch.testing.assert_close(content_heatmap(heatmaps, masks), share)
    torch.testing.assert_close(energy_loss(heatmaps, masks, reduction="none"), 1 - share)
    covered = on_object / large.flatten(1).amax(dim=1) / masks.flatten(1).sum(dim=1)
    torch.testing.assert_close(object_coverage(heatmaps, masks), covered)
    metric = ContentHeatmap()
    metric.update(heatmaps, masks)
    assert metric.compute()["content_heatmap"] == pytest.approx(share.mean().item())


@dimensions
def test_boxes_mark_the_pixels_whose_centres_they_hold(dims):
    size = (5, 6, 7)[:dims]
    low, extent = noise(2, 3, dims) * torch.tensor(size[::-1]) * 0.6, noise(3, 3, dims) * 4 + 1
    boxes = torch.cat([low, low + extent], dim=1)  # x, y, z; each heatmap's own
    masks = torch.zeros(3, *size, dtype=torch.bool)
    for i, *place in itertools.product(range(3), *map(range, size)):
        centre = [p + 0.5 for p in reversed(place)]
        ends = zip(boxes[i, :dims].tolist(), centre, boxes[i, dims:].tolist(), strict=True)
        masks[(i, *place)] = all(a <= c < b for a, c, b in ends)
    heatmaps = noise(4, 3, *(3, 2, 4)[:dims])
    expected = content_heatmap(heatmaps, masks)
    torch.testing.assert_close(content_heatmap(heatmaps, boxes=boxes, image_size=size), expected)
    several = [boxes[i, None].repeat(2, 1) for i in range(3)]
    torch.testing.assert_close(content_heatmap(heatmaps, boxes=several, image_size=size), expected)
    with pytest.raises(ValueError, match=rf"`boxes` must be of shape \(3, {2 * dims}\): x_min, .*x_max"):
        content_heatmap(heatmaps, boxes=boxes[:, 1:], image_size=size)


@dimensions
def test_the_pointing_game_measures_the_distance_in_space(dims):
    size, cells = (9, 12, 15)[:dims], (3, 4, 5)[:dims]
    heatmaps, masks = noise(5, 6, *cells), noise(6, 6, *size) > 0.99
    masks[(slice(None), *[0] * dims)] = True
    distances = []
    for heatmap, mask in zip(heatmaps, masks, strict=True):
        peak = max(itertools.product(*map(range, cells)), key=lambda cell, heatmap=heatmap: heatmap[cell].item())
        point = [(p + 0.5) * n / c for p, n, c in zip(peak, size, cells, strict=True)]
        distances.append(min(math.dist(point, [p + 0.5 for p in place]) for place in mask.nonzero().tolist()))
    for tolerance in (1, 3, 6):
        hits = [float(distance <= tolerance) for distance in distances]
        assert pointing_game(heatmaps, masks, tolerance=tolerance).tolist() == hits


@dimensions
def test_consistency_takes_maps_of_any_dimension(dims):
    query, key = noise(7, 4, *SIZES[dims]), noise(8, 4, *SIZES[dims])
    flat, whole = Consistency(batch_size=4), Consistency(batch_size=4)
    flat.update(query.flatten(1)[:, None], key.flatten(1)[:, None])
    whole.update(query, key)
    assert whole.compute() == pytest.approx(flat.compute())


@dimensions
def test_views_are_made_in_a_loader_too(dims):
    image, view, theta = ContrastiveTransforms()(torch.rand(2, *SIZES[dims]))
    assert image.shape == view.shape == (2, *SIZES[dims])
    assert theta.shape == (dims, dims + 1)
    torch.testing.assert_close(SpatialTransform(theta[None])(image[None])[0], view)


class Lifted(nn.Module):
    """A layer of six channels for maps of one, between what moves the channels."""

    def __init__(self, layer, dims, *, channels_last=False):
        super().__init__()
        self.first = getattr(nn, f"Conv{dims}d")(2, 6, 1)
        self.layer, self.channels_last = layer, channels_last
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        x = self.layer(x.movedim(1, -1)).movedim(-1, 1) if self.channels_last else self.layer(x)
        return self.head(x.relu().flatten(2).mean(dim=2))


def lifted_pairs(dims):
    """Layers that do the same to channels last and to channels first, and to whole maps and to groups of one."""
    torch.manual_seed(0)
    linear, convolution = nn.Linear(6, 6), getattr(nn, f"Conv{dims}d")(6, 6, 1)
    convolution.weight.data.copy_(linear.weight.data.view_as(convolution.weight))
    convolution.bias.data.copy_(linear.bias.data)
    group, whole = nn.GroupNorm(1, 6), nn.LayerNorm((6, *SIZES[dims]))
    nn.init.normal_(group.bias)
    whole.bias.data.copy_(group.bias.data.view(6, *[1] * dims).expand_as(whole.bias))
    return [
        (Lifted(linear, dims, channels_last=True), Lifted(convolution, dims)),
        (Lifted(whole, dims), Lifted(group, dims)),
    ]


@dimensions
@pytest.mark.parametrize("pair", [0, 1], ids=["channels last", "whole maps"])
def test_full_grad_finds_the_places_of_a_layer_wherever_its_channels_are(dims, pair):
    one, other = lifted_pairs(dims)[pair]
    other.first.load_state_dict(one.first.state_dict())
    other.head.load_state_dict(one.head.state_dict())
    x = images(dims)
    actual, expected = (FullGrad()(model.double(), x, target=1).heatmap for model in (one, other))
    torch.testing.assert_close(actual, expected)


# ---- what is no map


@dimensions
def test_tokens_and_channels_last_become_maps(dims):
    size = (2, 3, 4)[:dims]
    maps = noise(0, 2, 5, *size)
    assert torch.equal(TokensToMaps(size, prefix_tokens=0)(maps.flatten(2).mT), maps)
    assert torch.equal(channels_last_to_maps(maps.movedim(1, -1)), maps)


class Pointwise(nn.Module):
    """A network of signals that works on channels last, as transformers do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.embed(x.mT).relu().mean(dim=1))


def test_channels_last_of_signals_are_not_taken_for_maps():
    model, x = Pointwise(), torch.rand(4, 2, 10)
    with pytest.raises(ValueError, match=r"must put out maps of shape \(n, c, length\); got channels last"):
        GradCAM("embed")(model, x)
    assert GradCAM("embed", reshape_transform=channels_last_to_maps)(model, x).heatmap.shape == (4, 10)
    with pytest.raises(ValueError, match=r"must have layers that put out maps \(n, c, length\); got channels last"):
        suggest_target_layer(model, x)


class Recurrent(nn.Module):
    """A network of signals whose last layer before the head is recurrent, in a module of its own."""

    class Memory(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.inner = nn.LSTM(6, 5, batch_first=True, bidirectional=True, **options)

        def forward(self, x):
            return self.inner(x.mT)[0]

    def __init__(self, **options):
        super().__init__()
        self.features = nn.Conv1d(2, 6, 3, padding=1)
        self.memory = self.Memory(**options)
        self.head = nn.Linear(2 * options.get("proj_size", 5), 3)

    def forward(self, x):
        return self.head(self.memory(self.features(x)).mean(dim=1))


@pytest.mark.parametrize("options", [{}, {"proj_size": 4}])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_hidden_units_are_not_taken_for_places(options):
    model, x = Recurrent(**options), torch.rand(4, 2, 14)
    for explain_units in (GradCAM("memory"), CGCRegularizer("memory").compute):
        with pytest.raises(ValueError, match=r"must put out maps of shape \(n, c, length\); got channels last"):
            explain_units(model, x)
    with pytest.raises(ValueError, match=r"got channels last, .* from 'memory'"):
        suggest_target_layer(model, x)
    assert GradCAM("memory", reshape_transform=channels_last_to_maps)(model, x).heatmap.shape == (4, 14)
    assert GradCAM("features")(model, x).heatmap.shape == (4, 14)


@pytest.mark.parametrize("explainer", [GradCAM("features"), FullGrad(), GradCAM(None)], ids=["layer", "all", "None"])
@pytest.mark.parametrize("dims", [2, 3])
def test_one_image_without_its_batch_is_told_from_a_batch_of_fewer_dimensions(dims, explainer):
    with pytest.raises(
        ValueError, match=r"as the convolutions of `model` take them; got .* its batch pass `x\[None\]`"
    ):
        explainer(net(dims).eval(), images(dims)[0])
    with pytest.raises(ValueError, match=r"as the convolutions of `model` take them; got a \w+ tensor of shape [^`]*$"):
        explainer(net(dims - 1).eval(), images(dims))


class FrameByFrame(nn.Module):
    """A network of clips whose convolutions see one frame at a time."""

    def __init__(self):
        super().__init__()
        self.frames = net(2).features
        self.maps = nn.Identity()
        self.head = nn.Linear(8, 3).double()

    def forward(self, x):
        n, t = len(x), x.shape[2]
        maps = self.frames(x.transpose(1, 2).flatten(0, 1))
        maps = self.maps(maps.unflatten(0, (n, t)).transpose(1, 2))
        return self.head(maps.flatten(2).mean(dim=2))


def test_a_model_may_take_clips_frame_by_frame():
    model, x = FrameByFrame(), images(3)
    n, t = len(x), x.shape[2]
    of_frames = GradCAM("frames", reshape_transform=lambda maps: maps.unflatten(0, (n, t)).transpose(1, 2))
    of_clips = GradCAM("maps")
    expected = of_clips(model, x, target=1).heatmap
    torch.testing.assert_close(of_frames(model, x, target=1).heatmap, expected)
    assert_step_is_the_slow_one(model, "maps", x)
    with pytest.raises(ValueError, match=r"`target_layer` must put out .*\(n, c, d, h, w\)"):
        GradCAM("frames")(model, x)


def test_dimensions_that_do_not_fit_are_refused():
    model, x = net(3), images(3)
    with pytest.raises(ValueError, match=r"`transform` must hold one map of 3 dimensions for each .* got 4 of 2"):
        CGCRegularizer("features").compute(model, x, view=x, transform=SpatialTransform.identity(4))
    with pytest.raises(ValueError, match=r"`x` must be images .*, volumes .* or signals .*; got .* \(4, 2\)"):
        GradCAM("features")(model, torch.rand(4, 2))

    def flat(model, x, target):
        logits = model(x)
        return Explanation(logits[:, :, None] * torch.ones(4), logits, logits.argmax(dim=1))

    with pytest.raises(ValueError, match=r"must return heatmaps of shape \(4, d, h, w\); got .* \(4, 3, 4\)"):
        CGCRegularizer(flat)(model, x)
    with pytest.raises(ValueError, match=r"`masks` must be of shape \(2, D, H, W\); got .* \(2, 4, 4\)"):
        content_heatmap(torch.rand(2, 3, 3, 3), torch.ones(2, 4, 4))
