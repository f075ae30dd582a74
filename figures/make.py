"""Draws the README's pictures, figures/NAME.svg, from the runs under results/.

    pip install matplotlib
    python benchmarks/results.py            makes the results: results/quick, on CUDA results/full
    python figures/make.py                  draws what can be drawn, says what lacks runs
    python figures/make.py layer scores     these alone; --format png for slides

freeze_map   when each matrix froze, mean over seeds       scores  the scores, until each froze
accuracy     every method against what it trains           rules   the paper's rule, the authors'
layer        the adapted layer, needs no run
curves       accuracy after each epoch: the full preset, of SST-2 else with 20,000 rows
freezing     the matrices drop out, step by step: an animation, freezing.gif
Of the others one preset a picture, never both: the full one if it has runs of both tasks.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import results  # noqa: E402
from aflora import freezing_fraction  # noqa: E402
from claims import KINDS, choose_preset, place  # noqa: E402
from results import (  # noqa: E402
    AFLORA,
    FURTHER_SEEDS,
    METHODS,
    QUESTION_SEEDS,
    TASKS,
    mean_and_deviation,
)

TITLES = {"sst2": "SST-2", "mrpc": "MRPC"}
LABELS = {
    "full": "full fine-tuning",
    "lora r=8": "LoRA r=8",
    "elora r=4": "ELoRA r=4",
    "elora r=1024": "ELoRA r=1024",
    AFLORA: "AFLoRA r=4",
}
# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ, too
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PINK = "#CC79A7"
SKY = "#56B4E9"
RED = "#D55E00"
GREY = "#666666"
PALE = "#D9D9D9"
WHITE = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}  # behind a word
LOOKS = {
    "full": ("#000000", "s"),
    "lora r=8": (ORANGE, "^"),
    "elora r=4": (GREEN, "v"),
    "elora r=1024": (PINK, "D"),
    AFLORA: (BLUE, "o"),
}
STYLE = {  # 8.4 inches are 806 px on a page; white all around, for dark pages
    "figure.figsize": (8.4, 3.3),
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "aflora",
    "hatch.linewidth": 0.6,
}


# ---------------------------------------------------------------------------------- what is there
def cells_of(task, arm, seeds):
    """The finished runs, at least one; a picture that lacks them is left out."""
    cells = results.load(task, arm, seeds)
    if not cells:
        raise FileNotFoundError(f"no run of {task}, {arm}, in {results.FOLDER.relative_to(ROOT)}")
    return cells


def panels_for(arms, seeds, height=3.3, **how):
    """(figure, [(axes, task)]): a panel for each task that has runs of all `arms`."""
    there = [task for task in TASKS if all(results.load(task, arm, seeds) for arm in arms)]
    if not there:
        raise FileNotFoundError(f"no task has runs of {', '.join(arms)}")
    width = 8.4 if len(there) > 1 else 5.6
    figure, axes = plt.subplots(1, len(there), figsize=(width, height), squeeze=False, **how)
    return figure, list(zip(axes[0], there))


def title(cell, more=""):
    """The task, and how much of it."""
    rows = f"{cell['limit']:,} rows" if cell["limit"] else "all rows"
    return f"{TITLES[cell['task']]} ({rows}, {cell['epochs']} epochs){more}"


def sizes(cell):
    """{matrix: its number of values}: 4 x 384 or 4 x 1536; checked against what the run counted."""
    inner = {"intermediate.A": 384, "intermediate.B": 1536, "output.A": 1536, "output.B": 384}
    found = {name: cell["rank"] * inner[place(name)[1]] for name in cell["frozen_at"]}
    assert sum(found.values()) == cell["trainable_start"] - cell["trainable_end"]
    return found


def steps_of(cell):
    """(t_i, T - t_f, T) of a run."""
    total = cell["steps"]
    return round(cell["t_i"] * total), total - round(cell["t_f"] * total), total


def scheduled(cell):
    """r(t) of a run in per cent, for t = 0 to T."""
    first, last, total = steps_of(cell)
    shares = [freezing_fraction(t, total, first, total - last) for t in range(total + 1)]
    return [100 * float(share) for share in shares]


# ------------------------------------------------------------------------------------- of the runs
def freeze_map():
    """Matrices x layers, both tasks; the step of freezing is the number and the colour."""
    figure, panels = panels_for([AFLORA], QUESTION_SEEDS, 3.1, sharey=True)
    for axes, task in panels:
        runs = cells_of(task, AFLORA, QUESTION_SEEDS)
        steps = steps_of(runs[0])
        image, depth = draw_map(axes, runs, steps)
        axes.set_xticks([*range(depth), depth + 1], [*range(depth), "mean"])
        axes.set_yticks(range(len(KINDS)), KINDS)
        axes.set(title=title(runs[0]), xlabel=f"layer (mean over {len(runs)} seeds)")
        axes.tick_params(length=0, grid_alpha=0)
        axes.spines[:].set_visible(False)
        add_colour_bar(figure, axes, image, steps)
    figure.suptitle(
        "The attention's A and B are not shown: they are frozen from the start", fontsize=9
    )


def draw_map(axes, runs, steps):
    """Colours and numbers of one task; returns the image and the number of layers."""
    where = [{place(name): at for name, at in run["frozen_at"].items()} for run in runs]
    depth = 1 + max(layer for layer, _ in where[0])
    first, last, _ = steps
    wide = []
    for kind in KINDS:
        means = [mean_and_deviation([at[layer, kind] for at in where])[0] for layer in range(depth)]
        wide.append([*means, math.nan, sum(means) / depth])  # a gap, then the mean of the row
    image = axes.imshow(wide, cmap="viridis", vmin=first, vmax=last, aspect="auto")
    for y, row in enumerate(wide):
        for x, step in enumerate(row):
            if x != depth:
                axes.text(
                    x,
                    y,
                    f"{step:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if step < (first + last) / 2 else "black",
                )
    return image, depth


def add_colour_bar(figure, axes, image, steps):
    """From the ramp's first step to its last, below one task's map."""
    first, last, total = steps
    marks = [first + (last - first) * i / 4 for i in range(5)]
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=30, pad=0.03)
    bar.set_ticks(marks, labels=[f"{mark:.0f}\n({100 * mark / total:.0f} %)" for mark in marks])
    bar.set_label("frozen after step (share of the run)")
    bar.outline.set_visible(False)


def freezing():
    """The freeze map empties while the realised share climbs behind r(t): returns an animation."""
    (run,) = cells_of("sst2", AFLORA, [0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), width_ratios=(1.15, 1))

    def draw(step):
        left.clear()
        right.clear()
        draw_live(left, run, step)
        draw_share(right, run, step)

    return FuncAnimation(figure, draw, moments_of(run))


def moments_of(run):
    """The step of each frame, a third of a second long: t_i, the looks that froze, a rest."""
    first, last, _ = steps_of(run)
    return [first] * 3 + sorted(set(run["frozen_at"].values())) + [last] * 12


def draw_live(axes, run, step):
    """Matrices x layers after a step: blue what trains, pale what is frozen, with its step."""
    size = sizes(run)
    trained = run["trainable_start"]
    for name, at in run["frozen_at"].items():
        depth, kind = place(name)
        y = KINDS.index(kind)
        frozen = at <= step
        way = WAYS["frozen" if frozen else "trained"]
        axes.add_patch(Rectangle((depth + 0.04, y + 0.05), 0.92, 0.9, **way))
        if frozen:
            trained -= size[name]
            axes.text(
                depth + 0.5,
                y + 0.5,
                at,
                ha="center",
                va="center",
                fontsize=8.5,
                color="black" if at == step else GREY,
                weight="bold" if at == step else "normal",
            )
    depth = 1 + max(place(name)[0] for name in run["frozen_at"])
    axes.set(
        xlim=(0, depth),
        ylim=(len(KINDS), 0),
        xlabel="layer",
        title=f"step {step}: {trained:,} adapter parameters train",
    )
    axes.set_xticks([i + 0.5 for i in range(depth)], range(depth))
    axes.set_yticks([i + 0.5 for i in range(len(KINDS))], KINDS)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_share(axes, run, step):
    """The plan, r(t), and the realised share up to a step."""
    total = run["steps"]
    steps = [0, *(at for at in run["frozen_at"].values() if at <= step), step]
    count = len(steps) - 2
    shares = [100 * i / len(run["frozen_at"]) for i in [*range(count + 1), count]]
    axes.plot(range(total + 1), scheduled(run), color=ORANGE, label="scheduled, r(t)")
    axes.step(steps, shares, where="post", color=BLUE, linewidth=1.8, label="realised")
    axes.plot(step, shares[-1], "o", color=BLUE, clip_on=False)
    axes.legend(loc="lower right")
    axes.set(
        xlim=(0, total),
        ylim=(0, 103),
        xlabel="optimizer step",
        ylabel="share of A and B that is frozen (%)",
        title=f"{count} of {len(run['frozen_at'])} matrices frozen",
    )


def scores():
    """The score of each matrix until it froze: of six matrices by name, of the others in grey."""
    (run,) = cells_of("sst2", AFLORA, [0])
    record = run["record"]
    order = list(run["frozen_at"])
    shown = [order[round(i * (len(order) - 1) / 5)] for i in range(6)]
    colours = (SKY, GREEN, ORANGE, PINK, RED, BLUE)
    in_grey = {"color": PALE, "linewidth": 0.8, "markersize": 3}
    axes = plt.subplots(figsize=(8.4, 3.9))[1]
    for name in order:
        points = [(t, at[name]) for t, at in zip(record["step"], record["scores"]) if name in at]
        if name not in shown:
            axes.plot(*zip(*points), "o-", **in_grey, markevery=[-1], zorder=1)
            continue
        i = shown.index(name)
        depth, kind = place(name)
        axes.plot(
            *zip(*points),
            color=colours[i],
            marker="osD^vP"[i],
            linewidth=1.6,
            markevery=[-1],
            markersize=8,
            markeredgecolor="black",
            zorder=2,
            label=f"layer {depth} {kind}, step {points[-1][0]}",
        )
    axes.plot([], [], "o-", **in_grey, label="the others")
    axes.legend(title="frozen after", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8.5)
    axes.set(
        title=title(run, ", seed 0: a marker is where a matrix froze"),
        yscale="log",
        xlabel="optimizer step",
        ylabel="score s(t), equation (5), no unit",
        xlim=(0, None),
    )


def accuracy():
    """Accuracy against trained parameters; who trains only the head is a line across."""
    _, panels = panels_for(METHODS, results.method_seeds(), 3.7)
    for axes, task in panels:
        runs = {arm: cells_of(task, arm, results.method_seeds()) for arm in METHODS}
        points = {}  # arm: parameters trained, mean accuracy, its deviation
        for arm, cells in runs.items():
            trained, _ = mean_and_deviation([cell["trainable_average"] for cell in cells])
            points[arm] = trained, *mean_and_deviation([cell["accuracy"] for cell in cells])
        seeds = min(len(cells) for cells in runs.values())
        axes.set(
            title=title(runs[AFLORA][0], f", {seeds} seeds"),
            xlabel="parameters trained, average over the run\n(the head not counted)",
            xscale="log",
            xlim=(350, 9e7),
        )
        draw_methods(axes, points)
    first_axes, _ = panels[0]
    first_axes.set_ylabel("dev accuracy (%), last epoch\nmean ± standard deviation")


def draw_methods(axes, points):
    """Points, their names, and the head alone as a band across."""
    low = min(mean - deviation for _, mean, deviation in points.values())
    high = max(mean + deviation for _, mean, deviation in points.values())
    axes.set_ylim(low - (high - low) * 0.1, high + (high - low) * 0.15)
    _, middle, apart = points.pop("head only")
    axes.axhspan(middle - apart, middle + apart, color=PALE, alpha=0.6, linewidth=0)
    axes.axhline(middle, color=GREY, linestyle="--", linewidth=1)
    for arm, (trained, mean, deviation) in points.items():
        colour, marker = LOOKS[arm]
        axes.errorbar(
            trained, mean, deviation, color=colour, marker=marker, capsize=3, markersize=7, zorder=3
        )
    gap = (high - low) * 0.11  # a line of text
    axes.text(8e7, middle, "head only: 0 parameters", ha="right", va="bottom", color=GREY)
    # The methods that train little stand close together: their names in a column on the left
    left = [arm for arm in points if points[arm][0] < 1e5]
    left.sort(key=lambda arm: points[arm][1])
    heights = pushed_apart([points[arm][1] for arm in left], gap)
    for arm, height in zip(left, heights):
        axes.annotate(
            LABELS[arm],
            points[arm][:2],
            (450, height),
            va="center",
            zorder=4,
            weight="bold" if arm == AFLORA else "normal",
            bbox=WHITE,
            arrowprops={"arrowstyle": "-", "color": LOOKS[arm][0], "linewidth": 0.7},
        )
    for arm, x, side in (("lora r=8", points["lora r=8"][0], "center"), ("full", 8e7, "right")):
        axes.text(
            x,
            sum(points[arm][1:]) + gap * 0.2,
            LABELS[arm],
            ha=side,
            va="bottom",
            bbox=WHITE,
            zorder=4,
        )


def pushed_apart(heights, gap):
    """Ascending heights, moved as little as needed for a gap between neighbours."""
    heights = list(heights)
    for _, i in itertools.product(range(99), range(len(heights) - 1)):
        push = max(0, gap - (heights[i + 1] - heights[i])) / 2
        heights[i] -= push
        heights[i + 1] += push
    return heights


def rules():
    """Two rules at work on the scores of one run in which nothing froze; r(t) is AFLoRA's."""
    _, panels = panels_for(["never frozen", AFLORA], [0], sharey=True)
    for axes, task in panels:
        (run,) = cells_of(task, "never frozen", [0])
        (plan,) = cells_of(task, AFLORA, [0])
        record = run["record"]
        planned = scheduled(plan)
        for step, share in zip(record["step"], record["scheduled"]):
            assert math.isclose(planned[step], 100 * share, abs_tol=1e-9)
        axes.plot(planned, color=ORANGE, linewidth=1.6, label="scheduled, r(t)")
        for key, color, line, label in (
            ("paper", BLUE, "-", "realised, paper's rule"),
            ("authors", RED, "--", "realised, authors' rule"),
        ):
            axes.step(
                [0, *record["step"]],
                [0, *(100 * share for share in record[key])],
                line,
                where="post",
                color=color,
                linewidth=1.6,
                label=label,
            )
        done = record["step"][record["authors"].index(1)]
        axes.annotate(
            f"all frozen at step {done},\nscheduled: {planned[done]:.0f} %",
            (done, 100),
            (done * 1.1, 62),
            color=RED,
            arrowprops={"arrowstyle": "->", "color": RED},
        )
        axes.set(title=title(run, ", seed 0"), xlabel="optimizer step", xlim=(0, plan["steps"]))
    first_axes, _ = panels[0]
    first_axes.set_ylabel("share of A and B that is frozen (%)")
    last_axes, _ = panels[-1]
    last_axes.legend(loc="lower right")


def curves():
    """Accuracy on dev after each epoch at the full preset, of SST-2 else with 20,000 rows."""
    chosen = results.PRESET
    there = {}
    for preset, task in (("sst2-20k", "sst2"), ("full", "sst2"), ("full", "mrpc")):
        results.use_preset(preset)
        there[task] = dev_lines(task) or there.get(task)
    results.use_preset(chosen)
    there = [(task, lines) for task, lines in there.items() if lines]
    if not there:
        raise FileNotFoundError("no run in results/full or results/sst2-20k")
    width = 8.4 if len(there) > 1 else 5.6
    _, panels = plt.subplots(1, len(there), figsize=(width, 3.6), squeeze=False)
    for axes, (task, lines) in zip(panels[0], there):
        for line in lines:
            draw_curve(axes, **line)
        cell = lines[0]["cells"][0]
        axes.set(
            title=title(cell),
            xlabel="epoch",
            ylabel="accuracy on dev (%)",
            xticks=range(1, cell["epochs"] + 1),
        )
        axes.legend(loc="lower right")


def dev_lines(task):
    """A line for each method, of all its seeds."""
    lines = []
    for arm in LOOKS:
        cells = results.load(task, arm, [*QUESTION_SEEDS, *FURTHER_SEEDS])
        if cells:
            more = f", {len(cells)} seeds" if len(cells) > 1 else f", seed {cells[0]['seed']}"
            lines.append({"arm": arm, "more": more, "cells": cells})
    return lines


def draw_curve(axes, arm, more, cells):
    """The mean over the cells after each epoch, and a band of a standard deviation around it."""
    colour, marker = LOOKS[arm]
    epochs = [line["epoch"] for line in cells[0]["history"]]
    points = [
        mean_and_deviation([cell["history"][i]["accuracy"] for cell in cells])
        for i in range(len(epochs))
    ]
    axes.plot(
        epochs,
        [mean for mean, _ in points],
        color=colour,
        marker=marker,
        markersize=4,
        label=LABELS[arm] + more,
    )
    axes.fill_between(
        epochs,
        [mean - apart for mean, apart in points],
        [mean + apart for mean, apart in points],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )


# --------------------------------------------------------------------------------------- the layer
WAYS = {  # how a part looks that
    "trained": {"facecolor": BLUE, "edgecolor": BLUE},
    "frozen": {"facecolor": "#EEEEEE", "edgecolor": PALE},
    "rests": {"facecolor": PALE, "edgecolor": BLUE, "linestyle": "--", "linewidth": 1.3},
    "random": {"facecolor": "white", "edgecolor": GREY, "hatch": "//////"},
    "given": {"facecolor": "#BDBDBD", "edgecolor": GREY},
}
WORDS = {
    "trained": "trains",
    "rests": "frozen, as learned by then",
    "random": "frozen at its random start",
    "given": "frozen, pre-trained",
}


def layer():
    """One linear layer, 768 -> 3072 (the FFN's first of BERT-base), x at the bottom; no results."""
    figure, axes = plt.subplots(figsize=(8.4, 4.4))
    axes.axis("off")
    axes.set(xlim=(-0.1, 44.7), ylim=(-3, 11.9))
    draw_layer(axes, 0, "LoRA", 8, "trained", None)
    draw_layer(axes, 11.5, "ELoRA", 1024, "random", "trained")
    draw_layer(axes, 23, "AFLoRA, at first", 4, "trained", "trained")
    draw_layer(axes, 34.5, "AFLoRA, frozen", 4, "rests", "trained")
    figure.legend(
        [Rectangle((0, 0), 1, 1, **WAYS[way]) for way in WORDS],
        WORDS.values(),
        loc="outside lower center",
        ncols=4,
        handlelength=1.8,
    )


def draw_layer(axes, x, name, r, matrices, vectors):
    """One method at x. matrices, vectors: in which of WAYS A and B, s_d and s_b are drawn."""
    path = x + 4.6
    thin = {8: 0.9, 1024: 2.9, 4: 0.5}[r]  # widths are not to scale
    for at, low, high in (
        (x + 1.15, 1, 2.2),
        (x + 1.15, 8.2, 9.6),
        (path, 1, 2.2),
        (path, 2.2, 9.6),
    ):
        axes.add_patch(
            FancyArrowPatch(
                (at, low),
                (at, high),
                arrowstyle="-|>",
                color="black",
                mutation_scale=10,
                shrinkA=0,
                shrinkB=0,
                zorder=0,
            )
        )
    axes.add_patch(Rectangle((x, 2.2), 2.3, 6, **WAYS["given"]))
    axes.text(x + 1.15, 5.2, "$W_0$\n\n3072\n× 768", ha="center", va="center")
    draw_part(axes, (path, 2.2), 2, (2.2, thin), matrices, "A", f"{r} × 768")
    draw_part(axes, (path, 5.3), 2, (thin, 3.7), matrices, "B", f"3072 × {r}")
    if vectors:
        draw_part(axes, (path, 4.5), 0.5, (thin, thin), vectors, "", f"$s_d$: {r}")
        draw_part(axes, (path, 7.6), 0.6, (3.7, 3.7), vectors, "", "$s_b$: 3072")
    for y, word in ((0.1, "x: 768"), (9.6, "y: 3072, the sum")):
        axes.add_patch(Rectangle((x, y), 6.45, 0.9, facecolor="white", edgecolor="black"))
        axes.text(x + 3.2, y + 0.4, word, ha="center", va="center")
    in_matrices = r * (768 + 3072)
    in_vectors = r + 3072 if vectors else 0
    trained = in_vectors + (in_matrices if matrices == "trained" else 0)
    axes.text(x, 11.2, name, fontsize=11, weight="bold")
    axes.text(x, -1.1, f"trains {trained:,}", fontsize=11, weight="bold", color=BLUE)
    axes.text(x, -2.8, f"{in_matrices + in_vectors:,}\nmultiplications a token", linespacing=1.4)


def draw_part(axes, place, height, widths, way, word, note):
    """A matrix or vector: as wide below as what comes in, above as what goes out."""
    x, y = place
    below, above = widths
    corners = ((-below, 0), (below, 0), (above, height), (-above, height))
    axes.add_patch(Polygon([(x + w / 2, y + up) for w, up in corners], **WAYS[way]))
    behind = {"facecolor": "white", "pad": 1.5, "linewidth": 0}
    axes.text(
        x,
        y + 0.95,
        word,
        ha="center",
        va="center",
        fontsize=11,
        weight="bold",
        color="white" if way == "trained" else "black",
        bbox=behind if way == "random" else None,
    )
    axes.text(x + 2.05, y + height / 2, note, va="center", fontsize=8.5)


PICTURES = (freeze_map, freezing, scores, accuracy, curves, rules, layer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [draw.__name__ for draw in PICTURES]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--format", default="svg", choices=("svg", "png"))
    parser.add_argument(
        "--preset", choices=("quick", "full"), help="default: full, if both tasks are there"
    )
    args = parser.parse_args()
    unknown = set(args.names) - set(names)
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}; there are: {', '.join(names)}")
    choose_preset(args.preset)
    plt.rcParams.update(STYLE)
    for draw in PICTURES:
        if not args.names or draw.__name__ in args.names:
            path = ROOT / f"figures/{draw.__name__}.{args.format}"
            try:
                moving = draw()
                if moving:
                    path = path.with_suffix(".gif")
                    moving.save(path, PillowWriter(fps=3), dpi=100)
                else:
                    metadata = {"Date": None} if args.format == "svg" else {}
                    plt.savefig(path, dpi=150, metadata=metadata)
                print(path.relative_to(ROOT))
            except FileNotFoundError as missing:
                print(f"{path.name} not drawn: {missing}; python benchmarks/results.py makes it")
            plt.close("all")


if __name__ == "__main__":
    main()
