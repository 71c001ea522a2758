"""A training step beside transformers + PEFT: tokens/s, peak memory and losses, on the same packed rows, from the same weights.

    python -m bench.step                  LoRA and full fine-tuning of a small Mistral on this machine's CPU
    python -m bench.step --base build/smollm2 --data data     the same of a real base, on rows of one's own
    bench/gpu.sh                          LoRA, QLoRA and full fine-tuning of a random 7B on one GPU, in eight minutes
    bench/gpu.sh --dry-run                the same script with a tiny model on the CPU

Makes random weights and the rows (text of the example export), times the other side's settings, then ours and its fastest in turn, each
in a process of its own, and prints every figure; ratios are medians over the rounds. Memory is a CPU process's peak resident memory,
Python and libraries included, or the most that was allocated on a GPU. The last line is JSON. It refuses to time on a busy machine.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import cli
import data
import lora
from cli import UserError
from model import AC_MODES, ModelConfig, Transformer
from training import cost, distributed, memory, metrics, optim, step
from weights import hf, shards
from weights.load import load_model
from weights.save import save_model
from weights.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SMALL = dict(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1536,
)
LARGE = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
)
TINY = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
)
BUSY = 0.15  # share of the processors that others may use while we time
RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-4, "pure": 1e-4}
ADAPTER = {"rank": 32, "alpha": 16}
SECONDS = 440  # a GPU run begins nothing new after so many

# What transformers + PEFT are told. rows: "packed" (position_ids restart at each document), "flat" (the same in one long row), "padded" (a
# document a row, of like lengths); at: so many rows or documents at a time. adapter: PEFT's default keeps it in fp32.
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
# No setting of a trainer, but what a hand can do with forward's arguments: the head's logits for labelled tokens alone. Shown, not counted.
BY_HAND = {
    "lora": {"rows": "packed", "at": 1, "attention": "sdpa", "adapter": "bf16", "head": "labelled"}
}
CUDA = {
    "lora": [
        {"rows": "packed", "at": 8, "attention": "sdpa", "adapter": "bf16"},
        {"rows": "padded", "at": 8, "attention": "sdpa", "adapter": "bf16"},
    ],
    "full": [{"rows": "packed", "at": 4, "attention": "sdpa", "weights": "bf16"}],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=6, help="of a timed process; the first is not counted"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="lora,full")
    parser.add_argument("--base", help="a model folder, in place of random weights (CPU)")
    parser.add_argument(
        "--data", help="a folder of data.py's, in place of the example export (CPU)"
    )
    parser.add_argument("--at", type=int, default=2, help="rows that ours takes at a time")
    parser.add_argument("--gpu", action="store_true", help="a 7B on a GPU, as bench/gpu.sh runs it")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --gpu: a tiny model on the CPU"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(work(json.loads(options.job))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        on_gpu(scratch, options.dry_run) if options.gpu else on_cpu(scratch, options)


def run(scratch, **job):
    """One process. → its figures, None when it failed"""
    job = {"work": str(scratch), **job}
    done = subprocess.run(
        [sys.executable, "-m", "bench.step", "--job", json.dumps(job)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-1500:], flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def name(setting):
    return ", ".join(f"{key} {value}" for key, value in setting.items())


# --- on a CPU


def on_cpu(scratch, options):
    prepare(Path(scratch), SMALL, rows=4, base=options.base, folder=options.data)
    print(
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; base {options.base or 'random, small'}"
    )
    load, results = 0.0, {}
    for kind in options.kinds.split(","):
        results[kind], busy = compare(kind, scratch, options)
        load = max(load, busy)
    print(json.dumps({**results, "load": round(load, 3)}))


def compare(kind, scratch, options):
    """Ours against the fastest of their settings. → (figures, the busiest the machine was before a timing)"""
    load = []

    def timed(steps, **job):
        load.append(idle())
        return run(scratch, kind=kind, device="cpu", steps=steps, **job)

    print(
        f"{kind}: the settings of transformers{' + PEFT' if kind == 'lora' else ''}: tokens/s, GiB, seconds a step"
    )
    found, exact = [], None
    for setting in [*CPU[kind], *([BY_HAND[kind]] if kind in BY_HAND else [])]:
        fp32 = setting.get("weights") == "fp32"  # as ours: losses are compared with these
        result = timed(options.steps if fp32 else 3, who="theirs", setting=setting)
        exact = result if fp32 else exact
        print(
            f"  {result['tok_per_s']:7,.0f}  {result['peak_gib']:.2f}  {result['seconds']:.2f}  {name(setting)}",
            flush=True,
        )
        if setting in CPU[kind]:
            found.append((result["tok_per_s"], setting))
    setting = max(found, key=lambda pair: pair[0])[1]
    rounds = []
    for _ in range(options.rounds):
        ours, theirs = (
            timed(options.steps, who="ours", at=options.at),
            timed(options.steps, who="theirs", setting=setting),
        )
        rounds.append((ours, theirs))
        print(
            f"  ours {ours['tok_per_s']:,.0f} tok/s, {ours['peak_gib']:.2f} GiB; "
            f"theirs {theirs['tok_per_s']:,.0f} tok/s, {theirs['peak_gib']:.2f} GiB; ratio {ours['tok_per_s'] / theirs['tok_per_s']:.2f}",
            flush=True,
        )
    exact = exact or rounds[0][1]
    print(
        "  losses", *(f"{a:.4f}/{b:.4f}" for a, b in zip(rounds[0][0]["losses"], exact["losses"]))
    )
    other = "peft_tok_per_s" if kind == "lora" else "transformers_tok_per_s"
    figures = {
        "ours_tok_per_s": round(statistics.median(o["tok_per_s"] for o, _ in rounds)),
        other: round(statistics.median(t["tok_per_s"] for _, t in rounds)),
        "ratio": round(statistics.median(o["tok_per_s"] / t["tok_per_s"] for o, t in rounds), 3),
        "memory_ratio": round(
            statistics.median(o["peak_gib"] / t["peak_gib"] for o, t in rounds), 3
        ),
        "loss_gap": round(max(gap(ours, exact) for ours, _ in rounds), 5),
    }
    return figures, max(load)


def gap(ours, theirs):
    return max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"]))


def idle():
    """The share of the processors that is in use. UserError when it is too much to time anything beside."""
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


def processor():
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU"
    )
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return name + "".join(
        f", {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags
    )


def usage():
    """(all, idle) time of the processors since the start, in ticks."""
    ticks = [
        int(n) for n in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    ]
    return sum(ticks), ticks[3] + ticks[4]


# --- on a GPU


def on_gpu(scratch, dry):
    """LoRA, full, QLoRA, pure bf16; theirs beside the first two. Whatever fails is said and left out of the table."""
    began, device, sizes, count = (
        time.time(),
        "cpu" if dry else "cuda",
        TINY if dry else LARGE,
        4 if dry else 8,
    )
    if not dry and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA GPU here", "bench/gpu.sh --dry-run shows that the script runs."
        )
    free = torch.cuda.mem_get_info()[0] - memory.CUDA_RESERVE if not dry else 1 << 40
    print(
        torch.cuda.get_device_name() if not dry else "a dry run on the CPU",
        f"torch {torch.__version__}",
        f"{free / 2**30:.0f} GiB to use",
        flush=True,
    )
    shape = ModelConfig(vocab_size=32002, max_position_embeddings=4096, **sizes)
    kinds = {
        "lora": {"adapter": ADAPTER},
        "full": {},
        "qlora": {"adapter": ADAPTER, "nf4": True},
        "pure": {"pure": True},
    }
    results, lines = {}, []
    with concurrent.futures.ProcessPoolExecutor(6, multiprocessing.get_context("spawn")) as pool:
        needs = {
            (kind, way): pool.submit(
                memory.predict_peak_memory, shape, count, 1024, recompute=way, **given
            )
            for kind, given in kinds.items()
            for way in AC_MODES
        }
        prepare(Path(scratch), sizes, rows=count, device=device)
        torch.cuda.empty_cache()  # the processes to come need it
        print(f"{time.time() - began:.0f} s: weights and rows are made", flush=True)
        for kind in kinds:
            predicted = {way: needs[kind, way].result() for way in AC_MODES}
            way = next((way for way in AC_MODES if predicted[way] < free), "full")
            work = cost.StepWorkload(
                shape, kinds[kind], count, compiled=not dry, cpu=dry, filled=1.0
            )
            hoped_speed = (
                count
                * 1024
                / work.seconds(
                    cost.local_device(torch.device(device), torch.bfloat16)[0], count, way
                )
            )
            jobs = [{"who": "ours", "at": count, "recompute": way}]
            jobs += [{"who": "theirs", "setting": setting} for setting in CUDA.get(kind, [])]
            found = []
            for job in jobs:
                if time.time() - began > SECONDS:
                    print(
                        f"no time left for {kind}, {name(job.get('setting', {'ours': way}))}",
                        flush=True,
                    )
                    continue
                figures = run(scratch, kind=kind, device=device, steps=12, **job)
                if figures:
                    found.append((job, figures))
                    what = (
                        f"ours, recompute {way}" if job["who"] == "ours" else name(job["setting"])
                    )
                    hoped = (
                        f"{predicted[way] / 2**30:6.1f} GiB {hoped_speed:8,.0f} tok/s"
                        if job["who"] == "ours"
                        else " " * 25
                    )
                    lines.append(
                        f"{kind:<6} {figures['tok_per_s']:8,.0f} tok/s  mfu {figures['mfu']:4.0%}  {figures['peak_gib']:6.1f} GiB  "
                        f"predicted {hoped}  {figures['graphs']} graphs  {what}"
                    )
                    print(f"{time.time() - began:.0f} s: {lines[-1]}", flush=True)
            results[kind] = summary(found, predicted[way], hoped_speed)
    print("\n" + "\n".join(lines) + f"\n{time.time() - began:.0f} s in all")
    print(json.dumps(results))


def summary(found, predicted, hoped_speed):
    ours = next((figures for job, figures in found if job["who"] == "ours"), None)
    theirs = max(
        (figures for job, figures in found if job["who"] == "theirs"),
        key=lambda f: f["tok_per_s"],
        default=None,
    )
    if not ours:
        return None
    result = {key: round(ours[key], 3) for key in ("tok_per_s", "mfu", "peak_gib")} | {
        "predicted_gib": round(predicted / 2**30, 2)
    }
    result |= {"predicted_tok_per_s": round(hoped_speed)}  # docs/PLAN.md's pairs
    if theirs:
        result |= {
            "theirs_tok_per_s": round(theirs["tok_per_s"]),
            "theirs_peak_gib": round(theirs["peak_gib"], 2),
        }
        result |= {
            "ratio": round(ours["tok_per_s"] / theirs["tok_per_s"], 3),
            "loss_gap": round(gap(ours, theirs), 5),
        }
    return result


# --- what both sides are given


def prepare(scratch, sizes, rows, device="cpu", base=None, folder=None):
    """A base (random weights unless one is given), an adapter and sessions in `scratch`."""
    if base:
        (scratch / "base").symlink_to(Path(base).resolve())
        model = load_model(base, torch.bfloat16)
    else:
        model = random_base(scratch, sizes, device)
    lora.inject(model, **ADAPTER)
    (scratch / "adapter").mkdir()
    lora.save(
        model,
        scratch / "adapter",
        scratch / "base",
        {key: p.detach().cpu() for key, p in lora.adapter_parameters(model).items()},
    )
    if folder:
        shutil.copytree(folder, scratch / "data")
    else:
        write_example_data(scratch / "data")
    (scratch / "rows").write_text(str(rows))


def write_example_data(folder):
    """Make `folder` of the example export. → the folder"""
    export = [
        sys.executable,
        ROOT / "data.py",
        ROOT / "examples" / "telegram" / "result.json",
        "--out",
        folder,
    ]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    return folder


def random_base(scratch, sizes, device):
    """`scratch`/base, with Mistral's v1 vocabulary where mistral-common is installed. → the model"""
    tokenizer = ROOT / "examples" / "base"
    try:
        import mistral_common

        tokenizer = scratch / "words"
        tokenizer.mkdir()
        (tokenizer / "config.json").write_bytes(
            (ROOT / "examples" / "base" / "config.json").read_bytes()
        )
        (tokenizer / "tokenizer.model").write_bytes(
            (Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()
        )
    except ImportError:
        pass
    tokenizer = load_tokenizer(tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(
            ModelConfig(vocab_size=32002, max_position_embeddings=4096, **sizes)
        ).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.02)
    (scratch / "base").mkdir()
    save_model(model, scratch / "base", tokenizer)
    tokenizer.save(scratch / "base")
    return model


def rows_of(scratch, steps):
    """`steps` lists of as many full rows as a step has."""
    rows = data.load_rows(
        Path(scratch) / "data" / "train.jsonl", load_tokenizer(Path(scratch) / "base"), 1024
    )
    rows, count = (
        [row for row in rows if len(row.ids) == 1024],
        int((Path(scratch) / "rows").read_text()),
    )
    return [
        [rows[(count * number + i) % len(rows)] for i in range(count)] for number in range(steps)
    ]


# --- one process


def work(job):
    device, steps = torch.device(job["device"]), rows_of(job["work"], job["steps"])
    took, losses, flops, graphs = (ours if job["who"] == "ours" else theirs)(job, device, steps)
    counted = took[1:] if device.type == "cpu" else took[4:]  # a GPU's first steps compile
    seconds = statistics.median(counted)
    dtype = torch.bfloat16
    return {
        "tok_per_s": sum(len(row.ids) for row in steps[0]) / seconds,
        "seconds": seconds,
        "peak_gib": metrics.peak_gib(device),
        "losses": losses,
        "graphs": graphs,
        "mfu": flops / seconds / metrics.measure_peak_flops(device, dtype),
    }


def ours(job, device, steps):
    ranks, base, kind = distributed.Distributed(device), Path(job["work"]) / "base", job["kind"]
    adapter = ADAPTER if "lora" in kind else None
    ways = {
        "adapter": adapter,
        "recompute": job.get("recompute", "none"),
        "nf4": kind == "qlora",
        "pure": kind == "pure",
    }
    model = step.build_model(hf.read_config(base), ranks, base, **ways)
    if adapter:
        tensors = load_file(Path(job["work"]) / "adapter" / "adapter_model.safetensors")
        for key, parameter in lora.adapter_parameters(model).items():
            shards.copy_shard(parameter, tensors[lora.peft_name(key)])
    if device.type == "cuda":
        model.compile_blocks()
    optimizer = optim.make_optimizer(model, RATES[kind], 0.0, kind == "pure")
    took, losses = [], []
    for rows in steps:
        began = time.perf_counter()
        loss, _, _ = step.train_step(
            model, optimizer, step.micro_batches(rows, job["at"], ranks, 1024), ranks
        )
        metrics.synchronize(device)
        took.append(time.perf_counter() - began)
        losses.append(loss)
    return (
        took,
        losses,
        metrics.step_flops(model, steps[0])[0],
        metrics.count_compiled_graphs() if model.compiled else 0,
    )


def theirs(job, device, steps):
    import transformers

    setting, folder = job["setting"], Path(job["work"])
    dtype = torch.float32 if setting.get("weights") == "fp32" else torch.bfloat16
    given = {"dtype": dtype, "attn_implementation": setting["attention"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", **given).to(device)
    if job["kind"] == "lora":
        import peft

        fp32 = setting["adapter"] == "fp32"
        model = peft.PeftModel.from_pretrained(
            model, folder / "adapter", is_trainable=True, autocast_adapter_dtype=fp32
        )
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=RATES[job["kind"]], betas=optim.BETAS, weight_decay=0.0, fused=True
    )
    took, losses = [], []
    for rows in steps:
        began = time.perf_counter()
        count, total = sum(int((row.labels != data.IGNORE_INDEX).sum()) for row in rows), 0.0
        for batch, labels in arranged(rows, setting):
            batch, labels = (
                {key: value.to(device) for key, value in batch.items()},
                labels.to(device),
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
                # labels are shifted already; num_items_in_batch makes transformers' own loss a sum over `count`
                loss = model(
                    **batch,
                    labels=labels,
                    shift_labels=labels,
                    num_items_in_batch=count,
                    use_cache=False,
                ).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics.synchronize(device)
        took.append(time.perf_counter() - began)
        losses.append(total)
    return took, losses, 0, 0


def arranged(rows, setting):
    """Yield (inputs, labels) as transformers takes them, by one of its own ways to keep documents apart."""
    if setting["rows"] == "padded":
        ends = [np.cumsum(row.doc_lengths) for row in rows]
        documents = [
            (r.ids[e - n : e], r.labels[e - n : e])
            for r, all_ in zip(rows, ends)
            for e, n in zip(all_, r.doc_lengths)
        ]
        documents.sort(key=lambda pair: len(pair[0]))
        for begin in range(0, len(documents), setting["at"]):
            some = documents[begin : begin + setting["at"]]
            length = max(len(ids) for ids, _ in some)
            ids, labels, mask = (
                torch.full((len(some), length), fill) for fill in (0, data.IGNORE_INDEX, 0)
            )
            for i, (one, targets) in enumerate(some):
                ids[i, : len(one)], labels[i, : len(one)], mask[i, : len(one)] = (
                    torch.from_numpy(one),
                    torch.from_numpy(targets),
                    1,
                )
            yield {"input_ids": ids, "attention_mask": mask}, labels
        return
    for begin in range(0, len(rows), setting["at"]):
        ids, positions, labels, *_ = step.collate(rows[begin : begin + setting["at"]], "cpu")
        if setting["rows"] == "flat":
            ids, positions, labels = (x.reshape(1, -1) for x in (ids, positions, labels))
        batch = {"input_ids": ids, "position_ids": positions}
        if setting.get("head") == "labelled":
            kept = (labels[0] != data.IGNORE_INDEX).nonzero().flatten()
            batch["logits_to_keep"], labels = kept, labels[:, kept]
        yield batch, labels


if __name__ == "__main__":
    cli.run(main)
