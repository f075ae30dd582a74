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

ROWS, LENGTH = 32, 32
PRECISION = step.companion.choose_precision("auto", step.DEVICE)
START, FROZEN, LORA = "aflora start", "aflora frozen", "peft lora r=8"
LENGTHS, RANKS, BLOCKS = (8, 16, 32, 64, 128), (1, 4, 16, 64, 256), range(1, 7)
SHARES = (0, 0.25, 0.5, 0.75, 1)


def last_blocks(count):
    """The six linear layers of the last `count` of MiniLM's six blocks, as one expression."""
    return rf".*layers\.[{6 - count}-5]\.({'|'.join(step.TARGETS)})"


def sweep(ways, rounds, length=LENGTH):
    """{name: measures} of the floor and `ways`, with the freezer's share where it is live."""
    arms, found = step.compare({"floor": step.ARMS["floor"]} | ways, "minilm",
                               step.make_batch(ROWS, length), PRECISION, rounds)
    for name, arm in arms.items():
        if arm.freezer and not arm.freezer.frozen_at:
            found[name]["freezer"] = step.freezer_share(arm, found[name]["ms"])
    gc.collect()
    return found


def measure(rounds):
    """{what varies: {value: {arm: measures}} or, all in one comparison, {name: measures}}."""
    compared = {name: step.ARMS[name] for name in (START, FROZEN, LORA)}
    frozen = {f"rank {rank} frozen": partial(step.ours, rank=rank, share=1) for rank in RANKS}
    live = {f"rank {rank} start": partial(step.ours, rank=rank) for rank in RANKS}
    blocks = {f"{k} blocks": partial(step.ours, targets=last_blocks(k)) for k in BLOCKS}
    shares = {f"{share:.0%} frozen": partial(step.ours, share=share) for share in SHARES}
    return dict(tokens={str(ROWS * length): sweep(compared, rounds, length) for length in LENGTHS},
                rank=sweep(live | frozen, rounds), blocks=sweep(blocks, rounds),
                share=sweep(shares, rounds))


def draw(found, path):
    """Six panels, of about a README's width; a white ground of its own serves dark pages, too."""
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "lines.marker": "o",
                         "lines.markersize": 4, "axes.titlesize": 10, "axes.titleweight": "bold"})
    figure, ((tokens, rank, blocks), (share, memory, freezer)) = plt.subplots(
        2, 3, figsize=(10, 6), layout="constrained")
    sizes, by_tokens = [int(size) for size in found["tokens"]], found["tokens"].values()
    for name in ("floor", START, FROZEN, LORA):
        tokens.loglog(sizes, [arms[name]["ms"] for arms in by_tokens], label=name)
    tokens.set(title="Tokens", xlabel="tokens in a batch", ylabel="step (ms)")
    tokens.set_xticks(sizes, sizes, rotation=45)
    tokens.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    tokens.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    tokens.minorticks_off()
    for kind in ("start", "frozen"):
        rank.semilogx(RANKS, [found["rank"][f"rank {r} {kind}"]["to_floor"] for r in RANKS],
                      label=f"aflora {kind}")
    rank.set(title="Rank", xlabel="rank", ylabel="step / floor")
    rank.set_xticks(RANKS, RANKS)
    rank.minorticks_off()
    blocks.plot(BLOCKS, [found["blocks"][f"{k} blocks"]["to_floor"] for k in BLOCKS])
    blocks.set(title="Adapted blocks", xlabel="last blocks with adapters", ylabel="step / floor")
    percent, by_share = [100 * s for s in SHARES], [
        found["share"][f"{s:.0%} frozen"] for s in SHARES]
    share.plot(percent, [arm["to_floor"] for arm in by_share])
    share.set(title="Freezing: time", xlabel="matrices frozen (%)", ylabel="step / floor")
    for key, label in (("saved_by_adapters", "saved by adapters"),
                       ("optimizer_bytes", "AdamW's state, head included")):
        memory.plot(percent, [arm[key] / 2**20 for arm in by_share], label=label)
    memory.set(title="Freezing: memory", xlabel="matrices frozen (%)", ylabel="MiB")
    freezer.semilogx(sizes, [100 * arms[START]["freezer"]["share_of_step"] for arms in by_tokens])
    freezer.set(title="The freezer", xlabel="tokens in a batch", ylabel="share of a step (%)")
    freezer.set_xticks(sizes, sizes, rotation=45)
    freezer.minorticks_off()
    for panel in (rank, blocks, share):
        panel.axhline(1, color="black", linewidth=1, linestyle=":", marker="")
    for panel in (memory, freezer):
        panel.set_ylim(0, 1.3 * panel.get_ylim()[1])
    for panel in (tokens, rank, memory):
        panel.legend(fontsize=8, loc="upper right" if panel is memory else "upper left")
    on = found["machine"]
    cpu = f"{on['processor'] or 'CPU'}, {on['threads']} threads"
    where = cpu if on["device"] == "cpu" else on["device"]
    figure.suptitle(f"Cost of AFLoRA: MiniLM-L6-H384, {PRECISION}, {where}")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30 if step.CUDA else 8, help="8, on CUDA 30")
    if (rounds := parser.parse_args().rounds) < 2:
        parser.error("--rounds: at least 2, for quartiles")
    found = dict(rounds=rounds, machine=step.machine()) | measure(rounds)
    tables = {f"{size} tokens": arms for size, arms in found["tokens"].items()} | {
        key: found[key] for key in ("rank", "blocks", "share")}
    for title, arms in tables.items():
        print(f"\n{title:24} ms   /floor  adapters save (MiB)  AdamW (MiB)  freezer's share (%)")
        for name, a in arms.items():
            share = f"{100 * a['freezer']['share_of_step']:14.2f}" if "freezer" in a else ""
            saved, state = a["saved_by_adapters"] / 2**20, a["optimizer_bytes"] / 2**20
            print(f"{name:18}{a['ms']:9.1f}{a['to_floor']:8.2f}{saved:13.2f}{state:18.2f}{share}")
    step.write_results("scale", {PRECISION: found})
    draw(found, step.ROOT / "figures" / "scale.png")


if __name__ == "__main__":
    main()
