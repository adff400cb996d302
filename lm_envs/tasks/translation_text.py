"""Parallel text of the user's own: reading it, dividing it, and the BLEU of a whole corpus of responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples
from lm_envs.data.splits import divide
from lm_envs.reward.metrics import SentenceBLEU


def read_parallel(path: str | Path) -> list[Example]:
    """Read rows with ``prompt``, ``reference`` (a text, or a list of them) and perhaps ``split``, of any source, as
    examples with the references as completions; each run of white space becomes one space.

    A prompt that occurs again counts once, with all its references. Splits that no row names are divided off by
    :func:`~lm_envs.data.splits.divide`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed row (the message names file and line), or a split without prompts.
    """
    found: list[tuple[str, str]] = []
    references: dict[str, dict[str, None]] = {}
    for example in Examples(path, "parallel"):
        prompt, *texts = (" ".join(str(text).split()) for text in (example.prompt, *example.completions))
        references.setdefault(prompt, {}).update(dict.fromkeys(texts))
        found.append((prompt, example.split))
    return [Example(prompt, tuple(references[prompt]), split=split) for prompt, split in divide(found, path).items()]


class CorpusBLEU(SentenceBLEU):
    """BLEU of whole corpora as papers report it, out of 100, and whether one system's is higher than another's."""

    def gain(
        self,
        ours: Sequence[str],
        theirs: Sequence[str],
        references: Sequence[Sequence[str]],
        samples: int = 1000,
        seed: int = 0,
    ) -> tuple[float, float]:
        """How much higher ours is, and the standard error of that by paired bootstrap (Koehn 2004).

        Corpus BLEU is a function of counts that are summed over sentences, so a resampled test set costs a sum.
        """
        counts = [self._counts(texts, references) for texts in (ours, theirs)]
        generator = np.random.default_rng(seed)
        gains = []
        for _ in range(samples):
            drawn = np.bincount(generator.integers(len(ours), size=len(ours)), minlength=len(ours))
            gains.append(_bleu(drawn @ counts[0]) - _bleu(drawn @ counts[1]))
        return self.corpus(ours, references) - self.corpus(theirs, references), float(np.std(gains, ddof=1))

    def _counts(self, completions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.int64]:
        """``(N, 10)``: matched and all n-grams of orders 1 to 4, lengths of completion and of reference."""
        rows = [
            self._sentence.sentence_score(text, list(known))
            for text, known in zip(completions, references, strict=True)
        ]
        return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])


def _bleu(counts: NDArray[np.int64]) -> float:
    from sacrebleu.metrics import BLEU

    correct, total, (sys_len, ref_len) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return float(BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score)
