"""Findings: what is not ok says what to do, in one line that is fit to be shown."""

import json

import pytest

from fastvit_engine.doctor.findings import Finding, Group, Status
from fastvit_engine.errors import UserError

group = Group("data")


def test_exactly_what_is_not_ok_has_advice():
    with pytest.raises(ValueError, match="has advice"):
        Finding("data", "store", Status.PROBLEM, "gone")
    with pytest.raises(ValueError, match="has advice"):
        Finding("data", "store", Status.OK, "there", "do something")


def test_a_finding_travels_as_json():
    finding = group.warning("store", "slow", "use a cache", figures={"rate": 1.5}, speed="rate", same="x")
    assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding


def test_secrets_and_control_characters_are_not_shown():
    finding = group.problem("store", "https://me:secret@host/x.tar?sig=abc \x1b[31m", "line\nbreak")
    assert finding.found == "https://host/x.tar \\x1b[31m"
    assert finding.advice == "line\\nbreak"


def test_a_sentence_of_another_part_is_split_into_what_is_wrong_and_what_to_do():
    finding = group.refused("shards", UserError("s3://b/x (HTTP 403: denied) cannot be read: check your access"))
    assert finding.found == "s3://b/x (HTTP 403: denied) cannot be read"
    assert finding.advice == "check your access"
