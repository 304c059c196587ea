"""Columns of data sets and data files."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from diffusers_tbcm.data.columns import column_values, load_data


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def folder(tmp_path):
    """Data whose pictures cannot be decoded."""
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"]), "text": Value("string")})
    rows = {"image": [{"path": None, "bytes": b"none"}] * 3, "label": [1, None, 0], "text": ["a", None, "c"]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path / "data"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_is_read_alone_and_classes_by_their_names(folder, streaming):
    data = load_data(folder, "text", "label", streaming=streaming)
    assert list(column_values(data, "text")) == ["a", None, "c"]
    assert list(column_values(data, "label")) == ["blue", None, "red"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_beside_those_there_are(folder, tmp_path, streaming):
    with pytest.raises(ValueError, match=r"data' has no column 'caption': it has image, label, text"):
        load_data(folder, "text", "caption", streaming=streaming)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"a": 1, "b": 2}))
    with pytest.raises(ValueError, match=r"rows.jsonl' has no column 'text': it has a, b"):
        load_data(file, "text", streaming=streaming)
    assert list(column_values(load_data(file, "b", streaming=streaming), "b")) == [2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_words_are_not_taken_for_nothing(tmp_path, suffix, separator, streaming):
    file = tmp_path / f"words{suffix}"
    words = ["None", "null", "NA", "nan", "N/A", "a dog"]
    rows = [("text", "n"), *((word, str(number)) for number, word in enumerate(words)), ("", "6"), ("last", "")]
    file.write_text("".join(f"{separator.join(row)}\n" for row in rows))
    data = load_data(file, "text", "n", streaming=streaming)
    assert list(column_values(data, "text")) == [*words, None, "last"]
    assert list(column_values(data, "n")) == [0, 1, 2, 3, 4, 5, 6, None]


def test_a_stream_reads_no_further_than_it_is_asked_to(tmp_path):
    (tmp_path / "train-0.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "train-1.jsonl").write_text("not json")
    values = column_values(load_data(tmp_path, "text", streaming=True), "text")
    assert [next(values), next(values)] == ["a", "b"]
