"""Say what pydantic found wrong in the user's own words: one sentence a mistake, with a suggestion."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from glm4v_batch.yaml_lines import Location

Models = tuple[type[BaseModel], ...]

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def explain(error: ValidationError, root: type[BaseModel]) -> Iterator[tuple[Location, str]]:
    """Each mistake of *error*: the setting it concerns and a sentence about it."""
    for details in error.errors(include_url=False):
        location, parents = _resolve(details["loc"], root)
        if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
            location = (*location, "kind")
        yield location, f"{dotted(location)} {_predicate(details, location, parents, root)}"


def dotted(location: Location) -> str:
    """The setting's name as people write it.

    >>> dotted(("output", "columns", 2))
    'output.columns[2]'
    """
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return _short(name.removeprefix("."))


def suggest(word: str, candidates: Sequence[str]) -> str:
    """ ". Did you mean ...?" for the candidate nearest to *word*, or nothing."""
    # difflib is quadratic in the length of the words, and these are a stranger's.
    nearest = get_close_matches(word[:100], candidates, n=1)
    return f". Did you mean {nearest[0]}?" if nearest else ""


def shown(value: Any) -> str:
    """*value* as it would stand in the job file, cut to a readable length."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return _short(value) if value else '""'
        case dict():
            return "a section of settings"
        case list() | tuple():
            return "a list"
    return _short(str(value))


def _predicate(details: ErrorDetails, location: Location, parents: Models, root: type[BaseModel]) -> str:
    context, value = details.get("ctx", {}), details["input"]
    match details["type"]:
        case "extra_forbidden":
            return _unknown(location, parents, root)
        case "missing":
            return "is missing"
        case "union_tag_not_found":
            return f"is missing; it must be {_choices(_kinds_below(parents))}"
        case "union_tag_invalid":
            return _not_a_choice(_kinds_below(parents), context["tag"])
        case "literal_error":
            choices = _literals(parents, location)
            return _not_a_choice(choices, value)
        case "value_error":
            return str(context["error"])
        case "string_too_short":
            return "must not be empty"
    wanted = _wanted(details["type"], context)
    return (
        f"must be {wanted}, not {shown(value)}{_quoting(details)}"
        if wanted
        else f"is refused: {details['msg']}"
    )


def _quoting(details: ErrorDetails) -> str:
    kind, value = details["type"], details["input"]
    if kind == "string_type" and (_is_plain(value) or isinstance(value, (dict, list))):
        return ". Put it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and _NUMBER.fullmatch(value):
        return ". Take its quotes away"
    if kind in ("tuple_type", "list_type") and isinstance(value, str):
        return f". Write [{_short(value)}]"
    return ""


def _wanted(kind: str, context: dict[str, Any]) -> str:
    match kind:
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "greater_than_equal":
            return f"{context['ge']:g} or more"
        case "less_than":
            return f"less than {context['lt']:g}"
        case "less_than_equal":
            return f"{context['le']:g} or less"
    return {
        "string_type": "text",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "list_type": "a list",
        "model_type": "a section of settings",
        "model_attributes_type": "a section of settings",
    }.get(kind, "")


def _unknown(location: Location, parents: Models, root: type[BaseModel]) -> str:
    key, section = str(location[-1]), location[:-1]
    siblings = list(dict.fromkeys(name for parent in parents for name in parent.model_fields))
    nearest = suggest(key, siblings)
    elsewhere = [name for name in _all_settings(root) if name.rpartition(".")[2] == key]
    if dotted(location) in elsewhere:
        return f"is not a setting of this kind of {section[0]}"
    if nearest or elsewhere:
        return f"is not a setting{nearest or f'. Did you mean {elsewhere[0]}?'}"
    where = f"settings of {dotted(section)}" if section else "sections of a job file"
    return f"is not a setting. The {where} are: {', '.join(siblings)}"


def _not_a_choice(choices: Sequence[str], value: Any) -> str:
    return f"must be {_choices(choices)} in this version, not {shown(value)}{suggest(str(value), choices)}"


def _choices(choices: Sequence[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def _kinds_below(parents: Models) -> list[str]:
    """The kinds among which the union whose members are the fields of *parents* chooses."""
    return [
        tag
        for parent in parents
        for field in parent.model_fields.values()
        for model in _models(field.annotation)
        for tag in _tags(model)
    ]


def _literals(parents: Models, location: Location) -> list[str]:
    annotation = next(
        parent.model_fields[str(location[-1])].annotation
        for parent in parents
        if location[-1] in parent.model_fields
    )
    return [str(choice) for choice in get_args(annotation)]


def _resolve(loc: Sequence[str | int], root: type[BaseModel]) -> tuple[Location, Models]:
    """*loc* without the kinds that pydantic puts into it, and the models that its last name belongs to."""
    location: Location = ()
    parents: Models = (root,)
    models: Models = (root,)
    for part in loc:
        chosen = tuple(model for model in models if len(models) > 1 and part in _tags(model))
        if chosen:
            models = chosen
            continue
        location, parents = (*location, part), models
        fields = [model.model_fields[str(part)] for model in models if part in model.model_fields]
        models = tuple(inner for field in fields for inner in _models(field.annotation))
    return location, parents


def _models(annotation: Any) -> Models:
    members: tuple[Any, ...] = get_args(annotation) or (annotation,)
    return tuple(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _all_settings(root: type[BaseModel]) -> Iterator[str]:
    for name, field in root.model_fields.items():
        for model in _models(field.annotation):
            yield from (f"{name}.{inner}" for inner in model.model_fields)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _short(text: str) -> str:
    printable = text if text.isprintable() else repr(text)
    return printable if len(printable) <= 60 else f"{printable[:57]}..."
