"""Settings for every test. `checkpoints.py`, beside this file, writes small model files."""

import pytest
import torch

# The tensors of tests are small: more threads than cores that are free only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_tuning(tmp_path_factory):
    """Keep what `lowbit tune` found on this machine out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    """A folder, kept for the session, in which tests write small checkpoints once."""
    return tmp_path_factory.mktemp("models")
