"""Sparse Jacobians and Hessians: dependence, patterns, colourings, and the programs for their entries."""
