"""Kills a tiny run of the companion at random moments (SIGKILL), resumes it, compares the outcome.

    python tests/kill.py --kills 50

Every run must end with the folder of the run that nobody killed: the same weights, log, freeze map
and result, but for times and memory, and no other file. Prints the count; exit code 1 if one
differs. The tiny BERT and texts are those of tiny.py.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny  # noqa: E402
from companion import adapter_of, log_of, result_of  # noqa: E402

FILES = ["adapter.pt", "freeze_map.txt", "log.jsonl", "result.json"]
MEASURED = ("seconds", "ms_per_step", "peak_memory_bytes")  # may differ between equal runs


def start(folder, out, epochs=40):
    """Starts the companion on the tiny task, or resumes `out` if it has a checkpoint."""
    command = [sys.executable, str(ROOT / "train_glue_small.py")]
    if (out / "checkpoint.pt").exists():
        command += ["--resume", str(out)]
    else:
        command += ["--task", "mrpc", "--model", str(folder), "--data", str(folder), "--out",
                    str(out), "--epochs", str(epochs), "--batch-size", "4",
                    "--checkpoint-every", "3"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")  # the model is tiny
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env=environment)


def finish(process, seconds=None):
    """Waits for a run's own end, at most so long. Raises RuntimeError if the run failed."""
    _, errors = process.communicate(timeout=seconds)
    if process.returncode:
        raise RuntimeError(errors.decode())


def wait_for_log(process, out):
    """Returns when a new run has made its first step, and so its log, or has ended."""
    while not (out / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)


def run_whole(folder, out, epochs):
    """Runs to the end. Returns the seconds that this took from the log's appearance on."""
    process = start(folder, out, epochs)
    wait_for_log(process, out)
    began = time.perf_counter()
    finish(process)
    return time.perf_counter() - began


def run_killed(folder, out, epochs, seconds):
    """Kills a new run so many seconds after its log appeared. Returns whether it still ran."""
    process = start(folder, out, epochs)
    wait_for_log(process, out)
    try:
        finish(process, seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False


def content_of(folder):
    """What a finished run left, with all bits of its numbers, but for times and memory."""
    adapter = adapter_of(folder)
    values = {name: (value.dtype, value.shape, value.numpy().tobytes())
              for name, value in adapter.pop("values").items()}
    log = log_of(folder)
    result = result_of(folder)
    for record in (*log, result):
        for key in MEASURED:
            record.pop(key, None)
    return {"values": values, "adapter": adapter, "log": log, "result": result,
            "freeze map": (folder / "freeze_map.txt").read_text()}


def differences(one, other):
    """What differs between the folders of two finished runs: a list, empty if they are equal."""
    for folder in (one, other):
        files = sorted(os.listdir(folder))
        if files != FILES:
            return [f"{folder} holds {files}"]
    here = content_of(one)
    there = content_of(other)
    return [part for part in here if here[part] != there[part]]


def main(kills, seed=0, epochs=40):
    """Kills and resumes `kills` runs; returns how many ended as the uninterrupted one."""
    draw = random.Random(seed)
    count = 0
    equal = 0
    with tempfile.TemporaryDirectory() as name:
        folder = tiny.make_folder(Path(name))
        whole = folder / "whole"
        out = folder / "killed"
        longest = run_whole(folder, whole, epochs)
        while count < kills:
            if run_killed(folder, out, epochs, longest * draw.random()):
                count += 1
                at = "with a" if (out / "checkpoint.pt").exists() else "before its first"
                finish(start(folder, out, epochs))
                different = differences(out, whole)
                equal += not different
                print(*different, f"{count}: killed {at} checkpoint; {equal} of {count} equal",
                      sep="\n", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    wanted = parser.parse_args().kills
    sys.exit(main(wanted) != wanted)
