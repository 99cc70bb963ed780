"""What all tests need."""

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: on a busy machine, spinning threads take minutes

import pytest
import torch

from actdump.model import avoid_faulty_amx

avoid_faulty_amx()  # oneDNN looks at its environment once, at its first use, which could be in any test


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
