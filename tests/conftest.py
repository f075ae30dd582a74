"""What holds for all tests here: where the code is, no progress bars, one thread, no network."""

import os
import sys
from pathlib import Path

import pytest

os.environ["TQDM_DISABLE"] = "1"  # all three are read when torch is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: a second thread only waits
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # set it to 0 to run the tests with that GPU
os.environ.pop("AFLORA_MODEL", None)  # the tests have a BERT of their own
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny  # noqa: E402
from data import fetch as sources  # noqa: E402

DOWNLOAD = sources.download  # the real one


def pytest_configure(config):
    """Short runs have short ramps: that warning, which has a test of its own, is expected."""
    config.addinivalue_line("filterwarnings", "ignore:ramp of")
    config.addinivalue_line("filterwarnings", "ignore:enable_nested_tensor")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Keeps the user's cache and the network out of the tests."""
    def download(address):
        if "127.0.0.1" not in address:
            raise OSError("no network in a test")
        return DOWNLOAD(address)

    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "UNREACHABLE", {})
    monkeypatch.setattr(sources, "download", download)
    monkeypatch.setenv("no_proxy", "*")  # the tests' own servers are here


@pytest.fixture
def folder(tmp_path):
    """A folder with the tiny BERT and its texts."""
    return tiny.make_folder(tmp_path)
