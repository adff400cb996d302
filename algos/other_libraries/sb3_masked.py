"""sb3-contrib's MaskablePPO on text: action masks from the environment in sampling and in every re-evaluation.

With ``reference_top_k=k`` an environment allows, in each state, the k tokens that the frozen reference finds likeliest:
the idea behind NLPO (Ramamurthy et al. 2023), with a mask that no update moves.
"""

from __future__ import annotations

from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

from lm_envs.algos.other_libraries.sb3 import LMActorCritic


class MaskableCausalLMActorCriticPolicy(LMActorCritic, MaskableActorCriticPolicy):  # type: ignore[misc]  # `self: Any`
    """The policy of ``MaskablePPO``; see :class:`~lm_envs.algos.other_libraries.sb3.LMActorCritic`.

    The buffer of sb3-contrib keeps a float32 mask of the whole vocabulary for every step: 4 V bytes a token.
    """

    takes_masks = True
