"""Reports of sweeps, comparisons and decisions: tables as data, then markdown, HTML, pictures and console output."""
