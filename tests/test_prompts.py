"""Where prompts come from."""

import csv
import inspect
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, IterableDataset, load_dataset

from diffusers_tbcm.data.columns import MJHQ_30K
from diffusers_tbcm.data.prompts import (
    EvaluationPrompts,
    PromptList,
    load_evaluation_prompts,
    load_prompts,
)


ROWS = ["a dog", "", "a café", None, " a dog ", "a cat"]
COLOURS = ["red", "lime", "blue"]


def test_text_files_hold_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa dog\r\n\n  a café  \n \na dog\na dog".encode())
    assert load_prompts(file) == PromptList(["a dog", "a café"], empty=2, duplicates=2)
    assert str(load_prompts(file)) == "2 prompts, after leaving out 2 empty and 2 duplicate ones"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt: 2 lines"),
        (b"a dog\ncaf\xe9\n", "not UTF-8: line 2 cannot be read. Save it as UTF-8"),
        ("a dog\n".encode("utf-16"), "not UTF-8: line 1"),
        ("a dog\n".encode("utf-16-le"), "not UTF-8 text: line 1 holds a NUL, as UTF-16"),
        ("a dog\n".encode("utf-32-be"), "line 1 holds a NUL"),
        (b"a dog\na\0cat\n", "line 2 holds a NUL"),
        (b"\x1f\x8b\x08\x00 of gzip", "not UTF-8: line 1"),
        (b"PK\x03\x04\x14\x00 of zip", "line 1 holds a NUL"),
        (b"a" * 100_001, "holds a prompt of 100,001 characters: is it one prompt a line"),
        (b'{"text": "a dog"}\n', "holds JSON: name it .json, or .jsonl"),
        (b'[\n  {"text": "a dog"}\n]\n', "holds JSON: name it"),
        (b'["a dog", "a cat"]\n', "holds JSON: name it"),
    ],
)
def test_bad_prompts_files_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(file)
    with pytest.raises(ValueError, match=message):
        load_evaluation_prompts(file)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def write_rows(folder, suffix):
    """ROWS as the column `caption` of a file, beside a column of numbers."""
    file = folder / f"captions{suffix}"
    numbers = list(range(len(ROWS)))
    if suffix.lower() in (".csv", ".tsv"):
        with file.open("w", encoding="utf-8", newline="") as stream:
            delimiter = "," if suffix.lower() == ".csv" else "\t"
            csv.writer(stream, delimiter=delimiter).writerows([("caption", "n"), *zip(ROWS, numbers, strict=True)])
    elif suffix == ".parquet":
        pq.write_table(pa.table({"caption": ROWS, "n": numbers}), file)
    else:
        rows = [{"caption": caption, "n": n} for caption, n in zip(ROWS, numbers, strict=True)]
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        file.write_text(text)
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "suffix", [".csv", ".json", ".jsonl", ".parquet", ".tsv", ".ndjson", ".CSV", ".Jsonl", ".TSV"]
)
def test_every_format_of_a_data_file_gives_its_captions(tmp_path, suffix, streaming):
    file = write_rows(tmp_path, suffix)
    expected = PromptList(["a dog", "a café", "a cat"], empty=2, duplicates=1)
    assert load_prompts(file, column="caption", streaming=streaming) == expected
    evaluated = load_evaluation_prompts(file, prompt_column="caption", label_column="n")
    assert evaluated == EvaluationPrompts(["a dog", "a café", "a dog", "a cat"], ["0", "2", "4", "5"])
    with pytest.raises(ValueError, match="has no column 'text': it has caption, n"):
        load_prompts(file, streaming=streaming)
    with pytest.raises(ValueError, match=r"column n' is not text: it holds 0"):
        load_prompts(file, column="n", streaming=streaming)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no prompt"):
        load_prompts(file, column="caption", streaming=streaming)
    file.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(file, column="caption", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_a_data_set_whose_images_are_not_decoded(tmp_path, streaming):
    data = Dataset.from_dict({"image": [{"path": None, "bytes": b"no image"}] * 3, "text": ["a", "b", "a"]})
    (tmp_path / "data").mkdir()
    data.cast_column("image", Image()).to_parquet(tmp_path / "data" / "train.parquet")
    assert load_prompts(tmp_path / "data", streaming=streaming) == PromptList(["a", "b"], empty=0, duplicates=1)


@pytest.mark.skipif(
    inspect.signature(IterableDataset.decode).parameters["num_threads"].default == 0,
    reason="this version of datasets decodes in threads only where it is told to",
)
def test_a_stream_that_decodes_in_threads_as_the_hubs_do_is_stopped_from_it(tmp_path, monkeypatch):
    data = Dataset.from_dict({"image": [{"path": None, "bytes": b"no image"}] * 2, "text": ["a", "b"]})
    data.cast_column("image", Image()).to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kw: load_dataset(*args, **kw).decode(num_threads=2))
    assert load_prompts(tmp_path, streaming=True).prompts == ["a", "b"]


def test_streaming_leaves_unread_what_max_prompts_does_not_need(tmp_path):
    for index in range(3):  # the last file cannot be read
        file = tmp_path / f"train-{index}.jsonl"
        file.write_text("not json" if index == 2 else f'{{"text": "a"}}\n{{"text": ""}}\n{{"text": "b{index}"}}\n')
    found = load_prompts(tmp_path, streaming=True, max_prompts=3)
    assert found == PromptList(["a", "b0", "b1"], empty=2, duplicates=1)


def test_max_prompts_counts_different_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\na\n\nb\nb\nc\n")
    assert load_prompts(file, max_prompts=2) == PromptList(["a", "b"], empty=1, duplicates=1)
    with pytest.raises(ValueError, match="max_prompts is 0"):
        load_prompts(file, max_prompts=0)


def test_training_and_evaluation_split_the_same_lines(tmp_path, caplog):
    file = tmp_path / "prompts"
    file.write_bytes(
        "a dog\u2028on grass\na cat\x0cwith a hat\r\na fox\x85asleep\ra \x0bbird\n\n\ufeff an owl ".encode()
    )
    expected = ["a dog\u2028on grass", "a cat\x0cwith a hat", "a fox\x85asleep", "a \x0bbird", "an owl"]
    assert load_prompts(file) == PromptList(expected, empty=1, duplicates=0)
    assert load_evaluation_prompts(file) == EvaluationPrompts(expected, [])
    assert "1 empty prompts of" in caplog.text
    file.write_bytes(b"[a dog, in brackets]\r\ra cat\r")
    assert load_prompts(file).prompts == load_evaluation_prompts(file).prompts == ["[a dog, in brackets]", "a cat"]


@pytest.mark.parametrize("read", [load_prompts, partial(load_prompts, streaming=True), load_evaluation_prompts])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("torn.jsonl", b'{"text": "a dog"}\n{"text": broken\n', "torn.jsonl' cannot be read: JSON parse error"),
        ("torn.parquet", b"PAR1 and no more", "torn.parquet' cannot be read: Parquet magic bytes not found"),
        ("torn.csv", b"text,n\na,1\na,1,2,3\n", "torn.csv' cannot be read: Error tokenizing data"),
        ("latin.csv", b"text\ncaf\xe9\n", "latin.csv' is not UTF-8: line 2"),
        ("wide.jsonl", '{"text": "a dog"}\n'.encode("utf-16-le"), "wide.jsonl' is not UTF-8 text: line 1 holds a NUL"),
        ("nul.jsonl", b'{"text": "a \\u0000dog"}\n', "which is no text: it has a NUL"),
        ("mixed.jsonl", b'{"text": "a dog"}\n{"text": 3}\n', "is not text: it holds 3"),
        ("head.tsv", b"text\tn\n", "has no rows|holds no prompt"),
        ("list.yaml", b"- a dog\n", "list.yaml' is of a kind that is not read: give .csv"),
        ("lines.txt.gz", b"\x1f\x8b\x08\x00", "lines.txt.gz' is of a kind that is not read"),
        ("folder.TXT", None, "folder.TXT' is a folder"),
        ("empty folder", None, "empty folder' cannot be read: .* any data files"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, read, name, content, message):
    file = tmp_path / name
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read(file)
    assert "\n" not in str(refused.value)


def test_a_files_name_is_no_pattern(tmp_path):
    (tmp_path / "1.csv").write_text("text\na cat\n")
    (tmp_path / "[1].csv").write_text("\ufefftext\r\na dog\r\n", encoding="utf-8")
    assert load_prompts(tmp_path / "[1].csv").prompts == ["a dog"]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    entries = [{"prompt": f"a {colour} dog", "concept": colour, "size": i} for i, colour in enumerate(COLOURS)]
    file.write_text("\n".join(map(json.dumps, [*entries, entries[0]])))
    return file


def test_prompts_of_a_text_file_keep_their_order_and_repetitions(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\na violin\na dog\n")
    assert load_evaluation_prompts(file) == EvaluationPrompts(["a dog", "a violin", "a dog"], [])
    assert load_evaluation_prompts(file, max_prompts=2).prompts == ["a dog", "a violin"]


def test_prompts_and_labels_are_columns(rows):
    found = load_evaluation_prompts(rows, prompt_column="prompt", label_column="concept", max_prompts=4)
    assert found == EvaluationPrompts(["a red dog", "a lime dog", "a blue dog", "a red dog"], [*COLOURS, "red"])


def test_bad_prompts_are_refused(rows, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n \n")
    with pytest.raises(ValueError, match="it has no columns"):
        load_evaluation_prompts(file, label_column="concept")
    file.write_text("")
    with pytest.raises(ValueError, match="holds no prompt"):
        load_evaluation_prompts(file)
    with pytest.raises(ValueError, match="does not exist"):
        load_evaluation_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no column 'text': it has prompt, concept, size"):
        load_evaluation_prompts(rows)
    with pytest.raises(ValueError, match=r"column size' is not text: it holds 0"):
        load_evaluation_prompts(rows, prompt_column="size")
    with pytest.raises(ValueError, match="max_prompts is 0"):
        load_evaluation_prompts(rows, prompt_column="prompt", max_prompts=0)
    rows.write_text('{"prompt": "a dog", "concept": "dog"}\n{"prompt": "a cat", "concept": null}\n')
    with pytest.raises(ValueError, match=r"label_column is 'concept': prompt 'a cat' of .* has none"):
        load_evaluation_prompts(rows, prompt_column="prompt", label_column="concept")


def test_the_prompts_of_mjhq_30k_are_known_by_name(monkeypatch, tmp_path):
    file = tmp_path / "meta_data.json"
    file.write_text(
        json.dumps({"0a": {"prompt": "a red dog", "category": "red"}, "0b": {"prompt": "b", "category": "lime"}})
    )
    asked = []
    monkeypatch.setattr(
        "diffusers_tbcm.data.prompts.hf_hub_download", lambda *names, **kind: asked.append((names, kind)) or file
    )
    assert load_evaluation_prompts(MJHQ_30K) == EvaluationPrompts(["a red dog", "b"], ["red", "lime"])
    assert asked == [((MJHQ_30K, "meta_data.json"), {"repo_type": "dataset"})]
