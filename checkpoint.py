"""Model folders in and out: hub ids, Hugging Face folders, adapters; safetensors and JSON, nothing is ever unpickled.

Written beside, then renamed. Loaded strictly: what the model needs and what the files hold must be the same names and shapes.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import config
import lora
import quantize
from config import UserError, read_json, write_json
from model import ModelConfig, Transformer

FILE_BYTES = 4 << 30  # a saved model is split into files of at most this size
LOOK = 1 << 23  # bytes of a mapped weight in memory while it is looked at
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
SETTINGS = ("config.json", "params.json", "generation_config.json", "model.safetensors.index.json")
COMPANIONS = ("persona.json", "facts.md", "run.json", "metrics.jsonl")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
)
LARGEST = {"num_hidden_layers": 1000, "max_position_embeddings": 1 << 31, "sliding_window": 1 << 31, "rope_theta": 1e12}  # else a million
KEYS = ("max_position_embeddings", "num_key_value_heads", "head_dim", "rms_norm_eps", "sliding_window")
ALWAYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings", "model_type")
QWEN = {"use_sliding_window": False, "max_window_layers": 28, "layer_types": None}
FAMILIES = {  # model_type: what transformers takes where config.json is silent; what is neither here nor in ALWAYS it doesn't heed
    "mistral": dict(zip(KEYS, (131072, 8, None, 1e-6, 4096))),
    "ministral3": dict(zip(KEYS, (262144, 8, 128, 1e-5, None)))
    | {
        "rope_scaling": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
        | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    },
    "llama": dict(zip(KEYS[:-1], (2048, None, None, 1e-6))) | {"attention_bias": False, "mlp_bias": False},
    "qwen2": dict(zip(KEYS, (32768, 32, None, 1e-6, 4096))) | QWEN,
    "qwen3": dict(zip(KEYS, (32768, 32, 128, 1e-6, 4096))) | QWEN | {"attention_bias": False},
}
ROPE = {  # rope_type: {key: (least, most, whether it must be there)}
    "default": {},
    "linear": {"factor": (1e-3, 1e6, True)},
    "llama3": {key: (1e-3, 1 << 31, True) for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")},
    "yarn": {key: (1e-3, 1 << 31, True) for key in ("factor", "original_max_position_embeddings")}
    | {key: (0, 1e6, False) for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")},
}
PARAMS = {  # Mistral's own words for HF's
    **{"dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"},
    **{"n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings"},
    **{key: key for key in ("head_dim", "vocab_size", "rope_theta", "max_position_embeddings")},
}
RENAMED = (  # a tensor's name in a file → HF's; empty: no part of the language model
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
OURS = "doppelganger"  # what quantization_config calls our own
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_ACCOUNT = "teknium/OpenHermes-2.5-Mistral-7B"


# --- devices


def pick_device(name=None):
    """`name`, else cuda, then mps, then cpu. UserError for an NVIDIA card that this torch can't use: never silently the CPU."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name not in (None, "cuda", "mps", "cpu"):
        raise UserError(f"--device {name} is not known", "It is cuda, mps or cpu; choose one of several GPUs with CUDA_VISIBLE_DEVICES.")
    if torch.cuda.is_available() and name in (None, "cuda"):
        if local >= torch.cuda.device_count():
            raise UserError(f"There are {torch.cuda.device_count()} GPUs for more processes", "Start one a GPU: torchrun --nproc_per_node.")
        return torch.device("cuda", local)
    if name == "cpu" or name == "mps" and torch.backends.mps.is_available():
        return torch.device(name)
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        version = next((w for w in driver.read_text(encoding="utf-8").split() if w[0].isdigit() and "." in w), "unknown")
        if torch.version.cuda is None:
            raise UserError(
                f"This machine has an NVIDIA card (driver {version}), but this torch ({torch.__version__}) is built for the CPU.",
                "Install torch with CUDA (pytorch.org, 'Get started'), or say --device cpu.",
            )
        raise UserError(
            f"The NVIDIA driver {version} is too old for this torch ({torch.__version__}, CUDA {torch.version.cuda}).",
            "Update the driver, or install a torch built for an older CUDA (pytorch.org), or say --device cpu.",
        )
    if name:
        raise UserError(f"--device {name}: there is no such device here, or this torch ({torch.__version__}) can't use it", "Leave it out.")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def compute_dtype(device):
    """bf16, except on CPUs without instructions for it: there its matmul takes seven times as long as float32's."""
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


# --- where a model lies


def resolve(model):
    """A folder, or a hub id (downloaded, or taken from the hub's cache) → the folder. UserError says what to do when there is neither."""
    return Path(model) if Path(model).is_dir() else download(hub_id(model))


def refuse_gguf(model: str) -> None:
    """UserError with the command that makes a folder of a GGUF file, where `model` is one."""
    if model.endswith(".gguf") and Path(model).is_file():
        command = f"python gguf_convert.py {model} {model.removesuffix('.gguf')}"
        raise UserError(f"{model} is a GGUF file, a folder is needed", f"Make one of it: {command}")


def hub_id(model):
    refuse_gguf(model)
    if Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise UserError(f"{model}: there is no such folder", f"Give a model folder, or a hub id such as {NO_ACCOUNT}.")
    return model


@contextlib.contextmanager
def hub(repo):
    """The hub's own errors → UserError with the way out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repo} wants an account that accepted its terms: accept them on https://huggingface.co/{repo}, then run `hf auth login`.",
            f"Or take a base that needs no account: --model {NO_ACCOUNT}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{repo}: no such folder here, and no such model on the hub (or it is private: run `hf auth login`).",
            f"A base that needs no account: --model {NO_ACCOUNT}",
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise UserError(
            f"The hub answered {status} for {repo}: {str(error).splitlines()[0]}",
            "Run it again: a download continues where it stopped.",
        ) from None
    except (OSError, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise UserError(
            f"{repo} is not on this machine and the hub can't be reached ({type(error).__name__}).",
            "Download it where there is a network (train.py --download-only), or give a folder: --model FOLDER",
        ) from None


def cached(repo):
    """The folder of a hub id whose files were all downloaded before, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=["config.json", "params.json"]))
        if is_model(folder) and all((folder / name).exists() for name in weight_files(folder)):
            return folder
    except (LocalEntryNotFoundError, HFValidationError, UserError):
        pass
    return None


def fetch_config(model):
    """A hub id's config.json, and nothing else. → its folder"""
    from huggingface_hub import hf_hub_download

    with hub(hub_id(model)):
        return Path(hf_hub_download(model, "config.json")).parent


def ask_hub(repo):
    """Whether this account may have a hub id's files, without downloading them. → what to say; UserError when it may not"""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    with hub(repo):
        files = {f.rfilename: f.size or 0 for f in HfApi().model_info(repo, files_metadata=True).siblings}
        weights = [name for name in files if name.endswith(".safetensors")]
        weights = [name for name in weights if not name.startswith("consolidated")] or weights
        for name in ("config.json" if "config.json" in files else "params.json", *weights):
            get_hf_file_metadata(hf_hub_url(repo, name))  # refused here where a download would be
    if not weights:
        raise UserError(f"{repo} has no safetensors on the hub", f"A base that has: --model {NO_ACCOUNT}")
    return f"{repo} can be had: {len(weights)} files of weights, {sum(files[name] for name in weights) / 1e9:.1f} GB"


def download(repo):
    """Bring config, tokenizer and the indexed safetensors of a hub id into the hub's cache, resuming what is there; → the folder."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if folder := cached(repo):
        return folder
    with hub(repo):
        sizes = {f.rfilename: f.size or 0 for f in HfApi().model_info(repo, files_metadata=True).siblings}
        small = [n for n in (*TOKENIZER_FILES, *SETTINGS) if n in sizes]
        folder = Path(snapshot_download(repo, allow_patterns=small))
        weights = weight_files(folder, sizes)
        need = sum(sizes.get(n, 0) for n in weights)
        cache = Path(constants.HF_HUB_CACHE)
        have = sum(f.stat().st_size for f in (cache / f"models--{repo.replace('/', '--')}" / "blobs").glob("*"))
        free = shutil.disk_usage(cache).free
        if need - have > free:
            raise UserError(f"{repo} needs {need / 1e9:.1f} GB, {cache} has {free / 1e9:.1f} GB free", "Make room, or move HF_HOME.")
        return Path(snapshot_download(repo, allow_patterns=small + weights))


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
    if own := sorted(name for name in names if name.startswith("consolidated") and name.endswith(".safetensors")):
        return own
    way_out = "Give a folder with config.json or params.json, safetensors and a tokenizer."
    raise UserError(f"{folder} has no model.safetensors{config.pickles(folder)}", way_out)


def read_index(path):
    """{tensor: file} of a `model.safetensors.index.json`. UserError where it names anything but safetensors files beside itself."""
    where = read_json(path).get("weight_map")
    for name in where.values() if isinstance(where, dict) and where else [where]:
        if not (isinstance(name, str) and name.endswith(".safetensors") and name == Path(name).name and "\\" not in name):
            raise UserError(f"{path}: weight_map names {name!r:.60}, which is no safetensors file of this folder", "Copy the folder again.")
    return where


def settings_path(folder):
    theirs, own = (Path(folder) / name for name in SETTINGS[:2])
    return own if own.exists() and not theirs.exists() else theirs


def settings(folder):
    """What `config.json` says of the language model, vision left out; where there is none, `params.json` in the same words."""
    path = settings_path(folder)
    said = read_json(path)
    if path.name == "params.json":
        return of_params(said)
    text = said.get("text_config")
    return {**said, "model_type": "mistral", **text} if said.get("model_type") == "mistral3" and isinstance(text, dict) else said


def of_params(said):
    """Mistral's own `params.json` → HF's keys; what it leaves out is as in mistral-inference."""
    words = {ours: said[theirs] for theirs, ours in PARAMS.items() if theirs in said}
    window, yarn, scaled = said.get("sliding_window"), said.get("yarn"), said.get("llama_4_scaling")
    words.setdefault("max_position_embeddings", said.get("max_seq_len") or 32768)
    words.setdefault("rope_theta", 1e4 if window else 1e6)
    words |= {"sliding_window": window, "quantization_config": said.get("quantization")}
    words["model_type"] = "mixtral" if said.get("moe") else "ministral3" if scaled else "mistral"
    if isinstance(yarn, dict):
        turns = {"beta_fast": yarn.get("beta"), "beta_slow": yarn.get("alpha"), "mscale": 1.0, "mscale_all_dim": 1.0}
        words["rope_scaling"] = {**yarn, **turns, "rope_type": "yarn"}
        if isinstance(scaled, dict):
            words["rope_scaling"]["llama_4_scaling_beta"] = scaled.get("beta")
    return words


def read_config(folder):
    """`config.json` or `params.json` → ModelConfig. UserError for what the model doesn't compute, and for nonsense."""
    raw, path = settings(folder), settings_path(folder)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{folder}: model_type {family!r:.60} is not known here",
            f"Known: {', '.join(FAMILIES)} (Mistral, Nemo, Small, Ministral 3, Llama 2 and 3, Qwen2.5, Qwen3).",
        )
    if raw.get("quantization_config") and packed_kind(folder) not in ("int8", "int4"):
        raise UserError(f"{folder} holds quantised weights, which are not read", "Take the bf16 or fp32 original.")
    if raw.get("auto_map"):
        raise UserError(
            f"{folder} brings code of its own (auto_map), which is never run here",
            f"If it is a plain {family} all the same, take auto_map out of {path}.",
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{folder}: hidden_act {raw['hidden_act']!r:.60} is not known here", "Known: silu.")
    said = FAMILIES[family] | {key: value for key, value in raw.items() if key in (*FAMILIES[family], *ALWAYS)}
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
            fields[field.name] = config.number(path, field.name, value, int(kind is int), LARGEST.get(field.name, 1 << 20), kind)
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
    first, layers = (config.number(path, key, said.get(key, 0), 0, 1000) for key in ("max_window_layers", "num_hidden_layers"))
    kinds = said.get("layer_types") or ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    if kinds == ["full_attention"] * layers:
        return None
    if kinds != ["sliding_attention"] * layers:
        raise UserError(f"{path}: a sliding window on some layers only is not known here", "Take another base.")
    return said["sliding_window"]


def read_rope(path, said, raw):
    """(rope_theta, rope_scaling by HF's older keys), from those or from transformers 5's `rope_parameters`."""
    rotary = raw.get("rope_scaling") or raw.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default")) if isinstance(rotary, dict) else rotary
    if not isinstance(kind, str) or kind not in ROPE:
        raise UserError(f"{path}: RoPE of kind {kind!r:.60} is not known here", f"Known: {', '.join(ROPE)}.")
    if (rotary.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1) != 1:
        raise UserError(f"{path}: RoPE on a part of each head (partial_rotary_factor) is not known here", "Take another base.")
    if kind in ("llama3", "yarn") or rotary.get("llama_4_scaling_beta"):
        known = raw.get("original_max_position_embeddings") or rotary.get("original_max_position_embeddings")
        rotary = {**rotary, "original_max_position_embeddings": known or said.get("max_position_embeddings")}
    scaling = {"rope_type": kind}
    for key, (least, most, needed) in {**ROPE[kind], "llama_4_scaling_beta": (0, 1e6, False)}.items():
        if needed or rotary.get(key) is not None:
            scaling[key] = config.number(path, f"{key} of RoPE", rotary.get(key), least, most, bool if key == "truncate" else float)
    if "llama_4_scaling_beta" in scaling:
        scaling["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor of RoPE must be below high_freq_factor", "Copy it again.")
    theta = rotary.get("rope_theta") or raw.get("rope_theta") or 1e4
    return theta, scaling if kind != "default" or "rope_scaling" in FAMILIES[said["model_type"]] else None


def is_model(folder):
    return settings_path(folder).exists()


def is_adapter(folder):
    return (Path(folder) / "adapter_config.json").exists()


# --- weights in


def sharded(tensor):
    """Whether its rows lie on several ranks: FSDP2's DTensor, asked without an import that takes half a second."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor):
    """What this rank holds of a parameter."""
    return tensor.to_local() if sharded(tensor) else tensor


def full(tensor):
    """A parameter's whole value, gathered from all ranks where it is sharded (a collective: every rank must ask)."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def shard(tensor):
    """(the rows of a parameter that this rank holds, the number of the first): all of it where nothing is sharded."""
    if not sharded(tensor):
        return tensor.detach(), 0
    mesh = tensor.device_mesh
    rows = -(-len(tensor) // mesh.shape[-1])  # FSDP2 cuts dimension 0 as torch.chunk does, along the mesh's last
    return local_part(tensor).detach(), min(rows * mesh.get_local_rank(mesh.ndim - 1), len(tensor))


def rows_of(tensor, rows):
    """Some rows of a parameter, from all ranks where it is sharded (a collective), which never hold it whole."""
    local, first = shard(tensor)
    wanted = torch.tensor(rows, device=local.device) - first
    held = (wanted >= 0) & (wanted < len(local))
    values = local.new_zeros(len(rows), local.shape[1])
    values[held] = local[wanted[held]]
    if sharded(tensor):
        torch.distributed.all_reduce(values, group=tensor.device_mesh.get_group(-1))
    return values


def write(target, value):
    """Set a parameter, or a Packed layer's weight, from its whole value or a slice; each rank its own rows. → whether all are numbers"""
    local, first = shard(target.stored()[0] if isinstance(target, quantize.Packed) else target)
    rows = value[first : first + len(local)]
    if isinstance(target, quantize.Packed):
        for parameter, part in zip(target.stored(), target.quantise(rows.to(local.device))):
            shard(parameter)[0].copy_(part)
    else:
        local.copy_(rows)
    return finite(rows)


def finite(rows):
    """Whether all are numbers: 30 times as fast as isfinite() of all."""
    return not rows.is_floating_point() or not rows.numel() or all(end.isfinite() for end in rows.aminmax())


def weights(model, as_stored=False):
    """{name in a checkpoint: parameter, or Packed layer} for everything but adapters; `as_stored`: the tensors of packed layers."""
    if as_stored:
        return dict(model.named_parameters())
    packed = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, quantize.Packed)}
    return {name: p for name, p in model.named_parameters() if name.endswith((".weight", ".bias"))} | packed


def allocate(model, device):
    """Give a meta model memory on `device`; `to_empty` unties what is tied, so it is tied again."""
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
        if hasattr(model.lm_head, "row_values"):
            model.lm_head.row_values = model.model.embed_tokens.row_values


def shape_of(target):
    return (target.out_features, target.in_features) if isinstance(target, quantize.Packed) else tuple(target.shape)


@torch.no_grad()
def fill(model, folder, ranks=None, keep=False, fold=None):
    """Read the weights of `folder` into an allocated model, each rank only its rows, one tensor in memory at a time.

    `keep`: weights of the model's own kind stay in the file, mapped, and come into memory when they are used. `fold(name, weight)`: what
    becomes of each, as of `lora.folding`. A vocabulary larger than the files' (new ChatML tokens) gets the mean of the old rows.
    UserError as of `find`, and for a weight that is no number, which any of `ranks` may hold.
    """
    found, bad = find(model, folder), []
    for name, target in weights(model, packed_kind(folder)).items():
        value = found[name].anew()
        if name in VOCABULARY and shape_of(target)[0] > value.get_shape()[0]:
            mean = sum(part.float().sum(0) for part in found[name].anew()[:].split(1024)) / value.get_shape()[0]
            value = Grown(value, mean, shape_of(target)[0])
        elif keep and not fold and isinstance(target, torch.Tensor):
            mapped = found[name].get_slice(name)[:]
            if (mapped.dtype, mapped.device) == (target.dtype, target.device):
                target.data = mapped  # whoever writes into the file's pages gets copies of his own
                few = max(1, LOOK // max(1, mapped[:1].nbytes))
                bad.append(not all(finite(found[name].anew()[i : i + few]) for i in range(0, len(mapped), few)))
                continue
        bad.append(not write(target, fold(name, value[:]) if fold else value))
    if ranks:
        bad = ranks.sum(torch.tensor(bad, dtype=torch.int32, device=ranks.device)).tolist()
    for name, is_bad in zip(weights(model, packed_kind(folder)), bad):
        if is_bad:
            raise UserError(f"{folder}: tensor {name} holds NaN or infinity", "Copy the folder again, or take another base.")


class Stored(NamedTuple):
    """A tensor of an open file, there under another name maybe. `heads`: in Mistral's own format queries and keys have the two numbers

    that turn together side by side in each of so many heads; HF has them half a head apart.
    """

    file: Any
    name: str
    heads: int
    path: Path

    def anew(self):
        """Its slice, mapped a second time: the pages that are read there leave memory with it."""
        return self._replace(file=config.open_safetensors(self.path)).get_slice(self.name)

    def get_slice(self, _):
        part = self.file.get_slice(self.name)
        return Interleaved(part, self.heads) if self.heads else part


class Interleaved(NamedTuple):
    part: Any
    heads: int

    def get_shape(self):
        return self.part.get_shape()

    def get_dtype(self):
        return self.part.get_dtype()

    def __getitem__(self, rows):
        return self.part[:].unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)[rows]


class Grown(NamedTuple):
    """A slice with more rows, all the mean of those there are."""

    part: Any
    mean: Any
    size: int

    def __getitem__(self, rows):
        first, last, _ = rows.indices(self.size)
        there = self.part[:][first:last]
        return torch.cat([there, self.mean.to(there.dtype).expand(last - first - len(there), -1)])


def find(model, folder):
    """{tensor by HF's name: where it is Stored} of all that `model`, which may be on the meta device, takes from `folder`.

    UserError names a tensor that is missing, unknown, of the wrong shape or no float, by the files' headers: nothing else is read.
    """
    folder, found = Path(folder), {}
    index, shape = folder / "model.safetensors.index.json", read_config(folder)
    where = dict(read_index(index)) if index.exists() else {}
    for name in weight_files(folder):
        file = config.open_safetensors(folder / name)
        for tensor in file.keys():
            ours = tensor
            for pattern, by in RENAMED:
                ours = re.sub(pattern, by, ours)
            if where.setdefault(tensor, name) != name:
                raise UserError(f"{folder}: tensor {tensor} is in {name}, and should be in {where[tensor]}", "Copy the folder again.")
            if ours:
                heads = {"wq": shape.num_attention_heads, "wk": shape.num_key_value_heads}.get(tensor.split(".")[-2:][0], 0)
                found[ours] = Stored(file, tensor, heads, folder / name)
    if shape.tie_word_embeddings and "lm_head.weight" in found:
        head, embeddings = (found[name].get_slice(name) for name in reversed(VOCABULARY))
        if head.get_shape() != embeddings.get_shape() or not torch.equal(head[-9:], embeddings[-9:]):
            raise UserError(
                f"{folder}: by config.json lm_head is tied to the embeddings, but the files hold another",
                "Set tie_word_embeddings to false in it.",
            )
        del found["lm_head.weight"]
    kind = packed_kind(folder)
    wanted = {name: shape_of(target) for name, target in weights(model, kind).items()}
    wanted |= {name: (shape.vocab_size, *wanted[name][1:]) for name in VOCABULARY if name in wanted}
    dtypes = (*config.FLOATS, "I8", "U8") if kind else config.FLOATS
    config.check_tensors(folder, found, wanted, "config.json", "Does config.json belong to these files? Copy the folder again.", dtypes)
    return found


def packed_kind(folder):
    """ "int8" or "int4" where `save_model` wrote the weights of `folder` so, else None."""
    said = settings(folder).get("quantization_config")
    return said.get("weights") if isinstance(said, dict) and said.get("quant_method") == OURS else None


def fingerprint(found):
    """What tells these weights (of `find`) from others of the same shape, in whatever folder, dtype and number of files they lie."""
    total = hashlib.blake2b(digest_size=16)
    for name, file in sorted(found.items()):  # a row of each: a few MB of 14 GB, and full fine-tuning changes every tensor
        total.update(name.encode() + file.get_slice(name)[:1].float().numpy().tobytes())
    return total.hexdigest()


def stored_dtype(folder):
    said = settings(folder)
    name = said.get("dtype") or said.get("torch_dtype") or "bfloat16"
    if name not in [*DTYPES]:
        raise UserError(f"{folder}: config.json says dtype {name!r:.60}", f"Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_model(path, dtype=None, device="cpu", base=None, words=None, weights=None):
    """A HF folder, a hub id, or a `ckpt/` of ours → Transformer in eval mode, in `dtype` (None: as stored), on `device`.

    An adapter folder loads its base (or `base`, if that lies elsewhere now), then itself. `words`: the tokenizer it is for; the model
    gets room for ChatML tokens that its base lacked. `weights`, for chat: "plain", "int8" or "int4", with the adapter merged into them,
    one tensor in memory at a time. UserError before memory is taken, but for weights that are no numbers.
    """
    folder = resolve(path)
    adapter, rows = folder if is_adapter(folder) else None, []
    if adapter:
        arguments, named = lora.read_settings(adapter)
        rows = arguments["rows"]
        if not base and not named:
            raise UserError(f"{adapter / 'adapter_config.json'} names no base", "Say where it lies: --model FOLDER")
        if not base and Path(named).is_absolute() and not Path(named).is_dir():
            raise UserError(f"{adapter} is an adapter over {named}, which is not there", "Say where it lies now: --model FOLDER")
        folder = resolve(base or named)
    shape, kind = fitted(folder, words, rows), packed_kind(folder)
    if kind and (adapter or weights not in (None, kind)):
        raise UserError(f"{folder} holds {kind} weights", "Take the bf16 original." if adapter else f"Say --weights {kind}, or nothing.")

    def outline():
        with torch.device("meta"):
            model = Transformer(shape).to(dtype or stored_dtype(folder))
        if kind or weights in ("int8", "int4"):
            quantize.pack(model, kind or weights)
        return model

    model = outline()
    found = find(model, folder)
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
        model, fold = outline(), lora.folding(adapter)
    allocate(model, device)
    fill(model, folder, keep=True, fold=fold)
    if adapter and not weights:
        lora.load(model, adapter)
    return model.eval().requires_grad_(False)


def base_of(adapter):
    """The base that an adapter's folder names, a folder or a hub id; None where it names none."""
    return lora.read_settings(adapter)[1]


def check_base(folder):
    """UserError when a folder is nothing to train on top of."""
    if is_adapter(folder):
        raise UserError(f"{folder} is an adapter, not a base", f"Merge it first: python lora.py merge {folder} clone/")


def fitted(folder, words=None, rows=()):
    """The ModelConfig of `folder`, with room for an adapter's `rows` and the ChatML tokens that `words`, if given, had to add.

    UserError when `words` is the tokenizer of another model.
    """
    shape = with_vocabulary(read_config(folder), max(rows, default=-1) + 1)
    if not words:
        return shape
    words.check(settings(folder), folder, shape.vocab_size)
    return with_vocabulary(shape, words.rows_needed)


def with_vocabulary(shape, size):
    """`shape` with room for `size` tokens (new ChatML tokens); a vocabulary is never cut."""
    return ModelConfig(**{**vars(shape), "vocab_size": max(shape.vocab_size, size)})


# --- weights out


def clear(folder):
    """Delete what an earlier run or merge left in an output folder, and nothing else."""
    old = ("metrics.jsonl", "loss.png", "adapter_*", "config.json", "model*.safetensors", "Modelfile", "new-*.safetensors", SETTINGS[-1])
    for path in (path for pattern in old for path in Path(folder).glob(pattern)):
        path.unlink()
    shutil.rmtree(Path(folder) / "resume", ignore_errors=True)


def copy_companions(source, target):
    for name in COMPANIONS:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def save_model(model, folder, tokenizer, dtype=torch.bfloat16):
    """Write a HF model folder in `dtype`, packed layers as they are, which only we read.

    A sharded model is gathered tensor by tensor: every rank must call, rank 0 writes. What the folder held stays whole until the last
    moment: a model of several files takes names that the old index doesn't have, and the new index replaces the old one.
    """
    folder, writes = Path(folder), not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    batch, size, total, files = {}, 0, 0, []

    def flush():
        nonlocal batch, size
        if writes and batch:
            files.append(list(batch))
            path = folder / f"new-{len(files)}.safetensors"
            try:
                save_file(batch, path, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                raise config.unwritten(path, error) from None
        batch, size = {}, 0

    packed = {id(part) for module in model.modules() if isinstance(module, quantize.Packed) for part in module.stored()}
    for name, parameter in model.named_parameters():
        value = full(parameter.detach()).to(parameter.dtype if id(parameter) in packed else dtype)
        if not writes:
            continue
        if size + value.nbytes > FILE_BYTES:
            flush()
        batch[name], size, total = value.cpu().contiguous(), size + value.nbytes, total + value.nbytes
    flush()
    if not writes:
        return
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    old = {*read_json(index, {}).get("weight_map", {}).values()}
    if len(files) > 1:
        ways = [[f"model{way}-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)] for way in ("", "-anew")]
        names = next(way for way in ways if not old & {*way})
    for number, name in enumerate(names, 1):
        os.replace(folder / f"new-{number}.safetensors", folder / name)
    if len(files) > 1:
        where = {tensor: name for name, tensors in zip(names, files) for tensor in tensors}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": where})
        for name in old - {*names}:
            (folder / name).unlink(missing_ok=True)
    shape = {key: value for key, value in vars(model.config).items() if key in FAMILIES[model.config.model_type] or value}
    if "layer_types" in FAMILIES[model.config.model_type] and model.config.sliding_window:
        shape |= {"use_sliding_window": True, "max_window_layers": 0}
    said = {"architectures": [f"{model.config.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    said |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False}
    kinds = {type(module) for module in model.modules() if isinstance(module, quantize.Packed)}
    if kinds:
        said["quantization_config"] = {"quant_method": OURS, "weights": "int4" if quantize.Int4Linear in kinds else "int8"}
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.im_end}
    write_json(folder / "config.json", said | shape | ends)
    write_json(folder / "generation_config.json", ends)
