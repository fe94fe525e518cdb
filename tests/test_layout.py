"""The layout that design asks for: how long files may be, and who may import whom. Growth is a decision made here."""
import ast
import importlib
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

BUDGETS = {
    "adapter_rp.py": 645, "sspa.py": 1003, "llm_text.py": 504, "data.py": 600, "datasets.py": 600,
    "embed.py": 390, "metrics.py": 160,
    "run.py": 618, "pictures.py": 170, "scenes.py": 285, "run_all.sh": 142, "README.md": 161, "pyproject.toml": 25,
    "experiments/tables.py": 373, "experiments/benchmark.py": 568, "experiments/baselines.py": 80,
    "experiments/text_quality.py": 160, "experiments/train_scenes_clip.py": 120, "experiments/localize.py": 261,
}
MAY_IMPORT = {
    "scenes": set(), "metrics": set(), "data": {"scenes", "datasets"},
    "datasets": {"data", "scenes"}, "embed": {"data", "scenes"}, "pictures": {"data"},
    "run": {"data", "embed", "metrics", "pictures"}, "llm_text": {"data"},
    **dict.fromkeys(("adapter_rp", "sspa"), {"run", "data", "datasets", "embed", "metrics", "pictures"}),
}


def lines_of(path):
    return (REPOSITORY / path).read_text("utf-8").splitlines()


def tracked(*suffixes):
    return [path for path in REPOSITORY.rglob("*") if path.suffix in suffixes
            and not {".venv", "runs", "results", ".git"} & set(path.relative_to(REPOSITORY).parts)]


@pytest.mark.parametrize("path", BUDGETS)
def test_files_stay_within_their_budgets(path):
    assert len(lines_of(path)) <= BUDGETS[path]


def test_the_whole_of_the_tests_stays_within_its_budget():
    assert sum(len(lines_of(path)) for path in (REPOSITORY / "tests").glob("*.py")) <= 3700


def test_no_line_is_wider_than_120_characters():
    wide = [f"{path}:{number}" for path in tracked(".py", ".sh", ".md") for number, line in enumerate(lines_of(path), 1)
            if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not wide


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    tree = ast.parse("\n".join(lines_of(f"{module}.py")))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported & set(MAY_IMPORT) <= MAY_IMPORT[module]


def test_data_needs_no_torch():
    code = "import sys, data; data.load_photos('scenes', '', 'test', 3); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("script, most", [("adapter_rp", 43), ("sspa", 54)])
def test_a_script_has_few_options(script, most):
    module = importlib.import_module(script)
    assert len(module.run.options_of(module.Config)) <= most


def test_every_choice_of_a_docstring_is_marked_or_an_option():
    """D1, D2 ... are explained in the docstring only; the code names each where it is made."""
    for script in ("adapter_rp.py", "sspa.py"):
        _, docstring, code = (REPOSITORY / script).read_text("utf-8").split('"""', 2)
        numbers, marked = (set(re.findall(r"\bD\d+\b", text)) for text in (docstring, code))
        assert len(numbers) > 8 and numbers == marked, (script, numbers ^ marked)
