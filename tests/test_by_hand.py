"""A run of the companion, started on its command line, against a run that is written out here.

Here the BERT is Hugging Face's, an adapter is a dense weight W0 + diag(s_b) B diag(s_d) A, its
start comes from NumPy; the loop, the rates, the score and the freezing are a page of plain code.
Of the companion's only the tokenizer and batches are used, which have tests of their own, and
Dropout, whose random numbers have to be the same.
"""

import copy
import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

import aflora
import tiny
import train_glue_small as glue
from companion import adapter_of, log_of, result_of, run_main
from data.text import WordPieceTokenizer, load_task

THEIRS = {"query": "attention.self.query", "key": "attention.self.key",
          "value": "attention.self.value", "attention_output": "attention.output.dense",
          "intermediate": "intermediate.dense", "output": "output.dense"}


def start(key, rows, columns):
    """Kaiming's start that a key stands for."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    bound = math.sqrt(6 / columns)
    values = np.random.RandomState(seed).uniform(-bound, bound, (rows, columns))
    return torch.from_numpy(values.astype(np.float32))


class DenseAdapter(nn.Module):
    """W0 -> W0 + diag(s_b) B diag(s_d) A, as a parametrization of a weight."""

    def __init__(self, weight, rank, key):
        super().__init__()
        self.lora_A = nn.Parameter(start(f"{key}/lora_A", rank, weight.shape[1]))
        self.lora_B = nn.Parameter(start(f"{key}/lora_B", weight.shape[0], rank))
        self.s_d = nn.Parameter(torch.full((rank,), 0.1))
        self.s_b = nn.Parameter(torch.zeros(weight.shape[0]))

    def forward(self, weight):
        return weight + self.s_b.diag() @ self.lora_B @ self.s_d.diag() @ self.lora_A


def reference_bert(rank, seed):
    """(Hugging Face's BERT with the tiny weights, {our name: its DenseAdapter})."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**tiny.CONFIG | {"attention_probs_dropout_prob": 0.0})
    bert = transformers.BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(tiny.checkpoint(), strict=False)
    bert.requires_grad_(False)
    for module in list(bert.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(module, name, glue.Dropout(child.p))
    adapters = {}
    for i in range(2):
        for ours, theirs in THEIRS.items():
            linear = bert.get_submodule(f"encoder.layer.{i}.{theirs}")
            name = f"encoder.layers.{i}.{ours}"
            adapters[name] = DenseAdapter(linear.weight, rank, f"{seed}/{name}")
            parametrize.register_parametrization(linear, "weight", adapters[name])
    return bert, adapters


def raw_score(kind, p):
    """Equation (2)."""
    if kind == "gradient":
        return p.grad.abs()
    if kind == "weight":
        return p.detach().abs()
    return (p.detach() * p.grad).abs()


class Reference:
    """The run by hand: AdamW, rates, clipping, score, freezing; 10 steps between looks."""

    def __init__(self, bert, adapters, head, kind, total_steps, t_i, t_f):
        self.bert = bert.train()
        self.head = head
        self.kind = kind
        self.total_steps = total_steps
        self.t_i = t_i
        self.t_f = t_f
        self.live = {f"{name}.lora_{matrix}": adapters[name].get_parameter(f"lora_{matrix}")
                     for name in adapters for matrix in "AB"
                     if name.endswith(("intermediate", ".output"))}
        self.count = len(self.live)
        self.scores = {name: (torch.zeros_like(p), torch.zeros_like(p))
                       for name, p in self.live.items()}
        self.frozen_at = {}
        for name, adapter in adapters.items():
            trains = f"{name}.lora_A" in self.live
            adapter.lora_A.requires_grad_(trains)
            adapter.lora_B.requires_grad_(trains)
        self.parameters = [p for p in (*bert.parameters(), *head.parameters()) if p.requires_grad]
        self.optimizer = self.make_optimizer(set(head.parameters()))
        self.steps = 0

    def make_optimizer(self, head):
        """AdamW: the head at half the rate; decay for matrices alone."""
        groups = []
        for p in self.parameters:
            peak = 1e-2 if p in head else 2e-2
            decay = 0.01 if p.ndim == 2 else 0.0
            groups.append({"params": [p], "peak": peak, "weight_decay": decay})
        return torch.optim.AdamW(groups, lr=1e-3)

    def loss(self, ids, segments, mask, labels):
        """The classifier on the mean of the hidden states of real tokens."""
        hidden = self.bert(ids, attention_mask=mask.long(), token_type_ids=segments)
        tokens = hidden.last_hidden_state
        means = torch.stack([row[real].mean(0) for row, real in zip(tokens, mask)])
        dropout = glue.Dropout(0.1)
        inner = torch.tanh(F.linear(dropout(means), self.head[1].weight, self.head[1].bias))
        logits = F.linear(dropout(inner), self.head[4].weight, self.head[4].bias)
        picked = logits.gather(1, labels[:, None])[:, 0]
        return (logits.logsumexp(1) - picked).mean()

    def step(self, batch):
        """One optimizer step. Returns its loss."""
        warmup = 0.06
        rising = (self.steps + 1) / (warmup * self.total_steps + 1)
        falling = (1 - self.steps / self.total_steps) / (1 - warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(rising, falling)
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        for name, p in self.live.items():
            raw = raw_score(self.kind, p)
            mean, spread = self.scores[name]
            mean = 0.85 * mean + 0.15 * raw
            spread = 0.95 * spread + 0.05 * (raw - mean).abs()
            self.scores[name] = (mean, spread)
        trained = [p for p in self.parameters if p.requires_grad]
        norm = torch.cat([p.grad.flatten() for p in trained]).norm().item()
        for p in trained:
            p.grad.mul_(min(1.0, 1.0 / (norm + 1e-6)))
        self.optimizer.step()
        self.steps += 1
        self.freeze()
        return loss.item()

    def freeze(self):
        """The lowest scores freeze until floor(r(t) n) are frozen, equation (6)."""
        last = self.total_steps - self.t_f
        if self.steps % 10 != 0 and self.steps < last:
            return
        ramp = min(max((self.steps - self.t_i) / (last - self.t_i), 0.0), 1.0)
        due = math.floor((1 - (1 - ramp) ** 3) * self.count + 1e-9) - len(self.frozen_at)
        order = sorted(self.live, key=lambda name: (
            self.scores[name][0] * self.scores[name][1]).mean().item())
        for name in order[:max(due, 0)]:
            p = self.live.pop(name)
            p.requires_grad_(False)
            p.grad = None
            self.frozen_at[name] = self.steps


def write_texts(folder):
    """MRPC with texts of one to twelve words, so that there is padding: 16 rows train, 4 dev."""
    texts = [text for text, _, _ in tiny.random_rows(40, 12)]
    lines = [f"{i % 2}\t{i}\t{i + 50}\t{texts[i]}\t{texts[i + 20]}\n" for i in range(20)]
    path = folder / "MRPC/msr_paraphrase_train.txt"
    path.write_text(tiny.MRPC_HEADER + "".join(lines))


def run_companion(folder, monkeypatch, flags):
    """Runs MRPC; returns copies of the head's and of the random generator's start."""
    seen = []

    def train(model, *arguments, **settings):
        seen.extend([copy.deepcopy(model.head), torch.get_rng_state()])
        return real_train(model, *arguments, **settings)

    real_train = aflora.train
    monkeypatch.setattr(aflora, "train", train)
    assert run_main(folder, flags, task="mrpc") == 0
    return seen


@pytest.mark.parametrize("kind, seed", [("gradient-weight", 0), ("gradient", 6), ("weight", 5)])
def test_a_run_equals_the_run_by_hand(folder, monkeypatch, kind, seed):
    """Losses, freezing order and steps, and every learned value, for each kind of score."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # its dropout is another one
    write_texts(folder)
    head, random = run_companion(
        folder, monkeypatch,
        f"--epochs 10 --batch-size 4 --limit 15 --rank 2 --lr 2e-2 --head-lr 1e-2 --amp off "
        f"--t-i 0.25 --t-f 0.25 --sensitivity {kind} --seed {seed}")

    task = load_task("mrpc", folder)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:15]
    tokenizer = WordPieceTokenizer(folder / "vocab.txt")
    examples = glue.Examples([task.train[i] for i in order], tokenizer)
    bert, adapters = reference_bert(2, seed)
    reference = Reference(bert, adapters, head, kind, total_steps=40, t_i=10, t_f=10)
    torch.set_rng_state(random)
    means = {}
    for epoch in range(10):
        losses = []
        for batch in examples.batches(4, seed, epoch):
            losses.append(reference.step(batch))
            means[reference.steps] = sum(losses) / len(losses)

    result = result_of(folder / "out")
    assert result["steps"] == reference.steps == 40
    assert result["frozen_at"] == reference.frozen_at
    assert len(reference.frozen_at) == 8 and len(set(reference.frozen_at.values())) > 1
    lines = log_of(folder / "out")
    assert len(lines) >= 10
    assert [line["loss"] for line in lines] == pytest.approx(
        [means[line["step"]] for line in lines], rel=1e-4)
    expected = {f"head.{name}": p for name, p in head.named_parameters()}
    for name, adapter in adapters.items():
        expected |= {f"{name}.{part}": p for part, p in adapter.named_parameters()}
    values = adapter_of(folder / "out")["values"]
    assert len(values) == 4 + 4 * 4 + 8 * 2  # the head's, all four of the FFN, else the vectors
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-4, atol=2e-4)
