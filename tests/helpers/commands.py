"""The commands that README.md and docs/*.md tell users to run."""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from bert4rec import cli
from bert4rec.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Command(NamedTuple):
    """`python -m jobs.JOB …` on a page."""

    page: str
    job: str
    arguments: tuple[str, ...]
    is_shell: bool
    """Whether it is in a ```bash block, not in the text."""

    def __str__(self):
        return f"{self.page}: {' '.join([self.job, *self.arguments])}"


def shell_lines():
    """Yield (page, words) for each command in a ```bash block. `.venv/bin/python` becomes `python`."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S):
            block = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", block, flags=re.M | re.S)  # files written in place
            for line in re.sub(r"\\\n", " ", block).splitlines():
                for part in re.split(r"&&|;(?=\s)", line):
                    words = shlex.split(part.replace(".venv/bin/", ""), comments=True)
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
                        words.pop(0)
                    if words:
                        yield page.name, words


def _all():
    for page, words in shell_lines():
        for start in [i for i, word in enumerate(words) if word.startswith("jobs.") and words[i - 1] == "-m"]:
            yield Command(page, words[start].removeprefix("jobs."), tuple(words[start + 1 :]), True)
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for found in re.findall(r"`[^`\n]*python -m jobs\.([^`]+)`", text):
            words = [word for word in shlex.split(found) if "…" not in word]
            yield Command(page.name, words[0], tuple(words[1:]), False)


def parse(command, *overrides):
    """Return the config of a command, or None for a job without a config. Raise if an option or key does not exist.

    Names in capitals are placeholders for the reader's own. `overrides` override those of the command.
    """
    module = importlib.import_module(f"jobs.{command.job}")
    if hasattr(module, "_parser"):
        words = ["ml-1m" if command.job == "movielens" and word == "NAME" else word for word in command.arguments]
        module._parser().parse_args(words)
        return None
    options = cli._parser("").parse_intermixed_args(command.arguments)
    is_ours = options.config not in (None, cli.AUTO) and not re.search(r"\b[A-Z]{3,}\b", options.config)
    return load_config(str(ROOT / options.config) if is_ours else None, [*options.overrides, *overrides])


JOBS = sorted(set(_all()))
