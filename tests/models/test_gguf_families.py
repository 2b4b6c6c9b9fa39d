"""Each family of GGUF files that can be added: the converted model computes what the original does, from the same ids.

The originals are tiny and random, with tokenizers by their family's published rules. The files are written as
llama.cpp's converter writes them: Llama's query and key rows in another order, Gemma's norms with 1 added, Gemma's
merges left out.
"""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from app.domain.base_models import GgufSource
from worker.models.describe import sha256_of
from worker.models.store import ModelStore

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CORPUS = """Claim: The Elbe flows through Dresden, and it isn't 1,094 kilometres long.
Thought 1: I need to search Elbe, then I'll read how long it is.  Two spaces, and\ttabs.
Observation 1: The Elbe is one of the major rivers of Central Europe. It rises in the Czech Republic at 1386 metres.
Action 2: Finish[NOT ENOUGH INFO] Finish[SUPPORTS] Finish[REFUTES]
"""
TEXTS = (
    CORPUS,
    "It's 1984, isn't it? WE'LL SEE.",
    "  two spaces   three\n\n a line\r\n\tand 12345.678 digits",
    "Zürich, Łódź, São Paulo; Ζεύς; 東京都; नमस्ते; 🙂🙃",
    "e\u0301 decomposed, \u00e9 composed; \u212b and \ufb01",
    "",
    " ",
    "no-break\u00a0space, zero\u200bwidth",
)
QWEN2_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Original:
    """A model as its publisher has it. `permuted`: the rows of q_proj and k_proj change places in its GGUF file."""

    architecture: MODEL_ARCH
    model: PreTrainedModel
    tokenizer: Tokenizer
    pre_tokenizer: str
    norm_offset: float = 0.0
    permuted: bool = False


def byte_level(split: pre_tokenizers.PreTokenizer, specials: list[str], *, nfc: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not nfc)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def llama() -> Original:
    """SmolLM2's rule: digits one by one."""
    tokenizer = byte_level(
        pre_tokenizers.Digits(individual_digits=True), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=False
    )
    config = LlamaConfig(**SIZES, vocab_size=400, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return Original(MODEL_ARCH.LLAMA, LlamaForCausalLM(config), tokenizer, "smollm", permuted=True)


def qwen2() -> Original:
    tokenizer = byte_level(
        pre_tokenizers.Split(Regex(QWEN2_RULE), "isolated"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True
    )
    config = Qwen2Config(**SIZES, vocab_size=400, rms_norm_eps=1e-6, tie_word_embeddings=False)
    return Original(MODEL_ARCH.QWEN2, Qwen2ForCausalLM(config), tokenizer, "qwen2")


def gemma3() -> Original:
    """A space is ▁, unknown characters are spelled in bytes, and a merge is as early as its result's id is low."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    letters = [*string.printable.replace(" ", "▁"), "ü", "é"]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=180, special_tokens=["<unk>"], initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator([CORPUS], trainer)
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)[1:]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *(t for t in learned if len(t) > 1)]
    tokens += [token for token in learned if len(token) == 1]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        if token in learned
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(specials)
    config = Gemma3TextConfig(
        **SIZES,
        vocab_size=len(tokens),
        head_dim=256,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=256,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Original(MODEL_ARCH.GEMMA3, Gemma3ForCausalLM(config), tokenizer, "default", norm_offset=1.0)


def write_gguf(original: Original, path: Path) -> None:
    config = original.model.config
    name = {MODEL_ARCH.LLAMA: "llama", MODEL_ARCH.QWEN2: "qwen2", MODEL_ARCH.GEMMA3: "gemma3"}[original.architecture]
    writer = GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(1_000_000.0 if original.architecture is MODEL_ARCH.GEMMA3 else 10_000.0)
    if original.architecture is MODEL_ARCH.GEMMA3:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    write_tokenizer(writer, original)
    names = get_tensor_name_map(original.architecture, config.num_hidden_layers)
    for key, value in original.model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = value.float()
        if "norm" in key:
            written = written + original.norm_offset
        if original.permuted and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            written = written.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(written.shape)
        stem, _, suffix = key.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", written.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: GGUFWriter, original: Original) -> None:
    vocabulary = original.tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    specials = {token.content for token in original.tokenizer.get_added_tokens_decoder().values() if token.special}
    types = [
        TokenType.CONTROL if t in specials else TokenType.BYTE if t.startswith("<0x") else TokenType.NORMAL
        for t in tokens
    ]
    sentencepiece = original.architecture is MODEL_ARCH.GEMMA3
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(original.pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores([-1000.0] * len(tokens))
        writer.add_add_bos_token(True)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in merges_of(original.tokenizer)])
    writer.add_bos_token_id(vocabulary["<bos>" if sentencepiece else "<|endoftext|>"])
    writer.add_eos_token_id(vocabulary["<eos>" if sentencepiece else "<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<pad>" if sentencepiece else "<|endoftext|>"])


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.mark.parametrize("make", [llama, qwen2, gemma3])
def test_a_family_is_converted_to_the_same_ids_and_logits(make: Callable[[], Original], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = make()
        for name, weights in original.model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(weights, 1.0 - original.norm_offset if "norm" in name else 0.0, 0.1)
            weights.data = weights.data.bfloat16().float()  # the stored format
    gguf = tmp_path / "model.gguf"
    write_gguf(original, gguf)

    source = GgufSource(sha256=sha256_of(gguf), path=gguf, revision="r1")
    found = ModelStore(tmp_path / "cache").obtain("tiny", source)

    converted = Tokenizer.from_file(str(found.path / "tokenizer.json"))
    for text in TEXTS:
        wanted = original.tokenizer.encode(text, add_special_tokens=False)
        assert converted.encode(text, add_special_tokens=False).tokens == wanted.tokens, text
        assert converted.encode(text, add_special_tokens=False).ids == wanted.ids, text
        assert converted.decode(wanted.ids) == original.tokenizer.decode(wanted.ids)
    ids = torch.tensor([original.tokenizer.encode(CORPUS, add_special_tokens=False).ids])
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, original.model(ids).logits, atol=2e-3)
    assert found.model_type in ("llama", "qwen2", "gemma3_text")
