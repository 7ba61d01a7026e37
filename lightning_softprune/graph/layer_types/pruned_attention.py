"""What `nn.MultiheadAttention` becomes when it has lost heads or channels: heads times their width are its own number.

PyTorch's forward takes the width of a head for ``embed_dim // num_heads``, and its fast paths do so in native code. A
pruned layer keeps its tensors, attributes and hooks, and changes its class for one with a forward of its own. Its
``out_proj`` is called as a layer.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F


class _Options(NamedTuple):
    """The arguments of attention beside queries, keys and values, in PyTorch's order."""

    key_padding_mask: torch.Tensor | None = None
    need_weights: bool = True
    attn_mask: torch.Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads have a width of their own; it is never made, layers become it.

    Attributes:
        unpruned_heads: How many heads it had before any was removed.
    """

    unpruned_heads: int

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """PyTorch asks it whether the fast path of a `TransformerEncoderLayer` may be taken: it must not."""
        return False

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `nn.MultiheadAttention`."""
        options = _Options(*args, **kwargs)
        if query.is_nested:
            return self._of_nested(query, key, value, options)
        if options.is_causal and options.attn_mask is None:
            raise RuntimeError("is_causal: it is a hint of what attn_mask is, and there is no attn_mask")
        is_batched, is_one = query.ndim == 3, query is key and key is value
        if not is_batched:
            padding = options.key_padding_mask
            options = options._replace(key_padding_mask=None if padding is None else padding[None])
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._projected(query, key, value, is_one)
        mixed, weights = self._attend(q, k, v, options)
        output = self.out_proj(mixed)
        if weights is not None and options.average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_one: bool
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of all heads, ``(batch, heads, positions, width)``."""
        if is_one and self.in_proj_weight is not None:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        q, k, v = projected
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return q, k, v

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: _Options
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What all heads found, side by side; and how they looked for it."""
        causal = options.is_causal and options.key_padding_mask is None and not options.need_weights
        mask = None if causal else self._mask(q, k.shape[2], options)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if options.need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        return mixed.transpose(1, 2).flatten(2), weights

    def _mask(self, q: torch.Tensor, keys: int, options: _Options) -> torch.Tensor | None:
        """What is added to the scores, of as many dimensions as they have; nothing for keys that the layer adds."""
        batch, heads, length = q.shape[:3]
        found = []
        if (mask := options.attn_mask) is not None:
            if mask.ndim == 3 and len(mask) == batch * heads:
                mask = mask.reshape(batch, heads, *mask.shape[1:])
            elif mask.ndim != 2:
                raise ValueError(
                    f"attn_mask: its shape is {tuple(mask.shape)}, and has to be ({length}, keys) or "
                    f"({batch * heads}, {length}, keys), for each of a batch of {batch} and {heads} heads; there were "
                    f"{self.unpruned_heads} heads before pruning, num_heads says how many there are"
                )
            found.append(mask)
        if options.key_padding_mask is not None:
            found.append(options.key_padding_mask[:, None, None])
        added = [F.pad(_as_numbers(mask, q.dtype), (0, keys - mask.shape[-1])) for mask in found]
        return functools.reduce(torch.add, added) if added else None

    def _of_nested(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: _Options
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sequences of different lengths, as `nn.TransformerEncoder` makes them of a padding mask in eval mode."""
        if query is not key or key is not value or not self.batch_first or options.key_padding_mask is not None:
            raise ValueError("query: nested tensors go without a padding mask, in self-attention with batch_first=True")
        padded = query.to_padded_tensor(0.0)
        lengths = query._nested_tensor_size()[:, 0].to(padded.device)
        there = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        options = options._replace(key_padding_mask=~there)
        output, weights = self(padded, padded, padded, *options)
        return torch._nested_tensor_from_mask(output, there, mask_check=False), weights


def _as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask that is added: what a truth value forbids is minus infinity."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


# ----------------------------------------------------------------------------------------------------------- classes

_MADE: MutableMapping[type[nn.MultiheadAttention], type[PrunedMultiheadAttention]] = WeakKeyDictionary()


def pruned_class(kind: type[nn.MultiheadAttention]) -> type[PrunedMultiheadAttention]:
    """The class that layers of this class become: for one of the user's own, a subclass of both.

    Args:
        kind: The class, with PyTorch's forward.
    """
    if issubclass(kind, PrunedMultiheadAttention):
        return kind
    if kind is nn.MultiheadAttention:
        return PrunedMultiheadAttention
    if kind not in _MADE:
        own = {"__reduce_ex__": _reduced, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _MADE[kind] = type(f"Pruned{kind.__name__}", (kind, PrunedMultiheadAttention), own)
    return _MADE[kind]


def dense_class(kind: type[nn.MultiheadAttention]) -> type[nn.MultiheadAttention]:
    """The class whose :func:`pruned_class` this is; any other is its own."""
    if not issubclass(kind, PrunedMultiheadAttention):
        return kind
    return nn.MultiheadAttention if kind is PrunedMultiheadAttention else kind.__bases__[0]


def _reduced(layer: PrunedMultiheadAttention, _: Any) -> tuple[Any, ...]:
    """How a layer of a class that was made on the fly is copied and pickled: by the user's class."""
    own = getattr(layer, "__getstate__", None)  # objects have it from Python 3.11 on
    return _made_again, (dense_class(type(layer)),), layer.__dict__ if own is None else own()


def _made_again(kind: type[nn.MultiheadAttention]) -> PrunedMultiheadAttention:
    made = pruned_class(kind)
    return made.__new__(made)
