"""Blobs, addressed by their SHA-256."""

from app.storage.blobs import Blob, Blobs, open_blobs
from app.storage.orphans import stale, sweep

__all__ = ["Blob", "Blobs", "open_blobs", "stale", "sweep"]
