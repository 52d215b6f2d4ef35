"""The results of runs: tables, figures and comparisons."""
