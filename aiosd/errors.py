"""The three kinds of error, as a tree.

    AiosdError
    ├── UsageError      the caller was wrong: a bad option, a missing model file. One line, exit code 1 or 2
    ├── WorldError      the world failed: no memory, no disk, no permission. Keeps its __cause__
    └── Bug             aiosd is wrong: one of its invariants does not hold. Stop loudly

An error of an agent is none of these: it is an errno in a reply (`libaios.wire.Failure`), made where the argument is
checked. It never travels through the kernel as an exception of one of these classes, only as an OSError.
"""

from __future__ import annotations

import errno
import logging


class AiosdError(Exception):
    """Base of all that aiosd raises on purpose."""


class UsageError(AiosdError):
    """The user's request is not possible."""


class WorldError(AiosdError):
    """The machine or the operating system refused."""


class Bug(AiosdError):
    """An invariant of aiosd does not hold."""


def refuse(sentence: str, code: int = errno.EINVAL) -> OSError:
    """The error of an argument that cannot be served."""
    return OSError(code, sentence)


def as_oserror(error: Exception) -> OSError:
    """The error for the caller. Anything but an OSError is a bug of aiosd, which the same call would cause in every
    successor of this core as well: so it must not end the core."""
    if isinstance(error, OSError):
        return error
    logging.getLogger("llm").error("a call cannot be served", exc_info=error)
    return OSError(errno.EIO, "the llm core made a mistake; aiosd's log has the details")
