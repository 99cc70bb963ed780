"""Where prompts come from: each form, ids and fields, and that nothing is read before it is needed."""

import json
import os
import threading
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import need

from actdump.errors import MissingError, SpecError
from actdump.prompts import Prompt, read
from actdump.spec import PromptsSpec, Row


def rows(*values: object, **options) -> list[Prompt]:
    return list(read(PromptsSpec.model_validate({"rows": list(values), **options})))


def from_file(path: Path, content: str | bytes, **options) -> list[Prompt]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read(PromptsSpec(file=str(path), **options)))


def test_a_list() -> None:
    one, two = rows("text", {"id": "b", "input_ids": [1, 2], "label": True})
    assert (one.number, one.id, one.content, one.fields, one.where) == (0, "0", "text", {}, "prompts[0]")
    assert (two.number, two.id, two.content, two.fields, two.where) == (1, "b", [1, 2], {"label": True}, "prompts[1]")


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    found = from_file(path, "one\r\n  two é\nthree")
    assert [prompt.content for prompt in found] == ["one", "  two é", "three"]
    assert [prompt.where for prompt in found] == [f"{path}:1", f"{path}:2", f"{path}:3"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert from_file(tmp_path / "p.txt", b"\xef\xbb\xbfone\n")[0].content == "one"


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    found = from_file(tmp_path / "p.txt", "one\u2028still\x0cone\ntwo\n")
    assert [prompt.content for prompt in found] == ["one\u2028still\x0cone", "two"]


def test_a_json_file(tmp_path: Path) -> None:
    lines = [
        {"text": "one", "id": 5, "label": "x"},
        "two",
        {"input_ids": [1]},
        {"messages": [{"role": "user", "content": "hello"}]},
    ]
    found = from_file(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    assert [prompt.content for prompt in found] == ["one", "two", [1], [{"role": "user", "content": "hello"}]]
    assert [prompt.id for prompt in found] == ["5", "1", "2", "3"]
    assert found[0].fields == {"label": "x"}


def test_other_names_of_fields(tmp_path: Path) -> None:
    lines = [{"q": "one", "key": "a", "text": "kept beside"}, {"q": [1, 2], "key": "b", "id": 9, "label": 1}]
    found = from_file(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)), text="q", id="key")
    assert [(prompt.content, prompt.id) for prompt in found] == [("one", "a"), ([1, 2], "b")]
    assert [prompt.fields for prompt in found] == [{"text": "kept beside"}, {"id": 9, "label": 1}]
    line = '{"id": 1, "input_ids": 2, "text": 3, "q": "one", "messages": 4, "key": "a"}'
    (free,) = from_file(tmp_path / "p.jsonl", line, text="q", id="key")
    assert list(free.fields.items()) == [("id", 1), ("input_ids", 2), ("text", 3), ("messages", 4)]  # as in every process
    (swapped,) = from_file(tmp_path / "p.jsonl", '{"q": "one", "text": "a"}', text="q", id="text")
    assert (swapped.content, swapped.id, swapped.fields) == ("one", "a", {})
    (same,) = from_file(tmp_path / "p.jsonl", '{"text": "one", "id": 3}', id="text")
    assert (same.content, same.id, same.fields) == ("one", "one", {"id": 3})


def test_a_field_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"p\.jsonl:1: there is no field `q`.*there is question, label"):
        from_file(tmp_path / "p.jsonl", '{"question": "x", "label": 1}\n', text="q")
    with pytest.raises(SpecError, match=r"p\.jsonl:1: there is no field `key`"):
        from_file(tmp_path / "p.jsonl", '{"text": "x"}\n', id="key")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a\\ud83d"}', "half a character"),
        ('{"text": "a", "label": "\\ud83d"}', "half a character"),
        ('{"text": "a", "\\ud83d": 1}', "half a character"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character"),
        ('{"input_ids": [1], "t": 1e999}', "NaN or an infinite number, which JSON has not; use null"),
        ('{"text": "a", "text": "b"}', "cannot be read: the key `text` is given twice"),
        ('{"text": "a", "about": {"x": 1, "y": 2, "x": 1}}', "cannot be read: the key `x` is given twice"),
        ('{"text": "a", "t": ' + "7" * 5000 + "}", "cannot be read: "),
        ('{"text": "a", "t": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read: "),
    ],
)
def test_what_no_file_can_hold_or_no_program_read_is_refused(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rf"p\.jsonl:1: .*{words}"):
        from_file(tmp_path / "p.jsonl", line + "\n")


def test_what_a_spec_lists_is_held_to_the_same() -> None:
    for field in ({"t": float("nan")}, {"t": float("inf")}, {"t": "\ud83d"}, {"t": object()}):
        with pytest.raises(SpecError, match=r"prompts\[1\]: "):
            rows("a", {"text": "b", **field})


def test_standard_input_is_called_so_wherever_it_was_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("one\ntwo\n")
    found = list(read(PromptsSpec(file="-", format="txt"), kept))
    assert [prompt.content for prompt in found] == ["one", "two"]
    assert found[1].where == "standard input:2"


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    assert [prompt.content for prompt in rows("a", "b", "c", limit=2)] == ["a", "b"]
    assert len(from_file(tmp_path / "p.txt", "a\nb\nc\n", limit=2)) == 2
    assert len(from_file(tmp_path / "p.txt", "a\nb\nc\n", limit=9)) == 3


def test_what_comes_after_the_limit_is_not_read(tmp_path: Path) -> None:
    content = '{"text": "x"}\n' * 19 + "broken\n"
    assert len(from_file(tmp_path / "p.jsonl", content, limit=10)) == 10
    spec = PromptsSpec(file=str(tmp_path / "p.jsonl"))
    assert len(list(islice(read(spec), 10))) == 10
    with pytest.raises(SpecError, match=r"p\.jsonl:20: not JSON"):
        list(read(spec))


def test_a_file_is_read_as_it_comes(tmp_path: Path) -> None:
    """From a pipe whose writer waits, prompts come before the end is written."""
    need(hasattr(os, "mkfifo"), "no named pipes here")
    pipe = tmp_path / "p.txt"
    os.mkfifo(pipe)
    seen = threading.Event()
    waited: list[bool] = []

    def write() -> None:
        with pipe.open("w") as file:
            file.write("line\n" * 50_000)  # more than any buffer
            file.flush()
            waited.append(seen.wait(20))
            file.write("last\n")

    writer = threading.Thread(target=write)
    writer.start()
    prompts = read(PromptsSpec(file=str(pipe)))
    assert len(list(islice(prompts, 10))) == 10
    seen.set()
    assert sum(1 for _ in prompts) == 50_001 - 10
    writer.join(20)
    assert waited == [True]


def test_ids_must_differ() -> None:
    with pytest.raises(SpecError, match=r"prompts\[1\]: the id `a` is given twice"):
        rows({"id": "a", "text": "x"}, {"id": "a", "text": "y"})
    with pytest.raises(SpecError, match=r"prompts\[1\]: the id `0` is given twice"):
        rows("x", {"id": 0, "text": "y"})
    with pytest.raises(SpecError, match=r"prompts\[1\]: the id `1` is given twice"):
        rows({"id": 1, "text": "x"}, "y")


def test_many_ids_are_told_apart_and_a_late_double_is_found(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"p{number}", "text": "x"}) for number in range(5000)]
    assert [prompt.id for prompt in from_file(tmp_path / "p.jsonl", "\n".join(lines))] == [f"p{n}" for n in range(5000)]
    for double in ("p0", "p2500", "p4999"):
        with pytest.raises(SpecError, match=rf"p\.jsonl:5001: the id `{double}` is given twice"):
            from_file(tmp_path / "p.jsonl", "\n".join([*lines, json.dumps({"id": double, "text": "y"})]))


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", " ", "a", "é\u2028", "😀", "\ud83d"])
)
CONTENTS = VALUES | st.lists(st.integers(0, 3), max_size=2) | st.just([{"role": "user", "content": "x"}])


@given(st.dictionaries(st.sampled_from(["text", "id", "messages", "input_ids", "label"]), CONTENTS), st.booleans())
def test_a_line_is_taken_or_refused_as_the_model_of_a_row_says(tmp_path_factory, value: dict, ascii_only: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "line.jsonl"
    path.write_bytes(json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass" if ascii_only else "replace"))
    value = json.loads(path.read_text())
    try:
        row = Row.model_validate(value)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        row = None
    if row is None or row.id == "":
        with pytest.raises(SpecError, match=r"line\.jsonl:1: "):
            list(read(PromptsSpec(file=str(path))))
        return
    (found,) = read(PromptsSpec(file=str(path)))
    assert (found.id, found.content) == ("0" if row.id is None else str(row.id), row.text or row.messages or row.input_ids)
    assert found.fields == row.model_extra


def test_same_text_twice_is_two_prompts() -> None:
    assert [prompt.id for prompt in rows("x", "x")] == ["0", "1"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no file"):
        list(read(PromptsSpec(file=str(tmp_path / "nowhere.txt"))))
    with pytest.raises(MissingError, match="is a folder"):
        list(read(PromptsSpec(file=str(tmp_path), format="txt")))


def test_a_file_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there are no prompts in it"):
        from_file(tmp_path / "p.txt", "")


def test_wrong_lines_are_told_together(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a"}\n\n{"txt": "b"}\n\n[1]\n\n"b"\n')
    with pytest.raises(SpecError) as raised:
        list(read(PromptsSpec(file=str(path))))
    assert str(raised.value).splitlines() == [
        f"{path}:2: the line is empty; remove it (so in lines 4, 6)",
        f"{path}:3: there is no field `text`, `messages` or `input_ids`; there is txt; `prompts.text` names another one",
        f"{path}:5: a line must be a JSON object or text, not [1]; one prompt a line",
    ]
    assert [prompt.content for prompt in read(PromptsSpec(file=str(path), limit=1))] == ["a"]
    path.write_bytes(b'\n"\xff"\n{"text": "a", "x": NaN}\n"\\ud83d"\n{"text": "a", "x": NaN}\n')
    told = r":1: the line is empty; remove it\n.*:2: not UTF-8 text.*\n.*:3: NaN .* \(so in line 5\)\n.*:4: half a character"
    with pytest.raises(SpecError, match=told):
        list(read(PromptsSpec(file=str(path))))
    path.write_text("\n" * 1000)
    with pytest.raises(SpecError) as raised:
        list(read(PromptsSpec(file=str(path))))
    assert str(raised.value).splitlines() == [
        f"{path}:1: the line is empty; remove it (so in lines 2, 3, 4, 5 and 15 more)",
        f"{path}:21: here the search for mistakes ended; there may be more",
    ]
    path.write_text("\n" * 20)
    with pytest.raises(SpecError, match=r"and 15 more\)$"):
        list(read(PromptsSpec(file=str(path))))
