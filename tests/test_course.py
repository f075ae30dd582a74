"""The course, examples/course.ipynb: it is whole, its cells run, and its text says what they print.

Its code cells run in order by exec, without a kernel, once for all tests here; the two on real data
work on the tiny BERT and its texts. Cells that draw are passed over where matplotlib is missing.
Accuracies in the text are not checked, nor what a run on SST-2 has to be repeated for.
"""

import base64
import contextlib
import io
import json
import re
import sys
import types
import warnings
from collections import Counter

import pytest
import tiny
import torch
from test_readme import ROOT

import aflora
import train_glue_small as companion
from data import fetch as sources

PATH = ROOT / "examples/course.ipynb"
BOOK = json.loads(PATH.read_text(encoding="utf-8"))
MACHINE = re.compile(r"/(?:home|root|tmp|usr|work|Users|content)\b|[A-Z]:\\|site-packages")


def code_of(cell):
    """The source of a cell as one text."""
    return "".join(cell["source"])


def label_of(cell):
    """The name in a code cell's first line: "9.3, first part" of "# 9.3, first part"."""
    return code_of(cell).splitlines()[0].removeprefix("# ").partition(":")[0]


CODE = {label_of(cell): cell for cell in BOOK["cells"] if cell["cell_type"] == "code"}
TEXTS = [code_of(cell) for cell in BOOK["cells"] if cell["cell_type"] == "markdown"]
PICTURES = [label for label, cell in CODE.items() if "picture" in cell["metadata"].get("tags", ())]


def committed(label):
    """What a cell printed when the notebook was made."""
    streams = [output for output in CODE[label]["outputs"] if output.get("name") == "stdout"]
    return "".join("".join(output["text"]) for output in streams)


def text_behind(label):
    """The first text below a code cell."""
    cells = BOOK["cells"]
    rest = cells[cells.index(CODE[label]):]
    return next(code_of(cell) for cell in rest if cell["cell_type"] == "markdown")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """All code cells, run: their variables by name, and `printed`, {label: text}."""
    folder = tiny.make_folder(tmp_path_factory.mktemp("course"))
    names = {"__name__": "course"}
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFLORA_MODEL", str(folder))
        patch.setenv("AFLORA_DATA", str(folder))
        patch.setattr(sources, "download", None)  # nothing is fetched
        patch.setattr(sys, "path", sys.path[:])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.chdir(ROOT / "examples")
        drawn = prepare_pictures(patch)
        for label, cell in CODE.items():
            if label in PICTURES and drawn is None:
                continue
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code_of(cell), f"cell {label}", "exec"), names)
            printed[label] = out.getvalue()
    return types.SimpleNamespace(**names, printed=printed, drawn=drawn)


def prepare_pictures(patch):
    """A list that will get the number of axes of each picture; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawn = []

    def show():
        figure = plt.gcf()
        figure.canvas.draw()
        drawn.append(len(figure.axes))
        plt.close(figure)

    patch.setattr(plt, "show", show)
    return drawn


# ------------------------------------------------------------------------------- the file as it is
def test_the_notebook_is_whole():
    """Notebook format 4.5, each code cell run in order and without an error, small."""
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    assert PATH.stat().st_size < 500_000
    identifiers = [cell["id"] for cell in BOOK["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    counts = []
    for cell in BOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            counts.append(cell["execution_count"])
            assert cell["outputs"], code_of(cell)
            assert all(output["output_type"] in ("stream", "display_data")
                       for output in cell["outputs"])
        assert cell.keys() == keys
    assert counts == list(range(1, len(CODE) + 1)) and len(counts) > 25  # no label stands twice


def test_the_notebook_names_no_machine():
    """Neither its cells nor what they printed hold a path of the machine that made it."""
    for cell in BOOK["cells"]:
        assert not MACHINE.search(code_of(cell))
    for cell in CODE.values():
        for output in cell["outputs"]:
            assert not MACHINE.search("".join(output.get("text", ())))
    assert MACHINE.search("in /home/x") and MACHINE.search("C:\\x")


def test_pictures_are_committed():
    """A cell that draws has one PNG; no other has one."""
    for label, cell in CODE.items():
        pictures = [output for output in cell["outputs"] if output["output_type"] == "display_data"]
        assert len(pictures) == (label in PICTURES)
        for picture in pictures:
            assert base64.b64decode(picture["data"]["image/png"]).startswith(b"\x89PNG")
    assert len(PICTURES) == 4


def test_cells_are_calm():
    """Few lines of at most 100 columns, one statement in each."""
    for label, cell in CODE.items():
        lines = code_of(cell).splitlines()
        assert len(lines) <= 28, label
        assert max(map(len, lines)) <= 100, label
        assert not re.search(r"^[^#\"']*;|^\s*(if|for|while) .*:[ ]+\w", code_of(cell), re.M), label


def test_the_list_of_cells_names_what_there_is():
    """Sections, cells and minutes of the table at the top are those of the notebook."""
    rows = re.findall(r"^\| (\d) (.*?) \| (.*?) \| (\d+) \|", TEXTS[0], re.MULTILINE)
    headings = re.findall(r"^## (\d)\. (.*)$", "\n".join(TEXTS), re.MULTILINE)
    assert [number for number, *_ in rows] == [number for number, _ in headings]
    for (_, name, cells, _), (_, heading) in zip(rows, headings):
        assert heading.startswith(name)
        first, last = re.findall(r"\d[.\da-z]+", cells)
        assert any(label.startswith(first) for label in CODE)
        assert [label for label in CODE if label[0] == last[0]][-1].startswith(last)
    assert sum(int(minutes) for *_, minutes in rows) == 90
    named = re.findall(r"\b\d[a-d]\b|\b9\.\d\b", TEXTS[0])
    assert all(any(label.startswith(name) for label in CODE) for name in named)


def test_links_and_flags_exist():
    """Every relative link is a file, every flag one of the companion's, every test there."""
    text = "\n".join(TEXTS)
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text):
        assert (PATH.parent / link).exists(), link
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert flags and flags <= set(companion.make_parser()._option_string_actions)
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in (ROOT / "test_aflora.py").read_text(encoding="utf-8")
    assert text.count("<details><summary>Answer</summary>\n\n") == text.count("</details>") == 8


# ------------------------------------------------------------------------- what the cells print
def test_the_committed_outputs_are_of_these_cells(lesson):
    """Whatever number or order another processor gives: the words of each output are the same."""
    def words(text):
        return Counter(re.sub(r"-?\d[\d.,]*(?:e[-+]\d+)?|nan", "#", text).split())

    for label, text in lesson.printed.items():
        if label != "6b":  # its freeze map has as many columns as the model layers
            assert words(text) == words(committed(label)), label
    assert committed("6b").count("\n") == lesson.printed["6b"].count("\n")


@pytest.mark.parametrize("label, printed, told", [
    ("1a", ["lora_A: (2, 6)", "lora_B: (5, 2)", "s_d: (2,)", "s_b: (5,), largest value 0.00",
            "bit for bit: True"], ["12 + 10 + 2 + 5 = 29"]),
    ("1b", ["rank of what was added: 2"], []),
    ("1c", ["lora_A: largest gradient 0.000", "lora_B: largest gradient 0.000",
            "s_d: largest gradient 0.000"], ["Only $s_b$"]),
    ("2b", ["1,327,104", "156,672", "451,872 at the start, 83,232 at the end", "124,704",
            "10.6 times"], ["1,327,104", "156,672", "451,872", "83,232", "124,700", "10.6"]),
    ("5a", ["scheduled 0.7687, realised 0.7361", "t = 159: r(t) 24 = 24.00, frozen 23",
            "t = 160: r(t) 24 = 24.00, frozen 24"], ["0.7687", "0.7361", "159", "24.00"]),
    ("8c", ["[True, True, True, True]"], ["135 of 1,348"]),
    ("9.1", ["113,040", "20,880", "57,600"], ["113,040", "20,880", "57,600"]),
    ("9.4, second part", ["0.799, realised 0.790", "0.799, realised 0.785", "realised 0.765",
                          "realised 0.704"], ["0.799", "0.790, 0.785, 0.765, 0.704"]),
    ("9.6", ["0.7982 when frozen, 0.6895 after 100", "0.7982 when frozen, 0.7982 after 100"],
     ["0.7982 becomes 0.6895"]),
    ("9.7, second part", ["True, written: 15.09 MiB, folded: 3.17", "False, written: 12.07 MiB, "
                          "folded: 0.12"], ["15.09", "12.07", "3.17 and 0.12"]),
    ("9.8", ["0.0% of the weights did not change, 0.0% of", "61.9% of the weights", "37.0% of"],
     ["61.9 % and 37.0 %"]),
])
def test_what_the_text_says_is_what_is_printed(lesson, label, printed, told):
    """Counts, zeros and shares: on any machine, in the committed output, and in the text below."""
    for part in printed:
        assert part in lesson.printed[label]
        assert part in committed(label)
    for part in told:
        assert part in text_behind(label)


def test_the_layer_and_the_score_of_the_lesson(lesson):
    """1b and 3d: the dense formula, equation (3) by hand, and the block that had to learn."""
    assert 0 < lesson.apart < 1e-5
    assert lesson.means["Ibar"][100] == pytest.approx(lesson.by_hand, rel=1e-4)
    assert lesson.losses[-1] < lesson.losses[0] / 5
    assert max(lesson.of_blocks) == lesson.of_blocks[0]
    counts = {t: int(24 * (1 - (1 - (t - 20) / 140) ** 3)) for t in range(20, 160, 10)}
    assert lesson.paper[1:15] == list(counts.values())


def test_the_authors_rule_of_the_lesson(lesson):
    """7a by hand: a matrix freezes by its mean, the threshold is one of the elements."""
    means = {"a": torch.tensor([1.0, 1, 1, 9]), "b": torch.full((4,), 2.0)}
    freezer = types.SimpleNamespace(Ibar=means, Ubar={n: torch.ones(4) for n in "ab"})
    assert lesson.authors_rule(freezer, ["a", "b"], 0.5) == ["b"]  # 1 1 1 2 | 2 2 2 9
    assert lesson.authors_rule(freezer, ["a", "b"], 0.25) == []
    assert lesson.authors_rule(freezer, ["a"], 0.75) == []
    assert lesson.authors_rule(freezer, ["a"], 1) == ["a"]
    assert lesson.authors_rule(freezer, ["a", "b"], 0) == []
    # Late, then all at once
    first = next(i for i, count in enumerate(lesson.authors) if count > 0)
    assert lesson.paper[first - 1] > 8
    assert lesson.authors[lesson.paper.index(22)] == 24


def test_freezenet_of_the_lesson(lesson):
    """8b: as many values moved as were chosen, and the choice by gradient ends lower."""
    lines = re.findall(r"(\d+) of (\d+) moved; loss (\S+) by gradient, (\S+) at random",
                       lesson.printed["8b"])
    assert len(lines) == 3
    for moved, count, chosen, random in lines:
        assert (moved, count) == ("135", "1348")
        assert float(chosen) < float(random)


def test_the_real_run_of_the_lesson(lesson):
    """6b, on the tiny BERT: it froze everything; what the text counts of MiniLM was printed."""
    assert len(lesson.result["frozen_at"]) == 8
    assert lesson.result["steps"] == 2 * 2  # 24 rows
    assert "freeze map" in lesson.printed["6b"]
    text = text_behind("6b")
    steps = 2 * 100  # 1,600 rows, 16 a step
    assert f"{steps} steps; the ramp goes from step {steps // 10} to step {steps * 6 // 10}" in text
    assert f"SST-2: {steps} steps" in committed("6b")
    for count in ("113,040", "20,880", f"{384 * 384 + 384 + 384 * 2 + 2:,}"):
        assert count in text
        assert count in committed("6b")
    assert committed("6b").count("·") == 8 * 6 + 1  # attention's, and the legend
    assert "░ 20-45" in committed("6b")


# -------------------------------------------------------------------------- the exercises' answers
def test_a_path_that_starts_awake(lesson, folder):
    """9.2: predictions change, more of them with 1.0 than with 0.1; the text gives the numbers."""
    differ = [int(count) for count in re.findall(r"(\d+) predictions", committed("9.2"))]
    assert differ[0] < differ[1]
    for count in differ:
        assert f"{count} " in text_behind("9.2")
    assert lesson.printed["9.2"].count("predictions differ") == 2
    model, _ = tiny.load_tiny(folder)
    model.eval()
    inputs = (torch.arange(5, 15).view(2, 5), torch.zeros(2, 5, dtype=int), torch.ones(2, 5) > 0)
    plain = model(*inputs)
    layers = aflora.add_adapters(model, companion.ATTENTION + companion.FFN)
    assert torch.equal(model(*inputs), plain)
    for layer in layers.values():
        torch.nn.init.constant_(layer.s_b, 0.1)
    assert not torch.allclose(model(*inputs), plain, rtol=1e-3)


def test_the_first_step_and_two_zeros(lesson):
    """9.3: zeros in step 1 and not in step 2; with two zeros the model's order."""
    steps = "'0.lora_A': {}, '0.lora_B': {}, '2.lora_A': {}, '2.lora_B': {}"
    first, second, *_, last = lesson.printed["9.3, first part"].splitlines()
    names = [f"{i}.lora_{m}" for i in (0, 2) for m in "AB"]
    zeros = ", ".join(f"{name} 0.0e+00" for name in names)
    assert first == f"step 1: r(t) = 0.000, s(t) = {zeros}"
    scores = [float(score) for score in re.findall(r"lora_[AB] ([^,]+)", second)]
    assert len(scores) == 4
    assert min(scores) > 0
    assert f"{min(scores):.1e} to {max(scores):.1e}" in text_behind("9.3, second part")
    assert sorted(re.findall(r": (\d+)", last), key=int) == ["64", "81", "106", "200"]
    zeros = lesson.printed["9.3, second part"].splitlines()
    assert zeros[0] == "step 200: r(t) = 1.000, s(t) = 2.lora_B 0.0e+00"
    assert zeros[1] == f"frozen after step: {{{steps.format(70, 90, 110, 200)}}}"
    assert "64, 81, 106 and 200" in text_behind("9.3, second part")


def test_the_ramp_that_begins_at_once(lesson):
    """9.4: r(10) = 0.143 freezes none of four matrices."""
    printed = lesson.printed["9.4, first part"]
    assert [int(step) for step in re.findall(r": (\d+)", printed)] == [20, 50, 80, 200]
    assert "0.143" in text_behind("9.4, second part")
    assert f"{1 - (1 - 10 / 200) ** 3:.3f}" == "0.143"


def test_the_order_by_another_sensitivity(lesson):
    """9.5: by |w| alone the smallest bounds first; the table's orders are the committed ones."""
    by_weight = lesson.printed["9.5"].splitlines()[2]
    assert by_weight.startswith("weight: frozen after step: {'2.lora_A': 70, '0.lora_A': 90,")
    for line in committed("9.5").splitlines():
        order = ", ".join(re.findall(r"\d\.lora_[AB]", line))
        assert f"| {order} |" in text_behind("9.5")
    assert (6 / 8) ** 0.5 > (6 / 9) ** 0.5


def test_every_picture_is_drawn(lesson):
    """With matplotlib: three panels, five maps, two single ones."""
    if lesson.drawn is None:
        pytest.skip("matplotlib is not installed")
    assert lesson.drawn == [3, 5, 1, 1]
