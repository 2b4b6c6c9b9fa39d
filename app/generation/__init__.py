"""Token ids from an inference server."""

from app.generation.base import GenerationRequest, GenerationResult, Generator
from app.generation.completions import CompletionsGenerator
from app.generation.scripted import ScriptedGenerator

__all__ = ["CompletionsGenerator", "GenerationRequest", "GenerationResult", "Generator", "ScriptedGenerator"]
