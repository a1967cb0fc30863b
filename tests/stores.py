"""A store in memory with the interface and the errors of the real one, that misbehaves when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path

from flywheel.errors import Conflict, IntegrityError, NotFound, StoreError, StoreUnavailable
from flywheel.schema import sha256_bytes
from flywheel.store import ObjectInfo

Fault = Callable[[str, str], str | None]


class MemoryStore:
    """``fault(verb, key)`` may raise, or return what goes wrong with this request.

    "lost": it is done, but the answer never comes. "lies": other bytes are stored and acknowledged.
    "forgets": nothing is stored and it is acknowledged. The server's clock is one second on at each request.
    """

    def __init__(self, fault: Fault = lambda verb, key: None) -> None:
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault = fault

    def put(self, key: str, data: bytes | Path, sha256: str | None = None) -> str:
        body = data if isinstance(data, bytes) else data.read_bytes()
        if sha256 is not None and sha256_bytes(body) != sha256:
            raise IntegrityError(f"{key}: not uploaded: data differ")
        return self._write("put", key, body)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        self.put(key, path, sha256)

    def create(self, key: str, data: bytes | Path, sha256: str | None = None) -> str:
        return self._write("create", key, data if isinstance(data, bytes) else data.read_bytes())

    def get(self, key: str, sha256: str | None = None) -> bytes:
        self._request("get", key)
        if key not in self.objects:
            raise NotFound(f"GET {key}: no such object")
        data = self.objects[key][0]
        if sha256 is not None and sha256_bytes(data) != sha256:
            raise IntegrityError(f"{key} has another sha256")
        return data

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> str:
        path.write_bytes(data := self.get(key, sha256))
        return sha256_bytes(data)

    def stat(self, key: str) -> ObjectInfo | None:
        self._request("stat", key)
        if key not in self.objects:
            return None
        data, modified = self.objects[key]
        return ObjectInfo(key, len(data), modified)

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def delete(self, key: str) -> None:
        self._request("delete", key)
        self.objects.pop(key, None)

    def list(self, prefix: str = "", nested: bool = True) -> Iterator[ObjectInfo]:
        self._request("list", prefix)
        for key in sorted(k for k in self.objects if k.startswith(prefix)):
            if nested or "/" not in key.removeprefix(prefix):
                data, modified = self.objects[key]
                yield ObjectInfo(key, len(data), modified, md5(data, usedforsecurity=False).hexdigest())

    def append_version(self, prefix: str, n: int, data: bytes) -> str:
        if n > 1 and not self.exists(f"{prefix}/{n - 1:08d}.json"):
            raise StoreError(f"{prefix} has no version {n - 1}")
        return self.create(f"{prefix}/{n:08d}.json", data)

    def latest(self, prefix: str) -> tuple[int, bytes] | None:
        keys = [i.key for i in self.list(f"{prefix}/", nested=False)]
        return (int(keys[-1][-13:-5]), self.get(keys[-1])) if keys else None

    def keys(self, prefix: str = "") -> Sequence[str]:
        """What there is, without a request."""
        return sorted(k for k in self.objects if k.startswith(prefix))

    def _request(self, verb: str, key: str) -> str | None:
        self.requests.append((verb, key))
        return self.fault(verb, key)

    def _write(self, verb: str, key: str, body: bytes) -> str:
        outcome = self._request(verb, key)
        if verb == "create" and key in self.objects:
            raise Conflict(f"PUT {key}: 412")
        stored = body[:-1] + bytes([body[-1] ^ 1]) if outcome == "lies" else body
        if outcome != "forgets":
            now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=len(self.requests))
            self.objects[key] = (stored, now)
        if outcome == "lost":
            raise StoreUnavailable(f"PUT {key}: no answer")
        return sha256_bytes(body)
