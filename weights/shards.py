"""Weights by name, whole or sharded by FSDP2: allocate, read and write the rows that this rank holds."""

import torch

from weights import quantize

# --- weights in


def is_sharded(tensor):
    """Whether its rows lie on several ranks: FSDP2's DTensor, asked without an import that takes half a second."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor):
    """What this rank holds of a parameter."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor):
    """A parameter's whole value, gathered from all ranks where it is sharded (a collective: every rank must ask)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor):
    """(the rows of a parameter that this rank holds, the number of the first): all of it where nothing is sharded."""
    if not is_sharded(tensor):
        return tensor.detach(), 0
    mesh = tensor.device_mesh
    rows = -(
        -len(tensor) // mesh.shape[-1]
    )  # FSDP2 cuts dimension 0 as torch.chunk does, along the mesh's last
    return local_part(tensor).detach(), min(rows * mesh.get_local_rank(mesh.ndim - 1), len(tensor))


def gather_rows(tensor, rows):
    """Some rows of a parameter, from all ranks where it is sharded (a collective), which never hold it whole."""
    local, first = local_shard(tensor)
    wanted = torch.tensor(rows, device=local.device) - first
    held = (wanted >= 0) & (wanted < len(local))
    values = local.new_zeros(len(rows), local.shape[1])
    values[held] = local[wanted[held]]
    if is_sharded(tensor):
        torch.distributed.all_reduce(values, group=tensor.device_mesh.get_group(-1))
    return values


def copy_shard(target, value):
    """Set a parameter, or a Packed layer's weight, from its whole value or a slice; each rank its own rows. → whether all are numbers"""
    local, first = local_shard(
        target.stored()[0] if isinstance(target, quantize.PackedLinear) else target
    )
    rows = value[first : first + len(local)]
    if isinstance(target, quantize.PackedLinear):
        for parameter, part in zip(target.stored(), target.quantise(rows.to(local.device))):
            local_shard(parameter)[0].copy_(part)
    else:
        local.copy_(rows)
    return all_finite(rows)


def all_finite(rows):
    """Whether all are numbers: 30 times as fast as isfinite() of all."""
    return (
        not rows.is_floating_point()
        or not rows.numel()
        or all(end.isfinite() for end in rows.aminmax())
    )


def named_weights(model, as_stored=False):
    """{name in a checkpoint: parameter, or Packed layer} for everything but adapters; `as_stored`: the tensors of packed layers."""
    if as_stored:
        return dict(model.named_parameters())
    packed = {
        f"{name}.weight": m
        for name, m in model.named_modules()
        if isinstance(m, quantize.PackedLinear)
    }
    return {
        name: p for name, p in model.named_parameters() if name.endswith((".weight", ".bias"))
    } | packed


def materialize(model, device):
    """Give a meta model memory on `device`; `to_empty` unties what is tied, so it is tied again."""
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
        if hasattr(model.lm_head, "row_values"):
            model.lm_head.row_values = model.model.embed_tokens.row_values


def weight_shape(target):
    return (
        (target.out_features, target.in_features)
        if isinstance(target, quantize.PackedLinear)
        else tuple(target.shape)
    )
