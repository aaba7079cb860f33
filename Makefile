# From a fresh clone with Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Compiles on all cores; pip uses one. Without it, each process compiles torch anew where PYTHONDONTWRITEBYTECODE is set.
COMPILE := -m compileall -qq -j 0 -x '/tests?/|/testing/_internal/'

.PHONY: demo test slow notebooks floor check docs supported bench bench-peers install clean

demo: install  ## run a job on the embedded model and texts, and write a report of its dataset
	$(BIN)/python -m qk_sniffer
	$(BIN)/python -m qk_sniffer.report data_root=outputs/pydoc-tiny-pydoc

test: install  ## run the quick tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

slow: install  ## run the slow tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs,notebooks,quantized]'
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m slow

notebooks: install  ## run the notebooks of examples/ in place, to refresh their outputs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,notebooks]'
	$(BIN)/python scripts/notebooks.py

supported: install  ## capture every model type of transformers and write models/SUPPORTED.md
	$(BIN)/python scripts/supported.py

bench: install  ## run every benchmark; takes about two hours on two cores (benchmarks/README.md)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[analysis]'
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/plasticity.py

# Compares qk-sniffer with other ways to get all vectors, each in its own environment (benchmarks/README.md).
PEERS := .venv-peers

bench-peers: install $(PEERS)/transformer_lens/.installed $(PEERS)/nnsight/.installed $(PEERS)/kvpress/.installed  ## compare with other ways to get vectors
	$(BIN)/python benchmarks/peers.py

$(PEERS)/%/.installed: benchmarks/peers/%.txt constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	sed -n 's/^\([^#]*==\).*/^\1/p' $< | grep -vf - constraints.txt > $(@D)/constraints.txt  # a version in $< comes first
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -r $<
	touch $@

check: install  ## check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## build the site into site/; a broken link or reference fails
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Has the oldest transformers that pyproject.toml admits, with a huggingface_hub 1, in its own environment.
FLOOR := .venv-floor
FLOOR_TRANSFORMERS := 5.17.0

floor: $(FLOOR)/.installed  ## run the tests marked floor with older versions of transformers and huggingface_hub
	$(FLOOR)/bin/python -m pytest -n 2 --dist worksteal -q -m 'floor and (further or not slow)'

$(FLOOR)/.installed: pyproject.toml constraints.txt
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > $(FLOOR)/constraints.txt
	echo 'transformers==$(FLOOR_TRANSFORMERS)' >> $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(FLOOR)/constraints.txt -e '.[dev,gguf,peft]'
	$(FLOOR)/bin/python $(COMPILE) $(FLOOR)/lib
	touch $@

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev,gguf,peft]'
	$(BIN)/python $(COMPILE) .venv/lib
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-peers build site *.egg-info
