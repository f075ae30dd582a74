"""One training step of every way to adapt a BERT, interleaved in one process: time, FLOPs, memory.

    pip install transformers peft accelerate matplotlib
    python benchmarks/step.py                                    all conditions of this device
    python benchmarks/step.py --shape minilm --size 32x64 --precision bf16          one of them

All arms: six linear layers a block, the same random weights and padded batch, no dropout, and one
step, Training.step of aflora.py: forward, backward, score, clip, fused AdamW. The logits of the
first step must be equal.
floor: the companion's BERT without adapters, its head trained, its gradient running through all
layers and on to the embeddings' LayerNorm (a little further than adapters need it). aflora: the
FFN's matrices train (start), the higher-scored half of them, or none (frozen). naive: equation (1)
as it is written. PEFT on this BERT differs in the adapter only; transformers' BERT stays in float32
under autocast, as people run it.
Counted rounds follow five that are left out. Ratios are medians of those within a round: a
machine's speed drifts. FLOPs: of forward and backward, attention written out. Saved: what autograd
keeps for the backward pass, each storage once, parameters left out, and what of it the adapters'
forward keeps. On CUDA some arms run once more with forward and backward recorded as a CUDA graph;
their ratios are to recorded arms. Busy: what all kernels of a step take, from the profiler. It can
leave launches slower: it comes last, and a condition of its own process is measured best.
Writes results/step-DEVICE.json, the times as soon as they are there; a condition measured anew
replaces the old one.
"""

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path

import accelerate
import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402
from data.weights import RENAMED  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COMMON = {"num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512,
          "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0,
          "attention_probs_dropout_prob": 0.0}
SHAPES = {
    "minilm": COMMON | {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    "base": COMMON | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
}
TARGETS = companion.ATTENTION + companion.FFN
TOTAL_STEPS = 1_000_000  # more than are measured: the learning rate stays where it is
FREEZE_AFTER = 2  # steps: s_b starts at 0, so A and B have gradients from the second on


# ---------------------------------------------------------------------------------------- models
class Task(nn.Module):
    """A classifier with its loss, in the form to which PEFT's AdaLoRA adds its regulariser."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, ids, segments, mask, labels):
        logits = self.classifier(ids, segments, mask).float()
        return types.SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


class Theirs(nn.Module):
    """transformers' BERT with the weights of ours, called like ours."""

    def __init__(self, ours, config, attention):
        super().__init__()
        config = transformers.BertConfig(**config, attn_implementation=attention)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        weights = ours.state_dict()
        for name, value in self.bert.state_dict().items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            value.copy_(weights[name])

    def forward(self, ids, segments, mask):
        return self.bert(ids, mask, segments).last_hidden_state


class Naive(aflora.AFLoRALinear):
    """Equation (1) as it is written: s_b * B(s_d * A x), on activations, in the compute type."""

    def forward(self, x):
        y = self.base(x)
        h = F.linear(x, self.lora_A) * self.s_d.to(y.dtype)
        return y + F.linear(h, self.lora_B) * self.s_b.to(y.dtype)


class FreezesByCount(aflora.AdaptiveFreezer):
    """Follows no schedule: `wanted` matrices are frozen, by score, from step FREEZE_AFTER on."""

    wanted = 0

    def due(self):
        if self.step < FREEZE_AFTER:
            return 0
        return self.wanted - len(self.frozen_at)


# ------------------------------------------------------------------------------------------ arms
# Each function adapts a Task of the companion's classifier: it returns the model and the freezer.
def plain(model, config, precision, saved):
    """Nothing is adapted, the modules in `saved` train."""
    if "classifier" not in saved:
        companion.hold_frozen_weights(model.classifier.encoder, precision)
    aflora.add_adapters(model, (), modules_to_save=saved)
    return model, None


def ours(model, config, precision, share=0, rank=4, targets=TARGETS, layer=aflora.AFLoRALinear,
         freezes=FreezesByCount):
    """AFLoRA, of which `share` of A and B is frozen in the warm-up."""
    companion.hold_frozen_weights(model.classifier.encoder, precision)
    layers = aflora.add_adapters(model, targets, rank, companion.FFN, modules_to_save=["head"])
    for module in layers.values():
        module.__class__ = layer
    freezer = freezes(layers, TOTAL_STEPS, t_i=0, t_f=0)
    freezer.wanted = round(share * len(freezer.matrices))
    return model, freezer


def compared(model, config, precision, turn, rank):
    """The companion's LoRA or ELoRA, into which `turn` makes AFLoRA's layers."""
    companion.hold_frozen_weights(model.classifier.encoder, precision)
    turn(aflora.add_adapters(model, TARGETS, rank, modules_to_save=["head"]))
    return model, None


def by_peft(model, config, precision, kind, attention=None, **given):
    """An adapter of PEFT on our BERT or, with a kind of attention, on transformers'."""
    if attention:
        model.classifier.encoder = Theirs(model.classifier.encoder, config, attention)
        targets = ["query", "key", "value", "dense"]  # there is no pooler
    else:
        companion.hold_frozen_weights(model.classifier.encoder, precision)
        targets = list(TARGETS)
    config = kind(target_modules=targets, modules_to_save=["head"], **given)
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "ranknum" in name:  # AdaLoRA's count of ranks: trains in PEFT if the base is bf16
            p.requires_grad_(False)
    return adapted, None


PEFT_LORA = partial(by_peft, kind=peft.LoraConfig, r=8)
PEFT_VERA = partial(by_peft, kind=peft.VeraConfig)
ARMS = {
    "floor": partial(plain, saved=["head", "embedding_norm"]),
    "aflora start": ours,
    "aflora half": partial(ours, share=0.5),
    "aflora frozen": partial(ours, share=1),
    "naive start": partial(ours, layer=Naive),
    "naive frozen": partial(ours, share=1, layer=Naive),
    "lora r=8": partial(compared, turn=companion.as_lora, rank=8),
    "elora r=1024": partial(compared, turn=companion.as_elora, rank=1024),
    "full": partial(plain, saved=["classifier"]),
    "peft lora r=8": PEFT_LORA,
    "peft vera r=4": partial(PEFT_VERA, r=4),
    "peft vera r=1024": partial(PEFT_VERA, r=1024),
    "peft adalora": partial(by_peft, kind=peft.AdaLoraConfig, total_step=1000, deltaT=10),
    "transformers eager, peft lora": partial(PEFT_LORA, attention="eager"),
    "transformers sdpa, peft lora": partial(PEFT_LORA, attention="sdpa"),
}
RECORDED = ", recorded"  # what the names of such arms end in
if CUDA:
    ARMS |= {name + RECORDED: ARMS[name] for name in (
        "floor", "aflora start", "aflora frozen", "lora r=8", "full", "peft lora r=8")}


class Arm:
    """A model that `adapt`, of ARMS, has adapted, and its training: step() trains one step."""

    def __init__(self, adapt, shape, precision, batch):
        torch.manual_seed(0)
        config = SHAPES[shape]
        with batch[0].device:  # drawing BERT-base's weights takes seconds on a CPU
            task = Task(companion.BertClassifier(companion.Bert(config)))
        self.model, self.freezer = adapt(task, config, precision)
        self.model.to(batch[0].device).train()
        self.call = getattr(self.model, "base_model", self.model)  # PEFT's AdaLoRA: with its loss
        self.batch = batch
        self.logits = None  # of the last step
        self.training = aflora.Training(
            self.model, self.loss, total_steps=TOTAL_STEPS, lr=1e-5, freezer=self.freezer,
            precision=precision, warmup=0.0)
        if hasattr(self.model, "update_and_allocate"):
            # AdaLoRA's ranks are allotted by gradients: before the step drops them
            self.training.optimizer.register_step_post_hook(self.allocate)

    def loss(self, model, batch):
        output = self.call(*batch)
        self.logits = output.logits.detach()
        return output.loss

    def allocate(self, *of_the_hook):
        self.model.update_and_allocate(self.training.steps + 1)

    def step(self):
        self.training.step([self.batch])

    def record(self):
        """From now on forward and backward are one CUDA graph: the third step records it."""
        self.training.recorder = aflora.GraphRecorder(self.training.parameters)
        for _ in range(3):
            self.step()


# ------------------------------------------------------------------------------------- measuring
def make_batch(size, length, device=DEVICE):
    """ids, segments, mask, labels: texts of half the length to all of it, so the mask matters."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (size, length), generator=random)
    lengths = torch.randint(length // 2, length + 1, (size, 1), generator=random)
    lengths[0] = length
    mask = torch.arange(length) < lengths
    labels = torch.arange(size) % 2
    return [tensor.to(device) for tensor in (ids, torch.zeros_like(ids), mask, labels)]


def wait():
    """Until the device has done all that was asked of it."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(call, *given):
    """How long a call takes, its work on the device included."""
    wait()
    began = time.perf_counter()
    call(*given)
    wait()
    return 1000 * (time.perf_counter() - began)


def address(tensor):
    """Where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


def saved_bytes(arm):
    """(all, of adapters) that a step keeps for backward; autocast's copies of weights count."""
    own = {address(t) for t in (*arm.model.parameters(), *arm.model.buffers())}
    sizes = {}  # address: bytes
    by_adapters = set()  # addresses
    inside = [False]  # a stack: is the innermost forward that runs an adapter's own?

    def pack(tensor):
        if address(tensor) not in own:
            sizes[address(tensor)] = tensor.untyped_storage().nbytes()
            if inside[-1]:
                by_adapters.add(address(tensor))
        return tensor

    def leave(module, given, result):
        inside.pop()

    def hook(module, is_adapter):
        yield module.register_forward_pre_hook(lambda *given: inside.append(is_adapter))
        yield module.register_forward_hook(leave)

    hooks = []
    for module in list(arm.model.modules()):
        if isinstance(module, (aflora.AFLoRALinear, BaseTunerLayer)):
            hooks += hook(module, True)
        if isinstance(module, BaseTunerLayer):  # what its frozen base keeps is not the adapter's
            hooks += hook(module.base_layer, False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arm.step()
    for handle in hooks:
        handle.remove()
    return sum(sizes.values()), sum(sizes[place] for place in by_adapters)


def flops(arm):
    """(all, without attention's and the pooling's) of forward and backward of one step."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        arm.step()
    counts = counter.get_flop_counts()["Global"]
    batched = counts.get(torch.ops.aten.bmm, 0)
    return sum(counts.values()), sum(counts.values()) - batched


def busy(arm):
    """(kernels and copies of one step, their ms in sum), from the profiler. On CUDA alone; 0 where
    the profiler saw nothing, which happens in a process that has profiled before."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        arm.step()
        wait()
    kernels = [event for event in profiler.events()
               if event.device_type == torch.autograd.DeviceType.CUDA
               and not event.is_user_annotation]  # the optimizer names its own spans
    return len(kernels), sum(event.device_time for event in kernels) / 1000


def optimizer_bytes(arm):
    """Of the optimizer's state."""
    states = arm.training.optimizer.state.values()
    return sum(t.nbytes for state in states for t in state.values() if torch.is_tensor(t))


def warm_up(arm, allocated=0):
    """Four steps: AFLoRA's freezing first, then what is counted. Returns logits and counts."""
    arm.step()
    logits = arm.logits
    for _ in range(1, FREEZE_AFTER):
        arm.step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    saved, by_adapters = saved_bytes(arm)
    peak = torch.cuda.max_memory_allocated() - allocated if CUDA else None
    all_flops, linear_flops = flops(arm)
    return logits, {"saved_bytes": saved, "saved_by_adapters": by_adapters, "peak_bytes": peak,
                    "optimizer_bytes": optimizer_bytes(arm), "flops": all_flops,
                    "linear_flops": linear_flops}


def freezer_share(arm, step_ms, looks=8):
    """The freezer's ms in a step: update() and, each 10 steps, a look that freezes one matrix."""
    freezer = arm.freezer
    times = {"update": [], "freeze": []}

    def timed(call, spent):
        return lambda *given: spent.append(milliseconds(call, *given))

    for name, spent in times.items():
        setattr(freezer, name, timed(getattr(freezer, name), spent))
    for _ in range(min(looks, len(freezer.live))):
        freezer.wanted += 1
        arm.step()
    update = statistics.median(times["update"])
    look = statistics.median(times["freeze"])
    return {"update_ms": update, "look_ms": look, "share_of_step": (update + look / 10) / step_ms}


def compare(ways, shape, batch, precision, rounds):
    """({name: Arm}, {name: what was measured}) of ways to adapt, {name: adapt}, the floor first."""
    arms = {}
    found = {}
    expected = None  # the floor's logits
    x = torch.ones(8, 8, device=DEVICE, requires_grad=True)
    x.mm(x).sum().backward()  # cuBLAS takes memory in each thread: not the first arm's
    for name, adapt in ways.items():
        allocated = torch.cuda.memory_allocated() if CUDA else 0
        arms[name] = Arm(adapt, shape, precision, batch)
        logits, found[name] = warm_up(arms[name], allocated)
        if name.endswith(RECORDED):
            torch.cuda.reset_peak_memory_stats()
            arms[name].record()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - allocated
        if expected is None:
            expected = logits
        if not torch.allclose(logits, expected, atol=1e-4 if precision == "fp32" else 0.05):
            raise SystemExit(f"{name}: its first logits differ from the floor's")
    times = []  # of each round, {name: ms}
    for _ in range(rounds + 1):
        times.append({name: milliseconds(arm.step) for name, arm in arms.items()})
    add_times(found, times[1:])
    return arms, found


def add_times(found, times):
    """Adds to what was found: quartiles of the times, and ratios within the rounds."""
    for name, values in found.items():
        low, median, high = statistics.quantiles([one[name] for one in times], n=4)
        values.update(ms=median, ms_low=low, ms_high=high)
        for other in ("floor", "aflora start"):
            if other in found:  # what is recorded is compared with what is recorded
                twin = other + RECORDED if name.endswith(RECORDED) else other
                values[f"to_{other}"] = statistics.median(one[name] / one[twin] for one in times)


def measure(title, shape, size, length, precision, rounds):
    """All ARMS in one condition, as a dict for the file, which gets the times at once."""
    batch = make_batch(size, length)
    with aflora.side_stream(DEVICE):
        arms, found = compare(ARMS, shape, batch, precision, rounds)
        result = {"rounds": rounds, "machine": machine(), "arms": found}
        write_results("step", {title: result})
        if CUDA:
            torch.cuda.set_sync_debug_mode("error")  # raises if the host waits inside a step
            arms["aflora start"].step()
            arms["aflora start" + RECORDED].step()
            torch.cuda.set_sync_debug_mode("default")
        fresh = Arm(ARMS["aflora start"], shape, precision, batch)
        for _ in range(FREEZE_AFTER):
            fresh.step()
        freezer = freezer_share(fresh, found["aflora start"]["ms"])
        if CUDA:
            for name, arm in arms.items():
                found[name]["kernels"], found[name]["busy_ms"] = busy(arm)
    ratio = found["aflora frozen"]["saved_by_adapters"] / found["naive frozen"]["saved_by_adapters"]
    return result | {"freezer": freezer, "saved_to_naive": ratio, "no_wait": CUDA or None}


def linear_flops():
    """The paper's ratio, linear layers of BERT-base: all are proportional to the tokens."""
    counts = {}
    for name in ("aflora start", "elora r=1024"):
        arm = Arm(ARMS[name], "base", "fp32", make_batch(4, 16))
        _, counts[name] = flops(arm)
    counts["ratio"] = counts["elora r=1024"] / counts["aflora start"]
    return counts


# ------------------------------------------------------------------------------------- reporting
def machine():
    """Hardware and versions, as every file of results states them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    modules = (torch, transformers, peft, accelerate)
    return {"device": torch.cuda.get_device_name() if CUDA else "cpu", "cores": os.cpu_count(),
            "processor": name and name[1], "bf16": sorted(set(re.findall(r"\w+_bf16", text))),
            "threads": torch.get_num_threads(),
            "versions": companion.VERSIONS | {m.__name__: m.__version__ for m in modules}}


def write_results(name, new):
    """Puts `new`, {key: dict}, into results/NAME-DEVICE.json beside the other keys there."""
    path = ROOT / "results" / f"{name}-{DEVICE.type}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps(old | new)
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.5g}"))
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rounded.items()]
    aflora.write_file(path, ("{" + ",\n ".join(lines) + "}\n").encode())


def show(title, result):
    """Prints what was measured in one condition."""
    print(f"\n{title}, {result['rounds']} rounds; memory in MiB\n{'':29}     ms    quartiles     "
          "/floor /start  GFLOP   saved adapters AdamW  peak    busy ms, kernels")
    for name, arm in result["arms"].items():
        saved = arm["saved_bytes"] / 2**20
        adapters = arm["saved_by_adapters"] / 2**20
        state = arm["optimizer_bytes"] / 2**20
        peak = "   -"
        if CUDA:
            peak = f"{arm['peak_bytes'] / 2**20:6.0f} {arm['busy_ms']:8.2f} {arm['kernels']:6}"
        print(f"{name:29}{arm['ms']:8.1f} {arm['ms_low']:7.1f} {arm['ms_high']:7.1f} "
              f"{arm['to_floor']:6.2f} {arm['to_aflora start']:6.2f} {arm['flops'] / 1e9:7.1f} "
              f"{saved:6.1f} {adapters:7.2f} {state:6.2f} {peak}")
    freezer = result["freezer"]
    print(f"freezer: update {freezer['update_ms']:.3f} ms a step, look {freezer['look_ms']:.3f} ms "
          f"each 10 steps, {100 * freezer['share_of_step']:.2f} % of a step at the start\n"
          f"saved by adapters, aflora frozen / naive frozen: {result['saved_to_naive']:.4f}")
    if CUDA:
        print("no wait for the device inside a step")
    sys.stdout.flush()


def rows_and_tokens(text):
    """A --size, such as 32x64, as two numbers."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text) or int(text.split("x")[1]) > 512:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 32x64: rows, tokens (up to 512)")
    return tuple(int(number) for number in text.split("x"))


def parse():
    """The command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shapes = ["minilm", "base"] if CUDA else ["minilm"]
    sizes = [(64, 24), (64, 128)] if CUDA else [(32, 16), (32, 64)]
    both = ("fp32", "bf16")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=shapes, help="on CUDA both")
    parser.add_argument("--size", nargs="+", type=rows_and_tokens, default=sizes,
                        help="rows and tokens: 32x16 32x64, on CUDA 64x24 64x128")
    parser.add_argument("--precision", nargs="+", choices=both, default=both, help="both")
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 8, help="8, on CUDA 20")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    return args


def main():
    args = parse()
    print(json.dumps(machine()))
    for shape in args.shape:
        for rows, length in args.size:
            for precision in args.precision:
                title = f"{shape} {rows}x{length} {precision}"
                result = measure(title, shape, rows, length, precision, args.rounds)
                show(title, result)
                write_results("step", {title: result})
                gc.collect()  # the arms, before the next ones are made
    counts = linear_flops()
    write_results("step", {"linear layers, base": counts})
    print(f"\nFLOPs of BERT-base's linear layers, elora r=1024 / aflora: {counts['ratio']:.3f}")


if __name__ == "__main__":
    main()
