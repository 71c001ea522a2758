"""Safetensors → model. Names and shapes in the files must be exactly the model's. No pickles."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cli
import lora
from cli import StrPath, UserError
from model import ModelConfig, Transformer
from weights import devices, hf, hub, quantize, shards
from weights.hf import ModelFolder, StoredTensor
from weights.tokenizer import Tokenizer

SCAN_BYTES = 1 << 23  # bytes of a mapped weight in memory while it is checked for NaN


# --- tensors → model


@torch.no_grad()
def load_weights(
    model: Transformer,
    folder: StrPath | ModelFolder,
    ranks: Any = None,
    mmap: bool = False,
    transform: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Read the weights of `folder` into an allocated model, one tensor in memory at a time.

    Each rank reads its own rows. `mmap`: weights of the model's dtype and device stay in the file
    and are read when they are used. `transform(name, weight)`: what to load instead (lora.merger).
    Rows of the vocabulary that the files lack become the mean of the others. UserError as of
    `index_tensors`, and for NaN or infinity on any of `ranks`.
    """
    folder = hf.open_folder(folder)
    tensors = index_tensors(model, folder)
    targets = shards.named_weights(model, as_stored=bool(folder.quantization))
    bad: list[bool] = []
    for name, target in targets.items():
        value: Any = tensors[name].reopen()
        size = shards.weight_shape(target)[0]
        if name in hf.VOCAB_TENSORS and size > value.get_shape()[0]:
            value = pad_vocab(value[:], size)
        elif mmap and not transform and use_mapped(target, tensors[name]):
            bad.append(not scan_finite(tensors[name]))
            continue
        if transform:
            value = transform(name, value[:])
        bad.append(not shards.copy_shard(target, value))
    if ranks:
        bad = ranks.all_reduce(torch.tensor(bad, dtype=torch.int32, device=ranks.device)).tolist()
    for name, is_bad in zip(targets, bad):
        if is_bad:
            raise UserError(
                f"{folder.path}: tensor {name} holds NaN or infinity",
                "Copy the folder again, or take another base.",
            )


def use_mapped(target: Any, stored: StoredTensor) -> bool:
    """Make a parameter of the file's own pages, if dtype and device are the same."""
    if not isinstance(target, torch.Tensor):
        return False
    mapped = stored[:]
    if (mapped.dtype, mapped.device) != (target.dtype, target.device):
        return False
    target.data = mapped  # a page that is written to is copied first
    return True


def scan_finite(stored: StoredTensor) -> bool:
    """Return whether a stored tensor is finite; its pages leave memory a few rows at a time."""
    tensor = stored[:]
    rows = max(1, SCAN_BYTES // max(1, tensor[:1].nbytes))
    firsts = range(0, len(tensor), rows)
    return all(shards.all_finite(stored.reopen()[i : i + rows]) for i in firsts)


def pad_vocab(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return a vocabulary with `size` rows: the missing ones are the mean of the others."""
    mean = sum(chunk.float().sum(0) for chunk in rows.split(1024)) / len(rows)
    return torch.cat([rows, mean.to(rows.dtype).expand(size - len(rows), -1)])


def index_tensors(model: Transformer, folder: StrPath | ModelFolder) -> dict[str, StoredTensor]:
    """Return {HF's name: stored tensor} of all that `model`, maybe on meta, takes from `folder`.

    UserError names a tensor that is missing, unknown, of the wrong shape or not of floats. Only
    headers are read.
    """
    folder = hf.open_folder(folder)
    shapes = {}
    for name, target in shards.named_weights(model, as_stored=bool(folder.quantization)).items():
        shapes[name] = shards.weight_shape(target)
        if name in hf.VOCAB_TENSORS:  # the model's may be larger
            shapes[name] = (folder.config.vocab_size, *shapes[name][1:])
    hint = "Does config.json belong to these files? Copy the folder again."
    dtypes = (*cli.FLOAT_DTYPES, "I8", "U8") if folder.quantization else cli.FLOAT_DTYPES
    cli.check_tensors(folder.path, folder.tensors, shapes, "config.json", hint, dtypes)
    return folder.tensors


def fingerprint(tensors: dict[str, StoredTensor]) -> str:
    """Hash weights so that others of the same shape differ, and other folders and dtypes don't.

    The first row of each tensor counts: a few MB of 14 GB, and full fine-tuning changes them all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor[:1].float().numpy().tobytes())
    return digest.hexdigest()


# --- folder → model


class Source(NamedTuple):
    """Where a model's weights are: a base's folder, and the adapter over it, if any."""

    folder: ModelFolder
    adapter: Path | None
    rows: list[int]  # vocabulary rows that the adapter trained


def find_source(path: StrPath, base: StrPath | None = None) -> Source:
    """Find a model's folder, downloading a hub id; for an adapter `base`, or the base it names."""
    folder = hub.resolve(str(path))
    if not hf.is_adapter(folder):
        return Source(hf.open_folder(folder), None, [])
    settings, named = lora.read_adapter_config(folder)
    if not base:
        if not named:
            raise UserError(
                f"{folder / 'adapter_config.json'} names no base", "Say where it is: --model FOLDER"
            )
        if Path(named).is_absolute() and not Path(named).is_dir():
            raise UserError(
                f"{folder} is an adapter over {named}, which is not there",
                "Say where it is now: --model FOLDER",
            )
        base = named
    return Source(hf.open_folder(hub.resolve(str(base))), folder, settings["rows"])


def load_model(
    path: StrPath | Source,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    base: StrPath | None = None,
    tokenizer: Tokenizer | None = None,
    weights: str | None = None,
) -> Transformer:
    """Load a HF folder, a hub id or a `ckpt/` of ours, in eval mode.

    An adapter folder loads its base (or `base`, if that moved), then itself. `dtype`: None as
    stored. `tokenizer`: makes room for the ChatML tokens that the base lacks. `weights`: "plain",
    "int8" or "int4" merges the adapter into the weights tensor by tensor, for chat; None keeps it
    beside them. UserError before memory is taken, except for weights that are not finite.
    """
    folder, adapter, rows = path if isinstance(path, Source) else find_source(path, base)
    config = hf.config_for_tokenizer(folder, tokenizer, rows)
    stored = folder.quantization
    if stored and (adapter or weights not in (None, stored)):
        hint = "Take the bf16 original." if adapter else f"Pass --weights {stored}, or nothing."
        raise UserError(f"{folder.path} holds {stored} weights", hint)
    packing = stored or (weights if weights != "plain" else None)

    def build_meta_model() -> Transformer:
        with torch.device("meta"):
            model = Transformer(config).to(dtype or folder.dtype)
        if packing:
            quantize.pack_linears(model, packing)
        return model

    model, transform = build_meta_model(), None
    tensors = index_tensors(model, folder)
    if adapter:
        lora.load(model, adapter)  # on meta: only checks that it fits
        check_fingerprint(adapter, folder, tensors)
        if weights:
            model, transform = build_meta_model(), lora.merger(adapter)
    shards.materialize(model, device)
    load_weights(model, folder, mmap=True, transform=transform)
    if adapter and not weights:
        lora.load(model, adapter)
    return model.eval().requires_grad_(False)


def check_fingerprint(adapter: Path, folder: ModelFolder, tensors: dict[str, StoredTensor]) -> None:
    """UserError when an adapter was trained over other weights than these."""
    run_file = adapter / "run.json"
    known = cli.read_json(run_file, {}).get("fingerprint")
    if known and known != fingerprint(tensors):
        raise UserError(
            f"{adapter} was trained over {hf.adapter_base(adapter)}; "
            f"{folder.path} has the same shapes, but other weights",
            "Say where that base is: --model FOLDER. "
            f"To insist, remove fingerprint from {run_file}.",
        )


# --- weights for chat


MAX_SLOTS = 8  # answers at a time, unless told


def chat_memory(
    config: ModelConfig, context: int, slots: int = 1, rest_bytes: int = 2
) -> dict[str, int]:
    """Return {weight format: bytes that chat takes}, the widest first.

    `context`: tokens that each of `slots` has room for. `rest_bytes`: of a number beside packed
    weights.
    """
    kv_width = config.num_key_value_heads * config.head_dim
    cache = 2 * config.num_hidden_layers * kv_width * context * slots
    layer = sum(inputs * outputs for inputs, outputs, _ in config.linears.values())
    blocks = config.num_hidden_layers * layer
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    rest = config.num_parameters - blocks - head + cache
    int4_bytes = 0.5 + 4 / quantize.INT4_GROUP
    bytes_each = {  # of a weight in the blocks, of one in the head, of the rest
        "fp32": (4, 4, 4),
        "bf16": (2, 2, 2),
        "int8": (1, 1, rest_bytes),
        "int4": (int4_bytes, 1, rest_bytes),
    }
    needs = {}
    for name, (block_bytes, head_bytes, other_bytes) in bytes_each.items():
        needs[name] = int(other_bytes * rest + block_bytes * blocks + head_bytes * head)
    return needs


def choose_chat_weights(
    folder: ModelFolder,
    context: int,
    device: torch.device,
    requested: str | None = None,
    slots: int = 1,
) -> str:
    """Choose the weight format: as `requested` or stored, else the device's usual, if it fits.

    Else the widest that fits. UserError where none does. `context`, `slots`: as in `chat_memory`.
    """
    dtype = devices.default_dtype(device)
    usual = "bf16" if dtype == torch.bfloat16 else "fp32"
    config, stored = folder.config, folder.quantization
    free = free_bytes(device)
    context = min(context, config.max_position_embeddings)
    needs = chat_memory(config, context, slots, dtype.itemsize)
    fitting = [name for name, need in needs.items() if need <= free]
    if (stored or requested or usual) in fitting:
        return requested or stored or usual
    if fitting and not requested and not stored:
        return fitting[0]
    hint = "Free memory, pass a smaller --context, or take a smaller base."
    if slots > 1:
        hint = "Pass smaller --slots."
    elif fitting and not stored:
        hint = f"Pass --weights {fitting[0]}."
    sizes = ", ".join(f"{need / devices.GIB:.1f} GiB in {name}" for name, need in needs.items())
    free_gib = f"{free / devices.GIB:.1f} GiB"
    raise UserError(f"the model needs {sizes}; {device.type} has {free_gib} free", hint)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return devices.free_memory()


def choose_slots(
    path: StrPath,
    base: StrPath | None,
    context: int,
    device: torch.device,
    requested: str | None = None,
) -> int:
    """Choose how many contexts to cache beside the model: they may take half of the memory left.

    The arguments are `load_for_chat`'s.
    """
    folder = find_source(path, base).folder
    kind = choose_chat_weights(folder, context, device, requested)
    context = min(context, folder.config.max_position_embeddings)
    rest_bytes = devices.default_dtype(device).itemsize
    one, two = (chat_memory(folder.config, context, n, rest_bytes)[kind] for n in (1, 2))
    left = max(0, free_bytes(device) - one)
    return min(MAX_SLOTS, 1 + left // 2 // (two - one))


def load_for_chat(
    path: StrPath,
    base: StrPath | None,
    context: int,
    device: torch.device,
    tokenizer: Tokenizer,
    requested: str | None = None,
    slots: int = 1,
) -> Transformer:
    """Load the model of a `ckpt/` in the format of `choose_chat_weights`, its adapter merged."""
    source = find_source(path, base)
    kind = choose_chat_weights(source.folder, context, device, requested, slots)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = dtypes.get(kind) or devices.default_dtype(device)
    weights = "plain" if kind in dtypes else kind
    return load_model(source, dtype, device, tokenizer=tokenizer, weights=weights)
