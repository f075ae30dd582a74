"""What tests and benchmarks work on: a small net with the names of a transformer, and a tiny BERT.

Tests in this folder say `import tiny`. A file elsewhere puts the folder on Python's path before:

    sys.path.insert(0, str(ROOT / "tests"))

Everything random here comes from a fixed seed.
"""

import json
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

from aflora import AdaptiveFreezer, add_adapters, adapters_of, save_checkpoint, train


# -------------------------------------------------------------------------------------- a small net
class Block(nn.Module):
    """One block of Net: x (..., width) -> (..., width)."""

    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.norm(x + torch.tanh(self.query(x)))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Some blocks and a head: x (..., width) -> (..., classes)."""

    def __init__(self, width=8, depth=2, classes=2):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted(targets=("query", "up", "down"), modules_to_save=("head",), depth=2, **options):
    """(Net, its adapters): twelve matrices that train, or what `options` of add_adapters say."""
    torch.manual_seed(0)
    model = Net(depth=depth)
    layers = add_adapters(model, targets, modules_to_save=modules_to_save, **options)
    return model, layers


def data(batches=8, size=16, width=8, seed=0):
    """A list of batches (x (size, width), labels (size,)): have x[0] and x[1] one sign?"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, size, width, generator=generator)
    labels = (x[..., 0] * x[..., 1] > 0).long()
    return list(zip(x, labels))


def loss_of(model, batch):
    """The mean cross-entropy over one of data()'s batches."""
    x, labels = batch
    return F.cross_entropy(model(x).float(), labels)


def perturb(model):
    """Moves every adapter parameter away from its start, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(1)
    for layer in adapters_of(model).values():
        for p in layer.parameters(recurse=False):
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)


def run(model, layers, epochs=10, t_i=0.1, t_f=0.3, batches=None, freezer=None, **options):
    """train() with a freezer whose t_i and t_f are shares of all steps: (freezer, Training)."""
    if batches is None:
        batches = data()
    total_steps = epochs * math.ceil(len(batches) / options.get("accumulate", 1))
    if freezer is None:
        freezer = AdaptiveFreezer(
            layers, total_steps, round(t_i * total_steps), round(t_f * total_steps))
    training = train(model, lambda epoch: batches, loss_of, epochs=epochs, lr=1e-2,
                     weight_decay=0.1, freezer=freezer, **options)
    return freezer, training


def resumable(precision="fp32", loss=None, seed=5, **options):
    """A run of 60 steps, three an epoch, that is easily disturbed: (numbers, tensors) of its end.

    It has dropout, micro-batches, and four matrices, of a single block, which freeze one by one
    from step 10 to 44; in fp16 the scaler overflows at its start. seed: of the dropout. options:
    train()'s after_step and resume.
    """
    def dropout_loss(model, batch):
        x, labels = batch
        factor = 1e4 if precision == "fp16" else 1.0
        return factor * loss_of(model, (F.dropout(x, 0.3, model.training), labels))

    model, layers = adapted(depth=1, train_matrices=["up", "down"])
    torch.manual_seed(seed)
    freezer = AdaptiveFreezer(layers, 60, 6, 16)
    training = train(
        model, lambda epoch: data(batches=6, seed=epoch), loss or dropout_loss, epochs=20,
        accumulate=2, lr=1e-2, weight_decay=0.1, precision=precision,
        freezer=freezer, **options)
    numbers = {"last line": training.line, "frozen_at": freezer.frozen_at, "step": freezer.step,
               "average": freezer.average_trainable()}
    scores = {f"Ibar {name}": value for name, value in freezer.Ibar.items()}
    scores |= {f"Ubar {name}": value for name, value in freezer.Ubar.items()}
    tensors = model.state_dict() | scores | {"random": torch.get_rng_state()}
    return numbers, tensors


def stop_after(step, path):
    """An after_step of train() that saves a checkpoint after that step, and stops the run."""
    def after_step(training):
        if training.steps == step:
            save_checkpoint(training, path)
            raise KeyboardInterrupt

    return after_step


def live(freezer, scores):
    """Running scores of a freezer's live matrices, Ibar or Ubar, end to end in one tensor."""
    return torch.cat([scores[name] for name in freezer.live])


def epoch_ends(lines):
    """An after_step of train() that appends to `lines` the log's line of each epoch's end."""
    def after_step(training):
        if training.steps % training.steps_per_epoch == 0:
            lines.append(training.line)

    return after_step


def assert_same_run(one, other):
    """Two results of resumable() agree to the last bit."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


def deberta():
    """The linear modules of DeBERTaV3-base's twelve blocks: shapes without values."""
    blocks = nn.ModuleList()
    for _ in range(12):
        block = nn.ModuleDict({name: nn.Linear(768, 768, device="meta") for name in "qkvo"})
        block["up"] = nn.Linear(768, 3072, device="meta")
        block["down"] = nn.Linear(3072, 768, device="meta")
        blocks.append(block)
    return blocks


# -------------------------------------------------------------------------------------- a tiny BERT
CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "vocab_size": 60, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK] a the good bad fine poor movie film plot is was not ##s"
         .split(), *(f"word{i}" for i in range(42))]
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def checkpoint(inner=48):
    """{Hugging Face's name: random tensor} of a BERT as CONFIG has it."""
    shapes = {"embeddings.LayerNorm": (32,)}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes[f"{layer}.attention.self.{part}"] = (32, 32)
        shapes[f"{layer}.attention.output.dense"] = (32, 32)
        shapes[f"{layer}.attention.output.LayerNorm"] = (32,)
        shapes[f"{layer}.intermediate.dense"] = (inner, 32)
        shapes[f"{layer}.output.dense"] = (32, inner)
        shapes[f"{layer}.output.LayerNorm"] = (32,)
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    tables = {f"embeddings.{name}_embeddings.weight": (size, 32)
              for name, size in (("word", 60), ("position", 128), ("token_type", 2))}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator)
            for name, shape in (weights | biases | tables).items()}


def safetensors(tensors, **changed):
    """The bytes of a .safetensors file; `changed` replaces fields of every tensor's entry."""
    header = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, tensor in tensors.items():
        values = tensor.numpy().tobytes()
        entry = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(content), len(content) + len(values)],
        }
        header[name] = entry | changed
        content += values
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + content


def make_folder(path):
    """Fills a folder with the tiny BERT, SST-2 (24 + 9 rows) and MRPC (16 + 4), and returns it.

    MRPC's file begins with a byte-order mark and has quotes in it, as the real one.
    """
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (path / "model.safetensors").write_bytes(safetensors(checkpoint()))
    (path / "SST-2").mkdir()
    for part, count in (("train", 24), ("dev", 9)):
        rows = [f'a film {"is " * (i % 5)}{("bad", "good")[i % 2]}\t{i % 2}' for i in range(count)]
        (path / f"SST-2/{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    (path / "MRPC").mkdir()
    rows = [f'{i % 2}\t{i}\t{i + 50}\t"a film "{i}\tthe plot\'s "good\r\n' for i in range(20)]
    (path / "MRPC/msr_paraphrase_train.txt").write_bytes(
        ("\ufeff" + MRPC_HEADER + "".join(rows)).encode())
    (path / "MRPC/dev_ids.tsv").write_text("0\t50\n3\t53\n4\t54\n19\t69\n")
    return path


def load_tiny(folder):
    """(classifier, tokenizer) of make_folder's BERT."""
    import train_glue_small as glue  # here, since aflora.py's own tests can do without it
    from data.text import WordPieceTokenizer
    model = glue.BertClassifier(glue.Bert.load(folder))
    return model, WordPieceTokenizer(folder / "vocab.txt")


def random_rows(count, longest):
    """Rows (text, second text or None, label) of WORDS; every third has a second text."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[5:-1], k=draw.randint(1, longest))) for _ in range(count)]
    rows = []
    for i, text in enumerate(texts):
        pair = texts[-i] if i % 3 == 0 else None
        rows.append((text, pair, i % 2))
    return rows
