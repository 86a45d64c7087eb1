"""Run an ONNX file on deformnd's kernels: onnxruntime, numpy and one library, no torch.

    python run_onnx.py model.onnx /path/to/_core.so

The library is the file that deformnd.onnx.custom_ops_library() names, and may have been copied to
a machine without deformnd. All inputs are float32, and are filled with 0.5; a size that the file
leaves open is 1. Where deformnd is installed, deformnd.onnx.session(path) does the first half.
"""

import sys
import time

import numpy as np
import onnxruntime

path, library = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
# ONNX Runtime's threads shall not spin while the library's, which are OpenMP's, compute.
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
options.add_session_config_entry("deformnd.threads", "2")  # before the library
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

feed = {
    i.name: np.full([s if isinstance(s, int) else 1 for s in i.shape], 0.5, np.float32)
    for i in session.get_inputs()
}
outputs = session.run(None, feed)
start = time.perf_counter()
session.run(None, feed)
milliseconds = 1000 * (time.perf_counter() - start)
for output, array in zip(session.get_outputs(), outputs, strict=True):
    print(f"{output.name} {list(array.shape)} begins with {array.flat[0]:g}")
print(f"{milliseconds:.2f} ms")
