"""A run's folder: `metrics.jsonl`, `run.json`, best weights, `loss.png`; its best evaluation."""

import dataclasses
import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import cli
import data
import lora
from model import Transformer
from training.checkpoint import RESUME_HINT
from training.distributed import Distributed, fsdp_module
from training.run import Run, read_record
from weights import hf, shards
from weights.save import save_model

PACKAGES = ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy")


# --- the best evaluation


@dataclasses.dataclass(frozen=True)
class EvalPoint:
    """An evaluation: the loss in nats per target, and bits per character of my messages."""

    step: int
    epoch: float
    loss: float
    bits: float

    def __str__(self):
        return f"validation loss {self.loss:.4f}, {self.bits:.4f} bits per character"


@dataclasses.dataclass
class BestTracker:
    """The evaluation before training, the best one after it, and the last one."""

    before: EvalPoint | None = None
    best: EvalPoint | None = None
    last: EvalPoint | None = None
    since_best: int = 0  # evaluations since the best one

    def add(self, point: EvalPoint) -> bool:
        """Take in an evaluation. Return whether it is the best; that before training never is."""
        self.last = point
        if point.step == 0:
            self.before = point
            return False
        self.since_best += 1
        if self.best and point.loss >= self.best.loss:
            return False
        self.best, self.since_best = point, 0
        return True

    def state(self) -> dict:
        """Return what a checkpoint saves of it."""
        points = {"before": self.before, "best": self.best, "last": self.last}
        state = {name: point and dataclasses.astuple(point) for name, point in points.items()}
        return {**state, "since_best": self.since_best}

    @classmethod
    def from_metadata(cls, metadata: dict) -> "BestTracker":
        names = [name for name in ("before", "best", "last") if metadata[name]]
        points = {name: EvalPoint(*metadata[name]) for name in names}
        return cls(**points, since_best=metadata["since_best"])

    def result(self) -> dict[str, float]:
        """Return what run.json says of a finished run."""
        before, best = self.before, self.best
        assert before and best and self.last, self
        return {
            "loss_before": before.loss,
            "loss": best.loss,
            "bits_before": before.bits,
            "bits": best.bits,
            "epoch": best.epoch,
            "steps": self.last.step,
        }

    def summary(self) -> str:
        """Say what training gained."""
        before, best = self.before, self.best
        assert before and best, self
        text = (
            f"best at epoch {best.epoch:.1f}: {before.loss:.2f} → {best.loss:.2f} nats per target, "
            f"{before.bits:.3f} → {best.bits:.3f} bits per character"
        )
        if self.last != best:
            text += "; later steps overfit and were discarded"
        if best.loss >= before.loss:
            text += (
                "\nThe validation loss did not improve on the base's. More data or a smaller --lr "
                "may help."
            )
        return text


# --- the folder


class RunDir:
    """The folder that a run writes: metrics, run.json and the best weights.

    Every rank has one. Only the main rank writes, but for the shards of a whole model.
    """

    def __init__(self, run: Run, ranks: Distributed):
        self.run, self.ranks = run, ranks
        self.path = Path(run.options.out)
        self.record: dict = {}  # run.json

    def create(self, compiled: bool) -> None:
        """Make the folder, or clear what an earlier run left in it, and write run.json."""
        run, options = self.run, self.run.options
        if not self.ranks.is_main:
            return
        cli.make_private_dir(self.path)
        before: dict = {}
        if run.checkpoint:
            before = read_record(self.path)
            self.truncate_metrics(run.steps_done)
        else:
            hf.clear_output(self.path)
        if options.overwrite:  # not when torchrun restarts the run, which needs it
            (self.path / "micro-batch.json").unlink(missing_ok=True)
        for name in ("persona.json", "facts.md"):
            source = Path(options.data) / name
            if source.exists():
                (self.path / name).write_bytes(source.read_bytes())
        run.base.tokenizer.save(self.path)  # its chat template has the names of persona.json
        sessions = data.load_sessions(Path(options.data) / "train.jsonl")
        self.record = {
            "config": run.config(),
            "plan": {
                **dataclasses.asdict(run.plan),
                "evaluate_at": sorted(run.plan.evaluate_at),
                "recompute": run.spec.activation_checkpointing,
            },
            "base": str(run.base.folder),
            "trained_until": max(session.start for session in sessions),
            "fingerprint": run.base.fingerprint,
            **environment(self.ranks),
            "compiled": compiled,
            "prediction": run.prediction,
            "dtype": str(run.spec.dtype).removeprefix("torch."),
        }
        if run.checkpoint:
            self.record["resumed"] = [*before.get("resumed", []), run.steps_done]
        cli.write_json(self.path / "run.json", self.record)

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics of later steps, and half a line."""
        lines = [line for line in cli.read_metrics(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        cli.write_text(self.path / "metrics.jsonl", text)

    def append(self, line: dict) -> None:
        """Append a line to metrics.jsonl."""
        if not self.ranks.is_main:
            return
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            hint = f"{self.contents()}. Free some space. {RESUME_HINT}"
            raise cli.write_error(path, error, hint) from None

    def contents(self) -> str:
        """Say what a run that ends now leaves."""
        has_model = hf.is_adapter(self.path) or hf.is_model(self.path)
        return f"{self.path} holds {'the best model so far' if has_model else 'no model yet'}"

    def save_weights(self, model: Transformer) -> None:
        """Save the model, or its adapter, as it is now. Every rank must call this."""
        run = self.run
        if self.ranks.world > 1:
            # Since the last forward pass FSDP2 shows the root's parameters gathered, and cast.
            fsdp_module(model).reshard()
        if not run.options.lora:
            save_model(model, self.path, run.base.tokenizer, advance=self.ranks.advance)
            return
        tensors = {}
        for name, parameter in lora.adapter_parameters(model).items():
            tensors[name] = shards.full_tensor(parameter.detach())
        if self.ranks.is_main:
            local = Path(run.options.model).is_dir()
            base = run.base.folder.resolve() if local else run.options.model
            lora.save(model, self.path, base, tensors)

    def finish(self, tracker: BestTracker, started: float) -> str:
        """Write the result, and what was measured beside what was predicted. Return a summary."""
        prediction = dict(self.run.prediction)
        text = tracker.summary()
        if self.ranks.is_main:
            result = tracker.result() | {"seconds": round(time.time() - started, 1)}
            lines = [line for line in cli.read_metrics(self.path) if "tok_per_s" in line]
            lines = [line for line in lines if line["step"] > self.run.steps_done]
            if lines and prediction:
                speeds = [line["tok_per_s"] for line in lines]
                speeds = speeds[2:] or speeds  # the first ones compile
                prediction["measured_gib"] = max(line["peak_gib"] for line in lines)
                prediction["measured_tok_per_s"] = float(np.median(speeds))
                text += f"\n{compare_prediction(prediction)}"
            record = self.record | {"prediction": prediction, "result": result}
            cli.write_json(self.path / "run.json", record)
            plot_losses(self.path)
        return f"{text}\nTalk to it: python chat.py {self.path}"


def environment(ranks: Distributed) -> dict:
    """Return what run.json says of the code, the packages and the machine."""
    device = f"{ranks.device.type} ({platform.machine()})"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name()
    return {
        "commit": git_commit(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "device": device,
        "world": ranks.world,
        "launcher": os.getppid(),
    }


def compare_prediction(prediction: dict) -> str:
    """Say what was predicted and measured, and how they may differ where they do by much."""
    text = (
        "predicted {gib:.2f} GiB and {tok_per_s:,.0f} tok/s, "
        "measured {measured_gib:.2f} and {measured_tok_per_s:,.0f}"
    ).format(**prediction)
    faster = prediction["measured_tok_per_s"] / prediction["tok_per_s"]
    larger = prediction["measured_gib"] / prediction["gib"]
    if not 1 / 1.15 < faster < 1.15:
        text += f"\nSpeed differs by {faster - 1:+.0%}: did other programs run?"
    if not 1 / 1.1 < larger < 1.1:
        text += f"\nMemory differs by {larger - 1:+.0%}; libraries and checkpoints are estimated."
    return text


def plot_losses(folder: Path) -> None:
    """Plot the losses in metrics.jsonl as loss.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style, color in (
        ("loss", "training, each step", "-", "0.7"),
        ("val_loss", "validation", "o-", "tab:green"),
    ):
        lines = [line for line in cli.read_metrics(folder) if key in line]
        steps, losses = [line["step"] for line in lines], [line[key] for line in lines]
        axes.plot(steps, losses, style, color=color, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per target")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "loss.png", dpi=120)


def git_commit() -> str | None:
    """Return the git commit of this code, None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
