#!/usr/bin/env python
"""A page to draw with a few-step student, locally or as a Space of the Hub.

    python app.py                              # the student that stands beside this file
    python app.py --model outputs/quickstart   # or another

As a Space (SDK: gradio): this file, the variable MODEL_ID, and a requirements.txt that says
`diffusers_tbcm[demo] @ ADDRESS`, with the address of a wheel that you have made (`pip wheel --no-deps .`) and
uploaded, or git+https:// and that of a repository: no index has the package yet.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_tbcm.command_line import DEBUG_HELP, CommandParser, ending_in_words
from diffusers_tbcm.evaluation.drawing import call_options, draw, has_learned_guidance, load_pipeline
from diffusers_tbcm.scheduling_flow import is_matched


if TYPE_CHECKING:
    from gradio import Blocks

DEFAULT_MODEL = Path(__file__).with_name("sana_emoji_mini_tbcm")
STEPS = (1, 2, 4)
MAX_PICTURES = 8
MAX_GUIDANCE = 8
MAX_SEED = 2**31 - 1
EXAMPLES = (  # of what the embedded teacher's students have learned; another student draws what its own teacher does
    "owl",
    "fluent 3d bicycle",
    "rocket",
    "noto mushroom",
    "dolphin",
)
FONTS = ("system-ui", "sans-serif")  # the reader's own: nothing is fetched from elsewhere
CSS = ".gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto !important; }"


@dataclass(frozen=True)
class Result:
    """What the page shows after a press of the button.

    Args:
        pictures: each with its caption.
        seed: of the first picture; the others' follow it, 0 after the largest.
        report: numbers and time, in Markdown.
    """

    pictures: list[tuple[Image.Image, str]]
    seed: int
    report: str


def draw_pictures(
    pipeline: DiffusionPipeline,
    prompt: str,
    steps: int = 2,
    seed: int | None = None,
    randomize: bool = True,
    guidance_scale: float | None = None,
    num_pictures: int = 4,
) -> Result:
    """Draw a prompt several times.

    Args:
        pipeline: the student.
        prompt: what to draw.
        steps: inference steps.
        seed: of the first picture; None where its field is empty.
        randomize: take another seed than this.
        guidance_scale: as in the pipeline's call; None for the student's own, which a flow student has learned.
        num_pictures: how many, from consecutive seeds.

    Returns:
        The pictures, their seed and time.

    Raises:
        ValueError: where there is no prompt or no seed, or one of the numbers is out of range.
    """
    if not isinstance(prompt, str | None) or not (prompt or "").strip():
        raise ValueError("Say what to draw first.")
    if randomize:
        seed = random.randint(0, MAX_SEED)
    elif seed is None:
        raise ValueError("Give a seed, or ask for another one each time.")
    seed, steps = _whole("seed", seed), _whole("number of steps", steps)
    num_pictures = _whole("number of pictures", num_pictures)
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The seed is {seed}: it takes 0 to {MAX_SEED}.")
    if not 1 <= num_pictures <= MAX_PICTURES:
        raise ValueError(f"The number of pictures is {num_pictures}: it takes 1 to {MAX_PICTURES}.")
    seeds = [(seed + number) % (MAX_SEED + 1) for number in range(num_pictures)]
    options = call_options(pipeline, guidance_scale=guidance_scale)
    drawings = list(draw(pipeline, [prompt], steps=[steps], seeds=seeds, **options))
    seconds = sum(drawing.seconds for drawing in drawings) / num_pictures
    width, height = drawings[0].image.size
    report = f"**{seconds:.2f} s** a picture · {steps} step{'s' * (steps > 1)} · {width} x {height} pixels"
    return Result([(drawing.image, f"seed {drawing.seed}") for drawing in drawings], seed, report)


def _whole(name: str, value: Any) -> int:
    """Take a whole number as JSON has it: the page's API is sent anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"The {name} is {value!r}: it takes a whole number.")
    return int(value)


def build_page(pipeline: DiffusionPipeline, name: str) -> "Blocks":
    """Lay out the page.

    Args:
        pipeline: the student.
        name: what to call it.

    Returns:
        The `gradio.Blocks`; `page.launch(**launch_options())` serves it.
    """
    import gradio as gr

    # The names are those of the arguments of the page's API
    def press(
        prompt: str, steps: int, seed: int | None, randomize: bool, guidance_scale: float, num_pictures: int
    ) -> tuple[list[tuple[Image.Image, str]], int, str]:
        try:
            result = draw_pictures(pipeline, prompt, steps, seed, randomize, guidance_scale, num_pictures)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return result.pictures, result.seed, result.report

    own_guidance = call_options(pipeline)["guidance_scale"]
    method = "CDM" if is_matched(pipeline.scheduler) else "TBCM"
    largest_guidance = max(MAX_GUIDANCE, 2 * own_guidance)
    with gr.Blocks(title=method, analytics_enabled=False) as page:
        gr.Markdown(f"# Pictures in 1, 2 or 4 steps\n`{name}`, distilled by {method}")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label="Prompt", placeholder="What to draw", lines=2, autofocus=True)
                steps = gr.Radio(STEPS, value=2, label="Steps")
                num_pictures = gr.Slider(1, MAX_PICTURES, value=4, step=1, label="Pictures")
                guidance_scale = gr.Slider(
                    min(1, own_guidance),
                    largest_guidance,
                    value=own_guidance,
                    step=0.1,
                    label="Guidance",
                    visible=not has_learned_guidance(pipeline),
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                    randomize = gr.Checkbox(True, label="Another one each time", container=True)
                button = gr.Button("Draw", variant="primary", size="lg")
            with gr.Column(scale=3):
                pictures = gr.Gallery(
                    show_label=False, format="png", columns=2, height=572, object_fit="contain", elem_id="pictures"
                )
                report = gr.Markdown()
        gr.Examples([[example] for example in EXAMPLES], prompt, label="For example")
        inputs = [prompt, steps, seed, randomize, guidance_scale, num_pictures]
        outputs = [pictures, seed, report]
        gr.on([button.click, prompt.submit], press, inputs, outputs, api_name="draw", show_progress_on=pictures)
    return page


def launch_options() -> dict[str, Any]:
    """How the page looks and is served; errors go to the page."""
    from gradio.themes import Soft

    theme = Soft(font=FONTS, font_mono=("ui-monospace", "monospace"))
    return {"theme": theme, "css": CSS, "show_error": True, "footer_links": ["api", "gradio", "settings"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    default = os.environ.get("MODEL_ID", DEFAULT_MODEL)
    parser.add_argument("--model", default=default, help="pipeline folder or Hub id; by default $MODEL_ID")
    parser.add_argument("--lora", help="LoRA weights to load into it; --model may then be their teacher")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    args = parser.parse_args(argv)
    if args.model == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        parser.error(f"{DEFAULT_MODEL.name} is not beside this file: give --model, or MODEL_ID, a folder or Hub id.")
    name = DEFAULT_MODEL.name if args.model == DEFAULT_MODEL else args.model
    with ending_in_words({}, debug=args.debug):
        build_page(load_pipeline(args.model, lora=args.lora), name).launch(**launch_options())


if __name__ == "__main__":
    main()
