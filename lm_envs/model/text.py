"""The one conversion between text and token ids, for environments, fine-tuning, reward models and evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_envs.model.chat import BadExample, Text, render_messages, split_answer
from lm_envs.model.encoder_decoder import is_encoder_decoder
from lm_envs.model.endings import eos_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Texts before a completion that show its tokens inside a text, if its prompt does not.
_ANCHORS = ("", "\n", ".", ":", "a", "0", "(", "x")
_CHARACTERS = 100  # far more than the tokens of any text have on average


class Codec:
    """The ids of prompts and completions, and the texts of prompts and responses.

    A prompt of text gets the tokens that the tokenizer adds to it, except an EOS, and at most one BOS; special tokens
    written in a prompt or by a chat template are read as such. The encoder of an encoder-decoder also gets the EOS, and
    its responses are separate texts.

    Args:
        tokenizer: of the model; with a chat template if there are messages.
        model: its generation config may name other ends of a response; None for a causal model without one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> None:
        self.tokenizer = tokenizer
        self.apart = model is not None and is_encoder_decoder(model)
        self._model = model
        self._ends: dict[bool, tuple[int, ...]] = {}

    def encode(
        self, prompt: Text, completions: Sequence[Text] = (), most: int | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """Return the ids of a prompt, and those of each completion as a policy that reads these ids has to write it.

        A completion has the ids that it has behind its prompt in one text; if a token would span the boundary, ids that
        decode to the joined text, if any do. It ends at the first token that ends a response, which is added if
        missing.

        Args:
            prompt: a text or chat messages. It is empty for completions that are whole texts; without a BOS, their
                first token then becomes the prompt.
            completions: texts, or one message of the assistant's each.
            most: tokens that fit. A text that is longer by far is refused here, since tokenizing megabytes takes long.

        Raises:
            ValueError: messages without a chat template.
            BadExample: the chat template refuses the conversation, the prompt or a completion has no tokens, or a text
                is far too long.
        """
        chat = not isinstance(prompt, str)
        head, tails = self._written(prompt, completions)
        length = len(head) + max(map(len, tails), default=0)
        if most is not None and length > _CHARACTERS * most:
            raise BadExample(f"{length:,} characters, more than the {most:,} tokens that fit can hold")
        before = self._ids(head)
        lead, behind = self._wrapping
        start = before if chat else self._one_bos([*lead, *before])
        if self.apart and start[-1:] != behind[-1:]:
            start = start + behind
        elif not chat and not self.apart:
            start = start + [token for token in behind if token != self.tokenizer.eos_token_id]
        rows = [self._continuation(head, before, tail) for tail in tails]
        if not prompt and rows and not self.apart:
            whole, first = self._one_bos([*lead, *rows[0]]), max(1, len(lead))
            start, rows = whole[:first], [whole[first:]]
        if not start:
            raise BadExample("the prompt is empty: the tokenizer makes no tokens of it")
        return start, [self._ended(row, self.ends(chat)) for row in rows]

    def decode(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[list[str], list[str]]:
        """Return the texts of prompts and of the responses to them, without special tokens.

        Both are decoded together and cut, because many tokenizers write a space into a word's first token.
        """
        different = list(dict.fromkeys(map(tuple, prompts)))
        known = dict(zip(different, self._texts(different), strict=True))
        heads = [known[tuple(ids)] for ids in prompts]
        if self.apart:
            return heads, self._texts(responses)
        whole = self._texts([[*p, *r] for p, r in zip(prompts, responses, strict=True)])
        # A prompt may decode differently before more text: half a letter, or a quote that cleaning moves.
        pairs = list(zip(heads, whole, strict=True))
        heads = [head if text.startswith(head) else os.path.commonprefix([head, text]) for head, text in pairs]
        return heads, [text[len(head) :] for head, text in zip(heads, whole, strict=True)]

    def ends(self, chat: bool) -> tuple[int, ...]:
        """Return the tokens that end a response to a text or to a chat, the usual one first."""
        if chat not in self._ends:
            self._ends[chat] = eos_tokens(self._model, self.tokenizer, chat=chat)
        return self._ends[chat]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines :meth:`encode`."""
        tokenizer: Any = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        made = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        template = getattr(tokenizer, "chat_template", None)
        parts = [type(tokenizer).__name__, made, template, tokenizer.special_tokens_map, self.apart, self.ends(False)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _written(self, prompt: Text, completions: Sequence[Text]) -> tuple[str, list[str]]:
        """Return prompt and completions as text."""
        if isinstance(prompt, str):
            return prompt, [str(text) for text in completions]
        if not completions:
            return render_messages(self.tokenizer, prompt, add_generation_prompt=True), []
        split = [split_answer(self.tokenizer, prompt, text) for text in completions]  # type: ignore[arg-type]
        return split[0][0], [tail for _, tail in split]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _continuation(self, head: str, before: list[int], tail: str) -> list[int]:
        if self.apart:
            return self._ids(tail)
        whole = self._ids(head + tail)
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        (wanted,) = self._texts([whole])
        for anchor in _ANCHORS:
            lead, found = self._ids(anchor), self._ids(anchor + tail)
            if found[: len(lead)] == lead and self._texts([before + found[len(lead) :]]) == [wanted]:
                return found[len(lead) :]
        return self._ids(tail)

    def _ended(self, row: list[int], ends: tuple[int, ...]) -> list[int]:
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        if not stop:
            raise BadExample("a completion is empty: the tokenizer makes no tokens of it")
        return [*row[:stop], *(row[stop : stop + 1] or ends[:1])]

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Remove a repeated BOS: a text may begin with the one that the tokenizer adds."""
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    @cached_property
    def _wrapping(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer adds before and behind a text."""
        inner, whole = self._ids("a"), list(self.tokenizer("a", verbose=False)["input_ids"])
        place = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
        return whole[:place], whole[place + len(inner) :]

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True) if rows else []
