"""The hook engine. `bind` finds modules, `probe` labels axes, `capture` runs one forward.

What is captured for a prompt at a tap is what the tap would hold if that prompt were run alone, unpadded; the batch axis is
dropped. The probe makes this so: it sends tiny inputs of two shapes through the model and compares the shapes that each tap
gave, which labels every axis; then it shows, on values, that a prompt cut out of a padded batch is the prompt run alone.
"""

from actdump.engine.attention import any_shape
from actdump.engine.axes import Fault
from actdump.engine.capture import capture, evened, stream
from actdump.engine.dice import Dice
from actdump.engine.measure import Measured
from actdump.engine.outline import outline
from actdump.engine.padded import Padded, positions
from actdump.engine.probe import probe, probe_width
from actdump.engine.rows import Rows
from actdump.engine.site import Feed, Site, bind, feed_for
from actdump.engine.tiny import try_out
from actdump.engine.twin import breaking_off, twin
from actdump.engine.whole import capture_whole

__all__ = [
    "Dice",
    "Fault",
    "Feed",
    "Measured",
    "Padded",
    "Rows",
    "Site",
    "any_shape",
    "bind",
    "breaking_off",
    "capture",
    "capture_whole",
    "evened",
    "feed_for",
    "outline",
    "positions",
    "probe",
    "probe_width",
    "stream",
    "try_out",
    "twin",
]
