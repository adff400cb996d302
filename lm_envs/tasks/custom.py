"""Bring your own: a task of a user's policy, reward model and prompts, from folders of ``save_pretrained`` or hub
names.

Whatever does not fit together is refused here, in one line, before any training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_envs import models
from lm_envs.adapters import base_of, is_adapter, with_adapters
from lm_envs.chat import render_messages
from lm_envs.encoder_decoder import is_encoder_decoder, room_for
from lm_envs.endings import eos_tokens, prompt_ids
from lm_envs.jsonl import read_jsonl
from lm_envs.model_check import check_model
from lm_envs.tasks import making
from lm_envs.tasks.splits import SPLITS, SplitColumn, divide
from lm_envs.tasks.task import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NEEDED = ("policy", "reward_model", "prompts")


@dataclass(frozen=True)
class CustomConfig:
    """The parts of the task, and how they are used.

    Attributes:
        policy: the model to tune and its tokenizer: a folder of ``save_pretrained``, or a hub name.
        reward_model: a sequence classifier with its own tokenizer, likewise.
        prompts: a JSONL file with ``prompt`` and perhaps ``split`` (train, validation, test) a row; a prompt is text,
            or a list of messages for the tokenizer's chat template, which may also be called ``messages``.
        reference: what the KL penalty is measured from, None for the policy as it starts; "base" for the model under
            its adapters, where the policy is a folder of those.
        judge: another reward model, which decides win-rates; None for no win-rates.
        max_new_tokens: the horizon.
        min_new_tokens: EOS is masked before that many tokens.
        kl_coef: default weight of the KL penalty, in units of the reward per nat.
        temperature: of the policy and of the reference.
        normalise: put the reward in units of its standard deviation over samples of the reference, with mean 0.
        samples: how many samples that takes.
        batch_size: texts per forward of the reward model and of the judge.
        seed: of the samples.
        dtype: of the policy and the reference: "float32", "bfloat16", "float64", or "auto" for what they were saved in.
        reward_dtype: of the reward model and the judge, likewise.
        device, device_map: where all models go; see :class:`~lm_envs.models.Placement`.
        recompute: accept a policy whose cache cannot be kept row by row.
    """

    policy: str
    reward_model: str
    prompts: str
    reference: str | None = None
    judge: str | None = None
    max_new_tokens: int = 32
    min_new_tokens: int = 0
    kl_coef: float = 0.05
    temperature: float = 1.0
    normalise: bool = True
    samples: int = 256
    batch_size: int = 64
    seed: int = 0
    dtype: str = "float32"
    reward_dtype: str = "float32"
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where a field is out of range."""
        for name in ("max_new_tokens", "temperature", "samples", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"custom: {name} must be positive, got {getattr(self, name)}")
        if self.normalise and self.samples < 2:
            raise ValueError(f"custom: normalising takes at least 2 samples, got samples={self.samples}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"custom: min_new_tokens must lie between 0 and max_new_tokens={self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        self.placement(self.dtype), self.placement(self.reward_dtype)

    def placement(self, dtype: str) -> models.Placement:
        """Where models of this precision go."""
        try:
            return models.Placement(dtype, self.device, self.device_map)
        except ValueError as error:
            raise ValueError(f"custom: {error}") from error


def load(**options: Any) -> TextTask:
    """The task made of the user's parts.

    Args:
        options: fields of :class:`CustomConfig`; ``policy``, ``reward_model`` and ``prompts`` are needed.

    Raises:
        FileNotFoundError: there is no such file of prompts.
        ValueError: what does not fit, in one line: a missing folder, a model without the right head, a tokenizer
            without EOS or larger than its model's vocabulary, policy and reference of different vocabularies, a
            malformed row or an empty or too long prompt (with file and line), a reward that gives every sample the
            same score.
    """
    making.check_options("custom", CustomConfig, options)
    missing = [name for name in _NEEDED if options.get(name) is None]
    if missing:
        raise ValueError(
            f"custom is made of parts of your own: give {', '.join(_NEEDED)}; missing: {', '.join(missing)}"
        )
    plain: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    config = CustomConfig(**plain)
    # What is quick to check comes first: models can take minutes to load.
    tokenizer = models.load_tokenizer(config.policy)
    texts = read_prompts(config.prompts, tokenizer)
    policy, reference = _policy_and_reference(config, tokenizer)
    eos = eos_tokens(policy, tokenizer, chat=any(text.rendered for text in texts))
    prompts = encode_prompts(texts, tokenizer, config, [policy, reference])
    place = config.placement(config.reward_dtype)
    reward = models.load_reward_model(config.reward_model, placement=place, batch_size=config.batch_size)
    judge = None
    if config.judge is not None:
        judge = models.load_reward_model(config.judge, "judge", place, batch_size=config.batch_size)
    stats: dict[str, float] = {}
    if config.normalise:
        with making.progress_bar() as bar:
            samples = making.sample(
                reference,
                tokenizer,
                prompts["train"],
                config.samples,
                eos_token_id=eos,
                max_new_tokens=config.max_new_tokens,
                min_new_tokens=config.min_new_tokens,
                temperature=config.temperature,
                seed=config.seed,
                progress=making.line_of(bar, "custom: samples to normalise by", config.samples),
            )
        reward = making.in_units_of(reward, samples)
        stats = {"reward_mean": reward.normalise[0], "reward_std": reward.normalise[1]}
    return TextTask(
        name="custom",
        tokenizer=tokenizer,
        reference=reference,
        policy=None if reference is policy else policy,
        prompts=prompts,
        reward=reward,
        judge=judge,
        eos_token_id=eos[0],
        more_eos_token_ids=eos[1:],
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        description=f"tune {config.policy} on {config.prompts} by {config.reward_model}",
        stats=stats,
    )


def _policy_and_reference(
    config: CustomConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both, tried out; the same object where the policy is its own reference. Adapters share their base's weights."""
    placement, recompute = config.placement(config.dtype), config.recompute
    base = None
    if is_adapter(Path(config.policy).expanduser()):
        place = Path(config.policy).expanduser()
        base = models.load_policy(base_of(place), "the base of policy", placement, recompute=recompute)
        policy = with_adapters(base, place)
    else:
        policy = models.load_policy(config.policy, "policy", placement, recompute=recompute)
    models.check_fits(tokenizer, models.vocabulary_of(policy), f"policy {config.policy!r}")
    check_model(policy, f"policy {config.policy!r}", recompute=recompute)
    if config.reference is None:
        return policy, policy
    if config.reference == "base":
        if base is None:
            raise ValueError(
                f"reference 'base' is the model under a policy's adapters, and policy {config.policy!r} has "
                "none: leave reference out, or give a folder (./base, if it is called so)"
            )
        return policy, base
    reference = models.load_policy(config.reference, "reference", placement, recompute=recompute)
    models.same_vocabulary(policy, reference, (config.policy, config.reference))
    check_model(reference, f"reference {config.reference!r}", recompute=recompute)
    return policy, reference


@dataclass(frozen=True)
class Prompt:
    """A prompt as the file has it, or rendered from messages; ``where`` names file and line."""

    text: str
    split: str
    where: str
    rendered: bool = False


def read_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Prompt]:
    """Read a JSONL file of rows with ``prompt`` and perhaps ``split``; divided as
    :func:`~lm_envs.tasks.splits.divide` says.

    Args:
        tokenizer: whose chat template renders prompts that are messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed row or an empty prompt (the message names file and line), or a split without prompts.
    """
    splits, rows = SplitColumn(), []
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        text, rendered = _prompt(row, where, tokenizer)
        rows.append(Prompt(text, splits.read(row, where), where, rendered))
    divided = divide([(row.text, row.split) for row in rows])
    for name in SPLITS:
        if name not in divided.values():
            if any(row.split != "train" for row in rows):
                raise ValueError(
                    f"{path}: no prompt is left for {name}: the column 'split' puts all {len(divided)} different ones "
                    f"into {', '.join(sorted(set(divided.values())))}; leave the column out to have them divided"
                )
            raise ValueError(f"{path}: {len(divided)} different prompts leave none for {name}: give at least 3")
    first = {row.text: row for row in reversed(rows)}
    return [Prompt(text, split, first[text].where, first[text].rendered) for text, split in divided.items()]


def _prompt(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, bool]:
    """A row's prompt as text, and whether a chat template made that."""
    prompt = row.get("prompt", row.get("messages"))
    if isinstance(prompt, list) and tokenizer is not None:
        return _rendered(prompt, where, tokenizer), True
    if not isinstance(prompt, str):
        found = f"not {prompt!r}" if "prompt" in row else "and there is none"
        raise ValueError(f"{where}: 'prompt' must be a string, {found}")
    if not prompt.strip():
        raise ValueError(f"{where}: the prompt is empty")
    return prompt, False


def _rendered(messages: list[Any], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    for message in messages:
        fine = isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        if not fine:
            raise ValueError(f"{where}: a message needs 'role' and 'content', not {message!r}")
    if not messages or messages[-1]["role"] == "assistant":
        last = "there are none" if not messages else "the last one is the assistant's"
        raise ValueError(f"{where}: messages of a prompt end where the assistant is to answer, and {last}")
    try:
        return render_messages(tokenizer, messages, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def encode_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, config: CustomConfig, readers: Sequence[PreTrainedModel]
) -> dict[str, list[list[int]]]:
    """Prompts as token ids by split, as the tokenizer wraps them but without an EOS at the end, and with one BOS.

    An encoder-decoder keeps that EOS: its encoder was trained on texts that have it.

    Args:
        readers: the models that read the prompts.

    Raises:
        ValueError: a prompt has no tokens, or leaves no room for the response in the model's context; with file and
            line.
    """
    encoded: dict[str, list[list[int]]] = {name: [] for name in SPLITS}
    encoder = any(map(is_encoder_decoder, readers))
    rows = {
        p.text: ids
        for rendered in (False, True)
        for chosen in [[p for p in prompts if p.rendered is rendered]]
        for p, ids in zip(
            chosen,
            prompt_ids(tokenizer, [p.text for p in chosen], rendered=rendered, keep_eos=encoder),
            strict=True,
        )
    }
    for prompt in prompts:
        ids = rows[prompt.text]
        if not ids:
            raise ValueError(f"{prompt.where}: the prompt is empty: the policy's tokenizer makes no tokens of it")
        needed = [room_for(model, len(ids), config.max_new_tokens) for model in readers]
        context = min((has for wants, has in needed if has is not None and wants > has), default=None)
        if context is not None:
            raise ValueError(
                f"{prompt.where}: the prompt has {len(ids)} tokens and responses up to {config.max_new_tokens}, "
                f"together more than the model's context of {context}: shorten it or lower max_new_tokens"
            )
        encoded[prompt.split].append(ids)
    return encoded
