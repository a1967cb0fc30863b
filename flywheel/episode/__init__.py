"""Episodes on disk and in the store: seal, read, verify, list, pull, show.

An episode is a directory of three Parquet files and a ``manifest.json``. The manifest is written last and
the directory is renamed into place, so that whatever a crash leaves behind is either a whole episode or
something that no reader takes for one. Once sealed it is never edited.
"""

from flywheel.episode.checks import Problem, Reason, inspect, verify
from flywheel.episode.mending import Repaired, repair
from flywheel.episode.plot import show
from flywheel.episode.sealing import (
    Episode,
    UnknownVersion,
    as_array,
    commit,
    count_gaps,
    fsync_directory,
    in_one,
    new_episode_id,
    parse_manifest,
    prepare,
    prepared,
    read,
    read_manifest,
    seal,
    sweep,
    write_durably,
)
from flywheel.episode.stored import Listed, ls, pull

__all__ = [
    "Episode",
    "Listed",
    "Problem",
    "Reason",
    "Repaired",
    "UnknownVersion",
    "as_array",
    "commit",
    "count_gaps",
    "fsync_directory",
    "in_one",
    "inspect",
    "ls",
    "new_episode_id",
    "parse_manifest",
    "prepare",
    "prepared",
    "pull",
    "read",
    "read_manifest",
    "repair",
    "seal",
    "show",
    "sweep",
    "verify",
    "write_durably",
]
