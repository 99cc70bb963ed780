"""What a model keeps between forwards is given back."""

import pytest
import torch
from torch import nn

from actdump.state import TABLE, State


class Keeps(nn.Module):
    """Holds a table of ones, and how far it reaches."""

    def __init__(self, size=4):
        super().__init__()
        self.register_buffer("table", torch.ones(size))
        self.reach = 16


def replaced(module):
    module.register_buffer("table", torch.zeros(4), persistent=False)
    module.reach = 32


def written(module):
    module.table.zero_()
    module.reach = 32


@pytest.mark.parametrize("change", [replaced, written])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_table_and_what_belongs_to_it_are_given_back(change, mode):
    module = Keeps().eval()
    table, state = module.table, State(nn.Sequential(nn.ReLU(), module))
    for _ in range(2):
        with mode():
            change(module)
            assert state.restored()
        assert module.table is table
        assert module.table.tolist() == [1] * 4
        assert module.reach == 16
    assert not state.restored()


def test_a_table_of_inference_tensors_is_compared_by_its_values():
    with torch.inference_mode():
        module = Keeps().eval()
        state = State(module)
        assert not state.restored()
        written(module)
        assert state.restored()
        assert module.table.tolist() == [1] * 4


def test_the_same_values_written_again_are_no_change():
    module = Keeps().eval()
    state = State(module)
    module.table.fill_(1)
    assert not state.restored()


def test_an_attribute_alone_is_given_back():
    module = Keeps().eval()
    state = State(nn.Sequential(module))
    module.reach = 32
    assert state.restored()
    assert module.reach == 16
    assert not state.restored()


class Plain(nn.Module):
    """Has no buffers."""


def grown(module):
    """As a table that is made for the longest prompt so far."""
    module.cos, module.reach = torch.zeros(4), 32


def noted(module):
    module.notes["seen"], module.lengths[0] = 32, 32
    module.lengths.append(7)


@pytest.mark.parametrize(
    "change",
    [
        grown,
        noted,
        lambda module: module.angles.zero_(),
        lambda module: setattr(module, "new", 1),
        lambda module: delattr(module, "reach"),
        lambda module: module.register_buffer("first", torch.ones(1)),
        lambda module: module.heads.discard(3),
    ],
)
def test_a_module_without_buffers_is_given_back_too(change):
    module = Plain().eval()
    module.cos, module.angles, module.reach = None, torch.ones(4), 16
    module.notes, module.lengths, module.heads = {"a": 1}, [16], {3}
    before = {name: value for name, value in vars(module).items() if name != "angles"}
    contents = [dict(module.notes), list(module.lengths), set(module.heads), dict(module._buffers)]
    state = State(nn.Sequential(module))
    for _ in range(2):
        change(module)
        assert state.restored()
        assert {name: value for name, value in vars(module).items() if name != "angles"} == before
        assert [module.notes, module.lengths, module.heads, module._buffers] == contents
        assert module.angles.tolist() == [1] * 4
        assert not state.restored()


def test_that_transformers_has_put_in_hooks_which_stay_is_not_forgotten():
    module = Plain().eval()
    state = State(nn.Sequential(module))
    module._output_capturing_hooks_installed = True
    assert not state.restored()
    assert module._output_capturing_hooks_installed
    module.reach = 32
    assert state.restored()
    assert not hasattr(module, "reach")
    assert module._output_capturing_hooks_installed


class Proud:
    def __eq__(self, other):
        raise TypeError("incomparable")

    __hash__ = None


def test_what_cannot_be_compared_is_another():
    module = Plain().eval()
    module.cache = first = Proud()
    state = State(module)
    assert not state.restored()
    module.cache = Proud()
    assert state.restored()
    assert module.cache is first


def test_a_large_table_that_is_replaced_is_put_back():
    module = Keeps(TABLE + 1).eval()
    table, state = module.table, State(module)
    replaced(module)
    assert state.restored()
    assert module.table is table
    assert module.reach == 16


def test_a_number_that_is_computed_anew_is_no_change():
    module = Keeps().eval()
    module.scale = 1 / 3
    state = State(module)
    module.scale = float("0.3333333333333333")
    assert not state.restored()


@pytest.mark.parametrize("module", [Keeps().train(), Keeps(TABLE + 1).eval()], ids=["training", "large"])
def test_statistics_in_training_and_large_buffers_are_left_alone(module):
    state = State(module)
    module.table.zero_()
    assert not state.restored()
    assert not module.table.any()
