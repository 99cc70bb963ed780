"""Tokenizers, and prompts on their way through them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NoReturn, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actdump.errors import MissingError, SpecError, did_you_mean
from actdump.model.hub import ask_once, first_line, hub_options, neighbours, quiet
from actdump.model.source import Source
from actdump.prompts import Prompt
from actdump.spec import TokenizerSpec, path_of

T = TypeVar("T")

CHUNK = 1024  # prompts handed to the tokenizer at a time
MOST = 8  # prompts that are told to be wrong
VOCABULARY = 2**31  # ids are below this where the config does not say; as they are stored


def load_tokenizer(spec: TokenizerSpec, source: Source) -> Any | None:
    """The tokenizer, or `None` where the model has none.

    Raises:
        MissingError: the tokenizer that the spec names is not there.
    """
    name = spec.name or source.spec.source
    if name is None:
        return None
    folder = path_of(name)
    if folder.is_dir() and source.spec.gguf_file is None and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        if spec.name is not None:
            raise MissingError(f"tokenizer.name: there is no tokenizer in `{folder}`")
        return None
    options = hub_options(source.spec) if spec.name is None else {"trust_remote_code": source.spec.trust_remote_code}
    try:
        with quiet():
            if not folder.is_dir():
                ask_once(name, source.spec.revision if spec.name is None else None)
            return AutoTokenizer.from_pretrained(str(folder if folder.is_dir() else name), **options)
    except Exception as error:  # the library of tokenizers raises bare ones
        near = "" if folder.is_dir() else did_you_mean(name, neighbours(name))
        raise MissingError(f"tokenizer: none can be loaded from `{name}`: {first_line(error)}{near}") from error


def tokenise(
    prompts: Iterable[Prompt], tokenizer: Any | None, spec: TokenizerSpec, source: Source
) -> Iterator[tuple[list[Prompt], list[list[int]]]]:
    """Prompts in order, some at a time, with the token ids of each; the next ones are read and tokenised in a thread meanwhile.

    Raises:
        SpecError: a prompt is empty or too long, there is no tokenizer for its text, or an id is not in the vocabulary.
    """
    return _ahead(_chunks(prompts, tokenizer, spec, source))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in a thread while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="actdump-tokeniser") as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def _chunks(
    prompts: Iterable[Prompt], tokenizer: Any | None, spec: TokenizerSpec, source: Source
) -> Iterator[tuple[list[Prompt], list[list[int]]]]:
    limit = spec.max_length or _limit(tokenizer, source)
    vocabulary = getattr(source.config.get_text_config(), "vocab_size", None) or VOCABULARY
    waiting = iter(prompts)
    while chunk := list(islice(waiting, CHUNK)):
        texts = [prompt for prompt in chunk if isinstance(prompt.content, str)]
        encoded = iter(_encoded(texts, tokenizer, spec, limit))
        found = [next(encoded) if isinstance(prompt.content, str) else _ids(prompt, tokenizer, spec, limit) for prompt in chunk]
        if not _fit(found, limit, vocabulary):
            _refuse(
                list(filter(None, (_fault(*each, limit, vocabulary, spec) for each in zip(chunk, found, strict=True)))), chunk
            )
        yield chunk, found


def _refuse(faults: Sequence[str], chunk: Sequence[Prompt]) -> NoReturn:
    """Raises:
    SpecError: with the first of these faults.
    """
    further = len(faults) - MOST
    more = [f"{chunk[-1].where}: here the search for mistakes ended, with {further:,} more like these"] if further > 0 else []
    raise SpecError("\n".join([*faults[:MOST], *more]))


def _fit(chunk: Sequence[Sequence[int]], limit: int | None, vocabulary: int) -> bool:
    """Whether all prompts of a chunk have tokens, not too many, and of the vocabulary."""
    lengths = list(map(len, chunk))
    if min(lengths) == 0 or (limit is not None and max(lengths) > limit):
        return False
    return min(map(min, chunk)) >= 0 and max(map(max, chunk)) < vocabulary


def _limit(tokenizer: Any | None, source: Source) -> int | None:
    own = getattr(tokenizer, "model_max_length", None)
    limits = [limit for limit in (own, source.positions) if limit is not None and limit < 10**9]
    return min(limits, default=None)


def _encoded(prompts: Sequence[Prompt], tokenizer: Any | None, spec: TokenizerSpec, limit: int | None) -> list[list[int]]:
    if not prompts:
        return []
    if tokenizer is None:
        raise SpecError(
            f"{prompts[0].where}: the model has no tokenizer, so text cannot become tokens; give `input_ids`, or `tokenizer: {{name: …}}`"
        )
    options: dict[str, Any] = {"add_special_tokens": spec.add_special_tokens}
    if spec.truncation and limit:
        options |= {"truncation": True, "max_length": limit}
    texts = [prompt.content for prompt in prompts]
    with quiet():
        ids: list[list[int]] = tokenizer(texts[:1], **options)["input_ids"]  # this also sets up the backend
        if _is_plain(tokenizer):
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts[1:], add_special_tokens=spec.add_special_tokens)
            return ids + [encoding.ids for encoding in encodings]
        return ids + tokenizer(texts[1:], **options)["input_ids"] if texts[1:] else ids


def _is_plain(tokenizer: Any) -> bool:
    """Whether the ids that a tokenizer gives are those of its backend, whose own batch call takes two thirds of the time.

    They are where the class has the library's way from text to ids, which sets truncation and the like in the backend, and then
    takes the ids as they come (`TokenizersBackend._encode_plus`).
    """
    ways = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
    own, plain = type(tokenizer), PreTrainedTokenizerFast
    return isinstance(tokenizer, plain) and all(getattr(own, way) is getattr(plain, way, None) for way in ways)


def _ids(prompt: Prompt, tokenizer: Any | None, spec: TokenizerSpec, limit: int | None) -> list[int]:
    """The ids of a prompt that is no text: its own, or those of the chat template."""
    content: Any = prompt.content
    if isinstance(content[0], int):
        return _cut(content, tokenizer, limit) if spec.truncation else list(content)
    if tokenizer is None:
        raise SpecError(f"{prompt.where}: the model has no tokenizer, so `messages` cannot become tokens; give `input_ids`")
    if spec.chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise SpecError(
            f"{prompt.where}: the tokenizer has no chat template for `messages`; give `tokenizer: {{chat_template: …}}`"
        )
    try:
        with quiet():
            ids: list[int] = tokenizer.apply_chat_template(
                content, chat_template=spec.chat_template, add_generation_prompt=spec.add_generation_prompt, return_dict=False
            )
    except Exception as error:  # a template can raise anything
        raise SpecError(f"{prompt.where}: the chat template fails: {first_line(error)}") from error
    return _cut(ids, tokenizer, limit) if spec.truncation else ids


def _cut(ids: Sequence[int], tokenizer: Any | None, limit: int | None) -> list[int]:
    """As many ids as are allowed, cut at the side where the tokenizer cuts text."""
    if limit is not None and getattr(tokenizer, "truncation_side", "right") == "left":
        return list(ids[max(0, len(ids) - limit) :])
    return list(ids[:limit])


def _fault(prompt: Prompt, ids: Sequence[int], limit: int | None, vocabulary: int, spec: TokenizerSpec) -> str | None:
    """Why the model cannot run on a prompt, in words."""
    if not ids:
        return f"{prompt.where}: an empty prompt: it has no tokens"
    if limit is not None and len(ids) > limit:
        whose = "tokenizer.max_length" if spec.max_length else "the model"
        remedy = (
            "which leaves no room for the special tokens of the tokenizer; allow more"
            if spec.truncation
            else "shorten it, or cut what is too long with `tokenizer: {truncation: true}`"
        )
        return f"{prompt.where}: prompt `{prompt.id}` has {len(ids)} tokens, and {whose} allows {limit}; {remedy}"
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        return f"{prompt.where}: prompt `{prompt.id}` has the token id {wrong}; the vocabulary is 0 to {vocabulary - 1}"
    return None
