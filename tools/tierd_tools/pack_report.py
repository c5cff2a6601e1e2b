"""What a pack run did, as plain data and as a few lines for a person."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tierd_tools.pack_staging import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd_layouts.index import PackIndex
    from tierd_tools.pack_journal import FinishedLayer

_NAMED = 3  #: tensors that a line names; --json has all


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a pack run did, and what it took over from a run that was stopped."""

    pack_dir: str
    source_bytes: int
    pack_bytes: int  #: of all layers: what one pass over the model reads
    layers: int
    tensors: int
    codecs: dict[str, int]  #: how many tensors each codec stores
    compressed_source_bytes: int  #: of the tensors that are not dense
    compressed_bytes: int  #: all their arrays
    masked_tensors: int  #: stored with a bitmap
    zero_share: float  #: of the elements of the masked tensors
    pruned_tensors: int
    left_tensors: list[str]  #: to be pruned, but sparse enough before
    not_finite_tensors: list[str]  #: to be quantised, but not finite: stored without loss
    imported: str  #: what was decoded from another format
    aliases: int
    shards: int
    layers_reused: int  #: finished by an earlier run that was stopped
    replaced: bool  #: a pack of that name was there
    seconds: float

    @classmethod
    def of(
        cls,
        index: PackIndex,
        finished: Sequence[FinishedLayer],
        *,
        pack_dir: str,
        imported: str,
        layers_reused: int,
        replaced: bool,
        seconds: float,
    ) -> PackReport:
        """From what was written."""
        tensors = [tensor for layer in index.layers for tensor in layer.tensors]
        compressed = [tensor for tensor in tensors if tensor.codec != "dense"]
        masked = [tensor for tensor in tensors if "bitmap" in tensor.arrays]
        elements = sum(prod(tensor.shape) for tensor in masked)
        nbytes = {tensor.name: tensor.dense_bytes for tensor in tensors}
        return cls(
            pack_dir=pack_dir,
            source_bytes=sum(nbytes.values()) + sum(nbytes[x] for x in index.aliases.values()),
            pack_bytes=index.pack_bytes,
            layers=len(index.layers),
            tensors=len(tensors),
            codecs=dict(sorted(Counter(tensor.codec for tensor in tensors).items())),
            compressed_source_bytes=sum(tensor.dense_bytes for tensor in compressed),
            compressed_bytes=sum(x.nbytes for tensor in compressed for x in tensor.arrays.values()),
            masked_tensors=len(masked),
            zero_share=1.0 - sum(t.nnz for t in masked) / elements if elements else 0.0,
            pruned_tensors=sum(len(layer.pruned) for layer in finished),
            left_tensors=[name for layer in finished for name in layer.left],
            not_finite_tensors=[name for layer in finished for name in layer.not_finite],
            imported=imported,
            aliases=len(index.aliases),
            shards=len(index.shards),
            layers_reused=layers_reused,
            replaced=replaced,
            seconds=seconds,
        )

    def summary(self) -> str:
        """A few lines for a person."""
        ratio = self.source_bytes / self.pack_bytes if self.pack_bytes else 0.0
        rate = self.source_bytes / max(self.seconds, 1e-9) / 1e6
        codecs = ", ".join(f"{count} {codec}" for codec, count in self.codecs.items())
        before, after = self.compressed_source_bytes, self.compressed_bytes
        lines = [
            f"{self.pack_dir}: {self.layers} layers, {self.tensors} tensors in {self.shards} shards"
            f"{' (replaced)' if self.replaced else ''}",
            f"{size_text(self.source_bytes)} -> {size_text(self.pack_bytes)} ({ratio:.2f}x) in "
            f"{self.seconds:.1f} s, {rate:,.0f} MB/s",
            f"tensors: {codecs}; {self.aliases} aliases",
        ]
        if after:
            lines.append(
                f"compressed ones: {size_text(before)} -> {size_text(after)} "
                f"({before / after:.2f}x); {self.masked_tensors} with bitmap, "
                f"{100 * self.zero_share:.1f} % zeros; {self.pruned_tensors} pruned"
            )
        if self.imported:
            lines.append(f"imported: {self.imported}")
        if self.left_tensors:
            lines.append(f"left as they are, pruned already: {_names(self.left_tensors)}")
        if self.not_finite_tensors:
            lines.append(
                f"not finite, stored without loss instead: {_names(self.not_finite_tensors)}"
            )
        if self.layers_reused:
            lines.append(f"{self.layers_reused} layers were finished by an earlier run")
        return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    count = f"{len(names)} tensors: " if len(names) > 1 else ""
    return f"{count}{', '.join(names[:_NAMED])}{more}"
