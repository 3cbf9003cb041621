"""The log of inputs names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_row_of_the_log_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "inputs.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| kind ")]
    assert len(rows) > 20
    for row in rows:
        found = NAMED.findall(row)
        assert found, f"no test: {row}"
        for file, name in found:
            tree = ast.parse((ROOT / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name.startswith("test_") and name in functions, f"{file} has no {name}"
