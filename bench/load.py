"""How fast a model folder loads on a CPU, and in how much memory: checkpoint.load_model beside transformers' from_pretrained.

    python -m bench.load           a random Mistral of some 500 MB in bf16, made for it
    python -m bench.load --full    one of Mistral-7B's shape, 14.5 GB, where disk and memory have room; skips with the reason otherwise

Each load is a process of its own on the same folder, in turn, after the files were read once, so that both find them in the file cache.
Weights that are only mapped cost their time when they are used: so the first token is timed too. Memory is the most that was resident,
mapped pages included, less what was before. The last line is JSON.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import ModelConfig, Transformer

SMALL = ModelConfig(32000, 1024, 3584, 16, 16, 4, 64)
MISTRAL_7B = ModelConfig(32000, 4096, 14336, 32, 32, 8, 128)
FILE_BYTES = 4 << 30
ROUNDS = 5


def make(shape, folder):
    """Random weights of `shape` as a HF folder in bf16, no more than a file in memory."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(shape).named_parameters()}
    batch, where = {}, {}

    def flush():
        name = f"model-{len({*where.values()}):05}.safetensors"
        where.update(dict.fromkeys(batch, name))
        save_file(batch, folder / name, metadata={"format": "pt"})
        batch.clear()

    for name, size in shapes.items():
        batch[name] = torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02)
        if sum(t.nbytes for t in batch.values()) > FILE_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    said = {key: value for key, value in vars(shape).items() if value is not None}
    said |= {"architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(said))


def load(who, folder):
    """Load once in this process → seconds to load, and with a first token; bytes"""
    if who == "ours":
        import checkpoint

        act = lambda: checkpoint.load_model(folder, torch.bfloat16)  # noqa: E731
    else:
        import transformers

        transformers.MistralForCausalLM  # noqa: B018  imported before the clock starts
        transformers.utils.logging.disable_progress_bar()
        act = lambda: transformers.MistralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # noqa: E731
    with torch.device("meta"):
        Transformer(SMALL)  # the first model of a process imports what torch imports late, half a second
    before, begin = peak(), time.perf_counter()
    model = act()
    loaded = time.perf_counter() - begin
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))  # a weight that was only mapped is read here
    return {"load": loaded, "token": time.perf_counter() - begin, "bytes": peak() - before}


def peak():
    """The most that was resident, in bytes; getrusage's figure begins with that of the process which started this one."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="Mistral-7B's shape")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(load(*options.one)))
        return
    shape = MISTRAL_7B if options.full else SMALL
    need, room = 2 * shape.num_parameters, shutil.disk_usage(tempfile.gettempdir()).free
    memory = next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    for what, there in (("disk", room), ("memory", memory)):
        if there < 2.2 * need:  # both sides may hold the file and as much again
            print(f"skipped: {2.2 * need / 1e9:.1f} GB of {what} are needed, {there / 1e9:.1f} GB are free")
            return
    with tempfile.TemporaryDirectory() as folder:
        make(shape, Path(folder))
        files = [*Path(folder).glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        for file in files:
            with open(file, "rb") as whole:
                while whole.read(1 << 24):
                    pass
        runs = {"ours": [], "transformers": []}
        for number in range(ROUNDS):
            for who in runs if number % 2 else reversed(runs):
                done = subprocess.run(
                    [sys.executable, "-m", "bench.load", "--one", who, folder], capture_output=True, text=True, check=True
                )
                runs[who].append(json.loads(done.stdout.splitlines()[-1]))
    result = {"file_gb": size / 1e9}
    for who, found in runs.items():
        alone, token, most = (statistics.median(run[key] for run in found) for key in ("load", "token", "bytes"))
        rate, share = size / 1e6 / token, most / size
        print(
            f"{who:<13} {alone:6.2f} s to load  {token:6.2f} s with a first token ({rate:,.0f} MB/s)  {share:5.2f} times the file in memory"
        )
        result[who] = {"load_seconds": alone, "token_seconds": token, "mb_per_s": rate, "memory": share}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
