"""Prompts on their way from the spec to tokens and parts."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actdump import prompts
from actdump.errors import SpecError
from actdump.job.bound import Bound
from actdump.plan import Cutter
from actdump.spec import Spec


@contextmanager
def standard_input(spec: Spec) -> Iterator[Path | None]:
    """Keep what comes on standard input, because it is read more than once."""
    if spec.prompts.file != "-":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="actdump-") as place:
        path = Path(place) / "stdin"
        with path.open("wb") as file:
            while piece := sys.stdin.buffer.read(1 << 20):
                file.write(piece)
        yield path


def cutter_for(spec: Spec, bound: Bound) -> Cutter:
    return Cutter(bound.columns, most_bytes=spec.shard.size, most_tokens=spec.shard.tokens)


def tokenised(spec: Spec, bound: Bound, stdin: Path | None) -> Iterator[tuple[prompts.Prompt, list[int]]]:
    from actdump import model

    tokenizer = model.load_tokenizer(spec.tokenizer, bound.source) if _needs_tokenizer(spec) else None
    for prompt, ids in model.tokenise(prompts.read(spec.prompts, stdin), tokenizer, spec.tokenizer, bound.source):
        if len(ids) < bound.least:
            site = max(bound.sites, key=lambda site: site.least)
            raise SpecError(
                f"{prompt.where}: prompt `{prompt.id}` has {len(ids)} tokens, and `{site.tap.name}` asks for a position that needs "
                f"{site.least}; use a slice, which takes what is there"
            )
        yield prompt, ids


def _needs_tokenizer(spec: Spec) -> bool:
    return spec.prompts.rows is None or any(row.input_ids is None for row in spec.prompts.rows)


def content_of(prompt: prompts.Prompt) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What the user gave, for prompts.jsonl; token ids stand in the shard."""
    content = prompt.content
    if isinstance(content, str):
        return {"text": content}, prompt.fields
    return ({} if isinstance(content[0], int) else {"messages": content}), prompt.fields
