"""What surrounds a model follows its parameters: hooks, lists, averages, wrapped optimizers; teachers are declared."""

import copy
import functools
import weakref
from collections import OrderedDict

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_softprune import PruningResult, load_from_checkpoint, prune
from support.modules import FEATURES, AutoEncoder, count, fit, loaders, made, softpruning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def named(module):
    return dict(module.named_parameters())


# ---------------------------------------------------------------------------------------------------------------- hooks


class Hooked(AutoEncoder):
    """Hooks on parameters: values are clipped, a mask is applied, accumulated gradients are counted."""

    def __init__(self, how="closure"):
        super().__init__()
        self.largest, self.accumulated, self.handles = [], 0, []
        for parameter in self.parameters():
            self.handles.append(parameter.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4)))
            parameter.register_post_accumulate_grad_hook(self.count)
        weight = self.encoder[0].weight
        self.mask = mask = (torch.arange(weight.numel()).reshape(weight.shape) % 3 > 0).float()
        if how == "closure":
            weight.register_hook(lambda gradient: gradient * mask)
        else:
            weight.register_hook(functools.partial(lambda gradient, mask: gradient * mask, mask=mask))

    def count(self, _):
        self.accumulated += 1

    def on_after_backward(self):
        self.largest.append(max(float(parameter.grad.abs().max()) for parameter in self.parameters()))
        self.blocked = self.encoder[0].weight.grad == 0


@pytest.mark.filterwarnings("ignore:SoftPruning.*self.mask.*on_softprune")
@pytest.mark.parametrize("how", ["closure", "partial"])
def test_hooks_on_parameters_go_on(tmp_path, how):
    module, callback = made(Hooked, how=how), softpruning(compensation="none")
    fit(tmp_path, module, callback, max_epochs=3)
    assert callback.results[0].applied
    assert max(module.largest) <= 1e-4 + 1e-9
    assert module.accumulated == 3 * 4 * len(named(module))
    rows = callback.results[0].groups[0].channels_after
    assert module.blocked.shape == (rows, FEATURES)
    columns = torch.arange(FEATURES) % 3  # FEATURES is a multiple of 3, so that every row has the same mask
    assert module.blocked[:, columns == 0].all()
    for handle in module.handles:
        handle.remove()
    assert all(len(parameter._backward_hooks or ()) <= 1 for parameter in module.parameters())


@pytest.mark.parametrize("mode", ["all", "any"])
def test_a_hook_that_waits_for_several_gradients_goes_on(tmp_path, mode):
    module, seen = made(), []
    weights = [module.encoder[0].weight, module.decoder[-1].weight]
    handle = torch.autograd.graph.register_multi_grad_hook(weights, seen.append, mode=mode)
    fit(tmp_path, module, softpruning(), max_epochs=3)
    assert len(seen) == 3 * 4
    live = [module.encoder[0].weight, module.decoder[-1].weight]
    last = [gradient.shape for gradient in seen[-1]] if mode == "all" else seen[-1].shape
    assert last == [weight.shape for weight in live] if mode == "all" else last in [weight.shape for weight in live]
    handle.remove()
    assert not any(weight._backward_hooks for weight in live)


class Square(AutoEncoder):
    """Weights of one shape."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))

    def forward(self, x):
        return self.decoder(self.body(self.encoder(x)))


class Masks(Callback):
    """Keeps a mask for each of some weights, and methods of it are their hooks; it watches one of the weights."""

    def __init__(self, names):
        self.names = names

    def on_fit_start(self, trainer, pl_module):
        for number, name in enumerate(self.names):
            weight = pl_module.get_parameter(name)
            setattr(self, f"mask{number}", torch.arange(weight.numel()).reshape(weight.shape))
            weight.register_hook(getattr(self, f"hook{number}"))
        self.watched = pl_module.get_parameter(self.names[0])

    def hook0(self, gradient):
        return gradient

    def hook1(self, gradient):
        return gradient


class Keeps(Callback):
    """Remembers the surgery."""

    def on_softprune(self, surgery):
        self.surgery = surgery


def positions(weight):
    return torch.arange(weight.numel()).reshape(weight.shape)


def test_the_owner_of_hooks_keeps_the_live_parameter_and_slices_of_its_own_masks(tmp_path):
    names = ["encoder.0.weight", "decoder.0.weight"]
    module, masks, keeps = made(), Masks(names), Keeps()
    fit(tmp_path, module, softpruning(), masks, keeps, max_epochs=2)
    assert masks.watched is module.encoder[0].weight
    for name, mask in zip(names, (masks.mask0, masks.mask1), strict=True):
        assert torch.equal(mask, keeps.surgery.slice(name, positions(made().get_parameter(name))))


class ToldMasks(Masks):
    """Sees to its masks by itself, or forgets one of them."""

    forgets = False

    def on_softprune(self, surgery):
        self.mask0 = surgery.slice(self.names[0], self.mask0)
        if not self.forgets:
            self.mask1 = surgery.slice(self.names[1], self.mask1)


TWO_OF_ONE_SHAPE = ["body.1.0.weight", "body.2.0.weight"]


@pytest.mark.parametrize("names", [TWO_OF_ONE_SHAPE, TWO_OF_ONE_SHAPE[:1]], ids=["hooks of both", "hooks of one"])
def test_a_mask_that_may_belong_to_several_weights_is_left_and_named(tmp_path, names):
    module, masks = made(Square), Masks(names)
    dense = positions(module.body[1][0].weight)
    with pytest.warns(UserWarning, match=r"Masks\.mask0.*on_softprune"):
        fit(tmp_path, module, softpruning(), masks, max_epochs=2)
    assert torch.equal(masks.mask0, dense)
    assert masks.watched is module.body[1][0].weight


def test_a_callback_that_sees_to_its_masks_is_not_warned_of(tmp_path):
    module, masks, keeps = made(Square), ToldMasks(TWO_OF_ONE_SHAPE), Keeps()
    dense = positions(module.body[1][0].weight)
    fit(tmp_path, module, softpruning(), masks, keeps, max_epochs=2)
    for name, mask in zip(TWO_OF_ONE_SHAPE, (masks.mask0, masks.mask1), strict=True):
        assert torch.equal(mask, keeps.surgery.slice(name, dense))


def test_a_callback_that_forgets_one_of_its_masks_is_warned_of_it(tmp_path):
    masks = ToldMasks(TWO_OF_ONE_SHAPE)
    masks.forgets = True
    with pytest.warns(UserWarning, match=r"SoftPruning: ToldMasks\.mask1: of the shape"):
        fit(tmp_path, made(Square), softpruning(), masks, max_epochs=2)


def test_a_mask_in_the_closures_of_two_hooks_is_left_and_named(tmp_path):
    module = made(Square)
    mask = positions(module.body[1][0].weight)

    def hook(gradient):
        return gradient if gradient.shape != mask.shape else gradient * (mask >= 0)

    for name in TWO_OF_ONE_SHAPE:
        module.get_parameter(name).register_hook(hook)
    with pytest.warns(UserWarning, match=r"a variable of .*hook.*on_softprune"):
        fit(tmp_path, module, softpruning(), max_epochs=2)
    assert mask.shape == (8, 8)


class Masking:
    """A hook that is an object."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, gradient):
        return gradient * (self.mask >= 0)


def test_objects_that_are_hooks_keep_the_slice_for_their_own_weight(tmp_path):
    module, keeps = made(Square), Keeps()
    dense = positions(module.body[1][0].weight)
    hooks = {name: Masking(dense) for name in TWO_OF_ONE_SHAPE}
    for name, hook in hooks.items():
        module.get_parameter(name).register_hook(hook)
    fit(tmp_path, module, softpruning(), keeps, max_epochs=2)
    for name, hook in hooks.items():
        assert torch.equal(hook.mask, keeps.surgery.slice(name, dense))


# ---------------------------------------------------------------------------------------- containers of the user's own


class Containers(AutoEncoder):
    """Keeps its parameters in a list, a tuple, a dictionary, a set, an object, and a child's list."""

    def __init__(self):
        super().__init__()
        weights = [p for n, p in self.named_parameters() if n.endswith("weight")]
        self.listed, self.pair, self.table = list(weights), (weights[0], weights[-1]), {"first": weights[0]}
        self.nested = {"groups": [{"params": list(weights)}]}
        self.unique = set(weights)
        self.helper = Helper(weights)
        self.decoder.kept = list(self.decoder.parameters())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-3 * sum(p.square().sum() for p in self.listed)


class Helper:
    def __init__(self, weights):
        self.weights, self.notes = weights, ["nothing of ours"]


def test_parameters_in_the_users_containers_are_the_live_ones(tmp_path):
    module, callback = made(Containers), softpruning()
    listed, nested = module.listed, module.nested
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    live = {id(parameter) for parameter in module.parameters()}
    held = [*module.listed, *module.pair, *module.table.values(), *module.nested["groups"][0]["params"]]
    held += [*module.unique, *module.helper.weights, *module.decoder.kept]
    assert {id(parameter) for parameter in held} <= live
    assert module.listed is listed
    assert module.nested is nested
    assert module.pair[0] is module.encoder[0].weight


class Slotted:
    __slots__ = ("empty", "weights")

    def __init__(self, weights):
        self.weights = weights

    def get(self):
        return self.weights


def by_closure(weights):
    return lambda: weights


def by_default(weights):
    return lambda weights=weights: weights


def by_keyword(weights):
    return lambda *, weights=weights: weights


def by_partial(weights):
    return functools.partial(list, weights)


def by_function_of_partial(weights):
    return functools.partial(lambda: weights)


def by_slots(weights):
    return Slotted(weights).get


HIDING = [by_closure, by_default, by_keyword, by_partial, by_function_of_partial, by_slots]


@pytest.mark.parametrize("hide", HIDING)
@pytest.mark.parametrize("kind", [list, tuple])
def test_parameters_that_functions_and_slots_hold_are_the_live_ones(tmp_path, hide, kind):
    module, callback = made(), softpruning()
    module.decayed = hide(kind(module.encoder.parameters()))
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert [*map(id, module.decayed())] == [*map(id, module.encoder.parameters())]


class FailsOnceTold(Callback):
    def on_softprune(self, surgery):
        raise ZeroDivisionError("not now")


@pytest.mark.parametrize("hide", HIDING)
def test_what_functions_and_slots_hold_is_rolled_back(tmp_path, hide):
    module = made()
    weights = tuple(module.encoder.parameters())
    module.decayed = hide(weights)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, softpruning(), FailsOnceTold())
    assert [*map(id, module.decayed())] == [*map(id, weights)]


def by_reference(weights):
    references = [weakref.ref(weight) for weight in weights]
    return lambda: [reference() for reference in references]


def by_weak_name(weights):
    named = weakref.WeakValueDictionary({str(number): weight for number, weight in enumerate(weights)})
    return lambda: [*named.values()]


def by_weak_key(weights):
    marks = WeakIdKeyDictionary(dict.fromkeys(weights, "trained"))
    return lambda: [*marks.keys()]


def by_weak_member(weights):
    members = weakref.WeakSet(weights)
    return lambda: [*members]


WEAK = [by_reference, by_weak_name, by_weak_key, by_weak_member]


@pytest.mark.parametrize("hide", WEAK)
def test_what_is_held_weakly_is_live_after_a_round_and_after_one_that_is_rolled_back(tmp_path, hide):
    module, callback = made(), softpruning()
    module.decayed = hide(list(module.encoder.parameters()))
    before = {*map(id, module.encoder.parameters())}
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, softpruning(), FailsOnceTold())
    assert {*map(id, module.decayed())} == before
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert {*map(id, module.decayed())} == {*map(id, module.encoder.parameters())} != before


def test_numbers_that_are_held_weakly_by_parameter_follow(tmp_path):
    class Marked(Callback):
        def on_train_start(self, trainer, pl_module):
            self.marks = WeakIdKeyDictionary({p: torch.ones_like(p) for p in pl_module.encoder.parameters()})

    module, marked = made(), Marked()
    fit(tmp_path, module, softpruning(), marked)
    live = {id(parameter): parameter.shape for parameter in module.encoder.parameters()}
    assert {id(parameter): mark.shape for parameter, mark in marked.marks.items()} == live


class Keyed(Callback):
    """Numbers by parameter."""

    def on_train_start(self, trainer, pl_module):
        self.rates = dict.fromkeys(pl_module.parameters(), 0.5)
        self.names = {id(parameter): name for name, parameter in pl_module.named_parameters()}


def test_dictionaries_by_parameter_have_the_live_ones_as_keys(tmp_path):
    module, keyed = made(), Keyed()
    fit(tmp_path, module, softpruning(), keyed, max_epochs=3)
    assert [*map(id, keyed.rates)] == [*map(id, module.parameters())]
    assert keyed.names == {id(parameter): name for name, parameter in module.named_parameters()}


# ------------------------------------------------------------------------------------------------------------- averages


class Shadow(Callback):
    """An average of the user's own, in one of several forms."""

    def __init__(self, form, part=""):
        self.form, self.part = form, part

    def on_train_start(self, trainer, pl_module):
        source = pl_module.get_submodule(self.part)
        if self.form == "dict":
            self.shadow = {n: p.detach().clone() for n, p in source.named_parameters()}
        elif self.form == "state":
            self.shadow = OrderedDict((n, t.clone()) for n, t in source.state_dict().items())
        elif self.form == "list":
            self.shadow = [p.detach().clone() for p in source.parameters()]
        elif self.form == "parameters":
            self.shadow = nn.ParameterList([nn.Parameter(p.detach().clone(), False) for p in source.parameters()])
        elif self.form == "averaged":
            self.shadow = AveragedModel(source)
        elif self.form == "wrapped":
            self.shadow = nn.ModuleDict({"steps": nn.Linear(3, 3), "average": copy.deepcopy(source)})
        elif self.form == "by parameter":
            self.shadow = {p: p.detach().clone() for p in source.parameters()}
        elif self.form == "by identity":
            self.shadow = {id(p): p.detach().clone() for p in source.parameters()}
        elif self.form == "pairs":
            self.shadow = [(p, p.detach().clone()) for p in source.parameters()]
        else:
            self.shadow = copy.deepcopy(source).requires_grad_(False)

    def pairs(self, pl_module):
        source = pl_module.get_submodule(self.part)
        if self.form == "dict":
            return [(self.shadow[n], p) for n, p in source.named_parameters()]
        if self.form == "state":
            return [(self.shadow[n], t) for n, t in source.state_dict().items() if t.is_floating_point()]
        if self.form == "by parameter":
            return [(self.shadow[p], p) for p in source.parameters()]
        if self.form == "by identity":
            return [(self.shadow[id(p)], p) for p in source.parameters()]
        if self.form == "pairs":
            assert [id(p) for p, _ in self.shadow] == [*map(id, source.parameters())]
            return [(average, p) for p, average in self.shadow]
        theirs = self.shadow["average"] if self.form == "wrapped" else self.shadow
        theirs = self.shadow if self.form in ("list", "parameters") else theirs.parameters()
        return list(zip(theirs, source.parameters(), strict=True))

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *_):
        for average, tensor in self.pairs(pl_module):
            average.lerp_(tensor, 0.3)


FORMS = ["dict", "state", "list", "parameters", "module", "averaged", "wrapped", "by parameter", "by identity", "pairs"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_average_of_the_users_own_follows(tmp_path, form, part, bias):
    """Without compensation, the average is the slice of what it was, by the indices that the weights keep."""
    shadow, oracle = Shadow(form, part), {}

    class Look(Callback):
        def __init__(self, when):
            self.when = when

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                oracle[self.when] = [average.clone() for average, _ in shadow.pairs(pl_module)]
                oracle["names"] = [name for name, _ in pl_module.get_submodule(part).named_parameters()]

        def on_softprune(self, surgery):
            oracle["surgery"] = surgery

    module, callback = made(AutoEncoder, bias=bias), softpruning(compensation="none")
    fit(tmp_path, module, Look("before"), callback, Look("after"), shadow, max_epochs=3)
    assert callback.results[0].applied
    assert len(oracle["names"]) == len(oracle["before"]) == len(oracle["after"])
    for name, before, after in zip(oracle["names"], oracle["before"], oracle["after"], strict=True):
        assert torch.equal(oracle["surgery"].slice(f"{part}.{name}", before), after)
        assert after.shape == named(module)[f"{part}.{name}"].shape


class Flat(Callback):
    """All parameters, or those that are trained, in one vector; and one that only looks like it."""

    def on_train_start(self, trainer, pl_module):
        pl_module.encoder[0].requires_grad_(False)
        self.all = parameters_to_vector(pl_module.parameters()).detach().clone()
        self.trained = parameters_to_vector(p for p in pl_module.parameters() if p.requires_grad).detach().clone()
        self.other = torch.arange(len(self.all) + 1)


class Told(Callback):
    def on_softprune(self, surgery):
        self.surgery = surgery


def test_a_vector_of_all_parameters_follows(tmp_path):
    module, flat, told = made(), Flat(), Told()
    fit(tmp_path, module, softpruning(compensation="none"), flat, told, max_epochs=3)
    dense = made()
    for after, trained in ((flat.all, False), (flat.trained, True)):
        names = [n for n, p in module.named_parameters() if p.requires_grad or not trained]
        now = [named(module)[name] for name in names]
        assert len(after) == sum(parameter.numel() for parameter in now)
        parts = after.split([parameter.numel() for parameter in now])
        values = {name: part.reshape(p.shape) for name, p, part in zip(names, now, parts, strict=True)}
        for name, value in values.items():  # as they were before the first step
            assert torch.equal(value, told.surgery.slice(name, named(dense)[name].detach()))
    assert len(flat.other) == count(dense) + 1


class Averages(Callback):
    """PyTorch's wrapper around a copy of the module, or of a part of it."""

    def __init__(self, part=""):
        self.part = part

    def on_fit_start(self, trainer, pl_module):
        self.average = AveragedModel(pl_module.get_submodule(self.part), multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.average.update_parameters(pl_module.get_submodule(self.part))


@pytest.mark.parametrize("part", ["", "decoder", "encoder.0"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_wrapper_for_averages_goes_on_with_the_pruned_module(tmp_path, part, bias):
    module, averages = made(AutoEncoder, bias=bias), Averages(part)
    fit(tmp_path, module, softpruning(), averages, max_epochs=3)
    source, average = module.get_submodule(part), averages.average.module
    assert int(averages.average.n_averaged) == 3 * 4
    assert {n: t.shape for n, t in average.state_dict().items()} == {n: t.shape for n, t in source.state_dict().items()}
    width = FEATURES if not part.startswith("decoder") else module.decoder[0].in_features
    assert average(torch.randn(2, width)).shape == source(torch.randn(2, width)).shape


class Probe(Callback):
    """A network of its own, with a layer of the size of one of the module's, that learns beside it."""

    def on_fit_start(self, trainer, pl_module):
        self.probe = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 5))

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for parameter in self.probe.parameters():
            parameter.mul_(0.9)


def test_a_layer_of_the_same_size_in_a_module_of_a_callbacks_own_is_no_copy(tmp_path):
    probe = Probe()
    with pytest.warns(UserWarning, match=r"Probe\.probe\.0\.weight.*on_softprune"):
        fit(tmp_path, made(), softpruning(), probe, max_epochs=2)
    assert probe.probe[0].weight.shape == (16, FEATURES)


class OfOne(Shadow):
    """Is kept, and not updated."""

    def on_train_batch_end(self, *_):
        pass


@pytest.mark.parametrize("form", ["dict", "list", "module", "averaged"])
def test_an_average_of_one_of_several_parts_that_look_alike_is_left_and_named(tmp_path, form):
    shadow = OfOne(form, "body.2")
    with pytest.warns(UserWarning, match=r"OfOne\.shadow.*on_softprune"):
        fit(tmp_path, made(Square), softpruning(), shadow, max_epochs=2)
    assert shadow.pairs(made(Square))[0][0].shape == (8, 8)


@pytest.mark.parametrize("form", ["dict", "list", "by parameter", "by identity"])
def test_a_created_bias_gets_its_average(tmp_path, form):
    module, shadow = made(AutoEncoder, bias=False), Shadow(form)
    fit(tmp_path, module, softpruning(), shadow, max_epochs=3)
    created = set(named(module)) - set(named(made(AutoEncoder, bias=False)))
    assert created
    assert [average.shape for average, _ in shadow.pairs(module)] == [p.shape for p in module.parameters()]
    assert len(shadow.shadow) == len(named(module))


class Clones(Callback):
    """Averages that are results of operations, and are changed in place with gradients enabled."""

    def on_train_start(self, trainer, pl_module):
        self.shadow = {n: p.clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, parameter in pl_module.named_parameters():
            self.shadow[name].lerp_(parameter.detach(), 0.1)


def test_an_average_that_was_computed_may_be_changed_in_place_as_before(tmp_path):
    callback = softpruning()
    fit(tmp_path, made(), callback, Clones(), max_epochs=3)
    assert callback.results[0].applied


class LitEma(nn.Module):
    """An average in buffers that have the parameters' names without dots, as in latent-diffusion."""

    def __init__(self, model):
        super().__init__()
        self.names = {}
        self.register_buffer("decay", torch.tensor(0.9))
        for name, parameter in model.named_parameters():
            self.names[name] = name.replace(".", "")
            self.register_buffer(self.names[name], parameter.detach().clone())

    @torch.no_grad()
    def update(self, model):
        for name, parameter in model.named_parameters():
            self.get_buffer(self.names[name]).lerp_(parameter, 1 - self.decay)


class Averaging(AutoEncoder):
    """Has such an average of its encoder."""

    def __init__(self):
        super().__init__()
        self.average = LitEma(self.encoder)

    def on_train_batch_end(self, *_):
        self.average.update(self.encoder)


class AveragingCallback(Callback):
    """Has one that is no part of the model."""

    def on_train_start(self, trainer, pl_module):
        self.average = LitEma(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.average.update(pl_module)


def slices_of(before, surgery, prefix):
    return {name: surgery.slice(f"{prefix}{name}", tensor) for name, tensor in before.items()}


@pytest.mark.parametrize("inside", [True, False])
def test_averages_in_buffers_named_without_dots_follow(tmp_path, inside):
    module, averaging, found = made(Averaging if inside else AutoEncoder), AveragingCallback(), {}

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                average = module.average if inside else averaging.average
                found[len(found)] = {name: average.get_buffer(flat).clone() for name, flat in average.names.items()}

        def on_softprune(self, surgery):
            found["surgery"] = surgery

    fit(tmp_path, module, Look(), softpruning(compensation="none"), Look(), *([] if inside else [averaging]))
    before, after = found[0], found[2]
    expected = slices_of(before, found["surgery"], "encoder." if inside else "")
    assert all(torch.equal(after[name], expected[name]) for name in before)
    assert any(after[name].shape != before[name].shape for name in before)


def test_a_checkpoint_with_such_an_average_is_read_again(tmp_path):
    module = made(Averaging)
    fit(tmp_path, module, softpruning()).save_checkpoint(tmp_path / "pruned.ckpt")
    loaded = load_from_checkpoint(Averaging, tmp_path / "pruned.ckpt")
    assert unchanged(loaded, module)


class Anchored(AutoEncoder):
    """Where its parameters have been, in buffers; a mask that a hook reads; a buffer of which nobody knows more."""

    def __init__(self, *, strange=False, persistent=True):
        super().__init__()
        weight = self.encoder[0].weight
        for name, parameter in list(self.named_parameters()):
            self.register_buffer("anchor_" + name.replace(".", "_"), parameter.detach().clone())
        self.register_buffer("mask", torch.arange(weight.numel()).reshape(weight.shape) % 3, persistent)
        weight.register_hook(lambda gradient: gradient * self.mask)
        if strange:
            self.register_buffer("fisher", torch.ones_like(weight))


class Asks(Callback):
    def on_softprune(self, surgery):
        self.surgery = surgery


@pytest.mark.parametrize("persistent", [True, False])
def test_anchors_and_masks_in_buffers_follow(tmp_path, persistent):
    module, asks = made(Anchored, persistent=persistent), Asks()
    fit(tmp_path, module, softpruning(compensation="none"), asks).save_checkpoint(tmp_path / "pruned.ckpt")
    dense = made(Anchored)
    for name, parameter in dense.named_parameters():
        anchor = module.get_buffer("anchor_" + name.replace(".", "_"))
        assert torch.equal(anchor, asks.surgery.slice(name, parameter.detach()))
    assert torch.equal(module.mask, asks.surgery.slice("encoder.0.weight", dense.mask))
    loaded = load_from_checkpoint(Anchored, tmp_path / "pruned.ckpt", persistent=persistent)
    assert unchanged(loaded, module)
    assert torch.equal(loaded.mask, module.mask)


def test_a_buffer_of_which_nothing_is_known_but_its_shape_is_named(tmp_path):
    module = made(Anchored, strange=True)
    with pytest.warns(UserWarning, match=r"SoftPruning: self\.fisher: of the shape of a pruned parameter"):
        fit(tmp_path, module, softpruning())
    assert module.fisher.shape == made(Anchored).encoder[0].weight.shape


def test_buffers_are_rolled_back(tmp_path):
    module = made(Anchored)
    before = {name: buffer.shape for name, buffer in module.named_buffers()}
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, softpruning(), FailsOnceTold())
    assert {name: buffer.shape for name, buffer in module.named_buffers()} == before


class Unfollowable(Callback):
    """Something in the shape of a weight that belongs to no known place."""

    def on_train_start(self, trainer, pl_module):
        self.importance = {"of the first": torch.ones_like(pl_module.encoder[0].weight)}


def test_what_cannot_follow_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"Unfollowable\.importance.*on_softprune"):
        fit(tmp_path, made(), softpruning(), Unfollowable(), max_epochs=2)


class Listening(Unfollowable):
    """Follows by itself."""

    def on_softprune(self, surgery):
        self.importance["of the first"] = surgery.slice("encoder.0.weight", self.importance["of the first"])


class Listens(AutoEncoder):
    told = 0

    def on_softprune(self, surgery):
        self.told += 1
        assert set(surgery.kept) >= {"encoder.0.weight"}


def test_modules_and_callbacks_are_told(tmp_path):
    module, listening = made(Listens), Listening()
    fit(tmp_path, module, softpruning(), listening, max_epochs=2)
    assert module.told == 1
    assert listening.importance["of the first"].shape == module.encoder[0].weight.shape


class Refusing(Shadow):
    def on_softprune(self, surgery):
        raise ZeroDivisionError("not now")


def test_an_exception_in_a_listener_rolls_everything_back(tmp_path):
    first, refusing, module = Shadow("dict"), Refusing("dict"), made(Containers)
    before = {name: parameter.shape for name, parameter in module.named_parameters()}
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, softpruning(), first, refusing)
    assert before == {name: parameter.shape for name, parameter in module.named_parameters()}
    assert {name: tensor.shape for name, tensor in first.shadow.items()} == before
    assert {id(parameter) for parameter in module.listed} <= {id(parameter) for parameter in module.parameters()}


# ---------------------------------------------------------------------------------------------------- optimizers inside


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer and shares its parameter groups; every few steps it goes back halfway."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                if self.calls % 2 == 0:
                    slow.lerp_(parameter.detach(), 0.5)
                    parameter.data.copy_(slow)
        return loss


class Wrapped(AutoEncoder):
    def configure_optimizers(self):
        return Lookahead(torch.optim.Adam(self.parameters(), lr=1e-2))


@pytest.mark.parametrize("bias", [True, False])
def test_an_optimizer_inside_of_another_follows(tmp_path, bias):
    module = made(Wrapped, bias=bias, norm=True)  # vectors in the group, so that biases may join it
    names, before = set(named(module)), {}

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    trainer = fit(tmp_path, module, softpruning(), Look(), max_epochs=3)
    (outer,) = trainer.optimizers
    live = {id(parameter) for parameter in module.parameters()}
    for optimizer in (outer, outer.inner):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(live)
        assert {id(p) for p in held} == live
        assert {id(p) for p in optimizer.state} == live
        for parameter, state in optimizer.state.items():
            assert all(v.shape == parameter.shape for v in state.values() if isinstance(v, torch.Tensor) and v.ndim)
    assert bool(set(named(module)) - names) == (not bias), "biases were created"
    assert all(not torch.equal(before[name], named(module)[name]) for name in names)


# ------------------------------------------------------------------------------------------------------------- teachers


class Teacher(AutoEncoder):
    """A mean teacher of the encoder, in one of several forms."""

    def __init__(self, how="frozen"):
        super().__init__()
        self.how = how
        if how == "siblings":
            self.encoder = nn.ModuleList([self.encoder, copy.deepcopy(self.encoder).requires_grad_(False)])
        elif how != "two":
            self.momentum = copy.deepcopy(self.encoder)
        if how == "frozen":
            self.momentum.requires_grad_(False)
        if how == "two":
            critics = {name: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)) for name in "ab"}
            self.critics = nn.ModuleDict(critics)

    def forward(self, x):
        encoder = self.encoder[0] if self.how == "siblings" else self.encoder
        h = encoder(x)
        extra = sum(critic(h) for critic in self.critics.values()) * 1e-3 if self.how == "two" else 0.0
        return self.decoder(h) + extra

    def configure_optimizers(self):
        skipped = "momentum" if self.how == "not in an optimizer" else "nothing"
        return torch.optim.Adam([p for n, p in self.named_parameters() if not n.startswith(skipped)], lr=1e-2)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("frozen", "twins={'momentum': 'encoder'}"),
        ("not in an optimizer", "twins={'momentum': 'encoder'}"),
        ("siblings", "twins={'encoder.1': 'encoder.0'}"),
    ],
)
def test_a_teacher_that_nobody_declared_is_an_error_before_training(tmp_path, how, line):
    module = made(Teacher, how=how)
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, module, softpruning())
    assert line in str(caught.value)
    assert module.losses == []


@pytest.mark.parametrize("arguments", [{"twins": {"momentum": "encoder"}}, {"ignore": ["momentum"]}], ids=str)
def test_a_teacher_that_is_declared_or_ignored_is_none_of_these(tmp_path, arguments):
    module, callback = made(Teacher), softpruning(**arguments)
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert callback.results[0].costs_before.params == count(made(AutoEncoder)), "it does not count"
    same = module.momentum[0].out_features == module.encoder[0].out_features
    assert same == ("twins" in arguments)


class Unfrozen(AutoEncoder):
    """A mean teacher whose parameters an optimizer holds: it is run without gradients, or not at all."""

    def __init__(self, how="no gradients"):
        super().__init__()
        self.how = how
        if how == "averaged":
            self.momentum = AveragedModel(self.encoder)
        else:
            self.momentum = copy.deepcopy(self.encoder)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.how == "averaged":
            return loss
        with torch.set_grad_enabled(self.how == "trained"):
            taught = self.momentum(batch[0])
        return loss + (self.encoder(batch[0]).mean() - taught.mean()).square()


@pytest.mark.parametrize(
    ("how", "line"),
    [("no gradients", "twins={'momentum': 'encoder'}"), ("averaged", "twins={'momentum.module': 'encoder'}")],
)
def test_a_copy_that_an_optimizer_holds_and_nobody_trains_is_an_error_in_the_first_epoch(tmp_path, how, line):
    module = made(Unfrozen, how=how)
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, module, softpruning())
    assert line in str(caught.value)
    assert len(module.losses) == 4


@pytest.mark.parametrize("arguments", [{"twins": {"momentum": "encoder"}}, {"ignore": ["momentum"]}], ids=str)
def test_such_a_copy_that_is_declared_or_ignored_is_none(tmp_path, arguments):
    callback = softpruning(**arguments)
    fit(tmp_path, made(Unfrozen), callback)
    assert callback.results[0].applied


def test_a_trained_copy_is_none(tmp_path):
    callback = softpruning()
    fit(tmp_path, made(Unfrozen, how="trained"), callback)
    assert callback.results[0].applied


def test_two_trained_copies_are_no_twins(tmp_path):
    callback = softpruning()
    fit(tmp_path, made(Teacher, how="two"), callback)
    assert callback.results[0].applied


class Stack(AutoEncoder):
    """Blocks that look alike, the first of which is frozen."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)))
        self.blocks[0].requires_grad_(False)

    def forward(self, x):
        return self.decoder(self.blocks(self.encoder(x)))


def test_a_frozen_block_of_a_stack_is_no_teacher(tmp_path):
    callback = softpruning()
    fit(tmp_path, made(Stack), callback)
    assert callback.results[0].applied


class Holder:
    def __init__(self, network):
        self.network = network


class Distilled(AutoEncoder):
    """A fixed encoder of the same shapes teaches; it is no submodule."""

    def __init__(self, how="list", teacher=None):
        super().__init__()
        teacher = made(AutoEncoder, seed=5).encoder if teacher is None else teacher(self)
        teacher.requires_grad_(False)
        self.how = how
        if how == "set apart":
            object.__setattr__(self, "hidden", teacher)
        else:
            kept = {"list": [teacher], "tuple": (teacher,), "object": Holder(teacher), "function": lambda: teacher}
            self.hidden = kept[how]

    @property
    def teacher(self):
        if self.how == "set apart":
            return self.hidden
        if self.how in ("list", "tuple"):
            return self.hidden[0]
        return self.hidden.network if self.how == "object" else self.hidden()

    def training_step(self, batch, batch_idx):
        gap = self.encoder(batch[0]).mean() - self.teacher(batch[0]).mean()
        return super().training_step(batch, batch_idx) + gap.square()


def unchanged(network, of):
    theirs, ours = network.state_dict(), of.state_dict()
    return theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("how", ["list", "tuple", "object", "set apart", "function"])
@pytest.mark.parametrize("epochs", [0, 1, [1, 2]], ids=str)
def test_a_fixed_teacher_outside_of_the_model_stays_whole(tmp_path, how, epochs):
    module, callback = made(Distilled, how=how), softpruning(epochs=epochs)
    fit(tmp_path, module, callback)
    assert all(result.applied for result in callback.results)
    assert unchanged(module.teacher, made(AutoEncoder, seed=5).encoder)


class HasTeacher(Callback):
    def __init__(self):
        self.teacher = made(AutoEncoder, seed=5).requires_grad_(False)


def test_a_fixed_teacher_of_a_callback_stays_whole(tmp_path):
    module, holder = made(), HasTeacher()
    fit(tmp_path, module, softpruning(), holder)
    assert unchanged(holder.teacher, made(AutoEncoder, seed=5))


def test_a_teacher_from_which_the_fit_has_begun_elsewhere_stays_whole(tmp_path):
    """Its values are near the model's, and not the same."""

    def teacher(module):
        near = copy.deepcopy(module.encoder)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.mul_(1.01)
        return near

    module = made(Distilled, teacher=teacher)
    before = copy.deepcopy(module.teacher)
    fit(tmp_path, module, softpruning())
    assert unchanged(module.teacher, before)


def copied_encoder(module):
    return copy.deepcopy(module.encoder)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_copy_that_has_not_changed_may_be_an_average_or_a_teacher_and_is_named(tmp_path, epochs):
    module = made(Distilled, teacher=copied_encoder)
    with pytest.warns(UserWarning, match=r"SoftPruning: self\.hidden\[0\]: outside of the model.*`ignore`"):
        fit(tmp_path, module, softpruning(epochs=epochs))
    assert module.teacher[0].out_features == module.encoder[0].out_features


class SeesToIt(Distilled):
    def on_softprune(self, surgery):
        pass


def test_a_copy_whose_owner_sees_to_it_stays_whole(tmp_path):
    module = made(SeesToIt, teacher=copied_encoder)
    fit(tmp_path, module, softpruning())
    assert unchanged(module.teacher, made().encoder)


# ---------------------------------------------------------------------------------------------------------- second fits


def test_a_second_fit_does_not_prune_again_what_is_pruned(tmp_path):
    module, callback = made(), softpruning(target_sparsity=0.5)
    dense = count(module)
    fit(tmp_path, module, callback)
    size = count(module)
    first = callback.results[0]
    for again in (callback, softpruning(target_sparsity=0.5)):
        fit(tmp_path, module, again)
        assert count(module) == size
        assert not again.results[-1].applied
        assert again.results[-1].sparsity == pytest.approx(1 - size / dense)
        assert "pruned before" in again.results[-1].reason
    assert first.sparsity == pytest.approx(1 - size / dense)


def test_a_second_fit_may_go_on_from_there_against_the_first_dense_model(tmp_path):
    module = made()
    dense = count(module)
    loaded_from = tmp_path / "pruned.ckpt"
    fit(tmp_path, module, softpruning(target_sparsity=0.4)).save_checkpoint(loaded_from)
    for again in (module, load_from_checkpoint(AutoEncoder, loaded_from)):
        callback = softpruning(target_sparsity=0.6)
        fit(tmp_path, again, callback)
        (result,) = callback.results
        assert result.applied
        assert result.sparsity == pytest.approx(1 - count(again) / dense, abs=1e-6)
        assert abs(result.sparsity - 0.6) <= 0.03


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_sparsity": None, "constraints": ["val_loss <= 1e9"]},
        {"target_sparsity": [0.5, 0.99], "limits": {"latency": 0.9}, "on_violation": "error"},
        {"target_sparsity": [0.8, 0.98]},
    ],
    ids=str,
)
def test_a_round_that_finds_nothing_left_to_prune_is_skipped_with_its_reason(tmp_path, arguments):
    everything = {"target_sparsity": 0.94, "tolerance": 0.01}  # one channel of each group is left
    module, callback = made(), softpruning(**everything)
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert {group.channels_after for group in callback.results[0].groups} == {1}
    size, again = count(module), softpruning(epochs=[1, 2], report=True, **arguments)
    fit(tmp_path, module, again)
    for result in again.results:
        assert result.outcome == "skipped"
        assert "pruned before" in result.reason
        assert PruningResult.from_dict(result.to_dict()) == result
    assert "nothing is left that can be pruned. encoder.0: it has a single channel" in again.results[-1].reason
    assert count(module) == size
    assert len(list(tmp_path.glob("softprune/epoch=*/report.html"))) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_sparsity": None, "constraints": ["val_loss <= 1e9"]},
        {"target_sparsity": [0.93, 0.94], "tolerance": 0.012},
        {"target_sparsity": [0.94, 0.94], "tolerance": 0.01},
    ],
    ids=str,
)
def test_where_a_round_has_left_nothing_the_next_of_the_same_fit_is_skipped(tmp_path, arguments):
    callback = softpruning(epochs=[1, 2], **arguments)
    fit(tmp_path, made(), callback)
    first, second = callback.results
    assert (first.outcome, second.outcome) == ("applied", "skipped")
    assert "nothing is left that can be pruned" in second.reason
    assert second.sparsity == first.sparsity


def test_without_a_round_before_it_nothing_prunable_stays_an_error_of_prune(tmp_path):
    module = made()
    fit(tmp_path, module, softpruning(target_sparsity=0.94, tolerance=0.01))
    with pytest.raises(MisconfigurationException, match="nothing that can be pruned"):
        prune(module, **loaders(module), target_sparsity=0.5, verbose=False, report=False)


def test_prune_measures_against_the_module_as_given(tmp_path):
    module = made()
    fit(tmp_path, module, softpruning(target_sparsity=0.4))
    size = count(module)
    result = prune(module, **loaders(module), target_sparsity=0.3, tolerance=0.05, verbose=False, report=False,
                   search=softpruning().search)  # fmt: skip
    assert result.sparsity == pytest.approx(1 - count(module) / size, abs=1e-6)


class Silent(tuple):
    """A pair that does not say how long it is, as e3nn's representations of groups."""

    def __len__(self):
        raise NotImplementedError


class Unlisted(list):
    def __iter__(self):
        raise NotImplementedError

    def __len__(self):
        raise NotImplementedError


def test_containers_that_are_no_sequences_and_generated_code_are_left_alone(tmp_path):
    module, callback = made(), softpruning(epochs=1)
    module.kept = Silent((1, Silent((2, "x")))), Unlisted([module.encoder[0].weight])
    made_up = {}
    exec("def forward(self, x): return self.layer(x)", made_up)  # such a function is of no module
    module.decoder[2] = type("Made", (nn.Module,), {"forward": made_up["forward"]})()
    module.decoder[2].layer = nn.Linear(16, FEATURES)
    module.decoder[2].register_buffer("scale", torch.ones(()))
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert list.__getitem__(module.kept[1], 0) is module.encoder[0].weight
