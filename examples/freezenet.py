"""FreezeNet in one file: a single pass before training decides which few weights ever train.

AFLoRA freezes matrices one after the other while it trains. FreezeNet decides once, element by
element, before training: of a network at its random start the elements of highest saliency
train, all others rest where the seed has put them. They are not zeroed (that would be pruning,
as SNIP does), so signals and gradients flow as at the start, and a file holds a seed instead.

    python examples/freezenet.py --quick        LeNet-5 on MNIST, one seed: some minutes
    python examples/freezenet.py                all runs, an hour or two on 2 cores; resumable
    python examples/freezenet.py --task mrpc    one shot among AFLoRA's A and B, on MRPC or SST-2:
                                                flags of train_glue_small.py, and --keep SHARE
                                                in place of --t-i and --t-f
    pip install matplotlib                      for the plot of all runs

All runs are in results/ already: --out FILE makes them anew.

On MNIST a dense network runs beside FreezeNet with two saliencies, SNIP, and a random choice.
Papers: FreezeNet, Wimmer et al. (arXiv 2011.14087); SNIP, Lee et al. (1810.02340).
"""

import argparse
import functools
import gzip
import hashlib
import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm, parametrize

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import aflora  # noqa: E402
import freezenet_report as report  # noqa: E402
import train_glue_small as companion  # noqa: E402
from aflora import AFLoRAError, blame  # noqa: E402
from data import fetch  # noqa: E402
from data.script import status_of  # noqa: E402
from data.text import load_task  # noqa: E402


# ----------------------------------------------------------------------------------- the method
def freeze_one_shot(model, loss, keep, kind="gradient", names=None):
    """FreezeNet: before training, leaves trainable only the elements of highest saliency.

    model: a network at its random start. The pass runs in the mode that the model is in.
    loss: callable, model -> scalar: one forward pass over the data that decide.
    keep: share of the elements that train, from 0 to 1, over all parameters together.
    kind: of the saliency: "gradient" is FreezeNet's |grad L|, "gradient-weight" SNIP's
        |w * grad L|, and "weight" is |w|.
    names: of the parameters among which to choose; by default all that train.
    Returns masks, {parameter's name: bool tensor}. Raises AFLoRAError, before any change, for a
    wrong argument, and if the loss has no gradient to choose by.
    """
    if not 0 <= keep <= 1:
        raise AFLoRAError(f"keep is {keep}: give a share from 0 to 1")
    parameters = candidates(model, names)
    with blame("gradient of the loss"):  # the loss may not depend on a parameter at all
        grads = torch.autograd.grad(loss(model), [*parameters.values()], materialize_grads=True)
        if not 0 < get_total_norm(grads) < math.inf:
            raise AFLoRAError("all 0 or not finite, nothing to choose by")
    pairs = zip(parameters.values(), grads)
    saliency = torch.cat([aflora.sensitivity(p.detach(), g, kind).flatten() for p, g in pairs])
    highest = saliency.argsort(descending=True, stable=True)[:round(keep * len(saliency))]
    chosen = torch.zeros_like(saliency, dtype=torch.bool)
    chosen[highest] = True  # of equal ones the first in the model
    masks = split(chosen, parameters)
    keep_elements(model, masks)
    return masks


def candidates(model, names):
    """{name: parameter} of all that train, or of those among them that `names` lists."""
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False)
               if p.requires_grad}
    names = list(trained if names is None else names)
    for name in names:
        if name not in trained:
            raise AFLoRAError(f"names: {name!r} is not a parameter that trains; these are: "
                              f"{', '.join(trained)}")
    if not names:
        raise AFLoRAError("0 parameters to choose from: names is empty, or nothing trains")
    chosen = {trained[name] for name in names}
    return {name: p for name, p in model.named_parameters() if p in chosen}


def split(flat, parameters):
    """{name: its part of a flat tensor, in its shape} for {name: parameter}."""
    parts = flat.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape) for part, (name, p) in zip(parts, parameters.items())}


class Kept(nn.Module):
    """Parametrization of a weight of which only some elements train: those it keeps.

    The parameter is the vector of the kept elements, (k,). An optimizer knows nothing else: no
    momentum and no decay can move the others, which rest in `start`, of the weight's shape. A
    state_dict holds the vector and its positions, (dims, k), but never the start.

    name: the weight's, in the network before anything was frozen.
    """

    def __init__(self, name, start, positions):
        super().__init__()
        self.name = name
        self.start = nn.Buffer(start, persistent=False)
        self.positions = nn.Buffer(positions)

    def forward(self, kept):
        return self.start.index_put(tuple(self.positions), kept)

    def right_inverse(self, weight):
        return weight[tuple(self.positions)]


def keep_elements(model, masks):
    """Leaves only the elements trainable where masks, {parameter's name: bool tensor}, are true.

    A parameter of which all elements train, or none, stays a whole one. Raises AFLoRAError for an
    unknown name, and for a network in which elements are frozen already.
    """
    refuse_kept(model)
    parameters = {}
    for name in masks:
        with blame(f"masks: {name}"):
            parameters[name] = model.get_parameter(name)
    for name, p in parameters.items():
        mask = masks[name]
        p.requires_grad_(bool(mask.any()))
        if mask.any() and not mask.all():
            keep_some(model, p, Kept(name, p.detach().clone(), mask.nonzero().T.to(p.device)))


def keep_some(model, p, kept):
    """Turns the parameter p into the vector of its kept elements, wherever the model has it."""
    places = [(module, key) for module in model.modules()
              for key, other in module.named_parameters(recurse=False, remove_duplicate=False)
              if other is p]
    set_value(p, kept.right_inverse(kept.start))
    for module, key in places:  # several, where weights are tied: each reads the one vector
        setattr(module, key, nn.Parameter(kept.start.clone()))
        parametrize.register_parametrization(module, key, kept)
        module.parametrizations[key].original = p


def make_whole(model):
    """A plain network again, with the values that it has: what was kept is a whole parameter."""
    values = whole_values(model)
    for module in list(model.modules()):
        for key, chain in list(getattr(module, "parametrizations", {}).items()):
            if isinstance(chain[0], Kept):
                parametrize.remove_parametrizations(module, key, leave_parametrized=False)
                set_value(chain.original, values[chain[0].name])


def set_value(p, value):
    """Gives a parameter a value of another shape. It stays the object that an optimizer holds."""
    p.grad = None
    # A change of type makes torch forget the old shape, even if an output from before is alive
    p.data = value.new_empty(0, dtype=torch.complex64)
    p.data = value


def whole_values(model):
    """{parameter's name before the freezing: its whole value}, sorted by name."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Kept):
            values.pop(f"{name}.original", None)
            values[module[0].name] = module().detach()
    return dict(sorted(values.items()))


def refuse_kept(model):
    """Raises AFLoRAError if elements of the network are frozen already."""
    if any(isinstance(module, Kept) for module in model.modules()):
        raise AFLoRAError("elements of this network are frozen already: build it anew")


# ---------------------------------------------- a start that a seed regrows, and a network's file
def uniform(key, shape, bound):
    """A float32 tensor, uniform in +-bound, from the random numbers of aflora.kaiming_uniform."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    return torch.from_numpy(np.random.RandomState(seed).uniform(-bound, bound, shape)).float()


def start_values(parameters, seed):
    """{name: float32 tensor}: the start of a network that has such {name: parameter}.

    Kernels and matrices are Glorot-uniform, +-sqrt(6 / (fan_in + fan_out)), their biases as
    torch's, +-1 / sqrt(fan_in): of zeros |w * grad L| would never choose one. A norm's: 1 and 0.
    """
    values = {}
    for name, p in parameters.items():
        is_bias = name.endswith("bias")
        kernel = parameters.get(name.removesuffix("bias") + "weight", p) if is_bias else p
        if kernel.dim() < 2:
            values[name] = torch.full(p.shape, 0.0 if is_bias else 1.0)
            continue
        fan_in = kernel[0].numel()
        fan_out = kernel[:, 0].numel()
        bound = 1 / math.sqrt(fan_in) if is_bias else math.sqrt(6 / (fan_in + fan_out))
        values[name] = uniform(f"{seed}/{name}", p.shape, bound)
    return values


@torch.no_grad()
def seed_weights(model, seed):
    """Gives a plain network the start that load_network regrows from its seed."""
    refuse_kept(model)
    parameters = dict(model.named_parameters())
    for name, value in start_values(parameters, seed).items():
        parameters[name].copy_(value)


def save_network(model, path, seed):
    """Writes what has left the start of seed_weights(model, seed): a NumPy file, .npz, with

    seed: a whole number.
    positions: (k,), counted through all parameters, end to end and sorted by name.
    values: (k,), float32.
    checksum: of the start, and of the parameters' names and shapes.
    buffers/NAME: each whole, such as BatchNorm's statistics.
    Raises AFLoRAError for a network that is not of float32, or did not start from this seed.
    """
    with blame(path):
        aflora.write_file(path, pack(model, aflora.whole("seed", seed)))


def pack(model, seed):
    """The bytes of save_network's file."""
    values = whole_values(model)
    if any(value.dtype != torch.float32 for value in values.values()):
        raise AFLoRAError("the network's parameters have to be float32")
    start = start_values(values, seed)
    now = end_to_end(values)
    positions = (now != end_to_end(start)).nonzero()[:, 0]
    if len(positions) > companion.trainable(model):
        raise AFLoRAError(f"more values than train are not as seed {seed} grows them: call "
                          f"seed_weights(network, {seed}) before anything is frozen")
    file = io.BytesIO()
    np.savez_compressed(
        file, seed=np.uint64(seed), positions=positions.numpy().astype(np.uint32),
        values=now[positions].numpy(), checksum=checksum(start),
        **{f"buffers/{name}": value.cpu().numpy() for name, value in buffers(model).items()})
    return file.getvalue()


def load_network(model, path):
    """Regrows in a plain network the start that a file of save_network names; adds its values.

    Raises AFLoRAError, before any change, for a file of another network, for a seed that does not
    grow the same start, and for a network in which elements are frozen already.
    """
    refuse_kept(model)
    parameters = dict(sorted(model.named_parameters()))
    with blame(path), np.load(path, allow_pickle=False) as content:
        claimed = sum(part.file_size for part in content.zip.infolist())  # once unpacked
        if claimed > 10_000 + 16 * sum(value.numel() for value in model.state_dict().values()):
            raise AFLoRAError("it is damaged: it claims to hold more than such a network has")
        start = start_values(parameters, int(content["seed"]))
        if checksum(start) != str(content["checksum"]):
            raise AFLoRAError("it is of another network, or its seed grows another start")
        values = end_to_end(start)
        values[content["positions"].astype(np.int64)] = torch.from_numpy(content["values"])
        new = split(values, parameters)
        for name, value in buffers(model).items():
            new[name] = torch.from_numpy(content[f"buffers/{name}"]).view(value.shape)
        model.load_state_dict(new, strict=False)


def end_to_end(tensors):
    """All values of {name: tensor}, sorted by name, in one flat tensor on the CPU."""
    return torch.cat([tensors[name].flatten().cpu() for name in sorted(tensors)])


def checksum(tensors):
    """The sha256 of the names, shapes and values of {name: tensor}, sorted by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy())
    return found.hexdigest()


def buffers(model):
    """{name: buffer} of what the plain network's state_dict holds besides parameters."""
    kept = [name for name, module in model.named_modules() if isinstance(module, Kept)]
    return {name: value for name, value in model.state_dict(keep_vars=True).items()
            if not isinstance(value, nn.Parameter) and name.rpartition(".")[0] not in kept}


# ------------------------------------------------------------------------------ LeNet-5 on MNIST
PARAMETERS = 431_080
SEEDS = {157: 5, 500: 3, 50: 3, 10: 3}  # factor of fewer trained values: seeds, as they are run
ARMS = {  # kind of saliency (None: all, or a random choice), are the others zeroed, peak rate
    "dense": (None, False, 1e-3),
    "FreezeNet |grad|": ("gradient", False, 1e-2),
    "FreezeNet |w grad|": ("gradient-weight", False, 1e-2),
    "SNIP": ("gradient-weight", True, 1e-2),
    "random, frozen": (None, False, 1e-2),
}
EPOCHS = 10
QUICK_EPOCHS = 4
BATCH = 100
SCORED = 10_000  # images of the pass that decides
SHIFT = 1  # pixels at most, up or down, left or right: each training batch is moved

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {  # sha256 of the unpacked file, and the shape of what follows its header
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", (60000, 1, 28, 28)),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", (60000,)),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", (10000, 1, 28, 28)),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", (10000,)),
}


def load_file(name, folder):
    """One of MNIST's files as a uint8 tensor, from folder/MNIST, the cache or the internet."""
    sha256, shape = FILES[name]
    places = [Path(place, "MNIST") for place in (folder, fetch.CACHE) if place]
    paths = [place / file for place in places for file in (name, f"{name}.gz")]
    path = next((path for path in paths if path.exists()), None)
    with blame(path or f"{SOURCE}{name}.gz (you may put it into the folder MNIST of --data)"):
        data = path.read_bytes() if path else fetch.download(f"{SOURCE}{name}.gz")
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        fetch.check(data, sha256, "its content", "replace it")
    if not path:
        aflora.write_file(fetch.CACHE / "MNIST" / name, data)
    behind_header = np.frombuffer(data, np.uint8)[-math.prod(shape):]
    return torch.from_numpy(behind_header.reshape(shape).copy())


@functools.cache  # once in each process
def load_mnist(folder):
    """Images (N, 1, 28, 28), labels (N,), test images and test labels."""
    images, labels, test_images, test_labels = [load_file(name, folder) for name in FILES]
    return normalised(images), labels.long(), normalised(test_images), test_labels.long()


def normalised(images):
    """Pixels from 0 to 255, less their mean in MNIST, over their deviation."""
    return ((images.float() / 255 - 0.1307) / 0.3081).to(memory_format=torch.channels_last)


def lenet():
    """LeNet-5-Caffe, a ReLU behind each pooling: images (N, 1, 28, 28) -> logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def choose(model, arm, factor, images, labels, seed):
    """Leaves PARAMETERS / factor elements of a LeNet trainable, chosen as the arm says."""
    kind, zeroed, _ = ARMS[arm]
    random = torch.Generator().manual_seed(seed)
    if kind:
        rows = torch.randperm(len(images), generator=random)[:SCORED]
        freeze_one_shot(model, lambda model: F.cross_entropy(model(images[rows]), labels[rows]),
                        1 / factor, kind)
    else:
        chosen = torch.randperm(PARAMETERS, generator=random) < round(PARAMETERS / factor)
        keep_elements(model, split(chosen, dict(model.named_parameters())))
    if zeroed:
        resting = [module.start for module in model.modules() if isinstance(module, Kept)]
        resting += [p.data for p in model.parameters() if not p.requires_grad]
        for tensor in resting:
            tensor.zero_()


def shifted_batches(images, labels, seed, epoch):
    """All images in random order, each batch of them moved by up to SHIFT pixels."""
    random = torch.Generator().manual_seed(1000 * seed + epoch)
    groups = torch.randperm(len(images), generator=random).split(BATCH)

    def collate(rows):
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=random).tolist()
        # What leaves at one side comes in at the other: 98.6 % of the images have a blank border
        return images[rows].roll(shift, (2, 3)), labels[rows]

    return torch.utils.data.DataLoader(
        groups, batch_size=None, generator=random, collate_fn=collate)


def accuracy(model, images, labels):
    """Per cent of the images that the network names right."""
    device = next(model.parameters()).device
    predicted = [model(x.to(device)).argmax(1).cpu() for x in images.split(1000)]
    return 100 * (torch.cat(predicted) == labels).sum().item() / len(labels)


def run(arm, factor, seed, epochs, folder):
    """Trains one LeNet on the MNIST of a folder. Returns its line of the results file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = companion.choose_precision("auto", device)
    images, labels, test_images, test_labels = load_mnist(folder)
    model = lenet()
    seed_weights(model, seed)
    if arm != "dense":
        choose(model, arm, factor, images, labels, seed)
    model.to(device, memory_format=torch.channels_last)
    accuracies = []

    def evaluate(training):
        if training.steps % training.steps_per_epoch == 0:
            accuracies.append(accuracy(model, test_images, test_labels))

    aflora.train(
        model,
        lambda epoch: shifted_batches(images, labels, seed, epoch),
        lambda model, batch: F.cross_entropy(model(batch[0]).float(), batch[1]),
        epochs=epochs, lr=ARMS[arm][2], precision=precision, after_step=evaluate)
    all_values = arm == "dense" or ARMS[arm][1]  # SNIP's others are zeros, which no seed grows
    return {
        "arm": arm, "factor": factor, "seed": seed, "epochs": epochs, "lr": ARMS[arm][2],
        "accuracy": accuracies[-1], "best_accuracy": max(accuracies),
        "bytes": 4 * PARAMETERS if all_values else len(pack(model, seed)),
        "trained": companion.trainable(model), "precision": precision, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}


def compare_on_mnist(args):
    """Runs what is not in the results file yet, then makes the table and the plot from it."""
    seeds = {157: 1} if args.quick else SEEDS
    epochs = QUICK_EPOCHS if args.quick else EPOCHS
    path = ROOT / "results/freezenet_mnist.jsonl"
    if args.quick:
        path = path.with_stem("freezenet_mnist_quick")
    path = Path(args.out or path)
    cells = [("dense", 1, seed) for seed in range(max(seeds.values()))]
    cells += [(arm, factor, seed) for factor in seeds for arm in list(ARMS)[1:]
              for seed in range(seeds[factor])]

    results = report.read(path, epochs)
    done = [(r["arm"], r["factor"], r["seed"]) for r in results]
    waiting = [cell for cell in cells if cell not in done]
    print(f"{len(cells)} runs of {epochs} epochs, {len(waiting)} still to do", flush=True)
    if waiting:
        load_mnist(args.data)  # here, too: so that a missing file is one clear error
        jobs = 1 if torch.cuda.is_available() else args.jobs
        report.run_all(run, [(*cell, epochs, args.data) for cell in waiting], path, jobs)
    results = report.read(path, epochs)
    results.sort(key=lambda r: (r["factor"], list(ARMS).index(r["arm"]), r["seed"]))
    print(report.table(results))
    if not args.quick and not args.out:
        report.plot(results, ROOT / "figures/freezenet_mnist.png")


# --------------------------------------------------------------- one shot among AFLoRA's matrices
class OneShotRun(companion.Run):
    """A run of the companion in which one shot before training takes the freezer's place."""

    def prepare(self):
        super().prepare()
        if self.args.keep is not None:  # t_i and t_f decide the default alone
            self.recipe |= {"t_i": None, "t_f": None}
        self.recipe["keep"] = self.choose_matrices(self.args.keep)
        self.freezer = None
        self.trainable_start = companion.trainable(self.model.encoder)

    def choose_matrices(self, keep):
        """Leaves a share of the elements of AFLoRA's A and B trainable, instead of freezing later.

        keep: the share; None means what AFLoRA trains on average. Returns it.
        """
        freezer = self.freezer
        if freezer is None:
            raise AFLoRAError("one shot chooses among the A and B that AFLoRA trains: leave out "
                              "--method and --train-matrices none")
        if keep is None:
            plan = (freezer.total_steps, freezer.t_i, freezer.t_f)
            shares = [1 - aflora.freezing_fraction(t, *plan) for t in range(freezer.total_steps)]
            keep = float(sum(shares) / len(shares))
        rows = torch.arange(len(self.train_set.labels)).split(self.recipe["batch_size"])[:8]
        batches = [aflora.to_device(self.train_set.collate(few), self.device) for few in rows]

        def loss(model):
            with aflora.autocast(self.device, self.precision):
                return sum(companion.loss(model, batch) for batch in batches)

        self.model.eval()  # without dropout
        for layer in self.layers.values():
            nn.init.ones_(layer.s_b)  # at its start, 0, no gradient reaches A and B
        freeze_one_shot(self.model, loss, keep, self.recipe["sensitivity"], freezer.matrices)
        for layer in self.layers.values():
            nn.init.zeros_(layer.s_b)
        return keep

    def make_result(self, training):
        return super().make_result(training) | {"method": "freezenet"}

    def save_adapter(self):
        make_whole(self.model)
        super().save_adapter()


def compare_on_text(args):
    """Trains one task as the flags say."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = companion.choose_precision(args.amp, device)
    task = load_task(args.task, args.data)
    args.out = args.out or f"runs/{args.task}-freezenet-s{args.seed}"
    OneShotRun(args.task, args, task, device, precision).train()


# ------------------------------------------------------------------------------- the command line
def main(argv=None):
    """The command line, see --help. Returns what status_of() does."""
    return status_of(compare, argv)


def compare(argv):
    """Compares on MNIST, or trains the task that the flags name."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="mnist", choices=("mnist", "sst2", "mrpc"))
    first.add_argument("--keep", type=float)
    chosen, flags = first.parse_known_args(argv)
    if chosen.task == "mnist" and chosen.keep is not None:
        raise AFLoRAError("--keep goes with --task sst2 or mrpc")
    if chosen.task == "mnist":
        compare_on_mnist(parse_mnist(flags))
        return
    args = companion.parse([*flags, "--task", chosen.task])
    if chosen.keep is not None and {"t_i", "t_f"} & vars(args).keys():
        raise AFLoRAError("--keep is what --t-i and --t-f decide else: leave these out")
    there = getattr(args, "keep", chosen.keep)  # a stopped run's
    aflora.expect_equal({"keep": there}, {"keep": chosen.keep})
    args.keep = chosen.keep
    compare_on_text(args)


def parse_mnist(flags):
    """The flags that go with MNIST."""
    parser = argparse.ArgumentParser(
        description="FreezeNet on MNIST, beside a dense network, SNIP and a random choice.",
        epilog="With --task sst2 or --task mrpc, one shot among AFLoRA's matrices: --keep, the "
        "share of their elements that trains, by default what AFLoRA trains on average, and the "
        "flags of train_glue_small.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--quick", action="store_true", help=f"one seed, x157, {QUICK_EPOCHS} epochs, own file")
    flag("--data", default=os.environ.get("AFLORA_DATA"), help="folder with MNIST/; None: fetch")
    flag("--jobs", type=int, default=os.cpu_count(), help="runs at once, one core each")
    flag("--out", help="results file; %(default)s: results/freezenet_mnist[_quick].jsonl")
    args = parser.parse_args(flags)
    aflora.whole("--jobs", args.jobs, 1)
    return args


if __name__ == "__main__":
    sys.exit(main())
