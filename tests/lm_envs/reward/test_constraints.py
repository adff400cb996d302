"""Constraints: each kind by hand, with a text that meets it and one that just does not."""

from __future__ import annotations

import pytest

from lm_envs.reward.building import build_reward
from lm_envs.reward.constraints import KINDS, all_met, check_constraints, met, share
from lm_envs.reward.specs import parse_reward

GERMAN, FRENCH = "Der Hund ist sehr groß und nicht mein Freund.", "Le chien est dans la rue et il ne dort pas."
CASES = [
    ({"kind": "words", "least": 3, "most": 4}, ["one two three", "a - b, c d!"], ["one two", "a b c d e"]),
    ({"kind": "sentences", "least": 2, "most": 2}, ['"So?" He left.', "A b... C d"], ["One.", "A. B! C?", "3.5 kg"]),
    ({"kind": "paragraphs", "least": 2, "most": 2}, ["a\n\nb", "a\nb\n \n\nc\n\n"], ["a\nb", "a\n\nb\n\nc", "a\n\n-"]),
    ({"kind": "paragraphs", "least": 2, "most": 2, "separator": "***"}, ["a *** b\n\nc"], ["a\n\nb"]),
    ({"kind": "paragraph_starts", "number": 2, "phrase": "yes"}, ["a\n\nYes, b"], ["yes\n\nno", "yes"]),
    ({"kind": "use", "words": ["cat", "ice cream"]}, ["Cat, Ice cream"], ["cats ice cream", "cat ice  cream"]),
    ({"kind": "avoid", "words": ["cat"]}, ["cats", "dog"], ["the cat.", "CAT"]),
    ({"kind": "frequency", "word": "cat", "least": 2}, ["cat Cat"], ["cat cats"]),
    ({"kind": "letter", "letter": "o", "least": 2, "most": 3}, ["Oo", "o-o-O x"], ["o", "oooo"]),
    ({"kind": "capital_words", "least": 2, "most": 2}, ["I am OK."], ["OK", "A B C"]),
    ({"kind": "case", "case": "upper"}, ["ALL 7!"], ["All", "77"]),
    ({"kind": "case", "case": "lower"}, ["all 7!"], ["All", "77"]),
    ({"kind": "language", "name": "german"}, [GERMAN], [FRENCH, "The dog is big and not my friend.", "Hund"]),
    ({"kind": "language", "name": "french"}, [FRENCH], [GERMAN]),
    ({"kind": "language", "name": "spanish"}, ["El perro es grande pero no está en la casa."], [FRENCH, GERMAN]),
    ({"kind": "language", "name": "italian"}, ["Il cane è molto grande ma non è del mio amico."], [FRENCH, GERMAN]),
    ({"kind": "language", "name": "russian"}, ["Собака спит (ok)."], ["dog", GERMAN]),
    ({"kind": "json"}, ['{"a": 1}', "[1]", '```json\n{"a": 1}\n```'], ["{a: 1}", 'Here: {"a": 1}']),
    ({"kind": "json", "keys": ["a", "b"]}, ['{"a": 1, "b": 2, "c": 3}'], ['{"a": 1}', '["a", "b"]']),
    ({"kind": "bullets", "least": 2, "most": 2}, ["- a\n* b", "Hi:\n  - a\n  - b"], ["- a", "- a\n- b\n- c", "-a\n-b"]),
    ({"kind": "numbered", "least": 2, "most": 2}, ["1. a\n2. b", "1) a\n2) b"], ["1. a", "2. a\n3. b", "1. a\n1. b"]),
    ({"kind": "starts", "phrase": "Once upon"}, [" once upon a time"], ["At once upon"]),
    ({"kind": "ends", "phrase": "The end."}, ["It is the end.\n"], ["The end. Or not", "The end"]),
    ({"kind": "title"}, ["<<A tale>>\nOnce"], ["[A tale]", "<<>> x", "<<a\nb>>"]),
    ({"kind": "title", "brackets": "[]"}, ["[A tale] Once"], ["<<A tale>>", "[!] x"]),
    ({"kind": "no_commas"}, ["a; b"], ["a, b"]),
    ({"kind": "two_answers"}, ["a\n******\nb"], ["a ****** a", "a ******", "a ****** b ****** c", "a"]),
    ({"kind": "quoted"}, [' "a b"\n', "\u201ea\u201c"], ['"a" b', "'a'", '"a']),
    ({"kind": "postscript"}, ["Dear X,\nbye\n\nP.S. Call me", "a\n**P.S.** b"], ["a P.S. b", "a\nP.S.", "PS a"]),
    ({"kind": "placeholders", "least": 2}, ["[name] at [place]"], ["[name]", "[] [] []"]),
    ({"kind": "highlights", "least": 2, "most": 2}, ["*a* and **b c**"], ["*a*", "* a\n* b\n* c", "****** x ******"]),
    ({"kind": "sections", "marker": "Part", "least": 2}, ["PART 1\na\n## Part 2: b"], ["Part 1", "Part a\nPart b"]),
    ({"kind": "one_of", "answers": ["It is yes.", "It is no."]}, ["So: It is no."], ["no", "It is yes. It is no."]),
    ({"kind": "repeats", "request": "Say it."}, ["say it. Now"], ["Say it.", "I Say it. Now"]),
]


@pytest.mark.parametrize(
    ("constraint", "good", "bad"), CASES, ids=lambda value: value.get("kind", "") if isinstance(value, dict) else ""
)
def test_kinds_by_hand(constraint, good, bad):
    check_constraints([constraint])
    assert [met(text, constraint) for text in (*good, *bad)] == [True] * len(good) + [False] * len(bad)


def test_every_kind_has_a_case():
    assert {constraint["kind"] for constraint, _, _ in CASES} == set(KINDS)


def test_shares_by_hand():
    short, quiet, lower = {"kind": "words", "most": 2}, {"kind": "no_commas"}, {"kind": "case", "case": "lower"}
    columns = {"constraints": [[short, quiet, lower], [short, quiet], None, [quiet], [lower]]}
    texts = ["a, b", "a b", "x", "", [{"role": "assistant", "content": "ok"}]]
    assert share(completions=texts, **columns) == [pytest.approx(2 / 3), 1.0, None, 0.0, 1.0]  # nothing said meets none
    assert all_met(completions=texts, **columns) == [0.0, 1.0, None, 0.0, 1.0]
    assert build_reward(parse_reward("constraints")) is share


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ([{"kind": "word"}], "did you mean 'words'"),
        ([{"kind": "words", "last": 3}], "unexpected keyword argument 'last'"),
        ([{"kind": "words", "least": "three"}], "cannot be checked"),
        ([{"kind": "use", "words": "cat"}], "expected a list of texts, not 'cat'"),
        ([{"kind": "language", "name": "klingon"}], "klingon"),
        (["words"], "an object with 'kind', not 'words'"),
        ([], "must be a list"),
    ],
)
def test_bad_constraints(constraints, message):
    with pytest.raises(ValueError, match=message):
        check_constraints(constraints)
