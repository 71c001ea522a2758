"""Measure tokens/s and time to first token beside transformers and llama.cpp.

    python -m bench.generate --peers PYTHON                                 random weights, 1.1B
    python -m bench.generate --peers PYTHON --model FOLDER --gguf FILE      a model and its GGUF

PYTHON is that of a virtual environment with requirements-peers.txt; the last line printed is JSON.
The random model has TinyLlama's shape and takes 6 GB in a temporary folder. Each engine runs in a
process of its own, one after another, twice; the better figure counts, because other work can only
slow one down. Refuses a busy machine.
"""

import argparse
import dataclasses
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
from bench.step import ROOT, usage
from cli import UserError
from inference import generate
from model import ModelConfig, Transformer
from weights.load import load_model
from weights.save import save_model
from weights.tokenizer import load_tokenizer

CONFIG = ModelConfig(32002, 2048, 5632, 22, 32, 4, 64, 2048)
PROMPT_TOKENS = 512
REPLY_TOKENS = 32
SECOND_TURN_TOKENS = 20
OUR_WEIGHTS = ("bf16", "int8", "int4")
LLAMA_CPP_WEIGHTS = ("bf16", "q8_0", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--model", help="a model's folder instead of random weights")
    parser.add_argument("--gguf", help="the same model for llama.cpp")
    parser.add_argument(
        "--layers", type=int, default=CONFIG.num_hidden_layers, help="fewer, to try this script"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        engine, weights, folder = json.loads(options.job)
        measure = {"ours": measure_ours, "transformers": measure_transformers}[engine]
        print(json.dumps(measure(weights, Path(folder))))
        return
    refuse_busy_machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or temporary
        jobs = [("ours", weights) for weights in OUR_WEIGHTS] + [("transformers", "bf16")]
        llama_cpp = [options.peers, ROOT / "bench" / "llama.py", folder]
        if not options.model:
            config = dataclasses.replace(CONFIG, num_hidden_layers=options.layers)
            save_random_model(Path(folder), config)
            if options.peers:
                precisions = [weights.upper() for weights in LLAMA_CPP_WEIGHTS]
                subprocess.run([*llama_cpp, "make", folder, *precisions], check=True)
                ggufs = [f"{folder}/{weights}.gguf" for weights in LLAMA_CPP_WEIGHTS]
                jobs += [("llama.cpp", gguf) for gguf in ggufs]
        elif options.peers and options.gguf:
            jobs.append(("llama.cpp", options.gguf))
        best: dict[str, dict[str, float]] = {}
        for engine, weights in jobs * 2:
            job = json.dumps([engine, weights, folder])
            command = [sys.executable, "-m", "bench.generate", "--job", job]
            if engine == "llama.cpp":
                command = [*llama_cpp, "one", weights]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            name = f"{engine} {Path(weights).name[-12:]}"
            shown = "  ".join(f"{figure} {value:.2f}" for figure, value in figures.items())
            print(f"{name:18}{shown}", flush=True)
            previous = best.get(name, figures)
            for figure, value in figures.items():
                better = max if "per_s" in figure else min
                figures[figure] = better(previous[figure], value)
            best[name] = figures
    print(json.dumps(best))


def refuse_busy_machine() -> None:
    before = usage()
    time.sleep(3)
    after = usage()
    busy = 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
    if busy > 0.2:
        raise UserError(
            f"others use {busy:.0%} of the processors", "Wait until the machine is idle."
        )


def save_random_model(folder: Path, config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(config).bfloat16()
    tokenizer = load_tokenizer(ROOT / "examples" / "base")
    save_model(model, folder, tokenizer)
    tokenizer.save(folder)


def random_prompt(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 7000, (PROMPT_TOKENS,), generator=generator).tolist()


def measure_ours(weights: str, folder: Path) -> dict[str, float]:
    tokenizer = load_tokenizer(folder)
    start = time.perf_counter()
    model = load_model(
        str(folder), torch.bfloat16, weights="plain" if weights == "bf16" else weights
    )
    loaded = time.perf_counter()
    decoder = generate.Decoder(model, tokenizer, 1024, compile=True)
    compiled = time.perf_counter()
    decoder.next_logits(random_prompt(1))
    prefills: list[float] = []
    steps: list[float] = []
    second_turns: list[float] = []
    for seed in (2, 3, 4):
        ids = random_prompt(seed)
        prefills.append(seconds(decoder.next_logits, ids))
        for _ in range(REPLY_TOKENS):
            ids = [*ids, 5]
            steps.append(seconds(decoder.next_logits, ids))
        ids = ids + random_prompt(9)[:SECOND_TURN_TOKENS]
        second_turns.append(seconds(decoder.next_logits, ids))
    figures = summary(prefills, steps, second_turns)
    bytes_read = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    embeddings = model.model.embed_tokens.weight
    if embeddings is not model.lm_head.weight:
        bytes_read -= embeddings.nbytes  # a token reads one row
    figures["gb_per_s"] = bytes_read * figures["tok_per_s"] / 1e9
    figures["load_s"] = loaded - start
    figures["compile_s"] = compiled - loaded
    return figures


def measure_transformers(weights: str, folder: Path) -> dict[str, float]:
    """Time transformers' `generate`: two lengths give the time of a token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(ids: list[int], num_tokens: int):
        model.generate(
            torch.tensor([ids]),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )

    run(random_prompt(1)[:16], 2)
    prefills, steps = [], []
    for seed in (2, 3, 4):
        prefills.append(seconds(run, random_prompt(seed), 1))
        whole = seconds(run, random_prompt(seed), 1 + REPLY_TOKENS)
        steps.append((whole - prefills[-1]) / REPLY_TOKENS)
    return summary(prefills, steps, prefills)  # it keeps no cache between calls


def seconds(run: Callable, *args) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def summary(
    prefills: list[float], steps: list[float], second_turns: list[float]
) -> dict[str, float]:
    return {
        "tok_per_s": 1 / statistics.median(steps),
        "first_token_s": statistics.median(prefills),
        "second_turn_s": statistics.median(second_turns),
    }


if __name__ == "__main__":
    cli.run(main)
