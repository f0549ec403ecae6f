import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

WITH_RAY = {
    "bert4rec.api",
    "bert4rec.cli",
    "bert4rec.cluster.errors",
    "bert4rec.cluster.resources",
    "bert4rec.cluster.users",
    "bert4rec.data.prepare",
    "bert4rec.data.ray_data",
    "bert4rec.embedding.embed",
    "bert4rec.evaluation.evaluate",
    "bert4rec.inference.fit_blend",
    "bert4rec.inference.recommend",
    "bert4rec.inference.vectors",
    "bert4rec.progress",
    "bert4rec.training.train",
    "bert4rec.training.trainer",
    "bert4rec.tune.tune",
}


def test_the_core_imports_without_ray():
    """In a process of its own; a file of the package is either listed above or imports no Ray."""
    package = Path(__file__).parents[2] / "bert4rec"
    files = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")]
    core = sorted({".".join(file.parts).removesuffix(".__init__") for file in files} - WITH_RAY)
    assert {"bert4rec.config", "bert4rec.data.dataset", "bert4rec.inference.ranking"} <= set(core)
    code = "; ".join(f"import {name}" for name in core)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print('ray' in sys.modules)"],
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr


def test_prepare_waits_for_no_more_than_it_needs():
    code = "import sys, jobs.prepare; print({'torch', 'ray.data', 'ray.train'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_package_imports_what_is_used():
    """Its functions stay functions when the modules of their names are imported, before or after."""
    code = """
import sys
import bert4rec.storage
from bert4rec import BERT4Rec, load, load_config
config = load_config(None, ["model.max_len=7"])
print(config.model.max_len, load.__module__, "ray" in sys.modules)
import bert4rec.training.train
from bert4rec import embed, evaluate, prepare, recommend, train
import bert4rec.evaluation.evaluate
print([getattr(bert4rec, step.__name__).__module__ for step in (prepare, embed, train, evaluate, recommend)])
print(bert4rec.storage.__name__, hasattr(bert4rec, "nothing"), set(bert4rec.__all__) <= set(dir(bert4rec)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "7 bert4rec.inference.recommender False",
        str(["bert4rec.api"] * 5),
        "bert4rec.storage False True",
    ], done.stderr
