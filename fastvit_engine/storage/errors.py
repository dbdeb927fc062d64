"""Errors of shards, for users and for the threads of the storage."""

from urllib.parse import urlsplit

from fastvit_engine.errors import UserError


class StaleIndex(UserError):
    """The shard does not match the index."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(
            f"shard {public_url(url)} {what}: the index is stale, run `fastvit data index` again, or restore the shard"
        )


class GaveUp(UserError):
    """The shard could not be read for now; later attempts may succeed."""


def public_url(url: str) -> str:
    """The URL without the passwords and signatures that it may hold."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
