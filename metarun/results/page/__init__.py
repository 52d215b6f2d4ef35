"""The page that ``metarun-report`` writes: its HTML and its pictures."""
