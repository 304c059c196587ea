"""Where prompts come from."""

import csv
import inspect
import json

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
    [(None, "does not exist"), (b"\n \n", "holds no prompt"), (b"caf\xe9\n", "not UTF-8: line 1")],
)
def test_bad_prompts_files_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(file)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def write_rows(folder, suffix):
    """ROWS as the column `caption` of a file, beside a column of numbers."""
    file = folder / f"captions{suffix}"
    numbers = list(range(len(ROWS)))
    if suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("caption", "n"), *zip(ROWS, numbers, strict=True)])
    elif suffix == ".parquet":
        pq.write_table(pa.table({"caption": ROWS, "n": numbers}), file)
    else:
        rows = [{"caption": caption, "n": n} for caption, n in zip(ROWS, numbers, strict=True)]
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        file.write_text(text)
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_of_a_data_file_gives_its_captions(tmp_path, suffix, streaming):
    file = write_rows(tmp_path, suffix)
    expected = PromptList(["a dog", "a café", "a cat"], empty=2, duplicates=1)
    assert load_prompts(file, column="caption", streaming=streaming) == expected
    with pytest.raises(ValueError, match="has no column 'text': it has caption, n"):
        load_prompts(file, streaming=streaming)
    with pytest.raises(ValueError, match=r"column 'n' of .* is not text: it holds 0"):
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
    with pytest.raises(ValueError, match=r"prompt 1 of .* is ' '"):
        load_evaluation_prompts(file)
    with pytest.raises(ValueError, match="it has no columns"):
        load_evaluation_prompts(file, label_column="concept")
    file.write_text("")
    with pytest.raises(ValueError, match="holds no prompt"):
        load_evaluation_prompts(file)
    with pytest.raises(ValueError, match="does not exist"):
        load_evaluation_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no column 'text': it has prompt, concept, size"):
        load_evaluation_prompts(rows)
    with pytest.raises(ValueError, match=r"prompt 0 of .* is 0, which is no text"):
        load_evaluation_prompts(rows, prompt_column="size")


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
