"""Meshes, placement rules and communication patterns. Knows arrays, not models.

axes         which mesh axes split which logical axes
mesh         meshes from text
split        one device's view of a mesh during one call
collectives  collectives that vanish on axes of size one, and the sequence halo
top_k        the best of all devices' candidates
dispatch     rows to the devices that own what they need, and sums back
chips        what a chip holds and how fast it is at best
platform     forms of one platform, chosen by what a program is compiled for
"""
