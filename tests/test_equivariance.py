"""g(T(x)) = T(g(x)), exactly, for networks that are equivariant by construction."""

import pytest
import torch
from explainers import EXPLAINERS, RULES, explainer
from hypothesis import given
from hypothesis import strategies as st
from networks import cell_net, mirror_net
from strategies import laws, noise, seeds

from cgc_reg import CGCRegularizer, SpatialTransform, explain

CELL = 4  # pixels along a side of what `cell_net` sees at once
N = 3
TARGET = torch.tensor([0, 1, 3])
# float64 keeps 16 digits; positions, interpolation and four layers of sums lose a few of them.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}

# Grad-CAM++ weighs a channel by the sum of its whole map too, which a crop changes.
all_heatmaps = pytest.mark.parametrize("heatmap", [name for name in EXPLAINERS if name != "grad_cam_plus_plus"])
grids = st.tuples(st.integers(2, 5), st.integers(2, 5))


@st.composite
def cell_boxes(draw):
    """A grid (H, W) of cells, and a box of one size at N places in it: top, left, height, width."""
    rows, columns = draw(grids)
    height, width = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    top = torch.tensor([draw(st.integers(0, rows - height)) for _ in range(N)])
    left = torch.tensor([draw(st.integers(0, columns - width)) for _ in range(N)])
    return (rows, columns), top, left, height, width


def seeded(build, seed, *args):
    """Build a network that is the same each time hypothesis tries its example."""
    torch.manual_seed(seed)
    return build(*args)


def crop_of_cells(box):
    """Return the transform, in float64, and the view's size in pixels, which keeps a pixel a pixel."""
    (rows, columns), top, left, height, width = box
    start, size = torch.stack([top, left], dim=1), torch.tensor([[height, width]] * N)
    transform = SpatialTransform.from_crop(
        CELL * start.double(), CELL * size.double(), image_size=(CELL * rows, CELL * columns)
    )
    return transform, (CELL * height, CELL * width)


def shift_of_cells(cells, grid):
    """Move the N images by cells (right, down); what comes into sight is not covered."""
    theta = torch.eye(2, 3, dtype=torch.float64).repeat(N, 1, 1)
    theta[:, :, 2] = -2 * torch.tensor(cells).double() / torch.tensor([grid[1], grid[0]])
    return SpatialTransform(theta)


shifts = grids.flatmap(
    lambda grid: st.tuples(
        st.just(grid),
        # The last cell stays in sight.
        st.lists(
            st.tuples(st.integers(1 - grid[1], grid[1] - 1), st.integers(1 - grid[0], grid[0] - 1)),
            min_size=N,
            max_size=N,
        ),
    )
)


@pytest.mark.parametrize("heatmap", RULES)
@laws
@given(seeds, grids, st.lists(st.booleans(), min_size=N, max_size=N))
def test_mirrored_image_has_the_mirrored_heatmap(heatmap, seed, grid, mirrored):
    net = seeded(mirror_net, seed)
    x = noise(seed, N, 3, 2 * grid[0], 2 * grid[1])
    mirror = SpatialTransform.identity(N).theta.double()
    mirror[torch.tensor(mirrored), 0, 0] = -1
    transform = SpatialTransform(mirror)
    query = transform(explain(net, x, explainer("features", heatmap), TARGET))
    key = explain(net, transform(x), explainer("features", heatmap), TARGET)
    torch.testing.assert_close(key, query, **CLOSE)


@all_heatmaps
@laws
@given(seeds, cell_boxes())
def test_crop_of_whole_cells_has_the_cropped_heatmap(heatmap, seed, box):
    net, (transform, size) = seeded(cell_net, seed, CELL), crop_of_cells(box)
    (rows, columns), _, _, height, width = box
    x = noise(seed, N, 3, CELL * rows, CELL * columns)
    query = transform(explain(net, x, explainer("features", heatmap), TARGET), (height, width))
    key = explain(net, transform(x, size), explainer("features", heatmap), TARGET)
    # An average over fewer cells gives each a larger gradient; the closed form has no average.
    scale = 1 if heatmap == "class_activation" else rows * columns / (height * width)
    torch.testing.assert_close(key, scale * query, **CLOSE)


@all_heatmaps
@laws
@given(seeds, shifts)
def test_shift_by_whole_cells_shifts_the_heatmap_where_it_is_covered(heatmap, seed, shift):
    grid, cells = shift
    net, transform = seeded(cell_net, seed, CELL), shift_of_cells(cells, grid)
    x = noise(seed, N, 3, CELL * grid[0], CELL * grid[1])
    coverage = transform.coverage(grid)
    query = transform(explain(net, x, explainer("features", heatmap), TARGET))
    key = explain(net, transform(x), explainer("features", heatmap), TARGET)
    assert coverage.sum(dim=(1, 2)).tolist() == [(grid[1] - abs(i)) * (grid[0] - abs(j)) for i, j in cells]
    torch.testing.assert_close(key * coverage, query * coverage, **CLOSE)


@pytest.mark.filterwarnings("ignore:All heatmaps of a batch are blank")
@laws
@given(seeds, shifts)
def test_equivariant_network_has_no_inconsistency(seed, shift):
    grid, cells = shift
    net, transform = seeded(cell_net, seed, CELL), shift_of_cells(cells, grid)
    x = noise(seed, N, 3, CELL * grid[0], CELL * grid[1])
    reg = CGCRegularizer("features", loss="mse_consistency", reduction="none")
    out = reg.compute(net, x, TARGET, view=transform(x), transform=transform)
    # A map that is blank where it is covered keeps rounding errors only, which have no direction to compare.
    seen = out.query.amax(dim=(1, 2)) > 1e-9
    # The squared distance of two equal unit vectors, each entry off by some 1e-12, over at most 25 cells.
    assert (out.loss[seen] < 1e-20).all()


@laws
@given(seeds)
def test_network_without_the_symmetry_is_inconsistent(seed):
    net = seeded(mirror_net, seed)
    torch.nn.init.normal_(net.features[0].weight)
    x = noise(seed, N, 3, 8, 8)
    mirror = SpatialTransform(SpatialTransform.identity(N).theta.double() * torch.tensor([[-1.0], [1.0]]))
    reg = CGCRegularizer(explainer("features", lambda a, g: (a * g).sum(dim=1)), loss="mse_consistency")
    assert reg.compute(net, x, TARGET, view=mirror(x), transform=mirror).loss > 1e-6
