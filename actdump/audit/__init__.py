"""The audit: are the values in a dump those of its prompts run alone?

Prompts run alone here, unpadded, under plain PyTorch hooks, and are compared with what is read back from the files. Nothing of
the engine takes part, so that a fault of the engine cannot hide itself; what an address means is worked out once more. The model is
that of the run, given back as it was before the first forward (`State`).
"""

from actdump.audit.choice import Choice, choose
from actdump.audit.comparison import Audit, Tally, compare, to_json
from actdump.audit.finished import finished

__all__ = ["Audit", "Choice", "Tally", "choose", "compare", "finished", "to_json"]
