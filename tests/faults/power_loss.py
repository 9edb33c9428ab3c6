"""What a disk may hold after the power fails: what was synced, and any of the rest.

A file's bytes are safe once it is synced, a name once its folder is, and neither implies the other:
names may arrive before the data, data without its name, one name without its neighbour. Nothing here
is specific to a file system; a real one promises a little more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.harness import Operation

Tree = Mapping[Path, bytes | None]
"""Files with their bytes, folders with None, by their paths."""


@dataclass(slots=True)
class _File:
    """*data* as a reader sees it now, *durable* as it would be read after a power loss."""

    data: bytes = b""
    durable: bytes = b""


@dataclass(slots=True)
class _Folder:
    names: "dict[str, _File | _Folder]" = field(default_factory=dict)
    durable: "dict[str, _File | _Folder]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Change:
    """A name in *folder* that is not as it durably is."""

    folder: _Folder
    name: str


class Disk:
    """Follows what is done to a folder, and knows which states a power loss could leave of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _Folder()

    def apply(self, operation: Operation) -> None:
        """Do *operation*."""
        match operation.kind:
            case "mkdir":
                self._name(operation.path, _Folder())
            case "create":
                self._name(operation.path, _File())
            case "truncate":
                self._file(operation.path).data = self._file(operation.path).data[: operation.offset]
            case "write":
                file, first = self._file(operation.path), operation.offset
                end = first + len(operation.data)
                file.data = file.data[:first].ljust(first, b"\0") + operation.data + file.data[end:]
            case "fsync":
                self._sync(self._find(operation.path))
            case "link":
                self._name(operation.other, self._find(operation.path))
            case "rename" | "renameat2":
                self._name(operation.other, self._find(operation.path))
                del self._folder(operation.path.parent).names[operation.path.name]
            case "unlink":
                del self._folder(operation.path.parent).names[operation.path.name]
            case other:
                raise AssertionError(f"an operation that this does not know: {other}")

    def _sync(self, node: "_File | _Folder") -> None:
        if isinstance(node, _File):
            node.durable = node.data
        else:
            node.durable = dict(node.names)

    def _find(self, path: Path) -> "_File | _Folder":
        node: _File | _Folder = self._top
        for name in path.relative_to(self._root).parts:
            assert isinstance(node, _Folder)
            node = node.names[name]
        return node

    def _file(self, path: Path) -> _File:
        found = self._find(path)
        assert isinstance(found, _File)
        return found

    def _folder(self, path: Path) -> _Folder:
        found = self._find(path)
        assert isinstance(found, _Folder)
        return found

    def _name(self, path: Path, node: "_File | _Folder") -> None:
        self._folder(path.parent).names[path.name] = node

    def now(self) -> Tree:
        """What a reader sees as long as the power stays on."""
        return dict(self._tree(self._top, self._changes(), 1.0))

    def after_power_loss(self) -> Iterator[Tree]:
        """The states that may be found.

        Of the names that are not synced none arrived, all, each alone, or all but each; of the data
        that is not synced nothing, the first half, or all.
        """
        changes = self._changes()
        kept_sets = [
            [],
            changes,
            *([c] for c in changes),
            *([c for c in changes if c is not d] for d in changes),
        ]
        for kept in kept_sets:
            for fraction in (0.0, 0.5, 1.0):
                yield dict(self._tree(self._top, kept, fraction))

    def _changes(self) -> list[_Change]:
        found, seen = [], set()
        waiting = [self._top]
        while waiting:
            folder = waiting.pop()
            if id(folder) in seen:
                continue
            seen.add(id(folder))
            for name in sorted({*folder.names, *folder.durable}):
                if folder.names.get(name) is not folder.durable.get(name):
                    found.append(_Change(folder, name))
                waiting += [
                    n for n in (folder.names.get(name), folder.durable.get(name)) if isinstance(n, _Folder)
                ]
        return found

    def _tree(
        self, folder: _Folder, kept: Sequence[_Change], fraction: float, below: Path = Path()
    ) -> Iterator[tuple[Path, bytes | None]]:
        """What *folder* holds if *kept* and that *fraction* of data are what of the rest reached the disk."""
        entries = dict(folder.durable)
        for change in kept:
            if change.folder is folder:
                entries.pop(change.name, None)
                if change.name in folder.names:
                    entries[change.name] = folder.names[change.name]
        for name, node in entries.items():
            if isinstance(node, _File):
                yield below / name, _surviving(node, fraction)
            else:
                yield below / name, None
                yield from self._tree(node, kept, fraction, below / name)


def _surviving(file: _File, fraction: float) -> bytes:
    if file.data == file.durable or fraction == 0:
        return file.durable
    return file.data[: round(len(file.data) * fraction)]


def write_tree(tree: Tree, folder: Path) -> None:
    """Make *folder* hold *tree*."""
    for path, data in tree.items():
        if data is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
