"""Plans that leave a layer without channels."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_softprune import GridSearch, prune

pytestmark = pytest.mark.usefixtures("one_thread")


class Joined(pl.LightningModule):
    """A group of six channels, of which a layer makes two that another reads alone."""

    def __init__(self):
        super().__init__()
        self.whole, self.two, self.four = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(4, 4)
        self.reads_two, self.head = nn.Linear(2, 4), nn.Linear(6, 4)
        with torch.no_grad():
            for weight in (self.two.weight, self.reads_two.weight, self.whole.weight[:2], self.head.weight[:, :2]):
                weight.mul_(0.01)  # these go first

    def forward(self, x):
        whole, two = self.whole(x), self.two(x).relu()
        return self.reads_two(two) + self.head((whole + torch.cat([two, self.four(x)], -1)).relu())

    def training_step(self, batch, _=0):
        return (self(batch) - batch.flip(1)).square().mean()

    def validation_step(self, batch, _=0):
        self.log("val_loss", self.training_step(batch), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.slow
def test_a_plan_may_take_all_channels_of_a_layer_whose_group_keeps_some():
    torch.manual_seed(0)
    module = Joined()
    data = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=16)
    loaders = {"train_dataloaders": data, "val_dataloaders": data}
    quiet = {"report": False, "verbose": False, "importance": "magnitude"}
    result = prune(module, **loaders, target_sparsity=0.34, tolerance=0.2, search=GridSearch(levels=7), **quiet)
    assert result.applied
    assert module.two.out_features == module.reads_two.in_features == 0
    with torch.no_grad():
        assert module(data.dataset[:]).isfinite().all()
