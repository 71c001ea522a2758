"""Measure many replies at once beside transformers and llama.cpp: tokens/s, time to first token.

    python -m bench.batch build/smollm2 --peers PYTHON     a real model
    python -m bench.batch --peers PYTHON                   random weights of TinyLlama's shape, 1.1B

PYTHON is that of a virtual environment with requirements-peers.txt. Every number of `--at-once`
replies begins at the same time, each with a prompt of its own; nothing ends early. Ours is the
DecodeBatch that answers in the server; llama.cpp decodes a token of each reply in one call, as its
own server does (llama-cpp-python's answers one request after another); transformers generates a
batch. `joins_s`: the first token of a request that comes while the others are answered.

Each engine is a process of its own. The rounds go through them in turn, and the better figure
counts, because other work can only slow one down. Refuses a busy machine. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cli
from bench.generate import CONFIG, refuse_busy_machine, save_random_model
from bench.step import ROOT
from cli import UserError
from inference import generate
from weights.load import load_model
from weights.tokenizer import load_tokenizer

JOBS = [
    ("ours", "bf16"),
    ("ours", "int8"),
    ("transformers", "bf16"),
    ("llama.cpp", "bf16"),
    ("llama.cpp", "q8_0"),
]
Figures = dict[str, dict[str, float]]  # by number of replies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a model folder; without it random weights")
    parser.add_argument("--peers", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--reply", type=int, default=32, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="run on a busy machine, to try it")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        engine, weights, folder = json.loads(options.job)
        measure = {"ours": measure_ours, "transformers": measure_transformers}[engine]
        print(json.dumps(measure(weights, Path(folder), options)))
        return
    if options.reply <= max(options.at_once):
        raise UserError(
            f"--reply {options.reply}: the first replies would end before the last begins",
            f"Give more than the most at once, {max(options.at_once)}.",
        )
    if not options.busy:
        refuse_busy_machine()
    with tempfile.TemporaryDirectory() as temporary:
        if not options.model:
            save_random_model(Path(temporary), CONFIG)
        compare(options, Path(options.model or temporary).resolve(), Path(temporary))


def compare(options: argparse.Namespace, folder: Path, temporary: Path) -> None:
    """Run every engine; print the best figures of each. GGUF files go to `temporary`."""
    jobs = [job for job in JOBS if options.peers or job[0] != "llama.cpp"]
    numbers = [str(number) for number in options.at_once]
    settings = ["--prompt", str(options.prompt), "--reply", str(options.reply)]
    llama_cpp = [str(options.peers), str(ROOT / "bench" / "llama.py"), str(folder)]
    if options.peers:
        subprocess.run([*llama_cpp, "make", str(temporary), "BF16", "Q8_0"], check=True)
    best: dict[str, Figures] = {}
    for engine, weights in jobs * options.rounds:
        job = json.dumps([engine, weights, str(folder)])
        ours = [sys.executable, "-m", "bench.batch", "--job", job, *settings, "--at-once", *numbers]
        sizes = [str(options.prompt), str(options.reply), *numbers]
        theirs = [*llama_cpp, "batch", str(temporary / f"{weights}.gguf"), *sizes]
        command = theirs if engine == "llama.cpp" else ours
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        figures: Figures = json.loads(done.stdout.splitlines()[-1])
        name = f"{engine} {weights}"
        print_figures(name, figures)
        for number, row in figures.items():
            for figure, value in best.get(name, figures)[number].items():
                better = max if "per_s" in figure else min
                row[figure] = better(value, row[figure])
        best[name] = figures
    print("\nthe better figures:")
    for name, figures in best.items():
        print_figures(name, figures)
    print(json.dumps(best))


def print_figures(name: str, figures: Figures) -> None:
    for number, row in figures.items():
        shown = "  ".join(f"{figure} {value:7.2f}" for figure, value in row.items())
        print(f"{name:18}{number:>3} at once  {shown}", flush=True)


def random_prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, min(7000, vocab_size), (length,), generator=generator).tolist()


def measure_ours(weights: str, folder: Path, options: argparse.Namespace) -> Figures:
    model = load_model(
        str(folder), torch.bfloat16, weights="plain" if weights == "bf16" else weights
    )
    size = options.prompt + options.reply + 1
    tokenizer, slots = load_tokenizer(folder), max(options.at_once)
    decoder = generate.Decoder(model, tokenizer, size, compile=True, slots=slots)
    decoder.stop_ids = set()  # every reply has its whole length
    batch = generate.DecodeBatch(decoder)
    seeds = iter(range(10**6))

    def add(length: int) -> generate.BatchRow:
        seed = next(seeds)
        prompt = random_prompt(options.prompt, seed, model.config.vocab_size)
        return batch.add(prompt, length, generator=torch.Generator().manual_seed(seed))

    def first_token(row: generate.BatchRow) -> float:
        start = time.perf_counter()
        while not row.ids:
            batch.step()
        return time.perf_counter() - start

    figures: Figures = {}
    for number in [options.at_once[0], *options.at_once]:  # the first one also warms up
        rows = [add(options.reply) for _ in range(number)]
        start = time.perf_counter()
        begun = first_token(rows[-1])
        before = sum(len(row.ids) for row in rows)
        decoding = time.perf_counter()
        while len(batch.rows) == number:
            batch.step()
        steps = time.perf_counter() - decoding
        written = sum(len(row.ids) for row in rows) - before
        while batch.rows:
            batch.step()
        figures[str(number)] = {
            "tok_per_s": written / steps,
            "all_tok_per_s": number * options.reply / (time.perf_counter() - start),
            "last_begins_s": begun,
        }
        others = [add(options.reply) for _ in range(number - 1)]
        while any(not row.ids for row in others):
            batch.step()
        figures[str(number)]["joins_s"] = first_token(add(2))
        batch.clear()
    return figures


def measure_transformers(weights: str, folder: Path, options: argparse.Namespace) -> Figures:
    """Time transformers' `generate` of a batch: two lengths give the time of a step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(number: int, num_tokens: int) -> None:
        seeds = range(number)
        prompts = [random_prompt(options.prompt, seed, model.config.vocab_size) for seed in seeds]
        model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(number, options.prompt, dtype=torch.long),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )

    run(options.at_once[0], 2)
    figures: Figures = {}
    for number in options.at_once:
        first = statistics.median(seconds(run, number, 1) for _ in range(2))
        whole = seconds(run, number, options.reply)
        figures[str(number)] = {
            "tok_per_s": number * (options.reply - 1) / (whole - first),
            "all_tok_per_s": number * options.reply / whole,
            "last_begins_s": first,  # nobody joins a batch
        }
    return figures


def seconds(run: Callable, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main)
