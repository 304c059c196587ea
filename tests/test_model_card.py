import pytest
from huggingface_hub import ModelCard
from tiny import tiny_transformer, write_tiny_pipeline

from diffusers_tbcm.export import save_student_pipeline
from diffusers_tbcm.model_card import Measurement, render_model_card


@pytest.fixture
def exported(tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "tiny_teacher")
    student = tiny_transformer(guidance_embeds=True)
    training = {"steps": 7, "learning rate": 1e-5}
    return save_student_pipeline(student, teacher, tmp_path / "student", prompt="a dolphin", training=training)


def test_card_without_measurements_claims_none(exported):
    card = ModelCard.load(exported / "README.md")
    assert "## Results" not in card.text and "![" not in card.text
    assert card.data.eval_results is None
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "| learning rate | 1e-05 |" in card.text and "| teacher | `tiny_teacher` |" in card.text


def test_card_with_measurements_has_a_table_and_the_students_rows_as_metadata(exported):
    measurements = [
        Measurement("teacher", 20, {"MobileNet-FD": 1.5, "retrieval@5": 0.9}),
        Measurement("student", 1, {"MobileNet-FD": 2.25004, "retrieval@5": 0.75}),
    ]
    card = render_model_card(exported, measurements=measurements, dataset="Some Emoji", sample_grid="grid.png")
    card.save(exported / "README.md")
    card = ModelCard.load(exported / "README.md")
    assert (
        "| model | steps | MobileNet-FD | retrieval@5 |\n|---|---|---|---|\n| teacher | 20 | 1.5 | 0.9 |" in card.text
    )
    assert "| student | 1 | 2.25 | 0.75 |" in card.text and "](grid.png)" in card.text
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert results == [("Some Emoji", "MobileNet-FD", 2.25004), ("Some Emoji", "retrieval@5", 0.75)]
    with pytest.raises(ValueError, match="dataset is None"):
        render_model_card(exported, measurements=measurements)
