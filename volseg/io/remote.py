"""Object stores by their URL: with the credentials that there are or none, and an answer within seconds or an error."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Any

from volseg.errors import UserError

REQUESTS = 64  # to a store at once: it answers after tens of milliseconds, however many there are
CONNECT_S, ANSWER_S = 3, 5  # that a store may take to accept a connection, and to answer, when it is first used
GOOGLE = ("gs://", "gcs://")
TRANSPORT = ("aiobotocore", "aiohttp", "botocore", "urllib3")  # packages whose errors say that a store cannot be used


def options(path: str) -> dict[str, Any]:
    """What fsspec is told of the store of a URL: to have connections enough and, where no credentials are to be found, to read
    without a signature."""
    if path.startswith(GOOGLE):
        return {"token": "anon"} if _is_anonymous_at_google() else {}
    if not path.startswith("s3://"):
        return {}
    told = {"config_kwargs": {"max_pool_connections": REQUESTS, **_configured().get("config_kwargs", {})}}
    return {**told, "anon": True} if _is_anonymous() else told


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it.

    Raises
    ------
    UserError
        A package for such URLs is missing, or the store does not answer.
    """
    from fsspec.core import url_to_fs

    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else it asks by gRPC of what kind a bucket is
    try:
        fs, root = url_to_fs(path, **options(path))
    except UserError:
        raise
    except (ImportError, ValueError) as error:
        extra, scheme = ("gcs", "gs") if path.startswith(GOOGLE) else ("s3", "s3")
        advice = f"pip install 'volseg[{extra}]' for {scheme}:// URLs"
        raise UserError(f"cannot reach {path}: {_reason(error)}; {advice}") from None
    if path.startswith(("s3://", *GOOGLE)):
        scheme, _, rest = path.partition("://")
        check = _check_google_answers if path.startswith(GOOGLE) else _check_answers
        check(f"{scheme}://{rest.partition('/')[0]}")
    return fs, root


def _is_transport(error: BaseException) -> bool:
    """Whether an error is that of a package which talks to stores."""
    return type(error).__module__.partition(".")[0] in TRANSPORT


def denies(error: BaseException) -> bool:
    """Whether an error says that a store refuses; gcsfs has no kind of its own for that."""
    refused = getattr(error, "code", None) in (401, 403)
    return isinstance(error, PermissionError) or refused or str(error).startswith("Forbidden: ")


def advice(path: str) -> str:
    """What may be wrong where a store refuses ``path``."""
    if path.startswith(GOOGLE):
        if not _is_anonymous_at_google():
            return "these credentials may not do that: see GOOGLE_APPLICATION_CREDENTIALS"
        return (
            "no credentials were found, so it was tried without: set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth "
            "application-default login, unless the bucket is public"
        )
    if not path.startswith("s3://"):
        return "check the address"
    if _is_anonymous():
        return (
            "no credentials were found, so it was tried without: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, unless the bucket is public"
        )
    return "these credentials may not do that: see AWS_PROFILE, AWS_ACCESS_KEY_ID"


def _configured() -> dict[str, Any]:
    """What fsspec's own configuration says of S3."""
    import fsspec.config

    return fsspec.config.conf.get("s3", {})


@lru_cache(maxsize=1)
def _is_anonymous() -> bool:
    """Whether neither the environment, nor a file, nor the machine gives credentials for S3."""
    if set(_configured()) & {"anon", "key", "profile", "token", "session"}:
        return False
    try:
        from botocore.session import Session
    except ImportError:  # the filesystem says what to install
        return False
    try:
        return Session().get_credentials() is None
    except Exception as error:  # a damaged file, an unknown profile
        if not _is_transport(error):
            raise
        raise UserError(f"cannot take the credentials for S3: {_reason(error)}; see AWS_PROFILE and ~/.aws") from None


@lru_cache(maxsize=64)
def _check_answers(bucket: str) -> None:
    """Raises `UserError` where nothing answers at the store of a bucket: a run's own requests would wait much longer."""
    from fsspec.core import url_to_fs

    limits = {"connect_timeout": CONNECT_S, "read_timeout": ANSWER_S, "retries": {"total_max_attempts": 2}}
    fs, root = url_to_fs(bucket, **{**options(bucket), "config_kwargs": limits})
    fs.retries = 1
    try:
        fs.ls(root, detail=False)
    except Exception as error:
        if _is_transport(error) or isinstance(error, TimeoutError):
            raise UserError(
                f"nothing answers at {bucket}: {_reason(error)}; check the network and AWS_ENDPOINT_URL"
            ) from None
        if not isinstance(error, OSError):  # no such bucket, or no right to list it, is an answer
            raise


@lru_cache(maxsize=1)
def _is_anonymous_at_google() -> bool:
    """Whether neither the environment, nor a file, nor the machine gives credentials for Google's store.

    gcsfs alone looks for 15 seconds in vain, in each process.
    """
    import fsspec.config

    if "token" in {**fsspec.config.conf.get("gcs", {}), **fsspec.config.conf.get("gs", {})}:
        return False
    try:
        import google.auth
    except ImportError:  # the filesystem says what to install
        return False
    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError as error:
        if file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise UserError(f"cannot take the credentials in {file}: {_reason(error)}") from None
        return True
    return False


@lru_cache(maxsize=64)
def _check_google_answers(bucket: str) -> None:
    """The same of a bucket at Google, where gcsfs tries again for half a minute."""
    from fsspec.asyn import sync
    from fsspec.core import url_to_fs

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs, a page each time, it raises, too
    fs, root = url_to_fs(bucket, **options(bucket))
    try:
        sync(fs.loop, fs._info, f"{root}/zarr.json", timeout=CONNECT_S + ANSWER_S)
    except TimeoutError:
        raise UserError(
            f"nothing answers at {bucket} within {CONNECT_S + ANSWER_S} s; check the network and STORAGE_EMULATOR_HOST"
        ) from None
    except Exception as error:  # no such object, or no right to see it, is an answer
        if not (isinstance(error, OSError) or denies(error)):
            raise


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
