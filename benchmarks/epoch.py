"""An epoch of SST-2 from text to updated weights: the companion, and what people run today.

    pip install transformers peft accelerate matplotlib
    python benchmarks/epoch.py

Same texts, MiniLM weights, batch size 32 and six adapted linear layers a block, in the precision
that the companion chooses here; texts and weights come as for train_glue_small.py. The clock runs
from a list of texts to the last step: tokenizing, batching, the loop. Reading files, loading
weights and adding adapters are left out.
ours: the companion's tokenizer and batches of like length, AFLoRA, aflora.train.
theirs: a loop in the way of the official GLUE example without Trainer: fast tokenizer, shuffled
DataLoader, Accelerator, AdamW, linear schedule, BertForSequenceClassification, PEFT's LoRA r=8;
each batch padded to its longest text (a multiple of 8 in bf16), or all texts to 128 or 256 tokens.
Their head reads the pooler's [CLS], ours the mean; theirs has dropout in the attention, too.
On CUDA ours sees all rows, the others a fixed sample; on a CPU all do: examples per second compare.
A short pass of each comes first and is left out. Writes results/epoch-DEVICE.json.
"""

import argparse
import contextlib
import io
import math
import os
import statistics
import time
import types
import warnings
from functools import partial

os.environ["TQDM_DISABLE"] = "1"
import step  # noqa: E402  the benchmark beside this file; finds aflora.py, too
import accelerate  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402
from data.fetch import model_folder  # noqa: E402
from data.text import load_task, load_tokenizer  # noqa: E402

SIZE = 32
WARM_UP = 2 * SIZE  # rows
WHOLE = None if step.CUDA else 2000  # rows of ours; None: all
DYNAMIC = 16000 if step.CUDA else 2000  # of theirs
PADDED = 4000 if step.CUDA else 160  # of theirs, padded
PRECISION = companion.choose_precision("auto", step.DEVICE)


class Ours:
    """The companion with its defaults."""

    def __init__(self, folder, rows):
        flags = f"--task sst2 --preset quick --epochs 1 --batch-size {SIZE} --limit {len(rows)}"
        flags += " --out nowhere"  # in the usual folder a stopped run may lie
        args = companion.parse([*flags.split(), "--model", str(folder)])
        task = types.SimpleNamespace(train=rows, dev=rows[:SIZE], title="SST-2", source="")
        self.run = companion.Run("sst2", args, task, step.DEVICE, PRECISION)
        # Of its own: the experiment's knows the words of these rows already
        self.tokenizer = load_tokenizer(folder)

    def __call__(self, rows):
        """Trains an epoch, yields when the texts are tokenized and when all is done."""
        examples = companion.Examples(rows, self.tokenizer)
        yield
        recipe = self.run.recipe
        aflora.train(self.run.model, lambda epoch: examples.batches(SIZE, 0, epoch),
                     companion.loss, epochs=1, lr=recipe["lr"], head_lr=recipe["head_lr"],
                     weight_decay=0.01, freezer=self.run.freezer, precision=PRECISION,
                     graphs=step.CUDA)
        yield


class Theirs:
    """transformers, PEFT and Accelerate; pad: all texts to so many tokens."""

    def __init__(self, folder, rows, pad=None):
        torch.manual_seed(0)
        mixed = "no" if PRECISION == "fp32" else PRECISION
        self.accelerator = accelerate.Accelerator(mixed_precision=mixed)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense",
                   "output.dense"]
        model = peft.get_peft_model(
            transformers.BertForSequenceClassification.from_pretrained(
                folder, num_labels=2, dtype=torch.float32),
            peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        steps = math.ceil(len(rows) / SIZE)
        schedule = transformers.get_scheduler("linear", optimizer, 0, steps)
        self.parts = self.accelerator.prepare(model, optimizer, schedule)
        self.pad = pad
        self.collate = transformers.default_data_collator
        if pad is None:
            self.collate = transformers.DataCollatorWithPadding(
                self.tokenizer, pad_to_multiple_of=None if mixed == "no" else 8)

    def __call__(self, rows):
        """Trains an epoch, yields when the texts are tokenized and when all is done."""
        texts, _, labels = zip(*rows)
        encoded = self.tokenizer(list(texts), padding="max_length" if self.pad else False,
                                 max_length=self.pad or 128, truncation=True)
        examples = [dict(zip(encoded, values), labels=label)
                    for *values, label in zip(*encoded.values(), labels)]
        yield
        loader = torch.utils.data.DataLoader(examples, SIZE, shuffle=True, collate_fn=self.collate)
        model, optimizer, schedule = self.parts
        model.train()
        for batch in self.accelerator.prepare(loader):
            self.accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        yield


def seconds(arm, folder, rows):
    """(tokenizing, all) of one epoch with a fresh model."""
    with contextlib.redirect_stdout(io.StringIO()):
        stages = arm(folder, rows)(rows)
        began = time.perf_counter()
        next(stages)
        tokenized = time.perf_counter()
        next(stages)
        step.wait()
        return tokenized - began, time.perf_counter() - began


def arms_of(task):
    """{name: (arm, its rows)}, drawn from the task's."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [task.train[i] for i in order]
    return {
        "ours": (Ours, rows[:WHOLE]),
        "theirs, dynamic": (Theirs, rows[:DYNAMIC]),
        "theirs, 128 tokens": (partial(Theirs, pad=128), rows[:PADDED]),
        "theirs, 256 tokens": (partial(Theirs, pad=256), rows[:PADDED]),
    }


def check_tokenizers(folder, rows):
    """Both have to give the very ids of each text."""
    encode = load_tokenizer(folder).encode
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, *_ in rows:
        ids, _ = encode(text)
        assert ids == tokenizer(text)["input_ids"], text


def measure(arms, folder, rounds):
    """{name of an arm: what was measured}."""
    rates = {name: [] for name in arms}
    tokenizing = {name: [] for name in arms}
    for name, (arm, rows) in arms.items():
        seconds(arm, folder, rows[:WARM_UP])
    for _ in range(rounds):
        for name, (arm, rows) in arms.items():
            first, spent = seconds(arm, folder, rows)
            rates[name].append(len(rows) / spent)
            tokenizing[name].append(first / spent)
    return {name: {
        "rows": len(rows), "examples_per_second": statistics.median(rates[name]),
        "rates": rates[name], "share_of_tokenizing": statistics.median(tokenizing[name]),
        "ours_faster": statistics.median(a / b for a, b in zip(rates["ours"], rates[name])),
    } for name, (_, rows) in arms.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each, interleaved; 3")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error("--rounds: at least 1")
    transformers.logging.set_verbosity_error()  # it would say that the classifier is new,
    warnings.simplefilter("ignore")  # and aflora that few steps make few looks
    folder = model_folder()
    task = load_task("sst2", os.environ.get("AFLORA_DATA"))
    arms = arms_of(task)
    _, padded = arms["theirs, 128 tokens"]
    check_tokenizers(folder, padded)
    found = measure(arms, folder, rounds)
    print(f"{task.title}, {PRECISION}, {rounds} rounds\n{'':20} rows  examples/s (lowest, highest) "
          " tokenizing  ours is faster")
    for name, arm in found.items():
        print(f"{name:18}{arm['rows']:7}{arm['examples_per_second']:9.1f} "
              f"({min(arm['rates']):.1f}, {max(arm['rates']):.1f}) "
              f"{100 * arm['share_of_tokenizing']:8.1f} % {arm['ours_faster']:8.2f} x")
    step.write_results("epoch", {f"{task.title} {PRECISION}": {
        "rounds": rounds, "batch_size": SIZE, "machine": step.machine(), "arms": found}})


if __name__ == "__main__":
    main()
