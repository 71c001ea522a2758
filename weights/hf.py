"""Model folders in Hugging Face's layout, or Mistral's own: config.json → ModelConfig, tensors."""

import dataclasses
import fnmatch
import functools
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import cli
import lora
from cli import StrPath, UserError
from model import ModelConfig
from weights.tokenizer import Tokenizer

INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "params.json", "generation_config.json", INDEX_FILE)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
OUTPUT_FILES = (  # what a run or a merge writes, as patterns
    "adapter_*",
    "config.json",
    "model*.safetensors",
    "new-*.safetensors",
    INDEX_FILE,
    "metrics.jsonl",
    "loss.png",
    "Modelfile",
)
VOCAB_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
TENSOR_RENAMES = (  # a tensor's name in a file → HF's; empty: not part of the language model
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
PARAMS_TO_HF = {  # keys of Mistral's params.json → HF's
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    **{key: key for key in ("head_dim", "vocab_size", "rope_theta", "max_position_embeddings")},
}
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "tie_word_embeddings",
    "model_type",
)
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}
# model_type: transformers' defaults for the keys that its class reads beside REQUIRED_KEYS. Others
# are ignored, as it ignores them.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "ministral3": {
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_scaling": MINISTRAL3_ROPE,
    },
    "llama": {
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen2": {"head_dim": None, **QWEN_DEFAULTS},
    "qwen3": {"head_dim": 128, "attention_bias": False, **QWEN_DEFAULTS},
}
MAX_VALUES = {  # of a number in config.json; else a million
    "num_hidden_layers": 1000,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "rope_theta": 1e12,
}
POSITIVE = (1e-3, 1 << 31, True)
OPTIONAL = (0, 1e6, False)
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN_OPTIONS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
ROPE_TYPES: dict[str, dict] = {  # rope_type: {key: (least, most, is required)}
    "default": {},
    "linear": {"factor": (1e-3, 1e6, True)},
    "llama3": dict.fromkeys(LLAMA3_KEYS, POSITIVE),
    "yarn": dict.fromkeys(("factor", "original_max_position_embeddings"), POSITIVE)
    | dict.fromkeys(YARN_OPTIONS, OPTIONAL),
}
QUANT_METHOD = "doppelganger"  # the quant_method of int8 and int4 folders that save_model wrote
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config was read, once, and whose tensors are opened at most once."""

    path: Path
    raw_config: dict  # config.json by HF's keys, of the language model alone
    config: ModelConfig

    @property
    def quantization(self) -> str | None:
        """ "int8" or "int4" where `save_model` packed the weights, else None."""
        return own_quantization(self.raw_config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights by config.json."""
        name = self.raw_config.get("dtype") or self.raw_config.get("torch_dtype") or "bfloat16"
        if name not in [*DTYPES]:
            raise UserError(
                f"{self.path}: config.json says dtype {name!r:.60}", f"Known: {', '.join(DTYPES)}."
            )
        return DTYPES[name]

    @functools.cached_property
    def tensors(self) -> dict[str, "StoredTensor"]:
        """All tensors of the language model by HF's names, their files open."""
        return open_tensors(self.path, self.config)


def open_folder(path: StrPath | ModelFolder) -> ModelFolder:
    """Read the config of a model folder. UserError for what the model doesn't compute."""
    if isinstance(path, ModelFolder):
        return path
    raw_config = read_raw_config(path)
    return ModelFolder(Path(path), raw_config, parse_config(config_path(path), raw_config))


def is_model(folder: StrPath) -> bool:
    return config_path(folder).exists()


def is_adapter(folder: StrPath) -> bool:
    return (Path(folder) / "adapter_config.json").exists()


def adapter_base(adapter: StrPath) -> str | None:
    """Return the base that an adapter names: a folder, a hub id, or None."""
    return lora.read_adapter_config(adapter)[1]


def refuse_adapter(folder: StrPath) -> None:
    """UserError when a folder is an adapter, where a base is needed."""
    if is_adapter(folder):
        hint = f"Merge it first: python lora.py merge {folder} clone/"
        raise UserError(f"{folder} is an adapter, not a base", hint)


def clear_output(folder: StrPath) -> None:
    """Delete what an earlier run or merge left in an output folder, and nothing else."""
    for pattern in OUTPUT_FILES:
        for path in Path(folder).glob(pattern):
            path.unlink()
    shutil.rmtree(Path(folder) / "resume", ignore_errors=True)


# --- config


def config_path(folder: StrPath) -> Path:
    config, params = Path(folder) / "config.json", Path(folder) / "params.json"
    return params if params.exists() and not config.exists() else config


def read_raw_config(folder: StrPath) -> dict:
    """Read config.json, or params.json by HF's keys; of a multimodal model the text part."""
    path = config_path(folder)
    raw = cli.read_json(path)
    if path.name == "params.json":
        return from_mistral_params(raw)
    text_config = raw.get("text_config")
    if raw.get("model_type") == "mistral3" and isinstance(text_config, dict):
        return {**raw, "model_type": "mistral", **text_config}
    return raw


def from_mistral_params(params: dict) -> dict:
    """Turn Mistral's params.json into HF's keys, with mistral-inference's defaults."""
    config = {ours: params[theirs] for theirs, ours in PARAMS_TO_HF.items() if theirs in params}
    window, yarn = params.get("sliding_window"), params.get("yarn")
    scaling = params.get("llama_4_scaling")
    config.setdefault("max_position_embeddings", params.get("max_seq_len") or 32768)
    config.setdefault("rope_theta", 1e4 if window else 1e6)
    config |= {"sliding_window": window, "quantization_config": params.get("quantization")}
    config["model_type"] = "ministral3" if scaling else "mistral"
    if params.get("moe"):
        config["model_type"] = "mixtral"
    if isinstance(yarn, dict):
        config["rope_scaling"] = {
            **yarn,
            "rope_type": "yarn",
            "beta_fast": yarn.get("beta"),
            "beta_slow": yarn.get("alpha"),
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
        if isinstance(scaling, dict):
            config["rope_scaling"]["llama_4_scaling_beta"] = scaling.get("beta")
    return config


def own_quantization(raw_config: dict) -> str | None:
    settings = raw_config.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD:
        return settings.get("weights")
    return None


def read_config(folder: StrPath) -> ModelConfig:
    return open_folder(folder).config


def parse_config(path: Path, raw: dict) -> ModelConfig:
    """Make a ModelConfig of a raw config. UserError for what isn't supported, and for nonsense."""
    check_supported(path, raw)
    defaults = FAMILIES[raw["model_type"]]
    known_keys = (*defaults, *REQUIRED_KEYS)
    values = defaults | {key: value for key, value in raw.items() if key in known_keys}
    values["sliding_window"] = read_window(path, values)
    values["rope_theta"], values["rope_scaling"] = read_rope(path, values, raw)
    fields: dict = {}
    for field in dataclasses.fields(ModelConfig):
        name, value = field.name, values.get(field.name)
        if name == "head_dim" and value is None:
            value = fields["hidden_size"] // fields["num_attention_heads"]
        if name == "num_key_value_heads" and value is None:
            value = fields["num_attention_heads"]
        if value is None and field.default is not dataclasses.MISSING:
            continue
        if name not in ("model_type", "rope_scaling"):
            kind: Any = field.type if field.type in (bool, float) else int
            most = MAX_VALUES.get(name, 1 << 20)
            cli.check_number(path, name, value, int(kind is int), most, kind)
        fields[name] = value
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % kv_heads or fields["head_dim"] % 2:
        raise UserError(
            f"{path}: {heads} heads of size {fields['head_dim']} with {kv_heads} key/value heads",
            "The last must divide the first, and the size must be even. Copy it again.",
        )
    return ModelConfig(**fields)


def check_supported(path: Path, raw: dict) -> None:
    """UserError for a model that ours doesn't compute."""
    folder, family_name = path.parent, raw.get("model_type")
    if not isinstance(family_name, str) or family_name not in FAMILIES:
        names = "Mistral, Nemo, Small, Ministral 3, Llama 2 and 3, Qwen2.5, Qwen3"
        raise UserError(
            f"{folder}: model_type {family_name!r:.60} is not supported",
            f"Supported: {', '.join(FAMILIES)} ({names}).",
        )
    if raw.get("quantization_config") and own_quantization(raw) not in ("int8", "int4"):
        raise UserError(
            f"{folder} holds quantized weights, which are not supported",
            "Take the bf16 or fp32 original.",
        )
    if raw.get("auto_map"):
        raise UserError(
            f"{folder} brings its own code (auto_map), which is never run here",
            f"If it is a plain {family_name} all the same, remove auto_map from {path}.",
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{folder}: hidden_act {raw['hidden_act']!r:.60} is not supported", "Supported: silu."
        )


def read_window(path: Path, values: dict) -> int | None:
    """Return the sliding window of all layers. UserError where layers differ, as Qwen's may."""
    if not values.get("sliding_window") or not values.get("use_sliding_window", True):
        return None
    for key in ("num_hidden_layers", "max_window_layers"):
        cli.check_number(path, key, values.get(key, 0), 0, 1000)
    layers = values.get("num_hidden_layers", 0)
    layer_types = values.get("layer_types")
    if not layer_types:
        full = min(values.get("max_window_layers", 0), layers)
        layer_types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if layer_types == ["full_attention"] * layers:
        return None
    if layer_types != ["sliding_attention"] * layers:
        raise UserError(
            f"{path}: a sliding window on some layers only is not supported", "Take another base."
        )
    return values["sliding_window"]


def read_rope(path: Path, values: dict, raw: dict) -> tuple[float, dict | None]:
    """Return (rope_theta, rope_scaling by HF's older keys), also from `rope_parameters`."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or values.get("rope_scaling") or {}
    rope_type = rope
    if isinstance(rope, dict):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise UserError(
            f"{path}: RoPE of type {rope_type!r:.60} is not supported",
            f"Supported: {', '.join(ROPE_TYPES)}.",
        )
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1) != 1:
        raise UserError(
            f"{path}: RoPE on a part of each head (partial_rotary_factor) is not supported",
            "Take another base.",
        )
    # the length before stretching, which older configs keep outside
    original = "original_max_position_embeddings"
    length = raw.get(original) or rope.get(original) or values.get("max_position_embeddings")
    if rope_type in ("llama3", "yarn") or rope.get("llama_4_scaling_beta"):
        rope = {**rope, original: length}
    scaling: dict = {"rope_type": rope_type}
    limits = {**ROPE_TYPES[rope_type], "llama_4_scaling_beta": OPTIONAL}
    for key, (least, most, required) in limits.items():
        value = rope.get(key)
        if required or value is not None:
            kind = bool if key == "truncate" else float
            scaling[key] = cli.check_number(path, f"{key} of RoPE", value, least, most, kind)
    if "llama_4_scaling_beta" in scaling:
        scaling[original] = length
    if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"{path}: low_freq_factor of RoPE must be below high_freq_factor", "Copy it again."
        )
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 1e4
    if rope_type == "default" and "rope_scaling" not in FAMILIES[values["model_type"]]:
        return theta, None
    return theta, scaling


def config_for_tokenizer(
    folder: StrPath | ModelFolder,
    tokenizer: Tokenizer | None = None,
    rows: Iterable[int] = (),
) -> ModelConfig:
    """Return the folder's ModelConfig, with room for an adapter's `rows` and new ChatML tokens.

    UserError when `tokenizer` is the tokenizer of another model.
    """
    folder = open_folder(folder)
    config = with_vocab_size(folder.config, max(rows, default=-1) + 1)
    if tokenizer:
        tokenizer.check(folder.raw_config, folder.path, config.vocab_size)
        config = with_vocab_size(config, tokenizer.rows_needed)
    return config


def with_vocab_size(config: ModelConfig, size: int) -> ModelConfig:
    """Return `config` with room for `size` tokens; a vocabulary is never cut."""
    return dataclasses.replace(config, vocab_size=max(config.vocab_size, size))


# --- tensors


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file, read when it is sliced.

    `heads`: Mistral's own format keeps the two numbers that rotary positions turn together side by
    side in each of so many heads; HF keeps them half a head apart. 0: HF's layout.
    """

    file: Any
    path: Path
    name: str  # in the file
    heads: int

    def reopen(self) -> "StoredTensor":
        """Map the file a second time: the pages read there leave memory with it."""
        return dataclasses.replace(self, file=cli.open_safetensors(self.path))

    def get_slice(self, _: str) -> "StoredTensor":
        return self  # as an open file's get_slice(name), for cli.check_tensors

    def get_shape(self) -> list[int]:
        return self.file.get_slice(self.name).get_shape()

    def get_dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        part = self.file.get_slice(self.name)
        if not self.heads:
            return part[rows]
        return part[:].unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)[rows]


def open_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Open all weight files of a folder. UserError where they contradict the index or `config`."""
    weight_map = read_weight_map(folder)
    tensors: dict[str, StoredTensor] = {}
    for file_name in weight_files(folder, weight_map):
        file = cli.open_safetensors(folder / file_name)
        for stored_name in file.keys():
            if weight_map.get(stored_name, file_name) != file_name:
                wanted = weight_map[stored_name]
                raise UserError(
                    f"{folder}: tensor {stored_name} is in {file_name}, and should be in {wanted}",
                    "Copy the folder again.",
                )
            weight_map[stored_name] = file_name
            name = stored_name
            for pattern, replacement in TENSOR_RENAMES:
                name = re.sub(pattern, replacement, name)
            interleaved = stored_name.endswith((".wq.weight", ".wk.weight"))
            heads = rotary_heads(name, config) if interleaved else 0
            if name:
                tensors[name] = StoredTensor(file, folder / file_name, stored_name, heads)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        check_tied(folder, tensors)
        del tensors["lm_head.weight"]
    return tensors


def rotary_heads(name: str, config: ModelConfig) -> int:
    """Return how many heads of queries or keys a tensor of this HF name makes; 0 for others."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def check_tied(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """UserError unless the stored head is the embeddings, by its last rows."""
    embeddings, head = (tensors[name] for name in VOCAB_TENSORS)
    same_shape = head.get_shape() == embeddings.get_shape()
    if not same_shape or not torch.equal(head[-9:], embeddings[-9:]):
        raise UserError(
            f"{folder}: config.json ties lm_head to the embeddings, but the files hold another one",
            "Set tie_word_embeddings to false in it.",
        )


def weight_files(
    folder: Path, weight_map: dict[str, str], names: Iterable[str] | None = None
) -> list[str]:
    """Name the safetensors files of a folder; Mistral's own only where there are no others.

    `names`: the files that will be there. UserError where none is: pickles are not read.
    """
    if weight_map:
        return sorted(set(weight_map.values()))
    names = [path.name for path in folder.iterdir()] if names is None else names
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if consolidated := fnmatch.filter(names, "consolidated*.safetensors"):
        return sorted(consolidated)
    raise UserError(
        f"{folder} has no model.safetensors{cli.pickle_hint(folder)}",
        "Give a folder with config.json or params.json, safetensors and a tokenizer.",
    )


def read_weight_map(folder: Path) -> dict[str, str]:
    """Read {tensor: file} of a folder's index; {} where there is none.

    UserError where it names anything but safetensors files beside itself.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return {}
    weight_map: Any = cli.read_json(path).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) and weight_map else [weight_map]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise UserError(
                f"{path}: weight_map names {name!r:.60}, not a safetensors file of this folder",
                "Copy the folder again.",
            )
    return weight_map
