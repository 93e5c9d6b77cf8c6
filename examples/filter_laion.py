"""Filters a LAION-format table with rules, and says where every row went.

python examples/filter_laion.py FOLDER
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.laion import index, subset
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.sources import scan_index

folder = Path(sys.argv[1])
metadata = folder / "metadata"
metadata.mkdir(parents=True, exist_ok=True)
rows = [
    {"URL": f"https://images.example/{number}.jpg", "TEXT": f"photo {number}", "WIDTH": 64 * number, "HEIGHT": 512}
    for number in range(1, 21)
]
rows.append(dict(rows[9]))  # the same pair twice
pq.write_table(pa.Table.from_pylist(rows), metadata / "part-0.parquet")

registered = index.STAGE.run(scan_index(metadata), {}, folder)
entry = registered.only_file(registered.files(".json")[0].name)  # a part depends on its own entry alone
rules = LaionSubsetConfig(min_side_px=256, max_aspect=2.0)
output = subset.STAGE.run(rules, {"index": [entry]}, folder, partition="part-0")

table = output.manifest.conservation
assert table is not None
print(f"{table.rows_in} rows in, {table.rows_out} kept")
for reason, count in table.dropped.items():
    print(f"  {count} dropped: {reason}")
print(f"data version {output.data_version[:12]}, in {output.folder}")
