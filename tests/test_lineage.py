"""What earlier turns were trained on: the chain that leads to it, and what a cut or a forged one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel import lineage, policies
from flywheel.config import TrainSettings
from flywheel.dataset import dataset_digest
from flywheel.dataset.earlier import EARLIER, Earlier, EarlierTurn, read_earlier
from flywheel.errors import BundleError, IntegrityError, StageError, StoreError
from flywheel.policies import PolicyRecord
from flywheel.rehearsal.bucket import BucketStore
from flywheel.schema import BUNDLE_FILES, digest_of_hashes, sha256_bytes
from flywheel.train.pools import EARLIER as FROM_EARLIER
from flywheel.train.pools import LAB, NEW, parts, steps

BASE = "b" * 64


@dataclass
class Wheel:
    """A store in which turns have run; ``made``: their policies, the oldest first."""

    root: Path
    store: BucketStore = field(default_factory=BucketStore)
    made: list[str] = field(default_factory=list)

    def turn(self, start: str, dataset: Path | None) -> str:
        """A policy that started from ``start`` and learned from ``dataset``; its digest."""
        n = len(self.made) + 1
        bundle = {name: sha256_bytes(f"{n} {name}".encode()) for name in BUNDLE_FILES}
        record = PolicyRecord(
            digest=digest_of_hashes(bundle),
            turn=f"turn-{n}",
            bundle=bundle,
            checkpoint={},
            start=start if dataset is not None else "",
            dataset=lineage.publish(self.store, dataset) if dataset is not None else "",
        )
        self.store.put_json(f"policies/{record.digest}.json", record)
        self.made.append(record.digest)
        return record.digest

    def dataset(self, name: str) -> Path:
        """A directory with content of its own."""
        root = self.root / name
        (root / "meta").mkdir(parents=True)
        (root / "meta" / "info.json").write_text(name)
        (root / "sources.json").write_text(f"sources of {name}")
        return root

    def turns(self, count: int) -> str:
        """``count`` turns, each from what the one before it made; the last policy."""
        at = BASE
        for i in range(count):
            at = self.turn(at, self.dataset(f"data-{i + 1}"))
        return at


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    return Wheel(tmp_path / "made")


def names(found: Earlier) -> list[str]:
    return [t.turn for t in found.turns]


def test_a_turn_finds_what_every_turn_before_it_on_its_chain_had_the_newest_first(
    wheel: Wheel, tmp_path: Path
) -> None:
    last = wheel.turns(3)
    wheel.turn(wheel.made[0], wheel.dataset("rolled-back"))  # nobody went on from this one
    found = lineage.ancestors(wheel.store, last, 8, BASE)
    assert (names(found), found.ended) == (["turn-3", "turn-2", "turn-1"], "")
    lineage.fetch(wheel.store, found, tmp_path / "earlier")
    there = read_earlier(tmp_path / "earlier")
    assert [t.turn for t, _ in there] == names(found)
    assert [(d / "meta/info.json").read_text() for _, d in there] == ["data-3", "data-2", "data-1"]
    # Again: what is there stays, what is not listed goes.
    (tmp_path / "earlier" / ("0" * 64)).mkdir()
    before = {d: d.stat().st_ino for _, d in there}
    lineage.fetch(wheel.store, lineage.ancestors(wheel.store, last, 2, BASE), tmp_path / "earlier")
    assert {d.name for d in (tmp_path / "earlier").iterdir()} == {
        EARLIER,
        *(t.dataset for t in found.turns[:2]),
    }
    assert all(d.stat().st_ino == before[d] for _, d in read_earlier(tmp_path / "earlier"))


def test_a_chain_is_bounded_and_says_so(wheel: Wheel) -> None:
    last = wheel.turns(3)
    found = lineage.ancestors(wheel.store, last, 2, BASE)
    assert (names(found), found.ended) == (["turn-3", "turn-2"], "train.earlier_turns = 2")
    assert lineage.ancestors(wheel.store, last, 3, BASE).ended == ""
    assert lineage.ancestors(wheel.store, last, 0, BASE) == Earlier(ended="train.earlier_turns = 0")
    assert lineage.ancestors(wheel.store, BASE, 8, BASE) == Earlier()


def test_a_chain_that_is_cut_ends_there_and_says_why(wheel: Wheel) -> None:
    old = wheel.turn(BASE, None)  # by a version that kept no datasets
    middle = wheel.turn(old, wheel.dataset("middle"))
    last = wheel.turn(middle, wheel.dataset("last"))
    found = lineage.ancestors(wheel.store, last, 8, BASE)
    assert names(found) == ["turn-3", "turn-2"]
    assert found.ended == f"policy {old[:12]}: turn-1 kept no dataset, it ran an older version"
    wheel.store.delete(f"policies/{middle}.json")
    found = lineage.ancestors(wheel.store, last, 8, BASE)
    assert names(found) == ["turn-3"]
    assert found.ended == f"policy {middle[:12]}: the store has no record of it"


def test_records_that_lead_back_to_themselves_are_refused_rather_than_followed_for_ever(wheel: Wheel) -> None:
    last = wheel.turns(2)
    record = wheel.store.get_json(f"policies/{wheel.made[0]}.json", PolicyRecord)
    wheel.store.put_json(f"policies/{record.digest}.json", record.model_copy(update={"start": last}))
    with pytest.raises(BundleError, match="cannot have started from itself"):
        lineage.ancestors(wheel.store, last, 8, BASE)


def test_a_record_under_another_policys_name_is_refused(wheel: Wheel) -> None:
    last = wheel.turns(2)
    record = wheel.store.get_json(f"policies/{wheel.made[0]}.json", PolicyRecord)
    wheel.store.put_json(f"policies/{last}.json", record)
    with pytest.raises(BundleError, match="another bundle than its name"):
        lineage.ancestors(wheel.store, last, 8, BASE)


def test_a_dataset_that_is_gone_is_an_error_that_names_turn_and_remedy(wheel: Wheel) -> None:
    last = wheel.turns(2)
    gone = lineage.ancestors(wheel.store, last, 8, BASE).turns[1]
    for info in list(wheel.store.list(f"datasets/{gone.dataset}/")):
        wheel.store.delete(info.key)
    with pytest.raises(StageError, match=rf"datasets/{gone.dataset}/: .*turn-1 .*train\.earlier_turns = 1"):
        lineage.ancestors(wheel.store, last, 8, BASE)
    assert names(lineage.ancestors(wheel.store, last, 1, BASE)) == ["turn-2"], "the remedy must work"


@pytest.mark.parametrize("damage", ["another file", "a file more", "a file less", "outside"])
def test_a_dataset_that_is_not_what_its_name_says_never_reaches_the_turn(
    wheel: Wheel, tmp_path: Path, damage: str
) -> None:
    found = lineage.ancestors(wheel.store, wheel.turns(2), 8, BASE)
    prefix = f"datasets/{found.turns[1].dataset}/"
    if damage == "another file":
        wheel.store.put(f"{prefix}meta/info.json", b"whatever somebody would like to be trained on")
    elif damage == "a file more":
        wheel.store.put(f"{prefix}data/more.parquet", b"held out")
    elif damage == "a file less":
        wheel.store.delete(f"{prefix}sources.json")  # what is held out
    else:
        wheel.store.server.overwrite(f"{prefix}../../escaped", b"x")
    with pytest.raises(StoreError) as e:
        lineage.fetch(wheel.store, found, tmp_path / "earlier")
    if damage != "outside":
        assert isinstance(e.value, IntegrityError)
        assert "not the dataset that turn-1 was trained on" in str(e.value)
    assert not (tmp_path / "earlier" / found.turns[1].dataset).exists()
    assert not list(tmp_path.rglob("escaped"))


def test_what_was_changed_in_the_workspace_is_not_trained_on(wheel: Wheel, tmp_path: Path) -> None:
    into = tmp_path / "earlier"
    found = lineage.ancestors(wheel.store, wheel.turns(2), 8, BASE)
    lineage.fetch(wheel.store, found, into)
    (into / found.turns[0].dataset / "sources.json").write_text("nothing was held out")
    with pytest.raises(StageError, match="not the dataset of turn-2: fetch it again"):
        read_earlier(into)
    lineage.fetch(wheel.store, found, into)
    assert len(read_earlier(into)) == 2
    lost = Earlier(turns=(EarlierTurn(turn="turn-9", policy=BASE, dataset="9" * 64),))
    (into / EARLIER).write_bytes(lost.to_bytes())
    with pytest.raises(StageError, match="no such directory"):
        read_earlier(into)
    (into / EARLIER).write_text("[]")
    with pytest.raises(StageError, match=r"earlier\.json: cannot be read"):
        read_earlier(into)
    assert read_earlier(tmp_path / "by hand, nothing is there") == []


def test_a_dataset_is_published_once_under_its_content(wheel: Wheel) -> None:
    root = wheel.dataset("data")
    assert lineage.publish(wheel.store, root) == lineage.publish(wheel.store, root) == dataset_digest(root)
    keys = {i.key for i in wheel.store.list("datasets/")}
    assert keys == {f"datasets/{dataset_digest(root)}/{n}" for n in ("meta/info.json", "sources.json")}


def test_a_policys_record_from_before_there_were_datasets_is_still_read(wheel: Wheel) -> None:
    digest = wheel.turn(BASE, None)
    old = wheel.store.get_json(f"policies/{digest}.json", PolicyRecord).model_dump(
        exclude={"start", "dataset"}
    )
    wheel.store.put(f"policies/{digest}.json", PolicyRecord.model_validate(old).to_bytes())
    assert policies.record(wheel.store, digest).dataset == ""


# ── shares ───────────────────────────────────────────────────────────────────────────────────────────


@given(
    first=st.floats(0, 1),
    later=st.floats(0, 1),
    share=st.floats(0, 1),
    earlier=st.integers(0, 4),
    lab=st.booleans(),
)
def test_pools_have_the_stated_shares_and_nothing_without_a_share_is_loaded(
    first: float, later: float, share: float, earlier: int, lab: bool
) -> None:
    settings = TrainSettings(replay_fraction=first, later_replay_fraction=later, earlier_share=share)
    replay = later if earlier else first
    old = [Path(f"old-{i}") for i in range(earlier)]
    found = parts(Path("new"), old, Path("lab") if lab else None, settings)
    weight = {NEW: 0.0, FROM_EARLIER: 0.0, LAB: 0.0}
    for p in found:
        weight[p.pool] += p.weight
    assert sum(weight.values()) == pytest.approx(1.0)
    assert found[0].root == Path("new")  # interventions are looked for in the first
    assert all(p.weight > 0 for p in found[1:])
    if earlier and lab:
        assert weight[FROM_EARLIER] == pytest.approx(replay * share)
        assert weight[LAB] == pytest.approx(replay * (1 - share))
    elif earlier or lab:
        assert weight[FROM_EARLIER if earlier else LAB] == pytest.approx(replay)
    else:
        assert weight[NEW] == 1.0
    each = [p.weight for p in found if p.pool == FROM_EARLIER]
    assert each == pytest.approx([weight[FROM_EARLIER] / max(1, earlier)] * len(each))
    assert [p.root for p in found if p.pool == FROM_EARLIER] == (old if each else [])


@given(
    frames=st.integers(1, 100_000),
    epochs=st.floats(0, 50),
    replay=st.floats(0, 0.9),
    batch=st.integers(1, 256),
    least=st.integers(1, 5000),
)
def test_many_new_frames_are_drawn_as_often_as_few(
    frames: int, epochs: float, replay: float, batch: int, least: int
) -> None:
    settings = TrainSettings(steps=least, batch_size=batch, replay_fraction=replay, min_epochs=epochs)
    new = parts(Path("new"), [], Path("lab"), settings)[0]
    found = steps(new, frames, settings)
    assert found >= least
    assert found * batch * new.weight >= epochs * frames * (1 - 1e-9)
    if found > least:
        assert (found - 1) * batch * new.weight < epochs * frames
