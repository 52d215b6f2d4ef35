"""The command line: help, presets, directories, sweeps and resuming."""
