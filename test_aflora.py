"""aflora.py's claims. The layer, the score and the schedule are checked against dense matrices,
autograd, whole numbers and sums worked out on paper; what builds on them (the loop, resuming,
merging) against these parts, or against another run. A whole run that uses nothing of aflora.py is
in tests/test_by_hand.py.

    python -m pytest test_aflora.py        what is not here is tested in tests/

No network and no GPU. tiny.Net is two blocks with the layers query, up and down, and a head;
tiny.adapted() puts adapters around those six layers, so that twelve matrices train.
"""

import copy
import hashlib
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

import aflora
from aflora import (
    AdaptiveFreezer,
    AFLoRAError,
    AFLoRALinear,
    Training,
    add_adapters,
    adapters_of,
    freezing_fraction,
    load_adapter,
    merge_adapters,
    save_adapter,
    save_checkpoint,
    sensitivity,
    train,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tests"))  # where tiny.py is
import tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:ramp of")  # short runs have short ramps


# ----------------------------------------------------------------------------------- the layer, (1)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank, trained", [
    (4, ["lora_A", "lora_B"]),
    (4, ["lora_A"]),
    (4, []),
    (100, ["lora_A", "lora_B"]),
    (100, []),
])
def test_forward_and_every_gradient_equal_the_dense_formula(rank, trained, bias, leading):
    """y = (W0 + diag(s_b) B diag(s_d) A) x + b, and every gradient, for any leading dimensions."""
    torch.manual_seed(0)
    layer = AFLoRALinear(nn.Linear(6, 10, bias=bias), rank).double()
    for name, p in layer.named_parameters(recurse=False):
        p.data = torch.randn_like(p)
        p.requires_grad_(name in ("s_d", "s_b", *trained))
    x = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)

    # The same with all matrices multiplied out, by autograd
    dense_x = x.detach().clone().requires_grad_()
    dense = {}
    for name, p in layer.named_parameters():
        dense[name] = p.detach().clone().requires_grad_()
    L_b = torch.diag(dense["s_b"])
    L_d = torch.diag(dense["s_d"])
    delta = L_b @ dense["lora_B"] @ L_d @ dense["lora_A"]
    W = dense["base.weight"] + delta
    expected = F.linear(dense_x, W, dense.get("base.bias"))

    assert_close(y, expected)
    assert_close(layer.delta_weight(), delta)
    A, B = layer.lora_factors()
    assert A is layer.lora_A
    assert_close(B @ A, delta)

    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    assert_close(x.grad, dense_x.grad)
    for name, p in layer.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, dense[name].grad, msg=name)
        else:
            assert p.grad is None


def test_the_adapted_model_starts_as_the_plain_one():
    """Wrapping changes no bit of the output: s_b is zero at first."""
    torch.manual_seed(0)
    model = tiny.Net()
    x = torch.randn(3, 5, 8)
    plain = model(x)
    add_adapters(model, ["query", "up", "down"])
    assert torch.equal(model(x), plain)


def test_starts_are_those_of_the_paper():
    """A and B: Kaiming uniform, whose fan_in is the number of columns; s_d = 0.1, s_b = 0."""
    layer = AFLoRALinear(nn.Linear(300, 500), 4, name="x")
    assert layer.lora_A.shape == (4, 300)
    assert layer.lora_B.shape == (500, 4)

    # Kaiming's deviation is sqrt(2 / fan_in); a uniform distribution has that within sqrt(3) of it
    for matrix, fan_in in ((layer.lora_A, 300), (layer.lora_B, 4)):
        deviation = math.sqrt(2 / fan_in)
        bound = math.sqrt(3) * deviation
        assert 0.98 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(deviation, rel=0.06)  # of 1,200 and 2,000 draws

    assert torch.equal(layer.s_d, torch.full((4,), 0.1))
    assert torch.equal(layer.s_b, torch.zeros(500))


def test_random_starts_come_from_the_seed_and_the_name():
    """A key, "seed/name/matrix", gives the same matrix for ever: it is numpy's own stream."""
    start = aflora.kaiming_uniform("0/layer/lora_A", (4, 6))
    digest = hashlib.sha256(b"0/layer/lora_A").digest()
    seed = int.from_bytes(digest[:4], "little")
    expected = np.random.RandomState(seed).uniform(-1, 1, (4, 6))  # sqrt(6 / 6) = 1
    assert np.array_equal(start.numpy(), expected.astype(np.float32))
    assert start[0, 0] == np.float32(-0.35978946)  # so that a change of the recipe is noticed

    layer = AFLoRALinear(nn.Linear(6, 2), rank=4, seed=0, name="layer")
    assert torch.equal(layer.lora_A, start)


def test_the_first_step_moves_only_s_b_and_the_head():
    """As s_b is zero, so are the gradients of A, B and s_d. The second step moves them all."""
    model, layers = tiny.adapted()
    training = Training(model, tiny.loss_of, total_steps=8, lr=1e-2)
    first = {"head.weight", "head.bias"}
    second = set()
    for name in layers:
        first.add(f"{name}.s_b")
        second |= {f"{name}.s_d", f"{name}.lora_A", f"{name}.lora_B"}
    for expected in (first, first | second):
        before = copy.deepcopy(model.state_dict())
        training.step([tiny.data()[0]])
        moved = set()
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]):
                moved.add(name)
        assert moved == expected


# ----------------------------------------------------- the score, (2) to (5), and the schedule, (6)
def test_sensitivity_is_what_it_says():
    """The three kinds by hand; the default is |w * grad|, and an unknown one is an error."""
    w = torch.tensor([2.0, -3.0])
    grad = torch.tensor([-0.5, 4.0])

    assert sensitivity(w, grad).tolist() == [1.0, 12.0]
    assert sensitivity(w, grad, "gradient-weight").tolist() == [1.0, 12.0]
    assert sensitivity(w, grad, "gradient").tolist() == [0.5, 4.0]
    assert sensitivity(w, grad, "weight").tolist() == [2.0, 3.0]

    with pytest.raises(AFLoRAError, match="gradient-weight"):
        sensitivity(w, grad, "hessian")


def test_three_steps_of_the_score_by_hand():
    """Equations (2) to (5), b1 = 0.85, b2 = 0.95, for one matrix of two values, written out."""
    layer = AFLoRALinear(nn.Linear(2, 1), rank=1, name="x")
    layer.lora_A.data = torch.tensor([[2.0, -1.0]])
    layer.lora_B.requires_grad_(False)
    freezer = AdaptiveFreezer({"x": layer}, 1000, 0, 0)
    for grad in ([1.0, 3.0], [0.5, -2.0], [-2.0, 0.0]):
        layer.lora_A.grad = torch.tensor([grad])
        freezer.update()

    # element 0: I    = 2; 1; 4
    #            Ibar =               0.15 * 2 = 0.3
    #                   0.85 * 0.3  + 0.15 * 1 = 0.405
    #                   0.85 * 0.405 + 0.15 * 4 = 0.94425
    #            U    = 1.7; 0.595; 3.05575
    #            Ubar =                  0.05 * 1.7     = 0.085
    #                   0.95 * 0.085  + 0.05 * 0.595   = 0.1105
    #                   0.95 * 0.1105 + 0.05 * 3.05575 = 0.2577625
    # element 1: I    = 3; 2; 0
    #            Ibar = 0.45; 0.6825; 0.580125
    #            U    = 2.55; 1.3175; 0.580125
    #            Ubar = 0.1275; 0.187; 0.20665625
    assert_close(freezer.Ibar["x.lora_A"], torch.tensor([0.94425, 0.580125]))
    assert_close(freezer.Ubar["x.lora_A"], torch.tensor([0.2577625, 0.20665625]))
    score = (0.94425 * 0.2577625 + 0.580125 * 0.20665625) / 2
    assert freezer.scores() == {"x.lora_A": pytest.approx(score, rel=1e-6)}


def test_the_schedule_at_its_corners():
    """Equation (6): 0 before t_i, cubic in the ramp, 1 from T - t_f on, never falling."""
    r = [freezing_fraction(step, total_steps=100, t_i=20, t_f=30) for step in range(101)]
    assert r[0] == r[19] == r[20] == 0
    assert r[30] == 1 - Fraction(4, 5)**3  # after a fifth of the ramp
    assert r[45] == 1 - Fraction(1, 2)**3
    assert r[69] < 1
    assert r[70] == r[71] == r[100] == 1
    assert r == sorted(r)

    assert freezing_fraction(3, 10, 4, 6) == 0  # an empty ramp
    assert freezing_fraction(4, 10, 4, 6) == 1
    assert freezing_fraction(0, 10, 0, 10) == 1

    for t_i, t_f in ((60, 50), (-1, 5), (5, -1)):
        with pytest.raises(AFLoRAError, match="fit"):
            freezing_fraction(0, 100, t_i, t_f)


def floor_of_r_n(step, total_steps, t_i, t_f, n):
    """floor(r(t) n) of equation (6), in whole numbers."""
    ramp = total_steps - t_i - t_f
    rest = total_steps - t_f - step
    if step < t_i:
        return 0
    if rest <= 0:
        return n
    # In the ramp 1 - (t - t_i) / ramp is rest / ramp, and so r(t) n = n (1 - rest^3 / ramp^3)
    return n * (ramp**3 - rest**3) // ramp**3


@pytest.mark.parametrize("ramp", [1, 3, 5, 60, 99, 100, 125, 1000])
@pytest.mark.parametrize("n", [1, 12, 27, 61, 96, 125, 144])
def test_floor_of_r_n_is_exact(ramp, n):
    """How many of n matrices are due after each step, in whole numbers.

    Where ramp and n share factors r n can be whole, and a float may fall short of it.
    """
    matrices = nn.ParameterDict()  # in place of a layer: the freezer asks for its parameters alone
    for i in range(n):
        matrices[str(i)] = torch.zeros(1, 1)
    schedule = {
        "total_steps": 7 + ramp + 3,
        "t_i": 7,
        "t_f": 3,
    }
    freezer = AdaptiveFreezer({"all": matrices}, **schedule, interval=1)
    for step in range(schedule["total_steps"] + 1):
        freezer.step = step
        assert freezer.due() == floor_of_r_n(step, **schedule, n=n)


def test_floats_would_freeze_one_matrix_too_few():
    """After a fifth of the ramp 61 of 125 matrices are due. In floats that is 60.999..."""
    share = 1 - (1 - 20 / 100)**3
    assert share * 125 < 61
    assert freezing_fraction(20, total_steps=100, t_i=0, t_f=0) * 125 == 61


# -------------------------------------------------------------------------------------- the freezer
def random_gradients(freezer, generator):
    """Gives each live matrix a gradient."""
    for p in freezer.live.values():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("t_f", [100, 97])
def test_every_look_freezes_the_lowest_floor_r_n_of_all_matrices(t_f):
    """Number and choice after each step by brute force; T - t_f may lie between two tens."""
    model, layers = tiny.adapted()
    schedule = {
        "total_steps": 300,
        "t_i": 33,  # no multiple of 10: looks are counted from step 0
        "t_f": t_f,
    }
    freezer = AdaptiveFreezer(layers, **schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    Ibar = {name: torch.zeros(p.shape) for name, p in freezer.matrices.items()}
    Ubar = dict(Ibar)
    frozen = []
    for step in range(1, 301):
        random_gradients(freezer, generator)
        scores = {}
        for name, p in freezer.live.items():
            I = (p * p.grad).abs().detach()
            Ibar[name] = 0.85 * Ibar[name] + 0.15 * I
            change = (I - Ibar[name]).abs()
            Ubar[name] = 0.95 * Ubar[name] + 0.05 * change
            scores[name] = (Ibar[name] * Ubar[name]).mean().item()

        expected = []
        if step % 10 == 0 or step >= 300 - t_f:
            due = floor_of_r_n(step, **schedule, n=12) - len(frozen)
            expected = sorted(scores, key=scores.get)[:due]

        freezer.update()
        assert freezer.freeze(optimizer) == expected
        frozen += expected
        assert list(freezer.frozen_at) == frozen

    assert len(frozen) == 12
    assert freezer.scheduled() == 1
    # The first look in the ramp is at step 40; r(t) n reaches 12 only at the ramp's end
    steps = set(freezer.frozen_at.values())
    assert max(steps) == 300 - t_f
    assert steps <= {*range(40, 300, 10), 300 - t_f}


def test_a_missed_look_is_caught_up():
    """Who calls freeze() at a few looks only has floor(r n) frozen there, and all at the end."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, total_steps=300, t_i=30, t_f=100)
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 204):
        random_gradients(freezer, generator)
        freezer.update()
        if step in (60, 90, 120, 203):  # T - t_f = 200 is missed, too
            freezer.freeze(optimizer)
            assert len(freezer.frozen_at) == floor_of_r_n(step, 300, 30, 100, n=12)

    assert set(freezer.frozen_at.values()) == {60, 90, 120, 203}
    assert len(freezer.frozen_at) == 12


def test_frozen_is_frozen():
    """A frozen matrix is bit-equal after 100 more steps of AdamW with decay; no moments left."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, total_steps=300, t_i=20, t_f=200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    places = list(optimizer.param_groups[0]["params"])
    batches = tiny.data()
    kept = {}
    for step in range(200):
        tiny.loss_of(model, batches[step % 8]).backward()
        freezer.update()
        optimizer.step()
        for name in freezer.freeze(optimizer):
            p = freezer.matrices[name]
            kept[name] = p.detach().clone()
            assert p.grad is None
        optimizer.zero_grad(set_to_none=True)

    # All froze in the ramp, which ended a hundred steps before the loop did
    assert len(kept) == 12
    assert min(freezer.frozen_at.values()) > 20
    assert max(freezer.frozen_at.values()) == 100
    for name, value in kept.items():
        p = freezer.matrices[name]
        assert torch.equal(p, value)
        assert not p.requires_grad
        assert p.grad is None
        assert p not in optimizer.state
    # Each keeps its place in the group, so that a resumed optimizer fits
    for p, expected in zip(optimizer.param_groups[0]["params"], places, strict=True):
        assert p is expected


def test_average_trainable_is_exact():
    """It equals the trainable parameters counted in every single step of a run."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, total_steps=160, t_i=16, t_f=48)
    counts = []

    def counting_loss(model, batch):
        """Is called once a step, before anything freezes."""
        count = 0
        for name, p in model.named_parameters():
            if p.requires_grad and "head" not in name:
                count += p.numel()
        counts.append(count)
        return tiny.loss_of(model, batch)

    train(
        model, lambda epoch: tiny.data(), counting_loss, epochs=20, lr=1e-2, freezer=freezer)
    assert len(counts) == 160
    assert len(set(counts)) > 5
    assert freezer.average_trainable() == pytest.approx(sum(counts) / 160, rel=1e-12)


def test_parameter_counts_on_the_paper_s_model():
    """DeBERTaV3-base: 12 blocks of q, k, v, o, 768 -> 768, of up, 768 -> 3072, and of down, back.

    vectors, r = 4:           12 * (6 * 4 + 5 * 768 + 3072)      =    83,232, at the end
    and the FFN's A and B:    12 * 2 * 4 * (768 + 3072)          =   368,640, together 451,872
    LoRA, r = 8:    12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072)) = 1,327,104
    """
    def count(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def all_alike():
        return dict.fromkeys(freezer.live, 1.0)

    model = tiny.deberta()
    targets = ["q", "k", "v", "o", "up", "down"]
    layers = add_adapters(model, targets, rank=4, train_matrices=["up", "down"])
    freezer = AdaptiveFreezer(layers, total_steps=20000, t_i=1000, t_f=14000)
    assert count(model) == 451_872

    optimizer = torch.optim.AdamW(model.parameters())
    freezer.scores = all_alike  # the model has no values: among equals the first freezes
    for step in range(1, 20001):
        freezer.step = step
        freezer.freeze(optimizer)
    assert count(model) == 83_232
    # 116,924 if the large matrices, up's B and down's A, froze first, 134,872 if they froze last
    assert freezer.average_trainable() == pytest.approx(125_619.456)

    model = tiny.deberta()
    add_adapters(model, targets, rank=8)
    matrices = [p for name, p in model.named_parameters() if "lora_" in name]
    assert sum(p.numel() for p in matrices) == 1_327_104


# -------------------------------------------------------------------------------- the training loop
def optimizer_by_hand(model, lr, head_lr, weight_decay):
    """AdamW with a rate for the head and another for the rest, and decay on matrices only."""
    groups = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.append({
                "params": [p],
                "lr": head_lr if "head" in name else lr,
                "weight_decay": weight_decay if p.dim() == 2 else 0.0,
            })
    return torch.optim.AdamW(groups)


def warmup_and_decay(step):
    """The share of the peak rate in step 0 to 79, with a warm-up of 6 %."""
    rising = (step + 1) / (0.06 * 80 + 1)  # + 1: the first step has a rate, too
    falling = (80 - step) / (80 - 0.06 * 80)
    return min(rising, falling)


def test_train_equals_a_loop_written_by_hand():
    """fp32: weights, freezing steps and losses equal those of a plain loop."""
    model, layers = tiny.adapted()
    lines = []
    freezer, training = tiny.run(  # lr 1e-2, decay 0.1
        model, layers, clip=0.5, head_lr=3e-3, after_step=tiny.epoch_ends(lines))

    expected_model, layers = tiny.adapted()
    expected = AdaptiveFreezer(layers, total_steps=80, t_i=8, t_f=24)  # 0.1 and 0.3: tiny.run's
    optimizer = optimizer_by_hand(expected_model, lr=1e-2, head_lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_decay)
    losses = []
    for step in range(80):
        loss = tiny.loss_of(expected_model, tiny.data()[step % 8])
        losses.append(loss.item())
        loss.backward()
        expected.update()
        clip_grad_norm_(expected_model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        expected.freeze(optimizer)
        optimizer.zero_grad()

    assert freezer.frozen_at == expected.frozen_at
    assert len(freezer.frozen_at) == 12
    for p, expected_p in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert_close(p, expected_p, rtol=1e-4, atol=1e-6)
    assert training.steps == 80
    assert [line["step"] for line in lines] == list(range(8, 81, 8))
    for line in lines:
        assert line["skipped"] == 0
        of_this_epoch = losses[line["step"] - 8:line["step"]]
        assert line["loss"] == pytest.approx(sum(of_this_epoch) / 8, rel=1e-4)


@pytest.mark.parametrize("precision, least, most", [
    ("fp32", 0, 1e-6),
    ("bf16", 1e-3, 1e-2),  # it rounds to 8 bits
    ("fp16", 1e-4, 2e-3),  # to 11
])
def test_scores_see_whole_unscaled_unclipped_gradients(precision, least, most):
    """Scores equal a plain loop's, whatever the clipping, the scaler and the micro-batches.

    The weights are held still by a tiny learning rate, and nothing freezes. That the scores are not
    closer shows that the precision was used.
    """
    def freeze_nothing(optimizer):
        return []

    batches = tiny.data(batches=30, size=4)
    model, layers = tiny.adapted()
    tiny.perturb(model)
    freezer = AdaptiveFreezer(layers, total_steps=8, t_i=2, t_f=2)
    freezer.freeze = freeze_nothing
    training = train(
        model, lambda epoch: batches, tiny.loss_of, epochs=1, accumulate=4, lr=1e-12, clip=1e-3,
        precision=precision, freezer=freezer)
    assert training.steps == freezer.step == 8
    assert training.line["skipped"] == 0

    model, layers = tiny.adapted()
    tiny.perturb(model)
    expected = AdaptiveFreezer(layers, total_steps=8, t_i=2, t_f=2)
    for first in range(0, 30, 4):  # the last step has two micro-batches only
        micro_batches = batches[first:first + 4]
        losses = [tiny.loss_of(model, batch) for batch in micro_batches]
        torch.stack(losses).mean().backward()
        expected.update()
        model.zero_grad()

    for found, wanted in ((freezer.Ibar, expected.Ibar), (freezer.Ubar, expected.Ubar)):
        flat = tiny.live(expected, wanted)
        assert flat.norm() > 0
        apart = tiny.live(freezer, found) - flat
        assert least <= apart.norm() / flat.norm() < most


def test_micro_batches_equal_one_big_batch():
    """Four micro-batches give the scores, freezing steps and weights of their union."""
    small = tiny.data(batches=32, size=4)
    big = []
    for first in range(0, 32, 4):
        x, labels = zip(*small[first:first + 4])
        big.append((torch.cat(x), torch.cat(labels)))

    def trained(batches, accumulate):
        model, layers = tiny.adapted()
        freezer = AdaptiveFreezer(layers, total_steps=8, t_i=2, t_f=2, interval=2)
        tiny.run(model, layers, 1, batches=batches, freezer=freezer, accumulate=accumulate)
        return model, freezer

    model, freezer = trained(small, accumulate=4)
    expected_model, expected = trained(big, accumulate=1)
    assert freezer.frozen_at == expected.frozen_at
    assert len(freezer.frozen_at) == 12
    # The scores of what froze last, from the last step in which it trained
    assert len(freezer.Ibar) > 0
    assert_close(freezer.Ibar, expected.Ibar, rtol=1e-3, atol=1e-9)
    assert_close(freezer.Ubar, expected.Ubar, rtol=1e-3, atol=1e-9)
    for p, expected in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert_close(p, expected, rtol=1e-3, atol=1e-5)


def test_an_overflowed_fp16_step_counts_but_touches_nothing():
    """Weights and scores wait while the scaler halves its scale, but the steps go on.

    With t_f = 0 everything is frozen at the end, even if the last step overflows.
    """
    model, layers = tiny.adapted()
    tiny.perturb(model)
    freezer = AdaptiveFreezer(layers, total_steps=16, t_i=10, t_f=0, interval=2)
    overflowing = (1, 2, 3, 9, 16)

    def both_scores():
        return torch.cat([tiny.live(freezer, freezer.Ibar), tiny.live(freezer, freezer.Ubar)])

    weights = [copy.deepcopy(model.state_dict())]  # after 0, 1, 2, ... steps
    scores = [both_scores()]
    rates = []
    scales = []

    def loss(model, batch):
        factor = 1e30 if len(weights) in overflowing else 1.0  # beyond float16 at any scale
        return factor * tiny.loss_of(model, batch)

    def after_step(training):
        weights.append(copy.deepcopy(model.state_dict()))
        rates.append(training.optimizer.param_groups[0]["lr"])
        scales.append(training.scaler.get_scale())
        if freezer.live:
            scores.append(both_scores())

    training = train(
        model, lambda epoch: tiny.data(), loss, epochs=2, lr=1e-2, precision="fp16",
        freezer=freezer, after_step=after_step)
    assert freezer.step == 16
    assert training.line["skipped"] == 5
    assert rates[0] == 1e-2 / 1.96  # warm-up over 6 % of 16 steps, 0.96
    falling = 1e-2 * (1 - torch.arange(1.0, 16) / 16) / 0.94
    assert_close(torch.tensor(rates[1:]), falling)
    for step in range(1, 17):
        before, after = weights[step - 1:step + 1]
        still = all(torch.equal(after[name], before[name]) for name in after)
        assert still == (step in overflowing)
        if step <= 10:  # nothing is frozen yet
            still = torch.equal(scores[step], scores[step - 1])
            assert still == (step in overflowing)
        overflows = sum(at <= step for at in overflowing)
        assert scales[step - 1] == 2.0**(16 - overflows)  # it starts at 2^16
    assert all(score.isfinite().all() for score in scores)
    assert len(freezer.frozen_at) == 12
    assert max(freezer.frozen_at.values()) == 16


def test_an_overflow_of_the_head_alone_leaves_the_scores():
    """The scaler skips a step for any parameter: then A's and B's finite gradients do not count."""
    model, layers = tiny.adapted()
    tiny.perturb(model)
    freezer = AdaptiveFreezer(layers, total_steps=16, t_i=2, t_f=2)
    factor = 0.0

    def loss(model, batch):
        return tiny.loss_of(model, batch) + factor * model.head.bias.sum()

    training = Training(model, loss, total_steps=16, lr=1e-2, precision="fp16", freezer=freezer)
    training.step([tiny.data()[0]])
    Ibar = tiny.live(freezer, freezer.Ibar)
    assert Ibar.any()
    factor = 1e36  # times the scaler's scale it is inf, in the gradient of the head's bias alone
    training.step([tiny.data()[0]])
    assert training.skipped == 1
    assert torch.equal(tiny.live(freezer, freezer.Ibar), Ibar)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, precision):
    """Bit for bit: weights, scores, freezing, log, average of what trained, random state.

    That a loader which shuffles goes on in its order is in tests/test_training.py.
    """
    # Before t_i = 6; in the ramp, 21 at an epoch's end; all frozen; after the last step
    stops = (2, 5, 21, 23, 37, 50, 58, 60)
    lines = {}

    def log(training):
        if training.line.get("step") == training.steps:
            lines[training.steps] = training.line

    def log_and_save(training):
        log(training)
        if training.steps in stops:
            save_checkpoint(training, tmp_path / f"{training.steps}.pt")

    expected = tiny.resumable(precision, after_step=log)
    expected_lines = dict(lines)
    assert len(lines) >= 20
    skipped = expected[0]["last line"]["skipped"]
    assert 0 < skipped < 30 if precision == "fp16" else skipped == 0
    # floor(4 r(t)) is 1, 2, 3 after 10, 20 and 30 steps; at T - t_f = 44 the last one is due
    assert sorted(expected[0]["frozen_at"].values()) == [10, 20, 30, 44]

    saving = tiny.resumable(precision, after_step=log_and_save)
    tiny.assert_same_run(saving, expected)
    for step in stops:
        path = tmp_path / f"{step}.pt"
        assert path.stat().st_size < 60_000  # no history in it
        lines.clear()
        # Another seed of the dropout: the checkpoint brings its own random state
        resumed = tiny.resumable(precision, seed=step, after_step=log, resume=path)
        tiny.assert_same_run(resumed, expected)
        assert lines == {n: line for n, line in expected_lines.items() if n > step}
    assert len(list(tmp_path.iterdir())) == len(stops)


# ------------------------------------------------------------------------------------ adapter files
@pytest.mark.parametrize("options", [
    {"train_matrices": ["up"]},
    {"rank": 6, "seed": 7},
    {"targets": "blocks.0.up", "train_matrices": (), "modules_to_save": ()},
    {"targets": (), "modules_to_save": ["head", "blocks.1.norm"]},
])
def test_adapter_file_round_trip(tmp_path, options):
    """A trained adapter, head included, in a fresh base gives the very same output bits."""
    model, _ = tiny.adapted(**options)
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=2, lr=1e-2)
    path = tmp_path / "adapter.pt"
    save_adapter(model, path)
    assert list(tmp_path.iterdir()) == [path]

    # Into a plain model, and into one with the same adapters at their start
    x, _ = tiny.data()[0]
    torch.manual_seed(0)
    plain = tiny.Net()
    assert not torch.equal(plain(x), model(x))
    adapted, _ = tiny.adapted(**options)
    for fresh in (plain, adapted):
        if options.get("modules_to_save") != ():
            fresh.head.reset_parameters()  # it has to come from the file
        layers = load_adapter(fresh, path)
        assert layers == adapters_of(fresh)
        assert torch.equal(fresh(x), model(x))


def test_what_trains_after_loading(tmp_path):
    """In a plain model all of train_matrices trains; in one with adapters what is frozen stays so.
    """
    def trains(model):
        return {name for name, p in model.named_parameters() if p.requires_grad}

    model, layers = tiny.adapted(train_matrices=["up"])
    at_first = trains(model)
    save_adapter(model, tmp_path / "adapter.pt")
    layers["blocks.0.up"].lora_A.requires_grad_(False)
    now = trains(model)
    assert len(now) == len(at_first) - 1
    load_adapter(model, tmp_path / "adapter.pt")
    assert trains(model) == now
    plain = tiny.Net()
    load_adapter(plain, tmp_path / "adapter.pt")
    assert trains(plain) == at_first


def test_random_matrices_are_stored_as_a_seed(tmp_path):
    """Matrices that never trained are a key and a checksum in the file, and no values."""
    model, _ = tiny.adapted(train_matrices=["up", "down"])
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    save_adapter(model, tmp_path / "adapter.pt")

    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    at_start = content["at_start"]
    values = content["values"]
    for name in ("blocks.0.query.lora_A", "blocks.1.query.lora_B"):
        assert name in at_start
        assert name not in values
    assert len(at_start) == 4
    assert values.keys() >= {"blocks.0.up.lora_A", "blocks.0.query.s_b", "head.weight"}
    for name in values:
        assert torch.equal(values[name], model.get_parameter(name))

    key, checksum = at_start["blocks.1.query.lora_B"]
    assert key == "0/blocks.1.query/lora_B"
    matrix = model.blocks[1].query.lora_B.detach().numpy()
    assert checksum == hashlib.sha256(matrix.tobytes()).hexdigest()


def test_merging_gives_a_plain_model(tmp_path):
    """Merged = apart, with the plain model's modules and names.

    The way back is to load the file into a fresh base.
    """
    model, layers = tiny.adapted()
    tiny.perturb(model)
    save_adapter(model, tmp_path / "adapter.pt")
    x, _ = tiny.data()[0]
    apart = model(x)
    expected = {}
    for name, layer in layers.items():
        expected[f"{name}.weight"] = layer.base.weight + layer.delta_weight()

    merge_adapters(model)
    torch.manual_seed(0)
    fresh = tiny.Net()
    assert str(model) == str(fresh)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert vars(model).keys() == vars(fresh).keys()
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight)
    assert_close(model(x), apart)
    assert not torch.allclose(fresh(x), apart)

    load_adapter(fresh, tmp_path / "adapter.pt")
    assert torch.equal(fresh(x), apart)
