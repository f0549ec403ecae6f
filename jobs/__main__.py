"""The console command: `bert4rec JOB ...` runs `python -m jobs.JOB ...`."""

import ast
import pkgutil
import runpy
import sys
from pathlib import Path

JOBS = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name[0] != "_")


def main() -> None:
    """Run the job that the first argument names. If it names no job, exit with 2."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in JOBS:
        is_wanted = name in ("-h", "--help")
        print(_usage(), file=sys.stdout if is_wanted else sys.stderr)
        sys.exit(0 if is_wanted else 2)
    sys.argv = [f"bert4rec {name}", *arguments]
    runpy.run_module(f"jobs.{name}", run_name="__main__")


def _usage() -> str:
    """One line per job, parsed from its docstring, because importing the jobs takes seconds."""
    lines = ["usage: bert4rec JOB [--help] [--config FILE] [group.key=value ...]", "", "jobs:"]
    for name in JOBS:
        text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text())) or ""
        lines.append(f"  {name:<10} {text.partition(':')[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
