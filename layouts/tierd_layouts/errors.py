"""What can be wrong with bytes that crossed a process boundary.

    LayoutsError
    ├── FormatError (ValueError)         somebody else's bytes are wrong; one subclass per thing
    │   ├── NameRefused                  a name that could leave its folder, or confuse a reader
    │   ├── TileError                    bitmap, offsets and values of one matrix
    │   ├── ShardError                   a safetensors file
    │   ├── IndexInvalid                 tierd.json
    │   ├── ChecksumMismatch             a layer's bytes are not those that the index promises
    │   ├── FrameTooLarge, MalformedFrame
    │   ├── SocketPathEmpty, SocketPathTooLong                    the socket
    │   └── SlotTableInvalid             the slot table
    ├── LayerNotFound, TensorNotFound (KeyError)
    └── NoSocketPath (FileNotFoundError)

Every text names the thing, the limit and the value.
"""

from __future__ import annotations


class LayoutsError(Exception):
    """Base of everything that this package raises on purpose."""


class FormatError(LayoutsError, ValueError):
    """Bytes from outside do not follow FORMAT.md."""


# --------------------------------------------------------------------------------------------------
# Names


class NameRefused(FormatError):
    """A model, file, layer or tensor name is empty, too long, or has `..`, `/`, NUL or the like."""


# --------------------------------------------------------------------------------------------------
# Tiles


class TileError(FormatError):
    """Base of what can be wrong with one bitmap-coded matrix."""


class BadMatrix(TileError):
    """Not a 2-D matrix of raw 16-bit or 32-bit elements, or larger than the layout can address."""


class BitmapWrong(TileError):
    """The bitmap is not uint64[tiles * 64]."""


class OffsetsWrong(TileError):
    """The offsets are not uint32[tiles + 1], do not start at 0, or contradict the popcounts."""


class ValuesWrong(TileError):
    """The values are not uint16 or uint32, or not as long as the last offset says."""


class HeadsWrong(TileError):
    """The heads are not uint32[tiles], or one has too many planes, a window beyond 255, more
    escapes than elements, or is not 0 for an empty tile."""


class EscapesWrong(TileError):
    """An escape is of no element, out of order, inside the window, or beside a code."""


class ScalesWrong(TileError):
    """The scales are not uint16[tile_rows * groups * 64], or one is negative, not finite, too large
    for finite weights, or not zero for a row outside the shape."""


class LevelRefused(TileError):
    """An int8 of -128 or an int4 of -8: the levels are symmetric."""


class BitsOutsideShape(TileError):
    """A bit is set for a row or column that the matrix does not have."""


class GapNotZero(TileError):
    """The bytes between a tile's run and the next 16-byte boundary are not zero."""


class ZeroStored(TileError):
    """A bit is set for an element whose raw bits are zero: the encoding would not be unique."""


# --------------------------------------------------------------------------------------------------
# Shards (safetensors files)


class ShardError(FormatError):
    """Base of what can be wrong with one safetensors file."""


class ShardTruncated(ShardError):
    """The file ends before its header, or its header's tensors, do."""


class ShardTrailingBytes(ShardError):
    """The file goes on after its last tensor."""


class HeaderTooLarge(ShardError):
    """The header's length field is above the limit of the format (100 MB)."""


class HeaderNotJson(ShardError):
    """The header is not UTF-8, not JSON, not an object, or holds a name twice."""


class HeaderEntryInvalid(ShardError):
    """A header entry lacks a field, or a field has the wrong type."""


class UnknownDtype(ShardError):
    """A dtype name that this reader does not know."""


class TensorBytesWrong(ShardError):
    """`data_offsets` do not hold exactly shape times dtype bytes."""


class DataHoles(ShardError):
    """Tensors overlap, or leave bytes that belong to none."""


class ShardMissing(ShardError, FileNotFoundError):
    """The index names a shard that is not in the folder (or is not a plain file)."""


class ShardSizeWrong(ShardError):
    """A shard's size is not the one in the index."""


class ShardDisagrees(ShardError):
    """The shard's header and the index say different things about a stored array."""


class PaddingNotZero(ShardError):
    """Bytes of a layer that belong to no array are not zero."""


# --------------------------------------------------------------------------------------------------
# Index (tierd.json)


class IndexInvalid(FormatError):
    """Base of what can be wrong with an index."""


class IndexMissing(IndexInvalid, FileNotFoundError):
    """The folder has no tierd.json: it is not a pack."""


class IndexTooLarge(IndexInvalid):
    """tierd.json is above 256 MiB."""


class IndexNotJson(IndexInvalid):
    """Not UTF-8, not JSON, not an object, too deep, or a member appears twice."""


class WrongFormatName(IndexInvalid):
    """The member `format` is not `tierd-pack`."""


class UnsupportedVersion(IndexInvalid):
    """The pack was written by a newer (or a withdrawn) version of the format."""


class IndexChecksumWrong(IndexInvalid):
    """The index is not the one that was written: its own xxh3 differs."""


class FieldMissing(IndexInvalid):
    """A member that the version requires is not there."""


class UnknownField(IndexInvalid):
    """A member that the version does not define."""


class FieldInvalid(IndexInvalid):
    """A member has the wrong type or is out of range."""


class UnknownCodec(IndexInvalid):
    """A value codec that this reader does not know."""


class UnknownOrder(IndexInvalid):
    """A storage order that this reader does not know."""


class UnknownTensorDtype(IndexInvalid):
    """A dtype that this reader does not know, or that the codec cannot hold."""


class BadShape(IndexInvalid):
    """A shape with too many dimensions, too many bytes, or not 2-D where the codec needs it."""


class BadTile(IndexInvalid):
    """A tile shape that does not belong to the codec."""


class BadGroup(IndexInvalid):
    """A group that is not a positive multiple of 64 columns, or of a codec without scales."""


class SliceRefused(IndexInvalid):
    """Version 1 has no slices."""


class NnzWrong(IndexInvalid):
    """`nnz` cannot be true for this shape and these arrays."""


class ArraySetWrong(IndexInvalid):
    """A tensor has not exactly the arrays of its codec."""


class ArrayBytesWrong(IndexInvalid):
    """An array's length does not follow from shape, dtype and codec."""


class ArrayMisaligned(IndexInvalid):
    """An array does not start on 256 bytes."""


class ArrayOutOfRange(IndexInvalid):
    """An array ends after its layer."""


class ArrayAcrossExtents(IndexInvalid):
    """An array begins in one extent and ends in another: no shard could hold it as one tensor."""


class ArraysOverlap(IndexInvalid):
    """Two arrays of a layer share bytes."""


class LayerSizeWrong(IndexInvalid):
    """A layer is not as long as its extents together."""


class ExtentMisaligned(IndexInvalid):
    """An extent's offset or length is not a multiple of 4 KiB, or the length is 0."""


class ExtentOutOfRange(IndexInvalid):
    """An extent begins in the header's page, ends after its shard, or names no shard."""


class ExtentsOverlap(IndexInvalid):
    """Two extents share bytes of a shard."""


class HashCountWrong(IndexInvalid):
    """An extent has not exactly one hash for each 4 MiB block."""


class DuplicateName(IndexInvalid):
    """Two layers, tensors, shards or stored arrays have one name."""


class AliasInvalid(IndexInvalid):
    """An alias hides a stored tensor, or points to none."""


# --------------------------------------------------------------------------------------------------
# Layers


class ChecksumMismatch(FormatError):
    """A block of a layer does not have the xxh3 that the index promises."""


class _NotFound(LayoutsError, KeyError):
    def __str__(self) -> str:  # KeyError would show the repr of the text
        return str(self.args[0]) if self.args else ""


class LayerNotFound(_NotFound):
    """The pack has no layer of this name."""


class TensorNotFound(_NotFound):
    """The pack has no tensor of this name."""


# --------------------------------------------------------------------------------------------------
# Socket


class FrameTooLarge(FormatError):
    """A frame is above its limit. The stream cannot be followed any further: close it."""


class MalformedFrame(FormatError):
    """A frame's body is not one msgpack map within the limits. The next frame is not affected."""


class SocketPathEmpty(FormatError):
    """A Unix socket was named, and its name is empty: an unset variable of a script."""


class SocketPathTooLong(FormatError):
    """A Unix socket path has at most 107 bytes."""


class NoSocketPath(LayoutsError, FileNotFoundError):
    """No directory of the socket rule can be written: say `--socket`."""


# --------------------------------------------------------------------------------------------------
# Slot table


class SlotTableInvalid(FormatError):
    """Base of what can be wrong with a slot table."""


class SlotTableTruncated(SlotTableInvalid):
    """Shorter than its header, or than the entries that the header counts."""


class SlotTableMagicWrong(SlotTableInvalid):
    """Does not begin with `TIERDSLT`."""


class SlotTableVersionUnknown(SlotTableInvalid):
    """Written by another version."""


class SlotInvalid(SlotTableInvalid):
    """A slot entry contradicts itself, the header, or another slot."""


class LeaseInvalid(SlotTableInvalid):
    """A lease entry contradicts itself, the header, its slot, or another lease."""
