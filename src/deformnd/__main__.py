import os
import sys

from .cli import main

if __name__ == "__main__":
    # `python -m` puts the current folder first on sys.path, where a user's onnx.py would be taken
    # for the package. So the folder is looked into last.
    if sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False):
        sys.path.append(sys.path.pop(0))
    raise SystemExit(main())
