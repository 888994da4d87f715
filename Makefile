# Every target creates the virtual environment that it needs. To use another Python, with the newest
# versions that the requirements allow: make quick PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV := .venv
DEMO := runs/demo
TESTS :=  # files that `make quick` runs; all by default

.PHONY: demo test quick lint docs notebooks clean

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt requirements-docs.txt $(VENV)/run
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/run
	$(VENV)/bin/python main.py --mode=train --config=configs/vp/mnist_ddpmpp_continuous.py --workdir=$(DEMO)
	@echo "Samples: $$(ls -t $(DEMO)/samples/*/sample.png | head -n 1)"

test: $(VENV)/dev
	$(VENV)/bin/python -m pytest -q -n auto --dist worksteal --durations=25

quick: $(VENV)/dev
	$(VENV)/bin/python -m pytest -q -n auto --dist worksteal -m "not slow" $(TESTS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

notebooks: $(VENV)/dev
	$(VENV)/bin/python -m notebooks

docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "The site: site/index.html"

clean:
	rm -rf $(VENV) runs site
