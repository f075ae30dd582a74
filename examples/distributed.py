"""The companion's job on several processes, with torch.distributed as the engine.

    torchrun --nproc_per_node=2 examples/distributed.py --task mrpc      CPU: gloo; CUDA: nccl
    torchrun --nproc_per_node=2 examples/distributed.py --help           the companion's flags

It trains one task, by default MRPC, and writes no checkpoints: --task both, --checkpoint-every and
--resume are refused.
Each process takes its share of every batch. The gradients of what still trains are averaged in
one flat all-reduce before they are scored. So every process freezes the same matrices at the same
step, and less is sent the more is frozen. (DistributedDataParallel's buckets are fixed when it
wraps a model: it would send what is frozen, too, and fail without find_unused_parameters.)

All that AFLoRA needs for it stands in ProcessGroupTraining. A run leaves adapter.pt and
result.json in the folder --out, by default runs/distributed.
"""

import datetime
import json
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
# Its functions have the process group as a default argument. Imported once there is one (the
# first optimizer step would do that), they keep it alive, and its threads can abort an ending
# process.
import torch.distributed.nn  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402
from aflora import AFLoRAError  # noqa: E402
from data.fetch import model_folder  # noqa: E402
from data.script import status_of  # noqa: E402
from data.text import load_task  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DOWNLOAD_TIME = datetime.timedelta(minutes=30)
STEP_TIME = datetime.timedelta(seconds=50)  # the longest wait for another process's gradients


class ProcessGroupTraining(aflora.Training):
    """Training in which this process is one of several, with the same model and plan."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.sent = []  # bytes of each step's all-reduce

    def average_gradients(self):
        """Replaces the gradient of each parameter that trains by its mean over all processes.

        One that is missing here counts as 0, since another process may have it: a layer that is
        left out by chance (layerdrop, experts) is not left out everywhere.
        """
        live = [p for p in self.parameters if p.requires_grad]
        for p in live:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in live])
        dist.all_reduce(flat)
        flat /= WORLD
        for p, part in zip(live, flat.split([p.numel() for p in live])):
            p.grad.copy_(part.view_as(p))
        self.sent.append(flat.nbytes)

    def step(self, micro_batches):
        """One optimizer step. AFLoRAError if another process froze other matrices in it."""
        frozen = super().step(micro_batches)
        if frozen:  # here as elsewhere: how many are due depends on the schedule alone
            self.check_frozen_alike(frozen)
        return frozen

    def check_frozen_alike(self, frozen):
        """Compares eight bytes, before gradients of different sizes could meet."""
        mine = zlib.crc32(json.dumps(frozen).encode())
        total = torch.tensor([mine], device=self.device)
        dist.all_reduce(total)
        if total.item() != mine * WORLD:
            raise AFLoRAError(f"processes froze differently in step {self.steps}")

    def report(self):
        """The line of the log, with the loss over all processes' rows."""
        dist.all_reduce(self.sums)
        self.sums /= WORLD
        super().report()


def my_share(examples, rows):
    """This process's part of a batch: ids, segments, mask (n, T), labels (n,) and a weight."""
    mine = rows[RANK::WORLD]
    # The mean over processes of weight * (mean over my rows) is the mean over all rows.
    weight = torch.tensor(len(mine) * WORLD / len(rows))
    if len(mine) == 0:
        mine = rows[:1]  # of weight 0: its gradients are zeros, but they are there
    return *examples.collate(mine), weight


def loss(model, batch):
    """The companion's loss of my_share(), weighted."""
    *batch, weight = batch
    return weight * companion.loss(model, batch)


def train(run, training):
    """All epochs. Every process evaluates, rank 0 prints. Returns the line of each epoch's end."""
    training.steps_per_epoch = training.total_steps // run.recipe["epochs"]
    history = []
    for epoch in range(run.recipe["epochs"]):
        training.model.train()
        batches = run.batches(epoch).dataset
        for done, rows in enumerate(batches, start=1):
            training.step([my_share(run.train_set, rows)])
            if done == len(batches) or training.steps % aflora.LOG_EVERY == 0:
                training.report()
        predicted = run.predict_dev()
        metrics = companion.metrics(predicted, run.dev_set.labels)
        history.append(training.line | metrics)
        training.loss_sum.zero_()
        print(companion.EPOCH.format(**history[-1]), flush=True)
    return history


def train_task(args, device):
    """Trains as the flags say; leaves the adapter and result.json in the run's folder."""
    precision = companion.choose_precision(args.amp, device)
    task = load_task(args.task, args.data)
    print(f"{task.title} on {WORLD} processes, device {device}, precision {precision}")
    run = companion.Run(args.task, args, task, device, precision)
    recipe = run.recipe
    training = ProcessGroupTraining(
        run.model, loss, total_steps=run.total_steps, lr=recipe["lr"],
        head_lr=recipe["head_lr"], freezer=run.freezer, precision=precision,
        weight_decay=0.01)
    if RANK == 0:  # a folder that cannot be made is told now, not behind the training
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "freeze_map.txt"):  # of a run of the companion
            Path(args.out, name).unlink(missing_ok=True)
    torch.manual_seed(args.seed + RANK)  # every process has its own dropout
    history = train(run, training)

    result = make_result(run, training, history)
    if RANK == 0:
        aflora.save_adapter(training.model, Path(args.out, "adapter.pt"))
        content = json.dumps(result, indent=1).encode()
        aflora.write_file(Path(args.out, "result.json"), content)
    names = ("processes", "ranks_equal", "bytes_per_step", "bytes_per_step_all_frozen")
    print(json.dumps({name: result[name] for name in names}))


def make_result(run, training, history):
    """The fields of result.json. ranks_equal: did all processes learn the very same bits?"""
    state = training.model.state_dict()
    learned = companion.checksum(state[name] for name in training.model.saved_names)
    checksums = [None] * WORLD
    dist.all_gather_object(checksums, learned)
    freezer = run.freezer
    return run.recipe | dict(
        task=run.task.title, method=run.args.method, preset=run.preset, seed=run.args.seed,
        precision=run.precision, processes=WORLD,
        ranks_equal=len(set(checksums)) == 1, bytes_per_step=training.sent[0],
        bytes_per_step_all_frozen=training.sent[-1],
        frozen_at=freezer.frozen_at if freezer else {}, history=history,
        steps=training.steps, skipped=training.line["skipped"])


def parse(argv):
    """The companion's flags. Raises AFLoRAError for those that do nothing here."""
    defaults = ["--task=mrpc", "--out=runs/distributed", "--checkpoint-every=0"]
    args = companion.parse(defaults + argv)
    if args.task == "both":
        raise AFLoRAError("--task both: choose sst2 or mrpc, this script trains one task")
    if args.checkpoint_every or args.resume:
        raise AFLoRAError("--checkpoint-every and --resume: this script writes no checkpoints")
    return args


def choose_device():
    """A CUDA device for each process of this machine where there are enough, else the CPU."""
    if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def join_process_group(args, device):
    """Makes the process group. Before, rank 0 alone downloads, and the others wait for it."""
    alone = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    for name, value in alone.items():
        os.environ.setdefault(name, value)  # started without torchrun: one process
    store = next(dist.rendezvous("env://", timeout=DOWNLOAD_TIME))[0]
    if RANK == 0:
        load_task(args.task, args.data)
        if not args.model:
            model_folder()
        store.set("files", "there")
    store.wait(["files"], DOWNLOAD_TIME)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=RANK, world_size=WORLD, timeout=STEP_TIME)


def main(argv=None):
    """The command line. Returns what status_of() does."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all; errors go to stderr
    try:
        return status_of(train_together, sys.argv[1:] if argv is None else argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train_together(argv):
    """Joins the other processes and trains."""
    args = parse(argv)
    device = choose_device()
    join_process_group(args, device)
    train_task(args, device)


if __name__ == "__main__":
    sys.exit(main())
