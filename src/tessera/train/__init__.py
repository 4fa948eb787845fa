"""A run: what a config asks for is built, stepped, logged, evaluated, saved and handed out."""
