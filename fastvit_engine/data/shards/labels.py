"""Class labels in the members of a sample."""

import json
from typing import Any

from fastvit_engine.data.shards.sample import Sample


def label_member(label_key: str) -> tuple[str, list[str]]:
    """Splits data.label_key into the member that holds the labels and, within a JSON member, the path to the field.

    "cls" is ("cls", []), "json.label" is ("json", ["label"]).
    """
    member, _, path = label_key.partition(".")
    return (member, path.split(".")) if member == "json" and path else (label_key, [])


def parse_labels(content: bytes, path: list[str]) -> list[int]:
    """The class indices in a label member: a number, or a JSON list of numbers, as the whole text or at a field's path.

    [] where the field is missing or null. ValueError where it holds anything else.
    """
    if not path:
        try:
            return [int(content)]
        except ValueError:
            pass  # a list, or nothing that we know
    value: Any = json.loads(content)
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    labels = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(label) is int for label in labels):
        raise ValueError(f"{value!r} is no class index")
    return labels


def labels_of(sample: Sample) -> list[int] | None:
    """The class indices of a sample: "labels" in its `json`, otherwise its `cls`; None where it has neither.

    ValueError where they are no indices.
    """
    if "json" in sample:
        try:
            content = json.loads(sample["json"])
        except ValueError:
            raise ValueError("has a 'json' member that is not JSON") from None
        labels = content.get("labels") if isinstance(content, dict) else None
        if isinstance(labels, list):
            if not all(isinstance(label, int) for label in labels):
                raise ValueError(f"has labels {labels} in 'json', which are not all class indices")
            return labels
    if "cls" not in sample:
        return None
    try:
        return [int(sample["cls"][:100])]
    except ValueError:
        raise ValueError(f"has the label {sample['cls'][:100]!r}, which is not a class index") from None
