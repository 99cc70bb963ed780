"""Tiny models: seeded transformers models from configs, and toys whose values are known in closed form."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, logging

logging.set_verbosity_error()

VOCABULARY = 60
NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIGS = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {**NARROW, "num_key_value_heads": 1},
    "opt": {**NARROW, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 2},
    "mixtral": {**NARROW, "num_key_value_heads": 1, "num_local_experts": 4},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "bert": {**NARROW, "max_position_embeddings": 64},
    "albert": {**NARROW, "num_hidden_layers": 3, "embedding_size": 8, "max_position_embeddings": 64},
}
WITHOUT_HEAD = ("bert", "albert")


def build(kind, attention=None):
    """A model of that family, with weights large enough that a wrong mask or position shows."""
    spread = "init_std" if kind == "opt" else "initializer_range"
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=1, **{spread: 0.3}, **CONFIGS[kind])
    torch.manual_seed(0)
    options = {"attn_implementation": attention} if attention else {}
    return (AutoModel if kind in WITHOUT_HEAD else AutoModelForCausalLM).from_config(config, **options).eval()


class Step(nn.Module):
    """Does something to the hidden states, and counts how often."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.ran = 0

    def forward(self, hidden):
        self.ran += 1
        return self.function(hidden)


class Toy(nn.Module):
    """An embedding and then the functions, one after another; `ids[b, t]` is embedded as `(id, id + 1, id + 2, id + 3)`."""

    def __init__(self, *functions):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4)
        self.embed.weight = nn.Parameter(torch.arange(VOCABULARY)[:, None] + torch.arange(4.0), requires_grad=False)
        self.layers = nn.ModuleList(Step(function) for function in functions)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Ladder(Toy):
    """Layer k adds k to the hidden states, so that after it they are the embedding and `k * (k + 1) / 2`."""

    def __init__(self, count=5, *, in_place=False):
        super().__init__(*(lambda hidden, k=k: hidden.add_(k) if in_place else hidden + k for k in range(count)))

    @property
    def ran(self):
        return [layer.ran for layer in self.layers]

    def after(self, k, ids):
        """What layer k returns for these ids, in closed form."""
        return torch.tensor(ids)[:, None] + torch.arange(4.0) + k * (k + 1) / 2
