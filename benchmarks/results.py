"""The evidence: every method side by side, and AFLoRA's own questions, on several seeds.

    python benchmarks/results.py             runs what is not done yet; stop and start at will
    python benchmarks/results.py --table     the tables of what is done, as Markdown

On a CPU the rows and epochs of the quick preset, under results/quick; on CUDA those of the full
one, under results/full: never mixed. A cell is one run of the companion and one JSON file. First a
learning rate is chosen for every method and task among four, by the last epoch's dev accuracy on
fewer rows with a seed that is not reported. A run of a question differs in one thing from AFLoRA's
run of the same seed. Texts and weights as for train_glue_small.py; on a CPU one thread a run.
"""

import argparse, contextlib, io, json, math, os, statistics, sys, tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

if __name__ != "results":  # several runs at once: their bars would mix
    os.environ["TQDM_DISABLE"] = "1"
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402

PRESET = "full" if torch.cuda.is_available() else "quick"
FOLDER = ROOT / "results" / PRESET
TASKS, AFLORA = ("sst2", "mrpc"), "aflora r=4"
METHODS = {  # arm: flags of the companion, learning rates to choose from
    "head only": ("--method head", (1e-3, 2e-3, 5e-3, 1e-2)),
    "full": ("--method full", (5e-5, 1e-4, 2e-4, 4e-4)),
    "lora r=8": ("--method lora", (5e-4, 1e-3, 2e-3, 4e-3)),
    "elora r=4": ("--method elora --rank 4", (1e-2, 2e-2, 4e-2, 8e-2)),
    "elora r=1024": ("--method elora", (4e-3, 1e-2, 2e-2, 4e-2)),
    AFLORA: ("--method aflora", (4e-3, 1e-2, 2e-2, 4e-2))}
QUESTIONS = {  # arm: flags beside AFLoRA's; an arm's order of freezing is its first word
    "|grad|": "--sensitivity gradient", "|w|": "--sensitivity weight",
    "attention's A, B": "--train-matrices attention", "all A, B": "--train-matrices all",
    "never frozen": "--t-i 1 --t-f 0", "random first": "", "highest first": "",
    "one shot before": "--method freezenet"}
SEEDS, QUESTION_SEEDS, SEARCH_SEED = range(3), range(5), 100
SEARCH_ROWS = dict(sst2=2000, mrpc=1200)


class Recorder(aflora.AdaptiveFreezer):
    """Freezes in the order of its arm, and keeps the scores at each look. While nothing freezes it
    also simulates two rules on those scores: the paper's, and the one of the authors' code."""
    arm, recipe, last = AFLORA, None, None  # of the cell that runs; the last one made

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        Recorder.last = self
        total = self.schedule["total_steps"]  # planned: the schedule that "never frozen" ignores
        self.planned = dict(total_steps=total, t_i=round(self.recipe["t_i"] * total),
                            t_f=round(self.recipe["t_f"] * total))
        self.record = dict(step=[], scores=[], scheduled=[], paper=[], authors=[])
        self.random = torch.Generator().manual_seed(torch.initial_seed())  # the run's
        self.authors = {}  # frozen by the authors' rule, in order

    def scores(self):
        scores = super().scores()
        if self.arm == "highest first":
            return {name: -score for name, score in scores.items()}
        if self.arm == "random first":
            return dict(zip(scores, torch.rand(len(scores), generator=self.random).tolist()))
        return scores

    def freeze(self, step, optimizer):
        if step in self.looks and self.live:
            means, r = super().scores(), aflora.freezing_fraction(step, **self.planned)
            for key, value in dict(step=step, scores=means, scheduled=r).items():
                self.record[key].append(value)
            if self.arm == "never frozen":
                self.record["paper"].append(math.floor(r * len(means)) / len(means))
                elements = [part for name, part in self.split(self.Ibar * self.Ubar).items()
                            if name not in self.authors]
                if elements and (k := round(r * sum(map(len, elements)))):
                    threshold = torch.cat(elements).kthvalue(k).values.item()
                    self.authors |= {name: step for name, mean in means.items()
                                     if name not in self.authors and mean <= threshold}
                self.record["authors"].append(len(self.authors) / len(means))
        return super().freeze(step, optimizer)


def path_of(task, arm, seed, lr=None):
    """Where a cell's result lies; `lr` marks one of the search."""
    name = "".join(c if c.isalnum() else "-" for c in arm.replace("|", ""))
    return FOLDER / (f"search-{task}-{name}-{lr:g}.json" if lr else f"{task}-{name}-s{seed}.json")


def chosen_rate(task, arm):
    """The rate of the best search cell; of equal ones the lower."""
    arm = AFLORA if arm in QUESTIONS else arm
    cells = [json.loads(path_of(task, arm, SEARCH_SEED, lr).read_text()) for lr in METHODS[arm][1]]
    return max(cells, key=lambda cell: cell["accuracy"])["lr"]


def run(task, arm, seed, lr=None):
    """Runs one cell in this process, writes its file and returns its line."""
    torch.set_num_threads(1 if PRESET == "quick" else os.cpu_count())
    aflora.AdaptiveFreezer = Recorder
    Recorder.arm, Recorder.recipe, Recorder.last = arm, companion.RECIPES[PRESET, task], None
    flags = METHODS[AFLORA][0] + " " + QUESTIONS[arm] if arm in QUESTIONS else METHODS[arm][0]
    rate = lr or chosen_rate(task, arm)
    flags += f" --task {task} --preset {PRESET} --seed {seed} --lr {rate}"
    flags += f" --head-lr {rate}" if arm in ("head only", "full") else ""
    flags += f" --limit {SEARCH_ROWS[task]}" if lr else ""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        if companion.main([*flags.split(), "--out", folder]):
            raise RuntimeError(f"python train_glue_small.py {flags}: failed, see above")
        result = json.loads(Path(folder, "result.json").read_text())
    if companion.STAND_IN in result["data"]:
        raise RuntimeError(f"{result['data']}: SST-2 itself is needed, see --data of the companion")
    # Times and memory say nothing where two runs share the cores; paths are this machine's.
    for key in ("seconds", "ms_per_step", "peak_memory_bytes", "data", "weights"):
        del result[key]
    record = Recorder.last.record if Recorder.last and not lr and seed == 0 else None
    result |= dict(arm=arm, command=f"train_glue_small.py {flags}", record=record)
    FOLDER.mkdir(parents=True, exist_ok=True)
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


def load(task, arm, seeds):
    """The results of an arm's finished cells, in the order of the seeds."""
    paths = [path_of(task, arm, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def spread(values):
    """Mean ± standard deviation over seeds."""
    mean = f"{statistics.mean(values):.1f}"
    return mean + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(title, head, lines):
    """Prints a Markdown table, unless it has no line."""
    if lines:
        print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        print(*(f"| {' | '.join(line)} |".replace("|grad|", r"\|grad\|").replace(
            "|w|", r"\|w\|") for line in lines), sep="\n")


def tables():
    """Markdown: the methods; then the questions, as paired differences from AFLoRA's runs."""
    average = lambda cells: f"{statistics.mean(c['trainable_average'] for c in cells):,.0f}"  # noqa
    accuracy = lambda cells: spread([c["accuracy"] for c in cells])  # noqa: E731
    for task in TASKS:
        lines = [[arm, f"{cells[0]['lr']:g}", average(cells), str(len(cells)), accuracy(cells),
                  spread([c["f1"] for c in cells]) if cells[0]["f1"] else "",
                  spread([c["best_accuracy"] for c in cells])]
                 for arm in METHODS if (cells := load(task, arm, SEEDS))]
        table(task, ("method", "rate", "trained on average", "seeds", "accuracy", "F1", "best"),
              lines)
        base, lines = {c["seed"]: c for c in load(task, AFLORA, QUESTION_SEEDS)}, []
        for arm in QUESTIONS:
            if cells := [c for c in load(task, arm, QUESTION_SEEDS) if c["seed"] in base]:
                apart = [c["accuracy"] - base[c["seed"]]["accuracy"] for c in cells]
                error = statistics.stdev(apart) / len(apart) ** 0.5 if apart[1:] else None
                lines.append([arm, average(cells), str(len(cells)), accuracy(cells),
                              f"{statistics.mean(apart):+.2f}", f"{error:.2f}" if error else ""])
        table(f"{task}, against {AFLORA} of the same seeds", (
            "arm", "trained on average", "seeds", "accuracy", "difference", "its standard error"),
            lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only print what is done")
    if not parser.parse_args().table:
        for seeds, methods in ((SEEDS, METHODS), (QUESTION_SEEDS, [AFLORA])):
            for task in TASKS:
                run_all([(task, arm, SEARCH_SEED, lr)
                         for arm, (_, rates) in METHODS.items() for lr in rates])
                run_all([(task, arm, seed) for arms in (methods, QUESTIONS)
                         for seed in seeds for arm in arms])
    tables()


if __name__ == "__main__":
    main()
