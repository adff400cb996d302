"""Loading models of one's own: precision and place, adapters, chats, and what is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lm_envs.algos.policies.adaptation import Adaptation, adapted, save_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.adapters import adapter_parameters, has_adapters
from lm_envs.model.loading import Placement, load_policy, load_tokenizer
from lm_envs.reward.learned import load_reward_model, reward_start
from lm_envs.tasks import load
from tests.families import BASE, GROUPED, random_model
from tests.lm_envs import byo
from tests.lm_envs.model.test_checking import CHUNKED, RECURRENT

QUICK = {"max_new_tokens": 6, "samples": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> byo.Folders:
    return byo.make(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def adapters(folders) -> Path:
    """Of the policy, trained a little, as a run leaves them."""
    base = load_policy(folders.root / "policy")
    model = adapted(base, Adaptation(lora_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    save_model(model, load_tokenizer(folders.root / "policy"), folders.root / "adapters")
    return folders.root / "adapters"


def refused(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def pointers(model):
    return {p.data_ptr() for p in model.parameters()}


# Precision and place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_precision(folders, dtype):
    model = load_policy(folders.root / "policy", placement=Placement(dtype))
    assert model.dtype == getattr(torch, dtype) and not model.training
    known = LlamaForCausalLM.from_pretrained(folders.root / "policy").to(model.dtype)
    assert torch.equal(logits(model), logits(known))
    assert load_reward_model(folders.root / "reward_model", placement=Placement(dtype)).model.dtype == model.dtype


def test_auto_is_what_it_was_saved_in(folders, tmp_path):
    load_policy(folders.root / "policy").bfloat16().save_pretrained(tmp_path)
    assert load_policy(tmp_path, placement=Placement("auto")).dtype == torch.bfloat16
    assert load_policy(tmp_path).dtype == torch.float32


def test_place(folders):
    plain = load_policy(folders.root / "policy")
    for placement in (Placement(device="cpu"), Placement(device_map="cpu"), Placement(device_map={"": "cpu"})):
        model = load_policy(folders.root / "policy", placement=placement)
        assert model.device.type == "cpu" and torch.equal(logits(model), logits(plain))
    assert "exclude each other" in refused(lambda: Placement(device="cpu", device_map="auto"))
    assert "dtype must be one of float32" in refused(lambda: Placement("int8"))
    for name in ("nowhere", "meta"):
        assert f"device '{name}' cannot be used" in refused(lambda name=name: Placement(device=name))
    if not torch.cuda.is_available():
        assert "device 'cuda:0' cannot be used" in refused(lambda: Placement(device="cuda:0"))


def test_a_model_in_pieces_is_refused(folders, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "meta"}
    message = refused(lambda: load_policy(folders.root / "policy", placement=Placement(device_map=places)))
    assert "spreads it over several devices" in message and "bfloat16" in message


def test_accelerate_is_asked_for(monkeypatch):
    monkeypatch.setattr("lm_envs.model.loading.find_spec", lambda name: None)
    assert "pip install 'lm-envs[accelerate]'" in refused(lambda: Placement(device_map="auto"))


def test_a_task_in_bfloat16_trains(folders):
    task = load("custom", **folders.options, **QUICK, dtype="bfloat16", reward_dtype="bfloat16", device="cpu")
    assert task.reference.dtype == task.reward.model.dtype == torch.bfloat16 and task.start is task.reference
    env = TextVectorEnv(task, 8, group_size=4)
    policy = LMPolicy.for_mdp(env.mdp, adapted(task.start))
    _, metrics = make_agent("ppo", policy, episodes=8, group_size=4, iterations=2, learning_rate=1e-3).iteration(env)
    assert abs(metrics["kl"]) < 0.1 and metrics["logprob_gap_max"] < 0.1
    changed = [n for n, p in policy.model.named_parameters() if not torch.equal(p, task.reference.get_parameter(n))]
    assert changed


def test_float16_loads_and_is_not_trained(folders):
    task = load("custom", **folders.options, **QUICK, dtype="float16")
    policy = LMPolicy.for_mdp(TextVectorEnv(task, 2).mdp, adapted(task.start))
    assert "train it in bfloat16" in refused(lambda: make_agent("ppo", policy))


# Adapters


def test_adapters_are_the_policy_and_share_their_base(folders, adapters):
    """What plain peft makes of the folder, in the memory of one model."""
    assert not (adapters / "config.json").exists()
    task = load("custom", **{**folders.options, "policy": str(adapters)}, **QUICK, reference="base", kl_coef=0.1)
    policy, base = task.start, task.reference
    plain = LlamaForCausalLM.from_pretrained(folders.root / "policy")
    torch.testing.assert_close(logits(base), logits(plain), rtol=0, atol=1e-6)
    known = PeftModel.from_pretrained(plain, adapters)
    torch.testing.assert_close(logits(policy), logits(known), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(policy), logits(base), atol=1e-3)
    own = {p.data_ptr() for p in adapter_parameters(policy)}
    assert has_adapters(policy) and not has_adapters(base) and pointers(policy) - own == pointers(base)
    assert not any(p.requires_grad for p in policy.parameters())


def test_adapters_are_trained_further_and_the_base_is_not(folders, adapters, tmp_path):
    task = load("custom", **{**folders.options, "policy": str(adapters)}, **QUICK, reference="base", kl_coef=0.1)
    env = TextVectorEnv(task, 8, group_size=4)
    model = adapted(task.start)
    own = {p.data_ptr() for p in adapter_parameters(model)}
    assert pointers(model) - own == pointers(task.reference)  # one copy of the base for the three
    assert not own & pointers(task.start)
    assert {p.data_ptr() for p in model.parameters() if p.requires_grad} == own
    held = {name: x.clone() for name, x in task.start.state_dict().items()}
    before = logits(model)
    assert torch.equal(before, logits(task.start))
    policy = LMPolicy.for_mdp(env.mdp, model)
    agent = make_agent("ppo", policy, episodes=16, group_size=4, iterations=2, learning_rate=1e-2)
    traj, metrics = agent.iteration(env)
    assert metrics["logprob_gap_max"] < 1e-4
    assert float((traj.logprob - traj.ref_logprob).abs().max()) > 1e-2  # the policy starts away from the base
    assert all(torch.equal(x, held[name]) for name, x in task.start.state_dict().items())
    assert not torch.allclose(logits(model), before, atol=1e-4)
    save_model(model, task.tokenizer, tmp_path / "model")  # in peft's format again, of the same base
    assert not (tmp_path / "model" / "config.json").exists()
    torch.testing.assert_close(logits(load_policy(tmp_path / "model")), logits(model), rtol=0, atol=1e-5)
    save_model(model, task.tokenizer, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)


def test_the_policy_with_its_adapters_is_the_reference_unless_told(folders, adapters):
    task = load("custom", **{**folders.options, "policy": str(adapters)}, **QUICK, kl_coef=0.1)
    assert task.reference is task.start and has_adapters(task.reference)
    env = TextVectorEnv(task, 8, group_size=4)
    policy = LMPolicy.for_mdp(env.mdp, adapted(task.start))
    agent = make_agent("ppo", policy, episodes=16, group_size=4, iterations=2, learning_rate=1e-2)
    traj, metrics = agent.iteration(env)
    torch.testing.assert_close(traj.logprob, traj.ref_logprob, rtol=0, atol=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)
    again, _ = agent.iteration(env)
    assert float((again.logprob - again.ref_logprob).abs().max()) > 1e-3


def test_what_adapters_cannot_be(folders, adapters, tmp_path):
    options = {**folders.options, **QUICK}
    assert "reference 'base' is the model under" in refused(lambda: load("custom", **options, reference="base"))
    start = load_policy(adapters)
    assert "brings adapters of its own" in refused(lambda: adapted(start, Adaptation(lora_rank=2)))
    assert "no adapters to merge" in refused(
        lambda: adapted(load_policy(folders.root / "policy"), Adaptation(lora_merge=True))
    )

    def altered(name, **changes):
        folder = Path(shutil.copytree(adapters, tmp_path / name))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return folder

    assert "kind 'PROMPT_TUNING'" in refused(lambda: load_policy(altered("a", peft_type="PROMPT_TUNING")))
    assert "does not say which model" in refused(lambda: load_policy(altered("b", base_model_name_or_path=None)))
    gone = str(tmp_path / "gone")
    message = refused(lambda: load_policy(altered("c", base_model_name_or_path=gone)))
    assert gone in message and "there is no such folder" in message
    byo.llama(300).save_pretrained(tmp_path / "other")
    other = altered("d", base_model_name_or_path=str(tmp_path / "other"))
    tensors = random_model("Llama", dict(GROUPED, hidden_size=32))
    tensors.save_pretrained(tmp_path / "wider")
    assert "do not fit" in refused(lambda: load_policy(altered("e", base_model_name_or_path=str(tmp_path / "wider"))))
    (other / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refused(lambda: load_policy(other))


def test_adapters_beside_their_base_and_without_a_tokenizer(folders, adapters, tmp_path):
    folder = Path(shutil.copytree(adapters, tmp_path / "a", ignore=shutil.ignore_patterns("*token*")))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../policy"}))
    shutil.copytree(folders.root / "policy", tmp_path / "policy")
    torch.testing.assert_close(logits(load_policy(folder)), logits(load_policy(adapters)))
    assert load_tokenizer(folder).eos_token_id == 1


# What is refused


def saved(model, folder: Path, **changes) -> Path:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_refusals_say_why_and_what_to_do(tmp_path):
    llama = random_model("Llama", GROUPED)
    folder = saved(llama, tmp_path / "a", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    message = refused(lambda: load_policy(folder))
    assert "quantized by bitsandbytes" in message and "cannot be trained" in message and "dequantize" in message

    t5 = transformers.T5Config(vocab_size=10, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    t5.decoder_start_token_id = 0
    folder = saved(
        transformers.T5ForConditionalGeneration(t5), tmp_path / "c", quantization_config={"quant_method": "x"}
    )
    assert "quantized by x" in refused(lambda: load_policy(folder))

    code = {"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}}
    folder = saved(llama, tmp_path / "b", model_type="made_up", **code)
    message = refused(lambda: load_policy(folder))
    assert "code of its own" in message and "trust_remote_code" in message

    bert = transformers.BertConfig(**BASE)
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "d")
    message = refused(lambda: load_policy(tmp_path / "d"))
    assert "saved as an encoder" in message and "is_decoder=True" in message

    seeing = transformers.Gemma3Config(
        text_config=dict(GROUPED), vision_config=dict(hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    )
    seeing.architectures = ["Gemma3ForConditionalGeneration"]
    seeing.save_pretrained(tmp_path / "e")
    message = refused(lambda: load_policy(tmp_path / "e"))
    assert "a vision_config" in message and "text alone" in message

    folder = saved(random_model("Llama4Text", CHUNKED), tmp_path / "f")
    message = refused(lambda: load_policy(folder))
    assert "cannot be kept row by row" in message and "--recompute" in message
    assert load_policy(folder, recompute=True).config.model_type == "llama4_text"


def test_a_family_that_reads_padding_is_refused_before_any_work(folders, tmp_path):
    tokenizer = load_tokenizer(folders.root / "policy")
    random_model("RecurrentGemma", {**RECURRENT, "vocab_size": len(tokenizer)}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = refused(lambda: load("custom", **{**folders.options, "policy": str(tmp_path)}, **QUICK))
    assert "change with the padding" in message and str(tmp_path) in message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (None, "its config.json cannot be read"),
        ({"hidden_size": "sixteen"}, "its config.json cannot be read: .*'hidden_size'"),
        ({"hidden_size": 20}, "its config.json contradicts its weights: .*, not .*20"),
        ({"num_attention_heads": 3}, "its config.json cannot be read: .*not a multiple"),
        ({"hidden_act": "nope"}, "there is no 'nope'"),
        ({"num_hidden_layers": 1}, "contradicts its weights, which also hold model.layers.1..* and 6 more"),
        ({"architectures": [3]}, "was saved from 3"),
    ],
)
def test_a_broken_config_is_told_as_that(folders, tmp_path, changed, said):
    """Not as the tokenizer's, which is read first, and in one line."""
    place = shutil.copytree(folders.root / "policy", tmp_path / "policy")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text('{"model_type": "lla' if changed is None else json.dumps(config | changed))
    with pytest.raises(ValueError, match=f"^policy '{place}'.*{said}") as found:
        load_tokenizer(place), load_policy(place)
    assert "\n" not in str(found.value)


def test_weights_of_more_layers_than_the_config_says_are_refused_and_others_told(folders, tmp_path, capfd):
    place = shutil.copytree(folders.root / "policy", tmp_path / "policy")
    weights = load_file(place / "model.safetensors")
    save_file(weights | {"v_head.weight": torch.zeros(1, 16)}, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="weights hold v_head.weight, which the model does not use"):
        load_policy(place)
    assert "REPORT" not in capfd.readouterr().err  # of transformers
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "contradicts its weights" in refused(lambda: reward_start(place))


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": [1', "[]", '{"eos_token_id": ["</s>"]}', '{"eos_token_id": "x"}']
)
def test_the_ends_of_responses_are_not_lost_with_a_broken_file(folders, tmp_path, content):
    place = shutil.copytree(folders.root / "policy", tmp_path / "policy")
    (place / "generation_config.json").write_text(content)
    assert str(place / "generation_config.json") in refused(lambda: load_policy(place))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"peft_type": "LORA", "base_model_name_or_path": [1]}'])
def test_broken_descriptions_of_adapters_are_told_in_one_line(adapters, tmp_path, content):
    place = shutil.copytree(adapters, tmp_path / "adapters")
    (place / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in refused(lambda: load_policy(place))


def test_a_config_of_deep_brackets_is_told_in_one_line(folders, tmp_path):
    place = shutil.copytree(folders.root / "policy", tmp_path / "policy")
    (place / "config.json").write_text("[" * 100_000)
    assert "its config.json cannot be read" in refused(lambda: load_policy(place))
