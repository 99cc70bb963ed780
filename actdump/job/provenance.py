"""With what, where and when a dump was made."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

from actdump.job.bound import Bound
from actdump.spec import ModelSpec

if TYPE_CHECKING:
    import torch

PACKAGES = ("actdump", "torch", "transformers", "safetensors")
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "SLURM_RESTART_COUNT")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def placed(spec: ModelSpec) -> dict[str, Any]:
    """The model as the spec names it, a local folder with its full path, for whoever wants to run it again."""
    plain = spec.model_dump(mode="json", exclude_defaults=True)
    if spec.folder is not None:
        plain["name" if spec.name is not None else "config"] = str(spec.folder.absolute())
    return plain


def circumstances(bound: Bound) -> dict[str, Any]:
    """With what, where and by whom the values were computed; none of it decides them."""
    import torch

    return {
        "versions": {name: str(import_module(name).__version__) for name in PACKAGES},
        "python": platform.python_version(),
        "host": platform.node(),
        "device": _device(bound.feed.device),
        "threads": torch.get_num_threads(),
        "git": _git(),
        **({"slurm": slurm} if (slurm := _slurm()) else {}),
    }


def _device(device: "torch.device") -> str:
    """`cpu`, or `cuda:0 (NVIDIA H100 80GB HBM3)`."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _slurm() -> dict[str, str]:
    """Which job this is, in SLURM's own words; nothing outside of one. SLURM counts restarts from the first one on."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {"SLURM_RESTART_COUNT": "0", **{name: os.environ[name] for name in SLURM if name in os.environ}}


def _git() -> dict[str, Any] | None:
    """The commit of the working folder and whether it has changes; `None` outside a repository."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *words], capture_output=True, text=True, errors="replace", check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
