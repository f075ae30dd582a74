"""The command line of the companion: what a run trains, says and leaves, and what it refuses."""

import copy
import hashlib
import io
import json
import re
import statistics
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch

import aflora
import tiny
import train_glue_small as glue
from companion import (MATRICES, adapter_of, contents, log_of, prepared_run, result_of, run_main,
                       run_script)
from data import fetch as sources
from data.text import load_task

FIELDS = set(
    "task data method rank seed preset accuracy f1 best_accuracy best_f1 best_epoch weights lr "
    "head_lr epochs batch_size limit t_i t_f sensitivity train_matrices history skipped "
    "trainable_start trainable_end trainable_average head_parameters steps seconds ms_per_step "
    "peak_memory_bytes device precision versions frozen_at rows checksums".split())


def spy(monkeypatch, module, name, note):
    """From now on `note` is called with each call's arguments, before the function itself."""
    real = getattr(module, name)

    def watched(*arguments, **options):
        note(*arguments, **options)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, watched)


# --------------------------------------------------------------------------------- a whole run
def test_script(folder):
    """Both tasks through the script: map, log, result, and the adapter gives its accuracy."""
    printed, errors, code = run_script(
        folder, "--task", "both", "--model", ".", "--data", ".", "--out", "out", "--epochs", 2,
        "--batch-size", 4, "--lr", 0.01, "--seed", 3)
    assert code == 0, errors
    assert all(line.startswith("warning: ramp of") for line in errors.splitlines())
    assert printed.count("freeze map") == 2
    assert printed.count("(equal)") == 2
    for name in ("sst2", "mrpc"):
        out = folder / f"out/{name}-aflora-s3"
        assert sorted(contents(out)) == ["adapter.pt", "freeze_map.txt", "log.jsonl", "result.json"]
        assert "freeze map" in (out / "freeze_map.txt").read_text(encoding="utf-8")
        result = result_of(out)
        assert result.keys() >= FIELDS
        assert (result["f1"] is None) == (result["best_f1"] is None) == (name == "sst2")
        assert len(result["frozen_at"]) == 8
        assert result["trainable_start"] > result["trainable_average"] > result["trainable_end"]
        assert result["head_parameters"] == 32 * 32 + 32 + 2 * 32 + 2
        last = log_of(out)[-1]
        assert (last["step"], last["frozen"]) == (result["steps"], 1)
        assert result["history"][-1] == last
        assert result["history"] == [line for line in log_of(out) if "f1" in line]
        model, tokenizer = tiny.load_tiny(folder)
        aflora.load_adapter(model, out / "adapter.pt")
        dev = glue.Examples(load_task(name, folder).dev, tokenizer)
        scores = glue.metrics(glue.predict(model, dev, result["precision"]), dev.labels)
        assert scores["accuracy"] == result["accuracy"]


def test_the_script_refuses_in_one_line(folder):
    """A missing file: exit code 2, no traceback, nothing made."""
    _, errors, code = run_script(folder, "--model", ".", "--data", "SST-2")
    assert code == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "SST-2/train.tsv is missing" in errors
    assert not (folder / "runs").exists()


def test_help_without_docstrings(capsys):
    """Compiled as python -OO does it, without docstrings, it still tells of every flag."""
    path = Path(glue.__file__)
    code = compile(path.read_text(encoding="utf-8"), path, "exec", optimize=2)
    names = {"__name__": "without_docstrings", "__file__": glue.__file__}
    exec(code, names)
    assert names["main"].__doc__ is None
    with pytest.raises(SystemExit) as stop:
        names["main"](["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--task", "--resume", "--t-i", "--head-lr", "--checkpoint-every"):
        assert flag in said
    assert "take the rates of results/README.md" in " ".join(said.split())


@pytest.mark.parametrize("method", ["aflora", "lora", "elora", "full", "head"])
def test_methods(folder, method):
    """Every method runs an epoch and trains exactly what it should; its file holds just that."""
    rank = "" if method in ("full", "head") else "--rank 4"
    flags = f"--preset quick --epochs 1 --batch-size 4 --amp bf16 --seed 2 --method {method} {rank}"
    assert run_main(folder, flags) == 0
    result = result_of(folder / "out")
    # Two layers, r = 4: vectors have r + out values, A and B of FFN and attention r (in + out).
    vectors = 2 * (6 * 4 + 5 * 32 + 48)
    ffn = 2 * 2 * 4 * (32 + 48)
    attention = 2 * 4 * 4 * (32 + 32)
    everything = sum(p.numel() for p in tiny.checkpoint().values())
    expected = {"aflora": vectors + ffn, "lora": ffn + attention, "elora": vectors,
                "full": everything, "head": 0}
    assert result["trainable_start"] == expected[method]
    frozen = ffn if method == "aflora" else 0
    assert result["trainable_end"] == result["trainable_start"] - frozen
    assert result["method"] == method
    used = [result[name] for name in ("t_i", "t_f", "sensitivity", "train_matrices")]
    if method == "aflora":
        assert used == [0.1, 0.4, "gradient-weight", "ffn"]
    else:  # these did nothing, and nothing froze
        assert used == [None] * 4
        assert result["trainable_average"] == result["trainable_start"]

    content = adapter_of(folder / "out")
    shapes = {(32, 32), (48, 32), (32, 48)}  # out, in
    keys = {key for key, _ in content["at_start"].values()}
    assert keys == {
        "aflora": {f"2/{name.replace('.lora', '/lora')}" for name in MATRICES
                   if not re.search(r"intermediate|\d\.output", name)},
        "lora": set(), "full": set(), "head": set(),
        "elora": {f"2/{shape}/lora_{matrix}" for shape in shapes for matrix in "AB"}}[method]
    # Of what stands whole in the file: the parameters that the method trains, and the head's
    values = sum(value.numel() for value in content["values"].values())
    also = {"lora": vectors}.get(method, 0)  # its vectors are its scale
    assert values == expected[method] + also + result["head_parameters"]
    if method == "lora":
        assert content["values"]["encoder.layers.0.key.s_d"].tolist() == [16 / 4] * 4


@pytest.mark.parametrize("groups, count", [
    ("ffn", 8), ("attention", 16), ("all", 24), ("none", 0)])
def test_train_matrices(folder, groups, count):
    """Whose A and B train until they freeze; without any there is neither freezer nor map."""
    assert run_main(folder, f"--epochs 1 --train-matrices {groups}") == 0
    result = result_of(folder / "out")
    frozen = result["frozen_at"]
    assert len(frozen) == count
    assert result["train_matrices"] == groups
    for name in ("sensitivity", "t_i", "t_f"):
        assert (result[name] is None) == (groups == "none")
    for name in frozen:
        in_ffn = name.split(".")[3] in glue.FFN
        assert groups == "all" or in_ffn == (groups == "ffn")
    map_there = (folder / "out/freeze_map.txt").exists()
    assert map_there == (groups != "none")


@pytest.mark.parametrize("task, flags, expected", [
    ("sst2", "--preset quick", {"limit": 6000, "epochs": 3, "batch_size": 32, "lr": 4e-3,
                                "head_lr": 2e-3, "t_i": 0.1, "t_f": 0.4, "rank": 4}),
    ("mrpc", "--preset quick", {"limit": None, "epochs": 2, "batch_size": 16, "lr": 1e-2,
                                "rank": 16}),
    ("mrpc", "--preset full", {"epochs": 8, "batch_size": 32, "t_i": 0.125, "t_f": 0.7,
                               "lr": 4e-3, "rank": 4}),
    ("sst2", "--method lora", {"lr": 1e-3, "head_lr": 2e-3, "rank": 8}),  # the method's rate
    ("sst2", "--preset quick --method lora --lr 5e-4 --epochs 1",  # LoRA has no t_f
     {"lr": 5e-4, "epochs": 1, "t_f": None, "batch_size": 32}),
])
def test_the_recipe(folder, task, flags, expected):
    """The preset's for the task; a method's rate goes before it, a flag before both."""
    assert run_main(folder, flags, task=task) == 0
    result = result_of(folder / "out")
    assert {key: result[key] for key in expected} == expected


FULL_SST2 = dict(
    limit=None, epochs=10, batch_size=64, t_i=0.1, t_f=0.7, lr=4e-3, head_lr=2e-3, rank=4)
FULL_MRPC = dict(
    limit=None, epochs=8, batch_size=32, t_i=0.125, t_f=0.7, lr=4e-3, head_lr=1e-3, rank=4)
QUICK_SST2 = dict(
    limit=6000, epochs=3, batch_size=32, t_i=0.1, t_f=0.4, lr=4e-3, head_lr=2e-3, rank=4)
QUICK_MRPC = dict(
    limit=None, epochs=2, batch_size=16, t_i=0.1, t_f=0.4, lr=1e-2, head_lr=2e-3, rank=16)


@pytest.mark.parametrize("device, preset, sst2, mrpc", [
    ("cuda", "full", FULL_SST2, FULL_MRPC), ("cpu", "quick", QUICK_SST2, QUICK_MRPC)])
def test_every_recipe(device, preset, sst2, mrpc):
    """All values of each preset, which is taken by itself on such a device; the method's go before
    them, and what a method does not use is None."""
    recipes = {"sst2": sst2, "mrpc": mrpc}
    methods = {
        "aflora": {"train_matrices": "ffn", "sensitivity": "gradient-weight"},
        "lora": dict(rank=8, lr=1e-3),
        "elora": dict(rank=1024, lr=1e-2),
        "full": dict(rank=None, lr=1e-4, head_lr=1e-4),
        "head": dict(rank=None, lr=2e-3, head_lr=None),
    }
    for method in methods.keys() - {"aflora"}:
        methods[method] |= dict(t_i=None, t_f=None, train_matrices=None, sensitivity=None)
    assert glue.METHODS.keys() == methods.keys()
    for method, own in methods.items():
        for flags in ([], ["--preset", preset]):
            args = glue.parse(["--method", method, *flags])
            for task, recipe in recipes.items():
                chosen = glue.choose_recipe(task, args, torch.device(device))
                assert chosen == (preset, recipe | own)


@pytest.mark.parametrize("flags, lr", [("", 2e-3), ("--lr 5e-3", 5e-3)])
def test_a_head_alone_has_one_rate(folder, monkeypatch, flags, lr):
    """It is --lr."""
    seen = []
    spy(monkeypatch, aflora, "train", lambda *_, **options: seen.append(options))
    assert run_main(folder, f"--epochs 1 --method head {flags}") == 0
    assert (seen[0]["lr"], seen[0]["head_lr"]) == (lr, None)


def test_full_fine_tuning_has_two_rates(folder):
    """--head-lr is the head's, --lr that of all else."""
    run = prepared_run(folder, "--method full --lr 1e-4 --head-lr 1e-3")
    groups = aflora.parameter_groups(
        run.model, run.recipe["lr"], run.recipe["head_lr"], weight_decay=0.0)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    for name, p in run.model.named_parameters():
        assert rates[p] == (1e-3 if name.startswith("head") else 1e-4)


@pytest.mark.parametrize("cpu, precision", [
    ("flags : fpu avx512f avx512_bf16 amx_tile", "bf16"),
    ("flags : fpu amx_bf16", "bf16"),
    ("Features : fp asimd bf16 i8mm", "bf16"),  # ARM's word
    ("flags : fpu avx2 avx512f avx512bw avx512_fp16 amx_tile", "fp32"),
    ("Features : fp asimd svebf16", "fp32"),
    ("", "fp32"),
])
def test_the_precision_of_a_cpu(monkeypatch, cpu, precision):
    """bf16 only where /proc/cpuinfo has a flag for products in it; elsewhere, and off Linux, fp32,
    which would also be right, but slower."""
    with monkeypatch.context() as patch:
        patch.setattr(glue.Path, "read_text", lambda path: {"/proc/cpuinfo": cpu}[str(path)])
        patch.setattr(sys, "platform", "linux")
        chosen = [glue.choose_precision(amp, torch.device("cpu")) for amp in ("auto", "off")]
        patch.setattr(sys, "platform", "darwin")
        chosen.append(glue.choose_precision("auto", torch.device("cpu")))
    assert chosen == [precision, "fp32", "fp32"]


@pytest.mark.skipif(sys.platform == "win32", reason="unknown there")
def test_peak_memory_is_in_bytes():
    """A Python with torch takes more than 50 MB, and less than 100 GB."""
    assert 50e6 < glue.peak_memory(torch.device("cpu")) < 100e9


# ---------------------------------------------------------------------------- what flags reach
@pytest.mark.parametrize("flags, dtype", [
    ("--amp bf16", torch.bfloat16), ("--amp bf16 --method head", torch.bfloat16),
    ("--amp bf16 --method full", torch.float32), ("--amp off", torch.float32)])
def test_frozen_weights_are_held_in_the_compute_type(folder, flags, dtype):
    """Those of linear layers; those that train are the file's, unrounded, and stay in float32."""
    model = prepared_run(folder, flags).model
    linears = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 12
    for linear in linears:
        assert linear.weight.dtype == linear.bias.dtype == dtype
    weight = tiny.checkpoint()["encoder.layer.1.output.dense.weight"]
    assert torch.equal(linears[-1].weight, weight.to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_adapters_that_change_a_prediction_are_told(folder, monkeypatch, capsys):
    """Where they do not start at zero, which is feigned here, the line before training says so."""
    def adapt(model, *arguments, real=glue.adapt):
        layers = real(model, *arguments)
        for p in model.head[-1].parameters():
            p.data.neg_()
        return layers

    prepared_run(folder)
    assert "with adapters (equal)" in capsys.readouterr().out
    monkeypatch.setattr(glue, "adapt", adapt)
    prepared_run(folder)
    assert "with adapters (NOT EQUAL)" in capsys.readouterr().out


@pytest.mark.parametrize("positions, longest", [(6, 6), (150, 128)])
def test_texts_are_cut_at_the_positions_or_at_128_tokens(folder, positions, longest):
    """At the lower of both."""
    tensors = tiny.checkpoint()
    tensors["embeddings.position_embeddings.weight"] = torch.zeros(positions, 32)
    (folder / "model.safetensors").write_bytes(tiny.safetensors(tensors))
    config = tiny.CONFIG | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    run = prepared_run(folder)
    assert run.train_set.ids.shape[1] == run.dev_set.ids.shape[1] == longest


def test_evaluation_and_checkpoints_are_not_timed(folder, monkeypatch):
    """By a clock on which a step takes a second, and each other thing a hundred."""
    passed = []
    monkeypatch.setattr(glue, "time", types.SimpleNamespace(perf_counter=lambda: sum(passed)))
    spy(monkeypatch, aflora.Training, "step", lambda *_: passed.append(1))
    spy(monkeypatch, glue, "predict", lambda *_: passed.append(100))
    spy(monkeypatch, aflora, "save_checkpoint", lambda *_: passed.append(100))
    assert run_main(folder, "--epochs 2 --batch-size 4 --checkpoint-every 4") == 0
    assert passed.count(100) == 6 + 4  # predictions; checkpoints after steps 4, 6, 8 and 12
    result = result_of(folder / "out")
    assert (result["seconds"], result["ms_per_step"]) == (12, 1000)
    assert [line["seconds"] for line in log_of(folder / "out")] == [
        line["step"] for line in log_of(folder / "out")]


@pytest.mark.parametrize("kind", ["gradient-weight", "gradient", "weight"])
def test_sensitivity_reaches_the_freezer_and_decay_is_a_hundredth(folder, monkeypatch, kind):
    seen = []
    spy(monkeypatch, aflora, "train", lambda *_, **options: seen.append(options))
    assert run_main(folder, f"--epochs 1 --sensitivity {kind}") == 0
    assert seen[0]["freezer"].kind == kind
    assert seen[0]["weight_decay"] == 0.01


def test_while_it_trains_the_head_has_dropout(folder, monkeypatch):
    """Before both of its layers; and while it predicts, it has none."""
    seen = set()
    modules = set()
    real = glue.Dropout.forward

    def forward(module, x):
        y = real(module, x)
        if x.dim() == 2:  # (rows, width): only the head's; elsewhere (rows, tokens, width)
            zeros = bool(((y == 0) & (x != 0)).any())
            seen.add((module.training, module.p, zeros))
            if module.training:
                modules.add(module)
        return y

    monkeypatch.setattr(glue.Dropout, "forward", forward)
    assert run_main(folder, "--epochs 1 --amp off") == 0
    assert seen == {(False, 0.1, False), (True, 0.1, True)}
    assert len(modules) == 2


def test_limit_draws_rows(folder, monkeypatch):
    """So many rows, each once, drawn by the seed, and not the first ones."""
    seen = []
    spy(monkeypatch, glue, "Examples", lambda rows, *_: seen.append(rows))
    path = folder / "SST-2/train.tsv"
    lines = [f"{word}\t{i % 2}" for i, word in enumerate(tiny.WORDS[5:])]
    path.write_text("\n".join(["sentence\tlabel", *lines, ""]))
    rows = load_task("sst2", folder).train
    drawn = []
    for seed in (0, 0, 1):
        seen.clear()
        assert run_main(folder, f"--epochs 1 --limit 20 --seed {seed}") == 0
        train, dev = seen
        assert len(train) == len(set(train)) == 20 and set(train) <= set(rows)
        assert len(set(train) & set(rows[:20])) < 15  # on average 7
        assert dev == load_task("sst2", folder).dev
        result = result_of(folder / "out")
        assert (result["limit"], result["rows"]) == (20, 20)
        drawn.append(train)
    assert drawn[0] == drawn[1] != drawn[2]
    seen.clear()
    assert run_main(folder, "--epochs 1 --limit 999") == 0
    assert sorted(seen[0]) == sorted(rows)
    assert result_of(folder / "out")["rows"] == len(rows)


def test_seed_reaches_everything(folder):
    """Another seed: other adapters, another head, another order; the same: the same bits."""
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        out = folder / f"out{number}"
        flags = f"--epochs 2 --batch-size 4 --seed {seed} --out {out}"
        assert run_main(folder, flags) == 0
        content = adapter_of(out)
        assert content["config"]["seed"] == seed
        assert {key[:2] for key, _ in content["at_start"].values()} == {f"{seed}/"}
        losses = [line["loss"] for line in log_of(out)]
        runs.append((losses, content["values"]))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name])
        assert not torch.equal(value, runs[2][1][name])


def test_batches_are_in_random_order(folder, monkeypatch):
    """As they reach the step: alike in length, but short and long ones mixed, each epoch anew."""
    rows = tiny.random_rows(400, 40)
    lines = [f"{text}\t{label}" for text, _, label in rows]
    (folder / "SST-2/train.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    widths = []
    spreads = []

    def note(training, micro_batches):
        lengths = micro_batches[0][2].sum(1)
        widths.append(int(lengths.max()))  # on CUDA padded to a multiple of 8
        spreads.append(int(lengths.max() - lengths.min()))

    spy(monkeypatch, aflora.Training, "step", note)
    assert run_main(folder, "--epochs 2 --batch-size 8 --amp off") == 0
    assert statistics.mean(spreads) < 2
    epochs = [widths[:50], widths[50:]]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert abs(statistics.correlation(epoch, range(50))) < 0.5
        longer = sum(b > a for a, b in zip(epoch, epoch[1:]))
        assert 15 < longer < 35


def test_padding_never_counts(folder, monkeypatch):
    """Whenever a run predicts, each row's logits in its batch are those of the row alone."""
    rows = tiny.random_rows(60, 30)
    lines = [f"{text}\t{label}\n" for text, _, label in rows]
    (folder / "SST-2/dev.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    real = glue.BertClassifier.forward
    padding = []

    def forward(model, ids, segments, mask):
        logits = real(model, ids, segments, mask)
        if not model.training:
            padding.append(int((~mask).sum()))
            for i, length in enumerate(mask.sum(1)):
                row = [part[i:i + 1, :length] for part in (ids, segments, mask)]
                torch.testing.assert_close(logits[i:i + 1], real(model, *row))
        return logits

    monkeypatch.setattr(glue.BertClassifier, "forward", forward)
    assert run_main(folder, "--epochs 1 --batch-size 4 --amp off") == 0
    assert len(padding) == 5  # twice before, after the epoch, at the end, merged
    assert min(padding) > 100


def test_the_file_is_merged_and_scored(folder, monkeypatch, capsys):
    """Plain, wrapped, after each epoch, at the end, and then plain with W0 + L_b B L_d A in it."""
    models = []

    def note(model, *_):
        models.append((len(aflora.adapters_of(model)), copy.deepcopy(model.state_dict())))

    spy(monkeypatch, glue, "predict", note)
    assert run_main(folder, "--epochs 2 --batch-size 4 --lr 0.02 --train-matrices all") == 0
    assert [count for count, _ in models] == [0, 12, 12, 12, 12, 0]
    plain = models[0][1]
    merged = models[-1][1]
    values = adapter_of(folder / "out")["values"]
    assert merged.keys() == plain.keys()
    for name, weight in plain.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.s_b" in values:
            B = values[f"{layer}.s_b"].diag() @ values[f"{layer}.lora_B"]
            A = values[f"{layer}.s_d"].diag() @ values[f"{layer}.lora_A"]
            assert (B @ A).abs().max() > 1e-3
            torch.testing.assert_close(merged[name], weight + B @ A)
        else:
            assert torch.equal(merged[name], values.get(name, weight))
    result = result_of(folder / "out")
    said = f"merged into the weights: accuracy {result['accuracy']:.2f}; rounding changed 0 of 9"
    assert said in capsys.readouterr().out


def test_the_last_and_the_best_epoch(folder, monkeypatch, capsys):
    """Of scripted scores the last is the result, the first of the best ones is named beside it."""
    scripted = [(50, 0), (50, 0), (60, 40), (90, 30), (90, 99), (70, 50), (70, 50)]
    left = [{"accuracy": float(accuracy), "f1": float(f1)} for accuracy, f1 in scripted]
    monkeypatch.setattr(glue, "metrics", lambda *_: left.pop(0))
    assert run_main(folder, "--epochs 4", task="mrpc") == 0
    result = result_of(folder / "out")
    names = ("accuracy", "f1", "best_accuracy", "best_f1", "best_epoch")
    assert [result[name] for name in names] == [70, 50, 90, 30, 2]
    assert [epoch["accuracy"] for epoch in result["history"]] == [60, 90, 90, 70]
    said = "last epoch: accuracy 70.00, F1 50.00 (best, 2: accuracy 90.00, F1 30.00)"
    assert said in capsys.readouterr().out


def test_the_freeze_map(folder, capsys):
    """Each matrix has the shade whose span of steps it froze in: a quarter of the ramp each, from
    an edge on to before the next; attention matrices that never trained have a dot."""
    flags = "--epochs 10 --limit 20 --batch-size 2 --t-i 0.1 --t-f 0.1 --train-matrices all"
    assert run_main(folder, flags) == 0
    result = result_of(folder / "out")
    frozen = result["frozen_at"]
    assert {30, 50, 70, 90} <= set(frozen.values())  # so that the edges themselves are tested
    text = (folder / "out/freeze_map.txt").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    header, *lines, legend = text.splitlines()
    assert "░ 10-30  ▒ 30-50  ▓ 50-70  █ 70-90" in legend
    assert header.split()[-2:] == ["0", "1"]
    shown = {}
    for line in lines:
        row, *marks = line.split()
        module, matrix = row.split(".")
        for i, mark in enumerate(marks):
            shown[f"encoder.layers.{i}.{module}.lora_{matrix}"] = mark
    assert shown.keys() == frozen.keys() == set(MATRICES)
    spans = {"░": range(10, 30), "▒": range(30, 50), "▓": range(50, 70), "█": range(70, 91)}
    average = 2 * (6 * 4 + 5 * 32 + 48)  # the vectors' values, which train in all 100 steps
    for name, step in frozen.items():
        assert step in spans[shown[name]], name
        wide = name.endswith(("intermediate.lora_B", ".output.lora_A"))
        average += 4 * (48 if wide else 32) * step / 100
    assert result["trainable_average"] == pytest.approx(average)


def test_never_trained_on_the_map(folder):
    """A dot for what does not train; at the end all that does is frozen: there is no other mark."""
    model, _ = tiny.load_tiny(folder)
    frozen = {f"encoder.layers.{i}.intermediate.lora_B": step for i, step in enumerate((10, 40))}
    _, *lines, legend = glue.freeze_map(model, frozen, 10, 50).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows.pop("intermediate.B") == ["░", "█"]
    assert len(rows) == 11 and all(marks == ["·", "·"] for marks in rows.values())
    assert legend.endswith("█ 40-50    · never trained")


def test_t_i_and_t_f_may_fill_the_run(folder):
    """Shares that add up to 1 fit for every number of steps, though each is rounded."""
    assert run_main(folder, "--epochs 5 --batch-size 24 --t-i 0.3 --t-f 0.7") == 0
    result = result_of(folder / "out")
    assert result["steps"] == 5 and set(result["frozen_at"].values()) == {2}  # round(1.5)


def test_a_huge_seed(folder, capsys):
    """The largest seed works; one more, or one below 0, is refused by name."""
    assert run_main(folder, f"--epochs 1 --seed {2**32 - 1}") == 0
    for seed in (2**32, 2**64, -1):
        capsys.readouterr()
        assert run_main(folder, f"--epochs 1 --seed {seed}") == 2
        assert "--seed" in capsys.readouterr().err


# --------------------------------------------------------------------------------- refused starts
@pytest.mark.parametrize("flags", [
    "--rank 0", "--rank -1", "--t-i 0.9 --t-f 0.9", "--t-i -1", "--t-f nan", "--t-i nan",
    "--t-f inf", "--data none", "--model none", "--lr 0", "--lr -1", "--lr nan", "--lr inf",
    "--head-lr inf", "--head-lr nan", "--batch-size 0", "--epochs 0", "--limit 0", "--limit -1",
    "--method head --limit 0", "--amp fp16", "--checkpoint-every -1"])
def test_wrong_flags(folder, capsys, flags):
    """Wrong flags and folders: exit code 2, one line that names the flag, and no folder."""
    if torch.cuda.is_available() and "fp16" in flags:
        pytest.skip("fp16 is right here")
    assert run_main(folder, flags) == 2
    message, = capsys.readouterr().err.strip().splitlines()
    flag = flags.split()[-2].strip("-")
    named = {"data": "none/SST-2/train.tsv", "model": "none/config.json"}
    pattern = named.get(flag, rf"\b{flag.replace('-', '[-_ ]')}\b")
    assert re.search(pattern, message), message
    assert not (folder / "out").exists()


@pytest.mark.parametrize("flags, named", [
    ("--method lora --t-i 0.1", "--t-i"), ("--method elora --t-f 0", "--t-f"),
    ("--method lora --train-matrices ffn", "--train-matrices"),
    ("--method lora --train-matrices none", "--train-matrices"),
    ("--method full --sensitivity weight", "--sensitivity"),
    ("--method full --rank 4", "--rank"), ("--method head --rank 4", "--rank"),
    ("--method head --head-lr 1e-3", "--head-lr"),
    ("--train-matrices none --t-i 0.1", "--t-i"),
    ("--train-matrices none --sensitivity weight", "--sensitivity")])
@pytest.mark.parametrize("task", ["sst2", "both"])
def test_flags_without_an_effect(folder, capsys, task, flags, named):
    """What a method does not use is refused before anything is trained or made."""
    assert run_main(folder, flags, task=task) == 2
    message, = capsys.readouterr().err.strip().splitlines()
    assert message.startswith(f"error: {named} would change nothing")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("flags", [
    "--method vera", "--task cola", "--sensitivity hessian", "--train-matrices head",
    "--epochs 1.5", "--preset fast", "--amp fp8", "--keep 2"])
def test_unknown_choices(folder, capsys, flags):
    """What argparse refuses: exit code 2, and the flag is named."""
    with pytest.raises(SystemExit) as stop:
        run_main(folder, flags)
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny folder with a finished run in "out", for tests that leave it alone."""
    folder = tiny.make_folder(tmp_path_factory.mktemp("finished"))
    assert run_main(folder, "--epochs 1") == 0
    return folder


@pytest.mark.parametrize("flags", [
    "--lr -1", "--lr nan", "--head-lr 0", "--rank 0", "--t-i 0.9 --t-f 0.9", "--amp fp16",
    "--limit 0", "--model none", "--data none", "--seed -1"])
def test_a_refused_start_touches_nothing(finished, capsys, flags):
    """The folder of a finished run keeps every file, byte and date."""
    if torch.cuda.is_available() and "fp16" in flags:
        pytest.skip("fp16 is right here")
    before = contents(finished / "out")
    assert len(before) == 4
    capsys.readouterr()
    assert run_main(finished, f"--epochs 1 {flags}") == 2
    assert contents(finished / "out") == before
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_begins_replaces_the_old_one(folder, monkeypatch, capsys):
    """It says so first. No result or map of an earlier run stands beside a new run's log."""
    assert run_main(folder, "--epochs 1") == 0
    assert "replaces" not in capsys.readouterr().out
    (folder / "out/adapter.pt.12ab34cd.part").touch()  # of a killed one
    there = []
    spy(monkeypatch, glue, "loss", lambda *_: there.append(sorted(contents(folder / "out"))))
    assert run_main(folder, "--epochs 2 --batch-size 4 --method lora") == 0
    assert f"replaces the finished one in {folder / 'out'}" in capsys.readouterr().out
    assert "result.json" in there[0]  # until the first step is made
    for names in there[1:]:
        assert not {"result.json", "freeze_map.txt", "adapter.pt.12ab34cd.part"} & set(names)
    assert log_of(folder / "out")[0]["epoch"] == 1
    assert sorted(contents(folder / "out")) == ["adapter.pt", "log.jsonl", "result.json"]


# ------------------------------------------------------------------------------ without network
def packed(name, content):
    """A .tar.gz with one member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def test_without_network(folder, capsys):
    """A run that has nothing to train on fails, and says which file would go where."""
    assert glue.main(["--model", str(folder), "--data", ""]) == 2
    message = capsys.readouterr().err
    assert "MRPC/msr_paraphrase_train.txt" in message and message.count("\n") == 1
    assert glue.main(["--data", str(folder)]) == 2
    assert "all-MiniLM-L6-v2/config.json" in capsys.readouterr().err


def test_with_a_package_index_alone(folder, monkeypatch, capsys):
    """Movie snippets stand in for SST-2: the title, first and last line printed, and the result say
    so; one that is neutral counts as negative; MRPC is skipped, with a line."""
    ratings = [f"{i % 7 - 3}.5" for i in range(24)] + ["0.0", "-0.0", "0"]
    text = "".join(f"{i}\t{r}\tsnippet {i}\r\n" for i, r in enumerate(ratings)).encode()
    source = sources.FILES[sources.SNIPPETS][1][0]
    outer, inner = source.members
    digest = hashlib.sha256(text).hexdigest()
    monkeypatch.setitem(sources.FILES, sources.SNIPPETS, (digest, [source]))

    def download(address):
        if address != source.address:
            raise OSError("no internet, but a package index")
        return packed(outer, packed(inner, text))

    monkeypatch.setattr(sources, "download", download)
    seen = []
    spy(monkeypatch, glue, "Examples", lambda rows, *_: seen.append(rows))
    flags = ["--data", "", "--model", str(folder), "--out", str(folder), "--epochs", "1"]
    assert glue.main(flags) == 0
    train, dev = seen
    labels = dict(row[::2] for row in (*train, *dev))
    assert labels == {f"snippet {i}": int(float(r) > 0) for i, r in enumerate(ratings)}
    assert [labels[f"snippet {i}"] for i in (24, 25, 26)] == [0, 0, 0]
    assert dev == [("snippet 9", None, 0), ("snippet 19", None, 1)]
    assert len(train) == 25
    first, *_, before, last = capsys.readouterr().out.splitlines()
    assert first == before == f"NOT SST-2: {sources.STAND_IN}"
    assert "movie snippets" in first
    assert last.startswith("mrpc is skipped: ")
    data = result_of(folder / "sst2-aflora-s0")["data"]
    assert data.startswith(f"{sources.STAND_IN}: ")
