"""Preference scorers on tiny stand-ins of the networks that they were published as."""

import json
import shutil

import pytest
import torch
from PIL import Image
from published import OpenCLIP, VisualEncoder
from tiny import CHARACTERS, save_tiny_clip
from torch import nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffusers_tbcm.evaluation.features import pictures_to_tensor
from diffusers_tbcm.evaluation.preference import (
    CLIP_MEAN,
    CLIP_STD,
    HPSv2Scorer,
    ImageRewardScorer,
    PickScorer,
)
from diffusers_tbcm.evaluation.text_image import CLIPScorer


PROMPTS = ["a dog", "a violin", "three little birds"]


@pytest.fixture(scope="module")
def pictures():
    pixels = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def randomise(network, std=0.2):
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        nn.init.normal_(weight, std=std, generator=generator)
    return network.eval().requires_grad_(False)


def normalised(pictures):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pictures_to_tensor(pictures) - mean) / std


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_pickscore_is_the_scaled_cosine(clip, pictures):
    scorer = PickScorer(clip)
    scores = scorer(iter(pictures), PROMPTS, batch_size=2)
    inputs = scorer.processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = scorer.model(**inputs)
    expected = scorer.model.logit_scale.exp() * (outputs.image_embeds * outputs.text_embeds).sum(dim=1)
    assert scores.shape == (3,) and expected.abs().max() > 1
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    clip_scores = 100 * scores.clamp(min=0) / scorer.model.logit_scale.exp()
    torch.testing.assert_close(CLIPScorer(clip)(pictures, PROMPTS), clip_scores, rtol=1e-4, atol=1e-4)


def test_a_pickscore_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"PickScore model .* is neither a folder nor a model on the Hub"):
        PickScorer(tmp_path / "none")


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """HPSv2's two files of tiny weights, beside the config and tokenizer of their CLIP, and the networks."""
    folder = save_tiny_clip(
        tmp_path_factory.mktemp("hps"),
        text={"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
        vision={"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        projection_dim=12,
        hidden_act="gelu",
    )
    (folder / "model.safetensors").unlink()
    networks = {}
    for version, name in (("2.0", "HPS_v2_compressed.pt"), ("2.1", "HPS_v2.1_compressed.pt")):
        network = randomise(OpenCLIP(2 * len(CHARACTERS) + 2), std=0.2 if version == "2.1" else 0.3)
        torch.save({"epoch": 1, "state_dict": network.state_dict()}, folder / name)
        networks[version] = network
    return folder, networks


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_hpsv2_is_the_published_networks_cosine(hps, pictures, version):
    folder, networks = hps
    scorer = HPSv2Scorer(folder, version)
    scores = scorer(iter(pictures), PROMPTS, batch_size=2)
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", max_length=77)["input_ids"]
    end = scorer.tokenizer.eos_token_id
    tokens = torch.tensor([row[: row.index(end) + 1] + [0] * (76 - row.index(end)) for row in tokens])  # as open_clip
    expected = 100 * networks[version](normalised(pictures), tokens)
    assert scorer.name == f"HPSv{version}" and expected.std() > 0.1
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)


def test_hpsv2_sees_a_picture_of_another_shape_whole(hps, pictures):
    scorer = HPSv2Scorer(hps[0])
    wide = Image.new("RGB", (64, 32))
    wide.paste(pictures[0].resize((64, 32)), (0, 0))
    seen = []
    scorer.model.vision_model.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["pixel_values"]), with_kwargs=True
    )
    scorer([wide], PROMPTS[:1])
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    assert seen[0].shape == (1, 3, 32, 32)
    for rows in (seen[0][0, :, :8], seen[0][0, :, 24:]):
        torch.testing.assert_close(rows, black.view(3, 1, 1).expand(3, 8, 32))
    assert (seen[0][0, :, 8:24] - black.view(3, 1, 1)).abs().mean() > 0.5


def test_weights_that_are_not_hpsv2s_are_named(hps, tmp_path):
    folder, _ = hps
    with pytest.raises(ValueError, match=r"HPSv2 model .* has no HPS_v2.1_compressed.pt"):
        HPSv2Scorer(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save({"state_dict": {"visual.proj": torch.ones(2, 2)}}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"HPSv2 weights .* cannot be loaded"):
        HPSv2Scorer(tmp_path)


TEXT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 58,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "max_position_embeddings": 40, "encoder_width": 24,
    "model_type": "bert", "add_cross_attention": True, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """ImageReward's files, tiny, and the networks that they are of."""
    folder = tmp_path_factory.mktemp("reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "med_config.json").write_text(json.dumps(TEXT))
    vision = randomise(VisualEncoder(size=32, patch=8, width=128, layers=2, heads=2), std=0.1)
    text = randomise(
        BlipTextModel(BlipTextConfig(**TEXT, encoder_hidden_size=128, is_decoder=True), add_pooling_layer=False),
        std=0.6,
    )
    head = randomise(nn.Sequential(nn.Linear(24, 16), nn.Dropout(), nn.Linear(16, 4), nn.Dropout(), nn.Linear(4, 1)))
    weights = {f"blip.visual_encoder.{name}": value for name, value in vision.state_dict().items()}
    weights |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    weights |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.text_proj.bias": torch.ones(2),
    }
    weights |= {f"mlp.layers.{name}": value for name, value in head.state_dict().items()}
    torch.save(weights, folder / "ImageReward.pt")
    return folder, vision, text, head


def test_image_reward_is_the_published_networks(reward, pictures):
    folder, vision, text, head = reward
    scorer = ImageRewardScorer(folder)
    scores = scorer(iter(pictures), PROMPTS, batch_size=2)
    tokens = scorer.tokenizer(PROMPTS, padding="longest", return_tensors="pt")  # padding does not matter
    read = text(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        encoder_hidden_states=vision(normalised(pictures)),
    ).last_hidden_state
    expected = (head(read[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert (scorer(pictures, PROMPTS[::-1]) - expected)[[0, 2]].abs().min() > 1e-4


def test_image_reward_looks_at_the_middle_and_reads_what_it_can(reward, pictures):
    folder, *_ = reward
    scorer = ImageRewardScorer(folder)
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste(pictures[0], (32, 0))
    torch.testing.assert_close(scorer([wide], PROMPTS[:1]), scorer(pictures[:1], PROMPTS[:1]))
    assert scorer(pictures[:1], ["dog " * 200]).isfinite().all()


def test_weights_that_are_not_image_rewards_are_named(reward, tmp_path):
    folder, *_ = reward
    with pytest.raises(ValueError, match=r"ImageReward model .* has no ImageReward.pt"):
        ImageRewardScorer(tmp_path)
    for name in ("vocab.txt", "med_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({"mlp.layers.0.weight": torch.ones(2, 2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"ImageReward weights .* cannot be loaded"):
        ImageRewardScorer(tmp_path)


def test_scorers_of_other_weights_have_other_digests(hps, reward):
    folder, _ = hps
    digests = {
        HPSv2Scorer(folder, "2.0").digest,
        HPSv2Scorer(folder, "2.1").digest,
        ImageRewardScorer(reward[0]).digest,
    }
    assert len(digests) == 3 and HPSv2Scorer(folder, "2.1").digest in digests
