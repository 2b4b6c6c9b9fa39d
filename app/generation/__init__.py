"""Token ids from an inference server."""

from app.generation.base import Generated, GenerationRequest, Generator
from app.generation.completions import CompletionsGenerator
from app.generation.memory import ScriptedGenerator

__all__ = ["CompletionsGenerator", "Generated", "GenerationRequest", "Generator", "ScriptedGenerator"]
