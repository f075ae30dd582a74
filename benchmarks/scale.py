"""How the cost of AFLoRA grows: tokens a batch, rank, adapted blocks, share frozen. With a plot.

    pip install transformers peft accelerate matplotlib
    python benchmarks/scale.py

MiniLM-L6-H384 shapes, 32 rows, the precision that the companion chooses here, arms and measures of
step.py. One thing varies at a time, the rest is: 32 tokens a row, rank 4, all blocks, the FFN's
matrices trained. Adapters in the last k blocks only: below them no gradient runs. Writes
results/scale-DEVICE.json and figures/scale.png.
"""

import argparse
import gc
from functools import partial

import step  # the benchmark beside this file
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROWS = 32
LENGTH = 32
DEPTH = step.SHAPES["minilm"]["num_hidden_layers"]
PRECISION = step.companion.choose_precision("auto", step.DEVICE)
START = "aflora start"
FROZEN = "aflora frozen"
LORA = "peft lora r=8"
LENGTHS = (8, 16, 32, 64, 128)
RANKS = (1, 4, 16, 64, 256)
BLOCKS = range(1, DEPTH + 1)
SHARES = (0, 0.25, 0.5, 0.75, 1)


# ------------------------------------------------------------------------------------- measuring
def last_blocks(count):
    """The six linear layers of each of the last `count` of MiniLM's blocks."""
    return [f"layers.{i}.{name}" for i in range(DEPTH - count, DEPTH) for name in step.TARGETS]


def sweep(ways, rounds, length=LENGTH):
    """{name: measures} of the floor and `ways`, with the freezer's share where it is live."""
    ways = {"floor": step.ARMS["floor"]} | ways
    batch = step.make_batch(ROWS, length)
    arms, found = step.compare(ways, "minilm", batch, PRECISION, rounds)
    for name, arm in arms.items():
        if arm.freezer and not arm.freezer.frozen_at:
            found[name]["freezer"] = step.freezer_share(arm, found[name]["ms"])
    del arms, arm
    gc.collect()  # before the next ones are made
    return found


def measure(rounds):
    """{what varies: {value: {arm: measures}} or, all in one comparison, {name: measures}}."""
    compared = {name: step.ARMS[name] for name in (START, FROZEN, LORA)}
    ranks = {}
    for rank in RANKS:
        ranks[f"rank {rank} start"] = partial(step.ours, rank=rank)
        ranks[f"rank {rank} frozen"] = partial(step.ours, rank=rank, share=1)
    blocks = {f"{k} blocks": partial(step.ours, targets=last_blocks(k)) for k in BLOCKS}
    shares = {f"{share:.0%} frozen": partial(step.ours, share=share) for share in SHARES}
    return {
        "tokens": {str(ROWS * length): sweep(compared, rounds, length) for length in LENGTHS},
        "rank": sweep(ranks, rounds),
        "blocks": sweep(blocks, rounds),
        "share": sweep(shares, rounds),
    }


# --------------------------------------------------------------------------------------- drawing
STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.marker": "o",
    "lines.markersize": 4,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
}


def draw(found, path):
    """Six panels, of about a README's width; a white ground of its own serves dark pages, too."""
    plt.rcParams.update(STYLE)
    figure, ((tokens, rank, blocks), (share, memory, freezer)) = plt.subplots(
        2, 3, figsize=(10, 6), layout="constrained"
    )
    draw_tokens(tokens, found["tokens"])
    draw_ranks(rank, found["rank"])
    blocks.plot(BLOCKS, [found["blocks"][f"{k} blocks"]["to_floor"] for k in BLOCKS])
    blocks.set(title="Adapted blocks", xlabel="last blocks with adapters", ylabel="step / floor")
    draw_shares(share, memory, found["share"])
    draw_freezer(freezer, found["tokens"])
    for panel in (rank, blocks, share):
        panel.axhline(1, color="black", linewidth=1, linestyle=":", marker="")
    for panel in (memory, freezer):
        panel.set_ylim(0, 1.3 * panel.get_ylim()[1])
    tokens.legend(fontsize=8, loc="upper left")
    rank.legend(fontsize=8, loc="upper left")
    memory.legend(fontsize=8, loc="upper right")
    on = found["machine"]
    where = on["device"]
    if where == "cpu":
        where = f"{on['processor'] or 'CPU'}, {on['threads']} threads"
    figure.suptitle(f"Cost of AFLoRA: MiniLM-L6-H384, {PRECISION}, {where}")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")


def draw_tokens(panel, by_size):
    """A step's time against the tokens in a batch."""
    sizes = [int(size) for size in by_size]
    for name in ("floor", START, FROZEN, LORA):
        panel.loglog(sizes, [arms[name]["ms"] for arms in by_size.values()], label=name)
    panel.set(title="Tokens", xlabel="tokens in a batch", ylabel="step (ms)")
    panel.set_xticks(sizes, sizes, rotation=45)
    panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    panel.minorticks_off()


def draw_ranks(panel, arms):
    """A step's time against the rank."""
    for kind in ("start", "frozen"):
        panel.semilogx(
            RANKS,
            [arms[f"rank {rank} {kind}"]["to_floor"] for rank in RANKS],
            label=f"aflora {kind}",
        )
    panel.set(title="Rank", xlabel="rank", ylabel="step / floor")
    panel.set_xticks(RANKS, RANKS)
    panel.minorticks_off()


def draw_shares(times, memory, arms):
    """What freezing saves: in one panel time, in the other memory."""
    percent = [100 * share for share in SHARES]
    by_share = [arms[f"{share:.0%} frozen"] for share in SHARES]
    times.plot(percent, [arm["to_floor"] for arm in by_share])
    times.set(title="Freezing: time", xlabel="matrices frozen (%)", ylabel="step / floor")
    for key, label in (
        ("saved_by_adapters", "saved by adapters"),
        ("optimizer_bytes", "AdamW's state, head included"),
    ):
        memory.plot(percent, [arm[key] / 2**20 for arm in by_share], label=label)
    memory.set(title="Freezing: memory", xlabel="matrices frozen (%)", ylabel="MiB")


def draw_freezer(panel, by_size):
    """The freezer's share of a step against the tokens in a batch."""
    sizes = [int(size) for size in by_size]
    shares = [100 * arms[START]["freezer"]["share_of_step"] for arms in by_size.values()]
    panel.semilogx(sizes, shares)
    panel.set(title="The freezer", xlabel="tokens in a batch", ylabel="share of a step (%)")
    panel.set_xticks(sizes, sizes, rotation=45)
    panel.minorticks_off()


def show(title, arms):
    """Prints one comparison."""
    print(f"\n{title:24} ms   /floor  adapters save (MiB)  AdamW (MiB)  freezer's share (%)")
    for name, arm in arms.items():
        share = f"{100 * arm['freezer']['share_of_step']:14.2f}" if "freezer" in arm else ""
        saved = arm["saved_by_adapters"] / 2**20
        state = arm["optimizer_bytes"] / 2**20
        print(f"{name:18}{arm['ms']:9.1f}{arm['to_floor']:8.2f}{saved:13.2f}{state:18.2f}{share}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30 if step.CUDA else 8, help="8, on CUDA 30")
    rounds = parser.parse_args().rounds
    if rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    found = {"rounds": rounds, "machine": step.machine()} | measure(rounds)
    for size, arms in found["tokens"].items():
        show(f"{size} tokens", arms)
    for key in ("rank", "blocks", "share"):
        show(key, found[key])
    step.write_results("scale", {PRECISION: found})
    draw(found, step.ROOT / "figures" / "scale.png")


if __name__ == "__main__":
    main()
