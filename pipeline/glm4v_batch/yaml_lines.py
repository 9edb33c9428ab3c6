"""Read a YAML file of settings into plain values, remembering the line that each setting stands on.

Scalars follow the core schema of YAML 1.2, so that `no`, `12:30` and `2024-01-01` are text, and
1e-3 is a number. Files are read as hostile: no tags, no aliases, bounded size and depth.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from glm4v_batch.errors import JobError

Location = tuple[str | int, ...]
"""Where a setting stands: ("prompt", "user")."""

Origin = int | str
"""What set it: a line of the file, or the text of a `--set` option."""

MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 20
_MAX_NODES = 10_000
_TAG = "tag:yaml.org,2002:"
_QUOTING_HINT = 'Text that holds ": " or " #", or begins with one of { [ * & ! % @, needs quotes around it.'


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing to correct, and where."""

    origin: Origin
    text: str

    def __str__(self) -> str:
        place = f"line {self.origin}" if isinstance(self.origin, int) else self.origin
        return f"{place}: {self.text}"


@dataclass(frozen=True, slots=True)
class Document:
    """The settings of a file; `set_value` changes them in place while they are being read."""

    values: dict[str, Any]
    origins: dict[Location, Origin]
    mistakes: list[Mistake]

    def origin_of(self, location: Location) -> Origin:
        """What set *location*, or else the innermost section around it that was set."""
        return next(
            self.origins[location[:end]]
            for end in range(len(location), -1, -1)
            if location[:end] in self.origins
        )


def read_yaml(path: Path) -> Document:
    """The settings of the file *path*; a `JobError` where it cannot be read as YAML."""
    text = _read_text(path)
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        raise _syntax_error(path, text, error) from None
    if node is None:
        raise JobError(f"{path} holds no settings.", hint="Write a commented example with: glm4v-batch init")
    if not isinstance(node, yaml.MappingNode):
        raise JobError(f"{path} line {_line(node)}: a job file is made of settings such as name: caption")
    document = Document({}, {(): 1}, [])
    document.values.update(_mapping(node, (), document))
    return document


def set_value(document: Document, option: str, maps: Collection[Location] = ()) -> None:
    """Apply *option*, the `a.b=c` of a `--set a.b=c`, as if the file said so.

    *maps* are the settings whose value may be a {map}, which is text for all others.
    """
    origin = f"--set {_shortened(option)}"
    name, equals, text = option.partition("=")
    location: Location = tuple(part.strip() for part in name.split("."))
    if not equals or not all(location):
        document.mistakes.append(Mistake(origin, "write it as --set section.setting=value"))
        return
    *sections, last = location
    values: Any = document.values
    for depth, section in enumerate(sections, 1):
        if values.get(section) is None:
            values[section] = {}
            document.origins[location[:depth]] = origin
        values = values[section]
        if not isinstance(values, dict):
            document.mistakes.append(Mistake(origin, f"{'.'.join(map(str, location[:depth]))} is no section"))
            return
    values[last] = option_value(text, may_be_map=location in maps)
    for inner in [known for known in document.origins if known[: len(location)] == location]:
        del document.origins[inner]
    document.origins[location] = origin


def option_value(text: str, *, may_be_map: bool = False) -> Any:
    """The value of an option: a number, true, false, null, a [list] or "quoted text" is read as YAML.

    So is a {map} where that is asked for, and nothing at all is null. Everything else is text as it stands,
    so that a prompt with a colon, # or {column} needs no quotes, nor one that begins with # or a dash.
    """
    text = text.strip()
    if not text:
        return None
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError:
        return text
    if node is None or not _is_all_of(text, node) or _is_text(node, may_be_map=may_be_map):
        return text
    document = Document({}, {}, [])
    value = _value(node, (), document)
    return text if document.mistakes else value


def _is_all_of(text: str, node: yaml.Node) -> bool:
    """Whether *text* is *node* and no more: a comment, say, would be lost."""
    return (node.start_mark.index, node.end_mark.index) == (0, len(text))


def _is_text(node: yaml.Node, *, may_be_map: bool) -> bool:
    match node:
        case yaml.ScalarNode():
            return node.tag == f"{_TAG}str" and node.style is None
        case yaml.SequenceNode():
            # No setting takes a list of maps: [{title}] is a prompt.
            return not (node.flow_style and all(isinstance(item, yaml.ScalarNode) for item in node.value))
    return not may_be_map


class _Loader(yaml.SafeLoader):
    """SafeLoader up to the node tree, with the scalars of YAML 1.2 and without aliases."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # type: ignore[misc]  # one in PyYAML, not in its stubs
        None: [
            (f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$")),
            (f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
            (f"{_TAG}int", re.compile(r"^[-+]?[0-9]{1,18}$")),
            (f"{_TAG}float", re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")),
        ]
    }
    _depth = 0
    _num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it bare
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(None, None, "a job file uses no & or * aliases", event.start_mark)
        if self._depth == _MAX_DEPTH:
            problem = f"settings are nested more than {_MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            problem = f"a job file has no more than {_MAX_NODES:,} names and values"
            raise yaml.MarkedYAMLError(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _value(node: yaml.Node, location: Location, document: Document) -> Any:
    document.origins.setdefault(location, _line(node))
    match node:
        case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
            return _mapping(node, location, document)
        case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
            return [_value(item, (*location, index), document) for index, item in enumerate(node.value)]
        case yaml.ScalarNode() if node.tag in _SCALARS:
            try:
                return _SCALARS[node.tag](node.value)
            except (ValueError, KeyError):  # an explicit tag, as in !!int x
                pass
    problem = f"a job file uses no tags such as {_shortened(node.tag.replace(_TAG, '!!'))}"
    document.mistakes.append(Mistake(_line(node), problem))
    return None


_SCALARS: Mapping[str, Any] = {
    f"{_TAG}null": lambda _: None,
    f"{_TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    f"{_TAG}int": int,
    f"{_TAG}float": float,
    f"{_TAG}str": str,
}


def _mapping(node: yaml.MappingNode, location: Location, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            document.mistakes.append(Mistake(_line(key_node), "the name of a setting must be plain text"))
            continue
        key, line = str(key_node.value), _line(key_node)
        inner = (*location, key)
        if key in values:
            name = _shortened(".".join(map(str, inner)))
            text = f"{name} is set twice, first in line {document.origins[inner]}"
            document.mistakes.append(Mistake(line, text))
            continue
        document.origins[inner] = line
        values[key] = _value(value_node, inner, document)
    return values


def _read_text(path: Path) -> str:
    try:
        if not path.exists():
            raise JobError(f"{path} does not exist.", hint="Write a job file with: glm4v-batch init")
        if not path.is_file():
            raise JobError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, not a job file.")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise JobError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes, which no job file is.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JobError(f"{path} line {line} is not UTF-8 text.", hint="Save the file as UTF-8.") from None


def _syntax_error(path: Path, text: str, error: yaml.YAMLError) -> JobError:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return JobError(f"{path} line {line} holds a control character, which YAML does not allow.")
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    line = min(mark.line + 1, text.count("\n") + 1) if mark else 1
    begun = error.context_mark.line + 1 if error.context_mark else line
    since = f" (in what begins in line {begun})" if begun != line else ""
    indent = re.match(r"\s*", (text.split("\n") or [""])[line - 1])
    tabs = indent is not None and "\t" in indent.group()
    hint = "YAML is indented with spaces; this line begins with a tab." if tabs else _QUOTING_HINT
    return JobError(f"{path} line {line} is not readable as YAML: {error.problem}{since}.", hint=hint)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shortened(text: str) -> str:
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
