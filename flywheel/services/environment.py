"""The store and the publisher that this process's environment names; the embedded ones if it names none."""

from __future__ import annotations

from flywheel.config import Deployment
from flywheel.release import Publisher
from flywheel.store import Store


def store() -> Store:
    """The store; ``StoreError`` says how to start the embedded one if it is not up."""
    return Store.from_env(Deployment.from_env())


def publisher() -> Publisher:
    """What signs releases, with the keys of this machine."""
    deployment = Deployment.from_env()
    return Publisher(Store.from_env(deployment), deployment.home / "keys")
