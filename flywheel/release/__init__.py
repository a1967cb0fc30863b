"""Signed releases: a TUF repository under ``releases/`` in the store (The Update Framework 1.0, python-tuf).

repository  what lies there, read and verified from the trusted root
publisher   signs and publishes: crash-safe, race-safe
ceremony    changes of keys: rotation, revocation, approvers, thresholds
"""

from flywheel.release.publisher import Publisher
from flywheel.release.repository import BlobInfo, BundleIndex, Reader, State, Trust

__all__ = ["BlobInfo", "BundleIndex", "Publisher", "Reader", "State", "Trust"]
