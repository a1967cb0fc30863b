"""Is this machine, and what it is connected to, fit to run the wheel? One finding for each thing.

Nothing is changed but a probe object in the store, which is removed again.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flywheel.config import PARAMS_FILE, Deployment, Settings, checkout
from flywheel.errors import FlywheelError
from flywheel.keys import ROOT_FILE
from flywheel.release import Publisher
from flywheel.services.airflow import Airflow
from flywheel.services.keeper import Keeper
from flywheel.store import Store

LEAST_FREE, LITTLE_FREE = 1 << 30, 10 << 30  # bytes
SKEW_S = 2.0  # of this machine's clock against the store's, beyond the second that the store may round away
EXPIRES_SOON_S = 24 * 3600.0
RECENT_S = 24 * 3600.0
_CLAIM = "import json; from flywheel.edge.realtime import claim; print(json.dumps(claim(50, None).reasons))"


class Health(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"  # it runs, worse
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``what`` names the remedy where there is something to mend."""

    name: str
    health: Health
    what: str


Answer = tuple[Health, str]


def examine(deployment: Deployment) -> list[Finding]:
    """Look at everything. What cannot be looked at is a problem, never an error."""
    checks: dict[str, Callable[[Deployment], Answer | None]] = {
        "python": _python,
        "packages": _packages,
        "settings": _settings,
        "disk": _disk,
        "store": _store,
        "clock": _clock,
        "keys": _keys,
        "releases": _releases,
        "approvers": _approvers,
        "airflow": _airflow,
        "keeper": _keeper,
        "real time": _real_time,
    }
    return list(_findings(checks, deployment))


def _findings(
    checks: dict[str, Callable[[Deployment], Answer | None]], deployment: Deployment
) -> Iterator[Finding]:
    for name, check in checks.items():
        try:
            answer = check(deployment)
        except (FlywheelError, OSError) as e:
            answer = Health.PROBLEM, str(e)
        if answer is not None:
            yield Finding(name, *answer)


def _python(_: Deployment) -> Answer:
    return Health.OK, f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}"


def _packages(_: Deployment) -> Answer | None:
    root = checkout(Path.cwd())
    if root is None or not (root / "requirements.lock").is_file():
        return None
    pins = re.findall(
        r"^([A-Za-z0-9_.-]+)==([^\s;]+)", (root / "requirements.lock").read_text(), re.MULTILINE
    )
    other = [
        f"{name} {found or 'missing'}, not {pin}" for name, pin in pins if (found := _version(name)) != pin
    ]
    if other:
        some = "; ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        return Health.WARNING, f"{len(other)} of {len(pins)} are not what was tested: {some}; `make setup`"
    return Health.OK, f"all {len(pins)} as they were tested"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _settings(_: Deployment) -> Answer | None:
    root = checkout(Path.cwd())
    if root is None:
        return None
    Settings.load(root / PARAMS_FILE)
    return Health.OK, str(root / PARAMS_FILE)


def _disk(deployment: Deployment) -> Answer:
    where = next(p for p in (deployment.home, *deployment.home.parents) if p.exists())
    free = shutil.disk_usage(where).free
    text = f"{free / (1 << 30):.1f} GiB free at {where}"
    if free < LEAST_FREE:
        return Health.PROBLEM, f"{text}: nothing can be sealed or trained; make room"
    return (Health.WARNING, f"{text}: little") if free < LITTLE_FREE else (Health.OK, text)


def _store(deployment: Deployment) -> Answer:
    store = Store.from_env(deployment)
    store.probe()
    if not store.clears_unfinished():
        return Health.WARNING, (
            f"{store}: keeps the parts of uploads that are never finished, unlisted and paid for; give the "
            "bucket a lifecycle rule AbortIncompleteMultipartUpload"
        )
    return Health.OK, f"{store}: answers, and a key is created once"


def _clock(deployment: Deployment) -> Answer:
    store, key = Store.from_env(deployment), f"probe/{uuid.uuid4().hex}"
    before = time.time()
    store.put(key, b"1")
    after = time.time()
    info = store.stat(key)
    store.delete(key)
    if info is None:
        return Health.PROBLEM, "the store does not show an object that it took: it is not consistent"
    theirs = info.modified.timestamp()
    skew = max(theirs - after, before - theirs - 1.0, 0.0)  # a store may know whole seconds only
    if skew > SKEW_S:
        return (
            Health.PROBLEM,
            f"{skew:.0f} s off the store's clock: silence and expiry are judged by it; use NTP",
        )
    return Health.OK, "as the store's"


def _keys(deployment: Deployment) -> Answer:
    directory = deployment.home / "keys"
    if not (directory / ROOT_FILE).is_file():
        return Health.WARNING, f"{directory}: none here, so nothing can be signed; `flywheel keys init`"
    for path in (directory, *directory.glob("*.pem")):
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            return Health.PROBLEM, f"{path}: others may read it (mode {mode:o}); chmod go= {path}"
    return Health.OK, f"{len(list(directory.glob('*.pem')))} keys, readable by their owner alone"


def _publisher(deployment: Deployment) -> Publisher | None:
    directory = deployment.home / "keys"
    return Publisher(Store.from_env(deployment), directory) if (directory / ROOT_FILE).is_file() else None


def _releases(deployment: Deployment) -> Answer | None:
    if (publisher := _publisher(deployment)) is None:
        return None
    state = publisher.load()
    left = (state.timestamp.expires - datetime.now(UTC)).total_seconds()
    text = f"version {state.n}, verified; robots take it for {left / 3600:.0f} h more"
    if left < 0:
        return (
            Health.PROBLEM,
            f"version {state.n} has expired: robots keep what they run; `flywheel keys init`",
        )
    return (Health.WARNING if left < EXPIRES_SOON_S else Health.OK), text


def _approvers(deployment: Deployment) -> Answer | None:
    if (publisher := _publisher(deployment)) is None:
        return None
    trust = publisher.load().trust()
    without = sorted(set(deployment.approvers) - set(trust.names.values()))
    if without:
        return Health.PROBLEM, f"{without[0]} has no trusted key; `flywheel keys approver {without[0]}`"
    if len(deployment.approvers) < trust.approvals:
        return Health.PROBLEM, f"{trust.approvals} people must agree, FLYWHEEL_APPROVERS names fewer"
    return Health.OK, f"{', '.join(deployment.approvers)}; {trust.approvals} must agree"


def _airflow(deployment: Deployment) -> Answer | None:
    airflow = Airflow(deployment.home)
    if not (airflow.dir / "airflow.cfg").is_file():
        return None
    stopped = [name for name, runs in airflow.status().items() if not runs]
    if stopped:
        return Health.WARNING, f"{', '.join(stopped)} not running; `flywheel up`"
    sick = [part for part, well in airflow.health().items() if not well]
    if sick:
        return Health.PROBLEM, f"{', '.join(sick)} not healthy; logs are in {airflow.logs}"
    errors = airflow.call("GET", "/importErrors")["import_errors"]
    if errors:
        return (
            Health.PROBLEM,
            f"{errors[0]['filename']}: {str(errors[0]['stack_trace']).strip().splitlines()[-1]}",
        )
    return Health.OK, f"healthy at {airflow.url}"


def _keeper(deployment: Deployment) -> Answer | None:
    keeper = Keeper(deployment.home)
    if not (kept := keeper.kept()):
        return None
    if not keeper.runs():
        return Health.WARNING, f"nothing starts again what dies of {', '.join(sorted(kept))}; `flywheel up`"
    again = Counter(r.name for r in keeper.restarts(time.time() - RECENT_S))
    if again:
        died = ", ".join(f"{name} ({n} times)" for name, n in again.most_common())
        return (
            Health.WARNING,
            f"died within a day and started again: {died}; logs are in {deployment.home / 'logs'}",
        )
    return Health.OK, f"starts again what dies of {', '.join(sorted(kept))}"


def _real_time(_: Deployment) -> Answer:
    done = subprocess.run([sys.executable, "-c", _CLAIM], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return Health.PROBLEM, (done.stderr.strip().splitlines() or ["it ended"])[-1]
    reasons: list[str] = json.loads(done.stdout)
    if reasons:
        return Health.WARNING, "; ".join(reasons)
    return Health.OK, "SCHED_FIFO, locked memory and cores that stay awake are permitted"
