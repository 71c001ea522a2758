"""Model → a Hugging Face folder. New files are written beside the old ones, then renamed."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import cli
from cli import StrPath, read_json, write_json
from model import Transformer
from weights import hf, quantize, shards
from weights.tokenizer import Tokenizer

MAX_FILE_BYTES = 4 << 30  # a saved model is split into files of at most this size


def save_model(
    model: Transformer,
    folder: StrPath,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.bfloat16,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Write a HF model folder in `dtype`; int8 and int4 layers stay packed, which only we read.

    A sharded model is gathered tensor by tensor: every rank must call, rank 0 writes. `advance` is
    called before each, so that a watchdog can tell a slow disk from a rank that hangs. The old
    model stays whole until the last moment: a model of several files gets names that the old index
    doesn't have, and the new index replaces the old one.
    """
    folder = Path(folder)
    is_writer = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    write_tensors(folder, full_tensors(model, dtype, advance), is_writer)
    if is_writer:
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.im_end}
        write_json(folder / "config.json", raw_config(model, dtype) | ends)
        write_json(folder / "generation_config.json", ends)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], is_writer: bool = True
) -> None:
    """Write named tensors as a HF folder's weights, in files of at most MAX_FILE_BYTES."""
    tensor_names: list[list[str]] = []  # the tensors' names in each new file
    batch: dict[str, torch.Tensor] = {}
    total = 0
    for name, tensor in tensors:
        if not is_writer:
            continue
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > MAX_FILE_BYTES:
            tensor_names.append(write_new_file(folder, len(tensor_names) + 1, batch))
            batch = {}
        batch[name] = tensor.cpu().contiguous()
        total += tensor.nbytes
    if is_writer:
        tensor_names.append(write_new_file(folder, len(tensor_names) + 1, batch))
        rename_files(folder, tensor_names, total)


def full_tensors(
    model: Transformer, dtype: torch.dtype, advance: Callable[[], object]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter whole, in `dtype` unless it is packed. A collective if sharded."""
    packed: set[int] = set()
    for module in model.modules():
        if isinstance(module, quantize.PackedLinear):
            packed |= {id(parameter) for parameter in module.stored()}
    for name, parameter in model.named_parameters():
        advance()
        value = shards.full_tensor(parameter.detach())
        yield name, value if id(parameter) in packed else value.to(dtype)


def write_new_file(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    path = folder / f"new-{number}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise cli.write_error(path, error) from None
    return [*tensors]


def rename_files(folder: Path, tensor_names: list[list[str]], total: int) -> None:
    """Give the new files their names, write their index, and delete the old index's files."""
    index = folder / hf.INDEX_FILE
    old_files = {*read_json(index, {}).get("weight_map", {}).values()}
    count = len(tensor_names)
    names = ["model.safetensors"]
    if count > 1:
        for suffix in ("", "-anew"):
            names = [f"model{suffix}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
            if not old_files & {*names}:
                break
    for number, name in enumerate(names, 1):
        os.replace(folder / f"new-{number}.safetensors", folder / name)
    if count > 1:
        weight_map: dict[str, str] = {}
        for name, tensors in zip(names, tensor_names):
            weight_map |= dict.fromkeys(tensors, name)
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name in old_files - {*names}:
            (folder / name).unlink(missing_ok=True)


def raw_config(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json's content: the keys that the family has, and those that are set."""
    config = model.config
    known = hf.FAMILIES[config.model_type]
    raw = {
        "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
        "hidden_act": "silu",
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
    }
    types = {type(module) for module in model.modules()}
    if types & {quantize.Int8Linear, quantize.Int4Linear}:
        kind = "int4" if quantize.Int4Linear in types else "int8"
        raw["quantization_config"] = {"quant_method": hf.QUANT_METHOD, "weights": kind}
    raw |= {key: value for key, value in vars(config).items() if key in known or value}
    if "layer_types" in known and config.sliding_window:
        raw |= {"use_sliding_window": True, "max_window_layers": 0}
    return raw
