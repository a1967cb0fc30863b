"""In which order a store in use is copied so that the copy is consistent, without stopping anybody.

Writers of the store put what is referred to first and what refers to it last: an episode's files, its
manifest, its inbox marker; blobs, numbered metadata, the log, ``timestamp.json``; evidence, then the decision
on it; a turn's outputs, ``dvc.lock``, ``result.json``. Nothing that is referred to is ever removed. So a copy
goes **the other way**: what refers first, and each class of objects (``TIERS``) is listed and copied before
the next one is listed. Whatever a copied object names was there before it was, and so is still to be found.
(Copying in the order of writing would find, at the end, heads that name what was not there at the start.)
What remains, most of it by far, is named by the tiers, and its order does not matter. A restore writes in
the reverse order, so that nobody ever sees a name without its object.

Three things need more than that:

* An episode is in the inbox or in a claim. Claims remove markers, so the inbox is copied before claims are:
  an episode that moves meanwhile is in both, which claims are made for, and never in neither.
* An episode that arrives meanwhile would be copied without the marker that came after its manifest, and be
  forgotten. So manifests are listed before the inbox is, and one that is not among them, nor named by a
  copied marker or claim, is left to the next back-up.
* The listing of a numbered log may show n + 1 and not n, if both are written while it is made: a number that
  is missing between two others is copied all the same.

Airflow's database is copied before the store and git's experiments after the results that name them, by the
same rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from flywheel.claims import INBOX, LOG, TAKEN
from flywheel.schema import MANIFEST_FILE

EPISODES = "episodes/"
IGNORED = "probe/"  # what looks at the store leave there for a moment
_VERSION = re.compile(r"(?P<log>.*/)(?P<n>\d{8})\.json")


class Tier(NamedTuple):
    """A class of objects: where they lie, and which of those that lie there."""

    prefix: str
    pattern: str = r".*"

    def holds(self, key: str) -> bool:
        """Whether an object is of this class."""
        return key.startswith(self.prefix) and re.fullmatch(self.pattern, key) is not None


TIERS = (
    Tier(INBOX),
    Tier("releases/metadata/timestamp.json"),
    Tier("releases/log/"),
    Tier("releases/metadata/"),
    Tier("rollouts/", r"rollouts/[^/]+/\d{8}\.json"),
    Tier("catalogue/log/"),
    Tier("runs/", r"runs/[^/]+/result\.json"),
    Tier("policies/"),
    Tier("runs/", r"runs/[^/]+/workspace/dvc\.lock"),
    Tier("runs/", r"runs/[^/]+/turn\.json"),
    Tier(f"{LOG}/", r".*\.settled"),  # says that the three below are complete
    Tier("claimed/"),
    Tier(f"{TAKEN}/"),
    Tier(f"{LOG}/", r".*\.json"),
    Tier("dvc/", r".*\.dir"),  # a list of files
)


def tier_of(key: str) -> int:
    """The number of an object's class; ``len(TIERS)`` for what no class names."""
    return next((i for i, tier in enumerate(TIERS) if tier.holds(key)), len(TIERS))


def missing_numbers(keys: Iterable[str]) -> list[str]:
    """Keys of a numbered log that are not listed although a lower and a higher number are."""
    logs: dict[str, set[int]] = {}
    for key in keys:
        if (m := _VERSION.fullmatch(key)) is not None:
            logs.setdefault(m["log"], set()).add(int(m["n"]))
    return [
        f"{log}{n:08d}.json"
        for log, found in sorted(logs.items())
        for n in range(min(found), max(found))
        if n not in found
    ]


def episode_of(key: str) -> str | None:
    """The id of the episode whose manifest this is; None for another object."""
    if not (key.startswith(EPISODES) and key.endswith(f"/{MANIFEST_FILE}")):
        return None
    return key.split("/")[-2]
