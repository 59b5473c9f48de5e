"""Scripts, and commands of the lab, in processes of their own: their lines, their failures, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lab import jobs


def script(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return [path]


def test_script_gives_its_lines_and_has_its_threads(tmp_path):
    lines = []
    command = script(tmp_path, "import os\nprint('one')\nprint(os.environ['OMP_NUM_THREADS'])")
    jobs.run_script(command, threads=3, on_line=lines.append)
    assert lines == ["one", "3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit('error: there is no folder.')", "error: there is no folder."),
        ("raise ValueError('first line')", "ValueError: first line"),
        ("import os\nos._exit(3)", "script.py ended with 3"),
    ],
)
def test_failure_is_the_last_words_of_the_script(tmp_path, text, message):
    with pytest.raises(SystemExit, match=re.escape(message) + "$"):
        jobs.run_script(script(tmp_path, text), threads=1)


def test_results_come_as_they_are_made():
    assert sorted(jobs.run_all([partial(pow, 2, i) for i in range(5)], at_a_time=2)) == [1, 2, 4, 8, 16]


def test_after_a_failure_nothing_more_is_started():
    started = []

    def fail():
        started.append("fail")
        raise SystemExit("error: it failed.")

    with pytest.raises(SystemExit, match=r"^error: it failed.$"):
        list(jobs.run_all([fail, *[partial(started.append, i) for i in range(100)]], at_a_time=1))
    assert len(started) < 100


def test_interrupt_reaches_the_scripts_and_tells_what_they_said(tmp_path):
    program = script(
        tmp_path,
        """
import sys, time
from functools import partial
from lab import jobs
if len(sys.argv) > 1:
    try:
        open(sys.argv[1], "w").close()
        time.sleep(100)
    except KeyboardInterrupt:
        raise SystemExit(f"{sys.argv[1]} kept what it had") from None
places = [f"{__file__}.{i}" for i in range(3)]
list(jobs.run_all([partial(jobs.run_script, [__file__, place], threads=1) for place in places], at_a_time=2))
""",
    )

    def heed():  # as a terminal starts it: a group of its own, in which Ctrl-C is not ignored
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command, environment = [sys.executable, *program], jobs.lab_environment()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not all(Path(f"{program[0]}.{i}").exists() for i in range(2)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert sorted(errors.split()) == sorted(f"{program[0]}.0 kept what it had {program[0]}.1 kept what it had".split())
    assert not Path(f"{program[0]}.2").exists()
