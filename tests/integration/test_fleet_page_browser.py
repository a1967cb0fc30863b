"""A person at a browser: logs in to Airflow, sees a failure start a run, opens the evidence, approves, and
sees the fleet page change. Airflow, the store, the DAG and the browser are real, the stages of the turn tiny.

Screenshots stay in the directory that SCREENSHOTS names, or else in the test's own.
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


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go."""
    kept = Path(os.environ.get("SCREENSHOTS") or tmp_path / "screenshots")
    kept.mkdir(parents=True, exist_ok=True)
    return kept


@pytest.fixture
def chromium() -> Iterator[Any]:
    """The system's Chromium, headless; skipped with the reason where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'dev')")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def wait_for[T](look: Callable[[], T | None], what: str, timeout_s: float = 120.0) -> T:
    end = time.monotonic() + timeout_s
    while True:
        if (found := look()) is not None:
            return found
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.5)


@pytest.mark.timeout(600)  # two services start, and a run of 14 tasks
def test_a_person_sees_a_failure_start_a_run_opens_the_evidence_and_approves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chromium: Any, shots: Path
) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    home = tmp_path / "home"
    monkeypatch.setenv("FLYWHEEL_CHECKOUT", str(checkout))
    monkeypatch.setenv("TEST_LOG", str(tmp_path / "stages.log"))
    with services.session(home) as running:
        store = Store.from_env(Deployment.from_env({"FLYWHEEL_HOME": str(home)}))
        airflow = Airflow(home)
        with ReportingFleet(store, home / "keys", checkout / "models/base/bundle") as fleet:
            before = fleet.base[:12]
            page = chromium.new_context(viewport={"width": 1440, "height": 900}).new_page()
            page.set_default_timeout(PATIENCE_MS)
            outside: list[str] = []
            page.on("request", lambda r: outside.append(r.url) if not r.url.startswith(airflow.url) else None)

            # Nobody looks without a login, and whoever logs in finds the page in Airflow's own navigation.
            assert page.request.get(f"{airflow.url}/fleet/").status == 401
            page.goto(airflow.url)
            page.get_by_label("Username").fill("ops")
            page.get_by_label("Password", exact=True).fill(airflow.passwords()["ops"])
            page.get_by_role("button", name="Sign in").click()
            page.get_by_role("link", name="Fleet").click()
            shown = page.frame_locator("iframe[title='Fleet']")
            shown.get_by_role("heading", name="Overview").wait_for()
            shown.get_by_role("link", name="Robots", exact=True).first.click()
            row = shown.get_by_role("row", name="r1")
            row.get_by_text(before).wait_for()
            page.screenshot(path=shots / "1-robots.png")

            # Failures arrive, are seen, and start a run.
            shown.get_by_role("link", name="Failures", exact=True).click()
            shown.get_by_text("No failure was recorded yet.").wait_for()
            fail_on_a_robot(store, tmp_path, 1, 2)
            shown.get_by_role("link", name="task timeout").first.wait_for()  # by itself: the page is live
            page.screenshot(path=shots / "2-failures.png")
            run = wait_for(lambda: next(iter(approvals.runs(airflow, 1)), None), "a run")
            assert run.kind == "asset_triggered"
            page.goto(f"{airflow.url}/dags/wheel/runs/{run.run_id}")
            page.get_by_text("collect").first.wait_for()
            page.screenshot(path=shots / "3-run.png")
            question = wait_for(lambda: next(iter(approvals.pending(airflow)), None), "a question", 240)

            # The evidence: one of the failures, and the rollout that waits.
            page.goto(f"{airflow.url}/plugin/fleet")
            shown.get_by_text("Waits for a person").wait_for()
            page.screenshot(path=shots / "4-waits.png")
            shown.get_by_role("link", name="task timeout pick the red box").first.click()
            shown.get_by_role("heading", name="Timeline").wait_for()
            page.screenshot(path=shots / "5-episode.png")
            shown.get_by_role("link", name="Rollouts", exact=True).click()
            shown.get_by_role("row", name="approval").get_by_role("link").first.click()
            shown.get_by_text("success against today's").first.wait_for()
            page.screenshot(path=shots / "6-evidence.png", full_page=True)

            # Approve, as the person that was asked.
            time.sleep(approvals.SETTLE_S)  # an answer within 5 s of the question can fail its task
            page.goto(question.page(airflow.url))
            page.get_by_text("success against today's").first.wait_for()
            page.screenshot(path=shots / "7-question.png")
            page.get_by_role("button", name="Promote").click()
            page.screenshot(path=shots / "8-answered.png")

            # The fleet page changes by itself: every robot runs the new policy.
            page.goto(f"{airflow.url}/plugin/fleet")
            shown.get_by_role("link", name="Rollouts", exact=True).click()
            shown.get_by_role("row", name="done").wait_for()
            page.screenshot(path=shots / "9-done.png")
            shown.get_by_role("link", name="Robots", exact=True).click()
            after = wait_for(
                lambda: next((d for d in fleet.loaded.values() if d != fleet.base), None), "a policy"
            )
            for robot in ROBOTS:
                shown.get_by_role("row", name=robot).get_by_text(after[:12]).wait_for()
            page.screenshot(path=shots / "10-robots.png")
            assert outside == [], "the page asked somebody outside"
        assert running.airflow_url == airflow.url
