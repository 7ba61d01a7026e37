"""The teacher: what it adds to the gradients of training, what it leaves alone, and where it is refused."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from lightning_softprune import prune
from lightning_softprune.trainer import refuse_teacher
from support.modules import (
    AtEpochStart,
    AutoEncoder,
    ConvClassifier,
    Manual,
    assert_same,
    fit,
    loaders,
    made,
    run_state,
    softpruning,
    trainer_of,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

RATE, WEIGHT = 0.002, 3.0


class Stochastic(AutoEncoder):
    """Plain SGD, a BatchNorm, and batches that count by their place."""

    def __init__(self):
        super().__init__(norm=True)

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] * (1.0 + 0.1 * batch_idx)], batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Steps(pl.Callback):
    """Copies of the module before each batch of an epoch and after it, with the batch."""

    def __init__(self, epoch=1):
        self.epoch, self.before, self.after, self.batches = epoch, [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch:
            self.before.append(detached(pl_module))
            self.batches.append(batch[0] * (1.0 + 0.1 * batch_idx))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch:
            self.after.append(detached(pl_module))


def detached(module):
    """The two parts of an autoencoder, and copies of its weights."""
    found = copy.deepcopy(torch.nn.ModuleDict({"encoder": module.encoder, "decoder": module.decoder}))
    found.zero_grad()
    return found


def ran(parts, x):
    return parts["decoder"](parts["encoder"](x))


class Halved(MixedPrecision):
    """Half precision on the CPU, with a scaler, which Lightning has for CUDA only."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


@pytest.mark.parametrize("accumulated", [1, 2, "halved"])
def test_a_step_is_that_on_the_loss_and_the_weighted_mismatch(tmp_path, accumulated):
    seen, steps = [], Steps()
    look = AtEpochStart(lambda _, module: seen.append(detached(module).eval()))  # what a callback kept would be pruned
    half = accumulated == "halved"
    together = 1 if half else accumulated
    arguments = {"plugins": [Halved()]} if half else {"accumulate_grad_batches": together}
    pruning = softpruning(teacher=WEIGHT)
    fit(tmp_path, made(Stochastic), look, pruning, steps, max_epochs=2, **arguments)
    (dense,), ends = seen, range(together - 1, len(steps.batches), together)
    assert len(ends) == 4 // together
    for end in ends:
        expected = {}
        for number in range(end - together + 1, end + 1):
            x, pupil = steps.batches[number], steps.before[number].train()
            out, wanted = ran(pupil, x), ran(dense, x).detach()
            missed = (out - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()
            loss = (F.mse_loss(out, x) + WEIGHT * missed) / together
            for (name, parameter), gradient in zip(
                pupil.named_parameters(), torch.autograd.grad(loss, list(pupil.parameters())), strict=True
            ):
                expected[name] = expected.get(name, parameter.detach()) - RATE * gradient
        found = dict(steps.after[end].named_parameters())
        before = dict(steps.before[end].named_parameters())
        for name, value in expected.items():
            moved, wanted = found[name] - before[name], value - before[name]
            assert wanted.norm() > 1e-4 or "0.bias" in name, name  # in front of the BatchNorm
            assert (moved - wanted).norm() <= (0.05 if half else 1e-4) * wanted.norm() + (1e-4 if half else 1e-6), name
    tracked = [parts["encoder"][1].num_batches_tracked for parts in (steps.after[0], steps.after[-1])]
    assert tracked[1] - tracked[0] == len(steps.batches) - 1


class Telling(ConvClassifier):
    """A step that draws random numbers, changes its batch, and keeps and logs what it sees."""

    def __init__(self):
        super().__init__()
        self.seen, self.train_acc = [], torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch, batch_idx):
        batch[0].add_(torch.randn_like(batch[0]))
        out = self(batch[0])
        self.train_acc(out, batch[1])
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        self.seen.append(batch[0].sum().item())
        return F.cross_entropy(out, batch[1])


def test_all_but_gradients_is_left_alone(tmp_path):
    def ended(teacher):
        module, found = made(Telling), {}

        class AtTheEnd(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                found.update(run_state(trainer), state=copy.deepcopy(pl_module.state_dict()))

        fit(tmp_path, module, pruning := softpruning(teacher=teacher), AtTheEnd(), max_epochs=3)
        assert pruning.results[0].applied
        assert pruning._teacher is None
        return {**found, "seen": module.seen}

    plain, taught = ended(0.0), ended(1e-30)  # too little for any weight
    assert_same(taught, plain)
    assert not torch.equal(ended(1.0)["state"]["features.0.weight"], plain["state"]["features.0.weight"])


def test_seeds_of_any_size_teach(tmp_path):
    for seed in (2**64 - 1, 2**70):
        fit(tmp_path, made(), pruning := softpruning(teacher=0.5, seed=seed), max_epochs=2)
        assert pruning.results[0].applied


def test_a_second_round_teaches_from_the_network_before_it(tmp_path):
    seen, steps = [], Steps(2)
    look = AtEpochStart(lambda _, module: seen.append(detached(module).eval()), epoch=2)
    pruning = softpruning(teacher=WEIGHT, epochs=[1, 2], tolerance=0.1)
    fit(tmp_path, made(Stochastic), look, pruning, steps, max_epochs=3)
    assert [result.applied for result in pruning.results] == [True, True]
    x, pupil = steps.batches[0], steps.before[0].train()
    out, wanted = ran(pupil, x), ran(seen[0], x).detach()
    loss = F.mse_loss(out, x) + WEIGHT * (out - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()
    gradients = torch.autograd.grad(loss, list(pupil.parameters()))
    for before, gradient, after in zip(pupil.parameters(), gradients, steps.after[0].parameters(), strict=True):
        torch.testing.assert_close(after, before - RATE * gradient)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_that_resumes_says_that_the_teacher_is_gone(tmp_path):
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, made(), softpruning(teacher=1.0), saved, max_epochs=2, enable_checkpointing=True)
    trainer, module = trainer_of(tmp_path, softpruning(teacher=1.0), max_epochs=3), made()
    with pytest.warns(UserWarning, match=r"teacher=1\.0: the dense network is in no checkpoint"):
        trainer.fit(module, **loaders(module), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=False)
    assert trainer.current_epoch == 3


class FromIterator(AutoEncoder):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


def compiled():
    module = made()
    module.encoder.compile(backend="eager")
    return module


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: made(Manual), "optimization is manual"),
        (lambda: made(FromIterator), "takes its batches from an iterator"),
        (compiled, "the module is compiled"),
    ],
)
def test_where_nothing_can_be_added_to_gradients_it_is_refused_before_training(tmp_path, make, words):
    module, trainer = make(), trainer_of(tmp_path, softpruning(teacher=0.5))
    with pytest.raises(MisconfigurationException, match=f"teacher: anything but 0 is not supported here: .*{words}"):
        trainer.fit(module, **loaders(module))
    assert trainer.global_step == 0


def test_several_processes_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, strategy="ddp", devices=2)  # not started
    with pytest.raises(MisconfigurationException, match="DDPStrategy trains in several processes"):
        refuse_teacher(trainer, made())


def test_prune_which_trains_nothing_takes_no_teacher():
    with pytest.raises(ValueError, match=r"teacher: 0\.5 has no meaning in prune\(\)"):
        prune(made(), **loaders(made()), teacher=0.5)
