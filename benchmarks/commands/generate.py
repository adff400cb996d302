"""``lm-envs generate`` and ``lm-envs chat``: what a model answers, beside what it started from."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from lm_envs.benchmarks.errors import UserError
from lm_envs.files import write_atomic
from lm_envs.printable import printable
from lm_envs.settings import Count, NonNegative, Seed, Size

if TYPE_CHECKING:
    from lm_envs.model.chat import Text


@dataclass(frozen=True, kw_only=True)
class Speaking:
    """Options of the commands that sample from a model."""

    policy: Annotated[str, tyro.conf.arg(metavar="DIR", aliases=["--model"])]
    """The folder of a run or of its model, any folder of save_pretrained or of adapters, a GGUF file, "smollm2" (of the
    extra pretrained) or a hub name."""
    temperature: Annotated[NonNegative | None, tyro.conf.arg(metavar="X")] = None
    """Divides the logits; 0 takes the likeliest token each time. That of the run, or 1, if not given."""
    seed: Seed = 0
    """Seed of the samples."""


@dataclass(frozen=True, kw_only=True)
class Generate(Speaking):
    """Sample responses of a model, beside those of the model it started from.

      lm-envs generate --policy runs/ppo/reviews/ppo/seed-0
      lm-envs generate --policy DIR --text "Name three rivers." --samples 3
      lm-envs generate --policy DIR --prompts FILE --count 100 --out answers.jsonl

    A run of train or compare answers the test prompts of its task. Where a tokenizer has a chat template, --text is a
    message of the user.
    """

    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """A prompt; may be repeated."""
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE", aliases=["--data"])] = None
    """Prompts: JSONL, CSV or Parquet with a "prompt" a row, or a data set of the hub."""
    count: Annotated[Count, tyro.conf.arg(metavar="N")] = 8
    """Prompts to answer, from the first on."""
    samples: Annotated[Count, tyro.conf.arg(metavar="N")] = 1
    """Responses to each prompt."""
    max_new_tokens: Annotated[Size | None, tyro.conf.arg(metavar="N")] = None
    """Tokens of a response at most: those of the run, or 64, if not given."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Also write the responses there, a row for each prompt and sample."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.run.generation import opened

        if self.text and self.prompts is not None:
            raise UserError("give prompts by --text or by --prompts, not both")
        texts = self._texts()  # a missing file shows before models load
        left = opened(self.policy)
        chat = bool(texts) and not isinstance(texts[0], str)
        if not texts:
            prompts = left.prompts[: self.count]
        else:
            if self.text and getattr(left.tokenizer, "chat_template", None):
                texts, chat = [[{"role": "user", "content": text}] for text in self.text], True
            prompts = [left.codec.encode(text)[0] for text in texts[: self.count]]
        if not prompts:
            raise UserError(f"{self.policy} is not a run on a task, so it has no prompts: give --text or --prompts")
        every = [ids for ids in prompts for _ in range(self.samples)]
        options: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        options["ends"] = left.codec.ends(chat) if texts else None
        answers = {name: left.respond(name, every, seed=self.seed, **options) for name in left.models}
        shown = self.text[: self.count] or left.codec.decode(prompts, [[]] * len(prompts))[0]
        rows = [
            {"prompt": prompt, **{name: found[i * self.samples + k] for name, found in answers.items()}}
            for i, prompt in enumerate(shown)
            for k in range(self.samples)
        ]
        for number, row in enumerate(rows):
            if number % self.samples == 0:
                print(("\n" if number else "") + printable(row["prompt"].strip()))
            for name in answers:
                print(f"  {name} | {printable(row[name].strip())}".replace("\n", "\n        | "))
        if self.out is not None:
            write_atomic(self.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(self.out)

    def _texts(self) -> Sequence[Text]:
        if self.prompts is None:
            return self.text
        from lm_envs.data.dataset import Examples

        found: list[Text] = []
        for example in Examples(self.prompts, "prompts"):
            found.append(example.prompt)
            if len(found) == self.count:
                break
        return found


@dataclass(frozen=True, kw_only=True)
class Chat(Speaking):
    """Talk with a model in the terminal; an empty line, Ctrl-D or Ctrl-C ends it.

    lm-envs chat --policy runs/ppo/instruct/ppo/seed-0/model --beside
    """

    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """A message of the system before the conversation."""
    max_new_tokens: Annotated[Size, tyro.conf.arg(metavar="N")] = 256
    """Tokens of a reply at most."""
    beside: bool = False
    """Also show what the model that it started from would reply; the conversation goes on from the tuned one's."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.run.generation import opened

        left = opened(self.policy)
        if not getattr(left.tokenizer, "chat_template", None):
            raise UserError(f"{self.policy} has no chat template, so it does not converse: use lm-envs generate --text")
        names = ["start", "tuned"] if self.beside and "start" in left.models else ["tuned"]
        if self.beside and len(names) == 1:
            raise UserError(f"--beside: what {self.policy} started from is not known; give the folder of a run")
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        turn = 0
        while said := _line():
            messages.append({"role": "user", "content": said})
            ids = left.codec.encode(messages)[0]
            options: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
            options |= {"ends": left.codec.ends(True), "seed": self.seed + turn}
            replies = {name: left.respond(name, [ids], **options)[0].strip() for name in names}
            for name, reply in replies.items():
                print(f"{name}: {printable(reply)}" if len(names) > 1 else printable(reply), flush=True)
            messages.append({"role": "assistant", "content": replies["tuned"]})
            turn += 1


def _line() -> str:
    """What the user types; "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
