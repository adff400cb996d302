"""A language model as a policy."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_envs.algos.policies.base import Evaluation, TextPolicy, text_evaluation
from lm_envs.algos.policies.reward_tokens import ExtendedEmbedding, prepend
from lm_envs.env.mdp import TextMDP
from lm_envs.kernels.logprob_kl import log_softmax
from lm_envs.model.compiled import FixedRows, check_compilable
from lm_envs.model.decoding import Decoder, forbid_early_eos, generate
from lm_envs.model.forwards import early_eos, many_logits, response_forward
from lm_envs.model.layers import checkpointing, fuse, recomputable
from lm_envs.model.tokens import EosIds, eos_ids
from lm_envs.trajectories import Trajectories

NO_TRUNCATION = (
    "top_k and top_p cannot be used in training: the support they leave moves with the policy, so a sampled token can "
    "have log-probability -inf after an update. Train with temperature and min_new_tokens; truncate in evaluation only"
)


class LMPolicy(TextPolicy):
    """A causal or encoder-decoder language model as a policy, with a value head on the same trunk.

    The trained distribution is the model at one temperature, with EOS masked before ``min_new_tokens``: sampling, the
    stored log-probability and re-evaluation all use it. Dropout stays off. The value head is linear on the last hidden
    state *before* the token and starts at zero.

    Args:
        model: any transformers causal LM, or encoder-decoder: then the encoder reads the prompt.
        eos_token_id: ends a response; or several, any of which does.
        prompt_length: P, the places of the prompt in an observation.
        max_new_tokens: T, the horizon.
        temperature: divides the logits.
        min_new_tokens: EOS is masked before that many tokens.
        bandit: whether an action is a whole response, not a token.
        autocast: run the model's forwards in this lower precision (``torch.bfloat16``); weights and optimizer keep
            theirs, and log-probabilities are then recomputed before an update.
        gradient_checkpointing: keep only each layer's input for backward and compute the layer again there: less
            memory for a third more time. Without it, where a batch's logits are many, a layer's products are kept and
            the rest is computed again.
        compile: decode whole responses in fixed shapes by a program of ``torch.compile`` for each number of rows, which
            takes seconds to minutes to make; see docs/throughput.md.
        top_k, top_p: refused, because the truncated support moves with the policy.
    """

    takes_critic = True

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_id: EosIds,
        prompt_length: int,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        min_new_tokens: int = 0,
        bandit: bool = False,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        if top_k not in (None, 0) or top_p not in (None, 1.0):
            raise ValueError(NO_TRUNCATION)
        ends = eos_ids(eos_token_id)
        super().__init__(bandit, prompt_length, max_new_tokens, ends[0], temperature)
        self.model, self.eos_token_ids = fuse(model.eval()), ends
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.autocast, self.gradient_checkpointing = autocast, gradient_checkpointing
        if gradient_checkpointing and not recomputable(model):
            raise ValueError(f"a {type(model).__name__} has no layers that gradient checkpointing could recompute")
        if compile:
            check_compilable(self.model)
        self._fixed = FixedRows(self.model, max_new_tokens) if compile else None
        width = model.get_output_embeddings().weight.shape[1]  # not always the model's own (OPT projects first)
        precise = torch.promote_types(model.dtype, torch.float32)
        self.value_head = _head_at_zero(width, 1, precise, model.device)
        self.critic: nn.Module | None = None
        self.q_head: nn.Linear | None = None
        self._decoder = Decoder(model, max_new_tokens)
        self._weights: tuple[nn.Parameter, ...] = ()  # those that the decoder's caches were made with
        self._version = -1

    @classmethod
    def for_mdp(cls, mdp: TextMDP, model: PreTrainedModel, *, bandit: bool = False, **options: Any) -> Self:
        """Make the policy that fits a text env: its horizon, temperature and masks; ``options`` are the others.

        Raises:
            ValueError: the model's vocabulary differs from the reference's, or the environment masks by the reference.
        """
        if mdp.reference_top_k is not None:
            raise ValueError(
                "LMPolicy does not read action masks, which reference_top_k needs: train with "
                "lm_envs.algos.other_libraries.sb3.MaskableCausalLMActorCriticPolicy, or without reference_top_k"
            )
        width = int(model.get_output_embeddings().weight.shape[0])
        if width != mdp.vocab_size:
            raise ValueError(
                f"the policy has {width} output tokens and the reference {mdp.vocab_size}: they must share one "
                f"vocabulary"
            )
        return cls(
            model,
            mdp.eos_token_ids,
            mdp.prompt_length,
            mdp.max_new_tokens,
            temperature=mdp.temperature,
            min_new_tokens=mdp.min_new_tokens,
            bandit=bandit,
            **options,
        )

    def use_q_critic(self) -> None:
        """Learn ``Q(s, .)`` by a linear head on the same trunk, which starts at zero."""
        if self.bandit:
            raise ValueError("a Q critic needs an MDP env: in a bandit env there are V**T actions")
        if self.q_head is None:
            outputs, weight = self.model.get_output_embeddings().weight.shape[0], self.value_head.weight
            self.q_head = _head_at_zero(weight.shape[1], outputs, weight.dtype, weight.device)

    def add_reward_tokens(self, count: int) -> None:
        embedding = ExtendedEmbedding(self.model.get_input_embeddings(), count)
        self.model.set_input_embeddings(embedding)
        self.reward_tokens, self.condition = count, torch.tensor(-1)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _conditioned(self, prompt: Tensor) -> Tensor:
        token = -1 if self.condition is None else int(self.condition)
        if token < 0 or bool((prompt >= self.vocabulary).any()):
            return prompt
        return prepend(prompt, self.vocabulary + token)

    def critic_of_its_own(self, critic: nn.Module) -> None:
        self.critic = critic

    @property
    def has_own_critic(self) -> bool:  # type: ignore[override]
        return self.critic is not None

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: dropout would make the ratio of the first update differ from 1."""
        return super().train(False)

    def next_logits(self, rows: Tensor) -> Tensor:
        """As :class:`TextPolicy`'s; rows that grew by a token since the last call take one cached step."""
        version = sum(p._version for p in self._weights)
        if version != self._version:  # the weights changed under the cache
            self._weights = tuple(self.model.parameters())
            version = sum(p._version for p in self._weights)
            self._decoder.reset()
            self._version = version
        position = (rows[:, self.prompt_length :] >= 0).sum(dim=1)
        if self.condition is not None:
            rows = torch.cat([self._conditioned(rows[:, : self.prompt_length]), rows[:, self.prompt_length :]], dim=1)
        with self._precision():
            logits = self._decoder(rows)
        # In place, though the decoder keeps them: a row that stands still stays at its position, and under its mask.
        return forbid_early_eos(logits, position, self.eos_token_ids, self.min_new_tokens, in_place=True)

    def value_steps(self) -> None:
        """Let :meth:`next_logits` keep what :meth:`next_value` reads."""
        self._decoder = Decoder(self.model, self.max_new_tokens, hidden=True)

    @torch.no_grad()
    def next_value(self) -> Tensor:
        """``(N,)`` the value head's estimates before the tokens that the last :meth:`next_logits` was asked for.

        Raises:
            RuntimeError: :meth:`value_steps` was not called before it.
        """
        return self.value_head(self._decoder.hidden.to(self.value_head.weight.dtype)).squeeze(-1)

    def respond(self, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        return self._generate(prompts, uniforms)

    def _generate(
        self, prompts: Tensor, uniforms: Tensor, observe: Callable[[int, Tensor, Tensor], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        with self._precision():
            return generate(
                self.model,
                self._conditioned(prompts.to(self.model.device)),
                uniforms.to(self.model.device),
                self.eos_token_ids,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                min_new_tokens=self.min_new_tokens,
                observe=observe,
                fixed=self._fixed,
            )

    @property
    def keeps_logprob(self) -> bool:  # type: ignore[override]
        """Not where rounding is coarse."""
        return self.model.dtype in (torch.float32, torch.float64) and self.autocast is None

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    @torch.no_grad()
    def answer(self, index: Tensor, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Respond with the value head's estimates, which cost nothing: the hidden states are there."""
        if self.critic is not None or self.q_head is not None or not self.keeps_logprob:
            return *self._generate(prompts, uniforms), None
        value = torch.zeros(
            len(prompts), self.max_new_tokens, dtype=self.value_head.weight.dtype, device=self.model.device
        )

        def observe(t: int, rows: Tensor, hidden: Tensor) -> None:
            value[rows, t] = self.value_head(hidden).squeeze(-1)

        return *self._generate(prompts, uniforms, observe), value

    def evaluate(self, traj: Trajectories) -> Evaluation:
        prompt, response = self.texts(traj)
        prompt, mask = self._conditioned(prompt), response >= 0
        spare = torch.is_grad_enabled() and (self.gradient_checkpointing or many_logits(self.model, response))
        keep = not self.gradient_checkpointing
        with self._precision(), checkpointing(self.model, keep_products=keep) if spare else nullcontext():
            exclude = early_eos(response.shape[1], self.eos_token_ids, self.min_new_tokens)
            forward = response_forward(self.model, prompt, response, exclude)
        states = forward.hidden.to(self.value_head.weight.dtype)
        found = forward.logprob(response.clamp(min=0), temperature=self.temperature, mask=mask)
        q = None if self.q_head is None else self.q_head(states).to(found.logprob.dtype)
        if q is not None:
            p = log_softmax(forward.logits().detach(), self.temperature).exp()
            value = torch.where(p > 0, p * q, torch.zeros_like(q)).sum(-1)
        else:
            value = self.critic(prompt, response) if self.critic is not None else self.value_head(states).squeeze(-1)
        value = value.to(found.logprob.dtype)
        value = torch.where(mask, value, torch.zeros_like(value))
        every_q = None if q is None else lambda: q
        return text_evaluation(traj, found, value, lambda: log_softmax(forward.logits(), self.temperature), every_q)

    def critic_values(self, traj: Trajectories) -> Tensor:
        if self.critic is None:
            return super().critic_values(traj)
        prompt, response = self.texts(traj)
        value = self.critic(self._conditioned(prompt), response).to(self.value_head.weight.dtype)
        value = value.masked_fill(response < 0, 0.0)
        return nn.functional.pad(value[:, :1] if traj.is_bandit else value, (0, 1))


def _head_at_zero(width: int, outputs: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    head = nn.Linear(width, outputs, dtype=dtype, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
