"""Text metrics as rewards: values computed by hand, references of the data, what is refused."""

from __future__ import annotations

import sys
from math import exp

import pytest

from lm_envs.reward.base import call_reward
from lm_envs.reward.metrics import METRICS, Rouge, SentenceBLEU, SentenceChrF, make_metric

pytest.importorskip("sacrebleu", reason="sacreBLEU is not installed: pip install 'lm-envs[metrics]'")
pytest.importorskip("rouge_score", reason="rouge-score is not installed: pip install 'lm-envs[metrics]'")


def one(metric, text: str, *references: str) -> float:
    return metric([text], reference=[list(references)])[0]


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; as long as the reference
    assert one(SentenceBLEU(), "the cat sat on the mat", "the cat sat on a mat") == pytest.approx(
        (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    )
    # 1 of 2 words, none of 1 pair; no triples: two orders count; brevity penalty of 2 words for 3
    short = {"exp": (1 / 2 * 1 / 2) ** 0.5, "floor": (1 / 2 * 0.1) ** 0.5, "none": 0}
    for smoothing, expected in short.items():
        assert one(SentenceBLEU(smoothing=smoothing), "a b", "a c d") == pytest.approx(expected * exp(1 - 3 / 2))
    assert one(SentenceBLEU(smoothing="floor", smooth_value=0.25), "a b", "a c d") == pytest.approx(
        (1 / 8) ** 0.5 * exp(-0.5)
    )
    # one more match and one more n-gram from pairs on
    assert one(SentenceBLEU(smoothing="add-k"), "a b c d", "a b x d") == pytest.approx(
        (3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    )


def test_bleu_of_perfect_empty_and_cased_texts():
    bleu = SentenceBLEU()
    for text in ("the cat sat on the mat .", "two words", "one"):
        assert one(bleu, text, text) == pytest.approx(1) and one(bleu, text, text) <= 1
    assert one(bleu, "", "a b") == 0
    assert one(bleu, "A B", "a b") < 0.5 and one(SentenceBLEU(lowercase=True), "A B", "a b") == pytest.approx(1)
    assert one(SentenceBLEU(tokenize="char"), "ab", "ab c") > one(bleu, "ab", "ab c")


def test_chrf_by_hand():
    # 1 letter: 2 of 2 and 2 of 3; 2 letters: 1 of 1 and 1 of 2; recall counts twice (beta = 2)
    recall = (2 / 3 + 1 / 2) / 2
    assert one(SentenceChrF(), "ab", "abc") == pytest.approx(5 * recall / (4 + recall))
    assert one(SentenceChrF(word_order=2), "ab", "abc") < one(SentenceChrF(), "ab", "abc")  # no word is right
    assert SentenceChrF(word_order=2).__name__ == make_metric("chrf++").__name__ == "chrf++"


@pytest.mark.parametrize(
    "text",
    ["привет большой мир", "今天天气很好", "καλημέρα κόσμε", "مرحبا بالعالم", "नमस्ते दुनिया", "größere Äpfel", "สวัสดี"],
)
def test_rouge_of_any_script(text):
    """The published words are a-z0-9 alone: identical texts of other scripts would score 0."""
    assert one(Rouge("rouge1"), text, text) == one(Rouge("rougeL"), text, text) == 1
    assert one(Rouge("rouge1"), "hello", text) == 0
    assert one(Rouge("rouge1", words="published"), text, text) < 1 or text.startswith("gr")


def test_rouge_words_by_hand():
    assert one(Rouge("rouge1"), "привет мир", "привет дом") == pytest.approx(1 / 2)
    assert one(Rouge("rouge1"), "天气好", "天气坏") == pytest.approx(2 / 3)
    assert one(Rouge("rouge1"), "नमस्ते दुनिया", "नमस्ते घर") == pytest.approx(1 / 2)  # vowel signs do not end a word
    assert one(Rouge("rouge1"), "gröt", "grt") == 0  # the published words of both are "gr", "t" and "grt"
    assert one(Rouge("rouge1"), "Über", "über") == 1


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_of_ascii_is_the_published_one(stem):
    pairs = [("The cats' hats, 3.5 times!", "the cat's hat 3 times"), ("a-b_c", "a b c"), ("running runs", "run ran")]
    for kind in ("rouge1", "rouge2", "rougeL"):
        for text, reference in pairs:
            found = [one(Rouge(kind, stem=stem, words=words), text, reference) for words in ("unicode", "published")]
            assert found[0] == found[1]


def test_rouge_by_hand():
    text, reference = "the cat sat", "the dog sat down"
    assert one(Rouge("rougeL"), text, reference) == pytest.approx(2 * 2 / (3 + 4))
    assert one(Rouge("rougeL", measure="precision"), text, reference) == pytest.approx(2 / 3)
    assert one(Rouge("rouge1", measure="recall"), text, reference) == pytest.approx(2 / 4)
    assert one(Rouge("rouge2"), text, reference) == 0
    assert one(Rouge("rouge1"), "cats", "cat") == 0 and one(Rouge("rouge1", stem=True), "cats", "cat") == 1


@pytest.mark.parametrize("name", METRICS)
def test_of_several_references_the_best_match_counts(name):
    metric = make_metric(name)
    text, near, far = "a small cat sleeps here now", "a small cat sleeps here", "nothing of the kind"
    assert one(metric, text, far, near) == one(metric, text, near, far)
    assert one(metric, text, far, near) >= one(metric, text, near) - 1e-9 > one(metric, text, far)


def test_references_come_from_a_column_and_none_is_not_applicable():
    def call(metric, **columns):
        return call_reward(metric, ["p", "q"], ["a b", "c d"], [[1], [2]], ["stop", "stop"], **columns)

    assert call(SentenceBLEU(), reference=["a b", "a b"]).tolist() == [1.0, 0.0]
    assert call(Rouge(column="german"), german=["c", ["c d", "x"]], other=[1, 2]).tolist() == [0.0, 1.0]
    assert SentenceBLEU()(["a", "b"], reference=[None, "b"]) == [None, 1.0]
    with pytest.raises(ValueError, match="'bleu' compares with the column 'reference', which the data lack"):
        call(SentenceBLEU(), target=["a", "b"])
    for bad in (3, [], ["a", 1]):
        with pytest.raises(ValueError, match="'chrf': sample 1 has the reference .* expected a text or several"):
            call(SentenceChrF(), reference=["a", bad])


def test_corpus_scores_are_those_of_sacrebleu():
    import sacrebleu

    texts = ["the cat sat on the mat", "a dog ran off"]
    references = [["the cat sat on a mat", "on the mat sat the cat"], ["the dog ran off"]]
    streams = [["the cat sat on a mat", "the dog ran off"], ["on the mat sat the cat", None]]
    bleu = SentenceBLEU(smoothing="add-k").corpus(texts, references)
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score)
    assert 30 < bleu < 100
    assert abs(bleu - 100 * sum(SentenceBLEU()(texts, reference=references)) / 2) > 1  # is no mean of sentences
    assert SentenceChrF().corpus(texts, references) == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score)
    assert Rouge("rouge1").corpus(["a b", "c"], ["a", "c"]) == pytest.approx(100 * (2 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="2 texts and 1 references"):
        SentenceBLEU().corpus(texts, references[:1])


def test_options_reach_sentences_and_corpora():
    """Each as sacreBLEU scores with the same options; a corpus has its standard smoothing and all four orders."""
    from sacrebleu.metrics import BLEU, CHRF

    texts, references = ["The CAT sat, on mats", "a dog"], [["the cat sat , on a mat"], ["A dog ran off"]]
    streams = [[row[0] for row in references]]
    for options in ({"lowercase": True}, {"tokenize": "char"}, {"smoothing": "floor", "smooth_value": 0.4}):
        named = {"smooth_method" if name == "smoothing" else name: value for name, value in options.items()}
        ours, sentence = SentenceBLEU(**options), BLEU(**named, effective_order=True)
        expected = [sentence.sentence_score(text, row).score / 100 for text, row in zip(texts, references, strict=True)]
        assert ours(texts, reference=references) == pytest.approx(expected) and min(expected) < 0.9
        whole = BLEU(**{name: value for name, value in options.items() if name in ("lowercase", "tokenize")})
        assert ours.corpus(texts, references) == pytest.approx(whole.corpus_score(texts, streams).score)
    for name, options in (("chrf", {"lowercase": True}), ("chrf++", {}), ("chrf", {"word_order": 1})):
        metric = CHRF(word_order=options.get("word_order", 2 if "+" in name else 0), lowercase="lowercase" in options)
        expected = [metric.sentence_score(text, row).score / 100 for text, row in zip(texts, references, strict=True)]
        assert make_metric(name, **options)(texts, reference=references) == pytest.approx(expected)
        assert make_metric(name, **options).corpus(texts, references) == pytest.approx(
            metric.corpus_score(texts, streams).score
        )
    short = SentenceBLEU().corpus(["a dog"], [["a dog"]])  # without four words no order of four: not 100
    assert short == pytest.approx(BLEU().corpus_score(["a dog"], [["a dog"]]).score)


def test_what_counts_as_a_word_and_that_one_is_the_most():
    assert one(Rouge("rouge1"), "３ ﬁne", "3 fine") == 1  # compatible forms are the same letters and digits
    assert one(Rouge("rouge1"), "году 2024", "году 1999") == pytest.approx(1 / 2)
    assert one(Rouge("rouge1"), "год2024", "год2024") == 1 > one(Rouge("rouge1"), "год2024", "год 2024")
    assert one(Rouge("rouge1"), "т²", "т2") == 1

    class Long(Rouge):
        def sentence(self, completion, references):
            return 1.0 + 2e-16 + 1e-9

    assert Long()(["a"], reference=["a"]) == [1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SentenceBLEU(smoothing="laplace"), "smoothing must be one of .*exp.*'laplace'"),
        (lambda: SentenceBLEU(tokenize="words"), "tokenize must be one of .*13a"),
        (lambda: SentenceChrF(word_order=-1), "must not be negative"),
        (lambda: Rouge("rougeX"), "kind must be rouge1"),
        (lambda: Rouge(measure="f1"), "measure must be one of fmeasure"),
        (lambda: make_metric("meteor"), "no text metric 'meteor'; there are bleu, chrf"),
        (lambda: make_metric("bleu", colum="x"), "bleu does not take colum='x'"),
    ],
)
def test_what_does_not_exist_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_the_libraries_the_extra_is_named(monkeypatch):
    for name in ("sacrebleu", "sacrebleu.metrics", "rouge_score"):
        monkeypatch.setitem(sys.modules, name, None)
    for make in (SentenceBLEU, SentenceChrF, Rouge):
        with pytest.raises(ImportError, match=r"lm-envs\[metrics\]"):
            make()
