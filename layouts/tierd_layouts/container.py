"""A pack's files, written and read. The parts are in the modules that this one names."""

from tierd_layouts.layer_builder import Chunk, EncodedLayer, LayerBuilder
from tierd_layouts.layer_reader import (
    check_layer_bytes,
    layer_array,
    packed_matrix,
    read_layer,
    tensor_bits,
    validate_layer,
    verify_layer,
)
from tierd_layouts.pack_reader import open_pack, open_shard, pack_folder
from tierd_layouts.shard_writer import shard_file_name, write_index, write_shard

__all__ = [
    "Chunk",
    "EncodedLayer",
    "LayerBuilder",
    "check_layer_bytes",
    "layer_array",
    "open_pack",
    "open_shard",
    "pack_folder",
    "packed_matrix",
    "read_layer",
    "shard_file_name",
    "tensor_bits",
    "validate_layer",
    "verify_layer",
    "write_index",
    "write_shard",
]
