"""Unmodified Stable-Baselines3 on text: ``PPO(CausalLMActorCriticPolicy, TextVecEnv(env)).learn(...)``.

The observation space describes the text and the start model (:class:`TextSpace`). Actions carry the log-probabilities
they were sampled with (:class:`ToldActions`), so the env charges the exact KL penalty in training and evaluation,
behind wrappers and after loading. Uniform numbers come from torch's generator, which ``PPO(seed=...)`` seeds, because
Stable-Baselines3 does not tell a policy which episode it acts in. Prompts depend only on seed and episode.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from numpy.typing import NDArray
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from lm_envs.algos.other_libraries.network import read_states
from lm_envs.algos.other_libraries.sb3_env import TextSpace, TextSpec, TextVecEnv, ToldActions
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.kernels.logprob_kl import logprob_kl, scaled
from lm_envs.model.decoding import sample

__all__ = [
    "CausalLMActorCriticPolicy",
    "MaskableCausalLMActorCriticPolicy",
    "TextSpace",
    "TextSpec",
    "TextVecEnv",
    "ToldActions",
]


class _SampledTokens(Tensor):
    """Tokens that become :class:`ToldActions` by the ``.cpu().numpy()`` that Stable-Baselines3 calls."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain
    logprob: Tensor

    @classmethod
    def of(cls, tokens: Tensor, logprob: Tensor) -> Self:
        found = tokens.as_subclass(cls)
        found.logprob = logprob
        return found

    def cpu(self, *given: Any, **options: Any) -> Self:
        return self.of(super().cpu(*given, **options), self.logprob.cpu())

    def numpy(self, *given: Any, **options: Any) -> ToldActions:
        found = super().numpy(*given, **options).view(ToldActions)
        found.logprob = self.logprob.detach().double().numpy()
        return found


class _TextActorCritic:
    """A mixin that makes the library's actor-critic classes a causal language model with a value head.

    ``lm`` is the trained :class:`~lm_envs.algos.policies.language_model.LMPolicy`, a copy of the task's model. Stepping
    uses its KV caches; :meth:`evaluate_actions` reads each text that contains the given steps once, so a minibatch of
    the whole buffer (``batch_size = n_steps * n_envs``) costs one forward per episode, and smaller ones more.
    """

    lm: LMPolicy
    takes_masks = False

    def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Any, **options: Any) -> None:
        if not isinstance(observation_space, TextSpace):
            raise TypeError(
                f"{type(self).__name__} needs the observation space of a TextVecEnv, got a "
                f"{type(observation_space).__name__}: wrap the environment in TextVecEnv, and do not wrap observations"
            )
        text = observation_space.text
        if text.is_bandit:
            raise ValueError(f"{type(self).__name__} writes a token per step, so a bandit env does not fit")
        if text.reference_top_k is not None and not self.takes_masks:
            raise ValueError(
                f"reference_top_k={text.reference_top_k} masks actions, which this algorithm does not read: use "
                f"sb3-contrib's MaskablePPO with {__name__}.MaskableCausalLMActorCriticPolicy"
            )
        # The language model replaces the layers that the library would build between features and heads.
        super().__init__(observation_space, action_space, lr_schedule, **options | {"net_arch": []})  # type: ignore[call-arg]

    def _build(self: Any, lr_schedule: Any) -> None:
        text: TextSpec = self.observation_space.text
        self.lm = LMPolicy(
            text.make_model(),
            text.eos_token_id,
            text.prompt_length,
            text.max_new_tokens,
            temperature=text.temperature,
            min_new_tokens=text.min_new_tokens,
        )
        self.lm.value_steps()
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _step(self: Any, obs: Tensor, masks: Any, deterministic: bool) -> tuple[_SampledTokens, Tensor]:
        """Tokens and log-probabilities, ``(N,)``, by the cached forward."""
        logits = _mask(self.lm.next_logits(obs), masks)
        if deterministic:
            tokens = logits.argmax(dim=-1)
            logprob = logprob_kl(logits, None, tokens, temperature=self.lm.temperature).logprob
        else:
            uniforms = torch.rand(len(obs), dtype=torch.float64).to(logits.device)
            tokens, logprob = sample(logits, uniforms, self.lm.temperature)
        return _SampledTokens.of(tokens, logprob), logprob

    @torch.no_grad()
    def forward(
        self: Any, obs: Tensor, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Actions ``(N,)``, values ``(N, 1)`` and log-probabilities ``(N,)``, one cached step."""
        tokens, logprob = self._step(obs, action_masks, deterministic)
        return tokens, self.lm.next_value().unsqueeze(1), logprob

    def _predict(self: Any, observation: Tensor, deterministic: bool = False, action_masks: Any = None) -> Tensor:
        return self._step(observation, action_masks, deterministic)[0]

    def _read(self: Any, obs: Tensor, masks: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(N, V)`` and values ``(N, 1)`` of stored steps, differentiable."""
        logits, values = read_states(self.lm, obs)
        return _mask(logits, masks), values.unsqueeze(1)

    def evaluate_actions(
        self: Any, obs: Tensor, actions: Tensor, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values ``(N, 1)``, log-probabilities and entropies ``(N,)`` of steps, differentiable."""
        logits, values = self._read(obs, action_masks)
        found = logprob_kl(logits, None, actions, temperature=self.lm.temperature)
        return values, found.logprob, found.entropy

    def get_distribution(self: Any, obs: Tensor, action_masks: Any = None) -> Distribution:
        """The distribution of the next token, differentiable."""
        logits, _ = self._read(obs, action_masks)
        return self.action_dist.proba_distribution(action_logits=scaled(logits, self.lm.temperature))

    def predict_values(self: Any, obs: Tensor) -> Tensor:
        """Values ``(N, 1)``; from the cache unless gradients are enabled."""
        if torch.is_grad_enabled():
            return self._read(obs, None)[1]
        self.lm.next_logits(obs)
        return self.lm.next_value().unsqueeze(1)


def _mask(logits: Tensor, masks: Sequence[Any] | NDArray[Any] | Tensor | None) -> Tensor:
    """Logits with -inf where the ``(N, V)`` mask is 0."""
    if masks is None:
        return logits
    allowed = torch.as_tensor(masks, device=logits.device).reshape(logits.shape).bool()
    return logits.masked_fill(~allowed, float("-inf"))


class CausalLMActorCriticPolicy(_TextActorCritic, ActorCriticPolicy):  # type: ignore[misc]  # `self: Any`
    """The policy of PPO, A2C and other algorithms that take an ``ActorCriticPolicy``."""


class MaskableCausalLMActorCriticPolicy(_TextActorCritic, MaskableActorCriticPolicy):  # type: ignore[misc]
    """The policy of sb3-contrib's ``MaskablePPO``, with action masks from the environment (``reference_top_k``).

    The buffer of sb3-contrib keeps a float32 mask of the whole vocabulary for every step: 4 V bytes per token.
    """

    takes_masks = True
