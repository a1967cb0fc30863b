"""Pull: somebody in the cloud asks for a stretch of time that is still on the robot.

    fleet/requests/<robot>/<id>.json   ``WindowRequest``, written once by whoever asks
    fleet/answers/<robot>/<id>.json    ``WindowAnswer``, by the robot; the newest replaces the older
    fleet/pending/<robot>/<episode>.json   on a metered link: the manifest of what waits on the robot

The process that uploads reads requests and answers them; what is in the spool it sends first, whatever the
link. What is not sealed yet only the recorder has: the request is left for it in the spool's ``requests/``,
as a file that appears whole, and the recorder opens a window for it as far as the rows are here or to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, ValidationError, model_validator

from flywheel.episode import fsync_directory, write_durably
from flywheel.errors import StoreError
from flywheel.schema import ROBOT_NAME, Manifest, Strict
from flywheel.store import ObjectInfo

LONGEST_NS = 600 * 1_000_000_000
REQUEST_BYTES_MAX = 1 << 14
LOOK_S = 5.0


class WindowRequest(Strict):
    """Which time is wanted: [start, end) in UTC ns, or an episode by its id."""

    schema_version: Literal[1] = 1
    request_id: str = Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")
    robot: str = Field(pattern=ROBOT_NAME)
    start_unix_ns: int = Field(default=0, ge=0)
    end_unix_ns: int = Field(default=0, ge=0)
    episode_id: str = Field(default="", pattern=r"^([0-9a-f-]{36})?$")
    who: str = Field(default="", max_length=200)
    why: str = Field(default="", max_length=1000)

    @model_validator(mode="after")
    def _one_of(self) -> WindowRequest:
        span = self.end_unix_ns - self.start_unix_ns
        if not self.episode_id and not 0 < span <= LONGEST_NS:
            raise ValueError(
                f"end_unix_ns - start_unix_ns = {span}: give an episode_id, or 0 < span <= {LONGEST_NS}"
            )
        return self

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return f"fleet/requests/{self.robot}/{self.request_id}.json"

    def wants(self, m: Manifest) -> bool:
        """Whether an episode is, or holds, some of what is asked for."""
        if self.episode_id:
            return m.episode_id == self.episode_id
        low, high = (m.clock_epoch_ns + t for t in m.window_ns)
        return low < self.end_unix_ns and self.start_unix_ns < high


class WindowAnswer(Strict):
    """What became of it: ``sent`` lists episodes that are in the store, ``waiting`` those on their way.
    ``gone``: there is nothing of it on the robot any more, nor will be."""

    schema_version: Literal[1] = 1
    request_id: str
    robot: str
    sent: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    gone: bool = False


class Records(Protocol):
    """A recorder, as far as it is asked."""

    def request(self, start_ns: int, end_ns: int, detail: dict[str, str]) -> bool:
        """Record a window."""

    @property
    def epoch_ns(self) -> int:
        """UTC at ``t_ns = 0``."""


class Objects(Protocol):
    """What is needed of the store."""

    def list(self, prefix: str) -> Iterable[ObjectInfo]: ...
    def get(self, key: str) -> bytes: ...
    def put(self, key: str, data: bytes) -> str: ...


def fetch(store: Objects, robot: str, problems: dict[str, str]) -> Iterator[WindowRequest]:
    """Requests to this robot. One that is malformed is told in ``problems`` and left out."""
    for info in store.list(f"fleet/requests/{robot}/"):
        try:
            if info.size > REQUEST_BYTES_MAX:
                raise ValueError(f"{info.size} bytes, at most {REQUEST_BYTES_MAX}")
            request = WindowRequest.model_validate_json(store.get(info.key))
        except (ValidationError, ValueError) as e:
            problems[info.key] = f"{info.key}: no request that this build understands: {str(e)[:200]}"
            continue
        if request.key == info.key:
            yield request


class Requests:
    """The requests that a robot knows of, in ``<spool>/requests``."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "requests"
        self.directory.mkdir(parents=True, exist_ok=True)

    def keep(self, request: WindowRequest) -> bool:
        """Remember a request; False if it is known already."""
        path = self.directory / f"{request.request_id}.json"
        if path.exists() or self._served(request.request_id).exists():
            return False
        part = path.with_suffix(".part")
        write_durably(part, request.to_bytes())
        part.rename(path)
        fsync_directory(self.directory)
        return True

    def known(self) -> list[WindowRequest]:
        """Those that are neither answered nor done."""
        found = []
        for path in sorted(self.directory.glob("*.json")):
            with suppress(OSError, ValidationError):
                found.append(WindowRequest.model_validate_json(path.read_bytes()))
        return found

    def served(self, request: WindowRequest) -> bool:
        """Whether the recorder has looked at it."""
        return self._served(request.request_id).exists()

    def serve(self, recorder: Records) -> int:
        """For the recorder's process: open windows for what is asked. Returns how many were opened."""
        opened = 0
        for request in self.known():
            if self.served(request):
                continue
            if not request.episode_id:
                detail = {"request": request.request_id, "who": request.who, "why": request.why}
                start, end = request.start_unix_ns, request.end_unix_ns
                opened += recorder.request(start - recorder.epoch_ns, end - recorder.epoch_ns, detail)
            self._served(request.request_id).touch()
        return opened

    def done(self, request: WindowRequest) -> None:
        """It was answered for good."""
        self._served(request.request_id).touch()
        (self.directory / f"{request.request_id}.json").unlink(missing_ok=True)

    def _served(self, request_id: str) -> Path:
        return self.directory / f"{request_id}.served"


def answer(
    store: Objects, requests: Requests, queued: list[Manifest], sent: list[Manifest], now_unix_ns: int
) -> None:
    """Tell the cloud how far its requests are. ``sent``: what this robot uploaded and remembers."""
    for request in requests.known():
        waiting = tuple(m.episode_id for m in queued if request.wants(m))
        stored = tuple(m.episode_id for m in sent if request.wants(m))
        over = requests.served(request) and now_unix_ns > request.end_unix_ns + LONGEST_NS // 10
        final = not waiting and (bool(stored) or over)
        said = WindowAnswer(
            request_id=request.request_id,
            robot=request.robot,
            sent=stored,
            waiting=waiting,
            gone=final and not stored,
        )
        if not (waiting or final):
            continue
        with suppress(StoreError):  # told again at the next look
            store.put(f"fleet/answers/{request.robot}/{request.request_id}.json", said.to_bytes())
            if final:
                requests.done(request)


__all__ = ["LOOK_S", "Requests", "WindowAnswer", "WindowRequest", "answer", "fetch"]
