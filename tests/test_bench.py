"""The bench measures what it says that it measures; the figures themselves are no test's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need_model

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {"name", "value", "unit"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def rounds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmarks import rounds

    return rounds


SECTIONS = [
    "limit",
    "pairs",
    "peers",
    "overhead",
    "memory",
    "start",
    "writing",
    "planning",
    "explore",
    "audit",
    "workers",
    "gpu",
]


def test_sections_end_with_figures_on_the_screen_and_as_json(tmp_path):
    need_model("SmolLM2-135M-Instruct")
    file = tmp_path / "figures.json"
    before = set((ROOT / "out").glob("bench-*"))
    done = bench(*SECTIONS, "--quick", "--dtype", "float32", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found["sections"]) == SECTIONS
    assert found["quick"] is True
    assert found["machine"]["torch"]
    assert str(ROOT) not in file.read_text()
    for section in SECTIONS[:-1]:  # a GPU is not everywhere
        figures = found["sections"][section]
        assert figures, section
        for figure in figures:
            assert figure.keys() >= FIGURES
            assert figure["name"] in done.stdout
        judged = [figure for figure in figures if "goal" in figure]
        assert judged or section == "explore"
        assert all(isinstance(figure["met"], bool) for figure in judged)
    ratios = {figure["name"]: figure for figure in found["sections"]["limit"] if figure["unit"] == "×"}
    assert [figure.get("goal") for figure in ratios.values()][:3] == ["at most 1.03", "at most 1.08", "at most 1.03"]
    assert set((ROOT / "out").glob("bench-*")) <= before


def test_an_unknown_section_is_refused():
    done = bench("speed")
    assert done.returncode == 2
    assert "there is no section speed; there are limit, pairs" in done.stderr


def test_every_section_is_there_to_be_run():
    sections = bench("--help").stdout.split("sections:")[1].split("\n\n")[0].split("\n")
    assert [line.split()[0] for line in sections if line.startswith("  ")] == SECTIONS


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_side_runs_once_a_round_and_none_is_always_first(rounds, count):
    ran: list[str] = []
    names = [f"side {number}" for number in range(count)]
    sides = {name: lambda name=name: ran.append(name) or float(len(ran)) for name in names}
    taken = rounds.in_turns(sides, 2 * count)
    turns = [ran[place : place + count] for place in range(0, len(ran), count)]
    assert all(sorted(turn) == sorted(names) for turn in turns)
    assert {turn[0] for turn in turns} == set(names)
    assert all(
        taken[name] == tuple(count * turn + order.index(name) + 1.0 for turn, order in enumerate(turns)) for name in names
    )


def test_a_ratio_is_that_of_the_medians_beside_that_of_each_round(rounds):
    taken = {"ours": (2.0, 9.0, 4.0), "theirs": (1.0, 2.0, 4.0)}
    figure = rounds.ratio("ours / theirs", taken, "ours", "theirs", rounds.Goal("at most", 1.5))
    assert (figure.value, figure.each) == (2.0, (2.0, 4.5, 1.0))
    assert not figure.goal.met(figure.value)
    assert figure.goal.met(1.5)
    assert rounds.Goal("at least", 3.4).met(3.4)
    assert not rounds.Goal("at least", 3.4).met(3.39)


def test_a_device_is_busy_while_any_of_its_work_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmarks import gpu

    assert gpu.busy([(15, 30), (10, 20), (16, 18), (40, 50)]) == 30 / 40
    with pytest.raises(RuntimeError, match="saw nothing on the device"):
        gpu.busy([])
