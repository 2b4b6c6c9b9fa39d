"""Ids with a prefix, sortable by creation time, safe in URLs and file names (like ULIDs)."""

import re
import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, without letters that look alike
_RANDOM_BITS = 50

_DIGITS = 20

PREFIXES = ("ds", "corp", "job", "adp", "pred", "eval")
_ID = re.compile(rf"(?:{'|'.join(PREFIXES)})_[{_ALPHABET}]{{{_DIGITS}}}")


class _Sequence:
    """Numbers of milliseconds and random bits that always increase.

    So two jobs that are submitted in one millisecond run in the order of submission."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        fresh = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            same_instant = fresh >> _RANDOM_BITS <= self._last >> _RANDOM_BITS
            # A random increment: the next id cannot be guessed from this one.
            self._last = self._last + 1 + secrets.randbits(32) if same_instant else fresh
            return self._last


_sequence = _Sequence()


def _base32(number: int, digits: int) -> str:
    out = []
    for _ in range(digits):
        number, rest = divmod(number, 32)
        out.append(_ALPHABET[rest])
    return "".join(reversed(out))


def new_id(prefix: str) -> str:
    """`job_`, 10 characters of milliseconds, 10 random ones. Later ids of a process sort after earlier ones."""
    return f"{prefix}_{_base32(_sequence.next(), _DIGITS)}"


def id_pattern(prefix: str) -> str:
    """A regular expression that matches the ids of `new_id(prefix)`."""
    return rf"^{prefix}_[{_ALPHABET}]{{{_DIGITS}}}$"


def looks_like_id(name: str) -> bool:
    """Whether a name has the form of an id. Such names are refused, because an id could shadow them."""
    return _ID.fullmatch(name) is not None
