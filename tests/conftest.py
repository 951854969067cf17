"""Checkpoint folders that many tests share, written once per test run."""

import pytest
import tiny
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small matrices are faster on one thread, and the sums come in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict:
    """{architecture: folder} of complete tiny checkpoints; not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.save(root / name, name) for name in tiny.ARCHITECTURES}
