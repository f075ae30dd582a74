"""One training step of every way to adapt a BERT, interleaved in one process: time, FLOPs, memory.

    pip install transformers peft accelerate matplotlib
    python benchmarks/step.py                                    all conditions of this device
    python benchmarks/step.py --shape minilm --size 32x64 --precision bf16          one of them

All arms: six linear layers a block, the same random weights, padded batch and step (forward,
backward, score, clip, fused AdamW), no dropout; the logits of the first step must be equal.
floor: the companion's BERT without adapters, its head trained, its gradient running through all
layers and on to the embeddings' LayerNorm (a little further than adapters need it). aflora: the
FFN's matrices train (start), the higher-scored half of them, or none (frozen). naive: equation (1)
as it is written. PEFT on this BERT differs in the adapter only; transformers' BERT stays in float32
under autocast, as people run it.
Counted rounds follow five that are left out. Ratios are medians of those within a round: a
machine's speed drifts. FLOPs: of forward and backward, attention written out. Saved: what autograd
keeps for the backward pass, each storage once, parameters left out, and what of it the adapters'
forward keeps. Writes results/step-DEVICE.json; a condition measured anew replaces the old one.
"""

import argparse, contextlib, gc, json, os, re, statistics, sys, time, types, warnings
from functools import partial
from pathlib import Path

import accelerate, peft, torch, torch.nn as nn, torch.nn.functional as F, transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COMMON = dict(num_attention_heads=12, vocab_size=30522, max_position_embeddings=512,
              type_vocab_size=2, layer_norm_eps=1e-12, hidden_dropout_prob=0.0,
              attention_probs_dropout_prob=0.0)
SHAPES = dict(minilm=dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6) | COMMON,
              base=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12) | COMMON)
TARGETS = companion.ATTENTION + companion.FFN
FREEZE_AFTER = 2  # steps: s_b starts at 0, so A and B have gradients from the second on


# ------------------------------------------------------------------------------------------- arms
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
        for name, value in self.bert.state_dict().items():
            for old, new in companion.RENAMED.items():
                name = name.replace(old, new)
            value.copy_(ours.state_dict()[name])

    def forward(self, ids, segments, mask):
        return self.bert(ids, mask, segments).last_hidden_state


class Naive(aflora.AFLoRALinear):
    """Equation (1) as it is written: s_b * B(s_d * A x), on activations, in the compute type."""
    def forward(self, x):
        y = self.base(x)
        h = F.linear(x, self.lora_A) * self.s_d.to(y.dtype)
        return y + F.linear(h, self.lora_B) * self.s_b.to(y.dtype)


def ours(model, config, method="aflora", rank=4, share=0, targets=TARGETS, saved=("head",),
         layer=aflora.AFLoRALinear):
    """An adapter of aflora.py; AFLoRA freezes `share` of A and B, by score, in the warm-up."""
    trained = companion.FFN if method == "aflora" else "all"
    layers = aflora.add_adapters(model, targets, rank, method, trained, modules_to_save=saved)
    for module in layers.values():
        module.__class__ = layer
    if method != "aflora":
        return model, None
    with warnings.catch_warnings(action="ignore"):  # one look, of our own
        freezer = aflora.AdaptiveFreezer(layers, 1, 0, 1)
    freezer.looks = {FREEZE_AFTER: round(share * len(freezer.matrices))}
    return model, freezer


def by_peft(model, config, kind, attention=None, **given):
    """An adapter of PEFT on our BERT or, with a kind of attention, on transformers'."""
    targets = list(TARGETS)
    if attention:
        model.classifier.encoder = Theirs(model.classifier.encoder, config, attention)
        targets = ["query", "key", "value", "dense"]  # there is no pooler
    return peft.get_peft_model(model, kind(target_modules=targets, modules_to_save=["head"],
                                           **given)), None


PLAIN = partial(ours, targets=(), method="lora")  # nothing adapted
LORA, VERA = partial(by_peft, kind=peft.LoraConfig, r=8), partial(by_peft, kind=peft.VeraConfig)
ARMS = {
    "floor": partial(PLAIN, saved=("head", "embedding_norm")),
    "aflora start": ours, "aflora half": partial(ours, share=0.5),
    "aflora frozen": partial(ours, share=1), "naive start": partial(ours, layer=Naive),
    "naive frozen": partial(ours, share=1, layer=Naive),
    "lora r=8": partial(ours, method="lora", rank=8),
    "elora r=1024": partial(ours, method="elora", rank=1024),
    "full": partial(PLAIN, saved=("classifier",)), "peft lora r=8": LORA,
    "peft vera r=4": partial(VERA, r=4), "peft vera r=1024": partial(VERA, r=1024),
    "peft adalora": partial(by_peft, kind=peft.AdaLoraConfig, total_step=1000, deltaT=10),
    "transformers eager, peft lora": partial(LORA, attention="eager"),
    "transformers sdpa, peft lora": partial(LORA, attention="sdpa")}


class Arm:
    """A model that `adapt`, of ARMS, has adapted, with its optimizer: step() trains one step."""
    def __init__(self, adapt, shape, precision, batch):
        torch.manual_seed(0)
        config, device, dtype = SHAPES[shape], batch[0].device, aflora.COMPUTE_TYPES[precision]
        model = Task(companion.BertClassifier(companion.Bert(config)))
        self.model, self.freezer = adapt(model, config)
        self.model.to(device).train()
        self.autocast = torch.autocast(device.type, dtype, enabled=precision != "fp32")
        self.frozen_weights = contextlib.ExitStack()  # closed with the arm
        if not any(isinstance(module, Theirs) for module in self.model.modules()):
            self.frozen_weights.enter_context(aflora.frozen_weights_in(self.model, dtype))
        self.call = getattr(self.model, "base_model", self.model)  # PEFT's AdaLoRA: with its loss
        self.allocate = getattr(self.model, "update_and_allocate", None)  # AdaLoRA's ranks
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        self.batch, self.steps = batch, 0

    def step(self):
        """What aflora.train does in one step; returns the logits."""
        with self.autocast:
            output = self.call(*self.batch)
        output.loss.backward()
        self.steps += 1
        live = [p for p in self.trained if p.grad is not None]
        norm = get_total_norm([p.grad for p in live])
        if self.freezer:
            self.freezer.update(~norm.isfinite())
        clip_grads_with_norm_(live, 1.0, norm)
        self.optimizer.step()
        if self.freezer:
            self.freezer.freeze(self.steps, self.optimizer)
        if self.allocate:
            self.allocate(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        return output.logits.detach()


# ------------------------------------------------------------------------------------- measuring
def make_batch(size, length, device=DEVICE):
    """ids, segments, mask, labels: texts of half the length to all of it, so the mask matters."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (size, length), generator=random)
    lengths = torch.randint(length // 2, length + 1, (size, 1), generator=random)
    lengths[0] = length
    mask = torch.arange(length) < lengths
    return [t.to(device) for t in (ids, torch.zeros_like(ids), mask, torch.arange(size) % 2)]


def milliseconds(call, *given):
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    began = time.perf_counter()
    call(*given)
    wait()
    return 1000 * (time.perf_counter() - began)


def saved_bytes(arm):
    """(all, of adapters) that a step keeps for backward; autocast's copies of weights count."""
    address = lambda tensor: tensor.untyped_storage().data_ptr()  # noqa: E731
    own = {address(t) for t in (*arm.model.parameters(), *arm.model.buffers())}
    sizes, by_adapters, inside, hooks = {}, set(), [False], []

    def pack(tensor):
        if address(tensor) not in own:
            sizes[address(tensor)] = tensor.untyped_storage().nbytes()
            by_adapters.update([address(tensor)] if inside[-1] else [])
        return tensor

    adapters = [module for module in arm.model.modules()
                if isinstance(module, (aflora.AFLoRALinear, BaseTunerLayer))]
    bases = [module.base_layer for module in adapters if hasattr(module, "base_layer")]
    for module in adapters + bases:
        here = module in adapters  # what the frozen base layer keeps is not the adapter's
        hooks += [module.register_forward_pre_hook(lambda *given, here=here: inside.append(here)),
                  module.register_forward_hook(lambda *given: inside.__delitem__(-1))]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arm.step()
    for hook in hooks:
        hook.remove()
    return sum(sizes.values()), sum(sizes[place] for place in by_adapters)


def flops(arm):
    """(all, without attention's and the pooling's) of forward and backward of one step."""
    aten, product = torch.ops.aten, lambda y, a, b, **more: 2 * a[0] * a[1] * b[1]
    counter = FlopCounterMode(display=False, custom_mapping={aten.addmm_: product})  # not known
    with sdpa_kernel(SDPBackend.MATH), counter:
        arm.step()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.values()), sum(n for kind, n in counts.items() if kind != aten.bmm)


def warm_up(arm, allocated=0):
    """Four steps: AFLoRA's freezing first, then what is counted. Returns logits and counts."""
    logits = [arm.step() for _ in range(FREEZE_AFTER)][0]
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    saved, by_adapters = saved_bytes(arm)
    peak = torch.cuda.max_memory_allocated() - allocated if CUDA else None
    state = [t for s in arm.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return logits, dict(saved_bytes=saved, saved_by_adapters=by_adapters, peak_bytes=peak,
                        optimizer_bytes=sum(t.nbytes for t in state),
                        **dict(zip(("flops", "linear_flops"), flops(arm))))


def freezer_share(arm, step_ms, looks=8):
    """The freezer's ms in a step: update() and, each 10 steps, a look that freezes one matrix."""
    freezer, times = arm.freezer, dict(update=[], freeze=[])
    freezer.looks = {arm.steps + i: len(freezer.frozen_at) + i for i in range(1, looks + 1)}
    for name, spent in times.items():
        setattr(freezer, name, lambda *given, call=getattr(freezer, name), spent=spent:
                spent.append(milliseconds(call, *given)))
    for _ in range(looks):
        arm.step()
    update, look = (statistics.median(spent) for spent in times.values())
    return dict(update_ms=update, look_ms=look, share_of_step=(update + look / 10) / step_ms)


def compare(ways, shape, batch, precision, rounds):
    """({name: Arm}, {name: what was measured}) of ways to adapt, {name: adapt}, the floor first."""
    arms, found, expected = {}, {}, None
    torch.mm(*torch.ones(2, 8, 8, device=DEVICE))  # cuBLAS takes its memory: not the first arm's
    for name, adapt in ways.items():
        allocated = torch.cuda.memory_allocated() if CUDA else 0
        arms[name] = Arm(adapt, shape, precision, batch)
        logits, found[name] = warm_up(arms[name], allocated)
        expected = logits if expected is None else expected
        if not torch.allclose(logits, expected, atol=1e-4 if precision == "fp32" else 0.05):
            raise SystemExit(f"{name}: its first logits differ from the floor's")
    times = [{name: milliseconds(arm.step) for name, arm in arms.items()}
             for _ in range(rounds + 1)][1:]  # by round, the first one left out
    for name, values in found.items():
        low, median, high = statistics.quantiles((one[name] for one in times), n=4)
        values |= dict(ms=median, ms_low=low, ms_high=high) | {
            f"to_{other}": statistics.median(one[name] / one[other] for one in times)
            for other in ("floor", "aflora start") if other in ways}
    return arms, found


def measure(shape, size, length, precision, rounds):
    """All ARMS in one condition, as a dict for the file."""
    arms, found = compare(ARMS, shape, make_batch(size, length), precision, rounds)
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")  # raises if the host waits inside a step
        arms["aflora start"].step()
        torch.cuda.set_sync_debug_mode("default")
    freezer = freezer_share(arms["aflora start"], found["aflora start"]["ms"])
    saved = [found[f"{name} frozen"]["saved_by_adapters"] for name in ("aflora", "naive")]
    return dict(rounds=rounds, machine=machine(), arms=found, freezer=freezer,
                saved_to_naive=saved[0] / saved[1], no_wait=CUDA or None)


# -------------------------------------------------------------------------------------- reporting
def machine():
    """Hardware and versions, as every file of results states them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)}
    return dict(device=torch.cuda.get_device_name() if CUDA else "cpu", cores=os.cpu_count(),
                processor=name and name[1], bf16=sorted(set(re.findall(r"\w+_bf16", text))),
                threads=torch.get_num_threads(), versions=companion.VERSIONS | versions)


def write_results(name, new):
    """Puts `new`, {key: dict}, into results/NAME-DEVICE.json beside the other keys there."""
    path = ROOT / "results" / f"{name}-{DEVICE.type}.json"
    new = (json.loads(path.read_text()) if path.exists() else {}) | new
    short = json.loads(json.dumps(new), parse_float=lambda number: float(f"{float(number):.5g}"))
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in short.items())
    path.parent.mkdir(exist_ok=True)
    aflora.write_file(path, ("{" + ",\n ".join(lines) + "}\n").encode())


def show(title, result):
    print(f"\n{title}, {result['rounds']} rounds; memory in MiB\n{'':29}     ms    quartiles     "
          "/floor /start  GFLOP   saved adapters AdamW  peak")
    for name, a in result["arms"].items():
        saved, adapters, state, peak = ((a[key] or 0) / 2**20 for key in (
            "saved_bytes", "saved_by_adapters", "optimizer_bytes", "peak_bytes"))
        print(f"{name:29}{a['ms']:8.1f} {a['ms_low']:7.1f} {a['ms_high']:7.1f} {a['to_floor']:6.2f}"
              f" {a['to_aflora start']:6.2f} {a['flops'] / 1e9:7.1f} {saved:6.1f} {adapters:7.2f} "
              f"{state:6.2f} " + (f"{peak:6.0f}" if CUDA else "   -"))
    freezer = result["freezer"]
    print(f"freezer: update {freezer['update_ms']:.3f} ms a step, look {freezer['look_ms']:.3f} ms "
          f"each 10 steps, {100 * freezer['share_of_step']:.2f} % of a step at the start\n"
          f"saved by adapters, aflora frozen / naive frozen: {result['saved_to_naive']:.4f}"
          + "\nno wait for the device inside a step" * CUDA, flush=True)


def rows_and_tokens(text):
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text) or int(text.split("x")[1]) > 512:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 32x64: rows, tokens (up to 512)")
    return tuple(map(int, text.split("x")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    several, both = partial(parser.add_argument, nargs="+"), ("fp32", "bf16")
    several("--shape", choices=SHAPES, default=list(SHAPES)[:1 + CUDA], help="on CUDA both")
    several("--size", type=rows_and_tokens, default=((32, 16), (32, 64), (64, 128))[:2 + CUDA],
            help="rows and tokens: 32x16 32x64, on CUDA 64x128, too")
    several("--precision", choices=both, default=both, help="both")
    parser.add_argument("--rounds", type=int, default=50 if CUDA else 8, help="8, on CUDA 50")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    print(json.dumps(machine()))
    for shape in args.shape:
        for rows, length in args.size:
            for precision in args.precision:
                result = measure(shape, rows, length, precision, args.rounds)
                show(title := f"{shape} {rows}x{length} {precision}", result)
                write_results("step", {title: result})
                gc.collect()  # the arms, before the next ones are made
    # The paper's ratio, linear layers of BERT-base: all are proportional to the tokens
    counts = {name: flops(Arm(ARMS[name], "base", "fp32", make_batch(4, 16, "cpu")))[1]
              for name in ("aflora start", "elora r=1024")}
    counts["ratio"] = counts["elora r=1024"] / counts["aflora start"]
    write_results("step", {"linear layers, base": counts})
    print(f"\nFLOPs of BERT-base's linear layers, elora r=1024 / aflora: {counts['ratio']:.3f}")


if __name__ == "__main__":
    main()
