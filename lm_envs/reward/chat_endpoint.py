"""A client for chat completions over an OpenAI-compatible endpoint, with retries, backoff, and a cache on disk.

It follows no redirects. The key is read from an environment variable for each request, never kept, shown or written,
and sent only over https or to this machine.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import ipaddress
import json
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from lm_envs.files import blaming, write_atomic
from lm_envs.printable import one_line, printable
from lm_envs.settings import Count, Name, Positive, Settings

__all__ = ["ChatEndpoint", "EndpointError"]

_LARGEST = 4 << 20  # bytes of an answer
_REMEDY = "set LM_ENVS_CACHE to a folder that can be written, or give the judge cache=FOLDER or cache=false"
# One character as servers may write it: percent-encoded, escaped as in JSON or Python, as an HTML reference, or plain.
_WRITTEN = re.compile(
    r"%(?:25)*([0-9a-f]{2})|\\+u([0-9a-f]{4})|\\+x([0-9a-f]{2})|&#x([0-9a-f]{1,5});|&#(\d{1,6});|\\*(.)", re.I | re.S
)


class EndpointError(ValueError):
    """The endpoint gave no usable answer; the message quotes it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _Again(Exception):
    """A failure worth another attempt, ``after`` the seconds that the server asks for, if it does."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


@dataclass(frozen=True)
class ChatEndpoint(Settings):
    """An OpenAI-compatible server and one of its models.

    Attributes:
        url: the base, as in ``http://127.0.0.1:8000/v1``; ``/chat/completions`` is added if it is not there.
        model: the server's name of the model.
        key_variable: the environment variable that holds the key, if the server wants one.
        timeout: seconds for one attempt, from connecting to the last byte.
        attempts: the most attempts per request.
        backoff: seconds. The wait before attempt k + 1 is uniform up to ``backoff * 2**(k - 1)``, "full jitter", and
            at least the server's Retry-After.
        longest_wait: seconds; a longer Retry-After is an error.
        cache: a folder for answers, by a hash of URL, model and request; None for no cache.
    """

    url: str
    model: Name
    key_variable: Name = "LM_ENVS_JUDGE_API_KEY"
    timeout: Positive = 60.0
    attempts: Count = 6
    backoff: Positive = 0.5
    longest_wait: Positive = 60.0
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Check the fields and complete the URL."""
        super().__post_init__()
        try:
            url = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"judge: expected an address such as http://127.0.0.1:8000/v1: {error}") from None
        shown = repr(str(url.copy_with(userinfo=b"")))  # without a password
        if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 1 << 16:
            raise ValueError(f"judge: expected an address such as http://127.0.0.1:8000/v1, not {shown}")
        if url.userinfo:
            raise ValueError(f"judge: put the key into ${self.key_variable}, not into the address")
        if url.query or url.fragment:
            raise ValueError(f"judge: the address has a query or a fragment: {shown}")
        path = url.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        object.__setattr__(self, "url", str(url.copy_with(path=path)))

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        host = httpx2.URL(self.url).host
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def client(self) -> httpx2.AsyncClient:
        """Return an async context manager, the client for :meth:`complete`; EndpointError if the environment's proxy or
        certificates cannot be used."""
        for log in map(logging.getLogger, ("httpx2", "httpcore2")):  # a server may repeat the key
            log.setLevel(log.level or logging.WARNING)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "lm-envs"}
        try:
            # A proxy is for other machines: an environment that names one must not send local traffic through it.
            return httpx2.AsyncClient(
                headers=headers,
                timeout=None,
                trust_env=not self.is_local,
                verify=self.url.startswith("https:"),  # certificates take long to load
                limits=httpx2.Limits(max_connections=None),
            )
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            raise EndpointError(f"{self.url}: the environment's proxy or certificates: {error}") from None

    async def complete(
        self, client: httpx2.AsyncClient, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the first choice of a completion: ``message`` with its ``content``, ``finish_reason``, ``logprobs``.

        ``parameters`` are other fields of the request, JSON values. EndpointError if the server refuses, or every
        attempt fails.
        """
        data = json.dumps({"model": self.model, "messages": list(messages), **parameters}).encode()
        for attempt in range(1, self.attempts + 1):
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._attempt(client, data)
            except TimeoutError:
                failure = _Again("cannot be reached: timed out")
            except _Again as error:
                failure = error
            if failure.after is not None and failure.after > self.longest_wait:
                raise EndpointError(
                    f"{self.url} {failure}, and asks to wait {failure.after:.0f} s, longer than "
                    f"longest_wait={self.longest_wait:g}"
                )
            if attempt < self.attempts:
                await asyncio.sleep(self._wait(attempt, failure.after))
        raise EndpointError(f"{self.url} {failure}; given up after {self.attempts} attempts")

    def _wait(self, attempt: int, asked: float | None) -> float:
        jitter = random.uniform(0, min(self.backoff * 2 ** min(attempt - 1, 60), self.longest_wait))
        return jitter if asked is None else asked + jitter / 4  # so that waiting requests do not all return at once

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise EndpointError(f"the key in ${self.key_variable} holds characters that no header can carry")
        if key and not (self.is_local or self.url.startswith("https:")):
            raise EndpointError(f"{self.url}: the key in ${self.key_variable} goes over https only")
        return key

    async def _attempt(self, client: httpx2.AsyncClient, data: bytes) -> dict[str, Any]:
        key = self._key()
        raw = bytearray()
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with client.stream("POST", self.url, content=data, headers=headers) as answer:
                async for part in answer.aiter_bytes():
                    raw += part
                    if len(raw) > _LARGEST:
                        raise EndpointError(f"{self.url}: the answer is longer than {_LARGEST >> 20} MiB")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:  # refused, reset, cut short, no HTTP
            raise _Again(f"cannot be reached: {one_line(without_key(_reason(error), key))}") from None
        text = raw.decode("utf-8", "replace")
        try:
            found = without_key(json.loads(text), key)
        except (ValueError, RecursionError):
            found = None
        status = answer.status_code
        if not 200 <= status < 300:
            said = one_line(without_key(_said(found) or text.strip() or answer.reason_phrase, key))
            if status in (408, 429) or status >= 500:
                raise _Again(f"answered {status}: {said}", _seconds(answer.headers.get("Retry-After")))
            raise EndpointError(f"{self.url} answered {status}: {said}")
        try:
            choice = found["choices"][0]
            content = choice["message"].get("content")
            if not isinstance(content, (str, type(None))):
                raise TypeError("content")
            kept = {"finish_reason": choice.get("finish_reason"), "logprobs": choice.get("logprobs")}
            return {"message": {"content": content}, **kept}
        except (LookupError, TypeError, AttributeError):
            raise _Again(f"gave no chat completion but {one_line(without_key(text, key))}") from None

    def cache_key(self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]) -> str:
        """Hash the address, the model, the messages and the parameters to 64 hex digits."""
        text = json.dumps([self.url, self.model, list(messages), dict(parameters)], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def cached(self, key: str) -> dict[str, Any] | None:
        """Return the answer in the cache, None if it is missing or unreadable."""
        try:
            found = None if self.cache is None else json.loads(self._place(key).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("message"), dict) else None

    def check_cache(self) -> None:
        """Raise CacheError if answers cannot be stored, before any is paid for."""
        if self.cache is not None:
            with blaming(self.cache, _REMEDY):
                self.cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.cache) as probe:
                    probe.write(b" " * 4096)

    def keep(self, key: str, choice: Mapping[str, Any]) -> None:
        """Write an answer to the cache atomically, or raise CacheError."""
        if self.cache is not None:
            with blaming(self.cache, _REMEDY):
                write_atomic(self._place(key), json.dumps(choice))

    def _place(self, key: str) -> Path:
        assert self.cache is not None
        return self.cache / key[:2] / f"{key}.json"


def without_key(value: Any, key: str) -> Any:
    """Hide the key, which some servers repeat, in a JSON value: every run of at least six of its characters, plain or
    encoded (for a key of fewer than twelve, only all of it)."""
    if isinstance(value, list):
        return [without_key(item, key) for item in value]
    if isinstance(value, dict):
        return {name: without_key(item, key) for name, item in value.items()}
    size = len(key) if len(key) < 12 else 6
    if not key or not isinstance(value, str) or len(value) < size:
        return value
    written: Sequence[str] = value
    plain = value
    if re.search(r"[%\\&]", value):
        matches = list(_WRITTEN.finditer(value))
        written, plain = [match[0] for match in matches], "".join(map(_character, matches))
    pieces = {key[i : i + size] for i in range(len(key) - size + 1)}
    hidden = bytearray(len(plain))
    for i in range(len(plain) - size + 1):
        if plain[i : i + size] in pieces:
            hidden[i : i + size] = b"\1" * size
    return "".join(text if not hidden[i] else "" if i and hidden[i - 1] else "[key]" for i, text in enumerate(written))


def _character(match: re.Match[str]) -> str:
    if match[6]:
        return match[6]
    code = int(match[5]) if match[5] else int(match[1] or match[2] or match[3] or match[4], 16)
    return chr(code) if code < 0x110000 else "?"


def _reason(error: BaseException) -> str:
    """Return the message of the innermost cause of an exception."""
    while inner := next(iter(getattr(error, "exceptions", ())), None) or error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _said(found: Any) -> str:
    """Return the message of ``{"error": {"message": ...}}`` and similar answers; empty if there is none."""
    for names in (("error", "detail"), ("message",)):
        if isinstance(found, dict):
            found = next((found[name] for name in names if name in found), found)
    return "" if found is None else str(found).strip()


def _seconds(value: str | None) -> float | None:
    """Read Retry-After, seconds or a date (RFC 9110, 10.2.3); None if it is missing or neither."""
    try:
        if re.fullmatch(r"\d+(\.\d+)?", (value or "").strip()):
            return float(value or "")
        return max(0.0, email.utils.parsedate_to_datetime(value or "").timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
