"""Tokens a second, and seconds to the first one, beside transformers and llama.cpp, on random weights.

    python -m bench.generate --peers PYTHON    of a virtual environment with requirements-peers.txt; the last line is JSON

A model of the 1.1B shape (TinyLlama's) is made in a temporary folder of 6 GB. Each engine is a process of its own, one after another,
twice; the better figure counts, because others can only take from it. Refuses a busy machine.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import cli
from bench.step import ROOT, usage
from cli import UserError
from inference import generate
from model import ModelConfig, Transformer
from weights.load import load_model
from weights.save import save_model
from weights.tokenizer import load_tokenizer

SHAPE = ModelConfig(32002, 2048, 5632, 22, 32, 4, 64, 2048)
PROMPT, NEW, AGAIN = 512, 32, 20  # tokens of a conversation, of an answer, of what is said next
OURS, PEERS = ("bf16", "int8", "int4"), ("bf16", "q8_0", "q4_0")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument(
        "--layers", type=int, default=SHAPE.num_hidden_layers, help="fewer, to try this script"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        engine, kind, folder = json.loads(options.job)
        print(json.dumps({"ours": ours, "transformers": reference}[engine](kind, Path(folder))))
        return
    before = usage()
    time.sleep(3)
    after = usage()
    if (busy := 1 - (after[1] - before[1]) / max(1, after[0] - before[0])) > 0.2:
        raise UserError(
            f"others use {busy:.0%} of the processors", "Wait until the machine is idle."
        )
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), dataclasses.replace(SHAPE, num_hidden_layers=options.layers))
        jobs = [("ours", kind) for kind in OURS] + [("transformers", "bf16")]
        if options.peers:
            subprocess.run([options.peers, ROOT / "bench" / "llama.py", folder, "make"], check=True)
            jobs += [("llama.cpp", kind) for kind in PEERS]
        found = {}
        for engine, kind in jobs * 2:
            command = [
                sys.executable,
                "-m",
                "bench.generate",
                "--job",
                json.dumps([engine, kind, folder]),
            ]
            if engine == "llama.cpp":
                command = [options.peers, ROOT / "bench" / "llama.py", folder, kind]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            got, name = json.loads(done.stdout.splitlines()[-1]), f"{engine} {kind}"
            print(
                f"{name:18}" + "  ".join(f"{what} {value:.2f}" for what, value in got.items()),
                flush=True,
            )
            old = found.get(name, got)
            found[name] = {
                what: (max if "per_s" in what else min)(old[what], value)
                for what, value in got.items()
            }
    print(json.dumps(found))


def make(folder, shape):
    torch.manual_seed(0)
    model = Transformer(shape).bfloat16()
    tokenizer = load_tokenizer(ROOT / "examples" / "base")
    save_model(model, folder, tokenizer)
    tokenizer.save(folder)


def conversation(seed):
    return torch.randint(3, 7000, (PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()


def ours(kind, folder):

    tokenizer = load_tokenizer(folder)
    began = time.perf_counter()
    model = load_model(str(folder), torch.bfloat16, weights="plain" if kind == "bf16" else kind)
    loaded = time.perf_counter()
    decoder = generate.Decoder(model, tokenizer, 1024, compiled=True)
    compiled = time.perf_counter()
    decoder.forward(conversation(1))
    firsts, again, steps = [], [], []
    for seed in (2, 3, 4):
        ids = conversation(seed)
        firsts.append(took(decoder.forward, ids))
        steps += [took(decoder.forward, ids := [*ids, 5]) for _ in range(NEW)]
        again.append(took(decoder.forward, ids + conversation(9)[:AGAIN]))
    found = summary(firsts, steps, again)
    table = model.model.embed_tokens.weight  # of which a token reads one row
    read = sum(
        x.nbytes
        for x in (*model.parameters(), *model.buffers())
        if x is not table or table is model.lm_head.weight
    )
    return found | {
        "gb_per_s": read * found["tok_per_s"] / 1e9,
        "load_s": loaded - began,
        "compile_s": compiled - loaded,
    }


def took(run, *given):
    began = time.perf_counter()
    run(*given)
    return time.perf_counter() - began


def summary(firsts, steps, again):
    first, step = statistics.median(firsts), statistics.median(steps)
    return {
        "tok_per_s": 1 / step,
        "first_token_s": first,
        "second_turn_s": statistics.median(again),
    }


def reference(kind, folder):
    """transformers' generate: two lengths apart give the time of a token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(ids, new):
        return model.generate(
            torch.tensor([ids]),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )

    run(conversation(1)[:16], 2)
    firsts, steps = [], []
    for seed in (2, 3, 4):
        firsts.append(took(run, conversation(seed), 1))
        steps.append((took(run, conversation(seed), 1 + NEW) - firsts[-1]) / NEW)
    return summary(firsts, steps, firsts)  # it keeps no cache from one call to the next


if __name__ == "__main__":
    cli.run(main)
