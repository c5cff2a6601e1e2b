"""The models that are served: which directories show them, and what a reload changed.

`scan` looks at the disk and may block: it runs in a thread. `Registry.apply` puts what it found
into effect and never blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd import pack as packs
from tierd.errors import ModelNotFound, PackInvalid
from tierd_layouts.errors import NameRefused
from tierd_layouts.index import INDEX_FILE
from tierd_layouts.names import check_model_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tierd.access import AccessGroup
    from tierd.pack import Identity, Pack


@dataclass(slots=True)
class Scan:
    """What the configured directories hold now."""

    loaded: dict[str, Pack] = field(default_factory=dict)  #: new or changed
    unchanged: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  #: name -> what is wrong with it
    unreadable: dict[Path, str] = field(default_factory=dict)  #: directories that cannot be listed


@dataclass(slots=True)
class Changes:
    """What a scan changed; `text` of a failure says whether an older version stays in service."""

    added: list[Pack] = field(default_factory=list)
    replaced: list[tuple[Pack, Pack]] = field(default_factory=list)  #: (old, new)
    removed: list[Pack] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def scan(models: Sequence[Path], single: Sequence[Path], served: Mapping[str, Identity]) -> Scan:
    """Look at every pack in the directories `models` and at the packs `single`.

    served: what is in service, which is not parsed again as long as its files are the same.
    A sub-directory is a pack when it has a tierd.json; hidden ones are the packer's scratch.
    """
    found = Scan()
    places: dict[str, tuple[Path, Path]] = {}
    for root in models:
        try:
            entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
            shown = [path for path in entries if _may_be_pack(path)]
        except OSError as error:
            found.unreadable[root] = str(error)
            continue
        for path in shown:
            _place(found, places, path.name, path, root)
    for path in single:
        if path.resolve().name in served and not path.exists():
            continue  # it was taken away
        _place(found, places, path.resolve().name, path, path)
    for name, (path, root) in places.items():
        try:
            if name in served and packs.identify(path) == served[name]:
                found.unchanged.add(name)
            else:
                found.loaded[name] = packs.load(name, path, root)
        except PackInvalid as error:
            found.failed[name] = error.text
        except OSError as error:
            found.failed[name] = f"pack {name!r} in {path}: {error}"
    return found


def _may_be_pack(path: Path) -> bool:
    """Whether it has an index. A directory that we may not look into could be a pack if its name
    allows it: loading it says what is wrong. Others, `lost+found` for one, are none."""
    try:
        return path.joinpath(INDEX_FILE).exists()
    except OSError:
        try:
            check_model_name(path.name)
        except NameRefused:
            return False
        return True


def _place(
    found: Scan, places: dict[str, tuple[Path, Path]], name: str, path: Path, root: Path
) -> None:
    if name not in places:
        places[name] = (path, root)
    elif path.resolve() != places[name][0].resolve():  # else: only shown twice
        found.failed.setdefault(
            name, f"two packs have the name {name!r}: {places[name][0]} is served, {path} is not"
        )


class Registry:
    """The packs in service by name, and those that clients still have open by model id."""

    def __init__(self) -> None:
        self.served: dict[str, Pack] = {}
        self.failed: dict[str, str] = {}
        self.by_model: dict[int, Pack] = {}  #: replaced ones too
        self.readers: dict[int, AccessGroup] = {}  #: of every version that was ever in service
        #: called with a pack before its files are closed
        self.closing: Callable[[Pack], None] | None = None
        self._next_model = 1

    def identities(self) -> dict[str, Identity]:
        return {name: pack.identity for name, pack in self.served.items()}

    def find(self, name: str) -> Pack:
        """The pack in service. Raises PackInvalid when its only version is broken, else
        ModelNotFound."""
        if name in self.served:
            return self.served[name]
        if name in self.failed:
            raise PackInvalid(self.failed[name])
        raise ModelNotFound(f"no model {name!r} is served here; {len(self.served)} are")

    def apply(self, found: Scan) -> Changes:
        """Take over what `found` says. A broken pack never takes a good one out of service."""
        changes = Changes()
        self.failed = {}
        for name, text in found.failed.items():
            old = self.served.get(name)
            if old is not None and name not in found.unchanged and name not in found.loaded:
                text += "; the version loaded before stays in service"
            self.failed[name] = text
            changes.failed.append((name, text))
        for root, text in found.unreadable.items():
            kept = sorted(name for name, pack in self.served.items() if pack.root == root)
            stay = f"; what was loaded from it stays in service: {', '.join(kept)}" if kept else ""
            changes.failed.append((str(root), f"cannot list {root}: {text}{stay}"))
        for name, pack in found.loaded.items():
            pack.model = self._next_model
            self._next_model += 1
            self.readers[pack.model] = pack.access
            old = self.served.get(name)
            self.served[name] = self.by_model[pack.model] = pack
            if old is None:
                changes.added.append(pack)
            else:
                old.state = "replaced"
                changes.replaced.append((old, pack))
        seen = found.unchanged | found.loaded.keys() | found.failed.keys()
        for name, pack in list(self.served.items()):
            if name not in seen and pack.root not in found.unreadable:
                del self.served[name]
                pack.state = "removed"
                changes.removed.append(pack)
        return changes

    def forget(self, pack: Pack) -> None:
        """Nobody can ask for this version any more: its files are closed after its last read."""
        self.by_model.pop(pack.model, None)
        self.close_idle(pack)

    def close_idle(self, pack: Pack) -> None:
        """Close a forgotten pack that no read needs."""
        if not pack.reads and pack.model not in self.by_model and not pack.closed:
            if self.closing is not None:
                self.closing(pack)
            pack.close()
