"""Transformers: their outputs become maps by `reshape_transform`, and are not taken for maps without."""

import pytest
import torch
import torchvision
from strategies import generator

from cgc_reg import CGCRegularizer, GradCAM, TokensToMaps, channels_last_to_maps, explain, suggest_target_layer
from cgc_reg.model.layers import is_channels_last

X = torch.randn(2, 3, 64, 64, generator=generator(0))
BEFORE_LAST_ATTENTION = "encoder.layers.encoder_layer_1.ln_1"


def swin():
    return torchvision.models.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5, stochastic_depth_prob=0.0
    )


def vit():
    # torchvision starts the head at zero, where every gradient vanishes.
    model = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5)
    torch.nn.init.normal_(model.heads.head.weight)
    return model


def test_swin_trains_through_channels_last_to_maps():
    model = swin()
    out = CGCRegularizer(GradCAM("features", reshape_transform=channels_last_to_maps)).compute(model, X)
    assert out.key.shape == (2, 8, 8)
    out.loss.backward()
    assert model.features[0][0].weight.grad.count_nonzero() > 0


def test_vit_trains_through_tokens_to_maps():
    model = vit()
    out = CGCRegularizer(GradCAM(BEFORE_LAST_ATTENTION, reshape_transform=TokensToMaps((4, 4)))).compute(model, X)
    assert out.key.shape == (2, 4, 4)
    assert out.scalars["blank_share"] < 1
    out.loss.backward()
    assert model.conv_proj.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("layer", ["features", "features.2", "features.3", "norm"])
def test_channels_last_is_not_taken_for_a_map(layer):
    for run in (lambda m: CGCRegularizer(layer)(m, X), lambda m: explain(m, X, layer)):
        with pytest.raises(ValueError, match="reshape_transform=channels_last_to_maps"):
            run(swin())


def test_tokens_are_not_taken_for_a_map():
    with pytest.raises(ValueError, match="reshape_transform=TokensToMaps"):
        explain(vit(), X, "encoder")


@pytest.mark.parametrize(("build", "repair"), [(swin, "channels_last_to_maps"), (vit, "TokensToMaps")])
def test_suggestion_for_a_transformer_is_the_reshape_transform(build, repair):
    with pytest.raises(ValueError, match=f"reshape_transform={repair}"):
        suggest_target_layer(build(), X)


def test_tokens_come_back_in_their_places():
    maps = torch.randn(2, 5, 3, 4)
    tokens = torch.cat([torch.zeros(2, 2, 5), maps.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(TokensToMaps((3, 4), prefix_tokens=2)(tokens), maps)
    assert torch.equal(channels_last_to_maps(maps.permute(0, 2, 3, 1)), maps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokensToMaps((14, 0)), r"`grid_size` must be .*two positive integers.*got \(14, 0\)"),
        (
            lambda: TokensToMaps((14, 14))(torch.zeros(2, 196, 8)),
            r"tokens of shape \(n, 197, c\).*got a float32 tensor",
        ),
        (lambda: TokensToMaps((14, 14))(torch.zeros(2, 8, 14, 14)), r"tokens of shape \(n, 197, c\)"),
        (lambda: channels_last_to_maps(torch.zeros(2, 49)), r"`output` must be of shape \(n, h, w, c\)"),
    ],
)
def test_other_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class SqueezeExcitation(torch.nn.Module):
    """Weigh channels by linear layers, of which one is as wide as the maps are."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.squeeze, self.excite = torch.nn.Linear(channels, squeezed), torch.nn.Linear(squeezed, channels)

    def forward(self, x):
        return x * self.excite(self.squeeze(x.mean(dim=(2, 3))).relu()).sigmoid()[:, :, None, None]


@pytest.mark.parametrize(
    "layer",
    [
        SqueezeExcitation(6, 8),  # alone: its channels are found among the widths too
        torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), SqueezeExcitation(6, 8), torch.nn.Conv2d(6, 5, 1)),
    ],
    ids=["alone", "among convolutions"],
)
def test_maps_as_wide_as_a_linear_layer_are_not_taken_for_channels_last(layer):
    x = torch.rand(2, 6 if isinstance(layer, SqueezeExcitation) else 3, 8, 8)
    assert not is_channels_last(layer, layer(x))
