"""The fleet that only reports, for the tests."""

from flywheel.rehearsal.reporting import ROBOTS, ReportingFleet

__all__ = ["ROBOTS", "ReportingFleet"]
