import json
import re
from unittest.mock import MagicMock

import pytest
from diffusers import SanaPipeline, SanaSprintPipeline
from families import tiny_sd3
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from tiny import tiny_transformer, write_tiny_pipeline

from diffusers_tbcm import TBCMScheduler
from diffusers_tbcm.export.folders import save_flow_student, save_student_pipeline
from diffusers_tbcm.export.model_card import render_model_card
from diffusers_tbcm.export.record import Measurement, Sample, StudentDescription, save_metrics
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler


SAMPLES = [
    Sample(prompt, steps, Image.new("RGB", (8, 8), color))
    for prompt, color in (("a dog | a cat", "red"), ('a "violin": \n one', "blue"))
    for steps in (1, 4)
]
# The Hub's model card specification: the keys that it reads, of those that these cards have.
HUB_KEYS = {
    "base_model", "base_model_relation", "library_name", "license", "license_link", "license_name", "model-index",
    "pipeline_tag", "tags", "widget",
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("teachers") / "tiny_teacher")


@pytest.fixture
def export(teacher, tmp_path):
    def save(variants=(), scheduler=None, prompt="a dolphin", **changes):
        description = StudentDescription(prompt, **{"training": {"steps": 7, "learning rate": 1e-5}, **changes})
        student = tiny_transformer(guidance_embeds=True)
        options = {"variants": variants, "scheduler": scheduler}
        return save_student_pipeline(student, teacher, tmp_path / "student", description, **options)

    return save


def test_card_without_measurements_and_samples_claims_none(export):
    card = ModelCard.load(export() / "README.md")
    assert "## Results" not in card.text and "![" not in card.text
    assert "variant" not in card.text
    metadata = card.data.to_dict()
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}  # a folder of one's own is no base_model
    assert metadata["library_name"] == "diffusers" and metadata["pipeline_tag"] == "text-to-image"
    assert {"tbcm", "image-free-distillation"} <= set(metadata["tags"]) and "lora" not in metadata["tags"]
    assert "| learning rate | 1e-05 |" in card.text and "| teacher | `tiny_teacher` |" in card.text


def test_metrics_in_the_folder_are_the_cards_table_and_the_students_rows_its_metadata(export):
    folder = export()
    measurements = [
        Measurement("teacher", 20, {"MobileNet-FD": 1.5, "retrieval@5": 0.9}),
        Measurement("student", 1, {"MobileNet-FD": 2.25004, "gap closed": 0.75}),
    ]
    save_metrics(folder, measurements, dataset="Some Emoji", command="python measure.py --n 5")
    render_model_card(folder).save(folder / "README.md")
    card = ModelCard.load(folder / "README.md")
    assert "Measured on Some Emoji with `python measure.py --n 5`:" in card.text
    assert (
        "| model | steps | MobileNet-FD | retrieval@5 | gap closed |\n|---|---|---|---|---|\n"
        "| teacher | 20 | 1.5 | 0.9 |  |\n| student | 1 | 2.25 |  | 0.75 |\n"
    ) in card.text
    assert card.data.model_name == "student"
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert results == [("Some Emoji", "MobileNet-FD", 2.25004), ("Some Emoji", "gap closed", 0.75)]

    save_metrics(folder, measurements[:1], dataset="Some Emoji", command="python measure.py")
    card = render_model_card(folder)
    assert card.data.eval_results is None and "## Results" in card.text


def test_the_plain_example_draws_as_the_student_was_distilled(export, monkeypatch, tmp_path):
    assert "options[" not in ModelCard.load(export() / "README.md").text  # nothing beside the stock defaults
    reading = {"max_sequence_length": 8, "complex_human_instruction": None}
    folder = export(scheduler=TBCMScheduler(guidance_scales=[1.5, 2.0, 2.5], call_options=reading))
    example = re.findall(r"```python\n(.*?)```", ModelCard.load(folder / "README.md").text, re.DOTALL)[0]
    asked = []
    monkeypatch.setattr(SanaSprintPipeline, "__call__", lambda self, prompt, **kw: asked.append(kw) or MagicMock())
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert len(asked) == 3
    for call in asked:
        assert call.items() >= {"guidance_scale": 2.0, **reading}.items()


@pytest.mark.parametrize("reading", [{}, {"max_sequence_length": 8, "complex_human_instruction": None}])
def test_the_example_of_a_flow_student_is_a_stock_call_with_times_and_without_guidance(
    teacher, monkeypatch, tmp_path, reading
):
    scheduler = FlowStudentScheduler(3.0, {"height": 64, "width": 64, **reading})
    save_flow_student(
        tiny_transformer(), teacher, tmp_path / "student", StudentDescription("a dolphin", {}), scheduler=scheduler
    )
    text = ModelCard.load(tmp_path / "student" / "README.md").text
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    asked = []
    monkeypatch.setattr(SanaPipeline, "__call__", lambda self, prompt, **kw: asked.append(kw) or MagicMock())
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    call = {"guidance_scale": 1.0, "height": 64, "width": 64, "use_resolution_binning": False, **reading}
    assert asked == [{"sigmas": sigmas, **call} for sigmas in ([1.0], [1.0, 0.5], [1.0, 0.75, 0.5, 0.25])]
    assert 'diffusers-tbcm generate --model "student" --prompt' in text and "SanaTBCM" not in text


@pytest.mark.parametrize(("tokens", "named"), [(256, False), (300, True)])
def test_the_example_names_what_its_own_pipeline_would_do_otherwise(tmp_path, tokens, named):
    """The pipeline of SD3 reads 256 tokens, that of Sana 300."""
    pipeline = tiny_sd3()
    pipeline.save_pretrained(tmp_path / "teacher")
    scheduler = FlowStudentScheduler(3.0, {"height": 64, "width": 64, "max_sequence_length": tokens})
    description = StudentDescription("a dolphin", {})
    save_flow_student(
        pipeline.transformer, tmp_path / "teacher", tmp_path / "student", description, scheduler=scheduler
    )
    text = ModelCard.load(tmp_path / "student" / "README.md").text
    assert (f'options["max_sequence_length"] = {tokens}\n' in text) is named


def test_a_card_is_readable_however_many_and_long_the_prompts_are(export):
    prompts = [f"{number} " + "an endless story | " * 300 for number in range(30)]
    samples = [Sample(prompt, steps, Image.new("RGB", (1024, 768))) for prompt in prompts for steps in (1, 2, 4)]
    folder = export(samples=samples, prompt=prompts[0])
    pictures = sorted((folder / "images").iterdir())
    assert len(pictures) == 48
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (512, 384)
    text = (folder / "README.md").read_text()
    assert len(text) < 50_000 and "0 an endless story" in text and "15 an endless story" in text
    assert "16 an endless" not in text
    record = json.loads((folder / "training.json").read_text())
    assert record["samples"][3]["prompt"] == prompts[1]  # the whole of it


def test_a_full_card_has_what_the_hub_reads_and_every_picture_it_shows(export):
    folder = export(samples=SAMPLES, variants=("bf16",), license="apache-2.0")
    SAMPLES[0].image.save(folder / "grid.png")
    save_metrics(folder, [Measurement("student", 1, {"FD": 2.0})], dataset="12 prompts", command="python measure.py")
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**record, "base_model": "someone/teacher"}))
    render_model_card(folder, license="other", model_id="me/student").save(folder / "README.md")

    card = ModelCard.load(folder / "README.md")
    metadata = card.data.to_dict()
    assert metadata.keys() == HUB_KEYS - {"license_link", "license_name"}
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("someone/teacher", "finetune")
    assert metadata["license"] == "other" and card.data.model_name == "me/student"
    assert [(example["text"], example["parameters"]) for example in metadata["widget"]] == [
        (sample.prompt, {"num_inference_steps": sample.num_inference_steps}) for sample in SAMPLES
    ]
    for example, sample in zip(metadata["widget"], SAMPLES, strict=True):
        with Image.open(folder / example["output"]["url"]) as image:
            assert image.tobytes() == sample.image.tobytes()

    html = MarkdownIt().enable("table").render(card.text)
    pictures = re.findall(r'<img src="([^"]*)"', html)
    assert len(pictures) == 1 + len(SAMPLES) and all((folder / picture).is_file() for picture in pictures)
    assert "<td>a dog | a cat</td>" in html and "<td>a &quot;violin&quot;:   one</td>" in html
    assert html.count("<table>") == 3 and "{{" not in html and "{%" not in html
    assert 'custom_pipeline="me/student", trust_remote_code=True' in card.text
    assert 'variant="bf16", torch_dtype=torch.bfloat16' in card.text and "fp16" not in card.text
    for snippet in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        compile(snippet, "README.md", "exec")


def test_a_sample_that_is_gone_is_not_shown(export, tmp_path):
    folder = export(samples=SAMPLES)
    (folder / "images" / "00.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "01.png")
    edit(folder / "training.json", lambda record: record["samples"][1].update(file="nowhere.png"))
    card = render_model_card(folder)
    assert "images/00.png" not in str(card) and "nowhere.png" not in str(card)
    assert [shown["output"]["url"] for shown in card.data.to_dict()["widget"]] == ["images/02.png", "images/03.png"]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "entries",
    [
        {"samples": "x"}, {"samples": [{"prompt": 1}]}, {"samples": [3]}, {"samples": None}, {"prompt": None},
        {"license": "mit"}, {"license": None}, {"training": []}, {"base_model": 3}, {"model_id": None},
        {"resolution": "64"}, {"teacher": None}, {"image_free": "no"}, {"adapter": "x"},
    ],
)  # fmt: skip
def test_a_training_record_that_is_none_is_named(export, entries):
    folder = export(samples=SAMPLES)
    edit(folder / "training.json", lambda record: record.update(entries))
    with pytest.raises(ValueError, match=f"training.json is not the one that training writes: {next(iter(entries))} "):
        render_model_card(folder)


ROW = {"model": "student", "num_inference_steps": 1, "metrics": {"FD": 1.0}, "intervals": {}}


@pytest.mark.parametrize(
    "metrics",
    [
        {}, {"measurements": 3}, {"measurements": [{"model": "student"}]}, {"measurements": [ROW | {"metrics": 3}]},
        {"measurements": [ROW | {"metrics": {"FD": None}}]}, {"measurements": [ROW | {"metrics": {"FD": "1"}}]},
        {"measurements": [ROW | {"intervals": {"FD": 3}}]}, {"measurements": [ROW], "unknown": 1},
    ],
)  # fmt: skip
def test_metrics_that_are_none_are_named(export, metrics):
    folder = export()
    whole = {"measurements": [ROW], "dataset": "x", "command": "y", "details": {}}
    (folder / "metrics.json").write_text(json.dumps({**whole, **metrics} if metrics else {}))
    with pytest.raises(ValueError, match=r"is not the metrics\.json that an evaluation writes: "):
        render_model_card(folder)
