"""flywheel: a continuous-learning data flywheel service for robot fleets."""

__version__ = "0.1.0"
