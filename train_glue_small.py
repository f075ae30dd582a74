"""Fine-tunes a small BERT on SST-2 and MRPC with AFLoRA: the companion of aflora.py, and its proof.

    python train_glue_small.py                       both tasks, AFLoRA; minutes on a CPU
    python train_glue_small.py --preset full         all rows, more epochs; the default on CUDA
    python train_glue_small.py --resume runs/mrpc-aflora-s0     continue a run that was stopped
    python train_glue_small.py --help                every flag

Text -> token ids -> batches of like length -> BERT with adapters -> loss -> train() of aflora.py ->
report. Weights and texts come from data/fetch.py, the methods to compare with from data/methods.py.
A run leaves a folder with adapter.pt, log.jsonl (a line for each logged step), result.json and, of
AFLoRA, freeze_map.txt.
"""

import argparse
import bisect
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import aflora
from aflora import AFLoRAError, blame
from data.batches import Examples
from data.fetch import model_folder
from data.methods import as_elora, as_lora
from data.script import status_of
from data.text import load_tasks, load_tokenizer
from data.weights import load_state, read_config


# ----------------------------------------------------------------------------------------- the BERT
ATTENTION = ("query", "key", "value", "attention_output")
FFN = ("intermediate", "output")


class Dropout(nn.Dropout):
    """Zeroes a share p. On CPUs, where torch's own is slow, one random number serves 4 elements."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.is_cuda:
            return super().forward(x)
        count = x.numel()
        bits = torch.empty(count // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        draws = bits.view(torch.int16)[:count].view(x.shape)
        # An int16 is uniform in +-2^15: a share p of them lies below p 2^16 - 2^15
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
        """Every token looks at every real token: softmax(q k^T / sqrt(d)) v, head by head.

        Without Hugging Face's dropout of the softmax.
        """
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
        # Not by torch.bmm: on CUDA its backward needs a C compiler, from torch 2.13 on
        total = (x * mask[:, :, None]).sum(1)  # (N, hidden), nothing of the padding
        return self.head(total / mask.sum(1, keepdim=True))


def load_model(folder, seed, device):
    """(BertClassifier, tokenizer, folder) of a Hugging Face folder; None: of model_folder()."""
    folder = Path(folder or model_folder())
    torch.manual_seed(seed)  # for the head's start and dropout; the adapters have their own seeds
    model = BertClassifier(Bert.load(folder))
    tokenizer = load_tokenizer(folder)
    rows = model.encoder.word_embeddings.num_embeddings
    if len(tokenizer.vocab) != rows:
        raise AFLoRAError(f"{folder}: vocab.txt or tokenizer.json has {len(tokenizer.vocab)} "
                          f"tokens, weights {rows}")
    return model.to(device), tokenizer, str(folder)


# --------------------------------------------------------------------------------- loss and metrics
def loss(model, batch):
    """Cross-entropy of a batch as Examples.collate() makes it."""
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs).float(), labels)


@torch.no_grad()
def predict(model, examples, precision, size=128):
    """The predicted class of every example, (N,), in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    predicted = torch.empty_like(examples.labels)
    with aflora.autocast(device, precision):
        for rows in examples.lengths.argsort(stable=True).split(size):
            *inputs, _ = examples.collate(rows)
            logits = model(*aflora.to_device(inputs, device))
            predicted[rows] = logits.argmax(1).cpu()
    return predicted


def metrics(predicted, labels):
    """Accuracy and F1 of class 1, both in per cent."""
    accuracy = (predicted == labels).float().mean().item()
    both = int((predicted & labels).sum())
    positives = int((predicted + labels).sum())  # among the predictions plus among the labels
    return dict(accuracy=100 * accuracy, f1=200 * both / max(positives, 1))


# ------------------------------------------------------------------------------------- what trains
def hold_frozen_weights(encoder, precision):
    """Holds the linear weights in the compute type: autocast would cast them anew at each use."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(aflora.COMPUTE_TYPES[precision])


def adapt(model, args, recipe):
    """Adds to a classifier what the method trains besides the head. Gives {name: AFLoRALinear}."""
    if args.method in ("full", "head"):
        layers = aflora.add_adapters(model, (), modules_to_save=["head"])
        model.encoder.requires_grad_(args.method == "full")
        return layers
    groups = {"ffn": FFN, "attention": ATTENTION, "all": "all", "none": ()}
    trained = groups.get(recipe["train_matrices"], "all")  # LoRA trains all; as_elora() freezes all
    layers = aflora.add_adapters(
        model, ATTENTION + FFN, recipe["rank"], trained, modules_to_save=["head"], seed=args.seed)
    if args.method == "lora":
        as_lora(layers)
    if args.method == "elora":
        as_elora(layers)
    return layers


# ------------------------------------------------------------------------------------- the recipes
# limit: training rows to draw, None: all. t_i, t_f: shares of all steps. METHODS override recipes,
# flags override both. full has the paper's rows, rank, t_i, t_f and, on SST-2, lr, epochs and
# batch; on MRPC the paper takes lr 1e-2, 20 epochs and batch 64. Its model is eight times as large,
# its head_lr 4e-3 (SST-2) and 8e-2 (MRPC). On MRPC the few steps of quick need a higher rank.
# Always: weight decay 0.01 for matrices, clip 1, warm-up 6 % (the paper: 0.1, 0.1, 6 %).
RECIPES = {
    ("quick", "sst2"): dict(
        limit=6000, epochs=3, batch_size=32, t_i=0.1, t_f=0.4, lr=4e-3, head_lr=2e-3, rank=4),
    ("quick", "mrpc"): dict(
        limit=None, epochs=2, batch_size=16, t_i=0.1, t_f=0.4, lr=1e-2, head_lr=2e-3, rank=16),
    ("full", "sst2"): dict(
        limit=None, epochs=10, batch_size=64, t_i=0.1, t_f=0.7, lr=4e-3, head_lr=2e-3, rank=4),
    ("full", "mrpc"): dict(
        limit=None, epochs=8, batch_size=32, t_i=0.125, t_f=0.7, lr=4e-3, head_lr=1e-3, rank=4),
}
NO_FREEZING = dict(t_i=None, t_f=None, sensitivity=None)
NO_AFLORA = NO_FREEZING | dict(train_matrices=None)
METHODS = {  # None: what the method does not use
    "aflora": dict(train_matrices="ffn", sensitivity="gradient-weight"),
    "lora": dict(rank=8, lr=1e-3) | NO_AFLORA,
    "elora": dict(rank=1024, lr=1e-2) | NO_AFLORA,
    "full": dict(rank=None, lr=1e-4, head_lr=1e-4) | NO_AFLORA,
    "head": dict(rank=None, lr=2e-3, head_lr=None) | NO_AFLORA,
}
VERSIONS = {
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "numpy": np.__version__,
}


def choose_recipe(name, args, device):
    """(preset, its recipe for the task, changed as the method and the flags say)."""
    preset = args.preset
    if preset == "auto":
        preset = "full" if device.type == "cuda" else "quick"
    method = METHODS[args.method]
    if getattr(args, "train_matrices", None) == "none":  # then nothing freezes, either
        method = method | NO_FREEZING
    recipe = RECIPES[preset, name] | method
    for key in recipe.keys() & vars(args):
        if key in method and method[key] is None:
            raise AFLoRAError(f"{flag_of(key)} would change nothing in this run: leave it out")
        recipe[key] = getattr(args, key)
    for key in ("limit", "epochs", "batch_size"):
        if recipe[key] is not None:
            aflora.whole(flag_of(key), recipe[key], 1)
    return preset, recipe


def flag_of(key):
    """The command line's name of a recipe's key: t_i is --t-i."""
    return "--" + key.replace("_", "-")


def choose_precision(amp, device):
    """bf16 where the device computes in it natively, else fp16 on CUDA (a T4), else fp32."""
    if amp == "fp16" and device.type != "cuda":
        raise AFLoRAError("--amp fp16 needs a CUDA device: on a CPU choose bf16 or off")
    if amp != "auto":
        return "fp32" if amp == "off" else amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else "fp32"


def checksum(tensors):
    """One sha256 over the values of several tensors."""
    return aflora.checksum(torch.cat([tensor.cpu().float().flatten() for tensor in tensors]))


def trainable(module):
    """The number of a module's trainable values."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------ the run
def run_folder(name, args):
    """The folder of a task's run. AFLoRAError if a new run would overwrite a stopped one."""
    if args.resume:
        return Path(args.resume).expanduser()
    folder = Path(args.out or "runs").expanduser()
    if args.task == "both" or not args.out:
        folder = folder / f"{name}-{args.method}-s{args.seed}"
    if (folder / "checkpoint.pt").exists():
        raise AFLoRAError(f"{folder}/checkpoint.pt is of a stopped run: --resume it, or remove it")
    return folder


class Run:
    """One run, as its flags describe it: what it needs, and what happens around its steps."""

    def __init__(self, name, args, task, device, precision):
        self.name = name
        self.args = args
        self.task = task
        self.device = device
        self.precision = precision
        self.preset, self.recipe = choose_recipe(name, args, device)
        self.out = run_folder(name, args)
        self.signals = []  # those that were caught
        self.started = False  # true once the first step is done: then the folder is this run's
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            # cuDNN's attention would plan anew for each length of text
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.introduce()
        self.prepare()

    def introduce(self):
        """Prints what is going to be trained, and how."""
        task = self.task
        used = [f"{key} {value}" for key, value in self.recipe.items() if value is not None]
        print(f"\n{task.title}: {len(task.train)} rows to train on, {len(task.dev)} dev, "
              f"{task.source}")
        print(f"{self.args.method}, {self.preset}:", ", ".join(used))
        if (self.out / "result.json").exists():
            print(f"this run replaces the finished one in {self.out}; to keep it choose --out")

    def prepare(self):
        """Makes everything the training needs: model, examples, adapters, freezer."""
        args = self.args
        task = self.task
        model, tokenizer, self.weights = load_model(args.model, args.seed, self.device)
        longest = min(128, model.encoder.position_embeddings.num_embeddings)
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(args.seed))
        rows = [task.train[i] for i in order[:self.recipe["limit"]]]
        train = Examples(rows, tokenizer, longest)
        dev = Examples(task.dev, tokenizer, longest)
        self.checksums = dict(
            weights=checksum(model.encoder.state_dict().values()),
            texts=checksum([train.ids, train.labels, dev.ids, dev.labels]),
        )
        self.model = model
        self.train_set = train
        self.dev_set = dev
        self.layers = self.add_adapters()
        self.trainable_start = trainable(model.encoder)
        self.total_steps = self.recipe["epochs"] * len(self.batches(0))
        self.freezer = self.make_freezer()

    def add_adapters(self):
        """Adds the adapters and shows that no prediction changes, which also warms up CUDA."""
        plain = self.predict_dev()
        if self.args.method != "full":
            hold_frozen_weights(self.model.encoder, self.precision)
        layers = adapt(self.model, self.args, self.recipe)
        wrapped = self.predict_dev()
        before = metrics(plain, self.dev_set.labels)["accuracy"]
        after = metrics(wrapped, self.dev_set.labels)["accuracy"]
        equal = "equal" if plain.equal(wrapped) else "NOT EQUAL"
        print(f"weights from {self.weights}")
        print(f"dev accuracy before training: {before:.2f} plain, {after:.2f} with adapters "
              f"({equal})")
        return layers

    def make_freezer(self):
        """AFLoRA's freezer, with t_i and t_f in steps; None if there is no A or B to freeze."""
        if self.recipe["t_i"] is None:
            return None
        T = self.total_steps
        with blame("--t-i and --t-f are shares of the steps"):
            t_i = round(self.recipe["t_i"] * T)
            t_f = round(self.recipe["t_f"] * T)
            if self.recipe["t_i"] + self.recipe["t_f"] <= 1:  # both rounded up, they might not fit
                t_f = min(t_f, T - t_i)
            return aflora.AdaptiveFreezer(self.layers, T, t_i, t_f, kind=self.recipe["sensitivity"])

    def predict_dev(self):
        """The predicted classes of dev, (N,)."""
        return predict(self.model, self.dev_set, self.precision)

    def train(self):
        """Trains to the end and reports, unless a signal stops it."""
        if self.args.resume:
            with blame(self.out):  # start() kept them beside the flags, parse() read them back
                aflora.expect_equal(self.args.checksums, self.checksums)
        handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        self.clock = time.perf_counter()  # restarted after each step: evaluation does not count
        try:
            training = aflora.train(
                self.model,
                self.batches,
                loss,
                epochs=self.recipe["epochs"],
                lr=self.recipe["lr"],
                head_lr=self.recipe["head_lr"],
                weight_decay=0.01,
                freezer=self.freezer,
                precision=self.precision,
                graphs=self.device.type == "cuda",
                after_step=self.after_step,
                resume=self.out / "checkpoint.pt" if self.args.resume else None,
            )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.signals:  # one came after the last step
            raise KeyboardInterrupt
        self.report(training)

    def batches(self, epoch):
        """The batches of an epoch."""
        return self.train_set.batches(self.recipe["batch_size"], self.args.seed, epoch)

    def on_signal(self, number, frame):
        """Lets the step finish first; a second signal stops the run at once."""
        if self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)

    def after_step(self, training):
        """Logs, evaluates at an epoch's end, and writes a checkpoint when one is due."""
        if not self.started:
            self.start(training.notes)
        training.notes["seconds"] += time.perf_counter() - self.clock
        epoch_ends = training.steps % training.steps_per_epoch == 0
        if training.line["step"] == training.steps:
            line = training.line | dict(seconds=training.notes["seconds"])
            if epoch_ends:
                line |= metrics(self.predict_dev(), self.dev_set.labels)
                tqdm.write(EPOCH.format(**line))
            training.notes["log"].append(line)
            with blame(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        every = self.args.checkpoint_every
        signals = list(self.signals)  # one that comes later waits for the next step
        if epoch_ends or signals or (every and training.steps % every == 0):
            aflora.save_checkpoint(training, self.out / "checkpoint.pt")
        if signals:
            self.save_adapter()
            print(f"\nstopped; what was learned so far is in {self.out / 'adapter.pt'}; to go on: "
                  f"the same command, for this task alone, with --resume {self.out}")
            raise SystemExit(128 + signals[0])  # 130 for Ctrl-C, 143 for SIGTERM
        self.clock = time.perf_counter()

    def start(self, notes):
        """Makes the folder this run's, after the first step, when nothing can be refused any more.

        notes: those of the checkpoint it continues from, or empty; the next checkpoints keep them.
        """
        self.started = True
        notes.setdefault("log", [])
        notes.setdefault("seconds", 0.0)  # of training, without evaluation
        notes["flags"] = vars(self.args) | dict(task=self.name, checksums=self.checksums)
        for name in ("adapter.pt", "result.json", "freeze_map.txt", "*.????????.part"):
            for path in self.out.glob(name):
                path.unlink()
        # The old log may reach beyond the checkpoint: the steps after it are made again
        text = "".join(json.dumps(line) + "\n" for line in notes["log"])
        aflora.write_file(self.out / "log.jsonl", text.encode())

    def save_adapter(self):
        """Writes what was learned."""
        aflora.save_adapter(self.model, self.out / "adapter.pt")

    def report(self, training):
        """Saves adapter, result and freeze map and reports them; then nothing is left to resume."""
        if not self.started:  # resumed after its last step: none was left to call start()
            self.start(training.notes)
        result = self.make_result(training)
        self.save_adapter()
        aflora.write_file(self.out / "result.json", json.dumps(result, indent=1).encode())
        print_result(self.task.title, result)
        if self.freezer:
            plan = self.freezer
            picture = freeze_map(self.model, plan.frozen_at, plan.t_i, plan.total_steps - plan.t_f)
            aflora.write_file(self.out / "freeze_map.txt", picture.encode())
            print(picture)
        self.check_merged()
        print(f"{self.task.title}: adapter, log and result are in {self.out}")
        (self.out / "checkpoint.pt").unlink()

    def make_result(self, training):
        """The fields of result.json."""
        log = training.notes["log"]
        seconds = training.notes["seconds"]
        history = [line for line in log if "accuracy" in line]  # at each epoch's end
        last = history[-1]
        best = max(history, key=lambda epoch: epoch["accuracy"])
        pairs = self.name == "mrpc"  # SST-2 is scored by accuracy alone
        freezer = self.freezer
        args = self.args
        return self.recipe | dict(
            task=self.name,
            method=args.method,
            preset=self.preset,
            seed=args.seed,
            data=f"{self.task.title}: {self.task.source}",
            weights=self.weights,
            rows=len(self.train_set.labels),
            checksums=self.checksums,
            accuracy=last["accuracy"],
            f1=last["f1"] if pairs else None,
            best_epoch=best["epoch"],
            best_accuracy=best["accuracy"],
            best_f1=best["f1"] if pairs else None,
            frozen_at=freezer.frozen_at if freezer else {},
            trainable_start=self.trainable_start,
            trainable_end=trainable(self.model.encoder),
            trainable_average=freezer.average_trainable() if freezer else self.trainable_start,
            head_parameters=trainable(self.model.head),
            history=history,
            steps=training.steps,
            skipped=log[-1]["skipped"],
            seconds=seconds,
            ms_per_step=1000 * seconds / training.steps,
            peak_memory_bytes=peak_memory(self.device),
            device="cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(),
            precision=self.precision,
            versions=VERSIONS,
        )

    def check_merged(self):
        """Loads the adapter file into a fresh float32 model, merges it there, and scores that."""
        apart = self.predict_dev()
        fresh, _, _ = load_model(self.args.model, self.args.seed, self.device)
        aflora.load_adapter(fresh, self.out / "adapter.pt")
        aflora.merge_adapters(fresh)
        merged = predict(fresh, self.dev_set, self.precision)
        scores = SCORES[self.name].format(**metrics(merged, self.dev_set.labels))
        changed = int((apart != merged).sum())
        print(f"merged into the weights: {scores}; rounding changed {changed} of {len(merged)} "
              "predictions")


EPOCH = "epoch {epoch}  step {step}  loss {loss:.4f}  accuracy {accuracy:.2f}  f1 {f1:.2f}"
SCORES = dict(sst2="accuracy {accuracy:.2f}", mrpc="accuracy {accuracy:.2f}, F1 {f1:.2f}")
REPORT = """
{title}, last epoch: {last} (best, {best_epoch}: {best})
trainable parameters: {trainable_start:,} at the start, {trainable_end:,} at the end, \
{trainable_average:,.0f} on average; head: {head_parameters:,}
{seconds:.0f} s of training, {ms_per_step:.0f} ms a step, peak memory {mebibytes:.0f} MiB"""


def print_result(title, result):
    """Scores, parameters, time and memory, from the fields of result.json."""
    scores = SCORES[result["task"]]
    print(REPORT.format(
        title=title,
        last=scores.format(**result),
        best=scores.format(accuracy=result["best_accuracy"], f1=result["best_f1"]),
        mebibytes=result["peak_memory_bytes"] / 2**20,
        **result,
    ))


def freeze_map(model, frozen_at, first, last):
    """Matrices x layers as text: a shade shows when, from step `first` to `last`, each froze."""
    shades = "░▒▓█"
    edges = [round(first + (last - first) * i / 4) for i in range(5)]
    marks = {name: shades[bisect.bisect(edges[1:4], step)] for name, step in frozen_at.items()}
    layers = range(len(model.encoder.layers))
    lines = ["freeze map: matrix \\ layer" + "".join(f"{i:3}" for i in layers)]
    for module in ATTENTION + FFN:
        for matrix in "AB":
            cells = [marks.get(f"encoder.layers.{i}.{module}.lora_{matrix}", "·") for i in layers]
            title = f"{module}.{matrix}"
            lines.append(f"{title:>26}  " + "  ".join(cells))
    spans = [f"{shade} {a}-{b}" for shade, a, b in zip(shades, edges, edges[1:])]
    legend = f"frozen after step: {'  '.join(spans)}    · never trained"
    return "\n".join([*lines, legend])


def peak_memory(device):
    """In bytes: on CUDA the most torch allocated; on a CPU the whole process at its largest."""
    if device.type == "cuda" or sys.platform == "win32":  # 0, unknown, on a CPU under Windows
        return torch.cuda.max_memory_allocated(device)
    from resource import RUSAGE_SELF, getrusage
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --------------------------------------------------------------------------------- the command line
def make_parser():
    """The flags, see --help. Those of a recipe are absent unless they are given."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a small BERT on SST-2 and MRPC with AFLoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"Recipes: {RECIPES}; methods change these (None: not used, and a flag for it is "
        f"refused): {METHODS}")
    flag = parser.add_argument
    flag("--task", default="both", choices=("sst2", "mrpc", "both"), help="the data to train on")
    flag("--method", default="aflora", choices=METHODS,
         help="what trains; to compare methods take the rates of results/README.md")
    flag("--preset", default="auto", choices=("auto", "quick", "full"), help="auto: full on CUDA")
    flag("--sensitivity", default=argparse.SUPPRESS,
         choices=("gradient-weight", "gradient", "weight"),
         help="equation (2) of the score (default: gradient-weight; aflora alone)")
    flag("--train-matrices", default=argparse.SUPPRESS, choices=("ffn", "attention", "all", "none"),
         help="whose A and B train until they freeze (default: ffn; aflora alone)")
    flag("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
         help="mixed precision; auto: bf16 where it is native, else fp16 on CUDA, off on a CPU")
    flag("--seed", default=0, type=int, help="for data order, head, dropout and random matrices")
    flag("--model", help="folder of a BERT's files; else $AFLORA_MODEL or MiniLM-L6")
    flag("--data", default=os.environ.get("AFLORA_DATA"), help="folder of texts; else fetched")
    flag("--out", help="folder of the run, of both tasks that of their folders; %(default)s: "
         "runs/TASK-METHOD-sSEED")
    flag("--checkpoint-every", default=500, type=int, help="steps; also at each epoch's end")
    flag("--resume", metavar="FOLDER", help="of a stopped run, to continue with its own flags")
    of_recipe = [
        ("rank", int, "r of the adapters"),
        ("epochs", int, "passes over the training rows"),
        ("batch-size", int, "rows per step"),
        ("limit", int, "training rows, drawn at random"),
        ("lr", float, "peak learning rate"),
        ("head-lr", float, "peak learning rate of the head"),
        ("t-i", float, "share of steps before freezing begins"),
        ("t-f", float, "share of steps after freezing has ended"),
    ]
    for name, kind, what in of_recipe:
        flag(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{what} (default: recipe's)")
    return parser


def parse(argv=None):
    """The flags; with --resume those of the stopped run. Raises AFLoRAError if one differs."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        with blame(f"is {args.resume} the folder of a stopped run?"):
            content = aflora.read_file(f"{args.resume}/checkpoint.pt", aflora.CHECKPOINT_FORMAT)
            there = json.loads(content["notes"])["flags"] | dict(resume=args.resume)
        parser.set_defaults(**there)
        args = parser.parse_args(argv)  # a flag that is given again has to be the same
        aflora.expect_equal(there, vars(args))
    aflora.whole("--seed", args.seed, 0, 2**32 - 1)
    aflora.whole("--checkpoint-every", args.checkpoint_every)
    return args


def train_tasks(argv):
    """Trains on each task that the flags name and whose texts can be had."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(args.amp, device)
    names = ["sst2", "mrpc"] if args.task == "both" else [args.task]
    tasks, notes = load_tasks(names, args.data)
    versions = [f"{package} {version}" for package, version in VERSIONS.items()]
    for note in notes:
        print(note)
    print(", ".join(versions), f"device {device}", f"{torch.get_num_threads()} threads",
          f"precision {precision}", f"seed {args.seed}", sep=", ")
    for name in tasks:
        run_folder(name, args)  # refuses now, not after the task before has been trained
    for name, task in tasks.items():
        Run(name, args, task, device, precision).train()
    for note in notes:  # once more, below the results
        print(note)


def main(argv=None):
    """The command line, see --help. Returns what status_of() does."""
    return status_of(train_tasks, argv)


if __name__ == "__main__":
    sys.exit(main())
