"""Scripts, and commands of the lab, that run in processes of their own, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
EXAMPLES = Path(__file__).parents[1]


def lab_command(name: str, *options: str | Path) -> list[str | Path]:
    """Return a command of the lab, as Python takes it."""
    return ["-m", "lab", name, *options]


def lab_environment() -> dict[str, str]:
    """Return the environment in which Python finds the lab, whatever the current folder is."""
    paths = [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_script(
    command: list[str | Path], *, threads: int, on_line: Callable[[str], object] = lambda line: None
) -> None:
    """Run Python on a script, or a command of the lab, with so many threads; hand on what it prints, line by line.

    Raises:
        SystemExit: it failed; with its last words.
    """
    environment = {**lab_environment(), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            [sys.executable, "-u", *command], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            for line in process.stdout or ():
                on_line(line.rstrip())
        if process.returncode:
            errors.seek(0)
            name = " ".join(map(str, command[:3]))
            last = errors.read().strip().splitlines()[-1:] or [f"error: {name} ended with {process.returncode}"]
            raise SystemExit(last[0])


def run_all(jobs: Iterable[Callable[[], Result]], *, at_a_time: int) -> Iterator[Result]:
    """Run jobs, a few at a time, and give their results as they end.

    After a failure or Ctrl-C none is started any more, and those that run are waited for.

    Raises:
        SystemExit: jobs failed, or were interrupted; with the words of each.
    """
    pool = ThreadPoolExecutor(at_a_time)
    futures = [pool.submit(job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    except (SystemExit, KeyboardInterrupt) as error:
        pool.shutdown(cancel_futures=True)
        stopped = [future.exception() for future in futures if not future.cancelled()]
        words = dict.fromkeys(str(reason) for reason in stopped if isinstance(reason, SystemExit))
        raise SystemExit("\n".join(words) or "Interrupted.") from error
    finally:
        pool.shutdown(cancel_futures=True)
