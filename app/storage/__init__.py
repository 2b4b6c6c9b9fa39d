"""Bytes, addressed by their SHA-256."""

from app.storage.blobs import Blob, Blobs, open_blobs

__all__ = ["Blob", "Blobs", "open_blobs"]
