"""The diet's variants compute what the layer computes, and their kernels are counted rightly."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import tiny
import aflora

for needed in ("transformers", "peft", "accelerate"):
    pytest.importorskip(needed)
sys.path.insert(0, str(Path(aflora.__file__).resolve().parent / "benchmarks"))
import diet  # noqa: E402
import step  # noqa: E402

TINY = step.COMMON | {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
MATRICES = ("lora_A", "lora_B")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch, tmp_path):
    monkeypatch.setitem(step.SHAPES, "tiny", TINY)
    monkeypatch.setattr(step, "ROOT", tmp_path)  # of what is written


@pytest.fixture
def tape(monkeypatch):
    """Without a GPU a stand-in for the recording of a CUDA graph: a replay calls what it was given.
    """
    class Tape:
        def __init__(self, pool, work, *inputs):
            self.replay = partial(work, *inputs)

        def pool(self):
            return None

    if not step.CUDA:
        monkeypatch.setattr(aflora, "record", Tape)


# ------------------------------------------------------------------------------ equation (1), still
def make_arm(layer, precision, device="cpu", size=(3, 8)):
    """The tiny BERT with such layers, every adapter parameter away from its start."""
    batch = step.make_batch(*size, device)
    arm = step.Arm(partial(diet.adapted, layer=layer), "tiny", precision, batch)
    tiny.perturb(arm.model)
    return arm


def choose(arm, trained):
    """What trains: no matrix, or every third, as amid a training."""
    if trained == "none":
        diet.switch(arm, trains=False)
        return
    layers = aflora.adapters_of(arm.model).values()
    matrices = [getattr(layer, name) for layer in layers for name in MATRICES]
    for i, matrix in enumerate(matrices):
        matrix.requires_grad_(i % 3 == 0)


def learn(arm):
    """(logits, {name: gradient}) of one batch."""
    arm.training.forward_backward(arm.batch, 1)
    gradients = {name: p.grad for name, p in arm.model.named_parameters() if p.grad is not None}
    return arm.logits, gradients


@pytest.mark.parametrize("trained", ["third", "none"])
@pytest.mark.parametrize("name", diet.VARIANTS)
def test_a_variant_computes_equation_1(name, trained):
    """Logits and each gradient are those of equation (1) as it is written, and of autograd; nothing
    that is frozen has one. Twice: what a variant keeps between layers is renewed."""
    expected = make_arm(step.Naive, "fp32")
    arm = make_arm(diet.VARIANTS[name], "fp32")
    for one in (expected, arm):
        choose(one, trained)
        learn(one)
        one.model.zero_grad()
        tiny.perturb(one.model)
    logits, gradients = learn(arm)
    expected_logits, expected_gradients = learn(expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    matrices = [key for key in gradients if key.endswith(MATRICES)]
    assert len(matrices) == {"third": 8, "none": 0}[trained]
    for key, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0
        apart = (gradients[key] - gradient).norm() / gradient.norm()
        assert apart < 1e-5, key


@pytest.mark.parametrize("name", diet.VARIANTS)
def test_a_variant_under_autocast(name):
    """Weights held in bf16: gradients are float32 all the same, and those of today's layer."""
    expected = make_arm(aflora.AFLoRALinear, "bf16")
    arm = make_arm(diet.VARIANTS[name], "bf16")
    layer, *_ = aflora.adapters_of(arm.model).values()
    assert layer.base.weight.dtype == torch.bfloat16
    _, gradients = learn(arm)
    _, expected_gradients = learn(expected)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert gradients[key].dtype == torch.float32
        apart = (gradients[key] - gradient).norm() / gradient.norm()
        assert apart < 0.05, key


@pytest.mark.parametrize("name", diet.VARIANTS)
def test_a_variant_keeps_no_activation_for_a_frozen_matrix(name):
    """What autograd keeps with all frozen, thin outputs of A and copies of matrices left aside."""
    arms = {}
    for key in (diet.AS_IT_WAS, name):
        arms[key] = make_arm(diet.VARIANTS[key], "fp32", size=(8, 40))
    trained, _ = step.saved_bytes(arms[diet.AS_IT_WAS])
    for arm in arms.values():
        diet.switch(arm, trains=False)
    expected, _ = step.saved_bytes(arms[diet.AS_IT_WAS])
    kept, _ = step.saved_bytes(arms[name])
    assert kept - expected < (trained - expected) / 2


@pytest.mark.parametrize("name", ["all layers at once", "path and all at once", "as it is now"])
def test_a_recorded_variant_learns_as_the_layer_does(name, tape):
    """A replay's logits and gradients, at the start and, recorded again, with all frozen."""
    with aflora.side_stream(step.DEVICE):
        expected = make_arm(aflora.AFLoRALinear, "fp32", step.DEVICE)
        arm = make_arm(diet.VARIANTS[name], "fp32", step.DEVICE)
        for trains in (True, False):
            diet.switch(arm, trains)
            arm.record()
            assert len(arm.training.recorder.recorded) == 1
            arm.training.recorder.run(arm.training.forward_backward, arm.batch, 1)
            expected.model.load_state_dict(arm.model.state_dict())
            diet.switch(expected, trains)
            learn(expected)
            torch.testing.assert_close(arm.logits, expected.logits, rtol=1e-4, atol=1e-4)
            gradient = diet.gradient(expected)
            assert (diet.gradient(arm) - gradient).norm() < 1e-4 * gradient.norm()


# ------------------------------------------------------------------------------------- the counts
def count(call):
    with diet.Kernels() as kernels:
        call()
    return kernels.count


def test_what_starts_a_kernel():
    """The rule, one operation at a time."""
    x = torch.randn(4, 4)
    bias = torch.randn(4)
    assert count(lambda: x.T[1:].view(3, 2, 2)[:, None].detach().unbind()) == 0
    assert count(lambda: torch.empty_like(x, dtype=torch.bfloat16)) == 0
    assert count(lambda: x.to(torch.float32)) == 0  # it is
    assert count(lambda: x.bfloat16()) == 1
    assert count(lambda: x.T.contiguous()) == 1
    assert count(lambda: torch.zeros(3)) == 1
    assert count(lambda: torch.cat([x, x, x])) == 1
    assert count(lambda: torch.mul(x, x, out=x)) == 1
    assert count(lambda: nn.functional.linear(x, x, bias)) == 1
    assert count(lambda: x.addmm_(x, x)) == 1
    assert count(lambda: torch.addmm(x, x, x)) == 2


# Forward: the base, a cast of A, A's product, two products of the fold, its layout, its cast, the
# path's product with a copy of y. Backward: gradients of h and of the folded B; its cast; of s_b
# product, sum and the gradient that goes on; of s_d product and sum; x's by A, x's by the base, and
# their sum. Where A and B train: A's gradient and its cast; B's product and its layout.
AS_IT_WAS = (9, 2 + 1 + 3 + 2 + 3, 4)
# By hand: a cast of A, two products of the fold, A's product, the base, the path's product. Then
# gradients of h and of the folded B; x's in two; product and two sums for both vectors. Where A and
# B train: A's gradient and its cast; B's two products.
BY_HAND = (6, 2 + 2 + 3, 4)


@pytest.mark.parametrize("name, forward, backward, of_matrices", [
    (diet.AS_IT_WAS, *AS_IT_WAS),
    ("x cast once", *AS_IT_WAS),  # x is bf16 here
    ("added in place", AS_IT_WAS[0] - 1, *AS_IT_WAS[1:]),
    ("path by hand", *BY_HAND),
])
@pytest.mark.parametrize("trains", [True, False])
def test_kernels_of_a_layer_by_hand(name, forward, backward, of_matrices, trains):
    """One layer whose x is bf16 and needs a gradient."""
    layer = aflora.AFLoRALinear(nn.Linear(8, 12).bfloat16().requires_grad_(False))
    layer.__class__ = diet.VARIANTS[name]
    for matrix in MATRICES:
        getattr(layer, matrix).requires_grad_(trains)
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), diet.Kernels() as kernels:
        y = layer(x)
    assert kernels.count == forward
    gradient = torch.ones_like(y)
    assert count(lambda: y.backward(gradient)) == backward + of_matrices * trains


def test_kernels_an_adapter_of_six_blocks(monkeypatch):
    """MiniLM's depth: 36 adapters of 20 kernels, of which the floor has two, and 4 more where A and
    B train; 21 read a LayerNorm's float32: x is cast for A, and its gradient back.
    """
    monkeypatch.setitem(step.SHAPES, "tiny", TINY | {"num_hidden_layers": 6})
    names = (diet.AS_IT_WAS, "x cast once", "as it is now")
    monkeypatch.setattr(diet, "VARIANTS", {name: diet.VARIANTS[name] for name in names})
    monkeypatch.setattr(step, "CUDA", False)
    monkeypatch.setattr(step, "DEVICE", torch.device("cpu"))
    arms = diet.make_arms("tiny", (2, 4))
    for trains in (True, False):
        found = diet.count(arms, trains)
        expected = 36 * 18 + 12 * 4 * trains
        assert found["floor"]["an_adapter"] == 0
        assert found[diet.AS_IT_WAS]["an_adapter"] * 36 == pytest.approx(expected + 21 * 2)
        for name in names[1:]:
            assert found[name]["an_adapter"] * 36 == pytest.approx(expected)


def test_a_variant_that_computes_something_else_is_seen(monkeypatch):
    """Its gradients are far from those of the layer as it was, here by one part in five or so."""
    class Wrong(diet.Parts):
        def folded_B(self, dtype):
            return 1.2 * super().folded_B(dtype)

    ways = {diet.AS_IT_WAS: aflora.AFLoRALinear, "parts": diet.Parts, "wrong": Wrong}
    monkeypatch.setattr(diet, "VARIANTS", ways)
    found = diet.count(diet.make_arms("tiny", (2, 4)), True)
    assert found["parts"]["apart"] < 0.02
    assert 0.1 < found["wrong"]["apart"] < 0.4


# -------------------------------------------------------------------------------------- the script
def run(monkeypatch, capsys, flags=""):
    """What main() prints for the tiny shape after the machine's line."""
    monkeypatch.setattr(sys, "argv", f"diet.py --shape tiny --size 2x4 {flags}".split())
    diet.main()
    _, _, printed = capsys.readouterr().out.partition("\n")
    return printed


def test_the_script_counts_on_a_cpu(monkeypatch, capsys, tmp_path):
    """Each variant in both states, the same at each run, written to a file of results."""
    monkeypatch.setattr(step, "CUDA", False)
    monkeypatch.setattr(step, "DEVICE", torch.device("cpu"))
    printed = run(monkeypatch, capsys)
    rows = re.findall(r"^(\S.*?) +(\d+\.\d\d) +0\.0[0-3]\d\d$", printed, re.M)
    names = ["floor", *diet.VARIANTS]
    assert [name for name, _ in rows] == 2 * names
    start = dict(rows[:len(names)])
    frozen = dict(rows[len(names):])
    for name in diet.VARIANTS:
        assert float(frozen[name]) < float(start[name])
        leaner = name not in (diet.AS_IT_WAS, "padded to 8")
        assert (float(start[name]) < float(start[diet.AS_IT_WAS])) == leaner
    (title, content), = json.loads((tmp_path / "results/diet-cpu.json").read_text()).items()
    assert title == "tiny 2x4 bf16"
    for state, expected in (("start", start), ("frozen", frozen)):
        assert [*content[state]] == names
        for name, values in content[state].items():
            assert f"{values['an_adapter']:.2f}" == expected[name]
    assert run(monkeypatch, capsys) == printed


def test_the_script_measures_on_cuda(monkeypatch, capsys, tmp_path, tape):
    """Times of recorded steps, then what the profiler sees; without a GPU by stand-ins for both."""
    if not step.CUDA:
        monkeypatch.setattr(step, "CUDA", True)
        monkeypatch.setattr(step, "wait", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
        monkeypatch.setattr(step, "busy", lambda arm: (700, 2.5))
    monkeypatch.setitem(diet.SIZES, "tiny", (2, 4))
    names = (diet.AS_IT_WAS, "path by hand")
    monkeypatch.setattr(diet, "VARIANTS", {name: diet.VARIANTS[name] for name in names})
    printed = run(monkeypatch, capsys, "--rounds 2")
    path, = (tmp_path / "results").iterdir()
    (_, content), = json.loads(path.read_text()).items()
    assert content["rounds"] == 2
    for state in diet.STATES:
        assert content[state]["floor"]["to_floor"] == 1
        assert content[state][diet.AS_IT_WAS]["to_as_it_was"] == 1
        for name, values in content[state].items():
            assert 0 < values["ms_low"] <= values["ms"] <= values["ms_high"]
            assert values["kernels"] >= 100
            lines = re.findall(rf"^{name} +\S+ +\S+ +(\S+) +(\S+) +(\S+) ", printed, re.M)
            times = [values[key] for key in ("ms", "ms_low", "ms_high")]
            assert any([*map(float, line)] == pytest.approx(times, abs=0.01) for line in lines)


def test_too_few_rounds_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diet.py", "--rounds", "1"])
    with pytest.raises(SystemExit):
        diet.main()
