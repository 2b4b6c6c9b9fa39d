"""An uploaded file → canonical rows and an exact account, read by a short-lived child with limits."""

from app.ingest.child import IngestLimits, IngestResult, ingest

__all__ = ["IngestLimits", "IngestResult", "ingest"]
