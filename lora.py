"""Low-rank adapters: inject, merge, save, load; PEFT's own format on disk. `python lora.py merge ckpt/ clone/` makes a plain model.

W x becomes W x + alpha / rank * B (A x), with W frozen (arXiv 2106.09685). A base without ChatML tokens gets rows for them: those
rows of the embedding and of the head are trained whole.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import cli
from cli import UserError, read_json, write_json
from model import SAVED_OPS, Linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's, before our own names
UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "fan_in_fan_out",
)


class LoRALinear(Linear):
    """A linear layer whose `weight` keeps its key, with `lora_A` (rank, in) and `lora_B` (out, rank) as fp32 masters beside it."""

    def attach(self, rank, alpha, dropout):
        self.scale, self.dropout = alpha / rank, dropout
        device = self.stored()[0].device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device))

    def forward(self, x):
        if self.dropout and self.training:
            low = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))  # (…, rank)
            return super().forward(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))
        out = AdapterProduct.apply(
            x, self.lora_A, self.lora_B, self.scale, self.unpack, *self.stored()
        )
        return out if self.bias is None else out + self.bias.to(x.dtype)


class AdapterProduct(torch.autograd.Function):
    """x W' + scale * x A' B' in the dtype of x, W = unpack(*stored, dtype); keeps x, x A' and what is stored for the backward pass."""

    @staticmethod
    def forward(ctx, x, A, B, scale, unpack, *stored):
        A, B = A.to(x.dtype), B.to(x.dtype)
        flat = x.flatten(0, -2)  # (N, in)
        low = flat @ A.T  # (N, rank)
        ctx.save_for_backward(flat, low, A, B, *stored)
        ctx.scale, ctx.unpack = scale, unpack
        return project(flat, unpack(*stored, x.dtype), low, B, scale).view(*x.shape[:-1], len(B))

    @staticmethod
    def backward(ctx, grad):
        x, low, A, B, *stored = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (N, out)
        back = (flat @ B).mul_(ctx.scale)  # (N, rank)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (
                (flat @ ctx.unpack(*stored, x.dtype))
                .addmm_(back, A)
                .view(*grad.shape[:-1], A.shape[1])
            )
        return (
            grad_x,
            (back.T @ x).float(),
            (flat.T @ low).float().mul_(ctx.scale),
            None,
            None,
            *(None for _ in stored),
        )


@torch.library.custom_op("doppelganger::project", mutates_args=())
def project(
    x: torch.Tensor, weight: torch.Tensor, low: torch.Tensor, B: torch.Tensor, scale: float
) -> torch.Tensor:
    """x W' + scale * low B', the second product added into the first: one op, whose result selective recomputation can keep."""
    return (x @ weight.T).addmm_(low, B.T, alpha=scale)


@project.register_fake
def _(x, weight, low, B, scale):
    return x.new_empty(len(x), len(weight))


SAVED_OPS.add(torch.ops.doppelganger.project.default)


class RowsEmbedding(nn.Embedding):
    """An embedding of which only `rows` are trained, as `row_values` (rows, hidden), fp32; they stand in place of the frozen ones."""

    def forward(self, ids):
        out = super().forward(ids)
        for index, row in enumerate(self.rows):
            out = torch.where((ids == row)[..., None], self.row_values[index].to(out.dtype), out)
        return out


class RowsLinear(Linear):
    """A head of which only `rows` are trained: their logits are computed apart, so that no gradient of the vocabulary's size is made."""

    def forward(self, x):
        where = torch.tensor(self.rows, device=x.device)
        return super().forward(x).index_copy(-1, where, F.linear(x, self.row_values.to(x.dtype)))


def inject(model, rank=32, alpha=16, dropout=0.0, targets=TARGETS, rows=()):
    """Freeze `model` and give every linear layer named in `targets` an adapter, and the vocabulary's `rows` values of their own.

    Returns the matched module names. UserError when a target matches nothing. At once after it the model computes what it did before
    (on the meta device the values of `initial` are still to be written).
    """
    linears = {
        name: m for name, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)
    }
    kinds = {name.rpartition(".")[2] for name in linears}
    unknown = sorted(set(targets) - kinds)
    if unknown or not targets:
        raise UserError(
            f"--lora-targets {','.join(unknown)}: this model has no such linear layer",
            f"It has: {', '.join(sorted(kinds))}.",
        )
    matched = [name for name in linears if name.rpartition(".")[2] in targets]
    model.requires_grad_(False)
    for name in matched:
        kind = type(linears[name])  # the weight stays where it is, under its own name
        linears[name].__class__ = (
            LoRALinear if kind is Linear else type(f"LoRA{kind.__name__}", (LoRALinear, kind), {})
        )
        linears[name].attach(rank, alpha, dropout)
    model.lora = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "targets": list(targets),
        "rows": list(rows),
    }
    if rows:
        embedding, head = model.model.embed_tokens, model.lm_head
        embedding.__class__, head.__class__ = RowsEmbedding, RowsLinear
        embedding.rows = head.rows = list(rows)
        embedding.row_values = nn.Parameter(
            torch.empty(len(rows), embedding.embedding_dim, device=embedding.weight.device)
        )
        head.row_values = (
            embedding.row_values
            if model.config.tie_word_embeddings
            else nn.Parameter(torch.empty_like(embedding.row_values))
        )
    if not model.lm_head.weight.is_meta:
        with torch.no_grad():
            for parameter, value in initial_values(model):
                parameter.copy_(value)
    return matched


def initial_values(model, seed=0, rows_of=lambda tensor, rows: tensor[rows]):
    """Yield (parameter, first value) for all that `inject` added: A as PEFT draws it, B zero, rows as they are in the base.

    `rows_of` fetches rows of a sharded parameter. The values do not depend on the number of ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            bound = 1 / math.sqrt(module.in_features)
            yield (
                module.lora_A,
                torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator),
            )
            yield module.lora_B, torch.zeros(module.lora_B.shape)
        elif isinstance(module, (RowsEmbedding, RowsLinear)):
            yield module.row_values, rows_of(module.weight, module.rows).float()


def adapter_parameters(model):
    """{our name: parameter} of everything the adapter trains, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def peft_name(name):
    """`model.layers.0.mlp.up_proj.lora_A` → PEFT's key for it in `adapter_model.safetensors`."""
    if name.endswith(".row_values"):
        return f"{PREFIX}{name.removesuffix('.row_values')}.token_adapter.trainable_tokens_delta"
    return f"{PREFIX}{name}.weight"


@torch.no_grad()
def merge(model):
    """Fold the adapter into the weights, in fp32, and take it off: `model` is a plain Transformer again. Returns it."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight.copy_(
                module.weight.float() + module.scale * module.lora_B @ module.lora_A
            )
            del module.lora_A, module.lora_B
            module.__class__ = Linear
        elif isinstance(module, (RowsEmbedding, RowsLinear)):
            module.weight[module.rows] = module.row_values.to(module.weight.dtype)
            del module.row_values
            module.__class__ = nn.Embedding if isinstance(module, RowsEmbedding) else Linear
    del model.lora
    return model


def merger(folder):
    """(name, weight) → the weight with the adapter of `folder` in it, fp32: `merge` for whoever reads a base tensor by tensor."""
    said, path = read_adapter_config(folder)[0], Path(folder) / "adapter_model.safetensors"
    file, scale = cli.open_safetensors(path), said["alpha"] / said["rank"]
    keys = {*file.keys()}

    def part(key):
        return read_tensor(path, file, key).float()

    def fold(name, weight):
        stem = name.removesuffix(".weight")
        A, B, rows = (peft_name(f"{stem}.{what}") for what in ("lora_A", "lora_B", "row_values"))
        if A in keys:
            weight = torch.addmm(weight.float(), part(B), part(A), alpha=scale)
        if rows in keys:
            weight = weight.float().index_copy(0, torch.tensor(said["rows"]), part(rows))
        return weight

    return fold


def save(model, folder, base, tensors=None):
    """Write PEFT's `adapter_config.json` and `adapter_model.safetensors`; `base` is the folder or hub id that it belongs to.

    `tensors`: {our name: full tensor}, for a sharded model whose own parameters are only pieces.
    """
    folder, lora = Path(folder), model.lora
    tensors = tensors if tensors is not None else adapter_parameters(model)
    rows = {"embed_tokens": lora["rows"]} | (
        {} if model.config.tie_word_embeddings else {"lm_head": lora["rows"]}
    )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": lora["targets"],
        "trainable_token_indices": rows if lora["rows"] else None,
        "bias": "none",
        "inference_mode": True,
    }
    weights = {
        peft_name(name): t.detach().float().cpu().contiguous() for name, t in tensors.items()
    }
    try:
        save_file(weights, folder / "adapter_model.safetensors.new", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise cli.write_error(folder / "adapter_model.safetensors", error) from None
    (folder / "adapter_model.safetensors.new").replace(folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", settings)


def read_adapter_config(folder):
    """`adapter_config.json` → the arguments of `inject` and the base's name. UserError for kinds of adapter that we don't compute."""
    path = Path(folder) / "adapter_config.json"
    said = {"lora_dropout": 0.0, "bias": "none", **read_json(path)}
    odd = [key for key in UNSUPPORTED if said.get(key)] + ["bias"] * (said["bias"] != "none")
    if said.get("peft_type") != "LORA" or odd or not isinstance(said.get("target_modules"), list):
        raise UserError(
            f"{path}: {', '.join(odd) or said.get('peft_type')} is no plain LoRA over named layers",
            "Merge it with PEFT first, and use the merged folder.",
        )
    targets, base = (
        sorted({str(name).rpartition(".")[2] for name in said["target_modules"]}),
        said.get("base_model_name_or_path"),
    )
    unknown = ", ".join(sorted({*targets} - {*TARGETS}))
    if unknown or not targets:
        raise UserError(
            f"{path}: target_modules {unknown[:60]}: no such linear layers are known",
            f"Known: {', '.join(TARGETS)}.",
        )
    indices = said.get("trainable_token_indices") or []
    indices = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    rows = indices.get("embed_tokens", [])
    if (
        not isinstance(rows, list)
        or len({*map(str, rows)}) < len(rows)
        or any(other != rows for other in indices.values())
    ):
        raise UserError(
            f"{path}: trainable_token_indices are no list of rows, the same for embed_tokens and lm_head",
            "Copy it again.",
        )
    if not isinstance(base or "", str):
        raise UserError(
            f"{path}: base_model_name_or_path is {base!r:.60}", "It is a folder or a hub id."
        )
    return {
        "rank": cli.check_number(path, "r", said.get("r"), 1, 1 << 16),
        "alpha": cli.check_number(path, "lora_alpha", said.get("lora_alpha"), -1e6, 1e6, float),
        "dropout": cli.check_number(path, "lora_dropout", said["lora_dropout"], 0, 1, float),
        "rows": [
            cli.check_number(path, "one of trainable_token_indices", row, 0, 1 << 20)
            for row in rows
        ],
        "targets": targets,
    }, base


@torch.no_grad()
def load(model, folder, write=torch.Tensor.copy_):
    """Inject the adapter of `folder` into `model` (resized to the adapter's vocabulary) and fill it. UserError names a wrong tensor.

    On the meta device there is nothing to fill: it tells whether the adapter fits, and a second call, after `allocate`, fills it.
    """
    if not hasattr(model, "lora"):
        inject(model, **read_adapter_config(folder)[0])
    path = Path(folder) / "adapter_model.safetensors"
    file = cli.open_safetensors(path, "Train again, or copy the whole folder again.")
    found = {
        key: file for key in file.keys() if ".base_layer." not in key
    }  # PEFT adds the whole embedding to its own saves
    if model.config.tie_word_embeddings:
        found.pop(peft_name("lm_head.row_values"), None)  # PEFT writes a tied row twice
    wanted = {peft_name(name): p for name, p in adapter_parameters(model).items()}
    cli.check_tensors(
        path,
        found,
        {key: p.shape for key, p in wanted.items()},
        "the base",
        "Is this the adapter of another base?",
    )
    for key, parameter in wanted.items():
        if not parameter.is_meta:
            write(parameter, read_tensor(path, file, key))


def read_tensor(path, file, key):
    """A tensor of the open adapter file at `path`. UserError when not all in it are numbers."""
    value = file.get_tensor(key)
    if not value.isfinite().all():
        raise UserError(
            f"{path}: tensor {key} holds NaN or infinity",
            "Train again, or copy the whole folder again.",
        )
    return value


if __name__ == "__main__":
    from weights import merge  # imports this file as the module `lora`

    cli.run(merge.main)
