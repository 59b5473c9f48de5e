"""The notebook runs, and what it shows is what it puts out."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lab import jobs

NOTEBOOK = Path(__file__).parents[1] / "examples" / "consistent_heatmaps.ipynb"
RUN = [sys.executable, *jobs.lab_command("notebook")]


def cells():
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def outputs(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_all_cells_run():
    # In a process of its own, since Jupyter's packages warn in ways that are not ours.
    made = subprocess.run([*RUN, "--quick"], capture_output=True, text=True, env=jobs.lab_environment())
    assert made.returncode == 0, made.stderr


def test_a_failing_cell_is_an_error_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    before = path.read_text()
    made = subprocess.run([*RUN, path, "--write"], capture_output=True, text=True, env=jobs.lab_environment())
    assert made.returncode == 1
    assert "ZeroDivisionError" in made.stderr
    assert path.read_text() == before


def test_committed_outputs_are_of_one_whole_run():
    assert [cell.execution_count for cell in cells()] == list(range(1, len(cells()) + 1))
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for c in cells() for output in c.outputs
    )
    said = "".join(map(outputs, cells()))
    assert "Grad-CAM by hand equals explain: True" in said
    assert "the reloaded model gives the same heatmaps: True" in said


def test_table_shows_what_the_text_says():
    (table,) = [outputs(cell) for cell in cells() if "content heatmap" in outputs(cell)]
    rows = {m[1].strip(): (float(m[2]), float(m[3])) for m in re.finditer(r"(?m)^(.+?) +(\d\.\d+) +(\d\.\d+)$", table)}
    loss, margin, content = (rows[name] for name in ("CGC loss", "margin", "content heatmap"))
    assert loss[1] < loss[0]
    assert margin[1] > margin[0]
    assert content[1] > content[0]


def test_lines_of_cgc_are_marked():
    (loop,) = [cell.source for cell in cells() if "def train(" in cell.source]
    added = [line for line in loop.splitlines() if "reg" in line or "* cgc" in line]
    assert len(added) == 3
    assert all(line.endswith("# CGC") for line in added)


@pytest.mark.parametrize("words", [r"/(home|root|tmp|work|Users)/", r"File \"", r"\bTraceback\b"])
def test_nothing_of_the_machine_is_in_it(words):
    assert not re.search(words, NOTEBOOK.read_text())
