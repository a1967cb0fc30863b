"""The fleet page: nobody looks without a login, nothing that a robot says is markup, and it stays up."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import httpx
import pytest
from fastapi import HTTPException
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st

from flywheel.claims import claim
from flywheel.errors import StoreUnavailable
from flywheel.page import Source, build, failures, shown
from flywheel.page.kept import Kept, Shelf
from flywheel.page.paging import part
from flywheel.page.standalone import COOKIE, Door, guarded
from flywheel.rehearsal.bucket import Bucket, BucketStore
from flywheel.rehearsal.rollouts import RolloutSite
from flywheel.schema import (
    MANIFEST_FILE,
    Check,
    GateReport,
    Mode,
    RolloutStage,
    Verdict,
    sha256_bytes,
)
from flywheel.store import Store
from flywheel.turn import TurnRecord, TurnResult
from tests.checkouts import fail_on_a_robot
from tests.samples import jpeg, sealed

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'"
PAGES = ("/", "/robots", "/rollouts", "/failures", "/turns")
TURN = "turn-20260102-030405-abcdef"


def nobody() -> None:
    raise HTTPException(401, "who are you?")


def anybody() -> None:
    pass


pytestmark = pytest.mark.usefixtures("quick_disk")


class Client:
    """A browser without a network: keeps cookies, follows redirects."""

    def __init__(self, app: Any, base_url: str = "http://page") -> None:
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url=base_url, follow_redirects=True
        )

    def get(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._client.get(path, **options))


def source_of(store: Store, keys: Path | None = None, **options: Any) -> Source:
    """Reads anew at each look, and waits for it."""
    return Source(lambda: store, keys, **{"ttl_s": 0.0, "patience_s": 60.0, **options})


def client_of(store: Store, keys: Path | None = None, **options: Any) -> Client:
    return Client(build(source_of(store, keys, **options), anybody))


def put_report(store: Store, robot: str, **fields: Any) -> None:
    doc = {"site": "lab", "robot": robot, "t_unix_ns": 1, "loaded_digest": "a" * 64, **fields}
    store.put(f"fleet/robots/{robot}.json", json.dumps({"schema_version": 1, **doc}).encode())


def place(store: Store) -> str:
    """Where the store's first episode lies."""
    key = next(i.key for i in store.list("episodes/") if i.key.endswith(MANIFEST_FILE))
    return key.removesuffix(MANIFEST_FILE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> RolloutSite:
    """A rollout that waits for a person."""
    site = RolloutSite(tmp_path_factory.mktemp("site"))
    site.to_approval()
    return site


class Markup(HTMLParser):
    """What a browser would see: elements, attributes, and scripts that are not the page's own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def check(self) -> None:
        """No script or style but the page's own files; no handler; nothing from elsewhere."""
        for tag, attributes in self.tags:
            handlers = [a for a in attributes if a.startswith("on") or a == "style"]
            assert not handlers, (tag, attributes)
            for name in ("src", "href", "action"):
                where = urlsplit(attributes.get(name) or "")
                assert not where.scheme, (tag, attributes)
                assert not where.netloc, (tag, attributes)
            if tag in ("script", "link", "img"):
                path = attributes.get("src") or attributes.get("href") or ""
                assert re.match(r"(static/|thumbnail\?|picture\?)", path), (tag, attributes)
            assert tag not in ("style", "iframe", "object", "embed", "base"), tag


# ── who may look ────────────────────────────────────────────────────────────────────────────────────


def test_no_route_answers_anybody_who_is_not_logged_in() -> None:
    app = build(source_of(BucketStore()), nobody)
    client = Client(app)
    paths = []
    for route in app.routes:
        assert isinstance(route, APIRoute), f"{route}: is no route that dependencies reach"
        assert any(d.call is nobody for d in route.dependant.dependencies), route.path
        assert route.methods == {"GET"}
        paths.append(route.path.replace("{name}", "page.css"))
    assert set(PAGES) < set(paths)
    for path in paths:
        answer = client.get(path, params={"at": "x", "name": "x", "id": "x", "camera": "x", "row": 0})
        assert (answer.status_code, answer.text) == (401, "who are you?\n"), path
    for path in ("/docs", "/redoc", "/openapi.json", "/static/../app.py", "/nothing"):
        assert client.get(path).status_code in (401, 404), path


def test_address_works_once_and_in_one_browser() -> None:
    said: list[str] = []
    door = Door(said.append)
    app = guarded(source_of(BucketStore()), door)
    one, two = (Client(app, base_url="http://127.0.0.1:9") for _ in range(2))
    assert one.get("/").status_code == 401
    assert one.get("/enter", params={"key": "guess"}).status_code == 401
    entered = one.get("/enter", params={"key": said[0]}, follow_redirects=False)
    assert entered.status_code == 303
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert one.get("/").status_code == 200
    assert two.get("/enter", params={"key": said[0]}, follow_redirects=False).status_code == 401
    assert two.get("/", headers={"cookie": f"{COOKIE}={said[0]}"}).status_code == 401
    assert len(said) == 2
    assert two.get("/enter", params={"key": said[1]}).status_code == 200


def test_page_of_another_host_name_is_refused() -> None:
    said: list[str] = []
    app = guarded(source_of(BucketStore()), Door(said.append))
    client = Client(app, base_url="http://rebound.example:9")
    assert client.get("/enter", params={"key": said[0]}).status_code == 400


def test_every_answer_forbids_inline_scripts_and_other_origins(site: RolloutSite) -> None:
    client = client_of(site.store, site.root / "keys")
    for path in (*PAGES, "/static/page.js", "/nothing", "/robot?name=nobody", "/robots?page=0"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff", path


# ── hostile input ───────────────────────────────────────────────────────────────────────────────────


def test_markup_in_every_field_that_others_write_is_shown_as_text(tmp_path: Path) -> None:
    site = RolloutSite(tmp_path / "site")
    site.start()
    store = site.store
    put_report(
        store, EVIL, site=EVIL, loaded_digest=EVIL, previous_digest=EVIL, rollout_id=EVIL,
        refused_digest=EVIL, refused_reason=EVIL, campaigns={EVIL: 3}, confirmed=False,
    )  # fmt: skip
    store.put("fleet/robots/strange.json", EVIL.encode())
    (evil,) = fail_on_a_robot(store, tmp_path, 1)
    key = next(i.key for i in store.list("episodes/") if i.key.endswith(MANIFEST_FILE))
    manifest = json.loads(store.get(key)) | {"task": EVIL, "shift": EVIL}
    store.put(key, json.dumps(manifest).encode())
    marker = json.dumps({"episode_id": EVIL, "prefix": EVIL}).encode()
    store.put("inbox/00000000000000000009-01a205c0-1f7e-7493-997c-12bf08b6e4cf.json", marker)
    report = GateReport(
        candidate_digest="c" * 64,
        current_digest="d" * 64,
        checks=(
            Check(name=f"success in {EVIL}", verdict=Verdict.HOLD, value=1.0, low=0.0, high=2.0, bar=EVIL,
                  evidence={"reason": EVIL, "current": {"success": {"mean": 0.1, "n": EVIL}},
                            "candidate": {"success": EVIL}, "threshold": EVIL, "scale": EVIL}),
        ),
        verdict=Verdict.HOLD,
        reasons=(EVIL,),
    )  # fmt: skip
    gate = sha256_bytes(report.to_bytes())
    store.put(f"gates/{gate}.json", report.to_bytes())
    record = TurnRecord(
        turn=TURN, opened_unix_ns=1, commit=EVIL, policy=EVIL, current_digest=EVIL,
        adjusted={EVIL: EVIL}, episodes=1,
    )  # fmt: skip
    result = TurnResult(
        turn=TURN, ok=True, stages=(EVIL,), commit=EVIL, experiment=EVIL, dataset=EVIL,
        candidate_digest=EVIL, gate_digest=gate, verdict=Verdict.HOLD, reasons=(EVIL,),
    )  # fmt: skip
    store.put_json(f"runs/{TURN}/turn.json", record)
    store.put_json(f"runs/{TURN}/result.json", result)
    client = client_of(store, site.root / "keys")
    at = key.removesuffix(MANIFEST_FILE)
    paths = [
        *PAGES,
        f"/robot?name={quote(EVIL)}",
        f"/robots?q={quote(EVIL)}&site={quote(EVIL)}&policy={quote(EVIL)}",
        f"/failures?q={quote(EVIL)}&turn={quote(EVIL)}&robot={quote(EVIL)}&mode={quote(EVIL)}",
        f"/turn?name={TURN}",
        f"/turn?name={quote(EVIL)}",
        f"/rollout?id={site.id}",
        f"/rollout?id={quote(EVIL)}",
        f"/failure?at={quote(EVIL)}",
        f"/failure?at={quote(at)}",
        f"/robots?mode={quote(EVIL)}",
        f"/robots?page={quote(EVIL)}",
        f"/thumbnail?at={quote(EVIL)}",
    ]
    seen = ""
    for path in paths:
        answer = client.get(path)
        assert answer.status_code < 500 or answer.status_code == 502, (path, answer.text)
        assert "<script>alert" not in answer.text, path
        Markup(answer.text).check()
        seen += answer.text
    assert seen.count("&lt;script&gt;alert(1)") > 15
    assert evil in seen


def test_numbers_beyond_all_bounds_do_not_break_the_page(site: RolloutSite, tmp_path: Path) -> None:
    store = BucketStore()
    big = 10**320
    put_report(store, "big", t_unix_ns=big, episodes=big, successes=big, spool_pending=-big, late_p99_ns=big,
               misses_ppm=1e308, campaigns={"x": big})  # fmt: skip
    put_report(store, "odd", episodes=-5, successes=9, misses_ppm=-0.0, late_p99_ns=-7)
    record = TurnRecord(turn=TURN, opened_unix_ns=big, commit="", current_digest="", episodes=big)
    store.put_json(f"runs/{TURN}/turn.json", record)
    store.put(f"runs/{TURN}/workspace/data/metrics/train.json", b'{"steps": 1e999, "loss": "no"}')
    client = client_of(store)
    for path in (*PAGES, "/robot?name=big", "/robot?name=odd", f"/turn?name={TURN}"):
        assert client.get(path).status_code == 200, path
    for key in ("success", "late", "misses", "waiting", "heard"):
        assert client.get(f"/robots?sort={key}&down=true").status_code == 200, key


@given(st.floats() | st.integers(-(10**400), 10**400) | st.none())
def test_any_number_can_be_written(x: float | None) -> None:
    for text in (shown.number(x), shown.count(x)):
        assert 0 < len(text) < 30


@given(st.floats(), st.floats())
def test_any_time_can_be_written(then: float, now: float) -> None:
    assert shown.ago(then, now)
    assert shown.exact(then)
    shown.iso(then)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("page=0", "page = '0'"),
        ("page=-1", "page = '-1'"),
        ("page=10001", "page = '10001'"),
        ("page=many", "page = 'many'"),
        ("size=51", "size = 51"),
        ("size=1000000", "size = 1000000"),
        ("sort=__class__", "sort = '__class__'"),
        ("mode=asleep", "mode = 'asleep'"),
        ("state=happy", "state = 'happy'"),
        (f"q={'x' * 201}", "q = 'xxx"),
    ],
)
def test_a_request_out_of_bounds_is_told_which_field_is_wrong(query: str, named: str) -> None:
    answer = client_of(BucketStore()).get(f"/robots?{query}")
    assert answer.status_code == 400
    assert named in answer.text.replace("&#39;", "'")


@pytest.mark.parametrize(
    "at", ["../../keys/", "episodes/", "episodes/site=a/robot=b/date=2026-01-01/../../x/"]
)
def test_only_places_of_episodes_are_read(at: str) -> None:
    store = BucketStore()
    client = client_of(store)
    for path in ("/failure", "/thumbnail", "/plot"):
        assert client.get(path, params={"at": at}).status_code == 400
    assert store.server.requests == 0


# ── thousands of robots ─────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(), max_size=300), st.integers(-5, 400), st.integers(1, 60))
def test_pages_cover_the_list_once(items: list[int], number: int, size: int) -> None:
    pages = part(items, 1, size).pages
    assert [x for n in range(1, pages + 1) for x in part(items, n, size).items] == items
    some = part(items, number, size)
    assert 1 <= some.number <= pages
    assert len(some.items) <= size


def test_a_large_fleet_is_read_once_and_shown_by_pages() -> None:
    store = BucketStore()
    for i in range(3000):
        put_report(store, f"r{i:04d}", site=f"s{i % 7}", mode=int(Mode.STOP_1 if i == 1234 else Mode.FOLLOW))
    client = client_of(store)
    first = client.get("/robots?page=2&size=200")
    assert first.text.count('<tr data-key="r0') == 200
    assert "Robots 201 to 400 of 3\u202f000" in first.text
    before = store.server.requests
    again = client.get("/robots?size=25&sort=mode&down=true")
    # Reports that the store received in the last seconds are read again: it may have only whole seconds.
    assert store.server.requests - before < 3100
    assert again.text.index("r1234") < again.text.index("r2999")
    found = client.get("/robots?q=R1234").text
    assert "Robots 1 to 1 of 1" in found
    assert "stop 1" in found
    assert len(again.content) < 120_000


def test_what_was_read_and_settled_is_not_read_again(site: RolloutSite) -> None:
    store = BucketStore(site.store.server)
    client = client_of(store, site.root / "keys")
    site.clock.advance(3600)
    put_report(store, "new")  # so that the others' reports have settled
    client.get("/robots")
    reads: list[str] = []
    store.server.before = lambda verb, key: reads.append(key) if verb == "GET" else None
    try:
        client.get("/robots")
    finally:
        store.server.before = lambda verb, key: None
        store.delete("fleet/robots/new.json")
    robots = [k for k in reads if k.startswith("fleet/robots/")]
    assert robots == ["fleet/robots/new.json"]
    assert not [k for k in reads if k.startswith("rollouts/") and "/evidence/" not in k]


# ── a store that is down ────────────────────────────────────────────────────────────────────────────


def test_a_store_that_is_down_is_said_so_and_what_was_read_is_still_shown() -> None:
    store = BucketStore()
    put_report(store, "r1")
    source = source_of(store)
    client = Client(build(source, anybody))
    with store.server.down():
        for path in PAGES:
            answer = client.get(path)
            assert answer.status_code == 503, path
            assert answer.text.count("The store does not answer") == 1
            assert "Traceback" not in answer.text
    for kept in (source.fleet, source.rollouts, source.failures, source.turns):
        kept._next = 0.0  # it backs off; do not wait for that
    assert "r1" in client.get("/robots").text
    with store.server.down():
        answer = client.get("/robots")
        assert answer.status_code == 200
        assert "The store does not answer" in answer.text
        assert "r1" in answer.text
        at = "episodes/site=a/robot=b/date=2026-01-01/01a205c0-1f7e-7493-997c-12bf08b6e4cf/"
        assert client.get("/thumbnail", params={"at": at}).status_code == 503


def test_no_secret_of_the_store_is_on_the_page(free_endpoint_url: str) -> None:
    store = Store(
        "s3://bucket",
        free_endpoint_url,
        access_key="AKIAVISIBLE",
        secret_key="hush" * 10,
        timeout_s=1.0,
        attempts=1,
    )
    text = client_of(store).get("/").text
    assert "The store does not answer" in text
    assert "hush" not in text
    assert "AKIAVISIBLE" not in text


@pytest.fixture
def free_endpoint_url() -> str:
    from flywheel.services.process import free_port

    return f"http://127.0.0.1:{free_port(set())}"


def test_a_slow_store_does_not_hold_requests_up() -> None:
    release, calls = threading.Event(), []

    def read() -> int:
        calls.append(1)
        if len(calls) > 1:
            assert release.wait(60)
        return len(calls)

    now = [0.0]
    kept = Kept(read, 2.0, patience_s=0.0, first_s=60.0, clock=lambda: now[0], unix=lambda: now[0])
    assert kept.look().value == 1
    now[0] = 3.0
    assert [kept.look().value for _ in range(5)] == [1] * 5
    assert len(calls) == 2  # one reader, however many ask
    release.set()
    waited = Kept(lambda: 7, patience_s=60.0)
    assert waited.look().value == 7


def test_a_reader_that_fails_backs_off_and_keeps_what_there_was() -> None:
    now, calls = [0.0], []

    def read() -> str:
        calls.append(now[0])
        if len(calls) > 1:
            raise StoreUnavailable("no answer")
        return "old"

    kept = Kept(read, 1.0, patience_s=60.0, clock=lambda: now[0], unix=lambda: 5.0)
    kept.look()
    for second in range(1, 41):
        now[0] = float(second)
        seen = kept.look()
    assert (seen.value, seen.problem, seen.down, seen.at_unix_s) == ("old", "no answer", True, 5.0)
    assert calls[1:] == [1.0, 3.0, 7.0, 15.0, 31.0]


def test_a_bug_in_a_reader_is_a_notice_without_its_text() -> None:
    def read() -> str:
        raise ZeroDivisionError("secret detail")

    seen = Kept(read).look()
    assert (seen.value, seen.down) == (None, False)
    assert "secret" not in seen.problem


def test_a_shelf_holds_no_more_than_its_size() -> None:
    shelf: Shelf[int, int] = Shelf(3)
    made: list[int] = []

    def make(i: int) -> Callable[[], int]:
        def one() -> int:
            made.append(i)
            return i

        return one

    for i in (1, 2, 3, 1, 4, 1, 2):
        assert shelf.get(i, make(i)) == i
    assert made == [1, 2, 3, 4, 2]


# ── what it shows ───────────────────────────────────────────────────────────────────────────────────


def test_a_rollout_shows_its_stage_its_verdict_and_the_evidence(site: RolloutSite) -> None:
    text = client_of(site.store, site.root / "keys").get(f"/rollout?id={site.id}").text
    assert "Waits for a person" in text
    assert "success against today" in text
    assert "signed" in text
    assert 'aria-current="step"' in text
    overview = client_of(site.store, site.root / "keys").get("/").text
    assert site.id in overview
    assert "Rollout under way" in overview


def test_a_decision_that_somebody_wrote_into_the_log_is_not_taken_for_one(tmp_path: Path) -> None:
    site = RolloutSite(tmp_path)
    state = site.start()
    forged = state.model_copy(update={"n": 2, "stage": RolloutStage.DONE, "reason": "all is well"})
    site.store.server.overwrite(f"rollouts/{site.id}/00000002.json", forged.to_bytes())
    client = client_of(site.store, site.root / "keys")
    assert "log does not verify" in client.get("/rollouts").text
    chained = forged.model_copy(update={"prior_sha256": sha256_bytes(state.to_bytes())})
    site.store.server.overwrite(f"rollouts/{site.id}/00000002.json", chained.to_bytes())
    text = client_of(site.store, site.root / "keys").get("/rollouts").text
    assert "not signed by today" in text
    unkeyed = client_of(site.store, None).get("/rollouts").text
    assert "not checked here" in unkeyed


def test_failures_that_wait_and_failures_of_turns_are_each_read_once(tmp_path: Path) -> None:
    store = BucketStore()
    fail_on_a_robot(store, tmp_path / "a", 1, 2)
    claim(store, TURN, limit=2)
    waiting = fail_on_a_robot(store, tmp_path / "b", 3)
    index = failures.Index()
    log = index.read(store)
    assert (log.waiting, log.unread, len(log.all)) == (1, 0, 3)
    assert {f.turn for f in log.all} == {"", TURN}
    assert [f.episode_id for f in failures.select(log.all, turn="waiting")] == waiting
    (cluster,) = failures.clusters(log.all)
    assert (cluster.mode, cluster.waiting, cluster.taken) == ("task_timeout", 1, 2)
    reads: list[str] = []
    store.server.before = lambda verb, key: reads.append(key) if verb == "GET" else None
    index.read(store)
    assert [k for k in reads if "episodes/" in k or "inbox/" in k or "CLAIMS" in k] == []


def test_an_episode_is_drawn_with_its_pictures(tmp_path: Path) -> None:
    store = BucketStore()
    fail_on_a_robot(store, tmp_path, 1)
    at = place(store)
    client = client_of(store)
    text = client.get("/failure", params={"at": at}).text
    assert "tracking error, worst joint" in text
    assert "task timeout" in text
    pictures = [a["src"] or "" for tag, a in Markup(text).tags if tag == "img"]
    assert pictures
    for src in (*pictures, f"thumbnail?at={quote(at)}"):
        answer = client.get(f"/{src}")
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.content.startswith(b"\xff\xd8\xff")
    plot = client.get("/plot", params={"at": at})
    assert plot.headers["content-type"] == "image/svg+xml"
    assert "tracking error" in "".join(ElementTree.fromstring(plot.content).itertext())
    assert client.get("/picture", params={"at": at, "camera": "none", "row": 0}).status_code == 404
    assert client.get("/picture", params={"at": at, "camera": "scene", "row": 10**8}).status_code == 404


@pytest.mark.parametrize("file", ["frames.parquet", "control.parquet", "events.parquet", MANIFEST_FILE])
def test_an_episode_that_was_changed_is_refused_with_the_reason(tmp_path: Path, file: str) -> None:
    store = BucketStore()
    fail_on_a_robot(store, tmp_path, 1)
    at = place(store)
    data = bytearray(store.server.data(at + file))
    data[len(data) // 2] ^= 1
    store.server.overwrite(at + file, bytes(data))
    answer = client_of(store).get("/failure", params={"at": at})
    assert answer.status_code in (404, 502)
    assert "Traceback" not in answer.text
    assert "<h1>" in answer.text


def test_a_picture_that_is_no_picture_is_not_given_to_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.samples.jpeg", lambda *a, **k: b"<svg onload=alert(1)>")
    monkeypatch.setattr("flywheel.episode.sealing.bad_images", lambda *a: iter(()))  # an attacker's writer
    directory = sealed(tmp_path, seconds=0.1, seed=1)
    monkeypatch.undo()
    store = BucketStore()
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    at = f"episodes/site={manifest['site']}/robot={manifest['robot']}/date=2025-10-09/{directory.name}/"
    for f in directory.iterdir():
        store.put(at + f.name, f.read_bytes())
    client = client_of(store)
    paths = (f"/thumbnail?at={quote(at)}", f"/plot?at={quote(at)}")
    for path in (*paths, f"/picture?at={quote(at)}&camera=scene&row=0"):
        answer = client.get(path)
        assert answer.status_code >= 400
        assert b"<svg onload" not in answer.content
    assert jpeg()[:3] == b"\xff\xd8\xff"


def test_turns_show_success_by_shift_before_and_after() -> None:
    store = BucketStore()
    sides = {
        who: {"success": {"mean": mean, "low": mean / 2, "high": 1.0, "n": 60}, "failures": {}}
        for who, mean in (("current", 0.1), ("candidate", 0.9))
    }
    check = Check(
        name="success in factory", verdict=Verdict.PROMOTE, value=0.8, bar="> 0", n=60, evidence=sides
    )
    gate = GateReport(
        candidate_digest="c" * 64,
        current_digest="d" * 64,
        checks=(check,),
        verdict=Verdict.PROMOTE,
        reasons=(),
    )
    digest = sha256_bytes(gate.to_bytes())
    store.put(f"gates/{digest}.json", gate.to_bytes())
    store.put_json(
        f"runs/{TURN}/turn.json",
        TurnRecord(turn=TURN, opened_unix_ns=1, commit="1" * 40, current_digest="d" * 64, episodes=7),
    )
    client = client_of(store)
    assert "under way" in client.get("/turns").text
    result = TurnResult(
        turn=TURN, ok=True, stages=("gate",), commit="1" * 40, candidate_digest="c" * 64, gate_digest=digest,
        verdict=Verdict.PROMOTE,
    )  # fmt: skip
    store.put_json(f"runs/{TURN}/result.json", result)
    for path in ("/turns", f"/turn?name={TURN}", "/"):
        text = client.get(path).text
        assert "10 %" in text, path
        assert "90 %" in text, path


def test_pages_have_landmarks_headings_captions_and_scopes(site: RolloutSite) -> None:
    client = client_of(site.store, site.root / "keys")
    for path in (*PAGES, f"/rollout?id={site.id}", "/robot?name=r1"):
        tags = Markup(client.get(path).text).tags
        names = [t for t, _ in tags]
        assert [names.count(t) for t in ("main", "h1", "header", "footer")] == [1, 1, 1, 1], path
        assert names.count("table") == names.count("caption"), path
        assert all(a.get("scope") in ("col", "row") for t, a in tags if t == "th"), path
        assert any(a.get("aria-live") == "polite" for _, a in tags), path
        assert all("alt" in a for t, a in tags if t == "img"), path
        levels = [int(n[1]) for n in names if re.fullmatch(r"h[1-6]", n)]
        assert all(b - a <= 1 for a, b in pairwise(levels)), (path, levels)


def test_folders_are_those_that_have_something_below_them() -> None:
    for store in _stores():
        for key in ("a/x/1", "a/y/2/3", "a/z", "b/q/1", "a/x0/1"):
            store.put(key, b"")
        assert list(store.folders("a/")) == ["x", "x0", "y"]
        assert list(store.folders("none/")) == []


def _stores() -> Iterator[Store]:
    from flywheel.rehearsal.bucket import LargeBucket

    yield BucketStore(Bucket())
    yield BucketStore(LargeBucket())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme: str) -> None:
    """WCAG 2.2, 1.4.3 (AA): 4.5 to 1, by the formula of relative luminance there."""
    css = (Path(shown.__file__).parent / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", "".join(blocks[: 1 if scheme == "light" else 2])))

    def luminance(name: str) -> float:
        channels = (int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in ("ground", "sheet"):
        for ink in ("ink", "soft", "link", "good", "busy", "warn", "bad", "idle"):
            light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)
