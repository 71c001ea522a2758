"""Measure the held-out loss of a model in bf16, int8 and int4.

    python -m bench.weights MODEL DATA

The last line is JSON.
"""

import json
import sys
from pathlib import Path

import torch

import cli
import data
from training import distributed, step
from weights.load import load_model
from weights.tokenizer import load_tokenizer


def main() -> None:
    folder, data_folder = sys.argv[1], Path(sys.argv[2])
    tokenizer = load_tokenizer(folder)
    rows = data.load_rows(data_folder / "val.jsonl", tokenizer, 1024)
    ranks = distributed.Distributed(torch.device("cpu"))
    losses: dict[str, float] = {}
    for kind in ("plain", "int8", "int4"):
        model = load_model(folder, torch.bfloat16, tokenizer=tokenizer, weights=kind)
        losses[kind] = step.evaluate(model, rows, ranks, 4).metrics["val_loss"]
        change = losses[kind] / losses["plain"] - 1
        print(f"{kind}: {losses[kind]:.4f} nats per target, {change:+.2%}", flush=True)
    print(json.dumps(losses))


if __name__ == "__main__":
    cli.run(main)
