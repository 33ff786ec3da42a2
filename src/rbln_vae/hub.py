"""Finds models on disk and on the Hugging Face Hub, and uploads them."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from .artifact import SUFFIX
from .config import CONFIG_NAME, reject_unknown
from .errors import RBLNArtifactError

_DOWNLOAD_OPTIONS = (
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
)
_ORIGINAL_OPTIONS = (
    "torch_dtype",
    "dtype",
    "use_safetensors",
    "variant",
    "low_cpu_mem_usage",
    "device_map",
    "proxies",
    "config",
    "original_config",
    "disable_mmap",
    "ignore_mismatched_sizes",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "use_flashpack",
    "flashpack_kwargs",
    "user_agent",
    "mirror",
)
"""Arguments of diffusers' loaders that compiled models ignore, having no weights to load."""
DENOISERS = ("unet", "transformer")
"""The components of a pipeline of which one may tell for what size it was trained."""
_KIND = "kind"
"""The argument that tells what the weights in a single file don't."""
_FILE_ADDRESS = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)"
)


def options(loader: Mapping[str, Any]) -> dict[str, Any]:
    """The loader's arguments that locate a file."""
    return {k: v for k, v in loader.items() if k in _DOWNLOAD_OPTIONS and v is not None}


def check_loader_options(loader: Mapping[str, Any], more: Iterable[str] = ()) -> None:
    """Raise a `TypeError` for a name that is none of a Hugging Face loader, nor in `more`."""
    known = (*_DOWNLOAD_OPTIONS, *_ORIGINAL_OPTIONS, _KIND, *more)
    reject_unknown(loader, known, "argument of from_pretrained")


def reject_kind(model_id: str, loader: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a kind is named for a model that has a configuration."""
    if loader.get(_KIND) is not None:
        raise ValueError(
            f"kind={loader[_KIND]!r} is for .safetensors files, and {model_id} has a "
            "configuration of its own. Leave kind out."
        )


_PATIENCE = 8.0
"""The most seconds that the hub may take to say whether it has a model."""
_GRACE = 10.0
"""How many more seconds an abandoned request lives."""
_BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of a hub that is busy; downloads retry after these."""


def reach(model_id: str, loader: Mapping[str, Any]) -> dict[str, Any]:
    """The loader's arguments, with `local_files_only` if the hub can't be reached.

    `huggingface_hub` waits for each file separately, retries for most of a minute, and warns
    each time. So the hub is asked once, before any download. Downloads have no time limit.

    Args:
        model_id: A local path or a hub id. The hub is not asked about a path.
        loader: `revision`, `token`, … of `huggingface_hub.hf_hub_download`, and any others.

    Raises:
        OSError: The hub does not have the model or can't be reached, and the cache does not
            have it.
    """
    if loader.get("local_files_only") or Path(model_id).exists() or is_path(model_id):
        return dict(loader)
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    error = _asked(model_id, loader)
    if error is None or isinstance(error, EntryNotFoundError):
        return dict(loader)
    if isinstance(error, HfHubHTTPError) and error.response.status_code in _BUSY:
        return dict(loader)
    if isinstance(error, HFValidationError):
        raise _no_model(model_id, error) from error
    if isinstance(error, RevisionNotFoundError):
        raise OSError(
            f"{model_id!r} on the hub has no revision {loader.get('revision')!r}. Check its name."
        ) from error
    if loader.get("force_download") or not _is_cached(model_id, loader):
        if isinstance(error, RepositoryNotFoundError):
            raise _no_model(model_id, error) from error
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{model_id!r} is neither a local directory nor in the cache, and the hub can't be "
            f"reached ({reason}). Check the name and the connection, or name a directory."
        ) from error
    return {**loader, "local_files_only": True}


def _asked(model_id: str, loader: Mapping[str, Any]) -> Exception | None:
    """Ask the hub about a model; returns the error, or `None` if the hub has the model.

    The thread is abandoned when the time is over, because no timeout covers name resolution and
    attempts to connect to several addresses. The request has more time than this waits, so that
    the error of a hub that doesn't answer is always the one that names the time.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _PATIENCE)
    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            url = hf_hub_url(model_id, CONFIG_NAME, revision=loader.get("revision"))
            get_hf_file_metadata(url, token=loader.get("token"), timeout=patience + _GRACE)
        except Exception as error:  # lost connections raise other types in each library version
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=patience)
    except Empty:
        return TimeoutError(f"no answer in {patience:g} seconds; HF_HUB_ETAG_TIMEOUT gives it more")


def _no_model(model_id: str, error: Exception) -> OSError:
    return OSError(
        f"{model_id!r} is neither a local directory nor a model on the hub that this machine "
        f"can see ({type(error).__name__}). Check the name, and log in if it is private."
    )


def _is_cached(model_id: str, loader: Mapping[str, Any]) -> bool:
    """Whether the cache has the configuration file of a model or a pipeline."""
    from huggingface_hub import try_to_load_from_cache

    where = {name: loader[name] for name in ("cache_dir", "revision") if name in loader}
    subfolder = (loader.get("subfolder") or "").strip("/")
    prefix = f"{subfolder}/" if subfolder else ""
    names = (prefix + CONFIG_NAME, prefix + "config.json", "model_index.json")
    return any(isinstance(try_to_load_from_cache(model_id, each, **where), str) for each in names)


def find_compiled(model_id: str, subfolder: str = "", **download: Any) -> Path | None:
    """The directory of a compiled model, downloaded if it is on the hub.

    Args:
        model_id: A local path or a hub id.
        subfolder: The subfolder of the model, by default the top.
        **download: Arguments of `huggingface_hub.snapshot_download`.

    Returns:
        The directory, or `None` if the name stands for something else.

    Raises:
        OSError: The name does not exist.
        ValueError: The path is a file that can't be loaded.
    """
    path = Path(model_id)
    if path.is_dir():
        return _compiled_directory(path / subfolder)
    if path.is_file() or is_single_file(model_id):
        if path.suffix == SUFFIX:
            raise ValueError(f"{path} is one part of a model. Name its directory, {path.parent}.")
        if not is_single_file(model_id):
            raise ValueError(
                f"{path} is not a .safetensors file. Other checkpoints can hold code, so they are "
                "not loaded: convert it to .safetensors first."
            )
        if not path.is_file() and "://" not in model_id:
            raise OSError(f"There is no file {path}.")
        return None
    if is_path(model_id):
        raise OSError(f"There is no directory {model_id}.")
    return _download(model_id, subfolder, download)


def find_class_name(model_id: str, subfolder: str = "", **download: Any) -> str | None:
    """The diffusers class named in the `config.json` of a model; `None` if there is none.

    Args:
        model_id: A local path or a hub id.
        subfolder: The subfolder of the model, by default the top.
        **download: Arguments of `huggingface_hub.hf_hub_download`.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    config = _json(model_id, f"{prefix}config.json", download) or {}
    name = config.get("_class_name")
    return name if isinstance(name, str) else None


def find_pipeline(model_id: str, **download: Any) -> tuple[str, int | None] | None:
    """Find the VAE of a diffusers pipeline.

    Args:
        model_id: A local path or a hub id.
        **download: Arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The subfolder of the VAE, and the side of the latents that the UNet or transformer
        was trained on (`None` if it is unknown); `None` if the name is not a pipeline with a
        VAE.
    """
    index = _json(model_id, "model_index.json", download)
    if index is None or "vae" not in index:
        return None
    sides = (
        (_json(model_id, f"{name}/config.json", download) or {}).get("sample_size")
        for name in DENOISERS
        if name in index
    )
    return "vae", next((side for side in sides if isinstance(side, int)), None)


def find_vae(
    model_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    kind: str | None = None,
) -> dict[str, Any]:
    """The loader arguments that find a VAE, possibly that of a pipeline.

    Args:
        model_id: A local path or a hub id.
        subfolder: The subfolder of the VAE; `None` is the top, or `vae` in a pipeline.
        revision: The revision of a model on the hub; `None` is the default one.
        kind: The kind of the model in a `.safetensors` file; `None` is unknown.

    Raises:
        OSError: The model does not exist or can't be reached, as in `reach`.
    """
    given = {"revision": revision, _KIND: kind}
    where = reach(model_id, {name: value for name, value in given.items() if value is not None})
    if subfolder is None and (found := find_pipeline(model_id, **options(where))):
        subfolder, _ = found
    return where if subfolder is None else {**where, "subfolder": subfolder}


def _json(model_id: str, name: str, download: Mapping[str, Any]) -> dict[str, Any] | None:
    """A JSON object from a file of a model, or `None` if there is none."""
    path = Path(model_id)
    if path.is_dir():
        file = path / name
    elif path.exists() or is_path(model_id):
        return None
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            file = Path(hf_hub_download(model_id, name, **download))
        except (HfHubHTTPError, HFValidationError, OSError):
            return None  # the loader of the model reports the reason
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_single_file(model_id: str) -> bool:
    """Whether the name stands for a single `.safetensors` checkpoint."""
    return model_id.endswith(".safetensors")


def find_single_file(model_id: str, loader: Mapping[str, Any]) -> Path:
    """The file, downloaded if the name is the address of one on the hub.

    Args:
        model_id: A path or an address.
        loader: `token`, `cache_dir`, … of `huggingface_hub.hf_hub_download`, and any others.

    Raises:
        OSError: The file does not exist or can't be downloaded.
    """
    if "://" not in model_id:
        return Path(model_id)
    address = _FILE_ADDRESS.fullmatch(model_id.partition("?")[0])
    if address is None:
        raise OSError(
            f"{model_id} is no address of a file on the hub, such as "
            "https://huggingface.co/NAME/blob/main/FILE.safetensors. Download it and name the path."
        )
    from huggingface_hub import hf_hub_download

    repository, revision, name = address.groups()
    where = {k: v for k, v in options(loader).items() if k not in ("subfolder", "revision")}
    return Path(hf_hub_download(repository, name, revision=revision, **where))


def is_path(model_id: str) -> bool:
    """Whether the name can't be a hub id, so that it must be a path or an address of a file."""
    return (
        model_id.startswith((".", "~", "/"))
        or model_id.endswith("/")
        or model_id.count("/") > 1
        or "\\" in model_id
        or is_single_file(model_id)
    )


def _compiled_directory(directory: Path) -> Path | None:
    if not directory.is_dir():
        raise OSError(f"There is no directory {directory}.")
    if (directory / CONFIG_NAME).exists():
        return directory
    parts = sorted(file.name for file in directory.glob(f"*{SUFFIX}"))
    if parts:
        raise RBLNArtifactError(
            f"{directory} has {', '.join(parts)} but no {CONFIG_NAME}: the compiled model is "
            "incomplete. Save it again."
        )
    return None


def _download(model_id: str, subfolder: str, download: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        hf_hub_download(model_id, prefix + CONFIG_NAME, **download)
    except LocalEntryNotFoundError as error:
        # The hub was not asked; the cache may still have other files of the model.
        if not _is_cached(model_id, {**download, "subfolder": subfolder}):
            raise OSError(
                f"{model_id!r} is not in the cache, and the hub was not asked, or gave no "
                "answer about it. Check local_files_only, or name a directory."
            ) from error
        return None
    except EntryNotFoundError:
        return None
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise _no_model(model_id, error) from error
    patterns = [f"{prefix}*{SUFFIX}", f"{prefix}*.json"]
    snapshot = snapshot_download(model_id, allow_patterns=patterns, **download)
    return Path(snapshot) / subfolder


def upload(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Upload a directory as a model repository.

    Returns:
        The address of the commit, or of the pull request if `create_pr` is true.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=directory,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=[f"*{SUFFIX}"],
    )
    return commit.pr_url or commit.commit_url
