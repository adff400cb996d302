"""A causal language model as the network of an actor-critic library: rows of observations in, logits and values out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_envs.decoding import Decoder, forbid_early_eos
from lm_envs.fused import fuse_activations
from lm_envs.kl import text_envs
from lm_envs.observations import NO_TOKEN, head_inputs
from lm_envs.scoring import response_logits
from lm_envs.text_mdp import TextMDP


class LMActorCritic(nn.Module):
    """Logits of the next token and the value of the state, for observations of a text environment.

    A library that trains by single transitions hands over states, and those of one episode are prefixes of each other.
    So a batch of states is computed as few texts: a state that begins another one is read off that one's forward. What
    is left is a forward per episode, if the batch holds whole episodes. Without gradients a batch of ``num_envs`` rows
    is taken for a step of the environment, and rows that grew by one token go through a KV cache. Both change the cost
    and nothing else.

    The logits are those of the distribution that is trained: divided by the environment's temperature, and EOS at -inf
    before ``min_new_tokens``. Dropout stays off in train mode too. The value head is linear on the last hidden state
    and starts at zero.

    Args:
        model: any transformers causal LM; it is trained in place.
        mdp: what is played.
        num_envs: rows that step together.
    """

    def __init__(self, model: PreTrainedModel, mdp: TextMDP, num_envs: int) -> None:
        super().__init__()
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        if vocabulary != mdp.vocab_size:
            raise ValueError(
                f"the model has {vocabulary} output tokens and the environment's actions are {mdp.vocab_size}: they "
                f"must share one vocabulary"
            )
        self.model = fuse_activations(model.eval())
        self.num_envs, self.prompt_length = num_envs, mdp.prompt_length
        self.eos_token_id, self.min_new_tokens, self.temperature = mdp.eos_token_id, mdp.min_new_tokens, mdp.temperature
        width = model.get_output_embeddings().weight.shape[1]
        width = getattr(model.config.get_text_config(), "hidden_size", width)
        self.value_head = nn.Linear(width, 1, dtype=model.dtype, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._decoder, self._version = Decoder(model), -1

    @classmethod
    def for_env(cls, env: Any, model: PreTrainedModel | None = None) -> LMActorCritic:
        """The network for an environment: wrapped or not, single, vector or a ``SyncVectorEnv``.

        Args:
            model: None takes a copy of the task's own start.

        Raises:
            TypeError: ``env`` holds no text environment.
            ValueError: the bandit face, whose action is a whole response, or a model of another vocabulary.
        """
        inner = text_envs(env)
        if not inner:
            raise TypeError(f"{type(env).__name__} holds no text environment that can be reached")
        if inner[0].face != "mdp":
            raise ValueError("an actor-critic over tokens needs the MDP face: ids that do not end in Bandit-v0")
        if model is None:
            model = copy.deepcopy(inner[0].task.start).requires_grad_(True)
        rows = getattr(inner[0], "num_envs", 1) if len(inner) == 1 else len(inner)
        return cls(model, inner[0].mdp, rows)

    def train(self, mode: bool = True) -> LMActorCritic:
        """Dropout would make the ratio of the first update differ from 1: the model stays in eval."""
        self.training = mode
        return self

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate states.

        Args:
            obs: ``(..., P + T)``, whole numbers of any dtype, -1 where there is no token.

        Returns:
            logits ``(..., V)`` and values ``(...)``, float32 or the model's dtype if that is wider.
        """
        rows = obs.reshape(-1, obs.shape[-1]).to(device=self.model.device, dtype=torch.int64)
        if not torch.is_grad_enabled() and len(rows) == self.num_envs:
            logits, hidden = self._step(rows)
        else:
            logits, hidden = self._bulk(rows)
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        lengths = (rows[:, self.prompt_length :] >= 0).sum(dim=1)
        logits = forbid_early_eos(logits.to(dtype) / self.temperature, lengths, self.eos_token_id, self.min_new_tokens)
        value = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).to(dtype)
        return logits.reshape(*obs.shape[:-1], -1), value.reshape(obs.shape[:-1])

    def _step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        version = sum(p._version for p in self.model.parameters())
        if version != self._version:  # the weights changed under the cache
            self._decoder.reset()
            self._version = version
        with _hidden_beside_logits(self.model):
            both = self._decoder(rows)
        return both.split([both.shape[1] - self.value_head.in_features, self.value_head.in_features], dim=1)

    def _bulk(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, V)`` logits and ``(N, d)`` hidden states after the last token of each row."""
        texts, index = shared_texts(rows)
        place = (rows[:, self.prompt_length :] >= 0).sum(dim=1)  # how many tokens of the response a state has
        prompt, response = texts.split([self.prompt_length, texts.shape[1] - self.prompt_length], dim=1)
        prompt = prompt[:, int(((prompt >= 0).any(dim=0).cumsum(0) == 0).sum()) :]  # no columns that are empty in all
        longest = int(place.max())
        response = nn.functional.pad(
            response[:, :longest], (0, 1), value=NO_TOKEN
        )  # the state after the last token too
        logits, hidden = response_logits(self.model, prompt, response, hidden=True)
        assert hidden is not None
        return logits[index, place], hidden[index, place]


@contextmanager
def _hidden_beside_logits(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's logits are ``(..., V + d)``: the hidden states that its head reads stand behind them.

    To the decoder that keeps them they are rows, whatever their width.
    """

    def widen(_: nn.Module, __: object, output: Any) -> Any:
        output.logits = torch.cat([output.logits, seen.pop()], dim=-1)
        return output

    with head_inputs(model) as seen:
        watch = model.register_forward_hook(widen)
        try:
            yield
        finally:
            watch.remove()


def shared_texts(obs: Tensor) -> tuple[Tensor, Tensor]:
    """The texts that a batch of states is read off.

    Args:
        obs: ``(N, L)`` int64, -1 where there is no token.

    Returns:
        texts ``(M, L)``, the different rows that begin no other one, and ``(N,)`` int64, which of them each row begins
        or is.
    """
    # In lexicographic order a text stands right before those that it begins.
    texts, index = torch.unique(obs, dim=0, return_inverse=True)
    column = torch.arange(obs.shape[1], device=obs.device)
    end = ((texts >= 0) * column).amax(dim=1, keepdim=True)
    same = (texts[:-1] == texts[1:]) | (column > end[:-1])
    final = torch.ones(len(texts), dtype=torch.bool, device=obs.device)
    final[:-1] = ~same.all(dim=1)
    return texts[final], (final.cumsum(0) - final.long())[index]
