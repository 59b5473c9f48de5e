"""FullGrad: its terms add up to the score, and its heatmaps train like those of the others."""

import copy
import pickle

import gloo
import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import GapNet, LinearProbe, assert_same, buffers_of, gradients, relu_net, settings_of
from strategies import generator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cgc_reg import CGCRegularizer, FullGrad, SpatialTransform, explain, full_grad, info_nce

X = torch.randn(4, 3, 16, 16, generator=generator(0), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 4])
G = FullGrad()

pytestmark = pytest.mark.filterwarnings("ignore:FullGrad looks through every BatchNorm")  # of nets in training


def net(norm=nn.BatchNorm2d):
    """A net all of whose biases and statistics differ from where they begin."""
    torch.manual_seed(0)
    return stirred(relu_net(norm).double())


def stirred(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.2)
    return model


def total(terms):
    return sum(term.flatten(1).sum(dim=1) for term in terms)


# ---- completeness


class Functional(nn.Module):
    """A net whose layers are functions, and one of which adds no bias."""

    def __init__(self):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.up, self.lift = nn.Parameter(torch.randn(4, 5, 2, 2)), nn.Parameter(torch.randn(5))
        self.weight, self.shift = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, bias=self.bias).relu_()
        x = F.conv_transpose2d(F.avg_pool2d(x, 2), self.up, self.lift, stride=2).relu()
        x = F.batch_norm(x, self.shift.detach(), self.lift.detach().abs())  # without weight and bias
        return F.linear(F.conv2d(x, self.weight[:, :, None, None]).amax(dim=(2, 3)), self.weight, self.shift)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (net, 16),
        (Functional, 16),
        (lambda: torchvision.models.resnet18(num_classes=5), 64),
        (lambda: torchvision.models.vgg11_bn(num_classes=5), 32),
        (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), 64),
        (lambda: torchvision.models.googlenet(num_classes=5, aux_logits=False, init_weights=False), 64),
        (lambda: torchvision.models.regnet_x_400mf(num_classes=5), 64),
    ],
    ids=["net", "functions", "resnet18", "vgg11_bn", "densenet", "googlenet", "regnet"],
)
def test_the_terms_add_up_to_the_score(build, size):
    model = stirred(build()).double().eval()
    x = F.interpolate(X, (size, size), mode="bilinear")
    logits = model(x)
    torch.testing.assert_close(total(G.terms(model, x, Y)), logits.gather(1, Y[:, None])[:, 0], rtol=1e-9, atol=1e-9)
    weights = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(total(G.terms(model, x, weights)), (logits * weights).sum(dim=1), rtol=1e-9, atol=1e-9)


class StandardizedConv2d(nn.Conv2d):
    """As timm's: BatchNorm makes its weight anew, and adds nothing to a result."""

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_weight_that_is_normalised_is_no_layers_result(trained, images, memory_format):
    layers = [StandardizedConv2d(3, 8, 3), nn.ReLU(), StandardizedConv2d(8, 8, 3), nn.ReLU()]
    model = stirred(GapNet(*layers, head=nn.Linear(8, 5))).double().eval().to(memory_format=memory_format)
    model.features.requires_grad_(trained)
    terms = G.terms(model, X[:images], Y[:images])
    assert [len(term) for term in terms] == 4 * [images]
    torch.testing.assert_close(total(terms), model(X[:images]).gather(1, Y[:images, None])[:, 0], rtol=0, atol=1e-12)


def test_densenet121_is_complete_too():
    model = stirred(torchvision.models.densenet121(num_classes=5)).double().eval()
    x = F.interpolate(X[:2], (64, 64), mode="bilinear")
    torch.testing.assert_close(total(G.terms(model, x, 3)), model(x)[:, 3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "is_affine"),
    [
        (nn.GroupNorm(2, 8), False),
        (nn.LayerNorm([8, 4, 4]), False),
        (nn.InstanceNorm2d(8, affine=True), False),
        (nn.BatchNorm2d(8, affine=False), True),
        (nn.GELU(), False),
        (nn.LeakyReLU(0.1), True),
        (nn.ConvTranspose2d(8, 8, 2), True),
        (nn.Conv2d(8, 8, 3, padding=1, groups=4), True),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), True),
        (nn.MaxPool2d(2), True),
    ],
    ids=str,
)
def test_what_is_missing_is_said(layer, is_affine):
    model = stirred(GapNet(*relu_net().features, layer, nn.ReLU(), head=nn.Linear(8, 5))).double().eval()
    terms = G.terms(model, X, Y)
    missing = model(X).gather(1, Y[:, None])[:, 0] - total(terms)
    assert (missing.abs().max() < 1e-9) == is_affine
    with_bias = sum(getattr(module, "bias", None) is not None for module in model.modules())
    assert len(terms) == 1 + with_bias + (isinstance(layer, nn.BatchNorm2d) and not layer.affine)


def test_terms_are_those_of_hooks_on_each_layer():
    model = net().eval()
    outputs = {}
    for name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    x = X.clone().requires_grad_()
    score = model(x).gather(1, Y[:, None]).sum()
    by_image, *by_output = torch.autograd.grad(score, [x, *outputs.values()])
    expected = [by_image * x]
    for name, gradient in zip(outputs, by_output, strict=True):
        module = model.get_submodule(name)
        bias = module.bias
        if isinstance(module, nn.BatchNorm2d):
            bias = bias - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
        expected.append(gradient * (bias[:, None, None] if gradient.ndim == 4 else bias))
    terms = G.terms(model, X, Y)
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(G(model, X, Y).heatmap, full_grad(terms, (16, 16)))


def test_in_training_batchnorms_bias_is_that_of_the_batch():
    model, norm = net(), nn.BatchNorm2d(3).double()
    nn.init.normal_(norm.bias), nn.init.normal_(norm.weight)
    model.features.insert(0, norm)
    mean, variance = X.mean(dim=(0, 2, 3)), X.var(dim=(0, 2, 3), correction=0)
    implicit = norm.bias - norm.weight * mean / (variance + norm.eps).sqrt()
    after = norm(X).detach().requires_grad_()
    score = nn.Sequential(*model.features[1:])(after).mean(dim=(2, 3))
    (gradient,) = torch.autograd.grad(model.head(score).gather(1, Y[:, None]).sum(), after)
    torch.testing.assert_close(G.terms(model, X, Y)[1], gradient * implicit[:, None, None])


# ---- a step


@pytest.mark.parametrize("training", [True, False])
def test_a_step_moves_and_leaves_what_a_plain_one_does(training):
    model, plain = net().train(training), net().train(training)
    before = settings_of(model)
    seen, logits = G(model, X, Y), plain(X)
    assert_same((seen.logits, seen.target), (logits, Y))
    assert_same(buffers_of(model), buffers_of(plain))
    loss = F.cross_entropy(seen.logits, Y) + 0 * seen.heatmap.sum()
    assert_same(gradients(loss, model), gradients(F.cross_entropy(logits, Y), plain))
    assert settings_of(model) == before


def test_gradient_of_every_parameter_equals_finite_differences():
    model, x, y = net().eval(), X[:2, :, :8, :8], Y[:2]
    wanted = torch.rand(2, 8, 8, generator=generator(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *_: (G(model, x, y).heatmap * wanted).sum(), tuple(model.parameters()))


def test_a_loss_on_the_heatmap_moves_it():
    model, wanted = net(), torch.rand(4, 16, 16, generator=generator(1), dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        heatmap = G(model, X, Y).heatmap
        loss = 1 - F.cosine_similarity(heatmap.flatten(1), wanted.flatten(1)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_cgc_makes_it_consistent():
    model, t = net(), SpatialTransform(SpatialTransform.identity(4).theta.double() * torch.tensor([[-1.0], [1.0]]))
    out = CGCRegularizer(G).compute(model, X, Y, view=t(X), transform=t)
    query = t(full_grad(G.terms(copy.deepcopy(model), X, Y), (16, 16)))
    key = full_grad(G.terms(copy.deepcopy(model), t(X), Y), (16, 16))
    torch.testing.assert_close(out.loss, info_nce(query, key))
    model = net()
    again = CGCRegularizer(G, generator=generator(0)).compute(model, X, Y)
    assert all(
        gradient.abs().sum() > 0 for name, gradient in gradients(again.loss, model).items() if "bias" not in name
    )


def test_mixed_precision_keeps_the_heatmap_in_float32():
    model, x = net().float(), X.float()
    exact = G(model, x, Y).heatmap
    with torch.autocast("cpu", torch.bfloat16):
        seen = G(model, x, Y)
    assert (seen.heatmap.dtype, seen.logits.dtype) == (torch.float32, torch.bfloat16)
    assert F.cosine_similarity(seen.heatmap.flatten(1), exact.flatten(1)).min() > 0.99
    assert all(gradient.isfinite().all() for gradient in gradients(seen.heatmap.sum(), model).values())


def test_float16_measures_and_is_refused_in_training():
    model, x = net().float(), X.float()
    exact = explain(model, x, G, Y)
    with torch.autocast("cpu", torch.float16):
        seen = explain(model, x, G, Y)
        with pytest.raises(ValueError, match=r"must train in bfloat16 or float32.*got float16"):
            G(model, x, Y)
    assert seen.dtype == torch.float32
    assert F.cosine_similarity(seen.flatten(1), exact.flatten(1)).min() > 0.99


@pytest.mark.filterwarnings("error:FullGrad looks through every BatchNorm")
def test_a_batchnorm_in_training_is_warned_of_once():
    model = net()
    with pytest.warns(UserWarning, match="FullGrad looks through every BatchNorm"):
        G(model, X, Y)
    G(model, X, Y)
    G(net().eval(), X, Y)
    explain(net(), X, G, Y)
    with torch.no_grad():
        G(net(), X, Y)


class Checkpointed(GapNet):
    def forward(self, x):
        return self.head(checkpoint(self.features, x, use_reentrant=False).mean(dim=(2, 3)))


def test_a_checkpoint_changes_nothing():
    plain = net()
    model = Checkpointed(*net().features, head=net().head)
    torch.testing.assert_close(G(model, X, Y).heatmap, G(net(), X, Y).heatmap)
    torch.testing.assert_close(
        gradients(G(model, X, Y).heatmap.sum(), model), gradients(G(plain, X, Y).heatmap.sum(), plain)
    )


def test_a_frozen_trunk_trains_what_is_not_frozen():
    model = net()
    full = gradients(G(model, X, Y).heatmap.sum(), model)
    model.features.requires_grad_(False)
    frozen = gradients(G(model, X, Y).heatmap.sum(), model)
    assert frozen.keys() == {"head.weight", "head.bias"}
    torch.testing.assert_close(frozen["head.weight"], full["head.weight"])


def test_measures_have_no_graph_and_look_in_evaluation_mode():
    model = net()
    with torch.no_grad():
        seen = G(model, X, Y)
        terms = G.terms(model, X, Y)
    assert not any(each.requires_grad for each in (seen.heatmap, seen.logits, *terms))
    frozen = net().requires_grad_(False)
    looked_at = explain(frozen, X, G, Y)
    assert_same(looked_at, G(net().eval(), X, Y).heatmap.detach())
    with torch.inference_mode():
        assert_same(explain(frozen, X, G, Y), looked_at)


def test_images_that_the_model_changes_stay_what_they_are():
    class InPlace(GapNet):
        def forward(self, x):
            x -= 0.5
            return super().forward(x)

    x = X.clone()
    G(InPlace(*net().features, head=net().head), x, Y)
    assert_same(x, X)


def test_images_with_a_graph_of_their_own_get_their_gradient():
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(G(net(), X + shift, Y).heatmap.sum(), shift)
    assert gradient.abs() > 0


class Cut(GapNet):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("build", [Cut, LinearProbe])
def test_a_model_that_cuts_its_images_off_is_refused(build):
    with pytest.raises(RuntimeError, match="lead from its images to the logits"):
        G(build(*net().features, head=net().head), X, Y)


def test_it_is_a_value():
    g = FullGrad(output_fn=list)
    assert FullGrad() == G != g
    assert hash(FullGrad()) == hash(G)
    assert repr(G) == "FullGrad(output_fn=None)"
    assert pickle.loads(pickle.dumps(G)) == copy.deepcopy(G) == G
    with pytest.raises(TypeError, match="`output_fn` must be a function"):
        FullGrad(output_fn="logits")


def test_output_fn_says_what_the_logits_are():
    class Named(GapNet):
        def forward(self, x):
            return {"scores": super().forward(x)}

    model = Named(*net().features, head=net().head)
    g = FullGrad(output_fn=lambda output: output["scores"])
    assert_same(g(model, X, Y).heatmap, G(net(), X, Y).heatmap)


def step(model, share):
    seen = G(model, X[share], Y[share])
    wanted = torch.arange(256.0, dtype=torch.float64).view(16, 16).sin()
    return (seen.heatmap * wanted).sum(dim=(1, 2)).mean()


def work(rank):
    inner = net(nn.Identity)
    model = DistributedDataParallel(inner)  # which must live as long as its backward
    step(model, slice(2 * rank, 2 * rank + 2)).backward()
    return {name: parameter.grad for name, parameter in inner.named_parameters()}


def test_two_processes_get_the_gradients_of_one(tmp_path):
    model = net(nn.Identity)
    expected = gradients(step(model, slice(0, 4)), model)
    for found in gloo.run(work, 2, tmp_path):
        torch.testing.assert_close(found, expected)
