"""CUDA graphs and torch.compile under AFLoRA's whole step: what they give. Needs a CUDA device.

    pip install transformers peft accelerate matplotlib
    python benchmarks/graphs.py

A small BERT's step is bound by the launches of its kernels. Three ways to train the same steps on
batches of 64 texts, padded to one of five lengths (MiniLM-L6-H384 shapes, random texts, bf16):
eager, as aflora.train does it; graphs: forward, backward, score, clip and AdamW captured as one
CUDA graph a length, anew after each freezing; compile: torch.compile of the model. Captures and
compilation are counted in the seconds. A real run has more steps for each freezing: see the ms.
The mean losses should agree. Writes results/graphs-cuda.json.
"""

import statistics
import sys
import time

import step  # the benchmark beside this file
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

STEPS, SIZE, LENGTHS = 300, 64, (8, 16, 24, 32, 40)
FROZEN = {100: 12, 150: 18, 200: 24}  # after so many steps: of the 24 matrices


class Run(step.Arm):
    """AFLoRA, trained in one of three modes: eager, graphs or compile."""
    def __init__(self, mode):
        self.inputs = {n: step.make_batch(SIZE, n) for n in LENGTHS}  # where the graphs read
        super().__init__(step.ours, "minilm", "bf16", self.inputs[LENGTHS[0]])
        self.mode, self.graphs, self.seen, self.captures = mode, {}, set(), 0
        self.freezer.looks = FROZEN
        self.freezer.Ibar, self.freezer.Ubar = (  # until now one tensor of zeros, on the CPU
            scores.to(step.DEVICE, copy=True) for scores in (self.freezer.Ibar, self.freezer.Ubar))
        self.losses, self.rate = torch.zeros(2, device=step.DEVICE).unbind()
        # A rate on the device: a graph reads it anew at each replay
        self.optimizer = torch.optim.AdamW(self.trained, self.rate, fused=True, capturable=True)
        if mode == "compile":
            torch._dynamo.config.recompile_limit = 64  # each freezing compiles the model anew
            self.model.classifier.compile(dynamic=True)

    def whole_step(self, length):
        """All that the device does in a step, without a wait: what a graph captures."""
        self.optimizer.zero_grad(set_to_none=True)  # on the host alone: backward writes, not adds
        with self.autocast:
            loss = self.model(*self.inputs[length]).loss
        loss.backward()
        live = [p for p in self.trained if p.grad is not None]
        norm = get_total_norm([p.grad for p in live])
        scores = self.freezer.Ibar, self.freezer.Ubar
        self.freezer.update(~norm.isfinite())
        # update() makes new tensors; a replay would read the old ones for ever
        for old, new in zip(scores, (self.freezer.Ibar, self.freezer.Ubar)):
            old.copy_(new)
        self.freezer.Ibar, self.freezer.Ubar = scores
        clip_grads_with_norm_(live, 1.0, norm)
        self.optimizer.step()
        self.losses += loss.detach()

    def train(self, number, batch):
        """Step `number`, from a batch on the host to the freezer's look."""
        length = batch[0].shape[1]
        for static, new in zip(self.inputs[length], batch):
            static.copy_(new, non_blocking=True)
        self.rate.fill_(1e-3 * (1 - number / STEPS))
        if self.mode != "graphs" or length not in self.seen:  # the first time warms up, and trains
            self.whole_step(length)
            self.seen.add(length)
        else:
            if length not in self.graphs:
                self.graphs[length] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[length], stream=torch.cuda.current_stream()):
                    self.whole_step(length)  # is recorded, does nothing yet
                self.captures += 1
            self.graphs[length].replay()
        if self.freezer.freeze(number, self.optimizer):  # other matrices train, others are scored
            self.graphs.clear()
            self.seen.clear()


def main():
    if not step.CUDA:
        sys.exit("benchmarks/graphs.py needs a CUDA device: CUDA graphs are what it measures")
    order = torch.randint(len(LENGTHS), (STEPS,), generator=torch.Generator().manual_seed(0))
    batches = {n: [t.pin_memory() for t in step.make_batch(SIZE, n, "cpu")] for n in LENGTHS}
    found = {}
    for mode in ("eager", "graphs", "compile"):
        # One stream of their own for all steps: a capture cannot take place on the default one,
        # and autograd's nodes stay on the stream where they were made
        with torch.cuda.stream(torch.cuda.Stream()):
            run, began = Run(mode), time.perf_counter()
            spent = [step.milliseconds(run.train, number, batches[LENGTHS[index]])
                     for number, index in enumerate(order.tolist(), 1)]
            found[mode] = dict(ms=statistics.median(spent), seconds=time.perf_counter() - began,
                               ms_after_freezing=statistics.median(spent[-50:]),
                               captures=run.captures, mean_loss=run.losses.item() / STEPS)
        a = found[mode]
        print(f"{mode:8}{a['ms']:8.2f} ms a step ({a['ms_after_freezing']:.2f} all frozen), "
              f"{a['seconds']:.1f} s for {STEPS} steps, {a['captures']} captures, mean loss "
              f"{a['mean_loss']:.4f}", flush=True)
        step.write_results("graphs", {"minilm bf16": dict(
            machine=step.machine(), steps=STEPS, batch_size=SIZE, modes=found)})


if __name__ == "__main__":
    main()
