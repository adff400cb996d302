"""Adapters in peft's format, on a model whose weights they share."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lm_envs.files import read_text
from lm_envs.printable import first_line

KEYS = "_weight_conversions"  # how transformers names a model's tensors when it saves them
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(place: str | Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (Path(place) / CONFIG).is_file() and not (Path(place) / "config.json").is_file()


def base_of(place: str | Path, what: str = "policy") -> str:
    """Return the folder, GGUF file or hub name of the model that a folder's adapters were trained on.

    A relative path counts from the working directory, or else from the adapters' folder. ValueError if the adapters are
    not low-rank, do not name the model, or its folder is missing.
    """
    path = Path(place) / CONFIG
    begin = f"{what} {str(place)!r}"
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{begin}: {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{begin}: {CONFIG} is no JSON object")
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise ValueError(f"{begin} holds adapters of the kind {kind!r}; low-rank ones (LORA) can be used")
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"{begin}: {CONFIG} does not say which model they are for: set base_model_name_or_path")
    if not (Path(place) / WEIGHTS).is_file():
        raise ValueError(f"{begin} holds no {WEIGHTS}: save them with save_pretrained (pickles are not read)")
    beside = Path(place) / name
    if not Path(name).exists() and beside.exists():
        name = str(beside)
    if is_adapter(name):
        raise ValueError(
            f"{begin}: its adapters are for {name!r}, which holds adapters itself: merge those into a model"
        )
    if not Path(name).exists() and Path(name).is_absolute():
        gone = f"its adapters are for {name!r}, and there is no such folder or file"
        raise ValueError(f"{begin}: {gone}: put that model's place into base_model_name_or_path of {path}")
    return str(name)


def with_adapters(base: PreTrainedModel, place: str | Path, what: str = "policy") -> PreTrainedModel:
    """Return the model with a folder's adapters, frozen, in ``eval`` mode; it *shares* all weights of ``base``.

    Raises:
        ImportError: peft is not installed.
        ValueError: the adapters do not fit this model.
    """
    if find_spec("peft") is None:
        raise ImportError(f"{what} {str(place)!r} holds adapters, which need peft: pip install 'lm-envs[lora]'")
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    wrong: list[str] = []
    misfit = f"{what} {str(place)!r}: its adapters do not fit {base.name_or_path!r}"
    try:
        if whole := whole_numbers(Path(place) / WEIGHTS):
            raise ValueError(f"{whole[0]} is stored in whole numbers")
        # Biases that were trained with the adapters replace the model's own.
        trained_bias = getattr(PeftConfig.from_pretrained(str(place)), "bias", "none") != "none"
        model: Any = sharing(base, () if trained_bias else base.parameters())
        with quiet_layout():
            found = model.load_adapter(str(place), use_safetensors=True)
            if found.missing_keys or found.unexpected_keys or found.mismatched_keys:  # DoRA's, tied tokens': peft's way
                found = set_peft_model_state_dict(model, load_peft_weights(str(place), device="cpu"))
                own = {id(p) for p in adapter_parameters(model)}
                mine = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
                wrong = sorted(mine.intersection(found.missing_keys)) + sorted(found.unexpected_keys)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, KeyError) and "trainable_tokens" in str(error):  # peft saves them once and looks for two
            raise ValueError(
                f"{what} {str(place)!r}: peft cannot load trained tokens (trainable_token_indices) into a model whose "
                "output layer is tied to its embeddings: merge the adapters into the model where they were trained"
            ) from error
        raise ValueError(f"{misfit}: {first_line(error)}") from error
    if hasattr(base, KEYS):  # peft put the names of the adapters' tensors there
        setattr(model, KEYS, getattr(base, KEYS))
    elif hasattr(model, KEYS):
        delattr(model, KEYS)
    if wrong:
        raise ValueError(f"{misfit}; they differ in {', '.join(wrong[:3])}")
    if (Path(place) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    return model.requires_grad_(False).eval()


def whole_numbers(file: Path) -> list[str]:
    """Return the names of tensors that a safetensors file stores as whole numbers, from its header."""
    with safe_open(file, "pt") as held:
        kinds = {name: held.get_slice(name).get_dtype() for name in held.keys()}
    return [name for name, kind in kinds.items() if kind.startswith(("I", "U", "BOOL"))]


@contextmanager
def quiet_layout() -> Iterator[None]:
    """Silence peft's warnings about layers with transposed weights, such as GPT-2's, which peft handles, and about
    bases that are no folder, such as GGUF files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield


def sharing(model: PreTrainedModel, shared: Iterable[nn.Parameter]) -> Any:
    """Return a deep copy that shares these parameters with the original."""
    return copy.deepcopy(model, {id(p): p for p in shared})


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters were put into a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of a model's adapters."""
    if not has_adapters(model):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                inner = getattr(module, name, None)
                found += inner.parameters() if isinstance(inner, nn.Module) else []
        elif isinstance(module, ModulesToSaveWrapper):
            found += module.modules_to_save.parameters()
    return found


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with the adapters, if it has any, added to its weights; nothing is shared.

    Modules and tokens that were trained beside the adapters replace the model's own. An output layer tied to the
    embeddings is untied if only one of the two was trained.
    """
    plain: Any = copy.deepcopy(model)
    if not has_adapters(model):
        return plain
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    done: tuple[str, ...] = ()
    for name, module in list(plain.named_modules()):
        if name.startswith(done) and done:
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            _own_weight(module.original_module)
            found = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(module, BaseTunerLayer):
            found = module.get_base_layer()
            _own_weight(found)
            module.merge()
        else:
            continue
        done = (*done, f"{name}.")
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, found)
    plain._hf_peft_config_loaded = False
    del plain.peft_config
    into, out = plain.get_input_embeddings(), plain.get_output_embeddings()
    if out is not None and plain.config.get_text_config(decoder=True).tie_word_embeddings:
        if torch.equal(into.weight, out.weight):
            out.weight = into.weight
        else:
            plain.config.tie_word_embeddings = plain.config.get_text_config(decoder=True).tie_word_embeddings = False
    return plain


def _own_weight(layer: Any) -> None:
    """Unshare a layer's weight, so that what is added to it reaches no other layer."""
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
