"""sb3-contrib's MaskablePPO unmodified, and the masks that the reference makes."""

import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib")
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecMonitor

import lm_envs
from lm_envs.algos.other_libraries.sb3 import MaskableCausalLMActorCriticPolicy, TextVecEnv
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.rollout import rollout
from lm_envs.env.single import TextEnv
from lm_envs.env.vector import TextBanditVectorEnv, TextVectorEnv
from tests import tiny
from tests.algos.other_libraries.sb3_pieces import WHOLE, Recorder, env, mean_return, policy


def top_k_of_the_reference(mdp, obs, k):
    text = torch.as_tensor(obs[obs >= 0])
    logits = mdp.reference(input_ids=text[None]).logits[0, -1]
    if (obs[mdp.prompt_length :] >= 0).sum() < mdp.min_new_tokens:
        logits[tiny.EOS] = -torch.inf
    allowed = torch.zeros(len(logits), dtype=torch.bool)
    allowed[logits.topk(k).indices] = True
    return allowed, logits.masked_fill(~allowed, -torch.inf)


def test_the_mask_is_the_references_top_k_in_action_report_and_penalty():
    venv = VecMonitor(env(reference_top_k=3, min_new_tokens=1, kl_coef=0.5))
    model = MaskablePPO(MaskableCausalLMActorCriticPolicy, venv, seed=0, learning_rate=0.0, n_epochs=1, **WHOLE)
    recorder = Recorder()
    model.learn(96, callback=recorder)
    mdp, ends = venv.get_attr("mdp")[0], 0
    for observed, actions, rewards, dones, infos, log_probs in recorder.steps:
        for row, action in enumerate(actions):
            obs = observed[row].numpy()
            allowed, ref_logits = top_k_of_the_reference(mdp, obs, 3)
            assert allowed[action] and allowed.sum() == 3
            text = torch.as_tensor(obs[obs >= 0])
            with torch.no_grad():
                mine = model.policy.lm.model(input_ids=text[None]).logits[0, -1].masked_fill(~allowed, -torch.inf)
            mine, ref = (torch.log_softmax(x, -1)[action] for x in (mine, ref_logits))
            assert float(log_probs[row]) == pytest.approx(float(mine), abs=1e-9)
            score = infos[row]["lm"]["score"] if dones[row] else 0.0
            assert rewards[row] == pytest.approx(score - 0.5 * float(mine - ref), abs=1e-5)
            if dones[row]:
                ends += 1
                final = torch.as_tensor(infos[row]["terminal_observation"])[None]
                bulk = mdp.reference_logprob(*final.split([mdp.prompt_length, mdp.max_new_tokens], 1))
                np.testing.assert_allclose(infos[row]["lm"]["ref_logprob"], bulk[0], atol=1e-9)
    assert ends > 5
    for batch in model.rollout_buffer.get(96):
        assert (batch.action_masks.sum(1) == 3).all()
        actions = batch.actions.long().flatten()
        _, logprob, entropy = model.policy.evaluate_actions(batch.observations, actions, batch.action_masks)
        assert (logprob - batch.old_log_prob).abs().max() < 1e-5 and entropy.max() < np.log(3) + 1e-9
        _, unmasked, _ = model.policy.evaluate_actions(batch.observations, actions)
        assert (unmasked - batch.old_log_prob).abs().max() > 0.1  # the mask is what makes them equal
        distribution = model.policy.get_distribution(batch.observations[:5], batch.action_masks[:5])
        torch.testing.assert_close(distribution.log_prob(actions[:5]), logprob[:5])


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_the_mask_belongs_to_the_state_in_every_autoreset_mode(mode):
    text = TextVectorEnv(tiny.task(), 3, reference_top_k=2, kl_coef=0.0, autoreset_mode=mode)
    obs, info = text.reset(seed=0)
    for _ in range(20):
        mask = info["action_mask"]
        np.testing.assert_array_equal(mask, text.action_masks())
        for row in (~text._done).nonzero()[0]:
            assert mask[row].tolist() == top_k_of_the_reference(text.mdp, obs[row], 2)[0].int().tolist()
        obs, _, done, _, info = text.step(mask.argmax(axis=1))
        if mode == "Disabled" and done.any():
            obs, info = text.reset(options={"reset_mask": done})


def test_a_masked_token_is_refused_and_so_is_what_cannot_mask():
    single = TextEnv(tiny.task(), reference_top_k=2, kl_coef=0.0)
    obs, info = single.reset(seed=0)
    assert info["action_mask"].tolist() == single.action_masks().astype(int).tolist()
    with pytest.raises(ValueError, match="not among the 2 that reference_top_k allows"):
        single.step(int(info["action_mask"].argmin()))
    with pytest.raises(ValueError, match="rollout generates without asking the reference"):
        rollout(single, policy(env()).lm, episodes=2)
    with pytest.raises(ValueError, match="LMPolicy does not read action masks"):
        LMPolicy.for_mdp(single.mdp, tiny.gpt2())
    with pytest.raises(ValueError, match="MDP env"):
        TextBanditVectorEnv(tiny.task(), 2, reference_top_k=2)
    with pytest.raises(ValueError, match="reference_top_k must be at least 1"):
        TextEnv(tiny.task(), reference_top_k=0)


def test_masks_of_all_tokens_change_nothing():
    plain, masked = (TextVectorEnv(tiny.task(), 4, **options) for options in ({}, {"reference_top_k": 10}))
    for text in (plain, masked):
        text.reset(seed=1)
    for _ in range(12):
        lm_envs.report(plain, np.full(4, -1.0)), lm_envs.report(masked, np.full(4, -1.0))
        actions = np.array([1, 2, 0, 3])
        np.testing.assert_allclose(plain.step(actions)[1], masked.step(actions)[1], atol=1e-12)
    assert masked.action_masks().all()


@pytest.mark.slow
def test_maskable_ppo_learns_saves_and_predicts(tmp_path):
    venv = VecMonitor(TextVecEnv(TextVectorEnv(tiny.task(), 8, reference_top_k=5)))
    settings = WHOLE | dict(n_epochs=4, stats_window_size=40, seed=0)
    still = MaskablePPO(MaskableCausalLMActorCriticPolicy, venv, learning_rate=0.0, **settings)
    model = MaskablePPO(MaskableCausalLMActorCriticPolicy, venv, learning_rate=1e-2, **settings)
    assert mean_return(model.learn(8 * 96)) > mean_return(still.learn(3 * 96)) + 0.5
    model.save(tmp_path / "model.zip")
    obs = venv.reset()
    masks = np.stack(venv.env_method("action_masks"))
    actions, _ = MaskablePPO.load(tmp_path / "model.zip").predict(obs, action_masks=masks)
    assert masks[np.arange(8), np.asarray(actions)].all() and actions.logprob.shape == (8,)
