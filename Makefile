# One word for each thing a developer does. `.ci/run` runs the same checks in an environment made from nothing.
python ?= .venv/bin/python
data ?= data/ml-1m

.PHONY: fix check test test-all bench docs coverage

fix:  ## mend what can be mended, and write the generated pages
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
	$(MAKE) docs

check:  ## lint, format, types, generated pages
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) -m bert4rec.config_docs | diff docs/config.md -
	$(python) -m benchmarks.render --check

test:  ## unit tests, without Ray
	$(python) -m pytest tests/unit

test-all:  ## what .ci/run tests; `-m cluster` and `-m integration` add slow ones
	$(python) -m pytest -n 2

bench:  ## an hour or more on MovieLens-1M, alone on the machine; the figures are recorded
	for name in training recommend ray_cost; do $(python) -m benchmarks.$$name --data $(data) --record || exit; done
	for name in prepare muon; do $(python) -m benchmarks.$$name --record || exit; done
	$(python) -m benchmarks.render

docs:  ## the generated pages: the config reference and the tables of results
	$(python) -m bert4rec.config_docs > docs/config.md
	$(python) -m bert4rec.training.auto docs/training.md
	$(python) -m benchmarks.render

coverage:  ## lines that the unit tests do not run
	$(python) -m pytest tests/unit --cov=bert4rec --cov=jobs --cov-report=term-missing:skip-covered
