"""Drawing with a pipeline from the outside: load it by name, draw prompts in batches or one by one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SCMScheduler
from huggingface_hub import constants, hf_hub_download
from PIL import Image

from ..backbones import backbone_of, backbone_of_index
from ..backbones.loading import check_prompt_pipeline, load_networks
from ..backbones.sana import INSTRUCTION
from ..components import read_object
from ..draws import draw_generator
from ..errors import in_a_line, loading, loading_by_name
from ..export.record import is_flow_adapter
from ..finite import NOT_FINITE, FiniteImageProcessor, is_finite
from ..images import pixels_to_pil
from ..lora import LORA_FILE
from ..pipeline_folder import SCHEDULER, TRAINING_RECORD
from ..pipeline_sana_tbcm import STOCK_CALL_OPTIONS, SanaTBCMPipeline
from ..scheduling_flow import GUIDANCE_SCALE, FlowStudentScheduler, is_flow_student, student_sigmas
from ..scheduling_tbcm import TBCMScheduler
from ..text import Text
from ..versions import dtype_argument


@dataclass(frozen=True)
class Drawing:
    """A picture, and what it takes to draw it again.

    Args:
        prompt: what was asked for.
        num_inference_steps: steps taken.
        seed: of the picture's own generator.
        image: the picture.
        seconds: that it took, the prompt's embedding included.
    """

    prompt: str
    num_inference_steps: int
    seed: int
    image: Image.Image
    seconds: float


def load_pipeline(
    model: str | PathLike[str],
    *,
    lora: str | PathLike[str] | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> DiffusionPipeline:
    """Load a student, or its teacher with the LoRA that makes it one.

    Args:
        model: pipeline folder or Hub id.
        lora: folder, file or Hub id of LoRA weights to load into it.
        variant: the half-precision weights to load of it, such as `"bf16"`; None for the ordinary ones.
        dtype: of weights and computation.
        device: by default the first GPU where there is one, else the CPU.

    Returns:
        The pipeline, without progress bars of its own: a `SanaTBCMPipeline` or, of a flow student such as CDM's, its
        own class with a `FlowStudentScheduler`. `call_options` says how to draw with it, and `draw_pictures` draws.

    Raises:
        ValueError: where `model` or `lora` is not found or damaged, `model` without `lora` is no student, or `device`
            is none of this machine's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else find_device(device)
    with loading_by_name("model", model, "a pipeline folder"):
        model_index = DiffusionPipeline.load_config(str(model))
        is_tbcm = model_index.get("scheduler") == ["diffusers", SCMScheduler.__name__]
    with loading("model", model):
        flow_scheduler = _flow_scheduler(model)
    record = {} if lora is None else lora_record(lora)
    flow_adapter = record["adapter"] if is_flow_adapter(record) else None
    if record.get("adapter") and (flow_scheduler is not None or (is_tbcm and flow_adapter is not None)):
        raise ValueError(
            f"lora {str(lora)!r} makes a student of a teacher, but model {str(model)!r} is a student already: give"
            f" the teacher, {record.get('teacher')!r}"
        )
    if lora is not None and flow_adapter is not None:
        with loading("lora", lora):
            flow_scheduler = FlowStudentScheduler(
                flow_adapter["shift"], flow_adapter["call_options"], flow_adapter.get("stochastic_sampling", False)
            )
    if not is_tbcm and flow_scheduler is None and lora is None:
        raise ValueError(
            f"model {str(model)!r} is no few-step student, neither TBCM's nor CDM's: give one, or the LoRA that makes"
            " it one"
        )
    options: dict[str, Any] = {"variant": variant, **dtype_argument(dtype)}
    with loading("model", model):
        folder = model if Path(model).is_dir() else DiffusionPipeline.download(str(model), variant=variant)
        optional = () if flow_scheduler is None else backbone_of_index(model_index, str(model)).OPTIONAL_COMPONENTS
        options |= load_networks(Path(folder), dtype, variant, without=optional)
        if flow_scheduler is not None:
            pipeline = DiffusionPipeline.from_pretrained(str(folder), scheduler=flow_scheduler, **options)
            check_prompt_pipeline(pipeline)
            factor = pipeline.image_processor.config.vae_scale_factor  # pixels a token, where latents are packed
            pipeline.image_processor = FiniteImageProcessor(vae_scale_factor=factor)
        elif is_tbcm:
            pipeline = SanaTBCMPipeline.from_pretrained(str(folder), **options)
        else:  # a teacher's scheduler belongs to the teacher's many steps
            pipeline = SanaTBCMPipeline.from_pretrained(str(folder), scheduler=TBCMScheduler(), **options)
    if lora is not None:
        # The Hub's offline mode asks for the name of the file, as it cannot look what there is
        unseen = constants.HF_HUB_OFFLINE and not Path(lora).exists()
        named = {"weight_name": LORA_FILE} if unseen or record.get("adapter") else {}
        with loading_by_name("lora", lora, "LoRA weights"):
            load_lora(pipeline, lora, **named)
            if flow_adapter is not None and flow_adapter["timestep_scale"] is not None:
                # The teacher's config may not say in what time it was trained
                pipeline.transformer.register_to_config(timestep_scale=flow_adapter["timestep_scale"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _flow_scheduler(model: str | PathLike[str]) -> FlowStudentScheduler | None:
    """What a flow student is drawn with; None of any other pipeline."""
    config = FlowStudentScheduler.load_config(str(model), subfolder=SCHEDULER)
    return FlowStudentScheduler.from_config(config) if is_flow_student(config) else None


def load_lora(pipeline: DiffusionPipeline, lora: str | PathLike[str], **options: Any) -> None:
    """Load LoRA weights into a pipeline, or into the transformer of one that knows of none.

    Args:
        pipeline: of a known family.
        lora: folder, file or Hub id.
        options: of diffusers' method, such as `weight_name`.
    """
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(str(lora), **options)
    else:
        pipeline.transformer.load_lora_adapter(str(lora), **{"weight_name": LORA_FILE, **options})


def lora_record(lora: str | PathLike[str]) -> dict[str, Any]:
    """Read what training has written beside LoRA weights.

    Args:
        lora: folder, file or Hub id.

    Returns:
        The training record, whose `adapter` is there where they make a student; empty of any other LoRA.

    Raises:
        ValueError: where it is damaged.
    """
    folder = Path(lora).parent if Path(lora).is_file() else Path(lora)
    file = folder / TRAINING_RECORD
    if not folder.is_dir():
        try:
            file = Path(hf_hub_download(str(lora), TRAINING_RECORD))
        except (OSError, ValueError):  # it is not there, or nothing of that name is
            return {}
    if not file.is_file():
        return {}
    with loading("lora", lora):
        return read_object(file)


def find_device(name: str | torch.device) -> torch.device:
    """Make sure that there is a device which computes.

    Args:
        name: torch's, such as `"cuda:1"`.

    Returns:
        The device.

    Raises:
        ValueError: where this machine, or this torch, has none of that name.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch's way to say that it was built without
        raise ValueError(f"`device` is {str(name)!r}, which cannot be used here: {in_a_line(error)}") from error
    return device


def call_options(
    pipeline: DiffusionPipeline, *, complex_human_instruction: bool | None = None, **options: Any
) -> dict[str, Any]:
    """Say how to draw with a student: what is left out, or None, is as it was distilled.

    Args:
        pipeline: the student's, as `load_pipeline` gives it.
        complex_human_instruction: whether to put Sana's instruction before each prompt.
        options: other arguments of the pipeline's call.

    Returns:
        Arguments of the pipeline's call: those given, size, guidance and how prompts are read; the instruction as the
        call takes it.

    Raises:
        ValueError: for another guidance scale than 1 of a flow student, and for what its pipeline's call cannot be
            told.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if complex_human_instruction is not None:
        given["complex_human_instruction"] = INSTRUCTION if complex_human_instruction else None
    backbone = backbone_of(pipeline.transformer)
    size = backbone.native_size(pipeline.transformer) * pipeline.vae_scale_factor
    defaults = {"height": size, "width": size}
    if not has_learned_guidance(pipeline):
        return {**defaults, **STOCK_CALL_OPTIONS, **pipeline.default_call_options, **given}
    for name in ("max_sequence_length", "complex_human_instruction"):
        if name not in backbone.READING_OPTIONS:
            if name in given:
                raise ValueError(f"`{name}` is given, but {type(pipeline).__name__} takes none: leave it out")
        else:
            defaults[name] = STOCK_CALL_OPTIONS[name]
    if given.get("guidance_scale", GUIDANCE_SCALE) != GUIDANCE_SCALE:
        raise ValueError(
            f"`guidance_scale` is {given['guidance_scale']!r}, but this student has learned its guidance and takes"
            " none: leave it out"
        )
    return {**defaults, **pipeline.scheduler.default_call_options, **backbone.CALL_OPTIONS, **given}


def has_learned_guidance(pipeline: DiffusionPipeline) -> bool:
    """Say whether a student has learned one guidance, as flow students have, and takes no scale of it."""
    return isinstance(pipeline.scheduler, FlowStudentScheduler)


def draw_pictures(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str] | Text,
    generators: Iterable[torch.Generator],
    *,
    num_inference_steps: int,
    batch_size: int | None = None,
    **options: Any,
) -> Iterator[Image.Image]:
    """Draw a picture of every prompt, in batches, each from noise of its own generator.

    Args:
        pipeline: of a known family.
        prompts: N texts, or their embeddings, which a student's pipeline takes.
        generators: one a picture, on the CPU: the picture is then the same whatever is drawn beside it, to rounding,
            and on every device; at least N.
        num_inference_steps: steps to take.
        batch_size: pictures at a time; None for all at once.
        options: further arguments of the pipeline's call; `guidance_scale` is w of v_uncond + w (v - v_uncond), 1 for
            none, whatever the pipeline calls it.

    Yields:
        The pictures, in order.

    Raises:
        ValueError: for a picture of NaN or infinity, which would be black.
    """
    generators = iter(generators)
    batch_size = batch_size or max(1, len(prompts))
    guidance_scale = options.pop("guidance_scale", None)
    scheduler, of_student = pipeline.scheduler, {}
    if isinstance(scheduler, FlowStudentScheduler):
        # LongCat-Image's pipeline gives its scheduler even times where it is given none
        stochastic = scheduler.config["stochastic_sampling"]
        of_student["sigmas"] = student_sigmas(num_inference_steps, stochastic_sampling=stochastic)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        asked: dict[str, Any]
        if isinstance(batch, Text):
            asked = {**backbone_of(pipeline.transformer).text_arguments(batch)}
        else:
            asked = {"prompt": list(batch)}
        if guidance_scale is not None:
            asked |= backbone_of(pipeline.transformer).guidance_arguments(guidance_scale, len(batch))
        noises = list(islice(generators, len(batch)))
        if isinstance(scheduler, FlowStudentScheduler):
            scheduler.generator = noises
        pixels = pipeline(
            **asked,
            **of_student,
            num_inference_steps=num_inference_steps,
            generator=noises,
            output_type="pt",
            **options,
        ).images
        for number, (picture, image) in enumerate(zip(pixels, pixels_to_pil(pixels), strict=True), start):
            if not is_finite(picture):
                prompt = f"prompt {number}" if isinstance(prompts, Text) else repr(prompts[number])
                steps = f"{num_inference_steps} step{'s' * (num_inference_steps > 1)}"
                raise ValueError(f"The picture of {prompt} at {steps} {NOT_FINITE}")
            yield image


def numbered_generators(seed: int) -> Iterator[torch.Generator]:
    """Make the generators of prompts in a fixed order: noise depends on the seed and on a prompt's place alone.

    Args:
        seed: of all pictures.

    Yields:
        That of the first prompt, then that of the second, and so on without end.
    """
    return (draw_generator(place, seed) for place in count())


def draw(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, steps: Sequence[int], seeds: Sequence[int], **options: Any
) -> Iterator[Drawing]:
    """Draw every prompt at every number of steps with every seed, one after the other.

    Each picture has its own call and its own generator, on the CPU: it is the same whatever is drawn beside it.

    Args:
        pipeline: the student.
        prompts: what to draw.
        steps: numbers of inference steps.
        seeds: one a picture.
        options: further arguments of the pipeline's call, such as `guidance_scale`.

    Yields:
        The drawings, by prompt, then steps, then seed.
    """
    for prompt in prompts:
        for num_inference_steps in steps:
            for seed in seeds:
                start = time.perf_counter()
                generators = [torch.Generator().manual_seed(seed)]
                (image,) = draw_pictures(
                    pipeline, [prompt], generators, num_inference_steps=num_inference_steps, **options
                )
                yield Drawing(prompt, num_inference_steps, seed, image, time.perf_counter() - start)
