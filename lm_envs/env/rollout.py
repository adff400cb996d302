"""Two equivalent ways to sample: ``collect`` steps any Gymnasium environment, ``rollout`` samples text in bulk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lm_envs import rng
from lm_envs.env.mdp import kl_penalty
from lm_envs.env.report import report, text_envs
from lm_envs.processes import group, sharing
from lm_envs.trajectories import Trajectories, whole_episodes

AHEAD = 32  # uniform numbers drawn at a time
_SAMPLED = ("response", "logprob", "value", "score", "ref_logprob")
Floats = NDArray[np.float64]


class ActingPolicy(Protocol):
    """The policy that :func:`collect` needs."""

    sequence_obs: bool
    uniforms_per_action: int

    def act(self, obs: NDArray[Any], uniforms: Floats) -> tuple[NDArray[np.int64], Floats]: ...


class RespondingPolicy(Protocol):
    """The policy that :func:`rollout` needs; see :class:`lm_envs.algos.policies.base.Policy`."""

    uniforms_per_response: int

    def answer(self, index: Tensor, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...


@dataclass
class _Episode:
    """A row's growing episode, or a fragment of one."""

    number: int
    obs: list[Any] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    final_obs: Any = None
    info: dict[str, Any] | None = None


class Collector:
    """Step an environment and cut its episodes into trajectories.

    Episodes are numbered in the order in which they start, those that start together by row; the uniform for an action
    is a function of (seed, episode number, position).

    Args:
        env: any Gymnasium environment or vector environment, in any autoreset mode.
        policy: see :class:`ActingPolicy`.
        seed: of the environment and of the actions.
        first_episode: the number of the first episode.
    """

    def __init__(
        self, env: gymnasium.Env | VectorEnv, policy: ActingPolicy, *, seed: int = 0, first_episode: int = 0
    ) -> None:
        if not isinstance(env.unwrapped, VectorEnv):
            single = env
            env = SyncVectorEnv([lambda: single], autoreset_mode=AutoresetMode.SAME_STEP)
        self.env, self.policy = env, policy
        self._text = text_envs(env)
        self._mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._seed = seed
        if self._text:
            self._obs, _ = self.env.reset(seed=seed, options={"first_episode": first_episode})
        else:
            # Other environments have no episode numbers, but another first episode must start differently.
            self._obs, _ = self.env.reset(seed=int(rng.integers(seed, rng.RESET, first_episode, 2**31)))
        rows = self.env.num_envs
        self._open = [_Episode(first_episode + row) for row in range(rows)]
        self._next = first_episode + rows
        self._position, self._restarting = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=bool)
        self.steps_taken = 0  # of the environment, also in episodes that are not returned
        self._drawn = np.zeros((rows, AHEAD))
        self._drawn_for = np.full(rows, -1), np.full(rows, -1)  # the episode and the block of a row's numbers
        self._finished: list[tuple[float, int]] = []
        self._returns = np.zeros(rows)

    def pop_finished(self) -> tuple[list[float], list[int]]:
        """Return undiscounted returns and lengths of the episodes that ended since the last call."""
        finished, self._finished = self._finished, []
        return [r for r, _ in finished], [n for _, n in finished]

    def steps(self, count: int) -> Trajectories:
        """Take ``count`` vector steps; return fragments of episodes, which the next call continues.

        A fragment that the call cuts is marked truncated and bootstraps from its last observation.
        """
        done: list[_Episode] = []
        for _ in range(count):
            done += self._step()
        for row, episode in enumerate(self._open):
            if episode.actions:
                episode.truncated, episode.final_obs = True, np.array(self._obs[row])
                done.append(episode)
                self._open[row] = _Episode(episode.number)
        return self._build(done)

    def episodes(self, count: int, first_episode: int) -> Trajectories:
        """Return the ``count`` whole episodes from number ``first_episode`` on, in order.

        They are the first to start, since the first to end would be too short.
        """
        done: list[_Episode] = []
        while len(done) < count:
            done += [episode for episode in self._step() if episode.number < first_episode + count]
        return self._build(sorted(done, key=lambda episode: episode.number))

    def _step(self) -> list[_Episode]:
        numbers = np.array([episode.number for episode in self._open])
        if self.policy.uniforms_per_action == 1:
            uniforms = self._next_uniforms(numbers)
        else:
            uniforms = rng.uniform(self._seed, rng.TOKEN, numbers[:, None], np.arange(self.policy.uniforms_per_action))
        actions, logprob = self.policy.act(self._obs, uniforms)
        if self._text:
            report(self.env, logprob)
        obs, reward, terminated, truncated, infos = self.env.step(actions)
        self.steps_taken += int((~self._restarting).sum())
        done: list[_Episode] = []
        same = self._mode is AutoresetMode.SAME_STEP
        ended = (terminated | truncated) & ~self._restarting
        for row, episode in enumerate(self._open):
            if self._restarting[row]:  # this step only returned the new episode's first observation
                continue
            if not self.policy.sequence_obs:
                episode.obs.append(np.array(self._obs[row]))
            episode.actions.append(actions[row])
            episode.logprob.append(float(logprob[row]))
            episode.reward.append(float(reward[row]))
            self._returns[row] += float(reward[row])
            if ended[row]:
                episode.terminated = bool(terminated[row])
                episode.truncated = bool(truncated[row]) and not episode.terminated
                episode.final_obs = np.array(infos["final_obs"][row] if same else obs[row])
                found = infos.get("final_info", {}) if same else infos
                if "lm" in found:
                    lm = found["lm"]
                    episode.info = {key: lm[key][row] for key in lm if key[0] != "_" and lm[f"_{key}"][row]}
                done.append(episode)
                self._finished.append((float(self._returns[row]), int(self._position[row]) + 1))
        self._position = np.where(self._restarting, 0, self._position + 1)
        if ended.any():
            if self._mode is AutoresetMode.DISABLED:
                obs, _ = self.env.reset(options={"reset_mask": ended})
            for row in ended.nonzero()[0].tolist():
                self._open[row] = _Episode(self._next)
                self._next += 1
            self._position[ended] = 0
            self._returns[ended] = 0.0
        self._restarting = ended & (self._mode is AutoresetMode.NEXT_STEP)
        self._obs = obs
        return done

    def _next_uniforms(self, numbers: NDArray[np.int64]) -> Floats:
        """Return a number per row, from blocks drawn ahead: a call per step costs as much as a small model's layer."""
        block, place = np.divmod(self._position, AHEAD)
        stale = ((self._drawn_for[0] != numbers) | (self._drawn_for[1] != block)).nonzero()[0]
        if len(stale):
            positions = block[stale, None] * AHEAD + np.arange(AHEAD)
            self._drawn[stale] = rng.uniform(self._seed, rng.TOKEN, numbers[stale, None], positions)
            self._drawn_for[0][stale], self._drawn_for[1][stale] = numbers[stale], block[stale]
        return self._drawn[np.arange(len(numbers)), place]

    def _build(self, episodes: list[_Episode]) -> Trajectories:
        def padded(name: str) -> Tensor:
            rows = [torch.as_tensor(np.stack(getattr(episode, name))) for episode in episodes]
            return pad_sequence(rows, batch_first=True)

        actions, lengths = padded("actions").long(), torch.tensor([len(e.actions) for e in episodes])
        traj = Trajectories(
            actions=actions,
            mask=torch.arange(actions.shape[1]) < lengths.unsqueeze(1),
            terminated=torch.tensor([e.terminated for e in episodes]),
            truncated=torch.tensor([e.truncated for e in episodes]),
            logprob=padded("logprob"),
            reward=padded("reward"),
        )
        final = torch.as_tensor(np.stack([e.final_obs for e in episodes]))
        if self._text:
            return self._add_text(traj, final, episodes)
        traj.obs, traj.final_obs = padded("obs"), final
        return traj

    def _add_text(self, traj: Trajectories, final: Tensor, episodes: list[_Episode]) -> Trajectories:
        mdp = self._text[0].mdp
        traj.obs = final
        traj.prompt, traj.response = final[:, : mdp.prompt_length], final[:, mdp.prompt_length :]
        traj.group = torch.tensor([e.number // mdp.group_size for e in episodes])
        infos = [e.info or {} for e in episodes]
        if all(infos):
            traj.prompt_index = torch.tensor([info["prompt_index"] for info in infos])
            traj.score = torch.tensor([info["score"] for info in infos], dtype=torch.float64)
        if all("ref_logprob" in info for info in infos):
            ref = torch.as_tensor(np.stack([info["ref_logprob"] for info in infos]))
            traj.ref_logprob = ref.sum(dim=1, keepdim=True) if traj.is_bandit else ref[:, : traj.mask.shape[1]]
        return traj.trim()


def collect(
    env: gymnasium.Env | VectorEnv, policy: ActingPolicy, *, episodes: int, first_episode: int = 0, seed: int = 0
) -> Trajectories:
    """Collect whole episodes from any Gymnasium environment by stepping it.

    Args:
        env: single or vector, in any autoreset mode; text or control.
        episodes, first_episode: their numbers are ``first_episode .. first_episode + episodes - 1``.
        seed: of prompts, environment and actions.

    Returns:
        Trajectories sorted by episode number; ``logprob`` and ``reward`` float64.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    return Collector(env, policy, seed=seed, first_episode=first_episode).episodes(episodes, first_episode)


def rollout(
    env: gymnasium.Env | VectorEnv, policy: RespondingPolicy, *, episodes: int, first_episode: int = 0, seed: int = 0
) -> Trajectories:
    """Return the episodes of :func:`collect` for a text environment, in bulk: one generation loop, one teacher-forced
    forward of the reference, one reward call. The environment's own rows do not change.

    Args:
        env: a text environment, single or vector, MDP or bandit.
        policy: see :class:`RespondingPolicy`; :class:`lm_envs.algos.policies.language_model.LMPolicy` is one.
        episodes, first_episode, seed: as for :func:`collect`.

    Returns:
        Trajectories sorted by episode number, with ``ref_logprob`` at any KL coefficient, and ``value`` if the policy
        has it; ``reward`` float64.

    Raises:
        TypeError: ``env`` is no text environment.
        ValueError: no episodes, or an environment with ``reference_top_k``.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    inner = text_envs(env)
    if not inner:
        raise TypeError(f"rollout is for text environments; use collect for {type(env.unwrapped).__name__}")
    mdp = inner[0].mdp
    if mdp.reference_top_k is not None:
        raise ValueError("rollout generates without asking the reference, which reference_top_k needs: step the env")
    numbers = np.arange(first_episode, first_episode + episodes)
    index = mdp.prompt_index(seed, numbers)
    prompt = torch.as_tensor(mdp.prompt(index))

    def answered(rows: Any) -> dict[str, Tensor | None]:
        uniforms = rng.uniform(seed, rng.TOKEN, numbers[rows, None], np.arange(policy.uniforms_per_response))
        starts = prompt[rows]
        response, logprob, value = policy.answer(torch.as_tensor(index[rows]), starts, torch.as_tensor(uniforms))
        response = response.cpu()
        return {
            "response": response,
            "logprob": logprob.double().cpu(),
            "value": value,
            "score": torch.as_tensor(mdp.score(index[rows], response.numpy())),
            "ref_logprob": mdp.reference_logprob(starts, response).double().cpu(),
        }

    if group.world() == 1:
        found = answered(slice(None))
    else:  # law 8: an episode is a function of the seed and its number, whichever process samples it
        costs = (prompt >= 0).sum(dim=1) + mdp.max_new_tokens
        shares = sharing.shares(costs, numbers // mdp.group_size)
        mine = shares[group.rank()]
        with group.alone():
            part = answered(mine) if len(mine) else {}
        found = sharing.gather(shares, part, "the sampled episodes", {"response": -1})
    response, logprob, value, score, ref_logprob = (found[name] for name in _SAMPLED)
    assert response is not None and score is not None and logprob is not None and ref_logprob is not None
    mask = response >= 0
    reward = score - kl_penalty(mdp.charged_kl_coef, logprob, ref_logprob)
    others: dict[str, Tensor] = {}
    if inner[0].is_bandit:
        others["actions"] = torch.where(mask, response, mdp.eos_token_id).unsqueeze(1)
        others["mask"] = mask = torch.ones(episodes, 1, dtype=torch.bool)
        logprob, ref_logprob, reward = (x.sum(dim=1, keepdim=True) for x in (logprob, ref_logprob, reward))
    if value is not None:
        others["value"] = torch.nn.functional.pad(value[:, : mask.shape[1]].cpu(), (0, 1))
    return whole_episodes(
        prompt,
        response,
        logprob=logprob,
        reward=reward,
        ref_logprob=ref_logprob,
        group=torch.as_tensor(numbers // mdp.group_size),
        score=score.sum(dim=1),
        prompt_index=torch.as_tensor(index),
        **others,
    ).trim()
