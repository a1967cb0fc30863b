"""The error tree.

FlywheelError                 anything a user can act on; the CLI prints it as one line and exits 1
├── ConfigError               a setting, params.yaml key or limits file is wrong
├── EpisodeError              an episode, frame table or manifest is malformed
├── BundleError               a policy bundle is missing, malformed or does not match its digest
├── StoreError                the object store did not do what was asked
│   ├── StoreUnavailable      unreachable, timed out or 5xx: try again later
│   ├── StoreRefused          401/403 or over-size: a person must act
│   ├── NotFound              no object has that key
│   ├── Conflict              a conditional write lost the race
│   └── IntegrityError        bytes differ from their recorded sha256
├── ReleaseError              a release failed verification (signature, expiry, roll-back, length)
├── StageError                a stage cannot go on: its input is missing, empty or inconclusive
└── ServiceError              an embedded service (store, Airflow) did not start or stop
"""

from __future__ import annotations


class FlywheelError(Exception):
    """Root of every error that a user can act on."""


class ConfigError(FlywheelError):
    """A setting is missing, unknown or out of range."""


class EpisodeError(FlywheelError):
    """An episode does not satisfy its contract."""


class BundleError(FlywheelError):
    """A policy bundle is missing, malformed or not the one that was named."""


class StoreError(FlywheelError):
    """The object store did not do what was asked."""


class StoreUnavailable(StoreError):
    """The store is unreachable, timed out or answered 5xx."""


class StoreRefused(StoreError):
    """The store refused the request: credentials, policy or size."""


class NotFound(StoreError):
    """No object has that key."""


class Conflict(StoreError):
    """A conditional write found that somebody else wrote first."""


class IntegrityError(StoreError):
    """Bytes differ from their recorded sha256."""


class ReleaseError(FlywheelError):
    """A release did not verify."""


class StageError(FlywheelError):
    """A stage's input is missing, empty or inconclusive."""


class ServiceError(FlywheelError):
    """An embedded service did not start or stop."""
