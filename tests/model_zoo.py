"""Classification models, each with the layer that a person would name, and a check of one against the equation.

python -m tests.model_zoo            # checks all of them and writes docs/models.md
python -m tests.model_zoo NAME...    # checks these and writes nothing
"""

import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE
from torchvision.models.resnet import Bottleneck

from cgc_reg import (
    CGCRegularizer,
    GradCAM,
    RandomAffine,
    TokensToMaps,
    channels_last_to_maps,
    compile_below,
    suggest_target_layer,
)

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
CLASSES, BATCH, TAU = 10, 2, 0.5
RESHAPES = ["TokensToMaps", "channels_last_to_maps"]


@dataclass(frozen=True)
class Case:
    source: str  # "torchvision" or "timm"
    name: str
    layer: str  # that a person would name
    build: Callable[[], nn.Module]
    size: int = 96  # of the images, in pixels
    reshape: Callable[[Tensor], Tensor] | None = None
    small: bool = False  # quick enough for the ordinary tests
    aside: str = ""  # a stage in front of the layer that the logits do not come from


@dataclass(frozen=True)
class Row:
    """What a check found; problems is empty where all is as it must be."""

    family: str
    parameters: int
    heatmap: tuple[int, int]
    loss: float
    blank: float
    absent: int
    tensors: int
    difference: float
    suggestion: str
    warned: bool
    parts: int
    share: float
    problems: list[str]


# All classifiers of torchvision with up to 60 million parameters, with ten classes if not with a thousand; and two VGGs
# and a ViT, of which none is that small.
TORCHVISION = {
    "features": "alexnet convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201 efficientnet_b0 "
    "efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_v2_m "
    "efficientnet_v2_s mobilenet_v2 mobilenet_v3_large mobilenet_v3_small squeezenet1_0 squeezenet1_1 swin_s swin_t "
    "swin_v2_s swin_v2_t vgg11_bn vgg16",
    "inception5b": "googlenet",
    "Mixed_7c": "inception_v3",
    "blocks.3": "maxvit_t",
    "layers": "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    "trunk_output": "regnet_x_16gf regnet_x_1_6gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf "
    "regnet_y_1_6gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf",
    "layer4": "resnet101 resnet152 resnet18 resnet34 resnet50 resnext50_32x4d",
    "conv5": "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    "encoder.layers.encoder_layer_11.ln_1": "vit_b_16",
}
# Small models of many of timm's families, most of which put out maps, and some transformers.
TIMM = {
    "stages": "botnet26t_256 convformer_s18 convnext_atto convnextv2_atto cs3darknet_focus_s cspresnet50 darknet17 "
    "davit_tiny eca_resnext26ts edgenext_xx_small efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 gcvit_xxtiny "
    "hgnetv2_b0 inception_next_atto lambda_resnet26t mambaout_femto mobileone_s0 mobilevitv2_050 nf_resnet26 "
    "poolformer_s12 pvt_v2_b0 repvgg_a0 repvit_m0_9 test_byobnet test_convnext test_mambaout tiny_vit_5m_224",
    "layers": "swin_tiny_patch4_window7_224",
    "blocks": "convmixer_768_32 fbnetv3_b ghostnet_050 ghostnetv2_100 hardcorenas_a lcnet_035 mobilenetv3_small_050 "
    "mobilenetv4_conv_small repghostnet_050 xception41",
    "blocks.5.norm1": "test_vit",
    "blocks.11.norm1": "vit_tiny_patch16_224",
    "features": "densenetblur121d dpn48b inception_v4 rexnet_100",
    "dense_stages": "rdnet_tiny",
    "body": "tresnet_m",
    "layer4": "legacy_seresnet18 res2net50_14w_8s resnest14d resnet10t skresnet18 test_resnet",
    "level5": "dla46_c",
    "s4": "regnetx_002 regnety_002",
    "Mixed_7c": "inception_v3",
    "bn2": "efficientnet_lite0 fbnetc_100 mixnet_s mnasnet_small mobilenetv2_035 spnasnet_100 test_efficientnet "
    "tinynet_e",
    "bn4": "legacy_xception",
    "conv2d_7b": "inception_resnet_v2",
    "final_conv": "fastvit_t8 gernet_s mobilevit_xxs nf_regnet_b0 test_nfnet",
    "final_layer": "hrnet_w18_small",
    "head": "selecsls42",
    "head.in_conv": "efficientvit_b0",
    "norm": "coatnet_nano_rw_224 efficientformerv2_s0 focalnet_tiny_srf maxvit_pico_rw_256 nextvit_small resnetv2_18 "
    "resnetv2_50 starnet_s1 swiftformer_xs visformer_tiny",
}
# Quick ones of many families; those of torchvision that have none come below, made small by their arguments.
SMALL = """
    efficientnet_b0 googlenet mnasnet0_5 mobilenet_v3_small regnet_x_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1

    cs3darknet_focus_s dla46_c edgenext_xx_small efficientvit_b0 ese_vovnet19b_slim_dw fasternet_t0
    hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_035 mobilenetv4_conv_small mobilevit_xxs regnetx_002
    repghostnet_050 resnetv2_18 rexnet_100 swiftformer_xs test_byobnet test_convnext test_efficientnet test_mambaout
    test_nfnet test_resnet test_vit
"""
# Where 96 pixels are too few for the layer, or another number is built in.
SIZES = {
    "botnet26t_256": 256,
    "coatnet_nano_rw_224": 224,
    "efficientformerv2_s0": 224,
    "gcvit_xxtiny": 224,
    "inception_resnet_v2": 160,
    "inception_v3": 299,
    "inception_v4": 160,
    "maxvit_pico_rw_256": 256,
    "maxvit_t": 224,
    "swin_tiny_patch4_window7_224": 224,
    "test_vit": 160,
    "visformer_tiny": 224,
    "vit_tiny_patch16_224": 224,
}
ARGUMENTS = {
    "torchvision": {
        "googlenet": {"init_weights": True},
        "inception_v3": {"init_weights": True},
        "vit_b_16": {"image_size": 96},
    },
    "timm": {},
}
RESHAPE = {
    **dict.fromkeys(["swin_s", "swin_t", "swin_v2_s", "swin_v2_t"], channels_last_to_maps),
    **dict.fromkeys(["mambaout_femto", "swin_tiny_patch4_window7_224", "test_mambaout"], channels_last_to_maps),
    "test_vit": TokensToMaps((10, 10)),
    "vit_b_16": TokensToMaps((6, 6)),
    "vit_tiny_patch16_224": TokensToMaps((14, 14)),
}


def listed(source, create, models):
    for layer, names in models.items():
        for name in names.split():
            yield Case(
                source,
                name,
                layer,
                partial(create, name, num_classes=CLASSES, **ARGUMENTS[source].get(name, {})),
                SIZES.get(name, 96),
                RESHAPE.get(name),
                small=name in SMALL.split(),
                aside="AuxLogits" if name == "inception_v3" else "",
            )


def narrow_head(name):
    """Build a VGG or an AlexNet whose linear layers are 64 wide, without filling the wide ones first."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    linear = [i for i, module in enumerate(model.classifier) if isinstance(module, nn.Linear)]
    widths = [model.classifier[linear[0]].in_features, 64, 64, CLASSES]
    for i, layer in enumerate(linear):
        model.classifier[layer] = nn.Linear(widths[i], widths[i + 1])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.zeros_(parameter)
    return model


class PooledAuxiliary(nn.Module):
    """An auxiliary head for maps of any size; Inception's own needs those of images of 299 pixels."""

    def __init__(self, channels, classes):
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))


def inception():
    blocks = [BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE, PooledAuxiliary]
    return torchvision.models.Inception3(CLASSES, inception_blocks=blocks, init_weights=True)


def convnext():
    return torchvision.models.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], 0.1, num_classes=CLASSES)


def densenet():
    return torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=CLASSES)


def maxvit():
    return torchvision.models.MaxVit((64, 64), 16, 2, [16, 32], [1, 2], 8, 0.2, num_classes=CLASSES)


def resnext():
    return torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], CLASSES, groups=32, width_per_group=4)


def swin():
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)


def vit():
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=CLASSES)


def pvt():
    return timm.create_model("pvt_v2_b0", num_classes=CLASSES, depths=(1, 1, 1, 1))


def timm_swin():
    narrow = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **narrow)


MADE_SMALL = [
    Case("torchvision", "AlexNet, narrow head", "features", partial(narrow_head, "alexnet"), 128, small=True),
    Case("torchvision", "ConvNeXt, two stages", "features", convnext, 64, small=True),
    Case("torchvision", "DenseNet, three blocks", "features", densenet, 64, small=True),
    Case("torchvision", "Inception v3, small side head", "Mixed_7c", inception, 128, small=True, aside="AuxLogits"),
    Case("torchvision", "MaxViT, two stages", "blocks.1", maxvit, 64, small=True),
    Case("torchvision", "ResNeXt, four blocks", "layer4", resnext, 64, small=True),
    Case("torchvision", "Swin, two stages", "features", swin, 64, channels_last_to_maps, small=True),
    Case("torchvision", "VGG-11, narrow head", "features", partial(narrow_head, "vgg11"), 64, small=True),
    Case(
        "torchvision",
        "ViT, two blocks",
        "encoder.layers.encoder_layer_1.ln_1",
        vit,
        64,
        TokensToMaps((4, 4)),
        small=True,
    ),
    Case("timm", "PVT v2, four blocks", "stages", pvt, small=True),
    Case("timm", "Swin, two stages", "layers", timm_swin, 64, channels_last_to_maps, small=True),
]

CASES = [
    *listed("torchvision", torchvision.models.get_model, TORCHVISION),
    *listed("timm", timm.create_model, TIMM),
    *MADE_SMALL,
]


def prepare(case, seed=0):
    """Return the model in training mode and images, in float64, in which rounding hides nothing."""
    torch.manual_seed(seed)
    model = case.build().double().train()
    for parameter in model.parameters():
        # As the head of torchvision's ViT does; no gradient passes it then.
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model, torch.randn(BATCH, 3, case.size, case.size, dtype=torch.float64)


def slow_loss(model, case, x, view, transform):
    """Work out the loss as the paper writes it.

    Returns:
        The loss, the classes, the heatmaps' grid, and whether an image's score depends on other images.
    """
    heatmaps, classes, mixes = [], None, False
    for images in (x, view):
        outputs = []

        def keep(module, args, output, outputs=outputs):
            outputs.append(output)
            return output.clone()  # for an in-place layer behind this one to write on

        handle = model.get_submodule(case.layer).register_forward_hook(keep)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            scores = model(images)
        handle.remove()
        scores = getattr(scores, "logits", scores)  # beside those of auxiliary heads
        if classes is None:
            classes = scores.argmax(dim=1).tolist()
        (output,) = outputs
        (alone,) = torch.autograd.grad(scores[0, classes[0]], output, retain_graph=True)
        mixes = mixes or bool(alone[1:].any())
        total = sum(scores[i, k] for i, k in enumerate(classes))
        (gradient,) = torch.autograd.grad(total, output, create_graph=True)
        a, dy_da = (case.reshape(t) if case.reshape else t for t in (output, gradient))
        alpha = dy_da.mean(dim=(2, 3), keepdim=True)
        heatmaps.append((alpha * a).sum(dim=1).relu())
    grid = tuple(heatmaps[1].shape[1:])
    visible = transform.coverage(grid)
    q = [m.flatten() / m.norm() for m in transform(heatmaps[0], grid) * visible]
    k = [m.flatten() / m.norm() for m in heatmaps[1] * visible]
    losses = [
        -torch.log(torch.exp(q[i] @ k[i] / TAU) / sum(torch.exp(q[i] @ k[j] / TAU) for j in range(BATCH)))
        for i in range(BATCH)
    ]
    return sum(losses) / BATCH, torch.tensor(classes), grid, mixes


def gradients_of(loss, model):
    """Return the gradient of each parameter, None where there is none, and clear them."""
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def difference(actual, expected):
    """Return the largest distance of two gradients, relative to the parameter's largest.

    A bias in front of a BatchNorm has a gradient of zero but for rounding: less than a millionth of the model's largest
    counts as that.
    """
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    return max(
        float((actual[name] - g).abs().max()) / max(float(g.abs().max()), 1e-6 * largest)
        for name, g in expected.items()
        if g is not None and actual[name] is not None
    )


def stages(model, layer):
    """Yield the names of what stands in front of a layer, and of the layer; a Sequential counts by its parts."""
    first, _, rest = layer.partition(".")
    for name, child in model.named_children():
        if name == first and rest:
            yield from (f"{name}.{part}" for part in stages(child, rest))
        elif isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from (f"{name}.{part}" for part, _ in child.named_children())
        else:
            yield name
        if name == first:
            return


def inside(stage, names):
    return any(name.startswith(f"{stage}.") for name in names)


def hooks_of(model):
    return [
        {key: list(value) for key, value in vars(module).items() if "_hooks" in key and value is not None}
        for module in model.modules()
    ]


def suggestion_for(model, x):
    """Return the suggested layer, or the `reshape_transform` that the error asks for."""
    try:
        return suggest_target_layer(model, x)
    except ValueError as error:
        return next((name for name in RESHAPES if f"reshape_transform={name}" in str(error)), str(error))


def reshape_name(case):
    return "TokensToMaps" if isinstance(case.reshape, TokensToMaps) else "channels_last_to_maps"


def check(case):
    """Compare one model's training step with the slow one, and return what was found."""
    for seed in range(10):
        model, x = prepare(case, seed)
        transform = RandomAffine(30, (0.2, 0.2), (0.8, 1.4)).sample(BATCH, (case.size, case.size))
        view = transform(x)
        hooks = hooks_of(model)
        torch.manual_seed(1)  # of dropout and stochastic depth
        slow, target, grid, mixes = slow_loss(model, case, x, view, transform)
        if slow.isfinite():  # a blank heatmap, which random weights can give, has no direction: 0 / 0
            break
    expected = gradients_of(slow, model)

    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("error")
        warnings.filterwarnings("always", message="A BatchNorm behind `target_layer`")
        reg = CGCRegularizer(GradCAM(case.layer, reshape_transform=case.reshape), temperature=TAU)
        out = reg.compute(model, x, target=target, view=view, transform=transform)
    actual = gradients_of(out.loss, model)

    loss, blank = out.loss.item(), out.scalars["blank_share"].item()
    absent = {name for name, gradient in expected.items() if gradient is None}
    distance = difference(actual, expected)
    suggestion = suggestion_for(model, x)
    alive = {name for name, gradient in actual.items() if gradient is not None and gradient.any()}
    dead = [
        stage
        for stage in stages(model, case.layer)
        if stage != case.aside and inside(stage, actual) and not inside(stage, alive)
    ]
    parts, share = compiled_below(model, x, case.layer)
    laws = {
        "the loss is the slow one": math.isfinite(loss) and abs(loss - slow.item()) < 1e-9,
        "heatmaps are not blank": blank == 0,
        "the heatmap has the layer's shape": out.query.shape[1:] == out.key.shape[1:] == grid,
        "gradients are absent where the slow ones are": absent == {n for n, g in actual.items() if g is None},
        "gradients are finite": all(g.isfinite().all() for g in actual.values() if g is not None),
        "gradients are the slow ones": distance < 1e-6,
        f"every stage gets a gradient; got none for {dead}": not dead,
        "no hook is left": hooks_of(model) == hooks,
        "images that mix are warned of": bool(warned) == mixes,
        f"the suggestion is what a person would name; got {suggestion}": suggestion
        == (reshape_name(case) if case.reshape else case.layer),
    }
    return Row(
        family=type(model).__module__.rpartition(".")[2],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        heatmap=grid,
        loss=loss,
        blank=blank,
        absent=len(absent),
        tensors=len(expected),
        difference=distance,
        suggestion=suggestion,
        warned=bool(warned),
        parts=parts,
        share=share,
        problems=[law for law, holds in laws.items() if not holds],
    )


def compiled_below(model, x, layer):
    """Return how many parts `compile_below` compiles, and what share of a pass's multiply-adds is inside them."""
    parts = compile_below(model, x, layer, backend="eager")
    parts.remove()  # what is counted runs as written
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    inside = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return len(parts.names), sum(inside.get(name, 0) for name in parts.names) / counter.get_total_flops()


def line(case, row):
    suggestion = f"asks for `{row.suggestion}`" if row.suggestion in RESHAPES else f"`{row.suggestion}`"
    cells = [
        case.name,
        row.family,
        f"{row.parameters / 1e6:.2f}",
        f"{case.size}",
        f"`{case.layer}`" + (f", `{reshape_name(case)}`" if case.reshape else ""),
        "{} x {}".format(*row.heatmap),
        f"{row.loss:.3f}",
        f"{row.blank:.2f}",
        f"{row.absent} of {row.tensors}",
        f"{row.difference:.0e}",
        f"{row.parts}, {row.share:.1%}",
        "; ".join([suggestion, *["warned of BatchNorm"] * row.warned, *(f"**not so: {law}**" for law in row.problems)]),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """
| model | family | parameters, millions | image | target layer | heatmap | loss | blank | no gradient | difference \
| compiled | suggested |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
TEXT = """\
# Models

Each model here, with random weights and ten classes, in training mode, on a batch of {batch} random images, in float64:

- the loss is finite, and that of a slow and plain computation of the equation;
- a parameter has no gradient exactly where it has none in that computation; every other gradient is finite, and the
  same but for rounding; every stage up to the target layer has one that is not zero;
- the heatmap has the size of the layer's map, none is blank, and no hook is left;
- `suggest_target_layer` names the layer that a person would name, or asks for the `reshape_transform` to pass;
- where a BatchNorm behind the layer makes a score depend on the other images, and only there, a warning says so: in
  three models that have one behind their pooling, where no map is left.

    python -m tests.model_zoo

runs the plain computation and the regularizer on all of them and writes this page; the ordinary tests do it for a small
model of each family. Torchvision's are all its classifiers of up to 60 million parameters, with two VGGs and a ViT,
which are larger, and some made small by their constructors' arguments. timm's are small models of
many families, transformers among them. Of models for volumes, clips and signals, `tests/test_volumes.py` compares a
step with a slow one: torchvision's r3d_18, mc3_18 and r2plus1d_18, MONAI's DenseNet121, ResNet and SENet in three
dimensions, and a ResNet of signals.

*No gradient* counts parameter tensors: biases behind the layer, and auxiliary heads. *Difference* is the largest one
from the plain computation's gradient, relative to the largest value of that parameter's gradient. *Compiled* are the
parts that `compile_below` compiles, and the share of a pass's multiply-adds that is inside them: on larger images the
head's share, which is outside, is smaller. At 224 x 224 a test asks for 95 % in a small model of each family.

torch {torch}, torchvision {torchvision}, timm {timm}, {minutes:.0f} minutes of one thread of an {machine} CPU.
"""


def main(names):
    torch.set_num_threads(1)
    chosen = [case for case in CASES if not names or case.name in names]
    start, failed, lines = time.process_time(), [], {"torchvision": [], "timm": []}
    for i, case in enumerate(chosen, 1):
        print(f"{i}/{len(chosen)} {case.source} {case.name}", end=" ", flush=True)
        try:
            row = check(case)
        except Exception as error:  # a table of all models has to go on, whatever one of them does
            row, problems = None, [f"{type(error).__name__}: {error}"]
        else:
            problems = row.problems
            lines[case.source].append(line(case, row))
        print(f"{time.process_time() - start:.0f} s", *problems, sep="; ", flush=True)
        failed += [case.name] if problems else []
    if not names:
        text = TEXT.format(
            batch=BATCH,
            torch=torch.__version__.partition("+")[0],
            torchvision=torchvision.__version__.partition("+")[0],
            timm=timm.__version__,
            machine=platform.machine().replace("_", "-"),
            minutes=(time.process_time() - start) / 60,
        )
        for source, rows in lines.items():
            text += "\n".join(["", f"## {source}", HEAD, *rows, ""])
        TABLE.write_text(text)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} as they must be", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
