"""Prompt embeddings: the text encoder's, and the same ones from a folder."""

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_sana_pipeline, write_tiny_pipeline

from diffusers_tbcm.data.embeddings import EmbeddingCache, PromptEncoder, encoder_fingerprint, precompute_embeddings
from diffusers_tbcm.text import Text


INSTRUCTION = ["Enhance the prompt.", "User Prompt: "]
SETTINGS = {"complex_human_instruction": INSTRUCTION, "max_sequence_length": 40}
FINGERPRINT = {"text_encoder": "gemma", "complex_human_instruction": "none"}
PROMPTS = ["a violin", "a much longer prompt", "b", "a cat and a dog", "the sun", "c"]


def tensors(text):
    """What a text of a Sana pipeline holds."""
    assert text.pooled is None
    return text.embeds, text.mask


def test_embeddings_are_the_pipelines_without_its_padding():
    pipeline = tiny_sana_pipeline()
    instruction = ["Enhance the prompt.", "User Prompt: "]
    encoder = PromptEncoder(pipeline, complex_human_instruction=instruction, max_sequence_length=40)
    prompts = ["a violin", "a much longer prompt", ""]
    text = encoder(prompts)
    embeds, mask = text.embeds, text.mask
    for row, row_mask, prompt in zip(embeds, mask, prompts, strict=True):
        expected, expected_mask, _, _ = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=40,
            complex_human_instruction=instruction if prompt else None,
        )
        length = int(expected_mask.sum())
        assert int(row_mask.sum()) == length and row_mask[:length].all()
        # Attention over another padded length may round differently.
        torch.testing.assert_close(row[:length], expected[0, :length], atol=1e-5, rtol=1e-5)
    assert embeds.shape[1] == int(mask.sum(1).max())


def test_each_prompt_is_encoded_alone_and_once_while_it_is_cached(monkeypatch):
    pipeline = tiny_sana_pipeline()
    encoded = []
    original = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda prompt, **kw: encoded.append(prompt) or original(prompt, **kw)
    )
    single = PromptEncoder(pipeline, max_sequence_length=40)
    room = sum(single.encode(prompt).embeds.nbytes for prompt in ("a", "b"))
    encoded.clear()
    encoder = PromptEncoder(pipeline, max_sequence_length=40, cache_bytes=room)
    first = encoder(["a", "b", "a"])
    again = encoder(["a", "b", "a"])
    assert encoded == ["a", "b"] and all(map(torch.equal, tensors(first), tensors(again)))
    encoder(["c"])  # drops "b", whose last use is the oldest
    encoder(["a"])
    encoder(["b"])
    assert encoded == ["a", "b", "c", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_what_the_encoder_gives_bit_for_bit(tmp_path, dtype):
    pipeline = tiny_sana_pipeline()
    pipeline.text_encoder.to(dtype)
    encoder = PromptEncoder(pipeline, **SETTINGS)
    assert precompute_embeddings(PROMPTS * 2, lambda: encoder, tmp_path, FINGERPRINT, shard_size=3) == 7
    cache = EmbeddingCache(tmp_path, FINGERPRINT)
    assert len(cache) == 7 and cache.missing(["x", "", "b", "y"]) == ["x", "y"]
    for batch in (["c", "a violin", ""], [""], PROMPTS[::-1], ["b", "b"]):
        found, expected = tensors(cache(batch)), tensors(encoder(batch))
        assert all(map(torch.equal, found, expected))
        assert [value.dtype for value in found] == [value.dtype for value in expected] == [dtype, torch.long]
    written = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert sorted(len(shard["keys"]) for shard in written) == [1, 3, 3]
    tokens = sum(int(encoder([prompt]).mask.sum()) for prompt in ["", *PROMPTS])
    assert sum(len(shard["embeds"]) for shard in written) == tokens  # no padding


class CountingEncoder:
    """Stands in for a text encoder: embeds a prompt as its characters, and counts."""

    def __init__(self, die_at=None):
        self.encoded = []
        self.die_at = die_at

    def encode(self, prompt):
        if prompt == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.encoded.append(prompt)
        return Text.unmasked(torch.tensor([[[0.0, 0.0], *([ord(letter), 1.0] for letter in prompt)]]))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def never():
    raise AssertionError("the encoder was loaded")


def complete(folder, **kwargs):
    """Embed PROMPTS in shards of two, and say which ones were computed."""
    encoder = CountingEncoder()
    precompute_embeddings(PROMPTS, lambda: encoder, folder, FINGERPRINT, shard_size=2, **kwargs)
    return encoder.encoded


def test_a_complete_folder_needs_no_encoder(tmp_path):
    assert complete(tmp_path) == ["", *PROMPTS]
    before = contents(tmp_path)
    assert precompute_embeddings(PROMPTS, never, tmp_path, FINGERPRINT, shard_size=2) == 0
    assert precompute_embeddings(PROMPTS[:3], never, tmp_path, FINGERPRINT, shard_size=5) == 0
    assert contents(tmp_path) == before


def test_other_prompts_in_another_order_are_added_to_a_folder(tmp_path):
    complete(tmp_path)
    encoder = CountingEncoder()
    wanted = ["new", *reversed(PROMPTS), "newer"]
    assert precompute_embeddings(wanted, lambda: encoder, tmp_path, FINGERPRINT, shard_size=2) == 2
    assert encoder.encoded == ["new", "newer"]
    assert EmbeddingCache(tmp_path, FINGERPRINT).missing(wanted) == []


def precompute_until_killed(folder, where):
    if where == "renaming":
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        encoder = CountingEncoder()
    else:
        encoder = CountingEncoder(die_at="the sun")
    precompute_embeddings(PROMPTS, lambda: encoder, folder, FINGERPRINT, shard_size=2)


@pytest.mark.parametrize(("where", "left"), [("encoding", PROMPTS[3:]), ("renaming", ["", *PROMPTS])])
def test_a_killed_run_goes_on_after_its_finished_shards(tmp_path, where, left):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    # A fork: the child neither imports nor starts threads of its own.
    run = multiprocessing.get_context("fork").Process(target=precompute_until_killed, args=(folder, where))
    run.start()
    run.join(60)
    assert run.exitcode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert complete(folder) == left
    assert {path: path.stat().st_mtime_ns for path in before} == before
    complete(whole)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_write_the_folder_that_one_writes(tmp_path, order):
    one, two = tmp_path / "one", tmp_path / "two"
    complete(one)
    shares = {index: complete(two, process_index=index, num_processes=2) for index in order}
    assert shares == {0: ["", "a violin", "a cat and a dog", "the sun"], 1: ["a much longer prompt", "b", "c"]}
    assert contents(two) == contents(one)


@pytest.mark.parametrize("keep", [0, 4, 60, -1], ids=["empty", "header size", "header", "last byte"])
def test_a_torn_shard_is_recognised_and_redone(tmp_path, keep):
    complete(tmp_path)
    whole = contents(tmp_path)
    torn = next(path for path in tmp_path.glob("*.safetensors") if len(load_file(path)["keys"]) == 1)
    torn.write_bytes(torn.read_bytes()[:keep])
    cache = EmbeddingCache(tmp_path, FINGERPRINT)
    assert cache.missing(["", *PROMPTS]) == ["c"]
    with pytest.raises(ValueError, match=r"prompt 'c' is not among the 6 embedded in .*: run precompute_embeddings"):
        cache(["", "c"])
    assert complete(tmp_path) == ["c"]
    assert contents(tmp_path) == whole


def test_a_shard_lost_under_a_reader_is_named(tmp_path):
    complete(tmp_path)
    cache = EmbeddingCache(tmp_path, FINGERPRINT)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"shard '.*\.safetensors' is missing or torn: run precompute_embeddings"):
        cache(["b"])


def test_a_folder_that_is_not_there_holds_no_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"prompt '' is not among the 0 embedded in '.*nowhere'"):
        EmbeddingCache(tmp_path / "nowhere", FINGERPRINT)([""])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("teacher"))


def fingerprint(teacher, **changes):
    settings = {**SETTINGS, "dtype": torch.float32, **changes}
    return encoder_fingerprint(teacher, **settings)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("complex_human_instruction", None),
        ("complex_human_instruction", ["Another one: "]),
        ("max_sequence_length", 50),
        ("dtype", torch.bfloat16),
    ],
)
def test_other_settings_are_another_encoder(teacher, tmp_path, name, change):
    precompute_embeddings(PROMPTS, CountingEncoder, tmp_path, fingerprint(teacher))
    before = contents(tmp_path)
    other = fingerprint(teacher, **{name: change})
    message = f"holds embeddings of another encoder: {name} is [^;]*, not [^;]*. Choose another folder"
    for attempt in (EmbeddingCache, partial(precompute_embeddings, PROMPTS, never)):
        with pytest.raises(ValueError, match=message):
            attempt(tmp_path, other)
    assert contents(tmp_path) == before
    assert EmbeddingCache(tmp_path, fingerprint(teacher)).missing(PROMPTS) == []


def scale_last_layer(folder):
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights["layers.0.mlp.down_proj.weight"] *= 1.01
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})


def train_last_token(folder):
    """As textual inversion does: no other token's embedding changes."""
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights["embed_tokens.weight"][-1, -1] += 1
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (scale_last_layer, "text_encoder"),
        (train_last_token, "text_encoder"),
        (edit("text_encoder/config.json", '"query_pre_attn_scalar": 8', '"query_pre_attn_scalar": 4'), "text_encoder"),
        (edit("tokenizer/tokenizer.json", '"a": ', '"@": '), "tokenizer"),
    ],
    ids=["weights", "one token", "config", "tokenizer"],
)
def test_another_text_encoder_or_tokenizer_is_another_encoder(tmp_path, change, name):
    folder = write_tiny_pipeline(tmp_path)
    before = fingerprint(folder)
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(b"a copy that is not loaded")
    assert fingerprint(folder) == before == fingerprint(write_tiny_pipeline(tmp_path / "again"))
    change(folder)
    after = fingerprint(folder)
    assert {key for key in before if before[key] != after[key]} == {name}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_embeddings_that_are_not_finite_are_neither_given_nor_kept(tmp_path, value):
    pipeline = tiny_sana_pipeline()
    with torch.no_grad():
        pipeline.text_encoder.norm.weight[3] = value
    encoder = PromptEncoder(pipeline, **SETTINGS)
    with pytest.raises(ValueError, match=r"embeddings are not finite in float32, those of 'a violin'"):
        encoder(["a violin"])
    with pytest.raises(ValueError, match="embeddings are not finite in float32, those of ''"):
        precompute_embeddings(PROMPTS, lambda: encoder, tmp_path, FINGERPRINT)
    assert not contents(tmp_path)
    complete(tmp_path)
    path = next(path for path in tmp_path.glob("*.safetensors") if len(load_file(path)["keys"]) == 1)
    shard = load_file(path)
    shard["embeds"][1, 0] = value
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(shard, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"shard '{path}' holds NaN or infinity in its embeds: delete it"):
        EmbeddingCache(tmp_path, FINGERPRINT)(["b", "c"])
