"""The tokenizer: the very ids and segments that Hugging Face's gives.

The reference is transformers' BertTokenizerFast, which AutoTokenizer gives, too, and which cuts a
pair by one rule in all versions from 4.50 to 5.24: of an odd room for two long texts the longer
has a token more, of two equally long ones the second. (Versions up to 4 have a slow BertTokenizer
besides, by which the first has it: that one is not compared.)
"""

import functools
import itertools
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest

import tiny
from aflora import AFLoRAError
from data.text import WordPieceTokenizer, load_task, load_tokenizer

# All characters of Unicode 3.2. Hugging Face's tables are those of Unicode 8, Python's are newer:
# what came or changed its class since, four of these among it, may be split or dropped differently.
OLD = [c for c in map(chr, range(0x30000))
       if c not in "\u166d\u1734\u1885\u1886"
       and unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")]
STRANGE = [
    "",
    " \t\n\r ",
    "Café NAÏVE Ångström ﬁne ﬃ",
    "漢字かな한국어 mixed漢with字latin \uf900\U00020001",
    "👩‍👩‍👧‍👦 👍🏽 🇺🇳 ❤️☃",
    "a\0b\ufffdc\x07d\x7fe\x85f\x1cg",
    "x" * 300,
    "a" * 100 + " " + "a" * 101,
    "[CLS] a[SEP]b [MASK]s [PAD][UNK] [cls] [ SEP ] [[SEP]]",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ ς",
    "İstanbul Iıi̇ ẞß",
    "e\u0301\u0327 \u0301 a\u0300\u0316\u0345 ệ",
    "soft\u00adhyphen zero\u200bwidth\u200d\ufeff",
    "line\u2028para\u2029nbsp\u00a0thin\u2009ideo\u3000x",
    "\ue000a\uf8ffb\U000f0000",
    "¡¿«…—‘’“§•",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "don't U.S.A. 3.14 $5 50% a_b a-b",
    "١٢٣ हिन्दी ไทย עִבְ"]
PAIRS = [list(texts) for texts in zip(*itertools.product(STRANGE, STRANGE))]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with a vocab.txt of words and pieces, and of many letters, alone and as pieces."""
    others = map(ord, "漢字豈\U00020001👩👍")
    letters = [c for c in map(chr, [*range(0x3000), *others])
               if unicodedata.category(c)[0] not in "CZ"]
    tokens = tiny.WORDS + ["don", "cafe", "##gs", "##trom"]
    tokens += letters + ["##" + c for c in letters]
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return folder


@functools.lru_cache
def both(folder, lower):
    """(our tokenizer, Hugging Face's) of a folder."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertTokenizerFast.from_pretrained(folder, do_lower_case=lower)
    return WordPieceTokenizer(folder / "vocab.txt", lower), reference


def compare(folder, texts, pairs=None, max_length=128, lower=True):
    """Asserts that the ids and segments of all texts, or pairs of texts, are Hugging Face's."""
    ours, reference = both(folder, lower)
    theirs = reference(texts, pairs, truncation=True, max_length=max_length)
    expected = zip(theirs["input_ids"], theirs["token_type_ids"])
    for text, pair, encoded in zip(texts, pairs or [None] * len(texts), expected):
        assert (text, pair, ours.encode(text, pair, max_length)) == (text, pair, encoded)


@pytest.mark.parametrize("max_length", [3, 4, 5, 8, 9, 16, 31, 128])
@pytest.mark.parametrize("lower", [True, False])
def test_strange_texts_and_pairs(vocabulary, lower, max_length):
    """Scripts, accents, emoji, control characters, special tokens; cut to odd and even lengths."""
    compare(vocabulary, STRANGE, None, max_length, lower)
    compare(vocabulary, *PAIRS, max_length, lower)


@pytest.mark.parametrize("lower", [True, False])
def test_each_character_between_letters(vocabulary, lower):
    """Whether a character splits a word, stands alone, stays, or is dropped."""
    words = [f"a{c}B" for c in OLD]
    lines = [" ".join(words[i:i + 99]) for i in range(0, len(words), 99)]
    assert len(lines) > 900
    compare(vocabulary, lines, None, 999, lower)


@pytest.mark.parametrize("lower", [True, False])
def test_random_mixtures(vocabulary, lower):
    """3,000 texts of random characters and words, and as many pairs of them."""
    draw = random.Random(0)
    accents = [*map(chr, range(0x300, 0x370))]
    emoji = [*map(chr, range(0x1f300, 0x1f650))]
    kinds = [OLD[:256], OLD, STRANGE, tiny.WORDS, " ", accents, emoji]
    texts = []
    for _ in range(3000):
        parts = [draw.choice(draw.choice(kinds)) for _ in range(draw.randint(0, 15))]
        texts.append("".join(parts))
    compare(vocabulary, texts, texts[::-1], 30, lower)


@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_real_text(task):
    """The same with MiniLM's vocabulary on SST-2 and MRPC, where these are."""
    folder = Path(os.environ.get("AFLORA_TEST_MODEL") or "-")
    data = Path(os.environ.get("AFLORA_DATA") or "-")
    if not folder.is_dir() or not data.is_dir():
        pytest.skip("AFLORA_TEST_MODEL or AFLORA_DATA names no folder")
    rows = load_task(task, data)
    texts, pairs, _ = map(list, zip(*rows.dev, *rows.train[:2000]))
    for max_length in (128, 33):
        compare(folder, texts, pairs if pairs[0] else None, max_length)
    compare(folder, *PAIRS)


@pytest.mark.parametrize("first, second, room, expected", [
    (9, 9, 4, (2, 2)),
    (9, 9, 5, (2, 3)),  # equally long: the second has one more
    (9, 8, 5, (3, 2)),
    (8, 9, 5, (2, 3)),
    (2, 9, 5, (2, 3)),  # a short one stays whole
    (1, 9, 5, (1, 4)),
    (9, 1, 5, (4, 1)),
    (3, 2, 5, (3, 2)),
    (9, 9, 0, (0, 0)),
])
def test_how_a_pair_is_cut(vocabulary, first, second, room, expected):
    """By hand: how many tokens stay of two texts when there is room for so many."""
    tokenizer = WordPieceTokenizer(vocabulary / "vocab.txt")
    good = tokenizer.vocab["good"]
    bad = tokenizer.vocab["bad"]
    ids, segments = tokenizer.encode("good " * first, "bad " * second, room + 3)
    start = tokenizer.vocab["[CLS]"]
    end = tokenizer.vocab["[SEP]"]
    assert ids == [start, *[good] * expected[0], end, *[bad] * expected[1], end]
    assert segments == [0] * (expected[0] + 2) + [1] * (expected[1] + 1)


# --------------------------------------------------------------------- the settings of a folder
@pytest.mark.parametrize("settings, words", [
    (None, ["cafe"]),
    ({}, ["cafe"]),
    ({"do_lower_case": True, "strip_accents": None}, ["cafe"]),
    ({"do_lower_case": True, "strip_accents": True}, ["cafe"]),
    ({"do_lower_case": False}, ["Café"]),
    ({"do_lower_case": False, "strip_accents": False}, ["Café"]),
    ({"tokenize_chinese_chars": True}, ["cafe"]),
    ({"tokenizer_class": "BertTokenizerFast", "never_split": None}, ["cafe"]),
    ({"added_tokens_decoder": {"0": {"content": "[PAD]", "special": True}}}, ["cafe"]),
    ({"additional_special_tokens": [], "extra_special_tokens": []}, ["cafe"]),
])
def test_usual_settings_are_taken(folder, settings, words):
    """tokenizer_config.json says whether letters become small and lose their accents."""
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.words("Café") == words


@pytest.mark.parametrize("settings, word", [
    ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
    ({"strip_accents": False}, "strip_accents"),
    ({"do_lower_case": False, "strip_accents": True}, "strip_accents"),
    ({"do_basic_tokenize": False}, "do_basic_tokenize"),
    ({"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer"),
    ({"additional_special_tokens": ["[unused1]"]}, "unused1"),
    ({"extra_special_tokens": [{"content": "[unused1]"}]}, "unused1"),
    ({"never_split": ["film"]}, "film"),
    ({"added_tokens_decoder": {"9": {"content": "<e>"}}}, "<e>"),
    ([1], ""),
    ("{", ""),
])
def test_other_settings_are_refused(folder, settings, word):
    """Where these ids would be wrong ones the file and the setting are named."""
    path = folder / "tokenizer_config.json"
    path.write_text(settings if settings == "{" else json.dumps(settings))
    with pytest.raises(AFLoRAError, match=f"^{path}: .*{word}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file, content", [
    ("special_tokens_map.json", {"additional_special_tokens": ["<e>"]}),
    ("added_tokens.json", {"<e>": 60}),
    ("tokenizer.json", {"added_tokens": [{"id": 60, "content": "<e>"}]}),
])
def test_added_tokens_in_other_files_are_refused(folder, file, content):
    """Hugging Face would keep them whole."""
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(AFLoRAError, match=f"{file}: .*<e>"):
        load_tokenizer(folder)


def test_spaces_behind_a_token_are_not_part_of_it(folder):
    """Some files have them; transformers trims them."""
    path = folder / "vocab.txt"
    before = load_tokenizer(folder).vocab
    path.write_text(path.read_text().replace("good\n", "good \n"))
    assert "good \n" in path.read_text()
    assert load_tokenizer(folder).vocab == before


@pytest.mark.parametrize("lower", [True, False])
def test_a_folder_as_transformers_5_saves_it(folder, tmp_path, lower):
    """Without vocab.txt, the vocabulary is that of tokenizer.json; an added token is noticed."""
    transformers = pytest.importorskip("transformers", minversion="5")
    path = folder / "vocab.txt"
    reference = transformers.BertTokenizer(vocab=str(path), do_lower_case=lower)
    expected = load_tokenizer(folder).vocab
    path.unlink()
    reference.save_pretrained(folder)
    assert not path.exists()
    ours = load_tokenizer(folder)
    assert ours.vocab == expected
    for text in STRANGE:
        assert ours.encode(text)[0] == reference(text)["input_ids"]
    reference.add_tokens(["<e>"])
    reference.save_pretrained(folder)
    with pytest.raises(AFLoRAError, match="tokenizer.json: .*<e>"):
        load_tokenizer(folder)


BERTS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}


@pytest.mark.parametrize("lower, vocabulary, word", [
    (True, BERTS, None),
    (True, {"[PAD]": 0}, "lacks"),
    (True, [["[PAD]", 0]], ""),
    (True, BERTS | {"good": 4}, "ids"),
    (True, BERTS | {"good": 6}, "ids"),
    (True, BERTS | {"good": 5.5}, "ids"),
    (True, BERTS | {"good": "x"}, ""),
    (False, BERTS, "lowercase is False"),  # without tokenizer_config.json an uncased one is assumed
])
def test_a_tokenizer_json_in_place_of_a_vocabulary(folder, lower, vocabulary, word):
    """BERT's special tokens have to be there, ids from 0 on, and letters in the case it says."""
    (folder / "vocab.txt").unlink()
    content = {"model": {"vocab": vocabulary}, "normalizer": {"lowercase": lower}}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    if word is None:
        assert load_tokenizer(folder).vocab == BERTS
        return
    with pytest.raises(AFLoRAError, match=f"tokenizer.json.*{word}"):
        load_tokenizer(folder)
    path.write_text(json.dumps(content)[:-9])
    with pytest.raises(AFLoRAError, match="tokenizer.json"):
        load_tokenizer(folder)
