"""Tasks that a fine-tune is judged by: rows to train on, to select by and to test on, with a score."""

from collections.abc import Callable
from pathlib import Path

from . import public, python_functions
from .base import Task

tasks: dict[str, Callable[[Path], Task]] = {  # name -> function of the folder --data.root; embedded tasks ignore it
    "clinc150": public.clinc150,
    "snips": public.snips,
    "e2e_nlg": public.e2e_nlg,
    "embedded:package": python_functions.package,
    "embedded:next_statement": python_functions.next_statement,
    "embedded:next_token": python_functions.next_token,
}
