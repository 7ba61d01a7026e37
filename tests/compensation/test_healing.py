"""Healing: what is compared, who teaches, who learns, and what a round keeps of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_softprune.round.rehearsal as rehearsal
from lightning_softprune import prune
from lightning_softprune.compensation.healing import DenseNetwork
from lightning_softprune.compensation.healing.points import mismatch, watch_outputs
from lightning_softprune.compensation.healing.pupil import RATE, SMALLEST, Lesson, Pupil
from lightning_softprune.surgery import apply_plan
from support.modules import (
    FEATURES,
    AtEpochStart,
    AutoEncoder,
    Batches,
    ConvClassifier,
    Manual,
    assert_same,
    fit,
    loaders,
    made,
    plain_validate,
    run_state,
    softpruning,
)
from support.plans import assert_same as assert_same_model
from support.plans import outputs, random_plan, snapshot
from support.zoo import PRUNABLE, prunable

pytestmark = pytest.mark.usefixtures("one_thread")


class Parts(nn.Module):
    """Two parts with code between them, and a loss module."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.decoder = nn.Linear(3, 4)
        self.loss = nn.MSELoss()

    def step(self, x):
        return self.loss(self.decoder(self.encoder(x) + 1.0), x)


def test_outputs_are_what_the_code_of_a_step_gets_from_modules():
    model, x = Parts(), torch.randn(5, 4)
    names = {name for name, _ in model.named_parameters()}
    with watch_outputs(model, names) as outputs:
        model.step(x)
    assert list(outputs) == [("encoder", 1, 0), ("decoder", 1, 0)]
    assert torch.equal(outputs["encoder", 1, 0], model.encoder(x))
    with watch_outputs(model, names - {"decoder.weight", "decoder.bias"}) as outputs:
        model.step(x)
    assert list(outputs) == [("encoder", 1, 0)]


def test_blocks_of_a_list_are_outputs_too_the_innermost_ones():
    def block():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    model, x = nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 2)), torch.randn(5, 4)
    with watch_outputs(model, {name for name, _ in model.named_parameters()}) as outputs:
        model(x)
    assert list(outputs) == [("0.0", 1, 0), ("0.1", 1, 0), ("", 1, 0)]
    assert torch.equal(outputs["0.1", 1, 0], model[0](x))


def test_the_mismatch_is_the_missed_fraction_of_the_variance_of_what_both_have():
    wanted, found = torch.randn(6, 3), torch.randn(6, 3, requires_grad=True)
    masked = torch.cat([wanted, torch.full((6, 1), -torch.inf)], 1)
    expected = (found - wanted).square().mean() / wanted.var(0, correction=0).mean()
    dense = {("a", 1, 0): wanted, ("b", 1, 0): torch.randn(6, 8), ("c", 1, 0): torch.ones(6, 2), ("d", 1, 0): masked}
    pruned = {("a", 1, 0): found, ("b", 1, 0): torch.randn(6, 4, requires_grad=True)}
    assert mismatch(dense, pruned).item() == pytest.approx(expected.item())
    constant = {("c", 1, 0): torch.zeros(6, 2, requires_grad=True)}
    assert mismatch(dense, constant) is None
    beside = {("d", 1, 0): torch.cat([found, torch.zeros(6, 1)], 1)}
    assert 0 < mismatch(dense, beside).item() < 10


@pytest.mark.parametrize("case", PRUNABLE[::7], ids=lambda case: case.name)
def test_the_dense_network_is_there_again_whatever_was_learned_and_the_pruned_one_after_it(case):
    model, x = case.make()
    groups = prunable(model, x)
    with torch.no_grad():
        expected = outputs(model(x))
        dense = DenseNetwork(model, apply_plan(model, groups, random_plan(groups, 0)))
        for parameter in model.parameters():
            parameter.add_(0.1)
        learned = snapshot(model), outputs(model(x))
        with dense.in_place():
            assert torch.equal(outputs(model(x)), expected)
    assert_same_model(model, learned[0])
    assert torch.equal(outputs(model(x)), learned[1])


def test_what_the_dense_networks_steps_do_to_its_buffers_does_not_last():
    """A buffer that the plan has sliced is another tensor in the dense network: nobody else could put it back."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(5, 4)
    groups = prunable(model, x)
    expected = outputs(model(x)).clone()
    dense = DenseNetwork(model, apply_plan(model, groups, random_plan(groups, 0)))
    assert len(model[1].running_mean) < 6
    for _ in range(2):
        with dense.in_place():
            assert torch.equal(outputs(model(x)), expected)
            model[1].running_mean.add_(1.0)


def test_both_networks_steps_begin_with_the_same(tmp_path, monkeypatch):
    """What a step of the one has changed around the parameters, the step of the other does not find."""
    seen, healing, original = [], [], rehearsal.teach

    class Counting(AutoEncoder):
        counter = 0

        def training_step(self, batch, batch_idx):
            if healing:
                seen.append((sum(p.numel() for p in self.parameters()), self.counter))
            self.counter += 1
            return super().training_step(batch, batch_idx)

    def teach(*arguments):
        healing.append(True)
        errors = original(*arguments)
        healing.clear()
        return errors

    monkeypatch.setattr(rehearsal, "teach", teach)
    rounds(tmp_path, Counting, 3)
    assert len(seen) == 6
    assert len({size for size, _ in seen}) == 2
    assert len({counter for _, counter in seen}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [2.0, 0.0])
def test_a_pupil_takes_adams_steps_at_a_rate_of_the_size_of_its_elements_whatever_the_error(dtype, size):
    parameter = nn.Parameter(torch.tensor([size, -size], dtype=dtype))
    pupil = Pupil([parameter], 20)
    wanted = parameter.detach().clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    optimizer = torch.optim.Adam([wanted])
    for number, share in enumerate([0.5, 0.95, 0.9, 0.85]):
        optimizer.param_groups[0]["lr"] = RATE * share * max(size, SMALLEST)
        wanted.grad = torch.full_like(wanted, 1.0 + number)
        optimizer.step()
        gradients = pupil.gradients((parameter * (1.0 + number)).sum())
        assert pupil.learn(Lesson(0.25 + number, gradients), number) == 0.25 + number
        assert torch.equal(parameter.detach(), wanted.detach().to(dtype))
    before = parameter.detach().clone()
    pupil.learn(Lesson(0.5, [torch.full_like(wanted, torch.nan)]), 0)
    assert torch.equal(parameter.detach(), before), "what is no number teaches nothing"
    assert parameter.grad is None


def test_a_pupil_learns_the_same_of_sparse_gradients():
    learned = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table, rows = nn.Embedding(5, 3, sparse=sparse), torch.tensor([1, 1, 4])
        pupil = Pupil([table.weight], 10, look_ups=[table.weight])
        for number in range(3):
            error = table(rows).square().sum()
            pupil.learn(Lesson(error.item(), pupil.gradients(error)), number)
        learned.append(table.weight.detach())
    assert torch.equal(*learned)


# ------------------------------------------------------------------------------------------------------------ rounds


def dense_psnr(tmp_path):
    oracle = AtEpochStart(lambda _, module: plain_validate(tmp_path, module, loaders(module)), 10)
    fit(tmp_path, made(), oracle, max_epochs=11)
    return oracle.found["val_psnr"]


class Frozen(ConvClassifier):
    """A frozen convolution behind a BatchNorm that is in eval mode, and two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.features[3].requires_grad_(False)
        self.again = nn.Linear(3, 10, bias=False)
        self.back = nn.Linear(3, 10, bias=False)
        self.back.weight = self.again.weight

    def on_train_epoch_start(self):
        self.features[4].eval()

    def forward(self, x):
        out = super().forward(x)
        return out + F.linear(self.again(out) + self.back(out), self.again.weight.t())


def rounds(tmp_path, kind, healing, **arguments):
    """What is there when a round has ended: the result, and the state around it."""

    def look(trainer, module):
        return {
            "weights": copy.deepcopy(module.state_dict()),
            "around": run_state(trainer),
            "modes": {name: part.training for name, part in module.named_modules()},
            "optimizers": [
                [{key: value.clone() for key, value in optimizer.state[p].items()} for p in group["params"]]
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
            ],
            "tied": getattr(module, "again", None) is None or module.again.weight is module.back.weight,
        }

    arguments = {"healing": healing, "importance": "activation"} | arguments  # by which something is lost
    pruning, probe, batches = softpruning(**arguments), AtEpochStart(look), Batches()
    fit(tmp_path, made(kind), pruning, probe, batches, max_epochs=2)
    return pruning.results[0], probe.found, batches.batches


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoEncoder, Frozen, Manual])
def test_a_healed_round_scores_better_and_leaves_the_run_around_it_alone(tmp_path, kind):
    plain, before, order = rounds(tmp_path, kind, 0)
    healed, after, order_after = rounds(tmp_path, kind, 40)
    assert plain.healing is None
    assert plain.score_compensated == plain.score_after == healed.score_compensated
    assert healed.healing.kept
    assert healed.healing.score == healed.score_after == healed.trials[healed.chosen].score < plain.score_after
    assert len(healed.healing.errors) == 40
    assert sum(healed.healing.errors[-4:]) < sum(healed.healing.errors[:4])
    assert healed.phases["healing"] > 0
    for name in ("around", "modes", "optimizers"):
        assert_same(after[name], before[name], name)
    assert_same(order_after, order, "order of training batches")
    assert after["tied"]
    changed = {name for name, value in after["weights"].items() if not torch.equal(value, before["weights"][name])}
    frozen = {"features.3.weight", "features.3.bias", "features.4.running_mean", "features.4.num_batches_tracked"}
    assert not changed & frozen
    if kind is Frozen:
        assert {"features.0.weight", "features.1.running_mean", "features.4.weight", "again.weight"} <= changed
        tracked = [state["weights"]["features.1.num_batches_tracked"] for state in (before, after)]
        assert tracked[1] - tracked[0] == 40


@pytest.mark.slow
def test_what_does_not_score_better_is_taken_back(tmp_path):
    class Contrary(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            is_dense = self.encoder[0].out_features == 16
            self.log("val_worse", F.mse_loss(self(batch[0]), batch[0]) + 1e3 * is_dense)

    plain, before, _ = rounds(tmp_path, Contrary, 0, monitor="val_worse", mode="max")
    healed, after, _ = rounds(tmp_path, Contrary, 40, monitor="val_worse", mode="max")
    assert not healed.healing.kept
    assert healed.healing.score < healed.score_compensated == healed.score_after == plain.score_after
    assert_same(after, before)


def test_what_has_lost_nothing_is_not_healed(tmp_path):
    """Where the pruned network scores no worse than the dense one, nothing shows what there would be to heal."""

    class Contrary(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val_worse", F.mse_loss(self(batch[0]), batch[0]))

    plain, before, _ = rounds(tmp_path, Contrary, 0, monitor="val_worse", mode="max")
    assert plain.score_after > plain.score_before
    spared, after, _ = rounds(tmp_path, Contrary, 40, monitor="val_worse", mode="max")
    assert spared.healing is None
    assert_same(after, before)
    one, _, _ = rounds(tmp_path, Contrary, 1, monitor="val_worse", mode="max")
    assert one.healing is not None  # all that a dry run heals on, to show what could fail
    bound = plain.score_after + 1e3  # which nothing meets: it is tried, all the same
    asked = {"constraints": [f"val_worse >= {bound}"], "on_violation": "prune"}
    with pytest.warns(UserWarning, match="pruned all the same"):
        tried, _, _ = rounds(tmp_path, Contrary, 4, monitor="val_worse", mode="max", **asked)
    assert tried.healing is not None


@pytest.mark.slow
def test_what_is_taken_back_names_layers_that_gather_no_statistics(tmp_path):
    class Contrary(Frozen):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            is_dense = sum(p.numel() for p in self.parameters()) == self.dense
            self.log("val_worse", F.cross_entropy(self(batch[0]), batch[1]) + 1e3 * is_dense)

        def on_fit_start(self):
            self.dense = sum(p.numel() for p in self.parameters())

        def on_train_epoch_start(self):
            self.features[1].eval()
            self.features[4].eval()

    with pytest.warns(UserWarning, match="healing was taken back.* 2 layers that keep statistics"):
        result, _, _ = rounds(tmp_path, Contrary, 40, monitor="val_worse", mode="max")
    assert not result.healing.kept


@pytest.mark.slow
def test_a_constraint_counts_on_healing_so_that_the_smallest_model_that_meets_it_is_smaller(tmp_path):
    def look(trainer, module):
        scores = plain_validate(tmp_path, module, loaders(module))
        return scores["val_psnr"], sum(parameter.numel() for parameter in module.parameters())

    bound, found = dense_psnr(tmp_path) - 0.5, []
    for healing in (0, 40):
        arguments = {"monitor": "val_psnr", "mode": "max", "epochs": 10, "target_sparsity": None, "healing": healing}
        arguments |= {"importance": "activation", "constraints": [f"val_psnr >= {bound}"]}
        pruning, oracle = softpruning(**arguments), AtEpochStart(look, 10)
        fit(tmp_path, made(), pruning, oracle, max_epochs=11)
        score, parameters = oracle.found
        assert pruning.results[0].applied
        assert pruning.results[0].score_after == pytest.approx(score, abs=1e-5)
        assert score >= bound - 1e-5
        assert pruning.results[0].costs_after.params == parameters
        found.append(parameters)
    assert found[1] < found[0]


@pytest.mark.slow
def test_where_there_is_nothing_to_learn_from_a_warning_says_so(tmp_path):
    class Ungraded(Manual):
        @torch.no_grad()
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="healing has nothing to learn from"):
        result, _, _ = rounds(tmp_path, Ungraded, 3)
    assert result.applied
    assert result.healing is None


@pytest.mark.slow
@pytest.mark.parametrize("in_front", [False, True])
def test_where_nothing_may_be_trained_a_warning_says_so(in_front):
    class Augmented(AutoEncoder):
        """Training alone runs a layer in front of those that validation runs."""

        def training_step(self, batch, batch_idx):
            return super().training_step([self.augment(batch[0])], batch_idx)

    module = made(Augmented).requires_grad_(False)
    module.augment = nn.Linear(FEATURES, FEATURES).requires_grad_(in_front)
    with pytest.warns(UserWarning, match="healing has nothing to train: no parameter that validation runs requires"):
        result = prune(module, **loaders(module), healing=1, search="uniform", verbose=False, report=False)
    assert result.applied
    assert result.healing is None


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"healing": 3}, {"healing": 0, "teacher": 0.5}])
def test_what_the_dense_network_takes_counts_in_the_memory_limit(tmp_path, arguments):
    name = "healing" if arguments["healing"] else "teacher"
    with pytest.warns(UserWarning, match=f"no {name}: it would hold"):
        result, _, _ = rounds(tmp_path, AutoEncoder, memory_limit=1e-6, **arguments)
    assert result.applied
    assert result.healing is None
