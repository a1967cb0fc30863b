"""Back-up and restore of everything that matters: the store, Airflow's database, the turns' experiments, the
fleet's trust anchor; signing keys only where somebody asks for them.

directory   what a back-up is on disk: content by sha256, a manifest for each back-up
order       in which order a store in use is copied so that the copy is consistent
making      copies
restoring   verifies all, then writes
local       what lies beside the store: database, git, keys
"""

from flywheel.backup.directory import Directory
from flywheel.backup.making import Made, make
from flywheel.backup.restoring import Restored, check, restore

__all__ = ["Directory", "Made", "Restored", "check", "make", "restore"]
