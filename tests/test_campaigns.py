"""Campaigns record what they ask for and no more, and only what people approved and keys signed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flywheel import campaigns
from flywheel.cli import campaigns as cli
from flywheel.edge.campaigns import Campaign, Campaigns
from flywheel.episode import read, verify
from flywheel.errors import ConfigError, ReleaseError
from flywheel.release import Publisher
from flywheel.schema import TriggerKind
from tests.bucket import BucketStore
from tests.deliveries import make_bundle, robot, stable, warm_up
from tests.recording import MS, S, Stage

NEVER = 1 << 62


def campaign(**fields: Any) -> Campaign:
    values: dict[str, Any] = {
        "campaign_id": "torque",
        "why": "a bearing that may wear",
        "condition": {"on": "signal", "signal": "tau_nm", "joint": 1, "above": 5.0, "confirm": 3, "heal": 50},
        "pre_s": 0.4,
        "post_s": 0.2,
        "episodes": 2,
        "end_unix_ns": NEVER,
    }
    return Campaign.model_validate({**values, **fields})


def test_a_signal_above_its_bound_is_recorded_with_its_own_window_and_cameras(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.recorder.set_campaigns([campaign(cameras=("wrist",))], 0)
    stage.play(1.2)
    stage._control["tau"][0, 1] = 6.0
    stage.play(0.1)
    stage._control["tau"] = 0.0
    (m,) = stage.play(1.0)
    assert [t.kind for t in m.triggers] == [TriggerKind.CAMPAIGN]
    assert m.triggers[0].detail["campaign"] == "torque"
    assert m.window_ns == (1202 * MS - 400 * MS, 1202 * MS + 200 * MS)
    assert m.cameras == ("wrist",)
    assert verify(tmp_path / m.episode_id) == []
    assert "image.scene" not in read(tmp_path / m.episode_id).frames.schema.names
    assert stage.recorder.campaigns() == {"torque": 1}


def test_a_failure_within_a_campaigns_window_has_every_camera(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.recorder.set_campaigns([campaign(cameras=("wrist",))], 0)
    stage.play(1.2)
    stage._control["tau"][0, 1] = 6.0
    stage.play(0.1)
    stage.say("trigger", "dropped_object")
    (m,) = stage.play(1.5)
    assert m.cameras == ("wrist", "scene")


def test_a_quota_is_kept_and_an_end_ends(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    asked = campaign(
        condition={"on": "event", "kind": "plant", "name": "door"}, episodes=2, end_unix_ns=5 * S
    )
    stage.recorder.set_campaigns([asked], 0)
    for _ in range(4):
        stage.play(1.0)
        stage.say("plant", "door")
        stage.recorder.set_campaigns([asked], 0)  # looked at again: counted on
    stage.finish()
    kinds = [t.kind for m in stage.sealed for t in m.triggers]
    assert kinds.count(TriggerKind.CAMPAIGN) == 2
    stage.recorder.set_campaigns([asked], 5 * S)
    assert stage.recorder.detector.watches == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"condition": {"on": "event"}}, "kind is empty"),
        ({"condition": {"on": "shell", "kind": "rm"}}, "attempt"),
        ({"campaign_id": "../x"}, "campaign_id"),
        ({"pre_s": 1e9}, "pre_s"),
        ({"episodes": 0}, "episodes"),
        ({"limits": {"torque": 1e9}}, "limits"),
    ],
)
def test_a_campaign_that_asks_for_what_it_may_not_is_refused_by_field(
    change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        campaign(**change)


def test_only_an_approved_campaign_reaches_robots_and_releases_go_on_beside_it(tmp_path: Path) -> None:
    store = BucketStore()
    publisher = Publisher(store, tmp_path / "keys")
    publisher.init(("ops",))
    a, b = make_bundle(tmp_path, "a"), make_bundle(tmp_path, "b")
    publisher.publish_first(a)
    digest = campaigns.propose(store, (campaign(),))
    assert campaigns.propose(store, (campaign(),)) == digest
    with pytest.raises(ReleaseError, match="0 of 1 approvals; not signed"):
        campaigns.publish(publisher, digest)
    with pytest.raises(ConfigError, match="eve cannot approve campaigns here: no trusted key of eve"):
        campaigns.approve(publisher, digest, "eve")
    campaigns.approve(publisher, digest, "ops")
    key = next(k for k in store.server.objects if "/approvals/" in k)
    word = store.server.data(key)
    store.server.overwrite(key, word.replace(b"ops", b"eve"))
    with pytest.raises(ReleaseError, match="0 of 1"):
        campaigns.publish(publisher, digest)
    other = campaigns.propose(store, (campaign(campaign_id="other"),))
    store.server.overwrite(key.replace(digest, other), word)  # replayed for another proposal
    with pytest.raises(ReleaseError, match="0 of 1"):
        campaigns.publish(publisher, other)
    store.server.overwrite(key, word)
    with robot(tmp_path, store, publisher) as r:
        r.poll(warm_up)
        assert r.campaigns() == ()
        assert campaigns.publish(publisher, digest).approved_by == ("ops",)
        r.poll(warm_up)
        assert r.campaigns() == (campaign(),)
        publisher.publish(b, stable(b))  # a release does not end a campaign …
        r.poll(warm_up)
        assert r.campaigns() == (campaign(),)
        assert publisher.current(stable(b).group) == stable(b)


def test_a_campaign_that_was_altered_in_the_store_is_refused(tmp_path: Path) -> None:
    store = BucketStore()
    publisher = Publisher(store, tmp_path / "keys")
    publisher.init()
    publisher.publish_first(make_bundle(tmp_path, "a"))
    publisher.publish_campaigns(Campaigns(campaigns=(campaign(),), approved_by=("ops",)))
    (key,) = [k for k in store.server.objects if k.endswith(".campaigns.json")]
    store.server.overwrite(key, store.server.data(key).replace(b"5.0", b"0.0"))
    with robot(tmp_path, store, publisher) as r:
        r.poll(warm_up)
        with pytest.raises(ReleaseError, match=r"campaigns\.json"):
            r.campaigns()


YAML = """
- campaign_id: torque
  why: a bearing that may wear
  condition: {on: signal, signal: tau_nm, joint: 1, above: 5}
  pre_s: 2
  post_s: 1
  cameras: [wrist]
  episodes: 20
  end_unix_ns: 1900000000000000000
"""


def test_campaigns_go_from_a_file_to_the_robots_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BucketStore()
    publisher = Publisher(store, tmp_path / "keys")
    publisher.init(("ops",))
    publisher.publish_first(make_bundle(tmp_path, "a"))
    monkeypatch.setattr("flywheel.services.environment.store", lambda: store)
    monkeypatch.setattr("flywheel.services.environment.publisher", lambda: publisher)
    file = tmp_path / "campaigns.yaml"
    file.write_text(YAML.replace("episodes: 20", "episodes: many"))
    with pytest.raises(ConfigError, match=r"campaigns\.yaml: 0\.episodes = 'many'"):
        cli.propose(file)
    file.write_text(YAML)
    cli.propose(file)
    (digest,) = campaigns.proposals(store)
    cli.approve(digest[:8], by="ops")
    cli.ls()
    cli.publish(digest[:8])
    with robot(tmp_path, store, publisher) as r:
        r.poll(warm_up)
        (mine,) = r.campaigns()
    assert (mine.campaign_id, mine.cameras, mine.condition.above) == ("torque", ("wrist",), 5.0)
    with pytest.raises(ConfigError, match="0 proposals begin so"):
        cli.publish("nothing")
