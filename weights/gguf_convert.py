"""GGUF in: a model file of llama.cpp's becomes a Hugging Face folder to train on.

The `gguf` package dequantizes the weights and knows their names. The header is read here: gguf's
own reader takes 5 s for 49,000 tokens, and trusts every count in a damaged file.
"""

import dataclasses
import math
import mmap
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Engine

import cli
from cli import UserError, flag
from model import ModelConfig, Transformer, rope_inv_freq
from weights import hf, shards
from weights.save import write_tensors
from weights.tokenizer import (
    byte_level_bpe,
    load_tokenizer,
    sentencepiece_bpe,
    set_bos,
    special_token,
)

# a value's type in GGUF → struct's letter
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
STRING, ARRAY = 8, 9
MAX_ITEMS = 1 << 22  # in an array, or tensors: vocabularies have 300,000
CHUNK = 1 << 22  # dequantized numbers in float32 at a time
# token types
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
HF_KEYS = {  # a metadata key → HF's
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
UNSUPPORTED_YARN = ("attn_factor", "yarn_attn_factor", "yarn_log_multiplier")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


class PreTokenizer(NamedTuple):
    """The settings of `byte_level_bpe` that llama.cpp's `pre` stands for.

    `adds_bos`: a text begins with BOS where the file doesn't say.
    """

    split: str | None
    ignore_merges: bool = False
    adds_bos: bool = False
    nfc: bool = False


PRE_TOKENIZERS = {
    "smollm": PreTokenizer(None),
    "qwen2": PreTokenizer(QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(QWEN2_SPLIT, nfc=True),
    "llama-bpe": PreTokenizer(LLAMA3_SPLIT, ignore_merges=True, adds_bos=True),
    "tekken": PreTokenizer(TEKKEN_SPLIT, ignore_merges=True, adds_bos=True),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert a GGUF file for --model.  python -m weights.gguf_convert model.gguf base/"""

    file: str = flag("", "the GGUF file: Llama, Mistral, Qwen2, Qwen3", positional=True)
    out: str = flag("", "the folder to write", positional=True)
    dtype: str = flag("bfloat16", "of the weights written", choices=tuple(hf.DTYPES))
    overwrite: bool = flag(False, "replace the folder")


def import_gguf() -> Any:
    """Return the `gguf` package. UserError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("gguf is not installed", "pip install -r requirements-extra.txt") from None
    return gguf


# --- the file


class Tensor(NamedTuple):
    """A tensor of the file, with what `cli.check_tensors` asks an open file for."""

    kind: int  # gguf's quantization type
    shape: tuple[int, ...]
    data: np.ndarray  # rows of quantized blocks as bytes, mapped

    def get_slice(self, _: str) -> "Tensor":
        return self

    def get_shape(self) -> list[int]:
        return [*self.shape]

    def get_dtype(self) -> str:
        return "F32"

    def dequantize(self, dtype: torch.dtype, heads: int = 0) -> torch.Tensor:
        """Return the values, some rows at a time through float32.

        `heads`: llama.cpp keeps the two numbers that rotary positions turn together side by side
        in each of so many heads; HF keeps them half a head apart.
        """
        gguf = import_gguf()
        kind, data = gguf.GGMLQuantizationType(self.kind), self.data
        if heads:
            data = data.reshape(heads, -1, 2, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
        count = max(1, CHUNK * len(data) // math.prod(self.shape))
        chunks = []
        for first in range(0, len(data), count):
            rows = data[first : first + count].copy()  # mapped pages can't be written
            chunks.append(torch.from_numpy(gguf.dequantize(rows, kind)).to(dtype))
        return torch.cat(chunks).view(self.shape)


class TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # from the end of the header, in bytes


class Header:
    """A GGUF file's metadata and tensors, read with every length checked. ValueError if wrong."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(cli.describe_file(path, "it is not a GGUF file"))
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.read(4)
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"it is GGUF version {version}, supported are 2 and 3")
        tensor_count, key_count = self.count(), self.count()
        self.metadata = {self.string(): self.value(self.number("I")) for _ in range(key_count)}
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r:.60}")
        start = -(-self.position // alignment) * alignment
        self.tensors = {info.name: self.tensor(info, start) for info in infos}
        if len(self.tensors) != tensor_count:
            raise ValueError("two of its tensors have one name")

    def read(self, count: int) -> bytes:
        self.position += count
        if self.position > len(self.bytes):
            raise ValueError("it ends within its header")
        return self.bytes[self.position - count : self.position]

    def numbers(self, letter: str, count: int) -> tuple:
        data = self.read(count * struct.calcsize(f"<{letter}"))
        return struct.unpack(f"<{count}{letter}", data)

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def count(self) -> int:
        if (count := self.number("Q")) > MAX_ITEMS:
            raise ValueError(f"its header counts {count:,} items")
        return count

    def string(self) -> str:
        return self.read(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.count()
            if kind in SCALARS:
                return self.numbers(SCALARS[kind], count)
            if kind == STRING:
                return [self.string() for _ in range(count)]
        raise ValueError(f"its header holds a value of unknown type {kind}")

    def tensor_info(self) -> TensorInfo:
        name, dimensions = self.string(), self.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r:.60} has {dimensions} dimensions")
        shape = self.numbers("Q", dimensions)[::-1]
        return TensorInfo(name, shape, self.number("I"), self.number("Q"))

    def tensor(self, info: TensorInfo, start: int) -> Tensor:
        """Map a tensor, whose offset counts from `start`."""
        gguf = import_gguf()
        name, shape, kind, offset = info
        if kind not in [*gguf.GGMLQuantizationType]:
            raise ValueError(f"tensor {name!r:.60} is of type {kind}, unknown to gguf")
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if shape[-1] % block or not all(shape):
            raise ValueError(f"tensor {name!r:.60} is {[*shape]}, in blocks of {block}")
        size, begin = math.prod(shape) // block * block_bytes, start + offset
        if begin + size > len(self.bytes):
            raise ValueError(f"it is cut off: tensor {name!r:.60} ends beyond it")
        data = np.frombuffer(self.bytes, np.uint8, size, begin)
        # a bias has rows of one block
        width = block_bytes if len(shape) == 1 else shape[-1] // block * block_bytes
        return Tensor(kind, shape, data.reshape(-1, width))


# --- the folder


def convert(path: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model and the tokenizer of a GGUF file as a HF folder: all of it, or nothing.

    UserError for a file that is damaged, or holds what our model doesn't compute.
    """
    try:
        header = Header(path)
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}", "Copy it again.") from None
    part = Path(f"{folder.absolute()}.new")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_folder(header, part, dtype)
        folder.mkdir(exist_ok=True)
        hf.clear_output(folder)
        # config.json last: it makes a folder a model's
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
    except UserError as error:  # it may name a file in `part`, which nobody has seen
        problem, hint = str(error).replace(str(part), str(path)).split("\n", 1)
        raise UserError(problem, hint) from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its header makes no sense: {error!r:.200}", "Copy it again."
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_folder(header: Header, folder: Path, dtype: torch.dtype) -> None:
    """Write config, tokenizer and weights, and read back what every program will."""
    raw_config = read_metadata(header) | {"dtype": str(dtype).removeprefix("torch.")}
    ends = {f"{name}_token_id": i for name, i in end_ids(header).items()}
    cli.write_json(folder / "config.json", raw_config | ends)
    cli.write_json(folder / "generation_config.json", ends)
    config = hf.parse_config(header.path, raw_config)
    check_rope_freqs(header, config)
    write_tokenizer(header, folder)
    load_tokenizer(folder).check(raw_config | ends, header.path, config.vocab_size)
    tensors = find_tensors(header, config)
    needed = sum(math.prod(tensor.shape) for tensor in tensors.values()) * dtype.itemsize
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "Make room, or name a folder elsewhere.",
        )
    write_tensors(folder, dequantized(header, config, tensors, dtype))


def find_tensors(header: Header, config: ModelConfig) -> dict[str, Tensor]:
    """Return {HF's name: tensor}. UserError unless they are the model's."""
    gguf = import_gguf()
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = architectures[header.metadata["general.architecture"]]
    name_map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    unused = {name: t for name, t in header.tensors.items() if name != "rope_freqs.weight"}
    tensors = {}
    for name in shapes:
        stem, _, kind = name.rpartition(".")
        gguf_name = f"{name_map.get_name(stem)}.{kind}"
        if gguf_name in unused:
            tensors[name] = unused.pop(gguf_name)
    cli.check_tensors(header.path, tensors | unused, shapes, "its header", "Take another base.")
    return tensors


def dequantized(
    header: Header, config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF's name, weight in `dtype`). UserError for NaN or infinity."""
    for name, tensor in tensors.items():
        is_llama = header.metadata["general.architecture"] == "llama"
        heads = hf.rotary_heads(name, config) if is_llama else 0
        weight = tensor.dequantize(dtype, heads)
        if not shards.all_finite(weight):
            raise UserError(
                f"{header.path}: tensor {name} holds NaN or infinity",
                "Copy it again, or take another base.",
            )
        yield name, weight


# --- config.json


def read_metadata(header: Header) -> dict[str, Any]:
    """Return the metadata as HF's config.json."""
    path = header.path
    metadata, tensors = header.metadata, header.tensors
    family = metadata.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise UserError(
            f"{path}: architecture {family!r:.60} is not supported",
            "Supported: llama (Mistral too), qwen2, qwen3.",
        )
    if metadata.get("split.count", 1) != 1:
        raise UserError(
            f"{path} is one of several parts", "Join them first: llama-gguf-split --merge"
        )
    missing = [f"{family}.{key}" for key in HF_KEYS if f"{family}.{key}" not in metadata]
    if "token_embd.weight" not in tensors:
        missing.append("token_embd.weight")
    if missing:
        raise UserError(
            f"{path}: {missing[0]} is missing",
            "It is not a model, or an old one: make it with a newer llama.cpp.",
        )

    def value(key: str, default: Any = None) -> Any:
        number = metadata.get(f"{family}.{key}", default)
        if type(number) is float:
            return float(str(np.float32(number)))  # 1e-05, not 9.99999974e-06
        return number

    raw_config = {name: value(key) for key, name in HF_KEYS.items()}
    rope_size = value("rope.dimension_count")
    head_dim = value("attention.key_length", rope_size if family == "llama" else None)
    if None not in (rope_size, head_dim) and rope_size != head_dim:
        raise UserError(
            f"{path}: RoPE on a part of each head is not supported", "Take another base."
        )
    heads = raw_config["num_attention_heads"]
    window = value("attention.sliding_window")
    model_type = "mistral" if family == "llama" and window else family
    raw_config |= {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(header, value),
    }
    if family != "qwen2":
        raw_config["attention_bias"] = "blk.0.attn_output.bias" in tensors
    if model_type == "llama":
        return raw_config | {"mlp_bias": "blk.0.ffn_down.bias" in tensors}
    if model_type == "mistral":
        return raw_config | {"sliding_window": window}
    return raw_config | {"use_sliding_window": False}


def rope_scaling(header: Header, value: Any) -> dict[str, Any] | None:
    """Return how positions are stretched, by HF's keys; `value(key)` reads the metadata."""
    if "rope_freqs.weight" in header.tensors:
        factor = float(rope_freqs(header).max())
        return {"rope_type": "llama3", "factor": factor, **LLAMA3} if factor != 1 else None
    kind = value("rope.scaling.type", "none")
    factor = value("rope.scaling.factor", value("rope.scale_linear"))
    if kind == "none":  # as in older files
        kind = "linear"
    if kind == "linear" and factor in (None, 0, 1):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        for key in UNSUPPORTED_YARN:
            if value(f"rope.scaling.{key}", 1) != 1:
                raise UserError(
                    f"{header.path}: YaRN with {key} is not supported", "Take another base."
                )
        scaling |= {
            "beta_fast": value("rope.scaling.yarn_beta_fast"),
            "beta_slow": value("rope.scaling.yarn_beta_slow"),
            "original_max_position_embeddings": value("rope.scaling.original_context_length"),
        }
    return {key: number for key, number in scaling.items() if number is not None}


def rope_freqs(header: Header) -> torch.Tensor:
    return header.tensors["rope_freqs.weight"].dequantize(torch.float32).flatten()


def check_rope_freqs(header: Header, config: ModelConfig) -> None:
    """UserError unless a file's own frequencies are Llama 3's, which config.json can name."""
    if "rope_freqs.weight" not in header.tensors:
        return
    factors = rope_freqs(header)
    plain = rope_inv_freq(dataclasses.replace(config, rope_scaling=None), "cpu")[0]
    ours = plain / rope_inv_freq(config, "cpu")[0]
    if ours.shape != factors.shape or not torch.allclose(ours, factors, rtol=1e-3):
        raise UserError(
            f"{header.path}: rope_freqs.weight is not that of Llama 3", "Take another base."
        )


# --- the tokenizer


def write_tokenizer(header: Header, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. UserError if the tokenizer can't be read."""
    metadata, path = header.metadata, header.path
    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise UserError(
            f"{path}: tokenizer {model!r:.60} is not supported",
            "Supported: gpt2 and llama, with their tokens.",
        )
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    try:
        make = gpt2_tokenizer if model == "gpt2" else llama_tokenizer
        engine, adds_bos = make(header, tokens, types)
        named = {f"{name}_token": tokens[i] for name, i in end_ids(header).items()}
        special = [token for token, kind in zip(tokens, types) if kind in (UNKNOWN, CONTROL)]
        engine.add_special_tokens([special_token(token) for token in (*special, *named.values())])
        ordinary = [token for token, kind in zip(tokens, types) if kind == USER_DEFINED]
        engine.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, and the lists may hold anything
        raise UserError(
            f"{path}: its tokenizer can't be read: {str(error).splitlines()[0]:.200}",
            "Copy it again.",
        ) from None
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in named
    if adds_bos:
        set_bos(engine, named["bos_token"])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(adds_bos)}
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    cli.write_text(folder / "tokenizer.json", engine.to_str(pretty=True))
    cli.write_json(folder / "tokenizer_config.json", settings | named)


def end_ids(header: Header) -> dict[str, int]:
    """Return the ids of "bos" and "eos", where the file has them."""
    ids = {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return {name: i for name, i in ids.items() if i is not None}


def gpt2_tokenizer(header: Header, tokens: list[str], types: Any) -> tuple[Engine, bool]:
    """Return (the tokenizer, whether it adds BOS where the file doesn't say)."""
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{header.path}: pre-tokenizer {name!r:.60} is not supported",
            f"Supported: {', '.join(PRE_TOKENIZERS)}.",
        )
    pre = PRE_TOKENIZERS[name]
    padding = {f"[PAD{i}]" for i, kind in enumerate(types) if kind == UNUSED}  # rows of no token
    vocab = {token: i for i, token in enumerate(tokens) if token not in padding}
    merges = [tuple(merge.split(" ")) for merge in header.metadata["tokenizer.ggml.merges"]]
    engine = byte_level_bpe(vocab, merges, pre.split, pre.ignore_merges)
    if pre.nfc:
        engine.normalizer = normalizers.NFC()
    return engine, pre.adds_bos


def llama_tokenizer(header: Header, tokens: list[str], types: Any) -> tuple[Engine, bool]:
    """Return (the tokenizer, whether it adds BOS where the file doesn't say)."""
    mergeable = [i for i, kind in enumerate(types) if kind in (NORMAL, USER_DEFINED)]
    unk = tokens[header.metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    scores = header.metadata["tokenizer.ggml.scores"]
    return sentencepiece_bpe(tokens, scores, mergeable, unk, bool(prefix)), True


def main() -> None:
    options = cli.parse(Options)
    path, folder = Path(options.file), Path(options.out)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file", "Give a GGUF file.")
    cli.check_output_dir(folder, options.overwrite)
    convert(path, folder, hf.DTYPES[options.dtype])
    print(f"{folder} is ready: --model {folder}")


if __name__ == "__main__":
    cli.run(main)
