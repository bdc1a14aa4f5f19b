"""The door to object stores: list, fetch, put and delete whole objects, with errors that say what to do.

fsspec's file systems do the work, and repeat what fails for a moment. They find credentials where the store's own tools
do, in the environment; no message has more of an error than its code.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from extract.config import ProblemsError
from extract.leftovers import partial_of
from extract.places import EXTRAS

OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"max_attempts": 4, "mode": "standard"},
        },
    },
    "gs": {"use_listings_cache": False},
    "az": {"use_listings_cache": False},
}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_CONNECTION_STRING)",
}


class StoreError(ProblemsError):
    """An object store refused, or could not be reached. No half object was left."""


class Missing(StoreError):
    """There is no such object."""


class Exists(StoreError):
    """The object that was to be new is there already."""


class Stopped(Exception):
    """Nobody wants any more what was being fetched."""


@dataclass(frozen=True)
class Entry:
    """An object as its store describes it: bytes, and a tag that changes with the content."""

    size: int
    etag: str


def forget() -> None:
    """Connect anew: other credentials or another endpoint are in the environment."""
    filesystem.cache_clear()


def scheme_of(url: str) -> str:
    return url.partition(":")[0]


@cache
def filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme, one a process.

    Raises:
        StoreError: its package is not installed.
    """
    package, extra = EXTRAS[scheme]
    try:
        importlib.import_module(package)
        from fsspec import filesystem as made
    except ImportError:
        needed = f"{scheme}:// needs {package}: pip install 'slide-mil[{extra}]'"
        raise StoreError("not installed", [needed]) from None
    return made(scheme, skip_instance_cache=True, **OPTIONS[scheme])


def listing(url: str) -> dict[str, Entry]:
    """All objects below `url`: name below it -> entry; "" is an object of that very name. {} where there is none."""
    with errors_about(url, "listed"):
        fs = filesystem(scheme_of(url))
        base = fs._strip_protocol(url)
        try:
            found = fs.find(url, detail=True)
        except FileNotFoundError as error:
            if is_absent_bucket(error):
                raise
            return {}
        if not found and "/" not in base.strip("/"):
            fs.ls(url)  # of an empty bucket; one that is not there has nothing to find either
    files = {name: facts for name, facts in found.items() if facts.get("type") == "file"}
    return {name[len(base) :].lstrip("/"): _entry(facts) for name, facts in files.items() if name.startswith(base)}


def entry_of(url: str) -> Entry | None:
    """The object's entry; None where there is none."""
    with errors_about(url, "looked at"):
        try:
            facts = filesystem(scheme_of(url)).info(url)
        except FileNotFoundError as error:
            if is_absent_bucket(error):
                raise
            return None
    return _entry(facts) if facts.get("type") == "file" else None


def head(url: str, n_bytes: int) -> bytes:
    """The first bytes of an object."""
    with errors_about(url, "read"):
        content: bytes = filesystem(scheme_of(url)).cat_file(url, start=0, end=n_bytes)
    return content


def fetch(url: str, path: Path, expected: Entry, going_on: Callable[[], bool] = lambda: True) -> None:
    """Write the object to `path`, whole or not at all; one that is replaced meanwhile is fetched again, once.

    Args:
        going_on: asked with every part; at False it raises Stopped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_of(path)
    try:
        for again in (True, False):
            with errors_about(url, "read"):
                filesystem(scheme_of(url)).get_file(url, str(temporary), callback=_stopping(going_on))
            found = entry_of(url)
            if found == expected and temporary.stat().st_size == expected.size:
                os.replace(temporary, path)
                return
            expected = found or expected
            if found is None or not again:
                raise StoreError("stopped", [f"{url}: was replaced or cut off while it was read. Run again"])
    finally:
        temporary.unlink(missing_ok=True)


def put(path: Path, url: str, *, new: bool = False) -> Entry:
    """Write a file as an object, which appears complete or not at all.

    Args:
        new: raise Exists where there is one of that name; stores with conditional writes decide that themselves.
    """
    with errors_about(url, "written"):
        options: dict[str, Any] = {}
        if new:
            options = {"overwrite": False} if scheme_of(url) == "az" else {"mode": "create"}
        filesystem(scheme_of(url)).put_file(str(path), url, **options)
    entry = entry_of(url)
    if entry is None or entry.size != path.stat().st_size:
        raise StoreError("stopped", [f"{url}: the store has another size of it than was written; run again"])
    return entry


def delete(url: str) -> None:
    """Delete one object; nothing happens where there is none."""
    with errors_about(url, "deleted"):
        try:
            filesystem(scheme_of(url)).rm_file(url)
        except FileNotFoundError:
            return


def _entry(facts: dict[str, Any]) -> Entry:
    tag = next((str(facts[key]) for key in ("ETag", "etag", "generation", "md5Hash") if facts.get(key)), "")
    return Entry(int(facts.get("size") or 0), tag.strip('"'))


def _stopping(going_on: Callable[[], bool]) -> Any:
    from fsspec.callbacks import Callback

    class Stopping(Callback):  # type: ignore[misc]  # fsspec has no types
        def relative_update(self, inc: int = 1) -> None:
            if not going_on():
                raise Stopped

    return Stopping()


# --- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def errors_about(url: str, done: str) -> Iterator[None]:
    """What a store's library raises goes on as a StoreError of one sentence. `done`: what was to be done with it."""
    try:
        yield
    except (StoreError, Stopped):
        raise
    except Exception as error:
        kind, problem = sentence(error, url, done)
        raise kind("object store", [problem]) from error


def is_absent_bucket(error: BaseException) -> bool:
    return "NoSuchBucket" in _codes(error) or "bucket does not exist" in str(error).lower()


def sentence(error: Exception, url: str, done: str) -> tuple[type[StoreError], str]:
    """Which kind of error, and what to tell. Only codes and names of classes are taken from `error`."""
    codes, scheme = _codes(error), scheme_of(url)
    bucket = f"{scheme}://{url.partition('://')[2].partition('/')[0]}"
    said = f" ({', '.join(codes[:2])})" if codes else ""
    if "NoSuchBucket" in codes or is_absent_bucket(error) or "ContainerNotFound" in codes:
        return StoreError, f"{url}: there is no bucket {bucket}; make it, or correct the name"
    if "PreconditionFailed" in codes or isinstance(error, FileExistsError):
        return Exists, f"{url}: is there already"
    if any(code in NO_CREDENTIALS for code in codes):
        return StoreError, f"{url}: cannot be {done}: no credentials{said}; set {CREDENTIALS[scheme]}"
    if any(code in BAD_CREDENTIALS for code in codes):
        return StoreError, f"{url}: cannot be {done}: the store does not accept the credentials{said}"
    if isinstance(error, PermissionError) or any(code in REFUSED for code in codes):
        return StoreError, f"{url}: cannot be {done}: no permission{said}; ask for it, or set another place"
    if isinstance(error, FileNotFoundError) or "NoSuchKey" in codes:
        return Missing, f"{url}: no such object"
    broken = any(code in BROKEN for code in codes) and not any(code in NO_CONNECTION for code in codes)
    if not broken and any(code in UNREACHABLE for code in codes):
        where = os.environ.get("AWS_ENDPOINT_URL", "") if scheme == "s3" else ""
        at = f" at {where.rpartition('@')[2]} (AWS_ENDPOINT_URL)" if where else ""
        return StoreError, f"{url}: cannot be {done}: the store{at} does not answer{said}; is the network there?"
    if broken:
        return StoreError, f"{url}: the connection broke while it was {done}, again after retries{said}. Run again"
    return StoreError, f"{url}: cannot be {done}{said or f' ({type(error).__name__})'}"


NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}
BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthFailure"}
BAD_CREDENTIALS |= {"ClientAuthenticationError", "AuthenticationFailed", "TokenRefreshRequired", "RefreshError"}
REFUSED = {"AccessDenied", "AllAccessDisabled", "MethodNotAllowed", "403", "405", "401", "AuthorizationFailure"}
NO_CONNECTION = {"ConnectTimeoutError", "ClientConnectorError", "ClientConnectorDNSError", "ConnectionRefusedError"}
UNREACHABLE = NO_CONNECTION | {"gaierror", "EndpointConnectionError", "ServiceRequestError"}
BROKEN = {"ConnectionClosedError", "HTTPClientError", "ReadTimeoutError", "IncompleteRead", "ClientPayloadError"}
BROKEN |= {"ServerDisconnectedError", "FSTimeoutError", "TimeoutError", "ClientOSError", "ResponseParserError"}
BROKEN |= {"ServiceResponseError", "ConnectionResetError", "BrokenPipeError", "ConnectionError", "RequestTimeout"}
BROKEN |= {"500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown", "InternalServerError"}


def _codes(error: BaseException) -> list[str]:
    """The codes that the store gave, and the classes of the error and of what is behind it, the most telling first."""
    codes, classes = [], []
    seen: list[BaseException] = []
    waiting: BaseException | None = error
    while waiting is not None and waiting not in seen:
        seen.append(waiting)
        response = getattr(waiting, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            codes.append(str(response["Error"].get("Code", "")))
        code = "status" if hasattr(waiting, "status") else "code"  # aiohttp has both, and warns of the second
        codes += [str(found) for name in ("error_code", code, "status_code") if (found := getattr(waiting, name, None))]
        if not isinstance(waiting, FileNotFoundError | PermissionError | FileExistsError):
            classes.append(type(waiting).__name__)
        waiting = waiting.__cause__ or waiting.__context__
    plain = {"OSError", "ClientError", "Exception", "ValueError", "RuntimeError", "HttpError"}
    return [code for code in dict.fromkeys([*codes, *classes]) if code and code not in plain]
