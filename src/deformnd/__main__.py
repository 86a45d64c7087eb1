import os
import sys

from .cli import main

if __name__ == "__main__":
    # `python -m` looks for every module in the current folder first. A user's onnx.py there is not
    # the package; what else is there is still found.
    if sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False):
        sys.path.append(sys.path.pop(0))
    raise SystemExit(main())
