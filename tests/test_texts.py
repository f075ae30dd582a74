"""SST-2, MRPC and the movie snippets as rows, and rows as batches."""

import json

import pytest
import torch

import tiny
import train_glue_small as glue
from aflora import AFLoRAError
from data import fetch as sources
from data.text import WordPieceTokenizer, load_task, read_table


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Batches are as long as their longest text; what CUDA adds is tested in test_graphs.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ------------------------------------------------------------------------------------- the tasks
def test_sst2(folder):
    """Rows, labels and splits of SST-2, by a reading of its own."""
    task = load_task("sst2", folder)
    assert (task.title, task.source) == ("SST-2", str(folder / "SST-2"))
    assert (len(task.train), len(task.dev)) == (24, 9)
    for part, rows in (("train", task.train), ("dev", task.dev)):
        lines = (folder / f"SST-2/{part}.tsv").read_text().splitlines()[1:]
        assert rows == [(line[:-2], None, int(line[-1])) for line in lines]
    assert task.train[4] == ("a film is is is is bad", None, 0)


def test_mrpc(folder):
    """Rows, labels and splits of MRPC: quotes are kept, the byte-order mark is dropped."""
    task = load_task("mrpc", folder)
    path = folder / "MRPC/msr_paraphrase_train.txt"
    assert (task.title, task.source) == ("MRPC", str(path))
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    rows = [(f'"a film "{i}', 'the plot\'s "good', i % 2) for i in range(20)]
    assert task.dev == [rows[i] for i in (0, 3, 4, 19)]
    assert task.train == [row for i, row in enumerate(rows) if i not in (0, 3, 4, 19)]


def test_movie_snippets_stand_in_for_sst2(monkeypatch, tmp_path):
    """Where SST-2 cannot be had: positive is a rating above 0, 0 itself is not; every tenth row is
    dev; the title says what it is."""
    ratings = [f"{i % 7 - 3}.5" for i in range(28)] + ["0", "0.0", "-0.0", "0.05", "-0.05"]
    lines = [f"{i}\t{rating}\tsnippet {i}\r\n" for i, rating in enumerate(ratings)]
    path = tmp_path / "snippets.txt"
    path.write_bytes("".join(lines).encode())

    def fetch(name, folder=None):
        if name != sources.SNIPPETS:
            raise ConnectionError(f"no {name}")
        return path

    monkeypatch.setattr("data.text.fetch", fetch)
    task = load_task("sst2")
    assert (task.title, task.source) == (sources.STAND_IN, str(path))
    assert task.title.startswith("movie snippets")
    rows = [(f"snippet {i}", None, int(not rating.startswith("-") and rating not in ("0", "0.0")))
            for i, rating in enumerate(ratings)]
    assert [row[2] for row in rows[28:]] == [0, 0, 0, 1, 0]
    assert task.dev == [rows[i] for i in (9, 19, 29)]
    assert task.train == [row for i, row in enumerate(rows) if i % 10 != 9]


def test_missing_texts_of_a_folder_of_yours_are_named(folder):
    """Movie snippets do not stand in for what a given folder lacks."""
    with pytest.raises(AFLoRAError, match=f"{folder / 'MRPC/SST-2/train.tsv'} is missing"):
        load_task("sst2", folder / "MRPC")


SENTENCES = "sentence\tlabel\n"


@pytest.mark.parametrize("file, content, message", [
    ("SST-2/dev.tsv", None, "missing"),
    ("SST-2/dev.tsv", "", "line 1"),
    ("SST-2/dev.tsv", SENTENCES, "no rows"),
    ("SST-2/train.tsv", "\udcff\t1\n", "UTF-8"),
    ("SST-2/train.tsv", "text\tlabel\ngood\t1\n", "line 1: the header"),
    ("SST-2/train.tsv", SENTENCES + "good\t1\nbad\n", "line 3: 1 columns"),
    ("SST-2/train.tsv", SENTENCES + "good\t1\nbad\tfilm\t0\n", "line 3: 3 columns"),
    ("SST-2/dev.tsv", SENTENCES + "good\t1\nbad\t-1\n", "line 3: label"),
    ("SST-2/dev.tsv", SENTENCES + "good\t1\nbad\t\n", "line 3: label"),
    ("MRPC/dev_ids.tsv", None, "missing"),
    ("MRPC/dev_ids.tsv", "1\n", "line 1: 1 columns"),
    ("MRPC/dev_ids.tsv", "777\t888\n", "makes 20 rows of .* train, 0 dev"),
    ("MRPC/dev_ids.tsv", "".join(f"{i}\t{i + 50}\n" for i in range(20)), "makes 0 rows"),
    ("MRPC/msr_paraphrase_train.txt", tiny.MRPC_HEADER + "1\t1\t2\ta\n", "line 2: 4 columns"),
    ("MRPC/msr_paraphrase_train.txt", tiny.MRPC_HEADER + "x\t1\t2\ta\tb\n", "line 2: label"),
    ("MRPC/msr_paraphrase_train.txt", "x" + tiny.MRPC_HEADER + "1\t1\t2\ta\tb\n",
     "line 1: the header"),
])
def test_bad_texts(folder, file, content, message):
    """A text file that is missing or not as it should be is refused with its name and the line."""
    path = folder / file
    path.unlink()
    if content is not None:
        path.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(AFLoRAError, match=f"{path}.*{message}"):
        load_task("mrpc" if "MRPC" in file else "sst2", folder)


@pytest.mark.parametrize("text, rows", [
    ("a\tb\nc\td\n", [["a", "b"], ["c", "d"]]),
    ("a\tb\nc\td", [["a", "b"], ["c", "d"]]),
    ("\ufeffa\tb\r\nc\td\r\n", [["a", "b"], ["c", "d"]]),
    ('"a\t"b\n', [['"a', '"b']]),
    ("a\u2028b\x0bc\t\x85d\n", [["a\u2028b\x0bc", "\x85d"]]),  # only a line feed ends a line
])
def test_lines_of_a_table(tmp_path, text, rows):
    """A table is split at tabs and line feeds, and nowhere else."""
    path = tmp_path / "table.tsv"
    path.write_bytes(text.encode())
    assert read_table(path, ("one", "two")) == rows


# ----------------------------------------------------------------------------------- the batches
@pytest.fixture
def rows():
    """601 rows of the tiny vocabulary's words."""
    return tiny.random_rows(601, 50)


@pytest.fixture
def tokenizer(folder):
    """The tiny BERT's."""
    return WordPieceTokenizer(folder / "vocab.txt")


def pairs_in(batches):
    """(ids without padding, label) of every row in some batches."""
    return [(ids[mask].tolist(), int(label)) for batch in batches
            for ids, _, mask, label in zip(*batch)]


def test_every_row_comes_once_in_an_epoch(rows, tokenizer):
    """All rows and their own labels, in 76 batches of at most 8."""
    examples = glue.Examples(rows, tokenizer)
    batches = examples.batches(8, 0, 0)
    assert len(batches) == 76
    sizes = [len(labels) for *_, labels in batches]
    assert sorted(sizes) == [1] + [8] * 75
    expected = [(tokenizer.encode(text, pair)[0], label) for text, pair, label in rows]
    assert sorted(pairs_in(batches)) == sorted(expected)


def test_the_order_comes_from_seed_and_epoch(rows, tokenizer):
    """The same for the same seed and epoch, another for another of either."""
    examples = glue.Examples(rows, tokenizer)
    runs = [list(examples.batches(8, seed, epoch)) for seed, epoch in (
        (0, 0), (0, 0), (0, 1), (1, 0), (1, 1))]
    for batch, same in zip(runs[0], runs[1]):
        for tensor, other in zip(batch, same):
            assert torch.equal(tensor, other)
    assert len({str(pairs_in(run)) for run in runs}) == 4


def test_batches_are_alike_in_length_and_in_random_order(rows, tokenizer):
    """Padding is below 10 %, 40 % without sorting; yet short texts do not come first, nor last."""
    examples = glue.Examples(rows, tokenizer)
    lengths = [len(tokenizer.encode(text, pair)[0]) for text, pair, _ in rows]
    batches = list(examples.batches(8, 0, 0))
    padded = sum(ids.numel() for ids, *_ in batches)
    unsorted = sum(8 * max(lengths[i:i + 8]) for i in range(0, 600, 8))
    assert padded < 1.1 * sum(lengths) < 1.4 * sum(lengths) < unsorted
    widths = torch.tensor([float(ids.shape[1]) for ids, *_ in batches])
    order = torch.arange(float(len(widths)))
    assert abs(torch.corrcoef(torch.stack([widths, order]))[0, 1]) < 0.3
    steps = widths.diff()
    assert (steps > 0).sum() > 20 and (steps < 0).sum() > 20


def test_batches_are_cut_from_pools_of_fifty(rows, tokenizer):
    """The rows of 50 batches, as the seed's order has them, are sorted by length and cut."""
    examples = glue.Examples(rows, tokenizer)
    order = torch.randperm(601, generator=torch.Generator().manual_seed(1000 * 3 + 2)).tolist()
    groups = [rows.tolist() for rows in examples.batches(4, 3, 2).dataset]
    for start in (0, 200, 400, 600):
        pool = set(order[start:start + 200])
        cut = [group for group in groups if group[0] in pool]
        cut.sort(key=lambda group: [int(examples.lengths[i]) for i in group])
        in_order = [i for group in cut for i in group]
        assert set(in_order) == pool
        lengths = [int(examples.lengths[i]) for i in in_order]
        assert lengths == sorted(lengths)


def test_collate_is_a_padding_loop(rows, tokenizer):
    """ids, segments and mask equal those of a plain loop over the rows asked for."""
    examples = glue.Examples(rows, tokenizer)
    chosen = [7, 0, 13, 3]
    encoded = [tokenizer.encode(*rows[i][:2]) for i in chosen]
    longest = max(len(ids) for ids, _ in encoded)
    expected = []
    for ids, segments in encoded:
        padding = [0] * (longest - len(ids))
        expected.append([ids + padding, segments + padding, [True] * len(ids) + padding])
    *parts, labels = examples.collate(torch.tensor(chosen))
    assert [part.tolist() for part in parts] == [list(part) for part in zip(*expected)]
    assert labels.tolist() == [rows[i][2] for i in chosen]


@pytest.mark.parametrize("longest", [8, 9, 128])
def test_long_texts_are_cut(rows, tokenizer, longest):
    """No row is longer than the limit; those that fit are whole."""
    examples = glue.Examples(rows, tokenizer, longest)
    whole = [len(tokenizer.encode(text, pair, 999)[0]) for text, pair, _ in rows]
    assert examples.lengths.tolist() == [min(length, longest) for length in whole]


def test_a_bert_with_few_positions(folder):
    """Texts are cut at the positions that the model has, and a run works."""
    tensors = tiny.checkpoint()
    name = "embeddings.position_embeddings.weight"
    tensors[name] = tensors[name][:6]
    (folder / "model.safetensors").write_bytes(tiny.safetensors(tensors))
    config = tiny.CONFIG | {"max_position_embeddings": 6}
    (folder / "config.json").write_text(json.dumps(config))
    assert glue.main(["--task", "sst2", "--model", str(folder), "--data", str(folder),
                      "--out", str(folder / "out"), "--epochs", "1"]) == 0


# --------------------------------------------------------------------------------- the numbers
def test_predictions_come_in_the_rows_order(folder, tokenizer):
    """As of each row alone, whatever the batches were; the model is in evaluation mode."""
    torch.manual_seed(0)
    model, _ = tiny.load_tiny(folder)
    examples = glue.Examples(tiny.random_rows(40, 20), tokenizer)
    logits = model.eval()(*examples.collate(torch.arange(40))[:3])
    model.head[-1].bias.data -= logits.median(0).values  # so that both classes occur
    predicted = glue.predict(model.train(), examples, "fp32", size=8)
    alone = [int(model(*examples.collate(torch.tensor([i]))[:3]).argmax()) for i in range(40)]
    assert predicted.tolist() == alone
    assert 5 < sum(alone) < 35


@pytest.mark.parametrize("predicted, labels, accuracy, f1", [
    ([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 60, 200 / 3),  # precision = recall = 2 / 3
    ([0, 0, 0, 1], [1, 1, 0, 1], 50, 50),  # precision 1, recall 1 / 3
    ([1, 1, 1, 1], [0, 0, 0, 1], 25, 40),  # precision 1 / 4, recall 1
    ([0, 0], [0, 0], 100, 0),
    ([1], [1], 100, 100),
])
def test_metrics(predicted, labels, accuracy, f1):
    """Accuracy and F1 worked out by hand."""
    scores = glue.metrics(torch.tensor(predicted), torch.tensor(labels))
    assert scores == pytest.approx({"accuracy": accuracy, "f1": f1})


def test_the_loss_is_the_mean_cross_entropy():
    """By hand: -log of the softmax at the label, in float32 where logits are bfloat16."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])

    def model(ids):
        return logits.bfloat16()

    value = glue.loss(model, (None, torch.tensor([0, 0, 1])))
    expected = [torch.log1p(torch.tensor(-2.0).exp()), torch.log1p(torch.tensor(1.0).exp()),
                torch.tensor(2.0).log()]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, sum(expected) / 3)
