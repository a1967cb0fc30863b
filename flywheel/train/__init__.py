"""The train stage: lerobot's own training loop, from the current policy, on corrections and replay.

``loop`` runs lerobot's loop on data in memory; ``ranks`` runs it in several processes by lerobot's own use of
accelerate; ``stage`` makes a portable checkpoint of it.
"""

from flywheel.train.stage import OnProgress, TrainResult, train, write_metrics

__all__ = ["OnProgress", "TrainResult", "train", "write_metrics"]
