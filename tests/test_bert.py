"""The small BERT against Hugging Face's, and the folders it is loaded from, good and bad."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import train_glue_small as glue
from aflora import AFLoRAError
from data.weights import read_weights

CPU = torch.device("cpu")


def run_main(folder, *flags):
    """The exit code of the companion on a folder's tiny BERT and SST-2."""
    return glue.main(["--task", "sst2", "--model", str(folder), "--data", str(folder),
                      "--out", str(folder / "out"), *flags])


# ------------------------------------------------------------------------- against transformers
def write_as_old(theirs, folder):
    """Saves a BertModel's weights as old files have them: .bin, gamma and beta, and before each
    name what a wrapper and a pre-training model put there."""
    (folder / "model.safetensors").unlink()
    state = {"cls.predictions.bias": torch.zeros(60)}
    for name, p in theirs.state_dict().items():
        name = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        state[f"module.bert.{name}"] = p
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("old", [False, True])
def test_bert_equals_transformers(tmp_path, old):
    """Hidden states and every gradient equal BertModel's, from new and old checkpoint files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**tiny.CONFIG)
    theirs = transformers.BertModel(config, add_pooling_layer=False)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)  # LayerNorms, too, so that no two parameters are alike
    theirs.save_pretrained(tmp_path)
    if old:
        write_as_old(theirs, tmp_path)
    ours = glue.Bert.load(tmp_path).double().eval()
    theirs = theirs.double().eval()

    mask = torch.arange(11) < torch.tensor([[11], [7], [1]])
    segments = torch.arange(33).view(3, 11) % 2
    ids = torch.randint(1, 60, (3, 11)) * mask  # theirs gives id 0, the padding, no gradient
    x = ours(ids, segments, mask)[mask]
    y = theirs(ids, attention_mask=mask.long(), token_type_ids=segments).last_hidden_state[mask]
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)

    pull = torch.randn_like(x)
    (x * pull).sum().backward()
    (y * pull).sum().backward()
    left = list(theirs.parameters())
    for p in ours.parameters():
        twin = next(q for q in left if torch.equal(p, q))
        torch.testing.assert_close(p.grad, twin.grad, rtol=1e-9, atol=1e-9)
        left = [q for q in left if q is not twin]
    assert left == []


def test_weights_in_shards_are_refused(folder, capsys):
    """There is no model.safetensors then; the message says how to write one."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert run_main(folder) == 2
    message = capsys.readouterr().err
    assert "shards" in message and "max_shard_size" in message


def test_the_head_sees_the_mean_over_real_tokens(folder):
    """Logits by hand from Bert's hidden states; padding, whatever it holds, changes nothing."""
    torch.manual_seed(0)
    model, _ = tiny.load_tiny(folder)
    model.double().eval()
    ids = torch.randint(5, 60, (2, 7))
    segments = torch.zeros_like(ids)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    hidden = model.encoder(ids, segments, mask)
    means = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
    inner, outer = (part for part in model.head if isinstance(part, torch.nn.Linear))
    expected = outer(torch.tanh(inner(means)))
    torch.testing.assert_close(model(ids, segments, mask), expected)
    short = model(ids[1:, :3], segments[1:, :3], mask[1:, :3])
    torch.testing.assert_close(model(ids, segments, mask)[1:], short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p, dtype):
    """A share p of zeros, the expectation kept, the gradient to match; nothing in evaluation."""
    torch.manual_seed(0)
    x = torch.ones(401, 997, dtype=dtype, requires_grad=True)
    y = glue.Dropout(p)(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.004)
    assert y.float().mean().item() == pytest.approx(1, abs=0.008)
    assert torch.equal(x.grad, y)
    assert torch.equal(glue.Dropout(p).eval()(x), x)


class OuterProducts(TorchDispatchMode):
    """Inside it `count` grows with each torch.bmm of columns by rows."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default and args[0].shape[2] == 1:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_has_no_batched_outer_product(folder):
    """From torch 2.13 on Triton computes it on CUDA: an error where no C compiler is installed."""
    model, _ = tiny.load_tiny(folder)
    inputs = [torch.ones(2, 3, dtype=torch.long)] * 2 + [torch.ones(2, 3, dtype=torch.bool)]
    with OuterProducts() as seen:
        model(*inputs).sum().backward()
    assert seen.count == 0
    with OuterProducts() as seen:
        torch.bmm(torch.ones(2, 3, 1), torch.ones(2, 1, 4))
    assert seen.count == 1


def test_dropout_stands_where_bert_has_it(folder):
    """In training it acts behind the embeddings, the two halves of each layer, and in the head."""
    model, _ = tiny.load_tiny(folder)
    places = {name for name, module in model.named_modules() if isinstance(module, glue.Dropout)}
    assert places == {"encoder.dropout", "encoder.layers.0.drop", "encoder.layers.1.drop",
                      "head.0", "head.3"}
    inputs = [torch.ones(1, 3, dtype=torch.long)] * 2 + [torch.ones(1, 3, dtype=torch.bool)]
    calls = []
    for name in places:
        model.get_submodule(name).register_forward_hook(
            lambda module, x, y, name=name: calls.append(name))
    model.train()(*inputs)
    assert sorted(calls) == ["encoder.dropout", *["encoder.layers.0.drop"] * 2,
                             *["encoder.layers.1.drop"] * 2, "head.0", "head.3"]


def test_one_segment_is_enough(folder):
    """With one row of segment embeddings both texts of a pair get it."""
    tensors = tiny.checkpoint()
    name = "embeddings.token_type_embeddings.weight"
    tensors[name] = tensors[name][:1]
    (folder / "model.safetensors").write_bytes(tiny.safetensors(tensors))
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | {"type_vocab_size": 1}))
    model, tokenizer = tiny.load_tiny(folder)
    ids, segments = tokenizer.encode("a good film", "bad")
    assert 1 in segments
    logits = []
    for these in (segments, [0] * len(ids)):
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        logits.append(model.eval()(torch.tensor([ids]), torch.tensor([these]), mask))
    assert torch.equal(*logits)


def test_load_model_seeds_the_head_alone(folder):
    """The same seed gives the same head, another seed another; the encoder is the file's."""
    first, _, name = glue.load_model(str(folder), 1, CPU)
    torch.rand(9)
    same, _, _ = glue.load_model(folder, 1, CPU)
    other, _, _ = glue.load_model(folder, 2, CPU)
    assert name == str(folder)
    assert not torch.equal(first.head[1].weight, other.head[1].weight)
    expected = tiny.checkpoint()["encoder.layer.1.output.dense.weight"]
    for model in (first, same, other):
        assert torch.equal(model.encoder.layers[1].output.weight, expected)
    for p, q in zip(first.parameters(), same.parameters()):
        assert torch.equal(p, q)


# --------------------------------------------------------------------------------- bad folders
class Touch:
    """Unpickled by a careless reader, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


GOOD = tiny.safetensors(tiny.checkpoint())
LACKED = "encoder.layer.1.output.dense.bias"


def lacking(name):
    """The tiny BERT's tensors without one."""
    tensors = tiny.checkpoint()
    del tensors[name]
    return tensors


def changed_config(**change):
    """The bytes of a config.json that differs from the tiny BERT's."""
    return json.dumps(tiny.CONFIG | change).encode()


BAD_WEIGHTS = {
    "missing": None,
    "empty": b"",
    "4 bytes": GOOD[:4],
    "a header cut short": GOOD[:999],
    "a byte too few": GOOD[:-1],
    "a byte too many": GOOD + b"\0",
    "a huge header": b"\xff" * 7 + b"\x7f" + GOOD[8:],
    "a list as header": b"\2" + bytes(7) + b"[]",
    "a header that is no JSON": b"\5" + bytes(7) + b"{JSON",
    "no tensors": b"\2" + bytes(7) + b"{}",
    "an unknown type": tiny.safetensors(tiny.checkpoint(), dtype="F4"),
    "a bias that lacks": tiny.safetensors(lacking(LACKED)),
    "another shape": tiny.safetensors(tiny.checkpoint(), shape=[2]),
    "another width": tiny.safetensors(tiny.checkpoint(inner=40)),
    "overlapping tensors": tiny.safetensors(tiny.checkpoint(), data_offsets=[0, 4]),
    "a negative offset": tiny.safetensors(tiny.checkpoint(), data_offsets=[-4, 0]),
    "a huge offset": tiny.safetensors(tiny.checkpoint(), data_offsets=[10**15, 10**15 + 4]),
    "a word as offset": tiny.safetensors(tiny.checkpoint(), data_offsets=[0, "4"]),
}
BAD_BINS = {
    "empty": b"",
    "half a zip": b"PK",
    "code": {"a": Touch()},
    "a list": [],
    "a number as tensor": {"a": 1},
}
BAD_CONFIGS = {
    "missing": None,
    "a list": b"[]",
    "no JSON": b"{",
    "another model": changed_config(model_type="roberta"),
    "another activation": changed_config(hidden_act="relu"),
    "other positions": changed_config(position_embedding_type="relative_key"),
    "a decoder": changed_config(is_decoder=True),
    "quantised": changed_config(quantization_config={"load_in_8bit": True}),
    "no width": changed_config(hidden_size=None),
    "heads that do not divide the width": changed_config(num_attention_heads=5),
    "no heads": changed_config(num_attention_heads=0),
}
BAD_VOCABULARIES = {
    "missing": None,
    "not UTF-8": b"\xff",
    "no special tokens": b"[PAD]\n[UNK]\na",
    "59 tokens": "\n".join(tiny.WORDS[:-1]).encode(),
    "61 tokens": "\n".join([*tiny.WORDS, "more"]).encode(),
}
BAD_FILES = [
    (file, what, content)
    for file, contents in (
        ("model.safetensors", BAD_WEIGHTS), ("pytorch_model.bin", BAD_BINS),
        ("config.json", BAD_CONFIGS), ("vocab.txt", BAD_VOCABULARIES))
    for what, content in contents.items()]


@pytest.mark.parametrize(
    "file, content", [(file, content) for file, _, content in BAD_FILES],
    ids=[f"{file}, {what}" for file, what, _ in BAD_FILES])
def test_bad_model_files(folder, monkeypatch, capsys, file, content):
    """Missing, cut, wrong or lacking something: refused by name, on the command line with exit
    code 2 and one line; no file can run code, and nothing is written."""
    monkeypatch.chdir(folder)
    Path("model.safetensors" if file == "pytorch_model.bin" else file).unlink()
    if isinstance(content, bytes):
        Path(file).write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    there = sorted(folder.rglob("*"))
    with pytest.raises(AFLoRAError, match=file):
        glue.load_model(folder, 0, CPU)
    capsys.readouterr()
    assert run_main(folder) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert file in message
    assert sorted(folder.rglob("*")) == there


@pytest.mark.parametrize("kind, dtype", [
    ("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16),
    ("BF16", torch.bfloat16), ("I64", torch.int64), ("I32", torch.int32), ("I16", torch.int16),
    ("I8", torch.int8), ("U8", torch.uint8), ("BOOL", torch.bool)])
def test_every_type_in_a_file_of_weights(tmp_path, kind, dtype):
    """The tensors of a .safetensors file have the type, shape and values that it names."""
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    content = tiny.safetensors({"a": tensor.view(torch.uint8)}, dtype=kind, shape=[2, 3])
    (tmp_path / "model.safetensors").write_bytes(content)
    there = read_weights(tmp_path / "model.safetensors")
    assert there.keys() == {"a"} and there["a"].dtype == dtype
    assert torch.equal(there["a"], tensor)


def test_float64_weights_are_used_in_float32(folder):
    """Hugging Face's files may hold them."""
    tensors = {name: tensor.double() for name, tensor in tiny.checkpoint().items()}
    (folder / "model.safetensors").write_bytes(tiny.safetensors(tensors, dtype="F64"))
    weight = glue.Bert.load(folder).layers[1].output.weight
    assert torch.equal(weight, tiny.checkpoint()["encoder.layer.1.output.dense.weight"])


@pytest.mark.parametrize("vocabulary, what", [
    (BAD_VOCABULARIES["59 tokens"], "59 tokens, weights 60"),
    (BAD_VOCABULARIES["61 tokens"], "61 tokens, weights 60")])
def test_a_vocabulary_of_another_size(folder, capsys, vocabulary, what):
    """A vocabulary that does not number the rows of the embeddings: both counts are named."""
    (folder / "vocab.txt").write_bytes(vocabulary)
    assert run_main(folder) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("settings, word", [
    ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
    ({"strip_accents": False}, "strip_accents"),
    ({"do_lower_case": False, "strip_accents": True}, "strip_accents"),
])
def test_another_tokenizer_is_refused(folder, capsys, settings, word):
    """Settings under which the ids would be wrong are named on the command line, too."""
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run_main(folder) == 2
    message = capsys.readouterr().err
    assert "tokenizer_config.json" in message and word in message
    assert message.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize("lower", [True, False])
def test_the_folder_s_tokenizer_is_used(folder, lower):
    """load_model's tokenizer makes letters small as tokenizer_config.json says."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    _, tokenizer, _ = glue.load_model(folder, 0, CPU)
    ids = tokenizer.tokens("Good")
    assert ids == [tokenizer.vocab["good" if lower else "[UNK]"]]
