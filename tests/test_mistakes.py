"""What a user can do wrong: each mistake is named with its place and its remedy, and leaves nothing behind that looks finished."""

import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from needs import need
from typer.testing import CliRunner

from actdump.cli import app

COMMAND = Path(sys.executable).with_name("actdump")
TINY = "{config: {model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, vocab_size: 100, n_positions: 64}, seed: 0}"
GOOD = f"""\
model: {TINY}
prompts:
  - input_ids: [1, 2, 3]
  - input_ids: [4, 5]
save:
  - transformer.h[-1].output[0]
output: out
"""


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine take half a minute
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it may have been imported before
    return folder


def actdump(*words: str, stdin: str | bytes | None = None) -> Said:
    """Run the command in this process."""
    result = CliRunner().invoke(app, list(words), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return checked(Said(result.exit_code, result.stdout, result.stderr))


def actdump_process(*words: str, **options) -> Said:
    """Run the real command."""
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True, timeout=60, **options)
    return checked(Said(done.returncode, done.stdout, done.stderr))


def checked(said: Said) -> Said:
    print(said.code, said.err, said.out, sep="\n")
    assert "Traceback" not in said.err + said.out
    if said.code:
        assert said.out == ""
    return said


def run(text: str, *words: str, stdin: str | bytes | None = None) -> Said:
    Path("spec.yaml").write_text(dedent(text))
    return actdump("run", "spec.yaml", *words, stdin=stdin)


def nothing_left(folder: str = "out") -> bool:
    return not Path(folder).exists()


def nothing_finished(folder: str | Path = "out") -> bool:
    """No manifest, no temporary files, and every shard that has its name has its record."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    shards = [path for path in files if path.suffix == ".safetensors"]
    return (
        not any(path.name == "manifest.json" or path.name.endswith("-tmp") for path in files)
        and all(path.with_suffix(".json").exists() for path in shards)
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- in the spec itself

SPECS = {
    "key of another section": (
        GOOD + "attn_implementation: eager\n",
        ["spec.yaml:8: unknown key `attn_implementation`; did you mean `model.attn_implementation`?"],
    ),
    "misspelt key": (GOOD.replace("output: out", "outptu: out"), ["spec.yaml:7: unknown key `outptu`; did you mean `output`?"]),
    "misspelt key inside": (
        GOOD + "batch:\n  token: 4\n",
        ["spec.yaml:9: unknown key `batch.token`; did you mean `tokens`?"],
    ),
    "double key": (GOOD + "save: [transformer.wte.output]\n", ["spec.yaml:8: `save` is given twice, first on line 5"]),
    "double key inside": (
        GOOD + "tokenizer:\n  truncation: true\n  truncation: false\n",
        ["spec.yaml:10: `truncation` is given twice, first on line 9"],
    ),
    "double name": (
        GOOD.replace("  - transformer.h[-1].output[0]", "  last: transformer.h[-1].output\n  last: transformer.wte.output"),
        ["spec.yaml:7: `last` is given twice, first on line 6"],
    ),
    "same address twice": (
        GOOD.replace("save:\n", "save:\n  - transformer.h[-1].output[0]\n"),
        ["spec.yaml:5: ", "two taps are called `transformer.h[-1].output[0]`", "mapping form"],
    ),
    "bracket in flow style": (
        GOOD.replace("  - transformer.h[-1].output[0]", "  - {address: transformer.h[-1].output[0], tokens: last}"),
        ["spec.yaml:6: not YAML", "must be quoted"],
    ),
    "bracket in a flow list": (
        GOOD.replace("save:\n  - transformer.h[-1].output[0]", "save: [transformer.h[-1].output[0]]"),
        ["spec.yaml:5: not YAML", "must be quoted"],
    ),
    "unclosed bracket": (
        GOOD.replace("save:\n  - transformer.h[-1].output[0]", "save: [transformer.wte.output,"),
        ["spec.yaml:5: not YAML: the `[` here is not closed before line 7"],
    ),
    "empty names": (
        GOOD.replace("model: {", "model: {name: '', ") + "tokenizer: ''\n",
        ["spec.yaml:1: model.name: is empty", "spec.yaml:8: tokenizer: is empty"],
    ),
    "list of addresses under a name": (
        GOOD.replace("  - transformer.h[-1].output[0]", "  a: [transformer.wte.output, transformer.h.output]"),
        ["save: `a` is the name of one address, not of a list; give each a name of its own"],
    ),
    "address with a space": (
        GOOD.replace("- transformer.h[-1].output[0]", "- transformer.h[-1] .output[0]"),
        ["spec.yaml:6: ", "is not an address: a space, and addresses have none, at character 18"],
    ),
    "unclosed quotation mark": (
        GOOD.replace("  - transformer.h[-1].output[0]", "  - 'transformer.h[-1].output[0]"),
        ["spec.yaml:6: not YAML: the quotation mark here is not closed before line 8"],
    ),
    "bracket in a flow mapping of several lines": (
        GOOD.replace("  - transformer.h[-1].output[0]", "  {\n    a: transformer.h[-1].output[0]\n  }"),
        ["spec.yaml:6: not YAML: the `{` here is not closed before line 7", "an address in it is not quoted"],
    ),
    "a tab before an address": (
        GOOD.replace("  - transformer.h[-1]", "\t- transformer.h[-1]"),
        ["spec.yaml:6: not YAML", "; YAML does not allow tabs for indentation"],
    ),
    "two prompts in one": (
        GOOD.replace("  - input_ids: [1, 2, 3]\n  - input_ids: [4, 5]", "  - Hello\n    - Bye"),
        ["spec.yaml:3: this text goes on with `- ` on another line"],
    ),
    "a template's file": (
        GOOD + "tokenizer: {chat_template: m/chat_template.jinja}\n",
        ["spec.yaml:8: tokenizer.chat_template: holds no `{{` or `{%`", "not the name of a file"],
    ),
    "nothing for prompts": (
        GOOD.replace("\n  - input_ids: [1, 2, 3]\n  - input_ids: [4, 5]", ""),
        ["spec.yaml:2: prompts: must be a list of prompts, or a mapping of file, format, text, id, limit, not nothing"],
    ),
    "a number in quotes": (
        GOOD + "batch: {prompts: '3'}\n",
        ["batch.prompts: must be a whole number, not text `3`; write it without quotes"],
    ),
    "a variable in a flow mapping": (GOOD + "batch: {prompts: ${B:-3}}\n", ["spec.yaml:8: not YAML", "write its key on a line of its own"]),
    "tab": (GOOD.replace("  - input_ids: [4", "\t- input_ids: [4"), ["spec.yaml:4: not YAML", "tabs"]),
    "not a mapping": ("- one\n- two\n", ["spec.yaml:1: a spec is a mapping", "not a list"]),
    "empty": ("", ["spec.yaml:1: `model` is missing", "`prompts` is missing", "`save` is missing"]),
    "several": (
        f"model: {TINY}\nprompts:\n  - text: ''\n  - 5\nsave:\n  - transformer.h[-1]\n  - {{address: h.output, tokns: last}}\n"
        "batch: {prompts: 0}\nshard: {size: huge}\ndtype: float12\noutput: out\n",
        [
            "spec.yaml:3: ", "an empty prompt", "spec.yaml:4: ", "not a number `5`", "spec.yaml:6: ", "names no port",
            "spec.yaml:7: ", "did you mean `tokens`?", "spec.yaml:8: batch.prompts: must be 1 or more", "spec.yaml:9: shard.size: ",
            '"1 GB"', "spec.yaml:10: dtype: `float12` is not one of 'float64'",
        ],
    ),
    "no model": (GOOD.replace(TINY, "{seed: 1}"), ["spec.yaml:1: model: needs `name`", "`config`"]),
    "no model_type": (GOOD.replace("model_type: gpt2, ", ""), ["spec.yaml:1: model: config: needs `model_type`"]),
    "a number for text": (
        GOOD.replace("output: out", "output: 3"),
        ["spec.yaml:7: output: must be text, not a number `3`; write it in quotes"],
    ),
    "prompts are text": (
        f"model: {TINY}\nprompts: data.jsonl\nsave: [transformer.wte.output]\noutput: out\n",
        ["spec.yaml:2: prompts: must be a list of prompts, or `file: data.jsonl`"],
    ),
    "no prompts": (
        f"model: {TINY}\nprompts: []\nsave: [transformer.wte.output]\noutput: out\n",
        ["spec.yaml:2: prompts: the list is empty"],
    ),
    "unknown file type": (
        f"model: {TINY}\nprompts:\n  file: data.xls\nsave: [transformer.wte.output]\noutput: out\n",
        ["spec.yaml:", "`data.xls` does not end in .txt (a prompt a line) or .jsonl (a JSON", "`format: jsonl`"],
    ),
    "empty prompt": (GOOD.replace("[4, 5]", "[]"), ["spec.yaml:4: prompts[1]: an empty prompt"]),
    "blank prompt": (GOOD.replace("input_ids: [4, 5]", "'  '"), ["spec.yaml:4: prompts[1]: an empty prompt"]),
    "two contents": (GOOD.replace("[4, 5]", "[4, 5]\n    text: x"), ["spec.yaml:4: ", "exactly one of", "text and input_ids"]),
    "no content": (GOOD.replace("input_ids: [4, 5]", "txt: hello"), ["spec.yaml:4: ", "this has none (only `txt`; text that holds"]),
    "a name and its address": (
        GOOD.replace("- transformer.h[-1]", "- block: transformer.h[-1]"),
        ["spec.yaml:6: unknown key `save[0].block`", "`save[0].address` is missing; an entry is an address, or `{name: …, address: …}`"],
    ),
    "a number for a section": (GOOD + "batch: 8\n", ["spec.yaml:8: batch: must be a mapping of tokens, prompts, not a number `8`"]),
    "no environment": (GOOD.replace(": out", ": ${NOWHERE_SET}/out"), ["spec.yaml:7: ${NOWHERE_SET} is not set", ":-"]),
    "bad selection": (GOOD + "tokens: lats\n", ["spec.yaml:8: tokens: ", "lats", "last"]),
    "bad address": (GOOD.replace("h[-1].output[0]", "h[x].output"), ["spec.yaml:6: save[0]: ", "at character"]),
    "number of another kind as id": (
        GOOD.replace("input_ids: [4, 5]", "{id: 1.5, input_ids: [4, 5]}"),
        ["spec.yaml:4: prompts[1].id: must be text or a whole number, not a number `1.5`"],
    ),
    "fields of a file beside a list": (
        GOOD.replace("prompts:\n  - input_ids: [1, 2, 3]\n  - input_ids: [4, 5]", "prompts: {rows: [a], text: b, format: txt}"),
        ["spec.yaml:2: prompts: only a file has `format` and `text`, and here is a list of prompts"],
    ),
    "two names": (
        GOOD.replace("  - transformer.h[-1].output[0]", "  a: {name: b, address: transformer.wte.output}"),
        ["spec.yaml:5: save: `a` is the name of one address, which its own `name: b` contradicts"],
    ),
    "a variable as shells have it": (
        GOOD.replace(": out", ": ${WHERE-out}"),
        ["spec.yaml:7: what begins with `${` is `${NAME}` or `${NAME:-default}`; `$${` stands for `${` itself"],
    ),
    "taken name": (
        GOOD.replace("  - transformer.h[-1].output[0]", "  tokens: transformer.wte.output"),
        ["spec.yaml:5: ", "the name `tokens` is taken"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_spec_with_mistakes_is_refused_with_file_and_line(name: str, command: str) -> None:
    text, words = SPECS[name]
    Path("spec.yaml").write_text(text)
    said = actdump(command, "spec.yaml")
    assert said.code == 2
    for word in words:
        assert word in said.err
    assert nothing_left()


def test_several_mistakes_are_told_once_each_and_in_order() -> None:
    said = run(SPECS["several"][0])
    lines = [int(line.split("spec.yaml:")[1].split(":")[0]) for line in said.err.splitlines()]
    assert lines == sorted(lines) == [3, 4, 6, 7, 8, 9, 10]


def test_mistakes_in_listed_prompts_keep_their_lines_beside_a_limit() -> None:
    Path("spec.yaml").write_text(GOOD.replace("input_ids: [1, 2, 3]", "{id: 1.5, text: a}").replace("input_ids: [4, 5]", "5"))
    for more in ([], ["--limit", "2"], ["--set", "prompts.limit=2"]):
        first, second = actdump("run", "spec.yaml", *more).err.splitlines()
        assert "spec.yaml:3: prompts[0].id: must be text or a whole number" in first
        assert "spec.yaml:4: prompts[1]: a prompt is text or a mapping, not a number `5`" in second
    assert nothing_left()


def test_a_spec_that_is_not_there() -> None:
    said = actdump("run", "nowhere.yaml")
    assert said.code == 66
    assert "nowhere.yaml" in said.err


def test_a_spec_that_is_not_text() -> None:
    Path("spec.yaml").write_bytes(b"model: \xff\xfe\n")
    said = actdump("run", "spec.yaml")
    assert said.code == 2
    assert "spec.yaml" in said.err
    assert "UTF-8" in said.err


def test_a_spec_that_is_a_folder() -> None:
    Path("spec.yaml").mkdir()
    said = actdump("run", "spec.yaml")
    assert said.code == 66
    assert "spec.yaml" in said.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.tokens", ["--set batch.tokens: write it as key=value"]),
        ("batch.token=4", ["--set batch.token", "did you mean `tokens`?"]),
        ("save.7=transformer.wte.output", ["--set save.7", "`save` has 1 entries, from 0"]),
        ("output.name=x", ["--set output.name=x"]),
        ("dtype=float12", ["--set dtype", "float16"]),
        ("batch.tokens=0", ["--set batch.tokens: batch.tokens: must be 1 or more"]),
        ("batch.tokens=fast", ["--set batch.tokens: batch.tokens: must be a whole number, or auto"]),
        ("model={config: {n_layer: 2, n_layer: 3}}", ["--set model: `n_layer` is given twice"]),
        ("save.h=&a [*a]", ["--set save.h: an alias stands within what it names"]),
        ("model.config.n_head=${NOWHERE}", ["--set model.config.n_head: ${NOWHERE} is not set in the environment"]),
        ("prompts.limit=99999999999999999999", ["--set prompts.limit: prompts.limit: must be 9223372036854775807 or less"]),
        ("model.revision=main", ["spec.yaml:1, --set model.revision: model: `revision` is of a model on the hub"]),
        ("model.gguf_file=x.gguf", ["spec.yaml:1, --set model.gguf_file: model: `gguf_file` is a file of weights"]),
        ("model.config.n_head=0", ["spec.yaml:1: model: `config` cannot be loaded: ZeroDivisionError: integer division"]),
        ("modle.dtype=float32", ["--set modle.dtype: unknown key `modle`", "did you mean `model`?"]),
        ("shard.most.tokens=4", ["--set shard.most.tokens: unknown key `shard.most`"]),
        ("prompts.file=p.txt", ["spec.yaml:2, --set prompts.file: prompts: needs a list of prompts or `file`, not both"]),
        ("prompts.9.text=x", ["--set prompts.9.text", "there is no `9`"]),
    ],
)
def test_a_wrong_override_is_named(override: str, words: list[str]) -> None:
    said = run(GOOD, "--set", override)
    assert said.code == 2
    for word in words:
        assert word in said.err
    assert nothing_left()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            GOOD + "tokenizer: {chat_template: {{ messages }}}\n",
            ["spec.yaml:8: not YAML: a key that is a list or a mapping", "quoted"],
        ),
        (GOOD + "? [a, b]\n: 3\n", ["spec.yaml:8: not YAML: a key that is a list or a mapping"]),
        (GOOD + "<<: 3\n", ["spec.yaml:8: not YAML: expected a mapping"]),
        (
            GOOD.replace("- input_ids: [4, 5]", "- {text: What is it?}"),
            ["spec.yaml:4: not YAML: ", "text that holds ? must be quoted"],
        ),
        (GOOD + "dtype: 0b_\n", ["spec.yaml:8: dtype: `0b_` is not one of"]),
        (
            GOOD.replace("save:\n  - transformer", "save: &a\n  - *a\n  - transformer"),
            ["spec.yaml: an alias stands within what it names"],
        ),
        ("The tower\nin the city\n", ["spec.yaml:1: a spec is a mapping with model, prompts, save and output, not text"]),
    ],
)
def test_yaml_that_is_none_of_ours(text: str, words: list[str]) -> None:
    for more in ([], ["--limit", "2"], ["--set", "model.dtype=float32"]):
        said = run(text, *more)
        assert said.code == 2
        for word in words:
            assert word in said.err


def test_an_override_with_a_strange_key() -> None:
    said = run(GOOD, "--set", "tokenizer={chat_template: {{ messages }}}")
    assert said.code == 2
    assert "--set tokenizer: a key that is a list or a mapping; text that begins with { or [ must be quoted" in said.err


def test_prompts_in_a_pipe() -> None:
    os.mkfifo("pipe.txt")
    said = run(GOOD, "--set", "prompts={file: pipe.txt}")
    assert said.code == 2
    assert "`pipe.txt` is a pipe or a device" in said.err
    assert 'write `file: "-"`' in said.err
    assert not Path("out").exists()


def test_no_output() -> None:
    said = run(GOOD.replace("output: out\n", ""))
    assert said.code == 2
    assert "`output` is missing" in said.err
    assert "-o" in said.err


# ------------------------------------------------------------------------------------------------------ addresses in the model

ADDRESSES = {
    "module": ("transformer.layers[-1].output[0]", ["has no child `layers`", "there is"]),
    "misspelt module": ("transformer.h[0].atn.output[0]", ["did you mean `attn`?"]),
    "index": ("transformer.h[12].output[0]", ["did you mean `transformer.h[1]`?", "2 entries, 0 to 1"]),
    "not a list": ("transformer.wte[0].output", ["`transformer.wte` (Embedding) is not a list"]),
    "item": ("transformer.h[0].output[1]", ["[1]"]),
    "key": ("transformer.h[0].output['logits']", ["logits"]),
    "tensor index": ("transformer.h[0].output[0][0, 0, 99]", ["outside an axis of size 32"]),
    "attention weights": ("transformer.h[0].attn.output[1]", ["None", "attn_implementation: eager"]),
    "pattern": ("transformer.h[5:9].output[0]", ["picks nothing"]),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_an_address_that_leads_nowhere_is_refused_with_what_is_there(name: str) -> None:
    address, words = ADDRESSES[name]
    said = run(GOOD.replace("  - transformer.h[-1].output[0]", f'  - transformer.wte.output\n  - "{address}"'))
    assert said.code == 2
    assert "spec.yaml:7: " in said.err
    for word in [address.split(".output")[0], *words]:
        assert word in said.err
    assert nothing_left()


def test_every_wrong_address_is_told_at_once() -> None:
    text = GOOD.replace(
        "  - transformer.h[-1].output[0]",
        "  mine: transformer.h[7].output\n  yours:\n    address: transformer.nothing.output\n  all: transformer.h[*].attn.output[1]",
    )
    said = run(text)
    assert said.code == 2
    assert "spec.yaml:6: " in said.err
    assert "spec.yaml:7: " in said.err


def test_each_layer_of_a_pattern_is_told_with_the_line_of_the_pattern() -> None:
    said = run(GOOD.replace("h[-1].output[0]", "h[*].attn.output[1]"))
    assert said.code == 2
    assert said.err.count("spec.yaml:6: transformer.h[") == 2
    assert "eager" in said.err


def test_a_wrong_port_is_refused_with_the_ports() -> None:
    said = run(GOOD.replace("h[-1].output[0]", "h[-1].outptu[0]"))
    assert said.code == 2
    assert "spec.yaml:6: " in said.err
    for port in (".output", ".input"):
        assert port in said.err


def test_attention_weights_are_there_with_eager() -> None:
    text = GOOD.replace("h[-1].output[0]", "h[-1].attn.output[1]").replace("seed: 0", "attn_implementation: eager")
    assert run(text).code == 0


# -------------------------------------------------------------------------------------------------------------------- the model


def test_an_unknown_model_type() -> None:
    said = run(GOOD.replace("gpt2", "gtp2"))
    assert said.code == 2
    assert "spec.yaml:1: model.config: unknown model_type `gtp2`; did you mean `gpt2`" in said.err
    assert nothing_left()


def test_an_unknown_key_of_a_config() -> None:
    said = run(GOOD.replace("n_layer", "n_layers"))
    assert said.code == 2
    assert "spec.yaml:1: model.config: gpt2 has no `n_layers`; did you mean `n_layer`" in said.err
    assert nothing_left()


def test_an_impossible_config() -> None:
    said = run(GOOD.replace("n_head: 2", "n_head: 3"))
    assert said.code == 2
    assert "spec.yaml:1: model: " in said.err
    assert "num_heads" in said.err
    assert nothing_left()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such/folder/here"])
def test_a_model_folder_that_is_not_there(name: str) -> None:
    said = run(GOOD.replace(TINY, name))
    assert said.code == 66
    assert f"spec.yaml:1: model: `{name}`" in said.err
    assert nothing_left()


def test_a_hub_model_that_cannot_be_reached() -> None:
    said = run(GOOD.replace(TINY, "nobody/nothing"))
    assert said.code == 66
    assert "spec.yaml:1: model: `nobody/nothing` is neither a local folder nor found on the hub" in said.err
    assert nothing_left()


def test_a_model_folder_that_is_not_one() -> None:
    Path("folder").mkdir()
    said = run(GOOD.replace(TINY, "folder"))
    assert said.code == 66
    assert "spec.yaml:1: model: `folder` is not a model folder: it has no config.json" in said.err
    assert nothing_left()


def save_tiny(folder: Path, scale: float = 1.0) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=64))
    with torch.no_grad():
        model.transformer.wte.weight *= scale
    model.save_pretrained(folder)


def save_tokenizer(folder: Path, words: str = "the tower is in a city of") -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[UNK]", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def test_a_model_folder_without_weights() -> None:
    save_tiny(Path("folder"))
    Path("folder/model.safetensors").unlink()
    said = run(GOOD.replace(TINY, "folder"))
    assert said.code == 66
    assert "spec.yaml:1: model: " in said.err
    assert "folder" in said.err
    assert "model.safetensors" in said.err
    assert nothing_left()


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (None, "is broken: "),  # its own first bytes
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:46\n", "holds no weights, only Git LFS's pointer to them"),
    ],
    ids=["cut off", "a pointer of Git LFS"],
)
def test_a_model_folder_with_a_broken_file(held: bytes | None, told: str) -> None:
    save_tiny(Path("folder"))
    file = Path("folder/model.safetensors")
    file.write_bytes(held or file.read_bytes()[:5000])
    said = run(GOOD.replace(TINY, "folder"))
    assert said.code == 65
    assert f"spec.yaml:1: model: `folder/model.safetensors` {told}" in said.err
    assert nothing_left()


def test_a_model_folder_with_a_broken_config() -> None:
    save_tiny(Path("folder"))
    Path("folder/config.json").write_text("{")
    said = run(GOOD.replace(TINY, "folder"))
    assert said.code in (2, 66)
    assert "spec.yaml:1: model: " in said.err
    assert "config.json" in said.err
    assert nothing_left()


@pytest.mark.parametrize("output", ["folder", "folder/../folder"])
def test_the_models_own_folder_as_output(output: str) -> None:
    save_tiny(Path("folder"))
    before = sorted(path.name for path in Path("folder").iterdir())
    said = run(GOOD.replace(TINY, "folder"), "-o", output, "--overwrite")
    assert said.code == 73
    assert f"{output} is the model's own folder; choose another output" in said.err
    assert sorted(path.name for path in Path("folder").iterdir()) == before


def test_weights_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads them says that they are not there."""
    save_tiny(Path("folder"))
    real = os.access  # root may read whatever the mode says
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).suffix != ".safetensors" and real(path, mode))
    said = run(GOOD.replace(TINY, "folder"))
    assert said.code == 66
    assert "model: `folder/model.safetensors`: Permission denied" in said.err
    assert nothing_left()


@pytest.mark.parametrize("device", ["cuda:77", "gpu"])
def test_a_device_that_is_not_there(device: str) -> None:
    said = run(GOOD.replace("seed: 0", f"device: '{device}'"))
    assert said.code == 2
    assert "spec.yaml:1: model.device: " in said.err
    assert "auto" in said.err
    assert nothing_left()


# ------------------------------------------------------------------------------------------------------------------ the prompts


def with_file(name: str, tokenizer: str = "") -> str:
    return f"model: {TINY}\nprompts: {{file: {name}}}\n{tokenizer}save: [transformer.wte.output]\noutput: out\n"


def test_text_without_a_tokenizer() -> None:
    said = run(GOOD.replace("- input_ids: [4, 5]", "- in the city of"))
    assert said.code == 2
    assert "spec.yaml:4: prompts[1]: the model has no tokenizer" in said.err
    assert "`input_ids`" in said.err
    assert "`tokenizer: {name: …}`" in said.err
    assert nothing_finished()


def test_a_tokenizer_that_is_not_there() -> None:
    Path("empty").mkdir()
    said = run(GOOD.replace("input_ids: [4, 5]", "text") + "tokenizer: {name: empty}\n")
    assert said.code == 66
    assert "spec.yaml:8: tokenizer.name: there is no tokenizer in `empty`" in said.err
    assert nothing_finished()


def test_a_prompt_without_tokens() -> None:
    save_tokenizer(Path("tok"))
    Path("p.txt").write_text("the tower\n\nin a city\n")
    said = run(with_file("p.txt", "tokenizer: {name: tok}\n"))
    assert said.code == 2
    assert "p.txt:2: an empty prompt" in said.err
    assert nothing_finished()


def test_a_prompt_that_is_too_long_is_an_error_or_cut() -> None:
    text = GOOD.replace("[4, 5]", str(list(range(65))))
    said = run(text)
    assert said.code == 2
    assert "spec.yaml:4: prompts[1]: prompt `1` has 65 tokens, and the model allows 64" in said.err
    assert "truncation: true" in said.err
    assert nothing_finished()
    assert run(text + "tokenizer: {truncation: true}\n").code == 0
    assert json.loads(Path("out/manifest.json").read_text())["tokens"] == 3 + 64


def test_many_prompts_that_are_too_long_or_too_short_are_told_by_the_first_and_their_number() -> None:
    lengths = [65, 1, *[70] * 8, 2, 3]
    Path("p.jsonl").write_text("".join(json.dumps({"input_ids": [1] * length}) + "\n" for length in lengths))
    said = run(with_file("p.jsonl"))
    first, *_, last = said.err.splitlines()[-9:]
    assert "p.jsonl:1: prompt `0` has 65 tokens" in first
    assert last == "error: p.jsonl:12: here the search for mistakes ended, with 1 more like these"
    spec = with_file("p.jsonl", "tokenizer: {truncation: true}\n").replace(
        "transformer.wte.output", "'transformer.wte.output[:, 2]'"
    )
    said = run(spec)
    assert "p.jsonl:2: prompt `1` has 1 tokens" in said.err
    assert "needs 3 (1 more like it); use a slice" in said.err


def test_a_text_that_is_too_long_is_an_error_or_cut() -> None:
    save_tokenizer(Path("tok"))
    Path("p.txt").write_text("the tower\n" + "in " * 9 + "\n")
    text = with_file("p.txt", "tokenizer:\n  name: tok\n  max_length: 4\n")
    said = run(text)
    assert said.code == 2
    assert "p.txt:2: prompt `1` has 9 tokens, and tokenizer.max_length allows 4" in said.err
    assert run(text, "--set", "tokenizer.truncation=true").code == 0
    assert json.loads(Path("out/manifest.json").read_text())["tokens"] == 2 + 4


@pytest.mark.parametrize("broken", ["{", '{"version": "9.0", "added_tokens": [], "model": {"type": "Later"}}'])
def test_a_tokenizer_file_that_cannot_be_read(broken: str) -> None:
    save_tokenizer(Path("tok"))
    Path("tok/tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {}, "tokenizer_class": "TokenizersBackend"})
    )
    Path("tok/tokenizer.json").write_text(broken)
    Path("p.txt").write_text("the tower\n")
    said = run(with_file("p.txt", "tokenizer: tok\n"))
    assert said.code == 66
    assert "spec.yaml" in said.err and "tokenizer: none can be loaded from `tok`: " in said.err
    assert "config names" not in said.err


def test_a_max_length_beyond_the_models_positions_is_tried_out() -> None:
    longer = {"input_ids": list(range(65))}
    said = run(GOOD.replace("[4, 5]", str(longer["input_ids"])) + "tokenizer: {max_length: 65}\n")
    assert said.code == 2
    assert "tokenizer.max_length: the longest prompt has 65 tokens, the model's config allows 64" in said.err
    assert nothing_finished()
    llama = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "num_key_value_heads": 1, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
    rotary = {"model": {"config": llama}, "prompts": [longer], "save": ["model.layers[0].output"], "output": "rotary"}
    assert run(json.dumps({**rotary, "tokenizer": {"max_length": 65}})).code == 0
    roberta = {"model_type": "roberta", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
               "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
    counted = {
        "model": {"config": roberta},
        "prompts": [longer],
        "save": ["roberta.encoder.layer[0].output"],
        "output": "counted",
    }
    said = run(json.dumps({**counted, "tokenizer": {"max_length": 65}}))
    assert said.code == 2
    assert "the longest prompt has 65 tokens, the model's config allows 62" in said.err


def test_a_model_that_raises_in_a_forward(monkeypatch) -> None:
    """Its code may raise anything, for prompts that nobody tried out."""
    from torch import nn

    plain = nn.Embedding.forward

    def refusing(self, ids):
        if ids.shape[-1] == 3:
            raise IndexError("three is a crowd")
        return plain(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", refusing)
    said = run(GOOD)
    assert said.code == 65
    assert "the model does not run on prompt 0 of 3 tokens with 1 other beside it: IndexError: three is a crowd" in said.err
    assert nothing_finished()


@pytest.mark.parametrize("wrong", [100, -1])
def test_a_token_that_is_not_in_the_vocabulary(wrong: int) -> None:
    said = run(GOOD.replace("[4, 5]", f"[4, {wrong}]"))
    assert said.code == 2
    assert f"spec.yaml:4: prompts[1]: prompt `1` has the token id {wrong}; the vocabulary is 0 to 99" in said.err
    assert nothing_finished()


@pytest.mark.parametrize("address", ["transformer.wte.output", "transformer.wte.output[0][:, 2]"])
def test_a_position_that_a_short_prompt_lacks(address: str) -> None:
    tokens = "" if address.endswith("]") else "\ntokens: [0, -3]"
    said = run(GOOD.replace("transformer.h[-1].output[0]", f'"{address}"') + tokens)
    assert said.code == 2
    assert "spec.yaml:4: prompts[1]: prompt `1` has 2 tokens, and " in said.err
    assert "needs 3" in said.err
    assert nothing_finished()


def test_a_missing_prompt_file() -> None:
    said = run(with_file("data/nowhere.jsonl"))
    assert said.code == 66
    assert "spec.yaml:2: prompts: " in said.err
    assert "`data/nowhere.jsonl`" in said.err
    assert nothing_left()


LINES = {
    "bad JSON": ('{"input_ids": [1]\n', "p.jsonl:2: not JSON: "),
    "no number": ('{"input_ids": [1], "score": NaN}\n', "p.jsonl:2: NaN or an infinite number, which JSON has not; use null"),
    "empty line": ("\n", "p.jsonl:2: the line is empty; remove it"),
    "a list": ("[1, 2]\n", "p.jsonl:2: a line must be a JSON object or text, not [1, 2]; one prompt a line"),
    "no content": (
        '{"question": "a?", "uid": 5}\n',
        "p.jsonl:2: there is no field `text`, `messages` or `input_ids`; there is question, uid; `prompts.text` names another one",
    ),
    "two contents": ('{"text": "a", "input_ids": [1]}\n', "p.jsonl:2: a prompt needs exactly one of"),
    "wrong type": ('{"text": 5}\n', "p.jsonl:2: text: must be text, not a number `5`"),
    "wrong ids": ('{"input_ids": [1, "x"]}\n', "p.jsonl:2: input_ids[1]: must be a whole number, not text `x`"),
    "no tokens": ('{"input_ids": []}\n', "p.jsonl:2: an empty prompt"),
    "double id": ('{"id": "a", "input_ids": [2]}\n', "p.jsonl:2: the id `a` is given twice"),
    "fraction as id": (
        '{"id": 1.5, "input_ids": [2]}\n',
        "p.jsonl:2: id: must be text or a whole number, not a number `1.5`",
    ),
    "empty id": ('{"id": "", "input_ids": [2]}\n', "p.jsonl:2: the id is empty"),
    "not UTF-8": (b'{"id": "\xff", "input_ids": [2]}\n', "p.jsonl:2: not UTF-8"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_of_a_prompt_file_is_named_with_its_number(name: str) -> None:
    line, words = LINES[name]
    raw = line if isinstance(line, bytes) else line.encode()
    Path("p.jsonl").write_bytes(b'{"id": "a", "input_ids": [1]}\n' + raw)
    said = run(with_file("p.jsonl"))
    assert said.code == 2
    assert words in said.err
    assert nothing_finished()


def test_an_empty_prompt_file() -> None:
    Path("p.jsonl").write_text("")
    said = run(with_file("p.jsonl"))
    assert said.code == 2
    assert "p.jsonl: there are no prompts in it" in said.err
    assert nothing_finished()


def test_a_prompt_file_that_is_a_folder() -> None:
    Path("p.jsonl").mkdir()
    said = run(with_file("p.jsonl"))
    assert said.code == 66
    assert "spec.yaml:2: prompts: `p.jsonl` is a folder, not a file" in said.err
    assert nothing_left()


def test_a_prompt_file_in_the_list_of_prompts() -> None:
    """Which would be the only prompt: seven tokens of its name."""
    Path("p.txt").write_text("a\n")
    said = run(with_file("p.txt").replace("{file: p.txt}", "[p.txt, the file p.txt]"))
    assert said.code == 2
    assert "spec.yaml:2: prompts[0]: `p.txt` is a file; write `prompts: {file: p.txt}`, or `text: p.txt`" in said.err
    assert nothing_left()
    assert "has no tokenizer" in run(with_file("p.txt").replace("{file: p.txt}", "[{text: p.txt}]")).err


def test_a_bad_line_on_standard_input() -> None:
    said = run(with_file("-}").replace("-}}", "-, format: jsonl}"), stdin='{"input_ids": [1]}\nnot JSON\n')
    assert said.code == 2
    assert "standard input:2: not JSON" in said.err
    assert nothing_finished()


def test_a_double_id_in_the_spec() -> None:
    said = run(GOOD.replace("[1, 2, 3]", "[1, 2, 3]\n    id: a").replace("[4, 5]", "[4, 5]\n    id: a"))
    assert said.code == 2
    assert "spec.yaml:5: prompts[1]: the id `a` is given twice" in said.err
    assert nothing_finished()


# ------------------------------------------------------------------------------------------------------------------- the output


def test_a_folder_that_holds_another_dump_is_refused_and_what_differs_is_named() -> None:
    assert run(GOOD).code == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    said = run(GOOD + "dtype: float16\n")
    assert said.code == 73
    assert "out holds another dump: `dtype` was not given and is float16" in said.err
    assert "--overwrite" in said.err
    said = run(GOOD.replace("[4, 5]", "[4, 6]"))
    assert said.code == 73
    assert "`prompts[1].input_ids[1]` was 5 and is 6" in said.err
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_overwrite_replaces_the_dump_and_leaves_what_is_not_ours() -> None:
    assert run(GOOD).code == 0
    Path("out/notes.txt").write_text("mine")
    Path("out/shards/mine.npy").write_text("mine")
    said = run(GOOD + "dtype: float16\n", "--overwrite")
    assert said.code == 0
    assert json.loads(Path("out/manifest.json").read_text())["columns"][0]["dtype"] == "float16"
    assert Path("out/notes.txt").read_text() == Path("out/shards/mine.npy").read_text() == "mine"
    assert actdump("verify", "out").code == 0


def test_a_dump_whose_prompt_file_changed_is_refused() -> None:
    Path("p.jsonl").write_text('{"input_ids": [1]}\n')
    assert run(with_file("p.jsonl")).code == 0
    Path("p.jsonl").write_text('{"input_ids": [2]}\n')
    said = run(with_file("p.jsonl"))
    assert said.code == 73
    assert "the prompt file" in said.err


def test_a_folder_with_other_things_in_it_is_refused() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("mine")
    said = run(GOOD)
    assert said.code == 73
    assert "out holds other things (thesis.tex)" in said.err
    assert [path.name for path in Path("out").iterdir()] == ["thesis.tex"]


def test_an_output_that_is_a_file_is_refused() -> None:
    Path("out").write_text("mine")
    said = run(GOOD)
    assert said.code == 73
    assert "out is a file" in said.err
    assert Path("out").read_text() == "mine"


def test_an_output_below_a_file_is_refused() -> None:
    Path("file").write_text("mine")
    said = run(GOOD, "-o", "file/out")
    assert said.code == 74
    assert "file is a file" in said.err


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    need(done.returncode == 0, f"cannot mount a tmpfs: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_folder() -> None:
    if os.geteuid() != 0:
        Path("closed").mkdir(mode=0o555)
        said = run(GOOD, "-o", "closed/out")
    else:  # root may write whatever the mode says
        with mounted(Path("closed"), "ro,size=1m"):
            said = run(GOOD, "-o", "closed/out")
            shown = CliRunner().invoke(app, ["check", "spec.yaml", "-o", "closed/out"])  # all that it found out, and the error
            assert shown.exit_code == 74
            assert "read-only" in shown.stderr
    assert said.code == 74
    assert "closed/out" in said.err
    assert "read-only" in said.err


MANY = f"""\
model: {TINY}
prompts: {{file: many.jsonl}}
save: ["transformer.h[*].output[0]"]
batch: {{tokens: 64}}
output: out
"""


def write_prompts(count: int, length: int) -> None:
    row = {"input_ids": list(range(1, length + 1))}
    Path("many.jsonl").write_text(f"{json.dumps(row)}\n" * count)


def test_a_full_disk() -> None:
    need(os.geteuid() == 0, "only root can mount a small file system")
    write_prompts(300, 40)
    with mounted(Path("small"), "size=1m"):
        said = run(MANY, "-o", "small/out")
        assert said.code == 74
        assert "small/out" in said.err
        assert "free" in said.err
        assert nothing_left("small/out") or nothing_finished("small/out")


def test_a_disk_that_fills_up_after_the_first_shards() -> None:
    need(os.geteuid() == 0, "only root can mount a small file system")
    write_prompts(60, 40)
    with mounted(Path("small"), "size=1m"):
        Path("spec.yaml").write_text(MANY + "shard: {tokens: 400}\n")
        hog = 'from pathlib import Path\nPath("small/hog").write_bytes(bytes(600_000))\n'
        patched = f"import actdump.store as s, sys\nfrom actdump.cli import main\ns.check_space = lambda *_: None\n{hog}main()"
        done = subprocess.run([sys.executable, "-c", patched, "run", "spec.yaml", "-o", "small/out"],
                              capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        print(done.stderr)
        assert done.returncode == 74
        assert "Traceback" not in done.stderr
        assert "No space left" in done.stderr
        assert nothing_finished("small/out")
        Path("small/hog").unlink()
        assert run(MANY + "shard: {tokens: 400}\n", "-o", "small/out").code == 0


def test_a_file_size_limit() -> None:
    write_prompts(100, 40)
    Path("spec.yaml").write_text(MANY)
    limit = 200_000

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    said = actdump_process("run", "spec.yaml", preexec_fn=limited)
    assert said.code == 74
    assert "out/shards/00000.safetensors" in said.err
    assert "too large" in said.err.lower()
    assert nothing_finished()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("model", "`~nobody7/a.jsonl` is not a folder with a model"),
        ("prompts.file", "there is no file `~nobody7/a.jsonl`"),
        ("tokenizer.name", "none can be loaded from `~nobody7/a.jsonl`"),
        ("output", ""),
    ],
)
def test_a_path_of_a_user_that_is_not_there_is_a_path_like_any_other(key: str, told: str) -> None:
    write_prompts(2, 4)
    said = run(MANY, "--set", f"{key}=~nobody7/a.jsonl")
    assert (said.code, said.err.count(told) > 0) == (66 if told else 0, True)
    assert Path("~nobody7/a.jsonl/manifest.json").exists() != bool(told)


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_tap_that_keeps_nothing_is_told(command: str) -> None:
    Path("spec.yaml").write_text(
        GOOD.replace("- transformer.h[-1].output[0]", '- {address: "transformer.h[-1].output", tokens: "5:"}')
    )
    said = actdump(command, "spec.yaml")
    assert said.code == 0
    assert "warning: transformer.h[-1].output: keeps nothing of any prompt" in said.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_ends_no_run() -> None:
    write_prompts(10, 4)
    Path("spec.yaml").write_text(MANY)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([COMMAND, "run", "spec.yaml"], stdout=subprocess.PIPE, stderr=full, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "out/manifest.json\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("word", ["--help", "schema"])
def test_a_full_disk_behind_stdout_is_told_once(word: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([COMMAND, word], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (74, "error: the output: No space left on device\n")


def test_a_closed_stdout_is_no_fault() -> None:
    done = subprocess.run(f"{COMMAND} schema >&-", shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_is_cut_off_by_a_full_disk_is_no_success(unbuffered: str) -> None:
    need(os.geteuid() == 0, "only root can mount a small file system")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with mounted(Path("small"), "size=4k") as small, (small / "schema.json").open("w") as file:
        done = subprocess.run([COMMAND, "schema"], stdout=file, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
        assert 0 < (small / "schema.json").stat().st_size <= 4096
    assert done.returncode == 74
    assert "No space left on device" in done.stderr


def test_a_name_that_is_not_unicode_is_refused_before_any_work() -> None:
    Path("spec.yaml").write_text(GOOD)
    said = actdump_process("run", "spec.yaml", "-o", b"out\xff")
    assert said.code == 2
    assert "is not UTF-8" in said.err


@pytest.mark.parametrize("how", ["tap", "default"])
def test_a_cast_that_overflows_seals_nothing(how: str) -> None:
    save_tiny(Path("large"), scale=1e8)
    text = GOOD.replace(TINY, "large")
    if how == "tap":
        text = text.replace(
            "  - transformer.h[-1].output[0]", "  big:\n    address: transformer.h[-1].output[0]\n    dtype: float16"
        )
    else:
        text += "dtype: float16\n"
    said = run(text)
    assert said.code == 65
    assert "large for float16, whose largest is 65" in said.err
    assert "bfloat16" in said.err
    assert nothing_finished()
    assert not list(Path("out").rglob("*.safetensors"))
    assert run(text.replace("float16", "bfloat16")).code == 73
    assert run(text.replace("float16", "bfloat16"), "--overwrite").code == 0


# -------------------------------------------------------------------------------------------------------------------- stopping


@contextmanager
def started(*words: str, **options) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([COMMAND, *words], stdout=pipe, stderr=pipe, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    for line in process.stderr or ():
        print(line, end="")
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


def test_ctrl_c_once_stops_soon_and_the_same_command_goes_on() -> None:
    write_prompts(400, 40)
    Path("spec.yaml").write_text(MANY + "shard: {tokens: 1000}\n")
    with started("run", "spec.yaml") as process:
        wait_for(process, "16,000 tokens")
        while not list(Path("out").rglob("0000*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    print(err)
    assert process.returncode == 75
    assert out == ""
    assert "Traceback" not in err
    assert "the same command goes on" in err
    assert nothing_finished()
    sealed = {path: path.stat().st_mtime_ns for path in Path("out/shards").iterdir()}
    said = actdump_process("run", "spec.yaml")
    assert said.code == 0
    assert "parts done before" in said.err
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in sealed.items())
    assert actdump("verify", "out").code == 0


def test_a_run_that_waits_for_standard_input_stops_soon() -> None:
    Path("spec.yaml").write_text(with_file("-, format: jsonl"))
    with started("run", "spec.yaml", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write('{"input_ids": [1]}\n')
        process.stdin.flush()
        while not minds_signals(process):
            assert process.poll() is None
        time.sleep(1.5)  # as a rule it has read the spec by then, and waits for the rest
        process.send_signal(signal.SIGTERM)
        process.wait(30)  # with its input still open
        out, err = process.communicate(timeout=30)
    print(err)
    assert process.returncode == 75
    assert out == ""
    assert err == "error: out: stopped before the end, with nothing written yet; the same command goes on with it\n"
    assert nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_that_is_told_to_stop_while_it_starts_hears_of_it(number: signal.Signals) -> None:
    need(Path("/proc/self/status").exists(), "needs a /proc to see when a process holds signals back")
    Path("spec.yaml").write_text(GOOD)
    with started("run", "spec.yaml") as process:
        while not minds_signals(process):
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    print(err)
    assert process.returncode == 75
    assert out == ""
    assert err.endswith("error: out: stopped before the end, with nothing written yet; the same command goes on with it\n")
    assert nothing_left()


def minds_signals(process: subprocess.Popen[str]) -> bool:
    """Whether a process holds signals back, or handles them."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = re.findall(r"Sig(?:Blk|Cgt):\s*(\w+)", status)
    return any(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


SLEEPS = """
import sys, time
from actdump import engine
from actdump.cli import main
def stream(*_, **__):
    print("in a batch", file=sys.stderr, flush=True)
    time.sleep(60)
engine.stream = stream
main()
"""


def test_ctrl_c_on_a_terminal_is_answered_at_once() -> None:
    """A batch or a model that loads may go on for a while."""
    Path("spec.yaml").write_text(GOOD)
    screen, terminal = pty.openpty()
    shown = ""

    def wait_for_words(words: str) -> None:
        nonlocal shown
        while words not in shown:
            assert select.select([screen], [], [], 60)[0], shown
            shown += os.read(screen, 1000).decode()

    with subprocess.Popen([sys.executable, "-c", SLEEPS, "run", "spec.yaml"], stdout=terminal, stderr=terminal) as process:
        wait_for_words("in a batch")
        process.send_signal(signal.SIGINT)
        wait_for_words("stopping, and keeping what is done; Ctrl-C again stops at once")
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_ctrl_c_twice_ends_at_once() -> None:
    Path("spec.yaml").write_text(GOOD)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SLEEPS, "run", "spec.yaml"], stdout=pipe, stderr=pipe, text=True) as process:
        wait_for(process, "in a batch")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None  # it waits for the end of the batch
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    print(err)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert nothing_finished()


# ------------------------------------------------------------------------------------------------------------------ other commands


@pytest.mark.parametrize("command", ["show", "verify", "status"])
def test_a_dump_that_is_not_there(command: str) -> None:
    said = actdump(command, "nowhere")
    assert said.code == 66
    assert "nowhere: there is no such folder" in said.err
    Path("empty").mkdir()
    said = actdump(command, "empty")
    assert said.code == 66
    assert "it holds no dump" in said.err
    Path("file").touch()
    said = actdump(command, "file")
    assert said.code == 66
    assert "file is a file; name the folder of a dump" in said.err


def test_a_flipped_bit_and_a_missing_shard_are_found() -> None:
    assert run(GOOD).code == 0
    shard = Path("out/shards/00000.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    said = actdump("verify", "out")
    assert said.code == 65
    assert "00000.safetensors" in said.err
    shard.unlink()
    said = actdump("verify", "out")
    assert said.code == 65
    assert "00000.safetensors" in said.err


def test_a_manifest_that_is_not_one() -> None:
    assert run(GOOD).code == 0
    Path("out/manifest.json").write_text("{")
    said = actdump("show", "out")
    assert said.code == 65
    assert "manifest.json" in said.err


def test_a_plan_that_is_not_one() -> None:
    assert run(GOOD).code == 0
    Path("out/plan.json").write_text("{")
    said = run(GOOD)
    assert said.code == 65
    assert "plan.json" in said.err
    assert run(GOOD, "--overwrite").code == 0


def test_an_unknown_option_and_command() -> None:
    assert actdump("run", "spec.yaml", "--outptu", "x").code == 2
    assert actdump("rnu", "spec.yaml").code == 2


def test_a_model_that_does_not_exist_has_no_tree() -> None:
    said = actdump("tree", "./nowhere")
    assert said.code == 66
    assert "./nowhere" in said.err


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            "{model_type: gpt2, n_layer: three}",
            "field 'n_layer': TypeError: Field 'n_layer' expected int, got str (value: 'three')",
        ),
        ("{model_type: llama, hidden_size: 32, num_attention_heads: 3}", "The hidden size (32) is not a multiple"),
        ("{model_type: gpt2, activation_function: geluu}", "transformers does not know 'geluu', which the config names"),
    ],
)
def test_a_config_that_transformers_refuses(config: str, told: str) -> None:
    said = run(GOOD.replace(TINY, f"{{config: {config}}}"))
    assert said.code == 2
    assert told in said.err
    assert nothing_finished()


def test_prompts_that_were_cut_off_are_told_when_they_are_asked_for() -> None:
    assert run(GOOD).code == 0
    assert run(GOOD, "-o", "other").code == 0
    kept = Path("out/prompts.jsonl")
    kept.write_bytes(kept.read_bytes()[:-5])
    said = actdump("diff", "out", "other")
    assert said.code == 65
    assert "out/prompts.jsonl: damaged; `actdump run --repair` makes it again" in said.err
    kept.write_bytes(b"")
    assert actdump("diff", "out", "other").code == 65


def test_weights_that_the_checkpoint_lacks_are_in_the_manifest():
    import transformers

    kind = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    transformers.BertForMaskedLM(kind).save_pretrained("bert")
    said = run("model: {name: bert, task: base}\nprompts: [{input_ids: [1, 2]}]\nsave: [pooler.output]\noutput: out\n", "-q")
    assert said.code == 0
    assert "the checkpoint lacks pooler.dense.bias, pooler.dense.weight" in actdump("show", "out").out


@pytest.mark.parametrize(
    ("config", "seed", "told"),
    [
        (TINY, "99999999999999999999999", "model.seed: Input should be less than 18446744073709551616"),
        ("{config: {model_type: marian, vocab_size: 60}, seed: 0}", "0", "Padding_idx must be within num_embeddings"),
    ],
)
def test_a_seed_and_a_pad_id_out_of_range(config: str, seed: str, told: str) -> None:
    said = run(GOOD.replace(TINY, config.replace("seed: 0", f"seed: {seed}")))
    assert said.code == 2
    assert told in said.err
    assert nothing_finished()
