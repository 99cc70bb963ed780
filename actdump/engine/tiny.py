"""Tiny forwards: a few made-up tokens through a model, and what ports hold of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actdump.address import Address, Child, Port
from actdump.engine.axes import ALONE, TOGETHER
from actdump.engine.capture import stream
from actdump.engine.hooks import Hooks, Stop, copied
from actdump.engine.site import Feed, Site, bind
from actdump.errors import UsageError
from actdump.memory import memory_for, reworded
from actdump.plan import Batch
from actdump.tap import Tap

# The row of TOGETHER that begins with the prompt of ALONE: not the first, the last or the middle one, so that a stray [0] or
# [-1] and a reversed batch would show.
ROW = 1


def probe_ids(feed: Feed) -> dict[str, Tensor]:
    """Token ids for the probes; `changed` differs from `together` in everything but the row's own prompt, which it fills up with the
    pad id, and `filled` from `changed` in that alone."""
    generator = torch.Generator().manual_seed(0)
    low = feed.vocabulary // 4 if feed.vocabulary >= 8 else 0
    together, changed = (torch.randint(low, feed.vocabulary, TOGETHER, generator=generator, device="cpu") for _ in range(2))
    together[together == feed.pad] = plain_id(feed)
    prompt = together[ROW, : ALONE[1]]
    changed[ROW, : ALONE[1]] = prompt
    changed[ROW, ALONE[1] :] = feed.pad
    filled = changed.clone()
    filled[ROW, ALONE[1] :] = together[ROW, ALONE[1] :]
    return {"alone": prompt[None], "together": together, "changed": changed, "filled": filled}


def plain_id(feed: Feed) -> int:
    """The id of a token that is not the pad id."""
    return (feed.pad + 1) % feed.vocabulary


def observe(
    model: nn.Module,
    sites: Sequence[Site],
    feed: Feed,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    like: Sequence[list[Any]] | None = None,
    first: bool = False,
) -> list[list[Any]]:
    """Run one forward; for each site, what its port held at each call.

    Args:
        first: it is the first forward, of a prompt alone; what it adds to what the model keeps, every forward adds.
        like: what another forward gave; this one ends when every site was called as often. Without it, it runs to its end.
    """
    seen: list[list[Any]] = [[] for _ in sites]
    missing = {place for place, calls in enumerate(like or ()) if calls}

    def keep(place: int, held: Any) -> None:
        seen[place].append(copied(held))
        if like is not None and len(seen[place]) == len(like[place]):
            missing.discard(place)
            if not missing:
                raise Stop

    with torch.no_grad(), Hooks(sites, keep), _worded(model, ids.numel()):
        try:
            model(**feed.arguments(ids, mask))
        except Stop:
            pass
        finally:
            if first:
                feed.state.settle()
            else:
                feed.state.restored()
    return seen


@contextmanager
def _worded(model: nn.Module, tokens: int) -> Iterator[None]:
    """Word what a forward of so many tokens raises."""
    remedy = "use a narrower `model.dtype`, `device_map: auto`, or `device: cpu`"
    with memory_for(f"a forward of {tokens} tokens", remedy), reworded(partial(_unfit, model)):
        yield


def _unfit(model: nn.Module, error: Exception) -> UsageError:
    whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    hint = "; `model.task: text-encoding` loads the encoder alone, of families that have one by itself, as T5"
    return UsageError(
        f"{type(model).__name__} does not run on token ids alone: {type(error).__name__}: {error}{hint if whole else ''}"
    )


def ports(model: nn.Module, port: Port) -> list[Site]:
    """The inputs or the outputs of all modules."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    return bind(model, [Tap(path, Address(tuple(map(Child, filter(None, path.split(".")))), port)) for path in paths])


def try_out(model: nn.Module, sites: Sequence[Site], feed: Feed, tokens: int) -> None:
    """Run a prompt of so many tokens as far as a run does, and keep nothing.

    Raises:
        UsageError: it does not run.
    """
    batch = Batch((0,), ((plain_id(feed),) * tokens,))
    with torch.no_grad(), _worded(model, tokens):
        stream(model, sites, feed, batch, lambda _: None)
