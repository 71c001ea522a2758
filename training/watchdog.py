"""Stops a run when a rank is gone or hangs, and says which one and where."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

import cli
from training import checkpoint, distributed

ROOT = Path(__file__).parent.parent

# --- several ranks


class Watchdog(threading.Thread):
    """Ends a job of which a rank is gone, or hasn't moved for `timeout` seconds, and says which and where.

    Each rank tells every second, through torchrun's store: I live, so often have I moved (`Distributed.progress`), here I am. What a rank finds of
    the others it judges by its own clock. A rank without room for its micro-batch ends the others the same way.
    """

    def __init__(self, ranks, out, timeout):
        super().__init__(daemon=True)
        self.ranks, self.out, self.timeout, self.step, self.over = (
            ranks,
            Path(out),
            timeout,
            0,
            threading.Event(),
        )
        self.main = threading.main_thread().ident
        self.seen = {}  # rank → [its last sign, when that was new, when its moves were new]
        if ranks.world == 1:
            return
        self.store, self.beat = distributed.open_store("watch"), 0
        self.tell()
        if ranks.is_main:
            self.store.set("end", "null")
        ranks.barrier()  # all have told: nobody waits for a key
        self.heard = time.monotonic()
        self.start()
        threading.Thread(target=self.guard, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.ranks.world == 1:
            return
        if isinstance(
            error, RuntimeError
        ):  # a collective that failed, most likely: the watch says why, within seconds
            self.over.wait(5)
        self.over.set()

    def tell(self):
        self.beat += 1
        self.store.set(
            str(self.ranks.rank),
            json.dumps(
                [
                    self.beat,
                    self.ranks.progress[0],
                    distributed.host_index(),
                    os.getpid(),
                    self.where(),
                ]
            ),
        )

    def where(self):
        """The step and the line of our own code that the main thread is in, and whether it waits there for other ranks."""
        frame, waits, here = sys._current_frames().get(self.main), False, ""
        while frame and not here:
            file = Path(frame.f_code.co_filename)
            waits |= "distributed" in file.parts
            if file.is_relative_to(ROOT) and ".venv" not in file.parts:
                here = f"{file.name}, line {frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return f"step {self.step}, {here}{', waiting for others' if waits else ''}"

    def run(self):
        try:
            while not self.over.wait(1.0):
                self.tell()
                end, *signs = map(
                    json.loads, self.store.multi_get(["end", *map(str, range(self.ranks.world))])
                )
                self.heard = time.monotonic()
                if end:
                    self.end(*end)
                self.look(signs)
        except (RuntimeError, dist.DistError):
            if not self.over.wait(2):
                self.cut_off("is gone")

    def guard(self):
        """A store behind a line that is down answers nothing, and its calls never return."""
        while not self.over.wait(1.0):
            if time.monotonic() - self.heard > self.timeout:
                self.cut_off(f"gave no answer for {self.timeout:g} s")

    def cut_off(self, what):
        self.end(
            f"rank {self.ranks.rank}: the first rank, or its host, {what}",
            checkpoint.RESUME_HINT,
            None,
            [],
            self.ranks.rank - distributed.local_rank(),
        )

    def look(self, signs):
        now, here = time.monotonic(), distributed.host_index()
        for rank, sign in enumerate(signs):
            known = self.seen.setdefault(rank, [sign, now, now])
            if known[0][0] != sign[0]:
                known[1] = now
            if known[0][1] != sign[1]:
                known[2] = now
            known[0] = sign
        gone = [
            rank for rank, sign in enumerate(signs) if sign[2] == here and not is_alive(sign[3])
        ]
        silent = [rank for rank, (_, beat, _) in self.seen.items() if now - beat > self.timeout]
        still = [rank for rank, (_, _, moved) in self.seen.items() if now - moved > self.timeout]
        if gone:
            self.blame(gone, "is gone, it was in", signs)
        elif silent:
            self.blame(silent, f"gave no sign for {self.timeout:g} s, it was in", signs)
        elif len(still) == len(signs):  # all wait for those that have done the least
            fewest = min(sign[1] for sign in signs)
            late = [rank for rank in still if signs[rank][1] == fewest]
            late = [rank for rank in late if "waiting" not in signs[rank][4]] or late
            self.blame(late, f"hasn't moved for {self.timeout:g} s, it is in", signs)

    def blame(self, guilty, what, signs):
        if self.over.wait(0.2):  # the end of a run looks the same
            return
        text = "; ".join(f"rank {rank} {what} {signs[rank][4]}" for rank in guilty)
        pids = [
            signs[rank][3]
            for rank in guilty
            if signs[rank][2] == distributed.host_index() and rank != self.ranks.rank
        ]
        speaker = min({*range(self.ranks.world)} - {*guilty}, default=0)
        self.end(text, checkpoint.RESUME_HINT, None, pids, speaker)

    def no_room(self, size, length):
        """This rank has no room for `size` rows of `length` tokens: end all ranks, and leave word of what to try. Never returns."""
        less = max(1, size // 2)
        problem = f"rank {self.ranks.rank}: the GPU has no room for {size} rows of {length} tokens"
        way_out = f"Take fewer at a time: --micro-batch {less} (the result is the same). torchrun --max-restarts does so by itself."
        if size == 1:
            way_out = "Take --recompute full, --qlora, more GPUs, or a shorter --seq-len."
        self.store.set("end", json.dumps([problem, way_out, less if size > 1 else None, []]))
        self.over.wait()

    def end(self, problem, way_out, micro_batch, pids, speaker=0):
        if micro_batch and self.ranks.is_main:
            cli.make_private_dir(self.out)
            cli.write_json(self.out / "micro-batch.json", {"micro_batch": micro_batch})
        if self.ranks.rank == speaker:
            print(f"\n{problem}\n{way_out}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # the first to end takes the others with it: let it be who speaks
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
