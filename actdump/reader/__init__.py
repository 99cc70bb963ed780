"""A dump being read. Needs no model: `actdump.open("out/eiffel")["model.layers[-1].output[0]"][0]` is a tensor."""

from actdump.reader.dump import Dump, open_dump
from actdump.reader.prompts import PromptRecord, Prompts
from actdump.reader.shard import OpenShard
from actdump.reader.values import Rows, Values

__all__ = ["Dump", "OpenShard", "PromptRecord", "Prompts", "Rows", "Values", "open_dump"]
