"""Forwards that run side by side: the same values, in the same order, whatever happens in one of them."""

import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from needs import need
from test_job import CONFIG, contents, make_spec, same
from torch import nn

import actdump
from actdump import engine, job, model
from actdump.address import parse
from actdump.errors import ActdumpError, Stopped
from actdump.job import lanes
from actdump.job.bound import Bound
from actdump.plan import Batch
from actdump.spec import Spec
from actdump.state import TABLE
from actdump.store import shut_down
from actdump.tap import Tap

MANY = {"shard": {"tokens": 200}, "batch": {"tokens": 40}}


@pytest.fixture(autouse=True)
def two_threads():
    need(torch.backends.openmp.is_available(), "without OpenMP forwards run one at a time")
    need(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) > 1, "forwards run side by side on two cores")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if in_lane(thread)]
    torch.set_num_threads(before)


def in_lane(thread=None):
    return (thread or threading.current_thread()).name.startswith("actdump-lane")


@pytest.fixture
def streamed(monkeypatch):
    """For every forward of a run, whether it was in a lane, and how many threads torch had there."""
    seen, stream = [], engine.stream

    def watched(*words):
        seen.append((in_lane(), torch.get_num_threads()))
        return stream(*words)

    monkeypatch.setattr(engine, "stream", watched)
    return seen


class Small(nn.Module):
    """A model that gives each token its embedding after a moment in every block.

    While it runs, it keeps on itself, in a list and in a buffer what belongs to one forward, and reads it at the end.
    """

    def __init__(self, blocks=2, moment=0.002):
        super().__init__()
        self.moment = moment
        self.embedding = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(blocks))
        self.last = nn.Identity()
        self.kept = []
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("weight", torch.ones(TABLE + 1))

    def forward(self, input_ids):
        self.ids, self.kept[:], self.table = input_ids, [input_ids], self.embedding(input_ids)
        for block in self.blocks:
            block(time.sleep(self.moment))
        return self.last(self.embedding(self.ids) + self.embedding(self.kept[0]) + self.table)


def bound_to(module):
    sites = engine.bind(module, [Tap("last", parse("last.output"))])
    found = engine.probe(module, sites, engine.feed_for(module))
    return Bound(None, module, found.feed, found.sites)


def opened(module=None, check_stop=lambda: None):
    return lanes.Lanes(bound_to(module or Small().eval()), check_stop)


def captured(lane, ids):
    (rows,) = engine.capture(lane.module, lane.sites, lane.feed, Batch((0,), (tuple(ids.tolist()),)))
    return rows.values


# ---------------------------------------------------------------------------------------------------------------------- a run


def test_a_run_writes_the_bytes_of_forwards_one_after_another(tmp_path, streamed, monkeypatch):
    lengths = (8, 8, 7, 8, 7) * 12
    rows = [{"input_ids": [(number + place) % 40 for place in range(size)]} for number, size in enumerate(lengths)]
    spec = make_spec(prompts=rows, shard={"tokens": 76}, batch={"tokens": 40})
    job.run(spec, tmp_path / "side by side")
    assert set(streamed) == {(True, 1)}  # an even number of batches in each part
    streamed.clear()
    monkeypatch.setattr(lanes, "MOST", 1)
    torch.set_num_threads(1)
    job.run(spec, tmp_path / "one by one")
    torch.set_num_threads(2)
    assert set(streamed) == {(False, 1)}
    (files, manifest), (same_files, same) = (contents(tmp_path / name) for name in ("side by side", "one by one"))
    assert manifest.pop("audit").keys() == same.pop("audit").keys()  # whose own forwards had two threads and one
    assert (files, manifest) == (same_files, same)


def test_values_are_those_of_plain_forwards(tmp_path, streamed):
    spec = make_spec(60, **MANY)
    job.run(spec, tmp_path / "out")
    assert set(streamed) == {(True, 1), (False, 2)}  # what was left over had both threads
    module, seen = model.load(model.find(spec.model)).eval(), []
    module.transformer.h[1].register_forward_hook(lambda _module, _args, result: seen.append(result))
    dump = actdump.open(tmp_path / "out")
    for number, row in enumerate(spec.prompts.rows):
        with torch.no_grad():
            module(torch.tensor([row.input_ids]))
        assert same(dump["block"][number], seen[-1][0])


@pytest.mark.parametrize(("threads", "count"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4), (64, 4)])
def test_lanes_share_the_threads_evenly(threads, count, monkeypatch):
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda _: range(threads), raising=False)
    assert lanes._count(Small(), threads) == count
    elsewhere = Small()
    elsewhere.last = nn.Linear(8, 8, device="meta")  # as with a device map
    assert lanes._count(elsewhere, 4) == 1
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda _: {0})  # as OMP_PROC_BIND does
    assert lanes._count(Small(), 2) == 1


# -------------------------------------------------------------------------------------------------------------------- the twin


def test_a_twin_shares_the_weights_and_nothing_that_a_forward_writes():
    module = Small().eval()
    bound = bound_to(module)
    with torch.inference_mode():
        other, sites, feed = engine.twin(module, bound.sites, bound.feed)
    assert not other.table.is_inference()
    assert all(one is another for one, another in zip(module.parameters(), other.parameters(), strict=True))
    assert other.weight is module.weight
    assert other.table is not module.table
    assert other.kept is not module.kept
    assert sites[0].module is other.last
    assert feed.state is not bound.feed.state
    assert engine.bind(other, [Tap("last", parse("last.output"))])[0].module is other.last


def test_weights_that_are_tied_stay_tied():
    source = model.find(Spec.model_validate({"model": {"config": CONFIG}, "prompts": ["x"], "save": ["output"]}).model)
    module = model.load(source)
    other, _, _ = engine.twin(module, [], engine.feed_for(module))
    assert other.lm_head.weight is other.transformer.wte.weight is module.transformer.wte.weight


def test_what_a_forward_keeps_on_its_model_reaches_no_other():
    module = Small().eval()
    rows = [torch.randint(0, 40, (7,)) for _ in range(24)]
    with opened(module) as side:
        found = dict(side.run(lambda lane, number: captured(lane, rows[number]), range(24)))
    for number, ids in enumerate(rows):
        assert torch.equal(found[number], 3 * module.embedding(ids)[None].detach())


def locked(module):
    module.lock = threading.Lock()


def closed_over(module):
    module.blocks[0].forward = lambda given: module.blocks[1](given)


def written(module):
    module.blocks[0].forward = lambda given, weight=module.weight: weight.zero_()


NOTED = {}


def noted_in_a_global(module):
    module.register_forward_pre_hook(lambda _module, _args, given: NOTED.update(given), with_kwargs=True)
    module.last.register_forward_pre_hook(lambda _last, args: (args[0] + NOTED["input_ids"][..., None],))


def noted_behind_a_reference(module):
    owner = weakref.ref(module)
    module.ids = torch.zeros(1, 1, dtype=torch.long)
    module.last.register_forward_pre_hook(lambda _last, args: (args[0] + owner().ids[..., None],))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (noted_in_a_global, "forwards of both change each other's values"),
        (noted_behind_a_reference, "forwards of both change each other's values"),
        (locked, "cannot pickle '_thread.lock' object"),
        (closed_over, "a forward of its copy runs its own Identity"),
        (written, "a forward writes into its weights or large buffers"),
    ],
)
def test_a_model_that_cannot_be_copied_runs_alone(change, why, caplog):
    module = Small().eval()
    change(module)
    with opened(module) as side:
        assert list(side.run(captured, [1, 2, 3])) == [(1, None), (2, None), (3, None)]
        list(side.run(captured, [1, 2]))
    assert [record.message for record in caplog.records] == [
        "the model cannot be copied, so its forwards run one after another: " + why
    ]


def drawn(module):
    """As Reformer does, which seeds first, so that all its forwards draw the same."""
    module.last.register_forward_pre_hook(lambda _last, args: (torch.manual_seed(1), (args[0] + torch.rand(1),))[1])


def seeded_in_numpy(module):
    """As BigBird does."""
    module.register_forward_pre_hook(lambda _module, _args: np.random.seed(0))


@pytest.mark.parametrize("change", [drawn, seeded_in_numpy])
def test_forwards_that_draw_random_numbers_run_one_after_another(change, caplog):
    module = Small().eval()
    change(module)
    rows = torch.randint(0, 40, (8, 7))
    with opened(module) as side:
        for _ in range(2):
            made = dict(side.run(lambda lane, number: captured(lane, rows[number]), range(8)))
            assert made == dict.fromkeys(range(8))
    assert [record.message for record in caplog.records] == [
        "the model's forwards draw random numbers, so they run one after another"
    ]


def test_random_numbers_are_watched_and_are_as_before_afterwards():
    before = torch.get_rng_state(), np.random.get_state()[1]
    for draw in (lambda: torch.rand(1), lambda: np.random.rand(1), lambda: torch.manual_seed(0)):
        dice = engine.Dice()
        assert not dice.thrown
        draw()
        assert dice.thrown
        dice.restore()
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()


# ------------------------------------------------------------------------------------------------------------------- the order


def test_what_comes_of_the_items_comes_in_their_order_and_the_odd_one_is_left():
    def slow_at_first(_, number):
        time.sleep(0.05 if number == 0 else 0)
        return number * 10

    with opened() as side:
        assert list(side.run(slow_at_first, range(5))) == [(0, 0), (1, 10), (2, 20), (3, 30), (4, None)]
        assert list(side.run(slow_at_first, [7])) == [(7, None)]
        assert list(side.run(slow_at_first, [])) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_where_memory_is_short_the_rest_is_left_and_nothing_runs_beside(error):
    running, tried = set(), []

    def short(_, number):
        running.add(number)
        tried.append(number)
        try:
            if number == 2:
                raise error
            while number == 3 and not side._tight:
                time.sleep(0.001)
            return number
        finally:
            running.discard(number)

    with opened() as side:
        found = []
        for number, made in side.run(short, range(8)):
            assert made == number or not running
            found.append(made)
        assert found[:3] == [0, 1, None]
        assert found[4:] == [None] * 4  # number 3 was under way
        assert set(tried) <= {0, 1, 2, 3}
        assert [made for _, made in side.run(lambda _, number: number, range(4))] == [0, 1, 2, 3]  # the next part


def test_batches_that_fit_alone_but_not_side_by_side(tmp_path, monkeypatch):
    """A stand-in for memory that two forwards do not find at once."""
    stream, inside, short = engine.stream, [], []

    def together(*words):
        inside.append(1)
        try:
            time.sleep(0.02)
            if len(inside) > 1:
                short.append(1)
                raise MemoryError
            return stream(*words)
        finally:
            inside.pop()

    spec = make_spec(40, **MANY)
    job.run(spec, tmp_path / "roomy")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "stream", together)
        job.run(spec, tmp_path / "out")
    assert short
    one, another = (actdump.open(tmp_path / name) for name in ("roomy", "out"))
    for name in one.names:
        assert same(another[name].rows[:], one[name].rows[:], 1e-2 if one[name].rows[:].dtype == torch.bfloat16 else 1e-5)
    assert {shard.written["halved"] for shard in records(tmp_path / "out")} == {0}


def records(root):
    from actdump import store
    from actdump.format import Folder

    plan, _ = store.load_plan(Folder(root))
    return [store.finished(Folder(root), shard, plan.digest) for shard in plan.shards]


def test_an_error_in_a_lane_ends_the_run_and_leaves_nothing_behind(tmp_path, monkeypatch):
    stream = engine.stream

    def broken(*words):
        if in_lane() and 33 in words[3].numbers:
            raise ActdumpError("on purpose")
        return stream(*words)

    monkeypatch.setattr(engine, "stream", broken)
    with pytest.raises(ActdumpError, match="on purpose"):
        job.run(make_spec(60, **MANY), tmp_path / "out")
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


# ------------------------------------------------------------------------------------------------------------------- the stop


@pytest.mark.parametrize("kind", [Stopped, KeyboardInterrupt])
def test_a_stop_breaks_off_what_runs(kind, monkeypatch):
    module, ended, began = Small(blocks=300).eval(), [], threading.Event()
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda _: sleep(0.01) if began.is_set() else None)

    def stop():
        if began.is_set():
            raise kind("stop")

    def capture(lane, ids):
        began.set()
        captured(lane, ids)
        ended.append(1)

    with pytest.raises(kind), opened(module, stop) as side:
        list(side.run(capture, [torch.ones(3, dtype=torch.long)] * 8))
    assert not ended
    began.clear()
    module(torch.ones(1, 3, dtype=torch.long))  # it can be used again


def test_an_interrupt_while_the_lanes_end_waits_for_their_end():
    """What runs writes to files that are closed next."""
    module, began, ending, ended = Small(blocks=300, moment=0).eval(), threading.Event(), threading.Event(), []

    def capture(lane, ids):
        began.set()
        try:
            captured(lane, ids)
        finally:
            if not ending.is_set():
                ending.set()
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            ended.append(1)

    def stop():
        if began.is_set():
            raise Stopped("stop")

    with pytest.raises(KeyboardInterrupt), opened(module, stop) as side:
        module.moment = 0.01
        list(side.run(capture, [torch.ones(3, dtype=torch.long)] * 2))
    assert len(ended) == 2


def test_an_interrupt_while_the_thread_that_joins_is_started_waits_as_well(monkeypatch):
    """A new thread of the system that has not yet run says nothing to the one that started it."""
    name = (
        "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    )  # before Python 3.13
    start, ended, pool = getattr(threading, name), [], ThreadPoolExecutor(1)
    pool.submit(lambda: (time.sleep(0.3), ended.append(1)))

    def slow(bootstrap, *words, **options):
        monkeypatch.setattr(threading, name, start)
        start(lambda: (time.sleep(0.1), bootstrap()), *words, **options)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(threading, name, slow)
    with pytest.raises(KeyboardInterrupt):
        shut_down(pool, cancel=False)
    assert ended == [1]
