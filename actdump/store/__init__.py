"""A dump being written: the plan and the tokens first, shards at their final offsets, the manifest last.

Every file is written under a temporary name in its own folder, flushed to the device, and renamed; so a file with its final
name is whole. A shard is finished when its record is there, which is written after it; a part is done when all of its shards are.
"""

from actdump.store.checks import check_free, check_space, check_writable, taken
from actdump.store.crew import WAIT, Crew, at_work
from actdump.store.files import being_written, free_space, storage, sweep, write_atomically
from actdump.store.intake import Intake, part_tokens
from actdump.store.locks import Lock, me, number_and_host
from actdump.store.manifest import gathered, seal
from actdump.store.pending import Pending, Pendings
from actdump.store.removal import clear, reopen
from actdump.store.shards import metadata
from actdump.store.standing import complete, done, finished, has_tokens, load_plan, missing, origins, restamp, statistics
from actdump.store.status import Status, status
from actdump.store.threads import shut_down
from actdump.store.writer import AHEAD, BESIDE, Writer

__all__ = [
    "AHEAD",
    "BESIDE",
    "WAIT",
    "Crew",
    "Intake",
    "Lock",
    "Pending",
    "Pendings",
    "Status",
    "Writer",
    "at_work",
    "being_written",
    "check_free",
    "check_space",
    "check_writable",
    "clear",
    "complete",
    "done",
    "finished",
    "free_space",
    "gathered",
    "has_tokens",
    "load_plan",
    "me",
    "metadata",
    "missing",
    "number_and_host",
    "origins",
    "part_tokens",
    "reopen",
    "restamp",
    "seal",
    "shut_down",
    "statistics",
    "status",
    "storage",
    "sweep",
    "taken",
    "write_atomically",
]
