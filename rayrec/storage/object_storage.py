"""Object storage: retries, whole uploads, conditional puts, and the local cache that the processes of a node share.

The S3 client of pyarrow retries a request that fails or gets no answer, with growing pauses; here it gets more than the
default of three attempts. An upload that still fails starts again from the local file. Reads have only the retries of
the client. Conditional puts, which write an object only if it does not exist or has a known version, use boto3 and
Google's client, since pyarrow has no such request.

The local cache holds files that the processes of a node share by memory mapping: copies of objects, and data prepared
from a release. The first process that needs a file makes it, while the others wait. Files that were not used for some
days are deleted when the next file is made; if the disk is full, those that were not used for an hour. Files that a
process has mapped, such as those of a live release, are kept: to delete them would free no space.
"""

import errno
import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock

from rayrec.compat import s3_options
from rayrec.errors import DamagedArtifactError, InputError, MissingDependencyError, StorageError, first_line

CLIENT_ATTEMPTS = 8  # per request
UPLOAD_ATTEMPTS = 4  # per file
NOT_FOUND, CONFLICT, PRECONDITION_FAILED = 404, 409, 412  # HTTP
FIRST_PAUSE_SECONDS = 1.0  # longest pause after the first upload attempt, doubled each time; at random 0.5 to 1 of it

CACHE_VARIABLE = "RAYREC_CACHE"  # environment variable with the folder of the local cache
UNUSED_DAYS = 3.0  # days after its last use at which a cached file is deleted
UNUSED_DAYS_ON_FULL_DISK = 1 / 24  # the same where the disk has no space for another file
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk
RIGHTS = (  # of object storage that a workspace needs
    "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject on the bucket, or storage.objectAdmin on gs://"
)
BLOCK = 1 << 22
SMALL = 1 << 20  # bytes below which a file is read again, since that is faster than a look-up in the cache


def without_secrets(uri: str) -> str:
    """Return a URI as messages may show it, with `...` for its user, its password and the values of its options.

    A password may contain `/`, `?` or `#`, so all text up to the last `@` counts as user and password.
    """
    scheme, separator, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    credentials, _, location = rest.rpartition("@")
    path, mark, options = location.partition("?")
    shown_options = "&".join(f"{option.partition('=')[0]}=..." for option in options.split("&")) if options else ""
    return f"{scheme}{separator}{'...@' if credentials else ''}{path}{mark}{shown_options}"


def require_no_credentials(uri: str, noun: str) -> None:
    """Raise `InputError` for a URI with a key or password, which manifests, logs and dashboards would show.

    `noun` names the URI in the error.
    """
    credentials, _, _ = uri.partition("://")[2].rpartition("@")
    host, slash, _ = credentials.partition("/")
    is_in_path = slash and ":" not in host and "?" not in credentials  # the @ is a character of a file's name
    if credentials and not is_in_path and credentials != "anonymous":  # public buckets of gs:// are read as this user
        raise InputError(
            f"{noun} {without_secrets(uri)} contains credentials, which manifests and logs would show; "
            "remove them from the URI and give the machine's role access, or set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment of all nodes"
        )


def open_uri(uri: str, noun: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI and the path there; `noun` names the URI in errors.

    Raises `InputError` for a URI that pyarrow cannot open and, as `require_no_credentials`, for one with a password.
    """
    require_no_credentials(uri, noun)
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        reason = "" if isinstance(error, pa.ArrowInvalid) else f": {first_line(error)}"  # the parser's text has the URI
        raise InputError(
            f"{noun} {without_secrets(uri)} cannot be opened{reason}; expected a local path, s3://bucket/prefix or "
            "gs://bucket/prefix, with special characters percent-encoded and only options of pyarrow after `?`"
        ) from None
    return filesystem, path


def patient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """Return an S3 file system with more attempts per request; any other file system unchanged."""
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    options = s3_options(filesystem)
    if not options["proxy_options"].get("host"):
        del options["proxy_options"]
    return pafs.S3FileSystem(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=CLIENT_ATTEMPTS))


class ConditionalWriter(Protocol):
    """Writes objects under a condition. Paths are `bucket/key`."""

    def create(self, path: str, content: bytes) -> bool:
        """Write an object if it does not exist; otherwise return False.

        Raises `InputError` if the bucket does not exist.
        """
        ...

    def read(self, path: str) -> tuple[bytes, str]:
        """Return the content and version of an object; both are empty if it does not exist."""
        ...

    def replace(self, path: str, content: bytes, version: str) -> bool:
        """Replace the given version of an object; return False if it has another version now or does not exist."""
        ...


def conditional_writer(filesystem: pafs.FileSystem) -> ConditionalWriter:
    """Return the writer for a file system of pyarrow. Raises `InputError` for one without conditional puts."""
    if isinstance(filesystem, pafs.S3FileSystem):
        return _S3Writer(filesystem)
    if isinstance(filesystem, pafs.GcsFileSystem):
        return GcsWriter()
    raise InputError(
        f"a workspace on {filesystem.type_name} cannot be locked; give a local path, s3://bucket/prefix or "
        "gs://bucket/prefix"
    )


class _S3Writer:
    """Conditional writes to S3. The version of an object is its entity tag."""

    def __init__(self, filesystem: pafs.S3FileSystem) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise MissingDependencyError(
                "locking a workspace on s3:// needs boto3, which is not installed; run pip install 'rayrec[aws]'"
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
        """Write an object if it does not exist."""
        return self._put(path, content, {"IfNoneMatch": "*"})

    def replace(self, path: str, content: bytes, version: str) -> bool:
        """Replace the given version of an object."""
        return self._put(path, content, {"IfMatch": version})

    def read(self, path: str) -> tuple[bytes, str]:
        """Return the content and entity tag of an object."""
        from botocore.exceptions import ClientError

        bucket, _, key = path.partition("/")
        try:
            response = self._client.get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if _status(error) == NOT_FOUND:
                return b"", ""
            raise storage_error(path, error) from error
        return response["Body"].read(), response["ETag"]

    def _put(self, path: str, content: bytes, condition: dict[str, str]) -> bool:
        from botocore.exceptions import ClientError

        bucket, _, key = path.partition("/")
        try:
            self._client.put_object(Bucket=bucket, Key=key, Body=content, **condition)
        except ClientError as error:
            if _status(error) == NOT_FOUND and "IfNoneMatch" in condition:
                raise _no_bucket_error(bucket) from error
            if _status(error) in (NOT_FOUND, CONFLICT, PRECONDITION_FAILED):
                return False
            raise storage_error(path, error) from error
        return True


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class GcsWriter:
    """Conditional writes to Google Cloud Storage. The version of an object is its generation.

    `http` replaces the HTTP client in tests.
    """

    def __init__(self, http: Any = None) -> None:
        try:
            from googleapiclient.discovery import build
        except ImportError as error:
            raise MissingDependencyError(
                "locking a workspace on gs:// needs Google's client, which is not installed; run "
                "pip install 'rayrec[gcp]'"
            ) from error
        self._objects = build("storage", "v1", http=http, cache_discovery=False).objects()

    def create(self, path: str, content: bytes) -> bool:
        """Write an object if it does not exist."""
        return self._put(path, content, 0)

    def replace(self, path: str, content: bytes, version: str) -> bool:
        """Replace the given generation of an object."""
        return self._put(path, content, int(version))

    def read(self, path: str) -> tuple[bytes, str]:
        """Return the content and generation of an object."""
        from googleapiclient.errors import HttpError

        bucket, _, name = path.partition("/")
        try:
            metadata = self._objects.get(bucket=bucket, object=name).execute(num_retries=CLIENT_ATTEMPTS)
            generation = metadata["generation"]
            content = self._objects.get_media(bucket=bucket, object=name, generation=generation)
            return content.execute(num_retries=CLIENT_ATTEMPTS), generation
        except HttpError as error:
            if error.resp.status == NOT_FOUND:
                return b"", ""
            raise storage_error(path, error) from error

    def _put(self, path: str, content: bytes, generation: int) -> bool:
        from googleapiclient.errors import HttpError
        from googleapiclient.http import MediaInMemoryUpload

        bucket, _, name = path.partition("/")
        media = MediaInMemoryUpload(content, mimetype="application/json")
        request = self._objects.insert(bucket=bucket, name=name, media_body=media, ifGenerationMatch=generation)
        try:
            request.execute(num_retries=CLIENT_ATTEMPTS)
        except HttpError as error:
            if error.resp.status == NOT_FOUND and not generation:
                raise _no_bucket_error(bucket) from error
            if error.resp.status in (NOT_FOUND, PRECONDITION_FAILED):
                return False
            raise storage_error(path, error) from error
        return True


def storage_error(path: str, error: Exception) -> StorageError:
    """Return the error to raise after an error of a client of object storage; it names the missing rights if any."""
    text = str(error).lower().replace("_", "")
    is_denied = any(word in text for word in ("accessdenied", "permissiondenied", "forbidden", "httperror 403"))
    advice = (
        f"give this machine's role {RIGHTS}" if is_denied else "run the command again when the storage is available"
    )
    return StorageError(f"{path} could not be read or written: {first_line(error)}; {advice}")


def _no_bucket_error(bucket: str) -> InputError:
    return InputError(f"bucket {bucket} does not exist; create it, or correct the workspace's URI")


def upload(filesystem: pafs.FileSystem, local: Path, target: str) -> None:
    """Copy a local file to `target`, completely or not at all.

    Raises `StorageError` if the storage keeps failing.
    """
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
    """Return the folder of the local cache: RAYREC_CACHE, or else a folder of this user below the temporary folder."""
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder) if folder else Path(tempfile.gettempdir()) / f"rayrec-cache-{os.getuid()}"


def cached(filesystem: pafs.FileSystem, info: pafs.FileInfo, sha256: str | None = None) -> Path:
    """Return the path of the local copy of a file; the copy is made if there is none of this version.

    A copy has the size and the time of the file. One that was cut off or changed has others, and is made again; until
    then the other processes can open it.

    Raises `DamagedArtifactError` if the checksum of the file is not `sha256`. The checksum is computed during the copy.
    """

    def copy(target: Path) -> None:
        digest = _copy(filesystem, info.path, target)
        os.utime(target, ns=(time.time_ns(), info.mtime_ns or 0))
        cached_file(
            _version(filesystem, info),
            f"{info.base_name}.sha256",
            lambda checksum_path: checksum_path.write_text(digest),
            is_whole=lambda checksum_path: checksum_path.read_text() == digest,
        )

    path = cached_file(
        _version(filesystem, info), info.base_name, copy, is_whole=lambda copy_path: _is_copy_of(copy_path, info)
    )
    if sha256 is not None and _digest(filesystem, info) != sha256:
        # The bytes may have been damaged on their way here: the next copy gets a checksum of its own.
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
        raise DamagedArtifactError(
            f"{info.path} does not match its checksum; rerun the command that created it with --force"
        )
    return path


def _is_copy_of(path: Path, info: pafs.FileInfo) -> bool:
    """Return True if a copy has the size and the time of the file, in seconds, since not all disks keep fractions."""
    state = path.stat()
    return state.st_size == info.size and state.st_mtime_ns // 10**9 == (info.mtime_ns or 0) // 10**9


def checksum(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    """Return the sha256 of a file. Only one process of the node reads a version of a large file."""
    return _copy(filesystem, info.path, None) if info.size < SMALL else _digest(filesystem, info)


def _digest(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    """Return the cached sha256 of a file; the file is read if there is none of this version."""

    def write_digest(target: Path) -> None:
        target.write_text(_copy(filesystem, info.path, None))

    return cached_file(_version(filesystem, info), f"{info.base_name}.sha256", write_digest).read_text()


def mapped_table(version: str, make: Callable[[], pa.Table]) -> pa.Table:
    """Return the table cached as `version`, in memory that the processes of this node share.

    `make` makes the table if it is not in the cache.
    """

    def write_table(target: Path) -> None:
        table = make().combine_chunks()
        with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)

    path = cached_file(version, "table.arrow", write_table)
    pa.default_memory_pool().release_unused()  # memory in which this process may have made the table
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def cached_file(
    version: str, name: str, make: Callable[[Path], object], is_whole: Callable[[Path], bool] = Path.exists
) -> Path:
    """Return the path of the file cached as `version` and `name`; if it does not exist, `make` writes it first.

    A file for which `is_whole` is false is made again and then replaced: processes that have it open keep it. Only one
    process at a time checks and makes a file.

    Raises `StorageError` if the disk is full, and leaves no incomplete file there.
    """
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}-{name}"
    with FileLock(f"{target}.lock"):
        with suppress(FileNotFoundError):  # never made, or deleted meanwhile by a process that needs space
            if is_whole(target):
                os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
                return target
        _delete_unused(folder, UNUSED_DAYS)
        try:
            return _make_file(target, make)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRORS:
                raise
        _delete_unused(folder, UNUSED_DAYS_ON_FULL_DISK)
        try:
            return _make_file(target, make)
        except OSError as error:
            raise StorageError(
                f"no space left for {name} in the cache {folder}: {error}; free some space there, or set "
                f"{CACHE_VARIABLE} to a folder on a larger disk, and run the command again"
            ) from error


def _make_file(target: Path, make: Callable[[Path], object]) -> Path:
    """Return `target`, which `make` has written as a whole; after an error no part of it is left."""
    partial_path = target.with_name(f"{target.name}.part")
    try:
        make(partial_path)
        with partial_path.open("rb") as file:
            os.fsync(file.fileno())  # a power cut after the rename leaves a whole file
        return partial_path.replace(target)
    finally:
        partial_path.unlink(missing_ok=True)


def _version(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    return f"{filesystem.type_name}:{info.path}:{info.size}:{info.mtime_ns}"


def _copy(filesystem: pafs.FileSystem, path: str, target: Path | None) -> str:
    """Return the sha256 of a file, and copy the file if `target` is given."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as source, (target or Path(os.devnull)).open("wb") as output:
        while block := source.read(BLOCK):
            digest.update(block)
            output.write(block)
    return digest.hexdigest()


def _delete_unused(folder: Path, days: float) -> None:
    """Delete files that were last read or written some days ago and that no process maps; locks after 3 days."""
    unused_paths: list[Path] = []
    for path in folder.iterdir():
        limit = time.time() - (UNUSED_DAYS if path.suffix == ".lock" else days) * 86_400
        with suppress(FileNotFoundError):
            state = path.stat()
            if max(state.st_atime, state.st_mtime) < limit:  # writing a file leaves its time of access
                unused_paths.append(path)
    mapped_paths = _mapped_paths() if unused_paths else set()
    for path in unused_paths:
        if str(path) not in mapped_paths:
            path.unlink(missing_ok=True)  # processes that have the file open keep it


def _mapped_paths() -> set[str]:
    """Return the paths of the files that processes of this user and machine have mapped; none without /proc."""
    paths: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # of another user, or of a process that has ended
            paths.update(line.split(maxsplit=5)[-1] for line in maps.read_text(errors="replace").splitlines())
    return paths
