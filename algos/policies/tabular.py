"""A tabular policy for text envs that can be enumerated: a row of logits and a value per prompt and prefix."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lm_envs.algos.policies.base import Evaluation, TextPolicy, text_evaluation
from lm_envs.algos.policies.reward_tokens import without_tokens
from lm_envs.exact.solver import Exact
from lm_envs.kernels.logprob_kl import log_softmax, logprob_kl
from lm_envs.model.decoding import sample
from lm_envs.trajectories import Trajectories


class TabularPolicy(TextPolicy):
    """A policy that can represent every distribution, so that what it does not learn is the algorithm's doing. Float64.

    Args:
        exact: of the environment; gives prompts, prefixes and masks.
        table: ``(X, S, V)`` log-probabilities or logits to start from, at the environment's temperature; None is the
            reference. Masked tokens stay without probability.
        bandit: whether an action is a whole response, not a token.
        value_scale: ratio of values to their parameters, because Adam's steps have the size of the learning rate; with
            a larger scale the critic learns its level before the policy has moved far.

    Attributes:
        sampler: what it samples from, logits ``(N, V)`` as a function of its own, to plant a mismatch between sampler
            and policy; None is the policy itself.

    Raises:
        ValueError: a table of another shape, or one that is infinite or NaN where a token is allowed.
    """

    prompts: Tensor
    forbidden: Tensor

    def __init__(
        self, exact: Exact, table: Tensor | None = None, *, bandit: bool = False, value_scale: float = 1.0
    ) -> None:
        super().__init__(bandit, exact.prompts.shape[1], exact.tree.horizon, exact.tree.eos_token_id)
        self.tree, self.value_scale = exact.tree, value_scale
        forbidden = exact.log_ref == -math.inf
        start = exact.table(exact.log_ref if table is None else table).detach().masked_fill(forbidden, 0.0)
        if not bool(start.isfinite().all()):
            raise ValueError("TabularPolicy starts from finite log-probabilities: it could not learn tokens at -inf")
        self.register_buffer("prompts", exact.prompts.clone())
        self.register_buffer("forbidden", forbidden.flatten(0, 1))
        self.logits = nn.Parameter(start.double().flatten(0, 1).clone())
        self.value = nn.Parameter(torch.zeros(len(self.logits), dtype=torch.float64))
        self.token_logits: nn.Parameter | None = None
        self.sampler: Callable[[Tensor], Tensor] | None = None

    def add_reward_tokens(self, count: int) -> None:
        """Give each token a table of its own that starts as the policy is; values are those of the plain prompt."""
        self.token_logits = nn.Parameter(self.logits.detach().repeat(count, 1))
        self.reward_tokens, self.condition = count, torch.tensor(-1)

    @property
    def vocabulary(self) -> int:
        return self.tree.vocab_size

    def _masked(self) -> Tensor:
        """``(X * S, V)`` logits, -inf where a token is masked; those of reward tokens follow behind them."""
        plain = self.logits.masked_fill(self.forbidden, -math.inf)
        if self.token_logits is None:
            return plain
        added = self.token_logits.unflatten(0, (-1, len(plain))).masked_fill(self.forbidden, -math.inf)
        return torch.cat([plain, added.flatten(0, 1)])

    def _sampled(self) -> Tensor:
        return self._masked() if self.sampler is None else self.sampler(self._masked())

    def log_probs(self) -> Tensor:
        """``(X, S, V)``, the table that :class:`~lm_envs.exact.solver.Exact` reads; differentiable."""
        block = 0 if self.condition is None else int(self.condition) + 1
        table = self._masked().unflatten(0, (-1, len(self.logits)))[block]
        return table.log_softmax(dim=1).unflatten(0, (len(self.prompts), -1))

    def _first_row(self, prompt: Tensor) -> Tensor:
        """``(N,)`` where each prompt's rows of the table begin."""
        if self.condition is None:
            return self._row_of(prompt)
        token = (prompt - self.vocabulary).amax(dim=1)
        block = torch.where(token < 0, self.condition, token) + 1
        return block * len(self.logits) + self._row_of(without_tokens(prompt, self.vocabulary))

    def _row_of(self, prompt: Tensor) -> Tensor:
        more = prompt.shape[1] - self.prompts.shape[1]  # places to the left, where a reward token was
        same = (prompt.unsqueeze(1) == nn.functional.pad(self.prompts, (more, 0), value=-1)).all(dim=2)
        if not bool(same.any(dim=1).all()):
            row = int((~same.any(dim=1)).nonzero()[0])
            raise ValueError(f"row {row} has the prompt {prompt[row].tolist()}, which the table does not have")
        return same.int().argmax(dim=1) * self.tree.prefixes

    def next_logits(self, rows: Tensor) -> Tensor:
        prompt, response = rows[:, : self.prompt_length], rows[:, self.prompt_length :]
        return self._sampled()[self._first_row(prompt) + self.tree.states(response)[:, -1]]

    @torch.no_grad()
    def respond(self, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        count, steps = len(prompts), self.tree.horizon
        table, first = self._sampled(), self._first_row(prompts.to(self.logits.device))
        response = torch.full((count, steps), -1, device=first.device)
        logprob = torch.zeros(count, steps, dtype=torch.float64, device=first.device)
        active, state = torch.arange(count, device=first.device), torch.zeros_like(first)
        numbers = uniforms.to(first.device)
        for t in range(steps):
            tokens, response_logprob = sample(table[first[active] + state], numbers[active, t], self.temperature)
            response[active, t], logprob[active, t] = tokens, response_logprob
            going = tokens != self.tree.eos_token_id
            rank = tokens[going] - (tokens[going] > self.tree.eos_token_id).long()
            active, state = active[going], state[going] * self.tree.arity + 1 + rank
            if not len(active):
                break
        return response, logprob

    def evaluate(self, traj: Trajectories) -> Evaluation:
        """Look rows up; in a bandit env the value is that of the prompt."""
        prompt, response = self.texts(traj)
        mask, first = response >= 0, self._first_row(prompt)
        place = first.unsqueeze(1) + self.tree.states(response)[:, :-1].masked_fill(~mask, 0)
        logits = nn.functional.embedding(place, self._masked())
        found = logprob_kl(logits, None, response.clamp(min=0), mask=mask)
        value = self.value_scale * nn.functional.embedding(place % len(self.value), self.value.unsqueeze(1)).squeeze(2)
        value = torch.where(mask, value, 0.0)
        return text_evaluation(traj, found, value, lambda: log_softmax(logits))
