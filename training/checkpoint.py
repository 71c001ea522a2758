"""A run that cannot be lost: saves written by a thread, signals that end a run saved, and a watch over the ranks.

    ckpt/resume/step-00000120/rank-00003.safetensors    rank 3's rows of what is trained, and of AdamW's moments of it
                              rank-00003.json           where they lie in the whole; step, random state, the run so far

A save is written beside (`step-….new`) and renamed when every rank has written: what has its name is whole. Any number of ranks reads it.
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
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import cli
from cli import UserError
from training import distributed, optim, step
from weights import shards

DISK_BYTES_PER_S = (
    200e6  # bytes a second that a disk is trusted to write before it has shown its speed
)
RESUME_HINT = "Go on with the same command and --resume."


# --- what a run is made of


def training_state(model, optimizer):
    """{name: tensor} of all that training changes but the number of updates. To be asked before the first forward pass: after one,

    FSDP2 may show gathered parameters, which are others than the optimizer's.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found |= {name: parameter} | {
                f"{name}.{key}": optimizer.state[parameter][key] for key in optim.ADAM_STATE
            }
    return found


def count_updates(optimizer):
    return int(next(iter(optimizer.state.values()))["step"])


def list_checkpoints(folder):
    """The whole saves in a `resume/` folder, oldest first."""
    return sorted(
        path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)
    )


def step_of(save):
    return int(save.name.removeprefix("step-"))


def read_checkpoint(save):
    """{rank: (what it noted, its open tensors)} of all that are there in a save. UserError when one isn't as it was written."""
    parts, way_out = {}, f"Delete {save}: --resume then takes the save before."
    for path in sorted(save.glob("rank-*.json")):
        file = cli.open_safetensors(path.with_suffix(".safetensors"), way_out)
        if (file.metadata() or {}).get("note") != digest_metadata(path.read_bytes()):
            raise UserError(f"{path} and .safetensors are damaged, or not of one save", way_out)
        note = cli.read_json(path)
        if (f"step-{note['step']:08}", f"rank-{note['rank']:05}") != (save.name, path.stem):
            raise UserError(f"{path} is of rank {note['rank']} at step {note['step']}", way_out)
        shapes = {
            name: (place["rows"], *place["shape"][1:]) for name, place in note["tensors"].items()
        }
        cli.check_tensors(
            path.with_suffix(".safetensors"),
            dict.fromkeys(file.keys(), file),
            shapes,
            path.name,
            way_out,
        )
        parts[note["rank"]] = note, file
    if len({note["world"] for note, _ in parts.values()}) != 1:
        raise UserError(f"{save} holds {'parts of several saves' if parts else 'nothing'}", way_out)
    return parts


def digest_metadata(note):
    """What binds a rank's tensors to its note: each without the other, or changed, is worth nothing."""
    return hashlib.blake2b(note, digest_size=16).hexdigest()


def load_metadata(save, rank):
    """What `rank` noted in a save, or the first rank that is there."""
    parts = read_checkpoint(save)
    return parts.get(rank, next(iter(parts.values())))[0]


@torch.no_grad()
def restore(model, optimizer, save, ranks):
    """Fill what is trained, its moments and the random state from a save, whatever number of ranks wrote it.

    UserError names a file that can't be read, or what is missing.
    """
    parts = read_checkpoint(save)
    for name, target in training_state(model, optimizer).items():
        local, first = shards.local_shard(target)
        filled, known = 0, set()
        for note, file in parts.values():
            said = note["tensors"].get(name)
            if said is None or said["shape"] != list(target.shape):
                raise UserError(
                    f"{save}: {name} is missing or of another shape",
                    "Is --model the base that this run began with?",
                )
            begin, end = (
                max(first, said["first"]),
                min(first + len(local), said["first"] + said["rows"]),
            )
            if begin < end and begin not in known:  # each host has saved its copy
                rows = file.get_slice(name)[begin - said["first"] : end - said["first"]]
                if rows.dtype != local.dtype:
                    raise UserError(
                        f"{save}: {name} is of {rows.dtype}, this run keeps it in {local.dtype}",
                        "Is --pure-bf16 as it was?",
                    )
                local[begin - first : end - first] = rows.to(local.device)
                filled, known = filled + end - begin, known | {begin}
        if filled != len(local):
            raise UserError(
                f"{save}: rows of {name} are missing",
                "Bring the resume/ folders of all its machines together; or delete it: --resume then takes the save before.",
            )
    own = parts.get(ranks.rank, next(iter(parts.values())))[0]
    for moments in optimizer.state.values():
        moments["step"].fill_(own["updates"])
    if own["world"] == ranks.world:
        states = {
            name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
            for name, text in own["random"].items()
        }
        step.set_random_state(states)


# --- saving


class CheckpointWriter(threading.Thread):
    """Copies this rank's part at once, then writes it beside, to the disk itself, while training goes on."""

    def __init__(self, folder, tensors, ranks, note):
        super().__init__(daemon=True)
        self.path, self.error, self.began = folder / f"rank-{ranks.rank:05}", None, time.monotonic()
        shards = {name: (tensor, *shards.local_shard(tensor)) for name, tensor in tensors.items()}
        self.tensors = {
            name: local.to("cpu", copy=True).contiguous() for name, (_, local, _) in shards.items()
        }
        places = {
            name: {"first": first, "rows": len(local), "shape": list(tensor.shape)}
            for name, (tensor, local, first) in shards.items()
        }
        random = {
            name: base64.b64encode(value.numpy().tobytes()).decode()
            for name, value in step.random_state(ranks.device).items()
        }
        own = {"rank": ranks.rank, "world": ranks.world, "random": random}
        self.note = {**note, **own, "tensors": places}
        self.start()

    def run(self):
        try:
            cli.make_private_dir(self.path.parent)
            file, note = self.path.with_suffix(".safetensors"), self.path.with_suffix(".json")
            text = json.dumps(self.note, ensure_ascii=False).encode()
            save_file(self.tensors, file, metadata={"note": digest_metadata(text)})
            note.write_bytes(text)
            fsync(file)
            fsync(note)
        except (OSError, SafetensorError) as error:
            self.error = error
        self.tensors = None
        self.took = time.monotonic() - self.began


def fsync(path):
    """Wait until a file, or the names in a folder, would survive the machine's end."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointManager:
    """Saves a run and says when it must end: `between` is called by every rank before each step.

    No rank waits for a disk: the one collective of `between` says, a step later, that all have written, and only then is the save's name
    made. Signals arrive at one rank or all; the same collective tells the others.
    """

    def __init__(self, folder, model, optimizer, ranks, done, keep, every, minutes, limit):
        """`keep` saves in `folder`, one each `every` steps or `minutes`; end before `limit` (of time.monotonic()). The run stands at step
        `done`: saves of later ones are of a run that it replaces, or of a host that was ahead of the others, and go.
        """
        self.folder, self.state, self.optimizer, self.ranks = (
            Path(folder),
            training_state(model, optimizer),
            optimizer,
            ranks,
        )
        self.keep, self.every, self.minutes, self.limit = keep, every, minutes, limit
        self.writer = self.at = self.signal = None
        self.done = done  # the last step that is saved
        self.fresh = False  # a save got its name in this step: the oldest goes in the next, when all hosts' have theirs
        self.saved = self.last = time.monotonic()
        self.slowest = 0.0  # seconds between two calls
        own = sum(shards.local_shard(tensor)[0].nbytes for tensor in self.state.values())
        self.bytes = int(ranks.all_reduce(torch.tensor(own, device=ranks.device)))
        self.save_seconds = self.bytes / DISK_BYTES_PER_S
        if distributed.local_rank() == 0:
            for old in [
                *self.folder.glob("*.new"),
                *(save for save in list_checkpoints(folder) if step_of(save) > done),
            ]:
                shutil.rmtree(
                    old, ignore_errors=True
                )  # on a disk that hosts share, another one does so too

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """What a run that fails was writing has no name and never will: away with it."""
        if error is not None and self.writer:
            self.writer.join()
            shutil.rmtree(self.writer.path.parent, ignore_errors=True)

    def check_room(self, best):
        """UserError when the disk has no room for all saves and two copies of `best` bytes, old and new."""
        if distributed.local_rank():
            return
        out = self.folder.parent
        per_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / self.ranks.world
        need = self.bytes * per_host * (self.keep + 1 if self.keep else 0) + 2 * best
        has = shutil.disk_usage(out).free + sum(
            path.stat().st_size for path in out.rglob("*.safetensors")
        )
        if has < need:
            raise UserError(
                f"{out}: this run needs {need / 1e9:,.1f} GB there ({self.keep} saves and one being written, {self.bytes / 1e9:,.1f} GB "
                f"each, and the best model), {has / 1e9:,.1f} GB are free",
                "Make room, name a larger disk with --out, or keep fewer: --keep 1 (0: none, then a run that ends early is lost).",
            )

    def listen(self):
        """From now on SIGTERM and Ctrl-C end the run when its step is done; a second Ctrl-C ends it at once."""
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self.hear)

    def hear(self, number, _):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            print("\nstopped at once", file=sys.stderr, flush=True)
            os._exit(130)
        self.signal = number

    def between(self, done, note):
        """After step `done`, of which `note()` tells all but the tensors: write, name and drop saves. → why the run must end now:

        a signal's number, "time", or None. UserError when some rank couldn't write: the saves before are as they were.
        """
        now = time.monotonic()
        self.slowest, self.last = max(self.slowest, now - self.last), now
        first = self.ranks.is_main
        due = (
            first
            and done != self.done
            and (
                done - self.done >= self.every
                if self.every
                else now - self.saved >= 60 * self.minutes
            )
        )
        late = (
            first
            and self.limit is not None
            and now + 1.5 * self.slowest + 1.5 * self.save_seconds > self.limit
        )
        heard = [self.signal == signal.SIGTERM, self.signal == signal.SIGINT]
        writing, failed, due, late, *heard = self.agree(
            self.writing, self.failed, due, late, *heard
        )
        if self.fresh:
            self.drop()
        if self.writer and not writing:
            self.name(failed)
        ends = (
            signal.SIGTERM if heard[0] else signal.SIGINT if heard[1] else "time" if late else None
        )
        if ends is not None:
            self.save(done, note)
        elif due and not self.writer and self.keep:
            self.begin(done, note)
        return ends

    def save(self, done, note):
        """Save step `done` and wait for it."""
        self.finish()
        if done != self.done and self.keep:
            self.begin(done, note)
            self.finish()

    def finish(self):
        """Wait for the save that is being written; afterwards `keep` of them are there."""
        if self.writer:
            self.writer.join()
            self.name(self.agree(self.failed)[0])
        self.ranks.barrier()
        self.drop()

    @property
    def writing(self):
        return self.writer is not None and self.writer.is_alive()

    @property
    def failed(self):
        return self.writer is not None and self.writer.error is not None

    def agree(self, *signs):
        return self.ranks.all_reduce(
            torch.tensor([int(sign) for sign in signs], device=self.ranks.device)
        ).tolist()

    def begin(self, done, note):
        self.at, self.saved = self.folder / f"step-{done:08}", time.monotonic()
        told = {"step": done, "updates": count_updates(self.optimizer), **note()}
        self.writer = CheckpointWriter(
            self.at.with_name(self.at.name + ".new"), self.state, self.ranks, told
        )

    def name(self, failed):
        """The save that was written gets its name, or is dropped when a rank `failed`."""
        new, writer, self.writer = self.at.with_name(self.at.name + ".new"), self.writer, None
        if failed:
            if distributed.local_rank() == 0:
                shutil.rmtree(new, ignore_errors=True)
            last = (
                f"The save of step {self.done} is as it was"
                if self.done
                else "Nothing was saved before"
            )
            raise cli.write_error(
                new, writer.error or "another rank failed", f"{last}. Make room. {RESUME_HINT}"
            )
        if distributed.local_rank() == 0:
            try:
                new.rename(self.at)
                fsync(self.folder)
            except FileNotFoundError:
                if not self.at.is_dir():  # on a disk that hosts share another one was first
                    raise
        self.done, self.save_seconds, self.fresh = step_of(self.at), writer.took, True

    def drop(self):
        self.fresh = False
        if distributed.local_rank() == 0 and self.keep:
            for old in list_checkpoints(self.folder)[: -self.keep]:
                half = old.with_name(
                    old.name + ".new"
                )  # first the name: half a save must have none
                with contextlib.suppress(
                    OSError
                ):  # on a disk that hosts share, another one was first
                    old.rename(half)
                shutil.rmtree(half, ignore_errors=True)
