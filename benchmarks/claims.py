"""The paper's countable claims, from the runs under results/: a Markdown table.

    python benchmarks/results.py    makes the runs: results/quick, on CUDA results/full
    python benchmarks/claims.py     prints the table; --preset quick|full, default: full, if there

9.5 x fewer average trainable parameters than LoRA r=8. On the trained model: both counts from the
runs. On DeBERTaV3-base shapes: its 72 linear layers get adapters (nothing is trained: the weights
are on the meta device) and AdaptiveFreezer freezes them in the order of a real run. That order is
stretched from the trained model's depth to 12 layers: a matrix freezes when the one of its kind at
the same relative depth did. Steps an epoch as the task has with batches of 64; t_i = one epoch,
t_f = 70 % of all steps. Mean over the orders of all seeds, and the bounds that any order has.
"""

import argparse, statistics, sys, types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch  # noqa: E402
import results  # noqa: E402
from aflora import AdaptiveFreezer, add_adapters  # noqa: E402
from train_glue_small import ATTENTION, FFN  # noqa: E402

LAYERS, HIDDEN, INNER = 12, 768, 3072  # DeBERTaV3-base
PLANS = dict(mrpc=(20, 58), sst2=(10, 1053))  # epochs, steps an epoch: 3,668 and 67,349 rows by 64
KINDS = ("intermediate.A", "intermediate.B", "output.A", "output.B")


def deberta(**how):
    """(adapters, how many of their parameters train) on DeBERTaV3-base's shapes."""
    inner = dict(intermediate=(HIDDEN, INNER), output=(INNER, HIDDEN))
    with torch.device("meta"):
        layers = [torch.nn.ModuleDict({name: torch.nn.Linear(*inner.get(name, (HIDDEN, HIDDEN)))
                                       for name in ATTENTION + FFN}) for _ in range(LAYERS)]
    adapters = add_adapters(model := torch.nn.ModuleList(layers), ATTENTION + FFN, **how)
    return adapters, sum(p.numel() for p in model.parameters() if p.requires_grad)


def place(name):
    """(layer, kind) of a matrix: "encoder.layers.3.output.lora_A" gives (3, "output.A")."""
    *_, layer, kind, matrix = name.replace("lora_", "").split(".")
    return int(layer), f"{kind}.{matrix}"


def choose_preset(given=None):
    """Reads results/full, if runs are there, else results/quick; or what is given."""
    full = any((ROOT / "results/full").glob("*-s0.json"))
    results.FOLDER = ROOT / "results" / (given or ("full" if full else "quick"))
    return results.FOLDER.name


class Replay(AdaptiveFreezer):
    """Freezes by `turns`, {matrix: a number}, the lowest first, instead of by the scores."""
    def scores(self):
        return {name: self.turns[name] for name in self.live}


def replayed(task, turns):
    """Trainable parameters, averaged over a run on DeBERTaV3-base's shapes. turns: (layer, kind,
    size) -> when that matrix freezes, as a number."""
    epochs, steps = PLANS[task]
    freezer = Replay(deberta(rank=4, train_matrices=FFN)[0], total := epochs * steps, t_i=steps,
                     t_f=round(0.7 * total))
    freezer.turns = {name: turns(*place(name), p.numel()) for name, p in freezer.matrices.items()}
    for step in range(1, total + 1):
        freezer.freeze(step, types.SimpleNamespace(state={}))
    return freezer.average_trainable()


def stretched(run):
    """A run's order of freezing for 12 layers, as `turns`."""
    order = {place(name): i for i, name in enumerate(run["frozen_at"])}
    depth = 1 + max(layer for layer, _ in order)
    return lambda layer, kind, size: order[layer * depth // LAYERS, kind]


def several(values, form):
    """Mean ± standard deviation over seeds."""
    spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + spread


def row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=("quick", "full"))
    preset = choose_preset(parser.parse_args().preset)
    lora = deberta(rank=8, method="lora")[1]
    start = deberta(rank=4, train_matrices=FFN)[1]
    end = deberta(rank=4, train_matrices="none")[1]
    print(f"DeBERTaV3-base shapes: AFLoRA r=4 trains {start:,} at the start, {end:,} at the end; "
          f"LoRA r=8 {lora:,}\n")
    row("claim", "where", "seeds", "AFLoRA's average", "LoRA r=8", "times fewer")
    row(*["---"] * 6)
    for task in results.TASKS:
        if not (runs := results.load(task, results.AFLORA, results.QUESTION_SEEDS)):
            print(f"{task}: no runs yet: python benchmarks/results.py", file=sys.stderr)
            continue
        epochs, steps = PLANS[task]
        means = [replayed(task, stretched(run)) for run in runs]
        row("9.5 x fewer", f"DeBERTaV3-base shapes, {epochs} x {steps} steps, {task}'s order",
            str(len(runs)), several(means, ",.0f"), f"{lora:,}",
            several([lora / mean for mean in means], ".2f"))
        small, large = (replayed(task, lambda layer, kind, size: size * sign) for sign in (-1, 1))
        row("", "... any order: largest first to smallest first", "",
            f"{small:,.0f} to {large:,.0f}", f"{lora:,}",
            f"{lora / small:.2f} to {lora / large:.2f}")
        if there := results.load(task, "lora r=8", results.SEEDS):
            counts = [run["trainable_average"] for run in runs]
            row("", f"the trained model, {task}, {preset}", str(len(runs)),
                several(counts, ",.0f"), f"{there[0]['trainable_average']:,.0f}",
                several([there[0]["trainable_average"] / mean for mean in counts], ".2f"))
    print()
    row("the FFN's first A freezes last", "seeds", *KINDS, "intermediate.A the latest",
        "last of all")
    row(*["---"] * 8)
    for task in results.TASKS:
        if runs := results.load(task, results.AFLORA, results.QUESTION_SEEDS):
            means = [{kind: statistics.mean(at for name, at in run["frozen_at"].items()
                                            if place(name)[1] == kind) for kind in KINDS}
                     for run in runs]
            latest = sum(max(mean, key=mean.get) == KINDS[0] for mean in means)
            last = [place(list(run["frozen_at"])[-1])[1] for run in runs]
            row(f"{task}: mean step of freezing, of {runs[0]['steps']}", str(len(runs)),
                *(several([mean[kind] for mean in means], ".0f") for kind in KINDS),
                f"{latest} of {len(runs)} seeds",
                ", ".join(f"{kind} {last.count(kind)}" for kind in KINDS if kind in last))


if __name__ == "__main__":
    main()
