"""What `python -m jaxcert` does with what is typed."""

import os
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence

import jax

from jaxcert.cli.answers import said
from jaxcert.cli.arguments import parser
from jaxcert.cli.benchmark import INTERRUPTED
from jaxcert.errors import JaxcertError

FAILED = 1
"""The exit status of a mistake, the user's as a rule."""


def main(argv: Sequence[str], began: float | None = None) -> int:
    """Do what is typed; returns the exit status.

    Args:
      argv: what follows the program's name.
      began: when the clock started, by `time.perf_counter()`.
    """
    began = time.perf_counter() if began is None else began
    typed = parser().parse_args(argv)
    task = typed.task(typed, began)
    try:
        _prepare(typed.cache)
        return task.run()
    except KeyboardInterrupt:
        print("jaxcert: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError, JaxcertError) as error:
        print(f"jaxcert: {said(error)}", file=sys.stderr)
        return FAILED


def _prepare(cache: pathlib.Path | None) -> None:
    """JAX as a command wants it, which is nothing a library may decide: quiet, with a cache."""
    # JAX sets this variable to "1" itself; anything else is the user's wish.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1" and "JAX_LOGGING_LEVEL" not in os.environ:
        jax.config.update("jax_logging_level", "CRITICAL")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    folder = cache or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder /= "jaxcert"
    try:
        pathlib.Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        if cache is not None:
            raise
        return  # without a cache it is slower, and that is all
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs, too: a search starts with dozens, each compiled in the time of ten look-ups.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
