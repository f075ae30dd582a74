"""The evidence: every method side by side, and AFLoRA's own questions, on several seeds.

    python benchmarks/results.py             runs what is not done yet; stop and start at will
    python benchmarks/results.py --table     the tables of what is done, as Markdown

On a CPU the rows and epochs of the quick preset, under results/quick; on CUDA those of the full
one, under results/full: never mixed. A cell is one run of the companion (of the question "one shot
before": of examples/freezenet.py) and one JSON file. First a learning rate is chosen for every
method and task among four, by the last epoch's dev accuracy on fewer rows with a seed that is not
reported. A run of a question differs in one thing from AFLoRA's run of the same seed. Texts and
weights as for train_glue_small.py; on a CPU one thread a run.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

if __name__ != "results":  # several runs at once: their bars would mix
    os.environ["TQDM_DISABLE"] = "1"
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402
from data.fetch import STAND_IN  # noqa: E402

PRESET = "full" if torch.cuda.is_available() else "quick"
FOLDER = ROOT / "results" / PRESET
TASKS = ("sst2", "mrpc")
AFLORA = "aflora r=4"
METHODS = {  # arm: flags of the companion, learning rates to choose from
    "head only": ("--method head", (1e-3, 2e-3, 5e-3, 1e-2)),
    "full": ("--method full", (5e-5, 1e-4, 2e-4, 4e-4)),
    "lora r=8": ("--method lora", (5e-4, 1e-3, 2e-3, 4e-3)),
    "elora r=4": ("--method elora --rank 4", (1e-2, 2e-2, 4e-2, 8e-2)),
    "elora r=1024": ("--method elora", (4e-3, 1e-2, 2e-2, 4e-2)),
    AFLORA: ("--method aflora", (4e-3, 1e-2, 2e-2, 4e-2)),
}
ONE_SHOT = "one shot before"
QUESTIONS = {  # arm: flags beside AFLoRA's; an arm's order of freezing is its first word
    "|grad|": "--sensitivity gradient",
    "|w|": "--sensitivity weight",
    "attention's A, B": "--train-matrices attention",
    "all A, B": "--train-matrices all",
    "never frozen": "--t-i 1 --t-f 0",
    "random first": "",
    "highest first": "",
    ONE_SHOT: "",
}
SEEDS = range(3)
QUESTION_SEEDS = range(5)
SEARCH_SEED = 100
SEARCH_ROWS = {"sst2": 2000, "mrpc": 1200}


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
        products = self.split(self.Ibar * self.Ubar)
        live = [name for name in means if name not in self.frozen_by_authors]
        count = round(r * sum(len(products[name]) for name in live))
        if count > 0:
            elements = torch.cat([products[name] for name in live])
            threshold = elements.kthvalue(count).values.item()
            self.frozen_by_authors += [name for name in live if means[name] <= threshold]


def path_of(task, arm, seed, lr=None):
    """Where a cell's result lies; `lr` marks one of the search."""
    name = "".join(c if c.isalnum() else "-" for c in arm.replace("|", ""))
    if lr:
        return FOLDER / f"search-{task}-{name}-{lr:g}.json"
    return FOLDER / f"{task}-{name}-s{seed}.json"


def chosen_rate(task, arm):
    """The rate of the best search cell; of equal ones the lower."""
    arm = AFLORA if arm in QUESTIONS else arm
    rates = METHODS[arm][1]
    cells = [json.loads(path_of(task, arm, SEARCH_SEED, lr).read_text()) for lr in rates]
    return max(cells, key=lambda cell: cell["accuracy"])["lr"]


def command_of(task, arm, seed, lr=None):
    """The script that runs a cell, relative to the repository, with its flags but --out."""
    rate = lr or chosen_rate(task, arm)
    own = f"--task {task} --preset {PRESET} --seed {seed} --lr {rate}"
    if arm == ONE_SHOT:
        return f"examples/freezenet.py {own}"
    if arm in QUESTIONS:
        own = f"{QUESTIONS[arm]} {own}"
    if arm in ("head only", "full"):
        own += f" --head-lr {rate}"
    if lr:
        own += f" --limit {SEARCH_ROWS[task]}"
    flags = METHODS[AFLORA if arm in QUESTIONS else arm][0]
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
    torch.set_num_threads(1 if PRESET == "quick" else os.cpu_count())
    aflora.AdaptiveFreezer = Recorder  # where the companion looks it up
    Recorder.arm = arm
    Recorder.recipe = companion.RECIPES[PRESET, task]
    Recorder.last = None
    command = command_of(task, arm, seed, lr)
    result = result_of(command)
    if STAND_IN in result["data"]:
        raise RuntimeError(f"{result['data']}: SST-2 itself is needed, see --data of the companion")
    # Times and memory say nothing where two runs share the cores; paths are this machine's.
    for key in ("seconds", "ms_per_step", "peak_memory_bytes", "data", "weights"):
        result.pop(key, None)
    result["arm"] = arm
    result["command"] = command
    result["record"] = None
    freezer = Recorder.last
    if freezer and freezer.step > 0 and seed == 0 and not lr:  # in one shot it is made, not used
        result["record"] = freezer.record
    aflora.write_file(path_of(task, arm, seed, lr), json.dumps(result).encode())
    return f"{task}, {arm}, seed {seed}, lr {result['lr']:g}: {result['accuracy']:.2f}"


def run_all(cells):
    """Runs the cells that have no file yet, as many at once as there are cores."""
    waiting = [cell for cell in cells if not path_of(*cell).exists()]
    print(f"{len(cells)} cells, {len(waiting)} still to do", flush=True)
    jobs = 1 if PRESET == "full" else os.cpu_count()
    with ProcessPoolExecutor(jobs, torch.multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(run, *cell) for cell in waiting]):
                print(future.result(), flush=True)
        except BaseException:  # Ctrl-C, or a cell failed: the pool would do all others first
            for process in torch.multiprocessing.active_children():
                process.kill()
            raise


def run_everything():
    """All of three seeds first, then the questions' other two."""
    for seeds, methods in ((SEEDS, list(METHODS)), (QUESTION_SEEDS, [AFLORA])):
        for task in TASKS:
            run_all([(task, arm, SEARCH_SEED, lr)
                     for arm, (_, rates) in METHODS.items() for lr in rates])
            run_all([(task, arm, seed) for arms in (methods, list(QUESTIONS))
                     for seed in seeds for arm in arms])


# --------------------------------------------------------------------------------------- tables
def load(task, arm, seeds):
    """The results of an arm's finished cells, in the order of the seeds."""
    paths = [path_of(task, arm, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def mean_and_deviation(values):
    """Mean and standard deviation over seeds; one value alone deviates by 0."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation


def spread(values, form=".1f"):
    """Mean ± standard deviation over seeds, as text; of one value the mean alone."""
    texts = [format(number, form) for number in mean_and_deviation(values)]
    return " ± ".join(texts if len(values) > 1 else texts[:1])


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


def methods_table(task):
    """Every method on one task."""
    lines = []
    for arm in METHODS:
        cells = load(task, arm, SEEDS)
        if cells:
            f1 = spread_of(cells, "f1") if cells[0]["f1"] else ""
            lines.append([arm, f"{cells[0]['lr']:g}", trained_on_average(cells), str(len(cells)),
                          spread_of(cells, "accuracy"), f1, spread_of(cells, "best_accuracy")])
    head = ("method", "rate", "trained on average", "seeds", "accuracy", "F1", "best")
    table(task, head, lines)


def questions_table(task):
    """The questions on one task, as paired differences from AFLoRA's runs of the same seeds."""
    base = {cell["seed"]: cell["accuracy"] for cell in load(task, AFLORA, QUESTION_SEEDS)}
    lines = []
    for arm in QUESTIONS:
        cells = [cell for cell in load(task, arm, QUESTION_SEEDS) if cell["seed"] in base]
        if cells:
            apart = [cell["accuracy"] - base[cell["seed"]] for cell in cells]
            mean, deviation = mean_and_deviation(apart)
            error = deviation / len(apart) ** 0.5
            lines.append([arm, trained_on_average(cells), str(len(cells)),
                          spread_of(cells, "accuracy"), f"{mean:+.2f}",
                          f"{error:.2f}" if error else ""])
    head = ("arm", "trained on average", "seeds", "accuracy", "difference", "its standard error")
    table(f"{task}, against {AFLORA} of the same seeds", head, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only print what is done")
    if not parser.parse_args().table:
        run_everything()
    for task in TASKS:
        methods_table(task)
        questions_table(task)


if __name__ == "__main__":
    main()
