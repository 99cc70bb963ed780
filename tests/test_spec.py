"""The spec: its forms, substitution, overrides, what decides the bytes, and its schema."""

import json
from pathlib import Path
from textwrap import dedent

import pytest

from actdump.address import Slice
from actdump.errors import MissingError, SpecError, UsageError
from actdump.spec import Spec, load, model_spec

SHORT = """\
model: some/model
prompts:
  - The Eiffel Tower is in the city of
save:
  - model.layers[-1].output[0]
output: out/eiffel
"""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def loaded(text: str, *sets: str) -> Spec:
        path = tmp_path / "spec.yaml"
        path.write_text(dedent(text))
        return load(path, sets)

    return loaded


def test_the_short_form_is_the_long_form(read) -> None:
    long = """\
        model: {name: some/model}
        prompts:
          - text: The Eiffel Tower is in the city of
        save:
          - address: model.layers[-1].output[0]
        output: out/eiffel
    """
    assert read(SHORT).model_dump() == read(long).model_dump()


def test_a_tokenizer_can_be_named_alone(read) -> None:
    named = read(SHORT + "tokenizer: some/other\n")
    assert named.tokenizer.name == "some/other"
    longer = read(SHORT + "tokenizer: some/other\n", "tokenizer.truncation=true")
    assert (longer.tokenizer.name, longer.tokenizer.truncation) == ("some/other", True)


def test_the_short_form_has_the_documented_defaults(read) -> None:
    spec = read(SHORT)
    assert (spec.model.dtype, spec.model.device, spec.model.trust_remote_code) == ("auto", "auto", False)
    assert (spec.batch.tokens, spec.batch.prompts) == ("auto", None)
    assert (spec.shard.size, spec.shard.tokens) == (10**9, 262_144)
    assert (spec.tokenizer.truncation, spec.tokenizer.add_special_tokens) == (False, True)
    assert (spec.tokens, spec.dtype, spec.output) == (None, None, "out/eiffel")


def test_save_as_a_mapping_gives_names(read) -> None:
    spec = read(
        SHORT.replace(
            "  - model.layers[-1].output[0]",
            "  last: model.layers[-1].output[0]\n"
            '  some: {address: "model.layers[0].output", tokens: [0, -1], dtype: float16, call: -1}',
        )
    )
    last, some = (entry.tap for entry in spec.save)
    assert (last.name, str(last.address), last.tokens) == ("last", "model.layers[-1].output[0]", None)
    assert (some.name, some.tokens, some.dtype, some.call) == ("some", (0, -1), "float16", -1)


def test_an_unnamed_tap_is_called_as_it_is_written(read) -> None:
    assert read(SHORT).save[0].tap.name == "model.layers[-1].output[0]"


def test_prompts_of_every_form(read) -> None:
    spec = read("""\
        model: some/model
        prompts:
          - text
          - {id: 7, text: more, label: 1}
          - {messages: [{role: user, content: hello}]}
          - {input_ids: [1, 2], source: {page: 3}}
        save: [model.norm.output]
    """)
    rows = spec.prompts.rows
    assert rows is not None
    assert [row.text for row in rows] == ["text", "more", None, None]
    assert (rows[1].id, rows[1].model_extra) == (7, {"label": 1})
    assert rows[2].messages == [{"role": "user", "content": "hello"}]
    assert (rows[3].input_ids, rows[3].model_extra) == ([1, 2], {"source": {"page": 3}})


@pytest.mark.parametrize(
    ("given", "kind"),
    [("a.txt", "txt"), ("a.jsonl", "jsonl"), ("a.b, format: jsonl", "jsonl"), ("-, format: txt", "txt")],
)
def test_a_prompt_file_and_what_it_holds(read, given: str, kind: str) -> None:
    spec = read(f"model: m\nprompts: {{file: {given}}}\nsave: [norm.output]\n")
    assert spec.prompts.file == given.partition(",")[0]
    assert spec.prompts.kind == kind


@pytest.mark.parametrize(
    ("written", "selection"),
    [("last", "last"), ("mean", "mean"), ("[0, -1]", (0, -1)), ("2:5", Slice(2, 5)), ('"1:"', Slice(1))],
)
def test_tokens_of_every_form(read, written: str, selection: object) -> None:
    assert read(f"{SHORT}tokens: {written}\n").selection == selection


def test_a_position_alone_is_told_to_be_a_list(read) -> None:
    with pytest.raises(SpecError, match=r"spec\.yaml:7: tokens: .*a list of positions such as \[0, -1\]"):
        read(f"{SHORT}tokens: 3\n")


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("500", 500), ("1 GB", 10**9), ("500MB", 500 * 10**6), ("2GiB", 2 * 2**30), ("1.5 kb", 1500), ('"64 KiB"', 65536),
        ("1 TB", 10**12),
    ],
)  # fmt: skip
def test_sizes(read, written: str, count: int) -> None:
    assert read(f"{SHORT}shard: {{size: {written}}}\n").shard.size == count


@pytest.mark.parametrize("written", ["-1", "0", "GB", "1 XB", "1e9x", "true", "1.5", "[1]"])
def test_sizes_that_are_none(read, written: str) -> None:
    with pytest.raises(SpecError, match=r"spec\.yaml:7: shard\.size: "):
        read(f"{SHORT}shard: {{size: {written}}}\n")


# ---------------------------------------------------------------------------------------------------------- from the environment


def test_the_environment_is_substituted(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", "seven")
    monkeypatch.delenv("ABSENT", raising=False)
    spec = read(SHORT.replace("out/eiffel", "${SPEC_DIR}/${RUN}/${ABSENT:-x}/$${RUN}"))
    assert spec.output == f"{tmp_path}/seven/x/${{RUN}}"


def test_the_specs_folder_is_its_own_whatever_the_environment_says(
    read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEC_DIR", "/somewhere")
    assert read(SHORT.replace("out/eiffel", "${SPEC_DIR}/out")).output == f"{tmp_path}/out"


def test_an_empty_variable_takes_its_default(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", "")
    assert read(SHORT.replace("out/eiffel", "out/${RUN:-x}")).output == "out/x"


def test_a_number_from_the_environment_is_a_number(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNT", "17")
    spec = read(SHORT + "batch: {tokens: 4, prompts: 2}\nshard:\n  tokens: ${COUNT}\n")
    assert spec.shard.tokens == 17


def test_a_doubled_dollar_stands_for_itself(read) -> None:
    assert read(SHORT.replace("out/eiffel", "'$${HOME}-$${-$5'")).output == "${HOME}-${-$5"


def test_prompts_in_the_spec_are_left_as_they_are(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME_OF", "x")
    spec = read(SHORT.replace("The Eiffel Tower is in the city of", "echo ${HOME_OF} ${UNSET_THING} costs $5"))
    assert spec.prompts.rows is not None
    assert spec.prompts.rows[0].text == "echo ${HOME_OF} ${UNSET_THING} costs $5"


def test_the_prompt_file_is_substituted(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "data")
    spec = read("model: m\nprompts: {file: '${DATA}/p.txt'}\nsave: [norm.output]\n")
    assert spec.prompts.file == "data/p.txt"


def test_the_names_of_fields_and_formats_are_substituted(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIELD", "question")
    spec = read("model: m\nprompts: {file: p, text: '${FIELD}', id: '${KEY:-key}', format: jsonl}\nsave: [norm.output]\n")
    assert (spec.prompts.text, spec.prompts.id) == ("question", "key")


def test_every_unset_variable_is_told_at_once(read) -> None:
    text = SHORT.replace("some/model", "${NOT_THERE_1}").replace("out/eiffel", "${NOT_THERE_2}")
    with pytest.raises(SpecError) as caught:
        read(text)
    assert [line.split("spec.yaml:")[1][:16] for line in str(caught.value).splitlines()] == [
        "1: ${NOT_THERE_1",
        "6: ${NOT_THERE_2",
    ]


# ------------------------------------------------------------------------------------------------------------------- overrides


def test_overrides(read) -> None:
    spec = read(
        SHORT, "model.dtype=float32", "output=elsewhere", "prompts.limit=1", "batch.tokens=64", "save.0.tokens=last",
        "shard.size=1 MB", "tokens=2:5",
    )  # fmt: skip
    assert (spec.model.name, spec.model.dtype) == ("some/model", "float32")
    assert (spec.output, spec.prompts.limit, spec.batch.tokens) == ("elsewhere", 1, 64)
    assert spec.save[0].tap.tokens == "last"
    assert spec.shard.size == 10**6
    assert spec.selection == Slice(2, 5)


@pytest.mark.parametrize("written", ["2:", "-3:", ":2", "-3:-1"])
def test_an_override_of_a_slice_needs_no_quotes(read, written: str) -> None:
    """YAML would take `2:` for a mapping."""
    assert read(SHORT, f"tokens={written}").tokens == written


def test_an_override_of_an_address_needs_no_quotes(read) -> None:
    assert read(SHORT, "save.0=model.layers[0].mlp.output").save[0].address == "model.layers[0].mlp.output"


def test_a_later_override_wins(read) -> None:
    assert read(SHORT, "output=a", "output=b").output == "b"


def test_a_prompt_of_a_list_is_overridden_before_and_after_the_limit(read) -> None:
    for sets in (["prompts.limit=1", "prompts.0=other"], ["prompts.0=other", "prompts.limit=1"]):
        assert [row.text for row in read(SHORT, *sets).prompts.rows] == ["other"], sets


def test_an_override_of_a_named_tap(read) -> None:
    text = SHORT.replace("  - model.layers[-1].output[0]", "  last: model.layers[-1].output[0]")
    spec = read(text, "save.last.dtype=float16")
    assert (spec.save[0].name, spec.save[0].dtype) == ("last", "float16")


@pytest.mark.parametrize("override", ["x", "=3", "save.x=y", "save.4=y", "model.name.x=3"])
def test_overrides_that_lead_nowhere(read, override: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        read(SHORT, override)


def test_overrides_of_what_is_no_mapping_are_told(read) -> None:
    with pytest.raises(UsageError):
        read("- a\n- b\n", "model=x")
    with pytest.raises(UsageError):
        read("", "model.dtype=float32")


# ------------------------------------------------------------------------------------------------------- what decides the bytes


def test_where_it_is_written_and_computed_decides_nothing(read) -> None:
    same = read(SHORT, "output=elsewhere", "model.device=cpu", "model.device_map=auto")
    assert same.decisive() == read(SHORT).decisive()


@pytest.mark.parametrize(
    "override",
    ["model.dtype=float32", "model.revision=x", "prompts.limit=1", "tokens=last", "dtype=float16", "batch.tokens=9",
     "shard.size=9", "save.0=model.norm.output", "tokenizer.add_special_tokens=false"],
)  # fmt: skip
def test_everything_else_decides(read, override: str) -> None:
    assert read(SHORT, override).decisive() != read(SHORT).decisive()


def test_a_default_that_is_written_decides_nothing(read) -> None:
    assert read(SHORT, "model.dtype=auto", "batch.tokens=auto", "shard.size=1 GB").decisive() == read(SHORT).decisive()


def test_names_of_local_files_decide_nothing(read, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    text = "model: ./{0}\nprompts: {{file: {0}.txt}}\ntokenizer: {{name: ./{0}}}\nsave: [norm.output]\n"
    assert read(text.format("one")).decisive() == read(text.format("two")).decisive()


def test_what_decides_is_plain_json(read) -> None:
    decisive = read(SHORT, "tokens=2:5").decisive()
    assert json.loads(json.dumps(decisive)) == decisive


# ------------------------------------------------------------------------------------------------------------ messages with places


def test_messages_about_parts_of_a_spec_get_their_line(read, tmp_path: Path) -> None:
    text = SHORT.replace("  - model.layers[-1]", "  - model.norm.output\n  - model.layers[*].mlp.output\n  - model.layers[-1]")
    spec = read(text, "model.dtype=float32")
    file = tmp_path / "spec.yaml"
    for message, place in {
        "prompts[0]: bad": f"{file}:3",
        "model.norm.output: bad": f"{file}:5",
        "model.layers[-1].output[0]: bad": f"{file}:7",
        "model.layers[12].mlp.output: bad": f"{file}:6",
        "model.dtype: bad": "--set model.dtype",
        "model.config.x: bad": f"{file}:1",
        "output: bad": f"{file}:8",
    }.items():
        assert spec.located(message) == f"{place}: {message}"
    assert spec.located("p.jsonl:2: bad\nsomething else") == "p.jsonl:2: bad\nsomething else"


def test_the_spec_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no such file"):
        load(tmp_path / "nowhere.yaml")


# --------------------------------------------------------------------------------------------------------------- YAML's own traps


def test_yaml_traps(read) -> None:
    spec = read("""\
        model: some/model
        prompts:
          - "no"
          - {id: 2024-01-01, text: 12:30:45, label: no}
          - {id: 010, text: a}
        save: [norm.output]
        tokens: 2:5
    """)
    rows = spec.prompts.rows
    assert rows is not None
    assert rows[0].text == "no"
    assert (rows[1].id, rows[1].text, rows[1].model_extra) == ("2024-01-01", "12:30:45", {"label": False})
    assert rows[2].id == "010"  # 8 in YAML 1.1
    assert spec.selection == Slice(2, 5)


@pytest.mark.parametrize("word", ["no", "3", "1.5", "null"])
def test_an_unquoted_word_that_yaml_reads_otherwise_is_no_prompt(read, word: str) -> None:
    with pytest.raises(SpecError, match=r"spec\.yaml:3: prompts\[0\]: .*quotes"):
        read(f"model: m\nprompts:\n  - {word}\nsave: [norm.output]\n")


def test_anchors_and_merges(read) -> None:
    spec = read("""\
        model: m
        prompts: [text]
        save:
          a: &half {address: wte.output, dtype: float16}
          b: {<<: *half, address: norm.output}
    """)
    assert [(entry.address, entry.dtype) for entry in spec.save] == [("wte.output", "float16"), ("norm.output", "float16")]


def test_a_merge_can_be_merged_and_named_again(read) -> None:
    spec = read("""\
        model: m
        prompts: [text]
        save:
          - &one {address: wte.output, tokens: all}
          - &two {<<: *one, tokens: last, name: n}
          - {<<: *two, address: norm.output, name: m}
        batch: &three {<<: {tokens: 8}, tokens: 9}
        shard: *three
    """)
    assert [(entry.name, entry.address, entry.tokens) for entry in spec.save] == [
        (None, "wte.output", "all"), ("n", "wte.output", "last"), ("m", "norm.output", "last"),
    ]  # fmt: skip
    assert (spec.batch.tokens, spec.shard.tokens) == (9, 9)


# -------------------------------------------------------------------------------------------------------------------- the schema


def valid(value: object, schema: dict, root: dict | None = None) -> bool:
    """As much of JSON Schema as the spec's schema uses."""
    root = root or schema
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for word in ("anyOf", "oneOf"):
        if word in schema and not any(valid(value, each, root) for each in schema[word]):
            return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind is not None and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return False
    if isinstance(value, list) and "items" in schema:
        return all(valid(entry, schema["items"], root) for entry in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        extra = schema.get("additionalProperties", True)
        if not set(schema.get("required", ())) <= set(value):
            return False
        for key, entry in value.items():
            rule = known.get(key, extra)
            if rule is False or (isinstance(rule, dict) and not valid(entry, rule, root)):
                return False
    return True


def test_the_schema_accepts_the_short_forms_and_refuses_mistakes() -> None:
    schema = json.loads(json.dumps(Spec.model_json_schema()))
    good = {"model": "m", "prompts": ["text"], "save": ["norm.output"], "output": "out"}
    assert valid(good, schema)
    assert valid({**good, "model": {"config": {"model_type": "gpt2"}, "seed": 1}}, schema)
    assert valid({**good, "prompts": [{"input_ids": [1], "label": 3}]}, schema)
    assert valid({**good, "prompts": {"file": "p.txt", "limit": 3}}, schema)
    assert valid({**good, "save": {"a": "norm.output", "b": {"address": "wte.output", "tokens": [0]}}}, schema)
    assert valid({**good, "shard": {"size": "1 GB"}, "tokens": "last", "batch": {"tokens": "auto"}}, schema)
    assert not valid({**good, "outptu": "x"}, schema)
    assert not valid({**good, "model": {"nmae": "m"}}, schema)
    assert not valid({**good, "dtype": "float12"}, schema)
    assert not valid({"model": "m"}, schema)


# -------------------------------------------------------------------------------------------------------------------- from Python


def test_a_model_from_python() -> None:
    assert model_spec("m", {"dtype": "float32"}).dtype == "float32"
    with pytest.raises(UsageError, match=r"unknown key `model\.dtpye`; did you mean `dtype`"):
        model_spec("m", {"dtpye": "float32"})
    with pytest.raises(UsageError, match=r"^model\.device_map: must be text or a mapping, not a list `\[0\]`$"):
        model_spec("m", {"device_map": [0]})
