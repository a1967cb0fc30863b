"""An S3 bucket in memory, and the real ``Store`` on top of it.

It answers the calls that ``Store`` makes of boto3's client as a server does: atomic PUT, ``If-None-Match: *``
with one winner, MD5 checked, 404 and 412 as botocore's own errors, listings in key order. Faults are asked
for by ``before``: it is called with every request and may raise, or change the bucket as an attacker would.
"""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError, EndpointConnectionError
from botocore.response import StreamingBody

from flywheel.store import Store


class Killed(BaseException):
    """The process died here: nothing may catch it."""


class Bucket:
    """The client. ``objects`` maps a key to its bytes and its user metadata."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
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
            if IfNoneMatch == "*" and Key in self.objects:
                raise _error(412, "PreconditionFailed")
            self.objects[Key] = (data, dict(Metadata))
        self.after("PUT", Key)
        return {}

    def get_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        self._request("GET", Key)
        data, metadata = self._object(Key, "NoSuchKey")
        return {"Body": StreamingBody(io.BytesIO(data), len(data)), "Metadata": metadata}

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        self._request("HEAD", Key)
        data, metadata = self._object(Key, "404")
        return {"ContentLength": len(data), "Metadata": metadata, "LastModified": datetime.now(UTC)}

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
            keys = sorted(k for k in self.objects if k.startswith(Prefix))
        if Delimiter:
            keys = [k for k in keys if Delimiter not in k[len(Prefix) :]]
        now = datetime.now(UTC)
        yield {"Contents": [{"Key": k, "Size": len(self.objects[k][0]), "LastModified": now} for k in keys]}

    def _request(self, verb: str, key: str) -> None:
        self.requests += 1
        self.before(verb, key)

    def _object(self, key: str, code: str) -> tuple[bytes, dict[str, str]]:
        try:
            return self.objects[key]
        except KeyError:
            raise _error(404, code) from None


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
