"""What only a CUDA card can show, in two calls of eight minutes: each figure beside the one wanted.

    bench/gpu.sh                    the first call
    bench/gpu.sh 2                  the second one
    bench/gpu.sh halving profile    these stages alone
    bench/gpu.sh --dry-run          the first call with a tiny model on the CPU

Each stage is a process of its own with a time limit. When one fails or hangs, its last lines are
printed and the next one runs; one for which no time is left is skipped. Nothing is downloaded: the
7B has random weights. It takes 14.5 GB in build/gpu, where the second call finds it. The last line
is JSON. The exit code is 1 if a stage failed; a goal that isn't met is only reported.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cli
from bench import gpu_stages
from bench.gpu_stages import Setup, training_speed
from bench.step import ROOT
from cli import UserError

SECONDS = 480  # of a call


@dataclasses.dataclass(frozen=True)
class Stage:
    """`run` prints lines and returns figures; with a "failed" among them the stage has failed.

    `call`: 1 or 2. `seconds`: expected on an H200; estimated, not measured.
    """

    run: Callable[[Setup], dict]
    call: int
    seconds: int
    needs_base: bool = False
    expandable: bool = True  # the allocator's expandable_segments


STAGES = {
    "versions": Stage(gpu_stages.versions, 1, 25),
    "attention": Stage(gpu_stages.attention, 1, 15),
    "numerics": Stage(gpu_stages.numerics, 1, 60),
    "documents": Stage(gpu_stages.documents, 1, 50),
    "base": Stage(gpu_stages.write_base, 1, 35),
    "capped": Stage(gpu_stages.capped, 1, 95, needs_base=True),
    "capped-fixed": Stage(gpu_stages.capped, 1, 75, needs_base=True, expandable=False),
    "halving": Stage(gpu_stages.halving, 1, 100, needs_base=True),
    "decode": Stage(gpu_stages.decode, 2, 70, needs_base=True),
    "one-rank": Stage(gpu_stages.one_rank, 2, 45),
    "lora": Stage(functools.partial(training_speed, "lora"), 2, 130, needs_base=True),
    "profile": Stage(gpu_stages.profile, 2, 45, needs_base=True),
    "full": Stage(functools.partial(training_speed, "full"), 2, 110, needs_base=True),
    "tests": Stage(gpu_stages.cuda_tests, 2, 75),
    "qlora": Stage(functools.partial(training_speed, "qlora"), 2, 60, needs_base=True),
    "pure": Stage(functools.partial(training_speed, "pure"), 2, 60, needs_base=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stages", nargs="*", default=["1"], help=f"1, 2, or some of: {', '.join(STAGES)}")
    add("--dry-run", action="store_true", help="a tiny model on the CPU")
    add("--seconds", type=float, default=SECONDS, help="of the call (default: %(default)s)")
    add("--scratch", help=argparse.SUPPRESS)
    add("--figures", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figures:
        setup = Setup(Path(options.scratch), options.dry_run)
        cli.write_json(Path(options.figures), run_here(options.stages[0], setup))
        return
    if not options.dry_run and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA GPU here", "bench/gpu.sh --dry-run shows that the script runs."
        )
    names = choose_stages(options.stages)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            results = run_stages(names, Setup(Path(scratch), dry=True), options.seconds)
    else:
        results = run_stages(names, Setup(ROOT / "build" / "gpu"), options.seconds)
    print(json.dumps(rounded(results)))
    if any("failed" in figures for figures in results.values()):
        sys.exit(1)


def rounded(figures: dict) -> dict:
    """Return the figures with four digits each."""
    return json.loads(json.dumps(figures), parse_float=lambda text: float(f"{float(text):.4g}"))


def choose_stages(chosen: list[str]) -> list[str]:
    """Return the stages of a call, or those named. UserError for a name that isn't known."""
    names: list[str] = []
    for name_or_call in chosen:
        found = [name for name, stage in STAGES.items() if name_or_call in (name, str(stage.call))]
        if not found:
            raise UserError(f"there is no stage {name_or_call}", f"There are: {', '.join(STAGES)}.")
        names += found
    return names


def run_stages(names: list[str], setup: Setup, allowed: float) -> dict[str, dict]:
    """Run the stages one after another, in at most `allowed` seconds. Return their figures."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s  {text}", flush=True)

    if setup.dry:
        say("a dry run with a tiny model on the CPU: the figures mean nothing")
    names = with_base(names, setup)
    results = {}
    with tempfile.TemporaryDirectory() as logs:
        for name in names:
            stage = STAGES[name]
            # A dry run goes through all of them, however slow the machine is.
            left = math.inf if setup.dry else allowed - (time.monotonic() - started)
            if left < stage.seconds:
                reason = f"it takes about {stage.seconds} s, {left:.0f} are left"
            elif stage.needs_base and not setup.has_base:
                reason = "there is no base"
            else:
                say(f"--- {name}")
                results[name] = run_stage(name, setup, min(left, time_limit(stage)), logs, say)
                continue
            say(f"--- {name} is skipped: {reason}")
            results[name] = {"skipped": reason}
    say("in all")
    return results


def with_base(names: list[str], setup: Setup) -> list[str]:
    """Put the stage that writes the base before the first that needs it, if there is none yet."""
    first = next((i for i, name in enumerate(names) if STAGES[name].needs_base), len(names))
    if first == len(names) or setup.has_base or "base" in names[:first]:
        return names
    return [*names[:first], "base", *names[first:]]


def time_limit(stage: Stage) -> float:
    """Return the seconds after which a stage counts as hung."""
    return 60 + 2 * stage.seconds


def run_stage(name: str, setup: Setup, limit: float, logs: str, say: Callable) -> dict:
    """Run a stage in a process group of its own, and end it after `limit` seconds."""
    started = time.monotonic()
    figures, errors = (Path(logs) / f"{name}.{suffix}" for suffix in ("json", "txt"))
    command = [sys.executable, "-m", "bench.gpu", name, "--scratch", setup.scratch]
    command += ["--figures", figures, *(["--dry-run"] if setup.dry else [])]
    allocator = f"expandable_segments:{STAGES[name].expandable}"
    env = os.environ | {"PYTORCH_ALLOC_CONF": allocator, "PYTHONUNBUFFERED": "1"}
    options = {"cwd": ROOT, "env": env, "start_new_session": True, "errors": "replace"}
    with (
        open(errors, "w", encoding="utf-8") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, **options) as process,
    ):
        timer = threading.Timer(limit, end_group, [process.pid])
        timer.start()
        try:
            for line in process.stdout:
                say(line.rstrip())
            process.wait()
        finally:
            timer.cancel()
            end_group(process.pid)  # also what it has left running
    result = cli.read_json(figures, {})
    took = time.monotonic() - started
    if process.returncode:
        result["failed"] = f"exit code {process.returncode}"
        if took >= limit:
            result["failed"] = f"not done after {limit:.0f} s"
    if "failed" in result:
        say(f"{name} FAILED: {result['failed']}\n{last_lines(errors)}")
    return result | {"seconds": round(took, 1)}


def last_lines(path: Path, count: int = 15) -> str:
    """Return the end of what a stage wrote to stderr, of a progress bar its last state."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return "\n".join(line.rpartition("\r")[2] for line in lines[-count:])


def end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run_here(name: str, setup: Setup) -> dict:
    """Run a stage in this process."""
    if setup.dry:  # without Inductor, which a C++ compiler would keep waiting for minutes
        torch.compile = functools.partial(torch.compile, backend="eager")
    return STAGES[name].run(setup)


if __name__ == "__main__":
    cli.run(main)
