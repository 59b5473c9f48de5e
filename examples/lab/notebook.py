"""Run a notebook from top to bottom, and keep what its cells put out if asked to.

python -m lab notebook            # does it run?
python -m lab notebook --write    # puts the new outputs into the file
python -m lab notebook --quick    # a few steps, to try that all cells run
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from lab.checkpoint import write_whole

NOTEBOOK = Path(__file__).parents[1] / "consistent_heatmaps.ipynb"


def run_notebook(path: Path) -> Any:
    """Return the notebook with the outputs of a fresh run, in the folder where it lies."""
    notebook = nbformat.read(path, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=cells, desc=path.name, unit="cell") as bar:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,
            on_cell_executed=lambda **_: bar.update(),
        )
        client.execute()
    for cell in notebook.cells:
        cell.metadata = {}
    notebook.metadata["language_info"] = {"name": "python"}  # and not the version of whoever ran it
    return notebook


def main(argv: list[str] | None = None) -> None:
    """Run the notebook."""
    parser = argparse.ArgumentParser(prog="python -m lab notebook", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path, nargs="?", default=NOTEBOOK)
    parser.add_argument("--write", action="store_true", help="keep the outputs in the file")
    parser.add_argument("--quick", action="store_true", help="set QUICK, which the notebook heeds")
    args = parser.parse_args(argv)
    if args.quick and args.write:
        parser.error("--write keeps the outputs of a whole run; leave --quick out.")
    os.environ["QUICK"] = "1" if args.quick else ""
    try:
        notebook = run_notebook(args.notebook)
    except CellExecutionError as error:
        sys.exit(str(error))
    if args.write:
        write_whole(args.notebook, lambda partial: partial.write_text(nbformat.writes(notebook) + "\n"))
