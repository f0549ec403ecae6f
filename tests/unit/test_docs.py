"""Every command and link of README.md and docs/*.md."""

import importlib.util
import re

import pytest

from tests.helpers import commands

pytestmark = pytest.mark.unit

OTHER_PROGRAMS = {
    "python3",
    "pip",
    "cat",
    "tensorboard",
    "cd",
    "git",
    "ray",
    "export",
    "mlflow",
    "aws",
    "kubectl",
    "gcloud",
}


@pytest.mark.parametrize("command", commands.JOBS, ids=str)
def test_a_commands_options_and_keys_exist(command):
    commands.parse(command)


def test_there_are_commands_of_every_job():
    jobs = {path.stem for path in (commands.ROOT / "jobs").glob("[!_]*.py")}
    assert {command.job for command in commands.JOBS} == jobs


def test_every_line_of_a_shell_block_starts_a_known_program():
    lines = [line for _, line in commands.shell_lines()]
    assert len(lines) > 20
    for words in lines:
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        else:
            assert words[0] in OTHER_PROGRAMS, words


@pytest.mark.parametrize("page", commands.PAGES, ids=lambda page: page.name)
def test_links_lead_to_something(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings], target
