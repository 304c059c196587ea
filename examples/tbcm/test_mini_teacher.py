"""The embedded teacher and the parts of its recipe that do not need the pictures."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from PIL import Image
from tiny import write_tiny_flow_student

from diffusers_tbcm.backbones.sana import INSTRUCTION, infer_timestep_scale
from diffusers_tbcm.data.pictures import CaptionedImages
from diffusers_tbcm.data.prompts import load_prompts
from diffusers_tbcm.evaluation.drawing import load_pipeline
from diffusers_tbcm.images import to_pixels
from diffusers_tbcm.text import Text
from examples.tbcm.mini_teacher.emoji_data import (
    RESOLUTION,
    Emoji,
    all_captions,
    caption,
    list_emoji,
    load_images,
    write_image_folder,
)
from examples.tbcm.mini_teacher.emoji_metrics import DISTILLATION_PROMPTS_FILE, TEACHER_DIR, draw, load_evaluation
from examples.tbcm.mini_teacher.make_mini_teacher import (
    Run,
    build_autoencoder,
    build_text_encoder,
    build_transformer,
    complex_human_instruction,
    encode_captions,
    train_tokenizer,
)


MAX_BYTES = 40 * 10**6


@pytest.fixture(scope="module")
def teacher():
    pipeline = SanaPipeline.from_pretrained(TEACHER_DIR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed(pipeline, prompt, instruction):
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=40, complex_human_instruction=instruction
    )
    return embeds[0, : int(mask.sum())]


def test_the_recipe_embeds_captions_as_the_pipeline_does():
    captions = ["noto violin", "a fluent 3d emoji of an owl"]
    torch.manual_seed(0)
    tokenizer = train_tokenizer(captions)
    text_encoder = build_text_encoder(len(tokenizer)).eval()
    pipeline = SanaPipeline(
        tokenizer, text_encoder, build_autoencoder(), build_transformer(), FlowMatchEulerDiscreteScheduler()
    )
    for with_instruction in (False, True):
        embeds, mask = encode_captions(captions, tokenizer, text_encoder, with_instruction)
        for row, row_mask, text in zip(embeds, mask, captions, strict=True):
            expected = embed(pipeline, text, INSTRUCTION if with_instruction else None)
            assert int(row_mask.sum()) == len(expected)
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_a_word_is_the_same_tokens_wherever_it_stands():
    tokenizer = train_tokenizer(["noto violin", "violin in noto style"])
    words = [tokenizer.tokenize(text) for text in ("violin", "noto violin", "violin in", "a: violin")]
    assert all(set(words[0]) <= set(tokens) for tokens in words)
    assert complex_human_instruction().endswith("User Prompt: ")


def test_pictures_are_joined_by_code_point_and_composed_on_white(tmp_path):
    noto, fluent = tmp_path / "noto", tmp_path / "fluent"
    (noto / "img/google/64").mkdir(parents=True)
    (fluent / "assets").mkdir(parents=True)
    entries = []
    for index in range(120):
        code = f"1F{index:03X}"
        entries.append(
            {
                "name": f"THING {chr(65 + index % 26)}{index}",
                "short_name": f"thing_{chr(97 + index % 26)}",
                "unified": code,
                "non_qualified": None,
                "image": f"{code.lower()}.png",
                "category": "Animals & Nature",
                "subcategory": "animal-bird",
            }
        )
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(noto / "img/google/64" / f"{code.lower()}.png")
        if index:
            Image.new("RGBA", (256, 256), (0, 0, 255, 255)).save(fluent / "assets" / f"{code.lower()}.webp")
    (noto / "emoji.json").write_text(json.dumps(entries))
    pictures = list_emoji(noto, fluent, seed=0)
    assert len(pictures) == 239
    assert not pictures[0].in_teacher and all(picture.in_teacher for picture in pictures[1:])
    held_out = [picture.concept for picture in pictures if picture.held_out]
    assert len(held_out) == len(set(held_out)) == 100  # one style of a hundred concepts
    transparent, blue = load_images([pictures[1], pictures[2]])
    assert (transparent == 255).all() and (blue[2] >= 250).all() and (blue[:2] <= 5).all()  # webp is lossy


def test_the_written_folder_is_a_data_set_of_the_pictures_with_all_their_captions(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    pictures = []
    for index, concept in enumerate(("owl", "dog")):
        Image.new("RGBA", (64, 64), (255, 100 * index, 0, 255)).save(tmp_path / f"{concept}.png")
        pictures.append(Emoji(concept, concept, "noto", tmp_path / f"{concept}.png", in_teacher=True))
    captions = [all_captions(picture) for picture in pictures]
    write_image_folder(load_images(pictures), captions, tmp_path / "folder")
    images = CaptionedImages(tmp_path / "folder")
    assert images.captions == [tuple(all_captions(picture)) for picture in pictures]
    expected = load_images(pictures) / 127.5 - 1
    torch.testing.assert_close(torch.cat([to_pixels(images[index], RESOLUTION) for index in range(2)]), expected)


def test_captions_take_the_right_article():
    assert caption("an emoji of {a}", "owl") == "an emoji of an owl"
    assert caption("an emoji of {a}", "dog") == "an emoji of a dog"
    assert Emoji("dog", "dog", "noto", Path("dog.png"), in_teacher=True).held_out is False


def test_a_stage_continues_where_it_was_saved(tmp_path):
    def train(total, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        run = Run(tmp_path / f"{stop}.pt", model=model, optimizer=optimizer)
        for step in run.steps(total, "test", save_every=2):
            if step == stop:
                return None
            model.weight.grad = torch.full((1, 1), float(step + 1))
            optimizer.step()
            run.report(loss=step)
        return model.weight.item()

    straight = train(6)
    assert train(6, stop=3) is None
    (tmp_path / "3.pt").rename(tmp_path / "5000.pt")
    assert train(6, stop=5000) == straight


def test_the_embedded_teacher_is_small_and_complete(teacher):
    files = [file for file in TEACHER_DIR.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert {"README.md", "NOTICE", "measurements.json"} <= {file.name for file in files}
    assert teacher.transformer.config.qk_norm == "rms_norm_across_heads"
    prompts = load_prompts(TEACHER_DIR / DISTILLATION_PROMPTS_FILE)
    evaluation = load_evaluation()
    held_out = {item.concept for item in evaluation if item.held_out}
    assert len(evaluation) == 600 and len(held_out) == 100
    assert held_out <= {item.concept for item in evaluation} and prompts.duplicates == prompts.empty == 0


def test_the_embedded_teacher_reads_a_prompt_the_same_with_and_without_the_instruction(teacher):
    prompt = "a fluent 3d emoji of a volcano"
    plain, instructed = (embed(teacher, prompt, lines) for lines in (None, INSTRUCTION))
    assert len(instructed) == len(plain) + 1  # the instruction's last token
    # Two layers of attention over 6 tokens reach 10 back: the last words stand beyond <bos> and the instruction alike.
    torch.testing.assert_close(instructed[-1], plain[-1], atol=1e-5, rtol=1e-5)


def test_the_embedded_teacher_draws_what_it_is_asked_for(teacher):
    pictures = draw(teacher, ["noto sunflower", "noto sailboat"], steps=4)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    means = [picture.resize((1, 1)).getpixel((0, 0)) for picture in pictures]
    assert means[0][0] - means[0][2] > 30  # a sunflower is more yellow than blue, and more so than a sailboat
    assert means[0][2] < means[1][2]


def test_a_flow_student_is_drawn_without_the_guidance_that_it_has_learned(tmp_path):
    student = load_pipeline(write_tiny_flow_student(tmp_path / "student"), device="cpu")
    (found,) = draw(student, ["an owl"], 2)
    (expected,) = draw(student, ["an owl"], 2, guidance_scale=1.0)
    assert found.tobytes() == expected.tobytes()
    (guided,) = draw(SanaPipeline.from_pretrained(tmp_path / "student"), ["an owl"], 2)
    assert guided.tobytes() != found.tobytes()


def test_the_embedded_teachers_dense_time_is_recognised_whatever_its_config_says(teacher):
    embeds, mask, _, _ = teacher.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=40)
    assert infer_timestep_scale(teacher.transformer, Text(embeds, mask)) == 1
    transformer = build_transformer().eval()
    transformer.load_state_dict(teacher.transformer.state_dict())
    transformer.register_to_config(timestep_scale=1.0)
    assert infer_timestep_scale(transformer, Text(embeds, mask)) == 1

    class PlainSana(type(transformer)):
        def forward(self, hidden_states, timestep, **kwargs):
            return super().forward(hidden_states, timestep=timestep / 1000, **kwargs)

    transformer.__class__ = PlainSana
    assert infer_timestep_scale(transformer, Text(embeds, mask)) == 1000
