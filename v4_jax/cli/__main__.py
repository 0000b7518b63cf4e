"""`python -m v4_jax.cli` is `v4-jax`."""

import sys

from v4_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
