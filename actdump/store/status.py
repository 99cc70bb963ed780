"""How far a dump is, from its folder alone: parts that are done, in hand, or missing."""

from contextlib import suppress
from dataclasses import dataclass

from actdump.errors import ActdumpError, DataError, MissingError, Stopped
from actdump.format import Folder
from actdump.store.crew import at_work
from actdump.store.locks import Lock
from actdump.store.standing import complete, done, load_plan, origins


@dataclass(frozen=True)
class Hand:
    """A part that is being worked on, and by whom."""

    part: int
    process: int
    host: str


@dataclass(frozen=True)
class Status:
    """How far a dump is.

    Attributes:
        complete: every part is done, and the dump is sealed.
        sealed: the manifest is there, and every shard with its size; what is in records and shards was not read.
        prompts, tokens: how many there are; `prompts_done`: those in parts that are done.
        parts: how many there are.
        done, missing: numbers of parts; a part in hand is in neither.
        working: the parts in hand.
    """

    complete: bool
    sealed: bool
    prompts: int
    tokens: int
    prompts_done: int
    parts: int
    done: tuple[int, ...]
    working: tuple[Hand, ...]
    missing: tuple[int, ...]


def status(folder: Folder) -> Status:
    """How far the dump in a folder is.

    Raises:
        MissingError: there is none.
        DataError: its plan is gone or cannot be read.
        Stopped: its plan is still being made.
    """
    if folder.root.is_file():
        raise MissingError(f"{folder.root} is a file; name the folder of a dump")
    if not folder.root.is_dir():
        raise MissingError(f"{folder.root}: there is no such folder")
    loaded = load_plan(folder)
    if loaded is None:
        raise _planless(folder)
    plan, _ = loaded
    finished = {part.number: part for part in plan.parts if done(folder, part, plan.digest)}
    working = tuple(Hand(part, *who) for part, who in sorted(at_work(folder).items()) if part not in finished)
    held = {hand.part for hand in working}
    sealed = complete(folder, plan)
    return Status(
        sealed and len(finished) == len(plan.parts),
        sealed,
        plan.prompts,
        plan.tokens,
        sum(part.prompts for part in finished.values()),
        len(plan.parts),
        tuple(finished),
        working,
        tuple(part.number for part in plan.parts if part.number not in finished and part.number not in held),
    )


def _planless(folder: Folder) -> ActdumpError:
    """Why a folder has no plan."""
    if origins(folder):
        return DataError(f"{folder.root}: its plan.json is gone; `actdump run --repair` makes it again")
    with suppress(OSError):
        if Lock.is_taken(folder.lock):
            return Stopped(f"{folder.root}: its plan is still being made")
    return MissingError(f"{folder.root}: it holds no dump (there is no plan.json)")
