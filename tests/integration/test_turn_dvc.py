"""Turns with real git, DVC and store. Their stages are tiny scripts in a checkout made for the test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flywheel import policies
from flywheel.claims import INBOX, claims_of
from flywheel.config import Deployment
from flywheel.dataset.earlier import read_earlier
from flywheel.errors import BundleError, ConfigError, IntegrityError, StageError
from flywheel.experiments import experiments as listed
from flywheel.schema import BUNDLE_FILES, GateReport, Verdict, bundle_digest, sha256_file
from flywheel.store import Store
from flywheel.turn import (
    STAGES,
    TurnRecord,
    TurnResult,
    close_turn,
    open_turn,
    run_stage,
    start_from,
)
from tests.checkouts import fail_on_a_robot, git, make_checkout

pytestmark = pytest.mark.integration


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What turns are cloned from."""
    root = make_checkout(tmp_path / "checkout")
    monkeypatch.setenv("FLYWHEEL_CHECKOUT", str(root))
    monkeypatch.setenv("TEST_LOG", str(tmp_path / "stages.log"))
    return root


@pytest.fixture
def home(tmp_path: Path, store_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """A deployment on the real store with its own state directory."""
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "home"))
    return Deployment.from_env()


def ran(tmp_path: Path) -> list[str]:
    log = tmp_path / "stages.log"
    return log.read_text().split() if log.exists() else []


def experiments(root: Path, home: Deployment) -> dict[str, Any]:
    """``dvc exp show`` of the checkout: data by experiment name."""
    shown = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "show", "--json", "--no-fetch"],
        cwd=root,
        env={**os.environ, "DVC_SITE_CACHE_DIR": str(home.home / "dvc" / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    baseline = json.loads(shown.stdout)[1]
    return {e["name"]: e["revs"][0]["data"] for e in baseline["experiments"] or []}


def test_two_turns_of_the_wheel_are_two_experiments_of_the_checkout(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path
) -> None:
    # The first turn, from a checkout with uncommitted work in it.
    (checkout / "greeting.py").write_text("from words import GREETING\n")
    (checkout / "words.py").write_text("GREETING = 'not committed'\n")
    before = git(checkout, "status", "--porcelain"), git(checkout, "count-objects")
    taken = fail_on_a_robot(store, tmp_path, 1, 2)
    record = open_turn("turn-one", adjust={"train.steps": 77})
    assert record is not None
    assert record.episodes == 2
    # The store tells times to the second, so the order of what arrived within one is its own.
    assert sorted(c.episode_id for c in claims_of(store, "turn-one").episodes) == sorted(taken)
    assert (git(checkout, "status", "--porcelain"), git(checkout, "count-objects")) == before

    for stage in STAGES[:2]:
        assert run_stage("turn-one", stage, hand_over=True) == 0
    # The rest on another machine: nothing is left of this one's disk.
    shutil.rmtree(home.home)
    assert open_turn("turn-one") == record
    for stage in STAGES[1:]:
        assert run_stage("turn-one", stage) == 0
    assert ran(tmp_path) == list(STAGES), "a stage ran twice or not at all"
    first = close_turn("turn-one")
    assert close_turn("turn-one") == first, "a repeat saved another experiment"

    workspace = home.home / "runs" / "turn-one"
    assert (workspace / "data/labels/labels.parquet").read_text() == "not committed"
    assert "# kept" in (workspace / "params.yaml").read_text()
    assert first.verdict is Verdict.PROMOTE
    assert first.promotes
    for name in BUNDLE_FILES:
        assert store.recorded_sha256(f"bundles/{first.candidate_digest}/{name}") is not None
    report = store.get_json(f"gates/{first.gate_digest}.json", GateReport, first.gate_digest)
    assert report.current_digest == bundle_digest(checkout / "models/base/bundle")
    assert "words.py" in git(checkout, "show", "--stat", "--format=", first.experiment)

    # The second turn starts from what the first one made.
    git(checkout, "checkout", "--quiet", "--", "greeting.py")
    (checkout / "words.py").unlink()
    fail_on_a_robot(store, tmp_path, 3, 4, 5)
    second_record = open_turn("turn-two", current_digest=first.candidate_digest)
    assert second_record is not None
    assert second_record.patch_sha256 == ""
    for stage in ("curate", "train"):
        assert run_stage("turn-two", stage) == 0
    second = close_turn("turn-two", ok=False)
    assert second.current_digest == first.candidate_digest
    weights = (home.home / "runs/turn-two/data/checkpoint/weights").read_text()
    assert weights.startswith((home.home / "runs/turn-one/data/checkpoint/weights").read_text())
    # And is trained on what the first one was, too: by content, from the store.
    earlier = home.home / "runs/turn-two/data/earlier"
    ((ancestor, dataset),) = read_earlier(earlier)
    assert (ancestor.turn, ancestor.policy) == ("turn-one", first.candidate_digest)
    curated = (workspace / "data/curated/dataset/episodes.json").read_text()
    assert (dataset / "episodes.json").read_text() == curated
    assert weights.endswith(f"~{curated}")
    listed_in = json.loads(git(checkout, "show", f"{second.experiment}:data/earlier/earlier.json"))
    assert [t["dataset"] for t in listed_in["turns"]] == [ancestor.dataset]

    shown = experiments(checkout, home)
    assert set(shown) == {"turn-one", "turn-two"}
    metrics = {name: data["metrics"]["data/curated/curate.json"]["data"] for name, data in shown.items()}
    assert metrics == {"turn-one": {"taken": 2}, "turn-two": {"taken": 3}}
    assert [(e.turn, e.taken) for e in listed(checkout)] == [("turn-two", 3), ("turn-one", 2)]
    assert shown["turn-one"]["params"]["params.yaml"]["data"]["train"]["steps"] == 77
    assert shown["turn-two"]["params"]["params.yaml"]["data"]["turn"]["policy"] == "data/current"
    assert git(checkout, "status", "--porcelain") == ""
    for path in (workspace / ".dvc/config.local", workspace / "dvc.lock"):
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in path.read_text()


def test_a_turn_that_waited_for_another_ones_release_trains_from_what_was_released(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path
) -> None:
    """Collected while the turn ahead was judged, and half trained too early: nothing of that stays."""
    fail_on_a_robot(store, tmp_path, 1)
    assert open_turn("turn-ahead", force=True) is not None
    for stage in STAGES:
        assert run_stage("turn-ahead", stage) == 0
    fail_on_a_robot(store, tmp_path, 2, 3)
    opened = open_turn("turn-behind", force=True)
    assert opened is not None
    with pytest.raises(StageError, match="turn-behind: curate has not finished"):
        start_from("turn-behind", opened.current_digest)
    for stage in STAGES[:4]:
        assert run_stage("turn-behind", stage) == 0
    assert start_from("turn-behind", "") == opened, "the same policy is no reason to begin again"
    once = [*STAGES, "curate", "label", "train"]  # what replays the lab is the same, and comes from the cache
    assert ran(tmp_path) == once

    released = close_turn("turn-ahead").candidate_digest
    for _ in range(2):  # a task that is tried again
        record = start_from("turn-behind", released)
        assert (record.current_digest, record.opened_digest) == (released, opened.current_digest)
    assert open_turn("turn-behind") == record
    assert close_turn("turn-behind", ok=False).stages == ("curate", "label", "replay")
    root = home.home / "runs" / "turn-behind"
    assert not (root / "data/checkpoint").exists()
    assert not (root / "data/metrics/train.json").exists()
    # The rest on another machine.
    shutil.rmtree(root)
    for stage in STAGES[3:]:
        assert run_stage("turn-behind", stage) == 0
    assert ran(tmp_path) == [*once, *STAGES[3:]], "what had been collected was made again"
    ahead = (home.home / "runs/turn-ahead/data/checkpoint/weights").read_text()
    assert (root / "data/checkpoint/weights").read_text().startswith(ahead)
    result = close_turn("turn-behind")
    report = store.get_json(f"gates/{result.gate_digest}.json", GateReport, result.gate_digest)
    assert report.current_digest == result.current_digest == released
    with pytest.raises(StageError, match=r"turn-behind: was closed \(promote\)"):
        start_from("turn-behind", "")


def test_what_the_checkouts_own_dvc_lock_lists_is_not_finished_in_a_turn(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path
) -> None:
    """A developer's runs leave one behind; a turn that believed it would save what it never made."""
    lock = "".join(f"  {stage}:\n    cmd: earlier\n" for stage in STAGES)
    (checkout / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n{lock}")
    fail_on_a_robot(store, tmp_path, 1)
    assert open_turn("turn-a", force=True) is not None
    with pytest.raises(StageError, match="curate has not finished"):
        close_turn("turn-a")
    assert close_turn("turn-a", ok=False).stages == ()


TURN = """
import sys
from flywheel.turn import close_turn, open_turn, run_stage
turn = sys.argv[1]
assert open_turn(turn, force=True) is not None
for stage in ("curate", "label"):
    assert run_stage(turn, stage) == 0
print(close_turn(turn, ok=False).experiment)
"""


def test_two_turns_at_once_and_a_developers_own_experiment_beside_them_are_all_listed(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path
) -> None:
    """DVC allows one run a workspace, and git one writer a ref: nobody may meet the others' locks."""
    (checkout / "data" / "episodes" / "mine").mkdir(parents=True)
    fail_on_a_robot(store, tmp_path, 1, 2)
    mine = [sys.executable, "-m", "dvc", "exp", "run", "--name", "mine", "-S", "train.steps=99"]
    commands = {
        "mine": mine,
        # -P: not the checkout's own copy of the package, of which it has a part
        "turn-one": [sys.executable, "-P", "-c", TURN, "turn-one"],
        "turn-two": [sys.executable, "-P", "-c", TURN, "turn-two"],
    }

    def begin(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            commands[name], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    running = {"mine": begin("mine")}
    deadline = time.monotonic() + 240
    while not ran(tmp_path):  # the developer's run is under way
        assert running["mine"].poll() is None, running["mine"].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running["turn-one"] = begin("turn-one")
    while not list(store.list("claimed/")):  # each turn has its own failures
        assert running["turn-one"].poll() is None, running["turn-one"].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    fail_on_a_robot(store, tmp_path / "later", 3, 4)
    running["turn-two"] = begin("turn-two")
    said = {name: child.communicate(timeout=240)[0] for name, child in running.items()}
    for name, child in running.items():
        assert child.returncode == 0, said[name]
    words = ("Unable to acquire lock", "rwlock", "cannot lock ref", "index.lock")
    met = [word for word in words for text in said.values() if word in text]
    assert met == [], said
    shown = experiments(checkout, home)
    assert set(shown) == set(commands)
    steps = {name: data["params"]["params.yaml"]["data"]["train"]["steps"] for name, data in shown.items()}
    assert steps["mine"] == 99
    metrics = {name: data["metrics"]["data/curated/curate.json"]["data"] for name, data in shown.items()}
    curated = {name: found["taken"] for name, found in metrics.items()}
    assert curated == {"mine": 1, "turn-one": 2, "turn-two": 2}


def test_a_dataset_that_the_store_lost_stops_the_next_turn_before_it_claims_anything(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path
) -> None:
    """A turn that went on without it would unlearn what the last one taught, and nobody would know why."""
    fail_on_a_robot(store, tmp_path, 1)
    assert open_turn("turn-one", force=True) is not None
    for stage in STAGES:
        assert run_stage("turn-one", stage) == 0
    made = close_turn("turn-one").candidate_digest
    fail_on_a_robot(store, tmp_path, 2)
    (lost,) = store.list("datasets/")
    data = store.get(lost.key)
    store.delete(lost.key)
    with pytest.raises(StageError, match=r"turn-one made policy .* train\.earlier_turns = 0"):
        open_turn("turn-two", current_digest=made, force=True)
    assert len(list(store.list(INBOX))) == 1
    # What came back in its place is damaged: found as the workspace is filled, and not left there.
    store.put(lost.key, b"something else")
    with pytest.raises(IntegrityError, match="not the dataset that turn-one was trained on"):
        open_turn("turn-two", current_digest=made, force=True)
    store.put(lost.key, data)
    assert open_turn("turn-two", current_digest=made, force=True) is not None
    assert len(read_earlier(home.home / "runs/turn-two/data/earlier")) == 1
    # Or a person has it forgotten on purpose.
    store.delete(lost.key)
    fail_on_a_robot(store, tmp_path, 3)
    forget = {"train.earlier_turns": 0}
    assert open_turn("turn-three", current_digest=made, force=True, adjust=forget) is not None
    assert read_earlier(home.home / "runs/turn-three/data/earlier") == []


def test_sigterm_reaches_a_stage_and_a_failed_turn_is_an_experiment_too(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good,) = fail_on_a_robot(store, tmp_path, 1)
    (bad,) = fail_on_a_robot(store, tmp_path, 2)
    manifest = next(i.key for i in store.list("episodes/") if bad in i.key and "manifest" in i.key)
    store.put(manifest.replace("manifest.json", "control.parquet"), b"damaged")
    assert open_turn("turn-a") is not None
    problems = json.loads((home.home / "runs/turn-a/data/claims.json").read_text())["episodes"]
    assert {e["episode_id"]: bool(e["problem"]) for e in problems} == {good: False, bad: True}
    assert run_stage("turn-a", "curate") == 0

    monkeypatch.setenv("TEST_HANG", "label")
    code = "import sys; from flywheel.turn import run_stage; sys.exit(run_stage('turn-a', 'label'))"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    up, term = tmp_path / "stages.log.up", tmp_path / "stages.log.term"
    deadline = time.monotonic() + 60
    while not up.exists() or not up.read_text():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(StageError, match="another process works on this turn"):
        run_stage("turn-a", "label")
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 128 + signal.SIGTERM
    assert term.read_text() == up.read_text()
    assert not Path(f"/proc/{up.read_text()}").exists()

    monkeypatch.delenv("TEST_HANG")
    monkeypatch.setenv("TEST_FAIL", "label")
    assert run_stage("turn-a", "label") != 0
    with pytest.raises(StageError, match="label has not finished"):
        close_turn("turn-a")
    result = close_turn("turn-a", ok=False)
    assert result.stages == ("curate",)
    assert not result.promotes
    assert list(store.list("bundles/")) == []
    assert experiments(checkout, home)["turn-a"]["metrics"]["data/curated/curate.json"]["data"] == {
        "taken": 1
    }


def test_what_a_turn_cannot_start_from_is_said_before_anything_is_claimed(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path
) -> None:
    fail_on_a_robot(store, tmp_path, 1, 2)
    with pytest.raises(ConfigError, match=r"train\.stepz"):
        open_turn("turn-a", adjust={"train.stepz": 1})
    with pytest.raises(ConfigError, match="cannot be set for one turn"):
        open_turn("turn-a", adjust={"gate.min_lift": -1.0})
    with pytest.raises(BundleError, match="no turn of this store made it"):
        open_turn("turn-a", current_digest="ab" * 32)
    with pytest.raises(StageError, match="must be turn-"):
        open_turn("Turn/../x")
    with pytest.raises(StageError, match="no such turn"):
        run_stage("turn-a", "curate")
    with pytest.raises(StageError, match="must be one of"):
        run_stage("turn-a", "rm -rf")
    big = checkout / "core.dump"
    big.write_bytes(b"")
    os.truncate(big, 65 << 20)
    with pytest.raises(ConfigError, match=r"core\.dump the largest"):
        open_turn("turn-a")
    big.unlink()
    git(checkout, "update-ref", "-d", "HEAD")
    with pytest.raises(ConfigError, match="no commit yet"):
        open_turn("turn-a")
    shutil.rmtree(checkout / ".git")
    with pytest.raises(ConfigError, match="git init && git add -A && git commit"):
        open_turn("turn-a")
    assert len(list(store.list(INBOX))) == 2
    assert list(store.list("runs/")) == []


def test_too_few_failures_start_nothing_unless_a_person_says_so(
    checkout: Path, home: Deployment, store: Store, tmp_path: Path
) -> None:
    fail_on_a_robot(store, tmp_path, 1)
    assert open_turn("turn-a") is None
    assert not (home.home / "runs").exists()
    record = open_turn("turn-a", force=True)
    assert isinstance(record, TurnRecord)
    assert record.episodes == 1
    # The workspace is whole or is made whole, whatever it was interrupted in.
    shutil.rmtree(home.home / "runs/turn-a/data/episodes")
    (home.home / "runs/turn-a/.git/flywheel-filled").unlink()
    assert open_turn("turn-a") == record
    assert len(list((home.home / "runs/turn-a/data/episodes").iterdir())) == 1


def test_a_policy_record_cannot_write_outside_of_its_directory(store: Store, tmp_path: Path) -> None:
    bundle, checkpoint = tmp_path / "bundle", tmp_path / "checkpoint"
    bundle.mkdir()
    checkpoint.mkdir()
    for name in BUNDLE_FILES:
        (bundle / name).write_text(name)
    (checkpoint / "weights").write_text("w")
    made = policies.publish(store, "turn-x", bundle, checkpoint)
    policies.fetch(store, made.digest, tmp_path / "into")
    assert sha256_file(tmp_path / "into/weights") == made.checkpoint["weights"]
    for name in ("../weights", "/weights", "bundle/policy.onnx"):
        forged = made.model_copy(update={"checkpoint": {name: made.checkpoint["weights"]}})
        store.put_json(f"policies/{made.digest}.json", forged)
        with pytest.raises(BundleError, match="may not have a file"):
            policies.fetch(store, made.digest, tmp_path / "into")
    assert not (tmp_path / "weights").exists()


def test_results_survive_a_round_trip() -> None:
    result = TurnResult(turn="turn-a", ok=True, stages=STAGES, commit="c", verdict=Verdict.HOLD)
    assert TurnResult.model_validate_json(result.to_bytes()) == result
    assert not result.promotes
