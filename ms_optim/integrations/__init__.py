"""Integrations: one file for each library that our optimizers are made at home in; import the one you need."""
