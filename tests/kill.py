"""Kills a tiny run of the companion at random moments (SIGKILL), resumes it, compares the outcome.

    python tests/kill.py --kills 50

Every run must end with the folder of the run that nobody killed: the same weights, log, freeze map
and result, but for times and memory, and no other file. Prints the count; exit code 1 if one
differs. The tiny BERT and texts are those of tiny.py.

What is killed is a fork, which need not import torch. What goes on is a new Python: if the order of
a set, which is another one in each Python, had a say, the outcomes would differ.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
import torch._dynamo  # noqa: E402  # else the first optimizer imports it, in every fork

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny  # noqa: E402
import train_glue_small as glue  # noqa: E402
from companion import adapter_of, log_of, result_of  # noqa: E402
from processes import FORK  # noqa: E402

FILES = ["adapter.pt", "freeze_map.txt", "log.jsonl", "result.json"]
MEASURED = ("seconds", "ms_per_step", "peak_memory_bytes")  # may differ between equal runs


def flags_of(folder, out, epochs):
    """Of a new run on the tiny task."""
    flags = ["--task", "mrpc", "--model", folder, "--data", folder, "--out", out,
             "--epochs", epochs, "--batch-size", 4, "--checkpoint-every", 3]
    return [str(flag) for flag in flags]


def run_silently(flags):
    """Calls the companion, and ends this process with its exit code."""
    torch.set_num_threads(1)  # the model is tiny
    warnings.simplefilter("ignore")  # its ramp is short
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(glue.main(flags))


def start(folder, out, epochs):
    """Starts a new run in a fork. Returns when it has made its first step, and so its log."""
    process = FORK.Process(target=run_silently, args=(flags_of(folder, out, epochs),))
    process.start()
    while not (out / "log.jsonl").exists() and process.is_alive():
        time.sleep(0.001)
    return process


def run_whole(folder, out, epochs):
    """Runs to the end. Returns the seconds that this took from the log's appearance on."""
    process = start(folder, out, epochs)
    began = time.perf_counter()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"exit code {process.exitcode} of a run that nobody killed")
    return time.perf_counter() - began


def run_killed(folder, out, epochs, seconds):
    """Kills a new run so many seconds after its log appeared. Returns whether it still ran."""
    process = start(folder, out, epochs)
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"exit code {process.exitcode} before the kill")
    return process.exitcode != 0


def go_on(folder, out, epochs):
    """A new Python resumes a killed run, or starts it anew if it has no checkpoint."""
    flags = flags_of(folder, out, epochs)
    if (out / "checkpoint.pt").exists():
        flags = ["--resume", str(out)]
    done = subprocess.run([sys.executable, glue.__file__, *flags], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr.decode())


def content_of(folder):
    """What a finished run left, with all bits of its numbers, but for times and memory."""
    adapter = adapter_of(folder)
    values = {name: (value.dtype, value.shape, value.cpu().numpy().tobytes())
              for name, value in adapter.pop("values").items()}
    log = log_of(folder)
    result = result_of(folder)
    for record in (*log, *result["history"], result):
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
                go_on(folder, out, epochs)
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
