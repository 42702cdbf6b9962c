"""Generate pages that the code knows: the command line's help, the table of methods, and the notebooks.

MkDocs calls `on_config`, then `on_files`, before it renders. Generated pages are not kept in git.
"""

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / ".cache" / "package"  # also in mkdocs.yml, as the path in which mkdocstrings looks


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> Any:
    """Make a folder in which this repository is the package graftax, whatever its own folder is called.

    It links to the package's parts, since a link to the root would contain itself, and mkdocstrings follows links.
    """
    shutil.rmtree(PACKAGE, ignore_errors=True)
    (PACKAGE / "graftax").mkdir(parents=True)
    for part in [*ROOT.glob("*.py"), *(path.parent for path in ROOT.glob("*/__init__.py"))]:
        (PACKAGE / "graftax" / part.name).symlink_to(part)
    sys.path.insert(0, str(PACKAGE))
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "JAX_PLATFORMS": "cpu"}  # of the help texts
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add reference/cli.md, reference/methods.md and notebooks/*.ipynb."""
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    files.append(File.generated(config, "reference/methods.md", content=methods()))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        place = {"src_dir": str(ROOT), "dest_dir": config.site_dir, "use_directory_urls": config.use_directory_urls}
        files.append(File(f"notebooks/{notebook.name}", **place))
    return files


def graftax(*args: str) -> str:
    """Return what `graftax ARGS` prints."""
    from graftax.train.cli import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main(list(args))
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"graftax {' '.join(args)}: exit code {end.code}") from end
    return text.getvalue()


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
