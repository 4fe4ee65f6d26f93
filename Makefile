# make setup        .venv with the packages of pyproject.toml (once, and again when that file changes)
# make quickstart   a toy model and data, trained with TreePO on this machine
# make test         lint, types, import rules, all tests
# make test-fast    the same without the tests marked slow
# make oracle       NVIDIA's megatron-bridge for one of the slow tests, which is skipped without it
# make docs         the documentation as a site, in site/; a broken link or anchor is an error

.DELETE_ON_ERROR:
.PHONY: setup quickstart test test-fast check oracle docs clean

VENV := .venv
BIN := $(VENV)/bin
# Processes start much faster with compiled modules.
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

# Fast tests run in three processes, because many wait for a deadline. Slow ones run in two, each of which
# starts the engine that its tests share; in the files' order the short files come last.
test: test-fast
	$(BIN)/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

test-fast: check
	$(BIN)/pytest -m "not slow" -n 3 --dist worksteal

# It would install another PyTorch, so it comes without its dependencies and outside of site-packages.
oracle: setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oracle megatron-bridge==0.6.2

# NO_MKDOCS_2_WARNING silences the theme's announcement of its end of life.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html"

clean:
	rm -rf $(VENV) runs site
