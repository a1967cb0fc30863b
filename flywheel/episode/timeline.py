"""An episode as a recording for the Rerun viewer (https://rerun.io): scrub signals and pictures together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flywheel.episode.sealing import as_array, read
from flywheel.errors import ConfigError
from flywheel.schema import Mode

_SIGNALS = {"q": "q_rad", "q_ref": "q_ref_rad", "dq": "dq_rad_s", "tau": "tau_nm"}


def write_rrd(directory: Path, rrd: Path) -> Path:
    """Write an episode to a ``.rrd`` file: joint signals, tracking error, mode, events and pictures, on a
    timeline in seconds from the first trigger.

    Raises ``EpisodeError`` for an unreadable episode, ``ConfigError`` where rerun-sdk is not installed.
    """
    try:
        import rerun as rr
    except ImportError:
        raise ConfigError(
            "--rrd: needs rerun-sdk, which is not installed by default (it takes 0.4 GB): "
            "pip install 'flywheel[rerun]'"
        ) from None
    e = read(directory)
    m = e.manifest
    zero = m.triggers[0].t_ns if m.triggers else m.window_ns[0]

    def when(table: pa.Table) -> Any:
        t = (as_array(table, "t_ns") - zero).astype("timedelta64[ns]")
        return rr.TimeColumn("from the trigger", duration=t)

    rrd.parent.mkdir(parents=True, exist_ok=True)
    stream = rr.RecordingStream("flywheel", recording_id=m.episode_id)
    with stream:
        stream.save(rrd)
        t = when(e.control)
        signals = {path: as_array(e.control, n) for n, path in _SIGNALS.items()}
        signals["tracking_error_rad"] = signals["q_rad"] - signals["q_ref_rad"]
        for name, values in signals.items():
            for j in range(m.joints):
                rr.send_columns(
                    f"control/{name}/joint_{j}",
                    [t],
                    rr.Scalars.columns(scalars=values[:, j].astype(np.float64)),
                )
        late = as_array(e.control, "late_ns") / 1e9
        rr.send_columns("control/late_s", [t], rr.Scalars.columns(scalars=late))
        frames = when(e.frames)
        for camera in m.cameras:
            pictures = e.frames.column(f"image.{camera}").to_pylist()
            rr.send_columns(
                f"cameras/{camera}",
                [frames],
                rr.EncodedImage.columns(blob=pictures, media_type=["image/jpeg"] * len(pictures)),
            )
        t_ns, mode = as_array(e.control, "t_ns"), as_array(e.control, "mode")
        changed = np.flatnonzero(np.diff(mode, prepend=255))
        told = [(int(t_ns[i]), f"mode {Mode(int(mode[i])).name.lower()}") for i in changed]
        told += [
            (row["t_ns"], f"{row['kind']} {row['name']} {row['detail']}") for row in e.events.to_pylist()
        ]
        for at, text in sorted(told):
            rr.set_time("from the trigger", duration=(at - zero) / 1e9)
            rr.log("events", rr.TextLog(text))
    return rrd
