"""The fixed work that throughput is measured on, and every way of doing it: ours, ``generate`` and bare forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from lm_envs.algos.grpo import GRPO, GRPOConfig
from lm_envs.algos.policies.critics import value_from_reward_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.algos.rloo import RLOO, RLOOConfig
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.compiled import FixedRows
from lm_envs.model.kv_cache import RowCache
from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks.base import TextTask
from lm_envs.trajectories import Trajectories

EOS = 0
GROUP = 4  # episodes per prompt where an algorithm compares them


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of random weights."""

    layers: int
    width: int
    heads: int
    vocabulary: int


SHAPES = {"small": Shape(4, 128, 4, 1000), "larger": Shape(6, 256, 4, 8192), "gpt2": Shape(12, 768, 12, 50257)}


@dataclass(frozen=True)
class Size:
    """How much work: ``rows`` responses of exactly ``new_tokens`` tokens, to prompts of exactly ``prompt_length``."""

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
        """Generated in one go."""
        return self.rows * self.new_tokens


def config_of(size: Size, **more: Any) -> GPT2Config:
    """Policy, reference, reward model and critic are all of this shape."""
    shape = size.model
    return GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=max(128, size.prompt_length + size.new_tokens),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOS),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **more,
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token a word: decoding and encoding again gives the same ids."""
    words = {"<eos>": EOS} | {f"w{i}": i for i in range(1, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def nothing(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing: the step path alone."""
    return [0.0] * len(completions)


class Work:
    """Models, task and inputs of one size; each of ``ways`` does all of it once when called."""

    def __init__(self, size: Size, device: str = "cpu") -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        self.reference = GPT2LMHeadModel(config_of(size)).to(device).eval().requires_grad_(False)
        self.model = copy.deepcopy(self.reference)  # of the floors and `generate`: as transformers made it
        self.model.generation_config.eos_token_id = None  # exact length
        self.trained = copy.deepcopy(self.reference).requires_grad_(True)
        scorer = GPT2ForSequenceClassification(config_of(size, num_labels=1)).to(device).eval().requires_grad_(False)
        tokenizer = word_tokenizer(size.model.vocabulary)
        generator = np.random.default_rng(0)
        self.prompts = generator.integers(1, size.model.vocabulary, (size.rows, size.prompt_length))
        self.task = TextTask(
            name="throughput",
            tokenizer=tokenizer,
            reference=self.reference,
            prompts={"train": self.prompts.tolist()},
            reward=LearnedReward(scorer, tokenizer),
            judge=None,
            eos_token_id=EOS,
            max_new_tokens=size.new_tokens,
            min_new_tokens=size.new_tokens,  # exact length
            kl_coef=0.05,
        )
        self.ids = torch.as_tensor(self.prompts, device=device)

    @cached_property
    def text(self) -> Tensor:
        """``(rows, prompt + new)`` int64: a text like those generated."""
        new = torch.randint(1, self.size.model.vocabulary, (self.size.rows, self.size.new_tokens), device=self.device)
        return torch.cat([self.ids, new], dim=1)

    def _env(self, **changes: Any) -> TextVectorEnv:
        return TextVectorEnv(self.task, self.size.rows, **changes)

    def _policy(self, **options: Any) -> LMPolicy:
        return LMPolicy.for_mdp(self._env().mdp, copy.deepcopy(self.reference).requires_grad_(True), **options)

    # the ways

    def generate(self) -> Callable[[], object]:
        """Hugging Face's cached ``generate``, plain sampling."""
        kwargs = dict(do_sample=True, top_k=0, pad_token_id=EOS, use_cache=True, max_new_tokens=self.size.new_tokens)

        def run() -> None:
            out = self.model.generate(self.ids, attention_mask=torch.ones_like(self.ids), **kwargs)
            assert out.shape[1] == self.size.prompt_length + self.size.new_tokens

        return run

    def forwards(self) -> Callable[[], object]:
        """The floor of decoding: prompt and each token through the model with its cache, and nothing else."""

        @torch.no_grad()
        def run() -> None:
            cache = DynamicCache(config=self.model.config)
            self.model(self.text[:, : self.size.prompt_length], past_key_values=cache, use_cache=True, logits_to_keep=1)
            for t in range(self.size.prompt_length, self.text.shape[1] - 1):
                self.model(self.text[:, t : t + 1], past_key_values=cache, use_cache=True)

        return run

    def our_forwards(self, compile: bool = False) -> Callable[[], object]:
        """The same forwards as the policy's decoder does them: what a step costs without what stands around it."""
        model, room = self._policy(compile=compile).model, self.size.new_tokens
        fixed = FixedRows(model, room) if compile else None

        @torch.no_grad()
        def run() -> None:
            cache = RowCache(model, room) if fixed is None else fixed
            cache.prefill(self.text[:, : self.size.prompt_length])
            for t in range(self.size.prompt_length, self.text.shape[1] - 1):
                cache.advance(self.text[:, t])

        return run

    def forward_backward(self) -> Callable[[], object]:
        """The floor of an epoch: one teacher-forced forward and backward of all tokens, logits of the response."""

        def run() -> None:
            self.trained.zero_grad(set_to_none=True)
            new = self.size.new_tokens
            logits = self.trained(self.text[:, :-1], logits_to_keep=new, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.text[:, -new:].flatten()).backward()

        return run

    def forward(self) -> Callable[[], object]:
        """One teacher-forced forward of all tokens without gradients: what a reference or a reward model costs."""

        @torch.no_grad()
        def run() -> None:
            self.model(self.text[:, :-1], logits_to_keep=self.size.new_tokens, use_cache=False)

        return run

    def step(self, kl_coef: float = 0.0, reward: Any = nothing) -> Callable[[], object]:
        """The policy acts and the environment steps, all rows at once."""
        task = copy.copy(self.task)
        object.__setattr__(task, "reward", reward or self.task.reward)
        env, policy = TextVectorEnv(task, self.size.rows, kl_coef=kl_coef), self._policy()
        return self._all_tokens(lambda: collect(env, policy, episodes=self.size.rows))

    def bulk(self, compile: bool = False) -> Callable[[], object]:
        """The fast path: generation, reference and reward model."""
        env, policy = self._env(), self._policy(compile=compile)
        return self._all_tokens(lambda: rollout(env, policy, episodes=self.size.rows))

    def ppo(self, epochs: int, critic: bool = False, compile: bool = False) -> Callable[[], object]:
        """A whole iteration; ``critic`` is a separate model of the policy's size, as in TRL."""
        policy = self._policy(compile=compile)
        if critic:
            value_from_reward_model(policy, self.task)
        settings: dict[str, Any] = dict(episodes=self.size.rows, epochs=epochs, minibatches=1, learning_rate=1e-5)
        agent, env = PPO(policy, PPOConfig(**settings)), self._env()
        return self._all_tokens(lambda: agent.iteration(env)[0])

    def grouped(self, agent: Any, config: Any, compile: bool = False, **settings: Any) -> Callable[[], object]:
        """A whole iteration of an algorithm that compares the responses of a prompt."""
        chosen = config(episodes=self.size.rows, group_size=GROUP, minibatches=1, learning_rate=1e-5, **settings)
        made, env = agent(self._policy(compile=compile), chosen), self._env(group_size=GROUP)
        return self._all_tokens(lambda: made.iteration(env)[0])

    def _all_tokens(self, sample: Callable[[], Trajectories]) -> Callable[[], object]:
        def run() -> None:
            assert int(sample().mask.sum()) == self.size.tokens

        return run

    def way(self, name: str) -> Callable[[], object]:
        """What does the work when called; a name of :data:`WAYS`."""
        return WAYS[name](self)


WAYS: dict[str, Callable[[Work], Callable[[], object]]] = {
    "generate": Work.generate,
    "bare forwards": Work.forwards,
    "our forwards": Work.our_forwards,
    "our forwards, compiled": lambda work: work.our_forwards(compile=True),
    "bare forward": Work.forward,
    "bare forward+backward": Work.forward_backward,
    "step": Work.step,
    "step + reference": lambda work: work.step(kl_coef=0.05),
    "step + reference + reward": lambda work: work.step(kl_coef=0.05, reward=None),
    "bulk + reference + reward": Work.bulk,
    "bulk + reference + reward, compiled": lambda work: work.bulk(compile=True),
    "ppo 1 epoch": lambda work: work.ppo(1),
    "ppo 4 epochs": lambda work: work.ppo(4),
    "ppo 1 epoch, own critic": lambda work: work.ppo(1, critic=True),
    "ppo 4 epochs, own critic": lambda work: work.ppo(4, critic=True),
    "ppo 1 epoch, compiled": lambda work: work.ppo(1, compile=True),
    "grpo": lambda work: work.grouped(GRPO, GRPOConfig),
    "grpo, compiled": lambda work: work.grouped(GRPO, GRPOConfig, compile=True),
    "rloo": lambda work: work.grouped(RLOO, RLOOConfig),
}
COMPILED = tuple(name for name in WAYS if name.endswith(", compiled"))  # need a C++ compiler, or Triton
