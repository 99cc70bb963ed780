"""Job scripts: what they say, what they do with signals and exit codes, and whole dumps made on a real SLURM."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from needs import need

from actdump.errors import UsageError
from actdump.slurm import Job, script, seconds

ROOT = Path(__file__).resolve().parent.parent
ACTDUMP = str(Path(sys.executable).with_name("actdump"))
JOB = Job(("/bin/actdump", "run", "spec.yaml"), "/data", "spec", "1:00:00")


def header(job):
    return [line.removeprefix("#SBATCH ") for line in script(job).splitlines() if line.startswith("#SBATCH")]


def vary(**changes):
    return Job(**{**vars(JOB), **changes})


# ------------------------------------------------------------------------------------------------------------------ the text


def test_the_header_of_a_plain_job():
    assert script(JOB).startswith("#!/bin/bash\n#SBATCH --job-name=spec\n")
    assert header(JOB) == [
        "--job-name=spec", "--time=1:00:00", "--signal=USR1@120", "--output=spec-%j.log", "--open-mode=append", "--no-requeue",
    ]  # fmt: skip


def test_the_header_of_an_array():
    job = vary(tasks=8, gpus=1, requeue=True, extra=("--partition", "long one", "--mem=32G"))
    assert header(job) == [
        "--job-name=spec", "--array=0-7", "--time=1:00:00", "--signal=USR1@120", "--output=spec-%A_%a.log", "--open-mode=append",
        "--requeue", "--gpus=1", "--partition 'long one'", "--mem=32G",
    ]  # fmt: skip


def test_the_name_is_one_that_a_log_can_have():
    assert header(vary(name="100% of 'it' / 2"))[0] == "--job-name=100_of_it_2"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("30", 1800), ("30:10", 1810), ("1:00:00", 3600), ("2-0", 172800), ("2-01:30", 178200), ("2-01:30:05", 178205)],
)
def test_time_limits(limit, expected):
    assert seconds(limit) == expected


@pytest.mark.parametrize("limit", ["", "soon", "1h", "0", "0:00", "1:2:3:4", "-5", "1:", "1-", "1\n", "٣"])
def test_what_is_no_time_limit(limit):
    with pytest.raises(UsageError, match="no time limit; write minutes"):
        script(vary(time=limit))


def test_a_short_job_is_asked_to_stop_in_its_last_quarter():
    assert "--signal=USR1@15" in header(vary(time="1"))


@pytest.mark.parametrize("extra", [("long",), ("--comment=a\nb",)])
def test_what_is_no_option(extra):
    with pytest.raises(UsageError, match="no option of sbatch"):
        script(vary(extra=extra))


# ------------------------------------------------------------------------------------------- what bash makes of it, without SLURM


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >>"$CALLS/options"; shift; done
printf '%s\\n' "$PWD" "$@" >"$CALLS/srun"
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$CALLS/scontrol"
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A folder that tells what stand-ins of srun and scontrol were called with."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path))
    return tmp_path


def bash(job, code=0, **environment):
    environment = {**os.environ, "CODE": str(code), "SLURM_JOB_ID": "12", **environment}
    return subprocess.run(["bash"], input=script(job), text=True, env=environment, timeout=30).returncode


@pytest.mark.parametrize("requeue", [False, True])
@pytest.mark.parametrize("name", ["a b", "it's", 'a "b" $HOME `c`', "line\nbreak", "-x"])
def test_any_name_comes_through_the_shell(name, requeue, calls):
    folder = calls / name
    folder.mkdir()
    assert bash(vary(folder=str(folder), command=("/bin/actdump", name), requeue=requeue)) == 0
    assert (calls / "srun").read_text() == f"{folder}\n/bin/actdump\n{name}\n"


def test_a_folder_that_is_gone_ends_the_job(calls):
    assert bash(vary(folder=str(calls / "gone"))) != 0
    assert not (calls / "srun").exists()


def test_srun_is_told_of_the_cpus(calls):
    bash(vary(folder=str(calls)), SLURM_CPUS_PER_TASK="6")
    assert "--cpus-per-task=6\n" in (calls / "options").read_text()


@pytest.mark.parametrize("code", [0, 1, 2, 65, 74, 75, 137])
@pytest.mark.parametrize("requeue", [False, True])
def test_only_what_was_stopped_is_queued_again_and_only_when_asked_for(requeue, code, calls):
    assert bash(vary(folder=str(calls), requeue=requeue), code) == code
    assert (calls / "scontrol").exists() == (requeue and code == 75)


@pytest.mark.parametrize(
    ("environment", "name"), [({}, "12"), ({"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}, "11_3")]
)
def test_what_is_queued_again_is_this_task(environment, name, calls):
    bash(vary(folder=str(calls), requeue=True), 75, **environment)
    assert (calls / "scontrol").read_text() == f"requeue {name}\n"


@pytest.mark.parametrize(("count", "again"), [("49", True), ("50", False)])
def test_a_job_is_not_queued_for_ever(count, again, calls):
    assert bash(vary(folder=str(calls), requeue=True), 75, SLURM_RESTART_COUNT=count) == 75
    assert (calls / "scontrol").exists() == again


# --------------------------------------------------------------------------------------------------------------- the command


MODEL = """
import os, time
from transformers import GPT2LMHeadModel

class Slow(GPT2LMHeadModel):
    def forward(self, input_ids=None, **rest):
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(float(os.environ.get("PAUSE", "0")))
        return super().forward(input_ids, **rest)
"""
CONFIG = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "bos_token_id": 0, "eos_token_id": 0, "architectures": ["GPT2LMHeadModel"], "auto_map": {"AutoModelForCausalLM": "slow.Slow"},
}  # fmt: skip
SPEC = {  # ten parts of four batches
    "model": {"config": "the model", "trust_remote_code": True},
    "prompts": [{"input_ids": [number, 1, 2, 3, 4]} for number in range(40)],
    "save": ["transformer.h[-1].output[0]"],
    "batch": {"prompts": 1},
    "shard": {"tokens": 20},
    "output": "out",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    modules = tmp_path_factory.mktemp("modules")
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(modules)}


@pytest.fixture
def desk(tmp_path):
    """A working folder with a spec, whose model can be slow."""
    return make_desk(tmp_path / "it's a folder")


def make_desk(folder):
    (folder / "the model").mkdir(parents=True)
    (folder / "the model" / "slow.py").write_text(MODEL)
    (folder / "the model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "spec.yaml").write_text(json.dumps(SPEC))
    return folder


def shell(*words, cwd, environment, code=0, stdin=None):
    done = subprocess.run(words, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_command_hands_everything_on(desk, environment):
    words = ["--time", "1:00:00", "-o", "an out", "--limit", "3", "--set", "batch.prompts=2", "--log-json", "--", "--mem=1G"]
    said = shell(ACTDUMP, "sbatch", "spec.yaml", *words, cwd=desk, environment=environment)
    assert said.stderr == ""
    command = shlex.split(said.stdout.splitlines()[-1])
    assert command[command.index("run") + 1 :] == [
        "spec.yaml",
        "--output",
        "an out",
        "--limit",
        "3",
        "--set",
        "batch.prompts=2",
        "--log-json",
    ]
    assert f" {shlex.quote(str(ACTDUMP))} run" in said.stdout
    assert "\n#SBATCH --mem=1G\n" in said.stdout
    assert f"\ncd -- {shlex.quote(str(desk))} || exit\n" in said.stdout


def test_the_command_of_a_module_is_that_of_the_module(desk, environment):
    words = [sys.executable, "-m", "actdump", "sbatch", "spec.yaml", "--time", "1"]
    said = shell(*words, cwd=desk, environment=environment)
    command = shlex.split(said.stdout.splitlines()[-1])
    assert command[command.index("run") - 3 : command.index("run") + 1] == [sys.executable, "-m", "actdump", "run"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "batch.prompts=many"], "batch.prompts"),
        (["--set", "output=null"], "`output` is missing"),
        (["--set", "prompts={file: '-', format: jsonl}"], "standard input"),
        (["--time", "soon"], "no time limit"),
        (["--array", "0"], "--array"),
        (["--", "long"], "no option of sbatch"),
    ],
)
def test_a_mistake_leaves_sbatch_nothing_to_read(words, said, desk, environment):
    done = shell(ACTDUMP, "sbatch", "spec.yaml", "--time", "1", *words, cwd=desk, environment=environment, code=2)
    assert done.stdout == ""
    assert said in done.stderr


# --------------------------------------------------------------------------------------------------------------- lines of a log


DATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d \S")


def test_in_a_job_every_line_has_its_time(desk, environment):
    job = {**environment, "SLURM_JOB_ID": "12"}
    said = shell(ACTDUMP, "run", "spec.yaml", cwd=desk, environment=job)
    lines = said.stderr.splitlines()
    assert lines
    assert [line for line in lines if not DATED.match(line)] == []
    said = shell(ACTDUMP, "run", "spec.yaml", "--set", "dtype=float16", cwd=desk, environment=job, code=73)
    assert re.match(rf"{DATED.pattern[:-3]} error: out holds another dump", said.stderr)


def test_json_lines(desk, environment):
    said = shell(ACTDUMP, "run", "spec.yaml", "--log-json", cwd=desk, environment=environment)
    lines = [json.loads(line) for line in said.stderr.splitlines()]
    assert {line["level"] for line in lines} == {"info"}
    assert all(re.fullmatch(rf"{DATED.pattern[:-3]}", line["time"]) for line in lines)
    planned = next(line for line in lines if "parts" in line)
    assert (planned["prompts"], planned["tokens"], planned["parts"], planned["parts_done"]) == (40, 200, 10, 0)
    said = shell(ACTDUMP, "run", "gone.yaml", "--log-json", cwd=desk, environment=environment, code=66)
    assert json.loads(said.stderr)["level"] == "error"
    assert said.stdout == ""


# ---------------------------------------------------------------------------------------------------------------- a real SLURM


@pytest.fixture(scope="module")
def cluster(environment):
    """The environment in which sbatch and its kin talk to the node that scripts/local_slurm started."""
    found = subprocess.run(["scripts/local_slurm", "run", "printenv", "SLURM_CONF"], cwd=ROOT, capture_output=True, text=True)
    need(found.returncode == 0, found.stderr)
    return {**environment, "SLURM_CONF": found.stdout.strip()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """What one process writes."""
    desk = make_desk(tmp_path_factory.mktemp("whole"))
    shell(ACTDUMP, "run", "spec.yaml", cwd=desk, environment=environment)
    return contents(desk / "out")


def contents(root):
    """sha256 of every shard, and what the manifest says of the data."""
    shards = {path.name: sha256(path.read_bytes()).hexdigest() for path in root.glob("shards/*.safetensors")}
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["made"], manifest["audit"]["seconds"]
    return shards, manifest


class Queue:
    """Submits jobs from a folder, and waits for them."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment
        self.jobs = []

    def ask(self, *words, stdin=None):
        return shell(*words, cwd=self.folder, environment=self.environment, stdin=stdin).stdout.strip()

    def submit(self, *words, pause=0.0, options=()):
        """`actdump sbatch` with these words, and sbatch with those options; the job's id."""
        self.environment = {**self.environment, "PAUSE": str(pause)}
        text = self.ask(ACTDUMP, "sbatch", "spec.yaml", "--time", "5", *words)
        self.jobs.append(self.ask("sbatch", "--parsable", *options, stdin=text))
        return self.jobs[-1]

    def tasks(self, job):
        """What SLURM knows of each task of a job."""
        lines = self.ask("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]

    def states(self, job):
        return [task["JobState"] for task in self.tasks(job)]

    def end(self, job):
        """Wait until all tasks have ended; the exit code and state of each."""
        self.until(lambda: not self.ask("squeue", "--noheader", "--jobs", job) and self.states(job))
        return sorted((task["JobState"], task["ExitCode"]) for task in self.tasks(job))

    def until(self, happened, seconds=120):
        limit = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < limit, self.logs()
            time.sleep(0.2)
        return found

    def logs(self):
        return {path.name: path.read_text() for path in self.folder.glob("*.log")}

    def records(self):
        return [json.loads(path.read_text()) for path in sorted((self.folder / "out" / "shards").glob("[0-9]*.json"))]

    def slurm(self, name):
        """What the records say of their jobs."""
        return {record["written"]["slurm"].get(name) for record in self.records()}


@pytest.fixture(scope="module")
def limited(tmp_path_factory, cluster):
    """A job that meets its time limit, submitted before all others, because that takes longest.

    SLURM looks at limits every 30 seconds, and asks this job to stop 5 to 35 seconds after its start. Its model is slow until then.
    """
    queue = Queue(make_desk(tmp_path_factory.mktemp("limited") / "desk"), cluster)
    queue.submit("--requeue", "--time", "1", "--", "--signal=USR1@25", pause=1)
    yield queue
    subprocess.run(["scancel", "--quiet", *queue.jobs], env=cluster, check=False)


@pytest.fixture
def queue(desk, cluster, limited):
    queue = Queue(desk, cluster)
    yield queue
    subprocess.run(["scancel", "--quiet", *queue.jobs], env=cluster, check=False)


DONE = ("COMPLETED", "0:0")


def test_an_array_of_four_on_ten_parts(queue, whole):
    job = queue.submit("--array", "4", pause=0.3)
    assert queue.end(job) == [DONE] * 4
    assert contents(queue.folder / "out") == whole
    assert len(queue.records()) == 10
    assert queue.slurm("SLURM_ARRAY_JOB_ID") == {job}
    assert len(queue.slurm("SLURM_ARRAY_TASK_ID")) > 1
    assert queue.slurm("SLURM_RESTART_COUNT") == {"0"}
    made = json.loads((queue.folder / "out" / "manifest.json").read_text())["made"]
    assert made["slurm"]["SLURM_ARRAY_JOB_ID"] == job
    assert made["host"]
    logs = queue.logs()
    assert sorted(logs) == [f"spec-{job}_{task}.log" for task in range(4)]
    assert all(DATED.match(text) for text in logs.values())


def test_an_array_with_holes(queue, whole):
    job = queue.submit("--array", "8", options=["--array=3,7"], pause=0.2)
    assert queue.end(job) == [DONE] * 2
    assert contents(queue.folder / "out") == whole
    assert queue.slurm("SLURM_ARRAY_TASK_ID") == {"3", "7"}


def test_two_processes_of_srun(queue, whole):
    job = queue.submit("--", "--ntasks=2", pause=0.2)
    assert queue.end(job) == [DONE]
    assert contents(queue.folder / "out") == whole
    assert queue.slurm("SLURM_PROCID") == {"0", "1"}


def test_a_signal_stops_a_job_and_the_same_script_goes_on(queue, whole):
    job = queue.submit(pause=1)
    queue.until(queue.records)
    queue.ask("scancel", "--signal=USR1", job)
    assert queue.end(job) == [("FAILED", "75:0")]
    assert "goes on" in queue.logs()[f"spec-{job}.log"]
    kept = {path: path.stat().st_mtime_ns for path in queue.folder.glob("out/shards/[0-9]*.json")}
    assert 0 < len(kept) < 10
    assert queue.end(queue.submit()) == [DONE]
    assert contents(queue.folder / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_task_that_is_killed_is_not_queued_again_and_the_other_does_its_work(queue, whole):
    job = queue.submit("--array", "2", "--requeue", pause=0.4)
    queue.until(lambda: queue.slurm("SLURM_ARRAY_TASK_ID") == {"0", "1"} and len(queue.records()) < 10)
    os.kill(process(job, "1"), signal.SIGKILL)
    assert queue.end(job) == [DONE, ("FAILED", "137:0")]
    assert contents(queue.folder / "out") == whole
    assert {task["Restarts"] for task in queue.tasks(job)} == {"0"}


def process(job, task):
    """The process of actdump in a task of an array."""
    wanted = {f"SLURM_ARRAY_JOB_ID={job}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode(), b"SLURM_PROCID=0"}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            program, environment = (place / "exe").readlink(), (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended, or is the kernel's
        if "python" in program.name and wanted <= set(environment):
            return int(place.name)
    raise AssertionError(f"no process runs task {task} of {job}")


def test_a_cancelled_job_does_not_come_back(queue):
    job = queue.submit("--requeue", pause=1)
    queue.until(queue.records)
    queue.ask("scancel", job)
    assert queue.end(job)[0][0] == "CANCELLED"
    assert queue.tasks(job)[0]["Restarts"] == "0"


def test_a_job_that_meets_its_time_limit_is_queued_again_until_the_dump_is_done(limited, whole):
    (job,) = limited.jobs
    limited.until(lambda: (limited.folder / "out" / "manifest.json").exists())
    assert limited.end(job) == [DONE]
    assert contents(limited.folder / "out") == whole
    assert int(limited.tasks(job)[0]["Restarts"]) >= 1  # more, where the machine is slow
    assert max(map(int, limited.slurm("SLURM_RESTART_COUNT"))) >= 1
    log = limited.logs()[f"spec-{job}.log"]
    assert "goes on" in log
    assert "done: 40 prompts" in log


# ------------------------------------------------------------------------------------------------------------ scripts/local_slurm


def test_starting_a_slurm_that_runs_changes_nothing(cluster):
    before = Path(cluster["SLURM_CONF"]).stat().st_ino
    done = subprocess.run(["scripts/local_slurm", "start"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path(cluster["SLURM_CONF"]).stat().st_ino == before


@pytest.mark.parametrize("words", [[], ["restart"]])
def test_local_slurm_says_what_it_can_do(words):
    done = subprocess.run(["scripts/local_slurm", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "scripts/local_slurm: say start, stop, or run COMMAND...\n"


def test_only_root_starts_it():
    text = (ROOT / "scripts" / "local_slurm").read_text()
    user = {"user": "nobody", "extra_groups": []} if os.getuid() == 0 else {}
    done = subprocess.run(["bash", "-s", "start"], input=text, cwd="/", capture_output=True, text=True, timeout=60, **user)
    assert done.returncode == 1
    assert done.stderr == "scripts/local_slurm: only root can start and stop SLURM's daemons\n"
