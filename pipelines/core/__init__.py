"""What every room uses: configuration bases, manifests, digests, atomic writes, sample keys, errors, progress."""
