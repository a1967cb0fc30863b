"""The fleet page inside of Airflow's UI, for whoever is logged in there.

Every process of Airflow loads its plugins, and only the API server answers requests: the page is made at the
first of them.
"""

from __future__ import annotations

import threading
from typing import Any

from airflow.plugins_manager import AirflowPlugin


def make() -> Any:
    """The page, each of its routes behind Airflow's own login (``GetUserDep``)."""
    from typing import get_args

    from airflow.api_fastapi.core_api.security import GetUserDep

    from flywheel.config import PARAMS_FILE, Deployment, RolloutSettings, Settings
    from flywheel.errors import ConfigError
    from flywheel.page import Source, build
    from flywheel.store import Store
    from flywheel.workspace import source_checkout

    deployment = Deployment.from_env()
    source = Source(
        lambda: Store.from_env(Deployment.from_env(), timeout_s=5.0, attempts=2), deployment.home / "keys"
    )
    try:
        rollout = Settings.load(source_checkout() / PARAMS_FILE).rollout
    except ConfigError:  # an API server needs no checkout
        rollout = RolloutSettings()
    return build(source, get_args(GetUserDep)[1].dependency, silence_s=rollout.silence_s)


class AtFirstRequest:
    """An ASGI application that is made when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._app: Any = None

    def _made(self) -> Any:
        with self._lock:
            if self._app is None:
                self._app = make()
            return self._app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.concurrency import run_in_threadpool

        app = self._app or await run_in_threadpool(self._made)
        await app(scope, receive, send)


class FleetPage(AirflowPlugin):
    """Found by the entry point ``airflow.plugins``."""

    name = "flywheel_fleet_page"
    fastapi_apps = [{"app": AtFirstRequest(), "url_prefix": "/fleet", "name": "Fleet"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Fleet",
            "href": "/fleet/",
            "destination": "nav",
            "icon": "/fleet/static/icon.svg",
            "url_route": "fleet",
            "nav_top_level": True,
        }
    ]
