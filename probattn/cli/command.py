"""A command from a dataclass of options: its fields are the flags, the YAML keys and the lines of the help.

Types, ranges and defaults come from the fields, help texts from the section ``Attributes`` of the docstring. A nested
dataclass adds its fields under a heading of their own, the first line of its docstring. A field with ``choices`` in its
metadata, dataclasses by name, is chosen by a flag, and the fields of the chosen one are the further flags.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import docstring_parser
from cyclopts import App, ArgumentCollection, CoercionError, Group, Parameter, Token, UnknownOptionError, convert
from cyclopts.config import Dict
from cyclopts.help import DefaultFormatter, PlainFormatter
from rich.console import Console

from probattn.cli.output import wrapped
from probattn.cli.settings import read_settings
from probattn.errors import InputError
from probattn.models.options import Range, field_types

__all__ = ["Flag", "command", "flags", "in_words", "variants"]

_FRAMED = 64  # columns from which the panels of the help have frames

Options = TypeVar("Options")
Run = Callable[[Options], int | None]
Panels = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Flag:
    """One field of a command's options, as the command line shows it.

    Attributes:
        path: names of the fields that lead to it, the outermost first.
        kind: type of its values.
        range: range of its values; None for any.
        default: default value; ``MISSING`` where one must be given.
        help: help text.
        heading: heading that it stands under; empty for the command's own.
        metadata: what its field carries: ``aliases`` (further names, with dashes), ``positional``.
    """

    path: tuple[str, ...]
    kind: Any
    range: Range | None
    default: Any
    help: str
    heading: str
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the flag, with its dashes."""
        return "--" + self.path[-1].replace("_", "-")

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the flag, with their dashes."""
        return (self.name, *self.metadata.get("aliases", ()))

    @property
    def limits(self) -> str:
        """Range in words; empty where there is none."""
        return "" if self.range in (None, Range()) else str(self.range)

    @property
    def key(self) -> str:
        """A Python identifier that no other flag of the command has."""
        return "__".join(self.path)


def flags(options: type, chosen: Mapping[str, str] | None = None) -> list[Flag]:
    """The flags of a dataclass, its own before those of nested dataclasses.

    A nested field whose name an outer one has already is no flag: the outer field speaks for it. Nor are those that the
    outer field lists as ``hidden`` in its metadata.

    Args:
        options: dataclass of the options.
        chosen: name of the choice, by field with choices; the default choice is taken for the rest.

    Raises:
        TypeError: two flags with one name, or a field that the docstring does not describe.
    """
    listed = list(_flags(options, chosen or {}, (), "", set()))
    names = [flag.name for flag in listed]
    for name in names:
        if names.count(name) > 1:
            raise TypeError(f"{options.__name__} has two flags {name}.")
    return listed


def _flags(
    options: Any, chosen: Mapping[str, str], path: tuple[str, ...], heading: str, taken: set[str]
) -> Iterator[Flag]:
    kind = options if isinstance(options, type) else type(options)
    texts, nested = _texts(kind), []
    for field in fields(kind):
        if field.name in taken:
            continue
        if field.name not in texts:
            raise TypeError(f"the docstring of {kind.__name__} does not describe {field.name}.")
        text = texts[field.name][:1].upper() + texts[field.name][1:]
        default = _default(field) if options is kind else getattr(options, field.name)
        hint, limits = field_types(kind)[field.name], None
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            limits = next((note for note in notes if isinstance(note, Range)), None)
        if choices := field.metadata.get("choices"):
            name = chosen.get(field.name) or next(name for name in choices if choices[name] is type(default))
            nested.append((field, default if type(default) is choices[name] else choices[name]()))
            hint, default = Literal[tuple(choices)], name
        elif is_dataclass(default):
            nested.append((field, default))
            continue
        taken = {*taken, field.name}
        yield Flag((*path, field.name), hint, limits, default, text, heading, field.metadata)
    for field, default in nested:
        inner = heading or (type(default).__doc__ or "").splitlines()[0].rstrip(".")
        yield from _flags(default, chosen, (*path, field.name), inner, taken | set(field.metadata.get("hidden", ())))


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _texts(kind: type) -> dict[str, str]:
    """Descriptions of the fields in the section ``Attributes``, those of base classes included."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for entry in docstring_parser.parse(inspect.cleandoc(base.__doc__ or "")).params:
            texts[entry.arg_name] = " ".join((entry.description or "").split()).replace("``", "")
    return texts


def command(name: str, options: type[Options], run: Run[Options], panels: Panels | None = None) -> App:
    """A command whose flags are the fields of a dataclass.

    Every command also takes ``--config``, a YAML file whose keys are the same names, and ``--debug``.

    Args:
        name: name of the command.
        options: dataclass of the options.
        run: function that takes them and returns an exit status; None stands for 0.
        panels: fields by the heading of the panel of the help that shows them, in order; the last panel also has the
            command's own fields that no panel names. None: one panel.

    Returns:
        The command, to be registered with the application.
    """
    parts = variants(name, options, run, panels)
    if len(parts) == 1:
        return next(iter(parts.values()))
    field = _choice(options)
    default = next(flag.default for flag in flags(options) if flag.path == (field,))
    # Its flags are those of the chosen part, --help included; Ctrl-C goes on to `main`, which says how to resume.
    app = App(name=name, help_flags=(), version_flags=(), suppress_keyboard_interrupt=False)

    @app.default
    def choose(*tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> int | None:
        chosen = _peek(tokens, f"--{field}")
        if chosen is None and (settings := _peek(tokens, "--config")) is not None:
            chosen = str(read_settings(Path(settings)).get(field))
        chosen = chosen if chosen in parts else default
        try:
            status: int | None = parts[chosen](
                tokens, exit_on_error=False, print_error=False, result_action="return_value"
            )
            return status
        except UnknownOptionError as error:
            given = "--" + (error.token.keyword or "").strip("-[]").replace("_", "-")
            owners = [part for part in parts if given in {flag.name for flag in flags(options, {field: part})}]
            if not owners:
                raise
            raise InputError(
                f"{given} belongs to --{field} {' and '.join(owners)}, and the {field} is {chosen}; leave it out, or "
                f"change --{field}."
            ) from None

    return app


def variants(name: str, options: type[Options], run: Run[Options], panels: Panels | None = None) -> dict[str, App]:
    """The commands of a dataclass by choice, each with its own flags; one, under "", where there is nothing to choose.

    Args:
        name: name of the command.
        options: dataclass of the options.
        run: function that takes them and returns an exit status.
        panels: fields by the heading of the panel of the help; None: one panel.
    """
    field = _choice(options)
    if not field:
        return {"": _app(name, flags(options), options, run, panels)}
    listed = {flag.path: flag for flag in flags(options)}[(field,)]
    return {part: _app(name, flags(options, {field: part}), options, run, panels) for part in get_args(listed.kind)}


def _choice(options: type) -> str:
    return next((field.name for field in fields(options) if "choices" in field.metadata), "")


def _peek(tokens: Sequence[str], name: str) -> str | None:
    """The value of a flag before anything is parsed."""
    found = None
    for index, token in enumerate(tokens):
        if token == name and index + 1 < len(tokens):
            found = tokens[index + 1]
        elif token.startswith(f"{name}="):
            found = token.partition("=")[2]
    return found


def _app(
    name: str, listed: Sequence[Flag], options: type[Options], run: Run[Options], panels: Panels | None = None
) -> App:
    positional = [flag.key for flag in listed if flag.metadata.get("positional")]

    def call(*values: Any, **given: Any) -> int | None:
        return run(_build(options, listed, dict(zip(positional, values, strict=False)) | given))

    call.__signature__ = inspect.Signature(list(_parameters(listed, panels)))  # type: ignore[attr-defined]
    usage = " ".join(["Usage: probattn", name, *map(str.upper, positional), "[OPTIONS]"])
    summary, _, notes = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
    app = App(
        name=name,
        help=summary,
        help_epilogue=notes,
        usage=usage,
        help_formatter=_show_panel,
        version_flags=(),
        config=_apply_settings,
        suppress_keyboard_interrupt=False,
    )
    app.default(call)
    app["--help"].show = False
    return app


def _show_panel(console: Any, options: Any, panel: Any) -> None:
    """A panel in a frame; on a narrow terminal as plain lines, because two columns in a frame would cut words."""
    if console.width >= _FRAMED:
        DefaultFormatter()(console, options, panel)
        return
    wide = Console(file=io.StringIO(), width=10_000)
    PlainFormatter()(wide, options, panel)
    for line in wide.file.getvalue().splitlines():  # type: ignore[attr-defined]  # it is a StringIO
        console.print(wrapped(line.strip(), console.width), markup=False, highlight=False, soft_wrap=True)


def _parameters(listed: Sequence[Flag], panels: Panels | None) -> Iterator[inspect.Parameter]:
    shown_in = {field: heading for heading, names in (panels or {}).items() for field in names}
    last = list(panels)[-1] if panels else "Options"
    nested = dict.fromkeys(flag.heading for flag in listed if flag.heading)
    # The panel of what every command has, files and devices, follows those of method and model.
    order = [*list(panels or {})[:-1], *nested, last] if panels else [last, *nested]
    groups = {heading: Group(heading, sort_key=i) for i, heading in enumerate(order)}
    for flag in listed:
        positional = flag.metadata.get("positional", False)
        shown = in_words(flag.default)
        note = Parameter(
            name=() if positional else flag.names,
            help=flag.help + (f" [{flag.limits}]" if flag.limits else ""),
            group=groups[flag.heading or shown_in.get(flag.path[0], last)],
            negative_iterable=(),
            converter=_converter(flag.kind),
            validator=_within(flag.range),
            show_default=shown or False,
        )
        yield inspect.Parameter(
            flag.key,
            inspect.Parameter.POSITIONAL_ONLY if positional else inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[flag.kind, note],
            default=inspect.Parameter.empty if flag.default is MISSING else flag.default,
        )
    own = {
        "config": (Path | None, None, "YAML file with any of these options as keys; flags overrule it."),
        "debug": (bool, False, "Show a traceback on errors."),
    }
    for name, (kind, default, text) in own.items():
        note = Parameter(name=f"--{name}", help=text, group=groups[last], negative=(), show_default=False)
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, note], default=default)


def in_words(value: Any) -> str:
    """A default as help and reference show it; empty where there is nothing to show.

    Args:
        value: default of a flag.
    """
    if value is None or value is MISSING:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, tuple) else f"{value}"


def _build(options: type[Options], listed: Sequence[Flag], given: Mapping[str, Any]) -> Options:
    """The dataclass from the values that were given; the defaults of its fields are those of the flags."""
    values: dict[str, Any] = {}
    inner: dict[str, dict[tuple[str, ...], Any]] = {}
    for flag in listed:
        key = flag.key
        if "choices" in flag.metadata:
            values[flag.path[0]] = flag.metadata["choices"][given.get(key, flag.default)]()
        elif key in given and len(flag.path) == 1:
            values[flag.path[0]] = given[key]
        elif key in given:
            inner.setdefault(flag.path[0], {})[flag.path[1:]] = given[key]
    for field in fields(options):  # type: ignore[arg-type]
        if field.name in inner:
            nested = values.get(field.name, _default(field))
            values[field.name] = _rebuild(nested, inner[field.name])
    return options(**values)


def _rebuild(instance: Any, given: Mapping[tuple[str, ...], Any]) -> Any:
    values = {path[0]: value for path, value in given.items() if len(path) == 1}
    for name in {path[0] for path in given if len(path) > 1}:
        inner = {path[1:]: value for path, value in given.items() if path[0] == name}
        values[name] = _rebuild(getattr(instance, name), inner)
    return replace(instance, **values)


def _within(limits: Range | None) -> Any:
    def validate(_: Any, value: Any) -> None:
        if limits is not None and value is not None and value not in limits:
            raise ValueError(f"It must be {limits}.")

    return validate


def _converter(kind: Any) -> Any:
    """Reading that is stricter than the library's for integers (1.5 is none) and knows lists separated by commas."""
    if kind in (int, int | None):
        return _integer
    return _list if get_origin(kind) is tuple else None


def _integer(_: Any, tokens: Sequence[Token]) -> int:
    token = tokens[0]
    text = "null" if token.implicit_value is None else token.value
    try:
        if text.lstrip("+-").isdecimal():
            return int(text)
        if float(text).is_integer():  # 1e4
            return int(float(text))
    except ValueError:
        pass
    raise CoercionError(token=_token(token, text), target_type=int)


def _token(token: Token, value: str) -> Token:
    return Token(keyword=token.keyword, value=value, source=token.source, index=token.index)


def _list(kind: Any, tokens: Sequence[Token]) -> Any:
    if any(token.implicit_value is None for token in tokens):
        raise ValueError("null is no list; leave the option out, or write [].")
    parts = [_token(token, part.strip()) for token in tokens for part in token.value.split(",")]
    parts = [part for part in parts if part.value]
    return convert(kind, parts) if parts else ()


def _apply_settings(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill what the flags leave open from the file of ``--config``."""
    given = arguments.get("--config").tokens
    if given:
        path = Path(given[0].value)
        Dict(read_settings(path), source=str(path), use_commands_as_keys=False)(app, commands, arguments)
