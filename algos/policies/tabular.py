"""A tabular policy for text environments that can be enumerated: a row of logits and a value per prompt and prefix."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_envs.algos.policies.base import Evaluation, Face, Policy
from lm_envs.algos.policies.reward_tokens import without_tokens
from lm_envs.exact.solver import Exact
from lm_envs.kernels.logprob_kl import log_softmax, logprob_kl
from lm_envs.model.decoding import sample
from lm_envs.trajectories import Trajectories


class TabularPolicy(Policy):
    """The policy without a function class: what it cannot learn is the algorithm's doing. Float64.

    Args:
        exact: of the environment; gives prompts, prefixes and masks.
        table: ``(X, S, V)`` log-probabilities or logits to start from, at the environment's temperature; None is the
            reference. Masked tokens stay without probability.
        face: "mdp", a token per action, or "bandit", a response per action.
        value_scale: ratio of values to their parameters. Adam's steps are of the size of the learning rate, for
            logits and values alike; with a larger scale the critic learns its level before the policy has moved far.

    Raises:
        ValueError: a table of another shape, or one that is infinite or NaN where a token is allowed.
    """

    sequence_obs = True
    prompts: Tensor
    forbidden: Tensor

    def __init__(self, exact: Exact, table: Tensor | None = None, face: Face = "mdp", value_scale: float = 1.0) -> None:
        super().__init__()
        if face not in ("mdp", "bandit"):
            raise ValueError(f"face must be 'mdp' or 'bandit', got {face!r}")
        self.tree, self.face, self.value_scale = exact.tree, face, value_scale
        self.uniforms_per_response = exact.tree.horizon
        self.uniforms_per_action = exact.tree.horizon if face == "bandit" else 1
        forbidden = exact.log_ref == -math.inf
        start = exact.table(exact.log_ref if table is None else table).detach().masked_fill(forbidden, 0.0)
        if not bool(start.isfinite().all()):
            raise ValueError("TabularPolicy starts from finite log-probabilities: it could not learn tokens at -inf")
        self.register_buffer("prompts", exact.prompts.clone())
        self.register_buffer("forbidden", forbidden.flatten(0, 1))
        self.logits = nn.Parameter(start.double().flatten(0, 1).clone())
        self.value = nn.Parameter(torch.zeros(len(self.logits), dtype=torch.float64))
        self.token_logits: nn.Parameter | None = None

    def add_reward_tokens(self, count: int) -> None:
        """Each token has a table of its own that starts as the policy is; values are those of the prompt without it."""
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

    @torch.no_grad()
    def act(self, obs: NDArray[Any], uniforms: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        rows = torch.as_tensor(obs, device=self.logits.device)
        numbers = torch.as_tensor(uniforms, device=self.logits.device)
        prompt, response = rows.split([self.prompts.shape[1], rows.shape[1] - self.prompts.shape[1]], dim=1)
        if self.face == "bandit":
            whole, logprob = self.respond(prompt, numbers)
            actions = torch.where(whole < 0, self.tree.eos_token_id, whole)
            return actions.cpu().numpy(), logprob.sum(dim=1).cpu().numpy()
        place = self._first_row(prompt) + self.tree.states(response)[:, -1]
        tokens, logprob = sample(self._masked()[place], numbers)
        return tokens.cpu().numpy(), logprob.cpu().numpy()

    @torch.no_grad()
    def respond(self, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        count, steps = len(prompts), self.tree.horizon
        table, first = self._masked(), self._first_row(prompts.to(self.logits.device))
        response = torch.full((count, steps), -1, device=first.device)
        logprob = torch.zeros(count, steps, dtype=torch.float64, device=first.device)
        active, state = torch.arange(count, device=first.device), torch.zeros_like(first)
        numbers = uniforms.to(first.device)
        for t in range(steps):
            tokens, response_logprob = sample(table[first[active] + state], numbers[active, t])
            response[active, t], logprob[active, t] = tokens, response_logprob
            going = tokens != self.tree.eos_token_id
            rank = tokens[going] - (tokens[going] > self.tree.eos_token_id).long()
            active, state = active[going], state[going] * self.tree.arity + 1 + rank
            if not len(active):
                break
        return response, logprob

    def evaluate(self, traj: Trajectories) -> Evaluation:
        """Look up; in a bandit env the value is that of the prompt."""
        if traj.prompt is None or traj.response is None:
            raise ValueError("TabularPolicy.evaluate needs trajectories of text, with prompt and response")
        response = traj.response.to(self.logits.device)
        mask = response >= 0
        first = self._first_row(traj.prompt.to(self.logits.device))
        place = first.unsqueeze(1) + self.tree.states(response)[:, :-1].masked_fill(~mask, 0)
        logits = nn.functional.embedding(place, self._masked())
        found = logprob_kl(logits, None, response.clamp(min=0), mask=mask)
        value = self.value_scale * nn.functional.embedding(place % len(self.value), self.value.unsqueeze(1)).squeeze(2)
        value = torch.where(mask, value, 0.0)
        if traj.is_bandit:
            return Evaluation(
                found.logprob.sum(dim=1, keepdim=True),
                found.entropy.sum(dim=1, keepdim=True),
                nn.functional.pad(value[:, :1], (0, 1)),
            )
        return Evaluation(found.logprob, found.entropy, nn.functional.pad(value, (0, 1)), lambda: log_softmax(logits))
