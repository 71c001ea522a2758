"""Hub ids: download a base, or find it in the hub's cache."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from cli import UserError
from weights import hf

DEFAULT_BASE = "teknium/OpenHermes-2.5-Mistral-7B"


def resolve(model: str) -> Path:
    """Return a model's folder: `model` itself, or where the hub's cache has it, downloaded."""
    return Path(model) if Path(model).is_dir() else download(check_hub_id(model))


def refuse_gguf(model: str) -> None:
    """UserError with the command that converts it, where `model` is a GGUF file."""
    if model.endswith(".gguf") and Path(model).is_file():
        command = f"python -m weights.gguf_convert {model} {model.removesuffix('.gguf')}"
        raise UserError(f"{model} is a GGUF file, a folder is needed", f"Convert it: {command}")


def check_hub_id(model: str) -> str:
    refuse_gguf(model)
    if Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1:
        hint = f"Give a model folder, or a hub id such as {DEFAULT_BASE}."
        raise UserError(f"{model}: there is no such folder", hint)
    return model


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn the hub's errors into UserErrors with a hint."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, "
            "then run `hf auth login`.",
            f"Or take a base that needs no account: --model {DEFAULT_BASE}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{repo}: no such folder here, and no such model on the hub "
            "(if it is private: run `hf auth login`).",
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
            "Download it on a machine with a network (train.py --download-only), "
            "or give a folder: --model FOLDER",
        ) from None


def cached_folder(repo: str) -> Path | None:
    """Return the folder of a hub id if all its files were downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        configs = ["config.json", "params.json"]
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=configs))
        files = hf.weight_files(folder, hf.read_weight_map(folder))
    except (LocalEntryNotFoundError, HFValidationError, UserError):
        return None
    complete = hf.is_model(folder) and all((folder / name).exists() for name in files)
    return folder if complete else None


def fetch_config(model: str) -> Path:
    """Download a hub id's config.json alone. Returns its folder."""
    from huggingface_hub import hf_hub_download

    with hub_errors(check_hub_id(model)):
        return Path(hf_hub_download(model, "config.json")).parent


def file_sizes(repo: str) -> dict[str, int]:
    from huggingface_hub import HfApi

    files = HfApi().model_info(repo, files_metadata=True).siblings or ()
    return {file.rfilename: file.size or 0 for file in files}


def check_access(repo: str) -> str:
    """Return a line that says that this account can download a hub id. UserError if it can't."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with hub_errors(repo):
        sizes = file_sizes(repo)
        weights = [name for name in sizes if name.endswith(".safetensors")]
        weights = [name for name in weights if not name.startswith("consolidated")] or weights
        config = "config.json" if "config.json" in sizes else "params.json"
        for name in (config, *weights):
            get_hf_file_metadata(hf_hub_url(repo, name))  # refused where a download would be
    if not weights:
        hint = f"A base that has them: --model {DEFAULT_BASE}"
        raise UserError(f"{repo} has no safetensors on the hub", hint)
    total = sum(sizes[name] for name in weights)
    return f"{repo} can be downloaded: {len(weights)} weight files, {total / 1e9:.1f} GB"


def download(repo: str) -> Path:
    """Download config, tokenizer and weights of a hub id, or continue that. Returns the folder."""
    from huggingface_hub import constants, snapshot_download

    if folder := cached_folder(repo):
        return folder
    with hub_errors(repo):
        sizes = file_sizes(repo)
        small = [name for name in (*hf.TOKENIZER_FILES, *hf.CONFIG_FILES) if name in sizes]
        folder = Path(snapshot_download(repo, allow_patterns=small))
        weights = hf.weight_files(folder, hf.read_weight_map(folder), sizes)
        # stop before a download that the disk has no room for
        cache = Path(constants.HF_HUB_CACHE)
        blobs = (cache / f"models--{repo.replace('/', '--')}" / "blobs").glob("*")
        needed = sum(sizes.get(name, 0) for name in weights)
        missing = needed - sum(blob.stat().st_size for blob in blobs)
        free = shutil.disk_usage(cache).free
        if missing > free:
            raise UserError(
                f"{repo} needs {needed / 1e9:.1f} GB, {cache} has {free / 1e9:.1f} GB free",
                "Make room, or move HF_HOME.",
            )
        return Path(snapshot_download(repo, allow_patterns=small + weights))
