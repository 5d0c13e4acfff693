"""Recipes: settings of trainings, one YAML file each; see README.md."""
