"""AFLoRA in the Trainer of transformers: AFLoRATrainer is a Trainer that scores and freezes.

    pip install "transformers[torch]"
    python examples/transformers_trainer.py      seconds on a CPU

A small random BERT learns a toy task, so nothing is downloaded. For a model and texts of your
own change main(). TrainingArguments are the Trainer's: accumulation, clipping, bf16, fp16. With
the model, its adapters and the Trainer made anew, train(resume_from_checkpoint=True) goes on
from the last checkpoint; on a CPU that equals an uninterrupted run bit for bit.

AFLoRA does three things in a Trainer, each at its place:

    training_step      once gradients are whole, and before they are clipped, they are scored
    on_optimizer_step  when the weights have moved, matrices freeze
    on_save            freezer.pt is written into the checkpoint

on_pre_optimizer_step would be too late for the score: the Trainer has clipped by then.

Writes adapter.pt and a folder trainer, with checkpoints, where it is started.
"""

import math
import sys
from functools import partial
from pathlib import Path

from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside aflora.py
from aflora import (  # noqa: E402
    AdaptiveFreezer,
    add_adapters,
    read_file,
    save_adapter,
    write_file,
)

FREEZER_FILE = "freezer.pt"
FREEZER_FORMAT = "aflora freezer 1"


class AFLoRATrainer(Trainer):
    """A Trainer for a model that has adapters already.

    make_freezer: callable, number of optimizer steps -> AdaptiveFreezer. It is called when
        train() begins, since only then the Trainer knows how many steps there will be.
    All else is as for any Trainer. train() raises AFLoRAError where a checkpoint holds no
    freezer.pt, or one of another run.
    """

    def __init__(self, *arguments, make_freezer, **settings):
        super().__init__(*arguments, **settings)
        self.make_freezer = make_freezer
        self.freezer = None
        self.checkpoint = None  # the folder from which this training goes on
        self.add_callback(Freezing(self))
        if isinstance(self.model, PreTrainedModel):
            # Under the names of older versions, in which transformers writes a ViT, for one, a
            # checkpoint's adapters would not be found again
            save = partial(self.model.save_pretrained, save_original_format=False)
            self.model.save_pretrained = save

    def train(self, resume_from_checkpoint=None, **settings):
        """Trains, from the start, from a checkpoint's folder or, if True, from the last one."""
        self.checkpoint = resume_from_checkpoint
        if resume_from_checkpoint is True:
            self.checkpoint = get_last_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, **settings)

    def get_decay_parameter_names(self, model):
        """Matrices only: a decay would pull AFLoRA's vectors towards zero."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if model.get_parameter(name).ndim > 1]

    def training_step(self, model, *arguments, **settings):
        """Adds the gradients of one micro-batch; behind the last of a step they are scored."""
        loss = super().training_step(model, *arguments, **settings)
        if self.accelerator.sync_gradients:
            self.score(model)
        return loss

    def score(self, model):
        """Scores gradients that are whole, unclipped and unscaled; they stay as they are.

        fp16's are scaled. A GradScaler unscales only once a step, and the Trainer asks for that
        when it clips: so the score is given quotients, and then the gradients are put back.
        """
        every = [p.grad for p in model.parameters() if p.grad is not None]
        finite = get_total_norm(every, math.inf).isfinite()  # if one is not, fp16 skips the step
        gradients = {p: p.grad for p in self.freezer.live.values() if p.grad is not None}
        if self.accelerator.scaler:
            scale = self.accelerator.scaler.get_scale()
            for p, grad in gradients.items():
                p.grad = grad / scale
        self.freezer.update(found_inf=~finite)
        for p, grad in gradients.items():
            p.grad = grad


class Freezing(TrainerCallback):
    """The freezer's part in what a Trainer tells its callbacks."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **rest):
        """Makes the freezer. The optimizer is there already, made while everything trained."""
        self.trainer.freezer = self.trainer.make_freezer(state.max_steps)
        if self.trainer.checkpoint:
            content = read_file(Path(self.trainer.checkpoint, FREEZER_FILE), FREEZER_FORMAT)
            self.trainer.freezer.load_state_dict(content["freezer"])

    def on_optimizer_step(self, args, state, control, optimizer, **rest):
        """Freezes what is due, and the optimizer forgets it."""
        self.trainer.freezer.freeze(optimizer)

    def on_save(self, args, state, control, **rest):
        """Writes the freezer's state into the checkpoint that was just made."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            content = dict(format=FREEZER_FORMAT, freezer=self.trainer.freezer.state_dict())
            write_file(folder / FREEZER_FILE, content)


def main():
    """Trains the toy BERT of your_own_model.py and prints what froze. Returns the Trainer."""
    from your_own_model import bert_batches, plain_bert

    model = plain_bert()
    adapters = add_adapters(model, targets=["query", "value"], modules_to_save=["classifier"])

    def make_freezer(steps):
        return AdaptiveFreezer(adapters, total_steps=steps, t_i=steps // 10, t_f=steps // 2)

    rows = [dict(input_ids=ids, labels=label) for batch in bert_batches(0)
            for ids, label in zip(batch["input_ids"], batch["labels"])]
    args = TrainingArguments(
        "trainer", num_train_epochs=3, learning_rate=4e-3, per_device_train_batch_size=16,
        gradient_accumulation_steps=2, save_strategy="epoch", report_to="none")
    trainer = AFLoRATrainer(model, args, train_dataset=rows, make_freezer=make_freezer)
    trainer.train()
    save_adapter(model, "adapter.pt")
    for name, step in trainer.freezer.frozen_at.items():
        print(f"frozen after step {step:3} of {trainer.state.max_steps}: {name}")
    return trainer


if __name__ == "__main__":
    main()
