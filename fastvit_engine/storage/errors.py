"""What can be wrong with a shard, as users and as the storage's own threads see it."""

from urllib.parse import urlsplit

from fastvit_engine.errors import UserError


class StaleIndex(UserError):
    """The shard is not the one that the index describes."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(
            f"shard {public_url(url)} {what}: the index is stale, run `fastvit data index` again, or restore the shard"
        )


class GaveUp(UserError):
    """A shard that could not be read for now; it may be there later."""


def public_url(url: str) -> str:
    """The URL without the passwords and signatures that it may hold."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
