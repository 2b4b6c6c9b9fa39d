"""Thoughts of synthesised trajectories: skeletons with slots, drawn without regard to the verdict.

A skeleton is a beginning and an end. There are more than 200 of them, so that no wording stands for a verdict and a
model learns none by heart. The last Thought puts the page's sentence beside the claim; what follows from the two is
the verdict, which the Action says.
"""

import random
import re

_DOUBLE_QUOTES = re.compile('["“”]')
_QUOTATION = re.compile(r"\".*\"")

_BEGINNINGS = (
    "I need to", "I should", "I will", "First I", "Let me", "To judge this, I", "I want to", "I have to", "Now I",
    "To begin, I",
)  # fmt: skip
_SEARCHES = (
    "search for {name}.", "look up {name}.", "read about {name}.", "open the page about {name}.", "find {name}.",
    "see what is written about {name}.", "check the page of {name}.", "go to {name}.",
)  # fmt: skip
_MISSES = (
    "There is no such page. {name} is nearest.", "That name opens nothing; I try {name}.",
    "No page has that name. I take {name}.", "Not found. The page could be {name}.",
    "The list has {name}, which I open.", "I see {name} among the titles and read it.",
    "It is filed as {name}, it seems.", "So I search again, for {name}.",
)  # fmt: skip
_LOOKUP_BEGINNINGS = (
    "I need to", "I should", "Next I", "Let me", "Now I", "To be sure, I",
)  # fmt: skip
_LOOKUPS = (
    "look for {keyword} on the page.", "see where the page has {keyword}.", "find {keyword} on this page.",
    "check what it says of {keyword}.", "look up {keyword} here.", "search the page for {keyword}.",
)  # fmt: skip
_QUOTES = (
    "The page says", "It says", "I read", "The page reads", "Here it says", "It is written", "The text says",
    "The closest sentence is", "The page has", "What I find is", "This matters", "I compare",
)  # fmt: skip
_CLAIMS = (
    "The claim says", "The claim is", "The claim was", "Claimed is", "I was asked", "To be judged", "I compare it with",
    "Against it stands", "Beside it", "The sentence to judge", "Now the claim", "The claim reads",
)  # fmt: skip


def build_search_thought(rng: random.Random, name: str) -> str:
    return f"{rng.choice(_BEGINNINGS)} {rng.choice(_SEARCHES)}".format(name=name)


def build_miss_thought(rng: random.Random, name: str) -> str:
    return rng.choice(_MISSES).format(name=name)


def build_lookup_thought(rng: random.Random, keyword: str) -> str:
    return f"{rng.choice(_LOOKUP_BEGINNINGS)} {rng.choice(_LOOKUPS)}".format(keyword=keyword)


def build_last_thought(rng: random.Random, sentence: str, claim: str) -> str:
    """The sentence in quotation marks, then the claim. The claim's own quotation marks become single ones, because only
    what was read is quoted."""
    plain = _DOUBLE_QUOTES.sub("'", claim)
    return f'{rng.choice(_QUOTES)}: "{sentence}" {rng.choice(_CLAIMS)}: {plain}'


def build_skeleton(thought: str, argument: str, claim: str) -> str:
    """The Thought's wording: without the claim, its quotation, and the argument of its Action."""
    bare = _QUOTATION.sub("…", thought.replace(_DOUBLE_QUOTES.sub("'", claim), "…"))
    return bare.replace(argument, "…") if argument else bare
