"""The job: rerun, stopped, killed and gone on with, and always the same bytes."""

import gc
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from threading import current_thread

import pytest
import torch
from torch.backends.cuda import cudnn_sdp_enabled
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2LMHeadModel

import actdump
from actdump import engine, inputs, job, store, verify
from actdump.errors import ActdumpError, DataError, OccupiedError, Stopped, StorageError, UsageError
from actdump.format import Folder
from actdump.job import bound, capturing, lanes, loop
from actdump.job.bound import SHARDS, SHARDS_ACCELERATOR
from actdump.job.watching import Silent
from actdump.spec import Spec, load
from actdump.store import pending

CONFIG = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SAVE = {
    "block": "transformer.h[-1].output[0]",
    "mlp": {"address": "transformer.h[0].mlp.output", "tokens": "last"},
    "mean": {"address": "transformer.h[0].output[0]", "tokens": "mean", "dtype": "bfloat16"},
}


def prompts(count, seed=0):
    generator = random.Random(seed)
    return [
        {
            "id": f"p{number}",
            "input_ids": [generator.randrange(40) for _ in range(generator.randint(1, 20))],
            "label": number % 3,
        }
        for number in range(count)
    ]


def make_spec(count=12, **other):
    return Spec.model_validate({"model": {"config": CONFIG}, "prompts": prompts(count), "save": SAVE, **other})


def snapshot(root):
    """Everything that shows whether a file was touched."""
    found = {}
    for path in (root, *root.rglob("*")):
        status = path.stat()
        found[path] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
    return found


def contents(root):
    """The bytes that a dump consists of, without what its records say of the writing."""
    files = {
        path.name: path.read_bytes()
        for path in (*root.glob("shards/*.safetensors"), root / "prompts.jsonl", root / "plan.json")
    }
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["made"], manifest["audit"]["seconds"]
    return files, manifest


def temporary(root):
    return [path for path in root.rglob("*") if path.name.startswith(".") or path.name.endswith("tmp")]


def states(spec, root, **options):
    return job.run(spec, root, **options).state


def same(found, expected, tolerance=1e-5):
    """Whether every token, which is what stands along the last axis, is off by no more than this share of its norm."""
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    return bool(((found - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all())


# ---------------------------------------------------------------------------------------------------------------- up to date


def test_a_rerun_is_up_to_date_and_touches_nothing(tmp_path):
    assert states(make_spec(), tmp_path / "out") == "done"
    before = snapshot(tmp_path / "out")
    outcome = job.run(make_spec(), tmp_path / "out")
    assert outcome.state == "up to date"
    assert outcome.path == tmp_path / "out/manifest.json"
    assert outcome.manifest.prompts == 12
    assert states(make_spec(), tmp_path / "out", overwrite=True) == "up to date"
    assert snapshot(tmp_path / "out") == before


RERUN = """
import sys
from pathlib import Path
from actdump import job, spec
print(job.run(spec.load(Path(sys.argv[1])), Path(sys.argv[2])).state)
print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


def test_up_to_date_needs_no_torch(tmp_path):
    path = tmp_path / "spec.yaml"
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts(5))))
    path.write_text(
        json.dumps({"model": {"config": CONFIG}, "prompts": {"file": str(tmp_path / "prompts.jsonl")}, "save": SAVE})
    )
    assert states(load(path), tmp_path / "out") == "done"
    answer = subprocess.run([sys.executable, "-c", RERUN, path, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert answer.stdout == "up to date\n[]\n"


COSMETIC = {
    "comments and order": """
        # a comment
        save: ["transformer.h[0].output[0]"]
        prompts: [{input_ids: [1, 2, 3]}]
        model: {seed: 0, config: {n_embd: 16, model_type: gpt2, n_layer: 1, n_head: 4, vocab_size: 40}}
        """,
    "defaults spelled out": """
        model: {config: {model_type: gpt2, vocab_size: 40, n_embd: 16, n_layer: 1, n_head: 4}, dtype: auto, trust_remote_code: false}
        prompts: {rows: [{input_ids: [1, 2, 3]}]}
        save: [{address: "transformer.h[0].output[0]"}]
        shard: {tokens: 262_144, size: 1 GB}
        batch: {tokens: auto}
        """,
    "another output and device": """
        model: {config: {model_type: gpt2, vocab_size: 40, n_embd: 16, n_layer: 1, n_head: 4}, device: cpu}
        prompts: [{input_ids: [1, 2, 3]}]
        save: ["transformer.h[0].output[0]"]
        output: elsewhere
        """,
}
DECISIVE = {
    "another seed": {"model": {"config": CONFIG, "seed": 1}},
    "another layer": {"save": ["transformer.h[0].output[0]"]},
    "another selection": {"tokens": "last"},
    "another storage type": {"dtype": "float16"},
    "another batch": {"batch": {"tokens": 64}},
    "other shards": {"shard": {"tokens": 64}},
    "one prompt more": {"prompts": prompts(13)},
}


@pytest.mark.parametrize("edit", COSMETIC)
def test_cosmetic_edits_leave_a_dump_up_to_date(edit, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(
        "model: {config: {model_type: gpt2, vocab_size: 40, n_embd: 16, n_layer: 1, n_head: 4}}\n"
        "prompts: [{input_ids: [1, 2, 3]}]\n"
        'save: ["transformer.h[0].output[0]"]\n'
    )
    assert states(load(path), tmp_path / "out") == "done"
    path.write_text(COSMETIC[edit])
    assert states(load(path), tmp_path / "out") == "up to date"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "out"
    job.run(make_spec(), root)
    return root


@pytest.mark.parametrize("edit", DECISIVE)
def test_another_dump_in_the_folder_is_refused(edit, finished):
    spec = Spec.model_validate({"model": {"config": CONFIG}, "prompts": prompts(12), "save": SAVE, **DECISIVE[edit]})
    before = snapshot(finished)
    with pytest.raises(OccupiedError, match="holds another dump"):
        job.run(spec, finished)
    assert snapshot(finished) == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(OccupiedError, match=r"thesis\.tex"):
        job.run(make_spec(), tmp_path)
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_what_is_ours_and_nothing_else(finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "out")
    (root / "notes.txt").write_text("mine")
    (root / "shards" / "notes.txt").write_text("mine too")
    spec = make_spec(5, shard={"tokens": 30})
    assert states(spec, root, overwrite=True) == "done"
    assert (root / "notes.txt").read_text() == "mine"
    assert (root / "shards" / "notes.txt").read_text() == "mine too"
    job.run(spec, tmp_path / "fresh")
    assert contents(root) == contents(tmp_path / "fresh")
    assert states(make_spec(), root, overwrite=True) == "done"
    assert contents(root) == contents(finished)
    assert sorted(path.name for path in (root / "shards").iterdir()) == ["00000.json", "00000.safetensors", "notes.txt"]


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"repair": True}, {"overwrite": True, "repair": True}], ids=str)
def test_files_of_others_with_our_names_are_left_alone(options, tmp_path):
    """A `plan.json` is no proof that the rest is ours: other tools write one, too."""
    for name in ("plan.json", "prompts.jsonl", "manifest.json"):
        (tmp_path / name).write_text('{"format_version": "1.2"}')
    before = snapshot(tmp_path)
    with pytest.raises(OccupiedError, match=r"but a plan\.json that is not actdump's; choose another folder, or remove them$"):
        job.run(make_spec(), tmp_path, **options)
    assert snapshot(tmp_path) == before


def test_an_overwrite_needs_no_room_beside_what_it_replaces(finished, tmp_path, monkeypatch):
    root = shutil.copytree(finished, tmp_path / "out")
    spec, size = make_spec(model={"config": CONFIG, "seed": 3}), sum(path.stat().st_size for path in root.glob("shards/*"))
    disk = size + size // 2
    monkeypatch.setattr(
        "actdump.store.checks.free_space", lambda _: disk - sum(path.stat().st_size for path in tmp_path.glob("*/shards/*"))
    )
    with pytest.raises(StorageError, match="make room"):
        job.run(spec, tmp_path / "new")
    assert states(spec, root, overwrite=True) == "done"


def test_shards_on_another_disk_are_replaced_there(tmp_path):
    assert states(make_spec(), tmp_path / "out") == "done"
    (tmp_path / "out/shards").rename(tmp_path / "large")
    (tmp_path / "out/shards").symlink_to(tmp_path / "large")
    assert states(make_spec(tokens="last"), tmp_path / "out", overwrite=True) == "done"
    assert (tmp_path / "out/shards").is_symlink()
    assert sorted(path.suffix for path in (tmp_path / "large").iterdir()) == [".json", ".safetensors"]


def test_an_overwrite_that_cannot_be_done_leaves_the_old_dump(finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "out")
    before = snapshot(root)
    with pytest.raises(actdump.ActdumpError, match=r"h\[7\]|has 2 entries"):
        job.run(make_spec(save=["transformer.h[7].output"]), root, overwrite=True)
    assert {path: seen for path, seen in snapshot(root).items() if path != root} == {
        path: seen for path, seen in before.items() if path != root
    }
    assert states(make_spec(), root) == "up to date"


# ------------------------------------------------------------------------------------------------------------- what was used


@pytest.fixture
def on_files(tmp_path):
    """A spec whose model and prompts are local files."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts(8)))
    spec = Spec.model_validate(
        {
            "model": str(tmp_path / "model"),
            "prompts": {"file": str(tmp_path / "prompts.jsonl"), "text": "input_ids"},
            "save": SAVE,
        }
    )
    assert states(spec, tmp_path / "out") == "done"
    return spec


@pytest.mark.parametrize("name", ["prompts.jsonl", "model/config.json", "model/model.safetensors"])
def test_a_touched_input_is_read_again_and_a_changed_one_noticed(name, on_files, tmp_path):
    path = tmp_path / name
    os.utime(path, ns=(1, 1))
    assert states(on_files, tmp_path / "out") == "up to date"
    before = snapshot(tmp_path / "out")
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # of the same size, and later
    path.write_bytes(content)
    with pytest.raises(OccupiedError, match="has changed"):
        job.run(on_files, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


def test_a_dump_that_was_replaced_while_inputs_were_read_is_left_alone(on_files, tmp_path, monkeypatch):
    """A touched input is read, which can take minutes; what comes of it is not written over another run's plan."""
    sha256, out = inputs.sha256, tmp_path / "out"
    os.utime(tmp_path / "model/model.safetensors", ns=(1, 1))

    def slow(path, *rest):
        monkeypatch.setattr(inputs, "sha256", sha256)
        assert states(on_files.model_copy(update={"dtype": "float16"}), out, overwrite=True) == "done"
        return sha256(path, *rest)

    monkeypatch.setattr(inputs, "sha256", slow)
    with pytest.raises(OccupiedError, match=r"`dtype` was float16 and is not given"):
        job.run(on_files, out)
    assert json.loads((out / "manifest.json").read_text())["facts"]["spec"]["dtype"] == "float16"


def test_a_new_file_in_the_models_folder_is_noticed(on_files, tmp_path):
    (tmp_path / "model" / "README.md").write_text("no part of the model")
    assert states(on_files, tmp_path / "out") == "up to date"
    (tmp_path / "model" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(OccupiedError, match="is new"):
        job.run(on_files, tmp_path / "out")


def test_moved_inputs_are_the_same(on_files, tmp_path):
    (tmp_path / "moved").mkdir()
    for name in ("model", "prompts.jsonl"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = on_files.model_dump(exclude_defaults=True)
    moved["model"]["name"] = str(tmp_path / "moved" / "model")
    moved["prompts"]["file"] = str(tmp_path / "moved" / "prompts.jsonl")
    assert states(Spec.model_validate(moved), tmp_path / "out") == "up to date"


def test_a_model_that_is_gone_is_told_apart_from_another(on_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = on_files.model_copy(update={"model": on_files.model.model_copy(update={"name": "models/gone"})})
    with pytest.raises(OccupiedError, match=r"`model\.name` was local files and is models/gone, where there are none"):
        job.run(gone, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- stopped and damaged


def stop_after(batches, root):
    """What makes a run stop after so many batches, however often it is asked meanwhile."""
    watcher, seen = Silent(), []
    watcher.batch = lambda prompts, tokens: seen.append(prompts)
    return {"watcher": watcher, "stopping": lambda: (root / "plan.json").exists() and len(seen) >= batches}


@pytest.mark.parametrize("answers", [0, 1])  # asked with each chunk of prompts, and when the model is loaded
def test_a_run_stopped_before_its_plan_leaves_nothing_and_goes_on(answers, tmp_path):
    asked = iter(range(answers))
    with pytest.raises(Stopped, match="goes on"):
        job.run(make_spec(30), tmp_path / "out", stopping=lambda: next(asked, None) is None)
    assert list((tmp_path / "out").rglob("*")) == []
    assert states(make_spec(30), tmp_path / "out") == "done"


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_a_stopped_run_goes_on(batches, tmp_path):
    spec = make_spec(30, shard={"tokens": 40}, batch={"tokens": 20})
    job.run(spec, tmp_path / "whole")
    with pytest.raises(Stopped, match="goes on"):
        job.run(spec, tmp_path / "out", **stop_after(batches, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert temporary(tmp_path / "out") == []
    kept = {path: seen for path, seen in snapshot(tmp_path / "out").items() if path.parent.name == "shards"}
    assert states(spec, tmp_path / "out") == "done"
    after = snapshot(tmp_path / "out")
    assert {path: after[path] for path in kept} == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / "plan.tokens").exists()


def test_another_spec_does_not_go_on_with_an_unfinished_dump(tmp_path):
    with pytest.raises(Stopped):
        job.run(make_spec(30, shard={"tokens": 40}), tmp_path / "out", **stop_after(3, tmp_path / "out"))
    with pytest.raises(OccupiedError, match="`tokens`"):
        job.run(make_spec(30, shard={"tokens": 40}, tokens="last"), tmp_path / "out")


def test_other_random_weights_do_not_go_on_with_a_dump(tmp_path, monkeypatch):
    spec = make_spec(30, shard={"tokens": 40})
    with pytest.raises(Stopped):
        job.run(spec, tmp_path / "out", **stop_after(3, tmp_path / "out"))
    with monkeypatch.context() as later:  # what another version of torch or transformers could do
        seed = torch.manual_seed
        later.setattr(torch, "manual_seed", lambda number: seed(number + 1))
        with pytest.raises(DataError, match="the model's weights are not those of the plan"):
            job.run(spec, tmp_path / "out")
        assert job.run(spec, tmp_path / "other").state == "done"
        with pytest.raises(Stopped):
            job.run(spec, tmp_path / "replaced", **stop_after(3, tmp_path / "replaced"))
    assert job.run(spec, tmp_path / "replaced", overwrite=True).state == "done"
    assert states(spec, tmp_path / "out") == "done"
    assert contents(tmp_path / "replaced") == contents(tmp_path / "out") != contents(tmp_path / "other")


def test_weights_that_a_checkpoint_lacks_are_the_same_in_every_process(tmp_path):
    config = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")  # which has no pooler
    spec = make_spec(4, model={"name": str(tmp_path / "bert"), "task": "base"}, save=["pooler.output"])
    for turn, name in enumerate(("one", "other")):
        torch.manual_seed(turn)
        job.run(spec, tmp_path / name)
        assert torch.initial_seed() == turn  # the caller's
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def lose(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shards/00001.safetensors", lose),
        ("shards/00001.safetensors", cut),
        ("shards/00000.json", lose),
        ("manifest.json", lose),
        ("manifest.json", cut),
        ("prompts.jsonl", lose),
        ("prompts.jsonl", cut),
    ],
)
def test_what_is_missing_or_cut_is_made_again(name, damage, tmp_path):
    spec = make_spec(30, shard={"tokens": 100})
    job.run(spec, tmp_path / "out")
    whole = contents(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    damage(tmp_path / "out" / name)
    assert states(spec, tmp_path / "out") == "done"
    assert contents(tmp_path / "out") == whole
    other = tmp_path / "out" / "shards" / "00002.safetensors"
    assert snapshot(tmp_path / "out")[other] == before[other]
    assert temporary(tmp_path / "out") == []
    assert states(spec, tmp_path / "out") == "up to date"


def test_a_part_that_another_worker_gives_up_is_made_again(tmp_path, monkeypatch):
    """One that repairs finds damage in a part that was done when this one began."""
    spec = make_spec(shard={"tokens": 40})
    job.run(spec, tmp_path / "whole")
    write_parts, out = loop.write_parts, tmp_path / "out"

    def given_up(*words):
        write_parts(*words)
        monkeypatch.setattr(loop, "write_parts", write_parts)
        (out / "shards/00001.json").unlink()

    monkeypatch.setattr(loop, "write_parts", given_up)
    assert states(spec, out) == "done"
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["statistics", "columns"])
def test_a_manifest_that_lost_a_part_of_it_is_told(lost, finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "out")
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest[lost]
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest\.json: not a manifest: '{lost}'"):
        job.run(make_spec(), root)
    assert states(make_spec(), root, repair=True) == "done"


HUB = """
import os
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
config, place = AutoConfig.for_model(**{config!r}), Path(os.environ["HF_HUB_CACHE"], "models--org--tiny")
for number, commit in enumerate(("a" * 40, "b" * 40)):
    torch.manual_seed(number)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "snapshots" / commit)
(place / "refs").mkdir()
(place / "refs/main").write_text("a" * 40)
"""


def test_a_dump_is_finished_with_the_commit_that_it_was_begun_with(tmp_path):
    """Whatever the branch on the hub has become, or another machine's cache knows of it."""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out, place = tmp_path / "out", tmp_path / "hub/models--org--tiny"
    spec = {"model": "org/tiny", "prompts": prompts(12), "save": SAVE, "shard": {"tokens": 40}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))

    def command(*words):
        subprocess.run([sys.executable, *map(str, words)], env=environment, check=True, capture_output=True)

    command("-c", HUB.format(config=CONFIG))
    command("-m", "actdump", "run", tmp_path / "spec.yaml", "-o", out)
    whole, _ = contents(out)
    for path in (out / "manifest.json", *out.glob("shards/00001.*")):
        path.unlink()
    (place / "refs/main").write_text("b" * 40)
    command("-m", "actdump", "run", tmp_path / "spec.yaml", "-o", out)
    again, manifest = contents(out)
    assert again == whole
    assert manifest["facts"]["model"]["commit"] == "a" * 40
    command("-m", "actdump", "run", tmp_path / "spec.yaml", "-o", tmp_path / "new")
    other, manifest = contents(tmp_path / "new")
    assert manifest["facts"]["model"]["commit"] == "b" * 40
    assert other["00001.safetensors"] != whole["00001.safetensors"]


def test_a_dump_whose_every_part_was_one_shard_is_read_and_gone_on_with(tmp_path):
    """As all dumps were, until parts could have several."""
    spec, root = make_spec(30, shard={"tokens": 60}, batch={"tokens": 40}), tmp_path / "out"
    whole = job.run(spec, root).manifest
    plan = json.loads((root / "plan.json").read_text())
    assert all(len(part) == 1 for part in plan["parts"])
    (root / "plan.json").write_text(json.dumps({**plan, "parts": [part for (part,) in plan["parts"]]}))
    assert states(spec, root) == "up to date"
    assert verify.faults(actdump.open(root)) == []
    (root / "shards/00001.json").unlink()
    again = job.run(spec, root)
    assert (again.state, again.manifest.shards, again.manifest.digest) == ("done", whole.shards, whole.digest)


def test_a_plan_that_cannot_be_read_is_replaced_only_when_asked(tmp_path):
    job.run(make_spec(), tmp_path / "out")
    whole = contents(tmp_path / "out")
    for content in ("{", "[]", "{}"):
        (tmp_path / "out" / "plan.json").write_text(content)
        with pytest.raises(DataError, match=r"plan\.json: (not a plan|this is format)"):
            job.run(make_spec(), tmp_path / "out")
    assert states(make_spec(), tmp_path / "out", overwrite=True) == "done"
    assert contents(tmp_path / "out") == whole


# ---------------------------------------------------------------------------------------------------------------- killed


@pytest.fixture
def forks(monkeypatch):
    """Processes that need not import torch again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["actdump.job", "actdump.engine", "actdump.model", "transformers.models.gpt2.modeling_gpt2"])
    return context


def test_killed_at_random_moments_the_bytes_are_those_of_one_run(tmp_path, forks):
    spec = make_spec(250, shard={"tokens": 60, "size": 2500}, batch={"tokens": 20})  # parts of two shards
    uninterrupted = forks.Process(target=job.run, args=(spec, tmp_path / "whole"))
    uninterrupted.start()
    uninterrupted.join()
    root = tmp_path / "out"
    chance = random.Random(time.time_ns())
    kills, kept = 0, {}
    while True:
        process = forks.Process(target=job.run, args=(spec, root))
        process.start()
        if kills < 11:
            wait_for_some(root, process, chance, before_the_plan=kills == 0)
            process.kill()
        process.join()
        found = snapshot(root / "shards") if (root / "shards").is_dir() else {}
        done = {
            path: seen for path, seen in found.items() if path.with_suffix(".json") in found and not path.name.startswith(".")
        }
        assert {path: done[path] for path in kept} == kept  # a shard that is finished is not written again
        kept = done
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        kills += 1
    assert kills >= 10
    assert contents(root) == contents(tmp_path / "whole")
    assert temporary(root) == []
    assert sorted(path.name for path in root.iterdir()) == ["manifest.json", "plan.json", "prompts.jsonl", "shards"]
    assert states(spec, root) == "up to date"


def wait_for_some(root, process, chance, before_the_plan):
    """Until a few more parts are done, and some milliseconds more, so that any line of the code may be the last."""
    if not before_the_plan:
        records = len(list(root.glob("shards/*.json")))
        more = chance.randrange(5)
        while process.is_alive() and (not root.exists() or len(list(root.glob("shards/*.json"))) < records + more):
            time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.3 if before_the_plan else 0.02))


# ------------------------------------------------------------------------------------------------ batches, order and memory


@pytest.mark.parametrize(
    "other",
    [
        {"batch": {"tokens": 1}},
        {"batch": {"tokens": 64}},
        {"batch": {"prompts": 3}},
        {"shard": {"tokens": 33}},
        {"shard": {"size": 1500}},
    ],
    ids=str,
)
def test_batches_and_shards_move_no_value(other, finished, tmp_path):
    job.run(make_spec(**other), tmp_path / "out")
    one, another = actdump.open(finished), actdump.open(tmp_path / "out")
    assert another.names == one.names
    assert [vars(prompt) for prompt in another.prompts] == [vars(prompt) for prompt in one.prompts]
    for name in one.names:
        tolerance = 1e-2 if one[name][0].dtype == torch.bfloat16 else 1e-5
        for first, second in zip(one[name], another[name], strict=True):
            assert same(second, first, tolerance)


def test_prompts_stand_in_the_order_of_the_input(finished):
    dump = actdump.open(finished)
    rows = prompts(12)
    assert [prompt.id for prompt in dump.prompts] == [row["id"] for row in rows]
    assert [prompt.tokens for prompt in dump.prompts] == [row["input_ids"] for row in rows]
    assert [len(value) for value in dump["block"]] == [len(row["input_ids"]) for row in rows]


def test_a_cast_that_overflows_seals_nothing(tmp_path, monkeypatch):
    real = job.bind

    def large(spec, source, module):
        bound = real(spec, source, module)
        with torch.no_grad():
            module.transformer.h[0].mlp.c_proj.bias.fill_(1e5)
        return bound

    monkeypatch.setattr("actdump.job.planning.bind", large)
    spec = make_spec(save={"mlp": {"address": "transformer.h[0].mlp.output", "dtype": "float16"}})
    with pytest.raises(DataError, match="too large for float16"):
        job.run(spec, tmp_path / "out")
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert temporary(tmp_path) == []
    assert not (tmp_path / "out/manifest.json").exists()


TAKE_IN = """
import json, resource, sys
from pathlib import Path
from actdump import model, plan, prompts, spec, store
from actdump.format import Folder

root = Path(sys.argv[1])
source = model.find(spec.ModelSpec(config={"model_type": "gpt2"}))
layout = plan.Layout((plan.Slice(), 768), "float32")
column = plan.Column("a", "a.output", "a.output", "Block", "tensor", "all", None, ("batch", "token", "768"), layout, 0)
for count in (2_000, 200_000):
    place = root / str(count)
    place.mkdir()
    with (place / "in.jsonl").open("w") as file:
        for number in range(count):
            print(json.dumps({"id": f"prompt {number}", "input_ids": list(range(1, 2 + number % 8)), "label": "x" * 50}), file=file)
    given = spec.PromptsSpec(file=str(place / "in.jsonl"))
    with store.Intake(Folder(place)) as intake:
        for given_prompts, ids in model.tokenise(prompts.read(given), None, spec.TokenizerSpec(), source):
            intake.add(given_prompts, ids)
        parts = plan.parts([column], intake.lengths, most_bytes=10**9, most_tokens=262_144, most_shards=4)
        intake.place([shard for part in parts for shard in part.shards])
        made = plan.make({}, [column], parts, plan.Budget(512))
        intake.commit(made, {})
    assert made.prompts == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    answer = subprocess.run([sys.executable, "-c", TAKE_IN, tmp_path], capture_output=True, text=True, check=True)
    few, many = map(int, answer.stdout.split())
    assert many - few < 25_000, "kilobytes more at the peak for a hundred times as many prompts"
    assert (tmp_path / "200000/prompts.jsonl").read_bytes().count(b"\n") == 200_000


def test_rows_that_arrive_later_give_the_same_files(tmp_path, monkeypatch):
    """As from an accelerator: the writer's threads wait for them, and write them."""
    spec = make_spec(60, batch={"tokens": 20}, shard={"size": 5000})
    job.run(spec, tmp_path / "at_once")
    monkeypatch.setattr(capturing, "arrives_later", lambda _: True)
    monkeypatch.setattr(capturing, "_seals", lambda: SHARDS)
    monkeypatch.setattr(pending, "FLUSH", 1)  # the threads that seal flush beside the rows, and beside each other
    flushed, flush = [], pending.Pending.flush
    monkeypatch.setattr(pending.Pending, "flush", lambda part: (flushed.append(current_thread().name), flush(part)))
    job.run(spec, tmp_path / "later")
    assert flushed and all(name.startswith("actdump-sealer") for name in flushed)
    at_once, later = (sorted(tmp_path.glob(f"{name}/shards/*.safetensors")) for name in ("at_once", "later"))
    assert len(at_once) > SHARDS
    assert [path.read_bytes() for path in at_once] == [path.read_bytes() for path in later]
    assert actdump.open(tmp_path / "at_once").manifest.statistics == actdump.open(tmp_path / "later").manifest.statistics


def test_a_part_has_more_shards_on_an_accelerator(tmp_path, monkeypatch):
    spec = make_spec(100, shard={"size": 2500})
    job.run(spec, tmp_path / "cpu")
    monkeypatch.setattr(bound, "_on_cpu", lambda *_: False)
    job.run(spec, tmp_path / "accelerator")
    plans = [store.load_plan(Folder(tmp_path / name))[0] for name in ("cpu", "accelerator")]
    assert [max(len(part.shards) for part in plan.parts) for plan in plans] == [SHARDS, SHARDS_ACCELERATOR]
    assert len(plans[1].parts) > 1


def test_probe_and_run_use_attention_kernels_without_plans_and_the_audit_those_of_torch(tmp_path):
    """cuDNN's, which torch may choose on CUDA, build a plan for each new shape."""
    seen = []
    watching = register_module_forward_pre_hook(
        lambda module, _: seen.append(cudnn_sdp_enabled()) if isinstance(module, GPT2LMHeadModel) else None
    )
    try:
        job.run(make_spec(12, audit=2), tmp_path / "out")
    finally:
        watching.remove()
    assert seen == sorted(seen)
    assert seen.count(True) == 2
    assert cudnn_sdp_enabled()


def test_a_batch_waits_for_the_rows_of_those_before_it_where_memory_holds_not_both(tmp_path, monkeypatch):
    """As a device whose memory holds the rows of a batch, or a forward."""
    monkeypatch.setattr(lanes, "MOST", 1)  # as there
    job.run(make_spec(60, batch={"tokens": 20}, shard={"tokens": 100}), tmp_path / "roomy")
    on_their_way, tries = [], []
    complete, stream = capturing._Arrival.complete, engine.stream

    def slowly(arrival, seen):
        time.sleep(0.005)
        complete(arrival, seen)
        on_their_way.pop()

    def captured(*given):
        tries.append(1)
        if on_their_way:
            raise torch.OutOfMemoryError("CUDA out of memory")
        on_their_way.append(1)
        return stream(*given)

    monkeypatch.setattr(capturing, "arrives_later", lambda _: True)
    monkeypatch.setattr(capturing._Arrival, "complete", slowly)
    monkeypatch.setattr(engine, "stream", captured)
    job.run(make_spec(60, batch={"tokens": 20}, shard={"tokens": 100}), tmp_path / "out")
    records = [json.loads(path.read_text())["written"] for path in tmp_path.glob("out/shards/*.json")]
    batches = sum(record["batches"] for record in records)
    assert len(records) > 1
    assert batches < len(tries) <= batches + len(records)  # learnt once in each part
    assert {record["halved"] for record in records} == {0}
    assert contents(tmp_path / "out") == contents(tmp_path / "roomy")


def test_memory_that_the_rows_lack_on_their_way_is_told_and_blamed_on_no_batch(tmp_path, monkeypatch, caplog):
    def put(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(capturing, "arrives_later", lambda _: True)
    monkeypatch.setattr(store.Pending, "put", put)
    with pytest.raises(
        ActdumpError, match=r"the rows on their way to the disk: out of memory: .*; use a smaller `batch.tokens`"
    ):
        job.run(make_spec(60, batch={"tokens": 20}), tmp_path / "out")
    assert caplog.records == []


@pytest.mark.parametrize("later", [False, True])
def test_a_fault_of_ours_is_not_told_as_the_models(later, tmp_path, monkeypatch):
    """Rows are put in hooks, in the middle of the model's forward."""

    def broken(self, name, places, buffer):
        raise ValueError("ours")

    monkeypatch.setattr(capturing, "arrives_later", lambda _: later)
    monkeypatch.setattr(store.Pending, "put", broken)
    with pytest.raises(ValueError, match=r"^ours$"):
        job.run(make_spec(60), tmp_path / "out")


def test_a_run_holds_no_more_batches_than_the_writer_lets_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "arrives_later", lambda _: True)
    waiting = []
    do = store.Writer.do

    def watched(self, task, *args):
        put = do(self, task, *args)
        waiting.append(len(self._tasks._left))
        return put

    monkeypatch.setattr(store.Writer, "do", watched)
    job.run(make_spec(60, batch={"tokens": 20}), tmp_path / "out")
    assert len(waiting) > 20
    assert max(waiting) <= store.BESIDE


def test_a_part_that_is_whole_stays_where_the_next_cannot_be_begun(tmp_path, monkeypatch):
    begin = store.Pendings.begin

    def full(self, folder, plan, part, ids):
        if part.number == 1:
            raise StorageError("the disk is full")
        return begin(self, folder, plan, part, ids)

    monkeypatch.setattr(store.Pendings, "begin", full)
    with pytest.raises(StorageError, match="the disk is full"):
        job.run(make_spec(60, shard={"tokens": 60}), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/shards").iterdir()) == ["00000.json", "00000.safetensors"]


def test_mistakes_in_prompts_are_found_before_the_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("actdump.model.load", lambda source: pytest.fail("the weights were loaded"))
    for wrong, message in (([1, 99], "token id 99"), ([1] * 40, "has 40 tokens")):
        spec = make_spec(prompts=[*prompts(5), {"input_ids": wrong}])
        with pytest.raises(ActdumpError, match=message):
            job.run(spec, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("wrong", [{}, {"save": ["transformer.h[9].output"]}, {"tokens": [0, 63]}], ids=str)
def test_the_garbage_collector_is_left_as_it_was(wrong, collecting, tmp_path):
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ActdumpError) if wrong else nullcontext():
            job.run(make_spec(**wrong), tmp_path / "out")
        assert (gc.isenabled(), gc.get_freeze_count()) == (collecting, 0)
    finally:
        (gc.enable if before else gc.disable)()


def test_a_model_that_cannot_be_loaded_leaves_no_folder(tmp_path, monkeypatch):
    def load(source):
        raise UsageError("no such device")

    monkeypatch.setattr("actdump.model.load", load)
    with pytest.raises(UsageError, match="no such device"):
        job.run(make_spec(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_refused_leave_no_folder(tmp_path):
    spec = make_spec(tokens=[0, 63])  # no prompt is that long
    with pytest.raises(ActdumpError, match="asks for a position"):
        job.run(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
