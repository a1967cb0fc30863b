"""The page on its own, on loopback, behind an address that works once.

Whoever can read the terminal may look: the address that is printed holds a key that is drawn at random, is
taken by the first browser that comes with it, and is replaced by a cookie and a fresh key. Nothing listens
on another address than 127.0.0.1.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from fastapi import HTTPException, Request
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flywheel.page.app import build
from flywheel.page.source import Source

HOSTS = ("127.0.0.1", "localhost")
COOKIE = "flywheel_page"
SESSIONS_MAX = 32


class Door:
    """Keys and sessions, in memory: they end with the process."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """``say`` is told each key as it is drawn."""
        self._say = say
        self._lock = threading.Lock()
        self._sessions: list[str] = []
        self._key = ""
        self.renew()

    def renew(self) -> None:
        """Draw a key."""
        self._key = secrets.token_urlsafe(24)
        self._say(self._key)

    def enter(self, key: str) -> str | None:
        """A session for whoever has the key, which nobody can use again; None for a wrong one."""
        with self._lock:
            if not hmac.compare_digest(key.encode(), self._key.encode()):
                return None
            session = secrets.token_urlsafe(32)
            self._sessions = [*self._sessions, session][-SESSIONS_MAX:]
            self.renew()
            return session

    def knows(self, session: str) -> bool:
        """Whether a session was opened here."""
        with self._lock:
            return any(hmac.compare_digest(session.encode(), s.encode()) for s in self._sessions)

    def guard(self, request: Request) -> None:
        """The dependency of every route. Raises 401."""
        if not self.knows(request.cookies.get(COOKIE, "")):
            raise HTTPException(
                401, "open the address that `flywheel page` printed last; each works once, in one browser"
            )


class _Entrance:
    """Exchanges ``?key=`` for a cookie, before anything else is looked at."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/enter":
            request = Request(scope, receive)
            session = self._door.enter(request.query_params.get("key", ""))
            answer: PlainTextResponse | RedirectResponse
            if session is None:
                answer = PlainTextResponse(
                    "This address was used already, or is not one: open the one that was printed last.\n", 401
                )
            else:
                answer = RedirectResponse("./", 303)
                answer.set_cookie(COOKIE, session, httponly=True, samesite="strict", path="/")
            answer.headers["Cache-Control"] = "no-store"
            answer.headers["Referrer-Policy"] = "no-referrer"
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


def guarded(source: Source, door: Door, **options: Any) -> ASGIApp:
    """The page behind the door, ``options`` those of ``build``; other host names than loopback's are refused
    (DNS rebinding)."""
    app = build(source, door.guard, **options)
    return TrustedHostMiddleware(_Entrance(app, door), allowed_hosts=list(HOSTS))


def serve(source: Source, port: int, say: Callable[[str], None], **options: Any) -> None:
    """Serve until interrupted; ``say`` is told the address, and a new one whenever one was used. ``options``
    are those of ``build``."""
    import uvicorn

    address = f"http://{HOSTS[0]}:{port}/enter"
    door = Door(lambda key: say(f"{address}?{urlencode({'key': key})}"))
    config = uvicorn.Config(
        guarded(source, door, **options),
        host=HOSTS[0],
        port=port,
        log_level="warning",
        access_log=False,  # it would hold the key
        server_header=False,
    )
    uvicorn.Server(config).run()
