"""Resuming, kills, hung ranks, signals, full disks. KILLS=30 (`make soak`): the number of kills."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, VOCAB, Program
from safetensors.torch import load_file, save_file

import data
import train
from cli import UserError
from training import checkpoint, distributed, optim, step
from training.run import is_elastic_restart, last_checkpoint
from weights import hf
from weights.load import load_model

KILLS = int(os.environ.get("KILLS", 3))
ALONE = distributed.Distributed(torch.device("cpu"))
QUICK = (
    "--seq-len",
    160,
    "--device",
    "cpu",
    "--dtype",
    "fp32",
    "--samples",
    0,
    "--lora-dropout",
    0.1,
)
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
)


def start(out, base, chats, *flags, ranks=1, program="train.py", restarts=None, env=None):
    """Start train.py in the background, its output in OUT.txt; with `restarts` under torchrun."""
    command_line = (program, "--model", base, "--data", chats, "--out", out, *QUICK, *flags)
    with open(f"{out}.txt", "a") as log, open(os.devnull) as devnull:
        if restarts is None:
            return Program(command_line, (devnull, log, log), env, ranks)
        command_line = (
            sys.executable,
            *TORCHRUN,
            "--nproc_per_node",
            ranks,
            "--max-restarts",
            restarts,
            *command_line,
        )
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.Popen(
            [*map(str, command_line)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run(out, *args, code=0, **kwargs):
    """Run train.py to its end. Return its output."""
    before = len(log(out))
    process = start(out, *args, **kwargs)
    assert process.wait(timeout=600) == code, log(out)[-3000:]
    return log(out)[before:]


def log(out):
    path = Path(f"{out}.txt")
    return path.read_text() if path.exists() else ""


def wait_until(condition, process=None, seconds=300):
    for _ in range(seconds * 50):
        if condition():
            return
        assert process is None or process.poll() is None, "the process ended too early"
        time.sleep(0.02)
    raise AssertionError("the condition never held")


def has_checkpoint(out, at_least=1):
    return lambda: any(
        checkpoint.step_of(save) >= at_least
        for save in checkpoint.list_checkpoints(Path(out) / "resume")
    )


def ended_or(process, condition):
    return lambda: process.poll() is not None or condition()


def workers(process):
    """The ranks' processes."""
    if isinstance(process, Program):
        return process.pids
    return [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
    ]


def kill(process, *pids):
    for pid in pids or (*workers(process), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=240)


def curve(out):
    """Return the lines of metrics.jsonl without what depends on time."""
    timed = {"tok_per_s", "mfu", "hfu", "peak_gib", "seconds"}
    lines = [json.loads(text) for text in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def weights(out):
    name = (
        "adapter_model.safetensors"
        if (out / "adapter_model.safetensors").exists()
        else "model.safetensors"
    )
    return load_file(out / name)


def assert_same_run(one, other, exactly=True):
    """Compare the metrics of two runs, and their weights if `exactly`."""
    if exactly:
        assert curve(one) == curve(other)
        first, second = weights(one), weights(other)
        assert first.keys() == second.keys() and all(
            torch.equal(first[key], second[key]) for key in first
        )
        return
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a.keys() == b.keys() and [*a.values()] == pytest.approx([*b.values()], rel=2e-3)


KINDS = {
    "lora": ("--lora", "--lr", 1e-2, "--max-steps", 12, "--micro-batch", 4),
    "qlora": ("--qlora", "--lr", 1e-2, "--max-steps", 7, "--micro-batch", 4),
    "full": ("--lr", 3e-3, "--max-steps", 12, "--micro-batch", 4),
    "pure": ("--pure-bf16", "--dtype", "bf16", "--lr", 3e-3, "--max-steps", 7, "--micro-batch", 4),
}


@pytest.fixture(scope="module")
def reference_run(base, chats, tmp_path_factory):
    """Return a function: (kind, ranks) → the folder of an uninterrupted run."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), {}

    def of(kind, ranks=1):
        if (kind, ranks) not in made:
            made[kind, ranks] = folder / f"{kind}-{ranks}"
            run(made[kind, ranks], base, chats, *KINDS[kind], ranks=ranks)
        return made[kind, ranks]

    return of


# --- resuming


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(kind, reference_run, base, chats, tmp_path):
    """Stopped by SIGTERM. Dropout, or stochastic rounding, would show a lost random state."""
    out = tmp_path / "ckpt"
    process = start(out, base, chats, *KINDS[kind], "--save-every", 2)
    wait_until(has_checkpoint(out, 3), process)
    process.terminate()
    assert process.wait(timeout=240) == 128 + signal.SIGTERM
    assert (
        "SIGTERM: stopped after step" in log(out)
        and "saved in" in log(out)
        and "Traceback" not in log(out)
    )
    steps = sum("loss" in line for line in curve(out))
    assert has_checkpoint(out, steps)() and steps < 12
    assert f"resuming after step {steps}" in run(out, base, chats, *KINDS[kind], "--resume")
    assert_same_run(reference_run(kind), out)
    assert json.loads((out / "run.json").read_text())["resumed"] == [steps]


def test_resume_with_another_number_of_ranks(reference_run, base, chats, tmp_path):
    """Saved by 1 process, resumed by 3, then by 2. Without dropout: each rank draws its own."""
    for kind in ("lora", "full"):
        flags, out = (*KINDS[kind], "--lora-dropout", 0, "--max-steps", 9), tmp_path / kind
        run(tmp_path / f"{kind}-alone", base, chats, *flags)
        for ranks, steps in ((1, 2), (3, 5)):
            process = start(
                out,
                base,
                chats,
                *flags,
                "--save-every",
                1,
                *(["--resume"] if ranks == 3 else []),
                ranks=ranks,
            )
            wait_until(has_checkpoint(out, steps), process)
            kill(process)
        run(out, base, chats, *flags, "--resume", ranks=2)
        assert_same_run(tmp_path / f"{kind}-alone", out, exactly=False)


def test_resume_and_overwrite_messages(reference_run, base, chats, tmp_path):
    out, flags = tmp_path / "ckpt", KINDS["lora"]
    process = start(out, base, chats, *flags)
    wait_until(lambda: (out / "run.json").exists(), process)
    kill(process)
    assert "already holds something" in run(out, base, chats, *flags, code=2)
    process = start(out, base, chats, *flags, "--resume", "--save-every", 1)
    wait_until(has_checkpoint(out, 2), process)
    assert "has no checkpoint yet" in log(out)
    kill(process)
    for extra, text in {
        (): "the same command and --resume",
        ("--resume", "--lr", "1e-3"): "--lr is 0.001 now, and was 0.01",
        ("--resume", "--overwrite"): "Leave one of them out",
    }.items():
        printed = run(out, base, chats, *flags, *extra, code=2)
        assert text in printed and "Traceback" not in printed
    other = shutil.copytree(chats, tmp_path / "other")
    (other / "train.jsonl").write_text(
        "".join((other / "train.jsonl").read_text().splitlines(keepends=True)[1:])
    )
    assert "isn't what the run" in run(out, base, other, *flags, "--resume", code=2)
    (out / "metrics.jsonl").write_text(
        (out / "metrics.jsonl").read_text() + '{"step": 3, "lo'
    )  # as a kill may leave it
    run(out, base, chats, *flags, "--resume", "--keep", 1)
    assert_same_run(reference_run("lora"), out)
    assert len(checkpoint.list_checkpoints(out / "resume")) == 1
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "is finished" in run(out, base, chats, *flags, "--resume")
    assert "--lr is 0.5 now" in run(out, base, chats, *flags, "--resume", "--lr", 0.5, code=2)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "already holds something" in run(out, base, chats, *flags, code=2)


def test_elastic_restart_ignores_another_run_in_out(base, chats, tmp_path, monkeypatch):
    """The first start failed before it made the folder: what --out holds is another run."""
    out, flags = tmp_path / "ckpt", (*KINDS["lora"], "--max-steps", 1)
    run(out, base, chats, *flags)
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert "already holds something" in run(out, base, chats, *flags, code=2, env=again)
    printed = run(out, base, chats, *flags, "--overwrite", env=again)
    assert "before training" in printed and "is finished" not in printed
    for count, launcher, again in (
        ("1", os.getppid(), True),
        ("1", os.getppid() + 1, False),
        ("0", os.getppid(), False),
    ):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        (out / "run.json").write_text(json.dumps({"launcher": launcher}))
        assert is_elastic_restart(out) is again


def test_checkpoints_on_some_hosts_only_are_an_error(tmp_path):
    options = train.Options(out=str(tmp_path), resume=True)
    other = SimpleNamespace(
        is_main=True, broadcast=lambda number: number, all_reduce_max=lambda number: max(number, 1)
    )  # it has one save
    with pytest.raises(UserError, match="holds checkpoints on some hosts only"):
        last_checkpoint(options, other)


def test_checkpoint_files_and_how_many_are_kept(base, chats, tmp_path):
    out = tmp_path / "ckpt"
    run(out, base, chats, *KINDS["full"], "--save-every", 3, ranks=2)
    checkpoints = checkpoint.list_checkpoints(out / "resume")
    assert len(checkpoints) == 2 and not [*out.rglob("*.new")]
    assert {path.name for path in checkpoints[-1].iterdir()} == {
        f"rank-0000{r}.{kind}" for r in (0, 1) for kind in ("json", "safetensors")
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in (out / "resume").rglob("*"))
    names = load_file(checkpoints[-1] / "rank-00000.safetensors").keys()
    assert {name for name in names if name.startswith("lm_head")} == {
        f"lm_head.weight{end}" for end in ("", ".exp_avg", ".exp_avg_sq")
    }
    notes = [json.loads(path.read_text()) for path in sorted(checkpoints[-1].glob("*.json"))]
    for name, place in notes[0]["tensors"].items():
        assert place["first"] == 0 and notes[1]["tensors"][name]["first"] == place["rows"]
        assert place["rows"] + notes[1]["tensors"][name]["rows"] == place["shape"][0]


def test_damaged_checkpoint_is_named_with_a_hint(base, chats, tmp_path):
    out = tmp_path / "ckpt"
    process = start(out, base, chats, *KINDS["lora"], "--save-every", 1)
    wait_until(has_checkpoint(out, 3), process)
    kill(process)
    before, last = checkpoint.list_checkpoints(out / "resume")[-2:]
    file = last / "rank-00000.safetensors"
    whole, metrics = file.read_bytes(), (out / "metrics.jsonl").read_bytes()
    file.write_bytes(whole[:-100])
    assert f"Delete {last}" in run(out, base, chats, *KINDS["lora"], "--resume", code=2)
    tensors = load_file(before / "rank-00000.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "lora_A" in name}, file)
    assert "of two different checkpoints" in run(
        out, base, chats, *KINDS["lora"], "--resume", code=2
    )
    assert (out / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(last)
    assert f"resuming after step {checkpoint.step_of(before)}" in run(
        out, base, chats, *KINDS["lora"], "--resume"
    )


def make_manager(folder, keep, step=0, every=1, minutes=10.0):
    model = torch.nn.Linear(3, 2)
    optimizer = optim.make_optimizer(model, 0.1, 0.0)
    return checkpoint.CheckpointManager(folder, model, optimizer, ALONE, step, keep, every, minutes)


def test_checkpoint_is_named_after_fsync(tmp_path, monkeypatch):
    """After a power failure a file name may survive without its contents."""
    calls, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: calls.append(os.fstat(handle).st_ino) or fsync(handle)
    )
    monkeypatch.setattr(Path, "rename", lambda path, to: calls.append("named") or rename(path, to))
    make_manager(tmp_path, 2).save(1, dict)
    names = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.rglob("*"))}
    assert [names.get(call, call) for call in calls] == [
        "rank-00000.safetensors",
        "rank-00000.json",
        "named",
        tmp_path.name,
    ]


def test_half_pruned_checkpoint_has_no_name(tmp_path, monkeypatch):
    manager = make_manager(tmp_path, 1)
    manager.save(1, dict)
    # As if it were killed after the first file.
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: next(path.iterdir()).unlink())
    manager.save(2, dict)
    assert [checkpoint.step_of(save) for save in checkpoint.list_checkpoints(tmp_path)] == [2]


def test_checkpoints_of_later_steps_are_deleted(tmp_path):
    """They are of a run that --overwrite replaced, or of a host that was ahead."""
    for number in (3, 5, 9):
        (tmp_path / f"step-{number:08}").mkdir()
    manager = make_manager(tmp_path, 2, step=5)
    assert [*map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))] == [3, 5]
    manager.save(9, dict)
    assert [*map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))] == [5, 9]
    make_manager(tmp_path, 2)
    assert not checkpoint.list_checkpoints(tmp_path)


def test_resumed_checkpoint_is_not_written_again(tmp_path):
    """Compiling may take longer than --save-minutes."""
    make_manager(tmp_path, 2).save(7, dict)
    manager = make_manager(tmp_path, 2, step=7, every=None, minutes=0.0)
    assert manager.poll(7, dict) is None and manager.writer is None
    assert manager.poll(8, dict) is None
    manager.finish()
    assert [*map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))] == [7, 8]


def test_save_every_counts_from_the_last_checkpoint_started(tmp_path):
    manager = make_manager(tmp_path, 9, every=3)
    for number in range(1, 9):
        manager.poll(number, dict)
        if manager.writer:
            manager.writer.join()  # committed by the next poll
    assert [*map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))] == [3, 6]


# --- kills


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_run_resumes_bit_exact(ranks, reference_run, base, chats, tmp_path):
    """kill -9 of all processes or of one rank, at random moments, with a checkpoint every step."""
    chance, kills, number, hit = random.Random(ranks), 0, 0, 0
    while kills < (KILLS if ranks == 1 else max(1, KILLS // 2)):
        number += 1
        kind, out = chance.choice(["lora", "full"]), tmp_path / f"run-{number}"
        reference, again = reference_run(kind, ranks), ()
        while True:
            process = start(out, base, chats, *KINDS[kind], "--save-every", 1, *again, ranks=ranks)
            done = max(
                map(checkpoint.step_of, checkpoint.list_checkpoints(out / "resume")), default=0
            )
            late, aim = (
                chance.random() < 0.8,
                done + chance.randint(1, 4),
            )  # some before the first step, most between saves or in one
            if late:
                wait_until(ended_or(process, has_checkpoint(out, aim)))
            try:
                assert process.wait(chance.uniform(0, 0.3 if late else 5)) == 0, log(out)[-3000:]
                break
            except subprocess.TimeoutExpired:
                worker_pids = workers(process)
                kill(
                    process,
                    *(
                        [chance.choice(worker_pids)]
                        if ranks > 1 and worker_pids and chance.random() < 0.5
                        else []
                    ),
                )
                kills, again = kills + 1, ("--resume",)
                hit += bool([*out.glob("resume/*.new")])
            for save in checkpoint.list_checkpoints(out / "resume"):
                assert len([*save.iterdir()]) == 2 * ranks
            if (
                checkpoint.list_checkpoints(out / "resume")
                and (out / "adapter_config.json").exists() | (out / "config.json").exists()
            ):
                load_model(str(out), torch.float32)
        assert_same_run(reference, out)
    print(f"{kills} kills in {number} runs of {ranks} processes, {hit} while a save was written")


def test_torchrun_restarts_after_a_killed_rank(reference_run, base, chats, tmp_path):
    out = tmp_path / "ckpt"
    process = start(
        out, base, chats, *KINDS["lora"], "--save-every", 1, "--overwrite", ranks=2, restarts=1
    )
    wait_until(has_checkpoint(out, 3), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(timeout=240) == 0, log(out)[-3000:]
    assert "resuming after step" in log(out) and "rank 1 is gone, it was in step" in log(out)
    assert_same_run(reference_run("lora", 2), out)


# --- ranks that die or hang

HANG = """
import os, sys, time
import cli, train
from training import step

add, calls = step.accumulate_gradients, []

def slow(*given):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        time.sleep(1000)
    return add(*given)

step.accumulate_gradients = slow
cli.run(train.main)
"""


def test_hung_rank_ends_the_job_and_is_named(base, chats, tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    out, started = tmp_path / "ckpt", time.time()
    printed = run(
        out,
        base,
        chats,
        *KINDS["lora"],
        "--save-every",
        1,
        "--timeout",
        6,
        ranks=2,
        program=tmp_path / "hang.py",
        code=1,
    )
    assert (
        "rank 1 hasn't moved for 6 s, it is in step 3, " in printed
        and "step.py, line" in printed
        and checkpoint.RESUME_HINT in printed
    )
    assert (
        "rank 0 hasn't" not in printed and time.time() - started < 240
    )  # and not the 1,000 s that it hangs
    assert has_checkpoint(out)()


def test_dead_or_stopped_rank_ends_the_job_and_is_named(base, chats, tmp_path):
    for sign, text in {
        signal.SIGKILL: "rank 1 is gone, it was in step",
        signal.SIGSTOP: "rank 1 gave no sign for 5 s, it was in step",
    }.items():
        out = tmp_path / sign.name
        process = start(
            out,
            base,
            chats,
            *KINDS["full"],
            "--max-steps",
            400,
            "--save-every",
            1,
            "--timeout",
            5,
            ranks=2,
        )
        wait_until(has_checkpoint(out, 2), process)
        worker_pids = workers(process)
        os.kill(worker_pids[1], sign)
        assert process.wait(timeout=240) == 1  # not after the 400 steps, nor torch's own hour
        assert text in log(out) and checkpoint.RESUME_HINT in log(out)
        for pid in worker_pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


# --- out of memory, nonfinite losses

FULL = """
import os
import torch
import cli, model, train

forward = model.Transformer.forward

def small(self, tokens, *given, **named):
    if type(tokens) is not torch.Tensor:  # a prediction's
        return forward(self, tokens, *given, **named)
    if torch.is_grad_enabled():
        torch.rand(3)  # who tries again must draw the same
    if len(tokens) > 2 and torch.is_grad_enabled() and os.environ.get("RANK", "1") == "1":
        raise torch.OutOfMemoryError("out of memory")
    return forward(self, tokens, *given, **named)

model.Transformer.forward = small
cli.run(train.main)
"""


def test_oom_halves_micro_batch_with_the_same_result(base, chats, tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    flags = (*KINDS["lora"], "--max-steps", 4, "--micro-batch", 8)
    printed = run(tmp_path / "ckpt", base, chats, *flags, program=tmp_path / "full.py")
    assert (
        "8 rows at a time don't fit: 4 from here on" in printed
        and "4 rows at a time don't fit: 2 from here on" in printed
    )
    run(tmp_path / "two", base, chats, *flags, "--micro-batch", 2, program=tmp_path / "full.py")
    assert_same_run(tmp_path / "two", tmp_path / "ckpt")


def test_oom_on_one_rank_ends_all_and_torchrun_restarts_smaller(base, chats, tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    flags = (*KINDS["lora"], "--max-steps", 4)
    printed = run(
        tmp_path / "none", base, chats, *flags, ranks=2, program=tmp_path / "full.py", code=1
    )
    assert (
        "rank 1: 4 rows of 160 tokens don't fit" in printed
        and "--micro-batch 2" in printed
        and "is gone" not in printed
    )
    run(tmp_path / "again", base, chats, *flags, ranks=2, program=tmp_path / "full.py", restarts=1)
    run(
        tmp_path / "two",
        base,
        chats,
        *flags,
        "--micro-batch",
        2,
        ranks=2,
        program=tmp_path / "full.py",
    )
    assert_same_run(tmp_path / "two", tmp_path / "again")


def test_probe_raises_out_of_memory_and_changes_nothing(base, chats, tokenizer, monkeypatch):
    model = step.build_model(
        hf.with_vocab_size(hf.read_config(base), VOCAB + 2),
        ALONE,
        step.ModelSpec({"dropout": 0.5}, torch.float32),
        base,
    )
    rows = data.load_rows(chats / "train.jsonl", tokenizer, 160)
    tried = []
    monkeypatch.setattr(
        step, "micro_batches", lambda rows, *_: tried.append(rows) or [step.collate(rows, "cpu")]
    )
    before = torch.get_rng_state()
    step.probe_micro_batch(model, rows, 4, ALONE, 160, True)
    assert [len(row.ids) for row in tried[0]] == sorted([len(row.ids) for row in rows])[:-5:-1]
    monkeypatch.setattr(
        model, "forward", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    )
    with pytest.raises(step.OutOfMemory):
        step.probe_micro_batch(model, rows, 4, ALONE, 160, True)
    assert torch.equal(before, torch.get_rng_state()) and all(
        p.grad is None for p in model.parameters()
    )


BAD = """
import torch
import cli, train
from training import step

add, calls = step.accumulate_gradients, []

def poisoned(model, batches, *given):
    calls.extend([1] * (type(batches[0].tokens) is torch.Tensor))  # not a prediction's
    return add(model, batches, *given) * (float("nan") if len(calls) in {4, 6} else 1.0)

def timed(*given, probe=step.probe_micro_batch, **named):
    probe(*given, **named)
    calls.clear()  # a step's are counted

step.accumulate_gradients, step.probe_micro_batch = poisoned, timed
cli.run(train.main)
"""


def test_nonfinite_loss_stops_or_is_skipped(base, chats, tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    out = tmp_path / "ckpt"
    printed = run(out, base, chats, *KINDS["lora"], program=tmp_path / "bad.py", code=2)
    assert (
        "step 4: loss nan" in printed
        and "on lines [" in printed
        and "--skip-nonfinite" in printed
        and "Traceback" not in printed
    )
    assert has_checkpoint(out, 3)() and not has_checkpoint(out, 4)()
    run(out, base, chats, *KINDS["lora"], "--resume")
    assert [line["step"] for line in curve(out) if "loss" in line] == [*range(1, 13)]
    assert "step 6: loss nan" in run(
        tmp_path / "one",
        base,
        chats,
        *KINDS["lora"],
        "--skip-nonfinite",
        1,
        program=tmp_path / "bad.py",
        code=2,
    )
    run(
        tmp_path / "two",
        base,
        chats,
        *KINDS["lora"],
        "--skip-nonfinite",
        2,
        program=tmp_path / "bad.py",
    )
    left_out = [line for line in curve(tmp_path / "two") if "skipped" in line]
    assert [line["step"] for line in left_out] == [4, 6] and all(line["lines"] for line in left_out)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["result"]["steps"] == 12


# --- signals, time, disks


def test_ctrl_c_saves_and_a_second_one_stops_at_once(reference_run, base, chats, tmp_path):
    out = tmp_path / "ckpt"
    process = start(out, base, chats, *KINDS["lora"], ranks=2, restarts=0)
    wait_until(
        lambda: (
            '"loss"'
            in ((out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else "")
        ),
        process,
    )
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    process.wait(timeout=240)
    assert "Ctrl-C: stopped after step" in log(out) and has_checkpoint(out)()
    run(out, base, chats, *KINDS["lora"], "--resume", ranks=2)
    assert_same_run(reference_run("lora", 2), out)

    out = tmp_path / "other"
    process = start(out, base, chats, *KINDS["lora"], "--max-steps", 500)
    wait_until(
        lambda: (
            '"loss"'
            in ((out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else "")
        ),
        process,
    )
    process.send_signal(signal.SIGSTOP)  # both arrive in the same step
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 130


def test_max_minutes_stops_in_time(base, chats, tmp_path):
    out, steps = tmp_path / "ckpt", []
    for extra in ((), ("--resume",)):
        started = time.time()
        printed = run(
            out, base, chats, *KINDS["lora"], "--max-minutes", 0.2, "--max-steps", 9999, *extra
        )
        assert "--max-minutes 0.2: stopped after step" in printed
        assert (
            time.time() - started < 240
        )  # twelve seconds, and Python's start and end on a busy machine; 9,999 steps take longer
        steps.append(curve(out)[-1]["step"])
        assert has_checkpoint(out, steps[-1])()
    assert (
        0 < steps[0] <= steps[1]
    )  # on a busy machine twelve seconds may be over before the first step
    assert [line["step"] for line in curve(out) if "loss" in line] == [*range(1, steps[1] + 1)]


def test_stop_before_the_first_step_claims_no_checkpoint(base, chats, tmp_path):
    out = tmp_path / "ckpt"
    printed = run(out, base, chats, *KINDS["lora"], "--max-minutes", 0.0001, "--max-steps", 2)
    assert (
        "stopped before the first step" in printed
        and "saved in" not in printed
        and not [*out.glob("resume/step-*")]
    )
    assert "starts from the beginning" in run(
        out, base, chats, *KINDS["lora"], "--max-steps", 2, "--resume"
    )
    assert [line["step"] for line in curve(out) if "loss" in line] == [1, 2]


DISK = """mount -t tmpfs -o size="$SIZE" none "$OUT" || exit 77
"$@" & run=$!
if [ -n "$FILL" ]; then
    until [ -e "$OUT/resume/step-00000002" ] || ! kill -0 $run; do sleep 0.02; done
    while kill -0 $run 2>/dev/null; do head -c 1G /dev/zero >> "$OUT/other" 2>/dev/null; sleep 0.02; done
fi
wait $run; code=$?
rm -f "$OUT/other"; cp -r "$OUT" "$OUT.kept"; exit $code
"""


def on_a_small_disk(out, base, chats, size, fill, *flags):
    out.mkdir()
    command_line = (
        "unshare",
        "-rm",
        "bash",
        "-c",
        DISK,
        "disk",
        sys.executable,
        "train.py",
        "--model",
        base,
        "--data",
        chats,
        "--out",
        out,
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out), "SIZE": size, "FILL": fill}
    try:
        done = subprocess.run(
            [*map(str, (*command_line, *QUICK, *flags))],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare to make a small disk with")
    if done.returncode in (1, 77) and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no right to make a small disk: {done.stderr.splitlines()[0]}")
    return done


def test_small_disk_is_an_error_before_the_first_step(base, chats, tmp_path):
    done = on_a_small_disk(tmp_path / "ckpt", base, chats, "4m", "", *KINDS["full"], "--overwrite")
    assert (
        done.returncode == 2
        and "this run needs 0.0 GB" in done.stderr
        and "--keep 1" in done.stderr
    )
    assert not (tmp_path / "ckpt.kept" / "resume").exists() and "Traceback" not in done.stderr


def test_enospc_keeps_the_checkpoint_before(reference_run, base, chats, tmp_path):
    done = on_a_small_disk(
        tmp_path / "ckpt",
        base,
        chats,
        "300m",
        "yes",
        *KINDS["full"],
        "--overwrite",
        "--save-every",
        1,
    )
    last = [line for line in done.stderr.splitlines() if line.strip()][-2:]
    assert (
        done.returncode == 2
        and "the disk is full" in last[0]
        and (
            "Free some space" in last[1] or "Make room" in last[1]
        )  # as a save or the weights met it
        and "Traceback" not in done.stderr
    ), done.stderr
    out = tmp_path / "ckpt.kept"
    assert checkpoint.list_checkpoints(out / "resume") and not [*out.rglob("*.new")]
    run(out, base, chats, *KINDS["full"], "--resume")
    assert_same_run(reference_run("full"), out)
