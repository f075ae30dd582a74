"""Trainers that people have: that of transformers, accelerate, a loop of one's own, processes.

What stands in examples/README.md is run from there. transformers refuses fp16 on a CPU: the order
of GradScaler and Trainer is tested with a scaler put into the Trainer's accelerator, in float32,
where scaling by powers of two loses nothing.
"""

import math
import shutil
from functools import partial

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_readme import ROOT, blocks, names_for_code
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from aflora import AdaptiveFreezer, AFLoRAError, Training, add_adapters

T = 30  # five epochs of six optimizer steps, of two micro-batches each
CLIP = 0.05  # below every gradient's norm here


# ------------------------------------------------------------------- the Trainer of transformers
@pytest.fixture
def example(monkeypatch):
    """examples/transformers_trainer.py, where transformers and accelerate are installed."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # a Trainer in bf16 may leave it behind
    monkeypatch.syspath_prepend(ROOT / "examples")
    import transformers_trainer
    return transformers_trainer


def adapted_bert(dropout=0.0):
    """(a tiny random BERT with a classifier, its adapters)."""
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8, initializer_range=0.3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))
    layers = add_adapters(model, ["query", "value"], modules_to_save=["classifier"])
    return model, layers


def make_freezer(layers, total_steps):
    """Eight matrices that freeze from step 9 to 23 of 30, with a look at each."""
    quarter = total_steps // 4
    return AdaptiveFreezer(layers, total_steps, t_i=quarter + 1, t_f=quarter, interval=1)


def make_trainer(example, folder, dropout=0.0, kind=None, **settings):
    """A Trainer that keeps in .steps the micro-batches and in .scores the scores of each step."""
    import transformers

    class Recorded(kind or example.AFLoRATrainer):
        def training_step(self, model, inputs, *rest):
            self.waiting.append(inputs)
            loss = super().training_step(model, inputs, *rest)
            if self.accelerator.sync_gradients:
                self.steps.append(self.waiting)
                self.scores.append(self.freezer.scores())
                self.waiting = []
            return loss

    model, layers = adapted_bert(dropout)
    random = torch.Generator().manual_seed(1)
    rows = [dict(input_ids=torch.randint(20, (6,), generator=random), labels=i % 2)
            for i in range(48)]
    args = transformers.TrainingArguments(**dict(
        output_dir=str(folder), num_train_epochs=5, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_grad_norm=CLIP, learning_rate=1e-2, weight_decay=0.1,
        optim="adamw_torch", save_strategy="no", logging_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False) | settings)
    trainer = Recorded(model, args, train_dataset=rows,
                       make_freezer=lambda total_steps: make_freezer(layers, total_steps))
    trainer.model_accepts_loss_kwargs = False  # else it adds up BERT's losses, which are means
    trainer.waiting = []
    trainer.steps = []
    trainer.scores = []
    return trainer


def trained_by_hand(steps, precision=torch.float32, whole=False):
    """The same run in a loop: (model, freezer, scores of each step).

    steps: a list of micro-batches for each. whole: they are put together to one batch.
    """
    model, layers = adapted_bert()
    freezer = make_freezer(layers, len(steps))
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trainable if p.ndim > 1], weight_decay=0.1),
              dict(params=[p for p in trainable if p.ndim == 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups)
    scores = []
    for done, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - done / len(steps))
        if whole:
            batches = [{key: torch.cat([b[key] for b in batches]) for key in batches[0]}]
        for batch in batches:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = model(**batch).loss
            (loss / len(batches)).backward()
        freezer.update()
        scores.append(freezer.scores())
        norm = clip_grad_norm_(trainable, CLIP)
        assert norm > CLIP
        optimizer.step()
        freezer.freeze(optimizer)
        optimizer.zero_grad()
    return model, freezer, scores


def assert_same_weights(one, other):
    """Two models have the very same bits."""
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_same_freezers(one, other):
    """All that two freezers know is the same: steps, what froze, scores to the last bit."""
    one = tree_leaves(one.state_dict())
    other = tree_leaves(other.state_dict())
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_the_trainer_trains_as_a_loop_by_hand(example, tmp_path):
    """Micro-batches, clipping, the Trainer's own number of steps: the same weights and freezing.

    The scores are those of unclipped gradients of whole batches, no micro-batches at all.
    """
    trainer = make_trainer(example, tmp_path)
    trainer.train()
    assert [len(batches) for batches in trainer.steps] == T * [2]
    assert trainer.freezer.total_steps == trainer.freezer.step == trainer.state.max_steps == T
    model, freezer, scores = trained_by_hand(trainer.steps)
    assert trainer.freezer.frozen_at == freezer.frozen_at
    assert len(set(freezer.frozen_at.values())) > 4
    assert trainer.scores == scores
    assert_same_weights(trainer.model, model)

    model, freezer, scores = trained_by_hand(trainer.steps, whole=True)
    assert trainer.freezer.frozen_at == freezer.frozen_at
    for ours, theirs in zip(trainer.scores, scores, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_the_trainer_in_bf16(example, tmp_path):
    """Under autocast, with float32 scores and weights: as a loop by hand."""
    trainer = make_trainer(example, tmp_path, bf16=True, max_steps=10)
    trainer.train()
    model, freezer, scores = trained_by_hand(trainer.steps, torch.bfloat16)
    assert trainer.scores == scores
    assert trainer.freezer.frozen_at == freezer.frozen_at
    assert len(freezer.frozen_at) == 8
    assert_same_weights(trainer.model, model)


def test_a_resumed_trainer_equals_one_that_was_not_stopped(example, tmp_path):
    """From a checkpoint before anything froze, and from the last one, between two freezes: weights,
    scores and freezing are those of the whole run, bit for bit, with dropout.
    """
    first = make_trainer(example, tmp_path, dropout=0.1, save_strategy="steps", save_steps=7)
    first.train()
    assert 9 <= min(first.freezer.frozen_at.values()) < 14 < max(first.freezer.frozen_at.values())
    for step in (21, 28, 30):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    for step, checkpoint in ((7, f"{tmp_path}/checkpoint-7"), (14, True)):
        again = make_trainer(example, tmp_path, dropout=0.1)
        again.train(resume_from_checkpoint=checkpoint)
        assert len(again.steps) == T - step
        assert again.scores == first.scores[step:]
        assert_same_freezers(again.freezer, first.freezer)
        assert_same_weights(again.model, first.model)


def test_a_checkpoint_has_the_names_of_the_model(example, tmp_path):
    """transformers would write a ViT's weights under older names, and find no adapter at resume."""
    from safetensors.torch import load_file
    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
    model = ViTForImageClassification(ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8))
    adapters = add_adapters(model, ["q_proj"], modules_to_save=["classifier"])
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = example.AFLoRATrainer(model, args, make_freezer=partial(make_freezer, adapters))
    trainer.save_model()
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_a_trainer_does_not_resume_without_its_freezer(example, tmp_path):
    """A checkpoint of another Trainer, and one of another plan, are refused by name."""
    make_trainer(example, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(AFLoRAError, match="total_steps"):
        make_trainer(example, tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2/freezer.pt").unlink()
    with pytest.raises(AFLoRAError, match="checkpoint-2/freezer.pt"):
        make_trainer(example, tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def scaled(example, init_scale):
    """An AFLoRATrainer whose accelerator scales the loss as in fp16, on float32 and a CPU."""
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    class Fp16Accelerator(Accelerator):
        mixed_precision = "fp16"

    class Scaled(example.AFLoRATrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.__class__ = Fp16Accelerator
            self.accelerator.native_amp = True
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

    return Scaled


def test_the_trainer_with_a_scaler_scores_unscaled_gradients(example, tmp_path):
    """Scaled by 1024 the run is the same: the same scores, clipping, weights, to the last bit."""
    plain = make_trainer(example, tmp_path, max_steps=10)
    plain.train()
    trainer = make_trainer(example, tmp_path, max_steps=10, kind=scaled(example, 2.0**10))
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**10
    assert trainer.scores == plain.scores
    assert trainer.freezer.frozen_at == plain.freezer.frozen_at
    assert_same_weights(trainer.model, plain.model)


@pytest.mark.parametrize("whose", ["query.lora_A", "classifier.weight"])
def test_a_step_that_the_scaler_skips_leaves_the_scores_alone(example, tmp_path, whose):
    """One gradient overflows in steps 3 and 4, a matrix's or the head's: both steps count."""
    trainer = make_trainer(example, tmp_path, max_steps=15, kind=scaled(example, 2.0**10))
    p = next(p for name, p in trainer.model.named_parameters() if name.endswith(whose))
    p.register_hook(lambda grad: grad * (math.inf if len(trainer.steps) in (2, 3) else 1))
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**8
    assert trainer.scores[1] == trainer.scores[2] == trainer.scores[3]
    assert len({tuple(scores.values()) for scores in trainer.scores[:6]}) == 4
    assert trainer.freezer.step == 15
    assert len(trainer.freezer.frozen_at) == 8


def test_the_example_of_a_trainer(example, tmp_path, monkeypatch, capsys):
    """On fewer rows: it trains as many steps as the Trainer says and prints what froze."""
    import your_own_model
    batches = your_own_model.bert_batches(0)
    monkeypatch.setattr(your_own_model, "bert_batches", lambda epoch: batches[:12])
    monkeypatch.chdir(tmp_path)
    trainer = example.main()
    assert capsys.readouterr().out.count("frozen after step") == 8
    assert trainer.state.max_steps == trainer.freezer.step == 36
    assert (tmp_path / "adapter.pt").exists()
    assert (tmp_path / "trainer/checkpoint-36/freezer.pt").exists()


# ---------------------------------------------------------------------- loops of examples/README.md
def scores_of_each_step(monkeypatch):
    """A list to which every freezer from now on appends its scores before it freezes."""
    scores = []
    freeze = AdaptiveFreezer.freeze

    def recording(freezer, optimizer):
        scores.append(freezer.scores())
        return freeze(freezer, optimizer)

    monkeypatch.setattr(AdaptiveFreezer, "freeze", recording)
    return scores


def own_loop(changes=(), stop=None):
    """Runs the loop of one's own, with dropout and a checkpoint every 20 steps: its names.

    changes: pairs of what stands in its code and what is put there. stop: the micro-batch at
        which Ctrl-C is pressed.
    """
    code, = blocks("examples/README.md", "A loop of your own")
    for old, new in [("step % 100", "step % 20"), ("trainable, 1.0", f"trainable, {CLIP}"),
                     *changes]:
        assert code.count(old) == 1
        code = code.replace(old, new)
    seen = []

    def loss(model, batch):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(batch)
        x, labels = batch
        return tiny.loss_of(model, (F.dropout(x, 0.1), labels))

    names = names_for_code()
    names |= {"loss": loss, "batches": lambda epoch: tiny.data(batches=40, seed=epoch)}
    exec(code, names)
    return names


def test_the_loop_of_ones_own_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped in step 28, of 60, and started anew it ends with the same bits, random state and
    all. In fp16, whose scaler overflows at first: skipped steps count and move no score.
    """
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**22))
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = own_loop()
    end = torch.get_rng_state()
    assert whole["scaler"].get_scale() < 2.0**22
    assert whole["freezer"].step == 60
    assert 20 < max(whole["freezer"].frozen_at.values()) <= 30

    monkeypatch.chdir(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        own_loop(stop=55)
    torch.manual_seed(9)
    again = own_loop()
    assert_same_weights(again["model"], whole["model"])
    assert_same_freezers(again["freezer"], whole["freezer"])
    assert again["scheduler"].get_last_lr() == whole["scheduler"].get_last_lr()
    assert torch.equal(torch.get_rng_state(), end)


@pytest.mark.parametrize("scaler", ["device, init_scale=1024", "device, enabled=False"])
def test_the_loop_of_ones_own_scores_whole_gradients(tmp_path, monkeypatch, scaler):
    """In float32, with a scaler and without one: scores, freezing and weights are those of
    Training.step on whole batches under the same learning rates.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(F, "dropout", lambda x, p: x)
    scores = scores_of_each_step(monkeypatch)
    names = own_loop([("GradScaler(device", f"GradScaler({scaler}"),
                      ("device, torch.float16", "device, enabled=False")])

    model = names_for_code()["model"]
    layers = add_adapters(model, ["query", "value"], modules_to_save=["classifier"])
    freezer = AdaptiveFreezer(layers, 60, t_i=6, t_f=30)
    training = Training(model, tiny.loss_of, total_steps=60, lr=4e-3, freezer=freezer, clip=CLIP)
    rates = iter(torch.linspace(1, 0.01, 61).tolist())
    training.rate = partial(next, rates)
    batches = [batch for epoch in range(3) for batch in tiny.data(batches=40, seed=epoch)]
    for first, second in zip(batches[::2], batches[1::2]):
        training.step([tuple(torch.cat(pair) for pair in zip(first, second))])
    assert names["freezer"].frozen_at == freezer.frozen_at
    assert len(scores) == 2 * 60
    for ours, theirs in zip(scores[:60], scores[60:]):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for p, q in zip(names["model"].parameters(), model.parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_loop_of_accelerate(monkeypatch):
    """Under accumulate() it trains as the same loop does without accelerate, to the last bit. An
    epoch's last step has one micro-batch, whose gradient accelerate halves as the others'.
    """
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' Trainers
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    scores = scores_of_each_step(monkeypatch)
    batches = tiny.data(batches=15)
    rows = [(x, label) for batch in batches for x, label in zip(*batch)]
    names = names_for_code() | {"loader": DataLoader(rows, batch_size=16)}
    plain = names["model"]
    code, = blocks("examples/README.md", "accelerate and DistributedDataParallel")
    exec(code.replace("trainable, 1.0", f"trainable, {CLIP}"), names)

    model = names_for_code()["model"]
    layers = add_adapters(model, ["query", "value"], modules_to_save=["classifier"])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=4e-3, weight_decay=0)
    freezer = AdaptiveFreezer(layers, 24, t_i=2, t_f=12)
    for place in 3 * list(range(0, 15, 2)):
        for batch in batches[place:place + 2]:
            (tiny.loss_of(model, batch) / 2).backward()
        freezer.update()
        assert clip_grad_norm_(trainable, CLIP) > CLIP
        optimizer.step()
        freezer.freeze(optimizer)
        optimizer.zero_grad()
    assert len(freezer.frozen_at) == 4
    assert len(scores) == 2 * 24
    assert scores[:24] == scores[24:]
    assert_same_freezers(names["freezer"], freezer)
    assert_same_weights(plain, model)


# ----------------------------------------------------------------------- DistributedDataParallel
@pytest.fixture
def process_group(tmp_path):
    """A group of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def frozen_in_a_loop(wrap):
    """Twenty steps on wrap(model): (plain model, freezer)."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 20, t_i=4, t_f=6, interval=1)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(20):
        batch, = tiny.data(batches=1, seed=step)
        tiny.loss_of(wrapped, batch).backward()
        freezer.update()
        optimizer.step()
        freezer.freeze(optimizer)
        optimizer.zero_grad()
    return model, freezer


def test_distributed_data_parallel_trains_on_after_a_freeze(process_group):
    """With find_unused_parameters, as the page says: as without it, also once all are frozen."""
    model, freezer = frozen_in_a_loop(
        partial(DistributedDataParallel, find_unused_parameters=True))
    plain, expected = frozen_in_a_loop(lambda model: model)
    assert freezer.frozen_at == expected.frozen_at
    assert 4 < min(freezer.frozen_at.values()) < 10
    assert max(freezer.frozen_at.values()) == 14
    assert all(p.grad is None for p in freezer.matrices.values())
    assert_same_weights(model, plain)


@pytest.mark.parametrize("options", [{}, {"static_graph": True}])
def test_distributed_data_parallel_that_cannot_work(process_group, options):
    """Without it, or with a graph that must not change, torch itself stops the next step."""
    with pytest.raises(RuntimeError, match="finished reduction in the prior iteration"):
        frozen_in_a_loop(partial(DistributedDataParallel, **options))
