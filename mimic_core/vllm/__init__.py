"""Serve stacks with vLLM: each request of a running batch chooses a stack by its name, or none.

vLLM finds the plugin by its entry point, `plugin.register`. `docs/serve.md` says how it is used.
"""

from .running import add, names, remove
from .sources import engine_args

__all__ = ["add", "engine_args", "names", "remove"]
