"""Joins parts of the histories: the files that a bucket has in several parts become one."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from rayrec.data.dataset import Dataset
from rayrec.data.parts import read_files, with_columns
from rayrec.importing.staging import Staging, write_histories
from rayrec.storage.workspace import histories_file

USERS_PER_READ = 5_000
PARTS_BEFORE_COMPACT = 8  # above them, reading takes noticeably more requests

Spans = list[tuple[int, int]]  # first and last part of each set of files


def joined_spans(parts: int, cuts: Iterable[int]) -> Spans:
    """Parts from 0 up to `parts` as few spans: parts stay apart at `cuts`, from where something goes on reading."""
    bounds = sorted({0, parts, *(cut for cut in cuts if 0 < cut < parts)})
    return [(first, after - 1) for first, after in pairwise(bounds)]


class BucketJoiner:
    """Writes the files of one bucket for some spans of parts at a time."""

    def __init__(self, staging: Staging, dataset: Dataset, spans: Sequence[tuple[int, int]]) -> None:
        self.staging, self.dataset, self.spans = staging, dataset, spans

    def __call__(self, bucket: int) -> tuple[int, dict[str, str]]:
        """Write the files of one bucket, then note that it is done; the bucket, and path -> sha256."""
        files = {}
        for first, last in self.spans:
            path = histories_file(first, bucket, last)
            earlier = self.dataset.manifest.histories_files(bucket, first, last + 1)
            batches = (
                with_columns(
                    histories,
                    contexts=bool(self.dataset.manifest.contexts),
                    skipped=self.dataset.manifest.has_skipped,
                )
                for histories in read_files(self.dataset.workspace, earlier, USERS_PER_READ)
            )
            files[path] = write_histories(self.dataset.workspace, self.staging.out(path), batches)
        self.dataset.workspace.write_json(self.staging.bucket_file(bucket), files)
        return bucket, files
