"""The architectures that are looked at: each a small network with random weights, and what it is run on."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from support.architectures import attention, convolutional, further, various
from support.architectures.from_monai import monai_network
from support.architectures.from_transformers import (
    DECODER,
    IMAGE,
    image,
    reals,
    text,
    tokens,
    wav2vec2,
    whisper_encoder,
)
from support.zoo import randomise_statistics

BATCH, BATCHES = 8, 2


class Task(pl.LightningModule):
    """A network and its loss: its own, if it has one; else it is to match targets, of classes or of numbers."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, *inputs):
        return self.net(*inputs)

    def loss(self, batch):
        if hasattr(self.net, "loss"):
            return self.net.loss(*batch)
        *inputs, target = batch
        out = self(*inputs)
        if target.is_floating_point():
            return F.mse_loss(out, target)
        return F.cross_entropy(out.flatten(0, -2), target.flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: Its name in the table.
        build: Makes the network.
        inputs: Makers of its inputs, from a generator.
        classes: Whether its outputs are scores of classes (its last dimension), else numbers.
        head: Width of an attention head; 0 without attention.
        mixed: What makes masking channels another thing than removing them.
        needs: The package that it comes from.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[torch.Generator], torch.Tensor], ...]
    classes: bool = True
    head: int = 0
    mixed: str = ""
    needs: str = ""

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def make(self, seed: int = 0) -> Task:
        """The module, with reproducible weights, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.build()
            randomise_statistics(net)
        return Task(net).eval()

    def batch(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Inputs and, for networks without a loss of their own, targets."""
        task, generator = self.make(), torch.Generator().manual_seed(seed)
        inputs = tuple(make(generator) for make in self.inputs)
        if hasattr(task.net, "loss"):
            return inputs
        with torch.no_grad():
            out = task(*inputs)
        if self.classes:
            return *inputs, torch.randint(0, out.shape[-1], out.shape[:-1], generator=generator)
        return *inputs, torch.randn(out.shape, generator=generator)

    def example(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Inputs alone."""
        return self.batch(seed)[: len(self.inputs)]

    def loaders(self) -> dict[str, DataLoader]:
        """Data to prune with."""
        parts = [self.batch(seed) for seed in range(BATCHES)]
        data = TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return {name: DataLoader(data, batch_size=BATCH) for name in ("train_dataloaders", "val_dataloaders")}


def words(length=10, vocabulary=50):
    return tokens((BATCH, length), vocabulary)


def pictures(size=16, channels=3):
    return reals(BATCH, channels, size, size)


IMAGES, VECTORS = (pictures(),), (reals(BATCH, 16),)
SENTENCES = (words(vocabulary=100),)
LIBRARY = {"needs": "transformers"}
QUERIES = "softmax over queries and keys"
NORM = "a norm over the channels"
WIDTHS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}

OWN = (
    Architecture("MLP", convolutional.Perceptron, VECTORS),
    Architecture("residual CNN with BatchNorm", convolutional.ResNet, IMAGES),
    Architecture("CIFAR ResNet, zero-padded shortcuts", lambda: convolutional.ResNet("padding"), IMAGES),
    Architecture("DenseNet", convolutional.DenseNet, IMAGES),
    Architecture("MobileNet, depthwise", convolutional.MobileNet, IMAGES),
    Architecture("U-Net", convolutional.UNet, IMAGES, classes=False),
    Architecture("Inception, concatenation", convolutional.Inception, IMAGES),
    Architecture("ShuffleNet, channel shuffle", convolutional.ShuffleNet, IMAGES),
    Architecture("super-resolution, PixelShuffle", convolutional.SuperResolution, IMAGES, classes=False),
    Architecture("gated linear units, F.glu", convolutional.GatedConv, (reals(BATCH, 4, 12),)),
    Architecture(
        "CBAM, channel and spatial gates", convolutional.GatedResNet, IMAGES, mixed="a mean over the channels"
    ),
    Architecture("ViT, fused qkv", attention.VisionTransformer, IMAGES, head=8),
    Architecture(
        "decoder: grouped queries, rotary, causal",
        attention.Decoder,
        (words(),),
        head=8,
        mixed="an RMS norm of its own",
    ),
    Architecture("cross-attention encoder-decoder", attention.EncoderDecoder, (words(), words(7)), head=8),
    Architecture("nn.TransformerEncoder", attention.TorchEncoder, (words(),), head=8),
    Architecture(
        "nn.Transformer", attention.TorchTransformer, (reals(BATCH, 9, 6), reals(BATCH, 7, 6)), classes=False, head=8
    ),
    Architecture("MLP-Mixer", attention.Mixer, IMAGES),
    Architecture("patch merging", attention.Merging, IMAGES),
    Architecture("stacked experts, einsum", attention.Experts, (reals(BATCH, 8),)),
    Architecture("LoRA adapters", attention.LowRankAdapters, VECTORS),
    Architecture("attention pooling", attention.AttentionPooling, (reals(BATCH, 9, 6),)),
    Architecture("LSTM tagger", various.Tagger, (words(),)),
    Architecture("GRU classifier, 2 layers, both directions", various.RecurrentClassifier, (reals(BATCH, 9, 6),)),
    Architecture("variational autoencoder", various.VariationalAutoencoder, VECTORS),
    Architecture("normalising flow, couplings", various.Flow, (reals(BATCH, 8),)),
    Architecture("Siamese, contrastive", various.Siamese, (pictures(), pictures())),
    Architecture("HRNet, branches", further.Branches, IMAGES, classes=False),
    Architecture("WaveNet, dilated gates", further.WaveNet, (reals(BATCH, 2, 16),), classes=False),
    Architecture("Fourier neural operator, complex", further.FourierOperator, (reals(BATCH, 16, 2),), classes=False),
    Architecture("Mamba, selective scan", further.SelectiveScan, (reals(BATCH, 6, 3),), mixed=NORM),
    Architecture("graph attention, index_add", further.GraphAttention, (reals(BATCH, 9, 5),), head=4),
    Architecture("bilinear pooling, outer product", further.BilinearPooling, IMAGES),
)

FROM_TRANSFORMERS = (
    Architecture("BERT (eager)", text("BertForSequenceClassification", "eager"), SENTENCES, head=8, **LIBRARY),
    Architecture("BERT (sdpa)", text("BertForSequenceClassification"), SENTENCES, head=8, **LIBRARY),
    Architecture(
        "DistilBERT",
        text(
            "DistilBertForSequenceClassification",
            config={"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
            max_position_embeddings=32,
        ),
        SENTENCES,
        head=8,
        **LIBRARY,
    ),
    Architecture(
        "GPT-2",
        text(
            "GPT2LMHeadModel",
            config={"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
            bos_token_id=1,
            eos_token_id=2,
        ),
        SENTENCES,
        head=8,
        **LIBRARY,
    ),
    Architecture("Llama (eager)", text("LlamaForCausalLM", "eager", config=DECODER), SENTENCES, head=8, **LIBRARY),
    Architecture("Llama (sdpa)", text("LlamaForCausalLM", config=DECODER), SENTENCES, head=8, **LIBRARY),
    Architecture("Qwen2", text("Qwen2ForCausalLM", config=DECODER), SENTENCES, head=8, **LIBRARY),
    Architecture(
        "Mixtral",
        text(
            "MixtralForCausalLM",
            "eager",
            config=DECODER,
            num_local_experts=3,
            num_experts_per_tok=2,
        ),
        SENTENCES,
        head=8,
        **LIBRARY,
    ),
    Architecture(
        "T5",
        text(
            "T5ForConditionalGeneration",
            "eager",
            ("input_ids", "decoder_input_ids"),
            {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        (words(vocabulary=100), words(7, 100)),
        head=8,
        **LIBRARY,
    ),
    Architecture(
        "ViT",
        image(
            "ViTForImageClassification",
            **IMAGE,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
        ),
        IMAGES,
        head=8,
        **LIBRARY,
    ),
    Architecture(
        "Swin",
        image(
            "SwinForImageClassification",
            "eager",
            **IMAGE,
            patch_size=2,
            embed_dim=16,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        IMAGES,
        head=8,
        **LIBRARY,
    ),
    Architecture(
        "Segformer",
        image(
            "SegformerForSemanticSegmentation",
            "eager",
            **WIDTHS,
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=16,
            num_labels=3,
        ),
        (pictures(32),),
        classes=False,
        head=8,
        **LIBRARY,
    ),
    Architecture("ConvNeXt", image("ConvNextForImageClassification", "eager", **WIDTHS), (pictures(32),), **LIBRARY),
    Architecture("Whisper encoder", whisper_encoder, (reals(BATCH, 8, 32),), classes=False, head=8, **LIBRARY),
    Architecture("Wav2Vec2", wav2vec2, (reals(BATCH, 400),), head=8, **LIBRARY),
)

SCANS = {"inputs": (reals(BATCH, 1, 32, 32),), "classes": False, "needs": "monai"}
FROM_MONAI = (
    Architecture("MONAI UNet", monai_network("UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), **SCANS),
    Architecture("MONAI AttentionUnet", monai_network("AttentionUnet", 2, 1, 2, (8, 16, 32), (2, 2)), **SCANS),
    Architecture(
        "MONAI SegResNet", monai_network("SegResNet", 2, 16, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), **SCANS
    ),
)

ARCHITECTURES = (*OWN, *FROM_TRANSFORMERS, *FROM_MONAI)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
