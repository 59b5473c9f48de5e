"""Whether inductor can run here: it writes C++, and needs what compiles it."""

import os
import shutil
import sysconfig
from pathlib import Path

compiles = bool(
    shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_paths()["include"], "Python.h").exists()
)
