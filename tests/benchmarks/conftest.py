"""The claims with small towers, since no test is about what they learn."""

import pytest

from benchmarks.claims import conditions, languages


@pytest.fixture(scope="module", autouse=True)
def small_towers():
    with pytest.MonkeyPatch.context() as patch:
        for tower in (conditions.TEXT, languages._TEXT):  # as wide as the vectors
            patch.setitem(tower, "num_hidden_layers", 1)
        for tower in (conditions.IMAGE, languages._IMAGE):
            patch.setitem(tower, "num_hidden_layers", 1)
            patch.setitem(tower, "hidden_size", 32)
        yield
