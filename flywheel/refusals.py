"""What an answer of an object store, or the lack of one, amounts to in our errors, each with its remedy."""

from __future__ import annotations

import re
from typing import Any

from flywheel.errors import (
    Conflict,
    FlywheelError,
    IntegrityError,
    NotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)

_BAD_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


def refusal(error: Any, what: str) -> FlywheelError:
    """The error that an HTTP answer (a botocore ``ClientError``) amounts to; ``what`` leads its message."""
    status, code = status_of(error), str(error.response.get("Error", {}).get("Code", ""))
    said = f"{what}: {status} {code}".rstrip()
    if code == "NoSuchBucket":
        return StoreRefused(f"{said}: create the bucket, or name another one in FLYWHEEL_STORE")
    if status == 404:
        return NotFound(f"{what}: no such object")
    if status in (409, 412):
        return Conflict(f"{said}: somebody else wrote it first")
    if code in ("BadDigest", "XAmzContentSHA256Mismatch", "InvalidDigest"):
        return IntegrityError(f"{said}: the data were damaged on the way; try again")
    if code == "RequestTimeTooSkewed":
        return StoreRefused(f"{said}: this machine's clock is off; set it by NTP")
    if status == 401 or code in _BAD_KEYS:
        return StoreRefused(f"{said}: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if code in ("EntityTooLarge", "QuotaExceeded", "InsufficientCapacity") or status in (413, 507):
        return StoreRefused(f"{said}: object or quota too large; raise the quota or free space")
    if code in ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException") or status in (408, 429):
        return StoreUnavailable(f"{said}: the store is busy; try again later")
    if status == 403:
        return StoreRefused(f"{said}: these keys may not do this; check the bucket's policy")
    if 300 <= status < 400:
        return StoreRefused(f"{said}: the bucket lies elsewhere; set AWS_DEFAULT_REGION or AWS_ENDPOINT_URL")
    if status >= 500:
        return StoreUnavailable(f"{said}: the store failed; try again later")
    return StoreError(said)


def failure(error: Any, what: str, endpoint: str | None) -> FlywheelError:
    """The error that no HTTP answer amounts to."""
    from botocore import exceptions as b

    if isinstance(error, b.NoCredentialsError | b.PartialCredentialsError | b.CredentialRetrievalError):
        return StoreRefused(f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, b.SSLError):
        return StoreUnavailable(f"{what}: TLS failed; check the endpoint's certificate and AWS_CA_BUNDLE")
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__.removesuffix("Error")).lower()
    if isinstance(error, b.ConnectionError | b.HTTPClientError | b.IncompleteReadError):
        hint = f"is {endpoint} up?" if endpoint else "is the network up?"
        return StoreUnavailable(f"{what}: unreachable ({name}); {hint}")
    return StoreError(f"{what}: {name}")


def status_of(error: Any) -> int:
    """The HTTP status of a ``ClientError``; 0 if there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
