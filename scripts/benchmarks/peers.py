"""Task A with the peers, each as its own documentation writes it, on prompts in file order and on prompts sorted for it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.bare import bare, best_budget, forwards, padded_batches
from benchmarks.rounds import Figure, Goal, Run, in_turns, ratio, timed, times
from benchmarks.running import Dumping, elsewhere, spec_of
from benchmarks.setting import Setting, say
from benchmarks.subject import FOLDER, A, load, tokenizer
from benchmarks.texts import Prompts, mixed, uniform

ROWS = 16  # prompts in a batch, in file order
SORTED_TOKENS = 512  # padded tokens in a batch of sorted prompts
GOALS = {("mixed", "in file order"): Goal("at least", 3.4), ("uniform", "in file order"): Goal("at least", 1)}
NNSIGHT_SORTED = Goal("at least", 1.04)
INSTALLING = {
    "nnsight": "pip install nnsight",
    "baukit": "pip install git+https://github.com/davidbau/baukit",
}
Texts = Sequence[str]
Peer = Callable[[Texts], tuple[list[Tensor], Tensor]]  # for some texts the value of each layer, and the mask of real tokens


def measure(setting: Setting) -> Iterator[Figure]:
    """How many times as long as a run each peer takes; the peers that are not installed are named."""
    for name, command in INSTALLING.items():
        if find_spec(name) is None:
            say(f"{name} is not installed, so it is not measured; {command}")
    for dtype in setting.dtypes:
        peers = _peers(dtype)
        for prompts in (mixed(tokenizer(), setting.some(512, 3)), uniform(tokenizer(), setting.some(256, 2))):
            say(f"{dtype}, {prompts.described()}")
            yield from _compared(setting, dtype, prompts, peers)


def _compared(setting: Setting, dtype: str, prompts: Prompts, peers: dict[str, Peer]) -> Iterator[Figure]:
    out = setting.scratch / "peer.safetensors"
    orders = {"in file order": in_file_order(prompts)}
    if prompts.name == "mixed":
        orders["sorted"] = sorted_for(prompts)
    whole = load(dtype)
    batches = padded_batches(prompts.ids, best_budget(whole, prompts.ids, setting.some(2, 1)))
    spec = spec_of(A, {"name": str(FOLDER), "dtype": dtype}, setting.saved(prompts))
    with elsewhere(Dumping(spec, setting.scratch / "dump")) as dumping:
        sides: dict[str, Run] = {
            "the limit": timed(forwards(bare(whole, A.depth), batches)),
            "actdump": dumping,
            **{f"{name}, {order}": saving(peer, orders[order], out) for order in orders for name, peer in peers.items()},
        }
        sides["the limit"]()
        taken = in_turns(sides, setting.rounds)
    where = f"{dtype}, {prompts.name}"
    yield from times(taken, where)
    for side in list(sides)[1:]:
        yield ratio(f"{where}: {side} / the limit", taken, side, "the limit")
    for order in orders:
        fastest = min((f"{name}, {order}" for name in peers), key=lambda side: median(taken[side]))
        yield ratio(f"{where}: {fastest} (the best) / actdump", taken, fastest, "actdump", GOALS.get((prompts.name, order)))
    if "nnsight" in peers and "sorted" in orders:
        yield ratio(f"{where}: nnsight, sorted / actdump", taken, "nnsight, sorted", "actdump", NNSIGHT_SORTED)


# ----------------------------------------------------------------------------------------------------------------- how they run


def padded(texts: Texts, side: str = "right") -> Any:
    """A batch as their documentation makes it: tokenised at once, padded, with a mask."""
    return tokenizer()(list(texts), padding=True, padding_side=side, return_tensors="pt")


def in_file_order(prompts: Prompts) -> Sequence[Texts]:
    return [prompts.texts[place : place + ROWS] for place in range(0, len(prompts.texts), ROWS)]


def sorted_for(prompts: Prompts) -> Sequence[Texts]:
    """Batches of at most so many padded tokens, the longest first."""
    batches: list[list[str]] = []
    width = 0
    for text, ids in sorted(zip(prompts.texts, prompts.ids, strict=True), key=lambda pair: -len(pair[1])):
        if not batches or width * (len(batches[-1]) + 1) > SORTED_TOKENS:
            batches.append([])
            width = len(ids)
        batches[-1].append(text)
    return batches


def saving(peer: Peer, batches: Sequence[Texts], out: Path) -> Run:
    """The script around a peer: every batch, the padding cut off, bfloat16, one safetensors file."""

    def script() -> None:
        kept: dict[str, list[Tensor]] = {f"layer{layer}": [] for layer in A.layers}
        lengths: list[Tensor] = []
        for texts in batches:
            values, mask = peer(texts)
            real = mask.bool()
            lengths.append(real.sum(1))
            for rows, value in zip(kept.values(), values, strict=True):
                rows.append(value[real].to(torch.bfloat16))
        save_file({**{name: torch.cat(rows) for name, rows in kept.items()}, "lengths": torch.cat(lengths)}, out)

    def run() -> float:
        try:
            return timed(script)()
        finally:
            out.unlink(missing_ok=True)

    return run


# ----------------------------------------------------------------------------------------------------------------- the peers


def _peers(dtype: str) -> dict[str, Peer]:
    found = {"hooks by hand": by_hand(dtype), "output_hidden_states": hidden_states(dtype)}
    if find_spec("nnsight") is not None:
        found["nnsight"] = nnsight(dtype)
    if find_spec("baukit") is not None:
        found["baukit"] = baukit(dtype)
    return found


def nnsight(dtype: str) -> Peer:
    """`model.trace` with `tracer.stop()`: https://nnsight.net/features/10_early_stopping. It pads on the left by itself."""
    from nnsight import TransformersModel

    model: Any = TransformersModel(load(dtype), task="text-generation", tokenizer=tokenizer())

    def outputs(texts: Texts) -> tuple[list[Tensor], Tensor]:
        inputs = padded(texts, "left")
        with torch.no_grad(), model.trace(inputs) as tracer:
            first = model.model.layers[5].output.save()
            second = model.model.layers[10].output.save()
            third = model.model.layers[15].output.save()
            tracer.stop()
        return [first, second, third], inputs["attention_mask"]

    return outputs


def baukit(dtype: str) -> Peer:
    """`TraceDict(…, stop=True)`: the docstring in https://github.com/davidbau/baukit/blob/main/baukit/nethook.py."""
    from baukit import TraceDict

    model = load(dtype)
    names = [f"model.layers.{layer}" for layer in A.layers]

    def outputs(texts: Texts) -> tuple[list[Tensor], Tensor]:
        inputs = padded(texts)
        with torch.no_grad(), TraceDict(model, names, stop=True) as traced:
            model(**inputs)
        return [traced[name].output for name in names], inputs["attention_mask"]

    return outputs


def hidden_states(dtype: str) -> Peer:
    """`output_hidden_states=True`: https://huggingface.co/docs/transformers/main_classes/output; without the head."""
    base: Any = load(dtype).get_submodule("model")

    def outputs(texts: Texts) -> tuple[list[Tensor], Tensor]:
        inputs = padded(texts)
        with torch.no_grad():
            states = base(**inputs, output_hidden_states=True).hidden_states
        return [states[layer + 1] for layer in A.layers], inputs["attention_mask"]

    return outputs


class _Enough(Exception):
    pass


def by_hand(dtype: str) -> Peer:
    """Plain forward hooks and an exception after the last, as a careful user writes it."""
    model = load(dtype)

    def outputs(texts: Texts) -> tuple[list[Tensor], Tensor]:
        seen: list[Tensor] = []

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen.append(output)
            if len(seen) == len(A.layers):
                raise _Enough

        inputs = padded(texts)
        handles = [model.get_submodule(f"model.layers.{layer}").register_forward_hook(hook) for layer in A.layers]
        try:
            with torch.inference_mode(), suppress(_Enough):
                model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen, inputs["attention_mask"]

    return outputs
