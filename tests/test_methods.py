"""LoRA and ELoRA, made of AFLoRA's layers: what they start from, compute, train and save."""

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tiny
from aflora import (AFLoRALinear, Training, adapters_of, load_adapter, merge_adapters,
                    save_adapter, save_checkpoint, train)
from data.methods import ELoRALinear, as_elora, as_lora

TURN = {"aflora": lambda layers: None, "lora": as_lora, "elora": as_elora}


def adapted(method, **options):
    """(Net, its adapters), turned into those of a method."""
    model, layers = tiny.adapted(**options)
    TURN[method](layers)
    return model, layers


def trained(model):
    """The last parts of the names of all parameters that train."""
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------ the starts
@pytest.mark.parametrize("method, rank", [("aflora", 4), ("lora", 8), ("elora", 100)])
def test_the_adapted_model_starts_as_the_plain_one(method, rank):
    """Wrapping changes no bit of the output: s_b (LoRA: B) is zero at first."""
    torch.manual_seed(0)
    plain = tiny.Net()
    model, _ = adapted(method, rank=rank)
    x = torch.randn(3, 5, 8)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("options, scale", [({}, 16 / 8), ({"alpha": 4}, 4 / 8)])
def test_lora_starts_as_lora(options, scale):
    """A is uniform in +-1 / sqrt(in), the start of Hu et al.'s code; B = 0; the path is scaled by
    alpha / r; A and B train, the vectors do not."""
    layers = {"x": AFLoRALinear(nn.Linear(300, 500), 8, name="x")}
    as_lora(layers, **options)
    layer = layers["x"]
    bound = 1 / math.sqrt(300)
    assert 0.98 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    assert layer.lora_B.eq(0).all()
    assert layer.s_d.eq(scale).all() and layer.s_b.eq(1).all()
    assert trained(layer) == {"lora_A", "lora_B", "weight", "bias"}  # the latter: the base's


def test_lora_is_w0_plus_alpha_over_r_b_a():
    """The dense formula of LoRA, W0 x + (alpha / r) B A x, and its gradients by autograd."""
    torch.manual_seed(0)
    layers = {"x": AFLoRALinear(nn.Linear(6, 10), 4, name="x").double()}
    as_lora(layers, alpha=10)
    layer = layers["x"]
    layer.lora_B.data = torch.randn(10, 4, dtype=torch.float64)
    A = layer.lora_A.detach().clone().requires_grad_()
    B = layer.lora_B.detach().clone().requires_grad_()
    x = torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    expected = F.linear(x, layer.base.weight + 10 / 4 * B @ A, layer.base.bias)
    torch.testing.assert_close(y, expected)
    pull = torch.randn_like(y)
    y.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)
    assert layer.s_d.grad is None and layer.s_b.grad is None


def test_lora_trains_its_matrices_alone():
    """After some steps all A and B have moved, the vectors and everything frozen have not."""
    model, layers = adapted("lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2, weight_decay=0.1)
    moved = {name for name, value in model.state_dict().items()
             if not torch.equal(value, before[name])}
    matrices = {f"{name}.lora_{matrix}" for name in layers for matrix in "AB"}
    assert moved == matrices | {"head.weight", "head.bias"}


def numpy_start(key, shape):
    """The start that a key stands for, by NumPy alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    bound = math.sqrt(6 / shape[1])
    return np.random.RandomState(seed).uniform(-bound, bound, shape).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 7])
def test_elora_shares_one_frozen_pair_per_shape(seed):
    """Layers of one shape hold the very same A and B, regrown from seed and shape, whatever the
    layers are called; only the vectors train."""
    model, layers = adapted("elora", rank=16, seed=seed)
    first, second = (layers[f"blocks.{i}.up"] for i in range(2))
    assert first.lora_A is second.lora_A and first.lora_B is second.lora_B
    matrices = {id(p): tuple(p.shape) for layer in layers.values()
                for p in (layer.lora_A, layer.lora_B)}
    shapes = [(16, 8), (8, 16), (16, 8), (24, 16), (16, 24), (8, 16)]  # of query, up and down
    assert sorted(matrices.values()) == sorted(shapes)
    for layer in layers.values():
        shape = (layer.base.out_features, layer.base.in_features)
        for name, size in (("lora_A", (16, shape[1])), ("lora_B", (shape[0], 16))):
            start = numpy_start(f"{seed}/{shape}/{name}", size)
            assert np.array_equal(getattr(layer, name).detach().numpy(), start)
    assert trained(model) == {"s_d", "s_b", "weight", "bias"}  # the latter: the head's


def test_elora_trains_its_vectors_alone():
    """After some steps all vectors have moved; the shared pairs, which decay could move, rest."""
    model, layers = adapted("elora", rank=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2, weight_decay=0.1)
    moved = {name for name, value in model.state_dict().items()
             if not torch.equal(value, before[name])}
    vectors = {f"{name}.s_{letter}" for name in layers for letter in "db"}
    assert moved == vectors | {"head.weight", "head.bias"}


# ----------------------------------------------------------------- ELoRA's forward, (1) unfolded
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias, rank", [(True, 4), (False, 4), (True, 100), (False, 100)])
def test_the_unfolded_forward_equals_the_dense_formula(bias, rank, leading):
    """y = (W0 + diag(s_b) B diag(s_d) A) x + b, and every gradient, for any leading dimensions."""
    torch.manual_seed(0)
    layers = {"x": AFLoRALinear(nn.Linear(6, 10, bias=bias), rank, name="x").double()}
    as_elora(layers)
    layer = layers["x"]
    assert type(layer) is ELoRALinear
    for vector in (layer.s_d, layer.s_b):
        vector.data = torch.randn_like(vector)
    x = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)

    dense = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    dense_x = x.detach().clone().requires_grad_()
    delta = (dense["s_b"].diag() @ dense["lora_B"]) @ (dense["s_d"].diag() @ dense["lora_A"])
    expected = F.linear(dense_x, dense["base.weight"] + delta, dense.get("base.bias"))

    y = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.delta_weight(), delta)
    pull = torch.randn_like(y)
    y.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(x.grad, dense_x.grad)
    for name in ("s_d", "s_b"):
        torch.testing.assert_close(getattr(layer, name).grad, dense[name].grad)
    assert layer.lora_A.grad is None and layer.lora_B.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_unfolded_forward_in_half_precision(dtype):
    """A half-precision base under autocast, as the companion has it, agrees with float32."""
    model, layers = adapted("elora", rank=16)
    tiny.perturb(model)
    x = torch.randn(4, 7, 8)
    expected = model(x)
    for layer in layers.values():
        layer.base.to(dtype)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


# ------------------------------------------------------------------------------- files, merging
def trained_model(method, rank):
    """A Net that has been trained by a method for two epochs."""
    model, _ = adapted(method, rank=rank)
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=2, lr=1e-2)
    return model


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("method, rank", [("lora", 6), ("elora", 100)])
def test_adapter_file_round_trip(tmp_path, method, rank, turned):
    """A trained adapter in a fresh base, head included, plain or turned already, gives the same
    outputs; only ELoRA's, in the folded order of AFLoRA's layer, may be rounded otherwise."""
    model = trained_model(method, rank)
    save_adapter(model, tmp_path / "a.pt")
    torch.manual_seed(0)
    fresh = tiny.Net()
    if turned:
        fresh, _ = adapted(method, rank=rank)
    fresh.head.reset_parameters()
    x = tiny.data()[0][0]
    assert not torch.allclose(fresh(x), model(x), atol=1e-2)
    load_adapter(fresh, tmp_path / "a.pt")
    if method == "elora" and not turned:
        torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-5)
    else:
        assert torch.equal(fresh(x), model(x))


def test_elora_s_matrices_are_not_stored(tmp_path):
    """The file holds vectors, the head, and for each matrix the key from which it regrows."""
    model = trained_model("elora", 100)
    save_adapter(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    names = {name.rpartition(".")[2] for name in content["values"]}
    assert names == {"s_d", "s_b", "weight", "bias"}
    keys = {key for key, _ in content["at_start"].values()}
    assert keys == {f"0/{shape}/lora_{matrix}" for shape in ((8, 8), (24, 8), (8, 24))
                    for matrix in "AB"}
    assert len(content["at_start"]) == 12
    matrices = sum(layer.lora_A.numel() + layer.lora_B.numel()
                   for layer in adapters_of(model).values())
    assert (tmp_path / "a.pt").stat().st_size < 4 * matrices / 2  # 4 bytes a value
    save_checkpoint(Training(model, tiny.loss_of, total_steps=1, lr=1e-2), tmp_path / "c.pt")
    assert (tmp_path / "c.pt").stat().st_size < 4 * matrices / 2


def test_lora_s_matrices_are_stored(tmp_path):
    """All of a trained LoRA is in the file, its scale among it."""
    save_adapter(trained_model("lora", 6), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["at_start"] == {}
    names = {name.rpartition(".")[2] for name in content["values"]}
    assert names == {"lora_A", "lora_B", "s_d", "s_b", "weight", "bias"}


@pytest.mark.parametrize("method, rank", [("lora", 6), ("elora", 100)])
def test_merging(method, rank):
    """The merged model is plain and gives the same outputs."""
    model = trained_model(method, rank)
    x = tiny.data()[0][0]
    before = model(x)
    merge_adapters(model)
    assert adapters_of(model) == {}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
