"""Statistics of a tap, streamed: what its stored values look like, batch by batch and shard by shard."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

POSITIONS = 8  # tokens at the beginning of a prompt whose norms are told apart: attention sinks stand there


@dataclass(frozen=True)
class Statistics:
    """What the values of a tap look like. Non-finite values are counted, and left out of all else, and their rows of the norms.

    A figure that float64 does not hold, as the square of 1e200, is NaN; `null` in JSON, which has none.

    Attributes:
        rows: how many rows there are.
        values: how many numbers these hold.
        nonfinite: how many of the numbers are NaN or infinite.
        mean, std: of all numbers (the population's standard deviation).
        norm: the mean Euclidean norm of a row; `None` where a row is a bare element, because the value is stored flat.
        largest: the largest absolute value.
        rows_by_position, norm_by_position: how many rows of the prompts' tokens 0 to 7 have a norm, and the mean; empty where a row
            is no token.
        rows_nonfinite: how many rows hold a number that is NaN or infinite, so that they have no norm.
    """

    rows: int
    values: int
    nonfinite: int
    mean: float
    std: float
    norm: float | None
    largest: float
    rows_by_position: tuple[int, ...] = ()
    norm_by_position: tuple[float, ...] = ()
    rows_nonfinite: int = 0


def merged(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of several batches or shards of one tap together."""
    counts = [part.values - part.nonfinite for part in parts]
    normed = [part.rows - part.rows_nonfinite for part in parts]
    mean = _weighed(counts, [part.mean for part in parts])
    spread = _weighed(counts, [part.std * part.std + (part.mean - mean) * (part.mean - mean) for part in parts])
    each = list(zip(*(part.rows_by_position for part in parts), strict=True))
    norms = list(zip(*(part.norm_by_position for part in parts), strict=True))
    return Statistics(
        rows=sum(part.rows for part in parts),
        values=sum(part.values for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
        mean=mean,
        std=math.sqrt(spread),
        norm=None if any(part.norm is None for part in parts) else _weighed(normed, [part.norm or 0.0 for part in parts]),
        largest=max(part.largest for part in parts),
        rows_by_position=tuple(map(sum, each)),
        norm_by_position=tuple(map(_weighed, each, norms)),
        rows_nonfinite=sum(part.rows_nonfinite for part in parts),
    )


def _weighed(weights: Sequence[float], values: Sequence[float]) -> float:
    total = math.fsum(weights)
    return math.fsum(weight / total * value for weight, value in zip(weights, values, strict=True)) if total else 0.0


def statistics_to_json(statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    return {name: {key: _told(figure) for key, figure in asdict(each).items()} for name, each in statistics.items()}


def _told(figure: Any) -> Any:
    if isinstance(figure, tuple):
        return list(map(_told, figure))
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure


def statistics_from_json(value: Mapping[str, Any]) -> dict[str, Statistics]:
    return {name: Statistics(**{key: _heard(key, figure) for key, figure in each.items()}) for name, each in value.items()}


def _heard(key: str, figure: Any) -> Any:
    if isinstance(figure, list):
        return tuple(_heard(key, each) for each in figure)
    return math.nan if figure is None and key != "norm" else figure
