"""The house stands as docs/design.md says: who may import whom, and how long a function may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cgc_reg"
FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
OF_MODEL = [name for name in FILES if name.startswith("model/")]


def imported(name):
    """Return the modules of the package that a file imports from."""
    nodes = (node for node in ast.walk(FILES[name]) if isinstance(node, ast.ImportFrom) and node.module)
    return {node.module.removeprefix("cgc_reg.") for node in nodes if node.module.startswith("cgc_reg")}


@pytest.mark.parametrize("name", OF_MODEL)
def test_what_touches_a_model_imports_no_front_room(name):
    assert {module for module in imported(name) if not module.startswith(("model.", "_"))} == set()


PIECES = ("capture", "checkpoints", "gradient", "processes", "replica", "state", "trainability", "wrappers")


@pytest.mark.parametrize("name", PIECES)
def test_pieces_know_nothing_of_each_other(name):
    assert imported(f"model/{name}.py") & {f"model.{other}" for other in PIECES} == set()


def test_the_mathematics_touches_no_model():
    rooms = {name for name in FILES if any(module.startswith("model.") for module in imported(name))} - set(OF_MODEL)
    assert rooms == {
        "__init__.py",
        "_at_layer.py",
        "_checked.py",
        "checking.py",
        "compile.py",
        "explain.py",
        "explainers.py",
        "explanation.py",
        "full_grad.py",
        "regularizer.py",
    }


@pytest.mark.parametrize("name", FILES)
def test_a_function_fits_a_screen(name):
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 50, node.name
