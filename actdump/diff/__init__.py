"""Two dumps compared: the same prompts and taps or not, how far apart the values are, and where they part first."""

from actdump.diff.comparison import Comparison, Difference, Limits, Parting, to_json
from actdump.diff.matching import compare

__all__ = ["Comparison", "Difference", "Limits", "Parting", "compare", "to_json"]
