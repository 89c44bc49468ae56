"""A tiny recogniser for all tests of this room: made once, read only."""

import pytest

from tests.support import wild


@pytest.fixture(scope="session")
def recogniser(tmp_path_factory):
    """A folder with a Wav2Vec2 of random weights that spells letters."""
    return wild.ctc(tmp_path_factory.mktemp("wild") / "dense")
