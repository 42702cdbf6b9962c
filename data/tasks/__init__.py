"""Tasks: what a fine-tune is judged on. Training, validation and test rows, and a score."""

from collections.abc import Callable
from pathlib import Path

from . import public, python_functions
from .base import Task

# Name -> (root of the data folder) -> Task; the embedded ones take no notice of root.
tasks: dict[str, Callable[[Path], Task]] = {
    "clinc150": public.clinc150,
    "snips": public.snips,
    "e2e_nlg": public.e2e_nlg,
    "embedded:package": python_functions.package,
    "embedded:next_statement": python_functions.next_statement,
    "embedded:next_token": python_functions.next_token,
}
