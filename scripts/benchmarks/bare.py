"""The limit: the bare forwards of a model that was cut after the last block that is needed."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from queue import SimpleQueue
from typing import Any, cast

import torch
from torch import Tensor, nn

from actdump import plan
from benchmarks.rounds import in_turns, timed
from benchmarks.setting import say

BUDGETS = (256, 512, 1024, 2048, 4096)  # padded tokens in a batch
FEW_BLOCKS = 4


def bare(whole: nn.Module, depth: int) -> nn.Module:
    """The model without its head, its last norm and the blocks after the last that is needed: really gone, not skipped.

    The weights are shared with the whole model, which stays as it is.
    """
    base = cast(Any, copy(whole.get_submodule("model")))
    base._modules = {**base._modules, "layers": base.layers[:depth], "norm": nn.Identity()}
    return cast(nn.Module, base)


def padded_batches(ids: Sequence[Sequence[int]], budget: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Prompts sorted by length, longest first, cut into right-padded batches of at most `budget` tokens, as well as a run cuts them."""
    cut = plan.batches(list(map(len, ids)), plan.Budget(budget))
    return [padded([ids[place] for place in places]).to(device) for places in cut]


def padded(batch: Sequence[Sequence[int]]) -> Tensor:
    """The ids (batch, token) of prompts, right-padded."""
    width = max(map(len, batch))
    return torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in batch])


def forwards(base: nn.Module, batches: Sequence[Tensor]) -> Callable[[], None]:
    """The bare forwards: no hooks, no masks, nothing kept."""

    def run() -> None:
        with torch.inference_mode():
            for ids in batches:
                base(input_ids=ids, use_cache=False)
        if batches[0].is_cuda:
            torch.cuda.synchronize()

    return run


def side_by_side(base: nn.Module, batches: Sequence[Tensor], count: int) -> Callable[[], None]:
    """The bare forwards in so many threads, each with its share of torch's threads and a model that shares the weights."""
    free: SimpleQueue[nn.Module] = SimpleQueue()
    for _ in range(count):
        free.put(deepcopy(base, {id(weight): weight for weight in base.parameters()}))

    def forward(ids: Tensor) -> None:
        model = free.get()
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        free.put(model)

    def run() -> None:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(count, "bare", torch.set_num_threads, (threads // count,)) as pool:
            list(pool.map(forward, batches))
        torch.set_num_threads(threads)  # for threads that come

    return run


def best_budget(whole: nn.Module, ids: Sequence[Sequence[int]], rounds: int, budgets: Sequence[int] = BUDGETS) -> int:
    """The fastest of several budgets on this machine. Blocks are alike, so a few of them tell."""
    few, device = bare(whole, FEW_BLOCKS), next(whole.parameters()).device
    sides = {str(budget): timed(forwards(few, padded_batches(ids, budget, device))) for budget in budgets}
    next(iter(sides.values()))()  # the first forwards of a process are slower
    taken = {name: min(each) for name, each in in_turns(sides, rounds).items()}
    best = min(taken, key=lambda name: taken[name])
    others = ", ".join(f"{name}: {seconds / taken[best]:.2f}" for name, seconds in taken.items())
    say(f"batches of {best} padded tokens are the fastest forwards: {others}")
    return int(best)
