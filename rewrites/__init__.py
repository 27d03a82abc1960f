"""The rules: one file per subject, each a table that anybody can read and extend.

Where several rules match at a node the first one is applied, so simplifications stand before what they expose.
"""

from jaxinfer.rewrites import (
    affine,
    branch_sharing,
    control_flow,
    conversions,
    convolution,
    fusion_bounds,
    linear_algebra,
    loop_blocks,
    loop_forms,
    loop_operands,
    loop_sharing,
    movement,
    native_integers,
    native_kernels,
    native_loops,
    padding,
    parallel_products,
    pooling,
    product_layouts,
    product_sums,
    recurrence,
    reductions,
    simplify,
    slicing,
    sparse_weights,
    structured,
)
from jaxinfer.rewriting import Rule

RULES: tuple[Rule, ...] = (
    *simplify.RULES,
    *conversions.RULES,
    *movement.RULES,
    *slicing.RULES,
    *reductions.RULES,
    *product_sums.RULES,
    *control_flow.RULES,
    *branch_sharing.RULES,
    *affine.RULES,
    *linear_algebra.RULES,
    *structured.RULES,
    *parallel_products.RULES,
    *loop_operands.RULES,
    *loop_sharing.RULES,
    *recurrence.RULES,
    *loop_forms.RULES,
    *loop_blocks.RULES,
    *native_loops.RULES,
    *convolution.RULES,
    *native_kernels.RULES,
    *native_integers.RULES,
    *pooling.RULES,
    *sparse_weights.RULES,
    *fusion_bounds.RULES,
)

# For derivatives as they are made: fewer operations, but everything joined is in memory at once, so no program that is
# there already is rewritten so.
DERIVATIVE_RULES: tuple[Rule, ...] = padding.RULES

# For derivatives that are about to run, once there is nothing left to simplify: on the way they would stand between
# operations that belong together.
FINAL_DERIVATIVE_RULES: tuple[Rule, ...] = (*product_layouts.RULES, *fusion_bounds.RULES)
