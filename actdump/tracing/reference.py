"""Modules of a model by their place, and the model itself."""

import operator
import os
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import nn

from actdump.address import PORTS, Address, Child, Nth, Step, Tree, children, expand, module_at, path_text
from actdump.errors import AddressError, TraceError, UsageError
from actdump.tracing.tracer import Traced, Tracer, work
from actdump.tracing.values import Proxy, out_of_scope


class _NoChildError(AddressError, AttributeError):
    """A wrong name; an AttributeError too, so that `hasattr` answers."""


class _ClosedError(TraceError, AttributeError):
    """A port outside a block, where a module has none."""


class Reference:
    """A module of a model, by its place: `model.transformer.h[-1]`.

    Names and indices are checked at once. Inside a `trace` block, `.output`, `.outputs`, `.input` and `.inputs` name what the
    module returns and is given. Lists of modules have a length, can be iterated over, and give a list when sliced. What is
    not a child is the module's own attribute, as it is. Printed, a reference is its module.

    Raises:
        AddressError: there is no such module; the message suggests the nearest ones.
        TraceError: a port was used outside a block, or something was assigned.
    """

    __slots__ = ("_actdump",)
    _actdump: tuple[Traced, tuple[Step, ...], nn.Module]

    def __init__(self, traced: Traced, steps: tuple[Step, ...], module: nn.Module) -> None:
        object.__setattr__(self, "_actdump", (traced, steps, module))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_actdump":
            raise AttributeError(name)
        traced, steps, module = self._actdump
        child = name in children(module)
        if name in PORTS and traced.open is not None:
            return Proxy(traced.open, steps, (Child(name),))
        if name in PORTS and not child:
            raise _ClosedError(
                f"`{path_text((*steps, Child(name)))}` has a value only inside a block: `with model.trace(...):`"
            )
        if not child and hasattr(module, name):
            return getattr(module, name)
        return self._child(Child(name))

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return list(self)[key]
        return self._child(Child(key) if isinstance(key, str) else Nth(operator.index(key)))

    def _child(self, step: Step) -> "Reference":
        traced, steps, _ = self._actdump
        try:
            (found,) = expand(Address((*steps, step), "output"), cast(Tree, traced.module))
        except AddressError as error:
            raise _NoChildError(f"{error}{_values_of(step)}") from None
        return Reference(traced, found.module, module_at(found, cast(Tree, traced.module)))

    def __len__(self) -> int:
        return len(cast(nn.ModuleList, self._actdump[2]))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator["Reference"]:
        return (self[place] for place in range(len(self)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced, steps, module = self._actdump
        if traced.open is not None:
            raise out_of_scope(path_text(steps) or "model")
        return module(*args, **kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        raise out_of_scope(path_text((*self._actdump[1], Child(name))))

    def __setitem__(self, key: object, value: object) -> None:
        raise out_of_scope(f"{path_text(self._actdump[1])}[{key!r}]")

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._actdump[2]), *PORTS})

    def __repr__(self) -> str:
        return repr(self._actdump[2])


def _values_of(step: Step) -> str:
    """What to write where a name is that of no child, but near to what values have."""
    if not isinstance(step, Child):
        return ""
    if step.name in ("save", "value"):
        return "; its values have that: `.output.save()`"
    near = get_close_matches(step.name, PORTS, n=1, cutoff=0.8)
    return f"; its values are `.{near[0]}`" if near else ""


class Model(Reference):
    """A torch module whose activations can be read with `with model.trace(...)`. Made by `wrap`, or by `actdump.load`."""

    __slots__ = ()

    def __init__(self, module: nn.Module, tokenizer: Any = None) -> None:
        super().__init__(Traced(module, tokenizer), (), module)

    def __reduce__(self) -> tuple[Any, ...]:
        return Model, (self._actdump[2], self.tokenizer)

    @property
    def tokenizer(self) -> Any:
        """What turns strings into token ids; `None` where there is nothing."""
        return self._actdump[0].tokenizer

    def trace(self, *args: Any, **kwargs: Any) -> "Tracer":
        """A block at whose end the model runs once on this input, and what was saved inside is there.

        One prompt is a string, a list of token ids, or a tensor or array of them with one axis: a saved value is exactly what the
        module held, `(1, tokens, …)`. Several prompts are a list of such: a saved value is a list that holds, for each prompt
        in the order given, what tracing it alone would have given; they are padded and run in batches. Anything else is the
        model's own arguments and runs as it is: keyword arguments, a mapping of them such as a tokenizer's result, a tensor
        with more axes, or positional arguments of a module that takes no token ids.

        The gradient mode in force at the end of the block decides whether saved values have a `grad_fn`. The first trace of
        an address runs the model to its end, to count the calls of its module, and so does one of a shorter or a longer prompt
        than all before it; others (of the model's own arguments: those with the same shapes and numbers) stop after the last
        saved module. The first trace of an address with several prompts probes it with tiny forwards.

        Raises:
            UsageError: an empty prompt, no input, or a string without a tokenizer.
        """
        return Tracer(self._actdump[0], work(self._actdump[0], args, kwargs))


def wrap(module: nn.Module, tokenizer: Any = None) -> Model:
    """Make any torch module traceable. The module is not changed: not its device, and not its mode.

    Args:
        module: in eval mode, unless its dropout is meant to show. One that `torch.compile` made is traced as what it was made of, because
            what is compiled has no modules.
        tokenizer: for prompts that are strings; called as `tokenizer(text)["input_ids"]`.

    Raises:
        UsageError: it is no torch module, or one of torch.jit.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"wrap takes a torch module, not {type(module).__name__}; `actdump.load` takes the name of a model")
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            f"`{module.original_name}` was made by torch.jit, whose modules run outside Python, where hooks see nothing of them; wrap "
            "the module that it was made of"
        )
    return Model(getattr(module, "_orig_mod", module), tokenizer)


def load(name: str | os.PathLike[str] | None = None, **options: Any) -> Model:
    """A model of the hub or a local folder, with its tokenizer, ready for `trace`.

    Args:
        name: a hub id or a folder; none where `config=` makes a model of random weights.
        options: the keys of the spec's `model`: `revision`, `task`, `dtype`, `device`, `attn_implementation`, `gguf_file`, …; dtype and
            device also as torch has them.

    Raises:
        MissingError: there is no such model.
        UsageError: an option is wrong, or the model cannot be loaded that way.
    """
    from actdump import model
    from actdump.spec import TokenizerSpec, model_spec

    if not isinstance(name, str | os.PathLike | None):
        raise UsageError(f"load takes the name of a model, not {type(name).__name__}; a config is given as `config={{…}}`")
    plain = {key: _as_written(option) for key, option in options.items()}
    source = model.find(model_spec(None if name is None else os.fspath(name), plain))
    return Model(model.load(source), model.load_tokenizer(TokenizerSpec(), source))


def _as_written(option: Any) -> Any:
    """An option as a spec has it: `torch.float32` as `float32`."""
    return str(option).removeprefix("torch.") if isinstance(option, torch.dtype | torch.device) else option
