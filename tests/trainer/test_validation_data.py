"""Validation batches that are kept, read again, moved once, and used in part: scores are the same either way."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_softprune.round.journal.fingerprint import digest
from lightning_softprune.trainer import ALL, BatchesReadAgain, Part
from lightning_softprune.trainer.scorer import ValidationScorer
from lightning_softprune.trainer.validation_data import bytes_of, free_memory, samples_of
from support.fits import ORDINARY_FITS, Polite, Probe, Tiny, TwoLoaders, assert_equal, data, loader, trainer_of

pytestmark = ORDINARY_FITS

BATCH = 8 * 4 * 4 + 8 * 8
"""Bytes of a batch of eight samples: four floats and a label each."""


CALLS = {"move": 0, "after": 0}


class Augmenting(Dataset):
    """Draws from torch's random state in this process."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        x, y = data(seed=5)[index]
        return x + torch.randn(4), y


class Moving(Polite):
    """Counts what its hooks are asked to do with validation batches; not in itself, where a pass would undo it."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        if not self.trainer.training:
            CALLS["move"] += 1
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            CALLS["after"] += 1
        return batch


def at_start(tmp_path, function, val, kind=Polite, **arguments):
    """What a function makes of an open scorer, at the start of a fit."""

    def open_and_call(trainer, pl_module):
        with ValidationScorer(trainer, pl_module, **arguments) as scorer:
            return function(scorer)

    probe = Probe(open_and_call, 0)
    torch.manual_seed(3)
    trainer = trainer_of(tmp_path, probe, max_epochs=1, max_steps=1, num_sanity_val_steps=0)
    trainer.fit(kind(), loader(drop_last=True), val)
    return probe.result


def shuffled(**arguments):
    return DataLoader(Augmenting(), **{"batch_size": 8, "shuffle": True, **arguments})


LOADERS = {
    "plain": lambda: loader(),
    "shuffled": shuffled,
    "of its own": lambda: shuffled(generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("limit", [0, BATCH, 2 * BATCH + 1], ids=["none fits", "one fits", "two fit"])
@pytest.mark.parametrize("kind", LOADERS)
def test_scores_are_the_same_whether_batches_are_kept_or_read_again(tmp_path, kind, limit):
    parts = [ALL, Part(most=2), ALL, Part(1 / 3, 2 / 3), Part(2 / 3, 1.0)]

    def scores(scorer):
        return [scorer.metrics(part) for part in parts], [list(batches) for batches in scorer.batches]

    expected, batches = at_start(tmp_path, scores, LOADERS[kind]())
    found, again = at_start(tmp_path, scores, LOADERS[kind](), memory_limit=limit)
    assert found == expected
    assert len({metrics["val_loss_epoch"] for metrics in expected}) == 4
    assert_equal(batches, again, "batches")


@pytest.mark.slow
def test_workers_read_again_what_they_have_read(tmp_path):
    def scores(scorer):
        return [scorer.metrics()["val_loss_epoch"] for _ in range(2)]

    val = {"num_workers": 2, "persistent_workers": True}
    expected = at_start(tmp_path, scores, shuffled(**val))
    assert at_start(tmp_path, scores, shuffled(**val), memory_limit=0) == expected
    assert expected[0] == expected[1]


def test_two_loaders_are_read_again_each(tmp_path):
    def scores(scorer):
        return scorer.metrics(), scorer.metrics(Part(0.0, 0.5))

    def val():
        return [shuffled(), shuffled(batch_size=4)]

    expected = at_start(tmp_path, scores, val(), TwoLoaders)
    assert at_start(tmp_path, scores, val(), TwoLoaders, memory_limit=0) == expected


def test_what_fits_is_kept_and_no_more(tmp_path):
    def kinds(scorer):
        [whole], memory = scorer.batches, scorer.data.memory_left
        return type(whole), len(whole), memory

    assert at_start(tmp_path, kinds, loader(), memory_limit=6 * BATCH) == (list, 3, 6 * BATCH - 22 * (16 + 8))
    assert at_start(tmp_path, kinds, loader(), memory_limit=4 * BATCH)[:2] == (BatchesReadAgain, 3)


def test_a_journal_knows_data_again_whether_they_fit_or_not(tmp_path):
    def known(scorer):
        return digest(scorer.batches)

    assert at_start(tmp_path, known, shuffled()) == at_start(tmp_path, known, shuffled(), memory_limit=BATCH)


@pytest.mark.parametrize(("limit", "moved"), [(None, 3), (BATCH, 1 + 3 * 2)], ids=["kept", "read again"])
def test_batches_that_fit_are_moved_once_and_transformed_in_every_pass(tmp_path, limit, moved):
    def calls(scorer):
        CALLS.update(move=0, after=0)
        scores = [scorer.metrics() for _ in range(3)]
        scorer.first_batch()
        assert len({score["val_loss_epoch"] for score in scores}) == 1
        return dict(CALLS)

    assert at_start(tmp_path, calls, loader(), Moving, memory_limit=limit) == {"move": moved, "after": 3 * 3 + 1}


def test_the_memory_format_of_a_batch_is_kept(tmp_path):
    formats = []

    class Formats(Tiny):
        def validation_step(self, batch, batch_idx):
            formats.append(batch.is_contiguous(memory_format=torch.channels_last))
            self.log("val_loss", batch.mean())

        def on_validation_epoch_end(self):
            pass

    images = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(2)]
    val = DataLoader(images, batch_size=None)
    at_start(tmp_path, lambda scorer: [scorer.metrics() for _ in range(2)], val, Formats)
    assert formats[:4] == [True] * 4


def test_memory_is_that_of_tensors_wherever_they_lie():
    class Graph:
        def __init__(self):
            self.x, self.edges = torch.zeros(5), {"a": torch.zeros(2, dtype=torch.long)}

    assert bytes_of([Graph(), torch.zeros(3, dtype=torch.half)]) == 20 + 16 + 6
    assert free_memory(torch.device("cpu")) > 2**20


class OfSeveralKinds:
    """A batch that is no collection: a graph with nodes of several kinds."""

    def __iter__(self):
        raise NotImplementedError


def test_a_batch_that_cannot_be_iterated_counts_as_one_sample():
    assert samples_of(OfSeveralKinds()) == 1
    assert samples_of([torch.zeros(3, 2), OfSeveralKinds()]) == 3
