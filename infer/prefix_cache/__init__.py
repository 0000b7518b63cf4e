"""The prefix cache: prompts that begin as an earlier text did are read from where they differ on."""
