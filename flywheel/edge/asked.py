"""What a robot's recorder is asked for by other processes of the robot: windows, and signed campaigns.

Both lie as files in the spool, each of which appears whole: ``requests/`` by the process that uploads, and
``campaigns.json`` by the one that verifies what is signed. The recorder looks at them once a second.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flywheel.edge.campaigns import Campaign
from flywheel.edge.recorder import Recorder
from flywheel.edge.requests import Requests
from flywheel.episode import fsync_directory, write_durably

LOOK_NS = 1_000_000_000
_FILE = "campaigns.json"
_CAMPAIGNS = TypeAdapter(tuple[Campaign, ...])


def leave_campaigns(spool: Path, campaigns: tuple[Campaign, ...]) -> None:
    """Leave verified campaigns for the recorder; they replace those that were left before."""
    path = spool / _FILE
    data = _CAMPAIGNS.dump_json(campaigns)
    with suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return
    spool.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    write_durably(part, data)
    part.rename(path)
    fsync_directory(spool)


class Asked:
    """What lies there, for the recorder's process."""

    def __init__(self, spool: Path) -> None:
        self._requests, self._campaigns = Requests(spool), spool / _FILE
        self._seen, self._asked = b"", tuple[Campaign, ...]()
        self._look_ns = 0

    def pass_on(self, recorder: Recorder, now_ns: int, now_unix_ns: int) -> None:
        """Tell the recorder what is new, at most once a second. What cannot be read is left for later."""
        if now_ns < self._look_ns:
            return
        self._look_ns = now_ns + LOOK_NS
        with suppress(OSError):
            self._requests.serve(recorder)
        with suppress(OSError, ValidationError):
            data = self._campaigns.read_bytes()
            if data != self._seen:
                self._asked, self._seen = _CAMPAIGNS.validate_json(data), data
            recorder.set_campaigns(self._asked, now_unix_ns)  # also unchanged: some may have ended
