"""What object storage needs and a disk does not: patience with answers that fail, whole uploads, conditional puts.

The S3 client of pyarrow asks again by itself where an answer is an error or does not come, with growing
pauses; here it is told to be more patient than three attempts. An upload that fails all the same is
begun again from the local file. Reads are the client's alone. What is put only where nothing, or a
known version, is there goes through boto3 and Google's client, since pyarrow has no such request.
"""

import random
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from rayrec.errors import InputError, MissingDependencyError, StorageError

CLIENT_ATTEMPTS = 8  # of one request
UPLOAD_ATTEMPTS = 4  # of one file
NOT_FOUND, CONFLICT, PRECONDITION_FAILED = 404, 409, 412  # HTTP
FIRST_PAUSE_SECONDS = 1.0  # between two of them, doubled each time, half of it drawn at random


def patient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same S3 file system with more attempts for a request; any other file system as it is."""
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    known = _options(filesystem)
    if not known["proxy_options"].get("host"):
        del known["proxy_options"]
    return pafs.S3FileSystem(**known, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS))


def _options(filesystem: pafs.S3FileSystem) -> dict[str, Any]:
    """What a URI came to: pickling is the one place where pyarrow tells it."""
    _, (options,) = filesystem.__reduce__()
    return {name: value for name, value in options.items() if value not in ("", -1.0)}


class ConditionalWriter(Protocol):
    """Writes objects under a condition. Paths are `bucket/key`."""

    def create(self, path: str, content: bytes) -> bool:
        """Write an object where there is none; false where there is one."""
        ...

    def read(self, path: str) -> tuple[bytes, str]:
        """An object's content and version; empty where there is none."""
        ...

    def replace(self, path: str, content: bytes, version: str) -> bool:
        """Write an object over a known version; false where it is another one by now, or gone."""
        ...


def conditional_writer(filesystem: pafs.FileSystem) -> ConditionalWriter:
    """The writer for a file system of pyarrow. Raises `InputError` for one that has no conditional put."""
    if isinstance(filesystem, pafs.S3FileSystem):
        return _S3Writer(filesystem)
    if isinstance(filesystem, pafs.GcsFileSystem):
        return GcsWriter()
    raise InputError(
        f"a workspace on {filesystem.type_name} cannot be locked; give a local path, s3://bucket/prefix or "
        "gs://bucket/prefix"
    )


class _S3Writer:
    """By the entity tag of an object."""

    def __init__(self, filesystem: pafs.S3FileSystem) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise MissingDependencyError(
                "a workspace on s3:// is locked through boto3, which is not installed; run pip install 'rayrec[aws]'"
            ) from error
        options = _options(filesystem)
        endpoint = options.get("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=options.get("region"),
            aws_access_key_id=options.get("access_key"),
            aws_secret_access_key=options.get("secret_key"),
            aws_session_token=options.get("session_token"),
            config=Config(retries={"max_attempts": CLIENT_ATTEMPTS, "mode": "standard"}),
        )

    def create(self, path: str, content: bytes) -> bool:
        """Write an object where there is none."""
        return self._put(path, content, {"IfNoneMatch": "*"})

    def replace(self, path: str, content: bytes, version: str) -> bool:
        """Write an object over a known version."""
        return self._put(path, content, {"IfMatch": version})

    def read(self, path: str) -> tuple[bytes, str]:
        """An object's content and version."""
        from botocore.exceptions import ClientError

        bucket, _, key = path.partition("/")
        try:
            answer = self._client.get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if _status(error) == NOT_FOUND:
                return b"", ""
            raise _failed(path, error) from error
        return answer["Body"].read(), answer["ETag"]

    def _put(self, path: str, content: bytes, condition: dict[str, str]) -> bool:
        from botocore.exceptions import ClientError

        bucket, _, key = path.partition("/")
        try:
            self._client.put_object(Bucket=bucket, Key=key, Body=content, **condition)
        except ClientError as error:
            if _status(error) in (NOT_FOUND, CONFLICT, PRECONDITION_FAILED):
                return False
            raise _failed(path, error) from error
        return True


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class GcsWriter:
    """By the generation of an object. `http` takes the place of the client's own, in tests."""

    def __init__(self, http: Any = None) -> None:
        try:
            from googleapiclient.discovery import build
        except ImportError as error:
            raise MissingDependencyError(
                "a workspace on gs:// is locked through Google's client, which is not installed; run "
                "pip install 'rayrec[gcp]'"
            ) from error
        self._objects = build("storage", "v1", http=http, cache_discovery=False).objects()

    def create(self, path: str, content: bytes) -> bool:
        """Write an object where there is none."""
        return self._put(path, content, 0)

    def replace(self, path: str, content: bytes, version: str) -> bool:
        """Write an object over a known generation."""
        return self._put(path, content, int(version))

    def read(self, path: str) -> tuple[bytes, str]:
        """An object's content and generation."""
        from googleapiclient.errors import HttpError

        bucket, _, name = path.partition("/")
        try:
            known = self._objects.get(bucket=bucket, object=name).execute(num_retries=CLIENT_ATTEMPTS)
            generation = known["generation"]
            content = self._objects.get_media(bucket=bucket, object=name, generation=generation)
            return content.execute(num_retries=CLIENT_ATTEMPTS), generation
        except HttpError as error:
            if error.resp.status == NOT_FOUND:
                return b"", ""
            raise _failed(path, error) from error

    def _put(self, path: str, content: bytes, generation: int) -> bool:
        from googleapiclient.errors import HttpError
        from googleapiclient.http import MediaInMemoryUpload

        bucket, _, name = path.partition("/")
        media = MediaInMemoryUpload(content, mimetype="application/json")
        request = self._objects.insert(bucket=bucket, name=name, media_body=media, ifGenerationMatch=generation)
        try:
            request.execute(num_retries=CLIENT_ATTEMPTS)
        except HttpError as error:
            if error.resp.status in (NOT_FOUND, PRECONDITION_FAILED):
                return False
            raise _failed(path, error) from error
        return True


def _failed(path: str, error: Exception) -> StorageError:
    return StorageError(f"{path} could not be read or written: {error}; run again once the storage answers")


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
