"""The evidence: how its cells run and are judged, and that the pages print what its files hold."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import aflora
import train_glue_small as companion
from data import text
from data.text import load_task

ROOT = Path(aflora.__file__).resolve().parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import chance  # noqa: E402
import results  # noqa: E402

AFLORA = results.AFLORA
LABELS = {"full fine-tuning": "full", "**AFLoRA r=4**": AFLORA}  # README's names


# ------------------------------------------------------------------------------------ running cells
@pytest.fixture
def cells(folder, tmp_path, monkeypatch):
    """Cells run on the tiny BERT and texts, and leave their files in an empty folder."""
    monkeypatch.setenv("AFLORA_DATA", str(folder))
    monkeypatch.setattr(companion, "model_folder", lambda: folder)
    for name in ("PRESET", "FOLDER"):
        monkeypatch.setattr(results, name, getattr(results, name))
    monkeypatch.setattr(text, "load_task", load_task)
    for name in ("AdaptiveFreezer", "parameter_groups"):
        monkeypatch.setattr(aflora, name, getattr(aflora, name))
    seen = []  # the tasks that the companion was given
    prepare = companion.Run.prepare

    def watched(run):
        seen.append(run.task)
        prepare(run)

    monkeypatch.setattr(companion.Run, "prepare", watched)

    def start(preset):
        results.use_preset(preset)
        results.FOLDER = tmp_path / preset
        return seen

    return start


def read(task, arm, seed, lr=None):
    return json.loads(results.path_of(task, arm, seed, lr).read_text())


def search_with(task, arm, accuracies):
    """Leaves search cells with these accuracies, a rate each."""
    results.FOLDER.mkdir(exist_ok=True)
    for lr, accuracy in zip(results.methods()[arm][1], accuracies):
        path = results.path_of(task, arm, results.SEARCH_SEED, lr)
        cell = {"lr": lr, "accuracy": accuracy, "precision": "fp32"}
        path.write_text(json.dumps(cell))


def test_a_rate_of_the_full_preset_is_chosen_without_dev(cells, folder):
    """Its search cell trains on nine tenths of the training rows and is scored on the last."""
    seen = cells("full")
    results.run("mrpc", "lora r=8", results.SEARCH_SEED, 1e-3)
    given, = seen
    whole = load_task("mrpc", folder)
    assert len(whole.train) == 16
    assert len(given.dev) == 2
    assert sorted(given.train + given.dev) == sorted(whole.train)
    assert not set(given.train + given.dev) & set(whole.dev)
    cell = read("mrpc", "lora r=8", results.SEARCH_SEED, 1e-3)
    assert cell["accuracy"] in (0, 50, 100)  # of two rows
    assert cell["scored_on"] == results.FOLD
    assert [line["epoch"] for line in cell["history"]] == list(range(1, 9))

    search_with("mrpc", "lora r=8", (70, 80, 75, 60))
    results.run("mrpc", "lora r=8", 0)  # the next cell sees the task itself
    _, given = seen
    assert given.train == whole.train
    assert given.dev == whole.dev
    assert "scored_on" not in read("mrpc", "lora r=8", 0)


def test_the_fold_is_the_same_every_time_and_shuffled(folder, monkeypatch):
    monkeypatch.setenv("AFLORA_DATA", str(folder))
    whole = load_task("sst2", folder)
    one = results.load_fold("sst2", folder)
    other = results.load_fold("sst2", folder)
    assert one.dev == other.dev
    assert one.train == other.train
    assert len(one.dev) == 3  # of 24
    assert one.dev != whole.train[::10]


def test_the_quick_preset_searches_on_fewer_rows(cells):
    cells("quick")
    command = results.command_of("mrpc", AFLORA, results.SEARCH_SEED, 1e-2)
    assert command.endswith("--task mrpc --preset quick --seed 100 --lr 0.01 --limit 1200")
    results.use_preset("full")
    command = results.command_of("mrpc", AFLORA, results.SEARCH_SEED, 1e-2)
    assert command.endswith("--preset full --seed 100 --lr 0.01")


def test_whose_head_has_which_rate(cells):
    """At the full budget the recipe's for all, but where the head is all that trains."""
    cells("full")
    assert results.command_of("mrpc", "full", 0, 2e-4).endswith("--lr 0.0002 --head-lr 0.001")
    assert results.command_of("mrpc", "head only", 0, 5e-3).endswith("--seed 0 --lr 0.005")
    assert "--head-lr" not in results.command_of("mrpc", AFLORA, 0, 1e-2)  # the recipe's
    results.use_preset("quick")
    assert "--lr 0.0002 --head-lr 0.0002" in results.command_of("mrpc", "full", 0, 2e-4)


def test_one_mean_is_of_one_precision(cells, monkeypatch):
    """Cells that another machine computed in bf16 are not continued in fp32."""
    cells("full")
    monkeypatch.setattr(companion, "choose_precision", lambda amp, device: "fp32")
    monkeypatch.setattr(results, "run_task", lambda task, pool: None)
    results.FOLDER.mkdir()
    for arm, precision in (("lora-r-8", "fp32"), ("full", "bf16")):
        path = results.FOLDER / f"search-mrpc-{arm}-0.001.json"
        path.write_text(json.dumps({"precision": precision}))
    results.check_precision("sst2")
    with pytest.raises(SystemExit, match="has mrpc in bf16, this machine computes in fp32"):
        results.run_everything(["sst2", "mrpc"], 1)
    path.unlink()
    results.check_precision("mrpc")


def test_no_job_is_a_wrong_number_of_jobs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "--jobs", "0"])
    with pytest.raises(SystemExit):
        results.main()
    assert "--jobs: at least 1" in capsys.readouterr().err


def test_the_best_rate_is_taken_of_equal_ones_the_lower(cells):
    cells("full")
    with pytest.raises(FileNotFoundError):
        results.chosen_rate("mrpc", AFLORA)
    search_with("mrpc", AFLORA, (70, 80, 80))
    with pytest.raises(FileNotFoundError):  # one is still to be run
        results.chosen_rate("mrpc", AFLORA)
    search_with("mrpc", AFLORA, (70, 80, 80, 79))
    assert results.chosen_rate("mrpc", AFLORA) == 1e-2
    assert results.chosen_rate("mrpc", "never frozen") == 1e-2  # a question takes AFLoRA's


def test_a_cell_says_what_was_run_and_nothing_of_the_machine(cells, folder):
    """Seed 0 keeps the scores at each look; one shot before, which never looks, keeps none."""
    cells("full")
    search_with("mrpc", AFLORA, (70, 80, 75, 60))
    for arm in (AFLORA, results.ONE_SHOT):
        results.run("mrpc", arm, 0)
    cell = read("mrpc", AFLORA, 0)
    assert cell["arm"] == AFLORA
    assert cell["lr"] == 1e-2
    assert cell["command"].startswith("train_glue_small.py --method aflora --rank 4 --task mrpc")
    looks = cell["record"]["step"]
    assert set(cell["frozen_at"].values()) <= set(looks)
    assert len(cell["record"]["scores"]) == len(looks) > 0
    assert read("mrpc", results.ONE_SHOT, 0)["record"] is None
    for path in results.FOLDER.iterdir():
        text = path.read_text()
        assert str(folder) not in text
        assert "seconds" not in text


@pytest.mark.parametrize("preset", results.PRESETS)
def test_the_stored_commands_train_what_was_trained(monkeypatch, preset):
    """A cell's command is today's, its recipe that of the cell; arms without flags have none."""
    for name in ("PRESET", "FOLDER"):
        monkeypatch.setattr(results, name, None)  # given back afterwards
    results.use_preset(preset)
    paths = sorted(results.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        cell = json.loads(path.read_text())
        arm = cell["arm"]
        lr = cell["lr"] if path.name.startswith("search-") else None
        if arm in results.NO_COMMAND:
            assert cell["command"] is None
            continue
        command = results.command_of(cell["task"], arm, cell["seed"], lr)
        assert cell["command"] == command, path
        args = companion.parse(command.split()[1:])
        _, recipe = companion.choose_recipe(cell["task"], args, torch.device("cpu"))
        for key in ("limit", "epochs", "batch_size", "lr"):
            assert recipe[key] == cell[key], path
        assert recipe["head_lr"] in (cell["head_lr"], None), path  # None: the head alone has lr
        assert recipe["rank"] == (cell["rank"] or None), path  # of the oldest some have 0
        if arm not in results.METHODS or arm == AFLORA:
            planned = [recipe["t_i"], recipe["t_f"]]
            assert cell["t_i"] in (None, planned[0]) and cell["t_f"] in (None, planned[1]), path


def test_cells_run_in_their_order_and_each_once(cells, monkeypatch):
    """The search, then seed by seed all methods, AFLoRA and LoRA first, at last the questions."""
    cells("full")
    order = []

    def record(cells, pool):
        assert pool == "the pool"
        order.extend(cells)

    monkeypatch.setattr(results, "run_all", record)
    results.run_task("mrpc", "the pool")
    assert {task for task, *_ in order} == {"mrpc"}
    searched = [(arm, lr[0]) for _, arm, _, *lr in order if lr]
    assert sorted(searched) == sorted((arm, lr) for arm, (_, rates) in results.METHODS.items()
                                      for lr in rates)
    first = [(arm, seed) for _, arm, seed, *lr in order if not lr][:7]
    assert first[:2] == [(AFLORA, 0), ("lora r=8", 0)]
    assert {arm for arm, seed in first[:6]} == set(results.METHODS)
    assert first[6] == (AFLORA, 1)
    assert len(order) == len(set(order))
    places = {cell: i for i, cell in enumerate(order)}
    for _, arm, seed, *lr in order:
        if not lr and arm in results.METHODS:
            last_rate = results.METHODS[arm][1][-1]
            assert places["mrpc", arm, 100, last_rate] < places["mrpc", arm, seed]
    methods = [places["mrpc", arm, 4] for arm in results.METHODS]
    questions = [places["mrpc", arm, 0] for arm in results.QUESTIONS]
    assert max(methods) < min(questions)
    for method in results.METHODS:
        assert {seed for _, arm, seed, *_ in order if arm == method} == {*range(10), 100}


def test_only_cells_without_a_file_run(cells, monkeypatch):
    """The others are found again, by processes that know the preset and are started once."""
    cells("full")
    pools = []
    started = []

    class Pool:
        def __init__(self, jobs, context, initializer, given):
            pools.append((jobs, initializer, given))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def submit(self, function, *cell):
            started.append(cell)
            return cell

    monkeypatch.setattr(results, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(results, "as_completed", lambda cells: [])
    search_with("mrpc", AFLORA, (70, 80))
    monkeypatch.setattr(companion, "choose_precision", lambda amp, device: "fp32")
    monkeypatch.setattr(results, "run_task", lambda task, pool: results.run_all(
        results.search_cells(task, [AFLORA]), pool))
    results.run_everything(["mrpc"], 7)
    assert pools == [(7, results.use_preset, ("full",))]
    assert started == [("mrpc", AFLORA, 100, 2e-2), ("mrpc", AFLORA, 100, 4e-2)]


def test_ranks_are_compared_at_rates_of_the_fold(cells, folder, monkeypatch):
    """Rows and epochs of the quick preset; cells are kept apart from its, and there are no
    questions."""
    seen = cells("ranks")
    arm = "aflora r=16"
    results.run("mrpc", arm, results.SEARCH_SEED, 1.4e-2)
    assert len(seen[0].dev) == 2  # a tenth of 16 training rows, rounded up
    cell = read("mrpc", arm, results.SEARCH_SEED, 1.4e-2)
    assert cell["scored_on"] == results.FOLD
    assert (cell["rank"], cell["epochs"], cell["preset"]) == (16, 2, "quick")
    order = []
    monkeypatch.setattr(results, "run_all", lambda cells, pool: order.extend(cells))
    results.run_task("mrpc", None)
    assert {arm for _, arm, *_ in order} == set(results.RANKS)
    assert {seed for _, _, seed, *lr in order if not lr} == set(range(5))
    searched = {arm for _, arm, _, *lr in order if lr}
    assert searched == {arm for arm in results.RANKS if "r=" in arm}  # the others have one rate
    assert results.chosen_rate("mrpc", "vectors' rate x 4") == 5e-3
    order.clear()
    results.use_preset("recipe")  # the full one's: on the fold alone
    results.run_task("mrpc", None)
    assert {arm for _, arm, *_ in order} == set(results.RECIPE)
    assert {len(cell) for cell in order} == {4}
    assert "--preset full" in results.command_of("mrpc", "5 epochs", 100, 4e-3)


def watch_training(monkeypatch):
    """A list that gets of each run {"s_d": its start, "t_i": its share, part of a name: rates}."""
    train = aflora.train
    seen = []

    def watched(model, *given, **settings):
        found = {}
        for name, p in model.encoder.named_parameters():
            if name.endswith("s_d"):
                found.setdefault("start of s_d", set()).update(p.tolist())
        training = train(model, *given, **settings)
        peaks = {p: group["peak_lr"] for group in training.optimizer.param_groups
                 for p in group["params"]}
        for name, p in model.named_parameters():
            if p in peaks:
                part = "head" if name.startswith("head.") else name.split(".")[-1]
                found.setdefault(part, set()).add(peaks[p])
        found["t_i"] = training.freezer.t_i / training.total_steps
        seen.append(found)
        return training

    monkeypatch.setattr(aflora, "train", watched)
    return seen


@pytest.mark.parametrize("arm, changed", [
    ("vectors' rate x 4", {"s_d": {4e-2}, "s_b": {4e-2}}),
    ("matrices' rate x 4", {"s_d": {2.5e-3}, "s_b": {2.5e-3}}),
    ("s_d starts at 1", {"start of s_d": {1.0}}),
    ("freezing from 0.3 on", {"t_i": 0.5})])  # of two steps
def test_what_may_close_the_gap_changes_one_thing(cells, monkeypatch, arm, changed):
    """Rates, the start of s_d, when freezing begins: all else is as in the plain run after it."""
    cells("ranks")
    seen = watch_training(monkeypatch)
    for which in (arm, AFLORA):
        results.run("mrpc", which, results.SEARCH_SEED, 1e-2)
    here, plain = seen
    assert plain == {"lora_A": {1e-2}, "lora_B": {1e-2}, "s_d": {1e-2}, "s_b": {1e-2},
                     "head": {2e-3}, "start of s_d": {torch.tensor(0.1).item()}, "t_i": 0.0}
    assert here == plain | changed
    command = read("mrpc", arm, results.SEARCH_SEED, 1e-2)["command"]
    if arm == "freezing from 0.3 on":
        assert "--t-i 0.3" in command
    else:  # the companion has no flag for it
        assert command is None


def test_twenty_thousand_rows_of_sst2(cells, monkeypatch):
    """Three epochs as in the quick preset, four methods, three seeds, rates from the fold."""
    cells("sst2-20k")
    order = []
    monkeypatch.setattr(results, "run_all", lambda cells, pool: order.extend(cells))
    results.run_task("sst2", None)
    assert {arm for _, arm, *_ in order} == {AFLORA, "lora r=8", "elora r=4", "elora r=1024"}
    assert {seed for _, _, seed, *lr in order if not lr} == {0, 1, 2}
    results.run("sst2", AFLORA, results.SEARCH_SEED, 1e-2)
    cell = read("sst2", AFLORA, results.SEARCH_SEED, 1e-2)
    assert (cell["limit"], cell["epochs"], cell["rank"]) == (20000, 3, 4)
    assert cell["scored_on"] == results.FOLD


def test_the_authors_rule_by_hand():
    """Of elements 1 1 1 9 | 2 2 2 2 | 3 3 3 4, means 3, 2, 3.25, half: the sixth smallest is 2."""
    recorder = results.Recorder.__new__(results.Recorder)
    values = {"a": [1, 1, 1, 9], "b": [2, 2, 2, 2], "c": [3, 3, 3, 4]}
    recorder.Ibar = {name: torch.tensor(v).float().view(2, 2) for name, v in values.items()}
    recorder.Ubar = {name: torch.ones(2, 2) for name in values}
    recorder.frozen_by_authors = []
    means = {name: sum(v) / 4 for name, v in values.items()}
    recorder.simulate_authors(means, 0)
    assert recorder.frozen_by_authors == []
    recorder.simulate_authors(means, 0.5)
    assert recorder.frozen_by_authors == ["b"]
    recorder.simulate_authors(means, 0.5)  # of 1 1 1 9 | 3 3 3 4 the fourth is 3
    assert recorder.frozen_by_authors == ["b", "a"]


# ------------------------------------------------------------------------------------------- chance
@pytest.mark.parametrize("count, t, p", [
    (2, 12.7062, 0.05), (3, 4.30265, 0.05), (5, 2.77645, 0.05), (5, 4.60409, 0.01),
    (10, 2.26216, 0.05), (10, 0.70272, 0.5)])
def test_p_values_are_those_of_the_printed_tables(count, t, p):
    """The quantiles of Student's t that every textbook has, on differences made to give them."""
    values = torch.arange(count, dtype=torch.float64)
    values = (values - values.mean()) / values.std()
    differences = (values + t / count**0.5).tolist()
    assert chance.p_value(differences) == pytest.approx(p, rel=1e-4)
    assert chance.p_value([-x for x in differences]) == pytest.approx(p, rel=1e-4)


def test_spread_over_seeds():
    """Mean and standard deviation of a sample; a value alone has no deviation that could stand."""
    assert chance.spread([1.0]) == "1.0"
    assert chance.spread([1.0, 2.0]) == "1.5 ± 0.7"  # the square root of 1 / 2
    assert chance.spread([1000, 2000, 3000], ",.0f") == "2,000 ± 1,000"
    assert chance.mean_and_deviation([3]) == (3, 0)
    assert chance.mean_and_deviation([1, 3]) == pytest.approx((2, 2**0.5))


def test_p_values_at_the_edges():
    assert chance.p_value([0.0, 0.0, 0.0]) == 1
    assert chance.p_value([-1.0, 1.0]) == pytest.approx(1)
    assert chance.p_value([2.0, 2.0, 2.0]) == pytest.approx(0, abs=1e-6)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 lifted to its neighbour's; never above 1."""
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    expected = {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    assert chance.holm(p_values) == pytest.approx(expected)
    assert chance.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert chance.holm({}) == {}


# ---------------------------------------------------------------------------------------- the pages
@pytest.fixture
def committed(monkeypatch):
    """The tables of a preset's committed files: committed(preset) -> what --table prints."""
    for name in ("PRESET", "FOLDER"):
        monkeypatch.setattr(results, name, getattr(results, name))

    def printed(preset, capsys):
        monkeypatch.setattr(sys, "argv", ["results.py", "--table", "--preset", preset])
        results.main()
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("preset", results.PRESETS)
def test_results_readme_has_the_tables_that_are_printed(committed, preset, capsys):
    """Word for word, as one block a preset."""
    printed = committed(preset, capsys).strip()
    assert printed
    assert printed in (ROOT / "results/README.md").read_text(encoding="utf-8")


def test_presets_take_the_rates_that_were_chosen(committed):
    """On the fold, for MRPC."""
    for preset, arm in (("full", AFLORA), ("ranks", "aflora r=16")):
        results.use_preset(preset)
        recipe = companion.RECIPES[results.recipe_name(), "mrpc"]
        assert recipe["lr"] == results.chosen_rate("mrpc", arm)
        assert f"r={recipe['rank']}" in arm


def rows_of(page, head):
    """The rows of the table on a page whose head begins so, as lists of cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = text[text.index(head):].split("\n\n")[0]
    _, _, *lines = table.splitlines()
    cut = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    return [[cell.strip().replace(r"\|", "|") for cell in cells] for cells in cut]


TEN_SEEDS = range(10)


def test_the_readme_has_the_numbers_of_the_files(committed):
    """Its table of methods: MRPC at the full budget, then both tasks at the quick preset."""
    rows = rows_of("README.md", "| method | trained on average beside the head, MRPC, 8 epochs |")
    assert len(rows) == len(results.METHODS)
    for name, trained, *scores in rows:
        arm = LABELS.get(name, name.lower())
        results.use_preset("full")
        full = results.load("mrpc", arm, TEN_SEEDS)
        assert len(full) == 10
        assert trained == results.trained_on_average(full)
        expected = [results.spread_of(full, "accuracy"), results.spread_of(full, "f1")]
        results.use_preset("quick")
        for task in ("mrpc", "sst2"):
            expected.append(results.spread_of(results.load(task, arm, results.SEEDS), "accuracy"))
        assert scores == expected


def apart(preset, arm, seeds, task="mrpc"):
    """How far AFLoRA's accuracy is from an arm's: (mean, standard error, p), as texts."""
    results.use_preset(preset)
    _, differences = results.paired(task, arm, seeds)
    mean, deviation = results.mean_and_deviation(differences)
    error = deviation / len(differences) ** 0.5
    return f"{abs(mean):.1f}", f"{error:.1f}", f"{chance.p_value(differences):.2f}"


def test_the_front_page_s_sentences_have_the_numbers_of_the_files(committed):
    """What AFLoRA is apart from others with eight epochs on MRPC, and with few."""
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    mean, error, p = apart("full", "lora r=8", TEN_SEEDS)
    _, differences = results.paired("mrpc", "lora r=8", TEN_SEEDS)
    middle, deviation = results.mean_and_deviation([-x for x in differences])
    ends = [f"{middle + sign * 2.26216 * deviation / 10**0.5:.1f}" for sign in (-1, 1)]
    interval = " to ".join(ends)
    assert (f"over ten seeds {mean} ± {error} (± standard error; p {p}; 95 %: {interval}) apart"
            ) in page
    mean, error, p = apart("full", "elora r=1024", TEN_SEEDS)
    assert f"{mean} ± {error} above ELoRA r=1024 (p {p})" in page
    mean, error, p = apart("full", "elora r=4", TEN_SEEDS)
    assert f"{mean} ± {error} above ELoRA of its own rank (p below 0.001;" in page
    assert p == "0.00"
    corrected = results.corrected_p_values(results.ROWS_OF_QUESTIONS)
    assert f"at the full budget, of {len(corrected)}: {min(corrected.values()):.2f})" in page
    leads = {}  # over rank 4, in both series
    for arm in ("lora r=8", "aflora r=16"):
        leads[arm] = [" ± ".join(apart(preset, arm, results.QUESTION_SEEDS)[:2])
                      for preset in ("ranks", "ranks-h100")]
    of_lora, of_rank_16 = leads.values()
    p = []
    for preset in ("ranks", "ranks-h100"):
        results.use_preset(preset)
        corrected = results.corrected_p_values(results.rows_of_methods())
        p.append(f"{corrected['mrpc', 'lora r=8']:.2f}")
    assert f"in two more series {of_lora[0]} (p {p[0]}) and {of_lora[1]} ({p[1]})" in page
    assert f"is {' and '.join(of_rank_16)} above rank 4: not settled" in page
    results.use_preset("sst2-20k")
    rows = {arm: results.spread_of(results.load("sst2", arm, results.SEEDS), "accuracy")[:4]
            for arm in results.methods()}
    assert (f"LoRA has {rows['lora r=8']}, AFLoRA {rows[AFLORA]}, ELoRA r=4 {rows['elora r=4']}; "
            ) in page
    corrected = results.corrected_p_values(results.rows_of_methods())
    errors = []
    for arm in ("lora r=8", "elora r=4"):
        mean, error, _ = apart("sst2-20k", arm, results.SEEDS, "sst2")
        errors.append((f"{mean} ± {error}", f"{corrected['sst2', arm]:.2f}"))
    below, above = errors
    assert (f"is {below[0]} below LoRA, {above[0]} above ELoRA (three seeds, fp32; p {below[1]} "
            f"and {above[1]} after Holm's correction). ELoRA r=1024 has {rows['elora r=1024']}."
            ) in page
    assert len(results.load("sst2", "elora r=1024", results.SEEDS)) == 3
    mean, _, _ = apart("quick", "lora r=8", results.SEEDS)
    corrected = results.corrected_p_values(results.rows_of_methods())
    assert len(corrected) == 10
    assert (f"LoRA is {mean} points above AFLoRA (p {corrected['mrpc', 'lora r=8']:.2f} after "
            "Holm's correction for ten comparisons)") in page
    corrected = results.corrected_p_values(results.ROWS_OF_QUESTIONS)
    assert f"(least p of {len(corrected)}: {min(corrected.values()):.2f};" in page


def test_what_one_should_see_is_what_a_committed_run_printed():
    """The front page's lines of the first command, as far as its two results hold them."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    sst2, mrpc = (json.loads((ROOT / f"results/cpu/{task}.json").read_text(encoding="utf-8"))
                  for task in ("sst2", "mrpc"))
    assert sst2["preset"] == mrpc["preset"] == "quick"
    assert f"\n{companion.EPOCH.format(**sst2['history'][-1])}\n" in page
    assert f"trainable parameters: {sst2['trainable_start']:,} at the start" in page
    assert f"end, {sst2['trainable_average']:,.0f} on average; head: 148,610\n" in page
    six_layers = SimpleNamespace(encoder=SimpleNamespace(layers=range(6)))
    first, last = (round(share * sst2["steps"]) for share in (sst2["t_i"], 1 - sst2["t_f"]))
    drawn = companion.freeze_map(six_layers, sst2["frozen_at"], first, last).splitlines()
    shown = page[page.index("freeze map: matrix"):page.index("merged into")].splitlines()
    assert len(shown) == 6
    for line in shown:  # the map there is further to the left
        assert line.split() in [drawn_line.split() for drawn_line in drawn]
    assert f"merged into the weights: accuracy {sst2['accuracy']:.2f};" in page
    assert f"{mrpc['accuracy']:.2f} (F1 {mrpc['f1']:.2f}) on MRPC" in " ".join(page.split())


def test_the_short_table_of_questions_has_the_numbers_of_the_files(committed):
    """Differences and standard errors; p after Holm's correction is below 0.05 where it is bold."""
    rows = rows_of("results/README.md", "| arm | trained on average | SST-2, quick |")
    assert [arm for arm, *_ in rows] == list(results.QUESTIONS)
    for column, preset, task in ((0, "quick", "sst2"), (2, "full", "mrpc")):
        results.use_preset(preset)
        corrected = results.corrected_p_values(results.ROWS_OF_QUESTIONS)
        for arm, *cells in rows:
            runs, apart = results.paired(task, arm, results.QUESTION_SEEDS)
            mean, deviation = results.mean_and_deviation(apart)
            expected = f"{mean:+.2f} ± {deviation / len(apart) ** 0.5:.2f}"
            bold = corrected[task, arm] < 0.05
            assert len(apart) == 5
            assert cells[column] == results.trained_on_average(runs)
            assert cells[column + 1] == (f"**{expected}**" if bold else expected)


def test_committed_runs_are_whole_and_of_no_machine(committed):
    """Every file of a preset's folder is a cell under its own name."""
    paths = [path for preset in results.PRESETS
             for path in sorted(ROOT.glob(f"results/{preset}/*.json"))]
    assert len(paths) > 150
    precisions = {}  # of a preset's task
    for path in paths:
        text = path.read_text(encoding="utf-8")
        cell = json.loads(text)
        results.use_preset(path.parent.name)
        lr = cell["lr"] if path.name.startswith("search-") else None
        assert results.path_of(cell["task"], cell["arm"], cell["seed"], lr) == path
        assert cell["preset"] == results.recipe_name()
        assert not re.search(r'[" ]/\w+/', text)  # an absolute path
        assert cell["accuracy"] == cell["history"][-1]["accuracy"]
        assert precisions.setdefault((path.parent, cell["task"]), cell["precision"]) == \
            cell["precision"]
        assert ("scored_on" in cell) == bool(lr and results.PRESET != "quick")
