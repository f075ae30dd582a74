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

import contextlib, hashlib, itertools, math, os, pathlib, re, time, types, warnings, zipfile, zlib
from functools import partial, reduce

import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from torch.nn.utils import get_total_norm, parametrize
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

FOLD_UP_TO_RANK = 64  # above, with B frozen, scaling activations is cheaper than folding: ELoRA
ADAPTER_FORMAT, CHECKPOINT_FORMAT = "aflora adapter 1", "aflora checkpoint 1"
COMPUTE_TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
LOG_EVERY = 10  # steps between two transfers of the loss from the device

class AFLoRAError(ValueError):
    """Something the user can mend: an argument, a file, an order of calls. The message says how."""

# ----------------------------------------------------------------------------------- the layer, (1)
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
        if method not in ("aflora", "lora", "elora") or rank not in range(1, 2**14):
            raise AFLoRAError(f"method {method!r}, rank {rank!r}: aflora, lora, elora; 1 to 16383")
        self.base, self.rank, self.merged, self.kept_weight = base, rank, False, None
        self.shape = n_out, n_in = base.out_features, base.in_features
        seed, lora = f"{seed}/{self.shape if method == 'elora' else name}", method == "lora"
        shapes = dict(lora_A=(rank, n_in), lora_B=(n_out, rank), s_d=(rank,), s_b=(n_out,))
        fixed = dict(lora_B=0.0, s_d=alpha / rank, s_b=1.0) if lora else dict(s_d=0.1, s_b=0.0)
        self.starts = {  # what grows the float32 values at the start anew, on the CPU
            key: partial(torch.full, shape, fixed[key]) if key in fixed else
            partial(kaiming_uniform, f"{seed}/{key}", shape, math.sqrt(5) if lora else 0.0)
            for key, shape in shapes.items()}
        like = next(itertools.chain(base.parameters(), base.buffers()), torch.empty(0))
        for key, start in self.starts.items():
            value = start().to(like.device, torch.promote_types(like.dtype, torch.float32))
            trains = method == "aflora" or lora == key.startswith("lora")
            setattr(self, key, nn.Parameter(value, requires_grad=trains))
        self.train(base.training)

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
                folded = (self.s_d[:, None] * self.lora_B.T * self.s_b).contiguous().to(y.dtype)
                ours = type(self.base) is nn.Linear and not self.base._forward_hooks
                y = y.addmm_(h, folded) if ours and not y._is_view() else y.addmm(h, folded)
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
            self.merged, self.kept_weight = True, [W0]  # itself, as it may be tied; unregistered
            self.base.weight = nn.Parameter((loaded + self.delta_weight()).to(loaded), False)

    def unmerge(self):
        """Puts the kept weight back bit for bit (subtracting would leave rounding). Idempotent."""
        if self.merged:
            self.kept_weight[0].data = self.kept_weight[0].data.to(self.base.weight.device)
            self.base.weight, self.merged, self.kept_weight = self.kept_weight[0], False, None

# ---------------------------------------------------------------------------- adapters into a model
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
    (the paper's GLUE runs: the FFN's). modules_to_save: suffixes of modules that train whole, in
    float32, and are saved: the head. Raises AFLoRAError, before any change, if one is wrong."""
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
            raise AFLoRAError(f"{name}: {parent.__name__} may not call it: leave it out of targets")
        if any(f"{name}.".startswith(f"{module}.") for module in saved):
            raise AFLoRAError(f"{name} is among targets and in modules_to_save: choose one")
    layers = {n: AFLoRALinear(modules[n], rank, method, alpha, seed, name=n) for n in names}
    model.requires_grad_(False)  # LayerNorms, embeddings and biases, too
    pairs = {}  # elora: the first layer of a shape lends its A and B to the others
    for name, layer in layers.items():
        if method == "elora":
            layer.lora_A, layer.lora_B = pairs.setdefault(layer.shape, (layer.lora_A, layer.lora_B))
        if name not in trained: layer.lora_A.requires_grad = layer.lora_B.requires_grad = False
        model.set_submodule(name, layer)
    for p in (p for name in saved for p in modules[name].parameters()):
        p.requires_grad, p.data = True, p.data.to(torch.promote_types(p.dtype, torch.float32))
    given = dict(targets=targets, train_matrices=train_matrices, modules_to_save=modules_to_save)
    model.adapter_config = dict(rank=rank, method=method, alpha=alpha, seed=seed) | {
        key: value if isinstance(value, str) else list(value) for key, value in given.items()}
    model.saved_modules = saved  # full names
    # {name of all that a file covers: how to regrow its start, None if no seed can}
    model.starts = {f"{name}.{key}": start for name, layer in layers.items()
                    for key, start in layer.starts.items()}
    model.starts |= {n: None for n in model.state_dict()  # BatchNorm's statistics move, too
                     if n.startswith(tuple(f"{m}." for m in saved)) or "running_" in n}
    return layers

def adapters_of(model):
    """{module name: AFLoRALinear}, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AFLoRALinear)}

def merge_adapters(model):
    """Merges every adapter into its base, see AFLoRALinear.merge."""
    for layer in adapters_of(model).values(): layer.merge()

def unmerge_adapters(model):
    """Takes every adapter out of its base again, bit for bit."""
    for layer in adapters_of(model).values(): layer.unmerge()

# -------------------------------------------------------------- the score (2)-(5), the schedule (6)
def sensitivity(weight, grad, kind="gradient-weight"):
    """Raw sensitivity of each element, equation (2); all tensors of one shape."""
    if kind not in ("gradient-weight", "gradient", "weight"):
        raise AFLoRAError(f"sensitivity {kind!r}: choose gradient-weight, gradient or weight")
    # (2)  I = |w * grad L|, about what the loss moves if w becomes 0; the paper's: |grad L|, by
    #      which a large weight at rest may freeze, too; and |w|, in its ablation
    return {"gradient-weight": weight * grad, "gradient": grad, "weight": weight}[kind].abs()

def freezing_fraction(step, total_steps, t_i, t_f):
    """Equation (6): the share of matrices that is frozen after `step` of `total_steps`, all counted
    in optimizer steps. Raises AFLoRAError where t_i and t_f do not fit into total_steps."""
    if min(t_i, t_f) < 0 or t_i + t_f > total_steps:
        raise AFLoRAError(f"t_i = {t_i}, t_f = {t_f} do not fit into {total_steps} steps")
    # (6)  r(t) = 0 before t_i, 1 from T - t_f on, else 1 - (1 - (t - t_i) / (T - t_i - t_f))^3
    if step >= total_steps - t_f: return 1.0
    return 0.0 if step < t_i else 1 - (1 - (step - t_i) / (total_steps - t_i - t_f)) ** 3

class AdaptiveFreezer:
    """Scores all trainable A and B at each step; freezes the lowest r(t) share of them for good.
    adapters: add_adapters' result. total_steps, t_i, t_f: optimizer steps, equation (6). interval:
    matrices freeze only after each multiple of it, and after T - t_f steps: a look. beta1, beta2,
    sensitivity: equations (3), (4), (2). frozen_at: {matrix: after how many steps}, in order. Place
    in a step: see train(). Raises AFLoRAError if nothing trains or the schedule does not fit."""
    live = property(lambda self: {  # {name: parameter} of the matrices that still train
        name: p for name, p in self.matrices.items() if name not in self.frozen_at})
    score = staticmethod(sensitivity)  # for functions with an argument of the same name

    def __init__(self, adapters, total_steps, t_i, t_f, interval=10, beta1=0.85, beta2=0.95,
                 sensitivity="gradient-weight"):
        trained = {f"{name}.{key}": p for name, layer in adapters.items()
                   for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
        self.matrices = {name: p for name, p in trained.items() if p.dim() == 2}
        self.vector_parameters = sum(p.numel() for p in trained.values() if p.dim() == 1)
        if not self.matrices:
            raise AFLoRAError("no A or B is trainable: nothing to freeze, leave the freezer out")
        self.beta1, self.beta2, self.kind = beta1, beta2, sensitivity
        self.schedule = dict(total_steps=total_steps, t_i=t_i, t_f=t_f)
        self.plan = self.schedule | dict(interval=interval, beta1=beta1, beta2=beta2,
                                         sensitivity=sensitivity, matrices=list(self.matrices))
        self.step, self.frozen_at = 0, {}
        # {look: how many of the n matrices are frozen after so many steps}: floor(r(t) n)
        n, looks = len(self.matrices), {*range(0, total_steps + 1, interval), total_steps - t_f}
        self.looks = {t: math.floor(freezing_fraction(t, **self.schedule) * n) for t in looks}
        if (ramp := total_steps - t_i - t_f) < 10 * interval:
            how = "in a few large groups" if ramp else "all at once"
            warnings.warn(f"ramp of {ramp} steps, look every {interval}: {n} matrices freeze {how}")
        # Running scores of the live matrices, end to end in one tensor: few kernels
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
        if not self.live: return
        grads = [p.grad for p in self.live.values()]
        found_inf = ~get_total_norm(grads).isfinite() if found_inf is None else found_inf
        weights = torch.cat([p.detach().flatten() for p in self.live.values()])
        # (2)  I(t) = |w * grad L|, or what `sensitivity` says
        I = sensitivity(weights, torch.cat([grad.flatten() for grad in grads]), self.kind)
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
        if not (products := self.split(self.Ibar * self.Ubar)): return {}
        sums = torch.stack(torch._foreach_norm(list(products.values()), 1)).tolist()
        return {name: s / products[name].numel() for name, s in zip(products, sums)}

    def shares(self):
        """(scheduled, realised): r(t) at the step that freeze() last saw, and what is frozen."""
        realised = len(self.frozen_at) / len(self.matrices)
        return freezing_fraction(self.step, **self.schedule), realised

    def freeze(self, step, optimizer):
        """At a look, freezes what is due after `step` completed optimizer steps. Waits for the
        device only then. Returns the names of the newly frozen, lowest score first."""
        self.step = step
        if (due := self.looks.get(step, 0) - len(self.frozen_at)) <= 0: return []
        scores, halves = self.scores(), (self.split(self.Ibar), self.split(self.Ubar))
        chosen = sorted(scores, key=scores.get)[:due]  # a stable sort: ties in the model's order
        for name in chosen:  # each stays in its parameter group, so that a resume fits
            self.matrices[name].requires_grad_(False).grad = None  # at zero AdamW would move on
            optimizer.state.pop(self.matrices[name], None)
        self.frozen_at = self.frozen_at | dict.fromkeys(chosen, step)
        self.Ibar, self.Ubar = (torch.cat([self.Ibar[:0], *(parts[name] for name in self.live)])
                                for parts in halves)
        return chosen

    def average_trainable(self):
        """Trainable adapter parameters (no head), averaged over the steps done so far. Exact."""
        steps = max(self.step, 1)
        matrices = sum(p.numel() * self.frozen_at.get(n, steps) for n, p in self.matrices.items())
        return self.vector_parameters + matrices / steps

    def state_dict(self):
        """All that a resumed run needs: tensors, numbers and strings."""
        return {key: getattr(self, key) for key in ("plan", "step", "frozen_at", "Ibar", "Ubar")}

    def load_state_dict(self, state):
        """Takes up a state_dict() in a new freezer. Raises AFLoRAError for one of another run."""
        expect_equal(state["plan"], self.plan)
        vars(self).update({key: state[key] for key in self.state_dict()})
        for name in self.frozen_at: self.matrices[name].requires_grad_(False)

# ----------------------------------------------------------------- FreezeNet: once, before training
class Kept(nn.Module):
    """Parametrization: the vector of trained elements, (k,), put at `positions` of a start that
    rests, (dims, k). An optimizer holds this vector alone: nothing moves the others."""
    def __init__(self, start, positions):
        super().__init__()
        self.start, self.positions = nn.Buffer(start, persistent=False), nn.Buffer(positions)
    def forward(self, kept):
        return self.start.index_put(tuple(self.positions), kept)  # in the start's memory format
    def right_inverse(self, whole):
        return whole[tuple(self.positions)]

def keep_elements(model, masks):
    """Leaves trainable only those elements where masks {parameter name: bool tensor} are true."""
    for name, mask in masks.items():
        with blame(f"{name} (are parts of it frozen already?)"):
            (module, _, key), p = name.rpartition("."), model.get_parameter(name)
        p.requires_grad_(bool(mask.any()))
        if mask.any() and not mask.all():
            kept = Kept(p.detach().clone(), mask.nonzero().T.to(p.device))
            parametrize.register_parametrization(model.get_submodule(module), key, kept)

def freeze_one_shot(model, loss, keep, sensitivity="gradient", names=None):
    """FreezeNet (Wimmer et al., arXiv 2011.14087): before training, leaves trainable the share
    `keep` of elements of highest saliency, equation (2), over all parameters `names` (default: all
    that train). loss: callable, model -> scalar. Returns masks as keep_elements takes them. Raises
    AFLoRAError for a keep outside [0, 1] and a loss without a finite, non-zero gradient."""
    given = {n: p for n, p in model.named_parameters() if p.requires_grad and n in (names or [n])}
    if not 0 <= keep <= 1 or not given:
        raise AFLoRAError(f"keep {keep} (from 0 to 1) of {len(given)} parameters that train")
    with blame("gradient of the loss"):  # the loss may not depend on a parameter at all
        grads = torch.autograd.grad(loss(model), list(given.values()), materialize_grads=True)
        if not 0 < get_total_norm(grads) < math.inf:
            raise AFLoRAError("all 0 or not finite, nothing to choose by")
    saliency = torch.cat([AdaptiveFreezer.score(p.detach(), grad, sensitivity).flatten()
                          for p, grad in zip(given.values(), grads)])
    ranks = saliency.argsort(descending=True, stable=True).argsort()  # ties: in the model's order
    parts = (ranks < round(keep * len(ranks))).split([p.numel() for p in given.values()])
    masks = {name: part.view_as(p) for (name, p), part in zip(given.items(), parts)}
    keep_elements(model, masks)
    return masks

# -------------------------------------------------------------------------------------------- files
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
        claimed = sum(part.file_size for part in archive.infolist())  # none is compressed
        if claimed > os.path.getsize(path) or archive.testzip():
            raise AFLoRAError("it is damaged: a part's size or checksum is another one")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != kind: raise AFLoRAError(f"it is no {kind}")
        return content

def expect_equal(there, here):
    """Raises AFLoRAError that names what differs between a file's dict and this run's."""
    if differs := [f"{key} is {there.get(key)} there, {here.get(key)} here"
                   for key in here | there if here.get(key) != there.get(key)]:
        raise AFLoRAError(f"it does not fit: {'; '.join(differs[:3])}")

def saved_values(model):
    """{full name: tensor} of all that a file covers: adapters, modules_to_save; or a network."""
    return {name: reduce(getattr, name.split("."), model).detach() for name in model.starts}

def save_adapter(model, path):
    """Writes what an adapted model, or a network that has .starts, has learned. A tensor of which
    at most half has left its random start is a seed, a checksum of the start, and positions and
    values of the rest. Raises AFLoRAError for a model without adapters."""
    if not hasattr(model, "starts"): raise AFLoRAError("no adapters: add_adapters() (or .starts)")
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
        if len(value) or not grow: content["learned"][name] = value.clone()
    write_file(path, content)

def load_adapter(model, path):
    """Loads save_adapter's file into the plain model, or one with the same adapters, unmerged
    first: {name: AFLoRALinear}. Raises AFLoRAError with what differs (the base's own values are not
    compared), before any value changes; a plain model may then have adapters: make it anew."""
    content = read_file(path, ADAPTER_FORMAT)
    with blame(path):
        config, new = content["config"], content["learned"]
        if any(isinstance(module, Kept) for module in model.modules()) or (
                config["method"] == "freezenet" and not hasattr(model, "starts")):
            raise AFLoRAError("load it into a network with the start it had and nothing frozen yet")
        if not hasattr(model, "starts"): add_adapters(model, **config)
        values = saved_values(model)
        shapes = {name: list(value.shape) for name, value in values.items()}
        expect_equal(config | content["shapes"], model.adapter_config | shapes)
        for name, expected in content["at_start"].items():
            start = model.starts[name]().flatten()
            if hashlib.sha256(start.numpy()).hexdigest() != expected:
                raise AFLoRAError(f"{name}, regrown from its seed, is not as it was saved")
            learned = new.get(name, start[:0])
            unpack = zlib.decompressobj().decompress  # not more than there are elements
            gaps = unpack(content["positions"][name].numpy().tobytes(), 4 * len(start) + 1)
            positions = torch.from_numpy(np.frombuffer(gaps, "<u4").cumsum().astype("int64"))
            new[name] = start.to(learned.dtype).index_copy(0, positions, learned)
        pairs = [(value, new[name].reshape(value.shape)) for name, value in values.items()]
    unmerge_adapters(model)
    for value, tensor in pairs: value.copy_(tensor)
    return adapters_of(model)

# -------------------------------------------------------------------------------- the training loop
@contextlib.contextmanager
def frozen_weights_in(model, dtype):
    """Holds the frozen float32 linear weights in `dtype`: autocast would cast them at each use.
    Meanwhile the loaded ones hang on their parameters as .loaded; afterwards they come back."""
    frozen = {p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()
              if not p.requires_grad and p.dtype == torch.float32}
    frozen -= {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for p in frozen: p.loaded, p.data = p.data, p.data.to(dtype)
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
    A step: loss and backward of each micro-batch, on_gradients, unscale (fp16), freezer.update,
    clip, optimizer.step, freezer.freeze (at a look), zero_grad.
    batches: callable, epoch -> sized iterable of batches: tensors in tuples, lists or dicts; always
    the same for an epoch, or a resumed run sees others. loss: callable, (model, batch) -> scalar
    mean. evaluate: callable, model -> {metric: float}. lr, head_lr: peak learning rates, head_lr of
    modules_to_save; linear warm-up over the share `warmup` of all steps, then linear decay to 0.
    weight_decay: of matrices. clip: maximal gradient norm. accumulate: micro-batches per step,
    equally weighted. device: default, the model's. precision: "fp32", "bf16", "fp16".
    on_gradients(parameters with a gradient): to average over processes. on_log(dict): each line,
    every 10 steps, at the freezer's looks and at an epoch's end; only there and at checkpoints the
    host waits for the device. checkpoint: a file, written after each epoch, each checkpoint_every
    steps and when stop(), asked after each step, is true, which raises KeyboardInterrupt. resume:
    go on from there, on a CPU bit for bit. label: kept in it. A step whose gradient is not finite
    changes nothing and is not counted; in bf16 and fp32, or if a loss is not finite, the next line
    raises AFLoRAError. Returns dict(history=[dict per epoch], steps, skipped, seconds)."""
    head_lr = lr if head_lr is None else head_lr
    if (precision not in COMPUTE_TYPES or min(epochs, accumulate, len(batches(0))) < 1
            or not all(0 < rate < math.inf for rate in (lr, head_lr, clip))
            or not 0 <= weight_decay < math.inf or not 0 <= warmup < 1 or checkpoint_every < 0):
        raise AFLoRAError("use precision fp32, bf16 or fp16; epochs, accumulate, batches >= 1; lr, "
                          "head_lr, clip > 0; weight_decay, checkpoint_every >= 0; 0 <= warmup < 1")
    model.to(device := torch.device(next(model.parameters()).device if device is None else device))
    total = epochs * (per_epoch := math.ceil(len(batches(0)) / accumulate))
    if freezer and (planned := freezer.schedule["total_steps"]) != total:
        raise AFLoRAError(f"{epochs} x {per_epoch} = {total} steps, the freezer: {planned}")
    saved, groups = getattr(model, "saved_modules", ()), {}
    head = {p for name in saved for p in model.get_submodule(name).parameters()}
    for p in (p for p in model.parameters() if p.requires_grad):
        groups.setdefault((head_lr if p in head else lr, weight_decay * (p.ndim > 1)), []).append(p)
    if not groups: raise AFLoRAError("nothing in this model is trainable: add_adapters() first")
    optimizer = torch.optim.AdamW([dict(params=params, lr=rate, peak_lr=rate, weight_decay=decay)
                                   for (rate, decay), params in groups.items()], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    autocast = torch.autocast(device.type, COMPUTE_TYPES[precision], enabled=precision != "fp32")
    # Where the run is. sums: losses of this epoch, skipped steps, steps since the first bad one
    at = types.SimpleNamespace(attempted=0, step=0, seconds=0.0, examples=0, history=[], log=[],
                               sums=torch.zeros(3, device=device))
    parts = [part for part in (optimizer, scaler, freezer) if part]
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    values = {n: value for n, value in model.state_dict().items() if n not in frozen}
    plan = dict(epochs=epochs, steps=total, lr=lr, head_lr=head_lr, precision=precision, clip=clip,
                accumulate=accumulate, warmup=warmup, weight_decay=weight_decay,
                schedule=freezer and freezer.schedule, **getattr(model, "adapter_config", {}))
    if resume:
        content = read_file(checkpoint, CHECKPOINT_FORMAT)
        with blame(checkpoint):
            expect_equal(content["plan"], plan)
            for name, value in values.items(): value.copy_(content["values"][name])
            for part, state in zip(parts, content["parts"]): part.load_state_dict(state)
            torch.set_rng_state(content["random"][0])
            torch.cuda.set_rng_state_all(content["random"][1:][:torch.cuda.device_count()])
            vars(at).update(content["at"], sums=content["at"]["sums"].to(device))
            for line in at.log if on_log else (): on_log(line)
    bar = tqdm(total=total, initial=at.attempted, unit="step", mininterval=1)
    with frozen_weights_in(model, COMPUTE_TYPES[precision]), bar:
        for epoch in range(at.attempted // per_epoch, epochs):
            model.train().zero_grad()  # of gradients from before, too
            began = time.perf_counter()
            waiting = itertools.islice(batches(epoch), at.attempted % per_epoch * accumulate, None)
            while micro_batches := list(itertools.islice(waiting, accumulate)):
                factor = min((at.step + 1) / (warmup * total + 1),
                             (1 - at.step / total) / (1 - warmup))
                for group in optimizer.param_groups: group["lr"] = group["peak_lr"] * factor
                for batch in micro_batches:
                    with autocast:
                        batch_loss = loss(model, to_device(batch, device)) / len(micro_batches)
                    scaler.scale(batch_loss).backward()
                    at.sums[0] += batch_loss.detach()
                    rows = [len(t) for t in tree_leaves(batch) if torch.is_tensor(t) and t.dim()]
                    at.examples += rows[0] if rows else 0
                live = [p for p in model.parameters() if p.grad is not None]
                if on_gradients: on_gradients(live)
                scaler.unscale_(optimizer)
                found_inf = ~(norm := get_total_norm([p.grad for p in live])).isfinite()
                if freezer: freezer.update(found_inf)
                nn.utils.clip_grads_with_norm_(live, clip, norm)
                optimizer.found_inf = found_inf.float()  # AdamW skips; a scaler checks this itself
                scaler.step(optimizer)
                scaler.update()
                at.sums[1] += found_inf
                at.sums[2] += ~at.sums[0].isfinite() | (at.sums[1] * (precision != "fp16") > 0)
                at.attempted, at.step = at.attempted + 1, at.step + 1
                bar.update()
                epoch_ends = (done := at.attempted - epoch * per_epoch) == per_epoch
                if epoch_ends or at.step % LOG_EVERY == 0 or freezer and at.step in freezer.looks:
                    losses, skipped, bad = at.sums.tolist()  # waits for the device
                    if bad: raise AFLoRAError(
                        f"loss or gradient not finite from step {at.attempted - bad + 1:.0f} on, "
                        f"learning rate {lr * factor:.1e}: lower lr")
                    at.step, spent = at.attempted - int(skipped), time.perf_counter() - began
                    at.seconds, began = at.seconds + spent, began + spent
                    line = dict(epoch=epoch + 1, step=at.step, skipped=int(skipped), lr=lr * factor,
                                loss=losses / done, seconds=at.seconds)
                    text = f"{at.examples / at.seconds:.0f} examples/s, loss {line['loss']:.3f}"
                    if freezer:
                        freezer.freeze(at.step, optimizer)
                        line["scheduled"], line["frozen"] = freezer.shares()
                        k, n = len(freezer.frozen_at), len(freezer.matrices)
                        text += f", frozen {k}/{n} (scheduled {line['scheduled']:.2f})"
                    bar.set_postfix_str(f"{text}, lr {lr * factor:.1e}", refresh=False)
                    at.log.append(line)
                    if on_log: on_log(line)
                optimizer.zero_grad(set_to_none=True)
                if epoch_ends:
                    at.sums[0] = 0
                    at.history.append(dict(epoch=epoch + 1, step=at.step, loss=line["loss"]))
                    if evaluate:
                        model.eval()
                        with torch.no_grad(), autocast: at.history[-1] |= evaluate(model)
                    bar.write("  ".join(f"{k} {v:.4g}" for k, v in at.history[-1].items()))
                interrupted = stop and stop()
                due = interrupted or epoch_ends or at.attempted % (checkpoint_every or total) == 0
                if checkpoint and due and not at.sums[2]:  # never after a bad step
                    write_file(checkpoint, dict(
                        format=CHECKPOINT_FORMAT, plan=plan, label=label, values=values,
                        at=vars(at), parts=[part.state_dict() for part in parts],
                        random=[torch.get_rng_state(), *torch.cuda.get_rng_state_all()]))
                if interrupted: raise KeyboardInterrupt
            if at.attempted != (epoch + 1) * per_epoch:
                raise AFLoRAError("batches(epoch) must hold as many in each epoch")
    return dict(history=at.history, steps=at.step, skipped=total - at.step, seconds=at.seconds)

def demo(steps=300, t_i=50, t_f=100, watched="2.lora_B"):
    """A frozen random network learns, by AFLoRA, to follow another one; in a loop of its own."""
    torch.manual_seed(0)
    net, teacher = (nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 1)) for _ in range(2))
    freezer = AdaptiveFreezer(add_adapters(net, ["0", "2"]), steps, t_i, t_f)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2)
    print(f"means of {watched}:\nstep  (2) I     (3) Ibar  (4) U     Ubar      (5) s     (6) r(t)")
    for step in range(1, steps + 1):
        x = torch.randn(64, 8)
        F.mse_loss(net(x), teacher(x).detach()).backward()
        freezer.update()
        if (step == 1 or step in freezer.looks) and watched in freezer.live:
            I = sensitivity(freezer.live[watched], freezer.live[watched].grad).flatten()
            Ibar, Ubar = (freezer.split(flat)[watched] for flat in (freezer.Ibar, freezer.Ubar))
            means = (f"{v.mean():.2e}" for v in (I, Ibar, (I - Ibar).abs(), Ubar, Ibar * Ubar))
            print(f"{step:4}", *means, f"{freezing_fraction(step, steps, t_i, t_f):.3f}", sep="  ")
        optimizer.step()
        freezer.freeze(step, optimizer)
        optimizer.zero_grad()
    print(f"frozen after step: {freezer.frozen_at}")

if __name__ == "__main__": demo()
