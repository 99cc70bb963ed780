"""What GNU make has to know of a dump: the files that it depends on, and when it was last found to be theirs."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actdump import inputs, store
from actdump.errors import UsageError
from actdump.format import Folder
from actdump.spec import Spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dependencies:
    """The files that decide a dump, each with its modification time (ns) before it was read."""

    times: Mapping[Path, int]

    def date(self, target: Path) -> None:
        """Give a dump's manifest the time at which make stops asking, where it would ask in vain, and goes on where it must.

        A manifest that is newer than the files keeps its time, unless one of them changed while the dump was made. Otherwise it
        gets the time of the newest file: whatever is written into one from now on is newer still.
        """
        newest = max(self.times.values(), default=0)
        changed = any(time_of(path) != time for path, time in self.times.items())
        if target.stat().st_mtime_ns >= newest and not changed:
            return
        try:
            os.utime(target, ns=(newest, newest))
            if target.stat().st_mtime_ns < newest:  # a file system with coarser times
                os.utime(target)
        except OSError as error:
            log.warning("%s: its time cannot be set, so make will ask again: %s", target, error.strerror)

    def check_place_of(self, depfile: Path, folder: Folder) -> None:
        """Raises:
        UsageError: the rules would be written over a file that the dump is made from or consists of.
        StorageError: they cannot be written there.
        """
        place, root = depfile.resolve(), folder.root.resolve()
        if place in {path.resolve() for path in self.times}:
            raise UsageError(f"--depfile: `{depfile}` is what the dump is made from; name another file")
        if place.is_relative_to(root) and Folder(root).written_by_us(place):
            raise UsageError(f"--depfile: `{depfile}` is a file of the dump itself; name another one")
        if not place.exists():  # a pipe or a device is written where it is, and so is nothing where the rules are as they were
            store.check_writable(place.parent)

    def rules(self, target: Path) -> bytes:
        """The target's rule in make's syntax.

        After it comes a rule without a recipe for each file, so that one that is gone makes make ask, and is no error.

        Raises:
            UsageError: make has no way to write a name.
        """
        files = " ".join(map(escaped, self.times))
        rules = f"{as_target(target)}: {files}\n" + "".join(f"\n{as_target(file)}:\n" for file in self.times)
        return os.fsencode(rules)


def write(path: Path, rules: bytes) -> None:
    """Write rules for make into a file, unless it holds them already; or into a device or a pipe, which stays what it is.

    Raises:
        StorageError: the file cannot be written.
    """
    if path.exists() and not path.is_file():
        with store.storage(path):
            path.write_bytes(rules)
    elif not path.exists() or path.read_bytes() != rules:
        with store.storage(path.parent, "made"):
            path.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomically(path.resolve(), rules)  # a link stays one


def of(spec: Spec, file: Path, time: int) -> Dependencies:
    """The files that decide a spec's dump: its own, the prompt file, and those of a local model and tokenizer.

    Args:
        time: the modification time of the spec's file before it was read.

    Raises:
        MissingError: one is not there.
    """
    named = inputs.of(spec, stdin=Path(os.devnull))
    times = {path: named.stamps[role][1] for role, path in named.files.items()}
    return Dependencies({path: each for path, each in {file: time, **times}.items() if path.is_file()})  # no pipes


def time_of(path: Path) -> int:
    """The modification time of a file in ns; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def escaped(path: Path) -> str:
    """A file's name as GNU make reads it among the files that a target depends on.

    Blanks, `#`, `:` and `$` can be escaped. What cannot be, or not in every place (make 4.3), is written as the wildcard `?`: a file
    of the same name but for that character would become a dependency too, which does no harm.
    """
    name = re.sub(r"[;=|&()\\*\[~]|[^\S ]| $", "?", str(path))
    if "?" in name and "%" in name:
        raise UsageError(f"--depfile: make cannot read a name with `%` beside other marks: `{path}`; rename it")
    return re.sub(r"[ #:]", r"\\\g<0>", name).replace("$", "$$")


def as_target(path: Path) -> str:
    """The same before the colon, where `%` would make a rule a pattern."""
    return escaped(path).replace("%", "\\%")
