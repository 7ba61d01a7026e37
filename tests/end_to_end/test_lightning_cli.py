"""The callback from the command line: the files of examples/cli as they are, and what LightningCLI makes of options."""

import argparse
import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from lightning.pytorch.cli import LightningCLI

from lightning_softprune import GridSearch, LayerSpec, SensitivitySearch, SoftPruning, load_from_checkpoint
from lightning_softprune.graph import layout_of
from lightning_softprune.parser import SuggestingParser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "cli"
PAGE = (ROOT / "examples" / "guide" / "command_line.md").read_text(encoding="utf-8")
CALLBACK = "--trainer.callbacks"
ADD = f"{CALLBACK}+=lightning_softprune.SoftPruning"
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false")
DENSE = 103_248  # parameters of the example's autoencoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "command_line")]


@pytest.fixture
def command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])  # LightningCLI warns of options beside `args`: those of pytest
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls


@pytest.fixture(scope="module")
def example():
    """main.py and the module beside it, imported as they import each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("main")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("main", "digits"):
            sys.modules.pop(name, None)


@pytest.fixture
def run(example, tmp_path, monkeypatch):
    """Runs a command line in an empty folder; every run has a folder of its own for logs, in which paths end."""
    monkeypatch.chdir(tmp_path)
    runs = iter(range(100))

    def run(*args):
        return example.main([*args, *QUIET, f"--trainer.default_root_dir={tmp_path / f'run_{next(runs)}'}"])

    return run


def config(name):
    return ["--config", str(FOLDER / f"{name}.yaml")]


def only_callback(cli):
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, SoftPruning))
    return callback


def only_result(cli):
    (result,) = only_callback(cli).results
    return result


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def parsed(example, *args):
    """The callback that options make, without running anything."""
    digits = sys.modules["digits"]
    cli = LightningCLI(
        digits.DigitsAutoencoder, digits.DigitsData, args=[*args, *QUIET], seed_everything_default=0, run=False
    )
    return only_callback(cli)


def printed(call, *args):
    output = io.StringIO()
    with redirect_stdout(output), pytest.raises(SystemExit) as exited:
        call(*args)
    assert not exited.value.code
    return output.getvalue()


def printed_config(example, *args):
    return printed(example.main, [*args, "--print_config"])


def refused(capsys, call, *args):
    """What a user reads below the usage."""
    with pytest.raises(SystemExit) as exited:
        call(*args)
    assert exited.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


# -------------------------------------------------------------------------------------------------- the files, one each


def test_prune_yaml_removes_70_percent_fine_tunes_and_keeps_a_checkpoint_of_the_pruned_model(run, example):
    cli = run("fit", *config("prune"), f"{CALLBACK}.search.max_evaluations=30", f"{CALLBACK}.finetune_epochs=2")
    result = only_result(cli)
    assert result.applied
    assert result.epoch == 10
    assert cli.trainer.current_epoch == 12
    assert abs(result.sparsity - 0.7) <= 0.02 + 1e-9
    assert count(cli.model) == result.costs_after.params == round((1 - result.sparsity) * DENSE)
    assert result.score_after > 16
    assert cli.trainer.callback_metrics["val_psnr"] > result.score_after
    assert count(load_from_checkpoint(type(cli.model), "checkpoints/pruned.ckpt")) == count(cli.model)


def test_constraints_yaml_finds_a_small_model_that_meets_every_constraint(run):
    result = only_result(run("fit", *config("constraints"), "--trainer.max_epochs=9"))
    assert result.applied
    assert result.target_sparsity is None
    assert result.metrics_after["val_psnr"] >= 17
    assert result.metrics_after["val_loss"] <= 0.025
    assert result.sparsity > 0.8
    smaller = [trial for trial in result.trials if trial.sparsity > result.sparsity + 1e-9]
    assert smaller
    assert not any(trial.feasible for trial in smaller)


def test_budgets_yaml_keeps_to_its_limits(run):
    changes = [f"{CALLBACK}.epochs=2", "--trainer.max_epochs=3", f"{CALLBACK}.search.max_evaluations=30"]
    result = only_result(run("fit", *config("budgets"), *changes))
    assert result.applied
    assert abs(1 - result.costs_after.macs / result.costs_before.macs - 0.6) <= 0.05 + 1e-9
    assert result.costs_after.macs <= 0.4 * result.costs_before.macs
    assert result.costs_after.params <= 0.42 * result.costs_before.params


def test_components_yaml_touches_the_decoder_lightly(run):
    cli = run("fit", *config("components"), f"{CALLBACK}.epochs=2", "--trainer.max_epochs=3")
    result = only_result(cli)
    assert result.applied
    assert abs(result.sparsity - 0.4) <= 0.02 + 1e-9
    coefficients = {group.name: group.coefficient for group in result.groups}
    assert coefficients["encoder.0"] == coefficients["encoder.2"] > 0.2
    assert coefficients["decoder.0"] == coefficients["decoder.2"] <= 0.2
    assert cli.model.decoder[0].out_features >= 0.8 * 128
    assert cli.model.decoder[2].out_features >= 0.8 * 256


def test_oneshot_yaml_prunes_the_model_of_dense_yaml_without_a_step_of_training(run, example):
    dense = run("fit", *config("dense"), "--trainer.max_epochs=6").model
    assert count(dense) == DENSE
    cli = run("fit", *config("oneshot"))
    result = only_result(cli)
    assert result.applied
    assert abs(result.sparsity - 0.5) <= 0.02 + 1e-9
    assert result.score_after > result.score_before - 0.3
    assert cli.trainer.global_step == 6 * 41  # of the training before
    assert cli.trainer.callback_metrics["val_psnr"].item() == pytest.approx(result.score_after, abs=1e-4)
    assert count(load_from_checkpoint(type(cli.model), "checkpoints/oneshot.ckpt")) == result.costs_after.params
    assert count(load_from_checkpoint(type(cli.model), "checkpoints/dense.ckpt")) == DENSE


def test_rounds_yaml_removes_more_in_every_round_and_stops_after_its_fine_tuning(run):
    changes = [f"{CALLBACK}.epochs=[1, 2, 3]", f"{CALLBACK}.finetune_epochs=1"]
    cli = run("fit", *config("rounds"), *changes, f"{CALLBACK}.search.max_evaluations=12")
    results = only_callback(cli).results
    assert [result.epoch for result in results] == [1, 2, 3]
    assert [result.target_sparsity for result in results] == pytest.approx([0.563, 0.770, 0.8], abs=1e-3)
    assert all(abs(result.sparsity - result.target_sparsity) <= 0.02 + 1e-9 for result in results)
    assert cli.trainer.current_epoch == 4
    assert count(cli.model) == results[-1].costs_after.params


def test_optuna_yaml_searches_with_optuna(run):
    pytest.importorskip("optuna")
    changes = [f"{CALLBACK}.epochs=2", "--trainer.max_epochs=3", f"{CALLBACK}.search.num_trials=15"]
    result = only_result(run("fit", *config("optuna"), *changes))
    assert result.strategy == "OptunaSearch"
    assert result.applied
    assert abs(result.sparsity - 0.6) <= 0.02 + 1e-9
    assert 10 <= len(result.trials) <= 17


def test_every_file_of_the_example_is_tested_and_shows_its_own_command():
    source = Path(__file__).read_text(encoding="utf-8")
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert names
    for name in names:
        assert f'config("{name}")' in source
        assert f"main.py fit --config examples/cli/{name}.yaml\n" in (FOLDER / f"{name}.yaml").read_text(
            encoding="utf-8"
        )


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_printed_config_fed_back_prints_the_same(example, tmp_path, name):
    first = printed_config(example, "fit", *config(name))
    (tmp_path / "printed.yaml").write_text(first, encoding="utf-8")
    assert printed_config(example, "fit", "--config", str(tmp_path / "printed.yaml")) == first


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["target_sparsity=0.7"], {"targets": [0.7]}),
        (["epochs=[1, 2]", "target_sparsity=[0.3, 0.5]"], {"epochs": [1, 2], "targets": [0.3, 0.5]}),
        (["epochs+=1", "epochs+=2", "target_sparsity=0.5"], {"epochs": [1, 2], "targets": [0.4375, 0.5]}),
        (["target_sparsity=null", 'constraints=["val_psnr >= 5"]'], {"targets": [None]}),
        (['limits={"macs": 0.5, "params": 0.6}'], {"limits": {"macs": 0.5, "params": 0.6}}),
        (["limits.macs=0.5"], {"limits": {"macs": 0.5}}),
        (['bounds={"decoder": [0, 0.2]}'], {"bounds": {"decoder": [0.0, 0.2]}}),
        (['components={"a": ["encoder.*"]}'], {"components": {"a": ["encoder.*"]}}),
        (['twins={"decoder": "encoder"}'], {"twins": {"decoder": "encoder"}}),
        (["ignore+=encoder.0", "ignore+=decoder.*"], {"ignore": ("encoder.0", "decoder.*")}),
        (["memory_limit=0.5", "search_batches=4"], {"memory_limit": 0.5, "search_batches": 4}),
        (["search_batches=null", "finetune_epochs=0"], {"search_batches": None, "finetune_epochs": 0}),
    ],
)
def test_options_reach_the_callback_with_their_types(example, options, expected):
    callback = parsed(example, ADD, *(f"{CALLBACK}.{option}" for option in options))
    assert {name: getattr(callback, name) for name in expected} == expected


@pytest.mark.parametrize(
    "options",
    [
        [f"{CALLBACK}.search=SensitivitySearch", f"{CALLBACK}.search.levels=5"],
        [f"{CALLBACK}.search=lightning_softprune.SensitivitySearch", f"{CALLBACK}.search.init_args.levels=5"],
        [f'{CALLBACK}.search={{"class_path": "SensitivitySearch", "init_args": {{"levels": 5}}}}'],
    ],
)
def test_strategies_are_chosen_by_name_by_class_path_and_by_nesting(example, options):
    search = parsed(example, ADD, *options).search
    assert isinstance(search, SensitivitySearch)
    assert (search.levels, search.refine) == (5, 3)


# a module that a configuration names
OWN_LAYER = """
import torch
from torch import nn


class Swapped(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.width = width
        self.kernel, self.bias = nn.Parameter(torch.zeros(width, out)), nn.Parameter(torch.zeros(out))
"""
OWN_LAYERS = """
trainer:
  callbacks:
    - class_path: lightning_softprune.SoftPruning
      init_args:
        layers:
          - type: own_layers.Swapped
            inputs: {kernel: 0}
            outputs: {kernel: [1], bias: 0}
            sizes: {in: [width]}
            mixes: kernel
"""


@pytest.fixture
def own_layers(tmp_path, monkeypatch):
    (tmp_path / "own_layers.py").write_text(OWN_LAYER, encoding="utf-8")
    (tmp_path / "own.yaml").write_text(OWN_LAYERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_layers")
    sys.modules.pop("own_layers", None)


def test_layers_of_ones_own_are_given_in_yaml(example, own_layers, tmp_path):
    path = str(tmp_path / "own.yaml")
    (spec,) = parsed(example, "--config", path).layers
    expected = {"inputs": {"kernel": 0}, "outputs": {"kernel": [1], "bias": 0}, "sizes": {"in": ["width"]}}
    assert spec == LayerSpec(own_layers.Swapped, **expected, mixes="kernel")
    assert layout_of(own_layers.Swapped(4, 6)).slots == {"in": 4, "out": 6}
    first = printed_config(example, "fit", "--config", path)
    assert "type: own_layers.Swapped" in first
    (tmp_path / "printed.yaml").write_text(first, encoding="utf-8")
    assert printed_config(example, "fit", "--config", str(tmp_path / "printed.yaml")) == first


def test_layers_of_ones_own_are_given_by_options(example, own_layers):
    layers = '[{"type": "own_layers.Swapped", "channels": {"kernel": -1}, "macs": "outputs", "channel_dim": 1}]'
    (spec,) = parsed(example, ADD, f"{CALLBACK}.layers={layers}").layers
    assert spec == LayerSpec(own_layers.Swapped, channels={"kernel": -1}, macs="outputs", channel_dim=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("own_layers.Swapped", "own_layers.Swaped"), "type: 'own_layers.Swaped' is not the dotted path of a class"),
        (("sizes: {in:", "sizes: {input:"), "sizes: 'input' is not one of 'in', 'out', 'both'"),
        (("outputs: {kernel: [1]", "outputs: {kernel: [0]"), "outputs['kernel']: dimension 0 is given twice"),
    ],
)
def test_a_layer_that_is_described_wrongly_is_refused_before_training(example, own_layers, tmp_path, change, message):
    (tmp_path / "own.yaml").write_text(OWN_LAYERS.replace(*change), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(example, "--config", str(tmp_path / "own.yaml"))


def cli_with_shorter_options(*args):
    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(SoftPruning, "softprune")
            parser.set_defaults(
                {
                    "softprune.monitor": "val_psnr",
                    "softprune.mode": "max",
                    "softprune.search": {"class_path": "GridSearch", "init_args": {"levels": 4}},
                }
            )

    digits = sys.modules["digits"]
    cli = CLI(digits.DigitsAutoencoder, digits.DigitsData, args=[*args, *QUIET], seed_everything_default=0, run=False)
    return only_callback(cli)


def test_add_lightning_class_args_gives_shorter_options_and_defaults(example):
    callback = cli_with_shorter_options("--softprune.target_sparsity=[0.2, 0.3]", "--softprune.epochs=[1, 2]")
    assert (callback.monitor, callback.mode) == ("val_psnr", "max")
    assert callback.targets == [0.2, 0.3]
    assert isinstance(callback.search, GridSearch)
    assert callback.search.levels == 4
    callback = cli_with_shorter_options("--softprune.search=SensitivitySearch", "--softprune.search.levels=4")
    assert isinstance(callback.search, SensitivitySearch)


def test_help_explains_every_argument(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["fit", f"{CALLBACK}.help=lightning_softprune.SoftPruning"])
    text = " ".join(capsys.readouterr().out.split())
    described = SoftPruning.__doc__.partition("Args:")[2].partition("Raises:")[0]
    arguments = re.findall(r"^ {8}(\w+): (.*)$", described, flags=re.MULTILINE)
    assert [name for name, _ in arguments] == list(inspect.signature(SoftPruning).parameters)
    for name, first_line in arguments:
        assert f"{CALLBACK}.{name}" in text
        assert " ".join(first_line.split())[:40] in text
    assert "default: 0.5)" in text


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["target_sparisty=0.7"], ["'target_sparisty' is not"]),
        (["search=GradiantSearch"], ['key "search"', "GradiantSearch"]),
        (["search=lightning_softprune.GradiantSearch"], ['key "search"', "did you mean 'GradientSearch'?"]),
        (["search=SensitivitySearch", "search.level=5"], ['key "search"', "'level' is not"]),
        (["search=GradientSearch", "search.difference=centre"], ['key "difference"', "'central'"]),
        (["epochs=ten"], ['key "epochs"', "Expected a <class 'int'>", "ten"]),
        (["target_sparsity=much"], ['key "target_sparsity"', "Expected a <class 'float'>", "much"]),
        (["constraints=val_psnr >= 19"], ['key "constraints"', "Expected a <class 'list'>"]),
        (["importance=magnitud"], ['key "importance"', "'magnitude'", "magnitud"]),
    ],
)
def test_the_parser_names_the_key_that_is_wrong(example, capsys, options, told):
    error = refused(capsys, parsed, example, ADD, *(f"{CALLBACK}.{option}" for option in options))
    for text in told:
        assert text in error


def test_a_class_path_with_a_typo_is_answered_with_what_was_meant(example, capsys):
    error = refused(capsys, parsed, example, f"{CALLBACK}+=lightning_softprune.SoftPrunning")
    assert "has no attribute 'SoftPrunning'; did you mean 'SoftPruning'?" in error


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["target_sparsity=1.5"], "target_sparsity: 1.5 is not between 0 and 1"),
        (["target_sparsity=null"], "target_sparsity: None asks for the highest sparsity"),
        (['limits={"mac": 0.5}'], "limits: 'mac' is not one of 'params', 'macs', 'latency'"),
        (['constraints=["val_psnr => 19"]'], "expected one of <=, >=, <, >"),
        (["search=SensitivitySearch", "search.levels=0"], "levels: 0 is less than 1"),
    ],
)
def test_a_value_out_of_range_reaches_the_user_as_the_callback_says_it(example, options, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        parsed(example, ADD, *(f"{CALLBACK}.{option}" for option in options))


def test_mistakes_in_shorter_options_are_told_too(example, capsys):
    assert "--softprune.target_sparisty" in refused(capsys, cli_with_shorter_options, "--softprune.target_sparisty=0.7")
    with pytest.raises(ValueError, match=r"^target_sparsity: 1\.5 is not between"):
        cli_with_shorter_options("--softprune.target_sparsity=1.5")


# ------------------------------------------------------------------------------------------------------- what was meant


class ShorterOptions(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(SoftPruning, "softprune")


def with_either_parser(capsys, args, cli=ShorterOptions, run=True):
    """What a user reads from a plain LightningCLI, and with SuggestingParser."""
    digits = sys.modules["digits"]

    def call(**arguments):
        cli(digits.DigitsAutoencoder, digits.DigitsData, args=args, run=run, **arguments)

    return refused(capsys, call), refused(capsys, lambda: call(parser_class=SuggestingParser))


def assert_meant(before_and_after, wrong, meant):
    """The parser's own words, and behind them, once, what was meant."""
    plain, told = before_and_after
    hint = f"; did you mean {meant!r}?"
    assert f"{wrong}{hint}\n" in told
    assert told.count(wrong + hint) == told.count("did you mean") == 1
    assert told.replace(hint, "") == plain


@pytest.mark.parametrize(
    ("options", "wrong", "meant"),
    [
        (["target_sparisty=0.7"], "Option 'target_sparisty' is not accepted", "target_sparsity"),
        (["init_args.target_sparisty=0.7"], "Option 'target_sparisty' is not accepted", "target_sparsity"),
        (["search.stepz=3"], "Option 'stepz' is not accepted", "steps"),
        (["search=SensitivitySearch", "search.level=5"], "Option 'level' is not accepted", "levels"),
        (["search=GradiantSearch"], "Expected a dot import path string: GradiantSearch", "GradientSearch"),
        (["importance=activaton"], "Expected a dot import path string: activaton", "activation"),
        (["mode=mx"], "Got value: mx", "max"),
        (["search=GradientSearch", "search.difference=centre"], "Got value: centre", "central"),
    ],
)
def test_a_typo_in_an_argument_is_answered_with_what_was_meant(example, capsys, options, wrong, meant):
    args = ["fit", ADD, *(f"{CALLBACK}.{option}" for option in options)]
    assert_meant(with_either_parser(capsys, args), wrong, meant)


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("arguments", "wrong", "meant"),
    [
        ({"target_sparisty": 0.7}, "Option 'target_sparisty' is not accepted", "target_sparsity"),
        (
            {"search": {"class_path": "lightning_softprune.GradientSearch", "init_args": {"stepz": 3}}},
            "Option 'stepz' is not accepted",
            "steps",
        ),
        ({"search": "GradiantSearch"}, "Expected a dot import path string: GradiantSearch", "GradientSearch"),
        ({"importance": "activaton"}, "Expected a dot import path string: activaton", "activation"),
    ],
)
def test_a_typo_in_a_file_is_answered_with_what_was_meant(
    example, capsys, tmp_path, subcommand, arguments, wrong, meant
):
    callback = {"class_path": "lightning_softprune.SoftPruning", "init_args": arguments}
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}), encoding="utf-8")
    args = [subcommand, "--config", str(tmp_path / "config.yaml")]
    assert_meant(with_either_parser(capsys, args), wrong, meant)


def test_a_typo_in_a_dictionary_is_answered_with_what_was_meant(example, capsys):
    callback = {"class_path": "lightning_softprune.SoftPruning", "init_args": {"target_sparisty": 0.7}}
    told = with_either_parser(capsys, {"trainer": {"callbacks": [callback]}}, run=False)
    assert_meant(told, "Option 'target_sparisty' is not accepted", "target_sparsity")


@pytest.mark.parametrize(
    ("options", "wrong", "meant"),
    [
        (["--softprune.target_sparisty=0.7"], "--softprune.target_sparisty=0.7", "--softprune.target_sparsity"),
        (["--softprun.search.steps", "7"], "--softprun.search.steps 7", "--softprune.search.steps"),
        (["--softprune.search.stepz=3"], "Option 'stepz' is not accepted", "steps"),
        (["--softprune.search=GradiantSearch"], "Expected a dot import path string: GradiantSearch", "GradientSearch"),
        (["--softprune.importance=activaton"], "Expected a dot import path string: activaton", "activation"),
        (["--trainer.calbacks+=EarlyStopping"], "--trainer.calbacks+=EarlyStopping", "--trainer.callbacks"),
        ([f"{CALLBACK}+=EarlyStopping", f"{CALLBACK}.monitr=x"], "Option 'monitr' is not accepted", "monitor"),
    ],
)
def test_a_typo_in_an_option_is_answered_with_what_was_meant(example, capsys, options, wrong, meant):
    assert_meant(with_either_parser(capsys, ["fit", *options]), wrong, meant)


def test_two_typos_are_both_answered(example, capsys):
    _, told = with_either_parser(capsys, ["fit", "--softprune.epoks=1", "--softprune.target_sparisty=0.7"])
    assert told.endswith("; did you mean '--softprune.epochs', '--softprune.target_sparsity'?\n")


@pytest.mark.parametrize(
    ("run", "wrong", "meant"),
    [
        (True, "Subcommand 'fit' does not accept option 'softprune.target_sparisty'", "softprune.target_sparsity"),
        (False, "Group 'softprune' does not accept option 'target_sparisty'", "target_sparsity"),
    ],
)
def test_a_typo_below_a_shorter_key_of_a_file_is_answered(example, capsys, tmp_path, run, wrong, meant):
    (tmp_path / "config.yaml").write_text("softprune: {target_sparisty: 0.7}", encoding="utf-8")
    args = [*(["fit"] if run else []), "--config", str(tmp_path / "config.yaml")]
    assert_meant(with_either_parser(capsys, args, run=run), wrong, meant)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("SoftPrunning", "Expected a dot import path string: SoftPrunning; did you mean 'SoftPruning'?"),
        ("EarlyStoping", "Expected a dot import path string: EarlyStoping; did you mean 'EarlyStopping'?"),
        ("lightning_softprun.SoftPruning", "'lightning_softprun'; did you mean 'lightning_softprune'?"),
    ],
)
def test_a_typo_in_the_name_of_a_callback_is_answered(example, capsys, value, told):
    assert told in with_either_parser(capsys, ["fit", f"{CALLBACK}+={value}"])[1]


@pytest.mark.parametrize(
    "options",
    [
        [ADD, f"{CALLBACK}.zzz=1"],
        [ADD, f"{CALLBACK}.search=Zzz"],
        [ADD, f"{CALLBACK}.importance=zzz"],
        [ADD, f"{CALLBACK}.target_sparsity=much"],
        [f"{CALLBACK}+=lightning_sparse.Callback"],
        ["--trainer.zzz=1"],
        ["--logger=CSVLoger"],
    ],
)
def test_where_nothing_is_near_the_parser_says_what_it_always_says(example, capsys, options):
    plain, told = with_either_parser(capsys, ["fit", *options])
    assert told == plain
    assert "did you mean" not in told


@pytest.mark.parametrize("option", ["--softprune.target_sparisty=0.7", "--softprune.mode=mx"])
def test_a_parser_that_does_not_exit_raises_what_was_meant(example, option):
    digits = sys.modules["digits"]
    with pytest.raises(argparse.ArgumentError) as raised:
        ShorterOptions(
            digits.DigitsAutoencoder,
            digits.DigitsData,
            args=[option],
            run=False,
            parser_class=SuggestingParser,
            parser_kwargs={"exit_on_error": False},
        )
    assert str(raised.value).count("did you mean") == 1


@pytest.mark.parametrize("args", [["fit", ADD, "--print_config"], ["fit", "--help"], ["--help"]])
def test_what_is_printed_does_not_depend_on_the_parser(example, args):
    digits = sys.modules["digits"]

    def plain(args):
        LightningCLI(digits.DigitsAutoencoder, digits.DigitsData, seed_everything_default=0, args=args)

    assert printed(example.main, args) == printed(plain, args)


# ---------------------------------------------------------------------------------------------------------- subcommands


def commands_of_the_page():
    """The guide's commands for the example, as argument lists."""
    lines = re.findall(r"^python examples/cli/main\.py (.*)$", PAGE, flags=re.MULTILINE)
    return [[word.replace("examples/cli/", f"{FOLDER}/") for word in shlex.split(line)] for line in lines]


def test_the_commands_of_the_guide_do_what_it_says(run, example, capsys):
    commands = commands_of_the_page()
    assert [words[0] for words in commands] == ["fit", "fit", "validate", "test", "fit", "fit"]
    dense, prune, validate, test, flags, help_ = commands

    trained = run(*dense, "--trainer.max_epochs=2").model
    assert count(trained) == DENSE

    cli = run(*validate, f"{CALLBACK}.search.max_evaluations=10")
    result = only_result(cli)
    assert not result.applied
    assert abs(result.sparsity - 0.7) <= 0.02 + 1e-9
    for name, value in trained.state_dict().items():
        assert torch.equal(cli.model.state_dict()[name], value)
    files = Path(cli.trainer.default_root_dir) / "softprune" / "epoch=10"
    assert json.loads((files / "result.json").read_text(encoding="utf-8"))["applied"] is False
    assert "this was a dry run" in capsys.readouterr().out

    fast = ["--trainer.max_epochs=3", f"{CALLBACK}.epochs=1", f"{CALLBACK}.finetune_epochs=2"]
    cli = run(*prune, *fast, f"{CALLBACK}.search=UniformBaseline")
    assert abs(only_result(cli).sparsity - 0.7) <= 0.02 + 1e-9
    pruned = count(cli.model)
    saved = Path(cli.trainer.default_root_dir) / "config.yaml"  # what LightningCLI keeps of every fit
    assert "class_path: lightning_softprune.UniformBaseline" in saved.read_text(encoding="utf-8")

    cli = run(*test)
    assert count(cli.model) == pruned
    assert cli.trainer.callback_metrics["test_psnr"] > 5
    cli = run("predict", *test[1:])
    assert count(cli.model) == pruned
    cli = run("fit", "--config", str(saved))  # the same again
    assert count(cli.model) == pruned

    cli = run(*flags, "--trainer.max_epochs=2", f"{CALLBACK}.epochs=1", f"{CALLBACK}.search.levels=3")
    result = only_result(cli)
    assert result.strategy == "SensitivitySearch"
    assert count(cli.model) == result.costs_after.params

    with pytest.raises(SystemExit):
        example.main(help_)
    assert "--trainer.callbacks.target_sparsity TARGET_SPARSITY" in capsys.readouterr().out


def test_the_yaml_of_the_guide_is_a_config(example, tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "SensitivitySearch" in block)
    (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
    callback = parsed(example, "--config", str(tmp_path / "config.yaml"))
    assert callback.targets == [0.7]
    assert isinstance(callback.search, SensitivitySearch)
    assert callback.search.levels == 5


# ---------------------------------------------------------------------------------------------- in a process of its own


def command(*args, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(FOLDER / "main.py"), *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_pruned_model_is_tested_in_another_process(tmp_path):
    options = ["epochs=1", "target_sparsity=0.7", "search=SensitivitySearch", "search.levels=3"]
    shorthand = [ADD, *(f"{CALLBACK}.{option}" for option in options)]
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."]  # TensorBoard takes seconds to import
    done = command(
        "fit", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", *logger, *shorthand, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "SoftPruning, epoch 1" in done.stdout
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    result = json.loads((folder / "softprune" / "epoch=1" / "result.json").read_text(encoding="utf-8"))
    assert result["applied"]
    assert "lightning_softprune.SensitivitySearch" in (folder / "config.yaml").read_text(encoding="utf-8")

    (checkpoint,) = (folder / "checkpoints").glob("epoch=1-*.ckpt")
    done = command("test", ADD, f"--ckpt_path={checkpoint}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test_psnr" in done.stdout


def test_a_typo_ends_with_the_key_and_the_near_miss_on_standard_error_and_no_traceback(tmp_path):
    done = command("fit", ADD, f"{CALLBACK}.target_sparisty=0.7", cwd=tmp_path)
    assert done.returncode == 2
    assert f'"{CALLBACK[2:]}"' in done.stderr
    assert "Option 'target_sparisty' is not accepted; did you mean 'target_sparsity'?\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
