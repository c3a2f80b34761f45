"""A user's reward function: how it is found, and what it is called with.

It is called by the names of its parameters, never by their positions:

- `prompts` and `completions`: N texts each, or N lists of messages where the function asks for
  messages. `texts` beside `prompts` is another name of `completions`.
- `completion_ids`: N lists of token ids.
- every other column of the prompts' dataset: a list of N values.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from raywarp.config import callables
from raywarp.config.schema import ConfigError

Score = Callable[..., Any]
OURS = ("prompts", "completions", "completion_ids")
_entered: list[str] = []  # the folder that this module has put into sys.path
_imported: set[str] = set()  # modules that came with a reward's module


@dataclass(frozen=True)
class Call:
    """What a function is called with, by its own parameters.

    Attributes:
        positional: the parameters that have no name for a caller.
        named: the other parameters that it names.
        takes_any: it has a parameter like **columns, which gets what is not named.
        renamed: its own name of the completions, where that is `texts`.
    """

    positional: tuple[str, ...]
    named: frozenset[str]
    takes_any: bool
    renamed: str | None = None

    def __call__(
        self,
        function: Score,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None,
        columns: Mapping[str, Sequence[Any]],
    ) -> Any:
        """Return what the function returns for a batch."""
        values: dict[str, Any] = {
            name: list(own) for name, own in columns.items() if name not in OURS
        }
        values |= {"prompts": list(prompts), "completions": list(completions)}
        if "completion_ids" in self.positional or "completion_ids" in self.named:
            values["completion_ids"] = [list(ids) for ids in completion_ids or []]
        if self.renamed:
            values[self.renamed] = values.pop("completions")
        first = [values.pop(name) for name in self.positional if name in values]
        kept = values if self.takes_any else {n: v for n, v in values.items() if n in self.named}
        return function(*first, **kept)


def call_of(path: str, function: Score, columns: Iterable[str] = ()) -> Call:
    """Return how a function is called.

    Args:
        path: its name in messages.
        columns: the other columns of the prompts' dataset.

    Raises:
        ConfigError: it is none that can be called with a batch, it needs a parameter that is none
            of ours and no column, or it does not take a column.
    """
    columns = [name for name in columns if name not in OURS]
    _check_kind(path, function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # a builtin without a signature
        raise ConfigError(
            f"the reward function '{path}' does not tell its parameters; wrap it in"
            " def score(prompts, completions, **columns)"
        ) from None
    kinds = inspect.Parameter
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    own = [p for p in parameters if p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)]
    names = [p.name for p in own]
    renamed = _renamed(path, names, columns)
    known = {*OURS, *columns} | ({renamed} if renamed else set())
    for parameter in own:
        if parameter.name not in known and parameter.default is kinds.empty:
            raise ConfigError(_unknown(path, parameter.name, names, columns))
    if not takes_any and not {"completions", "completion_ids", renamed} & {*names}:
        raise ConfigError(f"{_cannot(path, columns)}: it takes no completions")
    if not takes_any and (left := [name for name in columns if name not in names]):
        text = f"it does not take the column{'s' * (len(left) > 1)} {', '.join(left)}"
        raise ConfigError(f"{_cannot(path, columns)}: {text}; add **columns to take any")
    positional = _positional(path, own, known)
    return Call(positional, frozenset(names) - {*positional}, takes_any, renamed)


def is_async(function: Score) -> bool:
    """Return whether a function, method or object returns a coroutine."""
    plain = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(
        getattr(plain, "__call__", None)  # noqa: B004
    )


def wants_messages(function: Score) -> bool:
    """Return whether the type of `completions` is a list of lists, thus of messages (as in TRL)."""
    try:
        parameter = inspect.signature(function).parameters.get("completions")
    except (ValueError, TypeError):
        return False
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return False
    kind = parameter.annotation
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", "") + str(kind)
    return "dict" in text.casefold()


def load_function(path: str, folder: str | None = None) -> Score:
    """Return the callable that `module:function` names.

    Args:
        folder: where the modules of the user are, by default the current directory. They are looked
            for before all others, and read again where they have changed or are another folder's.

    Raises:
        ConfigError: the path has another form, the module cannot be imported, or the name is
            missing or not callable.
    """
    if (kept := callables.find(path)) is not None:
        return kept
    if path.startswith(callables.PREFIX):
        raise ConfigError(
            f"the reward function '{path}' was given to this run as a Python object; give it again"
            " from Python, or name it as module:function"
        )
    module_name, separator, name = path.partition(":")
    if not (separator and module_name and name):
        raise ConfigError(
            f"the reward function '{path}' is not of the form module:function, for example"
            " my_rewards:score"
        )
    found: Any = load_module(module_name, name, folder)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"the module {module_name} has no '{name}', which the reward function '{path}'"
                " asks for"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"the reward function '{path}' is a {type(found).__name__}, not a function"
        )
    return found  # type: ignore[no-any-return]


def load_module(module_name: str, name: str = "", folder: str | None = None) -> ModuleType:
    """Return a module of the user's folder, or an installed one.

    Args:
        name: a function of it. If its code is not that of the file, the module is read again.
        folder: see load_function.

    Raises:
        ConfigError: it cannot be imported.
    """
    folder = os.path.abspath(folder or os.getcwd())
    _enter(folder)
    if module_name == "__main__":
        return sys.modules["__main__"]
    before = set(sys.modules)
    try:
        module = importlib.import_module(module_name)
        if name and not _is_as_in_file(module, name):
            del sys.modules[module_name]
            module = importlib.import_module(module_name)
        return module
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the reward module '{module_name}' cannot be imported ({what}); looked in"
            f" {folder} and sys.path"
        ) from None
    finally:
        _imported.update(set(sys.modules) - before)


def load_exceptions(names: Iterable[str]) -> tuple[type[Exception], ...]:
    """Return the exceptions that these names stand for, such as TimeoutError and httpx.HTTPError.

    Raises:
        ConfigError: a name is not that of an exception.
    """
    found = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        kind = getattr(load_module(module or "builtins"), leaf, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise ConfigError(
                f"reward.retry_on: '{name}' is no exception; give for example TimeoutError or"
                " httpx.HTTPError"
            )
        found.append(kind)
    return tuple(found)


def _check_kind(path: str, function: Score) -> None:
    """Raise ConfigError for what is callable, and is not called with a batch."""
    problem = None
    if isinstance(function, type):
        problem = "is a class, and calling it makes an object; name an object of it, or its method"
    elif inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        problem = "is a generator; it must return a list of floats"
    if problem:
        raise ConfigError(f"the reward function '{path}' {problem}")


def _renamed(path: str, names: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return `texts` where this is the function's name of the completions."""
    if "texts" not in names or "completions" in names or "prompts" not in names:
        return None
    if "texts" in columns:
        raise ConfigError(
            f"the reward function '{path}' has a parameter 'texts', which may stand for the"
            " completions or for the dataset's column of this name; name the completions"
            " 'completions'"
        )
    return "texts"


def _positional(
    path: str, own: Sequence[inspect.Parameter], known: Iterable[str]
) -> tuple[str, ...]:
    found = [p.name for p in own if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    filled = [name for name in found if name in known]
    if filled != found[: len(filled)]:
        raise ConfigError(
            f"the reward function '{path}' takes {', '.join(found)} by position only, and not all"
            " of them are known; remove the '/' from its parameters"
        )
    return tuple(filled)


def _unknown(path: str, name: str, names: Sequence[str], columns: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, [*OURS, *columns], n=1, cutoff=0.7)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    there = f"the columns {', '.join(columns)}" if columns else "the dataset has no other column"
    return (
        f"{_cannot(path, columns)}: its parameter '{name}' is none of {', '.join(OURS)}, and no"
        f" column ({there}){hint}; parameters are filled by their names, and a call has lists of a"
        " whole batch"
    )


def _cannot(path: str, columns: Sequence[str]) -> str:
    called = ", ".join(["prompts", "completions", *(f"{name}=" for name in columns)])
    return f"the reward function '{path}' cannot be called as score({called})"


def _enter(folder: str) -> None:
    """Make the user's folder the first of sys.path, in place of the one before.

    Modules that a fresh process in this folder would find elsewhere, or not at all, are forgotten.
    """
    before = list(_entered)
    for path in {*_entered, folder}:
        while path in sys.path:
            sys.path.remove(path)
    sys.path.insert(0, folder)
    _entered[:] = [folder]
    importlib.invalidate_caches()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or callables.is_installed(name) or Path(file).is_relative_to(folder):
            continue
        of_before = name in _imported and any(Path(file).is_relative_to(path) for path in before)
        if of_before or _is_in(folder, name):
            del sys.modules[name]


def _is_in(folder: str, name: str) -> bool:
    """Return whether a module of this name is found in the folder."""
    top, whole = Path(folder, name.partition(".")[0]), Path(folder, *name.split("."))
    files = (top.with_suffix(".py"), top / "__init__.py", whole.with_suffix(".py"))
    return any(file.is_file() for file in files)


def _is_as_in_file(module: ModuleType, name: str) -> bool:
    """Return whether the code of a module's function is that of the file on disk."""
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part, None)
    code = getattr(function, "__code__", None)
    code = code or getattr(vars(type(function)).get("__call__"), "__code__", None)
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        return True
    if code is not None and code.co_filename != file:
        return True  # of another module, or wrapped by one
    found = list(_codes(compile(Path(file).read_text(), file, "exec")))
    own = [one for one in found if code is not None and one.co_qualname == code.co_qualname]
    return code is None or code in own


def _codes(code: CodeType) -> Iterable[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
