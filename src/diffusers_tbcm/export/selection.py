"""What of a folder is published: what a pipeline, LoRA adapters and a card consist of, and nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import torch
from accelerate.utils.other import TORCH_SAFE_GLOBALS
from diffusers.pipelines.pipeline_loading_utils import CUSTOM_PIPELINE_FILE_NAME
from PIL import Image
from safetensors import safe_open

from ..backbones import find_backbone
from ..components import MODEL_INDEX, VOCABULARY_FILES, check_file, check_weights, read_object
from ..files import PICTURE_SUFFIXES, json_text
from ..lora import GUIDANCE_EMBEDDER_FILE, LORA_FILE
from ..owned import LOCK, MARKER
from ..pipeline_folder import (
    CARD,
    LEGAL_FILES,
    MANIFEST,
    METRICS,
    SCHEDULER,
    TRAINING_CONFIG,
    TRAINING_RECORD,
    TRANSFORMER,
    VARIANTS,
    component_files,
    copied_components,
    holding_weights,
    license_of,
    list_checkpoints,
)
from ..redaction import redact, redact_values
from ..standalone import standalone_pipeline_source
from .record import check_record, is_flow_adapter


RECORDS = (TRAINING_RECORD, TRAINING_CONFIG, METRICS)
CODE_ENTRIES = ("auto_map", "custom_pipelines")  # of configs: they name code to run, and stock classes need none
WORD = re.compile(r"[^\s\"'()<>\[\]|]+")  # of a card: a picture's path may be one, or stand at the start of one
PICTURE_PATH = re.compile(rf".+(?:{'|'.join(map(re.escape, PICTURE_SUFFIXES))})", re.IGNORECASE)
PLACE_OF_PICTURE = 0x8825  # EXIF's GPS
CAMERA = 0x8769  # EXIF's own section


@dataclass(frozen=True)
class Selection:
    """What of a folder is published.

    Args:
        files: what is uploaded by its path in the repository, a file or its changed content; the card among them.
        left_out: what of others the folder holds beside them, folders with a slash at the end.
    """

    files: dict[str, Path | bytes]
    left_out: list[str]


def select_files(folder: Path, *, include_training_state: bool = False, secrets: Collection[str] = ()) -> Selection:
    """Choose what is published, checked to be complete and whole, and stripped of paths and secrets.

    Args:
        folder: with a pipeline or LoRA adapters.
        include_training_state: add the files of every whole checkpoint.
        secrets: as `redact` takes them.

    Returns:
        The files, and what is left out.

    Raises:
        ValueError: naming what is missing, torn, a link, or not for others and cannot be stripped.
    """
    given, folder = folder, Path(os.path.realpath(folder))
    try:
        chosen = _chosen_files(folder)
        if include_training_state:
            chosen += [file for checkpoint in list_checkpoints(folder) for file in _state_files(checkpoint)]
        files = {path.relative_to(folder).as_posix(): publishable(path, secrets) for path in chosen}
        if _is_tbcm(folder):  # not the folder's, which anybody may have changed
            files[CUSTOM_PIPELINE_FILE_NAME] = standalone_pipeline_source().encode()
        left_out = sorted(_left_out(folder, files))
    except OSError as error:
        raise ValueError(f"folder {str(given)!r} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"folder {str(given)!r} cannot be published: {error}") from error
    return Selection(files, left_out)


def _is_tbcm(folder: Path) -> bool:
    """Whether `SanaTBCMPipeline` draws with what a folder holds; a flow student has its teacher's own class."""
    if not (folder / MODEL_INDEX).is_file():
        return False
    backbone, name = find_backbone(folder), read_object(folder / MODEL_INDEX).get("_class_name")
    return backbone.STUDENT_EMBEDS_GUIDANCE and name == backbone.STUDENT_PIPELINE_CLASS.__name__


def publishable(path: Path, secrets: Collection[str] = ()) -> Path | bytes:
    """Strip a file of what is not for others.

    Args:
        path: of a config, record, text, picture or safetensors file.
        secrets: as `redact` takes them.

    Returns:
        The file as it is, or its content without paths and secrets.

    Raises:
        ValueError: where they stand in what cannot be changed: the header of weights, a picture's metadata.
    """
    name = f"{path.parent.name}/{path.name}"
    if path.suffix == ".json" and path.name not in VOCABULARY_FILES:
        content = read_object(path)
        public = redact_values({key: entry for key, entry in content.items() if key not in CODE_ENTRIES}, secrets)
        return path if public == content else json_text(public).encode()
    if path.name in (CARD, *LEGAL_FILES) or path.suffix == ".jinja":
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        public_text = redact(text, secrets)
        return path if public_text == text else public_text.encode(errors="surrogateescape")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if redact_values(metadata, secrets) != metadata:
            raise ValueError(f"{name} has a path or a token in its header: save it with other metadata")
    elif path.suffix.lower() in PICTURE_SUFFIXES:
        _check_picture(path, name, secrets)
    return path


def redact_header(path: Path) -> None:
    """Drop the entries of a safetensors file's metadata that are not for others; the tensors stay where they are.

    Args:
        path: of the file, which is changed.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__", {})
        public = {name: text for name, text in metadata.items() if redact_values({name: text}) == {name: text}}
        if public != metadata:
            text = json.dumps({**header, "__metadata__": public}, ensure_ascii=False, separators=(",", ":")).encode()
            assert len(text) <= length
            file.seek(8)
            file.write(text.ljust(length))


def _chosen_files(folder: Path) -> list[Path]:
    """The files of a pipeline or LoRA, of its card and records."""
    if (folder / MODEL_INDEX).is_file():
        files = _pipeline_files(folder)
    elif (folder / LORA_FILE).is_file():
        record = folder / TRAINING_RECORD
        flow = _is_own(record) and is_flow_adapter(read_object(record))  # which embeds no guidance
        files = [folder / LORA_FILE, *([] if flow else [folder / GUIDANCE_EMBEDDER_FILE])]
        for path in files:
            check_weights(path)
    else:
        raise ValueError(
            f"it is neither a pipeline nor LoRA adapters: it has no {MODEL_INDEX} and no {LORA_FILE};"
            " save_student_pipeline and save_student_lora write such folders"
        )
    if not (folder / CARD).is_file():
        raise ValueError(f"it has no {CARD}: write its card, which every published model carries")
    files.append(check_file(folder / CARD))
    license_of(folder / CARD)
    if _is_own(folder / TRAINING_RECORD):
        check_record(read_object(folder / TRAINING_RECORD))
    files += [folder / name for name in (*RECORDS, *LEGAL_FILES) if _is_own(folder / name)]
    return files + list(_shown_pictures(folder))


def _pipeline_files(folder: Path) -> list[Path]:
    index = check_file(folder / MODEL_INDEX)
    model_index = read_object(index)
    backbone = find_backbone(folder)
    classes = [*dict.fromkeys(cls.__name__ for cls in (backbone.STUDENT_PIPELINE_CLASS, backbone.PIPELINE_CLASS))]
    if model_index.get("_class_name") not in classes:
        raise ValueError(
            f"{MODEL_INDEX} has the class {model_index.get('_class_name')}, and not {' or '.join(classes)}"
        )
    components = [TRANSFORMER, SCHEDULER, *copied_components(folder)]
    for name, entry in model_index.items():
        if isinstance(entry, list) and entry != [None, None] and name not in components:
            raise ValueError(f"{MODEL_INDEX} has a component {name!r}, which {classes[0]} has not")
    files = [index]
    for name in components:
        files += component_files(folder, name, model_index, variants=tuple(VARIANTS))
    for variant in VARIANTS:
        having = {file.parent.name for file in files if f".{variant}" in file.name}
        lacking = sorted({*holding_weights(components)} - having)
        if having and lacking:
            raise ValueError(f"it has {variant} weights of its {min(having)} and none of its {lacking[0]}")
    return files


def _shown_pictures(folder: Path) -> Iterator[Path]:
    """The pictures of the folder that its card shows."""
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    found = [match[0] for word in WORD.findall(text) if (match := PICTURE_PATH.match(word))]
    for shown in sorted({unquote(path).removeprefix("./") for path in found}):
        path = folder / shown
        hidden = any(part.startswith(".") for part in Path(shown).parts)
        if not hidden and path.is_relative_to(folder) and _is_own(path):
            yield path


def _is_own(path: Path) -> bool:
    """Whether there is such a file, with no link on the way to it."""
    try:
        check_file(path)
    except (OSError, ValueError):  # the system's, for a name that it does not take
        return False
    return True


def _state_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint, as its manifest lists them; none of them can run code when it is loaded."""
    manifest = check_file(checkpoint / MANIFEST)
    sizes = read_object(manifest).get("files")
    if not isinstance(sizes, dict):
        raise ValueError(f"{checkpoint.name}/{MANIFEST} lists no files")
    files = [manifest]
    for name, size in sizes.items():
        path = checkpoint / name
        if ".." in path.parts or not path.is_relative_to(checkpoint):
            raise ValueError(f"{checkpoint.name}/{MANIFEST} lists {name!r}, which is not in the checkpoint")
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{checkpoint.name} is not whole: {name} is missing or has another size")
        if not (_is_own(path) or size == 0):
            raise ValueError(f"{checkpoint.name}/{name} is a link, which is not followed")
        if path.suffix in (".bin", ".pkl", ".pt"):
            _check_pickle(path)
        elif path.suffix == ".safetensors":
            check_weights(path)
        elif path.suffix != ".json":
            raise ValueError(f"{checkpoint.name}/{name} is no file of a checkpoint that can be published")
        files.append(path)
    return files


def _check_pickle(path: Path) -> None:
    """Refuse a file of torch's that names code which `weights_only` does not allow, or that torch did not write."""
    name = f"{path.parent.name}/{path.name}"
    known = {f"{code.__module__}.{code.__qualname__}" for code in TORCH_SAFE_GLOBALS}
    known |= {code.replace("numpy._core", "numpy.core") for code in known}
    try:
        unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known
    except Exception as error:  # whatever a file that is no checkpoint makes of it
        raise ValueError(f"{name} is none of torch's files: {error}") from error
    if unknown:
        raise ValueError(f"{name} runs code when it is loaded: {', '.join(sorted(unknown))}")


def _check_picture(path: Path, name: str, secrets: Collection[str]) -> None:
    """Refuse what is no picture, and a picture whose metadata tell of this machine or of a place."""
    try:
        with Image.open(path) as image:
            image.load()
            exif = image.getexif()
            notes = [note for key, note in image.info.items() if key not in ("exif", "icc_profile", "photoshop")]
            notes += [*exif.values(), *exif.get_ifd(CAMERA).values()]
            place = exif.get_ifd(PLACE_OF_PICTURE)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no picture, or a torn one: {error}") from error
    texts = [note.decode("latin-1") if isinstance(note, bytes) else note for note in notes]
    if place or any(redact(text, secrets) != text for text in texts if isinstance(text, str)):
        raise ValueError(f"{name} tells a place, path or token in its metadata: save it without them")


def _left_out(folder: Path, chosen: Mapping[str, Path | bytes]) -> Iterator[str]:
    """What a folder holds beside what was chosen and our marks; of folders with nothing chosen their names alone."""
    for entry in os.scandir(folder):
        if entry.name in (MARKER, LOCK):
            continue
        is_folder = entry.is_dir(follow_symlinks=False)
        inside = {name.partition("/")[2]: chosen[name] for name in chosen if name.startswith(f"{entry.name}/")}
        if inside and is_folder:
            yield from (f"{entry.name}/{name}" for name in _left_out(Path(entry.path), inside))
        elif entry.name not in (*chosen, MARKER, LOCK):
            yield entry.name + "/" * is_folder + " (a link)" * entry.is_symlink()
        elif entry.name == CUSTOM_PIPELINE_FILE_NAME and Path(entry.path).read_bytes() != chosen[entry.name]:
            yield f"{entry.name} (this version's own is published in its place)"
