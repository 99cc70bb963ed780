"""A finished dump, opened."""

import json
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from actdump.errors import DataError, MissingError, UsageError, did_you_mean
from actdump.format import Folder, Manifest, manifest_from_json
from actdump.plan import Column
from actdump.reader.prompts import Prompts
from actdump.reader.shard import OpenShard
from actdump.reader.values import Values

# Shards that stay mapped. None keeps a file open; what was read of them counts as the process's memory until the system wants it back.
# Of 60 shards in any order, 19,000 prompts a second were read with all of them mapped, and 3,000 with 16.
KEPT = 256


def open_dump(path: str | Path) -> "Dump":
    """Open a finished dump.

    Raises:
        MissingError: the folder holds no finished dump.
        DataError: its manifest cannot be read.
    """
    folder = Folder(Path(path).absolute())  # it is read as needed, and by then the working folder may be another
    if folder.root.is_file():
        raise MissingError(f"{path} is a file; name the folder of a dump")
    if not folder.root.is_dir():
        raise MissingError(f"{path}: there is no such folder")
    if not folder.manifest.is_file():
        unfinished = (
            "the dump in it is not finished; the run that made it goes on with it"
            if folder.plan.is_file()
            else "it holds no dump"
        )
        raise MissingError(f"{path}: {unfinished} (there is no manifest.json)")
    try:
        return Dump(folder, manifest_from_json(json.loads(folder.manifest.read_bytes())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder.manifest}: not a manifest: {error}") from None
    except DataError as error:
        raise DataError(f"{folder.manifest}: {error}") from None


class Dump:
    """A finished dump, read lazily: shards are mapped into memory, and only rows that are asked for are read.

    Attributes:
        manifest: the description of the dump.
        names: the taps.
        prompts: the prompts, by number or id.
        shard_at: the shard of a place in the manifest, opened.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.names = [column.name for column in manifest.columns]
        self.prompts = Prompts(self)
        self._firsts = [shard.first for shard in manifest.shards]
        self.shard_at = lru_cache(KEPT)(lambda place: OpenShard(folder, manifest.shards[place]))

    def __getitem__(self, name: str) -> Values:
        """The values of a tap, by the user's name, the address as written, or the resolved address.

        Raises:
            UsageError: there is no such tap, or there are several at the address.
        """
        found = self._columns(name)
        if len(found) == 1:
            return Values(self, found[0])
        if found:
            names = ", ".join(f"`{column.name}`" for column in found)
            raise UsageError(f"{self.folder.root}: several taps are at `{name}`: {names}; name one of them")
        stem = str(name).partition("[")[0]
        group = [each for each in self.names if each.startswith(f"{stem}[")]
        hint = f"; there are `{group[0]}` to `{group[-1]}`" if len(group) > 1 else did_you_mean(str(name), self.names)
        raise UsageError(f"{self.folder.root}: there is no tap `{name}`{hint}")

    def __contains__(self, name: object) -> bool:
        """Whether `dump[name]` is there."""
        return len(self._columns(name)) == 1

    def _columns(self, name: object) -> list[Column]:
        spellings = (
            [column for column in self.manifest.columns if getattr(column, spelling) == name]
            for spelling in ("name", "resolved", "address")
        )
        return min(filter(None, spellings), key=len, default=[])

    def __len__(self) -> int:
        """The number of taps, as `iter` gives them."""
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, as of a data loader, which maps the shards for itself."""
        return Dump, (self.folder, self.manifest)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        held = f"{self.manifest.prompts} prompts, {self.manifest.tokens} tokens, taps {', '.join(self.names)}"
        return f"Dump({str(self.folder.root)!r}: {held})"

    def shard_of(self, number: int) -> OpenShard:
        """The shard that holds a prompt, opened."""
        return self.shard_at(bisect_right(self._firsts, number) - 1)
