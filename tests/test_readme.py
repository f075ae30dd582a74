"""The pages: their Python blocks run as printed, their links and names exist."""

import re
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn as nn

import aflora
import train_glue_small as companion

ROOT = Path(aflora.__file__).parent
PAGES = ["README.md", "examples/README.md", "results/README.md"]


def blocks(page, heading=None):
    """The Python blocks of a page, or of the section under one of its headings."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading:
        text = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class Small(nn.Module):
    """A model with the names that the README's code uses."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 2)

    def forward(self, x):
        return self.classifier(torch.tanh(self.query(x)) + self.value(x))


def names_for_code():
    """What the blocks take as given."""
    torch.manual_seed(0)
    return {"torch": torch, "model": Small(), "loss": tiny.loss_of,
            "batches": lambda epoch: tiny.data(batches=60)}


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """By train() and in a loop of one's own: all four matrices freeze, the file loads."""
    monkeypatch.chdir(tmp_path)
    by_train, by_hand = blocks("README.md")
    for block in (by_train, by_hand):
        names = names_for_code()
        names |= {name: getattr(aflora, name) for name in ("AdaptiveFreezer", "add_adapters")}
        exec(block, names)
        assert len(names["freezer"].frozen_at) == 4
    torch.manual_seed(0)
    assert aflora.load_adapter(Small(), "adapter.pt").keys() == {"query", "value"}


def test_the_code_that_stops_and_goes_on_runs(tmp_path, monkeypatch):
    """The checkpoint that after_step writes lets a new run go on to the same weights."""
    monkeypatch.chdir(tmp_path)
    block, = blocks("examples/README.md", "Stop and go on")
    models = []
    for resume in (None, "run.pt"):
        names = names_for_code()
        adapters = aflora.add_adapters(
            names["model"], targets=["query", "value"], modules_to_save=["classifier"])
        names["freezer"] = aflora.AdaptiveFreezer(adapters, 180, t_i=20, t_f=60)
        if resume:
            block = block.replace("after_step=after_step)", f"resume={resume!r})")
        exec(block, names)
        models.append(names["model"])
    assert Path("run.pt").exists()
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Every relative link and picture is a file, every anchor a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, link


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_commands_and_files_exist(page):
    """What a page tells to run is there, and every flag of the companion is one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    scripts = re.findall(r"(?:python|torchrun --nproc_per_node=2) ([\w/]+\.py)", text)
    assert scripts
    for script in scripts:
        assert (ROOT / script).exists(), script
    flags = {flag for line in re.findall(r"train_glue_small\.py (--[^`\n]*)", text)
             for flag in re.findall(r"--[\w-]+", line)}
    assert flags <= set(companion.make_parser()._option_string_actions)


def test_names_of_the_readme_exist():
    """Every name in the column of aflora.py's names in "From paper to code" is one of its names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## From paper to code")[1].split("The default sensitivity")[0]
    names = re.findall(r"`([A-Za-z_][\w.]*)(?:\(.*?\))?`", table)
    assert len(names) > 10
    for name in names:
        if name.endswith(".py"):
            assert (ROOT / name).exists(), name
            continue
        home = aflora if hasattr(aflora, name.split(".")[0]) else companion
        for part in name.split("."):
            home = getattr(home, part)
