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
On CUDA all rows, where padded a fixed sample; on a CPU fixed samples: examples per second compare.
A short pass of each comes first and is left out. Writes results/epoch-DEVICE.json.
"""

import argparse, contextlib, io, os, statistics, time, warnings
from functools import partial

os.environ["TQDM_DISABLE"] = "1"
import step  # noqa: E402  the benchmark beside this file; finds aflora.py, too
import accelerate, peft, torch, torch.nn.functional as F, transformers  # noqa: E401, E402
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402

SIZE, WARM_UP = 32, 2 * 32
ROWS = dict(whole=None, padded=16_000) if step.CUDA else dict(whole=2000, padded=160)
PRECISION = companion.choose_precision("auto", step.DEVICE)


class Ours:
    """The companion with its defaults."""
    def __init__(self, folder, total):
        recipe = companion.RECIPES["quick", "sst2"]
        torch.manual_seed(0)
        self.tokenizer = companion.WordPieceTokenizer(folder / "vocab.txt")
        self.model = companion.BertClassifier(companion.Bert.load(folder)).to(step.DEVICE)
        layers = aflora.add_adapters(self.model, step.TARGETS, train_matrices=companion.FFN,
                                     modules_to_save=["head"])
        self.freezer = aflora.AdaptiveFreezer(layers, total, round(recipe["t_i"] * total),
                                              round(recipe["t_f"] * total))

    def __call__(self, rows):
        """Trains an epoch, yields when the texts are tokenized and when all is done."""
        examples = companion.Examples(rows, self.tokenizer)
        yield
        aflora.train(self.model, lambda epoch: examples.batches(SIZE, 0, epoch),
                     lambda model, batch: F.cross_entropy(model(*batch[:-1]).float(), batch[-1]),
                     epochs=1, lr=4e-3, head_lr=2e-3, weight_decay=0.01, freezer=self.freezer,
                     precision=PRECISION)
        yield


class Theirs:
    """transformers, PEFT and Accelerate; pad: all texts to so many tokens."""
    def __init__(self, folder, total, pad=None):
        torch.manual_seed(0)
        mixed = dict(fp32="no").get(PRECISION, PRECISION)
        self.accelerator = accelerate.Accelerator(mixed_precision=mixed)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = peft.get_peft_model(
            transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2),
            peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=[
                "query", "key", "value", "attention.output.dense", "intermediate.dense",
                "output.dense"]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.parts = self.accelerator.prepare(
            model, optimizer, transformers.get_scheduler("linear", optimizer, 0, total))
        self.pad, multiple = pad, None if mixed == "no" else 8
        self.collate = transformers.default_data_collator if pad else (
            transformers.DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=multiple))

    def __call__(self, rows):
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
        stages = arm(folder, -(-len(rows) // SIZE))(rows)
        began = time.perf_counter()
        next(stages)
        tokenized = time.perf_counter()
        next(stages)
        if step.CUDA:
            torch.cuda.synchronize()
        return tokenized - began, time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each, interleaved; 3")
    if (rounds := parser.parse_args().rounds) < 1:
        parser.error("--rounds: at least 1")
    transformers.logging.set_verbosity_error()  # it would say that the classifier is new,
    warnings.simplefilter("ignore")  # and aflora that few steps make few looks
    folder = [companion.fetch(name) for name in companion.FILES
              if name.startswith(companion.MODEL)][0].parent
    task = companion.load_task("sst2", os.environ.get("AFLORA_DATA"))
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    sample = {kind: [task.train[i] for i in order[:count]] for kind, count in ROWS.items()}
    arms = {"ours": (Ours, sample["whole"]), "theirs, dynamic": (Theirs, sample["whole"])} | {
        f"theirs, {pad} tokens": (partial(Theirs, pad=pad), sample["padded"]) for pad in (128, 256)}
    encode = companion.WordPieceTokenizer(folder / "vocab.txt").encode
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert all(encode(text)[0] == tokenizer(text)["input_ids"] for text, *_ in sample["padded"])
    rates, tokenizing = {name: [] for name in arms}, {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, (arm, rows) in arms.items():
            rows = rows if number else rows[:WARM_UP]
            first, spent = seconds(arm, folder, rows)
            if number:
                rates[name].append(len(rows) / spent)
                tokenizing[name].append(first / spent)
    found = {name: dict(
        rows=len(rows), examples_per_second=statistics.median(rates[name]), rates=rates[name],
        share_of_tokenizing=statistics.median(tokenizing[name]),
        ours_faster=statistics.median(a / b for a, b in zip(rates["ours"], rates[name])))
        for name, (_, rows) in arms.items()}
    print(f"{task.title}, {PRECISION}, {rounds} rounds\n{'':20} rows  examples/s (lowest, highest) "
          " tokenizing  ours is faster")
    for name, a in found.items():
        print(f"{name:18}{a['rows']:7}{a['examples_per_second']:9.1f} ({min(a['rates']):.1f}, "
              f"{max(a['rates']):.1f}) {100 * a['share_of_tokenizing']:8.1f} % "
              f"{a['ours_faster']:8.2f} x")
    step.write_results("epoch", {f"{task.title} {PRECISION}": dict(
        rounds=rounds, batch_size=SIZE, machine=step.machine(), arms=found)})


if __name__ == "__main__":
    main()
