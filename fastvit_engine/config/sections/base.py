"""What all sections share: how values are checked, and bounds."""

from functools import cache
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of the configuration: it cannot be changed, and has no other keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false for a number: pydantic would take them for 1 and 0."""
        elements = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(element, bool) for element in elements) and _holds_numbers(cls, str(info.field_name)):
            raise ValueError("write a number, not true or false")
        return value


@cache
def _holds_numbers(section: type[BaseModel], name: str) -> bool:
    kinds = _types_in(section.model_fields[name].annotation)
    return bool({int, float} & kinds) and bool not in kinds


def _types_in(annotation: Any) -> set[Any]:
    """The types, and the values of a Literal as their types, that a nested annotation is made of."""
    arguments = get_args(annotation)
    if not arguments:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*(_types_in(argument) for argument in arguments))


def ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first number must not be greater than the second")
    return pair


# Bounds are wide: they keep out what nobody means, and what would overflow, never end or fill the memory.
MOST_SAMPLES = 2**20  # of one batch
MONTH = 2_592_000.0  # seconds
AreaFraction = Annotated[float, Field(gt=0, le=1)]


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("name each one once")
    return values
