"""Without a training run: list a model's groups; prune a trained module in place.

The round of `prune` is the callback's own, at the start of a fit that ends before its first batch. So everything the
Trainer provides (device, precision, data hooks, distributed processes) is as in a fit, and there is no second way to
prune.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_softprune.callback import SoftPruning
from lightning_softprune.graph import (
    Groups,
    LayerSpec,
    check_layers,
    checked_layers,
    coverage,
    find_yardsticks,
    record_usage,
    register_layers,
)
from lightning_softprune.results import PruningResult
from lightning_softprune.round import StepsToTrace, prepare_groups
from lightning_softprune.surgery import Transaction
from lightning_softprune.trainer import (
    GradientsWhereNeeded,
    MisconfigurationException,
    Step,
    StillParameters,
    as_far_as_it_runs,
    attributes_of,
    callbacks_of,
    code_in_training,
    compiler_off,
    has_inference_tensors,
    is_overridden,
    isolated_rng,
    make_fresh,
    metrics_in,
    one_epoch_more,
    reads_its_mode,
    run_steps,
    what_a_step_shows,
    why_training_ended,
)
from lightning_softprune.utilities.checks import check_names
from lightning_softprune.utilities.libraries import counterpart, counterparts, library_of
from lightning_softprune.utilities.snapshot import Snapshot


def find_groups(
    model: nn.Module,
    batch: Any = None,
    *,
    components: dict[str, list[str]] | None = None,
    ignore: Sequence[str] | None = None,
    layers: Sequence[LayerSpec] | None = None,
) -> Groups:
    """List the pruning groups of a model, and everything that is left alone with the reason.

    Args:
        model: A LightningModule, or any ``nn.Module``. It is run, and is unchanged afterwards.
        batch: For a LightningModule, a batch as its loaders yield it, on the module's device: its `validation_step` is
            run (and `training_step`, where optimization is automatic). For another module, its input, a tuple of
            inputs, or a mapping by its forward's names. ``None``: the LightningModule's `example_input_array`.
        components: Component name -> module-name patterns.
        ignore: Patterns of modules that must keep their outputs and inputs.
        layers: Layer types of your own, as for :func:`register_layer`; they are known from here on.

    Returns:
        The groups in the order in which the model runs them, a list that prints as a table, with a last line, its
        ``coverage``, that says how much of the model they reach.

    Raises:
        ValueError: No batch and no `example_input_array`; a step that asks for a trainer where the model has none; a
            pattern that matches nothing; or a layer type of your own that does not fit the layers.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> for group in find_groups(model, torch.zeros(1, 4)):
    ...     print(group.name, group.num_channels, group.reason or "prunable")
    0 8 prunable
    2 2 2 produces an output of the network
    >>> print(find_groups(model, torch.zeros(1, 4)).coverage)
    97 % of the parameters are in prunable groups; largest left out: 2 (2 produces an output of the network)
    """
    register_layers(checked_layers("layers", layers))
    check_layers(model)
    predicting: Step | None = None
    if isinstance(model, counterparts(pl.LightningModule)) and batch is not None:
        steps = _module_steps(model, batch)
        if is_overridden("predict_step", model):
            predicting = _put_back(model, _plain_step(model, "predict_step", batch))
    else:
        batch = getattr(model, "example_input_array", None) if batch is None else batch
        if batch is None:
            raise ValueError("batch: None, and the model has no example_input_array; pass a batch to run the model on")
        steps = {}
    steps = steps or {"": partial(_called, model, batch)}
    runs = {name: _put_back(model, step) for name, step in steps.items()}
    validating = runs.get("validation_step", next(iter(runs.values())))
    with isolated_rng(0), torch.inference_mode(False), Transaction(model), compiler_off():
        _run_once(model, list(steps.values()))
        outside = _no_part_of(model, validating)
        with record_usage(model, outside) as judged:
            run_steps([validating])
        traced = [*runs.values(), *_in_training(model, steps)]
        how = StepsToTrace(traced, judged.parameters, outside, lambda: [*runs.values()], predicting=predicting)
        found = prepare_groups(model, how, components, ignore or ())
    return Groups(found, coverage(model, found))


_BEGINNINGS = {"validation_step": "on_validation_epoch_start", "training_step": "on_train_epoch_start"}


def _module_steps(model: pl.LightningModule, batch: Any) -> dict[str, Step]:
    """The module's own steps on a batch, without a trainer, by name.

    Hooks may want a trainer, which is not here: they are called only where a step misses what they make.
    """
    names = ["validation_step"] if is_overridden("validation_step", model) else []
    if model.automatic_optimization and is_overridden("training_step", model):
        names.append("training_step")
    steps: dict[str, Step] = {}
    gradients = GradientsWhereNeeded()

    def step_of(name: str, begin: bool = False) -> Step:
        step = _plain_step(model, name, batch, begin)
        return partial(gradients, step) if name == "training_step" else step

    for name in names:
        begin = False
        try:
            with torch.inference_mode(False):
                run_steps([_put_back(model, step_of(name))])
        except AttributeError:
            begin = True
        steps[name] = step_of(name, begin)
    return steps


def _called(model: nn.Module, batch: Any) -> Any:
    """What a model returns for inputs: one, a tuple of them, or a mapping by their names."""
    if isinstance(batch, tuple):
        return model(*batch)
    if isinstance(batch, Mapping) and _takes_by_name(model, batch):
        return model(**batch)
    return model(batch)


def _takes_by_name(model: nn.Module, inputs: Mapping[Any, Any]) -> bool:
    """Whether a model's forward has these names for its inputs; else it takes the mapping itself."""
    try:
        inspect.signature(model.forward).bind(**inputs)
    except (TypeError, ValueError):
        return False
    return True


def _no_part_of(model: nn.Module, validating: Step) -> dict[str, str]:
    """What only measures -> why it is left alone: metrics, and frozen networks of losses and teachers."""
    outside = metrics_in(model)
    trained = {name for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}
    return outside | find_yardsticks(model, validating, outside, trained)


def _run_once(model: nn.Module, steps: list[Step]) -> None:
    """Let the model make what it makes when it first runs, as it has long done in a fit (a table of positions)."""
    make_fresh(model)
    model.eval()
    run_steps(steps)


def _in_training(model: nn.Module, steps: dict[str, Step]) -> list[Step]:
    """The training step, telling code that it trains, where code asks."""
    if "training_step" not in steps or not reads_its_mode(model):
        return []
    return [as_far_as_it_runs(_put_back(model, steps["training_step"], code_in_training))]


def _put_back(model: nn.Module, step: Step, mode: Callable[[nn.Module], object] = nn.Module.eval) -> Step:
    """The step in eval mode, or another, leaving nothing behind."""
    still = StillParameters()

    def run() -> Any:
        memory = Snapshot()
        memory.contents(model)
        with memory.around(), still(model):
            make_fresh(model)
            mode(model)
            return step()

    return run


def _plain_step(model: pl.LightningModule, name: str, batch: Any, begin: bool = False) -> Step:
    """One step that writes no log; it returns all that it shows."""
    function = getattr(model, name)
    takes_index = is_param_in_hook_signature(function, "batch_idx", min_args=2)

    def step() -> Any:
        logged: dict[str, Any] = {}
        model.__dict__.update(
            log=lambda name, value, *_, **__: logged.update({name: value}),
            log_dict=lambda dictionary, *_, **__: logged.update(dictionary.items()),
        )
        try:
            if begin:
                getattr(model, _BEGINNINGS[name])()
            before = attributes_of(model)
            returned = function(batch, 0) if takes_index else function(batch)
            return what_a_step_shows(model, name, returned, logged, before)
        except RuntimeError as error:
            if str(error).endswith(_NO_TRAINER):
                raise ValueError(
                    f"model: its {name} asks for `self.trainer`, which it has in a fit alone; give it one,"
                    " `model.trainer = Trainer()`"
                ) from error
            raise
        finally:
            del model.__dict__["log"], model.__dict__["log_dict"]

    return step


_NO_TRAINER = "is not attached to a `Trainer`."
"""How Lightning says that a module has none."""

_WITHOUT_MEANING = ("epochs", "finetune_epochs")


def prune(
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    trainer: pl.Trainer | None = None,
    **arguments: Any,
) -> PruningResult:
    """Prune a trained module in place: search, prune, compensate, no training.

    Args:
        model: A trained LightningModule. Sparsity is measured against it as it is given.
        datamodule: Its data; or else `train_dataloaders` and `val_dataloaders`, or the module's own loaders.
        train_dataloaders: Training data, for rankings and compensation. Nothing is trained on them.
        val_dataloaders: Validation data, which trials are scored on.
        trainer: For devices, precision, strategy and folders; its callbacks and loggers take part. Its count of epochs
            is afterwards what it was. Default: a Trainer with one device and neither logger nor checkpoints.
        **arguments: Those of :class:`SoftPruning`, except `epochs`, `finetune_epochs` and `teacher`.

    Returns:
        What was found; ``applied`` says whether the module was pruned. As after every fit, the module is on the CPU.

    Raises:
        TypeError: `model` is not a LightningModule, `trainer` or `datamodule` comes from another library than it
            (`lightning.pytorch`, `pytorch_lightning`), or an argument is unknown or has no meaning here.
        MisconfigurationException: See :class:`SoftPruning`. Whatever fails, also in the validation of the pruned
            module, the module is then as it was.
    """
    if not isinstance(model, counterparts(pl.LightningModule)):
        raise TypeError(f"model: {type(model).__name__} is not a LightningModule, which is needed to score plans")
    check_names("prune", arguments, [*inspect.signature(SoftPruning).parameters, *inspect.signature(prune).parameters])
    for name in _WITHOUT_MEANING:
        if name in arguments:
            raise TypeError(f"{name}: {arguments[name]!r} has no meaning in prune(), which runs one round at once")
    if arguments.get("teacher", 0.0) != 0.0:
        given = arguments["teacher"]
        raise ValueError(f"teacher: {given!r} has no meaning in prune(), after which nothing is trained; see `healing`")
    if datamodule is not None and not isinstance(datamodule, counterparts(pl.LightningDataModule)):
        raise TypeError(
            f"datamodule: {datamodule!r} is not a LightningDataModule; loaders go to train_dataloaders, val_dataloaders"
        )
    if trainer is not None and not isinstance(trainer, counterparts(pl.Trainer)):
        raise TypeError(f"trainer: {trainer!r} is not a Trainer")
    _check_library(model, datamodule=datamodule, trainer=trainer)
    _check_data(model, datamodule, train_dataloader=train_dataloaders, val_dataloader=val_dataloaders)
    if trainer is None:
        trainer = counterpart(pl.Trainer, model)(
            max_epochs=1,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
    elif any(isinstance(callback, SoftPruning) for callback in callbacks_of(trainer)):
        raise MisconfigurationException("trainer: it has a SoftPruning callback already; prune() brings its own")
    if trainer.limit_train_batches == 0:
        raise MisconfigurationException(
            "trainer: limit_train_batches=0 leaves no training batch, which rankings and compensation look at"
        )
    callback = SoftPruning(epochs=trainer.current_epoch, finetune_epochs=0, **arguments)
    callback.as_given = True
    return _run_round(model, callback, trainer, train_dataloaders, val_dataloaders, datamodule)


def _run_round(
    model: pl.LightningModule,
    callback: SoftPruning,
    trainer: pl.Trainer,
    train_dataloaders: Any,
    val_dataloaders: Any,
    datamodule: pl.LightningDataModule | None,
) -> PruningResult:
    """The callback's round in a fit of the trainer's; the model is as before where anything in that fit fails."""
    flags = {name: module.training for name, module in model.named_modules()}
    if has_inference_tensors(model):
        make_fresh(model)
    try:
        # The fit validates what the round has committed, and may fail in that. Values come back to their own device.
        with isolated_rng(), one_epoch_more(trainer, callback), Transaction(model) as transaction:
            model.train()  # as a fit expects it; the round sets the mode of each pass itself
            trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
            if not callback.results:
                _refuse_end(trainer)
            transaction.commit()
    finally:
        for name, module in model.named_modules():
            module.training = flags.get(name, module.training)
    return callback.results[0]


def _refuse_end(trainer: pl.Trainer) -> NoReturn:
    """Say why there was no round."""
    if trainer.num_training_batches == 0:
        raise MisconfigurationException(
            "train_dataloaders: they yield no batch (with drop_last=True, a loader needs one full batch), and rankings "
            "and compensation look at training data"
        )
    raise RuntimeError(f"the trainer ended its fit before the round began: {why_training_ended(trainer)}")


def _check_library(model: pl.LightningModule, **given: object) -> None:
    for name, value in given.items():
        if value is not None and library_of(value) != library_of(model):
            raise TypeError(
                f"{name}: {type(value).__name__} comes from {library_of(value)}, and {type(model).__name__} from "
                f"{library_of(model)}, whose classes do not work together; import all of them from one"
            )


def _check_data(model: pl.LightningModule, datamodule: pl.LightningDataModule | None, **given: Any) -> None:
    """Refuse data that are missing; what is given twice is Lightning's to refuse."""
    sources = [source for source in (datamodule, model) if source is not None]
    purposes = {"train_dataloader": "rankings and compensation look at", "val_dataloader": "plans are scored on"}
    for method, purpose in purposes.items():
        if given[method] is None and not any(is_overridden(method, source) for source in sources):
            names = " and ".join(type(source).__name__ for source in sources)
            raise MisconfigurationException(
                f"{method}s: None, and there is no `{method}` in {names}; it gives the data that {purpose}"
            )
