"""A sample as it lies in a shard."""

from typing import Any

Sample = dict[str, Any]  # "__key__", "__url__", and the bytes of each member by its lower-case extension
