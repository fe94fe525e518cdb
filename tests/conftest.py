"""Shared by the tests: where things are, and the real command line as a subprocess."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def shared():
    """Real photos, captions and embeddings; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data for tests not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One embedding cache for the whole session."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def command(cache, tmp_path_factory):
    """command("sspa.py", "--epochs", 3) -> CompletedProcess of the real script, on the CPU, in a folder elsewhere."""
    def run(script, *words, expect=0, timeout=300, cwd=None):
        words = [str(word) for word in words]
        if script in ("adapter_rp.py", "sspa.py") and "--help" not in words:
            words += ["--cache", cache] + (["--cpu"] if "--gpu" not in words else [])
        done = subprocess.run([sys.executable, str(REPOSITORY / script), *words], capture_output=True, text=True,
                              timeout=timeout, cwd=cwd or tmp_path_factory.mktemp("cwd"),
                              env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        assert done.returncode == expect, f"exit code {done.returncode}, not {expect}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done
    return run
