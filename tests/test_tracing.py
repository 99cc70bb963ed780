"""The Python front end, against plain forwards with plain PyTorch hooks."""

import copy
import io
import operator
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, register_module_forward_hook
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from actdump.errors import AddressError, TraceError, UsageError
from actdump.plan import Budget
from actdump.tracing import Saved, wrap

PROMPT = "The Eiffel Tower is in the city of"
WORDS = ["<unk>", "<pad>", *dict.fromkeys(PROMPT.split())]
IDS = [2, 3, 4, 5, 6, 7, 8, 9]
SEVERAL = [[5, 3], [7, 2, 9, 4, 6], [8], [4, 4, 3, 2]]
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}


def build(name):
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=4, n_positions=32)),
        "llama": lambda: LlamaModel(LlamaConfig(**SMALL, num_hidden_layers=2)),
        "bert": lambda: BertModel(BertConfig(**SMALL, num_hidden_layers=2)),
        "bloom": lambda: BloomModel(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4)),
        "albert": lambda: AlbertModel(AlbertConfig(**SMALL, embedding_size=8, num_hidden_layers=4)),
    }[name]()
    return model.eval()


@pytest.fixture(scope="module")
def modules():
    return {name: build(name) for name in ("gpt2", "llama", "bert", "bloom", "albert")}


@pytest.fixture
def gpt2(modules):
    return modules["gpt2"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture
def model(gpt2, tokenizer):
    return wrap(gpt2, tokenizer)


@pytest.fixture(autouse=True)
def no_hook_is_left(modules):
    before = {name: hooks_on(module) for name, module in modules.items()}
    yield
    assert {name: hooks_on(module) for name, module in modules.items()} == before


def hooks_on(module):
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def oracle(module, path, ids):
    """What a module is given and returns in each of its calls, in a plain forward of one prompt with a plain hook."""
    return own_oracle(module, path, input_ids=torch.tensor([ids]))


def own_oracle(module, path, *args, **kwargs):
    calls = []
    keep = module.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, result: calls.append((args, kwargs, result)), with_kwargs=True
    )
    if isinstance(module, BertModel | AlbertModel | GPT2LMHeadModel | LlamaModel | BloomModel):
        kwargs = {"use_cache": False, **kwargs} if isinstance(module, GPT2LMHeadModel | LlamaModel | BloomModel) else kwargs
    module(*args, **kwargs)
    keep.remove()
    return calls


def same(value, expected, exactly=True):
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=0 if exactly else 1e-5, atol=0 if exactly else 1e-6)


class Steps(nn.Module):
    """Layer k adds k; `cell` runs once for each step, and adds 1."""

    class Add(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number
            self.runs = 0

        def forward(self, value):
            self.runs += 1
            return value + self.number

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.Add(number) for number in range(4)])
        self.heads = nn.ModuleDict({"a": self.Add(10), "b": self.Add(20)})
        self.cell = self.Add(1)
        self.unused = self.Add(0)

    def forward(self, value, steps=1, *, fail=False):
        for layer in self.layers:
            value = layer(value)
        for _ in range(steps):
            value = self.cell(value)
        if fail:
            raise ZeroDivisionError("the model's own")
        return {"a": self.heads["a"](value), "both": (value, self.heads.b(value))} if hasattr(self.heads, "b") else value


# ------------------------------------------------------------------------------------------------------- the page, as it is


CAPTURING = """
# capturing interventions
with model.trace(input): # enter the tracing context
    k_layer_output = model.layer[k].output[0].save() # access the output of layer[k] and save for later use
"""
GETTING = """
with model.trace("The Eiffel Tower is in the city of") as tracer:
    hidden_states = model.transformer.h[-1].output[0].save()
print(hidden_states)
"""


def test_the_code_of_the_reference_page_runs_as_it_stands(model, gpt2, modules, capsys):
    page = {"model": model}
    exec(GETTING, page)
    printed = capsys.readouterr().out
    assert printed.startswith("tensor([[[") and "grad_fn=<" in printed
    same(page["hidden_states"].value, oracle(gpt2, "transformer.h.2", IDS)[0][2])
    encoder = modules["bert"].encoder
    page = {"model": wrap(encoder), "input": torch.randn(1, 5, 16), "k": 1}
    exec(CAPTURING, page)
    same(page["k_layer_output"].value, own_oracle(encoder, "layer.1", page["input"])[0][2])


def test_ports_are_what_the_page_says(model, gpt2):
    with model.trace(PROMPT):
        attention = model.transformer.h[1].attn
        inputs, first, outputs, output = (
            attention.inputs.save(),
            attention.input.save(),
            attention.outputs.save(),
            attention.output.save(),
        )
        bare, bare_outputs = model.transformer.h[1].output.save(), model.transformer.h[1].outputs.save()
        piece, keyword = attention.inputs[0][0].save(), model.transformer.wte.inputs.save()
    args, kwargs, result = oracle(gpt2, "transformer.h.1.attn", IDS)[0]
    assert isinstance(inputs.value, tuple) and isinstance(inputs.value[0], tuple) and set(inputs.value[1]) == set(kwargs)
    same(inputs.value[0][0], args[0])
    same(first.value, args[0])
    same(piece.value, args[0])
    assert isinstance(outputs.value[0], tuple) and outputs.value[1] == {}
    same(outputs[0][0], result[0])
    same(output.value, result[0])
    block = oracle(gpt2, "transformer.h.1", IDS)[0][2]
    same(bare.value, block)
    same(bare_outputs[0][0], block)
    assert keyword.value[0][0].tolist() == [IDS]


def test_input_is_the_first_keyword_where_there_is_no_positional_argument(modules):
    model = wrap(modules["llama"])
    with model.trace(IDS):
        given = model.layers[0].self_attn.input.save()
        inputs = model.layers[0].self_attn.inputs.save()
    args, kwargs, _ = oracle(modules["llama"], "layers.0.self_attn", IDS)[0]
    assert not args and not inputs[0]
    same(given.value, kwargs["hidden_states"])
    same(inputs[1]["hidden_states"], kwargs["hidden_states"])


# ------------------------------------------------------------------------------------------------ addresses and references


ITEMS = {
    "[0]": lambda p: p[0],
    "[0][:, -1]": lambda p: p[0][:, -1],
    "[0][0, 2:5]": lambda p: p[0][0, 2:5],
    "[0][..., ::3]": lambda p: p[0][..., ::3],
    "[:, np]": lambda p: p[:, np.int64(2)],
    "[...]": lambda p: p[...],
}


@pytest.mark.parametrize("items", ITEMS)
@pytest.mark.parametrize("name", ["gpt2", "bloom"])  # a block that returns a bare tensor, and one that returns a tuple
def test_items_index_the_value_of_the_prompt(modules, name, items):
    module, path = modules[name], "transformer.h.1" if name == "gpt2" else "h.1"
    model = wrap(module)
    blocks = model.transformer.h if name == "gpt2" else model.h
    with model.trace(IDS):
        saved = ITEMS[items](blocks[-1 if name == "bloom" else 1].output).save()
    with model.trace(tuple(map(tuple, SEVERAL))):
        each = ITEMS[items](blocks[1].output).save() if items not in ("[0][0, 2:5]", "[:, np]") else None

    def expected(ids):
        result = oracle(module, path, ids)[0][2]
        return ITEMS[items]((result,) if items.startswith("[0]") and isinstance(result, torch.Tensor) else result
                            if items.startswith("[0]") or isinstance(result, torch.Tensor) else result[0])  # fmt: skip

    same(saved.value, expected(IDS))
    for value, ids in zip(each or (), SEVERAL, strict=bool(each)):
        same(value, expected(ids), exactly=False)


class Numbered(nn.Module):
    def forward(self, input_ids):
        return {1: input_ids + 1.0, 0: input_ids + 0.5}


@pytest.mark.parametrize("prompts", [[5, 3], SEVERAL])
def test_a_number_is_a_key_where_keys_are_numbers(prompts):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.vocabulary, self.inner = nn.Embedding(40, 2), Numbered()

        def forward(self, input_ids):
            return self.inner(input_ids)

    model = wrap(Holder())
    with model.trace(prompts):
        saved = model.inner.output[0].save()
    for value, prompt in zip(saved.value if prompts is SEVERAL else [saved.value], SEVERAL, strict=False):
        assert value.tolist() == [[number + 0.5 for number in prompt]]
    with pytest.raises(AddressError, match="leads nowhere"), model.trace(prompts):
        model.inner.output[-1].save()


def test_keys_and_attributes_pick_from_a_structure(model, gpt2):
    with model.trace(PROMPT):
        key, attribute, last = model.output["logits"].save(), model.output.logits.save(), model.output.logits[:, -1].save()
    logits = gpt2(torch.tensor([IDS])).logits
    same(key.value, logits)
    same(attribute.value, logits)
    same(last.value, logits[:, -1])


def test_the_last_port_word_is_the_port(modules):
    model = wrap(modules["bert"])
    before = model.encoder.layer[0].output
    assert repr(before) == repr(modules["bert"].encoder.layer[0].output)
    with model.trace(IDS):
        dense = model.encoder.layer[0].output.dense.output[0].save()
        child = model.encoder.layer[0].output.output.save()
        layer = model.encoder.layer[0].output.save()
        again = before.dense.output.save()
    same(dense.value, oracle(modules["bert"], "encoder.layer.0.output.dense", IDS)[0][2])
    same(child.value, oracle(modules["bert"], "encoder.layer.0.output", IDS)[0][2])
    same(layer.value, oracle(modules["bert"], "encoder.layer.0", IDS)[0][2])
    assert again is dense or torch.equal(again.value, dense.value)


def test_a_reference_is_its_module(model, gpt2):
    assert repr(model.transformer.h[-1]) == str(model.transformer.h[-1]) == repr(gpt2.transformer.h[2])
    assert repr(model) == repr(gpt2)
    assert model.config is gpt2.config
    assert model.device == gpt2.device
    assert model.eval() is gpt2
    assert model.transformer.wte.weight is gpt2.transformer.wte.weight
    assert len(model.transformer.h) == 3 and bool(model.transformer.drop)
    assert [repr(block) for block in model.transformer.h] == [repr(block) for block in gpt2.transformer.h]
    assert hasattr(model, "transformer") and not hasattr(model, "transfromer")
    assert not hasattr(model.transformer, "output") and getattr(model.transformer.wte, "input", None) is None  # outside a block
    assert {"trace", "transformer", "output", "config"} <= set(dir(model))
    torch.testing.assert_close(model(torch.tensor([IDS])).logits, gpt2(torch.tensor([IDS])).logits)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied(copied):
    model = wrap(nn.Sequential(nn.Linear(2, 2)))
    other = copied(model)
    for each in (model, other):
        with each.trace(torch.ones(1, 2)):
            kept = each[0].output.save()
        same(kept.value, model(torch.ones(1, 2)))


def test_references_made_before_the_block_work_inside_it(model, gpt2):
    blocks = model.transformer.h
    with model.trace(PROMPT):
        every = [block.output[0].save() for block in blocks]
        two = [block.output[0].save() for block in blocks[-2:]]
    for number, saved in enumerate(every):
        same(saved.value, oracle(gpt2, f"transformer.h.{number}", IDS)[0][2])
    assert two[0] is every[1] and two[1] is every[2]  # the same place is the same value


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda model: model.transfromer, "transformer"),
        (lambda model: model.h, "did you mean `transformer.h`"),
        (lambda model: model.transformer.h[3], r"h\[2\].*3 entries"),
        (lambda model: model.transformer.h[0].atn, "attn"),
        (lambda model: model.transformer[0], "not a list"),
        (lambda model: model.transformer.h[0].outputt, "its values are `.output`"),
        (lambda model: model.transformer.h[0].save(), r"`\.output\.save\(\)`"),
    ],
)
def test_a_wrong_name_is_an_error_at_once(model, wrong, says):
    with pytest.raises(AddressError, match=says):
        wrong(model)
    with pytest.raises(AddressError, match=says), model.trace(PROMPT):
        wrong(model)


def test_wrong_places_after_a_port(model, modules):
    with pytest.raises(AddressError, match=r"no \[1\]"), model.trace(PROMPT):
        model.transformer.h[0].output[1].save()
    with pytest.raises(AddressError, match="cannot follow a tensor"), model.trace(PROMPT):
        model.transformer.h[0].output[0].shape.save()
    bert = wrap(modules["bert"])
    with pytest.raises(AddressError, match="did you mean `dense`"), bert.trace(IDS):
        bert.encoder.layer[0].output.dens.output.save()
    with pytest.raises(AddressError, match="cannot stand in a module path"), model.trace(PROMPT):
        model.transformer.h[0].output[:, 1].dense.output.save()
    with pytest.raises(AddressError, match="step must be greater than zero"), model.trace(PROMPT):
        model.transformer.h[0].output[:, ::-1].save()
    with pytest.raises(TraceError, match="cannot be indexed"), model.trace(PROMPT):
        model.transformer.h[0].output[[0, 1]]


@pytest.mark.parametrize("prompt", [[1] * 40, [[1] * 40, [2] * 3]], ids=["one", "several"])
def test_a_prompt_that_is_too_long_for_the_model_is_told(model, prompt):
    with pytest.raises(TraceError, match="of 40 tokens, of which its config allows 32: IndexError"), model.trace(prompt):
        model.transformer.h[0].output.save()


# ----------------------------------------------------------------------------------------------- calls, order, early stop


def test_call_picks_among_several(modules):
    model = wrap(modules["albert"])
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    calls = oracle(modules["albert"], "encoder.albert_layer_groups.0.albert_layers.0", IDS)
    for _ in range(2):  # the second time, the calls are known
        with model.trace(IDS):
            last, first, third = layer.output.save(call=-1), layer.output.save(call=0), layer.input.save(call=2)
        same(first.value, calls[0][2][0] if isinstance(calls[0][2], tuple) else calls[0][2])
        same(last.value, calls[3][2][0] if isinstance(calls[3][2], tuple) else calls[3][2])
        same(third.value, calls[2][0][0])
    with model.trace([IDS, IDS[:3]]):
        each = layer.output[0].save(call=1)
    same(each[1], calls_of(modules["albert"], IDS[:3])[1], exactly=False)
    with pytest.raises(AddressError, match="runs 4 times"), model.trace(IDS):
        layer.output.save()
    with pytest.raises(AddressError, match="no call 4"), model.trace(IDS):
        layer.output.save(call=4)


def calls_of(module, ids):
    calls = oracle(module, "encoder.albert_layer_groups.0.albert_layers.0", ids)
    return [result[0] if isinstance(result, tuple) else result for *_, result in calls]


def test_saves_may_stand_in_any_order_and_later_traces_stop_early(model, gpt2):
    runs = []
    watch = gpt2.transformer.ln_f.register_forward_hook(lambda *_: runs.append(1))
    try:
        for _ in range(3):
            with model.trace(PROMPT):
                late, early = model.transformer.h[1].output.save(), model.transformer.wte.output.save()
    finally:
        watch.remove()
    assert len(runs) == 1  # the first trace counts the calls, the others end at the last saved module
    same(late.value, oracle(gpt2, "transformer.h.1", IDS)[0][2])
    same(early.value, oracle(gpt2, "transformer.wte", IDS)[0][2])


def test_a_number_of_calls_that_depends_on_the_input_is_counted_again():
    model = wrap(Steps())
    for steps in (3, 1, 5, 3, 1):
        with model.trace(torch.zeros(2), steps):
            last = model.cell.output.save(call=-1)
        assert last.tolist() == [6 + steps] * 2
    with pytest.raises(AddressError, match="never ran"), model.trace(torch.zeros(2)):
        model.unused.output.save()


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, value):
        return self.inner(value) if value.sum() > 0 else value


def test_a_module_that_does_not_run_this_time_is_named():
    model = wrap(Sometimes())
    with model.trace(torch.ones(2)):
        kept = model.inner.output.save()
    assert kept.tolist() == [1, 1]
    with pytest.raises(AddressError, match=r"`inner` .* never ran"), model.trace(-torch.ones(2)):
        model.inner.output.save()


# --------------------------------------------------------------------------------------------------------- what is given


def test_one_prompt_in_every_form(model, gpt2):
    expected = oracle(gpt2, "transformer.h.2", IDS)[0][2]
    for prompt in (PROMPT, IDS, torch.tensor(IDS)):
        with model.trace(prompt):
            saved = model.transformer.h[-1].output[0].save()
        same(saved.value, expected)


def test_the_models_own_arguments_run_as_they_are(model, gpt2, tokenizer):
    encoded = tokenizer([PROMPT, "The city"], return_tensors="pt", padding=True)
    encoded.pop("token_type_ids", None)
    expected = own_oracle(gpt2, "transformer.h.2", **encoded)[0][2]
    for run in (lambda: model.trace(**encoded), lambda: model.trace(encoded), lambda: model.trace(dict(encoded))):
        with run():
            saved = model.transformer.h[-1].output[0].save()
        same(saved.value, expected)
    ids = torch.tensor([IDS, IDS])
    with model.trace(ids):
        batch = model.transformer.h[-1].output[0].save()
    same(batch.value, own_oracle(gpt2, "transformer.h.2", input_ids=ids)[0][2])


def test_the_last_call_is_the_last_of_this_forward():
    module, seen = BertModel(BertConfig(**SMALL, num_hidden_layers=1, chunk_size_feed_forward=4)).eval(), []
    model = wrap(module)
    module.encoder.layer[0].intermediate.register_forward_hook(lambda _, __, result: seen.append(result.clone()))
    for tokens in (8, 16, 8):
        ids = list(range(1, tokens + 1))
        with model.trace(ids):
            last = model.encoder.layer[0].intermediate.output.save(call=-1)
        calls, seen[:] = list(seen), []
        assert len(calls) == tokens // 4
        assert torch.equal(last, calls[-1])


def test_calls_counted_on_a_short_prompt_say_nothing_of_a_longer_one():
    model = wrap(BertModel(BertConfig(**SMALL, num_hidden_layers=1, chunk_size_feed_forward=4)).eval())
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8]):
        with model.trace(ids):
            kept = model.encoder.layer[0].intermediate.output.save()
        assert kept.shape == (1, 4, 32)
    with pytest.raises(AddressError, match="runs 2 times"), model.trace(IDS):
        model.encoder.layer[0].intermediate.output.save()


def test_a_trace_of_a_length_between_others_ends_at_the_last_saved_module(model, gpt2):
    runs = []
    watch = gpt2.transformer.ln_f.register_forward_hook(lambda *_: runs.append(1))
    try:
        ran = []
        for tokens in (5, 3, 7, 4, 6, 5, 7):
            with model.trace(IDS[:tokens]):
                model.transformer.h[0].mlp.output.save()
            ran.append(len(runs))
    finally:
        watch.remove()
    assert ran == [1, 2, 3, 3, 3, 3, 3]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # transformers' of its own code
def test_a_cache_that_is_passed_is_filled_in_every_layer():
    module = build("llama")
    model, cache = wrap(module), DynamicCache(config=module.config)
    for token in range(3):
        with model.trace(input_ids=torch.tensor([[token + 1]]), past_key_values=cache, use_cache=True):
            first = model.layers[0].output.save()
        assert [cache.get_seq_length(layer) for layer in range(module.config.num_hidden_layers)] == [token + 1] * 2
    with torch.no_grad():
        expected = module(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[1][:, -1:]
    assert torch.allclose(first, expected, atol=1e-6)


def test_any_module_takes_positional_arguments():
    steps = Steps()
    model = wrap(steps)
    with model.trace(torch.zeros(3)):
        second, chosen, both = model.layers[2].output.save(), model.heads["a"].input.save(), model.output["both"][1].save()
    assert second.tolist() == [3] * 3 and chosen.tolist() == [7] * 3 and both.tolist() == [27] * 3
    runs = steps.cell.runs
    with model.trace(torch.zeros(3)):
        model.layers[2].output.save()
    assert steps.cell.runs == runs
    with pytest.raises(UsageError, match="no tokenizer"):
        model.trace("text")
    with model.trace([1, 2]):  # the module takes no token ids, so this is its argument
        pass


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "the prompt is empty"),
        ([], "empty"),
        (["a", ""], "prompt 1 is empty"),
        ([[1], []], "prompt 1 is empty"),
        (torch.tensor([], dtype=torch.long), "empty"),
        ([1.5], "prompt 0 is neither"),
        ([["a", "b"]], "prompt 0 is neither"),
        ([[1], [None]], "prompt 1 is neither"),
    ],
)
def test_an_input_that_is_none(model, given, says):
    with pytest.raises(UsageError, match=says):
        model.trace(given)


def test_inputs_that_do_not_fit(model, gpt2):
    with pytest.raises(UsageError, match="needs an input"):
        model.trace()
    with pytest.raises(UsageError, match="stand alone"):
        model.trace(PROMPT, output_attentions=True)
    for given in (PROMPT, [PROMPT]):
        with pytest.raises(UsageError, match="no tokenizer"):
            wrap(gpt2).trace(given)


# ---------------------------------------------------------------------------------------------------------- many prompts


PLACES = {
    "gpt2": {
        "transformer.h.1": lambda m: m.transformer.h[1].output[0],
        "transformer.h.1.attn": lambda m: m.transformer.h[1].attn.output,
        "transformer.wpe": lambda m: m.transformer.wpe.output,
        "transformer.h.2.mlp": lambda m: m.transformer.h[-1].mlp.output,
    },
    "llama": {"layers.1": lambda m: m.layers[-1].output, "norm": lambda m: m.norm.output},
    "bert": {
        "pooler": lambda m: m.pooler.output,
        "encoder.layer.0.output.dense": lambda m: m.encoder.layer[0].output.dense.output[0],
    },
    "bloom": {"h.1": lambda m: m.h[1].output[0], "h.0.self_attention": lambda m: m.h[0].self_attention.output[0]},
}


@pytest.mark.parametrize("name", PLACES)
def test_several_prompts_each_as_if_alone(modules, name):
    model = wrap(modules[name])
    for _ in range(2):
        with model.trace(SEVERAL):
            saved = {path: place(model).save() for path, place in PLACES[name].items()}
        for path, values in saved.items():
            assert isinstance(values.value, list) and len(values) == len(SEVERAL)
            for ids, value in zip(SEVERAL, values, strict=True):
                result = oracle(modules[name], path, ids)[0][2]
                same(value, result[0] if isinstance(result, tuple) else result, exactly=False)
                with model.trace(ids):
                    alone = PLACES[name][path](model).save()
                assert alone.shape == value.shape and (alone.grad_fn is None) == (value.grad_fn is None)


def test_several_prompts_are_probed_once_and_cut_into_batches(model, gpt2, monkeypatch):
    monkeypatch.setattr("actdump.tracing.tracer.BUDGET", Budget(tokens=12))
    shapes = []
    watch = gpt2.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        counts = []
        for _ in range(2):
            shapes.clear()
            with model.trace([PROMPT, "The city", "Tower", "is in the"]):
                saved = model.transformer.h[0].output.save()
            counts.append(len(shapes))
    finally:
        watch.remove()
    assert counts[0] > counts[1] and shapes == [(1, 8), (1, 3), (2, 2)]
    assert [tuple(value.shape) for value in saved] == [(1, 8, 16), (1, 2, 16), (1, 1, 16), (1, 3, 16)]
    same(saved[1], oracle(gpt2, "transformer.h.0", [2, 8])[0][2], exactly=False)


def test_several_prompts_own_their_memory(model):
    with model.trace(SEVERAL):
        saved = model.transformer.h[0].output.save()
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in saved)
    saved[0].mul_(0)


# switching oneDNN off warns about Intel GPUs; with it on, bfloat16 ends in an illegal instruction on some virtual CPUs
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_a_probe_holds_for_one_dtype(modules):
    module = copy.deepcopy(modules["gpt2"])
    model = wrap(module)
    for dtype in (torch.float32, torch.float64):
        module.to(dtype)
        with model.trace(SEVERAL):
            saved = model.transformer.h[0].output.save()
        assert saved[0].dtype == dtype
    module.float()
    with torch.backends.mkldnn.flags(enabled=False), torch.autocast("cpu", torch.bfloat16), model.trace(SEVERAL):
        embedded = model.transformer.h[0].mlp.c_proj.output.save()
    assert embedded[0].dtype == torch.bfloat16


def test_dropout_is_the_likely_reason_why_several_prompts_cannot_be_cut_apart(modules):
    model = wrap(copy.deepcopy(modules["gpt2"]).train())
    with pytest.raises(AddressError, match=r"model\.eval\(\)"), model.trace(SEVERAL):
        model.transformer.h[0].output.save()
    model.eval()
    with pytest.raises(AddressError, match="it is None") as caught, model.trace(SEVERAL):
        model.transformer.h[0].attn.output[1].save()
    assert "eval" not in str(caught.value)


@pytest.mark.parametrize("port", ["inputs", "outputs"])
def test_several_prompts_share_no_structure(model, port):
    with pytest.raises(TraceError, match="name one tensor"), model.trace(SEVERAL):
        getattr(model.transformer.h[0], port).save()
    with model.trace([PROMPT]):
        one = getattr(model.transformer.h[0], port)[0][0].save()
    assert one[0].shape == (1, 8, 16)


# ------------------------------------------------------------------------------------------------------------ saved values


def test_gradients_come_to_a_saved_value(model, gpt2):
    with model.trace(IDS):
        hidden, logits = model.transformer.h[1].output[0].save(), model.output.logits.save()
    (found,) = torch.autograd.grad(logits.value[0, -1].max(), hidden.value)
    held = []
    hook = gpt2.transformer.h[1].register_forward_hook(lambda _, __, result: held.append(result))
    expected = gpt2(torch.tensor([IDS])).logits[0, -1].max()
    hook.remove()
    same(found, torch.autograd.grad(expected, held[0])[0])


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Identity()

    def forward(self, value):
        return self.second(self.first(value).mul_(0))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_value_that_is_written_into_afterwards_is_kept_as_it_was(mode):
    module = InPlace()
    model = wrap(module)
    with mode(), model.trace(torch.ones(1, 2)):
        first, second = model.first.output.save(), model.second.output.save()
    same(first.value, module.first(torch.ones(1, 2)))
    assert second.tolist() == [[0, 0]]


def test_the_ambient_grad_mode_is_kept(model, gpt2):
    for prompts in (PROMPT, [PROMPT, "The"]):
        with model.trace(prompts):
            saved = model.transformer.h[-1].output.save()
        value = saved[0] if isinstance(prompts, list) else saved.value
        gpt2.zero_grad()
        value.pow(2).sum().backward()
        got = gpt2.transformer.h[0].mlp.c_fc.weight.grad.clone()
        gpt2.zero_grad()
        oracle(gpt2, "transformer.h.2", IDS)[0][2].pow(2).sum().backward()
        torch.testing.assert_close(got, gpt2.transformer.h[0].mlp.c_fc.weight.grad)
        gpt2.zero_grad()
        with torch.no_grad(), model.trace(prompts):
            saved = model.transformer.h[-1].output.save()
        value = saved[0] if isinstance(prompts, list) else saved.value
        assert value.grad_fn is None and not value.requires_grad


def test_values_are_copies():
    steps = Steps()
    steps.layers[1].forward = lambda value: value.add_(1)
    model = wrap(steps)
    with model.trace(torch.zeros(2)):
        before = model.layers[0].output.save()
    assert before.tolist() == [0, 0]


@pytest.fixture
def saved(model):
    with torch.no_grad(), model.trace(PROMPT):
        last = model.transformer.h[-1]
        return last.output[0].save()


def test_a_saved_value_stands_in_for_its_tensor(saved):
    value = saved.value
    assert isinstance(saved, Saved) and saved.shape == (1, 8, 16) and saved.dtype == torch.float32
    assert torch.equal(saved[0], value[0]) and torch.equal(saved[saved > 0], value[value > 0])
    assert torch.equal(torch.linalg.norm(saved), torch.linalg.norm(value))
    assert torch.equal(torch.cat([saved, value, saved]), torch.cat([value] * 3))
    assert torch.equal(torch.add(saved, other=saved), value + value)
    assert torch.equal(nn.functional.layer_norm(saved, (16,)), nn.functional.layer_norm(value, (16,)))
    assert len(saved) == 1 and torch.equal(next(iter(saved)), value[0]) and torch.equal(-saved, -value)
    assert torch.equal(saved.mean(-1), value.mean(-1)) and torch.equal(abs(saved), abs(value))
    assert str(saved) == str(value) and repr(saved) == repr(value) and f"{saved}" == f"{value}"
    np.testing.assert_array_equal(np.asarray(saved), value.numpy())
    np.testing.assert_array_equal(np.array(saved, dtype=np.float64), value.double().numpy())
    assert torch.equal(np.float32(2) * saved, value * 2)
    assert {saved: 1}[saved] == 1
    saved[0, 0] = 0
    assert not saved.value[0, 0].any()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "eq", "ne", "ge", "gt"])
def test_operators_both_ways(saved, name):
    operation, value = getattr(operator, name), saved.value
    for one, other in ((saved, 2.0), (2.0, saved), (saved, value), (value, saved), (saved, saved)):
        plain = [each.value if isinstance(each, Saved) else each for each in (one, other)]
        torch.testing.assert_close(operation(one, other), operation(*plain), equal_nan=True)


def test_numbers_and_matrices(model, saved):
    assert torch.equal(saved @ saved.mT, saved.value @ saved.value.mT) and torch.equal(saved.value @ saved.mT, saved @ saved.mT)
    with torch.no_grad(), model.trace(PROMPT):
        one, ids = model.output.logits[0, 0, 0].save(), model.transformer.wte.input[0, 1].save()
    assert float(one) == one.item() and bool(one) and f"{one:.3f}" == f"{one.item():.3f}"
    assert int(ids) == 3 and list(range(9))[ids] == 3 and ids ^ 1 == 2


def test_a_saved_value_pickles_and_copies_as_its_tensor(saved):
    assert torch.equal(pickle.loads(pickle.dumps(saved)), saved.value)
    assert type(copy.deepcopy(saved)) is torch.Tensor
    file = io.BytesIO()
    torch.save({"hidden": saved}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["hidden"], saved.value)


USES = {
    "value": lambda x: x.value,
    "attribute": lambda x: x.shape,
    "index": lambda x: x[0],
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "tensor first": lambda x: torch.ones(1) + x,
    "compare": lambda x: x == 1,
    "negate": operator.neg,
    "norm": torch.linalg.norm,
    "cat": lambda x: torch.cat([torch.ones(1), x]),
    "len": len,
    "iter": iter,
    "float": float,
    "bool": bool,
    "str": str,
    "format": lambda x: f"{x}",
    "numpy": np.asarray,
}


@pytest.mark.parametrize("use", USES)
def test_a_saved_value_is_not_there_before_the_block_ends(model, use):
    with model.trace(PROMPT):
        hidden = model.transformer.h[-1].output[0].save()
        assert repr(hidden) == "<transformer.h[2].output[0], no value yet>"
        with pytest.raises(TraceError, match=r"transformer\.h\[2\]\.output\[0\]` has no value yet.*after the block"):
            USES[use](hidden)
    USES[use](hidden) if use not in ("float", "bool", "cat", "numpy") else None


@pytest.mark.parametrize("use", USES)
def test_what_was_not_saved_is_gone(model, use):
    with model.trace(PROMPT):
        lost = model.transformer.h[-1].output[0]
        kept = model.transformer.h[-1].output[0].save()
    assert kept.shape == (1, 8, 16) and "not saved" in repr(lost)
    with pytest.raises(TraceError, match=r"not what was saved.*gone"):
        USES[use](lost)
    with pytest.raises(TraceError, match="not what was saved"), model.trace(PROMPT):
        lost.save()


@pytest.mark.parametrize("use", sorted(set(USES) - {"value", "attribute", "index"}))
def test_nothing_is_computed_inside_the_block(model, use):
    with pytest.raises(TraceError, match=r"out of scope.*save.*after the block"), model.trace(PROMPT):
        USES[use](model.transformer.h[-1].output[0])


def assign_entry(model):
    model.transformer.h[0].output[0] = 1


def assign_slice(model):
    model.transformer.h[0].output[0][:] = 0


def assign_port(model):
    model.transformer.h[0].output = torch.zeros(1)


def assign_attribute(model):
    model.transformer.h[0].output.logits = 1


def assign_module(model):
    model.transformer.h[0] = nn.Identity()


def add_in_place(model):
    model.transformer.h[0].output[0] += 1


@pytest.mark.parametrize(
    "change",
    [
        assign_entry, assign_slice, assign_port, assign_attribute, assign_module, add_in_place,
        lambda model: model.transformer.h[0].output[0].mean(), lambda model: model.lm_head(torch.zeros(16)),
    ],
)  # fmt: skip
def test_nothing_is_changed_inside_the_block(model, change):
    with pytest.raises(TraceError, match=r"out of scope.*save.*after the block"), model.trace(PROMPT):
        change(model)


# ------------------------------------------------------------------------------------------------------------- the block


def test_ports_need_a_block(model):
    for port in ("output", "outputs", "input", "inputs"):
        with pytest.raises(TraceError, match=r"with model\.trace\("):
            getattr(model.transformer.h[0], port)


def test_a_body_that_raises_runs_nothing(model, gpt2):
    runs = []
    watch = gpt2.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        with pytest.raises(KeyError, match="mine"), model.trace(PROMPT):
            hidden = model.transformer.h[0].output.save()
            raise KeyError("mine")
        with model.trace(PROMPT) as tracer:
            model.transformer.h[0].output  # noqa: B018 # asking for it is what is tested
    finally:
        watch.remove()
    assert not runs and tracer.over
    with pytest.raises(TraceError, match="raised an exception"):
        hidden.value  # noqa: B018 # asking for it is what is tested
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].output.save()
    assert hidden.shape == (1, 8, 16)


def test_a_model_that_raises_leaves_no_hooks():
    steps = Steps()
    model = wrap(steps)
    with pytest.raises(ZeroDivisionError, match="own"), model.trace(torch.zeros(1), fail=True):
        hidden = model.layers[0].output.save()
    assert hooks_on(steps) == 0
    with pytest.raises(TraceError, match="raised"):
        len(hidden)


def test_blocks_do_not_nest(model, modules):
    other = wrap(modules["llama"])
    with model.trace(PROMPT):
        with pytest.raises(TraceError, match="already"), model.trace(PROMPT):
            pass
        with other.trace(IDS):
            inner = other.norm.output.save()
        assert inner.shape == (1, 8, 16)
        hidden = model.transformer.h[0].output.save()
    assert hidden.shape == (1, 8, 16)


def test_a_value_that_is_none_is_refused_as_in_a_dump(gpt2):
    model = wrap(gpt2)
    with pytest.raises(AddressError, match="attn_implementation: eager"), model.trace([1, 2, 3]):
        model.transformer.h[0].attn.output[1].save()


def test_ids_outside_the_vocabulary_and_what_is_no_module_are_refused(gpt2):
    with pytest.raises(UsageError, match="outside the vocabulary"):
        wrap(gpt2).trace([10**6])
    with pytest.raises(UsageError, match="takes a torch module, not int"):
        wrap(3)


@pytest.mark.parametrize(
    "given",
    [np.array([1, 2, 3]), np.array([[1, 2, 3]]), [np.int64(1), np.int32(2), np.uint8(3)], [np.array([1, 2, 3]), [4, 5]]],
    ids=["array", "array of two axes", "numbers of numpy", "arrays"],
)
def test_ids_come_in_numpy_too(given, gpt2):
    model = wrap(gpt2)
    with model.trace([1, 2, 3]):
        plain = model.transformer.h[0].output[0].save()
    with model.trace(given):
        kept = model.transformer.h[0].output[0].save()
    torch.testing.assert_close(kept[0] if isinstance(kept.value, list) else kept.value, plain.value)


def test_texts_come_in_a_numpy_array_too(model):
    with model.trace(np.array(["the cat", "a"])):
        kept = model.transformer.h[0].output[0].save()
    assert [value.shape[1] for value in kept] == [2, 1]


@pytest.mark.parametrize("given", [[True, False], torch.tensor([True, False]), np.array([1.5, 2.0]), [[1, True]]], ids=str)
def test_what_looks_like_ids_and_is_none_is_refused(given, gpt2):
    with pytest.raises(UsageError, match="neither a string nor token ids"):
        wrap(gpt2).trace(given)


def test_chat_messages_are_refused_with_the_way_to_make_ids_of_them(gpt2):
    with pytest.raises(UsageError, match=r"prompt 0 is neither .*apply_chat_template"):
        wrap(gpt2).trace([{"role": "user", "content": "Hello"}])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(1, 2))], ids=["script", "trace"]
)
def test_what_torch_jit_made_is_refused(how):
    with pytest.raises(UsageError, match=r"`Sequential` was made by torch\.jit, .*wrap the module that it was made of"):
        wrap(how(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))


@pytest.mark.parametrize(
    "given", [5, None, b"text", range(3), (word for word in ["the"]), torch.tensor(5)], ids=lambda given: type(given).__name__
)
def test_what_is_no_prompt_is_refused(given, model):
    with pytest.raises(
        UsageError, match="trace takes a prompt, a list of prompts, token ids, or the model's own arguments, not"
    ):
        model.trace(given)


def test_a_position_that_a_prompt_does_not_have_is_named_with_it(gpt2):
    model = wrap(gpt2)
    with (
        pytest.raises(
            AddressError, match=r"h\[0\]\.output\[0\].*: prompt 1 has 2 tokens, and this asks for a position that needs 3"
        ),
        model.trace([[1, 2, 3], [4, 5]]),
    ):
        model.transformer.h[0].output[0][:, 2].save()


@pytest.mark.parametrize("call", ["0", True, 1.0])
def test_a_call_is_a_number(call, gpt2):
    model = wrap(gpt2)
    with pytest.raises(TraceError, match="`call` is a number"), model.trace([1, 2, 3]):
        model.transformer.h[0].output.save(call=call)


def test_lists_of_a_tokenizer_are_asked_for_as_tensors(model):
    with pytest.raises(UsageError, match='return_tensors="pt"'):
        model.trace(model.tokenizer("the cat"))
    with pytest.raises(UsageError, match='return_tensors="pt"'):
        model.trace(**model.tokenizer("the cat"))


def test_the_models_own_arguments_may_begin_with_none(gpt2):
    model, embedded = wrap(gpt2), gpt2.transformer.wte(torch.tensor([[1, 2, 3]]))
    with model.trace(None, inputs_embeds=embedded):
        kept = model.transformer.h[0].output[0].save()
    with model.trace([1, 2, 3]):
        plain = model.transformer.h[0].output[0].save()
    assert torch.equal(kept.value, plain.value)


def test_a_compiled_model_is_traced_as_what_it_was_made_of(gpt2):
    compiled = wrap(torch.compile(gpt2, backend="eager"))
    with compiled.trace([1, 2, 3]):
        kept = compiled.transformer.h[-1].output[0].save()
    model = wrap(gpt2)
    with model.trace([1, 2, 3]):
        plain = model.transformer.h[-1].output[0].save()
    assert torch.equal(kept.value, plain.value)


def test_an_item_after_input_indexes_the_first_argument(gpt2):
    model = wrap(gpt2)
    with model.trace([1, 2, 3]):
        whole = model.transformer.h[1].input.save()
        first = model.transformer.h[1].input[0].save()
        spelled = model.transformer.h[1].inputs[0][0][0].save()
    assert first.shape == (3, 16)
    assert torch.equal(first, whole[0])
    assert torch.equal(first, spelled)


def test_a_module_that_is_put_in_the_place_of_another_is_the_one_that_is_seen():
    module = build("llama")
    model = wrap(module)
    for _ in range(2):
        with model.trace(SEVERAL):
            saved = model.layers[0].mlp.output.save()
        for value, ids in zip(saved, SEVERAL, strict=True):
            same(value, oracle(module, "layers.0.mlp", ids)[0][2], exactly=False)
        module.layers[0].mlp = nn.Linear(16, 16)


class Seeing(nn.Module):
    """As models of images and text are: the first embedding is not that of the tokens, and the config tells their number elsewhere."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Embedding(2, 4)
        self.words = nn.Embedding(40, 4)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=40))

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        return self.words(input_ids)


def test_the_vocabulary_is_that_of_the_text():
    module = Seeing()
    model = wrap(module)
    with model.trace([5, 39]):
        value = model.words.output.save()
    assert torch.equal(value, module.words(torch.tensor([[5, 39]])))
    with pytest.raises(UsageError, match="0 to 39"):
        model.trace([40])


def test_threads_that_trace_one_module_see_their_own_forwards_alone(gpt2):
    """And a plain forward in another thread is left alone."""
    prompts = [[place, place + 1, place + 2] for place in range(4)]

    def expected(prompt):
        return gpt2.transformer(torch.tensor([prompt]), use_cache=False).last_hidden_state

    def traced(prompt):
        model = wrap(gpt2)
        for _ in range(40):
            with model.trace(prompt):
                saved = model.transformer.ln_f.output.save()
            torch.testing.assert_close(saved.value, expected(prompt))
        return True

    with torch.no_grad(), ThreadPoolExecutor(4) as threads:
        assert all(threads.map(traced, prompts))


# ------------------------------------------------------------------------------------------------- a model that is changed


class Gated(nn.Module):
    """Adds to each token the mean of all, as far as its gate is open, once or several times."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        self.ahead_too, self.loops = True, 1
        self.settings = SimpleNamespace(more={"gate": 0.0})
        self.step = nn.Linear(8, 8)

    def forward(self, hidden, mask):
        for _ in range(self.loops):
            hidden = self.step(hidden)
        real = torch.ones(hidden.shape[:2]) if mask is None else mask
        total = (hidden * real[..., None]).cumsum(1)
        gate = self.gate + self.settings.more["gate"]
        return hidden + gate * (total[:, -1:] if self.ahead_too else total)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([Gated(), Gated()])
        self.layers[1].gate.data.fill_(1)
        self.layers[1].ahead_too = False

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        return hidden


def open_gate(module):
    with torch.no_grad():
        module.layers[0].gate.fill_(1)


def load_gate(module):
    module.load_state_dict({**module.state_dict(), "layers.0.gate": torch.ones(())})


def other_layer(module):
    module.layers[0] = Gated().eval()
    open_gate(module)


def look_ahead(module):
    module.layers[1].ahead_too = True


def open_gate_uncounted(module):
    module.layers[0].gate.data.fill_(1)


def set_gate(module):
    module.layers[0].settings.more["gate"] = 1.0


def add_total(_, args, result):
    hidden, mask = args
    return result + (hidden if mask is None else hidden * mask[..., None]).sum(1, keepdim=True)


def steer(module):
    module.layers[0].register_forward_hook(add_total)


def steer_everywhere(module):
    """With a hook that torch keeps for all modules."""
    register_module_forward_hook(lambda layer, *rest: add_total(layer, *rest) if layer is module.layers[0] else None)


def patch(module):
    real = module.layers[0].forward
    module.layers[0].forward = lambda *args: add_total(None, args, real(*args))


CHANGES = [
    open_gate, load_gate, open_gate_uncounted, other_layer, look_ahead, set_gate, steer, steer_everywhere, patch, nn.Module.double
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_between_traces_is_probed_again(change, request):
    request.addfinalizer(_global_forward_hooks.clear)
    torch.manual_seed(0)
    module = Mixing().eval()
    model = wrap(module)
    for changed in (False, True):
        if changed:
            change(module)
        with torch.no_grad(), model.trace(SEVERAL):
            saved = model.layers[-1].output.save()
        for prompt, value in zip(SEVERAL, saved, strict=True):
            alone = module(torch.tensor([prompt])).detach()
            assert value.dtype == alone.dtype
            torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-5)


def test_weights_that_are_put_aside_and_back_are_noticed():
    module = Mixing().eval()
    module.layers[0].gate.data.fill_(1)
    model, gate = wrap(module), module.layers[0].gate
    for opened in (0.0, 1.0):
        gate.data.fill_(opened)
        with torch.no_grad(), model.trace(SEVERAL):
            saved = model.layers[-1].output.save()
    for prompt, value in zip(SEVERAL, saved, strict=True):
        torch.testing.assert_close(value, module(torch.tensor([prompt])).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts", [[5, 3], SEVERAL])
def test_a_module_that_comes_to_run_more_often_is_counted_again(prompts):
    module = Mixing().eval()
    model = wrap(module)
    with model.trace(prompts):
        model.layers[0].step.output.save()
    module.layers[0].loops = 3
    with pytest.raises(AddressError, match="runs 3 times"), model.trace(prompts):
        model.layers[0].step.output.save()
    with model.trace(prompts):
        last = model.layers[0].step.output.save(call=-1)
    hidden = module.embedding(torch.tensor([SEVERAL[0]]))
    for _ in range(3):
        hidden = module.layers[0].step(hidden)
    torch.testing.assert_close(last.value if prompts == [5, 3] else last[0], hidden)
