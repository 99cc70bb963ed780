"""A block: its input, the taps saved in it, and the forward at its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from actdump.address import Address
from actdump.engine import Feed, Site, bind, capture, capture_whole, feed_for, probe
from actdump.errors import ActdumpError, AddressError, TraceError, UsageError
from actdump.plan import Batch, Budget, batches
from actdump.state import State
from actdump.tap import Tap
from actdump.tracing.standing import Standing
from actdump.tracing.values import Saved

BUDGET = Budget(tokens=4096)  # padded tokens that several prompts of one trace share in a forward


@dataclass
class Traced:
    """What the references to one model share.

    Attributes:
        open: the block that is open, if one is.
        calls: how often a module ran in forwards on that kind of input, once counted, by the number of tokens.
        probed: sites with their axes, and how to run the model for them, by address, call and autocast type.
        left: the model as the last trace left it; what was counted and probed holds as long as nobody changes it.
        weights: the first values of each weight when the model was last probed, for those who write past torch's count of writes.
    """

    module: nn.Module
    tokenizer: Any = None
    open: "Tracer | None" = None
    calls: dict[tuple[object, ...], dict[int, int]] = field(default_factory=dict)
    probed: dict[tuple[object, ...], tuple[Site, Feed]] = field(default_factory=dict)
    left: Standing | None = None
    weights: str | None = None

    def forget_if_changed(self) -> None:
        """Forget what was counted and probed, where somebody changed the model since the last trace."""
        if self.left is None or self.left.facts != Standing.of(self.module).facts:
            self.calls.clear()
            self.probed.clear()

    def forget_if_overwritten(self) -> None:
        """Forget what was probed, where somebody wrote into the weights through `.data`."""
        from actdump.model import fingerprint

        before, self.weights = self.weights, fingerprint(self.module)
        if self.weights != before:
            self.probed.clear()


@dataclass(frozen=True)
class _Forward:
    """The arguments of one forward. Forwards of one kind, on as many tokens, are taken to run the same modules equally often.

    Attributes:
        kind: `None` where the forward is to run to its end, because it may write into its arguments, such as a cache.
        tokens: of a prompt; the kind of the model's own arguments says all.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kind: object
    tokens: int = 0


_Prompts = list[Sequence[int]]


def work(traced: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Forward | _Prompts:
    if not args and not kwargs:
        raise UsageError("trace needs an input: a prompt, a list of prompts, token ids, or the model's own arguments")
    given = args[0] if args else None
    if isinstance(given, np.ndarray):
        given = given.tolist() if given.ndim == 1 else torch.from_numpy(given)
    takes_ids = "input_ids" in signature(traced.module.forward).parameters
    if takes_ids and len(args) == 1 and isinstance(given, Tensor) and given.ndim > 1:
        given = {"input_ids": given}
    if isinstance(given, Mapping) and len(args) == 1:
        return _own((), {**given, **kwargs})
    several = isinstance(given, str | list | tuple) or (isinstance(given, Tensor) and given.ndim == 1)
    if takes_ids and len(args) == 1 and not kwargs and not several:
        raise UsageError(f"trace takes a prompt, a list of prompts, token ids, or the model's own arguments, not {given!r}")
    texts = isinstance(given, str) or (isinstance(given, list | tuple) and any(isinstance(entry, str) for entry in given))
    if not texts and not (takes_ids and isinstance(given, list | tuple | Tensor)):
        return _own(args, kwargs)
    if len(args) > 1 or kwargs:
        raise UsageError("prompts stand alone in trace; to pass further arguments, pass all of them: `input_ids=…`, …")
    if not takes_ids and traced.tokenizer is None:
        raise UsageError("the model takes no token ids and has no tokenizer, so it cannot be run on text")
    feed = feed_for(traced.module)
    if isinstance(given, list | tuple) and not all(map(_is_number, given)):
        return [_ids(traced, feed, prompt, f"prompt {number}") for number, prompt in enumerate(given)]
    ids = torch.tensor([_ids(traced, feed, given, "the prompt")], device="cpu")
    return _Forward((), feed.arguments(ids, None), "prompt", ids.numel())


def _is_number(entry: object) -> bool:
    return isinstance(entry, int | np.integer) and not isinstance(entry, bool)


def _own(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Forward:
    if isinstance(kwargs.get("input_ids"), list):
        raise UsageError(
            '`input_ids` is a list, and the model takes tensors: ask the tokenizer for them with `return_tensors="pt"`'
        )
    given = [*enumerate(args), *kwargs.items()]
    plain = all(isinstance(value, Tensor | int | float | str | None) for _, value in given)
    return _Forward(args, kwargs, tuple((name, _likeness(value)) for name, value in given) if plain else None)


def _likeness(value: object) -> object:
    """What of an argument is taken to decide which modules run, and how often."""
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _ids(traced: Traced, feed: Feed, prompt: Any, which: str) -> Sequence[int]:
    if isinstance(prompt, str) and prompt:
        if traced.tokenizer is None:
            raise UsageError(f"{which} is a string, but the model has no tokenizer: pass token ids, or wrap(module, tokenizer)")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UsageError(f"{which} holds half a character (a lone surrogate), which is no text")
        prompt = traced.tokenizer(prompt)["input_ids"]
    ids = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) and prompt.ndim == 1 else prompt
    if isinstance(ids, str | list | tuple) and not ids:
        raise UsageError(f"{which} is empty; a model needs at least one token")
    if not isinstance(ids, list | tuple) or not all(map(_is_number, ids)):
        chat = "; the tokenizer's `apply_chat_template(messages, return_dict=False)` makes ids of chat messages"
        raise UsageError(f"{which} is neither a string nor token ids: {prompt!r}{chat if isinstance(prompt, Mapping) else ''}")
    if not 0 <= min(ids) <= max(ids) < feed.vocabulary:
        raise UsageError(f"{which} has a token id outside the vocabulary, which is 0 to {feed.vocabulary - 1}")
    return list(map(int, ids))


class Tracer:
    """A `trace` block: collects taps while it is open, and runs the model when it ends.

    Raises:
        TraceError: the model is being traced already, or the block is over.
    """

    def __init__(self, traced: Traced, work: _Forward | _Prompts) -> None:
        self.traced = traced
        self.over = False
        self._work = work
        self._saved: dict[Tap, Saved] = {}

    def keep(self, address: Address, call: int | None) -> Saved:
        """Register a tap; the same place saved twice is one `Saved`."""
        name = str(address) if call is None else f"{address} (call {call})"
        return self._saved.setdefault(Tap(name, address, call=call), Saved(self, name))

    def __enter__(self) -> Self:
        if self.over:
            raise TraceError("this `trace` block is over: call `trace` again for another")
        if self.traced.open is not None:
            raise TraceError("this model is being traced already: end one `trace` block before the next")
        self.traced.open = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.over = True
        saved, self._saved = self._saved, {}
        try:
            values = [] if kind is not None or not saved else self._run(list(saved))
        finally:
            self.traced.open = None
        if not values:
            return
        for each, value in zip(saved.values(), values, strict=True):
            each.fill(value)

    def _run(self, taps: Sequence[Tap]) -> list[Any]:
        run = _run_whole if isinstance(self._work, _Forward) else _run_each
        self.traced.forget_if_changed()
        try:
            return run(self.traced, cast(Any, self._work), taps)
        except ActdumpError:
            raise
        except Exception as error:
            _check_length(self.traced.module, self._work, error)
            raise
        finally:
            self.traced.left = Standing.of(self.traced.module)


def _check_length(model: nn.Module, work: _Forward | _Prompts, error: Exception) -> None:
    """Tell a forward that failed on a prompt with more tokens than the model's config allows.

    Raises:
        TraceError: there is such a prompt.
    """
    from actdump.model import positions

    config = getattr(model, "config", None)
    limit = positions(config) if hasattr(config, "get_text_config") else None
    tokens = work.tokens if isinstance(work, _Forward) else max(map(len, work))
    if limit is not None and tokens > limit:
        raise TraceError(
            f"{type(model).__name__} does not run on a prompt of {tokens:,} tokens, of which its config allows {limit:,}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _run_whole(traced: Traced, forward: _Forward, taps: Sequence[Tap]) -> list[Any]:
    """The values as the modules hold them, of one forward."""
    sites = bind(traced.module, taps)
    counts = [traced.calls.setdefault((tap.address.module, forward.kind), {}) for tap in taps]
    known = [_calls(each, forward.tokens) if forward.kind is not None else None for each in counts]
    counted = [replace(site, calls=calls) for site, calls in zip(sites, known, strict=True)]
    # Whoever gives arguments of their own may want the model to keep something.
    state = State(traced.module) if forward.kind == "prompt" else None
    try:
        kept, seen = capture_whole(traced.module, counted, forward.args, forward.kwargs)
    finally:
        if state is not None:
            state.restored()
    for each, before, calls in zip(counts, known, seen, strict=True):
        if calls != before:
            each[forward.tokens] = calls
    return kept


def _calls(counts: Mapping[int, int], tokens: int) -> int | None:
    """How often a module runs for so many tokens, if as often for no more and for no fewer: some work through them in pieces."""
    fewer, more = [each for each in counts if each <= tokens], [each for each in counts if each >= tokens]
    if not fewer or not more or counts[max(fewer)] != counts[min(more)]:
        return None
    return counts[max(fewer)]


def _run_each(traced: Traced, prompts: _Prompts, taps: Sequence[Tap]) -> list[list[Tensor]]:
    """For each tap, the value of each prompt as it would be alone."""
    traced.forget_if_overwritten()
    sites, feed = _probed(traced, taps)
    for site in sites:
        if short := [number for number, prompt in enumerate(prompts) if len(prompt) < site.least]:
            raise AddressError(
                f"{site.tap.name}: prompt {short[0]} has {len(prompts[short[0]])} tokens, and this asks for a position that needs "
                f"{site.least}; use a slice, which takes what is there"
            )
    found: list[list[Any]] = [[None] * len(prompts) for _ in sites]
    for places in batches(list(map(len, prompts)), BUDGET):
        batch = Batch(tuple(places), tuple(prompts[place] for place in places))
        for rows, kept in zip(capture(traced.module, sites, feed, batch), found, strict=True):
            rows.wait()
            for place, value in zip(places, rows.each(), strict=True):
                kept[place] = (value if rows.site.dropped is None else value.unsqueeze(rows.site.dropped)).clone()
    return found


def _probed(traced: Traced, taps: Sequence[Tap]) -> tuple[list[Site], Feed]:
    for tap in taps:
        if tap.address.port in ("inputs", "outputs") and not tap.address.items:
            raise TraceError(
                f"`{tap.address}` is a structure, which cannot be cut into several prompts: name one tensor in it, such as "
                f"`{tap.address}[0][0]`, or trace the prompts one by one"
            )
    feed = feed_for(traced.module)
    device = feed.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    new = [tap for tap in taps if (tap, kind) not in traced.probed]
    if new:
        probed = probe(traced.module, bind(traced.module, new), feed)
        try:
            bound = probed.sites
        except AddressError as error:
            hint = "\nThe model is in training mode, in which dropout changes values: call `model.eval()` first"
            raise AddressError(f"{error}{hint * traced.module.training}") from None
        traced.probed.update({(tap, kind): (site, probed.feed) for tap, site in zip(new, bound, strict=True)})
    sites, feeds = zip(*(traced.probed[tap, kind] for tap in taps), strict=True)
    masked, reads_pad = any(each.masked for each in feeds), any(each.reads_pad for each in feeds)
    return list(sites), replace(feed, masked=masked, reads_pad=reads_pad)
