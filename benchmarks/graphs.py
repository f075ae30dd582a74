"""CUDA graphs and torch.compile under AFLoRA's whole step: what they give. Needs a CUDA device.

    pip install transformers peft accelerate matplotlib
    python benchmarks/graphs.py

A small BERT's step is bound by the launches of its kernels. Three ways to train the same steps on
batches of 64 texts, padded to one of five lengths (MiniLM-L6-H384 shapes, random texts, bf16):
eager, Training.step as it is; graphs: Training.step, that is forward, backward, score, clip and
AdamW, captured as one CUDA graph a length, anew after each freezing; compile: torch.compile of the
model. Captures and compilation are counted in the seconds. A real run has more steps for each
freezing: see the ms. The mean losses should agree. Writes results/graphs-cuda.json.
"""

import statistics
import sys
import time
from functools import partial

import step  # the benchmark beside this file
import torch

STEPS = 300
SIZE = 64
LENGTHS = (8, 16, 24, 32, 40)
FROZEN = {100: 12, 150: 18, 200: 24}  # after so many steps: of the 24 matrices


class ReplayedFreezer(step.FreezesByCount):
    """Scores in the same two tensors at each step, which a graph can read and write again."""

    def update(self, found_inf=None):
        places = (self.Ibar, self.Ubar)
        super().update(found_inf)
        for place, new in zip(places, (self.Ibar, self.Ubar)):
            place.copy_(new)
        self.Ibar, self.Ubar = places

    def due(self):
        if torch.cuda.is_current_stream_capturing():
            return 0  # scores can be read behind the replay alone
        return super().due()


class Run(step.Arm):
    """AFLoRA, trained in one of three modes: eager, graphs or compile."""

    def __init__(self, mode):
        self.inputs = {n: step.make_batch(SIZE, n) for n in LENGTHS}  # where the graphs read
        super().__init__(partial(step.ours, freezes=ReplayedFreezer), "minilm", "bf16",
                         self.inputs[LENGTHS[0]])
        self.mode = mode
        self.graphs = {}  # length: graph
        self.seen = set()  # lengths that have trained since the last freezing
        self.captures = 0
        self.freezer.Ibar = self.freezer.Ibar.to(step.DEVICE, copy=True)
        self.freezer.Ubar = self.freezer.Ubar.to(step.DEVICE, copy=True)
        # The rate as a tensor on the device: a graph reads it anew at each replay
        self.share_of_peak = torch.zeros((), device=step.DEVICE)
        self.training.rate = self.rate
        for group in self.training.optimizer.param_groups:
            group["capturable"] = True
            group["peak_lr"] = 1e-3
        if mode == "compile":
            torch._dynamo.config.recompile_limit = 64  # each freezing compiles the model anew
            self.model.classifier.compile(dynamic=True)

    def rate(self):
        """The share of the peak learning rate, in place of Training's."""
        return self.share_of_peak

    def train(self, number, batch):
        """Step `number`, from a batch on the host to the freezer's look."""
        length = batch[0].shape[1]
        self.batch = self.inputs[length]
        for static, new in zip(self.batch, batch):
            static.copy_(new, non_blocking=True)
        self.share_of_peak.fill_(1 - number / STEPS)
        self.freezer.wanted = FROZEN.get(number, self.freezer.wanted)
        frozen_before = len(self.freezer.frozen_at)
        if self.mode == "graphs" and length in self.seen:
            self.replay(length)
            self.freezer.freeze(self.training.optimizer)
        else:  # in mode graphs this warms up, and trains
            self.step()
            self.seen.add(length)
        if len(self.freezer.frozen_at) > frozen_before:  # others train and are scored from now on
            self.graphs.clear()
            self.seen.clear()

    def replay(self, length):
        """One step by the graph of this length, which is captured where there is none."""
        if length in self.graphs:
            self.training.steps += 1  # what the host counts in Training.step
            self.freezer.step += 1
        else:
            self.graphs[length] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[length], stream=torch.cuda.current_stream()):
                self.step()  # is counted and recorded, trains nothing yet
            self.captures += 1
        self.graphs[length].replay()

    def mean_loss(self):
        """Of all steps. Waits for the device."""
        return self.training.sums[0].item() / STEPS


def measure(mode, order, batches):
    """Trains in one mode; what was measured. order: of the lengths, {length: batch} on the host."""
    # One stream of their own for all steps: a capture cannot take place on the default one,
    # and autograd's nodes stay on the stream where they were made
    with torch.cuda.stream(torch.cuda.Stream()):
        run = Run(mode)
        began = time.perf_counter()
        spent = [step.milliseconds(run.train, number, batches[length])
                 for number, length in enumerate(order, 1)]
        return {"ms": statistics.median(spent), "seconds": time.perf_counter() - began,
                "ms_after_freezing": statistics.median(spent[-50:]), "captures": run.captures,
                "mean_loss": run.mean_loss()}


def main():
    if not step.CUDA:
        sys.exit("benchmarks/graphs.py needs a CUDA device: CUDA graphs are what it measures")
    drawn = torch.randint(len(LENGTHS), (STEPS,), generator=torch.Generator().manual_seed(0))
    order = [LENGTHS[index] for index in drawn.tolist()]
    batches = {n: [t.pin_memory() for t in step.make_batch(SIZE, n, "cpu")] for n in LENGTHS}
    found = {}
    for mode in ("eager", "graphs", "compile"):
        found[mode] = measure(mode, order, batches)
        print(f"{mode:8}{found[mode]['ms']:8.2f} ms a step "
              f"({found[mode]['ms_after_freezing']:.2f} all frozen), "
              f"{found[mode]['seconds']:.1f} s for {STEPS} steps, "
              f"{found[mode]['captures']} captures, mean loss {found[mode]['mean_loss']:.4f}",
              flush=True)
        step.write_results("graphs", {"minilm bf16": {
            "machine": step.machine(), "steps": STEPS, "batch_size": SIZE, "modes": found}})


if __name__ == "__main__":
    main()
