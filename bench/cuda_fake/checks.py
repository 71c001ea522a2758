"""The checks of `python -m bench.cuda_fake`. Each runs in a process where driver.c is loaded."""

import contextlib
import ctypes
import dataclasses
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import cli
from inference.generate import CompiledDecoder
from model import AC_MODES, KVCache, ModelConfig, Transformer
from training import cost, distributed, memory, metrics, optim, step
from weights import devices, quantize, shards

MISTRAL = ModelConfig(32002, 4096, 14336, 32, 32, 8, 128, sliding_window=4096)
ADAPTER = {"rank": 32, "alpha": 16, "rows": [32000, 32001]}
SPECS = {
    "lora": step.ModelSpec(ADAPTER),
    "qlora": step.ModelSpec(ADAPTER, nf4=True),
    "full": step.ModelSpec(),
    "pure": step.ModelSpec(pure_bf16=True),
}
MAX_GRAPHS = 4
MAX_EXCESS = 0.03  # of the prediction
UNPACKED = 256 << 20  # bytes more for QLoRA: two unpacked weights, where all is recomputed
MAX_WAITS = 4  # of the CPU in a step: for counts, the loss, the norm


class Driver(ctypes.Structure):
    """What driver.c counts."""

    names = ("launches", "waits", "kernels", "shared_bytes", "used", "most_used")
    _fields_ = [(name, ctypes.c_ulong) for name in names]

    @classmethod
    def loaded(cls) -> "Driver":
        return cls.in_dll(ctypes.CDLL(None), "fake_cuda")


@dataclasses.dataclass(frozen=True)
class Training:
    """Steps and an evaluation in a 7B's shapes.

    `mode`: of activation checkpointing; None takes the mode and the rows that train.py would
    choose for 8 rows a step on each card. `limit_gib`: that torch may reserve.
    """

    card: str
    kind: str
    mode: str | None = None
    rows: int = 4  # at a time
    layers: int = 32
    world: int = 1
    limit_gib: float | None = None

    def run(self) -> tuple[str, list[str]]:
        """Return a line of figures, and what is wrong."""
        config = dataclasses.replace(MISTRAL, num_hidden_layers=self.layers)
        work = cost.StepWorkload(config, SPECS[self.kind], rows=8, world=self.world)
        # Rows of different numbers of documents; the first has the most.
        rows = sorted(
            (cost.synthetic_row(work, seed) for seed in range(3)),
            key=lambda row: -len(row.doc_lengths),
        )
        work = dataclasses.replace(work, most_documents=len(rows[0].doc_lengths))
        if self.mode is None:
            gpu = cost.GPUS[self.card]
            free = gpu.gib * devices.GIB - memory.CUDA_RESERVE
            choice = cost.choose_micro_batch(work, gpu, free)
            size, mode, predicted = choice.micro_batch, choice.ac_mode, choice.bytes
        else:
            size, mode = self.rows, self.mode
            predicted = sum(work.memory(size, mode).values())
        spec = dataclasses.replace(work.spec, activation_checkpointing=mode)
        with fake_ranks(self.world) as ranks:
            measured, waits = measure_step(
                config, spec, ranks, [[row] * min(work.rows, 2 * size) for row in rows], size
            )
        excess = measured / predicted - 1
        reserved = torch.cuda.max_memory_reserved()
        text = (
            f"{mode}, {size} x 1024: {gib(measured)} live, {gib(predicted)} predicted "
            f"({excess:+.1%}), {gib(reserved)} reserved; {cli.counted(waits, 'waits')} a step"
        )
        problems = []
        allowed = max(MAX_EXCESS * predicted, UNPACKED if spec.nf4 else 0)
        if measured - predicted > allowed:
            problems.append(f"{excess:.1%} more than predicted is live")
        if self.limit_gib and reserved > self.limit_gib * devices.GIB:
            problems.append(f"more than {self.limit_gib} GiB are reserved")
        if waits > MAX_WAITS:
            problems.append(f"the CPU waits for the GPU more than {MAX_WAITS} times a step")
        if metrics.count_compiled_graphs() > MAX_GRAPHS:
            problems.append(f"there are more than {MAX_GRAPHS} graphs")
        return text, problems


def measure_step(config, spec, ranks, steps, micro_batch: int) -> tuple[int, int]:
    """Return the bytes that are live at a step's peak, and how often the CPU waits in it.

    `steps`: rows of each step. The first is taken again, and measured.
    """
    driver = Driver.loaded()
    x = torch.ones(256, 256, dtype=torch.bfloat16, device=ranks.device)
    x @ x  # allocates cuBLAS's workspace, which CUDA_RESERVE counts
    workspace = torch.cuda.memory_allocated()
    model = step.build_meta_model(config, ranks, spec).train()
    shards.materialize(model, ranks.device)
    optimizer = optim.make_optimizer(model, 1e-4, 0.0, spec.pure_bf16)
    step.compile_model(model, optimizer)
    for number, rows in enumerate([*steps, steps[0]]):
        batches = step.micro_batches(rows * ranks.world, micro_batch, ranks, 1024)
        torch.cuda.reset_peak_memory_stats()
        waits = driver.waits
        step.train_step(model, optimizer, batches, ranks)
        waits = driver.waits - waits
        measured = torch.cuda.max_memory_allocated() - workspace
        if number < len(steps):
            step.evaluate(model, rows[:2] * ranks.world, ranks, micro_batch, 1024)
    return measured, waits


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[distributed.Distributed]:
    """Be the first of `world` ranks on CUDA, whose collectives move nothing."""
    device = torch.device("cuda", 0)
    if world == 1:
        yield distributed.Distributed(device)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield distributed.Distributed(device, 0, world)
    finally:
        dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Some tokens at different lengths, each a CUDA graph."""

    card: str
    weights: str  # bf16, int8 or int4

    @torch.inference_mode()
    def run(self) -> tuple[str, list[str]]:
        config, device = dataclasses.replace(MISTRAL, num_hidden_layers=4), torch.device("cuda", 0)
        with torch.device("meta"):
            model = Transformer(config).to(torch.bfloat16)
        if self.weights != "bf16":
            quantize.pack_linears(model, self.weights)
        shards.materialize(model, device)
        cache = KVCache(config, 2048, dtype=torch.bfloat16, device=device)
        decoder = CompiledDecoder(model.eval().requires_grad_(False), cache)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        graphs = []
        for length in (5, 600, 1500):
            cache.length = length
            decoder(token)
            graphs.append(metrics.count_compiled_graphs())
        waits = Driver.loaded().waits
        decoder(token)
        waits = Driver.loaded().waits - waits
        text = f"{len(decoder.graphs)} CUDA graphs; {cli.counted(waits, 'waits')} a token"
        problems = ["a token waits for the GPU"] if waits else []
        if graphs[-1] > graphs[0] + 1:  # one more where all of the cache is seen
            problems.append(f"more context is compiled again: {graphs} graphs")
        return text, problems


CHECKS: dict[str, Training | Decoding] = {
    "lora 7B": Training("3090", "lora", limit_gib=21.5),
    "qlora 7B": Training("3060", "qlora", limit_gib=9),
    "full 7B, 8 GPUs": Training("a100-80", "full", "full", rows=2, world=8, limit_gib=18),
}
for kind in SPECS:
    for mode in AC_MODES:
        card = "3090" if "lora" in kind else "a100-80"
        CHECKS[f"{kind} {mode}"] = Training(card, kind, mode, layers=4)
for weights in ("bf16", "int8", "int4"):
    CHECKS[f"decode {weights}"] = Decoding("3090", weights)


def main() -> None:
    check = CHECKS[sys.argv[1]]
    text, problems = check.run()
    driver = Driver.loaded()
    graphs = metrics.count_compiled_graphs()
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    print(
        f"{sys.argv[1]:18} {check.card:8} {text}; {cli.counted(graphs, 'graphs')}, "
        f"{driver.kernels} kernels, shared memory {driver.shared_bytes >> 10} of {shared >> 10} KiB"
    )
    if counters["graph_break"]:
        problems.append(f"graph breaks: {dict(counters['graph_break'])}")
    sys.exit("\n".join(problems) or 0)


def gib(size: float) -> str:
    return f"{size / devices.GIB:.2f} GiB"


if __name__ == "__main__":
    main()
