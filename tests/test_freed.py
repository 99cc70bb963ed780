"""Memory that forwards on a CPU free: kept for the next ones, but not without end."""

import platform
import subprocess
import sys

import pytest
from needs import need
from test_job import make_spec

from actdump import job
from actdump.job import capturing
from actdump.job.freed import Freed

# A forward frees its activations in a thread of its own, between small blocks that stay. Prints what the process holds more than
# before: after the forward, after a look at the limit, and after the block.
FORWARD = """
import threading
from types import SimpleNamespace
from actdump.job.freed import Freed

SMALL, STEADY = [], bytearray(b"1") * (200 << 20)

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) // 256

def forward(size):
    activations = []
    for _ in range(size):
        activations.append(bytearray(1 << 20))
        SMALL.append(bytearray(1000))

def run(size, limit=lambda: None):
    before = megabytes()
    thread = threading.Thread(target=forward, args=(size,))
    thread.start()
    thread.join()
    after = megabytes()
    limit()
    return [after - before, megabytes() - before]
"""
KEPT = """
before = megabytes()
with Freed(SimpleNamespace(type="cpu")) as freed:
    print(*run({}, freed.limit), end=" ")
print(megabytes() - before)
"""


def held(program, **environment):
    """Megabytes that a program prints."""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    return list(map(int, done.stdout.split()))


@pytest.fixture
def glibc():
    need(platform.libc_ver()[0] == "glibc", "other C libraries are left as they are")


def test_what_a_forward_frees_stays_for_the_next_and_is_given_back_at_the_end(glibc):
    kept, limited, ended = held(FORWARD + KEPT.format(30))
    assert kept > 25
    assert limited > 25
    assert ended < 10


def test_without_it_glibc_gives_it_back(glibc):
    assert held(FORWARD + "print(*run(30))")[0] < 10


def test_much_is_given_back_at_once(glibc):
    kept, limited, _ = held(FORWARD + KEPT.format(150))
    assert kept > 130
    assert limited < 20


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072:glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_what_the_environment_says_of_freed_memory_holds(glibc, environment):
    assert held(FORWARD + KEPT.format(30), **environment)[0] < 10


def test_a_run_on_a_cpu_looks_at_the_limit_after_each_batch(tmp_path, monkeypatch):
    looks, ends = [], []

    class Watched(Freed):
        def __init__(self, device):
            assert device.type == "cpu"
            super().__init__(device)

        def limit(self):
            looks.append(True)
            super().limit()

        def __exit__(self, *ended):
            ends.append(True)
            super().__exit__(*ended)

    monkeypatch.setattr(capturing, "Freed", Watched)
    spec = make_spec(batch={"prompts": 1})
    done = job.run(spec, tmp_path / "dump")
    assert len(looks) == sum(shard.prompts for shard in done.manifest.shards)
    assert ends == [True]
