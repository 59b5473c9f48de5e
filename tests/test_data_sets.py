"""The data sets that the examples know by name, in the layouts of those who publish them, with drawn images."""

import random
import sys
from collections import Counter

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from cgc_reg import content_heatmap
from cgc_reg.energy import box_masks
from lab import image_data, measures, options, shapes
from lab import train as lab_train
from lab.checkpoint import load_checkpoint
from lab.data_sets import DATA_SETS, load_data
from lab.models import build_model
from tests.tiny import TINY, history, write_images


def draw(path, seed=0, height=48, width=64, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = shapes.draw_shapes(1, size=width, seed=seed)[0][0]
    to_pil_image(image[:, :height]).convert(mode).save(path)


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def load(name, root, image_size=32, seed=0):
    return load_data(name, root=root, size="160px", image_size=image_size, seed=seed)


def train_one_epoch(tmp_path, *options):
    """Train as a person would, and return the row of metrics.csv."""
    lab_train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "run"), *map(str, options)])
    (row,) = history(tmp_path / "run" / "cgc")
    return row


def assert_holds(data, *, train, validation):
    """The images of both parts have these labels, in this order."""
    assert data.labels == train
    assert [label for _, label, *_ in data.train] == train
    assert [label for _, label, *_ in data.validation] == validation
    assert data.train[0][0].shape == data.validation[0][0].shape == (3, 32, 32)
    assert default_collate([data.train[0][1]]).dtype == torch.long  # as cross-entropy needs it


# ---- the built-in shapes


def test_shapes_repeat_and_splits_differ():
    first, again = (image_data.load_shapes(image_size=16, seed=3, train=32, validation=32) for _ in range(2))
    assert torch.equal(first.train.images, again.train.images)
    seen = {image.numpy().tobytes() for image in first.train.images}
    assert not seen & {image.numpy().tobytes() for image in first.validation.images}


def test_shapes_objects_have_one_area_whatever_the_class():
    # Outlines enclose the same area whatever the class, so that area tells nothing of it. With 100 objects a class the
    # standard error of the mean is 3 %.
    _, label, mask = shapes.draw_shapes(700, size=64, seed=0)
    share = mask.float().mean(dim=(1, 2))
    for index in range(len(shapes.CLASSES)):
        assert share[label == index].mean() == pytest.approx(share.mean().item(), rel=0.1)


def test_shapes_masks_lie_on_the_object():
    # The object has one colour, and what surrounds it has many.
    image, label, mask = shapes.draw_shapes(64, size=64, seed=1)
    for i in range(64):
        if list(shapes.CLASSES)[label[i]] != "ring":
            inside, outside = (image[i].float()[:, where].std(dim=1).mean() for where in (mask[i], ~mask[i]))
            assert inside < outside


def test_masks_of_training_images_are_flipped_with_them():
    plain = image_data.load_shapes(image_size=16, seed=0, train=32, validation=1)
    data = image_data.load_shapes(image_size=16, seed=0, train=32, validation=1, train_masks=True)
    flips = 0
    for i in range(32):
        torch.manual_seed(i)
        image, label, mask = data.train[i]
        torch.manual_seed(i)
        assert torch.equal(image, plain.train[i][0])  # with a mask or without one
        assert label == plain.train[i][1]
        whole = image_data.denormalize(image) * 255
        flipped = not torch.allclose(whole, data.train.images[i].float(), atol=1e-3)
        assert type(mask) is torch.Tensor
        assert torch.equal(mask, data.train.masks[i].flip(1) if flipped else data.train.masks[i])
        flips += flipped
    assert 0 < flips < 32


def test_masks_are_known_for_the_asked_share_of_each_class():
    data = image_data.load_shapes(image_size=16, seed=0, train=128, validation=1, train_masks=True)
    guided, again = (image_data.known_masks(data, 0.25, seed=3).train for _ in range(2))
    known = [i for i in range(128) if guided[i][2].any()]
    assert known == [i for i in range(128) if again[i][2].any()]
    assert known != [i for i, item in enumerate(image_data.known_masks(data, 0.25, seed=4).train) if item[2].any()]
    of_class = Counter(data.labels)
    assert Counter(data.labels[i] for i in known) == {label: round(count / 4) for label, count in of_class.items()}
    assert len(guided) == 128
    # They are the images' own masks.
    plain = image_data.Data(data.train.images, None, data.classes, data.labels)
    assert sorted(image_data.split_labeled(plain, 0.25, seed=3)[0].indices) == known
    assert guided[known[0]][2].sum() == data.train.masks[known[0]].sum()


def test_context_changes_the_tint_of_backgrounds_alone():
    plain, label, mask = shapes.draw_shapes(64, size=32, seed=5)
    tinted, same_label, same_mask = shapes.draw_shapes(64, size=32, seed=5, context=1)
    assert torch.equal(same_label, label)
    assert torch.equal(same_mask, mask)
    moved = (tinted.int() - plain.int()).flatten(2)
    tint = 255 * shapes.tints()
    for i in range(64):
        background = moved[i].abs().amax(dim=0) > 5
        assert 0.3 < background.float().mean() < 1  # the rest is covered
        if list(shapes.CLASSES)[label[i]] != "ring":  # in whose hole the background shows
            assert not (background & mask[i].flatten()).any()
        # But for pixels that were as dark or as bright as can be.
        median = moved[i][:, background].float().median(dim=1).values
        torch.testing.assert_close(median, tint[label[i]], rtol=0, atol=1.0)


def test_context_goes_with_the_class_in_training_alone():
    data = load("shapes_context", None)
    plain = load("shapes", None)
    tint = 255 * shapes.tints()
    for part, other, share in ((data.train, plain.train, 0.9 + 0.1 / 7), (data.validation, plain.validation, 1 / 7)):
        assert part.labels.tolist() == other.labels.tolist()
        moved = (part.images.float() - other.images.float()).flatten(2)
        seen = moved.abs().amax(dim=1) > 5
        assert seen.any(dim=1).all()
        mean = (moved * seen[:, None]).sum(dim=2) / seen.sum(dim=1, keepdim=True)
        nearest = torch.cdist(mean, tint).argmin(dim=1)
        # The standard error of a share of 1,024 images is at most 0.016.
        assert (nearest == part.labels).float().mean().item() == pytest.approx(share, abs=0.05)


# ---- Imagenette, and folders like it


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


@pytest.mark.parametrize("size", image_data.IMAGENETTE_FOLDERS)
def test_imagenette_is_taken_from_its_own_layout(folder, size):
    folder.rename(folder.parent / image_data.IMAGENETTE_FOLDERS[size])
    data = load_data("imagenette", root=folder.parent, size=size, image_size=32, seed=0)
    assert data.classes == ["n01440764", "n02102040"]
    assert (len(data.train), len(data.validation)) == (16, 8)
    # torchvision reads the same folder as its own data set.
    own = torchvision.datasets.Imagenette(folder.parent, split="train", size=size)
    assert sorted(label for _, label in own._samples) == sorted(data.labels)


def test_labels_are_kept_for_the_asked_share_of_each_class(folder):
    data = image_data.load_folder(folder, image_size=32)
    labeled, unlabeled = image_data.split_labeled(data, 0.25, seed=0)
    assert sorted(data.labels[i] for i in labeled.indices) == [0, 0, 1, 1]
    assert set(labeled.indices) | set(unlabeled.indices) == set(range(16))
    assert not set(labeled.indices) & set(unlabeled.indices)


def test_folders_are_read_as_a_viewer_shows_them(folder, capsys):
    ramp = np.arange(32, dtype=np.uint16)[None].repeat(32, axis=0) * 2000
    Image.fromarray(ramp).save(folder / "val" / "n01440764" / "0.png")
    (folder / "val" / "n01440764" / "._0.png").write_bytes(b"of macOS")
    (folder / "val" / "__MACOSX").mkdir()
    data = image_data.load_folder(folder, image_size=28)  # 32 = 28 * 8 / 7, so that nothing is resized
    assert capsys.readouterr().out == f"Left out of {folder / 'val'}: hidden files (1, such as n01440764/._0.png).\n"
    (index,) = (i for i, (path, _) in enumerate(data.validation.files) if path.endswith("png"))
    expected = torch.from_numpy(np.rint(ramp[2:-2, 2:-2] / 257).astype(np.float32)) / 255
    torch.testing.assert_close(image_data.denormalize(data.validation[index][0]), expected.expand(3, 28, 28))


# ---- CUB-200-2011


@pytest.fixture
def birds(tmp_path):
    """CUB-200-2011 with two classes: images 1 to 8 train and 9 to 14 validate, the odd ones of the first class."""
    folder = tmp_path / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    paths = {i: f"{classes[(i + 1) % 2]}/Albatross_{i:04d}_{7 * i}.jpg" for i in range(1, 15)}
    for i, path in paths.items():
        draw(folder / "images" / path, seed=i, mode="L" if i == 3 else "RGB")  # a few are grey in CUB too
    write_lines(folder / "classes.txt", [f"{i} {name}" for i, name in enumerate(classes, 1)])
    write_lines(folder / "images.txt", [f"{i} {path}" for i, path in paths.items()])
    # Images are matched by number, so another order of the lines changes nothing.
    write_lines(folder / "image_class_labels.txt", [f"{i} {(i + 1) % 2 + 1}" for i in reversed(paths)])
    write_lines(folder / "train_test_split.txt", [f"{i} {int(i < 9)}" for i in paths])
    write_lines(folder / "bounding_boxes.txt", [f"{i} {i}.0 6.0 24.0 30.0" for i in paths])
    return folder


def test_cub200_is_read_as_published(birds):
    data = load("cub200", birds.parent)
    assert data.classes == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert_holds(data, train=[0, 1] * 4, validation=[0, 1] * 3)
    assert len(data.train[0]) == 2
    _, _, mask = data.validation[0]
    assert (mask.dtype, mask.shape) == (torch.bool, (32, 32))
    first = data.validation.files[0][0]
    assert first.endswith("Albatross_0009_63.jpg")
    assert data.validation.boxes[0] == [(9, 6, 33, 36)]


@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 208), (176, 128)])
@pytest.mark.parametrize("box", [(40, 32, 48, 64), (4, 10, 70, 100), (0, 0, 128, 128), (90, 50, 38, 60)])
def test_cub200_boxes_move_with_their_images(birds, height, width, box):
    """The box is painted white, and after a resize by exactly a half and the crop the mask is where the image is."""
    x, y, w, h = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y : y + h, x : x + w] = 255
    path = birds / "images" / "001.Black_footed_Albatross" / "Albatross_0009_63.jpg"
    to_pil_image(image).save(path, format="PNG")
    lines = (birds / "bounding_boxes.txt").read_text().splitlines()
    write_lines(birds / "bounding_boxes.txt", [f"9 {x}.0 {y}.0 {w}.0 {h}.0" if s[:2] == "9 " else s for s in lines])
    found, _, mask = load("cub200", birds.parent, image_size=56).validation[0]
    white = image_data.denormalize(found).mean(dim=0) > 0.5
    assert torch.equal(mask, white)
    # A heatmap that is the same everywhere has the box's share of the image on the object.
    share = content_heatmap(torch.ones(1, 7, 7), mask[None])
    assert share.item() == pytest.approx(white.float().mean().item())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_boxes_turn_with_their_image(birds, kind, orientation):
    """Boxes are in pixels of the file, and the image is as a viewer shows it."""
    image = torch.zeros(3, 128, 208, dtype=torch.uint8)
    image[:, 20:68, 60:100] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = birds / "images" / "001.Black_footed_Albatross" / "Albatross_0009_63.jpg"
    to_pil_image(image).save(path, format=kind, exif=exif)
    lines = (birds / "bounding_boxes.txt").read_text().splitlines()
    write_lines(birds / "bounding_boxes.txt", ["9 60.0 20.0 40.0 48.0" if s[:2] == "9 " else s for s in lines])
    found, _, mask = load("cub200", birds.parent, image_size=56).validation[0]
    assert mask.any()
    assert torch.equal(mask, image_data.denormalize(found).mean(dim=0) > 0.5)


def test_a_pixel_is_in_the_box_when_its_centre_is():
    # Centres lie at 0.5, 1.5, 2.5; one on the left or upper edge counts, one on the right or lower edge does not.
    mask = box_masks(torch.tensor([[[0.5, 1.5, 2.4, 2.5]]]), (3, 4))[0]
    assert mask.tolist() == [[False] * 4, [True, True, False, False], [False] * 4]
    assert box_masks(torch.tensor([[[0.6, 0.5, 2.5, 1.6]]]), (2, 3))[0].tolist() == [[False, True, False]] * 2


def test_cub200_training_measures_the_content_heatmap_in_boxes(birds, tmp_path):
    row = train_one_epoch(tmp_path, "--data", "cub200", "--root", tmp_path)
    assert 0 < row["val_content_heatmap"] < 1


def test_cub200_that_cannot_be_used_is_one_sentence(birds, tmp_path):
    with pytest.raises(image_data.DataError, match=r"^there is no folder .*none/CUB_200_2011; unpack CUB_200_2011.tgz"):
        load("cub200", tmp_path / "none")
    write_lines(birds / "train_test_split.txt", ["1 1"])
    with pytest.raises(image_data.DataError, match=r"CUB_200_2011 cannot be used \(KeyError: '2'\); unpack"):
        load("cub200", tmp_path)
    (birds / "bounding_boxes.txt").unlink()
    with pytest.raises(image_data.DataError, match=r"cannot be used .*No such file.*bounding_boxes.txt'\); unpack"):
        load("cub200", tmp_path)


# ---- ImageNet, as its localisation task comes


@pytest.fixture
def imagenet(tmp_path):
    """Two classes; the first validation image has two boxes, painted white."""
    folder = tmp_path / "imagenet"
    for wnid in ("n01440764", "n03995372"):
        for i in (1, 2):
            draw(folder / "train" / wnid / f"{wnid}_{i}.JPEG", seed=i)
            draw(folder / "val" / wnid / f"ILSVRC2012_val_{wnid[-1]}_{i}.JPEG", seed=i)
    image = torch.zeros(3, 128, 208, dtype=torch.uint8)
    image[:, 20:60, 60:80] = 255
    image[:, 80:120, 100:140] = 255
    to_pil_image(image).save(folder / "val" / "n01440764" / "ILSVRC2012_val_4_1.JPEG", format="PNG")
    lines = [
        "ILSVRC2012_val_4_1,n01440764 60 20 80 60 n01440764 100 80 140 120 ",
        *(f"ILSVRC2012_val_{name},n01440764 4 6 40 44 " for name in ("4_2", "2_1", "2_2")),
    ]
    write_lines(folder / "LOC_val_solution.csv", ["ImageId,PredictionString", *lines])
    return folder


def test_imagenets_boxes_are_all_on_the_object(imagenet):
    image, label, mask = load(str(imagenet), None, image_size=56).validation[0]
    assert label == 0
    assert torch.equal(mask, image_data.denormalize(image).mean(dim=0) > 0.5)
    assert mask.sum() == (20 * 10) + (20 * 20)


def test_imagenet_training_measures_the_content_heatmap_in_boxes(imagenet, tmp_path):
    row = train_one_epoch(tmp_path, "--data", imagenet)
    assert 0 < row["val_content_heatmap"] < 1


@pytest.mark.parametrize(
    "line", ["ILSVRC2012_val_9_9,n01440764 1 2 3 4", "no comma", "ILSVRC2012_val_4_1,n01440764 1 2 3"]
)
def test_imagenets_boxes_that_cannot_be_used_are_one_sentence(imagenet, line):
    write_lines(imagenet / "LOC_val_solution.csv", ["ImageId,PredictionString", line])
    with pytest.raises(image_data.DataError, match=r"LOC_val_solution.csv cannot be used .*; remove it or repair it"):
        load(str(imagenet), None)


# ---- what torchvision reads


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Oxford 102 Flowers: of eight images 1, 2 and 3 are train, 4 and 5 val, the others test."""
    folder = tmp_path / "flowers-102"
    for i in range(1, 9):
        draw(folder / "jpg" / f"image_{i:05d}.jpg", seed=i)
    labels = np.array([[77, 1, 102, 4, 5, 6, 7, 8]], dtype=np.uint8)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})
    ids = {"trnid": [[1, 2, 3]], "valid": [[4, 5]], "tstid": [[6, 7, 8]]}
    scipy.io.savemat(folder / "setid.mat", {name: np.array(row, dtype=np.uint16) for name, row in ids.items()})
    known = {part: (name, None) for part, (name, _) in torchvision.datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", known)  # else it knows only the real files
    return folder


def test_flowers102_trains_on_train_and_val(flowers):
    data = load("flowers102", flowers.parent)
    assert len(data.classes) == 102
    assert_holds(data, train=[76, 0, 101, 3, 4], validation=[5, 6, 7])


@pytest.fixture
def aircraft(tmp_path):
    """FGVC-Aircraft with two variants, and a white banner of 20 rows below each black image."""
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    write_lines(data / "variants.txt", ["707-320", "DC-3 Cargo"])
    for split, count in (("trainval", 4), ("test", 3)):
        names = [f"{i:07d}" for i in range(100 * count, 101 * count)]
        for name in names:
            (data / "images").mkdir(exist_ok=True)
            image = torch.zeros(3, 84, 64, dtype=torch.uint8)
            image[:, 64:] = 255
            to_pil_image(image).save(data / "images" / f"{name}.jpg", quality=100)
        lines = [f"{name} {('707-320', 'DC-3 Cargo')[i % 2]}" for i, name in enumerate(names)]
        write_lines(data / f"images_variant_{split}.txt", lines)
    return tmp_path / "fgvc-aircraft-2013b"


def test_fgvc_aircraft_is_read_by_variant_and_without_the_banner(aircraft):
    data = load("fgvc-aircraft", aircraft.parent)
    assert data.classes == ["707-320", "DC-3 Cargo"]
    assert_holds(data, train=[0, 1, 0, 1], validation=[0, 1, 0])
    for part in (data.train, data.validation):
        assert all(image_data.denormalize(image).max() < 0.1 for image, _ in part)


@pytest.fixture
def cars(tmp_path):
    """Stanford Cars with two classes."""
    folder = tmp_path / "stanford_cars"
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    places = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    (folder / "devkit").mkdir(parents=True)
    for split, classes in (("train", [2, 1, 1, 2]), ("test", [1, 2])):
        rows = np.zeros((1, len(classes)), dtype=[(field, object) for field in fields])
        for i, number in enumerate(classes):
            draw(folder / f"cars_{split}" / f"{i + 1:05d}.jpg", seed=i)
            rows[0, i] = (*(np.uint8([[edge]]) for edge in (1, 1, 60, 40)), np.uint8([[number]]), f"{i + 1:05d}.jpg")
        scipy.io.savemat(folder / places[split], {"annotations": rows})
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    return folder


def test_stanford_cars_is_read_as_published(cars):
    data = load("stanford-cars", cars.parent)
    assert data.classes == ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    assert_holds(data, train=[1, 0, 0, 1], validation=[0, 1])


def test_stanford_cars_that_are_missing_say_which_files_are_needed(tmp_path):
    with pytest.raises(
        image_data.DataError, match=r"stanford_cars, and .* cannot be downloaded .* must hold cars_train/"
    ):
        load("stanford-cars", tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("flowers102", "setid.mat"),
        ("fgvc-aircraft", "data/images_variant_test.txt"),
        ("stanford-cars", "cars_test_annos_withlabels.mat"),
    ],
)
def test_missing_file_of_a_folder_is_one_sentence(request, name, missing):
    folder = request.getfixturevalue({"flowers102": "flowers", "fgvc-aircraft": "aircraft"}.get(name, "cars"))
    (folder / missing).unlink()
    with pytest.raises(image_data.DataError, match=rf"^{folder} cannot be used \(.*\); it must hold .*{missing[-12:]}"):
        load(name, folder.parent)


@pytest.mark.parametrize("name", ["flowers102", "fgvc-aircraft"])
def test_no_network_is_one_sentence_with_alternatives_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_download_url_prefix", "http://127.0.0.1:9/")
    monkeypatch.setattr(torchvision.datasets.FGVCAircraft, "_URL", "http://127.0.0.1:9/none.tar.gz")
    root = tmp_path / "data"
    with pytest.raises(image_data.DataError, match=rf"cannot be downloaded .* put it into {root}/.*--data shapes.*DIR"):
        load(name, root)
    assert not any(root.iterdir())


def test_download_that_breaks_off_leaves_nothing(tmp_path):
    def download(place):
        draw(tmp_path / place / "birds" / "first.jpg")
        raise OSError("connection lost")

    with pytest.raises(image_data.DataError, match=r"Birds cannot be downloaded \(connection lost\)"):
        image_data.fetch("Birds", tmp_path / "data" / "birds", download)
    assert not any((tmp_path / "data").iterdir())


# ---- ELPV


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """The package elpv-dataset with some cells of each probability and type, in mixed order."""
    package = tmp_path / "site" / "elpv_dataset"
    rows = [
        (probability, kind)
        for probability, count in (("0.0", 12), ("0.3333333333333333", 4), ("0.6666666666666666", 3), ("1.0", 5))
        for kind in ("mono", "poly")
        for _ in range(count)
    ]
    random.Random(0).shuffle(rows)
    write_lines(package / "__init__.py", [])
    lines = [f"images/cell{i:04d}.png  {probability:<18}  {kind}" for i, (probability, kind) in enumerate(rows, 1)]
    write_lines(package / "data" / "labels.csv", lines)
    for i in range(1, len(rows) + 1):
        draw(package / "data" / "images" / f"cell{i:04d}.png", seed=i, height=40, width=40, mode="L")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "elpv_dataset", raising=False)
    yield package / "data"
    sys.modules.pop("elpv_dataset", None)


def test_elpv_splits_each_class_and_type_and_never_by_the_seed(cells, tmp_path):
    data, other = (load("elpv", tmp_path, seed=seed) for seed in (0, 1))
    assert data.classes == ["functional", "defective"]
    assert data.validation.files == other.validation.files
    known = {}
    for line in (cells / "labels.csv").read_text().splitlines():
        path, probability, kind = line.split()
        known[str(cells / path)] = {"0.0": 0, "0.3333333333333333": 0}.get(probability, 1), kind
    files = data.train.files + data.validation.files
    assert dict(files) == {path: label for path, (label, _) in known.items()}
    assert len(files) == len(known)
    # Of 16 functional and 8 defective cells of either type a quarter.
    expected = {(0, "mono"): 4, (0, "poly"): 4, (1, "mono"): 2, (1, "poly"): 2}
    assert Counter(known[path] for path, _ in data.validation.files) == expected
    # A shuffle chose them: neighbours in the list come from one module.
    first = [path for path, known_as in sorted(known.items()) if known_as == (0, "mono")][:4]
    assert first != sorted(path for path, _ in data.validation.files if known[path] == (0, "mono"))


def test_elpv_shows_the_whole_cell_in_three_equal_channels(cells, tmp_path):
    data = load("elpv", tmp_path, image_size=40)
    for part in (data.train, data.validation):
        image = image_data.denormalize(part[0][0])
        assert image.shape == (3, 40, 40)
        assert torch.allclose(image[0], image[1], atol=1e-5)
    path, _ = data.validation.files[0]
    file = pil_to_tensor(Image.open(path))[0] / 255
    assert torch.allclose(image_data.denormalize(data.validation[0][0])[0], file, atol=1e-5)


def test_elpv_training_measures_balanced_accuracy(cells, tmp_path):
    row = train_one_epoch(tmp_path, "--data", "elpv")
    saved = load_checkpoint(tmp_path / "run" / "cgc" / "last.pt")
    model = build_model(saved["arch"], len(saved["classes"])).eval()
    model.load_state_dict(saved["model"])
    x, y = default_collate(list(load("elpv", tmp_path).validation))
    with torch.no_grad():
        correct = model(x).argmax(dim=1) == y
    expected = (correct[y == 0].float().mean() + correct[y == 1].float().mean()) / 2
    assert row["val_balanced_accuracy"] == pytest.approx(expected.item(), abs=1e-6)


def test_elpv_that_cannot_be_used_is_one_sentence(cells, tmp_path, monkeypatch):
    write_lines(cells / "labels.csv", ["images/cell0001.png 1.0"])
    with pytest.raises(image_data.DataError, match=r"labels.csv cannot be read \(.*\); install elpv-dataset again"):
        load("elpv", tmp_path)
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)  # Python's way of saying that there is none
    with pytest.raises(image_data.DataError, match=r'not installed; run pip install "\.\[elpv\]" \(CC BY-NC-SA 4\.0\)'):
        load("elpv", tmp_path)


# ---- all of them


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_there_are():
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 20 + [1] * 3 + [3] * 7)[torch.randperm(30, generator=generator)]  # none of class 2
    logits = torch.rand(30, 4, generator=generator)
    recall = measures.Recall(4, "cpu")
    for part in range(0, 30, 8):
        recall.add(logits[part : part + 8], y[part : part + 8])
    chosen = logits.argmax(dim=1)
    expected = sum((chosen[y == c] == c).float().mean().item() for c in (0, 1, 3)) / 3
    assert recall.mean() == pytest.approx(expected, abs=1e-6)
    assert recall.mean() != pytest.approx((chosen == y).float().mean().item(), abs=1e-3)


def test_help_names_every_data_set(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # else a line may end within a name
    with pytest.raises(SystemExit):
        options.parse_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, data_set in DATA_SETS.items():
        assert f"{name} ({data_set.about})" in printed


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ("imagenette", 128),
        ("imagenette --size full", 224),
        ("shapes", 64),
        ("shapes_context", 64),
        ("cub200", 224),
        ("elpv", 128),
        ("some/folder", 224),
        ("elpv --image-size 32", 32),
    ],
)
def test_images_have_the_size_that_suits_the_data(asked, size):
    assert options.parse_args(["--data", *asked.split()]).image_size == size
