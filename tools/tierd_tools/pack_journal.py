"""What an interrupted pack run had finished, so that the next one goes on from there.

The journal lies in the staging directory and is rewritten after each durable shard. It names its
job (settings and the source's fingerprint): a run with another job starts afresh.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd_layouts.errors import FormatError
from tierd_layouts.index import FORMAT_VERSION, PackIndex
from tierd_tools.pack_staging import write_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tierd_layouts.index import Layer, Shard

JOURNAL_FILE = ".tierd-journal.json"


@dataclass(slots=True)
class Journal:
    """The finished shards, which are the first ones of the plan, and the digests of their sources.

    digests: stored tensor -> xxh3_128 of its source bytes.
    """

    path: Path
    job: str
    shards: list[Shard] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path, job: str) -> Journal | None:
        """The journal of `job` in `directory`; None when there is none, or another job's."""
        path = directory / JOURNAL_FILE
        try:
            content = json.loads(path.read_bytes())
            if content["job"] != job:
                return None
            index = PackIndex.parse(content["index"].encode(), where=str(path))
            digests = {str(name): str(digest) for name, digest in content["digests"].items()}
        except FileNotFoundError:
            return None
        except (FormatError, ValueError, KeyError, TypeError, AttributeError):
            return None  # not a journal that this version wrote whole: nothing to build on
        return cls(path, job, list(index.shards), list(index.layers), digests)

    def add(self, shard: Shard, layers: list[Layer], digests: Mapping[str, str]) -> None:
        """Records a shard that is durable."""
        self.shards.append(shard)
        self.layers.extend(layers)
        self.digests.update(digests)
        self.save()

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` shards."""
        gone = [layer for layer in self.layers if layer.extents[0].shard >= count]
        for layer in gone:
            for tensor in layer.tensors:
                self.digests.pop(tensor.name, None)
        self.layers = [layer for layer in self.layers if layer.extents[0].shard < count]
        self.shards = self.shards[:count]
        self.save()

    def index(self) -> PackIndex:
        """The index of a pack of the finished shards alone."""
        return PackIndex(
            version=FORMAT_VERSION,
            tool="tierctl pack, unfinished",
            source_digest="",
            shards=tuple(self.shards),
            layers=tuple(self.layers),
        )

    def save(self) -> None:
        """Makes the journal durable."""
        text = self.index().to_json().decode()
        content = {"job": self.job, "digests": self.digests, "index": text}
        write_file(self.path, json.dumps(content).encode())
