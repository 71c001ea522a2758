"""Low-rank adapters in PEFT's format: inject, merge, save, load.

W x becomes W x + alpha / rank * B (A x), with W frozen (LoRA, arXiv 2106.09685). A base without
ChatML tokens gets rows for them in the embedding and the head, which are trained whole.
`python lora.py merge ckpt/ clone/` writes a plain model folder.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import cli
from cli import StrPath, UserError, read_json, write_json
from model import SAVED_OPS, Linear, Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's, before our own names
WEIGHTS_FILE = "adapter_model.safetensors"
# The values of adapter_config.json that make a plain LoRA; None: absent, false or empty.
SUPPORTED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": None,
    "use_rslora": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "fan_in_fan_out": None,
}


# --- layers


class LoRALinear(Linear):
    """A linear layer with `lora_A` (rank, in) and `lora_B` (out, rank), fp32, beside its weight."""

    def attach(self, rank: int, alpha: float, dropout: float) -> None:
        self.scale, self.dropout = alpha / rank, dropout
        device = self.stored()[0].device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A, self.lora_B
        if self.dropout and self.training:
            low = F.linear(F.dropout(x, self.dropout), A.to(x.dtype))  # (…, rank)
            return super().forward(x) + self.scale * F.linear(low, B.to(x.dtype))
        out = AdapterProduct.apply(x, A, B, self.scale, self.unpack, *self.stored())
        return out if self.bias is None else out + self.bias.to(x.dtype)


@functools.cache
def adapted_class(base: type[Linear]) -> type[LoRALinear]:
    """LoRALinear over a subclass of Linear: one class each, as torch.compile compiles per class."""
    return LoRALinear if base is Linear else type(f"LoRA{base.__name__}", (LoRALinear, base), {})


class AdapterProduct(torch.autograd.Function):
    """x W' + scale * x A' B' in the dtype of x, with W = unpack(*stored, dtype).

    Saves x, x A' and `stored`: no weight cast or unpacked, and nothing of the output's size.
    """

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
        grad_low = (flat @ B).mul_(ctx.scale)  # (N, rank)
        grad_A, grad_B = (grad_low.T @ x).float(), (flat.T @ low).float().mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if torch.compiler.is_compiling() and not stored[0].is_floating_point():
                stored[0] = reread(stored[0])
            grad_x = (flat @ ctx.unpack(*stored, x.dtype)).addmm_(grad_low, A)
            grad_x = grad_x.view(*grad.shape[:-1], A.shape[1])
        return grad_x, grad_A, grad_B, None, None, *[None for _ in stored]


@torch.library.custom_op("doppelganger::reread", mutates_args=())
def reread(codes: Tensor) -> Tensor:
    """Copy packed weights for the backward pass.

    Else the compiler sees that both passes unpack the same, and keeps all unpacked weights between.
    """
    return codes.clone()


@reread.register_fake
def _(codes):
    return torch.empty_like(codes)


@torch.library.custom_op("doppelganger::project", mutates_args=())
def project(x: Tensor, weight: Tensor, low: Tensor, B: Tensor, scale: float) -> Tensor:
    """x W' + scale * low B', added in place: one op, which selective checkpointing can save."""
    return (x @ weight.T).addmm_(low, B.T, alpha=scale)


@project.register_fake
def _(x, weight, low, B, scale):
    return x.new_empty(len(x), len(weight))


SAVED_OPS.add(torch.ops.doppelganger.project.default)


class RowsEmbedding(nn.Embedding):
    """An embedding of which only `rows` are trained, in fp32: `row_values` (rows, hidden)."""

    rows: list[int]
    row_values: nn.Parameter

    def forward(self, ids: Tensor) -> Tensor:
        out = super().forward(ids)
        for row, value in zip(self.rows, self.row_values):
            out = torch.where((ids == row)[..., None], value.to(out.dtype), out)
        return out


class RowsLinear(Linear):
    """A head of which only `rows` are trained: no gradient has the size of the vocabulary."""

    rows: list[int]
    row_values: nn.Parameter
    index: Tensor | None = None  # `rows` on the device, made once: making it waits for a GPU

    def forward(self, x: Tensor) -> Tensor:
        if self.index is None or self.index.device != x.device:
            with torch.inference_mode(False):  # it may serve training later
                self.index = torch.tensor(self.rows, device=x.device)
        logits = super().forward(x)
        return logits.index_copy(-1, self.index, F.linear(x, self.row_values.to(x.dtype)))


# --- inject, merge


def inject(
    model: Transformer,
    rank: int = 32,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    rows: Sequence[int] = (),
) -> list[str]:
    """Freeze `model`, give its linear layers named in `targets` an adapter, and train `rows`.

    Returns the names of the matched modules. UserError when a target matches nothing. The model
    computes the same as before; on the meta device `initial_values` are still to be written.
    """
    modules = model.model.named_modules(prefix="model")
    linears = {name: module for name, module in modules if isinstance(module, Linear)}
    known = {last_part(name) for name in linears}
    unknown = sorted({*targets} - known)
    if unknown or not targets:
        raise UserError(
            f"--lora-targets {','.join(unknown)}: this model has no such linear layer",
            f"It has: {', '.join(sorted(known))}.",
        )
    model.requires_grad_(False)
    matched = [name for name in linears if last_part(name) in targets]
    for name in matched:
        linear = linears[name]
        cls = adapted_class(type(linear))  # type: ignore[arg-type]  # mypy: a class has no hash
        change_class(linear, cls)  # the weight keeps its name
        assert isinstance(linear, LoRALinear)
        linear.attach(rank, alpha, dropout)
    settings: Any = dict(  # to mypy a module has only tensors and modules
        rank=rank, alpha=alpha, dropout=dropout, targets=list(targets), rows=list(rows)
    )
    model.lora = settings
    if rows:
        embedding, head = model.model.embed_tokens, model.lm_head
        change_class(embedding, RowsEmbedding)
        change_class(head, RowsLinear)
        assert isinstance(embedding, RowsEmbedding) and isinstance(head, RowsLinear)
        embedding.rows = head.rows = list(rows)
        values = torch.empty(len(rows), head.in_features, device=head.weight.device)
        embedding.row_values = head.row_values = nn.Parameter(values)
        if not model.config.tie_word_embeddings:
            head.row_values = nn.Parameter(torch.empty_like(values))
    if not model.lm_head.weight.is_meta:
        with torch.no_grad():
            for parameter, value in initial_values(model):
                parameter.copy_(value)
    return matched


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Make a module one of another class, with the same parameters."""
    module.__class__ = new


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def initial_values(
    model: Transformer, seed: int = 0, gather_rows: Callable = lambda tensor, rows: tensor[rows]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, initial value) of all that `inject` added, the same on any number of ranks.

    A as PEFT draws it, B zero, rows as in the base; `gather_rows` reads them if it is sharded.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            bound = 1 / math.sqrt(module.in_features)
            A, B = torch.empty(module.lora_A.shape), torch.zeros(module.lora_B.shape)
            yield module.lora_A, A.uniform_(-bound, bound, generator=generator)
            yield module.lora_B, B
        elif isinstance(module, (RowsEmbedding, RowsLinear)):
            yield module.row_values, gather_rows(module.weight, module.rows).float()


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name in our model: parameter} of everything that the adapter trains, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """Add the adapter to the weights, in fp32, and remove it. Returns `model`, plain again."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            update = module.scale * module.lora_B @ module.lora_A
            module.weight.copy_(module.weight.float() + update)
            del module.lora_A, module.lora_B
            change_class(module, Linear)
        elif isinstance(module, (RowsEmbedding, RowsLinear)):
            module.weight[module.rows] = module.row_values.to(module.weight.dtype)
            del module.row_values
            change_class(module, nn.Embedding if isinstance(module, nn.Embedding) else Linear)
    del model.lora
    return model


def merger(folder: StrPath) -> Callable[[str, Tensor], Tensor]:
    """Make a function (name, weight) → the weight with the adapter of `folder` merged, in fp32.

    Merges a base that is read tensor by tensor, and never whole in memory.
    """
    settings, path = read_adapter_config(folder)[0], Path(folder) / WEIGHTS_FILE
    file, scale = cli.open_safetensors(path), settings["alpha"] / settings["rank"]
    keys, rows = {*file.keys()}, torch.tensor(settings["rows"])

    def read(name):
        key = peft_name(name)
        return read_tensor(path, file, key).float() if key in keys else None

    def merge_tensor(name, weight):
        stem = name.removesuffix(".weight")
        A, B = read(f"{stem}.lora_A"), read(f"{stem}.lora_B")
        if A is not None:
            weight = weight.float().addmm(B, A, alpha=scale)
        row_values = read(f"{stem}.row_values")
        if row_values is not None:
            weight = weight.float().index_copy(0, rows, row_values)
        return weight

    return merge_tensor


# --- save, load


def peft_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.lora_A` → PEFT's key for it in `adapter_model.safetensors`."""
    if name.endswith(".row_values"):
        return f"{PREFIX}{name.removesuffix('.row_values')}.token_adapter.trainable_tokens_delta"
    return f"{PREFIX}{name}.weight"


def save(model: Transformer, folder: StrPath, base: StrPath, tensors=None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as PEFT does.

    `base`: the folder or hub id that the adapter belongs to. `tensors`: {name in our model: full
    tensor}, for a sharded model.
    """
    path = Path(folder) / WEIGHTS_FILE
    lora: Any = model.lora
    tensors = adapter_parameters(model) if tensors is None else tensors
    tied = model.config.tie_word_embeddings
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": lora["targets"],
        "trainable_token_indices": dict.fromkeys(modules, lora["rows"]) if lora["rows"] else None,
        "bias": "none",
        "inference_mode": True,
    }
    weights = {
        peft_name(name): t.detach().float().cpu().contiguous() for name, t in tensors.items()
    }
    new = path.with_name(path.name + ".new")
    try:
        save_file(weights, new, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise cli.write_error(path, error) from None
    new.replace(path)
    write_json(Path(folder) / "adapter_config.json", settings)


def read_adapter_config(folder: StrPath) -> tuple[dict, str | None]:
    """Read `adapter_config.json`: the arguments of `inject`, and the base's folder or hub id.

    UserError for kinds of adapter that we don't support.
    """
    path = Path(folder) / "adapter_config.json"
    config = {"lora_dropout": 0.0, "bias": "none", **read_json(path)}
    names = config.get("target_modules")
    unsupported = [key for key, value in SUPPORTED.items() if (config.get(key) or None) != value]
    if unsupported or not isinstance(names, list):
        keys = ", ".join(unsupported) or "target_modules"
        raise UserError(
            f"{path}: {keys}: only plain LoRA over named layers is supported",
            "Merge the adapter with PEFT, and use the merged folder.",
        )
    targets = sorted({last_part(str(name)) for name in names})
    unknown = ", ".join(sorted({*targets} - {*TARGETS}))
    if unknown or not targets:
        raise UserError(
            f"{path}: target_modules {unknown[:60]}: no such linear layers are known",
            f"Known: {', '.join(TARGETS)}.",
        )
    indices = config.get("trainable_token_indices") or []
    indices = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    rows = indices.get("embed_tokens", [])
    same = isinstance(rows, list) and all(other == rows for other in indices.values())
    if not same or len({*map(str, rows)}) < len(rows):
        raise UserError(
            f"{path}: trainable_token_indices must be a list of rows, the same for embed_tokens "
            "and lm_head",
            "Copy it again.",
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base or "", str):
        raise UserError(
            f"{path}: base_model_name_or_path is {base!r:.60}", "It must be a folder or a hub id."
        )
    check = functools.partial(cli.check_number, path)
    arguments = {
        "rank": check("r", config.get("r"), 1, 1 << 16),
        "alpha": check("lora_alpha", config.get("lora_alpha"), -1e6, 1e6, float),
        "dropout": check("lora_dropout", config["lora_dropout"], 0, 1, float),
        "rows": [check("one of trainable_token_indices", row, 0, 1 << 20) for row in rows],
        "targets": targets,
    }
    return arguments, base


@torch.no_grad()
def load(model: Transformer, folder: StrPath, write: Callable = Tensor.copy_) -> None:
    """Inject the adapter of `folder` into `model` (resized to its vocabulary) and fill it.

    UserError names a tensor that doesn't fit. On the meta device it only checks and injects: a
    second call, when the model has memory, fills the adapter. `write(parameter, value)` sets one.
    """
    if not hasattr(model, "lora"):
        inject(model, **read_adapter_config(folder)[0])
    path = Path(folder) / WEIGHTS_FILE
    file = cli.open_safetensors(path, "Train again, or copy the whole folder again.")
    # PEFT adds the whole embedding to its own saves, and writes tied rows twice.
    stored = {key: file for key in file.keys() if ".base_layer." not in key}
    if model.config.tie_word_embeddings:
        stored.pop(peft_name("lm_head.row_values"), None)
    expected = {peft_name(name): p for name, p in adapter_parameters(model).items()}
    shapes = {key: parameter.shape for key, parameter in expected.items()}
    cli.check_tensors(path, stored, shapes, "the base", "Is this the adapter of another base?")
    for key, parameter in expected.items():
        if not parameter.is_meta:
            write(parameter, read_tensor(path, file, key))


def read_tensor(path: Path, file, key: str) -> Tensor:
    """Read a tensor of the open adapter file at `path`. UserError when it isn't finite."""
    value = file.get_tensor(key)
    if not value.isfinite().all():
        raise UserError(
            f"{path}: tensor {key} holds NaN or infinity",
            "Train again, or copy the whole folder again.",
        )
    return value


if __name__ == "__main__":
    from weights.merge import main  # imports this file as the module `lora`

    cli.run(main)
