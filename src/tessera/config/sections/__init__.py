"""The keys of the YAML file, one file for each subject; config/schema.py joins them."""
