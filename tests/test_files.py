"""Files: what they hold, what they refuse, and that none is ever half written."""

import copy
import multiprocessing
import random
import zipfile
from pathlib import Path

import fuzz
import pytest
import tiny
import torch
import torch.nn as nn
import torch.nn.functional as F

import aflora
from aflora import (AFLoRAError, add_adapters, load_adapter, merge_adapters, read_file,
                    save_adapter, save_checkpoint, train, write_file)


def trained(tmp_path, **options):
    """(a trained model, its file)."""
    model, _ = tiny.adapted(**options)
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    path = tmp_path / "a.pt"
    save_adapter(model, path)
    return model, path


# ----------------------------------------------------------------------------------- what they hold
class Normed(nn.Module):
    """A net whose frozen parts move in training, too: BatchNorm's statistics and a counter."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 9)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.head(self.norm(self.one(x))) + self.calls


def test_statistics_and_other_buffers_are_saved(tmp_path):
    """BatchNorm's running mean and variance move though its weights rest, and so may any buffer."""
    torch.manual_seed(0)
    model = Normed()
    plain = copy.deepcopy(model)
    add_adapters(model, ["one"])
    x = torch.randn(9, 8)
    train(model, lambda epoch: [x] * 9, lambda m, x: F.cross_entropy(m(x), torch.arange(9)),
          epochs=2, lr=1e-2)
    assert model.calls == 18
    assert not torch.equal(model.norm.running_var, plain.norm.running_var)
    save_adapter(model, tmp_path / "a.pt")
    load_adapter(plain, tmp_path / "a.pt")
    assert plain.norm.num_batches_tracked == 18
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_what_moves_in_a_base_is_saved(tmp_path):
    """The vectors of spectral normalisation do, in training mode, while its weight rests."""
    def make_model():
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
                             nn.Tanh(), nn.Linear(8, 2))

    model = make_model()
    add_adapters(model, ["0"], modules_to_save=["2"])
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=2, lr=1e-2)
    save_adapter(model, tmp_path / "a.pt")
    plain = make_model()
    load_adapter(plain, tmp_path / "a.pt")
    x = torch.randn(9, 8)
    assert torch.equal(plain.eval()(x), model.eval()(x))


class Int8Linear(nn.Linear):
    """A linear module as quantised ones are: whole numbers, and a scale in a buffer."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


def test_what_a_quantised_base_learned_goes_into_a_plain_one(tmp_path):
    """Trained on 8 bits, merged in float32: the file has nothing of how the base was quantised."""
    def make_model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    model = make_model()
    model[0] = Int8Linear(model[0])
    layers = add_adapters(model, ["0"], modules_to_save=["2"])
    model[0].base.bias.requires_grad_(True)  # what trains is in the file in any case
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=2, lr=1e-2)
    save_adapter(model, tmp_path / "a.pt")
    names = {f"0.{name}" for name in ("lora_A", "lora_B", "s_d", "s_b", "base.bias")}
    values = torch.load(tmp_path / "a.pt", weights_only=True)["values"]
    assert values.keys() == names | {"2.weight", "2.bias"}
    plain = make_model()
    load_adapter(plain, tmp_path / "a.pt")
    assert torch.equal(plain[0].delta_weight(), layers["0"].delta_weight())
    assert torch.equal(plain[0].base.bias, model[0].base.bias)
    aflora.merge_adapters(plain)
    x = torch.randn(5, 8)
    torch.testing.assert_close(plain(x), model(x), atol=0.05, rtol=0)


def test_what_else_trains_is_saved(tmp_path):
    """Parameters that the user unfroze behind add_adapters() go into the file like the head."""
    model, _ = tiny.adapted()
    model.blocks[1].norm.requires_grad_(True)
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    torch.manual_seed(0)
    plain = tiny.Net()
    assert not torch.equal(model.blocks[1].norm.weight, plain.blocks[1].norm.weight)
    save_adapter(model, tmp_path / "a.pt")
    load_adapter(plain, tmp_path / "a.pt")
    x, _ = tiny.data()[0]
    assert torch.equal(plain(x), model(x))


def test_a_file_need_not_hold_what_else_trains(tmp_path):
    """A model in which the user unfroze something more takes the file of one without that."""
    _, path = trained(tmp_path)
    model, _ = tiny.adapted()
    model.blocks[1].norm.requires_grad_(True)
    load_adapter(model, path)
    torch.manual_seed(0)
    plain = tiny.Net()
    load_adapter(plain, path)
    x, _ = tiny.data()[0]
    assert torch.equal(model(x), plain(x))


class Counting(nn.Module):
    """A head whose state holds something that is no tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2)
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def trained_with_norms(tmp_path):
    """(a model whose LayerNorms trained, too, since the user let them, a path for its file)."""
    model, _ = tiny.adapted()
    for block in model.blocks:
        block.norm.requires_grad_(True)
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    return model, tmp_path / "norms.pt"


def test_what_trained_is_in_the_file_though_it_was_frozen_since(tmp_path):
    """A model is often frozen whole before it serves."""
    model, path = trained_with_norms(tmp_path)
    model.requires_grad_(False)
    save_adapter(model, path)
    torch.manual_seed(0)
    plain = tiny.Net()
    load_adapter(plain, path)
    x, _ = tiny.data()[0]
    assert torch.equal(plain(x), model(x))


def test_a_file_does_not_mix_with_the_one_before(tmp_path):
    """The first has LayerNorms, the second none: its adapters would stand beside the first's."""
    model, path = trained_with_norms(tmp_path)
    save_adapter(model, path)
    _, other = trained(tmp_path)
    torch.manual_seed(0)
    plain = tiny.Net()
    load_adapter(plain, path)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(AFLoRAError, match="norm"):
        load_adapter(plain, other)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])
    load_adapter(plain, path)


def test_extra_state_comes_back(tmp_path):
    """From an adapter file and from a checkpoint."""
    models = [nn.Sequential(nn.Linear(8, 8), Counting()) for _ in range(3)]
    first, second, third = models
    settings = dict(epochs=1, lr=1e-2)

    def loss(model, batch):
        x, labels = batch
        return F.cross_entropy(model(x), labels)

    for model in (first, third):
        add_adapters(model, ["0"], modules_to_save=["1"])
    training = train(first, lambda epoch: tiny.data(), loss, **settings)
    save_checkpoint(training, tmp_path / "c.pt")
    save_adapter(first, tmp_path / "a.pt")
    load_adapter(second, tmp_path / "a.pt")
    assert second[1].calls == 8
    train(third, lambda epoch: tiny.data(), loss, resume=tmp_path / "c.pt", **settings)
    assert third[1].calls == 8


def test_the_base_is_not_in_the_file(tmp_path):
    """Only the adapters and the head are, so the file is small."""
    model, path = trained(tmp_path)
    values = torch.load(path, weights_only=True)["values"]
    assert values.keys() == {
        *(f"blocks.{i}.{layer}.{name}" for i in range(2) for layer in ("query", "up", "down")
          for name in ("lora_A", "lora_B", "s_d", "s_b")),
        "head.weight", "head.bias"}


def test_frozen_matrices_are_in_the_file(tmp_path):
    """A matrix that froze is as it was learned, not as it started."""
    model, layers = tiny.adapted()
    freezer, _ = tiny.run(model, layers)
    assert len(freezer.frozen_at) == 12
    save_adapter(model, tmp_path / "a.pt")
    torch.manual_seed(0)
    plain = tiny.Net()
    load_adapter(plain, tmp_path / "a.pt")
    x, _ = tiny.data()[0]
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_type_keeps_its_file_small(tmp_path, dtype):
    """Matrices at their start are a seed also where the whole model was cast; it loads again."""
    model, _ = tiny.adapted(train_matrices=["up"])
    tiny.perturb(model.blocks[0])
    model.to(dtype)
    save_adapter(model, tmp_path / "a.pt")
    assert "blocks.1.query.lora_A" in torch.load(tmp_path / "a.pt", weights_only=True)["at_start"]
    fresh, _ = tiny.adapted(train_matrices=["up"])
    load_adapter(fresh.to(dtype), tmp_path / "a.pt")
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


# --------------------------------------------------------------------------------- what they refuse
def test_files_for_another_adapter_say_what_differs(tmp_path):
    """Rank, targets, matrices, head or seed of another model: refused by name, both given."""
    _, path = trained(tmp_path)
    for options, words in (
            ({"rank": 8}, "rank is 4 there, 8 here"),
            ({"targets": ["query"]}, "targets is .*up.* there"),
            ({"train_matrices": ["up"]}, "train_matrices is"),
            ({"modules_to_save": ()}, "modules_to_save is .*head.* there"),
            ({"seed": 3}, "seed is 0 there, 3 here")):
        model, _ = tiny.adapted(**options)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(AFLoRAError, match=f"a.pt: .*{words}"):
            load_adapter(model, path)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("model, words", [
    (tiny.Net(depth=1), "blocks.1.query"),
    (tiny.Net(width=4), "shape|blocks.*regrown"),
    (tiny.Net(classes=3), "head"),
    (nn.Sequential(nn.Linear(2, 2)), "query"),
])
def test_files_for_another_base_say_what_differs(tmp_path, model, words):
    """Depth, width or classes of another model: no value is changed."""
    _, path = trained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AFLoRAError, match=words):
        load_adapter(model, path)
    now = model.state_dict()
    for name, value in before.items():
        if name not in now:  # the plain model has adapters now
            name = f"{name.rpartition('.')[0]}.base.{name.rpartition('.')[2]}"
        assert torch.equal(now[name], value)


def test_values_that_are_missing_or_too_many_are_named(tmp_path):
    """A file that does not hold all the model needs, or more, is refused before any change."""
    model, path = trained(tmp_path)
    content = torch.load(path, weights_only=True)
    before = copy.deepcopy(model.state_dict())
    for name in ("head.bias", "blocks.1.up.lora_B", "blocks.0.query.s_b"):
        values = dict(content["values"])
        del values[name]
        torch.save(content | {"values": values}, path)
        with pytest.raises(AFLoRAError, match=f"a.pt: .*{name}"):
            load_adapter(model, path)
    torch.save(content | {"values": content["values"] | {"other.weight": torch.ones(1)}}, path)
    with pytest.raises(AFLoRAError, match="a.pt: .*other.weight"):
        load_adapter(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_matrix_that_does_not_regrow_is_named(tmp_path):
    """The checksum guards the seed: another stream of random numbers would give another model."""
    model, path = trained(tmp_path, train_matrices=["up", "down"])
    content = torch.load(path, weights_only=True)
    name = "blocks.1.query.lora_B"
    key, checksum = content["at_start"][name]
    before = copy.deepcopy(model.state_dict())
    for changed in ([key, "0" * 64], [key + "x", checksum]):
        torch.save(content | {"at_start": content["at_start"] | {name: changed}}, path)
        with pytest.raises(AFLoRAError, match="blocks.1.query.lora_B.*regrown"):
            load_adapter(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    """It is said, and no file is made."""
    with pytest.raises(AFLoRAError, match="add_adapters"):
        save_adapter(tiny.Net(), tmp_path / "b.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_can_take_a_file(tmp_path):
    """As any plain model, it gets new adapters."""
    model, path = trained(tmp_path)
    merge_adapters(model)
    merged = {name: p.clone() for name, p in model.named_parameters()}
    layers = load_adapter(model, path)
    assert len(layers) == 6
    for name, layer in layers.items():
        assert torch.equal(layer.base.weight, merged[f"{name}.weight"])


class Bomb:
    """Makes a file when it is unpickled."""
    marker = None

    def __reduce__(self):
        return (open, (str(Bomb.marker), "w"))


def test_files_cannot_run_code(tmp_path):
    """A pickled call is refused before it runs, in an adapter file and in a checkpoint."""
    Bomb.marker = tmp_path / "ran"
    path = tmp_path / "a.pt"
    torch.save({"format": aflora.ADAPTER_FORMAT, "config": Bomb()}, path)
    with pytest.raises(AFLoRAError, match="a.pt"):
        load_adapter(tiny.Net(), path)
    torch.save({"format": aflora.CHECKPOINT_FORMAT, "plan": Bomb()}, path)
    with pytest.raises(AFLoRAError, match="a.pt"):
        tiny.resumable(resume=path)
    assert not Bomb.marker.exists()
    torch.load(path, weights_only=False)
    assert Bomb.marker.exists()  # that call would have run


def test_damaged_and_missing_files_are_refused(tmp_path):
    """Whatever is cut off or put in place of the file, the message names it."""
    _, path = trained(tmp_path)
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[:len(content) // 2], content[:-30], content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(AFLoRAError, match="a.pt"):
            load_adapter(tiny.Net(), path)
    for unreadable in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(AFLoRAError, match=unreadable.name):
            load_adapter(tiny.Net(), unreadable)


def test_no_flipped_bit_changes_a_value(tmp_path):
    """A file with one wrong bit is refused, or it loads as it was: the bit was of no meaning."""
    model, path = trained(tmp_path)
    x, _ = tiny.data()[0]
    expected = model(x)
    content = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        position = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        torch.manual_seed(0)
        fresh = tiny.Net()
        try:
            load_adapter(fresh, path)
        except AFLoRAError as error:
            assert "a.pt" in str(error)
            refused += 1
        else:
            assert torch.equal(fresh(x), expected)
    assert refused > 20


def test_a_small_file_cannot_claim_a_huge_one(tmp_path):
    """Compressed parts, by which a few bytes could fill the memory, are refused unread."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert path.stat().st_size < 10**5
    with pytest.raises(AFLoRAError, match="a.pt: .*damaged"):
        read_file(path, aflora.ADAPTER_FORMAT)


def test_other_formats_are_refused(tmp_path):
    """A checkpoint is no adapter file, and a file of another version says which one it is."""
    path = tmp_path / "a.pt"
    for there in (aflora.CHECKPOINT_FORMAT, "aflora adapter 1"):
        torch.save({"format": there}, path)
        with pytest.raises(AFLoRAError, match=f"a.pt: format is {there} there, aflora adapter"):
            load_adapter(tiny.Net(), path)
    torch.save([1, 2], path)
    with pytest.raises(AFLoRAError, match="a.pt"):
        load_adapter(tiny.Net(), path)


# ----------------------------------------------------------------------------- how they are written
def test_a_failed_write_leaves_the_old_file(tmp_path):
    """What cannot be written whole is not written at all, and leaves no temporary file."""
    path = tmp_path / "f"
    write_file(path, b"old")
    with pytest.raises(AFLoRAError, match="f: "):
        write_file(path, lambda: "no pickle of this")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    """Where a file stands in place of the folder."""
    path = tmp_path / "f"
    write_file(path, b"old")
    with pytest.raises(AFLoRAError, match="below_a_file"):
        write_file(path / "below_a_file", b"new")
    assert path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Ctrl-C in the middle of torch.save, or before the name is changed."""
    path = tmp_path / "f"
    write_file(path, b"old")

    def interrupted(*args):
        raise KeyboardInterrupt

    for module, name in ((torch, "save"), (aflora.os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_file(path, {"new": 1})
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path):
    """An hour's work is not lost for want of a folder."""
    model, _ = tiny.adapted()
    path = tmp_path / "runs" / "first" / "a.pt"
    save_adapter(model, str(path))
    assert load_adapter(model, path)
    assert list(path.parent.iterdir()) == [path]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Python's own open() would make a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # under Windows
    write_file("~/models/a.pt", dict(format="kind", value=7))
    assert (tmp_path / "models/a.pt").exists()
    assert read_file("~/models/a.pt", "kind")["value"] == 7


def test_a_symbolic_link_stays(tmp_path):
    """What it points to is replaced, also over two links; a dangling one makes its target."""
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    link = tmp_path / "link"
    link.symlink_to("elsewhere/target")
    second = tmp_path / "second"
    second.symlink_to(link)
    for path, content in ((link, b"one"), (second, b"two")):
        write_file(path, content)
        assert target.read_bytes() == path.read_bytes() == content
    assert link.is_symlink() and second.is_symlink() and not target.is_symlink()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def write_often(path, letter, start):
    """Writes a hundred times, as soon as `start` says so."""
    start.wait()
    for _ in range(100):
        write_file(path, letter * 100_000)


def test_two_processes_may_write_the_same_file(tmp_path):
    """At every moment one of both is there, whole; neither fails, and nothing is left behind."""
    path = tmp_path / "f"
    context = multiprocessing.get_context("fork")  # quick: torch is imported already
    start = context.Event()
    writers = [context.Process(target=write_often, args=(path, letter, start), daemon=True)
               for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    start.set()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 100_000
            assert len(set(content)) == 1
            seen |= set(content)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen == set(b"ab")
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_files_are_read_rightly_or_refused():
    """The short form of fuzz.py: 300 mutated files of four kinds; no other error or value."""
    counts = fuzz.main(300)
    assert len(counts) == 4
    for read, refused in counts.values():
        assert read > 0 and refused > 0
