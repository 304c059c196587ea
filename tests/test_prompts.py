"""Where prompts come from, the order they are drawn in, and their embeddings."""

import json

import pytest
import torch
from tiny import tiny_sana_pipeline

from diffusers_tbcm.prompts import PromptEncoder, draw_generator, load_dataset_prompts, prompt_at, read_prompts


def test_prompts_are_the_lines_that_are_not_empty(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa dog\r\n\n  a café  \n".encode())
    assert read_prompts(file) == ["a dog", "a café"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"\n \n", "holds no prompt"), (b"caf\xe9\n", "not UTF-8")]
)
def test_bad_prompts_files_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.jsonl"
    rows = [
        {"caption": "a dog", "n": 1},
        {"caption": "", "n": 2},
        {"caption": None, "n": 3},
        {"caption": "a cat", "n": 4},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def test_dataset_prompts_are_the_captions_that_are_not_empty(captions):
    assert load_dataset_prompts(captions, column="caption") == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("column", "message"), [("text", "no column 'text': it has caption, n"), ("n", "is not text")]
)
def test_bad_dataset_columns_are_refused(captions, column, message):
    with pytest.raises(ValueError, match=message):
        load_dataset_prompts(captions, column=column)


def test_every_epoch_sees_every_prompt_once_in_an_order_of_its_own():
    epochs = [[prompt_at(epoch * 50 + i, 50, seed=3) for i in range(50)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != [prompt_at(i, 50, seed=4) for i in range(50)]


def test_draws_have_generators_of_their_own():
    values = {(seed, draw): torch.randn(4, generator=draw_generator(draw, seed)) for seed in (0, 1) for draw in (0, 1)}
    assert torch.equal(values[0, 1], torch.randn(4, generator=draw_generator(1, 0)))
    assert len({tuple(value.tolist()) for value in values.values()}) == 4


def test_embeddings_are_the_pipelines_without_its_padding():
    pipeline = tiny_sana_pipeline()
    instruction = ["Enhance the prompt.", "User Prompt: "]
    encoder = PromptEncoder(pipeline, complex_human_instruction=instruction, max_sequence_length=40)
    prompts = ["a violin", "a much longer prompt", ""]
    embeds, mask = encoder(prompts)
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


def test_each_prompt_is_encoded_once_while_it_is_cached(monkeypatch):
    pipeline = tiny_sana_pipeline()
    encoded = []
    original = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda prompts, **kw: encoded.extend(prompts) or original(prompts, **kw)
    )
    encoder = PromptEncoder(pipeline, max_sequence_length=40, cache_size=2)
    first = encoder(["a", "b", "a"])
    again = encoder(["a", "b", "a"])
    assert encoded == ["a", "b"] and all(map(torch.equal, first, again))
    encoder(["c"])  # drops "b", whose last use is the oldest
    encoder(["a"])
    encoder(["b"])
    assert encoded == ["a", "b", "c", "b"]
