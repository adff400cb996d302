"""A run's problem with models that have sizes and no numbers, so that a plan can be made where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_envs.algos.registry import load as load_algorithm
from lm_envs.benchmarks.run.inputs import sources_of
from lm_envs.benchmarks.run.names import base_task, is_untrained
from lm_envs.benchmarks.run.problems import ControlProblem, TextProblem, open_problem
from lm_envs.benchmarks.run.suites import RunSpec
from lm_envs.data.dataset import Rejected
from lm_envs.model.adapters import is_adapter
from lm_envs.model.gguf import gguf_file
from lm_envs.model.loading import check_fits, load_tokenizer, vocabulary_of, without_weights
from lm_envs.model.text import Codec
from lm_envs.reward.base import WeightedSum
from lm_envs.reward.learned import LearnedReward
from lm_envs.reward.specs import Source, is_spec, parse_reward
from lm_envs.settings import make
from lm_envs.tasks.base import TextTask
from lm_envs.tasks.custom import CustomConfig, by_split, columns_of, encode_prompts, read_examples, read_prompts


def sketch(spec: RunSpec) -> TextProblem | ControlProblem:
    """Open the problem of a run without the weights of its models, where that can be done.

    It can for a task "custom" of whole models. Other tasks are in the package or are built once; adapters and GGUF
    files say their sizes only when they are read; and algorithms that learn from data sample them from the reference.
    """
    policy = spec.options.get("policy")
    custom = base_task(spec.task)[0] == "custom" and isinstance(policy, str)
    if not custom or is_adapter(Path(str(policy)).expanduser()) or gguf_file(str(policy), "policy") is not None:
        return open_problem(spec)
    if not is_untrained(spec.algorithm) and load_algorithm(spec.algorithm).needs_data:
        return open_problem(spec)
    return TextProblem(spec, _task(spec.options, spec.env))


def _task(options: Mapping[str, Any], env: Mapping[str, Any]) -> TextTask:
    """The task that ``custom`` would load, without weights and without what is only known by sampling."""
    lengths = {name: env[name] for name in ("max_new_tokens", "min_new_tokens", "temperature") if name in env}
    config = make(CustomConfig, {**options, **lengths}, "custom")
    texts = read_prompts(config.prompts, rejected := Rejected(config.prompts, config.bad))
    tokenizer = load_tokenizer(config.policy)
    policy = without_weights(config.policy, "policy", config.placement(config.dtype))
    check_fits(tokenizer, vocabulary_of(policy), f"policy {config.policy!r}")
    reference = policy
    if config.reference is not None:
        reference = without_weights(config.reference, "reference", config.placement(config.dtype))
    codec = Codec(tokenizer, policy)
    encoded = encode_prompts(texts, codec, config.max_new_tokens, [policy, reference], rejected)
    ends = codec.ends(any(not isinstance(text.prompt, str) for text in texts))

    def learned(text: Any) -> list[Any]:
        spec = Source("model", text) if isinstance(text, str) and not is_spec(text) else parse_reward(text)
        places = [(part.place, part.settings) for part in sources_of(spec) if part.kind == "model"]
        placed = config.placement(config.reward_dtype)
        models = [without_weights(place, "reward model", placed, classifier=True) for place, _ in places]
        names = ("label", "output", "template")
        given = [{name: held[name] for name in names if name in held} for _, held in places]
        return [LearnedReward(model, tokenizer, **more) for model, more in zip(models, given, strict=True)]

    rewards = learned(config.reward_model if config.reward is None else config.reward)
    judges = [] if config.judge is None else learned(config.judge)
    parts = rewards or [_nothing]
    reward: Any = parts[0] if len(parts) == 1 else WeightedSum([(1.0, part) for part in parts])
    return TextTask(
        name="custom",
        tokenizer=tokenizer,
        reference=reference,
        policy=None if reference is policy else policy,
        prompts=by_split(encoded),
        reward=reward,
        judge=judges[0] if judges else None,
        examples=[] if config.examples is None else read_examples(config.examples),
        eos_token_id=ends[0],
        more_eos_token_ids=ends[1:],
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        kl_coef=config.kl_coef,
        temperature=config.temperature,
        columns=columns_of(encoded),
    )


def _nothing(completions: list[str], **columns: Any) -> list[float]:
    """A reward without a model."""
    return [0.0] * len(completions)
