"""What all tests need."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: on a busy machine, spinning threads take minutes

from actdump.model import avoid_faulty_amx

avoid_faulty_amx()  # oneDNN looks at its environment once, at its first use, which could be in any test
