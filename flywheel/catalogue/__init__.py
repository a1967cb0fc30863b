"""The catalogue: a row for every episode in the store, so that a question is a columnar scan.

``ingest`` reads each manifest once and appends its row to Parquet parts in the store; ``select`` asks them.
The catalogue is derived from the manifests and holds nothing of its own: it can always be made anew.
"""

from flywheel.catalogue.engine import select
from flywheel.catalogue.ingesting import Ingested, ingest
from flywheel.catalogue.ledger import Version, newest
from flywheel.catalogue.rows import COLUMNS, Refused

__all__ = ["COLUMNS", "Ingested", "Refused", "Version", "ingest", "newest", "select"]
