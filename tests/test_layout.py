"""The layout: which file may import which, what an import must not change, and that every choice is written down."""
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

MAY_IMPORT = {
    "scenes": "", "metrics": "", "data": "scenes datasets", "datasets": "data scenes", "embed": "data scenes",
    "baselines": "metrics data", "pictures": "data", "llm_text": "data", "run": "data embed metrics baselines",
    "adapter_rp": "run data embed metrics baselines", "sspa": "run data embed metrics baselines",
    "tag": "adapter_rp sspa run data embed metrics pictures", "explain": "sspa tag run data datasets embed pictures",
}


def text_of(path):
    return (REPOSITORY / path).read_text("utf-8")


@pytest.mark.parametrize("pattern", ["*.py", "*/*.py", "*.sh", "*.md", "docs/*.md"])
def test_no_line_is_wider_than_120_characters(pattern):
    for path in REPOSITORY.glob(pattern):
        assert not re.findall(r"(?m)^(?!\||!\[|<!--).{121,}", text_of(path)), path


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    """At the top or inside a function, where data imports a file that imports it."""
    names = re.findall(r"(?m)^ *(?:import|from) (\w+)", text_of(f"{module}.py"))
    assert set(names) & set(MAY_IMPORT) <= set(MAY_IMPORT[module].split())


def test_data_needs_no_torch():
    code = "import sys, data; data.load_photos('scenes', '', 'test', 3); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


UNTOUCHED = """
import os, signal, sys, torch
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    streams = [sys.stdin, sys.stdout, sys.stderr, sys.stdout.encoding, sys.stdout.errors]
    return [sys.excepthook, handlers, streams, torch.get_num_threads(), os.getcwd(), os.listdir()]
before = state()
import sspa, tag, explain
assert state() == before
"""


def test_an_import_leaves_the_process_alone(tmp_path):
    code = f"import sys; sys.path.append({str(REPOSITORY)!r}){UNTOUCHED}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


WITHOUT_UNIX = """
import os, runpy, sys
sys.modules.update(dict.fromkeys(["resource", "fcntl", "pwd", "grp", "termios"]))
del os.fork, os.forkpty
import run
assert run.peak_memory_mib() is None
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


def test_without_what_only_unix_has():
    """Every script answers --help; walk.py, which has no options, runs, and ends at what SSPA.forward gives."""
    scripts = [path.name for path in REPOSITORY.glob("*.py") if "__main__" in text_of(path.name)]
    command = [sys.executable, "-c", WITHOUT_UNIX, *scripts, "walk.py"]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.count("usage: ") == len(scripts) == 7


@pytest.mark.parametrize("script, heading", [("adapter_rp.py", "## RP"), ("sspa.py", "## SSPA")])
def test_every_choice_is_in_the_table(script, heading):
    """Marks such as "choice D7", "[author D7]", "choices D5, D7" in the script, rows of the table in docs/choices.md"""
    section = text_of("docs/choices.md").split(heading + "\n")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| (D\d+) \|", section)
    marks = set(re.findall(r"\bD\d+\b", text_of(script)))
    assert set(rows) == marks
