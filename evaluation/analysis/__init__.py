"""Statistics, tables and charts: stages `results`, `fusion_analysis` and `trajectory_analysis`."""
