"""``lm-envs people serve``: the page of a study, on this machine's loopback address unless told otherwise."""

from __future__ import annotations

import getpass
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

import tyro
from annotated_types import Interval
from rich.console import Console

from lm_envs.benchmarks.errors import UserError
from lm_envs.feedback.store import open_study
from lm_envs.printable import one_line

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]


@dataclass(frozen=True)
class Serve:
    """Serve a study's page on this machine, until Ctrl-C.

      lm-envs people serve study
      lm-envs people serve study --annotator ann --annotator ben

    Prints a secret link for each annotator.
    """

    study: Folder
    annotator: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """Who answers; may be given again. Your user name, if the study has nobody yet."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but a loopback address lets others in, over plain HTTP."""
    port: Annotated[int, Interval(ge=1, le=65535), tyro.conf.arg(metavar="N")] = 8117
    """Port to listen on."""
    public: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """What the server is called from outside, behind a proxy that speaks HTTPS."""

    def run(self, console: Console) -> None:
        store = open_study(self.study)
        try:
            import uvicorn

            from lm_envs.feedback.server import application
        except ImportError as error:
            raise UserError(f"the page needs {error.name}: pip install 'lm-envs[people]'") from error
        names = tuple(dict.fromkeys(self.annotator)) or tuple(store.names()) or (getpass.getuser(),)
        if not all(name.strip() for name in names):
            raise UserError("--annotator needs a name that is not empty")
        here = f"[{self.host}]" if ":" in self.host else self.host
        public = _address(self.public) if self.public else None
        base = self.public.rstrip("/") if self.public else f"http://{here}:{self.port}"
        warning = self._warning()
        with self._listener() as listener:
            if warning is not None:
                console.print(warning, highlight=False, markup=False, soft_wrap=True)
            for name in names:
                print(f"{one_line(name)}: {base}/a/{store.key(store.annotator(name))}/", flush=True)
            hosts = [here, "localhost", "127.0.0.1", "[::1]"] + ([public.hostname or ""] if public else [])
            app = application(store, hosts, public.netloc if public else None)
            config = uvicorn.Config(app, log_level="warning", server_header=False, proxy_headers=False)
            uvicorn.Server(config).run(sockets=[listener])

    def _warning(self) -> str | None:
        """What to say about an address that others can reach; None about a loopback address."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            if self.host == "localhost":
                return None
        else:
            if address.is_loopback:
                return None
            if address.is_unspecified and self.public is None:
                raise UserError(
                    f"--host {self.host} is every address of this machine: say by --public what others open, such as "
                    f"--public http://192.168.1.5:{self.port}"
                )
        return (
            f"warning: {self.host} is reachable from other machines, and links travel unencrypted; "
            "--host 127.0.0.1 behind a proxy with HTTPS is safer"
        )

    def _listener(self) -> socket.socket:
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listener = socket.create_server((self.host, self.port), family=family)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no name of a machine"
            raise UserError(
                f"cannot listen on {self.host} port {self.port}: {why}; give another --port or --host"
            ) from error
        # A reply is sent in two parts; without this the second one waits 40 ms for the first one's acknowledgment.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener


def _address(text: str) -> SplitResult:
    """Check the address of --public, such as ``https://study.example.org``."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username:
        raise UserError(f"--public is an address such as https://study.example.org, not {text!r}")
    return parts
