"""Prompts that every machine has: English from the documentation that ships with Python, cut to lengths drawn with a seed."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from statistics import mean, median
from typing import Any

MEDIAN, SPREAD, SHORTEST, LONGEST = 60, 0.9, 5, 400  # of mixed prompts, in tokens; SPREAD is that of the logarithm
SEED = 20


@dataclass(frozen=True)
class Prompts:
    """Texts, and their token ids as the tokenizer gives them."""

    name: str
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.ids))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def some(self, count: int) -> "Prompts":
        """The first of them."""
        return Prompts(f"{self.name}, {count}", self.texts[:count], self.ids[:count])

    def described(self) -> str:
        """The distribution of lengths in words."""
        ordered = sorted(self.lengths)
        shares = ", ".join(f"{share} % up to {ordered[(len(ordered) - 1) * share // 100]}" for share in (10, 25, 75, 90))
        return (
            f"{self.name}: {len(ordered)} prompts, {self.tokens:,} tokens; {ordered[0]} to {ordered[-1]}, "
            f"median {median(ordered):.0f}, mean {mean(ordered):.0f}; {shares}"
        )


def mixed(tokenizer: Any, count: int = 512) -> Prompts:
    """Prompts of 5 to 400 tokens, most of them short."""
    return _prompts("mixed", tokenizer, count, _long_tailed)


def uniform(tokenizer: Any, count: int = 256) -> Prompts:
    """Prompts of about 128 tokens."""
    return _prompts("uniform", tokenizer, count, lambda dice: dice.randint(120, 136))


def long(tokenizer: Any, count: int = 64) -> Prompts:
    """Prompts of 1,000 to 4,000 tokens."""
    return _prompts("long", tokenizer, count, lambda dice: dice.randint(1000, 4000), 4000)


def _long_tailed(dice: random.Random) -> int:
    while not SHORTEST <= (length := round(dice.lognormvariate(0, SPREAD) * MEDIAN)) <= LONGEST:
        pass
    return length


def _prompts(name: str, tokenizer: Any, count: int, draw: Callable[[random.Random], int], longest: int = LONGEST) -> Prompts:
    dice = random.Random(f"{SEED} {name}")
    material = tokenizer(english(), add_special_tokens=False, verbose=False)["input_ids"]
    texts = [_cut(tokenizer, material, dice.randrange(len(material) - longest), draw(dice)) for _ in range(count)]
    return Prompts(name, tuple(texts), tuple(map(tuple, tokenizer(texts)["input_ids"])))


def _cut(tokenizer: Any, material: Sequence[int], start: int, length: int) -> str:
    text: str = tokenizer.decode(material[start : start + length])
    return text.strip()


def english() -> str:
    """About half a million characters."""
    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))[:500_000]
