"""Constraints of an instruction that a program can check: length, format, case, language, words to use or avoid.

The column ``constraints`` holds a list of objects per prompt, such as ``{"kind": "words", "least": 20, "most": 40}``: a
kind of :data:`KINDS`, which is a function of the text, and its other arguments. Most kinds are those of IFEval (Zhou et
al. 2023, arXiv:2311.07911). An empty response meets none.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_envs.reward.base import said
from lm_envs.settings import near, short

__all__ = ["KINDS", "all_met", "check_constraints", "met", "share"]

_NONE = math.inf
_QUOTES = (('"', '"'), ("\u201c", "\u201d"), ("\u201e", "\u201c"), ("\u00ab", "\u00bb"))
_ENDS = re.compile(r"[.!?]+[\"'\u201d)*]*(?=\s|$)")
# Frequent words that tell these languages apart.
_FREQUENT: Mapping[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "english": "the and is are was were to of in that it with for you this have not they from what be as at your",
        "spanish": "el la los las es son y que de un una en por para con no su se lo muy pero como hay está del al",
        "french": "le la les est sont et que de des un une dans pour avec ne pas il elle sur très mais ce nous vous du",
        "german": "der die das ist sind und zu ein eine nicht mit auf für ich wir sie es den dem im auch sehr aber von",
        "italian": "il lo la gli è sono e che di un una per con non si del della nel molto ma come anche più al da i",
        "portuguese": "o a os as é são e que de um uma em para com não se do da no na muito mas como mais ao por",
        "dutch": "de het een is zijn en van dat niet met op voor ik wij je te aan ook er maar om naar heel als bij",
        "swedish": "den det en ett är och att av som inte med på för jag vi du har till om men så när eller mycket",
        "vietnamese": "và là của có không một những được cho với trong này người các đã để khi rất",
        "finnish": "ja on ei se että oli hän ovat kun mutta niin tai myös joka mitä vain sen ole",
        "swahili": "na ya wa kwa ni katika za la hii ili kama yake au pia sana watu hiyo",
    }.items()
}
# Languages that are told by their script alone, as the names of its letters begin in Unicode.
_SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "arabic": ("ARABIC",),
    "bengali": ("BENGALI",),
    "bulgarian": ("CYRILLIC",),
    "chinese": ("CJK",),
    "greek": ("GREEK",),
    "gujarati": ("GUJARATI",),
    "hebrew": ("HEBREW",),
    "hindi": ("DEVANAGARI",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
    "kannada": ("KANNADA",),
    "korean": ("HANGUL",),
    "marathi": ("DEVANAGARI",),
    "nepali": ("DEVANAGARI",),
    "persian": ("ARABIC",),
    "punjabi": ("GURMUKHI",),
    "russian": ("CYRILLIC",),
    "tamil": ("TAMIL",),
    "telugu": ("TELUGU",),
    "thai": ("THAI",),
    "ukrainian": ("CYRILLIC",),
    "urdu": ("ARABIC",),
}


def words(text: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of words, runs without white space that hold a letter or digit, is in a range."""
    return least <= len(_words(text)) <= most


def sentences(text: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of sentences is in a range: pieces with a word between full stops, question and exclamation
    marks before white space. An abbreviation's full stop counts."""
    return least <= sum(bool(_words(piece)) for piece in _ENDS.split(text)) <= most


def paragraphs(text: str, least: float = 0, most: float = _NONE, separator: str = "") -> bool:
    """Whether the number of paragraphs, divided by a separator or by empty lines, is in a range."""
    return least <= len(_paragraphs(text, separator)) <= most


def paragraph_starts(text: str, number: int, phrase: str, separator: str = "") -> bool:
    """Whether a paragraph, the first is 1, starts with a phrase, in any case."""
    found = _paragraphs(text, separator)
    return 1 <= number <= len(found) and starts(found[number - 1], phrase)


def use(text: str, words: Sequence[str]) -> bool:
    """Whether each of these words or phrases occurs as a whole, in any case."""
    return all(_count(text, word) for word in _texts(words))


def avoid(text: str, words: Sequence[str]) -> bool:
    """Whether none of these words or phrases occurs."""
    return not any(_count(text, word) for word in _texts(words))


def frequency(text: str, word: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of times that a word occurs is in a range."""
    return least <= _count(text, word) <= most


def letter(text: str, letter: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of times that a character occurs, in any case, is in a range."""
    return least <= text.lower().count(letter.lower()) <= most


def capital_words(text: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of words in capital letters is in a range."""
    return least <= sum(word.isupper() for word in _words(text)) <= most


def case(text: str, case: str) -> bool:
    """Whether a text has letters, all of them "upper" or all "lower"."""
    return {"upper": text.isupper, "lower": text.islower}[case]()


def language(text: str, name: str) -> bool:
    """Whether a text is in a language: most of its letters are of the script, or more of its words are frequent ones of
    the language than of any other, and at least one in ten."""
    if name in _SCRIPTS:
        letters = [unicodedata.name(char, "") for char in text if char.isalpha()]
        return 2 * sum(char.startswith(_SCRIPTS[name]) for char in letters) > len(letters)
    known = _FREQUENT[name]
    found = re.findall(r"[^\W\d_]+", text.lower())
    count = sum(word in known for word in found)
    others = (sum(word in other for word in found) for other in _FREQUENT.values() if other is not known)
    return 10 * count >= len(found) > 0 and count > max(others)


def json_object(text: str, keys: Sequence[str] = ()) -> bool:
    """Whether a text is JSON, perhaps in a fence of Markdown; with ``keys`` an object that has them."""
    inside = re.fullmatch(r"```(?:json|JSON)?\s*\n(.*)```", text.strip(), re.DOTALL)
    try:
        found = json.loads(inside[1] if inside else text)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(found, dict) and set(_texts(keys)) <= set(found))


def bullets(text: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of lines that begin as bullet points is in a range."""
    return least <= len(re.findall(r"^\s*[-*\u2022]\s+\S", text, re.MULTILINE)) <= most


def numbered(text: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the lines that begin with a number are numbered from 1 on, and how many they are is in a range."""
    found = [int(number) for number in re.findall(r"^\s*(\d{1,4})[.)]\s+\S", text, re.MULTILINE)]
    return found == list(range(1, len(found) + 1)) and least <= len(found) <= most


def starts(text: str, phrase: str) -> bool:
    """Whether a text starts with a phrase, in any case."""
    return text.lstrip().lower().startswith(phrase.lower())


def ends(text: str, phrase: str) -> bool:
    """Whether a text ends with a phrase, in any case."""
    return text.rstrip().lower().endswith(phrase.lower())


def title(text: str, brackets: str = "<<>>") -> bool:
    """Whether a text has a title in brackets on one line."""
    left, right = (re.escape(half) for half in (brackets[: len(brackets) // 2], brackets[len(brackets) // 2 :]))
    return any(_words(inside) for inside in re.findall(rf"{left}([^\n]+?){right}", text))


def no_commas(text: str) -> bool:
    """Whether a text has no comma."""
    return "," not in text


def two_answers(text: str, separator: str = "******") -> bool:
    """Whether a text is two different answers with a separator between them."""
    found = [part.strip() for part in text.split(separator)]
    return len(found) == 2 and all(map(_words, found)) and found[0] != found[1]


def quoted(text: str) -> bool:
    """Whether the whole text is in double quotation marks."""
    found = text.strip()
    return any(found[:1] == left and found[-1:] == right and bool(_words(found)) for left, right in _QUOTES)


def postscript(text: str, marker: str = "P.S.") -> bool:
    """Whether a line with words starts with the marker of a postscript."""
    return re.search(rf"^\W*{re.escape(marker)}[^\w\n]*\w", text, re.MULTILINE | re.IGNORECASE) is not None


def placeholders(text: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of placeholders in square brackets, such as [name], is in a range."""
    return least <= len(re.findall(r"\[[^\[\]\n]+\]", text)) <= most


def highlights(text: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of phrases between single or double asterisks is in a range."""
    return least <= len(re.findall(r"(\*{1,2})(?=[^\s*])[^*\n]*[^\s*]\1(?!\*)", text)) <= most


def sections(text: str, marker: str, least: float = 0, most: float = _NONE) -> bool:
    """Whether the number of lines such as "SECTION 1", with "SECTION" as the marker, is in a range."""
    found = re.findall(rf"^\W*{re.escape(marker)}\s*\d+", text, re.MULTILINE | re.IGNORECASE)
    return least <= len(found) <= most


def one_of(text: str, answers: Sequence[str]) -> bool:
    """Whether one of these answers occurs, and no other."""
    return sum(answer in text for answer in _texts(answers)) == 1


def repeats(text: str, request: str) -> bool:
    """Whether a text begins with the request, word by word, and goes on."""
    begin, found = request.strip().lower(), text.strip().lower()
    return found.startswith(begin) and bool(_words(found[len(begin) :]))


KINDS: Mapping[str, Callable[..., bool]] = {
    **{
        kind.__name__: kind
        for kind in (
            *(words, sentences, paragraphs, paragraph_starts, use, avoid, frequency, letter, capital_words, case),
            *(language, bullets, numbered, starts, ends, title, no_commas, two_answers, quoted, postscript),
            *(placeholders, highlights, sections, one_of, repeats),
        )
    },
    "json": json_object,
}


def met(text: str, constraint: Mapping[str, Any]) -> bool:
    """Whether a response meets a constraint; ValueError if there is no such kind or argument."""
    if not isinstance(constraint, Mapping):
        raise ValueError(f"a constraint is an object with 'kind', not {short(constraint)}")
    arguments = {name: value for name, value in constraint.items() if name != "kind"}
    kind = constraint.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"no kind of constraint {short(kind)}: {near(str(kind), KINDS)}")
    try:
        inspect.signature(KINDS[kind]).bind(text, **arguments)
        return bool(_words(text)) and KINDS[kind](text, **arguments)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"the constraint {short(dict(constraint))} cannot be checked: {error}") from error


def check_constraints(constraints: Any) -> None:
    """Raise ValueError unless this is a list of constraints of known kinds with the right arguments."""
    if not isinstance(constraints, list) or not constraints:
        raise ValueError(f"'constraints' must be a list of objects with 'kind', not {short(constraints)}")
    for constraint in constraints:
        met("1. word", constraint)


def share(completions: Sequence[Any], constraints: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return the share of a prompt's constraints that its response meets; None for a prompt without any."""
    rows = zip(map(said, completions), constraints, strict=True)
    return [sum(met(text, one) for one in several) / len(several) if several else None for text, several in rows]


def all_met(completions: Sequence[Any], constraints: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return 1 if a response meets all of its prompt's constraints, else 0; None for a prompt without any."""
    return [None if found is None else float(found == 1) for found in share(completions, constraints)]


def _words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"\w", word)]


def _paragraphs(text: str, separator: str) -> list[str]:
    found = text.split(separator) if separator else re.split(r"\n\s*\n", text)
    return [piece.strip() for piece in found if _words(piece)]


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _texts(given: Sequence[str]) -> Sequence[str]:
    """A list of texts; ValueError for a single one, whose letters would be taken one by one."""
    if isinstance(given, str) or not given:
        raise ValueError(f"expected a list of texts, not {short(given)}")
    return given
