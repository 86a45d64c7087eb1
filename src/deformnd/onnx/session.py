"""Running files in ONNX Runtime on the kernels of the C++ core.

The core is at the same time a library of custom operators for ONNX Runtime (csrc/onnxruntime.cpp).
It needs neither torch nor Python, so that the one file can be copied to where a model runs.
"""

from __future__ import annotations

import os
from typing import Any

from ..kernels import cpu
from . import engines
from .export import path_to_read

_SPINNING = "session.intra_op.allow_spinning"


def custom_ops_library() -> str:
    """The path of the library that gives ONNX Runtime deformnd's CPU kernels.

    It is for SessionOptions.register_custom_ops_library of onnxruntime 1.19 or newer, in any of its
    languages. Besides ONNX Runtime it needs only the C++ and OpenMP libraries of the system. It has
    the operators of target "deformnd", and a DeformConv that stands in for ONNX Runtime's own.

    Two entries of the session's configuration count, if they are set before the library is
    registered. "deformnd.threads" is the most threads of a call; without it a call uses as many as
    OpenMP does. "deformnd.override" set to "0" leaves the standard DeformConv to ONNX Runtime.

    Returns:
        The path.

    Raises:
        FileNotFoundError: the core was not built.

    Example:
        >>> import onnxruntime
        >>> import deformnd.onnx
        >>> options = onnxruntime.SessionOptions()
        >>> options.add_session_config_entry("deformnd.threads", "4")
        >>> options.register_custom_ops_library(deformnd.onnx.custom_ops_library())
    """
    if not cpu.available():
        raise FileNotFoundError(
            f"deformnd.onnx: there is no core that fits at {str(cpu.PATH)!r}; `deformnd info` says "
            "why"
        )
    return str(cpu.PATH)


def session(
    path: str | os.PathLike[str] | bytes,
    *,
    override: bool = True,
    sess_options: Any = None,
    providers: Any = None,
    **options: Any,
) -> Any:
    """An onnxruntime.InferenceSession that runs deformable operators on deformnd's CPU kernels.

    These are the operators of files for target "deformnd", and the standard DeformConv of all other
    files. A call uses as many threads as the session's intra_op_num_threads. ONNX Runtime's own
    threads do not spin, unless sess_options have an entry "session.intra_op.allow_spinning".

    Args:
        path: the file, or its content.
        override: whether the standard DeformConv, too, runs on deformnd's kernel, and not on ONNX
            Runtime's own.
        sess_options: onnxruntime.SessionOptions, to which the library is added, with the number of
            threads that they have at that time. None: new options.
        providers: the session's providers. None: ["CPUExecutionProvider"].
        **options: more for onnxruntime.InferenceSession.

    Returns:
        The onnxruntime.InferenceSession.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: the core was not built.
        ValueError, TypeError: there is no such file, or ONNX Runtime does not load it, or
            sess_options are no SessionOptions, or belong to a session with the other `override`.
        The session itself raises onnxruntime's InvalidArgument for inputs that do not fit.

    Example:
        >>> import os, tempfile, torch
        >>> import deformnd.onnx
        >>> layer = deformnd.PackedDeformConv2d(3, 8, 3, padding=1).eval()
        >>> path, x = os.path.join(tempfile.mkdtemp(), "layer.onnx"), torch.rand(1, 3, 16, 16)
        >>> program = deformnd.onnx.export(layer, (x,), path, verbose=False)
        >>> session = deformnd.onnx.session(path)
        >>> session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].shape
        (1, 8, 16, 16)
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("deformnd.onnx.session needs onnxruntime: pip install onnxruntime") from (
            error
        )
    if sess_options is None:
        sess_options = onnxruntime.SessionOptions()
    if not isinstance(sess_options, onnxruntime.SessionOptions):
        kind = type(sess_options).__name__
        raise TypeError(
            f"deformnd.onnx: sess_options is a {kind}, expected onnxruntime.SessionOptions"
        )
    library = custom_ops_library()
    model = path if isinstance(path, bytes) else path_to_read(path)
    switch = str(int(bool(override)))
    try:  # an earlier session may have used these options, which register the library only once
        registered = sess_options.get_session_config_entry("deformnd.registered")
    except RuntimeError:
        threads = str(sess_options.intra_op_num_threads)
        sess_options.add_session_config_entry("deformnd.threads", threads)
        sess_options.add_session_config_entry("deformnd.override", switch)
        sess_options.register_custom_ops_library(library)
        sess_options.add_session_config_entry("deformnd.registered", switch)
        # A call's threads are OpenMP's. ONNX Runtime's threads wait for the next node in a loop,
        # and would take the processors from them: calls of two threads took twice as long.
        try:
            sess_options.get_session_config_entry(_SPINNING)
        except RuntimeError:
            sess_options.add_session_config_entry(_SPINNING, "0")
    else:
        if registered != switch:
            raise ValueError(
                f"deformnd.onnx: override is {override}, but sess_options were given for a session "
                f"with {not override} before, expected options of its own"
            )
    try:
        return onnxruntime.InferenceSession(
            model, sess_options, providers or ["CPUExecutionProvider"], **options
        )
    except (TypeError, ValueError):  # these are about one of the options
        raise
    except Exception as error:
        name = "the model given as bytes" if isinstance(model, bytes) else model
        raise engines.not_loaded("onnxruntime", name, error) from error
