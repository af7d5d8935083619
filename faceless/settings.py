"""Typed settings from a YAML recipe and dotted command-line overrides, with errors of one line.

The settings of a command are a dataclass; jsonargparse does the parsing and the type checks. Components are named by
class (``class_path``) with their constructor arguments (``init_args``).

Settings come with corpora and runs, so a stranger may have written them: they name classes of this project only. Other
packages are allowed by whoever gives the command, in the environment variable ``FACELESS_ALLOW`` (names with commas
between them); and what runs a stranger's code, `COMMAND_LINE_ONLY`, is accepted from the command line alone.
"""

from __future__ import annotations

import copy
import difflib
import os
import pkgutil
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from faceless.errors import InputError, suggest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("faceless", "synth", "mining", "distill", "eval")
COMMAND_LINE_ONLY = ("trust_remote_code",)


class Settings(Generic[T]):
    """Parsed and type-checked, but with nothing constructed yet.

    Args:
        parser, namespace: of jsonargparse.
        cls: the dataclass that the settings are of.
    """

    def __init__(self, parser: ArgumentParser, namespace: Namespace, cls: type[T]):
        self._parser, self._namespace, self._cls = parser, namespace, cls

    def build(self) -> T:
        """Construct the dataclass and every component that it names.

        Raises:
            InputError: a constructor refused its arguments.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = self._parser.instantiate_classes(self._namespace)
        except (ValueError, TypeError) as error:
            message = _causes(str(error))
            # What a class of a recipe says of an argument does not say where that class stands.
            by = _refused_by(error)
            given = ((key, value) for key, value in dotted(self.asdict()) if isinstance(value, dict))
            at = [key for key, value in given if by and str(value.get("class_path")).rpartition(".")[2] == by]
            raise InputError(f"{at[0] if len(at) == 1 else by or 'settings'}: {message}") from error
        return self._cls(**{field.name: made[field.name] for field in fields(self._cls)})  # type: ignore[arg-type]

    def asdict(self) -> dict[str, Any]:
        """All settings, defaults included, as plain values."""
        text = self.yaml()
        plain: dict[str, Any] = yaml.safe_load(text) or {}
        return plain

    def changed(self, changes: Mapping[str, Any]) -> Settings[T]:
        """The same settings but for some dotted keys, parsed and checked as if they had been given so.

        Raises:
            InputError: an unknown key or a wrong type.
        """
        plain = self.asdict()
        for key, value in changes.items():
            put(plain, key, value)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                namespace = self._parser.parse_object(plain)
        except (ArgumentError, ValueError, TypeError) as error:
            raise InputError(_one_line(str(error), [], self._parser)) from error
        _refuse_nulls(self._cls, namespace, [])
        if asked := set(_insisting(namespace)) - set(_insisting(self._namespace)):
            raise InputError(f"{min(asked)}: lets code that is not of this project run; only the command line can ask")
        return Settings(self._parser, namespace, self._cls)

    def yaml(self) -> str:
        """All settings as YAML that the command reads again; a list of files in ``config`` is left out."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(self._parser.dump(self._namespace, skip_none=False))


def parse(
    cls: type[T], arguments: Sequence[str] | None = None, *, description: str = "", program: str | None = None
) -> Settings[T]:
    """Read the settings of a command from ``--config FILE`` and dotted overrides such as ``--optimizer.lr 0.1``.

    ``--print_config`` prints all of them and ends the program; so does ``--help``.

    Args:
        cls: a dataclass; its fields are the keys.
        arguments: of the command line; None takes those of this process.

    Raises:
        InputError: an unknown key, a wrong type, a file that is missing or no YAML; one line that names it.
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML recipe; later options override it")
    parser.add_class_arguments(cls, None)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[cls.__module__, *allowed()])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.parse_args([_located(a, before) for a, before in zip(arguments, ["", *arguments])])
    except (ArgumentError, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(_one_line(str(error), arguments, parser)) from error
    _refuse_nulls(cls, namespace, arguments)
    said = [argument.partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    for key in _insisting(namespace):
        if key.replace(".init_args.", ".") not in [name.replace(".init_args.", ".") for name in said]:
            raise InputError(
                f"{key}: lets code that is not of this project run, and a file cannot ask for that; "
                f"if you have read that code and trust it, add --{key} true to the command"
            )
    return Settings(parser, namespace, cls)


def options(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> Namespace:
    """Read the options of a command that takes no recipe.

    Raises:
        InputError: an unknown option or a wrong type; one line that names it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return parser.parse_args(arguments)
    except (ArgumentError, ValueError, TypeError) as error:
        raise InputError(_one_line(str(error), arguments, parser)) from error


def allowed() -> list[str]:
    """Packages whose classes settings may name.

    Raises:
        InputError: ``FACELESS_ALLOW`` holds something that is no name of a package or module.
    """
    others = [name.strip() for name in os.environ.get("FACELESS_ALLOW", "").split(",") if name.strip()]
    for name in others:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"FACELESS_ALLOW: {name!r} is no name of a package; write package,package")
    return [*PACKAGES, *others]


def _insisting(found: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of `COMMAND_LINE_ONLY` that are set."""
    if isinstance(found, (Namespace, dict)):
        for name, value in vars(found).items() if isinstance(found, Namespace) else found.items():
            dotted = f"{key}.{name}" if key else str(name)
            if str(name) in COMMAND_LINE_ONLY and value:
                yield dotted
            yield from _insisting(value, dotted)
    elif isinstance(found, (list, tuple)):
        for place, value in enumerate(found):
            yield from _insisting(value, f"{key}.{place}")


def _refused_by(error: BaseException) -> str | None:
    """The class whose constructor raised ``error``, if it was one's."""
    found, trace = None, error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name in ("__init__", "__post_init__") and "self" in frame.f_locals:
            found = type(frame.f_locals["self"]).__name__
        trace = trace.tb_next
    return found


def _refuse_nulls(cls: type, namespace: Namespace, arguments: Sequence[str]) -> None:
    """Say what jsonargparse lets pass: from a file it takes null for a value of any type.

    Raises:
        InputError: a key is null whose type is not.
    """
    for key, kind in _nulls(namespace, cls):
        name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        said, where = f"{key} is null; leave it out, or give {name}", _recipes(arguments)
        raise InputError(f"{where[-1]}: {said}" if where else said)


def _recipes(arguments: Sequence[str]) -> list[str]:
    """Those that a command line names."""
    where = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    return where + [after for a, after in pairwise(arguments) if a == "--config"]


def _nulls(found: Any, kind: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys that are null and have types that are not, with these types."""
    if found is None:
        if kind not in (None, Any) and type(None) not in get_args(kind):
            yield key, kind
        return
    for name, value, wanted in _inside(found, kind):
        yield from _nulls(value, wanted, f"{key}.{name}" if key else name)


def _inside(found: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a setting of type ``kind`` holds one level down, and the type that each is to have; None where none says."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(found, (list, tuple)):
        element = next((get_args(one)[0] for one in kinds if get_origin(one) in (list, tuple)), None)
        yield from ((str(place), value, element) for place, value in enumerate(found))
    if not isinstance(found, (Namespace, dict)):
        return
    items = vars(found) if isinstance(found, Namespace) else found
    if "class_path" in items:
        yield "init_args", items.get("init_args") or {}, _imported(str(items["class_path"]))
        return
    element = next((get_args(one)[1] for one in kinds if get_origin(one) is dict), None)
    hints: dict[str, Any] = {}
    for one in kinds:
        if isinstance(one, type) and not hints:
            made: Any = one
            with suppress(NameError, TypeError):  # of other people's classes
                hints = get_type_hints(made if is_dataclass(made) else made.__init__)
    yield from ((str(name), value, hints.get(str(name), element)) for name, value in items.items())


def dotted(settings: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested settings, dotted, with what it holds.

    >>> list(dotted({"a": {"b": 1}}))
    [('a', {'b': 1}), ('a.b', 1)]
    """
    for name, value in settings.items() if isinstance(settings, dict) else ():
        key = f"{above}{name}"
        yield key, value
        yield from dotted(value, f"{key}.")


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, and all that is under it, to ``value``.

    >>> settings = {"a": {"b": {"c": 1}, "d": 2}}
    >>> put(settings, "a.b", {"e": 3})
    >>> settings
    {'a': {'b': {'e': 3}, 'd': 2}}
    """
    *above, last = key.split(".")
    for name in above:
        if settings.get(name) is None:  # null is a group that has not been given
            settings[name] = {}
        settings = settings[name]
        if not isinstance(settings, dict):
            raise InputError(f"{key}: {name} holds no keys")
    settings[last] = copy.deepcopy(value)


def recipe(path: str | Path) -> Path:
    """A recipe file: as given, or inside the installed packages (``distill/recipes/x.yaml`` works from anywhere).

    Raises:
        InputError: there is none.
    """
    given = Path(path)
    for candidate in (given, ROOT / given):
        if candidate.is_file():
            return candidate
    places = [*ROOT.glob("*/recipes/*.yaml"), *ROOT.glob("scripts/grids/*.yaml")]
    near = difflib.get_close_matches(str(path), [str(place.relative_to(ROOT)) for place in places], 1)
    ours = "those of this project are in distill/recipes, synth/recipes and scripts/grids"
    raise InputError(f"{path}: no such recipe; {f'did you mean {near[0]}?' if near else ours}")


def _located(argument: str, before: str) -> str:
    if before == "--config":
        return str(recipe(argument))
    if argument.startswith("--config="):
        return f"--config={recipe(argument.removeprefix('--config='))}"
    return argument


def _causes(message: str) -> str:
    """Of what jsonargparse says of a value that may be of several types, what was wrong with the likeliest."""
    if "Subtypes: [" not in message:
        return message
    lines, expected, given = [], [], ""
    for line in (part.strip().removeprefix("- ") for part in message.splitlines()):
        if line.startswith("Given value: "):
            given = line
        elif kind := re.fullmatch(r"Expected an? <class '([\w.]+)'>", line):
            expected.append("null" if kind[1] == "NoneType" else kind[1])
        elif not line.startswith(("Does not validate against", "Subtypes:", "Errors:", "Given value type:")):
            lines.append(line)
    if all(line.startswith(("Parser key", "Problem with given class_path")) for line in lines):
        lines.append(f"Expected {' or '.join(dict.fromkeys(expected))}. {given.replace('Given value', 'Got value')}")
    return "\n".join(lines)


def _one_line(message: str, arguments: list[str], parser: ArgumentParser) -> str:
    """Turn jsonargparse's nested message into one line: where, what, and the nearest valid key."""
    message = _causes(message)
    where = _recipes(arguments)
    path, classes, rest = [], [], ""
    denied = re.search(r"Importing '([^']*)' is not allowed", message)
    for line in (part.strip() for part in message.splitlines()):
        if key := re.match(r'Parser key "([^"]*)":', line):
            path.append(key[1])
            rest = line[key.end() :].strip()
        elif not denied and (given := re.match(r"Problem with given class_path '([^']*)':", line)):
            classes.append(given[1])
            path.append("init_args") if path and not _is_dataclass(given[1]) else None
        elif line:
            rest = f"{rest} {line}".strip()
    if denied:
        package = denied[1].partition(".")[0]
        rest = (
            f"{denied[1]} is not of this project, and settings may come from strangers; "
            f"if you trust its code, set FACELESS_ALLOW={package} in the environment"
        )
    unknown = re.search(r"[Oo]ption '([^']*)' is not accepted|does not accept option '([^']*)'", rest)
    flag = re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", rest)
    if unknown or flag:
        name = next(g for g in (unknown.groups() if unknown else flag.groups()) if g)  # type: ignore[union-attr]
        group = re.search(r"Group '([^']*)'", rest)
        prefix = ".".join([*path, *([group[1]] if group else [])])
        full = _whole(f"{prefix}.{name}" if prefix else name, arguments, where)
        inside = group[1] if group else ".".join(path)
        rest = f"unknown key {full!r}; {suggest(name, _keys(parser, classes, inside, name))}"
    elif path:
        about, rest = _explained(".".join(path), rest, parser)
        rest = f"{_whole(about, arguments, where)}: {rest}"
    rest = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", rest)
    rest = re.sub(r"^Problems parsing config: ", "not readable as YAML: ", rest)
    rest = re.sub(r"^Unexpected config:.*", "holds no settings; write lines of `key: value`", rest)
    return f"{where[-1]}: {rest}" if where and not flag else rest


def _explained(key: str, rest: str, parser: ArgumentParser) -> tuple[str, str]:
    """What jsonargparse says of a key, in words that say what to write instead; and which key it is about."""
    if missing := re.fullmatch(r"module '([\w.]+)' has no attribute '(\w+)'", rest):
        module = sys.modules.get(missing[1])
        inside = [name for name, value in vars(module).items() if isinstance(value, type)] if module else []
        inside += [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", []))]
        known = suggest(missing[2], [name for name in inside if not name.startswith("_")])
        return f"{key.removesuffix('.init_args')}.class_path", f"{missing[1]} has no {missing[2]}; {known}"
    if re.match(r"Not a valid subclass of|Expected an instantiatable class, but", rest):
        hints = [getattr(a, "_typehint", None) for a in parser._actions if a.dest == key]
        kinds: list[Any] = [kind for hint in hints for kind in get_args(hint) or (hint,)]
        bases: list[Any] = [kind for kind in kinds if isinstance(kind, type) and kind.__module__ != "builtins"]
        classes = sorted(f"{sub.__module__}.{sub.__name__}" for base in bases for sub in base.__subclasses__())
        return key, f"no class; write class_path with {' or '.join(classes) or 'MODULE.CLASS'}, and init_args"
    if named := re.fullmatch(r"Expected a dot import path string: (.*)", rest):
        return key, f"{named[1]!r} is no class; write its module and its name, as in distill.sources.CorpusSource"
    if group := re.match(r"Unable to load config ['\"](.*?)['\"]", rest):
        return key, f"{group[1]!r} is no group of keys; its keys are {', '.join(_keys(parser, [], key, ''))}"
    return key, rest


def _whole(key: str, arguments: Sequence[str], files: Sequence[str]) -> str:
    """A dotted key with the names of losses and parts, which jsonargparse leaves out, where only one can be meant."""
    given = {a.partition("=")[0].removeprefix("--") for a in arguments if a.startswith("--")}
    for file in files:
        with suppress(OSError, ValueError, yaml.YAMLError):
            given |= {place for place, _ in dotted(yaml.safe_load(Path(file).read_text("utf-8")))}
    parts, places = key.split("."), set()
    for place in given:
        rest = iter(place.split("."))
        if place.split(".")[0] == parts[0] and all(part in rest for part in parts):
            last = place.split(".")
            places.add(".".join(last[: len(last) - last[::-1].index(parts[-1])]))
    return places.pop() if len(places) == 1 else key


def _is_dataclass(path: str) -> bool:
    return is_dataclass(_imported(path))


def _imported(path: str) -> Any:
    # Of a module that jsonargparse has imported; nothing is imported here, and None where there is no such class.
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _keys(parser: ArgumentParser, classes: list[str], group: str, name: str) -> list[str]:
    if classes:
        # Asked of a parser, which also knows the arguments that a constructor passes on.
        added = ArgumentParser(exit_on_error=False).add_class_arguments(
            _imported(classes[-1]), None, fail_untyped=False
        )
        return [key for key in added if "." not in key]
    known = [a.dest for a in parser._actions if a.dest.split(".")[-1] not in ("help", "print_config", "print_shtab")]
    # A dataclass that may also be null is one action, whose keys only its type knows.
    hints = [get_args(getattr(a, "_typehint", None)) for a in parser._actions if a.dest == group]
    if optional := [hint for choices in hints for hint in choices if is_dataclass(hint)]:
        return [field.name for field in fields(optional[0])]
    if group:
        return [key.removeprefix(f"{group}.") for key in known if key.startswith(f"{group}.")]
    return known if "." in name else [key for key in known if "." not in key]
