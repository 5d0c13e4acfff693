"""The losses: the logit factor S of each, P = S Sᵀ, in columns."""
