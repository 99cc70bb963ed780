"""Models and tokenizers: the only importer of transformers."""

from actdump.model.loading import drawn, fingerprint, load, other_weights, pick_device, skeleton
from actdump.model.processor import avoid_faulty_amx
from actdump.model.source import Source, find, positions
from actdump.model.tokenizer import load_tokenizer, tokenise

__all__ = [
    "Source",
    "avoid_faulty_amx",
    "drawn",
    "find",
    "fingerprint",
    "load",
    "load_tokenizer",
    "other_weights",
    "pick_device",
    "positions",
    "skeleton",
    "tokenise",
]
