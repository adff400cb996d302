"""What is not trained is shared, is never written, and is in no checkpoint; what is trained starts as the identity."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
)

from lm_envs.algos.engine.agent import learn
from lm_envs.algos.policies.adaptation import (
    Adaptation,
    adapted,
    decoder_layers,
    frozen_hash,
    learned_state,
    parameters_below,
)
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.rollout import rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.adapters import with_adapters
from tests import tiny
from tests.algos import batches
from tests.marks import slow_unless

SIZES = {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.25}
CONFIGS = {
    "gpt2": lambda: GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, **SIZES),
    "llama": lambda: LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **SIZES,
    ),
    "neox": lambda: GPTNeoXConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **SIZES
    ),
    "bloom": lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SIZES),
    "opt": lambda: OPTConfig(
        hidden_size=16,
        word_embed_proj_dim=8,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        init_std=0.25,
        **{k: v for k, v in SIZES.items() if k != "initializer_range"},
    ),
    "mamba": lambda: MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, **SIZES),
}
LORA, FROZEN = Adaptation(lora_rank=2), Adaptation(freeze_layers=1)
BOTH = Adaptation(lora_rank=2, freeze_layers=1)
ADAPTATIONS = {"lora": LORA, "frozen": FROZEN, "both": BOTH}


def model(family: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(CONFIGS[family]())
    return made.double().eval().requires_grad_(False)


def digest(module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def pointers(module, trained: bool) -> set[int]:
    return {p.data_ptr() for p in module.parameters() if p.requires_grad is trained}


def prompts() -> torch.Tensor:
    return torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def logits(module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=prompts()).logits


def setting(family: str, adaptation: Adaptation):
    """A task, its env, and a policy that adapts the task's reference."""
    task = tiny.task(reference=model(family))
    env = TextVectorEnv(task, 8, group_size=4)
    return task, env, LMPolicy.for_mdp(env.mdp, adapted(task.start, adaptation, seed=3))


@pytest.mark.parametrize("adaptation", ADAPTATIONS.values(), ids=ADAPTATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_it_starts_as_the_start_and_owns_only_what_it_trains(family, adaptation):
    start = model(family)
    if family == "mamba" and adaptation.lora_rank:  # its kernel reads one map's weights past an adapter
        with pytest.raises(ValueError, match="LoRA on MambaForCausalLM: .*out_proj.* lora_targets"):
            adapted(start, adaptation)
        adaptation = replace(adaptation, lora_targets=("in_proj", "x_proj"))
    before = digest(start)
    policy = adapted(start, adaptation)
    assert torch.equal(logits(policy), logits(start))
    kept, trained = pointers(policy, False), pointers(policy, True)
    assert kept and trained
    assert kept <= pointers(start, False) and not trained & pointers(start, False)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert digest(start) == before and not torch.equal(logits(policy), logits(start))
    assert not any(p.requires_grad for p in start.parameters())


def test_without_an_adaptation_nothing_is_shared_and_all_is_trained():
    start = model("gpt2")
    policy = adapted(start)
    assert not pointers(policy, False) and not pointers(policy, True) & pointers(start, False)


@pytest.mark.parametrize("family", CONFIGS)
def test_frozen_is_all_that_the_lower_layers_output_depends_on(family):
    start = model(family)
    policy = adapted(start, FROZEN)
    name, layers = decoder_layers(policy)
    assert len(layers) == 2
    seen = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, i, out, n=n: seen.setdefault(n, []).append(out[0] if isinstance(out, tuple) else out)
        )
        for n, layer in enumerate(layers)
    ]
    logits(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    logits(policy)
    for hook in hooks:
        hook.remove()
    assert torch.equal(*seen[0]) and not torch.equal(*seen[1])
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert {n for n, _ in policy.named_parameters() if n.startswith(f"{name}.1.")} <= trained
    assert not any(n.startswith(f"{name}.0.") for n in trained)


def test_which_parameters_a_frozen_gpt2_and_llama_train():
    trained = {n for n, p in adapted(model("gpt2"), FROZEN).named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trained} == {"h", "ln_f"}  # the output layer is tied to the embeddings
    trained = {n for n, p in adapted(model("llama"), FROZEN).named_parameters() if p.requires_grad}
    assert {"lm_head.weight", "model.norm.weight"} < trained and "model.embed_tokens.weight" not in trained
    all_layers = {n for n, p in adapted(model("gpt2"), Adaptation(2)).named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in all_layers} == {"ln_f"}


def test_lora_stands_where_it_is_asked_for_and_counts_what_hu_et_al_count():
    trained = {n: p for n, p in adapted(model("llama"), BOTH).named_parameters() if p.requires_grad}
    assert all(".layers.1." in n and ".lora_" in n for n in trained)
    assert len(trained) == 2 * 7  # A and B of q, k, v, o, gate, up and down
    only = Adaptation(lora_rank=3, lora_targets=("q_proj", "v_proj"))
    trained = {n: p for n, p in adapted(model("llama"), only).named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * ((16 + 16) + (16 + 8))
    assert {n.split(".")[4] for n in trained} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6, 3.0)])
def test_loras_output_is_equation_3(alpha, scale):
    start = model("llama")
    policy = adapted(start, Adaptation(lora_rank=2, lora_alpha=alpha, lora_targets=("q_proj",)))
    layer = policy.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float64 and not b.any()
    with torch.no_grad():
        b.copy_(torch.arange(32.0).reshape(16, 2) / 32)
        x = torch.linspace(-1, 1, 16, dtype=torch.float64)
        wanted = start.model.layers[0].self_attn.q_proj.weight @ x + scale * b @ (a @ x)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=0)


def test_the_seed_decides_the_adapters_and_no_generator_is_moved():
    start, state = model("gpt2"), torch.get_rng_state()
    first, again, other = (learned_state(adapted(start, LORA, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert batches.same(first, again) and not batches.same(first, other)


def test_the_layout_of_gpt2s_weights_is_nothing_to_warn_of(tmp_path):
    """Neither where adapters are made nor where a folder has peft's default, which is about linear maps."""
    start = model("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = adapted(start, LORA)
        assert made.peft_config["default"].fan_in_fan_out
        made.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
        read = with_adapters(start, tmp_path)
    ids = torch.arange(6)[None]
    assert torch.equal(read(ids).logits, made(ids).logits)


@pytest.mark.parametrize("adaptation", ADAPTATIONS.values(), ids=ADAPTATIONS)
@pytest.mark.parametrize(
    ("name", "family"),
    slow_unless(
        {("ppo", "gpt2"), ("reinforce", "llama")}.__contains__, product(("ppo", "reinforce"), ("gpt2", "llama"))
    ),
)
def test_training_leaves_the_reference_as_it_was_to_the_bit(name, family, adaptation):
    task, env, policy = setting(family, adaptation)
    alone = copy.deepcopy(task.reference)  # what the reference would be with weights of its own
    before, head = digest(task.reference), policy.value_head.weight.clone()
    own = {n: p.clone() for n, p in policy.named_parameters() if p.requires_grad}
    agent = make_agent(name, policy, task, episodes=16, group_size=4, iterations=3, learning_rate=1e-2)
    seen = []
    learn(agent, env, callback=lambda agent, traj, metrics: seen.append((traj, metrics)))
    metrics, last = seen[0][1], seen[-1][0]
    assert abs(metrics["kl"]) < 1e-12  # the adapter starts as the identity
    if name == "ppo":
        assert metrics["logprob_gap_max"] < 1e-12
        assert not torch.equal(policy.value_head.weight, head)
    assert digest(task.reference) == before
    moved = [n for n, p in own.items() if not torch.equal(p, policy.get_parameter(n))]
    assert any(n.startswith("model.") for n in moved)
    separate = TextVectorEnv(tiny.task(reference=alone), 8, group_size=4).mdp
    ours = env.mdp.reference_logprob(last.prompt, last.response)
    assert torch.equal(ours, separate.reference_logprob(last.prompt, last.response))
    torch.testing.assert_close(ours, last.ref_logprob.to(ours), rtol=0, atol=1e-12)
    assert not torch.allclose(ours, last.logprob.to(ours), atol=1e-6)
    if adaptation.lora_rank:  # the other way to the reference
        policy.model.disable_adapters()
        assert torch.equal(logits(policy.model), logits(alone))
        policy.model.enable_adapters()
        assert not torch.equal(logits(policy.model), logits(alone))


def test_a_shared_weight_that_is_trained_would_be_noticed():
    """The negative control: with one of the shared parameters trained, the reference drifts."""
    task, env, policy = setting("llama", FROZEN)
    before = digest(task.reference)
    decoder_layers(policy.model)[1][0].self_attn.q_proj.weight.requires_grad_(True)
    learn(make_agent("reinforce", policy, task, episodes=16, group_size=4, iterations=1), env)
    assert digest(task.reference) != before


@pytest.mark.parametrize("adaptation", ADAPTATIONS.values(), ids=ADAPTATIONS)
@pytest.mark.parametrize("name", slow_unless("ppo".__eq__, ["ppo", "expert-iteration"]))
def test_a_checkpoint_holds_what_is_trained_and_continues_bit_for_bit(name, adaptation):
    settings = {"episodes": 16, "group_size": 4, "iterations": 4}
    task, env, policy = setting("gpt2", adaptation)
    agent = make_agent(name, policy, task, **settings)
    learn(agent, env, 2)
    tensors, counters = agent.checkpoint()
    held = {n.removeprefix("policy.") for n in tensors if n.startswith("policy.")}
    every = dict(policy.named_parameters(remove_duplicate=False))
    assert held == {n for n in policy.state_dict() if n not in every or every[n].requires_grad}
    weights = sum(t.numel() for n, t in tensors.items() if n.startswith("policy."))
    assert weights < 0.7 * sum(p.numel() for p in policy.parameters())
    learn(agent, env)
    _, other_env, other_policy = setting("gpt2", adaptation)
    twin = make_agent(name, other_policy, task, **settings)
    twin.restore(tensors, counters)
    learn(twin, other_env)
    assert batches.same(twin.checkpoint()[0], agent.checkpoint()[0])


def test_restarting_from_the_start_writes_no_shared_weight():
    task, env, policy = setting("gpt2", LORA)
    agent = make_agent("expert-iteration", policy, task, episodes=16, group_size=4, iterations=2, restart=True)
    versions = [p._version for p in task.reference.parameters()]
    assert agent._first.keys() == learned_state(policy).keys()
    learn(agent, env)
    assert [p._version for p in task.reference.parameters()] == versions


def test_a_checkpoint_on_another_base_is_refused():
    _, _, policy = setting("gpt2", LORA)
    tensors, counters = make_agent("ppo", policy).checkpoint()
    base = model("gpt2")
    with torch.no_grad():
        base.transformer.h[0].mlp.c_fc.bias[0] += 1e-12
    env = TextVectorEnv(tiny.task(reference=base), 8)
    twin = make_agent("ppo", LMPolicy.for_mdp(env.mdp, adapted(base, LORA, seed=3)))
    with pytest.raises(ValueError, match="other frozen weights"):
        twin.restore(tensors, counters)
    assert frozen_hash(adapted(model("gpt2"))) is None


@pytest.mark.parametrize("adaptation", ADAPTATIONS.values(), ids=ADAPTATIONS)
def test_both_paths_sample_the_same(adaptation):
    """Cached decoding, generation and teacher forcing all see the adapters."""
    from lm_envs.env.rollout import collect

    _, env, policy = setting("llama", adaptation)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    bulk, steps = rollout(env, policy, episodes=12, seed=5), collect(env, policy, episodes=12, seed=5)
    assert torch.equal(bulk.response, steps.response)
    torch.testing.assert_close(policy.evaluate(bulk).logprob, bulk.logprob, rtol=0, atol=1e-10, check_dtype=False)
    assert float((bulk.logprob - bulk.ref_logprob).abs().max()) > 1e-3


def test_in_bfloat16_too():
    start = model("llama").bfloat16()
    for adaptation in ADAPTATIONS.values():
        policy = adapted(start, adaptation)
        assert torch.equal(logits(policy), logits(start)) and frozen_hash(policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_layers": -1}, "freeze_layers must be at least 0, not -1"),
        ({"lora_rank": 1.5}, "lora_rank must be a whole number"),
        ({"lora_rank": 2_000_000_000}, "lora_rank must be at most 16384"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_alpha": 4.0}, "mean nothing without lora_rank"),
        ({"freeze_layers": 3}, "freeze_layers=3, and GPT2LMHeadModel has 2 layers"),
        ({"lora_rank": 2, "lora_targets": ["q_proj"]}, "called 'q_proj'; there are c_attn, c_fc, c_proj"),
        ({"lora_rank": 2, "freeze_layers": 2}, "no linear map is left for LoRA: 2 of 2 layers are frozen"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(model("gpt2"), Adaptation(**settings))


def test_layers_that_cannot_be_told_are_an_error():
    broken = model("llama")
    broken.model.more = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with pytest.raises(ValueError, match="the 2 layers of LlamaForCausalLM: 2 lists"):
        decoder_layers(broken)


def test_looking_for_what_lies_below_changes_nothing():
    start = model("gpt2")
    start.transformer.ln_f.weight.requires_grad_(True)
    parameters_below(start, start.transformer.h[:1])
    assert [n for n, p in start.named_parameters() if p.requires_grad] == ["transformer.ln_f.weight"]
    assert all(p.grad is None for p in start.parameters())
