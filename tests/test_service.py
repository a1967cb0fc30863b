"""The systemd unit: filled in for this machine, and nothing in it that a path or a name could change."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from flywheel.edge import realtime
from flywheel.edge.service import notify, unit
from flywheel.errors import ConfigError


def settings(text: str) -> dict[str, str]:
    lines = text.replace("\\\n", " ").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_unit_grants_what_real_time_needs_and_nothing_else(tmp_path: Path) -> None:
    text = unit(tmp_path / "bundle", "robot", priority=42, metrics_port=9999)
    got = settings(text)
    assert "$" not in text
    assert got["LimitRTPRIO"] == "42"
    assert got["LimitMEMLOCK"] == "infinity"
    assert got["User"] == "robot"
    assert got["NoNewPrivileges"] == "yes"
    assert got["ProtectSystem"] == "strict"
    assert got["CapabilityBoundingSet"] == got["AmbientCapabilities"] == ""
    cpu, others = realtime.cores()
    mine = {cpu} if cpu is not None else set()
    assert got["CPUAffinity"].split() == [str(c) for c in sorted(others | mine)]
    assert f"--policy {tmp_path / 'bundle'} " in got["ExecStart"]
    assert "--metrics-port 9999" in got["ExecStart"]
    assert got["KillMode"] == "process"  # or systemd would end System 1 together with its supervisor


@pytest.mark.parametrize("user", ["", "a b", "a\nExecStartPre=/bin/sh", "$HOME", "%u", '"'])
def test_a_name_cannot_bring_its_own_settings(tmp_path: Path, user: str) -> None:
    with pytest.raises(ConfigError, match="user = "):
        unit(tmp_path, user)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    file = tmp_path / "flywheel-edge.service"
    file.write_text(unit(tmp_path / "bundle", "root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "flywheel-edge" not in done.stderr, done.stderr


def test_word_to_a_systemd_that_is_gone_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("WATCHDOG=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("WATCHDOG=1")
