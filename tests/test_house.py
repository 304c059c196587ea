"""What holds for the repository as a whole."""

import ast
import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import diffusers_tbcm


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "tbcm"
SETTINGS = {
    "train_tbcm_distill": "TBCMSettings",
    "train_scm": "SCMSettings",
    "train_sana_sprint": "SanaSprintSettings",
    "train_lcm": "LCMSettings",
    "train_cdm": "CDMSettings",
    "train_dmd": "DMDSettings",
    "prepare_teacher": "PreparationSettings",
}
MAX_SCRIPT_LINES = 330
MAX_LOOP_LINES = 60
MAX_FUNCTION_LINES = 100
GROUND_FLOOR = {
    "text", "rows", "draws", "digests", "files", "owned", "components", "transfer", "versions", "images", "standalone",
    "errors", "command_line", "redaction", "scripts.__init__",
}  # fmt: skip
SERVICES = ("data", "export", "evaluation", "training")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".cff", ".json", ".yml", ".yaml"}
TEXT_NAMES = {"Makefile", "NOTICE", "run", ".gitignore"}
NOT_OURS = {".git", ".venv", ".venv-compat", "build", "dist", "outputs", "runs"}


def text_files() -> list[Path]:
    files = [path for path in ROOT.rglob("*") if path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES]
    return [path for path in files if path.is_file() and not NOT_OURS & {*path.relative_to(ROOT).parts}]


def setup_literals() -> dict[str, object]:
    """The names that setup.py assigns literals to, and the literal keywords of its `setup(...)`."""
    literals = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        elif isinstance(node, ast.keyword):
            name, value = node.arg, node.value
        else:
            continue
        try:
            literals[name] = ast.literal_eval(value)
        except ValueError:
            continue  # an expression, not a literal
    return literals


def read_attributes(source: str) -> set[str]:
    """The attributes that code reads; to be checked in `__post_init__` or described is not to be used."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("__post_init__", "describe"):
            node.body = []
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_a_training_script_is_read(name):
    script = import_module(f"diffusers_tbcm.scripts.{name}")
    sources = [Path(script.__file__), *(ROOT / "src" / "diffusers_tbcm" / "training").glob("*.py")]
    declared = {field.name for field in dataclasses.fields(getattr(script, SETTINGS[name]))}
    assert "pretrained_model_name_or_path" in declared
    assert declared - set().union(*(read_attributes(file.read_text()) for file in sources)) == set()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_with_a_default_of_its_own_takes_what_the_shared_one_takes(name):
    settings = getattr(import_module(f"diffusers_tbcm.scripts.{name}"), SETTINGS[name])
    own = {field.name: field.metadata for field in dataclasses.fields(settings)}
    for base in filter(dataclasses.is_dataclass, settings.__mro__[1:]):
        for field in dataclasses.fields(base):
            shared = {**field.metadata, "help": own[field.name]["help"]}
            assert {option: own[field.name].get(option) for option in shared} == shared, field.name


def loop_lines(source: str) -> int:
    """The lines from the `for` over a run's batches to the end of its `update`, comments and all."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.For) and getattr(node.iter, "id", "") == "batches":
            updates = [part for part in ast.walk(node) if ast.unparse(part).startswith("run.update(")]
            return max(part.end_lineno for part in updates) - node.lineno + 1
    raise AssertionError("no loop over `batches`")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_script_stays_readable_top_to_bottom(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= MAX_SCRIPT_LINES
    assert loop_lines(source) <= MAX_LOOP_LINES


def imports_of(file: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    package = ROOT / "src" / "diffusers_tbcm"
    here = [*file.relative_to(package).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = here[: len(here) + 1 - node.level]
            for target in [node.module] if node.module else [alias.name for alias in node.names]:
                parts = [*parent, *target.split(".")]
                path = package.joinpath(*parts)
                if path.is_dir() or path.with_suffix(".py").is_file():  # and not a name of a package's own
                    found.add(".".join([*parts, "__init__"] if path.is_dir() else parts))
    return found


def modules() -> dict[str, Path]:
    package = ROOT / "src" / "diffusers_tbcm"
    files = [file for file in package.rglob("*.py") if file.name not in ("__main__.py",)]
    return {".".join(file.relative_to(package).with_suffix("").parts): file for file in files}


def layer(module: str) -> int:
    """How high a module stands: ground floor, backbones, papers, and the services one by one."""
    folder = module.partition(".")[0]
    if folder in SERVICES:
        return 3 + SERVICES.index(folder)
    if module == "pipeline_folder":
        return 1
    return 0 if module in GROUND_FLOOR else 1 if folder == "backbones" else 2


def test_no_import_leads_upwards():
    for module, file in modules().items():
        for other in imports_of(file) - {"__init__"}:
            assert layer(other) <= layer(module), f"{module} imports {other}"


def test_the_tree_in_contributing_names_every_module_and_service_once():
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("src/diffusers_tbcm/")[1].partition("examples/tbcm/")[0]
    modules = [path.name for path in (ROOT / "src" / "diffusers_tbcm").glob("[!_]*.py")]
    named = [word for word in tree.split() if word.endswith(".py") and word != "__main__.py"]
    assert sorted(named) == sorted(modules)
    assert all(tree.split().count(f"{folder}/") == 1 for folder in ("backbones", *SERVICES))


def test_no_imports_form_a_circle():
    graph = {module: imports_of(file) - {"__init__"} for module, file in modules().items()}
    while graph:
        leaves = {module for module, others in graph.items() if not others & graph.keys()}
        assert leaves, f"circle among {', '.join(graph)}"
        graph = {module: others for module, others in graph.items() if module not in leaves}


@pytest.mark.parametrize("folder", ["src", "examples"])
def test_functions_are_short(folder):
    long = {
        f"{file.name}: {node.name}"
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long <= {"pipeline_sana_tbcm.py: __call__"}  # the stock signature


def test_the_library_knows_no_namespace_of_flags():
    for file in modules().values():
        assert not re.search(r"\bargs\.|Namespace", file.read_text()), file


def test_no_file_names_its_makers_machine():
    absolute = re.compile(r"(?<![\w.~$}/])/(?:work|root|home|Users)/|\.\./shared\b")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in text_files()
        if path != Path(__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if absolute.search(line)
    }
    assert found == set()


def test_the_version_is_the_same_everywhere():
    version = setup_literals()["version"]
    assert diffusers_tbcm.__version__ == version
    assert version in (ROOT / "CHANGELOG.md").read_text()


def exact_versions(constraints: str) -> dict[str, Version]:
    """The versions that a constraints file pins, by canonical name."""
    lines = (ROOT / constraints).read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(item.specifier).startswith("==") for item in pinned)
    versions = {canonicalize_name(item.name): Version(str(item.specifier).removeprefix("==")) for item in pinned}
    assert len(versions) == len(pinned)
    assert not {"torchvision", "torch-fidelity"} & {*versions}  # the first breaks a CPU torch, the second downloads
    return versions


def requirements(*skipped_extras: str) -> list[Requirement]:
    """What setup.py asks for."""
    literals = setup_literals()
    extras = [items for extra, items in literals["extras"].items() if extra not in skipped_extras]
    return [Requirement(item) for items in (literals["install_requires"], *extras) for item in items]


def test_the_constraints_satisfy_what_setup_asks_for():
    versions = exact_versions("constraints.txt")
    for requirement in requirements():
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_every_lower_bound_is_the_version_that_the_oldest_constraints_test():
    versions = exact_versions("constraints-oldest.txt")
    for requirement in requirements("quality", "demo", "paper"):  # the first's tools are for one version of each only
        bounds = [Version(item.version) for item in requirement.specifier if item.operator in (">=", "==")]
        assert bounds == [versions[canonicalize_name(requirement.name)]], requirement


def test_the_examples_requirements_are_this_checkout():
    lines = (ROOT / "examples" / "tbcm" / "requirements.txt").read_text().splitlines()
    (package,) = [line for line in lines if not line.startswith("#")]
    assert package == ".[training,eval]" and {"training", "eval"} <= {*setup_literals()["extras"]}


def test_nobody_is_told_to_install_the_package_from_an_index_that_has_it_not():
    name = "diffusers_" + "tbcm"
    from_index = re.compile(rf"install +(?:-\S+ +)*['\"]?{name}(?!-)|{name}\[[^\]]*\](?! @ )")
    for path in text_files():
        if path.name != "CHANGELOG.md":
            assert not from_index.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "script", ["app.py", "evaluate_student.py", "quickstart.py", *(f"{name}.py" for name in SETTINGS)]
)
def test_an_example_script_can_be_copied_alone(script):
    tree = ast.parse((EXAMPLES / script).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in froms)
    roots = {name.partition(".")[0] for name in (*imported, *(node.module for node in froms))}
    beside = {path.stem for path in EXAMPLES.iterdir()}
    assert not roots & {*beside, "examples", "benchmarks"}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_the_test_command_of_make(document):
    command = re.search(r"^PYTEST := -m (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert re.search(rf"^(?:python -m )?{re.escape(command)}$", (ROOT / document).read_text(), re.MULTILINE)


def test_the_commit_hooks_run_what_make_quality_runs():
    recipe = re.search(r"^quality:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = re.findall(r"^\t\$\(BIN\)/(.*?)(?: \$\(SOURCES\))?$", recipe, re.MULTILINE)
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(commands) == 3 and hooks == commands
