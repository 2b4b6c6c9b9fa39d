"""Turns an uploaded file into canonical rows and a report, in a short-lived child process with limits."""

from app.ingest.child import IngestLimits, IngestResult, ingest

__all__ = ["IngestLimits", "IngestResult", "ingest"]
