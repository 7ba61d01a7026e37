"""The run whose checkpoints several files look at."""

import pytest
import torch

from support.checkpoints import ROUNDS, Scheduled, keep_all, run
from support.modules import made, softpruning


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run with two rounds, with a checkpoint after every epoch and after every second step, full and weights only."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    callback, module = softpruning(**ROUNDS), made(Scheduled)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = run(
        folder,
        module,
        callback,
        keep_all(folder / "epochs", every_n_epochs=1, save_last=True),
        keep_all(folder / "steps", every_n_train_steps=2),
        keep_all(folder / "weights", every_n_train_steps=6, save_weights_only=True),
    )
    torch.set_num_threads(threads)
    return folder, trainer, module, callback
