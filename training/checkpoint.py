"""Checkpoints to resume from: written by a thread, committed when every rank has written its part.

    ckpt/resume/step-00000120/rank-00003.safetensors  rank 3's rows of the trained parameters and
                                                      of the optimizer's state
                              rank-00003.json         where these rows belong; step, random state,
                                                      the run so far

A checkpoint is written as `step-….new` and renamed when it is complete. Any number of ranks can
read it.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import cli
from cli import UserError
from training import distributed, optim
from training.distributed import Distributed
from training.step import rng_state, set_rng_state
from weights import shards

DISK_BYTES_PER_S = 200e6  # assumed, until the first checkpoint is written
RESUME_HINT = "Continue with the same command and --resume."


def training_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint: trained parameters, and `parameter.state` for each.

    Call it before the first forward pass: after one, FSDP2 may show gathered parameters, which
    aren't those of the optimizer.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[name] = parameter
        for key, state in optim.saved_state(optimizer, parameter).items():
            tensors[f"{name}.{key}"] = state
    return tensors


# --- reading


class RankPart(NamedTuple):
    """What one rank wrote: its metadata, and its tensors in an open safetensors file."""

    metadata: dict
    file: Any


def list_checkpoints(folder: Path | str) -> list[Path]:
    """Return the complete checkpoints in a `resume/` folder, oldest first."""
    paths = Path(folder).glob("step-*")
    return sorted(path for path in paths if re.fullmatch(r"step-\d{8}", path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_checkpoint(checkpoint: Path) -> dict[int, RankPart]:
    """Open the parts of a checkpoint, by rank. UserError if one is damaged or misplaced."""
    parts = {}
    hint = f"Delete {checkpoint}: --resume then uses the checkpoint before it."
    for path in sorted(checkpoint.glob("rank-*.json")):
        tensors_path = path.with_suffix(".safetensors")
        file = cli.open_safetensors(tensors_path, hint)
        if (file.metadata() or {}).get("note") != digest_metadata(path.read_bytes()):
            raise UserError(
                f"{path} and .safetensors are damaged, or of two different checkpoints", hint
            )
        metadata = cli.read_json(path)
        rank, number = metadata["rank"], metadata["step"]
        if (f"step-{number:08}", f"rank-{rank:05}") != (checkpoint.name, path.stem):
            raise UserError(f"{path} is of rank {rank} at step {number}", hint)
        shapes = {}
        for name, place in metadata["tensors"].items():
            shapes[name] = (place["rows"], *place["shape"][1:])
        files = dict.fromkeys(file.keys(), file)
        cli.check_tensors(tensors_path, files, shapes, path.name, hint)
        parts[rank] = RankPart(metadata, file)
    if not parts:
        raise UserError(f"{checkpoint} is empty", hint)
    if len({part.metadata["world"] for part in parts.values()}) > 1:
        raise UserError(f"{checkpoint} holds parts of several checkpoints", hint)
    return parts


def digest_metadata(metadata: bytes) -> str:
    """Return the digest that binds a rank's tensors to its metadata."""
    return hashlib.blake2b(metadata, digest_size=16).hexdigest()


def own_metadata(parts: dict[int, RankPart], rank: int) -> dict:
    """Return what `rank` saved, or the first rank of this folder."""
    return parts.get(rank, next(iter(parts.values()))).metadata


def load_metadata(checkpoint: Path, rank: int) -> dict:
    return own_metadata(read_checkpoint(checkpoint), rank)


@torch.no_grad()
def restore(model, optimizer, checkpoint: Path, ranks: Distributed) -> None:
    """Load parameters, optimizer state and random state, saved by any number of ranks.

    UserError names a file that can't be read, or what is missing.
    """
    parts = read_checkpoint(checkpoint)
    for name, target in training_state(model, optimizer).items():
        load_rows(name, target, parts, checkpoint)
    metadata = own_metadata(parts, ranks.rank)
    optim.set_update_count(optimizer, metadata["updates"])
    if metadata["world"] == ranks.world:
        states = {}
        for name, text in metadata["random"].items():
            states[name] = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        set_rng_state(states)


def load_rows(name: str, target: torch.Tensor, parts: dict, checkpoint: Path) -> None:
    """Fill this rank's rows of a tensor from all parts that hold some of them."""
    local, first = shards.local_shard(target)
    filled = set()  # the first row of each stretch: every host has saved a copy of it
    missing = len(local)
    for metadata, file in parts.values():
        place = metadata["tensors"].get(name)
        if place is None or place["shape"] != list(target.shape):
            raise UserError(
                f"{checkpoint}: {name} is missing or has another shape",
                "Is --model the base that this run began with?",
            )
        begin = max(first, place["first"])
        end = min(first + len(local), place["first"] + place["rows"])
        if begin >= end or begin in filled:
            continue
        rows = file.get_slice(name)[begin - place["first"] : end - place["first"]]
        if rows.dtype != local.dtype:
            raise UserError(
                f"{checkpoint}: {name} is {rows.dtype}, this run has it in {local.dtype}",
                "Is --pure-bf16 as it was?",
            )
        local[begin - first : end - first] = rows.to(local.device)
        filled.add(begin)
        missing -= end - begin
    if missing:
        raise UserError(
            f"{checkpoint}: rows of {name} are missing",
            "Copy the resume/ folders of all hosts into one; or delete it: --resume then uses the "
            "checkpoint before it.",
        )


# --- writing


class CheckpointWriter(threading.Thread):
    """Copies this rank's part to CPU memory at once, then writes it while training goes on."""

    def __init__(self, folder: Path, tensors: dict, ranks: Distributed, metadata: dict):
        super().__init__(daemon=True)
        self.path = folder / f"rank-{ranks.rank:05}"
        self.error: Exception | None = None
        self.started = time.monotonic()
        self.tensors: dict[str, torch.Tensor] = {}
        places = {}
        for name, tensor in tensors.items():
            local, first = shards.local_shard(tensor)
            self.tensors[name] = local.to("cpu", copy=True).contiguous()
            places[name] = {"first": first, "rows": len(local), "shape": list(tensor.shape)}
        random = {}
        for name, state in rng_state(ranks.device).items():
            random[name] = base64.b64encode(state.numpy().tobytes()).decode()
        own = {"rank": ranks.rank, "world": ranks.world, "random": random, "tensors": places}
        self.metadata = metadata | own
        self.start()

    def run(self) -> None:
        try:
            cli.make_private_dir(self.path.parent)
            tensors_path = self.path.with_suffix(".safetensors")
            metadata_path = self.path.with_suffix(".json")
            text = json.dumps(self.metadata, ensure_ascii=False).encode()
            save_file(self.tensors, tensors_path, metadata={"note": digest_metadata(text)})
            metadata_path.write_bytes(text)
            fsync(tensors_path)
            fsync(metadata_path)
        except (OSError, SafetensorError) as error:
            self.error = error
        self.tensors = {}
        self.seconds = time.monotonic() - self.started


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointManager:
    """Writes, commits and prunes checkpoints, and says when the run must stop.

    Every rank calls `poll` before each step. No rank waits for a disk: the one collective in
    `poll` tells, some steps later, that all ranks have written, and only then the checkpoint gets
    its name. A signal may arrive at one rank or at all: the same collective tells the others.
    """

    def __init__(
        self,
        folder: Path,
        model,
        optimizer,
        ranks: Distributed,
        step: int = 0,
        keep: int = 2,
        save_every: int | None = None,
        save_minutes: float = 10.0,
        deadline: float | None = None,
    ):
        """`step`: where the run stands. `deadline`: of time.monotonic()."""
        self.folder, self.ranks = Path(folder), ranks
        self.optimizer, self.tensors = optimizer, training_state(model, optimizer)
        self.save_every, self.save_minutes = save_every, save_minutes
        self.keep, self.deadline = keep, deadline
        self.saved_step = step  # of the last checkpoint that is committed
        self.started_step = step  # of the last one that was begun, committed or not
        self.path: Path | None = None  # of the checkpoint that is being written
        self.writer: CheckpointWriter | None = None
        self.signal: int | None = None
        self.prune_next = False
        self.last_save = self.last_poll = time.monotonic()
        self.slowest_step = 0.0  # seconds
        local = [shards.local_shard(tensor)[0] for tensor in self.tensors.values()]
        own_bytes = torch.tensor(sum(part.nbytes for part in local), device=ranks.device)
        self.bytes = int(ranks.all_reduce(own_bytes))
        self.write_seconds = self.bytes / DISK_BYTES_PER_S
        self.drop_leftovers(step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Delete what a failed run was writing: it will never get its name."""
        if error is not None and self.writer:
            self.writer.join()
            shutil.rmtree(self.writer.path.parent, ignore_errors=True)

    def drop_leftovers(self, step: int) -> None:
        """Delete unfinished checkpoints, and those of later steps than the run stands at.

        The later ones are of a run that this one replaces, or of a host that was ahead.
        """
        if distributed.local_rank():
            return
        later = [path for path in list_checkpoints(self.folder) if step_of(path) > step]
        for path in (*self.folder.glob("*.new"), *later):
            shutil.rmtree(path, ignore_errors=True)  # hosts may share the disk

    def check_free_space(self, model_bytes: int) -> None:
        """UserError if the disk can't hold all checkpoints and the best model twice."""
        if distributed.local_rank():
            return
        out = self.folder.parent
        host_share = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / self.ranks.world
        copies = self.keep + 1 if self.keep else 0
        needed = self.bytes * host_share * copies + 2 * model_bytes
        old = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
        free = shutil.disk_usage(out).free + old
        if free < needed:
            raise UserError(
                f"{out} has too little space: this run needs {needed / 1e9:,.1f} GB ({self.keep} "
                f"checkpoints and one being written, {self.bytes / 1e9:,.1f} GB each, and the best "
                f"model), {free / 1e9:,.1f} GB are free",
                "Free some space, use --out on a larger disk, or keep fewer checkpoints: --keep 1 "
                "(0: none, then a run that stops early is lost).",
            )

    def install_handlers(self) -> None:
        """From now on SIGTERM and Ctrl-C stop the run after its step; a second Ctrl-C at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            print("\nstopped at once", file=sys.stderr, flush=True)
            os._exit(130)
        self.signal = number

    def poll(self, step: int, state: Callable[[], dict]) -> int | str | None:
        """Write, commit and prune checkpoints after `step`. Return why the run must stop now.

        That is a signal's number, "time", or None. `state`: the run so far, for the metadata.
        UserError if a rank couldn't write; earlier checkpoints stay as they are.
        """
        now = time.monotonic()
        self.slowest_step = max(self.slowest_step, now - self.last_poll)
        self.last_poll = now
        on_any_rank = self.any_rank(
            writing=self.writer is not None and self.writer.is_alive(),
            failed=self.writer is not None and self.writer.error is not None,
            save_due=self.is_save_due(step, now),
            time_over=self.is_time_over(now),
            sigint=self.signal == signal.SIGINT,
            sigterm=self.signal == signal.SIGTERM,
        )
        # A step after the commit all hosts have the new checkpoint: drop the oldest.
        if self.prune_next:
            self.prune()
        if self.writer and not on_any_rank["writing"]:
            self.commit(on_any_rank["failed"])

        stop: int | str | None = None
        if on_any_rank["sigterm"]:
            stop = signal.SIGTERM
        elif on_any_rank["sigint"]:
            stop = signal.SIGINT
        elif on_any_rank["time_over"]:
            stop = "time"
        if stop is not None:
            self.save(step, state)
        elif on_any_rank["save_due"] and not self.writer and self.keep:
            self.start_save(step, state)
        return stop

    def any_rank(self, **flags: bool) -> dict[str, bool]:
        """Return which of these flags are set on any rank."""
        counts = torch.tensor([int(flag) for flag in flags.values()], device=self.ranks.device)
        return dict(zip(flags, map(bool, self.ranks.all_reduce(counts).tolist())))

    def is_save_due(self, step: int, now: float) -> bool:
        if self.save_every:
            return step - self.started_step >= self.save_every
        if step == self.started_step:
            return False
        return now - self.last_save >= 60 * self.save_minutes

    def is_time_over(self, now: float) -> bool:
        """Whether one more step and a checkpoint may not fit before the deadline."""
        needed = 1.5 * (self.slowest_step + self.write_seconds)
        return self.deadline is not None and now + needed > self.deadline

    def save(self, step: int, state: Callable[[], dict]) -> None:
        """Write and commit a checkpoint of `step`, unless it is saved already."""
        self.finish()
        if step != self.saved_step and self.keep:
            self.start_save(step, state)
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, then commit it and prune."""
        if self.writer:
            self.writer.join()
            self.commit(self.any_rank(failed=self.writer.error is not None)["failed"])
        self.ranks.barrier()
        self.prune()

    def start_save(self, step: int, state: Callable[[], dict]) -> None:
        self.path = self.folder / f"step-{step:08}"
        self.started_step = step
        self.last_save = time.monotonic()
        metadata = {"step": step, "updates": optim.update_count(self.optimizer), **state()}
        self.writer = CheckpointWriter(unnamed(self.path), self.tensors, self.ranks, metadata)

    def commit(self, failed: bool) -> None:
        """Name the checkpoint that was written; UserError if a rank `failed` to write."""
        writer, path = self.writer, self.path
        assert writer and path
        self.writer = None
        if failed:
            if distributed.local_rank() == 0:
                shutil.rmtree(unnamed(path), ignore_errors=True)
            kept = "No checkpoint was written before."
            if self.saved_step:
                kept = f"The checkpoint of step {self.saved_step} is intact."
            raise cli.write_error(
                unnamed(path),
                writer.error or "another rank failed",
                f"{kept} Free some space. {RESUME_HINT}",
            )
        if distributed.local_rank() == 0:
            try:
                unnamed(path).rename(path)
                fsync(self.folder)
            except FileNotFoundError:
                if not path.is_dir():  # on a shared disk another host was first
                    raise
        self.saved_step = step_of(path)
        self.write_seconds = writer.seconds
        self.prune_next = True

    def prune(self) -> None:
        """Delete all checkpoints but the newest `keep`."""
        self.prune_next = False
        if distributed.local_rank() or not self.keep:
            return
        for path in list_checkpoints(self.folder)[: -self.keep]:
            # First take its name away, so that half a checkpoint never has one. On a shared disk
            # another host may have been first.
            with contextlib.suppress(OSError):
                path.rename(unnamed(path))
            shutil.rmtree(unnamed(path), ignore_errors=True)


def unnamed(path: Path) -> Path:
    """Return where a checkpoint is written, or deleted: under another name."""
    return path.with_name(path.name + ".new")
