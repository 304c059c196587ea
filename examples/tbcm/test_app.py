"""The demo: what its button does, without gradio; and the page in a real browser, where there is one."""

import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from tiny import tiny_tbcm_pipeline, write_tiny_flow_student

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.evaluation.drawing import call_options, load_pipeline
from examples.tbcm import app


CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_tbcm_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, prompt, steps, seed, guidance_scale=4.5) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "generator": generator}
    return np.asarray(pipeline(prompt, **options).images[0])


def test_the_button_draws_the_pipeline_s_pictures_and_says_how_long_they_took(pipeline, monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 5.5])  # two pictures of 1 and 0.5 seconds
    monkeypatch.setattr("diffusers_tbcm.evaluation.drawing.time.perf_counter", lambda: next(clock))
    result = app.draw_pictures(pipeline, "a dog", 4, 7, False, 6.0, 2)
    assert result.seed == 7
    assert result.report == "**0.75 s** a picture · 4 steps · 64 x 64 pixels"
    assert [caption for _, caption in result.pictures] == ["seed 7", "seed 8"]
    for (picture, _), seed in zip(result.pictures, (7, 8), strict=True):
        np.testing.assert_array_equal(np.asarray(picture), drawn(pipeline, "a dog", 4, seed, 6.0))


def test_a_random_seed_is_shown_and_draws_the_same_again(pipeline):
    first = app.draw_pictures(pipeline, "a dog", 1, 7, True, 4.5, 1)
    assert first.seed != 7  # but once in 2^31 times
    again = app.draw_pictures(pipeline, "a dog", 1, first.seed, False, 4.5, 1)
    np.testing.assert_array_equal(np.asarray(first.pictures[0][0]), np.asarray(again.pictures[0][0]))


def test_empty_fields_are_asked_for(pipeline):
    with pytest.raises(ValueError, match="Say what to draw first"):
        app.draw_pictures(pipeline, " ", 1, 0, False, 4.5, 1)
    with pytest.raises(ValueError, match="Give a seed"):
        app.draw_pictures(pipeline, "a dog", 1, None, False, 4.5, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "Say what to draw first"),
        ({"seed": -1}, "The seed is -1: it takes 0 to 2147483647"),
        ({"seed": 2**31}, "The seed is 2147483648"),
        ({"num_pictures": 0}, "The number of pictures is 0: it takes 1 to 8"),
        ({"num_pictures": 9}, "The number of pictures is 9"),
        *(({"prompt": value}, "Say what to draw first") for value in (5, ["a dog"], "\n\t")),
        ({"prompt": "\ud800"}, "no text in UTF-8"),
        *(({"steps": value}, "The number of steps is") for value in ("2", None, 1.5, True)),
        ({"steps": 0}, "`num_inference_steps` is 0"),
        *(({"seed": value}, "The seed is") for value in ("3", 1.5, [1], float("nan"), float("inf"), True)),
        *(({"num_pictures": value}, "The number of pictures is") for value in ("2", 1.5, None)),
        *(({"guidance_scale": value}, "`guidance_scale` is") for value in ("4", [1], 1e300, float("nan"))),
    ],
)
def test_what_the_api_is_sent_out_of_range_is_refused(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        app.draw_pictures(pipeline, **{"prompt": "a dog", "seed": 0, "randomize": False, **changes})


def test_every_seed_that_is_shown_can_be_entered_again(pipeline, monkeypatch):
    monkeypatch.setattr("random.randint", lambda low, high: high)
    result = app.draw_pictures(pipeline, "a dog", 1, None, True, 4.5, 2)
    assert [caption for _, caption in result.pictures] == [f"seed {app.MAX_SEED}", "seed 0"]
    again = app.draw_pictures(pipeline, "a dog", 1, 0, False, 4.5, 1)
    np.testing.assert_array_equal(np.asarray(result.pictures[1][0]), np.asarray(again.pictures[0][0]))


def test_a_flow_student_has_no_guidance_to_choose(tmp_path):
    gradio = pytest.importorskip("gradio", reason="the page needs the demo extra: pip install -e '.[demo]'")
    student = load_pipeline(write_tiny_flow_student(tmp_path / "student"), device="cpu")
    page = app.build_page(student, "student")
    (slider,) = [block for block in page.blocks.values() if getattr(block, "label", None) == "Guidance"]
    assert isinstance(slider, gradio.Slider) and not slider.visible and slider.value == 1
    (title,) = [block for block in page.blocks.values() if "Pictures in" in str(getattr(block, "value", ""))]
    assert "distilled by CDM" in title.value

    result = app.draw_pictures(student, "a dog", 4, 7, False, slider.value, 1)
    plain = SanaPipeline.from_pretrained(tmp_path / "student")
    expected = plain(
        "a dog",
        sigmas=[1.0, 0.75, 0.5, 0.25],
        generator=torch.Generator().manual_seed(7),
        **call_options(student),
    ).images[0]
    np.testing.assert_array_equal(np.asarray(result.pictures[0][0]), np.asarray(expected))
    with pytest.raises(ValueError, match="`guidance_scale` is 3, but this student has learned its guidance"):
        app.draw_pictures(student, "a dog", 4, 7, False, 3, 1)


def test_a_student_drawn_with_its_own_noise_is_still_tbcm_s(pipeline):
    pytest.importorskip("gradio", reason="the page needs the demo extra: pip install -e '.[demo]'")
    student = SanaTBCMPipeline(**pipeline.components | {"scheduler": TBCMScheduler(stochastic_sampling=False)})
    blocks = app.build_page(student, "tiny").blocks.values()
    (title,) = (block for block in blocks if "Pictures in" in str(getattr(block, "value", "")))
    assert "distilled by TBCM" in title.value


def test_the_guidance_is_the_student_s_own(pipeline):
    gradio = pytest.importorskip("gradio", reason="the page needs the demo extra: pip install -e '.[demo]'")
    for scales, own in (([1.5, 2.0, 2.5], 2.0), ([0.5], 0.5), ([20.0], 20.0), (None, 4.5)):
        student = SanaTBCMPipeline(**pipeline.components | {"scheduler": TBCMScheduler(guidance_scales=scales)})
        student.set_progress_bar_config(disable=True)
        blocks = app.build_page(student, "tiny").blocks.values()
        (slider,) = (block for block in blocks if isinstance(block, gradio.Slider) and block.label == "Guidance")
        assert slider.value == own and slider.minimum <= own <= slider.maximum
        result = app.draw_pictures(student, "a dog", 1, 7, False, num_pictures=1)
        np.testing.assert_array_equal(np.asarray(result.pictures[0][0]), drawn(student, "a dog", 1, 7, own))


def test_the_api_has_names_and_a_mistake_is_no_traceback(pipeline, capfd):
    pytest.importorskip("gradio", reason="the page needs the demo extra: pip install -e '.[demo]'")
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    page = app.build_page(pipeline, "tiny")
    _, url, _ = page.launch(**app.launch_options(), prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        parameters = client.view_api(return_format="dict")["named_endpoints"]["/draw"]["parameters"]
        named = ["prompt", "steps", "seed", "randomize", "guidance_scale", "num_pictures"]
        assert [parameter["parameter_name"] for parameter in parameters] == named
        pictures, seed, report = client.predict(
            prompt="a dog", steps=1, seed=7, randomize=False, num_pictures=1, api_name="/draw"
        )
        assert seed == 7 and len(pictures) == 1 and "1 step ·" in report
        with pytest.raises(AppError, match="Say what to draw first"):
            client.predict(prompt=" ", api_name="/draw")
    finally:
        page.close()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_without_a_student_it_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(app, "DEFAULT_MODEL", tmp_path / "student")
    monkeypatch.delenv("MODEL_ID", raising=False)
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert "student is not beside this file: give --model, or MODEL_ID, a folder or Hub id" in capsys.readouterr().err
    monkeypatch.setenv("MODEL_ID", str(tmp_path / "another"))
    with pytest.raises(SystemExit, match="another' is neither a pipeline folder nor a model on the Hub"):
        app.main()


@pytest.fixture
def page(pipeline):
    """The demo in Chromium, and every address that it asked for."""
    pytest.importorskip("gradio", reason="the page needs the demo extra: pip install -e '.[demo]'")
    sync_playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    if CHROMIUM is None:
        pytest.skip("the page is tested in Chromium: apt-get install chromium")
    demo = app.build_page(pipeline, "tiny")
    _, url, _ = demo.launch(**app.launch_options(), prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1180, "height": 860})
            page.set_default_timeout(60_000)
            page.requested = []
            page.on("request", lambda request: page.requested.append(request.url))
            page.goto(url)
            yield page
            browser.close()
    finally:
        demo.close()


def test_in_a_browser_a_prompt_becomes_pictures(page, pipeline):
    page.get_by_label("Prompt").fill("three little birds")
    page.get_by_label("1", exact=True).check()
    page.get_by_label("Another one each time").uncheck()
    page.get_by_label("Seed").fill("5")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("s a picture").wait_for()

    pictures = page.locator("#pictures .grid-container img")
    pictures.last.wait_for()
    assert pictures.count() == 4
    for index, seed in enumerate((5, 6, 7, 8)):
        shown = page.request.get(pictures.nth(index).get_attribute("src")).body()
        expected = drawn(pipeline, "three little birds", 1, seed)
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(shown)).convert("RGB")), expected)

    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("Say what to draw first.").wait_for()
    hosts = {url.split("/")[2].split(":")[0] for url in page.requested if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}  # no fonts, scripts or counters from elsewhere
