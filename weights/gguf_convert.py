"""GGUF in: a model file of llama.cpp's becomes a Hugging Face folder to train on.

Weights are dequantized by the `gguf` package, a few rows at a time. The header is read here:
gguf's own reader takes 5 s for 49,000 tokens, and trusts every count in a damaged file.
"""

import dataclasses
import json
import math
import mmap
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

import cli
from cli import UserError, flag
from model import Transformer, rope_inv_freq
from weights import hf, shards
from weights.tokenizer import load_tokenizer, sentencepiece_bpe, special_token

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
STRING, ARRAY = 8, 9
MAX_ITEMS = 1 << 22  # of an array, or tensors: vocabularies have 300,000
CHUNK = 1 << 22  # dequantized numbers in memory at a time
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # token types
NAMES = {  # a tensor's name in GGUF → HF's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIZES = {  # a metadata key → HF's
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # HF's → GGUF's
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
YARN_SCALES = ("attn_factor", "yarn_attn_factor", "yarn_log_multiplier")
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
    """How a byte-level BPE of llama.cpp's `pre` cuts text before it merges.

    `split`: a regex; None is GPT-2's, with each digit alone. `whole`: a word that is a token stays
    whole.
    """

    split: str | None
    whole: bool = False
    adds_bos: bool = False
    nfc: bool = False


PRE_TOKENIZERS = {
    "smollm": PreTokenizer(None),
    "qwen2": PreTokenizer(QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(QWEN2_SPLIT, nfc=True),
    "llama-bpe": PreTokenizer(LLAMA3_SPLIT, whole=True, adds_bos=True),
    "tekken": PreTokenizer(TEKKEN_SPLIT, whole=True, adds_bos=True),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert a GGUF file to a folder for --model.  python -m weights.gguf_convert model.gguf base/"""

    file: str = flag("", "the GGUF file: Llama, Mistral, Qwen2, Qwen3", positional=True)
    out: str = flag("", "the folder to write", positional=True)
    dtype: str = flag("bfloat16", "of the weights written", choices=tuple(hf.DTYPES))
    overwrite: bool = flag(False, "replace the folder")


class Tensor(NamedTuple):
    """A tensor of the file; `data`: rows of quantized blocks, as bytes, mapped."""

    kind: int
    shape: tuple[int, ...]
    data: np.ndarray

    def get_slice(self, _: str) -> "Tensor":
        return self

    def get_shape(self) -> list[int]:
        return [*self.shape]

    def get_dtype(self) -> str:
        return "F32"

    def chunks(self, heads: int = 0) -> Iterator[torch.Tensor]:
        """Yield the values in float32, some rows at a time.

        `heads`: llama.cpp keeps the two numbers that rotary positions turn together side by side
        in each of so many heads; HF keeps them half a head apart.
        """
        gguf = package()
        data = self.data
        if heads:
            data = data.reshape(heads, -1, 2, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
        few = max(1, CHUNK * len(data) // math.prod(self.shape))
        for first in range(0, len(data), few):
            rows = data[first : first + few].copy()  # mapped pages can't be written
            yield torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType(self.kind)))


class Header:
    """What the file says before its weights, read with every length checked."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(cli.describe_file(path, "it is no GGUF file"))
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.take(4)
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"it is of GGUF version {version}, known are 2 and 3")
        tensor_count, key_count = self.count(), self.count()
        self.metadata = {self.string(): self.value(self.number("I")) for _ in range(key_count)}
        places = [self.place() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r:.60}")
        begin = -(-self.at // alignment) * alignment
        self.tensors = {name: self.tensor(begin, name, *place) for name, *place in places}
        if len(self.tensors) != tensor_count:
            raise ValueError("two of its tensors have one name")

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.bytes):
            raise ValueError("it ends within its header")
        return self.bytes[self.at - count : self.at]

    def numbers(self, code: str, count: int) -> tuple:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def count(self) -> int:
        if (count := self.number("Q")) > MAX_ITEMS:
            raise ValueError(f"its header counts {count:,} items")
        return count

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        of, count = (self.number("I"), self.count()) if kind == ARRAY else (kind, 0)
        if of in SCALARS:
            return self.numbers(SCALARS[of], count)
        if of == STRING:
            return [self.string() for _ in range(count)]
        raise ValueError(f"its header holds a value of type {of}, which is not known")

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        """Where a tensor lies: (name, shape, type, offset)."""
        name, dimensions = self.string(), self.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r:.60} has {dimensions} dimensions")
        shape = self.numbers("Q", dimensions)
        return name, shape[::-1], self.number("I"), self.number("Q")

    def tensor(self, begin: int, name: str, shape: tuple[int, ...], *place: int) -> Tensor:
        kind, offset = place
        gguf = package()
        if kind not in [*gguf.GGMLQuantizationType]:
            raise ValueError(f"tensor {name!r:.60} is of type {kind}, which gguf doesn't know")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if shape[-1] % block or not all(shape):
            raise ValueError(f"tensor {name!r:.60} is {[*shape]}, in blocks of {block}")
        count, first = math.prod(shape) // block * size, begin + offset
        if first + count > len(self.bytes):
            raise ValueError(f"it is cut off: tensor {name!r:.60} ends beyond it")
        data = np.frombuffer(self.bytes, np.uint8, count, first)
        wide = size if len(shape) == 1 else shape[-1] // block * size  # a bias has rows of one
        return Tensor(kind, shape, data.reshape(-1, wide))


def package() -> Any:
    """The `gguf` package, which dequantizes. UserError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("gguf is not installed", "pip install -r requirements-extra.txt") from None
    return gguf


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
        write_config(header, part, dtype)
        tensors = find_tensors(header, part)
        write_weights(part / "model.safetensors", tensors, dtype)
        folder.mkdir(exist_ok=True)
        hf.clear_output(folder)
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)  # the last makes it a model's folder
    except UserError as error:  # of what was made of the file, which a person doesn't know
        text = str(error).replace(str(part / "config.json"), str(path))
        text = text.replace(str(part), str(path))
        problem, _, way_out = text.partition("\n")
        raise UserError(problem, way_out) from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its header makes no sense: {error!r:.200}",
            "Copy it again.",
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_config(header: Header, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and the tokenizer, and read both as every program will."""
    metadata = header.metadata
    special = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ends = {f"{name}_token_id": i for name, i in special.items() if i is not None}
    raw_config = read_metadata(header)
    raw_config |= {"dtype": str(dtype).removeprefix("torch."), **ends}
    cli.write_json(folder / "config.json", raw_config)
    cli.write_json(folder / "generation_config.json", ends)
    model_config = hf.read_config(folder)
    check_rope_freqs(header, model_config)
    write_tokenizer(header, folder)
    load_tokenizer(folder).check(raw_config, folder, model_config.vocab_size)


# --- config.json


def read_metadata(header: Header) -> dict:
    """The metadata as HF's config.json."""
    path, metadata, tensors = header.path, header.metadata, header.tensors
    family = metadata.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise UserError(
            f"{path}: architecture {family!r:.60} is not known here",
            "Known: llama (Mistral too), qwen2, qwen3.",
        )
    if metadata.get("split.count", 1) != 1:
        raise UserError(
            f"{path} is one of several parts",
            "Join them first: llama-gguf-split --merge",
        )
    missing = [key for key in SIZES if f"{family}.{key}" not in metadata]
    if missing or "token_embd.weight" not in tensors:
        what = f"{family}.{missing[0]}" if missing else "token_embd.weight"
        raise UserError(
            f"{path}: {what} is missing",
            "It is no model, or an old one: make it with a newer llama.cpp.",
        )

    def value(key: str, default: Any = None) -> Any:
        number = metadata.get(f"{family}.{key}", default)
        if type(number) is float:
            return float(str(np.float32(number)))  # 1e-05, not 9.99999974e-06
        return number

    raw_config = {name: value(key) for key, name in SIZES.items()}
    heads = raw_config["num_attention_heads"]
    raw_config["num_key_value_heads"] = value("attention.head_count_kv", heads)
    turned = value("rope.dimension_count")
    raw_config["head_dim"] = value("attention.key_length", turned if family == "llama" else None)
    if None not in (turned, raw_config["head_dim"]) and turned != raw_config["head_dim"]:
        raise UserError(
            f"{path}: RoPE on a part of each head is not known here",
            "Take another base.",
        )
    raw_config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    raw_config["tie_word_embeddings"] = "output.weight" not in tensors
    raw_config["rope_theta"] = value("rope.freq_base", 10000.0)
    raw_config["rope_scaling"] = rope_scaling(header, value)
    window = value("attention.sliding_window")
    if family != "qwen2":
        raw_config["attention_bias"] = "blk.0.attn_output.bias" in tensors
    if family == "llama" and window:
        family = "mistral"
    if family == "llama":
        raw_config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    elif family == "mistral":
        raw_config["sliding_window"] = window
    else:
        raw_config["use_sliding_window"] = False
    name = f"{family.capitalize()}ForCausalLM"
    return {"architectures": [name], "model_type": family, "hidden_act": "silu"} | raw_config


def rope_scaling(header: Header, value: Any) -> dict | None:
    """How positions are stretched, by HF's keys."""
    kind = value("rope.scaling.type", "none")
    factor = value("rope.scaling.factor", value("rope.scale_linear"))
    known = value("rope.scaling.original_context_length")
    if "rope_freqs.weight" in header.tensors:
        factor = float(next(header.tensors["rope_freqs.weight"].chunks()).max())
        return {"rope_type": "llama3", "factor": factor, **LLAMA3} if factor != 1 else None
    if kind == "none" and not factor or kind == "linear" and factor in (None, 0, 1):
        return None
    scaling = {"rope_type": "linear" if kind == "none" else kind, "factor": factor}
    if kind == "yarn":
        scaling |= {name: value(f"rope.scaling.{key}") for key, name in YARN.items()}
        scaling["original_max_position_embeddings"] = known
        odd = [key for key in YARN_SCALES if value(f"rope.scaling.{key}", 1) != 1]
        if odd:
            raise UserError(
                f"{header.path}: YaRN with {odd[0]} is not known here",
                "Take another base.",
            )
    return {key: number for key, number in scaling.items() if number is not None}


def check_rope_freqs(header: Header, model_config: Any) -> None:
    """UserError unless a file's own frequencies are Llama 3's, which config.json can name."""
    if "rope_freqs.weight" not in header.tensors:
        return
    factors = next(header.tensors["rope_freqs.weight"].chunks()).flatten()
    plain = rope_inv_freq(dataclasses.replace(model_config, rope_scaling=None), "cpu")[0]
    ours = plain / rope_inv_freq(model_config, "cpu")[0]
    if ours.shape != factors.shape or not torch.allclose(ours, factors, rtol=1e-3):
        raise UserError(
            f"{header.path}: rope_freqs.weight is not that of Llama 3",
            "Take another base.",
        )


# --- the tokenizer


def write_tokenizer(header: Header, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    metadata, path = header.metadata, header.path
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise UserError(
            f"{path}: tokenizer {kind!r:.60} is not known here",
            "Known: gpt2 and llama, with their tokens.",
        )
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    try:
        make = byte_level_bpe if kind == "gpt2" else sentencepiece
        engine, adds_bos = make(header, tokens, types)
        named = {}
        for name, key in SPECIAL.items():
            i = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if i is not None and (name in ("bos", "eos") or types[i] in (UNKNOWN, CONTROL)):
                named[f"{name}_token"] = tokens[i]  # a pad token may be a plain word
        special = [token for token, kind in zip(tokens, types) if kind in (UNKNOWN, CONTROL)]
        special += [*named.values()]
        engine.add_special_tokens([special_token(token) for token in special])
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
        bos = named["bos_token"]
        ids = [(bos, engine.token_to_id(bos))]
        begin = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
        engine.post_processor = begin
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": bool(adds_bos),
    }
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    cli.write_text(folder / "tokenizer.json", engine.to_str(pretty=True))
    cli.write_json(folder / "tokenizer_config.json", settings)


def byte_level_bpe(header: Header, tokens: list[str], types: Any) -> tuple[Engine, bool]:
    """→ (the tokenizer, whether llama.cpp begins a text with BOS where the file doesn't say)"""
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{header.path}: pre-tokenizer {name!r:.60} is not known here",
            f"Known: {', '.join(PRE_TOKENIZERS)}.",
        )
    pre = PRE_TOKENIZERS[name]
    padding = {f"[PAD{i}]" for i, kind in enumerate(types) if kind == UNUSED}  # of no token
    vocab = {token: i for i, token in enumerate(tokens) if token not in padding}
    merges = [tuple(merge.split(" ")) for merge in header.metadata["tokenizer.ggml.merges"]]
    engine = Engine(models.BPE(vocab, merges, ignore_merges=pre.whole))
    if pre.nfc:
        engine.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Digits(individual_digits=True)
    if pre.split:
        cut = pre_tokenizers.Split(Regex(pre.split), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.split)
    engine.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
    engine.decoder = decoders.ByteLevel()
    return engine, pre.adds_bos


def sentencepiece(header: Header, tokens: list[str], types: Any) -> tuple[Engine, bool]:
    """→ (the tokenizer, whether llama.cpp begins a text with BOS where the file doesn't say)"""
    mergeable = [i for i, kind in enumerate(types) if kind in (NORMAL, USER_DEFINED)]
    unk = tokens[header.metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    scores = header.metadata["tokenizer.ggml.scores"]
    return sentencepiece_bpe(tokens, scores, mergeable, unk, bool(prefix)), True


# --- weights


def find_tensors(header: Header, folder: Path) -> dict[str, tuple[Tensor, int]]:
    """Match the file's tensors with the model's. UserError unless they are the same.

    {HF's name: (tensor, its heads where they are in llama.cpp's order, else 0)}
    """
    model_config, found = hf.read_config(folder), {}
    interleaved = header.metadata["general.architecture"] == "llama"
    heads = {"attn_q": model_config.num_attention_heads, "attn_k": model_config.num_key_value_heads}
    for name, tensor in header.tensors.items():
        stem, _, kind = name.rpartition(".")
        block = stem.split(".")[1] if stem.startswith("blk.") and stem.count(".") == 2 else None
        leaf = stem.rpartition(".")[2] if block else stem
        if name == "rope_freqs.weight":
            continue
        ours = NAMES.get(leaf, stem)
        ours = f"model.layers.{block}.{ours}.{kind}" if block else f"{ours}.{kind}"
        found[ours] = tensor, heads.get(leaf, 0) * interleaved
    with torch.device("meta"):
        model = Transformer(model_config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = {name: tensor for name, (tensor, _) in found.items()}
    cli.check_tensors(header.path, tensors, wanted, "its header", "Take another base.")
    return {name: found[name] for name in wanted}


def write_weights(path: Path, tensors: dict[str, tuple[Tensor, int]], dtype: torch.dtype) -> None:
    """Write one safetensors file, some rows in memory at a time."""
    kind = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (tensor, _) in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        entries[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [begin, end]}
    if end > (free := shutil.disk_usage(path.parent).free):
        raise UserError(
            f"{path} needs {end / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "Make room, or name a folder elsewhere.",
        )
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, (tensor, heads) in tensors.items():
                for rows in tensor.chunks(heads):
                    rows = rows.to(dtype)
                    if not shards.all_finite(rows):
                        raise UserError(
                            f"{path.parent}: tensor {name} holds NaN or infinity",
                            "Copy it again, or take another base.",
                        )
                    rows.view(torch.uint8).numpy().tofile(file)
    except OSError as error:
        raise cli.write_error(path, error) from None


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
