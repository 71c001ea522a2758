"""What a training step of Mistral-7B needs, predicted on fake tensors: no GPU and no weights.

python -m bench.memory
"""

import concurrent.futures
import multiprocessing

from model import ModelConfig
from training import memory

MISTRAL = ModelConfig(32002, 4096, 14336, 32, 32, 8, 128)
LORA = {"adapter": {"rank": 32, "alpha": 16}}
FULL = {"recompute": "full"}
CASES = {  # what: (rows at a time, the rest of step.predict's arguments)
    "LoRA": (8, LORA | FULL),
    "LoRA, selective": (8, LORA | {"recompute": "selective"}),
    "LoRA, nothing recomputed": (8, LORA),
    "LoRA, 2 rows": (2, LORA | FULL | {"micro_batches": 2}),
    "LoRA, 1 row, selective": (1, LORA | {"recompute": "selective", "micro_batches": 2}),
    "QLoRA": (8, LORA | FULL | {"nf4": True}),
    "QLoRA, 1 row": (1, LORA | FULL | {"nf4": True, "micro_batches": 2}),
    "full, 8 GPUs": (2, FULL | {"world": 8}),
    "full, 1 GPU": (2, FULL),
    "pure bf16, 1 GPU": (2, FULL | {"pure": True}),
}


def main():
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as pool:  # own process groups
        found = {
            what: pool.submit(memory.predict_peak_memory, MISTRAL, rows, 1024, **given)
            for what, (rows, given) in CASES.items()
        }
        for what, future in found.items():
            print(
                f"{what:<26} {CASES[what][0]} x 1024   {future.result() / 2**30:6.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
