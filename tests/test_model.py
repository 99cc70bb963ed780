"""Models and tokenizers: found, loaded, and how text becomes tokens."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import transformers
from huggingface_hub import constants
from needs import need_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import actdump
from actdump import job, model
from actdump.errors import ActdumpError, MissingError, SpecError, UsageError
from actdump.model import hub, processor, tokenizer
from actdump.model.source import CLASSES, _default_task
from actdump.prompts import Prompt
from actdump.spec import ModelSpec, Spec, Task, TokenizerSpec

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 64}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 48}
FLAUBERT = {"vocab_size": 100, "emb_dim": 32, "n_layers": 1, "n_heads": 2}


def prompt(content, number: int = 0) -> Prompt:
    return Prompt(number, str(number), content, {}, f"prompts[{number}]")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder with a tokenizer of whole words."""
    vocabulary = {
        word: number for number, word in enumerate(["[UNK]", "the", "tower", "is", "in", "a", "city", "of", "user", "hello"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def source() -> model.Source:
    return model.find(ModelSpec(config=GPT2))


def ids(prompts, source: model.Source, words: Path | None = None, **options) -> list[list[int]]:
    spec = TokenizerSpec(name=None if words is None else str(words), **options)
    return [each for _, found in model.tokenise(prompts, model.load_tokenizer(spec, source), spec, source) for each in found]


# ------------------------------------------------------------------------------------------------------------------------ models


def test_random_weights_are_those_of_the_seed() -> None:
    one, same, other = (model.load(model.find(ModelSpec(config=GPT2, seed=seed))) for seed in (1, 1, 2))
    weights = [each.transformer.wte.weight for each in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not one.training


@pytest.mark.parametrize(
    ("build", "task", "name"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100)), "causal-lm", "GPT2LMHeadModel"),
        (lambda: BertForMaskedLM(BertConfig(**BERT)), "masked-lm", "BertForMaskedLM"),
        (lambda: BertModel(BertConfig(**BERT)), "base", "BertModel"),
        (lambda: T5EncoderModel(T5Config(**T5)), "text-encoding", "T5EncoderModel"),
        (lambda: FlaubertWithLMHeadModel(FlaubertConfig(**FLAUBERT)), "masked-lm", "FlaubertWithLMHeadModel"),
    ],
)
def test_a_folder_gives_the_class_that_was_saved(tmp_path: Path, build, task: str, name: str, caplog) -> None:
    saved = build()
    saved.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "actdump"):
        source = model.find(ModelSpec(name=str(tmp_path)))
        loaded = model.load(source)
    assert (source.task, type(loaded).__name__) == (task, name)
    assert all(torch.equal(one, other) for one, other in zip(saved.parameters(), loaded.parameters(), strict=True))
    assert "random" not in caplog.text


@pytest.mark.parametrize(("seconds", "dtype", "told"), [
    ({torch.float32: 1.0, torch.bfloat16: 1.7}, "bfloat16", "1.7 times as long to multiply in bfloat16 as in float32"),
    ({torch.float32: 1.0, torch.float16: 5.0}, "float16", "5.0 times as long to multiply in float16 as in float32"),
    ({torch.float32: 1.0, torch.bfloat16: 1.1}, "bfloat16", None),
    ({torch.float32: 2.0, torch.bfloat16: 1.0}, "bfloat16", None),
    ({}, "float32", None),
])  # fmt: skip
def test_a_slow_dtype_is_told(seconds, dtype: str, told: str | None, monkeypatch, caplog) -> None:
    source, clock, linear = model.find(ModelSpec(config=GPT2, dtype=dtype, device="cpu")), [0.0], torch.nn.functional.linear

    def product(rows, weight):
        clock[0] += seconds[rows.dtype]
        return linear(rows, weight)

    monkeypatch.setattr(processor, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    with caplog.at_level(logging.WARNING, "actdump"):
        model.load(source)
    lines = [line for line in caplog.messages if "times as long" in line]
    assert len(lines) == (told is not None)
    assert all(told in line for line in lines)


def test_the_skeleton_has_all_modules_and_no_weights(source: model.Source) -> None:
    skeleton, full = model.skeleton(source), model.load(source)
    assert [name for name, _ in skeleton.named_modules()] == [name for name, _ in full.named_modules()]
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


NEEDS_VALUES = """
import torch
from transformers import GPT2Model

class Rated(GPT2Model):
    def __init__(self, config):
        super().__init__(config)
        self.rates = [rate.item() for rate in torch.arange(3)]
"""


def test_a_class_that_cannot_be_made_without_weights_is_looked_at_with_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "rated").mkdir()
    (tmp_path / "rated/code.py").write_text(NEEDS_VALUES)
    config = GPT2 | {"auto_map": {"AutoModel": "code.Rated"}, "architectures": ["Rated"]}
    (tmp_path / "rated/config.json").write_text(json.dumps(config))
    given = {"config": str(tmp_path / "rated"), "trust_remote_code": True, "task": "base"}
    spec = Spec.model_validate({"model": given, "prompts": [{"input_ids": [1, 2]}], "save": ["h[0].output"]})
    found = job.forecast(spec)
    assert found.weighed
    assert [column.layout.words for column in found.plan.columns] == ["(tokens, 32)"]
    assert ("h[0]", "GPT2Block", "(batch, token, 32)") in [module[1:] for module in job.modules(spec.model)]


ENDLESS = """
import contextlib, pathlib
from torch import nn
from actdump.model import processor

def interrupted(*_):
    raise KeyboardInterrupt

nn.functional.linear = interrupted
pathlib.Path.read_text = lambda _: "amx_bf16"
pathlib.Path.exists = lambda _: True
with contextlib.suppress(KeyboardInterrupt):
    processor.avoid_faulty_amx()
print("goes on", flush=True)
"""


def test_the_child_that_tries_a_cpu_never_goes_on_with_the_program() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    done = subprocess.run([sys.executable, "-c", ENDLESS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "goes on\n"
    assert done.returncode == 0


def test_another_task_warns_of_random_weights(tmp_path: Path, caplog) -> None:
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "actdump"):
        loaded = model.load(model.find(ModelSpec(name=str(tmp_path), task="masked-lm")))
    assert "they are random" in caplog.text
    assert "cls.predictions.transform.dense.weight" in model.drawn(loaded)
    assert "bert.embeddings.word_embeddings.weight" not in model.drawn(loaded)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_model_that_does_not_fit_into_memory_is_told_as_such(error: Exception) -> None:
    with (
        pytest.raises(ActdumpError, match="model: `big` does not fit into memory: ") as told,
        hub.wording(ModelSpec(name="big")),
    ):
        raise error
    assert told.value.code == 1


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**{name: value for name, value in GPT2.items() if name != "model_type"})).save_pretrained(
        tmp_path
    )
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UsageError, match=r"other shapes .*: transformer\.h\.1\.mlp\.c_fc\.bias is \(5,\) and should be \(128,\)"
    ):
        model.load(model.find(ModelSpec(name=str(tmp_path))))


def test_blocks_that_the_config_has_no_place_for_are_told(tmp_path: Path, caplog) -> None:
    BertForMaskedLM(BertConfig(**{**BERT, "num_hidden_layers": 2})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with caplog.at_level(logging.WARNING, "actdump"):
        model.load(model.find(ModelSpec(name=str(tmp_path))))
    assert "are not used: bert.encoder.layer.1" in caplog.text


def test_a_checkpoint_of_another_class_is_refused(tmp_path: Path) -> None:
    DPRContextEncoder(DPRConfig(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"loaded as DPRQuestionEncoder, and holds none of its weights.*DPRContextEncoder"):
        model.load(model.find(ModelSpec(name=str(tmp_path))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_dtype_of_the_weights(tmp_path: Path, dtype: str) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100)).to(torch.bfloat16).save_pretrained(tmp_path)
    auto = model.find(ModelSpec(name=str(tmp_path)))
    assert auto.dtype == next(model.load(auto).parameters()).dtype == torch.bfloat16
    asked = model.find(ModelSpec(name=str(tmp_path), dtype=dtype))
    assert asked.dtype == next(model.load(asked).parameters()).dtype == getattr(torch, dtype)


def test_the_dtype_that_no_config_names_is_that_of_the_weights(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100)).to(torch.float16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = model.find(ModelSpec(name=str(tmp_path)))
    assert found.dtype == next(model.load(found).parameters()).dtype == torch.float16
    assert model.find(ModelSpec(config=str(tmp_path))).dtype == torch.float32


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "bert", "llama"])
def test_the_most_tokens_are_those_that_the_model_runs_on(kind: str) -> None:
    """In RoBERTa and those after it, positions begin after that of padding."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 50}
    config = {"model_type": kind, **sizes, "max_position_embeddings": 20, "pad_token_id": 1}
    source = model.find(ModelSpec(config=config))
    assert source.positions == (18 if kind in ("roberta", "mpnet") else 20)
    module = model.load(source)
    module(input_ids=torch.full((1, source.positions), 5))
    if kind != "llama":
        with pytest.raises((IndexError, RuntimeError)):
            module(input_ids=torch.full((1, source.positions + 1), 5))


def test_the_config_of_a_folder_with_random_weights(tmp_path: Path) -> None:
    GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100).save_pretrained(tmp_path)
    loaded = model.load(model.find(ModelSpec(config=str(tmp_path))))
    assert len(loaded.transformer.h) == 1


def test_an_attention_implementation_is_taken() -> None:
    loaded = model.load(model.find(ModelSpec(config=GPT2, attn_implementation="eager")))
    assert loaded.config._attn_implementation == "eager"
    with pytest.raises(UsageError, match="model: "):
        model.load(model.find(ModelSpec(config=GPT2, attn_implementation="eagle")))


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"there is no `x\.gguf` in"):
        model.find(ModelSpec(name=str(tmp_path), gguf_file="x.gguf"))


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Without a network; what the hub was asked for."""
    asked: list[str] = []

    def fail(url: str, **_) -> None:
        asked.append(url)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    return asked


def patient(name: str, **_) -> None:
    """Stands for transformers' own way to the hub, which tries again and again."""
    raise AssertionError("asked again and again")


def test_a_mistyped_path_is_told_at_once_without_a_network(tmp_path: Path, monkeypatch, unreachable: list[str], source) -> None:
    (tmp_path / "models/tiny-gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", patient)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", patient)
    with pytest.raises(MissingError, match=r"model: `models/tiny-gtp2` is neither .* did you mean `models/tiny-gpt2`\?"):
        model.find(ModelSpec(name="models/tiny-gtp2"))
    with pytest.raises(MissingError, match=r"tokenizer: .* did you mean `models/tiny-gpt2`\?"):
        model.load_tokenizer(TokenizerSpec(name="models/tiny-gtp2"), source)
    assert len(unreachable) == 2


def test_a_hub_id_that_looks_like_a_path_is_taken_from_the_hub(tmp_path: Path, monkeypatch) -> None:
    """A folder may be called as an organisation is: whatever the hub answers, its id counts."""
    (tmp_path / "models/tiny-gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, **_: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **_: GPT2Config(name_or_path=name))
    assert model.find(ModelSpec(name="models/tiny-gtp2")).config.name_or_path == "models/tiny-gtp2"


def test_without_a_network_no_hub_id_is_waited_for(tmp_path: Path, monkeypatch, unreachable: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", patient)
    with pytest.raises(MissingError, match=r"`gpt2` is neither a local folder nor found on the hub: the hub does not answer"):
        model.find(ModelSpec(name="gpt2"))
    assert len(unreachable) == 1


def test_a_cached_model_needs_no_answer_of_the_hub(tmp_path: Path, monkeypatch, unreachable: list[str]) -> None:
    """Whichever of its files are cached: a repository of GGUF files has no config."""
    (tmp_path / "models--a--tiny").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **_: GPT2Config(name_or_path=name))
    assert model.find(ModelSpec(name="a/tiny")).config.name_or_path == "a/tiny"
    assert unreachable == []


def test_a_local_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is a local folder, which has no revisions; leave it out"):
        model.find(ModelSpec(name=str(tmp_path), revision="main"))


def test_devices() -> None:
    assert model.pick_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:x"):
        with pytest.raises(UsageError, match="is not a device"):
            model.pick_device(name)


# -------------------------------------------------------------------------------------------------------------------- tokenizing


def test_text_and_ids_may_be_mixed_and_keep_their_order(source: model.Source, words: Path) -> None:
    prompts = [prompt("the tower"), prompt([7, 8, 9], 1), prompt("in a city", 2)]
    assert ids(prompts, source, words) == [[1, 2], [7, 8, 9], [4, 5, 6]]


TEXTS = [
    "the tower", " leading, and trailing  \n", "x", "Ünïcödé 漢字 😀 ‍ \u0301", "<|im_start|>user [CLS] [SEP] </s>", "a\x00b\tc",
    "the " * 300, "1234567890" * 9, "don't-stop::e\u0301 é", "a\u200bb", "def f(x):\n\treturn x ** 2  # " + "=" * 40,
]  # fmt: skip


@pytest.mark.parametrize("name", ["words", "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"])
@pytest.mark.parametrize("options", [{}, {"add_special_tokens": False}, {"truncation": True, "max_length": 7}], ids=str)
def test_the_ids_are_those_of_the_tokenizers_own_call(name: str, options: dict, words: Path, source: model.Source) -> None:
    """Twice over, so that settings left behind in the backend by another call would show."""
    folder = words if name == "words" else need_model(name)
    spec = TokenizerSpec(name=str(folder), **{"max_length": 10**6, **options})
    wide = replace(source, config=GPT2Config(vocab_size=10**6, n_positions=10**6))
    tokenizer = model.load_tokenizer(spec, source)
    given = [prompt(text, number) for number, text in enumerate(TEXTS * 200)]
    for _ in range(2):
        found = [ids for _, chunk in model.tokenise(given, tokenizer, spec, wide) for ids in chunk]
        assert found == [tokenizer(each.content, **options)["input_ids"] for each in given]
        tokenizer(["the", "the tower is"], padding=tokenizer.pad_token is not None, truncation=True, max_length=2)


def test_a_tokenizer_with_a_way_of_its_own_is_called(words: Path, source: model.Source) -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            found = super()._encode_plus(text, **options)
            found["input_ids"] = [[9, *ids] for ids in found["input_ids"]]
            return found

    tokenizer = Own.from_pretrained(words)
    given = [prompt("the tower"), prompt("in a city", 1), prompt("the", 2)]
    ((_, found),) = model.tokenise(given, tokenizer, TokenizerSpec(), source)
    assert found == [[9, 1, 2], [9, 4, 5, 6], [9, 1]]


def test_mistakes_come_in_the_order_of_the_prompts(source: model.Source) -> None:
    """Though the chunk after a mistake may have been read already."""

    def read():
        yield from (prompt([1], number) for number in range(tokenizer.CHUNK - 1))
        yield prompt([100], tokenizer.CHUNK - 1)
        raise AssertionError("the line after")

    with pytest.raises(SpecError, match=rf"prompts\[{tokenizer.CHUNK - 1}\]: .* token id 100"):
        list(model.tokenise(read(), None, TokenizerSpec(), source))


def test_a_folder_of_a_model_brings_its_tokenizer(tmp_path: Path, words: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100)).save_pretrained(words)
    assert ids([prompt("the tower")], model.find(ModelSpec(name=str(words)))) == [[1, 2]]


def test_without_a_tokenizer_ids_work_and_text_does_not(source: model.Source) -> None:
    assert ids([prompt([1, 2])], source) == [[1, 2]]
    with pytest.raises(SpecError, match=r"prompts\[0\]: the model has no tokenizer"):
        ids([prompt("text")], source)
    with pytest.raises(SpecError, match=r"prompts\[0\]: the model has no tokenizer, so `messages`"):
        ids([prompt([{"role": "user", "content": "x"}])], source)


def test_messages_go_through_a_template(source: model.Source, words: Path) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}is{% endif %}"
    messages = prompt([{"role": "user", "content": "hello"}])
    assert ids([messages], source, words, chat_template=template) == [[8, 9]]
    assert ids([messages], source, words, chat_template=template, add_generation_prompt=True) == [[8, 9, 3]]
    with pytest.raises(SpecError, match=r"prompts\[0\]: the tokenizer has no chat template"):
        ids([messages], source, words)
    with pytest.raises(SpecError, match=r"prompts\[0\]: the chat template fails: "):
        ids([messages], source, words, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(SpecError, match=r"prompts\[0\]: "):
        ids([messages], source, words, chat_template="{% for %}")


def test_too_long_is_an_error_or_cut(source: model.Source, words: Path) -> None:
    long = [prompt("the " * 70), prompt([1] * 70, 1)]
    for each in long:
        with pytest.raises(SpecError, match=r"has 70 tokens, and the model allows 64; .*truncation: true"):
            ids([each], source, words)
    assert [len(found) for found in ids(long, source, words, truncation=True)] == [64, 64]
    assert [len(found) for found in ids(long, source, words, truncation=True, max_length=5)] == [5, 5]


def test_messages_and_ids_are_cut_where_the_tokenizer_cuts_text(source: model.Source, words: Path) -> None:
    tokenizer = model.load_tokenizer(TokenizerSpec(name=str(words)), source)
    for side, expected in (("right", [1, 2]), ("left", [2, 3])):
        tokenizer.truncation_side = side
        spec = TokenizerSpec.model_validate({"truncation": True, "max_length": 2})
        ((_, found),) = model.tokenise([prompt([1, 2, 3])], tokenizer, spec, source)
        assert found == [expected]


def test_a_config_may_hold_what_only_the_models_code_reads() -> None:
    """`head_dim` stands in no config class of this family, and its attention takes it all the same."""
    config = {"model_type": "qwen3_moe", "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
              "num_hidden_layers": 1, "vocab_size": 50, "head_dim": 8, "num_experts": 2, "moe_intermediate_size": 8}  # fmt: skip
    loaded = model.load(model.find(ModelSpec(config=config)))
    assert loaded.get_submodule("model.layers.0.self_attn.q_proj").out_features == 16
    with pytest.raises(SpecError, match="qwen3_moe has no `hed_dim`"):
        model.find(ModelSpec(config={**config, "hed_dim": 8}))


def test_a_model_without_a_limit_has_none(words: Path) -> None:
    config = {"model_type": "bloom", "n_layer": 1, "hidden_size": 32, "n_head": 2, "vocab_size": 100}
    found = ids([prompt("the " * 5000)], model.find(ModelSpec(config=config)), words)
    assert len(found[0]) == 5000


def test_an_unlimited_reader_is_read_piece_by_piece(source: model.Source) -> None:
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield prompt([1, 2], taken)

    spec = TokenizerSpec()
    tokenised = model.tokenise(endless(), None, spec, source)
    assert next(tokenised)[1] == [[1, 2]] * tokenizer.CHUNK
    tokenised.close()
    assert taken <= 2 * tokenizer.CHUNK


def test_a_token_outside_the_vocabulary(source: model.Source) -> None:
    for wrong in (100, -1):
        with pytest.raises(SpecError, match=f"has the token id {wrong}; the vocabulary is 0 to 99"):
            ids([prompt([1, wrong])], source)


def test_a_token_that_no_dump_can_hold_where_the_config_names_no_vocabulary() -> None:
    source = model.find(ModelSpec(config={"model_type": "canine", "max_position_embeddings": 64}))
    assert ids([prompt([1, 2**31 - 1])], source) == [[1, 2**31 - 1]]
    for wrong in (2**31, -1):
        with pytest.raises(SpecError, match=f"has the token id {wrong}; the vocabulary is 0 to {2**31 - 1}"):
            ids([prompt([1, wrong])], source)


def test_a_tokenizer_folder_without_a_tokenizer(source: model.Source, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"tokenizer\.name: there is no tokenizer in"):
        ids([prompt("x")], source, tmp_path / "empty")


def test_a_broken_tokenizer_file(source: model.Source, words: Path) -> None:
    (words / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(MissingError, match="tokenizer: none can be loaded from"):
        ids([prompt("x")], source, words)


@pytest.mark.parametrize(
    ("architecture", "kind", "task"),
    [
        ("QWenLMHeadModel", "qwen", "causal-lm"),  # of remote code, as the next two
        ("NewForCausalLM", "new", "causal-lm"),
        ("NewForMaskedLM", "new", "masked-lm"),
        ("BertForSequenceClassification", "bert", "base"),
        ("ReformerModelWithLMHead", "reformer", "causal-lm"),
        ("UMT5EncoderModel", "umt5", "text-encoding"),
    ],
)
def test_the_task_is_that_of_the_architecture(architecture: str, kind: str, task: str) -> None:
    assert _default_task(SimpleNamespace(architectures=[architecture], model_type=kind), None) == task


def test_each_task_of_the_spec_has_its_class() -> None:
    assert tuple(CLASSES) == get_args(Task)


def test_load_takes_what_torch_calls_dtypes_and_devices():
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 40}
    loaded = actdump.load(config=config, dtype=torch.float64, device=torch.device("cpu"))
    assert (loaded.dtype, loaded.device) == (torch.float64, torch.device("cpu"))


def test_load_says_how_a_config_is_given():
    with pytest.raises(UsageError, match=r"not dict; a config is given as `config=\{…\}`"):
        actdump.load({"model_type": "gpt2"})
