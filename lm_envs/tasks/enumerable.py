"""A task whose every response can be enumerated, so that the optimum is known to machine precision.

It has five tokens and EOS, a horizon of five and four prompts: 781 prefixes and 3,906 sequences per prompt. The
reference, a transformers model in float64, is a table of logits per prompt and prefix; the reward is a table per prompt
and sequence. Both are given or drawn from the seed. :class:`lm_envs.exact.solver.Exact` solves the task.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tokenizers
import torch
from annotated_types import Interval
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from lm_envs import rng
from lm_envs.data.splits import SPLITS
from lm_envs.settings import NonNegative, Seed, Settings, Size, make
from lm_envs.tasks.base import TextTask

EOS = "<eos>"
MAX_SEQUENCES = 2_000_000
_NOISE = 0.5  # standard deviation of the part of a reward that its tokens do not explain, before scaling
_LOGITS, _WEIGHTS, _NOISES = 0, 1, 2  # which of the tables a counted number is for


class PrefixTree:
    """Numbers for all texts over V tokens, EOS included, up to a horizon of T tokens.

    With n = V - 1 tokens besides EOS, whose ids in order have the ranks 0 .. n-1, the empty text has the number 0 and
    ``f(a_1 .. a_k) = n f(a_1 .. a_{k-1}) + 1 + a_k``, as in a heap: by length, then lexicographically. A text shorter
    than T is a **prefix**, a state in which a token is chosen; there are ``S = (n^T - 1) / (n - 1)``. A **sequence** is
    what an episode can end with: a prefix and EOS, which has the prefix's number, or T tokens without EOS, which have
    the numbers from S on; there are ``S + n^T``.

    Attributes:
        arity: n.
        prefixes, sequences: how many there are.

    Raises:
        ValueError: an argument out of range, or more than :data:`MAX_SEQUENCES` sequences.
    """

    def __init__(self, vocab_size: int, eos_token_id: int, horizon: int) -> None:
        if vocab_size < 3 or not 0 <= eos_token_id < vocab_size:
            found = f"got {vocab_size} tokens with EOS {eos_token_id}"
            raise ValueError(f"a prefix tree needs two tokens besides EOS, and EOS among them, {found}")
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        self.vocab_size, self.eos_token_id, self.horizon = vocab_size, eos_token_id, horizon
        self.arity = vocab_size - 1
        self.prefixes = sum(self.arity**k for k in range(horizon))
        self.sequences = self.prefixes + self.arity**horizon
        if self.sequences > MAX_SEQUENCES:
            raise ValueError(
                f"{self.arity} tokens and a horizon of {horizon} make {self.sequences:,} sequences, more than the "
                f"{MAX_SEQUENCES:,} that are enumerated: use fewer tokens or a shorter horizon"
            )
        self.tokens = torch.tensor([i for i in range(vocab_size) if i != eos_token_id])
        """``(n,)`` int64, token ids by rank."""

    def level(self, length: int) -> slice:
        """Return the numbers of the texts of a length."""
        start = sum(self.arity**k for k in range(length))
        return slice(start, start + self.arity**length)

    def states(self, response: Tensor) -> Tensor:
        """Return the prefix before each token, and the text after the last.

        Args:
            response: ``(..., t)`` int64, right-padded with -1, at most T tokens, EOS included.

        Returns:
            ``(..., t + 1)`` int64; padding and EOS change nothing, so the last column is the sequence's number.
        """
        text = (response >= 0) & (response != self.eos_token_id)
        rank = response - (response > self.eos_token_id).long()
        state = response.new_zeros(response.shape[:-1])
        columns = [state]
        for t in range(response.shape[-1]):
            state = torch.where(text[..., t], state * self.arity + 1 + rank[..., t], state)
            columns.append(state)
        return torch.stack(columns, dim=-1)

    def texts(self) -> Tensor:
        """Return ``(sequences, T)`` int64: the tokens of every text, without EOS, right-padded with -1."""
        parts = []
        for length in range(self.horizon + 1):
            place = torch.arange(self.arity**length)
            digits = [place // self.arity ** (length - 1 - t) % self.arity for t in range(length)]
            level = torch.full((len(place), self.horizon), -1)
            if digits:
                level[:, :length] = self.tokens[torch.stack(digits, dim=1)]
            parts.append(level)
        return torch.cat(parts)

    def responses(self) -> Tensor:
        """Return ``(sequences, T)`` int64: the same with the EOS that a sequence ends in."""
        found = self.texts()
        rows = torch.arange(self.prefixes)
        found[rows, (found[: self.prefixes] >= 0).sum(dim=1)] = self.eos_token_id
        return found


@dataclass(frozen=True)
class EnumerableConfig(Settings):
    """The sizes of the task, and the seed of its tables.

    Attributes:
        tokens: n, without EOS; they are called a, b, c, ...
        horizon: T, the most tokens of a response, EOS included.
        prompts: how many; every split has all of them.
        kl_coef: beta, in units of the reward (standard deviation near 1) per nat.
        seed: of the tables that are not given. Draws differ in difficulty: the optimum of the default is 3.1 nats from
            the reference, and a table learns it sooner than most of its neighbors.
    """

    tokens: Annotated[int, Interval(ge=2, le=len(string.ascii_lowercase))] = 5
    horizon: Size = 5
    prompts: Size = 4
    kl_coef: NonNegative = 0.3
    seed: Seed = 1

    @property
    def tree(self) -> PrefixTree:
        """The numbering of prefixes and sequences; EOS is the last token id."""
        return PrefixTree(self.tokens + 1, self.tokens, self.horizon)

    @property
    def prompt_length(self) -> int:
        """Tokens per prompt: the digits of its number to the base ``tokens``."""
        return next(length for length in range(1, 64) if self.tokens**length >= self.prompts)


def load(logits: ArrayLike | None = None, rewards: ArrayLike | None = None, **options: Any) -> TextTask:
    """Make the task.

    Args:
        logits: ``(prompts, prefixes, tokens + 1)`` of the reference, finite, EOS last, in the order of
            :class:`PrefixTree`. None draws standard normal ones.
        rewards: ``(prompts, sequences)``, finite. None draws them by :func:`draw_rewards`.
        options: fields of :class:`EnumerableConfig`.

    Raises:
        ValueError: a wrong option, or a table of another shape or with a number that is not finite.
    """
    config = make(EnumerableConfig, options, "enumerable")
    tree = config.tree
    shape = (config.prompts, tree.prefixes, tree.vocab_size)
    table = _normal(config.seed, _LOGITS, shape) if logits is None else _table("logits", logits, shape)
    reference = TableLM(TableLMConfig(tokens=config.tokens, horizon=config.horizon, prompts=config.prompts))
    with torch.no_grad():
        reference.lm_head.weight.copy_(torch.as_tensor(table).reshape(-1, tree.vocab_size).T)
    size = (config.prompts, tree.sequences)
    score = draw_rewards(config, table) if rewards is None else _table("rewards", rewards, size)
    tokenizer = make_tokenizer(config.tokens)
    prompts = [encode_prompt(i, config) for i in range(config.prompts)]
    reward = TableReward(score, tokenizer.batch_decode(prompts), tree)
    return TextTask(
        name="enumerable",
        tokenizer=tokenizer,
        reference=reference,
        prompts={split: [list(prompt) for prompt in prompts] for split in SPLITS},
        reward=reward,
        judge=reward,
        eos_token_id=tree.eos_token_id,
        max_new_tokens=config.horizon,
        kl_coef=config.kl_coef,
        description=(
            f"exactly solvable: {config.tokens} tokens, horizon {config.horizon}, {config.prompts} prompts, "
            f"{tree.sequences:,} sequences each"
        ),
        stats={"prefixes": tree.prefixes, "sequences": tree.sequences},
    )


def _normal(seed: int, table: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normal numbers; each depends on the seed, the table and its place alone."""
    uniform = rng.uniform(seed, rng.TABLE, table, np.arange(math.prod(shape)))
    # Half a step up: the numbers lie in [0, 1), and 0 would be -inf.
    return torch.special.ndtri(torch.as_tensor(uniform + 2.0**-54)).numpy().reshape(shape)


def draw_rewards(config: EnumerableConfig, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw ``(prompts, sequences)``: the sum of a sequence's weights, a standard normal one per prompt and token (EOS
    included), plus noise. Under the reference the mean is 0 and the variance among the responses to a prompt is 1 on
    average; prompts differ in their mean."""
    tree = config.tree
    weights = _normal(config.seed, _WEIGHTS, (config.prompts, tree.vocab_size))
    noise = _normal(config.seed, _NOISES, (config.prompts, tree.sequences))
    responses = tree.responses()
    raw = np.where(responses >= 0, weights[:, responses.clamp(min=0)], 0.0).sum(axis=2) + _NOISE * noise
    log_p = torch.as_tensor(logits).log_softmax(dim=2)[:, tree.states(responses)[:, :-1], responses.clamp(min=0)]
    p = torch.where(responses >= 0, log_p, 0.0).sum(dim=2).exp().numpy()
    means = (p * raw).sum(axis=1, keepdims=True)
    return (raw - means.mean()) / np.sqrt((p * (raw - means) ** 2).sum(axis=1).mean())


def _table(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    table = np.array(values, dtype=np.float64)
    if table.shape != shape:
        raise ValueError(f"enumerable: {name} must have shape {shape} at these sizes, got {table.shape}")
    if not np.isfinite(table).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(table))[0])
        raise ValueError(f"enumerable: {name} must be finite, and {place} holds {table[place]}")
    return table


def encode_prompt(number: int, config: EnumerableConfig) -> list[int]:
    """Return a prompt's tokens: its number to the base ``tokens``, the highest digit first."""
    return [number // config.tokens**k % config.tokens for k in reversed(range(config.prompt_length))]


def make_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words a, b, c, ... with spaces between them; EOS comes last and pads."""
    words = [*string.ascii_lowercase[:tokens], EOS]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=EOS)


class TableReward:
    """A reward ``(prompts, sequences)`` looked up by a prompt's text and a sequence's number."""

    __name__ = "table"

    def __init__(self, table: NDArray[np.float64], prompts: Sequence[str], tree: PrefixTree) -> None:
        self.table, self.tree = table, tree
        self._row = {text: i for i, text in enumerate(prompts)}

    def __call__(
        self, *, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]] = (), **columns: Any
    ) -> NDArray[np.float64]:
        """Return ``(N,)`` float64, from the ids alone.

        Raises:
            ValueError: no ids, a prompt that is not one of the task's, or a completion longer than the horizon.
        """
        if len(completion_ids) != len(prompts):
            raise ValueError(f"the table needs completion_ids: got {len(completion_ids)} for {len(prompts)} prompts")
        unknown = next((text for text in prompts if text not in self._row), None)
        if unknown is not None:
            raise ValueError(f"the table has no prompt {unknown!r}; it has {', '.join(map(repr, self._row))}")
        lengths = np.array([len(ids) for ids in completion_ids], dtype=np.int64)
        if (lengths > self.tree.horizon).any():
            i = int(lengths.argmax())
            raise ValueError(f"completion {i} has {lengths[i]} tokens, more than the horizon {self.tree.horizon}")
        response = np.full((len(lengths), self.tree.horizon), -1, dtype=np.int64)
        flat = itertools.chain.from_iterable(completion_ids)
        response[np.arange(self.tree.horizon) < lengths[:, None]] = np.fromiter(flat, np.int64, int(lengths.sum()))
        rows = np.array([self._row[text] for text in prompts], dtype=np.int64)
        return self.table[rows, self.tree.states(torch.as_tensor(response))[:, -1].numpy()]


class TableLMConfig(PreTrainedConfig):
    """Sizes of a :class:`TableLM`; as in :class:`EnumerableConfig`."""

    model_type = "lm_envs_table"

    def __init__(self, tokens: int = 5, horizon: int = 5, prompts: int = 4, **arguments: Any) -> None:
        self.tokens, self.horizon, self.prompts = tokens, horizon, prompts
        self.vocab_size = tokens + 1
        self.max_position_embeddings = self.sizes.prompt_length + horizon
        arguments = {"eos_token_id": tokens, "pad_token_id": tokens, "dtype": "float64", **arguments}
        super().__init__(**arguments)

    @property
    def sizes(self) -> EnumerableConfig:
        """The task's sizes."""
        return EnumerableConfig(tokens=self.tokens, horizon=self.horizon, prompts=self.prompts)


class TableLM(PreTrainedModel):
    """A causal language model that is a table: a row of float64 logits per prompt and prefix, without a cache.

    Its hidden states are one-hot features of (prompt, prefix), so a linear head on them, such as the value head of
    :class:`~lm_envs.algos.policies.language_model.LMPolicy`, is a table too.
    """

    config_class = TableLMConfig
    main_input_name = "input_ids"
    _lm_envs_recompute = True  # lm_envs.model.kv_cache.RECOMPUTE: looking a row up again costs nothing

    def __init__(self, config: TableLMConfig) -> None:
        super().__init__(config)
        self._sizes, self._tree = config.sizes, config.sizes.tree
        states = self._sizes.prompts * self._tree.prefixes
        self.lm_head = nn.Linear(states, self._tree.vocab_size, bias=False, dtype=torch.float64)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)  # uniform

    def get_output_embeddings(self) -> nn.Module:
        """The table, ``(V, prompts * prefixes)``."""
        return self.lm_head

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return each position's row of the table, ``(B, L)``, and whether it has one, ``(B, L)`` bool.

        A position within the prompt, in the padding, or behind the horizon or EOS has none.
        """
        length, n = self._sizes.prompt_length, self._sizes.tokens
        real = attention_mask > 0
        place = attention_mask.cumsum(dim=1)  # 1 at the first token
        asks = real & (place <= length)
        prompt = (input_ids.where(asks, 0) * n ** (length - place).clamp(min=0)).cumsum(dim=1)
        state = self._tree.states(input_ids.where(real & ~asks, -1))[:, 1:]
        known = real & (place >= length) & (place < length + self._sizes.horizon) & (prompt < self._sizes.prompts)
        known &= (real & (input_ids >= n)).cumsum(dim=1) == 0
        return (prompt * self._tree.prefixes + state).masked_fill(~known, 0), known

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        **unused: Any,
    ) -> CausalLMOutput:
        """Return logits ``(B, L, V)`` float64, or those of the last ``logits_to_keep`` positions; 0 where
        :meth:`states` finds no row. Hidden states ``(B, L, prompts * prefixes)`` are one-hot."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows, known = self.states(input_ids, attention_mask)
        rows, known = rows[:, -logits_to_keep:], known[:, -logits_to_keep:]
        # Looking a row up is the product with a one-hot state, which is made only if it is requested.
        if not output_hidden_states and not self.lm_head._forward_pre_hooks:
            return CausalLMOutput(logits=self.lm_head.weight.T[rows].masked_fill(~known.unsqueeze(-1), 0.0))
        weight = self.lm_head.weight
        one_hot = torch.zeros(*rows.shape, self.lm_head.in_features, dtype=weight.dtype, device=weight.device)
        one_hot.scatter_(2, rows.unsqueeze(-1), known.unsqueeze(-1).to(weight.dtype))
        return CausalLMOutput(logits=self.lm_head(one_hot), hidden_states=(one_hot,) if output_hidden_states else None)
