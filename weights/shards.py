"""Weights by name, whole or sharded by FSDP2: allocate, read and write the rows of this rank."""

from typing import Any

import torch
from torch import nn

from model import Transformer
from weights.quantize import PackedLinear

# What a name in a checkpoint stands for: a parameter, or a packed layer for its `weight`
Target = torch.Tensor | PackedLinear


def is_sharded(tensor: Any) -> bool:
    """Return whether FSDP2 sharded it: a DTensor, without the import that takes half a second."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Any) -> torch.Tensor:
    """Return what this rank holds of a parameter."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Any) -> torch.Tensor:
    """Return a parameter's whole value. A collective if it is sharded: every rank must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Any) -> tuple[torch.Tensor, int]:
    """Return (this rank's rows of a parameter, the number of the first)."""
    if not is_sharded(tensor):
        return tensor.detach(), 0
    mesh = tensor.device_mesh
    # FSDP2 cuts dimension 0 as torch.chunk does, along the last dimension of the mesh
    rows = -(-len(tensor) // mesh.shape[-1])
    return local_part(tensor).detach(), min(rows * mesh.get_local_rank(mesh.ndim - 1), len(tensor))


def gather_rows(tensor: Any, rows: list[int]) -> torch.Tensor:
    """Return some rows of a parameter (len(rows), width). A collective if it is sharded."""
    local, first = local_shard(tensor)
    index = torch.tensor(rows, device=local.device) - first
    is_local = (index >= 0) & (index < len(local))
    values = local.new_zeros(len(rows), local.shape[1])
    values[is_local] = local[index[is_local]]
    if is_sharded(tensor):
        torch.distributed.all_reduce(values, group=tensor.device_mesh.get_group(-1))
    return values


def copy_shard(target: Target, value: Any) -> bool:
    """Set this rank's rows from a whole value, or from a slice of a file, packing them if need be.

    Returns whether these rows are finite.
    """
    packed = target if isinstance(target, PackedLinear) else None
    local, first = local_shard(packed.stored()[0] if packed else target)
    rows = value[first : first + len(local)]
    if packed:
        for parameter, part in zip(packed.stored(), packed.quantize(rows.to(local.device))):
            local_shard(parameter)[0].copy_(part)
    else:
        local.copy_(rows)
    return all_finite(rows)


def all_finite(rows: torch.Tensor) -> bool:
    """Return whether all values are finite: 30 times as fast as isfinite().all()."""
    if not rows.is_floating_point() or not rows.numel():
        return True
    return all(extreme.isfinite() for extreme in rows.aminmax())


def named_weights(model: nn.Module, as_stored: bool = False) -> dict[str, Target]:
    """Return {name in a checkpoint: target} of everything but adapters.

    `as_stored`: packed layers by the tensors that they consist of.
    """
    parameters: dict[str, Target] = dict(model.named_parameters())
    if as_stored:
        return parameters
    weights = {name: p for name, p in parameters.items() if name.endswith((".weight", ".bias"))}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            weights[f"{name}.weight"] = module
    return weights


def weight_shape(target: Target) -> tuple[int, ...]:
    if isinstance(target, PackedLinear):
        return target.out_features, target.in_features
    return tuple(target.shape)


def materialize(model: Transformer, device: str | torch.device) -> None:
    """Give a meta model memory on `device`. That unties tied weights: tie them again."""

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        if is_sharded(tensor):
            return torch.empty_like(tensor, device=device)
        # empty_like of a meta tensor imports sympy: half a second
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    model._apply(allocate)
    if model.config.tie_word_embeddings:
        embedding, head = model.model.embed_tokens, model.lm_head
        head.weight = embedding.weight
        if hasattr(head, "row_values"):
            head.row_values = embedding.row_values
