"""Oracles: the uninterrupted run, and the saved model's own outputs."""

import copy
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_softprune import (
    PruningResult,
    find_groups,
    load_from_checkpoint,
)
from lightning_softprune.checkpoint import ModelShapes, keep_record
from lightning_softprune.checkpoint.record import order_parameters
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.checkpoints import ROUNDS, Scheduled, data, file_of, keep_all, mlp, run, sizes
from support.modules import (
    AtEpochStart,
    AutoEncoder,
    assert_optimizers_hold_live_parameters,
    count,
    loaders,
    made,
    softpruning,
    trainer_of,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def pruned_elsewhere(module):
    """Bring a module into a shape that no checkpoint of the run has."""
    batch = next(iter(loaders(None)["train_dataloaders"]))
    groups = [group for group in find_groups(module, batch) if group.prunable]
    before = ModelShapes.of(module)
    apply_plan(module, groups, Plan(tuple((0,) for _ in groups)))
    keep_record(module, before, [])
    return module


def plans(results):
    return [(r.epoch, r.groups, r.costs_after, r.sparsity) for r in results]


STEPS = {
    "before": ("epochs", {"epoch": 0}, 0),
    "mid-epoch before": ("steps", {"epoch": 0, "step": 4}, 0),
    "at the first round": ("steps", {"epoch": 0, "step": 6}, 0),
    "mid-epoch after": ("steps", {"epoch": 1, "step": 8}, 1),
    "between": ("epochs", {"epoch": 1}, 1),
    "last step before the second": ("steps", {"epoch": 2, "step": 18}, 1),
    "at the second round": ("epochs", {"epoch": 2}, 1),
    "after": ("epochs", {"epoch": 3}, 2),
}


@pytest.mark.parametrize(
    ("where", "memory"), [*((where, "dense") for where in STEPS), ("before", "pruned"), ("between", "pruned")]
)
def test_a_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, where, memory):
    folder, _, whole, callback = uninterrupted
    kind, at, done = STEPS[where]
    path = file_of(folder, kind, **at)
    step = torch.load(path, weights_only=True)["global_step"]
    again, module = softpruning(**ROUNDS), made(Scheduled, seed=3)
    if memory == "pruned":
        pruned_elsewhere(module)
    module.losses.clear()
    seen = []

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((len(again.results), "on_load_checkpoint" in vars(pl_module)))

    trainer = run(tmp_path, module, again, AtStart(), ckpt_path=path, seed=99)
    assert seen == [(done, False)]
    assert len(module.losses) == len(whole.losses) - step
    assert max(abs(a - b) for a, b in zip(module.losses, whole.losses[step:], strict=True)) <= 1e-6
    assert plans(again.results) == plans(callback.results)
    assert sizes(module) == sizes(whole)
    assert_optimizers_hold_live_parameters(trainer, module)
    assert again.results[-1].sparsity == pytest.approx(1 - count(module) / count(Scheduled()), abs=1e-6)
    assert len(module.loaded) == 1  # the user's own hook


@pytest.mark.parametrize("place", ["before the callback", "after the callback"])
def test_a_checkpoint_from_the_start_of_the_rounds_epoch_is_resumed(tmp_path, place):
    path = tmp_path / "start.ckpt"

    def save(trainer, pl_module):
        trainer.save_checkpoint(path)

    whole, callback = made(Scheduled), softpruning(epochs=1)
    saving = AtEpochStart(save, epoch=1)
    run(tmp_path, whole, *([saving, callback] if place == "before the callback" else [callback, saving]), max_epochs=2)
    module, again = made(Scheduled, seed=3), softpruning(epochs=1)
    run(tmp_path, module, again, ckpt_path=path, max_epochs=3)  # Lightning counts such an epoch twice
    assert plans(again.results) == plans(callback.results)
    assert max(abs(a - b) for a, b in zip(module.losses[:6], whole.losses[6:], strict=True)) <= 1e-6


@pytest.mark.parametrize("first", ["averaging", "pruning"])
def test_a_run_with_averaged_weights_is_resumed(tmp_path, first):
    def callbacks(*more):
        pair = [softpruning(epochs=1), EMAWeightAveraging(decay=0.5)]
        return [*(pair if first == "pruning" else pair[::-1]), *more]

    whole, module = made(Scheduled), made(Scheduled, seed=3)
    run(tmp_path, whole, *callbacks(keep_all(tmp_path)), max_epochs=3)
    (path,) = tmp_path.glob("epoch=1*.ckpt")
    run(tmp_path, module, *callbacks(), max_epochs=3, ckpt_path=path)
    assert max(abs(a - b) for a, b in zip(module.losses, whole.losses[12:], strict=True)) <= 1e-6
    averaged = zip(module.state_dict().values(), whole.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in averaged)


def test_no_trace_of_loading_is_left(uninterrupted):
    _, trainer, module, _ = uninterrupted
    assert "on_load_checkpoint" not in vars(module)
    dense = made(Scheduled)
    before = set(vars(dense))
    trainer.validate(dense, loaders(None)["val_dataloaders"], verbose=False)
    assert set(vars(dense)) - before <= {"_trainer"}


def test_a_checkpoint_is_plain_and_has_a_record_from_the_first_round_on(uninterrupted):
    folder, _, module, callback = uninterrupted
    for kind in ("epochs", "weights"):
        found = [torch.load(file_of(folder, kind, epoch=e), weights_only=True).get("softprune") for e in range(5)]
        assert found[0] is None
        for epoch, record in enumerate(found[1:], start=1):
            results = [PruningResult.from_dict(result) for result in record["results"]]
            assert results == [result for result in callback.results if result.epoch <= epoch]
            json.dumps(record)
        assert ModelShapes.from_dict(found[4]) == ModelShapes.of(module)
        assert ModelShapes.from_dict(found[4]["dense"]) == ModelShapes.of(Scheduled())
        assert set(found[4]["created_biases"]) >= {"decoder.0.bias"}


@pytest.mark.parametrize("memory", ["dense", "pruned"])
@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize("kind", ["epochs", "weights"])
def test_validate_test_and_predict_take_any_checkpoint_into_any_shape(uninterrupted, tmp_path, kind, epoch, memory):
    folder, *_ = uninterrupted
    path = file_of(folder, kind, epoch=epoch)
    oracle = load_from_checkpoint(Scheduled, path)
    val = loaders(None)["val_dataloaders"]
    module = made(Scheduled, seed=3)
    if memory == "pruned":
        pruned_elsewhere(module)
    trainer = trainer_of(tmp_path, softpruning(**ROUNDS))
    with torch.no_grad():
        expected = torch.cat([oracle(x) for (x,) in val])
        loss = oracle.loss([torch.cat([x for (x,) in val])]).item()
    assert torch.equal(torch.cat(trainer.predict(module, val, ckpt_path=path)), expected)
    for run_of, name in ((trainer.validate, "val_loss"), (trainer.test, "test_loss")):
        (metrics,) = run_of(module, val, ckpt_path=path, verbose=False)
        assert metrics[name] == pytest.approx(loss, abs=1e-6)
        assert "on_load_checkpoint" not in vars(module)


def test_best_and_last_work_after_a_fit_and_leave_its_results_alone(tmp_path):
    callback, module = softpruning(epochs=2, reset_monitors=False), made(Scheduled)
    trainer = run(
        tmp_path,
        module,
        callback,
        ModelCheckpoint(tmp_path, save_last=True, monitor="epoch_number", mode="min", save_top_k=-1),
        EpochNumber(),
    )
    val = loaders(None)["val_dataloaders"]
    pruned, results = sizes(module), list(callback.results)
    trainer.test(module, val, ckpt_path="best", verbose=False)  # the dense model of the first epoch
    assert sizes(module) == sizes(Scheduled())
    assert callback.results == results
    trainer.test(module, val, ckpt_path="last", verbose=False)
    assert sizes(module) == pruned
    fresh = softpruning(epochs=2)
    trainer_of(tmp_path, fresh).test(made(Scheduled), val, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert fresh.results == results


class EpochNumber(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("epoch_number", float(trainer.current_epoch))


def test_a_saved_model_is_right_when_saved_again_in_any_way(uninterrupted, tmp_path):
    folder, *_ = uninterrupted
    val = loaders(None)["val_dataloaders"]
    loaded = load_from_checkpoint(Scheduled, file_of(folder, "weights", epoch=4))
    (x,) = next(iter(val))
    for number, model in enumerate((loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))):
        trainer = run(tmp_path / str(number), model, max_epochs=1)  # another run, without the callback
        model.eval()
        for weights_only in (True, False):
            path = tmp_path / f"{number}-{weights_only}.ckpt"
            trainer.save_checkpoint(path, weights_only=weights_only)
            again = load_from_checkpoint(Scheduled, path).eval()
            assert torch.equal(again(x), model(x))
            assert again.on_save_checkpoint.module is again


def test_history_after_another_round_is_that_of_the_new_run_and_dense_stays_dense(uninterrupted, tmp_path):
    folder, *_ = uninterrupted
    loaded = load_from_checkpoint(Scheduled, file_of(folder, "epochs", epoch=4))
    before = count(loaded)
    callback = softpruning(epochs=1, target_sparsity=0.8, tolerance=0.1)
    trainer = run(tmp_path, loaded, callback, max_epochs=2)
    assert callback.results[0].costs_before.params == before
    assert callback.results[0].sparsity == pytest.approx(1 - count(loaded) / count(Scheduled()))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    record = torch.load(tmp_path / "again.ckpt", weights_only=True)["softprune"]
    assert [result["epoch"] for result in record["results"]] == [1]
    assert len(record["earlier"]) >= 1
    assert record["earlier"][0]["costs_before"]["params"] == count(Scheduled())
    assert ModelShapes.from_dict(record["dense"]) == ModelShapes.of(Scheduled())
    again = load_from_checkpoint(Scheduled, tmp_path / "again.ckpt").eval()
    (x,) = next(iter(loaders(None)["val_dataloaders"]))
    assert torch.equal(again(x), loaded.eval()(x))


def test_a_second_fit_starts_afresh_and_a_continued_one_does_not_repeat(tmp_path):
    callback, module = softpruning(epochs=1), made(Scheduled)
    trainer = run(tmp_path, module, callback, max_epochs=2)
    first = list(callback.results)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, **data(module))
    assert callback.results == first
    assert len(module.losses) == 3 * len(data()["train_dataloaders"])
    other = made(Scheduled)
    run(tmp_path, other, callback, max_epochs=2)
    assert plans(callback.results) == plans(first)
    assert callback.results is not first
    assert sizes(other) == sizes(module)


def test_a_checkpoint_from_a_run_without_the_callback_brings_no_history(tmp_path):
    run(tmp_path, made(Scheduled), keep_all(tmp_path), max_epochs=1)
    callback = softpruning(epochs=1)
    module = made(Scheduled)
    run(tmp_path, module, callback, max_epochs=2)
    (path,) = tmp_path.glob("epoch=0*.ckpt")
    trainer = run(tmp_path, module, callback, max_epochs=2, ckpt_path=path)  # grown back, then pruned anew
    assert [result.epoch for result in callback.results] == [1]
    assert callback.results[0].costs_before.params == count(Scheduled())
    assert_optimizers_hold_live_parameters(trainer, module)


@pytest.mark.parametrize(("horizon", "epochs"), [(1, 2), (3, 4), (None, 6)])
def test_a_new_finetune_horizon_works(tmp_path, horizon, epochs):
    run(tmp_path, made(Scheduled), softpruning(epochs=1, finetune_epochs=1), keep_all(tmp_path), max_epochs=6)
    (path,) = tmp_path.glob("epoch=1*.ckpt")
    module, callback = made(Scheduled), softpruning(epochs=1, finetune_epochs=horizon)
    trainer = run(tmp_path, module, callback, max_epochs=6, ckpt_path=path)
    assert trainer.current_epoch == epochs
    assert len(callback.results) == 1


@pytest.mark.parametrize("epoch", [0, 1, 3])
@pytest.mark.parametrize(("horizon", "end"), [(None, 5), (2, None)])
def test_a_run_that_only_pruned_is_finetuned_later_as_if_it_had_been_at_once(tmp_path, epoch, horizon, end):
    whole = made(Scheduled)
    run(tmp_path, whole, softpruning(epochs=epoch, finetune_epochs=horizon))
    folder = tmp_path / "pruned"
    pruned = softpruning(epochs=epoch, finetune_epochs=0)
    trainer = run(tmp_path, made(Scheduled), pruned, keep_all(folder, save_last=True))
    trainer.save_checkpoint(folder / "afterwards.ckpt")
    assert trainer.current_epoch == epoch
    for path in (folder / "last.ckpt", folder / "afterwards.ckpt"):
        module, callback = made(Scheduled, seed=3), softpruning(epochs=epoch, finetune_epochs=horizon)
        trainer = run(tmp_path, module, callback, ckpt_path=path)
        assert plans(callback.results) == plans(pruned.results)
        assert trainer.current_epoch == (end or epoch + horizon)
        assert trainer.global_step == len(whole.losses)
        tuned = whole.losses[6 * epoch :]
        assert len(module.losses) == len(tuned) > 0
        assert max(abs(a - b) for a, b in zip(module.losses, tuned, strict=True)) <= 1e-6
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), whole.parameters(), strict=True)
        )


def test_a_run_that_only_pruned_is_finetuned_by_the_same_trainer(tmp_path):
    module, callback = made(Scheduled), softpruning(epochs=1, finetune_epochs=0)
    trainer = run(tmp_path, module, callback)
    callback.finetune_epochs = None
    trainer.fit(module, **data(module))
    assert [result.epoch for result in callback.results] == [1]
    assert trainer.current_epoch == 5
    assert len(module.losses) == 5 * len(data()["train_dataloaders"])


@pytest.mark.parametrize("saved_by", ["the callback's trainer", "a plain trainer"])
def test_another_trainer_may_have_looked_at_the_module_since(tmp_path, saved_by):
    """Its optimizers, of which there are none, are not those that are saved."""
    module = made()
    trainer = trainer_of(tmp_path, softpruning(epochs=0), max_epochs=1)
    trainer.fit(module, **loaders(module))
    if saved_by == "a plain trainer":
        trainer = trainer_of(tmp_path, max_epochs=1)
        trainer.fit(module, **loaders(module))
    trainer_of(tmp_path).validate(module, loaders(module)["val_dataloaders"], verbose=False)
    path = tmp_path / "late.ckpt"
    trainer.save_checkpoint(path)
    (groups,) = torch.load(path, weights_only=True)["softprune"]["optimizers"]
    names = [name for name, _ in module.named_parameters()]
    known = saved_by == "the callback's trainer"
    assert [name for group in groups for name in group] == (names if known else [None] * len(names))
    again = load_from_checkpoint(type(module), path)
    assert sizes(again) == sizes(module)
    fresh = made(seed=1)
    resumed = trainer_of(tmp_path, softpruning(epochs=0), max_epochs=2)
    resumed.fit(fresh, **loaders(fresh), ckpt_path=path)
    assert resumed.current_epoch == 2
    assert_optimizers_hold_live_parameters(resumed, fresh)


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")  # Lightning looks for a checkpoint of an earlier exception
def test_an_exception_leaves_no_trace_and_its_checkpoint_has_the_record(tmp_path):
    class Broken(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise ZeroDivisionError

    module = made(Scheduled)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, module, softpruning(epochs=1), Broken(), OnExceptionCheckpoint(tmp_path, "broken"))
    assert "on_load_checkpoint" not in vars(module)
    loaded = load_from_checkpoint(Scheduled, tmp_path / "broken.ckpt")
    assert sizes(loaded) == sizes(module)
    other = mlp(4, 8, 2)
    dense = made(AutoEncoder)
    with pytest.raises((ValueError, RuntimeError)):
        trainer_of(tmp_path, softpruning()).validate(
            dense, loaders(None)["val_dataloaders"], ckpt_path=wrong(tmp_path, other)
        )
    assert "on_load_checkpoint" not in vars(dense)


def wrong(tmp_path, net):
    checkpoint = {
        "state_dict": net.state_dict(),
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    return tmp_path / "wrong.ckpt"


def test_on_load_checkpoint_of_the_instance_comes_back(uninterrupted, tmp_path):
    folder, *_ = uninterrupted
    module, calls = made(Scheduled), []
    module.on_load_checkpoint = calls.append
    own = module.on_load_checkpoint
    trainer = trainer_of(tmp_path, softpruning())
    trainer.validate(
        module, loaders(None)["val_dataloaders"], ckpt_path=file_of(folder, "epochs", epoch=4), verbose=False
    )
    assert len(calls) == 1
    assert vars(module)["on_load_checkpoint"] is own


def test_the_users_hook_may_make_an_old_checkpoint_fit(tmp_path):
    class Renamed(Scheduled):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {k.removeprefix("old_"): v for k, v in checkpoint["state_dict"].items()}

    net = made(Scheduled)
    state = {f"old_{name}": value for name, value in net.state_dict().items()}
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": state, "pytorch-lightning_version": pl.__version__, "epoch": 0, "global_step": 0}, path)
    module = made(Renamed, seed=3)
    trainer_of(tmp_path, softpruning()).validate(
        module, loaders(None)["val_dataloaders"], ckpt_path=path, verbose=False
    )
    assert torch.equal(module.encoder[0].weight, net.encoder[0].weight)
    assert torch.equal(load_from_checkpoint(Renamed, path).encoder[0].weight, net.encoder[0].weight)


def test_parameters_are_in_the_recorded_order_when_the_state_comes_whatever_moved_them_since():
    """As a callback does that restores parameter groups of its own, behind ours."""

    module = torch.nn.Linear(3, 2)
    saved, optimizer = torch.optim.Adam([module.bias, module.weight]), torch.optim.Adam(module.parameters())
    module.weight.square().sum().backward()
    saved.step()
    order_parameters(module, [optimizer], {"optimizers": [[["bias", "weight"]]], "created_biases": ["bias"]})
    held = optimizer.param_groups[0]["params"]
    assert [id(parameter) for parameter in held] == [id(module.bias), id(module.weight)]
    held.reverse()
    optimizer.load_state_dict(saved.state_dict())
    assert [parameter.shape for parameter in optimizer.param_groups[0]["params"]] == [(2,), (2, 3)]
    assert optimizer.state[module.weight]["exp_avg"].shape == (2, 3)
    optimizer.param_groups[0]["params"].reverse()
    optimizer.load_state_dict(optimizer.state_dict())  # the next is not ours
    assert [parameter.shape for parameter in optimizer.param_groups[0]["params"]] == [(2, 3), (2,)]
