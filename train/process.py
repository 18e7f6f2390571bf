"""What a command sets in its process before it computes."""

from __future__ import annotations

import functools
import os

import jax


@functools.cache
def prepare_process() -> None:
    """Keep compiled programs between runs."""
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "jaxmodels", "xla"))
