import importlib.util
import os
import subprocess
import sys
from functools import partial
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from huggingface_hub import ModelCard
from PIL import Image
from tiny import (
    TRAINED_WITH,
    tiny_tbcm_pipeline,
    tiny_transformer,
    write_tiny_flow_lora,
    write_tiny_flow_student,
    write_tiny_pipeline,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from diffusers_tbcm import SanaTBCMPipeline, TBCMScheduler
from diffusers_tbcm.__main__ import TRAINING_SCRIPTS, main
from diffusers_tbcm.backbones.sana import INSTRUCTION
from diffusers_tbcm.errors import Failure
from diffusers_tbcm.evaluation.drawing import Drawing, draw, load_pipeline
from diffusers_tbcm.evaluation.generate import file_name
from diffusers_tbcm.export.folders import save_student_pipeline
from diffusers_tbcm.export.hub import push_pipeline_to_hub
from diffusers_tbcm.export.record import StudentDescription
from diffusers_tbcm.lora import make_lora_student, save_lora


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny_tbcm_pipeline().save_pretrained(folder)
    return folder


def generate(model, out, *arguments, prompts=("a dog",)) -> None:
    main(["generate", "--model", str(model), "--out", str(out), "--prompt", *prompts, *map(str, arguments)])


def pixels(image) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


@pytest.fixture(scope="module")
def drawn_in_python(student):
    pipeline = SanaTBCMPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)

    def draw_pixels(prompt, steps, seed, **options) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return pixels(pipeline(prompt, num_inference_steps=steps, generator=generator, **options).images[0])

    return draw_pixels


def test_a_prompt_becomes_the_picture_that_the_pipeline_draws(student, drawn_in_python, tmp_path, capsys):
    out = tmp_path / "new" / "dog.png"
    generate(student, out, "--steps", 4, "--seed", 7, "--guidance_scale", 6, "--height", 32, "--width", 96)
    expected = drawn_in_python("a dog", 4, 7, guidance_scale=6, height=32, width=96)
    assert expected.shape == (32, 96, 3)
    np.testing.assert_array_equal(pixels(out), expected)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"1 picture in {out}", "4 steps: not timed, as the first picture warms up"]


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(student, drawn_in_python, tmp_path):
    prompts_file = tmp_path / "prompts.txt"
    prompts_file.write_text("a dog\n\nthree little birds\na dog\n")
    out = tmp_path / "many"
    arguments = ["--steps", "1", "2", "--seed", "0", "5", "--out", str(out)]
    main(["generate", "--model", str(student), "--prompts_file", str(prompts_file), *arguments])
    assert sorted(path.name for path in out.iterdir()) == [
        f"{prompt}-{steps}-steps-seed-{seed}.png"
        for prompt in ("000-a-dog", "001-three-little-birds")
        for steps in (1, 2)
        for seed in (0, 5)
    ]
    for prompt, steps, seed in (("a dog", 1, 0), ("three little birds", 2, 5)):
        file = out / file_name(Drawing(prompt, steps, seed, None, 0.0), int(prompt != "a dog"))
        np.testing.assert_array_equal(pixels(file), drawn_in_python(prompt, steps, seed))
    pictures = {path.read_bytes() for path in out.iterdir()}
    assert len(pictures) == 8  # prompt, steps and seed all matter


def test_the_first_picture_is_not_timed(student, monkeypatch, tmp_path, capsys):
    taken = {(1, 0): 50.0, (1, 1): 1.0, (1, 2): 2.0, (1, 3): 6.0, (4, 0): 7.0, (4, 1): 8.0, (4, 2): 9.0, (4, 3): 9.0}
    pictures = [Drawing("a dog", steps, seed, Image.new("RGB", (8, 8)), taken[steps, seed]) for steps, seed in taken]
    monkeypatch.setattr("diffusers_tbcm.evaluation.drawing.draw", lambda *_, **__: iter(pictures))
    generate(student, tmp_path, "--steps", 1, 4, "--seed", 0, 1, 2, 3)
    assert capsys.readouterr().out.splitlines()[1:] == ["1 step: 2.00 s a picture", "4 steps: 8.50 s a picture"]


def test_a_picture_that_is_none_is_an_error_and_not_kept(tmp_path, recwarn):
    pipeline = tiny_tbcm_pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[0] = float("nan")
    pipeline.save_pretrained(tmp_path / "student")
    with pytest.raises(SystemExit, match=r"The picture of 'a dog' at 2 steps is not finite: .* shows as black"):
        generate(tmp_path / "student", tmp_path / "dog.png")
    with pytest.raises(SystemExit, match="is not finite"):
        generate(tmp_path / "student", tmp_path / "many")
    assert not (tmp_path / "dog.png").exists() and not list((tmp_path / "many").iterdir())
    assert not [warning for warning in recwarn if "not finite" in str(warning.message)]  # the error says it


@pytest.mark.parametrize("name", ["student-0.6b", "run.v2", "pictures"])
def test_a_folder_may_have_a_dot(student, tmp_path, name):
    generate(student, tmp_path / name, "--steps", 1)
    assert [path.suffix for path in (tmp_path / name).iterdir()] == [".png"]


def test_a_folder_that_is_there_may_be_named_like_a_file(student, tmp_path):
    (tmp_path / "owls.gif").mkdir()
    generate(student, tmp_path / "owls.gif", "--steps", 1)
    assert len([*(tmp_path / "owls.gif").iterdir()]) == 1


def test_the_instruction_can_be_left_out(student, drawn_in_python, tmp_path):
    generate(student, tmp_path / "bare.png", "--no-complex_human_instruction")
    bare = drawn_in_python("a dog", 2, 0, complex_human_instruction=None)
    np.testing.assert_array_equal(pixels(tmp_path / "bare.png"), bare)
    assert (bare != drawn_in_python("a dog", 2, 0)).any()


def test_what_the_command_line_leaves_out_is_the_student_s_own(tmp_path):
    pipeline = tiny_tbcm_pipeline()
    trained = {"max_sequence_length": 8, "complex_human_instruction": None}
    pipeline.scheduler = TBCMScheduler(guidance_scales=[2.0], call_options=trained)
    pipeline.save_pretrained(tmp_path / "student")
    pipeline, seen = tiny_tbcm_pipeline(), []
    for flags, told in (
        ([], {}),
        (["--guidance_scale", 6], {"guidance_scale": 6.0}),
        (["--max_sequence_length", 20], {"max_sequence_length": 20}),
        (["--complex_human_instruction"], {"complex_human_instruction": INSTRUCTION}),
    ):
        generate(tmp_path / "student", tmp_path / "x.png", "--steps", 1, *flags, prompts=["a little white dog"])
        options = {"guidance_scale": 2.0, **trained, **told}
        expected = next(draw(pipeline, ["a little white dog"], steps=[1], seeds=[0], **options)).image
        drawn = pixels(tmp_path / "x.png").astype(int)
        # Weights from a file lie elsewhere in memory, which may round a sum in another way: by a level
        np.testing.assert_allclose(drawn, pixels(expected).astype(int), rtol=0, atol=1)
        assert all(abs(drawn - other).max() > 1 for other in seen)
        seen.append(drawn)


def test_a_grid_has_a_row_a_prompt_and_a_column_a_step_count_and_seed(student, drawn_in_python, tmp_path):
    prompts = ("a dog", "a bird " * 20)
    generate(student, tmp_path / "grid.png", "--grid", "--steps", 1, 2, "--seed", 3, 4, prompts=prompts)
    grid = Image.open(tmp_path / "grid.png")
    gap, cell = 8, 128
    left, top = grid.width - 4 * (cell + gap), grid.height - 2 * (cell + gap)
    assert top == 32 and left < 400  # a long prompt is shortened
    for row, prompt in enumerate(prompts):
        for column, (steps, seed) in enumerate(((1, 3), (1, 4), (2, 3), (2, 4))):
            box = (left + column * (cell + gap), top + row * (cell + gap))
            expected = Image.fromarray(drawn_in_python(prompt, steps, seed))
            np.testing.assert_array_equal(
                pixels(grid.crop((*box, box[0] + cell, box[1] + cell))),
                pixels(expected.resize((cell, cell), Image.Resampling.LANCZOS)),
            )


def test_a_lora_makes_a_student_of_its_teacher(tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    lora_student = make_lora_student(SanaPipeline.from_pretrained(teacher).transformer, rank=2)
    with torch.no_grad():
        for name, weight in lora_student.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    save_lora(lora_student, tmp_path / "lora")
    generate(teacher, tmp_path / "dog.png", "--lora", tmp_path / "lora", "--steps", 1)

    reference = SanaTBCMPipeline.from_pretrained(teacher, scheduler=TBCMScheduler())
    reference.load_lora_weights(str(tmp_path / "lora"))
    expected = next(draw(reference, ["a dog"], steps=[1], seeds=[0])).image
    np.testing.assert_array_equal(pixels(tmp_path / "dog.png"), pixels(expected))


def test_a_pipeline_is_loaded_as_asked(student):
    pipeline = load_pipeline(student, dtype=torch.bfloat16, device="cpu")
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}


def test_a_flow_student_draws_as_any_other(tmp_path):
    model, out = write_tiny_flow_student(tmp_path / "student"), tmp_path / "x.png"
    plain = SanaPipeline.from_pretrained(model)
    generate(model, out, "--steps", 4, "--seed", 7, "--height", 32, "--complex_human_instruction")
    image = plain(
        "a dog",
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(7),
        height=32,
        width=64,
        use_resolution_binning=False,
        max_sequence_length=16,
    ).images[0]
    np.testing.assert_array_equal(pixels(out), pixels(image))
    generate(model, tmp_path / "grid.png", "--grid", "--steps", 1, 2, 4, prompts=("a dog", "a bird"))
    out.unlink()
    for flags, message in (
        (["--guidance_scale", 4.5], "--guidance_scale is 4.5, but this student has learned its guidance and takes"),
        (["--height", 30], "divisible by 32 but are 30 and 64"),
    ):
        with pytest.raises(SystemExit, match=message):
            generate(model, out, *flags)
    assert not out.exists()


def test_a_flow_lora_makes_a_student_of_its_teacher(tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    lora = write_tiny_flow_lora(tmp_path / "lora", teacher)
    generate(teacher, tmp_path / "x.png", "--lora", lora, "--steps", 2)
    plain = SanaPipeline.from_pretrained(teacher)  # whose scheduler has the same shift
    plain.load_lora_weights(lora)
    options = {"guidance_scale": 1.0, "use_resolution_binning": False, **TRAINED_WITH}
    image = plain("a dog", sigmas=[1.0, 0.5], generator=torch.Generator().manual_seed(0), **options).images[0]
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), pixels(image))
    with pytest.raises(SystemExit, match="is a student already: give the teacher, 'teacher'"):
        generate(write_tiny_flow_student(tmp_path / "student"), tmp_path / "y.png", "--lora", lora)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "--steps is 0: it takes at least 1"),
        (["--steps", 2, 2], "--steps has a value twice"),
        (["--seed", -1], "--seed is -1: it takes 0 to"),
        (["--width", 0], "--width is 0"),
        (["--max_sequence_length", 0], "--max_sequence_length is 0"),
        (["--steps", 1, 2], "is one file for 2 pictures: name a folder, or add --grid"),
        (["--prompt", "a dog", "a bird"], "is one file for 2 pictures"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--guidance_scale", "nan"], "--guidance_scale: nan is no finite number"),
        (["--guidance_scale=-inf"], "--guidance_scale: -inf is no finite number"),
        *(
            (
                ["--out", f"owl.{suffix}"],
                f"'owl.{suffix}' ends in .{suffix}, but pictures are saved as .jpeg, .jpg, .png",
            )
            for suffix in ("gif", "tiff", "GIF", "avif", "bmp", "pdf", "mp4", "txt")
        ),
        (["--out", "folder", "--grid"], "--grid is one picture, but --out 'folder' is a folder"),
        (["--out", __file__], "is a file, and no picture's"),
        (["--out", f"{__file__}/x.png"], "cannot be written, as "),
        (["--out", f"{__file__}/many/pictures"], "cannot be written, as "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        generate("no-such-model", tmp_path / "x.png", *arguments)
    assert message in capsys.readouterr().err


def test_an_out_that_allows_no_writing_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SystemExit, match="2"):
        generate("no-such-model", tmp_path / "new" / "x.png")
    assert f"as {str(tmp_path)!r} allows no writing" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_prompts_file_is_read_before_the_model(tmp_path, capsys):
    prompts_file = tmp_path / "prompts.txt"
    for content, message in ((None, "does not exist"), ("\n", "holds no prompt")):
        if content is not None:
            prompts_file.write_text(content)
        with pytest.raises(SystemExit, match="2"):
            main(["generate", "--model", "no-such-model", "--prompts_file", str(prompts_file), "--out", "x"])
        assert message in capsys.readouterr().err


def test_errors_in_words(student, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=r"^diffusers-tbcm generate: error: model 'no/such' is neither a pipeline"):
        generate("no/such", tmp_path / "x.png")
    with pytest.raises(
        SystemExit, match="is no few-step student, neither TBCM's nor CDM's: give one, or the LoRA that makes it one"
    ):
        generate(write_tiny_pipeline(tmp_path / "teacher"), tmp_path / "x.png")
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="lora 'no/such' is neither LoRA weights nor"):
        generate(student, tmp_path / "x.png", "--lora", "no/such")
    with pytest.raises(SystemExit, match="--height is 30, but has to be a positive multiple of 8 pixels"):
        generate(student, tmp_path / "x.png", "--height", 30)
    assert not (tmp_path / "x.png").exists()


@pytest.fixture
def push(monkeypatch):
    """A stand-in for the function that pushes, which takes its arguments and no others."""
    stand_in = create_autospec(push_pipeline_to_hub, return_value="the commit's address")
    monkeypatch.setattr("diffusers_tbcm.export.hub.push_pipeline_to_hub", stand_in)
    return stand_in


def test_push_passes_its_arguments_on_and_says_where_it_went(push, tmp_path, capsys):
    defaults = {"token": None, "private": None, "license": None, "tag": None, "include_training_state": False}
    main(["push", str(tmp_path), "me/student"])
    push.assert_called_with(tmp_path, "me/student", **defaults)
    main(["push", str(tmp_path), "me/student", "--private", "--license", "mit", "--tag", "v1", "--token", "hf_secret"])
    given = {"token": "hf_secret", "private": True, "license": "mit", "tag": "v1", "include_training_state": False}
    push.assert_called_with(tmp_path, "me/student", **given)
    main(["push", str(tmp_path), "me/student", "--include_training_state"])
    push.assert_called_with(tmp_path, "me/student", **{**defaults, "include_training_state": True})
    printed = capsys.readouterr()
    assert printed.out == "the commit's address\n" * 3 and printed.err == ""


@pytest.mark.parametrize("error", [ValueError, Failure])
def test_a_push_that_fails_ends_in_words(push, tmp_path, error):
    push.side_effect = error("the Hub refused the push")
    with pytest.raises(SystemExit, match=r"^diffusers-tbcm push: error: the Hub refused the push$"):
        main(["push", str(tmp_path), "me/student"])


def test_card_writes_the_readme_again(tmp_path, capsys):
    teacher, folder = write_tiny_pipeline(tmp_path / "teacher"), tmp_path / "exported"
    description = StudentDescription("a dog", {"method": "TBCM", "steps": 3})
    save_student_pipeline(tiny_transformer(guidance_embeds=True), teacher, folder, description)
    card = folder / "README.md"
    exported = card.read_text()
    card.write_text("spoilt")
    main(["card", str(folder)])
    assert card.read_text() == exported and (folder / "abandoned" / "README.md").read_text() == "spoilt"
    main(["card", str(folder), "--license", "mit", "--model_id", "me/student"])
    assert ModelCard.load(card).data.license == "mit" and 'from_pretrained("me/student"' in card.read_text()
    assert capsys.readouterr().out == f"{card}\n" * 2

    with pytest.raises(SystemExit, match=r"has no training\.json, which training writes for the card"):
        main(["card", str(teacher)])


@pytest.mark.parametrize("command", [["push", "no-such-folder", "me/student"], ["card", "no-such-folder"]])
def test_a_folder_has_to_exist(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "folder 'no-such-folder' does not exist" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom diffusers_tbcm.__main__ import main\n"
        "try:\n    main(['generate', '--help'])\n"
        "finally:\n    assert not {'torch', 'diffusers', 'transformers', 'PIL'} & {*sys.modules}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--prompts_file" in result.stdout, result.stderr


def test_the_package_gives_what_it_lists_and_nothing_else():
    import diffusers_tbcm

    assert all(hasattr(diffusers_tbcm, name) for name in diffusers_tbcm.__all__)
    assert diffusers_tbcm.TBCMScheduler is TBCMScheduler
    with pytest.raises(AttributeError, match="has no attribute 'Scheduler'"):
        _ = diffusers_tbcm.Scheduler


def test_train_is_accelerate_launch_of_a_script_with_its_own_flags(monkeypatch):
    started = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    main(["train", "scm", "--train_data_dir", "pictures", "--help"])
    (launch,) = started
    assert launch.module and launch.training_script == "diffusers_tbcm.scripts.train_scm"
    assert launch.training_script_args == ["--train_data_dir", "pictures", "--help"]
    with pytest.raises(SystemExit):
        main(["train", "other"])


def failed_worker(code):
    """What several processes end in."""
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="none")
    return ChildFailedError("train", {1: failure})


@pytest.mark.parametrize("failure", [partial(subprocess.CalledProcessError, cmd="train --hub_token x"), failed_worker])
@pytest.mark.parametrize("code", [1, 2, 75])
def test_train_ends_with_the_scripts_exit_code_and_no_words_of_the_launcher(failure, code, monkeypatch, capsys):
    def launch(arguments):
        raise failure(code)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    with pytest.raises(SystemExit) as ended:
        main(["train", "scm"])
    assert ended.value.code == code and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "spelt", [["--hub_token", "hf_x"], ["--hub_token=hf_x"], ["--hub-token", "hf_x"], ["--hub_tok=hf_x"]]
)
def test_train_keeps_a_token_out_of_the_launchers_command_line(spelt, monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda program, arguments: started.append((arguments[5:], os.environ["HF_TOKEN"])))
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda arguments: None)
    main(["train", "scm", "--push_to_hub", *spelt, "--hub_model_id", "me/x"])
    assert started == [(["--push_to_hub", "--hub_model_id", "me/x"], "hf_x")]


def test_a_launch_that_fails_shows_no_token():
    """accelerate would print the command that failed."""
    flags = ["--push_to_hub", "--hub_token", "hf_0123456789abcdef", "--nonsense"]
    flags += ["--pretrained_model_name_or_path", "none", "--output_dir", "none"]
    command = [sys.executable, "-m", "diffusers_tbcm", "train", "tbcm_distill", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (
        result.returncode == 2 and "train_tbcm_distill.py: error: unrecognized arguments: --nonsense" in result.stderr
    )
    assert "0123456789" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["push", ".", "me/x", "--tokn", "hf_0123456789abcdef"],
        ["push", ".", "me/x", "--secret-token=mysecretvalue"],
        ["push", ".", "me/x", "--private=hf_0123456789abcdef"],
        ["hf_0123456789abcdef"],
    ],
)
def test_no_message_shows_a_token(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    printed = capsys.readouterr().err
    assert "***" in printed and "0123456789" not in printed and "mysecret" not in printed


def test_a_wrong_training_command_ends_in_the_scripts_line(tmp_path):
    command = [sys.executable, "-m", "diffusers_tbcm", "train", "tbcm_distill", "--prompts_file", "none.txt"]
    command += ["--pretrained_model_name_or_path", "none", "--output_dir", str(tmp_path / "run")]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert finished.returncode == 2 and "Traceback" not in finished.stderr
    assert finished.stderr.endswith("train_tbcm_distill.py: error: prompts file 'none.txt' does not exist\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_every_script_that_can_be_started_is_there(script):
    assert importlib.util.find_spec(f"diffusers_tbcm.scripts.{TRAINING_SCRIPTS[script]}") is not None


@pytest.mark.parametrize("kind", ["picture", "text", "link", "link to nowhere"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_what_this_program_did_not_draw_is_never_replaced(kind, in_folder, tmp_path, capsys):
    """Refused before anything is loaded: there is no model."""
    name = "000-a-dog-2-steps-seed-0.png"
    file, notes = tmp_path / name, tmp_path / "mine.png"
    Image.new("RGB", (4, 4), "red").save(notes)
    if kind == "text":
        notes.write_text("notes")
    if kind.startswith("link"):
        file.symlink_to(notes if kind == "link" else tmp_path / "nowhere.png")
    else:
        notes.rename(file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(SystemExit, match="2"):
        generate("nowhere", tmp_path if in_folder else file)
    assert f"{name}' is there already and was not drawn by this program" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp"])
def test_what_it_drew_itself_and_an_empty_file_are(student, suffix, tmp_path):
    out = tmp_path / f"dog.{suffix}"
    out.touch()  # as `mktemp` makes one
    arguments = ("--steps", 1, "--max_sequence_length", 16, "--no-complex_human_instruction")
    generate(student, out, *arguments)
    first = out.read_bytes()
    (tmp_path / "link.png").symlink_to(out)
    generate(student, out, *arguments, "--seed", 1)
    second = out.read_bytes()
    assert first != second
    generate(student, tmp_path / "link.png", *arguments)
    assert (tmp_path / "link.png").is_symlink() and pixels(out).shape == (64, 64, 3) and out.read_bytes() != second
    generate(student, tmp_path / "grid.png", *arguments, "--seed", 0, 1, "--grid")
    generate(student, tmp_path / "grid.png", *arguments, "--seed", 2, 3, "--grid")
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "link.png", "grid.png"}


@pytest.mark.parametrize("name", ["", " ", "-", "a" * 300, "a\0.png"])
@pytest.mark.parametrize("command", [["generate", "--model", "m", "--prompt", "dog", "--out"], ["card"], ["push"]])
def test_what_names_no_file_is_refused(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*command, name, *(["me/x"] if command == ["push"] else [])])
    error = capsys.readouterr().err
    assert "names no file or folder" in error and len(error) < 250
    assert not list(tmp_path.iterdir())


def test_a_prompt_of_other_bytes_than_utf_8_is_named(student, tmp_path):
    with pytest.raises(SystemExit, match="no text in UTF-8"):
        generate(student, tmp_path / "dog.png", prompts=[os.fsdecode(b"caf\xe9")])
