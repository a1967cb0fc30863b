"""Attacks on releases and publishers that die or race: each refused, or recovered from."""

from __future__ import annotations

import contextlib
import logging
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from flywheel.edge.updater import Action
from flywheel.errors import BundleError, ConfigError, ReleaseError
from flywheel.rehearsal.attacks import ATTACKS
from flywheel.rehearsal.site import Site, copy_of, forge, offer, taken
from flywheel.release import Publisher
from flywheel.release.repository import TIMESTAMP
from flywheel.schema import Group, bundle_digest
from tests.bucket import Bucket, BucketStore, Killed
from tests.deliveries import make_bundle, robot, stable, warm_up

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused(site: Site, attack: str) -> None:
    assert ATTACKS[attack](site)


# ── what the publisher refuses ──────────────────────────────────────────────────────────────────────


def test_publisher_refuses_bytes_that_are_not_those_that_were_gated(site: Site) -> None:
    with pytest.raises(BundleError, match="not " + bundle_digest(site.new)):
        site.publisher.publish(site.base, stable(site.new))
    with pytest.raises(BundleError, match="No such file"):
        site.publisher.publish(site.root / "nowhere", stable(site.new))


def test_publisher_signs_nothing_on_top_of_altered_metadata(site: Site) -> None:
    """Else a forged, badly signed stable release would be signed properly with the next publication."""
    forge(site, "stable", offer(site.new, stable(site.new)), ["canary-1"])
    site.server.overwrite("releases/log/00000004.json", site.server.data(TIMESTAMP))
    with pytest.raises(ReleaseError, match="nothing was signed"):
        site.publisher.refresh()


def test_publisher_without_the_stable_keys_publishes_canary_only(site: Site) -> None:
    for i in (1, 2):
        (site.publisher.keys.directory / f"stable-{i}.pem").unlink()
    site.publisher.publish(site.new, stable(site.new).model_copy(update={"group": Group.CANARY}))
    before = dict(site.server.objects)
    with pytest.raises(ReleaseError, match="role stable needs 2 signatures and 1 of its keys"):
        site.publisher.reissue(stable(site.new))
    assert site.server.data(TIMESTAMP) == before[TIMESTAMP][0]


def test_bundle_that_was_never_published_cannot_be_reissued(site: Site) -> None:
    with pytest.raises(ReleaseError, match="never published"):
        site.publisher.reissue(stable(site.new))


def test_index_that_names_other_files_cannot_be_reissued(site: Site) -> None:
    site.publisher.publish(site.new, stable(site.new))
    index = site.server.data(f"releases/bundles/{bundle_digest(site.new)}.json")
    site.server.overwrite(f"releases/bundles/{bundle_digest(site.base)}.json", index)
    with pytest.raises(ReleaseError, match="does not describe"):
        site.publisher.reissue(stable(site.base))


def test_damaged_blob_is_replaced_by_the_other_group_when_promoted(site: Site) -> None:
    site.publisher.publish(site.new, stable(site.new).model_copy(update={"group": Group.CANARY}))
    site.publisher.reissue(stable(site.new))
    key = site.blob()
    site.server.overwrite(key, b"damaged")
    site.publisher.reissue(stable(site.new, git_rev="again"))
    taken(site, site.new)


def test_store_of_other_keys_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="other keys"):
        Publisher(site.store, tmp_path / "other-keys").init()


def test_keys_are_private_and_appear_in_no_log_and_no_object(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = BucketStore()
    publisher = Publisher(store, tmp_path / "keys")
    publisher.init()
    publisher.publish_first(make_bundle(tmp_path, "base"))
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    pems = sorted((tmp_path / "keys").glob("*.pem"))
    assert len(pems) == 12
    said = caplog.text.encode() + b"".join(data for data, _ in store.server.objects.values())
    for pem in pems:
        assert stat.S_IMODE(pem.stat().st_mode) == 0o600
        assert pem.read_bytes().splitlines()[1] not in said
    pems[0].chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        publisher.refresh()


def test_file_that_is_no_key_is_named_without_its_content(site: Site) -> None:
    path = site.publisher.keys.directory / "stable-1.pem"
    path.write_text("hunter2")
    with pytest.raises(ConfigError) as e:
        site.publisher.refresh()
    assert "stable-1.pem" in str(e.value)
    assert "hunter2" not in str(e.value)


# ── publishers that die, race, or come again ────────────────────────────────────────────────────────


def test_the_same_publication_again_writes_nothing(site: Site) -> None:
    site.publisher.publish(site.new, stable(site.new))
    before = dict(site.server.objects)
    site.publisher.reissue(stable(site.new))
    site.publisher.init()
    assert site.server.objects == before


def test_first_policy_is_published_once_and_never_over_another(site: Site) -> None:
    assert site.publisher.publish_first(site.new).digest == bundle_digest(site.base)
    current = site.publisher.current(Group.STABLE)
    assert current is not None
    assert current.digest == bundle_digest(site.base)


def test_intended_return_to_an_older_policy_is_newer_metadata(site: Site) -> None:
    site.publisher.publish(site.new, stable(site.new))
    taken(site, site.new)
    site.publisher.reissue(stable(site.base, revokes=(bundle_digest(site.new),)))
    taken(site, site.base)


def steps(site: Site, work: Callable[[Publisher], None]) -> int:
    """How many requests a piece of work makes, on a copy of the store."""
    copy = copy_of(site.server)
    work(Publisher(BucketStore(copy), site.publisher.keys.directory))
    return copy.requests


@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_publication_leaves_old_or_new_and_the_next_one_works(site: Site, moment: str) -> None:
    """Killed at every request, before it reached the server or before its answer came back."""

    def publish(p: Publisher) -> None:
        p.publish(site.new, stable(site.new))

    seen = set()
    for k in range(1, steps(site, publish) + 1):
        server = copy_of(site.server)
        left = [k]

        def kill(verb: str, key: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        setattr(server, moment, kill)
        store = BucketStore(server)
        publisher = Publisher(store, site.publisher.keys.directory)
        with contextlib.suppress(Killed):
            publish(publisher)
        server.before = server.after = lambda verb, key: None
        root = site.root / f"{moment}-{k}"
        with robot(root, store, publisher) as r:
            found = r.poll(warm_up)
            assert found.action is Action.SWAPPED, (k, found)
            seen.add(found.digest)
            r.confirm()
        other = Publisher(store, site.publisher.keys.directory)
        other.publish(site.new, stable(site.new, git_rev="after"))
        assert other.current(Group.STABLE) == stable(site.new, git_rev="after")
        with robot(root, store, publisher) as r:
            r.poll(warm_up)
            active = r.active()
            assert active is not None
            assert active.release == stable(site.new, git_rev="after"), k
    assert seen == {bundle_digest(site.base), bundle_digest(site.new)}


def test_racing_publishers_lose_nothing_at_any_interleaving(site: Site) -> None:
    """A second publisher's whole publication happens at every point of the first one's."""
    canary = stable(site.new).model_copy(update={"group": Group.CANARY})

    def first(p: Publisher) -> None:
        p.publish(site.new, canary)

    for k in range(1, steps(site, first) + 1):
        server = copy_of(site.server)
        store = BucketStore(server)
        left = [k]

        def intrude(
            verb: str, key: str, left: list[int] = left, store: BucketStore = store, server: Bucket = server
        ) -> None:
            left[0] -= 1
            if left[0] == 0:
                Publisher(store, site.publisher.keys.directory).publish(site.new, stable(site.new))

        server.before = intrude
        publisher = Publisher(store, site.publisher.keys.directory)
        first(publisher)
        server.before = lambda verb, key: None
        assert publisher.current(Group.CANARY) == canary, k
        assert publisher.current(Group.STABLE) == stable(site.new), k
        with robot(site.root / f"race-{k}", store, publisher) as r:
            assert r.poll(warm_up).digest == bundle_digest(site.new), k


def test_publisher_that_died_before_its_switch_is_completed_by_the_next_refresh(site: Site) -> None:
    def kill(verb: str, key: str) -> None:
        if (verb, key) == ("PUT", TIMESTAMP):
            raise Killed

    site.server.before = kill
    with pytest.raises(Killed):
        site.publisher.publish(site.new, stable(site.new))
    site.server.before = lambda verb, key: None
    with robot(site.root, site.store, site.publisher) as r:
        assert r.poll(warm_up).action is Action.NONE
    site.publisher.refresh()
    taken(site, site.new)


def test_publication_called_off_by_its_guard_changes_nothing(site: Site) -> None:
    before = site.server.data(TIMESTAMP)

    def off() -> None:
        raise ReleaseError("called off")

    with pytest.raises(ReleaseError, match="called off"):
        site.publisher.publish(site.new, stable(site.new), off)
    assert site.server.data(TIMESTAMP) == before


def test_interrupted_first_set_up_is_completed(tmp_path: Path) -> None:
    reference = Bucket()
    Publisher(BucketStore(reference), tmp_path / "keys").init()
    for k in range(1, reference.requests + 1):
        server = Bucket()
        left = [k]

        def kill(verb: str, key: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        server.before = kill
        store = BucketStore(server)
        publisher = Publisher(store, tmp_path / "keys")
        with pytest.raises(Killed):
            publisher.init()
        server.before = lambda verb, key: None
        assert publisher.init() == publisher.keys.root
        assert publisher.current(Group.STABLE) is None


def test_metadata_past_half_of_their_life_are_renewed(tmp_path: Path) -> None:
    now = [datetime.now(UTC)]
    store = BucketStore()
    publisher = Publisher(store, tmp_path / "keys", clock=lambda: now[0])
    publisher.init()

    def expiry(role: str) -> datetime:
        if role == "timestamp":
            return Metadata.from_bytes(store.server.data(TIMESTAMP)).signed.expires
        keys = [k for k in store.server.objects if k.endswith(f".{role}.json")]
        newest = max(keys, key=lambda k: int(k.rsplit("/", 1)[1].split(".")[0]))
        return Metadata.from_bytes(store.server.data(newest)).signed.expires

    before = {r: expiry(r) for r in ("timestamp", "snapshot", "canary", "stable")}
    now[0] += timedelta(days=50)
    publisher.refresh()
    after = {r: expiry(r) for r in before}
    assert after["timestamp"] > now[0]
    assert after["snapshot"] > now[0]
    assert after["canary"] > before["canary"]  # 90 days
    assert after["stable"] == before["stable"]  # 180 days
