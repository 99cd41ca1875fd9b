"""Runs one foreign engine in a Python of its own; started by `explorer.bench.foreign`, and independent of this package.

The engine's environment holds the engine and numpy, nothing else: this file imports no more. Requests come as JSON lines on standard input,
answers leave as JSON lines on what was standard output when the process began (engines print there themselves).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Inference = Callable[[], Any]

MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "deepsparse": "deepsparse", "mnn": "MNN"}
"""What each engine's package is called when it is imported."""


def onnxruntime_engine(model: str, threads: int, _precision: str, value: Any) -> Inference:
    """ONNX Runtime on its CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: value}
    return lambda: session.run(None, feed)[0]


def openvino_engine(model: str, threads: int, precision: str, value: Any) -> Inference:
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
    return lambda: request.infer([value], share_inputs=True)[output]


def deepsparse_engine(model: str, threads: int, _precision: str, value: Any) -> Inference:
    """DeepSparse."""
    import deepsparse

    engine = deepsparse.compile_model(model, batch_size=len(value), num_cores=threads)
    return lambda: engine.run([value])[0]


def mnn_engine(model: str, threads: int, _precision: str, value: Any) -> Inference:
    """MNN in float32, its weights converted so that layers with more than 60 % zeros are computed sparsely.

    The converter does so when it is told to detect sparse weights; without that flag zeros change nothing. It is called as a function:
    the program of the same name installs a package and reports what it was used for.
    """
    import _tools
    import MNN
    import numpy as np

    converted = f"{model}.mnn"
    command = [
        "mnnconvert",
        "-f",
        "ONNX",
        "--modelFile",
        model,
        "--MNNModel",
        converted,
        "--bizCode",
        "bench",
    ]
    if not _tools.mnnconvert([*command, "--detectSparseSpeedUp"]):
        raise RuntimeError("MNN's converter does not accept the network")
    interpreter = MNN.Interpreter(converted)
    # "high" is float32; "low" and "normal" may compute in less where the CPU can.
    session = interpreter.createSession({"backend": "CPU", "numThread": threads, "precision": "high"})
    fed, given = interpreter.getSessionInput(session), interpreter.getSessionOutput(session)

    def plain(tensor: Any, content: Any) -> Any:
        """A tensor of that shape with its elements in the order of numpy's."""
        return MNN.Tensor(tensor.getShape(), MNN.Halide_Type_Float, content, MNN.Tensor_DimensionType_Caffe)

    value = np.ascontiguousarray(value)
    source = plain(fed, value)
    target = plain(given, np.zeros(given.getShape(), np.float32))

    def infer() -> Any:
        fed.copyFrom(source)
        interpreter.runSession(session)
        given.copyToHostTensor(target)
        return target.getNumpyData()

    return infer


ENGINES = {
    "onnxruntime": onnxruntime_engine,
    "openvino": openvino_engine,
    "deepsparse": deepsparse_engine,
    "mnn": mnn_engine,
}


def version_of(engine: str) -> str:
    """Import the engine's package and return its version."""
    module = importlib.import_module(MODULES[engine])
    return str(module.version() if engine == "mnn" else module.__version__)


def load(request: dict[str, Any]) -> tuple[str, Inference]:
    """Compile the network, run it once, and return the engine's version and an inference."""
    import numpy as np

    value = np.load(request["input"])
    infer = ENGINES[request["engine"]](request["model"], request["threads"], request["precision"], value)
    infer()
    return version_of(request["engine"]), infer


def keep_output(call: Inference, path: str) -> None:
    """Run once, and leave the output where the request says."""
    import numpy as np

    np.save(path, np.asarray(call()))


def timed(call: Inference, calls: int, warm_s: float) -> tuple[float, float]:
    """Seconds of so many calls on the clock, and CPU seconds of this process, after some that wake the engine's threads and caches and are not counted: one, and as many as fit into `warm_s`."""
    warm = time.perf_counter() + warm_s
    call()
    while time.perf_counter() < warm:
        call()
    used, start = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    return seconds, time.process_time() - used


def wait_until_idle(limit_s: float = 0.5) -> None:
    """Sleep until the engine's threads have used no CPU for a moment: ONNX Runtime's spin for 35 ms after a call, on a core that the next engine needs."""
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(0.012)
        if time.process_time() - used < 0.002:
            return


def main() -> None:
    """Answer requests until standard input ends."""
    os.environ.setdefault(
        "NM_DISABLE_ANALYTICS", "1"
    )  # DeepSparse sends usage statistics unless it is told not to
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    call: Inference | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["do"] == "load":
                version, call = load(request)
                answer = {"version": version}
            elif request["do"] == "version":
                answer = {"version": version_of(request["engine"])}
            elif call is not None and request["do"] == "output":
                keep_output(call, request["output"])
                answer = {}
            elif call is not None:
                seconds, cpu_s = timed(call, request["calls"], request["warm_s"])
                answer = {"seconds": seconds, "cpu_s": cpu_s}
                if request["warm_s"] > 0:
                    wait_until_idle()
            else:
                answer = {"error": "nothing has been loaded"}
        except Exception as error:  # noqa: BLE001  # whatever an engine raises belongs to the one who asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
