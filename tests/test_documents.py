"""The code in documents: Python runs or at least knows its names, command lines are read by the programs they call."""

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from tiny import tiny_tbcm_pipeline

from diffusers_tbcm import __main__ as command_line
from examples.tbcm import evaluate_student


ROOT = Path(__file__).parents[1]
DOCS = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "examples/tbcm/README.md", *DOCS]
SCRIPTS = [f"examples/tbcm/{name}.py" for name in ("evaluate_student", "app", "mini_teacher/emoji_data")]
SCRIPTS += [f"examples/tbcm/{script}.py" for script in command_line.TRAINING_SCRIPTS.values()]
PROGRAMS = ("accelerate ", "python ", "npm ", "tar ", "mkdir ")
RUN = {  # blocks that are run as they stand, by document and what they contain
    "README.md": ["dolphin.png"],
    "docs/pipeline.md": ["Image.open", "def preview"],
}


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document in a language."""
    tokens = MarkdownIt().parse((ROOT / document).read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def commands(document: str) -> list[list[str]]:
    """The words of every command in a document's blocks, or in the indented lines of a script's docstring."""
    if document.endswith(".py"):
        text = (ROOT / document).read_text(encoding="utf-8").split('"""')[1]
        text = re.sub(r"\\+\n", " ", text)
        joined = "\n".join(line for line in text.splitlines() if line.strip().startswith(PROGRAMS))
    else:
        joined = re.sub(r"\\\n", " ", "\n".join(blocks(document, "bash")))
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [part for line in words for part in split_at("&&", line) if part]


def split_at(mark: str, words: list[str]) -> list[list[str]]:
    if mark not in words:
        return [words]
    place = words.index(mark)
    return [words[:place], *split_at(mark, words[place + 1 :])]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_a_document_knows_its_names(document):
    """Blocks of a document follow each other; names in the sketches of a method of one's own are its reader's."""
    sketched = "settings stop prompts record network other_network critic_loss student_loss".split()
    code = "\n\n".join(blocks(document, "python"))
    pytest.importorskip("ruff")
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,E9", "--config"]
    ruff += [f"builtins = {[*sketched, '__file__']}", "-"]
    result = subprocess.run(ruff, input=code, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("document", RUN)
def test_python_in_a_document_runs(document, tmp_path, monkeypatch):
    pipeline = tiny_tbcm_pipeline()
    pipeline.save_pretrained(tmp_path / "outputs" / "quickstart")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    Image.new("RGB", (64, 64)).save(tmp_path / "dolphin.png")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for needle in RUN[document]:
        (block,) = [block for block in blocks(document, "python") if needle in block]
        exec(block, namespace)
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made >= ({"violin.png"} if document == "README.md" else {f"step_{step}.png" for step in range(4)})


def read(words: list[str], monkeypatch) -> None:
    """Let the program that a command starts read its flags, and do nothing."""
    line = " ".join(words)
    names = "|".join(command_line.TRAINING_SCRIPTS)
    if script := re.search(rf"(?:train_|diffusers-tbcm train |tbcm/(?=prepare))({names})(?:\.py)?", line):
        module = import_module(f"diffusers_tbcm.scripts.{command_line.TRAINING_SCRIPTS[script[1]]}")
        started = []
        monkeypatch.setattr(module, "launch", lambda train, settings: started.append(settings))
        flags = shlex.split(line[script.end() :])
        with pytest.raises(SystemExit, match="0") if flags == ["--help"] else nullcontext():
            module.main(flags)
        assert started or flags == ["--help"]
    elif "evaluate_student.py" in line:
        evaluate_student.parse_settings(shlex.split(line.partition("evaluate_student.py")[2]))
    elif words[0] == "diffusers-tbcm":
        command_line.parse_args(words[1:])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line
    elif words[0] == "python":
        module = words[1] == "-m"
        path = Path(words[2].replace(".", "/") + ".py" if module else words[1])
        known = module and words[2] in ("pytest", "venv", "diffusers_tbcm")
        assert known or (ROOT / path).is_file() or (ROOT / "examples" / "tbcm" / path).is_file(), line


@pytest.mark.parametrize("document", [*DOCUMENTS, *SCRIPTS])
def test_command_lines_in_a_document_are_read_by_what_they_call(document, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for folder in ("outputs/quickstart", "outputs/student", "PICTURES", "pictures"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = commands(document)
    for words in found:
        read(words, monkeypatch)
    assert found or document in DOCS


def test_the_packages_of_emoji_are_the_same_everywhere():
    wanted = {("emoji-datasource-google", "16.0.0"), ("@lobehub/fluent-emoji-3d", "1.1.0")}
    for name in ("emoji_data", "make_mini_teacher", "make_text_image_head"):
        script = (ROOT / "examples" / "tbcm" / "mini_teacher" / f"{name}.py").read_text()
        packed = re.search(r"npm pack (\S+) (\S+)", script).groups()
        assert {tuple(package.rsplit("@", 1)) for package in packed} == wanted, name
    notice = (ROOT / "examples/tbcm/sana_emoji_mini/NOTICE").read_text()
    assert all(f"{name} {version}" in notice for name, version in wanted)


def test_times_of_the_quickstart_agree():
    """What README and tables say of it is what was measured."""
    measured = (ROOT / "benchmarks/results/quickstart_cpu.json").read_text()
    training, whole = (int(re.search(rf'"{name}": (\d+)', measured)[1]) for name in ("training_seconds", "seconds"))
    assert f"{training} s of training, {whole} s in all" in (ROOT / "README.md").read_text()
    full = (ROOT / "benchmarks/results/quickstart_full_cpu.json").read_text()
    training = re.search(r'"training_seconds": (\d+)', full)[1]
    assert f"{training} s of training, 514 s in all" in (ROOT / "benchmarks/paper/README.md").read_text()
    minutes = {"README.md": whole, "benchmarks/paper/README.md": 514}
    for document, seconds in minutes.items():
        said = re.findall(r"(\d+) minutes\s+on 2 CPU", (ROOT / document).read_text())
        assert said and {*said} == {str(round(seconds / 60))}, document
