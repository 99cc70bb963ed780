"""What all tests need."""

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: on a busy machine, spinning threads take minutes

import pytest
import torch

from actdump.model import avoid_faulty_amx

avoid_faulty_amx()  # oneDNN looks at its environment once, at its first use, which could be in any test


# Two files run at a time, so those that take minutes go first: neither process is left with one while the other has nothing to do.
SLOW = ["test_bench", "test_slurm", "test_zoo", "test_audit", "test_job", "test_mistakes", "test_readme"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def the_log_as_it_was():
    """The command line sets the log up for its whole process, and here other tests follow in it."""
    log = logging.getLogger("actdump")
    handlers, level, propagate = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture
def one_thread():
    """Torch with one thread, as in the processes that are compared with this one: with some CPUs' kernels the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
