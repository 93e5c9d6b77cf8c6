"""Shared contracts: configuration bases, manifests, digests, atomic writes, sample keys, errors and progress."""
