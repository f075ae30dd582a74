"""AFLoRA in one file: adaptive freezing of low rank adaptation, and the loop that trains with it.

LoRA keeps a pre-trained weight W0 still and learns a low-rank path beside it. AFLoRA puts a vector
behind each of the path's two matrices, trains everything at first, then freezes the matrices for
good, the least important first, until only the vectors train:

    (1)  Y = W0 X + L_b B L_d A X         from x (tokens, in) to y (tokens, out)
    W0   (out, in)                        frozen from the start
    A, B (r, in), (out, r)                trained until among the lowest-scored, then frozen
    L_d  diag(s_d), s_d (r)               trained to the end, starts at 0.1
    L_b  diag(s_b), s_b (out)             trained to the end, starts at 0

`python aflora.py` shows the equations at work. On your own model:

    adapters = add_adapters(model, targets=["query", "value"], modules_to_save=["classifier"])
    freezer = AdaptiveFreezer(adapters, total_steps=1000, t_i=50, t_f=700)
    train(model, batches, loss, epochs=10, lr=4e-3, freezer=freezer, precision="bf16")
    save_adapter(model, "adapter.pt")

Papers: AFLoRA, Liu et al. (arXiv 2403.13269); LoRA, Hu et al. (2106.09685); ELoRA, published as
VeRA, Kopiczko et al. (2310.11454); PLATON, whose score this is, Zhang et al. (2206.12562).
"""

import contextlib, functools, hashlib, itertools, math, operator, os, pathlib, re, time, types
import warnings, zipfile, zlib

import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

KEYS = ("lora_A", "lora_B", "s_d", "s_b")
FOLD_UP_TO_RANK = 64  # above, with B frozen, scaling activations is cheaper than folding: ELoRA
ADAPTER_FORMAT, CHECKPOINT_FORMAT = "aflora adapter 1", "aflora checkpoint 1"
COMPUTE_TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
LOG_EVERY = 10  # steps between two transfers of the loss from the device


class AFLoRAError(ValueError):
    """Something the user can mend: an argument, a file, an order of calls. The message says how."""


# ---------------------------------------------------------------------------------- the layer, (1)
def kaiming_uniform(key, shape, a=0.0):
    """A float32 tensor (fan_out, *fan_in), Kaiming-uniform, that the string `key` regrows for ever:
    numpy's RandomState has a stream frozen by policy (NEP 19). So files can hold a seed instead."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    bound = math.sqrt(6 / ((1 + a * a) * math.prod(shape[1:])))
    return torch.from_numpy(np.random.RandomState(seed).uniform(-bound, bound, shape)).float()


class AFLoRALinear(nn.Module):
    """A linear module with the path of equation (1) beside it: x (..., in) -> y (..., out).
    base has in_features and out_features, may be quantised. Parameters, float32 or more: lora_A
    (rank, in), lora_B (out, rank), s_d (rank,), s_b (out,), started by seed and name. Method aflora
    trains all, lora A and B, scaled by alpha / rank, elora the vectors; else raises AFLoRAError."""
    weight = property(lambda self: self.base.weight)  # some models ask its dtype

    def __init__(self, base, rank=4, method="aflora", alpha=16, seed=0, name=""):
        super().__init__()
        if method not in ("aflora", "lora", "elora") or not isinstance(rank, int) or rank < 1:
            raise AFLoRAError(f"method {method!r}, rank {rank!r}: aflora, lora or elora, rank >= 1")
        self.base, self.rank, self.method, self.alpha = base, rank, method, alpha
        self.shape = (base.out_features, base.in_features)
        self.seed_key = f"{seed}/{self.shape if method == 'elora' else name}"  # one pair a shape
        self.merged, self.kept_weight = False, None  # the base's own weight, while merged
        like = next(base.parameters(), torch.empty(0))
        for key in KEYS:
            start = self.start(key).to(like.device, torch.promote_types(like.dtype, torch.float32))
            trains = method == "aflora" or (method == "lora") == key.startswith("lora")
            setattr(self, key, nn.Parameter(start, requires_grad=trains))
        self.train(base.training)

    def start(self, key):
        """The float32 value from which the parameter `key` starts, grown anew on the CPU."""
        r, (n_out, n_in), lora = self.rank, self.shape, self.method == "lora"
        shape = dict(lora_A=(r, n_in), lora_B=(n_out, r), s_d=(r,), s_b=(n_out,))[key]
        fixed = dict(lora_B=0.0, s_d=self.alpha / r, s_b=1.0) if lora else dict(s_d=0.1, s_b=0.0)
        if key in fixed:
            return torch.full(shape, fixed[key])
        return kaiming_uniform(f"{self.seed_key}/{key}", shape, math.sqrt(5) if lora else 0.0)

    def forward(self, x):
        tokens = x.reshape(-1, self.shape[1])  # (tokens, in), whatever stands before
        y = self.base(tokens)
        if self.merged and self.training and torch.is_grad_enabled():
            raise AFLoRAError("training while merged: unmerge() first (or model.eval() to infer)")
        if not self.merged:
            # (1)  Y = W0 X + L_b B L_d A X
            h = F.linear(tokens, self.lora_A.to(x.dtype)).to(y.dtype)  # (tokens, r)
            if self.rank <= FOLD_UP_TO_RANK or self.lora_B.requires_grad:
                # Both vectors folded into the thin B: (1) as written keeps tokens x out values for
                # the gradient of s_b. (r, out) and in place, if nobody else holds y: fast on CPUs.
                folded = (self.s_d[:, None] * self.lora_B.T * self.s_b).contiguous()
                ours = type(self.base) is nn.Linear and not self.base._forward_hooks
                add = y.addmm_ if ours and not y._is_view() else y.addmm
                y = add(h, folded.to(y.dtype))
            else:
                wide = F.linear(h * self.s_d.to(y.dtype), self.lora_B.to(y.dtype))
                y = y + wide * self.s_b.to(y.dtype)
        return y.view(*x.shape[:-1], self.shape[0])

    def delta_weight(self):
        """L_b B L_d A, (out, in): what the path adds to the base's weight."""
        return (self.s_b[:, None] * self.lora_B * self.s_d) @ self.lora_A

    @torch.no_grad()
    def merge(self):
        """Adds delta_weight() to the weight as loaded; inference then costs no more. Idempotent."""
        W0 = getattr(self.base, "weight", None)
        if not (isinstance(W0, nn.Parameter) and W0.is_floating_point() and W0.shape == self.shape):
            raise AFLoRAError(f"{type(self.base).__name__}: no plain (out, in) weight to add to")
        if not self.merged:
            loaded = getattr(W0, "loaded", W0.data)  # not train()'s half-precision copy
            self.merged, self.kept_weight = True, W0.data
            W0.data = (loaded + self.delta_weight()).to(loaded.dtype)

    def unmerge(self):
        """Puts the kept weight back bit for bit (subtracting would leave rounding). Idempotent."""
        if self.merged:
            self.base.weight.data = self.kept_weight.to(self.base.weight.device)
            self.merged, self.kept_weight = False, None


# -------------------------------------------------------------------------- adapters into a model
def find(targets, names, kind):
    """Those of `names` that `targets` selects: one regular expression on whole names, or a list of
    dotted suffixes ("query": layers.0.query, not layers.0.bigquery). Each must select something."""
    patterns = {targets: targets} if isinstance(targets, str) else {
        target: rf"(.*\.)?{re.escape(target)}" for target in targets}
    with blame(f"targets {targets!r}"):  # a regular expression may be none
        found = {t: [n for n in names if re.fullmatch(p, n)] for t, p in patterns.items()}
    if unmatched := [target for target, hits in found.items() if not hits]:
        there = ", ".join(dict.fromkeys(re.sub(r"\d+", "*", n) for n in names)) or "none"
        raise AFLoRAError(f"no {kind} matches {', '.join(unmatched)}; there are: {there}")
    return [n for n in names if any(n in hits for hits in found.values())]


def add_adapters(model, targets, rank=4, method="aflora", train_matrices="all",
                 modules_to_save=(), alpha=16, seed=0):
    """Wraps the linear modules that `targets` selects, freezes all else: {name: AFLoRALinear}.
    targets: dotted suffixes, or one regular expression on full module names; () adapts nothing.
    train_matrices: whose A and B train ("aflora" only): "all", "none", or targets among the adapted
    (the paper's GLUE runs: the FFN's). modules_to_save: suffixes of modules that train whole and
    are saved with the adapter: the head. Raises AFLoRAError, before any change, if one is wrong."""
    modules = {name: module for name, module in model.named_modules() if name}
    linears = [name for name, module in modules.items() if hasattr(module, "in_features")]
    if hasattr(model, "adapter_config"):
        raise AFLoRAError("this model has adapters already: add them once, to the plain model")
    if method != "aflora" and train_matrices != "all":
        raise AFLoRAError(f"train_matrices goes with method aflora; {method} has its own rule")
    names, saved = find(targets, linears, "linear module"), find(modules_to_save, modules, "module")
    if not names and not saved:
        raise AFLoRAError("neither targets nor modules_to_save: nothing would train")
    trained = names if train_matrices == "all" else [] if train_matrices == "none" else find(
        train_matrices, names, "adapted module")
    for name in names:
        parent = type(modules.get(name.rpartition(".")[0], model))
        if issubclass(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise AFLoRAError(f"{name}: {parent.__name__} never calls it, leave it out of targets")
        if any(f"{name}.".startswith(f"{module}.") for module in saved):
            raise AFLoRAError(f"{name} is among targets and in modules_to_save: choose one")
    layers = {n: AFLoRALinear(modules[n], rank, method, alpha, seed, name=n) for n in names}
    model.requires_grad_(False)  # LayerNorms, embeddings and biases, too
    for name, layer in layers.items():
        if method == "elora":  # the first layer of a shape lends its A and B to the others
            first = next(other for other in layers.values() if other.shape == layer.shape)
            layer.lora_A, layer.lora_B = first.lora_A, first.lora_B
        elif name not in trained:
            layer.lora_A.requires_grad = layer.lora_B.requires_grad = False
        model.set_submodule(name, layer)
    for name in saved:
        modules[name].requires_grad_(True)
    given = dict(targets=targets, train_matrices=train_matrices, modules_to_save=modules_to_save)
    model.adapter_config = dict(rank=rank, method=method, alpha=alpha, seed=seed) | {
        key: value if isinstance(value, str) else list(value) for key, value in given.items()}
    model.saved_modules = saved  # full names
    # {name of all that a file covers: how to regrow its start, None if no seed can}
    model.starts = {f"{name}.{key}": functools.partial(layer.start, key)
                    for name, layer in layers.items() for key in KEYS}
    model.starts |= {n: None for n in model.state_dict() for m in saved if n.startswith(f"{m}.")}
    return layers


def adapters_of(model):
    """{module name: AFLoRALinear}, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AFLoRALinear)}


def merge_adapters(model):
    """Merges every adapter into its base, see AFLoRALinear.merge."""
    for layer in adapters_of(model).values():
        layer.merge()


def unmerge_adapters(model):
    """Takes every adapter out of its base again, bit for bit."""
    for layer in adapters_of(model).values():
        layer.unmerge()


# ---------------------------------------------------------- the score (2)-(5) and the schedule (6)
def sensitivity(weight, grad, kind="gradient-weight"):
    """Raw sensitivity of each element, equation (2); all tensors of one shape."""
    if kind == "gradient-weight":  # (2)  I = |w * grad L|, about what the loss moves if w becomes 0
        return (weight * grad).abs()
    if kind == "gradient":  # (2)  I = |grad L|, the paper's: a large weight at rest may freeze, too
        return grad.abs()
    if kind == "weight":  # (2)  I = |w|, in the paper's ablation
        return weight.abs()
    raise AFLoRAError(f"sensitivity {kind!r}: choose gradient-weight, gradient or weight")


def freezing_fraction(step, total_steps, t_i, t_f):
    """Equation (6): the share of matrices that is frozen after `step` of `total_steps`, all counted
    in optimizer steps. Raises AFLoRAError where t_i and t_f do not fit into total_steps."""
    if min(t_i, t_f) < 0 or t_i + t_f > total_steps:
        raise AFLoRAError(f"t_i = {t_i}, t_f = {t_f} do not fit into {total_steps} steps")
    # (6)  r(t) = 0 before t_i, 1 from T - t_f on, else 1 - (1 - (t - t_i) / (T - t_i - t_f))^3
    if step >= total_steps - t_f:
        return 1.0
    return 0.0 if step < t_i else 1 - (1 - (step - t_i) / (total_steps - t_i - t_f)) ** 3


def flat_sensitivity(weights, grads, kind):
    """Equation (2) of several tensors, end to end in one flat one: one kernel for all of them."""
    flat = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (weights, grads))
    return sensitivity(*flat, kind)


class AdaptiveFreezer:
    """Scores all trainable A and B at each step; freezes the lowest r(t) share of them for good.
    adapters: add_adapters' result. total_steps, t_i, t_f: optimizer steps, equation (6). interval:
    matrices freeze only after each multiple of it, and after T - t_f steps: a look. beta1, beta2,
    sensitivity: equations (3), (4), (2). frozen_at: {matrix: after how many steps}, in order. Place
    in a step: see train(). Raises AFLoRAError if nothing trains or the schedule does not fit."""
    def __init__(self, adapters, total_steps, t_i, t_f, interval=10, beta1=0.85, beta2=0.95,
                 sensitivity="gradient-weight"):
        trained = {f"{name}.{key}": p for name, layer in adapters.items()
                   for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
        self.matrices = {name: p for name, p in trained.items() if p.dim() == 2}
        self.vector_parameters = sum(p.numel() for p in trained.values() if p.dim() == 1)
        if not self.matrices:
            raise AFLoRAError("no A or B is trainable: nothing to freeze, leave the freezer out")
        self.beta1, self.beta2, self.kind = beta1, beta2, sensitivity
        self.schedule, self.step = dict(total_steps=total_steps, t_i=t_i, t_f=t_f), 0
        self.frozen_at, self.live = {}, self.matrices  # live: those that still train
        # {look: how many of the n matrices are frozen after so many steps}: floor(r(t) n)
        n, looks = len(self.matrices), {*range(0, total_steps + 1, interval), total_steps - t_f}
        self.looks = {t: math.floor(freezing_fraction(t, **self.schedule) * n) for t in looks}
        if (ramp := total_steps - t_i - t_f) < 10 * interval:
            how = "in a few large groups" if ramp else "all at once"
            warnings.warn(f"ramp of {ramp} steps, look every {interval}: {n} matrices freeze {how}")
        # Running scores of the live matrices, end to end as in flat_sensitivity
        self.Ibar = self.Ubar = torch.cat([p.new_zeros(p.numel()) for p in self.live.values()])

    def split(self, flat):
        """{name: its part of a flat tensor} for the live matrices."""
        return dict(zip(self.live, flat.split([p.numel() for p in self.live.values()])))

    @torch.no_grad()
    def update(self, found_inf=None):
        """Takes gradients into the scores, equations (2)-(4). found_inf: 0-dim bool tensor, true if
        the step is skipped; default: not finite here. Raises AFLoRAError without a gradient."""
        if missing := ", ".join(name for name, p in self.live.items() if p.grad is None):
            raise AFLoRAError(f"{missing}: no gradient; backward() first, all adapters in use")
        if not self.live:
            return
        grads = [p.grad for p in self.live.values()]
        if found_inf is None:
            found_inf = ~torch.nn.utils.get_total_norm(grads).isfinite()
        # (2)  I(t) = |w * grad L|, or what `sensitivity` says
        I = flat_sensitivity(self.live.values(), grads, self.kind)
        self.Ibar, self.Ubar = self.Ibar.to(I), self.Ubar.to(I)  # the model may have moved
        # (3)  Ibar(t) = b1 Ibar(t-1) + (1 - b1) I(t),  Ibar(0) = 0
        Ibar = self.beta1 * self.Ibar + (1 - self.beta1) * I
        # (4)  U(t) = |I(t) - Ibar(t)|,  Ubar(t) = b2 Ubar(t-1) + (1 - b2) U(t),  Ubar(0) = 0
        Ubar = self.beta2 * self.Ubar + (1 - self.beta2) * (I - Ibar).abs()
        self.Ibar = torch.where(found_inf, self.Ibar, Ibar)  # an average never forgets an inf
        self.Ubar = torch.where(found_inf, self.Ubar, Ubar)

    def scores(self):
        """Equation (5) for every live matrix, {name: float}. One transfer from the device."""
        # (5)  s(t) = mean(Ibar * Ubar): both are >= 0, so the L1 norm (one foreach kernel) / count
        if not (products := self.split(self.Ibar * self.Ubar)):
            return {}
        sums = torch.stack(torch._foreach_norm(list(products.values()), 1)).tolist()
        return {name: s / products[name].numel() for name, s in zip(products, sums)}

    def shares(self):
        """(scheduled, realised): r(t) at the step that freeze() last saw, and what is frozen."""
        scheduled = freezing_fraction(self.step, **self.schedule)
        return scheduled, len(self.frozen_at) / len(self.matrices)

    def freeze(self, step, optimizer):
        """At a look, freezes what is due after `step` completed optimizer steps. Waits for the
        device only then. Returns the names of the newly frozen, lowest score first."""
        self.step = step
        if (due := self.looks.get(step, 0) - len(self.frozen_at)) <= 0:
            return []
        scores = self.scores()
        chosen = sorted(scores, key=scores.get)[:due]  # a stable sort: ties in the model's order
        kept = [[part for name, part in self.split(flat).items() if name not in chosen]
                for flat in (self.Ibar, self.Ubar)]
        self.Ibar, self.Ubar = (torch.cat([self.Ibar[:0], *parts]) for parts in kept)
        self.release(dict.fromkeys(chosen, step), optimizer)
        return chosen

    def release(self, frozen_at, optimizer):
        """Freezes so that nothing moves a matrix; it stays in its group, so that a resume fits."""
        for p in (self.matrices[name] for name in frozen_at):
            p.requires_grad_(False).grad = None  # not zero: AdamW moves on by momentum and decay
            optimizer.state.pop(p, None)
        self.frozen_at |= frozen_at
        self.live = {name: p for name, p in self.live.items() if name not in frozen_at}

    def average_trainable(self):
        """Trainable adapter parameters (no head), averaged over the steps done so far. Exact."""
        steps = max(self.step, 1)
        matrices = sum(p.numel() * self.frozen_at.get(n, steps) for n, p in self.matrices.items())
        return self.vector_parameters + matrices / steps

    def state_dict(self):
        """All that a resumed run needs: tensors, numbers and strings."""
        state = {k: getattr(self, k) for k in ("schedule", "step", "frozen_at", "Ibar", "Ubar")}
        return state | dict(matrices=list(self.matrices))

    def load_state_dict(self, state, optimizer):
        """Takes up a state_dict() in a new freezer. Raises AFLoRAError for one of another run."""
        expect_equal(state["schedule"] | dict(matrices=state["matrices"]),
                     self.schedule | dict(matrices=list(self.matrices)))
        self.release(state["frozen_at"], optimizer)
        self.step = state["step"]
        self.Ibar, self.Ubar = state["Ibar"].to(self.Ibar), state["Ubar"].to(self.Ubar)


# ---------------------------------------------------------------- FreezeNet: once, before training
class Kept(nn.Module):
    """Parametrization: the vector of trained elements, (k,), put at `positions` of a start that
    rests. An optimizer holds this vector alone, so neither momentum nor decay moves the others."""
    def __init__(self, start, positions):
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("positions", positions)

    def forward(self, kept):
        whole = self.start.flatten().index_put((self.positions,), kept).view_as(self.start)
        return torch.empty_like(self.start).copy_(whole)  # in the start's memory format

    def right_inverse(self, whole):
        return whole.flatten()[self.positions]


@torch.no_grad()
def seed_weights(model, seed=0, overwrite=True):
    """Prepares a network for FreezeNet's files: its start can be regrown, so save_adapter stores
    a seed. Gives it that start if `overwrite`: Glorot-uniform kernels and matrices, biases 0, other
    vectors 1."""
    def start(name, shape):
        if len(shape) == 1:
            return torch.full(shape, float(not name.endswith("bias")))
        return kaiming_uniform(f"{seed}/{name}", shape, math.sqrt(shape[0] / shape[1]))
    model.adapter_config, model.saved_modules = dict(method="freezenet", seed=seed), []
    model.starts = dict.fromkeys(model.state_dict()) | {
        name: functools.partial(start, name, p.shape) for name, p in model.named_parameters()}
    for name, p in model.named_parameters() if overwrite else ():
        p.copy_(model.starts[name]())


def keep_elements(model, masks):
    """Leaves trainable only those elements where masks {parameter name: bool tensor} are true."""
    for name, mask in masks.items():
        module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        p, positions = getattr(module, key), mask.flatten().nonzero()[:, 0]
        p.requires_grad_(len(positions) > 0)
        if 0 < len(positions) < p.numel():
            kept = Kept(p.detach().clone(), positions.to(p.device))
            parametrize.register_parametrization(module, key, kept)


def freeze_one_shot(model, loss, keep, sensitivity="gradient", names=None):
    """FreezeNet (Wimmer, Mehnert and Condurache, arXiv 2011.14087): decides before training which
    elements train, the share `keep` of highest saliency over all parameters `names` (default: those
    that train) together; the others keep their start. loss: callable, model -> scalar, of a batch
    or a sum over a few. sensitivity: equation (2). Returns masks as keep_elements takes them.
    Raises AFLoRAError for a keep outside [0, 1] and a loss without a finite, non-zero gradient."""
    given = {n: p for n, p in model.named_parameters() if p.requires_grad and n in (names or [n])}
    with blame("gradient of the loss"):  # the loss may not depend on a parameter at all
        grads = torch.autograd.grad(loss(model), list(given.values()), materialize_grads=True)
        if not 0 < torch.nn.utils.get_total_norm(grads) < math.inf:
            raise AFLoRAError("all 0 or not finite, nothing to choose by")
    if not 0 <= keep <= 1:
        raise AFLoRAError(f"keep {keep}: it is a share of all elements, from 0 to 1")
    saliency = flat_sensitivity(given.values(), grads, sensitivity)
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    best = saliency.argsort(descending=True, stable=True)  # ties: in the model's order
    mask[best[:round(keep * len(best))]] = True
    parts = mask.split([p.numel() for p in given.values()])
    masks = {name: part.view_as(p) for (name, p), part in zip(given.items(), parts)}
    keep_elements(model, masks)
    return masks


# ---------------------------------------------------------------------------------- adapter files
def write_file(path, content):
    """Writes bytes, or else by torch.save, to a temporary name and renames: never half a file."""
    part = pathlib.Path(f"{path}.part")
    try:
        with blame(path), part.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def blame(path):
    """Whatever goes wrong inside is this file's fault, and AFLoRAError says so."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, AFLoRAError) else f"{error!r:.300}"
        raise AFLoRAError(f"{path}: {reason}") from error


def read_file(path, kind):
    """Reads what write_file wrote. Only tensors, numbers and strings: no file can run code here."""
    with blame(path), zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > os.path.getsize(path):
            raise AFLoRAError("its parts claim more bytes than it has")  # none is compressed
        if damaged := archive.testzip():
            raise AFLoRAError(f"{damaged} in it is damaged: its checksum is another one")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != kind:
            raise AFLoRAError(f"it is no {kind}")
        return content


def expect_equal(there, here):
    """Raises AFLoRAError that names what differs between a file's dict and this run's."""
    if differs := [f"{key} is {there.get(key)} there, {here.get(key)} here"
                   for key in here | there if here.get(key) != there.get(key)]:
        raise AFLoRAError(f"it does not fit: {'; '.join(differs[:3])}")


def saved_values(model):
    """{full name: tensor} of all that a file covers: adapters, modules_to_save; or a network."""
    return {name: operator.attrgetter(name)(model).detach() for name in model.starts}


def save_adapter(model, path):
    """Writes what an adapted model, or a network from seed_weights, has learned. A tensor of which
    at most half has left its random start is a seed, a checksum of the start, and positions and
    values of the rest. Raises AFLoRAError for a model without adapters."""
    if not hasattr(model, "starts"):
        raise AFLoRAError("this model has no adapters: add_adapters(model, ...) first")
    content = dict(format=ADAPTER_FORMAT, config=model.adapter_config, shapes={}, at_start={},
                   positions={}, learned={})
    for name, value in saved_values(model).items():
        content["shapes"][name], value = list(value.shape), value.cpu().flatten()
        if grow := model.starts[name]:
            start = grow().flatten()
            moved = (value != start.to(value.dtype)).nonzero()[:, 0]
            if 2 * len(moved) <= len(value):
                content["at_start"][name] = hashlib.sha256(start.numpy()).hexdigest()
                gaps = np.diff(moved.numpy(), prepend=0).astype("<u4").tobytes()  # small numbers
                packed = torch.frombuffer(bytearray(zlib.compress(gaps, 9)), dtype=torch.uint8)
                content["positions"][name], value = packed, value[moved]
        if len(value):
            content["learned"][name] = value.clone()
    write_file(path, content)


def load_adapter(model, path):
    """Loads save_adapter's file into the plain model, or one with the same adapters, unmerged
    first: {name: AFLoRALinear}. Raises AFLoRAError with what differs, before any value changes."""
    content = read_file(path, ADAPTER_FORMAT)
    with blame(path):
        config, new = content["config"], content["learned"]
        if any(parametrize.is_parametrized(module) for module in model.modules()):
            raise AFLoRAError("elements of this model are frozen: load it into a plain one")
        if not hasattr(model, "starts") and config["method"] == "freezenet":
            seed_weights(model, config["seed"], overwrite=False)
        elif not hasattr(model, "starts"):
            add_adapters(model, **config)
        values = saved_values(model)
        expect_equal(config | content["shapes"], model.adapter_config | {
            name: list(value.shape) for name, value in values.items()})
        for name, expected in content["at_start"].items():
            start = model.starts[name]().flatten()
            if hashlib.sha256(start.numpy()).hexdigest() != expected:
                raise AFLoRAError(f"{name}, regrown from its seed, is not as it was saved")
            if name in new:
                unpack = zlib.decompressobj().decompress  # not more than there are values
                gaps = unpack(content["positions"][name].numpy().tobytes(), 4 * len(new[name]) + 1)
                positions = torch.from_numpy(np.frombuffer(gaps, "<u4").cumsum().astype("int64"))
                start = start.to(new[name].dtype).index_copy(0, positions, new[name])
            new[name] = start
        pairs = [(value, new[name].reshape(value.shape)) for name, value in values.items()]
    unmerge_adapters(model)
    for value, tensor in pairs:
        value.copy_(tensor)
    return adapters_of(model)


# ------------------------------------------------------------------------------ the training loop
@contextlib.contextmanager
def frozen_weights_in(model, dtype):
    """Holds the frozen float32 linear weights in `dtype`: autocast would cast them at each use.
    Meanwhile the loaded ones hang on their parameters as .loaded; afterwards they come back."""
    frozen = {p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()
              if not p.requires_grad and p.dtype == torch.float32}
    for p in frozen:
        p.loaded, p.data = p.data, p.data.to(dtype)
    try:
        yield
    finally:
        unmerge_adapters(model)  # merged in here, they would be in the copy
        for p in frozen:
            p.data = p.loaded
            del p.loaded


def to_device(batch, device):
    """Moves all tensors of a batch; pinned memory lets a copy to CUDA overlap the computation."""
    pin = lambda t: t.pin_memory() if device.type == "cuda" and not t.is_cuda else t  # noqa: E731
    return tree_map_only(torch.Tensor, lambda t: pin(t).to(device, non_blocking=True), batch)


def train(model, batches, loss, *, epochs, lr, head_lr=None, freezer=None, precision="fp32",
          accumulate=1, clip=1.0, warmup=0.06, weight_decay=0.0, evaluate=None, on_gradients=None,
          on_log=None, device=None, checkpoint=None, checkpoint_every=0, resume=False, stop=None,
          label=None):
    """Trains by AdamW what requires a gradient and freezes as `freezer` says. It knows no task.
    batches: callable, epoch -> sized iterable of batches: tensors in tuples, lists or dicts.
    loss: callable, (model, batch) -> scalar mean. evaluate: callable, model -> {metric: float}.
    lr, head_lr: peak learning rates, head_lr of modules_to_save; linear warm-up over the share
    `warmup` of all steps, then linear decay to 0. weight_decay: of matrices. clip: maximal gradient
    norm. accumulate: micro-batches per step, equally weighted. precision: "fp32", "bf16", "fp16"
    (with a GradScaler). on_log(dict): each logged line, every 10 steps and at the freezer's looks;
    only there does the host wait for the device. One step, also in a loop of your own:
        scaler.scale(loss).backward() per micro-batch, on_gradients(parameters) to average over
        processes, scaler.unscale_(optimizer), freezer.update(found_inf), clipping,
        scaler.step(optimizer), scaler.update(), freezer.freeze(completed steps, optimizer),
        optimizer.zero_grad(set_to_none=True)
    checkpoint: a file, written after each epoch, each checkpoint_every steps and when stop(), asked
    after each step, is true, which raises KeyboardInterrupt. resume: go on from there, on a CPU bit
    for bit. label: dict, kept in it.
    A step whose gradient is not finite changes nothing and is not counted: daily business for
    fp16's scaler. In bf16 and fp32, or if a loss is not finite, the next line raises AFLoRAError.
    Returns dict(history=[dict per epoch], steps, skipped, seconds), seconds without evaluation."""
    head_lr = lr if head_lr is None else head_lr
    if (precision not in COMPUTE_TYPES or min(epochs, accumulate, len(batches(0))) < 1
            or min(lr, head_lr, clip) <= 0 or weight_decay < 0 or not 0 <= warmup < 1):
        raise AFLoRAError(f"precision {precision!r} must be fp32, bf16 or fp16; epochs, accumulate, "
                          "batches >= 1; lr, head_lr, clip > 0; weight_decay >= 0; 0 <= warmup < 1")
    model.to(device := torch.device(device) if device else next(model.parameters()).device)
    total = epochs * (steps_per_epoch := math.ceil(len(batches(0)) / accumulate))
    if freezer and (planned := freezer.schedule["total_steps"]) != total:
        raise AFLoRAError(f"{epochs} x {steps_per_epoch} = {total} steps, the freezer: {planned}")
    saved, groups = getattr(model, "saved_modules", ()), {}
    head = {p for name in saved for p in model.get_submodule(name).parameters()}
    for p in (p for p in model.parameters() if p.requires_grad):
        rate, decay = head_lr if p in head else lr, weight_decay if p.dim() > 1 else 0.0
        group = dict(params=[], lr=rate, peak_lr=rate, weight_decay=decay)
        groups.setdefault((rate, decay), group)["params"].append(p)
    if not groups:
        raise AFLoRAError("nothing in this model is trainable: add_adapters(model, ...) first")
    optimizer = torch.optim.AdamW(list(groups.values()), fused=True)  # skips steps on the device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    autocast = torch.autocast(device.type, COMPUTE_TYPES[precision], enabled=precision != "fp32")
    # Where the run is. step: completed ones; sums: since the last line, of losses, of skipped steps
    # and of steps since the first skipped one.
    at = types.SimpleNamespace(
        attempted=0, step=0, skipped=0, logged=0, seconds=0.0, epoch_loss=0.0, history=[], log=[],
        sums=torch.zeros(3, device=device))
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    values = {n: value for n, value in model.state_dict().items() if n not in frozen}
    plan = dict(epochs=epochs, steps=total, lr=lr, head_lr=head_lr, precision=precision, clip=clip,
                accumulate=accumulate, warmup=warmup, weight_decay=weight_decay,
                schedule=freezer and freezer.schedule, **getattr(model, "adapter_config", {}))

    def read_sums():
        losses, skips, since = at.sums.tolist()  # the one transfer from the device
        if not math.isfinite(losses) or (skips and precision != "fp16"):
            raise AFLoRAError(f"loss or gradient not finite from step {at.attempted - since + 1:.0f}"
                              f" on, learning rate {optimizer.param_groups[0]['lr']:.1e}: lower lr")
        return losses, int(skips)

    def save():
        read_sums()  # never after a bad step
        random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        write_file(checkpoint, dict(
            format=CHECKPOINT_FORMAT, plan=plan, label=label, values=values, at=vars(at),
            random=random, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            freezer=freezer and freezer.state_dict()))

    if resume:
        content = read_file(checkpoint, CHECKPOINT_FORMAT)
        with blame(checkpoint):
            expect_equal(content["plan"], plan)
            for name, value in values.items():
                value.copy_(content["values"][name])
            optimizer.load_state_dict(content["optimizer"])
            scaler.load_state_dict(content["scaler"])
            if freezer:
                freezer.load_state_dict(content["freezer"], optimizer)
            torch.set_rng_state(content["random"][0])
            torch.cuda.set_rng_state_all(content["random"][1:])
            vars(at).update(content["at"], sums=content["at"]["sums"].to(device))
            for line in at.log if on_log else ():
                on_log(line)
    looks = freezer.looks if freezer else ()
    bar = tqdm(total=total, initial=at.attempted, unit="step", mininterval=1)
    with frozen_weights_in(model, COMPUTE_TYPES[precision]), bar:
        for epoch in range(at.attempted // steps_per_epoch, epochs):
            model.train()
            began, examples = time.perf_counter(), 0
            done = at.attempted % steps_per_epoch * accumulate  # by the run that this one resumes
            waiting = itertools.islice(batches(epoch), done, None)
            while micro_batches := list(itertools.islice(waiting, accumulate)):
                factor = min((at.step + 1) / (warmup * total + 1),
                             (1 - at.step / total) / (1 - warmup))
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                for batch in micro_batches:
                    examples += next(len(t) for t in tree_leaves(batch) if torch.is_tensor(t))
                    with autocast:
                        batch_loss = loss(model, to_device(batch, device)) / len(micro_batches)
                    scaler.scale(batch_loss).backward()
                    at.sums[0] += batch_loss.detach()
                live = [p for p in model.parameters() if p.grad is not None]
                if on_gradients:
                    on_gradients(live)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.get_total_norm([p.grad for p in live])
                found_inf = ~norm.isfinite()
                if freezer:
                    freezer.update(found_inf)
                torch.nn.utils.clip_grads_with_norm_(live, clip, norm)
                optimizer.found_inf = found_inf.float()  # AdamW skips the step; the scaler agrees
                scaler.step(optimizer)
                scaler.update()
                at.sums[1] += found_inf
                at.sums[2] += at.sums[1] > 0
                at.attempted, at.step = at.attempted + 1, at.step + 1
                bar.update()
                epoch_ends = at.attempted % steps_per_epoch == 0
                if epoch_ends or at.step % LOG_EVERY == 0 or at.step in looks:
                    losses, skips = read_sums()
                    at.sums.zero_()
                    at.skipped, at.epoch_loss = at.skipped + skips, at.epoch_loss + losses
                    at.step, since = at.attempted - at.skipped, at.attempted - at.logged
                    now, at.logged = time.perf_counter(), at.attempted
                    speed, at.seconds = examples / (now - began), at.seconds + now - began
                    began, examples = now, 0
                    line = dict(epoch=epoch + 1, step=at.step, loss=losses / since, lr=lr * factor,
                                skipped=at.skipped, examples_per_second=speed)
                    shown = f"loss {line['loss']:.3f}  lr {lr * factor:.1e}  {speed:.0f} examples/s"
                    if freezer:
                        freezer.freeze(at.step, optimizer)
                        k, n, r = len(freezer.frozen_at), len(freezer.matrices), freezer.shares()[0]
                        line |= dict(frozen=k, matrices=n, scheduled=r)
                        shown += f"  frozen {k}/{n} (scheduled {r:.2f})"
                    bar.set_postfix_str(shown, refresh=False)
                    at.log.append(line)
                    if on_log:
                        on_log(line)
                optimizer.zero_grad(set_to_none=True)
                interrupted = stop and stop()
                every = checkpoint_every and at.attempted % checkpoint_every == 0
                if checkpoint and (interrupted or every) and not epoch_ends:
                    save()
                if interrupted and not epoch_ends:
                    raise KeyboardInterrupt
            if at.attempted != (epoch + 1) * steps_per_epoch:
                raise AFLoRAError("batches(epoch) must hold as many in each epoch")
            at.history.append(dict(epoch=epoch + 1, step=at.step, loss=at.epoch_loss / steps_per_epoch))
            at.epoch_loss = 0.0
            if evaluate:
                model.eval()
                with torch.no_grad(), autocast:
                    at.history[-1] |= evaluate(model)
            bar.write("  ".join(f"{key} {value:.4g}" for key, value in at.history[-1].items()))
            if checkpoint:
                save()
            if stop and stop():
                raise KeyboardInterrupt
    return dict(history=at.history, steps=at.step, skipped=at.skipped, seconds=at.seconds)


def demo(steps=300, t_i=50, t_f=100, watched="2.lora_A"):
    """A frozen random network learns, by AFLoRA, to follow another one; in a loop of its own."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                                      nn.Linear(32, 1)) for _ in range(2))
    freezer = AdaptiveFreezer(add_adapters(student, targets=["0", "2"]), steps, t_i, t_f)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-2)
    print(f"means of {watched}:\nstep  (2) I     (3) Ibar  (4) U     Ubar      (5) s     (6) r(t)")
    for step in range(1, steps + 1):
        x = torch.randn(64, 8)
        F.mse_loss(student(x), teacher(x).detach()).backward()
        freezer.update()
        if step in freezer.looks and watched in freezer.live:
            I = sensitivity(freezer.live[watched], freezer.live[watched].grad).flatten()
            Ibar, Ubar = (freezer.split(flat)[watched] for flat in (freezer.Ibar, freezer.Ubar))
            means = (f"{v.mean():.2e}" for v in (I, Ibar, (I - Ibar).abs(), Ubar, Ibar * Ubar))
            print(f"{step:4}", *means, f"{freezing_fraction(step, steps, t_i, t_f):.3f}", sep="  ")
        optimizer.step()
        freezer.freeze(step, optimizer)
        optimizer.zero_grad(set_to_none=True)
    print(f"frozen after step: {freezer.frozen_at}")


if __name__ == "__main__":
    demo()
