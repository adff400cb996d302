"""A judge that shares nothing with the reward model but the language: word counts and logistic regression."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

_TERMS, _WEIGHTS = "terms.json", "weights.safetensors"


def require_sklearn() -> None:
    """Raises ImportError, one line that says what to install, where scikit-learn is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("the judge needs scikit-learn: pip install 'lm-envs[corpus]'") from error


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)


class TextJudge:
    """The probability that a text has label 1, by logistic regression on TF-IDF weights of words and pairs of
    neighboring words.

    It reads prompt and completion as one text. Above :attr:`threshold` it takes the text for one with label 1.

    Args:
        terms: the words and pairs, V of them.
        idf, weight: ``(V,)`` float64, inverse document frequencies and weights.
        bias: of the log-odds.
    """

    __name__ = "judge"
    threshold = 0.5

    def __init__(
        self, terms: Sequence[str], idf: NDArray[np.float64], weight: NDArray[np.float64], bias: float
    ) -> None:
        self.terms, self.idf, self.weight, self.bias = list(terms), idf, weight, float(bias)
        self._vectorizer = _vectorizer(vocabulary=self.terms)
        self._vectorizer.idf_ = idf

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[int]) -> TextJudge:
        """Learn from labeled texts, at least one of each label.

        Raises:
            ValueError: the texts have no words.
        """
        # Terms of a single text cannot be told from noise, but a handful of texts may have no others.
        vectorizer = _vectorizer(min_df=2 if len(texts) >= 1000 else 1)
        from sklearn.linear_model import LogisticRegression

        try:
            features = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(f"the judge cannot learn from these {len(texts)} texts: {error}") from error
        model = LogisticRegression(C=10.0, max_iter=1000).fit(features, list(labels))
        return cls(
            vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, model.coef_[0], float(model.intercept_[0])
        )

    def probability(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """``(N,)`` float64 in (0, 1)."""
        log_odds = self._vectorizer.transform(texts) @ self.weight + self.bias
        return np.asarray(1 / (1 + np.exp(-log_odds)))

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """One probability per sample."""
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return self.probability(texts).tolist() if texts else []

    def save(self, folder: Path) -> None:
        """Write the judge as JSON and safetensors."""
        folder.mkdir()
        (folder / _TERMS).write_text(json.dumps(self.terms))
        save_file({"idf": self.idf, "weight": self.weight, "bias": np.array([self.bias])}, folder / _WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> TextJudge:
        """The judge that :meth:`save` wrote. Raises ImportError where scikit-learn is missing."""
        weights = load_file(folder / _WEIGHTS)
        terms = json.loads((folder / _TERMS).read_text())
        return cls(terms, weights["idf"], weights["weight"], float(weights["bias"][0]))
