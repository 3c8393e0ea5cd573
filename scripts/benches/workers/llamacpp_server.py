"""llama.cpp's server with LoRA adapters, run by the peer's own Python: MODEL PORT THREADS [ADAPTER ...]."""

import sys
import time

import xllamacpp

SLOTS = 4
CONTEXT_TOKENS = 4096


def main(model: str, port: str, threads: str, *adapters: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.n_parallel = SLOTS
    params.n_ctx = CONTEXT_TOKENS
    params.cpuparams.n_threads = int(threads)
    params.cpuparams_batch.n_threads = int(threads)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
