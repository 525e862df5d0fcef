"""Reads and writes the names of signals: `TERM`, `SIGTERM`, `term`, `15`, `RTMIN+3`."""

from __future__ import annotations

import signal

#: Highest number that Linux knows.
MAX_SIGNAL = 64

_MIN_REALTIME = 34
_NAMES = {s.name[3:]: int(s) for s in signal.Signals} | {"CLD": int(signal.SIGCHLD), "IOT": int(signal.SIGABRT)}


def number_of(word: str) -> int:
    """The number of the signal `word`. Raises ValueError with a sentence if there is none. 0 only probes a process."""
    if word.isascii() and word.isdigit():
        number = int(word)
        if number > MAX_SIGNAL:
            raise ValueError(f"{word}: no such signal (0 to {MAX_SIGNAL})")
        return number
    name = word.upper().removeprefix("SIG")
    for base, sign in (("RTMIN+", 1), ("RTMAX-", -1)):
        step = name.removeprefix(base)
        if step != name and step.isascii() and step.isdigit():
            number = _NAMES[base[:-1]] + sign * int(step)
            if _MIN_REALTIME <= number <= MAX_SIGNAL:
                return number
    if name not in _NAMES:
        raise ValueError(f"{word}: no such signal (aios-kill -l lists them)")
    return _NAMES[name]


def name_of(number: int) -> str:
    """`TERM` for 15; `RTMIN+3` for 37."""
    try:
        return signal.Signals(number).name[3:]
    except ValueError:
        pass
    if _MIN_REALTIME < number < MAX_SIGNAL:
        return f"RTMIN+{number - _MIN_REALTIME}"
    return str(number)


def is_signal(word: str) -> bool:
    """Whether `word` names a signal."""
    try:
        number_of(word)
    except ValueError:
        return False
    return True


def numbers() -> list[int]:
    """The numbers of all signals in use."""
    return [*range(1, 32), *range(_MIN_REALTIME, MAX_SIGNAL + 1)]


def listing() -> list[str]:
    """`1 HUP`, `2 INT`, … for every number in use, in rows of five as a shell has them."""
    entries = [f"{number:2} {name_of(number):11}" for number in numbers()]
    return ["  ".join(entries[i : i + 5]).rstrip() for i in range(0, len(entries), 5)]
