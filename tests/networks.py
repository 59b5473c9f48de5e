"""Small networks whose properties the tests rely on, and ways to look at a network's state."""

import torch
from torch import nn


class GapNet(nn.Module):
    """Layers, then global average pooling and a head: names `features` and `head`."""

    def __init__(self, *features, head):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.head = head

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


class LinearProbe(GapNet):
    """A GapNet whose forward runs its features without gradients."""

    def forward(self, x):
        with torch.no_grad():
            features = self.features(x)
        return self.head(features.mean(dim=(2, 3)))


def relu_net(norm=nn.Identity, classes=5):
    """Two convolutions with ReLUs to a quarter of the size, and a linear head; norm is put behind each convolution."""
    net = GapNet(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        norm(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        norm(8),
        nn.ReLU(),
        head=nn.Linear(8, classes),
    )
    # Without a bias the score is the sum of the evidence: what is predicted has some, and its heatmap is not blank.
    nn.init.zeros_(net.head.bias)
    return net


class InPlace(nn.Module):
    """A net that normalises its images in place."""

    def __init__(self):
        super().__init__()
        self.net = relu_net()

    def forward(self, x):
        x -= 0.5
        return self.net(x)


def smooth_net():
    """A float64 net without a kink, whose head is no linear map: the second derivatives of the score are not zero."""
    return GapNet(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Tanh(),
        head=nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 3)),
    ).double()


def cell_net(cell, channels=6, classes=4):
    """A float64 net that sees each cell of cell x cell pixels alone, with a pooled linear head."""
    return GapNet(
        nn.Conv2d(3, channels, cell, stride=cell),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 1),
        nn.ReLU(),
        head=nn.Linear(channels, classes),
    ).double()


def mirror_net(classes=4):
    """A float64 net whose kernels equal their mirror images: mirroring its input mirrors its maps."""
    net = GapNet(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 6, 5, padding=2),
        nn.ReLU(),
        head=nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, classes)),
    ).double()
    for module in net.features:
        if isinstance(module, nn.Conv2d):
            module.weight.data += module.weight.data.flip(3)
    return net


def gradients(loss, model):
    """Differentiate a loss by the model's parameters: name -> gradient, zeros where there is none."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def settings_of(model):
    """All that a call may change on its way and must put back: hooks, flags, and which objects a module holds."""
    return [
        {
            name: {key: id(item) for key, item in value.items()} if isinstance(value, dict) else value
            for name, value in vars(module).items()
        }
        for module in model.modules()
    ]


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(actual, expected):
    """Compare two dictionaries of tensors bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def untouched(module, args, output):
    """Stand for a hook of the user's own, which does nothing."""
