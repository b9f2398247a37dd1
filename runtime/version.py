"""Which code made a result: the git commit, and a hash of the .py files that matter, which any edit of them changes.

A version is `bc5813abcd+ 5f0c2e9a.77aa01bc`: the commit (`+`: the tree has changes; `unknown`: no git), a hash of the
packages and one of the script. Only the hashes tell versions apart, so a commit that changes no code makes nothing
stale, and an edit counts whether git knows of the file or not. What matters:

- packages: every .py file below the repository's folders with an `__init__.py`, except `NO_PART`;
- script: the file that runs (a copied one as well), with what it imports from beside it. Its name does not count.

All of it is read once, when this module is imported, as nearly all modules are: an edit in the middle of a run is
neither in its memory nor in its version.
"""

import ast
import functools
import hashlib
import re
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
NO_PART = ("tests", "benchmarks", "docs")  # folders whose code takes no part in a result


def code_version(script: str | Path | None = None) -> str:
    """The version of this code with the script that runs; of a run that another version began, `theirs, then ours`.
    With `script`: what the version of a fresh run of that one would be."""
    here = f"{commit()} {_PACKAGES}.{_script_hash(Path(script or sys.argv[0]).resolve())}"
    if script or not _earlier:
        return here
    return _earlier if _earlier.endswith(here.split()[1]) else f"{_earlier}, then {here}"


def goes_on_from(made_by: str | None) -> None:
    """Note which version began this run, None for a fresh start: results that two versions made name both."""
    global _earlier
    _earlier = made_by if made_by and another_version(made_by) else ""


def another_version(made_by: str | None, script: str | Path | None = None, *, with_script: bool = True) -> str:
    """`another version of the code (...)` if `made_by` is not the version here, else empty.

    Args:
        made_by: of a checkpoint or of results. None, or one without hashes (of old runs), is another one.
        script: the one that made it, if that is not the one that runs. `with_script` false: packages alone count.
    """
    here = code_version(script or sys.argv[0])
    if _hashes(made_by or "", with_script) == _hashes(here, with_script):
        return ""
    return f"another version of the code ({made_by or 'unknown'}; here is {here})"


def _hashes(version: str, with_script: bool) -> set[str]:
    return set(re.findall(r"\b[0-9a-f]{8}\.[0-9a-f]{8}" if with_script else r"\b[0-9a-f]{8}(?=\.)", version))


@functools.cache
def commit() -> str:
    """Commit of this code, with `+` when the tree has changes; `unknown` outside a git checkout."""
    command = ["git", "-C", str(TOP), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def packages_hash(top: Path) -> str:
    """Eight digits of the names and contents of the .py files in the packages of `top`."""
    packages = [file.parent for file in top.glob("*/__init__.py") if file.parent.name not in NO_PART]
    files = (file for package in packages for file in package.rglob("*.py") if file.is_file())
    return _hash({file.relative_to(top).as_posix(): file for file in files})


@functools.cache
def _script_hash(script: Path) -> str:
    """Eight digits of a script and of the modules beside it that it imports, directly or through one another."""
    files, waiting = {}, [("", script)] if script.is_file() else []
    while waiting:
        name, file = waiting.pop()
        files[name] = file
        for beside in (script.parent / module.partition(".")[0] for module in _imported(file)):
            folder = [] if (beside / "__init__.py").exists() and beside.parent == TOP else beside.rglob("*.py")
            found = {f.relative_to(script.parent).as_posix(): f for f in (beside.with_suffix(".py"), *folder)}
            waiting += [(name, f) for name, f in found.items() if f.is_file() and name not in files]
    return _hash(files)


def _imported(file: Path) -> list[str]:
    """The modules that a file names in its imports; none of a file that Python cannot read."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return []
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return whole + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def _hash(files: dict[str, Path]) -> str:
    """Eight digits of {name: file}, names and contents."""
    whole = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        whole.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return whole.hexdigest()[:8]


_PACKAGES = packages_hash(TOP)
_script_hash(Path(sys.argv[0]).resolve())  # computed now: later edits are not in this process's memory
_earlier = ""  # the version that began this run, if it was another one
