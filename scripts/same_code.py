"""Show that two commits have the same code, docstrings and comments left out: `python scripts/same_code.py OLD NEW`.

Compares the files of src and tests: Python by syntax tree, C without comments, others byte by byte. Names the files
that differ and exits 1 when there is one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_code(source: str) -> str:
    """The syntax tree without docstrings. Comments and layout are not in it anyway."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def c_code(source: str) -> str:
    """The source without comments and with single spaces. A string that looks like a comment stays."""
    kept = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', lambda match: match[1] or " ", source, flags=re.S)
    return " ".join(kept.split())


def code(commit: str, name: str) -> str:
    source = subprocess.run(["git", "show", f"{commit}:{name}"], capture_output=True, text=True).stdout
    return python_code(source) if name.endswith(".py") else c_code(source) if name.endswith((".c", ".h")) else source


def main(old: str, new: str) -> int:
    diff = ["git", "diff", "--name-only", "--no-renames", "-z", f"{old}^{{commit}}", f"{new}^{{commit}}", "--"]
    changed = subprocess.run([*diff, ":/src", ":/tests"], check=True, capture_output=True, text=True).stdout.split("\0")
    different = [name for name in filter(None, changed) if code(old, name) != code(new, name)]
    print("\n".join(different) or "the code is the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 3 else __doc__)
