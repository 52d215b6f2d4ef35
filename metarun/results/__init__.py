"""What a run leaves behind: tables, pictures and comparisons."""
