"""People's words and the rollouts' decisions, signed: who may put them into a rollout's log.

    rollouts/<id>/approvals/<sha256>.json   a word and the signature of the key of whoever gave it

A word that promotes or skips counts if an approver's own key signed it under that approver's name. One that
holds, rolls back, pauses or resumes needs an approver's key or the operator's: it can only narrow what robots
do. The keys are those of the release repository's signed metadata, so a word that was altered, copied from
another rollout, signed by a stranger or by a key that was revoked since counts for nothing.
"""

from __future__ import annotations

from pydantic import ValidationError
from securesystemslib.signer import CryptoSigner

from flywheel.errors import ConfigError, IntegrityError, NotFound
from flywheel.keys import APPROVAL, OPERATOR, Keys, role_of
from flywheel.release import Trust
from flywheel.rollout.documents import Approval, Decision, RolloutState, Seal, SignedWord
from flywheel.store import Store

BY_AN_APPROVER = (Decision.PROMOTE, Decision.SKIP)


def sign(word: Approval, keys: Keys, trust: Trust) -> SignedWord:
    """A word with the signature of whoever gives it. Raises ``ConfigError`` if no fitting key is here."""
    if word.decision in BY_AN_APPROVER or word.by in approvers_here(keys, trust):
        return SignedWord(word=word, seal=approve(word.to_bytes(), word.by, word.decision, keys, trust))
    for stem, signer in keys.load().items():
        if role_of(stem) == OPERATOR and signer.public_key.keyid in trust.operators:
            return SignedWord(word=word, seal=_seal(word.to_bytes(), signer))
    raise ConfigError(
        f"{word.by} cannot {word.decision} here: neither a key of {word.by} nor the operator's lies in "
        f"{keys.directory}"
    )


def approvers_here(keys: Keys, trust: Trust) -> dict[str, CryptoSigner]:
    """The approvers whose keys lie here, by name."""
    held = ((trust.names.get(s.public_key.keyid), s) for s in keys.load().values())
    return {name: signer for name, signer in held if name is not None}


def approve(data: bytes, by: str, what: str, keys: Keys, trust: Trust) -> Seal:
    """An approver's signature. Raises ``ConfigError`` if the key is not here; ``what`` says what for."""
    if (signer := approvers_here(keys, trust).get(by)) is None:
        raise ConfigError(
            f"{by} cannot {what} here: no trusted key of {by} lies in {keys.directory}; decide where "
            f"{APPROVAL}-{by}.pem is, or enrol {by} with `flywheel keys approver`"
        )
    return _seal(data, signer)


def believed(signed: SignedWord, trust: Trust) -> str | None:
    """Why a word does not count; None if it does."""
    word = signed.word
    who = trust.signer(word.to_bytes(), signed.seal.keyid, signed.seal.sig)
    if who is None:
        return "not signed by a key that is trusted today"
    if word.decision in BY_AN_APPROVER and who != word.by:
        return f"says {word.by} and is signed by {who or 'the operator'}"
    return None


def read_words(store: Store, state: RolloutState, trust: Trust) -> tuple[list[Approval], list[str]]:
    """The words about a rollout that count, in order of their time, and those that do not, and why."""
    good, bad = [], []
    prefix = f"{state.prefix}/approvals/"
    for info in store.list(prefix):
        try:
            signed = SignedWord.model_validate_json(store.get(info.key))
        except NotFound:
            continue
        except (ValidationError, IntegrityError) as e:
            bad.append(f"{info.key}: {e.errors()[0]['msg'] if isinstance(e, ValidationError) else 'damaged'}")
            continue
        if signed.key != info.key:
            bad.append(f"{info.key}: is a word about rollout {signed.word.rollout_id}")
        elif (why := believed(signed, trust)) is not None:
            bad.append(f"{info.key}: {why}")
        else:
            good.append(signed.word)
    return sorted(good, key=lambda w: (w.t_unix_ns, w.digest)), bad


def seal(state: RolloutState, keys: Keys, trust: Trust) -> RolloutState:
    """A decision signed by the operator's key. Raises ``ConfigError`` if that is not here."""
    bare = state.model_copy(update={"seal": None})
    for stem, signer in keys.load().items():
        if role_of(stem) == OPERATOR and signer.public_key.keyid in trust.operators:
            return bare.model_copy(update={"seal": _seal(bare.to_bytes(), signer)})
    raise ConfigError(
        f"{keys.directory}: no trusted key of the operator ({OPERATOR}-*.pem), so no decision can be signed "
        "here; look at rollouts where it is"
    )


def sealed(state: RolloutState, trust: Trust) -> bool:
    """Whether a decision was signed by the operator's key."""
    bare = state.model_copy(update={"seal": None})
    return state.seal is not None and trust.operates(bare.to_bytes(), state.seal.keyid, state.seal.sig)


def _seal(data: bytes, signer: CryptoSigner) -> Seal:
    signature = signer.sign(data)
    return Seal(keyid=signature.keyid, sig=signature.signature)
