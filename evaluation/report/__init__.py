"""Stage `report`: one HTML file that opens offline, with its charts and its lineage."""
