"""What plan.py predicts against what is measured: memory and time of small models on this CPU.

    python -m bench.plan --predict    writes bench/predictions.json, to be committed before anything of it is measured
    python -m bench.plan              measures it, and prints docs/PLAN.md's table; the last line is JSON
    python -m bench.plan --calibrate  the runs that plan.CPU's constants were fitted to, which don't count

Each run is a process of its own on rows of the example export: 8 steps, the first not counted, medians. Memory is what was live at most
(`step.Live`), and the process's peak resident memory beside it. A run is repeated, once more, when others use the processors.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import config
import data
import plan
import step
import tokenizer as tokenizers
from bench.step import ROOT, usage
from model import ModelConfig

BUSY = 0.2  # share of the processors that others may use meanwhile
HERE = Path(__file__).with_name("predictions.json")
WAYS = {"lora": {"adapter": {"rank": 32, "alpha": 16}}, "full": {}}
WAYS |= {"qlora": WAYS["lora"] | {"nf4": True}, "pure": {"pure": True}}


def shape(hidden, layers, heads, groups, inner, vocabulary=32002):
    return ModelConfig(vocabulary, hidden, inner, layers, heads, groups, hidden // heads)


SHAPES = {
    "A": shape(512, 8, 8, 2, 1536),
    "B": shape(256, 6, 4, 2, 768),
    "C": shape(768, 6, 12, 4, 2048),
    "D": shape(640, 10, 10, 5, 1792),
    "E": shape(384, 12, 6, 2, 1280),
    "F": shape(1024, 4, 8, 8, 2816),
    "G": shape(896, 6, 14, 2, 2432),
    "H": shape(576, 9, 9, 3, 1536),
    "J": shape(448, 14, 7, 7, 1216),
}
CALIBRATING = [(name, kind, 2, 1024) for name in "ACDE" for kind in WAYS]
CALIBRATING += [("B", "lora", 1, 1024), ("F", "lora", 1, 1024), ("F", "full", 4, 512), ("F", "qlora", 2, 512)]
COUNTED = [("G", "lora", 2, 1024), ("G", "full", 2, 1024), ("G", "qlora", 4, 512), ("H", "lora", 1, 1024), ("H", "pure", 2, 1024)]
COUNTED += [("J", "lora", 4, 512), ("J", "full", 1, 1024), ("J", "qlora", 2, 1024), ("J", "pure", 2, 512), ("H", "full", 1, 512)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(*json.loads(options.job))))
    elif options.predict:
        made = {name_of(run): predict(*run, rows_of(run[3], run[0])) for run in COUNTED}
        config.write_json(HERE, made)
    else:
        compare(CALIBRATING if options.calibrate else COUNTED, None if options.calibrate else config.read_json(HERE))


def name_of(run):
    name, kind, rows, length = run
    return f"{name} {kind} {rows}x{length}"


def work_of(name, kind, rows, length, some):
    """`some`: the rows, of which plan is told what it would read from --data: sizes, and no more."""
    tokens, documents = sum(len(row.ids) for row in some), sum(len(row.doc_lengths) for row in some)
    labelled = sum(int((row.labels != data.IGNORED).sum()) for row in some) / tokens
    return plan.Work(SHAPES[name], WAYS[kind], 4, length, 1, labelled, tokens / documents, False, True, filled=1.0)


def rows_of(length, _):
    """The first four full rows of the example export."""
    with tempfile.TemporaryDirectory() as folder:
        export = [sys.executable, ROOT / "data.py", ROOT / "examples" / "telegram" / "result.json", "--out", f"{folder}/data"]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        rows = data.rows(Path(folder) / "data" / "train.jsonl", tokenizers.load(ROOT / "examples" / "base"), length)
        return [row for row in rows if len(row.ids) == length][:4]


def predict(name, kind, rows, length, some):
    """Time as shares of the peak: what a second is depends on how much of the machine there is. → what is predicted"""
    work = work_of(name, kind, rows, length, some)
    needs = work.memory(rows, "none")
    return {
        "live_gib": round(sum(needs.values()) / plan.GIB, 4),
        "resident_gib": round(plan.resident(needs) / plan.GIB, 3),
        "seconds_at_400_gflops": round(work.seconds(plan.at_peak(400e9), rows, "none"), 3),
    }


def measure(name, kind, rows, length):
    """One process. → what was measured, and the time that is predicted for the peak measured just before and after"""
    some, device = rows_of(length, name), torch.device("cpu")
    work = work_of(name, kind, rows, length, some)
    peaks = [step.measured_peak(device, torch.bfloat16) for _ in range(3)]
    before, own = usage(), time.process_time()
    seconds, live = try_out(work, rows, some)
    after, own = usage(), time.process_time() - own
    peaks += [step.measured_peak(device, torch.bfloat16) for _ in range(3)]
    peak = max(peaks)  # others can only take from it
    return {
        "seconds": seconds,
        "peak": peak,
        "live_gib": live / plan.GIB,
        "resident_gib": step.peak_gib(device),
        "busy": max(0.0, 1 - (after[1] - before[1] + 100 * own) / max(1, after[0] - before[0])),  # by others; 100 ticks a second
    }


def try_out(work, at, rows, steps=6):
    """Train on `rows`, `at` at a time, from random weights. → (median seconds a step but the first, bytes that were live at most)"""
    ranks = step.Ranks(torch.device("cpu"))
    model = step.build(work.shape, ranks, **work.ways)
    optimizer = step.make_optimizer(model, 1e-4, 0.0, work.ways.get("pure", False))

    def take():
        before = time.perf_counter()
        step.train_step(model, optimizer, step.micro_batches(rows, at, ranks), ranks)
        return time.perf_counter() - before

    take()
    with step.Live() as live:  # counting takes time: this step isn't timed
        live.add([*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())])
        take()
    return statistics.median(take() for _ in range(steps - 1)), live.peak


def compare(runs, promised):
    """Measure, print a line each and the errors in all. `promised`: the file's predictions, None for those of now."""
    table, errors = [], {"live_gib": [], "resident_gib": [], "seconds": []}
    for run in runs:
        tries = []
        while len(tries) < 2 and not any(t["busy"] < BUSY for t in tries):
            job = [sys.executable, "-m", "bench.plan", "--job", json.dumps(run)]
            tries.append(json.loads(subprocess.run(job, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]))
        found = min(tries, key=lambda t: t["busy"])
        hoped = promised[name_of(run)] if promised else predict(*run, rows_of(run[3], run[0]))
        pairs = {kind: (hoped[kind], found[kind]) for kind in ("live_gib", "resident_gib")}
        pairs["seconds"] = hoped["seconds_at_400_gflops"] * 400e9 / found["peak"], found["seconds"]
        line = [name_of(run)]
        for kind, (said, was) in pairs.items():
            errors[kind].append(said / was - 1)
            line += [f"{said:.3f}", f"{was:.3f}", f"{said / was - 1:+.1%}"]
        table.append("| " + " | ".join([*line, f"{found['peak'] / 1e9:.0f}", f"{found['busy']:.0%}"]) + " |")
        print(table[-1], flush=True)
    sums = {k: {"mean": round(statistics.mean(map(abs, e)), 4), "worst": round(max(e, key=abs), 4)} for k, e in errors.items()}
    print(json.dumps(sums))


if __name__ == "__main__":
    config.run(main)
