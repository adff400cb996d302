"""A few-shot prompt: show the policy examples before each prompt, and train nothing."""

import numpy as np
import torch
from torch import Tensor

from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.env.mdp import TextMDP
from lm_envs.model.encoder_decoder import room_for
from lm_envs.model.tokens import left_pad


class FewShot:
    """A policy that reads examples, pairs of a prompt and a good response, before each prompt (Brown et al. 2020,
    arXiv:2005.14165): the baseline "prompted" of InstructGPT and AlpacaFarm.

    In a chat the examples are earlier turns; in text they stand before the prompt, each followed by an empty line. The
    reference still reads the prompt alone, so the KL of its samples is that from the reference, without a bias.

    Args:
        policy: the policy to show them to.
        mdp: supplies prompts and ``task.examples``.

    Raises:
        ValueError: the task has no examples, or they leave no room for a response in the policy's context.
    """

    def __init__(self, policy: LMPolicy, mdp: TextMDP) -> None:
        if not mdp.task.examples:
            raise ValueError(f"task {mdp.task.name!r} has no examples to show")
        self.policy, self.mdp = policy, mdp
        self.uniforms_per_response = policy.uniforms_per_response
        self._rows: dict[int, list[int]] = {}

    @torch.no_grad()
    def answer(self, index: Tensor, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, None]:
        """Respond to prompts with the examples before them, with log-probabilities under that prompt and no values.

        Arguments are those of :meth:`~lm_envs.algos.policies.base.Policy.answer`.
        """
        rows = [self.prompt(i) for i in index.tolist()]
        longer = torch.from_numpy(left_pad(rows, max(map(len, rows))))
        return *self.policy.respond(longer, uniforms), None

    def prompt(self, index: int) -> list[int]:
        """Return the tokens of a prompt of the MDP's split with the examples before it."""
        if index not in self._rows:
            self._rows[index] = self._prompt(index)
        return self._rows[index]

    def _prompt(self, index: int) -> list[int]:
        mdp, examples = self.mdp, self.mdp.task.examples
        messages = mdp.columns(np.array([index])).get("messages")
        if messages is not None:
            turns = [message for pair in examples for message in zip(("user", "assistant"), pair, strict=True)]
            shown = [{"role": role, "content": text} for role, text in turns]
            system = [message for message in messages[0] if message["role"] == "system"]
            rest = [message for message in messages[0] if message["role"] != "system"]
            ids, _ = mdp.codec.encode([*system, *shown, *rest])
        else:
            (text,), _ = mdp.codec.decode([mdp.prompts[index]], [[]])
            before = "".join(f"{prompt.rstrip()}\n{response.rstrip()}\n\n" for prompt, response in examples)
            ids, _ = mdp.codec.encode(before + text)
        needed, context = room_for(self.policy.model, len(ids), mdp.max_new_tokens)
        if context is not None and needed > context:
            raise ValueError(
                f"a prompt with {len(examples)} examples has {len(ids)} tokens, and with a response {needed} places: "
                f"more than the model's context of {context}; give shorter examples, or fewer"
            )
        return ids
