"""Networks of many architectures: how much of each is found, and that it works when half of it is gone.

`python tests/support_table.py` shows the same as a table, with the reasons for what is left out.
"""

import functools
import re
from pathlib import Path

import pytest
import torch

import support_table
from lightning_softprune import find_groups
from support.architectures import measure
from support.architectures.table import ARCHITECTURES, BY_NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:transformers"),
]

# The least share of parameters, in percent, whose tensors prunable groups slice; and the least sparsity that is reached
# when half is asked for. Raise them when more is found.
FOUND = {
    "MLP": (99, 50),
    "residual CNN with BatchNorm": (99, 50),
    "CIFAR ResNet, zero-padded shortcuts": (99, 50),
    "DenseNet": (99, 50),
    "MobileNet, depthwise": (99, 50),
    "U-Net": (99, 50),
    "Inception, concatenation": (99, 50),
    "ShuffleNet, channel shuffle": (99, 50),
    "super-resolution, PixelShuffle": (99, 50),
    "gated linear units, F.glu": (99, 50),
    "CBAM, channel and spatial gates": (99, 50),
    "ViT, fused qkv": (99, 50),
    "decoder: grouped queries, rotary, causal": (99, 50),
    "cross-attention encoder-decoder": (99, 50),
    "nn.TransformerEncoder": (99, 50),
    "nn.Transformer": (99, 50),
    "MLP-Mixer": (99, 50),
    "patch merging": (99, 50),
    "stacked experts, einsum": (99, 50),
    "LoRA adapters": (99, 50),
    "attention pooling": (99, 50),
    "LSTM tagger": (99, 50),
    "GRU classifier, 2 layers, both directions": (99, 50),
    "variational autoencoder": (98, 50),
    "normalising flow, couplings": (99, 50),
    "Siamese, contrastive": (99, 50),
    "HRNet, branches": (99, 50),
    "WaveNet, dilated gates": (99, 50),
    "Fourier neural operator, complex": (99, 50),
    "Mamba, selective scan": (99, 50),
    "graph attention, index_add": (98, 50),
    "bilinear pooling, outer product": (99, 50),
    "BERT (eager)": (99, 50),
    "BERT (sdpa)": (99, 50),
    "DistilBERT": (99, 50),
    "GPT-2": (99, 50),
    "Llama (eager)": (99, 50),
    "Llama (sdpa)": (99, 50),
    "Qwen2": (99, 50),
    "Mixtral": (99, 50),
    "T5": (99, 50),
    "ViT": (99, 50),
    "Swin": (99, 50),
    "Segformer": (99, 50),
    "ConvNeXt": (99, 50),
    "Whisper encoder": (94, 50),
    "Wav2Vec2": (98, 50),
    "MONAI UNet": (99, 50),
    "MONAI AttentionUnet": (99, 50),
    "MONAI SegResNet": (99, 50),
}

# Groups whose channels are heads.
HEADS = {
    "ViT, fused qkv": 2,
    "decoder: grouped queries, rotary, causal": 2,
    "cross-attention encoder-decoder": 2,
    "graph attention, index_add": 1,
    "BERT (eager)": 2,
    "BERT (sdpa)": 2,
    "DistilBERT": 2,
    "GPT-2": 2,
    "Llama (eager)": 2,
    "Llama (sdpa)": 2,
    "Qwen2": 2,
    "Mixtral": 2,
    "T5": 3,
    "ViT": 2,
    "Swin": 3,
    "Segformer": 3,
    "Whisper encoder": 2,
    "Wav2Vec2": 2,
}

every_architecture = pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES])
every_prunable_one = pytest.mark.parametrize("name", [name for name, (share, _) in FOUND.items() if share])


def architecture_of(name):
    architecture = BY_NAME[name]
    if not architecture.available:
        pytest.skip(f"{architecture.needs} is not installed")
    return architecture


@functools.cache
def groups_of(name):
    architecture = architecture_of(name)
    return measure.groups_of(architecture.make(), architecture)


@functools.cache
def pruned(name):
    return measure.pruned(architecture_of(name))


def test_every_architecture_has_its_least_share():
    assert list(FOUND) == [architecture.name for architecture in ARCHITECTURES]


@every_architecture
def test_no_less_is_found_than_ever(name):
    architecture, groups = architecture_of(name), groups_of(name)
    share = measure.share_in_groups(architecture.make(), architecture, groups)
    assert 100 * share >= FOUND[name][0]
    assert share <= 1
    assert all(group.prunable == (not group.reason) for group in groups)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found(name):
    heads, _ = measure.head_groups(architecture_of(name), groups_of(name))
    assert heads >= HEADS[name]


@every_prunable_one
def test_without_compensation_it_is_the_masked_network(name):
    architecture = architecture_of(name)
    error = measure.difference_to_masking(architecture, groups_of(name))
    assert error is None or error <= 1e-5


@every_prunable_one
def test_half_of_it_goes_and_it_trains_on(name):
    task, sparsity = pruned(name)
    dense = sum(p.numel() for p in BY_NAME[name].make().parameters())
    assert 100 * sparsity >= FOUND[name][1]
    assert sum(p.numel() for p in task.parameters()) < dense
    measure.train_a_step(task, BY_NAME[name].batch(4))


@every_prunable_one
def test_the_pruned_network_comes_back_from_a_file(name):
    task, _ = pruned(name)
    fresh, x = measure.saved_and_loaded(task, BY_NAME[name]), BY_NAME[name].example(3)
    assert measure.difference(measure.outputs_of(fresh, x), measure.outputs_of(task, x)) == 0


@pytest.mark.parametrize("name", [name for name, (share, _) in FOUND.items() if share][::4])
def test_what_can_be_pruned_of_the_pruned_network_could_be_before(name):
    fresh = measure.saved_and_loaded(pruned(name)[0], BY_NAME[name])
    smaller = {group.name for group in find_groups(fresh, BY_NAME[name].batch()) if group.prunable}
    assert smaller <= {group.name for group in groups_of(name) if group.prunable}


# ----------------------------------------------------------------------------------------------------------- the table


def test_the_command_prints_a_row_whose_cells_are_measured(tmp_path, capsys):
    support_table.main(["--only", "attention pooling", "--json", str(tmp_path / "cells.json")])
    head, _, row = capsys.readouterr().out.strip().splitlines()
    assert head.count("|") == row.count("|") == len(support_table.COLUMNS) + 2
    assert row.startswith("| attention pooling | 100 % | 2 |")
    assert '"onnx"' in (tmp_path / "cells.json").read_text()


def test_a_cell_that_fails_says_so_and_the_others_are_measured(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(measure, "exported", broken)
    monkeypatch.setattr(measure, "groups_of", broken)
    support_table.main(["--only", "LoRA"])
    row = capsys.readouterr().out.strip().splitlines()[-1]
    assert row.count("RuntimeError: no luck") == 2
    assert "at all" not in row
    assert "| 50 % |" in row or "| 51 % |" in row


def test_the_tables_that_are_kept_have_every_architecture():
    root = Path(support_table.__file__).parent.parent
    for file in (root / "tests" / "SUPPORT.md", support_table.GUIDE):
        text = file.read_text(encoding="utf-8").rpartition(support_table.BEGIN)[2]
        assert re.findall(r"^\| (.+?) \| \d+ %", text, flags=re.MULTILINE) == [a.name for a in ARCHITECTURES], file


def test_a_page_without_the_markers_is_left_alone():
    with pytest.raises(SystemExit, match="support table: begin"):
        support_table.with_table("no table", {})
    text = f"a\n{support_table.BEGIN}\nold\n{support_table.END}\nb"
    assert "old" not in support_table.with_table(text, {"MLP": {"share": 1.0}})


def test_masking_would_notice_a_wrong_removal(monkeypatch):
    """The comparison is an oracle only as long as it can fail."""
    architecture = BY_NAME["U-Net"]
    groups = measure.groups_of(architecture.make(), architecture)
    outputs = measure.outputs_of
    monkeypatch.setattr(
        measure,
        "outputs_of",
        lambda task, x: outputs(architecture.make() if task.net.down1[0].out_channels == 8 else task, x),
    )
    assert measure.difference_to_masking(architecture, groups) > 1e-2
    assert torch.get_num_threads() == 1
