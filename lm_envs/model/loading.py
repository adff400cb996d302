"""Loading of models and tokenizers from folders of ``save_pretrained``, GGUF files or hub names.

Weights come from safetensors and code from transformers alone: nothing in a folder is executed. Models that do not fit
are refused in one line, before anything runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from lm_envs.files import read_text
from lm_envs.model.adapters import base_of, is_adapter, whole_numbers, with_adapters
from lm_envs.model.checking import refuse_config
from lm_envs.model.gguf import folder_of, gguf_file
from lm_envs.model.hub import place_of
from lm_envs.model.kv_cache import RECOMPUTE, no_rows
from lm_envs.model.kv_cache_cross import rows_of
from lm_envs.printable import first_line
from lm_envs.processes.group import check_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model", "merges.txt")


@dataclass(frozen=True)
class Placement:
    """The precision and device that a model is loaded in.

    Attributes:
        dtype: "float32", "bfloat16", "float16", "float64", or "auto" for the one it was saved in.
        device: such as "cuda:1"; None is the CPU. Excludes ``device_map``.
        device_map: accelerate's, such as "auto" or "cuda": weights go straight to the device, which must hold all.
    """

    dtype: str = "float32"
    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device is not None and self.device_map is not None:
            raise ValueError("device and device_map exclude each other: both say where the model goes")
        if self.device_map is not None and find_spec("accelerate") is None:
            raise ValueError("device_map needs accelerate: pip install 'lm-envs[accelerate]'; device=NAME does without")
        if self.device is not None:
            check_gpu(self.device)
            try:
                torch.ones(1, device=self.device).item()  # fails on "meta" too, which holds no numbers
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"device {self.device!r} cannot be used: {first_line(error)}") from error

    @property
    def torch_dtype(self) -> Any:
        """The argument of ``from_pretrained``: torch's dtype, or "auto"."""
        return self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)


HOST = Placement()  # float32 on the CPU


def load_policy(
    name: str | Path, what: str = "policy", placement: Placement = HOST, *, recompute: bool = False
) -> PreTrainedModel:
    """Load a causal or encoder-decoder language model, in ``eval`` mode.

    Args:
        name: a folder saved by ``save_pretrained``, a GGUF file, or a hub name.
        what: the model's name in messages.
        recompute: see :func:`~lm_envs.model.checking.check_model`.

    Raises:
        ValueError: there is no such model, it holds no safetensors, or it is not a language model that can be used
            (:func:`~lm_envs.model.checking.refuse_config`).
    """
    place = os.path.expanduser(str(name))
    if is_adapter(place):
        base = load_policy(base_of(place, what), f"the base of {what}", placement, recompute=recompute)
        return with_adapters(base, place, what)
    model = _load(name, what, placement, None)
    if rows_of(model) is None:
        if not recompute:
            raise ValueError(f"{what} {place!r}: {no_rows(model)}")
        setattr(model, RECOMPUTE, True)
    return model


def load_beside(name: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a policy that reads and writes the tokens of another, in its precision and place.

    Raises:
        ValueError: as :func:`load_policy`; or it has another tokenizer.
    """
    own = load_tokenizer(name, "saved model")
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"saved model {str(name)!r}: its tokenizer is not that of the task's policy, so the two cannot be compared"
        )
    placement = Placement(str(model.dtype).removeprefix("torch."), str(model.device))
    return load_policy(name, "saved model", placement, recompute=getattr(model, RECOMPUTE, False))


def without_weights(
    name: str | Path, what: str = "policy", placement: Placement = HOST, *, classifier: bool = False
) -> PreTrainedModel:
    """Return the language model or classifier of a folder or hub name on the device "meta": its sizes, no numbers."""
    config = read_config(_place(name, what), what)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    auto: Any = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    dtype = config.dtype if placement.dtype == "auto" else placement.torch_dtype
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if classifier else auto).from_config(config, dtype=dtype)
    found: PreTrainedModel = model.eval()
    return found


def load_tokenizer(name: str | Path, what: str = "policy") -> PreTrainedTokenizerBase:
    """Load a tokenizer, for adapters without one that of their model; ValueError if it has no EOS."""
    place = os.path.expanduser(str(name))
    tokenizer = _read_tokenizer(base_of(place, what) if is_adapter(place) and not _has_tokenizer(place) else name, what)
    if tokenizer.eos_token_id is None:
        cure = "set tokenizer.eos_token to one of its tokens and save it again"
        raise ValueError(f"{what} {str(name)!r}: the tokenizer has no EOS token, so no response could end; {cure}")
    return tokenizer


def vocabulary_of(model: PreTrainedModel) -> int:
    """The width of a language model's output."""
    return int(model.get_output_embeddings().weight.shape[0])


def weights_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of parameters with their names."""
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_fits(tokenizer: PreTrainedTokenizerBase, vocabulary: int, what: str) -> None:
    """Raise ValueError if a tokenizer gives ids that a model of this many tokens does not have."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocabulary:
        raise ValueError(
            f"{what}: the tokenizer's ids go up to {highest} and the model has {vocabulary} tokens: "
            "this is another model's tokenizer, or the model wants resize_token_embeddings(len(tokenizer))"
        )


def _read_tokenizer(name: str | Path, what: str) -> PreTrainedTokenizerBase:
    place = os.path.expanduser(str(name))
    if not is_adapter(place):
        place = _place(name, what)
    advice = "save it beside the model with tokenizer.save_pretrained"
    # Some classes of tokenizers are empty without their files, instead of failing.
    if Path(place).is_dir() and not _has_tokenizer(place):
        raise ValueError(f"{what} {place!r} holds no tokenizer: {advice}")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        if not Path(place).is_dir():
            missing = f"there is no such folder here, and as a name on the hub it gave {first_line(error)!r}"
            raise ValueError(f"{what} {place!r}: {missing}") from error
        if (Path(place) / "config.json").is_file():  # which may name the tokenizer
            read_config(place, what)
        raise ValueError(f"{what} {place!r}: its tokenizer cannot be read ({first_line(error)}); {advice}") from error


def _has_tokenizer(place: str) -> bool:
    return any(file for pattern in _TOKENIZER_FILES for file in Path(place).glob(pattern))


def _load(name: str | Path, what: str, placement: Placement, auto: Any) -> Any:
    """Load a classifier, or with ``auto`` None the language model that the config is of; refuse missing weights."""
    place = _place(name, what)
    config = read_config(place, what)
    expected, heads = "a sequence-classification model", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    saved = getattr(config, "architectures", None) or []
    if auto is None:
        auto, expected = AutoModelForCausalLM, "a causal language model"
        heads = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        # BART and similar models have both heads; their architecture names the one with an encoder.
        if getattr(config, "is_encoder_decoder", False) and not any(name in heads.values() for name in saved):
            auto, expected = AutoModelForSeq2SeqLM, "an encoder-decoder language model"
            heads = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        refuse_config(config, f"{what} {place!r}")
        _check_generation_config(Path(place) / "generation_config.json")
    known: Collection[str] = [n for names in heads.values() for n in ([names] if isinstance(names, str) else names)]
    if saved and not any(architecture in known for architecture in saved):
        raise ValueError(f"{what} {place!r} was saved from {', '.join(map(str, saved))}; expected {expected}")
    if config.model_type not in heads:
        raise ValueError(f"{what} {place!r}: transformers has no {config.model_type!r} as {expected}")
    model, info = read_weights(auto, name, what, placement, config=config)
    if info["missing_keys"]:
        raise ValueError(f"{what} {str(name)!r} is not {expected}: its weights lack {_some(info['missing_keys'])}")
    if info["unexpected_keys"]:
        unused = f"its weights hold {_some(info['unexpected_keys'])}, which the model does not use"
        warnings.warn(f"{what} {place!r}: {unused}", stacklevel=3)
    return model


def read_weights(
    auto: Any, name: str | Path, what: str, placement: Placement, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return a model in ``eval`` mode, and the keys that its files and the model do not share.

    ``options`` are those of ``from_pretrained``. ValueError if files cannot be read, contradict the config, or do not
    fit on one device.
    """
    place = _place(name, what)
    options |= dict(dtype=placement.torch_dtype, device_map=placement.device_map, ignore_mismatched_sizes=True)
    options |= dict(use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")  # about missing weights, which the caller judges
            model, info = auto.from_pretrained(place, **options)
    except Exception as error:
        raise ValueError(f"{what} {place!r} cannot be read: {first_line(error)}") from error
    if info["mismatched_keys"]:
        key, saved, wanted = min(info["mismatched_keys"])
        shapes = f"{key} is {tuple(saved)}, not {tuple(wanted)}"
        raise ValueError(f"{what} {place!r}: its config.json contradicts its weights: {shapes}")
    _refuse_more_layers(info["unexpected_keys"], model, f"{what} {place!r}")
    _refuse_whole_numbers(Path(place), model, f"{what} {place!r}")
    parts = {parameter.device for parameter in model.parameters()}
    mapped = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(parts) > 1 or len(mapped) > 1 or torch.device("meta") in parts:
        raise ValueError(
            f"{what} {place!r}: device_map={placement.device_map!r} spreads it over several devices or the disk; the "
            "rows of its cache and the copy that is trained need one: choose one that holds it whole, or dtype bfloat16"
        )
    if placement.device is not None:
        model = model.to(placement.device)
    if not Path(os.path.expanduser(str(name))).is_dir():
        model.name_or_path = str(name)  # also if it came from the cache
    return model.eval(), info


def _refuse_more_layers(unused: Iterable[str], model: PreTrainedModel, begin: str) -> None:
    """Raise ValueError if unused weights belong to a layer like the model's own: its config has too few."""
    names = model.state_dict()
    found = []
    for key in unused:
        others = (f"{key[: n.start()]}0{key[n.end() :]}" for n in re.finditer(r"(?<=\.)\d+(?=\.)", key))
        found += [key] if any(other in names for other in others) else []
    if found:
        raise ValueError(f"{begin}: its config.json contradicts its weights, which also hold {_some(found)}")


def _refuse_whole_numbers(folder: Path, model: PreTrainedModel, begin: str) -> None:
    """Raise ValueError if weights are stored as whole numbers: those of a quantized model, without its scales."""
    stored = {name for file in folder.glob("*.safetensors") for name in whole_numbers(file)}
    ours = {name for name, _ in model.named_parameters()}
    trunk = f"{model.base_model_prefix}."  # which the file of a trunk alone leaves out
    found = [name for name in stored if ours & {name, trunk + name, name.removeprefix(trunk)}]
    if found:
        raise ValueError(f"{begin}: its weights hold whole numbers ({_some(found)}): save it in full precision")


def _some(keys: Iterable[str]) -> str:
    first = sorted(keys)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' logs, since the errors and warnings here replace them."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_config(place: str, what: str) -> Any:
    """Read a model's ``config.json``; ValueError if it is broken, of an unknown family, or requires custom code."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if not isinstance(config.architectures, (list, type(None))):
            raise ValueError(f"architectures must be a list of names, not {config.architectures!r}")
        return config
    except Exception as error:
        if "trust_remote_code" in str(error) or _has_code(place):
            raise ValueError(
                f"{what} {place!r} needs code of its own (auto_map in its config.json), which is never executed here "
                "(trust_remote_code stays false): use a family that transformers has itself"
            ) from error
        why = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"{what} {place!r}: its config.json cannot be read: {why}") from error


def _has_code(place: str) -> bool:
    try:
        return "auto_map" in json.loads(read_text(Path(place) / "config.json"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _check_generation_config(path: Path) -> None:
    """Raise ValueError if the ends of responses cannot be read in it, since transformers would go on without them."""
    if not path.exists():
        return
    try:
        ends = json.loads(read_text(path)).get("eos_token_id")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {ends!r}")


def _place(name: str | Path, what: str) -> str:
    """Return a folder's path, a hub name, or the model's folder in the cache: of a GGUF file, or of a name if the hub
    cannot be reached."""
    text = os.path.expanduser(str(name))
    if (file := gguf_file(name, what)) is not None:
        return str(folder_of(file, what))
    if Path(text).is_dir():
        if is_adapter(text):
            raise ValueError(
                f"{what} {text!r} holds adapters of {base_of(text, what)!r}, and a whole model is needed here: train "
                "with --lora-merge, which saves one, or add them to it by peft's merge_and_unload"
            )
        if not (Path(text) / "config.json").is_file():
            raise ValueError(f"{what} {text!r}: the folder holds no config.json; expected one saved by save_pretrained")
        return text
    beside = text.count("/") == 1 and Path(text).parent.is_dir()  # runs/x, where there is runs: no owner on the hub
    path = text.startswith((".", os.sep)) or text.count("/") > 1
    if isinstance(name, Path) or Path(text).exists() or path or beside or not text:
        raise ValueError(f"{what} {text!r}: there is no such folder")
    try:
        return place_of(text)
    except ConnectionError as error:
        cure = "give a folder of save_pretrained, or try again with a network"
        raise ValueError(f"{what} {text!r}: there is no such folder here, and {error}; {cure}") from error
