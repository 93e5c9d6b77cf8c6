"""LAION metadata: source files, schemas, filter rules, stages `laion_index`, `laion_subset`, `laion_selection`."""
