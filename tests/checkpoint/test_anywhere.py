"""Records beside files of other formats, and other libraries' ways to load."""

import copy
import json
import sys
import threading
import types

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_softprune
from lightning_softprune import SoftPruning, UniformBaseline, find_groups, prune, record, resize, resizing
from lightning_softprune.checkpoint import ModelShapes, is_recorded, load_from_checkpoint, rounds_of
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.architectures.table import BY_NAME
from support.modules import AutoEncoder, loaders, made

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"search": UniformBaseline(), "tolerance": 0.1, "report": False, "verbose": False}


def pruned(kind=AutoEncoder, **arguments):
    module = made(kind, **arguments)
    prune(module, **loaders(module), target_sparsity=0.5, **QUIET)
    return module.eval()


def same_weights(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


class Hooked(AutoEncoder):
    """Writes something of its own into checkpoints, and counts how often."""

    saved = 0

    def on_save_checkpoint(self, checkpoint):
        self.saved += 1
        checkpoint["mine"] = self.saved


def test_the_record_is_that_of_the_modules_checkpoints_and_saves_none(tmp_path):
    module = made(Hooked)
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         callbacks=[SoftPruning(target_sparsity=0.5, **QUIET)], enable_model_summary=False)  # fmt: skip
    trainer.fit(module, **loaders(module))
    trainer.save_checkpoint(tmp_path / "pruned.ckpt", weights_only=True)
    assert module.saved == 1
    assert record(module) == torch.load(tmp_path / "pruned.ckpt", weights_only=True)["softprune"]
    assert module.saved == 1


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"norm": True}], ids=str)
def test_a_record_comes_back_from_json_and_shapes_a_fresh_module(arguments):
    module = pruned(**arguments)
    kept = json.loads(json.dumps(record(module)))
    fresh = made(AutoEncoder, 1, **arguments).eval()
    resize(fresh, kept)
    fresh.load_state_dict(module.state_dict())
    same_weights(fresh, module)
    assert rounds_of(fresh) == rounds_of(module)
    assert record(fresh) == record(module)


def test_a_record_is_a_copy():
    module = pruned()
    one = record(module)
    one["results"][0]["epoch"] = 99
    one["layers"].clear()
    assert record(module) != one
    assert rounds_of(module)[0].epoch == 0


@pytest.mark.parametrize("arguments", [{}, {"bias": False}], ids=str)
def test_a_part_of_a_pruned_module_has_a_record_that_shapes_the_part_of_another(arguments):
    module, other = pruned(**arguments), made(AutoEncoder, 1, **arguments)
    found = record(module.encoder)
    assert found["results"] == []
    assert found["layers"]["0"] == {"in": 12, "out": module.encoder[0].out_features}
    resize(other.encoder, json.loads(json.dumps(found)))
    other.encoder.load_state_dict(module.encoder.state_dict())
    same_weights(other.encoder, module.encoder)


def test_asking_a_dense_module_for_its_record_leaves_it_dense():
    module = made()
    found = record(module)
    assert not is_recorded(module)
    assert found["shapes"] == found["dense"]["shapes"]
    resize(made(seed=1), found)


# ------------------------------------------------------------------------------------------------------------ resizing


def test_modules_take_the_shape_of_what_they_load_within_the_block_alone():
    module, fresh = pruned(), made(seed=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(module.state_dict())
    original = nn.Module.load_state_dict
    with resizing():
        result = fresh.load_state_dict(module.state_dict())
        with resizing():
            made(seed=2).load_state_dict(module.state_dict())
        made(seed=3).load_state_dict(module.state_dict())
    assert not result.missing_keys
    same_weights(fresh, module)
    assert nn.Module.load_state_dict is original
    with pytest.raises(RuntimeError, match="size mismatch"):
        made(seed=1).load_state_dict(module.state_dict())


class TheirOwn(nn.Module):
    """As libraries have it: a class that builds itself and loads its parts one by one."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = AutoEncoder().encoder, AutoEncoder().decoder

    @classmethod
    def from_file(cls, path, **how):
        model, state = cls(), torch.load(path)
        for name, part in model.named_children():
            part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}, **how)
        return model

    def forward(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_a_librarys_own_loading_takes_a_pruned_file(tmp_path, how):
    module, x = pruned(), torch.randn(4, 12)
    state = {name: value for name, value in module.state_dict().items() if name.startswith(("encoder", "decoder"))}
    torch.save(state, tmp_path / "weights.pt")
    with resizing():
        loaded = TheirOwn.from_file(tmp_path / "weights.pt", **how)
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)
    assert loaded.encoder[0].out_features == module.encoder[0].out_features
    torch.optim.Adam(loaded.parameters())
    loaded(x).sum().backward()


def test_lightnings_own_loading_takes_a_pruned_checkpoint_with_its_rounds(tmp_path):
    module = made(AutoEncoder, bias=False)
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False)  # fmt: skip
    prune(module, **loaders(module), trainer=trainer, target_sparsity=0.5, **QUIET)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt", weights_only=True)
    with resizing():
        loaded = AutoEncoder.load_from_checkpoint(tmp_path / "pruned.ckpt", bias=False)
    same_weights(loaded, module)
    assert rounds_of(loaded) == rounds_of(module)
    assert "on_load_checkpoint" not in vars(AutoEncoder)


@pytest.mark.parametrize("how", ["load_state_dict", "load_from_checkpoint"])
def test_what_other_threads_load_is_not_resized(tmp_path, how):
    module, found = pruned(), []
    path = tmp_path / "pruned.ckpt"
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, path)

    def load():
        try:
            if how == "load_state_dict":
                made(seed=1).load_state_dict(module.state_dict())
            else:
                AutoEncoder.load_from_checkpoint(path)
        except RuntimeError as error:
            found.append(str(error))

    with resizing():
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert "size mismatch" in found[0]


def test_blocks_of_several_threads_neither_wait_for_each_other_nor_end_together(tmp_path):
    module, done, ended = pruned(), threading.Event(), threading.Event()
    path, found = tmp_path / "pruned.ckpt", []
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, path)

    def load():
        found.append(load_from_checkpoint(AutoEncoder, path))
        with resizing():
            done.set()
            ended.wait(20)
            found.append(AutoEncoder.load_from_checkpoint(path))

    thread = threading.Thread(target=load, daemon=True)
    with resizing():
        thread.start()
        assert done.wait(20)  # in a block of its own, while this one goes on
    with pytest.raises(RuntimeError, match="size mismatch"):  # the other thread's block still does
        AutoEncoder.load_from_checkpoint(path)
    ended.set()
    thread.join(20)
    for loaded in found:
        same_weights(loaded, module)
    assert len(found) == 2
    assert not any(hasattr(kind, "__wrapped__") for kind in (nn.Module.load_state_dict, AutoEncoder.on_load_checkpoint))


def test_a_hook_may_load_another_module_and_ask_its_parts(tmp_path):
    """A part that is asked for the same checkpoint has its own hook called; one that is loaded inside is resized."""
    module, path = pruned(), tmp_path / "pruned.ckpt"
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, path)

    class Student(AutoEncoder):
        asked = False

        def on_load_checkpoint(self, checkpoint):
            super().on_load_checkpoint(checkpoint)
            if not Student.asked:
                Student.asked = True
                made(Student).on_load_checkpoint(checkpoint)
                self.teacher = [load_from_checkpoint(AutoEncoder, path), Student.load_from_checkpoint(path)]

    loaded = load_from_checkpoint(Student, path)
    for one in (loaded, *loaded.teacher):
        same_weights(one, module)


def test_weights_of_another_architecture_say_which_module_does_not_fit():
    state = pruned().state_dict()
    state["encoder.0.weight"] = torch.zeros(3, 4, 5)
    fresh = made(seed=1)
    before = ModelShapes.of(fresh)
    with resizing(), pytest.raises(ValueError, match=r"encoder\.0"):
        fresh.load_state_dict(state)
    assert ModelShapes.of(fresh) == before


class Renaming(nn.Linear):
    """Takes the weights of an older release, which had other names and were the other way round."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel").T
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_modules_that_change_what_they_load_go_on_doing_so():
    model, kernel = nn.Sequential(nn.Linear(3, 4), Renaming(4, 2)), torch.randn(4, 2)
    state = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4), "1.kernel": kernel, "1.bias": torch.ones(2)}
    with resizing():
        model.load_state_dict(state)
        model.load_state_dict({}, strict=False)
    assert torch.equal(model[1].weight, kernel.T)


class Unsized(nn.Module):
    """A normalisation without tensors: its width is in no weight."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 8), nn.GroupNorm(2, 8, affine=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def test_a_record_tells_what_shapes_do_not():
    small, x = Unsized(), torch.randn(3, 5)
    small.body, small.norm, small.head = nn.Linear(5, 4), nn.GroupNorm(2, 4, affine=False), nn.Linear(4, 2)
    with resizing(), pytest.raises(ValueError, match="norm: no tensor of this GroupNorm tells its size"):
        Unsized().load_state_dict(small.state_dict())
    model, part = Unsized(), nn.Linear(5, 8)
    with resizing(record(small)):
        model.load_state_dict(small.state_dict())
        part.load_state_dict(small.body.state_dict())  # not what the record is of
    torch.testing.assert_close(model(x), small(x))
    assert model.norm.num_channels == 4
    assert part.out_features == 4


def test_a_damaged_record_is_refused_before_anything_is_loaded():
    damaged = record(made())
    del damaged["dense"]
    original = nn.Module.load_state_dict
    with pytest.raises(ValueError, match="dense: it is missing"), resizing(damaged):
        pass
    assert nn.Module.load_state_dict is original


@pytest.mark.slow
def test_a_pruned_model_of_transformers_is_saved_beside_its_record_and_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    architecture = BY_NAME["BERT (sdpa)"]
    task, (x, _) = architecture.make(), architecture.batch()
    dense = sum(p.numel() for p in task.parameters())
    prune(task, **architecture.loaders(), target_sparsity=0.2, **QUIET)
    bert = task.eval().net.model
    assert sum(p.numel() for p in bert.parameters()) < 0.9 * dense
    bert.save_pretrained(tmp_path)
    (tmp_path / "softprune.json").write_text(json.dumps(record(bert)))

    config = transformers.AutoConfig.from_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    kept = json.loads((tmp_path / "softprune.json").read_text())
    one, other = (transformers.BertForSequenceClassification(copy.deepcopy(config)).eval() for _ in range(2))
    resize(one, kept)
    one.load_state_dict(state)
    with resizing(kept):
        other.load_state_dict(state)
    for loaded in (one, other):
        torch.testing.assert_close(loaded(x).logits, bert(x).logits, rtol=0, atol=0)
        assert find_groups(loaded, x)


def test_both_are_public():
    assert {"record", "resizing"} <= set(lightning_softprune.__all__)


def tiny_bert(transformers):
    """A BERT without dropout, and its input."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=12, **sizes)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval(), torch.randint(0, 40, (2, 8))


@pytest.mark.slow
def test_from_pretrained_builds_the_model_in_the_shape_of_the_record(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny_bert(transformers)
    groups = [g for g in find_groups(model, tokens) if g.prunable and not g.counts]
    assert any("intermediate" in group.name for group in groups)
    apply_plan(model, groups, Plan(tuple(tuple(range(group.num_channels // 2)) for group in groups)))
    model.save_pretrained(tmp_path)
    given = json.loads(json.dumps(record(model)))
    method = vars(transformers.PreTrainedModel)["_load_pretrained_model"]
    with resizing(given):
        loaded = type(model).from_pretrained(tmp_path).eval()
    assert vars(transformers.PreTrainedModel)["_load_pretrained_model"] is method
    same_weights(model, loaded)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(RuntimeError):  # its sizes are not those of the configuration
        type(model).from_pretrained(tmp_path)
    with resizing(given):  # the record of another model
        other = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=2, vocab_size=9))
        other.save_pretrained(tmp_path / "other")
        same_weights(other, transformers.BertModel.from_pretrained(tmp_path / "other"))


class Built(nn.Module):
    """Built from a configuration, filled from files, and then with what is computed from the configuration again."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.arange(1.0, 7.0), persistent=False)
        self.shift = torch.arange(6.0)

    def forward(self, x):
        return self.head(self.body(x) * self.scale + self.shift)

    @classmethod
    def from_pretrained(cls, state):
        with torch.device("meta"):
            model = cls()
        return cls._load_pretrained_model(model, state)

    @staticmethod
    def _load_pretrained_model(model, state):
        model.load_state_dict(state, assign=True)
        model.scale = torch.empty_like(model.scale, device="cpu")
        model._initialize_missing_keys()
        return model

    def _initialize_missing_keys(self):
        self.scale.copy_(torch.arange(1.0, 7.0))


class Holding(pl.LightningModule):
    """Trains what a library builds."""

    def __init__(self):
        super().__init__()
        self.net = Built()

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_buffers_that_a_library_computes_from_the_configuration_are_those_of_the_record(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", types.SimpleNamespace(PreTrainedModel=Built))
    module, data = Holding(), torch.utils.data.DataLoader(torch.randn(8, 4), 4)
    prune(module, train_dataloaders=data, val_dataloaders=data, target_sparsity=0.5, **QUIET)
    model = module.net.eval()
    assert 0 < len(model.scale) < 6
    method = Built._initialize_missing_keys
    with resizing(record(model)):
        loaded = Built.from_pretrained(model.state_dict())
    assert Built._initialize_missing_keys is method
    assert torch.equal(loaded.scale, model.scale)
    assert torch.equal(loaded.shift, model.shift)
    assert torch.equal(loaded(torch.ones(3, 4)), model(torch.ones(3, 4)))
