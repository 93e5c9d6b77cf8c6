"""Lineage tools that work on manifests alone: status, audit, trace."""
