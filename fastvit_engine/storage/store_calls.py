"""The calls to obstore, in whichever process they are made; see `store_process` for which one that is.

obstore runs its requests on threads of its own. A process that is forked from one that has used it has none of them,
and every call there waits forever.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import urllib3

from fastvit_engine.errors import UserError
from fastvit_engine.storage.http import HttpSource
from fastvit_engine.storage.source import MAY_PASS, AttemptFailed, BehindEnd, Denied, Exists, Missing, Refused, one_line

CHUNK_BYTES = 1  # at least so many of a reply at once: what has come is kept if the connection breaks
LISTED_AT_ONCE = 1000
PART_BYTES = 2**25  # of an upload; S3 takes 10,000 parts
PARTS_AT_ONCE = 4
_ENVIRONMENT = re.compile(
    r"(AWS|AZURE|GOOGLE|IDENTITY|IMDS|MSI)_\w+|STORAGE_EMULATOR_HOST|HOME|SSL_CERT_\w+|(https?|all|no)_proxy", re.I
)
_STATUS = re.compile(r"status(?: code)?:? (\d{3}) ?([A-Z][\w ]*)?")
_XML_CODE = re.compile(r"<Code>(\w+)</Code>")
_PREFIX = re.compile(r"^Generic \w+ error: (?:Error performing .*? in [\d.]+[mµn]?s(?:, after .*?)? - )?")


class ObjectInfo(NamedTuple):
    """An object, or a common prefix that `Store.list_folder` found."""

    key: str
    size: int  # bytes; 0 of a prefix
    version: str  # changes when the object does; "" of a prefix
    modified: float  # seconds since 1970; 0 of a prefix
    is_folder: bool = False


@dataclass(frozen=True)
class StoreConfig:
    """What a client of a bucket is made from; equal ones share it. Holds secrets, which its repr leaves out."""

    kind: str  # "s3", "gs" or "az"
    root: str  # URL of the bucket
    timeout: float  # seconds without a byte after which an attempt has failed
    retries: int  # attempts after the first
    patience: float  # seconds after which no other attempt begins
    environment: tuple[tuple[str, str], ...] = field(repr=False)  # endpoints and credentials


def relevant_environment() -> tuple[tuple[str, str], ...]:
    """The variables that clients of object stores read."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)))


_environment_lock = threading.Lock()


def adopt_environment(environment: tuple[tuple[str, str], ...]) -> None:
    """Makes the process's variables of object stores those of another process."""
    with _environment_lock:
        wanted = dict(environment)
        for name, _ in relevant_environment():
            if name not in wanted:
                del os.environ[name]
        os.environ.update(wanted)


@lru_cache(256)
def client_of(config: StoreConfig) -> Any:
    """The obstore client, which keeps its connections. Raises UserError if a package for it is missing."""
    try:
        from obstore import store as stores  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise UserError(f"{config.root} cannot be opened without obstore: pip install obstore") from error
    environment = dict(config.environment)
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    client: dict[str, Any] = {
        "timeout": timedelta(days=1),  # a whole transfer; what is slow is for `patience` to judge
        "read_timeout": timedelta(seconds=config.timeout),
        "connect_timeout": timedelta(seconds=min(config.timeout, 10.0)),
    }
    if certificates := environment.get("AWS_CA_BUNDLE") if config.kind == "s3" else None:
        client["root_certificate"] = Path(certificates).read_bytes()
    common: dict[str, Any] = {
        "client_options": client,
        "retry_config": {"max_retries": config.retries, "retry_timeout": timedelta(seconds=config.patience)},
    }
    with _failures(config.timeout):
        if config.kind == "s3":
            client["allow_http"] = endpoint.startswith("http://")
            return stores.S3Store.from_url(
                config.root, **_s3_options(urlsplit(config.root).netloc, environment, endpoint), **common
            )
        if config.kind == "gs":
            options = {}
            if emulator := environment.get("STORAGE_EMULATOR_HOST"):
                base = emulator if "://" in emulator else f"http://{emulator}"
                client["allow_http"] = base.startswith("http://")
                options["service_account_key"] = _EMULATOR_KEY % base.rstrip("/")
            return stores.GCSStore.from_url(config.root, **options, **common)
        client["allow_http"] = environment.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true")
        return stores.AzureStore.from_url(config.root, **common)


_EMULATOR_KEY = (
    '{"gcs_base_url": "%s", "disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}'
)


def _s3_options(bucket: str, environment: dict[str, str], endpoint: str) -> dict[str, Any]:
    """Endpoint, region and credentials, from the variables and files that AWS's own clients read."""
    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    if environment.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes"):
        options["skip_signature"] = True
    elif _has_profile(environment):
        options |= _of_profile()
    if not endpoint and "region" not in options and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & environment.keys():
        region = _region_of(bucket)
        options |= {"region": region} if region else {}
    return options


def _has_profile(environment: dict[str, str]) -> bool:
    """Whether the credentials are to be looked for in files; those of the environment come first, as for AWS."""
    given = {"AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"}
    if (given | {"AWS_CONTAINER_CREDENTIALS_FULL_URI"}) & environment.keys():
        return False
    home = Path(environment.get("HOME", "~")).expanduser() / ".aws"
    files = [
        Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials").expanduser(),
        Path(environment.get("AWS_CONFIG_FILE") or home / "config").expanduser(),
    ]
    return bool(environment.get("AWS_PROFILE")) or any(file.is_file() for file in files)


def _of_profile() -> dict[str, Any]:
    try:
        import boto3  # noqa: PLC0415 - an optional package
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 - which needs it
    except ImportError as error:
        raise Refused(
            "the credentials are in a profile of ~/.aws, which only boto3 reads: pip install boto3, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    session = boto3.Session()
    options: dict[str, Any] = {"region": session.region_name} if session.region_name else {}
    if session.get_credentials() is not None:
        options["credential_provider"] = Boto3CredentialProvider(session)
    return options


_AWS = "https://s3.amazonaws.com"


def _region_of(bucket: str) -> str | None:
    """The region of a bucket, which AWS tells anybody; None if it does not answer."""
    url = f"{_AWS}/{bucket}"
    try:
        answer = HttpSource().pool(urlsplit(url)).request("HEAD", url, redirect=False, retries=False, timeout=5.0)
    except (OSError, urllib3.exceptions.HTTPError):
        return None
    return answer.headers.get("x-amz-bucket-region")


# ---- The calls. Each gives its results one by one, and raises only AttemptFailed, Refused or UserError.


def get(config: StoreConfig, key: str, start: int, stop: int | None) -> Iterator[Any]:
    """First (position of the first byte, bytes of the object, its version), and then the bytes in chunks."""
    import obstore  # noqa: PLC0415 - an optional package

    options: Any = None
    if stop is not None:
        options = {"range": (start, stop)}
    elif start:
        options = {"range": {"offset": start}}
    client = client_of(config)
    with _failures(config.timeout):
        result = obstore.get(client, key, options=options)
        info = _info(result.meta)
        yield result.range[0], info.size, info.version
        for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)


def head(config: StoreConfig, key: str) -> Iterator[ObjectInfo]:
    import obstore  # noqa: PLC0415 - an optional package

    client = client_of(config)
    with _failures(config.timeout):
        yield _info(obstore.head(client, key))


def list_all(config: StoreConfig, prefix: str) -> Iterator[list[ObjectInfo]]:
    """All objects under a folder, at any depth."""
    import obstore  # noqa: PLC0415 - an optional package

    client = client_of(config)
    with _failures(config.timeout):
        for found in obstore.list(client, prefix or None, chunk_size=LISTED_AT_ONCE):
            yield [_info(meta) for meta in found]


def list_folder(config: StoreConfig, prefix: str) -> Iterator[list[ObjectInfo]]:
    """The objects and the folders right in a folder."""
    import obstore  # noqa: PLC0415 - an optional package

    client = client_of(config)
    with _failures(config.timeout):
        found = obstore.list_with_delimiter(client, prefix or None)
        yield [_info(meta) for meta in found["objects"]]
        yield [ObjectInfo(folder, 0, "", 0.0, is_folder=True) for folder in found["common_prefixes"]]


def put(config: StoreConfig, key: str, content: bytes, create: bool) -> Iterator[None]:
    import obstore  # noqa: PLC0415 - an optional package

    client = client_of(config)
    with _failures(config.timeout):
        obstore.put(client, key, content, mode="create" if create else "overwrite", use_multipart=False)
    yield from ()


def put_stream(config: StoreConfig, key: str, chunks: Iterator[Any]) -> Iterator[None]:
    """Uploads in parts; the object appears when the last has arrived."""
    import obstore  # noqa: PLC0415 - an optional package

    client = client_of(config)
    with _failures(config.timeout):
        obstore.put(client, key, chunks, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
    yield from ()


def delete(config: StoreConfig, keys: list[str]) -> Iterator[None]:
    import obstore  # noqa: PLC0415 - an optional package

    client = client_of(config)
    with _failures(config.timeout):
        obstore.delete(client, keys)
    yield from ()


CALLS: dict[str, Callable[..., Iterator[Any]]] = {
    call.__name__: call for call in (get, head, list_all, list_folder, put, put_stream, delete)
}


def _info(meta: Any) -> ObjectInfo:
    modified = meta["last_modified"]
    return ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or modified.isoformat(), modified.timestamp())


@contextmanager
def _failures(timeout: float) -> Iterator[None]:
    """Turns errors of obstore into AttemptFailed or Refused."""
    try:
        yield
    except (AttemptFailed, Refused, UserError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise Missing from error
    except Exception as error:
        raise _translated(error, timeout) from error


def _translated(error: Exception, timeout: float) -> Exception:
    text, kind = str(error).replace("\n", " "), type(error).__name__
    status, code = _STATUS.search(text), _XML_CODE.search(text)
    reason = one_line(_PREFIX.sub("", text.partition(" Debug source:")[0]))[:300]
    if status:
        reason = f"HTTP {status[1]} {code[1] if code else status[2] or ''}".strip()
    number = int(status[1]) if status else 0
    if kind == "NotFoundError" or number == 404:
        return Missing()
    if kind == "AlreadyExistsError":
        return Exists()
    if number == 416:
        return BehindEnd("the range lies behind the end")
    if "169.254." in text or "Missing credentials" in text or "metadata.google.internal" in text:
        return Refused(
            "no credentials were found: set those of the store, or AWS_SKIP_SIGNATURE=true if its objects are public"
        )
    if "without LOCATION" in text or (code and code[1] == "PermanentRedirect"):
        return Refused("the bucket is in another region: set AWS_REGION to that")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or number in (401, 403):
        return Denied(f"access is denied: {reason}")
    if kind in _FINAL or (300 <= number < 500 and number not in MAY_PASS):
        return Refused(reason)
    if not status and re.search(r"timed? ?out", text, re.I):
        return AttemptFailed(f"no answer for {timeout:g} seconds")
    return AttemptFailed(reason)


_FINAL = {
    "ConfigParseError",
    "InvalidPathError",
    "NotSupportedError",
    "PartialCredentialsError",
    "PreconditionError",
    "ProfileNotFound",
    "UnknownConfigurationKeyError",
    "ValueError",
}
