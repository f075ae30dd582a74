"""From text files to token ids: the tables of SST-2 and MRPC, and BERT's tokenizer.

The files come from data/fetch.py; data/batches.py builds batches from what is made here.
"""

import functools
import json
import re
import types
import unicodedata
from pathlib import Path

from aflora import AFLoRAError, blame, expect_equal
from data.fetch import MRPC, MRPC_DEV, SNIPPETS, STAND_IN, fetch


def read_table(path, header, label=None):
    """Rows of a tab-separated file, as strings. label: its column; then line 1 is the header."""
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
    rows = rows if label is None else rows[1:]
    if not rows:
        raise AFLoRAError(f"{path} has no rows")
    return rows


def load_task(name, folder=None):
    """Task "sst2" or "mrpc" from `folder`, else fetched: title, source, train and dev.

    Rows are (text, second text or None, label). If no source of SST-2 answers, movie snippets stand
    in for it, and the title says so.
    """
    if name == "mrpc":
        return load_mrpc(fetch(MRPC, folder), fetch(MRPC_DEV, folder))
    try:
        paths = [fetch(f"SST-2/{part}.tsv", folder) for part in ("train", "dev")]
    except ConnectionError:
        return load_snippets(fetch(SNIPPETS))
    parts = []
    for path in paths:
        rows = read_table(path, ["sentence", "label"], label=1)
        parts.append([(text, None, int(label)) for text, label in rows])
    source = str(paths[0].parent)
    train, dev = parts
    return types.SimpleNamespace(title="SST-2", source=source, train=train, dev=dev)


def load_tasks(names, folder=None):
    """({name: task} for those that can be had, notes that say what is missing or stands in)."""
    tasks = {}
    notes = []
    for name in names:
        try:
            tasks[name] = load_task(name, folder)
            if tasks[name].title == STAND_IN:
                notes.append(f"NOT SST-2: {STAND_IN}")
        except ConnectionError as error:
            notes.append(f"{name} is skipped: {error}")
    if not tasks:
        raise ConnectionError("; ".join(notes))
    return tasks, notes


def load_snippets(path):
    """Movie snippets: positive where the mean rating is above 0; every tenth row is dev."""
    train = []
    dev = []
    table = read_table(path, ("id", "mean rating", "text"))
    for index, (_, rating, text) in enumerate(table):
        part = dev if index % 10 == 9 else train
        part.append((text, None, int(float(rating) > 0)))
    return types.SimpleNamespace(title=STAND_IN, source=str(path), train=train, dev=dev)


def load_mrpc(path, dev_path):
    """MRPC: rows whose pair of ids is listed in the file at dev_path are dev, all others train."""
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    dev_ids = {tuple(ids) for ids in read_table(dev_path, ("id", "id"))}
    train = []
    dev = []
    for quality, *ids, text, pair in read_table(path, header, label=0):
        part = dev if tuple(ids) in dev_ids else train
        part.append((text, pair, int(quality)))
    if not train or not dev:
        raise AFLoRAError(f"{dev_path} makes {len(train)} rows of {path} train, {len(dev)} dev")
    return types.SimpleNamespace(title="MRPC", source=str(path), train=train, dev=dev)


CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")


class WordPieceTokenizer:
    """BERT's WordPiece (arXiv 1810.04805): Hugging Face's ids, for characters of Unicode 8.

    vocab_path: a vocab.txt, or the tokenizer.json of one. lower_case: also drops accents.
    """

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, vocab_path, lower_case=True):
        with blame(vocab_path):
            self.vocab = read_vocabulary(Path(vocab_path))
        self.lower_case = lower_case
        for token in self.SPECIAL:
            if token not in self.vocab:
                raise AFLoRAError(f"{vocab_path} lacks {token}: not a BERT vocabulary")
        remember = functools.lru_cache(maxsize=100_000)  # most words recur
        self.pieces = remember(self.pieces)
        self.replacements = Remembered(self.replacement)

    def words(self, text):
        """Splits a text at white space, punctuation and Chinese characters."""
        return text.translate(self.replacements).split()

    def replacement(self, character):
        """What a character becomes, whatever its neighbours: no final sigma, for instance."""
        if not has_shape(character):
            return ""
        if self.lower_case:  # and without accents
            parts = unicodedata.normalize("NFD", character)
            character = "".join(c.lower() for c in parts if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if is_a_word(c) else c for c in character)

    def pieces(self, word):
        """Ids of the longest pieces of the vocabulary, from left to right; [UNK] if none fits."""
        ids = []
        start = 0
        end = len(word)
        while start < end <= 100:
            piece = ("##" if start else "") + word[start:end]
            if piece in self.vocab:
                ids.append(self.vocab[piece])
                start = end
                end = len(word)
            else:
                end -= 1
        if not ids or start < len(word):
            return [self.vocab["[UNK]"]]
        return ids

    def tokens(self, text):
        """The ids of a text, of any length; special tokens written in it are taken as such."""
        ids = []
        for part in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", text):
            words = [part] if part in self.SPECIAL else self.words(part)
            for word in words:
                ids += self.pieces(word)
        return ids

    def encode(self, text, pair=None, max_length=128):
        """(ids, segment_ids) of [CLS] text [SEP] and, if any, pair [SEP]; the longer is cut."""
        first = self.tokens(text)
        second = self.tokens(pair or "")
        room = max_length - 2  # for [CLS] and [SEP]
        if pair is not None:
            room -= 1
        half = (room + (len(first) > len(second))) // 2  # if room is odd, the longer has one more
        cut = max(half, room - len(second))
        pair_cut = max(room - half, room - len(first))
        first = [self.vocab["[CLS]"], *first[:cut], self.vocab["[SEP]"]]
        second = [] if pair is None else [*second[:pair_cut], self.vocab["[SEP]"]]
        return first + second, [0] * len(first) + [1] * len(second)


class Remembered(dict):
    """{code of a character: what a function makes of it}, computed when it is first asked for."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __missing__(self, code):
        self[code] = self.function(chr(code))
        return self[code]


def has_shape(c):
    """False for control characters and the like, but True for white space."""
    if c in "\t\n\r":
        return True
    if c in "\0\ufffd":
        return False
    return unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs")


def is_a_word(c):
    """True for Chinese characters and punctuation; BERT counts some symbols among the latter."""
    return bool(CHINESE.match(c)) or unicodedata.category(c).startswith("P") or c in "$+<=>^`|~"


def read_vocabulary(path):
    """{token: id} of a file with one token per line, or of a tokenizer.json."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        vocab = json.loads(text)["model"]["vocab"]
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise AFLoRAError("the ids of its vocabulary are not 0, 1, 2 and so on")
        return vocab
    tokens = text.removesuffix("\n").split("\n")
    return {token.rstrip(): i for i, token in enumerate(tokens)}


def load_tokenizer(folder):
    """The tokenizer of a Hugging Face folder. AFLoRAError if Hugging Face's ids would differ.

    A folder without tokenizer_config.json is assumed to hold an uncased model.
    """
    path = Path(folder, "tokenizer_config.json")
    with blame(path):
        config = dict(do_lower_case=True)
        if path.exists():
            config |= json.loads(path.read_bytes())
        name = config.get("tokenizer_class") or "BertTokenizer"
        config["tokenizer_class"] = name.removesuffix("Fast")
        known = dict(tokenizer_class="BertTokenizer", do_basic_tokenize=True,
                     tokenize_chinese_chars=True, strip_accents=config["do_lower_case"])
        there = {key: config[key] for key in known if config.get(key) is not None}
        expect_equal(known | there, known)
    check_added_tokens(folder)
    vocab_path = Path(folder, "vocab.txt")
    whole_tokenizer = Path(folder, "tokenizer.json")
    if whole_tokenizer.exists() and not vocab_path.exists():  # transformers 5 saves that alone
        vocab_path = whole_tokenizer
        with blame(vocab_path):
            normalizer = json.loads(vocab_path.read_bytes())["normalizer"]
            known = dict(lowercase=config["do_lower_case"])
            expect_equal(dict(lowercase=normalizer["lowercase"]), known)
    return WordPieceTokenizer(vocab_path, config["do_lower_case"])


def check_added_tokens(folder):
    """AFLoRAError if a folder's files keep tokens whole other than BERT's five special ones.

    Hugging Face's tokenizers look for added tokens in a text before they split it into words.
    """
    for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                 "tokenizer.json"):
        path = Path(folder, file)
        if not path.exists():
            continue
        with blame(path):
            content = json.loads(path.read_bytes())
            tokens = list(content.get("added_tokens_decoder", {}).values())
            for key in ("additional_special_tokens", "extra_special_tokens", "never_split"):
                tokens += content.get(key) or []
            if file == "added_tokens.json":
                tokens = list(content)
            if file == "tokenizer.json":
                tokens = content.get("added_tokens", [])
            names = [token["content"] if isinstance(token, dict) else token for token in tokens]
            if not set(names) <= set(WordPieceTokenizer.SPECIAL):
                raise AFLoRAError(f"tokens were added, {names}: only BERT's own are supported")
