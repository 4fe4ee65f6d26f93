# make setup        .venv with everything that pyproject.toml names (once; again when it changes)
# make quickstart   a toy model and data, trained with TreePO on this machine
# make test         lint, types, import rules, all tests
# make test-fast    the same without the tests marked slow
# make docs         the documentation as a site, in site/; a broken link or anchor is an error

.DELETE_ON_ERROR:
.PHONY: setup quickstart test test-fast check docs clean

VENV := .venv
BIN := $(VENV)/bin
# Compiled modules are what makes the second start of every process fast.
unexport PYTHONDONTWRITEBYTECODE

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt setup.sh
	@./setup.sh $(VENV)
	@touch $@

quickstart: setup
	@$(BIN)/treepo toy
	@$(BIN)/treepo train examples/quickstart.yaml

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/basedpyright

test: check
	$(BIN)/pytest

test-fast: check
	$(BIN)/pytest -m "not slow"

# The theme's makers announce its end of life at every build.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html"

clean:
	rm -rf $(VENV) runs site
