"""What examples/freezenet.py does with many runs on MNIST: a results file, a table and a plot."""

import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from aflora import blame


def run_all(run, cells, path, jobs):
    """Calls run(*cell) for each cell, `jobs` at once, and appends what it returns to the file."""
    os.environ["TQDM_DISABLE"] = "1"  # their bars would mix
    path.parent.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    # One thread each, since small convolutions gain little by more
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        try:
            for future in as_completed([pool.submit(run, *cell) for cell in cells]):
                result = future.result()
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{result['arm']}, x{result['factor']}, seed {result['seed']}: "
                      f"{result['accuracy']:.2f} %", flush=True)
        except BaseException:  # Ctrl-C, or a run failed: the others would go on, for nothing
            for process in torch.multiprocessing.active_children():
                process.kill()
            raise


def read(path, epochs):
    """The lines of the results file, if there is one, of runs of as many epochs."""
    if not path.exists():
        return []
    with blame(path):
        results = [json.loads(line) for line in path.read_text().splitlines()]
        return [result for result in results if result["epochs"] == epochs]


def table(results):
    """Mean and spread of every arm and factor, in the order of the results, as Markdown."""
    dense = [r for r in results if r["arm"] == "dense"]
    lines = ["| network | trained values | seeds | test accuracy | of dense | bytes | dense/file |",
             "|---|---|---|---|---|---|---|"]
    for arm, factor in dict.fromkeys((r["arm"], r["factor"]) for r in results):
        cell = [r for r in results if (r["arm"], r["factor"]) == (arm, factor)]
        name = arm.replace("|", "\\|")
        if arm != "dense":
            name += f", x{factor}"
        columns = [
            name,
            f"{cell[0]['trained']:,}",
            str(len(cell)),
            f"{mean(cell):.2f}{spread(cell)}",
            f"{100 * mean(cell) / mean(dense):.2f} %",
            sizes(cell, dense),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def mean(cell):
    """Of the test accuracies of several seeds."""
    return statistics.mean(r["accuracy"] for r in cell)


def spread(cell):
    """The standard deviation over several seeds, in words."""
    if len(cell) == 1:
        return ""
    return f" ± {statistics.stdev(r['accuracy'] for r in cell):.2f}"


def sizes(cell, dense):
    """The largest file, in bytes, and how many times smaller it is than the dense network's.

    Empty for SNIP, since only a start that a seed regrows is left out of a file.
    """
    if cell[0]["arm"] == "SNIP":
        return "|"
    stored = max(r["bytes"] for r in cell)
    return f"{stored:,} | {dense[0]['bytes'] / stored:.0f}"


def plot(results, path):
    """Test error against the factor, a line an arm, error bars of one standard deviation."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    dense = [r for r in results if r["arm"] == "dense"]
    axes.axhline(100 - mean(dense), color="gray", linestyle="--", label="dense")
    arms = dict.fromkeys(r["arm"] for r in results if r["arm"] != "dense")
    colours = ("#56B4E9", "#0072B2", "#E69F00", "#666666")  # for colour-blind readers, too
    for arm, marker, colour in zip(arms, "osD^", colours):
        factors, means, deviations = curve(results, arm)
        axes.errorbar(factors, means, yerr=deviations, marker=marker, color=colour, capsize=3,
                      label=arm)
    axes.set(xscale="log", yscale="log", title="LeNet-5-Caffe on MNIST")
    axes.set_xlabel("times fewer trained values than the dense network's 431,080")
    axes.set_ylabel("test error (%), last epoch; lower is better")
    axes.set_xticks(factors, [f"x{factor}" for factor in factors])
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def curve(results, arm):
    """An arm's factors, and at each the mean and the standard deviation of the test error."""
    factors = sorted({r["factor"] for r in results if r["arm"] == arm})
    means = []
    deviations = []
    for factor in factors:
        cell = [r for r in results if (r["arm"], r["factor"]) == (arm, factor)]
        errors = [100 - r["accuracy"] for r in cell]
        means.append(statistics.mean(errors))
        deviations.append(statistics.stdev(errors) if len(errors) > 1 else 0)
    return factors, means, deviations
