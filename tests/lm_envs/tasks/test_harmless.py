"""Helpful and harmless answers: scores by hand, what ships, preferences as in HH, and that no text is shown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lm_envs.benchmarks.cli import main
from lm_envs.reward.base import WeightedSum, call_reward, part_means
from lm_envs.tasks import harmless, load, prompted
from tests.lm_envs import byo

SECRET = "zanzibar"  # stands in every text of the data
TOPIC = ["cookie", "oven"]


def shipped() -> list[prompted.Row]:
    return prompted.read(prompted.SHIPPED / "harmless.jsonl", harmless._row)


def hh(k: int, **changes: str) -> dict[str, str]:
    before = f"\n\nHuman: {SECRET} {k}?\n\nAssistant: {SECRET} yes.\n\nHuman: {SECRET} more\n\nAssistant:"
    return {"chosen": f"{before} {SECRET} good {k}", "rejected": f"{before} {SECRET} bad {k}", **changes}


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    return str(byo.for_shipped_prompts(tmp_path / "policy"))


def test_the_parts_by_hand():
    texts = [
        "I’m sorry, it is not safe; how about a walk instead?",
        "Sorry, no.",
        "Sure, here is a very mean joke.",
        "Put the cookies into a hot oven now.",
        "Sorry, I never talk about any cookies.",
        "Cookies, oven.",
    ]
    care = [True, True, True, False, False, False]
    given = {"prompts": ["p"] * 6, "completions": texts, "completion_ids": [[1]] * 6, "finish_reasons": ["stop"] * 6}
    assert harmless.harmless(texts, care) == [1.0, 0.0, 0.0, None, None, None]
    assert harmless.helpful(texts, care, [TOPIC] * 6) == [None, None, None, 1.0, -0.5, 0.0]
    reward = WeightedSum([(2.0, harmless.helpful), (1.0, harmless.harmless)])
    assert call_reward(reward, **given, care=care, topic=[TOPIC] * 6).tolist() == [1.0, 0.0, 0.0, 2.0, -1.0, 0.0]
    assert part_means(reward) == pytest.approx({"part_helpful": 1 / 6, "part_harmless": 1 / 3})
    said = ["I cannot do that, it would be unfair; let's talk.", "I am sorry, how about a safe game instead?"]
    assert harmless.judge([*said, texts[3]], [True, True, False], [TOPIC] * 3) == [1.0, 0.0, 1.0]


def test_the_judge_is_held_out():
    for ours, theirs in zip(vars(harmless.REWARDED).values(), vars(harmless.JUDGED).values(), strict=True):
        assert not set(ours) & set(theirs)
    words = {word for row in shipped() for word in (*row["topic"], *row["held"])}
    assert not words & {*harmless.REWARDED.decline, *harmless.JUDGED.decline}  # an answer to a request does not decline
    assert all(not set(row["topic"]) & set(row["held"]) for row in shipped())


def test_what_ships():
    rows = shipped()
    assert Counter(row["split"] for row in rows) == {"train": 144, "validation": 36, "test": 108}
    assert Counter(row["care"] for row in rows) == {True: 144, False: 144}
    assert len({row["prompt"] for row in rows}) == 288
    assert all(len(row["topic"]) == len(row["held"]) == 3 * (not row["care"]) for row in rows)


def test_turns_of_a_dialogue():
    text = "\n\nHuman: a\nb\n\nc\n\nHuman: d\n\nAssistant: \n\nHuman: \n\nAssistant: e\n\nHuman: f\n\nAssistant:"
    found = [("user", "a\nb\n\nc\n\nd"), ("assistant", "e"), ("user", "f")]
    assert harmless.turns(text) == [{"role": role, "content": content} for role, content in found]
    for text in ("f", "\n\nHuman: a\n\nAssistant: b\n\nAssistant:"):
        with pytest.raises(ValueError, match="must end in a turn of 'Human:'"):
            harmless.turns(text)


def test_preferences_give_prompts_and_need_a_reward(policy: str, tmp_path: Path):
    path = byo.write_jsonl(tmp_path / "hh.jsonl", [hh(k) for k in range(6)])
    with pytest.raises(ValueError, match="hh.jsonl: preferences do not say which prompts want care: give a reward"):
        load(f"harmless:{path}?policy={policy}")
    reward = "lm_envs.reward.lengths:tokens"
    with pytest.warns(UserWarning, match="1 test prompt"):
        task = load(f"harmless:{path}?policy={policy}&reward={reward}&max_new_tokens=4")
    assert task.sensitive and task.judge is None and sum(map(len, task.prompts.values())) == 6
    assert [turn["role"] for turn in prompted.read(path, harmless._row)[0]["prompt"]] == ["user", "assistant", "user"]


def test_a_reward_of_ones_own_leaves_the_parts_measured(policy: str):
    task = load("harmless", policy=policy, reward="lm_envs.reward.lengths:tokens", max_new_tokens=4)
    assert [weight for weight, _ in task.reward.parts] == [1.0, 0.0, 0.0]
    weighted = load("harmless", policy=policy, helpful=0.5, max_new_tokens=4, sensitive=False)
    assert [weight for weight, _ in weighted.reward.parts] == [0.5, 1.0] and not weighted.sensitive


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "care": "yes"}, "line 1: 'care' must be true or false, not 'yes'"),
        ({"prompt": "a", "care": False, "topic": ["b"]}, "line 1: 'held' must be a list of texts"),
        ({"prompt": "a"}, "line 1: a row needs 'prompt' and 'care', or is a preference"),
        (hh(1, rejected="\n\nHuman: b"), "line 1: without a column 'prompt', 'chosen' and 'rejected' must be whole"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        prompted.read(byo.write_jsonl(tmp_path / "f.jsonl", [row]), harmless._row)
    assert SECRET not in str(caught.value)


def test_data_check_shows_no_text(tmp_path: Path, capsys):
    bad = [hh(7, rejected=f"\n\nHuman: {SECRET}"), hh(8, chosen=SECRET), hh(9, chosen=""), hh(1), hh(1)]
    path = byo.write_jsonl(tmp_path / "hh.jsonl", [*(hh(k) for k in range(6)), *bad])
    path.write_text(path.read_text() + f'{{"chosen": "{SECRET}\n{SECRET}\n')
    main(["data", "check", str(path), "--all-bad"])
    out = "".join(capsys.readouterr())
    assert "line 7" in out and "duplicates" in out and SECRET not in out


@pytest.mark.slow
def test_a_comparison_shows_texts_only_when_asked(policy: str, tmp_path: Path, capsys):
    """On the screen, in the report and in a study; the samples are in their file."""
    rows = [{"prompt": f"{SECRET} {k}", "care": k % 2 == 0, "topic": ["a"], "held": ["b"]} for k in range(20)]
    path = byo.write_jsonl(tmp_path / "own.jsonl", rows)
    out = tmp_path / "out"
    run = [
        "compare",
        "--task",
        f"harmless:{path}?policy={policy}&max_new_tokens=4",
        "--episodes",
        "16",
        "--out",
        str(out),
    ]
    main([*run, "--algorithms", "sft", "rloo", "--set", "rloo.episodes=8", "--lora-rank", "0"])
    main(["report", str(out)])
    main(["people", "new", "--out", str(tmp_path / "study"), "--comparison", str(out)])
    page = (out / "report.html").read_text()
    assert SECRET not in "".join(capsys.readouterr()) + page and "because they may offend" in page
    assert all(SECRET in file.read_text() for file in out.glob("*/*/*/samples.jsonl"))
    main(["report", str(out), "--show"])
    assert SECRET in (out / "report.html").read_text()
    assert "part_helpful" in (out / "results.csv").read_text()
