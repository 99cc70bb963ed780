"""Runs the sections that are named, all of them without a name."""

import argparse
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

SECTIONS = {
    "limit": "A, B and C against the bare forwards",
    "pairs": "the same batch by batch, where the machine's speed wavers",
    "peers": "A with nnsight, baukit, output_hidden_states and hooks by hand",
    "overhead": "what a capture adds to one small forward",
    "memory": "the peak of a large run against that of a small one",
    "start": "from the command to the first batch; --help; an up-to-date dump",
    "writing": "the store against a plain file",
    "planning": "a million prompts against the tokenizer alone",
    "explore": "what is fastest here: dtype, threads, batches, attention, forwards side by side",
    "audit": "its share of A",
    "workers": "A by two workers; the share of locks, plan and records",
    "gpu": "a model of 7 billion parameters on a GPU",
}


def main() -> None:
    asked = _arguments()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    from benchmarks import report
    from benchmarks.rounds import Figure
    from benchmarks.setting import Setting, say, scratch

    results: dict[str, list[Figure]] = {}
    with scratch() as place:
        rounds = asked.rounds or (1 if asked.quick else 3)
        setting = Setting(rounds, asked.quick, tuple(asked.dtype or ("float32", "bfloat16")), place)
        for name in asked.section or SECTIONS:
            say(f"{name}: {SECTIONS[name]}")
            measure: Callable[[Setting], Iterator[Figure]] = import_module(f"benchmarks.{name}").measure
            results[name] = list(measure(setting))
            if results[name]:
                report.show(name, results[name])
            if asked.json:  # with every section: a later one may fail
                report.save(asked.json, setting, results)


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {name:10} {about}" for name, about in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the speed of actdump beside what it could be, beside its peers, and beside its goals.",
        epilog=f"sections:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("section", nargs="*", metavar="SECTION", help="what to measure; all of it without a name")
    parser.add_argument("--rounds", type=int, help="how often each side runs (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="the model's dtype (default: both)")
    parser.add_argument("--quick", action="store_true", help="little of everything, only to see that it works")
    asked = parser.parse_args()
    if unknown := [name for name in asked.section if name not in SECTIONS]:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return asked


main()
