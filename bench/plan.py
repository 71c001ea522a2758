"""Compare plan.py's predictions with training on this CPU: memory, and the time of a step.

    python -m bench.plan                                    small models, the example export
    python -m bench.plan --base build/smollm2 --data data   a real base, your own rows

Nothing is fitted to these models: memory is live tensors and cost.CPU_RESERVE, and time is timed
with random weights (`cost.time_step`), as in plan.py. One process predicts; another one takes 12
steps, each on other rows, and reports the median of all but the first. The last line is JSON. A
busy machine is refused.
"""

import argparse
import dataclasses
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

CPU_DTYPE = devices.default_dtype(torch.device("cpu"))
LORA = step.ModelSpec({"rank": 32, "alpha": 16}, CPU_DTYPE)
SPECS = {
    "lora": LORA,
    "qlora": dataclasses.replace(LORA, nf4=True),
    "full": step.ModelSpec(dtype=CPU_DTYPE),
    "pure": step.ModelSpec(dtype=CPU_DTYPE, pure_bf16=True),
}
ROWS = 4  # of a step


def config(hidden, layers, heads, kv_heads, intermediate):
    return ModelConfig(2002, hidden, intermediate, layers, heads, kv_heads, hidden // heads)


CONFIGS = {
    "G": config(896, 6, 14, 2, 2432),
    "H": config(576, 9, 9, 3, 1536),
    "J": config(448, 14, 7, 7, 1216),
}
RUNS = [  # config, kind, micro-batch, tokens of a row
    ("G", "lora", 2, 1024),
    ("G", "full", 2, 1024),
    ("G", "qlora", 4, 512),
    ("H", "lora", 1, 1024),
    ("H", "pure", 2, 1024),
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
    parser.add_argument("--base", help="a model folder, instead of the small models")
    parser.add_argument("--data", help="a folder that data.py wrote, instead of the example export")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(**json.loads(options.job))))
        return
    runs = [(options.base, kind, 2, 1024) for kind in ("lora", "full")] if options.base else RUNS
    with tempfile.TemporaryDirectory() as folder:
        compare(runs, options.data or write_example_data(f"{folder}/data"))


def compare(runs, folder):
    """Print predicted and measured figures of each run, then the errors as JSON."""
    errors = {"gib": [], "seconds": []}
    for base, kind, rows, length in runs:
        job = {"base": base, "kind": kind, "rows": rows, "length": length, "folder": folder}
        predicted = spawn(mode="predict", **job)
        measured = spawn(mode="measure", **job)
        cells = [f"{Path(base).name}, {kind}, {rows} x {length}"]
        for name, ratios in errors.items():
            ratios.append(predicted[name] / measured[name] - 1)
            cells.append(f"{predicted[name]:.2f} / {measured[name]:.2f} | {ratios[-1]:+.1%}")
        print("| " + " | ".join(cells) + " |", flush=True)
    summary = {}
    for name, ratios in errors.items():
        mean = statistics.mean(map(abs, ratios))
        summary[name] = {"mean": round(mean, 4), "worst": round(max(ratios, key=abs), 4)}
    print(json.dumps(summary))


def spawn(**job):
    """Run a job in a process of its own, on an idle machine."""
    idle()
    command = [sys.executable, "-m", "bench.plan", "--job", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_job(mode, base, kind, rows, length, folder):
    """Predict or measure one run. → {"gib": peak memory of the process, "seconds": of a step}"""
    small = base in CONFIGS
    tokenizer = load_tokenizer(ROOT / "examples" / "base" if small else base)
    model_config = CONFIGS[base] if small else hf.config_for_tokenizer(Path(base), tokenizer)
    packed = data.load_rows(Path(folder) / "train.jsonl", tokenizer, length)
    packed = [row for row in packed if len(row.ids) == length]
    if mode == "measure":
        return measure(model_config, kind, rows, packed, None if small else base)
    sizes = metrics.step_sizes(packed)
    workload = cost.StepWorkload(
        model_config,
        SPECS[kind],
        ROWS,
        length,
        target_share=sizes.targets / sizes.tokens,
        doc_length=sizes.tokens / sum(len(row.doc_lengths) for row in packed),
        fill_share=1.0,
        compiled=False,
        cpu=True,
    )
    needs = workload.memory(rows, "none")
    choice = cost.Choice(rows, "none", needs, 0, True)
    gib = (sum(needs.values()) + cost.CPU_RESERVE) / devices.GIB
    return {"gib": gib, "seconds": cost.time_step(workload, choice, torch.device("cpu"))}


def measure(model_config, kind, micro_batch, rows, folder):
    """Train 12 steps. → peak memory and the median step's time"""
    ranks = distributed.Distributed(torch.device("cpu"))
    model = step.build_model(model_config, ranks, SPECS[kind], folder)
    optimizer = optim.make_optimizer(model, 1e-4, 0.0, kind == "pure")
    rng = random.Random(0)
    times = []
    for _ in range(12):
        batch = rng.sample(rows, ROWS)
        start = time.perf_counter()
        step.train_step(model, optimizer, step.micro_batches(batch, micro_batch, ranks), ranks)
        times.append(time.perf_counter() - start)
    return {"gib": metrics.peak_gib(ranks.device), "seconds": statistics.median(times[1:])}


if __name__ == "__main__":
    cli.run(main, cli.TRAINING_MMAP_BYTES)
