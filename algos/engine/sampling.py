"""An agent's batches from an env: episodes of text, episodes of control, or control steps as fragments."""

from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from lm_envs import rng
from lm_envs.algos.engine.batching import costs
from lm_envs.algos.engine.config import AgentConfig
from lm_envs.algos.engine.metrics import Averages, describe
from lm_envs.env.report import text_envs
from lm_envs.env.rollout import Collector, rollout
from lm_envs.reward.base import forget_parts, part_means
from lm_envs.tasks.sampling import SAMPLE_EPISODES
from lm_envs.trajectories import Trajectories


class Sampler:
    """Samples by the settings ``episodes``, ``steps`` and ``seed``; where steps are sampled, episodes go on.

    Attributes:
        rows: number of rows that :meth:`sample` returned since it was set to 0.
        fragments: the collector whose episodes go on; None for whole episodes.
    """

    def __init__(self, name: str, policy: Any) -> None:
        self.name, self.policy, self.rows = name, policy, 0
        self.fragments: Collector | None = None
        self._env: Any = None  # the collector's

    def sample(
        self, env: Any, config: AgentConfig, episodes_done: int, iterations_done: int
    ) -> tuple[Trajectories, int]:
        """A batch, and the env steps it took, those of surplus episodes included."""
        if self.policy.sequence_obs:
            traj, steps = self._text(env, config, episodes_done)
        elif config.steps is None:
            assert config.episodes is not None  # the config sees to it
            whole = Collector(env, self.policy, seed=config.seed, first_episode=episodes_done)
            traj = whole.episodes(config.episodes, episodes_done)
            steps = whole.steps_taken  # rows that end early step on until the last one has ended
        else:
            traj, steps = self._fragments(env, config, config.steps, iterations_done)
        self.rows += len(traj)
        return traj, steps

    def check_whole(self, traj: Trajectories) -> None:
        """Raise ValueError where an agent's own ``sample`` dropped rows (or added some) since ``rows`` was 0."""
        if self.rows not in (0, len(traj)):
            raise ValueError(
                f"{self.name}: sample() returned {len(traj)} rows and sampled {self.rows}: episodes are counted by the "
                "rows it returns, so dropped ones would be sampled again; leave rows out in select()"
            )

    def _text(self, env: Any, config: AgentConfig, episodes_done: int) -> tuple[Trajectories, int]:
        if config.episodes is None or config.steps is not None:
            raise ValueError(f"{self.name}: a text env is sampled by episodes; set episodes and leave steps None")
        have = text_envs(env)[0].mdp.group_size if text_envs(env) else 1
        if have != config.group_size:
            raise ValueError(
                f"{self.name}: the env was made with group_size={have} and the agent with "
                f"group_size={config.group_size}; make both the same"
            )
        traj = rollout(env, self.policy, episodes=config.episodes, first_episode=episodes_done, seed=config.seed)
        return traj, int(traj.mask.sum())

    def _fragments(self, env: Any, config: AgentConfig, count: int, iterations_done: int) -> tuple[Trajectories, int]:
        rows = env.unwrapped.num_envs if isinstance(env.unwrapped, VectorEnv) else 1
        if count % rows:
            raise ValueError(
                f"{self.name}: steps counts all rows, so it must be a multiple of the env's {rows}, got {count}"
            )
        if self.fragments is None or self._env is not env:
            seed = int(np.random.SeedSequence((config.seed, iterations_done)).generate_state(1)[0])
            self.fragments, self._env = Collector(env, self.policy, seed=seed), env
        taken = self.fragments.steps_taken
        traj = self.fragments.steps(count // rows)
        return traj, self.fragments.steps_taken - taken


def count(agent: Any, traj: Trajectories) -> dict[str, float]:
    """Add a sampled batch to the counters; its metrics as sampled."""
    metrics, episodes = describe(traj), len(traj)
    if agent.sampler.fragments is not None:
        returns, lengths = agent.sampler.fragments.pop_finished()
        episodes = len(returns)
        # Rows are fragments here, whose returns mean nothing: report the episodes that ended in this batch, if any.
        metrics = {k: v for k, v in metrics.items() if k not in ("return", "length")}
        if episodes:
            metrics |= {"return": float(np.mean(returns)), "length": float(np.mean(lengths))}
    agent.episodes_done += episodes
    agent.samples_done += episodes
    agent.tokens_done += int(traj.response_lengths.sum())
    agent.reward_calls += len(traj) if traj.score is not None else 0
    readers = (traj.score is not None) + (traj.ref_logprob is not None) + agent.policy.has_own_critic
    agent.scored_tokens += readers * int(costs(traj).sum())
    return metrics


def charge(agent: Any, prompt: Tensor, response: Tensor) -> None:
    """Count responses ``(N, T)`` to prompts ``(N, P)``, both padded with -1, that an agent samples and scores beside
    its batches."""
    agent.samples_done += len(response)
    agent.reward_calls += len(response)
    sampled = int((response >= 0).sum())
    agent.tokens_done += sampled
    agent.scored_tokens += sampled + int((prompt >= 0).sum())


def sample_beside(agent: Any, policy: Any, prompt: Tensor, episodes: NDArray[np.int64]) -> Tensor:
    """Sample responses ``(N, T)`` of a policy to prompts ``(N, P)`` beside an agent's batches, and charge them; they
    depend on the agent's seed and the numbers ``episodes (N,)``, which are not those of its batches."""
    places = np.arange(policy.uniforms_per_response)
    uniforms = rng.uniform(agent.config.seed, rng.TOKEN, SAMPLE_EPISODES + episodes[:, None], places)
    response, _ = policy.respond(prompt, torch.as_tensor(uniforms))
    charge(agent, prompt, response)
    return response


def draw(agent: Any, env: Any, weights: int) -> tuple[Trajectories, Trajectories, dict[str, float]]:
    """Sample an iteration of an agent, whose weights have this number: all rows, those to learn from, and metrics of
    the former."""
    drawn: list[Trajectories] = []
    kept: list[Trajectories] = []
    averages, wanted, filtered = Averages(), 0, False
    agent.missing = None
    rewards = [inner.mdp.task.reward for inner in text_envs(env)[:1]]
    for reward in rewards:
        forget_parts(reward)
    while len(drawn) < agent.config.draws:
        agent.sampler.rows = 0
        traj = agent.sample(env)
        agent.sampler.check_whole(traj)
        traj.sampled_by = torch.full((len(traj),), weights)
        averages.add(count(agent, traj), len(traj))
        rows = agent.select(traj)
        filtered |= rows is not None
        drawn.append(traj)
        kept.append(traj if rows is None else traj.select(rows))
        wanted = wanted or len(traj)
        missing = wanted - sum(map(len, kept))
        if missing <= 0:
            break
        if agent.config.episodes is not None:
            agent.missing = -(-missing // agent.config.group_size) * agent.config.group_size
    agent.missing = None
    whole, learned = (parts[0] if len(parts) == 1 else Trajectories.concatenate(parts) for parts in (drawn, kept))
    metrics = averages.means()
    for reward in rewards:
        metrics |= part_means(reward)
    if filtered:
        metrics |= {"draws": len(drawn), "dropped": 1 - len(learned) / len(whole)}
    return whole, learned, metrics
