"""Campaigns on their way to the robots: proposed, approved by people, signed.

    campaigns/<digest>/proposal.json        the document, written once
    campaigns/<digest>/approvals/<who>.json  who let it out, written once each

An approval is of a digest: another document needs others. What the robots get carries the approvers' names
and is signed as a stable release is (``release.Publisher.publish_campaigns``).
"""

from __future__ import annotations

import re
from contextlib import suppress

from pydantic import ValidationError

from flywheel.edge.campaigns import Campaign, Campaigns
from flywheel.errors import Conflict, NotFound, ReleaseError
from flywheel.release import Publisher
from flywheel.schema import sha256_bytes
from flywheel.store import Store

UNSIGNED = "nobody yet"


def propose(store: Store, campaigns: tuple[Campaign, ...]) -> str:
    """Write a proposal; returns its digest. Proposing the same again changes nothing."""
    data = Campaigns(campaigns=campaigns, approved_by=(UNSIGNED,)).to_bytes()
    digest = sha256_bytes(data)
    with suppress(Conflict):
        store.create(f"campaigns/{digest}/proposal.json", data)
    return digest


def approve(store: Store, digest: str, who: str, approvers: tuple[str, ...]) -> None:
    """Let a proposal out, as one of ``approvers``; ``ReleaseError`` for anybody else."""
    if who not in approvers or not re.fullmatch(r"[A-Za-z0-9_.@-]{1,64}", who):
        raise ReleaseError(f"{who!r} may not approve; FLYWHEEL_APPROVERS names {', '.join(approvers)}")
    proposal(store, digest)
    with suppress(Conflict):
        store.create(f"campaigns/{digest}/approvals/{who}.json", digest.encode())


def proposal(store: Store, digest: str) -> Campaigns:
    """A proposal whose bytes have this digest; ``ReleaseError`` if there is none."""
    key = f"campaigns/{digest}/proposal.json"
    try:
        data = store.get(key)
        if sha256_bytes(data) != digest:
            raise ReleaseError(f"{key}: was changed after it was proposed; propose it again")
        return Campaigns.model_validate_json(data)
    except NotFound:
        raise ReleaseError(f"campaign {digest!r}: was never proposed here") from None
    except ValidationError as e:
        raise ReleaseError(f"{key}: {e.errors()[0]['msg']}") from None


def publish(publisher: Publisher, digest: str, approvers: tuple[str, ...], needed: int = 1) -> Campaigns:
    """Sign an approved proposal; ``ReleaseError`` if fewer than ``needed`` of ``approvers`` approved it."""
    store = publisher.store
    proposed = proposal(store, digest)
    prefix = f"campaigns/{digest}/approvals/"
    found = {i.key.removeprefix(prefix).removesuffix(".json") for i in store.list(prefix)}
    by = tuple(sorted(found & set(approvers)))
    if len(by) < max(needed, 1):
        raise ReleaseError(f"campaign {digest[:12]}: {len(by)} of {max(needed, 1)} approvals; not signed")
    signed = Campaigns(campaigns=proposed.campaigns, approved_by=by)
    publisher.publish_campaigns(signed)
    return signed
