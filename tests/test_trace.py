"""The evidence chain: complete in both directions, and broken wherever one object was changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flywheel import policies, rollout
from flywheel.claims import claim
from flywheel.errors import StageError
from flywheel.rehearsal.rollouts import RolloutSite
from flywheel.schema import BUNDLE_FILES, MANIFEST_FILE, Verdict
from flywheel.trace import Chain, trace
from flywheel.turn import TurnRecord, TurnResult
from tests.samples import sealed

TURN = "turn-20270101-000000-abcdef"


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Wheel(RolloutSite):
    """One episode that became a policy that every robot runs, as the stages leave it in the store."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        directory = sealed(root, seconds=0.2)
        manifest = json.loads((directory / MANIFEST_FILE).read_bytes())
        self.episode = manifest["episode_id"]
        site, robot = manifest["site"], manifest["robot"]
        self.prefix = f"episodes/site={site}/robot={robot}/date=2026-01-01/{self.episode}/"
        for path in directory.iterdir():
            self.store.put(f"{self.prefix}{path.name}", path)
        marker = {"episode_id": self.episode, "prefix": self.prefix}
        self.store.put(f"inbox/{1:019d}-{self.episode}.json", json.dumps(marker).encode())
        claim(self.store, TURN, 10)
        checkpoint = root / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        policies.publish(self.store, TURN, self.new, checkpoint)
        figures = json.dumps({"dataset_sha256": "d" * 64}).encode()
        listing = [{"md5": md5((self.new / n).read_bytes()), "relpath": n} for n in sorted(BUNDLE_FILES)]
        bundle = f"{md5(json.dumps(listing, sort_keys=True).encode())}.dir"
        data, model = "data/curated/dataset", "data/checkpoint"
        lock = {
            "stages": {
                "curate": {
                    "outs": [
                        {"path": data, "md5": "a1.dir"},
                        {"path": "data/curated/curate.json", "md5": md5(figures)},
                    ]
                },
                "train": {
                    "deps": [{"path": data, "md5": "a1.dir"}],
                    "outs": [{"path": model, "md5": "b1.dir"}],
                },
                "export": {
                    "deps": [{"path": model, "md5": "b1.dir"}],
                    "outs": [{"path": "data/bundle", "md5": bundle}],
                },
            }
        }
        self.store.put(f"runs/{TURN}/workspace/dvc.lock", yaml.safe_dump(lock).encode())
        self.store.put(f"runs/{TURN}/workspace/data/curated/curate.json", figures)
        record = TurnRecord(turn=TURN, opened_unix_ns=1, commit="c" * 40, current_digest="e" * 64, episodes=1)
        self.store.put_json(f"runs/{TURN}/turn.json", record)
        result = TurnResult(
            turn=TURN,
            ok=True,
            stages=("curate", "train", "export"),
            commit="c" * 40,
            dataset="a1.dir",
            candidate_digest=self.candidate,
            gate_digest=self.gate,
            verdict=Verdict.PROMOTE,
        )
        self.store.put_json(f"runs/{TURN}/result.json", result)
        self.to_wide()
        self.work(6, 0.9, 0.4)
        self.look()

    def trace(self, name: str) -> Chain:
        return trace(self.store, self.publisher, name)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: None)
        return Wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def wheel(template: Wheel) -> Iterator[Wheel]:
    """The same store again after each test."""
    objects = dict(template.store.server.objects)
    yield template
    template.store.server.objects = objects


WHOLE = (
    "episode",
    "claims",
    "turn",
    "dataset",
    "training",
    "export",
    "bundle",
    "gate report",
    "release log",
    "rollout",
    "approval",
    "release",
    "robot",
)


@pytest.mark.parametrize("end", ["episode", "digest", "short digest"])
def test_chain_is_whole_from_both_ends(wheel: Wheel, end: str) -> None:
    names = {"episode": wheel.episode, "digest": wheel.candidate, "short digest": wheel.candidate[:14]}
    chain = wheel.trace(names[end])
    assert chain.ok, [x for x in chain.links if not x.ok]
    assert set(WHOLE) <= {x.what for x in chain.links}
    assert sum(x.what == "robot" for x in chain.links) == len(wheel.names)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("/control.parquet", "episode"),
        ("/manifest.json", "episode"),
        ("dvc.lock", "dataset"),
        ("curate.json", "dataset"),
        ("bundles/{candidate}/policy.onnx", "bundle"),
        ("gates/{gate}.json", "gate report"),
        ("rollouts/{id}/00000002.json", "rollout"),
        ("/approvals/", "approval"),
        ("/inputs/", "evidence"),
        ("releases/targets/stable/", "release"),
    ],
)
def test_any_object_that_was_changed_breaks_the_chain_at_its_link(wheel: Wheel, part: str, what: str) -> None:
    part = part.format(candidate=wheel.candidate, gate=wheel.gate, id=wheel.id)
    last = rollout.status(wheel.store, wheel.id).state
    newest = last.evidence.inputs_sha256 if last.evidence else ""
    for key in [k for k in wheel.store.server.objects if part in k and (what != "evidence" or newest in k)]:
        data = wheel.store.server.data(key)
        changed = data.replace(b".dir", b".dor") if what == "dataset" else data[:-9] + b"?" + data[-8:]
        if part == "curate.json":
            changed = data + b" "
        wheel.store.server.overwrite(key, changed)
    broken = [x.what for x in wheel.trace(wheel.candidate).links if not x.ok]
    assert what in broken


def test_first_policy_has_no_turn_and_says_so(wheel: Wheel) -> None:
    from flywheel.schema import bundle_digest

    chain = wheel.trace(bundle_digest(wheel.base))
    assert chain.ok
    assert "first policy" in chain.links[0].how


@pytest.mark.parametrize("name", ["0" * 64, "hello", "0" * 8 + "-0000-7000-8000-" + "0" * 12])
def test_unknown_name_is_an_error(wheel: Wheel, name: str) -> None:
    with pytest.raises(StageError, match=name[:8]):
        wheel.trace(name)
