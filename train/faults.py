"""Injected faults, for tests of what a run survives: GRAFTAX_FAULT="POINT[@STEP[-STEP]]:ACTION[,...]".

    GRAFTAX_FAULT=save.manifest@4:kill graftax pretrain ...

Points: compile · step (its beginning) · score (an evaluation) · save.begin (the folder exists) · save.arrays (the
arrays are written, the manifest is not) · save.manifest (it is written, the folder has its temporary name) · save.end
(the folder has its name, older checkpoints still exist). Actions: kill (SIGKILL) · term, int (the signal) · fail (an
error in the program) · full (no space left) · readonly · nan (step only: its loss becomes NaN).
"""

import errno
import os
import re
import signal

from .. import InputError

VARIABLE = "GRAFTAX_FAULT"
POINTS = ("compile", "step", "score", "save.begin", "save.arrays", "save.manifest", "save.end")
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
_ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS}


def at(point: str, step: int = 0) -> str:
    """Act as the variable says for this point and step. Return the action that is left to the caller (`nan`) or ""."""
    text = os.environ.get(VARIABLE)
    if not text:
        return ""
    for fault in text.split(","):
        match = re.fullmatch(r"([a-z.]+)(?:@(\d+)(?:-(\d+))?)?:(\w+)", fault)
        if not match or match[1] not in POINTS or match[4] not in (*_SIGNALS, *_ERRORS, "fail", "nan"):
            raise InputError(f"{VARIABLE}={fault}: wanted POINT[@STEP[-STEP]]:ACTION, POINT of {', '.join(POINTS)}")
        first = int(match[2]) if match[2] else step
        if match[1] == point and first <= step <= int(match[3] or first):
            return _act(match[4], fault)
    return ""


def _act(action: str, fault: str) -> str:
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    if action in _ERRORS:
        raise OSError(_ERRORS[action], f"{os.strerror(_ERRORS[action])} ({VARIABLE}={fault})")
    if action == "fail":
        raise RuntimeError(f"{VARIABLE}={fault}")
    return action
