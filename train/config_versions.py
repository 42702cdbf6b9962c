"""Versions of config.json: what was renamed, so that run folders written before still load and resume."""

from typing import Any

VERSION = 2  # of config.json
RENAMED = {  # section of config.json -> {name before version 2: name}
    "": {"accept": "force", "score_base": "eval_base_first", "max_bad": "max_skipped"},
    "data": {"bad": "bad_rows", "bad_cap": "max_bad_rows"},
    "method": {"behind": "after_output_proj"},
}


def upgrade(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the object of a config.json of any version with the names and values of this version."""
    tree = _renamed(tree, "")
    if isinstance(tree.get("resume"), bool):
        tree["resume"] = "auto" if tree["resume"] else "never"
    if isinstance(tree.get("data"), dict):
        tree["data"] = _renamed(tree["data"], "data")
        if tree["data"].get("bad_rows") == "replace":
            tree["data"]["bad_rows"] = "repair"
    return tree | {"method": _upgrade_method(tree["method"])} if "method" in tree else tree


def _upgrade_method(tree: Any) -> Any:
    if isinstance(tree, dict) and isinstance(tree.get("chain"), list):
        return tree | {"chain": [_upgrade_method(t) for t in tree["chain"]]}
    return _renamed(tree, "method") if isinstance(tree, dict) else tree


def _renamed(tree: dict[str, Any], section: str) -> dict[str, Any]:
    return {RENAMED[section].get(key, key): value for key, value in tree.items()}
