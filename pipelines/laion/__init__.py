"""LAION metadata: source files, schemas, filter rules, the stages `laion_index`, `laion_subset`, `laion_selection`."""
