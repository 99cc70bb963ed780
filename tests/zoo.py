"""Tiny models: seeded transformers models from configs, and toys whose values are known in closed form."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, logging

logging.set_verbosity_error()

# Where `device: auto` puts a model, so that the models that are compared with it compute there too.
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
VOCABULARY = 60
POSITIONS = 64


@dataclass(frozen=True)
class Family:
    """A family of models, tiny, with weights large enough that a wrong mask or position shows.

    Attributes:
        title: as its authors write it.
        config: what its config needs beside the sizes of the vocabulary and the spread of the weights.
        kind: its `model_type`.
        task: which Auto class.
    """

    title: str
    config: dict[str, Any]
    kind: str
    task: str = "causal-lm"
    spread: str = "initializer_range"

    @property
    def settings(self):
        return {"model_type": self.kind, "vocab_size": VOCABULARY, "pad_token_id": 1, self.spread: 0.3, **self.config}

    def build(self, attention=None, **options):
        """The model, made without actdump as actdump makes it: seed 0, one order of drawing."""
        torch.manual_seed(0)
        kind = {"causal-lm": AutoModelForCausalLM, "base": AutoModel}[self.task]
        options |= {"attn_implementation": attention} if attention else {}
        return kind.from_config(AutoConfig.for_model(**self.settings), **options).eval().to(DEVICE)


def _causal(title, kind, **config):
    return Family(title, config, kind, spread="init_std" if kind == "opt" else "initializer_range")


def _encoder(title, kind, **config):
    return Family(title, config, kind, task="base")


ENDS = {"bos_token_id": 0, "eos_token_id": 0}
WIDE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
NARROW = {**WIDE, "intermediate_size": 24, "max_position_embeddings": POSITIONS}
GROUPED = {**NARROW, "num_key_value_heads": 1}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
OLD = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": POSITIONS, **ENDS}
# Windows are shorter than most prompts; the rotary tables have several frequencies; the scans run over several chunks.
FAMILIES = {
    "gpt2": _causal("GPT-2", "gpt2", **OLD),
    "gpt_neox": _causal("GPT-NeoX", "gpt_neox", **NARROW, rope_parameters={**ROTARY, "partial_rotary_factor": 0.5}),
    "gptj": _causal("GPT-J", "gptj", **OLD, rotary_dim=4),
    "opt": _causal("OPT", "opt", **NARROW, ffn_dim=24, word_embed_proj_dim=16),
    "bloom": _causal("Bloom", "bloom", hidden_size=16, n_head=2, n_layer=2),
    "falcon": _causal("Falcon", "falcon", **WIDE, **ENDS),
    "falcon-alibi": _causal("Falcon with ALiBi", "falcon", **WIDE, **ENDS, alibi=True),
    "llama": _causal("Llama", "llama", **GROUPED),
    "mistral": _causal("Mistral", "mistral", **GROUPED, sliding_window=6),
    "qwen2": _causal("Qwen2", "qwen2", **GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": _causal("Qwen3", "qwen3", **GROUPED, head_dim=8),
    "qwen3_moe": _causal("Qwen3-MoE", "qwen3_moe", **GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "gemma2": _causal("Gemma 2", "gemma2", **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=6),
    "gemma3": _causal("Gemma 3", "gemma3_text", **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
                      layer_types=["sliding_attention", "full_attention"]),
    "phi3": _causal("Phi-3", "phi3", **GROUPED, **ENDS, sliding_window=6),
    "mixtral": _causal("Mixtral", "mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _causal("OLMoE", "olmoe", **GROUPED, num_experts=4, num_experts_per_tok=2),
    "mamba": _causal("Mamba", "mamba", hidden_size=16, state_size=4, num_hidden_layers=2),
    "mamba2": _causal("Mamba 2", "mamba2", hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1,
                      chunk_size=8),
    "bamba": _causal("Bamba", "bamba", **GROUPED, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1,
                     mamba_chunk_size=8, attn_layer_indices=[1]),
    "jamba": _causal("Jamba", "jamba", **GROUPED, mamba_d_state=4, mamba_dt_rank=2, num_experts=4, attn_layer_period=2,
                     attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False),
    "bert": _encoder("BERT", "bert", **NARROW),
    "roberta": _encoder("RoBERTa", "roberta", **NARROW),
    "albert": _encoder("ALBERT", "albert", **NARROW | {"num_hidden_layers": 3}, embedding_size=8),
    "distilbert": _encoder("DistilBERT", "distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=POSITIONS),
    "modernbert": _encoder("ModernBERT", "modernbert", **NARROW, **ENDS, cls_token_id=0, sep_token_id=0, local_attention=6,
                           layer_types=["full_attention", "sliding_attention"]),
    "deberta": _encoder("DeBERTa", "deberta", **NARROW, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8),
    "deberta-v2": _encoder("DeBERTa v2", "deberta-v2", **NARROW, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4,
                           share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3, conv_act="gelu"),
    "xlnet": _encoder("XLNet", "xlnet", d_model=16, n_layer=2, n_head=2, d_inner=24),
}  # fmt: skip


def build(kind, attention=None):
    return FAMILIES[kind].build(attention)


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
