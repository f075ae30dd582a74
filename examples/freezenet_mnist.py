"""FreezeNet on MNIST: one pass before training decides which few weights train; no other moves.

    python examples/freezenet_mnist.py --quick       one seed, 157 x fewer trained values: 2 minutes
    python examples/freezenet_mnist.py               all runs, about an hour on 2 cores; resumable
    pip install matplotlib                           for the plot

LeNet-5-Caffe (431,080 parameters; a ReLU behind each pooling) as a dense network, as FreezeNet with
both saliencies, as SNIP (Lee et al., arXiv 1810.02340: as many weights, chosen by |w * grad L|, the
others zero) and with a random choice of the trained weights, the others at their random start. All
train on images shifted by up to a pixel, batch by batch. Each run appends a line to
results/freezenet_mnist.jsonl and is not run again; the table and figures/freezenet_mnist.png are
made from that file. MNIST's four files lie in MNIST/ in the folder --data (or $AFLORA_DATA), else
in the cache, or are fetched; their content is checked by its sha256.
"""

import argparse, contextlib, gzip, hashlib, io, json, math, os, statistics, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

if __name__ != "freezenet_mnist":  # several runs at once: their bars would mix
    os.environ["TQDM_DISABLE"] = "1"
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {  # sha256 of the unpacked file, and the shape after its header
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", (60000, 1, 28, 28)),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", (60000,)),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", (10000, 1, 28, 28)),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", (10000,))}
PARAMETERS = 431_080
SEEDS = {157: 5, 500: 3, 50: 3, 10: 3}  # factor of fewer trained values: seeds, as they are run
# arm: saliency (None: random), the others are zeroed, peak learning rate of AdamW
ARMS = {"dense": (None, False, 1e-3),
        "FreezeNet |grad|": ("gradient", False, 1e-2),
        "FreezeNet |w grad|": ("gradient-weight", False, 1e-2),
        "SNIP": ("gradient-weight", True, 1e-2),
        "random, frozen": (None, False, 1e-2)}
EPOCHS, QUICK_EPOCHS, BATCH, SCORED = 10, 4, 100, 10_000  # SCORED: images that decide
SHIFT = 1  # pixels at most, up or down, left or right: each batch of the training is moved
DATA = []  # of this process: images, labels, test images, test labels


def load(name, folder):
    """One of MNIST's files as a uint8 tensor, from `folder`, the cache or the internet."""
    expected, shape = FILES[name]
    places = [Path(place, "MNIST") for place in (folder, companion.CACHE) if place]
    paths = [place / file for place in places for file in (name, f"{name}.gz")]
    path = next((path for path in paths if path.exists()), None)
    with aflora.blame(path or SOURCE + name):
        data = path.read_bytes() if path else companion.download(f"{SOURCE}{name}.gz")
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if (found := hashlib.sha256(data).hexdigest()) != expected:
            raise aflora.AFLoRAError(f"sha256 of its content is {found}, expected {expected}")
    if not path:
        paths[-2].parent.mkdir(parents=True, exist_ok=True)
        aflora.write_file(paths[-2], data)
    values = np.frombuffer(data, np.uint8)[-int(np.prod(shape)):]  # behind the header
    return torch.from_numpy(values.reshape(shape).copy())


def start_process(folder):
    """Loads MNIST once in every process; one thread, for small convolutions gain little by more."""
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = (load(name, folder) for name in FILES)
    scale = lambda x: ((x.float() / 255 - 0.1307) / 0.3081).contiguous(  # noqa: E731
        memory_format=torch.channels_last)  # mean and deviation of MNIST's pixels
    DATA[:] = scale(images), labels.long(), scale(test_images), test_labels.long()


def lenet():
    """LeNet-5-Caffe: images (N, 1, 28, 28) -> logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.ReLU(), nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


@torch.no_grad()
def seed_weights(model, seed):
    """Gives a network a start that a file can hold as a seed: Glorot-uniform kernels and matrices,
    their biases as torch's, uniform in +-1/sqrt(fan_in): |w * grad L| never chooses one that is 0.
    A norm's vectors 1 and 0. By .starts save_adapter and load_adapter know how to regrow it all."""
    model.adapter_config = dict(method="freezenet", seed=seed)
    model.starts = dict.fromkeys(model.state_dict())  # None: of a buffer there is no seed
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        bias = name.endswith("bias")
        kernel = parameters.get(name.removesuffix("bias") + "weight", p) if bias else p
        model.starts[name] = partial(torch.full, p.shape, float(not bias))
        if kernel.dim() > 1:  # Kaiming's bound is sqrt(6 / (1 + a^2) / fan_in), fan_in 1 of a bias
            a = 6 * kernel[0].numel() - 1 if bias else p.shape[0] / p.shape[1]
            model.starts[name] = partial(
                aflora.kaiming_uniform, f"{seed}/{name}", p.shape, math.sqrt(a))
        p.copy_(model.starts[name]())


def freeze(model, arm, factor, images, labels, seed):
    """Leaves PARAMETERS / factor elements of `model` trainable, chosen as `arm` says."""
    sensitivity, zeroed, _ = ARMS[arm]
    random = torch.Generator().manual_seed(seed)
    if sensitivity:
        rows = torch.randperm(len(images), generator=random)[:SCORED]
        loss = lambda model: F.cross_entropy(model(images[rows]), labels[rows])  # noqa: E731
        aflora.freeze_one_shot(model, loss, 1 / factor, sensitivity)
    else:
        mask = torch.randperm(PARAMETERS, generator=random) < round(PARAMETERS / factor)
        parts = mask.split([p.numel() for p in model.parameters()])
        aflora.keep_elements(model, {name: part.view_as(p) for (name, p), part in zip(
            model.named_parameters(), parts)})
    if zeroed:
        for module in model.modules():
            if isinstance(module, aflora.Kept):
                module.start.zero_()
        for p in (p for p in model.parameters() if not p.requires_grad):
            p.data.zero_()


def run(arm, factor, seed, epochs):
    """Trains one network; returns its line of the results file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = companion.choose_precision("auto", device)
    images, labels, test_images, test_labels = DATA
    model = lenet()
    seed_weights(model, seed)
    if arm != "dense":
        freeze(model, arm, factor, images, labels, seed)
    model.to(device, memory_format=torch.channels_last)

    def batches(epoch):
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        groups = torch.randperm(len(images), generator=random).split(BATCH)
        def collate(rows):  # it wraps round: 98.6 % of the images have a blank border
            shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=random).tolist()
            return images[rows].roll(shift, (2, 3)), labels[rows]
        return torch.utils.data.DataLoader(groups, batch_size=None, generator=random,
                                           collate_fn=collate)

    def evaluate(model):
        hits = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item()
                   for x, y in zip(test_images.split(1000), test_labels.split(1000)))
        return dict(accuracy=100 * hits / len(test_labels))

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # train()'s line per epoch
        report = aflora.train(model, batches, lambda model, batch: F.cross_entropy(
            model(batch[0]).float(), batch[1]), epochs=epochs, lr=ARMS[arm][2],
            precision=precision, evaluate=evaluate)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.pt")
        aflora.save_adapter(model, path)
        stored = path.stat().st_size
    accuracies = [epoch["accuracy"] for epoch in report["history"]]
    return dict(arm=arm, factor=factor, seed=seed, epochs=epochs, lr=ARMS[arm][2],
                accuracy=accuracies[-1], best_accuracy=max(accuracies), bytes=stored,
                trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
                seconds=seconds, precision=precision, torch=torch.__version__,
                device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")


def table(results):
    """Mean and spread of every arm and factor as the rows of a Markdown table."""
    dense = statistics.mean(r["accuracy"] for r in results if r["arm"] == "dense")
    dense_bytes = next(r["bytes"] for r in results if r["arm"] == "dense")
    lines = ["| network | trained values | seeds | test accuracy | of dense | bytes | dense/file |",
             "|---|---|---|---|---|---|---|"]
    for arm, factor in dict.fromkeys((r["arm"], r["factor"]) for r in results):
        cell = [r for r in results if (r["arm"], r["factor"]) == (arm, factor)]
        values = [r["accuracy"] for r in cell]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        stored, mean = max(r["bytes"] for r in cell), statistics.mean(values)
        # save_adapter knows no zeros: SNIP's file, positions and values, would be FreezeNet's.
        sizes = "" if ARMS[arm][1] else f"{stored:,} | {dense_bytes / stored:.0f}"
        name = arm.replace("|", "\\|") + f", x{factor}" * (arm != "dense")
        lines.append(f"| {name} | {cell[0]['trained']:,} | {len(cell)} | {mean:.2f}{spread} | "
                     f"{100 * mean / dense:.2f} % | {sizes or '|'} |")
    return "\n".join(lines)


def plot(results, path):
    """Test error against the factor, a line an arm, error bars of one standard deviation."""
    try:
        import matplotlib
    except ImportError:
        return print("no plot: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    dense = statistics.mean(100 - r["accuracy"] for r in results if r["arm"] == "dense")
    axes.axhline(dense, color="gray", linestyle="--", label="dense")
    colours = ("#56B4E9", "#0072B2", "#E69F00", "#666666")  # for colour-blind readers, too
    for arm, marker, colour in zip(list(ARMS)[1:], "osD^", colours):
        factors = sorted({r["factor"] for r in results if r["arm"] == arm})
        cells = [[100 - r["accuracy"] for r in results if (r["arm"], r["factor"]) == (arm, f)]
                 for f in factors]
        axes.errorbar(factors, [statistics.mean(c) for c in cells], marker=marker, capsize=3,
                      yerr=[statistics.stdev(c) if len(c) > 1 else 0 for c in cells], label=arm,
                      color=colour)
    axes.set(xscale="log", yscale="log", title="LeNet-5-Caffe on MNIST",
             xlabel="times fewer trained values than the dense network's 431,080",
             ylabel="test error (%), last epoch; lower is better")
    axes.set_xticks(sorted(SEEDS), [f"x{factor}" for factor in sorted(SEEDS)])
    axes.set_yticks(ticks := (0.5, 1, 2, 5, 10, 20, 50, 100), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--quick", action="store_true", help=f"one seed, x157, {QUICK_EPOCHS} epochs, own file")
    flag("--data", default=os.environ.get("AFLORA_DATA"), help="folder with MNIST/; None: fetch")
    flag("--jobs", type=int, default=os.cpu_count(), help="runs at once, one core each")
    flag("--out", help="results file; %(default)s: results/freezenet_mnist[_quick].jsonl")
    args = parser.parse_args()
    name = "freezenet_mnist_quick" if args.quick else "freezenet_mnist"
    path = Path(args.out or ROOT / f"results/{name}.jsonl")
    epochs = QUICK_EPOCHS if args.quick else EPOCHS
    plan = [("dense", 1, seed) for seed in range(1 if args.quick else max(SEEDS.values()))]
    plan += [(arm, factor, seed) for factor, seeds in ({157: 1} if args.quick else SEEDS).items()
             for arm in list(ARMS)[1:] for seed in range(seeds)]
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    results = [r for r in results if r["epochs"] == epochs]
    done = {(r["arm"], r["factor"], r["seed"]) for r in results}
    waiting = [cell for cell in plan if cell not in done]
    print(f"{len(plan)} runs of {epochs} epochs, {len(waiting)} still to do", flush=True)
    try:
        start_process(args.data)  # here, too: so that a missing file is one clear error
    except (aflora.AFLoRAError, OSError) as error:
        sys.exit(f"error: {error}")
    path.parent.mkdir(parents=True, exist_ok=True)
    jobs = 1 if torch.cuda.is_available() else args.jobs
    context = torch.multiprocessing.get_context("spawn")
    with (ProcessPoolExecutor(jobs, context, start_process, (args.data,)) as pool,
          path.open("a") as file):
        try:
            for future in as_completed([pool.submit(run, *cell, epochs) for cell in waiting]):
                results.append(future.result())
                print(json.dumps(results[-1]), file=file, flush=True)
                print("{arm}, x{factor}, seed {seed}: {accuracy:.2f} %, {seconds:.0f} s".format(
                    **results[-1]), flush=True)
        except BaseException:  # Ctrl-C, or a run failed: the others would go on, for nothing
            for process in torch.multiprocessing.active_children():
                process.kill()
            raise
    results.sort(key=lambda r: (r["factor"], list(ARMS).index(r["arm"]), r["seed"]))
    print(table(results))
    if not args.quick:
        plot(results, ROOT / "figures/freezenet_mnist.png")


if __name__ == "__main__":
    main()
