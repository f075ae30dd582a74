"""The training loop: what it is given, what it logs, when it stops, how it goes on."""

import ast
import contextlib
import copy
import functools
import itertools
import math
import re

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import aflora
from aflora import (AdaptiveFreezer, AFLoRAError, Training, add_adapters, load_checkpoint,
                    save_adapter, save_checkpoint, train)


def always(batches):
    """The same batches in each epoch."""
    return lambda epoch: batches


@functools.cache
def uninterrupted():
    """What tiny.resumable() gives if nobody stops it."""
    return tiny.resumable()


# --------------------------------------------------------------------------------- what it is given
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("enabled", [False, True])
def test_an_autocast_around_it_changes_nothing(enabled, precision):
    """All autocasts share one cache of cast weights, which empties when the outermost ends: the
    head would stay what it was in step 1. And in fp32 backward would be in bf16."""
    models = []
    for around in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled)):
        model, _ = tiny.adapted()
        with around:
            train(model, always(tiny.data()), tiny.loss_of, epochs=2, lr=1e-2, precision=precision)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models)):
        assert p.equal(q)


@pytest.mark.parametrize("options, word", [
    ({"precision": "fp8"}, "precision"),
    ({"epochs": 0}, "epochs"),
    ({"epochs": 1.5}, "epochs"),
    ({"lr": -1.0}, "lr"),
    ({"lr": math.nan}, "lr"),
    ({"lr": math.inf}, "lr"),
    ({"head_lr": 0.0}, "head_lr"),
    ({"accumulate": 0}, "accumulate"),
    ({"accumulate": 2.5}, "accumulate"),
    ({"clip": 0}, "clip"),
    ({"clip": None}, "clip is None: give a number from 1e-12"),
    ({"lr": "1e-3"}, "lr is '1e-3': give a number from 1e-12"),
    ({"warmup": 1.5}, "warmup"),
    ({"warmup": -0.1}, "warmup"),
    ({"weight_decay": -1.0}, "decay"),
    ({"weight_decay": math.nan}, "decay"),
])
def test_wrong_arguments(options, word):
    """Impossible arguments are refused by name before anything runs."""
    model, _ = tiny.adapted()
    options = {"epochs": 1, "lr": 1e-2} | options
    with pytest.raises(AFLoRAError, match=word):
        train(model, always(tiny.data()), tiny.loss_of, **options)


def test_a_model_without_values_is_refused():
    """As accelerate leaves one that it has offloaded."""
    model, _ = tiny.adapted()
    with pytest.raises(AFLoRAError, match="no values: load it, and train it without offloading"):
        train(model.to("meta"), always(tiny.data()), tiny.loss_of, epochs=1, lr=1e-2)


def test_the_freezer_has_to_be_new_and_for_as_many_steps():
    """One for another number of steps would freeze at wrong ones; a used one has other scores."""
    model, layers = tiny.adapted()
    with pytest.raises(AFLoRAError, match="8.*freezer"):
        tiny.run(model, layers, epochs=1, freezer=AdaptiveFreezer(layers, 500, 10, 20))
    freezer, _ = tiny.run(model, layers, epochs=1)
    with pytest.raises(AFLoRAError, match="freezer"):
        tiny.run(model, layers, epochs=1, freezer=freezer)


def test_a_model_in_which_nothing_trains_is_refused():
    """It says so, in place of the optimizer's own words."""
    with pytest.raises(AFLoRAError, match="train"):
        train(tiny.Net().requires_grad_(False), always(tiny.data()), tiny.loss_of, epochs=1, lr=1.0)


@pytest.mark.parametrize("batches", [
    lambda epoch: tiny.data()[epoch:],
    lambda epoch: tiny.data(batches=8 + epoch),
    lambda epoch: [],
    lambda epoch: [] if epoch else tiny.data(),
])
def test_epochs_have_to_be_equally_long_and_not_empty(batches):
    """Steps would be made of nothing, or batches left out, without a word."""
    model, _ = tiny.adapted()
    with pytest.raises(AFLoRAError, match="batches"):
        train(model, batches, tiny.loss_of, epochs=2, lr=1e-2)


def test_batches_may_be_dicts():
    """Nested dicts, tuples and lists of tensors reach the loss as they are."""
    def loss(model, batch):
        assert batch["name"] == "a"
        assert isinstance(batch["inputs"], list) and isinstance(batch["pair"], tuple)
        return tiny.loss_of(model, (batch["inputs"][0], batch["pair"][0]))

    model, _ = tiny.adapted()
    batches = [{"inputs": [x], "pair": (labels,), "name": "a"} for x, labels in tiny.data()]
    training = train(model, always(batches), loss, epochs=1, lr=1e-2)
    expected_model, _ = tiny.adapted()
    expected = train(expected_model, always(tiny.data()), tiny.loss_of, epochs=1, lr=1e-2)
    assert training.line == expected.line


def test_gradients_from_before_do_not_count():
    """What a backward() before train() left, also in frozen weights, changes nothing."""
    histories = [[], []]
    for before in (False, True):
        torch.manual_seed(0)
        model = tiny.Net()
        if before:
            (100 * tiny.loss_of(model, tiny.data()[0])).backward()
        layers = add_adapters(model, ["up"], modules_to_save=["head"])
        tiny.run(model, layers, epochs=2, after_step=tiny.epoch_ends(histories[before]))
    assert len(histories[0]) == 2
    assert histories[0] == histories[1]


# ---------------------------------------------------------------------------------- rates and decay
def test_each_parameter_has_its_rate_and_its_decay():
    """head_lr goes to modules_to_save, lr to the rest; vectors and biases do not decay."""
    model, _ = tiny.adapted(train_matrices=["up"])
    training = Training(
        model, tiny.loss_of, total_steps=8, lr=1e-2, head_lr=3e-3, weight_decay=0.1)
    found = {}
    for group in training.optimizer.param_groups:
        for p in group["params"]:
            assert p not in found
            found[p] = (group["peak_lr"], group["weight_decay"])
    for name, p in model.named_parameters():
        if "head" in name:
            assert found.pop(p) == (3e-3, 0.1 if "weight" in name else 0.0)
        elif "s_" in name:
            assert found.pop(p) == (1e-2, 0.0)
        elif "up.lora" in name:
            assert found.pop(p) == (1e-2, 0.1)
    assert not found
    assert training.optimizer.defaults["betas"] == (0.9, 0.999)


def test_without_decay_a_vector_at_rest_stays():
    """A loss that does not depend on s_d leaves it, while decay moves the matrices."""
    model, layers = tiny.adapted()
    start = copy.deepcopy(model.state_dict())
    train(model, always(tiny.data()), lambda m, batch: m(batch[0]).sum() * 0, epochs=1, lr=1e-2,
          weight_decay=0.1)
    for name, value in model.state_dict().items():
        decayed = name == "head.weight" or "lora" in name
        assert torch.equal(value, start[name]) != decayed


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5])
def test_warm_up_and_decay_of_the_rate(warmup):
    """The rate of each step, from the two lines that it follows."""
    model, _ = tiny.adapted()
    rates = []

    def after_step(training):
        rates.append({group["peak_lr"]: group["lr"] for group in training.optimizer.param_groups})

    train(model, always(tiny.data()), tiny.loss_of, epochs=5, lr=1e-2, head_lr=2e-2, warmup=warmup,
          after_step=after_step)
    assert len(rates) == 40
    for step, rate in enumerate(rates):
        rising = (step + 1) / (warmup * 40 + 1)
        falling = (40 - step) / (40 - warmup * 40)
        share = min(rising, falling)
        assert rate == {1e-2: pytest.approx(1e-2 * share, rel=1e-9),
                        2e-2: pytest.approx(2e-2 * share, rel=1e-9)}


# ---------------------------------------------------------------------------------- what it reports
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(precision):
    """The loss falls, the head and vectors move, the base stays; the log says what is frozen."""
    model, layers = tiny.adapted()
    start = copy.deepcopy(model.state_dict())
    lines = {}

    def after_step(training):
        if training.line["step"] == training.steps:
            lines[training.steps] = training.line
        part = model if training.steps % 2 == 0 else model.blocks[1].norm
        part.eval()  # train() puts it back

    def loss(model, batch):
        assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
        return tiny.loss_of(model, batch)

    freezer = AdaptiveFreezer(layers, 160, 16, 48)
    training = train(
        model, always(tiny.data()), loss, epochs=20, lr=1e-2, weight_decay=0.1, freezer=freezer,
        precision=precision, after_step=after_step)
    assert lines[160]["loss"] < 0.8 * lines[8]["loss"]
    assert training.steps == 160 and len(freezer.frozen_at) == 12
    for name, value in model.state_dict().items():
        if "base" in name or "norm" in name:
            assert torch.equal(value, start[name]) and value.dtype == torch.float32
        elif "lora" not in name:
            assert not torch.equal(value, start[name])
    assert lines.keys() == {*range(10, 161, 10), *range(8, 161, 8), *freezer.frozen_at.values()}
    for step, line in lines.items():
        assert line["epoch"] == (step - 1) // 8 + 1
        assert line["scheduled"] == float(aflora.freezing_fraction(step, 160, 16, 48))
        frozen = sum(at <= step for at in freezer.frozen_at.values())
        assert line["frozen"] == frozen / 12
        if step % 10 == 0:
            assert frozen == math.floor(12 * aflora.freezing_fraction(step, 160, 16, 48))
        assert line["loss"] > 0 and line["lr"] > 0


def test_a_line_s_loss_is_the_mean_of_its_epoch_so_far():
    """Of the steps of this epoch, each the mean of its micro-batches; without freezer no share."""
    model, _ = tiny.adapted()
    losses = []
    seen = []

    def loss(model, batch):
        value = tiny.loss_of(model, batch)
        losses.append(value.item())
        return value

    def after_step(training):
        if training.line.get("step") == training.steps:
            done = (training.steps - 1) % 12 + 1
            mean = sum(losses[-2 * done:]) / (2 * done)
            assert training.line["loss"] == pytest.approx(mean, rel=1e-5)
            assert training.line.keys() == {"epoch", "step", "skipped", "lr", "loss"}
            seen.append(training.steps)

    train(model, always(tiny.data(batches=24)), loss, epochs=2, lr=1e-2, accumulate=2,
          after_step=after_step)
    assert seen == [10, 12, 20, 24]


def test_losses_are_summed_in_float32_whatever_the_default_type_is():
    """A sum in bfloat16 would stop to grow at about 256 times its summands."""
    model = torch.nn.Linear(1, 1)
    batches = [torch.ones(1, 1)] * 600
    torch.set_default_dtype(torch.bfloat16)
    try:
        training = train(model, lambda epoch: batches, lambda model, batch:
                         0 * model(batch).sum() + 0.75, epochs=1, lr=1e-2, accumulate=20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert training.line["loss"] == pytest.approx(0.75, rel=1e-4)


class Transfers(TorchDispatchMode):
    """Counts where a value of a tensor is asked for one by one: item(), float(), bool()."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_never_waits_for_the_device(precision, monkeypatch):
    """Not one item(), float() or bool() of a tensor before the report at the end, nor a copy to the
    host or a shape that depends on values; tolist() once for a logged line and once for a look that
    freezes."""
    model, layers = tiny.adapted()
    lists = []
    lines = []
    real = torch.Tensor.tolist

    def tolist(tensor):
        lists.append(tensor)
        return real(tensor)

    def after_step(training):
        if training.line.get("step") == training.steps:
            lines.append(training.line)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    for waiting in ("cpu", "numpy", "nonzero", "__array__"):
        monkeypatch.setattr(torch.Tensor, waiting, None)
    with Transfers() as transfers:
        freezer, _ = tiny.run(model, layers, 5, precision=precision, after_step=after_step)
    assert transfers.count <= 1  # the optimizer's steps, once, before the first matrix freezes
    assert len(freezer.frozen_at) == 12
    assert len(lists) == len(lines) + len(set(freezer.frozen_at.values()))
    with Transfers() as transfers:
        bool(torch.ones(1))
    assert transfers.count == 1


class Tripled(Training):
    """Stands for several processes: what it does to the gradients comes before everything else."""

    def average_gradients(self):
        parameters = [p for p in self.parameters if p.requires_grad]
        self.norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.grad *= 3


class Given(Training):
    """Has a gradient that only another process computed."""

    def average_gradients(self):
        self.model.pooler.weight.grad = torch.ones_like(self.model.pooler.weight)


def test_a_gradient_that_comes_with_the_average_is_clipped_with_the_others(monkeypatch):
    """It counts in the norm, and is divided by it."""
    model = tiny.Net()
    model.pooler = torch.nn.Linear(8, 8)
    add_adapters(model, ["up"], modules_to_save=["pooler"])
    training = Given(model, tiny.loss_of, total_steps=4, lr=1e-2, clip=0.5)
    seen = []
    training.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model.parameters() if p.grad is not None))
    training.step([tiny.data()[0]])
    assert any(grad.shape == (8, 8) and grad.unique().numel() == 1 for grad in seen)
    assert torch.stack([grad.norm() for grad in seen]).norm().item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_averaged_before_they_are_unscaled_and_scored(precision):
    """A subclass that triples them triples the scores; it sees the sum of all micro-batches."""
    freezers = {}
    trainings = {}
    for kind in (Training, Tripled):
        model, layers = tiny.adapted()
        tiny.perturb(model)
        freezers[kind] = AdaptiveFreezer(layers, 8, 2, 2)
        trainings[kind] = kind(model, tiny.loss_of, total_steps=8, lr=1e-2, clip=1e-3,
                               freezer=freezers[kind], precision=precision)
        trainings[kind].step(tiny.data()[:2])
    for name, once in freezers[Training].Ibar.items():
        torch.testing.assert_close(
            freezers[Tripled].Ibar[name], 3 * once, rtol=1e-3, atol=1e-9)
    model, _ = tiny.adapted()
    tiny.perturb(model)
    (sum(tiny.loss_of(model, batch) for batch in tiny.data()[:2]) / 2).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
    scale = 65536.0 if precision == "fp16" else 1.0
    assert (trainings[Tripled].norm / scale).item() == pytest.approx(expected.item(), rel=2e-2)


# ------------------------------------------------------------------------------------ when it stops
def spoiled(batches, position):
    """The same batches, of which one has NaN as inputs."""
    x, labels = batches[position]
    return [*batches[:position], (x * math.nan, labels), *batches[position + 1:]]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run(precision):
    """At the next line, which says what to do. Overflowed gradients are the fp16 scaler's business,
    a NaN loss is not."""
    model, _ = tiny.adapted()
    steps = []
    with pytest.raises(AFLoRAError, match="not finite in steps 11 to 20, .*lower lr"):
        train(model, always(spoiled(tiny.data(batches=24), 13)), tiny.loss_of, epochs=2, lr=1e-2,
              precision=precision, after_step=lambda training: steps.append(training.steps))
    assert steps == list(range(1, 20))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spoil", [
    lambda loss, weight: loss + (weight.sum() * 0).abs().sqrt(),  # its gradient is inf * 0
    lambda loss, weight: loss * 1e25,  # each element is finite, but not their norm
])
def test_a_gradient_that_is_not_finite_stops_the_run(precision, spoil):
    """Without a scaler also where the loss itself is finite."""
    def loss(model, batch):
        return spoil(tiny.loss_of(model, batch), model.head.weight)

    model, _ = tiny.adapted()
    with pytest.raises(AFLoRAError, match="not finite.*lower lr"):
        train(model, always(tiny.data()), loss, epochs=1, lr=1e-2, precision=precision)


def test_no_checkpoint_after_a_bad_step(tmp_path):
    """The last good checkpoint stays, and a run goes on from there."""
    path = tmp_path / "c.pt"

    def after_step(training):
        if training.steps % 2 == 0:
            save_checkpoint(training, path)

    model, _ = tiny.adapted()
    batches = tiny.data()
    with pytest.raises(AFLoRAError, match="not finite"):
        train(model, always(spoiled(batches, 2)), tiny.loss_of, epochs=2, lr=1e-2,
              after_step=after_step)
    assert list(tmp_path.iterdir()) == [path]
    model, _ = tiny.adapted()
    steps = []
    training = train(model, always(batches), tiny.loss_of, epochs=2, lr=1e-2, resume=path,
                     after_step=lambda training: steps.append(training.steps))
    assert steps == list(range(3, 17))
    expected_model, _ = tiny.adapted()
    expected = train(expected_model, always(batches), tiny.loss_of, epochs=2, lr=1e-2)
    assert training.line == expected.line


# ----------------------------------------------------------------------------------- how it goes on
def shuffled_run(after_step=None, resume=None):
    """Twelve epochs of five steps; order, dropout and noise come from torch's generator."""
    model, layers = tiny.adapted()
    torch.manual_seed(3)
    x, labels = tiny.data(batches=1, size=72)[0]
    loader = DataLoader(TensorDataset(x, labels), batch_size=8, shuffle=True)

    def loss(model, batch):
        noisy = F.dropout(batch[0], 0.3, model.training)
        return tiny.loss_of(model, (noisy, batch[1]))

    freezer = AdaptiveFreezer(layers, 60, 6, 16)
    training = train(model, always(loader), loss, epochs=12, accumulate=2, lr=1e-2, freezer=freezer,
                     after_step=after_step, resume=resume)
    numbers = {"last line": training.line, "frozen_at": freezer.frozen_at}
    return numbers, model.state_dict() | {"random": torch.get_rng_state()}


@functools.cache
def uninterrupted_shuffled():
    """What shuffled_run() gives if nobody stops it."""
    return shuffled_run()


@pytest.mark.parametrize("stop", [3, 25, 52])
def test_a_shuffling_loader_goes_on_in_its_order(tmp_path, stop):
    """A plain DataLoader with shuffle=True: amid an epoch and at its end, to the same bits."""
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        shuffled_run(after_step=tiny.stop_after(stop, path))
    torch.manual_seed(99)
    tiny.assert_same_run(shuffled_run(resume=path), uninterrupted_shuffled())


def test_a_shuffling_loader_draws_another_order_in_each_epoch():
    """As it does in any other loop, with the labels staying with their rows."""
    x, labels = tiny.data(batches=1, size=16)[0]
    loader = DataLoader(TensorDataset(x, labels), batch_size=16, shuffle=True)
    orders = []

    def loss(model, batch):
        rows = [(x == row).all(1).nonzero().item() for row in batch[0]]
        assert torch.equal(labels[rows], batch[1])
        orders.append(tuple(rows))
        return tiny.loss_of(model, batch)

    model, _ = tiny.adapted()
    train(model, always(loader), loss, epochs=4, lr=1e-2)
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(16)) for order in orders)


def test_a_run_that_died_between_micro_batches_resumes(tmp_path):
    """What a lost run had done since its checkpoint is done again, to the same bits; twice."""
    path = tmp_path / "c.pt"

    def dies_at(call):
        calls = itertools.count(1)

        def loss(model, batch):
            if next(calls) == call:
                raise RuntimeError("killed")
            x, labels = batch
            return tiny.loss_of(model, (F.dropout(x, 0.3, model.training), labels))

        return loss

    def save(training):
        if training.steps % 4 == 0:
            save_checkpoint(training, path)

    with pytest.raises(RuntimeError, match="killed"):
        tiny.resumable(loss=dies_at(56), after_step=save)  # in step 28: 24 are saved
    with pytest.raises(RuntimeError, match="killed"):
        tiny.resumable(loss=dies_at(20), after_step=save, resume=path)
    steps = []
    resumed = tiny.resumable(after_step=lambda training: steps.append(training.steps), resume=path)
    assert steps == list(range(33, 61))
    tiny.assert_same_run(resumed, uninterrupted())


def test_a_checkpoint_from_more_gpus_resumes(tmp_path, monkeypatch):
    """The random states of devices that are not there now are left out."""
    path = tmp_path / "c.pt"
    given = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16)] * 3)
        patch.setattr(torch.cuda, "set_rng_state_all", lambda states: None)
        with pytest.raises(KeyboardInterrupt):
            tiny.resumable(after_step=tiny.stop_after(22, path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    tiny.assert_same_run(tiny.resumable(resume=path), uninterrupted())
    assert max(len(states) for states in given) == 2


@pytest.mark.parametrize("match, options", [
    ("lr is 0.01 there, 0.02 here", {"lr": 2e-2}),
    ("t_i is 6 there, 9 here", {"freezer": (60, 9, 16)}),
    ("interval is 10 there, 5 here", {"freezer": (60, 6, 16, 5)}),
    ("precision is fp32 there, bf16 here", {"precision": "bf16"}),
    ("total_steps is 60 there, 63 here", {"epochs": 21, "freezer": (63, 6, 16)}),
    ("rank is 4 there, 8 here", {"adapters": {"rank": 8}}),
    ("seed is 0 there, 1 here", {"adapters": {"seed": 1}}),
    ("targets is", {"adapters": {"targets": ["up", "down"]}}),
    ("freezer is True there, False here", {"freezer": None}),
])
def test_checkpoints_of_another_run_are_refused(tmp_path, match, options):
    """The message names the file, and what differs."""
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        tiny.resumable(after_step=tiny.stop_after(7, path))
    options = {"lr": 1e-2, "freezer": (60, 6, 16), "epochs": 20, "adapters": {}} | options
    adapters = {"depth": 1, "train_matrices": ["up", "down"]} | options.pop("adapters")
    model, layers = tiny.adapted(**adapters)
    if options["freezer"]:
        options["freezer"] = AdaptiveFreezer(layers, *options["freezer"])
    with pytest.raises(AFLoRAError, match=f"c.pt: .*{match}|{match}: "):
        train(model, always(tiny.data(batches=6)), tiny.loss_of, accumulate=2, weight_decay=0.1,
              resume=path, **options)


def test_a_run_without_freezer_cannot_go_on_with_one(tmp_path):
    """Its scores would begin anew in the middle of the ramp."""
    path = tmp_path / "c.pt"
    model, layers = tiny.adapted()
    with pytest.raises(KeyboardInterrupt):
        train(model, always(tiny.data()), tiny.loss_of, epochs=10, lr=1e-2,
              after_step=tiny.stop_after(7, path))
    model, layers = tiny.adapted()
    with pytest.raises(AFLoRAError, match="c.pt"):
        train(model, always(tiny.data()), tiny.loss_of, epochs=10, lr=1e-2, resume=path,
              freezer=AdaptiveFreezer(layers, 80, 8, 24))


def test_damaged_checkpoints_are_refused(tmp_path):
    """Cut short, one bit flipped, or an adapter file: named, before anything changes."""
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        tiny.resumable(after_step=tiny.stop_after(7, path))
    content = path.read_bytes()
    flipped = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    for damaged in (content[:-100], flipped, b"", content[:40]):
        path.write_bytes(damaged)
        with pytest.raises(AFLoRAError, match="c.pt"):
            tiny.resumable(resume=path)
    model, _ = tiny.adapted()
    save_adapter(model, path)
    with pytest.raises(AFLoRAError, match="c.pt: format is aflora adapter .* there, aflora checkp"):
        tiny.resumable(resume=path)
    with pytest.raises(AFLoRAError, match="missing.pt"):
        tiny.resumable(resume=tmp_path / "missing.pt")


def test_a_loop_of_one_s_own_can_be_saved_and_goes_on(tmp_path):
    """Training without train(): a checkpoint brings weights, moments, scores and steps back.

    Who counts no epochs has one, and report() the mean loss of the run.
    """
    path = tmp_path / "c.pt"
    losses = []

    def loss(model, batch):
        losses.append(tiny.loss_of(model, batch))
        return losses[-1]

    def new():
        model, layers = tiny.adapted()
        freezer = AdaptiveFreezer(layers, 60, 6, 16)
        return Training(model, loss, total_steps=60, lr=1e-2, freezer=freezer)

    batches = tiny.data()
    expected = new()
    for step in range(60):
        if step == 33:
            save_checkpoint(expected, path)
        expected.step([batches[step % 8]])
    expected.report()
    assert expected.line["epoch"] == 1
    assert expected.line["loss"] == pytest.approx(torch.stack(losses).mean().item())
    resumed = new()
    load_checkpoint(resumed, path)
    assert resumed.steps == 33
    for step in range(33, 60):
        resumed.step([batches[step % 8]])
    resumed.report()
    assert resumed.line == expected.line
    assert resumed.freezer.frozen_at == expected.freezer.frozen_at
    assert len(resumed.freezer.frozen_at) == 12
    for p, q in zip(resumed.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_saving_leaves_the_log_alone(tmp_path):
    """A checkpoint after each step changes neither the last line nor which steps have one."""
    logs = []
    for saving in (False, True):
        model, _ = tiny.adapted()
        log = []

        def after_step(training):
            if saving:
                save_checkpoint(training, tmp_path / "c.pt")
            log.append((training.steps, training.line))

        train(model, always(tiny.data(batches=16)), tiny.loss_of, epochs=2, lr=1e-2,
              after_step=after_step)
        logs.append(log)
    assert logs[0] == logs[1]


def test_what_a_hook_freezes_is_in_the_checkpoint(tmp_path):
    """It has moved before: a resumed run ends as the one that nobody stopped."""
    path = tmp_path / "c.pt"

    def after_step(training):
        if training.steps == 2:
            training.model.head.requires_grad_(False)
            training.model.head.zero_grad()
        if training.steps == 4:
            save_checkpoint(training, path)

    settings = dict(epochs=1, lr=1e-2, after_step=after_step)
    torch.manual_seed(0)
    whole = tiny.Net()
    train(whole, always(tiny.data()), tiny.loss_of, **settings)
    torch.manual_seed(0)
    resumed = tiny.Net()
    training = Training(resumed, tiny.loss_of, total_steps=8, lr=1e-2)
    training.plan |= dict(epochs=1, accumulate=1)
    load_checkpoint(training, path)
    resumed.head.requires_grad_(False)
    for batch in tiny.data()[4:]:
        training.step([batch])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_notes_come_back(tmp_path):
    """What a hook notes is there after a resume, numbers of NumPy, too; what cannot be kept is
    refused when it is saved, and the last checkpoint stays."""
    path = tmp_path / "c.pt"

    def after_step(training):
        scores = training.notes.setdefault("scores", [])
        scores.append(np.mean([training.steps, 0]))
        save_checkpoint(training, path)
        if training.steps == 3 and not resumed:
            raise KeyboardInterrupt

    settings = dict(epochs=2, lr=1e-2, after_step=after_step)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        train(tiny.adapted()[0], always(tiny.data()), tiny.loss_of, **settings)
    resumed = True
    training = train(tiny.adapted()[0], always(tiny.data()), tiny.loss_of, resume=path, **settings)
    assert training.notes == {"scores": [step / 2 for step in range(1, 17)]}

    good = path.read_bytes()
    training.notes["array"] = np.ones(2)
    with pytest.raises(AFLoRAError, match="training.notes: .*ndarray is not JSON"):
        save_checkpoint(training, path)
    assert path.read_bytes() == good


# -------------------------------------------------------------------------------- the demonstration
def test_the_demonstration_freezes_everything(capsys):
    """`python aflora.py` prints the equations' numbers and freezes all matrices in the ramp."""
    aflora.demo()
    out = capsys.readouterr().out
    frozen_at = ast.literal_eval(re.findall(r"\{.*\}", out)[-1])
    assert frozen_at.keys() == {f"{i}.lora_{m}" for i in (0, 2) for m in "AB"}
    assert 50 < min(frozen_at.values()) and max(frozen_at.values()) == 200
    assert out.count("0.lora_") > 10 and len(out.splitlines()) > 10
