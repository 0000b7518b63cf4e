"""The TPU compiler accepts the kernels at the real models' shapes, expands or copies no weights in memory, and makes no
more instructions of a kernel than are recorded (`make bundles` records them)."""
