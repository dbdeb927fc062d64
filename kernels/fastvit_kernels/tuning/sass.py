"""Reads Hopper machine code, as text of cuobjdump, for what its asynchronous matrix products wait for.

These are HGMMA and, of FP8, QGMMA; what is said of the one holds for the other.

An HGMMA reads its first operand from registers while the warp continues. Until the warp has waited for it, nothing
may write those registers. ptxas has failed to see that (triton#9433), and the numbers are then wrong at random.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
REGISTER = re.compile(r"-?\|?R(\d+)\b")
# Instructions whose first operand, though a register, is read.
READERS = ("ST", "RED", "BAR", "WARPSYNC", "NANOSLEEP", "RET", "BRX", "JMX", "CALL", "BRA", "R2UR", "R2P", "FCHK")
ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL", "TRAP")


class Instruction(NamedTuple):
    """One line of a disassembly."""

    address: int
    predicate: str | None  # it may not execute
    opcode: str
    operands: list[str]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class Pending(NamedTuple):
    """Registers that HGMMAs may be reading: by group not yet waited for, and of those not yet in a group."""

    groups: tuple[frozenset[int], ...] = ()
    open: frozenset[int] = frozenset()


def functions(sass: str) -> Iterator[list[Instruction]]:
    """The instructions of each function of a disassembly."""
    for text in sass.split("Function :")[1:]:
        yield [
            Instruction(int(address, 16), predicate or None, opcode, [part.strip() for part in operands.split(",")])
            for address, predicate, opcode, operands in LINE.findall(text)
        ]


def waits(sass: str) -> int:
    """How often the code waits for HGMMAs. As often as it has HGMMAs means that ptxas let none overlap."""
    return len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass))


@lru_cache  # cases often share a kernel
def hazards(sass: str) -> int:
    """How many instructions may overwrite a register that an HGMMA has still to read, on any path, loops included."""
    return sum(len(overwriting(code)) for code in functions(sass))


def overwriting(code: list[Instruction]) -> set[int]:
    """The addresses of these instructions."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    found: set[int] = set()
    seen: set[tuple[int, Pending]] = set()
    paths = [(0, Pending())]
    while paths:
        i, pending = paths.pop()
        while i < len(code) and (i, pending) not in seen:
            seen.add((i, pending))
            instruction = code[i]
            if pending.open.union(*pending.groups) & written(instruction):
                found.add(instruction.address)
            pending = after(instruction, pending)
            if (target := branch(instruction)) is not None:
                paths.append((index[target], pending))
            certain = instruction.predicate is None and len(instruction.operands) == 1
            if certain and instruction.name in (*ENDS, "BRA"):
                break
            i += 1
    return found


def after(instruction: Instruction, pending: Pending) -> Pending:
    if instruction.name in ("HGMMA", "QGMMA"):
        reads = pending.open | registers(instruction.operands[1], 4)
        if "gsb0" not in instruction.operands:
            return pending._replace(open=reads)
        # a wait leaves at most 7 groups pending: older ones count as one, or a loop would add groups for ever
        groups = (*pending.groups, reads)
        return Pending((frozenset().union(*groups[:-7]), *groups[-7:]))
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        left = int(instruction.operands[1], 16)
        return pending._replace(groups=pending.groups[-left:] if left else ())
    return pending


def branch(instruction: Instruction) -> int | None:
    """Where it may jump to."""
    if instruction.name not in ("BRA", "CALL"):
        return None
    target = re.search(r"\b0x([0-9a-f]+)$", instruction.operands[-1])
    if target is None:
        raise ValueError(f"no target in {instruction}")
    return int(target[1], 16)


def written(instruction: Instruction) -> frozenset[int]:
    """The registers that an instruction writes."""
    if instruction.name.startswith(READERS) or "SETP" in instruction.name:
        return frozenset()
    # SHFL, LOP3 and others name a predicate before the register they write
    destinations = [operand for operand in instruction.operands if not re.fullmatch(r"!?U?P[\dTR]+", operand)]
    return registers(destinations[0], width(instruction)) if destinations else frozenset()


def width(instruction: Instruction) -> int:
    """How many registers a result takes."""
    modifiers = instruction.opcode.split(".")
    if match := re.search(r"64x(\d+)x", instruction.opcode):  # HGMMA: 64 rows by 128 threads
        return int(match[1]) // (2 if "F32" in modifiers else 4)
    if instruction.name == "HMMA":
        return 4
    if instruction.name == "LDSM" and modifiers[-1].isdigit():
        return int(modifiers[-1])
    for modifier, count in (("128", 4), ("96", 3), ("64", 2), ("WIDE", 2), ("F64", 2)):
        if modifier in modifiers:
            return count
    return 2 if instruction.name in ("CS2R", "DADD", "DMUL", "DFMA") and "32" not in modifiers else 1


def registers(operand: str, count: int) -> frozenset[int]:
    """`count` registers from the one that the operand names; none if it names none, as a descriptor does not."""
    match = REGISTER.match(operand)
    return frozenset(range(int(match[1]), int(match[1]) + count)) if match else frozenset()
