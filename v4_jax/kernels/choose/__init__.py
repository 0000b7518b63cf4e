"""Which form of an inner loop runs: by the platform that the program is compiled for, not by the process's own.

Each has a `reference.py`, which defines its numbers, beside forms of the same signature for one platform: `tpu.py`, a
Pallas kernel, or `cpu.py`, written so that XLA:CPU makes quick code of it. Layers call the functions here.

    function                 reference                      cpu                                       tpu
    products, weighted       einsum                         keys' gradients as sums, of few heads     reference
    window_attention         caller's, part by part         reference                                 kernels both ways
    window_step              caller's, read in order        reference                                 one kernel
    index_scores             einsum                         head by head                              reference
    enter_site, leave_site,  formulas of the report         reference                                 one kernel
    cross_sites
    matmul                   einsum                         weights' gradients with a second axis     one row as two
    products_with,           products with `dequantise`     reference                                 kernel, of E4M3
    grouped_product
    partial_products         the same, one by one           reference                                 one kernel
    best_entries             running top-k over blocks      reference                                 kernel
    marked_entries           numbers of `best_entries`      reference                                 kernel
    best_of_devices          sorts                          reference                                 one kernel
    indexer_loss             caller's, block by block       reference                                 kernels both ways
    attend_picked            caller's, over a gathered copy reference                                 kernels both ways
    compress                 caller's, all rows at once     reference                                 row by row
    newton_schulz_step       products                       reference                                 three kernels
    norm_rotate              one after the other            reference                                 a kernel both ways
    settle                   norm_rotate one by one         reference                                 one kernel
    attention_output         caller's                       reference                                 a kernel both ways
    attention_end            the same, and products         reference                                 one kernel
    map_groups               tiles of each group in turn    reference                                 caller's kernel
    few_rows_experts,        caller's, by groups of rows    reference                                 one kernel
    expert_of_all            caller's, by products          reference                                 the same
    many_rows_experts        caller's, by `map_groups`      reference                                 kernels both ways
    rows_in_tiles,           reshape                        reference                                 kernels both ways
    rows_from_tiles
    best_experts             top-k, and gather              reference                                 kernel
"""

from __future__ import annotations

from v4_jax.kernels.choose.attention import (
    attend_picked,
    attends_in_training,
    attention_end,
    attention_output,
    indexer_loss,
    products,
    trained_by_kernels,
    weighted,
    window_attention,
    window_step,
)
from v4_jax.kernels.choose.dense import (
    cross_sites,
    enter_site,
    grouped_product,
    leave_site,
    matmul,
    newton_schulz_step,
    norm_rotate,
    partial_products,
    products_with,
    settle,
)
from v4_jax.kernels.choose.entries import best_entries, best_of_devices, compress, index_scores, marked_entries
from v4_jax.kernels.choose.experts import (
    best_experts,
    expert_of_all,
    few_rows_experts,
    many_rows_experts,
    map_groups,
    rows_from_tiles,
    rows_in_tiles,
)

__all__ = [
    "attend_picked",
    "attends_in_training",
    "attention_end",
    "attention_output",
    "best_entries",
    "best_experts",
    "best_of_devices",
    "compress",
    "cross_sites",
    "enter_site",
    "expert_of_all",
    "few_rows_experts",
    "grouped_product",
    "index_scores",
    "indexer_loss",
    "leave_site",
    "many_rows_experts",
    "map_groups",
    "marked_entries",
    "matmul",
    "newton_schulz_step",
    "norm_rotate",
    "partial_products",
    "products",
    "products_with",
    "rows_from_tiles",
    "rows_in_tiles",
    "settle",
    "trained_by_kernels",
    "weighted",
    "window_attention",
    "window_step",
]
