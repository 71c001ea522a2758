"""Stops a run of several ranks when one is gone or hangs, and says which one and where."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

import cli
from training import checkpoint, distributed
from training.distributed import Distributed

ROOT = Path(__file__).parent.parent
INTERVAL = 1.0  # seconds between two heartbeats


class Heartbeat(NamedTuple):
    """What a rank tells of itself. `number` and `progress` (`Distributed.progress`) only grow."""

    number: int
    progress: int
    host: int
    pid: int
    place: str


class Seen(NamedTuple):
    """A rank's last heartbeat, and when its count and its progress last changed, by our clock."""

    heartbeat: Heartbeat
    beat_at: float
    progress_at: float


class Watchdog(threading.Thread):
    """Ends the job when a rank is gone, or makes no progress for `timeout` seconds.

    Every second each rank writes a heartbeat to torchrun's store and reads those of the others.
    A rank whose micro-batch doesn't fit ends the others the same way.
    """

    def __init__(self, ranks: Distributed, out: str, timeout: float):
        super().__init__(daemon=True)
        self.ranks, self.timeout = ranks, timeout
        self.out = Path(out)
        self.step = 0  # where training is, for messages
        self.over = threading.Event()
        self.main_thread = threading.main_thread().ident or 0
        self.seen: dict[int, Seen] = {}
        self.count = 0
        if ranks.world == 1:
            return
        self.store = distributed.open_store("watch")
        self.heartbeat()
        if ranks.is_main:
            self.store.set("end", "null")
        ranks.barrier()  # every key is set now: no reader waits for one
        self.answered_at = time.monotonic()
        self.start()
        threading.Thread(target=self.check_store, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.ranks.world == 1:
            return
        # Most likely a failed collective: within seconds the watchdog says why.
        if isinstance(error, RuntimeError):
            self.over.wait(5)
        self.over.set()

    def run(self) -> None:
        keys = ["end", *map(str, range(self.ranks.world))]
        try:
            while not self.over.wait(INTERVAL):
                self.heartbeat()
                end, *beats = map(json.loads, self.store.multi_get(keys))
                self.answered_at = time.monotonic()
                if end:
                    self.end(**end)
                self.check_ranks([Heartbeat(*beat) for beat in beats])
        except (RuntimeError, dist.DistError):
            if not self.over.wait(2):
                self.on_store_lost("is gone")

    def heartbeat(self) -> None:
        self.count += 1
        host = distributed.host_index()
        beat = Heartbeat(self.count, self.ranks.progress[0], host, os.getpid(), self.place())
        self.store.set(str(self.ranks.rank), json.dumps(beat))

    def place(self) -> str:
        """Return the step and the line of our code that the main thread is in.

        Also whether it waits there for other ranks.
        """
        # Private, but the only way to another thread's frame without a tracing hook.
        frame = sys._current_frames().get(self.main_thread)
        waits = False
        while frame:
            file = Path(frame.f_code.co_filename)
            waits |= "distributed" in file.parts
            if file.is_relative_to(ROOT) and ".venv" not in file.parts:
                break
            frame = frame.f_back
        line = ""
        if frame:
            line = f"{file.name}, line {frame.f_lineno} ({frame.f_code.co_name})"
        return f"step {self.step}, {line}{', waiting for others' if waits else ''}"

    def check_store(self) -> None:
        """Notice a store behind a broken network: its calls never return."""
        while not self.over.wait(INTERVAL):
            if time.monotonic() - self.answered_at > self.timeout:
                self.on_store_lost(f"gave no answer for {self.timeout:g} s")

    def on_store_lost(self, what: str) -> None:
        self.end(
            f"rank {self.ranks.rank}: the first rank, or its host, {what}",
            checkpoint.RESUME_HINT,
            speaker=self.ranks.rank - distributed.local_rank(),
        )

    def check_ranks(self, beats: list[Heartbeat]) -> None:
        """End the job if a rank is gone, silent, or the cause that none makes progress."""
        now, host = time.monotonic(), distributed.host_index()
        for rank, beat in enumerate(beats):
            last, beat_at, progress_at = self.seen.get(rank, Seen(beat, now, now))
            if beat.number != last.number:
                beat_at = now
            if beat.progress != last.progress:
                progress_at = now
            self.seen[rank] = Seen(beat, beat_at, progress_at)

        gone = [r for r, beat in enumerate(beats) if beat.host == host and not is_alive(beat.pid)]
        silent = [r for r, seen in self.seen.items() if now - seen.beat_at > self.timeout]
        stuck = [r for r, seen in self.seen.items() if now - seen.progress_at > self.timeout]
        if gone:
            self.report(gone, "is gone, it was in")
        elif silent:
            self.report(silent, f"gave no sign for {self.timeout:g} s, it was in")
        elif len(stuck) == len(beats):
            # All wait for those that have done the least; if some of them wait too, for the rest.
            least = min(beat.progress for beat in beats)
            late = [rank for rank in stuck if beats[rank].progress == least]
            late = [rank for rank in late if "waiting" not in beats[rank].place] or late
            self.report(late, f"hasn't moved for {self.timeout:g} s, it is in")

    def report(self, guilty: list[int], what: str) -> None:
        """Name the guilty ranks, kill those of this host, and end this rank."""
        if self.over.wait(0.2):  # the end of a run looks the same
            return
        beats = {rank: self.seen[rank].heartbeat for rank in guilty}
        host = distributed.host_index()
        self.end(
            "; ".join(f"rank {rank} {what} {beat.place}" for rank, beat in beats.items()),
            checkpoint.RESUME_HINT,
            pids=[b.pid for r, b in beats.items() if b.host == host and r != self.ranks.rank],
            speaker=min({*range(self.ranks.world)} - {*guilty}, default=0),
        )

    def out_of_memory(self, size: int, length: int) -> None:
        """End all ranks: this one can't fit `size` rows of `length` tokens. Never returns."""
        what = f"{size} rows of {length} tokens don't fit in memory"
        hint = "Try --activation-checkpointing full, --qlora, more GPUs, or a shorter --seq-len."
        smaller = size // 2 or None
        if smaller:
            hint = (
                f"Use a smaller micro-batch: --micro-batch {smaller} (the result is the same). "
                "torchrun --max-restarts does so by itself."
            )
        end = {"problem": f"rank {self.ranks.rank}: {what}", "hint": hint, "micro_batch": smaller}
        self.store.set("end", json.dumps(end))
        self.over.wait()

    def end(
        self,
        problem: str,
        hint: str,
        micro_batch: int | None = None,
        pids: Iterable[int] = (),
        speaker: int = 0,
    ) -> None:
        """End this process. Rank `speaker` prints why; `micro_batch` is for the next start."""
        if micro_batch and self.ranks.is_main:
            cli.make_private_dir(self.out)
            cli.write_json(self.out / "micro-batch.json", {"micro_batch": micro_batch})
        if self.ranks.rank == speaker:
            print(f"\n{problem}\n{hint}", file=sys.stderr, flush=True)
        else:
            time.sleep(
                1
            )  # the first rank to end takes the others with it: let the speaker be first
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
