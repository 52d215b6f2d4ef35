"""The configuration files, importable so that an installed metarun finds them."""
