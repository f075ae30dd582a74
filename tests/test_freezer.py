"""The freezer in all circumstances: odd schedules, bad gradients, ties, kinds, resuming; and a
recorded run."""

import copy
import functools
import warnings

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import aflora
from aflora import AdaptiveFreezer, AFLoRAError, add_adapters, train


# --------------------------------------------------------------------------------- what it is given
def test_short_and_impossible_schedules():
    """A short ramp warns and says how matrices will freeze; nothing to freeze is an error."""
    _, layers = tiny.adapted()
    for t_i, t_f, ramp in ((10, 20, 70), (40, 60, 0)):
        with pytest.warns(UserWarning, match=f"ramp of {ramp} steps, look every 10.*groups"):
            AdaptiveFreezer(layers, 100, t_i, t_f)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveFreezer(layers, 200, 50, 50)
    with pytest.raises(AFLoRAError, match="60.*50.*fit.*100"):
        AdaptiveFreezer(layers, 100, 60, 50)
    _, layers = tiny.adapted(train_matrices=())
    with pytest.raises(AFLoRAError, match="nothing to freeze"):
        AdaptiveFreezer(layers, 100, 10, 20)
    with pytest.raises(AFLoRAError, match="nothing to freeze"):
        AdaptiveFreezer({}, 100, 10, 20)


@pytest.mark.parametrize("options, words", [
    ({"t_i": 0.1}, "t_i.*0.1.*whole number"),
    ({"t_f": 2.5}, "t_f.*2.5"),
    ({"t_i": -1}, "t_i.*-1"),
    ({"total_steps": 200.5}, "total_steps.*200.5"),
    ({"interval": 0}, "interval is 0.*from 1"),
    ({"interval": "10"}, "interval is '10'"),
    ({"beta1": 1.0}, "beta"),
    ({"beta2": -0.1}, "beta"),
    ({"beta1": float("nan")}, "beta"),
    ({"kind": "hessian"}, "hessian.*gradient-weight"),
])
def test_wrong_arguments(options, words):
    """Shares in place of steps, and what else cannot be, are refused by name."""
    _, layers = tiny.adapted()
    with pytest.raises(AFLoRAError, match=words):
        AdaptiveFreezer(layers, **({"total_steps": 200, "t_i": 10, "t_f": 20} | options))


def test_whole_numbers_of_other_types_are_taken():
    """NumPy's and floats like 20.0, from a configuration file, say."""
    _, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, np.int64(200), 20.0, np.float32(50), interval=5.0)
    plan = freezer.state_dict()["plan"]
    expected = AdaptiveFreezer(layers, 200, 20, 50, interval=5).state_dict()["plan"]
    assert plan == expected
    assert {type(plan[name]) for name in ("total_steps", "t_i", "t_f", "interval")} == {int}


# --------------------------------------------------------------------------------------- its scores
def gradients(freezer, seed=0):
    """Gives each live matrix a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for p in freezer.live.values():
        p.grad = torch.randn(p.shape, generator=generator)


def test_a_gradient_that_is_not_finite_leaves_the_scores():
    """update() with an inf or a nan counts the step, but takes nothing into the scores."""
    _, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 200, 10, 20)
    gradients(freezer)
    freezer.update()
    Ibar = tiny.live(freezer, freezer.Ibar)
    Ubar = tiny.live(freezer, freezer.Ubar)
    assert Ibar.any() and Ubar.any()
    for bad in (float("inf"), float("-inf"), float("nan")):
        layers["blocks.0.up"].lora_A.grad[0, 0] = bad
        freezer.update()
        assert torch.equal(tiny.live(freezer, freezer.Ibar), Ibar)
        assert torch.equal(tiny.live(freezer, freezer.Ubar), Ubar)
    gradients(freezer)
    freezer.update(found_inf=torch.tensor(True))  # of a parameter outside the adapters
    assert torch.equal(tiny.live(freezer, freezer.Ibar), Ibar)
    assert freezer.step == 5
    freezer.update(found_inf=torch.tensor(False))
    assert not torch.equal(tiny.live(freezer, freezer.Ibar), Ibar)


def test_a_matrix_that_a_batch_does_not_reach_has_a_gradient_of_zero():
    """Layerdrop and experts leave layers out at times: its score is as with zeros, and AdamW, which
    would move it by momentum for zeros, still sees no gradient."""
    with_none, with_zeros = [AdaptiveFreezer(tiny.adapted()[1], 200, 10, 20) for _ in range(2)]
    for step in range(4):
        for freezer in (with_none, with_zeros):
            gradients(freezer, seed=step)
            matrix = freezer.matrices["blocks.0.up.lora_A"]
            if step % 2:
                matrix.grad = None if freezer is with_none else torch.zeros_like(matrix)
            freezer.update()
        assert with_none.scores() == with_zeros.scores()
    assert with_none.matrices["blocks.0.up.lora_A"].grad is None


def test_gradients_that_are_all_missing_are_refused():
    """update() before backward(), or behind zero_grad(): all scores would fall."""
    _, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 200, 10, 20)
    with pytest.raises(AFLoRAError, match=r"between backward\(\) and zero_grad\(\)"):
        freezer.update()


def test_a_state_is_taken_up_by_a_freezer_that_has_frozen_since():
    """Rolled back to an earlier step: what froze since trains again, and all goes as before."""
    def steps(freezer, optimizer, first, last):
        for step in range(first, last):
            gradients(freezer, seed=step)
            freezer.update()
            freezer.freeze(optimizer)

    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 100, 0, 20, interval=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps(freezer, optimizer, 0, 12)
    state = copy.deepcopy(freezer.state_dict())
    at_12 = dict(freezer.frozen_at)
    steps(freezer, optimizer, 12, 100)
    whole = dict(freezer.frozen_at)
    average = freezer.average_trainable()
    assert 0 < len(at_12) < len(whole)
    freezer.load_state_dict(state)
    assert freezer.frozen_at == at_12
    for name, matrix in freezer.matrices.items():
        assert matrix.requires_grad == (name in freezer.live) == (name not in at_12)
        assert matrix.requires_grad or matrix.grad is None
    steps(freezer, optimizer, 12, 100)
    assert freezer.frozen_at == whole
    assert freezer.average_trainable() == average
    fresh = AdaptiveFreezer(tiny.adapted()[1], 100, 0, 20, interval=5)
    gradients(fresh)
    fresh.load_state_dict(freezer.state_dict())
    assert all(matrix.grad is None for matrix in fresh.matrices.values())


@pytest.mark.parametrize("kind", ["gradient-weight", "gradient", "weight"])
def test_each_kind_freezes_by_its_own_score(kind):
    """One look, by which half of the matrices are due: the lowest of the scores in NumPy."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 10, 0, 0, interval=5, beta1=0.5, beta2=0.25, kind=kind)
    gradients(freezer)
    scores = {}
    for name, p in freezer.matrices.items():
        w = p.detach().numpy()
        g = p.grad.numpy()
        I = np.abs({"gradient-weight": w * g, "gradient": g, "weight": w}[kind])
        Ibar = 0.5 * I
        Ubar = 0.75 * np.abs(I - Ibar)
        scores[name] = np.mean(Ibar * Ubar)
    freezer.update()
    assert freezer.scores() == {name: pytest.approx(s, rel=1e-5) for name, s in scores.items()}
    freezer.step = 5
    due = int(12 * (1 - 0.5**3))
    frozen = freezer.freeze(torch.optim.AdamW(model.parameters()))
    assert frozen == sorted(scores, key=scores.get)[:due]


def test_of_equal_scores_the_first_in_the_model_freezes():
    """Whatever the order of other things, as every process of several has to choose alike."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 10, 0, 0, interval=1)
    optimizer = torch.optim.AdamW(model.parameters())
    freezer.scores = lambda: dict.fromkeys(freezer.live, 1.0)
    order = []
    for step in range(1, 11):
        freezer.step = step
        order += freezer.freeze(optimizer)
    assert order == list(freezer.matrices) and len(order) == 12


def test_the_parts_stay_with_their_matrices():
    """When some freeze, those left keep their own running scores."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 100, 0, 0, interval=20)
    optimizer = torch.optim.AdamW(model.parameters())
    for seed in range(20):
        gradients(freezer, seed)
        freezer.update()
    before = {name: part.clone() for name, part in freezer.Ubar.items()}
    scores = freezer.scores()
    frozen = freezer.freeze(optimizer)
    assert 0 < len(frozen) < 12
    assert freezer.live.keys() == before.keys() - set(frozen)
    for name in freezer.live:
        assert torch.equal(freezer.Ubar[name], before[name])
    assert freezer.scores() == {name: scores[name] for name in freezer.live}


def test_nothing_is_left_to_score_at_the_end():
    """With everything frozen, steps go on and scores() is empty."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 10, 0, 5, interval=1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(10):
        gradients(freezer)
        freezer.update()
        freezer.freeze(optimizer)
    assert len(freezer.frozen_at) == 12 and freezer.step == 10
    assert freezer.live == {} and freezer.scores() == {}
    assert freezer.scheduled() == 1


def test_all_may_freeze_after_the_first_step():
    """t_f = T: the first step is the last of all matrices."""
    model, layers = tiny.adapted()
    freezer, _ = tiny.run(model, layers, epochs=1, t_i=0, t_f=1)
    assert set(freezer.frozen_at.values()) == {1}
    matrices = sum(p.numel() for p in freezer.matrices.values())
    vectors = sum(layer.s_d.numel() + layer.s_b.numel() for layer in layers.values())
    assert freezer.average_trainable() == vectors + matrices / 8  # of eight steps they train one


class Split(tiny.Net):
    """Its second block and its head are on the last of these devices."""

    def place(self, devices):
        self.to(devices[0])
        self.blocks[1].to(devices[-1])
        self.head.to(devices[-1])

    def forward(self, x):
        x = self.blocks[0](x)
        x = x.to(self.head.weight.device)
        return self.head(self.blocks[1](x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_may_lie_on_two_devices():
    """Losses as on a CPU, and everything is frozen."""
    def loss(model, batch):
        x, labels = batch
        return F.cross_entropy(model(x), labels.to(model.head.weight.device))

    losses = []
    for devices in (["cpu"], ["cuda:0", "cuda:1"]):
        torch.manual_seed(0)
        model = Split()
        model.place(devices)
        layers = add_adapters(model, ["up", "down"])
        freezer = AdaptiveFreezer(layers, 64, 6, 24)
        training = train(model, lambda epoch: tiny.data(), loss, epochs=8, lr=1e-2,
                         freezer=freezer)
        assert len(freezer.frozen_at) == 8
        losses.append(training.line["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# ----------------------------------------------------------------------------------------- resuming
def steps(model, freezer, numbers):
    """Some steps without an optimizer's: the weights stay as they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number in numbers:
        tiny.loss_of(model, tiny.data()[number % 8]).backward()
        freezer.update()
        freezer.freeze(optimizer)
        optimizer.zero_grad(set_to_none=True)


def test_freezer_state_resumes():
    """A freezer and model rebuilt from state_dict() in mid-run go on to the same freezing steps."""
    model, layers = tiny.adapted()
    expected = AdaptiveFreezer(layers, 200, 20, 50)
    steps(model, expected, range(1, 141))

    model, layers = tiny.adapted()
    first = AdaptiveFreezer(layers, 200, 20, 50)
    steps(model, first, range(1, 91))
    state = first.state_dict()
    saved = copy.deepcopy(state)
    assert 0 < len(first.frozen_at) < len(expected.frozen_at)

    model, layers = tiny.adapted()
    second = AdaptiveFreezer(layers, 200, 20, 50)
    second.load_state_dict(state)
    for name, p in second.matrices.items():
        assert p.requires_grad == (name not in first.frozen_at)
    steps(model, second, range(91, 141))
    assert list(second.frozen_at.items()) == list(expected.frozen_at.items())
    assert 0 < len(second.live) < 12
    for name in second.live:
        assert torch.equal(second.Ibar[name], expected.Ibar[name])
        assert torch.equal(second.Ubar[name], expected.Ubar[name])
    assert second.average_trainable() == expected.average_trainable()
    assert state["plan"] == saved["plan"]  # and may be loaded once more
    for name, value in state["state"].items():
        torch.testing.assert_close(value, saved["state"][name], rtol=0, atol=0)
    assert list(first.frozen_at.items()) == list(saved["state"]["frozen_at"].items())


PLAN = {"total_steps": 200, "t_i": 20, "t_f": 50}


@functools.cache
def state_after_90_steps():
    """The state_dict() of a freezer by that plan."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, **PLAN)
    steps(model, freezer, range(1, 91))
    return copy.deepcopy(freezer.state_dict())


@pytest.mark.parametrize("targets, options, words", [
    (("query", "up", "down"), {"total_steps": 300}, "total_steps is 200 there, 300 here"),
    (("query", "up", "down"), {"t_i": 21}, "t_i is 20 there, 21 here"),
    (("query", "up", "down"), {"beta2": 0.9}, "beta2 is 0.95 there, 0.9 here"),
    (("query", "up", "down"), {"kind": "weight"}, "kind is gradient-weight there, weight here"),
    (("up",), {}, "matrices is"),
])
def test_the_state_of_another_freezer_is_refused(targets, options, words):
    """The message names what differs, and the freezer is as it was."""
    _, layers = tiny.adapted(targets)
    other = AdaptiveFreezer(layers, **(PLAN | options))
    with pytest.raises(AFLoRAError, match=words):
        other.load_state_dict(state_after_90_steps())
    assert other.step == 0 and other.frozen_at == {}
    assert all(p.requires_grad for p in other.matrices.values())


# ----------------------------------------------------------------------------------- a recorded run
# What froze, after which step, by which score: of an implementation that shares no line with this
# one's freezer and loop. Between two neighbours of a look lie at least 10 per cent, so that another
# processor's rounding does not change the order.
RECORDED = [
    ("blocks.0.down.lora_A", 40, 3.487810e-10),
    ("blocks.0.down.lora_B", 40, 7.006484e-10),
    ("blocks.0.up.lora_B", 40, 2.552348e-09),
    ("blocks.1.query.lora_A", 50, 5.496697e-09),
    ("blocks.1.query.lora_B", 50, 6.297020e-09),
    ("blocks.1.down.lora_A", 50, 1.392715e-08),
    ("blocks.1.down.lora_B", 60, 1.791900e-08),
    ("blocks.0.query.lora_A", 60, 2.571101e-08),
    ("blocks.0.query.lora_B", 70, 4.525968e-08),
    ("blocks.1.up.lora_B", 80, 6.229148e-08),
    ("blocks.0.up.lora_A", 90, 5.994930e-07),
    ("blocks.1.up.lora_A", 120, 7.250218e-07),
]
RECORDED_LOSSES = {8: 0.7309839725, 160: 0.6944832802}  # after step: mean of that epoch


def test_a_recorded_run_comes_out_again():
    """Order, steps, scores and losses of one AFLoRA run in fp32, to one part in a thousand."""
    generator = torch.Generator().manual_seed(1)
    model = tiny.Net()
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    layers = aflora.add_adapters(model, ["query", "up", "down"], modules_to_save=["head"])
    freezer = AdaptiveFreezer(layers, 160, 30, 40)
    scores = {}
    real = freezer.scores

    def recording():
        scores.update(real())
        return real()

    freezer.scores = recording
    lines = []
    train(
        model, lambda epoch: tiny.data(seed=epoch), tiny.loss_of, epochs=20, lr=1e-2, head_lr=3e-3,
        clip=0.5, weight_decay=0.1, freezer=freezer, after_step=tiny.epoch_ends(lines))
    assert list(freezer.frozen_at.items()) == [(name, step) for name, step, _ in RECORDED]
    for name, _, score in RECORDED:
        assert scores[name] == pytest.approx(score, rel=1e-3)
    losses = {line["step"]: line["loss"] for line in lines}
    for step, loss in RECORDED_LOSSES.items():
        assert losses[step] == pytest.approx(loss, rel=1e-3)
