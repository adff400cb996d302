"""From a folder with a model, demonstrations, preferences and prompts to tuned models, by commands alone."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForCausalLM,
)

from lm_envs.benchmarks import commands
from lm_envs.benchmarks.cli import main
from lm_envs.benchmarks.run import one_run
from lm_envs.benchmarks.run.data_problem import DataProblem, DataSpec
from lm_envs.feedback import agreement
from lm_envs.model import loading
from lm_envs.model.decoding import Decoder
from lm_envs.model.tokens import left_pad
from lm_envs.reward.learned import load_reward_model, reward_start
from tests.lm_envs import byo

SUBJECTS, VERBS = ["old cat", "grey cat", "small bird"], ["saw", "ate", "hid"]


def make(root: Path, rows: int) -> Path:
    """What a user brings: a model, and three files."""
    tokenizer = byo.byte_level_bpe()
    byo.llama(len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rng = random.Random(0)
    prompts = [f"the {rng.choice(SUBJECTS)} {rng.choice(VERBS)} {i}" for i in range(rows)]
    wanted = [rng.choice([" a small fish .", " a fish ."]) for _ in prompts]
    byo.write_jsonl(
        root / "demonstrations.jsonl",
        [{"prompt": p, "completion": rng.choice([w, " the bird ."])} for p, w in zip(prompts, wanted, strict=True)],
    )
    byo.write_jsonl(
        root / "preferences.jsonl",
        [{"prompt": p, "chosen": w, "rejected": " the bird ."} for p, w in zip(prompts, wanted, strict=True)],
    )
    byo.write_jsonl(root / "prompts.jsonl", [{"prompt": p} for p in prompts[: rows // 2]])
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("brought"), 48)


def run(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def refused(capsys, *arguments: object) -> str:
    assert run(*arguments, "--threads", 1) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lm-envs: ")]
    assert len(said) == 1
    return said[0]


def learn(command: str, model: Path, data: Path, out: Path, *more: object) -> dict:
    settings = ("--learning-rate", 1e-2, "--epochs", 2, "--threads", 1)
    assert run(command, "--model", model, "--data", data, "--out", out, *settings, *more) == 0
    return json.loads((out / "result.json").read_text())


def before(out: Path) -> dict:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(out / "model").state_dict())


def greedy_by_transformers(folder: Path, prompts: list[str], most: int) -> list[str]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=most, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def greedy_by_us(folder: Path, prompts: list[str], most: int) -> list[str]:
    """All rows in one batch, through our own cached decoding."""
    model, tokenizer = loading.load_policy(folder), loading.load_tokenizer(folder)
    rows = tokenizer(prompts)["input_ids"]
    width = max(map(len, rows))
    obs = torch.cat([torch.from_numpy(left_pad(rows, width)), torch.full((len(rows), most), -1)], dim=1)
    decoder, going = Decoder(model), torch.ones(len(rows), dtype=torch.bool)
    for t in range(most):
        tokens = decoder(obs).argmax(dim=1)
        obs[going, width + t] = tokens[going]
        going &= tokens != tokenizer.eos_token_id
    return tokenizer.batch_decode([row[row >= 0] for row in obs[:, width:]], skip_special_tokens=True)


def same_greedy_text(model: Path, prompts: list[str], most: int) -> list[str]:
    texts = greedy_by_us(model, prompts, most)
    assert texts == greedy_by_transformers(model, prompts, most)
    return texts


def pipeline(root: Path, out: Path, quick: bool) -> None:
    epochs, iterations = (4, 2) if quick else (20, 30)
    fast = ("--learning-rate", 1e-2, "--threads", 1)
    sft = ("sft", "--model", root / "model", "--data", root / "demonstrations.jsonl", "--out", out / "sft")
    tuned = out / "sft" / "model"
    preferences = ("--model", tuned, "--data", root / "preferences.jsonl")
    assert run(*sft, "--epochs", epochs, *fast) == 0
    assert run("reward-model", *preferences, "--out", out / "rm", "--epochs", epochs, *fast) == 0
    dpo = ("--epochs", epochs, "--learning-rate", 1e-3, "--threads", 1)
    assert run("dpo", *preferences, "--out", out / "dpo", *dpo) == 0
    parts = ("--policy", tuned, "--reward-model", out / "rm" / "model", "--prompts", root / "prompts.jsonl")
    settings = ("--iterations", iterations, "--set", "episodes=16", "--set", "learning_rate=3e-3")
    rest = ("--env", "max_new_tokens=12", "--validate-every", 0, "--threads", 1)
    assert run("train", *parts, "--algorithm", "ppo", "--out", out / "ppo", *settings, *rest) == 0


def check_pipeline(root: Path, out: Path) -> dict[str, list[str]]:
    """What every run of it must give; the greedy texts of each model."""
    prompts = ["the old cat saw", "the grey cat ate 3", "the small bird hid", "the"]
    final = out / "ppo" / "custom" / "ppo" / "seed-0" / "model"
    folders = {"base": root / "model", "sft": out / "sft/model", "dpo": out / "dpo/model", "ppo": final}
    texts = {name: same_greedy_text(folder, prompts, 12) for name, folder in folders.items()}
    result = json.loads((out / "sft/result.json").read_text())
    assert result["held_out_loss"] < before(out / "sft")["validation_loss"] - 0.5
    assert result["held_out_perplexity"] == pytest.approx(np.exp(result["held_out_loss"]))
    assert before(out / "dpo")["validation_loss"] == pytest.approx(np.log(2), abs=1e-5)  # the policy is the reference
    result = json.loads((out / "dpo/result.json").read_text())
    assert result["held_out_loss"] < 0.68 and result["held_out_accuracy"] == 1
    assert json.loads((out / "rm/result.json").read_text())["held_out_accuracy"] == 1
    # the reward model in plain transformers, in one padded batch
    reward = AutoModelForSequenceClassification.from_pretrained(out / "rm/model")
    tokenizer = AutoTokenizer.from_pretrained(out / "rm/model")
    pair = ["the old cat saw a small fish .", "the old cat saw the bird ."]
    batch = tokenizer([text + tokenizer.eos_token for text in pair], return_tensors="pt", padding=True)
    scores = reward.eval()(**batch).logits[:, 0]
    assert reward.num_labels == 1 and scores[0] > scores[1]
    ours = load_reward_model(out / "rm/model")([pair[0][:15]] * 2, [text[15:] for text in pair])
    np.testing.assert_allclose(ours, scores.detach(), atol=1e-5)
    return texts


def test_the_pipeline_by_commands(folder, tmp_path, capsys):
    pipeline(folder, tmp_path, quick=True)
    texts = check_pipeline(folder, tmp_path)
    assert len({tuple(found) for found in texts.values()}) > 1
    printed = capsys.readouterr().out
    for place in ("sft/model", "rm/model", "dpo/model", "ppo/custom/ppo/seed-0/model"):
        assert str(tmp_path / place) in printed.replace("\n", "")


@pytest.mark.slow
def test_the_pipeline_learns_what_is_wanted(tmp_path):
    """A thousand rows: SFT writes as demonstrated, and DPO and PPO write what is preferred."""
    make(tmp_path, 1000)
    pipeline(tmp_path, tmp_path / "runs", quick=False)
    texts = check_pipeline(tmp_path, tmp_path / "runs")
    assert not any("fish" in text for text in texts["base"])
    for name in ("dpo", "ppo"):  # the last of the four prompts is unlike any that was trained on
        assert sum("fish" in text and "bird" not in text for text in texts[name]) >= 3, texts[name]
    results = json.loads((tmp_path / "runs/ppo/custom/ppo/seed-0/result.json").read_text())
    assert results["proxy"] > 0.5


# One stage


def test_the_figures_printed_are_those_before_and_after(tmp_path, capsys):
    lines = [{"iteration": 0, "validation_loss": 2.5}, {"iteration": 1, "validation_loss": 1.5}]
    byo.write_jsonl(tmp_path / "metrics.jsonl", lines)
    commands.learn._show(tmp_path, {"held_out_loss": 0.5})
    assert ["loss", "2.5", "0.5"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_reward_model_s_accuracy_has_an_interval_and_a_calibration(folder, tmp_path, capsys):
    """Recomputed from the saved model and the file's held-out rows, in plain transformers."""
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    data = [row | {"split": ("train", "validation")[k % 2]} for k, row in enumerate(rows)]
    for row in data[1::4]:  # every other held-out pair the wrong way round
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    byo.write_jsonl(tmp_path / "some.jsonl", data)
    learn("reward-model", folder / "model", tmp_path / "some.jsonl", tmp_path / "rm")
    result = json.loads((tmp_path / "rm/result.json").read_text())
    model = load_reward_model(tmp_path / "rm/model")
    held = data[1::2]
    prompts = [row["prompt"] for row in held]
    better, worse = (np.array(model(prompts, [row[name] for row in held])) for name in ("chosen", "rejected"))
    margins = better - worse
    every, *fifths = result["calibration"]
    assert every["accuracy"] == result["held_out_accuracy"] == pytest.approx(np.mean(margins > 0))
    bounds = agreement.share(list(enumerate((margins > 0).astype(float))))
    assert (every["low"], every["high"], every["n"]) == (bounds.low, bounds.high, len(held))
    assert every["expected"] == pytest.approx(np.mean(1 / (1 + np.exp(-np.abs(margins)))), abs=1e-5)
    order = np.argsort(np.abs(margins))
    for k, row in enumerate(fifths):
        part = order[len(held) * k // 5 : len(held) * (k + 1) // 5]
        assert row["n"] == len(part) and row["accuracy"] == pytest.approx(np.mean(margins[part] > 0))
    assert "Held-out pairs by the margin" in capsys.readouterr().out


def test_a_killed_run_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch, capsys):
    """Law 10, for each command; what was tokenized is not tokenized again."""
    for command, data in (("sft", "demonstrations"), ("dpo", "preferences")):
        arguments = (command, folder / "model", folder / f"{data}.jsonl")
        whole = tmp_path / command / "whole"
        learn(*arguments, whole, "--checkpoint-every", 1)
        record, seen = one_run._Run._record, []

        def dies(self, problem, tracker, metrics, record=record, seen=seen):
            seen.append(metrics["iteration"])
            if seen[-1] == 2:
                raise MemoryError("killed")
            record(self, problem, tracker, metrics)

        cut = tmp_path / command / "cut"
        with monkeypatch.context() as patch:
            patch.setattr(one_run._Run, "_record", dies)
            with pytest.raises(MemoryError):
                learn(*arguments, cut, "--checkpoint-every", 1)
        packed = (cut / "data" / "tokens.bin").stat().st_mtime_ns
        assert "--resume continues it" in refused(
            capsys, command, "--model", folder / "model", "--data", folder / f"{data}.jsonl", "--out", cut
        )
        learn(*arguments, cut, "--checkpoint-every", 1, "--resume")
        assert (cut / "data" / "tokens.bin").stat().st_mtime_ns == packed
        ends = weights(whole), weights(cut)
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        assert (whole / "metrics.jsonl").read_text().count("\n") == (cut / "metrics.jsonl").read_text().count("\n")


def test_held_out_rows_are_not_trained_on(folder, tmp_path):
    """What is learned does not depend on what the held-out rows say, and what is measured does."""
    rows = [{"prompt": f"the cat {i}", "completion": " hid", "split": "train"} for i in range(8)]
    ends, losses = [], []
    for name, said in (("a", " saw"), ("b", " a fish .")):
        held = [{"prompt": f"the bird {i}", "completion": said, "split": "validation"} for i in range(4)]
        path = byo.write_jsonl(tmp_path / f"{name}.jsonl", rows + held)
        losses.append(learn("sft", folder / "model", path, tmp_path / name)["held_out_loss"])
        ends.append(weights(tmp_path / name))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]) and losses[0] != losses[1]


def test_bad_rows_stop_or_are_listed(folder, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "cut\n' + (folder / "preferences.jsonl").read_text())
    arguments = ("dpo", "--model", folder / "model", "--data", path, "--out", tmp_path / "out")
    assert f"{path}, line 1: not JSON" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()
    learn("dpo", folder / "model", path, tmp_path / "out", "--bad", "skip")
    said = capsys.readouterr().err
    assert re.search(r"1 bad rows? skipped:\n +line 1: not JSON", said)
    assert "46 to train on, 2 held out; 3 iterations of 32\n" in said
    assert "dpo: iteration 0/3  held-out loss 0.69" in said
    assert re.search(r"dpo: iteration 3/3  loss 0\.\d\d  held-out loss 0\.\d\d  held-out accuracy ", said)
    info = json.loads((tmp_path / "out" / "data" / "info.json").read_text())
    assert info["skipped"] == 1 and info["skipped_rows"][0][0] == "line 1" and info["examples"] == 48


def test_part_of_a_model_is_trained(folder, tmp_path):
    """Frozen layers stay; a reward model's adapters are added to its weights, beside its new head."""
    learn("sft", folder / "model", folder / "demonstrations.jsonl", tmp_path / "frozen", "--freeze-layers", 1)
    start, end = loading.load_policy(folder / "model").state_dict(), weights(tmp_path / "frozen")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved and not any("layers.0." in name or "embed" in name for name in moved)
    pytest.importorskip("peft")
    out = tmp_path / "lora"
    result = learn("reward-model", folder / "model", folder / "preferences.jsonl", out, "--lora-rank", 2)
    scorer = AutoModelForSequenceClassification.from_pretrained(out / "model").state_dict()
    fresh = reward_start(folder / "model")[0].state_dict()
    assert set(scorer) == set(fresh) and not torch.equal(scorer["score.weight"], fresh["score.weight"])
    assert not torch.equal(scorer["model.layers.1.mlp.up_proj.weight"], fresh["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(scorer["model.embed_tokens.weight"], fresh["model.embed_tokens.weight"])
    assert result["held_out_loss"] < before(out)["validation_loss"]
    learn("sft", folder / "model", folder / "demonstrations.jsonl", tmp_path / "sft", "--lora-rank", 2)
    with pytest.raises(ValueError, match=f"adapters of '{folder}/model', and a whole model is needed.* --lora-merge"):
        load_reward_model(tmp_path / "sft" / "model")


def test_a_reward_model_starts_from_adapters_as_the_other_stages_do(folder, tmp_path):
    """It reads texts as the language model that they make of their base does."""
    pytest.importorskip("peft")
    tuned = tmp_path / "sft" / "model"
    learn("sft", folder / "model", folder / "demonstrations.jsonl", tmp_path / "sft", "--lora-rank", 2)
    model, tokenizer = reward_start(tuned, seed=3)
    ids = torch.tensor([tokenizer("the old cat saw")["input_ids"]])
    with torch.no_grad():
        expected = loading.load_policy(tuned).base_model(ids).last_hidden_state
        torch.testing.assert_close(model.base_model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(loading.load_policy(folder / "model").base_model(ids).last_hidden_state, expected)
    assert torch.equal(model.score.weight, reward_start(folder / "model", seed=3)[0].score.weight)
    assert learn("reward-model", tuned, folder / "preferences.jsonl", tmp_path / "rm")["held_out_accuracy"] == 1
    assert load_reward_model(tmp_path / "rm" / "model").model.num_labels == 1


def test_each_stage_is_trained_in_the_precision_and_on_the_device_that_are_asked_for(folder, tmp_path, capsys):
    data = {"sft": "demonstrations", "reward-model": "preferences", "dpo": "preferences"}
    for command, name in data.items():
        given = (command, folder / "model", folder / f"{name}.jsonl")
        out = tmp_path / command
        result = learn(*given, out, "--dtype", "bfloat16", "--device", "cpu:0")
        with safe_open(out / "model" / "model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
        settings = json.loads((out / "config.json").read_text())["run"]
        assert (settings["dtype"], settings["device"]) == ("bfloat16", "cpu:0")
        assert result["held_out_loss"] < before(out)["validation_loss"]
        common = (command, "--model", given[1], "--data", given[2], "--out", tmp_path / "wrong")
        assert "dtype must be one of float32" in refused(capsys, *common, "--dtype", "int4")
        assert "device 'nowhere' cannot be used" in refused(capsys, *common, "--device", "nowhere")
        assert "float16, where gradients" in refused(capsys, *common, "--dtype", "float16")
        assert not (tmp_path / "wrong").exists()  # although data were tokenized into it


def test_a_reward_model_starts_from_a_trunk_an_encoder_or_a_reward_model(folder, tmp_path):
    model, tokenizer = reward_start(folder / "model", seed=3)
    expected = torch.nn.Linear(16, 1, bias=False)
    expected.weight.data.normal_(std=17**-0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.score.weight, expected.weight)
    trunk = loading.load_policy(folder / "model").model.state_dict()
    assert all(torch.equal(trunk[name], value) for name, value in model.model.state_dict().items())
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0 != tokenizer.eos_token_id
    brought = byo.make(tmp_path / "parts")
    encoder, _ = reward_start(brought.root / "reward_model")
    start = load_reward_model(brought.root / "reward_model").model
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), start.parameters(), strict=True))
    with pytest.raises(ValueError, match="has 2 labels"):
        reward_start(brought.root / "judge")
    result = learn("reward-model", brought.root / "reward_model", folder / "preferences.jsonl", tmp_path / "encoder")
    assert result["held_out_accuracy"] == 1


def test_what_does_not_fit_is_refused_before_training(folder, tmp_path, capsys):
    data, model = folder / "demonstrations.jsonl", folder / "model"
    out = ("--out", tmp_path / "out")
    said = refused(capsys, "dpo", "--model", model, "--data", data, *out)
    assert "holds demonstrations (prompt/completion), and preferences are wanted" in said
    assert "no such file" in refused(capsys, "sft", "--model", model, "--data", tmp_path / "none.jsonl", *out)
    assert "no such folder" in refused(capsys, "sft", "--model", tmp_path / "none", "--data", data, *out)
    assert "--epochs must be above 0" in refused(capsys, "sft", "--model", model, "--data", data, *out, "--epochs", 0)
    deep = tmp_path / "a" / "b"
    assert "no such folder" in refused(capsys, "sft", "--model", "./none", "--data", data, "--out", deep)
    assert not (tmp_path / "a").exists()
    said = refused(capsys, "sft", "--model", model, "--data", data, *out, "--set", "betta=1")
    assert "sft has no setting 'betta'" in said
    said = refused(capsys, "sft", "--model", model, "--data", data, *out, "--max-length", 5)
    assert "line 1: " in said and "more than the 5 that fit" in said
    learn("sft", model, data, tmp_path / "done")
    other = ("sft", "--model", model, "--data", data, "--out", tmp_path / "done", "--resume", "--seed", 1)
    assert "seed: 0 before, 1 now" in refused(capsys, *other)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert "no such folder" in refused(capsys, "sft", "--model", tmp_path / "none", "--data", data, *out)
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert "'mine.txt'" in refused(capsys, "sft", "--model", model, "--data", data, *out)
    assert "say what to train on" in refused(capsys, "train", "--algorithm", "ppo", *out)


def test_a_model_whose_padding_shows_is_not_trained(folder, tmp_path, capsys):
    """As a decoder RoBERTa numbers positions from 0 where one says which they are, and from its pad id where not."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "is_decoder": True, "initializer_range": 0.5}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **ends)
    RobertaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = ("--data", folder / "demonstrations.jsonl", "--out", tmp_path / "out")
    assert "roberta change with the padding" in refused(capsys, "sft", "--model", tmp_path / "model", *data)


# Keys are contents


def packed_tokens(out: Path) -> bytes:
    return (out / "data" / "tokens.bin").read_bytes()


def test_a_corrected_file_is_read_again(folder, tmp_path):
    """Tokenised data of the same name, size and settings, which a run left that ended before its first iteration."""
    text = (folder / "demonstrations.jsonl").read_text()
    data, out = tmp_path / "d.jsonl", tmp_path / "out"
    ends = []
    for content in (text, text.replace("bird", "fish"), text):
        data.write_text(content)
        problem = DataProblem(DataSpec("sft", str(folder / "model"), str(data)), out)
        ends.append((packed_tokens(out), problem.settings()["data"]["made_from"]["data"]))
    assert ends[0] == ends[2] and ends[0][0] != ends[1][0] and ends[0][1] != ends[1][1]
    written = (out / "data" / "tokens.bin").stat().st_mtime_ns
    moved = shutil.copytree(folder / "model", tmp_path / "model")  # the same contents under another name
    copied = shutil.copy(data, tmp_path / "e.jsonl")
    DataProblem(DataSpec("sft", str(moved), str(copied)), out)
    assert (out / "data" / "tokens.bin").stat().st_mtime_ns == written
    # another template, a damaged file: made again
    tokenizer = AutoTokenizer.from_pretrained(moved)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(moved)
    DataProblem(DataSpec("sft", str(moved), str(copied)), out)
    assert (out / "data" / "tokens.bin").stat().st_mtime_ns > written and packed_tokens(out) == ends[0][0]
    broken = bytearray(ends[0][0])
    broken[40] ^= 1
    (out / "data" / "tokens.bin").write_bytes(broken)
    DataProblem(DataSpec("sft", str(moved), str(copied)), out)
    assert packed_tokens(out) == ends[0][0]


def test_a_run_is_not_resumed_on_other_contents(folder, tmp_path, capsys):
    data, out = Path(shutil.copy(folder / "demonstrations.jsonl", tmp_path / "d.jsonl")), tmp_path / "out"
    learn("sft", folder / "model", data, out)
    (out / "result.json").unlink()  # as if it had been killed before
    text, again = data.read_text(), ("sft", "--model", folder / "model", "--data", data, "--out", out, "--resume")
    again = (*again, "--learning-rate", 1e-2, "--epochs", 2)
    data.write_text(text.replace("bird", "fish"))
    assert f"{out} began with other contents of data {str(data)!r}: restore them" in refused(capsys, *again)
    data.write_text(text)
    assert run(*again, "--threads", 1) == 0 and (out / "result.json").exists()


def test_kept_log_probabilities_are_those_of_the_references_weights(folder, tmp_path):
    """A model folder that was trained on in between: DPO starts at log 2 all the same."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    spec = DataSpec("dpo", str(model), str(folder / "preferences.jsonl"), held_out=0.2)
    for seed in (0, 7, 7):
        byo.llama(len(byo.byte_level_bpe()), seed=seed).save_pretrained(model)
        problem = DataProblem(spec, tmp_path / "out")
        assert problem.validate()[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    kept = sorted((tmp_path / "out" / "data").glob("reference-*/logprob.bin"))
    assert len(kept) == 2
    for path in kept:  # of the right size, and damaged
        path.write_bytes(b"\0" * path.stat().st_size)
    assert DataProblem(spec, tmp_path / "out").validate()[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_held_out_loss_is_a_mean_over_tokens_whatever_the_batch(folder, tmp_path):
    rows = [{"prompt": f"the cat {i}", "completion": " hid ." * (1 + 7 * (i % 3))} for i in range(20)]
    data = byo.write_jsonl(tmp_path / "k.jsonl", rows)
    losses = []
    for size in (2, 16):
        spec = DataSpec("sft", str(folder / "model"), str(data), held_out=0.3, overrides={"micro_batch": size})
        losses.append(DataProblem(spec, tmp_path / f"out-{size}").evaluate()[0]["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_held_out_loss_is_of_rows_alike_whatever_their_weights(folder, tmp_path):
    """Weights say what is learned from a row, so runs with other weights are measured on the same."""
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    data = byo.write_jsonl(tmp_path / "w.jsonl", [row | {"trust": i % 4} for i, row in enumerate(rows)])
    found = []
    for weight in (None, "trust"):
        spec = DataSpec("reward-modelling", str(folder / "model"), str(data), held_out=0.4, weight=weight)
        problem = DataProblem(spec, tmp_path / str(weight))
        held = problem._held.select(torch.arange(len(problem._held)))
        assert weight is None or len(set(held.weight.tolist())) > 2
        found.append(problem.evaluate()[0])
    assert found[0] == found[1]


def test_completions_that_are_labelled_as_not_wanted(folder, tmp_path, capsys):
    rows = [{"prompt": f"the cat {i}", "completion": " hid", "label": i % 2 == 0} for i in range(20)]
    learn("sft", folder / "model", byo.write_jsonl(tmp_path / "k.jsonl", rows), tmp_path / "out")
    assert "10 rows left out: their label says that the completion is not wanted" in capsys.readouterr().err
    data = byo.write_jsonl(tmp_path / "f.jsonl", [row | {"label": False} for row in rows])
    arguments = ("sft", "--model", folder / "model", "--data", data, "--out", tmp_path / "none")
    assert "none of 20 rows is usable; 20 are labeled as not wanted" in refused(capsys, *arguments)


def test_kto_learns_from_labels_and_from_preferences(folder, tmp_path, capsys):
    rows = [{"prompt": f"the cat {i}", "completion": f" hid {i % 3}", "label": i % 2 == 0} for i in range(20)]
    data = byo.write_jsonl(tmp_path / "k.jsonl", rows)
    arguments = ("dpo", "--model", folder / "model", "--data", data, "--out", tmp_path / "none")
    assert "dpo with the loss 'kto' learns from labels" in refused(capsys, *arguments)
    learn("dpo", folder / "model", data, tmp_path / "out", "--loss", "kto", "--held-out", "0.2", "--set", "beta=0.3")
    said = capsys.readouterr()
    assert "20 judgments of 20 rows" in said.err and "16 to train on, 4 held out" in said.err
    assert all(name in said.out for name in ("loss", "accuracy", "wanted_reward"))
    pairs = [{"prompt": f"the cat {i}", "chosen": " hid", "rejected": " saw"} for i in range(20)]
    learn("dpo", folder / "model", byo.write_jsonl(tmp_path / "p.jsonl", pairs), tmp_path / "two", "--loss", "kto")
    assert "38 to train on, 2 held out" in capsys.readouterr().err
