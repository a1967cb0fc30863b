"""Many episodes: one after the other in this process, or spread by Daft over a Ray cluster.

What is found out about an episode depends on its bytes and the settings alone, so where it was looked at
changes nothing; what compares episodes with each other comes after, in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flywheel.catalogue.engine import load
from flywheel.config import CurateSettings
from flywheel.curate.examine import Candidate, examine
from flywheel.errors import ServiceError, StageError

PARTITION = 8  # episodes: a quarter of a second of work, and a MB of pictures that come back
UNSHARED = "no such directory on a worker: episodes must lie where every worker of the cluster sees them"

OnProgress = Callable[[int, int], None]  # how many are done, of how many


def examine_all(
    directories: Sequence[Path], settings: CurateSettings, on_progress: OnProgress, ray: str = ""
) -> list[Candidate]:
    """``examine`` each, in the order given. ``ray``: address of a cluster (``flywheel.config.Deployment``).

    Raises ``ServiceError`` where the cluster does not answer, ``StageError`` where it lacks the episodes.
    """
    if ray and directories:
        on_progress(0, len(directories))
        found = _on_ray(directories, settings, ray)
        on_progress(len(directories), len(directories))
        return found
    found = []
    for directory in directories:
        found.append(examine(directory, settings))
        on_progress(len(found), len(directories))
    return found


def _on_ray(directories: Sequence[Path], settings: CurateSettings, ray: str) -> list[Candidate]:
    daft = load(ray)
    text = settings.model_dump_json()

    def look(paths: Any) -> list[tuple[str, Candidate]]:
        mine = CurateSettings.model_validate_json(text)
        found = []
        for path in map(Path, paths.to_pylist()):
            if not path.is_dir():
                raise FileNotFoundError(f"{path}: {UNSHARED}")
            found.append((str(path), examine(path, mine)))
        return found

    places = {str(d.resolve()): d for d in directories}
    looked = daft.udf(return_dtype=daft.DataType.python())(look)
    frame = daft.from_pydict({"directory": list(places)})
    frame = frame.into_partitions(-(-len(places) // PARTITION))
    try:
        rows = frame.select(looked(daft.col("directory")).alias("found")).to_pydict()["found"]
    except Exception as e:  # Daft hands on what a worker raised, as whatever Ray made of it
        if UNSHARED in str(e):
            raise StageError(f"{directories[0].parent}: {UNSHARED}") from None
        if not type(e).__module__.startswith(("daft", "ray")):
            raise
        raise ServiceError(f"FLYWHEEL_RAY={ray!r}: examining episodes failed there: {e}") from e
    candidates = dict(rows)
    for path, directory in places.items():
        candidates[path].directory = directory
    return [candidates[str(d.resolve())] for d in directories]
