.PHONY: quickstart test lint format

quickstart:
	bash script/quickstart.sh

test:
	bash script/test.sh

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

format:
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .
