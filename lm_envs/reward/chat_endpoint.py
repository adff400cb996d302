"""A client for chat completions over an OpenAI-compatible endpoint: retries with backoff, and a cache on disk.

It sends prompts and responses to whatever address the user names, and to no other: redirects are not followed. A key is
read from an environment variable when a request is made; it is neither kept nor shown nor written, and goes over https
or to this machine only.
"""

from __future__ import annotations

import email.utils
import errno
import hashlib
import http.client
import ipaddress
import json
import os
import random
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["ChatEndpoint", "EndpointError"]

RETRIED = frozenset({408, 429})  # and everything from 500 on
_LARGEST = 16 << 20  # bytes of an answer


class EndpointError(ValueError):
    """The endpoint gave no usable answer; the message says what it said."""


class _Again(Exception):
    """What another attempt may mend.

    Args:
        what: for the message, should it be the last attempt.
        after: seconds the server asks to wait, None if it does not say.
    """

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:  # the answer then is an error, 3xx
        return None


@dataclass(frozen=True)
class ChatEndpoint:
    """Where chat completions come from.

    Attributes:
        url: the endpoint's base, as in ``http://127.0.0.1:8000/v1``; ``/chat/completions`` is added if it is not there.
        model: what the server calls the model.
        key_variable: the environment variable that holds the key, if the server wants one.
        timeout: seconds for one attempt, from connecting to the last byte.
        attempts: at most so many per request.
        backoff: seconds: before attempt k + 1 it waits a random time of up to ``backoff * 2**(k - 1)``, "full jitter",
            but as long as the server's Retry-After asks.
        longest_wait: seconds; a server that asks for more is an error.
        cache: a folder for answers, None for no cache. An answer's name is a hash of URL, model and request.

    Raises:
        ValueError: the URL is none of http or https, holds a password, or a number is out of range.
    """

    url: str
    model: str
    key_variable: str = "LM_ENVS_JUDGE_API_KEY"
    timeout: float = 60.0
    attempts: int = 6
    backoff: float = 0.5
    longest_wait: float = 60.0
    cache: Path | None = None
    _opener: urllib.request.OpenerDirector = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the fields and complete the URL."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_valid_port(parts):
            raise ValueError(f"judge: expected an address such as http://127.0.0.1:8000/v1, not {self._shown(parts)!r}")
        if parts.username or parts.password:
            raise ValueError(f"judge: put the key into ${self.key_variable}, not into the address")
        if parts.query or parts.fragment:
            raise ValueError(f"judge: the address has a query or a fragment: {self._shown(parts)!r}")
        for name in ("timeout", "attempts", "backoff", "longest_wait"):
            if not getattr(self, name) > 0:
                raise ValueError(f"judge: {name} must be positive, got {getattr(self, name)}")
        if not self.model:
            raise ValueError("judge: name the model that the server is to use")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else path + "/chat/completions"
        object.__setattr__(self, "url", urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", "")))
        # A proxy is for other machines; and an environment that names one must not send local traffic through it.
        proxies = [urllib.request.ProxyHandler({})] if self.is_local else []
        object.__setattr__(self, "_opener", urllib.request.build_opener(_NoRedirects, *proxies))

    @staticmethod
    def _shown(parts: urllib.parse.SplitResult) -> str:
        """An address without what may be a password."""
        return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        host = urllib.parse.urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        parameters: Mapping[str, Any] = MappingProxyType({}),
        given_up: threading.Event | None = None,
    ) -> dict[str, Any]:
        """The first choice of a completion: ``message``, ``finish_reason`` and perhaps ``logprobs``.

        Args:
            messages: of the conversation.
            parameters: further fields of the request, such as ``temperature``; JSON values.
            given_up: set by who no longer wants the answer: there will be no further attempt.

        Raises:
            EndpointError: the server refused, or every attempt failed.
        """
        body = {"model": self.model, "messages": list(messages), **parameters}
        data = json.dumps(body).encode()
        for attempt in range(1, self.attempts + 1):
            try:
                return self._attempt(data)
            except _Again as error:
                if error.after is not None and error.after > self.longest_wait:
                    raise EndpointError(
                        f"{self.url} {error}, and asks to wait {error.after:.0f} s, longer than "
                        f"longest_wait={self.longest_wait:g}"
                    ) from None
                if attempt == self.attempts:
                    raise EndpointError(f"{self.url} {error}; given up after {attempt} attempts") from None
                if (given_up or threading.Event()).wait(self._wait(attempt, error.after)):
                    raise EndpointError(f"{self.url} {error}; given up") from None
        raise AssertionError("unreachable")

    def _wait(self, attempt: int, asked: float | None) -> float:
        jitter = random.uniform(0, min(self.backoff * 2 ** (attempt - 1), self.longest_wait))
        return jitter if asked is None else asked + jitter / 4  # so that all who wait do not come back at once

    def _attempt(self, data: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "lm-envs"}
        request = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        key = os.environ.get(self.key_variable, "").strip()
        if key:
            if not (key.isascii() and key.isprintable()):
                raise EndpointError(f"the key in ${self.key_variable} holds characters that no header can carry")
            if not (self.is_local or self.url.startswith("https:")):
                raise EndpointError(f"{self.url}: the key in ${self.key_variable} goes over https only")
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                raw = _read(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                said = _said(error, key)
                if error.code in RETRIED or error.code >= 500:
                    raise _Again(f"answered {error.code}: {said}", _seconds(error.headers.get("Retry-After"))) from None
                raise EndpointError(f"{self.url} answered {error.code}: {said}") from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut short
            reason = getattr(error, "reason", None) or error
            raise _Again(f"cannot be reached: {reason or type(error).__name__}") from None
        try:
            choice = json.loads(raw)["choices"][0]
            if not isinstance(choice["message"].get("content"), (str, type(None))):
                raise TypeError("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Again(f"gave no chat completion but {_without(_short(raw), key)}") from None
        return choice

    def cache_key(self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]) -> str:
        """64 hex digits that depend on the address, the model, the messages and the parameters, and on nothing else."""
        text = json.dumps([self.url, self.model, list(messages), dict(parameters)], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def cached(self, key: str) -> dict[str, Any] | None:
        """The answer that the cache has under a key; None where it has none, or one that cannot be read."""
        if self.cache is None:
            return None
        try:
            found = json.loads(self._place(key).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("message"), dict) else None

    def keep(self, key: str, choice: Mapping[str, Any]) -> None:
        """Write an answer to the cache, whole or not at all.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        if self.cache is None:
            return
        place = self._place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(choice, stream)
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise

    def _place(self, key: str) -> Path:
        assert self.cache is not None
        return self.cache / key[:2] / f"{key}.json"


def _has_valid_port(parts: urllib.parse.SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


def _read(answer: Any, deadline: float) -> bytes:
    """The body; a server that trickles it is timed out too."""
    parts, size = [], 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > _LARGEST:
            raise EndpointError(f"the answer is longer than {_LARGEST >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "timed out")
    return b"".join(parts)


def _said(error: urllib.error.HTTPError, key: str) -> str:
    """What a server said in an error: of ``{"error": {"message": ...}}`` the message, else the body's beginning."""
    try:
        raw = error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        raw = b""
    try:
        found = json.loads(raw)
        found = found.get("error", found.get("detail", found))
        text = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        text = raw.decode("utf-8", "replace")
    return _without(_short(str(text).strip() or error.reason), key)


def _without(text: str, key: str) -> str:
    """Some servers repeat the key that they refuse."""
    return text.replace(key, "[key]") if key else text


def _short(raw: str | bytes, width: int = 200) -> str:
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _seconds(value: str | None) -> float | None:
    """Retry-After, in seconds or as a date (RFC 9110, 10.2.3); None if there is none or it is neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
