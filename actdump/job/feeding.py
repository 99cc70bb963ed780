"""Prompts on their way from the spec to tokens and parts."""

import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from actdump import prompts, store
from actdump.errors import MissingError, SpecError
from actdump.job.bound import Bound, shards_for
from actdump.job.underway import patiently
from actdump.job.watching import Watcher
from actdump.plan import Part, parts
from actdump.spec import Spec

if TYPE_CHECKING:
    from actdump.model import Source

log = logging.getLogger(__name__)


@contextmanager
def standard_input(spec: Spec, check_stop: Callable[[], None] = lambda: None) -> Iterator[Path | None]:
    """Keep what comes on standard input, because it is read more than once.

    Args:
        check_stop: called again and again while input may still come; it raises to end that.
    """
    if spec.prompts.file != "-":
        yield None
        return
    if sys.stdin is None:
        raise MissingError("prompts: standard input is closed; pipe the prompts in, or name a file")
    with tempfile.TemporaryDirectory(prefix="actdump-") as place:
        path = Path(place) / "stdin"
        patiently(lambda: _copy(sys.stdin.buffer, path), check_stop)
        yield path


def _copy(source: BinaryIO, path: Path) -> None:
    with store.storage(path), path.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def tokenised(
    spec: Spec, source: "Source", tokenizer: Any | None, stdin: Path | None
) -> Iterator[tuple[list[prompts.Prompt], list[list[int]]]]:
    """The spec's prompts in order, some at a time, with the token ids of each."""
    from actdump import model

    return model.tokenise(prompts.read(spec.prompts, stdin), tokenizer, spec.tokenizer, source)


def tokenizer_for(spec: Spec, source: "Source", watcher: Watcher) -> Any | None:
    """The tokenizer; `None` where no prompt needs one, or the model has none."""
    from actdump import model

    if spec.prompts.rows is not None and all(row.input_ids is not None for row in spec.prompts.rows):
        return None
    watcher.step("loading the tokenizer")
    return model.load_tokenizer(spec.tokenizer, source)


def cut(spec: Spec, bound: Bound, lengths: Sequence[int], stdin: Path | None) -> tuple[Part, ...]:
    """The parts of the spec's prompts, which have these numbers of tokens.

    Raises:
        SpecError: a prompt has too few tokens for a position that a tap asks for.
    """
    if min(lengths) < bound.least:
        number, *others = (number for number, length in enumerate(lengths) if length < bound.least)
        prompt = next(islice(prompts.read(spec.prompts, stdin), number, None))
        site = max(bound.sites, key=lambda site: site.least)
        raise SpecError(
            f"{prompt.where}: prompt `{prompt.id}` has {lengths[number]} tokens, and `{site.tap.name}` asks for a position that "
            f"needs {site.least}{f' ({len(others):,} more like it)' if others else ''}; use a slice, which takes what is there"
        )
    for column in bound.columns:
        if not any(map(column.layout.rows, set(lengths))):
            log.warning(
                "%s: keeps nothing of any prompt, because none has tokens at the positions that it asks for", column.name
            )
    limits = spec.shard
    return parts(bound.columns, lengths, most_bytes=limits.size, most_tokens=limits.tokens, most_shards=shards_for(spec, bound))
