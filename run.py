"""Set up an environment of its own and run the project's main jobs in it: `python3 run.py demo | test | lint`.

Needs Python 3.10 or newer with pip, and nothing else installed. The environment is the folder .venv; it is made again
when pyproject.toml changes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

DEMO = (
    "-m lab train --data shapes --arch small_resnet --compare --side-by-side --cross-entropy-views 2 "
    "--crop-scale 0.5 --lr 0.1 --epochs 24 --lam-warmup-epochs 6 --validate-every 3 --workers 0 "
    "--out runs/demo --resume"
)
COMMANDS = {
    "demo": [DEMO],
    "test": ["-m pytest -n auto --maxprocesses 4 --dist loadfile"],
    "lint": ["-m ruff check .", "-m ruff format --check .", "-m mypy"],
}


def main() -> int:
    """Run one job; arguments after its name go to its last command."""
    if sys.version_info < (3, 10):  # noqa: UP036 - said in words, to those who have an older one
        sys.exit(f"error: Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python3 run.py {{{','.join(COMMANDS)}}} [arguments of the job]")
    commands = [command.split() for command in COMMANDS[sys.argv[1]]]
    commands[-1] += sys.argv[2:]
    extra = "examples" if sys.argv[1] == "demo" else "dev"
    set_up(extra)
    paths = [str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]  # the first is where the lab is
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return max(subprocess.call([PYTHON, *command], cwd=ROOT, env=environment) for command in commands)


def set_up(extra: str) -> None:
    """Make the environment with one of the package's extras, unless it is there."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = VENV / f"set-up-{extra}"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Setting up {VENV} (PyTorch is large: this takes some minutes the first time)", flush=True)
    if not PYTHON.exists() or subprocess.call([PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL):
        make_environment()
    install = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.check_call([*install, "--editable", f"{ROOT}[{extra}]"], cwd=ROOT)
    stamp.write_text(wanted)


def make_environment() -> None:
    """Make an empty environment that has pip."""
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True)
    if made.returncode:
        # Debian's python3 comes without ensurepip, which venv needs; virtualenv does not.
        with tempfile.TemporaryDirectory() as tool:
            subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", "--target", tool, "virtualenv"])
            environment = {**os.environ, "PYTHONPATH": tool}
            subprocess.check_call([sys.executable, "-m", "virtualenv", "--clear", "--quiet", VENV], env=environment)


if __name__ == "__main__":
    sys.exit(main())
