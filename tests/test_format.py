import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from actdump import format as form
from actdump.address import Slice
from actdump.errors import DataError
from actdump.plan import Budget, Column, Layout, Part, Span, make, prompt_bytes
from actdump.statistics import Statistics

NAMES = ["h[0].output[0]", "naïve \"quoted\" 名", "a/b", "out put"]  # fmt: skip


def column(name, dims, dtype):
    return Column(
        name,
        "h[-1].output",
        "h[1].output",
        "Block",
        "tuple of 2",
        "[0, -1]",
        -1,
        ("batch", "token", "3"),
        Layout(dims, dtype),
        None,
    )


COLUMNS = [
    column(NAMES[0], (Slice(), 3), "bfloat16"),
    column(NAMES[1], (2, Slice(), Slice()), "float32"),
    column(NAMES[2], (5,), "uint8"),
    column(NAMES[3], (Slice(-2, None), 2, 2), "int64"),
]
PARTS = (Part(0, (Span(0, 0, 2, 7, 100),)), Part(1, (Span(1, 2, 1, 3, 50),)))
LOOKS = {NAMES[0]: Statistics(3, 9, 0, 0.5, 1.5, 2.5, 3.5, (1, 1), (2.0, 3.0))}
SHARD = form.Shard(1, "d" * 64, 2, 1, 3, 4096, "e" * 64, dict.fromkeys(NAMES, 3), LOOKS, {"host": "x"})
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(deadline=None, max_examples=25)  # each example writes a file
@given(lengths)
def test_a_shard_that_is_laid_out_and_filled_opens_with_safetensors_alone(tmp_path_factory, lengths):
    layout = form.shard_layout(COLUMNS, lengths, {"format": "actdump", "digest": "d"})
    path = tmp_path_factory.mktemp("shard") / "00000.safetensors"
    contents = bytearray(layout.size)
    contents[: len(layout.header)] = layout.header
    for number, (_, tensor) in enumerate(sorted(layout.tensors.items())):
        contents[tensor.start : tensor.stop] = bytes([number + 1]) * (tensor.stop - tensor.start)
    path.write_bytes(contents)
    with safe_open(path, "pt") as shard:
        assert set(shard.keys()) == set(layout.tensors)
        assert shard.metadata() == {"format": "actdump", "digest": "d"}
        for number, (name, tensor) in enumerate(sorted(layout.tensors.items())):
            held = shard.get_tensor(name)
            assert (tuple(held.shape), str(held.dtype)) == (tensor.shape, f"torch.{tensor.dtype}")
            assert set(held.contiguous().view(-1).view(torch.uint8).tolist()) <= {number + 1}
    assert layout.tensors[NAMES[0]].shape == (sum(lengths), 3)
    assert layout.tensors[NAMES[1]].shape == (sum(2 * length * length for length in lengths),)
    assert layout.tensors[NAMES[2]].shape == (len(lengths), 5)
    assert layout.tensors[NAMES[3]].shape == (sum(min(2, length) for length in lengths), 2, 2)
    assert layout.tensors["tokens"].shape == (sum(lengths),)
    for name in [*NAMES, "tokens"]:
        assert layout.tensors[name + ".offsets"].shape == (len(lengths) + 1,)


@given(lengths)
def test_tensors_are_aligned_without_holes_and_as_large_as_the_plan_said(lengths):
    layout = form.shard_layout(COLUMNS, lengths, {})
    assert len(layout.header) % 8 == 0
    position = len(layout.header)
    for tensor in layout.tensors.values():
        assert tensor.start == position
        assert tensor.start % torch.empty(0, dtype=getattr(torch, tensor.dtype)).element_size() == 0
        position = tensor.stop
    assert position == layout.size
    planned = sum(prompt_bytes(COLUMNS, length) for length in lengths)
    assert layout.size - len(layout.header) == planned + 8 * (len(COLUMNS) + 1)  # offsets have an end as well


@pytest.mark.parametrize("dtype", form.CODES)
def test_every_dtype_has_the_code_of_safetensors(dtype, tmp_path):
    layout = form.shard_layout([column("x", (Slice(), 2), dtype)], [3], {})
    (tmp_path / "x").write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    with safe_open(tmp_path / "x", "pt") as shard:
        assert shard.get_tensor("x").dtype == getattr(torch, dtype)


def plan():
    return make({"spec": {"model": "m"}}, COLUMNS, PARTS, Budget(512, 8))


def manifest():
    bare = replace(SHARD, statistics={}, written={})
    shards = replace(bare, number=0, first=0), bare
    return form.Manifest("d" * 64, tuple(COLUMNS), shards, 3, 10, 8192, SHARD.statistics, {"a": 1}, {"b": 2})


@pytest.mark.parametrize(
    ("value", "write", "read"),
    [
        (plan(), form.plan_to_json, form.plan_from_json),
        (SHARD, form.shard_to_json, form.shard_from_json),
        (manifest(), form.manifest_to_json, form.manifest_from_json),
    ],
    ids=["plan", "shard", "manifest"],
)
def test_json_and_back(value, write, read):
    text = json.dumps(write(value))
    assert read(json.loads(text)) == value
    with pytest.raises(
        DataError, match=f"this is format 99; this actdump reads format {form.VERSION}, so use the version that wrote it"
    ):
        read({**json.loads(text), "format": 99})


def test_a_changed_key_is_another_format():
    """The keys of format 2: whoever changes them changes the version, too."""
    found = {
        "plan": form.plan_to_json(plan()),
        "manifest": form.manifest_to_json(manifest()),
        "record": form.shard_to_json(SHARD),
        "column": form.column_to_json(COLUMNS[0]),
    }
    assert form.VERSION == 2
    assert {name: " ".join(sorted(value)) for name, value in found.items()} == {
        "plan": "budget columns digest facts format parts",
        "manifest": "audit bytes columns digest facts format made prompts shards statistics tokens",
        "record": "bytes digest first format number prompts rows sha256 statistics tokens written",
        "column": "address axes call dims dtype form module name resolved token_axis tokens",
    }


@pytest.mark.parametrize(
    "dims", [(), (3,), (Slice(), 3), (Slice(1, -1, 2), 3), (2, Slice(), Slice()), (Slice(-3), 1), (Slice(None, None, 4),)]
)
def test_axes_of_a_column_survive_json(dims):
    there = column("x", dims, "float16")
    assert form.column_from_json(json.loads(json.dumps(form.column_to_json(there)))) == there


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("plan.json", True),
        ("shards/00012.safetensors", True),
        ("shards/123456.json", True),
        ("shards/.00012.safetensors.77-0123abcd-host.far.away.actdump-tmp", True),
        (".plan.json.1-0123abcd-host.actdump-tmp", True),
        (".1-0123abcd-host.actdump-worker", True),
        (".actdump-lock", True),
        ("shards/.00012.actdump-lock", True),
        ("shards/.mine.actdump-lock", False),
        ("shards/notes.txt", False),
        ("00012.safetensors", False),
        ("plan.json.bak", False),
        ("deeper/plan.json", False),
    ],
)
def test_a_folder_knows_which_files_are_its_own(path, ours):
    folder = form.Folder(Path("out"))
    assert folder.written_by_us(folder.root / path) is ours


def test_every_name_that_a_folder_gives_is_its_own():
    folder = form.Folder(Path("out"))
    named = [folder.plan, folder.manifest, folder.prompts, folder.tokens, folder.shards, folder.shard(3), folder.record(10**6)]
    named += [folder.lock, folder.claim(3), folder.claim(10**6), folder.worker("41-0123abcd-host")]
    for path in [*named, *(form.temporary(path, "41-0123abcd-host") for path in named)]:
        assert folder.written_by_us(path)
    assert form.temporary(folder.shard(3), "41-0123abcd-host").parent == folder.shards
