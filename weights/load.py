"""Safetensors → model. Strict: the names and shapes in the files must be those that the model needs. Nothing is unpickled."""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cli
import lora
from cli import UserError, read_json
from model import Transformer
from weights import devices, hf, hub, quantize, shards
from weights.quantize import INT4_GROUP

SCAN_BYTES = 1 << 23  # bytes of a mapped weight in memory while it is looked at
VOCAB_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
TENSOR_RENAMES = (  # a tensor's name in a file → HF's; empty: no part of the language model
    (r"^(model\.)?(vision_|multi_modal_|patch_merger|pre_mm_).*|.*rotary_emb\.inv_freq$", ""),
    (r"^language_model\.|(?<=^model\.)language_model\.", ""),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)


@torch.no_grad()
def load_weights(model, folder, ranks=None, keep=False, fold=None):
    """Read the weights of `folder` into an allocated model, each rank only its rows, one tensor in memory at a time.

    `keep`: weights of the model's own kind stay in the file, mapped, and come into memory when they are used. `fold(name, weight)`: what
    becomes of each, as of `lora.folding`. A vocabulary larger than the files' (new ChatML tokens) gets the mean of the old rows.
    UserError as of `find`, and for a weight that is no number, which any of `ranks` may hold.
    """
    found, bad = index_tensors(model, folder), []
    for name, target in shards.named_weights(model, hf.stored_quantization(folder)).items():
        value = found[name].anew()
        if name in VOCAB_TENSORS and shards.weight_shape(target)[0] > value.get_shape()[0]:
            mean = (
                sum(part.float().sum(0) for part in found[name].anew()[:].split(1024))
                / value.get_shape()[0]
            )
            value = PaddedVocab(value, mean, shards.weight_shape(target)[0])
        elif keep and not fold and isinstance(target, torch.Tensor):
            mapped = found[name].get_slice(name)[:]
            if (mapped.dtype, mapped.device) == (target.dtype, target.device):
                target.data = mapped  # whoever writes into the file's pages gets copies of his own
                few = max(1, SCAN_BYTES // max(1, mapped[:1].nbytes))
                bad.append(
                    not all(
                        shards.all_finite(found[name].anew()[i : i + few])
                        for i in range(0, len(mapped), few)
                    )
                )
                continue
        bad.append(not shards.copy_shard(target, fold(name, value[:]) if fold else value))
    if ranks:
        bad = ranks.all_reduce(torch.tensor(bad, dtype=torch.int32, device=ranks.device)).tolist()
    for name, is_bad in zip(shards.named_weights(model, hf.stored_quantization(folder)), bad):
        if is_bad:
            raise UserError(
                f"{folder}: tensor {name} holds NaN or infinity",
                "Copy the folder again, or take another base.",
            )


class StoredTensor(NamedTuple):
    """A tensor of an open file, there under another name maybe. `heads`: in Mistral's own format queries and keys have the two numbers

    that turn together side by side in each of so many heads; HF has them half a head apart.
    """

    file: Any
    name: str
    heads: int
    path: Path

    def anew(self):
        """Its slice, mapped a second time: the pages that are read there leave memory with it."""
        return self._replace(file=cli.open_safetensors(self.path)).get_slice(self.name)

    def get_slice(self, _):
        part = self.file.get_slice(self.name)
        return MistralRotaryLayout(part, self.heads) if self.heads else part


class MistralRotaryLayout(NamedTuple):
    part: Any
    heads: int

    def get_shape(self):
        return self.part.get_shape()

    def get_dtype(self):
        return self.part.get_dtype()

    def __getitem__(self, rows):
        return self.part[:].unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)[rows]


class PaddedVocab(NamedTuple):
    """A slice with more rows, all the mean of those there are."""

    part: Any
    mean: Any
    size: int

    def __getitem__(self, rows):
        first, last, _ = rows.indices(self.size)
        there = self.part[:][first:last]
        return torch.cat([there, self.mean.to(there.dtype).expand(last - first - len(there), -1)])


def index_tensors(model, folder):
    """{tensor by HF's name: where it is Stored} of all that `model`, which may be on the meta device, takes from `folder`.

    UserError names a tensor that is missing, unknown, of the wrong shape or no float, by the files' headers: nothing else is read.
    """
    folder, found = Path(folder), {}
    index, shape = folder / "model.safetensors.index.json", hf.read_config(folder)
    where = dict(hf.read_index(index)) if index.exists() else {}
    for name in hf.weight_files(folder):
        file = cli.open_safetensors(folder / name)
        for tensor in file.keys():
            ours = tensor
            for pattern, by in TENSOR_RENAMES:
                ours = re.sub(pattern, by, ours)
            if where.setdefault(tensor, name) != name:
                raise UserError(
                    f"{folder}: tensor {tensor} is in {name}, and should be in {where[tensor]}",
                    "Copy the folder again.",
                )
            if ours:
                heads = {"wq": shape.num_attention_heads, "wk": shape.num_key_value_heads}.get(
                    tensor.split(".")[-2:][0], 0
                )
                found[ours] = StoredTensor(file, tensor, heads, folder / name)
    if shape.tie_word_embeddings and "lm_head.weight" in found:
        head, embeddings = (found[name].get_slice(name) for name in reversed(VOCAB_TENSORS))
        if head.get_shape() != embeddings.get_shape() or not torch.equal(
            head[-9:], embeddings[-9:]
        ):
            raise UserError(
                f"{folder}: by config.json lm_head is tied to the embeddings, but the files hold another",
                "Set tie_word_embeddings to false in it.",
            )
        del found["lm_head.weight"]
    kind = hf.stored_quantization(folder)
    wanted = {
        name: shards.weight_shape(target)
        for name, target in shards.named_weights(model, kind).items()
    }
    wanted |= {
        name: (shape.vocab_size, *wanted[name][1:]) for name in VOCAB_TENSORS if name in wanted
    }
    dtypes = (*cli.FLOAT_DTYPES, "I8", "U8") if kind else cli.FLOAT_DTYPES
    cli.check_tensors(
        folder,
        found,
        wanted,
        "config.json",
        "Does config.json belong to these files? Copy the folder again.",
        dtypes,
    )
    return found


def fingerprint(found):
    """What tells these weights (of `find`) from others of the same shape, in whatever folder, dtype and number of files they lie."""
    total = hashlib.blake2b(digest_size=16)
    for name, file in sorted(
        found.items()
    ):  # a row of each: a few MB of 14 GB, and full fine-tuning changes every tensor
        total.update(name.encode() + file.get_slice(name)[:1].float().numpy().tobytes())
    return total.hexdigest()


def load_model(path, dtype=None, device="cpu", base=None, tokenizer=None, weights=None):
    """A HF folder, a hub id, or a `ckpt/` of ours → Transformer in eval mode, in `dtype` (None: as stored), on `device`.

    An adapter folder loads its base (or `base`, if that lies elsewhere now), then itself. `words`: the tokenizer it is for; the model
    gets room for ChatML tokens that its base lacked. `weights`, for chat: "plain", "int8" or "int4", with the adapter merged into them,
    one tensor in memory at a time. UserError before memory is taken, but for weights that are no numbers.
    """
    folder = hub.resolve(path)
    adapter, rows = folder if hf.is_adapter(folder) else None, []
    if adapter:
        arguments, named = lora.read_adapter_config(adapter)
        rows = arguments["rows"]
        if not base and not named:
            raise UserError(
                f"{adapter / 'adapter_config.json'} names no base",
                "Say where it lies: --model FOLDER",
            )
        if not base and Path(named).is_absolute() and not Path(named).is_dir():
            raise UserError(
                f"{adapter} is an adapter over {named}, which is not there",
                "Say where it lies now: --model FOLDER",
            )
        folder = hub.resolve(base or named)
    shape, kind = hf.config_for_tokenizer(folder, tokenizer, rows), hf.stored_quantization(folder)
    if kind and (adapter or weights not in (None, kind)):
        raise UserError(
            f"{folder} holds {kind} weights",
            "Take the bf16 original." if adapter else f"Say --weights {kind}, or nothing.",
        )

    def outline():
        with torch.device("meta"):
            model = Transformer(shape).to(dtype or hf.stored_dtype(folder))
        if kind or weights in ("int8", "int4"):
            quantize.pack_linears(model, kind or weights)
        return model

    model = outline()
    found = index_tensors(model, folder)
    if adapter:
        lora.load(model, adapter)
        known = read_json(adapter / "run.json", {}).get("fingerprint")
        if known and known != fingerprint(found):
            raise UserError(
                f"{adapter} was trained over {named}; {folder} has the same shapes, but other weights",
                f"Say where that base lies: --model FOLDER. To insist, take fingerprint out of {adapter / 'run.json'}.",
            )
    fold = None
    if adapter and weights:
        model, fold = outline(), lora.merger(adapter)
    shards.materialize(model, device)
    load_weights(model, folder, keep=True, fold=fold)
    if adapter and not weights:
        lora.load(model, adapter)
    return model.eval().requires_grad_(False)


def chat_memory(shape, size):
    """What talking to a model takes, with a memory of `size` tokens. → {what its weights are held in: bytes}, the widest first"""
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size
    blocks = shape.num_hidden_layers * sum(wide * out for wide, out, _ in shape.linears.values())
    head = shape.vocab_size * shape.hidden_size * (not shape.tie_word_embeddings)
    rest = 2 * (shape.num_parameters - blocks - head + cache)
    widths = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 1), "int4": (0.5 + 4 / INT4_GROUP, 1)}
    return {
        name: int(rest * (2 if name == "fp32" else 1) + a * blocks + b * head)
        for name, (a, b) in widths.items()
    }


def choose_chat_weights(folder, base, size, device, asked=None):
    """What to hold a chat model's weights in: as `asked` or as they are stored, else what is usual on `device`, else the widest that fits.

    UserError where none does. A folder that can't be read is left to whoever loads it.
    """
    usual = asked or ("bf16" if devices.default_dtype(device) == torch.bfloat16 else "fp32")
    try:
        if hf.is_adapter(folder):
            base = base or hf.adapter_base(folder) or ""
            folder = Path(base) if Path(base).is_dir() else hub.cached_folder(base)
        shape = folder and hf.read_config(folder)
        stored = shape and hf.stored_quantization(folder)
    except UserError:
        shape = None
    if not shape:
        return usual
    free = {
        "cuda": lambda: torch.cuda.mem_get_info(device)[0],
        "mps": lambda: torch.mps.recommended_max_memory(),
    }
    free = free.get(device.type, devices.free_memory)()
    needs = chat_memory(shape, min(size, shape.max_position_embeddings))
    fitting = [name for name, need in needs.items() if need <= free]
    wanted = stored or usual
    if wanted in fitting:
        return asked or wanted
    if fitting and not asked and not stored:
        return fitting[0]
    said = ", ".join(f"{need / devices.GIB:.1f} GiB in {name}" for name, need in needs.items())
    way_out = (
        f"Say --weights {fitting[0]}."
        if fitting and not stored
        else "Close what uses it, say --context less, or take a smaller base."
    )
    raise UserError(
        f"the model needs {said}; {device.type} has {free / devices.GIB:.1f} GiB free", way_out
    )


def load_for_chat(folder, base, size, device, tokenizer, asked=None):
    """The model of a `ckpt/` in what `chat_weights` says, an adapter merged → Transformer"""
    kind = choose_chat_weights(folder, base, size, device, asked)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(kind) or devices.default_dtype(
        device
    )
    return load_model(
        str(folder), dtype, device, base, tokenizer, "plain" if kind in ("bf16", "fp32") else kind
    )
