"""A run that cannot be lost. KILLS=30 (`make soak`) kills that often in place of a few times."""

import contextlib
import io
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
from exports.command import wipe
from training import checkpoint, distributed, optim, step
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
    """train.py in the background, what it says in OUT.txt; with a number of `restarts` under torchrun."""
    words = (program, "--model", base, "--data", chats, "--out", out, *QUICK, *flags)
    with open(f"{out}.txt", "a") as said, open(os.devnull) as nothing:
        if restarts is None:
            return Program(words, (nothing, said, said), env, ranks)
        words = (
            sys.executable,
            *TORCHRUN,
            "--nproc_per_node",
            ranks,
            "--max-restarts",
            restarts,
            *words,
        )
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.Popen(
            [*map(str, words)], cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True
        )


def run(out, *given, code=0, **ways):
    """→ what it said"""
    before = len(said(out))
    process = start(out, *given, **ways)
    assert process.wait(timeout=600) == code, said(out)[-3000:]
    return said(out)[before:]


def said(out):
    path = Path(f"{out}.txt")
    return path.read_text() if path.exists() else ""


def until(condition, process=None, seconds=300):
    for _ in range(seconds * 50):
        if condition():
            return
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.02)
    raise AssertionError("it never came about")


def saved(out, at_least=1):
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
    """All that metrics.jsonl says but how long it took."""
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


def alike(one, other, exactly=True):
    """Two runs' losses and what they left."""
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
def undisturbed(base, chats, tmp_path_factory):
    """(kind, ranks) → the folder of a run that nothing happened to."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), {}

    def of(kind, ranks=1):
        if (kind, ranks) not in made:
            made[kind, ranks] = folder / f"{kind}-{ranks}"
            run(made[kind, ranks], base, chats, *KINDS[kind], ranks=ranks)
        return made[kind, ranks]

    return of


# --- going on


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_to_the_last_bit(kind, undisturbed, base, chats, tmp_path):
    """Stopped by SIGTERM in the middle; dropout, or rounding at random, would give away a lost random state."""
    out = tmp_path / "ckpt"
    process = start(out, base, chats, *KINDS[kind], "--save-every", 2)
    until(saved(out, 3), process)
    process.terminate()
    assert process.wait(timeout=240) == 128 + signal.SIGTERM
    assert (
        "SIGTERM: stopped after step" in said(out)
        and "saved in" in said(out)
        and "Traceback" not in said(out)
    )
    steps = sum("loss" in line for line in curve(out))
    assert saved(out, steps)() and steps < 12
    assert f"going on after step {steps}" in run(out, base, chats, *KINDS[kind], "--resume")
    alike(undisturbed(kind), out)
    assert json.loads((out / "run.json").read_text())["resumed"] == [steps]


def test_another_number_of_ranks_goes_on_with_the_same_run(undisturbed, base, chats, tmp_path):
    """Saved by one process, taken up by three, ended by two; no dropout, whose draws are each rank's own."""
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
            until(saved(out, steps), process)
            kill(process)
        run(out, base, chats, *flags, "--resume", ranks=2)
        alike(tmp_path / f"{kind}-alone", out, exactly=False)


def test_what_is_said_of_runs_that_have_begun(undisturbed, base, chats, tmp_path):
    out, flags = tmp_path / "ckpt", KINDS["lora"]
    process = start(out, base, chats, *flags)
    until(lambda: (out / "run.json").exists(), process)
    kill(process)
    assert "already holds something" in run(out, base, chats, *flags, code=2)
    process = start(out, base, chats, *flags, "--resume", "--save-every", 1)
    until(saved(out, 2), process)
    assert "nothing is saved in" in said(out)
    kill(process)
    for more, text in {
        (): "The same command and --resume".replace("The", "the"),
        ("--resume", "--lr", "1e-3"): "--lr is 0.001 now, and was 0.01",
        ("--resume", "--overwrite"): "Leave one of them out",
    }.items():
        heard = run(out, base, chats, *flags, *more, code=2)
        assert text in heard and "Traceback" not in heard
    other = shutil.copytree(chats, tmp_path / "other")
    (other / "train.jsonl").write_text(
        "".join((other / "train.jsonl").read_text().splitlines(keepends=True)[1:])
    )
    assert "isn't what the run" in run(out, base, other, *flags, "--resume", code=2)
    (out / "metrics.jsonl").write_text(
        (out / "metrics.jsonl").read_text() + '{"step": 3, "lo'
    )  # as a kill may leave it
    run(out, base, chats, *flags, "--resume", "--keep", 1)
    alike(undisturbed("lora"), out)
    assert len(checkpoint.list_checkpoints(out / "resume")) == 1
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "is finished" in run(out, base, chats, *flags, "--resume")
    assert "--lr is 0.5 now" in run(out, base, chats, *flags, "--resume", "--lr", 0.5, code=2)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "already holds something" in run(out, base, chats, *flags, code=2)


def test_a_start_that_torchrun_repeats_takes_no_other_run_for_its_own(
    base, chats, tmp_path, monkeypatch
):
    """The first try failed before it began: a mistyped --model, no room for the weights. What --out holds is of another run."""
    out, flags = tmp_path / "ckpt", (*KINDS["lora"], "--max-steps", 1)
    run(out, base, chats, *flags)
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert "already holds something" in run(out, base, chats, *flags, code=2, env=again)
    heard = run(out, base, chats, *flags, "--overwrite", env=again)
    assert "before training" in heard and "is finished" not in heard
    for count, launcher, again in (
        ("1", os.getppid(), True),
        ("1", os.getppid() + 1, False),
        ("0", os.getppid(), False),
    ):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        (out / "run.json").write_text(json.dumps({"launcher": launcher}))
        assert train.is_elastic_restart(out) is again


def test_saves_on_some_hosts_only_are_said_not_erased(tmp_path):
    options = train.Options(out=str(tmp_path), resume=True)
    other = SimpleNamespace(
        is_main=True, broadcast=lambda number: number, all_reduce_max=lambda number: max(number, 1)
    )  # it has one save
    with pytest.raises(UserError, match="holds saves on some hosts only"):
        train.last_checkpoint(options, other)


def test_a_save_is_tensors_and_json_of_which_some_stay(base, chats, tmp_path, monkeypatch):
    out = tmp_path / "ckpt"
    run(out, base, chats, *KINDS["full"], "--save-every", 3, ranks=2)
    kept = checkpoint.list_checkpoints(out / "resume")
    assert len(kept) == 2 and not [*out.rglob("*.new")]
    assert {path.name for path in kept[-1].iterdir()} == {
        f"rank-0000{r}.{kind}" for r in (0, 1) for kind in ("json", "safetensors")
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in (out / "resume").rglob("*"))
    names = load_file(kept[-1] / "rank-00000.safetensors").keys()
    assert {name for name in names if name.startswith("lm_head")} == {
        f"lm_head.weight{end}" for end in ("", ".exp_avg", ".exp_avg_sq")
    }
    notes = [json.loads(path.read_text()) for path in sorted(kept[-1].glob("*.json"))]
    for name, place in notes[0]["tensors"].items():
        assert place["first"] == 0 and notes[1]["tensors"][name]["first"] == place["rows"]
        assert place["rows"] + notes[1]["tensors"][name]["rows"] == place["shape"][0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    wipe(tmp_path, dry_run=False)  # which knows them, and all else of a run
    assert not out.exists()


def test_damaged_saves_are_named_with_the_way_out(base, chats, tmp_path):
    out = tmp_path / "ckpt"
    process = start(out, base, chats, *KINDS["lora"], "--save-every", 1)
    until(saved(out, 3), process)
    kill(process)
    before, last = checkpoint.list_checkpoints(out / "resume")[-2:]
    file = last / "rank-00000.safetensors"
    whole, metrics = file.read_bytes(), (out / "metrics.jsonl").read_bytes()
    file.write_bytes(whole[:-100])
    assert f"Delete {last}" in run(out, base, chats, *KINDS["lora"], "--resume", code=2)
    tensors = load_file(before / "rank-00000.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "lora_A" in name}, file)
    assert "not of one save" in run(out, base, chats, *KINDS["lora"], "--resume", code=2)
    assert (out / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(last)
    assert f"going on after step {checkpoint.step_of(before)}" in run(
        out, base, chats, *KINDS["lora"], "--resume"
    )


def keeper(folder, keep, done=0, every=1, minutes=10.0):
    model = torch.nn.Linear(3, 2)
    return checkpoint.CheckpointManager(
        folder,
        model,
        optim.make_optimizer(model, 0.1, 0.0),
        ALONE,
        done,
        keep,
        every,
        minutes,
        None,
    )


def test_a_save_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """A machine without power may keep a name and lose what it names."""
    done, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino) or fsync(handle)
    )
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append("named") or rename(path, to))
    keeper(tmp_path, 2).save(1, dict)
    names = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.rglob("*"))}
    assert [names.get(what, what) for what in done] == [
        "rank-00000.safetensors",
        "rank-00000.json",
        "named",
        tmp_path.name,
    ]


def test_a_save_that_is_half_dropped_has_no_name(tmp_path, monkeypatch):
    saves = keeper(tmp_path, 1)
    saves.save(1, dict)
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **_: next(path.iterdir()).unlink()
    )  # then it is killed
    saves.save(2, dict)
    assert [checkpoint.step_of(save) for save in checkpoint.list_checkpoints(tmp_path)] == [2]


def test_saves_of_steps_to_come_are_of_another_run_and_go(tmp_path):
    """Of one that --overwrite replaces, on hosts whose disks the first one doesn't see; or of a host that was a save ahead of the others."""
    for number in (3, 5, 9):
        (tmp_path / f"step-{number:08}").mkdir()
    saves = keeper(tmp_path, 2, done=5)
    assert [*map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))] == [3, 5]
    saves.save(9, dict)
    assert [*map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))] == [5, 9]
    keeper(tmp_path, 2)
    assert not checkpoint.list_checkpoints(tmp_path)


def test_a_save_that_was_gone_on_from_is_not_written_again_before_a_step_was_taken(tmp_path):
    """Compiling may take longer than --save-minutes."""
    keeper(tmp_path, 2).save(7, dict)
    saves = keeper(tmp_path, 2, done=7, every=None, minutes=0.0)
    assert saves.between(7, dict) is None and saves.writer is None
    assert saves.between(8, dict) is None
    saves.finish()
    assert [*map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))] == [7, 8]


# --- kills


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment_a_run_ends_as_if_nothing_had_been(
    ranks, undisturbed, base, chats, tmp_path
):
    """kill -9, of all processes or of one rank, at random moments of a run that saves after every step (half of its time is saving)."""
    chance, kills, number, hit = random.Random(ranks), 0, 0, 0
    while kills < (KILLS if ranks == 1 else max(1, KILLS // 2)):
        number += 1
        kind, out = chance.choice(["lora", "full"]), tmp_path / f"run-{number}"
        reference, again = undisturbed(kind, ranks), ()
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
                until(ended_or(process, saved(out, aim)))
            try:
                assert process.wait(chance.uniform(0, 0.3 if late else 5)) == 0, said(out)[-3000:]
                break
            except subprocess.TimeoutExpired:
                under = workers(process)
                kill(
                    process,
                    *(
                        [chance.choice(under)]
                        if ranks > 1 and under and chance.random() < 0.5
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
        alike(reference, out)
    print(f"{kills} kills in {number} runs of {ranks} processes, {hit} while a save was written")


def test_torchrun_starts_again_by_itself_after_a_rank_was_killed(
    undisturbed, base, chats, tmp_path
):
    out = tmp_path / "ckpt"
    process = start(
        out, base, chats, *KINDS["lora"], "--save-every", 1, "--overwrite", ranks=2, restarts=1
    )
    until(saved(out, 3), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(timeout=240) == 0, said(out)[-3000:]
    assert "going on after step" in said(out) and "rank 1 is gone, it was in step" in said(out)
    alike(undisturbed("lora", 2), out)


# --- ranks that die or hang

HANG = """
import os, sys, time
import config, step, train

add, calls = step.gradients, []

def slow(*given):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        time.sleep(1000)
    return add(*given)

step.gradients = slow
config.run(train.main)
"""


def test_a_rank_that_hangs_ends_the_job_in_time_and_is_named_with_its_place(base, chats, tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    out, began = tmp_path / "ckpt", time.time()
    heard = run(
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
        "rank 1 hasn't moved for 6 s, it is in step 3, " in heard
        and "step.py, line" in heard
        and checkpoint.RESUME_HINT in heard
    )
    assert (
        "rank 0 hasn't" not in heard and time.time() - began < 240
    )  # and not the 1,000 s that it hangs
    assert saved(out)()


def test_a_rank_that_is_gone_or_stopped_ends_the_job_and_is_named(base, chats, tmp_path):
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
        until(saved(out, 2), process)
        under = workers(process)
        os.kill(under[1], sign)
        assert process.wait(timeout=240) == 1  # not after the 400 steps, nor torch's own hour
        assert text in said(out) and checkpoint.RESUME_HINT in said(out)
        for pid in under:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


# --- no room, no numbers

FULL = """
import os
import torch
import config, model, train

forward = model.Transformer.forward

def small(self, tokens, *given, **named):
    if type(tokens) is not torch.Tensor:  # a prediction's
        return forward(self, tokens, *given, **named)
    if torch.is_grad_enabled():
        torch.rand(3)  # who tries again must draw the same
    if len(tokens) > 2 and torch.is_grad_enabled() and os.environ.get("RANK", "1") == "1":
        raise torch.OutOfMemoryError("no room")
    return forward(self, tokens, *given, **named)

model.Transformer.forward = small
config.run(train.main)
"""


def test_without_room_one_process_takes_fewer_rows_at_a_time_and_computes_the_same(
    base, chats, tmp_path
):
    (tmp_path / "full.py").write_text(FULL)
    flags = (*KINDS["lora"], "--max-steps", 4, "--micro-batch", 8)
    heard = run(tmp_path / "ckpt", base, chats, *flags, program=tmp_path / "full.py")
    assert (
        "no room for 8 rows at a time: 4 from here on" in heard
        and "no room for 4 rows at a time: 2 from here on" in heard
    )
    run(tmp_path / "two", base, chats, *flags, "--micro-batch", 2, program=tmp_path / "full.py")
    alike(tmp_path / "two", tmp_path / "ckpt")


def test_ranks_without_room_end_together_and_torchrun_starts_again_with_less(base, chats, tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    flags = (*KINDS["lora"], "--max-steps", 4)
    heard = run(
        tmp_path / "none", base, chats, *flags, ranks=2, program=tmp_path / "full.py", code=1
    )
    assert (
        "rank 1: the GPU has no room for 4 rows" in heard
        and "--micro-batch 2" in heard
        and "is gone" not in heard
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
    alike(tmp_path / "two", tmp_path / "again")


def test_the_probe_says_what_does_not_fit_and_leaves_no_trace(base, chats, tokenizer, monkeypatch):
    model = step.build_model(
        hf.with_vocab_size(hf.read_config(base), VOCAB + 2),
        ALONE,
        base,
        {"dropout": 0.5},
        torch.float32,
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
import config, step, train

add, calls = step.gradients, []

def poisoned(model, batches, *given):
    calls.extend([1] * (type(batches[0].tokens) is torch.Tensor))  # not a prediction's
    return add(model, batches, *given) * (float("nan") if len(calls) in {4, 6} else 1.0)

def timed(*given, probe=step.probe):
    probe(*given)
    calls.clear()  # a step's are counted

step.gradients, step.probe = poisoned, timed
config.run(train.main)
"""


def test_numbers_that_are_none_stop_the_run_saved_or_are_left_out(base, chats, tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    out = tmp_path / "ckpt"
    heard = run(out, base, chats, *KINDS["lora"], program=tmp_path / "bad.py", code=2)
    assert (
        "step 4: loss nan" in heard
        and "on lines [" in heard
        and "--skip-nonfinite" in heard
        and "Traceback" not in heard
    )
    assert saved(out, 3)() and not saved(out, 4)()
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


def test_a_second_ctrl_c_ends_at_once_and_the_first_saves(undisturbed, base, chats, tmp_path):
    out = tmp_path / "ckpt"
    process = start(out, base, chats, *KINDS["lora"], ranks=2, restarts=0)
    until(
        lambda: (
            '"loss"'
            in ((out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else "")
        ),
        process,
    )
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    process.wait(timeout=240)
    assert "Ctrl-C: stopped after step" in said(out) and saved(out)()
    run(out, base, chats, *KINDS["lora"], "--resume", ranks=2)
    alike(undisturbed("lora", 2), out)

    out = tmp_path / "other"
    process = start(out, base, chats, *KINDS["lora"], "--max-steps", 500)
    until(
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


def test_max_minutes_ends_before_the_time_is_over(base, chats, tmp_path):
    out, steps = tmp_path / "ckpt", []
    for more in ((), ("--resume",)):
        began = time.time()
        heard = run(
            out, base, chats, *KINDS["lora"], "--max-minutes", 0.1, "--max-steps", 9999, *more
        )
        assert "--max-minutes 0.1: stopped after step" in heard
        assert (
            time.time() - began < 240
        )  # six seconds, and Python's start and end on a busy machine; 9,999 steps take longer
        steps.append(curve(out)[-1]["step"])
        assert saved(out, steps[-1])()
    assert (
        0 < steps[0] <= steps[1]
    )  # on a busy machine six seconds may be over before the first step
    assert [line["step"] for line in curve(out) if "loss" in line] == [*range(1, steps[1] + 1)]


def test_a_run_that_ends_before_its_first_step_does_not_say_that_it_saved(base, chats, tmp_path):
    out = tmp_path / "ckpt"
    heard = run(out, base, chats, *KINDS["lora"], "--max-minutes", 0.0001, "--max-steps", 2)
    assert (
        "stopped before the first step" in heard
        and "saved in" not in heard
        and not [*out.glob("resume/step-*")]
    )
    assert "starts at the beginning" in run(
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
    words = (
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
            [*map(str, (*words, *QUICK, *flags))],
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


def test_a_disk_too_small_is_known_before_the_first_step(base, chats, tmp_path):
    done = on_a_small_disk(tmp_path / "ckpt", base, chats, "4m", "", *KINDS["full"], "--overwrite")
    assert (
        done.returncode == 2
        and "this run needs 0.0 GB there" in done.stderr
        and "--keep 1" in done.stderr
    )
    assert not (tmp_path / "ckpt.kept" / "resume").exists() and "Traceback" not in done.stderr


def test_a_disk_that_fills_up_during_a_save_leaves_the_save_before(
    undisturbed, base, chats, tmp_path
):
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
        and "Make room" in last[1]
        and "Traceback" not in done.stderr
    ), done.stderr
    out = tmp_path / "ckpt.kept"
    assert checkpoint.list_checkpoints(out / "resume") and not [*out.rglob("*.new")]
    run(out, base, chats, *KINDS["full"], "--resume")
    alike(undisturbed("full"), out)
