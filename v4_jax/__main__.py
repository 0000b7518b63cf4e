"""`python -m v4_jax` is `v4-jax`."""

from v4_jax.commands import entry

if __name__ == "__main__":
    entry()
