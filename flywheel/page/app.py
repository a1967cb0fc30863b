"""The application: routes, headers, errors. Every route depends on ``guard``; there is none without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flywheel.config import RolloutSettings
from flywheel.errors import FlywheelError, NotFound, StoreUnavailable
from flywheel.page.pages import FOR_EVER, Pages, Refused
from flywheel.page.rendering import HERE, STATIC, problem
from flywheel.page.source import Source

CSP = "; ".join(
    (
        "default-src 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'self'",  # Airflow's UI shows it in a frame
    )
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Headers:
    """Puts the security headers on every answer, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def build(
    source: Source,
    guard: Callable[..., Any],
    *,
    silence_s: float = RolloutSettings().silence_s,
    airflow_url: str = "",
) -> FastAPI:
    """The page of a store. ``guard`` is a dependency that raises for whoever may not look.

    ``silence_s`` is how long a robot may be unheard of before it counts as silent. ``airflow_url`` is where
    questions are answered, for links; "" where the page is shown inside of Airflow.
    """
    # No schema and no docs: they would be routes that ``dependencies`` does not reach.
    app = FastAPI(
        title="flywheel", openapi_url=None, docs_url=None, redoc_url=None, dependencies=[Depends(guard)]
    )
    app.add_middleware(Headers)
    _handle_errors(app)
    pages = Pages(source, silence_s, airflow_url)
    for path, page in (
        ("/", pages.overview),
        ("/robots", pages.robots),
        ("/robot", pages.robot),
        ("/rollouts", pages.rollouts),
        ("/rollout", pages.rollout),
        ("/failures", pages.failures),
        ("/failure", pages.failure),
        ("/turns", pages.turns),
        ("/turn", pages.turn),
    ):
        app.get(path, response_class=HTMLResponse)(page)
    app.get("/thumbnail", response_class=Response)(pages.thumbnail)
    app.get("/picture", response_class=Response)(pages.picture)
    app.get("/plot", response_class=Response)(pages.plot)
    app.get("/static/{name}", response_class=Response)(static)
    return app


def static(name: str) -> Response:
    """The stylesheet, the script, the icon."""
    if name not in STATIC:
        raise Refused(404, "no such file")
    return Response((HERE / name).read_bytes(), media_type=STATIC[name], headers={"Cache-Control": FOR_EVER})


def _handle_errors(app: FastAPI) -> None:
    def refused(request: Request, e: Exception) -> Response:
        return problem(e.status if isinstance(e, Refused) else 400, str(e))

    def invalid(request: Request, e: Exception) -> Response:
        assert isinstance(e, RequestValidationError)
        first = e.errors()[0]
        name = first["loc"][-1]
        return problem(400, f"{name} = {str(first.get('input'))[:200]!r}: {first['msg']}")

    def failed(request: Request, e: Exception) -> Response:
        status = 404 if isinstance(e, NotFound) else 503 if isinstance(e, StoreUnavailable) else 502
        return problem(status, str(e))

    def http(request: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return PlainTextResponse(f"{e.detail}\n", e.status_code, headers=e.headers)

    def broken(request: Request, e: Exception) -> Response:
        # Outside of every middleware, so it brings the headers itself.
        return PlainTextResponse("This page could not be made; the server's log says why.\n", 500, HEADERS)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(FlywheelError, failed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, broken)
