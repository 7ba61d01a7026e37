"""The probe finds what only running shows."""

import pytest

from lightning_softprune.surgery import probe_groups
from support import zoo
from support.plans import assert_same, snapshot
from support.zoo import BY_NAME

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_probe_finds_what_only_running_shows_and_undoes_its_cuts():
    model, x = BY_NAME["ConstantView"].make()
    groups = zoo.trace_groups(model, [lambda: model(x)])
    before = snapshot(model)
    traced = {group.name: group.prunable for group in groups}
    probed = {group.name: group for group in probe_groups(model, groups, lambda: model(x))}
    assert traced["body"]
    assert not probed["body"].prunable
    assert probed["body"].reason.startswith("the model does not run with fewer channels: RuntimeError")
    assert probed["inner"].prunable
    assert_same(model, before)
