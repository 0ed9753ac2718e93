import sys
from pathlib import Path

import pytest

# The processes of a line find `made` here: they get the path of the one that starts them.
sys.path.insert(0, str(Path(__file__).parent))

from made import obedient

from lipass import Stages

ONE_THREAD = {"threads": 1}


@pytest.fixture(scope="package")
def apart():
    """Two obedient stages apart, for all tests that do not end them."""
    with Stages(obedient("first", "second"), apart=True) as stages:
        yield stages


@pytest.fixture
def here():
    with Stages(obedient("first", "second")) as stages:
        yield stages


@pytest.fixture(params=["here", "apart"])
def stages(request):
    """Both kinds of lines, empty."""
    found = request.getfixturevalue(request.param)
    found.forget()
    return found
