"""Ids: prefixed, sortable by the time they were made, safe in URLs and file names."""

import re
import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letter is mistaken for another
_RANDOM_BITS = 50

_DIGITS = 20

PREFIXES = ("ds", "corp", "job", "adp", "pred", "eval")
_ID = re.compile(rf"(?:{'|'.join(PREFIXES)})_[{_ALPHABET}]{{{_DIGITS}}}")


class _Sequence:
    """Milliseconds and random bits as one number, which never falls: two jobs submitted in one millisecond run in the
    order of their submission."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        fresh = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            same_instant = fresh >> _RANDOM_BITS <= self._last >> _RANDOM_BITS
            # A random stride, not 1: ids that are neighbours should not be guessed from each other.
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
    """`job_` + 10 characters of milliseconds + 10 random ones; later ids of a process sort behind earlier ones."""
    return f"{prefix}_{_base32(_sequence.next(), _DIGITS)}"


def id_pattern(prefix: str) -> str:
    """The regular expression that the ids with this prefix match, as in `new_id(prefix)`."""
    return rf"^{prefix}_[{_ALPHABET}]{{{_DIGITS}}}$"


def looks_like_id(name: str) -> bool:
    """Whether a name is spelled as an id: what it would name could be hidden by what has that id, or will have it."""
    return _ID.fullmatch(name) is not None
