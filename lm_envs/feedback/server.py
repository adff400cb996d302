"""The web server of a study: one page, a small JSON interface, secret links.

An annotator's link holds a secret that nobody can guess, and there are no cookies: a page of another origin can
neither read nor send anything on an annotator's behalf. What the page shows is escaped here, and its content policy
lets nothing run or load from elsewhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import anyio
from markdown_it import MarkdownIt
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm_envs.feedback.database import Unusable
from lm_envs.feedback.store import StaleAnswer, Store, Task
from lm_envs.feedback.study import Answer, BadAnswer, read_answer
from lm_envs.model.chat import Text

PAGE = Path(__file__).with_name("page")
LONGEST_BODY = 512 * 1024
SLOWEST_S = 30.0  # for the body of an answer to arrive
_log = logging.getLogger(__name__)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the annotator's secret
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def application(store: Store, hosts: Sequence[str], public: str | None = None) -> Starlette:
    """The web application of a study.

    Args:
        store: of the study.
        hosts: the names under which the server may be asked; another name in a request is refused, so that a page
            elsewhere cannot reach a loopback server under a name of its own (DNS rebinding).
        public: the host and port that a browser sees where a proxy asks under another name.
    """

    def of_annotator(answer: Callable[[int, Request], Response]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            annotator = store.holder(request.path_params["key"])
            if annotator is None:
                return _error(404, "This link belongs to nobody: ask for a new one.")
            try:
                return answer(annotator, request)
            except BadAnswer as error:
                return _error(422, f"This answer cannot be taken: {error}.")
            except StaleAnswer as error:
                return _error(409, f"{error}."[0].upper() + f"{error}."[1:])
            except (PermissionError, KeyError):
                return _error(404, "This item was not given to you.")
            except Unusable as error:
                _log.error("%s", error)
                return _error(503, "The study cannot be used at the moment.")

        return endpoint

    def page(annotator: int, request: Request) -> Response:
        return FileResponse(PAGE / "page.html")

    def study(annotator: int, request: Request) -> Response:
        settings = store.settings
        shown = ("name", "mode", "question", "scale", "reasons", "read_first")
        facts = {name: getattr(settings, name) for name in shown}
        return JSONResponse(facts | {"flags": dict(settings.flags), "instructions": _html(settings.instructions, True)})

    def following(annotator: int, request: Request) -> Response:
        return _reply(store, annotator, store.next(annotator))

    def before(annotator: int, request: Request) -> Response:
        item = request.query_params.get("item")
        return _reply(store, annotator, store.last(annotator, _number(item) if item else None))

    def show(annotator: int, request: Request) -> Response:
        return _reply(store, annotator, store.task(annotator, _number(request.path_params["item"])))

    def save(annotator: int, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(415, "Answers are sent as application/json.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] not in (request.headers.get("host"), public):
            return _error(403, "Answers are taken from the study's own page only.")
        try:
            sent = json.loads(request.state.body)
        except (ValueError, RecursionError):
            return _error(400, "This is not JSON.")
        version = sent.get("version") if isinstance(sent, dict) else None
        if isinstance(version, bool) or not isinstance(version, int):
            return _error(422, "An answer needs the version that it replaces.")
        item = _number(request.path_params["item"])
        task = store.task(annotator, item)
        count = len(task.order)
        body = sent.get("answer")
        answer = None if body is None else _reordered(read_answer(body, store.settings, count), _inverse(task.order))
        store.answer(annotator, item, answer, version)
        return _reply(store, annotator, store.next(annotator))

    async def receive_and_save(request: Request) -> Response:
        # Not in a thread: a few connections that broke in the middle of an answer would keep them all.
        try:
            with anyio.fail_after(SLOWEST_S):
                request.state.body = await request.body()
        except TimeoutError:
            return _error(408, "The answer did not arrive in time.")
        except _TooLong:
            return _error(413, f"An answer has at most {LONGEST_BODY} bytes.")
        return await run_in_threadpool(of_annotator(save), request)

    routes = [
        Route("/a/{key}/", of_annotator(page)),
        Route("/a/{key}/study", of_annotator(study)),
        Route("/a/{key}/next", of_annotator(following)),
        Route("/a/{key}/before", of_annotator(before)),
        Route("/a/{key}/items/{item}", of_annotator(show), methods=["GET"]),
        Route("/a/{key}/items/{item}", receive_and_save, methods=["POST"]),
        # Two names and no folder: there is no path to leave it by.
        Route("/static/page.js", lambda request: FileResponse(PAGE / "page.js")),
        Route("/static/page.css", lambda request: FileResponse(PAGE / "page.css")),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(_Guarded),
        ],
    )


class _TooLong(Exception):
    pass


class _Guarded:
    """Safe headers on every reply, and an end to bodies that are too long."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = 0

        async def limited() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > LONGEST_BODY:
                raise _TooLong
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        await self.app(scope, limited, with_headers)


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 15):
        raise KeyError(text)
    return int(text)


def _reply(store: Store, annotator: int, task: Task | None) -> Response:
    done, left = store.progress(annotator)
    facts: dict[str, Any] = {"item": None, "done": done, "left": left}
    if task is not None:
        prompt, responses = task.content.prompt, task.content.responses
        answer = None if task.answer is None else asdict(_reordered(task.answer, task.order))
        facts |= {
            "item": task.item,
            "version": task.version,
            "answer": answer and ({} if answer.pop("skipped") else answer),
            "prompt": _prompt(prompt, store.settings.markdown),
            "responses": [_html(responses[place].text, store.settings.markdown) for place in task.order],
        }
    return JSONResponse(facts)


def _reordered(answer: Answer, order: Sequence[int]) -> Answer:
    """The answer with entry k of each list taken from place ``order[k]``."""
    moved: dict[str, Any] = {}
    for name in ("ranks", "ratings", "flags", "reasons"):
        each = getattr(answer, name)
        moved[name] = tuple(each[k] for k in order) if each else each
    return replace(answer, **moved)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(place) for place in range(len(order))]


def _prompt(prompt: Text, markdown: bool) -> Any:
    if isinstance(prompt, str):
        return _html(prompt, markdown)
    return [{"role": str(turn["role"]), "html": _html(turn["content"], markdown)} for turn in prompt]


# Links and pictures stay as they were typed: an annotator sees where a link leads, and nothing is fetched.
_markdown = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable("table")
    .disable(["link", "image", "autolink", "reference"])
)


@lru_cache(maxsize=4096)
def _html(text: str, markdown: bool) -> str:
    if markdown:
        return str(_markdown.render(text))
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    return f'<div class="plain">{escaped}</div>'
