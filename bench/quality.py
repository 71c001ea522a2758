"""What fine-tuning gains on held-out chat: bits per character on the owner's own text.

    python -m bench.quality EXPORT BASE --run "lora --lora --lr 5e-4" --run "full --lr 1e-4"
    python -m bench.quality EXPORT BASE --run "lora --lora --lr 5e-4" --peft 5e-4
    python -m bench.quality EXPORT BASE --run "plain --lora" --run "who --lora --context who"
    python -m bench.quality EXPORT BASE --run "old --lora --until 2008-12-31" \\
        --run "later --lora --init {old}"

Splits EXPORT, unless data.py did (the latest sessions are held out), evaluates BASE, trains each
--run with train.py and each --peft learning rate with transformers + PEFT on the same rows, steps
and schedule. Prints for each: bits per character, and its difference from the base and from the
first run, with 95% intervals by a bootstrap over sessions. A run's --context, --since and --until
go to data.py: it is trained on such data, and measured on the same held-out turns with its
--context before them.
{name} is the folder of an earlier run. The last line is JSON. Every run keeps its best evaluation,
chosen on the same held-out sessions, which flatters all gains alike.
"""

import argparse
import dataclasses
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
import lora
import train
from bench.step import padded_documents
from training import distributed, optim, step
from training.run import plan_run
from weights import devices
from weights.load import load_model
from weights.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
RANK, ALPHA = 32, 16  # PEFT's, as train.py's defaults
PATIENCE = 3  # evaluations without an improvement


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        bench.add("base", bench.measure(options.base, None))
        for context in options.context:
            bench.add(f"base, {context}", bench.measure(options.base, context))
        for run in options.run:
            bench.train(*shlex.split(run))
        for lr in options.peft:
            bench.train_peft(lr)
        bits = {
            name: round(result.metrics["val_bits_per_char"], 4)
            for name, result in bench.results.items()
        }
        print(json.dumps(bits))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"action": "append", "default": []}
    parser.add_argument("export", help="an export, or a folder of data.py")
    parser.add_argument("base")
    parser.add_argument("--run", help="a name, then flags of train.py", **several)
    parser.add_argument(
        "--context", help="also measure the base with this --context of data.py", **several
    )
    parser.add_argument(
        "--peft", type=float, help="a learning rate for transformers + PEFT", **several
    )
    parser.add_argument(
        "--messages", type=int, help="train on the latest sessions with N messages of the owner's"
    )
    parser.add_argument("--val", default="0.2")
    parser.add_argument("--epochs", default="3")
    return parser.parse_args()


class Bench:
    """The runs so far: `results` {name: Evaluation}, the base first."""

    def __init__(self, options: argparse.Namespace, scratch: Path):
        self.options, self.scratch = options, scratch
        self.tokenizer = load_tokenizer(options.base)
        self.results: dict[str, step.Evaluation] = {}

    def data_folder(self, **flags: str | None) -> Path:
        """Return the folder that data.py makes with these flags, or EXPORT if it is one."""
        if (Path(self.options.export) / "train.jsonl").exists():
            if self.options.messages or any(flags.values()):
                sys.exit("--messages, --context, --since and --until need the export itself")
            return Path(self.options.export)
        arguments = []
        for name, value in flags.items():
            arguments += [f"--{name}", value] if value else []
        folder = self.scratch / ("data" + "".join(arguments))
        if not folder.exists():
            command = [sys.executable, ROOT / "data.py", self.options.export, "--out", folder]
            command += ["--val", self.options.val, *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if self.options.messages:
                keep_latest(folder / "train.jsonl", self.options.messages)
        return folder

    def held_out(self, context: str | None) -> list[data.Row]:
        return data.load_rows(self.data_folder(context=context) / "val.jsonl", self.tokenizer, 1024)

    def measure(self, path, context: str | None) -> step.Evaluation:
        model = load_model(str(path), torch.float32, tokenizer=self.tokenizer)
        ranks = distributed.Distributed(torch.device("cpu"))
        return step.evaluate(model, self.held_out(context), ranks, 2)

    def train(self, name: str, *flags: str) -> None:
        """Run train.py with `flags`, those of data.py among them, and measure what it made."""
        parser = argparse.ArgumentParser()
        for flag in ("context", "since", "until"):
            parser.add_argument(f"--{flag}")
        for_data, for_train = parser.parse_known_args(flags)
        began, out = time.time(), self.scratch / name
        command = [sys.executable, "train.py", "--model", self.options.base, "--out", out]
        command += ["--data", self.data_folder(**vars(for_data))]
        command += "--samples 0 --device cpu --keep 0".split()
        if not {"--epochs", "--max-steps"} & {*for_train}:
            command += ["--epochs", self.options.epochs]
        earlier = {other: self.scratch / other for other in self.results}
        command += [flag.format(**earlier) for flag in for_train]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        seconds = time.time() - began
        last = json.loads((out / "run.json").read_text())["result"]
        note = f"best at epoch {last['epoch']:.2f} of {last['steps']} steps"
        self.add(name, self.measure(out, for_data.context), seconds, note)

    def train_peft(self, lr: float) -> None:
        began, options = time.time(), self.options
        result, note = peft(
            options.base,
            self.data_folder(),
            self.tokenizer,
            self.held_out(None),
            lr,
            float(options.epochs),
        )
        self.add(f"peft {lr:g}", result, time.time() - began, note)

    def add(self, name: str, result: step.Evaluation, seconds: float = 0, note: str = "") -> None:
        """Keep a result, and print it with its difference from the base and the first run."""
        self.results[name] = result
        line = f"{name:<24} {result.metrics['val_bits_per_char']:.4f} bits/char, "
        line += f"format {result.metrics['val_format_loss']:.3f} nats"
        for other in list(self.results)[:2]:
            if other != name:
                difference, low, high = interval(result, self.results[other])
                line += f"   - {other}: {difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"{line}   {seconds:.0f} s   {note}", flush=True)


def keep_latest(path: Path, messages: int) -> None:
    """Cut a train.jsonl down to its latest sessions with that many messages of the owner's."""
    latest: list[data.Session] = []
    for session in reversed(data.load_sessions(path)):
        if messages <= 0:
            break
        latest.insert(0, session)
        messages -= sum(len(turn.messages) for turn in session.turns if turn.me)
    lines = [session.to_json() + "\n" for session in latest]
    path.write_text("".join(lines), encoding="utf-8")


def interval(one: step.Evaluation, other: step.Evaluation, draws: int = 2000) -> tuple:
    """one - other in bits per character, paired by session: (difference, low, high)."""
    chosen = np.random.default_rng(0).integers(0, len(one.chars), (draws, len(one.chars)))
    drawn = (one.bits - other.bits)[chosen].sum(1) / one.chars[chosen].sum(1)
    difference = (one.bits - other.bits).sum() / one.chars.sum()
    return difference, *np.quantile(drawn, [0.025, 0.975])


def peft(base, folder: Path, tokenizer, held_out: list[data.Row], lr: float, epochs: float):
    """Train with transformers + PEFT on our rows, batches, schedule, clipping and stopping.

    Every document is a row of its own in a padded batch. Returns (Evaluation, when it was best).
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(lora.TARGETS), task_type="CAUSAL_LM"
    )
    model = transformers.MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, settings)
    rows = data.load_rows(folder / "train.jsonl", tokenizer, 1024)
    options = dataclasses.replace(train.Options(), lora=True, lr=lr, epochs=epochs)
    plan = plan_run(len(rows), options, model.num_parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    best, when, worse = None, "", 0
    for number, batch in enumerate(train.step_rows(rows, plan, 0), 1):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(number, plan.steps, lr, 0.03)
        backward(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number not in plan.evaluate_at:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            ours = load_model(scratch, torch.float32, base=base)
            ranks = distributed.Distributed(torch.device("cpu"))
            result = step.evaluate(ours, held_out, ranks, 2)
        worse += 1
        if best is None or result.metrics["val_loss"] < best.metrics["val_loss"]:
            best, when, worse = result, f"best at epoch {number / plan.epoch:.2f}", 0
        if worse >= PATIENCE:
            break
    assert math.isfinite(best.nats)
    return best, when


def backward(model, rows: list[data.Row]) -> None:
    """Accumulate the gradients of a batch: of the mean loss over all its targets."""
    count = sum(int((row.labels != data.IGNORE_INDEX).sum()) for row in rows)
    dtype = devices.default_dtype(torch.device("cpu"))  # train.py's
    for batch, labels in padded_documents(rows, 8):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(**batch).logits.flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        (loss / count).backward()


if __name__ == "__main__":
    main()
