"""A diet for the adapter's kernels: leaner ways to compute equation (1), counted and timed.

    pip install transformers peft accelerate
    python benchmarks/diet.py       on a CPU it counts; on CUDA it times, too, in two minutes

Each of VARIANTS changes one thing in AFLoRALinear as it was, whose result stays the same; "path by
hand" and the last three combine. Adopted since: "x cast once" and, on CUDA alone, "padded to 8" (as
it is now). Arms are step.py's, in bf16, beside its floor; start: the FFN's matrices train, frozen:
none. As in the floor, the gradient runs on to the embeddings' LayerNorm. Apart: the distance of the
adapters' gradients from those of the layer as it was, relative to these; s_b is random, so that
none is zero. It has to be that of bf16's rounding, a per cent or so.

Kernels an adapter: of forward and backward, those beyond the floor's, over the adapters. They are
counted from what PyTorch dispatches: views and memory that nothing is written to start no kernel,
each other operation one, addmm of a whole matrix, out of place, two, since it copies that matrix
first. Under autocast LayerNorm gives float32 on CUDA; on a CPU that is put in here. Gradients are
the first of a step: a recorded step adds them to zeros, a kernel more for most.

On CUDA, ms: of a step whose forward and backward are recorded, in interleaved rounds; its ratio to
the recorded floor is the median of those within a round. Busy: what all kernels of a step take, the
optimizer's included, and how many they are, from the profiler, not recorded. That comes last, since
it can leave launches slower. Writes results/diet-DEVICE.json.
"""

import argparse
import json
import math
from functools import partial

import step  # the benchmark beside this file
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

import aflora  # step has put its folder on Python's path

PRECISION = "bf16"
SIZES = {"base": (64, 128), "minilm": (64, 24)}  # rows, tokens: on CUDA
ON_A_CPU = (4, 16)  # they are counted alone
STATES = {"start": True, "frozen": False}  # do the FFN's A and B train?
AS_IT_WAS = "as it was"


# -------------------------------------------------------------------------------------- variants
class Parts(aflora.AFLoRALinear):
    """AFLoRALinear's forward before the diet, in parts for variants to replace. The base is a plain
    nn.Linear."""

    def forward(self, x):
        x = self.given(x)
        tokens = x.reshape(-1, x.shape[-1])  # 2-D: y is then no view, which in place costs copies
        return self.base_and_path(tokens).view(*x.shape[:-1], -1)

    def given(self, x):
        return x

    def base_and_path(self, tokens):
        y = self.base(tokens)
        h = self.project(tokens).to(y.dtype)
        return self.add(y, h, self.folded_B(y.dtype))

    def project(self, tokens):
        return F.linear(tokens, self.cast_A(tokens.dtype))

    def cast_A(self, dtype):
        return self.lora_A.to(dtype)

    def folded_B(self, dtype):
        return (self.s_d[:, None] * self.lora_B.T * self.s_b).contiguous().to(dtype)

    def add(self, y, h, folded_B):
        return torch.addmm(y, h, folded_B)


class CastOnce(Parts):
    """A LayerNorm's x is float32, and autocast casts it for the base and for A: here both read one
    cast, and one gradient is cast back."""

    def given(self, x):
        return x.to(self.base.weight.dtype)


class InPlace(Parts):
    """y is read and written once less: the product is added where y lies, instead of to a copy.
    Nobody else needs y: a linear layer's backward reads its input, not its output."""

    def add(self, y, h, folded_B):
        return y.addmm_(h, folded_B)


class Fold(torch.autograd.Function):
    """L_d B^T L_b, (r, out), in a type, and its gradients."""

    @staticmethod
    def forward(ctx, B, s_d, s_b, dtype):
        ctx.save_for_backward(B, s_d, s_b)
        folded_B = B.new_empty(B.T.shape, dtype=dtype)
        return torch.mul(s_d[:, None] * B.T, s_b, out=folded_B)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        B, s_d, s_b = ctx.saved_tensors
        dB = None
        if ctx.needs_input_grad[0]:
            dB = torch.mul(gradient.T * s_d, s_b[:, None], out=torch.empty_like(B))
        weighted = gradient * B.T
        return dB, weighted @ s_b, s_d @ weighted, None


class FoldByHand(Parts):
    """The fold's last product also casts and lays out what it writes, and both vectors' gradients
    share a product: 7 kernels in place of 12, or 5 in place of 10 where B is frozen."""

    def folded_B(self, dtype):
        return Fold.apply(self.lora_B, self.s_d, self.s_b, dtype)


class Path(torch.autograd.Function):
    """X W0^T + bias + X A^T folded_B, and its gradients: sums in place, of what is made here."""

    @staticmethod
    def forward(ctx, x, W0, bias, A, folded_B):
        h = F.linear(x, A)
        kept = x if ctx.needs_input_grad[3] else None  # wide: only A's gradient reads it
        ctx.save_for_backward(kept, W0, A, h, folded_B)
        return F.linear(x, W0, bias).addmm_(h, folded_B)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        x, W0, A, h, folded_B = ctx.saved_tensors
        dh = dY @ folded_B.T
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dY @ W0).addmm_(dh, A)
        dA = None
        if ctx.needs_input_grad[3]:
            dA = dh.T @ x
        return dx, None, None, dA, h.T @ dY


class PathByHand(CastOnce, FoldByHand):
    """The path's part of x's gradient is added in place to the base's: autograd would read both and
    write their sum anew. With x cast once, y in place and the fold by hand."""

    def base_and_path(self, tokens):
        A = self.cast_A(tokens.dtype)
        folded_B = self.folded_B(tokens.dtype)
        return Path.apply(tokens, self.base.weight, self.base.bias, A, folded_B)


class Padded(Parts):
    """Rows of r = 4 bf16 values are 8 bytes, tensor cores want 16: zeros fill A and B up to 8."""

    def cast_A(self, dtype):
        return torch.cat([self.lora_A, self.zeros_A]).to(dtype)

    def folded_B(self, dtype):
        folded_B = self.s_d[:, None] * self.lora_B.T * self.s_b
        return torch.cat([folded_B, self.zeros_B]).to(dtype)

    @staticmethod
    def prepare(model):
        for layer in aflora.adapters_of(model).values():
            missing = -len(layer.s_d) % 8
            for name, width in (("A", layer.base.in_features), ("B", layer.base.out_features)):
                zeros = layer.s_d.new_zeros(missing, width)
                layer.register_buffer(f"zeros_{name}", zeros, persistent=False)


class SharedA(Parts):
    """q, k and v read the same x: one product with their three A's reads it once, and x has one
    gradient of them. The first to be called computes, the others find their parts waiting."""

    group = ()  # of the other layers

    def project(self, tokens):
        if not self.group:
            return super().project(tokens)
        if not self.waiting:
            A = torch.cat([layer.lora_A for layer in self.group]).to(tokens.dtype)
            self.waiting.extend(F.linear(tokens, A).chunk(len(self.group), dim=1))
        return self.waiting.pop(0)

    @staticmethod
    def prepare(model):
        for block in model.classifier.encoder.layers:
            group = [block.query, block.key, block.value]
            waiting = []
            for layer in group:
                layer.group = group
                layer.waiting = waiting


class AllAtOnce(Parts):
    """Casts and folds are tiny kernels, a dozen a layer: here they are done, before the model's
    forward, for all layers that are alike together."""

    def cast_A(self, dtype):
        return self.ready[0]

    def folded_B(self, dtype):
        return self.ready[1]

    @staticmethod
    def prepare(model):
        layers = [*aflora.adapters_of(model).values()]
        model.register_forward_pre_hook(lambda *of_the_hook: make_ready(layers))


def make_ready(layers):
    """Gives each layer `ready`, its A and folded_B in the compute type.

    Alike are layers of one shape in which the same matrices train: no frozen one gets a gradient.
    """
    groups = {}
    for layer in layers:
        matrices = (layer.lora_A, layer.lora_B)
        alike = tuple((p.shape, p.requires_grad) for p in matrices)
        groups.setdefault(alike, []).append(layer)
    for group in groups.values():
        dtype = group[0].base.weight.dtype
        A = torch.stack([layer.lora_A for layer in group]).to(dtype)
        B = torch.stack([layer.lora_B.T for layer in group])
        s_d = torch.stack([layer.s_d for layer in group])
        s_b = torch.stack([layer.s_b for layer in group])
        folded_B = (s_d[:, :, None] * B * s_b[:, None]).to(dtype)
        for layer, *ready in zip(group, A.unbind(), folded_B.unbind()):
            layer.ready = ready


class ThreeInOne(CastOnce, InPlace, FoldByHand):
    """Three savings that add up, and need no state between layers and no product by hand."""


class Leanest(AllAtOnce, PathByHand):
    """The fewest kernels: no cast and no fold in a layer, and all its sums in place."""


VARIANTS = {
    AS_IT_WAS: Parts,
    "x cast once": CastOnce,
    "added in place": InPlace,
    "fold by hand": FoldByHand,
    "path by hand": PathByHand,
    "padded to 8": Padded,
    "q, k, v's A as one": SharedA,
    "all layers at once": AllAtOnce,
    "cast, in place, fold": ThreeInOne,
    "path and all at once": Leanest,
    "as it is now": aflora.AFLoRALinear,
}


def adapted(model, config, precision, layer):
    """step.ours() with such layers, in the form of step.ARMS."""
    model, freezer = step.ours(model, config, precision, layer=layer)
    model.classifier.encoder.embedding_norm.requires_grad_(True)
    for adapter in aflora.adapters_of(model).values():
        nn.init.normal_(adapter.s_b, std=0.1)
    if hasattr(layer, "prepare"):
        layer.prepare(model)
    return model, freezer


# ------------------------------------------------------------------------------------- measuring
class Kernels(TorchDispatchMode):
    """Counts what would start a kernel on CUDA, as it is said above."""

    free = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
            "_unsafe_view", "squeeze_", "is_same_size"}  # beside views

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        name = operation.overloadpacket.__name__
        if name == "addmm" and given[0].dim() == 2:
            self.count += 2
        elif name not in self.free and not operation.is_view:
            self.count += 1
        return operation(*given, **(named or {}))


def make_arms(shape, size):
    """{name: Arm} of the floor and all variants."""
    ways = {name: partial(adapted, layer=layer) for name, layer in VARIANTS.items()}
    batch = step.make_batch(*size)
    arms = {}
    for name, adapt in ({"floor": step.ARMS["floor"]} | ways).items():
        arms[name] = step.Arm(adapt, shape, PRECISION, batch)
        if not step.CUDA:
            for module in arms[name].model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.register_forward_pre_hook(lambda norm, given: given[0].float())
    return arms


def switch(arm, trains):
    """Makes the FFN's matrices train, or freezes them by hand; drops gradients and recording."""
    arm.training.recorder = None
    arm.model.zero_grad()
    if arm.freezer:
        for matrix in arm.freezer.matrices.values():
            matrix.requires_grad_(trains)
        arm.freezer.live = dict(arm.freezer.matrices) if trains else {}


def gradient(arm):
    """Of all that trains in the adapters, end to end."""
    layers = aflora.adapters_of(arm.model).values()
    parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def count(arms, trains):
    """{name: its kernels, and how far its gradients are from the layer's as it was}."""
    adapters = len(aflora.adapters_of(arms[AS_IT_WAS].model))
    found = {}
    for name, arm in arms.items():
        switch(arm, trains)
        with Kernels() as kernels:
            arm.training.forward_backward(arm.batch, 1)
        found[name] = {"counted": kernels.count}
        found[name]["an_adapter"] = (kernels.count - found["floor"]["counted"]) / adapters
    expected = gradient(arms[AS_IT_WAS])
    for name in VARIANTS:
        apart = gradient(arms[name]) - expected
        found[name]["apart"] = (apart.norm() / expected.norm()).item()
    return found


def add_recorded(arms, trains, found, rounds):
    """Adds the times of recorded steps."""
    for arm in arms.values():
        switch(arm, trains)
        arm.record()
    times = []  # of each round, {name: ms}
    for _ in range(rounds + 1):
        times.append({name: step.milliseconds(arm.step) for name, arm in arms.items()})
    step.add_times(found, times[1:])


def add_busy(arms, trains, found):
    """Adds what the profiler sees of a step."""
    for name, arm in arms.items():
        switch(arm, trains)
        arm.step()
        found[name]["kernels"], found[name]["busy_ms"] = step.busy(arm)
    for values in found.values():  # nan where the profiler saw nothing
        values["to_as_it_was"] = values["busy_ms"] / (found[AS_IT_WAS]["busy_ms"] or math.nan)


def measure(conditions, rounds):
    """Measures, prints and writes all (shape, size): each kind of measure in all of them."""
    arms = {}
    results = {}
    for shape, size in conditions:
        title = f"{shape} {size[0]}x{size[1]} {PRECISION}"
        arms[title] = make_arms(shape, size)
        results[title] = {state: count(arms[title], trains) for state, trains in STATES.items()}
        results[title] |= {"rounds": rounds if step.CUDA else 0, "machine": step.machine()}
    if step.CUDA:
        for title, result in results.items():
            for state, trains in STATES.items():
                add_recorded(arms[title], trains, result[state], rounds)
            step.write_results("diet", {title: result})
    for title, result in results.items():
        for state, trains in STATES.items():
            if step.CUDA:
                add_busy(arms[title], trains, result[state])
            show(f"{title}, {state}", result[state])
        step.write_results("diet", {title: result})


# ------------------------------------------------------------------------------------- reporting
def show(title, found):
    """Prints one state of one condition."""
    head = "     ms    quartiles      /floor   busy ms /as it was kernels" if step.CUDA else ""
    print(f"\n{title}\n{'':22}kernels an adapter   apart{head}")
    for name, arm in found.items():
        times = ""
        if step.CUDA:
            times = (f"{arm['ms']:9.2f} {arm['ms_low']:8.2f} {arm['ms_high']:7.2f} "
                     f"{arm['to_floor']:8.3f} {arm['busy_ms']:9.2f} {arm['to_as_it_was']:9.3f} "
                     f"{arm['kernels']:7}")
        print(f"{name:22}{arm['an_adapter']:18.2f}{arm.get('apart', 0):8.4f}{times}", flush=True)


def main():
    shapes = [*SIZES] if step.CUDA else ["minilm"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=step.SHAPES, default=shapes,
                        help="minilm, on CUDA both")
    parser.add_argument("--size", nargs="+", type=step.rows_and_tokens,
                        help="rows and tokens: 4x16, on CUDA 64x128 for base, 64x24 for minilm")
    parser.add_argument("--rounds", type=int, default=20, help="20; a CPU has none")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    print(json.dumps(step.machine()))
    conditions = []
    for shape in args.shape:
        usual = SIZES[shape] if step.CUDA else ON_A_CPU
        conditions += [(shape, size) for size in args.size or [usual]]
    with aflora.side_stream(step.DEVICE):
        measure(conditions, args.rounds)


if __name__ == "__main__":
    main()
