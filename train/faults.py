"""Faults on purpose, at exact points: GRAFTAX_FAULT="POINT[@STEP[-STEP]]:WHAT[,...]", off without it.

    GRAFTAX_FAULT=save.manifest@4:kill graftax pretrain ...

Points: compile · step (its beginning) · score (an evaluation) · save.begin (the folder is made) · save.arrays (they are
written, no manifest is) · save.manifest (it is written, the folder has no name yet) · save.end (it has; older ones are
still there). What: kill (SIGKILL) · term, int (the signal) · fail (an error of the program) · full (no space left) ·
readonly · nan (step: the loss of this step).
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
    """Do what the variable wants at this point of this step; returns what the caller has to do himself (`nan`)."""
    text = os.environ.get(VARIABLE)
    if not text:
        return ""
    for one in text.split(","):
        found = re.fullmatch(r"([a-z.]+)(?:@(\d+)(?:-(\d+))?)?:(\w+)", one)
        if not found or found[1] not in POINTS or found[4] not in (*_SIGNALS, *_ERRORS, "fail", "nan"):
            raise InputError(f"{VARIABLE}={one}: wanted POINT[@STEP[-STEP]]:WHAT, a point of {', '.join(POINTS)}")
        first = int(found[2]) if found[2] else step
        if found[1] == point and first <= step <= int(found[3] or first):
            return _do(found[4], one)
    return ""


def _do(what: str, why: str) -> str:
    if what in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[what])
    if what in _ERRORS:
        raise OSError(_ERRORS[what], f"{os.strerror(_ERRORS[what])} ({VARIABLE}={why})")
    if what == "fail":
        raise RuntimeError(f"{VARIABLE}={why}")
    return what
