"""The object store: verified reads, whole writes, create-only keys. Any server of the S3 API.

What is relied on: a PUT is atomic and durable when acknowledged, a listing shows it at once, and
``If-None-Match: *`` has exactly one winner (``probe`` checks it). What is not: ``If-Match``, multipart
conditions and server-side checksums, which servers implement differently. So state that changes is a series
of create-only versions (``append_version``), and every object carries its sha256, verified on each read.

Keys are relative to the store's url. Errors are those of ``flywheel.errors``: they name the endpoint and a
remedy, and never hold credentials.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from flywheel.config import Deployment
from flywheel.errors import (
    ConfigError,
    Conflict,
    IntegrityError,
    NotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from flywheel.multipart import PART_BYTES, THRESHOLD_BYTES, put_parts
from flywheel.refusals import failure, refusal, status_of
from flywheel.schema import Strict, sha256_file

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        LifecycleRuleUnionTypeDef,
        ListObjectsV2OutputTypeDef,
    )

EMBEDDED_FILE = "store.json"  # in FLYWHEEL_HOME, mode 0600, while the embedded store is up
MAX_PUT_BYTES = 5 << 30  # S3's bound for one PUT; one PUT is what makes a write atomic
PIECE_BYTES = 1 << 20
_CLEAR_UNFINISHED: LifecycleRuleUnionTypeDef = {
    "ID": "clear-unfinished-uploads",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
}
READ_ATTEMPTS = 3  # a body that breaks off is not retried by botocore

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object: key relative to the store, bytes, time of the last write (UTC).

    ``etag`` is the server's name for these bytes, another one for others; "" where it is not known.
    """

    key: str
    size: int
    modified: datetime
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Access:
    """How another client reaches the store, for now: temporary keys expire. Its repr holds no secret."""

    region: str
    access_key: str | None = field(repr=False)
    secret_key: str | None = field(repr=False)
    token: str | None = field(repr=False)


class EmbeddedStore(BaseModel):
    """``store.json``: how to reach the embedded store. Holds a secret: never print it."""

    endpoint: str
    bucket: str
    region: str
    access_key: str
    secret_key: str

    def connect(self, prefix: str = "", **options: Any) -> Store:
        """The store, or its part under ``prefix``, by these keys; ``options`` are those of ``Store``."""
        return Store(
            f"s3://{self.bucket}/{prefix}".rstrip("/"),
            self.endpoint,
            access_key=self.access_key,
            secret_key=self.secret_key,
            region=self.region,
            **options,
        )


class Store:
    """Objects under one ``s3://bucket/prefix``. Thread-safe; after a fork make a new one."""

    def __init__(
        self,
        url: str,
        endpoint: str | None = None,
        *,
        access_key: str | None = None,
        secret_key: str | None = None,
        region: str | None = None,
        timeout_s: float = 20.0,
        attempts: int = 4,
    ) -> None:
        """``endpoint`` None is AWS; keys None are boto3's own search (environment, profile, role).

        ``timeout_s`` bounds a connect and each wait for bytes; ``attempts`` counts the first one.
        Nothing is contacted yet. Raises ``ConfigError`` for a malformed url or endpoint.
        """
        m = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+[a-z0-9])(?:/(.*))?", url)
        if m is None:
            raise ConfigError(f"store url {url!r}: must look like s3://bucket or s3://bucket/prefix")
        self.bucket = m[1]
        self.prefix = f"{m[2].strip('/')}/" if m[2] and m[2].strip("/") else ""
        self.endpoint = endpoint
        self._at = f"{url} at {endpoint or 'AWS'}"
        self._session = _session(endpoint, access_key, secret_key, region)
        self._client = _client(self._session, endpoint, timeout_s, attempts)

    @classmethod
    def from_env(cls, deployment: Deployment | None = None, **options: Any) -> Store:
        """The store that the environment names, else the embedded one of FLYWHEEL_HOME if it is up.

        Raises ``StoreUnavailable`` where there is neither.
        """
        d = deployment or Deployment.from_env()
        if not d.embedded:
            return cls(d.store_url, d.endpoint, **options)
        e = embedded_store(d.home)
        if e is None:
            raise StoreUnavailable(
                "no object store: start the embedded one with `flywheel up`, or set AWS_ENDPOINT_URL and "
                "AWS_ACCESS_KEY_ID/AWS_SECRET_ACCESS_KEY (for AWS itself FLYWHEEL_STORE=s3://bucket)"
            )
        return e.connect(**options)

    def __repr__(self) -> str:
        return f"Store({self._at})"

    def access(self) -> Access:
        """The keys that this store uses, for an engine with a client of its own."""
        found = self._session.get_credentials()
        keys = found.get_frozen_credentials() if found is not None else None
        region = self._session.region_name or ""
        if keys is None:
            return Access(region, None, None, None)
        return Access(region, keys.access_key, keys.secret_key, keys.token)

    def sub(self, prefix: str) -> Store:
        """The part of this store under ``prefix``."""
        part = object.__new__(Store)
        part.__dict__.update(self.__dict__)
        part.prefix = f"{self._key(prefix.strip('/'))}/"
        part._at = f"s3://{self.bucket}/{part.prefix} at {self.endpoint or 'AWS'}"
        return part

    # -- writing

    def put(self, key: str, data: bytes | Path, sha256: str | None = None) -> str:
        """Write an object whole; return its sha256 (hex).

        With ``sha256`` given, refuses data that differ from it (``IntegrityError``, nothing is written).
        The server verifies the MD5 that is sent along, so what is acknowledged is what was read here.
        """
        return self._put(key, data, sha256, {})

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """``put`` of a file whose sha256 is known: a large one in parts, which a later call goes on with."""
        if path.stat().st_size <= THRESHOLD_BYTES:
            self.put(key, path, sha256)
            return
        full = self._key(key)
        if (found := sha256_file(path)) != sha256:
            raise IntegrityError(f"{key}: not uploaded: data have sha256 {found}, expected {sha256}")
        with self._errors("PUT", key):
            put_parts(self._client, self.bucket, full, path, sha256, PART_BYTES)

    def create(self, key: str, data: bytes | Path, sha256: str | None = None) -> str:
        """``put`` that raises ``Conflict`` if the key exists: of many racing writers one wins."""
        nonce = uuid.uuid4().hex
        try:
            return self._put(key, data, sha256, {"writer": nonce}, IfNoneMatch="*")
        except Conflict:
            # Our own first attempt may have won although its answer was lost.
            with self._errors("HEAD", key):
                head = self._client.head_object(Bucket=self.bucket, Key=self._key(key))
            if head["Metadata"].get("writer") != nonce:
                raise
            return head["Metadata"]["sha256"]

    def put_json(self, key: str, model: Strict) -> str:
        """``put`` of a model's canonical JSON."""
        return self.put(key, model.to_bytes())

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        with self._errors("DELETE", key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def append_version(self, prefix: str, n: int, data: bytes) -> str:
        """Create version ``n`` (from 1) of the state under ``prefix``; ``Conflict`` if somebody was first.

        The caller writes ``latest(prefix)[0] + 1``, so a version is only ever derived from the one before.
        """
        if n < 1:
            raise ValueError(f"version {n}: versions count from 1")
        if n > 1 and not self.exists(_version_key(prefix, n - 1)):
            raise StoreError(f"{self._at}: {prefix} has no version {n - 1}, so {n} cannot follow it")
        return self.create(_version_key(prefix, n), data)

    # -- reading

    def get(self, key: str, sha256: str | None = None) -> bytes:
        """An object's bytes, verified against ``sha256``, else against the hash stored with it.

        Raises ``NotFound``, ``IntegrityError``.
        """
        pieces: list[bytes] = []
        self._fetch(key, sha256, pieces.append, pieces.clear)
        return b"".join(pieces)

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> str:
        """``get`` into a file, which appears whole and verified (temp, fsync, rename) or not at all; the
        sha256 (hex) of what was read."""
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("wb") as f:

                def restart() -> None:
                    f.seek(0)
                    f.truncate()

                got = self._fetch(key, sha256, f.write, restart)
                f.flush()
                os.fsync(f.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return got

    def stream(self, key: str) -> Generator[bytes]:
        """An object's bytes in pieces as they arrive, once and **unverified**: for a reader that holds a
        signed length and hash and must not take in more than that. Opened at once (``NotFound``);
        ``close()`` it unless it was read to its end."""
        with self._errors("GET", key):
            body = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"]

        def pieces() -> Generator[bytes]:
            with body:
                it = body.iter_chunks(PIECE_BYTES)
                while True:
                    with self._errors("GET", key):
                        piece = next(it, None)
                    if piece is None:
                        return
                    yield piece

        return pieces()

    def get_json(self, key: str, kind: type[Model], sha256: str | None = None) -> Model:
        """A model read from JSON; ``StoreError`` names the field that is wrong."""
        data = self.get(key, sha256)
        try:
            return kind.model_validate_json(data)
        except ValidationError as e:
            first = e.errors()[0]
            field = ".".join(str(p) for p in first["loc"]) or "document"
            raise StoreError(f"{self._at}: {key}: {field}: {first['msg']}") from None

    def latest(self, prefix: str) -> tuple[int, bytes] | None:
        """Number and bytes of the newest version under ``prefix``; None if there is none."""
        versions = self.list(f"{prefix.rstrip('/')}/", nested=False)
        newest = max((n for i in versions if (n := _version(i.key))), default=0)
        return (newest, self.get(_version_key(prefix, newest))) if newest else None

    def exists(self, key: str) -> bool:
        """Whether the key has an object."""
        return self.stat(key) is not None

    def stat(self, key: str) -> ObjectInfo | None:
        """Size and time of an object; None if there is none."""
        try:
            with self._errors("HEAD", key):
                head = self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except NotFound:
            return None
        return ObjectInfo(key, head["ContentLength"], head["LastModified"])

    def recorded_sha256(self, key: str) -> str | None:
        """The sha256 that was stored with an object: a claim, which only reading verifies."""
        with self._errors("HEAD", key):
            head = self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        return head["Metadata"].get("sha256")

    def list(self, prefix: str = "", nested: bool = True) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in key order; without those below a further "/"
        unless ``nested``."""
        for page in self._pages(prefix, "" if nested else "/"):
            for o in page.get("Contents", ()):
                key, etag = o["Key"].removeprefix(self.prefix), o.get("ETag", "").strip('"')
                yield ObjectInfo(key, o["Size"], o["LastModified"], etag)

    def folders(self, prefix: str) -> Iterator[str]:
        """The names directly below ``prefix``, which ends with "/", that have objects below them."""
        for page in self._pages(prefix, "/"):
            for found in page.get("CommonPrefixes", ()):
                yield found["Prefix"].removeprefix(self.prefix + prefix).rstrip("/")

    def _pages(self, prefix: str, delimiter: str) -> Iterator[ListObjectsV2OutputTypeDef]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix, Delimiter=delimiter
        )
        it = iter(pages)
        while True:
            with self._errors("LIST", prefix):
                page = next(it, None)
            if page is None:
                return
            yield page

    # -- set-up

    def ensure_bucket(self) -> None:
        """Create the bucket if it is absent, so that it clears away uploads in parts that nobody finishes:
        a robot that gave an episode up, or never came back, would leave them there for ever, unlisted."""
        with self._errors("CREATE", f"bucket {self.bucket}"):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except self._client.exceptions.ClientError as e:
                if status_of(e) != 404:
                    raise
                self._client.create_bucket(Bucket=self.bucket)
                self._client.put_bucket_lifecycle_configuration(
                    Bucket=self.bucket, LifecycleConfiguration={"Rules": [_CLEAR_UNFINISHED]}
                )

    def clears_unfinished(self) -> bool:
        """Whether the bucket removes uploads in parts that were never finished."""
        with self._errors("GET", "lifecycle"):
            try:
                rules = self._client.get_bucket_lifecycle_configuration(Bucket=self.bucket).get("Rules", [])
            except self._client.exceptions.ClientError as e:
                if status_of(e) != 404:
                    raise
                return False  # no rules at all
        return any(r["Status"] == "Enabled" and "AbortIncompleteMultipartUpload" in r for r in rules)

    def probe(self) -> None:
        """Check what the rollout state relies on: a create-only key can be created once.

        Raises ``StoreRefused`` for a server that ignores the condition.
        """
        key = f"probe/{uuid.uuid4().hex}"
        self.create(key, b"1")
        try:
            self.create(key, b"2")
        except Conflict:
            return
        finally:
            self.delete(key)
        raise StoreRefused(
            f"{self._at}: the server ignores If-None-Match, so two writers could both win; "
            "use a server with conditional writes, and a bucket without versioning"
        )

    # -- inside

    def _key(self, key: str) -> str:
        check_key(key)
        if len((self.prefix + key).encode()) > 1024:
            raise StoreError(f"object key {key[:40]!r}…: longer than 1024 bytes")
        return self.prefix + key

    def _put(
        self, key: str, data: bytes | Path, sha256: str | None, metadata: dict[str, str], **condition: Any
    ) -> str:
        full = self._key(key)
        with _opened(data) as body:
            size, sha, md5 = _digests(body)
            if sha256 is not None and sha != sha256:
                raise IntegrityError(f"{key}: not uploaded: data have sha256 {sha}, expected {sha256}")
            if size > MAX_PUT_BYTES:
                raise StoreRefused(f"{key}: {size} bytes are more than one PUT may carry ({MAX_PUT_BYTES})")
            with self._errors("PUT", key):
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=full,
                    Body=body,
                    ContentLength=size,
                    ContentMD5=base64.b64encode(md5).decode(),
                    Metadata={"sha256": sha, **metadata},
                    **condition,
                )
        return sha

    def _fetch(self, key: str, sha256: str | None, sink: Any, restart: Any) -> str:
        full = self._key(key)
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                with self._errors("GET", key):
                    answer = self._client.get_object(Bucket=self.bucket, Key=full)
                    got = _drain(answer, sink)
                break
            except StoreUnavailable:
                if attempt == READ_ATTEMPTS:
                    raise
                restart()
        expected = sha256 or answer["Metadata"].get("sha256")
        if expected is not None and got != expected:
            raise IntegrityError(
                f"{self._at}: {key} has sha256 {got}, expected {expected}: the object was changed or "
                "damaged; restore it from where it was made"
            )
        return got

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        """botocore's errors as ours."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as e:
            raise refusal(e, f"{verb} {key}: {self._at}") from None
        except BotoCoreError as e:
            raise failure(e, f"{verb} {key}: {self._at}", self.endpoint) from None


def embedded_store(home: Path) -> EmbeddedStore | None:
    """Reads ``store.json`` of a state directory; None while the embedded store is down."""
    path = home / EMBEDDED_FILE
    try:
        return EmbeddedStore.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as e:
        why = e.strerror if isinstance(e, OSError) else "malformed"
        raise ConfigError(f"{path}: {why}; run `flywheel down` and `flywheel up` to write it anew") from None


def _session(
    endpoint: str | None, access_key: str | None, secret_key: str | None, region: str | None
) -> Session:
    from boto3.session import Session
    from botocore.exceptions import BotoCoreError

    env = os.environ
    try:
        return Session(
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1",
        )
    except (ValueError, BotoCoreError) as e:
        raise ConfigError(f"object store client for {endpoint or 'AWS'}: {e}") from None


def _client(session: Session, endpoint: str | None, timeout_s: float, attempts: int) -> S3Client:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    loopback = re.match(r"https?://(127\.|localhost|\[::1\])", endpoint or "") is not None
    config = Config(
        connect_timeout=min(timeout_s, 5.0),
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Servers other than AWS rarely do host-style buckets or trailing checksums.
        s3={"addressing_style": "path"} if endpoint else None,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        proxies={} if loopback else None,
        max_pool_connections=16,
    )
    try:
        return session.client("s3", endpoint_url=endpoint, config=config)
    except (ValueError, BotoCoreError) as e:
        raise ConfigError(f"object store client for {endpoint or 'AWS'}: {e}") from None


def check_key(key: str) -> None:
    """Raise ``StoreError`` for a key with empty, relative or unprintable parts."""
    parts = key.split("/")
    if not key or "" in parts or ".." in parts or "." in parts or not key.isprintable():
        raise StoreError(f"object key {key!r}: empty, relative or unprintable parts are not allowed")


@contextmanager
def _opened(data: bytes | Path) -> Iterator[BinaryIO]:
    import io

    if isinstance(data, bytes):
        yield io.BytesIO(data)
        return
    with data.open("rb") as f:
        yield f


def _digests(body: BinaryIO) -> tuple[int, str, bytes]:
    """Size, sha256 (hex) and MD5 of a seekable body, which is rewound."""
    sha, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    while piece := body.read(PIECE_BYTES):
        sha.update(piece)
        md5.update(piece)
        size += len(piece)
    body.seek(0)
    return size, sha.hexdigest(), md5.digest()


def _drain(answer: GetObjectOutputTypeDef, sink: Any) -> str:
    sha = hashlib.sha256()
    with closing(answer["Body"]) as body:
        for piece in body.iter_chunks(PIECE_BYTES):
            sha.update(piece)
            sink(piece)
    return sha.hexdigest()


def _version_key(prefix: str, n: int) -> str:
    return f"{prefix.rstrip('/')}/{n:08d}.json"


def _version(key: str) -> int:
    m = re.fullmatch(r"(\d{8})\.json", key.rsplit("/", 1)[-1])
    return int(m[1]) if m else 0
