import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

WITH_RAY = {"cli", "embed", "evaluate", "prepare", "progress", "recommend", "train", "tune", "workers"}


def test_the_core_imports_without_ray():
    """In a process of its own; a file of the package is either listed above or imports no Ray."""
    package = Path(__file__).parents[2] / "bert4rec"
    core = sorted({path.stem for path in package.glob("*.py")} - WITH_RAY - {"__init__"})
    assert {"config", "dataset", "batches", "model", "scoring", "loop"} <= set(core)
    code = "; ".join(f"import bert4rec.{name}" for name in core)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print('ray' in sys.modules)"],
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr
