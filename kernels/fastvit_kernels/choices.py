"""The grammar of FASTVIT_KERNELS: which implementation is asked for, of all operations or of one.

A setting is a list of choices between commas, in any order. `triton` is for all operations, and may be written
`*=triton`; `attention=reference` is for one, whatever is said of all. What is not mentioned is `auto`:

    reference
    auto,patch_embed=reference
    attention=cudnn,*=triton

The matrix products inside block operators, `gemm`, are not set by what is said of all. Block operators contain other
operations. If such a part is set to `reference` by its name, the block operator runs as the composition of its
parts, each of which then follows its own choice.
"""

from collections.abc import Mapping
from typing import NamedTuple

ALL = ("auto", "triton", "reference")


class Operation(NamedTuple):
    """What may be asked for, and what decides in `auto`."""

    choices: tuple[str, ...] = ALL
    parts: tuple[str, ...] = ()  # operations that its kernels contain, which can be set apart
    multiplies: bool = False  # has matrix products, which PyTorch computes better in float32
    autocasts: bool = False  # computes in the dtype of autocast


OPERATIONS = {
    "attention": Operation(choices=("auto", "triton", "cudnn", "flash", "reference"), multiplies=True),
    "attention_block": Operation(parts=("layer_norm", "attention"), multiplies=True, autocasts=True),
    "block": Operation(parts=("layer_norm", "attention", "attention_block", "mlp"), multiplies=True, autocasts=True),
    "cross_entropy": Operation(),
    "fp8": Operation(),  # operands of FP8 products; who multiplies them is said of gemm
    "gemm": Operation(choices=("auto", "triton", "cublas", "quack")),  # the products inside block operators
    "layer_norm": Operation(),
    "mlp": Operation(parts=("layer_norm",), multiplies=True, autocasts=True),
    "patch_embed": Operation(multiplies=True, autocasts=True),
    "rotary": Operation(),
    "swiglu": Operation(parts=("layer_norm",), multiplies=True, autocasts=True),
}


class Choice(NamedTuple):
    """What is asked for of an operation, and why it is not `auto`."""

    asked: str
    why: str = ""


def parse(setting: str, name: str) -> Mapping[str, Choice]:
    """The choice of each operation. Raises ValueError, with a sentence that begins with `name`, for another setting."""
    named: dict[str, str] = {}
    for item in setting.split(","):
        operation, equals, choice = (part.strip() for part in item.rpartition("="))
        operation = operation if equals else "*"
        if operation not in ("*", *OPERATIONS):
            raise ValueError(f"{name} must name one of *, {', '.join(OPERATIONS)}, got {operation!r} in {setting!r}")
        choices = ALL if operation == "*" else OPERATIONS[operation].choices
        if choice not in choices:
            within = "" if choice == setting else f" in {setting!r}"
            of = "" if operation == "*" else f" for {operation}"
            raise ValueError(
                f"{name} must be one of {', '.join(choices)}, got {choice!r}{within}{of}{hint(operation, choice)}"
            )
        if operation in named:
            whose = "all operations" if operation == "*" else operation
            raise ValueError(f"{name} must be one choice for {whose}, got two in {setting!r}")
        named[operation] = choice
    return {operation: settle(operation, named, setting, name) for operation in OPERATIONS}


def settle(operation: str, named: Mapping[str, str], setting: str, name: str) -> Choice:
    asked = named.get(operation) or ("auto" if operation == "gemm" else named.get("*", "auto"))
    apart = [part for part in OPERATIONS[operation].parts if named.get(part) == "reference"]
    if apart and named.get(operation) == "triton":
        raise ValueError(
            f"{name} must be consistent, got {setting!r}: the kernels of {operation} contain {apart[0]}, so set"
            f" {operation} to auto, or {apart[0]} to triton"
        )
    if apart and asked != "reference":
        return Choice("reference", f"{apart[0]}=reference")
    return Choice(asked, "" if asked == "auto" else "asked for")


def hint(operation: str, choice: str) -> str:
    """Where a choice that is wrong here belongs."""
    if operation == "*" and choice in OPERATIONS:
        return f": write {choice}=reference, say"
    having = [other for other, its in OPERATIONS.items() if choice in its.choices]
    return f": write {having[0]}={choice}" if operation == "*" and having else ""
