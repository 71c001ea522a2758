"""What fewer bits cost: held-out loss of a model in bf16, int8 and int4.  python -m bench.weights MODEL DATA; the last line is JSON"""

import json
import sys
from pathlib import Path

import torch

import cli
import data
from training import distributed, step
from weights.load import load_model
from weights.tokenizer import load_tokenizer


def main():
    model, folder = sys.argv[1], Path(sys.argv[2])
    tokenizer = load_tokenizer(model)
    rows = data.load_rows(folder / "val.jsonl", tokenizer, 1024)
    ranks, found = distributed.Distributed(torch.device("cpu")), {}
    for kind in ("plain", "int8", "int4"):
        held = load_model(model, torch.bfloat16, tokenizer=tokenizer, weights=kind)
        found[kind] = step.evaluate(held, rows, ranks, 4).metrics["val_loss"]
        print(
            f"{kind}: {found[kind]:.4f} nats a target, {found[kind] / found['plain'] - 1:+.2%}",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
