"""A text vector environment as a ``VecEnv`` of Stable-Baselines3; see :mod:`lm_envs.algos.other_libraries.sb3`."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from transformers import PreTrainedConfig, PreTrainedModel

from lm_envs.env.report import report
from lm_envs.env.rows import TextRows


@dataclass(frozen=True)
class TextSpec:
    """What a policy must know of a text env. Pickles leave ``start`` out, so that a saved agent holds only its own
    weights; ``model_class``, ``config`` and ``dtype`` then make a model of the same shape."""

    prompt_length: int
    max_new_tokens: int
    eos_token_id: tuple[int, ...]
    temperature: float
    min_new_tokens: int
    reference_top_k: int | None
    is_bandit: bool
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: torch.dtype
    start: PreTrainedModel | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(replace(self, start=None)))

    def make_model(self) -> PreTrainedModel:
        """Return a trainable copy of ``start``, or an untrained model of its shape."""
        if self.start is not None:
            return copy.deepcopy(self.start).requires_grad_(True)
        return self.model_class(copy.deepcopy(self.config)).to(self.dtype)


class TextSpace(spaces.Box):
    """The observation space of a text environment, equal to its ``Box``; ``text`` is its :class:`TextSpec`."""

    def __init__(self, env: Any) -> None:
        box, mdp = env.single_observation_space, env.mdp
        super().__init__(box.low, box.high, box.shape, box.dtype)
        start = mdp.task.start
        self.text = TextSpec(
            prompt_length=mdp.prompt_length,
            max_new_tokens=mdp.max_new_tokens,
            eos_token_id=mdp.eos_token_ids,
            temperature=mdp.temperature,
            min_new_tokens=mdp.min_new_tokens,
            reference_top_k=mdp.reference_top_k,
            is_bandit=env.is_bandit,
            model_class=type(start),
            config=start.config,
            dtype=start.dtype,
            start=start,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy would lose the model


class ToldActions(np.ndarray):
    """Actions ``(N, ...)`` with ``logprob (N,)``, their log-probabilities; arrays derived from them have None."""

    logprob: NDArray[np.float64] | None = None

    def reshape(self, *shape: Any, **options: Any) -> "ToldActions":
        """Reshape and keep the log-probabilities: ``predict`` of Stable-Baselines3 ends with a reshape."""
        found = super().reshape(*shape, **options).view(ToldActions)
        found.logprob = self.logprob
        return found


class TextVecEnv(VecEnv):
    """A text vector environment as a Stable-Baselines3 ``VecEnv``: one batched forward per step for all rows.

    Rewards are float32, as in the library. At an episode's end the row's info holds ``lm``, ``terminal_observation``
    and ``TimeLimit.truncated`` (False: the length limit is part of the task). If tokens are masked, ``action_mask`` is
    in the info of a continuing row and in ``reset_infos`` of a starting one; ``env_method("action_masks")`` returns the
    current masks. Rows share one environment, so attributes are set for all of them or not at all.

    Args:
        env: ``gymnasium.make_vec("lm_envs/Reviews-v0", num_envs=64)``, wrapped or not, in autoreset mode "SameStep".

    Raises:
        TypeError: not a text vector environment.
        ValueError: another autoreset mode.
    """

    def __init__(self, env: Any) -> None:
        inner = env.unwrapped
        if not isinstance(inner, TextRows):
            raise TypeError(
                f"TextVecEnv needs a text vector environment, as gymnasium.make_vec('lm_envs/Reviews-v0', num_envs=64) "
                f"makes, got {type(inner).__name__}"
            )
        if inner.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError("Stable-Baselines3 resets in the same step: make the env with autoreset_mode='SameStep'")
        self.env, self.text_env = env, inner
        self.spec = env.spec
        self._actions: NDArray[np.int64] | None = None
        super().__init__(inner.num_envs, TextSpace(inner), inner.single_action_space)

    @property
    def envs(self) -> list[Any]:
        """Where lm_envs.report and lm_envs.set_kl_coef find the text env, through the library's wrappers."""
        return [self.text_env]

    def reset(self) -> NDArray[np.int64]:
        """Return first observations; the seed of :meth:`seed` and ``set_options`` apply to this reset only."""
        if any(options != self._options[0] for options in self._options):
            raise ValueError("the rows of a TextVecEnv share one environment: set_options takes one dict for all")
        obs, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _by_row(infos, range(self.num_envs))
        return obs

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        actions, self._actions = self._actions, None
        assert actions is not None, "call step_async first"
        if isinstance(actions, ToldActions) and actions.logprob is not None:
            report(self.text_env, actions.logprob)  # the actions of our policies bring their own
        obs, rewards, terminated, truncated, infos = self.env.step(np.asarray(actions))
        done = terminated | truncated
        ended = done.nonzero()[0].tolist()
        final_obs, final = infos.pop("final_obs", None), infos.pop("final_info", {})
        rows = _by_row(infos, range(self.num_envs))
        for row, info in zip(ended, _by_row(final, ended), strict=True):
            self.reset_infos[row] = rows[row]
            rows[row] = info | {
                "terminal_observation": final_obs[row],
                "TimeLimit.truncated": bool(truncated[row] and not terminated[row]),
            }
        return obs, rewards.astype(np.float32), done, rows

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        rows = list(self._get_indices(indices))
        if attr_name in ("action_masks", "render"):
            return [partial(self._of_row, attr_name, row) for row in rows]
        value = self.spec if attr_name == "spec" else getattr(self.text_env, attr_name)
        return [value] * len(rows)

    def _of_row(self, method: str, row: int) -> Any:
        found = getattr(self.text_env, method)()
        return None if found is None else found[row]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        self._need_all(indices, f"set_attr({attr_name!r})")
        setattr(self.text_env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call ``action_masks`` and ``render`` per row, and other methods once for all rows."""
        rows = list(self._get_indices(indices))
        if method_name in ("action_masks", "render"):
            found = getattr(self.text_env, method_name)(*method_args, **method_kwargs)
            return [None if found is None else found[row] for row in rows]
        self._need_all(indices, f"env_method({method_name!r})")
        return [getattr(self.text_env, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def _need_all(self, indices: Any, what: str) -> None:
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"{what}: the rows of a TextVecEnv share one environment, so indices must be None")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        env, found = self.env, isinstance(self.env, wrapper_class)
        while env is not self.text_env and not found:
            env = env.env
            found = isinstance(env, wrapper_class)
        return [found] * len(list(self._get_indices(indices)))


def _by_row(infos: dict[str, Any], rows: Iterable[int]) -> list[dict[str, Any]]:
    """Split Gymnasium's vector infos into a dictionary per row; ``_key`` says which rows have ``key``."""

    def of(row: int, infos: dict[str, Any]) -> dict[str, Any]:
        return {
            key: of(row, value) if isinstance(value, dict) else value[row]
            for key, value in infos.items()
            if key[0] != "_" and infos.get(f"_{key}", everywhere)[row]
        }

    rows = list(rows)
    everywhere = np.ones(max(rows, default=0) + 1, dtype=bool)
    return [of(row, infos) for row in rows] if infos else [{} for _ in rows]
