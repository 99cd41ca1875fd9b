"""Runs one foreign engine in a Python of its own; started by `explorer.bench.foreign`, and independent of this package.

The engine's environment holds the engine and numpy, nothing else: this file imports no more. Requests come as JSON lines on standard input,
answers leave as JSON lines on what was standard output when the process began (engines print there themselves).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Engine = Callable[[Any], Any]


def onnxruntime_engine(model: str, threads: int, _precision: str, _batch: int) -> tuple[str, Engine]:
    """ONNX Runtime on its CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return onnxruntime.__version__, lambda x: session.run(None, {name: x})[0]


def openvino_engine(model: str, threads: int, precision: str, _batch: int) -> tuple[str, Engine]:
    """OpenVINO tuned for latency; precision "f32", or "default", which is bf16 where the CPU multiplies it."""
    import openvino

    config: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    if precision == "f32":
        config["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(model, "CPU", config)
    request = compiled.create_infer_request()
    output = compiled.output(0)
    return openvino.__version__, lambda x: request.infer([x], share_inputs=True)[output]


def deepsparse_engine(model: str, threads: int, _precision: str, batch: int) -> tuple[str, Engine]:
    """DeepSparse; it sends usage statistics unless it is told not to."""
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")
    import deepsparse

    engine = deepsparse.compile_model(model, batch_size=batch, num_cores=threads)
    return deepsparse.__version__, lambda x: engine.run([x])[0]


ENGINES = {"onnxruntime": onnxruntime_engine, "openvino": openvino_engine, "deepsparse": deepsparse_engine}


def load(request: dict[str, Any]) -> tuple[str, Callable[[], Any]]:
    """Compile the network, leave its output where the request says, and return the engine's version and an inference."""
    import numpy as np

    value = np.load(request["input"])
    version, engine = ENGINES[request["engine"]](
        request["model"], request["threads"], request["precision"], len(value)
    )
    np.save(request["output"], np.asarray(engine(value)))
    return version, lambda: engine(value)


def timed(call: Callable[[], Any], calls: int) -> float:
    """Seconds of so many calls, after one that wakes the engine's threads and caches and is not counted."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    call: Callable[[], Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["do"] == "load":
                version, call = load(request)
                answer = {"version": version}
            elif call is not None:
                answer = {"seconds": timed(call, request["calls"])}
            else:
                answer = {"error": "nothing has been loaded"}
        except Exception as error:  # noqa: BLE001  # whatever an engine raises belongs to the one who asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
