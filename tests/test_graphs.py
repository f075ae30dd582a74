"""The recorder of CUDA graphs: on a CPU with a stand-in for the recording, on CUDA the real one."""

import functools
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import aflora
import tiny
import train_glue_small as glue
from aflora import AdaptiveFreezer, AFLoRAError, Training, save_checkpoint, train

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def tape(monkeypatch):
    """Replaces the recording by one that notes the call, and replays it on the inputs it was given.

    As with a CUDA graph nothing runs while it is recorded, and a replay reads the very tensors of
    the recording. Returns the list of recorded shapes; each replay appends "replay".
    """
    events = []

    class Tape:
        def __init__(self, pool, forward_backward, batch, count):
            self.call = functools.partial(forward_backward, batch, count)
            self.parameters = forward_backward.__self__.parameters
            self.places = self.now()
            # Where they lie nobody else's memory may come to lie: the recorder has to hold them
            self.gradients = [weakref.ref(p.grad) for p in self.parameters if p.requires_grad]
            x, *_ = batch.values() if isinstance(batch, dict) else batch
            events.append((tuple(x.shape), count))

        def now(self):
            """Where a replay reads weights, and adds to gradients: what trains has to have one."""
            assert all(p.grad is not None for p in self.parameters if p.requires_grad)
            return [(p.data_ptr(), p.grad.data_ptr() if p.requires_grad else None)
                    for p in self.parameters]

        def pool(self):
            return None

        def replay(self):
            for (weight, gradient), (then, before) in zip(self.now(), self.places, strict=True):
                assert weight == then
                assert gradient in (before, None)  # None: it has frozen since
            assert all(gradient() is not None for gradient in self.gradients)
            events.append("replay")
            self.call()

    monkeypatch.setattr(aflora, "record", Tape)
    return events


def noisy_loss(model, batch):
    """With dropout, so that a draw too many or too few is seen."""
    x, labels = batch
    return tiny.loss_of(model, (F.dropout(x, 0.2, model.training), labels))


def trained(graphs, batches, precision="fp32", loss=noisy_loss, device="cpu", **options):
    """(state, frozen_at, lines) of three epochs of AFLoRA, with or without graphs."""
    model, layers = tiny.adapted()
    model.to(device)
    torch.manual_seed(3)
    steps = 3 * -(-len(batches) // options.get("accumulate", 1))
    freezer = AdaptiveFreezer(layers, steps, steps // 8, steps // 3)
    lines = []

    def log(training):
        if training.line["step"] == training.steps:
            lines.append(training.line)

    train(model, lambda epoch: batches, loss, epochs=3, lr=1e-2, weight_decay=0.1, freezer=freezer,
          precision=precision, graphs=graphs, **dict(after_step=log) | options)
    return model.state_dict(), freezer.frozen_at, lines


def assert_same(one, other):
    """Two results of trained() agree to the last bit."""
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name


def two_shapes():
    """Twenty batches of 16 rows and of 12, and a last one of 5."""
    batches = []
    for number, (x, labels) in enumerate(tiny.data(batches=20)):
        rows = 16 if number % 3 else 12
        batches.append((x[:rows], labels[:rows]))
    x, labels = tiny.data(batches=1, seed=8)[0]
    return [*batches, (x[:5], labels[:5])]


@functools.cache
def eager_run():
    """What trained() gives without graphs in fp32."""
    return trained(False, two_shapes())


@functools.cache
def recorded_run():
    """What it gives with them if nobody stops it; for tests that have the tape."""
    return trained(True, two_shapes())


# ------------------------------------------------------------------------ with a stand-in, on CPUs
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_equals_eager(tape, precision, accumulate):
    """Bit for bit, with gradients that stay in place, dropout, odd last batches and freezing."""
    eager = trained(False, two_shapes(), precision, accumulate=accumulate)
    assert tape == []
    recorded = trained(True, two_shapes(), precision, accumulate=accumulate)
    assert tape.count("replay") > 20
    assert len(eager[1]) == 12
    assert_same(recorded, eager)


def test_an_overflow_is_skipped_as_ever(tape):
    """fp16: the scaler halves its scale between two replays, and the skipped steps are the same."""
    def steep(model, batch):
        return 1e4 * tiny.loss_of(model, batch)

    eager = trained(False, tiny.data(batches=20), "fp16", steep)
    recorded = trained(True, tiny.data(batches=20), "fp16", steep)
    assert eager[2][-1]["skipped"] > 0
    assert "replay" in tape
    assert_same(recorded, eager)


def test_the_third_batch_of_a_shape_is_recorded(tape):
    """Two run as they are; each shape, and each number of micro-batches, is one of its own."""
    model, _ = tiny.adapted()
    training = Training(model, tiny.loss_of, total_steps=20, lr=1e-2, graphs=True)
    x, labels = tiny.data()[0]
    whole = (x, labels)
    part = (x[:12], labels[:12])
    for batch in (whole, part, whole, part):
        training.step([batch])
    assert tape == []
    training.step([whole])
    assert tape == [((16, 8), 1), "replay"]
    training.step([part])
    assert tape[2:] == [((12, 8), 1), "replay"]
    training.step([whole])
    assert tape[4:] == ["replay"]
    training.step([whole, whole])
    assert tape[5:] == []
    training.step([whole, whole])
    assert tape[5:] == [((16, 8), 2), "replay", "replay"]


def test_gradients_stay_where_they_are(tape):
    """A recording adds to memory, not to names: they are zeroed in place, but for what froze."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 100, 0, 20)
    training = Training(
        model, tiny.loss_of, total_steps=100, lr=1e-2, freezer=freezer, graphs=True)
    training.step([tiny.data()[0]])
    places = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert None not in places.values()
    for batch in [*tiny.data(), *tiny.data()]:
        training.step([batch])
    assert len(freezer.frozen_at) > 0
    for name, p in model.named_parameters():
        assert p.grad is (places[name] if p.requires_grad else None)
        if p.grad is not None:
            assert not p.grad.any()


def test_recordings_outlive_a_freeze_but_not_the_last(tape):
    """They go on to make gradients that nobody reads, held for that. When all is frozen one batch
    runs as it is; then shapes are recorded anew, without these gradients."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 100, 0, 60)
    training = Training(
        model, tiny.loss_of, total_steps=100, lr=1e-2, freezer=freezer, graphs=True)
    batch = tiny.data()[0]
    recorded_in = []
    froze_in = []
    for step in range(1, 61):
        before = len(tape)
        froze_in += [step] if training.step([batch]) else []
        recorded_in += [step for event in tape[before:] if event != "replay"]
    assert froze_in == [10, 20, 30, 40]
    assert recorded_in == [3, 42]
    assert tape.count("replay") == 60 - 3
    (_, _, gradients), = training.recorder.recorded.values()
    assert [g is None for g in gradients] == [not p.requires_grad for p in training.parameters]


def test_what_trains_again_is_recorded_anew(tape):
    """A recording from when it was frozen makes no gradient for it."""
    model, layers = tiny.adapted()
    training = Training(model, tiny.loss_of, total_steps=20, lr=1e-2, graphs=True)
    batch = tiny.data()[0]
    for _ in range(4):
        training.step([batch])
    matrix = next(iter(layers.values())).lora_A
    for trains in (False, True):
        matrix.requires_grad_(trains)
        matrix.grad = None
        before = matrix.clone()
        for _ in range(3):
            training.step([batch])
        assert torch.equal(matrix, before) == (not trains)
    recordings = [number for number, event in enumerate(tape) if event != "replay"]
    assert recordings == [0, 6]  # the second behind two and then three replays


def test_what_is_frozen_by_hand_is_recorded_anew(tape):
    """Where its gradient is left in place, older recordings would go on to fill it; and those from
    then, of whatever shape, lack it when it trains again."""
    model, layers = tiny.adapted()
    training = Training(model, tiny.loss_of, total_steps=20, lr=1e-2, graphs=True)
    matrix = next(iter(layers.values())).lora_A
    x, labels = tiny.data()[0]
    for rows, trains in ((16, True), (16, False), (12, False), (12, True)):
        matrix.requires_grad_(trains)
        before = len(tape)
        for _ in range(4):
            training.step([(x[:rows], labels[:rows])])
        recordings = [event for event in tape[before:] if event != "replay"]
        assert recordings == [((rows, 8), 1)]
        assert matrix.grad is not None


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_hook_may_drop_gradients(tape, every):
    """Recordings would go on to write where they lay: what is learned is as without graphs."""
    def drop(training):
        if training.steps % every == 0:
            training.model.zero_grad()

    eager = trained(False, two_shapes(), after_step=drop)
    recorded = trained(True, two_shapes(), after_step=drop)
    assert ("replay" in tape) == (every > 1)  # the batch after a drop is not recorded
    assert_same(recorded, eager)


def test_a_hook_may_move_weights_and_let_others_train(tape):
    """A recording reads weights where they lay, and has the gradients of what trained then."""
    kept = []

    def move(training):
        if training.steps % 7 == 0:
            for p in training.model.parameters():
                kept.append(p.data)  # its memory is not given to the next one
                p.data = p.data.clone()
        if training.steps == 33:
            weight = training.model.blocks[0].norm.weight.requires_grad_(True)
            group = training.optimizer.param_groups[0] | dict(params=[weight])
            training.optimizer.add_param_group(group)

    before = tiny.adapted()[0].blocks[0].norm.weight
    eager = trained(False, two_shapes(), after_step=move)
    recorded = trained(True, two_shapes(), after_step=move)
    assert "replay" in tape
    assert not torch.equal(eager[0]["blocks.0.norm.weight"], before)
    assert_same(recorded, eager)


def test_other_types_and_other_values_are_other_shapes(tape):
    """A number in a batch is part of the recording, and so is the type of a tensor."""
    model, _ = tiny.adapted()

    def loss(model, batch):
        return batch["factor"] * tiny.loss_of(model, (batch["x"].float(), batch["labels"]))

    training = Training(model, loss, total_steps=16, lr=1e-2, graphs=True)
    x, labels = tiny.data()[0]
    for factor in (1.0, 2.0):
        for dtype in (torch.float32, torch.float64):
            for _ in range(4):
                training.step([dict(x=x.to(dtype), factor=factor, labels=labels)])
    assert tape == [((16, 8), 1), "replay", "replay"] * 4
    assert len(training.recorder.recorded) == 4


def test_recordings_end_with_the_training(monkeypatch):
    """At once, not when Python next collects cycles: that could be within another recording."""
    class Graph:
        def pool(self):
            return None

        def replay(self):
            """Holds nothing of Python, as a CUDA graph."""

    monkeypatch.setattr(aflora, "record", lambda pool, work, *inputs: Graph())
    model, _ = tiny.adapted()
    training = train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2, graphs=True)
    alive = [weakref.ref(graph) for _, graph, _ in training.recorder.recorded.values()]
    assert alive
    gc.disable()
    try:
        del training
        assert all(graph() is None for graph in alive)
    finally:
        gc.enable()


def test_a_batch_is_copied_to_where_the_recorded_one_was(tape):
    """A replay reads its own tensors; the caller's batch is neither kept nor changed."""
    seen = []

    def loss(model, batch):
        seen.append(batch[0].clone())
        return tiny.loss_of(model, batch)

    model, _ = tiny.adapted()
    training = Training(model, loss, total_steps=20, lr=1e-2, graphs=True)
    batches = tiny.data()
    before = [x.clone() for x, _ in batches]
    for batch in batches:
        training.step([batch])
    for found, x, (now, _) in zip(seen, before, batches, strict=True):
        assert torch.equal(found, x)
        assert torch.equal(now, x)


def test_only_so_many_shapes_are_recorded(tape, monkeypatch):
    """Shapes without end would fill the memory: further ones run as they are, and right."""
    monkeypatch.setattr(aflora, "MOST_GRAPHS", 1)
    eager = eager_run()
    assert_same(trained(True, two_shapes()), eager)
    recordings = [event for event in tape if event != "replay"]
    assert [shape for shape, _ in recordings] == [(16, 8), (16, 8)]  # anew behind the last freeze
    monkeypatch.setattr(aflora, "MOST_GRAPHS", 0)
    tape.clear()
    assert_same(trained(True, two_shapes()), eager)
    assert tape == []


@pytest.mark.parametrize("stop", [4, 22, 37])
def test_a_recorded_run_resumes(tape, tmp_path, stop):
    """To the bits of the uninterrupted one; the recordings are made anew."""
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(True, two_shapes(), after_step=tiny.stop_after(stop, path))
    state, frozen_at, lines = recorded_run()
    resumed = trained(True, two_shapes(), resume=path)
    assert_same(resumed, (state, frozen_at, [line for line in lines if line["step"] > stop]))


def test_what_cannot_be_recorded_names_the_argument():
    """Here: there is no CUDA device. Torch's error becomes a sentence that says graphs."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    model, _ = tiny.adapted()
    training = Training(model, tiny.loss_of, total_steps=9, lr=1e-2, graphs=True)
    batch = tiny.data()[0]
    training.step([batch])
    training.step([batch])
    with pytest.raises(AFLoRAError, match="graphs=True needs a CUDA device"):
        training.step([batch])


def test_on_cuda_texts_are_padded_to_multiples_of_eight(monkeypatch, folder):
    """So that few shapes occur; on a CPU to the longest of the batch, which is faster there."""
    rows = [("red green", None, 1), ("red", None, 0)]
    _, tokenizer, _ = glue.load_model(str(folder), 0, torch.device("cpu"))
    examples = glue.Examples(rows, tokenizer, max_length=12)
    both = torch.arange(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = examples.collate(both)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    padded = examples.collate(both)
    assert padded[0].shape == (2, 8)
    width = plain[0].shape[1]
    assert width < 8
    for one, other in zip(plain[:3], padded[:3]):
        assert torch.equal(other[:, :width], one)
    assert not padded[2][:, width:].any()  # the mask
    long = glue.Examples([("red " * 30, None, 1)], tokenizer, max_length=12)
    assert long.collate(torch.arange(1))[0].shape == (1, 12)  # the model has no more positions


# ----------------------------------------------------------------------------------- real, on CUDA
@CUDA
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_recorded_on_cuda_equals_eager(precision):
    """Without dropout: the losses of every logged line, and the same matrices at the same steps."""
    eager = trained(False, two_shapes(), precision, tiny.loss_of, "cuda")
    recorded = trained(True, two_shapes(), precision, tiny.loss_of, "cuda")
    assert recorded[1] == eager[1]
    assert [line["loss"] for line in recorded[2]] == [line["loss"] for line in eager[2]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("rank", [4, 6, 8])
def test_the_layer_in_bf16_equals_the_dense_formula(device, rank):
    """Output and every gradient, against equation (1) in float64. On CUDA the thin matrices of
    ranks 4 and 6 are filled up to eight rows."""
    torch.manual_seed(0)
    base = torch.nn.Linear(48, 40).to(device, torch.bfloat16).requires_grad_(False)
    layer = aflora.AFLoRALinear(base, rank)
    tiny.perturb(layer)
    x = torch.randn(2, 9, 48, device=device, dtype=torch.bfloat16, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters(recurse=False))}
    exact = {name: p.detach().double().requires_grad_() for name, p in leaves.items()}
    W = base.weight.double() + (exact["s_b"].diag() @ exact["lora_B"] @ exact["s_d"].diag()
                                @ exact["lora_A"])
    expected = exact["x"] @ W.T + base.bias.double()
    y = layer(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction.double())
    pairs = [(y, expected)] + [(leaves[name].grad, exact[name].grad) for name in leaves]
    for found, right in pairs:
        assert (found.double() - right).norm() < 0.02 * right.norm()


@CUDA
@pytest.mark.parametrize("every", [1, 5])
def test_a_hook_may_drop_gradients_on_cuda(every):
    """What is learned is as without graphs."""
    def drop(training):
        if training.steps % every == 0:
            training.model.zero_grad()

    eager = trained(False, two_shapes(), loss=tiny.loss_of, device="cuda", after_step=drop)
    recorded = trained(True, two_shapes(), loss=tiny.loss_of, device="cuda", after_step=drop)
    for name, value in eager[0].items():
        torch.testing.assert_close(recorded[0][name], value)


@CUDA
def test_frozen_is_frozen_on_cuda():
    """A matrix does not move after its step, though recordings from before had moved it."""
    model, layers = tiny.adapted()
    model.to("cuda")
    freezer = AdaptiveFreezer(layers, 120, 10, 30)
    frozen = {}

    def after_step(training):
        for name in freezer.frozen_at:
            frozen.setdefault(name, freezer.matrices[name].clone())

    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=15, lr=1e-2, freezer=freezer,
          graphs=True, after_step=after_step)
    assert len(frozen) == 12
    for name, value in frozen.items():
        assert torch.equal(freezer.matrices[name], value)
        assert freezer.matrices[name].grad is None


@CUDA
def test_no_wait_inside_a_recorded_step():
    """Torch itself raises where a step waits for the device; recordings are made before."""
    model, layers = tiny.adapted()
    model.to("cuda")
    freezer = AdaptiveFreezer(layers, 20, 10, 0)  # it scores, and nothing is due yet
    training = Training(
        model, tiny.loss_of, total_steps=20, lr=1e-2, freezer=freezer, graphs=True)
    batch = aflora.to_device(tiny.data()[0], training.device)
    with aflora.side_stream(training.device):
        for _ in range(5):
            training.step([batch])
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.step([batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@CUDA
@pytest.mark.parametrize("stop", [4, 37])
def test_a_recorded_run_resumes_on_cuda(tmp_path, stop):
    """With dropout: the generator's state on the device goes with the checkpoint."""
    path = tmp_path / "c.pt"

    def save(training):
        if training.steps == stop:
            save_checkpoint(training, path)

    whole = trained(True, two_shapes(), device="cuda", after_step=save)
    resumed = trained(True, two_shapes(), device="cuda", resume=path)
    assert resumed[1] == whole[1]
    for name, value in whole[0].items():
        torch.testing.assert_close(resumed[0][name], value)


READS_BACK = """
import pytest
import test_graphs
import tiny

def loss(model, batch):
    value = tiny.loss_of(model, batch)
    assert value.item() > 0
    return value

with pytest.raises(test_graphs.AFLoRAError, match="graphs=True needs .* reads no value back"):
    test_graphs.trained(True, tiny.data(), loss=loss, device="cuda")
"""


@CUDA
def test_a_loss_that_reads_a_value_back_is_refused():
    """It cannot be recorded; the message says which argument to leave out.

    In a process of its own: some versions of torch record nothing any more after such an error.
    """
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(aflora.__file__).parent)])
    environment = os.environ | dict(PYTHONPATH=folders)
    subprocess.run([sys.executable, "-c", READS_BACK], env=environment, check=True)


@CUDA
def test_an_exception_leaves_the_side_stream_behind_its_work():
    """What a stopped run computed is there for whoever reads it on the default stream."""
    x = torch.ones(4096, 4096, device="cuda")
    y = torch.zeros_like(x)
    with pytest.raises(KeyboardInterrupt), aflora.side_stream(torch.device("cuda")):
        for _ in range(50):
            y += x @ x / 4096
        raise KeyboardInterrupt
    assert (y == 50).all()
