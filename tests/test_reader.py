"""Reading a dump: names, prompts, rows across shards, and faults that are found."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors
import torch
from needs import need_model

import actdump
from actdump import job, verify
from actdump.errors import DataError, MissingError, UsageError
from actdump.reader import dump as dump_module
from actdump.spec import Spec

CONFIG = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
LENGTHS = (3, 1, 7, 4, 9, 2, 5)
IDS = [[(place * 5 + token) % 40 for token in range(length)] for place, length in enumerate(LENGTHS)]
SAVE = {
    "last block": "transformer.h[-1].output[0]",
    "pooled": {"address": "transformer.h[0].output[0]", "tokens": "mean"},
    "ends": {"address": "transformer.h.0.mlp.output", "tokens": [0, -1]},
    "weights": "transformer.h[1].attn.output[1]",
}


def make_dump(root, *, overwrite=False, **other):
    prompts = [{"input_ids": ids, "id": f"id {place}"} for place, ids in enumerate(IDS)]
    prompts[2] |= {"label": "third", "score": [1, 2.5]}
    spec = {
        "model": {"config": CONFIG, "attn_implementation": "eager"},
        "prompts": prompts,
        "save": SAVE,
        "shard": {"tokens": 12},
    }
    job.run(Spec.model_validate(spec | other), root, overwrite=overwrite)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dump(tmp_path_factory.mktemp("dump") / "out")


@pytest.fixture
def dump(root):
    return actdump.open(root)


@pytest.fixture
def damaged(tmp_path, root):
    """A copy of the dump, to be damaged."""
    for path in root.rglob("*"):
        if path.is_file():
            target = tmp_path / "out" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert verify.faults(actdump.open(tmp_path / "out")) == []
    return tmp_path / "out"


def test_there_are_several_shards(dump):
    assert [shard.prompts for shard in dump.manifest.shards] == [3, 1, 2, 1]


# ------------------------------------------------------------------------------------------------------------------ names


def test_a_tap_answers_to_its_name_and_its_address_written_or_resolved(dump):
    assert dump.names == list(dump) == list(SAVE)
    assert len(dump) == len(SAVE) and len(dump.prompts) == 7
    for name, spellings in {
        "last block": ["transformer.h[-1].output[0]", "transformer.h[1].output[0]"],
        "ends": ["transformer.h.0.mlp.output", "transformer.h[0].mlp.output"],
    }.items():
        for spelling in spellings:
            assert torch.equal(dump[spelling][4], dump[name][4])
            assert dump[spelling].column.name == name
    with pytest.raises(UsageError, match=r"no tap `last blok`; did you mean `last block`"):
        dump["last blok"]


@pytest.mark.parametrize("name", ["layer", "layer[-1]", "layer[2]"])
def test_a_group_of_taps_is_told_by_its_ends(name, dump, monkeypatch):
    monkeypatch.setattr(dump, "names", ["layer[0]", "layer[1]", "ends"])
    with pytest.raises(UsageError, match=r"there are `layer\[0\]` to `layer\[1\]`"):
        dump[name]


def test_an_address_in_a_list_is_its_own_name(tmp_path):
    root = make_dump(tmp_path / "out", save=["transformer.h[-1].output[0]", "transformer.h[*].mlp.output"])
    dump = actdump.open(root)
    assert dump.names == ["transformer.h[-1].output[0]", "transformer.h[0].mlp.output", "transformer.h[1].mlp.output"]
    assert torch.equal(dump["transformer.h[1].output[0]"][0], dump["transformer.h[-1].output[0]"][0])


def test_an_address_of_two_taps_names_neither(tmp_path):
    address = "transformer.h[0].output[0]"
    save = {"one": {"address": address, "tokens": "last"}, "two": {"address": address, "tokens": "first"}}
    dump = actdump.open(make_dump(tmp_path / "out", save=save))
    assert dump["one"][4].shape == dump["two"][4].shape == (16,)
    with pytest.raises(UsageError, match="several taps are at"):
        dump[address]


def test_statistics_stand_in_the_order_of_the_taps(tmp_path):
    save = {"late": "transformer.h[1].output", "early": "transformer.h[0].output", "inner": "transformer.h[0].mlp.output"}
    dump = actdump.open(make_dump(tmp_path / "out", save=save))
    assert list(dump.manifest.statistics) == list(dump) == list(save)


# ---------------------------------------------------------------------------------------------------------------- prompts


def test_values_by_number_id_and_slice(dump):
    values = dump["last block"]
    assert len(values) == 7
    assert [tuple(value.shape) for value in values] == [(length, 16) for length in LENGTHS]
    assert torch.equal(values[-1], values[6])
    assert torch.equal(values["id 4"], values[4])
    for cut in (slice(1, 5), slice(None, None, 2), slice(-2, None), slice(None, None, -1), slice(5, 2)):
        assert [value.tolist() for value in values[cut]] == [values[number].tolist() for number in range(7)[cut]]
    assert dump.prompts[5:2:-1] == [dump.prompts[number] for number in (5, 4, 3)]
    for number in (np.int64(2), torch.tensor(2)):
        assert torch.equal(values[number], values[2])
        assert torch.equal(values.rows[number], values.rows[2])
        assert dump.prompts[number] == dump.prompts[2]
    assert values[0].dtype == torch.float32
    assert "last block" in repr(values)
    assert "tokens, 16" in repr(values)


def test_each_selection_has_its_shape(dump):
    assert [tuple(value.shape) for value in dump["pooled"]] == [(16,)] * 7
    assert [tuple(value.shape) for value in dump["ends"]] == [(2, 16)] * 7


@pytest.mark.parametrize("number", [7, -8, 100])
def test_a_prompt_that_is_not_there(number, dump):
    with pytest.raises(IndexError, match=f"no prompt {number}; the dump has 7"):
        dump["last block"][number]
    with pytest.raises(IndexError, match=f"no prompt {number}; the dump has 7"):
        dump.prompts[number]
    with pytest.raises(UsageError, match="no prompt with the id `id 44`; did you mean `id 4`"):
        dump["last block"]["id 44"]


def test_prompts_have_ids_tokens_and_fields(dump):
    assert len(dump.prompts) == 7
    assert [prompt.tokens for prompt in dump.prompts] == IDS
    assert [prompt.id for prompt in dump.prompts] == [f"id {number}" for number in range(7)]
    assert [prompt.number for prompt in dump.prompts] == list(range(7))
    assert dump.prompts["id 2"].fields == {"label": "third", "score": [1, 2.5]}
    assert dump.prompts[-5] == dump.prompts[2]
    assert dump.prompts[0].fields == {}


def test_text_and_numbers_as_ids(tmp_path):
    folder = need_model("all-MiniLM-L6-v2")
    spec = {"model": str(folder), "prompts": ["Grüße, 東京", "b"], "save": ["pooler.output"]}
    job.run(Spec.model_validate(spec), tmp_path / "out")
    dump = actdump.open(str(tmp_path / "out"))
    assert dump.prompts[0].content == {"text": "Grüße, 東京"}
    assert dump.prompts["1"].number == 1


# ------------------------------------------------------------------------------------------------------------------- rows


def test_rows_run_across_prompts_and_shards(dump):
    values = dump["last block"]
    rows = values.rows
    whole = torch.cat(list(values))
    assert rows.shape == (sum(LENGTHS), 16)
    assert len(rows) == 31
    assert torch.equal(rows[:], whole)
    border = dump.manifest.shards[0].rows["last block"]
    assert border == 11
    for cut in (
        slice(border - 2, border + 6),
        slice(border, border),
        slice(1, 30, 3),
        slice(None, None, 30),
        slice(-4, None),
        slice(0, 2),
        slice(40, 50),
        slice(9, 3),
    ):
        assert torch.equal(rows[cut], whole[cut]), cut
        assert rows[cut].dtype == torch.float32
        assert rows[cut].untyped_storage().nbytes() == rows[cut].nbytes, "rows in between are kept"
    assert torch.equal(rows[border], whole[border])
    assert torch.equal(rows[-1], whole[-1])
    with pytest.raises(IndexError, match="no row 31"):
        rows[31]
    with pytest.raises(ValueError, match="backwards"):
        rows[::-1]


def test_rows_of_one_value_a_prompt(dump):
    rows = dump["pooled"].rows
    assert rows.shape == (7, 16)
    assert torch.equal(rows[2:5], torch.stack(dump["pooled"][2:5]))


def test_attention_weights_come_back_in_their_shape(dump):
    for number, length in enumerate(LENGTHS):
        weights = dump["weights"][number]
        assert weights.shape == (4, length, length)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, length))
        assert torch.equal(weights, weights.tril())
    assert dump["weights"].rows.shape == (sum(4 * length**2 for length in LENGTHS),)


def test_a_dump_that_was_read_goes_to_other_processes(dump):
    """As to those of a data loader."""
    values = dump["last block"]
    first = values[0]
    assert torch.equal(pickle.loads(pickle.dumps(values))[0], first)
    assert pickle.loads(pickle.dumps(dump)).prompts[3] == dump.prompts[3]


@pytest.fixture
def mapped(monkeypatch):
    """The shards that were mapped into memory, in order."""
    seen, mapping = [], safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, framework: seen.append(path.stem) or mapping(path, framework))
    return seen


def test_reading_is_lazy(dump, mapped):
    dump["last block"][0]
    assert mapped == ["00000"]
    dump["last block"].rows[12:13]
    assert mapped == ["00000", "00001"]
    dump["last block"][0]
    assert mapped == ["00000", "00001"]


def test_few_shards_stay_mapped_however_many_threads_read(dump, root, monkeypatch, mapped):
    monkeypatch.setattr(dump_module, "KEPT", 1)
    few = actdump.open(root)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda turn: few["last block"][turn % len(LENGTHS)], range(200)))
    assert all(torch.equal(value, dump["last block"][turn % len(LENGTHS)]) for turn, value in enumerate(found))
    few["last block"][0], few["last block"][-1]
    mapped.clear()
    few["last block"][-1]
    assert mapped == []
    few["last block"][0]
    assert mapped == ["00000"]


def test_a_value_is_the_callers_own(dump, root):
    """Writing into it changes neither the dump nor what is read next."""
    for read in (lambda: dump["last block"][0], lambda: dump["last block"].rows[0:3], lambda: dump["last block"].rows[0:3:2]):
        kept = read().clone()
        read().fill_(1000)
        assert torch.equal(read(), kept)
    assert verify.faults(actdump.open(root)) == []


def test_opening_reads_no_shard(damaged):
    for path in damaged.glob("shards/*"):
        path.unlink()
    dump = actdump.open(damaged)
    assert dump.names == list(SAVE)
    assert dump.manifest.prompts == 7
    with pytest.raises(DataError, match=r"00000\.safetensors: the shard is missing"):
        dump["pooled"][0]


def test_a_dump_made_anew_is_not_mixed_with_the_one_that_was_opened(damaged):
    """What was mapped before is the old dump's; nothing of the new one comes between."""
    dump = actdump.open(damaged)
    first = dump["last block"][0]
    others = [{"input_ids": [number % 7 + 1 for number in ids], "id": f"other {place}"} for place, ids in enumerate(IDS)]
    make_dump(damaged, prompts=others, overwrite=True)
    assert torch.equal(dump["last block"][0], first)
    with pytest.raises(DataError, match=r"shards/\d+\.safetensors: a shard of another dump.* Open it again"):
        dump["last block"][6]
    with pytest.raises(DataError, match=r"prompts\.jsonl: damaged"):
        dump.prompts[0]
    assert len(actdump.open(damaged)["last block"][6]) == LENGTHS[6]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_rows_in_any_order(kind, dump):
    for name in ("last block", "weights", "pooled"):
        rows = dump[name].rows
        numbers = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        assert torch.equal(rows[kind([*numbers, 0, -1])], torch.cat([rows[:][numbers], rows[:1], rows[-1:]]))
    assert dump["last block"].rows[kind([5])].shape == (1, 16)
    assert len(dump["last block"].rows[torch.zeros(0, dtype=torch.long)]) == 0
    with pytest.raises(IndexError, match="there is no row 31; the tap has 31"):
        dump["last block"].rows[kind([0, 31])]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_rows_by_a_mask(kind, dump):
    rows = dump["last block"].rows
    wanted = [place % 3 == 0 for place in range(len(rows))]
    assert torch.equal(rows[kind(wanted)], rows[::3])
    with pytest.raises(IndexError, match="there are 31 rows, and the mask has 2 entries"):
        rows[kind([True, False])]
    assert repr(rows) == "Rows('last block': (31, 16), float32)"


@pytest.mark.parametrize("name", ["last block", "pooled", "ends", "weights"])
def test_a_row_knows_its_prompt(name, dump):
    values = dump[name]
    for row in range(len(values.rows)):
        number, place = values.rows.where(row)
        assert torch.equal(values[number].reshape(-1, *values.rows.shape[1:])[place], values.rows[row])
    assert values.rows.where(-1)[0] == len(dump.prompts) - 1


def test_in_says_what_indexing_finds(dump):
    for name in ("last block", "transformer.h[1].output[0]", "transformer.h[-1].output[0]"):
        assert dump[name] is not None
        assert name in dump
    assert "first block" not in dump
    assert all(key in dump.prompts for key in ("id 0", 0, -7, 6))
    assert not any(key in dump.prompts for key in ("6", "third", 7, -8, None, True))


def test_an_id_that_is_a_number_is_text(tmp_path):
    prompts = [{"input_ids": ids, "id": place + 1} for place, ids in enumerate(IDS)]
    dump = actdump.open(make_dump(tmp_path / "out", prompts=prompts))
    assert dump.prompts["7"].number == 6
    with pytest.raises(IndexError, match=r'there is no prompt 7; the dump has 7, from 0 \(an id is text: "7"\)'):
        dump["pooled"][7]


def test_a_dump_opened_by_a_relative_path_is_read_from_another_folder_too(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root.parent)
    dump = actdump.open(root.name)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(dump["last block"][2], actdump.open(root)["last block"][2])
    assert dump.prompts[2].id == "id 2"


def test_prompts_that_are_gone_are_told(damaged):
    (damaged / "prompts.jsonl").unlink()
    dump = actdump.open(damaged)
    assert dump["pooled"][0] is not None
    for look in (lambda: dump.prompts[0], lambda: dump["pooled"]["0"], lambda: list(dump.prompts)):
        with pytest.raises(DataError, match=r"prompts\.jsonl: No such file or directory; `actdump run --repair`"):
            look()


# ------------------------------------------------------------------------------------------------------- what is no dump


def test_no_dump(tmp_path, root):
    with pytest.raises(MissingError, match="no such folder"):
        actdump.open(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="holds no dump"):
        actdump.open(tmp_path)
    (tmp_path / "plan.json").write_bytes((root / "plan.json").read_bytes())
    with pytest.raises(MissingError, match="not finished"):
        actdump.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 2}', '{"format": 99}'])
def test_a_manifest_that_is_none(content, damaged):
    (damaged / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: (not a manifest|this is format 99)"):
        actdump.open(damaged)


# ------------------------------------------------------------------------------------------------------------------ verify


def test_a_whole_dump_has_no_faults(dump):
    assert verify.faults(dump) == []


@pytest.mark.parametrize("place", ["header", "first", "middle", "last"])
def test_a_flipped_bit_is_found(place, damaged):
    path = damaged / "shards/00001.safetensors"
    content = bytearray(path.read_bytes())
    content[{"header": 20, "first": len(content) // 3, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    path.write_bytes(content)
    (fault,) = verify.faults(actdump.open(damaged))
    assert "00001.safetensors: the bytes changed" in fault


def test_a_flipped_bit_in_the_prompts_is_found(damaged):
    path = damaged / "prompts.jsonl"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (fault,) = verify.faults(actdump.open(damaged))
    assert "prompts.jsonl: the bytes changed" in fault


def test_a_cut_shard_a_missing_shard_and_a_missing_record_are_found(damaged):
    os.truncate(damaged / "shards/00000.safetensors", 100)
    (damaged / "shards/00001.safetensors").unlink()
    (damaged / "shards/00002.json").unlink()
    (damaged / "prompts.jsonl").write_text("")
    faults = verify.faults(actdump.open(damaged))
    assert len(faults) == 4
    assert "00000.safetensors: 100 bytes, but it had" in faults[0]
    assert "00001.safetensors: missing" in faults[1]
    assert "00002.json: missing" in faults[2]
    assert "prompts.jsonl: 0 bytes, but it had" in faults[3]
    with pytest.raises(DataError, match=r"00000\.safetensors: not a whole safetensors file"):
        actdump.open(damaged)["pooled"][0]


@pytest.mark.parametrize(
    "key",
    [[1, "2"], (5, 3), [torch.tensor(True), torch.tensor(False)], torch.tensor(True), np.bool_(True), (slice(None), 1)],
    ids=repr,
)
def test_rows_by_what_is_no_number_say_what_is_taken(key, dump):
    with pytest.raises(TypeError, match="a number, a slice, or a list, tensor or array of numbers, not by"):
        dump["pooled"].rows[key]


def test_a_truth_value_of_torch_is_no_prompt(dump):
    for read in (dump["pooled"].__getitem__, dump.prompts.__getitem__):
        with pytest.raises(TypeError, match="prompts are taken by"):
            read(torch.tensor(True))
