"""Statistics against numpy over all values at once, and against what a finished dump holds."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from zoo import DEVICE, VOCABULARY, Toy

import actdump
from actdump import job
from actdump.address import Slice
from actdump.cli import app
from actdump.engine.measure import Early, Measured, measure
from actdump.errors import DataError
from actdump.format import Folder, shard_from_json
from actdump.plan import Layout
from actdump.spec import Spec
from actdump.statistics import POSITIONS, Statistics, merged, statistics_from_json, statistics_to_json

LAYOUT = Layout((Slice(), 4), "float32")
FLAT = Layout((2, Slice(), Slice()), "float32")


def rows(lengths, seed=0):
    """Values of three orders of magnitude, with an offset that a careless sum of squares would drown in."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 4, generator=generator) * 10 ** torch.randint(-1, 2, (4,), generator=generator) + 7


def measured(values, lengths, layout=LAYOUT):
    """The statistics of one batch, measured where `device: auto` computes."""
    early = None if layout.flat else Early(np.concatenate([np.arange(length) for length in lengths]))
    there = values.to(DEVICE)
    return measure(there, there, layout, early).landed(values).statistics()


def expected(values, lengths):
    """The same from all values at once, in float64."""
    exact = values.double().numpy()
    norms = np.linalg.norm(exact, axis=1)
    places = np.concatenate([np.arange(length) for length in lengths])
    early = [norms[places == place] for place in range(POSITIONS)]
    return exact.mean(), exact.std(), norms.mean(), np.abs(exact).max(), [each.mean() for each in early if len(each)]


@pytest.mark.parametrize("cut", [[(5, 1, 12, 3)], [(5,), (1, 12), (3,)], [(5,), (1,), (12,), (3,)]], ids=str)
def test_batches_together_give_the_statistics_of_all_values(cut):
    lengths = [length for batch in cut for length in batch]
    values = rows(lengths)
    batches = torch.split(values, [sum(batch) for batch in cut])
    found = merged([measured(each, batch) for each, batch in zip(batches, cut, strict=True)])
    mean, std, norm, largest, early = expected(values, lengths)
    assert (found.rows, found.values, found.nonfinite) == (21, 84, 0)
    assert [found.mean, found.std, found.norm, found.largest] == pytest.approx([mean, std, norm, largest], rel=1e-5)
    assert found.rows_by_position == (4, 3, 3, 2, 2, 1, 1, 1)
    assert found.norm_by_position == pytest.approx(early, rel=1e-5)


def test_non_finite_values_are_counted_and_left_out():
    values = rows((6,))
    values[2, 1], values[2, 3], values[5, 0] = math.nan, math.inf, -math.inf
    found = measured(values, (6,))
    sound = values[values.isfinite()].double()
    assert (found.values, found.nonfinite) == (24, 3)
    assert found.mean == pytest.approx(sound.mean().item())
    assert found.std == pytest.approx(sound.std(correction=0).item())
    assert found.largest == sound.abs().max().item()
    norms = values.double().norm(dim=1)
    assert found.rows_nonfinite == 2
    assert found.norm == pytest.approx(norms[[0, 1, 3, 4]].mean().item())  # a row that is not finite has none
    assert found.rows_by_position == (1, 1, 0, 1, 1, 0, 0, 0)
    assert found.norm_by_position == pytest.approx([*norms[:2].tolist(), 0, *norms[3:5].tolist(), 0, 0, 0])
    sound = measured(values[:2], (2,))
    assert merged([found, sound]).norm == pytest.approx(norms[[0, 1, 3, 4, 0, 1]].mean().item())
    assert merged([found, sound]).norm_by_position == pytest.approx(found.norm_by_position)
    nothing = measured(torch.full((2, 4), math.nan), (2,))
    assert (nothing.norm, nothing.rows_nonfinite, nothing.rows_by_position[:2]) == (0.0, 2, (0, 0))
    assert merged([nothing, sound]).norm == pytest.approx(norms[:2].mean().item())


@pytest.mark.parametrize("odd", [math.nan, -math.inf, 1e30], ids=str)
def test_what_an_accelerator_could_not_tell_is_counted_where_the_rows_land(odd):
    """There a norm is not finite, and nobody asks why until the rows are on the CPU."""
    values = rows((6,))
    values[4, 2] = odd
    early = Early(np.arange(6))
    norms, none = torch.linalg.vector_norm(values, dim=1), torch.zeros(())
    found = Measured(LAYOUT, early, (6, 4), norms, torch.stack([values.sum(), values.abs().max(), none, none, none]))
    assert not norms.isfinite().all()
    assert found.landed(values).statistics() == measure(values, values, LAYOUT, early).statistics()
    assert found.landed(values).nonfinite == (not math.isfinite(odd))


def test_values_whose_squares_overflow_are_finite_all_the_same():
    found = measured(torch.full((2, 4), -1e30), (2,))
    assert (found.nonfinite, found.largest) == (0, pytest.approx(1e30))
    assert [found.mean, found.norm] == pytest.approx([-1e30, 2e30])


@pytest.mark.parametrize("signs", [(1, 1), (1, -1)], ids=str)
def test_what_float64_does_not_hold_is_null_in_json(signs):
    """As of the mask of a float64 model, whose entries are the type's least."""
    values = torch.zeros(2, 4, dtype=torch.float64)
    values[:, 1:] = torch.finfo(torch.float64).min
    seen = {"a": merged([measured(sign * values, (2,)) for sign in signs])}
    text = json.dumps(statistics_to_json(seen), allow_nan=False)
    there = statistics_from_json(json.loads(text))["a"]
    assert (there.largest, there.nonfinite, there.norm) == (torch.finfo(torch.float64).max, 0, None)
    assert math.isnan(there.mean)
    assert math.isnan(there.std)
    assert [*map(math.isnan, there.norm_by_position)] == [True, True, *[False] * 6]
    assert json.dumps(statistics_to_json({"a": merged([there, there])}), allow_nan=False)
    apart = merged([measured(torch.full((2, 4), sign * 1e200, dtype=torch.float64), (2,)) for sign in signs])
    assert json.dumps(statistics_to_json({"a": apart}), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("centre", "deviation"), [(1000, 0.01), (-100, 0.01), (1, 0.001), (5, 0)])
def test_a_deviation_that_is_small_beside_the_mean(centre, deviation, dtype):
    values = (centre + deviation * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(
        dtype
    )
    true = values.double().std(correction=0).item()
    assert measured(values, (50,)).std == pytest.approx(true, rel=1e-6, abs=1e-9)
    halves = merged([measured(values[:25], (25,)), measured(values[25:], (25,))])
    assert halves.std == pytest.approx(true, rel=1e-2, abs=1e-6)


def test_bare_elements_have_no_norm():
    found = measured(torch.arange(18.0), (3,), FLAT)
    assert (found.rows, found.values, found.norm, found.rows_by_position) == (18, 18, None, ())
    assert [found.mean, found.std] == pytest.approx([8.5, np.arange(18).std()])


def test_a_prompt_that_a_slice_takes_nothing_from(tmp_path):
    rows = [{"input_ids": [3]}, {"input_ids": [4]}]
    job.run(spec(prompts=rows, save={"rest": {"address": SAVE["block"], "tokens": "1:"}}), tmp_path / "out")
    found = actdump.open(tmp_path / "out").manifest.statistics["rest"]
    assert (found.rows, found.rows_by_position) == (0, (0,) * POSITIONS)


def test_show_says_where_no_prompt_has_a_row(tmp_path):
    """The last tokens of prompts of two and four tokens are tokens 1 and 3."""
    rows = [{"input_ids": [3, 4]}, {"input_ids": [5, 6, 7, 8]}]
    job.run(spec(prompts=rows, save={"last": {"address": SAVE["block"], "tokens": "last"}}), tmp_path / "out")
    norms = [f"{value.float().norm():.4g}" for value in actdump.open(tmp_path / "out")["last"]]
    said = CliRunner().invoke(app, ["show", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert said.output.splitlines()[-1].split()[-4:] == ["-", norms[0], "-", norms[1]]


def test_no_rows_at_all():
    found = measured(torch.empty(0, 4), (0,))
    assert (found.rows, found.values, found.mean, found.largest) == (0, 0, 0.0, 0.0)
    assert merged([found, measured(rows((3,)), (3,))]) == merged([measured(rows((3,)), (3,))])


def test_json_and_back():
    there = {"a": measured(rows((3, 9)), (3, 9)), "b": measured(torch.ones(18), (3,), FLAT)}
    assert statistics_from_json(json.loads(json.dumps(statistics_to_json(there)))) == there


# ---------------------------------------------------------------------------------------------------------- of a finished dump

CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
SAVE = {
    "block": "transformer.h[0].output[0]",
    "rounded": {"address": "transformer.h[1].output[0]", "dtype": "bfloat16"},
    "ends": {"address": "transformer.h[0].mlp.output", "tokens": [0, 2, -1]},
    "last": {"address": "transformer.h[0].mlp.output", "tokens": "last"},
    "mean": {"address": "transformer.h[0].mlp.output", "tokens": "mean"},
    "weights": "transformer.h[1].attn.output[1]",
    "ids": "transformer.wte.input",
}
PROMPTS = [{"input_ids": [1 + (7 * place + step) % 50 for step in range(3 + place)]} for place in range(12)]


def spec(**options):
    model = {"config": {**CONFIG, "attn_implementation": "eager"}}
    return Spec.model_validate({"model": model, "prompts": PROMPTS, "save": SAVE, "shard": {"tokens": 40}, **options})


def test_manifest_and_records_describe_what_the_files_hold(tmp_path):
    job.run(spec(), tmp_path / "out")
    dump = actdump.open(tmp_path / "out")
    found = dump.manifest.statistics
    assert set(found) == set(SAVE) - {"ids"}
    for name, each in found.items():
        stored = dump[name].rows[:].double()
        assert (each.rows, each.values, each.nonfinite) == (len(stored), stored.numel(), 0)
        assert [each.mean, each.std] == pytest.approx(
            [stored.mean().item(), stored.std(correction=0).item()], rel=1e-4, abs=1e-8
        )
        assert each.largest == stored.abs().max().item()
        if name != "weights":
            assert each.norm == pytest.approx(stored.flatten(1).norm(dim=1).mean().item(), rel=1e-5)
    first = torch.stack([value[0] for value in dump["block"]]).double().norm(dim=1)
    assert found["block"].norm_by_position[0] == pytest.approx(first.mean().item(), rel=1e-5)
    assert found["block"].rows_by_position == (12, 12, 12, 11, 10, 9, 8, 7)
    assert found["last"].rows_by_position == (0, 0, 1, 1, 1, 1, 1, 1)
    assert found["ends"].rows_by_position == found["mean"].rows_by_position == ()
    records = [
        shard_from_json(json.loads(Folder(dump.folder.root).record(each.number).read_bytes())) for each in dump.manifest.shards
    ]
    assert len(records) > 1
    assert merged([record.statistics["block"] for record in records]) == found["block"]


@pytest.fixture
def faulty(monkeypatch):
    """A model that makes token id 40 into NaN in its first block."""
    from actdump import model

    real = model.load

    def load(source):
        module = real(source)
        with torch.no_grad():
            module.transformer.wte.weight[40] = math.nan
        return module

    monkeypatch.setattr(model, "load", load)


def test_values_that_the_model_made_non_finite_are_reported(faulty, tmp_path, caplog):
    rows = [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 40, 7, 8]}]
    job.run(spec(prompts=rows, save={"block": SAVE["block"]}), tmp_path / "out")
    dump = actdump.open(tmp_path / "out")
    assert dump.manifest.statistics["block"].nonfinite == 4 * 16  # 0 times NaN is NaN in attention
    assert dump["block"][1].isnan().sum() == 4 * 16
    assert "block: 64 of 112 values are NaN or infinite; the model itself made them so" in caplog.text


def test_values_that_the_model_made_non_finite_stop_the_run_if_asked(faulty, tmp_path):
    rows = [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 40, 7, 8]}]
    wanted = spec(prompts=rows, save={"block": SAVE["block"]}, nonfinite="error")
    with pytest.raises(
        DataError, match="block: the model itself made 64 values NaN or infinite in one batch, some of them for prompt 1"
    ):
        job.run(wanted, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_dump_with_values_that_are_not_finite_is_no_answer_to_a_spec_that_forbids_them(faulty, tmp_path):
    """Whether they were reported in the whole of it, or in the parts that are done."""
    rows = [{"input_ids": [6, 40, 7, 8]}, {"input_ids": [3, 4, 5]}]
    given = {"prompts": rows, "save": {"block": SAVE["block"]}, "shard": {"tokens": 4}}
    job.run(spec(**given), tmp_path / "out")
    said = r"out: holds values that are NaN or infinite, made with `nonfinite: report`: block \(64\); keep them with it"
    for do in (job.run, job.explain):
        with pytest.raises(DataError, match=said):
            do(spec(**given, nonfinite="error"), tmp_path / "out")
    for name in ("manifest.json", "shards/00001.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(DataError, match=said):
        job.run(spec(**given, nonfinite="error"), tmp_path / "out")
    assert not (tmp_path / "out/shards/00001.json").exists()  # before anything is computed
    assert job.run(spec(**given), tmp_path / "out").state == "done"


def test_a_toy_has_the_statistics_that_its_closed_form_says():
    """A row is (id, id + 1, id + 2, id + 3) everywhere, so all can be told by hand."""
    values = Toy().embed(torch.tensor([0, 10]))
    found = measured(values.detach(), (2,))
    assert found == Statistics(2, 8, 0, 6.5, pytest.approx(5.1234754), pytest.approx((14**0.5 + 534**0.5) / 2), 13.0,
                               (1, 1, 0, 0, 0, 0, 0, 0), pytest.approx((14**0.5, 534**0.5, 0, 0, 0, 0, 0, 0)))  # fmt: skip
