"""The model that a stage saves, loaded by plain transformers and peft, has the held-out figures that were printed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lm_envs.data.packed import PackedExamples
from lm_envs.model.adapters import merged, with_adapters
from lm_envs.model.loading import load_policy
from tests.benchmarks.commands.test_learn import learn
from tests.lm_envs import byo
from tests.marks import slow_unless

RANK = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
ADAPTERS = {
    "lora": dict(RANK, target_modules=["q_proj"]),
    "modules_to_save": dict(RANK, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embeddings saved": dict(RANK, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "head": dict(RANK, target_modules=["q_proj", "lm_head"]),
    "embeddings": dict(RANK, target_modules=["q_proj", "embed_tokens"]),
    "dora": dict(RANK, target_modules=["q_proj"], use_dora=True),
    "bias": dict(RANK, target_modules=["c_attn"], bias="all"),
    "tokens": dict(RANK, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
}
RUNS = {
    "whole": ("llama", (), None),
    "whole, tied": ("tied", (), None),
    "encoder-decoder": ("bart", (), None),
    "frozen": ("llama", ("--freeze-layers", 1), None),
    "frozen, tied": ("gpt2", ("--freeze-layers", 1), None),
    "lora": ("llama", ("--lora-rank", 2), None),
    "lora, tied": ("gpt2", ("--lora-rank", 2), None),
    "lora, merged": ("gpt2", ("--lora-rank", 2, "--lora-merge"), None),
}
RUNS |= {
    f"{name} on {start}{', merged' * bool(more)}": (start, more, name)
    for name in ADAPTERS
    for start in ({"bias": "gpt2", "tokens": "llama", "lora": "llama"}.get(name, "tied"),)
    for more in ((), ("--lora-merge",))
}
BY_DPO = ("encoder-decoder", "lora, merged", "lora on llama", "modules_to_save on tied", "head on tied, merged")


def start_model(kind: str, vocabulary: int):
    torch.manual_seed(0)
    ends = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "bart":
        one = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
        wide = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24)
        sizes = {"d_model": 16, "dropout": 0.0, "init_std": 0.3, "decoder_start_token_id": 1}
        return BartForConditionalGeneration(BartConfig(**ends, **one, **heads, **wide, **sizes))
    if kind == "gpt2":
        sizes = {"n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
        return GPT2LMHeadModel(GPT2Config(**ends, **sizes))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"max_position_embeddings": 48, "initializer_range": 0.3, "tie_word_embeddings": kind == "tied"}
    return LlamaForCausalLM(LlamaConfig(**ends, **sizes, **more))


@pytest.fixture(scope="module")
def brought(tmp_path_factory) -> Path:
    root, tokenizer = tmp_path_factory.mktemp("brought"), byo.byte_level_bpe()
    for kind in ("llama", "tied", "gpt2", "bart"):
        start_model(kind, len(tokenizer)).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    draw = random.Random(0)
    prompts = [f"the {draw.choice(['old', 'grey'])} cat {draw.choice(['saw', 'ate'])} {i}" for i in range(24)]
    rows = [{"prompt": p, "chosen": draw.choice([" a fish", " fish ."]), "rejected": " bird"} for p in prompts]
    byo.write_jsonl(root / "data.jsonl", rows)
    return root


def adapters(root: Path, kind: str, name: str) -> Path:
    """A folder of adapters as peft saves them, that are not the identity."""
    folder = root / f"{name} on {kind}"
    if not folder.exists():
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(root / kind)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and name in ("modules_to_save", "embeddings saved", "tokens", "bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def plainly(folder: Path):
    """By transformers and peft alone."""
    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    config = json.loads((folder / "config.json").read_text())
    kind = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


@torch.no_grad()
def logprobs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[1, *response[:-1]]])).logits
    else:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[:, len(prompt) - 1 : -1]
    return logits[0].log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def held_out(out: Path, preferences: bool) -> list[tuple[list[int], list[int]]]:
    _, held = PackedExamples(out / "data", preferences).divide(0.25)
    assert len(held) == 6 * (1 + preferences)
    return [tuple(ids.tolist() for ids in held.read(row)) for row in range(len(held))]


CASES = [*(("sft", run) for run in RUNS), *(("dpo", run) for run in BY_DPO)]
QUICK = {
    ("sft", run) for run in ("whole, tied", "frozen", "lora, merged", "modules_to_save on tied, merged", "head on tied")
}
QUICK |= {("dpo", run) for run in ("encoder-decoder", "lora on llama", "head on tied, merged")}


@pytest.mark.parametrize(("command", "run"), slow_unless(QUICK.__contains__, CASES))
def test_the_saved_policy_is_the_one_that_was_measured(brought, tmp_path, command, run):
    kind, more, name = RUNS[run]
    start = adapters(brought, kind, name) if name else brought / kind
    rest = ("--held-out", 0.25, "--validate-every", 0, *more)
    result = learn(command, start, brought / "data.jsonl", tmp_path / "out", *rest)
    saved = tmp_path / "out" / "model"
    merged = (saved / "config.json").exists()
    assert merged == ("--lora-merge" in more or not (name or "--lora-rank" in more))
    model, rows = plainly(saved), held_out(tmp_path / "out", command == "dpo")
    if command == "sft":
        found = -torch.cat([logprobs(model, *row) for row in rows]).mean()
        before = -torch.cat([logprobs(plainly(start), *row) for row in rows]).mean()
    else:
        before = torch.log(torch.tensor(2.0))
        reference = plainly(start)
        moved = torch.stack([(logprobs(model, *row) - logprobs(reference, *row)).sum() for row in rows])
        found = -F.logsigmoid(0.1 * (moved[0::2] - moved[1::2])).mean()
    assert result["held_out_loss"] == pytest.approx(float(found), abs=2e-4)
    assert float(found) < float(before) - 0.003  # it has learned


def test_only_the_adapters_of_a_folder_are_trained(brought, tmp_path):
    """All else is what the folder says: the base is not copied, and nothing of it is trained."""
    start = adapters(brought, "llama", "lora")
    learn("sft", start, brought / "data.jsonl", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["trainable_parameters"] == 2 * 2 * (16 + 16)  # layers, rank


@pytest.mark.parametrize("more", [(), ("--lora-rank", 2), ("--freeze-layers", 1)], ids=["whole", "lora", "frozen"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_saved_reward_model_is_the_one_that_was_measured(brought, tmp_path, kind, more):
    rest = ("--held-out", 0.25, "--validate-every", 0, *more)
    result = learn("reward-model", brought / kind, brought / "data.jsonl", tmp_path / "out", *rest)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    rows = [prompt + response for prompt, response in held_out(tmp_path / "out", True)]
    with torch.no_grad():
        scores = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
    assert result["held_out_loss"] == pytest.approx(float(-F.logsigmoid(scores[0::2] - scores[1::2]).mean()), abs=1e-4)


TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ m.content }}<eot>\n{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("more", [(), ("--lora-rank", 4)], ids=["whole", "adapters"])
def test_generate_stops_at_the_end_of_turn_that_was_learned(brought, tmp_path, more):
    """The end of a turn is neither the tokenizer's EOS nor in the config; EOS ids that are there stay, words do not."""
    tokenizer = byo.byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>", "<other>"]})
    tokenizer.chat_template = TURNS
    turn, other = tokenizer.convert_tokens_to_ids(["<eot>", "<other>"])
    model = start_model("llama", len(tokenizer))
    model.generation_config.eos_token_id = [1, other, 7]
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    said = [{"role": "user", "content": "the old cat"}, {"role": "assistant", "content": " hid"}]
    data = byo.write_jsonl(tmp_path / "chat.jsonl", [{"messages": said}] * 16)
    learn("sft", tmp_path / "start", data, tmp_path / "out", "--iterations", 40, "--held-out", 0, *more)
    saved = tmp_path / "out" / "model"
    config = GenerationConfig.from_pretrained(saved)
    assert config.eos_token_id == [turn, 1, other]
    assert load_policy(saved).generation_config.eos_token_id == [turn, 1, other]
    prompt = torch.tensor([tokenizer("the old cat", add_special_tokens=False)["input_ids"]])
    kept = {} if not more else {"generation_config": config}  # of adapters transformers reads that of the base
    written = AutoModelForCausalLM.from_pretrained(saved).generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, **kept
    )
    assert tokenizer.decode(written[0, prompt.shape[1] :]) == " hid<eot>"


def test_trained_tokens_of_a_tied_model_are_refused_by_name(brought):
    folder = adapters(brought, "tied", "tokens")
    with pytest.raises(ValueError, match="peft cannot load trained tokens .* tied to its embeddings: merge"):
        with_adapters(AutoModelForCausalLM.from_pretrained(brought / "tied"), folder)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_merge_does_not_reach_the_layer_that_is_tied(target):
    """As one puts adapters into a model oneself."""
    model = start_model("tied", 50).eval()
    model.add_adapter(LoraConfig(**RANK, target_modules=[target]))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # so a merge in place would change both
    ids = torch.arange(2, 10)[None]
    plain = merged(model)
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    assert not plain.config.tie_word_embeddings
