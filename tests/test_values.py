"""The rule on values: what is kept for a prompt is what the address holds when that prompt runs alone, unpadded.

The oracle is a plain forward of one prompt with a plain PyTorch hook; nothing of ours takes part in it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import need_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from zoo import DEVICE

import actdump
from actdump import job
from actdump.plan import Budget, batches, padded
from actdump.spec import Spec

MODELS = Path(__file__).parents[1] / "models"
LENGTHS = (1, 9, 2, 30, 7, 7, 3, 21, 13, 5, 17, 4)
TEXTS = (
    "Hello",
    "The Eiffel Tower is in the city of",
    "Water boils at a lower temperature on a high mountain, because the pressure of the air is lower there.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time",
    "Grüße aus Zürich, 東京 und København!",
    "The lighthouse keeper had counted ships for thirty-one years. He wrote each of them down in a ledger with a green cover: "
    "the name, if he could read it, the hour, the weather, and the direction in which it went. Nobody had asked him to do so.",
    "a",
    "The chemical symbol for gold is",
    "Mix the flour with the salt, dissolve the yeast in the water, knead for ten minutes, and let it rest until it has doubled.",
    "To be, or not to be, that is the question",
)


@dataclass(frozen=True)
class Place:
    """An address and, for the oracle, the same place in plain PyTorch: a submodule, and what to take from its hook.

    `take` is `output`, `input` (first positional or else first keyword argument), or the item of a returned tuple.
    `flat` says that the module's tensor has no batch axis of its own: `(batch*token, d)`.
    """

    address: str
    path: str
    take: str | int = "output"
    call: int | None = None
    flat: bool = False

    @property
    def entry(self) -> Any:
        return self.address if self.call is None else {"address": self.address, "call": self.call}


@dataclass(frozen=True)
class Case:
    """A tiny model from a config, and the places looked at in it."""

    config: dict[str, Any]
    places: dict[str, Place]
    task: str = "causal-lm"

    @property
    def spec(self) -> dict[str, Any]:
        return {"config": self.config, "seed": 0, "task": self.task}

    def plain(self) -> torch.nn.Module:
        """The same model, made without actdump."""
        torch.manual_seed(0)
        kind = {"causal-lm": AutoModelForCausalLM, "base": AutoModel}[self.task]
        return kind.from_config(AutoConfig.for_model(**self.config)).eval().to(DEVICE)


def config(kind: str, **own: Any) -> dict[str, Any]:
    """Weights large enough that a wrong mask or position moves the values by far more than the tolerance."""
    spread = "init_std" if kind == "opt" else "initializer_range"
    return {"model_type": kind, "vocab_size": 40, spread: 0.3, "pad_token_id": 1, **own}


NARROW = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 3}

CASES = {
    "gpt2": Case(
        config("gpt2", n_embd=16, n_layer=3, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0),
        {
            "tokens in": Place("transformer.wte.output", "transformer.wte"),
            "positions": Place("transformer.wpe.output", "transformer.wpe"),
            "first": Place("transformer.h[0].output[0]", "transformer.h.0"),
            "last": Place("transformer.h[-1].output", "transformer.h.2"),
            "attention": Place("transformer.h[1].attn.output[0]", "transformer.h.1.attn", 0),
            "mlp": Place("transformer.h[1].mlp.output", "transformer.h.1.mlp"),
            "input": Place("transformer.h[2].input", "transformer.h.2", "input"),
            "inner": Place("transformer.h[0].mlp.c_proj.input", "transformer.h.0.mlp.c_proj", "input"),
            "norm": Place("transformer.h[1].ln_2.output", "transformer.h.1.ln_2"),
            "logits": Place("lm_head.output", "lm_head"),
        },
    ),
    "llama": Case(
        config("llama", **NARROW, num_key_value_heads=2),
        {
            "embedding": Place("model.embed_tokens.output", "model.embed_tokens"),
            "rotary": Place("model.rotary_emb.output[1]", "model.rotary_emb", 1),
            "middle": Place("model.layers[1].output[0]", "model.layers.1"),
            "attention": Place("model.layers[1].self_attn.output[0]", "model.layers.1.self_attn", 0),
            "attention in": Place("model.layers[2].self_attn.input", "model.layers.2.self_attn", "input"),
            "mlp": Place("model.layers[-1].mlp.output", "model.layers.2.mlp"),
            "gated": Place("model.layers[0].mlp.down_proj.input", "model.layers.0.mlp.down_proj", "input"),
            "norm": Place("model.norm.output", "model.norm"),
        },
    ),
    "opt": Case(
        config("opt", hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
               max_position_embeddings=64),
        {
            "positions": Place("model.decoder.embed_positions.output", "model.decoder.embed_positions"),
            "block": Place("model.decoder.layers[0].output[0]", "model.decoder.layers.0"),
            "attention": Place("model.decoder.layers[1].self_attn.output[0]", "model.decoder.layers.1.self_attn", 0),
            "fc1": Place("model.decoder.layers[1].fc1.output", "model.decoder.layers.1.fc1", flat=True),
            "fc2 in": Place("model.decoder.layers[0].fc2.input", "model.decoder.layers.0.fc2", "input", flat=True),
            "flat norm": Place("model.decoder.layers[1].final_layer_norm.output", "model.decoder.layers.1.final_layer_norm", flat=True),
            "norm": Place("model.decoder.final_layer_norm.output", "model.decoder.final_layer_norm"),
        },
    ),
    "bloom": Case(
        config("bloom", hidden_size=16, n_layer=3, n_head=4),
        {
            "embedding": Place("transformer.word_embeddings.output", "transformer.word_embeddings"),
            "embedding norm": Place("transformer.word_embeddings_layernorm.output", "transformer.word_embeddings_layernorm"),
            "block": Place("transformer.h[1].output[0]", "transformer.h.1", 0),
            "last": Place("transformer.h[-1].output[0]", "transformer.h.2", 0),
            "attention": Place("transformer.h[1].self_attention.output[0]", "transformer.h.1.self_attention", 0),
            "mlp": Place("transformer.h[2].mlp.output", "transformer.h.2.mlp"),
            "input": Place("transformer.h[1].input", "transformer.h.1", "input"),
        },
    ),
    "mixtral": Case(
        config("mixtral", **NARROW, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
        {
            "block": Place("model.layers[1].output[0]", "model.layers.1"),
            "attention": Place("model.layers[0].self_attn.output[0]", "model.layers.0.self_attn", 0),
            "experts": Place("model.layers[1].mlp.output", "model.layers.1.mlp"),
            "router": Place("model.layers[1].mlp.gate.output[0]", "model.layers.1.mlp.gate", 0, flat=True),
            "chosen": Place("model.layers[0].mlp.gate.output[2]", "model.layers.0.mlp.gate", 2, flat=True),
            "router in": Place("model.layers[2].mlp.gate.input", "model.layers.2.mlp.gate", "input", flat=True),
            "norm": Place("model.layers[2].post_attention_layernorm.output", "model.layers.2.post_attention_layernorm"),
        },
    ),
    "mamba": Case(
        config("mamba", hidden_size=16, state_size=4, num_hidden_layers=2),
        {
            "embedding": Place("backbone.embeddings.output", "backbone.embeddings"),
            "block": Place("backbone.layers[0].output[0]", "backbone.layers.0"),
            "last": Place("backbone.layers[-1].output", "backbone.layers.1"),
            "mixer": Place("backbone.layers[1].mixer.output", "backbone.layers.1.mixer"),
            "scanned": Place("backbone.layers[1].mixer.out_proj.input", "backbone.layers.1.mixer.out_proj", "input"),
            "norm": Place("backbone.norm_f.output", "backbone.norm_f"),
        },
    ),
    "bert": Case(
        config("bert", **NARROW, max_position_embeddings=32),
        {
            "embedding": Place("embeddings.output", "embeddings"),
            "positions": Place("embeddings.position_embeddings.output", "embeddings.position_embeddings"),
            "block": Place("encoder.layer[1].output[0]", "encoder.layer.1"),
            "attention": Place("encoder.layer[1].attention.self.output[0]", "encoder.layer.1.attention.self", 0),
            "mlp": Place("encoder.layer[2].output.dense.output", "encoder.layer.2.output.dense"),
            "mlp in": Place("encoder.layer[0].intermediate.input", "encoder.layer.0.intermediate", "input"),
            "norm": Place("encoder.layer[2].output.LayerNorm.output", "encoder.layer.2.output.LayerNorm"),
            "pooler": Place("pooler.output", "pooler"),
        },
        task="base",
    ),
    "albert": Case(
        config("albert", **NARROW | {"num_hidden_layers": 4}, embedding_size=8, max_position_embeddings=32),
        {
            "embedding": Place("embeddings.output", "embeddings"),
            "third": Place("encoder.albert_layer_groups[0].albert_layers[0].output[0]",
                           "encoder.albert_layer_groups.0.albert_layers.0", call=2),
            "last": Place("encoder.albert_layer_groups[0].albert_layers[0].output[0]",
                          "encoder.albert_layer_groups.0.albert_layers.0", call=-1),
            "attention": Place("encoder.albert_layer_groups[0].albert_layers[0].attention.output[0]",
                               "encoder.albert_layer_groups.0.albert_layers.0.attention", 0, call=1),
            "mlp": Place("encoder.albert_layer_groups[0].albert_layers[0].ffn_output.output",
                         "encoder.albert_layer_groups.0.albert_layers.0.ffn_output", call=0),
            "input": Place("encoder.albert_layer_groups[0].albert_layers[0].input",
                           "encoder.albert_layer_groups.0.albert_layers.0", "input", call=3),
            "pooler": Place("pooler.output", "pooler"),
        },
        task="base",
    ),
}  # fmt: skip


def random_ids(lengths=LENGTHS, vocabulary=40):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def oracle(module, places, ids):
    """What every place holds in a plain forward of one prompt, every axis as it is."""
    calls = {name: [] for name in places}
    keep = []
    for name, place in places.items():

        def hook(_, args, kwargs, result, name=name, take=place.take):
            if take == "input":
                value = args[0] if args else next(iter(kwargs.values()))
            else:
                value = result if take == "output" else result[take]
                value = value[0] if isinstance(value, tuple) else value
            calls[name].append(value.to("cpu", copy=True))

        keep.append(module.get_submodule(place.path).register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        module(input_ids=torch.tensor([ids], device=DEVICE))
    for handle in keep:
        handle.remove()
    for name, place in places.items():
        assert place.call is not None or len(calls[name]) == 1
    return {name: calls[name][place.call or 0] for name, place in places.items()}


def error_per_token(value, expected):
    """The relative error of each token's vector; of the whole vector where there is no token axis."""
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    if not value.is_floating_point():
        return (value != expected).double().reshape(-1)
    one, other = (each.double().reshape(each.shape[0] if each.ndim > 1 else 1, -1) for each in (value, expected))
    size, difference = other.norm(dim=1), (one - other).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / size)


def made(folder, **spec):
    """A dump from a spec, as the command makes it."""
    outcome = job.run(Spec.model_validate(spec), folder)
    assert outcome.state == "done"
    return actdump.open(folder)


def assert_padded(dump, lengths):
    """That prompts of different lengths shared a batch, so that there was padding to leave out."""
    cut = batches(lengths, Budget(**json.loads(dump.folder.plan.read_text())["budget"]))
    assert padded(lengths, cut) > sum(lengths)
    assert any(len(batch) > 1 for batch in cut)


@pytest.fixture(params=["yaml", "trace of several", "trace of one"])
def front(request, tmp_path):
    """Both front ends as one function: the value of every place for every prompt, and whether the batch axis is in it."""

    def yaml(case, prompts):
        save = {name: place.entry for name, place in case.places.items()}
        dump = made(tmp_path / "out", model=case.spec, prompts=[{"input_ids": ids} for ids in prompts], save=save)
        assert_padded(dump, list(map(len, prompts)))
        return [{name: dump[name][number] for name in save} for number in range(len(prompts))], False

    def several(case, prompts):
        model = actdump.wrap(case.plain())
        with torch.no_grad(), model.trace(prompts):
            saved = {name: saved_place(model, place) for name, place in case.places.items()}
        return [{name: each.value[number].cpu() for name, each in saved.items()} for number in range(len(prompts))], True

    def one(case, prompts):
        model = actdump.wrap(case.plain())
        found = []
        for ids in prompts:
            with torch.no_grad(), model.trace(ids):
                saved = {name: saved_place(model, place) for name, place in case.places.items()}
            found.append({name: each.value.cpu() for name, each in saved.items()})
        return found, True

    return {"yaml": yaml, "trace of several": several, "trace of one": one}[request.param]


def saved_place(model, place):
    reference = eval(f"model.{place.address}", {"model": model})
    return reference.save() if place.call is None else reference.save(call=place.call)


@pytest.mark.parametrize("name", CASES)
def test_every_value_is_that_of_the_prompt_alone(name, front, record_property):
    case = CASES[name]
    prompts = random_ids()
    module = case.plain()
    found, whole = front(case, prompts)
    worst = dict.fromkeys(case.places, 0.0)
    for ids, values in zip(prompts, found, strict=True):
        for tap, expected in oracle(module, case.places, ids).items():
            if not whole and not case.places[tap].flat:
                assert expected.shape[0] == 1
                expected = expected[0]
            worst[tap] = max(worst[tap], error_per_token(values[tap], expected).max().item())
    record_property("worst relative error", worst)
    print(name, worst)
    assert max(worst.values()) < 1e-5, worst


RECORDS = config("llama", **NARROW, num_key_value_heads=2)


@pytest.mark.parametrize("recording", [True, False])
def test_hidden_states_that_a_config_asks_for_are_those_of_their_blocks(recording, front):
    """transformers records them by hooks of its own, which it puts in with the first forward and leaves there."""
    blocks = {"0": "model.embed_tokens", "1": "model.layers.0", "2": "model.layers.1", "3": "model.norm"}
    recorded = {number: Place(f"output.hidden_states[{number}]", path) for number, path in blocks.items()}
    plain = {"block": Place("model.layers[1].output[0]", "model.layers.1")}
    case = Case({**RECORDS, "output_hidden_states": True}, recorded if recording else plain)
    prompts = random_ids()
    module = Case(RECORDS, {}).plain()
    found, whole = front(case, prompts)
    for ids, values in zip(prompts, found, strict=True):
        for tap, expected in oracle(module, case.places, ids).items():
            assert error_per_token(values[tap], expected if whole else expected[0]).max() < 1e-5, tap


SELECTIONS = {
    "all": lambda value: value,
    "first": lambda value: value[0],
    "last": lambda value: value[-1],
    "mean": lambda value: value.mean(0),
    "[0, -1]": lambda value: value[[0, -1]],
    "[-2]": lambda value: value[[-2]],
    "1:3": lambda value: value[1:3],
    "::2": lambda value: value[::2],
    "-3:": lambda value: value[-3:],
    ":-1": lambda value: value[:-1],
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selected_tokens_are_those_of_the_prompt(selection, tmp_path):
    places = {
        "block": Place("model.layers[1].output[0]", "model.layers.1"),
        "router": Place("model.layers[1].mlp.gate.output[0]", "model.layers.1.mlp.gate", 0, flat=True),
        "rotary": Place("model.rotary_emb.output[0]", "model.rotary_emb", 0),
    }
    case = Case(CASES["mixtral"].config, places)
    prompts = random_ids([length for length in LENGTHS if length > 1])
    tokens = json.loads(selection) if selection.startswith("[") else selection
    save = {name: {"address": place.address, "tokens": tokens} for name, place in places.items()}
    dump = made(tmp_path / "out", model=case.spec, prompts=[{"input_ids": ids} for ids in prompts], save=save)
    module = case.plain()
    for number, ids in enumerate(prompts):
        for name, expected in oracle(module, places, ids).items():
            expected = SELECTIONS[selection](expected if places[name].flat else expected[0])
            assert error_per_token(dump[name][number], expected).max() < 1e-5


@pytest.mark.parametrize("index", ["[:, -1]", "[0, -2:]", "[..., 3]", "[:, 0, 2:5]"])
def test_a_tensor_index_works_on_the_unpadded_value_of_one_prompt(index, tmp_path):
    address = f"transformer.h[1].output[0]{index}"
    case = CASES["gpt2"]
    prompts = random_ids([length for length in LENGTHS if length > 1])
    dump = made(tmp_path / "out", model=case.spec, prompts=[{"input_ids": ids} for ids in prompts], save=[address])
    module = case.plain()
    keeps_batch = not index.startswith("[0")
    for number, ids in enumerate(prompts):
        value = oracle(module, {"block": Place("", "transformer.h.1")}, ids)["block"]
        expected = eval(f"value{index}", {"value": value})
        expected = expected[0] if keeps_batch else expected
        torch.testing.assert_close(dump[address][number], expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- real weights


SMOL = {
    "embedding": Place("model.embed_tokens.output", "model.embed_tokens"),
    "block 0": Place("model.layers[0].output[0]", "model.layers.0"),
    "block 15": Place("model.layers[15].output[0]", "model.layers.15"),
    "block 29": Place("model.layers[-1].output[0]", "model.layers.29"),
    "attention 15": Place("model.layers[15].self_attn.output[0]", "model.layers.15.self_attn", 0),
    "mlp 29": Place("model.layers[29].mlp.output", "model.layers.29.mlp"),
    "input 8": Place("model.layers[8].self_attn.input", "model.layers.8.self_attn", "input"),
    "norm": Place("model.norm.output", "model.norm"),
}
MINI = {
    "embedding": Place("embeddings.output", "embeddings"),
    "block 0": Place("encoder.layer[0].output[0]", "encoder.layer.0"),
    "block 3": Place("encoder.layer[3].output[0]", "encoder.layer.3"),
    "block 5": Place("encoder.layer[-1].output[0]", "encoder.layer.5"),
    "attention 3": Place("encoder.layer[3].attention.self.output[0]", "encoder.layer.3.attention.self", 0),
    "mlp 5": Place("encoder.layer[5].output.dense.output", "encoder.layer.5.output.dense"),
    "input 2": Place("encoder.layer[2].input", "encoder.layer.2", "input"),
    "norm 1": Place("encoder.layer[1].output.LayerNorm.output", "encoder.layer.1.output.LayerNorm"),
    "pooler": Place("pooler.output", "pooler"),
}


def compared(folder, kind, places, dtype, out):
    """The relative errors of all tokens at every place, between a dump and plain forwards."""
    save = {name: place.address for name, place in places.items()}
    dump = made(out, model={"name": str(folder), "dtype": dtype}, prompts=list(TEXTS), save=save)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = kind.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(DEVICE)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert_padded(dump, list(map(len, prompts)))
    assert [prompt.tokens for prompt in dump.prompts] == prompts
    errors = {name: [] for name in places}
    for number, ids in enumerate(prompts):
        for name, expected in oracle(module, places, ids).items():
            errors[name].append(error_per_token(dump[name][number], expected[0]))
    return dump, {name: torch.cat(each) for name, each in errors.items()}


@pytest.mark.parametrize(
    ("name", "kind", "places"),
    [("SmolLM2-135M-Instruct", AutoModelForCausalLM, SMOL), ("all-MiniLM-L6-v2", AutoModel, MINI)],
    ids=["SmolLM2", "MiniLM"],
)
def test_real_weights_in_float32(name, kind, places, tmp_path, record_property):
    dump, errors = compared(need_model(name), kind, places, "float32", tmp_path / "out")
    worst = {tap: each.max().item() for tap, each in errors.items()}
    record_property("worst relative error", worst)
    print(name, worst)
    assert max(worst.values()) < 1e-4, worst
    assert_bytes_are_those_of_safetensors_alone(dump)


def assert_bytes_are_those_of_safetensors_alone(dump):
    numbers = []
    for shard in dump.manifest.shards:
        with safe_open(dump.folder.shard(shard.number), framework="pt") as file:
            for name in dump.names:
                rows, offsets = file.get_tensor(name), file.get_tensor(f"{name}.offsets").tolist()
                for place in range(shard.prompts):
                    value = dump[name][shard.first + place]
                    assert torch.equal(value, rows[offsets[place] : offsets[place + 1]].reshape(value.shape))
            numbers += range(shard.first, shard.first + shard.prompts)
    assert numbers == list(range(len(dump.prompts)))


def test_real_weights_in_bfloat16(tmp_path, record_property):
    """Rounding to 8 bits at every step: other batch shapes round otherwise, so the median token is what can be held."""
    _, errors = compared(need_model("SmolLM2-135M-Instruct"), AutoModelForCausalLM, SMOL, "bfloat16", tmp_path / "out")
    seen = {tap: (each.median().item(), each.max().item()) for tap, each in errors.items()}
    record_property("median and worst relative error", seen)
    print("SmolLM2 bfloat16", seen)
    assert max(median for median, _ in seen.values()) < 0.02, seen
