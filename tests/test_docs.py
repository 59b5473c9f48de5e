"""The Python of README and docs runs, each page from top to bottom as one program; the site builds, and is complete."""

import ast
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import cgc_reg
from cgc_reg import CGCRegularizer, folders, images, torchmetrics, visualization
from tests.pages import run_blocks

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
WITH_PYTHON = [name for name, path in PAGES.items() if "```python" in path.read_text()]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_of_a_page_runs(name, tmp_path, monkeypatch, capsys):
    # Its default backend takes a C++ compiler and a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # a network of random weights has blank heatmaps now and then, of which it is warned
    names = names_for(name, tmp_path)
    run_blocks(PAGES[name], names)
    for loss in (names[one] for one in ("loss", "out") if one in names):
        assert torch.as_tensor(getattr(loss, "loss", loss)).isfinite().all()


def test_each_method_of_other_papers_has_a_gradient(tmp_path):
    torch.manual_seed(0)
    names, losses = names_for("papers.md", tmp_path), []
    names["cross_entropy"] = lambda logits, target: 0 * logits.sum()  # so that all gradient is the method's own

    def look(names):
        if "loss" in names:
            losses.append(names.pop("loss"))
            gradients = torch.autograd.grad(losses[-1], list(names["model"].parameters()))
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert gradients[0].count_nonzero() > 0

    run_blocks(PAGES["papers.md"], names, after=look)
    assert len(losses) > 6


def names_for(page, folder):
    """Return what a page takes for granted."""
    x, y = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    names = {
        "torch": torch,
        "cross_entropy": torch.nn.functional.cross_entropy,
        "CGCRegularizer": CGCRegularizer,
        "RandomResizedCropFlip": cgc_reg.RandomResizedCropFlip,
        "model": torchvision.models.resnet18(num_classes=10),
        "reg": CGCRegularizer("layer4"),
        "x": x,
        "y": y,
        "images": torch.rand(4, 3, 224, 224),
        "unlabeled": torch.rand(4, 3, 64, 64),
        "masks": (torch.rand(4, 64, 64) < 0.5).float(),
        "loader": [(x, y)],
        "folder": folder,
        "steps": 2,
    }
    if page == "method.md":  # on measuring
        images, boxes = torch.rand(64, 3, 64, 64), torch.tensor([[0, 0, 224, 112]] * 64)
        names["loader"] = [(images, boxes), (images[:1], boxes[:1])]
    if page == "papers.md":
        names["teacher"] = torchvision.models.resnet18(num_classes=10)
    if page == "explainers.md":  # on several labels and distillation
        names |= {"labels": torch.randint(2, (4, 10)), "teacher": torchvision.models.resnet18(num_classes=10)}
    if page == "guide.md":  # on views made by the loader
        for i in range(4):
            path = folder / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            torchvision.utils.save_image(torch.rand(3, 64, 64), path)
    return names


def messages():
    """Return the words of each error and warning in the package that stay the same: the longest run before "got"."""
    found = set()
    for path in sorted((ROOT / "cgc_reg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else getattr(node, "value", None)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warn", "warn_once"):
                call = node
            elif not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith("Error"):
                continue
            if call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr):
                parts = getattr(call.args[0], "values", [call.args[0]])
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in parts)
                first = re.split(r"; got|\. ", text)[0]
                found.add(max(first.split("\0"), key=len).strip(" `,.'()"))
    return sorted(found)


def test_troubleshooting_has_each_message():
    page = PAGES["troubleshooting.md"].read_text().replace("`", "")
    assert len(messages()) > 70
    assert [text for text in messages() if text.replace("`", "") not in page] == []


def test_reference_has_each_public_name():
    page = PAGES["api.md"].read_text()
    in_modules = [
        f"{module.__name__}.{name}"
        for module in (folders, images, torchmetrics, visualization)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    wanted = [f"cgc_reg.{name}" for name in cgc_reg.__all__] + in_modules
    assert [name for name in wanted if not re.search(rf":: {re.escape(name)}$", page, re.MULTILINE)] == []


def test_table_of_names_has_each_signature():
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`(.*?)`)? \|", PAGES["names.md"].read_text(), re.MULTILINE)
    named = {}
    for name, arguments in rows:
        value = functools.reduce(getattr, name.split("."), cgc_reg)
        parameters = [p.replace(annotation=p.empty) for p in inspect.signature(value).parameters.values()]
        own = inspect.Signature([p for p in parameters if p.name != "self"])
        if arguments or name not in ("CGCOutput", "Explainer", "Explanation", "TransformSampler"):  # which nobody makes
            assert str(own) == f"({arguments})", name
        named[name] = value
    assert set(cgc_reg.__all__) <= named.keys()
    for name, value in list(named.items()):
        if isinstance(value, type):
            methods = {f"{name}.{key}" for key, one in vars(value).items() if callable(one) and not key.startswith("_")}
            assert methods - named.keys() <= {f"{name}.extra_repr"}


def test_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "trees"]
    made = subprocess.run([*build, ROOT / "docs", tmp_path / "html"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= {
        path.name for path in (tmp_path / "html").iterdir()
    }


def test_the_version_is_one():
    changes, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    (newest, released), *_ = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", changes, re.MULTILINE)
    assert newest == cgc_reg.__version__
    assert f"\nversion: {newest}\ndate-released: {released}\n" in citation
