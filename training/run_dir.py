"""The folder of a run: `metrics.jsonl`, the best weights, `run.json`, `loss.png`."""

import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import cli
import data
import lora
from cli import UserError
from training import checkpoint, metrics
from weights import hf, shards
from weights.save import save_model

PACKAGES = ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy")


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


# --- what stays


@dataclasses.dataclass(frozen=True)
class EvalPoint:
    """An evaluation: nats a target and bits per character of mine."""

    step: int
    epoch: float
    loss: float
    bits: float


class RunDir:
    """The run's folder: metrics line by line, the best weights, `run.json`. Rank 0 writes; all know `done`, `before` and `best`."""

    def __init__(self, job, model):
        self.job, self.model, self.out = job, model, Path(job.options.out)
        self.prediction, self.speeds, self.peak = job.prediction, [], 0.0
        self.began, self.before, self.best, self.last = time.time(), None, None, None
        self.done = self.since_best = self.graphs = self.compiled_at = self.skipped = 0
        options, ranks, note = job.options, job.ranks, job.note
        if note:
            points = {
                name: EvalPoint(*note[name]) for name in ("before", "best", "last") if note[name]
            }
            self.before, self.last = points["before"], points["last"]
            self.best = self.last if note["best"] == note["last"] else points.get("best")
            self.since_best, self.skipped, self.began = (
                note["since_best"],
                note["skipped"],
                self.began - note["seconds"],
            )
            self.done = note["step"]
        if not ranks.is_main:
            return
        cli.make_private_dir(self.out)
        if note:
            self.cut_back()
        else:
            hf.clear_output(self.out)
        if options.overwrite:  # not when torchrun starts us again, for whom it is
            (self.out / "micro-batch.json").unlink(missing_ok=True)
        for name in ("persona.json", "facts.md"):
            if (Path(options.data) / name).exists():
                (self.out / name).write_bytes((Path(options.data) / name).read_bytes())
        job.tokenizer.save(self.out)  # its chat template has the names of persona.json
        self.run = cli.read_json(self.out / "run.json", {}) if note else {}
        resumed = self.run.get("resumed", []) + ([self.done] if note else [])
        self.run = {
            "config": dataclasses.asdict(options),
            "plan": {
                **dataclasses.asdict(job.plan),
                "evaluate_at": sorted(job.plan.evaluate_at),
                "recompute": model.recompute,
            },
            "base": str(job.folder),
            "trained_until": max(
                talk.start for talk in data.load_sessions(Path(options.data) / "train.jsonl")
            ),
            "fingerprint": job.made_of["fingerprint"],
            "commit": git_commit(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "device": torch.cuda.get_device_name()
            if ranks.device.type == "cuda"
            else f"{ranks.device.type} ({platform.machine()})",
            "world": ranks.world,
            "launcher": os.getppid(),
            "compiled": model.compiled,
            "prediction": self.prediction,
            "dtype": dtype_name(job.ways["dtype"]),
            **({"resumed": resumed} if resumed else {}),
        }
        cli.write_json(self.out / "run.json", self.run)

    def cut_back(self):
        """Forget what metrics.jsonl says of steps after the last that is done, and half a line."""
        lines = [line for line in cli.read_metrics(self.out) if line["step"] <= self.done]
        cli.write_text(
            self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
        )

    def state(self):
        """The run so far, for a save."""
        points = {
            name: point and dataclasses.astuple(point)
            for name, point in vars(self).items()
            if name in ("before", "best", "last")
        }
        counts = {
            "since_best": self.since_best,
            "skipped": self.skipped,
            "seconds": time.time() - self.began,
        }
        return {
            **points,
            **counts,
            "config": dataclasses.asdict(self.job.options),
            **self.job.made_of,
        }

    def write(self, line):
        """A step is done: its line of metrics.jsonl, and what is counted of it."""
        self.done = line["step"]
        self.skipped += "skipped" in line
        if self.model.compiled and self.graphs != metrics.count_compiled_graphs():
            self.graphs, self.compiled_at = metrics.count_compiled_graphs(), self.done
        if "tok_per_s" in line:
            self.speeds.append(line["tok_per_s"])
            self.peak = max(self.peak, line["peak_gib"])
        self.append(line)

    def append(self, line):
        if not self.job.ranks.is_main:
            return
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise cli.write_error(
                path, error, f"{self.kept()}. Make room. {checkpoint.RESUME_HINT}"
            ) from None

    def evaluation(self, number, found):
        """Note an Evaluation after step `number`; the one at step 0 is what the others are compared with, never the best. → Point"""
        if not math.isfinite(found.nats):
            raise UserError(
                f"after step {number} the held-out loss is {found.nats}; {self.kept()}",
                "Try a smaller --lr." if number else "Is the base whole? Try --dtype fp32.",
            )
        epoch = number / self.job.plan.epoch
        self.append({"step": number, "epoch": epoch, **found.metrics})
        point = EvalPoint(
            number, epoch, found.metrics["val_loss"], found.metrics["val_bits_per_char"]
        )
        if number == 0:
            self.before = point
        elif self.best is None or point.loss < self.best.loss:
            self.best, self.since_best = point, 0
        else:
            self.since_best += 1
        self.last = point
        return point

    def compare(self, point):
        """A Point in words, beside the best if it isn't that."""
        text = f"held-out loss {point.loss:.4f}, {point.bits:.4f} bits per character"
        return text if point is self.best else f"{text} (the best was {self.best.loss:.4f})"

    def save(self):
        """Make the folder what the model is now; every rank must call."""
        job = self.job
        if job.ranks.world > 1:
            self.model.reshard()  # since the last forward pass FSDP2 shows the root's parameters gathered, and cast
        if not job.options.lora:
            save_model(self.model, self.out, job.tokenizer)
            return
        tensors = {
            name: shards.full_tensor(p.detach())
            for name, p in lora.adapter_parameters(self.model).items()
        }
        if job.ranks.is_main:
            base = job.folder.resolve() if Path(job.options.model).is_dir() else job.options.model
            lora.save(self.model, self.out, base, tensors)

    def kept(self):
        return (
            f"{self.out} holds the model at its best"
            if self.best
            else f"{self.out} holds no model yet"
        )

    def unfit(self, line):
        """A step whose numbers are none → UserError"""
        return UserError(
            f"step {line['step']}: {line['skipped']}, on lines {line['lines']} of train.jsonl; {self.kept()}",
            "Try a smaller --lr; or mend those lines; or leave such steps out: --resume --skip-nonfinite 3",
        )

    def leave(self, ends):
        """Say why the run ends before its plan does, and how to go on."""
        options = self.job.options
        if not self.job.ranks.is_main:
            return
        why = {
            "time": f"--max-minutes {options.max_minutes:g}" if options.max_minutes else "",
            signal.SIGINT: "Ctrl-C",
        }
        saved = (
            f"saved in {self.out}. {checkpoint.RESUME_HINT}"
            if options.keep
            else "not saved (--keep 0)."
        )
        stopped = (
            f"stopped after step {self.done}, {saved}"
            if self.done
            else f"stopped before the first step. {checkpoint.RESUME_HINT}"
        )
        print(f"{why.get(ends, 'SIGTERM')}: {stopped}", file=sys.stderr)

    def finish(self):
        """Write what came of the run. → the same in words"""
        before, best, last = self.before, self.best, self.last
        if self.job.ranks.is_main:
            result = {
                "loss_before": before.loss,
                "loss": best.loss,
                "bits_before": before.bits,
                "bits": best.bits,
                "epoch": best.epoch,
                "steps": last.step,
                "seconds": round(time.time() - self.began, 1),
            }
            if self.speeds and self.prediction:
                usual = float(np.median(self.speeds[2:] or self.speeds))  # the first ones compile
                self.prediction |= {"measured_gib": self.peak, "measured_tok_per_s": usual}
            cli.write_json(
                self.out / "run.json", self.run | {"prediction": self.prediction, "result": result}
            )
            plot_losses(self.out)
        text = f"best at epoch {best.epoch:.1f}: {before.loss:.2f} → {best.loss:.2f} nats a target"
        text += f", {before.bits:.3f} → {best.bits:.3f} bits per character"
        if last is not best:
            text += "; later steps overfit and were discarded"
        if "measured_gib" in self.prediction:
            text += compare_prediction(self.prediction)
        if best.loss >= before.loss:
            text += "\nNothing was gained on held-out text: the base knew as much. More data, or a smaller --lr, may help."
        return f"{text}\nTalk to it: python chat.py {self.out}"


def compare_prediction(prediction):
    """What was predicted and measured, and why they may differ where they do by much. → lines"""
    text = "\npredicted {gib:.2f} GiB and {tok_per_s:,.0f} tok/s, measured {measured_gib:.2f} and {measured_tok_per_s:,.0f}"
    text = text.format(**prediction)
    faster = prediction["measured_tok_per_s"] / prediction["tok_per_s"]
    larger = prediction["measured_gib"] / prediction["gib"]
    if not 1 / 1.15 < faster < 1.15:
        text += f"\nSpeed differs by {faster - 1:+.0%}: perhaps other programs ran, or the machine slowed down."
    if not 1 / 1.1 < larger < 1.1:
        less = "room for saving a checkpoint was counted and not needed"
        reason = "libraries kept more than is counted for them" if larger > 1 else less
        text += f"\nMemory differs by {larger - 1:+.0%}: perhaps {reason}."
    return text


def plot_losses(folder):
    """`loss.png`, where matplotlib is installed: the training and held-out loss of `metrics.jsonl`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = cli.read_metrics(folder)
    trained, held_out = ([line for line in lines if key in line] for key in ("loss", "val_loss"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [x["step"] for x in trained],
        [x["loss"] for x in trained],
        color="0.7",
        label="training, a step",
    )
    axes.plot(
        [x["step"] for x in held_out],
        [x["val_loss"] for x in held_out],
        "o-",
        color="tab:green",
        label="held out",
    )
    axes.set(xlabel="step", ylabel="loss, nats a target")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(folder) / "loss.png", dpi=120)


def git_commit():
    """The code's git commit, None outside a checkout."""
    here = Path(__file__).parent.parent
    try:
        return subprocess.run(
            ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
