"""A YAML file to checked values."""
