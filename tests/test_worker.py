"""Workers: which one this is, who has which part, and the same bytes from any number of them; stop signals."""

import errno
import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from threading import Event

import pytest
import torch
from test_job import contents, forks, make_spec, stop_after, temporary

from actdump import job, store
from actdump.errors import OccupiedError, Stopped, UsageError
from actdump.format import Folder
from actdump.format import temporary as temporary_name
from actdump.plan import Part, Span
from actdump.signals import StopSignals, seconds
from actdump.store.locks import Lock
from actdump.worker import Worker, which

__all__ = ["forks"]

# ------------------------------------------------------------------------------------------------------------------- which one

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9", "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "5",
}  # fmt: skip
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, Worker()),
        (TORCHRUN, Worker(6, 8, 2)),
        (STEP, Worker(1, 3, 1)),
        ({**STEP, "SLURM_NTASKS": "12", "SLURM_STEP_NUM_TASKS": "2"}, Worker(1, 2, 1)),  # a step of a part of the job
        (STEP | TORCHRUN, Worker(6, 8, 2)),  # srun started torchrun
        (ARRAY, Worker(2, 5)),
        (ARRAY | STEP, Worker(2 * 3 + 1, 5 * 3, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Worker(0, 1, 0)),  # the shell of a batch job
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MAX": "7"}, Worker()),  # 1,7
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, Worker()),
        (ARRAY | dict.fromkeys(["SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX"], "5") | {"SLURM_ARRAY_TASK_COUNT": "1"}, Worker()),
        ({"RANK": "x", "WORLD_SIZE": "8"}, Worker()),
        ({"RANK": "8", "WORLD_SIZE": "8"}, Worker()),
    ],
)  # fmt: skip
def test_the_environment_says_which_worker_this_is(environment, worker):
    assert which(None, environment) == worker


def test_the_option_goes_before_the_environment():
    assert which("off", ARRAY | STEP | TORCHRUN) == Worker()
    assert which("1/4", TORCHRUN) == Worker(1, 4, 2)
    assert [which(f"{number}/3", {}).index for number in (0, 1, 2)] == [0, 1, 2]
    assert sorted(which(f"{number}/3", {}).index for number in (1, 2, 3)) == [0, 1, 2]


@pytest.mark.parametrize("wrong", ["", "3", "a/b", "-1/3", "4/3", "0/0", "1/2/3", "on"])
def test_a_wrong_worker_is_refused(wrong):
    with pytest.raises(UsageError, match="--worker"):
        which(wrong, {})


@pytest.mark.parametrize(("text", "expected"), [("3600", 3600), ("90s", 90), ("55m", 3300), ("1h30m", 5400), ("1h1m1s", 3661)])
def test_a_time_in_seconds(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize(("before", "ends"), [("with StopSignals(): pass", "0"), ("let_go()", "-{number}")])
def test_a_signal_after_a_run_changes_nothing_and_another_command_it_ends(before, ends, name):
    """As of a job whose time limit comes when the dump is sealed."""
    number = signal.Signals[name].value
    code = f"""
import os, threading
from actdump.signals import StopSignals, hold, let_go
hold()
{before}
threading.Thread(target=os.kill, args=(os.getpid(), {number})).start()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert str(done.returncode) == ends.format(number=number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_changes_nothing_while_python_ends(name):
    """When it takes modules apart, its handlers are gone."""
    code = f"""
import os, sys
from actdump import cli
class Late:
    def __init__(self): self.kill, self.process = os.kill, os.getpid()
    def __del__(self): self.kill(self.process, {signal.Signals[name].value})
late = Late()
sys.argv[1:] = ["schema"]
cli.main()
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("wrong", ["", "0", "-5", "1d", "m", "1m1h", "5 m", "1:00", "1h30"])
def test_a_wrong_time_is_refused(wrong):
    with pytest.raises(UsageError, match="--stop-after"):
        seconds(wrong)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_own_parts_come_first_and_every_part_is_somebodys(count):
    parts = [Part(number, (Span(number, number, 1, 1, 1),)) for number in range(12)]
    workers = [Worker(index, count) for index in range(count)]
    for worker in workers:
        order = worker.order(parts)
        own = [part for part in parts if worker.owns(part)]
        assert order[: len(own)] == own
        assert sorted(order, key=lambda part: part.number) == parts
    assert all(sum(worker.owns(part) for worker in workers) == 1 for part in parts)


def test_several_devices_are_shared_out_among_the_workers_of_a_machine(monkeypatch):
    import torch

    from actdump.job import planning
    from actdump.spec import ModelSpec

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    auto = ModelSpec(name="some/model")
    assert [planning._on_own_device(auto, local).device for local in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    for spec in (auto.model_copy(update={"device": "cpu"}), auto.model_copy(update={"device_map": "auto"})):
        assert planning._on_own_device(spec, 3) == spec
    assert planning._on_own_device(auto, None) == auto
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert planning._on_own_device(auto, 3) == auto


# ----------------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from actdump import store
from actdump.format import Folder
from actdump.plan import Part, Span
crew = store.Crew(Folder(Path(sys.argv[1])))
crew.join()
assert crew.claim(Part(3, (Span(3, 0, 1, 1, 1),)))
print(store.me(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return Folder(tmp_path / "out")


@contextmanager
def holding(folder):
    """Another process that works in the folder, and has part 3; its name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder.root], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


def test_a_part_is_one_workers_until_it_is_done_or_the_worker_dies(folder):
    part = Part(3, (Span(3, 0, 1, 1, 1),))
    with holding(folder) as (name, process), store.Crew(folder) as crew:
        assert crew.claim(part) is None
        assert crew.others() == [name]
        assert store.at_work(folder) == {3: (process.pid, platform.node())}
        process.kill()
        process.wait()
        assert crew.others() == []
        assert store.at_work(folder) == {}
        assert folder.claim(3).exists()  # who only looks changes nothing
        claim = crew.claim(part)
        assert claim is not None
        assert crew.claim(part) is None  # nor twice to one
        claim.remove()
        assert not folder.claim(3).exists()
        assert store.at_work(folder) == {}
    store.sweep(folder)
    assert [path.name for path in folder.root.rglob("*")] == ["shards"]


def test_a_lock_whose_file_was_removed_locks_nothing(folder):
    first = Lock.take(folder.lock, "a")
    folder.lock.unlink()
    second = Lock.take(folder.lock, "b")
    assert (first is not None, second is not None) == (True, True)
    first.free()
    assert folder.lock.read_text() == "b"
    second.remove()
    assert list(folder.root.iterdir()) == []


def test_what_living_processes_write_is_not_swept_whatever_their_host(folder):
    folder.shards.mkdir()
    living, dead, unknown = "7-0123abcd-far.away", "8-0123abcd-far.away", "9-0123abcd-far.away"
    held = Lock.take(folder.worker(living), living)
    Lock.take(folder.worker(dead), dead).free()
    left = [temporary_name(folder.shard(0), process) for process in (living, dead, unknown)]
    for path in left:
        path.write_bytes(b"")
    store.sweep(folder)
    assert [path.exists() for path in left] == [True, False, True]
    assert [folder.worker(process).exists() for process in (living, dead)] == [True, False]
    held.remove()


def test_a_crew_that_wrote_nothing_leaves_nothing(folder):
    with store.Crew(folder) as crew, crew.deciding(lambda: None):
        crew.join()
        assert sorted(path.name for path in folder.root.iterdir()) == sorted([folder.lock.name, folder.worker(store.me()).name])
    assert not folder.root.exists()


def test_only_one_decides(folder):
    asked = []

    def waiting():
        asked.append(len(asked))
        if len(asked) == 3:
            lock.remove()

    lock = Lock.take(folder.lock, "another")
    with store.Crew(folder) as crew, crew.deciding(waiting):
        assert asked == [0, 1, 2]


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def refuse(self, *_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)


def test_without_locks_a_worker_says_so_once_and_keeps_to_its_own_share(no_locks, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("actdump.job.sharing.PATIENCE", 0.5)
    spec, root = make_spec(30, shard={"tokens": 40}), tmp_path / "out"
    with pytest.raises(Stopped, match=r"parts of others are not, with \d+ of 30 prompts kept; the same command goes on"):
        job.run(spec, root, worker=Worker(0, 2))
    assert [record.message for record in caplog.records] == [
        f"{root}: this file system has no locks, so every worker keeps to its own share"
    ]
    assert {int(path.stem) % 2 for path in (root / "shards").glob("*.json")} == {0}
    assert job.run(spec, root, worker=Worker(1, 2)).state == "done"
    job.run(spec, tmp_path / "whole")
    assert contents(root) == contents(tmp_path / "whole")
    assert temporary(root) == []


def test_a_worker_looks_less_often_the_longer_it_waits_for_another(tmp_path, monkeypatch):
    spec, root, clock, looks = make_spec(30, shard={"tokens": 40}), tmp_path / "out", [0.0], []
    with pytest.raises(Stopped):
        job.run(spec, root, **stop_after(1, root))
    missing, last = store.missing, store.load_plan(Folder(root))[0].parts[-1]
    other = Lock.take(Folder(root).claim(last.number), "another")

    def sleep(seconds):
        clock[0] += seconds
        if clock[0] > 300:
            other.remove()

    def looked(*arguments):
        looks.append(clock[0])
        return missing(*arguments)

    monkeypatch.setattr("actdump.job.sharing.monotonic", lambda: clock[0])
    monkeypatch.setattr("actdump.job.sharing.sleep", sleep)
    monkeypatch.setattr(store, "missing", looked)
    assert job.run(spec, root).state == "done"
    assert len(looks) < 150  # five a second would be 1,500
    assert max(after - before for before, after in pairwise(looks)) < 5.3
    assert clock[0] < 306


def test_without_locks_an_overwrite_replaces_a_dump_of_other_weights(no_locks, tmp_path, monkeypatch):
    spec, root = make_spec(30, shard={"tokens": 40}), tmp_path / "out"
    with monkeypatch.context() as earlier:  # what another version of torch or transformers could do
        seed = torch.manual_seed
        earlier.setattr(torch, "manual_seed", lambda number: seed(number + 1))
        with pytest.raises(Stopped):
            job.run(spec, root, **stop_after(3, root))
    assert job.run(spec, root, overwrite=True).state == "done"
    job.run(spec, tmp_path / "whole")
    assert contents(root) == contents(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------------- several workers


class Counting(job.watching.Silent):
    """Counts the prompts that went through the model."""

    def __init__(self):
        self.prompts = 0

    def batch(self, prompts, tokens):
        self.prompts += prompts


def work(spec, root, index, count, counts=None):
    watcher = Counting()
    job.run(spec, root, worker=Worker(index, count), watcher=watcher)
    if counts is not None:
        counts.put(watcher.prompts)


@pytest.fixture(scope="module")
def spec():
    return make_spec(150, shard={"tokens": 80, "size": 3200}, batch={"tokens": 20})  # parts of two shards


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """The dump that one process with one thread makes."""
    root = tmp_path_factory.mktemp("whole") / "out"
    program = "import pickle, sys\nfrom actdump import job\njob.run(*pickle.load(sys.stdin.buffer))"
    subprocess.run([sys.executable, "-c", program], input=pickle.dumps((spec, root)), check=True, env=ALONE)
    return root


ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.usefixtures("one_thread")


def ended(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("count", [2, 5])
def test_any_number_of_workers_write_the_same_bytes(count, spec, whole, tmp_path, forks):
    root = tmp_path / "out"
    counts = forks.Queue()
    processes = [forks.Process(target=work, args=(spec, root, index, count, counts)) for index in range(count)]
    for process in processes:
        process.start()
    done = [counts.get(timeout=60) for _ in processes]
    assert ended(processes) == [0] * count
    assert sum(done) == 150  # nothing is computed twice
    assert sum(each > 0 for each in done) > 1
    assert contents(root) == contents(whole)
    assert sorted(path.name for path in root.iterdir()) == ["manifest.json", "plan.json", "prompts.jsonl", "shards"]
    assert temporary(root) == []


def test_workers_that_are_killed_and_started_again_write_the_same_bytes(spec, whole, tmp_path, forks):
    root, codes = tmp_path / "out", []
    for kills in range(6):
        processes = [forks.Process(target=work, args=(spec, root, index, 2)) for index in range(2)]
        for process in processes:
            process.start()
        until_parts(root, 4 * kills, processes[0])
        processes[kills % 2].kill()
        if kills % 3 == 0:
            processes[1 - kills % 2].kill()
        codes += ended(processes)
    assert set(codes) == {-9, 0}
    assert contents(root) == contents(whole)
    assert job.run(spec, root).state == "up to date"


def until_parts(root, count, process):
    """Until more parts than that are done, or the process has ended."""
    until(lambda: len(list(root.glob("shards/*.json"))) > count or not process.is_alive())


def until(true, most=30.0):
    end = time.monotonic() + most
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_a_dead_worker_had_in_hand_is_taken_by_one_that_waits(spec, whole, tmp_path):
    """The only part that is left is another's; it dies while we wait."""
    root = tmp_path / "out"
    shutil.copytree(whole, root)
    Folder(root).manifest.unlink()
    plan, _ = store.load_plan(Folder(root))
    for shard in plan.parts[3].shards:
        Folder(root).record(shard.number).unlink()
    with holding(Folder(root)) as (_, process):

        def step(doing):
            if doing == "waiting for other workers":
                process.kill()

        watcher = job.watching.Silent()
        watcher.step = step
        assert job.run(spec, root, watcher=watcher).state == "done"
        assert process.wait() == -signal.SIGKILL
    assert contents(root)[0] == contents(whole)[0]


def test_a_worker_that_comes_late_finds_the_dump_up_to_date(spec, whole, tmp_path):
    """It comes while another seals: before it decides anything, it looks again."""
    root = tmp_path / "out"
    root.mkdir()
    lock = Lock.take(Folder(root).lock, "another")

    def step(doing):
        if doing == "waiting for another worker":
            shutil.copytree(whole, root, dirs_exist_ok=True)
            lock.remove()

    watcher = job.watching.Silent()
    watcher.step = step
    assert job.run(spec, root, watcher=watcher).state == "up to date"
    assert contents(root) == contents(whole)


def test_another_spec_is_refused_while_a_run_is_at_work(spec, tmp_path):
    root = tmp_path / "out"
    with pytest.raises(Stopped):
        job.run(spec, root, stopping=lambda: (root / "plan.json").exists())
    other = make_spec(20)
    with holding(Folder(root)) as (_, process):
        with pytest.raises(OccupiedError, match="holds another dump"):
            job.run(other, root)
        with pytest.raises(OccupiedError, match=rf"another run \(process {process.pid} on .*\) is at work"):
            job.run(other, root, overwrite=True)
        assert (root / "plan.json").exists()
    assert job.run(other, root, overwrite=True).state == "done"


def test_another_spec_is_refused_in_the_race_for_the_plan(spec, tmp_path, forks):
    """Both start in an empty folder; one makes the plan, and the other finds it."""
    root = tmp_path / "out"
    specs = [spec, make_spec(150, tokens="last")]
    processes = [forks.Process(target=work_or_refuse, args=(each, root)) for each in specs]
    for process in processes:
        process.start()
    codes = ended(processes)
    assert sorted(codes) == [0, 73]
    assert job.run(specs[codes.index(0)], root).state == "up to date"


def work_or_refuse(spec, root):
    try:
        job.run(spec, root)
    except OccupiedError as error:
        sys.exit(error.code)


# ---------------------------------------------------------------------------------------------------------------------- stopping


def test_signals_only_set_a_flag_and_the_second_ctrl_c_ends():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        with StopSignals() as signals:
            assert not signals.asked
            signal.raise_signal(number)
            assert signals.asked
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            else:
                signal.raise_signal(signal.SIGINT)  # the first one, though not the first signal
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == before


def test_a_stop_after_a_time():
    signals = StopSignals()
    signals.ask_after(60.0)
    assert not signals.asked
    signals.ask_after(0.0)
    assert signals.asked


def test_a_model_that_is_being_loaded_is_not_waited_for(tmp_path, monkeypatch):
    gate = Event()
    monkeypatch.setattr("actdump.model.load", lambda source: gate.wait(60))
    began = time.monotonic()
    try:
        with pytest.raises(Stopped, match="goes on"):
            job.run(make_spec(), tmp_path / "out", stopping=lambda: time.monotonic() > began + 0.5)
        assert job.abandoned()
        assert not (tmp_path / "out").exists()
    finally:
        gate.set()
    until(lambda: not job.abandoned())


LOADS_FOR_EVER = """
import sys, time
from actdump import model
from actdump.cli import main
def load(source):
    print("loads", file=sys.stderr, flush=True)
    time.sleep(60)
model.load = load
main()
"""


@pytest.fixture
def written(spec, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec.model_dump(mode="json", exclude_defaults=True)))
    return path


def command(*words, program="from actdump.cli import main; main()"):
    return subprocess.Popen(
        [sys.executable, "-c", program, "run", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_while_the_model_loads(number, written, tmp_path):
    process = command(written, "-o", tmp_path / "out", program=LOADS_FOR_EVER)
    while process.stderr.readline() != "loads\n":
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (75, "")
    assert err.splitlines() == [
        f"error: {tmp_path / 'out'}: stopped before the end, with nothing written yet; the same command goes on with it"
    ]
    assert not (tmp_path / "out").exists()


def test_a_run_that_waits_for_another_worker_stops_too(written, tmp_path):
    folder = Folder(tmp_path / "out")
    folder.root.mkdir()
    lock = Lock.take(folder.lock, "another")
    process = command(written, "-o", folder.root, "--exit-code-stopped", "99")
    while process.stderr.readline() != "waiting for another worker\n":
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 99
    assert err.endswith("the same command goes on with it\n")
    lock.remove()


def test_a_run_stops_by_itself_and_goes_on(spec, whole, written, tmp_path):
    root = tmp_path / "out"
    slow = command(written, "-o", root, "--stop-after", "5s", program=SLOW)
    _, err = slow.communicate(timeout=60)
    assert slow.returncode == 75
    kept = sum(json.loads(path.read_text())["prompts"] for path in (root / "shards").glob("*.json"))
    assert f"stopped before the end, with {kept or 'none'} of " in err
    rest = command(written, "-o", root, "--stop-after", "1h")
    rest.communicate(timeout=60)
    assert rest.returncode == 0
    assert contents(root) == contents(whole)


SLOW = """
import time
from actdump import engine
from actdump.cli import main
real = engine.stream
def stream(*args, **kwargs):
    time.sleep(0.2)
    return real(*args, **kwargs)
engine.stream = stream
main()
"""
