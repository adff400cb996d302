"""A text task: a reference model, its tokenizer, prompts, a training reward and a judge."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_envs.model.kv_cache import RECOMPUTE, no_rows
from lm_envs.model.kv_cache_cross import rows_of
from lm_envs.model.layers import fuse
from lm_envs.reward.base import RESERVED, leaves
from lm_envs.reward.learned import LearnedReward

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_envs.feedback.annotators import Annotator
    from lm_envs.reward.base import AnyReward


@dataclass(frozen=True)
class TextTask:
    """A text-generation task; environments, agents and comparisons read it and never change it.

    Attributes:
        name: the name in results.
        reference: the frozen model that the KL penalty is measured from (the SFT model), in ``eval`` mode.
        prompts: token ids without padding, by split (``"train"``, ``"validation"``, ``"test"``).
        reward: the training reward, usually a learned model and a proxy of the judge.
        judge: the gold reward, for win-rates; None for no win-rates.
        eos_token_id, more_eos_token_ids: the tokens that end a response, several in chat models; may equal the
            tokenizer's pad id.
        max_new_tokens: the horizon.
        min_new_tokens: EOS is masked before that many tokens.
        kl_coef: the environment's default weight of the KL penalty, in score units per nat.
        temperature: of the policy and of the reference.
        description: one line for listings.
        demonstrations: full texts as token ids (prompt, continuation, EOS), for supervised fine-tuning.
        responses: (prompt, response ending in EOS) for prompts of different lengths; replaces ``demonstrations``.
        corpus_metric: a figure of all greedy responses to a split together, for reports, such as
            :class:`~lm_envs.tasks.translation.CorpusBLEU`: ``column`` names the references' column, ``corpus(texts,
            references)`` is the figure, and ``gain(ours, theirs, references)`` a difference and its standard error.
        attempts: responses to each test prompt, by which results have pass@k: a response solves its prompt if the judge
            scores it 1. 0 for no pass@k.
        pairs: (row of ``prompts["train"]``, response, response), two of the reference's responses to that prompt.
            Algorithms that learn from preferences have annotators choose between them, as the task's own learned
            reward did.
        preferred: of each of ``pairs`` whether annotators chose the first, if the task's learned reward follows their
            choices; algorithms that learn from preferences then take these. Empty if they are to ask for choices.
        annotators: simulated ones that compare each test response with the reference's, for the column ``simulated`` of
            results; no method learns from them.
        examples: pairs of prompt and response that the method ``prompted`` shows before a prompt.
        stats: figures about how the task was made, such as the reward model's accuracy, for reports.
        policy: the model that training starts from, None for the reference; it shares the reference's vocabulary.
        columns: other columns of the prompts' data, which rewards receive: by split, then by name, one entry per
            prompt.
        sensitive: prompts and responses may offend: reports show none of them unless asked.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel
    prompts: Mapping[str, list[list[int]]]
    reward: AnyReward
    judge: AnyReward | None
    eos_token_id: int
    max_new_tokens: int
    min_new_tokens: int = 0
    kl_coef: float = 0.0
    temperature: float = 1.0
    description: str = ""
    demonstrations: list[list[int]] = field(default_factory=list)
    responses: list[tuple[list[int], list[int]]] = field(default_factory=list)
    pairs: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    preferred: Sequence[bool] = ()
    annotators: Sequence[Annotator] = ()
    examples: Sequence[tuple[str, str]] = ()
    corpus_metric: Any = None
    attempts: int = 0
    stats: Mapping[str, float] = field(default_factory=dict)
    policy: PreTrainedModel | None = None
    more_eos_token_ids: tuple[int, ...] = ()
    columns: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    sensitive: bool = False

    def __post_init__(self) -> None:
        """Freeze the models, since training uses a copy; raise ValueError for columns that rewards cannot receive."""
        if self.columns:
            self._check_columns()
        fuse(self.reference.eval().requires_grad_(False))
        fuse(self.start.eval().requires_grad_(False))
        for model in {id(model): model for model in (self.reference, self.start)}.values():
            if rows_of(model) is None and not getattr(model, RECOMPUTE, False):
                warnings.warn(f"task {self.name!r}: {no_rows(model)}; it is used anyway", stacklevel=3)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a response."""
        return (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def start(self) -> PreTrainedModel:
        """The model that training starts from; copy it before training."""
        return self.reference if self.policy is None else self.policy

    @property
    def learned(self) -> list[LearnedReward]:
        """The learned rewards of the reward and of the judge."""
        given = [reward for reward in (self.reward, self.judge) if reward is not None]
        return [part for reward in given for part in leaves(reward) if isinstance(part, LearnedReward)]

    @property
    def models(self) -> list[nn.Module]:
        """The models that it holds: reference, start, and those of learned rewards."""
        return list(dict.fromkeys([self.reference, self.start, *(reward.model for reward in self.learned)]))

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt of any split."""
        return max((len(prompt) for prompts in self.prompts.values() for prompt in prompts), default=0)

    def _check_columns(self) -> None:
        names = {split: sorted(columns) for split, columns in self.columns.items()}
        if set(names) != set(self.prompts) or len({tuple(n) for n in names.values()}) > 1:
            raise ValueError(f"task {self.name!r}: every split of the prompts needs the same columns, not {names}")
        for split, columns in self.columns.items():
            for name, values in columns.items():
                if name in RESERVED:
                    raise ValueError(
                        f"task {self.name!r}: rewards receive something else as {name!r}: rename the column"
                    )
                if len(values) != len(self.prompts[split]):
                    wanted = f"{len(self.prompts[split])} prompts of {split}"
                    raise ValueError(f"task {self.name!r}: {len(values)} entries of {name!r} for the {wanted}")
