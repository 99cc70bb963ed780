import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actdump.address import PORTS, Address, Child, Every, Index, Key, Nth, Slice, Some, expand, module_at, parse
from actdump.errors import AddressError
from actdump.tap import Tap, expand_tap, parse_selection

integers = st.integers(-40, 40)
slices = st.builds(Slice, *[st.none() | integers] * 2, st.none() | integers.filter(bool))
names = st.from_regex(r"[A-Za-z_0-9][A-Za-z0-9_\-]*", fullmatch=True)
modules = st.lists(
    st.builds(Child, names | st.sampled_from(PORTS) | st.text(min_size=1))
    | st.builds(Nth, integers)
    | st.builds(Some, slices)
    | st.builds(Every, st.booleans()),
    max_size=5,
).map(tuple)
entries = st.lists(integers | slices | st.just(...), min_size=1, max_size=4).map(tuple)
items = st.lists(
    st.builds(Nth, integers)
    | st.builds(Key, st.text())
    | st.builds(Child, names.filter(lambda name: name not in PORTS))
    | st.builds(Index, entries),
    max_size=4,
).map(tuple)


@given(st.builds(Address, modules, st.sampled_from(PORTS), items))
def test_the_text_of_an_address_is_read_back_as_the_address(address):
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "path", "port", "items"),
    [
        ("transformer.h[-1].output[0]", "transformer.h[-1]", "output", (Nth(0),)),
        ("encoder.layer[0].output.dense.output", "encoder.layer[0].output.dense", "output", ()),
        ("encoder.layer[0].output.output[0]", "encoder.layer[0].output", "output", (Nth(0),)),
        ("encoder.output.input", "encoder.output", "input", ()),
        ("output['input']", "", "output", (Key("input"),)),
        ("output.logits", "", "output", (Child("logits"),)),
        ("h.5.inputs[1]['mask']", "h.5", "inputs", (Nth(1), Key("mask"))),
        ("h[0].output[:, -1]", "h[0]", "output", (Index((Slice(), -1)),)),
        ("h[0].output[..., 2:5]", "h[0]", "output", (Index((..., Slice(2, 5))),)),
        ("h[0].output[3,]", "h[0]", "output", (Index((3,)),)),
        ("  h[ 4 : 8 ].output[ : , 0 ] ", "h[4:8]", "output", (Index((Slice(), 0)),)),
    ],
)
def test_the_port_is_the_last_port_word_outside_brackets(text, path, port, items):
    address = parse(text)
    assert (address.path, address.port, address.items) == (path, port, items)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("transformer.h[0]", "goes on with .output, .input, .outputs or .inputs, as in `transformer.h[0].output`"),
        ("", "names no port"),
        ("h[0.output", "this bracket is not closed, or holds another one, at character 2 (`[0.output`)"),
        ("h..output", "two dots in a row, at character 2"),
        ("h.output.", "nothing follows the dot, at character 9"),
        ("h[0]output", "a name here needs a dot before it"),
        ("h[a].output", "brackets hold a number, a slice such as 4:8, *, or a quoted name, at character 2"),
        ("h['a', 1].output", "a key is one quoted word"),
        (".h.output", "it begins with a dot, and no module stands before that, at character 1"),
        ("h[::0].output", "the step of a slice cannot be 0"),
        ("h.output[*]", "a star stands for modules, so it cannot follow the port"),
        ("h.output['a' 'b'", "this bracket is not closed"),
        ("h.output[x]", "brackets after the port hold a number, a quoted key ['logits'], or a tensor index"),
        ("h.output[len(())]", "brackets after the port hold a number"),
        ("h.output['a', 1]", "a key is one quoted word"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_the_place_and_the_remedy(text, complaint):
    with pytest.raises(AddressError, match=re.escape(complaint)):
        parse(text)


@dataclass
class Node:
    """All that an address needs of a module."""

    _modules: dict = field(default_factory=dict)


def tree():
    blocks = {str(number): Node({"attn": Node(), "output": Node({"dense": Node()})}) for number in range(12)}
    return Node({"transformer": Node({"wte": Node(), "h": Node(blocks)}), "lm_head": Node()})


BLOCKS = [f"transformer.h[{number}]" for number in range(12)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("transformer.h[-1].output[0]", [BLOCKS[11] + ".output[0]"]),
        ("transformer.h.5.output", [BLOCKS[5] + ".output"]),
        ("transformer.h[*].output", [block + ".output" for block in BLOCKS]),
        ("transformer.h.*.attn.input", [block + ".attn.input" for block in BLOCKS]),
        ("transformer.h[4:8].output", [block + ".output" for block in BLOCKS[4:8]]),
        ("transformer.h[::5].output", [block + ".output" for block in BLOCKS[::5]]),
        ("transformer.h[-2:].output.dense.output", [block + ".output.dense.output" for block in BLOCKS[-2:]]),
        ("transformer.h[1::-1].output", [BLOCKS[1] + ".output", BLOCKS[0] + ".output"]),
        ("transformer.h[:2].*.output", [f"{block}.{child}.output" for block in BLOCKS[:2] for child in ("attn", "output")]),
        ("transformer.*.output", ["transformer.wte.output", "transformer.h.output"]),
        ("output.logits", ["output.logits"]),
    ],
)
def test_patterns_and_negatives_become_resolved_addresses_in_the_models_order(text, found):
    assert [str(address) for address in expand(parse(text), tree())] == found


def test_a_resolved_address_leads_to_its_module():
    root = tree()
    (address,) = expand(parse("transformer.h[-3].output.dense.input"), root)
    assert (
        module_at(address, root)
        is root._modules["transformer"]._modules["h"]._modules["9"]._modules["output"]._modules["dense"]
    )
    assert module_at(parse("output"), root) is root


def test_a_module_that_stands_twice_in_a_list_is_counted_twice():
    act = nn.ReLU()
    root = nn.ModuleDict({"h": nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act, nn.Linear(2, 2))})
    for number in range(-5, 5):
        (address,) = expand(parse(f"h[{number}].output"), root)
        assert module_at(address, root) is root["h"][number]
        assert str(address) == f"h[{number % 5}].output"
    assert [module_at(address, root) for address in expand(parse("h[*].output"), root)] == list(root["h"])


def test_a_name_that_is_no_word_is_quoted():
    root = nn.ModuleDict({"d": nn.ModuleDict({"en us": nn.ReLU(), "de": nn.ReLU()})})
    (first, second) = expand(parse("d.*.output"), root)
    assert (str(first), str(second)) == ("d['en us'].output", "d.de.output")
    assert module_at(parse(str(first)), root) is root["d"]["en us"]


def test_a_star_at_the_beginning_stands_for_the_models_own_children():
    root = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    assert list(map(str, expand(parse("*.output"), root))) == ["[0].output", "[1].output"]


def test_an_entry_that_a_model_of_one_does_not_have():
    with pytest.raises(AddressError, match=re.escape("did you mean `[0]`? The model has 1 entry, so there is no [5]")):
        expand(parse("[5].output"), nn.Sequential(nn.ReLU()))


def test_numbers_that_do_not_count_from_0_are_names():
    root = nn.ModuleDict({"h": nn.ModuleDict({"4": nn.ReLU(), "8": nn.Linear(2, 2)})})
    for address, module in zip(expand(parse("h.*.output"), root), root["h"].values(), strict=True):
        assert module_at(parse(str(address)), root) is module
    with pytest.raises(AddressError, match="is not a list"):
        expand(parse("h[0].output"), root)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("transformer.h[12].output", "did you mean `transformer.h[11]`? `transformer.h` has 12 entries, 0 to 11, so there is no [12]"),
        ("transformer.h[-13].output", "did you mean `transformer.h[-12]`?"),
        ("transformer.hh[0].output", "`transformer` (Node) has no child `hh`; did you mean `h`?"),
        ("transfomer.h[0].output", "the model (Node) has no child `transfomer`; did you mean `transformer`?"),
        ("h[0].output", "the model (Node) has no child `h`; did you mean `transformer.h`?"),
        ("transformer.zzzz.output", "`transformer` (Node) has no child `zzzz`; there is wte, h"),
        ("transformer[0].output", "`transformer` (Node) is not a list, so `[0]` cannot follow; it has wte, h"),
        ("lm_head[0].output", "`lm_head` (Node) is not a list, so `[0]` cannot follow; it has no children"),
        ("lm_head.weight.output", "`lm_head` (Node) has no children, so there is no `weight` in it"),
        ("lm_head.*.output", "`lm_head` (Node) has no children, so `.*` picks nothing"),
        ("transformer.h[20:].output", "matches no module: a slice in it picks nothing"),
    ],
)  # fmt: skip
def test_a_wrong_address_names_what_is_there_and_the_nearest_names(text, complaint):
    with pytest.raises(AddressError, match=re.escape(complaint)):
        expand(parse(text), tree())


@pytest.mark.parametrize(
    ("text", "named", "names"),
    [
        ("transformer.h[-1].output", False, ["x"]),
        ("transformer.h[-1].output", True, ["x"]),
        ("transformer.h[:2].output", False, ["transformer.h[0].output", "transformer.h[1].output"]),
        ("transformer.h[:2].output", True, ["x[0]", "x[1]"]),
        ("transformer.h[1:2].*.output", True, ["x[1].attn", "x[1].output"]),
    ],
)
def test_taps_of_a_pattern_are_named_by_what_it_picked(text, named, names):
    taps = expand_tap(Tap("x", parse(text), tokens="last", call=1), tree(), named=named)
    assert [tap.name for tap in taps] == names
    assert {(tap.tokens, tap.call) for tap in taps} == {("last", 1)}


@pytest.mark.parametrize(
    ("value", "selection"),
    [("last", "last"), ([0, -1], (0, -1)), ("2:5", Slice(2, 5)), (" ::2 ", Slice(None, None, 2))],
)
def test_selections_are_words_positions_or_slices(value, selection):
    assert parse_selection(value) == selection


@pytest.mark.parametrize("value", ["lst", "", [], [True], [1.0], 3, None, "1:2:3:4"])
def test_what_selects_no_tokens_is_refused(value):
    with pytest.raises(AddressError, match="use all, first, last, mean, a list of positions"):
        parse_selection(value)


def test_a_slice_that_never_picks_a_token_is_refused():
    with pytest.raises(AddressError, match="never picks a token"):
        parse_selection("5:2")
    assert parse_selection("2:5") == Slice(2, 5)
    assert parse_selection("5:-2") == Slice(5, -2)
    assert parse_selection("-3:2") == Slice(-3, 2)  # of prompts of one to four tokens
