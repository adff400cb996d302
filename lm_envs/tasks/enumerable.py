"""A task whose every response can be enumerated, so that the optimum is known to machine precision.

Five tokens and EOS, a horizon of five, four prompts: 781 prefixes and 3,906 sequences per prompt. The reference is a
table of logits per prompt and prefix, the reward a table per prompt and sequence; both are given, or drawn from the
seed. :class:`lm_envs.exact.solver.Exact` solves it. The reference is a transformers model in float64, and prompts and
responses are texts, as in any other text environment.
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
from lm_envs.tasks.prefix_tree import PrefixTree

EOS = "<eos>"
_NOISE = 0.5  # standard deviation of the part of a reward that its tokens do not explain, before scaling
_LOGITS, _WEIGHTS, _NOISES = 0, 1, 2  # which of the tables a counted number is for


@dataclass(frozen=True)
class EnumerableConfig(Settings):
    """The sizes of the task, and what its tables are drawn from.

    Attributes:
        tokens: n, besides EOS; they are called a, b, c, ...
        horizon: T, most tokens of a response, EOS included.
        prompts: how many; every split has all of them.
        kl_coef: beta, in units of the reward (standard deviation near 1) per nat.
        seed: of the tables that are not given. Draws differ in how hard they are: the optimum of the default is 3.1
            nats from the reference, and a table learns it sooner than most of its neighbours.
    """

    tokens: Annotated[int, Interval(ge=2, le=len(string.ascii_lowercase))] = 5
    horizon: Size = 5
    prompts: Size = 4
    kl_coef: NonNegative = 0.3
    seed: Seed = 1

    @property
    def tree(self) -> PrefixTree:
        """The numbers of prefixes and sequences; EOS is the last token id."""
        return PrefixTree(self.tokens + 1, self.tokens, self.horizon)

    @property
    def prompt_length(self) -> int:
        """Tokens per prompt: the digits of its number to the base ``tokens``."""
        return next(length for length in range(1, 64) if self.tokens**length >= self.prompts)


def load(logits: ArrayLike | None = None, rewards: ArrayLike | None = None, **options: Any) -> TextTask:
    """The task.

    Args:
        logits: ``(prompts, prefixes, tokens + 1)`` of the reference, finite, EOS last; prefixes as
            :class:`~lm_envs.tasks.prefix_tree.PrefixTree` numbers them. None draws standard normal ones.
        rewards: ``(prompts, sequences)``, finite. None draws them: for each prompt a standard normal weight per token
            (EOS included), summed over the sequence, plus noise; see :func:`draw_rewards`.
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
    """Standard normal numbers, counted: those of a place depend on the seed, the table and the place alone."""
    uniform = rng.uniform(seed, rng.TABLE, table, np.arange(math.prod(shape)))
    # Half a step up: the numbers lie in [0, 1), and 0 would be -inf.
    return torch.special.ndtri(torch.as_tensor(uniform + 2.0**-54)).numpy().reshape(shape)


def draw_rewards(config: EnumerableConfig, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(prompts, sequences)``: weights per token plus noise. Under the reference the mean is 0, and the variance among
    the responses to a prompt 1 on average; prompts differ in their mean, as they do elsewhere."""
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
    """A prompt's tokens: its number to the base ``tokens``, the highest digit first."""
    return [number // config.tokens**k % config.tokens for k in reversed(range(config.prompt_length))]


def make_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """Words a, b, c, ... with spaces between them; EOS comes last and pads."""
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
        """``(N,)`` float64; read are the ids, not the texts.

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
    """A causal language model that is a table: a row of logits per prompt and prefix, float64.

    It is linear in one-hot features of (prompt, prefix), which are its hidden states; so a linear head on them, such
    as :class:`~lm_envs.algos.policies.language_model.LMPolicy`'s value head, is a table too. It keeps no cache.
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
        """Where each position stands: ``(B, L)`` row of the table, and ``(B, L)`` bool, whether it is one.

        A position within the prompt, in the padding, or behind the horizon or EOS has no row.
        """
        length, n = self._sizes.prompt_length, self._sizes.tokens
        place = attention_mask.cumsum(dim=1)  # 1 at the first token
        prompt = torch.zeros_like(input_ids[:, 0])
        state = torch.zeros_like(prompt)
        alive = torch.ones_like(prompt, dtype=torch.bool)
        rows, known = [], []
        for column in range(input_ids.shape[1]):
            token, real = input_ids[:, column], attention_mask[:, column] > 0
            alive = alive & ~(real & (token >= n))
            asks = real & (place[:, column] <= length)
            prompt = torch.where(asks & alive, prompt * n + token, prompt)
            grows = real & ~asks & alive
            state = torch.where(grows, state * n + 1 + token, state)
            alive = alive & (state < self._tree.prefixes) & (prompt < self._sizes.prompts)
            rows.append(prompt * self._tree.prefixes + state)
            known.append(alive & real & (place[:, column] >= length))
        found, valid = torch.stack(rows, dim=1), torch.stack(known, dim=1)
        return found.masked_fill(~valid, 0), valid

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        **unused: Any,
    ) -> CausalLMOutput:
        """Logits ``(B, L, V)`` float64, or of the last ``logits_to_keep`` positions; 0 where there is no row (see
        :meth:`states`). Hidden states ``(B, L, prompts * prefixes)`` are one-hot."""
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
