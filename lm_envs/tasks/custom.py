"""Bring your own: a task of a user's policy, reward model and prompts, from folders of ``save_pretrained`` or hub
names.

Whatever does not fit together is refused here, in one line, before any training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_envs import models
from lm_envs.data import Data
from lm_envs.data_formats import Text
from lm_envs.tasks import making
from lm_envs.tasks.splits import SPLITS, divide
from lm_envs.tasks.task import TextTask
from lm_envs.tokenising import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEEDED = ("policy", "reward_model", "prompts")


@dataclass(frozen=True)
class CustomConfig:
    """The parts of the task, and how they are used.

    Attributes:
        policy: the model to tune and its tokenizer: a folder of ``save_pretrained``, or a hub name.
        reward_model: a sequence classifier with its own tokenizer, likewise.
        prompts: a file, folder or hub name with ``prompt`` (text or chat messages) and perhaps ``split`` (train,
            validation, test) a row, or another convention with prompts; see :class:`~lm_envs.data.Data`.
        reference: what the KL penalty is measured from, None for the policy as it starts.
        judge: another reward model, which decides win-rates; None for no win-rates.
        max_new_tokens: the horizon.
        min_new_tokens: EOS is masked before that many tokens.
        kl_coef: default weight of the KL penalty, in units of the reward per nat.
        temperature: of the policy and of the reference.
        normalise: put the reward in units of its standard deviation over samples of the reference, with mean 0.
        samples: how many samples that takes.
        batch_size: texts per forward of the reward model and of the judge.
        seed: of the samples.
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
    texts = read_prompts(config.prompts)
    tokenizer = models.load_tokenizer(config.policy)
    policy = models.load_policy(config.policy)
    models.check_fits(tokenizer, models.vocabulary_of(policy), f"policy {config.policy!r}")
    reference = policy
    if config.reference is not None:
        reference = models.load_policy(config.reference, "reference")
        models.same_vocabulary(policy, reference, (config.policy, config.reference))
    contexts = [c for c in (models.context_of(policy), models.context_of(reference)) if c is not None]
    prompts = encode_prompts(texts, tokenizer, config, min(contexts, default=None))
    reward = models.load_reward_model(config.reward_model, batch_size=config.batch_size)
    judge = None
    if config.judge is not None:
        judge = models.load_reward_model(config.judge, "judge", batch_size=config.batch_size)
    stats: dict[str, float] = {}
    if config.normalise:
        with making.progress_bar() as bar:
            samples = making.sample(
                reference,
                tokenizer,
                prompts["train"],
                config.samples,
                eos_token_id=tokenizer.eos_token_id,
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
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        description=f"tune {config.policy} on {config.prompts} by {config.reward_model}",
        stats=stats,
    )


@dataclass(frozen=True)
class Prompt:
    """A prompt as the file has it, text or chat messages; ``where`` names file and line."""

    text: Text
    split: str
    where: str


def read_prompts(source: str | Path) -> list[Prompt]:
    """Read prompts, and their column ``split`` if they have one; divided as :func:`~lm_envs.tasks.splits.divide` says.

    Args:
        source: a file, a folder or a name on the hub, in any convention that has prompts; see
            :class:`~lm_envs.data.Data`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed row or an empty prompt (the message names file and line), or a split without prompts.
    """
    rows: dict[str, Prompt] = {}
    found: list[tuple[str, str]] = []
    for item in Data(source, "prompts"):
        key, split = item.example.key, item.split or "train"
        found.append((key, split))
        rows.setdefault(key, Prompt(item.example.prompt, split, f"{source}, {item.where}"))
    divided = divide(found)
    for name in SPLITS:
        if name not in divided.values():
            if any(split != "train" for _, split in found):
                raise ValueError(
                    f"{source}: no prompt is left for {name}: the column 'split' puts all {len(divided)} different "
                    f"ones into {', '.join(sorted(set(divided.values())))}; leave the column out to have them divided"
                )
            raise ValueError(f"{source}: {len(divided)} different prompts leave none for {name}: give at least 3")
    return [replace(rows[key], split=split) for key, split in divided.items()]


def encode_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, config: CustomConfig, context: int | None
) -> dict[str, list[list[int]]]:
    """Prompts as token ids by split, as the tokenizer wraps them or its chat template writes them; no EOS at the end.

    Raises:
        ValueError: messages without a chat template, a prompt that has no tokens, or leaves no room for the response in
            the model's context; with file and line.
    """
    encoded: dict[str, list[list[int]]] = {name: [] for name in SPLITS}
    for prompt, ids in zip(prompts, prompt_ids(tokenizer, [p.text for p in prompts]), strict=True):
        if not ids:
            raise ValueError(f"{prompt.where}: the prompt is empty: the policy's tokenizer makes no tokens of it")
        if context is not None and len(ids) + config.max_new_tokens > context:
            raise ValueError(
                f"{prompt.where}: the prompt has {len(ids)} tokens and responses up to {config.max_new_tokens}, "
                f"together more than the model's context of {context}: shorten it or lower max_new_tokens"
            )
        encoded[prompt.split].append(ids)
    return encoded
