"""What command lines share: one line for a user's mistake, a traceback for a bug, help with defaults, information."""

import logging
import os
import subprocess
import sys

import pytest

from diffusers_tbcm.command_line import (
    LOST_PROCESS,
    CommandParser,
    ending_in_words,
    finite_number,
    outliving_streams,
    show_information,
)
from diffusers_tbcm.errors import EndedElsewhere


def ended(error, **options):
    """What a command that fails ends in."""
    with pytest.raises(BaseException) as raised, ending_in_words({"rank": "--rank"}, program="script", **options):
        raise error
    return raised.value


def test_a_users_mistake_is_one_line_with_the_flag_and_exit_code_2(capsys):
    found = ended(ValueError("`rank` is 0,\n`other` too"), debug=False)
    assert isinstance(found, SystemExit) and found.code == 2
    assert capsys.readouterr().err == "script: error: --rank is 0, `other` too\n" == f"{found}\n"


@pytest.mark.parametrize("error", [AssertionError("ours"), TypeError("ours"), RuntimeError("ours")])
def test_a_bug_stays_as_it_is(error, capsys):
    assert ended(error, debug=False) is error and capsys.readouterr().err == ""


def test_debug_keeps_the_traceback(capsys):
    error = ValueError("`rank` is 0")
    assert ended(error, debug=True) is error and capsys.readouterr().err == ""


def test_an_exit_code_passes_and_an_interruption_is_quiet(capsys):
    assert ended(SystemExit(75), debug=False).code == 75
    assert ended(KeyboardInterrupt(), debug=False).code == 130 and capsys.readouterr().err == ""


def test_other_processes_say_which_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    ended(OSError("disk full"), debug=False)
    assert capsys.readouterr().err == "script: error: rank 3: disk full\n"


def test_help_shows_defaults_that_are_something_and_lines_as_they_are(capsys):
    parser = CommandParser("script", description="First.\n    second, indented")
    parser.add_argument("--number", type=finite_number, default=4.5, help="a number")
    parser.add_argument("--name", help="default: none")
    parser.add_argument("--quiet", action="store_true", help="less")
    parser.add_argument("--no-cache", dest="cache", action="store_false", help="keep files")
    shown = parser.format_help()
    assert "First.\n    second, indented\n" in shown
    assert "a number (default: 4.5)\n" in shown and "default: none\n" in shown
    assert "less\n" in shown and "do not: keep files\n" in shown


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "many"])
def test_a_number_that_is_not_finite_ends_in_one_line(value, capsys):
    parser = CommandParser("script")
    parser.add_argument("--number", type=finite_number)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--number={value}"])
    said = capsys.readouterr().err
    assert said.startswith("script: error: argument --number: ") and said.count("\n") == 1


@pytest.fixture
def ours():
    logger = logging.getLogger("diffusers_tbcm")
    level, handlers = logger.level, [*logger.handlers]
    yield logger
    logger.setLevel(level)
    logger.handlers = handlers


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_information_is_shown_by_one_process(rank, shown, monkeypatch, ours):
    monkeypatch.setenv("RANK", rank)
    show_information()
    assert logging.getLogger("diffusers_tbcm.training.run").isEnabledFor(logging.INFO) == shown
    assert logging.getLogger("diffusers_tbcm.training.run").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("transformers").isEnabledFor(logging.INFO)


def test_a_program_without_logging_of_its_own_shows_each_line_once():
    code = (
        "import logging\nfrom diffusers_tbcm.command_line import show_information\n"
        "show_information()\nshow_information()\n"
        "logging.getLogger('diffusers_tbcm.x').info('3 prompts')\nlogging.getLogger('other').info('noise')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.stderr == "3 prompts\n" and result.returncode == 0


def test_what_another_process_says_is_not_said_again(capsys):
    assert ended(EndedElsewhere("elsewhere"), debug=False).code == 2 and capsys.readouterr().err == ""
    assert ended(RuntimeError("third_party/gloo: Connection closed by peer"), debug=False).code == 2
    assert capsys.readouterr().err == f"script: error: {LOST_PROCESS}\n"


PRINTS = """
import sys
from tqdm import tqdm
from diffusers_tbcm.command_line import outliving_streams

with outliving_streams():
    for _ in tqdm(range(2000), mininterval=0):
        print("é" * 100)
    sys.exit(75)
"""


@pytest.mark.parametrize("output", ["closed pipe", "full disk", "no output", "ascii"])
def test_a_program_outlives_its_output(output, tmp_path):
    redirection = {
        "closed pipe": "2>&1 | head -c 10 > /dev/null; exit ${PIPESTATUS[0]}", "full disk": "> /dev/full 2>&1",
        "no output": ">&- 2>&-", "ascii": f"> {tmp_path / 'log'} 2> {tmp_path / 'log2'}",
    }[output]  # fmt: skip
    if output == "full disk" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    environment = os.environ | {
        "PROGRAM": PRINTS,
        "PYTHONIOENCODING": "ascii:strict" if output == "ascii" else "utf-8",
    }
    command = ["bash", "-c", f'{sys.executable} -c "$PROGRAM" {redirection}']
    assert subprocess.run(command, env=environment, timeout=60).returncode == 75
    if output == "ascii":
        assert (tmp_path / "log").read_text().startswith("\\xe9\\xe9")


def test_streams_are_as_they_were_afterwards():
    before = sys.stdout, sys.stderr
    with outliving_streams():
        assert sys.stdout is not before[0] and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
