"""Detects unsupported files by their first bytes: archives, images, office files, text that is not UTF-8."""

from app.domain.errors import InvalidError
from app.ingest.lines import BOM

_MAGIC_NUMBERS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ", "xz data"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow or Feather file"),
    (b"ORC", "an ORC file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x7fELF", "a program"),
)
_MARKUP = ((b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "an XML document"))
_WIDE_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def refuse_unsupported(head: bytes, way_out: str) -> None:
    """Raises InvalidError `unknown_format` or `not_utf8`. `head`: the file's first bytes; `way_out`: what to send."""
    lowered = head[:200].removeprefix(BOM).lstrip().lower()
    markup = next((what for magic, what in _MARKUP if lowered.startswith(magic)), None)
    what = markup or next((what for magic, what in _MAGIC_NUMBERS if head.startswith(magic)), None)
    if what:
        raise InvalidError(f"the file is {what}; {way_out}", code="unknown_format")
    if head.startswith(_WIDE_BYTE_ORDER_MARKS) or (len(head) > 7 and head[:4096].count(0) * 4 > len(head[:4096])):
        raise InvalidError("the file looks like UTF-16 or UTF-32; save it as UTF-8", code="not_utf8")
    controls = sum(byte < 32 and byte not in b"\t\n\v\f\r" for byte in head[:4096])
    if controls * 20 > len(head[:4096]):
        raise InvalidError(f"the file is binary, in an unknown format; {way_out}", code="unknown_format")
