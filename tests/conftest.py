import pytest
import torch


@pytest.fixture
def one_thread():
    """Tiny tensors: more threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
