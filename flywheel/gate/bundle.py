"""Is a candidate complete, does it run, and does it fit the robots that run the current policy?"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from flywheel.errors import FlywheelError
from flywheel.robot import Image
from flywheel.schema import BUNDLE_FILES, Bundle, Check, Verdict, bundle_digest

# What the robot's cameras, state vector, joints and clock expect of any policy.
SIGNATURE = ("cameras", "image_hw", "state_names", "action_names", "action_space", "step_ns")
_BAR = "complete; runs; same cameras, state, actions, step and limits as the current policy; another policy"


def incomplete(directory: Path) -> str:
    """What a bundle lacks; "" if all files are there."""
    missing = [n for n in BUNDLE_FILES if not (directory / n).is_file()]
    return f"no policy bundle: {', '.join(missing)} missing" if missing else ""


def check(candidate: Path, current: Path, twin_digest: str = "") -> Check:
    """A mismatch or a bundle that does not run is proven unfit: roll back. An unknown fact holds.

    ``twin_digest`` names the twin in which the other checks run; it is part of the evidence.

    ``value`` counts the objections, ``n`` the facts that were compared.
    """
    broken: list[str] = []
    unknown: list[str] = []
    old = _read(current)
    new = incomplete(candidate) or _read(candidate)
    if isinstance(old, str):
        unknown.append(f"current policy: {old}")
    if isinstance(new, str):
        broken.append(new)
    elif isinstance(old, Bundle):
        broken += _misfits(old, new)
        if not (new.limits_sha256 and old.limits_sha256):
            unknown.append("limits_sha256 is empty: unknown under which safety limits the policy was trained")
    if not broken:
        broken += [problem] if (problem := _does_not_run(candidate)) else []
    if not broken and bundle_digest(candidate) == bundle_digest(current):
        unknown.append("the candidate is the current policy: there is nothing to promote")
    verdict = Verdict.ROLL_BACK if broken else Verdict.HOLD if unknown else Verdict.PROMOTE
    return Check(
        name="bundle",
        verdict=verdict,
        value=float(len(broken) + len(unknown)),
        bar=_BAR,
        n=len(SIGNATURE) + 4,  # and limits, execute, a run, and that it is another policy
        evidence={"twin_digest": twin_digest}
        | ({"reason": "; ".join(broken + unknown)} if broken or unknown else {}),
    )


def _misfits(old: Bundle, new: Bundle) -> list[str]:
    """Where ``new`` does not fit the robots that run ``old``."""
    out = []
    for field in SIGNATURE:
        was, now = getattr(old, field), getattr(new, field)
        if was != now:
            out.append(f"{field} is {_show(now)}, the robots expect {_show(was)}")
    if new.limits_sha256 and old.limits_sha256 and new.limits_sha256 != old.limits_sha256:
        out.append(f"limits_sha256 is {new.limits_sha256[:12]}, the robots have {old.limits_sha256[:12]}")
    if not 1 <= new.execute <= new.chunk:
        out.append(f"execute is {new.execute}, of a chunk of {new.chunk}")
    return out


def _read(directory: Path) -> Bundle | str:
    """``policy.json``, or what is wrong with it."""
    try:
        return Bundle.model_validate_json((directory / "policy.json").read_bytes())
    except ValidationError as e:
        first = e.errors()[0]
        return f"policy.json: {'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}"
    except OSError as e:
        return f"policy.json: cannot be read: {e.strerror}"


def _does_not_run(directory: Path) -> str:
    """Load it as a robot does and run it once; "" if that gives actions of the promised shape, all finite."""
    import numpy as np

    from flywheel.edge.policy import Policy

    try:
        policy = Policy.load(directory)
        b = policy.bundle
        images: dict[str, Image] = {c: np.zeros((*b.image_hw, 3), np.uint8) for c in b.cameras}
        actions = policy.infer(images, np.zeros(len(b.state_names), np.float32), "pick").actions
    except FlywheelError as e:
        return str(e)
    return "" if np.isfinite(actions).all() else "gives actions that are not finite"


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
