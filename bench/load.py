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
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cli import read_json, write_json
from model import ModelConfig, Transformer
from training import distributed, step
from weights import hf, shards
from weights.load import load_model

SMALL = ModelConfig(32000, 1024, 3584, 16, 16, 4, 64)
MISTRAL_7B = ModelConfig(32000, 4096, 14336, 32, 32, 8, 128)
FILE_BYTES = 4 << 30
SPARE = 1.15  # times the model's bytes must be free
SIDES = ("ours", "transformers")
LORA = {"rank": 8, "rows": [32000, 32001]}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def main() -> None:
    options = parse_options()
    if options.job:
        name, side, folder = options.job
        job = {"load": time_load, "logits": save_logits, "rank": load_as_rank}[name]
        figures = job(side, Path(folder))
        if figures:
            print(json.dumps(figures))
        return
    config = MISTRAL_7B if options.full else SMALL
    check_room(2 * config.num_parameters)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_random_model(config, folder)
        files = [*folder.glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)

        loads: dict[str, list[dict]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES if number % 2 else reversed(SIDES):
                for file in files:
                    prepare_file_cache(file, options.cold)
                loads[side].append(run_job("load", side, folder))
        for side in SIDES:
            run_job("logits", side, folder)
        logits = compare_logits(folder)
        run_job("rank", "ours", folder, launcher=TORCHRUN)
        ranks = [read_json(folder / f"rank{rank}.json") for rank in range(2)]

    result = {"file_gb": size / 1e9, "cold": options.cold, "logits": logits}
    for side in SIDES:
        result[side] = report_loads(side, loads[side], size)
    report_logits(logits)
    limit = size / 2 + 2 * config.vocab_size * config.hidden_size
    for number, rank in enumerate(ranks):
        print(
            f"rank {number} of 2: {rank['bytes'] / 1e9:.3f} GB in {rank['seconds']:.1f} s; half of "
            f"the file and its largest tensor are {limit / 1e9:.3f}"
        )
    print(json.dumps(result | {"ranks": ranks, "limit": limit}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--full", action="store_true", help="Mistral-7B's shape")
    add("--cold", action="store_true", help="drop the files from the cache before each load")
    add("--rounds", type=int, default=5)
    add("--job", nargs=3, help=argparse.SUPPRESS)  # a name, a side, the folder
    return parser.parse_args()


def check_room(model_bytes: int) -> None:
    """Exit if the disk or the memory can't hold the model."""
    free = {
        "disk": shutil.disk_usage(tempfile.gettempdir()).free,
        "memory": read_kib("/proc/meminfo", "MemAvailable"),
    }
    needed = SPARE * model_bytes
    for kind, free_bytes in free.items():
        if free_bytes < needed:
            sys.exit(
                f"{needed / 1e9:.1f} GB of {kind} are needed, {free_bytes / 1e9:.1f} GB are free"
            )


def read_kib(path: str, name: str) -> int:
    """Return the bytes in a line of /proc such as `VmHWM: 1234 kB`."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def peak_bytes(name: str = "VmHWM") -> int:
    """Return the peak of resident bytes. (getrusage starts with the parent process's figure.)"""
    return read_kib("/proc/self/status", name)


def prepare_file_cache(path: Path, cold: bool) -> None:
    """Have the file read, or let the system forget what it read."""
    with open(path, "rb") as file:
        if cold:
            os.fsync(file.fileno())  # what isn't on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while file.read(1 << 24):
            pass


def run_job(name: str, side: str, folder: Path, launcher: tuple[str, ...] = ()) -> dict | None:
    """Run a job in processes of its own. Return the figures that it prints, if any."""
    command = [sys.executable, *launcher, "-m", "bench.load", "--job", name, side, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) if done.stdout else None


def write_random_model(config: ModelConfig, folder: Path) -> None:
    """Write random weights as a HF folder in bf16, with no more than a file's in memory."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for name, shape in shapes.items():
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        is_last = name == [*shapes][-1]
        if is_last or sum(tensor.nbytes for tensor in tensors.values()) > FILE_BYTES:
            file = f"model-{len({*weight_map.values()}):05}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file))
            tensors = {}
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    raw_config = {key: value for key, value in vars(config).items() if value is not None}
    raw_config |= {"architectures": ["MistralForCausalLM"], "dtype": "bfloat16"}
    write_json(folder / "config.json", raw_config | {"sliding_window": None})


# --- jobs, each a process of its own


def make_loader(side: str, folder: Path) -> Callable[[], nn.Module]:
    """Return a function that loads. What it needs is imported already."""
    if side == "ours":
        return functools.partial(load_model, folder, torch.bfloat16)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return functools.partial(
        transformers.MistralForCausalLM.from_pretrained, folder, dtype=torch.bfloat16
    )


def time_load(side: str, folder: Path) -> dict:
    """Load once. Return seconds and bytes of loading, and of both with a first token."""
    load = make_loader(side, folder)
    with torch.device("meta"):
        Transformer(SMALL)  # a process's first model imports more of torch: half a second
    bytes_before, started = peak_bytes(), time.perf_counter()
    model = load()
    load_seconds, load_bytes = time.perf_counter() - started, peak_bytes() - bytes_before
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))  # a weight that was only mapped is read here
    return {
        "load_seconds": load_seconds,
        "token_seconds": time.perf_counter() - started,
        "load_bytes": load_bytes,
        "bytes": peak_bytes() - bytes_before,
    }


@torch.no_grad()
def save_logits(side: str, folder: Path) -> None:
    """Save the logits (2, T, V) after a prompt, in bf16 and in float32."""
    model = make_loader(side, folder)()
    ids = torch.randint(0, 32000, (1, 24), generator=torch.Generator().manual_seed(0))
    outputs = [model(ids)]
    for module in model.modules():  # float32 weights, those of one layer at a time
        if module._parameters:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)
    if side == "ours":
        model.dtype = torch.float32
    outputs.append(model(ids))
    logits = [getattr(output, "logits", output).float() for output in outputs]
    save_file({"logits": torch.cat(logits)}, folder / f"{side}.logits")


def widen(module: nn.Module, _) -> None:
    module.bf16_parameters = dict(module._parameters)
    for name, parameter in module.bf16_parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.float(), False)


def narrow(module: nn.Module, *_) -> None:
    module._parameters.update(module.bf16_parameters)


def load_as_rank(_, folder: Path) -> None:
    """As one of two ranks, save the peak bytes and the seconds of loading, adapter not counted."""
    ranks = distributed.init_distributed("cpu")
    spec = step.ModelSpec(LORA)
    # A first model, so that what is imported late isn't counted.
    step.build_model(ModelConfig(32002, 64, 64, 1, 2, 2, 32), ranks, spec)
    bytes_before, started = peak_bytes("VmRSS"), time.perf_counter()
    config = hf.with_vocab_size(hf.read_config(folder), 32002)
    model = step.build_model(config, ranks, spec, folder)
    adapter = sum(shards.local_shard(p)[0].nbytes for p in model.parameters() if p.requires_grad)
    held, seconds = peak_bytes() - bytes_before - adapter, time.perf_counter() - started
    write_json(folder / f"rank{ranks.rank}.json", {"bytes": held, "seconds": seconds})
    ranks.barrier()


# --- results


def compare_logits(folder: Path) -> dict[str, float]:
    """Return the largest difference over the deviation, and how often one token is likeliest."""
    (ours, ours_fp32), (theirs, theirs_fp32) = (
        load_file(folder / f"{side}.logits")["logits"] for side in SIDES
    )
    pairs = {
        "float32": (ours_fp32, theirs_fp32),
        "bf16": (ours, theirs),
        "ours_bf16": (ours, theirs_fp32),
        "theirs_bf16": (theirs, theirs_fp32),
    }
    figures = {}
    for name, (a, b) in pairs.items():
        figures[name] = float((a - b).abs().max() / theirs_fp32.std())
        figures[f"same_{name}"] = float((a.argmax(-1) == b.argmax(-1)).float().mean())
    return figures


def report_logits(figures: dict[str, float]) -> None:
    print(
        "logits: largest difference over their deviation, and the share of positions with the "
        "same likeliest token"
    )
    for name in ("float32", "bf16", "ours_bf16", "theirs_bf16"):
        print(f"  {name:<12} {figures[name]:.1e}  {figures[f'same_{name}']:.0%}")


def report_loads(side: str, loads: list[dict], size: int) -> dict[str, float]:
    """Print and return the medians of a side, memory as a share of the file's `size`."""
    median = {key: statistics.median(load[key] for load in loads) for key in loads[0]}
    rate = size / 1e6 / median["token_seconds"]
    load_memory, memory = median["load_bytes"] / size, median["bytes"] / size
    print(
        f"{side:<13} {median['load_seconds']:6.2f} s to load, {load_memory:.3f} of the file in "
        f"memory; with a first token {median['token_seconds']:6.2f} s ({rate:,.0f} MB/s), "
        f"{memory:.3f}"
    )
    times = {key: median[key] for key in ("load_seconds", "token_seconds")}
    return times | {"mb_per_s": rate, "load_memory": load_memory, "memory": memory}


if __name__ == "__main__":
    main()
