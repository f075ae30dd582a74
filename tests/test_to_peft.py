"""examples/to_peft.py: what it writes, PEFT reads as the same model; what it cannot, it refuses."""

import json
from collections import OrderedDict

import pytest
import tiny
import torch
import torch.nn as nn
from test_readme import ROOT
from torch.testing import assert_close

from aflora import AFLoRAError, add_adapters, merge_adapters, save_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def example(monkeypatch):
    """The example as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import to_peft
    return to_peft


def llama():
    """A random Llama, the same whenever it is asked for, in evaluation mode."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, initializer_range=0.3)).eval()


def bert():
    """A random BERT with a classifier, likewise."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=3, initializer_range=0.3)).eval()


def nested():
    """Nets in a net that is not of transformers, where "down" is also the end of other names."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(
        inner=tiny.Net(), down=nn.Linear(2, 8), outer=tiny.Net())).eval()


class Odd(nn.Module):
    """A model with what PEFT cannot hold, or holds in its own way: x (..., 8) -> (..., 8)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.norm = nn.BatchNorm1d(8)
        self.heads = nn.ModuleList([nn.Linear(8, 8)])
        self.score = nn.Linear(8, 8)
        self.part = nn.ModuleDict({"score": nn.ModuleDict({"key": nn.Linear(8, 8)})})
        self.nest = nn.ModuleDict({"norm": tiny.Net()})
        self.head = nn.Linear(8, 8)
        self.overhead = nn.Linear(8, 8)

    def forward(self, x):
        return self.overhead(self.head(self.query(x)))


def trained(model, path, **config):
    """The model with adapters whose every value was moved, heads too, and its file."""
    add_adapters(model, **config)
    tiny.perturb(model)
    for name in model.adapter_config["modules_to_save"]:
        for p in model.get_submodule(name).parameters():
            p.data += 0.1
    save_adapter(model, path)
    return model


def logits(model, *inputs):
    """What a model of transformers or of torch gives, in evaluation mode."""
    with torch.no_grad():
        output = model.eval()(*inputs)
    return output if torch.is_tensor(output) else output.logits


IDS = torch.arange(24).reshape(4, 6) % 20
MODELS = {
    "llama": (llama, IDS, dict(targets=["q_proj", "v_proj", "up_proj", "down_proj"], rank=3)),
    "bert": (bert, IDS, dict(targets=["query", "intermediate.dense"],
                             modules_to_save=["classifier"])),
    "one name in another": (nested, torch.randn(5, 8), dict(
        targets=["down", "outer.blocks.0.query"], modules_to_save=["outer.head"])),
    "a head's name in another": (Odd, torch.randn(5, 8), dict(
        targets=["query"], modules_to_save=["head"])),
}


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same(example, tmp_path, name):
    """Logits through PEFT are ours; merged by PEFT the model is the one merge_adapters makes."""
    make, inputs, config = MODELS[name]
    model = trained(make(), tmp_path / "adapter.pt", **config)
    expected = logits(model, inputs)
    assert (expected - logits(make(), inputs)).abs().max() > 0.01
    example.to_peft(tmp_path / "adapter.pt", make(), tmp_path / "lora")

    served = peft.PeftModel.from_pretrained(make(), tmp_path / "lora")
    assert_close(logits(served, inputs), expected, rtol=0, atol=1e-5)
    written = safetensors.load_file(tmp_path / "lora/adapter_model.safetensors")
    assert written.keys() == peft.get_peft_model_state_dict(served).keys()
    for target in model.adapter_config["targets"]:
        assert f"base_model.model.{target}.lora_A.weight" in written

    merge_adapters(model)
    merged = served.merge_and_unload().state_dict()
    assert merged.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert_close(merged[key], value, rtol=0, atol=1e-6)


def test_what_is_written_is_plain(example, tmp_path):
    """Scaling 1, whole names, no task of PEFT's own, which would add modules to save."""
    trained(bert(), tmp_path / "adapter.pt", targets=["query"], modules_to_save=["classifier"])
    example.to_peft(tmp_path / "adapter.pt", bert(), tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["task_type"] is None
    assert config["modules_to_save"] == ["classifier"]
    assert sorted(config["target_modules"]) == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]


# ------------------------------------------------------------------------------------- refused
class Counter(Odd):
    """One whose state has something in it that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def train_a_bias(model):
    """A base's own bias learns beside the adapter."""
    model.query.base.bias.requires_grad_(True)
    model.query.base.bias.data += 1


def move_a_buffer(model):
    """A running mean moves, as it does in training mode."""
    model.norm.running_mean += 1


REFUSED = {
    "a head alone": (dict(targets=(), modules_to_save=["head"]), None,
                     "(No modules were targeted|not found in the base model)"),
    "a shared module": (dict(targets=["shared"]), None, "again.* changed outside of targets"),
    "a shared head": (dict(targets=["query"], modules_to_save=["shared"]), None,
                      "again.* changed outside of targets"),
    "a bias": (dict(targets=["query"]), train_a_bias, "query.base.bias: it changed outside"),
    "a buffer": (dict(targets=["query"]), move_a_buffer, "norm.running_mean: it changed outside"),
    "a list": (dict(targets=["query"], modules_to_save=["heads"]), None,
               "cannot be applied to modules of type .*ModuleList"),
    "a part of a name": (dict(targets=["query", "key"], modules_to_save=["score"]), None,
                         "cannot be applied to modules of type .*ModuleDict"),
    "a target in what PEFT saves": (  # an older PEFT says so when it loads: KeyError
        dict(targets=["query", "nest.norm.blocks.0.up"], modules_to_save=["norm"]), None,
        "nest.norm.blocks.0.up: .*no attribute `lora_A`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_hold_is_refused(example, tmp_path, name):
    """By name, with what to do instead, and before anything is written."""
    config, change, message = REFUSED[name]
    model = trained(Odd(), tmp_path / "adapter.pt", **config)
    if change:
        change(model)
        save_adapter(model, tmp_path / "adapter.pt")
    with pytest.raises(AFLoRAError, match=f"merge_adapters.*: .*{message}"):
        example.to_peft(tmp_path / "adapter.pt", Odd(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_state_that_is_no_tensor_is_refused(example, tmp_path):
    """As by load_adapter."""
    trained(Counter(), tmp_path / "adapter.pt", targets=["query"])
    with pytest.raises(AFLoRAError, match="_extra_state: .*'dict' object has no"):
        example.to_peft(tmp_path / "adapter.pt", Counter(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_head_that_shares_the_embeddings_is_refused(example, tmp_path):
    """PEFT would save and load the head alone, and the embeddings stay as they were."""
    def tied():
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    trained(tied(), tmp_path / "adapter.pt", targets=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(AFLoRAError, match="embed_tokens.weight: it changed outside"):
        example.to_peft(tmp_path / "adapter.pt", tied(), tmp_path / "lora")


# ------------------------------------------------------------------------------ the command line
def test_the_command_line(example, tmp_path, capsys):
    """Adapter, folder of the base and class give the folder; what is wrong is one line of error."""
    model = trained(llama(), tmp_path / "adapter.pt", targets=["q_proj", "down_proj"])
    llama().save_pretrained(tmp_path / "base")
    paths = [str(tmp_path / name) for name in ("adapter.pt", "base", "lora")]
    assert example.main([*paths, "AutoModelForCausalLM"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    served = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    assert_close(logits(served, IDS), logits(model, IDS), rtol=0, atol=1e-5)
    capsys.readouterr()
    wrong = {
        (*paths, "AutoModelForNothing"): "AutoModelForNothing",
        (*paths, "AutoModel"): "layers.0.self_attn.q_proj",  # its names lack "model."
        (paths[1], *paths[1:], "AutoModelForCausalLM"): "base",
        (paths[0], str(tmp_path), paths[2], "AutoModelForCausalLM"): f"{tmp_path}",
        ("adapter.pt",): "ADAPTER BASE FOLDER CLASS",
    }
    for arguments, message in wrong.items():
        assert example.main(list(arguments)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error


def test_the_demonstration(example, tmp_path, monkeypatch, capsys):
    """On fewer batches: it prints a difference of rounding."""
    import your_own_model
    batches = your_own_model.llama_batches(0)[:40]
    monkeypatch.setattr(your_own_model, "llama_batches", lambda epoch: batches)
    monkeypatch.chdir(tmp_path)
    assert example.main([]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert 0 < float(line.split()[-1]) < 1e-4
