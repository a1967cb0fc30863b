"""Campaigns on their way to the robots: proposed, approved by people, signed.

    campaigns/<digest>/proposal.json        the document, written once
    campaigns/<digest>/approvals/<keyid>.json   who let it out, signed by that approver's own key

An approval is of a digest: another document needs others. What the robots get carries the approvers' names
and is signed as a stable release is (``release.Publisher.publish_campaigns``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

from pydantic import Field, ValidationError

from flywheel.edge.campaigns import Campaign, Campaigns
from flywheel.errors import Conflict, IntegrityError, NotFound, ReleaseError
from flywheel.release import Publisher, Trust
from flywheel.rollout.documents import Seal
from flywheel.rollout.words import approve as sign
from flywheel.schema import DIGEST, Strict, sha256_bytes
from flywheel.store import Store

UNSIGNED = "nobody yet"


class CampaignApproval(Strict):
    """A person's word about one proposal."""

    schema_version: Literal[1] = 1
    what: Literal["campaigns"] = "campaigns"  # no signature of another kind of word fits this one
    proposal: str = Field(pattern=DIGEST)
    by: str = Field(min_length=1, max_length=200)


class SignedApproval(Strict):
    """``campaigns/<digest>/approvals/<keyid>.json``."""

    schema_version: Literal[1] = 1
    word: CampaignApproval
    seal: Seal


def propose(store: Store, campaigns: tuple[Campaign, ...]) -> str:
    """Write a proposal; returns its digest. Proposing the same again changes nothing."""
    data = Campaigns(campaigns=campaigns, approved_by=(UNSIGNED,)).to_bytes()
    digest = sha256_bytes(data)
    with suppress(Conflict):
        store.create(f"campaigns/{digest}/proposal.json", data)
    return digest


def approve(publisher: Publisher, digest: str, who: str) -> None:
    """Let a proposal out, with the key of ``who``; ``ConfigError`` where that is not here."""
    proposal(publisher.store, digest)
    word = CampaignApproval(proposal=digest, by=who)
    seal = sign(word.to_bytes(), who, "approve campaigns", publisher.keys, publisher.load().trust())
    signed = SignedApproval(word=word, seal=seal)
    publisher.store.put(f"campaigns/{digest}/approvals/{seal.keyid}.json", signed.to_bytes())


def approved_by(store: Store, digest: str, trust: Trust) -> tuple[str, ...]:
    """Whose words about a proposal count today, by name."""
    return tuple(sorted(set(_believed(store, digest, trust))))


def _believed(store: Store, digest: str, trust: Trust) -> Iterator[str]:
    for info in store.list(f"campaigns/{digest}/approvals/"):
        with suppress(NotFound, IntegrityError, ValidationError):
            found = SignedApproval.model_validate_json(store.get(info.key))
            who = trust.signer(found.word.to_bytes(), found.seal.keyid, found.seal.sig)
            if who and who == found.word.by and found.word.proposal == digest:
                yield who


def proposals(store: Store) -> list[str]:
    """The digests of all that was proposed."""
    parts = (i.key.split("/") for i in store.list("campaigns/"))
    return [p[1] for p in parts if len(p) == 3 and p[2] == "proposal.json"]


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


def publish(publisher: Publisher, digest: str) -> Campaigns:
    """Sign an approved proposal for the robots; ``ReleaseError`` if fewer people approved it than the signed
    metadata ask for (as for a release to every robot)."""
    proposed = proposal(publisher.store, digest)
    trust = publisher.load().trust()
    by = approved_by(publisher.store, digest, trust)
    if len(by) < trust.approvals:
        raise ReleaseError(f"campaign {digest[:12]}: {len(by)} of {trust.approvals} approvals; not signed")
    signed = Campaigns(campaigns=proposed.campaigns, approved_by=by)
    publisher.publish_campaigns(signed)
    return signed
