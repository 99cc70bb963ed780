"""The files that a dump is made from: what their hashes are, and when hashing ends."""

import hashlib
import os

import pytest

from actdump.inputs import Inputs, of_model, sha256
from actdump.spec import model_spec


def test_hashes_are_those_of_the_whole_files(tmp_path):
    contents = {"empty": b"", "small": b"abc", "large": os.urandom(3 * 2**20 + 5)}
    files = {}
    for name, content in contents.items():
        files[name] = tmp_path / name
        files[name].write_bytes(content)
    with Inputs(files).hashing() as hashes:
        assert hashes() == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def test_hashing_is_given_up_where_the_block_fails(tmp_path):
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 2**29)
    with pytest.raises(KeyError), Inputs({"model": path}).hashing() as hashes:
        raise KeyError
    assert hashes()["model"] != sha256(path)


def test_every_file_that_a_tokenizer_or_a_model_may_be_read_from_counts(tmp_path):
    counted = ["bpe.codes", "config.json", "model.safetensors", "prophetnet.tokenizer", "source.spm", "vocab.txt"]
    for name in [*counted, "optimizer.bin", "training_args.bin", "README.md", "picture.png"]:
        (tmp_path / name).touch()
    assert sorted(path.name for path in of_model(model_spec(str(tmp_path), {})).files.values()) == counted
