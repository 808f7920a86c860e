"""Damaged stores, runs, recipes and imports end in success or a CvlctlError; so does what once failed (`fuzz.py`)."""

from __future__ import annotations

import pytest
from reliability import fuzz
from reliability.driver import count
from reliability.fuzz_kinds import KINDS

# kinds of one process: what they import is much of the time
TOGETHER = [{"store": 110, "filmed": 20, "unfinished": 40, "import": 140}, {"run": 60, "recipe": 160}]


def check(counts: dict[str, int], first: int) -> None:
    tried = failed = 0
    try:
        tried, failed = sum(counts.values()), 1
        found = fuzz.check(counts, first)
        tried, failed = sum(one["done"] + one["refused"] for one in found.values()), 0
    finally:
        count("damaged inputs", tried, failed)
    for kind, one in found.items():
        all_of_it = one["done"] + one["refused"]
        assert all_of_it >= counts[kind]
        assert one["refused"] >= all_of_it * KINDS[kind].refused, "what is damaged hardly matters: these are no tests"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("counts", TOGETHER, ids=" ".join)
def test_damaged_inputs(counts: dict[str, int]) -> None:
    check(counts, 0)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("counts", TOGETHER, ids=" ".join)
def test_ten_thousand_damaged_inputs(counts: dict[str, int], part: int) -> None:
    check({kind: 5 * number for kind, number in counts.items()}, 1000 * (part + 1))


def test_what_once_failed_is_of_kinds_that_are_tried() -> None:
    found = [(case["kind"], case.get("use")) for case in map(fuzz.read_case, fuzz.CORPUS)]
    assert found and all(use is None or use in KINDS[kind].uses for kind, use in found)
