"""Search and Lookup over a corpus: the source of Observations."""

from app.knowledge.base import CorpusUnreadable, Hit, KnowledgeExplorer, KnowledgeSource, SearchResult
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
    "KnowledgeExplorer",
    "KnowledgeSource",
    "MemoryKnowledge",
    "SearchResult",
    "build_corpus",
    "file_digest",
]
