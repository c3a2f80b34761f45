"""Functions and objects that a configuration made in Python holds in place of a name.

A configuration is saved as text. So a callable in it becomes a name: `module:function` where other
processes can import it, else `python:NAME@HASH`, which this process keeps.
"""

import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

PREFIX = "python:"
_PLAIN = (str, bytes, int, float, complex, bool, type(None), PurePath)
_known: dict[str, Callable[..., Any]] = {}


def as_name(value: Any) -> Any:
    """Return the name of a callable; any other value is returned unchanged.

    Raises:
        ValueError: it depends on a value whose content cannot be told from another's.
    """
    if not callable(value):
        return value
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if isinstance(value, FunctionType) and module and _found(module, name) is value:
        return f"{module}:{name}"
    title = name or type(value).__qualname__
    key = f"{PREFIX}{title.rpartition('.')[2].strip('<>')}@{fingerprint(value)}"
    _known[key] = value
    return key


def named(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's tree with names in place of the functions that score."""
    sections = {key: _scorer(tree[key]) for key in ("reward", "control") if key in tree}
    if isinstance(tree.get("rewards"), list | tuple):
        sections["rewards"] = [_scorer(entry) for entry in tree["rewards"]]
    return {**tree, **sections}


def find(name: str) -> Callable[..., Any] | None:
    """Return the callable that this process keeps under a name, or None."""
    return _known.get(name)


def keep(name: str, function: Callable[..., Any]) -> None:
    """Keep a callable that another process sent with its name."""
    _known[name] = function


def fingerprint(value: Any) -> str:
    """Return a hash of a callable's source and of all that it refers to.

    It is the same in every process, and changes with the source, defaults, closures, attributes and
    globals of the callable, and with those of what it calls, outside of installed modules.

    Raises:
        ValueError: it depends on a value whose content cannot be told from another's.
    """
    digest = hashlib.sha256()
    for part in _parts(value, {}):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _scorer(section: Any) -> Any:
    if not isinstance(section, Mapping) or not callable(section.get("function")):
        return section
    return {**section, "function": as_name(section["function"])}


def _found(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _parts(value: Any, seen: dict[int, int]) -> Iterator[str]:
    """Yield texts that together tell one value from another."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, ModuleType):
        file = None if is_installed(value.__name__) else value.__file__
        yield f"module {value.__name__} {Path(file).read_text() if file else ''}"
    elif id(value) in seen:
        yield f"again {seen[id(value)]}"
    else:
        seen[id(value)] = len(seen)
        yield from _parts_of_object(value, seen)


def _parts_of_object(value: Any, seen: dict[int, int]) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"mapping {len(value)}"
        for key, item in value.items():
            yield from (*_parts(key, seen), *_parts(item, seen))
    elif isinstance(value, Sequence):
        yield f"sequence {type(value).__name__} {len(value)}"
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, Set):
        yield f"set {sorted(' '.join(_parts(item, seen)) for item in value)}"
    elif isinstance(value, functools.partial):
        yield "partial"
        yield from _parts([value.func, value.args, value.keywords], seen)
    elif isinstance(value, MethodType):
        yield "method"
        yield from _parts([value.__func__, value.__self__], seen)
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value, seen)
    elif isinstance(value, staticmethod | classmethod):
        yield from _parts(value.__func__, seen)
    elif isinstance(value, property):
        yield from _parts([value.fget, value.fset], seen)
    elif inspect.isroutine(value):
        yield f"builtin {getattr(value, '__qualname__', value)}"
    elif isinstance(value, type):
        yield from _parts_of_class(value, seen)
    else:
        yield from _parts_of_instance(value, seen)


def _parts_of_function(function: FunctionType, seen: dict[int, int]) -> Iterator[str]:
    yield f"function {function.__qualname__}"
    if is_installed(function.__module__):
        yield function.__module__
        return
    yield _source(function) or ""
    if not _source(function):
        yield from _parts_of_code(function.__code__)
    yield from _parts([function.__defaults__, function.__kwdefaults__], seen)
    for cell in function.__closure__ or ():
        yield from _parts(cell.cell_contents, seen)
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name
            yield from _parts(function.__globals__[name], seen)


def _parts_of_code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts_of_code(constant)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, Set) else constant)


def _parts_of_class(kind: type, seen: dict[int, int]) -> Iterator[str]:
    yield f"class {kind.__qualname__}"
    if is_installed(kind.__module__):
        yield kind.__module__
        return
    yield from _parts(list(kind.__bases__), seen)
    hidden = ("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__")
    for name, item in sorted(vars(kind).items()):
        if name not in hidden and not inspect.isdatadescriptor(item):
            yield name
            yield from _parts(item, seen)


def _parts_of_instance(value: Any, seen: dict[int, int]) -> Iterator[str]:
    yield "instance"
    yield from _parts(type(value), seen)
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # a numpy array or number
        content = hashlib.sha256(value.tobytes()).hexdigest()
        yield f"{value.dtype} {getattr(value, 'shape', ())} {content}"
    elif hasattr(value, "untyped_storage"):  # a torch tensor
        content = hashlib.sha256(bytes(value.detach().cpu().clone().untyped_storage())).hexdigest()
        yield f"{value.dtype} {tuple(value.shape)} {content}"
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value), seen)
    elif not is_installed(type(value).__module__):
        for name in getattr(type(value), "__slots__", ()):
            yield from _parts(getattr(value, name, None), seen)
    elif " at 0x" not in repr(value):
        yield repr(value)
    else:
        raise ValueError(
            f"depends on a {type(value).__module__}.{type(value).__qualname__}, whose content"
            " cannot be told; put the function into a module, and name it as module:function"
        )


def _names(code: CodeType) -> set[str]:
    """Return the names that a function's code refers to, with those of the functions in it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _source(function: FunctionType) -> str | None:
    """Return the source, or None where there is none.

    That of a lambda is its whole line, which holds others, so a lambda counts as code.
    """
    if function.__name__ == "<lambda>":
        return None
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError):
        return None


def is_installed(module: str | None) -> bool:
    """Return whether an imported module is one of Python's, of a package's, or of raywarp's."""
    if module == "__main__":
        return False
    if module and module.partition(".")[0] == "raywarp":
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return True
    return "site-packages" in file or file.startswith((sys.prefix, sys.base_prefix))
