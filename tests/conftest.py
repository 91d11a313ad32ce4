"""Settings for every test. `checkpoints.py`, beside this file, writes small model files."""

import pytest


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    """A folder, kept for the session, in which tests write small checkpoints once."""
    return tmp_path_factory.mktemp("models")
