"""Does transformers load an exported model with every key in its place, and compute the same logits?

    cd /tmp && python PATH/tests/golden/check_export.py [--expected FILE.npz] DIR...

Run it in an environment with torch and transformers, from a folder that is not the root of this repository. A DIR fails
if a key is missing, unexpected or of another shape, if transformers warns about keys of the weights or of the config,
or if the logits differ from `expected.npz` (of `make_hf.py`, in DIR or given) by more than `--atol`. Exit code 1 if one
fails.
"""

import argparse
import copy
import logging
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

ABOUT_KEYS = re.compile(r"\bkeys?\b|missing|unexpected|mismatch|newly initialized|not used|\btied?\b", re.I)


class Warnings(logging.Handler):
    """Keeps what transformers logs as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def load(path: Path):
    """The model in `path` in float32, and what is wrong with its keys."""
    heard = Warnings()
    logger = logging.getLogger("transformers")
    logger.addHandler(heard)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    except Exception as error:  # whatever it is, it is the verdict on this directory
        return None, [f"{type(error).__name__}: {error}", *heard.texts]
    finally:
        logger.removeHandler(heard)
    wrong = [f"{kind}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    return model.eval(), wrong + [text for text in heard.texts if ABOUT_KEYS.search(text)]


def difference(model, expected: Path) -> float:
    """The largest difference of logits, each row of `expected` computed alone."""
    golden = np.load(expected)
    worst = 0.0
    for ids, length, logits in zip(golden["ids"], golden["lengths"], golden["logits"], strict=True):
        fresh = copy.deepcopy(model)  # "dynamic" rope remembers the longest call
        with torch.no_grad():
            out = fresh(input_ids=torch.tensor(ids[None, :length], dtype=torch.long), use_cache=False).logits[0]
        if out.shape != logits[:length].shape:
            return float("inf")
        gap = np.abs(out.numpy() - logits[:length]).max()
        worst = max(worst, float(gap) if np.isfinite(gap) else float("inf"))
    return worst


def check(path: Path, expected: Path | None, atol: float) -> bool:
    """Print the verdict on one directory; true if it is good."""
    model, wrong = load(path)
    expected = expected or path / "expected.npz"
    said = "keys fit"
    if model is not None and expected.exists():
        gap = difference(model, expected)
        said = f"{said}, logits differ by at most {gap:.3g}"
        if gap > atol:
            wrong.append(f"logits differ from {expected} by {gap:.3g}, more than {atol:g}")
    for text in wrong:
        print(f"FAIL {path}: {text}")
    if not wrong:
        print(f"ok   {path}: {said}")
    return not wrong


def main() -> int:
    """Check every directory, then say whether one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--expected", type=Path, help="an expected.npz, where DIR does not hold one")
    parser.add_argument("--atol", type=float, default=1e-4)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if args.expected and not args.expected.exists():
        parser.error(f"{args.expected} does not exist")
    good = [check(path, args.expected, args.atol) for path in args.dirs]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
