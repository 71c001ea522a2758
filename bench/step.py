"""A training step beside transformers + PEFT: tokens/s, peak memory and losses.

    python -m bench.step                  LoRA and full fine-tuning of a small Mistral on the CPU
    python -m bench.step --base build/smollm2 --data data     the same, a real base and own rows

Both sides get the same packed rows and the same weights. It times the settings of the other side,
then ours and its fastest setting in turn, each in its own process; ratios are medians over the
rounds. Memory is a process's peak resident memory, Python and libraries included. The last line is
JSON. It refuses to time on a busy machine. bench/gpu.py uses both sides on a GPU.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import cli
import data
import lora
from cli import UserError, read_json, write_json
from model import ModelConfig, Transformer
from training import distributed, metrics, optim, step
from weights import hf, shards
from weights.load import load_model
from weights.save import save_model
from weights.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def sizes(hidden, layers, heads, kv_heads, head_dim, intermediate) -> dict:
    return dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
    )


SMALL = sizes(512, 8, 8, 2, 64, 1536)
BUSY = 0.15  # share of the processors that others may use while we time
RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-4, "pure": 1e-4}
ADAPTER = {"rank": 32, "alpha": 16}

# The settings of transformers + PEFT.
# rows: "packed" (position_ids restart at each document), "flat" (the same in one long row) or
# "padded" (a document a row, of similar lengths).
# at: rows or documents at a time. adapter: PEFT's default keeps it in fp32.
CPU = {
    "lora": [
        {"rows": "packed", "at": 4, "attention": "sdpa", "adapter": "bf16"},
        {"rows": "packed", "at": 4, "attention": "sdpa", "adapter": "fp32"},
        {"rows": "packed", "at": 4, "attention": "eager", "adapter": "bf16"},
        {"rows": "packed", "at": 1, "attention": "sdpa", "adapter": "bf16"},
        {"rows": "flat", "at": 4, "attention": "sdpa", "adapter": "bf16"},
        {"rows": "padded", "at": 8, "attention": "sdpa", "adapter": "bf16"},
        {"rows": "padded", "at": 4, "attention": "sdpa", "adapter": "bf16"},
        {"rows": "padded", "at": 2, "attention": "sdpa", "adapter": "bf16"},
    ],
    "full": [
        {"rows": "packed", "at": 4, "attention": "sdpa", "weights": "bf16"},
        {"rows": "packed", "at": 4, "attention": "sdpa", "weights": "fp32"},
        {"rows": "padded", "at": 8, "attention": "sdpa", "weights": "bf16"},
        {"rows": "padded", "at": 4, "attention": "sdpa", "weights": "bf16"},
        {"rows": "padded", "at": 2, "attention": "sdpa", "weights": "bf16"},
    ],
}
# Not a setting of a trainer, but possible by hand with forward's arguments: logits of labelled
# tokens alone. Shown, but not compared with.
BY_HAND = {
    "lora": {"rows": "packed", "at": 1, "attention": "sdpa", "adapter": "bf16", "head": "labelled"}
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=6, help="of a timed process; the first is not counted")
    add("--rounds", type=int, default=3)
    add("--kinds", default="lora,full")
    add("--base", help="a model folder, instead of random weights (CPU)")
    add("--data", help="a folder that data.py wrote, instead of the example export (CPU)")
    add("--at", type=int, default=2, help="rows that ours takes at a time")
    add("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(json.loads(options.job))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        on_cpu(scratch, options)


def run(scratch, **job) -> dict | None:
    """Run one process. Return its figures, None if it failed."""
    job = {"work": str(scratch), **job}
    command = [sys.executable, "-m", "bench.step", "--job", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-1500:], flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def name(setting: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


# --- on a CPU


def on_cpu(scratch, options):
    prepare(Path(scratch), SMALL, rows=4, base=options.base, folder=options.data)
    print(
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"base {options.base or 'random, small'}"
    )
    load, results = 0.0, {}
    for kind in options.kinds.split(","):
        results[kind], busy = compare(kind, scratch, options)
        load = max(load, busy)
    print(json.dumps({**results, "load": round(load, 3)}))


def compare(kind, scratch, options) -> tuple[dict, float]:
    """Compare ours with their fastest setting. Return figures, and the highest load before one."""
    load = []

    def timed(steps, **job):
        load.append(idle())
        return run(scratch, kind=kind, device="cpu", steps=steps, **job)

    library = "transformers + PEFT" if kind == "lora" else "transformers"
    print(f"{kind}: the settings of {library}: tokens/s, GiB, seconds a step")
    speeds, exact = [], None
    for setting in [*CPU[kind], *([BY_HAND[kind]] if kind in BY_HAND else [])]:
        fp32 = setting.get("weights") == "fp32"  # as ours: its losses are compared with ours
        result = timed(options.steps if fp32 else 3, who="theirs", setting=setting)
        exact = result if fp32 else exact
        figures = "  {tok_per_s:7,.0f}  {peak_gib:.2f}  {seconds:.2f}  ".format(**result)
        print(figures + name(setting), flush=True)
        if setting in CPU[kind]:
            speeds.append((result["tok_per_s"], setting))
    _, fastest = max(speeds, key=lambda pair: pair[0])

    rounds = []
    for _ in range(options.rounds):
        ours = timed(options.steps, who="ours", at=options.at)
        theirs = timed(options.steps, who="theirs", setting=fastest)
        rounds.append((ours, theirs))
        figures = "{tok_per_s:,.0f} tok/s, {peak_gib:.2f} GiB; "
        print(
            f"  ours {figures.format(**ours)}theirs {figures.format(**theirs)}"
            f"ratio {ours['tok_per_s'] / theirs['tok_per_s']:.2f}",
            flush=True,
        )
    exact = exact or rounds[0][1]
    losses = zip(rounds[0][0]["losses"], exact["losses"])
    print("  losses", *(f"{a:.4f}/{b:.4f}" for a, b in losses))

    def median(value):
        return statistics.median(value(ours, theirs) for ours, theirs in rounds)

    other = "peft_tok_per_s" if kind == "lora" else "transformers_tok_per_s"
    figures = {
        "ours_tok_per_s": round(median(lambda o, t: o["tok_per_s"])),
        other: round(median(lambda o, t: t["tok_per_s"])),
        "ratio": round(median(lambda o, t: o["tok_per_s"] / t["tok_per_s"]), 3),
        "memory_ratio": round(median(lambda o, t: o["peak_gib"] / t["peak_gib"]), 3),
        "loss_gap": round(max(gap(ours, exact) for ours, _ in rounds), 5),
    }
    return figures, max(load)


def gap(ours: dict, theirs: dict) -> float:
    return max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"]))


def idle() -> float:
    """Return the share of the processors in use. UserError if it is too much to time anything."""
    for _ in range(5):
        before = usage()
        time.sleep(1)
        after = usage()
        busy = 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
        if busy <= BUSY:
            return busy
    raise UserError(
        f"{busy:.0%} of the processors are in use: figures would mean nothing",
        "Run it again when the machine is idle.",
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    known = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join([*(names[:1] or ["a CPU"]), *known])


def usage() -> tuple[int, int]:
    """Return (all, idle) time of the processors since the start, in ticks."""
    line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    ticks = [int(n) for n in line.split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


# --- what both sides are given


def prepare(scratch: Path, config_sizes, rows, device="cpu", base=None, folder=None) -> None:
    """Put a base (random weights unless one is given), an adapter and sessions into `scratch`."""
    if base:
        (scratch / "base").symlink_to(Path(base).resolve())
        model = load_model(base, torch.bfloat16)
    else:
        model = random_base(scratch, config_sizes, device)
    lora.inject(model, **ADAPTER)
    (scratch / "adapter").mkdir()
    tensors = {key: p.detach().cpu() for key, p in lora.adapter_parameters(model).items()}
    lora.save(model, scratch / "adapter", scratch / "base", tensors)
    if folder:
        shutil.copytree(folder, scratch / "data")
    else:
        write_example_data(scratch / "data")
    (scratch / "rows").write_text(str(rows))


def write_example_data(folder):
    """Make a data folder of the example export. Return it."""
    export = ROOT / "examples" / "telegram" / "result.json"
    command = [sys.executable, ROOT / "data.py", export, "--out", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def random_base(scratch: Path, config_sizes, device) -> Transformer:
    """Write random weights to `scratch`/base, with Mistral's v1 tokenizer if it is installed."""
    config = ModelConfig(vocab_size=32002, max_position_embeddings=4096, **config_sizes)
    source = scratch / "tokenizer"
    source.mkdir()
    example = ROOT / "examples" / "base"
    shutil.copyfile(example / "config.json", source / "config.json")
    try:
        import mistral_common

        v1 = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
        shutil.copyfile(v1, source / "tokenizer.model")
    except ImportError:
        shutil.copyfile(example / "tokenizer_config.json", source / "tokenizer_config.json")
        write_json(source / "tokenizer.json", enlarged_vocabulary(config.vocab_size))
    tokenizer = load_tokenizer(source)
    model = random_model(config, distributed.Distributed(device), step.ModelSpec(pure_bf16=True))
    (scratch / "base").mkdir()
    save_model(model, scratch / "base", tokenizer)
    tokenizer.save(scratch / "base")
    return model


def enlarged_vocabulary(size: int) -> dict:
    """Return the example's tokenizer.json, filled up to `size` with tokens that no text gets."""
    tokenizer = read_json(ROOT / "examples" / "base" / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    for number in range(max(taken) + 1, size):
        vocabulary[f"unused {number}"] = number
    return tokenizer


def random_model(config: ModelConfig, ranks: distributed.Distributed, spec) -> Transformer:
    """Build a model with all its weights drawn on the device, where a 7B takes no time."""
    model = step.build_meta_model(config, ranks, spec)
    shards.materialize(model, ranks.device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.02)
        else:
            torch.nn.init.ones_(parameter)
    return model.train()


def step_rows(scratch, steps: int) -> list[list[data.Row]]:
    """Return the full rows of each step."""
    scratch = Path(scratch)
    rows = data.load_rows(scratch / "data" / "train.jsonl", load_tokenizer(scratch / "base"), 1024)
    rows = [row for row in rows if len(row.ids) == 1024]
    count = int((scratch / "rows").read_text())
    return [
        [rows[(count * number + i) % len(rows)] for i in range(count)] for number in range(steps)
    ]


# --- one process


def work(job) -> dict:
    device = torch.device(job["device"])
    steps = step_rows(job["work"], job["steps"])
    side = ours if job["who"] == "ours" else theirs
    times, losses, flops, graphs = side(job, device, steps)
    counted = times[1:] if device.type == "cpu" else times[4:]  # a GPU's first steps compile
    seconds = statistics.median(counted)
    return {
        "tok_per_s": sum(len(row.ids) for row in steps[0]) / seconds,
        "seconds": seconds,
        "peak_gib": metrics.peak_gib(device),
        "reserved_gib": reserved_gib(device),
        "losses": losses,
        "graphs": graphs,
        "mfu": flops / seconds / metrics.measure_peak_flops(device, torch.bfloat16),
    }


def reserved_gib(device: torch.device) -> float:
    """Return the most that the allocator took from the GPU; on a CPU the process's peak again."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return metrics.peak_gib(device)


def spec_of(kind: str, activation_checkpointing: str = "none") -> step.ModelSpec:
    return step.ModelSpec(
        adapter=ADAPTER if "lora" in kind else None,
        activation_checkpointing=activation_checkpointing,
        nf4=kind == "qlora",
        pure_bf16=kind == "pure",
    )


def ours(job, device, steps):
    """Return (seconds of each step, losses, FLOPs of a step, compiled graphs)."""
    ranks, model, optimizer = build_ours(job, device)
    times, losses = [], []
    for rows in steps:
        started = time.perf_counter()
        batches = step.micro_batches(rows, job["at"], ranks, 1024)
        loss, _, _ = step.train_step(model, optimizer, batches, ranks)
        metrics.synchronize(device)
        times.append(time.perf_counter() - started)
        losses.append(loss)
    graphs = metrics.count_compiled_graphs() if model.compiled else 0
    return times, losses, metrics.step_flops(model, steps[0])[0], graphs


def build_ours(job, device) -> tuple[distributed.Distributed, Transformer, torch.optim.Optimizer]:
    """Load our model, with the adapter that PEFT gets too, compiled on a GPU; its optimizer."""
    ranks, folder, kind = distributed.Distributed(device), Path(job["work"]), job["kind"]
    base, spec = folder / "base", spec_of(kind, job.get("recompute", "none"))
    model = step.build_model(hf.read_config(base), ranks, spec, base)
    if spec.adapter:
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        for key, parameter in lora.adapter_parameters(model).items():
            shards.copy_shard(parameter, tensors[lora.peft_name(key)])
    optimizer = optim.make_optimizer(model, RATES[kind], 0.0, spec.pure_bf16)
    if device.type == "cuda":
        step.compile_model(model, optimizer)
    return ranks, model, optimizer


def theirs(job, device, steps):
    """Return the same as `ours`, of transformers and PEFT; FLOPs and graphs are 0."""
    import transformers

    setting, folder = job["setting"], Path(job["work"])
    fp32 = setting.get("weights") == "fp32"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.float32 if fp32 else torch.bfloat16,
        attn_implementation=setting["attention"],
    ).to(device)
    if job["kind"] == "lora":
        import peft

        model = peft.PeftModel.from_pretrained(
            model,
            folder / "adapter",
            is_trainable=True,
            autocast_adapter_dtype=setting["adapter"] == "fp32",
        )
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=RATES[job["kind"]], betas=optim.BETAS, weight_decay=0.0, fused=True
    )
    times, losses = [], []
    for rows in steps:
        started = time.perf_counter()
        count = sum(int((row.labels != data.IGNORE_INDEX).sum()) for row in rows)
        total = 0.0
        for batch, labels in their_batches(rows, setting):
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = labels.to(device)
            # Labels are shifted already. num_items_in_batch makes their loss a sum over `count`.
            targets = {"labels": labels, "shift_labels": labels, "num_items_in_batch": count}
            with torch.autocast(device.type, torch.bfloat16, enabled=fp32):
                loss = model(**batch, **targets, use_cache=False).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics.synchronize(device)
        times.append(time.perf_counter() - started)
        losses.append(total)
    return times, losses, 0, 0


def their_batches(rows, setting) -> Iterator[tuple[dict, torch.Tensor]]:
    """Yield (inputs, labels) for transformers, with documents kept apart as `setting` says."""
    if setting["rows"] == "padded":
        yield from padded_documents(rows, setting["at"])
        return
    for begin in range(0, len(rows), setting["at"]):
        ids, positions, labels, *_ = step.collate(rows[begin : begin + setting["at"]], "cpu")
        if setting["rows"] == "flat":
            ids, positions, labels = (x.reshape(1, -1) for x in (ids, positions, labels))
        batch = {"input_ids": ids, "position_ids": positions}
        if setting.get("head") == "labelled":
            targets = (labels[0] != data.IGNORE_INDEX).nonzero().flatten()
            batch["logits_to_keep"] = targets
            labels = labels[:, targets]
        yield batch, labels


def padded_documents(rows, size) -> Iterator[tuple[dict, torch.Tensor]]:
    """Yield a document a row, `size` of similar lengths at a time."""
    documents = []
    for row in rows:
        for end, n in zip(np.cumsum(row.doc_lengths), row.doc_lengths):
            documents.append((row.ids[end - n : end], row.labels[end - n : end]))
    documents.sort(key=lambda document: len(document[0]))
    for begin in range(0, len(documents), size):
        part = documents[begin : begin + size]
        shape = len(part), max(len(ids) for ids, _ in part)
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, data.IGNORE_INDEX)
        for i, (document, targets) in enumerate(part):
            ids[i, : len(document)] = torch.from_numpy(document)
            labels[i, : len(document)] = torch.from_numpy(targets)
            mask[i, : len(document)] = 1
        yield {"input_ids": ids, "attention_mask": mask}, labels


if __name__ == "__main__":
    cli.run(main, cli.TRAINING_MMAP_BYTES)
