"""Hub ids: download a base, or find it in the hub's cache."""

import contextlib
import shutil
from pathlib import Path

from cli import UserError
from weights import hf

DEFAULT_BASE = "teknium/OpenHermes-2.5-Mistral-7B"


# --- where a model lies


def resolve(model):
    """A folder, or a hub id (downloaded, or taken from the hub's cache) → the folder. UserError says what to do when there is neither."""
    return Path(model) if Path(model).is_dir() else download(check_hub_id(model))


def refuse_gguf(model: str) -> None:
    """UserError with the command that makes a folder of a GGUF file, where `model` is one."""
    if model.endswith(".gguf") and Path(model).is_file():
        command = f"python -m weights.gguf_convert {model} {model.removesuffix('.gguf')}"
        raise UserError(f"{model} is a GGUF file, a folder is needed", f"Make one of it: {command}")


def check_hub_id(model):
    refuse_gguf(model)
    if Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise UserError(
            f"{model}: there is no such folder",
            f"Give a model folder, or a hub id such as {DEFAULT_BASE}.",
        )
    return model


@contextlib.contextmanager
def hub_errors(repo):
    """The hub's own errors → UserError with the way out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repo} wants an account that accepted its terms: accept them on https://huggingface.co/{repo}, then run `hf auth login`.",
            f"Or take a base that needs no account: --model {DEFAULT_BASE}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{repo}: no such folder here, and no such model on the hub (or it is private: run `hf auth login`).",
            f"A base that needs no account: --model {DEFAULT_BASE}",
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


def cached_folder(repo):
    """The folder of a hub id whose files were all downloaded before, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo, local_files_only=True, allow_patterns=["config.json", "params.json"]
            )
        )
        if hf.is_model(folder) and all(
            (folder / name).exists() for name in hf.weight_files(folder)
        ):
            return folder
    except (LocalEntryNotFoundError, HFValidationError, UserError):
        pass
    return None


def fetch_config(model):
    """A hub id's config.json, and nothing else. → its folder"""
    from huggingface_hub import hf_hub_download

    with hub_errors(check_hub_id(model)):
        return Path(hf_hub_download(model, "config.json")).parent


def check_access(repo):
    """Whether this account may have a hub id's files, without downloading them. → what to say; UserError when it may not"""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    with hub_errors(repo):
        files = {
            f.rfilename: f.size or 0 for f in HfApi().model_info(repo, files_metadata=True).siblings
        }
        weights = [name for name in files if name.endswith(".safetensors")]
        weights = [name for name in weights if not name.startswith("consolidated")] or weights
        for name in ("config.json" if "config.json" in files else "params.json", *weights):
            get_hf_file_metadata(hf_hub_url(repo, name))  # refused here where a download would be
    if not weights:
        raise UserError(
            f"{repo} has no safetensors on the hub", f"A base that has: --model {DEFAULT_BASE}"
        )
    return f"{repo} can be had: {len(weights)} files of weights, {sum(files[name] for name in weights) / 1e9:.1f} GB"


def download(repo):
    """Bring config, tokenizer and the indexed safetensors of a hub id into the hub's cache, resuming what is there; → the folder."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if folder := cached_folder(repo):
        return folder
    with hub_errors(repo):
        sizes = {
            f.rfilename: f.size or 0 for f in HfApi().model_info(repo, files_metadata=True).siblings
        }
        small = [n for n in (*hf.TOKENIZER_FILES, *hf.CONFIG_FILES) if n in sizes]
        folder = Path(snapshot_download(repo, allow_patterns=small))
        weights = hf.weight_files(folder, sizes)
        need = sum(sizes.get(n, 0) for n in weights)
        cache = Path(constants.HF_HUB_CACHE)
        have = sum(
            f.stat().st_size
            for f in (cache / f"models--{repo.replace('/', '--')}" / "blobs").glob("*")
        )
        free = shutil.disk_usage(cache).free
        if need - have > free:
            raise UserError(
                f"{repo} needs {need / 1e9:.1f} GB, {cache} has {free / 1e9:.1f} GB free",
                "Make room, or move HF_HOME.",
            )
        return Path(snapshot_download(repo, allow_patterns=small + weights))
