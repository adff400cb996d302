"""Decoding in fixed shapes gives what decoding in growing ones does (laws 2, 3 and 4), traced and compiled or not; what
cannot be decoded so is refused before anything runs."""

import copy
from importlib.util import find_spec

import pytest
import torch

from lm_envs.algos.policies.adaptation import Adaptation, adapted
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model import compiled
from lm_envs.model.compiled import FixedRows, check_compilable, rounded
from lm_envs.model.decoding import generate
from lm_envs.model.kv_cache import RECOMPUTE, RowCache
from lm_envs.model.tokens import left_pad
from tests import tiny
from tests.families import FAMILIES, QUICK, SINGLE, WIDER, build
from tests.lm_envs.model.test_encoder_decoder import build as encoder_decoder
from tests.marks import slow_unless
from tests.tiny import EOS

PLACES, NEW = 4, 9
PROMPTS = [[1], [2, 3], [4, 5, 6], [7, 8, 9, 1], [3], [9, 2], [5, 5, 1], [8], [6, 4]]  # nine rows, in a program of ten
# Those whose layers keep other things than keys and values, and one that counts on a growing cache.
REFUSED = {"Mamba", "Mamba2", "Jamba", "FalconH1", "Bamba", "FalconMamba", "GraniteMoeHybrid", "Lfm2", "NemotronH"}
REFUSED |= {"Qwen3Next", "Gemma3n", "Gemma4", "GPTNeo"}


def compiler():
    try:
        compiled.check_tools("cpu")
    except ValueError:
        return False
    return True


BACKENDS = [
    None,
    "eager",
    pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not compiler(), reason="no C++ compiler")]),
]


def sampled(model, prompts, uniforms, **more):
    """Responses, their log-probabilities, and what the logits were made from."""
    hidden = torch.zeros(len(prompts), NEW, 16, dtype=model.dtype)

    def observe(t, rows, states):
        hidden[rows, t] = states

    arguments = dict(max_new_tokens=NEW, temperature=2.0, min_new_tokens=2, observe=observe)
    return *generate(model, prompts, uniforms, (EOS, 5, 7), **arguments, **more), hidden


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mistral, window", "Bloom"])
def test_fixed_shapes_sample_what_growing_ones_do(family, backend):
    """Unequal prompts, early ends, a minimum length; then other weights, in place, and other prompts in the old rows'
    memory."""
    model = build(family)
    fixed = FixedRows(model, NEW, backend)
    tolerance = 2e-5 if family in SINGLE or backend == "inductor" else 1e-9
    for seed, texts in enumerate((PROMPTS, PROMPTS[:4] + PROMPTS[:5], [[2], [3]] * 5)):
        uniforms = torch.rand(len(texts), NEW, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        prompts = torch.as_tensor(left_pad(texts, PLACES))
        found, expected = sampled(model, prompts, uniforms, fixed=fixed), sampled(model, prompts, uniforms)
        lengths = (expected[0] >= 0).sum(dim=1)
        assert lengths.min() < lengths.max() and lengths.min() >= 2
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    assert len(fixed._programs) == 1


@pytest.mark.parametrize("broken", ["mask", "positions"])
def test_rows_that_remember_the_last_batch_are_caught(broken, monkeypatch):
    """Negative control: what a program keeps of the prompts before is wrong for these."""
    start = compiled._Program.start

    def forgetful(self, prompts):
        kept = getattr(self, broken).clone()
        start(self, prompts)
        getattr(self, broken).copy_(kept)

    monkeypatch.setattr(compiled._Program, "start", forgetful)
    with pytest.raises(AssertionError):
        test_fixed_shapes_sample_what_growing_ones_do("GPT2", None)


def test_batches_of_like_sizes_share_a_program():
    assert [rounded(n) for n in (1, 2, 7, 8, 9, 11, 16, 17, 21, 31, 32, 33, 64, 65, 250)] == [
        *(1, 2, 7, 8, 10, 12, 16, 20, 24, 32, 32, 40, 64, 80, 256)
    ]
    fixed = FixedRows(tiny.gpt2(), 6, None)
    for rows, width in ((9, 3), (10, 5), (10, 58), (2, 3), (10, 59)):
        fixed.prefill(torch.ones(rows, width, dtype=torch.long))
    assert list(fixed._programs) == [(10, 64), (2, 64), (10, 128)]  # 59 places and 6 new tokens are 65 columns


def test_what_is_not_a_number_does_not_stay():
    """A masked column is multiplied by zero, and zero times NaN is NaN."""
    model = tiny.gpt2()
    fixed = FixedRows(model, 2, None)
    prompts = torch.tensor([[1, 2], [-1, 3]])
    fixed.prefill(prompts)
    expected = fixed.advance(torch.tensor([4, 5]))
    for layer in fixed._program.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    fixed.prefill(prompts)
    assert torch.equal(fixed.advance(torch.tensor([4, 5])), expected)


def test_a_copy_reads_its_own_weights():
    model, prompts = tiny.gpt2(), torch.tensor([[1, 2], [-1, 3]])
    held = {"model": model, "fixed": FixedRows(model, 4, None)}
    before = held["fixed"].prefill(prompts), held["fixed"].advance(torch.tensor([1, 2]))
    other = copy.deepcopy(held)
    assert other["fixed"].model is other["model"] is not model
    with torch.no_grad():
        for weight in other["model"].parameters():
            weight += 0.1
    for rows, expected in ((other["fixed"], RowCache(other["model"])), (held["fixed"], RowCache(model))):
        for found in (lambda r: r.prefill(prompts), lambda r: r.advance(torch.tensor([1, 2]))):
            torch.testing.assert_close(found(rows), found(expected), rtol=0, atol=1e-9)
    assert (other["fixed"].advance(torch.tensor([1, 2])) - before[1]).abs().max() > 1e-3


def test_the_model_is_left_as_it_was():
    model = tiny.gpt2()
    before, head, hooks = dict(vars(model)), model.get_output_embeddings(), len(model.lm_head._forward_pre_hooks)
    check_compilable(model)
    assert vars(model) == before and model.get_output_embeddings() is head
    assert len(head._forward_pre_hooks) == hooks


@pytest.mark.parametrize("family", slow_unless(QUICK.__contains__, [*FAMILIES, *WIDER]))
def test_every_family_agrees_or_is_refused(family, monkeypatch):
    monkeypatch.setattr(compiled, "TRIED", None)
    monkeypatch.setattr(compiled, "check_tools", lambda device: None)
    if family in REFUSED:
        with pytest.raises(ValueError, match=r"cannot be compiled: .*--compile on the command line"):
            check_compilable(build(family))
    else:
        check_compilable(build(family))
        assert compiled._deviation(build(family)) < 1e-5


def test_what_cannot_be_compiled_is_refused_before_anything_runs(monkeypatch):
    def refused(model, message):
        with pytest.raises(ValueError, match=message):
            LMPolicy(model, EOS, PLACES, NEW, compile=True)

    refused(encoder_decoder("T5"), "encoder-decoders keep two caches")
    model = tiny.gpt2()
    setattr(model, RECOMPUTE, True)
    refused(model, "cannot be kept row by row")
    model = tiny.gpt2()
    monkeypatch.setattr(model.transformer.h[0], "forward", lambda x, *_, **__: print(end="") or x.cpu().numpy())
    refused(model, "cannot be compiled: its steps cannot be traced")
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        refused(tiny.gpt2(), r"needs a C\+\+ compiler, and none was found.*apt install g\+\+")
    if find_spec("triton") is None:
        with pytest.raises(ValueError, match="needs Triton"):
            compiled.check_tools("cuda")


def env_and_policy(dtype=torch.float64, **options):
    reference = tiny.gpt2(dtype=dtype)
    env = TextVectorEnv(tiny.task(reference=reference), 4)
    policy = LMPolicy.for_mdp(env.mdp, copy.deepcopy(reference).requires_grad_(True), **options)
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(3))
    return env, policy


def in_fixed_shapes(policy, backend=None):
    """As ``compile=True`` makes it, without the compiler."""
    policy._fixed = FixedRows(policy.model, policy.max_new_tokens, backend)
    return policy


def test_the_bulk_path_is_the_step_path():
    """Law 2, and a whole iteration: the same texts, values and weights."""
    env, policy = env_and_policy()
    found, expected = rollout(env, in_fixed_shapes(policy), episodes=9), collect(env, policy, episodes=9)
    assert torch.equal(found.response, expected.response)
    torch.testing.assert_close(found.reward, expected.reward, rtol=0, atol=1e-9)
    after = []
    for fix in (lambda policy: policy, in_fixed_shapes):
        env, policy = env_and_policy()
        agent = make_agent("ppo", fix(policy), episodes=8, minibatches=2, learning_rate=1e-2)
        ratios = [agent.iteration(env)[1]["logprob_gap_max"] for _ in range(3)]
        assert max(ratios) < 1e-9  # law 7: also once the weights have changed under the program
        after.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*after, rtol=0, atol=1e-7)


@pytest.mark.parametrize("adaptation", [dict(lora_rank=2), dict(freeze_layers=1)], ids=["lora", "frozen"])
def test_adapters_are_read_where_they_are_trained(adaptation):
    if "lora_rank" in adaptation:
        pytest.importorskip("peft")
    model = adapted(tiny.gpt2(), Adaptation(**adaptation), 0)
    fixed = FixedRows(model, NEW, "eager")
    prompts = torch.as_tensor(left_pad(PROMPTS, PLACES))
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(PROMPTS), NEW, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.2 * torch.randn(weight.shape, generator=generator)
        found, expected = sampled(model, prompts, uniforms, fixed=fixed), sampled(model, prompts, uniforms)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)


def test_reward_tokens_may_be_added_to_a_policy_that_has_programs():
    _, policy = env_and_policy()
    prompts, uniforms = torch.as_tensor(left_pad(PROMPTS, PLACES)), torch.rand(9, 6, dtype=torch.float64)
    plain = in_fixed_shapes(policy, "eager").respond(prompts, uniforms)
    policy.add_reward_tokens(2)
    policy.condition_on(1)
    found = policy.respond(prompts, uniforms)
    policy._fixed = None
    expected = policy.respond(prompts, uniforms)
    assert torch.equal(found[0], expected[0]) and not torch.equal(found[1], plain[1])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)


def test_lower_precision_is_that_of_autocast():
    _, policy = env_and_policy(torch.float32, autocast=torch.bfloat16)
    prompts, uniforms = torch.as_tensor(left_pad(PROMPTS, PLACES)), torch.rand(9, 6, dtype=torch.float64)
    policy.temperature = 1e-6  # the likeliest token
    expected = policy.respond(prompts, uniforms)
    found = in_fixed_shapes(policy).respond(prompts, uniforms)
    same = (found[0] == expected[0]).float().mean()
    assert same > 0.8
    assert policy._fixed._program.layers[0].keys.dtype == torch.bfloat16


def test_the_option_makes_programs():
    if not compiler():
        pytest.skip("no C++ compiler")
    _, policy = env_and_policy(compile=True)
    assert policy._fixed._backend == "inductor" and policy._fixed._room == policy.max_new_tokens
    assert not [name for name in policy.state_dict() if "fixed" in name]
    _, policy = env_and_policy()
    assert policy._fixed is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_cuda_graphs_sample_the_same(family):
    model = build(family).cuda()
    fixed = FixedRows(model, NEW)
    prompts = torch.as_tensor(left_pad(PROMPTS, PLACES)).cuda()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(PROMPTS), NEW, dtype=torch.float64, generator=generator).cuda()
        arguments = dict(max_new_tokens=NEW, min_new_tokens=2)
        found = generate(model, prompts, uniforms, EOS, fixed=fixed, **arguments)
        expected = generate(model, prompts, uniforms, EOS, **arguments)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1.05
