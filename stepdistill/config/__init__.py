"""Configs: YAML to frozen dataclasses, the classes that a config may name, and the commented template."""
