"""Which frozen networks only measure, and which are parts of the network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune.graph import find_yardsticks
from support.masked import Net

pytestmark = pytest.mark.usefixtures("one_thread")


def between(m, x, function):
    """A loss between what a function makes of the output and of the target."""
    return F.mse_loss(function(m.net(x)), function(x))


def with_learned_weights(m, x):
    return m.layer((m.frozen(m.net(x)) - m.frozen(x)).square()).mean()


def with_a_learned_vector(m, x):
    return ((m.frozen(m.net(x)) - m.frozen(x)).square() @ m.vector.abs()).mean()


def weighed_by_a_learned_number(m, x):
    return between(m, x, m.frozen) * m.number.exp()


def with_an_adapter_behind(m, x):
    return F.mse_loss(m.layer(m.frozen(m.net(x))), m.layer(m.frozen(x)))


def prototypes(m, x):
    return (m.frozen(x) @ m.frozen(m.prompts).t()).logsumexp(-1).mean() + m.net(x).mean()


def two_losses_element_by_element(m, x):
    out = m.net(x)
    return ((out - m.frozen(x)).square() + (out - x).square()).mean()


def codes_and_outputs(m, x):
    """A frozen autoencoder, of whose parts one makes targets and the other outputs."""
    return F.mse_loss(m.net(x), m.frozen[0](x)) + F.mse_loss(m.frozen[2](m.net(x)), x)


def summed(m, x):
    return F.mse_loss(m.net(x) + m.frozen(x), x)


def concatenated(m, x):
    return torch.cat([m.net(x), m.frozen(x)], -1).square().mean()


def as_scores(m, x):
    return (m.net(x) @ m.frozen(x).t()).logsumexp(-1).mean()


def in_one_batch(m, x):
    return F.mse_loss(*m.frozen(torch.cat([m.net(x), x])).chunk(2))


def in_one_batch_scaled(m, x):
    return F.mse_loss(*m.frozen(torch.cat([m.net(x), x]) / 2).chunk(2))


def with_a_normed_adapter_behind(m, x):
    """The parameters of the adapter are not its own, but those of modules inside of it."""
    return F.mse_loss(m.net(x), m.normed(m.frozen(x)))


def side_by_side(m, x):
    return m.frozen(torch.cat([m.net(x)[:, :3], x[:, :3]], 1)).mean()


def behind_prompts(m, x):
    return m.frozen(torch.cat([m.prompts, x])).mean() + m.net(x).mean()


LOSS, TEACHER = "a loss network: frozen, and given targets", "a teacher: frozen, and compared"


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda m, x: between(m, x, m.frozen), LOSS),
        (lambda m, x: between(m, x, m.frozen[0]), LOSS),
        (lambda m, x: between(m, x, lambda y: F.linear(y, m.frozen[0].weight)), None),  # whoever reads that
        (lambda m, x: between(m, x, m.functional), LOSS),
        (in_one_batch, LOSS),
        (in_one_batch_scaled, LOSS),
        (side_by_side, None),
        (behind_prompts, None),
        (weighed_by_a_learned_number, LOSS),
        (lambda m, x: F.mse_loss(m.net(x), m.frozen(x)), TEACHER),
        (lambda m, x: F.smooth_l1_loss(m.net(x), m.frozen(x)), TEACHER),
        (lambda m, x: F.huber_loss(m.net(x), m.frozen(x)), TEACHER),
        (lambda m, x: torch.rsub(m.net(x), m.frozen(x)).square().mean(), TEACHER),
        (lambda m, x: (m.net(x).argmax(-1) != m.frozen(x).argmax(-1)).float().mean(), TEACHER),
        (lambda m, x: F.kl_div(m.net(x).log_softmax(-1), m.frozen(x).softmax(-1)), TEACHER),
        (lambda m, x: F.cross_entropy(m.net(x), m.frozen(x).softmax(-1)), TEACHER),
        (lambda m, x: F.cross_entropy(m.net(x), m.frozen(x).argmax(-1)), TEACHER),
        (lambda m, x: F.cross_entropy(m.net(x)[..., None], m.frozen(x).argmax(-1)[:, None]), TEACHER),
        (lambda m, x: F.binary_cross_entropy(m.net(x).sigmoid(), m.frozen(x).sigmoid()), TEACHER),
        (lambda m, x: F.binary_cross_entropy_with_logits(m.net(x), m.frozen(x).sigmoid()), TEACHER),
        (lambda m, x: (m.net(x).argmax(-1) == m.frozen(x).argmax(-1)).float().mean(), TEACHER),
        (lambda m, x: torch.cdist(m.net(x), m.frozen(x)).mean(), TEACHER),
        (two_losses_element_by_element, TEACHER),
        (with_learned_weights, None),
        (with_a_learned_vector, None),
        (with_an_adapter_behind, None),
        (with_a_normed_adapter_behind, None),
        (prototypes, None),
        (codes_and_outputs, None),
        (summed, None),
        (concatenated, None),
        (as_scores, None),
        (lambda m, x: m.net(m.frozen(x)).mean(), None),
        (lambda m, x: m.frozen(m.net(x)).mean(), None),
        (lambda m, x: m.net(x).mean(), None),
    ],
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both the batch size")
def test_what_only_measures_is_told_from_parts_of_the_network(forward, kind):
    class Functional(nn.Module):
        """A layer of its own."""

        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 6), requires_grad=False)

        def forward(self, x):
            return (x @ self.kernel).relu()

    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).requires_grad_(False)
    sizes = {"vector": (6,), "number": (), "prompts": (3, 6)}
    bare = {name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()}
    layers = {"net": nn.Linear(6, 6), "layer": nn.Linear(6, 6), "frozen": frozen, "functional": Functional()}
    layers["normed"] = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6, bias=False))
    model, x = Net(forward, **layers, **bare), torch.randn(5, 6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = find_yardsticks(model, lambda: model(x), {}, trained)
    assert len(found) == (kind is not None)
    assert all(kind in reason and name in ("frozen", "functional") for name, reason in found.items())
    assert find_yardsticks(model, lambda: model(x), {}, ()) == {}  # where nothing is trained, all of it is the network
    assert find_yardsticks(model, lambda: model(x), dict.fromkeys(found, "a metric"), trained) == {}
