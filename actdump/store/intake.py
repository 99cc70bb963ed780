"""Prompts on their way into a dump, and the token ids of its parts."""

import json
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from actdump.format import Folder, temporary
from actdump.plan import Cutter, Part, Plan
from actdump.store.files import flush_folder, storage, to_json, write_atomically

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Intake:
    """Prompts on their way into the dump: token ids and lines are spooled to disk, parts are cut. Memory does not grow.

    Use as a context manager, then `commit`.
    """

    def __init__(self, folder: Folder, cutter: Cutter) -> None:
        self.folder = folder
        self.cutter = cutter
        self.tokens_hash, self.lines_hash, self.lines_bytes = sha256(), sha256(), 0
        self.tokens = self._open(folder.tokens)
        self.lines = self._open(folder.prompts)

    def _open(self, final: Path) -> Any:
        with storage(final):
            return temporary(final, os.getpid()).open("wb")

    def add(self, number: int, id: str, ids: Sequence[int], content: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        """Take the next prompt."""
        words = array("i", (len(ids), *ids)).tobytes()
        self.tokens_hash.update(words)
        line: dict[str, Any] = {"number": number, "id": id, "tokens": len(ids), "shard": self.cutter.add(len(ids)), **content}
        if fields:
            line["fields"] = dict(fields)
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self.lines_hash.update(text)
        self.lines_bytes += len(text)
        with storage(self.folder.root):
            self.tokens.write(words)
            self.lines.write(text)

    @property
    def facts(self) -> dict[str, Any]:
        """What came in: sha256 of the token ids, and size and sha256 of prompts.jsonl."""
        lines = {"bytes": self.lines_bytes, "sha256": self.lines_hash.hexdigest()}
        return {"tokens": self.tokens_hash.hexdigest(), "prompts": lines}

    def commit(self, plan: Plan | None, stamps: Mapping[str, Any], as_json: Callable[[Plan], dict[str, Any]]) -> None:
        """Write the plan (`None`: it is there already), then give tokens and prompts their names."""
        with storage(self.folder.root):
            for file in (self.tokens, self.lines):
                file.flush()
                os.fsync(file.fileno())
        if plan is not None:
            write_atomically(self.folder.plan, to_json({**as_json(plan), "stamps": stamps}))
        with storage(self.folder.root):
            for final in (self.folder.tokens, self.folder.prompts):
                os.replace(temporary(final, os.getpid()), final)
            flush_folder(self.folder.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file, final in ((self.tokens, self.folder.tokens), (self.lines, self.folder.prompts)):
            file.close()
            temporary(final, os.getpid()).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something
            self.folder.root.rmdir()


def part_tokens(folder: Folder, plan: Plan, part: Part) -> "list[Array]":
    """The token ids of each prompt of a part."""
    import numpy as np

    before = sum(earlier.tokens + earlier.prompts for earlier in plan.parts[: part.number])
    words = np.fromfile(folder.tokens, dtype="<i4", count=part.tokens + part.prompts, offset=4 * before)
    prompts, place = [], 0
    for _ in range(part.prompts):
        length = int(words[place])
        prompts.append(words[place + 1 : place + 1 + length])
        place += 1 + length
    return prompts
