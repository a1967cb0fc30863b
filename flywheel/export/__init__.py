"""The export stage: a checkpoint becomes one policy bundle, checked against PyTorch before it counts."""

from flywheel.export.stage import ExportResult, export

__all__ = ["ExportResult", "export"]
