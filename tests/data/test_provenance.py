"""What a store says of where it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cvlctl.data.provenance import environment, jsonable
from cvlctl.errors import CvlctlError


@pytest.mark.skipif(not (Path(__file__).parents[2] / ".git").exists(), reason="no checkout")
def test_in_a_checkout_the_commit_is_recorded() -> None:
    assert len(environment()["git_commit"]) == 40


def test_what_json_lacks_is_refused_by_name() -> None:
    assert jsonable("provenance", {"a": (1, 2)}) == {"a": [1, 2]}
    for value in (np.zeros(2), float("nan")):
        with pytest.raises(CvlctlError, match="the provenance of a store cannot be written as JSON"):
            jsonable("provenance", {"a": value})
