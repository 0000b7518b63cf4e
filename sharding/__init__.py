"""Meshes, placement rules and communication patterns. Knows arrays, not models.

axes         which mesh axes split which logical axes
mesh         meshes from text
split        one device's view of a mesh during one call
collectives  collectives that vanish on axes of size one, and the sequence halo
top_k        the best of all devices' candidates
dispatch     rows to the devices that own what they need, and sums back
hlo          the collectives of a compiled program
hlo_costs    its FLOPs and memory traffic, with loops multiplied out
"""
