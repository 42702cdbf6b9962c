"""Generate pages that the code knows: the command line's help, the table of methods, and the notebooks.

MkDocs calls `on_files` before it renders. Generated pages are not kept in git.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add reference/cli.md, reference/methods.md and notebooks/*.ipynb."""
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    files.append(File.generated(config, "reference/methods.md", content=methods()))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
    return files


def graftax(*args: str) -> str:
    """Return what `graftax ARGS` prints."""
    command = [sys.executable, "-m", "graftax.train.cli", *args]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def command_line() -> str:
    """Return a page with the help of every command."""
    from graftax.train.cli import COMMANDS

    parts = ["# Command line\n", f"```text\n{graftax('--help')}\n```\n"]
    parts += [f"## graftax {name}\n\n```text\n{graftax(name, '--help')}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


def methods() -> str:
    """Return a page with every method: its formula and fields."""
    import dataclasses

    from graftax import peft

    parts = ["# Methods\n", "`graftax methods --preset NAME` counts what each trains.\n"]
    for name, cls in sorted(peft.methods.items()):
        fields = [f"`{f.name}` = `{f.default!r}`" for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        parts.append(
            f"## {name}\n\n`peft.{cls.__name__}`: {(cls.__doc__ or '').strip()}\n\nFields: {', '.join(fields)}\n"
        )
    return "\n".join(parts)
