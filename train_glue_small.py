"""Fine-tunes a small BERT on SST-2 and MRPC with AFLoRA: the companion of aflora.py, and its proof.

    python train_glue_small.py                       both tasks, AFLoRA; minutes on a CPU
    python train_glue_small.py --preset full         all rows, more epochs; what CUDA does
    python train_glue_small.py --resume runs/mrpc-aflora-s0     go on where a run was stopped
    python train_glue_small.py --help                every flag

Text -> token ids -> batches of like length -> BERT with adapters -> loss -> train() of aflora.py ->
report. Weights and texts come from data/fetch.py. A run leaves a folder with adapter.pt, log.jsonl
(a line for each logged step), result.json and freeze_map.txt.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import aflora
from aflora import AFLoRAError, AFLoRALinear, blame
from data.fetch import STAND_IN, model_folder
from data.text import WordPieceTokenizer, load_task, load_tokenizer
from data.weights import load_state, read_config


# ----------------------------------------------------------------------------------------- the BERT
ATTENTION = ("query", "key", "value", "attention_output")
FFN = ("intermediate", "output")


class Dropout(nn.Dropout):
    """Zeroes a share p. On CPUs one random number serves four elements; torch's own is slow."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.is_cuda:
            return super().forward(x)
        count = x.numel()
        bits = torch.empty(count // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        draws = bits.view(torch.int16)[:count].view(x.shape)
        keep = draws >= round(self.p * 2**16) - 2**15
        return x * (keep.to(x.dtype) / (1 - self.p))


class Block(nn.Module):
    """One transformer layer, post-norm: (N, T, hidden) -> (N, T, hidden)."""

    def __init__(self, config):
        super().__init__()
        hidden = config["hidden_size"]
        inner = config["intermediate_size"]
        eps = config.get("layer_norm_eps", 1e-12)
        self.heads = config["num_attention_heads"]
        self.drop = Dropout(config["hidden_dropout_prob"])
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.intermediate = nn.Linear(hidden, inner)
        self.output = nn.Linear(inner, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps)

    def forward(self, x, mask):
        y = self.attention_output(self.attention(x, mask))
        x = self.attention_norm(x + self.drop(y))
        y = self.output(F.gelu(self.intermediate(x)))
        return self.output_norm(x + self.drop(y))

    def attention(self, x, mask):
        """Every token looks at every real token: softmax(q k^T / sqrt(d)) v, head by head."""
        q = self.split_heads(self.query(x))
        k = self.split_heads(self.key(x))
        v = self.split_heads(self.value(x))
        mask = mask[:, None, None]  # (N, 1, 1, T)
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:  # written out: on CPUs the fused backward in bfloat16 takes twice the time
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            y = scores.softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)

    def split_heads(self, x):
        """(N, T, hidden) -> (N, heads, T, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Bert(nn.Module):
    """BERT's encoder: ids, segments, mask (N, T), mask true at real tokens -> (N, T, hidden)."""

    def __init__(self, config):
        super().__init__()
        hidden = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], hidden)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], hidden)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], hidden)
        self.embedding_norm = nn.LayerNorm(hidden, config.get("layer_norm_eps", 1e-12))
        self.dropout = Dropout(config["hidden_dropout_prob"])
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, ids, segments, mask):
        segments = segments.clamp(max=self.token_type_embeddings.num_embeddings - 1)  # some have 1
        x = self.word_embeddings(ids) + self.token_type_embeddings(segments)
        positions = self.position_embeddings.weight[:ids.shape[1]]
        x = self.embedding_norm(x + positions)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    @classmethod
    def load(cls, folder):
        """Bert with the config.json and weights (.safetensors or .bin) of a Hugging Face folder."""
        config = read_config(folder)
        with blame(Path(folder, "config.json")):
            model = cls(config)
        load_state(model, folder)
        return model


class BertClassifier(nn.Module):
    """ids, segments, mask (N, T) -> logits (N, classes): encoder, mean over real tokens, head."""

    def __init__(self, encoder, classes=2):
        super().__init__()
        self.encoder = encoder
        hidden = encoder.word_embeddings.embedding_dim
        p = encoder.dropout.p
        self.head = nn.Sequential(
            Dropout(p),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            Dropout(p),
            nn.Linear(hidden, classes),
        )

    def forward(self, ids, segments, mask):
        x = self.encoder(ids, segments, mask)
        mean = (mask / mask.sum(1, keepdim=True)).to(x.dtype)  # (N, T), zero at padding
        pooled = torch.bmm(mean[:, None], x)  # (N, 1, hidden)
        return self.head(pooled[:, 0])


def load_model(folder, seed, device):
    """(BertClassifier, tokenizer, folder) of a Hugging Face folder; None: the fetched MiniLM."""
    folder = Path(folder or model_folder())
    torch.manual_seed(seed)  # the head's start and dropout; the adapters have their own seeds
    model = BertClassifier(Bert.load(folder))
    tokenizer = load_tokenizer(folder)
    rows = model.encoder.word_embeddings.num_embeddings
    if len(tokenizer.vocab) != rows:
        raise AFLoRAError(f"{folder}: vocab.txt has {len(tokenizer.vocab)} tokens, weights {rows}")
    return model.to(device), tokenizer, str(folder)


# ---------------------------------------------------------------------------------------- the tasks
class Examples:
    """Token ids of all texts, end to end in flat tensors (padding last): a batch is one gather."""

    def __init__(self, rows, tokenizer: WordPieceTokenizer, max_length=128):
        encoded = [tokenizer.encode(text, pair, max_length) for text, pair, _ in rows]
        self.max_length = max_length
        self.lengths = torch.tensor([len(ids) for ids, _ in encoded])
        self.starts = self.lengths.cumsum(0) - self.lengths
        padding = tokenizer.vocab["[PAD]"]
        all_ids = [i for ids, _ in encoded for i in ids]
        all_segments = [i for _, segments in encoded for i in segments]
        self.ids = torch.tensor(all_ids + [padding])
        self.segments = torch.tensor(all_segments + [0])
        self.labels = torch.tensor([label for *_, label in rows])

    def collate(self, rows):
        """ids, segments, mask (N, T) and labels (N,) of these rows, padded to their longest.

        On CUDA to a multiple of 8 tokens: few shapes occur, each of which is recorded once.
        """
        longest = int(self.lengths[rows].max())
        if torch.cuda.is_available():
            longest = min(math.ceil(longest / 8) * 8, self.max_length)
        position = torch.arange(longest)
        mask = position < self.lengths[rows, None]
        index = torch.where(mask, self.starts[rows, None] + position, -1)
        return self.ids[index], self.segments[index], mask, self.labels[rows]

    def batches(self, size, seed, epoch):
        """All rows in random order, but of like length in a batch: cut from sorted pools of 50."""
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        groups = []
        for pool in torch.randperm(len(self.labels), generator=random).split(50 * size):
            groups += pool[self.lengths[pool].argsort(stable=True)].split(size)
        groups = [groups[i] for i in torch.randperm(len(groups), generator=random)]  # batches
        return torch.utils.data.DataLoader(groups, None, collate_fn=self.collate, generator=random)


def loss(model, batch):
    """Cross-entropy of a batch as Examples.collate makes it."""
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs).float(), labels)


@torch.no_grad()
def predict(model, examples, precision, size=128):
    """The predicted class of every example, (N,), in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    order = examples.lengths.argsort(stable=True)
    dtype = aflora.COMPUTE_TYPES[precision]
    with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
        logits = []
        for rows in order.split(size):
            *inputs, _ = examples.collate(rows)
            logits.append(model(*aflora.to_device(inputs, device)))
    predicted = torch.cat(logits).argmax(1).cpu()
    return predicted[order.argsort()]  # in the order of the examples


def metrics(predicted, labels):
    """Accuracy and F1 of class 1, both in per cent."""
    accuracy = (predicted == labels).float().mean().item()
    both = int((predicted & labels).sum())
    either = int((predicted + labels).sum())  # those in both twice
    return dict(accuracy=100 * accuracy, f1=200 * both / max(either, 1))


# --------------------------------------------------------------- the methods to compare AFLoRA with
class ELoRALinear(AFLoRALinear):
    """At a high rank with frozen matrices, to scale activations is cheaper than to fold vectors."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        y = self.base(tokens)
        h = F.linear(tokens, self.lora_A.to(x.dtype)).to(y.dtype)
        h = h * self.s_d.to(y.dtype)
        wide = F.linear(h, self.lora_B.to(y.dtype))
        y = y + wide * self.s_b.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def as_lora(layers, alpha=16):
    """Turns AFLoRA's layers into LoRA's: A smaller by sqrt(6), B = 0, scaled by alpha / rank."""
    for layer in layers.values():
        layer.lora_A.div_(6**0.5)
        layer.lora_B.zero_()
        layer.s_d.fill_(alpha / len(layer.s_d))
        layer.s_b.fill_(1)
        layer.s_d.requires_grad_(False)
        layer.s_b.requires_grad_(False)


def as_elora(layers):
    """Turns AFLoRA's layers into ELoRA's: one frozen pair A, B a shape; the vectors train."""
    pairs = {}
    for layer in layers.values():
        shape = (layer.base.out_features, layer.base.in_features)
        seed, _, _ = layer.key.partition("/")
        layer.key = f"{seed}/{shape}"
        layer.__class__ = ELoRALinear
        first = pairs.setdefault(shape, layer)
        layer.lora_A = first.lora_A
        layer.lora_B = first.lora_B
        for name in ("lora_A", "lora_B"):
            matrix = getattr(layer, name)
            if first is layer:
                matrix.data.copy_(aflora.kaiming_uniform(f"{layer.key}/{name}", matrix.shape))
            matrix.requires_grad_(False)


def hold_frozen_weights(encoder, precision):
    """Holds the linear weights in the compute type: autocast would cast them anew at each use."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(aflora.COMPUTE_TYPES[precision])


def adapt(model, method, recipe, seed, train_matrices):
    """Adds to a classifier what the method trains, beside its head. {name: AFLoRALinear}."""
    if method in ("full", "head"):
        saved = ["head", "encoder"] if method == "full" else ["head"]
        return aflora.add_adapters(model, (), modules_to_save=saved)
    groups = {"ffn": FFN, "attention": ATTENTION, "all": "all", "none": ()}
    trained = groups[train_matrices] if method == "aflora" else "all"
    layers = aflora.add_adapters(
        model, ATTENTION + FFN, recipe["rank"], trained, modules_to_save=["head"], seed=seed)
    if method == "lora":
        as_lora(layers)
    if method == "elora":
        as_elora(layers)
    return layers


# ------------------------------------------------------------------------------------- the recipes
# limit: how many of the task's rows are drawn; t_i, t_f: shares of the steps. A method's rate goes
# before a recipe's, a flag before both. full has the paper's rows, t_i, t_f and, on SST-2, epochs
# and batch; on MRPC the paper, with a model eight times this one, takes 20 epochs, batch 64, lr
# 1e-2. Its head_lr is 4e-3 (SST-2) and 8e-2 (MRPC). Always: weight decay 0.01 of matrices, clip 1,
# warm-up 6 % (the paper: 0.1, 0.1, 6 %).
RECIPES = {
    ("quick", "sst2"): dict(
        limit=6000, epochs=3, batch_size=32, t_i=0.1, t_f=0.4, lr=4e-3, head_lr=2e-3),
    ("quick", "mrpc"): dict(
        limit=None, epochs=2, batch_size=16, t_i=0.1, t_f=0.4, lr=1.4e-2, head_lr=2e-3),
    ("full", "sst2"): dict(
        limit=None, epochs=10, batch_size=64, t_i=0.1, t_f=0.7, lr=4e-3, head_lr=2e-3),
    ("full", "mrpc"): dict(
        limit=None, epochs=8, batch_size=32, t_i=0.125, t_f=0.7, lr=4e-3, head_lr=1e-3),
}
METHODS = {
    "aflora": dict(rank=4),
    "lora": dict(rank=8, lr=1e-3),
    "elora": dict(rank=1024, lr=1e-2),
    "full": dict(rank=0, lr=1e-4, head_lr=1e-4),
    "head": dict(rank=0, lr=2e-3, head_lr=2e-3),
}
VERSIONS = {
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "numpy": np.__version__,
}


def choose_recipe(name, args, device):
    """The preset's recipe for the task, with what the method and the flags say."""
    preset = args.preset
    if preset == "auto":
        preset = "full" if device.type == "cuda" else "quick"
    recipe = RECIPES[preset, name] | METHODS[args.method]
    recipe |= {key: value for key, value in vars(args).items() if key in recipe}
    for key in ("limit", "epochs", "batch_size"):
        if recipe[key] is not None and recipe[key] < 1:
            raise AFLoRAError(f"--{key.replace('_', '-')} is {recipe[key]}: give at least 1")
    t_i = recipe["t_i"]
    t_f = recipe["t_f"]
    if min(t_i, t_f) < 0 or not t_i + t_f <= 1:
        raise AFLoRAError("--t-i and --t-f are shares of the steps: from 0, together at most 1")
    return preset, recipe


def choose_precision(amp, device):
    """bf16 where the device computes in it natively, else fp16 on CUDA (a T4), else fp32."""
    if amp == "fp16" and device.type != "cuda":
        raise AFLoRAError("--amp fp16 needs a CUDA device: on a CPU choose bf16 or off")
    if amp != "auto":
        return "fp32" if amp == "off" else amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else "fp32"


def prepare(name, args, task, device, precision):
    """All that a run needs, from its flags: recipe -> examples -> adapted model -> freezer."""
    preset, recipe = choose_recipe(name, args, device)
    model, tokenizer, weights = load_model(args.model, args.seed, device)
    longest = min(128, model.encoder.position_embeddings.num_embeddings)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(args.seed))
    train = Examples([task.train[i] for i in order[:recipe["limit"]]], tokenizer, longest)
    dev = Examples(task.dev, tokenizer, longest)
    checksums = dict(
        weights=checksum(model.encoder.state_dict().values()),
        texts=checksum([train.ids, train.labels, dev.ids, dev.labels]),
    )

    plain = predict(model, dev, precision)
    if args.method != "full":
        hold_frozen_weights(model.encoder, precision)
    layers = adapt(model, args.method, recipe, args.seed, args.train_matrices)
    wrapped = predict(model, dev, precision)
    before = metrics(plain, dev.labels)["accuracy"]
    after = metrics(wrapped, dev.labels)["accuracy"]
    equal = "equal" if plain.equal(wrapped) else "NOT EQUAL"
    print(f"weights from {weights}")
    print(f"dev accuracy before training: {before:.2f} plain, {after:.2f} with adapters ({equal})")

    total_steps = recipe["epochs"] * math.ceil(len(train.labels) / recipe["batch_size"])
    t_i = round(recipe["t_i"] * total_steps)
    t_f = min(round(recipe["t_f"] * total_steps), total_steps - t_i)
    freezer = None
    if args.method == "aflora" and args.train_matrices != "none":
        freezer = aflora.AdaptiveFreezer(layers, total_steps, t_i, t_f, kind=args.sensitivity)
    return types.SimpleNamespace(
        name=name,
        args=args,
        task=task,
        preset=preset,
        recipe=recipe,
        model=model,
        weights=weights,
        train=train,
        dev=dev,
        layers=layers,
        freezer=freezer,
        total_steps=total_steps,
        ramp=(t_i, total_steps - t_f),
        device=device,
        precision=precision,
        checksums=checksums,
        trainable_start=trainable(model.encoder),
    )


def checksum(tensors):
    """One sha256 of several tensors' values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def trainable(module):
    """How many values of a module train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------ the run
class Stopped(Exception):
    """A signal asked the run to stop; its checkpoint is written."""


class Run:
    """What happens beside the steps of one run: its folder, evaluation, checkpoints, signals."""

    def __init__(self, experiment, out):
        self.experiment = experiment
        self.out = out
        self.flags = vars(experiment.args) | dict(task=experiment.name)
        self.caught = []  # signals
        self.predicted = None  # of dev, after the last epoch
        self.seconds = 0.0  # of training, without evaluation
        self.lines = []  # of the log; those that end an epoch have accuracy and f1
        self.resumed = bool(experiment.args.resume)
        self.started = False
        self.check_folder()

    def check_folder(self):
        """Raises AFLoRAError, with nothing touched, if this run cannot start, or go on, there."""
        checkpoint = self.out / "checkpoint.pt"
        if self.resumed:
            with blame(checkpoint):
                there = json.loads((self.out / "run.json").read_text())
                aflora.expect_equal(there["checksums"], self.experiment.checksums)
                self.lines = self.logged()
        elif checkpoint.exists():
            raise AFLoRAError(f"{checkpoint} is of a stopped run: --resume it, or remove it")

    def logged(self):
        """The lines of the log; one that was cut as the run died is left out."""
        *whole_lines, _ = (self.out / "log.jsonl").read_text().split("\n")
        return [json.loads(line) for line in whole_lines]

    def history(self):
        """What is reported of each epoch's end."""
        keys = ("epoch", "step", "loss", "accuracy", "f1")
        return [{key: line[key] for key in keys} for line in self.lines if "f1" in line]

    def train(self):
        """Trains to the end, or to a signal."""
        e = self.experiment
        handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        self.clock = time.perf_counter()
        try:
            return aflora.train(
                e.model,
                lambda epoch: e.train.batches(e.recipe["batch_size"], e.args.seed, epoch),
                loss,
                epochs=e.recipe["epochs"],
                lr=e.recipe["lr"],
                head_lr=e.recipe["head_lr"],
                weight_decay=0.01,
                freezer=e.freezer,
                precision=e.precision,
                graphs=e.device.type == "cuda",
                after_step=self.after_step,
                resume=self.out / "checkpoint.pt" if self.resumed else None,
            )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        """The step is finished first, unless asked twice."""
        if self.caught:
            raise KeyboardInterrupt
        self.caught.append(number)

    def after_step(self, training):
        """Logs, evaluates at an epoch's end, and writes a checkpoint where one is due."""
        if not self.started:
            self.start(training)
        now = time.perf_counter()
        self.seconds += now - self.clock
        epoch_ends = training.steps % training.steps_per_epoch == 0
        if training.line["step"] == training.steps:
            line = training.line | dict(seconds=self.seconds)
            if epoch_ends:
                line |= self.evaluate(training.model)
            self.log(line)
        every = self.experiment.args.checkpoint_every
        due = every and training.steps % every == 0
        if epoch_ends or self.caught or due:
            aflora.save_checkpoint(training, self.out / "checkpoint.pt")
        if self.caught:
            raise Stopped
        self.clock = time.perf_counter()

    def evaluate(self, model):
        """Accuracy and F1 on dev."""
        self.predicted = predict(model, self.experiment.dev, self.experiment.precision)
        return metrics(self.predicted, self.experiment.dev.labels)

    def log(self, line):
        """Appends a line to the log, and shows the end of an epoch."""
        self.lines.append(line)
        path = self.out / "log.jsonl"
        with blame(path), open(path, "a") as log:
            log.write(json.dumps(line) + "\n")
        if "f1" in line:
            shown = self.history()[-1].items()
            tqdm.write("  ".join(f"{key} {value:.4g}" for key, value in shown))

    def start(self, training):
        """Makes the folder this run's. Only now, behind the first step: nothing was refused."""
        self.started = True
        # Lines behind the checkpoint are made again
        self.lines = [line for line in self.lines if line["step"] < training.steps]
        self.seconds = self.lines[-1]["seconds"] if self.lines else 0.0
        if len(self.history()) != (training.steps - 1) // training.steps_per_epoch:
            raise AFLoRAError(f"{self.out}: log.jsonl lacks epochs that the checkpoint has passed")
        for name in ("adapter.pt", "result.json", "freeze_map.txt", "*.part"):
            for path in self.out.glob(name):
                path.unlink()
        content = dict(flags=self.flags, checksums=self.experiment.checksums)
        aflora.write_file(self.out / "run.json", json.dumps(content).encode())
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        aflora.write_file(self.out / "log.jsonl", text.encode())


def run_task(name, task, args, device, precision):
    """Trains one task as the flags say, prints the report and leaves the run's folder."""
    preset, recipe = choose_recipe(name, args, device)
    rows = len(task.train)
    print(f"\n{task.title}: {rows} rows to train on, {len(task.dev)} dev, {task.source}")
    unused = {
        "aflora": (),
        "lora": ("t_i", "t_f"),
        "elora": ("t_i", "t_f"),
        "full": ("t_i", "t_f", "rank"),
        "head": ("t_i", "t_f", "rank"),
    }[args.method]
    used = [f"{key} {value}" for key, value in recipe.items() if key not in unused]
    print(f"{args.method}, {preset}:", ", ".join(used))
    out = Path(args.out or "runs")
    if args.task == "both" or not args.out:
        out = out / f"{name}-{args.method}-s{args.seed}"
    if args.resume:
        out = Path(args.resume)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    experiment = prepare(name, args, task, device, precision)
    run = Run(experiment, out)
    try:
        training = run.train()
    except Stopped:
        aflora.save_adapter(experiment.model, out / "adapter.pt")
        print(f"\nstopped; what was learned so far is in {out / 'adapter.pt'}; to go on: "
              f"python train_glue_small.py --resume {out}")
        raise SystemExit(128 + run.caught[0])  # 130 for Ctrl-C, 143 for SIGTERM
    aflora.save_adapter(experiment.model, out / "adapter.pt")
    result = make_result(run, training)
    aflora.write_file(out / "result.json", json.dumps(result, indent=1).encode())
    print_result(run, result)
    check_merged(run)
    for name in ("checkpoint.pt", "run.json"):
        (out / name).unlink()


def make_result(run, training):
    """The fields of result.json."""
    e = run.experiment
    history = run.history()
    last = history[-1]
    best = max(history, key=lambda epoch: epoch["accuracy"])
    start = e.trainable_start
    pairs = e.name == "mrpc"  # SST-2 is scored by accuracy alone
    return e.recipe | dict(
        task=e.name,
        method=e.args.method,
        preset=e.preset,
        seed=e.args.seed,
        sensitivity=e.args.sensitivity,
        train_matrices=e.args.train_matrices,
        data=f"{e.task.title}: {e.task.source}",
        weights=e.weights,
        accuracy=last["accuracy"],
        f1=last["f1"] if pairs else None,
        best_epoch=best["epoch"],
        best_accuracy=best["accuracy"],
        best_f1=best["f1"] if pairs else None,
        frozen_at=e.freezer.frozen_at if e.freezer else {},
        trainable_start=start,
        trainable_end=trainable(e.model.encoder),
        trainable_average=e.freezer.average_trainable() if e.freezer else start,
        head_parameters=trainable(e.model.head),
        history=history,
        steps=training.steps,
        skipped=run.lines[-1]["skipped"],
        seconds=run.lines[-1]["seconds"],
        ms_per_step=1000 * run.lines[-1]["seconds"] / training.steps,
        peak_memory_bytes=peak_memory(e.device),
        device="cpu" if e.device.type == "cpu" else torch.cuda.get_device_name(),
        precision=e.precision,
        versions=VERSIONS,
    )


SCORES = dict(sst2="accuracy {accuracy:.2f}", mrpc="accuracy {accuracy:.2f}, F1 {f1:.2f}")
REPORT = """
{title}, last epoch: {last} (best, {best_epoch}: {best})
trainable parameters: {trainable_start:,} at the start, {trainable_end:,} at the end, \
{trainable_average:,.0f} on average; head: {head_parameters:,}
{seconds:.0f} s of training, {ms_per_step:.0f} ms a step, peak memory {mebibytes:.0f} MiB"""


def print_result(run, result):
    """The report: scores, parameters, time and memory, and the freeze map."""
    e = run.experiment
    best = dict(accuracy=result["best_accuracy"], f1=result["best_f1"])
    print(REPORT.format(
        title=e.task.title,
        last=SCORES[e.name].format(**result),
        best=SCORES[e.name].format(**best),
        mebibytes=result["peak_memory_bytes"] / 2**20,
        **result,
    ))
    if e.freezer:
        picture = freeze_map(e.model, e.freezer.frozen_at, *e.ramp)
        aflora.write_file(run.out / "freeze_map.txt", picture.encode())
        print(picture)


def check_merged(run):
    """Loads the adapter file into a fresh float32 model, merges it there, and scores that."""
    e = run.experiment
    apart = run.predicted
    if apart is None:  # resumed behind the last epoch
        apart = predict(e.model, e.dev, e.precision)
    fresh, _, _ = load_model(e.args.model, e.args.seed, e.device)
    aflora.load_adapter(fresh, run.out / "adapter.pt")
    aflora.merge_adapters(fresh)
    merged = predict(fresh, e.dev, e.precision)
    scores = SCORES[e.name].format(**metrics(merged, e.dev.labels))
    changed = int((apart != merged).sum())
    print(f"merged into the weights: {scores}; rounding changed {changed} of {len(merged)} "
          "predictions")
    print(f"{e.task.title}: adapter, log and result are in {run.out}")


def freeze_map(model, frozen_at, first, last):
    """Matrices x layers as text: a shade for the step, from `first` to `last`, when each froze."""
    shades = "░▒▓█"
    edges = [round(first + (last - first) * i / 4) for i in range(5)]
    marks = {name: "+" if p.requires_grad else "·" for name, p in model.named_parameters()}
    for name, step in frozen_at.items():
        quarter = sum(step >= edge for edge in edges[1:4])
        marks[name] = shades[quarter]
    layers = range(len(model.encoder.layers))
    lines = ["freeze map: matrix \\ layer" + "".join(f"{i:3}" for i in layers)]
    for module in ATTENTION + FFN:
        for matrix in "AB":
            cells = [marks[f"encoder.layers.{i}.{module}.lora_{matrix}"] for i in layers]
            title = f"{module}.{matrix}"
            lines.append(f"{title:>26}  " + "  ".join(cells))
    spans = [f"{shade} {a}-{b}" for shade, a, b in zip(shades, edges, edges[1:])]
    spans += ["  · never trained", "  + never frozen"]
    lines.append("frozen after step: " + "  ".join(spans))
    return "\n".join(lines)


def peak_memory(device):
    """Bytes: the most that torch allocated on CUDA; on a CPU the whole process at its largest."""
    if device.type == "cuda" or sys.platform == "win32":  # 0, unknown, on a CPU under Windows
        return torch.cuda.max_memory_allocated(device)
    from resource import RUSAGE_SELF, getrusage
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --------------------------------------------------------------------------------- the command line
def make_parser():
    """The flags, see --help. Those of a recipe are absent where they are not given."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a small BERT on SST-2 and MRPC with AFLoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"Recipes: {RECIPES} {METHODS}")
    flag = parser.add_argument
    flag("--task", default="both", choices=("sst2", "mrpc", "both"), help="the data to train on")
    flag("--method", default="aflora", choices=tuple(METHODS), help="what trains")
    flag("--preset", default="auto", choices=("auto", "quick", "full"), help="auto: full on CUDA")
    flag("--sensitivity", default="gradient-weight",
         choices=("gradient-weight", "gradient", "weight"), help="equation (2) of the score")
    flag("--train-matrices", default="ffn", choices=("ffn", "attention", "all", "none"),
         help="whose A and B train until they freeze (aflora)")
    flag("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
         help="mixed precision; auto: bf16 where it is native, else fp16 on CUDA, off on a CPU")
    flag("--seed", default=0, type=int, help="of data order, head, dropout and random matrices")
    flag("--model", help="folder: config.json, vocab.txt, weights; %(default)s: MiniLM-L6-H384")
    flag("--data", default=os.environ.get("AFLORA_DATA"), help="folder of texts; else fetched")
    flag("--out", help="folder of the run; %(default)s: runs/TASK-METHOD-sSEED")
    flag("--checkpoint-every", default=100, type=int, help="steps; besides one after each epoch")
    flag("--resume", metavar="FOLDER", help="of a stopped run: goes on, with the flags it had")
    of_recipe = [
        ("rank", int, "r of the adapters"),
        ("epochs", int, "passes over the training rows"),
        ("batch-size", int, "rows a step"),
        ("limit", int, "training rows, drawn at random"),
        ("lr", float, "peak learning rate"),
        ("head-lr", float, "the head's"),
        ("t-i", float, "share of steps before freezing"),
        ("t-f", float, "share after it"),
    ]
    for name, kind, what in of_recipe:
        flag(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{what} (default: recipe's)")
    return parser


def parse(argv=None):
    """The flags; with --resume those of the stopped run. Raises AFLoRAError where one differs."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        path = Path(args.resume, "run.json")
        with blame(f"{path} (is {args.resume} the folder of a stopped run?)"):
            there = json.loads(path.read_text())["flags"] | dict(resume=args.resume)
        parser.set_defaults(**there)
        args = parser.parse_args(argv)
        aflora.expect_equal(there, vars(args))
    if not 0 <= args.seed < 2**32 or args.checkpoint_every < 0:
        raise AFLoRAError("--seed goes from 0 to 2**32 - 1, --checkpoint-every from 0 on")
    return args


def load_tasks(args):
    """({name: task}, notes): those that can be had; the notes say what is missing or stands in."""
    tasks = {}
    notes = []
    for name in ("sst2", "mrpc") if args.task == "both" else (args.task,):
        try:
            tasks[name] = load_task(name, args.data)
            if tasks[name].title == STAND_IN:
                notes.append(f"NOT SST-2: {STAND_IN}")
        except ConnectionError as error:
            notes.append(f"{name} is skipped: {error}")
    if not tasks:
        raise ConnectionError("; ".join(notes))
    return tasks, notes


def format_warning(message, *_):
    """Without path and source line."""
    return f"warning: {message}\n"


def main(argv=None):
    """The command line, see --help. Returns 0, or 2 after an error that the user can mend."""
    if hasattr(sys.stdout, "reconfigure"):  # where a terminal lacks the shades of the freeze map
        sys.stdout.reconfigure(errors="replace")
    warnings.formatwarning = format_warning
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        args = parse(argv)
        precision = choose_precision(args.amp, device)
        tasks, notes = load_tasks(args)
        versions = ", ".join(f"{package} {version}" for package, version in VERSIONS.items())
        threads = torch.get_num_threads()
        print(*notes, sep="\n", end="\n" if notes else "")
        print(f"{versions}, device {device}, {threads} threads, precision {precision}, "
              f"seed {args.seed}")
        for name, task in tasks.items():
            run_task(name, task, args, device, precision)
        print(*notes, sep="\n", end="\n" if notes else "")
    except (AFLoRAError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
