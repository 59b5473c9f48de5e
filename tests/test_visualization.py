"""Pictures: what they show is what they were given."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image
from torchvision.transforms import v2

from cgc_reg import CGCRegularizer
from cgc_reg.visualization import (
    COLORMAP,
    curves,
    denormalize,
    gallery,
    overlay,
    pair_columns,
    peak_slices,
    similarity_matrix,
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CHANNELS = st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3)


@pytest.fixture(scope="module")
def compared():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 64, 96)
    with torch.no_grad():
        return x, CGCRegularizer("layer4", view_size=(64, 64)).compute(torchvision.models.resnet18().eval(), x)


@given(CHANNELS, CHANNELS, st.booleans())
def test_denormalize_undoes_torchvisions_normalize(mean, std, single):
    images = torch.rand(3, 5, 7) if single else torch.rand(2, 3, 5, 7)
    normalized = v2.functional.normalize(images, mean, std)
    torch.testing.assert_close(denormalize(normalized, mean, std), images)
    torch.testing.assert_close(denormalize(normalized, torch.tensor(mean), torch.tensor(std)), images)


def test_overlay_denormalizes():
    images, heatmaps = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 4)
    normalized = v2.functional.normalize(images, MEAN, STD)
    torch.testing.assert_close(overlay(normalized, heatmaps, mean=MEAN, std=STD), overlay(images, heatmaps))


def test_peak_slices_go_through_the_highest_point():
    volumes, heatmaps = torch.rand(2, 1, 4, 5, 6), torch.rand(2, 4, 5, 6)
    heatmaps[0, 3, 1, 5] = heatmaps[1, 0, 4, 2] = 2.0
    slices = peak_slices(volumes, heatmaps, alpha=0)
    assert list(slices) == ["at the peak's depth", "at the peak's row", "at the peak's column"]
    expected = [(volumes[0, :, 3], volumes[1, :, 0]), (volumes[0, :, :, 1], volumes[1, :, :, 4])]
    expected.append((volumes[0, :, :, :, 5], volumes[1, :, :, :, 2]))
    for found, wanted in zip(slices.values(), expected, strict=True):
        torch.testing.assert_close(found, torch.stack(wanted).expand(-1, 3, -1, -1))
    at_the_rim = torch.zeros(2, 2, 5, 6)
    at_the_rim[0, 0, 1, 5] = at_the_rim[1, 1, 4, 2] = 1.0  # cells of two slices each, level from their centre outward
    in_depth = peak_slices(volumes, at_the_rim, alpha=0)["at the peak's depth"]
    torch.testing.assert_close(in_depth, torch.stack([volumes[0, :, 1], volumes[1, :, 3]]).expand(-1, 3, -1, -1))
    painted = peak_slices(volumes, heatmaps[:, ::2, ::2, ::2], alpha=1)
    assert [image.shape[1:] for image in painted.values()] == [(3, 5, 6), (3, 4, 6), (3, 4, 5)]
    assert len(gallery(painted).axes) == 3
    in_space = peak_slices(volumes, heatmaps, spacing=(5.0, 2.0, 1.0))
    assert [image.shape[2:] for image in in_space.values()] == [(10, 6), (20, 6), (20, 10)]
    normalized = peak_slices((volumes - 0.4) / 0.2, heatmaps, alpha=0, mean=[0.4], std=[0.2])
    torch.testing.assert_close(normalized, slices)
    with pytest.raises(ValueError, match=r"`spacing` must be three positive numbers; got \(1, 0, 1\)"):
        peak_slices(volumes, heatmaps, spacing=(1, 0, 1))
    with pytest.raises(ValueError, match=r"`volumes` must be \(n, 1, D, H, W\) or .* got .* \(2, 5, 6\)"):
        peak_slices(volumes, heatmaps[:, 0])
    with pytest.raises(ValueError, match="Of volumes take `peak_slices`"):
        overlay(volumes, heatmaps)
    for column in (volumes, heatmaps, heatmaps[:, 0, 0]):
        with pytest.raises(ValueError, match=r"`columns` must hold images .* as 'a'.* Of volumes take `peak_slices`"):
            gallery({"a": column})


def test_overlay_goes_from_the_image_to_the_colours_of_the_heatmap():
    images, heatmaps = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 4)
    heatmaps[1] = 0
    torch.testing.assert_close(overlay(images, heatmaps, alpha=0), images)
    colors = overlay(images, heatmaps, alpha=1)
    least, most = (torch.tensor(colormaps[COLORMAP](value)[:3], dtype=torch.float32) for value in (0.0, 1.0))
    torch.testing.assert_close(colors[1], least[:, None, None].expand(3, 16, 16))
    enlarged = F.interpolate(heatmaps[:1, None], (16, 16), mode="bilinear", align_corners=False)[0, 0]
    peak = divmod(int(enlarged.argmax()), 16)
    torch.testing.assert_close(colors[0, :, peak[0], peak[1]], most)
    torch.testing.assert_close(overlay(images, heatmaps, alpha=0.3), 0.7 * images + 0.3 * colors)
    torch.testing.assert_close(overlay(images, 5 * heatmaps), overlay(images, heatmaps))


def test_pair_columns_are_what_was_compared(compared):
    x, out = compared
    columns = pair_columns(x, out)
    torch.testing.assert_close(columns["x"], x)
    torch.testing.assert_close(columns["T(x)"], out.view)
    torch.testing.assert_close(columns["query T(g(x))"], out.query)
    torch.testing.assert_close(columns["key g(T(x))"], out.key)
    torch.testing.assert_close(columns["g(x)"], out.heatmap)
    torch.testing.assert_close(columns["overlay of g(x)"], overlay(x, out.heatmap))
    torch.testing.assert_close(columns["overlay of g(T(x))"], overlay(out.view, out.key))
    normalized = pair_columns(v2.functional.normalize(x, MEAN, STD), out, mean=MEAN, std=STD)
    torch.testing.assert_close(normalized["x"], x)
    assert {name: len(column) for name, column in pair_columns(x, out, count=3).items()} == dict.fromkeys(columns, 3)


def shown(axis, row):
    return torch.from_numpy(axis.images[row].get_array().data)


def test_gallery_has_a_titled_column_for_each_tensor(compared, tmp_path):
    x, out = compared
    columns = pair_columns(x, out)
    figure = gallery(columns, title="a title")
    assert [axis.get_title() for axis in figure.axes] == list(columns)
    assert [len(axis.images) for axis in figure.axes] == [len(x)] * len(columns)
    torch.testing.assert_close(shown(figure.axes[0], 1), x[1].permute(1, 2, 0))
    figure.savefig(tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.size == tuple((figure.get_size_inches() * figure.dpi).astype(int))


def test_rows_of_a_gallery_stand_side_by_side_each_image_in_its_own_shape():
    columns = {"wide": torch.rand(3, 3, 4, 6), "square": torch.rand(3, 5, 5), "tall": torch.rand(3, 3, 8, 2)}
    axes = gallery(columns).axes
    for axis, column in zip(axes, columns.values(), strict=True):
        extents = [image.get_extent() for image in axis.images]
        assert {(left, right) for left, right, _, _ in extents} == {axis.get_xlim()} == {(0, 1)}
        for _, _, bottom, top in extents:
            assert bottom - top == pytest.approx(column.shape[-2] / column.shape[-1])
    *_, tall = axes
    for i in range(3):
        middles = [sum(axis.images[i].get_extent()[2:]) / 2 for axis in axes]
        assert middles == pytest.approx(middles[:1] * 3)
    edges = [edge for image in tall.images for edge in image.get_extent()[:1:-1]]
    assert edges == sorted(edges)
    assert tall.get_ylim() == pytest.approx((edges[-1], edges[0]))


def test_gallery_shows_grey_images_grey():
    grey = torch.rand(2, 1, 5, 6)
    figure = gallery({"grey": grey})
    torch.testing.assert_close(shown(figure.axes[0], 1), grey[1, 0, :, :, None].expand(-1, -1, 3))


def test_similarity_matrix_shows_the_cosine_of_each_pair():
    query, key = torch.rand(5, 3, 4, dtype=torch.float64, requires_grad=True), torch.rand(5, 3, 4, dtype=torch.float64)
    key.data[2] = 0  # a blank map resembles none
    figure = similarity_matrix(query, key)
    axis, bar = figure.axes
    cosines = axis.images[0].get_array()
    for i in range(5):
        for j in range(5):
            expected = F.cosine_similarity(query[i].flatten(), key[j].flatten(), dim=0).item()
            assert cosines[i, j] == pytest.approx(expected, abs=1e-6)
    assert cosines.diagonal().mean() == pytest.approx(float(axis.get_title().split()[2].rstrip(",")), abs=0.005)
    assert "query" in axis.get_ylabel()
    assert "key" in axis.get_xlabel()
    assert "cosine" in bar.get_ylabel()
    assert similarity_matrix(query, key, title="mine").axes[0].get_title() == "mine"


def test_curves_leave_a_gap_for_a_missing_value():
    history = [{"epoch": 1, "loss": 2.0}, {"epoch": 2}, {"epoch": 3, "loss": 1.0, "top1": 0.5}]
    loss, top1 = curves(history, {"loss": ["loss"], "accuracy": ["top1"]}).axes
    assert loss.get_title() == "loss"
    assert loss.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert str(loss.lines[0].get_ydata().tolist()) == "[2.0, nan, 1.0]"
    assert top1.get_xlabel() == "epoch"


def test_bad_input_is_refused(compared):
    x, out = compared
    heatmaps = torch.rand(4, 2, 2)
    with pytest.raises(ValueError, match="one image for each heatmap"):
        overlay(x, heatmaps[:3])
    with pytest.raises(ValueError, match="one image for each heatmap"):
        overlay(x[:, :1], heatmaps)
    with pytest.raises(ValueError, match=r"`alpha` must be from 0 .* got 1\.5"):
        overlay(x, heatmaps, alpha=1.5)
    for wrong in (x.to(torch.uint8), x[0, 0], x[:, :1]):
        with pytest.raises(ValueError, match="one number for each channel"):
            denormalize(wrong, MEAN, STD)
    with pytest.raises(ValueError, match="got 3 and 1 for"):
        overlay(x, heatmaps, mean=MEAN, std=[0.5])
    with pytest.raises(ValueError, match="the images that `out` was computed from"):
        pair_columns(x[:2], out)
    with pytest.raises(ValueError, match=r"`x` must be images .* Of volumes take `peak_slices`"):
        pair_columns(x[:, :, None], out)
    with pytest.raises(ValueError, match="must have one shape"):
        similarity_matrix(out.query, out.key[:2])
    with pytest.raises(ValueError, match="tensors of one length"):
        gallery({"x": x, "heatmap": heatmaps[:1]})
