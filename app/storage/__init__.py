"""Bytes, addressed by their SHA-256."""

from app.storage.blobs import Blob, Blobs, open_blobs
from app.storage.leftovers import stale, sweep

__all__ = ["Blob", "Blobs", "open_blobs", "stale", "sweep"]
