from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actdump.address import Slice
from actdump.plan import Batch, Budget, Column, Layout, Part, Span, batches, digest, make, padded, parts, prompt_bytes, widest

ROWS = Layout((Slice(), 8), "float32")
COLUMN = Column("x", "h[-1].output", "h[1].output", "Block", "tensor", "all", None, ("batch", "token", "8"), ROWS, 0)
PARTS = (Part(0, (Span(0, 0, 3, 12, 999),)), Part(1, (Span(1, 3, 1, 4, 333),)))
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80)
budgets = st.builds(Budget, st.integers(1, 400), st.none() | st.integers(1, 9))


@pytest.mark.parametrize(
    ("dims", "tokens", "shape", "rows", "row", "nbytes"),
    [
        ((Slice(), 8), 5, (5, 8), 5, (8,), 5 * 8 * 4),
        ((8,), 5, (8,), 1, (8,), 8 * 4),
        ((), 5, (), 1, (), 4),
        ((2, 8), 5, (2, 8), 1, (2, 8), 2 * 8 * 4),
        ((Slice(-3), 8), 2, (2, 8), 2, (8,), 2 * 8 * 4),
        ((Slice(1, None, 2), 2, 8), 6, (3, 2, 8), 3, (2, 8), 3 * 16 * 4),
        ((2, Slice(), Slice()), 5, (2, 5, 5), 50, (), 50 * 4),
        ((2, Slice(), 8), 5, (2, 5, 8), 80, (), 80 * 4),
    ],
)
def test_a_layout_knows_the_shape_rows_and_bytes_of_a_prompt(dims, tokens, shape, rows, row, nbytes):
    layout = Layout(dims, "float32")
    assert (layout.shape(tokens), layout.rows(tokens), layout.row, layout.bytes(tokens)) == (shape, rows, row, nbytes)
    assert replace(layout, dtype="bfloat16").bytes(tokens) * 2 == nbytes


@given(lengths, budgets)
def test_batches_hold_every_prompt_once_within_the_budget(lengths, budget):
    cut = batches(lengths, budget)
    assert sorted(place for batch in cut for place in batch) == list(range(len(lengths)))
    for batch in cut:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget.tokens
        assert len(batch) <= (budget.prompts or len(batch))


@given(lengths, budgets, st.randoms())
def test_the_cut_follows_lengths_alone(lengths, budget, random):
    shuffled = random.sample(lengths, len(lengths))
    cuts = [[[order[place] for place in batch] for batch in batches(order, budget)] for order in (lengths, shuffled)]
    assert cuts[0] == cuts[1]


def test_prompts_of_like_length_share_a_batch_longest_first():
    cut = batches([4, 9, 4, 9, 9, 4], Budget(18))
    assert cut == [[1, 3], [4], [0, 2, 5]]
    assert padded([4, 9, 4, 9, 9, 4], cut) == 39


@given(lengths, budgets)
def test_no_cut_at_full_batches_costs_less(lengths, budget):
    full = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        most = min(budget.prompts or len(lengths), budget.tokens // lengths[full[-1][0]]) if full else 0
        if not full or len(full[-1]) >= most:
            full.append([])
        full[-1].append(place)
    costs = [padded(lengths, cut) + len(cut) * budget.tokens / 10 for cut in (batches(lengths, budget), full)]
    assert costs[0] <= costs[1]


def test_a_batch_ends_where_padding_would_cost_more_than_another_forward():
    assert batches([100, 100, 10, 10, 10], Budget(1000)) == [[0, 1], [2, 3, 4]]
    assert batches([100, 100, 90, 90, 90], Budget(1000)) == [[0, 1, 2, 3, 4]]


@given(st.lists(lengths, min_size=1, max_size=3), budgets)
def test_no_batch_with_padding_is_wider_than_the_widest(parts, budget):
    cut = [[part[place] for place in batch] for part in parts for batch in batches(part, budget)]
    most = max((max(batch) for batch in cut if min(batch) < max(batch)), default=0)
    assert most <= widest([length for part in parts for length in part], budget)


@pytest.mark.parametrize(
    ("lengths", "budget", "width"),
    [
        ([5, 8, 400], Budget(1000), 8),  # 400 has a forward of its own
        ([5, 8, 60, 150], Budget(1000), 150),
        ([5, 8, 600], Budget(1000), 8),  # a batch has no place for two so long
        ([8, 8, 8], Budget(1000), 0),
        ([5, 8], Budget(1000, prompts=1), 0),
    ],
)
def test_the_widest_batch_with_padding(lengths, budget, width):
    assert widest(lengths, budget) == width


def test_padded_counts_the_padding():
    assert padded([5, 3, 2], [[0, 1], [2]]) == 12


@given(lengths, st.integers(1, 3000), st.integers(1, 300))
def test_shards_are_consecutive_and_under_the_limits(lengths, most_bytes, most_tokens):
    parted = parts([COLUMN], lengths, most_bytes=most_bytes, most_tokens=most_tokens, most_shards=4)
    cut = [shard for part in parted for shard in part.shards]
    held = [lengths[shard.first : shard.first + shard.prompts] for shard in cut]
    assert [length for inside in held for length in inside] == lengths
    assert [shard.number for shard in cut] == list(range(len(cut)))
    for shard, inside in zip(cut, held, strict=True):
        assert (shard.tokens, shard.bytes) == (sum(inside), sum(prompt_bytes([COLUMN], length) for length in inside))
        assert shard.prompts == 1 or (shard.bytes <= most_bytes and shard.tokens <= most_tokens)
    for inside, after in pairwise(held):  # a shard ends only where the next prompt would not fit
        size = sum(prompt_bytes([COLUMN], length) for length in [*inside, after[0]])
        assert size > most_bytes or sum(inside) + after[0] > most_tokens


@given(lengths, st.integers(1, 3000), st.integers(1, 300), st.integers(1, 6))
def test_parts_are_a_few_shards_under_the_limit_of_tokens(lengths, most_bytes, most_tokens, most_shards):
    cut = parts([COLUMN], lengths, most_bytes=most_bytes, most_tokens=most_tokens, most_shards=most_shards)
    assert [part.number for part in cut] == list(range(len(cut)))
    assert [part.first for part in cut] == list(accumulate((part.prompts for part in cut[:-1]), initial=0))
    for part in cut:
        assert len(part.shards) == 1 or (len(part.shards) <= most_shards and part.tokens <= most_tokens)
        assert (part.tokens, part.bytes) == (
            sum(shard.tokens for shard in part.shards),
            sum(shard.bytes for shard in part.shards),
        )
    for part, after in pairwise(cut):  # a part ends only where the next shard would not fit
        assert len(part.shards) == most_shards or part.tokens + after.shards[0].tokens > most_tokens


def test_no_prompts_make_no_parts():
    assert parts([COLUMN], [], most_bytes=1, most_tokens=1, most_shards=1) == ()


def planned(*, facts=None, column=COLUMN, parts=PARTS, budget=Budget(512)):  # noqa: B008 (frozen)
    return make(facts or {"spec": {"model": "m", "dtype": "auto"}}, [column], parts, budget)


@pytest.mark.parametrize(
    "change",
    [
        {"facts": {"spec": {"model": "other", "dtype": "auto"}}},
        {"column": replace(COLUMN, name="y")},
        {"column": replace(COLUMN, resolved="h[2].output")},
        {"column": replace(COLUMN, tokens="last")},
        {"column": replace(COLUMN, call=0)},
        {"column": replace(COLUMN, layout=Layout((Slice(), 8), "bfloat16"))},
        {"column": replace(COLUMN, layout=Layout((Slice(1), 8), "float32"))},
        {"parts": (Part(0, (Span(0, 0, 2, 12, 999),)), Part(1, (Span(1, 2, 2, 4, 333),)))},
        {"parts": (Part(0, (Span(0, 0, 3, 12, 999), Span(1, 3, 1, 4, 333))),)},
        {"budget": Budget(256)},
        {"budget": Budget(512, 4)},
    ],
)
def test_the_digest_changes_with_what_decides_the_bytes(change):
    assert planned(**change).digest != planned().digest


@pytest.mark.parametrize(
    "change",
    [
        {"facts": {"spec": {"dtype": "auto", "model": "m"}}},
        {"column": replace(COLUMN, address="h[1].output")},
        {"column": replace(COLUMN, module="Other", form="tuple of 2")},
    ],
)
def test_the_digest_stays_with_what_does_not(change):
    assert planned(**change).digest == planned().digest


def test_totals_are_those_of_the_parts():
    plan = planned()
    assert (plan.prompts, plan.tokens, plan.bytes) == (4, 16, 1332)
    assert plan.starts == (0, 12, 16)
    assert Batch((7, 2), ([1, 2, 3], [4])).lengths == (3, 1)
    assert digest([1]) == "080a9ed428559ef602668b4c00f114f1a11c3f6b02a435f0bdc154578e4d7f22"
