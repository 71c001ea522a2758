"""Model → a Hugging Face folder. New files are written beside the old ones, then renamed."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import cli
from cli import read_json, write_json
from weights import hf, quantize, shards

MAX_FILE_BYTES = 4 << 30  # a saved model is split into files of at most this size


def save_model(model, folder, tokenizer, dtype=torch.bfloat16):
    """Write a HF model folder in `dtype`, packed layers as they are, which only we read.

    A sharded model is gathered tensor by tensor: every rank must call, rank 0 writes. What the folder held stays whole until the last
    moment: a model of several files takes names that the old index doesn't have, and the new index replaces the old one.
    """
    folder, writes = (
        Path(folder),
        not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0,
    )
    batch, size, total, files = {}, 0, 0, []

    def flush():
        nonlocal batch, size
        if writes and batch:
            files.append(list(batch))
            path = folder / f"new-{len(files)}.safetensors"
            try:
                save_file(batch, path, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                raise cli.write_error(path, error) from None
        batch, size = {}, 0

    packed = {
        id(part)
        for module in model.modules()
        if isinstance(module, quantize.PackedLinear)
        for part in module.stored()
    }
    for name, parameter in model.named_parameters():
        value = shards.full_tensor(parameter.detach()).to(
            parameter.dtype if id(parameter) in packed else dtype
        )
        if not writes:
            continue
        if size + value.nbytes > MAX_FILE_BYTES:
            flush()
        batch[name], size, total = (
            value.cpu().contiguous(),
            size + value.nbytes,
            total + value.nbytes,
        )
    flush()
    if not writes:
        return
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    old = {*read_json(index, {}).get("weight_map", {}).values()}
    if len(files) > 1:
        ways = [
            [f"model{way}-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
            for way in ("", "-anew")
        ]
        names = next(way for way in ways if not old & {*way})
    for number, name in enumerate(names, 1):
        os.replace(folder / f"new-{number}.safetensors", folder / name)
    if len(files) > 1:
        where = {tensor: name for name, tensors in zip(names, files) for tensor in tensors}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": where})
        for name in old - {*names}:
            (folder / name).unlink(missing_ok=True)
    shape = {
        key: value
        for key, value in vars(model.config).items()
        if key in hf.FAMILIES[model.config.model_type] or value
    }
    if "layer_types" in hf.FAMILIES[model.config.model_type] and model.config.sliding_window:
        shape |= {"use_sliding_window": True, "max_window_layers": 0}
    said = {
        "architectures": [f"{model.config.model_type.capitalize()}ForCausalLM"],
        "hidden_act": "silu",
    }
    said |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False}
    kinds = {
        type(module) for module in model.modules() if isinstance(module, quantize.PackedLinear)
    }
    if kinds:
        said["quantization_config"] = {
            "quant_method": hf.QUANT_METHOD,
            "weights": "int4" if quantize.Int4Linear in kinds else "int8",
        }
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.im_end}
    write_json(folder / "config.json", said | shape | ends)
    write_json(folder / "generation_config.json", ends)
