"""Search and Lookup: where Observations come from."""

from app.knowledge.base import CorpusUnreadable, Hit, KnowledgeSource, Reading, SearchResult
from app.knowledge.building import DEFAULT_LIMITS, CorpusLimits, CorpusRefused, build_corpus
from app.knowledge.corpus import CorpusFile, file_digest
from app.knowledge.memory import MemoryKnowledge

__all__ = [
    "DEFAULT_LIMITS",
    "CorpusFile",
    "CorpusLimits",
    "CorpusRefused",
    "CorpusUnreadable",
    "Hit",
    "KnowledgeSource",
    "MemoryKnowledge",
    "Reading",
    "SearchResult",
    "build_corpus",
    "file_digest",
]
