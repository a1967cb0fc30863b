"""An S3 bucket in memory or in a directory, and the real ``Store`` on top of it.

It answers the calls that ``Store`` makes of boto3's client as a server does: atomic PUT, ``If-None-Match: *``
with one winner, MD5 checked, 404 and 412 as botocore's own errors, listings in key order. Faults are asked
for by ``before``: it is called with every request and may raise, kill the process, or change the bucket as an
attacker would.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import threading
import uuid
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError, EndpointConnectionError
from botocore.response import StreamingBody

from flywheel.store import Store


class Killed(BaseException):
    """The process died here: nothing may catch it."""


class Bucket:
    """The client. ``objects`` maps a key to its bytes and its user metadata."""

    def __init__(self) -> None:
        self.objects: MutableMapping[str, tuple[bytes, dict[str, str]]] = {}
        self.arrived: dict[str, datetime] = {}  # by key, by the server's clock
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.before: Callable[[str, str], None] = lambda verb, key: None
        self.after: Callable[[str, str], None] = lambda verb, key: None
        self.requests = 0
        self._lock = threading.Lock()

    # -- what an attacker with write access, or a fault, does

    def overwrite(self, key: str, data: bytes) -> None:
        """Replace an object, with metadata that agree with it."""
        self.objects[key] = (data, {"sha256": hashlib.sha256(data).hexdigest()})

    def data(self, key: str) -> bytes:
        """An object's bytes."""
        return self.objects[key][0]

    @contextmanager
    def down(self) -> Iterator[None]:
        """Unreachable for the length of the block."""

        def refuse(verb: str, key: str) -> None:
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

        before, self.before = self.before, refuse
        yield
        self.before = before

    # -- boto3's client

    def put_object(
        self,
        *,
        Bucket: str,  # boto3's names
        Key: str,
        Body: io.BufferedIOBase,
        ContentMD5: str,
        ContentLength: int,
        Metadata: dict[str, str],
        IfNoneMatch: str | None = None,
    ) -> dict[str, Any]:
        self._request("PUT", Key)
        data = Body.read()
        if base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode() != ContentMD5:
            raise _error(400, "BadDigest")
        with self._lock:
            self._put(Key, data, dict(Metadata), IfNoneMatch == "*")
        self.after("PUT", Key)
        return {}

    def get_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        self._request("GET", Key)
        data, metadata = self._object(Key, "NoSuchKey")
        return {"Body": StreamingBody(io.BytesIO(data), len(data)), "Metadata": metadata}

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        self._request("HEAD", Key)
        data, metadata = self._object(Key, "404")
        arrived = self.arrived.get(Key) or self.clock()
        return {"ContentLength": len(data), "Metadata": metadata, "LastModified": arrived}

    def delete_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        self._request("DELETE", Key)
        self.objects.pop(Key, None)
        return {}

    def get_paginator(self, name: str) -> Bucket:
        assert name == "list_objects_v2"
        return self

    def paginate(self, *, Bucket: str, Prefix: str, Delimiter: str = "") -> Iterator[dict[str, Any]]:
        self._request("LIST", Prefix)
        with self._lock:
            keys = self._keys(Prefix, Delimiter)
            folders = self._folders(Prefix) if Delimiter else []
        yield {
            "Contents": [self._listed(k) for k in keys],
            "CommonPrefixes": [{"Prefix": f"{Prefix}{f}/"} for f in folders],
        }

    # -- inside

    def _put(self, key: str, data: bytes, metadata: dict[str, str], once: bool) -> None:
        if once and key in self.objects:
            raise _error(412, "PreconditionFailed")
        self.objects[key] = (data, metadata)
        self.arrived[key] = self.clock()

    def _keys(self, prefix: str, delimiter: str) -> list[str]:
        keys = sorted(k for k in self.objects if k.startswith(prefix))
        return [k for k in keys if delimiter not in k[len(prefix) :]] if delimiter else keys

    def _folders(self, prefix: str) -> list[str]:
        below = (k[len(prefix) :].partition("/") for k in self.objects if k.startswith(prefix))
        return sorted({name for name, slash, _ in below if slash})

    def _listed(self, key: str) -> dict[str, Any]:
        arrived = self.arrived.get(key) or self.clock()
        return {"Key": key, "Size": len(self.objects[key][0]), "LastModified": arrived}

    def _request(self, verb: str, key: str) -> None:
        self.requests += 1
        self.before(verb, key)

    def _object(self, key: str, code: str) -> tuple[bytes, dict[str, str]]:
        try:
            return self.objects[key]
        except KeyError:
            raise _error(404, code) from None


class LargeBucket(Bucket):
    """In memory, with listings that do not look at every key: for hundreds of thousands of objects."""

    def __init__(self) -> None:
        super().__init__()
        self._sorted: list[str] = []

    def _put(self, key: str, data: bytes, metadata: dict[str, str], once: bool) -> None:
        if key not in self.objects:
            insort(self._sorted, key)
        super()._put(key, data, metadata, once)

    def delete_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        if Key in self.objects:
            del self._sorted[bisect_left(self._sorted, Key)]
        return super().delete_object(Bucket=Bucket, Key=Key)

    def _keys(self, prefix: str, delimiter: str) -> list[str]:
        keys, i, found = self._sorted, bisect_left(self._sorted, prefix), []
        while i < len(keys) and keys[i].startswith(prefix):
            folder, slash, _ = keys[i][len(prefix) :].partition(delimiter or "\0")
            if slash:  # the first key after everything that begins like this
                i = bisect_left(keys, f"{prefix}{folder}{chr(ord(delimiter) + 1)}", i)
                continue
            found.append(keys[i])
            i += 1
        return found

    def _folders(self, prefix: str) -> list[str]:
        keys, i, found = self._sorted, bisect_left(self._sorted, prefix), []
        while i < len(keys) and keys[i].startswith(prefix):
            name, slash, _ = keys[i][len(prefix) :].partition("/")
            if slash:
                found.append(name)
            i = bisect_left(keys, f"{prefix}{name}0", i) if slash else i + 1  # "0" follows "/"
        return found


class DirectoryBucket(Bucket):
    """Objects as files under a directory, so that processes share them and outlive one another."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.objects = _Files(root)

    def _put(self, key: str, data: bytes, metadata: dict[str, str], once: bool) -> None:
        if not _write(self.root / key, data, metadata, once):
            raise _error(412, "PreconditionFailed")
        self.arrived[key] = self.clock()

    def _keys(self, prefix: str, delimiter: str) -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        found = folder.iterdir() if delimiter and folder.is_dir() else folder.rglob("*")
        keys = (p.relative_to(self.root).as_posix() for p in found if p.is_file() and p.name[0] != ".")
        return sorted(k for k in keys if k.startswith(prefix))

    def _folders(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


class _Files(MutableMapping[str, tuple[bytes, dict[str, str]]]):
    """Files as the objects of a bucket: a line of metadata, then the bytes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, key: str) -> tuple[bytes, dict[str, str]]:
        try:
            head, _, data = (self._root / key).read_bytes().partition(b"\n")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise KeyError(key) from None
        return data, json.loads(head)

    def __setitem__(self, key: str, value: tuple[bytes, dict[str, str]]) -> None:
        _write(self._root / key, *value, False)

    def __delitem__(self, key: str) -> None:
        (self._root / key).unlink()

    def __iter__(self) -> Iterator[str]:
        return (p.relative_to(self._root).as_posix() for p in self._root.rglob("*") if p.is_file())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _write(path: Path, data: bytes, metadata: dict[str, str], once: bool) -> bool:
    """Whole or not at all; with ``once`` only where there is nothing yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    part.write_bytes(json.dumps(metadata).encode() + b"\n" + data)
    try:
        if not once:
            part.replace(path)
            return True
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


class BucketStore(Store):
    """The real store, talking to a ``Bucket``."""

    def __init__(self, bucket: Bucket | None = None) -> None:
        self.bucket, self.prefix, self.endpoint, self._at = "test", "", "memory", "s3://test in memory"
        self.server = bucket or Bucket()
        client: Any = self.server
        self._client = client


def _error(status: int, code: str) -> ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "request")
