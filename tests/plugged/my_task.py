"""Reviews with few prompts and a reward of one's own."""

from dataclasses import replace

from lm_envs.reward.building import build_reward
from lm_envs.reward.specs import parse_reward
from lm_envs.tasks import load as load_task


def load(reward: str = "my_reward.py:brevity", prompts: int = 16):
    reviews = load_task("reviews")
    few = {split: rows[:prompts] for split, rows in reviews.prompts.items()}
    own = build_reward(parse_reward(reward))
    return replace(reviews, name="brief", prompts=few, reward=own, max_new_tokens=6, columns={}, kl_coef=0.02)
