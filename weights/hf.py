"""Hugging Face model folders: which files they have, and `config.json` (or Mistral's `params.json`) → ModelConfig."""

import dataclasses
import os
import shutil
from pathlib import Path

import torch

import cli
import lora
from cli import UserError, read_json
from model import ModelConfig

CONFIG_FILES = (
    "config.json",
    "params.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
COMPANION_FILES = ("persona.json", "facts.md", "run.json", "metrics.jsonl")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
)
MAX_VALUES = {
    "num_hidden_layers": 1000,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "rope_theta": 1e12,
}  # else a million
FAMILY_KEYS = (
    "max_position_embeddings",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "sliding_window",
)
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "tie_word_embeddings",
    "model_type",
)
QWEN_DEFAULTS = {"use_sliding_window": False, "max_window_layers": 28, "layer_types": None}
FAMILIES = {  # model_type: what transformers takes where config.json is silent; what is neither here nor in ALWAYS it doesn't heed
    "mistral": dict(zip(FAMILY_KEYS, (131072, 8, None, 1e-6, 4096))),
    "ministral3": dict(zip(FAMILY_KEYS, (262144, 8, 128, 1e-5, None)))
    | {
        "rope_scaling": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
        }
        | {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "llama": dict(zip(FAMILY_KEYS[:-1], (2048, None, None, 1e-6)))
    | {"attention_bias": False, "mlp_bias": False},
    "qwen2": dict(zip(FAMILY_KEYS, (32768, 32, None, 1e-6, 4096))) | QWEN_DEFAULTS,
    "qwen3": dict(zip(FAMILY_KEYS, (32768, 32, 128, 1e-6, 4096)))
    | QWEN_DEFAULTS
    | {"attention_bias": False},
}
ROPE_TYPES = {  # rope_type: {key: (least, most, whether it must be there)}
    "default": {},
    "linear": {"factor": (1e-3, 1e6, True)},
    "llama3": {
        key: (1e-3, 1 << 31, True)
        for key in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    },
    "yarn": {key: (1e-3, 1 << 31, True) for key in ("factor", "original_max_position_embeddings")}
    | {
        key: (0, 1e6, False)
        for key in (
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        )
    },
}
PARAMS_TO_HF = {  # Mistral's own words for HF's
    **{
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
    },
    **{
        "n_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "tied_embeddings": "tie_word_embeddings",
    },
    **{key: key for key in ("head_dim", "vocab_size", "rope_theta", "max_position_embeddings")},
}
QUANT_METHOD = "doppelganger"  # what quantization_config calls our own
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def weight_files(folder, names=None):
    """The safetensors files of a model folder, or of `names`, which will lie there; Mistral's own where there are no others.

    UserError when there are none (a .bin or .pth is a pickle and is not read).
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted(set(read_index(index).values()))
    names = os.listdir(folder) if names is None else names
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if own := sorted(
        name for name in names if name.startswith("consolidated") and name.endswith(".safetensors")
    ):
        return own
    way_out = "Give a folder with config.json or params.json, safetensors and a tokenizer."
    raise UserError(f"{folder} has no model.safetensors{cli.pickle_hint(folder)}", way_out)


def read_index(path):
    """{tensor: file} of a `model.safetensors.index.json`. UserError where it names anything but safetensors files beside itself."""
    where = read_json(path).get("weight_map")
    for name in where.values() if isinstance(where, dict) and where else [where]:
        if not (
            isinstance(name, str)
            and name.endswith(".safetensors")
            and name == Path(name).name
            and "\\" not in name
        ):
            raise UserError(
                f"{path}: weight_map names {name!r:.60}, which is no safetensors file of this folder",
                "Copy the folder again.",
            )
    return where


def config_path(folder):
    theirs, own = (Path(folder) / name for name in CONFIG_FILES[:2])
    return own if own.exists() and not theirs.exists() else theirs


def read_raw_config(folder):
    """What `config.json` says of the language model, vision left out; where there is none, `params.json` in the same words."""
    path = config_path(folder)
    said = read_json(path)
    if path.name == "params.json":
        return from_mistral_params(said)
    text = said.get("text_config")
    return (
        {**said, "model_type": "mistral", **text}
        if said.get("model_type") == "mistral3" and isinstance(text, dict)
        else said
    )


def from_mistral_params(said):
    """Mistral's own `params.json` → HF's keys; what it leaves out is as in mistral-inference."""
    config = {ours: said[theirs] for theirs, ours in PARAMS_TO_HF.items() if theirs in said}
    window, yarn, scaled = said.get("sliding_window"), said.get("yarn"), said.get("llama_4_scaling")
    config.setdefault("max_position_embeddings", said.get("max_seq_len") or 32768)
    config.setdefault("rope_theta", 1e4 if window else 1e6)
    config |= {"sliding_window": window, "quantization_config": said.get("quantization")}
    config["model_type"] = "mixtral" if said.get("moe") else "ministral3" if scaled else "mistral"
    if isinstance(yarn, dict):
        turns = {
            "beta_fast": yarn.get("beta"),
            "beta_slow": yarn.get("alpha"),
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
        config["rope_scaling"] = {**yarn, **turns, "rope_type": "yarn"}
        if isinstance(scaled, dict):
            config["rope_scaling"]["llama_4_scaling_beta"] = scaled.get("beta")
    return config


def read_config(folder):
    """`config.json` or `params.json` → ModelConfig. UserError for what the model doesn't compute, and for nonsense."""
    raw, path = read_raw_config(folder), config_path(folder)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{folder}: model_type {family!r:.60} is not known here",
            f"Known: {', '.join(FAMILIES)} (Mistral, Nemo, Small, Ministral 3, Llama 2 and 3, Qwen2.5, Qwen3).",
        )
    if raw.get("quantization_config") and stored_quantization(folder) not in ("int8", "int4"):
        raise UserError(
            f"{folder} holds quantised weights, which are not read",
            "Take the bf16 or fp32 original.",
        )
    if raw.get("auto_map"):
        raise UserError(
            f"{folder} brings code of its own (auto_map), which is never run here",
            f"If it is a plain {family} all the same, take auto_map out of {path}.",
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{folder}: hidden_act {raw['hidden_act']!r:.60} is not known here", "Known: silu."
        )
    said = FAMILIES[family] | {
        key: value for key, value in raw.items() if key in (*FAMILIES[family], *REQUIRED_KEYS)
    }
    said["sliding_window"] = read_window(path, said)
    said["rope_theta"], said["rope_scaling"] = read_rope(path, said, raw)
    fields = {}
    for field in dataclasses.fields(ModelConfig):
        value = said.get(field.name)
        if field.name == "head_dim" and value is None:
            value = fields["hidden_size"] // fields["num_attention_heads"]
        if field.name == "num_key_value_heads" and value is None:
            value = fields["num_attention_heads"]
        if value is not None and field.name in ("model_type", "rope_scaling"):
            fields[field.name] = value
        elif value is not None or field.default is dataclasses.MISSING:
            kind = field.type if field.type in (bool, float) else int
            fields[field.name] = cli.check_number(
                path, field.name, value, int(kind is int), MAX_VALUES.get(field.name, 1 << 20), kind
            )
    if fields["num_attention_heads"] % fields["num_key_value_heads"] or fields["head_dim"] % 2:
        raise UserError(
            f"{path}: {fields['num_attention_heads']} heads of {fields['head_dim']} numbers over {fields['num_key_value_heads']} of keys",
            "The last must divide the first, and 2 the second. Copy it again.",
        )
    return ModelConfig(**fields)


def read_window(path, said):
    """The sliding window of every layer, or None. UserError where the layers differ, as they may in Qwen."""
    if not said.get("sliding_window") or not said.get("use_sliding_window", True):
        return None
    first, layers = (
        cli.check_number(path, key, said.get(key, 0), 0, 1000)
        for key in ("max_window_layers", "num_hidden_layers")
    )
    kinds = said.get("layer_types") or ["full_attention"] * min(first, layers) + [
        "sliding_attention"
    ] * (layers - first)
    if kinds == ["full_attention"] * layers:
        return None
    if kinds != ["sliding_attention"] * layers:
        raise UserError(
            f"{path}: a sliding window on some layers only is not known here", "Take another base."
        )
    return said["sliding_window"]


def read_rope(path, said, raw):
    """(rope_theta, rope_scaling by HF's older keys), from those or from transformers 5's `rope_parameters`."""
    rotary = raw.get("rope_scaling") or raw.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = (
        rotary.get("rope_type", rotary.get("type", "default"))
        if isinstance(rotary, dict)
        else rotary
    )
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UserError(
            f"{path}: RoPE of kind {kind!r:.60} is not known here",
            f"Known: {', '.join(ROPE_TYPES)}.",
        )
    if (rotary.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1) != 1:
        raise UserError(
            f"{path}: RoPE on a part of each head (partial_rotary_factor) is not known here",
            "Take another base.",
        )
    if kind in ("llama3", "yarn") or rotary.get("llama_4_scaling_beta"):
        known = raw.get("original_max_position_embeddings") or rotary.get(
            "original_max_position_embeddings"
        )
        rotary = {
            **rotary,
            "original_max_position_embeddings": known or said.get("max_position_embeddings"),
        }
    scaling = {"rope_type": kind}
    for key, (least, most, needed) in {
        **ROPE_TYPES[kind],
        "llama_4_scaling_beta": (0, 1e6, False),
    }.items():
        if needed or rotary.get(key) is not None:
            scaling[key] = cli.check_number(
                path,
                f"{key} of RoPE",
                rotary.get(key),
                least,
                most,
                bool if key == "truncate" else float,
            )
    if "llama_4_scaling_beta" in scaling:
        scaling["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"{path}: low_freq_factor of RoPE must be below high_freq_factor", "Copy it again."
        )
    theta = rotary.get("rope_theta") or raw.get("rope_theta") or 1e4
    return theta, scaling if kind != "default" or "rope_scaling" in FAMILIES[
        said["model_type"]
    ] else None


def is_model(folder):
    return config_path(folder).exists()


def is_adapter(folder):
    return (Path(folder) / "adapter_config.json").exists()


def stored_quantization(folder):
    """ "int8" or "int4" where `save_model` wrote the weights of `folder` so, else None."""
    said = read_raw_config(folder).get("quantization_config")
    return (
        said.get("weights")
        if isinstance(said, dict) and said.get("quant_method") == QUANT_METHOD
        else None
    )


def stored_dtype(folder):
    said = read_raw_config(folder)
    name = said.get("dtype") or said.get("torch_dtype") or "bfloat16"
    if name not in [*DTYPES]:
        raise UserError(
            f"{folder}: config.json says dtype {name!r:.60}", f"Known: {', '.join(DTYPES)}."
        )
    return DTYPES[name]


def adapter_base(adapter):
    """The base that an adapter's folder names, a folder or a hub id; None where it names none."""
    return lora.read_adapter_config(adapter)[1]


def refuse_adapter(folder):
    """UserError when a folder is nothing to train on top of."""
    if is_adapter(folder):
        raise UserError(
            f"{folder} is an adapter, not a base",
            f"Merge it first: python lora.py merge {folder} clone/",
        )


def config_for_tokenizer(folder, tokenizer=None, rows=()):
    """The ModelConfig of `folder`, with room for an adapter's `rows` and the ChatML tokens that `tokenizer`, if given, had to add.

    UserError when `tokenizer` is the tokenizer of another model.
    """
    shape = with_vocab_size(read_config(folder), max(rows, default=-1) + 1)
    if not tokenizer:
        return shape
    tokenizer.check(read_raw_config(folder), folder, shape.vocab_size)
    return with_vocab_size(shape, tokenizer.rows_needed)


def with_vocab_size(shape, size):
    """`shape` with room for `size` tokens (new ChatML tokens); a vocabulary is never cut."""
    return ModelConfig(**{**vars(shape), "vocab_size": max(shape.vocab_size, size)})


# --- weights out


def clear_output(folder):
    """Delete what an earlier run or merge left in an output folder, and nothing else."""
    old = (
        "metrics.jsonl",
        "loss.png",
        "adapter_*",
        "config.json",
        "model*.safetensors",
        "Modelfile",
        "new-*.safetensors",
        CONFIG_FILES[-1],
    )
    for path in (path for pattern in old for path in Path(folder).glob(pattern)):
        path.unlink()
    shutil.rmtree(Path(folder) / "resume", ignore_errors=True)


def copy_companions(source, target):
    for name in COMPANION_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
