"""Small tokenizers of the families that base models use, each with its family's control tokens."""

import json
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PROSE = [
    "Judge the claim. Search for pages, read them, and finish with SUPPORTS, REFUTES or NOT ENOUGH INFO.",
    "Thought 1: I should look at the Elbe and then I read on.",
    "Action 1: Search[Elbe]",
    "Observation 1: The Elbe flows into the North Sea at Cuxhaven. It begins in 1384 m.",
    "Action 2: Finish[SUPPORTS]",
]
_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2_SPLIT = _LLAMA_3_SPLIT.replace("{1,3}", "")


def llama_3() -> Tokenizer:
    """Byte-level; words of the vocabulary are not merged anew; the control tokens stand outside the model."""
    tokenizer = _byte_level(_LLAMA_3_SPLIT)
    document = json.loads(tokenizer.to_str())
    document["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    return _with_bos(tokenizer, "<|begin_of_text|>")


def qwen_2() -> Tokenizer:
    """ChatML over a byte-level model. Its infilling and tool tokens are not marked as special; it has no BOS."""
    tokenizer = _byte_level(_QWEN_2_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>", "<|vision_pad|>"])
    names = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_suffix|>", "<|repo_name|>", "<think>"]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    return tokenizer


def llama_2() -> Tokenizer:
    """SentencePiece BPE: a dummy prefix, spaces as ▁, bytes for what the vocabulary lacks; `</s>` is a word of it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _sentencepiece_decoder()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=_SENTENCEPIECE + _BYTES, show_progress=False)
    tokenizer.train_from_iterator(PROSE * 20, trainer)
    return _with_bos(_bytes_are_words(tokenizer), "<s>")


def unigram() -> Tokenizer:
    """SentencePiece Unigram, as llm-jp has it: the model takes the likeliest words, and `</s>` is one of the best."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = _sentencepiece_decoder()
    letters = sorted({letter for line in PROSE for letter in line} | set("<>/|_"))
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=[*_SENTENCEPIECE, "<mask>"],
        unk_token="<unk>",
        initial_alphabet=["\n", *letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE * 20, trainer)
    return _with_bos(tokenizer, "<s>")


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "llama-3": llama_3,
    "qwen-2": qwen_2,
    "llama-2": llama_2,
    "unigram": unigram,
}

_SENTENCEPIECE = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(split: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        PROSE * 20, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _sentencepiece_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _bytes_are_words(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer knows no byte tokens but special ones, which decoding would leave out."""
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in _SENTENCEPIECE]
    return Tokenizer.from_str(json.dumps(document))


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
