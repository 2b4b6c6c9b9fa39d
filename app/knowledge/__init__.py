"""Search and Lookup: where Observations come from."""

from app.knowledge.base import CorpusUnreadable, Hit, KnowledgeSource, Reading, SearchResult
from app.knowledge.building import CorpusLimits, CorpusRefused, build_corpus, read_lines
from app.knowledge.corpus import CorpusFile, file_digest
from app.knowledge.memory import MemoryKnowledge

__all__ = [
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
    "read_lines",
]
