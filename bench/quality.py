"""What fine-tuning gains on held-out chat: bits per character on the owner's own words, with intervals.

    python -m bench.quality EXPORT BASE --run "lora --lora --lr 5e-4" --run "full --lr 1e-4" --peft 5e-4
    python -m bench.quality EXPORT BASE --run "plain --lora" --run "who --lora --context who"
    python -m bench.quality EXPORT BASE --run "old --lora --until 2008-12-31" --run "later --lora --init {old}"

Splits EXPORT (the latest sessions are held out), evaluates BASE, trains each --run by train.py and each --peft learning rate by
transformers + PEFT on the very same rows, steps and schedule, and prints for each: bits per character, its difference from the base
and from the first run, with 95% intervals by a bootstrap over sessions. A run's --context, --since and --until go to data.py: it is
trained on such data, and measured on the same held-out turns, with its --context before them. {name}: the folder of a run before it.
The last line is JSON. Every run keeps its best evaluation, chosen
on the same held-out sessions: the gains of all are flattered alike.
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
from training import distributed, optim, step
from weights.load import load_model
from weights.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export")
    parser.add_argument("base")
    parser.add_argument("--run", action="append", default=[], help="a name, then flags of train.py")
    parser.add_argument(
        "--context",
        action="append",
        default=[],
        help="measure the base behind such a header too, as data.py's --context",
    )
    parser.add_argument(
        "--peft",
        action="append",
        default=[],
        type=float,
        help="a learning rate for transformers + PEFT",
    )
    parser.add_argument(
        "--messages",
        type=int,
        help="train on the latest sessions with so many messages of the owner's",
    )
    parser.add_argument("--val", default="0.2")
    parser.add_argument("--epochs", default="3")
    options = parser.parse_args()
    ranks = distributed.Distributed(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        scratch, tokenizer = Path(scratch), load_tokenizer(options.base)

        def made(**flags):
            """The folder that data.py makes with such flags."""
            given = [
                part for name, value in flags.items() if value for part in (f"--{name}", value)
            ]
            folder = scratch / ("data" + "".join(given))
            if not folder.exists():
                command = [
                    sys.executable,
                    ROOT / "data.py",
                    options.export,
                    "--out",
                    folder,
                    "--val",
                    options.val,
                    *given,
                ]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                if options.messages:
                    keep_latest(folder / "train.jsonl", options.messages)
            return folder

        def measure(path, context):
            held_out = data.load_rows(made(context=context) / "val.jsonl", tokenizer, 1024)
            return step.evaluate(
                load_model(str(path), torch.float32, tokenizer=tokenizer), held_out, ranks, 2
            )

        results, seconds = {"base": measure(options.base, None)}, {"base": 0.0}
        report("base", results, seconds)
        for context in options.context:
            results[f"base, {context}"] = measure(options.base, context)
            report(f"base, {context}", results, seconds | {f"base, {context}": 0.0})
        of_data = argparse.ArgumentParser()
        for name in ("context", "since", "until"):
            of_data.add_argument(f"--{name}")
        for run in options.run:
            name, *flags = shlex.split(run)
            chosen, flags = of_data.parse_known_args(flags)
            began, out = time.time(), scratch / name
            command = f"train.py --model {options.base} --data {made(**vars(chosen))} --out {out} --samples 0 --device cpu --keep 0"
            flags = [flag.format(**{other: scratch / other for other in results}) for flag in flags]
            epochs = [] if {"--epochs", "--max-steps"} & {*flags} else ["--epochs", options.epochs]
            done = subprocess.run(
                [sys.executable, *command.split(), *epochs, *flags],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            seconds[name] = time.time() - began
            results[name] = measure(out, chosen.context)
            last = json.loads((out / "run.json").read_text())["result"]
            report(
                name,
                results,
                seconds,
                f"best at epoch {last['epoch']:.2f} of {last['steps']} steps",
            )
        for lr in options.peft:
            name, began = f"peft {lr:g}", time.time()
            held_out = data.load_rows(made() / "val.jsonl", tokenizer, 1024)
            results[name], when = peft(
                options.base, made(), tokenizer, held_out, lr, float(options.epochs)
            )
            seconds[name] = time.time() - began
            report(name, results, seconds, when)
        print(
            json.dumps(
                {name: round(r.metrics["val_bits_per_char"], 4) for name, r in results.items()}
            )
        )


def keep_latest(path, messages):
    talks, kept = data.load_sessions(path), []
    for talk in reversed(talks):
        if messages <= 0:
            break
        kept.append(talk)
        messages -= sum(len(turn.messages) for turn in talk.turns if turn.me)
    path.write_text("".join(talk.to_json() + "\n" for talk in reversed(kept)), encoding="utf-8")


def interval(one, other, draws=2000):
    """one - other in bits per character, paired by session: (difference, low, high)."""
    chosen = np.random.default_rng(0).integers(0, len(one.chars), (draws, len(one.chars)))
    chars = one.chars[chosen].sum(1)
    drawn = (one.bits[chosen].sum(1) - other.bits[chosen].sum(1)) / chars
    return ((one.bits - other.bits).sum() / one.chars.sum(), *np.quantile(drawn, [0.025, 0.975]))


def report(name, results, seconds, note=""):
    this = results[name]
    text = f"{name:<24} {this.metrics['val_bits_per_char']:.4f} bits/char, format {this.metrics['val_format_loss']:.3f} nats"
    for other in [n for n in list(results)[:2] if n != name]:
        text += f"   - {other}: {{:+.4f}} [{{:+.4f}}, {{:+.4f}}]".format(
            *interval(this, results[other])
        )
    print(f"{text}   {seconds[name]:.0f} s   {note}", flush=True)


def peft(base, folder, tokenizer, held_out, lr, epochs, rank=32, alpha=16):
    """transformers + PEFT on our rows, every document in a padded batch of its own; our batches, schedule, clipping and stopping."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = transformers.MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(
        model,
        LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(lora.TARGETS), task_type="CAUSAL_LM"
        ),
    )
    rows = data.load_rows(folder / "train.jsonl", tokenizer, 1024)
    plan = train.plan_run(
        len(rows), dataclasses.replace(train.Options(), lora=True, lr=lr, epochs=epochs)
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    best, when, worse, ranks = None, "", 0, distributed.Distributed(torch.device("cpu"))
    for number, part in enumerate(train.batches(rows, plan, 0), 1):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(number, plan.steps, lr, 0.03)
        documents = sorted((d for row in part for d in cut(row)), key=lambda d: len(d[0]))
        count = sum(int((labels != data.IGNORE_INDEX).sum()) for _, labels in documents)
        for begin in range(0, len(documents), 8):
            some = documents[begin : begin + 8]
            length = max(len(ids) for ids, _ in some)
            ids, labels, mask = (
                torch.full((len(some), length), fill) for fill in (0, data.IGNORE_INDEX, 0)
            )
            for i, (one, targets) in enumerate(some):
                ids[i, : len(one)], labels[i, : len(one)], mask[i, : len(one)] = (
                    torch.from_numpy(one),
                    torch.from_numpy(targets),
                    1,
                )
            logits = model(input_ids=ids, attention_mask=mask).logits
            (
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
                )
                / count
            ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number in plan.evaluate_at:
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch)
                found = step.evaluate(
                    load_model(scratch, torch.float32, base=base), held_out, ranks, 2
                )
            if best is None or found.metrics["val_loss"] < best.metrics["val_loss"]:
                best, when, worse = found, f"best at epoch {number / plan.epoch:.2f}", 0
            else:
                worse += 1
            if worse >= 3:
                break
    assert math.isfinite(best.nats)
    return best, when


def cut(row):
    ends = np.cumsum(row.doc_lengths)
    return [
        (row.ids[e - n : e].astype(np.int64), row.labels[e - n : e].astype(np.int64))
        for e, n in zip(ends, row.doc_lengths)
    ]


if __name__ == "__main__":
    main()
