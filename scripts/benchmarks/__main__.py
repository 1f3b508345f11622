"""python scripts/benchmarks NAME ...: one benchmark; without a name, what there is."""

import ast
import importlib
import sys
from pathlib import Path

from jaxprune.errors import UserError

FILES = {
    file.stem: ast.parse(file.read_text()) for file in sorted(Path(__file__).parent.glob("*.py"))
}
FOUND = {
    name: (ast.get_docstring(tree) or "").splitlines()[0]
    for name, tree in FILES.items()
    if name != "__main__"
    and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FOUND:
        print("usage: python scripts/benchmarks NAME ...\n")
        print("\n".join(f"  {name:14} {text}" for name, text in FOUND.items()))
        sys.exit(0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2)
    name = sys.argv.pop(1)
    sys.argv[0] = f"scripts/benchmarks {name}"
    try:
        sys.exit(importlib.import_module(name).main())
    except UserError as error:
        sys.exit(f"error: {error}")
