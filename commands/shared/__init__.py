"""What the verbs share: options, devices, directories, engines, and how they speak."""
