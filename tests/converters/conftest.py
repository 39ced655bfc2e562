import pytest

from tests.converters import checkpoints


@pytest.fixture(scope="session")
def self_forcing(tmp_path_factory):
    """A small Self-Forcing file with all three entries."""
    path = tmp_path_factory.mktemp("source") / "self_forcing_dmd.pt"
    checkpoints.write_self_forcing(path)
    return path
