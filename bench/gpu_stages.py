"""The stages of bench/gpu.py: what each prints and measures. Every one runs in its own process."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import cli
import lora
from bench.generate import seconds
from bench.step import (
    ROOT,
    build_ours,
    gap,
    name,
    prepare,
    random_model,
    reserved_gib,
    run,
    sizes,
    spec_of,
    step_rows,
)
from data import Row
from inference import generate
from model import ModelConfig, Transformer, attend, attention_layout
from training import cost, distributed, metrics, optim, step
from weights import devices, shards
from weights.load import load_model
from weights.tokenizer import load_tokenizer

LARGE = sizes(4096, 32, 32, 8, 128, 14336)  # Mistral 7B's
TINY = sizes(64, 2, 4, 2, 16, 128)
SEQ_LEN = 1024
CARD, CAP_GIB = "3090", 23.3  # the card it is made for, and what a process gets of its memory
MEMORY_ERROR = 0.05  # allowed between measured and predicted
LIVE_GIB = 21.5  # most that LoRA may hold on CARD
MAX_GRAPHS = 4
GOALS = {"lora": 15_000, "full": 9_000}  # tok/s on an H200
RATIO = 1.5  # to the fastest setting of transformers + PEFT
ROUNDING = 0.02  # relative error that bf16 explains: it holds 1/256

# The settings of transformers + PEFT, as in bench.step.
THEIRS = {
    "lora": [
        {"rows": "packed", "at": 8, "attention": "sdpa", "adapter": "bf16"},
        {"rows": "padded", "at": 8, "attention": "sdpa", "adapter": "bf16"},
    ],
    "full": [{"rows": "packed", "at": 4, "attention": "sdpa", "weights": "bf16"}],
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where the base, its adapter and the rows are, and whether this is a dry run on the CPU."""

    scratch: Path
    dry: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def sizes(self) -> dict:
        return TINY if self.dry else LARGE

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(vocab_size=32002, max_position_embeddings=4096, **self.sizes)

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return 4 if self.dry else 8

    @property
    def steps(self) -> int:
        """Steps of a training run; the first ones may compile."""
        return 3 if self.dry else 12

    @property
    def has_base(self) -> bool:
        return (self.scratch / "rows").exists()  # `prepare` writes it last


# --- helpers of the stages


def report_goal(text: str, met: bool) -> None:
    print(f"{text}: {'met' if met else 'NOT MET'}")


def report_memory(label: str, allocated: float, reserved: float, predicted: float) -> dict:
    """Print GiB measured beside predicted. Return them."""
    error = allocated / predicted - 1
    report_goal(
        f"{label}: {allocated:.2f} GiB allocated, {reserved:.2f} reserved, {predicted:.2f} "
        f"predicted, {error:+.1%} (within {MEMORY_ERROR:.0%} wanted)",
        abs(error) <= MEMORY_ERROR,
    )
    return {"peak_gib": allocated, "reserved_gib": reserved, "predicted_gib": predicted}


def peaks(device: torch.device) -> tuple[float, float]:
    """Return the most GiB allocated and reserved."""
    return metrics.peak_gib(device), reserved_gib(device)


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def cap_memory(gib: float) -> None:
    """Let this process have only so much of the GPU's memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * devices.GIB / total))


def imitate_card(key: str, gib: float) -> None:
    """Cap the memory, and let train.py choose as on that card: it asks torch for these two."""
    gpu = cost.GPUS[key]
    cap_memory(gib)
    torch.cuda.get_device_name = lambda device=None: gpu.name
    memory = int(gib * devices.GIB), int(gpu.gib * devices.GIB)
    torch.cuda.mem_get_info = lambda device=None: memory


def refuse_rows(most: int) -> None:
    """Let every batch of more rows than `most` run out of memory: a dry run's cap."""
    forward = Transformer.forward

    def checked(self, tokens, *args, **kwargs):
        if len(tokens) > most and type(tokens) is torch.Tensor:  # a prediction's are fake
            raise torch.OutOfMemoryError(f"{len(tokens)} rows")
        return forward(self, tokens, *args, **kwargs)

    Transformer.forward = checked


def count_fallbacks() -> int:
    """Return how many functions torch.compile gave up on: they run eager."""
    from torch._dynamo.utils import counters

    return counters["frames"]["total"] - counters["frames"]["ok"]


def compile_figures() -> dict:
    return {"graphs": metrics.count_compiled_graphs(), "fallbacks": count_fallbacks()}


def report_graphs(label: str, figures: dict) -> None:
    graphs, fallbacks = figures["graphs"], figures["fallbacks"]
    report_goal(
        f"{label}: {graphs} graphs (at most {MAX_GRAPHS} wanted), {fallbacks} fallbacks to eager",
        graphs <= MAX_GRAPHS and not fallbacks,
    )


def workload(setup: Setup, config: ModelConfig, kind: str, **sizes) -> cost.StepWorkload:
    """Return the step as plan.py describes it."""
    options = {"compiled": not setup.dry, "cpu": setup.dry, "fill_share": 1.0, **sizes}
    return cost.StepWorkload(config, spec_of(kind), setup.rows, SEQ_LEN, **options)


def measured_workload(setup: Setup, kind: str) -> cost.StepWorkload:
    """Return the same for the rows that bench.step trains on."""
    rows = step_rows(setup.scratch, 1)[0]
    sizes = metrics.step_sizes(rows)
    documents = sum(len(row.doc_lengths) for row in rows)
    shares = {
        "target_share": sizes.targets / sizes.tokens,
        "doc_length": sizes.tokens / documents,
        "most_documents": max(len(row.doc_lengths) for row in rows),
    }
    return workload(setup, setup.config, kind, **shares)


def random_rows(work: cost.StepWorkload, seed: int) -> list[Row]:
    return [cost.synthetic_row(work, seed * work.rows + i) for i in range(work.rows)]


def relative_gap(values: Iterable[float], expected: Iterable[float]) -> float:
    return max(abs(value / other - 1) for value, other in zip(values, expected, strict=True))


# --- versions


def versions(setup: Setup) -> dict:
    """Say what is installed. Compile a function: without a compiler training is far slower."""
    print(f"Python {platform.python_version()}, CUDA {torch.version.cuda}, {os.cpu_count()} CPUs")
    for package in ("torch", "triton", "transformers", "peft", "tokenizers", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            print(f"{package} {version(package)}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    print(f"gcc: {shutil.which('gcc') or 'none'}; Python.h: {'found' if header.exists() else 'no'}")
    if not setup.dry:
        print_card()
    compile_seconds = seconds(compile_function, setup.device)
    print(f"a compiled function gives the same numbers; it took {compile_seconds:.1f} s")
    peak = metrics.measure_peak_flops(setup.device, torch.bfloat16) / 1e12
    gpu, free = cost.local_device(setup.device, torch.bfloat16)
    print(f"matmul in bf16: {peak:,.1f} TFLOP/s, {gpu.peak:,.1f} in gpus.toml ({gpu.name})")
    print(f"{free / devices.GIB:.1f} GiB to use")
    return {"tflops": peak, "free_gib": free / devices.GIB, "compile_seconds": compile_seconds}


def print_card() -> None:
    properties = torch.cuda.get_device_properties(0)
    print(
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / devices.GIB:.2f} GiB"
    )
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.sm", "--format=csv"]
    with contextlib.suppress(OSError):
        done = subprocess.run(query, capture_output=True, text=True)
        print(" | ".join(done.stdout.splitlines()) or done.stderr.strip())


def compile_function(device: torch.device) -> None:
    def function(x):
        return (x * 2).sin() + 1

    x = torch.linspace(0, 1, 1000, device=device)
    torch.testing.assert_close(torch.compile(function)(x), function(x))


# --- attention


# head_dim, query heads, key heads, window
ATTENTION = [(128, 32, 8, None), (128, 32, 8, 100), (128, 8, 8, None), (64, 8, 2, 7)]


def attention(setup: Setup) -> dict:
    """Compare the kernel for documents with plain attention, forward and backward."""
    errors = {}
    rows, length = 2, 256 if setup.dry else 512
    repeated = (False,) if setup.dry else (False, True)  # a CPU's edges never are
    for shape, repeats in itertools.product(ATTENTION, repeated):
        head_dim, heads, groups, window = shape
        label = f"head_dim {head_dim}, {heads} heads over {groups}, window {window}"
        label += ", repeated edges" if repeats else ""
        cu_seqlens, positions = random_documents(rows, length)
        if not setup.dry:
            cu_seqlens += cu_seqlens[-1:] * (65 - len(cu_seqlens)) * repeats
            cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=setup.device)
        positions = positions.to(setup.device)
        layout = attention_layout(positions, window, None, torch.bfloat16, cu_seqlens)
        error = attention_error(layout, positions, heads, groups, head_dim, window)
        print(f"{label}: off by {error:.2%} (at most {ROUNDING:.0%} allowed)")
        errors[label] = error
    wrong = [label for label, error in errors.items() if not error <= ROUNDING]
    return {"worst": max(errors.values())} | ({"failed": wrong} if wrong else {})


def random_documents(rows: int, length: int) -> tuple[list[int], torch.Tensor]:
    """Return where some documents begin, [0, …, rows * length], and positions (rows, length)."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randint(1, rows * length, (12,), generator=generator).tolist()
    cu_seqlens = sorted({*range(0, rows * length + 1, length), *inner})
    lengths = [end - begin for begin, end in itertools.pairwise(cu_seqlens)]
    return cu_seqlens, torch.cat([torch.arange(n) for n in lengths]).view(rows, length)


def attention_error(layout, positions, heads, groups, head_dim, window) -> float:
    """Return the largest relative error of the output and the three gradients."""
    B, T = positions.shape
    torch.manual_seed(0)
    shapes = [(B, T, n, head_dim) for n in (heads, groups, groups)]
    inputs = [torch.randn(shape, device=positions.device).bfloat16() for shape in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    grad = torch.randn(shapes[0], device=positions.device).bfloat16()
    out = attend(*inputs, layout)
    actual = out, *torch.autograd.grad(out, inputs, grad)

    exact = [x.detach().float().requires_grad_() for x in inputs]
    q, k, v = (x.transpose(1, 2) for x in exact)
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    mask = document_mask(positions, window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    expected = out, *torch.autograd.grad(out, exact, grad.float())
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(actual, expected))


def document_mask(positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return (B, 1, T, T): True where a query sees a key."""
    T = positions.shape[1]
    token = torch.arange(T, device=positions.device)
    ahead = token - token[:, None]
    mask = (ahead <= 0) & (ahead > -(window or T))
    document = (positions == 0).cumsum(1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


# --- numerics

NUMERICS = {"lora": "selective", "qlora": "full", "full": "none", "pure": "none"}
NUMERIC_LEN = 256  # tokens of a row
# tokens of a document, rows at a time: few documents and many, then another micro-batch
NUMERIC_STEPS = [(200, 4), (60, 4), (12, 4), (4, 4), (60, 2)]


def numerics(setup: Setup) -> dict:
    """Train compiled, eager and on the CPU: the losses must agree. All four kinds at once."""
    results: dict[str, dict] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(NUMERICS), context) as pool:
        futures = {kind: pool.submit(numerics_of, setup, kind) for kind in NUMERICS}
        for kind, future in futures.items():
            try:
                results[kind] = report_numerics(kind, future.result())
            except Exception as error:
                traceback.print_exc()
                print(f"{kind}: {error!r}"[:300])
                results[kind] = {"failed": True}
    wrong = [kind for kind, figures in results.items() if "failed" in figures]
    return results | ({"failed": wrong} if wrong else {})


def report_numerics(kind: str, figures: dict) -> dict:
    eager, compiled = figures["eager_gap"], figures["compiled_gap"]
    print(
        f"{kind}, recompute {NUMERICS[kind]}: losses {figures['losses']}; eager off by "
        f"{eager:.2%}, compiled {compiled:.2%} (at most {ROUNDING:.0%} allowed)"
    )
    report_graphs(kind, figures)
    return figures if max(eager, compiled) <= ROUNDING else figures | {"failed": True}


def numerics_of(setup: Setup, kind: str) -> dict:
    """Compare the losses of five steps of a small model, in this process."""
    threads = max(1, (os.cpu_count() or 1) // len(NUMERICS))
    torch.set_num_threads(threads)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    config = ModelConfig(1000, 256, 512, 10, 4, 2, 64)
    if setup.dry:
        config = ModelConfig(1000, 64, 128, 3, 4, 2, 16)
    spec = spec_of(kind, NUMERICS[kind])
    expected = train_losses(config, spec, distributed.Distributed(torch.device("cpu")))
    ranks = distributed.Distributed(setup.device)
    eager = train_losses(config, spec, ranks)
    compiled = train_losses(config, spec, ranks, compiled=not setup.dry)
    return {
        "losses": " ".join(f"{loss:.3f}" for loss in compiled),
        "eager_gap": relative_gap(eager, expected),
        "compiled_gap": relative_gap(compiled, expected),
        **compile_figures(),
    }


def train_losses(config, spec, ranks, compiled=False, sharded=False) -> list[float]:
    """Return the losses of NUMERIC_STEPS. `sharded`: by FSDP2, over however many ranks."""
    model = build_sharded(config, ranks, spec) if sharded else step.build_model(config, ranks, spec)
    optimizer = optim.make_optimizer(model, 3e-3, 0.0, spec.pure_bf16)
    if compiled:
        step.compile_model(model, optimizer)
    losses = []
    for seed, (doc_length, micro_batch) in enumerate(NUMERIC_STEPS):
        # Eight ids: something to learn.
        few_ids = dataclasses.replace(config, vocab_size=8)
        work = cost.StepWorkload(few_ids, spec, 4, NUMERIC_LEN, doc_length=doc_length)
        rows = random_rows(work, seed)
        batches = step.micro_batches(rows, micro_batch, ranks, work.seq_len)
        losses.append(step.train_step(model, optimizer, batches, ranks)[0])
    return losses


# --- memory by documents


def documents(setup: Setup) -> dict:
    """Measure a 7B's memory with four layers and LoRA, at 64 and 512 documents a step."""
    layers = min(4, setup.config.num_hidden_layers)
    config = dataclasses.replace(setup.config, num_hidden_layers=layers)
    ranks, spec = distributed.Distributed(setup.device), spec_of("lora", "selective")
    model = random_model(config, ranks, spec)
    optimizer = optim.make_optimizer(model, 1e-4, 0.0)
    if not setup.dry:
        step.compile_model(model, optimizer)
    results: dict = {}
    for count in (64, 512):
        doc_length = setup.rows * SEQ_LEN // count
        per_row = count // setup.rows
        work = workload(setup, config, "lora", doc_length=doc_length, most_documents=per_row)
        rows = [with_documents(row, doc_length) for row in random_rows(work, 0)]
        batches = step.micro_batches(rows, setup.rows, ranks, SEQ_LEN)
        step.train_step(model, optimizer, batches, ranks)  # compiles, and allocates workspaces
        reset_peaks(setup.device)
        step.train_step(model, optimizer, batches, ranks)
        predicted = work.required_bytes(work.memory(setup.rows, "selective")) / devices.GIB
        label = f"{layers} layers, {count} documents"
        results[str(count)] = report_memory(label, *peaks(setup.device), predicted)
    report_graphs("two numbers of documents", compile_figures())
    return results | compile_figures()


def with_documents(row: Row, length: int) -> Row:
    """Return the row, cut into documents of `length` tokens."""
    lengths = np.full(len(row.ids) // length, length)
    zeros = np.zeros_like(lengths)
    return dataclasses.replace(row, doc_lengths=lengths, chars=zeros, sessions=zeros)


# --- a 7B with train.py


def write_base(setup: Setup) -> dict:
    """Write the random base, an adapter and the example's rows, unless they are there."""
    if setup.has_base:
        print(f"the base is in {setup.scratch} from an earlier call")
        return {}
    shutil.rmtree(setup.scratch, ignore_errors=True)
    setup.scratch.mkdir(parents=True)
    prepare(setup.scratch, setup.sizes, setup.rows, setup.device)
    train = setup.scratch / "data" / "train.jsonl"
    train.write_bytes(train.read_bytes() * 8)  # a longer epoch has fewer evaluations
    size = sum(path.stat().st_size for path in (setup.scratch / "base").iterdir())
    print(f"{size / 1e9:.2f} GB of random weights are in {setup.scratch}")
    return {"gb": size / 1e9}


def capped(setup: Setup) -> dict:
    """Train the 7B as on the card it is made for: what train.py chooses must fit."""
    if not setup.dry:
        imitate_card(CARD, CAP_GIB)
    figures = train_run(setup, "capped")
    prediction = cli.read_json(setup.scratch / "capped" / "run.json")["prediction"]["gib"]
    figures |= report_memory("as on a " + CARD, *peaks(setup.device), prediction)
    report_goal(
        f"{figures['peak_gib']:.2f} of {CAP_GIB} GiB allocated (at most {LIVE_GIB} wanted), "
        f"{figures['halvings']} halvings (0 wanted)",
        figures["peak_gib"] <= LIVE_GIB and not figures["halvings"],
    )
    return figures


def halving(setup: Setup) -> dict:
    """Train with too little memory for the micro-batch: it must be halved, and stay compiled."""
    work = measured_workload(setup, "lora")
    whole, half = (sum(work.memory(n, "selective").values()) for n in (setup.rows, setup.rows // 2))
    cap = (whole + half) / 2 / devices.GIB
    print(
        f"predicted: {setup.rows} rows {whole / devices.GIB:.2f} GiB, half of them "
        f"{half / devices.GIB:.2f}; capped at {cap:.2f}"
    )
    if setup.dry:
        refuse_rows(setup.rows // 2)
    else:
        cap_memory(cap)
    flags = "--micro-batch", setup.rows, "--activation-checkpointing", "selective"
    figures = train_run(setup, "halving", *flags)
    report_goal(f"{figures['halvings']} halvings (1 wanted)", figures["halvings"] == 1)
    if not figures["halvings"]:
        figures["failed"] = "the micro-batch wasn't halved"
    losses = read_losses(setup.scratch / "capped")
    if losses:
        figures["loss_gap"] = relative_gap(read_losses(setup.scratch / "halving"), losses)
        print(f"losses are within {figures['loss_gap']:.2%} of the capped run's")
        if not figures["loss_gap"] <= ROUNDING:
            figures["failed"] = "its losses differ"
    return figures


def train_run(setup: Setup, out: str, *flags) -> dict:
    """Run train.py on the base, in this process. Return its figures."""
    import train

    halvings = count_halvings(train.Trainer)
    folder = setup.scratch / out
    common = ["--lora", "--model", setup.scratch / "base", "--data", setup.scratch / "data"]
    common += ["--out", folder, "--overwrite", "--max-steps", setup.steps, "--batch", setup.rows]
    common += ["--samples", 1, "--keep", 0, "--device", setup.device.type]
    sys.argv = ["train.py", *map(str, [*common, *flags])]
    train.main()
    lines = [line for line in cli.read_metrics(folder) if "tok_per_s" in line]
    figures = {
        "tok_per_s": statistics.median(line["tok_per_s"] for line in lines[setup.steps // 2 :]),
        "halvings": len(halvings),
        **compile_figures(),
    }
    first, last = lines[0]["loss"], lines[-1]["loss"]
    print(f"{figures['tok_per_s']:,.0f} tok/s; loss {first:.3f} to {last:.3f}")
    report_graphs("with validation and samples", figures)
    return figures


def count_halvings(trainer: type) -> list[int]:
    """Return a list that gets the micro-batch after each halving."""
    halvings: list[int] = []
    halve = trainer.halve_micro_batch

    def halve_and_count(self):
        halve(self)
        halvings.append(self.micro_batch)

    trainer.halve_micro_batch = halve_and_count
    return halvings


def read_losses(folder: Path) -> list[float]:
    if not folder.exists():
        return []
    return [line["loss"] for line in cli.read_metrics(folder) if "loss" in line]


# --- decoding


def decode(setup: Setup) -> dict:
    """Decode a 7B compiled (on CUDA as graphs) and eager: equal logits, and tokens/s."""
    model = load_model(setup.scratch / "base", torch.bfloat16, setup.device)
    tokenizer = load_tokenizer(setup.scratch / "base")
    decoder = functools.partial(generate.Decoder, model, tokenizer, SEQ_LEN)
    ids = torch.randint(3, 2000, (520,), generator=torch.Generator().manual_seed(0)).tolist()

    model.dtype = torch.float32  # what bf16's rounding is measured with
    exact = next_logits(decoder(), ids)
    model.dtype = None
    eager = decoder()
    started = time.perf_counter()
    compiled = decoder(compile=True)
    if not compiled.compiled_decoder:
        raise RuntimeError("decoding was not compiled")
    print(f"compiled in {time.perf_counter() - started:.1f} s")
    errors = [logits_error(next_logits(one, ids), exact) for one in (eager, compiled)]
    graphs = compiled.compiled_decoder.graphs
    print(f"CUDA graphs for {sorted(graphs)} cached tokens ([512, 1024] wanted)")
    print(f"logits are off by {errors[0]:.2%} eager, {errors[1]:.2%} compiled")

    speeds = [decoding_speed(one, ids) for one in (eager, compiled)]
    gpu, _ = cost.local_device(setup.device, torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    limit = gpu.bandwidth * 1e9 / size
    print(f"eager {speeds[0]:.1f} tok/s, compiled {speeds[1]:.1f}; {limit:.0f} is memory's limit")
    figures = {"eager_tok_per_s": speeds[0], "tok_per_s": speeds[1], "limit_tok_per_s": limit}
    figures |= {"eager_error": errors[0], "error": errors[1], "cuda_graphs": len(graphs)}
    if not errors[1] <= 2 * errors[0] + 0.005:
        figures["failed"] = "compiled logits are wrong"
    if not setup.dry and sorted(graphs) != [512, 1024]:
        figures["failed"] = "no CUDA graphs were captured"
    return figures


def next_logits(decoder: generate.Decoder, ids: Sequence[int], count: int = 20) -> list:
    """Return the logits after each of the last `count` ids, read one by one."""
    return [decoder.next_logits(ids[:end]) for end in range(len(ids) - count, len(ids))]


def logits_error(logits: list, exact: list) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(logits, exact, strict=True))


def decoding_speed(decoder: generate.Decoder, ids: list[int], count: int = 48) -> float:
    decoder.next_logits(ids)
    times = [seconds(decoder.next_logits, ids + [5] * n) for n in range(1, count + 1)]
    return 1 / statistics.median(times)


# --- NCCL and FSDP2 with one rank


def one_rank(setup: Setup) -> dict:
    """Start NCCL as torchrun would for one GPU, and train a model that FSDP2 has sharded.

    With one rank torch gathers and reduces nothing: this checks the start, collectives, FSDP2's
    hooks and casts around compiled blocks, and DTensors in clipping and in the optimizer.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = distributed.init_distributed(setup.device.type)
    tensor = torch.arange(1024.0, device=ranks.device)
    torch.distributed.all_reduce(tensor)
    torch.distributed.broadcast(tensor, 0)
    assert tensor.tolist() == list(range(1024)), "a collective of one rank changed the tensor"
    print(f"{torch.distributed.get_backend()} {nccl_version()}: all_reduce and broadcast")

    config = ModelConfig(1000, 256, 512, 4, 4, 2, 64)
    figures: dict = {}
    for kind in ("lora", "full"):
        train = functools.partial(train_losses, config, spec_of(kind), ranks, not setup.dry)
        figures[kind] = relative_gap(train(sharded=True), train())
        print(f"{kind}: losses sharded by FSDP2 are within {figures[kind]:.2%} of unsharded ones")
    if not max(figures.values()) <= ROUNDING:
        figures["failed"] = "FSDP2's losses differ"
    torch.distributed.destroy_process_group()
    return figures


def nccl_version() -> str:
    if not torch.cuda.is_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def build_sharded(config: ModelConfig, ranks: distributed.Distributed, spec) -> Transformer:
    """Build as step.build_model does for several ranks."""
    model = step.build_meta_model(config, ranks, spec)
    distributed.shard_model(model, ranks, spec.dtype)
    shards.materialize(model, ranks.device)
    step.init_weights(model, 0)
    if spec.adapter:
        with torch.no_grad():
            for parameter, value in lora.initial_values(model, 0, shards.gather_rows):
                shards.copy_shard(parameter, value)
    return model.train()


# --- speed


def choose(setup: Setup, kind: str) -> tuple[cost.StepWorkload, cost.Choice, float]:
    """Return the step with all its rows at once, as it is predicted to run best; bytes to use."""
    work = measured_workload(setup, kind)
    gpu, free = cost.local_device(setup.device, torch.bfloat16)
    return work, cost.choose_micro_batch(work, gpu, free, [setup.rows]), free


def training_speed(kind: str, setup: Setup) -> dict:
    """Time training of the 7B, and the settings of transformers + PEFT beside it."""
    work, choice, free = choose(setup, kind)
    predicted = work.required_bytes(choice.memory) / devices.GIB
    if not choice.fits:
        print(f"left out: it needs {predicted:.1f} GiB, {free / devices.GIB:.1f} are free")
        return {"predicted_gib": predicted}
    job = {"kind": kind, "device": setup.device.type, "steps": setup.steps}
    settings = {"who": "ours", "at": setup.rows, "recompute": choice.ac_mode}
    ours = run(setup.scratch, **job, **settings)
    if not ours:
        return {"failed": "ours"}
    print_speed(f"ours, recompute {choice.ac_mode}", ours)
    tok_per_s, predicted_speed = ours["tok_per_s"], setup.rows * SEQ_LEN / choice.seconds
    print(f"{predicted_speed:,.0f} tok/s predicted: {tok_per_s / predicted_speed - 1:+.0%}")
    figures = report_memory(kind, ours["peak_gib"], ours["reserved_gib"], predicted)
    if kind in GOALS:
        goal = GOALS[kind]
        report_goal(f"{tok_per_s:,.0f} tok/s ({goal:,} wanted on an H200)", tok_per_s >= goal)
    figures |= {key: ours[key] for key in ("tok_per_s", "mfu", "graphs")}
    figures["predicted_tok_per_s"] = predicted_speed
    return figures | beside_theirs(setup, kind, ours, job)


def print_speed(label: str, figures: dict) -> None:
    print(
        f"{figures['tok_per_s']:8,.0f} tok/s, mfu {figures['mfu']:.0%}, "
        f"{figures['peak_gib']:.1f} GiB, {figures['graphs']} graphs: {label}"
    )


def beside_theirs(setup: Setup, kind: str, ours: dict, job: dict) -> dict:
    """Run the settings of the other side. Return its fastest one's figures beside ours."""
    results, failed = [], []
    settings = THEIRS.get(kind, [])
    if settings and not importlib.util.find_spec("peft"):
        print("transformers + PEFT are left out: not installed")
        settings = []
    for setting in settings:
        result = run(setup.scratch, **job, who="theirs", setting=setting)
        if result:
            print_speed(f"theirs, {name(setting)}", result)
            results.append(result)
        else:
            failed.append(name(setting))
    figures: dict = {"failed": failed} if failed else {}
    if results:
        fastest = max(results, key=lambda result: result["tok_per_s"])
        ratio = ours["tok_per_s"] / fastest["tok_per_s"]
        report_goal(f"{ratio:.2f} times their fastest ({RATIO} wanted)", ratio >= RATIO)
        figures |= {"theirs_tok_per_s": fastest["tok_per_s"], "ratio": ratio}
        figures |= {"theirs_peak_gib": fastest["peak_gib"], "loss_gap": gap(ours, fastest)}
        print(f"losses are {figures['loss_gap']:.4f} apart")
    return figures


def profile(setup: Setup) -> dict:
    """Profile a LoRA step of the 7B: the kernels that take longest, and the GPU's idle share."""
    _, choice, _ = choose(setup, "lora")
    job = {"work": str(setup.scratch), "kind": "lora", "recompute": choice.ac_mode}
    ranks, model, optimizer = build_ours(job, setup.device)
    batches = step.micro_batches(step_rows(setup.scratch, 1)[0], setup.rows, ranks, SEQ_LEN)

    def take_step():
        step.train_step(model, optimizer, batches, ranks)
        metrics.synchronize(setup.device)

    times = [seconds(take_step) for _ in range(2 if setup.dry else 6)]
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if setup.dry else activity.CUDA]) as trace:
        take_step()
    kind = torch.autograd.DeviceType.CPU if setup.dry else torch.autograd.DeviceType.CUDA
    events = [event for event in trace.events() if event.device_type == kind]
    events = [event for event in events if not event.is_user_annotation]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    totals: collections.Counter[str] = collections.Counter()
    for event in events:
        totals[event.name] += event.time_range.elapsed_us()
    whole = sum(totals.values())
    for kernel, microseconds in totals.most_common(10):
        print(f"{microseconds / 1000:9.1f} ms {microseconds / whole:5.1%}  {kernel[:80]}")
    idle = idle_share([(event.time_range.start, event.time_range.end) for event in events])
    step_ms = 1000 * statistics.median(times[len(times) // 2 :])
    print(f"a step takes {step_ms:.0f} ms without the profiler; idle {idle:.1%} of its time")
    return {"step_ms": step_ms, "idle": idle, "kernels": len(events)}


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Return the share of the time from the first span's begin to the last end that none covers."""
    spans = sorted(spans)
    begin = until = spans[0][0]
    busy = 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - begin)


# --- the tests


def cuda_tests(setup: Setup) -> dict:
    """Run the tests that need a GPU, eight at a time. They skip on a CPU."""
    if not importlib.util.find_spec("pytest"):
        print("left out: pytest is not installed")
        return {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not setup.dry:
        command += ["-n", "8"]
    done = subprocess.run([*command, "tests/test_cuda.py"], cwd=ROOT, stderr=subprocess.STDOUT)
    return {"failed": "tests/test_cuda.py"} if done.returncode else {}
