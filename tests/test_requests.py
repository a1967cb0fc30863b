"""Metered links, and windows that the cloud asks for: manifests at once, data by priority or on request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from flywheel.edge.requests import Requests, WindowAnswer, WindowRequest
from flywheel.edge.spool import Spool
from flywheel.episode import new_episode_id, read_manifest
from flywheel.schema import Manifest, Trigger, TriggerKind
from tests.recording import MS, S, Stage
from tests.samples import EPOCH_NS, sealed
from tests.stores import MemoryStore


def put_episode(root: Path, seed: int, kind: TriggerKind) -> Manifest:
    t = seed * 1_000_000
    name = new_episode_id(EPOCH_NS + t, np.random.default_rng(seed))
    path = sealed(root / "episodes", 0.1, seed, triggers=(Trigger(kind=kind, t_ns=t),), episode_id=name)
    return read_manifest(path)


def spool(root: Path, store: MemoryStore, least: list[int | None], now: int = 0) -> Spool:
    return Spool(
        root,
        store,
        1 << 30,
        rng=np.random.default_rng(0),
        robot="r1",
        metered=lambda: least[0],
        clock_unix_ns=lambda: now,
    )


def ask(store: MemoryStore, **fields: object) -> WindowRequest:
    request = WindowRequest.model_validate({"request_id": "q1", "robot": "r1", **fields})
    store.put(request.key, request.to_bytes())
    return request


def answer(store: MemoryStore) -> WindowAnswer:
    return WindowAnswer.model_validate_json(store.objects["fleet/answers/r1/q1.json"][0])


def test_a_metered_link_carries_manifests_and_what_matters_the_rest_waits_for_a_free_one(
    tmp_path: Path,
) -> None:
    store, least = MemoryStore(), [3]
    stop, late = (
        put_episode(tmp_path, i, k) for i, k in enumerate((TriggerKind.SAFETY_STOP, TriggerKind.TASK_TIMEOUT))
    )
    s = spool(tmp_path, store, least)  # type: ignore[arg-type]
    result = s.upload_once(0)
    assert (result.uploaded, result.waiting) == ((stop.episode_id,), 1)
    (key,) = store.keys("fleet/pending/")
    assert store.objects[key][0] == late.to_bytes()
    assert not [k for k in store.keys("episodes/") if late.episode_id in k]
    least[0] = None  # type: ignore[call-overload]
    assert s.upload_once(S).uploaded == (late.episode_id,)
    assert list(store.keys("fleet/pending/")) == []


def test_an_episode_that_was_dropped_is_not_offered_any_longer(tmp_path: Path) -> None:
    store = MemoryStore()
    lost = put_episode(tmp_path, 0, TriggerKind.TASK_TIMEOUT)
    spool(tmp_path, store, [5]).upload_once(0)
    assert len(list(store.keys("fleet/pending/"))) == 1
    s = spool(tmp_path, store, [5])
    s.queue.quota_bytes = 0
    assert s.upload_once(S).dropped == (lost.episode_id,)
    assert list(store.keys("fleet/pending/")) == []
    assert list(store.keys("episodes/")) == [lost.prefix + "dropped.json"]


def test_an_episode_that_is_asked_for_goes_first_and_over_a_metered_link(tmp_path: Path) -> None:
    store = MemoryStore()
    a, b = (put_episode(tmp_path, i, TriggerKind.TASK_TIMEOUT) for i in range(2))
    ask(store, episode_id=b.episode_id)
    s = spool(tmp_path, store, [5])
    assert s.upload_once(0).uploaded == (b.episode_id,)
    assert s.pending() == [a]
    s.upload_once(10 * S)
    assert answer(store).sent == (b.episode_id,)
    n = len(store.requests)
    s.upload_once(20 * S)  # answered for good: it is not gone into again
    assert [k for v, k in store.requests[n:] if v == "put"] == []


def test_a_window_that_is_still_in_the_rings_is_sealed_and_sent(tmp_path: Path) -> None:
    store = MemoryStore()
    s = spool(tmp_path, store, [None], now=EPOCH_NS + 4 * S)
    stage = Stage(s.queue.episodes)
    stage.play(2.0)
    ask(store, start_unix_ns=EPOCH_NS + 1200 * MS, end_unix_ns=EPOCH_NS + 2500 * MS, why="a noise was heard")
    s.upload_once(0)
    assert Requests(tmp_path).serve(stage.recorder) == 1
    assert Requests(tmp_path).serve(stage.recorder) == 0
    (m,) = stage.play(1.5)
    assert m.window_ns == (1200 * MS, 2500 * MS)
    assert m.triggers[0].kind is TriggerKind.REQUEST
    assert m.triggers[0].detail["why"] == "a noise was heard"
    assert s.upload_once(10 * S).uploaded == (m.episode_id,)
    s.upload_once(20 * S)
    assert answer(store).sent == (m.episode_id,)


def test_a_window_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    store = MemoryStore()
    s = spool(tmp_path, store, [None], now=EPOCH_NS + 1000 * S)
    stage = Stage(s.queue.episodes)
    stage.play(4.0)
    ask(store, start_unix_ns=EPOCH_NS - 9 * S, end_unix_ns=EPOCH_NS - S)
    s.upload_once(0)
    assert s.requests is not None
    assert s.requests.serve(stage.recorder) == 0
    s.upload_once(10 * S)
    assert answer(store).gone


def test_requests_that_are_none_are_told_and_stop_nothing(tmp_path: Path) -> None:
    store = MemoryStore()
    m = put_episode(tmp_path, 0, TriggerKind.TASK_TIMEOUT)
    store.put("fleet/requests/r1/bad.json", b'{"request_id": "../../x"}')
    store.put("fleet/requests/r1/long.json", b" " * 100_000)
    result = spool(tmp_path, store, [None]).upload_once(0)
    assert result.uploaded == (m.episode_id,)
    assert set(result.problems) == {"fleet/requests/r1/bad.json", "fleet/requests/r1/long.json"}
    assert [p.name for p in (tmp_path / "requests").iterdir()] == []
    with pytest.raises(ValidationError, match="give an episode_id"):
        WindowRequest(request_id="x", robot="r1", start_unix_ns=5, end_unix_ns=5)
