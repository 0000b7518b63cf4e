from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"

# Small random checkpoints in the released layout, each with the outputs that independent implementations agree on.
CHECKPOINTS = ("flash-tiny", "pro-tiny", "flash-base-tiny", "released-tiny")


@pytest.fixture(params=CHECKPOINTS)
def released(request) -> Path:
    """Each of the released-layout directories in turn."""
    return DATA / request.param
