"""What the packer and its companions refuse, by name.

    ToolError
    ├── CheckpointError (ValueError)         the source folder is not a readable HF checkpoint
    │   └── CheckpointMissing (FileNotFoundError)
    ├── PackError (RuntimeError)             packing or unpacking cannot go on
    │   ├── BadSetting (ValueError)          a parameter outside its range: usage, exit code 2
    │   ├── TargetRefused (FileExistsError)  the target holds something that is not ours to replace
    │   ├── TargetBusy (BlockingIOError)     another packer works on this target
    │   ├── TargetUnwritable (PermissionError)
    │   ├── CalibrationError                 the model cannot be run layer by layer
    │   └── DiskFull (OSError)               with the bytes needed and the bytes free
    ├── TextRefused (ValueError)             no tokenizer, or a text that is unreadable or too short
    ├── EvaluationError (RuntimeError)       a pack cannot be served or run to be evaluated
    ├── VerifyError (ValueError)             a pack does not hold what its index promises
    ├── NotServable (ValueError)             a node that is asked about cannot serve the model
    ├── TraceRefused (ValueError)            a file is no recorded day that can be replayed
    ├── NoDaemon (ConnectionError)           nobody answers at the socket
    └── DaemonRefused (RuntimeError)         the daemon answered with an error

Every text names the path, and the number that was expected beside the one that was found.
"""

from __future__ import annotations


class ToolError(Exception):
    """Base of everything that this package raises on purpose."""


class CheckpointError(ToolError, ValueError):
    """The folder is not a Hugging Face checkpoint that can be read whole."""


class CheckpointMissing(CheckpointError, FileNotFoundError):
    """The folder, or a file without which it is no checkpoint, is not there."""


class PackError(ToolError, RuntimeError):
    """Packing or unpacking cannot go on; what was at the target before is untouched."""


class BadSetting(PackError, ValueError):
    """A parameter is outside its range, or two do not go together."""


class TargetRefused(PackError, FileExistsError):
    """The target exists and is not a pack (or, for unpack, not an empty directory)."""


class TargetBusy(PackError, BlockingIOError):
    """Another process holds the lock of this target."""


class TargetUnwritable(PackError, PermissionError):
    """The target cannot be created or written."""


class DiskFull(PackError, OSError):
    """The file system of the target has no room for the result."""


class CalibrationError(PackError):
    """The model cannot be run layer by layer to see the inputs of its linear layers."""


class TextRefused(ToolError, ValueError):
    """A text to calibrate or evaluate with cannot be read, cannot be tokenised or is too short."""


class EvaluationError(ToolError, RuntimeError):
    """A pack cannot be run to see how well it writes; the text is the client library's."""


class VerifyError(ToolError, ValueError):
    """A pack does not hold what its index promises."""


class NotServable(ToolError, ValueError):
    """A machine as described cannot serve the model; the text has what it needs and has."""


class TraceRefused(ToolError, ValueError):
    """A file is not what `tierctl trace` writes, or holds too little to be replayed."""


class NoDaemon(ToolError, ConnectionError):
    """Nobody answers at the socket."""


class DaemonRefused(ToolError, RuntimeError):
    """The daemon answered with an error; the text is the daemon's."""
