"""Overlap with reference texts as rewards, by the field's own implementations: BLEU and chrF by sacreBLEU, ROUGE by
rouge-score.

Each reads a column of the data, by default ``reference``: per sample one text, or a list of texts that all count as
right. As rewards they score sentence by sentence, in [0, 1]; ``corpus`` gives the figure that papers report. The
libraries are imported when a metric is made: ``pip install 'lm-envs[metrics]'``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

__all__ = ["METRICS", "Rouge", "SentenceBLEU", "SentenceChrF", "TextMetric", "make_metric"]

References = Sequence[str] | Sequence[Sequence[str]]

# Scripts that are written without spaces: kana, Han, Thai, Lao, Myanmar and Khmer.
_SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


class TextMetric:
    """What the metrics share: where the references come from.

    Args:
        column: the column of the data with the references.
        name: what messages and results call it.
    """

    unit = ""  # of :meth:`corpus`, for tables

    def __init__(self, column: str, name: str) -> None:
        self.column, self.__name__ = column, name

    def sentence(self, completion: str, references: list[str]) -> float:
        """The score of one text, in [0, 1]."""
        raise NotImplementedError

    def corpus(self, completions: Sequence[str], references: References) -> float:
        """The score of all texts together, as papers report it: out of 100.

        Args:
            completions: N texts.
            references: N texts, or N lists of texts.

        Raises:
            ValueError: there are no texts, or their numbers differ.
        """
        rows = [_as_list(row, self.__name__, i) for i, row in enumerate(references)]
        if len(rows) != len(completions) or not rows:
            raise ValueError(f"{self.__name__}: {len(completions)} texts and {len(rows)} references")
        return self._corpus(list(completions), rows)

    def _corpus(self, completions: list[str], references: list[list[str]]) -> float:
        raise NotImplementedError

    def __call__(self, completions: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """One score per sample in [0, 1]; None (not applicable) where the column holds None.

        Raises:
            ValueError: the data lack the column, or an entry is neither a text nor a list of texts.
        """
        if self.column not in columns:
            raise ValueError(
                f"reward {self.__name__!r} compares with the column {self.column!r}, which the data lack: give every "
                "prompt one, or name the column that holds the references"
            )
        found: list[float | None] = []  # rounding can carry a perfect text past 1
        for i, (text, given) in enumerate(zip(completions, columns[self.column], strict=True)):
            found.append(None if given is None else min(self.sentence(text, _as_list(given, self.__name__, i)), 1.0))
        return found


class SentenceBLEU(TextMetric):
    """Smoothed sentence-level BLEU, by sacreBLEU (Papineni et al. 2002; Post 2018, arXiv:1804.08771).

    Orders of which a short text has no n-gram do not count (effective order), so a perfect text of two words scores 1;
    sacreBLEU's ``add-k`` counts them as matched.

    Args:
        column: the column of the data with the references.
        smoothing: of orders without a match, as sacreBLEU names them: ``"exp"`` (its default, NIST's), ``"floor"``,
            ``"add-k"`` (Lin and Och 2004 with ``smooth_value=1``) or ``"none"``.
        smooth_value: of ``floor`` and ``add-k``; None takes sacreBLEU's (0.1 and 1).
        tokenize: sacreBLEU's tokenizer: ``"13a"``, ``"intl"``, ``"zh"``, ``"char"``, ...
        lowercase: compare without case.

    Raises:
        ImportError: sacreBLEU is not installed.
        ValueError: an argument that sacreBLEU does not know.
    """

    unit = "BLEU"

    def __init__(
        self,
        column: str = "reference",
        smoothing: str = "exp",
        smooth_value: float | None = None,
        tokenize: str = "13a",
        lowercase: bool = False,
    ) -> None:
        super().__init__(column, "bleu")
        metrics = _sacrebleu()
        if smoothing not in metrics.BLEU.SMOOTH_DEFAULTS:
            raise ValueError(f"bleu: smoothing must be one of {', '.join(metrics.BLEU.SMOOTH_DEFAULTS)}: {smoothing!r}")
        if tokenize not in metrics.BLEU.TOKENIZERS:
            raise ValueError(f"bleu: tokenize must be one of {', '.join(metrics.BLEU.TOKENIZERS)}, not {tokenize!r}")
        given = dict(tokenize=tokenize, lowercase=lowercase)
        self._sentence = metrics.BLEU(smooth_method=smoothing, smooth_value=smooth_value, effective_order=True, **given)
        self._whole = metrics.BLEU(**given)

    def sentence(self, completion: str, references: list[str]) -> float:
        """As the class says."""
        return self._sentence.sentence_score(completion, references).score / 100

    def _corpus(self, completions: list[str], references: list[list[str]]) -> float:
        """Corpus BLEU with sacreBLEU's standard settings (exp smoothing, four orders), out of 100."""
        return self._whole.corpus_score(completions, _streams(references)).score


class SentenceChrF(TextMetric):
    """Sentence-level chrF, by sacreBLEU (Popović 2015); chrF++ with ``word_order=2`` (Popović 2017).

    Args:
        column: the column of the data with the references.
        word_order: the longest n-grams of words that count beside those of characters.
        lowercase: compare without case.

    Raises:
        ImportError: sacreBLEU is not installed.
        ValueError: ``word_order`` is negative.
    """

    unit = "chrF"

    def __init__(self, column: str = "reference", word_order: int = 0, lowercase: bool = False) -> None:
        super().__init__(column, "chrf" + "+" * word_order)
        if word_order < 0:
            raise ValueError(f"chrf: word_order must not be negative, got {word_order}")
        self._metric = _sacrebleu().CHRF(word_order=word_order, lowercase=lowercase)

    def sentence(self, completion: str, references: list[str]) -> float:
        """As the class says."""
        return self._metric.sentence_score(completion, references).score / 100

    def _corpus(self, completions: list[str], references: list[list[str]]) -> float:
        return self._metric.corpus_score(completions, _streams(references)).score


class Rouge(TextMetric):
    """ROUGE by rouge-score (Lin 2004); of several references the best one counts.

    Args:
        kind: ``"rouge1"``, ``"rouge2"``, ... (n-grams), ``"rougeL"`` (longest common subsequence of the text) or
            ``"rougeLsum"`` (of its lines).
        column: the column of the data with the references.
        measure: ``"fmeasure"``, ``"precision"`` or ``"recall"``.
        stem: compare Porter's stems.
        words: ``"unicode"``: runs of letters, digits and their marks in any script; characters of scripts without
            spaces one by one. ``"published"``: those of rouge-score, runs of ``a-z0-9``, which loses every other
            letter. The two agree on ASCII.

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: there is no such kind, measure or way to find words.
    """

    unit = "ROUGE"

    def __init__(
        self,
        kind: str = "rougeL",
        column: str = "reference",
        measure: Literal["fmeasure", "precision", "recall"] = "fmeasure",
        stem: bool = False,
        words: Literal["unicode", "published"] = "unicode",
    ) -> None:
        super().__init__(column, kind)
        if words not in ("unicode", "published"):
            raise ValueError(f"{kind}: words must be unicode or published, not {words!r}")
        if measure not in ("fmeasure", "precision", "recall"):
            raise ValueError(f"{kind}: measure must be fmeasure, precision or recall, not {measure!r}")
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
        """As the class says."""
        found = (self._scorer.score(reference, completion)[self.kind] for reference in references)
        return float(max(getattr(score, self.measure) for score in found))

    def _corpus(self, completions: list[str], references: list[list[str]]) -> float:
        """The mean over texts, out of 100."""
        scores = [self.sentence(text, row) for text, row in zip(completions, references, strict=True)]
        return 100 * sum(scores) / len(scores)


class _UnicodeWords:
    """Words of any script; those that are ASCII go through rouge-score's own tokenizer, which may stem them."""

    def __init__(self, ascii_tokenizer: Any) -> None:
        self._ascii = ascii_tokenizer

    def tokenize(self, text: str) -> list[str]:
        words, word = [], ""
        for char in unicodedata.normalize("NFKC", text).lower() + " ":
            spaceless = _SPACELESS.match(char) is not None
            if (spaceless or unicodedata.category(char)[0] not in "LNM") and word:
                words.append(word)
                word = ""
            if spaceless:
                words.append(char)
            elif unicodedata.category(char)[0] in "LNM":
                word += char
        return [w for word in words for w in (self._ascii.tokenize(word) if word.isascii() else [word])]


def _rouge(kind: str) -> Callable[..., TextMetric]:
    return lambda **options: Rouge(kind, **options)


def _chrf_plus_plus(**options: Any) -> TextMetric:
    return SentenceChrF(word_order=2, **options)


METRICS: Mapping[str, Callable[..., TextMetric]] = {
    "bleu": SentenceBLEU,
    "chrf": SentenceChrF,
    "chrf++": _chrf_plus_plus,
    **{kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
}


def make_metric(name: str, **options: Any) -> TextMetric:
    """A metric by its name in :data:`METRICS`; ``options`` are its class's arguments.

    Raises:
        ImportError: its library is not installed.
        ValueError: there is no such metric or option.
    """
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


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    """As sacreBLEU takes them: per reference number one list over samples, None where a sample has fewer."""
    most = max(map(len, references))
    return [[row[k] if k < len(row) else None for row in references] for k in range(most)]


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu.metrics as found
    except ImportError:
        raise ImportError("BLEU and chrF need sacreBLEU: pip install 'lm-envs[metrics]'") from None
    return found
