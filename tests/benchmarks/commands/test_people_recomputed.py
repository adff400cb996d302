"""Each option of ``lm-envs people`` reaches what it is for, and what rounds of a study ask, train and report is
computed here a second time."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lm_envs import rng
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.commands import people, people_items, people_loop, people_terminal
from lm_envs.benchmarks.commands.learn import RewardModel
from lm_envs.benchmarks.commands.train import Train
from lm_envs.feedback import annotators, exchange, ratings, summary
from lm_envs.feedback.annotators import Annotator, work
from lm_envs.feedback.store import Store, Task, open_study
from lm_envs.feedback.study import INSTRUCT_FLAGS, Answer, Item, Response, StudySettings
from lm_envs.files import read_toml
from tests.lm_envs import byo


def items(count: int = 1, sources: tuple[str, ...] = ("one", "sft", "two")) -> list[Item]:
    return [
        Item(f"p{k}", tuple(Response(f"{name} {k}", name) for name in sources), columns={"n": k}) for k in range(count)
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets another one answer in place of a name, and notes what it is given."""

    def instead(owner: Any, name: str, answer: Any) -> list[Any]:
        seen: list[Any] = []
        monkeypatch.setattr(owner, name, lambda *given, **more: seen.append((*given, *more.values())) or answer)
        return seen

    return instead


def test_a_new_study_of_policies(tmp_path: Path, asked: Any) -> None:
    seen = asked(people_items, "sampled", items(2))
    gold = byo.write_jsonl(tmp_path / "g.jsonl", [{"prompt": "g", "completions": ["x", "y"], "ranks": [7, 2]}])
    words = ["people", "new", "--out", tmp_path / "s", "--policy", "P", "--prompts", "F", "--responses", 5]
    words += ["--temperature", 0.5, "--max-new-tokens", 9, "--limit", 2, "--seed", 3, "--overlap", 4, "--flags"]
    main([str(word) for word in [*words, "--mode", "rank", "--gold", gold]])
    assert seen == [(("P",), "F", 5, (0.5,), 9, 3, 2)]
    store = open_study(tmp_path / "s")
    assert [(item.prompt, item.known, dict(item.columns)) for item in store.items().values()] == [
        ("p0", (), {"n": 0}),
        ("p1", (), {"n": 1}),
        ("g", (1, 0), {}),
    ]
    found = store.settings
    assert (found.name, found.mode, found.overlap, found.seed, found.flags) == ("s", "rank", 4, 3, INSTRUCT_FLAGS)
    assert found.question == "Rank the responses, the best first."
    loop = read_toml(tmp_path / "s" / "loop.toml")
    expected = {"policy": "P", "prompts": "F", "responses": 5, "temperature": 0.5, "max_new_tokens": 9, "seed": 3}
    assert loop == expected | {"limit": 2, "reward_model": {}, "train": {"algorithm": "ppo"}}


@pytest.mark.parametrize("source", ["comparison", "texts"])
def test_a_new_study_of_what_there_is(tmp_path: Path, asked: Any, source: str) -> None:
    seen = asked(people_items, {"comparison": "compared", "texts": "of_file"}[source], items())
    more = ["--task", "t"] if source == "comparison" else []
    main(["people", "new", "--out", str(tmp_path / "s"), f"--{source}", "X", *more, "--limit", "3"])
    assert seen == [(Path("X"), *more[1:], 3)]
    pairs = [
        tuple(response.source for response in item.responses) for item in open_study(tmp_path / "s").items().values()
    ]
    by_source = {
        "comparison": [("one", "sft"), ("two", "sft")],
        "texts": [("one", "sft"), ("sft", "two"), ("two", "one")],
    }
    assert pairs == by_source[source]
    settings = open_study(tmp_path / "s").settings
    assert settings.flags == {} and settings.question == "Which response is better?"
    assert not (tmp_path / "s" / "loop.toml").exists()


def made(folder: Path, mode: Any = "rank", count: int = 3, **settings: Any) -> Store:
    """A study of three sources."""
    from lm_envs.feedback.study import write_settings

    folder.mkdir()
    found = StudySettings("s", mode, **settings)
    write_settings(folder / "study.toml", asdict(found))
    store = Store(folder, found)
    store.add_items(items(count))
    return store


def test_simulated_annotators_are_those_of_the_options(tmp_path: Path, asked: Any, capsys: Any) -> None:
    made(tmp_path / "s")
    seen = asked(annotators, "work", 7)
    words = [
        "--annotators",
        "2",
        "--strength",
        "one=1.5",
        "--strength",
        "two=-2",
        "--temperature",
        "0.3",
        "--seed",
        "5",
    ]
    words += ["--flip", "0.25", "--length-bias", "0.125", "--position-bias", "0.75", "--limit", "6"]
    main(["people", "simulate", str(tmp_path / "s"), *words])
    assert capsys.readouterr().err.strip() == "14 answers by 2 simulated annotators"
    for number, (_, name, person, limit) in enumerate(seen):
        assert (name, limit, person.seed) == (f"simulated-{number + 1}", 6, 5000 + number)
        assert (person.temperature, person.flip, person.per_character, person.first) == (0.3, 0.25, 0.125, 0.75)
        assert person.score(items()[0]) == [1.5, 0.0, -2.0]
    assert len(seen) == 2


def test_results_are_those_asked_for(tmp_path: Path, asked: Any, capsys: Any) -> None:
    store = made(tmp_path / "s")
    work(store, "ann", Annotator(lambda item: [0.0, 0.0, 0.0]))
    seen = asked(summary, "summarize", {"Table": [{"a": 0.126, "b": float("nan"), "c": "x"}]})
    scored = asked(people_loop, "scores_of", [[1.0]])
    main(["people", "results", str(tmp_path / "s"), "--against", "two", "--reward-model", "R"])
    assert seen == [(store.judgments(), "two", [[1.0]])] and scored == [("R", list(store.items().values()))]
    assert capsys.readouterr().out.split("\n")[-2].split() == ["0.13", "│", "-", "│", "x"]


@pytest.mark.parametrize("layout", ["kwise", "pairs", "csv"])
def test_an_export_has_its_layout(tmp_path: Path, asked: Any, layout: str, capsys: Any) -> None:
    made(tmp_path / "s")
    seen = asked(exchange, "write", 5)
    main(["people", "export", str(tmp_path / "s"), "F", "--layout", layout])
    assert seen == [(Path("F"), [], layout)] and capsys.readouterr().err.strip() == "5 rows in F"


def test_the_terminal_and_the_rounds_are_of_the_study_given(tmp_path: Path, asked: Any) -> None:
    store = made(tmp_path / "s")
    seen = asked(people_terminal, "ask_all", None)
    main(["people", "rank", str(tmp_path / "s"), "--annotator", "ben"])
    assert [(given.path, name) for given, name in seen] == [(store.path, "ben")]
    (tmp_path / "s" / "loop.toml").write_text('policy = "P"\nprompts = "F"\n')
    seen = asked(people_loop.Loop, "run", None)
    asked(people_loop.Loop, "report", [])
    for words in ([], ["--anyway"]):
        main(["people", "next", str(tmp_path / "s"), *words])
    assert [given[2] for given in seen] == [False, True]


def test_no_option_is_forgotten_here() -> None:
    """One that is new needs a test above."""
    known = {
        people.New: "out mode policy prompts responses temperature max_new_tokens comparison task texts judged gold "
        "limit overlap flags seed",
        people.Simulate: "study annotators strength temperature flip length_bias position_bias limit seed",
        people.Results: "study against reward_model json",
        people.Next: "study anyway",
        people.Export: "study file layout",
        people.Rank: "study annotator",
    }
    for command, names in known.items():
        assert [field.name for field in fields(command)] == names.split()


# ---- what is sampled ----


def test_samples_are_those_of_each_policy_at_its_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, without a cache; every response has random numbers of its own."""
    monkeypatch.setattr(people_items, "_AT_ONCE", 3)
    tokenizer, seed, new = byo.byte_level_bpe(), 4, 5
    names = [str(tmp_path / name) for name in ("a", "b")]
    for k, name in enumerate(names):
        byo.llama(len(tokenizer), seed=k).save_pretrained(name)
        tokenizer.save_pretrained(name)
    texts = ["the old cat", "a small bird saw", "grey", "the fish"]
    rows = byo.write_jsonl(tmp_path / "p.jsonl", [{"prompt": text, "n": k} for k, text in enumerate(texts)])
    found = list(people_items.sampled(names, str(rows), 5, (1.0, 0.25), new, seed, limit=3, first=2))
    assert [(item.prompt, item.columns["n"]) for item in found] == [(texts[k], k) for k in (2, 3, 0)]
    writers = [(name, t) for t in (1.0, 0.25) for name in names]
    models = {name: AutoModelForCausalLM.from_pretrained(name).eval() for name in names}
    for row, item in enumerate(found):
        told = [(writer, number) for writer in writers for number in range(5) if writers[number % 4] == writer]
        for response, ((name, temperature), number) in zip(item.responses, told, strict=True):
            assert response.source == f"{name} at temperature {temperature:g}"
            ids = tokenizer(item.prompt)["input_ids"]
            said = list(ids)
            for t in range(new):
                with torch.no_grad():
                    logits = models[name](torch.tensor([said])).logits[0, -1].double()
                p = torch.softmax(logits / temperature, dim=-1).numpy()
                u = float(rng.uniform(seed, rng.TOKEN, np.array([1000 * row + number]), np.array([t]))[0])
                said.append(int((np.cumsum(p) <= u).sum()))
                if said[-1] == tokenizer.eos_token_id:
                    break
            text = tokenizer.decode(said, skip_special_tokens=True)
            assert response.text == text.removeprefix(item.prompt)
    assert len({response.text for item in found for response in item.responses}) > 8


def test_scores_of_a_reward_model_are_of_prompt_and_response_with_the_end(tmp_path: Path) -> None:
    tokenizer = byo.byte_level_bpe()
    torch.manual_seed(2)
    base = byo.llama(len(tokenizer))
    from transformers import LlamaForSequenceClassification

    base.config.num_labels, base.config.pad_token_id = 1, 1
    LlamaForSequenceClassification(base.config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    made = [
        Item("the old cat", (Response(" saw", "a"), Response(" ate a fish", "b"))),
        Item("a", (Response(" b", "a"),) * 2),
    ]
    found = people_loop.scores_of(str(tmp_path / "m"), made)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    for item, row in zip(made, found, strict=True):
        for response, score in zip(item.responses, row, strict=True):
            ids = [*tokenizer(item.prompt + response.text)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                assert score == pytest.approx(float(model.score(hidden)), abs=1e-5)


def test_pairs_of_an_item_keep_its_ranks_and_columns() -> None:
    (item,) = items()
    item = Item(item.prompt, item.responses, known=(2, 0, 1), columns=item.columns)
    found = list(people_items.in_pairs([item], "sft"))
    assert [(each.known, each.columns) for each in found] == [((2, 0), {"n": 0}), ((1, 0), {"n": 0})]
    around = list(people_items.in_pairs([item]))
    assert [each.known for each in around] == [(2, 0), (0, 1), (1, 2)]
    judged = list(people_items.judged_in_pairs([(item, "ann", Answer(ranks=(2, 0, 1), seconds=3.0))]))
    assert [answer.ranks for *_, answer in judged] == [(1, 0), (0, 1), (0, 1)]
    two = Item("p", item.responses[:2])
    assert list(people_items.in_pairs([two])) == [two]


def test_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = byo.write_jsonl(tmp_path / "t.jsonl", [{"prompt": f"p{k}", "completions": ["x", "y"]} for k in range(4)])
    assert [item.prompt for item in people_items.of_file(rows, 3)] == ["p0", "p1", "p2"]

    class Method:
        def __init__(self, label: str) -> None:
            self.label = label

        def test_samples(self) -> list[dict[str, str]]:
            return [{"prompt": f"p{k}", "response": f"{self.label} {k}"} for k in range(4)]

    monkeypatch.setattr(people_items, "collect_results", lambda folder: [])
    monkeypatch.setattr(people_items, "gather", lambda folder, rows: [])
    monkeypatch.setattr(people_items, "by_task", lambda series: {"t": [Method("sft"), Method("ppo")]})
    found = list(people_items.compared(tmp_path, None, 2))
    assert found == [Item(f"p{k}", (Response(f"sft {k}", "sft"), Response(f"ppo {k}", "ppo"))) for k in (0, 1)]
    assert len(list(people_items.compared(tmp_path, "t", None))) == 4


# ---- rounds ----

LOOP = """
policy = "P"
prompts = "{prompts}"
responses = 3
temperature = 0.5
max_new_tokens = 7
limit = 2
seed = 5
[reward_model]
learning_rate = 0.125
{more}
[train]
algorithm = "rloo"
iterations = 4
env = ["kl_coef=0.5"]
"""


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[people_loop.Loop, dict[str, list[Any]]]:
    """A study of rounds whose samples and trainings are stood in for, and what those were asked for."""
    splits = ("train", "test", "train", "validation", "train")
    rows = [{"prompt": f"p{k}", "split": split} for k, split in enumerate(splits)]
    prompts = byo.write_jsonl(tmp_path / "p.jsonl", rows)
    folder, seen = tmp_path / "s", {"sampled": [], "rm": [], "train": []}
    store = made(folder, count=0, overlap=2)
    (folder / "loop.toml").write_text(LOOP.format(prompts=prompts, more=""))

    def sampled(policies: list[str], *given: Any, first: int) -> Any:
        seen["sampled"].append((policies, *given, first))
        for k in range(2):
            names = [policies[place % len(policies)] for place in range(3)]
            said = tuple(Response("x" * (1 + (first + k + 2 * place) % 5), name) for place, name in enumerate(names))
            yield Item(f"p{(first + k) % 5}", said)

    def train(self: Train, console: Console) -> None:
        seen["train"].append(self)
        (self.out / "custom" / "rloo" / "seed-5").mkdir(parents=True)

    def learn(self: RewardModel, console: Console) -> None:
        seen["rm"].append(self)
        self.out.mkdir()

    def scores_of(place: str, judged: list[Item]) -> list[list[float]]:
        sign = -1 if "round-1" in place else 1
        return [[sign * len(r.text) for r in item.responses] for item in judged]

    monkeypatch.setattr(people_items, "sampled", sampled)
    monkeypatch.setattr(people_loop, "finished", lambda folder: {} if folder.exists() else None)
    monkeypatch.setattr(people_loop, "write_results", lambda out: None)
    monkeypatch.setattr(RewardModel, "run", learn)
    monkeypatch.setattr(Train, "run", train)
    monkeypatch.setattr(people_loop, "scores_of", scores_of)
    return people_loop.Loop(folder, store), seen


def go_on(loop: people_loop.Loop, anyway: bool = False) -> str:
    told = io.StringIO()
    loop.run(Console(file=told, width=500), anyway)
    return told.getvalue()


def answer(store: Store, limit: int | None = None) -> None:
    for seed, name in enumerate(("ann", "ben")):
        work(store, name, Annotator(lambda item: [0.3 * len(r.text) for r in item.responses], seed=seed), limit)


def test_rounds_ask_and_train_as_they_are_set(rounds: tuple[people_loop.Loop, dict[str, list[Any]]]) -> None:
    loop, seen = rounds
    folder, store = loop.folder, loop.store
    assert "round 0 waits for 4 answers" in go_on(loop)
    for number in (0, 1):
        answer(store)
        assert f"round {number + 1} waits for 4 answers" in go_on(loop)
    models = ["P", *(str(folder / f"round-{k}" / "policy" / "custom" / "rloo" / "seed-5" / "model") for k in (0, 1))]
    prompts = loop.settings.prompts
    assert seen["sampled"] == [
        (models[k::-1][:2], prompts, 3, (0.5,), 7, 5 + k, 2, 2 * k) for k in range(3)
    ]  # the newest policy and the one before
    names = ["P", "policy 1", "policy 2"]
    told = [[response.source for response in item.responses] for item in store.items().values()]
    assert told == [[[names[k], names[max(k - 1, 0)]][place % 2] for place in range(3)] for k in (0, 0, 1, 1, 2, 2)]
    for k, (rm, train) in enumerate(zip(seen["rm"], seen["train"], strict=True)):
        at = folder / f"round-{k}"
        assert (rm.model, rm.data, rm.out) == ("P", str(at / "answers.jsonl"), at / "reward-model")
        assert (rm.seed, rm.bad, rm.learning_rate, rm.resume, train.resume) == (5, "skip", 0.125, True, True)
        assert (train.algorithm, train.seed, train.ends.iterations, train.out) == ("rloo", 5, 4, at / "policy")
        assert train.env == ("temperature=0.5", "max_new_tokens=7", "kl_coef=0.5")
        own = train.own
        assert (own.policy, own.prompts, own.reference) == (models[k], prompts, "P")
        assert own.reward_model == str(at / "reward-model" / "model")


def test_what_rounds_report(rounds: tuple[people_loop.Loop, dict[str, list[Any]]]) -> None:
    loop, _ = rounds
    for _ in range(2):
        go_on(loop)
        answer(loop.store)
    answer(loop.store, 1)
    go_on(loop)
    judgments = loop.store.judgments()

    def right(number: int, sign: int, held: bool) -> float:
        """The share of a round's decided pairs in which the longer (shorter) text won."""
        found = []
        for judgment in judgments:
            item = judgment.content
            here = judgment.item in (2 * number + 1, 2 * number + 2)
            if here and (not held or int(str(item.prompt)[1:]) % 2):
                ranks, lengths = judgment.answer.ranks, [sign * len(r.text) for r in item.responses]
                for i in range(3):
                    for j in range(3):
                        if ranks[i] < ranks[j]:
                            found.append(0.5 + 0.5 * np.sign(lengths[i] - lengths[j]))
        return float(np.mean(found))

    known = [json.loads((loop.folder / f"round-{k}" / "accuracy.json").read_text()) for k in (0, 1)]
    assert known[0]["accuracy"][0] == pytest.approx(right(0, 1, True)) and "accuracy before" not in known[0]
    assert known[1]["accuracy"][0] == pytest.approx(right(1, -1, True))
    assert known[1]["accuracy before"][0] == pytest.approx(right(1, 1, False))
    assert right(1, 1, True) != right(1, 1, False)
    rows, rated = loop.report(), ratings.bradley_terry(ratings.battles(judgments))
    assert [(row["round"], row["answers"]) for row in rows] == [(0, 4), (1, 4), (2, 0)]
    for k, (row, name) in enumerate(zip(rows[:2], ("P", "policy 1"), strict=True)):
        elo = rated[name]
        assert row["Elo"] == f"{elo.value:.0f} [{elo.low:.0f}, {elo.high:.0f}]"
        share, low, high = known[k]["accuracy"]
        assert row["accuracy"] == f"{share:.2f} [{low:.2f}, {high:.2f}]"
    assert rows[0]["accuracy before"] == "-" and rows[1]["accuracy before"].startswith(f"{right(1, 1, False):.2f}")
    assert rows[2]["Elo"] == "-" and rows[2]["accuracy"] == "-"


def test_to_go_on_anyway_is_for_the_round_that_waits(rounds: tuple[people_loop.Loop, dict[str, list[Any]]]) -> None:
    loop, seen = rounds
    assert "round 0 waits for 4" in go_on(loop, anyway=True)  # nobody has answered
    work(loop.store, "ann", Annotator(lambda item: [0.0, 1.0, 2.0], temperature=0), 1)
    store = loop.store
    store.next(store.annotator("ann"))
    told = go_on(loop, anyway=True)
    assert "round 1 waits for 4" in told and len(seen["train"]) == 1
    work(store, "ann", Annotator(lambda item: [0.0, 1.0, 2.0], temperature=0), 2)
    assert "round 1 waits for 3" in go_on(loop)  # the second of them is of round 0
    assert "round 2 waits for 4" in go_on(loop, anyway=True) and len(seen["train"]) == 2


def test_a_reward_model_and_a_training_may_have_settings_of_their_own(
    rounds: tuple[people_loop.Loop, dict[str, list[Any]]],
) -> None:
    loop, seen = rounds
    path = loop.folder / "loop.toml"
    path.write_text(
        LOOP.format(prompts=loop.settings.prompts, more='model = "M"\nseed = 9').replace("iterations", "seed")
    )
    loop = people_loop.Loop(loop.folder, loop.store)
    go_on(loop)
    answer(loop.store)
    go_on(loop)
    assert (seen["rm"][0].model, seen["rm"][0].seed, seen["train"][0].seed) == ("M", 9, 4)


# ---- the terminal ----


def test_what_is_typed_is_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(people_terminal.time, "monotonic", lambda: float(next(clock)))
    store = made(tmp_path / "s", "rate", count=4, seed=8, scale=9)
    lines = ["3 9 1", "s too  long", "note hm", "5 5 2", "u", "7 1 1", "u", "u", "s", "q"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    people_terminal.ask_all(store, "ann")
    found = {judgment.item: judgment for judgment in store.judgments()}
    typed = {number: [j.answer.ratings[place] for place in j.order] for number, j in found.items() if j.answer.ratings}
    assert any(list(judgment.order) != [0, 1, 2] for judgment in found.values())
    assert typed == {1: [3, 9, 1], 3: [7, 1, 1]} and found[3].answer.notes == "hm"  # kept when it was changed
    assert found[2].answer.skipped == "no reason given" and found[1].answer.seconds == 10.0
    assert "1 answered, 3 left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "ranks"),
    [("cab", [1, 2, 0]), ("c(ab)", [1, 1, 0]), ("(bc)a", [1, 0, 0]), ("(ab)(c)", [0, 0, 1]), ("( a c ) b", [0, 1, 0])],
)
def test_rankings_typed(typed: str, ranks: list[int]) -> None:
    task = Task(1, items()[0], (2, 0, 1), 0, None)
    shown = people_terminal._read(typed, task, "rank")["ranks"]
    assert [shown[place] for place in task.order] == ranks
    assert math.isfinite(sum(shown))
