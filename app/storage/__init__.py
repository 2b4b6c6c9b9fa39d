"""Blobs, addressed by their SHA-256."""

from app.storage.blobs import Blob, Blobs, StagedBlobs, open_blobs
from app.storage.orphans import stale, sweep

__all__ = ["Blob", "Blobs", "StagedBlobs", "open_blobs", "stale", "sweep"]
