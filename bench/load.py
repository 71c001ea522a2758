"""Time and memory of loading a model folder on a CPU, beside transformers' from_pretrained.

    python -m bench.load           a random Mistral of about 500 MB in bf16, made for it
    python -m bench.load --full    one of Mistral-7B's shape, 14.5 GB, if disk and memory have room
    python -m bench.load --cold    from the disk, not from the file cache

Each load is a process of its own on the same folder, in turn; unless --cold, the files were read
once before. Mapped weights cost their time when they are used, so the first token is timed too.
Memory is the peak of resident bytes, mapped pages included, minus what was there before.

Then, once: both sides' logits after the same ids, in bf16 and in float32 from the same bf16
weights; and the frozen base of `train.py --lora` loaded by two ranks, each rank's memory beside
half of the file and its largest tensor. The last line is JSON.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import ModelConfig, Transformer
from training import distributed, step
from weights import hf, shards
from weights.load import load_model

SMALL = ModelConfig(32000, 1024, 3584, 16, 16, 4, 64)
MISTRAL_7B = ModelConfig(32000, 4096, 14336, 32, 32, 8, 128)
FILE_BYTES = 4 << 30
ROUNDS = 5
LORA = {"rank": 8, "rows": [32000, 32001]}


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
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    said = {key: value for key, value in vars(shape).items() if value is not None}
    said |= {"architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(said))


def loader(who, folder):
    """A function that loads, whatever it needs imported."""
    if who == "ours":
        return lambda: load_model(folder, torch.bfloat16)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return functools.partial(
        transformers.MistralForCausalLM.from_pretrained, folder, dtype=torch.bfloat16
    )


def load(who, folder):
    """Load once in this process. → seconds and bytes, to load and with a first token"""
    act = loader(who, folder)
    with torch.device("meta"):
        Transformer(
            SMALL
        )  # the first model of a process imports what torch imports late, half a second
    before, begin = peak(), time.perf_counter()
    model = act()
    loaded, held = time.perf_counter() - begin, peak() - before
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))  # a weight that was only mapped is read here
    return {
        "load": loaded,
        "token": time.perf_counter() - begin,
        "held": held,
        "bytes": peak() - before,
    }


@torch.no_grad()
def logits(who, folder):
    """Save the logits (2, T, V) after a prompt, in bf16 and in float32."""
    model, ids = (
        loader(who, folder)(),
        torch.randint(0, 32000, (1, 24), generator=torch.Generator().manual_seed(0)),
    )
    found = [model(ids)]
    for module in model.modules():  # float32 weights, those of one layer at a time
        if module._parameters:
            module.register_forward_pre_hook(lambda module, _: widen(module))
            module.register_forward_hook(
                lambda module, *_: module._parameters.update(module.narrow)
            )
    if who == "ours":
        model.dtype = torch.float32
    found.append(model(ids))
    save_file(
        {"logits": torch.cat([getattr(x, "logits", x).float() for x in found])},
        Path(folder) / f"{who}.logits",
    )


def widen(module):
    module.narrow = {**module._parameters}
    module._parameters.update(
        {
            name: p if p is None else torch.nn.Parameter(p.float(), False)
            for name, p in module.narrow.items()
        }
    )


def agreement(folder):
    """Compare two files of `logits`: largest relative difference, same likeliest token."""
    (ours, exact), (theirs, reference) = (
        load_file(Path(folder) / f"{who}.logits")["logits"] for who in ("ours", "transformers")
    )
    pairs = {
        "float32": (exact, reference),
        "bf16": (ours, theirs),
        "ours_bf16": (ours, reference),
        "theirs_bf16": (theirs, reference),
    }
    found = {name: float((a - b).abs().max() / reference.std()) for name, (a, b) in pairs.items()}
    return found | {
        f"same_{name}": float((a.argmax(-1) == b.argmax(-1)).float().mean())
        for name, (a, b) in pairs.items()
    }


def share(folder):
    """As one of two ranks, print the peak bytes of loading, without its part of the adapter."""

    ranks = distributed.init_distributed("cpu")
    spec = step.ModelSpec(LORA)
    # A first model, so that what is imported late isn't counted.
    step.build_model(ModelConfig(32002, 64, 64, 1, 2, 2, 32), ranks, spec)
    before, begin = peak("VmRSS"), time.perf_counter()
    model = step.build_model(hf.with_vocab_size(hf.read_config(folder), 32002), ranks, spec, folder)
    adapter = sum(shards.local_shard(p)[0].nbytes for p in model.parameters() if p.requires_grad)
    Path(folder, f"rank{ranks.rank}.json").write_text(
        json.dumps([peak() - before - adapter, time.perf_counter() - begin]), encoding="utf-8"
    )
    ranks.barrier()


def peak(what="VmHWM"):
    """Return the peak of resident bytes. (getrusage starts with the parent process's figure.)"""
    return next(
        int(line.split()[1]) * 1024
        for line in open("/proc/self/status", encoding="utf-8")
        if line.startswith(what)
    )


def cache(file, cold):
    """Have the file read, or let the system forget what it read."""
    with open(file, "rb") as whole:
        if cold:
            os.fsync(whole.fileno())  # what isn't on the disk yet would stay
            os.posix_fadvise(whole.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while not cold and whole.read(1 << 24):
            pass


def child(*words, launch=()):
    """The last line that a process of its own prints."""
    command = [sys.executable, *launch, "-m", "bench.load", "--one", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="Mistral-7B's shape")
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the cache before each load"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, *given = options.one
        print(
            json.dumps(
                {"load": load, "logits": logits, "share": lambda who, folder: share(folder)}[what](
                    *given
                )
            )
        )
        return
    shape = MISTRAL_7B if options.full else SMALL
    need, room = 2 * shape.num_parameters, shutil.disk_usage(tempfile.gettempdir()).free
    memory = next(
        int(line.split()[1]) * 1024
        for line in open("/proc/meminfo", encoding="utf-8")
        if line.startswith("MemAvailable")
    )
    for what, there in (("disk", room), ("memory", memory)):
        if there < 1.15 * need:
            print(
                f"skipped: {1.15 * need / 1e9:.1f} GB of {what} are needed, "
                f"{there / 1e9:.1f} GB are free"
            )
            return
    with tempfile.TemporaryDirectory() as folder:
        make(shape, Path(folder))
        files = [*Path(folder).glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        runs = {"ours": [], "transformers": []}
        for number in range(options.rounds):
            for who in runs if number % 2 else reversed(runs):
                for file in files:
                    cache(file, options.cold)
                runs[who].append(json.loads(child("load", who, folder)))
        for who in runs:
            child("logits", who, folder)
        child(
            "share",
            "ours",
            folder,
            launch=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        )
        ranks = [
            json.loads(Path(folder, f"rank{rank}.json").read_text(encoding="utf-8"))
            for rank in range(2)
        ]
        found = agreement(folder)
    result = {"file_gb": size / 1e9, "cold": options.cold}
    for who, done in runs.items():
        alone, token, held, most = (
            statistics.median(run[key] for run in done)
            for key in ("load", "token", "held", "bytes")
        )
        rate = size / 1e6 / token
        print(
            f"{who:<13} {alone:6.2f} s to load, {held / size:.3f} of the file in memory; "
            f"with a first token {token:6.2f} s ({rate:,.0f} MB/s), {most / size:.3f}"
        )
        times = {"load_seconds": alone, "token_seconds": token, "mb_per_s": rate}
        result[who] = times | {"load_memory": held / size, "memory": most / size}
    print(
        "logits: largest difference over their deviation, and the share of positions with the "
        "same likeliest token"
    )
    for name in ("float32", "bf16", "ours_bf16", "theirs_bf16"):
        print(f"  {name:<12} {found[name]:.1e}  {found['same_' + name]:.0%}")
    limit = size / 2 + 2 * shape.vocab_size * shape.hidden_size
    for rank, (most, seconds) in enumerate(ranks):
        print(
            f"rank {rank} of 2: {most / 1e9:.3f} GB in {seconds:.1f} s; half of the file and its "
            f"largest tensor are {limit / 1e9:.3f}"
        )
    print(
        json.dumps(result | {"logits": found, "ranks": [most for most, _ in ranks], "limit": limit})
    )


if __name__ == "__main__":
    main()
