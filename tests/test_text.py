import pytest
import torch
from tiny import tiny_sana_pipeline, tiny_tbcm_pipeline, tiny_text_encoder, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GemmaTokenizerFast

from diffusers_tbcm import SanaTBCMPipeline
from diffusers_tbcm.text import Text, check_tokenizer


def text(lengths, pooled=False):
    """Prompts whose tokens are all of their number, padded with zeros."""
    longest = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    embeds = mask[..., None] * torch.arange(1.0, len(lengths) + 1)[:, None, None].expand(-1, -1, 3)
    return Text(embeds, mask, torch.arange(2.0 * len(lengths)).view(-1, 2) if pooled else None)


def tokens(found):
    """The prompts' own tokens, without padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(found.embeds, found.mask, strict=True)]


@pytest.mark.parametrize("pooled", [False, True])
def test_whatever_is_done_to_a_text_every_prompt_keeps_its_tokens(pooled):
    short, long = text([2, 1], pooled), text([4], pooled)
    both = Text.cat([short, long])
    assert both.embeds.shape == (3, 4, 3) and both.lengths() == both.mask.sum(1).tolist() == [2, 1, 4]
    assert tokens(both) == tokens(short) + tokens(long)
    assert tokens(both[torch.tensor([2, 0, 0])]) == [tokens(both)[i] for i in (2, 0, 0)]
    assert tokens(short.repeat(2)) == [tokens(short)[i] for i in (0, 0, 1, 1)]
    assert tokens(long.expand(3)) == tokens(long) * 3
    assert tokens(short[1:].pad(7)) == tokens(short)[1:]
    assert tokens(both.roll(1)) == [tokens(both)[i] for i in (2, 0, 1)]
    if pooled:
        assert both.pooled.tolist() == [[0, 1], [2, 3], [0, 1]]
        assert short.repeat(2).pooled.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
        assert long.expand(2).pooled.shape == (2, 2) and short[1:].pooled.tolist() == [[2, 3]]
    else:
        assert both.pooled is None


def test_padding_is_masked_and_an_unmasked_text_has_none():
    padded = text([2]).pad(5)
    assert padded.mask.tolist() == [[1, 1, 0, 0, 0]] and padded.embeds[0, 2:].eq(0).all()
    assert Text.unmasked(torch.zeros(2, 3, 4)).mask.tolist() == [[1] * 3] * 2


def test_what_holds_no_values_is_taken_for_whole():
    prompts = text([2, 1], pooled=True)
    fake = prompts._map(FakeTensorMode().from_tensor)
    assert prompts.holds_values and not fake.holds_values and not prompts.to("meta").holds_values
    assert fake.lengths() == prompts.to("meta").lengths() == [2, 2]


def test_arguments_are_those_of_a_network():
    plain, pooled = text([2]), text([2], pooled=True)
    assert {*plain.arguments()} == {"encoder_hidden_states", "encoder_attention_mask"}
    assert pooled.arguments()["pooled_projections"] is pooled.pooled
    assert len(plain) == 1


def test_a_tokenizer_has_to_read_prompts_and_to_be_the_text_encoders(tmp_path):
    check_tokenizer(tiny_tokenizer(), tiny_text_encoder())
    nothing = GemmaTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab={"<unk>": 0}, merges=[], unk_token="<unk>")))
    with pytest.raises(ValueError, match=r"`tokenizer` reads every prompt alike: its files, such as tokenizer\.json"):
        check_tokenizer(nothing, tiny_text_encoder())
    for tokens, words in ((100, "`tokenizer` has 344 tokens and `text_encoder` embeds 100"), (2000, "embeds 2000")):
        encoder = tiny_text_encoder()
        encoder.resize_token_embeddings(tokens)
        with pytest.raises(ValueError, match=words):
            check_tokenizer(tiny_tokenizer(), encoder)
    encoder.resize_token_embeddings(352)  # rounded up to a multiple of 32
    check_tokenizer(tiny_tokenizer(), encoder)


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_a_pipeline_without_a_tokenizers_files_is_refused(tmp_path, left):
    tiny_tbcm_pipeline().save_pretrained(tmp_path)
    for path in (tmp_path / "tokenizer").iterdir():
        if path.name not in left:
            path.unlink()
    with pytest.raises((ValueError, OSError), match=r"`tokenizer` reads every prompt alike|[Tt]okenizer"):
        SanaTBCMPipeline.from_pretrained(tmp_path)
    teacher = tiny_sana_pipeline()
    assert SanaTBCMPipeline(**{**teacher.components, "scheduler": None, "tokenizer": None}).tokenizer is None
