"""A task made of a user's policy, rewards and prompts, from folders of ``save_pretrained`` or hub names.

Parts that do not fit together are refused here, in one line, before any training.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples, OnBad, Rejected
from lm_envs.data.splits import SPLITS, divide, warn_if_few
from lm_envs.model import loading
from lm_envs.model.adapters import base_of, is_adapter, with_adapters
from lm_envs.model.chat import BadExample
from lm_envs.model.checking import check_model
from lm_envs.model.encoder_decoder import room_for
from lm_envs.model.text import Codec
from lm_envs.model.tokens import context_of
from lm_envs.reward.base import RESERVED, Standardise, leaves, reward_name
from lm_envs.reward.building import build_reward
from lm_envs.reward.learned import LearnedReward
from lm_envs.reward.metrics import TextMetric
from lm_envs.reward.specs import Source, is_spec, parse_reward
from lm_envs.reward.units import Samples, in_units_of
from lm_envs.settings import Name, Names, NonNegative, Positive, Seed, Settings, Several, Size, Whole, make
from lm_envs.tasks import sampling
from lm_envs.tasks.base import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAMED = 3  # bad rows in the warning about them


@dataclass(frozen=True)
class CustomConfig(Settings):
    """The parts of the task, and how they are used.

    Attributes:
        policy: the model to tune and its tokenizer: a folder of ``save_pretrained`` (or of adapters), a GGUF file
            (:mod:`lm_envs.model.gguf`), or a hub name.
        prompts: a source whose rows have ``prompt`` (text or chat messages) and an optional ``split`` (train,
            validation, test), or follow another convention; see :class:`~lm_envs.data.dataset.Examples`.
        reward_model: the folder or hub name of a sequence classifier with its own tokenizer; short for
            ``reward="standardise(model:PLACE)"``.
        reward: the training reward as text, in the grammar of :mod:`lm_envs.reward.specs`; several texts are summed.
        reference: the model that the KL penalty is measured from, None for the policy as it starts; "base" for the
            model under its adapters.
        judge: the reward for win-rates: the place of a reward model, or a reward as text; None for no win-rates.
        examples: a source of demonstrations of text, which the method ``prompted`` shows before each prompt.
        min_new_tokens: EOS is masked before that many tokens.
        kl_coef: default weight of the KL penalty, in units of the reward per nat.
        normalise: shift and scale the reward to mean 0 and standard deviation 1 over samples of the reference; None
            does so with ``reward_model`` and not with ``reward``.
        samples: number of those samples.
        batch_size: texts per forward of the reward model and of the judge.
        dtype, reward_dtype: of policy and reference, and of reward models and judge: "float32", "bfloat16", "float64",
            or "auto" for the one they were saved in.
        device, device_map: where all models go; see :class:`~lm_envs.model.loading.Placement`.
        recompute: accept a policy whose cache cannot be kept row by row.
        bad: "raise" stops at a row that cannot be read, is empty or too long; "skip" leaves it out.
        sensitive: prompts and responses may offend: reports show none of them unless asked.
    """

    policy: Name
    prompts: Name
    reward_model: Name | None = None
    reward: Name | Names | None = None
    reference: Name | None = None
    judge: Name | None = None
    examples: Name | None = None
    max_new_tokens: Size = 32
    min_new_tokens: Whole = 0
    kl_coef: NonNegative = 0.05
    temperature: Positive = 1.0
    normalise: bool | None = None
    samples: Several = 256
    batch_size: Size = 64
    seed: Seed = 0
    dtype: str = "float32"
    reward_dtype: str = "float32"
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    recompute: bool = False
    bad: OnBad = "raise"
    sensitive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_model is not None and self.reward is not None:
            same = f"reward 'standardise(model:{self.reward_model})' says the same and can be added to others"
            raise ValueError(f"reward_model is short for one reward, so give one of the two: {same}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )
        self.placement(self.dtype), self.placement(self.reward_dtype)

    def placement(self, dtype: str) -> loading.Placement:
        return loading.Placement(dtype, self.device, self.device_map)


def load(**options: Any) -> TextTask:
    """Make the task of the user's parts.

    Args:
        options: fields of :class:`CustomConfig`; ``policy``, ``prompts``, and ``reward_model`` or ``reward`` are
            needed.

    Raises:
        FileNotFoundError: there is no such file of prompts.
        ValueError: a part is missing or does not fit the others, a row of the prompts is malformed, empty or too long
            (with file and line), or a reward cannot be made or standardized.
    """
    rewarded = options.get("reward") is not None
    needed = ("policy", "reward_model", "prompts")
    missing = [name for name in needed if options.get(name) is None and not (name == "reward_model" and rewarded)]
    if missing:
        gap = f"give {', '.join(needed)}; missing: {', '.join(missing)}"
        raise ValueError(f"custom is made of parts of your own: {gap}")
    plain: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    config = make(CustomConfig, plain, "custom")
    # Quick checks come first: models can take minutes to load.
    reward_spec = Source("model", str(config.reward_model)) if config.reward is None else parse_reward(config.reward)
    judge_spec = None
    if config.judge is not None:
        judge_spec = parse_reward(config.judge) if is_spec(config.judge) else Source("model", config.judge)
    examples = read_examples(config.examples) if config.examples is not None else []
    rejected = Rejected(config.prompts, config.bad)
    texts = read_prompts(config.prompts, rejected)
    conversational = any(not isinstance(prompt.prompt, str) for prompt in texts)
    tokenizer = loading.load_tokenizer(config.policy)
    policy, reference = _policy_and_reference(config, tokenizer)
    codec = Codec(tokenizer, policy)
    encoded = encode_prompts(texts, codec, config.max_new_tokens, [policy, reference], rejected)
    prompts = by_split(encoded)
    warn_if_few(config.prompts, prompts)
    if rejected.count:
        warnings.warn(f"{config.prompts}: {passed_over(rejected)}", stacklevel=2)
    eos = codec.ends(conversational)
    columns = columns_of(encoded)

    @functools.cache
    def samples() -> Samples:
        return sampling.sample(
            reference,
            tokenizer,
            prompts["train"],
            config.samples,
            eos_token_id=eos,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            title="custom: samples to standardise by",
            columns=columns.get("train"),
        )

    build = functools.partial(
        build_reward,
        samples=samples,
        batch_size=config.batch_size,
        conversational=conversational,
        placement=config.placement(config.reward_dtype),
    )
    reward = build(reward_spec, what="reward model")
    judge = None if judge_spec is None else build(judge_spec, what="judge")
    for found in (reward, judge):
        check_references(found, [prompt for prompt, _ in encoded])
    if config.normalise or (config.normalise is None and config.reward is None):
        reward = in_units_of(reward, samples())
    stats: dict[str, float] = {"bad_prompts": rejected.count} if rejected.count else {}
    if isinstance(reward, (LearnedReward, Standardise)):
        mean, std = reward.normalise if isinstance(reward, LearnedReward) else (reward.mean, reward.std)
        stats |= {} if (mean, std) == (0.0, 1.0) else {"reward_mean": mean, "reward_std": std}
    return TextTask(
        name="custom",
        tokenizer=tokenizer,
        reference=reference,
        policy=None if reference is policy else policy,
        prompts=prompts,
        reward=reward,
        judge=judge,
        examples=examples,
        eos_token_id=eos[0],
        more_eos_token_ids=eos[1:],
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        description=f"tune {config.policy} on {config.prompts} by {reward_name(reward)}",
        stats=stats,
        columns=columns,
        sensitive=config.sensitive,
    )


def _policy_and_reference(
    config: CustomConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Load and try both; one object if the policy is its own reference. Adapters share their base's weights."""
    load = functools.partial(loading.load_policy, placement=config.placement(config.dtype), recompute=config.recompute)
    place, recompute = Path(config.policy).expanduser(), config.recompute
    if config.reference != "base":
        policy = base = load(config.policy, "policy")
    elif is_adapter(place):
        base = load(base_of(place), "the base of policy")
        policy = with_adapters(base, place)
    else:
        raise ValueError(
            f"reference 'base' is the model under a policy's adapters, and policy {config.policy!r} has "
            "none: leave reference out, or give a folder (./base, if it is called so)"
        )
    loading.check_fits(tokenizer, loading.vocabulary_of(policy), f"policy {config.policy!r}")
    check_model(policy, f"policy {config.policy!r}", recompute=recompute)
    if config.reference in (None, "base"):
        return policy, base
    reference = load(config.reference, "reference")
    widths = loading.vocabulary_of(policy), loading.vocabulary_of(reference)
    if widths[0] != widths[1]:
        raise ValueError(
            f"policy {config.policy!r} has {widths[0]} output tokens and reference {config.reference!r} {widths[1]}: "
            "the KL penalty compares them token by token, so they must share one vocabulary"
        )
    _check_same_tokens(tokenizer, config)
    check_model(reference, f"reference {config.reference!r}", recompute=recompute)
    return policy, reference


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, config: CustomConfig) -> None:
    """Raise ValueError if the reference has a tokenizer whose words, special tokens aside, have other ids."""
    try:
        theirs = loading.load_tokenizer(str(config.reference), "reference")
    except ValueError:
        return  # a model without a tokenizer is taken for one of the policy's
    both = (tokenizer, theirs)
    mine, other = ({i: w for w, i in t.get_vocab().items() if i not in t.added_tokens_decoder} for t in both)
    for i in sorted(i for i in mine.keys() & other.keys() if mine[i] != other[i]):
        raise ValueError(
            f"policy {config.policy!r} and reference {config.reference!r} have different vocabularies: token {i} is "
            f"{mine[i]!r} and {other[i]!r}; the KL penalty compares them token by token"
        )


def read_prompts(source: str | Path, rejected: Rejected | None = None) -> list[Example]:
    """Read prompts and divide them into splits by :func:`~lm_envs.data.splits.divide`.

    Rows with the same prompt and the same columns count once.

    Args:
        source: in any convention that has prompts; see :class:`~lm_envs.data.dataset.Examples`.
        rejected: receives malformed rows and empty prompts; without it they raise.

    Raises:
        ValueError: a bad row (the message names file and line), or a split without prompts.
    """
    rows: dict[tuple[str, str], Example] = {}  # equal prompts may have different references
    found: list[tuple[str, str]] = []
    data = Examples(source, "prompts")
    data.rejected = rejected = rejected or data.rejected
    for prompt in data:
        found.append((prompt.key, prompt.split))
        rows.setdefault((prompt.key, repr(prompt.columns)), prompt)
    divided = divide(found, source, f"; {passed_over(rejected)}" if rejected.count else "")
    return [replace(row, split=divided[key]) for (key, _), row in rows.items()]


def read_examples(source: str | Path) -> list[tuple[str, str]]:
    """Read pairs of a prompt and a response; ValueError for a row that is no such pair of texts, with file and line."""
    found: list[tuple[str, str]] = []
    for row in Examples(source, "demonstrations"):
        if not isinstance(row.prompt, str) or not row.prompt:
            raise ValueError(f"{row.place}: an example is a prompt and a completion, both texts")
        found.append((row.prompt, row.text))
    return found


def check_references(reward: Any, prompts: Sequence[Example]) -> None:
    """Raise ValueError, with file and line, if a text metric would find no reference to compare with."""
    parts = [] if reward is None else list(leaves(reward))
    for metric in (part for part in parts if isinstance(part, TextMetric)):
        if not any(metric.column in prompt.columns for prompt in prompts):
            continue  # the metric reports a missing column
        for prompt in prompts:
            given = prompt.columns.get(metric.column)
            texts = [given] if isinstance(given, str) else given
            if given is None and len(parts) > 1:
                continue  # the other parts are the reward there
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{prompt.place}: {metric.column!r}, which {metric.__name__!r} compares with, must be a text or a "
                    f"list of texts, not {given!r}"
                )


def encode_prompts(
    prompts: Sequence[Example],
    codec: Codec,
    max_new_tokens: int,
    readers: Sequence[PreTrainedModel],
    rejected: Rejected,
) -> list[tuple[Example, list[int]]]:
    """Return prompts with their token ids, as :meth:`~lm_envs.model.text.Codec.encode` makes them.

    ``rejected`` receives prompts that have no tokens, leave no room for ``max_new_tokens`` in the context of a reader,
    or are refused by the chat template.

    Raises:
        ValueError: a bad prompt, with file and line; messages without a chat template; or a split without prompts.
    """
    found: list[tuple[Example, list[int]]] = []
    contexts = [has for model in readers if (has := context_of(model)) is not None]
    for prompt in prompts:
        try:
            ids, _ = codec.encode(prompt.prompt, most=min(contexts, default=None))
        except BadExample as error:
            rejected.add(prompt.where, str(error))
            continue
        except ValueError as error:
            raise ValueError(f"{prompt.place}: {error}") from error
        needed = [room_for(model, len(ids), max_new_tokens) for model in readers]
        context = min((has for wants, has in needed if has is not None and wants > has), default=None)
        if context is None:
            found.append((prompt, ids))
        else:
            rejected.add(
                prompt.where,
                f"the prompt has {len(ids)} tokens and responses up to {max_new_tokens}, together more than the "
                f"model's context of {context}: shorten it or lower max_new_tokens",
            )
    for name in SPLITS:
        if rejected.count and not any(prompt.split == name for prompt, _ in found):
            raise ValueError(f"{rejected.source}: no prompt is left for {name}; {passed_over(rejected)}")
    return found


def passed_over(rejected: Rejected) -> str:
    """Say how many rows were bad, and list the first ones."""
    first = "; ".join(f"{bad.where}: {bad.reason}" for bad in rejected.rows[:_NAMED])
    rows = "1 bad row was" if rejected.count == 1 else f"{rejected.count:,} bad rows were"
    more = "; ..." if rejected.count > _NAMED else ""
    return f"{rows} passed over ({first}{more})"


def by_split(encoded: Sequence[tuple[Example, list[int]]]) -> dict[str, list[list[int]]]:
    """Token ids by split."""
    return {name: [ids for prompt, ids in encoded if prompt.split == name] for name in SPLITS}


def columns_of(encoded: Sequence[tuple[Example, list[int]]]) -> dict[str, dict[str, list[Any]]]:
    """Return the other columns of the prompts' rows, by split and name, in the order of :func:`by_split`; None for a
    row that lacks one. With chat prompts, the column ``messages`` holds the messages.

    Raises:
        ValueError: a column has a name that rewards use for something else; with file and line.
    """
    prompts = [prompt for prompt, _ in encoded]
    names: dict[str, Any] = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    for name in RESERVED:
        if name in names:
            where = next(prompt.place for prompt in prompts if name in prompt.columns)
            raise ValueError(f"{where}: rewards receive something else as {name!r}: rename that column")
    rows = [{**names, **prompt.columns} for prompt in prompts]
    if any(not isinstance(prompt.prompt, str) for prompt in prompts):
        names["messages"] = None
        for row, prompt in zip(rows, prompts, strict=True):
            text = prompt.prompt
            row["messages"] = [{"role": "user", "content": text}] if isinstance(text, str) else text
    if not names:
        return {}
    held = {split: [row for row, one in zip(rows, prompts, strict=True) if one.split == split] for split in SPLITS}
    return {split: {name: [row[name] for row in held[split]] for name in names} for split in SPLITS}
