"""Models of the library `transformers`, made from a configuration, tiny and with random weights."""

import torch
from torch import nn

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
DECODER = {
    **TEXT,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
IMAGE = {"image_size": 16, "num_channels": 3}


class Called(nn.Module):
    """A model whose inputs have names and whose outputs are one tensor, as exporting wants it."""

    def __init__(self, model, *names, **fixed):
        super().__init__()
        self.model, self.names, self.fixed = model, names, fixed

    def forward(self, *inputs):
        out = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
        for field in ("logits", "last_hidden_state"):
            if getattr(out, field, None) is not None:
                return getattr(out, field)
        return out[0]


def text(kind, attention="sdpa", names=("input_ids",), config=TEXT, **changes):
    """A builder for a model of language; `kind` is the class's name."""

    def build():
        import transformers

        model_class = getattr(transformers, kind)
        made = model_class.config_class(**{**config, **changes}, attn_implementation=attention)
        return Called(model_class(made), *names, **({"use_cache": False} if hasattr(made, "use_cache") else {}))

    return build


def image(kind, attention="sdpa", name="pixel_values", **config):
    """A builder for a model of images or sound."""

    def build():
        import transformers

        model_class = getattr(transformers, kind)
        return Called(model_class(model_class.config_class(**config, attn_implementation=attention)), name)

    return build


def whisper_encoder():
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=16, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return Called(WhisperEncoder(config), "input_features")


def wav2vec2():
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=20,
        conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    return Called(transformers.Wav2Vec2ForCTC(config), "input_values")


def tokens(shape, vocabulary=100, start=3):
    return lambda generator: torch.randint(start, vocabulary, shape, generator=generator)


def reals(*shape):
    return lambda generator: torch.randn(shape, generator=generator)
