"""Services that run beside the product on one machine: the embedded object store and Airflow.

``up`` leaves them running as daemons until ``down``; ``session`` (and ``up(foreground=True)``) binds them to
the calling process: however that ends, kill -9 included, a watchdog stops what it had started. While they are
up, a keeper starts again what dies.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from flywheel import access
from flywheel.config import BUCKET, Deployment
from flywheel.errors import ServiceError
from flywheel.services import process
from flywheel.services.airflow import APPROVER, Airflow, child_environ
from flywheel.services.ceph import Ceph
from flywheel.services.keeper import Keeper, Patience
from flywheel.services.watchdog import Watchdog
from flywheel.store import EmbeddedStore, Store, embedded_store

STORE, AIRFLOW, KEEPER = "store", "airflow", "keeper"
LOCK_S = 300.0

Progress = Callable[[str, str], None]  # (service, what it is doing)

_watchdogs: dict[Path, list[Watchdog]] = {}


@dataclass(frozen=True)
class Endpoints:
    """Where the services are. Secrets are kept out of its repr."""

    home: Path
    store_url: str
    store_endpoint: str | None  # None is AWS itself
    airflow_url: str | None
    airflow_user: str | None
    airflow_password: str | None = field(repr=False)
    started: tuple[str, ...]  # what this call started, and so what its caller may stop
    store_environ: dict[str, str] = field(repr=False)

    def store(self) -> Store:
        """The object store."""
        e = self.store_environ
        return Store(
            self.store_url,
            self.store_endpoint,
            access_key=e.get("AWS_ACCESS_KEY_ID"),
            secret_key=e.get("AWS_SECRET_ACCESS_KEY"),
            region=e.get("AWS_DEFAULT_REGION"),
        )

    def environ(self) -> dict[str, str]:
        """The whole environment for a process that uses the services."""
        return child_environ(self.store_environ, self.home)


OnStore = Callable[[Endpoints], None]


def up(
    home: Path,
    *,
    with_airflow: bool = True,
    foreground: bool = False,
    on_progress: Progress = lambda _service, _step: None,
    on_store: OnStore = lambda _endpoints: None,
) -> Endpoints:
    """Start what is not running and wait until it is healthy; idempotent.

    ``on_store`` is called once the store can be used, while Airflow is still on its way. The embedded store
    is left out if AWS_ENDPOINT_URL or FLYWHEEL_STORE names another. If this fails or is interrupted, what it
    had started is stopped again. Raises ``ServiceError``, ``StoreError``.
    """
    if sys.platform != "linux":
        raise ServiceError("the embedded services need Linux; elsewhere run them in a container")
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    deployment = Deployment.from_env().model_copy(update={"home": home})
    ceph, airflow = Ceph(home), Airflow(home)
    with _locked(home, on_progress):
        missing = []
        if deployment.embedded and not ceph.is_up():
            missing.append(STORE)
        # An Airflow that is up for another store would write its results there.
        if with_airflow and (missing or not airflow.is_up() or airflow.bound_to() != _where(deployment)):
            missing.append(AIRFLOW)
        watchdog = Watchdog(home, missing) if missing else None
        try:
            endpoints = _start(deployment, missing, ceph, airflow, on_progress, on_store)
            _keep(deployment, missing, with_airflow)
        except BaseException:
            _stop(home, missing)
            if watchdog is not None:
                watchdog.release()
            raise
    if watchdog is not None:
        if foreground:
            _watchdogs.setdefault(home, []).append(watchdog)
        else:
            watchdog.release()
    if not with_airflow:
        return endpoints
    return replace(
        endpoints,
        airflow_url=airflow.url,
        airflow_user=APPROVER,
        airflow_password=airflow.passwords()[APPROVER],
    )


def down(
    home: Path, *, services: Iterable[str] = (AIRFLOW, STORE), on_progress: Progress | None = None
) -> None:
    """Stop the named services with all that they run; what is stopped already is left so."""
    home = home.absolute()
    stop(home, services, on_progress or (lambda _service, _step: None))
    for watchdog in _watchdogs.pop(home, ()):
        watchdog.release()


@contextmanager
def session(
    home: Path,
    *,
    with_airflow: bool = True,
    on_progress: Progress = lambda _service, _step: None,
    on_store: OnStore = lambda _endpoints: None,
) -> Iterator[Endpoints]:
    """Services for the time of a ``with`` block. What ran before is used, and left running."""
    endpoints = up(
        home, with_airflow=with_airflow, foreground=True, on_progress=on_progress, on_store=on_store
    )
    try:
        yield endpoints
    finally:
        down(home, services=endpoints.started, on_progress=on_progress)


def robot_keys(home: Path, site: str, names: Iterable[str]) -> dict[str, EmbeddedStore]:
    """Keys of their own for robots, on the embedded store; none where the store is another: its keys are
    made where its users are (``flywheel access``)."""
    if not Deployment.from_env().embedded:
        return {}
    ceph, at = Ceph(home.absolute()), f"s3://{BUCKET}"
    return {n: ceph.grant(f"{site}.{n}", access.robot(at, site, n)) for n in names}


def status(home: Path) -> dict[str, dict[str, bool]]:
    """Per service, which of its processes run."""
    home = home.absolute()
    return {
        STORE: Ceph(home).status(),
        AIRFLOW: Airflow(home).status(),
        KEEPER: {KEEPER: Keeper(home).runs()},
    }


def revive(home: Path, patience: Patience) -> list[str]:
    """Start again what died of the services that are to be up; what was started.

    Nothing while somebody else starts or stops services. Raises ``ServiceError`` for what did not start.
    """
    deployment = Deployment.from_env().model_copy(update={"home": home})
    ceph, airflow, keeper = Ceph(home), Airflow(home), Keeper(home)
    started: list[str] = []
    try:
        with _locked(home, wait_s=0.0):
            kept = keeper.kept()
            known = not deployment.embedded or embedded_store(home) is not None
            if AIRFLOW in kept and known:
                if airflow.bound_to() != _where(deployment):
                    # The store had to move to another port; Airflow's processes were told of the old one.
                    airflow.down()
                    airflow.bind(_where(deployment))
                if not all(airflow.status().values()):
                    started += airflow.revive(_endpoints(deployment, []).environ(), patience.due)
                if keeper.restarts(0.0):
                    airflow.end_orphans()
            if STORE in kept and not ceph.is_up() and patience.due(STORE):
                dead = [n for n, runs in ceph.status().items() if not runs]
                ceph.up(lambda _step: None)
                started += dead
    except _Busy:
        return []
    return started


def stop(home: Path, services: Iterable[str], on_progress: Progress = lambda _service, _step: None) -> None:
    """``down`` without regard to a watchdog: what the watchdog itself runs."""
    if home.is_dir():
        services = tuple(services)
        keeper = Keeper(home)
        if keeper.kept() <= set(services):
            keeper.stop()  # it may be in the middle of starting something
        with _locked(home, on_progress):
            _stop(home, services, on_progress)


def _keep(deployment: Deployment, started: list[str], with_airflow: bool) -> None:
    """See to it that what is up stays up; a keeper that ran before gets what Airflow was started with."""
    keeper = Keeper(deployment.home)
    kept = set(keeper.kept())
    if deployment.embedded:
        kept.add(STORE)
    if with_airflow:
        kept.add(AIRFLOW)
    if started or not keeper.runs() or kept != keeper.kept():
        keeper.stop()
        keeper.keep(kept)
        if kept:
            keeper.start(child_environ({}, deployment.home))


def _start(
    deployment: Deployment,
    missing: list[str],
    ceph: Ceph,
    airflow: Airflow,
    on_progress: Progress,
    on_store: OnStore,
) -> Endpoints:
    """Start the missing services, as much at once as can be; return where the store is."""
    home = deployment.home
    with ThreadPoolExecutor(1) as pool:
        migrated = None
        if AIRFLOW in missing:
            airflow.down()
            # Its database does not need the store, so both are made at the same time.
            migrated = pool.submit(
                airflow.migrate, child_environ({}, home), lambda step: on_progress(AIRFLOW, step)
            )
        try:
            if STORE in missing:
                ceph.up(lambda step: on_progress(STORE, step))
            if not deployment.embedded:
                on_progress(STORE, f"checking {deployment.endpoint or 'AWS'}")
                external = Store.from_env(deployment)
                external.ensure_bucket()
                external.probe()
            on_progress(STORE, "ready")
            endpoints = _endpoints(deployment, missing)
            on_store(endpoints)
            if migrated is not None:
                migrated.result()
        except BaseException:
            process.end_marked(airflow.mark, timeout_s=2.0)  # or leaving the block would wait for it
            raise
    if AIRFLOW in missing:
        airflow.up(endpoints.environ(), _where(deployment), lambda step: on_progress(AIRFLOW, step))
        on_progress(AIRFLOW, "ready")
    return endpoints


def _endpoints(deployment: Deployment, started: list[str]) -> Endpoints:
    """The store, and nothing of Airflow yet."""
    environ = _store_environ(deployment)
    return Endpoints(
        home=deployment.home,
        store_url=environ.get("FLYWHEEL_STORE", deployment.store_url),
        store_endpoint=environ.get("AWS_ENDPOINT_URL", deployment.endpoint),
        airflow_url=None,
        airflow_user=None,
        airflow_password=None,
        started=tuple(started),
        store_environ=environ,
    )


def _where(deployment: Deployment) -> str:
    """Which store this is, without keys."""
    e = embedded_store(deployment.home) if deployment.embedded else None
    return f"{deployment.store_url} {e.endpoint if e else deployment.endpoint}"


def _store_environ(deployment: Deployment) -> dict[str, str]:
    if not deployment.embedded:  # the keys are in the environment, or where boto3 finds them
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
        found = {n: v for n in names if (v := os.environ.get(n))}
        return {**found, "FLYWHEEL_STORE": deployment.store_url}
    e = embedded_store(deployment.home)
    if e is None:
        raise ServiceError(f"embedded store: it is not up on {deployment.home}")
    return {
        "FLYWHEEL_STORE": f"s3://{e.bucket}",
        "AWS_ENDPOINT_URL": e.endpoint,
        "AWS_ACCESS_KEY_ID": e.access_key,
        "AWS_SECRET_ACCESS_KEY": e.secret_key,
        "AWS_DEFAULT_REGION": e.region,
    }


def _stop(home: Path, services: Iterable[str], on_progress: Progress = lambda _service, _step: None) -> None:
    wanted = set(services)
    keeper = Keeper(home)
    if left := keeper.kept() - wanted:
        keeper.keep(left)
    elif keeper.kept():
        keeper.keep(())
        keeper.stop()
    for name, service in ((AIRFLOW, Airflow(home)), (STORE, Ceph(home))):  # tasks write to the store
        if name in wanted:
            on_progress(name, "stopping")
            service.down()
            on_progress(name, "stopped")


class _Busy(ServiceError):
    """Somebody else starts or stops services now."""


@contextmanager
def _locked(
    home: Path, on_progress: Progress = lambda _service, _step: None, wait_s: float = LOCK_S
) -> Iterator[None]:
    """One ``up`` or ``down`` at a time; the kernel frees the lock of a process that dies."""
    with (home / "services.lock").open("w") as f:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began >= wait_s:
                    raise _Busy(f"another start or stop has held {f.name} for {wait_s:.0f} s") from None
                on_progress("services", "waiting for another start or stop")
                time.sleep(0.5)
        yield
