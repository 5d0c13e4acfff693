"""Training recipes on timm: models, data, optimizers and a loop, from a command line or a YAML file."""
