"""Encoder-decoder models as policies and references: padding, rows, both paths, log-probabilities, updates, saving."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

from lm_envs.algos.policies.adaptation import Adaptation, adapted, save_model
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.ppo import PPO, PPOConfig
from lm_envs.algos.reinforce import REINFORCE, ReinforceConfig
from lm_envs.env.rollout import collect, rollout
from lm_envs.env.single import TextBanditEnv
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model.decoding import Decoder, generate
from lm_envs.model.encoder_decoder import decoder_prefix, encoder_inputs
from lm_envs.model.forwards import response_forward, response_logprob
from lm_envs.model.kv_cache_cross import CrossRowCache, rows_of
from lm_envs.model.tokens import left_pad
from tests import tiny
from tests.marks import slow_unless
from tests.tiny import EOS

START, LANGUAGE = 9, 8
TOKENS = dict(vocab_size=10, eos_token_id=EOS, pad_token_id=EOS, decoder_start_token_id=START)
T5 = dict(TOKENS, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2)
T5 |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=12, initializer_factor=2.0)
BART = dict(TOKENS, d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, init_std=0.4)
FAMILIES = {
    "T5": T5,
    "T5, untied": ("T5", dict(T5, num_layers=1, tie_word_embeddings=False, feed_forward_proj="gated-gelu")),
    "MT5": T5,
    "Bart": BART,
    "MBart": BART,
    "Marian": BART,
    "Pegasus": BART,
    "M2M100": BART,
}
EACH = slow_unless({"T5, untied", "Bart", "MBart", "M2M100"}.__contains__, FAMILIES)
CACHED = [name for name in FAMILIES if name != "M2M100"]  # its positions are told from its pad tokens
HEADS = {name: f"{name}ForConditionalGeneration" for name in ("T5", "MT5", "Bart", "MBart", "Pegasus", "M2M100")} | {
    "Marian": "MarianMTModel"
}


def build(family, seed=0, dtype=torch.float64):
    given = FAMILIES[family]
    name, settings = given if isinstance(given, tuple) else (family, given)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, HEADS[name])(getattr(transformers, f"{name}Config")(**settings))
        model = model.to(dtype).eval().requires_grad_(False)
        for place, parameter in model.named_parameters():
            # T5 scales its tied output down, and positions start small beside what differs by token.
            if "relative_attention_bias" in place or "embed_positions" in place:
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter += 0.3 * torch.randn_like(parameter)
        model.generation_config.forced_eos_token_id = None
        if family == "MBart":
            model.generation_config.forced_bos_token_id = LANGUAGE
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    return model


def plain(model, prompt, response):
    """Logits before each token of one response, by one call of the model on tokens without padding or cache."""
    prefix = [START, LANGUAGE] if model.config.model_type == "mbart" else [START]
    tokens = torch.tensor([prefix + list(response)[:-1]])
    logits = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=tokens, use_cache=False).logits[0]
    return logits[len(prefix) - 1 :]


@pytest.mark.parametrize("family", FAMILIES)
def test_law_4_padding_changes_no_logprob(family):
    model = build(family)
    found = response_forward(
        model,
        torch.tensor([[-1, -1, -1, 1, 2], [5, 6, 7, 8, 9]]),
        torch.tensor([[3, 4, 5, EOS, -1, -1], [1, 1, 1, 1, 1, 1]]),
    )
    logits, hidden = found.logits(), found.hidden
    torch.testing.assert_close(logits[0, :4], plain(model, [1, 2], [3, 4, 5, EOS]), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits[1], plain(model, [5, 6, 7, 8, 9], [1] * 6), rtol=0, atol=1e-9)
    # What the head reads, scaling included; a bias on the logits (BART) comes after it.
    bias = getattr(model, "final_logits_bias", 0.0)
    torch.testing.assert_close(model.get_output_embeddings()(hidden) + bias, logits, rtol=0, atol=1e-9)
    assert hidden.shape == (2, 6, 16)


@pytest.mark.parametrize("family", ["Bart", "T5"])
def test_a_prompt_left_where_it_is_would_be_caught(family):
    """Negative control of law 4: BART counts positions from the first column, so the prompt must begin there; T5 does
    not mind."""
    model = build(family)
    tokens = torch.tensor([[START, 3]])
    left = dict(input_ids=torch.tensor([[0, 0, 1, 2]]), attention_mask=torch.tensor([[0, 0, 1, 1]]))
    moved = encoder_inputs(torch.tensor([[-1, -1, 1, 2], [3, 4, 5, -1]]))
    assert moved["input_ids"].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert moved["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    wrong = model(**left, decoder_input_ids=tokens).logits
    gap = (wrong - plain(model, [1, 2], [3, 4])).abs().max()
    assert gap > 1e-3 if family == "Bart" else gap < 1e-9


@pytest.mark.parametrize("family", EACH)
def test_decoder_gives_plain_logits_under_any_use(family):
    """Rows that grow, stand still, start anew with another prompt, and change their text under the cache."""
    model = build(family)
    places, steps = 4, 6
    decoder = Decoder(model, steps)
    generator = np.random.default_rng(0)
    obs = torch.full((4, places + steps), -1)

    def restart(row):
        length = generator.integers(1, places + 1)
        obs[row] = -1
        obs[row, places - length : places] = torch.tensor(generator.integers(0, 10, length))

    for row in range(4):
        restart(row)
    obs[0, places] = 3  # a text that has begun when the cache is made
    for _ in range(25):
        logits = decoder(obs)
        for row in range(4):
            prompt, response = obs[row, :places], obs[row, places:]
            expected = plain(model, prompt[prompt >= 0].tolist(), [*response[response >= 0].tolist(), EOS])[-1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-9)
        for row in range(4):
            length = int((obs[row, places:] >= 0).sum())
            what = generator.choice(["grow", "grow", "grow", "stand", "restart", "swap"])
            if what == "restart" or length == steps:
                restart(row)
            elif what == "swap":
                present = obs[row] >= 0
                obs[row, present] = torch.tensor(generator.integers(0, 10, int(present.sum())))
            elif what == "grow":
                obs[row, places + length] = int(generator.integers(0, 10))
    assert (rows_of(model) is not None) == (family in CACHED)


def refilled(model):
    """The second row's logits after it got a shorter prompt and then grew beside a longer row."""
    decoder = Decoder(model, 3)
    decoder(torch.tensor([[1, 2, 3, -1, -1, -1], [4, 5, 6, -1, -1, -1]]))
    decoder(torch.tensor([[1, 2, 3, 4, -1, -1], [4, 5, 6, 7, -1, -1]]))
    decoder(torch.tensor([[1, 2, 3, 4, 5, -1], [-1, -1, 7, -1, -1, -1]]))
    return decoder(torch.tensor([[1, 2, 3, 4, 5, 6], [-1, -1, 7, 8, -1, -1]]))[1]


@pytest.mark.parametrize("broken", ["cross", "mask", "places"])
def test_a_careless_refill_is_caught(broken, monkeypatch):
    """Negative control: the old prompt's keys, its mask, or the columns' numbers for positions give other logits."""
    model = build("Bart")
    right = plain(model, [7], [8, EOS])[-1]
    torch.testing.assert_close(refilled(model), right, rtol=0, atol=1e-9)
    if broken == "places":
        monkeypatch.setattr("lm_envs.model.kv_cache_cross._position_table", lambda model: None)
        monkeypatch.setattr("lm_envs.model.kv_cache_cross._can_place", lambda model: True)
    else:
        put = CrossRowCache._put

        def careless(self, rows, other):
            mask, cross = self._mask, [(layer.keys, layer.values) for layer in self._cross.layers]
            put(self, rows, other)
            if broken == "mask":
                self._mask = mask
            else:
                for layer, (keys, values) in zip(self._cross.layers, cross, strict=True):
                    layer.keys, layer.values = keys, values

        monkeypatch.setattr(CrossRowCache, "_put", careless)
    assert (refilled(model) - right).abs().max() > 1e-3


@pytest.mark.parametrize("family", EACH)
def test_generate_is_row_by_row_and_its_logprob_is_the_scored_one(family):
    model = build(family)
    prompts = torch.as_tensor(left_pad([[1], [2, 3], [4, 5, 6], [7, 8, 9, 1]] * 8, 4))
    uniforms = torch.rand(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = dict(max_new_tokens=6, temperature=8.0, min_new_tokens=2)
    response, logprob = generate(model, prompts, uniforms, EOS, **arguments)
    for row in range(0, 32, 3):
        single, _ = generate(model, prompts[row : row + 1], uniforms[row : row + 1], EOS, **arguments)
        assert single[0].tolist() == response[row].tolist()
    scored = response_logprob(model, prompts, response, EOS, temperature=8.0, min_new_tokens=2, batch_size=5)
    torch.testing.assert_close(scored, logprob, rtol=0, atol=1e-9)
    assert len(set((response >= 0).sum(dim=1).tolist())) > 1


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "T5, untied"])
def test_the_likeliest_tokens_are_those_of_transformers_generate(family):
    model = build(family)  # not the one with more layers in the decoder: transformers sizes its cache by the encoder
    prompt = [3, 1, 4]
    options = dict(max_new_tokens=6, do_sample=False, num_beams=1, bad_words_ids=[[EOS]])
    found = model.generate(torch.tensor([prompt]), **options)
    prefix = decoder_prefix(model)
    assert found[0, : len(prefix)].tolist() == prefix
    response = []
    for _ in range(6 - (len(prefix) - 1)):
        logits = Decoder(model, 6)(torch.tensor([[*prompt, *response, *[-1] * (6 - len(response))]]))[0]
        logits[EOS] = -torch.inf
        response.append(int(logits.argmax()))
    assert found[0, len(prefix) :].tolist() == response


def task(family, **changes):
    return tiny.task(reference=build(family), max_new_tokens=5, **changes)


OPTIONS = dict(kl_coef=0.3, temperature=8.0, min_new_tokens=1, group_size=2)


@pytest.mark.parametrize("family", ["T5", "Bart", "MBart", "M2M100"])
@pytest.mark.parametrize("rows", slow_unless((7).__eq__, [1, 7]))
def test_law_2_bulk_path_is_step_path(family, rows):
    env = TextVectorEnv(task(family), rows, **OPTIONS)
    policy = LMPolicy.for_mdp(env.mdp, build(family, seed=1))
    bulk = rollout(env, policy, episodes=40, first_episode=5, seed=4)
    steps = collect(env, policy, episodes=40, first_episode=5, seed=4)
    assert bulk.response.tolist() == steps.response.tolist()
    for name in ("logprob", "ref_logprob", "reward", "score"):
        torch.testing.assert_close(getattr(bulk, name), getattr(steps, name), rtol=0, atol=1e-9, msg=name)
    assert len(set(bulk.lengths.tolist())) > 2
    assert (bulk.logprob - bulk.ref_logprob).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["mdp", "bandit"])
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_law_7_act_is_evaluate_and_the_value_reads_the_state_before(family, kind):
    env = TextVectorEnv(task(family), 4, **OPTIONS) if kind == "mdp" else TextBanditEnv(task(family), **OPTIONS)
    policy = LMPolicy.for_mdp(env.mdp, build(family), bandit=kind == "bandit")
    torch.nn.init.normal_(policy.value_head.weight)
    traj = rollout(env, policy, episodes=8, seed=2)
    now = policy.evaluate(traj)
    torch.testing.assert_close(now.logprob, traj.logprob, rtol=0, atol=1e-9)
    torch.testing.assert_close(traj.ref_logprob, traj.logprob, rtol=0, atol=1e-9)
    torch.testing.assert_close(now.value[traj.mask.new_ones(8, 1).nonzero()[:, 0], 0], traj.value[:, 0])
    assert bool((now.value[:, -1] == 0).all()) and bool((now.value[:, 0] != 0).all())
    if kind == "mdp":
        torch.testing.assert_close(now.value, traj.value, rtol=0, atol=1e-9)
        changed = traj.select(slice(None))
        changed.prompt = traj.prompt.clone()
        changed.prompt[:, -1] = (changed.prompt[:, -1] % 9) + 1
        assert (policy.evaluate(changed).value[:, 0] - now.value[:, 0]).abs().min() > 1e-9


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_ppo_starts_at_ratio_one_and_learns(family):
    made = task(family)
    before = {name: value.clone() for name, value in made.reference.state_dict().items()}
    policy = LMPolicy.for_mdp(TextVectorEnv(made).mdp, adapted(made.reference))
    config = PPOConfig(iterations=1, episodes=16, epochs=1, minibatches=1, learning_rate=1e-3)
    agent = PPO(policy, config)
    _, metrics = agent.iteration(TextVectorEnv(made, kl_coef=0.1))
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    moved = [name for name, value in policy.model.state_dict().items() if not torch.equal(value, before[name])]
    for part in ("encoder", "decoder"):
        assert any(part in name for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in made.reference.state_dict().items())
    env = TextVectorEnv(made, 3)  # and the cache does not outlive the old weights
    bulk, steps = rollout(env, policy, episodes=6), collect(env, policy, episodes=6)
    torch.testing.assert_close(bulk.logprob, steps.logprob, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_reinforce_raises_the_reward(family):
    made = task(family)
    policy = LMPolicy.for_mdp(TextVectorEnv(made).mdp, adapted(made.reference))
    agent = REINFORCE(policy, ReinforceConfig(iterations=15, episodes=64, learning_rate=1e-2))
    env = TextVectorEnv(made, group_size=4)
    before = rollout(env, policy, episodes=256, seed=9).score.mean()
    for _ in range(15):
        agent.iteration(env)
    assert rollout(env, policy, episodes=256, seed=9).score.mean() > before + 0.5


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_checkpointing_changes_no_gradient(family):
    """Dropout stays off in it too: BART's layers apply their own by the flag that checkpointing sets."""
    env = TextVectorEnv(task(family), **OPTIONS)
    found = []
    for checkpointing in (False, True):
        model = build(family).requires_grad_(True)
        policy = LMPolicy.for_mdp(env.mdp, model, gradient_checkpointing=checkpointing)
        traj = rollout(env, policy, episodes=6)
        policy.evaluate(traj).logprob.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["T5", "MBart"])
def test_what_is_saved_loads_in_transformers(family, tmp_path):
    model = build(family, dtype=torch.float32)
    save_model(model, tiny.tokenizer(), tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    prompt, response = torch.tensor([[1, 2]]), torch.tensor([[3, 4, EOS]])
    torch.testing.assert_close(
        response_forward(loaded, prompt, response).logits(), response_forward(model, prompt, response).logits()
    )


def test_no_start_token_is_refused():
    model = build("T5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration does not say which token starts its decoder"):
        LMPolicy(model, EOS, 4, 6).respond(torch.tensor([[1]]), torch.rand(1, 6, dtype=torch.float64))


def test_adapters_and_frozen_layers_are_refused():
    for adaptation in (Adaptation(lora_rank=2), Adaptation(freeze_layers=1)):
        with pytest.raises(ValueError, match="encoder-decoder"):
            adapted(build("T5"), adaptation)


def test_a_context_holds_prompt_and_response_each():
    """BART has 32 places for the prompt and 32 for the start token and the response."""
    prompts = {"train": [[1] * 32]}
    assert TextVectorEnv(tiny.task(reference=build("Bart"), prompts=prompts, max_new_tokens=32)).mdp.prompt_length == 32
    for changes in (dict(max_new_tokens=33), dict(prompts={"train": [[1] * 33]})):
        with pytest.raises(ValueError, match="context of 32"):
            TextVectorEnv(tiny.task(**{**dict(reference=build("Bart"), prompts=prompts, max_new_tokens=32), **changes}))
