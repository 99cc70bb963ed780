"""What all tests need."""

from actdump.model import avoid_faulty_amx

avoid_faulty_amx()  # oneDNN looks at its environment once, at its first use, which could be in any test
