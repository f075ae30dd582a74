"""Adapters in all kinds of models: what is selected, refused, shared, tied, hooked, merged."""

import copy

import pytest
import tiny
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

import aflora
from aflora import (AdaptiveFreezer, AFLoRAError, AFLoRALinear, add_adapters, adapters_of,
                    load_adapter, merge_adapters, save_adapter, train)


# ---------------------------------------------------------------------------------------- the layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_and_autocast(dtype):
    """A half-precision base without autocast, and a float32 one with it, agree with float32."""
    model, _ = tiny.adapted()
    tiny.perturb(model)
    half = copy.deepcopy(model)
    for module in half.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.to(dtype)
    x = torch.randn(4, 7, 8)
    with torch.autocast("cpu", dtype):
        mixed = model(x)
    y = half(x.to(dtype))
    assert y.dtype == dtype
    assert half.blocks[0].up.lora_A.dtype == torch.float32
    expected = model(x)
    for output in (mixed, y):
        assert (output.float() - expected).norm() < 0.03 * expected.norm()
    with torch.autocast("cpu", dtype):  # which leaves float64 alone
        assert model.double()(x.double()).dtype == torch.float64
    assert model.to("meta")(x.double().to("meta")).shape == expected.shape


class OnCuda:
    """What aligned() reads of a tensor on CUDA."""
    is_cuda = True

    def __init__(self, x):
        self.itemsize = x.itemsize


class InHalf(nn.Linear):
    """A base whose output is of another type than its input."""

    def forward(self, x):
        return super().forward(x).bfloat16()


@pytest.mark.parametrize("rank, base, rows", [
    (4, nn.Linear(12, 10).bfloat16(), 8), (16, nn.Linear(12, 10).half(), 16),
    (9, nn.Linear(12, 10).bfloat16(), 16), (3, nn.Linear(12, 10), 4), (4, InHalf(12, 10), 4)])
def test_rows_of_zeros_change_nothing(monkeypatch, rank, base, rows):
    """On CUDA A and the folded B are filled up to multiples of 16 bytes: the same y, the same
    gradients."""
    torch.manual_seed(0)
    layer = AFLoRALinear(base, rank)
    tiny.perturb(layer)
    x = torch.randn(2, 5, 12, dtype=base.weight.dtype)
    found = []
    aligned = aflora.aligned
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(aflora, "aligned", lambda matrix, x: aligned(matrix, OnCuda(x)))
        y = layer(x)
        layer.zero_grad()
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters())])
    A = aflora.aligned(layer.lora_A, x)
    assert A.shape == (rows, 12)
    assert A[:rank].equal(layer.lora_A)
    assert not A[rank:].any()
    torch.testing.assert_close(*found, rtol=1e-5 if y.dtype == torch.float32 else 2e-2, atol=1e-2)


class Float32Only(nn.Linear):
    """A base that computes in float32 itself, as quantised ones do."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_a_base_of_another_kind_gets_x_as_it_is():
    """Under autocast, too; a plain linear layer would cast x itself, and gets it cast. The output
    has the type of the base's."""
    x = torch.randn(3, 12)
    seen = []
    for kind in (nn.Linear, Float32Only):
        layer = AFLoRALinear(kind(12, 10))
        layer.base.register_forward_pre_hook(lambda base, given: seen.append(given[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer.base(x).dtype
    assert [*dict.fromkeys(seen)] == [torch.bfloat16, torch.float32]


def saved_bytes(layer, x, sizes):
    """Bytes that autograd keeps of tensors with a number of elements in `sizes`."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(tensor.nbytes for tensor in kept if tensor.numel() in sizes)


def test_activations_are_saved_only_while_they_are_needed():
    """No tokens x out tensor is kept for s_b, and x itself only as long as A trains."""
    layer = AFLoRALinear(nn.Linear(50, 70).requires_grad_(False))
    x = torch.randn(90, 50).requires_grad_()
    tiny.perturb(layer)
    wide = 90 * 70
    narrow = 90 * 50
    assert saved_bytes(layer, x, {wide}) == 0
    assert saved_bytes(layer, x, {narrow}) == x.nbytes
    layer.lora_A.requires_grad_(False)
    assert saved_bytes(layer, x, {wide, narrow}) == 0

    def naive(x):
        h = F.linear(x, layer.lora_A) * layer.s_d
        return layer.base(x) + layer.s_b * F.linear(h, layer.lora_B)

    assert saved_bytes(naive, x, {wide}) == 4 * wide  # what the folding spares


def test_matrices_differ_by_name_and_seed():
    """Each layer has its own start, which another seed changes."""
    _, layers = tiny.adapted()
    _, others = tiny.adapted(seed=1)
    for matrix in ("lora_A", "lora_B"):
        first = getattr(layers["blocks.0.up"], matrix)
        expected = aflora.kaiming_uniform(f"0/blocks.0.up/{matrix}", first.shape)
        assert torch.equal(first, expected)
        assert not torch.equal(first, getattr(layers["blocks.1.up"], matrix))
        assert not torch.equal(first, getattr(others["blocks.0.up"], matrix))


class Scaled(nn.Linear):
    """A linear module with an argument of its own, that notes the shape it is called with."""

    def forward(self, x, scale=1.0):
        self.seen = x.shape
        return scale * super().forward(x)


def test_the_base_is_called_as_it_is():
    """It sees x in x's own shape, gets what else was passed, and its hooks see its own output."""
    layer = AFLoRALinear(Scaled(4, 6))
    tiny.perturb(layer)
    x = torch.randn(2, 3, 4)
    path = F.linear(x, layer.delta_weight())
    torch.testing.assert_close(layer(x, scale=2.0), layer.base(x, 2.0) + path)
    torch.testing.assert_close(layer(x, 3.0), layer.base(x, 3.0) + path)
    assert layer.base.seen == (2, 3, 4)
    seen = []
    layer.base.register_forward_hook(lambda module, inputs, y: seen.append(y))
    layer.base.register_full_backward_hook(lambda *gradients: None)
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(seen[0], F.linear(x, layer.base.weight, layer.base.bias))
    assert layer.lora_A.grad is not None


def test_adapters_are_like_their_base():
    """They are in its mode, and offer its sizes, weight and bias to a model that asks for them."""
    layers = add_adapters(tiny.Net().eval(), ["up"], modules_to_save=None)
    layer = layers["blocks.0.up"]
    assert not layer.training
    assert (layer.out_features, layer.in_features) == layer.weight.shape
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias


def buffers_only(weight="qweight"):
    """A linear module that holds its weight in a buffer, as quantised ones do."""
    base = nn.Identity()
    base.in_features = 8
    base.out_features = 8
    base.register_buffer(weight, torch.zeros(8, 1, dtype=torch.int32, device="meta"))
    return base


def test_adapters_start_where_a_base_of_buffers_is():
    """The adapter of a base without parameters is on its buffers' device, in float32."""
    layer = AFLoRALinear(buffers_only())
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float32)}


# ---------------------------------------------------------------------------- adapters into a model
def test_targets_are_whole_names():
    """Suffixes begin at a dot, a whole name selects itself alone; all but the head is frozen."""
    model = nn.ModuleDict({
        "q": nn.Linear(4, 4), "sequence": nn.Linear(4, 4), "head": nn.Linear(4, 2),
        "deep": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    layers = add_adapters(model, "q", modules_to_save=["head"])
    assert list(layers) == ["q"]
    assert type(model["sequence"]) is nn.Linear and type(model["deep"]["q"]) is nn.Linear
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "q.lora_A", "q.lora_B", "q.s_d", "q.s_b", "head.weight", "head.bias"}
    assert list(add_adapters(tiny.Net(), ["0.down", "0.up"])) == ["blocks.0.up", "blocks.0.down"]
    assert list(add_adapters(tiny.Net(), "query")) == ["blocks.0.query", "blocks.1.query"]
    layers = add_adapters(tiny.Net(), ["query", "up"], train_matrices=["up"])
    for name, layer in layers.items():
        assert layer.lora_A.requires_grad == layer.lora_B.requires_grad == name.endswith("up")
        assert layer.s_d.requires_grad and layer.s_b.requires_grad
    assert adapters_of(tiny.Net()) == {}


@pytest.mark.parametrize("options, words", [
    ({"targets": ["quary"]}, ["quary", "['down', 'head', 'query', 'up']"]),
    ({"targets": ["uery"]}, ["uery"]),
    ({"targets": "blocks.0.(up|down)"}, ["blocks.0.(up|down)"]),
    ({"targets": ["query", "blocks"]}, ["'blocks'"]),
    ({"targets": ["query", "norm"]}, ["'norm'"]),
    ({"targets": ["query"], "modules_to_save": ["heads"]}, ["heads", "head"]),
    ({"targets": [0]}, ["0 selects nothing"]),
    ({"targets": ["query"], "train_matrices": ["up"]}, ["'up' selects nothing", ": ['query'] (a"]),
    ({"targets": ["query"], "train_matrices": "none"}, ["'none'"]),
    ({"targets": ["query"], "rank": 0}, ["rank is 0"]),
    ({"targets": ["query"], "rank": 2.5}, ["rank is 2.5"]),
    ({"targets": ["query"], "rank": 10**6}, ["rank is 1000000"]),
    ({"targets": ["query"], "rank": "4"}, ["rank is '4'"])])
def test_wrong_arguments_are_named_and_change_nothing(options, words):
    """The message says what is wrong and what there is; the model is as it was."""
    model = tiny.Net()
    with pytest.raises(AFLoRAError) as error:
        add_adapters(model, **options)
    for word in words:
        assert word in str(error.value)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "adapter_config")


@pytest.mark.parametrize("model, target", [
    (nn.Linear(4, 4), ""),  # the model itself: nothing holds it in which an adapter could stand
    (nn.Sequential(nn.LazyLinear(4)), "0"),  # it does not know its in_features yet
])
def test_modules_that_cannot_be_replaced_are_no_targets(model, target):
    with pytest.raises(AFLoRAError, match="selects nothing"):
        add_adapters(model, [target])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets, saved", [("head", "head"), ("up", "blocks")])
def test_a_module_may_be_adapted_and_trained_whole(targets, saved, tmp_path):
    """Both train, both are in the file, and merging adds the one to the other."""
    model, layers = tiny.adapted([targets], modules_to_save=[saved])
    tiny.perturb(model)
    layer = next(iter(layers.values()))
    for p in (layer.base.weight, layer.lora_A, layer.s_b):
        assert p.requires_grad
        p.data.add_(0.1)
    save_adapter(model, tmp_path / "a.pt")
    torch.manual_seed(0)  # the same base
    other = tiny.Net()
    load_adapter(other, tmp_path / "a.pt")
    x, _ = tiny.data()[0]
    assert torch.equal(other(x), model(x))
    expected = layer.base.weight + layer.delta_weight()
    merge_adapters(other)
    name = next(iter(layers))
    assert torch.equal(other.get_submodule(name).weight, expected)


def test_modules_that_are_never_called_are_refused():
    """nn.MultiheadAttention's out_proj is a Linear whose forward never runs."""
    with pytest.raises(AFLoRAError, match="out_proj.*leave it out"):
        add_adapters(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), ["out_proj"])
    with pytest.raises(AFLoRAError, match="linear1.*leave it out"):
        add_adapters(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1), ["linear1"])


def test_adapters_are_added_once():
    """A second call is refused, and changes nothing."""
    model, layers = tiny.adapted(["up"])
    with pytest.raises(AFLoRAError, match="already"):
        add_adapters(model, ["query"])
    assert adapters_of(model) == layers


class Shared(nn.Module):
    """One block in two places of the model, which are called one after the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.second = nn.Sequential(self.first[0], nn.Tanh())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def test_a_module_in_two_places_is_adapted_in_both(tmp_path):
    """It gets one adapter, which trains, is saved, loaded and merged as one."""
    torch.manual_seed(0)
    model = Shared()
    plain = copy.deepcopy(model)
    layers = add_adapters(model, ["0"], modules_to_save=["head"])
    assert list(layers) == ["first.0"]
    assert model.second[0] is model.first[0] is layers["first.0"]
    freezer, _ = tiny.run(model, layers)
    assert len(freezer.frozen_at) == 2
    x, _ = tiny.data()[0]
    apart = model(x)
    assert not torch.allclose(apart, plain(x))
    save_adapter(model, tmp_path / "a.pt")
    load_adapter(plain, tmp_path / "a.pt")
    assert torch.equal(plain(x), apart)
    assert plain.second[0] is plain.first[0]
    merge_adapters(model)
    assert type(model.first[0]) is nn.Linear
    assert model.second[0] is model.first[0]
    torch.testing.assert_close(model(x), apart)


# ------------------------------------------------------------------------------------------ merging
class Tied(nn.Module):
    """A small language model: the output's weight is the embedding's, both blocks share theirs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 9)
        self.two.weight = self.one.weight
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = torch.tanh(self.one(self.embed(ids)))
        return self.lm_head(torch.tanh(self.two(x)))


def test_merging_leaves_tied_weights_alone(tmp_path):
    """Merged = apart also where a target shares its weight with an embedding or another target."""
    torch.manual_seed(0)
    model = Tied()
    fresh = copy.deepcopy(model)
    embedding = model.embed.weight.clone()
    ids = torch.arange(9)
    layers = add_adapters(model, ["lm_head", "one", "two"])
    assert layers["lm_head"].base.weight is model.embed.weight
    tiny.perturb(model)
    save_adapter(model, tmp_path / "a.pt")
    apart = model(ids)
    merge_adapters(model)
    torch.testing.assert_close(model(ids), apart)
    assert torch.equal(model.embed.weight, embedding)
    load_adapter(fresh, tmp_path / "a.pt")
    assert torch.equal(fresh(ids), apart)
    assert fresh.lm_head.base.weight is fresh.embed.weight
    assert fresh.one.base.weight is fresh.two.base.weight


def test_a_merged_model_is_a_plain_one():
    """Merging again does nothing; what is merged can be adapted anew, trained, and merged."""
    model, _ = tiny.adapted()
    tiny.perturb(model)
    merge_adapters(model)
    x, _ = tiny.data()[0]
    merged = model(x)
    merge_adapters(model)
    assert torch.equal(model(x), merged)
    layers = add_adapters(model, ["up"], modules_to_save=["head"], rank=2)
    assert list(layers) == ["blocks.0.up", "blocks.1.up"]
    assert torch.equal(model(x), merged)
    tiny.run(model, layers, epochs=1)
    apart = model(x)
    assert not torch.allclose(apart, merged)
    merge_adapters(model)
    torch.testing.assert_close(model(x), apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_keeps_the_weight_s_type(dtype):
    """The product and the sum are made in float32, inside an autocast, too, and rounded once, to
    the type of the weight."""
    layer = AFLoRALinear(nn.Linear(8, 6, dtype=dtype))
    tiny.perturb(layer)
    model = nn.Sequential(layer)
    expected = (layer.base.weight.float() + layer.delta_weight()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.delta_weight().dtype == torch.float32
        merge_adapters(model)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, expected)


def holding(weight):
    """A linear module 4 -> 4 with another weight, as quantised ones have."""
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


class OverAnother(nn.Module):
    """A base whose weight is that of a module inside it, as PEFT's layers show it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.in_features = inner.in_features
        self.out_features = inner.out_features

    @property
    def weight(self):
        return self.inner.weight


def without_weight():
    """A base with nothing but its two numbers."""
    base = nn.Identity()
    base.in_features = 4
    base.out_features = 4
    return base


@pytest.mark.parametrize("base, word", [
    (weight_norm(nn.Linear(4, 4)), "1 cannot be merged: .*plain weight"),
    (without_weight(), "1 cannot be merged: Identity"),
    (OverAnother(nn.Linear(4, 4)), "1 cannot be merged: OverAnother"),
    (holding(torch.full((4, 4), 65504.0).half()),
     "1 cannot be merged: .*not finite in torch.float16, use float32"),
    (holding(torch.ones(4, 4, dtype=torch.int8)), "1 cannot be merged: .*plain weight"),
    (holding(torch.ones(4, 1)), r"1 cannot be merged: .*plain weight.*of shape \(4, 1\)"),
    (holding(torch.ones(4, 4).to(torch.float8_e4m3fn)), "1 cannot be merged: .*plain weight"),
])
def test_what_cannot_be_merged_is_named_and_changes_nothing(base, word):
    """A weight that is made anew at each call, none at all, one that would overflow, whole numbers,
    another shape: then the layers before it are not merged either."""
    model = nn.Sequential(nn.Linear(4, 4), base)
    layers = add_adapters(model, ["0", "1"])
    for layer in layers.values():
        layer.s_b.data.fill_(1e3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AFLoRAError, match=word):
        merge_adapters(model)
    assert adapters_of(model) == layers
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


# ---------------------------------------------------------------------------- half-precision models
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_head_of_a_half_precision_model_trains_in_float32(precision):
    """Steps below half precision's resolution add up, and the scaler can unscale: the head of a
    half-precision model moves as the float32 model's does."""
    def moved(dtype):
        torch.manual_seed(0)
        model = tiny.Net().to(dtype)
        model.head.weight.data.fill_(1)
        add_adapters(model, ["up"], modules_to_save=["head"])
        batches = [(x.to(dtype), labels) for x, labels in tiny.data()]
        train(model, lambda epoch: batches, tiny.loss_of, epochs=2, lr=1e-4, precision=precision)
        assert model.blocks[0].norm.weight.dtype == dtype
        return model.head.weight.detach() - 1

    half = moved(aflora.COMPUTE_TYPES[precision])
    assert half.dtype == torch.float32
    assert 0 < half.abs().min() < 1e-3 < 2**-8
    torch.testing.assert_close(half, moved(torch.float32), rtol=0, atol=5e-5)


def test_a_model_that_was_cast_after_the_adapters_is_refused():
    """Matrices in half precision would lose small steps: the freezer says what to do."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 200, 20, 50)
    model.bfloat16()
    x, labels = tiny.data()[0]
    tiny.loss_of(model, (x.bfloat16(), labels)).backward()
    with pytest.raises(AFLoRAError, match="blocks.0.query.lora_A.*before add_adapters"):
        freezer.update()
