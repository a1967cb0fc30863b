"""The bucket in memory that rehearsals use, for the tests."""

from flywheel.rehearsal.bucket import Bucket, BucketStore, Killed

__all__ = ["Bucket", "BucketStore", "Killed"]
