"""Who may do what in the store: access policies in the language of S3 (IAM), one for each kind of client.

A robot that is stolen can leave episodes and reports under its own name and read what is released to it, and
nothing else: it cannot read another robot's episodes, write a release, or remove anything. Stages cannot
release, and the publisher cannot touch what the failures were.

Every client may list names: without that, AWS answers 403 instead of 404 for a key that is not there, and an
uploader could not tell "not yet" from "forbidden". Contents are what is protected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from flywheel.errors import ConfigError
from flywheel.schema import RELEASES, ROBOT_NAME

LOGS = "logs/airflow"  # where the logs of Airflow's tasks lie, by whichever of them ran
VERSION = "2012-10-17"  # of the policy language
_LIST = ("s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation")
_READ = ("s3:GetObject",)
_WRITE = ("s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
_REMOVE = ("s3:DeleteObject",)

Policy = dict[str, Any]


def robot(store_url: str, site: str, name: str) -> Policy:
    """For one robot. Raises ``ConfigError`` for a name that is none: ``*`` would mean every robot."""
    for what, value in (("site", site), ("robot", name)):
        if re.fullmatch(ROBOT_NAME, value) is None:
            raise ConfigError(f"{what} {value!r}: letters, digits, dots, dashes and underscores, 63 at most")
    own = f"episodes/site={site}/robot={name}/*"
    offers, answers = f"fleet/pending/{name}/*", f"fleet/answers/{name}/*"
    evidence = (f"rollouts/*/shadow/{name}.json", f"rollouts/*/evidence/{name}-??????.json")
    said = (f"fleet/robots/{name}.json", offers, answers, *evidence)
    # A marker's name does not tell the robot, so that its order is that of arrival.
    asked = (f"{RELEASES}/*", "rollouts/*", f"fleet/requests/{name}/*", "state/claimed/*")
    return _policy(
        store_url, read=(own, offers, "inbox/*", *asked), write=(own, "inbox/*", *said), remove=(offers,)
    )


def stages(store_url: str) -> Policy:
    """For the workers that curate, train, export and judge: all but releasing."""
    results = ("bundles", "catalogue", "datasets", "dvc", "gates", "policies", "runs")
    asked = ("labels/questions", "labels/forms", "labels/answers")
    written = (*results, *asked, "claimed", "state", LOGS, "probe")
    folders = [f"{w}/*" for w in written]
    return _policy(store_url, read=("*",), write=folders, remove=("inbox/*", "dvc/*", "probe/*"))


def publisher(store_url: str) -> Policy:
    """For the workers that roll out, and the people who approve: releases, rollouts, requests to robots."""
    written = (RELEASES, "rollouts", "campaigns", "fleet/requests", "fleet/twin", LOGS, "probe")
    return _policy(store_url, read=("*",), write=[f"{w}/*" for w in written], remove=("probe/*",))


def _policy(store_url: str, read: Iterable[str], write: Iterable[str], remove: Iterable[str]) -> Policy:
    at = urlsplit(store_url)
    if at.scheme != "s3" or not at.netloc:
        raise ConfigError(f"store url {store_url!r}: must look like s3://bucket or s3://bucket/prefix")
    prefix = f"{at.path.strip('/')}/" if at.path.strip("/") else ""

    def allow(actions: Iterable[str], keys: Iterable[str]) -> Policy:
        resources = [f"arn:aws:s3:::{at.netloc}/{prefix}{k}" for k in keys]
        return {"Effect": "Allow", "Action": list(actions), "Resource": resources}

    bucket = {"Effect": "Allow", "Action": list(_LIST), "Resource": [f"arn:aws:s3:::{at.netloc}"]}
    statements = [bucket, allow(_READ, read), allow(_WRITE, write), allow(_REMOVE, remove)]
    return {"Version": VERSION, "Statement": statements}
