"""SoftPruning: what a user may ask for, checked and kept. What it does with it is in the classes below it."""

from __future__ import annotations

import math
from functools import partial
from types import FunctionType
from typing import Literal, Union

from lightning_softprune.calibration import Importance, checked_importance
from lightning_softprune.callback.hooks import PruningHooks
from lightning_softprune.compensation import COMPENSATIONS
from lightning_softprune.graph import LayerSpec, checked_layers, register_layers
from lightning_softprune.round import checked_bounds, checked_epochs, checked_limits, checked_patterns, checked_targets
from lightning_softprune.search import AUTO, COSTS, GradientSearch, SearchStrategy, parse_constraint, strategy_of
from lightning_softprune.utilities import checks

_NO_ARGUMENTS = frozenset({"self", "__class__"})


class SoftPruning(PruningHooks):
    """Make the network physically smaller while it trains, and keep its task metric.

    Args:
        monitor: The score of a plan: any metric the module logs while validating.
        mode: Whether a lower ("min") or a higher ("max") score is better. "auto": what the logged torchmetrics object
            says (`higher_is_better`), else "min" for names of losses and errors (`val_loss`, `rmse`); where neither
            tells, it has to be given.
        epochs: When to prune: with epoch ``e``, counted from 0, the search runs after the validation that closed epoch
            ``e - 1``, and the prune is in force when epoch ``e`` starts training; a list makes one round at each. A fit
            that goes on from a later epoch runs the rounds it has missed at once.
        target_sparsity: The fraction of the first dense model's parameters to remove: one number for the last round
            (earlier rounds follow a cubic schedule up to it), or one per round, never decreasing. ``None``: the highest
            sparsity that meets every constraint, to within `tolerance`. With five groups that takes about 40
            evaluations with `SensitivitySearch` and 50 with `GradientSearch`.
        tolerance: A plan is feasible when its sparsity is at most this far from the target. Where feasible plans remove
            at least what was asked for, one of them is chosen.
        cost: What sparsity is measured in, "params" or "macs" (multiply-accumulate operations of the validation step).
        limits: Further budgets: the fraction of the dense model's `params`, `macs` or `latency` that may remain, as in
            ``{"macs": 0.5}``. Latency is the median time of the validation step's forward in eval mode on the training
            device, relative to the dense model in the same run. It is measured on up to 6 finalists, and is noisy,
            above all for small models and on a busy machine: leave it some room. Where `target_sparsity` is one number
            for several rounds, limits on `params` and `macs` follow the same schedule: a round that aims at half of it
            has to take away half of what they ask for.
        constraints: Metric constraints such as ``"val_psnr >= 19.5"``, on any metric logged while validating; operators
            ``<=``, ``>=``, ``<``, ``>``.
        on_violation: What happens when no plan meets the constraints: "skip" leaves the model as it is and warns,
            "prune" prunes with the least violating plan and warns, "error" raises.
        search: How coefficients are searched: a strategy, of which the callback works on a copy, or the name of one
            with its default arguments ("gradient", "sensitivity", "grid", "random", "uniform", "norm", "optuna").
        granularity: What has a coefficient of its own: every group ("group"), or every component ("component"), whose
            coefficient all groups inside it share; groups that couple several components keep their own.
        components: Component name -> module-name patterns; ``None``: the top-level children of the module.
        ignore: Module-name patterns (fnmatch) that must keep their outputs and their inputs.
        layers: Layer types of your own, as for :func:`register_layer`; they are known from here on.
        twins: Module name -> the module it mirrors (target networks, EMA teachers, momentum encoders inside the
            module): a twin gets the same plan and has no coefficients of its own. What is not trained and looks like
            something that is has to be named here or in `ignore`.
        bounds: Pattern of group or component names -> ``[low, high]`` of their coefficients.
        importance: Which channels of a group go first: "magnitude", "activation", "taylor", "reconstruction" (one by
            one, that without which the consumers' outputs are still rebuilt best by least squares), "random", or a
            function ``(model, group) -> scores`` of your own: one real number per channel, the smallest go first
            (``inf``: last; NaN is an error); it is called once before training too. ``None``: "reconstruction" with
            least squares, but "activation" without, for streams to which several layers add, and for consumers of more
            than 1,536 inputs.
        compensation: How consumers make up for removed channels: "none", "bias" (their means move into the bias) or
            "least_squares" (they are predicted from the kept channels). Closed form, no training.
        healing: Training batches on which the committed plan is trained, inside the round, to compute what the dense
            network computes; 0: none. By the module's own steps, without labels and without your loss; what is learned
            is kept where the score is better. Constraints count on it: up to four smaller plans that miss them are
            healed on trial for a quarter of the batches each, and the smallest that then meets them is committed if it
            meets them once it is healed.
        teacher: After the round, the same matching goes on in ordinary training: the gradients of `teacher` times the
            error of each training batch, the fraction that the pruned network misses of the variance of the dense one's
            outputs, are added to those of your loss. Beside each training step that takes a pass of the dense network
            and a step of the pruned one, so that it is about twice as long, and until the fit ends the memory of a
            dense copy. The dense network is in no checkpoint: a fit that resumes goes on without. Automatic
            optimization on one device, not compiled. 0: none.
        round_to: Kept channels are a multiple of it, unless a group is left whole.
        search_batches: Validation batches of each loader that plans are scored on while they are searched for;
            ``None``: as few as it takes to tell plans apart, but at least 8 and 1,000 samples. Finalists, and the plan
            that is committed, are scored on all.
        memory_limit: GiB that a round may hold beside the model: validation batches that do not fit are read again from
            the loader in each pass. ``None``: a quarter of the free memory.
        latency_batch: Samples of the batch that latency is measured with, as in deployment: the first validation
            batch's, again and again where it has fewer. ``None``: that batch as it is.
        calibration_batches: Training batches that rankings and compensation look at. ``None``: 8, and up to 32 where
            "least_squares" lacks observations: where a layer, as those of an MLP, sees fewer than 8 rows for each of
            its inputs. Beyond 8 batches no more than 4,096 samples, and no more than a twentieth of an epoch.
        finetune_epochs: How many epochs to train after the last round, and then stop; ``None``: on to ``max_epochs``;
            0: stop with the pruned, validated, checkpointed model; `on_train_epoch_end` is not called once more for it.
        reset_monitors: After a round, EarlyStopping, ReduceLROnPlateau and ModelCheckpoint's best start afresh.
        seed: A round depends on seed and epoch alone: same data and weights, same plan.
        report: Write ``result.json``, ``trials.csv`` and ``report.html`` under ``<log_dir>/softprune/epoch=<e>/``, and
            figures for the loggers that show any (with matplotlib).
        verbose: Show a progress bar and tables, on rank zero.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is of the wrong type.

    Attributes:
        results: One :class:`PruningResult` per round.
        as_given: Whether a module that was pruned before is measured against itself as it is now, as `prune` does.

    >>> SoftPruning(target_sparsity=1.5)
    Traceback (most recent call last):
        ...
    ValueError: target_sparsity: 1.5 is not between 0 and 1 (both excluded)
    """

    @checks.suggesting
    def __init__(
        self,
        *,
        monitor: str = "val_loss",
        mode: Literal["auto", "min", "max"] = "auto",
        epochs: Union[int, list[int]] = 1,  # noqa: UP007 - the command line parser reads these annotations
        target_sparsity: Union[float, list[float], None] = 0.5,  # noqa: UP007
        tolerance: float = 0.02,
        cost: Literal["params", "macs"] = "params",
        limits: dict[str, float] | None = None,
        constraints: list[str] | None = None,
        on_violation: Literal["skip", "prune", "error"] = "skip",
        search: Union[  # noqa: UP007
            SearchStrategy, Literal["gradient", "sensitivity", "grid", "random", "uniform", "norm", "optuna"]
        ] = GradientSearch(),  # noqa: B008 - never changed, see `self.search`
        granularity: Literal["group", "component"] = "group",
        components: dict[str, list[str]] | None = None,
        ignore: list[str] | None = None,
        layers: list[LayerSpec] | None = None,
        twins: dict[str, str] | None = None,
        bounds: dict[str, list[float]] | None = None,
        importance: Union[  # noqa: UP007
            Literal["magnitude", "activation", "taylor", "reconstruction", "random"], Importance, None
        ] = None,
        compensation: Literal["none", "bias", "least_squares"] = "least_squares",
        healing: int = 0,
        teacher: float = 0.0,
        round_to: int = 1,
        search_batches: int | None = None,
        memory_limit: float | None = None,
        latency_batch: int | None = None,
        calibration_batches: int | None = None,
        finetune_epochs: int | None = None,
        reset_monitors: bool = True,
        seed: int = 0,
        report: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__({name: _in_words(value) for name, value in locals().items() if name not in _NO_ARGUMENTS})
        self.monitor = checks.instance_of("monitor", monitor, str)
        if not monitor:
            raise ValueError("monitor: '' is not the name of a metric that the module logs while validating")
        self.mode = checks.one_of("mode", mode, (AUTO, "min", "max"))
        self.epochs = checked_epochs(epochs)
        self.targets = checked_targets(target_sparsity, len(self.epochs))
        self._has_schedule = checks.is_number(target_sparsity)
        self.tolerance = checks.number_between("tolerance", tolerance, 0.0, 1.0, low_included=True)
        self.cost = checks.one_of("cost", cost, COSTS)
        self.limits = checked_limits(limits)
        self.constraints = tuple(
            parse_constraint(text, f"constraints[{number}]")
            for number, text in enumerate(checks.strings("constraints", constraints))
        )
        self.on_violation = checks.one_of("on_violation", on_violation, ("skip", "prune", "error"))
        if target_sparsity is None and not self.constraints:
            raise ValueError(
                "target_sparsity: None asks for the highest sparsity that meets every metric constraint, and there are "
                'no constraints; give some, as in constraints=["val_psnr >= 19.5"], or a number'
            )
        self.search = strategy_of(search)
        self.granularity = checks.one_of("granularity", granularity, ("group", "component"))
        self.components = checked_patterns("components", components)
        self.ignore = tuple(checks.strings("ignore", ignore))
        self.layers = checked_layers("layers", layers)
        register_layers(self.layers)
        self.twins: dict[str, str] | None = checks.mapping("twins", twins, partial(checks.instance_of, kind=str))
        self.bounds = checked_bounds(bounds)
        self.importance = checked_importance(importance)
        self.compensation = checks.one_of("compensation", compensation, COMPENSATIONS)
        self.healing = checks.whole_number("healing", healing, 0)
        self.teacher = checks.number_between("teacher", teacher, 0.0, math.inf, low_included=True)
        self.round_to = checks.whole_number("round_to", round_to, 1)
        self.search_batches = checks.optional_whole_number("search_batches", search_batches)
        self.memory_limit = checks.optional_positive("memory_limit", memory_limit)
        self.latency_batch = checks.optional_whole_number("latency_batch", latency_batch)
        self.calibration_batches = checks.optional_whole_number("calibration_batches", calibration_batches)
        self.finetune_epochs = checks.optional_whole_number("finetune_epochs", finetune_epochs, 0)
        if self.teacher > 0.0 and self.finetune_epochs == 0:
            raise ValueError(f"teacher: {teacher} with finetune_epochs=0, where nothing is trained after the round")
        self.reset_monitors = checks.instance_of("reset_monitors", reset_monitors, bool)
        self.seed = checks.whole_number("seed", seed, 0)
        self.report = checks.instance_of("report", report, bool)
        self.verbose = checks.instance_of("verbose", verbose, bool)


def _in_words(value: object) -> str:
    """An argument as results keep it: functions by their name, which is the same in every process."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, FunctionType) else repr(value)
