"""Tests: every claim against something independent (a dense reference, autograd, a number worked
out by hand, Hugging Face's own code). No network and no GPU; transformers is used where it is."""

import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # set it to 0 to run the script's tests there

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import aflora
import train_glue_small as glue
from aflora import (AdaptiveFreezer, AFLoRAError, AFLoRALinear, add_adapters, freezing_fraction,
                    load_adapter, merge_adapters, save_adapter, sensitivity, train,
                    unmerge_adapters)

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
pytestmark = pytest.mark.filterwarnings("ignore:ramp of", "ignore:enable_nested_tensor")


def perturb(*modules):
    """Moves every adapter parameter away from its start, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(1)
    for module in modules:
        for layer in aflora.adapters_of(module).values():
            for p in layer.parameters(recurse=False):
                p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


class Net(nn.Module):
    """A small model with the names of a transformer: two blocks and a head."""

    def __init__(self, width=8, depth=2, classes=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            query=nn.Linear(width, width), up=nn.Linear(width, 3 * width),
            down=nn.Linear(3 * width, width), norm=nn.LayerNorm(width))) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block["norm"](x + torch.tanh(block["query"](x)))
            x = x + block["down"](F.gelu(block["up"](x)))
        return self.head(x)


def adapted(targets=("query", "up", "down"), modules_to_save=("head",), **options):
    torch.manual_seed(0)
    model = Net()
    return model, add_adapters(model, targets, modules_to_save=modules_to_save, **options)


def data(batches=8, size=16, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, size, width, generator=generator)
    return list(zip(x, (x[..., 0] * x[..., 1] > 0).long()))


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def run(model, layers, epochs=10, t_i=0.1, t_f=0.3, batches=None, freezer=None, **options):
    """train() with a freezer whose t_i and t_f are shares of all steps."""
    batches = batches or data()
    total = epochs * math.ceil(len(batches) / options.get("accumulate", 1))
    freezer = freezer or AdaptiveFreezer(layers, total, round(t_i * total), round(t_f * total))
    report = train(model, lambda epoch: batches, loss_of, epochs=epochs, lr=1e-2, freezer=freezer,
                   weight_decay=0.1, **options)
    return freezer, report


# ------------------------------------------------------------------------------ the layer, (1)

@pytest.mark.parametrize("rank, trained", [(4, "AB"), (4, "A"), (4, ""), (100, "AB"), (100, "")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3)])
def test_forward_and_every_gradient_equal_the_dense_formula(rank, trained, bias, leading):
    """Both forms of the layer: y = (W0 + diag(s_b) B diag(s_d) A) x + b, and every gradient."""
    torch.manual_seed(0)
    layer = AFLoRALinear(nn.Linear(6, 10, bias=bias, dtype=torch.float64), rank)
    for key, p in layer.named_parameters(recurse=False):
        p.data = torch.randn_like(p)
        p.requires_grad_(key[0] == "s" or key[-1] in trained)
    x, dense_x = (torch.randn(*leading, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    dense_x.data = x.data
    dense = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters()}
    W = (dense["base.weight"] +
         dense["s_b"].diag() @ dense["lora_B"] @ dense["s_d"].diag() @ dense["lora_A"])
    expected = F.linear(dense_x, W, dense.get("base.bias"))
    y = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.delta_weight(), W - dense["base.weight"])
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, dense_x.grad)
    for key, p in layer.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, dense[key].grad, msg=key)


@pytest.mark.parametrize("method", ["aflora", "lora", "elora"])
def test_the_adapted_model_starts_as_the_plain_one(method):
    """Wrapping changes no output bit: s_b (LoRA: B) is zero at first."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 5, 8)
    plain = model(x)
    rank = 100 if method == "elora" else 4
    add_adapters(model, ["query", "up", "down"], method=method, rank=rank)
    assert torch.equal(model(x), plain)


def test_starts_are_those_of_the_paper():
    """A, B: Kaiming uniform with fan_in the columns (a = 0; LoRA: sqrt 5); s_d = 0.1, s_b = 0."""
    base = nn.Linear(300, 500)
    layer = AFLoRALinear(base, 4, name="x")
    for matrix, fan_in in ((layer.lora_A, 300), (layer.lora_B, 4)):
        bound = math.sqrt(6 / fan_in)
        assert matrix.abs().max() <= bound and matrix.abs().max() > 0.98 * bound
        assert abs(matrix.std().item() / (bound / math.sqrt(3)) - 1) < 0.06
    assert layer.s_d.eq(0.1).all() and layer.s_b.eq(0).all()
    lora = AFLoRALinear(base, 8, "lora", alpha=16, name="x")
    assert 0.98 < lora.lora_A.abs().max() * math.sqrt(300) <= 1  # 1 / sqrt(fan_in)
    assert lora.lora_B.eq(0).all() and lora.s_d.eq(2).all() and lora.s_b.eq(1).all()
    trained = {k for k, p in lora.named_parameters(recurse=False) if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_random_starts_come_from_the_seed_and_the_name():
    """The same seed and name give the same matrix, others another; it is numpy's own stream."""
    start = aflora.kaiming_uniform("0/layer/lora_A", (4, 6))
    assert torch.equal(start, aflora.kaiming_uniform("0/layer/lora_A", (4, 6)))
    assert not torch.equal(start, aflora.kaiming_uniform("1/layer/lora_A", (4, 6)))
    seed = int.from_bytes(hashlib.sha256(b"0/layer/lora_A").digest()[:4], "little")
    expected = np.random.RandomState(seed).uniform(-1, 1, (4, 6)).astype(np.float32)  # sqrt(6 / 6)
    assert np.array_equal(start.numpy(), expected)
    assert start[0, 0] == np.float32(-0.35978946)  # so that a change of the recipe is noticed


def test_elora_shares_one_frozen_pair_per_shape():
    """ELoRA: layers of one shape hold the very same A and B; only the vectors train."""
    model, layers = adapted(method="elora", rank=16)
    first, second = (layers[f"blocks.{i}.up"] for i in range(2))
    assert first.lora_A is second.lora_A and first.lora_B is second.lora_B
    assert first.lora_A is not layers["blocks.0.down"].lora_A
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"s_d", "s_b", "weight", "bias"}  # the latter: the head's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_and_autocast(dtype):
    """A half-precision base without autocast, and a float32 one with it, agree with float32."""
    model, _ = adapted()
    perturb(model)
    x, half = torch.randn(4, 7, 8), copy.deepcopy(model)
    for module in half.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.to(dtype)
    with torch.autocast("cpu", dtype):
        mixed = model(x)
    assert half(x.to(dtype)).dtype == dtype and half.blocks[0]["up"].lora_A.dtype == torch.float32
    for y in (mixed, half(x.to(dtype))):
        assert (y.float() - model(x)).norm() < 0.03 * model(x).norm()


def saved_bytes(layer, x, sizes):
    """Bytes that autograd keeps of tensors with a number of elements in `sizes`."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(t.nbytes for t in kept if t.numel() in sizes)


def test_activations_are_saved_only_while_they_are_needed():
    """No tokens x out tensor is kept for s_b, and x itself only as long as A trains."""
    layer = AFLoRALinear(nn.Linear(50, 70).requires_grad_(False))
    x = torch.randn(90, 50).requires_grad_()
    perturb(layer)
    wide, input_ = {90 * 70}, {90 * 50}
    assert saved_bytes(layer, x, wide) == 0 and saved_bytes(layer, x, input_) == x.nbytes
    layer.lora_A.requires_grad_(False)
    assert saved_bytes(layer, x, wide | input_) == 0
    def naive(x):
        h = F.linear(x, layer.lora_A) * layer.s_d
        return layer.base(x) + layer.s_b * F.linear(h, layer.lora_B)
    assert saved_bytes(naive, x, wide) == 90 * 70 * 4  # what the folding saves


# ------------------------------------------------------------------------- adapters into a model

def test_targets_are_whole_names():
    """Suffixes begin at a dot, a string is one regular expression; all but the head is frozen."""
    model = nn.ModuleDict(dict(q=nn.Linear(4, 4), sequence=nn.Linear(4, 4), head=nn.Linear(4, 2)))
    layers = add_adapters(model, ["q"], modules_to_save=["head"])
    assert list(layers) == ["q"] and type(model["sequence"]) is nn.Linear
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "q.lora_A", "q.lora_B", "q.s_d", "q.s_b", "head.weight", "head.bias"}
    assert list(add_adapters(Net(), r"blocks\.0\.(up|down)")) == ["blocks.0.up", "blocks.0.down"]
    some = add_adapters(Net(), ["query", "up"], train_matrices=["up"])
    assert [some[f"blocks.0.{n}"].lora_A.requires_grad for n in ("query", "up")] == [False, True]


@pytest.mark.parametrize("options, words", [
    (dict(targets=["quary"]), ["quary", "blocks.*.query"]), (dict(targets="(("), ["(("]),
    (dict(targets=["uery"]), ["uery"]),
    (dict(targets=["query", "blocks"]), ["blocks"]),
    (dict(targets=["query"], modules_to_save=["heads"]), ["heads", "head"]),
    (dict(targets=["query"], train_matrices=["up"]), ["up", "blocks.*.query"]),
    (dict(targets=["head"], modules_to_save=["head"]), ["head", "choose one"]),
    (dict(targets=["query"], rank=0), ["rank 0"]),
    (dict(targets=["query"], method="vera"), ["vera", "elora"]),
    (dict(targets=["query"], method="lora", train_matrices="none"), ["lora"]),
    (dict(targets=()), ["nothing would train"])])
def test_wrong_arguments_are_named_and_change_nothing(options, words):
    """The message says what is wrong and what there is; the model is as it was."""
    model = Net()
    with pytest.raises(AFLoRAError) as error:
        add_adapters(model, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert not aflora.adapters_of(model) and all(p.requires_grad for p in model.parameters())


def test_modules_that_are_never_called_are_refused():
    """nn.MultiheadAttention's out_proj is a Linear whose forward never runs; nor adapt twice."""
    with pytest.raises(AFLoRAError, match="out_proj.*may not call"):
        add_adapters(nn.ModuleDict(dict(a=nn.MultiheadAttention(8, 2))), ["out_proj"])
    with pytest.raises(AFLoRAError, match="may not call"):
        add_adapters(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1), ["linear1"])
    model, _ = adapted()
    with pytest.raises(AFLoRAError, match="already"):
        add_adapters(model, ["query"])


def test_merging_is_idempotent_and_unmerging_exact():
    """Merged thrice = once = the adapter's own output; unmerged = the very bits; no training."""
    model, layers = adapted()
    perturb(model)
    weights = {n: layer.base.weight.clone() for n, layer in layers.items()}
    x = torch.randn(4, 8)
    apart = model(x)
    merge_adapters(model)
    once = {n: layer.base.weight.clone() for n, layer in layers.items()}
    merge_adapters(model)
    merge_adapters(model)
    assert all(torch.equal(layer.base.weight, once[n]) for n, layer in layers.items())
    torch.testing.assert_close(model.eval()(x), apart)
    with pytest.raises(AFLoRAError, match="unmerge"):
        model.train()(x)
    for _ in range(100):
        unmerge_adapters(model)
        assert all(torch.equal(layer.base.weight, weights[n]) for n, layer in layers.items())
        merge_adapters(model)
    unmerge_adapters(model)
    assert torch.equal(model(x), apart)


def test_merging_goes_into_the_loaded_weight_not_the_training_copy():
    """Inside train() the base is bfloat16; merging there still starts from the float32 values."""
    model, layers = adapted()
    perturb(model)
    layer = layers["blocks.0.up"]
    expected = layer.base.weight + layer.delta_weight()
    loaded = layer.base.weight.clone()
    with aflora.frozen_weights_in(model, torch.bfloat16):
        assert layer.base.weight.dtype == torch.bfloat16
        assert model.head.weight.dtype == torch.float32
        layer.merge()
        assert torch.equal(layer.base.weight, expected)
        layer.unmerge()
    assert torch.equal(layer.base.weight, loaded) and not hasattr(layer.base.weight, "loaded")


def test_a_base_that_others_watch_or_share_is_left_alone():
    """Hooks see the base's own output; what cannot be merged says so; shared weights come back."""
    model, layers = adapted()
    perturb(model)
    layer, x, seen = layers["blocks.0.up"], torch.randn(3, 8), []
    expected = layer.base(x)
    layer.base.register_forward_hook(lambda module, inputs, y: seen.append(y))
    layer.base.register_full_backward_hook(lambda *gradients: None)
    layer(x).sum().backward()
    torch.testing.assert_close(seen[0], expected)
    for base in (torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Identity()):
        base.in_features = base.out_features = 4
        with pytest.raises(AFLoRAError, match="merge|add to"):
            AFLoRALinear(base).merge()
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).requires_grad_(False)
    tied[1].weight = tied[0].weight
    loaded = tied[0].weight.clone()
    with aflora.frozen_weights_in(tied, torch.bfloat16):
        assert tied[1].weight.dtype == torch.bfloat16
    assert torch.equal(tied[0].weight, loaded)
    with aflora.frozen_weights_in(model, torch.bfloat16):
        merge_adapters(model)
    assert not layer.merged and layer.weight.dtype == torch.float32
    assert not add_adapters(Net().eval(), ["up"])["blocks.0.up"].training


def test_adapters_start_where_a_base_of_buffers_is():
    """A quantised layer may hold its weight in a buffer: the adapter is on that device, float32."""
    base = nn.Identity()
    base.in_features = base.out_features = 8
    base.register_buffer("qweight", torch.zeros(8, 1, dtype=torch.int32, device="meta"))
    layer = AFLoRALinear(base)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float32)}


class Tied(nn.Module):
    """A small language model: the output's weight is the embedding's, both blocks share theirs."""

    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.embed, self.norm, self.lm_head = nn.Embedding(9, 8), norm(8), nn.Linear(8, 9)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lm_head.weight, self.two.weight = self.embed.weight, self.one.weight

    def forward(self, ids):
        return self.lm_head(self.norm(torch.tanh(self.two(torch.tanh(self.one(self.embed(ids)))))))


def test_merging_leaves_tied_weights_alone():
    """Merged = apart also where a target shares its weight with an embedding or another target;
    unmerged they are tied again. Training a merged model is refused and costs the base nothing."""
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model, ["lm_head", "one", "two"])
    perturb(model)
    apart = model(ids)
    merge_adapters(model)
    torch.testing.assert_close(model(ids), apart)
    for precision in ("fp32", "bf16"):
        merge_adapters(model)
        with pytest.raises(AFLoRAError, match="training while merged"):
            train(model, lambda epoch: [ids], lambda model, ids: model(ids).sum(), epochs=1,
                  lr=1e-2, precision=precision)
        model.eval()
    unmerge_adapters(model)
    assert torch.equal(model(ids), apart)
    assert model.lm_head.base.weight is model.embed.weight
    assert model.one.base.weight is model.two.base.weight
    there = model.state_dict()
    for name, value in before.items():
        assert torch.equal(there[name if name in there else re.sub(r"[.](?=\w+$)", ".base.", name)],
                           value)
    with aflora.frozen_weights_in(model, torch.float16):  # as autocast: it casts no embedding
        assert model.embed.weight.dtype == torch.float32
        assert model.one.base.weight.dtype == torch.float16


# ------------------------------------------------------------ score (2)-(5) and schedule (6)

def test_sensitivity_is_what_it_says():
    """The three kinds by hand; the default is |w * grad|, an unknown one is an error."""
    w, g = torch.tensor([2.0, -3.0]), torch.tensor([-0.5, 4.0])
    assert sensitivity(w, g).tolist() == [1.0, 12.0]
    assert sensitivity(w, g, "gradient").tolist() == [0.5, 4.0]
    assert sensitivity(w, g, "weight").tolist() == [2.0, 3.0]
    with pytest.raises(AFLoRAError, match="gradient-weight"):
        sensitivity(w, g, "hessian")


def test_three_steps_of_the_score_by_hand():
    """Equations (2)-(5), b1 = 0.85, b2 = 0.95, for one matrix of two values, written out."""
    layer = AFLoRALinear(nn.Linear(2, 1), rank=1, name="x")
    layer.lora_A.data = torch.tensor([[2.0, -1.0]])
    layer.lora_B.requires_grad_(False)
    freezer = AdaptiveFreezer({"x": layer}, 1000, 0, 0)
    for g in ([1.0, 3.0], [0.5, -2.0], [-2.0, 0.0]):
        layer.lora_A.grad = torch.tensor([g])
        freezer.update()
    # element 0: I = 2, 1, 4
    #   Ibar = 0.15 * 2 = 0.3; 0.85 * 0.3 + 0.15 * 1 = 0.405; 0.85 * 0.405 + 0.15 * 4 = 0.94425
    #   U    = 1.7; 0.595; 3.05575
    #   Ubar = 0.05 * 1.7 = 0.085; 0.95 * 0.085 + 0.05 * 0.595 = 0.1105;
    #          0.95 * 0.1105 + 0.05 * 3.05575 = 0.2577625
    # element 1: I = 3, 2, 0
    #   Ibar = 0.45; 0.6825; 0.580125      U = 2.55; 1.3175; 0.580125
    #   Ubar = 0.1275; 0.187; 0.20665625
    torch.testing.assert_close(freezer.Ibar, torch.tensor([0.94425, 0.580125]))
    torch.testing.assert_close(freezer.Ubar, torch.tensor([0.2577625, 0.20665625]))
    score = (0.94425 * 0.2577625 + 0.580125 * 0.20665625) / 2
    assert freezer.scores()["x.lora_A"] == pytest.approx(score, rel=1e-6)


def test_the_schedule_at_its_corners():
    """Equation (6): 0 before t_i, cubic in the ramp, 1 from T - t_f on, never falling."""
    r = [freezing_fraction(step, 100, 20, 30) for step in range(101)]
    assert r[0] == r[19] == r[20] == 0 and r[70] == r[71] == r[100] == 1
    assert r[45] == 1 - 0.5**3 and r[30] == pytest.approx(1 - 0.8**3) and r[69] < 1
    assert r == sorted(r)
    assert [freezing_fraction(step, 10, 4, 6) for step in (3, 4, 5)] == [0, 1, 1]  # an empty ramp
    assert freezing_fraction(0, 10, 0, 10) == 1
    for t_i, t_f in ((60, 50), (-1, 5), (5, -1)):
        with pytest.raises(AFLoRAError, match="fit"):
            freezing_fraction(0, 100, t_i, t_f)


# --------------------------------------------------------------------------------- the freezer

def test_short_and_impossible_schedules():
    """A short ramp warns and says how matrices will freeze; nothing to freeze is an error."""
    _, layers = adapted()
    with pytest.warns(UserWarning, match="few large groups"):
        AdaptiveFreezer(layers, 100, 10, 20)
    with pytest.warns(UserWarning, match="all at once"):
        AdaptiveFreezer(layers, 100, 40, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveFreezer(layers, 200, 50, 50)
    with pytest.raises(AFLoRAError, match="fit"):
        AdaptiveFreezer(layers, 100, 60, 50)
    with pytest.raises(AFLoRAError, match="nothing to freeze"):
        AdaptiveFreezer(adapted(train_matrices="none")[1], 100, 10, 20)


@pytest.mark.parametrize("t_f", [100, 97])
def test_every_look_freezes_the_lowest_floor_r_n_of_all_matrices(t_f):
    """Counts and choice at each step against a brute-force selection; T - t_f also off the tens."""
    model, layers = adapted()
    T, t_i, n = 300, 30, 12
    freezer = AdaptiveFreezer(layers, T, t_i, t_f)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    Ibar, Ubar, frozen = {}, {}, set()
    for step in range(1, T + 1):
        for name, p in freezer.live.items():
            p.grad = torch.randn(p.shape, generator=generator)
            I = (p * p.grad).abs().detach()
            Ibar[name] = 0.85 * Ibar.get(name, 0) + 0.15 * I
            Ubar[name] = 0.95 * Ubar.get(name, 0) + 0.05 * (I - Ibar[name]).abs()
        freezer.update()
        newly = freezer.freeze(step, optimizer)
        expected = []
        if step % 10 == 0 or step == T - t_f:
            k = math.floor(freezing_fraction(step, T, t_i, t_f) * n)
            scores = {m: (Ibar[m] * Ubar[m]).mean().item() for m in freezer.matrices
                      if m not in frozen}
            expected = sorted(scores, key=scores.get)[:max(0, k - len(frozen))]
            frozen |= set(expected)
            assert len(freezer.frozen_at) == k
        assert newly == expected
        assert freezer.shares() == (freezing_fraction(step, T, t_i, t_f), len(frozen) / n)
    assert freezer.frozen_at.keys() == freezer.matrices.keys() and freezer.Ibar.numel() == 0
    assert max(freezer.frozen_at.values()) == T - t_f
    assert set(freezer.frozen_at.values()) <= {*range(40, T, 10), T - t_f}


def test_frozen_is_frozen():
    """A frozen matrix is bit-equal after 100 more AdamW steps with decay; its state is gone."""
    model, layers = adapted()
    freezer = AdaptiveFreezer(layers, 400, 20, 200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    kept, batches = {}, data()
    for step in range(1, 401):
        loss_of(model, batches[step % 8]).backward()
        freezer.update()
        optimizer.step()
        for name in freezer.freeze(step, optimizer):
            p = freezer.matrices[name]
            kept[name] = p.detach().clone()
            assert p.grad is None and not p.requires_grad and p not in optimizer.state
        optimizer.zero_grad(set_to_none=True)
    assert len(kept) == 12 and max(freezer.frozen_at.values()) <= 200
    for name, value in kept.items():
        p = freezer.matrices[name]
        assert torch.equal(p, value) and p not in optimizer.state
        assert any(p is q for q in optimizer.param_groups[0]["params"])  # the group still fits


def test_a_gradient_that_is_not_finite_leaves_the_scores():
    """update() with an inf or a nan changes nothing; a live matrix without a gradient is named."""
    model, layers = adapted()
    freezer = AdaptiveFreezer(layers, 200, 10, 20)
    loss_of(model, data()[0]).backward()
    freezer.update()
    before = freezer.Ibar.clone(), freezer.Ubar.clone()
    for bad in (float("inf"), float("nan")):
        layers["blocks.0.up"].lora_A.grad[0, 0] = bad
        freezer.update()
        assert torch.equal(freezer.Ibar, before[0]) and torch.equal(freezer.Ubar, before[1])
    layers["blocks.0.up"].lora_A.grad = None
    with pytest.raises(AFLoRAError, match="blocks.0.up.lora_A"):
        freezer.update()


def test_average_trainable_is_exact():
    """The average equals the trainable parameters counted at every single step of a run."""
    model, layers = adapted()
    counted = []
    freezer, report = run(model, layers, epochs=20, on_gradients=lambda parameters: counted.append(
        sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "head" not in n)))
    assert report["steps"] == len(counted) == 160 and len(set(counted)) > 5
    assert freezer.average_trainable() == pytest.approx(sum(counted) / 160, rel=1e-12)


def test_parameter_counts_of_the_paper():
    """DeBERTaV3-base shapes, r = 4, FFN matrices trained: 451,872 at first, 83,232 at the end."""
    with torch.device("meta"):
        def block():
            return nn.ModuleDict(dict({n: nn.Linear(768, 768) for n in "qkvo"},
                                      up=nn.Linear(768, 3072), down=nn.Linear(3072, 768)))
        model, lora = (nn.ModuleList(block() for _ in range(12)) for _ in range(2))
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = add_adapters(model, [*"qkvo", "up", "down"], rank=4, train_matrices=["up", "down"])
    freezer = AdaptiveFreezer(layers, 20000, 1000, 14000)
    assert count(model) == 451_872
    optimizer = torch.optim.AdamW(model.parameters())
    freezer.scores = lambda: {name: i for i, name in enumerate(freezer.live)}
    for step in range(1, 20001):
        freezer.freeze(step, optimizer)
    assert count(model) == 83_232 and 118_000 < freezer.average_trainable() < 147_000
    add_adapters(lora, [*"qkvo", "up", "down"], rank=8, method="lora")
    assert count(lora) == 1_327_104


def test_freezer_state_resumes():
    """A freezer and model rebuilt from state_dict() in mid-run go on to the same freezing steps."""
    def half(model, layers, freezer, steps):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in steps:
            loss_of(model, data()[step % 8]).backward()
            freezer.update()
            freezer.freeze(step, optimizer)
            optimizer.zero_grad(set_to_none=True)
        return optimizer
    whole, first, second = ((*adapted(), ) for _ in range(3))
    freezers = [AdaptiveFreezer(layers, 200, 20, 50) for _, layers in (whole, first, second)]
    half(*whole, freezers[0], range(1, 141))
    half(*first, freezers[1], range(1, 91))
    state = copy.deepcopy(freezers[1].state_dict())
    freezers[2].load_state_dict(state)
    half(*second, freezers[2], range(91, 141))
    assert freezers[2].frozen_at == freezers[0].frozen_at and 0 < len(freezers[2].live) < 12
    assert torch.equal(freezers[2].Ibar, freezers[0].Ibar)
    assert torch.equal(freezers[2].Ubar, freezers[0].Ubar)
    assert freezers[2].average_trainable() == freezers[0].average_trainable()
    for other, what in ((AdaptiveFreezer(adapted()[1], 300, 20, 50), "total_steps is 200 there"),
                        (AdaptiveFreezer(adapted(["up"])[1], 200, 20, 50), "matrices is")):
        with pytest.raises(AFLoRAError, match=what):
            other.load_state_dict(state)


# ------------------------------------------------------------------------------- adapter files

@pytest.mark.parametrize("options", [
    dict(train_matrices=["up"]), dict(method="lora", rank=6), dict(method="elora", rank=100),
    dict(targets=r"blocks\.0\.\w+", train_matrices="none", modules_to_save=())])
def test_adapter_file_round_trip(tmp_path, options):
    """A trained adapter in a fresh base model, head included, gives the very same output bits."""
    model, _ = adapted(**options)
    train(model, lambda epoch: data(), loss_of, epochs=2, lr=1e-2)
    save_adapter(model, tmp_path / "a.pt")
    torch.manual_seed(0)
    for fresh in (Net(), adapted(**options)[0]):  # a plain model, and one that is adapted already
        if "modules_to_save" not in options:
            fresh.head.reset_parameters()
        load_adapter(fresh, tmp_path / "a.pt")
        assert torch.equal(fresh(data()[0][0]), model(data()[0][0]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_statistics_of_a_frozen_base_are_saved(tmp_path):
    """BatchNorm's running mean and variance move in training though its weights rest."""
    torch.manual_seed(0)
    model, ids = Tied(nn.BatchNorm1d), torch.arange(9)
    plain = copy.deepcopy(model)
    add_adapters(model, ["one"])
    train(model, lambda epoch: [ids] * 9, lambda model, ids: F.cross_entropy(model(ids), ids),
          epochs=2, lr=1e-2)
    assert not torch.equal(model.norm.running_var, plain.norm.running_var)
    save_adapter(model, tmp_path / "adapter.pt")
    load_adapter(plain, tmp_path / "adapter.pt")
    assert torch.equal(plain.eval()(ids), model.eval()(ids))


def test_random_matrices_are_stored_as_a_seed(tmp_path):
    """Attention matrices that never trained are not in the file; their checksum guards the seed."""
    model, _ = adapted(train_matrices=["up", "down"])
    train(model, lambda epoch: data(), loss_of, epochs=1, lr=1e-2)
    save_adapter(model, path := tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    assert {n for n in content["at_start"]} == {
        f"blocks.{i}.query.lora_{m}" for i in range(2) for m in "AB"}
    assert "blocks.0.up.lora_A" in content["learned"] and "head.bias" in content["learned"]
    content["at_start"]["blocks.1.query.lora_B"] = "0" * 64
    torch.save(content, path)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(AFLoRAError, match="blocks.1.query.lora_B.*regrown"):
        load_adapter(model, path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_files_for_another_model_say_what_differs(tmp_path):
    """Rank, targets, seed, depth, width or head of another model: refused by name."""
    save_adapter(adapted()[0], path := tmp_path / "a.pt")
    with pytest.raises(AFLoRAError, match="rank is 4 there, 8 here"):
        load_adapter(adapted(rank=8)[0], path)
    with pytest.raises(AFLoRAError, match="targets"):
        load_adapter(adapted(targets=["query"])[0], path)
    with pytest.raises(AFLoRAError, match="seed is 0 there, 3 here"):
        torch.manual_seed(0)
        other = Net()
        add_adapters(other, ("query", "up", "down"), modules_to_save=["head"], seed=3)
        load_adapter(other, path)
    for other, what in ((Net(depth=3), "blocks.2.query"), (Net(width=4), "query"),
                        (Net(classes=3), "head.weight"), (nn.Sequential(nn.Linear(2, 2)), "query")):
        with pytest.raises(AFLoRAError, match=what):
            load_adapter(other, path)
    merge_adapters(model := adapted()[0])
    assert not any(layer.merged for layer in load_adapter(model, path).values())
    with pytest.raises(AFLoRAError, match="add_adapters"):
        save_adapter(Net(), tmp_path / "b.pt")


class Bomb:
    def __reduce__(self):
        return (open, (str(Bomb.marker), "w"))


def test_adapter_files_cannot_run_code(tmp_path):
    """A pickled call is refused before it runs; so are damaged and missing files."""
    Bomb.marker = tmp_path / "ran"
    torch.save(dict(format=aflora.ADAPTER_FORMAT, config=Bomb()), path := tmp_path / "a.pt")
    with pytest.raises(AFLoRAError, match="a.pt"):
        load_adapter(Net(), path)
    assert not Bomb.marker.exists()
    save_adapter(adapted()[0], path)
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:len(whole) // 2], whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(AFLoRAError, match="a.pt"):
            load_adapter(Net(), path)
    with pytest.raises(AFLoRAError, match="missing.pt"):
        load_adapter(Net(), tmp_path / "missing.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """What cannot be written whole is not written at all, and leaves no temporary file."""
    aflora.write_file(path := tmp_path / "f", b"old")
    with pytest.raises(Exception):
        aflora.write_file(path, lambda: "no pickle of this")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------- FreezeNet

class Conv(nn.Module):
    """A small image network: kernels, matrices, biases and a norm's vectors."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.LayerNorm(8)
        self.up, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.up(torch.relu(self.conv(x)).flatten(1)))))


def seed_weights(model, seed):
    """The start of the MNIST example's networks."""
    sys.path.append(str(Path(__file__).parent / "examples"))
    import freezenet_mnist
    freezenet_mnist.seed_weights(model, seed)
    return model


def images(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    x[:, 1] = 0  # a dead channel: its kernels have a gradient of exactly 0
    return x, torch.randint(3, (16,), generator=generator)


def seeded(keep=None, kind="gradient", seed=0, dtype=torch.float32):
    """(network at its seeded start, {name: mask} of one shot at it)."""
    model = seed_weights(Conv(), seed).to(dtype)
    one_shot = None if keep is None else aflora.freeze_one_shot(
        model, lambda model: loss_of(model, images(dtype=dtype)), keep, kind)
    return model, one_shot


@pytest.mark.parametrize("kind", ["gradient", "gradient-weight", "weight"])
@pytest.mark.parametrize("keep", [0.03, 0.5, 0.93])
def test_one_shot_keeps_the_highest_saliencies_of_all(kind, keep):
    """The masks against a sort in plain Python; equal saliencies in the order of the elements."""
    model = seeded()[0]
    loss_of(model, images()).backward()
    pairs = [(p.detach().flatten().tolist(), p.grad.flatten().tolist())
             for p in model.parameters()]
    score = dict(gradient=lambda w, g: abs(g), weight=lambda w, g: abs(w))
    if kind == "gradient-weight":  # in float32, as the scores are
        score[kind] = lambda w, g: abs(float(np.float32(w) * np.float32(g)))
    saliency = [score[kind](w, g) for ws, gs in pairs for w, g in zip(ws, gs)]
    assert len(set(saliency)) < len(saliency)  # zeros: there are ties
    k = round(keep * len(saliency))
    chosen = set(sorted(range(len(saliency)), key=lambda i: -saliency[i])[:k])
    _, masks = seeded(keep, kind)
    found = torch.cat([masks[name].flatten() for name, _ in model.named_parameters()])
    assert set(found.nonzero()[:, 0].tolist()) == chosen and len(chosen) == k


def test_one_shot_trains_as_a_masked_dense_network():
    """Forward and gradients in float64: the kept vector's are the dense ones where the mask is."""
    model, masks = seeded(0.2, dtype=torch.float64)
    dense, _ = seeded(dtype=torch.float64)
    with torch.no_grad():  # away from the start, so that values and start differ
        for p in model.parameters():
            p += 0.3 * p.requires_grad
        for name, p in dense.named_parameters():
            p += 0.3 * masks[name].double()
    batch = images(1, torch.float64)
    torch.testing.assert_close(model(batch[0]), dense(batch[0]), rtol=0, atol=1e-14)
    loss_of(model, batch).backward()
    loss_of(dense, batch).backward()
    kept = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum(grad.numel() for grad in kept.values()) == sum(int(m.sum()) for m in masks.values())
    for name, p in dense.named_parameters():
        module, key = name.rsplit(".", 1)
        ours = kept.get(f"{module}.parametrizations.{key}.original", kept.get(name, p.grad[:0]))
        torch.testing.assert_close(ours.flatten(), p.grad[masks[name]], rtol=0, atol=1e-14)


def test_what_one_shot_froze_never_moves():
    """After 100 AdamW steps with decay the frozen elements are the seed's bits, the kept are not;
    the optimizer holds a state for as many values as are kept."""
    model, masks = seeded(0.1, "gradient-weight")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2,
                                  weight_decay=0.1)
    for _ in range(100):
        loss_of(model, images()).backward()
        optimizer.step()
        optimizer.zero_grad()
    start = seeded()[0]
    for name, mask in masks.items():
        module = model.get_submodule(name.rsplit(".", 1)[0])
        value = getattr(module, name.rsplit(".", 1)[1])
        assert torch.equal(value[~mask], start.get_parameter(name)[~mask])
        assert (value[mask] != start.get_parameter(name)[mask]).all()
    total = sum(mask.numel() for mask in masks.values())
    assert sum(s["exp_avg"].numel() for s in optimizer.state.values()) == round(0.1 * total)


def test_freezenet_file_is_a_seed_positions_and_values(tmp_path):
    """A fresh network regrows to the same bits from a file; wrong seeds, changed bits and networks
    that already hold masks are refused. (How small it is: the LeNet test.)"""
    model, masks = seeded(0.05, seed=7)
    train(model, lambda epoch: [images()], loss_of, epochs=20, lr=1e-2)
    save_adapter(model, path := tmp_path / "net.pt")
    content = torch.load(path, weights_only=True)
    assert sum(t.numel() for t in content["learned"].values()) == sum(
        int(mask.sum()) for mask in masks.values())
    assert path.stat().st_size < 8000  # names, shapes and checksums; here they outweigh the values
    load_adapter(fresh := seeded(seed=7)[0], path)
    assert torch.equal(fresh(images(1)[0]), model(images(1)[0]))
    for wrong in (seeded(0.05, seed=7)[0], Conv()):
        with pytest.raises(AFLoRAError, match="the start it had and nothing frozen"):
            load_adapter(wrong, path)
    with pytest.raises(AFLoRAError, match="seed is 7 there, 8 here"):
        load_adapter(seeded(seed=8)[0], path)
    whole = bytearray(path.read_bytes())
    value = content["learned"]["conv.weight"].numpy().tobytes()
    whole[whole.index(value)] ^= 1
    path.write_bytes(whole)
    before = [p.clone() for p in fresh.parameters()]
    with pytest.raises(AFLoRAError, match="net.pt"):
        load_adapter(fresh, path)
    content["config"]["seed"] = 8
    torch.save(content, path)
    with pytest.raises(AFLoRAError, match="regrown"):
        load_adapter(seeded(seed=8)[0], path)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), before))


def test_kept_elements_of_adapters_are_saved_sparsely(tmp_path):
    """The same file mechanism serves adapters of which one shot keeps some elements."""
    model, layers = adapted(targets=["up"], modules_to_save=())
    masks = {f"blocks.{i}.up.lora_{m}": torch.zeros(shape, dtype=torch.bool)
             for i in range(2) for m, shape in (("A", (4, 8)), ("B", (24, 4)))}
    masks["blocks.1.up.lora_B"][3, 1:3] = True
    aflora.keep_elements(model, masks)
    train(model, lambda epoch: data(), loss_of, epochs=2, lr=1e-2)
    save_adapter(model, path := tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    assert content["learned"]["blocks.1.up.lora_B"].shape == (2,)
    assert len(content["at_start"]) == 4 and "blocks.0.up.lora_A" not in content["learned"]
    torch.manual_seed(0)
    load_adapter(fresh := Net(), path)
    assert torch.equal(fresh(data()[0][0]), model(data()[0][0]))


def test_the_ends_of_keep_and_wrong_one_shots():
    """keep = 0 trains nothing, keep = 1 everything; other values and a lost gradient are errors."""
    none, masks = seeded(0)
    assert not any(p.requires_grad for p in none.parameters())
    assert not any(mask.any() for mask in masks.values())
    everything, masks = seeded(1)
    assert all(p.requires_grad for p in everything.parameters())
    assert [n for n, _ in everything.named_parameters()] == list(masks)  # nothing parametrized
    some, masks = seeded(0.5)
    with pytest.raises(AFLoRAError, match="conv.weight .are parts of it frozen"):
        aflora.keep_elements(some, masks)
    for keep in (-0.1, 1.1, math.nan):
        with pytest.raises(AFLoRAError, match="keep"):
            seeded(keep)
    model = seeded()[0]
    for loss in (lambda m: 0 * loss_of(m, images()), lambda m: math.inf * loss_of(m, images()),
                 lambda m: torch.zeros(())):
        with pytest.raises(AFLoRAError, match="gradient"):
            aflora.freeze_one_shot(model, loss, 0.5)
    with pytest.raises(AFLoRAError, match="sensitivity"):
        aflora.freeze_one_shot(model, lambda m: loss_of(m, images()), 0.5, "grad")
    layers = adapted(modules_to_save=())[1]  # at s_b = 0 every gradient of A and B is zero
    with pytest.raises(AFLoRAError, match="gradient"):
        aflora.freeze_one_shot(layers["blocks.0.up"], lambda m: m(torch.ones(8)).sum(), 0.5,
                               names=["lora_A", "lora_B"])


# --------------------------------------------------------------------------- the training loop

def test_train_equals_a_loop_written_by_hand():
    """fp32: every weight and freezing step equals a plain loop's with clip_grad_norm_, LambdaLR."""
    model, layers = adapted()
    reference, reference_layers = adapted()
    freezer, report = run(model, layers, clip=0.5, head_lr=3e-3)
    by_hand = AdaptiveFreezer(reference_layers, 80, 8, 24)
    groups = {}
    for name, p in reference.named_parameters():
        if p.requires_grad:
            key = 3e-3 if "head" in name else 1e-2, 0.1 if p.dim() > 1 else 0
            groups.setdefault(key, []).append(p)
    optimizer = torch.optim.AdamW([dict(params=ps, lr=lr, weight_decay=decay)
                                   for (lr, decay), ps in groups.items()])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(
        (s + 1) / (0.06 * 80 + 1), (80 - s) / (80 * 0.94)))
    for step in range(1, 81):
        loss_of(reference, data()[(step - 1) % 8]).backward()
        by_hand.update()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        by_hand.freeze(step, optimizer)
        optimizer.zero_grad()
    assert freezer.frozen_at == by_hand.frozen_at and report["steps"] == 80
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision, rtol", [("fp32", 1e-5), ("bf16", 0.1), ("fp16", 0.02)])
def test_scores_see_whole_unscaled_unclipped_gradients(precision, rtol):
    """Weights held still: scores equal a plain loop's, whatever clipping, scaler, micro-batches."""
    batches, freezers = data(batches=30, size=4), []
    for by_hand in (False, True):
        model, layers = adapted()
        perturb(model)
        freezers.append(freezer := AdaptiveFreezer(layers, 8, 2, 2, interval=2))
        freezer.freeze = lambda step, optimizer: []
        if not by_hand:
            report = train(model, lambda epoch: batches, loss_of, epochs=1, lr=1e-12, clip=1e-3,
                           accumulate=4, freezer=freezer, precision=precision)
            assert report["steps"] == 8 and report["skipped"] == 0
        for group in [batches[i:i + 4] for i in range(0, 30, 4)] if by_hand else []:
            torch.stack([loss_of(model, batch) for batch in group]).mean().backward()
            freezer.update()
            model.zero_grad()
    for flat, expected in zip((freezers[0].Ibar, freezers[0].Ubar),
                              (freezers[1].Ibar, freezers[1].Ubar)):
        assert (flat - expected).norm() < rtol * expected.norm() and expected.norm() > 0


class NoTransfer(TorchDispatchMode):
    """Raises where a value of a tensor is asked for one by one: item(), float(), bool()."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_never_waits_for_the_device(precision, monkeypatch):
    """Not one item(), float() or bool() of a tensor in a run, nor a copy to the host or a shape
    that depends on values; tolist() once for a logged line and once for a look that freezes."""
    model, layers = adapted()
    lists, lines, given = [], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: [lists.append(t), given(t)][1])
    for waiting in ("cpu", "numpy", "nonzero", "__array__"):
        monkeypatch.setattr(torch.Tensor, waiting, None)
    with NoTransfer():
        freezer, _ = run(model, layers, precision=precision, on_log=lines.append)
    assert len(freezer.frozen_at) == 12
    assert len(lists) == len(lines) + len(set(freezer.frozen_at.values()))
    with pytest.raises(AssertionError), NoTransfer():
        bool(torch.ones(1))


def test_the_bar_says_what_is_frozen_and_how_fast(monkeypatch):
    """Examples per second, mean loss, frozen k/n beside the scheduled share, learning rate."""
    shown = []
    monkeypatch.setattr(aflora.tqdm, "set_postfix_str",
                        lambda bar, text, refresh: shown.append(text))
    model, layers = adapted()
    lines = []
    run(model, layers, on_log=lines.append)
    assert len(shown) == len(lines)
    for text, line in zip(shown, lines):
        found = re.fullmatch(r"(\d+) examples/s, loss ([\d.]+), frozen (\d+)/12 "
                             r"\(scheduled ([\d.]+)\), lr ([\d.e+-]+)", text)
        examples = 16 * line["step"]  # data() has batches of 16
        assert abs(int(found[1]) - examples / line["seconds"]) <= 0.5
        assert [int(found[3]) / 12, float(found[5])] == [line["frozen"], float(f"{line['lr']:.1e}")]
        assert abs(float(found[2]) - line["loss"]) < 1e-3
        assert abs(float(found[4]) - line["scheduled"]) < 1e-2


def test_micro_batches_equal_one_big_batch():
    """Four micro-batches give the scores, freezing steps and weights of their union."""
    small = data(batches=32, size=4)
    big = [(torch.cat([x for x, _ in small[i:i + 4]]), torch.cat([y for _, y in small[i:i + 4]]))
           for i in range(0, 32, 4)]
    results = []
    for batches, accumulate in ((small, 4), (big, 1)):
        model, layers = adapted()
        total = 8
        freezer = AdaptiveFreezer(layers, total, 2, 2, interval=2)
        run(model, layers, epochs=1, batches=batches, freezer=freezer, accumulate=accumulate)
        results.append((freezer.frozen_at, [p.detach() for p in model.parameters()]))
    assert results[0][0] == results[1][0] and len(results[0][0]) == 12
    for p, q in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(precision):
    """The loss falls, the head and vectors move, frozen base weights come back as they were."""
    model, layers = adapted()
    before = copy.deepcopy(model.state_dict())
    lines = []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        return dict(dev_loss=loss_of(model, data()[0]).item())

    def spy(parameters):
        assert model.training
    freezer, report = run(model, layers, epochs=20, precision=precision, on_log=lines.append,
                          evaluate=evaluate, on_gradients=spy)
    assert report["history"][-1]["loss"] < 0.8 * report["history"][0]["loss"]
    assert report["history"][-1]["dev_loss"] < report["history"][0]["dev_loss"]
    assert len(freezer.frozen_at) == 12 and len(report["history"]) == 20
    assert report["steps"] + report["skipped"] == 160
    for name, value in model.state_dict().items():
        if "base" in name or "norm" in name:
            assert torch.equal(value, before[name]) and value.dtype == torch.float32
        elif "lora" not in name:
            assert not torch.equal(value, before[name])
    steps = [line["step"] for line in lines]
    assert set(range(10, 160, 10)) <= set(steps)
    assert all(line["frozen"] == math.floor(line["scheduled"] * 12) / 12 for line in lines
               if line["step"] in freezer.looks)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_head_of_a_half_precision_model_trains_in_float32(precision):
    """Steps below half precision's resolution add up, and the scaler can unscale: the head of a
    half-precision model moves as the float32 model's does."""
    moved = []
    for dtype in (torch.float32, aflora.COMPUTE_TYPES[precision]):
        torch.manual_seed(0)
        model = Net().to(dtype)
        model.head.weight.data.fill_(1)
        add_adapters(model, ["up"], modules_to_save=["head"])
        train(model, lambda epoch: [(x.to(dtype), y) for x, y in data()], loss_of, epochs=2,
              lr=1e-4, precision=precision)
        assert model.blocks[0]["norm"].weight.dtype == dtype
        moved.append(model.head.weight.detach() - 1)
    torch.testing.assert_close(*moved, rtol=0, atol=5e-5)
    assert moved[1].dtype == torch.float32 and 0 < moved[1].abs().min() < 1e-3 < 2**-8


def test_gradients_from_before_do_not_count():
    """What a backward() before train() left, also in frozen weights, changes nothing."""
    reports = []
    for before in (False, True):
        torch.manual_seed(0)
        model = Net()
        if before:
            (100 * loss_of(model, data()[0])).backward()
        layers = add_adapters(model, ["up"], modules_to_save=["head"])
        reports.append(run(model, layers, epochs=2)[1]["history"])
    assert reports[0] == reports[1]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="device 0 is there")
def test_the_device_given_by_number_is_taken():
    """device=0 is the first accelerator, not "none given": without one an error, no CPU run."""
    with pytest.raises(RuntimeError, match="accelerator|CUDA"):
        train(adapted()[0], lambda epoch: data(), loss_of, epochs=1, lr=1e-2, device=0)


def test_an_overflowed_fp16_step_changes_nothing_and_is_not_counted():
    """While the scaler halves its scale, scores and weights wait; only completed steps count."""
    model, layers = adapted()
    freezer = AdaptiveFreezer(layers, 16, 2, 4, interval=2)
    seen = []

    def loss(model, batch):  # the first three steps overflow in float16 at any scale
        factor = 1e30 if len(seen) < 3 else 1.0
        return loss_of(model, batch) * factor

    def spy(parameters):
        seen.append((freezer.Ibar.clone(), [p.detach().clone() for p in model.parameters()]))
    report = train(model, lambda epoch: data(), loss, epochs=2, lr=1e-2, freezer=freezer,
                   precision="fp16", on_gradients=spy)
    assert report["skipped"] == 3 and report["steps"] == 13
    for Ibar, weights in seen[1:4]:
        assert Ibar.eq(0).all() and all(map(torch.equal, weights, seen[0][1]))
    assert not all(map(torch.equal, seen[4][1], seen[0][1])) and seen[5][0].ne(0).any()
    assert len(freezer.frozen_at) == 12 and all(s % 2 == 0 for s in freezer.frozen_at.values())
    with pytest.raises(AFLoRAError, match="not finite.*learning rate"):
        train(adapted()[0], lambda epoch: data(), lambda m, b: loss_of(m, b) * 1e38 * 1e38,
              epochs=1, lr=1e-2)


def test_bad_steps_in_fp32_stop_the_run_and_spare_the_weights():
    """A non-finite gradient never reaches the weights, and the error says where and what to do."""
    model, layers = adapted()
    before = [p.detach().clone() for p in model.parameters()]

    def loss(model, batch):  # finite, but with a gradient of inf * 0
        return loss_of(model, batch) + (model.head.weight.sum() * 0).abs().sqrt()
    with pytest.raises(AFLoRAError, match="not finite"):
        train(model, lambda epoch: data(), loss, epochs=1, lr=1e-2)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("options, word", [
    (dict(precision="fp8"), "precision"), (dict(epochs=0), "epochs"), (dict(lr=-1.0), "lr"),
    (dict(accumulate=0), "accumulate"), (dict(clip=0), "clip"), (dict(warmup=1.5), "warmup")])
def test_wrong_training_arguments(options, word):
    """Impossible arguments are refused by name before anything runs."""
    with pytest.raises(AFLoRAError, match=word):
        train(adapted()[0], lambda epoch: data(), loss_of, **(dict(epochs=1, lr=1e-2) | options))


def test_train_checks_what_it_is_given():
    """A freezer for another number of steps, and a model in which nothing trains, are refused."""
    model, layers = adapted()
    with pytest.raises(AFLoRAError, match="8"):
        train(model, lambda epoch: data(), loss_of, epochs=1, lr=1e-2,
              freezer=AdaptiveFreezer(layers, 500, 10, 20))
    with pytest.raises(AFLoRAError, match="nothing"):
        train(Net().requires_grad_(False), lambda epoch: data(), loss_of, epochs=1, lr=1e-2)
    for batches, what in ((lambda epoch: data()[epoch:], "as many in each epoch"),
                          (lambda epoch: [], "batches >= 1")):
        with pytest.raises(AFLoRAError, match=what):
            train(model, batches, loss_of, epochs=2, lr=1e-2)


def resumable(path, precision="fp32", **options):
    """A run of 60 steps with dropout, three steps an epoch, freezing from step 6 to 44; in fp16 the
    scaler overflows at its start. Returns everything that it made, times aside."""
    def loss(model, batch):
        dropped = F.dropout(batch[0], 0.3, model.training)
        return (1e4 if precision == "fp16" else 1) * loss_of(model, (dropped, batch[1]))
    model, layers = adapted(train_matrices=["up", "down"])
    torch.manual_seed(5)
    freezer, lines = AdaptiveFreezer(layers, 60, 6, 16), []
    report = train(model, lambda epoch: data(batches=6, seed=epoch), options.pop("loss", loss),
                   epochs=20, lr=1e-2, accumulate=2, precision=precision, freezer=freezer,
                   checkpoint=path, on_log=lines.append, weight_decay=0.1,
                   evaluate=lambda m: dict(loss=loss_of(m, data(seed=9)[0]).item()), **options)
    report.pop("seconds")
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return model.state_dict(), dict(report=report, lines=lines, frozen_at=freezer.frozen_at,
                                    average=freezer.average_trainable())


def stop_after(steps):
    """A stop() of train() that is true from its call number `steps` on."""
    calls = itertools.count(1)
    return lambda: next(calls) >= steps


def assert_same_run(one, other):
    assert one[1] == other[1]
    assert all(torch.equal(a, b) for a, b in zip(one[0].values(), other[0].values()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, precision):
    """Bit for bit: weights, scores, freezing, log, metrics; stopped before t_i, in the ramp, at the
    end of an epoch, in the middle of one, after everything is frozen, after the last step."""
    whole = resumable(tmp_path / "whole.pt", precision)
    assert len(whole[1]["frozen_at"]) == 8 and (whole[1]["report"]["skipped"] > 0) == (
        precision == "fp16")
    for steps in (2, 5, 21, 23, 37, 50, 58, 60):
        path = tmp_path / f"{steps}.pt"
        with pytest.raises(KeyboardInterrupt):
            resumable(path, precision, stop=stop_after(steps))
        assert_same_run(resumable(path, precision, resume=True), whole)
    assert path.stat().st_size < 60_000 and not list(tmp_path.glob("*.part"))


def test_a_run_that_died_between_micro_batches_resumes(tmp_path):
    """What a lost run had done since its checkpoint is done again, to the same bits; twice."""
    def dies_at(call):
        calls = itertools.count(1)

        def loss(model, batch):
            if next(calls) == call:
                raise RuntimeError("killed")
            return loss_of(model, (F.dropout(batch[0], 0.3, model.training), batch[1]))
        return loss
    options = dict(path=tmp_path / "c.pt", checkpoint_every=4)
    whole = resumable(tmp_path / "whole.pt")
    with pytest.raises(RuntimeError, match="killed"):
        resumable(**options, loss=dies_at(56))
    with pytest.raises(RuntimeError, match="killed"):
        resumable(**options, loss=dies_at(20), resume=True)
    assert_same_run(resumable(**options, resume=True), whole)


def test_a_checkpoint_from_more_gpus_resumes(tmp_path, monkeypatch):
    """The random states of devices that are not there now are left out."""
    class Set(Exception):
        pass

    def set_all(states):
        raise Set(len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16)] * 3)
    resumable(tmp_path / "c.pt")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", set_all)
    with pytest.raises(AFLoRAError, match=r"Set\(2\)"):
        resumable(tmp_path / "c.pt", resume=True)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    """The message names what differs; an adapter file is no checkpoint; damage is found."""
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        resumable(path, stop=stop_after(7))

    def again(match, lr=1e-2, freezer=(60, 6, 16), **options):
        model, layers = adapted(**dict(dict(train_matrices=["up", "down"]), **options))
        with pytest.raises(AFLoRAError, match=match):
            train(model, lambda epoch: data(batches=6), loss_of, epochs=20, lr=lr, accumulate=2,
                  freezer=AdaptiveFreezer(layers, *freezer), checkpoint=path, resume=True,
                  weight_decay=0.1)
    again("lr is 0.01 there, 0.02 here", lr=2e-2)
    again("schedule is .*'t_i': 6.* there, .*'t_i': 9.* here", freezer=(60, 9, 16))
    again("interval is 10 there, 5 here", freezer=(60, 6, 16, 5))
    again("rank is 4 there, 8 here", rank=8)
    again("targets is", targets=["up", "down"])
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        path.write_bytes(damaged)
        again("c.pt")
    save_adapter(adapted()[0], path)
    again("it is no aflora checkpoint")


def test_no_checkpoint_after_a_bad_step(tmp_path):
    """A run that meets a NaN stops, names its first bad step, leaves the last good checkpoint."""
    batches = data(batches=6)
    options = dict(epochs=2, lr=1e-2, checkpoint=tmp_path / "c.pt", checkpoint_every=2)
    bad = [(x * math.nan, y) if i == 2 else (x, y) for i, (x, y) in enumerate(batches)]
    with pytest.raises(AFLoRAError, match="from step 3 on.*learning rate"):
        train(adapted()[0], lambda epoch: bad, loss_of, **options)
    kept = torch.load(tmp_path / "c.pt", weights_only=True)
    assert kept["at"]["step"] == 2
    train(adapted()[0], lambda epoch: batches, loss_of, resume=True, **options)


def test_fp16_stops_where_a_loss_is_not_finite():
    """Overflowed gradients are the scaler's business, a NaN loss is not: the run names the step."""
    bad = [(x * math.nan, y) if i == 3 else (x, y) for i, (x, y) in enumerate(data())]
    with pytest.raises(AFLoRAError, match="from step 4 on"):
        train(adapted()[0], lambda epoch: bad, loss_of, epochs=2, lr=1e-2, precision="fp16")


def test_batches_may_be_dicts():
    """Nested dicts, tuples and lists of tensors reach the loss as they are."""
    model, _ = adapted()
    batches = [dict(inputs=[x], labels=y) for x, y in data()]
    report = train(model, lambda epoch: batches, lambda model, batch: F.cross_entropy(
        model(batch["inputs"][0]), batch["labels"]), epochs=1, lr=1e-2)
    assert report["steps"] == 8


def test_the_demonstration_freezes_everything(capsys):
    """python aflora.py prints the equations' numbers and freezes all four matrices in the ramp."""
    aflora.demo()
    out = capsys.readouterr().out
    assert "(5) s" in out and "'2.lora_B': 200" in out and out.count("0.lora_") >= 2


# ------------------------------------------------------- the companion: tiny files to work on

CONFIG = dict(
    model_type="bert", hidden_act="gelu", vocab_size=60, hidden_size=32, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=48, max_position_embeddings=128, type_vocab_size=2,
    layer_norm_eps=1e-12, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] a the good bad fine poor movie film plot is was not "
         "##s").split() + [f"word{i}" for i in range(42)]
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def checkpoint(inner=48):
    """{Hugging Face's name: random tensor} of a BERT as CONFIG has it."""
    layer = {f"attention.self.{part}": (32, 32) for part in ("query", "key", "value")} | {
        "attention.output.dense": (32, 32), "attention.output.LayerNorm": (32,),
        "intermediate.dense": (inner, 32), "output.dense": (32, inner), "output.LayerNorm": (32,)}
    shapes = {f"encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes["embeddings.LayerNorm"] = (32,)
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()} | {
        f"{name}.bias": shape[:1] for name, shape in shapes.items()} | {
        f"embeddings.{name}_embeddings.weight": (size, 32)
        for name, size in dict(word=60, position=128, token_type=2).items()}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def safetensors(tensors, **changed):
    """The bytes of a .safetensors file; `changed` replaces fields of every tensor's entry."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        values = tensor.numpy().tobytes()
        header[name] = dict(dtype="F32", shape=tensor.shape,
                            data_offsets=[len(data), len(data) + len(values)]) | changed
        data += values
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Keeps the user's cache and the network out of the tests."""
    def download(address, real=glue.download):
        if "127.0.0.1" not in address:
            raise OSError("no network in a test")
        return real(address)
    monkeypatch.setattr(glue, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(glue, "UNREACHABLE", {}, raising=False)
    monkeypatch.setattr(glue, "download", download)
    monkeypatch.setenv("no_proxy", "*")  # the tests' own servers are here


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def make_folder(tmp_path):
    """A folder with a tiny random BERT, SST-2 (24 + 9 rows), MRPC (16 + 4; a BOM, raw quotes)."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "model.safetensors").write_bytes(safetensors(checkpoint()))
    for name in ("SST-2", "MRPC"):
        (tmp_path / name).mkdir()
    for part, count in ("train", 24), ("dev", 9):
        rows = (f'a film {"is " * (i % 5)}{("bad", "good")[i % 2]}\t{i % 2}' for i in range(count))
        (tmp_path / f"SST-2/{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    rows = [f'{i % 2}\t{i}\t{i + 50}\t"a film "{i}\tthe plot\'s "good\r\n' for i in range(20)]
    (tmp_path / "MRPC/msr_paraphrase_train.txt").write_bytes(
        ("\ufeff" + MRPC_HEADER + "".join(rows)).encode())
    (tmp_path / "MRPC/dev_ids.tsv").write_text("0\t50\n3\t53\n4\t54\n19\t69\n")
    return tmp_path


def load_tiny(folder):
    """(classifier, tokenizer) of the tiny BERT."""
    model = glue.BertClassifier(glue.Bert.load(folder))
    return model, glue.WordPieceTokenizer(folder / "vocab.txt")


def random_rows(count, longest):
    """Rows of the tiny vocabulary's words, every third a pair."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[5:-1], k=draw.randint(1, longest))) for _ in range(count)]
    return [(text, texts[-i] if i % 3 == 0 else None, i % 2) for i, text in enumerate(texts)]


# --------------------------------------------------------------- the companion against transformers

@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_bert_equals_transformers(tmp_path, file):
    """Hidden states and every gradient equal BertModel's, from new and old checkpoint files."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel(transformers.BertConfig(**CONFIG), add_pooling_layer=False)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)  # LayerNorms too, so that no two parameters are alike
    theirs.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        state = {f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace(
            "Norm.bias", "Norm.beta"): p for name, p in theirs.state_dict().items()}
        torch.save(state | {"cls.predictions.bias": torch.zeros(60)}, tmp_path / file)
    ours, theirs = glue.Bert.load(tmp_path).double().eval(), theirs.double().eval()
    mask = torch.arange(11) < torch.tensor([[11], [7], [1]])
    segments = torch.arange(33).view(3, 11) % 2
    ids = torch.randint(1, 60, (3, 11)) * mask  # theirs gives id 0, the padding, no gradient
    x = ours(ids, segments, mask)[mask]
    y = theirs(ids, attention_mask=mask.long(), token_type_ids=segments).last_hidden_state[mask]
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    pull = torch.randn_like(x)
    (x * pull).sum().backward()
    (y * pull).sum().backward()
    left = list(theirs.parameters())
    for p in ours.parameters():
        twin = next(q for q in left if torch.equal(p, q))
        torch.testing.assert_close(p.grad, twin.grad, rtol=1e-9, atol=1e-9)
        left = [q for q in left if q is not twin]
    assert not left


# All characters of Unicode 3.2. Hugging Face's tables are those of Unicode 8, Python's are newer:
# what came or changed its class since, four of these among it, may be split or dropped differently.
OLD = [c for c in map(chr, range(0x30000)) if c not in "\u166d\u1734\u1885\u1886" and
       unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")]
STRANGE = [
    "", " \t\n\r ", "Café NAÏVE Ångström ﬁne ﬃ",
    "漢字かな한국어 mixed漢with字latin \uf900\U00020001",
    "👩‍👩‍👧‍👦 👍🏽 🇺🇳 ❤️☃", "a\0b\ufffdc\x07d\x7fe\x85f\x1cg",
    "x" * 300, "a" * 100 + " " + "a" * 101,
    "[CLS] a[SEP]b [MASK]s [PAD][UNK] [cls] [ SEP ] [[SEP]]",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ ς", "İstanbul Iıi̇ ẞß",
    "e\u0301\u0327 \u0301 a\u0300\u0316\u0345 ệ",
    "soft\u00adhyphen zero\u200bwidth\u200d\ufeff",
    "line\u2028para\u2029nbsp\u00a0thin\u2009ideo\u3000x",
    "\ue000a\uf8ffb\U000f0000", "¡¿«…—‘’“§•",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "don't U.S.A. 3.14 $5 50% a_b a-b",
    "١٢٣ हिन्दी ไทย עִבְ"]


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """A function that asserts that all ids and segments are BertTokenizer's."""
    transformers = pytest.importorskip("transformers")
    small = tmp_path_factory.mktemp("vocabulary")
    letters = [c for c in map(chr, [*range(0x3000), *map(ord, "漢字豈\U00020001👩👍")])
               if unicodedata.category(c)[0] not in "CZ"]
    tokens = WORDS + ["don", "cafe", "##gs", "##trom"] + letters + ["##" + c for c in letters]
    (small / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")

    def check(texts, pairs=None, max_length=128, lower=True, folder=small):
        ours = glue.WordPieceTokenizer(folder / "vocab.txt", lower)
        theirs = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=lower)(
            texts, pairs, truncation=True, max_length=max_length)
        for text, pair, *expected in zip(texts, pairs or [None] * len(texts), theirs["input_ids"],
                                         theirs["token_type_ids"]):
            assert (text, pair, *ours.encode(text, pair, max_length)) == (text, pair, *expected)
    return check


@pytest.mark.parametrize("lower", [True, False])
def test_tokenizer_equals_transformers(compare, lower):
    """The very ids of BertTokenizer: strange texts and pairs, cut to odd and even lengths; each
    character of Unicode 3.2 between letters; 3,000 random mixtures."""
    texts, pairs = map(list, zip(*itertools.product(STRANGE, STRANGE)))
    for max_length in (3, 4, 5, 8, 9, 16, 31, 128):
        compare(STRANGE, None, max_length, lower)
        compare(texts, pairs, max_length, lower)
    words = [f"a{c}B" for c in OLD]
    compare([" ".join(words[i:i + 99]) for i in range(0, len(words), 99)], None, 999, lower)
    draw, accents, emoji = random.Random(0), range(0x300, 0x370), range(0x1f300, 0x1f650)
    kinds = [OLD[:256], OLD, STRANGE, WORDS, " ", [*map(chr, accents)], [*map(chr, emoji)]]
    texts = ["".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randint(0, 15)))
             for _ in range(3000)]
    compare(texts, texts[::-1], 30, lower)


def test_tokenizer_on_real_text(compare):
    """The same with MiniLM's vocabulary on SST-2 and MRPC, where they are."""
    model, data = (Path(os.environ.get(f"AFLORA_{name}") or "-") for name in ("TEST_MODEL", "DATA"))
    if not model.is_dir() or not data.is_dir():
        pytest.skip("AFLORA_TEST_MODEL or AFLORA_DATA names no folder")
    compare(STRANGE, STRANGE[::-1], folder=model)
    for name, max_length in itertools.product(("sst2", "mrpc"), (128, 33)):
        task = glue.load_task(name, data)
        texts, pairs, _ = map(list, zip(*task.dev, *task.train[:2000]))
        compare(texts, pairs if pairs[0] else None, max_length, folder=model)


# -------------------------------------------------------------------------- the companion's files

class Touch:
    """Unpickled by a careless reader, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


GOOD, LACKED = safetensors(checkpoint()), "encoder.layer.1.output.dense.bias"
BAD_FILES = [("model.safetensors", content) for content in (
    b"", GOOD[:4], GOOD[:999], GOOD[:-1], b"\xff" * 7 + b"\x7f" + GOOD[8:],
    b"\2" + bytes(7) + b"[]", b"\5" + bytes(7) + b"{JSON", safetensors(checkpoint(), dtype="F4"),
    safetensors({name: tensor for name, tensor in checkpoint().items() if name != LACKED}),
    safetensors(checkpoint(), shape=[2]), safetensors(checkpoint(inner=40)),
    *(safetensors(checkpoint(), data_offsets=offsets) for offsets in (
        [0, 4], [-4, 0], [10**15, 10**15 + 4], [0, "4"])))
] + [("pytorch_model.bin", content) for content in (b"", b"PK", {"a": Touch()}, [], {"a": 1})
] + [("model.safetensors", None)] + [("config.json", content) for content in (None, b"[]", b"{", *(
    json.dumps(CONFIG | change).encode() for change in (
        dict(model_type="roberta"), dict(hidden_act="relu"), dict(hidden_size=None))))
] + [("vocab.txt", content) for content in (None, b"\xff", b"[PAD]\n[UNK]\na")]
WRONG_SIZE = [("\n".join(WORDS[:-1]), "59 tokens"), ("\n".join([*WORDS, "more"]), "61 tokens")]


@pytest.mark.parametrize("vocabulary, what", WRONG_SIZE)
def test_a_vocabulary_of_another_size(folder, capsys, vocabulary, what):
    """A vocabulary that does not number the rows of the embeddings is refused: exit code 2."""
    (folder / "vocab.txt").write_text(vocabulary)
    assert run_main(folder, "") == 2 and what in capsys.readouterr().err


@pytest.mark.parametrize("file, content", BAD_FILES)
def test_bad_model_files(folder, monkeypatch, capsys, file, content):
    """Missing, cut, wrong or lacking something: refused by name, on the command line with exit
    code 2 and one line; no file can run code, and nothing is written."""
    monkeypatch.chdir(folder)
    os.remove("model.safetensors" if file == "pytorch_model.bin" else file)
    if content is not None:
        Path(file).write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(AFLoRAError, match=file):
        load_tiny(folder)
    assert run_main(folder, "") == 2
    message = capsys.readouterr().err
    assert file in message and message.count("\n") == 1 and "Traceback" not in message
    assert not Path("touched").exists() and not any((folder / "out").iterdir())


@pytest.mark.parametrize("setting", [dict(tokenize_chinese_chars=False), dict(strip_accents=False),
                                     dict(do_lower_case=False, strip_accents=True)])
def test_another_tokenizer_is_refused(folder, capsys, setting):
    """Settings under which this tokenizer's ids would be wrong are named; usual ones are taken."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(setting))
    assert run_main(folder, "") == 2
    message = capsys.readouterr().err
    assert "tokenizer_config.json" in message and list(setting)[-1] in message
    for usual in (dict(strip_accents=None), dict(do_lower_case=False, strip_accents=False)):
        path.write_text(json.dumps(usual))
        arguments = argparse.Namespace(model=str(folder), seed=0)
        tokenizer = glue.prepare(arguments, torch.device("cpu"))[1]
        assert tokenizer.lower_case == ("do_lower_case" not in usual)


def test_a_bert_without_a_second_segment(folder):
    """With one row of segment embeddings both texts of a pair get it."""
    tensors = checkpoint()
    name = next(name for name in tensors if "token_type" in name)
    tensors[name] = tensors[name][:1]
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(type_vocab_size=1)))
    model, tokenizer = load_tiny(folder)
    (ids, segments), encode = tokenizer.encode("a good film", "bad"), torch.tensor
    logits = [model.eval()(encode([ids]), encode([s]), torch.ones(1, len(ids), dtype=torch.bool))
              for s in (segments, [0] * len(ids))]
    assert 1 in segments and torch.equal(*logits)


def test_load_task(folder):
    """The rows, labels and splits of SST-2 and MRPC, quotes kept and the BOM dropped."""
    sst2, mrpc = (glue.load_task(name, folder) for name in ("sst2", "mrpc"))
    assert (sst2.title, len(sst2.train), len(sst2.dev)) == ("SST-2", 24, 9)
    assert sst2.train[4] == ("a film is is is is bad", None, 0)
    assert (mrpc.title, len(mrpc.train), len(mrpc.dev)) == ("MRPC", 16, 4)
    assert mrpc.dev[-1] == ('"a film "19', 'the plot\'s "good', 1)


@pytest.mark.parametrize("file, content, message", [
    ("SST-2/dev.tsv", None, "missing"), ("SST-2/dev.tsv", "", "line 1"),
    ("SST-2/dev.tsv", "sentence\tlabel\n", "no rows"), ("SST-2/train.tsv", "\udcff\t1\n", "UTF-8"),
    ("SST-2/train.tsv", "text\tlabel\ngood\t1\n", "line 1: the header"),
    ("SST-2/train.tsv", "sentence\tlabel\ngood\t1\nbad\n", "line 3: 1 columns"),
    ("SST-2/dev.tsv", "sentence\tlabel\ngood\t1\nbad\t-1\n", "line 3: label"),
    ("MRPC/dev_ids.tsv", None, "missing"), ("MRPC/dev_ids.tsv", "1\n", "line 1: 1 columns"),
    ("MRPC/dev_ids.tsv", "777\t888\n", ""),  # matches no row: nothing to evaluate on
    ("MRPC/msr_paraphrase_train.txt", MRPC_HEADER + "1\t1\t2\ta\n", "line 2: 4 columns"),
    ("MRPC/msr_paraphrase_train.txt", MRPC_HEADER + "x\t1\t2\ta\tb\n", "line 2: label"),
    ("MRPC/msr_paraphrase_train.txt", "x" + MRPC_HEADER + "1\t1\t2\ta\tb\n", "line 1: the header")])
def test_bad_texts(folder, file, content, message):
    """A text file that is missing or not as it should be is refused with its name and the line."""
    path = folder / file
    path.unlink() if content is None else path.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(AFLoRAError, match=f"{path}.*{message}"):
        glue.load_task("mrpc" if "MRPC" in file else "sst2", folder)


def packed(name, content):
    """The bytes of an archive with one member: a .zip if the name begins so, else a .tar.gz."""
    file, info = io.BytesIO(), tarfile.TarInfo(name)
    if name.startswith("zip"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def serve(monkeypatch, reply, members):
    """FILES gets "x/file", to hold b"content"; its source answers once, with `reply`, then ends."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        with server, server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(reply)
    threading.Thread(target=answer, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}/file"
    monkeypatch.setitem(glue.FILES, "x/file", (CONTENT, address + members))


DOWNLOAD = glue.download  # the real one
CONTENT, CONTEND = (hashlib.sha256(word).hexdigest() for word in (b"content", b"contend"))


def ok(body, size=None):
    """A whole HTTP reply, or one that claims another size."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size or len(body), body)


@pytest.mark.parametrize("body, members", [
    (b"content", ""), (packed("zip/b", b"content"), " > zip/b"),
    (packed("in.tar.gz", packed("b", b"content")), " > in.tar.gz > b")])
def test_fetch(monkeypatch, body, members):
    """A file, a zip's and a nested tar's member are fetched once, then found and checked again."""
    serve(monkeypatch, ok(body), members)
    path = glue.fetch("x/file")
    assert glue.fetch("x/file") == path and path.read_bytes() == b"content"  # the server is gone
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    path.write_bytes(b"contend")
    with pytest.raises(AFLoRAError, match=f"{CONTEND}.*{CONTENT}"):
        glue.fetch("x/file")


@pytest.mark.parametrize("reply, members, message", [
    (ok(b"contend"), "", f"{CONTEND}.*{CONTENT}"), (ok(b"<html>"), " > zip/b", "archive"),
    (ok(packed("zip/b", b"content")), " > zip/c", "archive"), (ok(b"con", 7), "", "3 of 7"),
    (b"HTTP/1.1 404 No\r\n\r\n", "", "Error 404"), (b"", "", "without response"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\ncon", "", "Incomplete"),
    (b"SSH-2.0\r\n", "", "SSH-2.0")])
def test_bad_fetch(monkeypatch, reply, members, message):
    """A wrong hash, a web page, half a file, broken HTTP: an error, and nothing is kept of it."""
    serve(monkeypatch, reply, members)
    with pytest.raises((AFLoRAError, ConnectionError), match=message):
        glue.fetch("x/file")
    assert not [p for p in glue.CACHE.rglob("*") if p.is_file()]


def test_after_a_bad_address_the_index_is_asked(monkeypatch):
    """A hub's address without https:// fails under its own name, and the next source is tried."""
    monkeypatch.setitem(glue.FILES, "x/file", (CONTENT, "hub.example/file", "pip:x==1"))
    monkeypatch.setattr(glue, "download", lambda address, real=DOWNLOAD: (
        b"content" if address == "pip:x==1" else real(address)))
    assert glue.fetch("x/file").read_bytes() == b"content"
    assert "unknown url type" in str(glue.UNREACHABLE["hub.example/file"])


def test_a_server_that_hangs(monkeypatch):
    """A server that takes the call and says nothing costs seconds, not for ever, and is not asked
    for the next file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        for name in "xy":
            monkeypatch.setitem(glue.FILES, name, (CONTENT, address + name))
        began = time.perf_counter()
        for name in "xy":
            with pytest.raises(ConnectionError, match=f"{name} cannot be fetched.*timed out"):
                glue.fetch(name)
        assert time.perf_counter() - began < 9
    assert not glue.CACHE.exists()


def test_damaged_files_are_read_rightly_or_refused(monkeypatch):
    """The short version of benchmarks/fuzz.py: 600 mutated files, no other error or value."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    import fuzz
    counts = fuzz.main(600)
    assert len(counts) == 4 and all(read > 0 and refused > 0 for read, refused in counts.values())


def test_without_network(folder, monkeypatch, capsys, tmp_path):
    """The error says which file goes where; a run that could do nothing fails; movie snippets,
    every tenth of them dev, stand in for SST-2; the title, first and last line printed say so."""
    with pytest.raises(ConnectionError, match="MRPC/msr_paraphrase_train.txt"):
        glue.load_task("mrpc")
    assert glue.main(["--model", str(folder), "--data", ""]) == 2

    text = "".join(f"{i}\t{i % 7 - 3}.5\tsnippet {i}\r\n" for i in range(25)).encode()
    name = next(name for name in glue.FILES if "Snippets" in name)
    address, outer, inner = glue.FILES[name][1].split(" > ")
    monkeypatch.setitem(glue.FILES, name, (hashlib.sha256(text).hexdigest(), glue.FILES[name][1]))

    def download(wanted):
        if wanted != address:
            raise OSError("no internet, but a package index")
        return packed(outer, packed(inner, text))
    monkeypatch.setattr(glue, "download", download)
    monkeypatch.setattr(glue, "UNREACHABLE", {}, raising=False)
    task = glue.load_task("sst2")
    assert "movie snippets" in task.title
    assert len(task.train) == 23 and len({*task.train, *task.dev}) == 25
    assert task.dev == [("snippet 9", None, 0), ("snippet 19", None, 1)]
    capsys.readouterr()
    assert glue.main(["--data", "", "--model", str(folder), "--out", str(tmp_path)]) == 0
    first, *_, before, last = capsys.readouterr().out.splitlines()
    assert first == before == f"NOT SST-2: {task.title}" and last.startswith("mrpc is skipped")


# ---------------------------------------------------------- the companion's batches and its numbers

def test_batches(folder):
    """Every row once per epoch, the same for the same seed and epoch, alike in length in a batch;
    ids, segments and mask equal those of a plain padding loop."""
    tokenizer, rows = load_tiny(folder)[1], random_rows(601, 50)
    examples, encoded = glue.Examples(rows, tokenizer), [tokenizer.encode(*row[:2]) for row in rows]
    epoch, same, later, other = (list(examples.batches(8, seed, number)) for seed, number in (
        (0, 0), (0, 0), (0, 1), (1, 0)))
    assert len(epoch) == len(examples.batches(8, 0, 0)) == 76
    assert all(torch.equal(a, b) for x, y in zip(epoch, same) for a, b in zip(x, y))
    assert len({tuple(batch[0].shape for batch in run) for run in (epoch, later, other)}) == 3
    seen = [(i[mask].tolist(), int(label)) for batch in epoch for i, _, mask, label in zip(*batch)]
    assert sorted(seen) == sorted((ids, row[2]) for (ids, _), row in zip(encoded, rows))
    padded, real = sum(batch[0].numel() for batch in epoch), sum(len(ids) for ids, _ in encoded)
    unsorted = sum(8 * max(len(ids) for ids, _ in encoded[i:i + 8]) for i in range(0, 600, 8))
    assert padded < 1.1 * real < 1.4 * real < unsorted

    chosen = [encoded[i] for i in (7, 0, 13, 3)]
    longest = max(len(ids) for ids, _ in chosen)
    expected = [[part + [0] * (longest - len(part)) for part in (ids, segments, [True] * len(ids))]
                for ids, segments in chosen]
    batch = examples.collate(torch.tensor([7, 0, 13, 3]))
    assert [part.tolist() for part in batch] == [*map(list, zip(*expected)), [1, 0, 1, 1]]


def test_predict_and_metrics(folder):
    """Predictions come in the rows' order, as of each row alone; accuracy and F1 as by hand."""
    torch.manual_seed(0)
    model, tokenizer = load_tiny(folder)
    examples = glue.Examples(random_rows(40, 20), tokenizer)
    logits = model.eval()(*examples.collate(torch.arange(40))[:3])
    list(model.parameters())[-1].data -= logits.median(0).values  # so that both classes occur
    predicted = glue.predict(model.train(), examples, "fp32", size=8)
    alone = [int(model(*examples.collate(torch.tensor([i]))[:3]).argmax()) for i in range(40)]
    assert predicted.tolist() == alone and 5 < sum(alone) < 35
    scores = glue.metrics(torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 1, 0]))
    assert scores == pytest.approx(dict(accuracy=60, f1=200 / 3))  # precision = recall = 2 / 3
    assert glue.metrics(torch.zeros(2).long(), torch.zeros(2).long())["f1"] == 0


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p):
    """A share p of zeros, the expectation kept, the gradient to match; nothing in evaluation."""
    torch.manual_seed(0)
    x = torch.ones(401, 997, requires_grad=True)
    y = glue.Dropout(p)(x)
    y.sum().backward()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.004)
    assert y.mean().item() == pytest.approx(1, abs=0.008) and torch.equal(x.grad, y)
    assert torch.equal(glue.Dropout(p).eval()(x), x)


# ------------------------------------------------------------------- the companion's command line

def run_script(folder, *flags):
    """The finished process of the script with these flags; no network, an empty cache."""
    env = os.environ | dict(AFLORA_CACHE=f"{folder}/none", HF_ENDPOINT="http://127.0.0.1:9",
                            PIP_NO_INDEX="1", AFLORA_DATA="", OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, glue.__file__, *map(str, flags)], cwd=folder, env=env,
                          capture_output=True, encoding="utf-8", errors="replace", timeout=120)


def test_script(folder):
    """Both tasks through the command line: map, log, result, and the adapter gives its accuracy."""
    done = run_script(folder, "--task", "both", "--model", ".", "--data", ".", "--out", "out",
                      "--epochs", 2, "--batch-size", 4, "--lr", 0.01, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("freeze map") == 2 and "(equal)" in done.stdout
    for name in ("sst2", "mrpc"):
        out = folder / f"out/{name}-aflora-s3"
        assert "freeze map" in (out / "freeze_map.txt").read_text(encoding="utf-8")
        result = json.loads((out / "result.json").read_text())
        assert result.keys() >= set(
            "task data method rank seed preset accuracy f1 best_accuracy best_f1 trainable_start "
            "trainable_end trainable_average head_parameters steps seconds ms_per_step "
            "peak_memory_bytes device precision versions frozen_at".split())
        assert (result["f1"] is None) == (name == "sst2") and len(result["frozen_at"]) == 8
        assert result["trainable_start"] > result["trainable_average"] > result["trainable_end"]
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == result["steps"] and lines[-1]["frozen"] == 1
        model, tokenizer = load_tiny(folder)
        aflora.load_adapter(model, out / "adapter.pt")
        dev = glue.Examples(glue.load_task(name, folder).dev, tokenizer)
        scores = glue.metrics(glue.predict(model, dev, result["precision"]), dev.labels)
        assert scores["accuracy"] == result["accuracy"]
    done = run_script(folder, "--model", ".", "--data", "SST-2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1  # no traceback
    assert done.stderr.startswith("error: ") and "SST-2/train.tsv is missing" in done.stderr


def run_main(folder, flags):
    """What main() returns for these flags and the tiny SST-2."""
    return glue.main(["--task", "sst2", "--model", str(folder), "--data", str(folder),
                      "--out", str(folder / "out"), *flags.split()])


@pytest.mark.parametrize("method", ["aflora", "freezenet", "lora", "elora", "full", "head"])
def test_methods(folder, method):
    """Every method runs an epoch and trains exactly what it should."""
    rank = " --rank 4" * (method not in ("full", "head"))
    assert run_main(folder, f"--epochs 1 --batch-size 4 --method {method} --amp bf16{rank}") == 0
    result = json.loads((folder / "out/result.json").read_text())
    # Two layers, r = 4: vectors have r + out values, A and B of the FFN and attention r (in + out).
    vectors, ffn, attention = 2 * (6 * 4 + 5 * 32 + 48), 2 * 2 * 4 * (32 + 48), 2 * 4 * 4 * 64
    schedule = 1 - np.mean([freezing_fraction(t, 6, 1, 2) for t in range(6)])
    assert result["trainable_start"] == dict(
        aflora=vectors + ffn, freezenet=vectors + round(schedule * ffn), lora=ffn + attention,
        elora=vectors, head=0,
        full=sum(p.numel() for p in checkpoint().values()))[method]
    assert result["trainable_end"] == result["trainable_start"] - ffn * (method == "aflora")


@pytest.mark.parametrize("flags", [
    "--rank 0", "--t-i 0.9 --t-f 0.9", "--t-i -1", "--data none", "--model none", "--lr 0",
    "--lr -1", "--lr nan", "--head-lr inf", "--batch-size 0", "--epochs 0", "--limit 0",
    "--limit -1", "--method head --limit 0", "--amp fp16", "--checkpoint-every -1",
    "--method freezenet --keep 2", "--method freezenet --train-matrices none"])
def test_wrong_flags(folder, capsys, flags):
    """Wrong flags and folders: exit code 2 and one line that names the flag at fault."""
    if torch.cuda.is_available() and "fp16" in flags:
        pytest.skip("fp16 is right here")
    assert run_main(folder, flags) == 2
    message, = capsys.readouterr().err.strip().splitlines()
    words = flags.split()[-2].strip("-").replace("-", "[-_ ]?")
    if words not in ("data", "model"):
        assert re.search(words.replace("train[-_ ]?matrices", "0 parameters"), message), message


def test_t_i_and_t_f_may_fill_the_run(folder):
    """Shares that add up to 1 fit for every number of steps, though each is rounded."""
    assert run_main(folder, "--epochs 5 --batch-size 24 --t-i 0.3 --t-f 0.7") == 0


def test_freezenet_starts_as_the_plain_model_and_resumes(folder, capsys):
    """The pass that chooses leaves s_b at 0; a stopped run of kept elements goes on bit for bit."""
    flags = "--method freezenet --epochs 3 --batch-size 4 --checkpoint-every 4"
    assert run_main(folder, flags + f" --out {folder / 'whole'}") == 0
    seen = []

    def train(model, *arguments, real=aflora.train, **options):
        seen.append([layer.s_b.abs().sum().item() for layer in aflora.adapters_of(model).values()])
        return real(model, *arguments, **options | dict(stop=stop_after(8)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, IndexError)):
        patch.setattr(aflora, "train", train)
        run_main(folder, flags)
    assert seen == [[0.0] * 12]
    assert glue.main(["--resume", str(folder / "out")]) == 0
    (folder / "out/freeze_map.txt").touch(), (folder / "whole/freeze_map.txt").touch()
    assert_same_folders(folder / "out", folder / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_what_was_learned(folder, monkeypatch, capsys, number, code):
    """Interrupted after its first epoch, a run exits 130 (143), says what it saved, and that loads;
    resumed, it ends as the run that nobody stopped."""
    calls = []

    def predict(*arguments, real=glue.predict):
        calls.append(arguments)
        if len(calls) == 3:  # before wrapping, after it, after the first epoch
            os.kill(os.getpid(), number)
        return real(*arguments)
    monkeypatch.setattr(glue, "predict", predict)
    with pytest.raises(SystemExit) as stop:
        run_main(folder, "--epochs 3")
    out = capsys.readouterr().out
    assert stop.value.code == code and "adapter.pt" in out and "--resume" in out
    saved, = folder.rglob("adapter.pt")
    model = glue.BertClassifier(glue.Bert.load(folder))
    assert any(layer.s_b.ne(0).any() for layer in load_adapter(model, saved).values())

    resume = ["--resume", str(folder / "out")]
    assert glue.main([*resume, "--seed", "1"]) == 2
    assert "seed is 0 there, 1 here" in capsys.readouterr().err
    assert glue.main([*resume, "--task", "mrpc"]) == 2
    assert "task is sst2 there, mrpc here" in capsys.readouterr().err
    assert glue.main(resume) == 0
    assert glue.main([*resume]) == 2 and "checkpoint.pt" in capsys.readouterr().err  # it is done
    assert run_main(folder, "--epochs 3 --out " + str(folder / "whole")) == 0
    assert_same_folders(folder / "out", folder / "whole")


def assert_same_folders(one, other):
    """Two run folders hold the same: adapter, log, map, result, but for times and memory."""
    assert sorted(os.listdir(one)) == sorted(os.listdir(other)) == [
        "adapter.pt", "freeze_map.txt", "log.jsonl", "result.json"]
    contents = []
    for folder in (one, other):
        adapter = torch.load(folder / "adapter.pt", weights_only=True)
        learned = {name: t.numpy().tobytes() for name, t in adapter.pop("learned").items()}
        packed = {name: t.numpy().tobytes() for name, t in adapter.pop("positions").items()}
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        result = json.loads((folder / "result.json").read_text())
        for record in (*log, result):
            for key in ("seconds", "ms_per_step", "peak_memory_bytes"):
                record.pop(key, None)
        contents.append((learned, packed, adapter, log, result,
                         (folder / "freeze_map.txt").read_bytes()))
    assert contents[0] == contents[1]


def test_killed_runs_resume(monkeypatch):
    """The short version of benchmarks/kill.py: SIGKILL at random moments loses nothing."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    import kill
    assert kill.main(2) == 2


def test_a_full_disk_is_named_and_spares_the_checkpoint(folder):
    """With a limit on the size of files a resumed run fails at its next checkpoint: the last line
    names the file, exit code 2, nothing half-written; the last good checkpoint is still there."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, IndexError)):
        patch.setattr(aflora, "train", lambda *a, real=aflora.train, **options: real(
            *a, **options | dict(stop=stop_after(2))))
        run_main(folder, "--epochs 9")
    good = (folder / "out/checkpoint.pt").read_bytes()
    limited = ("import resource, sys, train_glue_small as t; "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.exit(t.main())")
    done = subprocess.run(
        [sys.executable, "-c", limited, "--resume", "out"], cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(Path(__file__).parent)), capture_output=True,
        encoding="utf-8", timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: out/checkpoint.pt: ")
    assert (folder / "out/checkpoint.pt").read_bytes() == good
    assert not list(folder.rglob("*.part"))


def test_lenet_of_the_mnist_example():
    """431,080 parameters; at x157 the example keeps 2,746 of them, and its file is at most 1/75 of
    the dense float32 values; SNIP's others are zero; the arms differ in what they keep."""
    sys.path.append(str(Path(__file__).parent / "examples"))
    import freezenet_mnist as example
    generator, kept = torch.Generator().manual_seed(0), set()
    x = torch.randn(50, 1, 28, 28, generator=generator)
    y = torch.randint(10, (50,), generator=generator)
    for arm in list(example.ARMS)[1:]:
        example.seed_weights(model := example.lenet(), 3)
        assert sum(p.numel() for p in model.parameters()) == example.PARAMETERS == 431_080
        example.freeze(model, arm, 157, x, y, seed=3)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == 2746
        for p in trained:
            p.data += 1 + torch.rand(p.shape, generator=generator)
        values = torch.cat([v.flatten() for v in aflora.saved_values(model).values()])
        assert (values == 0).sum() == 431_080 - 2746 if arm == "SNIP" else not (values == 0).any()
        kept.add(tuple(len(p) for p in trained))
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, Path(folder, "net.pt"))
            size = Path(folder, "net.pt").stat().st_size
        assert arm == "SNIP" or size <= 4 * 431_080 / 75
    assert len(kept) == 3  # SNIP keeps what FreezeNet keeps by |w * grad|


WATCHED = """import contextlib, pathlib, runpy, sys, time
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
for _ in range(100):
    with contextlib.suppress(OSError):  # a thread ended between its listing and its reading
        threads = [p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm")]
        if not any("gloo" in name for name in threads):
            sys.exit()
    time.sleep(0.05)
sys.exit(f"threads that would abort the process as it ends: {threads}")
"""


def distributed(folder, processes, *flags):
    """Starts examples/distributed.py on the tiny BERT, which has no dropout here."""
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(hidden_dropout_prob=0.0)))
    (folder / "watched.py").write_text(WATCHED)
    script = Path(__file__).parent / "examples/distributed.py"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={processes}", "watched.py", str(script), "--task", "sst2", "--model",
         ".", "--data", ".", "--amp", "off", "--out", f"out{processes}", *flags], cwd=folder,
        encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, OMP_NUM_THREADS="1"))


def test_two_processes_train_as_one(folder):
    """The same global batches on one and on two gloo processes: the same freezing steps, weights
    equal within float tolerance, both ranks bit-equal, less to send when everything is frozen, and
    no thread of the process group left when a process ends."""
    # 21 rows: of the last batch's one the second process has none.
    flags = ["--epochs", "8", "--batch-size", "5", "--limit", "21"]
    results, adapters = [], []
    for processes in (1, 2):
        process = distributed(folder, processes, *flags)
        out, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        results.append(json.loads((folder / f"out{processes}/result.json").read_text()))
        adapters.append(torch.load(folder / f"out{processes}/adapter.pt", weights_only=True))
        assert out.count("ranks_equal") == 1  # rank 0 alone prints
    one, two = results
    assert one["frozen_at"] == two["frozen_at"] and len(two["frozen_at"]) == 8
    assert two["ranks_equal"] and two["processes"] == 2
    assert two["bytes_per_step_all_frozen"] == two["bytes_per_step"] - 4 * 2 * 2 * 4 * (32 + 48)
    for name, value in adapters[0]["learned"].items():
        torch.testing.assert_close(adapters[1]["learned"][name], value, rtol=1e-3, atol=1e-5)


def test_processes_that_froze_differently_stop(monkeypatch):
    """The check before the gradients meet: other frozen matrices elsewhere are noticed."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "examples")
    import distributed as example
    freezer = AdaptiveFreezer(adapted()[1], 100, 10, 20)
    average, freezer.step = example.Average(freezer, torch.device("cpu")), 10
    monkeypatch.setattr(example, "WORLD", 2)
    for other, alike in ((0, True), (1, False)):  # what the other process adds to the sum
        monkeypatch.setattr(example.dist, "all_reduce", lambda t: t.mul_(2).add_(other))
        if alike:
            average.check()
        else:
            with pytest.raises(AFLoRAError, match="froze differently by step 10"):
                average.check()


def test_a_process_that_dies_ends_the_run(folder):
    """One of two processes is killed while they train: the run ends with an error in a minute."""
    process = distributed(folder, 2, "--epochs", "100000")
    try:
        line = ""
        while "epoch 20 " not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        began = time.perf_counter()
        process.communicate(timeout=60)
        assert process.returncode != 0 and time.perf_counter() - began < 60
    finally:
        process.kill()


def test_the_example_of_your_own_model(tmp_path, monkeypatch, capsys):
    """A BERT by train() and a Llama in a loop of its own learn (the example itself asserts that its
    files give the same logits, bit for bit), by the README's code but for the Llama's names."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parent / "examples")
    monkeypatch.chdir(tmp_path)
    import your_own_model as example
    for part in (example.bert_by_train, example.llama_by_a_loop):
        before, after = part()
        assert after < before / 2
    assert capsys.readouterr().out.count("frozen after step") == 8
    code = lambda text: [line.split("  #")[0].strip() for line in text.splitlines()]  # noqa: E731
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    there, *blocks = map(code, [Path(example.__file__).read_text(encoding="utf-8"), *re.findall(
        r"```python\n(.*?)```", readme, re.DOTALL)[:2]])
    missing = {line for block in blocks for line in block} - {*there}
    assert all(line.startswith("from aflora import") for line in missing) and len(missing) == 1


def test_the_exercises_can_be_done(capsys):
    """Python blocks run and print the counts of their answers; edited lines stand in aflora.py."""
    text = (Path(__file__).parent / "examples/exercises.md").read_text(encoding="utf-8")
    lines = Path(aflora.__file__).read_text(encoding="utf-8").splitlines()
    edits = re.findall(r"```diff\n-(.*)\n[+](.*)\n```", text)
    assert len(edits) == 4 and all(lines.count(old) == 1 for old, new in edits)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {})
    printed = capsys.readouterr().out
    for number in ("0.799, realised 0.785", "realised 0.704", "written: 12.07", "folded: 0.12"):
        assert number in printed


# ---------------------------------------------------------------------------------- the README

def test_the_code_in_the_readme_runs(tmp_path, monkeypatch):
    """All Python blocks, as printed: train() and a loop of one's own on a model of one's own, and
    FreezeNet on a network."""
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.value, self.classifier = (nn.Linear(8, n) for n in (8, 8, 2))

        def forward(self, x):
            return self.classifier(torch.tanh(self.query(x)) + self.value(x))
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 3
    names = {"torch": torch, "batches": lambda epoch: data(batches=60), "loss": loss_of}
    for block in blocks[:2]:
        torch.manual_seed(0)
        names["model"] = Small()
        exec(block, names)
        assert len(names["freezer"].frozen_at) == 4
    torch.manual_seed(0)
    assert load_adapter(Small(), "adapter.pt").keys() == {"query", "value"}
    names["network"] = seed_weights(Small(), 1)  # puts the examples on the path
    exec(blocks[2], names)
    load_adapter(fresh := seed_weights(Small(), 0), "network.pt")
    assert torch.equal(fresh(data()[0][0]), names["network"](data()[0][0]))
