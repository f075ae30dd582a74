"""AFLoRA in one file: adaptive freezing of low rank adaptation, and the loop that trains with it.

LoRA keeps a pre-trained weight W0 still and learns a low-rank path beside it. AFLoRA puts a vector
behind each of the path's two matrices. At first all four train; then the matrices are frozen for
good, a few at a time, the least important first, until only the vectors train.

               Y  (tokens, out)
               ^
       .------(+)------.
       |               |
       |        L_b = diag(s_b)      s_b (out)     starts at 0, trains to the end
  W0 (out, in)         B             (out, r)      trains until it is frozen
  never trains  L_d = diag(s_d)      s_d (r)       starts at 0.1, trains to the end
       |               A             (r, in)       trains until it is frozen
       |               |
       '-------.-------'
               ^
               X  (tokens, in)              (1)  Y = W0 X + L_b B L_d A X

Papers: AFLoRA, Liu et al. (arXiv 2403.13269); LoRA, Hu et al. (2106.09685); ELoRA, published as
VeRA, Kopiczko et al. (2310.11454); PLATON, whose score this is, Zhang et al. (2206.12562).
"""

import contextlib
import hashlib
import itertools
import json
import math
import numbers
import os
import pathlib
import secrets
import warnings
import zipfile
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
COMPUTE_TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
ADAPTER_FORMAT = "aflora adapter 2"
CHECKPOINT_FORMAT = "aflora checkpoint 3"
LOG_EVERY = 10  # steps; not every step, since reading the loss waits for the device
MOST_GRAPHS = 64  # shapes of batch that are recorded; further ones run without a graph


class AFLoRAError(ValueError):
    """An error the user can fix: an argument, a file, an order of calls. The message says how."""


# ----------------------------------------------------------------------------------- the layer, (1)
def kaiming_uniform(key, shape):
    """A float32 matrix of shape (rows, columns), uniform in +-sqrt(6 / columns).

    The string `key` always gives the same matrix: numpy's RandomState is frozen by policy (NEP 19).
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    bound = math.sqrt(6 / shape[1])
    return torch.from_numpy(np.random.RandomState(seed).uniform(-bound, bound, shape)).float()


class AFLoRALinear(nn.Module):
    """A linear module with the path of equation (1) beside it: x (..., in) -> y (..., out).

    base has in_features and out_features; it is only called, so it may be quantised. seed and name
    determine where A and B start. Parameters: lora_A (r, in), lora_B (out, r), s_d (r), s_b (out).
    """

    def __init__(self, base, rank=4, seed=0, name=""):
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.key = f"{seed}/{name}"
        device = next(itertools.chain(base.parameters(), base.buffers()), torch.empty(0)).device
        A = kaiming_uniform(f"{self.key}/lora_A", (rank, base.in_features)).to(device)
        B = kaiming_uniform(f"{self.key}/lora_B", (base.out_features, rank)).to(device)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.s_d = nn.Parameter(A.new_full((rank,), 0.1))
        # The path starts at zero, so that the adapted model starts as the plain one. LoRA sets B to
        # zero; here s_b is zero instead, since B may be frozen at its start and would stay zero for
        # ever. The gradients of A, B and s_d contain the factor s_b: in step 1 only s_b learns.
        self.s_b = nn.Parameter(A.new_zeros(base.out_features))
        self.train(base.training)

    def forward(self, x, *args, **kwargs):
        if type(self.base) is nn.Linear:  # another base may need x as it is
            x = cast_by_autocast(x)  # once: the base and A would each do it
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, in): all leading dimensions in one
        # W0 X and a bias. Both paths start from tokens: there their gradients are added up
        y = self.base(tokens.view(x.shape), *args, **kwargs)
        h = F.linear(tokens, aligned(self.lora_A, x).to(x.dtype)).to(y.dtype)  # A X, (tokens, r)
        # Both vectors are folded into the thin B, as (L_b B L_d)^T, (r, out). The gradient of s_b
        # needs what s_b multiplies. In the order of (1) that is tokens x out activations, kept for
        # backward; here it is r x out.
        folded_B = aligned(self.s_d[:, None] * self.lora_B.T * self.s_b, x).to(y.dtype)
        # Autocast, if on, rounds the sum to its type, even if the base gave a wider one.
        # (1)  Y = W0 X + L_b B L_d A X, that is y + h @ folded_B as one product
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, folded_B).view(y.shape).to(y.dtype)

    def lora_factors(self):
        """(A, L_b B L_d), shapes (r, in) and (out, r): the A and B of an equivalent plain LoRA."""
        return self.lora_A, self.s_b[:, None] * self.lora_B * self.s_d

    def delta_weight(self):
        """L_b B L_d A, (out, in), in A's type: what the path adds to the base's weight."""
        A, B = self.lora_factors()
        with autocast(A.device, "fp32"):  # another one around this would round the product
            return B @ A

    weight = property(lambda self: self.base.weight)  # some models read these: T5 reads the dtype
    bias = property(lambda self: self.base.bias)


def cast_by_autocast(x):
    """A float32 x in the type in which autocast, if it is on, computes a linear layer."""
    if x.is_meta or x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def aligned(matrix, x):
    """A matrix (r, n), contiguous. On CUDA rows of zeros are put below it until r values in x's
    type fill a multiple of 16 bytes, as fast kernels for tensor cores want: in bf16 4 become 8.
    """
    missing = -len(matrix) % (16 // x.itemsize)
    if x.is_cuda and missing:
        matrix = F.pad(matrix, (0, 0, 0, missing))
    return matrix.contiguous()


# ---------------------------------------------------------------------------- adapters into a model
def add_adapters(model, targets, rank=4, train_matrices="all", modules_to_save=(), seed=0):
    """Wraps linear modules of a model in AFLoRALinear and freezes everything else. What was called
    query.weight is then query.base.weight, and hooks on query stay on query.base. Load the model's
    weights before, and do not call this in a model's __init__: from_pretrained would undo it.

    targets: whole names, each of which selects that module alone, or suffixes after a dot: "query"
        selects layers.0.query, not layers.0.bigquery. () adapts nothing. Experts that are one 3-D
        parameter are no modules and stay as they are.
    train_matrices: the modules whose A and B train: "all", or targets among the adapted modules (in
        the paper's GLUE runs those of the FFN). The vectors train everywhere.
    modules_to_save: suffixes of modules (the head) that train whole, in float32, and are saved. A
        module in both lists trains whole and has an adapter, both at the head's rate.
    rank, seed: as in AFLoRALinear.
    Returns {name: AFLoRALinear}. Raises AFLoRAError, before any change, if an argument is wrong.
    """
    if adapters_of(model):
        raise AFLoRAError("this model has adapters already: add all of them in one call")
    modules = dict(model.named_modules())
    linears = [n for n, module in modules.items() if n and getattr(module, "in_features", 0)]
    names = find(targets, linears)
    saved = find(modules_to_save or (), modules)
    trained = names if train_matrices == "all" else find(train_matrices, names)
    rank = whole("rank", rank, 1, 2**14)
    seed = whole("seed", seed)
    check_places(modules, names)

    layers = {name: AFLoRALinear(modules[name], rank, seed, name) for name in names}
    model.requires_grad_(False)  # LayerNorms, embeddings and biases included
    replace_modules(model, {modules[name]: layer for name, layer in layers.items()})
    for name in saved:
        for p in modules[name].parameters():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
            p.requires_grad_(True)
    model.saved_names = learned_names(model)  # for the file, even if they are frozen later
    model.adapter_config = dict(targets=names, rank=rank, train_matrices=trained,
                                modules_to_save=saved, seed=seed)
    for name in set(names) - set(trained):
        layers[name].lora_A.requires_grad_(False)
        layers[name].lora_B.requires_grad_(False)
    return layers


def find(targets, names):
    """The `names` that are a target or end in one. Raises AFLoRAError if a target selects none."""
    if isinstance(targets, str):
        targets = [targets]
    found = set()
    for target in targets:
        hits = [target] if target in names else [n for n in names if n.endswith(f".{target}")]
        if not hits:
            there = sorted({name.rpartition(".")[2] for name in names if name})
            raise AFLoRAError(f"{target!r} selects nothing; there are: {there} (a target needs "
                              "in_features, which GPT-2's Conv1D in transformers lacks)")
        found.update(hits)
    return [name for name in names if name in found]


def check_places(modules, names):
    """Raises AFLoRAError if the model is already wrapped, or if an adapter would be bypassed."""
    for module in modules.values():
        if isinstance(module, WRAPPERS) or hasattr(module, "_orig_mod"):
            raise AFLoRAError("add adapters to the plain model, then wrap it: before torch.compile "
                              "or DataParallel")
    for name in names:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise AFLoRAError(f"{name}: torch's fast attention bypasses it: leave it out")


def replace_modules(model, new):
    """Replaces each module that is a key of `new` by its value, wherever in the model it stands."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])


def adapters_of(model):
    """{name: AFLoRALinear}, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AFLoRALinear)}


@torch.no_grad()
def merge_adapters(model):
    """Makes the model plain again: W0 + L_b B L_d A replaces W0, and every adapter is removed. A
    base has to use its weight as it is: if it scales or rounds it in forward, the sum is wrong.

    To go back, load the adapter's file into a fresh base. Raises AFLoRAError, before any change, if
    a base has no plain weight that can take up the sum, or if the sum is not finite in its type.
    """
    merged = {}
    for name, layer in adapters_of(model).items():
        with blame(f"{name} cannot be merged: {type(layer.base).__name__} needs a plain weight"):
            delta = layer.delta_weight()
            W0 = dict(layer.base.named_parameters(recurse=False))["weight"]
            if not W0.is_floating_point() or W0.shape != delta.shape:
                raise AFLoRAError(f"it has {W0.dtype} of shape {tuple(W0.shape)}")
            merged[layer] = (W0 + delta).to(W0.dtype)
            if not merged[layer].isfinite().all():
                raise AFLoRAError(f"the sum is not finite in {W0.dtype}, use float32")
    for layer, weight in merged.items():  # a new parameter: another module may share the old one
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
    replace_modules(model, {layer: layer.base for layer in merged})
    for name in ("adapter_config", "saved_names"):
        vars(model).pop(name, None)


# ----------------------------------------------------- the score, (2) to (5), and the schedule, (6)
def sensitivity(weight, grad, kind="gradient-weight"):
    """Raw sensitivity of each element, equation (2). All tensors have the same shape."""
    if kind == "gradient-weight":
        # (2)  I = |w * grad L|: roughly how much the loss would change if w became 0
        return (weight * grad).abs()
    if kind == "gradient":
        # (2)  I = |grad L|: the paper's choice; a large weight with a small gradient freezes, too
        return grad.abs()
    if kind == "weight":
        # (2)  I = |w|: a variant in the paper's ablation
        return weight.abs()
    raise AFLoRAError(f"sensitivity {kind!r}: choose gradient-weight, gradient or weight")


def freezing_fraction(step, total_steps, t_i, t_f):
    """Equation (6): the share r(t) of all matrices that should be frozen after `step` steps.

    total_steps is T; t_i and t_f, the parts before and after the ramp, are optimizer steps, too.
    Returns a Fraction, so that floor(r n) is exact. AFLoRAError if t_i and t_f do not fit into T.
    """
    if min(t_i, t_f) < 0 or t_i + t_f > total_steps:
        raise AFLoRAError(f"t_i = {t_i} and t_f = {t_f} do not fit into {total_steps} steps")
    # (6)  r(t) = 0                                            t < t_i
    #           = 1 - (1 - (t - t_i) / (T - t_i - t_f))^3      t_i <= t < T - t_f
    #           = 1                                            T - t_f <= t
    if step < t_i:
        return Fraction(0)
    if step >= total_steps - t_f:
        return Fraction(1)
    return 1 - (1 - Fraction(step - t_i, total_steps - t_i - t_f)) ** 3


class AdaptiveFreezer:
    """Scores all trainable A and B at each step; freezes the lowest share r(t) of them for good.

    adapters: what add_adapters returned.
    total_steps, t_i, t_f: of equation (6), whole numbers of optimizer steps, not shares and not
        micro-batches. A loop of your own has to make as many: nothing checks it.
    interval: the freezer looks at what is due each time this number of steps has passed, and after
        every step from T - t_f on.
    beta1, beta2, kind: of equations (3), (4) and (2).
    In each optimizer step call update() once, on whole, unscaled, unclipped gradients, then
    optimizer.step(), then freeze(optimizer), and only then zero_grad(): see Training.step.
    frozen_at is {name: step after which it froze}, in order. Matrices that were frozen before stay
    so and do not count: for a new run make the model anew.
    """

    def __init__(self, adapters, total_steps, t_i, t_f, interval=10, beta1=0.85, beta2=0.95,
                 kind="gradient-weight"):
        self.adapters = adapters
        self.matrices = {}
        self.vector_parameters = 0
        for name, layer in adapters.items():
            for key, p in layer.named_parameters(recurse=False):
                if p.requires_grad and p.dim() == 2:
                    self.matrices[f"{name}.{key}"] = p
                elif p.requires_grad:
                    self.vector_parameters += p.numel()
        self.total_steps = whole("total_steps", total_steps)
        self.t_i = whole("t_i, in optimizer steps,", t_i)
        self.t_f = whole("t_f, in optimizer steps,", t_f)
        self.interval = whole("interval", interval, 1)
        self.beta1 = real("beta1", beta1, 0, 1)
        self.beta2 = real("beta2", beta2, 0, 1)
        self.kind = kind
        self.step = 0  # optimizer steps that update() has seen
        self.live = dict(self.matrices)  # those that still train
        self.frozen_at = {}
        if not self.matrices:
            raise AFLoRAError("no A or B is trainable: nothing to freeze, leave the freezer out")
        self.Ibar = {name: torch.zeros(p.numel()) for name, p in self.live.items()}
        self.Ubar = {name: torch.zeros(p.numel()) for name, p in self.live.items()}
        sensitivity(torch.zeros(1), torch.zeros(1), kind)  # refuses an unknown kind
        self.scheduled()  # refuses a schedule that does not fit
        ramp = self.total_steps - self.t_i - self.t_f
        if ramp < 10 * self.interval:
            warnings.warn(f"ramp of {ramp} steps, look every {interval}: matrices freeze in large "
                          "groups; train longer, or make t_i, t_f or interval smaller")

    def scheduled(self):
        """r(t) after the steps so far, an exact Fraction."""
        return freezing_fraction(self.step, self.total_steps, self.t_i, self.t_f)

    def split(self, flat):
        """{name: its part of a flat tensor}, for the live matrices."""
        return dict(zip(self.live, flat.split([p.numel() for p in self.live.values()])))

    @torch.no_grad()
    def update(self, found_inf=None):
        """Takes the gradients of one optimizer step into the scores, equations (2) to (4).

        found_inf: 0-dim bool tensor, true if a gradient overflowed and the step will be skipped. By
        default only the live A and B are checked, whereas a scaler skips a step for any parameter.
        Such a step counts, but leaves the scores alone. A missing gradient counts as 0.
        """
        self.step += 1
        if self.step == 1:
            check_gradients(self.adapters)
        if not self.live:
            return
        for name, p in self.live.items():
            if p.dtype.itemsize < 4:
                raise AFLoRAError(f"{name} has {p.dtype}: cast before add_adapters(), not after it")
        # A batch need not reach every layer: layerdrop and experts leave some out
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.live.values()]
        # All live matrices lie end to end in one tensor, so that few kernels run; a model may be
        # split over several devices
        device = grads[0].device
        weight = torch.cat([p.flatten().to(device) for p in self.live.values()])
        grad = torch.cat([g.flatten().to(device) for g in grads])
        if found_inf is None:
            found_inf = ~grad.isfinite().all()
        # (2)  I(t) = |w * grad L|, or as `kind` says
        I = sensitivity(weight, grad, self.kind)
        old_Ibar = torch.cat([self.Ibar[name] for name in self.live]).to(I)  # I's type and device
        old_Ubar = torch.cat([self.Ubar[name] for name in self.live]).to(I)
        # (3)  Ibar(t) = b1 Ibar(t-1) + (1 - b1) I(t),    Ibar(0) = 0
        Ibar = self.beta1 * old_Ibar + (1 - self.beta1) * I
        # (4)  Ubar(t) = b2 Ubar(t-1) + (1 - b2) U(t),    U(t) = |I(t) - Ibar(t)|,  Ubar(0) = 0
        U = (I - Ibar).abs()
        Ubar = self.beta2 * old_Ubar + (1 - self.beta2) * U
        # An overflowed step leaves both alone: an average would never forget an inf
        self.Ibar = self.split(torch.where(found_inf, old_Ibar, Ibar))
        self.Ubar = self.split(torch.where(found_inf, old_Ubar, Ubar))

    def scores(self):
        """Equation (5) for every live matrix, {name: float}. One transfer from the device."""
        if not self.live:
            return {}
        # (5)  s(t) = mean(Ibar(t) * Ubar(t)). Ibar says how much the loss depends on an element,
        #      Ubar how much that still changes. One of them near 0 makes the product small: what
        #      is unimportant freezes early, and so does what is important but settled.
        means = [(self.Ibar[name] * self.Ubar[name]).mean() for name in self.live]
        return dict(zip(self.live, torch.stack(means).tolist()))

    def due(self):
        """How many matrices to freeze now: at a look floor(r(t) n), less those already frozen."""
        if self.step % self.interval != 0 and self.step < self.total_steps - self.t_f:
            return 0
        return math.floor(self.scheduled() * len(self.matrices)) - len(self.frozen_at)

    def freeze(self, optimizer):
        """Freezes as many matrices as are due, lowest scores first, and returns their names.

        It waits for the device only if something is due.
        """
        if self.step == 0:
            raise AFLoRAError("call update() in each step, before freeze()")
        due = self.due()
        if due <= 0:
            return []
        self.check_optimizer(optimizer)
        scores = self.scores()
        names = sorted(scores, key=scores.get)[:due]  # among equals the first in the model
        for name in names:
            matrix = self.live.pop(name)
            # Frozen for good. It keeps its place in param_groups, so that a checkpoint still fits
            matrix.requires_grad_(False)  # backward makes no gradient from now on
            matrix.grad = None  # AdamW skips it; with a gradient of 0, momentum would still move it
            optimizer.state.pop(matrix, None)  # its moments are no longer needed
            self.frozen_at[name] = self.step
        return names

    def check_optimizer(self, optimizer):
        """Raises AFLoRAError for L-BFGS, for an optimizer that lacks a live matrix and, at the
        first freeze, for one that made steps which update() has not seen.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise AFLoRAError("L-BFGS would move what is frozen: use AdamW, SGD or the like")
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, matrix in self.live.items():
            if matrix not in held:
                raise AFLoRAError(f"the optimizer lacks {name}: make it after add_adapters()")
        # The optimizer counts its steps for each parameter; before the first freeze all are alike
        first = next(iter(self.live.values()))
        steps_made = optimizer.state.get(first, {}).get("step", 0)
        if not self.frozen_at and steps_made > self.step:
            raise AFLoRAError("the optimizer has made more steps than update() has seen: call it "
                              "in each step, and at resume load the freezer's state, too")

    def average_trainable(self):
        """Trainable adapter parameters (without a head), averaged exactly over the steps so far."""
        steps = max(self.step, 1)
        total = 0
        for name, p in self.matrices.items():
            total += p.numel() * self.frozen_at.get(name, steps)  # the steps in which it trained
        return self.vector_parameters + total / steps

    def state_dict(self):
        """All that a resumed run needs: tensors, numbers and strings."""
        plan = dict(total_steps=self.total_steps, t_i=self.t_i, t_f=self.t_f,
                    interval=self.interval, beta1=self.beta1, beta2=self.beta2, kind=self.kind,
                    matrices=[*self.matrices])
        state = dict(step=self.step, frozen_at=dict(self.frozen_at), Ibar=self.Ibar,
                     Ubar=self.Ubar)
        return dict(plan=plan, state=state)

    def load_state_dict(self, content):
        """Restores a state_dict(). Raises AFLoRAError if its settings or matrices differ.

        The optimizer's state has to come from the same step, since freeze() drops a part of it.
        """
        expect_equal(content["plan"], self.state_dict()["plan"])
        state = content["state"]
        self.step = state["step"]
        self.Ibar = state["Ibar"]
        self.Ubar = state["Ubar"]
        self.frozen_at = dict(state["frozen_at"])
        self.live = {name: p for name, p in self.matrices.items() if name not in self.frozen_at}
        for name, p in self.matrices.items():
            p.requires_grad_(name in self.live)
            if name in self.frozen_at:
                p.grad = None


# -------------------------------------------------------------------------------- the training loop
class Training:
    """The state of a training run, and its optimizer step written out. It does not know the task.

    model: already on its device; AdamW trains every parameter that requires a gradient.
    loss: callable, (model, batch) -> scalar, the mean over the batch.
    total_steps: optimizer steps of the whole run; the freezer, if any, has to plan for as many.
    lr, head_lr: peak learning rates; head_lr is that of modules_to_save, by default the same.
    precision: "fp32"; "bf16" or "fp16" for matrix products under autocast, all else in float32.
    clip: the largest norm that all gradients together may have.
    warmup: share of the steps in which the rates rise; then they fall linearly to 0.
    weight_decay: of matrices; vectors and biases have none.
    graphs: on CUDA, record the kernels of each shape of batch, see GraphRecorder. Steps made
        outside train() have to run inside side_stream(device). A parameter that a batch does not
        reach then has a gradient of 0, not None, and AdamW still moves it; if you freeze one by
        hand, set its .grad to None, too.
    """

    def __init__(self, model, loss, *, total_steps, lr, head_lr=None, freezer=None,
                 precision="fp32", clip=1.0, warmup=0.06, weight_decay=0.0, graphs=False):
        self.total_steps = whole("total_steps", total_steps, 1)
        self.clip = real("clip", clip)
        self.warmup = real("warmup", warmup, 0, 1)
        lr = real("lr", lr)
        head_lr = lr if head_lr is None else real("head_lr", head_lr)
        weight_decay = real("weight_decay", weight_decay, 0)
        if precision not in COMPUTE_TYPES:
            raise AFLoRAError(f"precision is {precision!r}: choose fp32, bf16 or fp16")
        if freezer and freezer.total_steps != self.total_steps:
            raise AFLoRAError(f"{self.total_steps} optimizer steps, epochs * ceil(batches / "
                              "accumulate), need a freezer that plans for as many")
        if freezer and freezer.step > 0:
            raise AFLoRAError("this freezer was used before: make a new one for each run")
        self.model = model
        self.loss = loss
        self.freezer = freezer
        self.steps_per_epoch = self.total_steps  # train(), which has epochs, sets it
        self.precision = precision
        self.device = next(model.parameters()).device
        if self.device.type == "meta":
            raise AFLoRAError("the model has no values: load it, and train it without offloading")
        if adapters_of(model):
            check_same_model(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        groups = parameter_groups(model, lr, head_lr, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.parameters = [*model.parameters()]  # kept: walking the model at each step is slow
        self.recorder = GraphRecorder(self.parameters) if graphs else None
        self.learned = learned_names(model)
        before = getattr(model, "saved_names", [])
        model.saved_names = [*dict.fromkeys(before + self.learned)]  # in order, each once
        self.steps = 0
        self.line = dict(step=0)  # of the log, from the last report()
        self.notes = {}  # the caller's own; a checkpoint keeps them as JSON
        self.epoch_start = random_state()  # the random state at the start of this epoch
        # Two names for the parts of one tensor, so that read_sums() waits for the device only once;
        # float32 whatever the default type is
        self.sums = torch.zeros(2, dtype=torch.float32, device=self.device)
        self.loss_sum = self.sums[0]  # of this epoch
        self.skipped = self.sums[1]  # steps of the run
        self.plan = dict(  # has to be the same on resume
            total_steps=self.total_steps, lr=lr, head_lr=head_lr, weight_decay=weight_decay,
            precision=precision, clip=self.clip, warmup=self.warmup,
            freezer=freezer is not None, **getattr(model, "adapter_config", {}))

    def rate(self):
        """The factor on the peak rates in the next step: the lower of two lines, up and down."""
        rising = (self.steps + 1) / (self.warmup * self.total_steps + 1)
        falling = (1 - self.steps / self.total_steps) / (1 - self.warmup)
        return min(rising, falling)

    def step(self, micro_batches):
        """One optimizer step from a list of micro-batches. Returns the names of what it froze.

        Scoring, clipping and freezing take place once, after the last micro-batch.
        """
        if not micro_batches:
            raise AFLoRAError("a step needs a batch: is an epoch shorter than batches(0)?")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self.rate()
        for batch in micro_batches:  # of equal size, they add up to the gradients of one big batch
            batch = to_device(batch, self.device)
            if self.recorder:
                self.recorder.run(self.forward_backward, batch, len(micro_batches))
            else:
                self.forward_backward(batch, len(micro_batches))
        if self.steps == 0:
            check_gradients(adapters_of(self.model))
        self.average_gradients()
        # The score needs true gradients: still scaled, they would grow and shrink with the scaler;
        # clipped, they would depend on every other parameter's gradient.
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        found_inf = ~norm.isfinite()
        if self.freezer:
            self.freezer.update(found_inf)
        clip_grads_with_norm_(self.parameters, self.clip, norm)
        # In fp16 an overflowed step is skipped, but still counts. In bf16 and fp32 the step is
        # made, and the next read_sums() raises an error.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        frozen = self.freezer.freeze(self.optimizer) if self.freezer else []
        if frozen and self.recorder and not self.freezer.live:
            self.recorder.forget()  # recordings would keep computing the gradients of A and B
        self.optimizer.zero_grad(set_to_none=not self.recorder)
        self.skipped += found_inf
        self.steps += 1
        return frozen

    def forward_backward(self, batch, count):
        """Adds the gradients of one of `count` micro-batches to those already there."""
        with autocast(self.device, self.precision):
            loss = self.loss(self.model, batch) / count
        with autocast(self.device, "fp32"):  # each product in the type that it had in the loss
            self.scaler.scale(loss).backward()
        self.loss_sum += loss.detach().to(self.device)

    def read_sums(self):
        """(sum of this epoch's losses, the run's skipped steps). Waits for the device.

        Raises AFLoRAError if a loss or, except in fp16, a gradient was not finite.
        """
        losses, skipped = self.sums.tolist()
        if not math.isfinite(losses) or (skipped and self.precision != "fp16"):
            raise AFLoRAError(
                f"a loss or gradient was not finite in steps {self.line['step'] + 1} to "
                f"{self.steps}, learning rate {self.optimizer.param_groups[0]['lr']:.1e}: lower lr")
        return losses, int(skipped)

    def report(self):
        """Sets self.line to what a log says of this epoch so far. Waits for the device."""
        losses, skipped = self.read_sums()
        epoch, done = divmod(self.steps - 1, self.steps_per_epoch)
        self.line = dict(epoch=epoch + 1, step=self.steps, skipped=skipped,
                         lr=self.optimizer.param_groups[0]["lr"], loss=losses / (done + 1))
        if self.freezer:
            self.line["scheduled"] = float(self.freezer.scheduled())
            self.line["frozen"] = len(self.freezer.frozen_at) / len(self.freezer.matrices)

    def average_gradients(self):
        """Empty here. A subclass for several processes fills it in: see examples/distributed.py."""


def autocast(device, precision):
    """The context in which matrix products are computed in "bf16" or "fp16"; with "fp32", in the
    type of what they multiply, even inside another autocast.

    It has no cache of cast weights: inside a caller's autocast that would outlive the step, and the
    next one would compute with the old weights.
    """
    return torch.autocast(device.type, COMPUTE_TYPES[precision], precision != "fp32",
                          cache_enabled=False)


def parameter_groups(model, lr, head_lr, weight_decay):
    """For AdamW: modules_to_save have a rate of their own, vectors and biases have no decay."""
    saved = getattr(model, "adapter_config", {}).get("modules_to_save", ())
    head = {p for name in saved for p in model.get_submodule(name).parameters()}
    groups = defaultdict(list)
    for p in model.parameters():
        if p.requires_grad:
            peak = head_lr if p in head else lr
            decay = weight_decay if p.ndim > 1 else 0.0
            groups[peak, decay].append(p)
    if not groups:
        raise AFLoRAError("nothing in this model is trainable: call add_adapters() first")
    return [dict(params=params, lr=peak, peak_lr=peak, weight_decay=decay)
            for (peak, decay), params in groups.items()]


def check_same_model(model):
    """Raises AFLoRAError if this is not the very model that add_adapters() was given, or has lost
    or renamed adapters since: its file would fit no plain model.
    """
    if "adapter_config" not in vars(model):
        raise AFLoRAError("add_adapters() was not called on this very model: call it on the whole "
                          "model, before torch.compile or DataParallel, and pass that model here")
    names = {f"{name}.s_b" for name in adapters_of(model)}
    if len(names) < len(model.adapter_config["targets"]) or not names <= {*model.saved_names}:
        raise AFLoRAError("parts of the model were wrapped or removed after add_adapters(): compile"
                          " a part in place, part.compile(); checkpoint by the model's own switch")


def check_gradients(adapters):
    """Warns if a first step gave an adapter no gradient. AFLoRAError if it gave none to any."""
    missed = [name for name, layer in adapters.items() if layer.s_b.requires_grad
              and all(p.grad is None for p in layer.parameters(recurse=False))]
    if not missed:
        return
    message = (f"no gradient reached {len(missed)} of {len(adapters)} adapters, {missed[0]} among "
               "them: if a weight is used without calling its module, leave it out of targets; "
               "if activations are recomputed, pass use_reentrant=False")
    if len(missed) == len(adapters):
        raise AFLoRAError(f"{message}; call update() between backward() and zero_grad()")
    warnings.warn(f"{message}; if layers are left out by chance, all is well")


class GraphRecorder:
    """Forward and backward of a micro-batch, as one CUDA graph for each shape of batch.

    A step is a thousand small kernels, and the GPU waits while Python starts them. A graph is their
    recording: one call replays it, always in the memory that the recording used. Hence
    - a batch is copied to where the recorded one lay;
    - gradients are zeroed, never dropped: a replay adds to them where they lay;
    - the first two batches of a shape run without a graph: libraries still set themselves up, and a
      rare shape is not worth a recording. The third is recorded;
    - all recordings are forgotten if a gradient or a weight is no longer where it was. That batch
      runs without a graph; then each shape is recorded anew;
    - a freeze does not spoil them: they keep the memory of the matrix's gradient and go on filling
      it, but nothing reads it. After the last freeze (see Training.step) all are forgotten, and the
      new ones compute no such gradient.
    All share one pool of memory, about as large as the largest shape needs. Python code in the loss
    runs only when it is recorded: a number that it computes for each batch would stay as it was, a
    layer that it leaves out by chance would stay out.
    """

    def __init__(self, parameters):
        self.parameters = parameters
        self.seen = Counter()  # batches of each shape
        self.forget()

    def forget(self):
        self.places = set()  # of weights and gradients
        self.recorded = {}  # shape: (the inputs it reads, graph, the gradients it adds to)
        self.pool = None

    def run(self, forward_backward, batch, count):
        if not places(self.parameters) <= self.places:
            self.forget()
        shape = repr((count, tree_map_only(torch.Tensor, lambda x: (x.shape, x.dtype), batch)))
        self.seen[shape] += 1
        if shape in self.recorded:
            inputs, graph, _ = self.recorded[shape]
            copy_tensors(batch, inputs)
            graph.replay()
        elif not self.places or self.seen[shape] < 3 or len(self.recorded) == MOST_GRAPHS:
            forward_backward(batch, count)
            self.places = places(self.parameters)
        else:
            inputs = tree_map_only(torch.Tensor, torch.clone, batch)
            graph = record(self.pool, forward_backward, inputs, count)
            self.pool = graph.pool()
            self.recorded[shape] = (inputs, graph, [p.grad for p in self.parameters])
            graph.replay()


def copy_tensors(batch, inputs):
    """Copies the values of a batch's tensors to where those of `inputs`, of its shape, lie."""
    for value, place in zip(tree_leaves(batch), tree_leaves(inputs)):
        if isinstance(place, torch.Tensor):
            place.copy_(value)


def places(parameters):
    """Where the parameters and their gradients lie, as a set: a freeze takes places out of it and
    puts none in, so what is recorded still holds; whatever else moves puts in a new one.
    """
    found = set()
    for i, p in enumerate(parameters):
        found.add((i, p.data_ptr()))
        if p.requires_grad or p.grad is not None:
            found.add((i, p.requires_grad, 0 if p.grad is None else p.grad.data_ptr()))
    return found


def record(pool, work, *inputs):
    """The CUDA graph of what work(*inputs) starts on the device. None of it runs yet."""
    with blame("graphs=True needs a CUDA device and a loss that reads no value back; steps outside "
               "train() need side_stream(device): restart Python, if need be without graphs"):
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # "thread_local": other threads may go on, such as a loader's that pins memory
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            work(*inputs)
        return graph


@contextlib.contextmanager
def side_stream(device):
    """Runs what is inside on a CUDA stream of its own: the default one cannot be recorded."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            yield
    finally:  # other streams do not wait for this one
        torch.cuda.synchronize(device)


def train(model, batches, loss, *, epochs, accumulate=1, after_step=None, resume=None, **settings):
    """Trains for some epochs by Training.step; `settings` are Training's: lr, freezer and so on.

    batches: callable, epoch -> a list, DataLoader or the like of batches: tensors in tuples, lists
        or dicts; the same number in each epoch (len(batches(0)) is read first). For a resume, their
        order may depend on the epoch and on torch's global generators, and on nothing else; that of
        a DataLoader with persistent workers depends on more.
    accumulate: micro-batches of one optimizer step, equally weighted.
    after_step: callable that is given the Training after each step, to do one or more of these:
        log training.line, which is renewed every 10 steps, at an epoch's end and at a freeze;
        evaluate: before a step the whole model, frozen parts too, is put into training mode;
        save a checkpoint, which also holds the dict training.notes as JSON. Do so last: random
        numbers that are drawn after it (each pass through a DataLoader draws one) are not drawn at
        resume;
        stop, by raising an exception.
    resume: a checkpoint to continue from; on a CPU bit-identical to an uninterrupted run.
    Returns the Training. Raises AFLoRAError at the next log line if something was not finite.
    """
    accumulate = whole("accumulate", accumulate, 1)
    epochs = whole("epochs", epochs, 1)
    per_epoch = math.ceil(whole("number of batches", len(batches(0)), 1) / accumulate)
    training = Training(model, loss, total_steps=epochs * per_epoch, **settings)
    training.steps_per_epoch = per_epoch
    training.plan |= dict(epochs=epochs, accumulate=accumulate)
    if resume:
        load_checkpoint(training, resume)
    model.zero_grad()  # drops gradients from before the training
    modules = [*model.modules()]
    bar = tqdm(total=training.total_steps, initial=training.steps, unit="step", mininterval=1)
    with bar, side_stream(training.device):
        while training.steps < training.total_steps:
            for micro_batches in steps_left(training, batches, accumulate):
                if not all(module.training for module in modules):  # after_step() has evaluated
                    model.train()
                frozen = training.step(micro_batches)
                bar.update()
                epoch_ends = training.steps % per_epoch == 0
                if epoch_ends or frozen or training.steps % LOG_EVERY == 0:
                    training.report()
                    bar.set_postfix(training.line, refresh=False)
                if after_step:
                    after_step(training)
    return training


def steps_left(training, batches, accumulate):
    """Yields the micro-batches of each step that is left in this epoch.

    On resume the epoch's earlier batches are drawn again, from the random state at its start, and
    skipped, so that a shuffling DataLoader gives the same order.
    """
    epoch, done = divmod(training.steps, training.steps_per_epoch)
    now = random_state()
    if done == 0:
        training.epoch_start = now
        training.loss_sum.zero_()
        iterator = iter(batches(epoch))
    else:
        set_random_state(training.epoch_start)
        iterator = iter(batches(epoch))
        for _ in range(done * accumulate):
            next(iterator, None)
        set_random_state(now)
    for _ in range(done, training.steps_per_epoch):
        yield list(itertools.islice(iterator, accumulate))
    if next(iterator, None) is not None:
        raise AFLoRAError("batches(epoch) has to hold the same number of batches in each epoch")


def to_device(batch, device):
    """Moves all tensors of a batch. Small ones and those in pinned memory do not wait for CUDA."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), batch)


def random_state():
    """The states of torch's generators, CPU and CUDA."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(states):
    """Restores what random_state() returned, on as many GPUs as there are."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:torch.cuda.device_count() + 1])


# -------------------------------------------------------------------------------------------- files
def learned_names(model):
    """Names of all parameters that require a gradient, and of all buffers: statistics change, too.

    What a quantised module has beside its weight is left out: a float base can load the file, too.
    """
    modules = model.named_modules(remove_duplicate=False)
    quantised = tuple(f"{name}." for name, module in modules if is_quantised(module))
    names = []
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            learned = value.requires_grad
        else:
            learned = not name.startswith(quantised)
        if learned:
            names.append(name)
    return names


def is_quantised(module):
    """Whether the module has a weight that does not consist of floats."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point()


def set_values(model, values, needed):
    """Loads {name: value} into a model. AFLoRAError, before any change, if they do not fit."""
    state = model.state_dict()
    for name in [*needed, *values]:
        with blame(name):
            there = getattr(values[name], "shape", None)  # a module's extra state has none
            expect_equal(dict(shape=there), dict(shape=getattr(state[name], "shape", None)))
    model.load_state_dict(values, strict=False)


def save_adapter(model, path):
    """Writes what was learned: adapters, modules_to_save, buffers, and whatever else trains now or
    trained in a Training.

    A matrix still at its random start is stored as the key from which it regrows, and a checksum.
    """
    check_same_model(model)
    names = {*model.saved_names, *learned_names(model)}
    values = {name: value for name, value in model.state_dict().items() if name in names}
    at_start = {}
    for layer_name, layer in adapters_of(model).items():
        for matrix in ("lora_A", "lora_B"):
            name = f"{layer_name}.{matrix}"
            key = f"{layer.key}/{matrix}"
            start = kaiming_uniform(key, values[name].shape)
            if torch.equal(values[name].cpu(), start.to(values[name].dtype)):
                del values[name]
                at_start[name] = [key, checksum(start)]
    write_file(path, dict(format=ADAPTER_FORMAT, config=model.adapter_config, values=values,
                          at_start=at_start))


def load_adapter(model, path):
    """Loads save_adapter's file into the plain model, or into one with the same adapters.

    Returns {name: AFLoRALinear}. In a plain model all of train_matrices trains again; in one with
    adapters what is frozen stays so. What was unfrozen by hand has to be unfrozen again. The base's
    own weights are not compared. An AFLoRAError, before any value changes, says what differs; a
    plain model may have adapters by then: make it anew.
    """
    content = read_file(path, ADAPTER_FORMAT)
    with blame(path):
        if not adapters_of(model):
            add_adapters(model, **content["config"])
        expect_equal(content["config"], model.adapter_config)
        values = content["values"]
        for name, (key, expected) in content["at_start"].items():
            values[name] = kaiming_uniform(key, model.get_parameter(name).shape)
            if checksum(values[name]) != expected:
                raise AFLoRAError(f"{name}, regrown from its key, is not as it was saved")
        set_values(model, values, needed=model.saved_names)
        model.saved_names = [*values]
    return adapters_of(model)


def save_checkpoint(training, path):
    """Writes what a resumed run needs, in train()'s after_step: the values of all that trained when
    this Training was made; states of optimizer, scaler, freezer, generators; the place in the data.
    """
    training.read_sums()  # raises if something was not finite: the last checkpoint stays
    with blame("training.notes"):
        notes = json.dumps(training.notes)
    state = training.model.state_dict()
    write_file(path, dict(
        format=CHECKPOINT_FORMAT,
        plan=training.plan,
        steps=training.steps,
        line=training.line,
        notes=notes,
        sums=training.sums,
        values={name: state[name] for name in training.learned},
        optimizer=training.optimizer.state_dict(),
        scaler=training.scaler.state_dict(),
        freezer=training.freezer.state_dict() if training.freezer else {},
        random=[random_state(), training.epoch_start],
    ))


def load_checkpoint(training, path):
    """Restores a stopped run. AFLoRAError if settings or shapes differ; data are not compared."""
    content = read_file(path, CHECKPOINT_FORMAT)
    with blame(path):
        expect_equal(content["plan"], training.plan)
        if training.freezer:
            training.freezer.load_state_dict(content["freezer"])
        training.optimizer.load_state_dict(content["optimizer"])
        training.scaler.load_state_dict(content["scaler"])
        set_values(training.model, content["values"], needed=training.learned)
        training.steps = content["steps"]
        training.line = content["line"]
        training.notes = json.loads(content["notes"])
        training.sums.copy_(content["sums"])
        now, training.epoch_start = content["random"]
        set_random_state(now)


def write_file(path, content):
    """Writes bytes, or an object by torch.save; under another name first, so never half a file."""
    with blame(path):
        path = pathlib.Path(path).expanduser().resolve()  # a link stays; its target is replaced
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # one for each process
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_file(path, kind):
    """Reads what write_file wrote: only tensors, numbers and strings, so no file can run code."""
    path = os.path.expanduser(path)
    with blame(path), zipfile.ZipFile(path) as archive:
        claimed = sum(part.file_size for part in archive.infolist())  # torch does not compress
        if claimed > os.path.getsize(path) or archive.testzip():
            raise AFLoRAError("it is damaged: the size or checksum of a part is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        expect_equal(dict(format=content["format"]), dict(format=kind))
        return content


def checksum(tensor):
    """The sha256 of a tensor's values."""
    return hashlib.sha256(tensor.numpy()).hexdigest()


@contextlib.contextmanager
def blame(what):
    """Turns any error inside into an AFLoRAError that names `what`."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, AFLoRAError) else f"{error!r:.300}"
        raise AFLoRAError(f"{what}: {reason}") from error


def expect_equal(there, here):
    """Raises an AFLoRAError that names what differs between a file's dict and this run's."""
    for key in here | there:
        if here.get(key) != there.get(key):
            raise AFLoRAError(f"{key} is {there.get(key)} there, {here.get(key)} here")


def whole(name, value, least=0, most=math.inf):
    """`value` as an int. Accepts NumPy's whole numbers and floats like 3.0 and refuses the rest."""
    if not isinstance(value, numbers.Real) or value % 1 != 0 or not least <= value <= most:
        raise AFLoRAError(f"{name} is {value!r}: give a whole number from {least} to {most}")
    return int(value)


def real(name, value, least=1e-12, below=math.inf):
    """`value` as a float. Raises AFLoRAError if it is out of these bounds or not a number."""
    if not isinstance(value, numbers.Real) or not least <= value < below:
        raise AFLoRAError(f"{name} is {value!r}: give a number from {least} to below {below}")
    return float(value)


# ------------------------------------------------------------------------------------ demonstration
def demo(steps=300, t_i=50, t_f=100):
    """A frozen random network learns by AFLoRA to imitate another one, in a loop of its own."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 1))
    teacher = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 1))
    freezer = AdaptiveFreezer(add_adapters(student, targets=["0", "2"]), steps, t_i, t_f)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-2)
    for step in range(1, steps + 1):
        x = torch.randn(64, 8)
        F.mse_loss(student(x), teacher(x).detach()).backward()
        freezer.update()
        if step % freezer.interval == 0 and freezer.live:
            scores = ", ".join(f"{name} {s:.1e}" for name, s in freezer.scores().items())
            print(f"step {step}: r(t) = {float(freezer.scheduled()):.3f}, s(t) = {scores}")
        optimizer.step()
        freezer.freeze(optimizer)
        optimizer.zero_grad()
    print(f"frozen after step: {freezer.frozen_at}")


if __name__ == "__main__":
    demo()
