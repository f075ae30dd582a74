"""How the tests call the companion, and what they read of what it leaves."""

import json
import os

import torch

import train_glue_small as glue
from data.text import load_task
from processes import ForkedScript

MATRICES = [f"encoder.layers.{i}.{module}.lora_{matrix}" for i in range(2)
            for module in glue.ATTENTION + glue.FFN for matrix in "AB"]


def run_main(folder, flags="", task="sst2"):
    """What main() returns for these flags, one string, and a task of the tiny folder.

    The run's folder is "out" if the flags name none.
    """
    return glue.main(["--task", task, "--model", str(folder), "--data", str(folder),
                      "--out", str(folder / "out"), *flags.split()])


def prepared_run(folder, flags="", task="sst2"):
    """The companion's Run for such flags, on the CPU, as it is just before it trains."""
    args = glue.parse(["--model", str(folder), "--out", str(folder / "out"), *flags.split()])
    device = torch.device("cpu")
    precision = glue.choose_precision(args.amp, device)
    return glue.Run(task, args, load_task(task, folder), device, precision)


def run_script(folder, *flags):
    """Runs the script with these flags in a fork: (what it printed, its errors, exit status).

    No network, an empty cache. (kill.py, whose short form is a test, too, runs it in a new Python.)
    """
    environment = os.environ | {
        "AFLORA_CACHE": f"{folder}/none", "HF_ENDPOINT": "http://127.0.0.1:9",
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "AFLORA_DATA": ""}
    return ForkedScript(glue.__file__, flags, folder, environment).finish(120)


def result_of(out):
    """result.json of a run's folder."""
    return json.loads((out / "result.json").read_text())


def log_of(out):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def adapter_of(out):
    """What is in a run's adapter.pt."""
    return torch.load(out / "adapter.pt", weights_only=True)


def contents(out):
    """{name: (bytes, time of the last change)} of all that is in a folder, nothing if it is not."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*")}
