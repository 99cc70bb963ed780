"""The scripts are there, can be run, and do nothing where nothing is left to do."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from needs import lacking

ROOT = Path(__file__).resolve().parent.parent
BASH = ["scripts/setup", "scripts/quickstart", "scripts/test", "scripts/check", "scripts/local_slurm", ".ci/run"]
STAMP = ROOT / ".venv" / "setup.sha256"


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", [*BASH, "scripts/fetch_model"])
def test_is_executable(script):
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", BASH)
def test_is_valid_bash_that_stops_at_the_first_failure(script):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    done = run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_setup_does_nothing_where_all_is_set_up(tmp_path):
    if not STAMP.exists():
        lacking("scripts/setup has not made .venv here")
    before = STAMP.stat().st_mtime_ns
    start = time.perf_counter()
    done = run(str(ROOT / "scripts" / "setup"), cwd=tmp_path)
    seconds = time.perf_counter() - start
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert STAMP.stat().st_mtime_ns == before
    assert seconds < 1  # it takes about 0.01; the rest is for a busy machine


def test_setup_says_that_python_is_too_old(tmp_path):
    """In a copy, with nothing on PATH but the tools that the script needs and a Python that says no."""
    repo, tools = tmp_path / "a repo", tmp_path / "tools"
    tools.mkdir()
    (repo / "scripts").mkdir(parents=True)
    for name in ["pyproject.toml", "scripts/setup", "scripts/constraints.txt"]:
        (repo / name).write_bytes((ROOT / name).read_bytes())
    for name in ["bash", "cat", "dirname", "sha256sum", "shasum"]:
        if found := next((path for place in os.get_exec_path() if (path := Path(place, name)).exists()), None):
            (tools / name).symlink_to(found)
    for name in ["python3", "python3.11", "python3.12", "python3.13", "python3.14", "python"]:
        (tools / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2"\nexit 1\n')
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(repo / "scripts" / "setup")],
        env={"PATH": str(tools)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Python 3.11 or later is needed" in done.stderr
    assert "python3 is Python 3.9.2" in done.stderr
    assert not (repo / ".venv").exists()


def test_fetch_model_names_the_models_it_knows():
    done = run("python3", "scripts/fetch_model", "no-such-model")
    assert done.returncode == 1
    assert "no model is called no-such-model; there are SmolLM2-135M-Instruct, all-MiniLM-L6-v2" in done.stderr


def test_fetch_model_does_nothing_where_the_models_are_there():
    names = ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"]
    folders = [ROOT / "models" / name for name in names]
    if not all(folder.is_dir() for folder in folders):
        lacking("scripts/fetch_model has not been run here")
    before = [folder.stat().st_mtime_ns for folder in folders]
    done = run("python3", "scripts/fetch_model")
    assert done.returncode == 0
    assert done.stderr == f"fetch_model: {', '.join(names)} already there, nothing to do\n"
    assert [folder.stat().st_mtime_ns for folder in folders] == before
