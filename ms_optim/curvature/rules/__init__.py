"""The rules: for every kind of use, the per-sample gradient as a contraction; :mod:`.layers` has them all."""
