"""Examples of the user's data as token ids: prompt and completion for a policy, whole texts for a reward model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Rejected
from lm_envs.model.chat import BadExample
from lm_envs.model.text import Codec
from lm_envs.model.tokens import encode_text


@dataclass(frozen=True)
class EncodedExample:
    """An example in token ids, for a policy with an end behind each completion; a reward model's whole texts are
    completions of an empty prompt."""

    example: Example
    prompt: list[int]
    completions: list[list[int]]


def tokenise(
    examples: Iterable[Example],
    codec: Codec,
    rejected: Rejected,
    max_length: int | None = None,
    reward_eos: bool | None = None,
) -> Iterator[EncodedExample]:
    """Encode examples as :meth:`~lm_envs.model.text.Codec.encode` says, in a stream and in order.

    Args:
        rejected: gets what makes no tokens, is too long, or is refused by the chat template.
        max_length: tokens of prompt and completion together; longer ones are bad rows.
        reward_eos: for a reward model, whether an EOS follows its texts (``append_eos`` of
            :func:`~lm_envs.model.tokens.encode_text`). Each completion then is the whole text, as the model reads it
            while a policy with the same tokenizer is trained: prompt and completion in one, without special tokens.

    Raises:
        ValueError: a bad row that is to raise, or messages without a chat template.
    """
    for example in examples:
        try:
            prompt, rows = codec.encode(example.prompt, example.completions)
            if reward_eos is not None:
                texts = map("".join, zip(*codec.decode([prompt] * len(rows), rows), strict=True))
                rows = [encode_text(codec.tokenizer, text, True, append_eos=reward_eos) for text in texts]
                prompt = []
            _check_lengths([prompt + ids for ids in rows] or [prompt], max_length)
        except BadExample as error:
            rejected.add(example.where, str(error))
        else:
            yield EncodedExample(example, prompt, rows)


def _check_lengths(rows: Sequence[Sequence[int]], max_length: int | None) -> None:
    longest = max(map(len, rows))
    if max_length is not None and longest > max_length:
        raise BadExample(f"{longest:,} tokens with the completion, more than the {max_length:,} that fit")
    if not min(map(len, rows)):
        raise BadExample("the tokenizer makes no tokens of it")
