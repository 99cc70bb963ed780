"""Results as a table and as JSON."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rounds import Figure
from benchmarks.setting import Setting

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "nnsight", "baukit")


def table(section: str, figures: Sequence[Figure]) -> Table:
    """One line a figure: its value, the least and the most of the rounds, the goal and whether it was met."""
    result = Table("what", "figure", "rounds", "goal", "", title=section, title_justify="left", title_style="bold", box=None)
    for figure in figures:
        spread = f"{_number(min(figure.each))} to {_number(max(figure.each))}" if len(figure.each) > 1 else ""
        met = "" if figure.goal is None else "[green]met[/]" if figure.goal.met(figure.value) else "[red]not met[/]"
        result.add_row(figure.name, f"{_number(figure.value)} {figure.unit}", spread, str(figure.goal or ""), met)
    return result


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"


def show(section: str, figures: Sequence[Figure]) -> None:
    """The table on stdout; away from a terminal at its full width."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table(section, figures))


def save(path: Path, setting: Setting, results: Mapping[str, Sequence[Figure]]) -> None:
    content = {
        "machine": machine(),
        "rounds": setting.rounds,
        "quick": setting.quick,
        "sections": {section: [_plain(figure) for figure in figures] for section, figures in results.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _plain(figure: Figure) -> dict[str, Any]:
    plain = {key: value for key, value in asdict(figure).items() if value not in (None, ())}
    if figure.goal is not None:
        plain["goal"] = str(figure.goal)
        plain["met"] = figure.goal.met(figure.value)
    return plain


def machine() -> dict[str, Any]:
    """What decides the figures; nothing that names the machine."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
