"""The package is described in pyproject.toml; this file is here for tools that look for it."""

from setuptools import setup

setup()
