"""Digests of texts."""

from diffusers_tbcm.digests import digest_texts


def test_texts_are_told_apart_by_content_order_and_bounds():
    digests = [digest_texts(texts) for texts in (["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"], ["ab", "c", ""], [])]
    assert len({*digests}) == len(digests) and digest_texts(iter(["ab", "c"])) == digests[0]
