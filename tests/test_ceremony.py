"""Changes of keys: what old keys signed stops counting, robots follow, and a death in the midst is mended."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel.edge.updater import Action
from flywheel.errors import ConfigError, ReleaseError
from flywheel.rehearsal import killed
from flywheel.rehearsal.site import Site, taken
from flywheel.release import Publisher, ceremony
from flywheel.schema import bundle_digest
from tests.deliveries import robot, stable, warm_up

TOP = ("root", "targets", "snapshot", "timestamp")


class Died(BaseException):
    """Nothing may catch it."""


pytestmark = pytest.mark.usefixtures("quick_disk")


def keys(site: Site, role: str) -> tuple[str, ...]:
    return next(r.keyids for r in ceremony.show(site.publisher) if r.role == role)


@pytest.mark.parametrize("role", [*TOP, "canary", "stable", "operator"])
def test_rotated_role_has_new_keys_and_releases_still_reach_robots(site: Site, role: str) -> None:
    before = keys(site, role)
    ceremony.rotate(site.publisher, role)
    after = keys(site, role)
    assert len(after) == len(before)
    assert not set(before) & set(after)
    with robot(site.root, site.store, site.publisher) as r:
        assert r.poll(warm_up).action is Action.NONE
    fresh = Publisher(site.store, site.publisher.keys.directory)
    fresh.publish(site.new, stable(site.new))
    taken(site, site.new)
    held = {s.public_key.keyid for s in fresh.keys.load().values()}
    assert not held & set(before), "old keys still lie among those that sign"
    assert set(before) <= set(fresh.keys.retired())


@pytest.mark.parametrize("role", ["root", "timestamp", "stable"])
def test_change_of_keys_that_died_at_any_step_is_completed_by_the_next_start(
    template: Site, tmp_path: Path, role: str
) -> None:
    seen: list[str] = []
    ceremony.rotate(template.copy(tmp_path / "count").publisher, role, step=seen.append)
    assert len(seen) > 3
    for k in range(len(seen)):
        site = template.copy(tmp_path / f"{k}")
        left = list(seen[: k + 1])

        def step(what: str, left: list[str] = left) -> None:
            left.pop(0)
            if not left:
                raise Died

        with pytest.raises(Died):
            ceremony.rotate(site.publisher, role, step=step)
        with robot(site.root, site.store, site.publisher) as r:
            r.poll(warm_up)
            active = r.active()
            assert active is not None
            assert active.digest == bundle_digest(site.base), k
        site.publisher.init()
        assert not (site.publisher.keys.directory / ceremony.PLAN).exists()
        site.publisher.publish(site.new, stable(site.new))
        taken(site, site.new)


def test_revoked_key_is_replaced_and_the_others_stay(site: Site) -> None:
    before = keys(site, "stable")
    (site.publisher.keys.directory / "stable-2.pem").unlink()  # lost
    lost = next(
        k for k in before if k not in {s.public_key.keyid for s in site.publisher.keys.load().values()}
    )
    ceremony.revoke(site.publisher, lost[:12])
    after = keys(site, "stable")
    assert len(set(after) & set(before)) == 2
    assert lost not in after
    site.publisher.publish(site.new, stable(site.new))
    taken(site, site.new)


def test_revoked_approver_stays_out_until_given_another_key(site: Site) -> None:
    old = keys(site, "approval")
    stolen = (site.publisher.keys.directory / "approval-ada.pem").read_bytes()
    ceremony.revoke(site.publisher, "ada")
    assert keys(site, "approval") == ()
    path = site.publisher.keys.directory / "approval-ada.pem"
    path.write_bytes(stolen)  # somebody puts it back
    path.chmod(0o600)
    site.publisher.init(("ada",))
    assert len(keys(site, "approval")) == 1
    assert keys(site, "approval") != old


def test_too_few_keys_for_a_ceremony_are_named_before_anything_changes(site: Site) -> None:
    (site.publisher.keys.directory / "targets-2.pem").unlink()
    before = dict(site.server.objects)
    with pytest.raises(ReleaseError, match=r"takes 2 signatures of role targets, and 1 of its\s+keys"):
        ceremony.rotate(site.publisher, "stable")
    assert site.server.objects == before


@pytest.mark.parametrize(("role", "threshold"), [("stable", 4), ("root", 0), ("approval", 2)])
def test_threshold_that_no_keys_could_meet_is_refused(site: Site, role: str, threshold: int) -> None:
    with pytest.raises(ConfigError, match="threshold = "):
        ceremony.require(site.publisher, role, threshold)


def test_unknown_role_and_unknown_key_are_named(site: Site) -> None:
    with pytest.raises(ConfigError, match="role = 'stabel'"):
        ceremony.rotate(site.publisher, "stabel")
    with pytest.raises(ConfigError, match="key 'stable-9'"):
        ceremony.revoke(site.publisher, "stable-9")


def test_publisher_elsewhere_with_the_old_keys_signs_nothing_any_more(site: Site, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(site.publisher.keys.directory, tmp_path / "elsewhere")
    ceremony.rotate(site.publisher, "stable")
    other = Publisher(site.store, tmp_path / "elsewhere")
    with pytest.raises(ReleaseError, match="role stable needs 2 signatures and 0 of its keys"):
        other.publish(site.new, stable(site.new))


@pytest.mark.parametrize("work", ["publish", "enrolment"])
def test_process_killed_by_the_kernel_is_recovered_from(tmp_path: Path, work: str) -> None:
    killed.make_template(tmp_path / "template")
    (tmp_path / "scratch").mkdir()
    deaths = killed.every_step(
        tmp_path / "template", tmp_path / "scratch", getattr(killed, work), killed.recovers, stride=9
    )
    assert deaths >= 3


def test_racing_processes_swallow_no_publication(tmp_path: Path) -> None:
    assert "none lost" in killed.race(tmp_path / "race", publishers=3, rounds=2)
