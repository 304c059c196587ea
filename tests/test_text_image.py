import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny_clip

from diffusers_tbcm.evaluation.features import MobileNetFeatures
from diffusers_tbcm.evaluation.preference import PickScorer
from diffusers_tbcm.evaluation.text_image import HEAD_FILE, CLIPScorer, HeadScorer, TextImageHead, pooled_text


TEACHER = Path(__file__).parents[1] / "examples" / "tbcm" / "sana_emoji_mini"
MAX_HEAD_BYTES = 10**6
PROMPTS = ["a dog", "a violin", "three little birds"]


@pytest.fixture(scope="module")
def pictures():
    pixels = torch.randint(0, 256, (3, 40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_clip_scores_are_its_own_similarities(clip, pictures):
    scorer = CLIPScorer(clip)
    scores = scorer(iter(pictures), PROMPTS, batch_size=2)
    inputs = scorer.processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = scorer.model(**inputs)
    expected = 100 * outputs.logits_per_image.diagonal() / scorer.model.logit_scale.exp()
    assert scores.shape == (3,) and expected.abs().max() > 1
    torch.testing.assert_close(scores, expected.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_clip_reads_what_it_can_of_a_long_prompt(clip, pictures):
    scorer = CLIPScorer(clip)
    assert scorer(pictures[:1], ["dog " * 200]).isfinite().all()


def test_a_clip_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"CLIP model .* is neither a folder nor a model on the Hub"):
        CLIPScorer(tmp_path / "none")


def without(file, part):
    """Take some weights out of a file."""
    kept = {name: weight for name, weight in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("scorer", "kind"), [(CLIPScorer, "CLIP"), (PickScorer, "PickScore")])
def test_a_clip_without_some_of_its_weights_does_not_score(scorer, kind, tmp_path):
    without(save_tiny_clip(tmp_path) / "model.safetensors", "text_model.")
    message = rf"{kind} model .* cannot be loaded: it lacks \d+ of the weights of a CLIPModel, such as text_model\."
    with pytest.raises(ValueError, match=message):
        scorer(tmp_path)


def test_a_head_whose_text_encoder_lacks_a_weight_does_not_score(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "teacher", ignore=shutil.ignore_patterns("transformer", "vae"))
    without(tmp_path / "teacher" / "text_encoder" / "model.safetensors", "embed_tokens")
    with pytest.raises(ValueError, match=r"text encoder .* lacks 1 of the weights of a \w+, such as embed_tokens"):
        HeadScorer(tmp_path / "teacher")


def test_a_head_compares_every_picture_with_every_text_by_cosine():
    head = TextImageHead(6, 5, 4)
    images, texts = torch.randn(3, 6), torch.randn(2, 5)
    similarity = head(images, texts)
    assert similarity.shape == (3, 2) and similarity.abs().max() <= 1 + 1e-6
    expected = torch.nn.functional.cosine_similarity(head.image(images)[:, None], head.text(texts)[None], dim=-1)
    torch.testing.assert_close(similarity, expected)


@pytest.fixture(scope="module")
def scorer():
    return HeadScorer(TEACHER)


def test_the_embedded_head_is_small_and_says_how_good_it_is(scorer):
    assert (TEACHER / HEAD_FILE).stat().st_size < MAX_HEAD_BYTES
    with safe_open(TEACHER / HEAD_FILE, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    held_out, trained = (scorer.accuracy[f"{kind} pairs"] for kind in ("held-out", "trained"))
    assert (scorer.accuracy["captions"], held_out["pictures"], trained["pictures"]) == (766, 100, 666)
    assert 0.4 < held_out["top-5"] < trained["top-5"] and trained["top-1 concept"] > 0.9


def test_the_score_is_the_heads_cosine_of_each_picture_with_its_own_prompt(scorer, pictures):
    scores = scorer(iter(pictures), PROMPTS, batch_size=2)
    features = MobileNetFeatures().extract(pictures)
    texts = pooled_text(PROMPTS, scorer.tokenizer, scorer.text_encoder)
    with torch.no_grad():
        expected = 100 * scorer.head(features, texts).diagonal().clamp(min=0)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-2)


def test_a_text_is_the_mean_of_its_own_tokens(scorer):
    alone = pooled_text(["noto violin"], scorer.tokenizer, scorer.text_encoder)
    texts = ["noto violin", "a fluent 3d emoji of a leaf fluttering in wind"]
    beside = pooled_text(texts, scorer.tokenizer, scorer.text_encoder)
    torch.testing.assert_close(beside[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_folder_without_a_head_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no text_image_head\.safetensors"):
        HeadScorer(tmp_path)


def test_a_head_that_cannot_be_used_is_named(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "teacher", ignore=shutil.ignore_patterns("transformer", "vae"))
    head = tmp_path / "teacher" / HEAD_FILE
    whole = head.read_bytes()
    for broken in (whole[:-1], b"", b"a head"):
        head.write_bytes(broken)
        with pytest.raises(ValueError, match=r"text-image head .* cannot be loaded"):
            HeadScorer(tmp_path / "teacher")
    save_file({"image.weight": torch.ones(2, 2)}, head, metadata={"accuracy": "{}"})
    with pytest.raises(ValueError, match=r"text-image head .* cannot be loaded"):
        HeadScorer(tmp_path / "teacher")
    weights = load_file(TEACHER / HEAD_FILE)
    weights["text.weight"][0, 0] = torch.nan
    save_file(weights, head, metadata={"accuracy": "{}"})
    with pytest.raises(ValueError, match="holds weights that are not finite"):
        HeadScorer(tmp_path / "teacher")
    head.write_bytes(whole)
    (tmp_path / "teacher" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"`tokenizer` reads every prompt alike|[Tt]okenizer"):
        HeadScorer(tmp_path / "teacher")
