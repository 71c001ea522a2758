"""What is predicted of a training run on this CPU beside what is measured: memory, and the time of a step.

    python -m bench.plan                                     small models, rows of the example export
    python -m bench.plan --base build/smollm2 --data data    a real base, on rows of one's own

Nothing is fitted to these models: memory is live tensors and plan.CPU_RESERVE, time is timed (`plan.time_step`, as plan.py does, on
random weights). A process of its own predicts, another one takes 12 steps, each of other rows; medians but the first.
The last line is JSON. It refuses to time on a busy machine.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import cli
import data
from bench.step import ROOT, idle, write_example_data
from model import ModelConfig
from training import cost, distributed, metrics, optim, step
from weights import devices, hf
from weights.tokenizer import load_tokenizer

WAYS = {"lora": {"adapter": {"rank": 32, "alpha": 16}}, "full": {}}
WAYS |= {"qlora": WAYS["lora"] | {"nf4": True}, "pure": {"pure": True}}
ROWS = 4  # a step's


def shape(hidden, layers, heads, groups, inner):
    return ModelConfig(2002, hidden, inner, layers, heads, groups, hidden // heads)


SHAPES = {
    "G": shape(896, 6, 14, 2, 2432),
    "H": shape(576, 9, 9, 3, 1536),
    "J": shape(448, 14, 7, 7, 1216),
}
RUNS = [
    ("G", "lora", 2, 1024),
    ("G", "full", 2, 1024),
    ("G", "qlora", 4, 512),
    ("H", "lora", 1, 1024),
    ("H", "pure", 2, 1024),
]
RUNS += [
    ("J", "lora", 4, 512),
    ("J", "full", 1, 1024),
    ("J", "qlora", 2, 1024),
    ("J", "pure", 2, 512),
    ("H", "full", 1, 512),
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="a model folder, in place of the small shapes")
    parser.add_argument("--data", help="a folder of data.py's, in place of the example export")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(**json.loads(options.job))))
        return
    runs = [(options.base, kind, 2, 1024) for kind in ("lora", "full")] if options.base else RUNS
    with tempfile.TemporaryDirectory() as folder:
        compare(runs, options.data or write_example_data(f"{folder}/data"))


def compare(runs, folder):
    errors = {"gib": [], "seconds": []}
    for base, kind, rows, length in runs:
        given = {"base": base, "kind": kind, "rows": rows, "length": length, "folder": folder}
        predicted = run(what="predict", **given)
        measured = run(what="measure", **given)
        line = [f"{Path(base).name}, {kind}, {rows} x {length}"]
        for name, pairs in errors.items():
            pairs.append(predicted[name] / measured[name] - 1)
            line.append(f"{predicted[name]:.2f} / {measured[name]:.2f} | {pairs[-1]:+.1%}")
        print("| " + " | ".join(line) + " |", flush=True)
    sums = {
        name: {"mean": statistics.mean(map(abs, pairs)), "worst": max(pairs, key=abs)}
        for name, pairs in errors.items()
    }
    print(
        json.dumps(
            {
                name: {key: round(value, 4) for key, value in pair.items()}
                for name, pair in sums.items()
            }
        )
    )


def run(**job):
    idle()
    command = [sys.executable, "-m", "bench.plan", "--job", json.dumps(job)]
    return json.loads(
        subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.splitlines()[-1]
    )


def work(what, base, kind, rows, length, folder):
    """One process. → {"gib": peak memory of the process, "seconds": a step's}"""
    small = base in SHAPES
    tokenizer = load_tokenizer(ROOT / "examples" / "base" if small else base)
    model_config = SHAPES[base] if small else hf.config_for_tokenizer(Path(base), tokenizer)
    packed = data.load_rows(Path(folder) / "train.jsonl", tokenizer, length)
    packed = [row for row in packed if len(row.ids) == length]
    if what == "measure":
        return measure(model_config, kind, rows, packed, None if small else base)
    tokens, labelled, _ = metrics.step_sizes(packed)
    documents = sum(len(row.doc_lengths) for row in packed)
    given = {"dtype": devices.default_dtype(torch.device("cpu")), **WAYS[kind]}
    shares = {"labelled": labelled / tokens, "document": tokens / documents, "filled": 1.0}
    job = cost.StepWorkload(model_config, given, ROWS, length, compiled=False, cpu=True, **shares)
    needs = job.memory(rows, "none")
    choice = cost.Choice(rows, "none", needs, 0, True)
    gib = (sum(needs.values()) + cost.CPU_RESERVE) / devices.GIB
    return {"gib": gib, "seconds": cost.time_step(job, choice, torch.device("cpu"))}


def measure(model_config, kind, size, rows, folder):
    ranks = distributed.Distributed(torch.device("cpu"))
    dtype = devices.default_dtype(ranks.device)
    model = step.build_model(
        model_config, ranks, folder, **{"adapter": None, "dtype": dtype, **WAYS[kind]}
    )
    optimizer = optim.make_optimizer(model, 1e-4, 0.0, kind == "pure")
    drawn, took = random.Random(0), []
    for _ in range(12):
        part = drawn.sample(rows, ROWS)
        began = time.perf_counter()
        step.train_step(model, optimizer, step.micro_batches(part, size, ranks), ranks)
        took.append(time.perf_counter() - began)
    return {"gib": metrics.peak_gib(ranks.device), "seconds": statistics.median(took[1:])}


if __name__ == "__main__":
    cli.run(main)
