"""Loading without a trainer."""

import re
import threading

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_softprune import (
    PrunedCheckpointMixin,
    load_from_checkpoint,
    resize,
)
from lightning_softprune.checkpoint import ModelShapes
from support.checkpoints import Scheduled, file_of, keep_all, run, sizes
from support.modules import (
    AutoEncoder,
    fit,
    loaders,
    made,
    softpruning,
    trainer_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Mixed(PrunedCheckpointMixin, Scheduled):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epochs", "weights"])
@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize("load", ["function", "mixin", "both"])
def test_loading_needs_no_trainer_and_no_callback(uninterrupted, load, epoch, kind):
    folder, *_ = uninterrupted
    path = file_of(folder, kind, epoch=epoch)
    if load == "function":
        module = load_from_checkpoint(Scheduled, path)
    elif load == "mixin":
        module = Mixed.load_from_checkpoint(path, map_location="cpu", strict=True)
    else:
        module = load_from_checkpoint(Mixed, path)
    saved = torch.load(path, weights_only=True)
    assert type(module) is (Scheduled if load == "function" else Mixed)
    assert module.state_dict().keys() == saved["state_dict"].keys()
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in module.state_dict().items())
    if "softprune" in saved:
        assert ModelShapes.of(module) == ModelShapes.from_dict(saved["softprune"])
    assert module.loaded == [tuple(saved["state_dict"]["encoder.0.weight"].shape)]
    for cls in (Mixed, Scheduled, AutoEncoder):
        assert ("on_load_checkpoint" in vars(cls)) == (cls is Scheduled)


class NoBias(PrunedCheckpointMixin, AutoEncoder):
    """Compensation creates its biases; the optimizer is given names, or not."""

    def __init__(self, names=False):
        super().__init__(bias=False)
        self.save_hyperparameters()

    def configure_optimizers(self):
        rates = [{"params": part, "lr": rate} for part, rate in zip(self.parts(), (1e-2, 3e-3), strict=True)]
        return torch.optim.Adam(rates)

    def parts(self):
        for part in (self.encoder, self.decoder):
            yield list(part.named_parameters()) if self.hparams.names else list(part.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.parametrize("load", ["function", "mixin"])
@pytest.mark.parametrize("names", [True, False])
def test_training_goes_on_without_the_callback_also_with_biases_that_a_round_created(tmp_path, load, names):
    whole = made(NoBias, names=names)
    trainer = run(tmp_path, whole, softpruning(epochs=1), keep_all(tmp_path), max_epochs=4)
    (path,) = tmp_path.glob("epoch=2*.ckpt")
    assert len(torch.load(path, weights_only=True)["softprune"]["created_biases"]) >= 2
    module = load_from_checkpoint(NoBias, path) if load == "function" else NoBias.load_from_checkpoint(path)
    again = run(tmp_path, module, max_epochs=4, ckpt_path=path, seed=99)
    expected = whole.losses[18:]
    assert len(module.losses) == len(expected) == 6
    assert max(abs(a - b) for a, b in zip(module.losses, expected, strict=True)) <= 1e-6
    (one,), (other,) = trainer.optimizers, again.optimizers
    for group, same in zip(one.param_groups, other.param_groups, strict=True):
        assert group.get("param_names") == same.get("param_names")
        for parameter, twin in zip(group["params"], same["params"], strict=True):
            torch.testing.assert_close(parameter, twin, rtol=0, atol=1e-6)
            state = one.state[parameter]["exp_avg"], other.state[twin]["exp_avg"]
            torch.testing.assert_close(*state, rtol=0, atol=1e-6)
    if names:
        assert [group["param_names"] for group in again.optimizers[0].param_groups] == [
            [name for name, _ in part.named_parameters()] for part in (module.encoder, module.decoder)
        ]


def test_hyperparameters_are_those_of_the_file_unless_given(tmp_path):
    module = made(Scheduled, hidden=20, latent=6)
    trainer = run(tmp_path, module, softpruning(epochs=1), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_from_checkpoint(Scheduled, tmp_path / "x.ckpt")
    assert dict(loaded.hparams) == {"hidden": 20, "latent": 6}
    assert sizes(loaded) == sizes(module)
    other = load_from_checkpoint(Scheduled, tmp_path / "x.ckpt", hidden=24, map_location="cpu")
    assert other.hparams["hidden"] == 24
    assert sizes(other) == sizes(module)
    (tmp_path / "hparams.yaml").write_text("hidden: 12\nlatent: 10\n")
    assert (
        load_from_checkpoint(Scheduled, tmp_path / "x.ckpt", hparams_file=str(tmp_path / "hparams.yaml")).hparams[
            "latent"
        ]
        == 10
    )
    with open(tmp_path / "x.ckpt", "rb") as file:
        assert sizes(load_from_checkpoint(Scheduled, file)) == sizes(module)


def test_strict_is_the_users_choice(uninterrupted):
    class More(Scheduled):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.extra = nn.Linear(3, 3)

    folder, *_ = uninterrupted
    path = file_of(folder, "epochs", epoch=4)
    with pytest.raises(RuntimeError, match=r"extra\.weight"):
        load_from_checkpoint(More, path)
    with pytest.warns(UserWarning, match=r"extra\.weight"):
        module = load_from_checkpoint(More, path, strict=False)
    assert sizes(module)[:2] == sizes(load_from_checkpoint(Scheduled, path))[:2]


def test_another_class_is_refused_by_the_modules_name(uninterrupted):
    class Other(pl.LightningModule):
        def __init__(self, **_):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv1d(1, 2, 3))

    folder, *_ = uninterrupted
    with pytest.raises(ValueError, match=r"^encoder\.0: "):
        load_from_checkpoint(Other, file_of(folder, "epochs", epoch=4))


@pytest.mark.parametrize("content", [[1, 2], {"a": torch.ones(2)}])
def test_a_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt"):
        load_from_checkpoint(Scheduled, tmp_path / "foreign.ckpt")


def test_a_subclass_named_in_the_file_is_resized_too(uninterrupted):
    class Child(Scheduled):
        def on_load_checkpoint(self, checkpoint):
            super().on_load_checkpoint(checkpoint)
            self.loaded.append("child")

    folder, *_ = uninterrupted
    path = file_of(folder, "epochs", epoch=4)
    assert len(load_from_checkpoint(Child, path).loaded) == 2
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_from_checkpoint(Child, path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert "on_load_checkpoint" not in vars(AutoEncoder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint at all", b"\x80\x02}q\x00."])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ckpt: this file (cannot be read as|is not) a"):
        load_from_checkpoint(AutoEncoder, path)
    with pytest.raises(ValueError, match=r"model\.ckpt' is a path and neither a checkpoint.*load it first"):
        resize(AutoEncoder(), path)
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        load_from_checkpoint(AutoEncoder, tmp_path / "absent.ckpt")


ADVICE = "this checkpoint was pruned by SoftPruning: add the callback, use load_from_checkpoint or resizing()"


class Alone(PrunedCheckpointMixin, AutoEncoder):
    """The mixin beside a hook of its own, with biases that compensation creates."""

    def __init__(self):
        super().__init__(bias=False)
        self.loaded = []

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        self.loaded.append(tuple(self.encoder[0].weight.shape))


@pytest.fixture(scope="module")
def pruned_file(tmp_path_factory):
    """A pruned module that was saved, and its checkpoint."""
    folder, module = tmp_path_factory.mktemp("alone"), made(Alone)
    trainer = fit(folder, module, softpruning(epochs=0), max_epochs=1)
    trainer.save_checkpoint(folder / "pruned.ckpt")
    return module, folder / "pruned.ckpt"


WITHOUT_CALLBACK = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")


@pytest.mark.slow
@WITHOUT_CALLBACK
@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_with_the_mixin_a_trainer_needs_no_callback_to_evaluate_a_pruned_checkpoint(tmp_path, pruned_file, task):
    module, path = pruned_file
    fresh = made(Alone, seed=1)
    found = getattr(trainer_of(tmp_path), task)(fresh, loaders(fresh)["val_dataloaders"], ckpt_path=path)
    expected = getattr(trainer_of(tmp_path), task)(module, loaders(module)["val_dataloaders"])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert fresh.loaded == [tuple(module.encoder[0].weight.shape)], "the hook of its own finds the pruned shape"


@pytest.mark.slow
@WITHOUT_CALLBACK
def test_with_the_mixin_training_on_needs_the_callback_where_it_has_made_biases(tmp_path, pruned_file):
    _, path = pruned_file
    fresh = made(Alone, seed=1)
    with pytest.raises(ValueError, match=re.escape(ADVICE)):
        trainer_of(tmp_path, max_epochs=2).fit(fresh, **loaders(fresh), ckpt_path=path)


@pytest.mark.slow
@WITHOUT_CALLBACK
@pytest.mark.parametrize("how", ["test", "load_from_checkpoint", "load_state_dict"])
def test_without_the_callback_a_misfit_of_a_pruned_checkpoint_says_what_to_do(tmp_path, pruned_file, how):
    _, path = pruned_file

    class Plain(AutoEncoder):
        def __init__(self):
            super().__init__(bias=False)

        test_step = Alone.test_step

        def on_load_checkpoint(self, checkpoint):
            """A hook of the user's own that asks no base class."""

    plain = made(Plain)
    load = {
        "test": lambda: trainer_of(tmp_path).test(plain, loaders(plain)["val_dataloaders"], ckpt_path=path),
        "load_from_checkpoint": lambda: Plain.load_from_checkpoint(path),
        "load_state_dict": lambda: plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"]),
    }[how]
    with pytest.raises(RuntimeError, match=re.escape(ADVICE)) as raised:
        load()
    assert "size mismatch" in str(raised.value)
    with pytest.raises(RuntimeError) as other:
        plain.load_state_dict(made(AutoEncoder, hidden=4).state_dict())
    assert "SoftPruning" not in str(other.value)
