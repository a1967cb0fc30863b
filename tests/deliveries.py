"""The bundles, publishers and robots that rehearsals use, for the tests."""

from flywheel.rehearsal.deliveries import Clock, failing, make_bundle, robot, stable, upload, warm_up

__all__ = ["Clock", "failing", "make_bundle", "robot", "stable", "upload", "warm_up"]
