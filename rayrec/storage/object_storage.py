"""What object storage needs and a disk does not: patience, whole uploads, conditional puts, copies that a node shares.

The S3 client of pyarrow asks again by itself where an answer is an error or does not come, with growing
pauses; here it is told to be more patient than three attempts. An upload that fails all the same is
begun again from the local file. Reads are the client's alone. What is put only where nothing, or a
known version, is there goes through boto3 and Google's client, since pyarrow has no such request.

The local cache holds files that the processes of a node share, memory-mapped: copies of object storage, and what is
made of a release. Each is made once, by the process that comes first, while the others wait. Copies that nobody has
used for some days go when the next one is made.
"""

import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock

from rayrec.compat import s3_options
from rayrec.errors import DamagedArtifactError, InputError, MissingDependencyError, StorageError

CLIENT_ATTEMPTS = 8  # of one request
UPLOAD_ATTEMPTS = 4  # of one file
NOT_FOUND, CONFLICT, PRECONDITION_FAILED = 404, 409, 412  # HTTP
FIRST_PAUSE_SECONDS = 1.0  # between two of them, doubled each time, half of it drawn at random

CACHE_VARIABLE = "RAYREC_CACHE"  # names the folder of the local cache
UNUSED_DAYS = 3.0  # after which a file of it goes
BLOCK = 1 << 22
SMALL = 1 << 20  # bytes of files that are read again sooner than looked up


def require_no_credentials(uri: str) -> None:
    """Raise `InputError` for a URI with a key or password in it, which manifests, logs and dashboards would show."""
    parts = urlsplit(uri)
    user, _, host = parts.netloc.rpartition("@")
    if user and user != "anonymous":  # as which public buckets of gs:// are read
        raise InputError(
            f"{parts.scheme}://...@{host}{parts.path} holds credentials, which manifests and logs would show; name the "
            "bucket alone, and give the role of the machine access, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "in the environment of all nodes"
        )


def patient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same S3 file system with more attempts for a request; any other file system as it is."""
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    known = s3_options(filesystem)
    if not known["proxy_options"].get("host"):
        del known["proxy_options"]
    return pafs.S3FileSystem(**known, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS))


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
        options = s3_options(filesystem)
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


def cache_folder() -> Path:
    """RAYREC_CACHE, else a folder of this user among the temporary files."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"rayrec-cache-{os.getuid()}"


def cached(filesystem: pafs.FileSystem, info: pafs.FileInfo, sha256: str | None = None) -> Path:
    """The local copy of a file of a file system, made where there is none of this version.

    Raises `DamagedArtifactError` where the file is not what `sha256` says; the checksum is taken while it is copied.
    """

    def copy(target: Path) -> None:
        digest = _copy(filesystem, info.path, target)
        made_once(_version(filesystem, info), f"{info.base_name}.sha256", lambda beside: beside.write_text(digest))

    path = made_once(_version(filesystem, info), info.base_name, copy)
    if sha256 is not None and _digest(filesystem, info) != sha256:
        path.unlink(missing_ok=True)
        raise DamagedArtifactError(f"{info.path} does not match its checksum; run its command again with --force")
    return path


def checksum(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    """The sha256 of a file of a file system. Of each version of a large file one process of the node reads it."""
    return _copy(filesystem, info.path, None) if info.size < SMALL else _digest(filesystem, info)


def _digest(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    def read(target: Path) -> None:
        target.write_text(_copy(filesystem, info.path, None))

    return made_once(_version(filesystem, info), f"{info.base_name}.sha256", read).read_text()


def mapped_table(version: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table of a version, in memory that the processes of this node share; `make` makes it where there is none."""

    def write(target: Path) -> None:
        table = make().combine_chunks()
        with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)

    path = made_once(version, "table.arrow", write)
    pa.default_memory_pool().release_unused()  # where it was made here
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def made_once(version: str, name: str, make: Callable[[Path], object]) -> Path:
    """The file of a version that `make` writes to the path it is given, where there is none on this node yet."""
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}-{name}"
    with FileLock(f"{target}.lock"):
        if target.exists():
            os.utime(target)
            return target
        _delete_unused(folder)
        part = target.with_name(f"{target.name}.part")
        make(part)
        part.replace(target)
    return target


def _version(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    return f"{filesystem.type_name}:{info.path}:{info.size}:{info.mtime_ns}"


def _copy(filesystem: pafs.FileSystem, path: str, target: Path | None) -> str:
    """The sha256 of a file, which is copied where there is a target."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as source, (target or Path(os.devnull)).open("wb") as copy:
        while block := source.read(BLOCK):
            digest.update(block)
            copy.write(block)
    return digest.hexdigest()


def _delete_unused(folder: Path) -> None:
    limit = time.time() - UNUSED_DAYS * 86_400
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < limit:
                path.unlink()  # those who have it open keep it
        except FileNotFoundError:
            continue
