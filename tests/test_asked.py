"""What other processes ask of the recorder reaches it, also after a crash in the midst of asking."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel.config import RecorderSettings
from flywheel.edge.asked import LOOK_NS, Asked, leave_campaigns
from flywheel.edge.requests import Requests, WindowRequest
from flywheel.errors import ConfigError
from flywheel.schema import TriggerKind
from tests.recording import MS, Stage
from tests.test_campaigns import campaign


def test_a_window_that_the_uploader_was_asked_for_is_recorded_once(tmp_path: Path) -> None:
    stage, spool = Stage(tmp_path / "episodes"), tmp_path / "spool"
    asked = Asked(spool)
    stage.play(1.0)
    epoch = stage.recorder.epoch_ns
    Requests(spool).keep(
        WindowRequest(
            request_id="w1",
            robot="r1",
            start_unix_ns=epoch + 500 * MS,
            end_unix_ns=epoch + 900 * MS,
            who="ada",
        )
    )
    for k in range(3):
        asked.pass_on(stage.recorder, k * LOOK_NS, 0)
    (m,) = stage.play(1.0)
    assert m.triggers[0].kind is TriggerKind.REQUEST
    assert m.window_ns == (500 * MS, 900 * MS)


def test_campaigns_end_by_the_clock_although_nobody_leaves_new_ones(tmp_path: Path) -> None:
    stage, spool = Stage(tmp_path / "episodes"), tmp_path / "spool"
    asked = Asked(spool)
    leave_campaigns(spool, (campaign(end_unix_ns=1000),))
    asked.pass_on(stage.recorder, 0, 999)
    assert stage.recorder.campaigns() == {"torque": 0}
    asked.pass_on(stage.recorder, LOOK_NS, 1000)
    stage.play(0.5)
    stage._control["tau"][0, 1] = 6.0
    assert stage.play(1.0) == []
    assert stage.recorder.campaigns() == {"torque": 0}


@pytest.mark.parametrize("damage", [b"", b"[{", b'[{"campaign_id": "x"}]'])
def test_a_damaged_file_of_campaigns_leaves_those_that_were_asked_for(tmp_path: Path, damage: bytes) -> None:
    stage, spool = Stage(tmp_path / "episodes"), tmp_path / "spool"
    asked = Asked(spool)
    leave_campaigns(spool, (campaign(),))
    asked.pass_on(stage.recorder, 0, 0)
    (spool / "campaigns.json").write_bytes(damage)
    asked.pass_on(stage.recorder, LOOK_NS, 0)
    stage.play(1.2)
    stage._control["tau"][0, 1] = 6.0
    assert len(stage.play(1.2)) == 1
    leave_campaigns(spool, ())
    asked.pass_on(stage.recorder, 2 * LOOK_NS, 0)
    assert stage.recorder.detector.watches == []


def test_a_quality_for_a_camera_that_is_not_there_is_named() -> None:
    settings = RecorderSettings(jpeg_quality=90, jpeg_quality_of={"wrist": 70})
    assert settings.quality(("scene", "wrist")) == {"scene": 90, "wrist": 70}
    with pytest.raises(
        ConfigError, match=r"recorder\.jpeg_quality_of\.wrist: no such camera; there are scene"
    ):
        settings.quality(("scene",))
