# A bare clone, Python 3.11 or newer and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow gpu lint format docs clean

demo: $(STAMP)
	$(BIN)/lightspine demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

gpu: $(STAMP)
	$(BIN)/python tools/gpu_session.py gpu-results

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml runtime/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=")'
	@if command -v uv >/dev/null 2>&1; then \
		test -d $(VENV) || uv venv --python $(PYTHON) $(VENV); \
		uv pip install --python $(BIN)/python -e './runtime[fast]' -e '.[dev]'; \
	else \
		test -d $(VENV) || $(PYTHON) -m venv $(VENV); \
		echo "installing lightspine and its dependencies into $(VENV); PyTorch is a large download"; \
		$(BIN)/python tools/install.py $(VENV)/install.log \
			$(BIN)/python -m pip install --disable-pip-version-check -e './runtime[fast]' -e '.[dev]'; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist runs lightspine-demo site
