"""The command `tierd`: one daemon, from its configuration to its exit status.

0: ended by a signal, or nothing was to be done. 1: it could not start or had to stop; one line on
stderr says why. 2: usage or configuration.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from typing import TYPE_CHECKING

from tierd.config import load
from tierd.errors import ConfigError, TierdError
from tierd_layouts.errors import LayoutsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.config import Config

EXIT_FAILURE = 1
EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run tierd; returns its exit status."""
    try:
        config = load(sys.argv[1:] if argv is None else argv, os.environ)
        config.check_paths()
    except ConfigError as error:
        return _complain(str(error), EXIT_USAGE)
    if config.check_config:
        for row in config.effective():
            print(f"{row['key']} = {row['value']!r}  # {row['source']}")
        print("# The budget is compared with free memory, and the socket made, when tierd starts.")
        return 0
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        return _serve(config)
    except (TierdError, LayoutsError, OSError) as error:
        return _complain(str(error), EXIT_FAILURE)


def _serve(config: Config) -> int:
    import uvloop

    from tierd.daemon import Daemon

    _raise_descriptor_limit()

    async def serve() -> int:
        return await Daemon(config).run()

    status: int = uvloop.run(serve())
    return status


def _raise_descriptor_limit() -> None:
    """Each client costs two descriptors, each shard and control file one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _complain(text: str, status: int) -> int:
    print(f"tierd: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
