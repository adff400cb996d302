"""Training part of a language model: low-rank adapters, or the upper layers alone, on weights the reference shares.

The policy is a copy of the start that owns only what it trains: its frozen parameters *are* those of the start. So
where the start is the reference, frozen weights are in memory once, and the reference never switches adapters off.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lm_envs.files import system_error
from lm_envs.model.adapters import adapter_parameters, has_adapters, merged, quiet_layout, sharing
from lm_envs.model.encoder_decoder import is_encoder_decoder
from lm_envs.model.endings import eos_tokens
from lm_envs.model.gguf import folder_of, gguf_file
from lm_envs.model.loading import weights_hash
from lm_envs.settings import Name, Positive, Rank, Settings, Whole


@dataclass(frozen=True)
class Adaptation(Settings):
    """Which part of a language model is trained; all of it if nothing is set.

    Attributes:
        freeze_layers: number of lower layers that stay as they are, and everything below them, such as the embeddings
            (and an output layer tied to them), as in Ziegler et al. 2019.
        lora_rank: train low-rank adapters of this rank on the layers that are not frozen, and nothing else of the
            model, by ``W x + lora_alpha / lora_rank * B A x`` (Hu et al. 2021, eq. 3); 0 for none.
        lora_alpha: None is twice the rank.
        lora_targets: names of the linear maps inside a layer that get adapters, such as ``q_proj``; all if empty.
        lora_merge: whether what is saved in the end is a plain model with the adapters added to its weights, those
            that the policy brought included.

    Raises:
        ValueError: a value is out of range, or an option of LoRA is given without a rank.
    """

    freeze_layers: Whole = 0
    lora_rank: Rank = 0
    lora_alpha: Positive | None = None
    lora_targets: tuple[Name, ...] = ()
    lora_merge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets):
            raise ValueError("lora_alpha and lora_targets mean nothing without lora_rank")


def adapted(start: PreTrainedModel, adaptation: Adaptation = Adaptation(), seed: int = 0) -> PreTrainedModel:
    """Copy ``start`` for training: the same function, gradients where the adaptation says, other parameters shared.

    A start that has adapters is trained further in them alone.

    Args:
        start: a language model; it stays as it is.
        adaptation: what is trained.
        seed: of the adapters' A; their B is zero.

    Raises:
        ValueError: the model is an encoder-decoder and not trained whole, it has fewer layers, no list of them can be
            found, no linear map has such a name, or it has adapters already.
        ImportError: LoRA without peft.
    """
    if has_adapters(start):
        if adaptation.lora_rank or adaptation.freeze_layers:
            raise ValueError(
                "the policy brings adapters of its own, which are trained further: leave out lora_rank and "
                "freeze_layers, or merge them into its weights first"
            )
        own = {id(p) for p in adapter_parameters(start)}
        return _frozen(start, [p for p in start.parameters() if id(p) not in own])
    if adaptation.lora_merge and not adaptation.lora_rank:
        raise ValueError("lora_merge: the policy has no adapters to merge; give lora_rank, or a policy that has some")
    if adaptation.freeze_layers == adaptation.lora_rank == 0:
        return copy.deepcopy(start).requires_grad_(True)
    if is_encoder_decoder(start):
        raise ValueError(
            f"a {type(start).__name__} is an encoder-decoder, with two stacks of layers: train it whole, without "
            "freeze_layers and lora_rank"
        )
    name, layers = decoder_layers(start)
    if adaptation.freeze_layers > len(layers):
        raise ValueError(
            f"freeze_layers={adaptation.freeze_layers}, and {type(start).__name__} has {len(layers)} layers"
        )
    if not adaptation.lora_rank:
        return _frozen(start, parameters_below(start, layers[: adaptation.freeze_layers]))
    targets = _targets(start, adaptation, name, len(layers))
    model = sharing(start, list(start.parameters()))
    _add_lora(model, adaptation, targets, seed)
    return model.eval()


def _frozen(start: PreTrainedModel, frozen: list[nn.Parameter]) -> PreTrainedModel:
    """A copy that shares the frozen parameters and trains the others."""
    model, shared = sharing(start, frozen), {id(p) for p in frozen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in shared)
    return model.eval()


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers and its name: the one ``ModuleList`` with as many members as its config has layers.

    Raises:
        ValueError: there is none, or several.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    inside = set(model.get_decoder().modules())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
    ]
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        raise ValueError(
            f"cannot tell which modules are the {count} layers of {type(model).__name__}: {len(outer)} lists have as "
            f"many members; train it whole, without freeze_layers and lora_rank"
        )
    return outer[0]


def parameters_below(model: PreTrainedModel, layers: nn.ModuleList) -> list[nn.Parameter]:
    """The parameters of some layers, the lowest, and all others that the last one's output depends on, by the autograd
    graph of one token."""
    found: list[Any] = []
    before = [(p, p.requires_grad) for p in model.parameters()]
    # Without numbers, transformers cannot look into a mask of tokens, and takes one that is ready.
    ready = {"attention_mask": torch.zeros(1, 1, 1, 1, device="meta")} if model.device.type == "meta" else {}
    hook = layers[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        model.requires_grad_(True)
        with torch.enable_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False, **ready)
    finally:
        hook.remove()
        for parameter, needed in before:
            parameter.requires_grad_(needed)
    output = found[0][0] if isinstance(found[0], tuple) else found[0]
    reached, open_ = set(), [output.grad_fn]
    below: set[int] = set()
    while open_:
        node: Any = open_.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        if hasattr(node, "variable"):  # a leaf
            below.add(id(node.variable))
        open_ += [inner for inner, _ in node.next_functions]
    # One token may leave some of a layer's own alone: the experts it is not sent to.
    own = {id(p) for p in layers.parameters()}
    return [p for p, _ in before if id(p) in below or id(p) in own]


def _targets(model: PreTrainedModel, adaptation: Adaptation, layers: str, count: int) -> list[str]:
    """Full names of the linear maps that get adapters."""
    inside = tuple(f"{layers}.{i}." for i in range(adaptation.freeze_layers, count))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n.startswith(inside)]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for wanted in adaptation.lora_targets:
        if wanted not in known:
            raise ValueError(
                f"lora_targets: no linear map in the layers of {type(model).__name__} that are trained is called "
                f"{wanted!r}; there are {', '.join(known) or 'none'}"
            )
    chosen_names = set(adaptation.lora_targets or known)
    chosen = [name for name in linear if name.rpartition(".")[2] in chosen_names]
    if not chosen:
        raise ValueError(f"no linear map is left for LoRA: {adaptation.freeze_layers} of {count} layers are frozen")
    return chosen


def _add_lora(model: Any, adaptation: Adaptation, targets: list[str], seed: int) -> None:
    if find_spec("peft") is None:
        raise ImportError("LoRA needs peft: pip install 'lm-envs[lora]'")
    from peft import LoraConfig

    kinds = {type(model.get_submodule(name)) for name in targets}
    config = LoraConfig(
        r=adaptation.lora_rank,
        lora_alpha=2 * adaptation.lora_rank if adaptation.lora_alpha is None else adaptation.lora_alpha,
        target_modules=targets,
        lora_dropout=0.0,  # the ratio of the first update would not be 1
        fan_in_fan_out=kinds == {Conv1D},
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quiet_layout():
        torch.manual_seed(seed)
        try:
            model.add_adapter(config)
        except ValueError as error:  # such as maps that a model's kernels read past the adapters
            raise ValueError(f"LoRA on {type(model).__name__}: {error} Choose others with lora_targets") from error


def save_model(model: Any, tokenizer: Any, folder: Path, merge: bool = False, ends: Iterable[int] = ()) -> None:
    """Save model and tokenizer, or adapters in peft's format, for transformers' ``from_pretrained``.

    Adapters are saved alone where the model they were put into can be found again, in a folder or on the hub.

    Args:
        merge: save a plain model, adapters or not.
        ends: the tokens that ended a response in training, at which ``generate`` is to stop too.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _stop_at(model, tokenizer, ends)
    try:
        if has_adapters(model) and model.name_or_path and not merge:
            config = model.peft_config["default"]
            file = gguf_file(model.name_or_path)  # peft by itself reads the cache's folder of it
            place = Path(model.name_or_path) if file is None else folder_of(file)
            config.base_model_name_or_path = str(place.resolve()) if place.exists() else model.name_or_path
            with quiet_layout():
                model.save_pretrained(folder)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(folder)
        else:
            (merged(model) if has_adapters(model) else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # raised when the disk is full
        raise system_error(error, folder) from error


def _stop_at(model: Any, tokenizer: Any, ends: Iterable[int]) -> None:
    """Let transformers' ``generate`` stop at these tokens, and at all that end a response by themselves."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        found = list(dict.fromkeys([*ends, *eos_tokens(model, tokenizer)]))
        config.eos_token_id = found if len(found) > 1 else found[0]


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` without frozen parameters, for checkpoints. Tensors are not copied."""
    return {
        name: tensor.detach()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


def load_learned_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a :func:`learned_state`, ValueError if it is of another module. Frozen parameters, which others may share,
    are not written."""
    mine = learned_state(module)
    wrong = sorted(set(mine) ^ set(state)) + [n for n in mine if n in state and mine[n].shape != state[n].shape]
    if wrong:
        raise ValueError(f"the checkpoint is of another policy; it differs in {', '.join(wrong[:5])}")
    module.load_state_dict(state, strict=False)


def frozen_hash(module: nn.Module) -> str | None:
    """A hash of the frozen parameters, which identifies a checkpoint's base; None if there are none."""
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    return weights_hash(frozen) if frozen else None
