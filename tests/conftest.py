import logging
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_folder(tmp_path_factory):
    """Where runs write that are not told where: a folder for each of pytest's workers, and not the project's."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture
def one_thread():
    """Tiny tensors: more threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def log_level():
    """Examples make Lightning quiet; the tests after them listen to it."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    yield
    logger.setLevel(before)
