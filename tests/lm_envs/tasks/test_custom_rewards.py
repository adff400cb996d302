"""The custom task with rewards of one's own: files, metrics, compositions, columns and conversations."""

from __future__ import annotations

import json
import shutil

import pytest

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.reward.base import Standardise
from lm_envs.reward.learned import LearnedReward
from lm_envs.tasks import load
from tests.lm_envs import byo

pytest.importorskip("sacrebleu", reason="sacreBLEU is not installed: pip install 'lm-envs[metrics]'")

QUICK = {"max_new_tokens": 4, "samples": 8}
CODE = """
def known(prompts, completions, number, **kwargs):
    return [float(n) for n in number]


def letters(completions, **kwargs):
    return [float(sum(c.isalpha() for c in text)) for text in completions]


def last_word(prompts, completions, **kwargs):
    assert all(c[0]["role"] == "assistant" for c in completions)
    return [float(len(messages)) for messages in prompts]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> byo.Folders:
    made = byo.make(tmp_path_factory.mktemp("own"))
    (made.root / "mine.py").write_text(CODE)
    rows = [{"prompt": text[:-2], "number": i, "reference": text} for i, text in enumerate(byo.TEXTS)]
    byo.write_jsonl(made.root / "prompts.jsonl", rows)
    return made


def custom(folders, *reward, **more):
    given = {"policy": folders.options["policy"], "prompts": folders.options["prompts"], **QUICK, **more}
    return load("custom", **given, reward=[text.replace("MINE", str(folders.root / "mine.py")) for text in reward])


def sampled(task, episodes=64):
    env = TextVectorEnv(task)
    return rollout(env, LMPolicy.for_mdp(env.mdp, task.reference), episodes=episodes, seed=1), env


def test_columns_of_the_file_reach_a_function_of_ones_own(folders):
    task = custom(folders, "MINE:known", judge="bleu")
    traj, env = sampled(task)
    numbers = {text[:-2]: i for i, text in enumerate(byo.TEXTS)}
    prompts, _ = env.mdp.texts(traj.prompt.numpy(), traj.response.numpy())
    assert traj.score.tolist() == [numbers[text] for text in prompts]
    assert task.judge.__name__ == "bleu" and task.stats == {}
    assert task.description.endswith("by known")


def test_a_composition_is_summed_and_left_in_its_own_units(folders):
    task = custom(folders, "MINE:letters*2", "clip(MINE:known, 0, 1)", "bleu*0.5")
    traj, env = sampled(task)
    texts = env.mdp.texts(traj.prompt.numpy(), traj.response.numpy())[1]
    numbers = [min(float(n), 1.0) for n in env.mdp.columns(traj.prompt_index.numpy())["number"]]
    base = [2 * sum(c.isalpha() for c in text) + n for text, n in zip(texts, numbers, strict=True)]
    extra = [s - b for s, b in zip(traj.score.tolist(), base, strict=True)]
    assert all(-1e-6 <= x <= 0.5 for x in extra) and any(x > 0 for x in extra)
    assert task.reward.__name__ == "2*letters + 1*clip(known, 0, 1) + 0.5*bleu"


def test_standardise_takes_the_references_samples(folders):
    task = custom(folders, "standardise(MINE:letters)", samples=128)
    assert isinstance(task.reward, Standardise) and task.stats["reward_std"] == task.reward.std
    scores = sampled(task, 256)[0].score
    assert abs(float(scores.mean())) < 0.4 and 0.6 < float(scores.std()) < 1.6
    whole = custom(folders, "MINE:letters", normalise=True, samples=128)
    assert (whole.reward.mean, whole.reward.std) == (task.reward.mean, task.reward.std)


def test_the_shorthand_says_the_same_as_its_long_form(folders):
    short = load("custom", **folders.options, **QUICK)
    long = custom(folders, f"standardise(model:{folders.options['reward_model']})")
    assert isinstance(long.reward, LearnedReward)
    assert long.reward.normalise == short.reward.normalise and long.stats == short.stats
    with pytest.raises(ValueError, match=r"reward_model is short for one reward.*standardise\(model:"):
        custom(folders, "bleu", reward_model=folders.options["reward_model"])


def test_what_cannot_be_is_said_before_models_are_loaded(folders, monkeypatch):
    monkeypatch.setattr("lm_envs.model.loading.load_policy", lambda *a: pytest.fail("too late"))
    with pytest.raises(ValueError, match="did you mean 'bleu'"):
        custom(folders, "blue")
    with pytest.raises(ValueError, match="judge is judge:URL#MODEL"):
        custom(folders, "bleu", judge="judge:http://127.0.0.1:1")
    with pytest.raises(ValueError, match="missing: reward_model"):
        load("custom", policy="x", prompts="y")


def test_conversations_reach_functions_as_messages(folders, tmp_path):
    policy = shutil.copytree(folders.options["policy"], tmp_path / "policy")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config = json.loads((policy / "tokenizer_config.json").read_text())
    (policy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    chats = [[{"role": "user", "content": text[:-2]}] for text in byo.TEXTS[:6]]
    chats += [[{"role": "system", "content": "be brief"}, *chat] for chat in chats]
    path = byo.write_jsonl(tmp_path / "p.jsonl", [{"prompt": chat} for chat in chats])
    task = custom(folders, "MINE:last_word", policy=str(policy), prompts=str(path), kl_coef=0.0)
    traj, env = sampled(task)
    columns = env.mdp.columns(traj.prompt_index.numpy())
    assert traj.score.tolist() == [len(m) for m in columns["messages"]] and len(set(traj.score.tolist())) == 2
    assert task.reward.__name__ == "last_word"


def test_equal_prompts_with_other_columns_are_rows_of_their_own_in_one_split(folders, tmp_path):
    rows = [{"prompt": f"a cat {i}", "number": i} for i in range(4)]
    path = byo.write_jsonl(tmp_path / "p.jsonl", [*rows, rows[0], {"prompt": "a cat 1", "number": 9}])
    task = custom(folders, "MINE:known", prompts=str(path))
    assert sorted(n for columns in task.columns.values() for n in columns["number"]) == [0, 1, 2, 3, 9]
    (split,) = [name for name, columns in task.columns.items() if 1 in columns["number"]]
    assert 9 in task.columns[split]["number"]  # what is held out is not trained on under another reference


def test_a_row_without_a_column_has_none_there(folders, tmp_path):
    rows = [{"prompt": f"a cat {i}", **({"reference": "x"} if i % 2 else {})} for i in range(6)]
    path = byo.write_jsonl(tmp_path / "p.jsonl", rows)
    task = custom(folders, "bleu", "MINE:letters", prompts=str(path))
    assert {v for columns in task.columns.values() for v in columns["reference"]} == {None, "x"}
    sampled(task, 16)  # where there is no reference, the other part alone counts
    with pytest.raises(ValueError, match="line 1: 'reference'"):  # alone it would have nothing to say
        custom(folders, "bleu", prompts=str(path))


def test_a_column_with_a_name_that_rewards_use_is_refused(folders, tmp_path):
    path = byo.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"a {i}", "completion_ids": 1} for i in range(4)])
    with pytest.raises(ValueError, match="line 1: rewards receive something else as 'completion_ids'"):
        custom(folders, "MINE:letters", prompts=str(path))


@pytest.mark.parametrize("given", [None, 3, [], ["the cat", 4]])
def test_a_missing_or_broken_reference_is_found_at_once_with_its_line(folders, given, tmp_path):
    rows = [{"prompt": text[:-2], "reference": text} for text in byo.TEXTS]
    rows[2]["reference"] = given
    path = str(byo.write_jsonl(tmp_path / "prompts.jsonl", rows))
    with pytest.raises(ValueError, match="line 3: 'reference', which 'bleu' compares with, must be a text"):
        custom(folders, "bleu", prompts=path)
    if given is None:  # where another part is the reward
        custom(folders, "bleu", "MINE:letters", prompts=path)


def test_a_function_that_fails_is_named_with_its_line(folders, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def boom(completions, **columns):\n    return [1 / 0 for _ in completions]\n")
    with pytest.raises(ValueError, match=r"reward '\S*boom' raised ZeroDivisionError: .*bad\.py, line 2, in \S+\)"):
        sampled(custom(folders, f"{path}:boom"))
