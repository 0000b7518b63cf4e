"""`python -m v4_jax.cli` is `v4-jax`."""

from v4_jax.cli import entry

if __name__ == "__main__":
    entry()
