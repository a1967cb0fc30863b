"""A person at a browser: logs in to Airflow, sees a failure start a run, opens the evidence, approves, and
sees the fleet page change. Airflow, the store, the DAG and the browser are real, the stages of the turn tiny.

Screenshots stay in the directory that SCREENSHOTS names, or else in the test's own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from flywheel import approvals, services
from flywheel.config import Deployment
from flywheel.page import Source
from flywheel.page.standalone import Door, guarded
from flywheel.rehearsal.bucket import BucketStore
from flywheel.schema import Mode, RobotReport
from flywheel.services.airflow import Airflow
from flywheel.store import Store
from tests.checkouts import fail_on_a_robot, make_checkout
from tests.fleets import ROBOTS, ReportingFleet

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
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
PATIENCE_MS = 180_000


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


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[str, BucketStore]]:
    """The page of a store in memory, served on loopback: the address that works once, and the store."""
    store = BucketStore()
    said: list[str] = []
    source = Source(lambda: store, tmp_path, ttl_s=0.1)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # from now on a browser may come, and waits until the server has started
        port = listening.getsockname()[1]
        config = uvicorn.Config(guarded(source, Door(said.append)), log_level="error", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{port}/enter?key={said[0]}", store
        server.should_exit = True
        thread.join()


def say(store: BucketStore, robot: str, **fields: Any) -> None:
    report = RobotReport(site="lab", robot=robot, t_unix_ns=1, loaded_digest="a" * 64, **fields)
    store.put_json(f"fleet/robots/{robot}.json", report)


def test_an_open_page_follows_the_store_and_leaves_the_reader_in_peace(
    chromium: Any, live: tuple[str, BucketStore], shots: Path
) -> None:
    """What was typed, focus, scroll and open details stay; what changed is changed, and said once."""
    address, store = live
    for i in range(80):
        say(store, f"r{i:02d}")
    store.put("fleet/robots/odd.json", b"not a report")
    page = chromium.new_context(viewport={"width": 900, "height": 500}).new_page()
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.goto(address)
    page.goto(page.url + "robots?size=100")
    page.get_by_text("reports were not understood").click()
    page.get_by_label("Search").fill("half a na")
    page.evaluate("window.scrollTo(0, 700)")
    row = page.get_by_role("row", name="r05")
    row.evaluate("row => { row.wasHere = true }")
    say(store, "r05", mode=Mode.STOP_1)
    store.delete("fleet/robots/r07.json")
    say(store, "r99")
    row.get_by_text("stop 1").wait_for()
    page.get_by_role("row", name="r99").wait_for(state="attached")
    assert page.get_by_role("row", name="r07").count() == 0
    assert row.evaluate("row => row.wasHere")
    assert page.get_by_label("Search").input_value() == "half a na"
    assert page.get_by_label("Search").evaluate("field => field === document.activeElement")
    assert page.evaluate("window.scrollY") == 700
    assert page.locator("details").first.evaluate("details => details.open")
    assert "of 80" in page.locator("#summary").inner_text()
    page.get_by_role("button", name="Pause").click()
    say(store, "r05", mode=Mode.FOLLOW)
    with store.server.down():
        page.get_by_role("button", name="Resume").click()
        page.get_by_text("The store does not answer").first.wait_for()
        assert row.is_visible()
        page.screenshot(path=shots / "store-down.png")
    page.get_by_text("The store does not answer").first.wait_for(state="detached")
    row.get_by_text("follow").wait_for()
    assert problems == []


def test_a_robot_with_markup_for_a_name_runs_nothing_in_a_browser(
    chromium: Any, live: tuple[str, BucketStore]
) -> None:
    address, store = live
    evil = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    say(store, evil, refused_digest=evil, refused_reason=evil, campaigns={evil: 1})
    page = chromium.new_context().new_page()
    dialogs: list[str] = []

    def dismiss(dialog: Any) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.goto(address)
    for path in ("./", "robots"):
        page.goto(f"{page.url.rpartition('/')[0]}/{path}")
        page.get_by_text(evil[:20]).first.wait_for()
    page.get_by_role("link", name=evil[:20]).first.click()
    page.get_by_role("heading", name=evil[:20]).wait_for()
    page.locator("body[data-looks]").wait_for()  # what an open page takes in later is text, too
    assert page.locator("img[src=x]").count() == 0
    assert dialogs == []


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_its_window_and_can_be_used_by_keyboard(
    chromium: Any, live: tuple[str, BucketStore], width: int
) -> None:
    address, store = live
    say(store, "r" + "0" * 150, refused_digest="b" * 64, refused_reason="x" * 900)
    page = chromium.new_context(viewport={"width": width, "height": 800}).new_page()
    page.goto(address)
    base = page.url
    for path in ("", "robots", "rollouts", "failures", "turns", f"robot?name=r{'0' * 150}", "nothing-there"):
        page.goto(base + path)
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wider) <= 0, path
    page.goto(f"{base}robots")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.nodeName"))
        if page.evaluate("document.activeElement.nodeName") != "BODY":
            assert page.evaluate(outline) != "none", page.evaluate("document.activeElement.outerHTML")
    assert {"A", "INPUT", "SELECT", "BUTTON"} <= seen


def wait_for[T](look: Callable[[], T | None], what: str, timeout_s: float = 120.0) -> T:
    end = time.monotonic() + timeout_s
    while True:
        if (found := look()) is not None:
            return found
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.5)


@pytest.mark.soak
@pytest.mark.timeout(1200)  # two services start, and a run of 14 tasks
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
            own = (airflow.url, f"blob:{airflow.url}/")  # a blob is what the page itself made
            page.on("request", lambda r: outside.append(r.url) if not r.url.startswith(own) else None)

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
            shown.locator("a.card img").first.evaluate("image => image.decode()")
            page.screenshot(path=shots / "2-failures.png")
            run = wait_for(lambda: next(iter(approvals.runs(airflow, approvals.COLLECT, 1)), None), "a run")
            assert run.kind == "asset_triggered"
            page.goto(f"{airflow.url}/dags/{run.dag}/runs/{run.run_id}")
            page.get_by_text("collect").first.wait_for()
            page.screenshot(path=shots / "3-run.png")
            page.goto("about:blank")  # an open page asks every few seconds, and the run needs the processor
            question = wait_for(lambda: next(iter(approvals.pending(airflow)), None), "a question", 900)

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

            # Approve, as the person that was asked, and say why.
            time.sleep(approvals.SETTLE_S)  # an answer within 5 s of the question can fail its task
            page.goto(question.page(airflow.url))
            page.get_by_text("success against today's").first.wait_for()
            page.screenshot(path=shots / "7-question.png")
            page.locator("#element_reason").fill("better on every check that was shown")
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


def test_airflow_finds_the_page_and_each_of_its_routes_asks_who_is_logged_in() -> None:
    """Loading it costs every process of Airflow next to nothing, and the guard is Airflow's own."""
    code = """
        import json, sys
        from importlib.metadata import entry_points
        (found,) = entry_points(group="airflow.plugins", name="flywheel_fleet_page")
        import airflow.plugins_manager
        before = set(sys.modules)
        plugin = found.load()
        loaded = sorted(m for m in set(sys.modules) - before if m.startswith(("flywheel", "fastapi", "boto")))
        from airflow.api_fastapi.core_api.security import get_user
        from dags.fleet_page import make
        routes = make().routes
        open_ = [r.path for r in routes if get_user not in [d.call for d in r.dependant.dependencies]]
        apps = [a["url_prefix"] for a in plugin.fastapi_apps]
        print(json.dumps({"loaded": loaded, "open": open_, "routes": len(routes), "apps": apps,
                          "views": plugin.external_views}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[-2000:]}\nis the entry point installed? run `make setup`"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] == []
    assert found["open"] == []
    assert found["routes"] >= 12
    assert found["apps"] == ["/fleet"]
    assert found["views"][0]["href"] == "/fleet/"
