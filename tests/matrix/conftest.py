"""Every test of the matrix goes through every case: a model and a config."""

import pytest
from helpers.cases import CASES, Case


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def case(request):
    return Case(*request.param)
