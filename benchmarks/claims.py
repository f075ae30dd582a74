"""The paper's countable claims, from the runs under results/: a Markdown table.

    python benchmarks/results.py    makes the runs: results/quick, on CUDA results/full
    python benchmarks/claims.py     prints the table; --preset quick|full, by default full if it has
                                    runs of both tasks

9.5 x fewer average trainable parameters than LoRA r=8. On the trained model: both counts from the
runs. On DeBERTaV3-base shapes: its 72 linear layers get adapters (nothing is trained: the weights
are on the meta device) and AdaptiveFreezer freezes them in the order of a real run. That order is
stretched from the trained model's depth to 12 layers: a matrix freezes when the one of its kind at
the same relative depth did. Steps an epoch as the task has with batches of 64; t_i = one epoch,
t_f = 70 % of all steps. Mean over the orders of all seeds, and the bounds that any order has.
"""

import argparse
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch  # noqa: E402
import results  # noqa: E402
from aflora import AdaptiveFreezer, add_adapters  # noqa: E402
from results import AFLORA, QUESTION_SEEDS, SEEDS, TASKS, spread  # noqa: E402
from train_glue_small import ATTENTION, FFN, as_lora, trainable  # noqa: E402

LAYERS = 12  # DeBERTaV3-base
HIDDEN = 768
INNER = 3072
# Epochs, steps an epoch: 3,668 and 67,349 rows by 64
PLANS = {"mrpc": (20, 58), "sst2": (10, 1053)}
KINDS = ("intermediate.A", "intermediate.B", "output.A", "output.B")


def deberta(**options):
    """DeBERTaV3-base's shapes with adapters: (model, adapters)."""
    shapes = {"intermediate": (HIDDEN, INNER), "output": (INNER, HIDDEN)}
    layers = torch.nn.ModuleList()
    for _ in range(LAYERS):
        linears = {name: torch.nn.Linear(*shapes.get(name, (HIDDEN, HIDDEN)), device="meta")
                   for name in ATTENTION + FFN}
        layers.append(torch.nn.ModuleDict(linears))
    return layers, add_adapters(layers, ATTENTION + FFN, **options)


def place(name):
    """(layer, kind) of a matrix: "encoder.layers.3.output.lora_A" gives (3, "output.A")."""
    *_, layer, kind, matrix = name.replace("lora_", "").split(".")
    return int(layer), f"{kind}.{matrix}"


def choose_preset(given=None):
    """Reads results/full, if runs of both tasks are there, else results/quick; or what is given."""
    results.use_preset("full")
    if not all(results.load(task, AFLORA, SEEDS) for task in TASKS):
        results.use_preset("quick")
    if given:
        results.use_preset(given)
    return results.PRESET


class Replay(AdaptiveFreezer):
    """Freezes by `turns`, {matrix: a number}, the lowest first, instead of by the scores."""

    def update(self, found_inf=None):
        """Counts the step: there are no gradients to score."""
        self.step += 1

    def scores(self):
        return {name: self.turns[name] for name in self.live}


def replayed(task, turns):
    """Trainable parameters, averaged over a run on DeBERTaV3-base's shapes.

    turns: callable, (layer, kind, size) -> when that matrix freezes, as a number.
    """
    epochs, steps = PLANS[task]
    total = epochs * steps
    _, adapters = deberta(rank=4, train_matrices=FFN)
    freezer = Replay(adapters, total, t_i=steps, t_f=round(0.7 * total))
    freezer.turns = {name: turns(*place(name), p.numel()) for name, p in freezer.matrices.items()}
    held = [{"params": list(freezer.matrices.values())}]
    optimizer = types.SimpleNamespace(state={}, param_groups=held)
    for _ in range(total):
        freezer.update()
        freezer.freeze(optimizer)
    return freezer.average_trainable()


def stretched(run):
    """A run's order of freezing for 12 layers, as `turns`."""
    order = {place(name): i for i, name in enumerate(run["frozen_at"])}
    depth = 1 + max(layer for layer, _ in order)
    return lambda layer, kind, size: order[layer * depth // LAYERS, kind]


def row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def fewer_parameters(task, preset, lora):
    """The rows of one task for the claim of 9.5 x fewer. lora: LoRA's parameters on DeBERTa."""
    runs = results.load(task, AFLORA, QUESTION_SEEDS)
    if not runs:
        print(f"{task}: no runs yet: python benchmarks/results.py", file=sys.stderr)
        return
    epochs, steps = PLANS[task]
    means = [replayed(task, stretched(run)) for run in runs]
    row("9.5 x fewer", f"DeBERTaV3-base shapes, {epochs} x {steps} steps, {task}'s order",
        str(len(runs)), spread(means, ",.0f"), f"{lora:,}",
        spread([lora / mean for mean in means], ".2f"))
    small = replayed(task, lambda layer, kind, size: -size)
    large = replayed(task, lambda layer, kind, size: size)
    row("", "... any order: largest first to smallest first", "",
        f"{small:,.0f} to {large:,.0f}", f"{lora:,}", f"{lora / small:.2f} to {lora / large:.2f}")
    there = results.load(task, "lora r=8", SEEDS)
    if there:
        counts = [run["trainable_average"] for run in runs]
        lora_there = there[0]["trainable_average"]
        row("", f"the trained model, {task}, {preset}", str(len(runs)), spread(counts, ",.0f"),
            f"{lora_there:,.0f}", spread([lora_there / mean for mean in counts], ".2f"))


def mean_steps(run):
    """{kind: the mean step after which its matrices froze} of a run."""
    steps = {kind: [] for kind in KINDS}
    for name, step in run["frozen_at"].items():
        _, kind = place(name)
        steps[kind].append(step)
    return {kind: sum(values) / len(values) for kind, values in steps.items()}


def latest_kind(task):
    """The row of one task for the claim that the FFN's first A freezes last."""
    runs = results.load(task, AFLORA, QUESTION_SEEDS)
    if not runs:
        return
    means = [mean_steps(run) for run in runs]
    latest = sum(max(mean, key=mean.get) == KINDS[0] for mean in means)
    last = []  # each run's kind of the matrix that froze last
    for run in runs:
        _, kind = place(list(run["frozen_at"])[-1])
        last.append(kind)
    row(f"{task}: mean step of freezing, of {runs[0]['steps']}", str(len(runs)),
        *(spread([mean[kind] for mean in means], ".0f") for kind in KINDS),
        f"{latest} of {len(runs)} seeds",
        ", ".join(f"{kind} {last.count(kind)}" for kind in KINDS if kind in last))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=("quick", "full"))
    preset = choose_preset(parser.parse_args().preset)
    start, _ = deberta(rank=4, train_matrices=FFN)
    end, _ = deberta(rank=4, train_matrices=())
    theirs, layers = deberta(rank=8)
    as_lora(layers)
    lora = trainable(theirs)
    print(f"DeBERTaV3-base shapes: AFLoRA r=4 trains {trainable(start):,} at the start, "
          f"{trainable(end):,} at the end; LoRA r=8 {lora:,}\n")
    row("claim", "where", "seeds", "AFLoRA's average", "LoRA r=8", "times fewer")
    row(*["---"] * 6)
    for task in TASKS:
        fewer_parameters(task, preset, lora)
    print()
    row("the FFN's first A freezes last", "seeds", *KINDS, "intermediate.A the latest",
        "last of all")
    row(*["---"] * 8)
    for task in TASKS:
        latest_kind(task)


if __name__ == "__main__":
    main()
