"""Prompts on their way into a dump, and the token ids of its parts."""

import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from actdump.format import Folder, plan_to_json, temporary
from actdump.plan import Part, Plan, Span
from actdump.prompts import Prompt
from actdump.store.files import flush_folder, storage, to_json, write_atomically
from actdump.store.locks import me

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

SPOOL = "prompts"  # what the lines are kept in until the shards are known
LINES = 1024  # lines of prompts.jsonl written at a time
_GAP = "\t"  # stands for a line's shard until that is known; JSON text holds no other tab
_json = json.JSONEncoder(ensure_ascii=False).encode


class Intake:
    """Prompts on their way into the dump: token ids and lines are spooled to disk, so that memory does not grow with them.

    Use as a context manager; `add` prompts, `place` them in shards, then `commit`.

    Attributes:
        lengths: the number of tokens of each prompt.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.lengths = array("i")
        self.tokens_hash, self.lines_hash, self.lines_bytes = sha256(), sha256(), 0
        self.tokens = self._open(folder.tokens)
        self.lines = self._open(folder.prompts)
        self.spool = self._open(folder.root / SPOOL)  # a file without a name gets one of its own in NFS, which is nobody's

    def _open(self, final: Path) -> Any:
        with storage(final):
            return temporary(final, me()).open("w+b")

    def add(self, prompts: Sequence[Prompt], ids: Sequence[list[int]]) -> None:
        """Take the next prompts."""
        words = array("i")
        for one in ids:
            words.append(len(one))
            words.fromlist(one)
        self.tokens_hash.update(words)
        self.lengths.extend(map(len, ids))
        with storage(self.folder.root):
            self.tokens.write(words)
            self.spool.write(_lines(prompts, ids))

    def place(self, shards: Iterable[Span]) -> None:
        """Write prompts.jsonl, now that the shard of each prompt is known."""
        with storage(self.folder.root):
            self.spool.seek(0)
            for shard in shards:
                for start in range(0, shard.prompts, LINES):
                    lines = islice(self.spool, min(LINES, shard.prompts - start))
                    self._write(b"".join(lines).replace(_GAP.encode(), b"%d" % shard.number))

    def _write(self, text: bytes) -> None:
        self.lines_hash.update(text)
        self.lines_bytes += len(text)
        self.lines.write(text)

    @property
    def facts(self) -> dict[str, Any]:
        """What came in: sha256 of the token ids, and size and sha256 of prompts.jsonl."""
        lines = {"bytes": self.lines_bytes, "sha256": self.lines_hash.hexdigest()}
        return {"tokens": self.tokens_hash.hexdigest(), "prompts": lines}

    def commit(self, plan: Plan | None, stamps: Mapping[str, Any]) -> None:
        """Write the plan (`None`: it is there already), then give tokens and prompts their names."""
        with storage(self.folder.root):
            for file in (self.tokens, self.lines):
                file.flush()
                os.fsync(file.fileno())
        if plan is not None:
            write_atomically(self.folder.plan, to_json({**plan_to_json(plan), "stamps": stamps}))
        with storage(self.folder.root):
            for final in (self.folder.tokens, self.folder.prompts):
                os.replace(temporary(final, me()), final)
            flush_folder(self.folder.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.spool, self.tokens, self.lines):
            with suppress(OSError):  # a full disk, which was told before, or will not be missed
                file.close()
        for final in (self.folder.tokens, self.folder.prompts, self.folder.root / SPOOL):
            temporary(final, me()).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something
            self.folder.root.rmdir()


def _lines(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> bytes:
    """The lines of prompts.jsonl, each with a gap for its shard."""
    lines = []
    for prompt, one in zip(prompts, ids, strict=True):
        content = prompt.content
        lines.append(f'{{"number": {prompt.number}, "id": {_json(prompt.id)}, "tokens": {len(one)}, "shard": {_GAP}')
        if isinstance(content, str):
            lines.append(f', "text": {_json(content)}')
        elif not isinstance(content[0], int):  # token ids stand in the shard
            lines.append(f', "messages": {_json(content)}')
        lines.append(f', "fields": {_json(prompt.fields)}}}\n' if prompt.fields else "}\n")
    return "".join(lines).encode()


def part_tokens(folder: Folder, plan: Plan, part: Part) -> "list[Array]":
    """The token ids of each prompt of a part."""
    import numpy as np

    before = plan.starts[part.number] + part.first  # each prompt has its length before it
    with storage(folder.tokens, "read"):
        words = np.fromfile(folder.tokens, dtype="<i4", count=part.tokens + part.prompts, offset=4 * before)
    prompts, place = [], 0
    for _ in range(part.prompts):
        length = int(words[place])
        prompts.append(words[place + 1 : place + 1 + length])
        place += 1 + length
    return prompts
