"""What ``metarun-compare`` and ``metarun-report`` share: reading runs, statistics, tables and pictures."""
