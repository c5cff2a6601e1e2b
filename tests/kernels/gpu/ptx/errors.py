"""What the machine refuses.

PtxError            anything below; each of them is also a builtin
UnknownPtx          text that the machine has no meaning for: never guessed
WrongAddress        an access outside of every array, outside of shared memory, or not aligned
Race                two warps at one byte without a barrier between them
Undefined           what PTX leaves undefined: a register nobody wrote, a division by zero
"""


class PtxError(Exception):
    """See the module. `instruction` is added by whoever executes it."""


class UnknownPtx(PtxError, NotImplementedError):
    """Text that the machine has no meaning for."""


class WrongAddress(PtxError, MemoryError):
    """Bytes that nobody gave to the program."""


class Race(PtxError, RuntimeError):
    """What a byte holds depends on which warp is faster."""


class Undefined(PtxError, ArithmeticError):
    """PTX does not say what happens."""
