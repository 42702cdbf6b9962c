"""Run folders: checkpoints and their manifests, resuming, loading, lineage, import and export."""
