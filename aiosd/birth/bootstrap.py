"""The first code of a template, run as a script by whatever interpreter a person has named.

    python bootstrap.py SOCKET SUPERVISOR GROUND FOLDER-OF-AIOSD FOLDER-OF-MSGSPEC [MODULE]...

This file uses only the standard library, and syntax that an old interpreter understands, so that it can report what is
wrong. It makes `aiosd`, `libaios` and `msgspec` importable, and nothing else from their folders: these may belong to
another environment with other versions of this one's packages. If this environment has a `msgspec` of its own, that is
used, because aiosd's is compiled for another version of Python.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

OLDEST = (3, 11)


class PackageFinder:
    """Finds single packages in folders that are not in sys.path."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        folder = self.folders.get(name)
        return None if folder is None else PathFinder.find_spec(name, [folder])


def why_not(finder: PackageFinder, msgspec_folder: str) -> str:
    """Why this interpreter cannot run aiosd's code; "": it can."""
    version = "{}.{}".format(*sys.version_info)
    if sys.version_info < OLDEST:
        return f"{sys.executable} is Python {version}; aiosd needs {OLDEST[0]}.{OLDEST[1]} or later"
    try:
        import msgspec
    except ImportError:
        finder.folders["msgspec"] = msgspec_folder
        try:
            import msgspec  # noqa: F401
        except ImportError:
            hint = "pip install msgspec in that environment"
            return f"{sys.executable} is Python {version}, for which aiosd has no msgspec: {hint}"
    return ""


def main() -> None:
    del sys.path[0]  # the folder of this file
    number, supervisor, ground = map(int, sys.argv[1:4])
    ours, msgspec_folder, *modules = sys.argv[4:]
    finder = PackageFinder()
    finder.folders.update({"aiosd": ours, "libaios": ours})
    sys.meta_path.insert(0, finder)
    words = why_not(finder, msgspec_folder)
    if words:
        os.write(number, json.dumps({"errno": 8, "words": words}).encode())  # ENOEXEC
        os._exit(1)
    from aiosd.birth import template

    template.main(number, supervisor, ground, modules)


if __name__ == "__main__":
    main()
