"""What object storage needs and a disk does not: patience with answers that fail, and whole uploads.

The S3 client of pyarrow asks again by itself where an answer is an error or does not come, with growing
pauses; here it is told to be more patient than three attempts. An upload that fails all the same is
begun again from the local file. Reads are the client's alone.
"""

import random
import shutil
import time
from pathlib import Path

import pyarrow.fs as pafs

from rayrec.errors import StorageError

CLIENT_ATTEMPTS = 8  # of one request
UPLOAD_ATTEMPTS = 4  # of one file
FIRST_PAUSE_SECONDS = 1.0  # between two of them, doubled each time, half of it drawn at random


def patient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same S3 file system with more attempts for a request; any other file system as it is."""
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    # A URI cannot say it, and pickling is the one place where pyarrow tells what a URI came to.
    _, (options,) = filesystem.__reduce__()
    known = {name: value for name, value in options.items() if value not in ("", -1.0)}
    if not known["proxy_options"].get("host"):
        del known["proxy_options"]
    return pafs.S3FileSystem(**known, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS))


def upload(filesystem: pafs.FileSystem, local: Path, target: str) -> None:
    """Put a local file under a name, whole or not at all. Raises `StorageError` where the storage goes on failing."""
    for attempt in range(UPLOAD_ATTEMPTS):
        try:
            with local.open("rb") as source, filesystem.open_output_stream(target) as stream:
                shutil.copyfileobj(source, stream, 1 << 22)
            return
        except OSError as error:
            if attempt + 1 == UPLOAD_ATTEMPTS:
                raise StorageError(
                    f"{target} was not written in {UPLOAD_ATTEMPTS} attempts: {error}; "
                    "run the command again later: completed work is kept"
                ) from error
        time.sleep(FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.0))
