"""The algorithms by name. A new one needs one file and one line here; outside this package, no line at all."""

from dataclasses import fields
from typing import Any

from lm_envs.algos.engine.agent import Agent
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.cost import of_preferences
from lm_envs.plugins import find
from lm_envs.settings import make
from lm_envs.tasks.base import TextTask

ALGORITHMS: dict[str, str] = {
    "sft": "lm_envs.algos.sft:SFT",
    "reward-modelling": "lm_envs.algos.reward_modelling:RewardModelling",
    "dpo": "lm_envs.algos.dpo:DPO",
    "binary-feedme": "lm_envs.algos.binary_feedme:BinaryFeedME",
    "reward-conditioning": "lm_envs.algos.reward_conditioning:RewardConditioning",
    "best-of-n": "lm_envs.algos.best_of_n:BestOfN",
    "prompted": "lm_envs.algos.few_shot:FewShot",
    "expert-iteration": "lm_envs.algos.expert_iteration:ExpertIteration",
    "quark": "lm_envs.algos.quark:Quark",
    "online-dpo": "lm_envs.algos.online_dpo:OnlineDPO",
    "distillation": "lm_envs.algos.distillation:Distillation",
    "xpo": "lm_envs.algos.xpo:XPO",
    "reinforce": "lm_envs.algos.reinforce:REINFORCE",
    "rloo": "lm_envs.algos.rloo:RLOO",
    "vbon": "lm_envs.algos.vbon:VBoN",
    "bond": "lm_envs.algos.bond:BOND",
    "grpo": "lm_envs.algos.grpo:GRPO",
    "dapo": "lm_envs.algos.dapo:DAPO",
    "gspo": "lm_envs.algos.gspo:GSPO",
    "sapo": "lm_envs.algos.sapo:SAPO",
    "cispo": "lm_envs.algos.cispo:CISPO",
    "reinforce-plus-plus": "lm_envs.algos.reinforce_plus_plus:ReinforcePlusPlus",
    "reinforce-plus-plus-baseline": "lm_envs.algos.reinforce_plus_plus:ReinforcePlusPlusBaseline",
    "remax": "lm_envs.algos.remax:ReMax",
    "dr-grpo": "lm_envs.algos.dr_grpo:DrGRPO",
    "trpo": "lm_envs.algos.trpo:TRPO",
    "a2c": "lm_envs.algos.a2c:A2C",
    "ppo": "lm_envs.algos.ppo:PPO",
    "ppo-klpen": "lm_envs.algos.ppo_klpen:PPOKLPen",
    "ppo-ptx": "lm_envs.algos.ppo_ptx:PPOPtx",
    "iterated-rlhf": "lm_envs.algos.iterated_rlhf:IteratedRLHF",
}
WRAPPERS = ("best-of-n", "prompted")
"""Algorithms that wrap another policy, without training or config."""


class Unsuited(ValueError):
    """A task lacks what an algorithm learns from."""


def load(name: str) -> Any:
    """Return the class of an algorithm: a key of :data:`ALGORITHMS`, or as :mod:`lm_envs.plugins` names it.

    Raises:
        ValueError: there is none (the message suggests names), or it is no algorithm.
    """
    if name in WRAPPERS:
        return find(name, "algorithm", ALGORITHMS)
    found = find(name, "algorithm", ALGORITHMS, _is_agent, "a subclass of lm_envs.algos.engine.agent.Agent")
    config = found.Config
    if not (isinstance(config, type) and issubclass(config, AgentConfig)):
        raise ValueError(f"algorithm {name}: its Config must be a dataclass that inherits from AgentConfig")
    if plain := set(vars(config).get("__annotations__", {})) - {field.name for field in fields(config)}:
        raise ValueError(f"algorithm {name}: {config.__name__} needs @dataclass: {min(plain)!r} is not a setting yet")
    return found


def _is_agent(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Agent)


def make_config(name: str, **overrides: Any) -> Any:
    """Return an algorithm's config with some fields changed.

    Raises:
        ValueError: no such algorithm or setting, with similar names; or a value that the setting cannot have.
    """
    found = load(name)
    if name in WRAPPERS:
        raise ValueError(f"{name} wraps a trained policy and needs no training: construct {found.__name__} itself")
    return make(found.Config, overrides, name, "setting")


def make_agent(
    name: str, policy: Any, task: TextTask | None = None, *, data: Any = None, **overrides: Any
) -> Agent[Any]:
    """Make an agent.

    Args:
        name: as :func:`load` takes it.
        policy: the policy to train.
        task: the source of data if ``data`` is None, and of the reward model that a value function may start from.
        data: demonstrations or preferences, for algorithms that learn from data.
        overrides: fields of the algorithm's config.

    Raises:
        ValueError: no such algorithm or setting, or data that is missing or not used.
        Unsuited: the task lacks what the algorithm learns from.
    """
    config, found = make_config(name, **overrides), load(name)
    if task is not None and data is None and (missing := found.lacks(task, config)):
        raise Unsuited(f"{name} needs {missing}, which task {task.name!r} does not have")
    found.prepare_policy(policy, task, config)
    if not (found.needs_data or found.mixes_data):
        if data is not None:
            raise ValueError(f"{name} learns by sampling and takes no data")
        return found(policy, config)
    data = found.data_of(task, config) if data is None and task is not None else data
    agent = found(policy, config, data)
    agent.given = of_preferences(data)
    return agent
