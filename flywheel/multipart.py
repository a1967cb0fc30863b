"""Large files to the store in parts that survive a restart (S3 multipart upload).

Parts that the store holds of an unfinished upload of the same bytes are not sent again: a
part is known by the MD5 that the store answers as its ETag. What is acknowledged in the
end is one object, as with a plain PUT.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 16 << 20  # S3 takes no part below 5 MiB but the last
THRESHOLD_BYTES = 64 << 20  # smaller files go in one PUT


def put_parts(client: S3Client, bucket: str, key: str, path: Path, sha256: str, part_bytes: int) -> int:
    """Upload a file whose sha256 is known; returns how many parts had to be sent.

    botocore's errors pass. An upload that was begun is left as it is: the next call goes on with it.
    """
    upload, have = _unfinished(client, bucket, key)
    if upload is None:
        begun = client.create_multipart_upload(Bucket=bucket, Key=key, Metadata={"sha256": sha256})
        upload = begun["UploadId"]
    parts: list[CompletedPartTypeDef] = []
    sent = 0
    with path.open("rb") as f:
        number = 0
        while piece := f.read(part_bytes):
            number += 1
            md5 = hashlib.md5(piece, usedforsecurity=False)
            etag = have.get(number)
            if etag != f'"{md5.hexdigest()}"':
                answer = client.upload_part(
                    Bucket=bucket,
                    Key=key,
                    UploadId=upload,
                    PartNumber=number,
                    Body=piece,
                    ContentMD5=base64.b64encode(md5.digest()).decode(),
                )
                etag = answer["ETag"]
                sent += 1
            parts.append({"PartNumber": number, "ETag": etag})
    client.complete_multipart_upload(
        Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
    )
    return sent


def _unfinished(client: S3Client, bucket: str, key: str) -> tuple[str | None, dict[int, str]]:
    """The newest upload of this key that nobody finished, with the ETags of its parts.

    Whether it is of the same file shows in the ETags; keys of episodes are written with one content only.
    """
    uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", [])
    mine = [u for u in uploads if u["Key"] == key]
    if not mine:
        return None, {}
    newest = max(mine, key=lambda u: u["Initiated"])["UploadId"]
    have: dict[int, str] = {}
    for page in client.get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=newest):
        have |= {p["PartNumber"]: p["ETag"] for p in page.get("Parts", [])}
    return newest, have
