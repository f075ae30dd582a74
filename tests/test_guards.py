"""What goes wrong in other people's models and trainers is refused at once, with what to do."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tiny
from aflora import (
    AdaptiveFreezer,
    AFLoRAError,
    AFLoRALinear,
    Training,
    add_adapters,
    save_adapter,
    train,
)


def loop(model, freezer, optimizer, steps):
    """A loop of one's own, with one step of the optimizer for each of the freezer's."""
    batches = tiny.data()
    for step in range(steps):
        tiny.loss_of(model, batches[step % len(batches)]).backward()
        freezer.update()
        optimizer.step()
        freezer.freeze(optimizer)
        optimizer.zero_grad()


# ------------------------------------------------------------------------------- wrapped models
class Wrapper(nn.DataParallel):
    """DataParallel that has no device to go to."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def compiled_inside(model):
    """A model a part of which is compiled; nothing is compiled before it is called."""
    model.head = torch.compile(model.head)
    return model


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper, compiled_inside])
def test_adapters_go_into_the_plain_model(wrap):
    """The names in its file would fit no plain model."""
    with pytest.raises(AFLoRAError, match="plain model, then wrap it"):
        add_adapters(wrap(tiny.Net()), ["up"], modules_to_save=["head"])


@pytest.mark.parametrize("wrap", [
    torch.compile,
    Wrapper,
    lambda model: nn.Sequential(model),
], ids=["compiled", "parallel", "inside another"])
def test_a_wrapper_is_neither_trained_nor_saved(tmp_path, wrap):
    """head_lr and the files would not find modules_to_save behind the wrapper's names."""
    model, _ = tiny.adapted()
    wrapped = wrap(model)
    with pytest.raises(AFLoRAError, match="not called on this very model"):
        train(wrapped, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2, head_lr=1e-3)
    with pytest.raises(AFLoRAError, match="not called on this very model"):
        save_adapter(wrapped, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def compile_a_block(model):
    model.blocks[1] = torch.compile(model.blocks[1])


def drop_a_block(model):
    del model.blocks[1]


@pytest.mark.parametrize("change", [compile_a_block, drop_a_block])
def test_parts_are_not_wrapped_or_removed_afterwards(tmp_path, change):
    """The file would have names, or lack some, that fit no plain model."""
    model, _ = tiny.adapted()
    change(model)
    with pytest.raises(AFLoRAError, match="wrapped or removed after add_adapters"):
        train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    with pytest.raises(AFLoRAError, match="wrapped or removed after add_adapters"):
        save_adapter(model, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_a_model_of_its_own(tmp_path):
    """deepcopy takes the adapters with it: it trains and is saved."""
    model, _ = tiny.adapted()
    other = copy.deepcopy(model)
    train(other, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    save_adapter(other, tmp_path / "a.pt")


# --------------------------------------------------------------------- adapters without gradients
class Bypass(nn.Module):
    """Uses a linear module's weight without calling it."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.up.weight)))


class Reentrant(Bypass):
    """Recomputes activations in the old way, which loses gradients where no input needs one."""

    def forward(self, x):
        return self.head(checkpoint(lambda x: torch.tanh(self.up(x)), x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", [Bypass, Reentrant])
def test_adapters_that_no_gradient_reaches_are_refused(kind):
    """All would stay at their start for the whole run. Said at once, also without freezer."""
    model = kind()
    add_adapters(model, ["up"], modules_to_save=["head"])
    with pytest.raises(AFLoRAError, match="no gradient reached 1 of 1 .*use_reentrant=False"):
        train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)


class LayerDrop(nn.Module):
    """Leaves a layer out of every other batch, as layerdrop and experts do by chance."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 2)
        self.calls = 0

    def forward(self, x):
        left_out = self.layers[self.calls % 2]
        self.calls += 1
        for layer in self.layers:
            if layer is not left_out:
                x = x + torch.tanh(layer(x))
        return self.head(x)


def test_layers_may_be_left_out_at_times():
    """They have no gradient in that step; all train, and freeze."""
    model = LayerDrop()
    layers = add_adapters(model, ["0", "1"], modules_to_save=["head"])
    freezer = AdaptiveFreezer(layers, 10 * len(tiny.data()), 4, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no gradient reached 1 of 2 .*by chance")
        train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=10, lr=1e-2, freezer=freezer)
    assert len(freezer.frozen_at) == 4
    assert all(layer.s_b.any() for layer in layers.values())


def test_adapters_that_are_not_to_train_need_no_gradient():
    """Frozen by hand, say to train the head alone."""
    model = tiny.Net()
    layers = add_adapters(model, ["up"], modules_to_save=["head"])
    for layer in layers.values():
        layer.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* gradient")
        train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)


@pytest.mark.parametrize("own_loop", [False, True])
def test_a_layer_without_a_gradient_among_others_is_named(own_loop):
    """It may be left out of this batch by chance; if not, it would never learn. Said once."""
    model = LayerDrop()
    layers = add_adapters(model, ["0", "1"], train_matrices=["1"], modules_to_save=["head"])
    freezer = AdaptiveFreezer(layers, len(tiny.data()), 2, 2)
    with pytest.warns(UserWarning, match="no gradient reached 1 of 2 adapters, layers.0") as said:
        if own_loop:
            tiny.loss_of(model, tiny.data()[0]).backward()
            freezer.update()
        else:
            train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2,
                  freezer=freezer)
    assert len({str(warning.message) for warning in said}) == 1


def test_modules_to_save_may_be_left_out_of_the_loss():
    """A pooler that a task does not use is common; it stays as it is."""
    model = tiny.Net()
    model.pooler = nn.Linear(8, 8)
    add_adapters(model, ["up"], modules_to_save=["head", "pooler"])
    before = model.pooler.weight.clone()
    train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    assert torch.equal(model.pooler.weight, before)


# ------------------------------------------------------------------------------- other optimizers
def test_an_optimizer_from_before_the_adapters_is_refused():
    """It lacks them all: matrices would freeze on schedule, and nothing would ever move."""
    model = tiny.Net()
    optimizer = torch.optim.AdamW(model.parameters())
    freezer = AdaptiveFreezer(add_adapters(model, ["up"], modules_to_save=["head"]), 40, 0, 5)
    with pytest.raises(AFLoRAError, match="lacks blocks.0.up.lora_A: make it after add_adapters"):
        loop(model, freezer, optimizer, 40)
    assert freezer.frozen_at == {}


def test_an_optimizer_that_lacks_one_matrix_is_refused():
    model, layers = tiny.adapted()
    forgotten = layers["blocks.1.down"].lora_B
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p is not forgotten)
    with pytest.raises(AFLoRAError, match="lacks blocks.1.down.lora_B"):
        loop(model, AdaptiveFreezer(layers, 40, 0, 5), optimizer, 40)


def test_an_optimizer_that_moves_all_by_one_direction_is_refused():
    """L-BFGS would go on moving what is frozen."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 20, 0, 5)
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    tiny.loss_of(model, tiny.data()[0]).backward()
    for _ in range(10):
        freezer.update()
    with pytest.raises(AFLoRAError, match="L-BFGS would move what is frozen"):
        freezer.freeze(optimizer)


def test_freeze_without_update_is_refused():
    """Nothing would ever freeze; or, at t_f = T, all at once with scores never computed."""
    for t_f in (5, 20):
        model, layers = tiny.adapted()
        freezer = AdaptiveFreezer(layers, 20, 0, t_f)
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(AFLoRAError, match="call update\\(\\) in each step, before freeze"):
            freezer.freeze(optimizer)


def test_a_freezer_left_out_at_resume_is_refused():
    """The optimizer's own count of steps tells that the freezer has missed some."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 200, 60, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    loop(model, freezer, optimizer, 50)
    for p in freezer.matrices.values():
        assert p.requires_grad
    forgotten = AdaptiveFreezer(layers, 200, 0, 20)
    with pytest.raises(AFLoRAError, match="at resume load the freezer's state"):
        loop(model, forgotten, optimizer, 50)
    assert forgotten.frozen_at == {}


@pytest.mark.parametrize("make", [
    lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5),
    lambda parameters: torch.optim.NAdam(parameters, lr=1e-3),
])
def test_other_optimizers_leave_the_frozen_alone(make):
    """Momentum, decay and accumulated squares: no frozen matrix moves, all others do."""
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 40, 0, 10)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    frozen = {}
    batches = tiny.data()
    for step in range(40):
        tiny.loss_of(model, batches[step % 8]).backward()
        freezer.update()
        optimizer.step()
        for name in freezer.freeze(optimizer):
            frozen[name] = freezer.matrices[name].clone()
        optimizer.zero_grad()
    assert len(frozen) == 12
    for name, value in frozen.items():
        assert torch.equal(freezer.matrices[name], value)


# ---------------------------------------------------------------------------------- and the rest
def test_a_used_freezer_is_no_new_one():
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 8, 0, 1, interval=1)
    loop(model, freezer, torch.optim.AdamW(model.parameters()), 3)
    with pytest.raises(AFLoRAError, match="was used before"):
        Training(model, tiny.loss_of, total_steps=8, lr=1e-2, freezer=freezer)


def test_state_of_an_adapted_model_goes_into_another_one():
    """load_state_dict() is plain PyTorch: outputs and files are those of the first."""
    model, _ = tiny.adapted()
    tiny.perturb(model)
    other, layers = tiny.adapted(seed=3)
    other.load_state_dict(model.state_dict())
    x, _ = tiny.data()[0]
    assert torch.equal(other(x), model(x))
    assert all(isinstance(layer, AFLoRALinear) for layer in layers.values())
