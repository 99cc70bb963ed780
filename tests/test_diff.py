"""Two dumps compared: figures known beforehand, places named, and what cannot be compared said."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import actdump
from actdump import diff, job
from actdump.cli import app
from actdump.diff import Limits, tally
from actdump.reader import dump as dump_module
from actdump.spec import Spec

CONFIG = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
LENGTHS = (3, 1, 7, 4, 9, 2, 5)
PROMPTS = [
    {"id": f"id {place}", "input_ids": [(place * 5 + token) % 40 for token in range(length)]}
    for place, length in enumerate(LENGTHS)
]
SAVE = {
    "block": "transformer.h[-1].output[0]",
    "ends": {"address": "transformer.h[0].output[0]", "tokens": [0, -1]},
    "last": {"address": "transformer.h[0].output[0]", "tokens": "last"},
    "mean": {"address": "transformer.h[0].output[0]", "tokens": "mean"},
    "slice": {"address": "transformer.h[0].output[0]", "tokens": "2:5"},
    "weights": "transformer.h[1].attn.output[1]",
    "integers": "transformer.wte.input",
}


def make_dump(root: Path, **other) -> Path:
    spec = {
        "model": {"config": CONFIG, "attn_implementation": "eager"},
        "prompts": PROMPTS,
        "save": SAVE,
        "shard": {"tokens": 12},
        "batch": {"prompts": 1},  # so that, with one thread, order and shards change no bit
        "audit": 0,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    job.run(Spec.model_validate(spec | other), root)
    torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dump(tmp_path_factory.mktemp("dump") / "out")


@pytest.fixture
def copy(root, tmp_path) -> Path:
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy"


def edit(root: Path, tap: str, change, shards=None) -> None:
    """Change a tap's tensor in the shards of a dump."""
    for path in sorted(root.glob("shards/*.safetensors"))[slice(None) if shards is None else shards]:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            about = file.metadata()
        tensors[tap] = change(tensors[tap].clone())
        save_file(tensors, path, about)


def put(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def compare(one: Path, other: Path, **limits) -> diff.Comparison:
    return diff.compare(actdump.open(one), actdump.open(other), Limits(**limits))


def tap(comparison: diff.Comparison, name: str) -> diff.Difference:
    (found,) = [each for each in comparison.taps if each.name == name]
    return found


# ------------------------------------------------------------------------------------------------------------------ figures


def test_a_dump_is_the_same_as_itself(root, copy):
    found = compare(root, copy)
    assert found.faults == []
    assert found.prompts == 7
    assert [each.name for each in found.taps] == list(SAVE)
    for each in found.taps[:-1]:
        figures = (each.largest, each.mean, each.median, each.high, each.worst, each.cosine, each.mean_cosine)
        assert figures == (0, 0, 0, 0, 0, 1, 1)
        assert (each.beyond, each.differing, each.nonfinite, each.first) == (0, 0, 0, None)
    assert tap(found, "block").tokens == sum(LENGTHS)
    assert tap(found, "ends").tokens == 14
    assert tap(found, "mean").tokens == 7
    assert tap(found, "weights").values == sum(4 * length**2 for length in LENGTHS)


def test_one_value_is_found_with_its_place_and_size(root, copy):
    """The second shard holds prompt 3 alone; its token 2 begins at row 2."""
    before = actdump.open(root)["block"]["id 3"][2]
    edit(copy, "block", put((2, 5), 100.0), slice(1, 2))
    found = tap(compare(root, copy), "block")
    off = 100.0 - before[5].item()
    assert found.first == diff.Parting("id 3", 2, (2, 5), (before[5].item(), 100.0))
    assert (found.tokens, found.values, found.beyond, found.differing) == (31, 31 * 16, 1, 1)
    assert found.largest == pytest.approx(off)
    assert found.mean == pytest.approx(off / (31 * 16))
    assert (found.median, found.high) == (0, found.worst)
    after = before.clone()
    after[5] = 100.0
    assert found.worst == pytest.approx(off / after.double().norm().item())
    cosine = torch.cosine_similarity(before.double(), after.double(), dim=0).item()
    assert found.cosine == pytest.approx(cosine)
    assert found.mean_cosine == pytest.approx((30 + cosine) / 31)
    assert [tap(compare(root, copy), name).beyond for name in SAVE if name != "block"] == [0] * 6


def test_figures_are_those_of_all_tokens_at_once(root, copy, monkeypatch):
    """Against plain arithmetic on the whole tap; and a few values at a time as all at once."""
    torch.manual_seed(0)
    edit(copy, "block", lambda tensor: tensor + 10 ** torch.empty(len(tensor), 1).uniform_(-6, 0) * torch.randn_like(tensor))
    found = tap(compare(root, copy), "block")
    one, other = (actdump.open(each)["block"].rows[:].double() for each in (root, copy))
    error = (one - other).norm(dim=1) / torch.maximum(one.norm(dim=1), other.norm(dim=1))
    ordered = error.sort().values
    assert found.largest == pytest.approx((one - other).abs().max().item())
    assert found.mean == pytest.approx((one - other).abs().mean().item())
    assert found.median == pytest.approx(ordered[15].item(), rel=0.01)
    assert found.high == pytest.approx(ordered[30].item(), rel=0.01)
    assert found.worst == pytest.approx(ordered[30].item())
    cosine = torch.cosine_similarity(one, other)
    assert (found.cosine, found.mean_cosine) == pytest.approx((cosine.min().item(), cosine.mean().item()))
    monkeypatch.setattr(tally, "PIECE", 40)
    monkeypatch.setattr(dump_module, "KEPT", 1)
    pieces = tap(compare(root, copy), "block")
    assert pieces.first == found.first
    assert (pieces.median, pieces.largest, pieces.beyond) == (found.median, found.largest, found.beyond)
    assert (pieces.mean, pieces.mean_cosine) == pytest.approx((found.mean, found.mean_cosine))


def test_the_limits_excuse_a_token_by_its_values_or_by_its_norm(root, copy):
    edit(copy, "block", lambda tensor: tensor * 1.01)
    largest = tap(compare(root, copy), "block").largest
    assert tap(compare(root, copy), "block").worst == pytest.approx(0.01 / 1.01, rel=1e-4)
    for limits, same in [
        ({"rtol": 0.0101}, True),
        ({"rtol": 0.0098}, False),
        ({"atol": largest * 1.001}, True),
        ({"atol": largest * 0.999}, False),
        ({"atol": largest * 0.999, "rtol": 0.0101}, True),
    ]:
        assert (compare(root, copy, **limits).faults == []) == same, limits


def test_nan_equals_nan_in_the_same_place_only(root, copy, tmp_path):
    for value in (math.nan, math.inf):
        edit(copy, "block", put((0, 0), value), slice(0, 1))
        shutil.rmtree(tmp_path / "twin", ignore_errors=True)
        shutil.copytree(copy, tmp_path / "twin")
        assert compare(copy, tmp_path / "twin").faults == []
        found = compare(root, copy, rtol=2.0, atol=1e9)
        (each,) = [each for each in found.taps if each.beyond]
        assert (each.nonfinite, each.beyond, each.worst) == (1, 1, 2.0)
        assert math.isfinite(each.largest)
        assert each.first is not None
        assert each.first.values[1] == str(value)
        json.dumps(diff.to_json(found), allow_nan=False)


def test_a_vector_of_zeros_and_one_the_other_way(root, copy):
    edit(copy, "last", lambda tensor: -tensor)
    edit(copy, "mean", lambda tensor: 0 * tensor)
    found = compare(root, copy)
    assert (tap(found, "last").cosine, tap(found, "last").worst) == pytest.approx((-1, 2))
    assert (tap(found, "mean").cosine, tap(found, "mean").worst) == pytest.approx((0, 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn"])
def test_other_types_are_compared_in_their_own_values(dtype, root, tmp_path):
    other = make_dump(tmp_path / "out", dtype=dtype)
    found = compare(root, other)
    each = tap(found, "block")
    assert each.dtypes == ("float32", dtype)
    one, two = (actdump.open(folder)["block"].rows[:].double() for folder in (root, other))
    assert each.largest == (one - two).abs().max().item()
    assert (each.largest == 0) == (dtype == "float64")
    assert compare(root, other, rtol=0.1).faults == []
    assert compare(other, other).faults == []


def test_integers_are_equal_or_not(root, copy):
    edit(copy, "integers", put(1, 39), slice(1, 2))
    each = tap(compare(root, copy, atol=100, rtol=100), "integers")
    assert (each.beyond, each.differing, each.values, each.largest, each.cosine) == (1, 1, 31, None, None)
    assert each.first == diff.Parting("id 3", 1, (1,), (16.0, 39.0))


# ------------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("name", "place", "first"),
    [
        ("ends", (1, 1, 4), ("id 1", 0, (1, 4))),  # one token, taken twice
        ("last", (2, 3), ("id 2", 6, (3,))),
        ("mean", (0, 3), ("id 0", None, (3,))),
        ("slice", (1, 3), ("id 2", 2, (0, 3))),  # row 0 is of prompt 0, which has one token from the third on
        ("weights", 4 * 9 + 4 + 7 * 7 + 7 * 2 + 1, ("id 2", 2, (1, 2, 1))),  # head 1, from token 2 to token 1
        ("integers", 3, ("id 1", 0, (0,))),
    ],
)
def test_the_place_is_that_in_the_prompts_own_value(name, place, first, root, copy):
    edit(copy, name, put(place, 39), slice(0, 1))
    found = compare(root, copy)
    (each,) = [each for each in found.taps if each.beyond]
    assert each.first is not None
    assert (each.first.prompt, each.first.token, each.first.index) == first
    assert each.first.values[0] == actdump.open(root)[name][first[0]][first[2]].item()
    assert f"{name}: 1 of {each.tokens} tokens are beyond the limits; first at prompt `{first[0]}`" in found.faults[0]


def test_the_first_place_is_the_first_beyond_the_limits(root, copy):
    edit(copy, "block", lambda tensor: tensor + 0.001)
    edit(copy, "block", put((1, 7), 50.0), slice(2, 3))
    assert tap(compare(root, copy), "block").first.prompt == "id 0"
    first = tap(compare(root, copy, atol=0.01), "block").first
    assert (first.prompt, first.token, first.index) == ("id 4", 1, (1, 7))


# -------------------------------------------------------------------------------------------------------- what is not the same


def test_prompts_are_matched_by_id(root, tmp_path):
    """In another order, and in other shards."""
    turned = make_dump(tmp_path / "out", prompts=PROMPTS[::-1], shard={"tokens": 15})
    found = compare(root, turned)
    assert found.faults == []
    assert (found.prompts, tap(found, "block").tokens) == (7, 31)


def test_missing_prompts_and_other_tokens_are_told(root, tmp_path):
    changed = [*PROMPTS[2:], {"id": "new", "input_ids": [1]}]
    changed[0] = {"id": "id 2", "input_ids": [9] * 7}
    found = compare(root, make_dump(tmp_path / "out", prompts=changed))
    assert found.prompts == 4
    assert found.faults == [
        "2 prompts (id 0, id 1): in the first dump only",
        "1 prompt (new): in the second dump only",
        "1 prompt (id 2): other tokens, so not compared",
    ]


def test_many_prompts_are_counted(root, tmp_path):
    renamed = [{**prompt, "id": f"other {place}"} for place, prompt in enumerate(PROMPTS)]
    found = compare(root, make_dump(tmp_path / "out", prompts=renamed))
    assert found.faults[0] == "7 prompts (id 0, id 1, id 2, id 3, id 4 and 2 more): in the first dump only"
    assert tap(found, "block").median is None


def test_taps_that_cannot_be_compared_are_told(root, tmp_path):
    save = {
        "block": {"address": "transformer.h[-1].output[0]", "tokens": "last"},
        "mean": {"address": "transformer.h[0].mlp.c_fc.output", "tokens": "mean"},
        "last": SAVE["last"],
        "more": "transformer.ln_f.output",
    }
    found = compare(root, make_dump(tmp_path / "out", save=save))
    assert found.faults == [
        "ends, slice, weights, integers: in the first dump only",
        "more: in the second dump only",
        "block: not compared: the tokens are `all` and `last`",
        "mean: not compared: a prompt gives (16,) and (64,)",
    ]
    assert [each.name for each in found.taps] == ["last"]


# -------------------------------------------------------------------------------------------------------------- the command


def command(*words, code: int):
    result = CliRunner().invoke(app, ["diff", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_says_what_is_so_and_ends_with_0_or_65(root, copy):
    said = command(root, copy, code=0)
    assert "block" in said.stdout
    assert "the same within atol 0 or rtol 0: 7 prompts, 7 taps" in said.stdout
    edit(copy, "block", lambda tensor: tensor * 1.01)
    said = command(root, copy, code=65)
    assert said.stderr.startswith(
        "error: block: 31 of 31 tokens are beyond the limits; first at prompt `id 0`, token 0, [0, 0]: "
    )
    assert "0.0099" in said.stdout
    assert command(root, copy, "--rtol", "0.011", code=0).stderr == ""


def test_one_name_for_two_places_is_told(root, tmp_path):
    """And their values are compared."""
    other = make_dump(tmp_path / "out", save={"block": "transformer.h[0].output[0]"})
    said = command(root, other, code=65)
    assert "transformer.h[1].output[0] / transformer.h[0].output[0]" in said.stdout
    assert "ends, last, mean, slice and 2 more: in the first dump only" in said.stderr


def test_the_command_as_json(root, copy):
    assert json.loads(command(root, copy, "--json", code=0).stdout)["same"] is True
    edit(copy, "block", lambda tensor: tensor * 1.01)
    found = json.loads(command(root, copy, "--json", "--atol", "1e-9", code=65).stdout)
    assert (found["same"], found["prompts"], found["limits"]) == (False, 7, {"atol": 1e-9, "rtol": 0.0})
    assert found["taps"][0]["first"]["prompt"] == "id 0"


def test_mistakes(root, tmp_path):
    assert "no such folder" in command(root, tmp_path / "nowhere", code=66).stderr
    assert "holds no dump" in command(tmp_path, root, code=66).stderr
    command(root, root, "--rtol", "-1", code=2)
    command(root, root, "--atol", "nan", code=2)
    command(root, code=2)


def test_chosen_tokens_of_attention_and_of_a_table_are_counted_along_the_query(tmp_path):
    llama = {"model_type": "llama", "vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    save = {
        "scores": {"address": "model.layers[0].self_attn.output[1]", "tokens": [0, -1]},
        "table": {"address": "model.rotary_emb.output[0]", "tokens": [-1]},
    }
    for theta in (1e4, 1e5):
        config = {**llama, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        job.run(
            Spec.model_validate({
                "model": {"config": config, "attn_implementation": "eager"}, "save": save,
                "prompts": [{"input_ids": list(range(3, 3 + length))} for length in (6, 3, 8)],
            }),
            tmp_path / str(theta),
        )  # fmt: skip
    found = compare(tmp_path / "10000.0", tmp_path / "100000.0")
    assert (tap(found, "scores").tokens, tap(found, "table").tokens) == (6, 3)
    assert any("scores: " in fault and "token 5" in fault for fault in found.faults)
