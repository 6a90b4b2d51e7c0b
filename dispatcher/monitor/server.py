"""The monitor's web server: GET alone, one page, no outside resources, nothing that a browser could be made to do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from redis.exceptions import RedisError

from lorayard.shared.keys import Keys

from ..validate import JOB_ID
from .recorder import Recorder
from .way import refused, way

log = logging.getLogger(__name__)

PAGE = (Path(__file__).parent / "page.html").read_text()
COOKIE = "lorayard_token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
REFUSED_SHOWN = 100


def _digests(tag: str) -> str:
    """What CSP calls the inline styles or scripts of the page."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{each}'" for each in sums)


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src {_digests('style')}; script-src {_digests('script')}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip


class Answer(Exception):
    """Ends a request with a status and a sentence."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


class MonitorServer(ThreadingHTTPServer):
    """Serves a recorder's yard on an address. token: what requests must show, "" for nothing.

    hosts: names by which it may be called, so that no foreign page reaches it through a name of its own; None: any.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], redis: Any, keys: Keys, recorder: Recorder, token: str = "",
        hosts: frozenset[str] | None = frozenset(LOOPBACK),
    ) -> None:  # fmt: skip
        super().__init__(address, _Handler)
        self.redis, self.keys, self.recorder, self.token, self.hosts = redis, keys, recorder, token, hosts

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no fault."""
        log.debug("a request of the monitor ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: MonitorServer
    server_version = "lorayard"
    sys_version = ""
    timeout = 10

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: they come each second, and may hold a token."""

    @cached_property
    def _query(self) -> Mapping[str, list[str]]:
        return parse_qs(urlsplit(self.path).query, max_num_fields=8)

    def _answer(self, body: bool) -> None:
        try:
            self._check()
            status, kind, text, more = 200, *self._find(), {}
        except Answer as answer:
            status, kind, text, more = answer.status, "text/plain", f"{answer}\n".encode(), answer.headers
        except (RedisError, ValueError) as error:
            status, kind, text, more = 503, "text/plain", f"{type(error).__name__}: Redis failed\n".encode(), {}
            log.warning("the monitor could not answer: %s", error)
        self.send_response(status)
        for name, value in (HEADERS | more).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def _check(self) -> None:
        """Raises Answer unless the request comes to one of our names and with the token."""
        host = re.sub(r":\d+$", "", self.headers.get("Host", "")).strip("[]").lower()
        if self.server.hosts is not None and host not in self.server.hosts:
            raise Answer(421, "this monitor is not known by that name; see --allow-host")
        if not self.server.token:
            return
        given = self._query.get("token", [""])[0]
        if given and self._fits(given):
            cookie = f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            raise Answer(303, "the token is in a cookie now", Location="/", Set_Cookie=cookie)
        if not (
            self._fits(self.headers.get("Authorization", "").removeprefix("Bearer ")) or self._fits(self._cookie())
        ):
            raise Answer(401, "open /?token=TOKEN once, or send Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")

    def _fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.server.token.encode())

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return ""
        return found.value if found else ""

    def _find(self) -> tuple[str, bytes]:
        """(media type, body) of what is asked for. Raises Answer."""
        path = urlsplit(self.path).path
        if path == "/":
            return "text/html", PAGE.encode()
        if path == "/metrics":
            return self._metrics()
        found: dict[str, Callable[[], Any]] = {
            "/api/state": self.server.recorder.state, "/api/history": self.server.recorder.history,
            "/api/job": self._job, "/api/dead": lambda: refused(self.server.redis, self.server.keys, REFUSED_SHOWN),
        }  # fmt: skip
        if path not in found:
            raise Answer(404, "there is /, /metrics and /api/state, history, job?id=ID and dead")
        return "application/json", json.dumps(found[path](), allow_nan=False).encode()

    def _job(self) -> Any:
        job_id = self._query.get("id", [""])[0]
        if not JOB_ID.fullmatch(job_id):
            raise Answer(400, f"an id must match {JOB_ID.pattern}")
        return way(self.server.redis, self.server.keys, job_id)

    def _metrics(self) -> tuple[str, bytes]:
        if find_spec("prometheus_client") is None:
            raise Answer(503, "this needs the package prometheus_client: pip install 'lorayard[monitor]'")
        from .metrics import exposition

        seen, trouble = self.server.recorder.now
        return "text/plain; version=0.0.4", exposition(None if trouble else seen)
