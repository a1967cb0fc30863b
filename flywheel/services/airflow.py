"""Airflow's four processes on one machine, without `airflow standalone`.

Only the API server listens, on 127.0.0.1. Settings lie in ``HOME/airflow/airflow.cfg`` (mode 0600, since it
holds the signing keys), passwords, drawn at random, in ``HOME/airflow/passwords.json`` (0600).
This module talks to Airflow by its programs and its public API; only ``dags`` imports it.
"""

from __future__ import annotations

import base64
import configparser
import functools
import importlib.util
import io
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flywheel.config import checkout
from flywheel.errors import ServiceError
from flywheel.services import process
from flywheel.services.process import Progress, free_port, write_private

PROCESSES = {
    "api-server": ("api-server",),
    "scheduler": ("scheduler", "--skip-serve-logs"),
    "dag-processor": ("dag-processor",),
    "triggerer": ("triggerer", "--skip-serve-logs"),
}
APPROVER = "ops"
AUTO_APPROVER = "demo-auto-approver"  # can decide only where FLYWHEEL_APPROVERS names it: in the demo
USERS = {"admin": "admin", APPROVER: "op", AUTO_APPROVER: "op", "viewer": "viewer"}  # name: role
POOLS = {"trainer": (1, "stages that use every core: one at a time")}
# What a turn of hours needs of any Airflow, on one machine or on many.
PATIENCE: Mapping[str, Mapping[str, str]] = {
    "workers": {
        # At the default of 5 s an approval that is answered at once can fail its task.
        "min_heartbeat_interval": "1",
        # An API server that died is back in half a minute, on a busy machine in two. By default
        # every task gives up after 10 s, and all its attempts with it.
        "execution_api_retries": "30",
        "execution_api_retry_wait_max": "8",
        "max_failed_heartbeats": "60",
    },
    # What a process that was killed had in hand is noticed in two minutes and not in five.
    "scheduler": {
        "orphaned_tasks_check_interval": "15",
        "task_instance_heartbeat_timeout": "120",
        "task_queued_timeout": "300",
        "task_queued_timeout_check_interval": "30",
    },
}
WORKER = "airflow worker -- LocalExecutor"  # the title of what runs one task after another
START_S = 240.0
STOP_S = 12.0


@functools.cache
def _direct() -> urllib.request.OpenerDirector:
    """Past any proxy. Made once: making one loads every certificate authority."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Airflow:
    """The Airflow of one state directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.dir = home / "airflow"
        self.run = self.dir / "run"
        self.logs = home / "logs"
        self.mark = f"airflow:{home}"
        self._tokens: dict[str, dict[str, str]] = {}  # by user: the header that logs in

    # -- up and down

    def migrate(self, env: Mapping[str, str], on_progress: Progress) -> None:
        """Write the settings and bring the database to this version; nothing to do for most starts."""
        self._configure()
        stamp = self.dir / "migrated"
        try:
            wanted = version("apache-airflow-core")
        except PackageNotFoundError:
            raise ServiceError(
                "Airflow is not installed; install the project with its extra 'cloud'"
            ) from None
        if stamp.exists() and stamp.read_text() == wanted:
            return
        on_progress("making its database")
        log = self.logs / "airflow-migrate.log"
        with log.open("ab") as out:
            done = subprocess.run(
                [sys.executable, "-m", "airflow", "db", "migrate"],
                env={**self._environ(env), process.MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.dir,
                start_new_session=True,
                check=False,
            )
        if done.returncode:
            raise ServiceError(f"Airflow: db migrate failed: {process.tail(log, 1)} (log: {log})")
        stamp.write_text(wanted)

    def up(self, env: Mapping[str, str], store: str, on_progress: Progress) -> None:
        """Start what is not running (after ``migrate``); returns when Airflow says that all of it is healthy.

        ``env`` is what its processes and so every task get: the store's address and keys among them.
        ``store`` names that store, for ``bound_to``.
        """
        on_progress("starting")
        self.bind(store)
        for name in PROCESSES:
            if process.running(self.run, name) is None:
                self._start(name, env)
        began = time.monotonic()
        waiting = ""
        while sick := [part for part, ok in self.health().items() if not ok]:
            for name in PROCESSES:
                if process.running(self.run, name) is None:
                    log = self.logs / f"airflow-{name}.log"
                    raise ServiceError(f"Airflow: {name} ended: {process.tail(log)} (log: {log})")
            if time.monotonic() - began > START_S:
                raise ServiceError(
                    f"Airflow: {', '.join(sick)} not healthy after {START_S:.0f} s; see {self.logs}"
                )
            if waiting != (waiting := f"waiting for {', '.join(sick)}"):
                on_progress(waiting)
            time.sleep(0.25)
        for pool, (slots, description) in POOLS.items():
            body = {"name": pool, "slots": slots, "description": description, "include_deferred": False}
            self._make(f"pool {pool}", "/pools", body, give_up=began + START_S)

    def _make(self, what: str, path: str, body: Any, give_up: float) -> None:
        """POST until it is there. SQLite gives up on a lock after 5 s, and at the start everybody writes."""
        while True:
            try:
                self.call("POST", path, body)
            except ServiceError as e:
                if ": 409 " in str(e):
                    return  # it is there already
                if ": 500 " not in str(e) or time.monotonic() > give_up:
                    raise ServiceError(f"{what}: {e}") from None
                time.sleep(1.0)
            else:
                return

    def revive(self, env: Mapping[str, str], due: Callable[[str], bool]) -> list[str]:
        """Start again what died, where ``due`` says so, and end what it left behind; what was started.

        A task that ran when the scheduler died runs on until Airflow hears of it. The workers around it wait
        for ever for a scheduler that is dead.
        """
        dead = [n for n in PROCESSES if process.running(self.run, n) is None]
        started = [n for n in dead if due(n)]
        for name in started:
            if name != "scheduler" and (gone := process.remembered(self.run, name)) is not None:
                left = (p for p in process.marked(self.mark) if process.session_of(p) == gone.pid)
                process.stop(left, timeout_s=2.0)
            self._start(name, env)
        return started

    def end_orphans(self) -> int:
        """End workers that wait for a scheduler that is dead; how many."""
        scheduler = process.running(self.run, "scheduler")
        orphans = [
            p
            for p in process.marked(self.mark)
            if (title := process.title_of(p)).startswith(WORKER)
            and title.endswith("<idle>")
            and (scheduler is None or process.parent_of(p) != scheduler.pid)
        ]
        process.stop(orphans, timeout_s=2.0)
        return len(orphans)

    def _start(self, name: str, env: Mapping[str, str]) -> None:
        process.start(
            name,
            [sys.executable, "-m", "airflow", *PROCESSES[name]],
            mark=self.mark,
            run_dir=self.run,
            log=self.logs / f"airflow-{name}.log",
            env=self._environ(env),
            cwd=self.dir,
        )

    def down(self) -> None:
        """Stop it with every task it runs; a task gets SIGTERM first, so that training can checkpoint."""
        found = [p for n in PROCESSES if (p := process.running(self.run, n)) is not None]
        process.stop(found, STOP_S)
        process.end_marked(self.mark, STOP_S)

    def bind(self, store: str) -> None:
        """Name the store that it is started for next."""
        (self.dir / "store").write_text(store)

    def bound_to(self) -> str:
        """The store that it was last started for."""
        try:
            return (self.dir / "store").read_text()
        except FileNotFoundError:
            return ""

    def status(self) -> dict[str, bool]:
        """Which of its processes run."""
        return {n: process.running(self.run, n) is not None for n in PROCESSES}

    def is_up(self) -> bool:
        """Whether every process runs and says that it is healthy."""
        return all(self.status().values()) and all(self.health().values())

    # -- talking to it

    @property
    def url(self) -> str:
        """Address of the UI and the API."""
        return str(self._settings()["api"]["base_url"])

    def passwords(self) -> dict[str, str]:
        """Name to password; never print more than the one that a person is to log in with."""
        try:
            return dict(json.loads((self.dir / "passwords.json").read_text()))
        except (OSError, ValueError):
            raise ServiceError(f"Airflow has not been started on {self.home}; run `flywheel up`") from None

    def health(self) -> dict[str, bool]:
        """Per part whether it is healthy; every part False while the API does not answer."""
        parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
        try:
            answer = self._request("GET", "/api/v2/monitor/health", None, {})
        except ServiceError:
            return dict.fromkeys(parts, False)
        return {p: (answer.get(p) or {}).get("status") == "healthy" for p in parts}

    def call(self, method: str, path: str, body: Any = None, *, user: str = "admin") -> Any:
        """One request to the public API (path from ``/api/v2``) as a user; the decoded answer.

        Raises ``ServiceError`` with Airflow's status and reason.
        """
        if user in self._tokens:
            try:
                return self._request(method, f"/api/v2{path}", body, self._tokens[user])
            except ServiceError as e:
                if ": 401 " not in str(e):
                    raise
        login = {"username": user, "password": self.passwords()[user]}
        token = self._request("POST", "/auth/token", login, {})["access_token"]
        self._tokens[user] = {"Authorization": f"Bearer {token}"}
        return self._request(method, f"/api/v2{path}", body, self._tokens[user])

    def _request(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        try:
            with _direct().open(request, timeout=15) as answer:
                data = answer.read()
        except urllib.error.HTTPError as e:
            with e:
                said = e.read(300).decode(errors="replace")
            raise ServiceError(f"Airflow: {method} {path}: {e.code} {said}") from None
        except OSError as e:
            raise ServiceError(f"Airflow: {method} {path}: no answer from {self.url}: {e}") from None
        return json.loads(data) if data else None

    # -- settings

    def _settings(self) -> configparser.ConfigParser:
        cfg = configparser.ConfigParser(interpolation=None)
        cfg.read(self.dir / "airflow.cfg")
        if not cfg.has_section("api"):
            raise ServiceError(f"Airflow has not been started on {self.home}; run `flywheel up`")
        return cfg

    def _configure(self) -> None:
        """Write airflow.cfg anew, keeping its keys and, where it is still free, its port."""
        self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.logs.mkdir(parents=True, exist_ok=True)
        old = configparser.ConfigParser(interpolation=None)
        old.read(self.dir / "airflow.cfg")
        port = old.getint("api", "port", fallback=0)
        if not port or (process.running(self.run, "api-server") is None and not process.is_free(port)):
            port = free_port(set())
        bundle = {
            "name": "flywheel",
            "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
            "kwargs": {"path": str(dags_folder())},
        }
        fernet = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
        new = configparser.ConfigParser(interpolation=None)
        new.read_dict(
            {
                "core": {
                    "load_examples": "False",
                    "parallelism": "4",  # a turn that waits holds one: at most open, begin and meanwhile do
                    "dags_are_paused_at_creation": "False",
                    "fernet_key": old.get("core", "fernet_key", fallback=fernet),
                    "simple_auth_manager_users": ",".join(f"{u}:{role}" for u, role in USERS.items()),
                    "simple_auth_manager_passwords_file": str(self.dir / "passwords.json"),
                },
                "database": {"sql_alchemy_conn": f"sqlite:///{self.dir}/airflow.db"},
                "api": {
                    "host": "127.0.0.1",
                    "port": str(port),
                    "workers": "1",
                    "base_url": f"http://127.0.0.1:{port}",  # workers derive the execution API from it
                    "instance_name": "flywheel",
                    "secret_key": old.get("api", "secret_key", fallback=secrets.token_urlsafe(48)),
                },
                "api_auth": {
                    "jwt_secret": old.get("api_auth", "jwt_secret", fallback=secrets.token_urlsafe(64))
                },
                **PATIENCE,
                "dag_processor": {
                    "dag_bundle_config_list": json.dumps([bundle]),
                    "refresh_interval": "30",
                    # Half a second of a processor for each file. By default each is parsed every 30 s.
                    "min_file_process_interval": "120",
                },
                "logging": {"base_log_folder": str(self.logs / "airflow"), "colored_console_log": "False"},
            }
        )
        text = io.StringIO()
        new.write(text)
        write_private(self.dir / "airflow.cfg", text.getvalue())
        if not (self.dir / "passwords.json").exists():
            passwords = {user: secrets.token_urlsafe(12) for user in USERS}
            write_private(self.dir / "passwords.json", json.dumps(passwords))

    def _environ(self, env: Mapping[str, str]) -> dict[str, str]:
        """``env`` without settings of another Airflow, plus what finds this one and the project's code."""
        clean = {k: v for k, v in env.items() if not k.startswith(("AIRFLOW_", "AIRFLOW__", "_AIRFLOW"))}
        return {
            **clean,
            "AIRFLOW_HOME": str(self.dir),
            "PYTHONPATH": str(dags_folder().parent),  # the triggerer imports dags.*
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }


def dags_folder() -> Path:
    """Where the DAGs lie: in the checkout that this code belongs to, else where they were installed."""
    root = checkout(Path(__file__).resolve().parent)
    if root is not None:
        return root / "dags"
    spec = importlib.util.find_spec("dags")
    if spec is None or not spec.submodule_search_locations:
        raise ServiceError("the package 'dags' is not installed beside flywheel")
    return Path(next(iter(spec.submodule_search_locations)))


def child_environ(store: Mapping[str, str], home: Path) -> dict[str, str]:
    """Environment of processes that belong to the product: this one's, the store, this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {
        **os.environ,
        "PATH": path,
        "FLYWHEEL_HOME": str(home),
        # Servers other than AWS reject, or do not verify, the newer checksums.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DVC_NO_ANALYTICS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads made everything beside them 7 times slower
        **store,
    }
