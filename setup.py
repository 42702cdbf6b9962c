"""Setuptools: the repository root is the package `graftax`; its subpackages are discovered here."""

from setuptools import find_packages, setup

rooms = find_packages(include=[f"{room}{end}" for room in ("model", "peft", "data", "train") for end in ("", ".*")])
setup(packages=["graftax", *(f"graftax.{room}" for room in rooms)])
