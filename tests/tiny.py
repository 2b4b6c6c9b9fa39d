"""A tiny language model and LoRA adapters over it, made in-process: no download, no real weights.

The model is a two-layer Llama with grouped-query attention; its tokenizer is a byte-level BPE, so
every text encodes. It knows nothing of Veritune: any test may use it as a base or an adapter directory.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 400
CONTEXT = 512
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_TEXT = """Claim: The Danube flows through Vienna.
Thought 1: I need to search the Danube and find the cities that it flows through.
Action 1: Search[Danube]
Observation 1: The Danube is a river in Europe. It flows through ten countries.
Thought 2: The page does not say it yet, so I look for the word Vienna on this page.
Action 2: Lookup[Vienna]
Observation 2: (Result 1 / 2) Vienna, Bratislava, Budapest and Belgrade lie on the Danube.
Action 3: Finish[SUPPORTS] Finish[REFUTES] Finish[NOT ENOUGH INFO]
"""


def make_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Write config, safetensors weights (float32) and tokenizer into `directory`; return it.

    The same seed gives the same weights. Vocabulary 400, context 512, ids 0/1/2 are bos/eos/pad.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer))
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    return directory


def without_pad(directory: Path) -> None:
    """Take the pad token away from the model in `directory`, as many published models have none."""
    for name, key in (("tokenizer_config.json", "pad_token"), ("config.json", "pad_token_id")):
        settings = json.loads((directory / name).read_text())
        del settings[key]
        (directory / name).write_text(json.dumps(settings))


def make_tiny_adapter(model_dir: Path, directory: Path, seed: int, r: int = 4) -> Path:
    """Write a PEFT LoRA adapter over the model in `model_dir` into `directory`; return it.

    All linear layers are adapted; `lora_B` is far from zero, so the logits differ clearly from the base's.
    """
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEARS, task_type="CAUSAL_LM")
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(str(directory), safe_serialization=True)
    return directory


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.3,  # the usual 0.02 gives a model that repeats one token for ever
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(keepends=True), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    untyped: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = untyped(tokenizer_object=tokenizer, model_max_length=CONTEXT, **SPECIAL_TOKENS)
    return wrapped
