"""The engine against plain forwards of one unpadded prompt with plain PyTorch hooks."""

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from zoo import VOCABULARY, Ladder, Step, Toy, build

import actdump
import actdump.engine.rows as rows_module
from actdump.address import Slice, parse
from actdump.engine import (
    Fault,
    Measured,
    Site,
    bind,
    capture,
    capture_whole,
    evened,
    feed_for,
    positions,
    probe,
    stream,
    try_out,
)
from actdump.errors import ActdumpError, AddressError, DataError, UsageError
from actdump.plan import Batch, Layout
from actdump.tap import Tap

LENGTHS = (4, 9, 2, 17, 7, 7, 3, 12, 1, 5, 14, 6)
EVEN = (6, 6, 6)
TOLERANCE = 1e-5
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
}


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY - 5, (length,), generator=generator).tolist() for length in lengths]


def tap(text, **options):
    return Tap(text, parse(text), **options)


def probed(model, taps, **options):
    return probe(model, bind(model, taps), feed_for(model), **options)


def captured(model, taps, ids, **options):
    """Each tap's values, one for each prompt, all prompts in one batch."""
    found = probed(model, taps, **options)
    with torch.no_grad():
        caught = capture(model, found.sites, found.feed, Batch(tuple(range(len(ids))), tuple(ids)))
    for rows in caught:
        rows.wait()
    return {rows.site.tap.name: rows.each() for rows in caught}


def first_tensor(value):
    while not isinstance(value, torch.Tensor) and value:
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def alone(model, ids):
    """What every module is given and returns, call by call, in a plain forward of one prompt."""
    seen = {}

    def hook(name):
        def keep(_, args, kwargs, result):
            given = args[0] if args else next(iter(kwargs.values()), None)
            for port, value in (("input", given), ("output", first_tensor(result))):
                seen.setdefault((name, port), []).append(value.clone() if isinstance(value, torch.Tensor) else None)

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()]
    with torch.no_grad():
        model(torch.tensor([ids]), **({"use_cache": False} if hasattr(model, "config") else {}))
    for handle in handles:
        handle.remove()
    return seen


def assert_same(value, expected):
    """The shape of the prompt run alone without the batch axis (flattened rows have none), and its values for each token."""
    assert value.shape in (expected.shape, expected.shape[1:])
    assert value.dtype == expected.dtype
    expected = expected.reshape(value.shape)
    if not value.is_floating_point():
        assert torch.equal(value, expected)
        return
    one, other = (each.double().reshape(each.shape[0] if each.ndim > 1 else 1, -1) for each in (value, expected))
    assert ((one - other).norm(dim=1) <= TOLERANCE * other.norm(dim=1)).all()


@cache
def family(kind):
    """A model, and for each prompt what its modules hold when it runs alone. Nobody changes either."""
    model = build(kind)
    return model, [alone(model, ids) for ids in prompts()]


# ------------------------------------------------------------------------------------------------------ whole families

COVERED = {
    "gpt2": ["transformer.wte.output", "transformer.wpe.output", "transformer.h.1.output", "transformer.h.0.attn.output",
             "transformer.h.1.mlp.output", "transformer.h.1.input", "transformer.ln_f.output", "lm_head.output"],
    "llama": ["model.layers.1.output", "model.layers.0.self_attn.output", "model.layers.0.self_attn.input",
              "model.layers.1.mlp.down_proj.input", "model.rotary_emb.output", "model.norm.output"],
    "opt": ["model.decoder.layers.0.fc1.output", "model.decoder.layers.1.fc2.input", "model.decoder.layers.1.output",
            "model.decoder.embed_positions.output"],
    "bloom": ["transformer.h.1.output", "transformer.h.0.self_attention.output", "transformer.word_embeddings_layernorm.output"],
    "mixtral": ["model.layers.0.mlp.gate.output", "model.layers.1.mlp.gate.input", "model.layers.1.mlp.output"],
    "mamba": ["backbone.layers.0.output", "backbone.layers.1.mixer.output", "backbone.norm_f.output"],
    "bert": ["encoder.layer.1.output", "encoder.layer.0.attention.output", "encoder.layer.1.output.dense.output",
             "pooler.output", "embeddings.output"],
    "albert": ["encoder.albert_layer_groups.0.output", "encoder.albert_layer_groups.0.albert_layers.0.attention.input",
               "encoder.albert_layer_groups.0.albert_layers.0.ffn.output", "pooler.output"],
}  # fmt: skip


@pytest.mark.parametrize("call", [0, -1])
@pytest.mark.parametrize("kind", COVERED)
def test_every_module_of_a_family_gives_the_values_of_the_prompt_alone(kind, call):
    model, singles = family(kind)
    ran = {name: len(calls) for name, calls in singles[0].items() if name[0]}
    taps = [Tap(f"{name}.{port}", parse(f"{name}.{port}"), call=call) for name, port in ran]
    found = probed(model, taps)
    sites = [run for run in found.runs if isinstance(run, Site)]
    assert {site.tap.name for site in sites} >= set(COVERED[kind])
    with torch.no_grad():
        caught = capture(model, sites, found.feed, Batch(tuple(range(len(LENGTHS))), tuple(prompts())))
    assert [rows.site for rows in caught] == sites
    for rows in caught:
        place = tuple(rows.site.tap.name.rsplit(".", 1))
        for value, single in zip(rows.each(), singles, strict=True):
            assert_same(value, single[place][call])


def test_calls_of_a_shared_layer_are_kept_apart():
    model, singles = family("albert")
    address = "encoder.albert_layer_groups[0].albert_layers[0].output"
    kept = captured(model, [Tap(str(call), parse(address), call=call) for call in range(3)], prompts())
    place = ("encoder.albert_layer_groups.0.albert_layers.0", "output")
    for call in range(3):
        for value, single in zip(kept[str(call)], singles, strict=True):
            assert_same(value, single[place][call])
    assert not torch.equal(kept["0"][0], kept["1"][0])


def attention_alone(model, ids):
    weights = []
    handle = model.transformer.h[1].attn.register_forward_hook(lambda _, args, result: weights.append(result[1].clone()))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return weights[0][0]


@pytest.mark.parametrize(
    ("index", "tokens", "select"),
    [
        ("", "all", lambda weights: weights),
        ("", "last", lambda weights: weights[:, -1]),
        ("", "mean", lambda weights: weights.mean(1)),
        ("", (0, -1), lambda weights: weights[:, [0, -1]]),
        ("[..., 0]", "last", lambda weights: weights[:, -1, 0]),
        ("[:, 1][..., 0]", "last", lambda weights: weights[1, -1, 0]),
        ("[..., -1, :]", "all", lambda weights: weights[:, -1]),
    ],
)
def test_attention_weights_have_two_token_axes_and_tokens_selects_queries(index, tokens, select):
    model = build("gpt2", "eager")
    kept = captured(model, [tap(f"transformer.h[1].attn.output[1]{index}", tokens=tokens)], prompts())
    for value, ids in zip(*kept.values(), prompts(), strict=True):
        torch.testing.assert_close(value, select(attention_alone(model, ids)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "masked"), [("gpt2", False), ("llama", False), ("mamba", False), ("bert", True), ("albert", True)]
)
def test_a_mask_is_used_where_padding_shows(kind, masked):
    model, _ = family(kind)
    block = {"gpt2": "transformer.h[1]", "llama": "model.layers[1]", "mamba": "backbone.layers[1]", "bert": "encoder.layer[1]"}
    assert probed(model, [tap(block.get(kind, "encoder") + ".output[0]")]).feed.masked is masked


# --------------------------------------------------------------------------------------- selections, indices and dtypes

SELECTIONS = {
    "all": ("all", lambda hidden: hidden),
    "first": ("first", lambda hidden: hidden[0]),
    "last": ("last", lambda hidden: hidden[-1]),
    "mean": ("mean", lambda hidden: hidden.mean(0)),
    "positions": ((0, -1), lambda hidden: hidden[[0, -1]]),
    "slice": (Slice(1, 5), lambda hidden: hidden[1:5]),
    "tail": (Slice(-3), lambda hidden: hidden[-3:]),
    "stride": (Slice(None, None, 2), lambda hidden: hidden[::2]),
}
PLACES = {"gpt2": "transformer.h[0].output", "opt": "model.decoder.layers[1].fc1.output", "llama": "model.rotary_emb.output[0]"}


@pytest.mark.parametrize("lengths", [LENGTHS, EVEN, (5,), (1,)], ids=["padded", "even", "single", "one token"])
@pytest.mark.parametrize("kind", PLACES)
def test_token_selections_pick_the_prompts_own_tokens(kind, lengths):
    model, _ = family(kind)
    taps = [Tap(name, parse(PLACES[kind]), tokens=tokens) for name, (tokens, _) in SELECTIONS.items()]
    kept = captured(model, taps, prompts(lengths))
    path = PLACES[kind].split(".output")[0].replace("[", ".").replace("]", "")
    for place, ids in enumerate(prompts(lengths)):
        hidden = alone(model, ids)[path, "output"][0]
        hidden = hidden[0] if hidden.ndim == 3 else hidden
        for name, (_, select) in SELECTIONS.items():
            torch.testing.assert_close(kept[name][place], select(hidden), rtol=1e-4, atol=1e-5)


def test_a_selection_falls_to_the_taps_that_name_none_and_have_tokens():
    model, _ = family("bert")
    taps = [tap("encoder.layer[0].output"), tap("embeddings.output", tokens="all"), tap("pooler.output")]
    sites = probed(model, taps, tokens="last").sites
    assert [site.selection for site in sites] == ["last", "all", "all"]
    assert [site.layout.dims for site in sites] == [(16,), (Slice(), 16), (16,)]


@pytest.mark.parametrize("index", ["[:, -1]", "[0, -1]", "[:, 2:5]", "[..., 0]", "[:, :, 2:5]", "[0, -2:, 3]", "[0][-1]"])
def test_a_tensor_index_works_on_the_unpadded_value(index):
    model, singles = family("gpt2")
    kept = captured(model, [tap(f"transformer.h[0].output[0]{index}")], prompts())
    for value, single in zip(*kept.values(), singles, strict=True):
        expected = eval(f"hidden{index}", {"hidden": single["transformer.h.0", "output"][0]})
        expected = expected if index.startswith("[0") else expected[0]
        assert value.shape == expected.shape
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_items_reach_into_structures():
    class Pair(nn.Module):
        def forward(self, hidden):
            return {"states": (hidden, hidden + 1), "more": hidden + 2}

    class Holder(Toy):
        def forward(self, input_ids):
            return self.pair(super().forward(input_ids))["more"]

    model = Holder()
    model.pair = Pair()
    texts = {"pair.output['states'][1]": 1, "pair.output['more']": 2, "pair.outputs[1]['more']": 2, "pair.inputs[0][0]": 0}
    kept = captured(model, list(map(tap, texts)), prompts())
    for text, more in texts.items():
        for value, ids in zip(kept[text], prompts(), strict=True):
            assert torch.equal(value, Ladder().after(0, ids) + more)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_values_are_cast_to_the_storage_type(dtype):
    ladder = Ladder()
    kept = captured(
        ladder, [tap("layers[2].output"), tap("layers[1].output", dtype="float32"), tap("embed.input")], prompts(), dtype=dtype
    )
    for place, ids in enumerate(prompts()):
        assert torch.equal(kept["layers[2].output"][place], ladder.after(2, ids).to(getattr(torch, dtype)))
        assert kept["layers[1].output"][place].dtype == torch.float32
        assert torch.equal(kept["embed.input"][place], torch.tensor(ids))


@pytest.mark.parametrize(("value", "lost"), [(70000.0, True), (65504.0, False), (float("inf"), False)])
def test_only_a_finite_value_that_overflows_the_cast_is_an_error(value, lost):
    model = Toy(lambda hidden: torch.full_like(hidden, value))
    taps = [tap("layers[0].output", dtype="float16", tokens="last")]
    if lost:
        with pytest.raises(DataError, match=r"layers\[0\]\.output: 8 values too large for float16, whose largest is 65504"):
            captured(model, taps, prompts((3, 5)))
    else:
        assert torch.equal(captured(model, taps, prompts((3, 5)))["layers[0].output"][1], torch.full((4,), value).half())


@pytest.mark.parametrize("value", [400.0, -464.0, 464.5, -2752.0, float("inf"), float("nan")])
def test_a_type_without_infinity_is_not_given_what_is_too_large_for_it(value):
    """On some CPUs torch stores its largest value there, on others NaN."""
    model = Toy(lambda hidden: torch.full_like(hidden, value))
    taps = [tap("layers[0].output", dtype="float8_e4m3fn")]
    if abs(value) > 464:
        with pytest.raises(
            DataError, match=r"32 values too large for float8_e4m3fn, whose largest is 448 \(the finite ones reach"
        ):
            captured(model, taps, prompts((3, 5)))
    else:
        kept = captured(model, taps, prompts((3, 5)))["layers[0].output"][1].float()
        assert kept.isnan().all() if value != value else ((kept - value).abs() <= 16).all()


@pytest.mark.parametrize(
    ("selection", "length", "picked"),
    [
        ("all", 3, [0, 1, 2]),
        ("mean", 2, [0, 1]),
        ("first", 3, [0]),
        ("last", 3, [2]),
        ((1, -1), 4, [1, 3]),
        (Slice(-2), 1, [0]),
    ],
)
def test_positions_of_a_selection(selection, length, picked):
    assert list(positions(selection, length)) == picked


def test_a_position_that_a_prompt_lacks_is_an_error():
    with pytest.raises(IndexError):
        positions((2,), 2)


# ------------------------------------------------------------------------------------------- hooks, early stop, copies


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def broken(error):
    def function(hidden):
        raise error

    return function


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt(), DataError("ours")])
def test_every_hook_is_off_after_a_forward_whatever_happens_in_it(error):
    ladder = Ladder()
    ladder.layers[1].register_forward_hook(lambda *_: None)  # somebody else's, which stays
    sites = bind(ladder, [tap("layers[*].output"), tap("layers[*].input")])
    found = probe(ladder, sites, feed_for(ladder))
    assert hooks(ladder) == 1
    batch = Batch((0, 1), tuple(prompts((3, 5))))
    runs = [
        lambda: capture(ladder, found.sites, found.feed, batch),
        lambda: capture_whole(ladder, sites, [torch.tensor([[1, 2]])], {}),
        lambda: probe(ladder, sites, found.feed),
    ]
    if error is not None:
        ladder.layers[3].function = broken(error)
    for run in runs:
        if error is None:
            run()
        else:
            with pytest.raises((type(error), UsageError)):
                run()
        assert hooks(ladder) == 1


def test_a_model_that_cannot_run_on_ids_is_named_by_the_probe():
    model = Toy(broken(ValueError("needs pixels")))
    with pytest.raises(UsageError, match="Toy does not run on token ids alone: ValueError: needs pixels"):
        probed(model, [tap("embed.output")])


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_in_the_probe_is_told_as_such(error):
    with pytest.raises(ActdumpError, match="a forward of 7 tokens: out of memory") as told:
        probed(Toy(broken(error)), [tap("embed.output")])
    assert told.value.code == 1


def test_a_model_without_ids_is_refused():
    with pytest.raises(UsageError, match="Linear takes input, not `input_ids`, so it cannot be run on prompts"):
        feed_for(nn.Linear(2, 2))


@pytest.mark.parametrize("listed", [(2, 0), (0, 2), (2,), (1, 2, 0)])
@pytest.mark.parametrize("port", ["output", "input"])
def test_modules_after_the_last_site_never_run_whatever_the_order(listed, port):
    ladder = Ladder()
    found = probed(ladder, [tap(f"layers[{number}].{port}") for number in listed])
    for layer in ladder.layers:
        layer.ran = 0
    capture(ladder, found.sites, found.feed, Batch((0,), ([3, 4],)))
    assert ladder.ran == [1, 1, int(port == "output"), 0, 0]


@pytest.mark.parametrize("lengths", [EVEN, (2, 5), (4,)], ids=["even", "padded", "single"])
@pytest.mark.parametrize(
    ("index", "options", "picked"),
    [
        ("", {}, lambda value: value),
        ("", {"tokens": "last"}, lambda value: value[-1]),
        ("", {"tokens": (0,)}, lambda value: value[:1]),
        ("[0][:, -2:]", {}, lambda value: value[-2:]),
        ("[0][..., 1:3]", {"tokens": "last"}, lambda value: value[-1, 1:3]),
    ],
)
def test_captured_values_are_copies(lengths, index, options, picked):
    """The model writes into each value later, and the closed form knows what it was."""
    ladder, ids = Ladder(in_place=True), prompts(lengths)
    kept = captured(ladder, [tap(f"layers[{number}].output{index}", **options) for number in range(5)], ids)
    for k, each in enumerate(kept.values()):
        for value, prompt in zip(each, ids, strict=True):
            assert torch.equal(value, picked(ladder.after(k, prompt)))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("lengths", [EVEN, (2, 5)], ids=["even", "padded"])
def test_streamed_rows_are_copies_that_outlive_the_forward(lengths, dtype):
    ladder, ids, taken = Ladder(in_place=True), prompts(lengths), []
    found = probed(ladder, [tap(f"layers[{number}].output") for number in range(5)], dtype=dtype)
    with torch.no_grad():
        assert stream(ladder, found.sites, found.feed, Batch(tuple(range(len(ids))), tuple(ids)), taken.append)
    for k, rows in enumerate(taken):
        for value, each in zip(rows.each(), ids, strict=True):
            assert torch.equal(value, Ladder().after(k, each).to(value.dtype))


@pytest.mark.parametrize("lengths", [EVEN, (2, 5), (4,)], ids=["even", "padded", "single"])
def test_captured_values_without_tokens_are_copies(lengths):
    model, ids = Toy(lambda hidden: hidden[:, 0].clone(), lambda first: first.add_(1)), prompts(lengths)
    kept = captured(model, [tap("layers[*].output")], ids)
    for place, each in enumerate(ids):
        first = Ladder().after(0, each)[0]
        assert torch.equal(kept["layers[0].output"][place], first)
        assert torch.equal(kept["layers[1].output"][place], first + 1)


def test_the_ladder_is_captured_in_closed_form():
    ladder = Ladder()
    kept = captured(ladder, [tap("layers[*].output")], prompts())
    for k in range(5):
        for value, ids in zip(kept[f"layers[{k}].output"], prompts(), strict=True):
            assert torch.equal(value, ladder.after(k, ids))


def test_whole_values_keep_every_axis_and_are_copies():
    ladder = Ladder(in_place=True)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    sites = bind(ladder, [tap("layers[0].output"), tap("layers[2].output[0][:, -1]"), tap("layers[1].inputs")])
    (first, indexed, inputs), calls = capture_whole(ladder, sites, [ids], {"attention_mask": None})
    expected = torch.stack([ladder.after(2, row.tolist()) for row in ids])
    assert torch.equal(first, expected - 3)
    assert torch.equal(indexed, expected[:, -1])
    assert torch.equal(inputs[0][0], expected - 3)
    assert (inputs[1], calls) == ({}, [1, 1, 1])


# --------------------------------------------------------------------------------------------------------------- faults


def toy_taking(function):
    return lambda: Toy(function)


def sometimes():
    model = Ladder(2)
    model.layers[1].forward = lambda hidden: hidden
    model.aside = Step(lambda hidden: hidden)
    return model


def by_prompt():
    """Its layer runs once for each prompt of the batch."""
    model = Toy(lambda hidden: hidden)
    model.each = Step(lambda hidden: hidden)
    model.layers[0].function = lambda hidden: torch.stack([model.each(row) for row in hidden])
    return model


FAULTS = {
    "never ran": (sometimes, "aside.output", {}, "`aside` (Step) never ran in a forward; its parent may use its parameters"),
    "several times": (lambda: build("albert"), "encoder.albert_layer_groups[0].output", {},
                      "runs 3 times in one forward; say which with `call`: 0 to 2, or -1 for the last"),
    "no such call": (Ladder, "layers[0].output", {"call": 1}, "runs once in one forward, so there is no call 1"),
    "calls by prompt": (by_prompt, "each.output", {}, "ran once for one prompt and 4 times for several"),
    "none": (lambda: build("llama"), "model.layers[0].self_attn.output[1]", {},
             "it is None; the port held a tuple of 2 (a tensor (1, 7, 16), None). Attention weights exist only with"),
    "[1] of a bare tensor": (Ladder, "layers[0].output[1]", {},
                             "there is no [1]: the port held a tensor (1, 7, 4), which counts as a tuple of one"),
    "[5] of a tuple": (lambda: build("gpt2"), "transformer.h[0].attn.output[5]", {}, "`[5]` leads nowhere: the port held a tuple of 2"),
    "no tensor": (Ladder, "layers[0].outputs[1]", {}, "it is a dict of , not a tensor; add an item that picks one"),
    "key of a tensor": (Ladder, "layers[0].output['logits']", {}, "`['logits']` cannot follow a tensor"),
    "tokens and more": (toy_taking(lambda hidden: nn.functional.pad(hidden, (0, 0, 0, 3))), "layers[0].output", {},
                        "axis 1 cannot be attributed: the shape is (1, 10, 4) for 1 prompt of 7 tokens and (4, 15, 4) for 4 prompts of 12"),
    "token pairs": (toy_taking(lambda hidden: hidden.repeat(1, 2, 1)), "layers[0].output", {}, "axis 1 cannot be attributed"),
    "number of axes": (toy_taking(lambda hidden: hidden.squeeze(0)), "layers[0].output", {}, "its number of axes depends on the input"),
    "rows by value": (lambda: build("mixtral"), "model.layers[0].mlp.experts.act_fn.output", {}, "axis 0 cannot be attributed"),
    "neighbours": (toy_taking(lambda hidden: hidden - hidden.mean(0)), "layers[0].output", {}, "is not the value of the prompt run alone"),
    "order": (toy_taking(lambda hidden: hidden.flip(0)), "layers[0].output", {}, "run such prompts one by one (in a spec: `batch:"),
    "tokens ahead": (toy_taking(lambda hidden: hidden.flip(1)), "layers[0].output", {}, "is not the value of the prompt run alone"),
    "no token axis": (lambda: build("bert"), "pooler.output", {"tokens": "last"}, "it has no token axis to select from: (batch, 16)"),
    "a query picked, a key selected": (lambda: build("llama", "eager"), "model.layers[0].self_attn.output[1][:, :, -1]",
                                       {"tokens": "last"}, "picks a position on one token axis and `tokens` would select on another"),
    "mean of integers": (lambda: build("olmoe"), "model.layers[0].mlp.gate.output[2]", {"tokens": "mean"}, "int64, which has no mean"),
    "sliced twice": (Ladder, "layers[0].output[0][:, 1:]", {"tokens": "last"}, "the address slices the tokens already"),
    "integers": (Ladder, "embed.input", {"dtype": "float16"}, "it is int64; `dtype` is for floating point numbers"),
    "complex": (toy_taking(lambda hidden: hidden.to(torch.complex64)), "layers[0].output", {}, "which safetensors files cannot hold"),
    "batch index": (Ladder, "layers[0].output[0][1]", {}, "[1] is outside an axis of size 1 (the batch axis of one prompt is 1)"),
    "outside": (Ladder, "layers[0].output[0][..., 4]", {}, "[4] is outside an axis of size 4"),
    "backwards": (Ladder, "layers[0].output[0][:, ::-1]", {}, "steps backwards, which tensors cannot do"),
    "too many": (Ladder, "layers[0].output[0][0, 0, 0, 0]", {}, "the tensor index has too many entries for the shape (batch, token, 4)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_tap_that_cannot_be_captured_is_a_fault_before_any_work(name):
    make, text, options, reason = FAULTS[name]
    found = probed(make(), [tap(text, **options)])
    (fault,) = found.runs
    assert isinstance(fault, Fault)
    assert re.search(re.escape(reason), str(fault))
    with pytest.raises(AddressError, match=re.escape(str(fault))):
        _ = found.sites


def test_a_model_that_replaces_its_modules_in_a_forward_is_refused():
    """BigBird does at its first short prompt, for good: its long prompts are not computed as they would be alone."""
    model = AutoModel.from_config(AutoConfig.for_model("big_bird", attention_type="block_sparse", block_size=4, **SIZES)).eval()
    with pytest.raises(UsageError, match=r"^BigBirdModel replaces modules of its own in a forward \(`encoder.*original_full"):
        probed(model, [tap("encoder.layer[0].output")])


def test_a_fault_leaves_the_other_sites_alone():
    found = probed(Ladder(), [tap("layers[0].output[1]"), tap("layers[1].output"), tap("layers[2].output['x']")])
    assert Counter(map(type, found.runs)) == {Fault: 2, Site: 1}
    with pytest.raises(AddressError, match=r"(?s)layers\[0\]\.output\[1\]: .*\nlayers\[2\]\.output\['x'\]: "):
        _ = found.sites


def test_the_probe_runs_to_the_end_only_to_count_calls():
    """What follows the last site runs for the two shapes, and not again where only values are compared."""
    ladder = Ladder()
    ran = Counter()
    for place, layer in enumerate(ladder.layers):
        layer.register_forward_pre_hook(lambda _, __, place=place: ran.update([place]))
    probed(ladder, [tap("layers[1].output"), tap("layers[0].output")])
    assert (ran[0], ran[1]) == (3, 3)
    assert {ran[place] for place in range(2, len(ladder.layers))} == {2}


def test_a_shape_that_the_probe_did_not_promise_is_an_error():
    model = Ladder()
    found = probed(model, [tap("layers[1].output")])
    model.layers[1].function = lambda hidden: hidden[:, 1:]
    with pytest.raises(
        DataError, match=re.escape("the probe found (batch, token, 4), but for 2 prompts of 5 tokens it is a tensor (2, 4, 4)")
    ):
        capture(model, found.sites, found.feed, Batch((0, 1), tuple(prompts((3, 5)))))


def test_a_module_that_stops_running_is_an_error():
    model = by_prompt()
    model.layers[0].function = lambda hidden: model.each(hidden)
    found = probed(model, [tap("each.output")])
    model.layers[0].function = lambda hidden: hidden
    with pytest.raises(DataError, match=r"each\.output: its module ran not once in this forward, and once in the probe"):
        capture(model, found.sites, found.feed, Batch((0,), ([1, 2],)))


def by_length():
    """A toy whose second layer runs once for every begun 16 tokens: in the probes once."""
    model = Toy(None, lambda hidden: hidden + 1, lambda hidden: hidden)

    def chunked(hidden):
        for _ in range(hidden.shape[1] // 16):
            hidden = model.layers[1](hidden)
        return hidden

    model.layers[0].function = chunked
    return model


@pytest.mark.parametrize("call", [-1, None])
def test_a_module_that_runs_more_often_for_a_longer_prompt_is_an_error(call):
    model = by_length()
    found = probed(model, [tap("layers[1].output", call=call), tap("layers[2].output")])
    short, long = (Batch((0,), tuple(prompts((length,)))) for length in (15, 20))
    assert capture(model, found.sites, found.feed, short)[0].each()[0].shape == (15, 4)
    with pytest.raises(DataError, match="ran 2 times for prompts of 20 tokens and once in the probe"):
        capture(model, found.sites, found.feed, long)


def test_a_call_counted_from_the_first_is_the_same_however_many_there_are():
    model, (ids,) = by_length(), prompts((20,))
    values = captured(model, [tap("layers[1].output", call=0), tap("layers[2].output")], [ids])
    assert torch.equal(values["layers[1].output"][0], model.embed(torch.tensor(ids)) + 1)


def test_the_last_call_is_waited_for():
    model = by_length()
    found = probed(model, [tap("layers[1].output", call=-1)])
    with pytest.raises(DataError, match="ran 2 times for prompts of 20 tokens"):
        capture(model, found.sites, found.feed, Batch((0,), tuple(prompts((20,)))))


def test_what_holds_no_values_is_refused():
    model = Toy(lambda hidden: hidden, lambda hidden: hidden[..., :0])
    with pytest.raises(AddressError, match=re.escape("layers[1].output: it holds no values: (batch, token, 0)")):
        _ = probed(model, [tap("layers[1].output")]).sites


def test_a_slice_that_leaves_nothing_of_an_axis_is_refused():
    model = Toy(lambda hidden: hidden)
    with pytest.raises(AddressError, match=re.escape("the slice 600: leaves nothing of an axis of size 4")):
        _ = probed(model, [tap("layers[0].output[..., 600:]")]).sites


def test_a_structure_that_is_another_than_in_the_probe_is_an_error():
    model = Toy(lambda hidden: hidden)
    found = probed(model, [tap("layers[0].output")])
    model.layers[0].function = lambda hidden: hidden[:, :0].tolist()
    with pytest.raises(DataError, match=re.escape("layers[0].output: the probe found (batch, token, 4)")):
        capture(model, found.sites, found.feed, Batch((0,), ([1, 2],)))
    model = Toy(lambda hidden: (hidden, hidden))
    found = probed(model, [tap("layers[0].output[1]")])
    model.layers[0].function = lambda hidden: (hidden,)
    with pytest.raises(DataError, match=r"in this forward, unlike in the probe, .* leads nowhere"):
        capture(model, found.sites, found.feed, Batch((0,), ([1, 2],)))


def test_a_long_prompt_is_tried_out_as_far_as_the_last_tap():
    model = Toy(lambda hidden: hidden, lambda hidden: hidden)
    found = probed(model, [tap("layers[0].output")])
    model.layers[1].function = lambda hidden: 1 / 0
    try_out(model, found.sites, found.feed, 30)
    model.layers[0].function = lambda hidden: 1 / 0
    with pytest.raises(UsageError, match="does not run on token ids alone: ZeroDivisionError"):
        try_out(model, found.sites, found.feed, 30)


def test_what_the_probe_gives_as_nan_proves_nothing_and_gets_the_mask():
    def function(hidden):
        return hidden * torch.where(hidden.sum() > 0, float("nan"), 1.0)

    assert probed(Toy(function), [tap("layers[0].output")]).feed.masked
    assert not probed(Toy(lambda hidden: hidden), [tap("layers[0].output")]).feed.masked


def test_a_default_device_changes_nothing():
    ladder, ids = Ladder(), prompts()
    with torch.device("meta"):
        values = captured(ladder, [tap("layers[2].output", tokens="last"), tap("layers[3].output")], ids)
    for one, last, every in zip(ids, *values.values(), strict=True):
        assert torch.equal(every, ladder.after(3, one))
        assert torch.equal(last, ladder.after(2, one)[-1])


def reading_pad():
    """Models that are given no mask make one of the pad id; and one that does not."""
    torch.manual_seed(0)
    return {
        "dpr": (
            AutoModel.from_config(AutoConfig.for_model("dpr", pad_token_id=1, initializer_range=0.3, **SIZES)).eval(),
            True,
        ),
        "xlm": (
            AutoModel.from_config(
                AutoConfig.for_model(
                    "xlm", emb_dim=16, n_layers=2, n_heads=2, vocab_size=VOCABULARY, pad_token_id=1, pad_index=1
                )
            ).eval(),
            True,
        ),
        "roberta": (build("roberta"), False),
    }


@pytest.mark.parametrize("name", reading_pad())
def test_the_pad_id_among_the_tokens_of_a_prompt(name):
    model, reads = reading_pad()[name]
    ids = [[5, 1, 7, 8], [9, 10, 11, 12, 13, 14, 15], [16, 17, 1, 1, 1], [18]]
    path = next(path for path, module in model.named_modules() if re.search(r"(layer\.1\.output|ffns\.1)$", path))
    found = probed(model, [tap(f"{path}.output")])
    assert (found.feed.masked, found.feed.reads_pad) == (True, reads)
    values = captured(model, [tap(f"{path}.output")], ids)[f"{path}.output"]
    for one, value in zip(ids, values, strict=True):
        assert_same(value, alone(model, one)[path, "output"][0])


class Trimming(Toy):
    """Takes pad ids at the end of its rows for padding where it is given no mask, and then looks at all the rest."""

    config = SimpleNamespace(pad_token_id=1)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = (input_ids != 1).long().flip(1).cumsum(1).flip(1) > 0
        hidden = super().forward(input_ids)
        return hidden + (hidden * attention_mask[..., None]).sum(1, keepdim=True)


def test_the_pad_id_at_the_end_of_a_prompt():
    model, ids = Trimming(), [[5, 7, 1], [9, 10, 11, 12, 1, 1], [3], [4, 2]]
    values = captured(model, [tap("output")], ids)["output"]
    for one, value in zip(ids, values, strict=True):
        assert torch.equal(value, model(torch.tensor([one]))[0])


@dataclass
class Outcome:
    hidden: torch.Tensor


class Accumulating(Toy):
    """Hands its hidden states from block to block in a dataclass, and each block writes into them."""

    def __init__(self):
        super().__init__(*[lambda outcome: Outcome(outcome.hidden.mul_(2))] * 3)

    def forward(self, input_ids):
        outcome = Outcome(self.embed(input_ids))
        for layer in self.layers:
            outcome = layer(outcome)
        return outcome.hidden


def test_what_a_dataclass_holds_is_copied_too():
    model, ids = Accumulating(), prompts()
    values = captured(model, [tap("layers[0].output.hidden"), tap("layers[2].output.hidden")], ids)
    for one, first, last in zip(ids, *values.values(), strict=True):
        assert torch.equal(first, model.embed(torch.tensor(one)) * 2)
        assert torch.equal(last, model.embed(torch.tensor(one)) * 8)
    traced = actdump.wrap(model)
    with traced.trace(ids[0]):
        outcome = traced.layers[0].output.save()
    assert torch.equal(outcome.hidden[0], model.embed(torch.tensor(ids[0])) * 2)


# ---------------------------------------------------------------------------------------------------- binding and sites


def test_all_wrong_addresses_are_told_at_once():
    with pytest.raises(AddressError) as caught:
        bind(Ladder(), [tap("layers[9].output"), tap("embed.output"), tap("head.output"), tap("embed.output")])
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["layers[9].output", "head.output", "embed.output"]
    assert "two taps would have this name" in lines[2]


def test_a_pattern_gives_sites_in_the_models_order_and_keeps_the_users_spelling_elsewhere():
    sites = bind(Ladder(3), [tap("layers[*].output"), tap("layers[-1].input")])
    assert [site.tap.name for site in sites] == [f"layers[{k}].output" for k in range(3)] + ["layers[-1].input"]
    assert [(site.spelled, str(site.tap.address)) for site in sites[-2:]] == [
        ("layers[2].output", "layers[2].output"),
        ("layers[-1].input", "layers[2].input"),
    ]


@pytest.mark.parametrize(
    ("kind", "text", "axes", "layout"),
    [
        ("gpt2", "transformer.h[0].output", ["batch", "token", "16"], Layout((Slice(), 16), "float32")),
        ("gpt2", "transformer.wpe.output", ["1", "token", "16"], Layout((Slice(), 16), "float32")),
        ("opt", "model.decoder.layers[0].fc1.output", ["batch*token", "24"], Layout((Slice(), 24), "float32")),
        ("bert", "pooler.output", ["batch", "16"], Layout((16,), "float32")),
        ("llama", "model.rotary_emb.output[1]", ["1", "token", "8"], Layout((Slice(), 8), "float32")),
        ("mixtral", "model.layers[0].mlp.gate.output[2]", ["batch*token", "2"], Layout((Slice(), 2), "int64")),
    ],
)
def test_the_probe_labels_axes(kind, text, axes, layout):
    model, _ = family(kind)
    (site,) = probed(model, [tap(text)]).sites
    assert list(site.column.axes) == axes
    assert site.layout == layout
    assert site.column.resolved == text
    assert site.calls == 1


def test_rows_on_a_gpu_are_copied_when_they_are_computed_and_read_when_they_are_copied(monkeypatch):
    """The order of what is asked of CUDA, on a machine without; where there is one, tests/test_zoo.py reads what came of it."""
    ladder, did = Ladder(), []
    found = probed(ladder, [tap("layers[1].output")])

    class Event:
        def __init__(self, blocking):
            assert blocking  # a thread that spins takes a core from the forwards

        def record(self, stream):
            did.append("recorded")

        def synchronize(self):
            did.append("waited")

    def pinned(values):
        did.append("copied")
        return torch.empty_like(values)

    def landed(measured, values):
        did.append("read")
        return measured

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "another stream")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(rows_module, "_pinned", pinned)
    monkeypatch.setattr(Measured, "landed", landed)
    kept = []
    with torch.no_grad():
        assert stream(ladder, found.sites, found.feed, Batch((0,), tuple(prompts((4,)))), kept.append)
    (rows,) = kept
    values = rows.values
    rows.ready = rows_module._event("the usual stream")
    for _ in range(2):  # a second wait finds them there
        rows.wait()
    assert did == ["recorded", "waited", "copied", "recorded", "waited", "read"]
    assert torch.equal(rows.values, values)
    assert rows.values is not values


def test_rows_are_streamed_while_the_forward_goes_on():
    """A sink gets the rows of a module before the next module runs, measured, and as copies."""
    ladder, ids = Ladder(), prompts((4, 9, 2))
    found = probed(ladder, [tap("layers[1].output"), tap("layers[2].output", dtype="bfloat16"), tap("embed.input")])
    order, kept = [], {}
    handle = ladder.layers[2].register_forward_pre_hook(lambda _, args: order.append("layers[2] runs"))

    def sink(rows):
        rows.wait()
        order.append(rows.site.tap.name)
        kept[rows.site.tap.name] = rows

    with torch.no_grad():
        assert stream(ladder, found.sites, found.feed, Batch((0, 1, 2), tuple(ids)), sink)
    handle.remove()
    assert order == ["embed.input", "layers[1].output", "layers[2] runs", "layers[2].output"]
    expected = torch.cat([ladder.after(1, each) for each in ids])
    assert torch.equal(kept["layers[1].output"].values, expected)
    assert bytes(kept["layers[1].output"].buffer()) == expected.numpy().tobytes()
    assert kept["layers[1].output"].measured.statistics().rows == 15
    assert kept["layers[2].output"].values.dtype == torch.bfloat16
    assert kept["embed.input"].measured is None  # integers


def test_a_batch_falls_into_batches_without_padding():
    ids = prompts((9, 7, 7, 7, 2, 2))
    cut = list(evened(Batch((5, 0, 3, 1, 4, 2), tuple(ids))))
    assert [batch.numbers for batch in cut] == [(5,), (0, 3, 1), (4, 2)]
    assert [each for batch in cut for each in batch.ids] == ids
