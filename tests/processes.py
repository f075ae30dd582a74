"""Scripts and functions in processes of their own that do not pay for importing torch again.

They are forks of the tests' own process. A script does not find this project's modules there, nor
their folders, and so none of a test's patches in them. What is only to be seen in a new Python (the
order of its sets, what happens as it ends) needs a real process.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Windows cannot fork: there the tests that need it fail, each by itself
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


class ForkedScript:
    """A script that runs as "python script flags" would in that folder, under that environment."""

    def __init__(self, script, flags, folder, environment):
        skip_with_cuda()
        self.output = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = FORK.Process(target=self.run, args=(script, flags, folder, environment))
        self.process.start()

    def run(self, script, flags, folder, environment):
        """Within the fork. Its exit status and traceback are those that Python itself gives."""
        os.dup2(self.output.fileno(), 1)
        os.dup2(self.errors.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
        warnings.resetwarnings()  # pytest keeps them for its summary
        warnings.showwarning = show_warning
        for category in (DeprecationWarning, ResourceWarning):  # neither does Python show these
            warnings.simplefilter("ignore", category)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        forget_the_project()
        sys.path.insert(0, str(Path(script).parent))  # as Python does for a script
        sys.argv = [str(script), *map(str, flags)]
        runpy.run_path(str(script), run_name="__main__")

    def finish(self, seconds):
        """Waits for its end, at most so long: (what it printed, its errors, exit status).

        The status is None if it still ran, and was killed.
        """
        self.process.join(seconds)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        with self.output, self.errors:
            return read(self.output), read(self.errors), code

    def printed(self):
        """What it has printed so far."""
        return read(self.output)


def skip_with_cuda():
    """Skips a test that forks where this process may hold a GPU: its forks cannot use one."""
    if torch.cuda.is_available():
        pytest.skip("forks, which is not possible once CUDA is in use")


def forget_the_project():
    """Whoever needs its modules has to find them, and imports them anew."""
    sys.path[:] = [path for path in sys.path if path and not is_ours(path)]
    for name, module in list(sys.modules.items()):
        if is_ours(getattr(module, "__file__", None) or "built in"):
            del sys.modules[name]


def is_ours(path):
    """Does it lie in this project's folder, and not in a virtual environment there?"""
    path = Path(path)
    return ROOT in (path, *path.parents) and "site-packages" not in path.parts


def show_warning(message, category, filename, lineno, file=None, line=None):
    """As Python itself shows one."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def read(file):
    """All of a file that a fork writes; its own place in the file, which both share, stays."""
    content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    return content.decode("utf-8", errors="replace")
