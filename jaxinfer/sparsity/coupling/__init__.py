"""Which slices of parameters can only go together."""
