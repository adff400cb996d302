"""The fixed work that throughput is measured on, and every way of doing it: ours, ``generate`` and bare forwards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
)

from lm_envs.algos.grpo import GRPO, GRPOConfig
from lm_envs.algos.policies.critics import value_from_reward_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.algos.rloo import RLOO, RLOOConfig
from lm_envs.benchmarks.speed.shared_work import EOS, gpt2_config, word_tokenizer
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.compiled import FixedRows
from lm_envs.model.kv_cache import RowCache
from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks.base import TextTask
from lm_envs.trajectories import Trajectories

GROUP = 4  # episodes per prompt where an algorithm compares them


@dataclass(frozen=True)
class Shape:
    """A model of random weights: GPT-2, or Llama with ``kv_heads`` and feed-forward layers of the width ``inner``."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_heads: int = 0
    inner: int = 0


SHAPES = {
    "small": Shape(4, 128, 4, 1000),
    "larger": Shape(6, 256, 4, 8192),
    "gpt2": Shape(12, 768, 12, 50257),
    "smollm2": Shape(30, 576, 9, 49152, kv_heads=3, inner=1536),
}


@dataclass(frozen=True)
class Size:
    """The amount of work: ``rows`` responses of exactly ``new_tokens`` tokens, to prompts of ``prompt_length``."""

    shape: str = "small"
    rows: int = 32
    prompt_length: int = 16
    new_tokens: int = 48
    vocabulary: int = 0  # 0 is the shape's own

    @property
    def model(self) -> Shape:
        """The model's shape."""
        found = SHAPES[self.shape]
        return replace(found, vocabulary=self.vocabulary or found.vocabulary)

    @property
    def tokens(self) -> int:
        """Tokens that are generated in one go."""
        return self.rows * self.new_tokens


def _llama_config(work: Mapping[str, Any], **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=work["vocabulary"],
        hidden_size=work["width"],
        intermediate_size=work["inner"],
        num_hidden_layers=work["layers"],
        num_attention_heads=work["heads"],
        num_key_value_heads=work["kv_heads"],
        tie_word_embeddings=True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), EOS),
        **more,
    )


def nothing(completions: list[str], **_: Any) -> list[float]:
    """Give 0 to each text, at no cost: what remains is the step path alone."""
    return [0.0] * len(completions)


class Work:
    """Models, task and inputs of one size. Methods do the work once, or return what does it after a preparation."""

    def __init__(self, size: Size, device: str = "cpu") -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        kind = _llama_config if size.model.kv_heads else gpt2_config
        config = functools.partial(kind, asdict(size) | asdict(size.model), pad_token_id=EOS)
        self.reference = AutoModelForCausalLM.from_config(config()).to(device).eval().requires_grad_(False)
        self.model = copy.deepcopy(self.reference)  # for the floors and `generate`: as transformers made it
        self.model.generation_config.eos_token_id = None  # exact length
        self.trained = copy.deepcopy(self.reference).requires_grad_(True)
        scorer = AutoModelForSequenceClassification.from_config(config(num_labels=1))
        scorer.to(device).eval().requires_grad_(False)
        tokenizer = word_tokenizer(size.model.vocabulary)
        prompts = np.random.default_rng(0).integers(1, size.model.vocabulary, (size.rows, size.prompt_length))
        self.task = TextTask(
            name="throughput",
            tokenizer=tokenizer,
            reference=self.reference,
            prompts={"train": prompts.tolist()},
            reward=LearnedReward(scorer, tokenizer),
            judge=None,
            eos_token_id=EOS,
            max_new_tokens=size.new_tokens,
            min_new_tokens=size.new_tokens,  # exact length
            kl_coef=0.05,
        )
        self.ids = torch.as_tensor(prompts, device=device)

    @functools.cached_property
    def text(self) -> Tensor:
        """Texts like those generated, ``(rows, prompt + new)`` int64."""
        new = torch.randint(1, self.size.model.vocabulary, (self.size.rows, self.size.new_tokens), device=self.device)
        return torch.cat([self.ids, new], dim=1)

    def _env(self, **changes: Any) -> TextVectorEnv:
        return TextVectorEnv(self.task, self.size.rows, **changes)

    def policy(self, **options: Any) -> LMPolicy:
        """Return a policy that starts as the reference."""
        return LMPolicy.for_mdp(self._env().mdp, copy.deepcopy(self.reference).requires_grad_(True), **options)

    def generate(self) -> None:
        """Run Hugging Face's cached ``generate``, plain sampling."""
        kwargs = dict(do_sample=True, top_k=0, pad_token_id=EOS, use_cache=True, max_new_tokens=self.size.new_tokens)
        out = self.model.generate(self.ids, attention_mask=torch.ones_like(self.ids), **kwargs)
        assert out.shape[1] == self.size.prompt_length + self.size.new_tokens

    @torch.no_grad()
    def forwards(self) -> None:
        """Run the floor of decoding: prompt and each token through the model with its cache, and nothing else."""
        cache = DynamicCache(config=self.model.config)
        self.model(self.text[:, : self.size.prompt_length], past_key_values=cache, use_cache=True, logits_to_keep=1)
        for t in range(self.size.prompt_length, self.text.shape[1] - 1):
            self.model(self.text[:, t : t + 1], past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def forward(self) -> None:
        """Run one teacher-forced forward of all tokens: the cost of a reference or a reward model."""
        self.model(self.text[:, :-1], logits_to_keep=self.size.new_tokens, use_cache=False)

    def forward_backward(self) -> None:
        """Run the floor of an epoch: one teacher-forced forward and backward of all tokens, logits of the response."""
        self.trained.zero_grad(set_to_none=True)
        new = self.size.new_tokens
        logits = self.trained(self.text[:, :-1], logits_to_keep=new, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.text[:, -new:].flatten()).backward()

    def our_forwards(self, compile: bool = False) -> Callable[[], object]:
        """Return the same forwards by the policy's decoder: a step without its surroundings."""
        model, room = self.policy(compile=compile).model, self.size.new_tokens
        fixed = FixedRows(model, room) if compile else None

        @torch.no_grad()
        def run() -> None:
            cache = RowCache(model, room) if fixed is None else fixed
            cache.prefill(self.text[:, : self.size.prompt_length])
            for t in range(self.size.prompt_length, self.text.shape[1] - 1):
                cache.advance(self.text[:, t])

        return run

    def step(self, kl_coef: float = 0.0, reward: Any = nothing) -> Callable[[], object]:
        """Return the step path: the policy acts and the environment steps, all rows at once."""
        task = replace(self.task, reward=reward or self.task.reward)
        env, policy = TextVectorEnv(task, self.size.rows, kl_coef=kl_coef), self.policy()
        return self._all_tokens(lambda: collect(env, policy, episodes=self.size.rows))

    def bulk(self, compile: bool = False) -> Callable[[], object]:
        """Return the fast path: generation, reference and reward model."""
        env, policy = self._env(), self.policy(compile=compile)
        return self._all_tokens(lambda: rollout(env, policy, episodes=self.size.rows))

    def train(
        self, agent: Any, config: Any, group: int = 1, critic: bool = False, compile: bool = False, **settings: Any
    ) -> Callable[[], object]:
        """Return a whole iteration of an algorithm.

        Args:
            group: responses to each prompt.
            critic: add a separate model of the policy's size, as TRL's PPO does.
        """
        policy = self.policy(compile=compile)
        if critic:
            value_from_reward_model(policy, self.task)
        chosen = config(episodes=self.size.rows, group_size=group, minibatches=1, learning_rate=1e-5, **settings)
        made, env = agent(policy, chosen), self._env(group_size=group)
        return self._all_tokens(lambda: made.iteration(env)[0])

    def _all_tokens(self, sample: Callable[[], Trajectories]) -> Callable[[], object]:
        def run() -> None:
            assert int(sample().mask.sum()) == self.size.tokens

        return run

    def way(self, name: str) -> Callable[[], object]:
        """Return what does the work in a way of :data:`WAYS`."""
        return WAYS[name](self)


WAYS: dict[str, Callable[[Work], Callable[[], object]]] = {
    "generate": lambda work: work.generate,
    "bare forwards": lambda work: work.forwards,
    "our forwards": Work.our_forwards,
    "our forwards, compiled": lambda work: work.our_forwards(compile=True),
    "bare forward": lambda work: work.forward,
    "bare forward+backward": lambda work: work.forward_backward,
    "step": Work.step,
    "step + reference": lambda work: work.step(kl_coef=0.05),
    "step + reference + reward": lambda work: work.step(kl_coef=0.05, reward=None),
    "bulk + reference + reward": Work.bulk,
    "bulk + reference + reward, compiled": lambda work: work.bulk(compile=True),
    "ppo 1 epoch": lambda work: work.train(PPO, PPOConfig, epochs=1),
    "ppo 4 epochs": lambda work: work.train(PPO, PPOConfig, epochs=4),
    "ppo 1 epoch, own critic": lambda work: work.train(PPO, PPOConfig, epochs=1, critic=True),
    "ppo 4 epochs, own critic": lambda work: work.train(PPO, PPOConfig, epochs=4, critic=True),
    "ppo 1 epoch, compiled": lambda work: work.train(PPO, PPOConfig, epochs=1, compile=True),
    "grpo": lambda work: work.train(GRPO, GRPOConfig, GROUP),
    "grpo, compiled": lambda work: work.train(GRPO, GRPOConfig, GROUP, compile=True),
    "rloo": lambda work: work.train(RLOO, RLOOConfig, GROUP),
}
COMPILED = tuple(name for name in WAYS if name.endswith(", compiled"))  # need a C++ compiler, or Triton
