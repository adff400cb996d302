"""Rewards written as text: what the grammar means, what is made of it, and how it refuses."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_envs.reward.base import Conversational, Standardise, call_reward, leaves
from lm_envs.reward.building import build_reward
from lm_envs.reward.learned import LearnedReward
from lm_envs.reward.specs import Combined, Source, is_spec, parse_reward
from lm_envs.reward.units import Samples
from tests.lm_envs import byo

MINE = '''
"""A reward file as a user has it."""
from helper import bonus


def length(completions, **kwargs):
    return [float(len(text)) + bonus for text in completions]


def scaled(completions, factor=1.0, **kwargs):
    return [factor * len(text) for text in completions]


def roles(prompts, completions, **kwargs):
    return [float(len(p)) + 10 * (c[0]["role"] == "assistant") for p, c in zip(prompts, completions)]


class Counter:
    def __init__(self, letter="a"):
        self.letter = letter

    def __call__(self, completions, **kwargs):
        return [float(text.count(self.letter)) for text in completions]


CONSTANT = 3
'''


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "helper.py").write_text("bonus = 0.0\n")
    path = tmp_path / "my rewards.py"
    path.write_text(MINE)
    yield str(path)
    for name in [name for name in sys.modules if name.startswith("lm_envs_user_") or name == "helper"]:
        del sys.modules[name]


def score(text, completions=("aab", "b"), prompts=None, samples=None, conversational=False, **columns):
    made = build_reward(parse_reward(text), samples=samples, conversational=conversational)
    count = len(completions)
    return call_reward(
        made, prompts or ["p"] * count, list(completions), [[1]] * count, ["stop"] * count, **columns
    ).tolist()


# --- the grammar ----------------------------------------------------------------------------------------------------

BLEU, CHRF = Source("metric", "bleu"), Source("metric", "chrf")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bleu", BLEU),
        ("bleu*0.5", Combined("sum", (BLEU,), (0.5,))),
        (" 2e-1 * bleu ", Combined("sum", (BLEU,), (0.2,))),
        ("2*bleu*-.5", Combined("sum", (BLEU,), (-1.0,))),
        ("bleu*1", BLEU),
        ("bleu + chrf*2", Combined("sum", (BLEU, CHRF), (1.0, 2.0))),
        (["bleu", "chrf*2"], Combined("sum", (BLEU, CHRF), (1.0, 2.0))),
        ("clip(bleu, 0, .5)*3", Combined("sum", (Combined("clip", (BLEU,), (0.0, 0.5)),), (3.0,))),
        ("clip(bleu + chrf, -1, 1)", Combined("clip", (Combined("sum", (BLEU, CHRF), (1.0, 1.0)),), (-1.0, 1.0))),
        ("standardise(2*bleu)", Combined("standardise", (Combined("sum", (BLEU,), (2.0,)),))),
        ("standardise(bleu, 0.3, 0.1)", Combined("standardise", (BLEU,), (0.3, 0.1))),
        ("clip(standardise(bleu), -2, 2)", Combined("clip", (Combined("standardise", (BLEU,)),), (-2.0, 2.0))),
        ("(bleu + chrf)*0.5", Combined("sum", (Combined("sum", (BLEU, CHRF), (1.0, 1.0)),), (0.5,))),
        ("chat(m:f)", Combined("chat", (Source("function", "m", "f"),))),
        ("model:a/b", Source("model", "a/b")),
        ("model:/x/y z.d[label=positive, output=logit]*2",
         Combined("sum", (Source("model", "/x/y z.d", settings={"label": "positive", "output": "logit"}),), (2.0,))),
        ("bleu[column=german,lowercase=true,smooth_value=0.1]",
         Source("metric", "bleu", settings={"column": "german", "lowercase": True, "smooth_value": 0.1})),
        ("judge:http://127.0.0.1:8000/v1#org/m", Source("judge", "http://127.0.0.1:8000/v1", "org/m")),
        ("judge:http://[::1]:8000/v1#m[workers=2]", Source("judge", "http://[::1]:8000/v1", "m", {"workers": 2})),
        ("judge:http://[::1]:8000/v1#m", Source("judge", "http://[::1]:8000/v1", "m")),
        ("pkg.mod:f", Source("function", "pkg.mod", "f")),
        ("chrf++*2", Combined("sum", (Source("metric", "chrf++"),), (2.0,))),
    ],
)  # fmt: skip
def test_what_a_text_means(text, expected):
    assert parse_reward(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blue", "reward 'blue': did you mean 'bleu'"),
        ("my reward", "expected model:DIR, judge:URL#MODEL, judge:FILE.toml, FILE.py:function.* bleu, chrf"),
        ("", "expected model:DIR"),
        ("bleu + ", "a . needs a reward on both sides"),
        ("bleu+chrf", "the . of a sum needs spaces around it: 'bleu . chrf'"),
        ("bleu*0.5+chrf++*2", r"'bleu\*0.5 . chrf\+\+'"),
        ("bleu*x", r"reward 'bleu\*x': 'x' is not a number; write a weight as in 'bleu\*0.5'"),
        ("clip(0.5*x*chrf, 0, 1)", r"reward 'x\*chrf': 'x' is not a number"),
        ("bleu*", r"the \* has nothing behind it"),
        ("bleu - chrf", r"negative weight: 'bleu . chrf\*-1'"),
        ("model:a*x", "'x' is not a number"),
        ("model:a+model:b", "'model:a . model:b'"),
        ("clipp(bleu, 0, 1)", "did you mean 'clip'"),
        ("clip(bleu, 1)", "clip takes low, high, as numbers"),
        ("clip(bleu, low, 1)", "clip takes low, high"),
        ("standardise(bleu, 1)", "standardise takes mean, std .or neither."),
        ("clip(bleu, 0, 1", "a bracket is not closed"),
        ("bleu)", "a bracket is closed that was not opened"),
        ("bleu*1e999", "weight must be finite"),
        ("bleu[column]", "expected model:DIR"),
        ("bleu[column=a, b]", "settings are name=value, not 'b'"),
        ("bleu[column=a, column=b]", "gives 'column' twice"),
        ("model:", "name the model's folder"),
        ("judge:http://127.0.0.1/v1", "a judge is judge:URL#MODEL or judge:FILE.toml"),
        ("judge:nowhere.toml", "there is no file 'nowhere.toml'"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("bleu\u2028~no/x.py", r"say which function of the file, as in 'bleu\\u2028"),
        ("a\u2028 - b", r"negative weight: 'a . b\*-1'"),
        ([], "expected a text or several"),
        ([1], "expected a text or several"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_reward(text)
    assert len(str(caught.value).splitlines()) == 1


WORDS = [
    "bleu", "chrf++", "rougeL", "model:", "model:a/b", "judge:", "judge:http://[::1]:8/v1#m", "m:f", "x.py:f",
    "~no/x.py",
    "clip", "standardise", "chat", "(", ")", "[", "]", "[a=1]", "=", ",", ", ", " + ", "+", "*", " * ", "-", " - ", ":",
    "0.5", "1e999", "-2", "007", ".", "\n", "\0", "\ud800", "\u2028", "{", '"', "\\", "#", "/" + "x" * 300, "~", "é",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.text(max_size=40)))
def test_any_text_is_read_or_refused_in_one_line(text):
    for read in (parse_reward, is_spec):
        try:
            read(text)
        except ValueError as error:
            assert read is parse_reward and str(error).splitlines() == [str(error)], error


@pytest.mark.parametrize(
    "text",
    ["(" * 4000 + "bleu" + ")" * 4000, "1*" * 4000 + "bleu", "clip(" * 900 + "bleu" + ", 0, 1)" * 900,
     "bleu" + "*" * 9990, "bleu" + " " * 9990 + "x", "bleu" * 10**6, "bleu[a=" + "{" * 9000 + "]",
     "bleu*1e200*1e200", "model:" + "a" * 9000 + "*x"],
)  # fmt: skip
def test_long_and_deep_texts_end_soon(text):
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        build_reward(parse_reward(text))
    assert "\n" not in str(caught.value) and time.monotonic() - started < 20.0


def test_folders_and_files_without_what_is_needed(tmp_path, mine):
    with pytest.raises(ValueError, match="a model's folder is written 'model:"):
        parse_reward(str(tmp_path))
    with pytest.raises(ValueError, match=r"say which function of the file, as in .*my rewards.py:function"):
        parse_reward(mine)
    (tmp_path / "judge.toml").write_text("")
    with pytest.raises(ValueError, match="the settings of that judge belong in its file"):
        parse_reward(f"judge:{tmp_path}/judge.toml[workers=2]")


def test_what_is_a_reward_and_what_a_models_name(tmp_path):
    for text in ("model:a", "judge:b.toml", "bleu", "rougeL[stem=true]", "clip(a, 0, 1)", "f.py:g", "m:g", "bleu*2"):
        assert is_spec(text), text
    for text in ("bleu*x", "bleu+chrf"):  # slips, which are told as such
        assert is_spec(text), text
    for text in ("some-owner/bleu", "runs/own/reward-model", str(tmp_path), "gpt2", "./x:y z"):
        assert not is_spec(text), text


# --- what is made of it ---------------------------------------------------------------------------------------------


def test_functions_of_a_file_with_its_neighbours(mine):
    assert score(f"{mine}:length") == [3.0, 1.0]
    assert score(f"{mine}:scaled[factor=2]*0.5 + {mine}:length") == [6.0, 2.0]
    assert score(f"{mine}:Counter") == [2.0, 0.0] and score(f"{mine}:Counter[letter=b]") == [1.0, 1.0]
    assert str(Path(mine).parent) not in sys.path
    Path(mine).write_text(MINE.replace("+ bonus", "+ 100"))  # runs anew once it has changed
    assert score(f"{mine}:length") == [103.0, 101.0]


def test_composed(mine):
    assert score(f"clip({mine}:length, 0, 2)*10") == [20.0, 10.0]
    assert score(f"standardise({mine}:length, 1, 2)") == [1.0, 0.0]
    assert score([f"{mine}:length", "bleu*2"], reference=["aab", "x"]) == [5.0, 1.0]
    assert score("bleu[column=german]", german=["aab", "x"]) == [1.0, 0.0]


def test_standardise_takes_samples_once(mine):
    calls = []

    def samples():
        calls.append(1)
        return Samples(["p"] * 2, ["a", "aaa"], [[1]] * 2, ["stop"] * 2, {"reference": ["a", "x"]})

    text = f"standardise({mine}:length) + standardise(bleu) + standardise({mine}:length, 2, 1)"
    assert score(text, samples=samples, reference=["aab", "x"]) == [1.0 + 1.0 + 1.0, -1.0 - 1.0 - 1.0]
    assert calls == [1]
    assert score(f"{mine}:length", samples=samples) == [3.0, 1.0] and calls == [1]  # not where they are not needed
    with pytest.raises(ValueError, match="standardise needs mean and std here"):
        score(f"standardise({mine}:length)")
    with pytest.raises(ValueError, match="gives all 2 samples of the reference the score 0"):
        score(f"standardise({mine}:Counter[letter=z])", samples=samples)


def test_messages_for_functions_of_ones_own(mine):
    messages = [[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]] * 2
    assert score(f"chat({mine}:roles)") == [11.0, 11.0]
    assert score(f"{mine}:roles", conversational=True, messages=messages) == [12.0, 12.0]
    made = build_reward(parse_reward(f"chat({mine}:roles) + bleu"), conversational=True)
    assert [type(part) for _, part in made.parts][0] is Conversational and len(list(leaves(made))) == 2
    both = score(f"{mine}:roles + bleu", conversational=True, messages=messages, reference=["aab", "x"])
    assert both == [13.0, 12.0]  # metrics go on reading text


def test_models(tmp_path):
    folders = byo.make(tmp_path)
    place = folders.options["reward_model"]
    made = build_reward(parse_reward(f"model:{place}"))
    assert isinstance(made, LearnedReward)
    sizes = [
        build_reward(parse_reward(f"model:{place}{more}"), batch_size=3).batch_size for more in ("", "[batch_size=7]")
    ]
    assert sizes == [3, 7] and made.batch_size == 64
    raw = score(f"model:{place}")
    in_units = build_reward(parse_reward(f"standardise(model:{place}, 1, 2)"))
    assert isinstance(in_units, LearnedReward) and in_units.normalise == (1.0, 2.0)  # still one learned reward
    assert score(f"standardise(model:{place}, 1, 2)") == pytest.approx([(x - 1) / 2 for x in raw])
    assert isinstance(build_reward(parse_reward("standardise(bleu, 1, 2)")), Standardise)
    two = tmp_path / "judge"
    first, second = score(f"model:{two}[label=0]"), score(f"model:{two}[label=LABEL_1]")
    assert first == pytest.approx([-x for x in second])
    assert all(0 < p < 1 for p in score(f"model:{two}[output=probability]"))
    with pytest.raises(ValueError, match="takes label, output and template, not labels"):
        score(f"model:{two}[labels=0]")
    with pytest.raises(ValueError, match="no label 'happy'"):
        score(f"model:{two}[label=happy]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}:lenght", "that name does not exist: did you mean 'length'"),
        ("{file}:CONSTANT", "that name is not callable: there are"),
        ("{file}:Counter[letters=b]", "the class cannot be made: .*letters"),
        ("no_such_package.rewards:f", "there is no module 'no_such_package' on the import path"),
        ("os.path:no_such", "that name does not exist"),
        ("bleu[colum=x]", "bleu does not take colum='x'"),
        ("judge:http://127.0.0.1:1/v1#m[speed=3]", "no setting 'speed'"),
        ("judge:127.0.0.1#m", "expected an address"),
    ],
)
def test_what_cannot_be_made(mine, text, message):
    with pytest.raises(ValueError, match=message):
        build_reward(parse_reward(text.format(file=mine)))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n1 / 0\n", r"my rewards.py, line 2: ZeroDivisionError: division by zero"),
        ("def f(:\n", "my rewards.py, line 1: SyntaxError"),
        ("import no_such_thing\n", "line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("import sys\nsys.exit(0)\n", "my rewards.py, line 2: it calls sys.exit: 0"),
        ("raise SystemExit\n", "my rewards.py, line 1: it calls sys.exit"),
        ("x = 1\n\0", "my rewards.py(, line \\d+)?: (SyntaxError|ValueError): source code .* null bytes"),
        ("raise ValueError('two\\nlines \\x1b[2J')\n", r"line 1: ValueError: two lines \\x1b\[2J$"),
        ("import sys\nsys.path.clear()\n1 / 0\n", "line 3: ZeroDivisionError"),
        ("class f:\n    pass\n", "the class has no method __call__"),
        ("class f:\n    def __init__(self):\n        1 / 0\n", "cannot be made: .*my rewards.py, line 3: Zero"),
        ("class f:\n    def __init__(self):\n        raise SystemExit(0)\n", "cannot be made: .* sys.exit: 0"),
        ("class f:\n    def __init__(self, factor):\n        pass\n", "cannot be made: .*missing 1 required"),
    ],
)
def test_a_file_that_fails_is_told_with_its_line(mine, code, message):
    Path(mine).write_text(code)
    before = sys.path[:]
    try:
        with pytest.raises(ValueError, match=message) as caught:
            build_reward(parse_reward(f"{mine}:f"))
    finally:
        sys.path[:] = before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys\nsys.exit(0)\n",
            r"mymodule:f: the module cannot be imported: .*mymodule.py, line 2: it calls sys",
        ),
        (
            "import no_such_thing\n",
            "cannot be imported: .*line 1: ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("1 / 0\n", "cannot be imported: .*mymodule.py, line 1: ZeroDivisionError"),
        (
            "def f(completions, *, factor=1):\n    return []\n",
            "mymodule:f: its settings: .*unexpected keyword.*'speed'",
        ),
    ],
)
def test_a_module_that_fails_is_told(tmp_path, monkeypatch, code, message):
    (tmp_path / "mymodule.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodule", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        build_reward(parse_reward("mymodule:f[speed=3]"))
    assert "\n" not in str(caught.value)
