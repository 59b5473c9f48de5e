"""Folders of images: hidden files are left out with a word, and damaged ones are found before a training."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from cgc_reg.images import ImageError, fault, open_image

_Path: TypeAlias = "str | os.PathLike[str]"
EXTENSIONS = (*IMG_EXTENSIONS, ".apng", ".avif", ".gif", ".jfif", ".jp2", ".jpe", ".pbm", ".pnm")


def image_folder(
    root: _Path,
    transform: Callable[[Any], Any] | None = None,
    *,
    say: Callable[[str], object] = print,
) -> ImageFolder:
    """Open root/CLASS/.../image as torchvision's ``ImageFolder`` does, without what is no image.

    Left out are hidden files and folders, whose names begin with a point, such as the ``._0.jpg`` that macOS puts
    beside each file of some disks; ``__MACOSX``; and files whose names do not end as those of images.

    Args:
        root: the folder of the class folders.
        transform: from an image, as `cgc_reg.images.open_image` reads it, to what the data set gives.
        say: called with one line about what was left out, if there is any.

    Returns:
        The data set, of pairs (image, class).

    Raises:
        FileNotFoundError: there are no class folders, or a class without images.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("L", (4, 2)).save(Path(folder, name, "0.png"))
        ...     image_folder(folder)[1][0].mode
        'RGB'
    """
    root = Path(root).expanduser()
    images = _ImageFolder(str(root), transform, loader=open_image, is_valid_file=partial(_is_image_in, root))
    _say_left_out(root, {path for path, _ in images.samples}, say)
    return images


def find_images(root: _Path, *, say: Callable[[str], object] = print) -> list[Path]:
    """List the images in a folder and in those below it, without what is no image.

    Args:
        root: the folder.
        say: called with one line about what was left out, if there is any.

    Returns:
        Their paths, sorted.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("0.jpg", "._0.jpg", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     [path.name for path in find_images(folder, say=lambda line: None)]
        ['0.jpg']
    """
    root = Path(root).expanduser()
    found = {path for path in _files(root) if _is_image_in(root, path)}
    _say_left_out(root, found, say)
    return sorted(map(Path, found))


def check_images(paths: Iterable[_Path], *, threads: int | None = None) -> None:
    """Read every image once, to its end, so that one that cannot be read is known before a training.

    Nothing less finds a file that breaks off. Threads read several at a time, which takes a fraction of an epoch.

    Args:
        paths: of the files; ``tqdm(paths)`` shows how far it is.
        threads: how many files are read at a time; as many as there are processors if None.

    Raises:
        ImageError: some cannot be read, as `cgc_reg.images.open_image` says; the message names the first five.

    Example:
        >>> check_images(["0.png"])
        Traceback (most recent call last):
        cgc_reg.images.ImageError: the image 0.png cannot be read (No such file or directory); repair or remove it.
    """
    faults = [(path, reason) for path, reason in _read_all(paths, threads or os.cpu_count() or 1) if reason is not None]
    if len(faults) == 1:
        raise ImageError(f"the image {faults[0][0]} cannot be read ({faults[0][1]}); repair or remove it.")
    if faults:
        listed = ", ".join(f"{path} ({reason})" for path, reason in faults[:5])
        more = f" and {len(faults) - 5} more" * (len(faults) > 5)
        raise ImageError(f"{len(faults)} images cannot be read: {listed}{more}; repair or remove them.")


def _read_all(paths: Iterable[_Path], threads: int) -> Iterator[tuple[_Path, str | None]]:
    Image.init()  # two threads that do it at once may miss a format
    rest = iter(paths)
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without Python's lock
        while some := list(itertools.islice(rest, 32 * threads)):
            yield from zip(some, pool.map(fault, some), strict=True)


class _ImageFolder(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not _is_hidden(entry.name))
        if not names:
            raise FileNotFoundError(f"`root` must hold a folder for each class; got none in {directory}.")
        return names, {name: index for index, name in enumerate(names)}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image_in(root: Path, path: str) -> bool:
    return path.lower().endswith(EXTENSIONS) and not any(map(_is_hidden, path[len(str(root)) :].split(os.sep)))


def _files(root: Path) -> list[str]:
    return [os.path.join(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]


def _say_left_out(root: Path, used: set[str], say: Callable[[str], object]) -> None:
    kinds: dict[str, list[str]] = {"hidden files": [], "images in no class folder": [], "no images by name": []}
    for path in sorted(set(_files(root)) - used):
        name = path[len(str(root)) + 1 :]
        if any(map(_is_hidden, name.split(os.sep))):
            kinds["hidden files"].append(name)
        else:
            kinds["images in no class folder" if _is_image_in(root, path) else "no images by name"].append(name)
    listed = [f"{kind} ({len(some)}, such as {some[0]})" for kind, some in kinds.items() if some]
    if listed:
        say(f"Left out of {root}: {', '.join(listed)}.")
