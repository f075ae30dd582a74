"""Kills a tiny run of the companion at random moments (SIGKILL), resumes it, compares the outcome.

    pip install pytest && python benchmarks/kill.py --kills 50

Every run must end with the folder of the run that nobody killed: the same weights, log, freeze map
and result, but for times and memory, and no temporary file. Prints the count; exit code 1 if one
differs. The tiny BERT and texts are those of the tests.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import test_aflora  # noqa: E402


def run(folder, out, kill_after=None):
    """Starts the companion, or resumes `out` if it has a checkpoint, and kills it so many seconds
    after its log appeared. Returns the seconds from there to its own end, None if it was killed."""
    command = [sys.executable, str(ROOT / "train_glue_small.py")]
    if (out / "checkpoint.pt").exists():
        command += ["--resume", str(out)]
    else:
        command += ["--task", "mrpc", "--model", str(folder), "--data", str(folder), "--out",
                    str(out), "--epochs", "40", "--batch-size", "4", "--checkpoint-every", "3"]
    (out / "log.jsonl").unlink(missing_ok=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=dict(os.environ, OMP_NUM_THREADS="1"))  # the model is tiny
    while not (out / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    began = time.perf_counter()
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    if process.returncode:
        raise RuntimeError(errors.decode())
    return time.perf_counter() - began


def main(kills, seed=0):
    """Kills and resumes `kills` runs; returns how many ended as the uninterrupted one."""
    draw, equal = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = test_aflora.make_folder(Path(folder))
        longest, count = run(folder, folder / "whole"), 0
        while count < kills:
            out = folder / "killed"
            if run(folder, out, kill_after=longest * draw.random()) is None:
                count += 1
                at = "with a" if (out / "checkpoint.pt").exists() else "before its first"
                run(folder, out)
                try:
                    test_aflora.assert_same_folders(out, folder / "whole")
                    equal += 1
                except AssertionError as error:
                    print(error)
                print(f"{count}: killed {at} checkpoint; {equal} of {count} equal", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    kills = parser.parse_args().kills
    sys.exit(main(kills) != kills)
