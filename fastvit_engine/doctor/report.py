"""The report: what was found, as a table for people or as JSON, with what is wrong last."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from fastvit_engine.doctor.findings import Status
from fastvit_engine.doctor.nodes import Shared, names
from fastvit_engine.observe.units import counted

_GROUPS = ("software", "host", "disks", "GPUs", "compilers", "kernels", "data", "links", "nodes")
_NARROWEST = 40  # columns


def problems(found: Sequence[Shared]) -> int:
    return _count(found, Status.PROBLEM)


def as_text(found: Sequence[Shared], width: int) -> str:
    """The findings by group, then warnings, then problems, and how many there are."""
    width, hosts = max(width, _NARROWEST), _hosts(found)
    lines: list[str] = []
    for group in _GROUPS:
        inside = [one for one in found if one.finding.group == group]
        fine = [one for one in inside if one.finding.status in (Status.OK, Status.NOTE)]
        if fine:
            lines += [group, *_table(fine, hosts, width), ""]
    for status, title in ((Status.WARNING, "WARNINGS"), (Status.PROBLEM, "PROBLEMS")):
        worse = [one for one in found if one.finding.status == status]
        if worse:
            lines += [title, *_table(worse, hosts, width), ""]
    notes, good = _count(found, Status.NOTE), _count(found, Status.OK)
    end = f"{counted(problems(found), 'problem')}, {counted(_count(found, Status.WARNING), 'warning')}"
    end += f", {counted(notes, 'note')}, {good} ok"
    if len(hosts) > 1:
        end += f", on {len(hosts)} nodes"
    return "\n".join([*lines, *textwrap.wrap(end, width)])


def as_json(found: Sequence[Shared]) -> str:
    content: dict[str, Any] = {
        "hosts": list(_hosts(found)),
        "problems": problems(found),
        "warnings": _count(found, Status.WARNING),
        "findings": [
            {
                "group": one.finding.group,
                "subject": one.finding.subject,
                "status": str(one.finding.status),
                "found": one.finding.found,
                "advice": one.finding.advice,
                "figures": dict(one.finding.figures),
                "hosts": list(one.hosts),
            }
            for one in found
        ],
    }
    return json.dumps(content, indent=1)


def _table(shown: Sequence[Shared], hosts: Sequence[str], width: int) -> Iterator[str]:
    """Two columns: the subject, and what was found, with the advice below it."""
    first = min(24, max(len(one.finding.subject) for one in shown))
    for one in shown:
        finding = one.finding
        where = "" if len(one.hosts) == len(hosts) else f"{names(one.hosts)}: "
        mark = "note: " if finding.status == Status.NOTE else ""
        cell = textwrap.wrap(f"{mark}{where}{finding.found}", width - first - 4) or [""]
        if finding.advice:
            cell += textwrap.wrap(f"-> {finding.advice}", width - first - 4, subsequent_indent="   ")
        label = finding.subject.ljust(first)
        if len(label) > first:
            yield from (f"  {line}" for line in textwrap.wrap(finding.subject, width - 2))
            label = " " * first
        yield f"  {label}  {cell[0]}".rstrip()
        yield from (f"  {' ' * first}  {line}" for line in cell[1:])


def _hosts(found: Sequence[Shared]) -> list[str]:
    return list(dict.fromkeys(host for one in found for host in one.hosts))


def _count(found: Sequence[Shared], status: Status) -> int:
    return sum(one.finding.status == status for one in found)
