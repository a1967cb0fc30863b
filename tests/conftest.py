"""What every test gets: an environment that cannot reach a real store, hub or Airflow by accident."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from flywheel.rehearsal.site import Site

# At import, before any library reads its environment; inherited by every process that a test starts.
for _name in [n for n in os.environ if n.startswith(("AWS_", "FLYWHEEL_", "AIRFLOW_", "DVC_"))]:
    del os.environ[_name]

_state = tempfile.TemporaryDirectory(prefix="flywheel-tests-")  # removed when the run ends

os.environ.update(
    {
        "FLYWHEEL_HOME": f"{_state.name}/flywheel",
        "AIRFLOW_HOME": f"{_state.name}/airflow",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AWS_EC2_METADATA_DISABLED": "true",  # boto3 would ask the network for keys
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
)

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine stalls for longer than any deadline that would mean something; the suite has its own bound.
hypothesis.settings.register_profile(
    "flywheel", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("flywheel")


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which processes die, but no machine does: no need to wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda fd: None)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A plant with a publisher, robots and two bundles; made once, since its keys take a second."""
    from flywheel.rehearsal.site import Site

    return Site.make(tmp_path_factory.mktemp("template") / "site")


@pytest.fixture
def site(template: Site, tmp_path: Path) -> Site:
    """A copy of the template that a test may spoil."""
    return template.copy(tmp_path / "site")
