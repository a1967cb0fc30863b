"""A person at a browser: logs in to Airflow, sees a failure start a run, opens the evidence, approves, and sees
the fleet page change. Airflow, the object store, the wheel's DAG and the browser are real; the stages are tiny.

Screenshots stay in FLYWHEEL_SCREENSHOTS, or else in the test's own directory.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flywheel import approvals, services
from flywheel.config import Deployment
from flywheel.services.airflow import Airflow
from flywheel.store import Store
from tests.checkouts import fail_on_a_robot, make_checkout
from tests.fleets import ROBOTS, ReportingFleet

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 120_000
