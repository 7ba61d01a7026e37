"""Networks of the library `monai`, tiny and with random weights; they are measured where it is installed."""

from torch import nn


def monai_network(name, *sizes, **more):
    """A function that builds a network of `monai.networks.nets`."""

    def build() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, name)(*sizes, **more)

    return build
