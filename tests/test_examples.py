"""The examples do what they say: several processes, models of transformers.

All on the tiny BERT of tiny.py; no network, no GPU. Two processes that train are started as a user
starts them; where the start itself is not what is tested they are forks, which begin at once.
"""

import importlib.util
import json
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import aflora
import tiny
import train_glue_small as glue
from data.text import load_task
from aflora import AdaptiveFreezer, AFLoRAError
from processes import ForkedScript
from test_readme import blocks, names_for_code

ROOT = Path(aflora.__file__).resolve().parent
EXAMPLES = ROOT / "examples"


# ------------------------------------------------------------------------------- several processes
# Runs a script, then waits until no thread of its process group is left.
WATCHED = """import contextlib, pathlib, runpy, sys, time
script = sys.argv.pop(1)
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
for _ in range(100):
    with contextlib.suppress(OSError):  # a thread ended between its listing and its reading
        threads = [p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm")]
        if not any("gloo" in name for name in threads):
            sys.exit()
    time.sleep(0.05)
sys.exit(f"threads that would abort the process as it ends: {threads}")
"""


def tiny_task(folder):
    """The flags that name the tiny BERT and its SST-2."""
    return ["--task", "sst2", "--model", str(folder), "--data", str(folder), "--amp", "off"]


def environment(folder):
    """One thread, an empty cache, and none of the variables by which torchrun numbers processes."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return ours | dict(OMP_NUM_THREADS="1", AFLORA_CACHE=f"{folder}/none", AFLORA_DATA="")


def without_dropout(folder):
    """The tiny BERT there has none from now on, so that its batches may be divided anyhow."""
    config = tiny.CONFIG | dict(hidden_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))


def start_torchrun(folder, count, *flags):
    """examples/distributed.py under torchrun, watched: torchrun is a fork, not what it starts."""
    (folder / "watched.py").write_text(WATCHED)
    torchrun = importlib.util.find_spec("torch.distributed.run").origin
    command = ["--standalone", f"--nproc_per_node={count}", "watched.py",
               EXAMPLES / "distributed.py", *tiny_task(folder), *flags]
    return ForkedScript(torchrun, command, folder, environment(folder))


def start_alone(folder, *flags, **variables):
    """examples/distributed.py in a fork, without torchrun; `variables` of its environment."""
    return ForkedScript(EXAMPLES / "distributed.py", [*tiny_task(folder), *flags], folder,
                        environment(folder) | variables)


def test_two_processes_train_as_one(folder):
    """The same batches on one and, under torchrun, on two gloo processes: the same freezing steps
    and losses, weights equal within float tolerance, both ranks bit-equal, less to send when
    everything is frozen, and no thread of the process group left when a process ends.
    """
    # 21 rows: of the last batch's one row the second process has none.
    flags = ["--epochs", "8", "--batch-size", "5", "--limit", "21"]
    results = []
    adapters = []
    without_dropout(folder)
    (folder / "out2").mkdir()
    for name in ("log.jsonl", "freeze_map.txt"):  # of another run
        (folder / "out2" / name).touch()
    two = start_torchrun(folder, 2, *flags, "--out", "out2")
    one = start_alone(folder, *flags, "--out", "out1")
    for count, process in ((1, one), (2, two)):
        printed, errors, code = process.finish(300)
        assert code == 0, errors
        out = folder / f"out{count}"
        results.append(json.loads((out / "result.json").read_text()))
        adapters.append(torch.load(out / "adapter.pt", weights_only=True))
        assert printed.count("ranks_equal") == 1  # rank 0 alone prints
        assert printed.count("epoch 8 ") == 1

    one, two = results
    assert one["processes"] == 1
    assert two["processes"] == 2
    assert two["ranks_equal"]
    assert one["frozen_at"] == two["frozen_at"]
    assert len(two["frozen_at"]) == 8
    assert one["steps"] == two["steps"] == 8 * 5
    matrices = 4 * 2 * 2 * 4 * (32 + 48)  # bytes of the FFN's A and B in two layers
    assert two["bytes_per_step_all_frozen"] == two["bytes_per_step"] - matrices
    assert [epoch["step"] for epoch in two["history"]] == [5 * i for i in range(1, 9)]
    for epoch, expected in zip(two["history"], one["history"], strict=True):
        assert epoch["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert epoch["accuracy"] == expected["accuracy"]

    assert sorted(os.listdir(folder / "out2")) == ["adapter.pt", "result.json"]
    ran = dict(method="aflora", preset="quick", seed=0, precision="fp32", lr=4e-3, head_lr=2e-3,
               epochs=8, batch_size=5, limit=21, rank=4, t_i=0.1, t_f=0.4)
    assert two | ran == two

    one, two = adapters
    assert one["config"] == two["config"]
    assert one["values"].keys() == two["values"].keys()
    for name, value in one["values"].items():
        assert_close(two["values"][name], value, rtol=1e-3, atol=1e-5)


def test_the_bytes_on_the_page_are_those_of_minilm():
    """What a step sends at the start, once all A and B are frozen, and of the head alone."""
    config = tiny.CONFIG | dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    args = glue.parse(["--task", "mrpc"])
    _, recipe = glue.choose_recipe("mrpc", args, torch.device("cpu"))
    with torch.device("meta"):
        model = glue.BertClassifier(glue.Bert(config))
        layers = glue.adapt(model, args, recipe)
    freezer = AdaptiveFreezer(layers, 100, 10, 20)
    start = 4 * glue.trainable(model)
    matrices = 4 * sum(p.numel() for p in freezer.matrices.values())
    head = 4 * glue.trainable(model.head)
    page = " ".join((EXAMPLES / "README.md").read_text(encoding="utf-8").split())
    assert (f"a step sends {start:,} bytes at the start and {start - matrices:,} once every matrix "
            f"is frozen; {head:,} of these belong to the head") in page


@pytest.mark.parametrize("other, alike", [(0, True), (1, False)])
def test_processes_that_froze_differently_stop(monkeypatch, other, alike):
    """Other frozen matrices elsewhere are noticed in the very step, before gradients meet again."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import distributed as example

    def all_reduce(tensor):  # with a process that has our gradients, and `other` in its checksum
        tensor.mul_(2)
        if not tensor.is_floating_point():
            tensor.add_(other)

    monkeypatch.setattr(example, "WORLD", 2)
    monkeypatch.setattr(example.dist, "all_reduce", all_reduce)
    model, layers = tiny.adapted()
    freezer = AdaptiveFreezer(layers, 100, 10, 20)
    training = example.ProcessGroupTraining(
        model, tiny.loss_of, total_steps=100, lr=1e-2, freezer=freezer)
    batch = tiny.data()[0]
    for _ in range(19):
        assert training.step([batch]) == []
    if alike:
        assert len(training.step([batch])) == 4  # r(20) = 1 - (6 / 7)^3 of twelve
        training.step([batch])
    else:
        with pytest.raises(AFLoRAError, match="froze differently in step 20"):
            training.step([batch])
    assert len(training.sent) == training.steps


def test_processes_may_leave_out_different_layers(monkeypatch):
    """A gradient that only one of two processes has is halved, not mixed with another layer's."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import distributed as example

    sums = []  # of what each process gave
    monkeypatch.setattr(example, "WORLD", 2)
    monkeypatch.setattr(example.dist, "all_reduce", lambda flat: flat.copy_(sum(sums)))
    trainings = []
    for left_out in ("0.lora_A", "1.lora_A"):
        model = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
        aflora.add_adapters(model, ["0", "1"])
        training = example.ProcessGroupTraining(model, None, total_steps=9, lr=1e-2)
        trainings.append(training)
        parts = []
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.grad = None if name == left_out else torch.randn(p.shape)
                parts.append(torch.zeros(p.shape) if name == left_out else p.grad)
        sums.append(torch.cat([part.flatten() for part in parts]))
    here, there = [dict(training.model.named_parameters()) for training in trainings]
    expected = {"0.lora_A": there["0.lora_A"].grad / 2, "1.lora_A": here["1.lora_A"].grad / 2,
                "0.s_b": (here["0.s_b"].grad + there["0.s_b"].grad) / 2}
    for training in trainings:
        training.average_gradients()
        for name, mean in expected.items():
            assert_close(training.model.get_parameter(name).grad, mean)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_run(folder, killed):
    """One of two processes is killed while they train: the other one, by itself and without
    torchrun, which would see to it, too, ends with an error in a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])  # a free one
    processes = []
    for rank in "01":
        processes.append(start_alone(
            folder, "--epochs", "100000", "--out", "out", RANK=rank, WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    began = time.perf_counter()
    try:
        while "epoch 20 " not in processes[0].printed():
            assert all(each.process.is_alive() for each in processes)
            assert time.perf_counter() - began < 120
            time.sleep(0.01)
        processes.pop(killed).process.kill()
    finally:
        _, errors, code = processes[0].finish(60)
    assert code in (1, 2)  # None if it still trained or waited
    assert "dist.all_reduce" in errors  # there it had to wait for the other one


def test_a_flag_of_zero_is_refused_as_by_the_companion(folder, capsys):
    """Zero is not taken for "not given": both scripts end with one and the same error."""
    for flag in ("--batch-size", "--lr"):  # one that the recipe refuses, one that Training does
        _, errors, code = start_alone(folder, "--out", "out", flag, "0").finish(200)
        assert glue.main([*tiny_task(folder), "--out", str(folder / "out"), flag, "0"]) == 2
        expected = capsys.readouterr().err
        assert expected.startswith("error: ")
        assert code == 2
        assert "Traceback" not in errors
        assert errors.splitlines()[-1] == expected.strip()  # a warning may stand before it
    assert not (folder / "out").exists()


def test_flags_that_do_nothing_are_refused(folder):
    """What the companion can and this script cannot is said, as is a wrong value; no traceback."""
    messages = {
        ("--task", "both"): "choose sst2 or mrpc",
        ("--checkpoint-every", "10"): "writes no checkpoints",
        ("--seed", "-1"): "--seed",
        ("--data", "none"): "SST-2/train.tsv is missing",
    }
    for flags, message in messages.items():
        _, errors, code = start_alone(folder, *flags).finish(200)
        assert code == 2
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert message in errors


def test_a_bert_with_few_positions(folder):
    """Eight positions: texts are cut there, and the loss is that of the companion's own run."""
    tensors = tiny.checkpoint()
    name = "embeddings.position_embeddings.weight"
    tensors[name] = tensors[name][:8].clone()
    (folder / "model.safetensors").write_bytes(tiny.safetensors(tensors))
    config = tiny.CONFIG | dict(max_position_embeddings=8, hidden_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    longest = max(len(text.split()) for text, _, _ in load_task("sst2", folder).train)
    assert longest + 2 > 8  # [CLS] and [SEP]
    flags = ["--epochs", "2", "--batch-size", "8"]
    assert glue.main([*tiny_task(folder), *flags, "--out", str(folder / "companion")]) == 0
    _, errors, code = start_alone(folder, *flags, "--out", "alone").finish(200)
    assert code == 0, errors

    expected = json.loads((folder / "companion/result.json").read_text())
    result = json.loads((folder / "alone/result.json").read_text())
    assert result["frozen_at"] == expected["frozen_at"]
    for epoch, other in zip(result["history"], expected["history"], strict=True):
        assert epoch["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert epoch["accuracy"] == other["accuracy"]


# -------------------------------------------------------------------------------------- the others
@pytest.mark.parametrize("part", ["bert_by_train", "llama_by_a_loop"])
def test_the_example_of_your_own_model(tmp_path, monkeypatch, capsys, part):
    """A BERT by train(), here on half of the batches, and a Llama in a loop of its own learn. The
    example itself asserts that its files give the same logits, bit for bit, and that a merged
    Llama is a plain one.
    """
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import your_own_model as example
    batches = example.bert_batches
    monkeypatch.setattr(example, "bert_batches", lambda epoch: batches(epoch)[:50])
    before, after = getattr(example, part)()
    assert after < before / 2
    printed = capsys.readouterr().out
    if part == "bert_by_train":
        assert printed.count("frozen after step") == 8
    else:
        assert "[8, 9, 10, 11, 12, 13, 14, 15]" in printed
        assert (tmp_path / "llama/model.safetensors").exists()


def test_the_lines_for_the_trainer_run(tmp_path, monkeypatch):
    """What the page says to write around AFLoRATrainer: all matrices freeze, the adapter loads."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import your_own_model as example
    code, = blocks("examples/README.md", "The Trainer of transformers")
    batch = example.bert_batches(0)[0]
    rows = [dict(input_ids=ids, labels=y) for ids, y in zip(batch["input_ids"], batch["labels"])]
    names = {"model": example.plain_bert(), "rows": rows * 10}
    exec(code, names)
    assert len(names["trainer"].freezer.frozen_at) == 8
    assert len(aflora.load_adapter(example.plain_bert(), "adapter.pt")) == 4


def accelerated(first, last, load=None, save=None):
    """Runs the loop of accelerate from one epoch to another: its names."""
    code, = blocks("examples/README.md", "accelerate and DistributedDataParallel")
    for old, new in [("range(3)", f"range({first}, {last})"),
                     ("steps // 2)", "steps // 2, interval=1)")]:
        assert code.count(old) == 1
        code = code.replace(old, new)
    if load:
        code = code.replace("model.train()", f"accelerator.load_state({load!r})\nmodel.train()")
    if save:
        code += f"\naccelerator.save_state({save!r})\n"
    rows = [(x, label) for batch in tiny.data(batches=15) for x, label in zip(*batch)]
    names = names_for_code() | {"loader": DataLoader(rows, batch_size=16)}
    exec(code, names)
    return names


def test_the_loop_of_accelerate_goes_on(tmp_path, monkeypatch):
    """From a state saved while some matrices were frozen it ends with the same bits."""
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' Trainers
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    state = str(tmp_path / "state")
    whole = accelerated(0, 3)
    part = accelerated(0, 1, save=state)
    assert len(part["freezer"].frozen_at) == 3
    again = accelerated(1, 3, load=state)
    assert len(again["freezer"].frozen_at) == 4
    assert again["freezer"].frozen_at == whole["freezer"].frozen_at
    assert again["freezer"].step == whole["freezer"].step == 24
    for p, q in zip(again["model"].parameters(), whole["model"].parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        assert torch.equal(p, q)
