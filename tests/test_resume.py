"""Runs that are stopped, killed or run out of disk, and go on as if nothing had happened."""

import os
import re
import shutil
import signal
import sys

import pytest

import aflora
import kill
import tiny
import train_glue_small as glue
from companion import contents, log_of, result_of, run_main
from processes import skip_with_cuda

RUN = "--epochs 3 --batch-size 4 --checkpoint-every 4"  # 18 steps, six an epoch


def at_step(monkeypatch, number, act):
    """Calls act() within that step of the next run."""
    calls = []
    real = aflora.Training.step

    def step(training, micro_batches):
        calls.append(micro_batches)
        if len(calls) == number:
            act()
        return real(training, micro_batches)

    monkeypatch.setattr(aflora.Training, "step", step)


def interrupt():
    """What Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def watch_checkpoints(monkeypatch):
    """A list that gets the step of each checkpoint from now on."""
    steps = []
    real = aflora.save_checkpoint

    def save_checkpoint(training, path):
        steps.append(training.steps)
        real(training, path)

    monkeypatch.setattr(aflora, "save_checkpoint", save_checkpoint)
    return steps


def stop_run(folder, step, flags=RUN):
    """Starts a run that is interrupted in a step."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, interrupt)
        with pytest.raises(SystemExit):
            run_main(folder, flags)


def in_child(act):
    """The status of a process of its own that calls act() and exits with what this returns."""
    skip_with_cuda()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = act()
        finally:
            os._exit(code)  # at once, past pytest's own end
    return os.waitpid(process, 0)[1]


def kill_at(step, start, *arguments):
    """start(*arguments) in a process of its own, which gets SIGKILL in that step of the run."""
    def run():
        at_step(pytest.MonkeyPatch(), step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return start(*arguments)

    status = in_child(run)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def resume(folder, *flags):
    """Goes on with the run in the folder "out"; the exit code."""
    return glue.main(["--resume", str(folder / "out"), *flags])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny folder with a run that nobody stopped in "whole"."""
    folder = tiny.make_folder(tmp_path_factory.mktemp("made"))
    assert run_main(folder, f"{RUN} --out {folder / 'whole'}") == 0
    return folder


@pytest.fixture
def whole(made):
    """The same; what a test leaves in "out" is removed."""
    yield made
    shutil.rmtree(made / "out", ignore_errors=True)


# ------------------------------------------------------------------------------ Ctrl-C, SIGTERM
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_what_was_learned(whole, capsys, number, code):
    """Interrupted within a step, a run finishes it, exits 130 (143), says what it saved, and that
    loads; resumed, it ends as the run that nobody stopped."""
    with pytest.MonkeyPatch.context() as patch:
        saved = watch_checkpoints(patch)
        at_step(patch, 9, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            run_main(whole, RUN)
    assert saved == [4, 6, 8, 9]
    said = capsys.readouterr().out
    out = whole / "out"
    assert stop.value.code == code
    assert str(out / "adapter.pt") in said and f"--resume {out}" in said
    assert sorted(contents(out)) == ["adapter.pt", "checkpoint.pt", "log.jsonl"]
    model, _ = tiny.load_tiny(whole)
    layers = aflora.load_adapter(model, out / "adapter.pt")
    assert any(layer.s_b.ne(0).any() for layer in layers.values())
    assert resume(whole) == 0
    assert kill.differences(out, whole / "whole") == []
    assert resume(whole) == 2  # it is done
    assert "checkpoint.pt" in capsys.readouterr().err


def test_the_signals_are_given_back(folder):
    """After a run, stopped or not, signals do what they did before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_run(folder, 3)
    assert resume(folder) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_interrupted_in_the_evaluation(whole, monkeypatch):
    """A signal while dev is scored stops the run behind that epoch."""
    calls = []
    real = glue.predict

    def predict(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # before wrapping, after it, after the first epoch
            interrupt()
        return real(*arguments)

    monkeypatch.setattr(glue, "predict", predict)
    with pytest.raises(SystemExit):
        run_main(whole, RUN)
    assert log_of(whole / "out")[-1]["step"] == 6
    assert resume(whole) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


def test_interrupted_behind_the_last_step(whole, monkeypatch):
    """A signal while the last checkpoint is written is heeded, too: the report waits."""
    real = aflora.save_checkpoint

    def save_checkpoint(training, path):
        if training.steps == training.total_steps:
            interrupt()
        real(training, path)

    with monkeypatch.context() as patch:
        patch.setattr(aflora, "save_checkpoint", save_checkpoint)
        assert run_main(whole, RUN) == 130
    assert sorted(contents(whole / "out")) == ["checkpoint.pt", "log.jsonl"]
    assert resume(whole) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


def test_interrupted_twice(whole, monkeypatch):
    """The second signal ends the run at once, within the step: exit code 130. It goes on from the
    last checkpoint."""
    def twice():
        interrupt()
        interrupt()

    at_step(monkeypatch, 7, twice)
    assert run_main(whole, RUN) == 130
    assert not (whole / "out/adapter.pt").exists()
    assert resume(whole) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


# ---------------------------------------------------------------------------------------- SIGKILL
@pytest.mark.parametrize("steps", [(12,), (8, 3), (5, 5, 5), (18,)])
def test_runs_killed_in_a_step_go_on(whole, steps):
    """Killed, also when they had been resumed, runs end as the one that was not:
    from the last checkpoint on, each logged line once."""
    kill_at(steps[0], run_main, whole, RUN)
    for step in steps[1:]:
        kill_at(step, resume, whole)
    assert resume(whole) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


@pytest.mark.parametrize("method", ["lora", "elora", "full", "head"])
def test_other_methods_resume(folder, method):
    """What each of them trains is in its checkpoint."""
    flags = f"--method {method} --epochs 2 --batch-size 4 --checkpoint-every 4"
    assert run_main(folder, f"{flags} --out {folder / 'whole'}") == 0
    (folder / "whole/freeze_map.txt").touch()  # none has a map
    kill_at(10, run_main, folder, flags)
    assert resume(folder) == 0
    (folder / "out/freeze_map.txt").touch()
    assert kill.differences(folder / "out", folder / "whole") == []


def test_killed_before_the_first_checkpoint(whole):
    """Then the same command starts the run anew."""
    kill_at(3, run_main, whole, RUN)
    assert sorted(contents(whole / "out")) == ["log.jsonl"]
    assert resume(whole) == 2
    assert run_main(whole, RUN) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


def test_stopped_behind_the_last_step(whole, monkeypatch):
    """Nothing is left but the report: it is made, with the seconds that training took."""
    def save_adapter(model, path):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aflora, "save_adapter", save_adapter)
        assert run_main(whole, RUN) == 130
    assert resume(whole) == 0
    assert kill.differences(whole / "out", whole / "whole") == []
    seconds = log_of(whole / "out")[-1]["seconds"]
    assert result_of(whole / "out")["seconds"] == pytest.approx(seconds, rel=0.5)


def test_killed_in_the_report(whole):
    """Behind the last step, while the result is written: half a file is removed, the log's lines
    are those of the checkpoint, and the result is made."""
    def dies():
        patch = pytest.MonkeyPatch()
        real = os.fsync

        def fsync(file):
            if (whole / "out/adapter.pt").exists():  # it is the first that a report writes
                os.kill(os.getpid(), signal.SIGKILL)
            real(file)

        patch.setattr(os, "fsync", fsync)
        return run_main(whole, RUN)

    in_child(dies)
    assert list((whole / "out").glob("*.part"))
    with open(whole / "out/log.jsonl", "a") as log:
        log.write('{"half')
    assert resume(whole) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


def test_half_a_line_in_the_log(whole):
    """A line that was cut as the run died is made again."""
    kill_at(12, run_main, whole, RUN)
    with open(whole / "out/log.jsonl", "a") as log:
        log.write('{"epoch": 2, "st')
    assert resume(whole) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


def test_seconds_go_on(folder):
    """The clock of a resumed run starts where its last logged line stood; log times only grow."""
    kill_at(15, run_main, folder, RUN)
    lines = log_of(folder / "out")
    before = [line["seconds"] for line in lines if line["step"] <= 12]
    assert resume(folder) == 0
    seconds = [line["seconds"] for line in log_of(folder / "out")]
    assert seconds[:len(before)] == before
    assert seconds == sorted(seconds)
    assert result_of(folder / "out")["seconds"] >= before[-1]


@pytest.mark.parametrize("every, steps", [
    (0, [6, 12]), (100, [6, 12]), (4, [4, 6, 8, 12]), (1, [*range(1, 13)])])
def test_checkpoint_every(folder, monkeypatch, every, steps):
    """A checkpoint each so many steps, and one after each epoch; 0: those alone."""
    saved = watch_checkpoints(monkeypatch)
    flags = f"--epochs 2 --batch-size 4 --checkpoint-every {every}"
    assert run_main(folder, flags) == 0
    assert saved == steps


def test_a_new_run_leaves_nothing_of_the_old_one_beside_its_log(folder, monkeypatch):
    """From its first step on: an adapter of another seed would be taken for this run's."""
    assert run_main(folder, "--epochs 1") == 0

    def die():
        raise RuntimeError("no light")

    at_step(monkeypatch, 2, die)
    with pytest.raises(RuntimeError, match="no light"):
        run_main(folder, "--epochs 1 --batch-size 4 --seed 1")
    assert sorted(os.listdir(folder / "out")) == ["log.jsonl"]


def test_killed_runs_resume():
    """The short form of kill.py: SIGKILL at a random moment of a whole process loses nothing."""
    skip_with_cuda()
    assert kill.main(1, epochs=10) == 1


def test_a_full_disk_is_named_and_spares_the_checkpoint(folder):
    """With a limit on the size of files a resumed run fails at its next checkpoint: the last line
    names the file, exit code 2, nothing half-written; the last good checkpoint is still there."""
    resource = pytest.importorskip("resource")  # not on Windows
    stop_run(folder, 2, "--epochs 9")
    good = (folder / "out/checkpoint.pt").read_bytes()
    assert len(good) > 20000

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        with open(folder / "errors", "w") as sys.stderr:
            return resume(folder)

    assert os.waitstatus_to_exitcode(in_child(run)) == 2
    errors = (folder / "errors").read_text()
    assert "Traceback" not in errors
    place = re.escape(str(folder / "out/checkpoint.pt"))
    assert re.match(f"error: {place}: .*File too large", errors.splitlines()[-1])
    assert (folder / "out/checkpoint.pt").read_bytes() == good
    assert list(folder.rglob("*.part")) == []


# ---------------------------------------------------------------------------- what is refused
@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A tiny folder with a stopped run in "out", for tests that leave it alone."""
    folder = tiny.make_folder(tmp_path_factory.mktemp("stopped"))
    stop_run(folder, 5)
    return folder


@pytest.fixture
def spoilt(stopped):
    """The same, for tests that spoil a file there: behind them each is as it was."""
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    yield stopped
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("flags", ["", " --out=~/out"])
def test_a_stopped_run_is_not_overwritten(stopped, monkeypatch, capsys, flags):
    """A new start in its folder is refused, with a word on how to go on, and touches nothing."""
    monkeypatch.setenv("HOME", str(stopped))
    before = contents(stopped / "out")
    capsys.readouterr()
    assert run_main(stopped, RUN + flags) == 2
    message = capsys.readouterr().err
    assert str(stopped / "out/checkpoint.pt") in message and "--resume" in message
    assert contents(stopped / "out") == before


def test_a_stopped_second_task_is_noticed_before_the_first(folder, capsys):
    """Of two tasks, MRPC was stopped: SST-2 does not train, for minutes, to be refused then."""
    checkpoint = folder / "out/mrpc-aflora-s0/checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert run_main(folder, RUN, task="both") == 2
    assert str(checkpoint) in capsys.readouterr().err
    assert not (folder / "out/sst2-aflora-s0").exists()


@pytest.mark.parametrize("flags, message", [
    ("--seed 1", "seed is 0 there, 1 here"),
    ("--task mrpc", "task is sst2 there, mrpc here"),
    ("--method lora", "method is aflora there, lora here"),
    ("--epochs 5", "epochs is 3 there, 5 here"),
    ("--lr 0.01", "lr is None there, 0.01 here"),
    ("--checkpoint-every 5", "checkpoint_every is 4 there, 5 here"),
    ("--sensitivity weight", "sensitivity is None there, weight here"),
    ("--out elsewhere", "out is .* there, elsewhere here"),
    ("--data elsewhere", "data is .* there, elsewhere here"),
])
def test_another_flag_on_resume_is_named(stopped, capsys, monkeypatch, flags, message):
    """Flags are those of the stopped run; one that differs is refused by name: nothing is touched,
    nothing made elsewhere."""
    monkeypatch.chdir(stopped)
    before = contents(stopped / "out")
    capsys.readouterr()
    assert resume(stopped, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert contents(stopped / "out") == before
    assert not (stopped / "elsewhere").exists()


def test_the_same_flags_on_resume_are_taken(whole):
    """Given once more, they change nothing."""
    stop_run(whole, 5)
    assert resume(whole, *RUN.split(), "--task", "sst2", "--out", str(whole / "out")) == 0
    assert kill.differences(whole / "out", whole / "whole") == []


def test_a_folder_moved_elsewhere_resumes(whole):
    """A stopped run's folder goes by its new name."""
    stop_run(whole, 5)
    (whole / "out").rename(whole / "moved")
    assert glue.main(["--resume", str(whole / "moved")]) == 0
    (whole / "moved").rename(whole / "out")
    assert kill.differences(whole / "out", whole / "whole") == []


@pytest.mark.parametrize("file", ["SST-2/train.tsv", "SST-2/dev.tsv"])
@pytest.mark.parametrize("old, new", [("good\t1", "good\t0"), ("film", "movie")])
def test_changed_texts_on_resume_are_noticed(spoilt, capsys, file, old, new):
    """Another label or word in train or dev: the run would not be the one that was stopped."""
    before = contents(spoilt / "out")
    path = spoilt / file
    path.write_text(path.read_text().replace(old, new, 1))
    capsys.readouterr()
    assert resume(spoilt) == 2
    error = capsys.readouterr().err
    assert "texts is" in error and error.count("\n") == 1
    assert contents(spoilt / "out") == before


def test_changed_weights_on_resume_are_noticed(spoilt, capsys):
    """So are other weights of the model."""
    tensors = tiny.checkpoint()
    tensors["encoder.layer.0.output.dense.weight"][3, 4] += 1
    (spoilt / "model.safetensors").write_bytes(tiny.safetensors(tensors))
    capsys.readouterr()
    assert resume(spoilt) == 2
    assert "weights is" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{}", "PK"])
def test_a_folder_that_is_no_stopped_run(spoilt, capsys, content):
    """A missing or damaged checkpoint is named; nothing is touched."""
    path = spoilt / "out/checkpoint.pt"
    path.unlink()
    if content is not None:
        path.write_text(content)
    before = contents(spoilt / "out")
    capsys.readouterr()
    assert resume(spoilt) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint.pt" in error
    assert contents(spoilt / "out") == before


def test_a_checkpoint_that_is_not_the_companion_s(spoilt, capsys):
    """One of somebody's own loop has no flags to go on with."""
    model, _ = tiny.adapted()
    training = aflora.train(model, lambda epoch: tiny.data(), tiny.loss_of, epochs=1, lr=1e-2)
    aflora.save_checkpoint(training, spoilt / "out/checkpoint.pt")
    capsys.readouterr()
    assert resume(spoilt) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the folder of a stopped run?" in error
