"""Files that stay read-only in folders that an agent may write to, because they make other programs run code.

An agent may write to a person's folder with a repository in it, and later the person uses that folder: a hook that the
agent left there would run with all the person's rights. So in a cage hooks and settings of repositories are mounted
read-only; `.git` itself and the folders above it are mounted onto themselves, so that they cannot be renamed and made
anew; and some well-known files of editors and shells are read-only, too. Files that do not exist when the agent starts
are not protected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

FROZEN_IN_GIT = ("hooks", "config", "config.worktree")
FROZEN = frozenset(
    (".envrc", ".vscode", ".idea", ".husky", ".pre-commit-config.yaml", ".gitconfig", "aiosd.toml", ".bashrc",
     ".bash_profile", ".bash_login", ".profile", ".zshrc", ".zshenv", ".zprofile", ".zlogin")
)  # fmt: skip
DEPTH = 6  # of folders in which repositories are looked for
MOST_FOLDERS = 4000
MOST_FOUND = 300


def find(folder: str) -> dict[str, bool]:
    """Paths below a folder, and whether each stays writable: False: read-only; True: it must only stay in its place. In
    an order in which they can be mounted one after the other."""
    found: dict[str, bool] = {}
    for path in _candidates(folder):
        for above in _between(folder, path):
            found.setdefault(above, True)
        if os.path.basename(path) == ".git" and os.path.isdir(path):
            found[path] = True
            found |= {inner: False for name in FROZEN_IN_GIT if os.path.lexists(inner := os.path.join(path, name))}
        else:
            found[path] = False
        if len(found) >= MOST_FOUND:
            break
    return dict(sorted(found.items()))


def _candidates(folder: str) -> Iterator[str]:
    """`.git` and frozen names, those near the top first. Links are not followed."""
    level, seen = [folder], 0
    for _ in range(DEPTH):
        below: list[str] = []
        for one in level:
            seen += 1
            if seen > MOST_FOLDERS:
                return
            try:
                entries = list(os.scandir(one))
            except OSError:
                continue
            for entry in entries:
                if entry.is_symlink():
                    continue
                if entry.name == ".git" or entry.name in FROZEN:
                    yield entry.path
                elif entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
        level = below


def _between(folder: str, path: str) -> list[str]:
    """The folders below `folder` and above `path`."""
    above: list[str] = []
    while (path := os.path.dirname(path)) != folder and len(path) > len(folder):
        above.append(path)
    return above
