"""Folders that somebody would rather not have published as they are."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from tiny import tiny_transformer, write_tiny_pipeline

from diffusers_tbcm.export.folders import (
    save_flow_lora,
    save_flow_student,
    save_student_lora,
    save_student_pipeline,
)
from diffusers_tbcm.export.record import Sample, StudentDescription
from diffusers_tbcm.export.selection import Selection, select_files
from diffusers_tbcm.lora import adapt, make_lora_student
from diffusers_tbcm.scheduling_flow import FlowStudentScheduler
from diffusers_tbcm.standalone import standalone_pipeline_source


KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n-----END OPENSSH PRIVATE KEY-----\n"
TOP = ""  # so that this file names no machine's folders
SECRET = "nobody else's business"
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
ANYWHERE = [
    ".env", ".netrc", ".git/config", ".cache/huggingface/token", ".ipynb_checkpoints/README-checkpoint.md", "id_rsa",
    "credentials.json", "notes.md", "README.md.bak", "README.MD", "LICENSE-keys.txt", "secrets.yaml", "train.log",
    "evil.py", "modeling_evil.py", "x.PKL", "x.joblib", "x.pth.tar", "x.BIN", "x.pickle", "x.npz", "x.h5", "x.gguf",
    "wandb/run/config.yaml", "logs/events.out", "metrics.jsonl", "latents/0.safetensors",
    "black_latent_64.safetensors",
    "pytorch_lora_weights.safetensors", "checkpoint-7/optimizer.bin", "validation/step-7.png", "images/other.png",
    "core.1234", "Thumbs.db", "ünïcode\n.md", "model.safetensors",
]  # fmt: skip
IN_COMPONENTS = [
    "vae/.env", "vae/x.PKL", "vae/x.joblib", "vae/x.pth.tar", "vae/diffusion_pytorch_model.BIN", "vae/config.json~",
    "vae/diffusion_pytorch_model.safetensors.bak", "vae/model.safetensors", "vae/nested/config.json",
    "vae/.config.json",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/config.JSON", "text_encoder/modeling_evil.py",
    "text_encoder/pytorch_model.bin", "text_encoder/.cache/x.json", "text_encoder/model.safetensors.tmp",
    "tokenizer/tokenizer.json.old", "tokenizer/merges.txt", "tokenizer/prompts.txt", "scheduler/x.safetensors",
    "transformer/notes.txt", "transformer/events.json", "transformer/.DS_Store",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    teacher = write_tiny_pipeline(tmp_path_factory.mktemp("teachers") / "tiny_teacher")
    (teacher / "LICENSE").write_text("Terms.\n")
    samples = [Sample("a dolphin", 1, Image.new("RGB", (8, 8), "red"))]
    description = StudentDescription("a dolphin", {"steps": 7}, config={"flags": {"seed": 0}}, samples=samples)
    folder = tmp_path_factory.mktemp("students") / "student"
    return save_student_pipeline(tiny_transformer(guidance_embeds=True), teacher, folder, description)


@pytest.fixture(scope="module")
def whole(saved) -> Selection:
    return select_files(saved)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "student"))


@pytest.fixture
def private(tmp_path) -> Path:
    """What links lead to."""
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text(KEY)
    return path


def content(selection: Selection) -> dict[str, bytes]:
    return {name: file.read_bytes() if isinstance(file, Path) else file for name, file in selection.files.items()}


def edit(path: Path, change: Callable) -> None:
    """Put a changed JSON value into a file."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


def test_a_student_is_published_whole_and_unchanged(whole, saved):
    assert {*whole.files} - {"tokenizer/special_tokens_map.json"} == {  # which transformers 4 writes, too
        "model_index.json", "README.md", "training.json", "training_config.json", "LICENSE", "pipeline.py",
        "images/00.png", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        *(f"{name}/{file}" for name in ("transformer", "vae")
          for file in ("config.json", "diffusion_pytorch_model.safetensors")),
    }  # fmt: skip
    assert whole.left_out == []
    for name, file in content(whole).items():
        assert file == (saved / name).read_bytes(), name


def test_a_flow_student_is_published_with_its_mark_and_without_the_code_of_another_pipeline(tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    description, scheduler = StudentDescription("a dolphin", {"steps": 7}), FlowStudentScheduler(3.0, {"height": 64})
    folder = save_flow_student(tiny_transformer(), teacher, tmp_path / "student", description, scheduler=scheduler)
    selection = select_files(folder)
    assert "pipeline.py" not in selection.files and selection.left_out == []
    for name, file in content(selection).items():
        assert file == (folder / name).read_bytes(), name
    assert json.loads(content(selection)["scheduler/scheduler_config.json"])["_call_options"] == {"height": 64}
    (folder / "pipeline.py").write_text("import os")  # somebody's
    assert select_files(folder).left_out == ["pipeline.py"]


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_part_of_a_model_stays_at_home_and_is_named(linked, folder, private, whole):
    for name in [*ANYWHERE, *IN_COMPONENTS]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if linked:
            path.symlink_to(private)
        else:
            path.write_text(SECRET)
    selection = select_files(folder)
    assert content(selection) == content(whole)
    named = {name.removesuffix(" (a link)") for name in selection.left_out}
    for name in [*ANYWHERE, *IN_COMPONENTS]:
        parts = Path(name).parts
        assert named & {name, f"{parts[0]}/", f"{'/'.join(parts[:2])}/"}, name
    assert "vae/" not in named and "text_encoder/" not in named


@pytest.mark.parametrize("name", ["LICENSE", "training.json", "training_config.json", "images/00.png", "images"])
def test_what_could_be_there_and_is_a_link_is_not_followed(name, folder, private, whole):
    path = folder / name
    if path.is_dir():
        shutil.move(path, private.parent / "images")
        path.symlink_to(private.parent / "images")
    else:
        path.unlink()
        path.symlink_to(private)
    selection = select_files(folder)
    assert selection.files.keys() == {key for key in whole.files if not key.startswith(name)}
    assert selection.left_out == (["images/"] if name == "images/00.png" else [f"{name} (a link)"])


@pytest.mark.parametrize(
    "shown",
    [
        "a" * 5000 + ".png",
        "a\0b.png",
        ".secret/x.png",
        "../home/x.png",
        "{outside}",
        "images/link.png",
        "logs/pipe.png",
    ],
)
def test_a_card_shows_the_folders_own_pictures_and_no_others(shown, folder, private, whole):
    picture = private.parent / "x.png"
    Image.new("RGB", (8, 8)).save(picture)
    (folder / ".secret").mkdir()
    shutil.copy(picture, folder / ".secret")
    (folder / "images" / "link.png").symlink_to(picture)
    (folder / "logs").mkdir()
    os.mkfifo(folder / "logs" / "pipe.png")
    card = folder / "README.md"
    card.write_text(card.read_text() + f"\n![x]({shown.replace('{outside}', str(picture))})\n")
    assert select_files(folder).files.keys() == whole.files.keys()


def test_a_card_may_show_pictures_of_any_suffix_and_folder(folder, whole):
    (folder / "validation").mkdir()
    for name in ("Grid.PNG", "validation/a b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    card = folder / "README.md"
    card.write_text(card.read_text() + '\n![x](./Grid.PNG) <img src="validation/a%20b.jpg">\n')
    assert select_files(folder).files.keys() == {*whole.files, "Grid.PNG", "validation/a b.jpg"}


def test_the_pipeline_in_one_file_is_this_packages_own(folder):
    (folder / "pipeline.py").write_text("import os\nos.system('true')\n")
    selection = select_files(folder)
    assert content(selection)["pipeline.py"] == standalone_pipeline_source().encode()
    assert selection.left_out == ["pipeline.py (this version's own is published in its place)"]


def replace_by_link(path: Path, target: Path) -> None:
    target = target if path.is_dir() else target.with_name(path.name)
    shutil.move(path, target)
    path.symlink_to(target)


def hollow(path: Path) -> None:
    path.unlink()
    path.mkdir()


def index_entry(**entries: object) -> Callable:
    return lambda folder, _: edit(folder / "model_index.json", lambda index: index | entries)


def shards(weight_map: dict[str, str], *present: str) -> Callable:
    """A VAE in shards; the index says where its tensors are."""

    def damage(folder: Path, private: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name in present:
            save_file({"a": torch.ones(1)}, folder / "vae" / name)
        save_file({"a": torch.ones(1)}, private.parent / "outside.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def with_metadata(folder: Path, _: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"trained_on": "/data/of/alice/prompts.txt"})


def noted_picture(folder: Path, _: Path) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", f'{{"input": "{TOP}/home/alice/face.png"}}')
    Image.new("RGB", (8, 8)).save(folder / "images" / "00.png", pnginfo=notes)


def located_picture(folder: Path, _: Path) -> None:
    image = Image.new("RGB", (8, 8))
    exif = image.getexif()
    exif[0x8825] = {1: "N"}
    image.save(folder / "images" / "00.png", exif=exif)


SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
REFUSED = {
    "no index": (lambda f, _: (f / "model_index.json").unlink(), "neither a pipeline nor LoRA adapters"),
    "index is a list": (lambda f, _: (f / "model_index.json").write_text("[]"), "model_index.json is no JSON object"),
    "index is torn": (lambda f, _: (f / "model_index.json").write_text('{"vae": ['), "model_index.json is no JSON"),
    "index twice": (
        lambda f, _: (f / "model_index.json").write_text('{"a": "/data/x", "a": 1}'), "a name stands in it twice"
    ),
    "index is a link": (lambda f, p: replace_by_link(f / "model_index.json", p), "model_index.json is a link"),
    "no card": (lambda f, _: (f / "README.md").unlink(), "has no README.md"),
    "card is a link": (lambda f, p: replace_by_link(f / "README.md", p), "README.md is a link"),
    "card is a folder": (lambda f, _: hollow(f / "README.md"), "has no README.md"),
    "empty card": (lambda f, _: (f / "README.md").write_text(""), "README.md is empty"),
    "a card of broken YAML": (
        lambda f, _: (f / "README.md").write_text("---\na: [\n---\n"), "README.md cannot be read as a model card"
    ),
    "a card that runs code": (
        lambda f, _: (f / "README.md").write_text("---\na: !!python/object/apply:os.getcwd []\n---\n"),
        "README.md cannot be read as a model card",
    ),
    "a card that is no text": (
        lambda f, _: (f / "README.md").write_bytes(b"---\n---\ncaf\xe9"), "README.md cannot be read as a model card"
    ),
    "another's record": (lambda f, _: edit(f / "training.json", lambda r: r | {"license": "mit"}), "not the one that"),
    "a component of lists": (index_entry(vae=[["diffusers"], "AutoencoderDC"]), "names no vae, which"),
    "a component that is a flag": (index_entry(vae=True), "names no vae, which"),
    "another record": (lambda f, _: (f / "training.json").write_text("{}"), "not the one that training writes"),
    **{
        f"no {name}": (lambda f, _, name=name: shutil.rmtree(f / name), f"its {name} is missing")
        for name in ("vae", "tokenizer", "text_encoder", "transformer", "scheduler")
    },
    **{
        f"no {name} in the index": (index_entry(**{name: [None, None]}), f"names no {name}, which the pipeline needs")
        for name in ("vae", "tokenizer", "text_encoder", "scheduler")
    },
    "a component above": (index_entry(**{"..": ["diffusers", "AutoencoderDC"]}), "has a component '..', which"),
    "a component elsewhere": (index_entry(**{"/etc": ["diffusers", "X"]}), "has a component '/etc', which"),
    "logs as a component": (index_entry(logs=["transformers", "X"]), "has a component 'logs', which"),
    "own code": (index_entry(vae=["evil", "AutoencoderDC"]), r"has vae \['evil', .*: its code would be evil"),
    "own pipeline": (index_entry(_class_name=["pipeline", "Evil"]), r"has the class \['pipeline', 'Evil'\], and not"),
    "component is a link": (lambda f, p: replace_by_link(f / "vae", p.with_name("vae")), "vae/config.json is a link"),
    "component is a file": (lambda f, _: (shutil.rmtree(f / "vae"), (f / "vae").write_text("")), "its vae is missing"),
    "no weights": (lambda f, _: (f / WEIGHTS).unlink(), "no safetensors weights of its vae"),
    "only a pickle": (lambda f, _: (f / WEIGHTS).rename((f / WEIGHTS).with_suffix(".bin")), "no safetensors weights"),
    "only half precision": (
        lambda f, _: (f / WEIGHTS).rename((f / WEIGHTS).with_suffix(".fp16.safetensors")), "no safetensors weights"
    ),
    "weights of 0 bytes": (lambda f, _: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is empty"),
    "torn weights": (lambda f, _: os.truncate(f / WEIGHTS, 9000), f"{WEIGHTS} is no safetensors file, or a torn"),
    "torn header": (lambda f, _: os.truncate(f / WEIGHTS, 20), f"{WEIGHTS} is no safetensors file, or a torn"),
    "longer weights": (
        lambda f, _: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + KEY.encode()), f"{WEIGHTS} is no safetens"
    ),
    "a key as weights": (lambda f, _: (f / WEIGHTS).write_text(KEY), f"{WEIGHTS} is no safetensors file"),
    "a pickle as weights": (lambda f, _: (f / WEIGHTS).write_bytes(pickle.dumps(1)), f"{WEIGHTS} is no safetensors"),
    "no tensors": (lambda f, _: save_file({}, f / WEIGHTS), f"{WEIGHTS} holds no tensors"),
    "weights are a link": (lambda f, p: replace_by_link(f / WEIGHTS, p), f"{WEIGHTS} is a link"),
    "weights are a link inside": (lambda f, _: replace_by_link(f / WEIGHTS, f / "x"), f"{WEIGHTS} is a link"),
    "weights are a loop": (
        lambda f, _: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(f / WEIGHTS)), "is a link|is no regular file"
    ),
    "weights are nowhere": (
        lambda f, p: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(p.with_name("gone"))), f"{WEIGHTS} is a link"
    ),
    "weights are a folder": (lambda f, _: hollow(f / WEIGHTS), f"{WEIGHTS} is no regular file"),
    "weights are a pipe": (lambda f, _: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "is no regular file"),
    "weights tell a path": (with_metadata, f"{WEIGHTS} has a path or a token in its header"),
    "half precision in part": (
        lambda f, _: shutil.copy(f / WEIGHTS, (f / WEIGHTS).with_suffix(".bf16.safetensors")),
        "bf16 weights of its vae and none of its text_encoder",
    ),
    "torn half precision": (
        lambda f, _: (f / WEIGHTS).with_suffix(".bf16.safetensors").write_bytes(b"x"), "is no safetensors file"
    ),
    "another component's config": (
        lambda f, _: shutil.copy(f / "transformer/config.json", f / "vae"), "config.json is no config of AutoencoderDC"
    ),
    "an empty config": (lambda f, _: (f / "text_encoder/config.json").write_text("{}"), "is no config of Gemma2Model"),
    "an empty vocabulary": (lambda f, _: (f / "tokenizer/tokenizer.json").write_text("{}"), "holds no vocabulary"),
    "a missing shard": (shards({"a": SHARD, "b": SHARD.replace("1-", "2-")}, SHARD), "00002-of-00002.* is missing"),
    "a shard without its tensor": (shards({"a": SHARD, "b": SHARD}, SHARD), "lacks b, which"),
    "a shard elsewhere": (shards({"a": "../../home/outside.safetensors"}), "which is no shard of its weights"),
    "no shards": (shards({}), "names no shards"),
    "no config": (lambda f, _: (f / "vae/config.json").unlink(), "vae/config.json is missing"),
    "config is a link": (lambda f, p: replace_by_link(f / "vae/config.json", p), "vae/config.json is a link"),
    "config is a key": (lambda f, _: (f / "vae/config.json").write_text(KEY), "vae/config.json is no JSON file"),
    "config has no end": (lambda f, _: (f / "vae/config.json").write_text("[" * 99999), "vae/config.json is no JSON"),
    "config is no text": (lambda f, _: (f / "vae/config.json").write_bytes(b"\xff\xfe"), "vae/config.json is no JSON"),
    "no schedule": (lambda f, _: (f / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json is missing"),
    "no vocabulary": (lambda f, _: (f / "tokenizer/tokenizer.json").unlink(), "no vocabulary of its tokenizer"),
    "torn vocabulary": (lambda f, _: os.truncate(f / "tokenizer/tokenizer.json", 99), "tokenizer.json is no JSON"),
    "vocabulary is a link": (
        lambda f, p: replace_by_link(f / "tokenizer/tokenizer.json", p), "tokenizer.json is a link"
    ),
    "a key as picture": (lambda f, _: (f / "images/00.png").write_text(KEY), "images/00.png is no picture"),
    "a torn picture": (lambda f, _: os.truncate(f / "images/00.png", 50), "images/00.png is no picture"),
    "a picture tells a path": (noted_picture, "images/00.png tells a place, path or token"),
    "a picture tells a place": (located_picture, "images/00.png tells a place, path or token"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_not_whole_or_not_its_own_is_refused(name, folder, private):
    damage, message = REFUSED[name]
    damage(folder, private)
    with pytest.raises(ValueError, match=f"folder .*student' cannot be published: .*{message}"):
        select_files(folder)


def test_configs_records_and_card_lose_paths_secrets_and_code_and_keep_the_rest(folder, whole, monkeypatch):
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    paths = {
        "_name_or_path": f"{TOP}/home/alice/teacher", "tokenizer_file": r"C:\Users\alice\my files\tokenizer.json",
        "source": "file:///data/x/y.csv", "run": "outputs/alice/run", "hub": "google/gemma-2-2b-it",
        "nested": {"x": [{f"{TOP}/home/alice/key": "~/notes/a.txt"}]},
        "command": "python t.py --prompts_file=/data/a/p.txt",
        "address": "https://alice:pass@example.com/x?token=1234", "key": "0123456789secret", "auto_map": {"A": "e.E"},
    }  # fmt: skip
    public = {
        "_name_or_path": "teacher", "tokenizer_file": "tokenizer.json", "source": "y.csv", "run": "run",
        "hub": "google/gemma-2-2b-it", "nested": {"x": [{"key": "a.txt"}]},
        "command": "python t.py --prompts_file=p.txt",
        "address": "https://example.com/x?token=***", "key": "***",
    }  # fmt: skip
    names = [name for name in whole.files if name.endswith(".json") and name != "tokenizer/tokenizer.json"]
    assert len({*names} - {"tokenizer/special_tokens_map.json"}) == 8
    before = content(select_files(folder))
    for name in names:
        edit(folder / name, lambda value: value | paths)
    for name in ("README.md", "LICENSE"):
        (folder / name).write_text((folder / name).read_text() + f"\n{paths['command']} hf_0123456789abcdef\n")
    after = content(select_files(folder))
    for name in names:
        assert json.loads(after[name]) == json.loads(before[name]) | public
    for name in ("README.md", "LICENSE"):
        assert after[name] == before[name] + b"\npython t.py --prompts_file=p.txt ***\n"
    assert {name for name in after if after[name] != before[name]} == {*names, "README.md", "LICENSE"}


def test_words_of_a_vocabulary_are_no_paths(folder):
    vocabulary = folder / "tokenizer" / "tokenizer.json"
    edit(vocabulary, lambda value: value | {"added": ["/usr/local/bin", "~/x/y", "hf_0123456789abcdef"]})
    assert content(select_files(folder))["tokenizer/tokenizer.json"] == vocabulary.read_bytes()


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def checkpoint(folder: Path, files: dict[str, bytes | None]) -> Path:
    """A checkpoint with a manifest of some files; those without content are not there."""
    path = folder / "checkpoint-7"
    path.mkdir()
    torch.save({"state": {0: torch.ones(1)}}, path / "optimizer.bin")
    (path / "private.txt").write_text(SECRET)
    for name, held in files.items():
        if held is not None:
            (path / name).write_bytes(held)
    names = ["optimizer.bin", *files]
    sizes = {name: (path / name).stat().st_size if (path / name).is_file() else 1 for name in names}
    (path / "checkpoint.json").write_text(json.dumps({"step": 7, "files": sizes}))
    return path


def test_training_state_is_what_the_manifest_lists(folder, whole):
    checkpoint(folder, {})
    selection = select_files(folder, include_training_state=True)
    assert selection.files.keys() - whole.files.keys() == {
        "checkpoint-7/checkpoint.json",
        "checkpoint-7/optimizer.bin",
    }
    assert selection.left_out == ["checkpoint-7/private.txt"]
    assert select_files(folder).left_out == ["checkpoint-7/"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"custom.pkl": pickle.dumps(Evil())}, r"custom\.pkl is none of torch's files"),
        ({"/etc/id_rsa": None}, "'/etc/id_rsa', which is not in the checkpoint"),
        ({"../README.md": None}, r"'\.\./README\.md', which is not in the checkpoint"),
        ({"model.safetensors": None}, r"checkpoint-7 is not whole: model\.safetensors is missing"),
        ({"model.safetensors": b"x"}, r"model\.safetensors is no safetensors file"),
        ({"x.distcp": b"x"}, r"x\.distcp is no file of a checkpoint that can be published"),
    ],
)
def test_training_state_that_is_not_whole_or_not_its_own_is_refused(files, message, folder):
    checkpoint(folder, files)
    with pytest.raises(ValueError, match=message):
        select_files(folder, include_training_state=True)


def test_training_state_that_runs_code_or_is_a_link_is_refused(folder, private):
    path = checkpoint(folder, {})
    torch.save({"state": Evil()}, path / "optimizer.bin")
    edit(path / "checkpoint.json", lambda value: {"files": {"optimizer.bin": (path / "optimizer.bin").stat().st_size}})
    with pytest.raises(ValueError, match=r"optimizer\.bin runs code when it is loaded: posix\.system"):
        select_files(folder, include_training_state=True)
    (path / "optimizer.bin").unlink()
    (path / "optimizer.bin").symlink_to(private)
    edit(path / "checkpoint.json", lambda value: {"files": {"optimizer.bin": private.stat().st_size}})
    with pytest.raises(ValueError, match=r"optimizer\.bin is a link"):
        select_files(folder, include_training_state=True)


def test_adapters_are_published_with_their_guidance_and_card(tmp_path, private):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    student = make_lora_student(tiny_transformer(), rank=2)
    folder = save_student_lora(student, teacher, tmp_path / "lora", StudentDescription("a dolphin", {"steps": 8}))
    names = {
        "pytorch_lora_weights.safetensors", "guidance_embedder.safetensors", "README.md", "training.json",
    }  # fmt: skip
    for name in ("pipeline.py", "adapter_model.bin", "pytorch_lora_weights.bin"):
        (folder / name).write_text(SECRET)
    selection = select_files(folder)
    assert selection.files.keys() == names
    assert selection.left_out == ["adapter_model.bin", "pipeline.py", "pytorch_lora_weights.bin"]
    for name in sorted(names)[:3]:
        if name.endswith(".safetensors"):
            replace_by_link(folder / name, private)
            with pytest.raises(ValueError, match=f"{name} is a link"):
                select_files(folder)
            (folder / name).unlink()
            with pytest.raises(ValueError, match=f"neither a pipeline nor LoRA|{name} is missing"):
                select_files(folder)


def test_adapters_of_a_flow_student_are_published_without_a_guidance_embedder(tmp_path):
    teacher = write_tiny_pipeline(tmp_path / "teacher")
    student, description = adapt(tiny_transformer(), rank=2), StudentDescription("a dolphin", {"steps": 8})
    folder = save_flow_lora(student, teacher, tmp_path / "lora", description, scheduler=FlowStudentScheduler(3.0))
    names = {"pytorch_lora_weights.safetensors", "README.md", "training.json"}
    for name in ("guidance_embedder.safetensors", "model_1.safetensors"):
        (folder / name).write_text(SECRET)
    selection = select_files(folder)
    assert selection.files.keys() == names
    assert selection.left_out == ["guidance_embedder.safetensors", "model_1.safetensors"]
    (folder / "guidance_embedder.safetensors").unlink()
    for change in (lambda record: {}, lambda record: {**record, "adapter": {"scheduler": "SCMScheduler"}}):
        edit(folder / "training.json", change)
        with pytest.raises(ValueError, match=r"guidance_embedder\.safetensors is missing"):
            select_files(folder)  # of a student that nothing says is a flow student


def test_a_card_of_one_long_word_is_read_in_time_in_proportion(folder, whole):
    card = folder / "README.md"
    card.write_text(card.read_text() + f"\n![x](data:image/png;base64,{'iVBORw0KGgo' * 20_000})\n")
    start = time.perf_counter()
    assert select_files(folder).files.keys() == whole.files.keys()
    assert time.perf_counter() - start < 20  # a step a character and not one a pair of them: that took minutes
