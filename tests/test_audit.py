"""The audit sees: every fault that was planted is caught with its tap, prompt and token, and clean runs raise no alarm."""

import importlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_values import CASES, random_ids
from typer.testing import CliRunner

from actdump import job, store
from actdump import model as models
from actdump.cli import app
from actdump.engine import site
from actdump.errors import DataError
from actdump.spec import Spec

capture = importlib.import_module("actdump.engine.capture")  # the name in its package is the function
CONFIG = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": 0,
    "eos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
LENGTHS = (9, 2, 14, 7, 7, 3, 11, 13, 5)
SAVE = {
    "block": "transformer.h[1].output[0]",
    "last": {"address": "transformer.h[-1].output", "tokens": "last"},
    "logits": "output.logits",
}


def spec(dtype="float32", lengths=LENGTHS, seed=1, **other):
    prompts = [{"id": f"p{number}", "input_ids": ids} for number, ids in enumerate(random_ids(lengths))]
    given = {"model": {"config": CONFIG}, "prompts": prompts, "save": SAVE, "audit": 4, **other}
    return Spec.model_validate({**given, "model": {"seed": seed, "dtype": dtype, **given["model"]}})


def audited(*words, code=0):
    """What `actdump audit` says."""
    result = CliRunner().invoke(app, ["audit", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(result.stdout, result.stderr, sep="\n")
    assert result.exit_code == code
    assert code == 0 or result.stdout == ""
    return result.stdout if code == 0 else result.stderr


# ------------------------------------------------------------------------------------------------------------ planted faults


def padding_on_the_left(monkeypatch):
    """Rows begin with padding, the mask hides it, and nobody tells the model the positions."""

    def tensors(padded, feed):
        ids = torch.full((len(padded.lengths), padded.width), feed.pad)
        for row, prompt in zip(ids, padded.batch.ids, strict=True):
            row[padded.width - len(prompt) :] = torch.tensor(list(prompt))
        return ids, (torch.arange(padded.width) >= padded.width - torch.tensor(padded.lengths)[:, None]).long()

    def places(padded, selection):
        ends = range(padded.width, padded.width * (len(padded.lengths) + 1), padded.width)
        return [
            end - length + place
            for end, length in zip(ends, padded.lengths, strict=True)
            for place in capture.positions(selection, length)
        ]

    monkeypatch.setattr(capture.Padded, "tensors", tensors)
    monkeypatch.setattr(capture.Padded, "_places", places)


def padding_seen(monkeypatch):
    """Bidirectional attention looks at the padding, because every row is said to be whole."""
    tensors = capture.Padded.tensors
    monkeypatch.setattr(capture.Padded, "tensors", lambda padded, feed: (tensors(padded, feed)[0], None))


def positions_shifted(monkeypatch):
    arguments = site.Feed.arguments

    def shifted(feed, ids, mask):
        return {**arguments(feed, ids, mask), "position_ids": torch.arange(1, ids.shape[1] + 1).expand(ids.shape)}

    monkeypatch.setattr(site.Feed, "arguments", shifted)


def layer_off_by_one(monkeypatch):
    module_at = site.module_at

    def next_block(address, root):
        found = module_at(address, root)
        blocks = list(root.transformer.h)
        return blocks[(blocks.index(found) + 1) % len(blocks)] if found in blocks else found

    monkeypatch.setattr(site, "module_at", next_block)


def two_rows_swapped(monkeypatch):
    """The rows of two tokens of each prompt change places on their way to the file."""
    buffers = capture.Captured.buffers

    def swapped(captured):
        block, *others = buffers(captured)
        block = block.copy().reshape(len(captured.rows[0]), -1)
        start = 0
        for length in captured.padded.lengths:
            block[[start, start + length - 1]] = block[[start + length - 1, start]]
            start += length
        return [block.reshape(-1), *others]

    monkeypatch.setattr(capture.Captured, "buffers", swapped)


def two_prompts_swapped(monkeypatch):
    """Two prompts of one length get each other's rows."""
    put = store.Pending.put

    def swapped(shard, places, buffers):
        by_length = sorted(range(len(places)), key=lambda at: (shard.lengths[places[at]], -at))
        order = sorted(range(len(places)), key=lambda at: (shard.lengths[places[at]], at))
        moved = dict(zip(order, by_length, strict=True))
        put(shard, [places[moved[at]] for at in range(len(places))], buffers)

    monkeypatch.setattr(store.Pending, "put", swapped)


def overwriting(monkeypatch):
    """A model whose last block writes into what it is given; no fault."""
    load = models.load

    def written_into(_, args):
        args[0].add_(1.0)

    def in_place(source):
        module = load(source)
        module.transformer.h[2].register_forward_pre_hook(written_into)
        return module

    monkeypatch.setattr(models, "load", in_place)


def live_view(monkeypatch):
    """The engine keeps the model's own tensor."""
    gathered = capture._gathered

    def view(site, value, padded):
        return value.view(-1, value.shape[-1]) if site.selection == "all" else gathered(site, value, padded)

    monkeypatch.setattr(capture, "_gathered", view)


def overflowing(monkeypatch):
    """Weights whose hidden states pass what float16 holds."""
    load = models.load

    def large(source):
        module = load(source)
        with torch.no_grad():
            module.transformer.wte.weight[:, 3] = 1e5
        return module

    monkeypatch.setattr(models, "load", large)


def saturating_cast(monkeypatch):
    """What float16 cannot hold becomes its largest number."""
    kept = capture._Catch._kept

    def saturated(catch, place, layout, computed):
        return kept(catch, place, layout, computed.clamp(-65000, 65000))

    monkeypatch.setattr(capture._Catch, "_kept", saturated)


def flipped_bit(monkeypatch):
    """The highest bit of the exponent of one number of each token, before the shard is hashed."""
    buffers = capture.Captured.buffers

    def flipped(captured):
        block, *others = buffers(captured)
        rows = captured.rows[0]
        numbers = block.copy().reshape(len(rows), -1, rows.element_size())
        numbers[:, 0, -1] ^= 0x40
        return [numbers.reshape(-1), *others]

    monkeypatch.setattr(capture.Captured, "buffers", flipped)


def selection_off_by_one(monkeypatch):
    positions = capture.positions
    monkeypatch.setattr(
        capture,
        "positions",
        lambda selection, length: (max(length - 2, 0),) if selection == "last" else positions(selection, length),
    )


@dataclass(frozen=True)
class Planted:
    """A fault, the tap that shows it, what else the spec needs for it to show, and what is odd about the model itself."""

    plant: Callable[[pytest.MonkeyPatch], None]
    tap: str = "block"
    spec: dict[str, Any] = field(default_factory=dict)
    model: Callable[[pytest.MonkeyPatch], None] = lambda _: None


BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24,
    "num_hidden_layers": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
ENCODER = {"save": {"block": "encoder.layer[1].output[0]", "pooled": "pooler.output"}}
HALF = {"block": {"address": SAVE["block"], "dtype": "float16"}}
PLANTED = {
    "padding on the left": Planted(padding_on_the_left),
    "padding seen": Planted(padding_seen, spec={"model": {"config": BERT, "task": "base"}, **ENCODER}),
    "positions shifted": Planted(positions_shifted),
    "layer off by one": Planted(layer_off_by_one),
    "two rows swapped": Planted(two_rows_swapped),
    "two prompts swapped": Planted(two_prompts_swapped),
    "live view": Planted(live_view, spec={"lengths": (7, 7, 7, 7)}, model=overwriting),
    "saturating cast": Planted(
        saturating_cast, spec={"save": {"block": {"address": SAVE["block"], "dtype": "float16"}}}, model=overflowing
    ),
    "flipped bit": Planted(flipped_bit),
    "selection off by one": Planted(selection_off_by_one, tap="last"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_stops_the_run_and_is_found_in_a_finished_dump(name, dtype, tmp_path, monkeypatch):
    fault = PLANTED[name]
    fault.model(monkeypatch)
    with monkeypatch.context() as planted:
        fault.plant(planted)
        for _ in range(2):  # the same command finds the same files, and the same fault
            with pytest.raises(DataError) as stopped:
                job.run(spec(dtype, **fault.spec), tmp_path / "out")
            assert_told(str(stopped.value), fault.tap)
            assert not (tmp_path / "out" / "manifest.json").exists()
        job.run(spec(dtype, **fault.spec, audit=0), tmp_path / "out")
    assert_told(audited(tmp_path / "out", "-n", 5, code=65), fault.tap)


def assert_told(message, tap):
    print(message)
    assert re.search(rf"^(error: )?{tap}: prompt \d+ \(`p\d+`\), token \d+", message, re.MULTILINE)


def test_weights_of_another_seed_are_found(tmp_path, monkeypatch):
    """A run is gone on with by a library that seeds otherwise, so that one shard has other weights than the rest."""
    wanted, out = spec(audit=len(LENGTHS), shard={"tokens": 30}), tmp_path / "out"
    assert len(job.run(wanted, out).manifest.shards) > 1
    for path in (out / "manifest.json", out / "shards/00000.json"):
        path.unlink()
    with monkeypatch.context() as planted:
        seed = torch.manual_seed
        planted.setattr(torch, "manual_seed", lambda number: seed(number + 1))
        with pytest.raises(DataError) as stopped:
            job.run(wanted, out)
    assert_told(str(stopped.value), "block")
    assert not (out / "manifest.json").exists()


# ------------------------------------------------------------------------------------------------------------- clean runs

TOKENS = ("all", "last", "mean", "1:")
TYPES = (None, "bfloat16", "float16", "float8_e4m3fn")


def clean_spec(name, dtype, turn):
    """A family's own taps, with other weights, other prompts, other selections and storage types at each turn."""
    case = CASES[name]
    generator = random.Random(f"{name} {dtype} {turn}")
    prompts = [[generator.randrange(2, 40) for _ in range(generator.randint(2, 30))] for _ in range(6)]
    save = {}
    for tap, place in case.places.items():
        entry = {"address": place.address, "call": place.call}
        if "pooler" not in place.path and place.take != 2:
            entry |= {"tokens": generator.choice(TOKENS), "dtype": generator.choice(TYPES)}
        save[tap] = entry
    return Spec.model_validate({
        "model": {**case.spec, "seed": turn, "dtype": dtype},
        "prompts": [{"input_ids": ids} for ids in prompts],
        "save": save,
        "audit": len(prompts),
    })  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_clean_run_raises_no_alarm(name, dtype, tmp_path):
    worst = 0.0
    for turn in range(13):
        manifest = job.run(clean_spec(name, dtype, turn), tmp_path / str(turn)).manifest
        assert manifest.audit["prompts"] == tuple(range(6))
        assert {tap["wrong"] for tap in manifest.audit["taps"]} == {0}
        worst = max(worst, *(tap["worst"] for tap in manifest.audit["taps"]))
    print(name, dtype, worst)
