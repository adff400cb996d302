"""The settings that the published tables, and the papers where they name them, are of. A default that changes makes
another algorithm under the same name: change it here too, and measure again."""

import json

import pytest

from lm_envs.algos.dpo import DPOConfig
from lm_envs.algos.engine.kl_coefficient import AdaptiveKL
from lm_envs.algos.engine.settings_control import control_settings
from lm_envs.algos.engine.settings_enumerable import EPISODES, TABULAR, VALUE_SCALE
from lm_envs.algos.registry import ALGORITHMS, WRAPPERS, load
from lm_envs.files import MANIFEST
from lm_envs.reward.chat_endpoint import ChatEndpoint
from lm_envs.tasks.corpus import CorpusConfig
from lm_envs.tasks.custom import CustomConfig
from lm_envs.tasks.enumerable import EnumerableConfig
from lm_envs.tasks.reviews import FOLDER
from lm_envs.tasks.reviews_build import ReviewsConfig
from lm_envs.tasks.translation import TranslationConfig

ENGINE = dict(
    learning_rate=3e-4, anneal=True, iterations=100, episodes=128, steps=None, group_size=1, draws=1, epochs=1,
    minibatches=1, micro_batch=None, max_grad_norm=1.0, adam_eps=1e-5, gamma=1.0, kl_coef=None, kl_target=None,
    kl_horizon=3.0, seed=0,
)  # fmt: skip
DATA = ENGINE | dict(learning_rate=1e-3, episodes=64)
PAIRS = dict(pairs=2048, flip=0.25)
GRADIENT = ENGINE | dict(
    learning_rate=1e-3, kl_loss=None, informative=False, correction=None, correction_limit=2.0, overlong=0.0,
    overlong_share=0.2,
)  # fmt: skip
CRITIC = GRADIENT | dict(lam=0.95, value_from="policy", whiten_advantage=True, value_coef=0.1, entropy_coef=0.0)
PROXIMAL = CRITIC | dict(learning_rate=3e-4, epochs=4, minibatches=2, value_clip=0.2, kl_stop=None)
PPO = PROXIMAL | dict(clip=0.2, clip_high=None, loss_mean="minibatch")
GRPO = GRADIENT | dict(group_size=8, minibatches=2, clip=0.2, clip_high=None, loss_mean="response")
SETTINGS = {
    "sft": DATA,
    "reward-modelling": DATA | dict(ranking="pairs"),
    "dpo": DATA | PAIRS | dict(learning_rate=3e-4, loss="sigmoid", beta=0.1, length_normalized=False),
    "binary-feedme": DATA | PAIRS,
    "reward-conditioning": DATA | PAIRS | dict(episodes=128),
    "expert-iteration": ENGINE
    | dict(learning_rate=1e-3, group_size=8, epochs=2, keep=1, keep_by="prompt", restart=False),
    "quark": ENGINE
    | dict(
        learning_rate=1e-3, minibatches=8, quantiles=5, best_only=False, pool=None, learn_episodes=512, entropy_coef=0.0
    ),
    "online-dpo": ENGINE | dict(learning_rate=1e-3, group_size=4, loss="sigmoid", beta=0.1, length_normalized=False),
    "xpo": ENGINE
    | dict(learning_rate=1e-3, group_size=1, loss="sigmoid", beta=0.1, length_normalized=False, optimism=1e-3),
    "distillation": ENGINE | dict(learning_rate=1e-3, teacher=None, as_reward=False),
    "bond": ENGINE | dict(learning_rate=1e-3, group_size=4, forward_weight=0.5, anchor_rate=0.02, anchor_kl_coef=1.0),
    "trpo": GRADIENT | dict(group_size=4, old_kl_limit=0.01, cg_steps=10, damping=0.01, backtracks=10),
    "sapo": GRADIENT | dict(group_size=8, minibatches=2, loss_mean="response", tau=1.0, tau_negative=1.05),
    "reinforce": GRADIENT
    | dict(group_size=4, baseline="leave_one_out", baseline_constant=0.0, baseline_decay=0.9, reward_to_go=False)
    | dict(whiten_advantage=False, value_coef=0.1, entropy_coef=0.0, alpha=0.0, demonstrations=32),
    "rloo": GRADIENT | dict(group_size=4),
    "vbon": GRADIENT | dict(group_size=4, n=16, reference_samples=64),
    "grpo": GRPO | dict(kl_loss="k3"),
    "dapo": GRPO | dict(clip_high=0.28, loss_mean="token", informative=True, draws=10, overlong=1.0),
    "gspo": GRPO | dict(clip=3e-4, clip_high=4e-4, by_token=False),
    "cispo": GRPO | dict(clip=1.0, clip_high=4.0, loss_mean="token"),
    "reinforce-plus-plus": GRPO | dict(group_size=1, loss_mean="token"),
    "reinforce-plus-plus-baseline": GRPO | dict(loss_mean="token", kl_loss="k2"),
    "remax": GRADIENT,
    "dr-grpo": GRPO | dict(loss_mean="sum"),
    "a2c": CRITIC | dict(critic="v"),
    "ppo": PPO,
    "ppo-klpen": PROXIMAL | dict(old_kl_coef=1.0, old_kl_target=0.01),
    "ppo-ptx": PPO | dict(ptx_coef=0.5, demonstrations=32),
    "iterated-rlhf": PPO
    | dict(rounds=2, annotations=8192, held_out=512, flip=0.25, rm_start="fresh", rm_steps=192, rm_batch=128)
    | dict(rm_learning_rate=2e-3, rm_weight_decay=0.1),
}
COEFFICIENTS = {"quark": 0.05, "vbon": 1.0, "grpo": 0.04}
TASKS = {
    CorpusConfig: dict(
        seed=0, vocabulary=4096, hidden=128, heads=4, layers=3, weight_decay=0.1, prompt_words=5, prompt_tokens=10,
        max_new_tokens=24, min_new_tokens=8, max_tokens=64, lm_steps=1200, lm_epochs=6, lm_batch=1280,
        lm_learning_rate=2e-3, rm_steps=400, rm_epochs=3, rm_batch=32, rm_learning_rate=5e-4, samples=512,
        temperature=0.7, kl_coef=0.1,
    ),
    TranslationConfig: dict(
        seed=0, vocabulary=4096, hidden=128, heads=4, layers=2, weight_decay=0.1, architecture="bart", prompt_tokens=40,
        max_new_tokens=40, sft_epochs=8, sft_batch=1024, sft_learning_rate=2e-3, label_smoothing=0.1, temperature=1.0,
        kl_coef=0.0,
    ),
    EnumerableConfig: dict(tokens=5, horizon=5, prompts=4, kl_coef=0.3, seed=1),
    ReviewsConfig: json.loads((FOLDER / MANIFEST).read_text())["made_from"]["config"],  # what the shipped files are of
}  # fmt: skip
CUSTOM = dict(
    max_new_tokens=32, min_new_tokens=0, kl_coef=0.05, temperature=1.0, normalise=None, samples=256, batch_size=64,
    seed=0, dtype="float32", reward_dtype="float32", recompute=False, bad="raise",
)  # fmt: skip


def test_every_algorithm_is_here():
    assert set(SETTINGS) == set(ALGORITHMS) - set(WRAPPERS)


@pytest.mark.parametrize("name", SETTINGS)
def test_algorithms(name):
    found = vars(load(name).Config())
    assert {key: found[key] for key in SETTINGS[name]} == SETTINGS[name]
    assert load(name).published_kl_coef == COEFFICIENTS.get(name)


@pytest.mark.parametrize(
    ("env", "name", "expected"),
    [
        ("CartPole-v1", "ppo", dict(steps=1024, episodes=None, epochs=10, minibatches=4, lam=0.8, gamma=0.98)),
        (
            "CartPole-v1",
            "ppo",
            dict(iterations=97, learning_rate=1e-3, value_coef=0.5, max_grad_norm=0.5, value_clip=None),
        ),
        ("CartPole-v1", "a2c", dict(steps=128, iterations=2340, lam=0.9, gamma=0.98, whiten_advantage=False)),
        ("CartPole-v1", "reinforce", dict(episodes=8, iterations=95, learning_rate=5e-3, value_coef=1e-3, gamma=0.98)),
        ("CartPole-v1", "grpo", dict(episodes=16, group_size=1, kl_loss=None, max_grad_norm=1e6, learning_rate=1e-2)),
        ("CartPole-v1", "expert-iteration", dict(episodes=32, keep=2, iterations=60, learning_rate=5e-3)),
        ("lm_envs/Cat-v0", "ppo", dict(steps=512, iterations=80, epochs=4, gamma=0.95, lam=0.95, learning_rate=3e-3)),
        ("lm_envs/Cat-v0", "a2c", dict(steps=256, iterations=300, gamma=0.95, max_grad_norm=1e6)),
        ("lm_envs/Cat-v0", "reinforce", dict(episodes=16, iterations=200, value_coef=0.5, whiten_advantage=False)),
    ],
)
def test_control(env, name, expected):
    found = control_settings(env, name)
    assert {key: found[key] for key in expected} == expected
    assert control_settings("Acrobot-v1", name) == control_settings("CartPole-v1", name)


def test_tables():
    assert (EPISODES, VALUE_SCALE) == (100_000, 3.0)
    table = dict(anneal=False, max_grad_norm=1e6)
    group, critic = (
        dict(group_size=16, episodes=256, learning_rate=0.07),
        dict(whiten_advantage=False, lam=1.0, value_coef=0.5),
    )
    ppo = table | critic | dict(value_clip=None, episodes=1024, epochs=10, minibatches=1, learning_rate=0.02)
    pairs = dict(max_grad_norm=1e6, pairs=50_000, flip=0.0, learning_rate=0.1)
    for name, expected in {
        "reinforce": table | group | dict(baseline="leave_one_out"),
        "vbon": table | group | dict(reference_samples=4096),
        "grpo": table | group | dict(minibatches=1, kl_coef=0.3),
        "dapo": table | group | dict(minibatches=1, overlong=0.0),
        "a2c": table | critic | dict(episodes=128, learning_rate=0.05),
        "ppo": ppo | dict(clip=0.3),
        "ppo-klpen": ppo,
        "expert-iteration": table | dict(episodes=4096, group_size=16, epochs=4, learning_rate=0.05),
        "quark": table | dict(episodes=1024, learn_episodes=4096, learning_rate=0.05, kl_coef=0.05),
        "online-dpo": table | dict(episodes=256, beta=0.3, learning_rate=0.05),
        "dpo": pairs | dict(episodes=500, beta=0.3, learning_rate=0.3),
        "binary-feedme": pairs | dict(episodes=500),
        "reward-conditioning": pairs | dict(episodes=1000),
    }.items():
        assert TABULAR[name] == expected, name


def test_preference_losses():
    ratio = dict(beta=0.1, length_normalized=False)
    for loss, expected in {
        "ipo": ratio,
        "cdpo": ratio | dict(flip_rate=0.1),
        "robust": ratio | dict(flip_rate=0.1),
        "simpo": dict(beta=2.0, target_margin=1.0),
        "orpo": dict(odds_weight=0.1),
        "kto": dict(beta=0.1, wanted_weight=1.0, unwanted_weight=1.0),
    }.items():
        found = vars(DPOConfig(loss=loss))
        assert {key: found[key] for key in expected} == expected, loss


@pytest.mark.parametrize("config", TASKS)
def test_tasks(config):
    assert vars(config()) == TASKS[config]


def test_what_else_numbers_rest_on():
    found = vars(CustomConfig(policy="p", prompts="q"))
    assert {key: found[key] for key in CUSTOM} == CUSTOM
    assert AdaptiveKL.gain == 2.0
    endpoint = ChatEndpoint("http://127.0.0.1", "m")
    assert (endpoint.timeout, endpoint.attempts, endpoint.backoff, endpoint.longest_wait) == (60, 6, 0.5, 60)
