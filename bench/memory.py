"""Predict what a training step of Mistral-7B needs, on fake tensors: no GPU and no weights.

python -m bench.memory
"""

import concurrent.futures
import dataclasses
import multiprocessing

from model import ModelConfig
from training import memory
from training.step import ModelSpec

MISTRAL = ModelConfig(32002, 4096, 14336, 32, 32, 8, 128)
NONE = ModelSpec(adapter={"rank": 32, "alpha": 16})
SELECTIVE = dataclasses.replace(NONE, activation_checkpointing="selective")
LORA = dataclasses.replace(NONE, activation_checkpointing="full")
QLORA = dataclasses.replace(LORA, nf4=True)
FULL = ModelSpec(activation_checkpointing="full")
CASES = {  # name: (the model, rows at a time, other arguments of predict_peak_memory)
    "LoRA": (LORA, 8, {}),
    "LoRA, selective": (SELECTIVE, 8, {}),
    "LoRA, nothing recomputed": (NONE, 8, {}),
    "LoRA, 2 rows": (LORA, 2, {"micro_batches": 2}),
    "LoRA, 1 row, selective": (SELECTIVE, 1, {"micro_batches": 2}),
    "QLoRA": (QLORA, 8, {}),
    "QLoRA, 1 row": (QLORA, 1, {"micro_batches": 2}),
    "full, 8 GPUs": (FULL, 2, {"world": 8}),
    "full, 1 GPU": (FULL, 2, {}),
    "pure bf16, 1 GPU": (dataclasses.replace(FULL, pure_bf16=True), 2, {}),
}


def main() -> None:
    # Each prediction for several GPUs needs a process group of its own.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        futures = {
            name: pool.submit(memory.predict_peak_memory, MISTRAL, spec, rows, 1024, **given)
            for name, (spec, rows, given) in CASES.items()
        }
        for name, future in futures.items():
            gib = future.result() / 2**30
            print(f"{name:<26} {CASES[name][1]} x 1024   {gib:6.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
