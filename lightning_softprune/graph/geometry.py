"""How the outputs of a layer read its inputs: the geometry of its weight.

A convolution slides a *kernel* over its input; each of the kernel's *positions* reads one number of every channel. A
layer without a kernel reads rows of its input, one number per channel; behind a flatten a channel has several
consecutive numbers there (its *stride*), which then are the positions. So every weight is, per group of the layer, one
matrix whose columns are channels times positions: ``(groups, outputs per group, channels per group, positions)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["Kernel", "Shape", "WeightGeometry", "check_rank", "shape_mismatch"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """What a convolution slides over its input; one entry per dimension of the map.

    Attributes:
        size: Positions along each dimension.
        stride: Steps from output to output; of a transposed convolution, from input to input.
        padding: Numbers added at both ends, or ``"same"`` or ``"valid"``.
        dilation: Distance between positions.
        around: The padding as `torch.nn.functional.pad` takes it.
        padding_mode: What is added: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        output_padding: Of a transposed convolution: what is added at one end of its output.
        transposed: Whether each input is spread over the outputs, instead of each output gathering inputs.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    around: tuple[int, ...]
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def positions(self) -> int:
        """How many numbers of each channel an output reads."""
        return math.prod(self.size)

    @property
    def is_point(self) -> bool:
        """Whether each output reads one number of every channel, and every number of the input is read."""
        padded = isinstance(self.padding, tuple) and any(self.padding)  # a word pads one position by nothing
        return not padded and self.positions == math.prod(self.stride) == 1


@dataclass(frozen=True)
class WeightGeometry:
    """Which numbers of its input the weight of a layer multiplies.

    Attributes:
        inputs: Input channels.
        outputs: Output channels.
        groups: Equal parts of inputs and outputs that know nothing of each other.
        input_dim: The dimension of the weight that reads the inputs, of one group where there are several; the other
            of the first two dimensions holds the outputs.
        kernel: For convolutions.
        weight: Name of the parameter.
        slot: The layer's slot that it reads.
        is_whole: Whether outputs are nothing but this weight times the inputs, and a bias: only then can a prediction
            of inputs be folded into it.
        bias: Name of the parameter that is added to the outputs, where the layer has it.
    """

    inputs: int
    outputs: int
    groups: int = 1
    input_dim: int = 1
    kernel: Kernel | None = None
    weight: str = "weight"
    slot: str = "in"
    is_whole: bool = True
    bias: str = "bias"

    @property
    def output_dim(self) -> int:
        """The dimension of the weight that holds the outputs."""
        return 1 - self.input_dim

    @property
    def features(self) -> int:
        """How many numbers an output reads, with all groups: channels times positions of the kernel."""
        return self.inputs * (1 if self.kernel is None else self.kernel.positions)

    def positions(self, stride: int = 1) -> int:
        """Numbers per channel that an output reads: positions of the kernel, or of a flattened map."""
        return stride if self.kernel is None else self.kernel.positions

    def reads_one_row(self, stride: int = 1) -> bool:
        """Whether each output reads one row of the input, where positions of a map are rows, and all are read."""
        return stride == 1 if self.kernel is None else self.kernel.is_point

    def by_input(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights that read each input channel, shape ``(channels, ...)``."""
        if self.input_dim == 0:
            return weight
        if self.groups > 1:
            grouped = weight.reshape(self.groups, -1, *weight.shape[1:])  # (groups, out / groups, in / groups, ...)
            return grouped.transpose(1, 2).flatten(0, 1)
        return weight.transpose(0, 1)

    def to_rows(self, weight: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """Bring a weight into ``(groups, outputs per group, channels per group, positions)``."""
        if self.kernel is None:
            weight = weight.t() if self.input_dim == 0 else weight
            return weight.reshape(1, len(weight), weight.shape[1] // stride, stride)
        blocks = weight.reshape(self.groups, len(weight) // self.groups, *weight.shape[1:])
        return (blocks.transpose(1, 2) if self.input_dim == 0 else blocks).flatten(3)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back from :meth:`to_rows`."""
        if self.kernel is None:
            weight = rows[0].flatten(1)
            return weight.t() if self.input_dim == 0 else weight
        if self.input_dim == 0:
            rows = rows.transpose(1, 2)
        return rows.flatten(0, 1).reshape(-1, rows.shape[2], *self.kernel.size)

    def kept_inputs(self, width: int, by_dim: Mapping[int, torch.Tensor], stride: int = 1) -> torch.Tensor:
        """Mask of the input channels that stay.

        Args:
            width: Size of the weight's input dimension before the plan.
            by_dim: The weight's kept indices by dimension; those of the inputs are among them.
            stride: Consecutive indices per channel.

        Returns:
            Shape ``(channels,)``.
        """
        parts = 1 if self.input_dim == 0 else self.groups  # a grouped weight holds the indices of its first group only
        mask = torch.zeros(parts, width, dtype=torch.bool)
        mask[:, by_dim[self.input_dim].cpu()] = True
        return mask.flatten()[::stride]

    def kept_outputs(self, width: int, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
        """Indices of the outputs that stay; ``None`` for all of them.

        Args:
            width: Size of the weight's output dimension before the plan.
            by_dim: The weight's kept indices by dimension.
        """
        kept = by_dim.get(self.output_dim)
        if kept is None or self.groups == 1 or self.input_dim == 1:
            return kept
        return torch.cat([kept + group * width for group in range(self.groups)])  # the weight holds one group's

    def with_kept_outputs(self, weight: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """A weight from before a plan, without the outputs that the plan removes."""
        dim = self.output_dim
        return weight.index_select(dim, by_dim[dim].to(weight.device)) if dim in by_dim else weight


def check_rank(shape: Shape, tensor: torch.Tensor) -> None:
    """Refuse a shape with another number of dimensions than the tensor has.

    Raises:
        ValueError: It has.
    """
    if len(shape) != tensor.ndim:
        raise ValueError(shape_mismatch(shape, tuple(tensor.shape)))


def shape_mismatch(there: Shape, here: Shape) -> str:
    """Word the difference between a checkpoint's shape and a model's."""
    return f"a tensor has the shape {there} in the checkpoint, this model would have {here}"
