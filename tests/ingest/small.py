"""moon-jax with tiny chunks, units and shards: python -m tests.ingest.small prepare …"""

import sys

from moon_jax import cli
from moon_jax.augment import candidates
from moon_jax.ingest import prepare, readers
from moon_jax.serving import bulk

if __name__ == "__main__":
    candidates.UNIT, bulk.SHARD = 8, 2
    readers.CHUNK_RECORDS, prepare.SHARD_BYTES = 50, 100_000
    sys.exit(cli.main())
