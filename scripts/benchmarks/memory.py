"""The peak of a run that writes much against that of one that writes little."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks import child
from benchmarks.rounds import Figure, Goal
from benchmarks.setting import Setting, say
from benchmarks.texts import LONGEST, MEDIAN, SHORTEST, SPREAD

# As many blocks and as wide as SmolLM2, so as many bytes a token, but a hundredth of its arithmetic.
MODEL = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 16, "num_hidden_layers": 30, "num_attention_heads": 1,
         "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 1000, "dtype": "bfloat16"}  # fmt: skip
TOKEN_BYTES = 30 * 576 * 2


def measure(setting: Setting) -> Iterator[Figure]:
    """Resident memory of child processes."""
    little, much = setting.some(100, 2) * 10**6, setting.some(8_000, 20) * 10**6
    if shutil.disk_usage(setting.scratch).free < much * 1.2:
        say(f"less than {much * 1.2 / 1e9:.0f} GB are free here, so this is not measured")
        return
    peaks = {size: _peak(setting, size) for size in (little, much)}
    for size, peak in peaks.items():
        yield Figure(f"writing {size / 1e6:,.0f} MB: peak", peak / 1e6, "MB")
    yield Figure("more for the larger", (peaks[much] - peaks[little]) / 1e6, "MB", goal=Goal("at most", 250))


def _peak(setting: Setting, size: int) -> int:
    out = setting.scratch / "memory"
    spec = _spec(setting.scratch, size)
    try:
        ended = child.actdump("run", str(spec), "-o", str(out), "-q")
        say(f"{size / 1e6:,.0f} MB in {ended.seconds:.1f} s")
        return ended.peak
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _spec(place: Path, size: int) -> Path:
    """A spec whose dump has about so many bytes: all blocks, prompts of mixed length."""
    prompts, spec, dice = place / f"memory-{size}.jsonl", place / f"memory-{size}.yaml", random.Random(0)
    waiting = size // TOKEN_BYTES
    with prompts.open("w") as file:
        while waiting > 0:
            length = min(max(round(dice.lognormvariate(0, SPREAD) * MEDIAN), SHORTEST), LONGEST)
            print(json.dumps({"input_ids": [dice.randrange(1000) for _ in range(length)]}), file=file)
            waiting -= length
    spec.write_text(json.dumps({
        "model": {"config": MODEL},
        "prompts": {"file": str(prompts), "text": "input_ids"},
        "save": ["model.layers[*].output"],
    }))  # fmt: skip
    return spec
