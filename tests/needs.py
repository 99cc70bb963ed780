"""What a test needs and a machine may lack."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

MODELS = Path(__file__).resolve().parents[1] / "models"


def lacking(reason: str) -> NoReturn:
    """Skip the test; fail it where everything has to be tested, as in CI."""
    if os.environ.get("ACTDUMP_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(possible: bool, reason: str) -> None:
    """Go on only where the test is possible."""
    if not possible:
        lacking(reason)


def need_model(name: str) -> Path:
    """The folder of a real model."""
    need((MODELS / name / "config.json").is_file(), f"models/{name} is not there: run scripts/fetch_model")
    return MODELS / name
