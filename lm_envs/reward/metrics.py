"""Overlap with reference texts: BLEU and chrF by sacreBLEU, ROUGE by rouge-score.

The references are in a column of the data, by default ``reference``: one text per sample, or a list of correct texts.
As rewards, metrics score sentences in [0, 1]; ``corpus`` returns the figure that papers report. They need
``pip install 'lm-envs[metrics]'``.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal

from lm_envs.settings import one_of

__all__ = ["METRICS", "Rouge", "SentenceBLEU", "SentenceChrF", "TextMetric", "make_metric"]

References = Sequence[str] | Sequence[Sequence[str]]

# Scripts without spaces: kana, Han, Thai, Lao, Myanmar and Khmer.
_SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


class TextMetric:
    """Base of metrics; ``column`` holds the references, ``name`` is the name in messages and results."""

    def __init__(self, column: str, name: str) -> None:
        self.column, self.__name__ = column, name

    def sentence(self, completion: str, references: list[str]) -> float:
        """Score one text, in [0, 1]."""
        raise NotImplementedError

    def _corpus(self, completions: list[str], references: list[list[str]]) -> float:
        return 100 * sum(map(self.sentence, completions, references)) / len(completions)

    def corpus(self, completions: Sequence[str], references: References) -> float:
        """Score N texts with N references (or lists of them) together, as papers do, out of 100; ValueError if there
        are no texts, or their numbers differ."""
        rows = [_as_list(row, self.__name__, i) for i, row in enumerate(references)]
        if len(rows) != len(completions) or not rows:
            raise ValueError(f"{self.__name__}: {len(completions)} texts and {len(rows)} references")
        return self._corpus(list(completions), rows)

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """Score each sample in [0, 1]; None (not applicable) if its reference is None. ValueError if the column is
        missing, or a reference is neither a text nor a list of texts."""
        if self.column not in columns:
            raise ValueError(
                f"reward {self.__name__!r} compares with the column {self.column!r}, which the data lack: give every "
                "prompt one, or name the column that holds the references"
            )
        found: list[float | None] = []  # rounding can carry a perfect text past 1
        for i, (text, given) in enumerate(zip(completions, columns[self.column], strict=True)):
            found.append(None if given is None else min(self.sentence(text, _as_list(given, self.__name__, i)), 1.0))
        return found


class _SacreBLEU(TextMetric):
    """A metric of sacreBLEU, with one object for sentences and one for corpora."""

    def __init__(self, column: str, name: str, metric: Any, whole: Any) -> None:
        super().__init__(column, name)
        self._sentence, self._whole = metric, whole

    def sentence(self, completion: str, references: list[str]) -> float:
        """Score one text, in [0, 1]."""
        return self._sentence.sentence_score(completion, references).score / 100

    def _corpus(self, completions: list[str], references: list[list[str]]) -> float:
        # sacreBLEU takes a list over samples per reference number, with None if a sample has fewer.
        streams = [list(row) for row in itertools.zip_longest(*references)]
        return self._whole.corpus_score(completions, streams).score


class SentenceBLEU(_SacreBLEU):
    """Smoothed sentence-level BLEU (Papineni et al. 2002; Post 2018, arXiv:1804.08771).

    Orders without n-grams in a short text do not count (effective order): a perfect text of two words scores 1.
    ``corpus`` has sacreBLEU's standard settings (exp smoothing, four orders).

    Args:
        column: the column with the references.
        smoothing: for orders without a match: ``"exp"`` (NIST's), ``"floor"``, ``"add-k"`` (Lin and Och 2004 with
            ``smooth_value=1``; counts missing orders as matched) or ``"none"``.
        smooth_value: for ``floor`` and ``add-k``; None is sacreBLEU's (0.1 and 1).
        tokenize: sacreBLEU's tokenizer: ``"13a"``, ``"intl"``, ``"zh"``, ``"char"``, ...
        lowercase: compare without case.

    Raises:
        ImportError: sacreBLEU is not installed.
        ValueError: sacreBLEU does not know an argument.
    """

    def __init__(
        self,
        column: str = "reference",
        smoothing: str = "exp",
        smooth_value: float | None = None,
        tokenize: str = "13a",
        lowercase: bool = False,
    ) -> None:
        BLEU = _sacrebleu().BLEU
        one_of(smoothing, BLEU.SMOOTH_DEFAULTS, "bleu: smoothing")
        one_of(tokenize, BLEU.TOKENIZERS, "bleu: tokenize")
        whole = partial(BLEU, tokenize=tokenize, lowercase=lowercase)
        metric = whole(smooth_method=smoothing, smooth_value=smooth_value, effective_order=True)
        super().__init__(column, "bleu", metric, whole())


class SentenceChrF(_SacreBLEU):
    """Sentence-level chrF (Popović 2015), or chrF++ with ``word_order=2`` (Popović 2017).

    Args:
        column: the column with the references.
        word_order: the longest n-grams of words that count in addition to those of characters.
        lowercase: compare without case.

    Raises:
        ImportError: sacreBLEU is not installed.
        ValueError: ``word_order`` is negative.
    """

    def __init__(self, column: str = "reference", word_order: int = 0, lowercase: bool = False) -> None:
        if word_order < 0:
            raise ValueError(f"chrf: word_order must not be negative, got {word_order}")
        metric = _sacrebleu().CHRF(word_order=word_order, lowercase=lowercase)
        super().__init__(column, "chrf" + "+" * word_order, metric, metric)


class Rouge(TextMetric):
    """ROUGE by rouge-score (Lin 2004), with the best of several references.

    Args:
        kind: ``"rouge1"``, ``"rouge2"``, ... (n-grams), ``"rougeL"`` (longest common subsequence of the text) or
            ``"rougeLsum"`` (of its lines).
        column: the column with the references.
        measure: ``"fmeasure"``, ``"precision"`` or ``"recall"``.
        stem: compare Porter's stems.
        words: ``"unicode"``: runs of letters, digits and marks in any script, and single characters of scripts without
            spaces; ``"published"``: rouge-score's runs of ``a-z0-9``. On ASCII the two agree.

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: an argument is unknown.
    """

    def __init__(
        self,
        kind: str = "rougeL",
        column: str = "reference",
        measure: Literal["fmeasure", "precision", "recall"] = "fmeasure",
        stem: bool = False,
        words: Literal["unicode", "published"] = "unicode",
    ) -> None:
        super().__init__(column, kind)
        one_of(words, ("unicode", "published"), f"{kind}: words")
        one_of(measure, ("fmeasure", "precision", "recall"), f"{kind}: measure")
        if kind not in ("rougeL", "rougeLsum") and not (kind.startswith("rouge") and kind[5:].isdigit()):
            raise ValueError(f"rouge: kind must be rouge1, rouge2, ..., rougeL or rougeLsum, not {kind!r}")
        try:
            from rouge_score import rouge_scorer, tokenizers
        except ImportError:
            raise ImportError("ROUGE needs rouge-score: pip install 'lm-envs[metrics]'") from None
        self.kind, self.measure = kind, measure
        published = tokenizers.DefaultTokenizer(use_stemmer=stem)
        self._scorer = rouge_scorer.RougeScorer(
            [kind], tokenizer=published if words == "published" else _UnicodeWords(published)
        )

    def sentence(self, completion: str, references: list[str]) -> float:
        """Score one text, in [0, 1]."""
        found = (self._scorer.score(reference, completion)[self.kind] for reference in references)
        return float(max(getattr(score, self.measure) for score in found))


class _UnicodeWords:
    """A tokenizer for words of any script; rouge-score's own, which may stem, handles the ASCII ones."""

    def __init__(self, ascii_tokenizer: Any) -> None:
        self._ascii = ascii_tokenizer

    def tokenize(self, text: str) -> list[str]:
        spaced = (
            f" {char} " if _SPACELESS.match(char) else char if unicodedata.category(char)[0] in "LNM" else " "
            for char in unicodedata.normalize("NFKC", text).lower()
        )
        words = "".join(spaced).split()
        return [w for word in words for w in (self._ascii.tokenize(word) if word.isascii() else [word])]


METRICS: Mapping[str, Callable[..., TextMetric]] = {
    "bleu": SentenceBLEU,
    "chrf": SentenceChrF,
    "chrf++": partial(SentenceChrF, word_order=2),
    **{kind: partial(Rouge, kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
}


def make_metric(name: str, **options: Any) -> TextMetric:
    """Make a metric by its name in :data:`METRICS` and its class's arguments; ValueError if there is no such metric or
    option, ImportError if its library is not installed."""
    if name not in METRICS:
        raise ValueError(f"there is no text metric {name!r}; there are {', '.join(METRICS)}")
    try:
        return METRICS[name](**options)
    except TypeError:
        raise ValueError(f"{name} does not take {', '.join(f'{k}={v!r}' for k, v in options.items())}") from None


def _as_list(given: Any, name: str, sample: int) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"reward {name!r}: sample {sample} has the reference {given!r}: expected a text or several")
    return list(texts)


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu.metrics as found
    except ImportError:
        raise ImportError("BLEU and chrF need sacreBLEU: pip install 'lm-envs[metrics]'") from None
    return found
