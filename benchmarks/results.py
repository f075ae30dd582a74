"""The evidence: every method side by side, and AFLoRA's own questions, on several seeds.

    python benchmarks/results.py             runs what is not done yet; stop and start at will
    python benchmarks/results.py --table     the tables of what is done, as Markdown, of all presets
    ... --preset full --task mrpc            by default quick on a CPU, full on CUDA; both tasks
    ... --preset ranks --task mrpc           quick's rows and epochs: what AFLoRA lacks beside LoRA
    ... --preset ranks-h100 --task mrpc      the same once more, apart: another device and precision
    ... --preset recipe --task mrpc          full's: AFLoRA with other epochs, head rates; fold only
    ... --preset sst2-20k --task sst2        quick's epochs of 20,000 rows: four methods

A preset's rows and epochs are the companion's, unless an arm's flags change them; its results lie
under results/PRESET: never mixed. Those of this repository are there: to make them anew, move that
folder away first.
A cell is one run of the companion (of the question "one shot before": of examples/freezenet.py)
and one JSON file; its history has the accuracy after each epoch. A run of a question differs in one
thing from AFLoRA's run of the same seed (one shot before in two: what it keeps does not decay).
Texts and weights as for train_glue_small.py.

First a learning rate is chosen for every arm that has several, by the last epoch's accuracy with a
seed that is not reported. Quick: on dev, with fewer rows to train on. The others: on a fold, every
tenth training row, which such a run does not train on; dev rows are not looked at.

--jobs N cells run at once, one thread each: as many as there are cores, on CUDA at most 16. These
share the GPU better with the driver's multi-process service: `nvidia-cuda-mps-control -d`.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

if __name__ != "results":  # several runs at once: their bars would mix
    os.environ["TQDM_DISABLE"] = "1"
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402
from chance import holm, mean_and_deviation, p_value, spread  # noqa: E402
from data import text  # noqa: E402
from data.fetch import STAND_IN  # noqa: E402

PRESET = "full" if torch.cuda.is_available() else "quick"
FOLDER = ROOT / "results" / PRESET
PRESETS = ("quick", "full", "ranks", "ranks-h100", "recipe", "sst2-20k")
JOBS = min(os.cpu_count(), 16) if torch.cuda.is_available() else os.cpu_count()
TASKS = ("sst2", "mrpc")
AFLORA = "aflora r=4"
METHODS = {  # arm: flags of the companion, learning rates to choose from
    "head only": ("--method head", (1e-3, 2e-3, 5e-3, 1e-2)),
    "full": ("--method full", (5e-5, 1e-4, 2e-4, 4e-4)),
    "lora r=8": ("--method lora", (5e-4, 1e-3, 2e-3, 4e-3)),
    "elora r=4": ("--method elora --rank 4", (1e-2, 2e-2, 4e-2, 8e-2)),
    "elora r=1024": ("--method elora", (4e-3, 1e-2, 2e-2, 4e-2)),
    AFLORA: ("--method aflora --rank 4", (4e-3, 1e-2, 2e-2, 4e-2)),
}
APART = {"vectors' rate x 4": 4, "matrices' rate x 4": 1 / 4}  # vectors' rate / that of A and B
FROM_ONE = "s_d starts at 1"
OTHER_ORDER = ("random first", "highest first")
NO_COMMAND = (*APART, FROM_ONE, *OTHER_ORDER)  # the companion has no flags for these
RANKS = {  # the same for the preset of that name
    "aflora r=16": ("--method aflora --rank 16", (1e-2, 1.4e-2, 2e-2)),
    AFLORA: ("--method aflora --rank 4", (1e-2, 1.4e-2, 2e-2)),
    "lora r=8": ("--method lora", (1e-3, 2e-3, 4e-3)),
    "aflora r=8": ("--method aflora --rank 8", (1e-2, 1.4e-2, 2e-2)),
    "vectors' rate x 4": ("--method aflora --rank 4", (5e-3,)),
    "matrices' rate x 4": ("--method aflora --rank 4", (2e-2,)),
    "freezing from 0.3 on": ("--method aflora --rank 4 --t-i 0.3", (2e-2,)),
    FROM_ONE: ("--method aflora --rank 4", (4e-3,)),
}
RECIPE = {  # the same: full's recipe, one thing changed
    AFLORA: ("--method aflora --rank 4", (4e-3, 1e-2)),
    "head's rate 5e-4": ("--method aflora --rank 4 --head-lr 5e-4", (4e-3,)),
    "head's rate 2e-3": ("--method aflora --rank 4 --head-lr 2e-3", (4e-3,)),
    "5 epochs": ("--method aflora --rank 4 --epochs 5", (4e-3,)),
    "12 epochs": ("--method aflora --rank 4 --epochs 12", (4e-3,)),
}
ROWS = {  # the same: quick's recipe with 20,000 rows
    AFLORA: ("--method aflora --rank 4 --limit 20000", (4e-3, 1e-2, 2e-2)),
    "lora r=8": ("--method lora --limit 20000", (5e-4, 1e-3, 2e-3)),
    "elora r=4": ("--method elora --rank 4 --limit 20000", (1e-2, 2e-2, 4e-2)),
    "elora r=1024": ("--method elora --limit 20000", (2e-2,)),
}
ARMS = {"quick": METHODS, "full": METHODS, "ranks": RANKS, "ranks-h100": RANKS, "recipe": RECIPE,
        "sst2-20k": ROWS}
ORDER = (AFLORA, "lora r=8", "full", "elora r=1024", "elora r=4", "head only")  # they run in it
ONE_SHOT = "one shot before"
QUESTIONS = {  # arm: flags beside AFLoRA's
    "|grad|": "--sensitivity gradient",
    "|w|": "--sensitivity weight",
    "attention's A, B": "--train-matrices attention",
    "all A, B": "--train-matrices all",
    "never frozen": "--t-i 1 --t-f 0",
    "random first": "",
    "highest first": "",
    ONE_SHOT: "",
}
SEEDS = range(3)  # of the quick preset's methods
QUESTION_SEEDS = range(5)  # and of all of the full one
FURTHER_SEEDS = range(5, 10)  # of all of the full one, too: on these nothing was chosen by hand
ROWS_OF_QUESTIONS = [(arm, arm, QUESTION_SEEDS) for arm in QUESTIONS]  # as rows_of_methods()
SEARCH_SEED = 100
LOAD_TASK = text.load_task
PARAMETER_GROUPS = aflora.parameter_groups
FOLD = f"every tenth training row after a shuffle with seed {SEARCH_SEED}, not trained on"
SEARCH_ROWS = {"sst2": 2000, "mrpc": 1200}


def use_preset(name):
    """From now on the cells are of this preset."""
    global PRESET, FOLDER
    PRESET = name
    FOLDER = ROOT / "results" / name


def recipe_name():
    """The companion's name for the preset's rows and epochs."""
    return "full" if PRESET in ("full", "recipe") else "quick"


def methods():
    """The preset's arms, each with its flags and rates."""
    return ARMS[PRESET]


def method_seeds():
    """The seeds of every method in the preset's main table."""
    if PRESET == "recipe":
        return ()
    return SEEDS if PRESET in ("quick", "sst2-20k") else QUESTION_SEEDS


# ------------------------------------------------------------------------------------- one cell
class Recorder(aflora.AdaptiveFreezer):
    """Freezes in the order of its arm, and keeps the scores at each look.

    While nothing freezes it also simulates two rules on those scores: the paper's, and the one of
    the authors' code.
    """

    arm = AFLORA  # of the cell that runs
    recipe = None  # of its task
    last = None  # the freezer that was made last

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        Recorder.last = self
        self.planned = {  # the recipe's schedule, which "never frozen" itself ignores
            "total_steps": self.total_steps,
            "t_i": round(self.recipe["t_i"] * self.total_steps),
            "t_f": round(self.recipe["t_f"] * self.total_steps),
        }
        self.record = {"step": [], "scores": [], "scheduled": [], "paper": [], "authors": []}
        self.random = torch.Generator().manual_seed(torch.initial_seed())  # the run's
        self.frozen_by_authors = []
        if self.arm == FROM_ONE:
            for layer in self.adapters.values():
                layer.s_d.data.fill_(1.0)

    def scores(self):
        scores = super().scores()
        if self.arm == "highest first":
            return {name: -score for name, score in scores.items()}
        if self.arm == "random first":
            return dict(zip(scores, torch.rand(len(scores), generator=self.random).tolist()))
        return scores

    def freeze(self, optimizer):
        is_look = self.step % self.interval == 0 or self.step >= self.total_steps - self.t_f
        if is_look and self.live:
            self.keep_record()
        return super().freeze(optimizer)

    def keep_record(self):
        """Appends this look to the record."""
        means = super().scores()
        r = aflora.freezing_fraction(self.step, **self.planned)
        self.record["step"].append(self.step)
        self.record["scores"].append(means)
        self.record["scheduled"].append(float(r))
        if self.arm == "never frozen":
            self.simulate_authors(means, r)
            self.record["paper"].append(math.floor(r * len(means)) / len(means))
            self.record["authors"].append(len(self.frozen_by_authors) / len(means))

    def simulate_authors(self, means, r):
        """Their rule: r is the share of the elements below a threshold, and a matrix freezes when
        the mean of its elements is not above that."""
        products = {name: (self.Ibar[name] * self.Ubar[name]).flatten() for name in means}
        live = [name for name in means if name not in self.frozen_by_authors]
        count = round(r * sum(len(products[name]) for name in live))
        if count > 0:
            elements = torch.cat([products[name] for name in live])
            threshold = elements.kthvalue(count).values.item()
            self.frozen_by_authors += [name for name in live if means[name] <= threshold]


def groups_with_rates_apart(model, lr, *others):
    """aflora.parameter_groups, but s_d and s_b have a rate of their own, as the arm says."""
    groups = PARAMETER_GROUPS(model, lr, *others)
    layers = aflora.adapters_of(model).values()
    vectors = {p for layer in layers for p in (layer.s_d, layer.s_b)}
    own = [group for group in groups if vectors.issuperset(group["params"])]
    assert own, "without weight decay A and B are in the vectors' group"
    for group in own:
        group["lr"] = group["peak_lr"] = lr * APART[Recorder.arm]
    return groups


def path_of(task, arm, seed, lr=None):
    """Where a cell's result lies; `lr` marks one of the search."""
    name = "".join(c if c.isalnum() else "-" for c in arm.replace("|", ""))
    if lr:
        return FOLDER / f"search-{task}-{name}-{lr:g}.json"
    return FOLDER / f"{task}-{name}-s{seed}.json"


def chosen_rate(task, arm):
    """The rate of the best search cell, of equal ones the lower; or the only rate there is."""
    arm = AFLORA if arm in QUESTIONS else arm
    rates = methods()[arm][1]
    if len(rates) == 1:
        return rates[0]
    cells = [json.loads(path_of(task, arm, SEARCH_SEED, lr).read_text()) for lr in rates]
    return best_of(cells)["lr"]


def best_of(cells):
    """Of search cells in the order of their rates."""
    return max(cells, key=lambda cell: cell["accuracy"])


def load_fold(name, folder=None):
    """A task whose dev is every tenth training row, as FOLD says, and whose train the others."""
    task = LOAD_TASK(name, folder)
    random = torch.Generator().manual_seed(SEARCH_SEED)
    rows = [task.train[i] for i in torch.randperm(len(task.train), generator=random)]
    task.dev = rows[::10]
    task.train = [row for i, row in enumerate(rows) if i % 10 != 0]
    return task


def command_of(task, arm, seed, lr=None):
    """The script that runs a cell, relative to the repository, with its flags but --out."""
    rate = lr or chosen_rate(task, arm)
    own = f"--task {task} --preset {recipe_name()} --seed {seed} --lr {rate}"
    if arm == ONE_SHOT:
        return f"examples/freezenet.py --rank 4 {own}"
    if arm in QUESTIONS:
        own = f"{QUESTIONS[arm]} {own}"
    if arm == "full" and PRESET == "quick":
        own += f" --head-lr {rate}"
    elif arm == "full":  # one rate of the head for all methods
        own += f" --head-lr {companion.RECIPES[recipe_name(), task]['head_lr']}"
    if lr and PRESET == "quick":
        own += f" --limit {SEARCH_ROWS[task]}"
    flags = methods()[AFLORA if arm in QUESTIONS else arm][0]
    return f"train_glue_small.py {flags} {own}"


def result_of(command):
    """Runs a command in this process, silently, and returns its result.json."""
    script, *flags = command.split()
    main = importlib.import_module(Path(script).stem).main
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            if main([*flags, "--out", folder]):
                raise RuntimeError(f"python {command}: failed, see above")
        return json.loads(Path(folder, "result.json").read_text())


def run(task, arm, seed, lr=None):
    """Runs one cell in this process, writes its file and returns its line."""
    torch.set_num_threads(1)
    aflora.AdaptiveFreezer = Recorder  # where the companion looks it up
    aflora.parameter_groups = groups_with_rates_apart if arm in APART else PARAMETER_GROUPS
    Recorder.arm = arm
    Recorder.recipe = companion.RECIPES[recipe_name(), task]
    Recorder.last = None
    on_fold = lr and PRESET != "quick"
    text.load_task = load_fold if on_fold else LOAD_TASK
    command = command_of(task, arm, seed, lr)
    result = result_of(command)
    if STAND_IN in result["data"]:
        raise RuntimeError(f"{result['data']}: SST-2 itself is needed, see --data of the companion")
    # Times and memory say nothing where two runs share the cores; paths are this machine's.
    for key in ("seconds", "ms_per_step", "peak_memory_bytes", "data"):
        result.pop(key, None)
    for line in result["history"]:
        line.pop("seconds")
    result["weights"] = Path(result["weights"]).name
    result["arm"] = arm
    result["command"] = None if arm in NO_COMMAND else command
    if on_fold:
        result["scored_on"] = FOLD
    result["record"] = None
    freezer = Recorder.last
    if seed == 0 and freezer and freezer.record["step"]:  # in one shot it is made, but never looks
        result["record"] = freezer.record
    aflora.write_file(path_of(task, arm, seed, lr), json.dumps(result).encode())
    return f"{task}, {arm}, seed {seed}, lr {result['lr']:g}: {result['accuracy']:.2f}"


def run_all(cells, pool):
    """Runs the cells that have no file yet in the pool's processes, in their order."""
    waiting = [cell for cell in cells if not path_of(*cell).exists()]
    print(f"{len(cells)} cells, {len(waiting)} still to do", flush=True)
    try:
        for future in as_completed([pool.submit(run, *cell) for cell in waiting]):
            print(future.result(), flush=True)
    except BaseException:  # Ctrl-C, or a cell failed: the pool would do all others first
        for process in torch.multiprocessing.active_children():
            process.kill()
        raise


def search_cells(task, arms):
    """The cells that choose these arms' rates. Where there is one, there is nothing to choose, but
    the preset `recipe` consists of such cells."""
    arms = {arm: methods()[arm][1] for arm in arms}
    return [(task, arm, SEARCH_SEED, lr) for arm, rates in arms.items() for lr in rates
            if len(rates) > 1 or PRESET == "recipe"]


def seed_cells(task, arms, seeds):
    """These arms' cells, all of one seed before the next."""
    return [(task, arm, seed) for seed in seeds for arm in arms]


def check_precision(task):
    """Ends the script where this task's cells were computed in another precision than here: one
    mean of both would say nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = companion.choose_precision("auto", device)
    cells = [json.loads(path.read_text()) for path in FOLDER.glob(f"*{task}-*.json")]
    there = {cell["precision"] for cell in cells} - {here}
    if there:
        sys.exit(f"{FOLDER} has {task} in {', '.join(there)}, this machine computes in {here}: "
                 "move those files to another folder first")


def run_everything(tasks, jobs):
    """Runs the tasks' cells, `jobs` at once."""
    for task in tasks:
        check_precision(task)
    processes = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, processes, use_preset, (PRESET,)) as pool:
        for task in tasks:
            run_task(task, pool)


def run_task(task, pool):
    """The rates, the methods, then the questions."""
    arms = ORDER if methods() is METHODS else methods()
    run_all(search_cells(task, arms), pool)
    cells = seed_cells(task, arms, method_seeds())
    if PRESET == "full":
        cells += seed_cells(task, arms, FURTHER_SEEDS)
    if methods() is METHODS:
        cells += seed_cells(task, [AFLORA, *QUESTIONS], QUESTION_SEEDS)
    run_all([*dict.fromkeys(cells)], pool)  # each once: AFLoRA is in both


# --------------------------------------------------------------------------------------- tables
def load(task, arm, seeds):
    """The results of an arm's finished cells, in the order of the seeds."""
    paths = [path_of(task, arm, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def spread_of(cells, key):
    """Mean ± standard deviation of one of the numbers in the cells."""
    return spread([cell[key] for cell in cells])


def trained_on_average(cells):
    """Parameters trained, averaged over the steps and the seeds."""
    mean, _ = mean_and_deviation([cell["trainable_average"] for cell in cells])
    return f"{mean:,.0f}"


def table(title, head, lines):
    """Prints a Markdown table, unless it has no line."""
    if not lines:
        return
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        text = f"| {' | '.join(line)} |"
        print(text.replace("|grad|", r"\|grad\|").replace("|w|", r"\|w\|"))


def rows_of_methods():
    """(name, arm, seeds) of the rows of the preset's main table."""
    rows = [(arm, arm, method_seeds()) for arm in methods()]
    if PRESET == "full":
        rows += [(f"{arm}, seeds 5 to 9", arm, FURTHER_SEEDS) for arm in methods()]
    return rows


def methods_table(task):
    """Every method on one task, and what makes the adapters of seed 0."""
    corrected = corrected_p_values(rows_of_methods())
    lines = []
    commands = {}  # each once: an arm may have two rows
    for name, arm, seeds in rows_of_methods():
        cells = load(task, arm, seeds)
        if cells:
            f1 = spread_of(cells, "f1") if cells[0]["f1"] else ""
            mean, error, p = apart_from_aflora(task, name, arm, seeds, corrected)
            lines.append([name, f"{cells[0]['lr']:g}", trained_on_average(cells), str(len(cells)),
                          spread_of(cells, "accuracy"), f1, spread_of(cells, "best_accuracy"),
                          f"{mean} ± {error}" if error else mean, p])
            if arm not in NO_COMMAND:
                commands[arm] = f"    python {command_of(task, arm, 0)}"
    head = ("method", "rate", "trained on average", "seeds", "accuracy", "F1", "best",
            f"against {AFLORA}", f"p, Holm, of {len(corrected)}")
    table(task, head, lines)
    if commands:
        print("\nThe commands of seed 0:\n", *commands.values(), sep="\n")


def search_table(task):
    """What each rate scored in the search, as far as it was run; each method's best is bold."""
    lines = []
    for arm, (_, rates) in methods().items():
        paths = [path_of(task, arm, SEARCH_SEED, lr) for lr in rates]
        cells = [json.loads(path.read_text()) for path in paths if path.exists()]
        if cells:
            texts = {cell["lr"]: f"{cell['lr']:g}: {cell['accuracy']:.1f}" for cell in cells}
            best = best_of(cells)["lr"]
            texts[best] = f"**{texts[best]}**"
            lines.append([arm, ", ".join(texts.values()), f"{len(cells)} of {len(rates)}"])
    scored_on = "dev" if PRESET == "quick" else "the fold"
    table(f"{task}, the search, accuracy on {scored_on}, seed {SEARCH_SEED}",
          ("method", "rate: accuracy", "rates run"), lines)


def paired(task, arm, seeds):
    """(cells, differences in accuracy from AFLoRA's runs of the same seeds)."""
    base = {cell["seed"]: cell["accuracy"] for cell in load(task, AFLORA, seeds)}
    cells = [cell for cell in load(task, arm, seeds) if cell["seed"] in base]
    return cells, [cell["accuracy"] - base[cell["seed"]] for cell in cells]


def corrected_p_values(rows):
    """{(task, name): p after Holm's correction} of such rows, over both tasks of the preset."""
    p_values = {}
    for task in TASKS:
        for name, arm, seeds in rows:
            _, apart = paired(task, arm, seeds)
            if len(apart) > 1 and arm != AFLORA:
                p_values[task, name] = p_value(apart)
    return holm(p_values)


def apart_from_aflora(task, name, arm, seeds, corrected):
    """The mean difference, its standard error and p as texts, empty where there are none."""
    _, apart = paired(task, arm, seeds)
    if not apart or arm == AFLORA:
        return "", "", ""
    mean, deviation = mean_and_deviation(apart)
    error = deviation / len(apart) ** 0.5
    p = corrected.get((task, name))
    return f"{mean:+.2f}", f"{error:.2f}" if error else "", "" if p is None else f"{p:.2f}"


def questions_table(task):
    """The questions on one task, as paired differences from AFLoRA's runs of the same seeds."""
    corrected = corrected_p_values(ROWS_OF_QUESTIONS)
    lines = []
    for name, arm, seeds in ROWS_OF_QUESTIONS:
        cells, _ = paired(task, arm, seeds)
        if cells:
            lines.append([name, trained_on_average(cells), str(len(cells)),
                          spread_of(cells, "accuracy"),
                          *apart_from_aflora(task, name, arm, seeds, corrected)])
    head = ("arm", "trained on average", "seeds", "accuracy", "difference", "its standard error",
            f"p, Holm, of {len(corrected)}")
    table(f"{task}, against {AFLORA} of the same seeds", head, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only print what is done")
    parser.add_argument("--preset", choices=PRESETS, help=f"default: {PRESET}; tables: all")
    parser.add_argument("--task", choices=TASKS, help="default: both")
    parser.add_argument("--jobs", default=JOBS, type=int, help="cells at once")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs: at least 1")
    tasks = [args.task] if args.task else TASKS
    presets = PRESETS if args.table else (PRESET,)
    for preset in [args.preset] if args.preset else presets:
        use_preset(preset)
        if not args.table:
            run_everything(tasks, args.jobs)
        for task in tasks:
            methods_table(task)
            search_table(task)
            questions_table(task)


if __name__ == "__main__":
    main()
