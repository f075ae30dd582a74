"""examples/freezenet.py: what one shot chooses, that the rest rests, the file, MNIST, and text."""

import copy
import gzip
import hashlib
import json
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import aflora
import tiny
import train_glue_small as glue
from data.text import load_task
from aflora import (AFLoRAError, freezing_fraction, load_adapter, save_adapter, save_checkpoint,
                    train)
from processes import FORK, skip_with_cuda
from tiny import Net, adapted, data, loss_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
import freezenet  # noqa: E402
from freezenet import (Kept, freeze_one_shot, keep_elements, load_network,  # noqa: E402
                       make_whole, save_network, seed_weights, whole_values)


class Conv(nn.Module):
    """A small image network: kernels, matrices, biases and a norm's vectors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(self.norm(torch.tanh(self.up(x))))


class Tied(nn.Module):
    """Two layers that share one weight, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def images(seed=0, dtype=torch.float32):
    """A batch for Conv."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    x[:, 1] = 0  # a dead channel: its kernels have a gradient of exactly 0
    return x, torch.randint(3, (16,), generator=generator)


def seeded(keep=None, kind="gradient", seed=0, dtype=torch.float32):
    """(Conv at its seeded start, {name: mask} of one shot at it)."""
    model = Conv()
    seed_weights(model, seed)
    model.to(dtype)
    if keep is None:
        return model, None
    batch = images(dtype=dtype)
    return model, freeze_one_shot(model, lambda model: loss_of(model, batch), keep, kind)


def tied(keep=None):
    """(Tied, its masks, a dense copy of it)."""
    torch.manual_seed(0)
    model = Tied()
    dense = copy.deepcopy(model)
    masks = None
    if keep is not None:
        masks = freeze_one_shot(model, lambda model: loss_of(model, data()[0]), keep)
    return model, masks, dense


# ------------------------------------------------------------------------------ what is chosen

@pytest.mark.parametrize("kind", ["gradient", "gradient-weight", "weight"])
@pytest.mark.parametrize("keep", [0.03, 0.5, 0.93])
def test_one_shot_keeps_the_highest_saliencies_of_all(kind, keep):
    """The masks against a sort in plain Python; equal saliencies in the order of the elements."""
    model = seeded()[0]
    loss_of(model, images()).backward()
    saliency = []
    for p in model.parameters():
        for w, g in zip(p.detach().flatten().tolist(), p.grad.flatten().tolist()):
            product = abs(float(np.float32(w) * np.float32(g)))  # in float32, as the scores are
            kinds = {"gradient": abs(g), "weight": abs(w), "gradient-weight": product}
            saliency.append(kinds[kind])
    assert len(set(saliency)) < len(saliency)  # zeros: there are ties
    k = round(keep * len(saliency))
    chosen = set(sorted(range(len(saliency)), key=lambda i: -saliency[i])[:k])
    _, masks = seeded(keep, kind)
    found = torch.cat([masks[name].flatten() for name, _ in model.named_parameters()])
    assert set(found.nonzero()[:, 0].tolist()) == chosen
    assert len(chosen) == k


def test_names_choose_among_some_parameters():
    """Only the named ones compete, in the model's order; what is not named trains as it did."""
    model = seeded()[0]
    masks = freeze_one_shot(model, lambda model: loss_of(model, images()), 0.5,
                            names=["up.weight", "conv.bias"])
    assert list(masks) == ["conv.bias", "up.weight"]
    assert sum(int(mask.sum()) for mask in masks.values()) == (4 + 8 * 16) // 2
    assert model.head.weight.requires_grad
    assert isinstance(model.head.weight, nn.Parameter)


@pytest.mark.parametrize("names, word", [
    (["conv.weight", "up.wieght"], "'up.wieght'"),
    (["up"], "'up'"),
    (["norm.weight"], "'norm.weight'"),  # it does not train
    ([], "names is empty"),
    ("", "names is empty"),
])
def test_names_that_are_no_trained_parameters_are_refused(names, word):
    """By name, with what there is; and an empty list does not mean all. Nothing is changed."""
    model = seeded()[0]
    model.norm.weight.requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(AFLoRAError, match=re.escape(word)):
        freeze_one_shot(model, lambda model: loss_of(model, images()), 0.5, names=names)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_the_ends_of_keep_and_wrong_one_shots():
    """keep = 0 trains nothing, keep = 1 everything; other values and a lost gradient are errors."""
    none, masks = seeded(0)
    assert not any(p.requires_grad for p in none.parameters())
    assert not any(mask.any() for mask in masks.values())
    everything, masks = seeded(1)
    assert all(p.requires_grad for p in everything.parameters())
    assert [n for n, _ in everything.named_parameters()] == list(masks)  # nothing parametrized
    for keep in (-0.1, 1.1, math.nan):
        with pytest.raises(AFLoRAError, match="keep"):
            seeded(keep)
    model = seeded()[0]
    for loss in (lambda m: 0 * loss_of(m, images()), lambda m: math.inf * loss_of(m, images()),
                 lambda m: torch.zeros(())):
        with pytest.raises(AFLoRAError, match="gradient"):
            freeze_one_shot(model, loss, 0.5)
    with pytest.raises(AFLoRAError, match="sensitivity"):
        freeze_one_shot(model, lambda m: loss_of(m, images()), 0.5, "grad")
    assert [n for n, _ in model.named_parameters()] == list(masks)  # and nothing has changed
    layers = adapted(modules_to_save=())[1]  # at s_b = 0 every gradient of A and B is zero
    with pytest.raises(AFLoRAError, match="gradient"):
        freeze_one_shot(layers["blocks.0.up"], lambda m: m(torch.ones(8)).sum(), 0.5,
                        names=["lora_A", "lora_B"])
    with pytest.raises(AFLoRAError, match="0 parameters"):
        freeze_one_shot(none.requires_grad_(False), lambda m: loss_of(m, images()), 0.5)


def test_one_shot_is_one_shot():
    """A network in which elements are frozen refuses a second choice, new starts and files."""
    model, masks = seeded(0.5)
    with pytest.raises(AFLoRAError, match="frozen already"):
        keep_elements(model, masks)
    with pytest.raises(AFLoRAError, match="frozen already"):
        freeze_one_shot(model, lambda model: loss_of(model, images()), 0.5)
    with pytest.raises(AFLoRAError, match="frozen already"):
        seed_weights(model, 1)
    with pytest.raises(AFLoRAError, match="conv.wieght"):
        keep_elements(seeded()[0], {"conv.weight": masks["conv.weight"],
                                    "conv.wieght": masks["conv.weight"]})


# ------------------------------------------------------------------------ what trains, what rests

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


def test_what_trains_is_a_small_parameter_and_the_start_is_in_no_state_dict():
    """A state_dict holds the kept vectors and where they sit; the start is neither there nor saved
    anywhere else, so that a network of another start takes up the values but not the start."""
    model, masks = seeded(0.1)
    state = model.state_dict()
    partly = [name for name, mask in masks.items() if mask.any() and not mask.all()]
    assert len(partly) > 3
    for name in partly:
        module, key = name.rsplit(".", 1)
        k = int(masks[name].sum())
        assert state.pop(f"{module}.parametrizations.{key}.original").shape == (k,)
        positions = state.pop(f"{module}.parametrizations.{key}.0.positions")
        assert torch.equal(positions, masks[name].nonzero().T)
    assert set(state) == set(masks) - set(partly)  # whole ones
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        int(mask.sum()) for mask in masks.values())

    other, _ = seeded(0.1, seed=1)
    with pytest.raises(RuntimeError):  # other masks, other shapes
        other.load_state_dict(model.state_dict())
    other = seeded(seed=1)[0]
    keep_elements(other, masks)
    other.load_state_dict(model.state_dict())
    ours = whole_values(model)
    theirs = whole_values(other)
    start = dict(seeded(seed=1)[0].named_parameters())
    for name in partly:
        mask = masks[name]
        assert torch.equal(theirs[name][mask], ours[name][mask])
        assert torch.equal(theirs[name][~mask], start[name][~mask])


def test_what_one_shot_froze_never_moves():
    """After 100 AdamW steps with decay the frozen elements are the seed's bits, the kept are not;
    the optimizer holds a state for as many values as are kept."""
    model, masks = seeded(0.1, "gradient-weight")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(100):
        loss_of(model, images()).backward()
        optimizer.step()
        optimizer.zero_grad()
    start = seeded()[0]
    for name, mask in masks.items():
        module, key = name.rsplit(".", 1)
        value = getattr(model.get_submodule(module), key)
        assert torch.equal(value[~mask], start.get_parameter(name)[~mask])
        assert (value[mask] != start.get_parameter(name)[mask]).all()
    total = sum(mask.numel() for mask in masks.values())
    assert sum(s["exp_avg"].numel() for s in optimizer.state.values()) == round(0.1 * total)


def test_an_optimizer_from_before_trains_what_is_kept():
    """The parameters stay the objects that they were: no optimizer trains into the void."""
    model = seeded()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = loss_of(model, images())  # it lives on, and so does what torch knows of the old shapes
    loss.backward()
    before = whole_values(model)
    masks = freeze_one_shot(model, lambda model: loss_of(model, images()), 0.1)
    assert model.up.parametrizations.weight.original.grad is None  # the old one was of 8 x 16
    optimizer.zero_grad()
    loss_of(model, images()).backward()
    optimizer.step()
    for name, value in whole_values(model).items():
        assert torch.equal(value != before[name], masks[name]), name
    assert loss.isfinite()


def test_tied_weights_train_as_one():
    """Three steps of SGD move the one kept vector, in both places, as they move the masked weight
    of a dense network, whose gradient comes from both places, too."""
    model, masks, dense = tied(0.3)
    assert list(masks).count("first.weight") == 1 and "second.weight" not in masks
    assert masks["first.weight"].any() and not masks["first.weight"].all()
    originals = [getattr(model, name).parametrizations.weight.original
                 for name in ("first", "second")]
    assert originals[0] is originals[1]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        int(mask.sum()) for mask in masks.values())
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.5)
    for batch in data()[:3]:
        for network, optimizer in ((model, ours), (dense, theirs)):
            optimizer.zero_grad()
            loss_of(network, batch).backward()
        for name, p in dense.named_parameters():
            p.grad *= masks[name]
        ours.step()
        theirs.step()
    torch.testing.assert_close(model.first.weight, dense.first.weight, rtol=1e-5, atol=1e-7)
    assert torch.equal(model.first.weight, model.second.weight)
    moved = dense.first.weight != tied()[2].first.weight
    assert torch.equal(moved, masks["first.weight"])
    torch.testing.assert_close(model(data()[3][0]), dense(data()[3][0]), rtol=1e-5, atol=1e-6)
    training = train(model, lambda epoch: data(), loss_of, epochs=2, lr=1e-2)
    assert training.steps == 16


def test_the_other_name_of_a_tied_weight_names_it():
    """`names` may list it; the masks have the first name, by which the network lists it."""
    torch.manual_seed(0)
    masks = freeze_one_shot(Tied(), lambda model: loss_of(model, data()[0]), 0.5,
                            names=["second.weight", "head.weight"])
    assert list(masks) == ["first.weight", "head.weight"]


def test_make_whole_ends_the_freezing():
    """A plain network, tied as before, with the very values; then all of it trains."""
    model, masks, dense = tied(0.3)
    train(model, lambda epoch: data(), loss_of, epochs=1, lr=1e-2)
    before = model(data()[0][0])
    make_whole(model)
    assert torch.equal(model(data()[0][0]), before)
    assert sorted(model.state_dict()) == sorted(dense.state_dict())
    assert not any(isinstance(module, Kept) for module in model.modules())
    assert model.first.weight is model.second.weight and type(model.first) is nn.Linear
    was = model.first.weight.detach().clone()
    train(model, lambda epoch: data(), loss_of, epochs=1, lr=1e-2)
    assert (model.first.weight != was)[~masks["first.weight"]].any()


def test_a_frozen_network_resumes(tmp_path):
    """A stopped run of kept elements goes on, from a checkpoint, to the bits of the whole one."""
    def run(**options):
        model, _ = seeded(0.2)
        training = train(model, lambda epoch: [images(epoch), images(50 + epoch)], loss_of,
                         epochs=10, lr=1e-2, **options)
        return model, training.line

    def after_step(training):
        if training.steps == 7:
            save_checkpoint(training, tmp_path / "checkpoint.pt")
            raise KeyboardInterrupt

    whole, line = run()
    with pytest.raises(KeyboardInterrupt):
        run(after_step=after_step)
    resumed, again = run(resume=tmp_path / "checkpoint.pt")
    assert again == line
    state = whole.state_dict()
    assert state.keys() == resumed.state_dict().keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, state[name]), name


# ------------------------------------------------------------------------- the start and the file

def test_the_start_is_the_one_that_files_hold_as_a_seed():
    """LeNet's start from seed 0 has, for ever, these very bits; the random numbers are those of
    aflora.kaiming_uniform; bounds, biases and a norm's vectors are as the docstring says."""
    model = freezenet.lenet()
    seed_weights(model, 0)
    found = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        found.update(p.detach().numpy())
    assert found.hexdigest() == "de770feaa5545da8d0b7268523bf6efa05c54a4e7f7092997e4e133e0ca19871"
    assert torch.equal(freezenet.uniform("3/up.lora_A", (4, 8), math.sqrt(6 / 8)),
                       aflora.kaiming_uniform("3/up.lora_A", (4, 8)))
    for name, bound in (("3.weight", math.sqrt(6 / (20 * 25 + 50 * 25))),
                        ("7.weight", math.sqrt(6 / (800 + 500))), ("7.bias", 800 ** -0.5)):
        value = model.get_parameter(name).abs()
        assert 0.98 * bound < value.max() <= bound
        assert abs(value.mean() / (bound / 2) - 1) < 0.05
    conv = seeded()[0]
    assert (conv.norm.weight == 1).all() and (conv.norm.bias == 0).all()
    assert not torch.equal(conv.up.weight, seeded(seed=1)[0].up.weight)


def saved(path, keep=0.05, seed=7):
    """A trained network that is saved there: (network, masks, {name in the file: array})."""
    model, masks = seeded(keep, seed=seed)
    train(model, lambda epoch: [images()], loss_of, epochs=20, lr=1e-2)
    save_network(model, path, seed)
    with np.load(path, allow_pickle=False) as content:
        return model, masks, dict(content)


def test_freezenet_file_is_a_seed_positions_and_values(tmp_path):
    """A fresh network regrows to the same bits from a file that holds nothing else."""
    path = tmp_path / "net.npz"
    model, masks, content = saved(path)
    assert set(content) == {"seed", "positions", "values", "checksum"}
    assert content["seed"] == 7
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert len(content["values"]) == len(content["positions"]) == kept
    assert path.stat().st_size < 1500 + 8 * kept
    flat = torch.cat([value.flatten() for _, value in sorted(whole_values(model).items())])
    assert torch.equal(flat[content["positions"].astype(int)], torch.from_numpy(content["values"]))
    fresh = Conv()
    load_network(fresh, path)
    assert torch.equal(fresh(images(1)[0]), model(images(1)[0]))
    values = whole_values(model)
    for name, p in fresh.named_parameters():
        assert torch.equal(p, values[name]), name
        assert p.requires_grad
    save_network(fresh, tmp_path / "again.npz", 7)  # the plain network's file is the same
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_wrong_networks_and_seeds_are_refused(tmp_path):
    """Another network, a changed seed, a network with frozen elements: refused, nothing changed."""
    path = tmp_path / "net.npz"
    model, _, content = saved(path)
    fresh = Conv()
    before = [p.clone() for p in fresh.parameters()]
    with pytest.raises(AFLoRAError, match="frozen already"):
        load_network(seeded(0.05, seed=7)[0], path)
    with pytest.raises(AFLoRAError, match="net.npz: it is of another network"):
        load_network(Net(), path)
    renamed = Conv()
    renamed.norm2 = renamed._modules.pop("norm")  # the same values, 1 and 0, by another name
    with pytest.raises(AFLoRAError, match="another network"):
        load_network(renamed, path)
    for name, value in (("seed", 8), ("positions", content["positions"] + 10**6),
                        ("values", content["values"][1:])):
        np.savez(path, **content | {name: value})
        with pytest.raises(AFLoRAError, match="net.npz"):
            load_network(fresh, path)
    del content["checksum"]
    np.savez(path, **content)
    with pytest.raises(AFLoRAError, match="net.npz.*checksum"):
        load_network(fresh, path)
    for garbage in (b"", b"no archive"):
        path.write_bytes(garbage)
        with pytest.raises(AFLoRAError, match="net.npz"):
            load_network(fresh, path)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), before))

    for seed, word in ((8, "seed 8"), (-1, "seed"), (1.5, "seed")):
        with pytest.raises(AFLoRAError, match=word):
            save_network(model, tmp_path / "new.npz", seed)
    seed_weights(fresh, 2**64)  # more than the file can hold
    with pytest.raises(AFLoRAError, match="new.npz: OverflowError"):
        save_network(fresh, tmp_path / "new.npz", 2**64)
    with pytest.raises(AFLoRAError, match="float32"):
        save_network(seeded(0.5, dtype=torch.float64)[0], tmp_path / "new.npz", 0)
    assert [file.name for file in tmp_path.iterdir()] == ["net.npz"]  # none was half written


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_cannot_run_code(tmp_path):
    """A pickled object in place of the values is refused, and does nothing."""
    path = tmp_path / "net.npz"
    _, _, content = saved(path)
    bomb = np.array([Bomb(tmp_path / "gone off")], dtype=object)
    np.savez(path, **content | {"values": bomb})
    with pytest.raises(AFLoRAError, match="net.npz"):
        load_network(Conv(), path)
    assert not (tmp_path / "gone off").exists()
    with np.load(path, allow_pickle=True) as content:
        content["values"]
    assert (tmp_path / "gone off").exists()  # it would have


def test_damaged_files_are_read_rightly_or_refused(tmp_path):
    """A flipped bit in every fifth byte: an AFLoRAError, or the same network."""
    path = tmp_path / "net.npz"
    model, _, _ = saved(path)
    good = path.read_bytes()
    values = whole_values(model)
    refused = 0
    for place in range(0, len(good), 5):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        fresh = Conv()
        try:
            load_network(fresh, path)
        except AFLoRAError:
            refused += 1
        else:
            assert all(torch.equal(p, values[name]) for name, p in fresh.named_parameters())
    assert refused > len(good) / 5 / 2


def test_a_small_file_cannot_claim_a_huge_one(tmp_path):
    """The parts are compressed: what cannot be of this network is refused unread."""
    path = tmp_path / "net.npz"
    _, _, content = saved(path)
    load_network(Conv(), path)
    np.savez_compressed(path, **content | {"values": np.zeros(10**6, dtype=np.float32)})
    assert path.stat().st_size < 10**4
    with pytest.raises(AFLoRAError, match="net.npz: it is damaged: it claims"):
        load_network(Conv(), path)


def test_statistics_are_in_the_file(tmp_path):
    """BatchNorm's moving averages have no seed: they are saved, and checked, whole."""
    def network():
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))

    model = network()
    seed_weights(model, 3)
    freeze_one_shot(model, lambda model: loss_of(model, data()[0]), 0.2)
    train(model, lambda epoch: data(), loss_of, epochs=2, lr=1e-2)
    save_network(model, tmp_path / "net.npz", 3)
    fresh = network()
    load_network(fresh, tmp_path / "net.npz")
    assert fresh[1].num_batches_tracked == 17
    x = data()[0][0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    other = network()
    other[1].register_buffer("more", torch.zeros(1))
    with pytest.raises(AFLoRAError, match="net.npz.*more"):
        load_network(other, tmp_path / "net.npz")


def test_kept_elements_of_adapters_are_saved_as_adapters(tmp_path):
    """Adapters of which a choice kept some elements: made whole, they go into AFLoRA's own file, in
    which the untouched matrices are seeds."""
    model, _ = adapted(targets=["up"], modules_to_save=())
    masks = {}
    for i in range(2):
        masks[f"blocks.{i}.up.lora_A"] = torch.zeros(4, 8, dtype=torch.bool)
        masks[f"blocks.{i}.up.lora_B"] = torch.zeros(24, 4, dtype=torch.bool)
    masks["blocks.1.up.lora_B"][3, 1:3] = True
    start = model.get_parameter("blocks.1.up.lora_B").detach().clone()
    keep_elements(model, masks)
    train(model, lambda epoch: data(), loss_of, epochs=2, lr=1e-2)
    output = model(data()[0][0])
    make_whole(model)
    path = tmp_path / "a.pt"
    save_adapter(model, path)
    content = torch.load(path, weights_only=True)
    assert set(content["at_start"]) == set(masks) - {"blocks.1.up.lora_B"}
    moved = content["values"]["blocks.1.up.lora_B"] != start
    assert torch.equal(moved, masks["blocks.1.up.lora_B"])
    torch.manual_seed(0)
    fresh = Net()
    load_adapter(fresh, path)
    assert torch.equal(fresh(data()[0][0]), output)


# ---------------------------------------------------------------------------------------- MNIST

def test_lenet_of_the_mnist_comparison():
    """431,080 parameters; at x157 the example keeps 2,746 of them, and its file is at most 1/75 of
    the dense float32 values; SNIP's others are zero; the arms differ in what they keep."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 1, 28, 28, generator=generator)
    y = torch.randint(10, (50,), generator=generator)
    kept = set()
    for arm in list(freezenet.ARMS)[1:]:
        model = freezenet.lenet()
        seed_weights(model, 3)
        assert sum(p.numel() for p in model.parameters()) == freezenet.PARAMETERS == 431_080
        freezenet.choose(model, arm, 157, x, y, seed=3)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == 2746
        for p in trained:
            p.data += 1 + torch.rand(p.shape, generator=generator)
        values = torch.cat([value.flatten() for value in whole_values(model).values()])
        zeros = 431_080 - 2746 if arm == "SNIP" else 0
        assert (values == 0).sum() == zeros
        kept.add(tuple(len(p) for p in trained))
        if arm != "SNIP":
            assert len(freezenet.pack(model, 3)) <= 4 * 431_080 / 75
    assert len(kept) == 3  # SNIP keeps what FreezeNet keeps by |w * grad|


def test_a_run_leaves_a_line_like_the_committed_ones(monkeypatch):
    """On a few random images: the same fields, the counts, and a training that the seed fixes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 1, 28, 28, generator=generator)
    y = torch.randint(10, (300,), generator=generator)
    monkeypatch.setattr(freezenet, "load_mnist", lambda folder: (x, y, x[:50], y[:50]))
    committed = json.loads((ROOT / "results/freezenet_mnist.jsonl").read_text().splitlines()[0])
    lines = {}
    for arm, factor in (("dense", 1), ("FreezeNet |grad|", 157)):
        lines[arm] = freezenet.run(arm, factor, 0, 1, None)
        assert list(lines[arm]) == list(committed)
        assert freezenet.run(arm, factor, 0, 1, None) == lines[arm]
    assert lines["dense"]["trained"] == 431_080 and lines["dense"]["bytes"] == 4 * 431_080
    assert lines["FreezeNet |grad|"]["trained"] == 2746
    assert 4 * 2746 < lines["FreezeNet |grad|"]["bytes"] < 8 * 2746 + 2000


def test_batches_are_shifted_by_at_most_a_pixel():
    """Every image once an epoch, each batch rolled by one of nine shifts, anew in each epoch."""
    x = torch.arange(300 * 28 * 28, dtype=torch.float32).view(300, 1, 28, 28)
    y = torch.arange(300)
    shifts = set()
    for epoch in range(12):
        seen = []
        for batch, labels in freezenet.shifted_batches(x, y, 5, epoch):
            match = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)
                     if torch.equal(x[labels].roll((a, b), (2, 3)), batch)]
            assert len(match) == 1
            shifts.update(match)
            seen += labels.tolist()
        assert sorted(seen) == list(range(300)) and seen != sorted(seen)
    assert len(shifts) > 6


def test_mnist_files(tmp_path, monkeypatch):
    """Packed or not, from a folder or fetched into the cache; other contents are refused."""
    name = "t10k-labels-idx1-ubyte"
    labels = bytes(range(10))
    content = b"8 bytes." + labels
    entry = (hashlib.sha256(content).hexdigest(), (10,))
    monkeypatch.setattr(freezenet, "FILES", {name: entry})
    expected = torch.arange(10, dtype=torch.uint8)
    place = tmp_path / "MNIST"
    place.mkdir()
    (place / f"{name}.gz").write_bytes(gzip.compress(content))
    assert torch.equal(freezenet.load_file(name, tmp_path), expected)
    (place / name).write_bytes(content)
    assert torch.equal(freezenet.load_file(name, tmp_path), expected)
    (place / name).write_bytes(content[:-1] + b"x")
    with pytest.raises(AFLoRAError, match=f"{name}.*sha256"):
        freezenet.load_file(name, tmp_path)

    with pytest.raises(AFLoRAError, match=f"{name}.*no network"):
        freezenet.load_file(name, None)
    monkeypatch.setattr(freezenet.fetch, "download", lambda address: gzip.compress(content))
    assert torch.equal(freezenet.load_file(name, None), expected)
    cached = freezenet.fetch.CACHE / "MNIST" / name
    assert cached.read_bytes() == content
    monkeypatch.setattr(freezenet.fetch, "download", lambda address: content[1:])
    assert torch.equal(freezenet.load_file(name, None), expected)  # the cache's
    cached.unlink()
    with pytest.raises(AFLoRAError, match="sha256"):
        freezenet.load_file(name, None)
    assert not cached.exists()


def test_runs_in_other_processes_are_appended(tmp_path, monkeypatch, capsys):
    """Each finished run is a line behind those that are there; a failed one ends all, with them.

    The first runs are in new processes of Python, the others in forks, which start at once.
    """
    skip_with_cuda()
    path = tmp_path / "new" / "runs.jsonl"
    lines = [{"arm": "SNIP", "factor": 50, "seed": seed, "epochs": 2, "accuracy": 1.5}
             for seed in range(3)]
    run_all = freezenet.report.run_all
    run_all(dict, [(list(line.items()),) for line in lines[:1]], path, 1)
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: FORK)
    run_all(dict, [(list(line.items()),) for line in lines[1:]], path, 1)
    assert freezenet.report.read(path, 2) == lines
    assert freezenet.report.read(path, 3) == []
    assert "SNIP, x50, seed 2: 1.50 %" in capsys.readouterr().out
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no number"):
        run_all(int, [("no number",)], path, 1)
    assert path.read_bytes() == before


def test_finished_runs_are_not_run_again(tmp_path, capsys):
    """All runs are in the file: the table comes from it, and is the one in results/README.md."""
    lines = (ROOT / "results/freezenet_mnist.jsonl").read_text().splitlines()
    path = tmp_path / "runs.jsonl"
    other = json.loads(lines[0]) | {"epochs": 3, "accuracy": 0.0}  # of other epochs: left out
    path.write_text("\n".join([*reversed(lines), json.dumps(other)]) + "\n")
    before = path.read_bytes()
    assert freezenet.main(["--out", str(path), "--data", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    assert "0 still to do" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    readme = (ROOT / "results/README.md").read_text()
    assert len(rows) == 18 and all(row in readme for row in rows)
    assert path.read_bytes() == before

    path.write_text("\n".join(lines[1:]) + "\n")  # one is missing, and so are the images
    assert freezenet.main(["--out", str(path), "--data", str(tmp_path / "none")]) == 2
    assert "the folder MNIST of --data" in capsys.readouterr().err


# ------------------------------------------------------------- one shot among AFLoRA's matrices

def run_main(folder, flags, out="out"):
    """What main() returns for these flags and the tiny SST-2."""
    return freezenet.main(["--task", "sst2", "--model", str(folder), "--data", str(folder),
                           "--out", str(folder / out), *flags.split()])


# Two layers, r = 4: an A and a B have r (in + out) values, the two vectors r + out
FFN = 2 * 2 * 4 * (32 + 48)
VECTORS = 2 * (6 * 4 + 5 * 32 + 48)


@pytest.mark.parametrize("flags, share", [
    ("--preset quick", 1 - np.mean([freezing_fraction(t, 6, 1, 2) for t in range(6)])),
    ("--keep 0.25", 0.25),
    ("--keep 0.25 --amp bf16", 0.25),
])
def test_one_shot_among_matrices(folder, monkeypatch, flags, share):
    """Trains the vectors and a share of the FFN's A and B, by default AFLoRA's average, to the end.
    The pass that chooses leaves s_b at 0; the fields are those of the companion's result."""
    at_start = []

    def spy(model, *arguments, real=aflora.train, **options):
        layers = aflora.adapters_of(model).values()
        at_start.extend(layer.s_b.abs().sum().item() for layer in layers)
        return real(model, *arguments, **options)

    monkeypatch.setattr(aflora, "train", spy)
    assert run_main(folder, f"--epochs 1 --batch-size 4 {flags}") == 0
    assert at_start == [0.0] * 12
    result = json.loads((folder / "out/result.json").read_text())
    trained = VECTORS + round(float(share) * FFN)
    for key in ("trainable_start", "trainable_end", "trainable_average"):
        assert result[key] == trained
    assert result["method"] == "freezenet" and result["frozen_at"] == {}
    assert (result["sensitivity"], result["train_matrices"]) == ("gradient-weight", "ffn")
    planned = (None, None) if "--keep" in flags else (0.1, 0.4)  # they decide the default
    assert (result["t_i"], result["t_f"]) == planned
    assert result["keep"] == pytest.approx(float(share))
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "adapter.pt", "log.jsonl", "result.json"]
    assert glue.main(["--task", "sst2", "--model", str(folder), "--data", str(folder), "--out",
                      str(folder / "aflora"), "--epochs", "1", "--batch-size", "4"]) == 0
    aflora_result = json.loads((folder / "aflora/result.json").read_text())
    assert set(result) == set(aflora_result) | {"keep"}


def test_the_adapter_file_of_one_shot_is_what_was_trained(folder):
    """Loaded into a fresh model it scores as the last epoch; what was frozen is at its start."""
    assert run_main(folder, "--epochs 2 --batch-size 4 --keep 0.25") == 0
    model, tokenizer = tiny.load_tiny(folder)
    layers = load_adapter(model, folder / "out/adapter.pt")
    moved = 0
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            value = getattr(layer, matrix)
            start = aflora.kaiming_uniform(f"0/{name}/{matrix}", value.shape)
            changed = int((value != start).sum())
            moved += changed
            if name.rpartition(".")[2] not in ("intermediate", "output"):
                assert changed == 0
    assert 0 < moved <= round(0.25 * FFN)
    task = load_task("sst2", folder)
    dev = glue.Examples(task.dev, tokenizer)
    result = json.loads((folder / "out/result.json").read_text())
    predicted = glue.predict(model, dev, "fp32")
    assert glue.metrics(predicted, dev.labels)["accuracy"] == result["accuracy"]


def test_a_stopped_one_shot_run_resumes(folder, monkeypatch, capsys):
    """Stopped by a signal after step 8 of 18, it goes on to the same adapter and result."""
    flags = "--epochs 3 --batch-size 4 --checkpoint-every 4 --keep 0.3"
    assert run_main(folder, flags, "whole") == 0

    def after_step(run, training, real=glue.Run.after_step):
        if training.steps == 8:
            run.on_signal(2, None)
        real(run, training)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(glue.Run, "after_step", after_step)
        run_main(folder, flags)
    assert stop.value.code == 130
    assert f"--resume {folder / 'out'}" in capsys.readouterr().out
    resume = ["--task", "sst2", "--resume", str(folder / "out")]
    assert freezenet.main(resume) == 2
    assert "keep is 0.3 there, None here" in capsys.readouterr().err
    assert freezenet.main([*resume, "--keep", "0.3"]) == 0
    one, other = [torch.load(folder / name / "adapter.pt", weights_only=True)
                  for name in ("whole", "out")]
    assert one["values"].keys() == other["values"].keys()
    assert all(torch.equal(value, other["values"][key]) for key, value in one["values"].items())
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("whole", "out")]
    for result in results:
        for record in (*result["history"], result):
            for key in ("seconds", "ms_per_step", "peak_memory_bytes"):
                record.pop(key, None)
    assert results[0] == results[1]


@pytest.mark.parametrize("flags, word", [
    ("--keep 2", "keep"), ("--keep nan", "keep"), ("--train-matrices none", "train-matrices"),
    ("--method lora", "method"), ("--keep 0.2 --t-i 0.1", "--t-i"), ("--keep 0.2 --t-f 0", "--t-f"),
    ("--rank 0", "rank"), ("--data none", "none")])
def test_wrong_flags_of_one_shot(folder, capsys, flags, word):
    """Exit code 2, one line that names what is wrong, and no folder is left."""
    assert run_main(folder, flags) == 2
    message, = capsys.readouterr().err.strip().splitlines()
    assert word in message
    assert not (folder / "out").exists()


def test_ctrl_c_and_warnings_are_as_in_the_companion(monkeypatch):
    """130, and a warning has neither a path nor a source line."""
    def compare_on_mnist(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(warnings, "formatwarning", None)
    monkeypatch.setattr(freezenet, "compare_on_mnist", compare_on_mnist)
    assert freezenet.main([]) == 130
    assert warnings.formatwarning("short") == "warning: short\n"


def test_no_jobs_are_refused(capsys):
    """One line that names the flag."""
    assert freezenet.main(["--jobs", "0"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --jobs is 0") and message.count("\n") == 1


def test_flags_go_with_their_task(folder, capsys):
    """--quick is of MNIST, --epochs and --keep of text: none is silently ignored."""
    for flags in (["--task", "sst2", "--quick"], ["--epochs", "3"]):
        with pytest.raises(SystemExit) as stop:
            freezenet.main(flags)
        assert stop.value.code == 2
        assert "unrecognized arguments: --" in capsys.readouterr().err
    assert freezenet.main(["--keep", "0.5"]) == 2
    assert "--keep goes with --task" in capsys.readouterr().err
