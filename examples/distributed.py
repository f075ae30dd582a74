"""The companion's job on several processes, with torch.distributed as the engine.

    torchrun --nproc_per_node=2 examples/distributed.py --task mrpc      CPU: gloo; CUDA: nccl
    torchrun --nproc_per_node=2 examples/distributed.py --help

Each process takes its share of every batch. The gradients of what is still trainable are averaged
in one flat all-reduce before they are scored, so every process freezes the same matrices at the
same step, and less is sent the more is frozen (DistributedDataParallel's buckets are fixed when it
wraps a model, and fail when requires_grad changes). It plugs into train() through on_gradients.
"""

import argparse, contextlib, datetime, hashlib, json, os, sys, zlib
from pathlib import Path

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if RANK:
    os.environ["TQDM_DISABLE"] = "1"
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
# Its functions have the process group as a default argument. Imported once there is one (the first
# optimizer step would do that), they keep it alive, and its threads can abort an ending process.
import torch.distributed.nn  # noqa: E402, F401
import torch.nn.functional as F  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402


class Share:
    """This process's part of an epoch's batches: (ids, segments, mask, labels, weight)."""

    def __init__(self, examples, groups):
        self.examples, self.groups = examples, groups

    def __len__(self):
        return len(self.groups)

    def __iter__(self):
        for rows in self.groups:
            mine = rows[RANK::WORLD]
            # The mean over processes of weight * mean over my rows = the mean over all rows.
            weight = torch.tensor(len(mine) * WORLD / len(rows))
            yield *self.examples.collate(mine if len(mine) else rows[:1]), weight


def loss(model, batch):
    *inputs, labels, weight = batch
    return weight * F.cross_entropy(model(*inputs).float(), labels)


class Average:
    """on_gradients of train(): the mean over all processes, and a check that they froze alike."""

    def __init__(self, freezer, device):
        self.freezer, self.device, self.checked = freezer, device, 0
        self.sent = []  # bytes of each step's all-reduce

    def __call__(self, parameters):
        if self.freezer.step != self.checked:  # after a logged line, the only place of freezing
            self.check()
        grads = [p.grad.float().flatten() for p in parameters]
        flat = torch.cat(grads)
        dist.all_reduce(flat)
        for p, part in zip(parameters, (flat / WORLD).split([grad.numel() for grad in grads])):
            p.grad.copy_(part.view_as(p))
        self.sent.append(flat.numel() * flat.element_size())

    def check(self):
        """Eight bytes, before gradients of different sizes could meet."""
        self.checked = self.freezer.step
        frozen = zlib.crc32(json.dumps(self.freezer.frozen_at).encode())
        total = torch.tensor([frozen], device=self.device)
        dist.all_reduce(total)
        if total.item() != frozen * WORLD:
            raise aflora.AFLoRAError(f"processes froze differently by step {self.checked}")


def train(args, device):
    """Trains as the flags say; returns what rank 0 writes into result.json."""
    recipe = companion.RECIPES["quick", args.task] | companion.METHODS["aflora"]
    epochs, size = args.epochs or recipe["epochs"], args.batch_size or recipe["batch_size"]
    lr, head_lr = args.lr or recipe["lr"], recipe["head_lr"]
    task = companion.load_task(args.task, args.data)
    model, tokenizer, _ = companion.prepare(args, device)
    layers = aflora.add_adapters(
        model, companion.ATTENTION + companion.FFN, recipe["rank"], seed=args.seed,
        train_matrices=companion.FFN, modules_to_save=["head"])
    torch.manual_seed(args.seed + RANK)  # every process its own dropout
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(args.seed))
    rows = [task.train[i] for i in order[:args.limit or recipe["limit"]]]
    examples = companion.Examples(rows, tokenizer)
    dev = companion.Examples(task.dev, tokenizer)
    precision = companion.choose_precision(args.amp, device)
    total = epochs * -(-len(examples.labels) // size)
    freezer = aflora.AdaptiveFreezer(layers, total, round(recipe["t_i"] * total),
                                     round(recipe["t_f"] * total))
    average = Average(freezer, device)
    report = aflora.train(
        model, lambda epoch: Share(examples, examples.batches(size, args.seed, epoch).dataset),
        loss, epochs=epochs, lr=lr, head_lr=head_lr, freezer=freezer, precision=precision,
        weight_decay=0.01, on_gradients=average,
        evaluate=lambda model: companion.metrics(
            companion.predict(model, dev, precision), dev.labels))
    values = b"".join(v.cpu().numpy().tobytes() for v in aflora.saved_values(model).values())
    checksums = [None] * WORLD
    dist.all_gather_object(checksums, hashlib.sha256(values).hexdigest())
    if RANK == 0:
        aflora.save_adapter(model, Path(args.out, "adapter.pt"))
    return dict(task=task.title, processes=WORLD, batch_size=size,
                ranks_equal=len(set(checksums)) == 1, bytes_per_step=average.sent[0],
                bytes_per_step_all_frozen=average.sent[-1], frozen_at=freezer.frozen_at, **report)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--task", default="mrpc", choices=("sst2", "mrpc"), help="the data to train on")
    flag("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="mixed precision")
    flag("--seed", default=0, type=int, help="of data order, head, dropout and random matrices")
    flag("--epochs", type=int, help="passes over the training rows; None: quick recipe's")
    flag("--batch-size", type=int, help="rows a step, of all processes together; None: recipe's")
    flag("--limit", type=int, help="training rows; None: recipe's")
    flag("--lr", type=float, help="peak learning rate; None: recipe's")
    flag("--model", help="folder with a Hugging Face BERT; None: MiniLM-L6-H384")
    flag("--data", default=os.environ.get("AFLORA_DATA"), help="folder with the texts")
    flag("--out", default="runs/distributed", help="folder of the run")
    args = parser.parse_args()
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29507", RANK="0",
                            WORLD_SIZE="1").items():
        os.environ.setdefault(name, value)  # started without torchrun: one process
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):  # one for each
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=30)))[0]
    if RANK == 0:  # it alone downloads, the others wait for as long as that takes
        try:
            companion.load_task(args.task, args.data), companion.prepare(args, device)
        except (aflora.AFLoRAError, OSError) as error:
            sys.exit(f"error: {error}")
        store.set("files", "there")
    store.wait(["files"], datetime.timedelta(minutes=30))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK,
                            world_size=WORLD, timeout=datetime.timedelta(seconds=50))
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(open(os.devnull, "w") if RANK else sys.stdout):
            result = train(args, device)
            print(json.dumps({key: result[key] for key in ("processes", "ranks_equal",
                                                           "bytes_per_step",
                                                           "bytes_per_step_all_frozen")}))
        if RANK == 0:
            aflora.write_file(Path(args.out, "result.json"), json.dumps(result, indent=1).encode())
    except (aflora.AFLoRAError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
