"""Other builds of the C++ modules in place of the installed ones: those with sanitizers.

TIERD_CPU_MODULE and TIERD_ENCODE_MODULE name the files. Run before tierd_kernels is imported;
`tools/sanitize` sets them. A module that is not the one asked for stops the run: a green result of
the wrong build would be worth nothing.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Final

VARIABLES: Final = {
    "TIERD_CPU_MODULE": "tierd_kernels._cpu",
    "TIERD_ENCODE_MODULE": "tierd_kernels._encode",
}


def load() -> None:
    """Load the builds that the environment names. Raises ImportError when another is there."""
    for variable, name in VARIABLES.items():
        path = os.environ.get(variable)
        if path is None:
            continue
        if name not in sys.modules:
            loader = importlib.machinery.ExtensionFileLoader(name, path)
            spec = importlib.util.spec_from_file_location(name, path, loader=loader)
            if spec is None:
                raise ImportError(f"{variable}={path} is not an extension module")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            loader.exec_module(module)
        found = sys.modules[name].__file__
        if found is None or not Path(found).samefile(path):
            raise ImportError(f"{name} is {found}, {variable} asks for {path}")


def strangers() -> list[str]:
    """Return the builds that are mapped but not asked for, or asked for but not mapped.

    From the kernel's list of mappings, which no import can deceive. Empty without the variables.
    """
    asked = {name: os.environ[v] for v, name in VARIABLES.items() if v in os.environ}
    prefixes = tuple(f"{name.rpartition('.')[2]}." for name in asked)
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line}
    built = {file for file in files if os.path.basename(file).startswith(prefixes)}
    return sorted(built ^ {os.path.realpath(path) for path in asked.values()})


load()
