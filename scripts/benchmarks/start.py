"""From the command to the first batch, and the answers that need no model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks import child
from benchmarks.rounds import Figure, Goal, Run, in_turns, ratio, seconds
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER

# The real command, ended where the first batch begins: that is when a run tells its plan.
UNTIL_FIRST_BATCH = """
import os
from actdump import cli, console
console.Bar.planned = lambda self, plan, done: os._exit(0)
cli.main()
"""
IMPORT_AND_LOAD = """
import os, sys
import torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
os._exit(0)
"""
HAS_TORCH = """
import sys
from actdump.cli import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""
TINY = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "vocab_size": 100}  # fmt: skip


def measure(setting: Setting) -> Iterator[Figure]:
    """Wall clock of child processes."""
    spec, out = setting.scratch / "start.yaml", setting.scratch / "start"
    spec.write_text(json.dumps({"model": str(FOLDER), "prompts": ["Hello"], "save": ["model.layers[5].output"]}))
    sides: dict[str, Run] = {
        "import and load": child.timed_python(IMPORT_AND_LOAD, str(FOLDER)),
        "until the first batch": lambda: _until_first_batch(spec, out),
    }
    if not setting.quick:
        for side in sides.values():
            side()  # once, so that the files are in the page cache
    taken = in_turns(sides, setting.rounds)
    yield ratio(
        "until the first batch / import and load", taken, "until the first batch", "import and load", Goal("at most", 1.15)
    )
    yield from _without_torch(setting, "--help", ("--help",), Goal("at most", 0.25))
    shards = setting.some(1000, 20)
    done = _many_shards(setting, shards)
    yield from _without_torch(setting, f"up to date, {shards:,} shards", done, Goal("at most", 0.5))


def _until_first_batch(spec: Path, out: Path) -> float:
    """A run into a folder that is not there yet."""
    ended = child.python(UNTIL_FIRST_BATCH, "run", str(spec), "-o", str(out))
    shutil.rmtree(out)
    return ended.seconds


def _without_torch(setting: Setting, name: str, command: tuple[str, ...], goal: Goal) -> Iterator[Figure]:
    runs = [child.python(HAS_TORCH, *command) for _ in range(setting.rounds)]
    yield seconds(name, tuple(run.seconds for run in runs), goal)
    imported = float(any(run.output.splitlines()[-1] != "False" for run in runs))
    yield Figure(f"{name}: torch imported", imported, "", goal=Goal("at most", 0))


def _many_shards(setting: Setting, count: int) -> tuple[str, ...]:
    """Make a dump of many small shards; the command that finds it up to date."""
    prompts, spec = setting.scratch / "many.jsonl", setting.scratch / "many.yaml"
    prompts.write_text("".join(json.dumps({"input_ids": [number % 100] * 4}) + "\n" for number in range(count)))
    spec.write_text(json.dumps({
        "model": {"config": TINY},
        "prompts": {"file": str(prompts), "text": "input_ids"},
        "save": ["model.layers[0].output"],
        "shard": {"tokens": 4},
    }))  # fmt: skip
    command = ("run", str(spec), "-o", str(setting.scratch / "many"), "-q")
    say(f"making a dump of {count:,} shards")
    child.actdump(*command)
    return command
