"""Every command and link of the pages, and what they say of the code's layout."""

import importlib.util
import re
from dataclasses import fields
from typing import get_args

import pytest

from bert4rec.config import Protocol
from bert4rec.data.features import FEATURES
from bert4rec.inference.ranking import Ranking
from tests.helpers import commands

pytestmark = pytest.mark.unit

ALL_PAGES = [
    *commands.PAGES,
    *(commands.ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((commands.ROOT / "docs" / "results").glob("*.md")),
]
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
    "docker",
    "helm",
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


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(commands.ROOT)))
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


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(commands.ROOT)))
def test_prose_has_at_most_120_columns(page):
    text = re.sub(r"^```.*?^```|^<!-- table.*?^<!-- end -->", "", page.read_text(), flags=re.M | re.S)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > 120]


NAMED = [
    *(("data-format.md", rf"^\| `{feature.file}\.tsv` \| `item`, `{name}` \|") for name, feature in FEATURES.items()),
    *(("data-format.md", rf"items\.parquet` \|.*`{feature.column}`") for feature in FEATURES.values()),
    *(("evaluation.md", rf"^\| [^|]*`{protocol}`") for protocol in get_args(Protocol)),
    *(("scoring.md", rf"\binference\.{rule.name}\b") for rule in fields(Ranking)),
]


@pytest.mark.parametrize(("page", "pattern"), NAMED)
def test_the_guide_tells_of_every_feature_protocol_and_rule(page, pattern):
    assert re.search(pattern, (commands.ROOT / "docs" / page).read_text(), re.M)


def test_the_architecture_names_what_there_is():
    page = (commands.ROOT / "docs" / "architecture.md").read_text()
    tables = page.partition("## How to add")[0]
    package = commands.ROOT / "bert4rec"
    for path in re.findall(r"`(\w+/\w+\.py|\w+\.py)`", tables):
        assert (package / path).is_file(), path
    rooms = [path.name + "/" for path in package.iterdir() if (path / "__init__.py").is_file()]
    rooms += [path.name for path in package.glob("[!_]*.py")]
    listed = re.findall(r"`([\w.]+/?)`", "".join(re.findall(r"^\| (`[^|]*) \|", tables, re.M)))
    assert set(rooms) <= set(listed)
