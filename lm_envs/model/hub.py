"""Names on the hub, which is asked once and briefly, because libraries retry for long."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lm_envs.files import blaming
from lm_envs.printable import first_line


@functools.cache
def place_of(name: str) -> str:
    """Return the argument for ``from_pretrained``: the name, or the folder in the cache if the hub does not answer.

    Raises:
        ConnectionError: the hub does not answer, and the cache does not hold the model.
        CacheError: the cache does not hold the model and cannot be written.
    """
    if constants.HF_HUB_OFFLINE:  # the libraries do not wait then
        return name
    kept = None
    try:
        kept = snapshot_download(name, local_files_only=True)
    except HFValidationError:
        return name
    except (OSError, RuntimeError):  # missing or unreadable
        folder = Path(constants.HF_HUB_CACHE)
        with blaming(folder, "set HF_HUB_CACHE or HF_HOME to a folder that can be written"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    try:
        _ask(name, "config.json")
    except ConnectionError:
        if kept is None:
            raise
        return kept
    return name


def commit_of(name: str) -> str | None:
    """Return the commit of a model on the hub, or in the cache if the hub does not answer; None if unknown."""
    try:
        found = None if constants.HF_HUB_OFFLINE else _ask(name, "config.json")
        cached = found or try_to_load_from_cache(name, "config.json")
    except (ConnectionError, HFValidationError):
        return None
    return found or (Path(cached).parent.name if isinstance(cached, str) else None)


def check_data_set(name: str) -> str | None:
    """Return the commit of a data set, None if unknown; ConnectionError if the hub does not answer."""
    return None if constants.HF_HUB_OFFLINE else _ask(name, "README.md", "dataset")


def _ask(name: str, file: str, kind: str = "model") -> str | None:
    """Return a file's commit by one request; None if there is no such file or name."""
    try:
        url = hf_hub_url(name, file, repo_type=kind)
        return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).commit_hash
    except (HfHubHTTPError, HFValidationError):
        return None
    # The client of the hub's library decides the types of a network's errors.
    except Exception as error:
        raise ConnectionError(f"the hub ({constants.ENDPOINT}) cannot be reached: {first_line(error)}") from error
