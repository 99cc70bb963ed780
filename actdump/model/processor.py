"""The CPU that a model runs on: a dtype that it is slow in, and instructions that it says it has and faults on."""

import logging
import os
import warnings
from math import inf
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

log = logging.getLogger(__name__)

ROUNDS = 5  # of products, of which the fastest counts
SLOW = 1.25  # times as long as float32: below it is noise, and where bfloat16 is the slower one, 1.5 and more were seen


def warn_of_slow(dtype: torch.dtype) -> None:
    """Warn of a narrow dtype that this CPU multiplies more slowly than float32.

    Measured, because no list of instructions tells it. SmolLM2 in bfloat16 took 5 times as long as in float32 with AVX2, and 1.7 times
    on an Intel Xeon that has AVX-512's instructions for bfloat16 and no AMX.
    """
    if dtype not in (torch.bfloat16, torch.float16) or (slowness := _slowness(dtype)) < SLOW:
        return
    name = str(dtype).removeprefix("torch.")
    log.warning(
        "this CPU takes %.1f times as long to multiply in %s as in float32: `model.dtype: float32` computes the same more exactly, "
        "and `dtype: %s` keeps the files as small", slowness, name, name,
    )  # fmt: skip


def _slowness(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a product of matrices takes; found in some 15 ms, or 70 where it is slow."""
    fastest = {torch.float32: inf, dtype: inf}
    for _ in range(ROUNDS):
        for each in fastest:
            rows, weight = (torch.ones(size, 512, dtype=each, device="cpu") for size in (256, 512))
            began = perf_counter()
            nn.functional.linear(rows, weight)
            fastest[each] = min(fastest[each], perf_counter() - began)
    return fastest[dtype] / fastest[torch.float32]


def avoid_faulty_amx() -> None:
    """Keep oneDNN from AMX where the CPU says that it has it and faults on it, as some virtual machines do.

    Shown by one small product in a child process. oneDNN reads the variable at its first use:
    https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
    """
    info = Path("/proc/cpuinfo")
    if "ONEDNN_MAX_CPU_ISA" in os.environ or not info.exists() or "amx_bf16" not in info.read_text():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child computes and ends
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(
                1
            )  # the threads of the parent's pool are not in the child, which would wait for them for ever
            ones = torch.ones(32, 64, dtype=torch.bfloat16)
            nn.functional.linear(ones, ones)
        finally:
            os._exit(0)  # whatever is raised, as by Ctrl-C: the program is the parent's to go on with
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        log.warning("this CPU faults on its own AMX instructions; going on without them (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16)")
